"""Parameters and arguments as values: what can be stored, in which form, and when two of them are the same.

::

    value ── encode ──> Encoded(value, kind) ── the file ── decode ──> value        equal, with its type
    value ── canonical ──> a hashable form                                           for exact comparison

Numbers, texts, arrays and plain lists of them have a form of their own in HDF5. Everything else that can be stored
becomes JSON text, in which a dict with one key that begins with ``$`` stands for what JSON lacks (``{"$tuple": …}``).
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ParameterError, ResultsError

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
_DEEPEST = 64  # levels of nesting
_DIGEST_FROM = 1024  # bytes; larger arrays among the arguments are represented by a digest
_LEAVES = ("bool", "int", "float", "complex", "str", "bytes")
_STORABLE = (
    "None, bool, int, float, complex, str, bytes, NumPy numbers and texts, NumPy arrays of these (not of objects), "
    "and lists, tuples and dicts (with texts as keys) of all these"
)


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
        raise ParameterError(f"A parameter is named {_show(name)}; expected a text that is not empty. Rename it.")
    if not _is_clean(name) or len(name.encode()) > _LONGEST_NAME:
        raise ParameterError(
            f"A parameter is named {_show(name)}; expected at most {_LONGEST_NAME} bytes of UTF-8 without NUL and "
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
    return natural if natural is not None else Encoded(_dumps(_to_json(value, where)), "json")


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
            return _from_json(json.loads(value))
        if family in ("list", "tuple"):
            items = list(_typed(value, detail)) if detail not in _LEAVES else np.asarray(value).tolist()
            return tuple(items) if family == "tuple" else items
        if family == "array":
            return _typed(value, detail)
        if family == "scalar":
            return _typed(value, detail)[()]
        if family == "numpy" and detail in ("str", "bytes"):
            return np.str_(_leaf(value, "str")) if detail == "str" else np.bytes_(_leaf(value, "bytes"))
        if family in _LEAVES and not detail:
            return _leaf(value, family)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ResultsError(
            f"A stored parameter of the kind {kind!r} is {_show(value)}; expected what lazyproc wrote. It was changed "
            "by another program, or the file is damaged."
        ) from error
    raise ResultsError(
        f"A stored parameter is of the kind {kind!r}, which this version of lazyproc does not know; "
        "read it with the version that wrote it, or a newer one."
    )


def canonical(value: object) -> Hashable:
    """Give the hashable form in which two values are equal exactly when they are the same parameter.

    Numbers keep their nature (3, 3.0 and True differ) and their exact value, whatever the width of their type. NaN is
    NaN, and -0.0 is 0.0. Lists, tuples and arrays of the same nature, shape and values are the same, since a file
    written by pyUSID cannot tell them apart; so are texts and their UTF-8 bytes. The order of a dict does not matter.

    Parameters
    ----------
    value : object
        Anything that can be stored, or that was read.

    Raises
    ------
    ParameterError
        If the value has no such form (see `encode`).

    Examples
    --------
    >>> canonical([1, 2]) == canonical(np.array([1, 2], dtype="u1"))
    True
    >>> canonical(0.1) == canonical(np.float32(0.1))
    False
    """
    return _form(value, "A value", ())


def same(a: object, b: object) -> bool:
    """Tell whether two values are the same parameter; what has no canonical form is the same as nothing."""
    try:
        return canonical(a) == canonical(b)
    except ParameterError:
        return False


def differences(stored: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """Say in words how the stored parameters differ from the wanted ones.

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
            lines.append(f"{name}: not stored, wanted {_show(wanted[name])}")
        elif name not in wanted:
            lines.append(f"{name}: stored {_show(stored[name])}, not wanted")
        elif not same(stored[name], wanted[name]):
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
    positional = [_to_json(value, f"Argument {index}", digest=True) for index, value in enumerate(args)]
    return _dumps({"args": positional, "kwargs": _to_json(dict(kwargs), "Keyword argument", digest=True)}, sort=True)


def same_arguments(text_a: str, text_b: str) -> bool:
    """Compare two texts of `arguments_text` as `canonical` compares values; a text that is none is the same as none."""
    if text_a == text_b:
        return True
    try:
        return _arguments_form(text_a) == _arguments_form(text_b)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return False


# ---- the natural forms of HDF5


def _natural(value: object, where: str) -> Encoded | None:
    """Return the form that HDF5 has for a value, or None."""
    if isinstance(value, str):
        return Encoded(str.__str__(value), _text_kind(value, "str")) if _is_clean(value) else None
    if isinstance(value, bytes):
        # HDF5 pads texts with NUL: where there are any, the bytes go as numbers
        stored = np.frombuffer(value, np.uint8) if b"\0" in value or not value else np.bytes_(value)
        return Encoded(stored, _text_kind(value, "bytes"))
    if isinstance(value, np.generic | np.ndarray):
        _check_array(value, where)
        if isinstance(value, np.generic):
            return Encoded(value, f"scalar:{value.dtype.str}")
        return _natural_array(np.asarray(value))
    if isinstance(value, bool):
        return Encoded(np.bool_(value), "bool")
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return Encoded(np.int64(value) if _fits(value) else np.uint64(value), "int")
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
    return Encoded(array.astype(object), kind) if all(map(_is_clean, array.ravel().tolist())) else None


def _natural_list(items: Sequence[Any]) -> Encoded | None:
    """Return a list or tuple of values of one simple type as an array of one dimension, or None."""
    family = "tuple" if isinstance(items, tuple) else "list"
    packed = _pack(items)
    if packed is not None:
        return Encoded(packed, f"{family}:{type(items[0]).__name__}")
    types = set(map(type, items))
    if types == {str} and all(map(_is_clean, items)):
        texts = np.empty(len(items), object)
        texts[:] = items
        return Encoded(texts, f"{family}:str")
    if len(types) == 1 and isinstance(items[0], np.generic) and items[0].dtype.kind in "biufc":
        return Encoded(np.array(items, items[0].dtype), f"{family}:{items[0].dtype.str}")
    return None


def _pack(items: Sequence[Any]) -> NDArray[Any] | None:
    """Return the items as an array if all are of one built-in type of number and fit into 64 bits."""
    types = set(map(type, items))
    if len(types) != 1 or not types <= {bool, int, float, complex}:
        return None
    try:
        return np.array(items, np.int64 if types == {int} else types.pop())
    except OverflowError:
        return None


def _check_array(value: Any, where: str) -> None:
    if isinstance(value, np.ma.MaskedArray) or value.dtype.kind not in "biufcSU":
        raise _refusal(where, value)


def _fits(number: int) -> bool:
    """Tell whether an int fits into 64 bits with a sign."""
    return -(2**63) <= number < 2**63


def _is_clean(text: str) -> bool:
    """Tell whether HDF5 can store a text as it is: no NUL, no surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _text_kind(value: object, plain: str) -> str:
    return f"numpy:{plain}" if isinstance(value, np.generic) else plain


def _typed(value: Any, dtype: str) -> NDArray[Any]:
    resolved = np.dtype(dtype)
    if resolved.kind not in "biufcSU":
        raise ValueError(f"dtype {dtype}")
    return np.array(value, dtype=resolved)


def _leaf(value: Any, kind: str) -> Any:
    if kind == "str":
        return value.decode() if isinstance(value, bytes) else str(value)
    if kind == "bytes":
        return bytes(value) if isinstance(value, bytes) else np.asarray(value, np.uint8).tobytes()
    return {"bool": bool, "int": int, "float": float, "complex": complex}[kind](value)


# ---- JSON


def _dumps(tree: object, sort: bool = False) -> str:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, sort_keys=sort)


def _to_json(value: object, where: str, *, digest: bool = False, parents: tuple[int, ...] = ()) -> Any:
    """Turn a value into what JSON can hold. `where` is its place, for messages; `parents` the ids that it lies in."""
    _check_nesting(value, where, parents)
    if isinstance(value, np.generic):
        return _numpy_to_json(value, where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value) if _is_clean(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, bytes):
        return {"$bytes": value.decode("latin-1")}
    if isinstance(value, int):
        return int(value) if value.bit_length() < 2000 else {"$int": hex(value)}  # Python limits decimal digits
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, complex):
        return {"$complex": [_to_json(value.real, where), _to_json(value.imag, where)]}
    if isinstance(value, np.ndarray):
        return _array_to_json(value, where, digest)
    inside = (*parents, id(value))
    if isinstance(value, list | tuple):
        items = [_to_json(v, f"{where}[{i}]", digest=digest, parents=inside) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        pairs = [(key, _to_json(v, f"{where}[{key!r}]", digest=digest, parents=inside)) for key, v in value.items()]
        if all(_is_clean(key) and not key.startswith("$") for key in value):
            return {str.__str__(key): item for key, item in pairs}
        return {"$dict": [[_to_json(key, where), item] for key, item in (sorted(pairs) if digest else pairs)]}
    raise _refusal(where, value)


def _numpy_to_json(value: np.generic, where: str) -> dict[str, Any]:
    if isinstance(value, str | bytes):
        plain = str.__str__(value) if isinstance(value, str) else bytes(value)
        return {"$numpy": "str" if isinstance(plain, str) else "bytes", "value": _to_json(plain, where)}
    _check_array(value, where)
    items = _items_to_json(np.asarray(value))
    return {"$numpy": value.dtype.str, "value": items[0] if len(items) == 1 else items}


def _array_to_json(value: NDArray[Any], where: str, digest: bool) -> dict[str, Any]:
    _check_array(value, where)
    array = np.asarray(value)
    head = {"$array": array.dtype.str, "shape": list(array.shape)}
    if digest and array.nbytes > _DIGEST_FROM:
        return {**head, "sha256": _digest(_form(array, where, ())).sha256}
    return {**head, "values": _items_to_json(array)}


def _items_to_json(array: NDArray[Any]) -> list[Any]:
    flat = array.ravel()
    if _is_wide(flat.dtype):  # wider than any number of JSON's: exact decimals as text
        parts = np.ascontiguousarray(flat).view(flat.real.dtype)
        return [np.format_float_scientific(part, unique=True, trim="-") for part in parts]
    return [_to_json(item, "") for item in flat.tolist()]


def _is_wide(dtype: np.dtype[Any]) -> bool:
    return (dtype.kind == "f" and dtype.itemsize > 8) or (dtype.kind == "c" and dtype.itemsize > 16)


def _items_from_json(items: list[Any], dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    resolved = _typed([], dtype).dtype
    if _is_wide(resolved):
        parts = np.array([np.longdouble(text) for text in items], np.longdouble)
        native = parts.view(np.clongdouble) if resolved.kind == "c" else parts
        return native.astype(resolved).reshape(shape)
    return np.array([_from_json(item) for item in items], resolved).reshape(shape)


@dataclass(frozen=True)
class _Digest:
    """What is left of a large array: its shape and the SHA-256 (hex) of its canonical form."""

    shape: tuple[int, ...]
    sha256: str


def _from_json(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_from_json(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"$tuple": items}:
            return tuple(_from_json(item) for item in items)
        case {"$dict": pairs}:
            return {_from_json(key): _from_json(item) for key, item in pairs}
        case {"$str": code}:
            return bytes.fromhex(code).decode("utf-8", "surrogatepass")
        case {"$bytes": text}:
            return text.encode("latin-1")
        case {"$int": text}:
            return int(text, 16)
        case {"$float": text}:
            return float(text)
        case {"$complex": [real, imag]}:
            return complex(_from_json(real), _from_json(imag))
        case {"$numpy": ("str" | "bytes") as kind, "value": text}:
            return np.str_(_from_json(text)) if kind == "str" else np.bytes_(_from_json(text))
        case {"$numpy": dtype, "value": item}:
            return _items_from_json(item if isinstance(item, list) else [item], dtype, ())[()]
        case {"$array": _, "shape": shape, "sha256": code}:
            return _Digest(tuple(shape), code)
        case {"$array": dtype, "shape": shape, "values": items}:
            return _items_from_json(items, dtype, shape)
    if any(key.startswith("$") for key in tree):
        raise ValueError(f"an unknown form in JSON: {_show(tree)}")
    return {key: _from_json(item) for key, item in tree.items()}


# ---- canonical forms: ("none",), (leaf kind, shape, payload), ("empty", shape), ("seq", forms), ("dict", items)


def _form(value: Any, where: str, parents: tuple[int, ...]) -> tuple[Any, ...]:
    _check_nesting(value, where, parents)
    if value is None:
        return ("none",)
    if isinstance(value, str):
        return ("str", (), (str.__str__(value),))
    if isinstance(value, bytes):
        try:
            return ("str", (), (value.decode(),))
        except UnicodeDecodeError:
            return ("bytes", (), (bytes(value),))
    if isinstance(value, _Digest):
        return ("digest", value)
    inside = (*parents, id(value))
    if isinstance(value, np.generic | np.ndarray):
        return _array_form(value, where, inside)
    if isinstance(value, int) and not _fits(value):
        return ("int", (), (hex(value),))
    if isinstance(value, bool | int | float | complex):
        dtype = next(kind for kind in (bool, int, float, complex) if isinstance(value, kind))
        return _array_form(np.array(value, dtype), where, inside)
    if isinstance(value, list | tuple):
        packed = _pack(value)
        if packed is not None:
            return _array_form(packed, where, inside)
        return _join([_form(item, f"{where}[{index}]", inside) for index, item in enumerate(value)])
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return ("dict", tuple((key, _form(value[key], f"{where}[{key!r}]", inside)) for key in sorted(value)))
    raise _refusal(where, value)


def _array_form(value: Any, where: str, inside: tuple[int, ...]) -> tuple[Any, ...]:
    array = np.asarray(value)
    kind, shape = array.dtype.kind, array.shape
    if kind != "O":
        _check_array(value, where)
    if array.size == 0:
        return ("empty", shape)
    if kind in "SUO":
        return _form(array.tolist(), where, inside)
    if kind == "b":
        return ("bool", shape, array.tobytes())
    if kind in "iu":
        if kind == "u" and not _fits(int(array.max())):
            return ("int", shape, tuple(hex(number) for number in array.ravel().tolist()))
        return ("int", shape, array.astype("<i8").tobytes())
    parts = np.ascontiguousarray(array).ravel().view(array.real.dtype)
    with np.errstate(all="ignore"):
        doubles = parts.astype("<f8")
        exact = bool(np.all((doubles == parts) | (parts != parts)))
    name = "float" if kind == "f" else "complex"
    if not exact:
        return (name, shape, tuple(map(_ratio, parts)))
    doubles[np.isnan(doubles)] = np.nan  # one of the many bit patterns
    return (name, shape, (doubles + 0.0).tobytes())  # -0.0 + 0.0 is 0.0


def _ratio(number: Any) -> str:
    """Write a number of any width exactly."""
    if not np.isfinite(number):
        return "nan" if number != number else "inf" if number > 0 else "-inf"
    above, below = number.as_integer_ratio()
    return f"{above:x}/{below:x}"


def _join(forms: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Join the forms of the items of a list: rows of the same kind and shape make an array."""
    if not forms:
        return ("empty", (0,))
    kinds = {form[:2] for form in forms}
    head = forms[0]
    if len(kinds) > 1 or head[0] not in (*_LEAVES, "empty"):
        return ("seq", tuple(forms))
    shape = (len(forms), *head[1])
    if head[0] == "empty":
        return ("empty", shape)
    payloads = [form[2] for form in forms]
    if all(isinstance(payload, bytes) for payload in payloads):
        return (head[0], shape, b"".join(payloads))
    return (head[0], shape, tuple(part for payload in payloads for part in _spelled(head[0], payload)))


def _spelled(kind: str, payload: Any) -> tuple[Any, ...]:
    """Spell out a payload of bytes, to stand beside one with numbers that do not fit into 64 bits."""
    if isinstance(payload, tuple):
        return payload
    if kind == "int":
        return tuple(hex(number) for number in np.frombuffer(payload, "<i8").tolist())
    return tuple(_ratio(number) for number in np.frombuffer(payload, "<f8").tolist())


def _digest(form: tuple[Any, ...]) -> _Digest:
    kind, shape, payload = form if form[0] in _LEAVES else (form[0], (), form[1:])
    data = payload if isinstance(payload, bytes) else ascii(payload).encode()
    return _Digest(shape, hashlib.sha256(f"{kind}:{shape}:".encode() + data).hexdigest())


def _arguments_form(text: str) -> tuple[Any, ...]:
    tree = json.loads(text)
    args, kwargs = _from_json(tree["args"]), _from_json(tree["kwargs"])
    positional = [_digested(_form(value, "An argument", ())) for value in args]
    return (*positional, [(name, _digested(_form(kwargs[name], "An argument", ()))) for name in sorted(kwargs)])


def _digested(form: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put digests in the place of all arrays, so that those read as digests compare with those read in full."""
    if form[0] == "seq":
        return ("seq", tuple(_digested(item) for item in form[1]))
    if form[0] == "dict":
        return ("dict", tuple((key, _digested(item)) for key, item in form[1]))
    if form[0] in _LEAVES and form[1] != ():
        return ("digest", _digest(form))
    return form


# ---- messages


def _check_nesting(value: object, where: str, parents: tuple[int, ...]) -> None:
    if id(value) in parents and isinstance(value, list | tuple | dict | np.ndarray):
        raise ParameterError(f"{where}: the {type(value).__name__} contains itself; expected a finite value.")
    if len(parents) > _DEEPEST:
        raise ParameterError(f"{where[:200]} …: nested deeper than {_DEEPEST} levels; expected a flatter value.")


def _refusal(where: str, value: Any) -> ParameterError:
    kind = type(value)
    advice = "convert it to one of these"
    if isinstance(value, set | frozenset):
        advice = "give sorted(…), a list"
    elif isinstance(value, np.ma.MaskedArray):
        advice = "give its data and its mask as two parameters"
    elif isinstance(value, np.ndarray | np.generic):
        advice = "convert it to numbers or texts with astype"
    elif isinstance(value, dict):
        advice = "make its keys texts"
    elif kind.__module__.partition(".")[0] == "h5py":
        advice = "give its path as a text, or what it holds as an array"
    elif callable(value):
        advice = "give its name as a text and look it up in the function of the process"
    elif hasattr(value, "__fspath__"):
        advice = "give str(…) of it"
    dtype = f" of dtype {value.dtype}" if isinstance(value, np.ndarray | np.generic) else ""
    return ParameterError(
        f"{where}: a value of the type {kind.__module__}.{kind.__qualname__}{dtype} cannot be stored; "
        f"expected {_STORABLE}; {advice}."
    )


_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 6
_REPR.maxstring = _REPR.maxother = 80


def _show(value: Any) -> str:
    """Show a value in one short line."""
    if isinstance(value, np.ndarray):
        items = ", ".join(_show(item) for item in value.ravel()[:6].tolist())
        return f"array {value.shape} of {value.dtype} [{items}{', …' if value.size > 6 else ''}]"
    if isinstance(value, np.generic):
        return _show(value.item()) if type(value.item()) is not type(value) else str(value)
    if isinstance(value, list | tuple) and len(value) > 6:
        return f"{type(value).__name__} of {len(value)}: {_REPR.repr(value)}"
    try:
        return _REPR.repr(value).replace("\n", " ")
    except ValueError:  # an int of too many digits
        return f"{type(value).__name__} that is too long to show"


def _show_typed(value: Any) -> str:
    return (
        _show(value) if value is None or isinstance(value, np.ndarray) else f"{_show(value)} ({type(value).__name__})"
    )


def _why(old: Any, new: Any) -> str:
    """Say where two lists or arrays too long to show first differ, or that a value cannot be compared."""
    try:
        canonical(old), canonical(new)
    except ParameterError:
        return " (cannot be compared)"
    if not any(mark in _show(value) for mark in ("…", "...") for value in (old, new)):
        return ""
    place: list[int] = []
    while _is_row(old) and _is_row(new) and len(old) == len(new) > 0:
        low, high = 0, len(old)
        while high - low > 1:  # old[low:high] and new[low:high] differ
            middle = (low + high) // 2
            low, high = (middle, high) if same(old[low:middle], new[low:middle]) else (low, middle)
        place.append(low)
        old, new = old[low], new[low]
    return f"; first different at {place}: {_show(old)} and {_show(new)}" if place else ""


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)
