"""Do the work of a declared process: lock, find, probe, create or resume, and have the group's blocks run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import h5py

from lazyproc.core.blocks import Block
from lazyproc.core.errors import ReadOnlyFileError
from lazyproc.core.events import Listener
from lazyproc.core.highwater import high_water
from lazyproc.core.naming import function_name
from lazyproc.core.no_result import NoResult
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.core.signature import slips
from lazyproc.drain import Drain, nothing_yet
from lazyproc.engine.block_function import failure_of
from lazyproc.engine.choose import can_be_sent
from lazyproc.engine.crew import Crew
from lazyproc.engine.kernel import Kernel
from lazyproc.hdf5.finish import adopt
from lazyproc.hdf5.leftovers import rows_files
from lazyproc.hdf5.record import (
    Provenance,
    create_group,
    ensure_mask,
    ensure_room,
    environment,
    lacks_room,
)
from lazyproc.hdf5.search import Work, best_of, remaining_positions
from lazyproc.hdf5.sink import Sink
from lazyproc.run.declared import Declared
from lazyproc.run.finishing import finish_late
from lazyproc.run.group import Run, run_group
from lazyproc.run.holding import locked, target_file, with_lock
from lazyproc.run.probing import probe_function, stored_probe
from lazyproc.run.recording import warn_of
from lazyproc.run.sizes import check_fits
from lazyproc.run.where import (
    early_processes,
    imports_to_spare,
    likely_processes,
    processes_for_reading,
)

_LONG_CALL = 0.03
"""Seconds: a first call of the function that is not back by then may be one of a long job."""

_FIRST_LOADED = ("threadpoolctl", "encodings.ascii")
"""What a worker's first block would load; then what that block takes of memory could not be told from it."""

_MOST_RUNS = 2**17
"""Of results with more holes only the first so many are looked at, and computed, before the next ones: what describes
them, and is needed to divide them, is then some MiB however many there are."""

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
        The partial group to resume, though there are finished ones; None for the last one, if there are none.
    listener : callable
        Is told of blocks and commits.

    Raises
    ------
    LazyprocError
        Whatever went wrong; finished blocks are committed.
    Interrupted, SystemExit
        After a drain, by Ctrl-C or SIGTERM.
    """
    declared, kernel = declared.called_with(args, kwargs)
    for slip, meant in slips(declared.function, declared.parameters).items():
        log.warning(
            "%s: the parameter %r is stored, but no argument of the function; is %r meant?",
            declared.process_name, slip, meant,
        )  # fmt: skip
    work = declared.work(args, kwargs)
    drain = Drain(nothing_yet(declared.process_name), listener)
    drain.afresh = override and not declared.batch
    high_water.forget()
    with drain.on_signals(), locked(declared) as lock:
        declared, kernel = with_lock(declared, kernel, lock)
        with drain.interruptible(at_first=True):
            found = declared.found(work)
        best = None if override else best_of(found, chosen)
        if best is not None:
            warn_of(best)
        if best is not None and best.is_complete:
            finish_late(declared, work, best.name, drain)
            log.info("%s: returning the finished results %s", declared.process_name, best.name)
            return best.name
        check_fits(declared, None)  # before anything is read of the main dataset
        declared = declared.settled()
        kernel = replace(kernel, source=declared.source)
        with Crew([Sink.__module__, type(kernel.source).__module__, *_FIRST_LOADED]) as crew:
            n_left = declared.n_positions
            if best is None:
                declared = _spare_imports(declared, kernel, crew)
                name, remaining, probe = _start(declared, work, kernel, drain, crew)
            else:
                name = best.name
                n_left -= best.n_done
                remaining, probe = _resume(declared, work, kernel, name, n_left, drain, crew)
            run = Run(declared, work, kernel, name, lock, listener, drain, crew)
            while True:
                run_group(run, remaining, probe, declared.n_positions - n_left)
                n_left -= remaining.n_positions
                if n_left <= 0 or drain.signal is not None:
                    return name
                remaining = _left(declared, work, name, int(remaining.stops[-1]))
                probe = replace(probe, computed=[], failed=[], first=None)


def finished_to_read(
    declared: Declared, args: tuple[Any, ...], kwargs: Mapping[str, Any], chosen: str | None
) -> str | None:
    """Return the name of finished results in a file that cannot be written; None where it can be.

    Raises
    ------
    ReadOnlyFileError
        If it cannot be, and there are none.
    """
    try:
        declared.place.check_writable()
    except ReadOnlyFileError:
        declared, _ = declared.called_with(args, kwargs)
        best = best_of(declared.found(declared.work(args, kwargs)), chosen)
        if best is None or not best.is_complete:
            raise
        warn_of(best)
        return best.name
    return None


def _spare_imports(declared: Declared, kernel: Kernel, crew: Crew) -> Declared:
    """Where the function will import modules, let worker processes do so at once, and call it only there.

    They would have to load them anyway, and where all cores are busy with that, this process would be in their way.
    """
    modules = imports_to_spare(declared)
    if not modules or declared.apart or not can_be_sent(kernel, logging.DEBUG):
        return declared
    crew.load(modules)
    crew.start(early_processes(declared))
    return replace(declared, apart=True, may_be_here=True)


def _start(declared: Declared, work: Work, kernel: Kernel, drain: Drain, crew: Crew) -> tuple[str, Runs, Probe]:
    """Probe, and only then create the results group; meanwhile worker processes start, if that is worth it."""

    loaded = set(sys.modules)

    def early(seconds: float) -> None:
        crew.stand_down()
        crew.start(likely_processes(declared, seconds))
        new = [name for name in list(sys.modules) if name not in loaded]
        crew.load(new)
        loaded.update(new)

    remaining = Runs.full(declared.n_positions)
    declared.flush_main()
    check_fits(declared, None)  # once more, with the books of its chunks
    crew.start(processes_for_reading(declared))
    # A call that takes a while loads what it needs, or is long: processes can start beside it.
    with drain.interruptible(at_first=True), crew.standby(likely_processes(declared, _LONG_CALL), _LONG_CALL):
        probe = probe_function(declared, kernel, remaining, begun=False, early=early, crew=crew)
    check_fits(declared, probe)  # before anything is created
    with drain.interruptible(at_first=True):
        fingerprint = declared.fingerprint()
    provenance = Provenance(
        function=function_name(declared.function),
        fingerprint=fingerprint,
        versions=environment(),
        probe=probe.stored(),
        batch=declared.batch,
    )
    with rows_files(declared.place.lock_path, target_file(declared)) as rows, declared.place.edit() as parent:
        name = create_group(parent, _main_beside(declared, parent), work, provenance, declared.max_failures, rows)
    log.info("%s: results go to %s::%s", declared.process_name, declared.place.path, name)
    return name, remaining, probe


def _main_beside(declared: Declared, parent: h5py.Group) -> h5py.Dataset:
    """Return the main dataset through the handle that is being edited, if it lies in the same file."""
    if not declared.place.by_handle and declared.main_path is not None:
        if declared.main_path == declared.place.path:
            return parent.file[declared.main.name]
    return declared.main


def _left(declared: Declared, work: Work, name: str, start: int = 0) -> Runs:
    """Return positions that are not done, from `start` on: all of them, or the first ones if there are many holes."""
    group = declared.place.results(name)
    return remaining_positions(group, work.n_positions, work.status_name, start=start, most_runs=_MOST_RUNS)


def _resume(
    declared: Declared, work: Work, kernel: Kernel, name: str, n_left: int, drain: Drain, crew: Crew
) -> tuple[Runs, Probe]:
    """Find what remains; a measurement that was stored with the results is used again."""
    declared.flush_main()
    adopt(declared.place, name)
    group = declared.place.results(name)
    remaining = _left(declared, work, name)
    done = 1 - n_left / work.n_positions
    log.info("%s: resuming %s, %.1f %% done", declared.process_name, name, 100 * done)
    probe = stored_probe(group)
    if work.status_name not in group:
        with declared.place.edit() as editable:
            ensure_mask(editable, name, work)
    if probe is None:
        with drain.interruptible(at_first=True):
            begun = n_left < work.n_positions
            probe = probe_function(declared, kernel, remaining, begun=begun, crew=crew)
    if declared.max_failures is not None and lacks_room(group, work, declared.max_failures):
        with declared.place.edit() as editable:
            ensure_room(editable, name, work, declared.max_failures)
    return remaining, probe


def compute_here(declared: Declared, kernel: Kernel, runs: Runs) -> tuple[Any, ...]:
    """Compute positions in this process and return the results; nothing is written, and whatever fails raises."""
    try:
        return kernel.compute(declared.rows_now(runs))
    except NoResult as error:
        failure = failure_of(error, Block.of(runs))
    failure.raise_error(declared.process_name, declared.label)
