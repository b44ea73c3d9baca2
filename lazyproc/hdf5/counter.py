"""A number beside a file, which several processes raise: who takes which block, without anybody's help.

MPI has shared numbers, too, but the process in whose memory one lies has to call the MPI library now and then before
the others get on. A function that computes does not. A file needs nobody::

    .scan.h5.lazyproc-claims     8 bytes: the number of the next block that nobody has taken
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lazyproc.core.errors import ResultsError
from lazyproc.hdf5.lock import Fence
from lazyproc.hdf5.locking import lock, unlock
from lazyproc.hdf5.room import writing
from lazyproc.hdf5.sidecar import CLAIMS, open_sidecar, sidecar

_BEYOND = 2**62
"""More than there are blocks."""
_NUMBER = struct.Struct("<q")


class FileCounter:
    """A number in a small file beside the results, for processes that see each other's locks.

    Parameters
    ----------
    path : str
        The file with the results.
    fence : Fence
        Of the run: tells how files are locked.
    """

    def __init__(self, path: str, fence: Fence) -> None:
        self._path = sidecar(path, CLAIMS)
        self._locking = fence.locking

    def begin(self) -> None:
        """Make the file, with 0. By one process, before the others use it; it has the lock of the run.

        Raises
        ------
        NoRoomError
            If the disk is full.
        """
        descriptor = open_sidecar(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            with writing(self._path, "the number of the next block"):
                os.pwrite(descriptor, _NUMBER.pack(0), 0)
        finally:
            os.close(descriptor)

    def next(self) -> int:
        """Raise it by one, and return what it was before.

        Raises
        ------
        ResultsError
            If the file is gone, or somebody else has written into it.
        """
        with self._held() as descriptor:
            content = os.pread(descriptor, _NUMBER.size + 1, 0)
            if len(content) != _NUMBER.size:
                raise ResultsError(
                    f"{self._path}: {len(content)} bytes came; expected {_NUMBER.size}, the number of the next block. "
                    "Another program has changed this file during the run; what is finished is kept: run again."
                )
            (number,) = _NUMBER.unpack(content)
            os.pwrite(descriptor, _NUMBER.pack(number + 1), 0)
        return int(number)

    def stop(self) -> None:
        """Let nobody take anything more."""
        with self._held() as descriptor:
            os.pwrite(descriptor, _NUMBER.pack(_BEYOND), 0)

    def free(self) -> None:
        """Remove the file. When nobody uses it any more; by one, or by all."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    @contextmanager
    def _held(self) -> Iterator[int]:
        """Hold the file: opened afresh, since that is when file systems in a network look again."""
        try:
            descriptor = open_sidecar(self._path, os.O_RDWR)
        except FileNotFoundError as error:
            raise ResultsError(
                f"{self._path}: the file is gone, which tells whose turn it is; expected it to stay during the run. "
                "What is finished is kept: run again."
            ) from error
        try:
            lock(descriptor, self._path, self._locking, exclusive=True, wait=True)
            yield descriptor
        finally:
            with suppress(OSError):
                unlock(descriptor, self._locking)  # by itself: a process forked meanwhile may keep the file open
            os.close(descriptor)
