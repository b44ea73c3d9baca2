"""Whether a cluster is still there: asked in the background, so that no question can hold up the driver."""

from __future__ import annotations

import asyncio
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
_GO_ON = "All that was finished is kept; the same call goes on from there, on another cluster, or without a client."


def ask(client: Any, question: Coroutine[Any, Any, Any]) -> Future[Any]:
    """Put a question to a cluster from any thread, and do not wait for the answer."""
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


class Pulse:
    """Watches the connection to a cluster, and who works there.

    Parameters
    ----------
    client : Client
        The cluster's client.
    n_threads : int
        How many threads its workers have now.

    Attributes
    ----------
    n_threads : int
        The same, kept up to date: workers may go and come.

    Notes
    -----
    A client that loses its connection tries for some time to get it back (``distributed.comm.timeouts.connect``, 30 s)
    and then closes itself. A scheduler may also stop to answer while the connection stands, and all workers may be
    gone, or have stopped taking tasks for lack of memory: each of these is borne for `PATIENCE_SECONDS`.
    """

    def __init__(self, client: Any, n_threads: int) -> None:
        now = time.monotonic()
        self.n_threads = n_threads
        self._client = client
        self._address = _address(client)
        self._looked = self._asked = self._busy = now
        self._connected = self._heard = self._manned = now
        self._question: Future[Any] | None = None
        self._idle = ""

    def beat(self) -> None:
        """Note that a block has ended: the cluster is there."""
        self._busy = self._heard = self._manned = time.monotonic()

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
        away, self._looked = now - self._looked, now
        if away > _QUIET_SECONDS:  # it was the driver that was away: stopped, suspended, busy with its disk
            self._connected, self._heard, self._manned = self._connected + away, self._heard + away, self._manned + away
        if self._client.status in ("closing", "closed") or now - self._connected > PATIENCE_SECONDS:
            raise WorkerError(
                f"client: the connection to the cluster {self._address} is lost: its scheduler has ended or cannot be "
                f"reached any longer, or the client was closed. {_GO_ON}"
            )
        if not self.is_connected():
            self._heard = self._manned = now
            return
        self._connected = now
        self._listen(now)
        if now - self._heard > PATIENCE_SECONDS:
            raise WorkerError(
                f"client: the scheduler of the cluster {self._address} has not answered for {PATIENCE_SECONDS:g} s, "
                f"though the connection stands: it is stopped, or overloaded. {_GO_ON}"
            )
        if now - self._manned > PATIENCE_SECONDS:
            raise WorkerError(
                f"client: the cluster {self._address} has had no worker that takes tasks for {PATIENCE_SECONDS:g} s "
                f"({self._idle}). {_GO_ON}"
            )

    def _listen(self, now: float) -> None:
        """Take the answer if it has come, and ask again when it is time."""
        if self._question is not None and self._question.done():
            if not self._question.cancelled() and self._question.exception() is None:
                self._heard = now
                self._count(self._question.result()["workers"], now)
            self._question, self._asked = None, now
        pause = _QUIET_SECONDS if now - self._busy > _QUIET_SECONDS else _BUSY_SECONDS
        if self._question is None and now - self._asked >= pause:
            scheduler = self._client.scheduler
            if scheduler is not None:
                self._question = ask(self._client, scheduler.identity())

    def _count(self, workers: dict[str, Any], now: float) -> None:
        running = [one for one in workers.values() if one.get("status") == "running"]
        self.n_threads = sum(one["nthreads"] for one in running)
        executing = sum(one.get("metrics", {}).get("executing", 0) for one in workers.values())
        if running or executing:
            self._manned = now
        elif workers:
            self._idle = f"{len(workers)} paused, as they do for lack of memory"
        else:
            self._idle = "all workers are gone"

    def close(self) -> None:
        """Ask no more."""
        if self._question is not None:
            self._question.cancel()
