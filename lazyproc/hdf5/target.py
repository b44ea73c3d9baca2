"""The commit layer: results become durable first, then the status mask tells of them.

One face, three ways. Here, `InPlaceTarget`: workers have written their rows into the results' extents, the driver syncs
the file and sets the mask's bytes; HDF5 is not used at all during the loop. For files and layouts that cannot be
written as bytes, the driver writes rows and mask through HDF5, behind an open handle or in transactions: see
`lazyproc.hdf5.handle_target`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.blocks import Block
from lazyproc.core.runs import Runs
from lazyproc.hdf5.durable import sync_data
from lazyproc.hdf5.extents import Extent, using
from lazyproc.hdf5.room import reserve, writing
from lazyproc.hdf5.sink import Sink, opened
from lazyproc.hdf5.transaction import refuse_marked, share_lock

_PIECE = 2**24


class Target(Protocol):
    """What a run needs of its results."""

    sink: Sink | None
    """Where workers write in place; None if the driver writes."""

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> None:
        """Write the rows of a block from the driver."""

    def commit(self, done: Runs) -> None:
        """Make everything written durable, then mark the positions done, and make that durable."""

    def unmark(self, positions: Runs) -> None:
        """Take positions back: they are not done any more, and that is durable before anything else is written."""

    def close(self) -> None:
        """Give back what the target itself opened."""


class InPlaceTarget:
    """Commit by bytes.

    Parameters
    ----------
    sink : Sink
        The results' extents.
    mask : Extent
        The status mask, one byte a position.

    Notes
    -----
    Only one driver may use it (the run's lock sees to that). Nothing of the HDF5 structure changes, so readers and a
    kill at any instant find a file that opens. The order data, sync, mask, sync holds for power loss, too.

    Raises
    ------
    FileBusyError
        If another program has the file open for writing.
    FileChangedError
        If the file is gone, or is no longer the same.
    NoRoomError
        If the results take room that they do not have yet, and there is none.
    """

    def __init__(self, sink: Sink, mask: Extent) -> None:
        self.sink: Sink | None = sink
        self._sink = sink
        self._mask = mask
        with ExitStack() as stack:
            self._descriptors = stack.enter_context(opened((mask, *sink.extents)))
            self._descriptor = self._descriptors[mask.path]
            if sink.shares_lock:
                share_lock(self._descriptor, mask.path)
                refuse_marked(self._descriptor, mask.path)
            for extent in (*sink.extents, mask):  # a copy of partial results may have holes
                size = extent.stop - extent.offset
                reserve(self._descriptors[extent.path], extent.offset, size, extent.path, extent.name)
            self._files = stack.pop_all()

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> None:
        """Write the rows of a block from the driver. A kill in between leaves them unmarked, so they do not count."""
        self._sink.write(block, arrays)

    def commit(self, done: Runs) -> None:
        """Sync what workers of this host have written, then set the mask, then sync the mask."""
        if not done:
            return
        for extent in self._sink.extents:
            extent.check(self._descriptors[extent.path])  # rows that were cut off again must not be marked
        for path in {extent.path for extent in self._sink.extents} | {self._mask.path}:  # failures lie beside the mask
            self._sync(path)
        self._mark(done, 1)

    def unmark(self, positions: Runs) -> None:
        """Clear the mask there, then sync."""
        if positions:
            self._mark(positions, 0)

    def _mark(self, positions: Runs, value: int) -> None:
        values = np.full(min(_PIECE, int((positions.stops - positions.starts).max())), value, np.uint8)
        for start, stop in positions:
            for piece in range(start, stop, _PIECE):
                self._mask.write(self._descriptor, piece, values[: min(_PIECE, stop - piece)])
        self._sync(self._mask.path)

    def _sync(self, path: str) -> None:
        with using(path, self._mask.name), writing(path, "the results"):
            sync_data(self._descriptors[path])

    def close(self) -> None:
        """Close the files; the lock on the HDF5 file goes with that."""
        self._files.close()
