"""What a driver does while it is armed: compute, recover; and wrong ways of doing it, which the harness must notice."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import h5py

from lazyproc.core.blocks import Block
from lazyproc.core.events import BlockDone, Committed, Event, Finished, Started
from lazyproc.core.runs import Runs
from lazyproc.hdf5 import place
from lazyproc.hdf5.sink import Sink
from lazyproc.hdf5.target import InPlaceTarget

from .check import BEGUN, COMMITTED, note_line, recover_file
from .layouts import Layout, set_sizes
from .processes import PAUSE


def note(text: str) -> None:
    """Put a text into the shim's record, in its place among the calls."""
    function = getattr(ctypes.CDLL(None), "deaths_note", None)
    if function is not None:
        function(text.encode())


def _listener(event: Event, each_block_is_committed: bool) -> None:
    if isinstance(event, Committed) or (each_block_is_committed and isinstance(event, BlockDone)):
        note_line(COMMITTED)
    if isinstance(event, BlockDone):
        note(f"done {event.n_positions}")
    for kind, word in ((Started, "started"), (Committed, "committed"), (Finished, "finished")):
        if isinstance(event, kind):
            note(f"{word} {event.n_done}")


def compute(layout: Layout, folder: str, interval: float) -> None:
    """Run the layout's process: find, create or resume, compute, commit; recover first what the caller has open."""
    set_sizes(layout)
    note("begin")
    note_line(BEGUN)
    if layout.needs_recover:
        recover_file(str(layout.results(folder)))
    with layout.process(folder, interval) as process:
        process._progress = functools.partial(_listener, each_block_is_committed=layout.kind.startswith("hooks"))
        process.compute()
        note("returned")
    note("end")


def recover(layout: Layout, folder: str, interval: float) -> None:
    """Recover the results' file, as `lazyproc recover` does."""
    note("begin")
    recover_file(str(layout.results(folder)))
    note("end")


# -- wrong ways, which the harness must notice -----------------------------------------------------------------------


def mask_first(layout: Layout, folder: str, interval: float) -> None:
    """Compute, but mark the positions of a block before their results are written."""
    targets: list[InPlaceTarget] = []
    make, write = InPlaceTarget.__init__, Sink.write

    def remember(self: InPlaceTarget, *args: Any) -> None:
        make(self, *args)
        targets.append(self)

    def mark_and_write(self: Sink, block: Block, arrays: Any) -> Any:
        targets[-1].commit(Runs.from_spans(block.runs()))
        return write(self, block, arrays)

    InPlaceTarget.__init__, Sink.write = remember, mark_and_write  # type: ignore[method-assign,assignment]
    compute(layout, folder, interval)


def plain_creation(layout: Layout, folder: str, interval: float) -> None:
    """Compute, but create the group with plain h5py, without a journal."""
    place.transaction = lambda path, same=None: h5py.File(path, "r+")  # type: ignore[assignment]
    compute(layout, folder, interval)


ACTIONS: dict[str, Callable[[Layout, str, float], None]] = {
    "compute": compute,
    "recover": recover,
    "mask first": mask_first,
    "plain creation": plain_creation,
}


def import_all() -> None:
    """Import what the runs will, so that no child has to."""
    import dask.local  # noqa: F401
    import loky.process_executor  # noqa: F401
    import threadpoolctl  # noqa: F401

    import lazyproc.core.measure
    import lazyproc.core.trials
    import lazyproc.engine.parallel
    import lazyproc.run.perform

    if not float(os.environ.get(PAUSE, "0")):
        clock = _SteadyClock()
        lazyproc.core.measure.time = lazyproc.core.trials.time = clock  # type: ignore[attr-defined]


class _SteadyClock:
    """Every look at it takes ten microseconds: blocks are the same in each run, and calls have their numbers."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        """Return the seconds."""
        self._now += 1e-5
        return self._now
