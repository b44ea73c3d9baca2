"""An MPI job as a Dask cluster: rank 0 goes on with the script, all others serve as workers and leave with it.

::

    rank 0, the driver                 each other rank
    waits for all        <---------    hello: machine, cores, memory
    scheduler, lines
    orders to each       --------->    orders: where the scheduler is, its share of memory and threads
    client, the script                 a Dask worker, until it is told to leave, or the line to the driver is cut
    the script ends      --------->    end; the worker closes
    meets all            <-------->    meets all; MPI is finalised, and the process ends with 0
    ends when all lines are cut: its exit code is the job's

MPI carries these few messages; everything else is Dask's. dask-mpi's own functions are not used: they take the main
thread, where signals are handled, from the script, wait without a limit, need three ranks, and lose the exit code. A
script may use dask-mpi by itself, and hand over the client.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from typing import Any

from lazyproc.core.errors import LaunchError
from lazyproc.engine import own_job
from lazyproc.engine.launch import Launch
from lazyproc.engine.line import Switchboard
from lazyproc.engine.messages import END, HELLO, ORDERS, Hello, Orders
from lazyproc.engine.world import LOST, World, code_of, flush, ignore_signals

_LAST_SECONDS = 5.0
"""How long the others may take to end once all have met."""


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

    Attributes
    ----------
    size, n_machines : int
        Ranks, the driver included, and machines that they are on.
    native_threads : int
        Threads of BLAS and OpenMP that a rank may have, on the machine where that is fewest.
    cluster : distributed.SpecCluster
        What a client connects to.
    """

    def __init__(
        self,
        world: World,
        hellos: dict[int, Hello],
        dashboard_address: str,
        interface: str | None = None,
        memory: int | None = None,
    ) -> None:
        from lazyproc.engine.dask_scheduler import address_of_this_machine, start_scheduler
        from lazyproc.engine.processes import start_processes

        self._world = world
        self._hellos = hellos
        self._process = os.getpid()
        self._code = 0
        self._joined = False
        machines = _machines(hellos)
        self.size = world.size
        self.n_machines = len(machines)
        self.native_threads = min(_threads(ours) for ours in machines.values())
        host = "127.0.0.1" if self.n_machines == 1 else address_of_this_machine(interface)
        self._switchboard = Switchboard(host, self._lost)
        if self.size == 1:
            self.cluster = start_processes(1, memory, dashboard_address)
            return
        self.cluster = start_scheduler(host, dashboard_address, "MPI job", patient=True)
        for rank in range(1, self.size):
            ours = machines[hellos[rank].machine]
            told = Orders(
                scheduler=self.cluster.scheduler_address,
                host=host if self.n_machines == 1 else None,
                line=self._switchboard.address,
                memory=(min(one.memory for one in ours) if memory is None else memory) // len(ours),
                threads=_threads(ours),
            )
            world.send(told, rank, ORDERS)

    def owns(self, client: Any) -> bool:
        """Tell whether a client is connected to the ranks of this job."""
        return client is not None and getattr(client, "cluster", None) is self.cluster

    def communicator(self) -> Any:
        """Return a communicator that holds only the driver: what old code does with it cannot hang."""
        return self._world.alone()

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

    def leaves_with(self, error: BaseException | None) -> None:
        """Note what comes out of the part of the script that uses the job: the script may still catch it."""
        self._code = code_of(error) if isinstance(error, SystemExit) else 0

    def end(self) -> None:
        """Let the others go, with 0: so the job has the exit code of this process, which cannot be known for sure here.

        What is raised last is known, and `SystemExit` if it came out of the part of the script that uses the job; it
        may have been caught since. That counts only if not all come to the end, and the job is aborted.
        """
        if os.getpid() != self._process:
            return  # in a fork of the driver
        from lazyproc.engine.dask_scheduler import stop_scheduler

        ignore_signals()  # it ends as soon as it can
        flush()
        uncaught = getattr(sys, "last_type", None)
        code = self._code if uncaught is None else 130 if issubclass(uncaught, KeyboardInterrupt) else 1
        self._switchboard.close()
        for rank in range(1, self.size):
            self._world.send(code, rank, END)
        self._world.end(code)
        stop_scheduler(self.cluster)
        if self.size > 1:
            self._switchboard.wait_until_cut(_LAST_SECONDS)  # some launchers kill whoever is left after a code like 75

    def _lost(self, rank: int) -> None:
        """End the job since a rank is gone: in the thread of the switchboard."""
        where = self._hellos[rank].machine
        self._world.abort(
            LOST, f"rank {rank} on {where} is gone, and the job ends with it. What was committed is kept: run it again."
        )


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
    driven = own_job.driven()
    if isinstance(driven, Job):
        return driven
    world = World(launch, 60.0 + 0.5 * (launch.size or 0) if limit is None else limit)
    if world.rank:
        from lazyproc.engine.serve import serve

        serve(world, hello())
    try:
        hellos = {0: hello(), **_gather(world)}
        job = Job(world, hellos, dashboard_address, interface, memory)
    except BaseException as error:
        world.abort(code_of(error), f"{type(error).__name__}: {error}")
    own_job.drive(job)
    atexit.register(job.end)
    return job


def hello() -> Hello:
    """Return what there is to say of this process."""
    from distributed.system import MEMORY_LIMIT

    from lazyproc.engine.limits import available_cores

    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Hello(socket.gethostname(), frozenset(cores), available_cores(), int(MEMORY_LIMIT))


def _gather(world: World) -> dict[int, Hello]:
    """Wait until all others have said hello."""
    hellos: dict[int, Hello] = {}

    def all_there() -> bool | None:
        for rank in range(1, world.size):
            if rank not in hellos and (said := world.receive(rank, HELLO)) is not None:
                hellos[rank] = said
        return True if len(hellos) == world.size - 1 else None

    if world.wait_for(all_there, world.limit) is None:
        missing = [rank for rank in range(1, world.size) if rank not in hellos]
        raise LaunchError(
            f"{len(missing)} of {world.size} ranks have not come to lazyproc.cluster() within {world.limit:g} s, rank "
            f"{missing[0]} among them. Call it in all ranks, near the top of the script; where starting takes longer, "
            "give it a longer timeout=."
        )
    return hellos


def _machines(hellos: dict[int, Hello]) -> dict[str, list[Hello]]:
    machines: dict[str, list[Hello]] = {}
    for said in hellos.values():
        machines.setdefault(said.machine, []).append(said)
    return machines


def _threads(ours: list[Hello]) -> int:
    """Return the share of each rank of a machine in its cores: those that they have in common, or each its own."""
    if len({one.cores for one in ours}) == 1:
        cores = max(one.n_cores for one in ours)
    else:
        cores = len(frozenset().union(*(one.cores for one in ours)))
    wished = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // len(ours), int(wished) if wished.isdigit() else cores))
