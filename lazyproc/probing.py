"""Try the function before a run, and say what went wrong as if it had been a block of the run."""

from __future__ import annotations

from collections.abc import Callable

from lazyproc.core.apply import OutputMismatch, RowError
from lazyproc.core.blocks import Block
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.declared import Declared
from lazyproc.engine.crew import Crew
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import Kernel, failure_of
from lazyproc.recording import check_limit


def probe_function(
    declared: Declared,
    kernel: Kernel,
    remaining: Runs,
    *,
    begun: bool,
    early: Callable[[float], None] | None = None,
    crew: Crew | None = None,
) -> Probe:
    """Try the function; what it raises reaches the user with the positions concerned.

    Where failures are recorded, it must not fail wherever it is tried, unless results show that it can do better.
    """
    try:
        probe = declared.probe(kernel, remaining, early, crew)
    except (RowError, OutputMismatch) as error:
        failure = failure_of(error, block_of(error, remaining))
    else:
        if isinstance(probe, Failure):
            probe.raise_error(declared.process_name, declared.label, could_record=declared.max_failures is None)
        if begun or probe.first is None:
            return probe
        if not probe.all_failed:
            check_limit(declared, probe)
            return probe
        failure = failure_of(probe.first, block_of(probe.first, remaining))
    failure.raise_error(declared.process_name, declared.label, could_record=declared.max_failures is None)


def block_of(error: Exception, remaining: Runs) -> Block:
    """Return the positions that were tried when the function raised."""
    runs: Runs = getattr(error, "runs", remaining)
    return Block.of(runs)
