"""Threads of this process for blocks, which can be left behind: a thread that hangs cannot be ended, only ignored."""

from __future__ import annotations

import queue
import threading

from lazyproc.core.blocks import Block
from lazyproc.core.learn import Room
from lazyproc.engine.block_function import run_block, run_part
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.receipt import Receipt


class BlockThreads:
    """Threads that do blocks of one kernel.

    Parameters
    ----------
    kernel : Kernel
        What is done with a block.
    n_threads : int
        How many threads.
    room : Room, optional
        What memory allows, as it is when a block begins. Default: everything.

    Notes
    -----
    Used by one thread, the driver's. A thread that is still busy at `close` ends with its block; what it writes in
    place then does not pass the fence of a run that is over. It keeps neither the driver nor the interpreter waiting.
    """

    def __init__(self, kernel: Kernel, n_threads: int, room: Room | None = None) -> None:
        self._kernel = kernel
        self._room = room
        self._n_busy = 0
        self._is_closed = False
        self._turn = threading.Condition()
        self._tasks: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Receipt | BaseException] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"lazyproc-{number}", daemon=True) for number in range(n_threads)
        ]
        self.n_pending = 0
        for thread in self._threads:
            thread.start()

    def submit(self, block: Block) -> None:
        """Have a block done."""
        self._tasks.put(block)
        self.n_pending += 1

    def take_back(self) -> None:
        """Forget the blocks that no thread has begun."""
        while True:
            try:
                self._tasks.get_nowait()
            except queue.Empty:
                return
            self.n_pending -= 1

    def next(self, seconds: float) -> Receipt | None:
        """Return the receipt of a block that is done; None if there is none within the time.

        Raises
        ------
        BaseException
            What the function raised to end its thread, such as SystemExit.
        """
        try:
            done = self._done.get(timeout=seconds)
        except queue.Empty:
            return None
        self.n_pending -= 1
        if isinstance(done, BaseException):
            raise done
        return done

    def close(self) -> None:
        """Let the threads end; waits for those that are not busy."""
        self.take_back()
        with self._turn:
            self._is_closed = True  # one that waits for its turn has a block in hand, which is nobody's anymore
            self._turn.notify_all()
        for _ in self._threads:
            self._tasks.put(None)
        if not self.n_pending:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(1)  # OpenMP knows a limit for each thread
        while (block := self._tasks.get()) is not None:
            with self._turn:
                while self._room is not None and self._n_busy >= self._room.n_workers:
                    self._turn.wait()  # until another one ends, whatever it is that it has learnt
                    if self._is_closed:
                        return
                self._n_busy += 1
            most = None if self._room is None else self._room.rows
            try:
                self._done.put(run_part(block, most, lambda part: run_block(self._kernel, part)))
            except BaseException as error:
                self._done.put(error)
            with self._turn:
                self._n_busy -= 1
                self._turn.notify_all()
