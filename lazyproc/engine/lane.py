"""Worker processes that do one block at a time each, and whose death concerns nobody but that block.

A lane is a process and a socket to it: a block goes there, a receipt comes back. Nothing is shared between lanes, no
queue and no lock, so a process that dies (a crash in native code, the system's memory killer) leaves all others at
their work, and which block it had is known. A new process then takes its place.
"""

from __future__ import annotations

import logging
import pickle
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.errors import WorkerError
from lazyproc.core.learn import Room
from lazyproc.engine.block_function import run_part
from lazyproc.engine.crew import Crew, kill
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.packing import pack_once
from lazyproc.engine.receipt import Receipt
from lazyproc.engine.worker import LOOK_SECONDS

_LEAVE_SECONDS = 5.0
"""How long a worker process that has nothing more to do may take to end."""
_DEATHS_IN_A_ROW = 100
"""So many processes may die without one block being finished in between."""
_STARTS = 3
"""So many processes may die, one after the other, before they are ready for a block."""

log = logging.getLogger("lazyproc")


class Died(Exception):
    """The process has died; tells how, and whether it had a block."""

    def __init__(self, how: str, *, was_ready: bool) -> None:
        super().__init__(how)
        self.was_ready = was_ready


class Lane:
    """One worker process, started when there is a first block for it, and again after it died."""

    def __init__(self, kernel: Kernel, crew: Crew) -> None:
        self._kernel = kernel
        self._crew = crew
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: Any = None

    def do(self, work: Any) -> bytes:
        """Do a block, or a trial, and return the pickled receipt, or what the trial has shown; raises `Died`."""
        ready = self._process is not None
        try:
            if not ready:
                self._start()
                self._receive()  # it is here
                self._receive()  # and has the kernel
                ready = True
            self._socket.send(work)
            return self._receive()
        except (EOFError, OSError) as error:
            how = self._how_it_died(error)
            self.end()
            raise Died(how, was_ready=ready) from error

    @property
    def is_started(self) -> bool:
        """Whether there is a process, to which the kernel was sent."""
        return self._process is not None

    def _start(self) -> None:
        packed = pack_once(self._kernel)
        self._process, self._socket = self._crew.take()
        self._socket.send(self._kernel.run_details)
        self._socket.send_bytes(packed)

    def _receive(self) -> bytes:
        while not self._socket.poll(LOOK_SECONDS):
            # Most often the socket tells at once; not if a process that the function has forked holds its other end.
            if self._process is not None and self._process.poll() is not None and not self._socket.poll():
                raise EOFError
        received: bytes = self._socket.recv_bytes()
        return received

    def _how_it_died(self, error: Exception) -> str:
        process = self._process
        if process is None:
            return f"could not be started ({error})"
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LEAVE_SECONDS)
        code = process.returncode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was killed by {name}"

    def give_back(self) -> None:
        """Let the crew have the process, which waits for another kernel: its work was a trial."""
        if self._process is not None:
            self._crew.give_back((self._process, self._socket))
        self._process = self._socket = None

    def hang_up(self) -> None:
        """Tell the process to end; when no thread uses the lane."""
        if self._socket is not None:
            self._socket.close()

    def kill(self) -> None:
        """Kill the process; from any thread."""
        if self._process is not None:
            kill(self._process)

    def end(self, seconds: float = 0.0) -> None:
        """Wait so long for the process to end, then kill it; when no other thread uses the lane."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, seconds))
            kill(self._process)
            self._process.wait()
            self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Lanes:
    """Worker processes of one kernel; `do` may be called from as many threads as there are.

    Parameters
    ----------
    kernel : Kernel
        What is done; its bytes are let go of when all processes have them.
    n_workers : int
        How many processes.
    attempts : int
        How often a block may be tried whose process dies.
    crew : Crew, optional
        Where the processes come from; the caller closes it. Default: they are started when there are blocks for them.
    keep : bool
        Keep the bytes all the same, for processes that take the place of others: the function may be changing its
        arguments here meanwhile.

    Attributes
    ----------
    error : WorkerError or None
        Why no more blocks are done: processes die whatever they do.
    """

    def __init__(
        self, kernel: Kernel, n_workers: int, attempts: int, crew: Crew | None = None, *, keep: bool = False
    ) -> None:
        self.error: WorkerError | None = None
        self._attempts = attempts
        self._parcel = kernel.parcel
        self._keep = keep
        crew = crew or Crew()
        self._lanes = [Lane(kernel, crew) for _ in range(n_workers)]
        self._free: queue.LifoQueue[Lane] = queue.LifoQueue()  # the last one's process is running
        for lane in reversed(self._lanes):
            self._free.put(lane)
        self._closed = False
        self._counting = threading.Lock()
        self._deaths = self._bad_starts = 0

    def do(self, block: Block, wanted: Callable[[], bool], room: Room | None = None) -> Receipt | None:
        """Do a block as soon as a lane is free: as much of it, in as many lanes, as there is room for by then.

        Returns
        -------
        Receipt or None
            With a failure of the kind ``"lost"`` if its process died each time; a block that ran out of memory was
            tried again in a fresh process. None if it is not `wanted` anymore before it began, or all is being closed.
        """
        for attempt in range(1, self._attempts + 1):
            lane = self._free.get()
            try:
                if self._closed or self.error is not None or not wanted():
                    return None
                most = None if room is None else room.rows
                receipt: Receipt = run_part(block, most, lambda part: pickle.loads(lane.do(part)))  # noqa: B023
                self._deaths = self._bad_starts = 0
                self._let_go()
                if not receipt.out_of_memory or attempt == self._attempts:
                    return receipt
                lane.end()  # what the system, or a fragmented heap, refuses to this process it may give to a new one
                log.warning("block of positions %d to %d: out of memory, tried again", block.start, block.stop - 1)
            except Died as died:
                if self._closed:
                    return None
                self._count(died)
                error = WorkerError(f"The worker process {died}.")
                log.warning(
                    "a worker process was lost: it %s with the block of positions %d to %d under way%s",
                    died,
                    block.start,
                    block.stop - 1,
                    "; the block is tried again" if attempt < self._attempts else "",
                )
            finally:
                if not self._retire(lane, room):
                    self._free.put(lane)
        return Receipt(block, failure=Failure.of_lost(error, block))

    def _let_go(self) -> None:
        """Let go of the kernel's bytes if no process is to get them, unless it takes the place of another."""
        with self._counting:
            if not self._keep and all(lane.is_started for lane in self._lanes):
                self._parcel.let_go()

    def _retire(self, lane: Lane, room: Room | None) -> bool:
        """End a process for good if there are more than memory allows: what it keeps is needed by the others."""
        with self._counting:
            if room is None or self._closed or len(self._lanes) <= room.n_workers:
                return False
            self._lanes.remove(lane)
        lane.hang_up()
        lane.end(_LEAVE_SECONDS)
        return True

    def _count(self, died: Died) -> None:
        """Give up where dying has nothing to do with the blocks."""
        self._deaths += 1
        self._bad_starts = 0 if died.was_ready else self._bad_starts + 1
        if self._bad_starts >= _STARTS:
            self.error = WorkerError(
                f"Worker processes do not start: the last one {died}. See what it wrote to standard error; too little "
                "memory, or too many processes? With cores=1 all is done in this process. Finished blocks are kept."
            )
        elif self._deaths >= _DEATHS_IN_A_ROW:
            self.error = WorkerError(
                f"{_DEATHS_IN_A_ROW} worker processes died without one block being finished in between; the last one "
                f"{died}. A crash in native code, or too little memory: try test(), or a smaller max_mem_mb. Finished "
                "blocks are kept."
            )

    def close(self, *, kill: bool = False) -> None:
        """End the processes; with `kill` whatever they are doing. None is left when this returns."""
        with self._counting:
            self._closed = True
        mine: list[Lane] = []
        while len(mine) < len(self._lanes):  # a thread gives its lane back as soon as its process has died
            for lane in self._lanes if kill else ():
                lane.kill()
            with suppress(queue.Empty):
                mine.append(self._free.get(timeout=LOOK_SECONDS))
        for lane in mine:
            lane.hang_up()
        deadline = time.monotonic() + (0.0 if kill else _LEAVE_SECONDS)
        for lane in mine:
            lane.end(deadline - time.monotonic())
            self._free.put(lane)  # for threads that still wait for one, to see that all is closed
        self._parcel.let_go()
