"""All that a file holds, in a form that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lazyproc.hdf5.files import Files

Snapshot = dict[str, Any]
"""Each object of a file by its name: what it is, its values and attributes, comparable and JSON-able."""

_CHANGES = {
    "timestamp", "lazyproc_run_id", "lazyproc_probe", "lazyproc_started", "lazyproc_finished", "lazyproc_workers",
    "lazyproc_places",
    "lazyproc_seal",
}  # fmt: skip
"""Attributes of a results group that no two runs have in common."""


def snapshot(path: str | Path) -> Snapshot:
    """Read all of a file with plain h5py."""
    with h5py.File(path, "r") as file:
        return _content(file)


def seen_by_lazyproc(path: str) -> Snapshot:
    """Read all of a file as lazyproc sees it, which is as it will be once it is recovered."""
    files = Files()
    try:
        return _content(files.open(path))
    finally:
        files.close()


def _content(file: h5py.File) -> Snapshot:
    found: Snapshot = {}

    def visit(name: str, item: Any) -> None:
        found[f"/{name}"] = [_form(item), {key: _plain(item.attrs[key], item.file) for key in sorted(item.attrs)}]

    visit("", file)
    file.visititems(visit)
    return found


def _form(item: Any) -> Any:
    if not isinstance(item, h5py.Dataset):
        return "group"
    storage = f"{item.chunks} {item.compression}"
    values = np.ascontiguousarray(item[()])
    if str(item.name).endswith("failed_positions"):  # in any order
        values = np.sort(values.view(f"V{values.itemsize}"))
    return [str(item.dtype), list(item.shape), storage, hashlib.sha256(values).hexdigest()]


def _plain(value: Any, file: h5py.File) -> str:
    if isinstance(value, h5py.Reference):
        return f"reference to {file[value].name}"
    return f"{np.asarray(value).dtype} {np.asarray(value).tolist()!r}"


def differences(before: Snapshot, now: Snapshot, inside: str = "") -> Iterator[str]:
    """Tell what has changed of the objects there were; what came anew must lie in groups that begin with `inside`."""
    for name in before.keys() - now.keys():
        yield f"{name} is gone"
    for name, content in now.items():
        if name not in before:
            if not name.startswith(inside) and name not in _above(inside):
                yield f"{name} appeared"
        elif content != before[name]:
            yield f"{name} has changed: {'; '.join(_changes(before[name], content))}"


def _above(inside: str) -> set[str]:
    parts = inside.split("/")[:-1]
    return {"/".join(parts[: n + 1]) or "/" for n in range(len(parts))}


def _changes(before: Any, now: Any) -> Iterator[str]:
    if before[0] != now[0]:
        yield f"{before[0]} became {now[0]}"
    for key in sorted(before[1].keys() | now[1].keys()):
        was, is_ = before[1].get(key, "missing"), now[1].get(key, "missing")
        if was != is_:
            yield f"attribute {key}: {was[:80]} became {is_[:80]}"


def steady(snapshot_: Snapshot) -> Snapshot:
    """Leave out the values of what no two runs have in common; the names stay."""
    return {
        name: [form, {key: "" if key in _CHANGES else value for key, value in attrs.items()}]
        for name, (form, attrs) in snapshot_.items()
    }
