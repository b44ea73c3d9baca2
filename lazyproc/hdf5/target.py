"""The commit layer: results become durable first, then the status mask tells of them.

One face, two back-ends. `InPlaceTarget`: workers have written their rows into the results' extents, the driver syncs
the file and sets the mask's bytes; HDF5 is not used at all during the loop. `HandleTarget`: the driver writes rows and
mask through an open handle, for files or layouts that cannot be written as bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.blocks import Block
from lazyproc.core.errors import ResultsError
from lazyproc.core.runs import Runs
from lazyproc.hdf5.extents import Extent, real_path
from lazyproc.hdf5.sink import Sink
from lazyproc.hdf5.transaction import share_lock

_PIECE = 2**24


class Target(Protocol):
    """What a run needs of its results."""

    sink: Sink | None
    """Where workers write in place; None if the driver writes."""

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> None:
        """Write the rows of a block from the driver."""

    def commit(self, done: Runs) -> None:
        """Make everything written durable, then mark the positions done, and make that durable."""

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
    """

    def __init__(self, sink: Sink, mask: Extent) -> None:
        self.sink: Sink | None = sink
        self._sink = sink
        self._mask = mask
        self._descriptor = mask.open(os.O_RDWR)
        if sink.shares_lock:
            try:
                share_lock(self._descriptor, mask.path)
            except BaseException:
                os.close(self._descriptor)
                raise

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> None:
        """Write the rows of a block from the driver. A kill in between leaves them unmarked, so they do not count."""
        self._sink.write(block, arrays)

    def commit(self, done: Runs) -> None:
        """Sync what workers of this host have written, then set the mask, then sync the mask."""
        if not done:
            return
        os.fdatasync(self._descriptor)
        ones = np.ones(min(_PIECE, int((done.stops - done.starts).max())), np.uint8)
        for start, stop in done:
            for piece in range(start, stop, _PIECE):
                self._mask.write(self._descriptor, piece, ones[: min(_PIECE, stop - piece)])
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file; the lock on it goes with that."""
        os.close(self._descriptor)


class HandleTarget:
    """Commit through an open, writable h5py group; every call from the driver.

    Parameters
    ----------
    group : h5py.Group
        The results group.
    outputs : sequence of str
        The names of the outputs, in their order.
    status_name : str
        The name of the status mask.
    owns_file : bool
        Whether `close` closes the file, which lazyproc then opened for this run.

    Notes
    -----
    HDF5 orders its own writes as it likes between two flushes: after a kill the file opens if nothing but the
    contents of early-allocated contiguous datasets was changed, which is what lazyproc creates.
    """

    sink: Sink | None = None

    def __init__(self, group: h5py.Group, outputs: Sequence[str], status_name: str, *, owns_file: bool = False) -> None:
        self._group = group
        self._owns_file = owns_file
        self._outputs = tuple(outputs)
        self._status_name = status_name

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> None:
        """Write the rows of a block as slices."""
        for name, rows in zip(self._outputs, arrays, strict=True):
            dataset = self._group[name]
            for start, stop, place in block.offsets():
                dataset[start:stop] = rows[place : place + stop - start].reshape(stop - start, *dataset.shape[1:])

    def commit(self, done: Runs) -> None:
        """Flush the file that the results are in, then set the mask, then flush again."""
        if not done:
            return
        self._flush()
        mask = self._group[self._status_name]
        for start, stop in done:
            mask[start:stop] = 1
        self._flush()

    def _flush(self) -> None:
        file = self._group.file
        file.flush()
        if real_path(file) is not None:
            os.fdatasync(file.id.get_vfd_handle())

    def close(self) -> None:
        """Close the file if it was opened for this run; else the handle belongs to whoever opened it."""
        if self._owns_file:
            self._group.file.close()


def read_mask_pieces(mask: h5py.Dataset, n_positions: int, name: str) -> Any:
    """Check a status mask and return its values piece by piece.

    Raises
    ------
    ResultsError
        If it is no dataset of one byte a position, or holds anything but 0 and 1.
    """
    if not isinstance(mask, h5py.Dataset):
        raise ResultsError(f"{name}: the status mask is a {type(mask).__name__}; expected a dataset.")
    if mask.shape != (n_positions,) or mask.dtype != np.uint8:
        raise ResultsError(
            f"{name}: the status mask has the shape {mask.shape} and the dtype {mask.dtype}; expected ({n_positions},) "
            "and uint8, one byte a position. These results cannot be used: compute with override=True."
        )
    return _pieces(mask, name)


def _pieces(mask: h5py.Dataset, name: str) -> Any:
    for start in range(0, mask.shape[0], _PIECE):
        piece = mask[start : start + _PIECE]
        if piece.size and piece.max() > 1:
            raise ResultsError(f"{name}: the status mask holds {int(piece.max())}; expected only 0 and 1.")
        yield piece
