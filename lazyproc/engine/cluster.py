"""What there is to know of a Dask distributed cluster before a run, and the form of the tasks that it gets.

The client is the caller's, or the active one; it is never closed here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.errors import WorkerError
from lazyproc.engine.kernel import run_packed
from lazyproc.engine.pulse import answer

_WAIT_SECONDS = 60


def active_client() -> Any | None:
    """Return the distributed Client that is active in this process, if there is one; imports nothing."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.default_client()
    except ValueError:
        return None


def count_threads(client: Any) -> int:
    """Return how many blocks the cluster computes at a time.

    Raises
    ------
    WorkerError
        If no worker has joined within a minute, or the scheduler does not answer.
    """
    if client.status not in ("running", "connecting"):
        raise WorkerError(f"client: it is {client.status}. Give one that is open, or leave it out.")
    threads = sum(answer(client, client.scheduler.ncores(), "how many threads are there?").values())
    if not threads:
        try:
            client.wait_for_workers(1, timeout=_WAIT_SECONDS)
        except TimeoutError as error:
            raise WorkerError(
                f"client: the cluster {client.scheduler.address} has no workers, and none joined within "
                f"{_WAIT_SECONDS} s. Start workers, or leave out the client."
            ) from error
        threads = sum(client.nthreads().values())
    return int(threads)


def least_busy(client: Any) -> str:
    """Return the address of the worker with the fewest tasks a thread.

    Raises
    ------
    WorkerError
        If no worker has joined within a minute, or the scheduler does not answer.
    """
    threads: dict[str, int] = {}
    while not threads:
        count_threads(client)
        threads = answer(client, client.scheduler.ncores(), "how many threads are there?")
    tasks: dict[str, Any] = answer(client, client.scheduler.processing(), "what are the workers doing?")
    return min(threads, key=lambda one: len(tasks.get(one, ())) / max(1, threads[one]))


def is_gone(client: Any, address: str) -> bool:
    """Tell whether a worker has left the cluster, or died, as far as the scheduler knows."""
    return address not in answer(client, client.scheduler.ncores(), "who is there?")


def most_on_machine(client: Any) -> int:
    """Return how many blocks are computed at a time on the machine that has the most of the cluster's threads."""
    threads: Counter[str] = Counter()
    for worker, count in answer(client, client.scheduler.ncores(), "where are the threads?").items():
        threads[worker.rpartition("://")[2].rpartition(":")[0]] += count
    return max(threads.values(), default=1)


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

    layer = {(name, next(numbers)): (run_packed, packed, block) for block in blocks}
    return HighLevelGraph({name: layer}, {name: set()})
