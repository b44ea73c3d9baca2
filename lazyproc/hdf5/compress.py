"""Compress finished rows: threads, or a cluster's workers, read and encode storage chunks, one writes them in order.

ISA-L, libdeflate and NumPy let other Python threads run meanwhile, so all cores of a machine are used without sending
rows to other processes. Workers of a cluster read the rows from their file themselves, and send what is encoded. Both
libraries make streams that any zlib reads. ISA-L does it at the levels 1 to 4 several times as fast as zlib, and within
a few percent as small; libdeflate at the higher levels, which are chosen to get small files, two to three times as
fast, and a little smaller.
"""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import h5py
import numpy as np

from lazyproc.core.compression import Compression, chunk_shape
from lazyproc.core.errors import LazyprocError
from lazyproc.core.specs import ResolvedOutput
from lazyproc.hdf5.extents import Extent, using
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.overlay import MOST_KEPT
from lazyproc.hdf5.replace import compressed_layout, replaced
from lazyproc.hdf5.room import give_back, reserve
from lazyproc.hdf5.rows_file import is_outside, rows_extent, waiting, wanted_compression

CHUNKS_HELD = 5
"""Chunks in memory a thread: two as they are, two encoded, and what encoding takes."""
_ISAL_LEVELS = {1: 2, 2: 2, 3: 3, 4: 3}
_FIXED_BYTES = MOST_KEPT + 16 * 2**20
"""Of this process beside the chunks: the overlay's pages; HDF5's own, what the run had, and what is given back late,
measured 10-14 MiB."""
_WINDOW = 2
_ROOM = 2**18
"""Bytes that are set aside beside each chunk, in a file that HDF5 writes itself, for what it notes of the chunks."""

log = logging.getLogger("lazyproc")

Span = tuple[int, int, int, int]
"""First and last row, first and last column of a chunk; the last ones are not in it."""


class StoppedError(LazyprocError):
    """The run is asked to stop; the results stay as they are, complete, and are compressed by the next call."""


Chunk = tuple[int, int, bytes]
"""First row and first column of a chunk, and its stored form."""


@dataclass(frozen=True)
class Encoders:
    """Who encodes chunks.

    Attributes
    ----------
    n_threads : int
        Threads of this process.
    elsewhere : callable or None
        Does calls in other processes, which see the file with the rows, and yields what they return, in order. None:
        there are none.
    """

    n_threads: int
    elsewhere: Callable[[Callable[[Span], Chunk], Iterable[Span]], Iterator[Chunk]] | None = None

    def __call__(self, encoder: _Encoder, spans: Iterable[Span]) -> Iterator[Chunk]:
        """Yield the chunks in the order of their spans; a few a thread are under way."""
        if self.elsewhere is not None and encoder.extent is not None:
            yield from self.elsewhere(encoder, spans)
            return
        under_way: deque[Future[Chunk]] = deque()
        with ThreadPoolExecutor(self.n_threads) as pool:
            try:
                for span in spans:
                    under_way.append(pool.submit(encoder, span))
                    if len(under_way) > _WINDOW * self.n_threads:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                for one in under_way:
                    one.cancel()

    def name(self, *, travels: bool) -> str:
        """Return, in words, who encodes rows that other processes can read, or cannot."""
        return "the workers of the cluster" if travels and self.elsewhere is not None else f"{self.n_threads} threads"


@dataclass(frozen=True)
class _Encoder:
    """Reads and encodes a chunk: from the file of the rows, in any process that sees it, or through HDF5, in this one.

    Attributes
    ----------
    extent : Extent or None
        The rows in a file of their own.
    dataset : h5py.Dataset or None
        Where there is none. Does not travel.
    filters : Compression
        How chunks are encoded.
    chunk_bytes, itemsize : int
        Bytes of a whole chunk, and of a value.
    """

    extent: Extent | None
    dataset: h5py.Dataset | None
    filters: Compression
    chunk_bytes: int
    itemsize: int

    def __call__(self, span: Span) -> Chunk:
        data = self._read(span).ljust(self.chunk_bytes, b"\0")  # a chunk at the edge is stored whole
        return span[0], span[2], encode(data, self.filters, self.itemsize)

    def _read(self, span: Span) -> bytes:
        first, last, left, right = span
        if self.extent is None:
            assert self.dataset is not None
            return np.ascontiguousarray(self.dataset[first:last, left:right]).tobytes()
        extent = self.extent
        size = (last - first) * (right - left) * self.itemsize  # pieces of several rows are always whole rows
        start = extent.offset + first * extent.row_bytes + left * self.itemsize
        descriptor = extent.open(os.O_RDONLY)
        try:
            with using(extent.path, extent.name, start):
                data = os.pread(descriptor, size, start)
                while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
                    data += more
            extent.check(descriptor)
        finally:
            os.close(descriptor)
        return data


def n_threads(outputs: Iterable[ResolvedOutput], n_positions: int, cores: int, limit_bytes: int) -> int:
    """Return how many threads may encode chunks of any of the outputs at the same time, by the memory."""
    # Also of those that are not declared so: the file says what is compressed.
    room = (limit_bytes - _FIXED_BYTES) // (CHUNKS_HELD * _largest_chunk(outputs, n_positions))
    return max(1, min(cores, room))


def peak_bytes(outputs: Iterable[ResolvedOutput], n_positions: int, cores: int, limit_bytes: int) -> int:
    """Return the bytes that this process takes at most while it compresses finished rows; 0 if no output wants that."""
    wanted = [output for output in outputs if output.filters is not None]
    if not wanted:
        return 0
    held = n_threads(wanted, n_positions, cores, limit_bytes) * CHUNKS_HELD
    return _FIXED_BYTES + held * _largest_chunk(wanted, n_positions)


def _largest_chunk(outputs: Iterable[ResolvedOutput], n_positions: int) -> int:
    """Return the bytes of the largest storage chunk of any of the outputs."""
    sizes = [
        math.prod(chunk_shape(n_positions, output.width, output.dtype.itemsize)) * output.dtype.itemsize
        for output in outputs
        if output.row_bytes
    ]
    return max(sizes, default=1)


def compress_results(group: h5py.Group, encoders: Encoders, stop: Callable[[], bool]) -> list[str]:
    """Compress all datasets of a complete results group that wait for it.

    Parameters
    ----------
    group : h5py.Group
        The group, in a file that is open for changes which take effect together.
    encoders : Encoders
        Who encodes the chunks.
    stop : callable
        Whether to leave; asked before each chunk.

    Returns
    -------
    list of str
        The files that held the rows; to be removed when the changes are durable.

    Raises
    ------
    StoppedError
        If `stop` says so.
    NoRoomError
        If there is no room for the compressed results beside the others.
    """
    done: list[str] = []
    for name in waiting(group):
        dataset, extent = group[name], rows_extent(group[name])
        filters = wanted_compression(dataset)
        outside = extent if is_outside(dataset) else None
        who = encoders.name(travels=outside is not None)
        log.info("%s: %.1f MiB are compressed, by %s", dataset.name, dataset.nbytes / 2**20, who)

        def fill(made: h5py.Dataset, dataset: Any = dataset, outside: Any = outside, filters: Any = filters) -> None:
            size, itemsize = int(np.prod(made.chunks)) * made.dtype.itemsize, made.dtype.itemsize
            encoder = _Encoder(outside, None if outside else dataset, filters, size, itemsize)
            _write_chunks(made, encoders(encoder, _spans(made)), stop)

        replaced(dataset, compressed_layout(dataset, filters), fill, marked=False)
        if extent is not None:
            done.append(extent.path)
    return done


def _write_chunks(made: h5py.Dataset, chunks: Iterator[Chunk], stop: Callable[[], bool]) -> None:
    """Write all chunks of a new dataset."""
    with closing(cast(Generator[Chunk], chunks)), _roomy(made.file) as make_room:
        for row, column, data in chunks:
            if stop():
                name = made.file.filename
                raise StoppedError(f"{name}: stopped before the results were compressed; they are complete.")
            make_room(len(data))
            made.id.write_direct_chunk((row, column), data)


def _spans(made: h5py.Dataset) -> Iterator[Span]:
    (n_rows, n_columns), (high, wide) = made.shape, made.chunks
    for first in range(0, n_rows, high):
        for left in range(0, n_columns, wide):
            yield first, min(first + high, n_rows), left, min(left + wide, n_columns)


@contextmanager
def _roomy(file: h5py.File) -> Iterator[Callable[[int], None]]:
    """Give what sets room aside before HDF5 writes to a file itself: once it could not, it may never flush again."""
    path = real_path(file)
    if path is None:  # in memory, or an overlay, which sees to that
        yield lambda n_bytes: None
        return
    descriptor = file.id.get_vfd_handle()
    reach = os.fstat(descriptor).st_size

    def make_room(n_bytes: int) -> None:
        nonlocal reach
        wanted = file.id.get_filesize() + n_bytes + _ROOM
        if wanted > reach:  # all of what has been added, too: HDF5 has not written its index yet
            reserve(descriptor, reach, wanted - reach, path, "the compressed results")
            reach = wanted

    try:
        yield make_room
    finally:
        file.flush()
        give_back(descriptor)


def encode(data: bytes, filters: Compression, itemsize: int) -> bytes:
    """Return the stored form of a chunk.

    Examples
    --------
    >>> zlib.decompress(encode(bytes(1000), Compression(4, False), 8)) == bytes(1000)
    True
    """
    if filters.shuffle and itemsize > 1:
        values = np.frombuffer(data, np.uint8).reshape(-1, itemsize)
        regrouped = np.empty(values.shape[::-1], np.uint8)
        np.copyto(regrouped, values.T)  # numcodecs would keep other threads waiting
        data = regrouped.tobytes()
    packed = _deflate(data, filters.level)
    if len(packed) < len(data):
        return packed
    # It cannot be made smaller. HDF5 2.0 forgets which filters a chunk was written without, so it gets this one.
    return zlib.compress(data, 0)


def _deflate(data: bytes, level: int) -> bytes:
    if level in _ISAL_LEVELS:
        from isal import isal_zlib

        return bytes(isal_zlib.compress(data, _ISAL_LEVELS[level]))
    import deflate

    return bytes(deflate.zlib_compress(data, level))
