"""Count what a contender hands to its scheduler: tasks, and the bytes of its graphs. For runs that are not timed.

All that makes a Dask graph gives it to one of two places: `get_async` of Dask's local scheduler, or a distributed
client. joblib gets calls. Each is let through as it is, and looked at on its way. What cannot be pickled, since it
never leaves the process (HDF5's handles, locks, what runs the graph), counts as a reference of a few bytes.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass
class Counts:
    """What was counted.

    Attributes
    ----------
    tasks : int
        Keys of Dask graphs, and calls of joblib.
    blocks : int or None
        Blocks of lazyproc, wherever they are done, without what was computed when the function was tried; None: it has
        not run.
    graph_bytes : int or None
        Of the graphs, pickled, and of lazyproc's function as it is sent to each worker process; None: there is none.
    """

    tasks: int = 0
    blocks: int | None = None
    graph_bytes: int | None = None

    def note_graph(self, graph: Any) -> None:
        """Count a graph."""
        tasks = graph.__dask_graph__() if hasattr(graph, "__dask_graph__") else graph
        self.tasks += len(dict(tasks))
        self.note_bytes(pickled_size(graph))

    def note_bytes(self, size: int) -> None:
        """Count bytes that are sent."""
        self.graph_bytes = (self.graph_bytes or 0) + size

    def note_event(self, event: Any) -> None:
        """Count a block: what lazyproc tells of a run."""
        kind = type(event).__name__
        if kind == "Started":
            self.blocks, self.graph_bytes = 0, self.graph_bytes or 0
        elif kind == "BlockDone" and self.blocks is not None:
            self.blocks += 1

    def told(self) -> dict[str, int | None]:
        """Return what is printed."""
        return {"tasks": (self.tasks or None) if self.blocks is None else self.blocks, "graph_bytes": self.graph_bytes}


def pickled_size(graph: Any) -> int:
    """Return the bytes of a graph, pickled, without what cannot leave the process."""
    import cloudpickle

    stays = tuple(_kinds_that_stay())

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, item: Any) -> str | None:
            return type(item).__name__ if isinstance(item, stays) else None

    buffer = io.BytesIO()
    Pickler(buffer).dump(graph)
    return buffer.tell()


def _kinds_that_stay() -> Iterator[type]:
    yield type(threading.Lock())
    with suppress(ImportError):
        import h5py

        yield h5py.HLObject
    with suppress(ImportError):
        from lazyproc.engine.window import Batch

        yield Batch


def start_counting() -> Counts:
    """Count all that this process hands out from now on."""
    counts = Counts()
    for watch in (_watch_local_graphs, _watch_distributed_graphs, _watch_joblib, _watch_lazyproc):
        with suppress(ImportError):  # whoever does not use it does not have to have it
            watch(counts)
    return counts


def _watch_local_graphs(counts: Counts) -> None:
    import dask.local
    import dask.threaded

    real = dask.local.get_async

    def get_async(submit: Any, num_workers: Any, dsk: Any, *args: Any, **kwargs: Any) -> Any:
        counts.note_graph(dsk)
        return real(submit, num_workers, dsk, *args, **kwargs)

    dask.local.get_async = dask.threaded.get_async = get_async


def _watch_distributed_graphs(counts: Counts) -> None:
    from distributed import Client

    real = Client._graph_to_futures

    def graph_to_futures(self: Any, expr: Any, *args: Any, **kwargs: Any) -> Any:
        counts.note_graph(expr)
        return real(self, expr, *args, **kwargs)

    Client._graph_to_futures = graph_to_futures


def _watch_joblib(counts: Counts) -> None:
    from joblib import Parallel

    real = Parallel.__call__

    def call(self: Any, calls: Any) -> Any:
        def counted() -> Iterator[Any]:
            for one in calls:
                counts.tasks += 1
                yield one

        return real(self, counted())

    Parallel.__call__ = call


def _watch_lazyproc(counts: Counts) -> None:
    import lazyproc.process
    from lazyproc.engine.lane import Lane
    from lazyproc.engine.packing import pack_once

    real = Lane._start

    def start(self: Any) -> None:
        counts.note_bytes(len(pack_once(self._kernel)))
        real(self)

    Lane._start = start
    lazyproc.process.ProgressBar = lambda: counts.note_event  # which is all that a progress bar is for
