"""Blocks on a Dask distributed cluster: one task a block, named after the process.

The window is three blocks a worker thread, refilled as blocks finish; a block's future is released as soon as its
receipt is taken. Workers and the scheduler may die, the connection may break: what can be done again is done again, a
bounded number of times, and nothing is waited for without end.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.errors import BlockTakenError, WorkerError
from lazyproc.engine.cluster import (
    block_graph,
    call_for_worker,
    is_elastic,
    is_gone,
    least_busy,
    submit,
    threads_now,
    was_sent_away,
)
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.packing import pack_for_cluster
from lazyproc.engine.pulse import PATIENCE_SECONDS, Pulse, answer, ask
from lazyproc.engine.receipt import Receipt
from lazyproc.engine.streams import TICK, Receipts, Wish, never

_WINDOW = 3
_AHEAD_SECONDS, _MOST_AHEAD = 15.0, 50
"""Where a cluster adapts to its tasks, blocks of so many seconds are given for each thread, and so many at most: Dask
asks for one worker for each five seconds of tasks, and so would never start more workers for a window of three."""
_GRAPH_BLOCKS = 128
"""Blocks in a graph at most: the scheduler hands out none of them before it has taken in all."""
_INLINE_BYTES = 2**14
"""A kernel up to this size goes along with each task; a larger one is a task of its own, done once."""
_ATTEMPTS = 5
"""How often a block is tried that is cancelled, runs out of memory, or is taken away from its worker."""
_DEATHS_IN_A_ROW = 50
"""So many blocks may be given up with their workers dead, without one being finished in between."""
_HALVED = 30
"""So many blocks that end their workers may be halved to find out which positions do."""
_FETCHES = 4
"""So many requests for receipts are under way at a time; where results travel in them, one receipt each."""
_FETCH_SECONDS, _FETCH_SHARE = 0.05, 1 / 30
"""Receipts that come within so long, or such a part of the time that a block takes, are fetched together: each request
costs the scheduler and all workers asked."""
_LATELY = 16
"""About so many blocks tell how long one takes at the moment."""

log = logging.getLogger("lazyproc")


def run_client(
    client: Any,
    kernel: Kernel,
    blocks: Iterable[Block],
    stopping: Wish,
    name: str = "lazyproc",
    dropping: Wish = never,
    most: int | None = None,
    on_workers: Callable[[int], int | None] | None = None,
) -> Receipts:
    """Do the blocks on a cluster, of which `most` blocks at most are given at a time.

    `on_workers` is told the number of threads before blocks are given, and returns `most` as it is then.

    Raises
    ------
    WorkerError
        If the function cannot be sent; if the connection to the scheduler is lost and does not come back, the scheduler
        does not answer, or there are no workers, for about a minute; if workers die whatever they do.

    Notes
    -----
    When a worker is lost, the scheduler has its blocks done by others, ``distributed.scheduler.allowed-failures`` times
    (3). A block that it then gives up (`KilledWorker`) may only have stood in the queue of workers that others killed:
    it is submitted once more when all other blocks are done, alone, to one worker. If that dies again, and there are
    nannies that start others, it is halved again and again, until the positions are found that are to blame (30 times
    in all); each part ends one worker at most. What is left comes out with a failure of the kind ``"lost"``.

    Blocks that are cancelled, because the connection broke or the cluster was restarted, are submitted again, up to
    five times in all, then they are lost, too; so are blocks that run out of memory (MemoryError), which then fail as
    they did. If the run stops before, such blocks remain to be done.

    The scheduler takes a worker for lost that it does not hear of, though it may be alive. Where workers write in
    place, only the attempt that took the block last can do so (`BlockClaims`), and none once its receipt was accepted.
    """
    run = _ClusterRun(client, kernel, blocks, stopping, name, most, on_workers)
    try:
        yield from run.receipts(dropping)
    finally:
        run.close()


class _ClusterRun:
    """The blocks of one run on a cluster: which of them are under way, which are to be tried again."""

    def __init__(
        self,
        client: Any,
        kernel: Kernel,
        blocks: Iterable[Block],
        stopping: Wish,
        name: str,
        most: int | None = None,
        on_workers: Callable[[int], int | None] | None = None,
    ) -> None:
        from distributed import as_completed

        self._client = client
        self._stopping = stopping
        self._most = most
        self._on_workers = on_workers
        self._claims = None if kernel.sink is None else kernel.sink.claims().begin()
        self._packed = pack_for_cluster(replace(kernel, claims=self._claims), name)
        self._sent: Any = None
        self._name = f"{name}-{uuid.uuid4().hex}"
        self._number = itertools.count()
        self._waiting = iter(blocks)
        self._again: deque[Block] = deque()
        self._given_up: deque[Block] = deque()
        self._alone = False
        self._attempts: Counter[int] = Counter()
        self._deaths = 0
        self._n_halved = 0
        self._bound = ""
        self._most_index = 0
        self._pending: dict[Any, Block] = {}
        self._done = as_completed([], loop=client.loop, raise_errors=False)
        self._finished: deque[Any] = deque()
        self._fetches: dict[Future[Any], list[Any]] = {}
        self._fetched = 0.0
        self._elastic = is_elastic(client)
        self._n_threads = threads_now(client)
        self._pulse = Pulse(client, self._n_threads, elastic=self._elastic)
        self._block_seconds = 0.0
        self._call: Any = None
        self._at_work: Future[dict[str, Any]] | None = None

    # -- starting blocks ---------------------------------------------------------------------------------------------

    def receipts(self, dropping: Wish) -> Receipts:
        """Do all blocks, and those that can be tried again, again."""
        while not dropping():
            self._pulse.check()
            if self._pulse.is_connected():
                self._look_for_workers()
                has_more = self._leave_undone() if self._stopping() else self._start_more()
                if not self._pending and not has_more:
                    return
                if self._pulse.is_stuck() and not self._finished and not self._fetches:
                    self._start_over()
            yield from self._turn()
            under_way = self._pending and not (self._finished or self._fetches)
            if self._bound and under_way and self._pulse.is_connected() and is_gone(self._client, self._bound):
                block, error = self._let_go(next(iter(self._pending))), WorkerError(f"{self._bound} has died.")
                sent_away = was_sent_away(self._client, self._bound)
                yield self._try_again(block, error) if sent_away else self._lost(block, error)

    def _look_for_workers(self) -> None:
        """Tell how many workers there are, and ask how many blocks they may have: memory may allow fewer by now."""
        if self._on_workers is not None:
            self._n_threads = self._pulse.n_all or self._n_threads
            self._most = self._on_workers(self._n_threads)

    def _room(self) -> int:
        """Return how many blocks may be under way."""
        if self._alone:
            return 1
        ahead = _WINDOW
        if self._elastic and self._block_seconds:
            ahead = max(ahead, min(_MOST_AHEAD, math.ceil(_AHEAD_SECONDS / self._block_seconds)))
        room = ahead * max(1, self._pulse.n_threads)
        return room if self._most is None else min(room, self._most)

    def _start_more(self) -> bool:
        """Fill the window, in graphs that are worth sending and yet begin before the whole window is sent.

        Tells whether a block is left for which there is no worker at the moment.
        """
        room = self._room()
        size = max(1, min(_GRAPH_BLOCKS, room // 2)) if self._most is None else 1
        while room - len(self._pending) >= size and (blocks := self._next_blocks(size)):
            where: dict[str, Any] = {}
            if self._alone:  # the scheduler then does not give it to other workers when that one has died
                address = least_busy(self._client)
                if address is None:
                    self._again.extendleft(blocks)
                    self._call = self._call or call_for_worker(self._client)
                    return True
                self._bound = address
                where = {"workers": [address], "allow_other_workers": False}
            graph = block_graph(self._name, self._number, blocks, self._payload())
            keys = [key for layer in graph.layers.values() for key in layer]
            # Without the time-out graphs are mixed, and the first one's last blocks may begin after the last one's.
            futures = self._client.get(graph, keys, sync=False, fifo_timeout="0s", **where)
            self._pending.update(zip(futures, blocks, strict=True))
            self._done.update(futures)
            self._call = None  # a task waits by now
        return False

    def _leave_undone(self) -> bool:
        """Take back what no worker has, where more is given than workers can have; nothing is left to start then."""
        if self._at_work is not None and self._at_work.done():
            if not self._at_work.cancelled() and self._at_work.exception() is None:
                begun = {str(key) for keys in self._at_work.result().values() for key in keys}
                waiting = [one for one in self._pending if one.status == "pending" and str(one.key) not in begun]
                self._client.cancel(waiting)  # not what is finished: that counts
            self._at_work, self._elastic = None, False  # once is enough
        elif self._elastic and self._at_work is None:
            self._at_work = ask(self._client, self._client.scheduler.processing())
        return False

    def _start_over(self) -> None:
        """Take back what is under way, which then comes back as cancelled, and send the function anew."""
        log.warning("the cluster's workers do nothing, though blocks wait for them: these are submitted again")
        self._sent = None
        self._pulse.beat()
        self._client.cancel(list(self._pending))

    def _next_blocks(self, size: int) -> list[Block]:
        blocks = [self._again.popleft() for _ in range(min(len(self._again), size))]
        blocks += itertools.islice(self._waiting, size - len(blocks))
        if not blocks and not self._pending and self._given_up:
            self._alone = True
            blocks.append(replace(self._given_up.popleft(), limit=None))
        self._most_index = max(self._most_index, *(block.index for block in blocks), 0)
        return blocks

    def _payload(self) -> Any:
        """Return what a task gets: the packed kernel, or a task that yields it, which outlives a worker's death."""
        if len(self._packed) <= _INLINE_BYTES:
            return self._packed
        if self._sent is None or self._sent.status in ("cancelled", "error"):
            key = (f"kernel-{self._name}", next(self._number))
            self._sent = submit(self._client, bytes, self._packed, key=key)
        return self._sent

    # -- taking receipts ---------------------------------------------------------------------------------------------

    def _turn(self) -> Receipts:
        """Yield the receipts of what has finished, or None after a tick."""
        deadline = time.monotonic() + TICK
        while not (receipts := [one for one in self._take() if one is not None]):
            if time.monotonic() > deadline:
                yield None
                return
            time.sleep(0.005)
        yield from receipts

    def _take(self) -> Iterator[Receipt | None]:
        """Look what has finished or failed, have its receipts fetched, yield those that came; None for "again"."""
        for future in self._done.next_batch(block=False):
            if future not in self._pending:  # let go since its worker is gone
                continue
            if future.status == "finished":
                self._finished.append(future)
            elif future.status in ("error", "cancelled"):
                yield self._failed(future)
            else:  # the worker with the receipt was lost: it is done again
                self._done.add(future)
        self._fetch()
        for fetch in [one for one in self._fetches if one.done()]:
            futures = self._fetches.pop(fetch)
            error = fetch.exception()
            for number, future in enumerate(futures):
                if error is not None:
                    yield self._try_again(self._let_go(future), error)
                elif (receipt := fetch.result()[str(number)]) is None:
                    self._done.add(future)  # lost, or cancelled, meanwhile
                else:
                    self._pulse.beat()
                    yield self._accept(self._let_go(future), receipt)

    def _fetch(self) -> None:
        """Ask for the receipts of blocks that have finished: of many at a time, while workers have other blocks."""
        size = 1 if self._claims is None else len(self._finished)
        computed = len(self._pending) - len(self._finished) - sum(map(len, self._fetches.values()))
        if self._claims is not None and computed >= self._pulse.n_threads:
            if time.monotonic() < self._fetched + min(_FETCH_SECONDS, _FETCH_SHARE * self._block_seconds):
                return
            self._fetched = time.monotonic()
        while self._finished and len(self._fetches) < _FETCHES:
            batch = [self._finished.popleft() for _ in range(min(size, len(self._finished)))]
            wanted = {str(number): future for number, future in enumerate(batch)}
            self._fetches[ask(self._client, self._client.gather(wanted, errors="skip", asynchronous=True))] = batch

    def _let_go(self, future: Any) -> Block:
        block = self._pending.pop(future)
        future.release()
        return block

    def _accept(self, block: Block, receipt: Receipt) -> Receipt | None:
        """Return a receipt that counts; have the block tried again if it does not."""
        failure = receipt.failure
        if failure is not None and isinstance(failure.error, BlockTakenError):
            return self._try_again(block, failure.error)
        if receipt.out_of_memory and self._may_try_again(block):
            log.warning("block of positions %d to %d: out of memory, tried again", block.start, block.stop - 1)
            return None
        if failure is None and self._claims is not None and not self._claims.settle(block, receipt.attempt):
            return self._try_again(block, BlockTakenError("Another worker was given the block meanwhile."))
        self._deaths = 0
        self._block_seconds += (receipt.seconds - self._block_seconds) / (_LATELY if self._block_seconds else 1)
        return receipt

    def _failed(self, future: Any) -> Receipt | None:
        """Return the receipt of a block whose task was cancelled or failed without one."""
        from distributed import KilledWorker

        if future.status == "cancelled":
            error = WorkerError("The task was cancelled: the connection was lost, or the cluster restarted.")
            return self._try_again(self._let_go(future), error)
        error = future.exception(timeout=PATIENCE_SECONDS)
        block = self._let_go(future)
        if not isinstance(error, KilledWorker):
            return self._accept(block, Receipt(block, failure=Failure.of_worker(error, block, "")))
        log.warning("the workers that had the block of positions %d to %d died", block.start, block.stop - 1)
        if self._alone:
            return self._lost(block, error)
        self._deaths += 1
        if self._deaths >= _DEATHS_IN_A_ROW:
            raise WorkerError(
                f"The workers of {_DEATHS_IN_A_ROW} blocks died without one block being finished in between. A crash "
                "in native code, or too little memory: try test(), or blocks of less memory (max_mem_mb). Finished "
                "blocks are kept."
            ) from error
        self._given_up.append(block)
        return None

    def _lost(self, block: Block, error: BaseException) -> Receipt | None:
        """Have a block that ended its workers, though alone, done in halves, or return the receipt that it is lost.

        If the run is to stop, it remains to be done.
        """
        if self._stopping():
            return None
        return None if self._halve(block) else Receipt(block, failure=Failure.of_lost(error, block))

    def _halve(self, block: Block) -> bool:
        """Have a block that ends its workers done in two halves, where workers come back; tell whether it will be."""
        if block.n_positions == 1 or self._n_halved >= _HALVED or not self._has_nannies():
            return False
        if self._claims is not None and not self._claims.close(block):
            return False
        self._n_halved += 1
        first, second = block.split(block.n_positions // 2)
        self._most_index += 2
        self._given_up.appendleft(replace(second, index=self._most_index))
        self._given_up.appendleft(replace(first, index=self._most_index - 1))
        return True

    def _has_nannies(self) -> bool:
        """Tell whether somebody starts workers again that have died."""
        workers = answer(self._client, self._client.scheduler.identity(), "who is there?")["workers"]
        return all(one.get("nanny") for one in workers.values())

    def _try_again(self, block: Block, error: BaseException) -> Receipt | None:
        """Have a block tried again, or return the receipt of one that is lost."""
        if self._stopping() or self._may_try_again(block):
            return None
        return Receipt(block, failure=Failure.of_lost(error, block))

    def _may_try_again(self, block: Block) -> bool:
        self._attempts[block.index] += 1
        if self._stopping() or self._attempts[block.index] >= _ATTEMPTS:
            return False
        self._again.append(block)
        return True

    def close(self) -> None:
        """Drop what is under way, and let nothing of it be written anymore."""
        self._pulse.close()
        self._call = None
        for fetch in self._fetches:
            fetch.cancel()
        if self._claims is not None:
            self._claims.end()
        if self._pending and self._client.status == "running":
            with suppress(Exception):  # the connection may break just now: then the scheduler drops it all itself
                self._client.cancel(list(self._pending))
