"""The blocks of a run, and what is learnt from those that are done: how long positions take, and how much memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from typing import Any, cast

from lazyproc.core.blocks import BlockPlan
from lazyproc.core.errors import MemoryLimitError, WorkerError
from lazyproc.core.feed import BlockFeed
from lazyproc.core.learn import MemoryLearner, Room
from lazyproc.core.memory import MEBIBYTE, MemoryModel
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.receipt import Receipt
from lazyproc.engine.streams import Receipts
from lazyproc.run.declared import Declared
from lazyproc.run.sizes import BlockSizes, argument_books, divide

_LARGER = 1.25
"""A cluster that has so many times more threads than were reckoned with gets other blocks."""
_NOTABLE = 0.9
"""A block that becomes less than so much of what it was is worth a warning."""

log = logging.getLogger("lazyproc")


class Adapting:
    """Hands out blocks, and divides the rest anew when they take more time or memory than was thought.

    Parameters
    ----------
    declared : Declared
        What is done.
    sizes : BlockSizes
        The division to begin with.
    scheduler : Scheduler
        Where.
    probe : Probe
        What the division was reckoned from.

    Attributes
    ----------
    feed : BlockFeed
        The blocks.
    room : Room
        What memory allows at the moment; on the machine of a cluster that has the most threads.
    """

    def __init__(self, declared: Declared, sizes: BlockSizes, scheduler: Scheduler, probe: Probe) -> None:
        self._declared = declared
        self._probe = probe
        self._scheduler = scheduler
        self._driver_writes = sizes.driver_writes
        self._division = self._first_division = sizes.division
        self._limit = sizes.limit
        self._books = max(0, sizes.memory.driver_bytes - argument_books(declared))  # which will be added again
        self.room, self._learner = self._learning(sizes, sizes.memory)
        self._n_threads = scheduler.n_workers
        self.feed = BlockFeed(sizes.plan, probe.seconds_per_position, self._divide, scheduler.n_workers)

    def _learning(self, sizes: BlockSizes, memory: MemoryModel) -> tuple[Room, MemoryLearner]:
        """Return what memory allows to begin with, and what corrects that."""
        scheduler, most = self._scheduler, sizes.most_positions
        learner = MemoryLearner(
            memory,
            sizes.limit,
            scheduler.n_on_machine,
            most,
            vectorized=self._declared.vectorized,
            driver_writes=sizes.driver_writes,
            together=scheduler.kind != "client" and not scheduler.n_processes,
        )
        return Room(most, scheduler.n_on_machine), learner

    def _divide(self, rest: Runs, seconds: float | None) -> BlockPlan:
        return self._division.plan(rest, seconds)

    def share(self, n_threads: int) -> int | None:
        """Divide the rest anew if the cluster has become much larger.

        Not if it has become smaller: workers that died may be back in a moment, and blocks for more workers than there
        are do no harm.

        Returns
        -------
        int or None
            How many blocks may be under way at once, for the sake of memory; None: as many as the cluster can do.
        """
        planned, before, self._n_threads = self._scheduler.n_workers, self._n_threads, n_threads
        if n_threads == before or n_threads < planned * _LARGER:
            return self._most()
        try:
            scheduler = self._scheduler.resized(n_threads)
            sizes = divide(
                self._declared,
                self.feed.rest(),
                scheduler,
                self._probe,
                driver_writes=self._driver_writes,
                limit=self._limit,
                books_bytes=self._books,
            )
        except (MemoryLimitError, WorkerError) as error:  # the connection may break just now; it may come back
            log.debug("%s: blocks stay as they are: %s", self._declared.process_name, error)
            return self._most()
        self._scheduler = scheduler.with_workers(sizes.n_workers)
        self.room, self._learner = self._learning(sizes, self._learner.model)
        self._first_division = sizes.division
        self._division = sizes.division.within(self._learner.rows, self._learner.careful_rows)
        self.room.rows, self.room.n_workers = self._division.largest, self._learner.n_workers
        self.feed.share(sizes.n_workers, self._division.largest)
        log.info(
            "%s: the cluster has %d threads by now, %d before: what is left is divided anew",
            self._declared.process_name, n_threads, planned,
        )  # fmt: skip
        return self._most()

    def _most(self) -> int | None:
        """Return how many blocks a cluster may have, which decides itself where they are computed."""
        if self.room.n_workers < self._scheduler.n_on_machine:
            return self.room.n_workers
        return self._scheduler.most

    def noting(self, receipts: Receipts) -> Receipts:
        """Hand receipts on, and take note of what their blocks took.

        Raises
        ------
        MemoryLimitError
            If blocks that cannot be made smaller take more than is allowed; those that are done count.
        """
        with contextlib.closing(cast(Generator[Any], receipts)):
            for receipt in receipts:
                if receipt is not None and receipt.failure is None:
                    self.feed.note(receipt.block.n_positions, receipt.seconds, receipt.rest)
                    self._learn(receipt)
                elif receipt is not None and receipt.rest is not None:
                    self.feed.give_back(receipt.rest)
                yield receipt
                if receipt is not None and receipt.failure is None:
                    self._check(receipt)

    def _learn(self, receipt: Receipt) -> None:
        learner, room = self._learner, self.room
        if not receipt.taken:
            return
        before, n_positions = learner.projected, receipt.block.n_positions
        reckoned = learner.model.worker_peak(n_positions)
        in_driver = self._is_in_driver(receipt)
        if not learner.note(n_positions, receipt.taken, receipt.taken_by_all, in_driver=in_driver):
            if learner.projected > before + MEBIBYTE:
                log.info(
                    "%s: %.0f MiB of memory projected by now (%.0f before), %.0f allowed",
                    self._declared.process_name, learner.projected / MEBIBYTE, before / MEBIBYTE,
                    self._limit / MEBIBYTE, extra={"projected_bytes": learner.projected},
                )  # fmt: skip
            return
        self._division = self._first_division.within(learner.rows, learner.careful_rows)
        size = self._division.largest
        taken, ahead = learner.by_block(receipt.taken, in_driver=in_driver), learner.ahead
        level = logging.WARNING if size < _NOTABLE * room.rows or learner.n_workers < room.n_workers else logging.INFO
        log.log(
            level,
            "%s: the block of positions %d to %d took %.0f MiB of memory, where %.0f were reckoned; blocks have now up "
            "to %d positions instead of %d, %d at a time; %.0f MiB projected from now on, up to %.0f until now (%.0f "
            "before), %.0f allowed",
            self._declared.process_name, receipt.block.start, receipt.block.stop - 1, taken / MEBIBYTE,
            reckoned / MEBIBYTE, size, room.rows, learner.n_workers, ahead / MEBIBYTE, learner.projected / MEBIBYTE,
            before / MEBIBYTE, self._limit / MEBIBYTE,
            extra={"projected_bytes": learner.projected, "ahead_bytes": ahead},
        )  # fmt: skip
        room.rows, room.n_workers = size, learner.n_workers
        self.feed.resize(size)

    def _is_in_driver(self, receipt: Receipt) -> bool:
        """Tell whether a block was done in the driver's process, while others are done elsewhere."""
        return self._scheduler.kind == "both" and receipt.is_from_here

    def _check(self, receipt: Receipt) -> None:
        block, in_driver = receipt.block, self._is_in_driver(receipt)
        taken = self._learner.by_block(receipt.taken, in_driver=in_driver)
        needed = self._learner.too_much(block.n_positions, receipt.taken, in_driver=in_driver)
        if needed is not None:
            raise MemoryLimitError(
                f"max_mem_mb: {self._limit // MEBIBYTE} MiB are allowed, but {self._declared.process_name} was found "
                f"to take {taken / MEBIBYTE:.0f} MiB at positions {block.start} to {block.stop - 1} of "
                f"{self._declared.label}, with one block at a time that cannot be made smaller; expected no more than "
                "the probe of a few positions had shown. What is finished is kept. Raise max_mem_mb to "
                f"{needed} or more; the same call then goes on."
            )
