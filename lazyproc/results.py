"""Results as labelled arrays: `open_results` for what is in a file, `lazy_results` for what a process would give."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import h5py
import numpy as np

from lazyproc.core.errors import ArgumentTypeError, ResultsError
from lazyproc.core.failed import DONE, STATUS_MEANINGS, FailedPosition
from lazyproc.core.specs import STATUS_MASK, Output, ResolvedOutput
from lazyproc.engine.kernel import Kernel
from lazyproc.hdf5.attributes import MANIFEST, read_parameters
from lazyproc.hdf5.create import SCALAR_MARK
from lazyproc.hdf5.damage import attribute, attributes, members, reading
from lazyproc.hdf5.failures import has_failures, read_failures
from lazyproc.hdf5.files import Files, split_address
from lazyproc.hdf5.grid import position_grid, spectroscopic_grid
from lazyproc.hdf5.hook_record import status_masks
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.seal import PLACES, SEAL, check_places
from lazyproc.hdf5.search import remaining_positions, status_name_of
from lazyproc.hdf5.steady import read_steadily
from lazyproc.hdf5.usid import is_main, read_text
from lazyproc.layout import (
    Axis,
    axis_of_grid,
    axis_of_output,
    block_grid,
    name_apart,
    positions_per_view_block,
    positions_to_compute,
)
from lazyproc.views import BlockView, Committed, StatusView, group_id, lazy_arrays

if TYPE_CHECKING:
    import xarray

_ADVICE = "Compute it again with override=True, or restore the file from a copy."
_STATUS = "status"
_SPECTRAL = "spectral"
_OF_THE_FILE = (SEAL, PLACES, "lazyproc_probe")
"""Attributes that mean something only to runs on the file."""
_NOTHING = Axis((), (), (), {})

Result = TypeVar("Result")


def open_results(group: h5py.Group | str | os.PathLike[str]) -> xarray.Dataset:
    """Open a results group as a dataset of N-D, dask-backed arrays.

    Parameters
    ----------
    group : h5py.Group, str or path-like
        The results group, written by lazyproc or by pyUSID, or its address: ``"scan.h5::/…/Raw_Data-Fit_000"``.

    Returns
    -------
    xarray.Dataset
        One variable a main dataset in the group, with the coordinates of the source; `status`, which tells for each
        position whether it is done (1), not done (0) or has failed and was recorded (2; see `failures`), and is called
        `completed_positions` if an output is called so; parameters and provenance as attributes. Positions that are
        not done, or have failed, show the fill value.

    Raises
    ------
    ResultsError
        If the group holds no main dataset, or it is damaged; on computing, too.
    ArgumentTypeError
        If it is no group, nor an address of one.
    ArgumentValueError
        If the address names no file, or one that is no HDF5 file or may not be read.
    FileNotFoundError
        If there is no such file.
    StaleViewError
        On computing, if the results are no longer there, or others are in their place.

    Notes
    -----
    Reads while a run goes on are fine: a row shows once it is committed, and only with right values. The file is
    opened for each read, and the group's identity is checked each time. So there is nothing to close: the dataset
    outlives the group that was given, and may be computed in threads, processes and on a cluster. Only results of a
    file in memory are read through that group.

    Examples
    --------
    ``scan.h5`` has 4 x 5 positions of 6 values, 0 to 119:

    >>> import numpy as np, lazyproc
    >>> address = "scan.h5::/Measurement_000/Channel_000/Raw_Data"
    >>> group = lazyproc.map_positions(np.ptp, address, {"Range": lazyproc.Output("f4", units="V")})
    >>> maps = lazyproc.open_results("scan.h5::/Measurement_000/Channel_000/Raw_Data-ptp_000")
    >>> maps["Range"].dims, maps["Range"].attrs["units"], int(maps["status"].min())
    (('X', 'Y'), 'V', 1)
    """
    return _read(group, _dataset_of_group)


def _read(group: Any, read: Callable[[h5py.Group, str | None], Result]) -> Result:
    """Open a group, read it and close what was opened; again, if the file was being changed."""

    def once() -> Result:
        files = Files()
        try:
            path, opened = _open_group(group, files)
            with reading(f"{path or opened.file.filename}::{opened.name}", _ADVICE):
                return read(opened, path)
        finally:
            files.close()

    return read_steadily(split_address(group, "group")[0] if isinstance(group, str | os.PathLike) else None, once)


def _open_group(group: Any, files: Files) -> tuple[str | None, h5py.Group]:
    """Open the group; by its path wherever there is one, so that the dataset outlives the caller's handle."""
    if isinstance(group, str | os.PathLike):
        file, name = split_address(group, "group")
        with reading(f"group: {file}::{name}", _ADVICE):
            found = files.open(file, "group").get(name)
        if not isinstance(found, h5py.Group):
            raise ArgumentTypeError(f"group: {file}::{name} is not there, or no group; expected a results group.")
        return file, found
    if not isinstance(group, h5py.Group) or not group:
        raise ArgumentTypeError(
            f"group: {group!r} came; expected an open results group, or its address 'scan.h5::/…/Raw_Data-Fit_000'."
        )
    path = path_of_group(group)
    if path is None:
        return None, group
    if group.file.mode != "r":
        group.file.flush()
    return path, files.open(path)[group.name]


def path_of_group(group: h5py.Group) -> str | None:
    """Return the file behind a handle of any kind, if opening it by its name shows the same group."""
    path = real_path(group.file)
    if path is not None:
        return path
    name = str(group.file.filename)  # a file object that lazyproc opened tells its path
    if group.file.driver != "fileobj" or not os.path.isfile(name):
        return None
    files = Files()
    try:
        same = files.open(name).get(group.name)
        return name if isinstance(same, h5py.Group) and group_id(same) == group_id(group) else None
    finally:
        files.close()


def _dataset_of_group(group: h5py.Group, path: str | None) -> xarray.Dataset:
    declared = check_places(group)
    names = [name for name, item in members(group, follow=True) if isinstance(item, h5py.Dataset) and is_main(item)]
    names.sort(key=lambda name: declared.index(name) if name in declared else len(declared))
    if not names:
        raise ResultsError(
            f"{path or group.file.filename}::{group.name}: holds no main dataset; expected a results group, such as "
            "'…/Raw_Data-Fit_000'."
        )
    n_positions = group[names[0]].shape[0]
    names = [name for name in names if group[name].shape[0] == n_positions]
    by_declaration = "lazyproc_run_id" in group.attrs
    stored = [_stored_output(group[name], by_declaration) for name in names]
    outputs = tuple(output for output, _ in stored)
    positions = axis_of_grid(position_grid(group[names[0]]), "position", {*names, _STATUS})
    status_name = _status_name(group, n_positions)
    n_done = None if status_name else _done_before(group, n_positions)
    committed = Committed(path, None if path else group, str(group.name), group_id(group), outputs, status_name, n_done)
    inner = _name_inner(outputs, [axis for _, axis in stored], positions)
    dataset = _assemble(outputs, positions, inner, committed, None, str(group.name).rpartition("/")[2], ("", ""))
    dataset.attrs.update(_attributes(group))
    if status_name or n_done is not None:
        grid = block_grid(positions.shape, positions_per_view_block(1))
        (array,) = lazy_arrays(StatusView(grid, committed), positions, [_NOTHING], _STATUS)
        recorded = bool(status_name) and has_failures(group, status_name)
        dataset[_status_variable(names)] = _status(array, positions, recorded=recorded)
    return dataset


def failures(group: h5py.Group | str | os.PathLike[str]) -> list[FailedPosition]:
    """Tell which positions of a results group have failed, and why.

    Parameters
    ----------
    group : h5py.Group, str or path-like
        The results group, or its address: ``"scan.h5::/…/Raw_Data-Fit_000"``.

    Returns
    -------
    list of FailedPosition
        In order of the positions. Each is a frozen dataclass of `position` (int, of the main dataset), `error` (str,
        the type of what was raised, with its module unless it is built in) and `text` (str, what it said, up to 436
        bytes); the last two are empty if they were damaged. ``str()`` makes a line of it. The list is empty if none has
        failed, or failures were not recorded. `pandas.DataFrame` takes it as it is.

    Raises
    ------
    ArgumentTypeError
        If it is no group, nor an address of one.
    ArgumentValueError
        If the address names no file, or one that is no HDF5 file or may not be read.
    ResultsError
        If what was recorded was damaged.
    FileNotFoundError
        If there is no such file.

    Notes
    -----
    May be called while a run goes on; tells what is committed.

    Examples
    --------
    ``scan.h5`` has 4 x 5 positions of 6 values, 0 to 119:

    >>> import lazyproc
    >>> def ratio(spectrum):
    ...     return 1 / int(spectrum[0])
    >>> address = "scan.h5::/Measurement_000/Channel_000/Raw_Data"
    >>> group = lazyproc.map_positions(ratio, address, lazyproc.Output("f4"), on_error="record")
    >>> lazyproc.failures(group)
    [FailedPosition(position=0, error='ZeroDivisionError', text='division by zero')]
    >>> print(*lazyproc.failures("scan.h5::/Measurement_000/Channel_000/Raw_Data-ratio_000"))
    position 0: ZeroDivisionError: division by zero
    """
    return _read(group, lambda opened, _: read_failures(opened, status_name_of(opened)))


def _status_name(group: h5py.Group, n_positions: int) -> str:
    name = status_name_of(group)
    mask = group.get(name)
    if isinstance(mask, h5py.Dataset) and mask.shape == (n_positions,) and mask.dtype == np.uint8:
        return name
    if "lazyproc_run_id" in group.attrs:
        raise ResultsError(
            f"{group.name}: has no status mask {name!r} of {n_positions} positions, so nothing tells what is done. "
            f"Another program has changed it, or the file is damaged. {_ADVICE}"
        )
    return ""


def _done_before(group: h5py.Group, n_positions: int) -> int | None:
    """Return how many positions of older results, which have no status mask at all, are done; None: all, or not known.

    A mask of another length, or name, is that of a class which does things in its own way: it sets ``last_pixel`` to 0
    between two phases, though the results of the first one are there.
    """
    if status_name_of(group) in group or status_masks(group):
        return None
    try:
        rest = remaining_positions(group, n_positions, status_name_of(group))
    except ResultsError:  # without last_pixel, or with one that is no number
        return None
    return int(rest.starts[0]) if rest.n_positions else None


def _stored_output(dataset: h5py.Dataset, by_declaration: bool) -> tuple[ResolvedOutput, Axis]:
    """Describe a stored main dataset as an output, and the dimensions of one position's result.

    What lazyproc created tells itself whether it is one value a position, and its fill value; of others, a single
    column counts as one value.
    """
    name = str(dataset.name).rpartition("/")[2]
    quantity, units = (read_text(attribute(dataset, name)) for name in ("quantity", "units"))
    spec = Output.stored(dataset.dtype, quantity, units, dataset.fillvalue if by_declaration else None)
    grid = spectroscopic_grid(dataset)
    single = dataset.shape[1] == 1 and len(grid.labels) == 1
    if single and attribute(dataset, SCALAR_MARK, not by_declaration):
        return ResolvedOutput(name, dataset.dtype, (), quantity, units, None, spec), _NOTHING
    axis = axis_of_grid(grid, _SPECTRAL, ())
    return ResolvedOutput(name, dataset.dtype, (dataset.shape[1],), quantity, units, None, spec), axis


def _name_inner(outputs: Sequence[ResolvedOutput], axes: Sequence[Axis], positions: Axis) -> list[Axis]:
    """Name the dimensions of the outputs apart from those of the positions and from each other."""
    names = [output.name for output in outputs]
    taken = {*positions.dims, *positions.coordinates, *names, _STATUS}
    return name_apart(dict(zip(names, axes, strict=True)), taken)


def _attributes(group: h5py.Group) -> dict[str, Any]:
    """Return parameters, and then provenance; what means nothing outside the file is left out."""
    parameters = read_parameters(group)
    left_out = {*parameters, MANIFEST, *_OF_THE_FILE}
    provenance = {
        name: read_text(value).strip() if isinstance(value, str | bytes) else value
        for name, value in attributes(group).items()
        if name not in left_out and not isinstance(value, h5py.Reference | h5py.RegionReference)
    }
    return {name: _plain(value) for name, value in (parameters | provenance).items()}


def _plain(value: Any) -> Any:
    """Return a value in a form that xarray can write as an attribute: numbers, texts, arrays, lists and dicts."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.ndim:
        return value
    if isinstance(value, np.ndarray | np.generic):
        python = value.tolist()
        return str(python) if isinstance(python, np.generic) else _plain(python)
    if isinstance(value, Mapping):
        return {str(key): _listed(_plain(item)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(_plain(item)) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _status_variable(names: Iterable[str]) -> str:
    return _STATUS if _STATUS not in names else STATUS_MASK


def _status(array: Any, positions: Axis, *, recorded: bool) -> Any:
    import xarray

    meanings = STATUS_MEANINGS if recorded else STATUS_MEANINGS[: DONE + 1]
    attrs = {"flag_values": list(range(len(meanings))), "flag_meanings": " ".join(meanings)}
    return xarray.Variable(positions.dims, array, attrs)


def _assemble(
    outputs: Sequence[ResolvedOutput],
    positions: Axis,
    inner: Sequence[Axis],
    committed: Committed | None,
    kernel: Kernel | None,
    name: str,
    label: tuple[str, str],
    row_bytes: int = 0,
    *,
    most_positions: int | None = None,
    recorded: bool = False,
) -> xarray.Dataset:
    import xarray

    row_bytes += sum(output.row_bytes for output in outputs)
    most = min(most_positions or math.prod(positions.shape), positions_per_view_block(row_bytes))
    grid = block_grid(positions.shape, most)
    view = BlockView(grid, tuple(outputs), committed, kernel, label)
    arrays = lazy_arrays(view, positions, [*inner, _NOTHING], name)
    status = arrays.pop()
    variables = {
        output.name: xarray.Variable(
            positions.dims + axis.dims, array, {"long_name": output.quantity, "units": output.units}
        )
        for output, axis, array in zip(outputs, inner, arrays, strict=True)
    }
    coordinates: dict[str, Any] = {}
    for axis in (positions, *inner):
        for key, (dims, values, attrs) in axis.coordinates.items():
            coordinates[key] = xarray.Variable(dims, values, attrs)
    if recorded:
        variables[_status_variable(variables)] = _status(status, positions, recorded=True)
    return xarray.Dataset(variables, coordinates)


def lazy_results(
    main: h5py.Dataset,
    outputs: Sequence[ResolvedOutput],
    kernel: Kernel,
    committed: Committed | None,
    process_name: str,
    label: str,
    parameters: Mapping[str, Any],
    *,
    recorded: bool,
) -> xarray.Dataset:
    """Make the dataset of all outputs of a process: committed positions are read, the others computed when asked for.

    Parameters
    ----------
    main : h5py.Dataset
        The main dataset.
    outputs : sequence of ResolvedOutput
        What the process gives.
    kernel : Kernel
        How a block is computed.
    committed : Committed or None
        What is in a file already.
    process_name, label : str
        The process, and the main dataset, for messages.
    parameters : mapping
        Become attributes.
    recorded : bool
        Whether failures are recorded, or were: then there is a variable `status`.
    """
    names = {output.name for output in outputs}
    positions = axis_of_grid(position_grid(main), "position", names | {_STATUS})
    keeps_columns = any(output.spec.shape_from_main for output in outputs)
    columns = axis_of_grid(spectroscopic_grid(main), _SPECTRAL, ()) if keeps_columns else _NOTHING
    inner = _name_inner(outputs, [axis_of_output(output, columns) for output in outputs], positions)
    source_bytes = int(main.shape[1]) * main.dtype.itemsize
    who = (process_name, label)
    most = None if kernel.vectorized else positions_to_compute(int(main.shape[0]), main.chunks[0] if main.chunks else 1)
    dataset = _assemble(
        outputs, positions, inner, committed, kernel, process_name, who, source_bytes,
        most_positions=most, recorded=recorded,
    )  # fmt: skip
    dataset.attrs.update(tool=process_name, **{name: _plain(value) for name, value in parameters.items()})
    return dataset
