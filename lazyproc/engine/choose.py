"""Which scheduler a job gets: in the process, its threads, a pool of processes, or a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.learn import Room
from lazyproc.core.probe import Probe
from lazyproc.engine.cluster import count_threads, most_on_machine, tells_memory, threads_now
from lazyproc.engine.crew import Crew
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.local import or_here, run_both, run_processes, run_serial, run_threads
from lazyproc.engine.packing import pack_once
from lazyproc.engine.streams import Interruptible, Receipts, Wish, never

HELP_PAYS = 0.4
"""Seconds of computing from which worker processes can still help this one."""
POOL_PAYS = 1.5
"""Seconds of computing from which worker processes are worth their start."""
_THREADS_PAY = 0.2
_GAIN = 1.5
"""Two threads must be so much faster than one to be preferred to processes, however long the job is."""
_SOME_GAIN = 1.15
"""Two threads that are so much faster than one still do a short job before processes would."""
_START_SECONDS = 0.5
"""About what the start of worker processes costs."""

log = logging.getLogger("lazyproc")


@dataclass(frozen=True)
class Scheduler:
    """Where the blocks of a run are computed.

    Attributes
    ----------
    kind : str
        ``"serial"``, ``"both"`` (this process and others), ``"threads"``, ``"processes"`` or ``"client"``.
    n_workers : int
        Blocks computed at the same time.
    client : Client or None
        The cluster's client.
    n_beside : int or None
        So many of them at most on one machine; None: all.
    worker_threads : int
        Threads of BLAS and OpenMP in a worker process.
    most : int or None
        So many blocks at most are under way on a cluster; None: what keeps all its workers busy.
    sent_bytes : int
        What each worker process of this machine is sent of function and arguments, and loads.
    """

    kind: str
    n_workers: int
    client: Any = None
    n_beside: int | None = None
    worker_threads: int = 1
    most: int | None = None
    sent_bytes: int = 0

    @classmethod
    def on_cluster(cls, client: Any, worker_threads: int = 1, *, wait: bool = True) -> Scheduler:
        """Return the scheduler of a cluster as it is now, or as it is when there are workers."""
        n_threads = count_threads(client) if wait else max(1, threads_now(client))
        return cls("client", n_threads, client, most_on_machine(client), worker_threads)

    def resized(self, n_threads: int) -> Scheduler:
        """Return the scheduler of a cluster that has another number of threads by now."""
        return replace(self, n_workers=n_threads, n_beside=most_on_machine(self.client), most=None)

    @property
    def n_processes(self) -> int:
        """Worker processes of this machine that do blocks; those of a cluster are its own affair."""
        return {"both": self.n_workers - 1, "processes": self.n_workers}.get(self.kind, 0)

    @property
    def n_on_machine(self) -> int:
        """Blocks computed at the same time on the machine that computes the most."""
        return self.n_workers if self.n_beside is None else self.n_beside

    def __str__(self) -> str:
        names = {
            "serial": "this process",
            "both": f"this process and {self.n_workers - 1} more",
            "threads": counted(self.n_workers, "thread"),
            "processes": counted(self.n_workers, "process", "processes"),
            "client": f"Dask cluster, {counted(self.n_workers, 'thread')}",
        }
        return names[self.kind]

    def tells_memory(self) -> bool:
        """Tell whether it is found out what blocks take; of a cluster, whether it can be."""
        return self.client is None or tells_memory(self.client)

    @property
    def native_threads(self) -> int | None:
        """How many threads BLAS and OpenMP get in a worker; None where that is not for the worker to say."""
        return self.worker_threads if self.kind in ("processes", "client") else None

    def sending(self, kernel: Kernel) -> Scheduler:
        """Return the same for a kernel, which is packed if other processes of this machine are to get it."""
        if self.n_processes and can_be_sent(kernel, logging.DEBUG):
            return replace(self, sent_bytes=kernel.parcel.n_bytes)
        return self

    def with_workers(self, n_workers: int) -> Scheduler:
        """Return the scheduler with as many workers as the memory allows; a cluster gets only so many blocks then."""
        if self.kind == "client":
            return replace(self, most=n_workers) if n_workers < self.n_workers else self
        kind = "serial" if self.kind == "both" and n_workers == 1 else self.kind
        return replace(self, kind=kind, n_workers=n_workers)

    def run(
        self,
        kernel: Kernel,
        blocks: Iterable[Block],
        stopping: Wish,
        name: str,
        dropping: Wish = never,
        interruptible: Interruptible = nullcontext,
        room: Room | None = None,
        crew: Crew | None = None,
        on_workers: Callable[[int], int | None] | None = None,
        may_be_here: bool = True,
    ) -> Receipts:
        """Run the blocks.

        Parameters
        ----------
        kernel : Kernel
            What is done with a block.
        blocks : iterable of Block
            The blocks.
        stopping, dropping : callable
            Tell whether nothing new shall be started, and whether what is under way shall be dropped.
        name : str
            Of the process.
        interruptible : callable
            Returns a context that surrounds a block in the driver's own thread, which may be taken out of it.
        room : Room, optional
            What memory allows at the moment, for blocks that are cut already; not for a cluster.
        crew : Crew, optional
            Worker processes that were started beforehand.
        on_workers : callable, optional
            Is told, again and again, how many threads a cluster has; returns how many blocks may be under way.
        may_be_here : bool
            The driver's process may call the function, if worker processes cannot load it: it is known of no crash.
        """
        if not self.n_processes:
            kernel.parcel.let_go()  # nobody will get it
        if self.kind == "client":
            from lazyproc.engine.distant import run_client

            return run_client(self.client, kernel, blocks, stopping, name, dropping, self.most, on_workers)
        if self.kind == "both":
            both = run_both(kernel, blocks, self.n_workers, stopping, name, dropping, interruptible, room, crew)
            return or_here(both, kernel, interruptible)
        if self.kind == "processes":
            others = run_processes(kernel, blocks, self.n_workers, stopping, name, dropping, room, crew)
            return or_here(others, kernel, interruptible) if may_be_here else others
        if self.kind == "threads":
            return run_threads(kernel, blocks, self.n_workers, stopping, dropping, room)
        return run_serial(kernel, blocks, stopping, interruptible)


def choose_local(kernel: Kernel, probe: Probe, n_remaining: int, n_workers: int, *, apart: bool = False) -> Scheduler:
    """Choose a scheduler on this machine.

    Parameters
    ----------
    kernel : Kernel
        What a worker would get.
    probe : Probe
        How long a position takes, and whether threads help.
    n_remaining : int
        Positions to compute.
    n_workers : int
        Cores that may be used, and that the memory allows.
    apart : bool
        The function may crash its process, so that it is worth being called in worker processes only.

    Notes
    -----
    Only functions that take whole blocks are run in threads: those that take one position at a time mostly hold
    Python's lock, and old fitting libraries are not made for threads. Reading and decoding count for the function: they
    let other threads run, or, where HDF5 reads, which has one lock, other processes.
    """
    seconds = probe.seconds_per_position * n_remaining
    beside = kernel.source.read_seconds * n_remaining
    reading = beside or probe.reading_seconds * n_remaining
    alone = seconds + reading
    if apart:
        return Scheduler("processes", n_workers) if can_be_sent(kernel) else Scheduler("serial", 1)
    if n_workers == 1 or alone < _THREADS_PAY:
        return Scheduler("serial", 1)
    if kernel.vectorized:
        threads = seconds / probe.thread_gain + (reading / 2 if beside else reading)
        if alone >= _GAIN * threads or (alone >= _SOME_GAIN * threads and threads <= _START_SECONDS + alone / 2):
            return Scheduler("threads", n_workers)
    helped = not kernel.vectorized and HELP_PAYS <= alone < POOL_PAYS
    if alone < POOL_PAYS and not helped:
        return Scheduler("serial", 1)
    if not can_be_sent(kernel, logging.DEBUG if helped else logging.WARNING):
        return Scheduler("serial", 1)
    return Scheduler("both" if helped else "processes", n_workers)


def can_be_sent(kernel: Kernel, log_level: int = logging.WARNING) -> bool:
    """Tell whether other processes of this machine can do blocks; if it is for the function's sake, the log says so.

    The bytes that show it are kept for them: see `pack_once`.
    """
    if not kernel.source.travels:
        return False
    parcel = kernel.parcel
    if parcel.refused is None:
        try:
            pack_once(kernel)
            return True
        except Exception as error:
            parcel.refuse(f"{type(error).__name__}: {error}")
    log.log(
        log_level,
        "the function cannot be sent to worker processes (%s), so one core does it all; define it at the top level of "
        "a module, and keep open files and locks out of its arguments",
        parcel.refused,
    )
    return False


def counted(n: int, one: str, many: str | None = None) -> str:
    """Return a number with what it counts: ``"1 thread"``, ``"2 threads"``."""
    return f"{n} {one if n == 1 else many or one + 's'}"
