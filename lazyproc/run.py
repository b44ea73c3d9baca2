"""The loop of a run: engines yield receipts, the target commits them, events report."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lazyproc.core.errors import WorkerError
from lazyproc.core.events import BlockDone, Committed, Listener
from lazyproc.core.runs import Runs
from lazyproc.drain import Drain
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import Receipt
from lazyproc.engine.local import Receipts
from lazyproc.hdf5.target import Target


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes
    ----------
    n_done : int
        Positions committed by this run.
    n_blocks : int
        Blocks committed by this run.
    workers : tuple of str
        Who did them.
    failures : tuple of Failure
        Why blocks have no results, in the order in which they were reported.
    """

    n_done: int
    n_blocks: int
    workers: tuple[str, ...]
    failures: tuple[Failure, ...]


class Committer:
    """Collects finished blocks and commits them at least every `interval` seconds.

    Parameters
    ----------
    target : Target
        Where the results are.
    interval : float
        Seconds: the longest that a finished block waits for its mask commit.
    n_done : int
        Positions done before.
    listener : callable
        Is told of blocks and commits.
    """

    def __init__(self, target: Target, interval: float, n_done: int, listener: Listener) -> None:
        self._target = target
        self._interval = interval
        self._listener = listener
        self._spans: list[tuple[int, int]] = []
        self._oldest: float | None = None
        self._last_turn = time.monotonic()
        self._n_before = n_done
        self.n_done = 0
        self.n_blocks = 0
        self.workers: dict[str, None] = {}

    def take(self, receipt: Receipt) -> None:
        """Accept a finished block: write its results if the worker has not, and remember to mark it."""
        if receipt.arrays is not None:
            self._target.write(receipt.block, receipt.arrays)
            receipt.arrays = None
        elif receipt.worker not in self.workers:
            self._check_seen(receipt)
        self.workers[receipt.worker] = None
        self.n_blocks += 1
        self.take_positions(receipt.block.runs())

    def take_positions(self, runs: Iterable[tuple[int, int]]) -> None:
        """Remember to mark positions whose results are written."""
        spans = list(runs)
        self._spans.extend(spans)
        self._oldest = self._oldest or time.monotonic()
        self._listener(BlockDone(sum(stop - start for start, stop in spans)))

    def _check_seen(self, receipt: Receipt) -> None:
        """Make sure, once a worker, that what it wrote is what this host reads."""
        sink = self._target.sink
        if sink is not None and sink.checksum(receipt.block) != receipt.checksum:
            raise WorkerError(
                f"The bytes that worker {receipt.worker} wrote for position {receipt.block.start} are not those read "
                "back here: the file system does not show one host's writes to another. Run on one host."
            )

    def commit_if_due(self) -> None:
        """Commit if a block has waited for the interval, or would until the next turn, which may take as long again."""
        now = time.monotonic()
        turn, self._last_turn = now - self._last_turn, now
        if self._oldest is not None and now + turn - self._oldest >= self._interval:
            self.commit()

    def commit(self) -> None:
        """Commit all that is finished."""
        if not self._spans:
            return
        done = Runs.from_spans(self._spans)
        self._target.commit(done)
        self._spans, self._oldest = [], None
        self.n_done += done.n_positions
        self._listener(Committed(self._n_before + self.n_done))


def run_loop(receipts: Receipts, committer: Committer, drain: Drain) -> Outcome:
    """Take receipts until there are no more, committing as they come.

    Notes
    -----
    What is finished is committed however the loop ends. After a block has failed nothing new is started; the blocks
    under way are still taken. A block whose workers died is given up alone: all others are still done.
    """
    failures: list[Failure] = []
    try:
        for receipt in receipts:
            if receipt is not None and receipt.failure is not None:
                failures.append(receipt.failure)
                if receipt.failure.kind != "lost":
                    drain.request()
            elif receipt is not None:
                committer.take(receipt)
            committer.commit_if_due()
    finally:
        close: Any = getattr(receipts, "close", None)
        if close is not None:
            close()
        committer.commit()
    return Outcome(committer.n_done, committer.n_blocks, tuple(committer.workers), tuple(failures))
