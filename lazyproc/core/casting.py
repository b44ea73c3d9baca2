"""Bring what a function returned into the dtype and shape of an output; refuse what would be lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import OutputError
from lazyproc.core.specs import ResolvedOutput


class OutputMismatch(OutputError):
    """What the function returned does not fit; carries the row within the block."""

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row

    def __reduce__(self) -> tuple[type[OutputMismatch], tuple[str, int]]:
        return type(self), (str(self), self.row)


def store(column: Any, output: ResolvedOutput, result: NDArray[Any], start: int, *, vectorized: bool) -> None:
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

    Raises
    ------
    OutputMismatch
        If shape or dtype do not fit, or a value is not the same in the output's dtype: integers must fit, texts must
        not be cut, finite numbers must stay finite. Floats may be rounded.

    Notes
    -----
    What a masked array hides becomes the output's fill value.
    """
    column, masks = _unmasked(column, output, start, vectorized=vectorized)
    array = _as_array(column, output, start, vectorized=vectorized)
    if vectorized and (array.ndim == 0 or len(array) != len(result)):
        raise OutputMismatch(
            f"Output {output.name!r}: the block function returned the shape {array.shape} for a block of "
            f"{len(result)} positions; expected {(len(result), *output.shape)}: the positions come first."
        )
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
    hidden = None if masks is None else _hidden(masks, array.shape).reshape(result.shape)
    array = array.reshape(result.shape)
    with np.errstate(all="ignore"):
        result[...] = array
    _refuse_lost(array, result, output, start)
    if hidden is not None:
        result[hidden] = output.fill_value


def _unmasked(column: Any, output: ResolvedOutput, start: int, *, vectorized: bool) -> tuple[Any, Any]:
    """Take masked arrays apart: values with zero where they are hidden, and masks; None if nothing is masked."""
    masked = np.ma.MaskedArray
    if isinstance(column, masked):
        parts: Any = _parts(column, output)
    elif vectorized or not any(issubclass(kind, masked) for kind in set(map(type, column))):
        return column, None
    else:
        pairs = [_parts(value, output) if isinstance(value, masked) else (value, False) for value in column]
        parts = zip(*pairs, strict=True)
    values, masks = parts
    if output.dtype.names:
        raise OutputMismatch(
            f"Output {output.name!r}: the {'block ' * vectorized}function returned a masked array; expected plain "
            "values, since the output is compound. Fill it in the function, for example with .filled(0).",
            start,
        )
    return (values if isinstance(column, masked) else list(values)), masks


def _parts(value: Any, output: ResolvedOutput) -> tuple[NDArray[Any], NDArray[Any]]:
    if value is np.ma.masked:  # of no dtype, though it has one
        return np.zeros((), output.dtype), np.ones((), bool)
    return value.filled(np.zeros((), value.dtype)[()]), np.ma.getmaskarray(value)


def _hidden(masks: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return one mask for all values: from one, or from one for each position."""
    hidden = np.zeros(shape, bool)
    if isinstance(masks, np.ndarray):
        hidden[...] = masks
    else:
        for row, mask in enumerate(masks):
            hidden[row] = mask
    return hidden


def describe(value: Any) -> str:
    """Show a value that came, in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
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
        return np.asarray(values)
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
