"""All ranks of an MPI job: messages between them that wait with a limit, and ways to end together, or at once.

Every wait asks again and again, has a limit, and ends in `World.abort`, so that nothing hangs. What may block inside of
the MPI library, with Python's lock held, is watched by a timer that needs no Python.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from lazyproc.core.errors import LaunchError
from lazyproc.engine.launch import Launch

LOST = 1
"""Exit code of a job that lost a rank, or did not come up."""
_END_SECONDS = 30.0
"""How long ranks may take from the end of the script until they all meet."""
_ABORT_SECONDS = 5.0
_FIRST_PAUSE, _LAST_PAUSE = 0.001, 0.05

log = logging.getLogger("lazyproc")


class World:
    """All ranks of the job, and messages between them that never wait without a limit.

    Parameters
    ----------
    launch : Launch
        What the launcher says.
    limit : float
        Seconds for the start.

    Raises
    ------
    LaunchError
        If the MPI library does not say the same. Only in the first of the processes; others leave.
    """

    def __init__(self, launch: Launch, limit: float) -> None:
        self.limit = limit
        with _library_watched(limit):
            self._mpi = _library(launch)
        _take_back(signal.SIGUSR1)
        self.comm = self._mpi.COMM_WORLD
        self.rank, self.size = int(self.comm.rank), int(self.comm.size)
        told = launch.size if launch.size is not None else max(self.size, launch.rank + 1)
        if self.size != told:
            _refuse(
                launch,
                f"{launch.told_by}: {told} processes were launched, but for the MPI library of mpi4py "
                f"({' '.join(self._mpi.Get_library_version().split(',')[0].split()[:3])}) this is rank {self.rank} of "
                f"{self.size}, so the work would be done several times. Use the mpiexec that belongs to this library, "
                f"perhaps {os.path.join(os.path.dirname(sys.executable), 'mpiexec')}; or the --mpi= of srun for it.",
            )
        self._sent: list[Any] = []

    def send(self, message: Any, rank: int, tag: int) -> None:
        """Send a small message and go on."""
        self._sent.append(self.comm.isend(message, rank, tag))

    def receive(self, rank: int, tag: int) -> Any:
        """Return a message if it has arrived, else None."""
        return self.comm.recv(source=rank, tag=tag) if self.comm.iprobe(rank, tag) else None

    def wait_for(self, answer: Callable[[], Any], limit: float) -> Any:
        """Ask until the answer is not None; None when the limit is over."""
        deadline, pause = time.monotonic() + limit, _FIRST_PAUSE
        while (found := answer()) is None and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(1.5 * pause, _LAST_PAUSE)
        return found

    def end(self, code: int) -> None:
        """Meet all others at the end, and finalise MPI; whoever does not come is ended."""
        if self._mpi.Is_finalized():
            return
        meeting = self.comm.Ibarrier()
        if self.wait_for(lambda: meeting.Test() or None, _END_SECONDS) is None:
            self.abort(code or LOST, f"not all ranks have come to the end within {_END_SECONDS:g} s; the job is ended")
        with _library_watched(_END_SECONDS):
            self._mpi.Finalize()

    def abort(self, code: int, why: str) -> NoReturn:
        """End all ranks at once, this one included."""
        log.error("rank %d on %s: %s", self.rank, socket.gethostname(), why)
        flush()
        with _library_watched(_ABORT_SECONDS), suppress(Exception):
            self.comm.Abort(code)
        os._exit(code)

    def alone(self) -> Any:
        """Return the communicator of this rank only."""
        return self._mpi.COMM_SELF


def _take_back(number: signal.Signals) -> None:
    """Let a signal do again what it did before: MPICH takes USR1 for news of dead ranks, and swallows Slurm's."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(number, signal.getsignal(number) or signal.SIG_DFL)


def ignore_signals() -> None:
    """Leave what launchers and terminals send to all processes of a job without effect, and without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        with suppress(ValueError):  # not in the main thread
            signal.signal(number, _go_on)  # unlike SIG_IGN not inherited by programs that a function starts


def _go_on(number: int, frame: FrameType | None) -> None:
    """Do nothing."""


def code_of(error: BaseException | None) -> int:
    """Return the exit code that Python would have after an error."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return 0 if error.code is None else error.code & 0xFF if isinstance(error.code, int) else 1
    return LOST


def flush() -> None:
    """Write out what was printed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def _library(launch: Launch) -> Any:
    """Load the MPI library, which initialises it."""
    if not launch.by_mpi:
        _refuse(
            launch,
            f"{launch.told_by}: srun has started {launch.size} processes that know nothing of each other: each would "
            "do the whole work. Use srun --mpi=pmi2 or --mpi=pmix (srun --mpi=list tells what there is), or mpiexec.",
        )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        _refuse(
            launch,
            f"{launch.told_by}: this process was launched by MPI, but mpi4py cannot be used ({error}). Install "
            "lazyproc[mpi], or mpi4py for the MPI library of this machine.",
        )
    if MPI.Is_finalized():
        _refuse(launch, "MPI was finalised before lazyproc.cluster() was called. Call it earlier, at the top.")
    if not MPI.Is_initialized():
        MPI.Init_thread()
    return MPI


def _refuse(launch: Launch, message: str) -> NoReturn:
    """Raise in the first process; end the others without a word: what the first one says, and its code, is enough."""
    if launch.is_driver:
        raise LaunchError(message)
    flush()
    os._exit(0)


@contextmanager
def _library_watched(limit: float) -> Iterator[None]:
    """End this process if a call of the MPI library takes too long: it may hold Python's lock for ever."""
    try:
        faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__ or sys.stderr)
    except (ValueError, OSError, RuntimeError, AttributeError):  # no standard error to write to
        yield
        return
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
