"""What a file holds of results, and how far they are; may be asked while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h5py

from lazyproc.core.errors import ArgumentTypeError, ResultsError
from lazyproc.core.specs import STATUS_MASK
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.lock import holder
from lazyproc.hdf5.search import count_done
from lazyproc.hdf5.usid import is_main, read_text


@dataclass(frozen=True)
class ResultsStatus:
    """How far one results group is.

    Attributes
    ----------
    group : str
        Its name in the file.
    process : str
        The process.
    n_positions, n_done : int
        All positions, and those marked done.
    started, finished : str
        When; empty if it is not known, or not finished.
    problem : str
        What is wrong with it; empty if nothing is.
    """

    group: str
    process: str
    n_positions: int
    n_done: int
    started: str
    finished: str
    problem: str = ""


@dataclass(frozen=True)
class FileStatus:
    """What a file holds.

    Attributes
    ----------
    path : str
        The file.
    running : dict or None
        Who computes into it now: host, pid, since, run_id.
    results : tuple of ResultsStatus
        Its results groups.
    """

    path: str
    running: dict[str, Any] | None
    results: tuple[ResultsStatus, ...]


def file_status(path: str) -> FileStatus:
    """Return what a file holds; writes nothing and locks nothing."""
    files = Files()
    try:
        results = tuple(_examine(group) for group in _results_groups(files.open(path)))
    finally:
        files.close()
    return FileStatus(path, holder(path), results)


def _results_groups(file: h5py.File) -> Iterator[h5py.Group]:
    found: list[h5py.Group] = []

    def visit(name: str, item: object) -> None:
        named_so = "-" in name.rpartition("/")[2]
        if isinstance(item, h5py.Group) and (STATUS_MASK in item or ("tool" in item.attrs and named_so)):
            found.append(item)

    file.visititems(visit)
    return iter(found)


def _examine(group: h5py.Group) -> ResultsStatus:
    process = _text(group, "tool") or str(group.name).rpartition("-")[2]
    started = _text(group, "lazyproc_started") or _text(group, "timestamp")
    n_positions = n_done = 0
    problem = ""
    try:
        n_positions = _count_positions(group)
        n_done = count_done(group, n_positions, STATUS_MASK)
    except ResultsError as error:
        problem = str(error).removeprefix(f"{group.name}: ")
    finished = _text(group, "lazyproc_finished")
    return ResultsStatus(str(group.name), process, n_positions, n_done, started, finished, problem)


def _text(group: h5py.Group, name: str) -> str:
    """Return an attribute as text; empty if it is not there, or is no text."""
    try:
        return read_text(group.attrs.get(name, "")).strip()
    except ArgumentTypeError:
        return ""


def _count_positions(group: h5py.Group) -> int:
    mask = group.get(STATUS_MASK)
    if isinstance(mask, h5py.Dataset) and mask.ndim == 1:
        return int(mask.shape[0])
    for item in group.values():
        if isinstance(item, h5py.Dataset) and is_main(item):
            return int(item.shape[0])
    raise ResultsError(f"{group.name}: holds neither a status mask nor a main dataset.")
