"""Room on the disk: reserved when results are created, and an error that tells how much is missing.

Datasets that are allocated but not written are holes: the disk would be found full in the middle of a run. So the file
system is asked to set the room aside beforehand. That writes nothing (ext4: some ms for 256 MiB), and where a file
system cannot do it, or copies what it writes, a run ends with the same error later, with what it has done kept.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lazyproc.core.errors import FileChangedError, LazyprocError, NoRoomError, ReadOnlyFileError, ResultsError
from lazyproc.hdf5.raised import H5_ERRORS

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room on the disk, in the quota, or under the limit of a file's size."""

_KEEP_SIZE = 1
_IN_HDF5 = re.compile(r"errno = (\d+)")
_WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file may not grow that large here",
}


@contextmanager
def writing(path: str, what: str, n_bytes: int | None = None, *, in_hdf5: bool = False) -> Iterator[None]:
    """Turn the error of a full disk, from the system or from inside HDF5, into one that helps.

    Parameters
    ----------
    path : str
        The file that is written.
    what : str
        What is written, for the message.
    n_bytes : int, optional
        How many bytes are needed, where that is known.
    in_hdf5 : bool
        Only errors from inside HDF5: where a user's own code runs, it may fill other disks.

    Raises
    ------
    NoRoomError
        If there is no room. Other errors pass.
    """
    try:
        yield
    except LazyprocError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # h5py raises any of them
        code = full_code(error)
        if code is None or (in_hdf5 and not of_hdf5(error)):
            raise
        raise no_room(path, what, code, n_bytes) from error


@contextmanager
def changing(path: str, what: str) -> Iterator[None]:
    """Turn what HDF5 and the system raise while the structure of a file is changed into errors that help.

    Parameters
    ----------
    path : str
        The file.
    what : str
        What is changed in it.

    Raises
    ------
    NoRoomError
        If there is no room.
    FileChangedError
        If the file is gone, or its disk fails.
    ReadOnlyFileError
        If the file may not be written.
    ResultsError
        If the file, as far as it matters for the change, is damaged.
    """
    try:
        with writing(path, what):
            yield
    except LazyprocError:
        raise
    except H5_ERRORS as raised:
        error = _first_of_system(raised)
        if not os.path.exists(path):
            raise gone(path, what) from error
        code = getattr(error, "errno", None)
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ReadOnlyFileError(
                f"{path}: {what} cannot be written ({error}). Give h5_target_group in another file, or change the "
                "permissions."
            ) from error
        if code is not None:
            raise FileChangedError(
                f"{path}: {what} cannot be written ({error}). Look for faults of the disk or the network; then run the "
                "same again."
            ) from error
        raise ResultsError(
            f"{path}: {what} cannot be written ({error}). The file is damaged there: give h5_target_group in another "
            "file, or restore this one from a copy."
        ) from error


def _first_of_system(error: BaseException) -> BaseException:
    """Return the error of the system that led to an error; after it HDF5 may fail for reasons of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def gone(path: str, what: str) -> FileChangedError:
    """Return the error of a file that is not where it was."""
    return FileChangedError(
        f"{path}: the file is gone, with {what} in it: it was moved, renamed or deleted. Put it back and run the same "
        "again."
    )


def of_hdf5(error: BaseException) -> bool:
    """Tell whether an error, or the one before it, came from inside HDF5."""
    seen: BaseException | None = error
    while seen is not None:
        if _IN_HDF5.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def full_code(error: BaseException) -> int | None:
    """Return ENOSPC, EDQUOT or EFBIG if that is what an error is about, also one of HDF5; else None.

    After HDF5 could not write, what is asked of it next may fail for reasons of its own: then the error before tells.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = getattr(seen, "errno", None)
        if code is None:
            match = _IN_HDF5.search(str(seen))
            code = int(match[1]) if match else None
        if code in FULL:
            return int(code)
        seen = seen.__cause__ or seen.__context__
    return None


def no_room(path: str, what: str, code: int, n_bytes: int | None = None) -> NoRoomError:
    """Return the error of a full disk."""
    needed = "" if n_bytes is None else f"{_amount(n_bytes)} needed, "
    return NoRoomError(
        f"{path}: no room for {what}: {_WHY[code]} ({needed}{_free(path)} free on the disk). What is done so far is "
        "kept: make room and run the same again, or give h5_target_group in a file on another disk.",
        code,
    )


def _free(path: str) -> str:
    try:
        about = os.statvfs(path if os.path.exists(path) else os.path.dirname(path) or ".")
    except OSError:
        return "an unknown amount"
    return _amount(about.f_bavail * about.f_frsize)


def _amount(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.1f} KiB"


def reserve(descriptor: int, start: int, n_bytes: int, path: str, what: str) -> None:
    """Have room set aside in a file, beyond its end, too; neither its size nor its contents change.

    Parameters
    ----------
    descriptor : int
        The file, open for writing.
    start, n_bytes : int
        Where in the file, and how much.
    path, what : str
        The file and what the room is for, for the message.

    Raises
    ------
    NoRoomError
        If there is not so much. The file is as it was. File systems that cannot reserve pass.
    """
    if n_bytes <= 0:
        return
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and start + n_bytes > limit:
        raise no_room(path, what, errno.EFBIG, n_bytes)
    allocate = _fallocate()
    if allocate is None:
        return
    while True:
        code = allocate(descriptor, _KEEP_SIZE, start, n_bytes)
        if code != errno.EINTR:
            break
    if code in FULL:
        raise no_room(path, what, code, n_bytes)


def give_back(descriptor: int) -> None:
    """Give back what was reserved beyond the end of a file and not used."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size)


@functools.lru_cache(maxsize=1)
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """Return fallocate of the C library, which gives an error number; None where there is none.

    `os.posix_fallocate` will not do: where a file system cannot reserve, it writes to each page instead.
    """
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is None:
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int

    def allocate(descriptor: int, mode: int, start: int, n_bytes: int) -> int:
        return ctypes.get_errno() if function(descriptor, mode, start, n_bytes) else 0

    return allocate
