"""What a function returned, kept as it was when it returned: it may use its arrays, lists and dicts again."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from lazyproc.core.masked import is_masked

IMMUTABLE = frozenset(
    {float, int, complex, bool, str, bytes, type(None), np.bytes_, np.str_}
    | {np.dtype(code).type for code in "?bhilqBHILQefdgFDG"}
)
"""Results that no later call can change."""
_CONSTANT = (float, int, complex, str, bytes, np.generic)
"""The same with their subclasses, but for records."""


class Returned(list[Any]):
    """What the function returned for some rows; `plain` until something came that may hold masked arrays."""

    plain = True

    def hold(self, value: Any) -> None:
        """Append a result as it is now: the function may use its array, list or dict again in the next call."""
        self.append(self._held(value))

    def _held(self, value: Any) -> Any:
        kind = type(value)
        if kind is np.ndarray:
            return value.copy()
        if kind is tuple or kind is list:
            return kind([item if type(item) in IMMUTABLE else self._held(item) for item in value])
        if is_masked(value):
            self.plain = False  # copied by its constructor, since the `copy` of a masked record fails
            return value if value is np.ma.masked else np.ma.MaskedArray(value.data, np.ma.getmask(value), copy=True)
        if isinstance(value, np.ndarray | np.void):
            return value.copy()
        if isinstance(value, Mapping):
            return {name: item if type(item) in IMMUTABLE else self._held(item) for name, item in value.items()}
        if isinstance(value, _CONSTANT):
            return value
        if isinstance(value, tuple | list) and not hasattr(value, "__array__"):
            items = [self._held(item) for item in value]
            return (
                value._make(items) if hasattr(value, "_make") else tuple(items) if isinstance(value, tuple) else items
            )
        return as_it_is_now(value)


def as_it_is_now(value: Any) -> Any:
    """Return the array that NumPy makes of an object of any other type, which may be another one after the next call.

    Without one, or where only some items are numbers or bytes, the result is something that does not fit any output.
    """
    try:
        array = np.array(np.asarray(value))  # a copy; asked for a copy, some objects warn
        if array.dtype.kind in "OUS":
            items = np.asarray(value, object)
            if not items.shape and items[()] is value:
                return value  # NumPy sees nothing in it that could change
            fits = all(isinstance(item, bytes if array.dtype.kind == "S" else numbers.Number) for item in items.flat)
        else:
            fits = True
    except MemoryError:  # elsewhere, or later, there may be enough
        raise
    except Exception:  # whatever its methods raise: it does not fit
        fits = False
    if fits:
        return array
    misfit = np.empty((), object)
    misfit[()] = value
    return misfit
