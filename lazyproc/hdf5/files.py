"""Opening HDF5 files: addresses, fresh views that lock nothing, and who has to close what."""

from __future__ import annotations

import io
import logging
import os
from typing import Any

import h5py

from lazyproc.core.errors import (
    ArgumentValueError,
    FileBusyError,
    LazyprocError,
    MissingFileError,
    ReadOnlyFileError,
    ResultsError,
)
from lazyproc.hdf5.damage import attributes, members
from lazyproc.hdf5.heap import DamagedHeapError, is_endless_heap
from lazyproc.hdf5.holder import holder, say_who
from lazyproc.hdf5.locking import hdf5_option
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.overlay import Overlay
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.transaction import read_journal, recover_locked
from lazyproc.hdf5.unmark import close_unmarked, opening

_LARGEST_PLACE = 2**63 - 1 - 2**32
"""Bytes: no file reaches so far, and a read from here does not leave the numbers that the system has for places."""

log = logging.getLogger("lazyproc")


def split_address(address: str | os.PathLike[str], name: str) -> tuple[str, str]:
    """Split ``"scan.h5::/path/in/file"`` into the file's absolute path and the path inside.

    Parameters
    ----------
    address : str or path-like
        The address; without ``::`` the path inside is ``"/"``.
    name : str
        The argument's name, for the message.

    Raises
    ------
    ArgumentValueError
        If there is no file name in it.
    """
    file, _, inside = os.fspath(address).partition("::")
    if not file:
        raise ArgumentValueError(
            f"{name}: the address is {address!r}; expected a file and a path inside it, such as 'scan.h5::/group/data'."
        )
    return os.path.abspath(os.path.expanduser(file)), "/" + inside.strip("/")


class Files:
    """The files that one owner has opened, to be closed together.

    Notes
    -----
    What is opened for reading is a Python file object: independent of other handles of the same file in this process,
    always fresh, locking nothing. A transaction that was killed half-way is shown as it will be once it is recovered.
    """

    def __init__(self) -> None:
        self._opened: list[tuple[h5py.File, Any]] = []

    def open(self, path: str, argument: str = "") -> h5py.File:
        """Open a file for reading.

        Parameters
        ----------
        path : str
            The file.
        argument : str, optional
            The name of the argument that it came by, for messages.

        Raises
        ------
        MissingFileError
            If there is none; it is a FileNotFoundError, too.
        ArgumentValueError
            If it is no HDF5 file, a folder, or may not be read.
        """
        named = f"{argument}: {path}" if argument else path
        try:
            raw = _open_raw(path)
        except FileNotFoundError as error:
            raise MissingFileError(f"{named}: there is no such file. Expected one that h5py can open.") from error
        except OSError as error:
            raise ArgumentValueError(
                f"{named}: cannot be opened ({error.strerror}). Expected an HDF5 file that may be read."
            ) from error
        try:
            file = h5py.File(raw, "r")
        except H5_ERRORS as error:
            raw.close()
            raise ArgumentValueError(
                f"{named}: not an HDF5 file, or a damaged one ({error}). Expected a file that h5py can open."
            ) from error
        self._opened.append((file, raw))
        return file

    def open_for_writing(self, path: str) -> h5py.File:
        """Open a file for writing, with HDF5's own lock; a change that was cut off by a death is settled before.

        Raises
        ------
        FileBusyError
            If somebody has it open.
        ReadOnlyFileError
            If it cannot be written.
        LockingError
            If the file system cannot lock files.
        """
        if recover_locked(path):
            log.warning("%s: a change that was cut off has been settled", path)
        option = hdf5_option(path)
        try:
            with opening(path) as opened:
                opened.append(file := h5py.File(path, "r+", locking=option))
        except PermissionError as error:
            raise ReadOnlyFileError(f"{path}: the file cannot be written: {error}.") from error
        except OSError as error:
            about = holder(path)
            why = f"the file cannot be opened for writing ({error})" if about is None else say_who(about)
            raise FileBusyError(f"{path}: {why}. Close it in other programs and notebooks.") from error
        self._opened.append((file, None))
        return file

    def take(self, others: Files) -> None:
        """Take over what another owner has opened."""
        self._opened += others._opened
        others._opened = []

    def close_unused(self) -> None:
        """Close those of which nobody has anything anymore: no group or dataset in it, nor the file by one of these."""
        for one in list(self._opened):
            file, _ = one
            in_use = file and (h5py.h5f.get_obj_count(file.id, h5py.h5f.OBJ_ALL), h5py.h5i.get_ref(file.id)) != (1, 1)
            if not in_use:
                self._opened.remove(one)
                _close(*one)

    def close(self) -> None:
        """Close them all; groups and datasets handed out from them become invalid."""
        while self._opened:
            _close(*self._opened.pop())


def _close(file: h5py.File, raw: Any) -> None:
    if file:
        close_unmarked(file)
    if raw is not None:
        raw.close()


class _FreshFile(io.RawIOBase):
    """A file's bytes, read straight from disk; its repr is its path, which is what h5py then tells as the file name.

    Closed without a complaint when nobody holds it any more: views and groups may outlive what opened them.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._place = 0
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def readable(self) -> bool:
        """Only reading is possible."""
        return True

    def seekable(self) -> bool:
        """Any place can be sought."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        size = os.fstat(self._descriptor).st_size
        self._place = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: size}[whence] + offset
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read as much as the system gives at once.

        Raises
        ------
        OSError
            Also instead of showing HDF5 something that it would not return from.
        """
        if self._place < 0 or self._place > _LARGEST_PLACE:
            raise OSError(f"{self._path}: a damaged address leads to byte {self._place}")
        count = os.preadv(self._descriptor, [buffer], self._place)
        if is_endless_heap(memoryview(buffer).cast("B")[:count]):
            raise DamagedHeapError(f"{self._path}: the heap of texts at byte {self._place} is damaged")
        self._place += count
        return count

    def __repr__(self) -> str:
        return self._path


def check_heaps(item: h5py.Group | h5py.Dataset) -> None:
    """Make sure that HDF5 would return from reading the texts of an object behind a caller's handle.

    Its attributes, and those of its members, are read once from the file itself, where each heap is looked at before.

    Raises
    ------
    ResultsError
        If a heap is damaged in such a way.

    Notes
    -----
    What the handle has not flushed is not seen, nor read from the disk again.
    """
    path = real_path(item.file)
    if path is None or item.name is None:
        return
    files = Files()
    try:
        same = files.open(path)[item.name]
        for one in (same, *(inside for _, inside in members(same))) if isinstance(same, h5py.Group) else (same,):
            if not isinstance(one, Exception):
                attributes(one)
    except DamagedHeapError as error:
        raise ResultsError(f"{error}. Close the file, and restore it from a copy.") from error
    except (LazyprocError, *H5_ERRORS) as error:  # reading through the handle will say what is wrong
        log.debug("%s::%s: %s", path, item.name, error)
    finally:
        files.close()


def _open_raw(path: str) -> Any:
    """Open the file as bytes, with the changes of an unfinished transaction laid over it."""
    os.stat(path)  # before a journal is looked for
    patches = read_journal(path)
    if not patches:
        return _FreshFile(path)
    overlay = Overlay(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path, owns=True)
    for offset, _, new in patches:
        overlay.seek(offset)
        overlay.write(new)
    overlay.seek(0)
    return overlay
