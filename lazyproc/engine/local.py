"""Blocks on this machine: in the process, in its threads, or in worker processes under Dask's local scheduler.

How much is under way, or finished and not yet taken, is bounded by a window of two blocks a worker.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.learn import Room
from lazyproc.engine.block_function import run_block
from lazyproc.engine.crew import Crew
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.lane import Lanes
from lazyproc.engine.packing import pack_once
from lazyproc.engine.streams import TICK, Interruptible, Receipts, Wish, a_tick, never
from lazyproc.engine.threads import BlockThreads
from lazyproc.engine.window import Batch, Graph, Window

_GRAPH_AFTER = 60.0
"""Seconds: what is begun by then does without Dask, whose loading takes a quarter of a second of a core, or more."""
_ATTEMPTS = 2
"""How often a block is tried, while others are, if its worker process dies; then once more, with nothing beside it."""

_DEATHS_ALONE = 100
"""So many processes may die in a run to find out which positions of its lost blocks are the ones that end them."""

log = logging.getLogger("lazyproc")


def run_serial(
    kernel: Kernel, blocks: Iterable[Block], stopping: Wish, interruptible: Interruptible = nullcontext
) -> Receipts:
    """Do the blocks one after the other in this thread, which `interruptible` lets out of one; nothing is pickled."""
    for block in blocks:
        if stopping():
            return
        with interruptible():
            receipt = run_block(kernel, block)
        yield receipt


def run_threads(
    kernel: Kernel,
    blocks: Iterable[Block],
    n_workers: int,
    stopping: Wish,
    dropping: Wish = never,
    room: Room | None = None,
) -> Receipts:
    """Do the blocks in threads of this process; for functions that let other threads run (NumPy on whole blocks)."""
    from threadpoolctl import threadpool_limits

    waiting = iter(blocks)
    with threadpool_limits(1):  # BLAS knows one limit for the whole process, which the driver sets and restores
        threads = BlockThreads(kernel, n_workers, room)
        try:
            while not dropping():
                if stopping():
                    threads.take_back()
                else:
                    for block in itertools.islice(waiting, 2 * n_workers - threads.n_pending):
                        threads.submit(block)
                if not threads.n_pending:
                    return
                yield threads.next(TICK)
        finally:
            threads.close()


def run_processes(
    kernel: Kernel,
    blocks: Iterable[Block],
    n_workers: int,
    stopping: Wish,
    name: str = "lazyproc",
    dropping: Wish = never,
    room: Room | None = None,
    crew: Crew | None = None,
    patience: Callable[[], float] = a_tick,
    graph_after: float = _GRAPH_AFTER,
    keep: bool = False,
) -> Receipts:
    """Do the blocks in worker processes: Dask graphs on Dask's local scheduler, whose threads have a process each.

    What is begun in the first minute (`graph_after`) goes to these threads directly: a short job need not load Dask.

    Raises
    ------
    WorkerError
        If worker processes die whatever they do, or do not start.

    Notes
    -----
    A worker process that dies takes its own block with it and nothing else. The block is tried again at once, and if
    that process dies, too, once more when all other blocks are done, with nothing beside it: so neither a neighbour
    that needs much memory nor the choice of the system's memory killer makes an innocent block fail. If its process
    dies even then, it is halved again and again, until the positions are found that are to blame (100 processes may die
    for that). They come out as receipts with a failure of the kind ``"lost"``; all others are done. If the run stops
    before that, they remain to be done.

    The kernel is kept in bytes only until all processes have it, and packed again for one that takes the place of
    another; with `keep` until the end.

    A block that runs out of memory (MemoryError) is tried once more in a fresh process, and then fails as it did.

    The workers never import the caller's script, so it needs no ``if __name__ == "__main__"``.
    """
    pack_once(kernel)  # what cannot be packed is to raise here, not in a lane
    lost: list[Block] = []
    lanes = Lanes(kernel, n_workers, _ATTEMPTS, crew, keep=keep)
    window = Window(lanes, 2 * n_workers, stopping, room, patience)
    for receipt in _run_batches(window, blocks, n_workers, name, dropping, graph_after):
        if receipt is not None and receipt.failure is not None and receipt.failure.kind == "lost":
            lost += [receipt.block] if receipt.rest is None else [receipt.block, receipt.rest]
            yield None
        else:
            yield receipt
    deaths = itertools.count(1)
    for block in lost:
        yield from _do_alone(kernel, replace(block, limit=None), stopping, name, dropping, room, deaths)


def _do_alone(
    kernel: Kernel,
    block: Block,
    stopping: Wish,
    name: str,
    dropping: Wish,
    room: Room | None,
    deaths: Iterator[int],
) -> Receipts:
    """Do a block with nothing beside it; in halves, and halves of these, if its process dies, to lose no others."""
    waiting = deque([block])
    while waiting and not stopping():
        window = Window(Lanes(kernel, 1, 1), 1, stopping, room)
        for receipt in _run_batches(window, [waiting.popleft()], 1, name, dropping, math.inf):
            if receipt is not None and receipt.rest is not None:
                waiting.append(receipt.rest)  # no others are to come that it could be done with
                receipt.rest = None
            is_lost = receipt is not None and receipt.failure is not None and receipt.failure.kind == "lost"
            if receipt is None or not is_lost or next(deaths) >= _DEATHS_ALONE or receipt.block.n_positions == 1:
                yield receipt
            else:
                waiting.extendleft(reversed(receipt.block.split(receipt.block.n_positions // 2)))
                yield None


def run_both(
    kernel: Kernel,
    blocks: Iterable[Block],
    n_workers: int,
    stopping: Wish,
    name: str,
    dropping: Wish,
    interruptible: Interruptible,
    room: Room | None,
    crew: Crew | None,
) -> Receipts:
    """Do blocks in this thread, and beside it in worker processes, once they are there: one fewer than workers.

    For a job that takes little longer than the start of a process, and may be done before it.
    """
    waiting = iter(blocks)
    own = crew or Crew()
    own.start(n_workers - 1)
    limited = kernel.for_run(kernel.sink, 1, watched=kernel.watched)
    busy = True
    others: Any = None

    def patience() -> float:
        return 0.0 if busy else TICK

    try:
        while others is None or room is None or room.n_workers > 1:
            if others is None and own.is_here():
                others = run_processes(
                    limited, waiting, n_workers - 1, stopping, name, dropping, room, own, patience, math.inf, keep=True
                )
            if others is not None:
                yield next(others, None)
            block = None if stopping() else next(waiting, None)
            if block is None:
                break
            with interruptible():
                receipt = run_block(kernel, block)
            yield receipt
        busy = False
        if others is not None:
            yield from others
    finally:
        if others is not None:
            others.close()
        kernel.parcel.let_go()
        if crew is None:
            own.close()


def or_here(receipts: Receipts, kernel: Kernel, interruptible: Interruptible) -> Receipts:
    """Do blocks in this thread that worker processes cannot do since the function cannot be loaded there.

    What was pickled may refer to something that only this process has: a module made in it, the script itself.
    """
    is_told = False
    try:
        for receipt in receipts:
            failure = None if receipt is None else receipt.failure
            if receipt is None or failure is None or failure.kind != "loading":
                yield receipt
                continue
            if not is_told:
                log.warning(
                    "the function cannot be loaded in worker processes (%s: %s), so this process does it all; define "
                    "it, and what it uses, at the top level of a module that can be imported",
                    type(failure.error).__name__, failure.error,
                )  # fmt: skip
                is_told = True
            with interruptible():
                done = run_block(kernel, receipt.block)
            if receipt.rest is not None:
                done.rest = receipt.rest if done.rest is None else done.rest.join(receipt.rest)
            yield done
    finally:
        receipts.close()  # type: ignore[attr-defined]


def _run_batches(
    window: Window, blocks: Iterable[Block], n_workers: int, name: str, dropping: Wish, graph_after: float
) -> Receipts:
    """Do the blocks in batches; one begins as soon as what is left of those before does not fill the window."""
    waiting = iter(blocks)
    batches: list[Batch] = []
    begin = time.monotonic()
    try:
        while not dropping():
            kind = Graph if time.monotonic() - begin >= graph_after else Batch
            batches = [batch for batch in batches if batch.n_left]
            if window.wanted() and sum(batch.n_left for batch in batches) < window.size:
                if some := list(itertools.islice(waiting, kind.blocks_a_worker * n_workers)):
                    batches.append(kind(window, some, name))
            if not batches and window.is_over():
                return window.close()
            yield window.next_receipt()
    finally:
        window.close(kill=True)
