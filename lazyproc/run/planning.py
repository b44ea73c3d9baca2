"""What `compute` would do, told without doing it."""

from __future__ import annotations

from lazyproc.core.plan import Plan
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.engine.kernel import Kernel
from lazyproc.hdf5.search import Found, Work, best_of, remaining_positions
from lazyproc.run.declared import Declared
from lazyproc.run.probing import stored_probe
from lazyproc.run.sizes import divide
from lazyproc.run.where import scheduler_of


def plan_of(declared: Declared, work: Work, found: list[Found], kernel: Kernel, wanted: str | None = None) -> Plan:
    """Return what `compute` would do, with a partial group that is wanted; computes and writes nothing."""
    duplicates = [one for one in found if one.is_complete]
    partial = [one for one in found if one.is_partial]
    chosen = best_of(found, wanted)
    remaining = Runs.full(declared.n_positions)
    probe: Probe | None = None
    if chosen is not None:
        with declared.place.briefly() as place:
            group = place.results(chosen.name)
            remaining = remaining_positions(group, declared.n_positions, declared.status_name)
            probe = stored_probe(group)
    scheduler = scheduler_of(declared, kernel, probe, remaining.n_positions, wait=False)
    sizes = divide(declared, remaining, scheduler, probe, driver_writes=declared.place.lock_path is None)
    memory = sizes.memory
    rows = min(sizes.plan.max_positions, max(1, remaining.n_positions))
    return Plan(
        process_name=declared.process_name,
        dataset=declared.label,
        action="start" if chosen is None else "return" if chosen.is_complete else "resume",
        group=chosen.name if chosen else None,
        duplicates=tuple(one.name for one in duplicates),
        partial=tuple(one.name for one in partial),
        n_positions=declared.n_positions,
        n_done=declared.n_positions - remaining.n_positions,
        n_remaining=remaining.n_positions,
        n_failed=chosen.n_failed if chosen else 0,
        n_blocks=sizes.plan.count(),
        block_positions=sizes.plan.max_positions,
        chunk_positions=declared.source.chunk_rows,
        n_workers=sizes.n_workers,
        scheduler=str(scheduler) if probe or scheduler.client else "chosen after a look at the function",
        bytes_per_position=memory.bytes_per_position,
        worker_bytes=memory.worker_peak(rows, driver_writes=declared.place.lock_path is None),
        projected_bytes=sizes.projected,
        allowed_bytes=sizes.limit,
        source_bytes=remaining.n_positions * memory.source_bytes,
        result_bytes=remaining.n_positions * memory.result_bytes,
        seconds=None if probe is None else probe.seconds_per_position * remaining.n_positions / sizes.n_workers,
        disk_bytes=2 * sum(declared.n_positions * one.row_bytes for one in declared.outputs if one.filters is not None),
    )
