"""Open the results of a run to be committed: in place where they are plain bytes of a file, else through HDF5."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import h5py

from lazyproc.core.specs import FAILED_POSITIONS, POSITION_STATUS, ResolvedOutput
from lazyproc.hdf5.apart import check_apart
from lazyproc.hdf5.extents import Extent
from lazyproc.hdf5.failure_log import ExtentRows, FailureLog
from lazyproc.hdf5.failures import Rows, capacity_of, has_failures
from lazyproc.hdf5.handle_target import HandleTarget, TransactionTarget
from lazyproc.hdf5.lock import Fence
from lazyproc.hdf5.marks import has_status
from lazyproc.hdf5.on_disk import find_extent
from lazyproc.hdf5.place import HandlePlace, Place
from lazyproc.hdf5.rows_file import is_outside, rows_beside, rows_extent
from lazyproc.hdf5.sink import Sink
from lazyproc.hdf5.target import InPlaceTarget, Target


def open_target(
    place: Place,
    name: str,
    outputs: Sequence[ResolvedOutput],
    status_name: str,
    fence: Fence | None,
    max_failures: int | None,
) -> tuple[Target, FailureLog | None]:
    """Choose how blocks are committed: in place where the results are plain bytes of a file, else through HDF5.

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
    max_failures : int or None
        So many failed positions are allowed; None: as many as there is room for.

    Returns
    -------
    Target
        Commits results.
    FailureLog or None
        Keeps the richer status and what is recorded of failed positions, written the same way; None if the group has
        the mask alone.
    """
    group = place.results(name)
    check_apart(group)
    logged = [status_name]
    logged += [POSITION_STATUS] if has_status(group, status_name) else []
    logged += [FAILED_POSITIONS] if has_failures(group, status_name) else []
    capacity = capacity_of(group)
    limit = capacity if max_failures is None else max_failures
    if fence is not None and not (isinstance(place, HandlePlace) and _has_open_datasets(group)):
        names = [*(output.name for output in outputs), *logged]
        extents = {one: rows_extent(group[one]) or find_extent(group[one], place.disk_path) for one in names}
        found: dict[str, Extent] = {one: extent for one, extent in extents.items() if extent is not None}
        if len(found) == len(names):
            mask, rows = found[status_name], tuple(found[output.name] for output in outputs)
            target = InPlaceTarget(Sink(rows, fence, not place.by_handle, mask), mask)
            return target, _failure_log(target, [ExtentRows(found[one]) for one in logged], capacity, limit)
    wanted = [output.name for output in outputs]
    for one in wanted:
        if is_outside(group[one]):
            rows_beside(group[one])  # HDF5 would make a new file where it is missing
    through: HandleTarget | TransactionTarget
    if isinstance(place, HandlePlace):
        through = HandleTarget(group, wanted, status_name)
    else:
        through = TransactionTarget(place.path, name, wanted, status_name, lambda: _opened(place, name))
    return through, _failure_log(through, [through.rows(one) for one in logged], capacity, limit)


@contextmanager
def _opened(place: Place, name: str) -> Iterator[h5py.Group]:
    """Open a results group afresh for reading."""
    with place.briefly() as briefly:
        yield briefly.results(name)


def _failure_log(target: Target, rows: Sequence[Rows], capacity: int, limit: int) -> FailureLog | None:
    """Return the log, which reads what there is, and clears rows that do not count.

    If that fails, nothing of the target stays open or locked.
    """
    if len(rows) == 1:
        return None
    try:
        return FailureLog(rows[0], rows[1], rows[2] if len(rows) > 2 else None, capacity, limit)
    except BaseException:
        target.close()
        raise


def _has_open_datasets(group: h5py.Group) -> bool:
    """Tell whether the caller holds a dataset of the results open: its buffer would overwrite what workers write."""
    inside = f"{group.name}/".encode()
    ids: list[Any] = h5py.h5f.get_obj_ids(group.file.id, h5py.h5f.OBJ_DATASET)
    return any((h5py.h5i.get_name(one) or b"").startswith(inside) for one in ids)
