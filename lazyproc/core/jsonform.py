"""Values as JSON and back, with their types.

A dict with one key that begins with ``$`` stands for what JSON lacks (``{"$tuple": …}``); a dict of the user's with
such a key is written as ``{"$dict": pairs}``.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.canonical import Digest, check_array, check_nesting, digest_of_array, refusal

_DIGEST_FROM = 1024  # bytes; larger arrays among the arguments are represented by a digest

_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 6
_REPR.maxstring = _REPR.maxother = 80


def dumps(tree: object, sort: bool = False) -> str:
    """Write what `to_json` returned as text."""
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, sort_keys=sort)


def to_json(value: object, where: str, *, digest: bool = False, parents: tuple[int, ...] = ()) -> Any:
    """Turn a value into what JSON can hold. `where` is its place, for messages; `parents` the ids that it lies in."""
    check_nesting(value, where, parents)
    if isinstance(value, np.generic):
        return _numpy_to_json(value, where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value) if is_clean(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, bytes):
        return {"$bytes": value.decode("latin-1")}
    if isinstance(value, int):
        return int(value) if value.bit_length() < 2000 else {"$int": hex(value)}  # Python limits decimal digits
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, complex):
        return {"$complex": [to_json(value.real, where), to_json(value.imag, where)]}
    if isinstance(value, np.ndarray):
        return _array_to_json(value, where, digest)
    inside = (*parents, id(value))
    if isinstance(value, list | tuple):
        items = [to_json(v, f"{where}[{i}]", digest=digest, parents=inside) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        pairs = [(key, to_json(v, f"{where}[{key!r}]", digest=digest, parents=inside)) for key, v in value.items()]
        if all(is_clean(key) and not key.startswith("$") for key in value):
            return {str.__str__(key): item for key, item in pairs}
        return {"$dict": [[to_json(key, where), item] for key, item in (sorted(pairs) if digest else pairs)]}
    raise refusal(where, value)


def _numpy_to_json(value: np.generic, where: str) -> dict[str, Any]:
    if isinstance(value, str | bytes):
        plain = str.__str__(value) if isinstance(value, str) else bytes(value)
        return {"$numpy": "str" if isinstance(plain, str) else "bytes", "value": to_json(plain, where)}
    check_array(value, where)
    items = _items_to_json(np.asarray(value))
    return {"$numpy": value.dtype.str, "value": items[0] if len(items) == 1 else items}


def _array_to_json(value: NDArray[Any], where: str, digest: bool) -> dict[str, Any]:
    check_array(value, where)
    array = np.asarray(value)
    head = {"$array": array.dtype.str, "shape": list(array.shape)}
    if digest and array.nbytes > _DIGEST_FROM:
        return {**head, "sha256": digest_of_array(array, where).sha256}
    return {**head, "values": _items_to_json(array)}


def _items_to_json(array: NDArray[Any]) -> list[Any]:
    flat = array.ravel()
    if _is_wide(flat.dtype):  # wider than any number of JSON's: exact decimals as text
        parts = np.ascontiguousarray(flat).view(flat.real.dtype)
        return [np.format_float_scientific(part, unique=True, trim="-") for part in parts]
    return [to_json(item, "") for item in flat.tolist()]


def from_json(tree: Any) -> Any:
    """Turn what was read from JSON back into the value: the inverse of `to_json`."""
    if isinstance(tree, list):
        return [from_json(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"$tuple": items}:
            return tuple(from_json(item) for item in items)
        case {"$dict": pairs}:
            return {from_json(key): from_json(item) for key, item in pairs}
        case {"$str": code}:
            return bytes.fromhex(code).decode("utf-8", "surrogatepass")
        case {"$bytes": text}:
            return text.encode("latin-1")
        case {"$int": text}:
            return int(text, 16)
        case {"$float": text}:
            return float(text)
        case {"$complex": [real, imag]}:
            return complex(from_json(real), from_json(imag))
        case {"$numpy": ("str" | "bytes") as kind, "value": text}:
            return np.str_(from_json(text)) if kind == "str" else np.bytes_(from_json(text))
        case {"$numpy": dtype, "value": item}:
            return _items_from_json(item if isinstance(item, list) else [item], dtype, ())[()]
        case {"$array": _, "shape": shape, "sha256": code}:
            return Digest(tuple(shape), code)
        case {"$array": dtype, "shape": shape, "values": items}:
            return _items_from_json(items, dtype, shape)
    if any(key.startswith("$") for key in tree):
        raise ValueError(f"an unknown form in JSON: {show(tree)}")
    return {key: from_json(item) for key, item in tree.items()}


def texts_of(tree: Any) -> str:
    """Tell which of the texts in a value are bytes, as `texts_in` does, from what `to_json` returned."""
    if isinstance(tree, str):
        return "s"
    if isinstance(tree, list):
        return "".join(map(texts_of, tree))
    if not isinstance(tree, dict):
        return ""
    match tree:
        case {"$bytes": _} | {"$numpy": "bytes"}:
            return "b"
        case {"$str": _} | {"$numpy": "str"}:
            return "s"
        case {"$int": _} | {"$float": _} | {"$complex": _} | {"$numpy": _}:
            return ""
        case {"$array": dtype, "shape": shape}:
            return {"U": "s", "S": "b"}.get(dtype[1:2], "") * math.prod(shape)
        case {"$tuple": items}:
            return texts_of(items)
        case {"$dict": pairs}:
            return "".join(
                texts_of(item)
                for _, item in sorted(((from_json(key), item) for key, item in pairs), key=lambda pair: pair[0])
            )
    return "".join(texts_of(tree[key]) for key in sorted(tree))


def _items_from_json(items: list[Any], dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    resolved = typed([], dtype).dtype
    if _is_wide(resolved):
        parts = np.array([np.longdouble(text) for text in items], np.longdouble)
        native = parts.view(np.clongdouble) if resolved.kind == "c" else parts
        return native.astype(resolved).reshape(shape)
    return np.array([from_json(item) for item in items], resolved).reshape(shape)


def _is_wide(dtype: np.dtype[Any]) -> bool:
    return (dtype.kind == "f" and dtype.itemsize > 8) or (dtype.kind == "c" and dtype.itemsize > 16)


def typed(value: Any, dtype: str) -> NDArray[Any]:
    """Return an array of a stored dtype, which must be one of numbers or texts."""
    resolved = np.dtype(dtype)
    if resolved.kind not in "biufcSU":
        raise ValueError(f"dtype {dtype}")
    return np.asarray(value, resolved)


def is_clean(text: str) -> bool:
    """Tell whether HDF5 can store a text as it is: no NUL, no surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def show(value: Any) -> str:
    """Show a value in one short line."""
    if isinstance(value, np.ndarray):
        items = ", ".join(show(item) for item in value.ravel()[:6].tolist())
        return f"array {value.shape} of {value.dtype} [{items}{', …' if value.size > 6 else ''}]"
    if isinstance(value, np.generic):
        return show(value.item()) if type(value.item()) is not type(value) else str(value)
    if isinstance(value, list | tuple) and len(value) > 6:
        return f"{type(value).__name__} of {len(value)}: {_REPR.repr(value)}"
    try:
        return _REPR.repr(value).replace("\n", " ")
    except ValueError:  # an int of too many digits
        return f"{type(value).__name__} that is too long to show"
