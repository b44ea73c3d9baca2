"""Read positions of a main dataset: by extents where it is contiguous, else through HDF5.

Ways, chosen once by `source_of`, all with the same face (`rows`, `shape`, `dtype`, `travels`):

- `ExtentSource`: contiguous data, read by `preadv`; travels to workers, needs no HDF5 there.
- `FileSource`: chunked, filtered, virtual or external data; each process opens the file itself, without locking it,
  because a caller's `r+` handle keeps others from opening it normally. A run reads chunks as bytes where it can
  (`ChunkSource`), once the file is settled; a view cannot know that nobody will move them.
- `HandleSource`: a handle with no file on disk behind it (`core`, a Python file object); stays in its process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import FileChangedError, LazyprocError
from lazyproc.hdf5.chunks import ChunkSource
from lazyproc.hdf5.extents import ExtentSource, using
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.on_disk import find_extent, real_path
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.whole import Whole

Spans = Iterable[tuple[int, int]]


@dataclass(frozen=True)
class FileSource:
    """Positions of a main dataset that only HDF5 can read; each process opens the file for itself.

    Attributes
    ----------
    path, name : str
        The file and the dataset.
    inode : FileId
        Device and inode of the file when it was found.
    shape, dtype
        Of the dataset, `(n_positions, n_spectral)`.
    chunk_rows : int
        Positions in a storage chunk; 1 where there are none.
    chunk_bytes : int
        What HDF5 takes for storage chunks while it reads, beside the rows.
    whole : Whole
        The files that it lies in, which must not become shorter.
    many_files : bool
        Parts lie in other files (virtual dataset, external storage).
    """

    path: str
    name: str
    inode: FileId
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    chunk_rows: int
    chunk_bytes: int
    whole: Whole
    many_files: bool = False
    travels = True
    read_seconds = 0.0  # threads take turns

    def rows(self, runs: Spans) -> NDArray[Any]:
        """Read runs of positions into one new array `(n_positions, n_spectral)`. Threads take turns inside HDF5."""
        with _opened_unlocked(self) as file:
            rows = _read_slices(file[self.name], runs)
        self.whole.check()
        return rows


@dataclass(frozen=True, eq=False)
class HandleSource:
    """Positions of a main dataset that exists only behind an open handle of this process."""

    dataset: h5py.Dataset
    chunk_rows: int
    chunk_bytes: int
    travels = False
    read_seconds = 0.0  # threads take turns

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_positions, n_spectral)`."""
        return int(self.dataset.shape[0]), int(self.dataset.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """As h5py reads it."""
        dtype: np.dtype[Any] = self.dataset.dtype
        return dtype

    def rows(self, runs: Spans) -> NDArray[Any]:
        """Read runs of positions into one new array `(n_positions, n_spectral)`. Threads take turns inside HDF5."""
        return _read_slices(self.dataset, runs)


Source = ExtentSource | FileSource | HandleSource | ChunkSource


def source_of(dataset: h5py.Dataset, path: str | None = None) -> Source:
    """Choose how the positions of a main dataset are read.

    Parameters
    ----------
    dataset : h5py.Dataset
        The main dataset, `(n_positions, n_spectral)`, open.
    path : str, optional
        The file behind the handle where lazyproc opened it as a Python file object.

    Notes
    -----
    What the caller's own handle has not flushed yet is not seen by other processes: flush the file before a run.

    Raises
    ------
    FileChangedError
        If a virtual dataset refers to a file that is not there.
    """
    extent = find_extent(dataset, path)
    if extent is not None:
        return ExtentSource(extent)
    chunk_rows, chunk_bytes = chunk_layout(dataset)
    path = path or real_path(dataset.file)
    if path is None:
        return HandleSource(dataset, chunk_rows, chunk_bytes)
    status = os.stat(path)
    shape = int(dataset.shape[0]), int(dataset.shape[1])
    inode = FileId.of(status)
    many = dataset.is_virtual or bool(dataset.external)
    whole = Whole.of(dataset, path)
    return FileSource(path, str(dataset.name), inode, shape, dataset.dtype, chunk_rows, chunk_bytes, whole, many)


def write_out(dataset: h5py.Dataset, source: Source) -> None:
    """Have the rows that a writable handle still holds back written, where they are read as bytes without HDF5.

    Only rows that have their place: their own bytes are all that is written. The index of chunked data is a part of the
    file's structure, which only a guarded change may write out; until then they are read through the handle.
    """
    if dataset.file.mode != "r" and isinstance(source, ExtentSource):
        dataset.flush()


def chunk_layout(dataset: h5py.Dataset) -> tuple[int, int]:
    """Return the positions in a storage chunk, and the bytes that HDF5 takes to read one beside the rows.

    HDF5 decodes one chunk at a time, and has it before and after each filter; what it keeps is in its cache.
    """
    if dataset.chunks is None:
        return 1, 0
    rows, columns = dataset.chunks
    chunk_bytes = int(rows * columns * dataset.dtype.itemsize)
    _, cache_bytes, _ = dataset.id.get_access_plist().get_chunk_cache()
    is_filtered = dataset.id.get_create_plist().get_nfilters() > 0
    return int(rows), min(int(cache_bytes), int(dataset.nbytes)) + (2 * chunk_bytes if is_filtered else 0)


@contextmanager
def _opened_unlocked(source: FileSource) -> Iterator[h5py.File]:
    """Open for reading beside whatever handles of the file there are, here or elsewhere; closed after the block.

    Opening costs about a millisecond; a file kept open would keep this process from opening it for writing later.
    """
    with using(source.path, source.name):
        status = os.stat(source.path)
    if not source.inode.fits(status):
        raise FileChangedError(
            f"{source.path}: the file was replaced by another one since {source.name} was found in it. Open it again "
            "and start again."
        )
    with readable(f"{source.path}::{source.name}"), _opened(source) as file:
        yield file


@contextmanager
def _opened(source: FileSource) -> Iterator[h5py.File]:
    try:
        file = h5py.File(source.path, "r", locking=False)
    except OSError:
        # Within one process HDF5 refuses other lock flags than those of a handle that is open already. A Python file
        # object is independent of them, but does not know where it lies: parts in other files would not be found.
        if source.many_files:
            with h5py.File(source.path, "r") as file:  # through the handle that is open
                yield file
            return
        with open(source.path, "rb") as raw, h5py.File(raw, "r") as file:
            yield file
        return
    with file:
        yield file


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what HDF5, or the system, raises into an error that names what was being read.

    Raises
    ------
    FileChangedError
        In the place of what cannot be read. Errors of lazyproc itself pass.
    """
    try:
        yield
    except (LazyprocError, MemoryError):  # without memory the file may be as sound as ever: it is tried again
        raise
    except H5_ERRORS as error:
        raise FileChangedError(
            f"{what}: cannot be read ({error}). The file is damaged or was cut off, parts of it in other files are "
            "missing, or the disk fails. Restore it from a copy and run the same again."
        ) from error


def _read_slices(dataset: h5py.Dataset, runs: Spans) -> NDArray[Any]:
    spans = list(runs)
    rows = np.empty((sum(stop - start for start, stop in spans), dataset.shape[1]), dataset.dtype)
    place = 0
    for start, stop in spans:
        count = stop - start
        if count and dataset.shape[1]:
            with readable(f"{dataset.file.filename}::{dataset.name}, positions {start} to {stop - 1}"):
                dataset.read_direct(rows, np.s_[start:stop, :], np.s_[place : place + count, :])
        place += count
    return rows
