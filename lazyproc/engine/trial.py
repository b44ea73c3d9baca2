"""Try the function on a few positions in a worker, where blocks will be done: that it may crash, the driver not."""

from __future__ import annotations

import logging
import pickle
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.errors import WorkerError
from lazyproc.core.measure import run_probe
from lazyproc.core.no_result import NoResult
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.engine.block_function import failure_of
from lazyproc.engine.cluster import count_threads, is_gone, least_busy, submit, was_sent_away
from lazyproc.engine.crew import Crew
from lazyproc.engine.failure import FailedElsewhere, Failure
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.lane import Died, Lane
from lazyproc.engine.pulse import Pulse, ask

_LOOK_SECONDS = 0.25
"""How often the driver looks whether the worker is still there."""
_NOTICED_SECONDS = 5.0
"""So long after a connection broke the scheduler knows at the latest that the worker is gone."""
_ATTEMPTS = 5
"""So many workers may be sent away while they make the probe."""

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
            kernel = pickle.loads(packed)  # not kept: the run's own kernel will be
        except BaseException as error:
            return Failure.of_loading(error, Block.of(self.remaining))
        try:
            return self._run(kernel)
        except BaseException as error:  # the function may raise what would end the worker
            return self.failure(error)

    def _run(self, kernel: Kernel) -> Probe:
        try:
            probe = run_probe(
                kernel.compute,
                kernel.source.rows,
                self.remaining,
                source_bytes=self.source_bytes,
                result_bytes=self.result_bytes,
                vectorized=self.vectorized,
                try_threads=False,
                record=self.record,
            )
        except NoResult as error:
            raise self._for_travel(error) from None
        return probe if probe.first is None else replace(probe, first=self._for_travel(probe.first))

    def _for_travel(self, error: NoResult) -> FailedElsewhere:
        runs = error.runs or self.remaining
        travelling = FailedElsewhere(failure_of(error, Block.of(runs)))
        travelling.runs = runs
        return travelling

    def failure(self, error: BaseException, host: str | None = None) -> Failure:
        """Return what went wrong as a failure of the function, or else of the worker."""
        if isinstance(error, FailedElsewhere):
            return error.failure
        return Failure.of_worker(error, Block.of(self.remaining), host)


def try_in_process(kernel: Kernel, trial: Trial, crew: Crew) -> Probe | Failure:
    """Make a probe in a worker process of this machine, and leave it to the crew; nothing is known if it dies."""
    lane = Lane(kernel, crew)
    try:
        made: Probe | Failure = pickle.loads(lane.do(trial))
        lane.give_back()
        return made
    except Died as died:
        return _crashed(f"a worker process, which {died}")
    finally:
        lane.end()


def try_on_cluster(client: Any, packed: bytes, trial: Trial) -> Probe | Failure:
    """Make a probe on one worker of a cluster, the least busy one; nothing is known if the function ends that.

    A worker that is sent away meanwhile, or whose answer is lost with the connection, tells nothing of the function:
    then another one tries, five times at most.

    Raises
    ------
    WorkerError
        If there are no workers, or the cluster does not answer, for about a minute; if no worker stays.

    Notes
    -----
    A task, bound to its worker: where workers come and go as tasks call for them, that would else be taken for idle and
    sent away; and what the function does may depend on it. In a task `distributed.get_worker` works, and whatever waits
    for other tasks, as a Dask array does, lets others have its thread.
    """
    for _ in range(_ATTEMPTS):
        pulse = Pulse(client, count_threads(client))
        try:
            address = least_busy(client)
            if address is None:
                continue
            with _as_task(client, packed, trial, address) as question:
                made = _wait_for(question, client, address, pulse, trial)
            if made is not None:
                return made
            if not _is_lost(client, address, pulse):
                continue
            if not was_sent_away(client, address):
                return _crashed(f"the worker {address}, which is gone")
        finally:
            pulse.close()
    raise WorkerError(
        f"client: {_ATTEMPTS} workers of the cluster {client.scheduler.address} were sent away, or gave no answer, "
        "while they tried the function on a few positions. Give a cluster whose workers stay."
    )


def _wait_for(question: Any, client: Any, address: str, pulse: Pulse, trial: Trial) -> Probe | Failure | None:
    """Wait for a worker's answer; None if there is none, since the worker or the connection is lost."""
    while not wait([question], _LOOK_SECONDS).done:
        pulse.check()
        if pulse.is_connected() and is_gone(client, address):
            return None
    from distributed import KilledWorker

    try:
        made: Probe | Failure = question.result()
        return made
    except (OSError, CancelledError, KilledWorker):  # of the connection to the scheduler; of a worker that is gone
        return None
    except Exception as error:  # of a worker that cannot load what it is to do
        return trial.failure(error, "")


def _is_lost(client: Any, address: str, pulse: Pulse) -> bool:
    """Tell whether a worker that gave no answer is gone, which the scheduler may not have noticed yet."""
    deadline = time.monotonic() + _NOTICED_SECONDS
    while True:
        pulse.check()
        if pulse.is_connected():
            if is_gone(client, address):
                return True
            if time.monotonic() > deadline:
                return False
        time.sleep(_LOOK_SECONDS)


@contextmanager
def _as_task(client: Any, packed: bytes, trial: Trial, address: str) -> Iterator[Future[Any]]:
    """Have a worker make the probe as a task that nobody else gets."""
    key = f"try-{uuid.uuid4().hex}"
    options = {"workers": [address], "allow_other_workers": False, "priority": 1}  # before what waits there already
    task = submit(client, trial.answer, packed, key=key, **options)
    question = ask(client, client.gather(task, asynchronous=True))
    try:
        yield question
    finally:
        question.cancel()
        if client.status == "running":
            with suppress(Exception):  # the connection may break just now: then the scheduler drops it itself
                task.cancel()


def _crashed(where: str) -> Probe:
    log.warning(
        "the function was tried on a few positions in %s: a crash in native code, too little memory, or it had to "
        "leave. The run goes on with small blocks; those that end their workers again are given up, and named",
        where,
    )
    return Probe.unknown()
