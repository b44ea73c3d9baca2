"""Do the work of a declared process on all ranks that have opened the file together (``driver="mpio"``).

The script runs on every rank, and every rank calls `compute`. Changes of the file's structure are collective in
parallel HDF5, and so are some questions: all ranks make the same ones, with the same values. Between them no HDF5 is
used: each rank takes blocks from a shared counter, writes their rows by their bytes, and marks its own blocks in the
status mask, data first.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lazyproc.core.errors import ArgumentValueError, LazyprocError
from lazyproc.core.events import BlockDone, Event, Finished, Listener, Started
from lazyproc.core.naming import function_name
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.core.specs import FAILED_POSITIONS, POSITION_STATUS
from lazyproc.drain import Drain, how_far, nothing_yet
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.failure import raise_failures
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.ranks import Ranks, run_shared
from lazyproc.hdf5.failure_log import ExtentRows, FailureLog
from lazyproc.hdf5.lock import Fence
from lazyproc.hdf5.marks import has_status
from lazyproc.hdf5.on_disk import find_extent
from lazyproc.hdf5.place import HandlePlace
from lazyproc.hdf5.record import Provenance, create_group, ensure_mask, environment, lacks_end, note_end
from lazyproc.hdf5.search import Found, Work, best_of, remaining_positions
from lazyproc.hdf5.sink import Sink
from lazyproc.hdf5.source import source_of
from lazyproc.hdf5.target import InPlaceTarget
from lazyproc.progress import quiet
from lazyproc.run.declared import Declared
from lazyproc.run.loop import Committer, run_loop
from lazyproc.run.probing import probe_function, stored_probe
from lazyproc.run.recording import warn_of
from lazyproc.run.sizes import divide
from lazyproc.together import agree_on_signal, counter_of, locked_by_first, ranks_of

log = logging.getLogger("lazyproc")


def perform_together(
    declared: Declared,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    override: bool,
    chosen: str | None,
    listener: Listener,
) -> str:
    """Return the name of a results group in which the work is done; does what is missing. To be called on all ranks.

    Parameters
    ----------
    declared, args, kwargs, override, chosen, listener
        As for `lazyproc.run.perform.perform`, the same on all ranks.

    Raises
    ------
    ArgumentValueError
        If the results would go into a file that is not opened together, or failures are to be recorded.
    LazyprocError
        Whatever went wrong, on all ranks; finished blocks are committed.

    Notes
    -----
    An error that only one rank has, outside of a block, ends the whole job by ``MPI_Abort``: the others would wait for
    it in the next collective call. The results are then as after a kill, and the next run goes on from there.
    """
    _check(declared)
    ranks = ranks_of(declared.main.file)
    with ranks.ending_all():
        declared = _by_bytes(declared)
        kernel, work = declared.kernel(args, kwargs), declared.work(args, kwargs)
        work = replace(work, code=ranks.first(work.code))  # what it uses may differ, and all must write the same
        drain = Drain(nothing_yet(declared.process_name))
        drain.afresh = override
        declared.main.file.flush()
        path = os.path.abspath(declared.place.path)
        with drain.on_signals(), locked_by_first(path, ranks) as lock:
            found = ranks.first(declared.found(work))
            best = None if override else best_of(found, chosen)
            if best is not None and ranks.rank == 0:
                warn_of(best)
            if best is not None and best.is_complete:
                _note_late(declared, work, best.name, ranks)
                agree_on_signal(drain, ranks)
                return best.name
            name, remaining, probe = _begin(declared, work, kernel, ranks, best)
            _run(declared, work, kernel, name, lock.fence, remaining, probe, ranks, drain, listener)
            return name


def _check(declared: Declared) -> None:
    place = declared.place
    if not isinstance(place, HandlePlace) or place.handle.file.driver != "mpio":
        raise ArgumentValueError(
            f"h5_target_group: {place.path} came; expected a group of a file that all ranks have opened together with "
            "driver='mpio', as the main dataset's: its structure can only be changed by all."
        )
    if declared.max_failures is not None:
        raise ArgumentValueError(
            "on_error: 'record' came, for a file opened by several ranks with driver='mpio'; expected 'raise'. Give "
            "the dataset by its address, under lazyproc.cluster(), to record failures."
        )


def _refuse_compression(declared: Declared) -> None:
    wanted = [output.name for output in declared.outputs if output.filters is not None]
    if wanted:
        raise ArgumentValueError(
            f"Output {wanted[0]!r}: compression came, for a file opened by several ranks with driver='mpio', which "
            "write their rows at the same time; expected none. Leave it out, or give the dataset by its address, under "
            "lazyproc.cluster()."
        )


def _by_bytes(declared: Declared) -> Declared:
    """Let contiguous data be read by their bytes; parallel HDF5 keeps none of them in memory of its own.

    With its path known, nothing asks HDF5 for the file's driver any more: that question duplicates the communicator, so
    it is collective.
    """
    path = os.path.abspath(declared.main.file.filename)
    by_bytes = find_extent(declared.main, path) is not None
    return replace(declared, main_path=path, source=source_of(declared.main, path) if by_bytes else declared.source)


def _begin(
    declared: Declared,
    work: Work,
    kernel: Kernel,
    ranks: Ranks,
    partial: Found | None,
) -> tuple[str, Runs, Probe]:
    """Resume a group, or probe and create one; on all ranks the same."""
    if partial is None:
        _refuse_compression(declared)
        probe = ranks.once(lambda: _probe(declared, kernel, Runs.full(declared.n_positions), begun=False))
        provenance = ranks.once(lambda: _provenance(declared, probe))
        declared.know_fingerprint(provenance.fingerprint)
        group = declared.place.group()
        assert group is not None
        name = create_group(group, declared.main, work, provenance, None)
        group.file.flush()
        return name, Runs.full(declared.n_positions), probe
    name = partial.name
    group = declared.place.results(name)
    if FAILED_POSITIONS in group:
        raise ArgumentValueError(
            f"{name}: failures were recorded in these results, which a run of several ranks with driver='mpio' does "
            "not keep up; expected results without. Give the dataset by its address, under lazyproc.cluster(), to go "
            "on with them, or override=True."
        )
    remaining = ranks.first(remaining_positions(group, work.n_positions, work.status_name))
    if work.status_name not in group:
        ensure_mask(group, name, work)
        group.file.flush()
    stored = ranks.first(stored_probe(group))
    return name, remaining, stored or ranks.once(lambda: _probe(declared, kernel, remaining, begun=True))


def _probe(declared: Declared, kernel: Kernel, remaining: Runs, *, begun: bool) -> Probe:
    """Probe, and leave what was computed behind: it is little, and would have to be told to one rank only."""
    return replace(probe_function(declared, kernel, remaining, begun=begun), computed=[])


def _provenance(declared: Declared, probe: Probe) -> Provenance:
    return Provenance(
        function=function_name(declared.function),
        fingerprint=declared.fingerprint(),
        versions=environment(),
        probe=probe.stored(),
        batch=declared.batch,
    )


def _run(
    declared: Declared,
    work: Work,
    kernel: Kernel,
    name: str,
    fence: Fence,
    remaining: Runs,
    probe: Probe,
    ranks: Ranks,
    drain: Drain,
    listener: Listener,
) -> None:
    """Do this rank's part of the blocks, then agree on how it ended."""
    target, status = _target(declared, name, fence)
    n_before = work.n_positions - remaining.n_positions
    tell = listener if ranks.rank == 0 else quiet
    committer = Committer(target, declared.interval, n_before, _without_commits(tell), status)
    scheduler = Scheduler("processes", ranks.size)
    sizes = ranks.once(lambda: divide(declared, remaining, scheduler, probe, driver_writes=False))
    kernel = kernel.for_run(target.sink, 1)
    tell(Started(declared.process_name, work.n_positions, n_before, f"{ranks.size} ranks"))
    counter = counter_of(os.path.abspath(declared.place.path), ranks, fence)
    try:
        receipts = run_shared(kernel, sizes.plan, counter, drain.requested, lambda n: tell(BlockDone(n)))
        outcome = run_loop(receipts, committer, drain)
    finally:
        target.close()
    ends: list[tuple[bytes, int, int]] = ranks.gather(
        (pickle.dumps(outcome.failures), committer.n_done, outcome.n_blocks)
    )
    counter.free()
    n_done = n_before + sum(end[1] for end in ends)
    tell(Finished(n_done))
    where = declared.place.path
    drain.message = how_far(declared.process_name, n_done, work.n_positions, where, afresh=drain.afresh)
    agree_on_signal(drain, ranks)
    failures = [failure for end in ends for failure in pickle.loads(end[0])]
    if n_done == work.n_positions:
        _note_end(declared, work, name, ranks, f"{ranks.size} ranks, {sum(end[2] for end in ends)} blocks")
    with ranks.agreeing():
        if failures:
            raise_failures(failures, declared.process_name, declared.label)
        if n_done < work.n_positions and drain.signal is None:
            raise LazyprocError(drain.message)


def _target(declared: Declared, name: str, fence: Fence) -> tuple[InPlaceTarget, FailureLog | None]:
    """Return where this rank writes its rows, marks its blocks, and says the same in the richer status."""
    path = os.path.abspath(declared.place.path)
    group = declared.place.results(name)
    extents = [find_extent(group[output.name], path) for output in declared.outputs]
    mask = find_extent(group[declared.status_name], path)
    status = find_extent(group[POSITION_STATUS], path) if has_status(group, declared.status_name) else None
    found = tuple(extent for extent in extents if extent is not None)
    if mask is None or len(found) != len(extents):
        raise LazyprocError(
            f"{name}: the results are chunked or compressed, or will be; expected contiguous ones, which ranks can "
            "write at the same time. Give the dataset by its address, under lazyproc.cluster(), or override=True."
        )
    log = None if status is None else FailureLog(ExtentRows(mask), ExtentRows(status), None, 0, 0)
    return InPlaceTarget(Sink(found, fence, shares_lock=False), mask), log


def _note_end(declared: Declared, work: Work, name: str, ranks: Ranks, workers: str = "") -> None:
    group = declared.place.group()
    assert group is not None
    when = ranks.once(time.time)
    note_end(group, name, work, workers, when)
    group.file.flush()


def _note_late(declared: Declared, work: Work, name: str, ranks: Ranks) -> None:
    """Note the end of results that are complete, where a run died just before it did."""
    group = declared.place.results(name)
    if group.file.mode != "r" and ranks.first(lacks_end(group, work)):
        _note_end(declared, work, name, ranks)


def _without_commits(listener: Listener) -> Callable[[Event], None]:
    """Hand on what happens to blocks; what is committed in all no single rank knows."""

    def tell(event: Event) -> None:
        if isinstance(event, BlockDone):
            listener(event)

    return tell
