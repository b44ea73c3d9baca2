"""Try the function on a few positions in a worker, where blocks will be done: that it may crash, the driver not."""

from __future__ import annotations

import logging
import pickle
from concurrent.futures import wait
from dataclasses import dataclass, replace
from typing import Any

from lazyproc.core.apply import OutputMismatch, RowError
from lazyproc.core.blocks import Block
from lazyproc.core.probe import Probe, run_probe
from lazyproc.core.runs import Runs
from lazyproc.engine.cluster import count_threads, is_gone, least_busy
from lazyproc.engine.crew import Crew
from lazyproc.engine.failure import FailedElsewhere, Failure
from lazyproc.engine.kernel import Kernel, failure_of
from lazyproc.engine.lane import Died, Lane
from lazyproc.engine.pulse import Pulse, ask

_LOOK_SECONDS = 0.25
"""How often the driver looks whether the worker is still there."""

log = logging.getLogger("lazyproc")


@dataclass(frozen=True)
class Trial:
    """A probe that another process is to make. Travels.

    Attributes
    ----------
    remaining : Runs
        What has to be computed.
    source_bytes, result_bytes : int
        Bytes of one position of the source and of all results.
    vectorized : bool
        Whether the function takes many positions at once.
    record : bool
        Whether to go on where the function fails.
    """

    remaining: Runs
    source_bytes: int
    result_bytes: int
    vectorized: bool
    record: bool

    def answer(self, packed: bytes) -> Probe | Failure:
        """Make the probe with a packed kernel; whatever goes wrong is returned in a form that travels."""
        try:
            return self._run(pickle.loads(packed))  # not kept: the run's own kernel will be
        except BaseException as error:  # the function may raise what would end the worker
            return self.failure(error)

    def _run(self, kernel: Kernel) -> Probe:
        try:
            probe = run_probe(
                kernel.compute,
                lambda runs: kernel.source.rows(iter(runs)),
                self.remaining,
                source_bytes=self.source_bytes,
                result_bytes=self.result_bytes,
                vectorized=self.vectorized,
                try_threads=False,
                record=self.record,
            )
        except (RowError, OutputMismatch) as error:
            raise _for_travel(error, self.remaining) from None
        return replace(probe, first=_for_travel(probe.first, self.remaining))

    def failure(self, error: BaseException) -> Failure:
        """Return what went wrong as a failure of the function, or else of the worker."""
        if isinstance(error, FailedElsewhere):
            return error.failure
        return Failure.of_worker(error, as_block(self.remaining))


def as_block(runs: Runs) -> Block:
    """Return positions as a block, for messages."""
    return Block(0, tuple(runs.starts.tolist()), tuple(runs.stops.tolist()))


def _for_travel(error: Any, remaining: Runs) -> Any:
    if error is None:
        return None
    runs: Runs = getattr(error, "runs", remaining)
    travelling = FailedElsewhere(failure_of(error, as_block(runs)))
    travelling.runs = runs
    return travelling


def try_in_process(packed: bytes, trial: Trial, crew: Crew) -> Probe | Failure:
    """Make a probe in a worker process of this machine; nothing is known if the function ends it."""
    lane = Lane(packed, crew)
    try:
        made: Probe | Failure = pickle.loads(lane.do(trial))
        return made
    except Died as died:
        return _crashed(f"a worker process, which {died}")
    finally:
        lane.end()


def try_on_cluster(client: Any, packed: bytes, trial: Trial) -> Probe | Failure:
    """Make a probe on one worker of a cluster, the least busy one; nothing is known if the function ends that.

    Raises
    ------
    WorkerError
        If there are no workers, or the cluster does not answer, for about a minute.

    Notes
    -----
    Not a task, which the scheduler would give to other workers when the first one has died.
    """
    pulse = Pulse(client, count_threads(client))
    address = least_busy(client)
    question = client.run(_answer, trial, packed, workers=[address], on_error="return", asynchronous=True)
    future = ask(client, question)
    try:
        while not wait([future], _LOOK_SECONDS).done:
            pulse.check()
            if pulse.is_connected() and is_gone(client, address):
                return _crashed(f"the worker {address}, which is gone")
        made: Any = future.result().get(address)
    except OSError as error:  # of the connection to the scheduler
        return trial.failure(error)
    finally:
        future.cancel()
        pulse.close()
    if isinstance(made, Probe | Failure):
        return made
    if made is None or isinstance(made, OSError):  # of the connection to the worker: it may not be known yet why
        return _crashed(f"the worker {address}, which is gone")
    return trial.failure(made)


async def _answer(trial: Trial, packed: bytes, dask_worker: Any) -> Probe | Failure:
    """Make the probe in a thread of those that do the worker's tasks."""
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(dask_worker.executors["default"], trial.answer, packed)


def _crashed(where: str) -> Probe:
    log.warning(
        "the function was tried on a few positions in %s: a crash in native code, too little memory, or it had to "
        "leave. The run goes on with small blocks; those that end their workers again are given up, and named",
        where,
    )
    return Probe.unknown()
