"""What a run learns of the memory that its blocks take, and how many positions and workers that leaves.

A probe sees a few positions. If blocks turn out to take more than was reckoned from it, the memory model is corrected
by what was measured, the blocks become smaller, and where that is not enough fewer are computed at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lazyproc.core.errors import MemoryLimitError
from lazyproc.core.memory import FRAGMENTATION, MEBIBYTE, MemoryModel

_DRIVER_UNSEEN, _WORKER_UNSEEN = 10 * MEBIBYTE, 3 * MEBIBYTE
"""What they took before it was looked at, and pages of files that are their own: measured 1-6 and 2-3 MiB."""
_SLACK_BYTES = MEBIBYTE
"""So much more than was reckoned is nothing to learn from: the system counts pages in lots."""
_MARGIN = 1.1
"""What is learnt is taken for so many times more, so that the next block does not teach the same again."""
_APART = 1.5
"""Two blocks whose sizes differ so much tell what goes with their positions and what does not."""
_CALM_BLOCKS = 16
"""So many blocks in a row must take less than half of what is reckoned before half of what was learnt is forgotten."""
_EASE = 2
"""Blocks whose worker has so many times more memory than they take need not become smaller: what a worker's allocator
keeps of earlier, larger blocks does not go with them."""
_SURE = 2
"""So many blocks in a row must show that one position does not fit: something else may go on in the process."""


@dataclass
class Room:
    """What memory allows at the moment: told by the driver, asked by engines before they begin a block.

    Attributes
    ----------
    rows : int
        Positions a block may have.
    n_workers : int
        Blocks that may be computed at the same time.
    """

    rows: int
    n_workers: int


class MemoryLearner:
    """Corrects a memory model by what blocks are found to take.

    Parameters
    ----------
    model : MemoryModel
        What was reckoned from the probe.
    limit_bytes : int
        For all workers and the driver together.
    n_workers : int
        Blocks computed at the same time.
    rows : int
        Positions that blocks have at most, to begin with.
    vectorized : bool
        Whether the function takes whole blocks: what it needs is then taken to go with the positions, else not.
    driver_writes : bool
        Results travel to the driver.
    together : bool
        Whether blocks are computed in the driver's process, so that what it takes itself is measured, too.

    Attributes
    ----------
    model : MemoryModel
        As it is now.
    n_workers : int
        As many as the memory allows now.
    rows, careful_rows : int
        Positions a block may have at most, and should have; at least one.
    projected : int
        The highest peak of all together that was reckoned with so far.
    """

    def __init__(
        self,
        model: MemoryModel,
        limit_bytes: int,
        n_workers: int,
        rows: int,
        *,
        vectorized: bool,
        driver_writes: bool = False,
        together: bool = False,
    ) -> None:
        self.model = self._first = model
        self.n_workers = self._most_workers = n_workers
        self._limit = limit_bytes
        self._vectorized = vectorized
        self._driver_writes = driver_writes
        self._together = together
        self._beside = model.driver_peak // n_workers if together else 0
        self._books = model.driver_bytes // n_workers if together else 0
        self._largest: tuple[int, int] | None = None
        self._n_over = self._n_calm = 0
        self.projected = model.peak(rows, n_workers, driver_writes=driver_writes)
        self._fit()

    def _fit(self) -> None:
        try:
            self.n_workers, self.rows = self.model.fit(
                self._limit, self._most_workers, driver_writes=self._driver_writes
            )
        except MemoryLimitError:  # reckoned with margins: it is tried, and given up when that was measured
            self.n_workers, self.rows = 1, 1
        if not self._together:
            self._most_workers = self.n_workers  # processes that have ended are not started again
        self.careful_rows = self.model.careful_rows(self._limit, self.n_workers, driver_writes=self._driver_writes)

    @property
    def ahead(self) -> int:
        """Bytes to expect at most from now on; `projected` may be more, if more were computed at once until now."""
        return self.model.peak(self.careful_rows, self.n_workers, driver_writes=self._driver_writes)

    def by_block(self, taken: int, *, in_driver: bool = False) -> int:
        """Return what a block took without what the driver kept before it: that is not the function's doing."""
        return max(0, taken - (self.model.driver_bytes if in_driver else self._books))

    def note(self, n_positions: int, taken: int, taken_by_all: int = 0, *, in_driver: bool = False) -> bool:
        """Take note of what a block was found to take, and all in its process; tells whether something was learnt.

        0 is for what is not known. `in_driver`: it was done in the driver's process, and others elsewhere.
        """
        if not taken:
            return False
        if self._together:
            total = taken_by_all + _DRIVER_UNSEEN
        elif in_driver:  # what it took is no measure of the others
            others = (self.n_workers - 1) * (self.model.worker_peak(n_positions) + _WORKER_UNSEEN)
            total = taken + _DRIVER_UNSEEN + others
        else:  # the others may take as much, at the same time
            total = self.model.driver_peak + self.n_workers * (taken + _WORKER_UNSEEN)
        self.projected = max(self.projected, total)
        taken -= self.model.driver_peak if in_driver else self._beside
        reckoned = self.model.worker_peak(n_positions, driver_writes=self._driver_writes)
        if taken <= reckoned + _SLACK_BYTES:
            return self._is_calm(taken, reckoned)
        self._n_calm = 0
        self.model = self._corrected(n_positions, taken, int(_MARGIN * (taken - reckoned)))
        if self._largest is None or n_positions >= self._largest[0]:
            self._largest = n_positions, taken
        before = self.careful_rows
        self._fit()
        if taken <= (self._limit - self.model.driver_peak) / self.n_workers / _EASE:  # so this size is all right
            self.careful_rows = max(self.careful_rows, min(n_positions, before, self.rows))
        return True

    def _is_calm(self, taken: int, reckoned: int) -> bool:
        """Forget half of what was learnt if blocks have taken much less for long; tells whether that was done."""
        self._n_calm = self._n_calm + 1 if taken < reckoned / 2 else 0
        if self._n_calm < _CALM_BLOCKS or self.model == self._first:
            return False
        self._n_calm = 0
        self.model = replace(
            self.model,
            temporary_bytes=(self.model.temporary_bytes + self._first.temporary_bytes) / 2,
            fixed_bytes=(self.model.fixed_bytes + self._first.fixed_bytes) // 2,
        )
        self._fit()
        return True

    def _corrected(self, n_positions: int, taken: int, missing: int) -> MemoryModel:
        """Return the model with what was missing, as part of each position or of a call."""
        if self._vectorized and self._largest is not None and _APART * n_positions <= self._largest[0]:
            n_before, before = self._largest
            slope = max(0.0, (before - taken) / (n_before - n_positions))
            if slope * n_positions < taken / 2:  # most of it does not become less with the positions
                return replace(self.model, fixed_bytes=self.model.fixed_bytes + missing)
        if not self._vectorized:
            return replace(self.model, fixed_bytes=self.model.fixed_bytes + missing)
        each = (self.model.bytes_per_position * n_positions + missing) / n_positions
        temporary = (each - self.model.source_bytes - self.model.result_bytes) / FRAGMENTATION
        return replace(self.model, temporary_bytes=temporary)

    def too_much(self, n_positions: int, taken: int, *, in_driver: bool = False) -> int | None:
        """Tell what `max_mem_mb` would have to be, if blocks that cannot be made smaller have taken more than it is.

        None as long as that is not sure, or the memory is enough.
        """
        least = taken - (self.model.driver_peak if in_driver else self._beside)
        if not self._vectorized:  # a smaller block would have less of source and results
            least -= (n_positions - 1) * (self.model.source_bytes + self.model.result_bytes)
        elif n_positions > 1:
            return None
        total = self.model.driver_peak + least
        self._n_over = self._n_over + 1 if taken and self.n_workers == 1 and total > self._limit else 0
        return -(-int(_MARGIN * total) // MEBIBYTE) if self._n_over >= _SURE else None
