"""Why a call of the user's function has no result: it raised, or what it returned does not fit."""

from __future__ import annotations

from lazyproc.core.errors import OutputError
from lazyproc.core.runs import Runs


class NoResult(Exception):
    """A call of the function has no result.

    Attributes
    ----------
    runs : Runs or None
        The positions of the call, where it was made to measure the function; None in a block, which knows its own.
    """

    runs: Runs | None = None


class RowError(NoResult):
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


class OutputMismatch(OutputError, NoResult):
    """What the function returned does not fit; carries the row within the block."""

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row

    def __reduce__(self) -> tuple[type[OutputMismatch], tuple[str, int]]:
        return type(self), (str(self), self.row)
