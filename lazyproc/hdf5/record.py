"""Write a results group: create it with its provenance, make room in it, note how its run ended."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from lazyproc.core.specs import FAILED_POSITIONS, POSITION_STATUS, ResolvedOutput
from lazyproc.hdf5.attributes import write_parameters
from lazyproc.hdf5.create import External, create_output, create_results_group, create_status_mask
from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.failures import EMPTY_ROW, capacity_of, create_failures
from lazyproc.hdf5.marks import create_status
from lazyproc.hdf5.reserve import reserved
from lazyproc.hdf5.rows_file import MARK, RowsFiles
from lazyproc.hdf5.seal import PLACES, write_places, write_seal
from lazyproc.hdf5.search import BATCH, Work, remaining_positions
from lazyproc.hdf5.usid import ancillary_handles

_METADATA_BYTES = 2**18
"""What attributes, labels and HDF5's own structures take, mostly less."""
_TIME = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True)
class Stamp:
    """When, where and as what a results group was begun; ranks that create one together must write the same.

    Attributes
    ----------
    run_id : str
        Of this group, and of no other one.
    host, platform : str
        The machine.
    seconds : float
        Since the epoch.
    """

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    platform: str = field(default_factory=platform.platform)
    seconds: float = field(default_factory=time.time)

    def time(self, form: str = _TIME) -> str:
        """Return the local time as text."""
        return time.strftime(form, time.localtime(self.seconds))


@dataclass(frozen=True)
class Provenance:
    """What is recorded of a run beside its parameters.

    Attributes
    ----------
    function : str
        The function's qualified name.
    fingerprint : str
        Of the main dataset; empty if it is not verified.
    versions : dict
        Packages and their versions.
    probe : dict
        What the probe measured, so that a resumed run needs none.
    batch : str
        The jobs, one after another, that began the group and go on with it; empty if none are known.
    stamp : Stamp
        When and where.
    """

    function: str
    fingerprint: str
    versions: dict[str, str]
    probe: dict[str, float]
    batch: str = ""
    stamp: Stamp = field(default_factory=Stamp)


def create_group(
    parent: h5py.Group,
    main: h5py.Dataset,
    work: Work,
    provenance: Provenance,
    max_failures: int | None,
    rows: RowsFiles | None = None,
) -> str:
    """Create the results group with all its datasets below `parent` and return its name.

    Parameters
    ----------
    parent : h5py.Group
        The target group, writable.
    main : h5py.Dataset
        The main dataset; a handle of the same open file where it lies in the same file.
    work : Work
        What shall be computed.
    provenance : Provenance
        What is recorded beside.
    max_failures : int or None
        Make room for so many failed positions; None if failures are not recorded.
    rows : RowsFiles, optional
        Makes files for the rows of outputs that are to be compressed. Default: they lie in the HDF5 file until then.
    """
    same_file = main.file == parent.file
    stamp = provenance.stamp
    attrs = {
        "machine_id": stamp.host,
        "platform": stamp.platform,
        "timestamp": stamp.time("%Y_%m_%d-%H_%M_%S"),
        "lazyproc_run_id": stamp.run_id,
        "lazyproc_arguments": work.arguments,
        "lazyproc_source": work.main_name,
        "lazyproc_status_mask": work.status_name,
        "lazyproc_fingerprint": provenance.fingerprint,
        "lazyproc_function": provenance.function,
        "lazyproc_code": work.code,
        "lazyproc_versions": json.dumps(provenance.versions),
        "lazyproc_probe": json.dumps(provenance.probe),
        "lazyproc_host": stamp.host,
        "lazyproc_started": stamp.time(),
        "lazyproc_finished": "".ljust(19),
        "lazyproc_workers": "".ljust(64),
        "last_pixel": np.int64(0),
    }
    if provenance.batch:
        attrs[BATCH] = provenance.batch
    if not same_file:
        main_file = work.main_file
        attrs["source_file_path"] = os.path.abspath(main_file) if os.path.exists(main_file) else main_file
    n_failures = None if max_failures is None else min(max_failures, work.n_positions)
    outside: dict[str, External] = {}
    if rows is not None:
        wanted = [output for output in work.outputs if output.filters is not None]
        outside = {output.name: rows.make(stamp.run_id, output, work.n_positions) for output in wanted}
    inside = [output for output in work.outputs if output.name not in outside]
    with reserved(parent.file, _results_bytes(main, work, inside, n_failures, same_file=same_file), "the results"):
        group = create_results_group(parent, main, work.process_name, attrs)
        write_parameters(group, work.parameters)
        for output in work.outputs:
            _create(group, main, output, outside.get(output.name), same_file=same_file)
        create_status_mask(group, work.n_positions, work.status_name)
        create_status(group, work.status_name)
        if n_failures is not None:
            create_failures(group, work.status_name, n_failures)
        write_places(group, _written(work))
        write_seal(group)
        return str(group.name)


def _create(
    group: h5py.Group, main: h5py.Dataset, output: ResolvedOutput, rows: External | None, *, same_file: bool
) -> None:
    """Create an output; one that is to be compressed says how."""
    attrs = {} if output.filters is None else {MARK: output.filters.text()}
    create_output(group, main, output, same_file=same_file, rows=rows, attrs=attrs)


def _results_bytes(
    main: h5py.Dataset, work: Work, inside: Sequence[ResolvedOutput], n_failures: int | None, *, same_file: bool
) -> int:
    """Return how much room a results group takes in its file, generously."""
    results = sum(work.n_positions * output.row_bytes for output in inside)
    results += sum(32 * output.width for output in work.outputs)
    failures = 0 if n_failures is None else n_failures * EMPTY_ROW.itemsize
    copied = 0 if same_file else sum(int(dataset.nbytes) for dataset in ancillary_handles(main))
    return results + 2 * work.n_positions + failures + copied + _METADATA_BYTES


def _written(work: Work) -> list[str]:
    """Return the names of the datasets that runs write to."""
    return [*(output.name for output in work.outputs), work.status_name, POSITION_STATUS, FAILED_POSITIONS]


def ensure_mask(parent: h5py.Group, name: str, work: Work) -> None:
    """Give a legacy group, which tells by ``last_pixel`` how far it came, a status mask that says the same."""
    group = parent.file[name]
    remaining = remaining_positions(group, work.n_positions, work.status_name)
    mask = create_status_mask(group, work.n_positions, work.status_name)
    start = remaining.starts[0] if remaining else work.n_positions
    mask[:start] = 1


def lacks_room(group: h5py.Group, work: Work, max_failures: int) -> bool:
    """Tell whether a results group has no room for so many failed positions yet."""
    return capacity_of(group) < min(max_failures, work.n_positions)


def ensure_room(parent: h5py.Group, name: str, work: Work, max_failures: int) -> None:
    """Make room for failed positions in a results group, whatever it was begun with."""
    group = parent.file[name]
    create_failures(group, work.status_name, min(max_failures, work.n_positions))
    rewrite_places(group, work)


def rewrite_places(group: h5py.Group, work: Work) -> None:
    """Note anew where the datasets of a results group lie, if that was noted before."""
    if PLACES in group.attrs:
        write_places(group, _written(work))


def note_reopened(parent: h5py.Group, name: str, first: int) -> None:
    """Record, for older readers, that only the positions before `first` can be taken for done."""
    group = parent.file[name]
    group.attrs["last_pixel"] = np.int64(min(first, int(np.ravel(group.attrs.get("last_pixel", first))[0])))
    if "lazyproc_run_id" in group.attrs:
        group.attrs["lazyproc_finished"] = "".ljust(19)


def note_end(parent: h5py.Group, name: str, work: Work, workers: str = "", seconds: float | None = None) -> None:
    """Record that all positions are done: ``last_pixel`` for older readers, when, and by which workers if known."""
    group = parent.file[name]
    group.attrs["last_pixel"] = np.int64(work.n_positions)
    if "lazyproc_run_id" in group.attrs:
        group.attrs["lazyproc_finished"] = time.strftime(_TIME, time.localtime(seconds))
        if workers:
            group.attrs["lazyproc_workers"] = workers[:64].ljust(64)


def lacks_end(group: h5py.Group, work: Work) -> bool:
    """Tell whether the last run died after its last commit, but before it could record that."""
    last: list[Any] = np.ravel(attribute(group, "last_pixel", work.n_positions)).tolist()
    return last != [work.n_positions]


def environment() -> dict[str, str]:
    """Return the versions of what computes; of Dask if it is loaded, since small jobs do without."""
    loaded: dict[str, Any] = {name: sys.modules.get(name) for name in ("lazyproc", "numpy", "h5py", "dask")}
    return {"python": platform.python_version()} | {
        name: str(module.__version__) for name, module in loaded.items() if hasattr(module, "__version__")
    }
