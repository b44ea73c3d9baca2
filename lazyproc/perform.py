"""Do the work of a declared process: lock, find, probe, create or resume, run the loop, note the end."""

from __future__ import annotations

import contextlib
import logging
import signal
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import h5py

from lazyproc.core.apply import OutputMismatch, RowError
from lazyproc.core.blocks import Block
from lazyproc.core.errors import Interrupted, LazyprocError
from lazyproc.core.events import Finished, Listener, Started
from lazyproc.core.identity import function_name
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.declared import Declared, stored_probe
from lazyproc.drain import EXIT_STOPPED, Drain
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.failure import Failure, raise_failures
from lazyproc.engine.kernel import Kernel
from lazyproc.hdf5.lock import Fence, RunLock
from lazyproc.hdf5.record import Provenance, create_group, ensure_mask, environment, note_end, open_target
from lazyproc.hdf5.search import Found, Work, remaining_positions
from lazyproc.hdf5.target import Target
from lazyproc.hdf5.transaction import recover
from lazyproc.run import Committer, Outcome, run_loop

log = logging.getLogger("lazyproc")


def perform(
    declared: Declared,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    override: bool,
    chosen: str | None,
    listener: Listener,
) -> str:
    """Return the name of a results group in which the work is done; does what is missing.

    Parameters
    ----------
    declared : Declared
        The process on its main dataset.
    args, kwargs
        The arguments of `compute`.
    override : bool
        Start afresh whatever there is.
    chosen : str or None
        The partial group to resume; None for the last one.
    listener : callable
        Is told of blocks and commits.

    Raises
    ------
    LazyprocError
        Whatever went wrong; finished blocks are committed.
    Interrupted, SystemExit
        After a drain, by Ctrl-C or SIGTERM.
    """
    kernel = declared.kernel(args, kwargs)
    work = declared.work(args, kwargs)
    with _locked(declared) as fence:
        found = declared.found(work)
        duplicates = [one for one in found if one.is_complete]
        if duplicates and not override:
            _warn(duplicates[-1])
            log.info("%s: returning the finished results %s", declared.process_name, duplicates[-1].name)
            return duplicates[-1].name
        partial = {one.name: one for one in found if one.is_partial}
        name = None if override or not partial else chosen if chosen in partial else list(partial)[-1]
        if name is not None:
            _warn(partial[name])
        declared = declared.settled()
        kernel = replace(kernel, source=declared.source)
        if name is None:
            name, remaining, probe = _start(declared, work, kernel)
        else:
            remaining, probe = _resume(declared, work, kernel, name)
        _run(declared, work, kernel, name, fence, remaining, probe, listener)
        return name


@contextlib.contextmanager
def _locked(declared: Declared) -> Any:
    """Hold the run's lock, if there is a file to lock; finish a transaction that was killed."""
    path = declared.place.lock_path
    if path is None:
        yield None
        return
    lock = RunLock(path, uuid.uuid4().hex)
    lock.acquire()
    try:
        if not declared.place.by_handle and recover(path):
            log.warning("%s: a change that was cut off has been completed", path)
        yield lock.fence
    finally:
        lock.release()


def _warn(found: Found) -> None:
    for remark in found.remarks:
        log.warning("%s: %s", found.name, remark)


def _probe(declared: Declared, kernel: Kernel, remaining: Runs) -> Probe:
    """Try the function; what it raises reaches the user with the positions concerned."""
    try:
        return declared.probe(kernel, remaining)
    except RowError as error:
        failure = Failure.of_function(error, _block_of(error, remaining))
    except OutputMismatch as error:
        failure = Failure.of_output(error, _block_of(error, remaining))
    failure.raise_error(declared.process_name, declared.label)


def _block_of(error: Exception, remaining: Runs) -> Block:
    runs: Runs = getattr(error, "runs", remaining)
    return _as_block(runs)


def _as_block(runs: Runs) -> Block:
    return Block(0, tuple(runs.starts.tolist()), tuple(runs.stops.tolist()))


def _start(declared: Declared, work: Work, kernel: Kernel) -> tuple[str, Runs, Probe]:
    """Probe, and only then create the results group."""
    remaining = Runs.full(declared.n_positions)
    declared.flush_main()
    declared.blocks(remaining, Scheduler("serial", 1), None, driver_writes=False)  # does one position fit at all?
    probe = _probe(declared, kernel, remaining)
    # and with what was measured? Before anything is created
    declared.blocks(remaining, Scheduler("serial", 1), probe, driver_writes=declared.place.lock_path is None)
    provenance = Provenance(
        function=function_name(declared.function),
        fingerprint=declared.fingerprint(),
        versions=environment(),
        probe={
            "seconds_per_position": probe.seconds_per_position,
            "temporary_bytes": probe.temporary_bytes,
            "fixed_bytes": probe.fixed_bytes,
            "thread_gain": probe.thread_gain,
        },
    )
    with declared.place.edit() as parent:
        name = create_group(parent, _main_beside(declared, parent), work, provenance)
    log.info("%s: results go to %s::%s", declared.process_name, declared.place.path, name)
    return name, remaining, probe


def _main_beside(declared: Declared, parent: h5py.Group) -> h5py.Dataset:
    """Return the main dataset through the handle that is being edited, if it lies in the same file."""
    if not declared.place.by_handle and declared.main_path is not None:
        if declared.main_path == declared.place.path:
            return parent.file[declared.main.name]
    return declared.main


def _resume(declared: Declared, work: Work, kernel: Kernel, name: str) -> tuple[Runs, Probe]:
    """Find what remains; a measurement that was stored with the results is used again."""
    declared.flush_main()
    parent = declared.place.group()
    assert parent is not None
    group = parent.file[name]
    remaining = remaining_positions(group, work.n_positions, work.status_name)
    done = 1 - remaining.n_positions / work.n_positions
    log.info("%s: resuming %s, %.1f %% done", declared.process_name, name, 100 * done)
    probe = stored_probe(group)
    if work.status_name not in group:
        with declared.place.edit() as editable:
            ensure_mask(editable, name, work)
    return remaining, probe or _probe(declared, kernel, remaining)


def _run(
    declared: Declared,
    work: Work,
    kernel: Kernel,
    name: str,
    fence: Fence | None,
    remaining: Runs,
    probe: Probe,
    listener: Listener,
) -> None:
    """Write what the probe computed, then run the blocks, then note the end."""
    target = open_target(declared.place, name, declared.outputs, declared.status_name, fence)
    n_before = work.n_positions - remaining.n_positions
    committer = Committer(target, declared.interval, n_before, listener)
    drain = Drain()
    n_committed = 0
    try:
        with drain.on_signals():
            outcome = _loop(declared, kernel, target, remaining, probe, committer, drain, listener)
    finally:
        n_committed = n_before + committer.n_done
        target.close()
        listener(Finished(n_committed))
    if outcome.failures:
        log.error("%s: a block failed; %d of %d positions are done and kept", name, n_committed, work.n_positions)
        raise_failures(outcome.failures, declared.process_name, declared.label)
    if n_committed == work.n_positions:
        with declared.place.edit() as parent:
            note_end(parent, name, work, f"{len(outcome.workers)} workers, {outcome.n_blocks} blocks")
    if n_committed < work.n_positions or drain.signal is not None:
        _stop(declared, drain, n_committed, work.n_positions)


def _loop(
    declared: Declared,
    kernel: Kernel,
    target: Target,
    remaining: Runs,
    probe: Probe,
    committer: Committer,
    drain: Drain,
    listener: Listener,
) -> Outcome:
    for runs, arrays in probe.computed:
        target.write(_as_block(runs), arrays)
        committer.take_positions(runs)
        remaining = remaining.difference(runs)
    committer.commit()  # workers may take a while to start
    scheduler = declared.scheduler(kernel, probe, remaining.n_positions)
    in_place = target.sink is not None and declared.in_place_everywhere(scheduler, declared.place.lock_path)
    sizes = declared.blocks(remaining, scheduler, probe, driver_writes=not in_place)
    scheduler = scheduler.with_workers(sizes.n_workers)
    kernel = kernel.for_run(target.sink if in_place else None, scheduler.native_threads)
    n_before = declared.n_positions - remaining.n_positions
    listener(Started(declared.process_name, declared.n_positions, n_before, str(scheduler)))
    log.info(
        "%s: %d positions in %d blocks of up to %d, in %s",
        declared.process_name, remaining.n_positions, sizes.plan.count(), sizes.plan.max_positions, scheduler,
    )  # fmt: skip
    receipts = scheduler.run(kernel, sizes.plan, drain.requested, declared.process_name)
    return run_loop(receipts, committer, drain)


def _stop(declared: Declared, drain: Drain, n_done: int, n_positions: int) -> NoReturn:
    """Leave as the signal asked for, also if the last block ended meanwhile: the caller's script shall not go on."""
    message = (
        f"{declared.process_name}: stopped early; {n_done} of {n_positions} positions ({n_done / n_positions:.1%}) are "
        f"done and kept in {declared.place.path}. The same call of compute() goes on from there."
    )
    if drain.signal == signal.SIGTERM:
        log.warning(message)
        raise SystemExit(EXIT_STOPPED)
    if drain.signal is not None:
        raise Interrupted(message)
    raise LazyprocError(message)


def compute_here(declared: Declared, kernel: Kernel, runs: Runs) -> tuple[Any, ...]:
    """Compute positions in this process and return the results; nothing is written."""
    try:
        return kernel.compute(declared.source.rows(iter(runs)))
    except RowError as error:
        failure = Failure.of_function(error, _as_block(runs))
    except OutputMismatch as error:
        failure = Failure.of_output(error, _as_block(runs))
    failure.raise_error(declared.process_name, declared.label)
