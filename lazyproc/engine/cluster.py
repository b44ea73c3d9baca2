"""Blocks on a Dask distributed cluster: a dask array a window, one task a block, named after the process.

The client is the caller's, or the active one; it is never closed here. The window is three blocks a worker thread,
refilled as blocks finish; a block's future is released as soon as its receipt is taken.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lazyproc.core.blocks import Block
from lazyproc.core.errors import WorkerError
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import Kernel, Receipt, pack, run_packed
from lazyproc.engine.local import TICK, Receipts, Stopping

_WINDOW = 3
_INLINE_BYTES = 2**14
"""A kernel up to this size goes along with each task; a larger one is sent to each worker once."""
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
        If no worker has joined within a minute.
    """
    threads = sum(client.nthreads().values())
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


def workers_share_file(client: Any, path: str) -> bool:
    """Tell whether all workers run on this host and see the same file under this path, and so may write in place."""
    here = _identify(path)
    answers = client.run(_identify, path)
    return bool(answers) and here is not None and all(answer == here for answer in answers.values())


def _identify(path: str) -> tuple[str, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return socket.gethostname(), status.st_dev, status.st_ino


def block_array(name: str, blocks: list[Block], packed: Any) -> Any:
    """Build the dask array of a window: one element a position, one chunk a block, each chunk one task.

    Parameters
    ----------
    name : str
        Name of the array; keys are ``(name, 0)``, ``(name, 1)`` …
    blocks : list of Block
        The window.
    packed : bytes or Future
        The packed kernel.

    Notes
    -----
    Computing a chunk has an effect (results are written) and yields the receipt in place of the chunk's values, which
    nobody would want to gather.
    """
    import dask.array
    from dask.highlevelgraph import HighLevelGraph

    layer = {(name, number): (run_packed, packed, block) for number, block in enumerate(blocks)}
    chunks = (tuple(block.n_positions for block in blocks),)
    graph = HighLevelGraph({name: layer}, {name: set()})
    return dask.array.Array(graph, name, chunks, meta=np.empty(0, object))


def run_client(
    client: Any, kernel: Kernel, blocks: Iterable[Block], stopping: Stopping, name: str = "lazyproc"
) -> Receipts:
    """Do the blocks on a cluster.

    Notes
    -----
    Workers that are lost are the scheduler's affair: it does their blocks again elsewhere, a bounded number of times.
    A block that is given up comes back as a receipt with a failure.
    """
    from distributed import as_completed

    try:
        packed = pack(kernel)
    except Exception as error:
        raise WorkerError(
            f"{name}: the function, or an argument of it, cannot be sent to the workers of the cluster "
            f"({type(error).__name__}: {error}). Define the function at the top level of a module, and keep open files "
            "and locks out of its arguments."
        ) from error
    payload = packed if len(packed) <= _INLINE_BYTES else client.scatter(packed, broadcast=True, hash=False)
    run = uuid.uuid4().hex[:24]
    waiting = iter(blocks)
    pending: dict[Any, Block] = {}
    done = as_completed([], loop=client.loop, raise_errors=False)
    room = _WINDOW * count_threads(client)
    try:
        for number in itertools.count():
            # Half a window at a time: building an array costs more than a task.
            if len(pending) <= room // 2 and not stopping():
                window = list(itertools.islice(waiting, room - len(pending)))
                if window:
                    futures = _submit(client, block_array(f"{name}-{run}{number:08x}", window, payload))
                    pending.update(zip(futures, window, strict=True))
                    done.update(futures)
            if not pending:
                return
            yield from _next_receipts(done, pending)
    finally:
        client.cancel(list(pending))


def _submit(client: Any, array: Any) -> list[Any]:
    """Start the tasks of a window and return their futures, in the order of the blocks."""
    from distributed import futures_of

    persisted = client.persist(array, optimize_graph=False)
    by_key = {future.key: future for future in futures_of(persisted)}
    return [by_key[(array.name, number)] for number in range(array.npartitions)]


def _next_receipts(done: Any, pending: dict[Any, Block]) -> Iterator[Receipt | None]:
    """Yield the receipts of what has finished, or None after a tick."""
    deadline = time.monotonic() + TICK
    while not (finished := done.next_batch(block=False)):
        if time.monotonic() > deadline:
            yield None
            return
        time.sleep(0.005)
    for future in finished:
        block = pending.pop(future)
        if future.status == "finished":
            yield future.result()
        else:
            error = future.exception() if future.status == "error" else WorkerError("the task was cancelled")
            yield Receipt(block, failure=Failure.of_worker(error, block))
        future.release()
