"""Whether a cluster is still there: asked in the background, so that no question can hold up the driver."""

from __future__ import annotations

import logging
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from lazyproc.core.errors import WorkerError

PATIENCE_SECONDS = 60.0
"""How long a cluster may be without workers, without a connection, or without an answer."""
_QUIET_SECONDS = 5.0
"""How often to ask while no block ends."""
_BUSY_SECONDS = 30.0
"""How often to ask while blocks end."""
_ELASTIC_SECONDS = 2.0
"""How often to ask where workers are expected to come and go."""
_STUCK = 2
"""So many times longer workers may do nothing: longer in all, with all attempts, than Dask keeps one that is mute."""
_GO_ON = "All that was finished is kept; the same call goes on from there, on another cluster, or without a client."

log = logging.getLogger("lazyproc")


def ask(client: Any, question: Coroutine[Any, Any, Any]) -> Future[Any]:
    """Put a question to a cluster from any thread, and do not wait for the answer."""
    import asyncio  # 10 ms, and there is a cluster in one run of many

    return asyncio.run_coroutine_threadsafe(question, client.loop.asyncio_loop)


def answer(client: Any, question: Coroutine[Any, Any, Any], what: str) -> Any:
    """Put a question to a cluster, and wait for the answer, but not for ever.

    Raises
    ------
    WorkerError
        If none comes, or an error.
    """
    future = ask(client, question)
    try:
        return future.result(PATIENCE_SECONDS)
    except (OSError, TimeoutError) as error:  # a scheduler that has died, or is stopped
        raise WorkerError(
            f"client: the cluster {_address(client)} does not answer ({what}; {type(error).__name__}: {error}). Is it "
            "still running? Give a client of another cluster, or leave it out."
        ) from error
    finally:
        future.cancel()


def _address(client: Any) -> str:
    return str(getattr(client.scheduler, "address", "that was closed"))


def are_coming(client: Any) -> bool:
    """Tell whether the cluster has asked for workers that are not there yet, as jobs that wait in a queue.

    Only a cluster knows that whose object is in this process. Workers of this machine come at once, or not at all.
    """
    from distributed import LocalCluster

    cluster = getattr(client, "cluster", None)
    if cluster is None or isinstance(cluster, LocalCluster):
        return False
    try:  # numbers, since names need not be the same; `requested` forgets those that have died, `plan` does not
        return len(cluster.requested) > len(cluster.observed)
    except (AttributeError, RuntimeError):  # not that kind of cluster; or its own thread has just changed it
        return False


class Pulse:
    """Watches the connection to a cluster, and who works there.

    Parameters
    ----------
    client : Client
        The cluster's client.
    n_threads : int
        How many threads its workers have now.
    elastic : bool, optional
        Whether workers are expected to come and go, so that it is worth asking often.

    Attributes
    ----------
    n_threads : int
        The same, kept up to date: workers may go and come, and pause for lack of memory.
    n_all : int
        With those of workers that pause.

    Notes
    -----
    A client that loses its connection tries for some time to get it back (``distributed.comm.timeouts.connect``, 30 s)
    and then closes itself. A scheduler may also stop to answer while the connection stands, and all workers may be
    gone, or have stopped taking tasks for lack of memory: each of these is borne for `PATIENCE_SECONDS`; workers that
    are known to be on their way, as jobs in a queue, are waited for as long as they are.

    Workers may also wait for each other without end: one that is to have the function from another one, which is
    stopped though its connection stands, waits for as long as that lasts. `is_stuck` tells of that.
    """

    def __init__(self, client: Any, n_threads: int, *, elastic: bool = False) -> None:
        self.n_threads = self.n_all = n_threads
        self._told = 0.0
        self._busy_seconds = _ELASTIC_SECONDS if elastic else _BUSY_SECONDS
        self._client = client
        self._address = _address(client)
        self._looked = self._asked = self._busy = time.monotonic()
        self._question: Future[Any] | None = None
        self._since: dict[str, float] = {}
        """Since when something is wrong: the connection "cut", the scheduler "mute", the workers "away", or "idle"."""
        self._workers = ""

    def beat(self) -> None:
        """Note that a block has ended: the cluster is there."""
        self._busy = time.monotonic()
        self._since.clear()

    def is_connected(self) -> bool:
        """Tell whether the client has its connection at this moment."""
        return bool(self._client.status == "running")

    def check(self) -> None:
        """Look how things are; for each turn of the driver. Never waits.

        Raises
        ------
        WorkerError
            If the connection, the scheduler, or all workers are gone for too long.
        """
        now = time.monotonic()
        absence, self._looked = now - self._looked, now
        if absence > _QUIET_SECONDS:  # it was the driver that was away: stopped, or busy with its disk
            self._since = {what: since + absence for what, since in self._since.items()}
        self._note("cut", not self.is_connected())
        if self.is_connected():
            self._listen()
        else:
            self._note("mute", False)
        if self._client.status in ("closing", "closed") or self._too_long("cut"):
            raise WorkerError(
                f"client: the connection to the cluster {self._address} is lost: its scheduler has ended or cannot be "
                f"reached any longer, or the client was closed. {_GO_ON}"
            )
        if self._too_long("mute"):
            raise WorkerError(
                f"client: the scheduler of the cluster {self._address} has not answered for {PATIENCE_SECONDS:g} s, "
                f"though the connection stands: it is stopped, or overloaded. {_GO_ON}"
            )
        if self._too_long("away"):
            self._bear_absence()

    def _bear_absence(self) -> None:
        """Wait for workers that are on their way, and say so once a minute."""
        if not are_coming(self._client):
            raise WorkerError(
                f"client: the cluster {self._address} has had no worker that takes tasks for {PATIENCE_SECONDS:g} s "
                f"({self._workers}). {_GO_ON}"
            )
        if self._looked - self._told > PATIENCE_SECONDS:
            self._told = self._looked
            log.warning("waiting for workers that the cluster %s has asked for: %s", self._address, self._workers)

    def is_stuck(self) -> bool:
        """Tell whether workers have been there for long without one of them at a task."""
        return self._too_long("idle", _STUCK)

    def _note(self, what: str, wrong: bool) -> None:
        if wrong:
            self._since.setdefault(what, self._looked)
        else:
            self._since.pop(what, None)

    def _too_long(self, what: str, times: int = 1) -> bool:
        return self._looked - self._since.get(what, self._looked) > times * PATIENCE_SECONDS

    def _listen(self) -> None:
        """Take the answer if it has come, and ask again when it is time."""
        if self._question is not None and self._question.done():
            if not self._question.cancelled() and self._question.exception() is None:
                self._note("mute", False)
                self._count(self._question.result()["workers"])
            self._question, self._asked = None, self._looked
        is_quiet = self._looked - self._busy > _QUIET_SECONDS
        pause = min(_QUIET_SECONDS if is_quiet else self._busy_seconds, PATIENCE_SECONDS / 4)
        scheduler = self._client.scheduler
        if self._question is None and self._looked - self._asked >= pause and scheduler is not None:
            self._question = ask(self._client, scheduler.identity())
        if self._question is not None:
            self._note("mute", True)  # until it answers

    def _count(self, workers: dict[str, Any]) -> None:
        running = [one for one in workers.values() if one.get("status") == "running"]
        counts = [one.get("metrics", {}).get("task_counts", {}) for one in workers.values()]
        executing = sum(count.get("executing", 0) + count.get("long-running", 0) for count in counts)
        self.n_threads = sum(one["nthreads"] for one in running)
        self.n_all = sum(one["nthreads"] for one in workers.values())
        self._workers = f"{len(workers)} paused, as they do for lack of memory" if workers else "all workers are gone"
        self._note("away", not running and not executing)
        self._note("idle", bool(running) and not executing)

    def close(self) -> None:
        """Ask no more."""
        if self._question is not None:
            self._question.cancel()
