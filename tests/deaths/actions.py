"""What a driver does while it is armed: compute, recover; and wrong ways of doing it, which the harness must notice."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from lazyproc.core.events import BlockDone, Committed, Event, Finished, Started

from .check import recover_file
from .layouts import Layout


def note(text: str) -> None:
    """Put a text into the shim's record, in its place among the calls."""
    function = getattr(ctypes.CDLL(None), "deaths_note", None)
    if function is not None:
        function(text.encode())


def _listener(event: Event) -> None:
    if isinstance(event, BlockDone):
        note(f"done {event.n_positions}")
    for kind, word in ((Started, "started"), (Committed, "committed"), (Finished, "finished")):
        if isinstance(event, kind):
            note(f"{word} {event.n_done}")


def compute(layout: Layout, folder: str, interval: float) -> None:
    """Run the layout's process: find, create or resume, compute, commit; recover first what the caller has open."""
    note("begin")
    if layout.needs_recover:
        recover_file(str(layout.results(folder)))
    with layout.process(folder, interval) as process:
        process._progress = _listener
        process.compute()
        note("returned")
    note("end")


def recover(layout: Layout, folder: str, interval: float) -> None:
    """Recover the results' file, as `lazyproc recover` does."""
    note("begin")
    recover_file(str(layout.results(folder)))
    note("end")


ACTIONS: dict[str, Callable[[Layout, str, float], None]] = {"compute": compute, "recover": recover}


def import_all() -> None:
    """Import what the runs will, so that no child has to."""
    import dask.local
    import loky.process_executor  # noqa: F401
    import threadpoolctl  # noqa: F401

    import lazyproc.engine.parallel
    import lazyproc.perform  # noqa: F401
