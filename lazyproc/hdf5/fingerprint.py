"""A fingerprint of a main dataset's values, to notice that the source of some results has changed.

``all:<hash>`` covers every byte as stored, ``spread:<hash>`` samples that are spread over the dataset. The hash is
XXH3 (128 bits): made for speed and for accidents, not against forgery.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from lazyproc.hdf5.chunks import ChunkSource
from lazyproc.hdf5.extents import ExtentSource, check_same_file
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.source import FileSource, Source, readable

FULL_UP_TO = 256 * 2**20
"""Bytes stored: up to this size ``verify="sampled"`` hashes everything."""
_PIECE = 2**22
_SAMPLES = 64
_SAMPLE = 2**20
_AT_ONCE = 4096
"""Of so many chunks there are Python's numbers at a time."""

Numbers = NDArray[np.int64]

VERIFY = ("sampled", "full", "none")


def fingerprint(dataset: h5py.Dataset, source: Source, verify: str, path: str | None = None) -> str:
    """Return the fingerprint of a main dataset.

    Parameters
    ----------
    dataset : h5py.Dataset
        The main dataset. Of contiguous data, what its handle has not flushed is not seen.
    source : Source
        How its positions are read.
    verify : str
        ``"full"``: every byte; ``"sampled"``: every byte up to 256 MiB, spread samples of 64 MiB in all above;
        ``"none"``: an empty text.
    path : str, optional
        The file, where lazyproc opened it as a Python file object.

    Raises
    ------
    FileChangedError
        If the values cannot be read.

    Notes
    -----
    Contiguous and chunked data are hashed as they are stored (so a repacked file counts as changed), data in other
    forms as they are read.
    """
    if verify == "none":
        return ""
    stored = dataset.id.get_storage_size() or dataset.nbytes
    everything = verify == "full" or stored <= FULL_UP_TO
    digest = xxhash.xxh3_128(f"{dataset.shape} {dataset.dtype.descr}".encode())
    with readable(f"{path or dataset.file.filename}::{dataset.name}"):
        for piece in _pieces(dataset, source, everything, path or real_path(dataset.file)):
            digest.update(piece)
    return f"{'all' if everything else 'spread'}:{digest.hexdigest()}"


def _pieces(dataset: h5py.Dataset, source: Source, everything: bool, path: str | None) -> Iterator[bytes]:
    if isinstance(source, ExtentSource):
        extent = source.extent
        whole = np.array([[extent.offset, extent.stop - extent.offset]], np.int64)
        yield from _raw(extent.path, extent.inode, whole, everything)
    elif dataset.chunks is not None and path is not None:
        numbers, spans = _chunk_places(dataset)
        yield from _offsets_text(dataset, numbers)
        if dataset.file.userblock_size or _holds_back(dataset.file):
            yield from _chunks(dataset, numbers, spans[:, 1], everything)
        else:
            inode = source.inode if isinstance(source, FileSource | ChunkSource) else None
            yield from _raw(path, inode, spans, everything)
    else:
        yield from _values(dataset, source if isinstance(source, FileSource) else None, everything)


def _holds_back(file: h5py.File) -> bool:
    """Tell whether the handle may know chunks that are not in the file yet. Ranks together have written all before."""
    return str(file.mode) != "r" and str(file.driver) != "mpio"


def _chunk_places(dataset: h5py.Dataset) -> tuple[Numbers, Numbers]:
    """Return the numbers of the stored chunks, counted over the grid of chunks, and place in the file and size of each.

    In arrays, in logical order: there may be millions of chunks, and a tuple of each would take ten times as much.
    In files with a userblock some versions of HDF5 count the place from its end, others from the start of the file.
    """
    n_chunks = dataset.id.get_num_chunks()
    numbers, spans = np.empty(n_chunks, np.int64), np.empty((n_chunks, 2), np.int64)
    grid, chunks = _grid(dataset), dataset.chunks
    count = itertools.count()

    def note(info: Any) -> None:
        at, number = next(count), 0
        for offset, size, n in zip(info.chunk_offset, chunks, grid, strict=True):
            number = number * n + offset // size
        numbers[at], spans[at] = number, (info.byte_offset, info.size)

    dataset.id.chunk_iter(note)
    if (numbers[1:] < numbers[:-1]).any():
        order = np.argsort(numbers)
        numbers, spans = numbers[order], spans[order]
    return numbers, spans


def _grid(dataset: h5py.Dataset) -> tuple[int, ...]:
    """Return how many chunks there are along each dimension."""
    return tuple(-(-n // size) for n, size in zip(dataset.shape, dataset.chunks, strict=True))


def _in_turn(values: Numbers) -> Iterator[Any]:
    """Yield the rows of an array as plain integers, of which only a few exist at a time."""
    for start in range(0, len(values), _AT_ONCE):
        yield from values[start : start + _AT_ONCE].tolist()


def _offsets_text(dataset: h5py.Dataset, numbers: Numbers) -> Iterator[bytes]:
    """Yield, in pieces, the text of a list of the chunks' logical offsets."""
    grid, chunks = _grid(dataset), np.array(dataset.chunks, np.int64)
    yield b"["
    for start in range(0, len(numbers), _AT_ONCE):
        offsets = np.stack(np.unravel_index(numbers[start : start + _AT_ONCE], grid), axis=1) * chunks
        text = ", ".join(str(tuple(offset)) for offset in offsets.tolist())
        yield f"{', ' if start else ''}{text}".encode()
    yield b"]"


def _chunks(dataset: h5py.Dataset, numbers: Numbers, sizes: Numbers, everything: bool) -> Iterator[bytes]:
    """Yield the same as `_raw`, through HDF5, which knows where the chunks lie."""
    grid, chunks = _grid(dataset), np.array(dataset.chunks, np.int64)
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    spans = np.stack([starts, sizes], axis=1)
    for first, size in _in_turn(spans) if everything else _samples(spans):
        chunk = int(np.searchsorted(starts, first, side="right")) - 1
        within = first - int(starts[chunk])
        offset = tuple((np.array(np.unravel_index(numbers[chunk], grid)) * chunks).tolist())
        yield dataset.id.read_direct_chunk(offset)[1][within : within + size]


def _raw(path: str, inode: FileId | None, spans: Numbers, everything: bool) -> Iterator[bytes]:
    """Yield the bytes of the spans, or samples spread evenly over all of them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if inode is not None:
            check_same_file(descriptor, path, inode, "the main dataset")
        for offset, size in _in_turn(spans) if everything else _samples(spans):
            end = offset + size
            while offset < end:
                piece = os.pread(descriptor, min(_PIECE, end - offset), offset)
                if not piece:
                    raise OSError(f"the file ends at byte {offset}, inside the data: it was truncated")
                yield piece
                offset += len(piece)
    finally:
        os.close(descriptor)


def _samples(spans: Numbers) -> Iterator[tuple[int, int]]:
    """Choose samples of 1 MiB as if the spans lay one after the other: a sample may take in many small spans.

    `spans` has a row (offset, size) each.
    """
    ends = np.cumsum(spans[:, 1], dtype=np.int64)
    total = int(ends[-1]) if len(spans) else 0
    done = 0
    for wanted in np.linspace(0, max(0, total - _SAMPLE), _SAMPLES).astype(np.int64).tolist():
        first, last = max(done, wanted), min(total, wanted + _SAMPLE)
        number = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            offset, size = spans[number].tolist()
            stop = min(last, int(ends[number]))
            if first < stop:
                yield offset + first - (int(ends[number]) - size), stop - first
            first, number = stop, number + 1
        done = max(done, last)


def _values(dataset: h5py.Dataset, source: FileSource | None, everything: bool) -> Iterator[bytes]:
    """Yield values as they are read: by their path where there is one, which parts in other files are found from."""
    n_positions = int(dataset.shape[0])
    rows = max(1, _PIECE // max(1, dataset.shape[1] * dataset.dtype.itemsize))
    starts = range(0, n_positions, rows)
    if not everything and len(starts) > _SAMPLES:
        starts = np.linspace(0, n_positions - rows, _SAMPLES).astype(int).tolist()
    for start in starts:
        stop = min(start + rows, n_positions)
        values = dataset[start:stop] if source is None else source.rows([(start, stop)])
        yield np.ascontiguousarray(values).tobytes()
