"""Read positions of a chunked main dataset without HDF5: read the stored chunks as bytes and decode them here.

HDF5 has one lock a process, so threads that read filtered data through it wait for each other; and its gzip is zlib's,
which takes about twice the time of libdeflate's. Only filters are decoded here whose result is certain (gzip, LZF,
shuffle, fletcher32, or none); `chunked_source` compares some chunks with what HDF5 reads before it trusts this module,
and returns None where anything is unusual: then HDF5 does it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import LazyprocError, ResultsError
from lazyproc.hdf5.extents import check_same_file, using
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.on_disk import plain_type

_GZIP, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32000
_MOST_CHUNKS = 2**21
"""A table of more chunks than this is too much to send to every worker (16 bytes each)."""
_COMPARED = 3
_FILTERS = 3
"""Copies of one chunk that are in memory while it is decoded: as stored, decoded, put in order."""

Spans = Iterable[tuple[int, int]]
_CHECKSUMS = 16
"""Bytes that filters may have added to a chunk before gzip."""
_FEW_PLANES = 16
"""Bytes of a number, up to which putting one byte of each at a time in its place is faster than all at once."""
_DECODED_PER_SECOND = 4e8
"""Bytes that one thread decodes: measured 370 MB/s of noisy float32. Chooses between one thread and more."""


@dataclass(frozen=True, eq=False)
class ChunkSource:
    """Positions of a chunked main dataset, read and decoded as bytes. Travels to any worker that sees the file.

    Attributes
    ----------
    path, name : str
        The file, absolute, and the dataset.
    inode : FileId
        Device and inode of the file: another one put in its place is noticed.
    shape : tuple of int
        `(n_positions, n_spectral)`.
    dtype : numpy.dtype
        As stored, byte order included.
    chunks : tuple of int
        Rows and columns of a chunk.
    filters : tuple of (int, tuple of int)
        Number of each filter in the order of writing, and its settings.
    fill_value : ndarray
        Of chunks that were never written; a scalar of the dtype.
    offsets : ndarray
        `(n_chunk_rows, n_chunk_columns)`, int64: where each chunk begins, bytes from the start of the file; -1 if it
        was never written.
    sizes : ndarray
        The same shape, uint32: bytes stored.
    skipped : ndarray
        The same shape, uint32: bit `i` is set where filter `i` was not applied to the chunk.

    Notes
    -----
    `rows` shares nothing between calls: threads decode at the same time.
    """

    path: str
    name: str
    inode: FileId
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    chunks: tuple[int, int]
    filters: tuple[tuple[int, tuple[int, ...]], ...]
    fill_value: NDArray[Any]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.uint32]
    skipped: NDArray[np.uint32]
    travels = True

    @property
    def chunk_rows(self) -> int:
        """Positions in a storage chunk."""
        return self.chunks[0]

    @property
    def chunk_bytes(self) -> int:
        """Bytes that decoding takes beside the rows: one chunk is decoded at a time."""
        return _FILTERS * self.chunks[0] * self.chunks[1] * self.dtype.itemsize

    @property
    def table_bytes(self) -> int:
        """Bytes of the table of chunks, which every process that reads has."""
        return self.offsets.nbytes + self.sizes.nbytes + self.skipped.nbytes

    @property
    def read_seconds(self) -> float:
        """Seconds a position that reading takes, roughly, in one thread of several that do it at the same time."""
        return self.shape[1] * self.dtype.itemsize / _DECODED_PER_SECOND

    def rows(self, runs: Spans) -> NDArray[Any]:
        """Read runs of positions into one new array `(n_positions, n_spectral)`.

        Raises
        ------
        ResultsError
            If the file was replaced, or a chunk is damaged; names the chunk.
        """
        spans = list(runs)
        rows = np.empty((sum(stop - start for start, stop in spans), self.shape[1]), self.dtype)
        with using(self.path, self.name):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            check_same_file(descriptor, self.path, self.inode, self.name)
            for down, parts in itertools.groupby(self._parts(spans), key=lambda part: part[0] // self.chunks[0]):
                self._read_parts(descriptor, down, list(parts), rows)
        finally:
            os.close(descriptor)
        return rows

    def _parts(self, spans: Spans) -> Iterator[tuple[int, int, int]]:
        """Cut runs where chunks end: first and last position, and where its rows go."""
        high, place = self.chunks[0], 0
        for start, stop in spans:
            while start < stop:
                end = min(stop, (start // high + 1) * high)
                yield start, end, place
                place += end - start
                start = end

    def _read_parts(self, descriptor: int, down: int, parts: list[tuple[int, int, int]], rows: NDArray[Any]) -> None:
        """Read what is wanted of a row of chunks; each is decoded once, however scattered the positions are."""
        high, wide = self.chunks
        if self._is_plain(down):
            for start, stop, place in parts:
                self._copy_plain(descriptor, down, start - down * high, rows[place : place + stop - start])
            return
        for across in range(self.offsets.shape[1]):
            left, right = across * wide, min((across + 1) * wide, self.shape[1])
            chunk = self._chunk(descriptor, down, across)
            for start, stop, place in parts:
                piece = chunk[start - down * high : stop - down * high, : right - left] if chunk.ndim else chunk
                rows[place : place + stop - start, left:right] = piece

    def _is_plain(self, down: int) -> bool:
        """Tell whether a row of chunks is one chunk that is stored as it is, as wide as the dataset."""
        every = (1 << len(self.filters)) - 1
        return (
            self.chunks[1] == self.shape[1]
            and int(self.offsets[down, 0]) >= 0
            and int(self.skipped[down, 0]) & every == every
            and int(self.sizes[down, 0]) == self._decoded_bytes
        )

    def _copy_plain(self, descriptor: int, down: int, first: int, rows: NDArray[Any]) -> None:
        """Read rows of such a chunk, from its row `first` on, to where they are wanted."""
        buffer = rows.reshape(-1).view(np.uint8).data
        offset = int(self.offsets[down, 0]) + first * self.shape[1] * self.dtype.itemsize
        done = 0
        while done < len(buffer):
            with self._decoding(down):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if not count:
                    raise ValueError("the file ends inside it")
            done += count

    def _chunk(self, descriptor: int, down: int, across: int) -> NDArray[Any]:
        """Read and decode one chunk `(rows, columns)`; the fill value, a scalar, where none was written."""
        offset = int(self.offsets[down, across])
        if offset < 0:
            return self.fill_value
        size, skipped = int(self.sizes[down, across]), int(self.skipped[down, across])
        wanted = self._decoded_bytes
        with self._decoding(down):
            data: Any = _read(descriptor, offset, size)
            for number in reversed(range(len(self.filters))):
                if not skipped >> number & 1:
                    data = _DECODERS[self.filters[number][0]](data, self.filters[number][1], wanted)
            if len(data) != wanted:
                raise ValueError(f"{len(data)} bytes came out; expected {wanted}")
        return np.frombuffer(data, self.dtype).reshape(self.chunks)

    @property
    def _decoded_bytes(self) -> int:
        return self.chunks[0] * self.chunks[1] * self.dtype.itemsize

    @contextmanager
    def _decoding(self, down: int) -> Iterator[None]:
        """Name the chunk in an error; no memory, a missing library, or a disk that fails say nothing of its bytes."""
        try:
            with using(self.path, self.name):
                yield
        except (LazyprocError, MemoryError, ImportError):
            raise
        except Exception as error:
            raise ResultsError(
                f"{self.path}::{self.name}: the storage chunk of positions {down * self.chunks[0]} to "
                f"{min((down + 1) * self.chunks[0], self.shape[0]) - 1} cannot be decoded ({error}): the file is "
                "damaged. Restore it from a copy."
            ) from error


def chunked_source(dataset: h5py.Dataset, path: str | None) -> ChunkSource | None:
    """Return how to read a chunked dataset as bytes; None where only HDF5 can be trusted with it.

    Parameters
    ----------
    dataset : h5py.Dataset
        Two dimensions; what its handle has not flushed is not seen.
    path : str or None
        The file on disk behind the handle.
    """
    if path is None or dataset.ndim != 2 or dataset.chunks is None or dataset.file.userblock_size:
        return None
    filters = _filters(dataset)
    if filters is None or not hasattr(dataset.id, "chunk_iter") or not plain_type(dataset) or 0 in dataset.shape:
        return None
    grid = tuple(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    if dataset.id.get_num_chunks() > _MOST_CHUNKS or grid[0] * grid[1] > _MOST_CHUNKS:
        return None
    offsets = np.full(grid, -1, np.int64)
    sizes, skipped = np.zeros(grid, np.uint32), np.zeros(grid, np.uint32)
    high, wide = dataset.chunks

    def note(chunk: Any) -> None:
        place = chunk.chunk_offset[0] // high, chunk.chunk_offset[1] // wide
        offsets[place], sizes[place], skipped[place] = chunk.byte_offset, chunk.size, chunk.filter_mask

    dataset.id.chunk_iter(note)
    status = os.stat(path)
    source = ChunkSource(
        path=os.path.abspath(path),
        name=str(dataset.name),
        inode=FileId.of(status),
        shape=(int(dataset.shape[0]), int(dataset.shape[1])),
        dtype=dataset.dtype,
        chunks=(int(high), int(wide)),
        filters=filters,
        fill_value=np.asarray(dataset.fillvalue, dataset.dtype),
        offsets=offsets,
        sizes=sizes,
        skipped=skipped,
    )
    return source if _agrees(source, dataset) else None


def _filters(dataset: h5py.Dataset) -> tuple[tuple[int, tuple[int, ...]], ...] | None:
    """Return the filters in the order of writing; None if there is one that is not decoded here."""
    creation = dataset.id.get_create_plist()
    filters = []
    for number in range(creation.get_nfilters()):
        code, _, values, _ = creation.get_filter(number)
        if code not in _DECODERS or (code == _LZF and _lzf() is None):
            return None
        filters.append((int(code), tuple(int(value) for value in values)))
    return tuple(filters)


def _agrees(source: ChunkSource, dataset: h5py.Dataset) -> bool:
    """Compare the first, the last and a middle chunk that were written with what HDF5 reads of them."""
    written = np.argwhere(source.offsets >= 0)
    for number in np.unique(np.linspace(0, len(written) - 1, _COMPARED).astype(int)) if len(written) else ():
        down, across = written[number].tolist()
        position = min(down * source.chunks[0], source.shape[0] - 1)
        left, right = across * source.chunks[1], min((across + 1) * source.chunks[1], source.shape[1])
        try:
            here = source.rows([(position, position + 1)])[0, left:right]
            there = dataset[position, left:right]
        except (OSError, ResultsError):
            return False  # HDF5's own error will say what is wrong with it
        if here.tobytes() != there.astype(source.dtype, copy=False).tobytes():
            return False
    return True


def _read(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise ValueError("the file ends inside it")
        data += more
    return data


def _gunzip(data: Any, settings: tuple[int, ...], wanted: int) -> Any:
    import deflate

    try:
        return deflate.zlib_decompress(data, wanted + _CHECKSUMS)
    except deflate.DeflateError:  # it does not say what is wrong, nor take more than it was told
        from isal import isal_zlib

        return isal_zlib.decompress(data, 15, wanted)


@functools.cache
def _lzf() -> Callable[..., int] | None:
    """Return liblzf's `lzf_decompress`, of which h5py has a copy for its own filter; None where it is hidden.

    ctypes lets other threads go on while it decodes. It takes where the stored bytes are and how many, where the
    decoded ones go and how many there is room for; gives how many came out, 0 if they are damaged or too many.
    """
    try:
        decompress = ctypes.CDLL(h5py.h5z.__file__).lzf_decompress
    except (OSError, AttributeError):
        return None
    decompress.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
    decompress.restype = ctypes.c_uint
    return decompress


def _unlzf(data: Any, settings: tuple[int, ...], wanted: int) -> Any:
    decompress = _lzf()
    if decompress is None:
        raise ResultsError(
            f"The h5py of this process ({h5py.__file__}) does not give out its LZF decoder, though that of the process "
            "that planned the work does. Install the same h5py for all workers."
        )
    stored, room = np.frombuffer(data, np.uint8), np.empty(wanted + _CHECKSUMS, np.uint8)
    size = decompress(stored.ctypes.data, stored.nbytes, room.ctypes.data, room.nbytes)
    if not size:
        raise ValueError(f"it is not LZF data, or more than {room.nbytes} bytes of it")
    return room[:size].data


def _unshuffle(data: Any, settings: tuple[int, ...], wanted: int) -> Any:
    # Not by numcodecs, which takes 0.1 s to be loaded and keeps other threads waiting while it decodes.
    if settings[0] < 2:
        return data
    planes = np.frombuffer(data, np.uint8).reshape(settings[0], -1)
    values = np.empty((planes.shape[1], settings[0]), np.uint8)
    if settings[0] > _FEW_PLANES:
        values[...] = planes.T
    else:  # a third of the time, for the sizes of numbers
        for place, plane in enumerate(planes):
            values[:, place] = plane
    return values.reshape(-1).data


def _check_fletcher32(data: Any, settings: tuple[int, ...], wanted: int) -> Any:
    from numcodecs.fletcher32 import Fletcher32

    return Fletcher32().decode(data)


_DECODERS: dict[int, Callable[[Any, tuple[int, ...], int], Any]] = {
    _GZIP: _gunzip,
    _SHUFFLE: _unshuffle,
    _FLETCHER32: _check_fletcher32,
    _LZF: _unlzf,
}
"""By HDF5's number of the filter: deflate, shuffle and fletcher32 of the format specification, h5py's LZF."""
