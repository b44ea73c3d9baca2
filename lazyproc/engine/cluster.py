"""What there is to know of a Dask distributed cluster before a run, and the form of the tasks that it gets.

The client is the caller's, or the active one; it is never closed here.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.errors import ArgumentValueError, WorkerError
from lazyproc.engine.packing import run_task
from lazyproc.engine.pulse import PATIENCE_SECONDS, answer, are_coming

_LOOK_SECONDS = 0.25
"""How often to look for workers where there are none."""
_FEW_THREADS = 16
"""More of them in a worker process are not found to take memory: its mark would say little of a block, and be read all
the time."""
_TELL_SECONDS = 5.0
"""After so long without workers the user is told what is waited for."""

log = logging.getLogger("lazyproc")


def active_client() -> Any | None:
    """Return the distributed Client that is active in this process, if there is one; imports nothing.

    None in a task of a cluster: it would wait for other tasks while it keeps them from being done.

    Raises
    ------
    ArgumentValueError
        If it is an asynchronous one, and this is its event loop, which an answer would have to come through.
    """
    distributed = sys.modules.get("distributed")
    if distributed is None or not hasattr(distributed, "default_client"):  # another thread may be importing it just now
        return None
    worker = sys.modules.get("distributed.worker")
    if worker is not None and hasattr(getattr(worker, "thread_state", None), "execution_state"):
        return None
    try:
        client = distributed.default_client()
    except ValueError:
        return None
    if client.asynchronous:
        raise ArgumentValueError(
            "client: the active client is an asynchronous one; expected a synchronous one. Call this in a thread "
            "(asyncio.to_thread), or while no asynchronous client is active."
        )
    return client


def count_threads(client: Any) -> int:
    """Return how many blocks the cluster computes at a time; waits for a first worker if there is none.

    Raises
    ------
    WorkerError
        If no worker has joined within a minute, and none is known to be on its way; or the scheduler does not answer.
    """
    if client.status not in ("running", "connecting"):
        raise WorkerError(f"client: it is {client.status}. Give one that is open, or leave it out.")
    return threads_now(client) or _wait_for_workers(client)


def threads_now(client: Any) -> int:
    """Return how many blocks the cluster computes at a time at the moment; 0 without workers."""
    return int(sum(answer(client, client.scheduler.ncores(), "how many threads are there?").values()))


def call_for_worker(client: Any) -> Any:
    """Have a task wait, to be released: a cluster that adapts to its tasks starts no worker without."""
    return client.submit(int, key=f"wait-for-workers-{uuid.uuid4().hex}", pure=False)


def _wait_for_workers(client: Any) -> int:
    """Wait until there are workers."""
    begin = time.monotonic()
    tell, give_up = begin + _TELL_SECONDS, begin + PATIENCE_SECONDS
    task = call_for_worker(client)
    try:
        while not (threads := threads_now(client)):
            now = time.monotonic()
            if now > give_up and not are_coming(client):
                raise WorkerError(
                    f"client: the cluster {client.scheduler.address} has no workers, and none joined within "
                    f"{PATIENCE_SECONDS:g} s. Start workers, wait for them (client.wait_for_workers(1)), or leave out "
                    "the client."
                )
            if now > tell:
                log.warning("waiting for workers of the cluster %s: there are none yet", client.scheduler.address)
                tell = now + PATIENCE_SECONDS
            time.sleep(_LOOK_SECONDS)
    finally:
        task.release()
    return threads


def least_busy(client: Any) -> str | None:
    """Return the address of the worker with the fewest tasks a thread; None if there are no workers.

    One that pauses for lack of memory, and so begins nothing, only if all do.

    Raises
    ------
    WorkerError
        If the scheduler does not answer.
    """
    workers: dict[str, Any] = answer(client, client.scheduler.identity(), "who is there?")["workers"]
    tasks: dict[str, Any] = answer(client, client.scheduler.processing(), "what are the workers doing?")

    def load(address: str) -> tuple[bool, float]:
        worker = workers[address]
        return worker.get("status") != "running", len(tasks.get(address, ())) / max(1, worker["nthreads"])

    return min(workers, key=load, default=None)


def submit(client: Any, call: Callable[..., Any], packed: bytes, **options: Any) -> Any:
    """Submit a call with a packed kernel, which may be large: Dask need not warn of that."""
    import dask

    with dask.config.set({"distributed.admin.large-graph-warning-threshold": 2 * len(packed) + 10**7}):
        return client.submit(call, packed, pure=False, **options)


def is_elastic(client: Any) -> bool:
    """Tell whether the cluster is known to start workers as tasks wait for them, or to have some on their way."""
    adapts = getattr(getattr(client, "cluster", None), "_adaptive", None) is not None  # there is no public way to ask
    return adapts or are_coming(client)


def is_gone(client: Any, address: str) -> bool:
    """Tell whether a worker has left the cluster, or died, as far as the scheduler knows."""
    return address not in answer(client, client.scheduler.ncores(), "who is there?")


def was_sent_away(client: Any, address: str) -> bool:
    """Tell whether a worker that is gone was asked to leave, as clusters do that adapt to their tasks."""
    events = answer(client, client.scheduler.events(topic=address), "what became of the worker?")
    return any(event.get("action") == "retired" or event.get("expected") for _, event in events)


def most_on_machine(client: Any) -> int:
    """Return how many blocks are computed at a time on the machine that has the most of the cluster's threads."""
    threads: Counter[str] = Counter()
    for worker, count in answer(client, client.scheduler.ncores(), "where are the threads?").items():
        threads[worker.rpartition("://")[2].rpartition(":")[0]] += count
    return max(threads.values(), default=1)


def tells_memory(client: Any) -> bool:
    """Tell whether workers can find out what their blocks take: in processes of their own, of a few threads each."""
    if str(client.scheduler.address).startswith("inproc:"):
        return False
    threads = answer(client, client.scheduler.ncores(), "how many threads has a worker?")
    return max(threads.values(), default=1) <= _FEW_THREADS


def block_graph(name: str, numbers: Iterator[int], blocks: list[Block], packed: Any) -> Any:
    """Build a graph of blocks: one layer, one task a block, whose result is its receipt.

    Parameters
    ----------
    name : str
        Name of the run. All its tasks are one group for the scheduler, which hands them out one by one as soon as the
        group is large, instead of giving each worker its share beforehand.
    numbers : iterator of int
        Gives each task of the run a number of its own.
    blocks : list of Block
        What is to be done.
    packed : bytes or Future
        The packed kernel.

    Notes
    -----
    No dask array: to import that takes a second or two, in which hundreds of workers would wait. And not a plain dict,
    of which Dask would first compute a hash.
    """
    from dask.highlevelgraph import HighLevelGraph

    layer = {(name, next(numbers)): (run_task, packed, block) for block in blocks}
    return HighLevelGraph({name: layer}, {name: set()})
