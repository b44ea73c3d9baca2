"""What somebody else has changed in a file since a change of it was cut off by a death.

Putting back what was there before the death would undo that, too. So the file as it would be and the file as it is are
compared as far as they can be read: a file that was damaged by the death is not readable everywhere, and that is no
change by anybody. What was being changed does not count: the groups that the journal names, and results groups with a
run's id that the file had not had before, or had in the same place. All others do, whoever has written them.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import h5py
import numpy as np

from lazyproc.core.errors import ResultsError
from lazyproc.hdf5.damage import attributes, walk
from lazyproc.hdf5.overlay import Overlay, Patch

_LARGEST = 2**24
"""Bytes: values of variable length in larger datasets are not compared."""
_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)
"""What h5py raises for damaged metadata."""


def changes_since(path: str, before: list[Patch], size: int, own: Collection[str] = ()) -> list[str]:
    """Return what was changed, in words; empty if nothing but a cut-off change of results is seen.

    Parameters
    ----------
    path : str
        The file as it is.
    before : list of Patch
        The bytes that would be put back.
    size : int
        The file's bytes before.
    own : collection of str
        The paths in it of what was being changed.
    """
    overlay = Overlay(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, owns=True)
    for offset, _, piece in before:
        overlay.seek(offset)
        overlay.write(piece)
    overlay.truncate(size)
    with open(path, "rb") as raw, contextlib.closing(overlay):
        try:
            now = h5py.File(raw, "r")
        except _ERRORS:
            return []
        with now:
            try:
                old = h5py.File(overlay, "r")
            except _ERRORS:  # superblock 3 says that it is open for writing
                return ["it was opened, and cannot be compared with what it was"]
            with old:
                return list(_compare(now, old, own))


def _compare(now: h5py.File, old: h5py.File, own: Collection[str]) -> Iterator[str]:
    waiting: list[tuple[str, Any, Any]] = [("/", now["/"], old["/"])]
    seen: set[int] = set()
    gone: list[str] = []
    runs, is_whole = _runs_in(old), True
    while waiting:
        name, item, counterpart = waiting.pop()
        for what in _readable(item, _attributes).items() - _readable(counterpart, _attributes).items():
            yield f"the attribute {what[0]!r} of {name}"
        if isinstance(item, h5py.Dataset):
            if _readable(item, _stored).items() - _readable(counterpart, _stored).items():
                yield f"the dataset {name}"
            continue
        links, previous_links = _readable(item, _links), _readable(counterpart, _links)
        gone += [f"{_join(name, key)}, which is gone" for key in previous_links.keys() - links.keys()]
        for key, link in links.items():
            below = _join(name, key)
            if link is not None:
                if previous_links.get(key) != link:
                    yield f"{below}, which is new"
                continue
            child, previous = _open(item, key), _open(counterpart, key)
            address = _address(child)
            is_whole = is_whole and child is not None
            if child is None or below in own or address in seen:
                continue
            seen.add(address)
            if _are_of_a_run(child, previous, runs):
                continue
            if type(previous) is type(child):
                waiting.append((below, child, previous))
            else:
                yield f"{below}, which is new"
    if is_whole:  # in a file that is damaged things are missing, too
        yield from gone


def _join(name: str, key: str) -> str:
    return f"{name.rstrip('/')}/{key}"


def _readable(item: Any, look: Any) -> dict[str, Any]:
    """Return what can be read of it."""
    try:
        return dict(look(item))
    except _ERRORS:
        return {}


def _links(group: h5py.Group) -> dict[str, Any]:
    """Return the names in a group, with where they lead to by a path; None for what lies there itself."""
    links = {key: group.get(key, getlink=True) for key in group}
    return {key: None if isinstance(link, h5py.HardLink) else repr(vars(link)) for key, link in links.items()}


def _open(group: h5py.Group, key: str) -> Any:
    try:
        return group[key] if key in group else None
    except _ERRORS:
        return None


def _address(item: Any) -> int:
    return -1 if item is None else int(h5py.h5o.get_info(item.id).addr)


def _runs_in(file: h5py.File) -> set[int]:
    """Return the runs whose results a file has."""
    runs: set[int] = set()
    with contextlib.suppress(ResultsError, *_ERRORS):
        runs.update(_run_of(item) for _, item in walk(file["/"]))
    return runs - {0}


def _run_of(item: Any) -> int:
    """Return what tells a run's results from those of others; 0 for what is no run's."""
    return _readable(item, _attributes).get("lazyproc_run_id", 0) if isinstance(item, h5py.Group) else 0


def _are_of_a_run(child: Any, previous: Any, runs: set[int]) -> bool:
    """Tell whether these are results that were being made or changed, not a copy of results that there were."""
    run = _run_of(child)
    return run != 0 and (run == _run_of(previous) or (previous is None and run not in runs))


def _attributes(item: Any) -> dict[str, int]:
    return {name: _checksum(value) for name, value in attributes(item).items()}


def _stored(dataset: h5py.Dataset) -> dict[str, Any]:
    """Return what would be put back of a dataset: not its raw data, unless they point into a heap."""
    about: dict[str, Any] = {
        "shape": dataset.shape,
        "bytes": dataset.id.get_storage_size(),
        "place": dataset.id.get_offset(),
    }
    if dataset.dtype.hasobject and about["bytes"] <= _LARGEST:
        about["values"] = _checksum(dataset[()])
    return about


def _checksum(value: Any) -> int:
    values = np.asarray(value)
    return zlib.crc32(repr(values.tolist()).encode("utf-8", "surrogatepass"))
