"""Where blocks are computed and written, and which worker processes begin, and load what, before that is known."""

from __future__ import annotations

import logging

from lazyproc.core.imports import imports_to_come
from lazyproc.core.probe import Probe
from lazyproc.engine.choose import HELP_PAYS, POOL_PAYS, Scheduler, choose_local
from lazyproc.engine.cluster import active_client
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.own_job import native_threads
from lazyproc.hdf5.sink import Sink
from lazyproc.run.declared import Declared

_EARLY_PROCESSES = 4
_HDF5_PER_SECOND = 1e9
"""Bytes that HDF5 decodes and copies in one process: measured 0.5-2 GB/s, from the page cache."""
_FEW_POSITIONS = 16
"""For so few no process is worth its start, whatever the function is."""

log = logging.getLogger("lazyproc")


def scheduler_of(
    declared: Declared, kernel: Kernel, probe: Probe | None, n_remaining: int, *, wait: bool = True
) -> Scheduler:
    """Choose where blocks are computed: the client handed over, the active one, else what the job calls for."""
    client = declared.client or active_client()
    if client is not None and declared.source.travels:
        return Scheduler.on_cluster(client, native_threads(client), wait=wait)
    if client is not None:
        log.warning("%s lies behind a handle that other processes cannot open: it is computed here", declared.label)
    if probe is None:
        return Scheduler("processes" if declared.cores > 1 else "serial", declared.cores)
    return choose_local(kernel, probe, n_remaining, declared.cores, apart=declared.apart).sending(kernel)


def in_place_everywhere(declared: Declared, scheduler: Scheduler, sink: Sink | None) -> bool:
    """Tell whether all workers may write into the file themselves; if not, the log says why."""
    if sink is None or not sink.fence.holds_workers:
        return False
    if scheduler.client is None:
        return True
    from lazyproc.engine.handshake import why_not_in_place

    reason = why_not_in_place(scheduler.client, sink.trial())
    if reason:
        log.warning("%s: results travel to the driver, which writes them: %s", declared.process_name, reason)
    return not reason


def early_processes(declared: Declared) -> int:
    """Return how many worker processes may be started before it is known what the job takes; the others come later."""
    return min(declared.cores, _EARLY_PROCESSES)


def likely_processes(declared: Declared, seconds_per_position: float) -> int:
    """Return how many worker processes are worth being started when it was just found how long a position takes.

    They are ready when the rest of the probe is done, and the results group made. No more than a few: the others
    are started when they are needed.
    """
    if declared.apart or not _may_use_processes(declared):
        return 0
    seconds = seconds_per_position * declared.n_positions
    n_processes = declared.cores if seconds >= POOL_PAYS else declared.cores - 1 if seconds >= HELP_PAYS else 0
    return min(n_processes, early_processes(declared))


def processes_for_reading(declared: Declared) -> int:
    """Return how many worker processes are worth being started because HDF5 has so much to read."""
    n_bytes = declared.main.size * declared.main.dtype.itemsize
    is_long = not declared.source.read_seconds and n_bytes >= POOL_PAYS * _HDF5_PER_SECOND
    return early_processes(declared) if is_long and not declared.apart and may_send(declared) else 0


def imports_to_spare(declared: Declared) -> list[str]:
    """Return modules that the function would load in this process, but for worker processes that need them, too."""
    is_worth_it = _may_use_processes(declared) and declared.n_positions > _FEW_POSITIONS
    return imports_to_come(declared.function) if is_worth_it else []


def may_send(declared: Declared) -> bool:
    """Tell whether worker processes of this machine would get blocks, if that is worth it."""
    return declared.cores > 1 and declared.source.travels and (declared.client or active_client()) is None


def _may_use_processes(declared: Declared) -> bool:
    """Tell whether the function, by its kind, would be called in worker processes of this machine."""
    return may_send(declared) and not declared.vectorized
