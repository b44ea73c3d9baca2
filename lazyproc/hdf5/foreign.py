"""What somebody else has changed in a file since a change of it was cut off by a death.

Putting back what was there before the death would undo that, too. So the file as it would be and the file as it is are
compared as far as they can be read: a file that was damaged by the death is not readable everywhere, and that is no
change by anybody. Results groups do not count: they are what was being changed.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from lazyproc.hdf5.damage import attributes
from lazyproc.hdf5.overlay import Overlay, Patch

_LARGEST = 2**24
"""Bytes: values of variable length in larger datasets are not compared."""
_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)
"""What h5py raises for damaged metadata."""


def changes_since(path: str, before: list[Patch], size: int) -> list[str]:
    """Return what was changed, in words; empty if nothing but a cut-off change of results is seen.

    Parameters
    ----------
    path : str
        The file as it is.
    before : list of Patch
        The bytes that would be put back.
    size : int
        The file's bytes before.
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
                return list(_compare(now, old))


def _compare(now: h5py.File, old: h5py.File) -> Iterator[str]:
    waiting: list[tuple[str, Any, Any]] = [("/", now["/"], old["/"])]
    seen: set[int] = set()
    while waiting:
        name, item, counterpart = waiting.pop()
        for what in _readable(item, _attributes).items() - _readable(counterpart, _attributes).items():
            yield f"the attribute {what[0]!r} of {name}"
        if isinstance(item, h5py.Dataset):
            if _readable(item, _stored).items() - _readable(counterpart, _stored).items():
                yield f"the dataset {name}"
            continue
        for key in _readable(item, _links):
            child, previous = _open(item, key), _open(counterpart, key)
            address = _address(child)
            if child is None or _are_results(child) or address in seen:
                continue
            seen.add(address)
            if type(previous) is type(child):
                waiting.append((f"{name.rstrip('/')}/{key}", child, previous))
            else:
                yield f"{name.rstrip('/')}/{key}, which is new"


def _readable(item: Any, look: Any) -> dict[str, Any]:
    """Return what can be read of it."""
    try:
        return dict(look(item))
    except _ERRORS:
        return {}


def _links(group: h5py.Group) -> dict[str, Any]:
    return {key: None for key in group if isinstance(group.get(key, getlink=True), h5py.HardLink)}


def _open(group: h5py.Group, key: str) -> Any:
    try:
        return group[key] if key in group else None
    except _ERRORS:
        return None


def _address(item: Any) -> int:
    return -1 if item is None else int(h5py.h5o.get_info(item.id).addr)


def _are_results(item: Any) -> bool:
    return isinstance(item, h5py.Group) and any(
        name in _readable(item, _attributes) for name in ("tool", "lazyproc_run_id")
    )


def _attributes(item: Any) -> dict[str, int]:
    return {name: _checksum(value) for name, value in attributes(item).items()}


def _stored(dataset: h5py.Dataset) -> dict[str, Any]:
    """Return what would be put back of a dataset: not its raw data, unless they point into a heap."""
    about: dict[str, Any] = {"shape": dataset.shape, "bytes": dataset.id.get_storage_size()}
    if dataset.dtype.hasobject and about["bytes"] <= _LARGEST:
        about["values"] = _checksum(dataset[()])
    return about


def _checksum(value: Any) -> int:
    values = np.asarray(value)
    return zlib.crc32(repr(values.tolist()).encode("utf-8", "surrogatepass"))
