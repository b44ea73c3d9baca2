"""`cluster()`: one line at the top of a script, the same on a laptop, on a cluster, and under mpiexec or srun."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

from lazyproc.arguments import check_cores, check_memory
from lazyproc.core.errors import ArgumentValueError
from lazyproc.drain import stoppable
from lazyproc.engine.cluster import active_client
from lazyproc.engine.launch import Launch, detect
from lazyproc.engine.limits import available_cores, default_cores

_DASHBOARD = "127.0.0.1:0"
_WORKERS_SECONDS = 60.0
_A_SCHEDULER = "a file that `dask scheduler --scheduler-file` has written, or an address such as tcp://10.0.0.1:8786"


@contextmanager
def cluster(
    cores: int | None = None,
    *,
    max_mem_mb: int | None = None,
    scheduler: str | None = None,
    dashboard_address: str = _DASHBOARD,
    interface: str | None = None,
    timeout: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Any]:
    """Give a Dask client for as long as the context lasts; what it is connected to depends on how the script was begun.

    - Launched by MPI (``mpiexec -n 64 python script.py``, ``srun --mpi=…``): the ranks of the job. Rank 0 goes on with
      the script; in all others this call never returns: they serve as workers, one core each, until it ends. A single
      rank gets one worker process.
    - Else the client that is active already; else the scheduler that Dask's configuration names (``scheduler-address``,
      or the variable ``DASK_SCHEDULER_ADDRESS``); else worker processes of this machine. Neither needs
      ``if __name__ == "__main__"``.

    Parameters
    ----------
    cores : int, optional
        Worker processes on this machine. Default: all cores but two (all but one of four or fewer). MPI and existing
        clusters have their own.
    max_mem_mb : int, optional
        MiB at which Dask lets the workers of a machine, all together, pause. Default: what the machine has. What a run
        may take is bounded by `Process`.
    scheduler : str, optional
        The address of a Dask scheduler, such as ``"tcp://10.0.0.1:8786"``, or the file that it has written
        (``dask scheduler --scheduler-file``). Default: as said above. Not under MPI, nor where a client is active.
    dashboard_address : str
        Where the dashboard listens. By default only on the driver's machine, at a free port.
    interface : str, optional
        The network interface between machines, under MPI: such as ``"ib0"``.
    timeout : float, optional
        Seconds until all workers must have joined. Default: a minute, and under MPI half a second more for each rank.
    say : callable, optional
        Gets the line that tells where the dashboard is. Default: it goes to standard output.

    Yields
    ------
    distributed.Client
        The active client within the context, so that `Process` uses it by itself.

    Raises
    ------
    LaunchError
        If the launcher and the MPI library do not belong together.
    ArgumentValueError
        If a scheduler is given where there is a client already, or MPI; or it is no address, nor a file that has one.
    SystemExit
        With code 75, if SIGTERM or SIGUSR1 comes while no run is under way in the context: a job is to end, and what
        is open in the context is closed before. A run itself finishes its blocks first.
    TimeoutError, OSError
        If the workers do not join, or the scheduler cannot be reached.

    Notes
    -----
    Under MPI, put it near the top of the script: what stands above it runs in every rank. Ranks serve until the script
    ends, also between two such contexts. A rank that dies ends the job.

    Examples
    --------
    The same for a laptop, here with one worker process, and for ``mpiexec -n 64 python script.py``:

    >>> import lazyproc, numpy as np
    >>> with lazyproc.cluster(cores=1) as client:  # doctest: +ELLIPSIS
    ...     address = "scan.h5::/Measurement_000/Channel_000/Raw_Data"
    ...     group = lazyproc.map_positions(np.ptp, address, lazyproc.Output("f4"))
    lazyproc: ...dashboard...
    >>> float(group["ptp"][0, 0])
    5.0
    """
    wanted = check_cores(cores)
    n_workers = min(wanted, available_cores()) if wanted else default_cores()
    memory = check_memory(max_mem_mb)
    client, launch = active_client(), detect()
    if scheduler is not None and (client is not None or launch is not None):
        what = "there is an active client" if client is not None else "this was launched by mpiexec or srun"
        raise ArgumentValueError(f"scheduler: {scheduler} came, but {what}, which is used; expected one of both.")
    if say is None:
        say = _to_standard_output
    with ExitStack() as opened:
        if client is not None:
            pass
        elif launch is not None and launch.size != 1:
            client = _of_mpi(opened, launch, dashboard_address, interface, memory, timeout, say)
        else:
            address = configured_scheduler(scheduler) if launch is None else None
            if address is not None:
                client = _connect(opened, address, timeout)
            else:
                client = _of_this_machine(opened, launch, n_workers, memory, dashboard_address, timeout)
            say(f"lazyproc: {_dashboard(client, dashboard_address)}")
        with stoppable():
            yield client


def _of_mpi(
    opened: ExitStack,
    launch: Launch,
    dashboard_address: str,
    interface: str | None,
    memory: int | None,
    timeout: float | None,
    say: Callable[[str], None],
) -> Any:
    from lazyproc.engine import mpi

    job = mpi.join(launch, dashboard_address=dashboard_address, interface=interface, memory=memory, limit=timeout)
    opened.push(lambda kind, error, trace: job.leaves_with(error))
    client = _connect(opened, job.cluster, timeout)
    job.wait_for_workers(client)
    machines = "1 machine" if job.n_machines == 1 else f"{job.n_machines} machines"
    say(f"lazyproc: {job.size} MPI ranks on {machines}, {_dashboard(client, dashboard_address)}")
    return client


def configured_scheduler(wanted: str | None = None) -> str | None:
    """Return the address of the scheduler that is wanted, or else the one that Dask's configuration names, if any.

    Raises
    ------
    ArgumentValueError
        If what is wanted is a file that names none, or is neither a file nor an address.
    """
    if wanted is None:
        import dask

        return dask.config.get("scheduler-address", None) or None
    if not os.path.isfile(wanted):
        if "://" not in wanted and not re.search(r":\d+$", wanted):
            raise ArgumentValueError(
                f"there is no scheduler file {wanted}, and an address ends with a port; expected {_A_SCHEDULER}."
            )
        return wanted
    try:
        with open(wanted, encoding="utf-8") as file:
            return str(json.load(file)["address"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentValueError(
            f"scheduler: {wanted} is a file that names no address ({type(error).__name__}: {error}); expected "
            f"{_A_SCHEDULER}."
        ) from error


def _of_this_machine(
    opened: ExitStack,
    launch: Launch | None,
    n_workers: int,
    memory: int | None,
    dashboard_address: str,
    timeout: float | None,
) -> Any:
    """Start worker processes; just one for a single rank of MPI."""
    from lazyproc.engine.dask_scheduler import stop_scheduler
    from lazyproc.engine.processes import start_processes

    if launch is not None:
        n_workers = 1
    local = start_processes(n_workers, memory, dashboard_address)
    opened.callback(stop_scheduler, local)
    client = _connect(opened, local, timeout)
    client.wait_for_workers(n_workers, timeout=_WORKERS_SECONDS if timeout is None else timeout)
    return client


def _connect(opened: ExitStack, to: Any, timeout: float | None) -> Any:
    from distributed import Client

    try:
        client = Client(to, timeout=_WORKERS_SECONDS if timeout is None else timeout)
    except ValueError as error:
        if not isinstance(to, str):
            raise
        raise ArgumentValueError(
            f"scheduler: {to} is no address of a Dask scheduler ({error}); expected {_A_SCHEDULER}."
        ) from error
    return opened.enter_context(client)


def _dashboard(client: Any, listens_at: str) -> str:
    """Say where the dashboard is: on a cluster one has to make a tunnel to that machine."""
    if importlib.util.find_spec("bokeh") is None:
        return "no dashboard (Dask's needs bokeh: pip install bokeh)"
    link = str(client.dashboard_link)
    scheduler, host = urlsplit(client.scheduler.address).hostname, listens_at.rpartition(":")[0]
    if client.cluster is None or not host:  # somebody else's, or it listens everywhere
        return f"dashboard at {link}"
    return f"dashboard at {link.replace(f'//{scheduler}:', f'//{host}:')} on {socket.gethostname()}"


def _to_standard_output(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
