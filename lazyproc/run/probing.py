"""Try the function before a run, and say what went wrong as if it had been a block of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext

import h5py

from lazyproc.core.blocks import Block
from lazyproc.core.measure import run_probe
from lazyproc.core.no_result import NoResult
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.engine.block_function import failure_of
from lazyproc.engine.choose import can_be_sent
from lazyproc.engine.cluster import active_client
from lazyproc.engine.crew import Crew
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.packing import pack_for_cluster
from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.run.declared import Declared
from lazyproc.run.recording import check_limit
from lazyproc.run.sizes import memory_of
from lazyproc.run.where import may_send


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
        probe = _probe(declared, kernel, remaining, early, crew)
    except NoResult as error:
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


def _probe(
    declared: Declared,
    kernel: Kernel,
    remaining: Runs,
    early: Callable[[float], None] | None,
    crew: Crew | None,
) -> Probe | Failure:
    """Measure the function on a few positions, and check what it returns; `early` is told of the first calls.

    In this process, where what it raises comes out as it is; or, on a cluster and where the function is called in
    worker processes only, in a worker. One that cannot load the kernel leaves all to this one, if it may be here.
    """
    memory = memory_of(declared, None)
    record = declared.max_failures is not None
    sizes = memory.source_bytes, memory.result_bytes
    client = declared.client or active_client()
    if client is not None and declared.source.travels:
        from lazyproc.engine.trial import Trial, try_on_cluster

        packed = pack_for_cluster(kernel, declared.process_name)
        return try_on_cluster(client, packed, Trial(remaining, *sizes, declared.vectorized, record))
    if declared.apart and can_be_sent(kernel):
        from lazyproc.engine.trial import Trial, try_in_process

        trial = Trial(remaining, *sizes, declared.vectorized, record)
        with Crew() if crew is None else nullcontext(crew) as processes:
            made = try_in_process(kernel, trial, processes)
            if not (isinstance(made, Failure) and made.kind == "loading" and declared.may_be_here):
                return made
            processes.close()
        kernel.parcel.refuse(f"loaded there, it raises {type(made.error).__name__}: {made.error}")
    is_timed = may_send(declared) and not declared.source.read_seconds
    with nullcontext() if kernel.around is None else kernel.around():
        return run_probe(
            kernel.compute,
            declared.source.rows,
            remaining,
            source_bytes=memory.source_bytes,
            result_bytes=memory.result_bytes,
            vectorized=declared.vectorized,
            try_threads=declared.cores > 1 and declared.client is None,
            timed_chunk_rows=declared.source.chunk_rows if is_timed else 0,
            record=record,
            early=early,
        )


def block_of(error: NoResult, remaining: Runs) -> Block:
    """Return the positions that were tried when the function raised."""
    return Block.of(error.runs or remaining)


def stored_probe(group: h5py.Group) -> Probe | None:
    """Return what was measured when a results group was begun; None if that is not known, or not readable."""
    try:
        stored = json.loads(attribute(group, "lazyproc_probe", "null"))
        if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in stored.values()):
            return None
        return Probe(**stored) if stored["seconds_per_position"] > 0 and stored.get("thread_gain", 1) > 0 else None
    except H5_ERRORS:
        return None
