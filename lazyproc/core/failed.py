"""What is kept of positions whose function failed: which, the type of the error, and its text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from lazyproc.core.errors import OutputError
from lazyproc.core.no_result import NoResult
from lazyproc.core.runs import Runs

NOT_DONE, DONE, FAILED = 0, 1, 2
"""The richer status of a position; 3 is kept free for positions that are left out on purpose."""
STATUS_MEANINGS = ("not_done", "done", "failed")

ERROR_BYTES = 64
TEXT_BYTES = 436
"""Bytes kept of the type and of the text, in UTF-8."""

_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class FailedPosition:
    """A position whose function failed.

    Attributes
    ----------
    position : int
        Which position of the main dataset.
    error : str
        The type of the error, with its module unless it is built in: ``"ValueError"``.
    text : str
        What it said, as far as there is room: 436 bytes of UTF-8.
    """

    position: int
    error: str
    text: str

    @classmethod
    def of(cls, position: int, error: BaseException) -> FailedPosition:
        """Describe an error, whatever it is; what does not fit is cut off between two characters."""
        kind = OutputError if isinstance(error, OutputError) else type(error)
        name = f"{_module_before(kind)}{kind.__qualname__}" or "Exception"
        try:
            text = str(error)
        except Exception as broken:
            text = f"(its text cannot be made: {type(broken).__name__})"
        return cls(position, _cut(name, ERROR_BYTES), _cut(text, TEXT_BYTES))

    def __str__(self) -> str:
        return f"position {self.position}: {self.error}: {self.text}"


class FailedRows:
    """Collects the rows of a block whose function failed, so that all others are kept.

    Parameters
    ----------
    read : callable
        Runs of positions to their rows.
    runs : Runs
        The positions of the block.
    limit : int or None
        So many may fail; with one more the block is given up. None: all of them.

    Attributes
    ----------
    rows : list of FailedPosition
        Their positions are rows of the block.
    first : NoResult or None
        What the first of them raised.
    """

    def __init__(self, read: Callable[[Runs], NDArray[Any]], runs: Runs, limit: int | None = None) -> None:
        self.runs = runs
        self.first: NoResult | None = None
        self._read = read
        self._limit = limit
        self.rows: list[FailedPosition] = []

    def refill(self, data: NDArray[Any], first: int, last: int) -> None:
        """Read the rows from `first` up to and without `last` of the block anew: the function may have changed them.

        In small pieces, so that a block that fails takes no more memory than one that does not.
        """
        step = max(1, _PIECE_BYTES // max(1, data[:1].nbytes))
        for start in range(first, last, step):
            stop = min(start + step, last)
            data[start:stop] = self._read(self.runs.take(stop).difference(self.runs.take(start)))

    def add(self, row: int, error: NoResult, cause: BaseException | None = None) -> None:
        """Keep a row with what the function raised, `cause`, or else `error`; raises `error` if there are too many."""
        self.rows.append(FailedPosition.of(row, cause or error))
        self.first = self.first or error
        if self._limit is not None and len(self.rows) > self._limit:
            raise error

    def positions(self) -> tuple[FailedPosition, ...]:
        """Return them in order, as positions of the main dataset."""
        if not self.rows:
            return ()
        numbers = self.runs.positions()
        rows = sorted(self.rows, key=lambda one: one.position)
        return tuple(replace(one, position=int(numbers[one.position])) for one in rows)


def first_lines(failed: Iterable[FailedPosition], most: int = 3) -> str:
    """Show the first few, for a message."""
    shown = sorted(failed, key=lambda one: one.position)
    return "; ".join(map(str, shown[:most])) + ("; …" if len(shown) > most else "")


def encode_text(text: str, n_bytes: int) -> bytes:
    """Return a text as UTF-8 of at most so many bytes, cut between two characters, without what HDF5 would stop at."""
    data = text.replace("\0", "\\0").encode("utf-8", "backslashreplace")
    return data if len(data) <= n_bytes else data[:n_bytes].decode("utf-8", "ignore").encode()


def _cut(text: str, n_bytes: int) -> str:
    return encode_text(text, n_bytes).decode()


def _module_before(kind: type) -> str:
    if kind.__module__ in ("builtins", "__main__"):
        return ""
    own = kind.__module__.startswith("lazyproc.")
    return "lazyproc." if own else f"{kind.__module__}."
