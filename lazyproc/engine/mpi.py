"""An MPI job as a Dask cluster: rank 0 goes on with the script, all others serve as workers and leave with it.

::

    rank 0, the driver                 each other rank
    waits for all        <---------    hello: machine, cores, memory
    scheduler, lines
    orders to each       --------->    orders: where the scheduler is, its share of memory
    client, the script                 a Dask worker, until it is told to leave, or the line to the driver is cut
    the script ends      --------->    end, with the exit code; the worker closes
    meets all            <-------->    meets all; MPI is finalised, and the process ends

MPI carries four small messages a rank; everything else is Dask's. Every wait asks again and again, has a limit, and ends
in `Abort`, so that nothing hangs; what may block inside of the MPI library is watched by a timer that needs no Python.
dask-mpi's own functions are not used: they take the main thread, where signals are handled, from the script, wait
without a limit, need three ranks, and lose the exit code. A script may use dask-mpi by itself.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from lazyproc.core.errors import LaunchError
from lazyproc.engine.launch import Launch
from lazyproc.engine.line import LineAddress, Switchboard

_HELLO, _ORDERS, _END = 27701, 27702, 27703
"""Tags of our messages, unlikely to be anybody else's."""
_END_SECONDS = 30.0
"""How long ranks may take from the end of the script until they all meet."""
_ABORT_SECONDS = 5.0
_FIRST_PAUSE, _LAST_PAUSE = 0.001, 0.05
LOST = 1
"""Exit code of a job that lost a rank, or did not come up."""

log = logging.getLogger("lazyproc")


@dataclass(frozen=True)
class Hello:
    """What a rank tells of itself.

    Attributes
    ----------
    machine : str
        Its host name.
    cores : frozenset of int
        The cores that it may use.
    n_cores : int
        How many of them at a time, by the quota of its control group.
    memory : int
        Bytes that the machine, or the control group, has.
    """

    machine: str
    cores: frozenset[int]
    n_cores: int
    memory: int


@dataclass(frozen=True)
class Orders:
    """What a rank is told.

    Attributes
    ----------
    scheduler : str
        The address of Dask's scheduler.
    host : str or None
        The address to listen at; None: the one from which the scheduler is reached.
    line : LineAddress
        Where the driver is called.
    memory : int
        Bytes for this rank.
    """

    scheduler: str
    host: str | None
    line: LineAddress
    memory: int


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
        self.comm = self._mpi.COMM_WORLD
        self.rank, self.size = int(self.comm.rank), int(self.comm.size)
        told = launch.size if launch.size is not None else max(self.size, launch.rank + 1)
        if self.size != told:
            _refuse(
                launch,
                f"{launch.told_by}: {told} processes were launched, but for the MPI library of mpi4py "
                f"({self._mpi.Get_library_version().split(',')[0].strip()}) there are {self.size}: each would do the "
                "whole work. Use the mpiexec that belongs to this library: the one of the environment that Python runs "
                f"in, perhaps {os.path.join(os.path.dirname(sys.executable), 'mpiexec')}; or the --mpi= of srun for it.",
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
        _flush()
        with _library_watched(_ABORT_SECONDS), suppress(Exception):
            self.comm.Abort(code)
        os._exit(code)

    def alone(self) -> Any:
        """Return the communicator of this rank only."""
        return self._mpi.COMM_SELF


class Job:
    """The driver's side: the scheduler, and what it takes to let the others go.

    Parameters
    ----------
    world : World
        All ranks.
    hellos : dict of int to Hello
        What each rank said.
    dashboard_address : str
        Where Dask's dashboard listens.
    interface : str or None
        The network interface between machines.
    memory : int or None
        Bytes for the ranks of a machine together; None: what it has.
    """

    def __init__(
        self,
        world: World,
        hellos: dict[int, Hello],
        dashboard_address: str,
        interface: str | None = None,
        memory: int | None = None,
    ) -> None:
        from lazyproc.engine.processes import start_in_process
        from lazyproc.engine.scheduler import address_of_this_machine, start_scheduler

        self._world = world
        self._hellos = hellos
        self._process = os.getpid()
        self._code: int | None = None
        machines = _machines(hellos)
        self.size = world.size
        self.n_machines = len(machines)
        self.native_threads = min(_cores(said) // len(said) or 1 for said in machines.values())
        host = "127.0.0.1" if self.n_machines == 1 else address_of_this_machine(interface)
        self._joined = False
        if self.size > 1:
            self.cluster = start_scheduler(host, dashboard_address, "MPI job")
        else:
            self.cluster = start_in_process(dashboard_address)
        self._switchboard = Switchboard(host, self._lost)
        for rank in range(1, self.size):
            ours = machines[hellos[rank].machine]
            share = min(one.memory for one in ours) if memory is None else memory
            world.send(
                Orders(
                    self.cluster.scheduler_address,
                    host if self.n_machines == 1 else None,
                    self._switchboard.address,
                    share // len(ours),
                ),
                rank,
                _ORDERS,
            )

    def owns(self, client: Any) -> bool:
        """Tell whether a client is connected to the ranks of this job."""
        return client is not None and getattr(client, "cluster", None) is self.cluster

    def wait_for_workers(self, client: Any) -> None:
        """Wait until all ranks have joined, once.

        Raises
        ------
        TimeoutError
            If they have not within the limit for the start.
        """
        if not self._joined:
            client.wait_for_workers(max(1, self.size - 1), timeout=self._world.limit)
        self._joined = True

    def communicator(self) -> Any:
        """Return a communicator that holds only the driver: what old code does with it cannot hang."""
        return self._world.alone()

    def leaves_with(self, error: BaseException | None) -> None:
        """Note what comes out of the part of the script that uses the job."""
        self._code = _code_of(error) if isinstance(error, SystemExit) else None

    def end(self) -> None:
        """Let the others go, with the exit code that this process will have as far as it can be known here."""
        if os.getpid() != self._process:
            return  # in a fork of the driver
        ignore_signals()  # it ends as soon as it can
        _flush()
        uncaught = getattr(sys, "last_type", None)
        code = 0 if self._code is None else self._code
        if uncaught is not None:
            code = 130 if issubclass(uncaught, KeyboardInterrupt) else 1
        self._switchboard.close()
        for rank in range(1, self.size):
            self._world.send(code, rank, _END)
        self._world.end(code)
        from lazyproc.engine.scheduler import stop_scheduler

        stop_scheduler(self.cluster)

    def _lost(self, rank: int) -> None:
        """End the job since a rank is gone: in a thread of the switchboard."""
        where = self._hellos[rank].machine
        self._world.abort(
            LOST, f"rank {rank} on {where} is gone, and the job ends with it. What was committed is kept: run it again."
        )


_job: Job | None = None
"""The job that this process drives. A process can be part of one only, since MPI starts and ends once."""


def join(
    launch: Launch,
    *,
    dashboard_address: str,
    interface: str | None = None,
    memory: int | None = None,
    limit: float | None = None,
) -> Job:
    """Become part of the MPI job: returns in rank 0; the others serve until the script ends, and never return.

    Parameters
    ----------
    launch : Launch
        What the launcher says.
    dashboard_address : str
        Where Dask's dashboard listens.
    interface : str, optional
        The network interface between machines.
    memory : int, optional
        Bytes for the ranks of a machine together. Default: what it has.
    limit : float, optional
        Seconds for all ranks to arrive. Default: a minute, and half a second a rank.

    Raises
    ------
    LaunchError
        If the launcher and the MPI library do not belong together, or there is no MPI library.
    """
    global _job
    if _job is not None:
        return _job
    world = World(launch, 60.0 + 0.5 * (launch.size or 0) if limit is None else limit)
    if world.rank:
        from lazyproc.engine.serve import serve

        serve(world, _hello())
    try:
        hellos = {0: _hello(), **_gather(world)}
        _job = Job(world, hellos, dashboard_address, interface, memory)
    except BaseException as error:
        world.abort(_code_of(error), f"{type(error).__name__}: {error}")
    atexit.register(_job.end)
    return _job


def job() -> Job | None:
    """Return the job that this process drives, if it does."""
    return _job


def ignore_signals() -> None:
    """Leave what launchers and terminals send to all processes of a job without effect, and without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        with suppress(ValueError):  # not in the main thread
            signal.signal(number, signal.SIG_IGN)


def mpi_attributes(client: Any = None) -> tuple[Any, int, int]:
    """Return what `Process` has as ``mpi_comm``, ``mpi_rank`` and ``mpi_size``.

    Parameters
    ----------
    client : Client, optional
        The client that was handed over. Default: the active one.

    Returns
    -------
    tuple
        In the driver of an MPI job (this module's, or one that the script has made with dask-mpi): a communicator that
        holds this process only, so that nobody else is waited for, the rank 0, and the number of ranks. Else None, 0
        and 1.
    """
    from lazyproc.engine.cluster import active_client

    if _job is not None and _job.size > 1:
        return _job.communicator(), 0, _job.size
    library = sys.modules.get("mpi4py.MPI")
    if library is None or (client or active_client()) is None:
        return None, 0, 1
    if not library.Is_initialized() or library.Is_finalized() or library.COMM_WORLD.size == 1:
        return None, 0, 1
    return library.COMM_SELF, 0, int(library.COMM_WORLD.size)


def orders(world: World, hello: Hello) -> Orders:
    """Say hello to the driver and return its orders; in a rank that serves."""
    world.send(hello, 0, _HELLO)
    told = world.wait_for(lambda: world.receive(0, _ORDERS), world.limit)
    if told is None:
        world.abort(LOST, f"rank 0 has given no orders within {world.limit:g} s: has its script come to cluster()?")
    assert isinstance(told, Orders)
    return told


def told_to_leave(world: World) -> int | None:
    """Return the exit code to leave with, once the script has ended; in a rank that serves."""
    code: int | None = world.receive(0, _END)
    return code


def leave(world: World, code: int) -> NoReturn:
    """End this process, together with all others of the job.

    Notes
    -----
    By C's ``exit``, with Python's lock held: MPICH takes a process for failed that ends by ``_exit``, even after it
    was finalised; and a normal end of Python would run what belongs to the script, and wait for its threads.
    """
    import ctypes

    _flush()
    world.end(code)
    ctypes.PyDLL(None).exit(code)
    os._exit(code)


def _gather(world: World) -> dict[int, Hello]:
    """Wait until all others have said hello."""
    hellos: dict[int, Hello] = {}

    def all_there() -> bool | None:
        for rank in range(1, world.size):
            if rank not in hellos and (hello := world.receive(rank, _HELLO)) is not None:
                hellos[rank] = hello
        return True if len(hellos) == world.size - 1 else None

    if world.wait_for(all_there, world.limit) is None:
        missing = [rank for rank in range(1, world.size) if rank not in hellos]
        raise LaunchError(
            f"{len(missing)} of {world.size} ranks have not come to lazyproc.cluster() within {world.limit:g} s, rank "
            f"{missing[0]} among them. Call it in all ranks, near the top of the script; where starting takes longer, "
            "give it a longer timeout=."
        )
    return hellos


def _hello() -> Hello:
    from distributed.system import MEMORY_LIMIT

    from lazyproc.engine.choose import available_cores

    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Hello(socket.gethostname(), frozenset(cores), available_cores(), int(MEMORY_LIMIT))


def _machines(hellos: dict[int, Hello]) -> dict[str, list[Hello]]:
    machines: dict[str, list[Hello]] = {}
    for hello in hellos.values():
        machines.setdefault(hello.machine, []).append(hello)
    return machines


def _cores(said: list[Hello]) -> int:
    """Return the cores that the ranks of a machine have together: those they share, or each its own."""
    if len({hello.cores for hello in said}) == 1:
        return max(hello.n_cores for hello in said)
    return len(frozenset().union(*(hello.cores for hello in said)))


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
    _flush()
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


def _code_of(error: BaseException | None) -> int:
    """Return the exit code that Python would have after an error."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return 0 if error.code is None else error.code & 0xFF if isinstance(error.code, int) else 1
    return LOST


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
