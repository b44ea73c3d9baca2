"""What a run writes beside its results before the mask tells of them: the richer status, and the table of failures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.failed import DONE, FAILED, FailedPosition
from lazyproc.core.runs import Runs
from lazyproc.hdf5.extents import Extent
from lazyproc.hdf5.failures import EMPTY_ROW, Rows, counting_rows, filled_pieces, row_of


class ExtentRows:
    """Rows as bytes of a file; for use while HDF5 is out of it.

    Parameters
    ----------
    extent : Extent
        Where they lie.
    """

    def __init__(self, extent: Extent) -> None:
        self._extent = extent

    def read(self, runs: Runs) -> NDArray[Any]:
        """Read runs of rows into one array."""
        return self._extent.read(runs)

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Write rows from row `start` on; whoever commits syncs them."""
        with self._opened() as descriptor:
            self._extent.write(descriptor, start, rows)

    def fill(self, runs: Runs, value: int) -> None:
        """Write the same value to all rows of some runs; the file is opened once for all of them."""
        with self._opened() as descriptor:
            for start, rows in filled_pieces(runs, value):
                self._extent.write(descriptor, start, rows)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = self._extent.open(os.O_RDWR)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class FailureLog:
    """Keeps the richer status and the table of failures of a results group while a run writes into it.

    Parameters
    ----------
    mask, status : Rows
        The status mask and the richer status.
    table : Rows or None
        The table; None if failures are not recorded.
    capacity : int
        Rows of the table.
    limit : int
        So many failed positions in all are allowed.

    Notes
    -----
    Only one driver may use it. It makes nothing durable: the commit that follows each `write` syncs the file before it
    sets the mask. Killed in between, the positions concerned are not marked in the mask, and nothing here counts.
    """

    def __init__(self, mask: Rows, status: Rows, table: Rows | None, capacity: int, limit: int) -> None:
        self._status = status
        self._table = table
        self._limit = min(limit, capacity)
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        if table is not None:
            self._take_over(mask, status, table, capacity)

    def _take_over(self, mask: Rows, status: Rows, table: Rows, capacity: int) -> None:
        """Learn what is recorded already, and clear what does not count."""
        rows = table.read(Runs.full(capacity))
        counting = counting_rows(rows, mask, status)
        for slot in np.flatnonzero(rows != EMPTY_ROW):
            position = int(rows["position"][slot])
            if counting[slot] and position not in self._slots:
                self._slots[position] = int(slot)
            else:
                table.write(int(slot), EMPTY_ROW)
        used = set(self._slots.values())
        self._free = [slot for slot in reversed(range(capacity)) if slot not in used]

    @property
    def n_failed(self) -> int:
        """Failed positions that are recorded."""
        return len(self._slots)

    @property
    def room(self) -> int:
        """How many more may fail."""
        return max(0, self._limit - len(self._slots))

    def write(self, done: Runs, failed: Sequence[FailedPosition]) -> None:
        """Write the status of positions that are about to be committed, and a row for each that failed.

        Parameters
        ----------
        done : Runs
            All of them.
        failed : sequence of FailedPosition
            Those among them that failed; no more than there is room for.
        """
        self._status.fill(done, DONE)
        for one in failed:
            slot = self._slots.get(one.position)  # there already if an error cut this off before
            if slot is None:
                slot = self._slots[one.position] = self._free.pop()
            self._write_row(slot, row_of(one))
            self._status.write(one.position, np.full(1, FAILED, np.uint8))

    def release(self, positions: Runs) -> None:
        """Forget what was recorded of positions that the mask does not mark any more."""
        for position in positions.positions().tolist():
            slot = self._slots.pop(position, None)
            if slot is not None:
                self._write_row(slot, EMPTY_ROW)
                self._free.append(slot)

    def _write_row(self, slot: int, row: NDArray[Any]) -> None:
        assert self._table is not None  # there are no slots without it
        self._table.write(slot, row)
