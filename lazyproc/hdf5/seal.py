"""What shows that a results group is still as it was created: a hash of its record, and where its datasets lie.

HDF5 has no checksums in files of the default version. A bit that flips in a group's header may turn one parameter into
another, and one in a dataset's header may send reads, and writes, to bytes of somebody else. So two attributes tell:

``lazyproc_seal``
    a hash of all that decides whether these results are those of some work: parameters, arguments, source, code
``lazyproc_places``
    for each dataset that runs write to: where its first byte lies, its shape and its type, as JSON

A file that was repacked, or a group that was copied, has all its datasets at other places; then the places prove
nothing, and are let pass. If only some have moved, something is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import h5py
import numpy as np
import xxhash

from lazyproc.core.errors import ResultsError
from lazyproc.hdf5.attributes import LARGEST_ATTRIBUTE, MANIFEST, parameter_names, stored_parameter
from lazyproc.hdf5.damage import attribute, reading
from lazyproc.hdf5.on_disk import plain_type

SEAL, PLACES = "lazyproc_seal", "lazyproc_places"
_SEALED = (
    "tool",
    "lazyproc_run_id",
    "lazyproc_arguments",
    "lazyproc_source",
    "lazyproc_status_mask",
    "lazyproc_fingerprint",
    "lazyproc_code",
    MANIFEST,
)
_ADVICE = "Compute with override=True."


def write_seal(group: h5py.Group) -> None:
    """Seal the record of a results group; the last thing that is done to its attributes when it is created."""
    group.attrs[SEAL] = _seal_of(group)


def write_places(group: h5py.Group, names: Iterable[str]) -> None:
    """Note where datasets of a results group lie, those of them that are there; replaces what was noted before.

    Parameters
    ----------
    group : h5py.Group
        The results group, writable.
    names : iterable of str
        The datasets that runs write to: outputs, status mask, what is kept of failures.
    """
    places = {name: _place_of(group[name]) for name in names if name in group}
    text = json.dumps(places, ensure_ascii=False)
    if len(text.encode()) <= LARGEST_ATTRIBUTE:  # else there are a thousand outputs, and no record of places
        group.attrs[PLACES] = text


def check_seal(group: h5py.Group) -> None:
    """Make sure that the record of a results group is the one that it was created with.

    Raises
    ------
    ResultsError
        If it is not. A group without a seal, of pyUSID or of old hooks, passes.
    """
    with reading(f"Results group {group.name!r}", _ADVICE):
        if SEAL in group.attrs and attribute(group, SEAL) != _seal_of(group):
            raise ResultsError(
                f"Results group {group.name!r}: its parameters, or what else is recorded of them, are not those that "
                f"it was created with: another program has changed its attributes, or the file is damaged. {_ADVICE}"
            )


def check_places(group: h5py.Group) -> tuple[str, ...]:
    """Make sure that the datasets of a results group are those that it was created with, and where they were.

    Returns
    -------
    tuple of str
        Their names, outputs first and in the order in which they were declared; none without a record of places.

    Raises
    ------
    ResultsError
        If one is missing, has another shape or type, or lies elsewhere while others have not moved. A group without a
        record of places passes.
    """
    with reading(f"Results group {group.name!r}", _ADVICE):
        if PLACES not in group.attrs:
            return ()
        recorded = json.loads(attribute(group, PLACES))
        now = {name: _place_of_member(group, name) for name in recorded}
        for name, (_, *form) in recorded.items():
            if now[name][1:] != form:
                raise ResultsError(
                    f"{group.name}/{name}: has the shape and type {now[name][1:3]}, but was created with {form[:2]}: "
                    f"another program has changed it, or the file is damaged. {_ADVICE}"
                )
        # What is compressed, or will be, has no place of its own in the file.
        placed = [name for name, (offset, *_) in recorded.items() if offset is not None]
        moved = [name for name in placed if now[name][0] != recorded[name][0]]
        if moved and len(moved) < len(placed):
            raise ResultsError(
                f"{group.name}/{moved[0]}: its values lie at byte {now[moved[0]][0]} of the file, but were put at byte "
                f"{recorded[moved[0]][0]}, while others of the group have not moved: another program has replaced it, "
                f"or the file is damaged. {_ADVICE}"
            )
        return tuple(recorded)


def _seal_of(group: h5py.Group) -> str:
    digest = xxhash.xxh3_128()
    for name in _SEALED:
        _take(digest, name, attribute(group, name, None))
    for name in sorted(parameter_names(group)):
        _take(digest, name, stored_parameter(group, name))
    return digest.hexdigest()


def _take(digest: Any, name: str, value: Any) -> None:
    content: Any
    if isinstance(value, str):
        kind, content = "text", value.encode("utf-8", "surrogateescape")
    else:
        array = np.asarray(value)
        kind = f"{array.dtype.str} {array.shape}"
        if array.dtype.hasobject:
            content = repr(array.tolist()).encode("utf-8", "replace")
        elif array.nbytes <= LARGEST_ATTRIBUTE:
            content = array.tobytes()
        else:  # not another copy of a large one
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest.update(f"{name}\0{kind}\0{len(content)}\0".encode())
    digest.update(content)


def _place_of_member(group: h5py.Group, name: str) -> list[Any]:
    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ResultsError(f"{group.name}/{name}: is not there, or no dataset. {_ADVICE}")
    return _place_of(dataset)


def _place_of(dataset: h5py.Dataset) -> list[Any]:
    """Return offset, shape and type of a dataset, as JSON gives them back."""
    descr = json.dumps(dataset.dtype.descr if dataset.dtype.names else dataset.dtype.str)
    # A number whose bits are not where NumPy has them; of other types, releases of h5py have had several forms.
    exact = plain_type(dataset) if dataset.dtype.kind in "biuf" else None
    return [dataset.id.get_offset(), list(dataset.shape or ()), descr, exact]
