"""Where the rows of a contiguous dataset lie in its file, and raw reading and writing of them.

A worker needs no HDF5 for a contiguous dataset: row `i` lies at `offset + i * row_bytes`. That is only true where the
handle really stands for a file on disk, so `find_extent` checks the driver, the signature, the inode and the type.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import FileChangedError, LazyprocError
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.room import full_code, gone, writing

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


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

    def check_path(self) -> None:
        """Make sure that the file still lies under its name, and holds all of the dataset; raises as `check`."""
        with using(self.path, self.name):
            status = os.stat(self.path)
        if not self.inode.fits(status) or status.st_size < self.stop:
            os.close(self.open(os.O_RDONLY))

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

    def write(self, descriptor: int, start: int, rows: NDArray[Any]) -> int:
        """Write rows from row `start` on, through a descriptor from `open`; return the bytes written.

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
        return done


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


def find_extent(dataset: h5py.Dataset, path: str | None = None) -> Extent | None:
    """Find where the rows of a dataset lie, or None if raw reading and writing would not be the same as HDF5's.

    Parameters
    ----------
    dataset : h5py.Dataset
        Any dataset of one or two dimensions.
    path : str, optional
        The file behind the handle, where lazyproc opened it as a Python file object itself.

    Notes
    -----
    The offset that HDF5 tells looks right for drivers, too, that have no file on disk (`core`, `family`, a Python file
    object of somebody else), hence the checks.
    """
    if path is None:
        path = real_path(dataset.file)
    if path is None or not _plain_layout(dataset) or not plain_type(dataset):
        return None
    offset = dataset.id.get_offset()
    if offset is None:
        return None
    with open(path, "rb") as file:
        file.seek(dataset.file.userblock_size)
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            return None
        status = os.fstat(file.fileno())
    shape = tuple(int(n) for n in dataset.shape)
    return Extent(os.path.abspath(path), FileId.of(status), str(dataset.name), int(offset), shape, dataset.dtype)


def real_path(file: h5py.File) -> str | None:
    """Return the file's path if the handle is a plain one of just this file on disk."""
    if file.driver != "sec2":
        return None
    path = os.path.abspath(file.filename)
    try:
        same = os.path.samestat(os.fstat(file.id.get_vfd_handle()), os.stat(path))
    except (OSError, RuntimeError, NotImplementedError):
        return None
    return path if same else None


def _plain_layout(dataset: h5py.Dataset) -> bool:
    creation = dataset.id.get_create_plist()
    return (
        dataset.ndim in (1, 2)
        and creation.get_layout() == h5py.h5d.CONTIGUOUS
        and creation.get_external_count() == 0
        and creation.get_nfilters() == 0
    )


def plain_type(dataset: h5py.Dataset) -> bool:
    """Tell whether the bytes on disk are those that NumPy has in memory for the dataset's dtype."""
    dtype = dataset.dtype
    if dtype.hasobject:
        return False
    stored = dataset.id.get_type()
    try:
        return bool(stored.get_size() == dtype.itemsize and stored == h5py.h5t.py_create(dtype, logical=True))
    except TypeError:
        return False
