"""Where the rows of a contiguous dataset lie in its file, and raw reading and writing of them.

A worker needs no HDF5 for a contiguous dataset: row `i` lies at `offset + i * row_bytes`. That is only true where the
handle really stands for a file on disk: see `find_extent`. Nothing here needs h5py, which is a fifth of what a worker
process would have to load before its first block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import FileChangedError, LazyprocError
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.room import full_code, gone, writing

_READ_PER_SECOND = 4e9
"""Bytes that one thread copies out of the page cache: measured 2-5 GB/s. Only chooses between one thread and more."""


@dataclass(frozen=True)
class Extent:
    """A contiguous dataset as bytes in a file. Small, and may travel to any worker that sees the file.

    Attributes
    ----------
    path : str
        The file, absolute.
    inode : FileId
        Device and inode: a file put in its place later is noticed.
    name : str
        The dataset, for messages.
    offset : int
        Where the first row begins, bytes from the start of the file.
    shape : tuple of int
        `(n_positions,)` or `(n_positions, n_columns)`.
    dtype : numpy.dtype
        As stored, byte order included.
    """

    path: str
    inode: FileId
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes a position."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Where the last row ends, bytes from the start of the file."""
        return self.offset + self.shape[0] * self.row_bytes

    def open(self, flags: int) -> int:
        """Open the file and make sure that it is still the same one.

        Raises
        ------
        FileChangedError
            If the file is gone, was replaced, or is too short.
        """
        with using(self.path, self.name):
            descriptor = os.open(self.path, flags | os.O_CLOEXEC)
        try:
            self.check(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def check(self, descriptor: int) -> None:
        """Make sure that an open file is still the same one, and holds all of the dataset.

        Raises
        ------
        FileChangedError
            If it was replaced, or is too short.
        """
        size = check_same_file(descriptor, self.path, self.inode, self.name).st_size
        if size < self.stop:
            raise FileChangedError(
                f"{self.path}: the file has {size} bytes, but {self.name} needs {self.stop}: it was truncated. Restore "
                "it from a copy."
            )

    def read(self, runs: Iterable[tuple[int, int]]) -> NDArray[Any]:
        """Read runs of rows, one after the other, into a new array `(n_rows, …)`."""
        spans = list(runs)
        rows = np.empty((sum(stop - start for start, stop in spans), *self.shape[1:]), self.dtype)
        flat = rows.reshape(-1).view(np.uint8).data
        descriptor = self.open(os.O_RDONLY)
        try:
            place = 0
            for start, stop in spans:
                size = (stop - start) * self.row_bytes
                self._read_into(descriptor, flat[place : place + size], self.offset + start * self.row_bytes)
                place += size
        finally:
            os.close(descriptor)
        return rows

    def _read_into(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            with using(self.path, self.name, offset + done):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise FileChangedError(
                    f"{self.path}: the file ends inside {self.name}, at byte {offset + done}; it was truncated. "
                    "Restore it from a copy."
                )
            done += count

    def write(self, descriptor: int, start: int, rows: NDArray[Any]) -> None:
        """Write rows from row `start` on, through a descriptor from `open`.

        Raises
        ------
        NoRoomError
            If the disk is full. What was written of the rows is not marked, so it does not count.
        FileChangedError
            If the file is too short by now, or the disk does not take what is written.
        """
        buffer = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        offset = self.offset + start * self.row_bytes
        done = 0
        self.check(descriptor)  # a write beyond the end of a file that was cut off would make it longer again
        with using(self.path, self.name, offset), writing(self.path, self.name, len(buffer)):
            while done < len(buffer):
                done += os.pwrite(descriptor, buffer[done:], offset + done)


@dataclass(frozen=True)
class ExtentSource:
    """Positions of a contiguous main dataset, read as bytes.

    Attributes
    ----------
    extent : Extent
        Where they lie.
    """

    extent: Extent
    travels = True
    chunk_rows = 1
    chunk_bytes = 0

    @property
    def read_seconds(self) -> float:
        """Seconds a position that reading takes at least, in one thread of several that do it at the same time."""
        return self.extent.row_bytes / _READ_PER_SECOND

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_positions, n_spectral)`."""
        return self.extent.shape[0], self.extent.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return self.extent.dtype

    def rows(self, runs: Iterable[tuple[int, int]]) -> NDArray[Any]:
        """Read runs of positions into one new array `(n_positions, n_spectral)`. Safe in threads."""
        return self.extent.read(runs)


@contextmanager
def using(path: str, name: str, offset: int | None = None) -> Iterator[None]:
    """Turn the system's errors about a file into one that names it and the dataset.

    Parameters
    ----------
    path, name : str
        The file and the dataset.
    offset : int, optional
        The byte that is read or written.

    Raises
    ------
    FileChangedError
        If the file is gone, may not be used anymore, or the disk fails.
    """
    try:
        yield
    except LazyprocError:
        raise
    except FileNotFoundError as error:
        raise gone(path, name) from error
    except OSError as error:
        if full_code(error) is not None:  # which says more
            raise
        place = "" if offset is None else f" at byte {offset}"
        raise FileChangedError(
            f"{path}: {name} cannot be read or written{place}: {error.strerror or error}. If it is not a matter of "
            "permissions, look for faults of the disk or the network; then run the same again."
        ) from error


def check_same_file(descriptor: int, path: str, inode: FileId, name: str) -> os.stat_result:
    """Make sure that an open file is the one in which a dataset was found, and return its status.

    Raises
    ------
    FileChangedError
        If another file has been put in its place.
    """
    status = os.fstat(descriptor)
    if not inode.fits(status):
        raise FileChangedError(
            f"{path}: the file was replaced by another one since {name} was found in it. "
            "Open it again and start again; nothing was written into the new file."
        )
    return status
