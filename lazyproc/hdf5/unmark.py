"""Keep files of the newest format openable while lazyproc has them open for writing, whatever dies.

With a superblock of version 3 (``libver="latest"``) HDF5 marks a file as open for writing, on the disk, and takes the
mark back when it closes the file. After a death nobody can open it, until ``h5clear -s`` has taken the mark away. HDF5
knows in memory what it has open and never reads the mark again, nor does it write the superblock but with a flush that
has changed it. So for files that lazyproc opens itself::

    opening     an undo journal of the superblock alone lies beside the file until the mark is taken back on the disk
    each flush  takes the mark back again, before it is synced, and before the undo journal of a guard is removed
    closing     a flush as above; what HDF5 writes then is what stands there already

What the mark is for, to keep writers apart, HDF5's lock on the file does, as for files of all other formats. Files that
the caller has opened are his: they keep their mark. So does a file in SWMR mode, which has no lock.

The flags are in byte 11, bit 0 for a writer and bit 2 for one in SWMR mode; the checksum comes last (HDF5 File Format
Specification, version 3.0, section II.A).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import h5py
import numpy as np

from lazyproc.core.errors import LazyprocError
from lazyproc.hdf5.durable import sync_data, write_all
from lazyproc.hdf5.locking import FLOCK, NONE, hdf5_locks, lock, locking
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.undo_journal import drop_undo, load_undo, write_undo

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_VERSION = 3
_FLAGS = 11
_FIRST_USERBLOCK = 512
_CHECKED = 44
"""Bytes that the checksum is of, where addresses have eight bytes; it takes four more."""
_BYTES = _CHECKED + 4
_WORD = 0xFFFFFFFF

_OPENED: set[int] = set()
"""The files that lazyproc has opened for writing, by the numbers that HDF5 gives, none of them twice in a process."""

log = logging.getLogger("lazyproc")


@contextmanager
def opening(path: str) -> Iterator[list[h5py.File]]:
    """Open a file for writing within the context, and put it into the list: its mark is taken back at the end.

    Notes
    -----
    Of other formats nothing is read but the first bytes. A death within the context leaves an undo journal that puts
    the superblock back. Without one, as where its folder cannot be written, or files are not locked, the mark is there
    for some microseconds.
    """
    opened: list[h5py.File] = []
    superblock = _unmarked_superblock(path)
    if superblock is None:
        yield opened
        return
    place, before = superblock
    has_journal = _keep(path, place, before)
    try:
        yield opened
        for file in opened:
            with suppress(*H5_ERRORS):  # it is so damaged that HDF5 has no number for it: nothing will be written
                _OPENED.add(_number(file))
            take_back(file)
            if has_journal:
                sync_data(file.id.get_vfd_handle())
    finally:
        if has_journal:
            drop_undo(path)


def take_back(file: h5py.File) -> None:
    """Take the mark of a file back on the disk, if lazyproc has opened it; HDF5 has flushed it before."""
    if file.driver != "sec2":
        return
    descriptor = int(file.id.get_vfd_handle())
    found = _superblock(descriptor)
    if found is None or not _is_marked(found[1]) or not _is_ours(file):
        return
    place, superblock = found
    write_all(descriptor, _without_mark(superblock), place)


def close_unmarked(file: h5py.File) -> None:
    """Close a file; one that lazyproc has opened is left without a mark at any instant of it."""
    with suppress(*H5_ERRORS):  # closing says it
        if _OPENED and file.mode != "r" and _is_ours(file):
            file.flush()
            take_back(file)
    file.close()


def _is_ours(file: h5py.File) -> bool:
    with suppress(*H5_ERRORS):
        return _number(file) in _OPENED
    return False


def _number(file: h5py.File) -> int:
    return int(h5py.h5o.get_info(file.id).fileno)


def _unmarked_superblock(path: str) -> tuple[int, bytes] | None:
    """Return place and bytes of the superblock of a file that HDF5 would mark; None for all others."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # HDF5 will say it
        return None
    try:
        found = _superblock(descriptor)
    finally:
        os.close(descriptor)
    return None if found is None or found[1][_FLAGS] else found


def _superblock(descriptor: int) -> tuple[int, bytes] | None:
    """Return place and bytes of an intact superblock of version 3, which may lie behind a user block."""
    place, size = 0, os.fstat(descriptor).st_size
    while place < size:
        superblock = os.pread(descriptor, _BYTES, place)
        if superblock.startswith(_SIGNATURE):
            is_known = len(superblock) == _BYTES and superblock[8] == _VERSION and superblock[9] == 8
            return (place, superblock) if is_known and _without_mark(superblock, 0) == superblock else None
        place = 2 * place or _FIRST_USERBLOCK
    return None


def _is_marked(superblock: bytes) -> bool:
    return superblock[_FLAGS] & 0b101 == 1


def _without_mark(superblock: bytes, bit: int = 1) -> bytes:
    """Return a superblock with a bit of its flags cleared, and the checksum that belongs to it."""
    content = superblock[:_FLAGS] + bytes([superblock[_FLAGS] & ~bit]) + superblock[_FLAGS + 1 : _CHECKED]
    return content + lookup3(content).to_bytes(4, "little")


def _keep(path: str, place: int, superblock: bytes) -> bool:
    """Write an undo journal of the superblock, if nobody has the file open; tell whether there is one now.

    Without locks that cannot be known, and a journal that lies there may be somebody else's a moment later.
    """
    if not hdf5_locks() or locking() == NONE:
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # HDF5 will say it
        return False
    try:
        if not lock(descriptor, path, FLOCK, exclusive=True):  # HDF5 wants the same; given back by closing
            return False
        if load_undo(path) is not None:
            return False
        span = np.array([[place, place + len(superblock)]], np.int64)
        write_undo(path, descriptor, os.fstat(descriptor).st_size, span)
    except (OSError, LazyprocError) as error:
        log.debug("%s: opened for writing without a journal of the superblock: %s", path, error)
        return False
    finally:
        os.close(descriptor)
    return True


def lookup3(data: bytes) -> int:
    """Return Jenkins' hash of some bytes (``hashlittle`` of lookup3.c), HDF5's checksum of metadata."""
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    words = np.frombuffer(data + bytes(-len(data) % 12), "<u4").tolist()
    for first in range(0, len(words), 3):
        a, b, c = (a + words[first]) & _WORD, (b + words[first + 1]) & _WORD, (c + words[first + 2]) & _WORD
        if first + 3 < len(words):
            for bits in (4, 6, 8, 16, 19, 4):
                a, b, c = b, (c + b) & _WORD, ((a - c) ^ _turned(c, bits)) & _WORD
        else:
            for bits in (14, 11, 25, 16, 4, 14, 24):
                a, b, c = b, ((c ^ b) - _turned(b, bits)) & _WORD, a
    return b if words else c


def _turned(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _WORD
