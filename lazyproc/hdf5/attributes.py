"""Parameters of a run in its results group: one attribute a parameter, large ones as datasets, all read back equal.

::

    results group
      attributes  smoothing = 3, model = "a", limits = '{"low": null}'     what people and pyUSID read
                  lazyproc_parameter_kinds = '{"smoothing": "int", …}'      the manifest: names, and how to decode
      lazyproc_parameters/                                                  what is larger than 32 KiB, by name
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from lazyproc.core.errors import ParameterError, ResultsError
from lazyproc.core.parameters import Encoded, decode, encode, is_bookkeeping
from lazyproc.hdf5.damage import attribute, reading

MANIFEST = "lazyproc_parameter_kinds"
"""The attribute (or, when it is large, the dataset) that names all parameters and their kinds, as JSON."""

LARGE_GROUP = "lazyproc_parameters"
"""The subgroup that holds, as datasets, the parameters too large for an attribute."""

LARGEST_ATTRIBUTE = 32 * 1024
"""Bytes; HDF5 allows 64 KiB for an attribute with its name. How many attributes there are does not matter."""


def check_parameters(parameters: Mapping[str, Any]) -> dict[str, Encoded]:
    """Check that all parameters can be stored, without touching a file.

    Parameters
    ----------
    parameters : mapping of str to object
        The parameters of a run.

    Returns
    -------
    dict of str to Encoded
        What will be stored.

    Raises
    ------
    ParameterError
        If a name cannot be used or a value cannot be stored.

    Examples
    --------
    >>> check_parameters({"smoothing": 3})["smoothing"].kind
    'int'
    """
    if not isinstance(parameters, Mapping):
        raise ParameterError(
            f"The parameters are of the type {type(parameters).__name__}; expected a dict of names and values."
        )
    return {name: encode(name, value) for name, value in parameters.items()}


def write_parameters(group: h5py.Group, parameters: Mapping[str, Any]) -> None:
    """Write the parameters of a run into its results group, in the place of those written before.

    All are checked before the first is written. The manifest is written last: a group that has one has all its
    parameters. Changes HDF5 metadata, so it belongs into the creation of a results group, not into the loop.

    Parameters
    ----------
    group : h5py.Group
        The results group, open for writing.
    parameters : mapping of str to object
        The parameters.

    Raises
    ------
    ParameterError
        If one of them cannot be stored; then nothing is written.
    """
    encoded = check_parameters(parameters)
    _remove(group)
    for name, item in encoded.items():
        _store(group, name, item.value)
    _store(group, MANIFEST, json.dumps({name: item.kind for name, item in encoded.items()}, ensure_ascii=False))


def read_parameters(group: h5py.Group) -> dict[str, Any]:
    """Read the parameters of a results group.

    With a manifest these are exactly the parameters that were written, equal and with their types. Without one (the
    group was written by pyUSID) they are all attributes except references and what the group says about itself:
    numbers and texts as Python's own, rows of texts as lists, rows of numbers as arrays.

    Parameters
    ----------
    group : h5py.Group
        The results group.

    Raises
    ------
    ResultsError
        If a parameter named in the manifest is missing, or one cannot be read.
    """
    with reading(f"Results group {group.name!r}"):
        return _read_parameters(group)


def _read_parameters(group: h5py.Group) -> dict[str, Any]:
    if not has_manifest(group):
        names = [name for name in group.attrs if not is_bookkeeping(name)]
        return {name: _read_natural(group, name) for name in names if not _is_reference(group, name)}
    kinds = _kinds(group)
    parameters = {}
    for name, kind in kinds.items():
        value = _load(group, name)
        try:
            parameters[name] = decode(value, kind)
        except ResultsError as error:
            raise ResultsError(f"Results group {group.name!r}, parameter {name!r}: {error}") from error
    return parameters


def parameter_names(group: h5py.Group) -> list[str]:
    """Return the names in the manifest; none without one."""
    return list(_kinds(group)) if has_manifest(group) else []


def stored_parameter(group: h5py.Group, name: str) -> Any:
    """Return a parameter in the form in which HDF5 stores it.

    Raises
    ------
    ResultsError
        If it is missing.
    """
    return _load(group, name)


def has_manifest(group: h5py.Group) -> bool:
    """Tell whether lazyproc wrote parameters into this group, and finished doing so."""
    return MANIFEST in group.attrs or f"{LARGE_GROUP}/{MANIFEST}" in group


def _kinds(group: h5py.Group) -> dict[str, str]:
    text = _load(group, MANIFEST)
    try:
        kinds = json.loads(text)
        if all(isinstance(kind, str) for kind in kinds.values()):
            return dict(kinds)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(group, text) from error
    raise _damaged(group, text)


def _damaged(group: h5py.Group, text: Any) -> ResultsError:
    return ResultsError(
        f"Results group {group.name!r}: {MANIFEST} is {str(text)[:80]!r}; expected a JSON object of names and kinds. "
        "It was changed by another program, or the file is damaged; compute into a fresh group."
    )


def _remove(group: h5py.Group) -> None:
    """Remove the parameters written before, the manifest first: a group that has one has all its parameters."""
    old = _kinds(group) if has_manifest(group) else {}
    for name in (MANIFEST, *old):
        if name in group.attrs:
            del group.attrs[name]
    if LARGE_GROUP in group:
        del group[LARGE_GROUP]


def _store(group: h5py.Group, name: str, value: Any) -> None:
    is_text = isinstance(value, str) or (isinstance(value, np.ndarray) and value.dtype == object)
    dtype = h5py.string_dtype() if is_text else None
    if _size(value) <= LARGEST_ATTRIBUTE:
        group.attrs.create(name, value, dtype=dtype)
    else:
        group.require_group(LARGE_GROUP).create_dataset(_dataset_name(name), data=value, dtype=dtype)


def _load(group: h5py.Group, name: str) -> Any:
    if name in group.attrs:
        return attribute(group, name)
    path = f"{LARGE_GROUP}/{_dataset_name(name)}"
    if path not in group:
        raise ResultsError(
            f"Results group {group.name!r}: the parameter {name!r} is in its manifest, but neither an attribute nor a "
            f"dataset in {LARGE_GROUP!r}. It was removed by another program; compute into a fresh group."
        )
    dataset = group[path]
    return dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) and dataset.dtype.kind == "O" else dataset[()]


def _size(value: Any) -> int:
    """Count the bytes of a value; a text of variable length takes 16 bytes besides its own."""
    if isinstance(value, str):
        return len(value.encode())
    if value.dtype == object:
        return sum(16 + len(text.encode()) for text in value.ravel().tolist())
    return int(value.nbytes)


def _dataset_name(name: str) -> str:
    """Escape what a path would not take as part of one name."""
    escaped = name.replace("%", "%25").replace("/", "%2F")
    return escaped.replace(".", "%2E") if set(escaped) == {"."} else escaped


def _is_reference(group: h5py.Group, name: str) -> bool:
    return h5py.check_ref_dtype(group.attrs.get_id(name).dtype) is not None


def _read_natural(group: h5py.Group, name: str) -> Any:
    try:
        value = attribute(group, name)
    except (OSError, TypeError, ValueError) as error:
        raise ResultsError(
            f"Results group {group.name!r}: the attribute {name!r} is of a type that h5py cannot read ({error}); "
            "expected numbers or texts. Compute into a fresh group."
        ) from error
    if isinstance(value, h5py.Empty):
        return "" if value.dtype.kind in "SO" else None
    if isinstance(value, np.ndarray):
        return _texts(value.tolist()) if value.dtype.kind in "SO" else value
    return _texts(value.item() if isinstance(value, np.generic) else value)


def _texts(value: Any) -> Any:
    """Turn bytes into text, also within lists; what is not UTF-8 stays bytes."""
    if isinstance(value, list):
        return [_texts(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
