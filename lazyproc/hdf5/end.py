"""Where HDF5 believes a file to end: it puts what is new there, over whatever lies beyond.

The superblock of default files holds that place without a checksum. A file may be longer, after a death that left bytes
which nothing points to. But if a dataset lies beyond, the place is damaged, and the next change would overwrite it.
"""

from __future__ import annotations

import h5py

from lazyproc.core.errors import ResultsError
from lazyproc.hdf5.damage import walk
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.superblock import unchecked_end_of


def check_end(file: h5py.File, superblock: bytes, size: int, path: str) -> None:
    """Make sure that nothing of a file lies beyond the place where HDF5 believes it to end.

    Parameters
    ----------
    file : h5py.File
        Open and flushed.
    superblock : bytes
        The first `SUPERBLOCK_BYTES` of the file on disk.
    size : int
        The file's bytes.
    path : str
        Its name, for the message.

    Raises
    ------
    ResultsError
        If something does, or cannot be read. Nothing was written.
    """
    end = unchecked_end_of(superblock)
    if end is None or end >= size:
        return
    for name, item in walk(file["/"]):
        if isinstance(item, Exception) or (isinstance(item, h5py.Dataset) and _stop_of(item) > end):
            raise ResultsError(
                f"{path}: should end at byte {end}, by what stands in its first bytes, but has {size} bytes, and "
                f"{name} lies beyond, or cannot be read. The file is damaged, and what is written now would overwrite "
                "that: give h5_target_group in another file, or restore this one from a copy."
            )


def _stop_of(dataset: h5py.Dataset) -> int:
    """Return where the last of the values of a dataset ends in the file; 0 if it is not known."""
    try:
        if dataset.chunks is None:
            offset = dataset.id.get_offset()
            return 0 if offset is None else int(offset) + int(dataset.id.get_storage_size())
        stops = [0]
        dataset.id.chunk_iter(lambda chunk: stops.append(int(chunk.byte_offset + chunk.size)))
        return max(stops)
    except H5_ERRORS:
        return 0
