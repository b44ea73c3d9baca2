"""Run the blocks of a results group: commit what the probe has computed, then block by block, then note the end."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lazyproc.core.blocks import Block
from lazyproc.core.errors import LazyprocError
from lazyproc.core.events import Finished, Listener, Started
from lazyproc.core.highwater import can_measure, give_back, high_water
from lazyproc.core.memory import DRIVER_BYTES, MEBIBYTE
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.drain import Drain, how_far
from lazyproc.engine.block_function import failure_of
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.crew import Crew
from lazyproc.engine.failure import raise_failures
from lazyproc.engine.kernel import Kernel
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.open_target import open_target
from lazyproc.hdf5.search import Work
from lazyproc.hdf5.target import Target
from lazyproc.run.adapt import Adapting
from lazyproc.run.declared import Declared
from lazyproc.run.finishing import finish_results
from lazyproc.run.loop import Committer, Outcome, run_loop
from lazyproc.run.probing import block_of
from lazyproc.run.recording import raise_limit, say_failed
from lazyproc.run.sizes import divide
from lazyproc.run.where import (
    in_place_everywhere,
    scheduler_of,
)

_BYTES_OF_RUN = 64
"""What the driver takes for each run of positions when blocks are cut and noted, beside what it has when it begins:
measured up to 9 MiB with 131,072 of them."""
_LATER_BYTES = 2 * MEBIBYTE
"""What else the driver takes after it was looked at what it keeps by then: measured 1 MiB."""

log = logging.getLogger("lazyproc")


@dataclass(frozen=True)
class Run:
    """What stays the same from the first position of a call to the last.

    Attributes
    ----------
    declared, work, kernel
        What is done.
    name : str
        The results group.
    lock : RunLock or None
        The run's lock.
    listener : callable
        Is told of blocks and commits.
    drain : Drain
        The wish to stop early.
    crew : Crew
        Worker processes that were started beforehand.
    """

    declared: Declared
    work: Work
    kernel: Kernel
    name: str
    lock: RunLock | None
    listener: Listener
    drain: Drain
    crew: Crew


def run_group(run: Run, remaining: Runs, probe: Probe, n_before: int, *, again: bool = False) -> Outcome:
    """Write what the probe computed, then run the blocks, then note the end.

    Parameters
    ----------
    run : Run
        What is done, and in which results group.
    remaining : Runs
        The positions to compute.
    probe : Probe
        What was measured.
    n_before : int
        How many positions are done and stay so.
    again : bool
        The positions are marked as done until now: that is taken back first.
    """
    declared, work, name, drain = run.declared, run.work, run.name, run.drain
    same = declared.place.file_id()
    fence = None if run.lock is None else run.lock.fence
    target, failed = open_target(
        declared.place, name, declared.outputs, declared.status_name, fence, declared.max_failures
    )
    committer = Committer(target, declared.interval, n_before, run.listener, failed)
    try:
        if again and failed is not None:
            target.unmark(remaining)
            failed.release(remaining)
        outcome, cluster = _loop(run, target, remaining, probe, committer)
    finally:
        n_committed = n_before + committer.n_done
        where = declared.place.path
        drain.message = how_far(declared.process_name, n_committed, work.n_positions, where, afresh=drain.afresh)
        target.close()
        run.listener(Finished(n_committed))
    if outcome.refused:
        raise_limit(declared, name, outcome, n_committed)
    lost = [one.positions for one in outcome.failures if one.kind == "lost"]
    if lost and run.lock is not None:
        run.lock.suspect()
    if drain.signal is not None and len(lost) == len(outcome.failures):
        if lost:
            log.error("%s: workers died each time they had the positions (first, last plus one) %s", name, lost)
    elif outcome.failures:
        log.error("%s: a block failed; %d of %d positions are done and kept", name, n_committed, work.n_positions)
        raise_failures(outcome.failures, declared.process_name, declared.label)
    if n_committed == work.n_positions:
        workers = f"{len(outcome.workers)} workers, {outcome.n_blocks} blocks"
        finish_results(declared, work, name, drain, cluster, workers=workers, same=same)
    say_failed(name, failed.n_failed if failed is not None else 0, work.n_positions)
    if committer.n_done < remaining.n_positions and drain.signal is None:
        raise LazyprocError(drain.message)
    return outcome


def _loop(
    run: Run, target: Target, remaining: Runs, probe: Probe, committer: Committer
) -> tuple[Outcome, Scheduler | None]:
    """Run the blocks; return how that ended, and the cluster if its workers see the file."""
    if not committer.has_room(probe.failed):
        committer.refuse(probe.failed)
        return committer.outcome(), None
    remaining = _take_probe(target, remaining, probe, committer)
    give_back()
    declared, drain = run.declared, run.drain
    to_come = _BYTES_OF_RUN * len(remaining)
    books = max(0, high_water.kept() + to_come + _LATER_BYTES - DRIVER_BYTES) if can_measure() else None
    with drain.interruptible(at_first=True):  # a cluster may take its time to answer
        scheduler = scheduler_of(declared, run.kernel, probe, remaining.n_positions)
        watched = scheduler.tells_memory()
        in_place = in_place_everywhere(declared, scheduler, target.sink)
    sizes = divide(declared, remaining, scheduler, probe, driver_writes=not in_place, books_bytes=books)
    scheduler = scheduler.with_workers(sizes.n_workers)
    run.crew.reduce(scheduler.n_processes)
    kernel = run.kernel.for_run(target.sink if in_place else None, scheduler.native_threads, watched=watched)
    run.listener(Started(declared.process_name, declared.n_positions, committer.n_all, str(scheduler)))
    log.info(
        "%s: %d positions in %d blocks of up to %d, in %s; %.0f MiB of memory projected",
        declared.process_name, remaining.n_positions, sizes.plan.count(), sizes.plan.max_positions, scheduler,
        sizes.projected / MEBIBYTE, extra={"projected_bytes": sizes.projected},
    )  # fmt: skip
    blocks = Adapting(declared, sizes, scheduler, probe)
    receipts = scheduler.run(
        kernel,
        blocks.feed,
        drain.requested,
        declared.process_name,
        drain.dropping,
        drain.interruptible,
        blocks.room,
        run.crew,
        blocks.share,
        may_be_here=not declared.apart or declared.may_be_here,
    )
    outcome = run_loop(blocks.noting(receipts), committer, drain)
    return outcome, scheduler if in_place and scheduler.client is not None else None


def _take_probe(target: Target, remaining: Runs, probe: Probe, committer: Committer) -> Runs:
    """Write and commit what the probe computed; return what is left."""
    for runs, arrays in probe.computed:
        target.write(Block.of(runs), arrays)
        committer.take_positions(runs)
        remaining = remaining.difference(runs)
    first = probe.first
    committer.take_failed(probe.failed, failure_of(first, block_of(first, remaining)) if first is not None else None)
    committer.commit()  # workers may take a while to start
    probe.computed.clear()  # written: what the probe took is needed by the blocks now
    return remaining
