"""What a run says of results that it uses again, and of positions that fail; when it stops because of them."""

from __future__ import annotations

import logging
from typing import NoReturn

from lazyproc.core.errors import FailureLimitError
from lazyproc.core.failed import FailedPosition, first_lines
from lazyproc.core.no_result import RowError
from lazyproc.core.probe import Probe
from lazyproc.hdf5.failures import read_failures
from lazyproc.hdf5.search import Found
from lazyproc.run.declared import Declared
from lazyproc.run.loop import Outcome

log = logging.getLogger("lazyproc")


def say_failed(name: str, n_failed: int, n_positions: int) -> None:
    """Warn of failed positions in results."""
    if n_failed:
        log.warning(
            "%s: %d of %d positions failed and hold the fill value: failures(group) tells why, retry_failed() computes "
            "them again",
            name, n_failed, n_positions,
        )  # fmt: skip


def warn_of(found: Found) -> None:
    """Tell what is worth a warning about results that are used again."""
    for remark in found.remarks:
        log.warning("%s: %s", found.name, remark)
    say_failed(found.name, found.n_failed, found.n_positions)


def check_limit(declared: Declared, probe: Probe) -> None:
    """Stop before anything is created if too many positions fail at the first look already.

    Raises
    ------
    FailureLimitError
        Tells how many of those tried, and the first of them.
    """
    if declared.max_failures is None or len(probe.failed) <= declared.max_failures:
        return
    cause = probe.first.__cause__ if isinstance(probe.first, RowError) else probe.first
    n_tried = sum(runs.n_positions for runs, _ in probe.computed)
    _raise(declared, probe.failed, f"of the first {n_tried} that were tried", "Nothing was written.", cause)


def raise_limit(declared: Declared, name: str, outcome: Outcome, n_done: int) -> NoReturn:
    """Raise that a run has stopped because too many positions failed.

    Raises
    ------
    FailureLimitError
        Tells how many, the first of them, and that all is kept.
    """
    recorded = read_failures(declared.place.results(name), declared.status_name)
    kept = (
        f"{n_done} of {declared.n_positions} positions are done and kept in {declared.place.path}::{name}, "
        f"{len(recorded)} failed ones with their errors among them; the same call of compute() goes on from there."
    )
    found = {one.position: one for one in (*outcome.refused, *recorded)}
    error = outcome.example.error if outcome.example is not None else None
    _raise(declared, list(found.values()), f"of {declared.label}", kept, error)


def _raise(
    declared: Declared, failed: list[FailedPosition], where: str, kept: str, error: BaseException | None
) -> NoReturn:
    first = min(one.position for one in failed)
    raise FailureLimitError(
        f"{declared.process_name}: {len(failed)} positions {where} failed, more than max_failures = "
        f"{declared.max_failures} allows: {first_lines(failed)}. {kept} Correct the function, or allow more.",
        (first, first + 1),
    ) from error
