"""Divide what remains of a process into blocks: as many positions each as memory and time allow."""

from __future__ import annotations

from dataclasses import dataclass

from lazyproc.core.blocks import BlockPlan
from lazyproc.core.errors import MemoryLimitError
from lazyproc.core.memory import MemoryModel
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.core.sizing import Division
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.limits import available_bytes
from lazyproc.hdf5.chunks import ChunkSource
from lazyproc.hdf5.compress import peak_bytes
from lazyproc.run.declared import Declared

_LOCAL_BYTES = 8 * 2**20
"""Source and results of a block that costs next to nothing to start: small enough for the processor's caches."""
_SENT_BYTES = 32 * 2**20
"""The same for a block that is sent to another process."""
_ARENA_BYTES = 2 * 2**20
"""What the allocator keeps for each thread, over what blocks take: measured 1 to 9 MiB for two threads together."""


@dataclass(frozen=True)
class BlockSizes:
    """The division into blocks, and how many of them are computed at the same time.

    Attributes
    ----------
    plan : BlockPlan
        The blocks.
    n_workers : int
        As many as the memory allows.
    memory : MemoryModel
        What a position takes.
    driver_writes : bool
        Results travel to the driver.
    division : Division
        Divides what is left of the positions anew, when it is known better how long they take.
    limit : int
        Bytes allowed.
    projected : int
        Bytes to expect at most on one machine.
    most_positions : int
        Of a block at most, for memory's sake: more than in the plan only if nothing is known of the function yet.
    """

    plan: BlockPlan
    n_workers: int
    memory: MemoryModel
    driver_writes: bool
    division: Division
    limit: int
    projected: int
    most_positions: int


def memory_of(
    declared: Declared, probe: Probe | None, scheduler: Scheduler | None = None, books_bytes: int | None = None
) -> MemoryModel:
    """Return the memory model, with what the probe measured.

    Parameters
    ----------
    declared : Declared
        The process on its main dataset.
    probe : Probe or None
        What was measured.
    scheduler : Scheduler, optional
        Where blocks are computed: each process there keeps what the function keeps. Default: in this process.
    books_bytes : int, optional
        What the driver was found to keep, over the usual. Default: what is known without looking.
    """
    table = declared.source.table_bytes if isinstance(declared.source, ChunkSource) else 0
    kept = (probe.kept_bytes if probe else 0) + table
    fixed = (probe.fixed_bytes if probe else 0) + declared.source.chunk_bytes
    driver = (kept if books_bytes is None else books_bytes) + argument_books(declared)
    if scheduler is not None and scheduler.kind not in ("serial", "threads"):
        fixed += kept  # of each worker
        if scheduler.n_processes:
            driver += table + scheduler.sent_bytes  # packed for the others
            fixed += 2 * scheduler.sent_bytes  # as it comes, and loaded
        if scheduler.kind == "both":
            driver -= kept + 2 * scheduler.sent_bytes  # the driver is one of them
    if scheduler is not None and scheduler.kind == "threads":
        fixed += _ARENA_BYTES
    return MemoryModel(
        source_bytes=declared.source.shape[1] * declared.source.dtype.itemsize,
        result_bytes=sum(output.row_bytes for output in declared.outputs),
        multiplier=declared.multiplier,
        temporary_bytes=probe.temporary_bytes if probe else 0.0,
        fixed_bytes=fixed,
        driver_bytes=max(0, driver),
        chunk_rows=declared.source.chunk_rows if declared.source.chunk_bytes else 1,
    )


def argument_books(declared: Declared) -> int:
    """Return the bytes that the driver has for arguments at most: see `Declared.argument_bytes`."""
    return 2 * declared.argument_bytes


def limit_bytes(declared: Declared) -> int:
    """Return the memory allowed, never more than is available."""
    available = available_bytes()
    return available if declared.max_bytes is None else min(declared.max_bytes, available)


def divide(
    declared: Declared,
    remaining: Runs,
    scheduler: Scheduler,
    probe: Probe | None,
    *,
    driver_writes: bool,
    limit: int | None = None,
    books_bytes: int | None = None,
) -> BlockSizes:
    """Divide what remains into blocks that fit into memory and last about a second, less toward the end.

    `limit` are the bytes allowed if that was found before: what is available becomes less by what the run takes.
    `books_bytes`: see `memory_of`.
    """
    memory = memory_of(declared, probe, scheduler, books_bytes)
    limit = limit_bytes(declared) if limit is None else limit
    beside, rows = memory.fit(limit, scheduler.n_on_machine, driver_writes=driver_writes)
    workers = beside
    if workers == scheduler.n_on_machine:  # else it is not known on which machines fewer blocks would be
        workers = scheduler.n_workers
    division = Division(
        memory_rows=rows,
        n_workers=workers,
        align=min(declared.source.chunk_rows, declared.n_positions),
        bytes_per_position=memory.source_bytes + memory.result_bytes,
        preferred_bytes=_LOCAL_BYTES if scheduler.kind in ("serial", "threads") else _SENT_BYTES,
        interval=declared.interval,
    )
    careful = memory.careful_rows(limit, beside, driver_writes=driver_writes)
    division = division.within(rows, careful)
    seconds = None if probe is None else probe.seconds_per_position
    plan = division.plan(remaining, seconds, begins=True)
    most = plan.max_positions if probe is None or probe.is_measured else division.largest
    projected = memory.peak(min(most, max(1, remaining.n_positions)), beside, driver_writes=driver_writes)
    projected = max(projected, peak_bytes(declared.outputs, declared.n_positions, declared.cores, limit))
    return BlockSizes(plan, workers, memory, driver_writes, division, limit, projected, most)


def check_fits(declared: Declared, probe: Probe | None) -> None:
    """Make sure that one position fits into the memory allowed, by what is known so far.

    Before the probe it counts as read only; after it as written, too, by the driver where there is no file to lock.

    Raises
    ------
    MemoryLimitError
        If it does not; says how much would do.
    """
    memory = memory_of(declared, probe, Scheduler("serial", 1))
    driver_writes = probe is not None and declared.place.lock_path is None
    memory.fit(limit_bytes(declared), 1, driver_writes=driver_writes)


def most_positions(declared: Declared) -> int:
    """Return how many positions a block may have in this process, as far as is known before the first call."""
    try:
        sizes = divide(declared, Runs.full(declared.n_positions), Scheduler("serial", 1), None, driver_writes=False)
    except MemoryLimitError:  # whoever computes will be told
        return 0
    return sizes.most_positions
