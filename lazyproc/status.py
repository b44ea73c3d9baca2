"""What a file holds of results, and how far they are; may be asked while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h5py

from lazyproc.core.errors import ArgumentTypeError, ResultsError
from lazyproc.core.specs import STATUS_MASK
from lazyproc.hdf5.damage import attribute, members, reading, walk
from lazyproc.hdf5.failures import count_failed
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.holder import holder
from lazyproc.hdf5.hook_record import has_record, status_masks
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.rows_file import check_rows
from lazyproc.hdf5.seal import check_places, check_seal
from lazyproc.hdf5.search import count_done, status_name_of
from lazyproc.hdf5.steady import read_steadily
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
    n_failed : int
        Those among the done ones whose function failed.
    phase : str
        The status mask that tells so, where the group has several, one for each phase of an old class; else empty.
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
    n_failed: int = 0
    phase: str = ""


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
    """Return what a file holds; writes nothing and locks nothing.

    A run that creates its group just now changes the structure of the file under a reader: then it is read again.
    """
    results = read_steadily(path, lambda: _results(path), lambda found: not any(one.problem for one in found))
    return FileStatus(path, holder(path), results)


def _results(path: str) -> tuple[ResultsStatus, ...]:
    files = Files()
    try:
        found = _results_groups(files.open(path, "file"))
        return tuple(_examine(name, group, phase) for name, group in found for phase in _phases(group))
    finally:
        files.close()


def _results_groups(file: h5py.File) -> Iterator[tuple[str, h5py.Group | Exception]]:
    """Yield name and group of all that look like results; in the place of what cannot be opened, the reason."""
    for name, item in walk(file["/"]):
        named_so = "-" in name.rpartition("/")[2]
        if isinstance(item, Exception):
            yield name, item
        elif isinstance(item, h5py.Group):
            try:
                if STATUS_MASK in item or "lazyproc_status_mask" in item.attrs or (named_so and "tool" in item.attrs):
                    yield name, item
            except H5_ERRORS as error:
                yield name, error


def _phases(group: h5py.Group | Exception) -> list[str]:
    """Return the status masks if there are several; else one empty name."""
    masks: list[str] = []
    if not isinstance(group, Exception):
        with suppress(ResultsError, *H5_ERRORS):  # whoever reads it will tell
            masks = status_masks(group)
    return masks if len(masks) > 1 else [""]


def _examine(name: str, group: h5py.Group | Exception, phase: str) -> ResultsStatus:
    if isinstance(group, Exception):
        return ResultsStatus(name, "", 0, 0, "", "", f"cannot be read ({group}); it is damaged")
    process = _text(group, "tool") or name.rpartition("-")[2]
    started = _text(group, "lazyproc_started") or _text(group, "timestamp")
    n_positions = n_done = n_failed = 0
    problem = ""
    try:
        with reading(name):
            status_name = phase or status_name_of(group)
            mains = [int(one.shape[0]) for one in _main_datasets(group)]
            n_positions = _count_positions(group, status_name, mains)
            if not mains and not has_record(group, status_name):  # classes with hooks store what they like
                raise ResultsError(
                    f"{group.name}: has a status mask, but no main dataset: its results are gone, or have lost their "
                    "references, as in a copy made by h5py. compute() passes it over."
                )
            n_done = count_done(group, n_positions, status_name)
            n_failed = count_failed(group, status_name)
            check_seal(group)
            check_places(group)
            check_rows(group)
    except ResultsError as error:
        problem = str(error).removeprefix(f"{name}: ")
    finished = _text(group, "lazyproc_finished") if problem or n_done == n_positions else ""
    return ResultsStatus(name, process, n_positions, n_done, started, finished, problem, n_failed, phase)


def _text(group: h5py.Group, name: str) -> str:
    """Return an attribute as text; empty if it is not there, or is no text."""
    try:
        return read_text(attribute(group, name, "")).strip()
    except (ArgumentTypeError, *H5_ERRORS):
        return ""


def _main_datasets(group: h5py.Group) -> list[h5py.Dataset]:
    return [item for _, item in members(group, follow=True) if isinstance(item, h5py.Dataset) and is_main(item)]


def _count_positions(group: h5py.Group, status_name: str, mains: list[int]) -> int:
    """Return how many positions the results have: those of their status mask, and of a main dataset."""
    mask = group.get(status_name)
    if isinstance(mask, h5py.Dataset) and mask.ndim == 1:
        marked = int(mask.shape[0])
        if mains and marked not in mains:
            raise ResultsError(
                f"{group.name}: the status mask is of {marked} positions, the results of {mains[0]}; another program "
                "has changed it, or the file is damaged. Compute with override=True."
            )
        return marked
    if mains:
        return mains[0]
    raise ResultsError(f"{group.name}: holds neither a status mask nor a main dataset.")
