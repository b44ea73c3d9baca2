"""What is written for a results group: the group, USID Main datasets for the outputs, and the status mask.

Every function writes through an open group that the caller hands over, whatever driver is behind it. Datasets are
contiguous and allocated at once, so that their rows have a place in the file that no later write moves.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ArgumentValueError, ReadOnlyFileError, ResultsError
from lazyproc.core.specs import Dimension, ResolvedOutput
from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.grid import spans
from lazyproc.hdf5.usid import REFERENCES, ancillary_handles, read_texts

LARGEST_FILLED = 16 * 1024 * 1024
"""Bytes: larger datasets are allocated without being written, which takes no time and no memory."""

SCALAR_MARK = "lazyproc_scalar"
"""Attribute of an output that has one value a position, so that views give it no spectroscopic dimension."""

SINGLE_VALUE = Dimension("Single_Value", "a.u.", 1)
"""The dimension, in the file, of an output that has one value a position."""
_ZEROS = 1024 * 1024

Shape = tuple[int, ...]
External = tuple[str, int, int]


def group_name(h5_main_name: str, process_name: str, existing: Iterable[str]) -> str:
    """Name the next results group of a process.

    Parameters
    ----------
    h5_main_name : str
        The main dataset's name, with or without its path.
    process_name : str
        The process; ``-`` becomes ``_``, since it separates the two names.
    existing : iterable of str
        The names in the target group. Only those of exactly this process count.

    Raises
    ------
    ArgumentValueError
        If the process name cannot be a part of the name of one group.

    Examples
    --------
    >>> group_name("/Measurement_000/Raw_Data", "Peak-Fit", ["Raw_Data-Peak_Fit_002", "Raw_Data-Peak_Fit_more_007"])
    'Raw_Data-Peak_Fit_003'
    """
    if not process_name.strip() or "/" in process_name or "\0" in process_name:
        raise ArgumentValueError(
            f"process_name is {process_name!r}; expected a text without '/', since it names the results group."
        )
    prefix = f"{h5_main_name.rpartition('/')[2]}-{_tool(process_name)}_"
    matches = (re.fullmatch(re.escape(prefix) + r"(\d+)", name) for name in existing)
    return f"{prefix}{max((int(match[1]) for match in matches if match), default=-1) + 1:03d}"


def create_results_group(
    target: h5py.Group, h5_main: h5py.Dataset, process_name: str, attrs: Mapping[str, Any]
) -> h5py.Group:
    """Create the next results group of a process, with the attributes that tell where it comes from.

    Parameters
    ----------
    target : h5py.Group
        Where it is created, writable.
    h5_main : h5py.Dataset
        The main dataset; through the same open file as `target` where it lies in the same file.
    process_name : str
        The process.
    attrs : mapping of str to object
        Further attributes, of types that h5py can write. They come last, so they may replace the usual ones.

    Raises
    ------
    ArgumentValueError
        If the process name cannot be a part of the name of one group.
    ReadOnlyFileError
        If the target is open for reading only.
    """
    if target.file.mode == "r":
        raise ReadOnlyFileError(
            f"{target.file.filename}: open for reading only (mode 'r'), so no results group can be created in "
            f"{target.name}. Open it with mode 'r+', or give h5_target_group in another file."
        )
    group = target.create_group(group_name(str(h5_main.name), process_name, target))
    usual: dict[str, Any] = {
        "tool": _tool(process_name),
        "num_source_dsets": 1,
        "machine_id": socket.gethostname(),
        "platform": platform.platform(),
        "timestamp": time.strftime("%Y_%m_%d-%H_%M_%S"),
    }
    if h5_main.file == target.file:
        usual["source_000"] = h5_main.ref
    else:
        usual["source_file_path"] = os.path.abspath(h5_main.file.filename)
        usual["source_dataset_path"] = str(h5_main.name)
    for name, value in {**usual, **attrs}.items():
        group.attrs[name] = value
    return group


def create_output(
    group: h5py.Group,
    h5_main: h5py.Dataset,
    output: ResolvedOutput,
    *,
    same_file: bool,
    rows: External | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> h5py.Dataset:
    """Create the dataset of an output, `(n_positions, output.width)`, as a USID Main dataset.

    Parameters
    ----------
    group : h5py.Group
        The results group.
    h5_main : h5py.Dataset
        The main dataset.
    output : ResolvedOutput
        The output.
    same_file : bool
        Whether the ancillary datasets of the main dataset can be referred to. If not, they are copied into the group,
        once for all outputs.
    rows : tuple of (str, int, int), optional
        The file that has its rows, where they begin in it, and their bytes. Default: they lie in the HDF5 file.
    attrs : mapping, optional
        Further attributes.

    Returns
    -------
    h5py.Dataset
        With its place in the file; shows the fill value up to 16 MiB, beyond that whatever the file holds there.

    Raises
    ------
    NotMainDatasetError
        If `h5_main` is not a main dataset.
    ResultsError
        If the group has something of one of the names already.
    """
    sources = ancillary_handles(h5_main)
    positions, spectral = sources[:2], sources[2:]
    if not same_file:
        positions = _copied_pair(group, positions, REFERENCES[:2], along=0)
    if not output.spec.shape_from_main:
        spectral = _create_spectroscopic(group, output)
    elif not same_file:
        spectral = _copied_pair(group, spectral, REFERENCES[2:], along=1)
    attrs = {"quantity": output.quantity, "units": output.units, **(attrs or {})}
    attrs.update((name, item.ref) for name, item in zip(REFERENCES, (*positions, *spectral), strict=True))
    if output.shape == ():
        attrs[SCALAR_MARK] = True
    shape = (int(h5_main.shape[0]), output.width)
    filled = rows is None and shape[0] * output.row_bytes <= LARGEST_FILLED
    return create_contiguous(group, output.name, shape, output.dtype, attrs, output.fill_value, filled, rows)


def create_status_mask(
    group: h5py.Group, n_positions: int, name: str, attrs: Mapping[str, Any] | None = None
) -> h5py.Dataset:
    """Create the status mask, or another dataset of its form: uint8 `(n_positions,)`, all zeros.

    Raises
    ------
    ResultsError
        If the group has something of this name already.
    """
    # HDF5 may place it where something was deleted, and it would start out with that; hence zeros are written.
    mask = create_contiguous(group, name, (n_positions,), np.dtype(np.uint8), attrs or {}, np.uint8(0), filled=False)
    for start in range(0, n_positions, _ZEROS):
        mask[start : start + _ZEROS] = 0
    return mask


def write_texts(attrs: h5py.AttributeManager, name: str, texts: Sequence[str]) -> None:
    """Write texts as an array of fixed length in UTF-8, the form that pyUSID writes and every reader understands."""
    encoded = [text.encode("utf-8", "replace") for text in texts]
    length = max(1, *(len(text) for text in encoded))
    attrs.create(name, np.array(encoded, f"S{length}"), dtype=h5py.string_dtype("utf-8", length))


def _tool(process_name: str) -> str:
    return process_name.replace("-", "_")


def create_contiguous(
    group: h5py.Group,
    name: str,
    shape: Shape,
    dtype: np.dtype[Any],
    attrs: Mapping[str, Any],
    fill_value: Any = None,
    filled: bool = False,
    external: External | None = None,
) -> h5py.Dataset:
    """Create a dataset whose bytes have their place at once; it gets its name last, when it is complete.

    Parameters
    ----------
    group : h5py.Group
        Where, writable.
    name : str
        Its name.
    shape, dtype
        Its form.
    attrs : mapping
        Its attributes.
    fill_value : scalar, optional
        What HDF5 tells as its fill value.
    filled : bool
        Write that value; else the dataset shows whatever the file holds there.
    external : tuple of (str, int, int), optional
        A file that has its bytes, where they begin in it, and how many.

    Raises
    ------
    ResultsError
        If the group has something of this name already.
    """
    if name in group:
        raise ResultsError(
            f"{group.name}: there is a {name!r} already; expected a new results group. Choose another name for the "
            "output, or start a new group with override=True."
        )
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    if external is not None:
        creation.set_external(os.fsencode(external[0]), *external[1:])
    creation.set_fill_time(h5py.h5d.FILL_TIME_ALLOC if filled else h5py.h5d.FILL_TIME_NEVER)
    if fill_value is not None:
        set_fill_value(creation, fill_value, dtype)
    stored = h5py.h5t.py_create(dtype, logical=True)
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.Dataset(h5py.h5d.create(group.id, None, stored, space, creation))
    for key, value in attrs.items():
        if key in ("labels", "units") and not isinstance(value, str):
            write_texts(dataset.attrs, key, value)
        else:
            dataset.attrs[key] = value
    group[name] = dataset
    return group[name]


def set_fill_value(creation: Any, value: Any, dtype: np.dtype[Any]) -> None:
    """Tell HDF5 the value of a dataset of this dtype where nothing was written.

    Notes
    -----
    Of bytes of fixed length h5py would hand over the address of the value instead of the value; it reads the value only
    from a text of variable length, which HDF5 then converts.
    """
    filled = np.asarray(value, dtype)
    if dtype.kind == "S":
        filled = np.array(filled[()], h5py.string_dtype(h5py.check_string_dtype(dtype).encoding))
    creation.set_fill_value(filled)


def spectroscopic_name(output: ResolvedOutput) -> str:
    """Return how the names of the spectroscopic datasets of an output begin."""
    return f"{output.name}_Spectroscopic_"


def index_along(dim: Dimension, width: int, faster: int) -> NDArray[np.int64]:
    """Return the index along a dimension in each column; `faster` is the product of the sizes of those that are."""
    return np.arange(width, dtype=np.int64) // faster % dim.size


def _create_spectroscopic(group: h5py.Group, output: ResolvedOutput) -> tuple[h5py.Dataset, h5py.Dataset]:
    """Create the spectroscopic pair of an output: `(n_dims, width)`, the slowest dimension first."""
    dims = output.dims or (SINGLE_VALUE,)
    attrs = {"labels": [dim.name for dim in dims], "units": [dim.units for dim in dims]}
    shape = (len(dims), output.width)
    name = spectroscopic_name(output)
    indices = create_contiguous(group, f"{name}Indices", shape, np.dtype(np.uint32), attrs)
    values = create_contiguous(group, f"{name}Values", shape, np.dtype(np.float64), attrs)
    faster = output.width
    for row, dim in enumerate(dims):
        faster //= dim.size
        index = index_along(dim, output.width, faster)
        indices[row] = index
        values[row] = dim.values[index]
    return indices, values


def _copied_pair(
    group: h5py.Group, sources: Sequence[h5py.Dataset], names: Sequence[str], along: int
) -> tuple[h5py.Dataset, h5py.Dataset]:
    """Return the copies of a pair of ancillary datasets in the group, made if they are not there yet."""
    indices, values = (
        group[name] if name in group else _copy(group, source, name, along)
        for source, name in zip(sources, names, strict=True)
    )
    return indices, values


def _copy(group: h5py.Group, source: h5py.Dataset, name: str, along: int) -> h5py.Dataset:
    """Copy an ancillary dataset in pieces, with its attributes but for references: they hold in their own file only."""
    attrs = {key: attribute(source, key) for key in source.attrs if _is_plain(source.attrs, key)}
    attrs.update((key, read_texts(attribute(source, key))) for key in ("labels", "units"))
    copy = create_contiguous(group, name, source.shape, source.dtype, attrs)
    for start, stop in spans(source, along):
        piece = np.s_[:, start:stop] if along else np.s_[start:stop, :]
        copy[piece] = source[piece]
    return copy


def _is_plain(attrs: h5py.AttributeManager, name: str) -> bool:
    """Tell whether an attribute can be read, and means the same in another file."""
    try:
        dtype = attrs.get_id(name).dtype
    except TypeError:  # a type that NumPy does not have
        return False
    return not dtype.hasobject or h5py.check_string_dtype(dtype) is not None
