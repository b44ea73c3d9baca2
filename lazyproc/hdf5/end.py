"""Where HDF5 believes a file to end: it puts what is new there, over whatever lies beyond.

The superblock of default files holds that place without a checksum. A file may be longer, after a death that left bytes
which nothing points to. But if a dataset lies beyond, the place is damaged, and the next change would overwrite it.
"""

from __future__ import annotations

import h5py

from lazyproc.core.errors import ResultsError
from lazyproc.hdf5.damage import walk
from lazyproc.hdf5.raised import H5_ERRORS

_PLACES = {0: 40, 1: 44}
"""Where the superblock has it, by its version; later versions have a checksum."""
_BASE_AND_END = {0: (24, 40), 1: (28, 44), 2: (12, 28), 3: (12, 28)}
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUPERBLOCK_BYTES = 64


def end_of(superblock: bytes) -> int | None:
    """Return where HDF5 believes a file to end; None if its first bytes are of a kind that is not known here."""
    version = superblock[8] if superblock[:8] == _SIGNATURE else -1
    if version not in _BASE_AND_END or superblock[13 if version < 2 else 9] != 8:
        return None
    base, end = (int.from_bytes(superblock[place : place + 8], "little") for place in _BASE_AND_END[version])
    return end if base == 0 else None


def is_marked(superblock: bytes) -> bool:
    """Tell whether a file is marked as open for writing, as those with superblocks of version 3 are."""
    return superblock[:9] == _SIGNATURE + b"\x03" and bool(superblock[11] & 0b101)


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
    place = _PLACES.get(superblock[8]) if superblock[:8] == b"\x89HDF\r\n\x1a\n" and superblock[13] == 8 else None
    if place is None:
        return
    end = int.from_bytes(superblock[place : place + 8], "little")
    if end >= size:
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
