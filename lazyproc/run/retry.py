"""Compute failed positions again: in their results group, under the same lock and promise as any run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import h5py

from lazyproc.core.errors import FunctionError, OutputError, ResultsError
from lazyproc.core.events import Listener
from lazyproc.core.failed import first_lines
from lazyproc.core.highwater import high_water
from lazyproc.core.runs import Runs
from lazyproc.drain import Drain, nothing_yet
from lazyproc.engine.crew import Crew
from lazyproc.engine.failure import Failure
from lazyproc.hdf5.failures import positions_to_retry, read_failures
from lazyproc.hdf5.finish import adopt
from lazyproc.hdf5.record import ensure_room, note_reopened
from lazyproc.hdf5.search import Found, Work, best_of, remaining_positions
from lazyproc.run.declared import Declared
from lazyproc.run.group import Run, run_group
from lazyproc.run.holding import locked, with_lock
from lazyproc.run.probing import probe_function, stored_probe
from lazyproc.run.sizes import check_fits

log = logging.getLogger("lazyproc")


def retry(
    declared: Declared, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, chosen: str | None, listener: Listener
) -> str:
    """Return the name of the results group in which failed positions were computed again.

    Parameters
    ----------
    declared : Declared
        The process on its main dataset.
    args, kwargs
        The arguments of `compute`.
    chosen : str or None
        The partial group, which goes before finished ones; None for the last finished one, else the last partial one.
    listener : callable
        Is told of blocks and commits.

    Raises
    ------
    ResultsError
        If there are no results of this work.
    FunctionError, OutputError
        If failures are not to be recorded (`Declared.max_failures` is None) and positions have failed again. They stay
        recorded, with what they raised now; all others have their results.
    LazyprocError
        Whatever else went wrong; finished blocks are committed.
    Interrupted, SystemExit
        After a drain.

    Notes
    -----
    The positions are first taken out of the status mask, durably, and then computed by the loop of any run. Killed in
    between, those not computed again yet are not done: `compute` computes them, and so does the next `retry`.
    """
    declared, kernel = declared.called_with(args, kwargs)
    work = declared.work(args, kwargs)
    raises = declared.max_failures is None
    drain = Drain(nothing_yet(declared.process_name), listener)
    high_water.forget()
    with drain.on_signals(), locked(declared) as lock:
        declared, kernel = with_lock(declared, kernel, lock)
        with drain.interruptible(at_first=True):
            found = _latest(declared, declared.found(work), chosen)
        adopt(declared.place, found.name)
        again, undone = _positions(declared, work, found.name)
        if not again:
            log.info("%s: no position of %s has failed", declared.process_name, found.name)
            return found.name
        for remark in found.remarks:
            log.warning("%s: %s", found.name, remark)
        check_fits(declared, None)  # before anything is read of the main dataset
        declared = replace(declared.settled(), max_failures=again.n_positions)  # all of them may fail again
        declared.flush_main()
        kernel = replace(kernel, source=declared.source, max_failures=again.n_positions)
        probe = stored_probe(_group(declared, found.name))
        if probe is None:
            with drain.interruptible(at_first=True):
                probe = probe_function(declared, kernel, again, begun=True)
        check_fits(declared, probe)
        with declared.place.edit() as editable:
            ensure_room(editable, found.name, work, again.n_positions)
            note_reopened(editable, found.name, int(undone.starts[0]))
        with Crew() as crew:
            run = Run(declared, work, kernel, found.name, lock, listener, drain, crew)
            outcome = run_group(run, again, probe, work.n_positions - undone.n_positions, again=True)
    if raises and outcome.example is not None:
        _raise_again(declared, found.name, outcome.example)
    return found.name


def _group(declared: Declared, name: str) -> h5py.Group:
    return declared.place.results(name)


def _latest(declared: Declared, found: list[Found], chosen: str | None) -> Found:
    """Return the results that `compute` would return or resume."""
    best = best_of(found, chosen)
    if best is None:
        raise ResultsError(
            f"{declared.process_name}: there are no results of this work in {declared.place.path}::"
            f"{declared.place.name}; expected some with failed positions. Call compute() first, with the same "
            "arguments; why_not_duplicate(group) tells what is different about a group."
        )
    return best


def _positions(declared: Declared, work: Work, name: str) -> tuple[Runs, Runs]:
    """Return the positions to compute again, and with them all that are not done."""
    group = _group(declared, name)
    again = positions_to_retry(group, work.status_name)
    return again, again.union(remaining_positions(group, work.n_positions, work.status_name))


def _raise_again(declared: Declared, name: str, example: Failure) -> NoReturn:
    """Raise what the function raised, as `compute` would; all is kept."""
    still = read_failures(_group(declared, name), declared.status_name)
    message = (
        f"{declared.process_name}: {len(still)} positions of {declared.label} have failed again, and stay recorded: "
        f"{first_lines(still)}"
    )
    if example.kind == "output":
        raise OutputError(message) from None
    raise FunctionError(message, example.positions) from example.error
