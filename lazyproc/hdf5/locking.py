"""How files are locked: by ``flock``, by byte ranges, or not at all, as the environment says; nothing else asks it.

``LAZYPROC_LOCKING`` is one of::

    flock     the default; local disks, NFS with a lock daemon, Lustre mounted with -o flock
    lockf     locks on byte ranges, which some network file systems carry to other hosts where they do not carry flock
    none      no locks: a lock file alone, and only the driver writes results

The locks of both kinds belong to the open file: the system frees them when it is closed, however its process ends.
Locks on some bytes of a file are made here, too, whatever the environment says.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from lazyproc.core.errors import ArgumentValueError, LockingError

LOCKING_NAME = "LAZYPROC_LOCKING"
FLOCK, LOCKF, NONE = KINDS = ("flock", "lockf", "none")

_FAR = 2**62
_ALL = (0, 0)
"""Start and length of the range of all bytes."""
_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES)
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def locking() -> str:
    """Return how files are to be locked: one of `KINDS`.

    Raises
    ------
    ArgumentValueError
        If the environment says something else, or this system has no locks on byte ranges for open files.
    """
    kind = os.environ.get(LOCKING_NAME, "").strip().lower() or FLOCK
    if kind not in KINDS:
        raise ArgumentValueError(f"{LOCKING_NAME}: {kind!r} came; expected one of {', '.join(KINDS)}.")
    if kind == LOCKF and not has_range_locks():
        raise ArgumentValueError(f"{LOCKING_NAME}: lockf came; this system has no such locks. Use flock, or none.")
    return kind


def has_range_locks() -> bool:
    """Tell whether this system has locks on ranges of bytes that belong to an open file; a file system may not."""
    return hasattr(fcntl, "F_OFD_SETLK")


def lock(descriptor: int, path: str, kind: str, *, exclusive: bool, wait: bool = False) -> bool:
    """Lock an open file.

    Parameters
    ----------
    descriptor : int
        The open file; for an exclusive lock open for writing, else for reading.
    path : str
        Its name, for messages.
    kind : str
        ``"flock"``, ``"lockf"``, or ``"none"``, which does nothing.
    exclusive : bool
        Alone, or together with others who share it.
    wait : bool
        Wait for whoever has it.

    Returns
    -------
    bool
        False if somebody else has it.

    Raises
    ------
    LockingError
        If the file system cannot lock files in this way.
    """
    try:
        if kind == FLOCK:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        elif kind == LOCKF:
            _set_range(descriptor, fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, *_ALL, wait=wait)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE and not wait:
            return False
        if error.errno in _NOT_SUPPORTED:
            raise LockingError(_advice(path, kind, error)) from error
        raise
    return True


def lock_range(descriptor: int, start: int, length: int) -> bool:
    """Lock some bytes of an open file alone, without waiting.

    Parameters
    ----------
    descriptor : int
        The file, open for writing.
    start, length : int
        The bytes; they need not be there.

    Returns
    -------
    bool
        False if somebody else has one of them.

    Raises
    ------
    OSError
        If the file system has no such locks.
    """
    try:
        _set_range(descriptor, fcntl.F_WRLCK, start, length)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return False
        raise
    return True


def lock_inode(descriptor: int) -> bool:
    """Lock a file of several names (hard links) alone, whatever name it was opened by; it does not keep readers away.

    One byte is locked, far beyond the end of any file, for as long as the file is open. HDF5 never looks at it.

    Parameters
    ----------
    descriptor : int
        The file, open for writing.

    Returns
    -------
    bool
        False if somebody else has it. True where the system, or the file system, has no such locks.
    """
    if not has_range_locks():
        return True
    try:
        return lock_range(descriptor, _FAR, 1)
    except OSError:
        return True


def unlock(descriptor: int, kind: str) -> None:
    """Give a lock back while the file stays open, in this process or in one that was forked from it."""
    if kind == FLOCK:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    elif kind == LOCKF:
        unlock_range(descriptor, *_ALL)


def unlock_range(descriptor: int, start: int, length: int) -> None:
    """Give back what `lock_range` has locked, as `unlock` does."""
    _set_range(descriptor, fcntl.F_UNLCK, start, length)


def _set_range(descriptor: int, wish: int, start: int, length: int, *, wait: bool = False) -> None:
    """Ask for a lock on a range of bytes, or give it back.

    Handed over is the struct flock of 64-bit systems: type, whence, start, length (0: all), process (0 for open files).
    """
    request = struct.pack("hhqqi", wish, os.SEEK_SET, start, length, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)


def _advice(path: str, kind: str, error: OSError) -> str:
    other = f"{LOCKING_NAME}=lockf, if locks on byte ranges work there; " if kind == FLOCK else ""
    return (
        f"{path}: the file system does not lock files ({kind}: {error.strerror}), so lazyproc cannot make sure that "
        f"nobody else computes into this file. Put the results on another file system (h5_target_group); or set "
        f"{other}{LOCKING_NAME}=none, if you see to it yourself that nobody else writes into this file: then only the "
        "driver writes results, and nothing but a lock file keeps other runs away."
    )


def lock_hdf5(descriptor: int, path: str, kind: str) -> bool:
    """Share HDF5's own lock on a file, which is a flock, so that foreign writers stay away and readers come in.

    Parameters
    ----------
    descriptor, path
        The open file.
    kind : str
        With any but ``"flock"`` it does not matter that the file system has no flock: HDF5 cannot lock there, either.

    Returns
    -------
    bool
        False if somebody has the file open for writing.

    Raises
    ------
    LockingError
        If the file system has no flock.
    """
    try:
        return lock(descriptor, path, FLOCK, exclusive=False)
    except LockingError:
        if kind == FLOCK:
            raise
        return True


def hdf5_locks() -> bool:
    """Tell whether the environment lets HDF5 lock the files that it opens."""
    return os.environ.get("HDF5_USE_FILE_LOCKING", "").upper() not in ("FALSE", "0")


def hdf5_option(path: str) -> bool | None:
    """Return the option `locking` for `h5py.File`: None leaves it to HDF5; False where locks fail and need not be.

    Raises
    ------
    LockingError
        If the file system has no flock, and the environment asks for it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # h5py will say it
        return None
    try:
        lock(descriptor, path, FLOCK, exclusive=False)
    except LockingError:
        if not hdf5_locks():
            return None
        if locking() == FLOCK:
            raise
        return False
    finally:
        os.close(descriptor)
    return None
