"""A fingerprint of a main dataset's values, to notice that the source of some results has changed.

``all:<hash>`` covers every byte as stored, ``spread:<hash>`` samples that are spread over the dataset. The hash is
XXH3 (128 bits): made for speed and for accidents, not against forgery.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import h5py
import numpy as np
import xxhash

from lazyproc.hdf5.chunks import ChunkSource
from lazyproc.hdf5.extents import check_same_file, real_path
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.source import ExtentSource, FileSource, Source, readable

FULL_UP_TO = 256 * 2**20
"""Bytes stored: up to this size ``verify="sampled"`` hashes everything."""
_PIECE = 2**22
_SAMPLES = 64
_SAMPLE = 2**20

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
        yield from _raw(extent.path, extent.inode, [(extent.offset, extent.stop - extent.offset)], everything)
    elif dataset.chunks is not None and path is not None:
        places = _chunk_places(dataset)
        yield repr([offset for offset, _, _ in places]).encode()
        if dataset.file.userblock_size or _holds_back(dataset.file):
            yield from _chunks(dataset, [(offset, size) for offset, _, size in places], everything)
        else:
            inode = source.inode if isinstance(source, FileSource | ChunkSource) else None
            yield from _raw(path, inode, [(place, size) for _, place, size in places], everything)
    else:
        yield from _values(dataset, source if isinstance(source, FileSource) else None, everything)


def _holds_back(file: h5py.File) -> bool:
    """Tell whether the handle may know chunks that are not in the file yet. Ranks together have written all before."""
    return str(file.mode) != "r" and str(file.driver) != "mpio"


def _chunk_places(dataset: h5py.Dataset) -> list[tuple[tuple[int, ...], int, int]]:
    """Return where the stored chunks lie: logical offset, place in the file, size; in logical order.

    In files with a userblock some versions of HDF5 count the place from its end, others from the start of the file.
    """
    places: list[tuple[tuple[int, ...], int, int]] = []
    dataset.id.chunk_iter(lambda info: places.append((tuple(info.chunk_offset), info.byte_offset, info.size)))
    return sorted(places)


def _chunks(dataset: h5py.Dataset, chunks: list[tuple[tuple[int, ...], int]], everything: bool) -> Iterator[bytes]:
    """Yield the same as `_raw`, through HDF5, which knows where the chunks lie."""
    starts = np.cumsum([0, *(size for _, size in chunks)], dtype=np.int64)
    spans = [(int(start), size) for start, (_, size) in zip(starts, chunks, strict=False)]
    for first, size in spans if everything else _samples(spans):
        number = int(np.searchsorted(starts, first, side="right")) - 1
        within = first - int(starts[number])
        yield dataset.id.read_direct_chunk(chunks[number][0])[1][within : within + size]


def _raw(path: str, inode: FileId | None, spans: list[tuple[int, int]], everything: bool) -> Iterator[bytes]:
    """Yield the bytes of the spans, or samples spread evenly over all of them."""
    if not everything:
        spans = _samples(spans)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if inode is not None:
            check_same_file(descriptor, path, inode, "the main dataset")
        for offset, size in spans:
            end = offset + size
            while offset < end:
                piece = os.pread(descriptor, min(_PIECE, end - offset), offset)
                if not piece:
                    raise OSError(f"the file ends at byte {offset}, inside the data: it was truncated")
                yield piece
                offset += len(piece)
    finally:
        os.close(descriptor)


def _samples(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Choose samples of 1 MiB as if the spans lay one after the other: a sample may take in many small spans."""
    ends = np.cumsum([size for _, size in spans], dtype=np.int64)
    total = int(ends[-1]) if spans else 0
    chosen: list[tuple[int, int]] = []
    done = 0
    for wanted in np.linspace(0, max(0, total - _SAMPLE), _SAMPLES).astype(np.int64).tolist():
        first, last = max(done, wanted), min(total, wanted + _SAMPLE)
        number = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            offset, size = spans[number]
            stop = min(last, int(ends[number]))
            if first < stop:
                chosen.append((offset + first - (int(ends[number]) - size), stop - first))
            first, number = stop, number + 1
        done = max(done, last)
    return chosen


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
