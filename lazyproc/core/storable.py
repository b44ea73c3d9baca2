"""What a dataset of results can hold: which dtypes, which fill values, and which texts describe it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazyproc.core.errors import DefinitionError


def fixed_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the dtype.

    Raises
    ------
    DefinitionError
        If it is none, or its values have no place of fixed size.
    """
    try:
        resolved = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise DefinitionError(f"Output: dtype is {dtype!r}; expected a NumPy dtype such as 'f4'.") from error
    if resolved.hasobject or resolved.itemsize == 0 or (resolved.kind in "UVMm" and resolved.fields is None):
        raise DefinitionError(
            f"Output: dtype is {resolved}; expected a number, a truth value, bytes of fixed length ('S16') or a "
            "compound of these: rows must lie at fixed offsets in the HDF5 file."
        )
    return resolved


def check_fields(dtype: np.dtype[Any], whole: np.dtype[Any] | None = None) -> None:
    """Refuse a compound dtype that cannot be written to HDF5 and read again as the same.

    Raises
    ------
    DefinitionError
        If a field has a name with a zero byte, or holds what is refused for a whole output, too; or if the fields are
        not in the order of their offsets, or overlap.
    """
    whole = whole or dtype
    if dtype.names == ():
        raise DefinitionError(f"Output: dtype is {whole}; expected at least one field.")
    end = 0
    for name, (field, offset, *_) in _fields_in_order(dtype):
        check_text(f"Output: dtype is {whole}: the name of a field", name)
        if offset < end:
            raise DefinitionError(
                f"Output: dtype is {whole}: the field {name!r} begins at byte {offset}, before the end of the one "
                "named before it; expected fields that do not overlap. Name them in the order of their offsets."
            )
        end = offset + field.itemsize
        while field.subdtype:
            field = field.base
        if end == offset or field.itemsize == 0 or field.kind in "UMm":
            raise DefinitionError(
                f"Output: dtype is {whole}: the field {name!r} is {field}; expected a number, a truth value, bytes of "
                "fixed length ('S16'), a compound or a subarray of these, of one value at least."
            )
        check_fields(field, whole)


def _fields_in_order(dtype: np.dtype[Any]) -> list[tuple[str, Any]]:
    fields: Any = dtype.fields or {}
    return [(name, fields[name]) for name in dtype.names or ()]


def check_text(label: str, text: str) -> None:
    """Refuse a text that HDF5 cannot store as it is.

    Raises
    ------
    DefinitionError
        If it holds a zero byte, at which it would end, or a half of a surrogate pair, which UTF-8 does not have.
    """
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise DefinitionError(
            f"{label} is {text!r}; expected a text without zero bytes and lone surrogates, which HDF5 cannot store. "
            "Remove them."
        )


def fill_of(dtype: np.dtype[Any], value: Any) -> Any:
    """Return the fill value as a read-only zero-dimensional array of the dtype; NaN and zeros if it is None.

    Raises
    ------
    DefinitionError
        If it is not the same in the dtype: whole numbers must fit, bytes must not be cut, finite numbers must stay
        finite. Floats may be rounded.

    Examples
    --------
    >>> fill_of(np.dtype("f4"), -1)
    array(-1., dtype=float32)
    >>> fill_of(np.dtype([("Width", "f8"), ("Count", "i4")]), None)
    array((nan, 0), dtype=[('Width', '<f8'), ('Count', '<i4')])
    """
    filled = np.zeros((), dtype)
    if value is None:
        _fill_by_default(filled)
    else:
        try:
            with np.errstate(all="ignore"):
                _fill(filled, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise DefinitionError(
                f"Output: fill_value is {value!r}; expected a value of the dtype {dtype}, which is the same in it "
                "(floats may be rounded). Give another value, or change the dtype."
            ) from error
        if dtype.kind == "S" and b"\0" in filled.item():
            raise DefinitionError(
                f"Output: fill_value is {value!r}; expected bytes without a zero byte inside, at which HDF5 would "
                "end it. Give another one."
            )
    filled.setflags(write=False)
    return filled


def _fill_by_default(filled: NDArray[Any]) -> None:
    if filled.dtype.names:
        for name in filled.dtype.names:
            _fill_by_default(filled[name])
    elif filled.dtype.kind in "fc":
        filled[...] = np.nan


def _fill(filled: NDArray[Any], value: Any) -> None:
    """Put a value into its place, field by field; raises ValueError if it is not the same there."""
    names = filled.dtype.names
    if names and filled.shape and isinstance(value, list):  # a subarray of records
        for row, one in zip(range(len(filled)), value, strict=True):
            _fill(filled[row : row + 1].reshape(()), one)
        return
    if names:
        for name, part in zip(names, _parts(value, len(names)), strict=True):
            _fill(filled[name], part)
        return
    values = np.broadcast_to(np.asarray(value, object), filled.shape)
    for place in np.ndindex(filled.shape):
        _check_kind(values[place], filled.dtype)
        filled[place] = values[place]
        if not _is_same(values[place], filled[place], filled.dtype.kind):
            raise ValueError(f"{values[place]!r} is {filled[place]!r} there")


def _parts(value: Any, n_fields: int) -> Sequence[Any]:
    """Return what a value says for each field: a tuple and a record one after the other, anything else for all."""
    names = value.dtype.names if isinstance(value, np.ndarray | np.void) else None
    if names:
        return [value[name] for name in names]
    return value if isinstance(value, tuple) else [value] * n_fields


def _check_kind(value: Any, dtype: np.dtype[Any]) -> None:
    """Refuse, with TypeError, what NumPy would turn into a value of another kind."""
    if dtype.kind == "S":
        fits = isinstance(value, bytes | str)
    elif dtype.kind == "c":
        fits = isinstance(value, numbers.Number | np.bool_)
    else:
        fits = isinstance(value, numbers.Number | np.bool_) and not isinstance(value, complex | np.complexfloating)
    if not fits and dtype.kind != "V":
        raise TypeError(f"{value!r} is no {dtype}")


def _is_same(value: Any, stored: Any, kind: str) -> bool:
    """Tell whether a value has become nothing else."""
    if kind == "S":
        return bool((value.encode() if isinstance(value, str) else value).rstrip(b"\0") == stored)
    if kind in "fc":
        parts = ((value.real, stored.real), (value.imag, stored.imag))
        return not any(np.isinf(now) and one not in (math.inf, -math.inf) for one, now in parts)
    return kind == "V" or bool(value == stored.item())
