"""The loop of a run: engines yield receipts, the target commits them, events report."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lazyproc.core.errors import WorkerError
from lazyproc.core.events import BlockDone, Committed, Listener
from lazyproc.core.failed import FailedPosition
from lazyproc.core.runs import Runs
from lazyproc.drain import Drain, Leave
from lazyproc.engine.failure import Failure
from lazyproc.engine.receipt import Receipt
from lazyproc.engine.streams import Receipts
from lazyproc.hdf5.failure_log import FailureLog
from lazyproc.hdf5.target import Target

_SPANS = 1000
"""So many spans of positions are kept before neighbours are put together."""
_MANY_SPANS = 2**14
"""If so many are kept all the same, since there are holes between them, they are committed at once: some MiB."""


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes
    ----------
    n_blocks : int
        Blocks committed by this run.
    workers : tuple of str
        Who did them.
    failures : tuple of Failure
        Why blocks have no results, in the order in which they were reported.
    refused : tuple of FailedPosition
        Failed positions for which there was no more room, and which stopped the run.
    example : Failure or None
        What the first failed position of this run raised, where failures are recorded.
    """

    n_blocks: int
    workers: tuple[str, ...]
    failures: tuple[Failure, ...]
    refused: tuple[FailedPosition, ...] = ()
    example: Failure | None = None


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
    log : FailureLog, optional
        Keeps failed positions, where that is wanted or was once.

    Attributes
    ----------
    refused : list of FailedPosition
        Those for which there was no more room; their blocks do not count.
    example : Failure or None
        What the first failed position raised.
    """

    def __init__(
        self, target: Target, interval: float, n_done: int, listener: Listener, log: FailureLog | None = None
    ) -> None:
        self._target = target
        self._log = log
        self._failed: list[FailedPosition] = []
        self.refused: list[FailedPosition] = []
        self.example: Failure | None = None
        self._interval = interval
        self._listener = listener
        self._spans: list[tuple[int, int]] = []
        self._most_spans = _SPANS
        self._oldest: float | None = None
        self._last_turn = time.monotonic()
        self._n_before = n_done
        self.n_done = 0
        self.n_blocks = 0
        self.workers: dict[str, None] = {}

    @property
    def n_all(self) -> int:
        """Positions committed in all, before this run and by it."""
        return self._n_before + self.n_done

    def take_failed(self, failed: Sequence[FailedPosition], example: Failure | None = None) -> bool:
        """Remember to record failed positions; False if there is no room for all of them, and then none is taken."""
        if not self.has_room(failed):
            self.refuse(failed, example)
            return False
        self._failed += failed
        self._keep(example)
        return True

    def has_room(self, failed: Sequence[FailedPosition]) -> bool:
        """Tell whether so many more failed positions can be recorded."""
        return not failed or (self._log is not None and len(self._failed) + len(failed) <= self._log.room)

    def refuse(self, failed: Sequence[FailedPosition], example: Failure | None = None) -> None:
        """Keep, for the message, failed positions whose block does not count."""
        self.refused += failed
        self._keep(example)

    def _keep(self, example: Failure | None) -> None:
        if self.example is None and example is not None:
            self.example = example
            _let_go(example.error)

    def take(self, receipt: Receipt) -> bool:
        """Accept a finished block: write its results if the worker has not, and remember to mark it.

        Returns
        -------
        bool
            False if there is no room to record its failed positions: it does not count then.
        """
        if receipt.failed and not self.take_failed(receipt.failed, receipt.example):
            return False
        if receipt.arrays is not None:
            self._target.write(receipt.block, receipt.arrays)
            receipt.arrays = None
        elif receipt.worker not in self.workers:
            self._check_seen(receipt)
        self.workers[receipt.worker] = None
        self.n_blocks += 1
        self.take_positions(receipt.block.runs())
        return True

    def take_positions(self, runs: Iterable[tuple[int, int]]) -> None:
        """Remember to mark positions whose results are written."""
        spans = list(runs)
        self._spans += spans
        if len(self._spans) > self._most_spans:  # neighbours become one span: a long interval costs no memory
            self._spans = list(Runs.from_spans(self._spans))
            self._most_spans = _SPANS + 2 * len(self._spans)
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
        """Commit if a block has waited for the interval, or would until the next turn, which may take as long again.

        Or if what waits would take much memory.
        """
        now = time.monotonic()
        turn, self._last_turn = now - self._last_turn, now
        is_due = self._oldest is not None and now + turn - self._oldest >= self._interval
        if is_due or len(self._spans) >= _MANY_SPANS:
            self.commit()

    def commit(self) -> None:
        """Commit all that is finished."""
        if not self._spans:
            return
        done = Runs.from_spans(self._spans)
        if self._log is not None:
            self._log.write(done, self._failed)
        self._target.commit(done)
        self._spans, self._failed, self._oldest = [], [], None
        self._most_spans = _SPANS
        self.n_done += done.n_positions
        self._listener(Committed(self.n_all))

    def outcome(self, failures: Sequence[Failure] = ()) -> Outcome:
        """Return how the loop ended."""
        return Outcome(self.n_blocks, tuple(self.workers), tuple(failures), tuple(self.refused), self.example)


def run_loop(receipts: Receipts, committer: Committer, drain: Drain) -> Outcome:
    """Take receipts until there are no more, committing as they come.

    Notes
    -----
    What is finished is committed however the loop ends. After a block has failed nothing new is started; the blocks
    under way are still taken. A block whose workers died is given up alone: all others are still done. Where failures
    are recorded, a block counts as failed if there is no more room for its failed positions.
    """
    failures: list[Failure] = []
    try:
        for receipt in receipts:
            if receipt is not None and receipt.failure is not None:
                if receipt.failed and receipt.failure.kind in ("function", "output"):
                    committer.refuse(receipt.failed, receipt.example)  # more of one block than are allowed of all
                else:
                    failures.append(receipt.failure)
                if receipt.failure.kind != "lost":
                    drain.request()
            elif receipt is not None and not committer.take(receipt):
                drain.request()
            committer.commit_if_due()
            drain.turn()
    except Leave:
        pass  # the block under way is dropped
    finally:
        close: Any = getattr(receipts, "close", None)
        if close is not None:
            close()
        committer.commit()
    drain.turn()
    return committer.outcome(failures)


def _let_go(error: BaseException | None) -> None:
    """Clear the frames of an error that is kept for long: they hold the data of its block."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
