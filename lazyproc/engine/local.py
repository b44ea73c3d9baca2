"""Blocks on this machine: in the process, in its threads, or in worker processes under Dask's local scheduler.

Each engine is a generator: blocks go in, receipts come out as they are ready; None comes out now and then while nothing
is ready, so that the driver can keep its checkpoint interval. Once `stopping()` is true nothing new is started and
what is under way is waited for. How much is under way is bounded by a window of two blocks a worker.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.errors import WorkerError
from lazyproc.engine.kernel import Kernel, Receipt, pack, run_block, run_packed

TICK = 0.25
"""Seconds: how often an engine gives the driver a turn while nothing is ready."""
_LOOK_SECONDS = 0.5
"""How often a worker process looks whether its driver is still there."""
_GRAPH_BLOCKS = 128
"""Blocks a worker in one Dask graph: the end of a graph leaves workers idle for a moment, its size costs memory."""
_ATTEMPTS = 3
"""How often a block may be under way when a worker process is lost."""

Receipts = Iterator[Receipt | None]
Stopping = Callable[[], bool]

log = logging.getLogger("lazyproc")


def run_serial(kernel: Kernel, blocks: Iterable[Block], stopping: Stopping) -> Receipts:
    """Do the blocks one after the other in this thread; nothing is pickled."""
    for block in blocks:
        if stopping():
            return
        yield run_block(kernel, block)


def run_threads(kernel: Kernel, blocks: Iterable[Block], n_workers: int, stopping: Stopping) -> Receipts:
    """Do the blocks in threads of this process; for functions that let other threads run (NumPy on whole blocks)."""
    from threadpoolctl import threadpool_limits

    waiting = iter(blocks)
    pending: set[Future[Receipt]] = set()
    # BLAS knows one limit for the whole process, which the driver sets and restores; OpenMP one for each thread.
    one_each = ThreadPoolExecutor(n_workers, "lazyproc", initializer=threadpool_limits, initargs=(1,))
    with threadpool_limits(1), one_each as pool:
        try:
            while True:
                free = 0 if stopping() else 2 * n_workers - len(pending)
                pending |= {pool.submit(run_block, kernel, block) for block in itertools.islice(waiting, free)}
                if not pending:
                    return
                done, pending = wait(pending, timeout=TICK, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
                if not done:
                    yield None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run_processes(
    kernel: Kernel, blocks: Iterable[Block], n_workers: int, stopping: Stopping, name: str = "lazyproc"
) -> Receipts:
    """Do the blocks in worker processes: Dask graphs on Dask's local scheduler, over a pool of light processes.

    Raises
    ------
    WorkerError
        If worker processes are lost again and again with the same blocks under way.

    Notes
    -----
    The workers never import the caller's script, so it needs no ``if __name__ == "__main__"``.
    """
    packed = pack(kernel)
    attempts: dict[int, int] = {}
    waiting = iter(blocks)
    pool = _Pool(packed, n_workers, stopping)
    try:
        while batch := list(itertools.islice(waiting, _GRAPH_BLOCKS * n_workers)):
            while batch:
                graph = _GraphRun(pool, batch, name)
                yield from graph.receipts()
                if graph.error is None:
                    break
                pool.close(kill=True)
                batch = _still_to_do(graph, attempts)
                pool = _Pool(packed, n_workers, stopping)
            if stopping():
                return
    except BaseException:
        pool.close(kill=True)
        raise
    finally:
        pool.close()


def _still_to_do(graph: _GraphRun, attempts: dict[int, int]) -> list[Block]:
    """Return the blocks to try again after a worker was lost; give up on one that was under way too often."""
    for block in graph.under_way():
        attempts[block.index] = attempts.get(block.index, 0) + 1
        if attempts[block.index] >= _ATTEMPTS:
            raise WorkerError(
                f"Worker processes died {_ATTEMPTS} times while the block of positions {block.start} to "
                f"{block.stop - 1} was under way. A crash in native code, or too little memory: try test() on these "
                "positions, or a smaller max_mem_mb. Finished blocks are kept."
            ) from graph.error
    log.warning("a worker process was lost; its blocks are tried again")
    return [block for block in graph.blocks if block.index not in graph.finished]


_installed: dict[str, bytes] = {}
"""In a worker process: the kernels it was started with. Always empty in the driver."""


def set_up_worker() -> None:
    """Set up a worker process: Ctrl-C is the driver's affair, and without a driver there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(os.getppid(),), name="lazyproc-driver", daemon=True).start()


def _leave_with(driver: int) -> None:
    """End this process soon after the driver has gone: a driver that is killed cannot send its workers home."""
    while os.getppid() == driver:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def _install(run: str, packed: bytes) -> None:
    """Set up a worker process, and keep the kernel there."""
    set_up_worker()
    _installed[run] = packed


def _run_installed(run: str, block: Block) -> Receipt | None:
    """Do a block with the installed kernel; None where there is none, as in a driver that is stopping."""
    packed = _installed.get(run)
    return None if packed is None else run_packed(packed, block)


class _Pool:
    """Worker processes of one kernel."""

    def __init__(self, packed: bytes, n_workers: int, stopping: Stopping) -> None:
        from loky.process_executor import ProcessPoolExecutor

        self.run = uuid.uuid4().hex
        self.n_workers = n_workers
        self._stopping = stopping
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR")}
        self._executor: Any = ProcessPoolExecutor(
            n_workers, timeout=None, initializer=_install, initargs=(self.run, packed), env=one_thread
        )

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Submit to the pool; once the run is stopping, call it here, where no kernel is installed: it is skipped."""
        if not self._stopping():
            future: Future[Any] = self._executor.submit(function, *args)
            return future
        skipped: Future[Any] = Future()
        skipped.set_result(function(*args))
        return skipped

    def close(self, *, kill: bool = False) -> None:
        """End the processes; with `kill` whatever they are doing."""
        self._executor.shutdown(wait=True, kill_workers=kill)


class _GraphRun:
    """One Dask graph, run by Dask's local scheduler in a thread of its own, its receipts handed on one by one."""

    def __init__(self, pool: _Pool, blocks: list[Block], name: str) -> None:
        self.blocks = blocks
        self.finished: set[int] = set()
        self.error: BaseException | None = None
        self._pool = pool
        self._name = f"{name}-{uuid.uuid4().hex}"
        self._started: set[int] = set()
        self._abandoned = False
        self._ready: queue.Queue[Receipt | None] = queue.Queue(maxsize=2 * pool.n_workers)

    def receipts(self) -> Receipts:
        """Run the graph and yield its receipts; `error` tells afterwards whether a worker was lost."""
        thread = threading.Thread(target=self._run, name="lazyproc-graph", daemon=True)
        thread.start()
        try:
            while thread.is_alive() or not self._ready.empty():
                try:
                    receipt = self._ready.get(timeout=TICK)
                except queue.Empty:
                    yield None
                    continue
                if receipt is not None:
                    self.finished.add(receipt.block.index)
                    yield receipt
        finally:
            self._abandoned = True

    def under_way(self) -> list[Block]:
        """Return the blocks that were started and are not finished."""
        return [block for block in self.blocks if block.index in self._started - self.finished]

    def _run(self) -> None:
        from dask.callbacks import Callback
        from dask.local import get_async

        keys = {(self._name, block.index): block for block in self.blocks}
        graph = {key: (_run_installed, self._pool.run, block) for key, block in keys.items()}

        def started(key: Any, dsk: Any, state: Any) -> None:
            self._started.add(keys[key].index)

        def finished(key: Any, receipt: Receipt | None, dsk: Any, state: Any, worker: Any) -> None:
            self._hand_on(receipt)

        try:
            with Callback(pretask=started, posttask=finished):
                get_async(self._pool.submit, 2 * self._pool.n_workers, graph, list(graph))
        except Exception as error:
            self.error = error

    def _hand_on(self, receipt: Receipt | None) -> None:
        """Wait until the driver takes it: a slow driver holds the graph back."""
        while not self._abandoned:
            try:
                return self._ready.put(receipt, timeout=TICK)
            except queue.Full:
                continue
