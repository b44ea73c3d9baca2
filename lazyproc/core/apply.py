"""Apply a function to the rows of a block and check what it returns, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.casting import OutputMismatch as OutputMismatch
from lazyproc.core.casting import describe, store
from lazyproc.core.specs import ResolvedOutput

_BATCH_ROWS = 256
_BATCH_BYTES = 2**20
"""So many results, and bytes of them, are held as Python objects before they are stacked: a block takes the memory of
its source and its results, and not that of its results three times."""
_IMMUTABLE = frozenset(
    {float, int, complex, bool, str, bytes, type(None), np.bytes_, np.str_}
    | {np.dtype(code).type for code in "?bhilqBHILQefdgFDG"}
)
"""Results that no later call can change."""

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
            store(column, output, result, 0, vectorized=True)
        return results
    batch = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, sum(output.row_bytes for output in outputs))))
    for start in range(0, len(data), batch):
        returned_rows = _call_rows(function, data[start : start + batch], start, args, keywords)
        columns = _columns_of_rows(returned_rows, outputs, start)
        for output, column, result in zip(outputs, columns, results, strict=True):
            store(column, output, result[start : start + len(returned_rows)], start, vectorized=False)
    return results


def _call_rows(
    function: Callable[..., Any], rows: NDArray[Any], start: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Any]:
    """Call the function for each row; the hot loop, so nothing else is in it."""
    returned: list[Any] = []
    keep = returned.append
    try:
        for row in rows:
            value = function(row, *args, **kwargs)
            keep(value if type(value) in _IMMUTABLE else _held(value))
    except Exception as error:
        failed = start + len(returned)
        raise RowError(failed, failed + 1) from error
    return returned


def _held(value: Any) -> Any:
    """Return a result as it is now: the function may use its array, list or dict again in the next call."""
    if isinstance(value, np.ndarray | np.void):
        return value.copy()
    if type(value) in (tuple, list):
        return type(value)([item if type(item) in _IMMUTABLE else _held(item) for item in value])
    if isinstance(value, Mapping):
        return {name: item if type(item) in _IMMUTABLE else _held(item) for name, item in value.items()}
    return value


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
        f"The function returned {describe(returned)}; expected a mapping with the names {names} or a tuple of "
        f"{len(names)} values in that order."
    )
