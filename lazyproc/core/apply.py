"""Apply a function to the rows of a block and check what it returns, before anything is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.casting import store
from lazyproc.core.columns import columns_of_block, columns_of_rows
from lazyproc.core.failed import FailedRows
from lazyproc.core.no_result import OutputMismatch, RowError
from lazyproc.core.returned import IMMUTABLE, Returned
from lazyproc.core.specs import ResolvedOutput

_BATCH_ROWS = 256
_BATCH_BYTES = 2**20
"""So many results, and bytes of them, are held as Python objects before they are stacked: a block takes the memory of
its source and its results, and not that of its results three times."""
_TURNS = 16
"""How often the clock is looked at in a block with a deadline."""

_NUMBERS = "biufc"

Arrays = tuple[NDArray[Any], ...]


def compute_rows(
    function: Callable[..., Any],
    data: NDArray[Any],
    outputs: Sequence[ResolvedOutput],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    vectorized: bool,
    failed: FailedRows | None = None,
    deadline: float | None = None,
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
    failed : FailedRows, optional
        Collects the rows for which the function fails, or what it returns does not fit: they get the fill value, all
        others their results. Default: the first one raises.
    deadline : float, optional
        Of `time.perf_counter`: after it no more than a sixteenth of the block is begun. Not for a function of whole
        blocks.

    Returns
    -------
    tuple of ndarray
        One array an output, `(n_positions, width)`, of the declared dtype, C-ordered; after the deadline of the first
        positions only.

    Raises
    ------
    RowError
        From the exception that the function raised.
    OutputMismatch
        If the number, the names, the shape or the dtype do not fit.

    Notes
    -----
    With `failed`, a block for which a function of whole blocks fails is computed again in two halves, and so on until
    the bad rows are alone: 2 log2(n) + 1 calls for one bad row among n, at most about 2 k log2(n / k) + 2 k for k of
    them. A function of one position is called once for each row, whatever happens.

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
        _apply_to_block(function, data, outputs, results, args, keywords, failed)
        return results
    batch = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, sum(output.row_bytes for output in outputs))))
    if deadline is not None:
        batch = max(1, min(batch, len(data) // _TURNS))
    for start in range(0, len(data), batch):
        if deadline is not None and start and time.perf_counter() > deadline:
            return tuple(result[:start] for result in results)
        _apply_to_rows(function, data[start : start + batch], start, outputs, results, args, keywords, failed)
    return results


def _apply_to_block(
    function: Callable[..., Any],
    data: NDArray[Any],
    outputs: Sequence[ResolvedOutput],
    results: Arrays,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    failed: FailedRows | None,
) -> None:
    """Call the function for the block; where it fails, for halves of it, until the bad rows are alone."""
    parts = [(0, len(data))]
    while parts:
        start, stop = parts.pop()
        try:
            _call_block(
                function, data[start:stop], start, outputs, [result[start:stop] for result in results], args, kwargs
            )
        except (RowError, OutputMismatch) as error:
            if failed is None:
                raise
            if stop - start == 1:
                _give_up(start, error, outputs, results, failed)
            else:
                middle = (start + stop) // 2
                parts += [(middle, stop), (start, middle)]
        if parts and failed is not None:
            failed.refill(data, *parts[-1])


def _call_block(
    function: Callable[..., Any],
    data: NDArray[Any],
    start: int,
    outputs: Sequence[ResolvedOutput],
    results: Sequence[NDArray[Any]],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> None:
    """Call the function for rows that begin at row `start`, and put what it returns into its place."""
    try:
        returned = function(data, *args, **kwargs)
    except Exception as error:
        raise RowError(start, start + len(data)) from error
    columns = columns_of_block(returned, outputs)
    for output, column, result in zip(outputs, columns, results, strict=True):
        store(column, output, result, start, vectorized=True)


def _apply_to_rows(
    function: Callable[..., Any],
    rows: NDArray[Any],
    start: int,
    outputs: Sequence[ResolvedOutput],
    results: Arrays,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    failed: FailedRows | None,
) -> None:
    """Call the function for each row, the first of which is row `start`, and put what it returns into its place."""
    place = 0
    arrays = len(outputs) == 1 and outputs[0].width > 1 and outputs[0].dtype.kind in _NUMBERS
    while place < len(rows):
        returned = Returned()
        failure: RowError | None = None
        try:
            if arrays:
                place = _store_arrays(function, rows, place, start, args, kwargs, results[0], returned)
                arrays = not returned
            _call_rows(function, rows[place + len(returned) :], start + place, args, kwargs, returned)
        except RowError as error:
            if failed is None:
                raise
            failure = error
            place = error.first - start - len(returned)
        if returned:
            _store_rows(returned, start + place, outputs, results, failed)
        place += len(returned)
        if failure is not None and failed is not None:
            _give_up(start + place, failure, outputs, results, failed)
            place += 1


def _store_arrays(
    function: Callable[..., Any],
    rows: NDArray[Any],
    place: int,
    start: int,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    result: NDArray[Any],
    returned: Returned,
) -> int:
    """Call the function for rows from `place` on and store what it returns, while that is an array just as declared.

    The usual case of functions with one output, and a hot loop: such an array needs no other check, nor a copy. Returns
    the first row that is not stored; what the function returned for it, if it was called, is in `returned`.
    """
    result = result[start : start + len(rows)]
    array, dtype, width = np.ndarray, result.dtype, result.shape[1]
    call = partial(function, **kwargs) if kwargs else function
    try:
        for value in map(call, rows[place:], *map(repeat, args)):
            try:
                if type(value) is array and (value.dtype is dtype or value.dtype == dtype) and len(value) == width:
                    result[place] = value  # refused, with ValueError, if there are more dimensions
                    place += 1
                    continue
            except (TypeError, ValueError):
                pass
            returned.hold(value)
            break
    except Exception as error:
        raise RowError(start + place, start + place + 1) from error
    return place


def _call_rows(
    function: Callable[..., Any],
    rows: NDArray[Any],
    start: int,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    returned: Returned,
) -> None:
    """Call the function for each row until it fails; the hot loop, so what is usual comes first, without a call."""
    keep, hold, immutable, only = returned.append, returned.hold, IMMUTABLE, IMMUTABLE.issuperset
    try:
        for row in rows:
            value = function(row, *args, **kwargs)
            kind = type(value)
            if kind in immutable or (kind is tuple and only(map(type, value))):
                keep(value)
            elif kind is np.ndarray or (kind is dict and only(map(type, value.values()))):
                keep(value.copy())  # the function may use it again in the next call
            else:
                hold(value)
    except Exception as error:
        failed = start + len(returned)
        raise RowError(failed, failed + 1) from error


def _store_rows(
    returned: Returned, start: int, outputs: Sequence[ResolvedOutput], results: Arrays, failed: FailedRows | None
) -> None:
    """Check what the function returned for the rows from `start` on and put it into its place; else row by row.

    Rows that fit each may not fit together, in the type that NumPy finds for all of them: only one alone is judged.
    """
    stop = start + len(returned)
    try:
        columns = columns_of_rows(returned, outputs, start)
        for output, column, result in zip(outputs, columns, results, strict=True):
            store(column, output, result[start:stop], start, vectorized=False, plain=returned.plain)
    except OutputMismatch as error:
        if len(returned) > 1:
            _store_each_row(returned, start, error, outputs, results, failed)
        elif failed is None:
            raise
        else:
            _give_up(start, error, outputs, results, failed)


def _store_each_row(
    returned: Returned,
    start: int,
    error: OutputMismatch,
    outputs: Sequence[ResolvedOutput],
    results: Arrays,
    failed: FailedRows | None,
) -> None:
    """Judge the rows from `start` on one by one; `error` is what is wrong with them together."""
    for row, value in enumerate(returned, start):
        alone = Returned([value])
        alone.plain = returned.plain
        try:
            _store_rows(alone, row, outputs, results, failed)
        except OutputMismatch as other:
            if failed is not None or other.row != error.row:
                raise
            raise error from error.__cause__  # it was told of this row already


def _give_up(
    row: int,
    error: RowError | OutputMismatch,
    outputs: Sequence[ResolvedOutput],
    results: Arrays,
    failed: FailedRows,
) -> None:
    """Give a row the fill value, and keep what went wrong."""
    for output, result in zip(outputs, results, strict=True):
        result[row] = output.fill_value
    if isinstance(error, OutputMismatch):
        error.row = row
    failed.add(row, error, error.__cause__ if isinstance(error, RowError) else None)
