"""A rank that serves: a Dask worker for as long as the driver lives, and not longer."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from contextlib import suppress
from typing import Any, NoReturn

import psutil

from lazyproc.engine.line import Line
from lazyproc.engine.messages import END, HELLO, ORDERS, Hello, Orders
from lazyproc.engine.world import LOST, World, flush, ignore_signals

_LOOK_SECONDS = 0.05
"""How often a rank looks whether it is told to leave."""
_PATIENCE_SECONDS = 2.0
"""How long after the line was cut the driver's last word may take to arrive."""
_CLOSE_SECONDS = 10.0
_JOIN_SECONDS = 30.0
_LEAST_BYTES = 256 * 2**20
"""What a worker gets at least, over what it takes when idle: with less, Dask would never give it work."""

log = logging.getLogger("lazyproc")


def serve(world: World, hello: Hello) -> NoReturn:
    """Serve as a worker until the script in rank 0 ends; then leave."""
    from lazyproc.engine.dask_scheduler import quiet

    try:
        quiet(logging.ERROR)
        told = _orders(world, hello)
        _limit_threads(told.threads)
        ignore_signals()  # to stop is the driver's affair
        line = Line(told.line, world.rank, world.limit)
        loop = asyncio.new_event_loop()  # never closed: that would wait for functions that are still computing
        code = loop.run_until_complete(_serve(world, told, line))
        _leave(world, code)
    except BaseException as error:
        world.abort(LOST, f"{type(error).__name__}: {error}")


def _orders(world: World, hello: Hello) -> Orders:
    """Say hello to the driver and return its orders."""
    world.send(hello, 0, HELLO)
    told = world.wait_for(lambda: world.receive(0, ORDERS), world.limit)
    if told is None:
        world.abort(LOST, f"rank 0 has given no orders within {world.limit:g} s: has its script come to cluster()?")
    assert isinstance(told, Orders)
    return told


def _limit_threads(threads: int) -> None:
    """Limit the threads of BLAS and OpenMP: of libraries that are loaded already, and of those that will be."""
    from threadpoolctl import threadpool_limits

    for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR"):
        os.environ[f"{library}_NUM_THREADS"] = str(threads)
    threadpool_limits(threads)


async def _serve(world: World, told: Orders, line: Line) -> int:
    """Be a worker, again and again if Dask closes it, until the driver says or shows that this is the end."""
    from lazyproc.engine.dask_scheduler import quiet

    workers: list[Any] = []
    life: asyncio.Future[None] | None = None
    while (code := _last_word(world, line)) is None:
        if life is None or life.done():
            workers.clear()
            life = asyncio.ensure_future(_live(world, told, workers))
        await asyncio.sleep(_LOOK_SECONDS)
    quiet(logging.CRITICAL + 1)  # a heartbeat that is under way while the connections close would be told as an error
    for worker in workers:
        with suppress(Exception):
            await asyncio.wait_for(
                worker.close(timeout=_CLOSE_SECONDS / 2, executor_wait=False, reason="the script has ended"),
                _CLOSE_SECONDS,
            )
    return code


async def _live(world: World, told: Orders, workers: list[Any]) -> None:
    """Be a worker until Dask closes it, or it cannot join: the script may have closed the scheduler."""
    from distributed import Worker

    least = psutil.Process().memory_info().rss + _LEAST_BYTES
    try:
        worker = Worker(
            told.scheduler,
            nthreads=1,
            name=world.rank,
            host=told.host,
            memory_limit=max(told.memory, least),
            dashboard=False,
        )
        workers.append(worker)
        await asyncio.wait_for(worker, _JOIN_SECONDS)
        await worker.finished()
    except Exception as error:
        log.debug("rank %d has not joined: %s", world.rank, error)
        await asyncio.sleep(1)


def _last_word(world: World, line: Line) -> int | None:
    """Return the driver's likely code if this is the end; one that is gone without a word takes this process along."""
    code: int | None = world.receive(0, END)
    if code is not None or not line.is_cut():
        return code
    code = world.wait_for(lambda: world.receive(0, END), _PATIENCE_SECONDS)
    if code is None:
        log.info("rank %d: the driver is gone", world.rank)
        os._exit(LOST)
    return code


def _leave(world: World, code: int) -> NoReturn:
    """End this process, together with all others of the job; with `code` only if not all come to the end.

    Notes
    -----
    By C's ``exit``, with Python's lock held: MPICH takes a process for failed that ends by ``_exit``, even after it
    was finalised; and a normal end of Python would run what belongs to the script, and wait for its threads.
    """
    flush()
    world.end(code)
    ctypes.PyDLL(None).exit(0)
    os._exit(0)
