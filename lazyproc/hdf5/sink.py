"""Where a worker puts its rows in place: the extents of the results, behind the fence."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from lazyproc.core.blocks import Block
from lazyproc.hdf5.durable import sync_data
from lazyproc.hdf5.extents import Extent
from lazyproc.hdf5.lock import Fence, FencedError
from lazyproc.hdf5.locking import lock_hdf5
from lazyproc.hdf5.sidecar import CLAIMS, sidecar

if TYPE_CHECKING:
    from lazyproc.hdf5.claims import Claims
    from lazyproc.hdf5.shared_file import SharedFileTrial

_CHECKED_BYTES = 4096


@dataclass(frozen=True)
class Sink:
    """The results' extents, written by workers directly. Small; travels to any worker that sees the file.

    Attributes
    ----------
    extents : tuple of Extent
        One an output, in their order.
    fence : Fence
        Tells whether this run may still write.
    shares_lock : bool
        The HDF5 file is closed during the loop, so a worker holds its lock shared and foreign writers stay away.
        False where the caller has the file open for writing, and so holds that lock itself.
    mask : Extent or None
        The status mask, which lies in the HDF5 file itself, as results that will be compressed do not. None: the first
        of the results lies there, too.
    """

    extents: tuple[Extent, ...]
    fence: Fence
    shares_lock: bool
    mask: Extent | None = None

    @property
    def home(self) -> Extent:
        """One that lies in the HDF5 file, to which locks and sidecar files belong."""
        return self.mask or self.extents[0]

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> int:
        """Write the rows of a block.

        Parameters
        ----------
        block : Block
            Which positions.
        arrays : sequence of ndarray
            One an output, `(n_positions, width)`, rows in the order of the block.

        Returns
        -------
        int
            The checksum of the first bytes of each output, for the driver to compare.

        Raises
        ------
        FencedError
            If the run is over. Nothing was written.
        ResultsError
            If the file was replaced or truncated.
        """
        with opened((self.home, *self.extents)) as descriptors:
            # The file's lock first: once the driver is known to live, which holds it too, no other program can come in.
            if self.shares_lock:
                _share(descriptors[self.home.path], self.home.path, self.fence.locking)
            with self.fence.passed():
                for extent, rows in zip(self.extents, arrays, strict=True):
                    for start, stop, place in block.offsets():
                        extent.write(descriptors[extent.path], start, rows[place : place + stop - start])
                if not self.home.inode.is_local:
                    for path in {extent.path for extent in self.extents}:
                        sync_data(descriptors[path])  # the driver can only sync what is on its own machine
        return _checksum(rows[:1].tobytes()[:_CHECKED_BYTES] for rows in arrays)

    def trial(self) -> SharedFileTrial:
        """Return what shows whether workers on other machines may write here."""
        from lazyproc.hdf5.shared_file import SharedFileTrial

        return SharedFileTrial.of(self.home.path, self.home.inode, self.fence)

    def claims(self) -> Claims:
        """Return this sink for workers of which two may have the same block."""
        from lazyproc.hdf5.claims import Claims

        return Claims(self, self.fence, sidecar(self.home.path, CLAIMS))

    def checksum(self, block: Block) -> int:
        """Read back what `write` returned the checksum of: shows that a worker's bytes are seen here."""
        first = [(block.start, block.start + 1)]
        return _checksum(extent.read(first).tobytes()[:_CHECKED_BYTES] for extent in self.extents)

    def read(self, block: Block) -> tuple[NDArray[Any], ...]:
        """Read the rows of a block, one array an output."""
        return tuple(extent.read(block.runs()) for extent in self.extents)


@contextmanager
def opened(extents: Iterable[Extent]) -> Iterator[dict[str, int]]:
    """Open the files of extents for writing, each once, and give their descriptors by their paths; raises as `open`."""
    descriptors: dict[str, int] = {}
    try:
        for extent in extents:
            if extent.path not in descriptors:
                descriptors[extent.path] = extent.open(os.O_RDWR)
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _checksum(parts: Any) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def _share(descriptor: int, path: str, kind: str) -> None:
    if not lock_hdf5(descriptor, path, kind):
        raise FencedError(f"{path}: another program has opened the file for writing; nothing more is written.")
