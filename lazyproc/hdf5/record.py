"""Write a results group: create it with its provenance, note how its run ended, find its bytes again."""

from __future__ import annotations

import json
import platform
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from lazyproc.core.specs import ResolvedOutput
from lazyproc.hdf5.attributes import write_parameters
from lazyproc.hdf5.create import create_output, create_results_group, create_status_mask
from lazyproc.hdf5.extents import find_extent
from lazyproc.hdf5.lock import Fence
from lazyproc.hdf5.place import HandlePlace, Place
from lazyproc.hdf5.search import Work, remaining_positions
from lazyproc.hdf5.sink import Sink
from lazyproc.hdf5.target import HandleTarget, InPlaceTarget, Target

_TIME = "%Y-%m-%d %H:%M:%S"


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
    """

    function: str
    fingerprint: str
    versions: dict[str, str]
    probe: dict[str, float]


def create_group(parent: h5py.Group, main: h5py.Dataset, work: Work, provenance: Provenance) -> str:
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
    """
    same_file = main.file == parent.file
    attrs = {
        "lazyproc_run_id": uuid.uuid4().hex,
        "lazyproc_arguments": work.arguments,
        "lazyproc_source": work.main_name,
        "lazyproc_status_mask": work.status_name,
        "lazyproc_fingerprint": provenance.fingerprint,
        "lazyproc_function": provenance.function,
        "lazyproc_code": work.code,
        "lazyproc_versions": json.dumps(provenance.versions),
        "lazyproc_probe": json.dumps(provenance.probe),
        "lazyproc_host": socket.gethostname(),
        "lazyproc_started": time.strftime(_TIME),
        "lazyproc_finished": "".ljust(19),
        "lazyproc_workers": "".ljust(64),
        "last_pixel": np.int64(0),
    }
    if not same_file:
        attrs["source_file_path"] = work.main_file
    group = create_results_group(parent, main, work.process_name, attrs)
    write_parameters(group, work.parameters)
    for output in work.outputs:
        create_output(group, main, output, same_file=same_file)
    create_status_mask(group, work.n_positions, work.status_name)
    return str(group.name)


def ensure_mask(parent: h5py.Group, name: str, work: Work) -> None:
    """Give a legacy group, which tells by ``last_pixel`` how far it came, a status mask that says the same."""
    group = parent.file[name]
    remaining = remaining_positions(group, work.n_positions, work.status_name)
    mask = create_status_mask(group, work.n_positions, work.status_name)
    start = remaining.starts[0] if remaining else work.n_positions
    mask[:start] = 1


def note_end(parent: h5py.Group, name: str, work: Work, workers: str) -> None:
    """Record that all positions are done: ``last_pixel`` for older readers, when, and by which workers."""
    group = parent.file[name]
    group.attrs["last_pixel"] = np.int64(work.n_positions)
    if "lazyproc_run_id" in group.attrs:
        group.attrs["lazyproc_finished"] = time.strftime(_TIME)
        group.attrs["lazyproc_workers"] = workers[:64].ljust(64)


def open_target(
    place: Place, name: str, outputs: Sequence[ResolvedOutput], status_name: str, fence: Fence | None
) -> Target:
    """Choose how blocks are committed: in place where the results are plain bytes of a file, else through a handle.

    Parameters
    ----------
    place : Place
        The target group.
    name : str
        The results group.
    outputs : sequence of ResolvedOutput
        What it holds.
    status_name : str
        The name of the status mask.
    fence : Fence or None
        Of the run's lock; None where there is no file on disk.
    """
    parent = place.group()
    assert parent is not None
    group = parent.file[name]
    if fence is not None and not (isinstance(place, HandlePlace) and _has_open_datasets(group)):
        extents = [find_extent(group[output.name], place.disk_path) for output in outputs]
        mask = find_extent(group[status_name], place.disk_path)
        if mask is not None and all(extent is not None for extent in extents):
            sink = Sink(tuple(e for e in extents if e is not None), fence, shares_lock=not place.by_handle)
            return InPlaceTarget(sink, mask)
    if isinstance(place, HandlePlace):
        return HandleTarget(group, [output.name for output in outputs], status_name)
    file = place.files.open_for_writing(place.path)
    return HandleTarget(file[name], [output.name for output in outputs], status_name, owns_file=True)


def _has_open_datasets(group: h5py.Group) -> bool:
    """Tell whether the caller holds a dataset of the results open: its buffer would overwrite what workers write."""
    inside = f"{group.name}/".encode()
    ids: list[Any] = h5py.h5f.get_obj_ids(group.file.id, h5py.h5f.OBJ_DATASET)
    return any((h5py.h5i.get_name(one) or b"").startswith(inside) for one in ids)


def environment() -> dict[str, str]:
    """Return the versions of what computes."""
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        name: version(name) for name in ("lazyproc", "numpy", "h5py", "dask")
    }
