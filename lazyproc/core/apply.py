"""Apply a function to the rows of a block and check what it returns, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import OutputError
from lazyproc.core.specs import ResolvedOutput

_BATCH_ROWS = 256
_BATCH_BYTES = 2**20
"""Results of so many calls, and bytes, are held as Python objects before they are stacked: the memory of a block is that
of its source and its results, and not that of its results three times."""

Arrays = tuple[NDArray[Any], ...]


class RowError(Exception):
    """The user's function failed; carries the rows it was given, `__cause__` is its exception.

    Parameters
    ----------
    first, last : int
        First row and last row plus one, counted within the block.
    """

    def __init__(self, first: int, last: int) -> None:
        super().__init__(first, last)
        self.first = first
        self.last = last


class OutputMismatch(OutputError):
    """What the function returned does not fit; carries the row within the block."""

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row

    def __reduce__(self) -> tuple[type[OutputMismatch], tuple[str, int]]:
        return type(self), (str(self), self.row)


def compute_rows(
    function: Callable[..., Any],
    data: NDArray[Any],
    outputs: Sequence[ResolvedOutput],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    vectorized: bool,
) -> Arrays:
    """Compute the results of a block.

    Parameters
    ----------
    function : callable
        One position `(n_spectral,)`, or with `vectorized` a block `(n_positions, n_spectral)`, to its results: a
        mapping, a tuple in the order of the outputs, or the single value.
    data : ndarray
        The block, `(n_positions, n_spectral)`.
    outputs : sequence of ResolvedOutput
        What is expected.
    args, kwargs
        Further arguments of the function.
    vectorized : bool
        Whether the function takes the whole block.

    Returns
    -------
    tuple of ndarray
        One array an output, `(n_positions, width)`, of the declared dtype, C-ordered.

    Raises
    ------
    RowError
        From the exception that the function raised.
    OutputMismatch
        If the number, the names, the shape or the dtype do not fit.

    Examples
    --------
    >>> from lazyproc.core.specs import Output
    >>> mean = Output("f4").resolve("Mean", n_spectral=3)
    >>> compute_rows(np.mean, np.array([[1, 2, 3], [4, 5, 6]]), [mean], vectorized=False)
    (array([[2.],
           [5.]], dtype=float32),)
    """
    results = tuple(np.empty((len(data), output.width), output.dtype) for output in outputs)
    keywords = dict(kwargs or {})
    if vectorized:
        try:
            returned = function(data, *args, **keywords)
        except Exception as error:
            raise RowError(0, len(data)) from error
        columns = _columns_of_block(returned, outputs)
        for output, column, result in zip(outputs, columns, results, strict=True):
            _store(column, output, result, 0, vectorized=True)
        return results
    batch = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, sum(output.row_bytes for output in outputs))))
    for start in range(0, len(data), batch):
        returned_rows = _call_rows(function, data[start : start + batch], start, args, keywords)
        columns = _columns_of_rows(returned_rows, outputs, start)
        for output, column, result in zip(outputs, columns, results, strict=True):
            _store(column, output, result[start : start + len(returned_rows)], start, vectorized=False)
    return results


def _call_rows(
    function: Callable[..., Any], rows: NDArray[Any], start: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Any]:
    """Call the function for each row; the hot loop, so nothing else is in it."""
    returned: list[Any] = []
    keep = returned.append
    try:
        for row in rows:
            keep(function(row, *args, **kwargs))
    except Exception as error:
        failed = start + len(returned)
        raise RowError(failed, failed + 1) from error
    return returned


def _columns_of_block(returned: Any, outputs: Sequence[ResolvedOutput]) -> list[Any]:
    """Sort what a block function returned into one array an output."""
    names = [output.name for output in outputs]
    if isinstance(returned, Mapping):
        _check_names(returned, names, 0)
        return [returned[name] for name in names]
    if isinstance(returned, tuple) and (len(outputs) > 1 or len(returned) == 1):
        _check_count(returned, names, 0)
        return list(returned)
    if len(outputs) == 1:
        return [returned]
    raise OutputMismatch(_wrong_form(returned, names))


def _columns_of_rows(returned: list[Any], outputs: Sequence[ResolvedOutput], start: int) -> list[Any]:
    """Sort what the function returned for each row into one list an output."""
    names = [output.name for output in outputs]
    first = returned[0]
    if isinstance(first, Mapping):
        for row, item in enumerate(returned):
            if not isinstance(item, Mapping):
                raise OutputMismatch(_wrong_form(item, names), start + row)
            _check_names(item, names, start + row)
        return [[item[name] for item in returned] for name in names]
    if isinstance(first, tuple) and not isinstance(first, np.void) and (len(outputs) > 1 or len(first) == 1):
        for row, item in enumerate(returned):
            if not isinstance(item, tuple):
                raise OutputMismatch(_wrong_form(item, names), start + row)
            _check_count(item, names, start + row)
        return [list(column) for column in zip(*returned, strict=True)]
    if len(outputs) == 1:
        return [returned]
    raise OutputMismatch(_wrong_form(first, names), start)


def _check_names(item: Mapping[str, Any], names: list[str], row: int) -> None:
    if item.keys() != set(names):
        missing = [name for name in names if name not in item]
        surplus = [name for name in item if name not in names]
        raise OutputMismatch(
            f"The function returned a mapping with the names {list(item)}; expected the declared outputs {names}"
            + (f"; missing: {missing}" if missing else "")
            + (f"; not declared: {surplus}" if surplus else "")
            + ". Return each output once, under its name.",
            row,
        )


def _check_count(item: tuple[Any, ...], names: list[str], row: int) -> None:
    if len(item) != len(names):
        raise OutputMismatch(
            f"The function returned a tuple of {len(item)}; expected {len(names)} values, in the order of the declared "
            f"outputs {names}. Return one value an output.",
            row,
        )


def _wrong_form(returned: Any, names: list[str]) -> str:
    return (
        f"The function returned {_describe(returned)}; expected a mapping with the names {names} or a tuple of "
        f"{len(names)} values in that order."
    )


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({type(value).__name__})"


def _store(column: Any, output: ResolvedOutput, result: NDArray[Any], start: int, *, vectorized: bool) -> None:
    """Check the values of one output and put them into their place."""
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
    _cast(array.reshape(result.shape), output, result, start)


def _allowed_shapes(output: ResolvedOutput) -> set[tuple[int, ...]]:
    """Shapes of one result that can be read in one way only: as declared, flat, and () for (1,)."""
    shapes = {output.shape, (output.width,)}
    if output.width == 1:
        shapes.add(())
    return shapes


def _as_array(column: Any, output: ResolvedOutput, start: int, *, vectorized: bool) -> NDArray[Any]:
    """Make an array of the values, `(n_positions, …)`; of the output's dtype where that is compound."""
    try:
        if output.dtype.fields is not None and not isinstance(column, np.ndarray):
            array = np.asarray(column, dtype=output.dtype)
        else:
            array = np.asarray(column)
    except (TypeError, ValueError) as error:
        raise _misfit(column, output, start, vectorized, error) from error
    if array.dtype.hasobject or (array.dtype.kind in "US" and output.dtype.kind not in "S"):
        raise _misfit(column, output, start, vectorized, None)
    return array


def _misfit(
    column: Any, output: ResolvedOutput, start: int, vectorized: bool, error: Exception | None
) -> OutputMismatch:
    """Find the row whose value does not fit, for the message."""
    expected = f"expected the shape {output.shape} and a value that fits the dtype {output.dtype}"
    if vectorized:
        return OutputMismatch(f"Output {output.name!r}: the block function returned {_describe(column)}; {expected}.")
    for row, value in enumerate(column):
        try:
            single = np.asarray(value, dtype=output.dtype if output.dtype.fields is not None else None)
            fits = single.shape in _allowed_shapes(output) and single.dtype.kind not in "OU"
        except (TypeError, ValueError):
            fits = False
        if not fits:
            came = _describe(value)
            return OutputMismatch(f"Output {output.name!r}: the function returned {came}; {expected}.", start + row)
    return OutputMismatch(f"Output {output.name!r}: the values do not fit together ({error}); {expected}.", start)


def _cast(array: NDArray[Any], output: ResolvedOutput, result: NDArray[Any], start: int) -> None:
    """Copy into the output's dtype; refuse what would lose more than the declared precision."""
    came, wanted = array.dtype, output.dtype
    integers = came.kind in "iub" and wanted.kind in "iu"
    if not (integers or np.can_cast(came, wanted, "same_kind")) or (wanted.names or ()) != (came.names or ()):
        raise OutputMismatch(
            f"Output {output.name!r}: the function returned the dtype {came}; expected one that fits {wanted}. "
            "Convert it in the function, or change the dtype of the Output.",
            start,
        )
    with np.errstate(all="ignore"):
        result[...] = array
    if wanted.fields is not None or np.can_cast(came, wanted, "safe"):
        return
    if wanted.kind in "iu":
        lost = result != array
    elif wanted.kind in "fc":
        lost = np.isinf(result)
        if lost.any():
            lost &= np.isfinite(array)
    else:
        return
    if lost.any():
        row = int(np.argwhere(lost)[0][0])
        value = array[row][lost[row]][0]
        raise OutputMismatch(
            f"Output {output.name!r}: the value {value!r} does not fit into the dtype {wanted}; choose a wider one.",
            start + row,
        )
