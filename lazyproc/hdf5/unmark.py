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
from lazyproc.hdf5.superblock import find_superblock, has_writer_mark, place_of_flags, without_mark
from lazyproc.hdf5.undo_journal import drop_undo, load_undo, write_undo

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
    found = find_superblock(descriptor)
    if found is None or not has_writer_mark(found[1]) or not _is_ours(file):
        return
    place, superblock = found
    write_all(descriptor, without_mark(superblock), place)


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
        found = find_superblock(descriptor)
    finally:
        os.close(descriptor)
    return None if found is None or found[1][place_of_flags(found[1])] else found


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
