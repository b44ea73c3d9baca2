"""Finish what a run has computed: compress what waits for it, and note the end; now, or in a later call."""

from __future__ import annotations

import logging
from typing import Any

from lazyproc.core.errors import LazyprocError
from lazyproc.drain import Drain
from lazyproc.engine.choose import Scheduler
from lazyproc.hdf5.compress import Encoders, StoppedError, n_threads
from lazyproc.hdf5.finish import finish, is_unfinished
from lazyproc.hdf5.rows_file import waiting
from lazyproc.hdf5.search import Work
from lazyproc.run.declared import Declared
from lazyproc.run.sizes import limit_bytes

_CALLS_A_WORKER = 3
"""Chunks that are being encoded for each worker of a cluster, on their way, or waiting to be written."""

log = logging.getLogger("lazyproc")


def finish_late(declared: Declared, work: Work, name: str, drain: Drain) -> None:
    """Finish what a run left that died after its last commit; if it can be done, since nothing needs it."""
    parent = declared.place.group()
    if parent is None or not is_unfinished(parent.file[name], work):
        return
    waits = bool(waiting(parent.file[name]))
    try:
        declared.place.check_writable()
        finish_results(declared, work, name, drain)
    except LazyprocError as error:
        log.log(logging.WARNING if waits else logging.INFO, "%s: could not be finished (%s)", name, error)


def finish_results(
    declared: Declared, work: Work, name: str, drain: Drain, cluster: Scheduler | None = None, **more: Any
) -> None:
    """Compress what waits for it, by a cluster whose workers have written it, and note the end.

    A signal leaves that to the next call.
    """

    def room(n_calls: int) -> int:
        return n_threads(declared.outputs, work.n_positions, n_calls, limit_bytes(declared))

    elsewhere = None
    if cluster is not None and cluster.client.status == "running":
        from lazyproc.engine.spread import Spread

        elsewhere = Spread(cluster.client, room(_CALLS_A_WORKER * cluster.n_workers))
    encoders = Encoders(room(declared.cores), elsewhere)
    try:
        finish(declared.place, name, work, encoders, lambda: drain.signal is not None, **more)
    except StoppedError as error:
        log.info("%s", error)
