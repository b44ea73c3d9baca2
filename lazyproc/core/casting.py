"""Bring what a function returned into the dtype and shape of an output; refuse what would be lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.masked import is_masked, masked_type
from lazyproc.core.no_result import OutputMismatch
from lazyproc.core.specs import ResolvedOutput


def store(
    column: Any,
    output: ResolvedOutput,
    result: NDArray[Any],
    start: int,
    *,
    vectorized: bool,
    plain: bool = False,
) -> None:
    """Check the values of one output and put them into their place.

    Parameters
    ----------
    column : sequence or ndarray
        One value a position, or from a block function whatever it returned for the output.
    output : ResolvedOutput
        What is expected.
    result : ndarray
        Where they go, `(n_positions, width)`, of the output's dtype.
    start : int
        The row of the first of them within the block, for the error.
    vectorized : bool
        Whether they come from a block function.
    plain : bool
        Whether it is known that no masked arrays are among them, so that nobody has to look.

    Raises
    ------
    OutputMismatch
        If shape or dtype do not fit, or a value is not the same in the output's dtype: integers must fit, texts must
        not be cut, finite numbers must stay finite. Floats may be rounded.

    Notes
    -----
    What a masked array hides becomes the output's fill value, field by field where it is compound. A list from a block
    function may hold values that fit each, and for which NumPy has no type together: they are stored one by one then.
    """
    try:
        _store_all(column, output, result, start, vectorized=vectorized, plain=plain)
    except OutputMismatch as error:
        if not vectorized or not isinstance(column, list | tuple) or len(column) != len(result) or len(column) < 2:
            raise
        try:
            _store_each(column, output, result, start)
        except OutputMismatch:
            raise error from error.__cause__


def _store_all(
    column: Any, output: ResolvedOutput, result: NDArray[Any], start: int, *, vectorized: bool, plain: bool
) -> None:
    """Store the values of one output in one step, or one by one if some hold masked ones."""
    mask: Any = None
    if not plain and _holds_masked(column):
        if is_masked(column):
            column, mask = _without_hidden(column), np.ma.getmask(column)
        else:
            if len(column) != len(result):
                raise _wrong_length((len(column),), output, len(result))
            _store_each(column, output, result, start)
            return
    array = _as_array(column, output, start, vectorized=vectorized)
    if vectorized and (array.ndim == 0 or len(array) != len(result)):
        raise _wrong_length(array.shape, output, len(result))
    inner = array.shape[1:]
    if inner not in _allowed_shapes(output):
        raise OutputMismatch(
            f"Output {output.name!r}: the function returned the shape {inner} for a position; expected "
            f"{output.shape}. Return that shape, or change the dims of the Output.",
            start,
        )
    if not _fits(array.dtype, output.dtype):
        row = 0 if vectorized else _first_misfit(column, output)
        came, wanted, where = _misfitting_field(array.dtype, output.dtype)
        raise OutputMismatch(
            f"Output {output.name!r}: the function returned the dtype {came}{where}; expected one that fits {wanted}. "
            "Convert it in the function, or change the dtype of the Output.",
            start + row,
        )
    array = array.reshape(result.shape)
    with np.errstate(all="ignore"):
        result[...] = array
    _refuse_lost(array, result, output, start)
    if mask is not None and mask is not np.ma.nomask:
        _overwrite(result, mask.reshape(result.shape), output.fill_value)


def _store_each(column: Sequence[Any], output: ResolvedOutput, result: NDArray[Any], start: int) -> None:
    """Store values one by one, since some hold masked ones: a masked value alone has no dtype that counts."""
    for row, value in enumerate(column):
        place = result[row : row + 1]
        if not _holds_masked(value):
            store([value], output, place, start + row, vectorized=False, plain=True)
            continue
        try:
            masked = _as_masked(value, output.dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise _misfit([value], output, start + row, False, error) from error
        store(masked[np.newaxis], output, place, start + row, vectorized=False)


def _holds_masked(values: Any) -> bool:
    """Tell whether there is a masked array in a value, or in lists and tuples of them."""
    if not isinstance(values, list | tuple):
        return is_masked(values)
    kinds = set(map(type, values))
    masked = masked_type()
    holders = (list, tuple) if masked is None else (list, tuple, masked)
    return any(issubclass(kind, holders) for kind in kinds) and any(map(_holds_masked, values))


def _as_masked(value: Any, dtype: np.dtype[Any]) -> Any:
    """Make a masked array of the result of one position, in the dtype that it has by itself."""
    if value is np.ma.masked:
        return np.ma.MaskedArray(np.zeros((), dtype), mask=True)
    if is_masked(value):
        return value
    values, mask = _parted(value, dtype)
    array = _stacked(values, dtype)
    return np.ma.MaskedArray(array, np.array(mask, np.ma.make_mask_descr(array.dtype)))


def _parted(value: Any, dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Take nested lists and tuples apart: the same with something harmless where values are masked, and the masks."""
    if value is np.ma.masked:
        return _blank(dtype), np.ones((), np.ma.make_mask_descr(dtype))[()]
    if is_masked(value):
        return _without_hidden(value), np.ma.getmaskarray(value)
    if isinstance(value, tuple) and dtype.names:
        if len(value) != len(dtype.names):
            raise ValueError(f"expected tuples of {len(dtype.names)} values, one for each field")
        pairs = [_parted(item, dtype[name]) for item, name in zip(value, dtype.names, strict=True)]
        return tuple(values for values, _ in pairs), tuple(mask for _, mask in pairs)
    if isinstance(value, list | tuple):
        pairs = [_parted(item, dtype.base) for item in value]
        return [values for values, _ in pairs], [mask for _, mask in pairs]
    return value, np.zeros(np.shape(value), np.ma.make_mask_descr(dtype.base))[()]


def _blank(dtype: np.dtype[Any]) -> Any:
    """Return a value that changes the dtype of no list that it is in."""
    if dtype.names:
        return tuple(_blank(dtype[name]) for name in dtype.names)
    if dtype.subdtype:
        return np.zeros(dtype.shape, dtype.base if dtype.base.names or dtype.base.kind == "S" else bool)
    return b"" if dtype.kind == "S" else False


def _without_hidden(masked: Any) -> NDArray[Any]:
    """Return the values of a masked array, with zero where they are masked: what is hidden need not fit."""
    values = np.asarray(masked.data)
    mask = np.ma.getmask(masked)
    if mask is not np.ma.nomask:
        values = values.copy()
        _overwrite(values, mask, np.zeros((), values.dtype))
    return values


def _overwrite(array: NDArray[Any], mask: Any, value: NDArray[Any]) -> None:
    """Put a value where the mask says so, field by field where the mask has fields."""
    if mask.dtype.names:
        for name in mask.dtype.names:
            _overwrite(array[name], mask[name], value[name])
    else:
        np.copyto(array, value, where=mask)


def describe(value: Any) -> str:
    """Show a value that came, in a few words."""
    if isinstance(value, np.ndarray) and value.dtype == object and not value.shape:
        value = value[()]
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if value is None:
        return "None (NoneType; a missing return?)"
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({type(value).__name__})"


def _allowed_shapes(output: ResolvedOutput) -> set[tuple[int, ...]]:
    """Shapes of one result that can be read in one way only: as declared, flat, and () for (1,)."""
    shapes = {output.shape, (output.width,)}
    if output.width == 1:
        shapes.add(())
    return shapes


def _as_array(column: Any, output: ResolvedOutput, start: int, *, vectorized: bool) -> NDArray[Any]:
    """Make an array of the values, `(n_positions, …)`; of the output's dtype where that is compound."""
    try:
        array = column if isinstance(column, np.ndarray) else _stacked(column, output.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise _misfit(column, output, start, vectorized, error) from error
    if array.dtype.hasobject or (array.dtype.kind in "US" and output.dtype.kind != "S"):
        raise _misfit(column, output, start, vectorized, None)
    return array


def _stacked(values: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Make an array of what came, in the dtype that it has by itself; tuples are records if records are expected."""
    if dtype.kind == "S":  # among texts NumPy would turn numbers into texts
        objects = np.asarray(values, object)
        return np.asarray(values) if all(isinstance(item, bytes) for item in objects.flat) else objects
    shape, items = _tuples(values) if dtype.names else ((), [])
    if not items:
        return _in_numbers(np.asarray(values), values, dtype)
    names = dtype.names or ()
    if any(not isinstance(item, tuple) or len(item) != len(names) for item in items):
        raise ValueError(f"expected tuples of {len(names)} values, one for each field")
    columns = {
        name: _stacked([item[number] for item in items], dtype[name].base if dtype[name].subdtype else dtype[name])
        for number, name in enumerate(names)
    }
    records = np.empty(len(items), [(name, column.dtype, column.shape[1:]) for name, column in columns.items()])
    for name, column in columns.items():
        records[name] = column
    return records.reshape(shape)


def _in_numbers(array: NDArray[Any], values: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the array of values; as numbers that are expected where NumPy found no type for what stands together.

    Of 1 and 2**63 it makes floats, which are not the same, and of 1.0 and 2**70 objects.
    """
    kinds = {"i": "fO", "u": "fO", "f": "O", "c": "O"}.get(dtype.kind, "")
    if array.dtype.kind not in kinds:
        return array
    items = np.asarray(values, object)
    if dtype.kind in "fc":
        numbers: tuple[type, ...] = (int, float, np.number, np.bool_, *([complex] if dtype.kind == "c" else []))
        return items.astype(np.result_type(dtype, "f8")) if _are(items, numbers) else array
    if not _are(items, (int, np.integer, np.bool_)):
        return array
    integers = [int(item) for item in items.flat]
    fit = bool(integers) and min(integers) >= 0 and max(integers) < 2**64
    return np.array(integers, np.uint64).reshape(items.shape) if fit else array


def _are(items: NDArray[Any], kinds: tuple[type, ...]) -> bool:
    return all(isinstance(item, kinds) for item in items.flat)


def _tuples(values: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Return the shape of nested lists, and the items in them; no items if they are no tuples."""
    shape: tuple[int, ...] = ()
    items = [values]
    while items and isinstance(items[0], list):
        size = len(items[0])
        if any(not isinstance(item, list) or len(item) != size for item in items):
            raise ValueError("expected lists of the same length")
        shape = (*shape, size)
        items = [inner for item in items for inner in item]
    return shape, items if items and isinstance(items[0], tuple) else []


def _wrong_length(shape: tuple[int, ...], output: ResolvedOutput, n_positions: int) -> OutputMismatch:
    return OutputMismatch(
        f"Output {output.name!r}: the block function returned the shape {shape} for a block of {n_positions} "
        f"positions; expected {(n_positions, *output.shape)}: the positions come first."
    )


def _misfit(
    column: Any, output: ResolvedOutput, start: int, vectorized: bool, error: Exception | None
) -> OutputMismatch:
    """Say which value does not fit, and of which row."""
    expected = f"expected the shape {output.shape} and a value that fits the dtype {output.dtype}"
    if vectorized:
        return OutputMismatch(f"Output {output.name!r}: the block function returned {describe(column)}; {expected}.")
    row = _first_misfit(column, output)
    if row < len(column):
        came = describe(column[row])
        return OutputMismatch(f"Output {output.name!r}: the function returned {came}; {expected}.", start + row)
    return OutputMismatch(f"Output {output.name!r}: the values do not fit together ({error}); {expected}.", start)


def _first_misfit(column: Sequence[Any], output: ResolvedOutput) -> int:
    """Return the first row whose value alone does not fit; their number if each fits."""
    for row, value in enumerate(column):
        try:
            single = _stacked(value, output.dtype)
        except (TypeError, ValueError, OverflowError):
            return row
        if single.shape not in _allowed_shapes(output) or not _fits(single.dtype, output.dtype):
            return row
    return len(column)


def _fits(came: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Tell whether values of one dtype may become another one; refuse what would lose more than precision."""
    if came.names or wanted.names:
        names = wanted.names or ()
        return came.names == wanted.names and all(_fits(came[name], wanted[name]) for name in names)
    if came.subdtype and wanted.subdtype and came.shape == wanted.shape:
        return _fits(came.base, wanted.base)
    if "S" in (came.kind, wanted.kind):
        return came.kind == wanted.kind
    integers = came.kind in "iub" and wanted.kind in "iu"
    return integers or np.can_cast(came, wanted, "same_kind")


def _misfitting_field(came: np.dtype[Any], wanted: np.dtype[Any]) -> tuple[np.dtype[Any], np.dtype[Any], str]:
    """Return the two dtypes that do not fit, of the first such field where the fields themselves are the same."""
    if came.names and came.names == wanted.names:
        name = next(name for name in came.names if not _fits(came[name], wanted[name]))
        return came[name], wanted[name], f" in the field {name!r}"
    return came, wanted, ""


def _refuse_lost(
    array: NDArray[Any], stored: NDArray[Any], output: ResolvedOutput, start: int, where: str = ""
) -> None:
    """Refuse values that are not what was stored: cut integers and texts, finite numbers that became infinite."""
    came, wanted = array.dtype, stored.dtype
    if wanted.names:
        for name in wanted.names:
            _refuse_lost(array[name], stored[name], output, start, f" of the field {name!r}")
        return
    if np.can_cast(came, wanted, "safe"):
        return
    if wanted.kind in "iuS":
        lost = stored != array
    elif wanted.kind in "fc":
        lost = np.isinf(stored)
        if lost.any():
            lost = _became_infinite(array.real, stored.real) | _became_infinite(array.imag, stored.imag)
    else:
        return
    if lost.any():
        first = tuple(np.argwhere(lost)[0])
        raise OutputMismatch(
            f"Output {output.name!r}: the value {array[first].item()!r}{where} does not fit into the dtype {wanted}; "
            "choose a wider one.",
            start + int(first[0]),
        )


def _became_infinite(array: NDArray[Any], stored: NDArray[Any]) -> NDArray[np.bool_]:
    lost: NDArray[np.bool_] = np.isinf(stored) & np.isfinite(array)
    return lost
