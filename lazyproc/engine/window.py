"""Blocks in worker processes of this machine: how many are under way at once, in batches or as graphs of Dask's.

How much is under way, or finished and not yet taken, is bounded by a window, however slow one block is.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.learn import Room
from lazyproc.engine.lane import Lanes
from lazyproc.engine.receipt import Receipt
from lazyproc.engine.streams import TICK, Wish, a_tick

_GRAPH_BLOCKS = 8
"""Blocks a worker in one Dask graph."""


class Window:
    """What is under way in lanes, or finished and not yet taken: never more than `size` blocks.

    A slow block holds back its own place only; a slow driver, which does not take receipts, holds back everything.
    """

    def __init__(
        self,
        lanes: Lanes,
        size: int,
        stopping: Wish,
        room: Room | None = None,
        patience: Callable[[], float] = a_tick,
    ) -> None:
        self.size = size
        self._patience = patience
        self._room = room
        self.threads = ThreadPoolExecutor(size, "lazyproc")
        self._lanes = lanes
        self._stopping = stopping
        self._closed = False
        self._places = threading.Semaphore(size)
        self._ready: queue.SimpleQueue[Receipt | None] = queue.SimpleQueue()
        self._error: Exception | None = None

    def wanted(self) -> bool:
        """Tell whether another block may begin."""
        return not (self._closed or self._stopping())

    def do(self, block: Block) -> None:
        """Do a block in a lane and keep its receipt until it is taken; called in the threads of the window."""
        while not self._places.acquire(timeout=TICK):
            if not self.wanted():
                return
        receipt = self._lanes.do(block, self.wanted, self._room)
        if receipt is None:
            self._places.release()
        else:
            self._ready.put(receipt)

    def is_over(self) -> bool:
        """Tell whether all receipts are taken, and no error is to be raised."""
        return self._ready.empty() and self._error is None and self._lanes.error is None

    def next_receipt(self) -> Receipt | None:
        """Take a receipt, or None if there is none for some time.

        Raises
        ------
        WorkerError
            If nothing can be done in the lanes anymore.
        """
        try:
            receipt = self._ready.get(timeout=self._patience())
        except queue.Empty:
            error = self._error or self._lanes.error
            if error is not None:
                raise error from None
            return None
        if receipt is not None:
            self._places.release()
        return receipt

    def wake(self) -> None:
        """Give the driver a turn now: a batch has ended."""
        self._ready.put(None)

    def fail(self, error: Exception) -> None:
        """Let the driver raise an error."""
        self._error = error

    def close(self, *, kill: bool = False) -> None:
        """End the worker processes; with `kill` whatever they are doing."""
        self._closed = True
        self._lanes.close(kill=kill)
        self.threads.shutdown()


class Batch:
    """Some blocks that go straight to the threads of the window.

    Attributes
    ----------
    n_left : int
        Blocks of which nothing has come of yet.
    """

    blocks_a_worker = 1

    def __init__(self, window: Window, blocks: list[Block], name: str) -> None:
        self._window = window
        self._counting = threading.Lock()
        self.n_left = len(blocks)
        self._begin(blocks, name)

    def _begin(self, blocks: list[Block], name: str) -> None:
        for block in blocks:
            self._window.threads.submit(self._window.do, block).add_done_callback(self._end_of_block)

    def _end_of_block(self, future: Future[None]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            assert isinstance(error, Exception)
            self._window.fail(error)
        self._count(1)

    def _count(self, n_blocks: int) -> None:
        with self._counting:
            self.n_left -= n_blocks
        if not self.n_left:
            self._window.wake()


class Graph(Batch):
    """The same as one Dask graph, run by Dask's local scheduler in a thread of its own."""

    blocks_a_worker = _GRAPH_BLOCKS
    """They are cut before it is known how long those of the graph take."""

    def _begin(self, blocks: list[Block], name: str) -> None:
        run = f"{name}-{uuid.uuid4().hex}"
        waiting = deque(blocks)  # Dask begins with the last ones, as it likes; the smallest are to come last

        def do_next() -> None:
            self._window.do(waiting.popleft())

        graph = {(run, block.index): (do_next,) for block in blocks}
        threading.Thread(target=self._run, args=(graph,), name="lazyproc-graph", daemon=True).start()

    def _run(self, graph: dict[Any, Any]) -> None:
        """Run the graph; called by the thread."""
        from dask.local import get_async

        def finished(key: Any, result: Any, dsk: Any, state: Any, worker: Any) -> None:
            left.discard(key)
            if left:
                self._count(1)

        left = set(graph)
        callbacks = [(None, None, None, finished, None)]
        try:
            get_async(self._window.threads.submit, self._window.size, graph, list(graph), callbacks=callbacks)
        except Exception as error:  # not of a block: these are told by its receipt
            self._window.fail(error)
        finally:
            self._count(self.n_left)
