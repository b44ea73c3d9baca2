"""Parameters and arguments: what can be stored, in which form, and how two sets of them differ.

::

    value ── encode ──> Encoded(value, kind) ── the file ── decode ──> value        equal, with its type
    value ── canonical ──> a hashable form                                           for exact comparison

Numbers, texts, arrays and plain lists of them have a form of their own in HDF5. Everything else that can be stored
becomes JSON text (`lazyproc.core.jsonform`); `lazyproc.core.canonical` has the forms for comparison.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.canonical import LEAVES, check_array, digested, fits, form_of, pack, same, texts_in
from lazyproc.core.errors import ParameterError, ResultsError
from lazyproc.core.jsonform import dumps, from_json, is_clean, show, texts_of, to_json, typed

RESERVED = frozenset(
    {
        "tool",
        "machine_id",
        "platform",
        "timestamp",
        "num_source_dsets",
        "last_pixel",
        "source_file_path",
        "source_dataset_path",
        "pyUSID_version",
        "pycroscopy_version",
        "sidpy_version",
    }
)
"""Attributes of a results group that say how it came to be; no parameter may have such a name."""

_PREFIX = "lazyproc_"
_SOURCE = re.compile(r"source_\d{3}")
_LONGEST_NAME = 1024  # bytes; the name shares the 64 KiB of an HDF5 attribute with the value


@dataclass(frozen=True)
class Encoded:
    """A parameter in the form in which HDF5 stores it.

    Attributes
    ----------
    value : str, numpy scalar or numpy array
        What to store. An array of dtype object holds only ``str``, to be stored as texts of variable length.
    kind : str
        How to decode it: ``"json"``, ``"bool"``, ``"int"``, ``"list:int"``, ``"scalar:<f4"``, ``"array:<f8"`` …
    """

    value: Any
    kind: str


def is_bookkeeping(name: str) -> bool:
    """Tell whether an attribute of a results group says how the group came to be, and so is no parameter."""
    return name in RESERVED or name.startswith(_PREFIX) or _SOURCE.fullmatch(name) is not None


def check_name(name: object) -> str:
    """Return the name of a parameter, if it can be one.

    Raises
    ------
    ParameterError
        If it is not a text, empty, longer than 1024 bytes, not storable as UTF-8, or reserved.
    """
    if not isinstance(name, str) or not name:
        raise ParameterError(f"A parameter is named {show(name)}; expected a text that is not empty. Rename it.")
    if not is_clean(name) or len(name.encode()) > _LONGEST_NAME:
        raise ParameterError(
            f"A parameter is named {show(name)}; expected at most {_LONGEST_NAME} bytes of UTF-8 without NUL and "
            "without surrogates, since it names an HDF5 attribute. Rename it."
        )
    if is_bookkeeping(name):
        raise ParameterError(
            f"Parameter {name!r}: this name is reserved for what a results group says about itself (reserved are "
            f"{', '.join(sorted(RESERVED))}, 'source_' with three digits, and all that begins with {_PREFIX!r}). "
            "Rename the parameter."
        )
    return str.__str__(name)


def encode(name: str, value: object) -> Encoded:
    """Put a parameter into the form in which HDF5 stores it.

    Subclasses of the plain types (an ``IntEnum``, a named tuple) are stored as, and come back as, the plain type.

    Parameters
    ----------
    name : str
        Its name, checked too.
    value : object
        Its value.

    Raises
    ------
    ParameterError
        If the name cannot be used or the value cannot be stored (functions, HDF5 objects, sets, arrays of objects,
        dicts with other keys than texts, masked arrays, values that contain themselves, other objects).

    Examples
    --------
    >>> encode("smoothing", 3)
    Encoded(value=np.int64(3), kind='int')
    >>> encode("limits", {"low": None})
    Encoded(value='{"low": null}', kind='json')
    """
    where = f"Parameter {check_name(name)!r}"
    natural = _natural(value, where)
    return natural if natural is not None else Encoded(dumps(to_json(value, where)), "json")


def decode(value: Any, kind: str) -> Any:
    """Turn what HDF5 stored back into the parameter: the inverse of `encode`.

    Parameters
    ----------
    value : str, bytes, numpy scalar or numpy array
        What was read.
    kind : str
        As `encode` gave it.

    Raises
    ------
    ResultsError
        If the kind is unknown (a newer lazyproc wrote it) or the value does not fit it.
    """
    family, _, detail = kind.partition(":")
    try:
        if family == "json":
            return from_json(json.loads(value))
        if family in ("list", "tuple"):
            items = list(typed(value, detail)) if detail not in LEAVES else np.asarray(value).tolist()
            return tuple(items) if family == "tuple" else items
        if family == "array":
            return typed(value, detail)
        if family == "scalar":
            return typed(value, detail)[()]
        if family == "numpy" and detail in ("str", "bytes"):
            return np.str_(_leaf(value, "str")) if detail == "str" else np.bytes_(_leaf(value, "bytes"))
        if family in LEAVES and not detail:
            return _leaf(value, family)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ResultsError(
            f"A stored parameter of the kind {kind!r} is {show(value)}; expected what lazyproc wrote. It was changed "
            "by another program, or the file is damaged."
        ) from error
    raise ResultsError(
        f"A stored parameter is of the kind {kind!r}, which this version of lazyproc does not know; "
        "read it with the version that wrote it, or a newer one."
    )


def differences(stored: Mapping[str, object], wanted: Mapping[str, object], *, exact: bool = True) -> list[str]:
    """Say in words how the stored parameters differ from the wanted ones.

    Parameters
    ----------
    stored, wanted : mapping of str to object
        The parameters.
    exact : bool
        Tell texts from bytes; what pyUSID stored does not.

    Returns
    -------
    list of str
        One line a parameter that differs; empty if they are the same.

    Examples
    --------
    >>> differences({"smoothing": 3, "model": "a"}, {"smoothing": 5, "window": 7})
    ['smoothing: stored 3 (int), wanted 5 (int)', "model: stored 'a', not wanted", 'window: not stored, wanted 7']
    """
    lines = []
    for name in dict.fromkeys((*stored, *wanted)):
        if name not in stored:
            lines.append(f"{name}: not stored, wanted {show(wanted[name])}")
        elif name not in wanted:
            lines.append(f"{name}: stored {show(stored[name])}, not wanted")
        elif not same(stored[name], wanted[name]) or (exact and texts_in(stored[name]) != texts_in(wanted[name])):
            old, new = stored[name], wanted[name]
            lines.append(f"{name}: stored {_show_typed(old)}, wanted {_show_typed(new)}{_why(old, new)}")
    return lines


def arguments_text(args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """Write the arguments of a run as JSON: the same text for the same arguments, in any order of keywords.

    Arrays larger than 1024 bytes are represented by their dtype, shape and the SHA-256 of their values.

    Raises
    ------
    ParameterError
        If an argument has no such form (see `encode`).

    Examples
    --------
    >>> arguments_text((1,), {"power": 2.0})
    '{"args": [1], "kwargs": {"power": 2.0}}'
    """
    positional = [to_json(value, f"Argument {index}", digest=True) for index, value in enumerate(args)]
    return dumps({"args": positional, "kwargs": to_json(dict(kwargs), "Keyword argument", digest=True)}, sort=True)


def same_arguments(text_a: str, text_b: str) -> bool:
    """Compare two texts of `arguments_text` as `canonical` does, but tell texts from bytes.

    A text that is none is the same as none.
    """
    if text_a == text_b:
        return True
    try:
        trees = (json.loads(text_a), json.loads(text_b))
        return _arguments_form(trees[0]) == _arguments_form(trees[1]) and texts_of(trees[0]) == texts_of(trees[1])
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return False


def _natural(value: object, where: str) -> Encoded | None:
    """Return the form that HDF5 has for a value, or None."""
    if isinstance(value, str):
        return Encoded(str.__str__(value), _text_kind(value, "str")) if is_clean(value) else None
    if isinstance(value, bytes):
        # HDF5 pads texts with NUL: where there are any, the bytes go as numbers
        stored = np.frombuffer(value, np.uint8) if b"\0" in value or not value else np.bytes_(value)
        return Encoded(stored, _text_kind(value, "bytes"))
    if isinstance(value, np.generic | np.ndarray):
        check_array(value, where)
        if isinstance(value, np.generic):
            return Encoded(value, f"scalar:{value.dtype.str}")
        return _natural_array(np.asarray(value))
    if isinstance(value, bool):
        return Encoded(np.bool_(value), "bool")
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return Encoded(np.int64(value) if fits(value) else np.uint64(value), "int")
    if isinstance(value, float):
        return Encoded(np.float64(value), "float")
    if isinstance(value, complex):
        return Encoded(np.complex128(value), "complex")
    if isinstance(value, list | tuple):
        return _natural_list(value)
    return None


def _natural_array(array: NDArray[Any]) -> Encoded | None:
    kind = f"array:{array.dtype.str}"
    if array.dtype.kind != "U":
        return Encoded(array, kind)
    return Encoded(array.astype(object), kind) if all(map(is_clean, array.ravel().tolist())) else None


def _natural_list(items: Sequence[Any]) -> Encoded | None:
    """Return a list or tuple of values of one simple type as an array of one dimension, or None."""
    family = "tuple" if isinstance(items, tuple) else "list"
    packed = pack(items)
    if packed is not None:
        return Encoded(packed, f"{family}:{type(items[0]).__name__}")
    types = set(map(type, items))
    if types == {str} and all(map(is_clean, items)):
        texts = np.empty(len(items), object)
        texts[:] = items
        return Encoded(texts, f"{family}:str")
    if len(types) == 1 and isinstance(items[0], np.generic) and items[0].dtype.kind in "biufc":
        return Encoded(np.array(items, items[0].dtype), f"{family}:{items[0].dtype.str}")
    return None


def _text_kind(value: object, plain: str) -> str:
    return f"numpy:{plain}" if isinstance(value, np.generic) else plain


def _leaf(value: Any, kind: str) -> Any:
    if kind == "str":
        return value.decode() if isinstance(value, bytes) else str(value)
    if kind == "bytes":
        return bytes(value) if isinstance(value, bytes) else np.asarray(value, np.uint8).tobytes()
    return {"bool": bool, "int": int, "float": float, "complex": complex}[kind](value)


def _arguments_form(tree: Any) -> tuple[Any, ...]:
    args, kwargs = from_json(tree["args"]), from_json(tree["kwargs"])
    positional = [digested(form_of(value, "An argument", ())) for value in args]
    return (*positional, [(name, digested(form_of(kwargs[name], "An argument", ()))) for name in sorted(kwargs)])


def _show_typed(value: Any) -> str:
    return show(value) if value is None or isinstance(value, np.ndarray) else f"{show(value)} ({type(value).__name__})"


def _why(old: Any, new: Any) -> str:
    """Say where two lists or arrays too long to show first differ, or that a value cannot be compared."""
    if not (same(old, old) and same(new, new)):
        return " (cannot be compared)"
    if not any(mark in show(value) for mark in ("…", "...") for value in (old, new)):
        return ""
    place: list[int] = []
    while _is_row(old) and _is_row(new) and len(old) == len(new) > 0:
        low, high = 0, len(old)
        while high - low > 1:  # old[low:high] and new[low:high] differ
            middle = (low + high) // 2
            low, high = (middle, high) if same(old[low:middle], new[low:middle]) else (low, middle)
        place.append(low)
        old, new = old[low], new[low]
    return f"; first different at {place}: {show(old)} and {show(new)}" if place else ""


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)
