"""Which values can be parameters, and when two of them are the same: the canonical form of a value.

A form is a tuple: ``("none",)``, ``(kind of leaf, shape, payload)``, ``("empty", shape)``, ``("seq", forms)``,
``("dict", items)``, or ``("digest", Digest)`` for a large array of which only a digest is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ParameterError
from lazyproc.core.masked import is_masked

LEAVES = ("bool", "int", "float", "complex", "str", "bytes")
"""The kinds of values that contain no others."""

NUMBERS = {"b": "bool", "i": "int", "u": "int", "f": "float", "c": "complex"}
"""The leaf that an array of numbers consists of, by the kind of its dtype."""
_DEEPEST = 64  # levels of nesting
_PIECE = 2**15
"""Numbers of an array that are looked at at a time, so that what is made of them beside it is small."""
_STORABLE = (
    "None, bool, int, float, complex, str, bytes, NumPy numbers and texts, NumPy arrays of these (not of objects), "
    "and lists, tuples and dicts (with texts as keys) of all these"
)


@dataclass(frozen=True)
class Digest:
    """What is left of a large array: its shape and the SHA-256 (hex) of its canonical form."""

    shape: tuple[int, ...]
    sha256: str


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
    return form_of(value, "A value", ())


def same(a: object, b: object) -> bool:
    """Tell whether two values are the same parameter; what has no canonical form is the same as nothing.

    Of two large arrays of numbers no forms are made as a whole.
    """
    try:
        if is_of_numbers(a) and is_of_numbers(b) and a.size > _PIECE:
            pairs = zip(_pieces(a), _pieces(b), strict=True)
            return a.shape == b.shape and all(canonical(x) == canonical(y) for x, y in pairs)
        return canonical(a) == canonical(b)
    except ParameterError:
        return False


def texts_in(value: Any) -> str:
    """Tell which of the texts in a value are bytes, in the order of its form: an ``s`` or a ``b`` for each of them.

    Examples
    --------
    >>> texts_in({"b": [b"x", 1], "a": "y"})
    'sb'
    """
    if isinstance(value, str | bytes):
        return "s" if isinstance(value, str) else "b"
    if isinstance(value, np.ndarray):
        return {"U": "s", "S": "b"}.get(value.dtype.kind, "") * value.size
    if isinstance(value, dict):
        return "".join(texts_in(value[key]) for key in sorted(value))
    if isinstance(value, list | tuple):
        return "".join(map(texts_in, value)) if pack(value) is None else ""
    return ""


def form_of(value: Any, where: str, parents: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the form of a value. `where` is its place, for messages; `parents` the ids that it lies in."""
    check_nesting(value, where, parents)
    if value is None:
        return ("none",)
    if isinstance(value, str):
        return ("str", (), (str.__str__(value),))
    if isinstance(value, bytes):
        try:
            return ("str", (), (value.decode(),))
        except UnicodeDecodeError:
            return ("bytes", (), (bytes(value),))
    if isinstance(value, Digest):
        return ("digest", value)
    inside = (*parents, id(value))
    if isinstance(value, np.generic | np.ndarray):
        return _array_form(value, where, inside)
    if isinstance(value, int) and not fits(value):
        return ("int", (), (hex(value),))
    if isinstance(value, bool | int | float | complex):
        dtype = next(kind for kind in (bool, int, float, complex) if isinstance(value, kind))
        return _array_form(np.array(value, dtype), where, inside)
    if isinstance(value, list | tuple):
        packed = pack(value)
        if packed is not None:
            return _array_form(packed, where, inside)
        return _join([form_of(item, f"{where}[{index}]", inside) for index, item in enumerate(value)])
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return ("dict", tuple((key, form_of(value[key], f"{where}[{key!r}]", inside)) for key in sorted(value)))
    raise refusal(where, value)


def _array_form(value: Any, where: str, inside: tuple[int, ...]) -> tuple[Any, ...]:
    array = np.asarray(value)
    kind, shape = array.dtype.kind, array.shape
    if kind != "O":
        check_array(value, where)
    if array.size == 0:
        return ("empty", shape)
    if kind in "SUO":
        return form_of(array.tolist(), where, inside)
    name, pieces = NUMBERS[kind], payload_of(array)
    if pieces is not None:
        return (name, shape, b"".join(pieces))
    if kind == "u":
        return (name, shape, tuple(hex(number) for number in array.ravel().tolist()))
    return (name, shape, tuple(_ratio(part) for piece in _pieces(array) for part in _parts(piece)))


def payload_of(array: NDArray[Any]) -> Iterator[bytes] | None:
    """Return the payload of the form of an array of numbers, in pieces; None where numbers of 64 bits do not do."""
    if array.dtype.kind == "u":
        is_exact = fits(int(array.max()))
    else:
        is_exact = all(map(_is_exact, _pieces(array)))
    return map(_in_64_bits, _pieces(array)) if is_exact else None


def is_of_numbers(value: object) -> TypeGuard[NDArray[Any]]:
    """Tell whether a value is an array of numbers, and not masked."""
    return isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS and not is_masked(value)


def _pieces(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Cut an array into pieces of one dimension."""
    flat: Any = array.reshape(-1) if array.flags.c_contiguous else array.flat
    return (flat[start : start + _PIECE] for start in range(0, array.size, _PIECE))


def _parts(piece: NDArray[Any]) -> NDArray[Any]:
    """Return real and imaginary parts as numbers of their own."""
    return np.ascontiguousarray(piece).view(piece.real.dtype)


def _is_exact(piece: NDArray[Any]) -> bool:
    """Tell whether numbers of 64 bits say the same."""
    if piece.dtype.kind not in "fc":
        return True
    parts = _parts(piece)
    with np.errstate(all="ignore"):
        return bool(np.all((parts.astype("<f8") == parts) | (parts != parts)))


def _in_64_bits(piece: NDArray[Any]) -> bytes:
    """Return numbers as bytes, the same for the same numbers of any width."""
    if piece.dtype.kind == "b":
        return piece.tobytes()
    if piece.dtype.kind in "iu":
        return piece.astype("<i8").tobytes()
    with np.errstate(all="ignore"):
        doubles = _parts(piece).astype("<f8")
    doubles[np.isnan(doubles)] = np.nan  # one of the many bit patterns
    return (doubles + 0.0).tobytes()  # -0.0 + 0.0 is 0.0


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
    if len(kinds) > 1 or head[0] not in (*LEAVES, "empty"):
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


def digest_of(form: tuple[Any, ...]) -> Digest:
    """Reduce the form of an array to a digest."""
    kind, shape, payload = form if form[0] in LEAVES else (form[0], (), form[1:])
    made = hashlib.sha256(f"{kind}:{shape}:".encode())
    made.update(payload if isinstance(payload, bytes) else ascii(payload).encode())
    return Digest(shape, made.hexdigest())


def digest_of_array(array: NDArray[Any], where: str) -> Digest:
    """Reduce an array to the digest of its form, which is not made as a whole if it is one of numbers."""
    pieces = payload_of(array) if array.size and array.dtype.kind in NUMBERS else None
    if pieces is None:
        return digest_of(form_of(array, where, ()))
    made = hashlib.sha256(f"{NUMBERS[array.dtype.kind]}:{array.shape}:".encode())
    for piece in pieces:
        made.update(piece)
    return Digest(array.shape, made.hexdigest())


def digested(form: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put digests in the place of all arrays, so that those read as digests compare with those read in full."""
    if form[0] == "seq":
        return ("seq", tuple(digested(item) for item in form[1]))
    if form[0] == "dict":
        return ("dict", tuple((key, digested(item)) for key, item in form[1]))
    if form[0] in LEAVES and form[1] != ():
        return ("digest", digest_of(form))
    return form


def pack(items: Sequence[Any]) -> NDArray[Any] | None:
    """Return the items as an array if all are of one built-in type of number and fit into 64 bits."""
    types = set(map(type, items))
    if len(types) != 1 or not types <= {bool, int, float, complex}:
        return None
    try:
        return np.array(items, np.int64 if types == {int} else types.pop())
    except OverflowError:
        return None


def fits(number: int) -> bool:
    """Tell whether an int fits into 64 bits with a sign."""
    return -(2**63) <= number < 2**63


def check_array(value: Any, where: str) -> None:
    """Refuse arrays and NumPy values of anything but numbers and texts."""
    if is_masked(value) or value.dtype.kind not in "biufcSU":
        raise refusal(where, value)


def check_nesting(value: object, where: str, parents: tuple[int, ...]) -> None:
    """Refuse a value that contains itself or is nested too deep."""
    if id(value) in parents and isinstance(value, list | tuple | dict | np.ndarray):
        raise ParameterError(f"{where}: the {type(value).__name__} contains itself; expected a finite value.")
    if len(parents) > _DEEPEST:
        raise ParameterError(f"{where[:200]} …: nested deeper than {_DEEPEST} levels; expected a flatter value.")


def refusal(where: str, value: Any) -> ParameterError:
    """Return the error for a value that cannot be stored, with what to do instead."""
    kind = type(value)
    advice = "convert it to one of these"
    if isinstance(value, set | frozenset):
        advice = "give sorted(…), a list"
    elif is_masked(value):
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
