"""Finish a results group: compress what waits for it and note the end, in one step; then drop the files of the rows."""

from __future__ import annotations

import logging
from collections.abc import Callable

import h5py

from lazyproc.hdf5.compress import Encoders, compress_results
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.place import Place
from lazyproc.hdf5.record import lacks_end, note_end, rewrite_places
from lazyproc.hdf5.replace import external_layout, replaced
from lazyproc.hdf5.rows_file import is_at_home, is_outside, note_owner, remove, rows_beside, waiting
from lazyproc.hdf5.search import Work

log = logging.getLogger("lazyproc")


def finish(
    place: Place,
    name: str,
    work: Work,
    encoders: Encoders,
    stop: Callable[[], bool],
    workers: str = "",
    same: FileId | None = None,
) -> None:
    """Compress and note the end of a results group of which all positions are marked.

    Parameters
    ----------
    place : Place
        The target group.
    name : str
        The results group.
    work : Work
        What was computed.
    encoders : Encoders
        Who encodes storage chunks.
    stop : callable
        Whether to leave it to the next call.
    workers : str
        Which workers have computed it, if known.
    same : FileId, optional
        The file that it must be.

    Raises
    ------
    StoppedError
        If `stop` says so.
    LazyprocError
        Whatever stands in the way. The results are complete, and as they were.
    """
    with place.edit(same) as parent:
        group = parent.file[name]
        waited = bool(waiting(group))
        rows = compress_results(group, encoders, stop)
        note_end(parent, name, work, workers)
        if waited:
            rewrite_places(group, work)
    remove(rows)


def is_unfinished(group: h5py.Group, work: Work) -> bool:
    """Tell whether something is left to be done in a results group of which all positions are marked."""
    return lacks_end(group, work) or bool(waiting(group))


def adopt(place: Place, name: str) -> None:
    """Let a partial group that was moved together with the files of its rows refer to them where they are now.

    Raises
    ------
    ResultsError
        If they are not there.
    """
    group = place.results(name)
    moved = [one for one in waiting(group) if is_outside(group[one]) and not is_at_home(group[one])]
    if not moved:
        return
    with place.edit() as parent:
        for one in moved:
            dataset = parent.file[name][one]
            rows = rows_beside(dataset)
            replaced(dataset, external_layout(dataset, rows), lambda made: None, marked=True)
            note_owner(rows, place.path)
            log.info("%s/%s: its rows were moved to %s", name, one, rows)
