"""Change the structure of an HDF5 file in one step: a kill at any instant leaves the old file or the new one.

Plain HDF5 writes a group in several steps, and a kill between two of them can make the *parent* group unreadable. Here
HDF5 writes into an `Overlay`, a Python file object that keeps what is written in memory and reads through to the file.
Then::

    1  bytes beyond the old end of the file are written and synced      nothing in the file points to them yet; if they
                                                                        are many, they are written as they come
    2  the changes inside the old file go into a journal beside it      with what stood there before, and a checksum
    3  they are applied and synced, the journal is removed

A journal that is found later is either incomplete (nothing was applied: it is dropped) or complete (it is applied
again). It is refused if the file shows neither the old nor the new bytes: somebody else has changed it since.
An error in step 1 or 2 takes back what was done; one in step 3 does not keep it from being finished.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import h5py

from lazyproc.core.errors import FileBusyError, JournalError, ReadOnlyFileError
from lazyproc.hdf5.durable import sync_data, sync_folder, write_all
from lazyproc.hdf5.end import check_end
from lazyproc.hdf5.extents import check_same_file
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.holder import holder
from lazyproc.hdf5.journal_file import read_journal_file, understood
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.locking import lock_hdf5, locking
from lazyproc.hdf5.overlay import Overlay, Patch
from lazyproc.hdf5.room import reserve, writing
from lazyproc.hdf5.sidecar import JOURNAL, LOCK, UNDO, has_pending, open_sidecar, sidecar
from lazyproc.hdf5.superblock import SUPERBLOCK_BYTES, end_of, is_open_for_writing
from lazyproc.hdf5.undo import read_undo, roll_back

_LARGEST_REST = 2**20
"""Bytes beyond the end of the HDF5 file that are let be."""


@contextmanager
def transaction(path: str, same: FileId | None = None) -> Iterator[h5py.File]:
    """Open a file for changes that take effect together, at the end of the context, or not at all.

    Parameters
    ----------
    path : str
        An HDF5 file that nobody has open for writing; readers may have it open and go on.
    same : FileId, optional
        The file that it must be.

    Yields
    ------
    h5py.File
        Open for writing; every change stays in memory until the context ends without an error.

    Raises
    ------
    FileBusyError
        If somebody has the file open for writing.
    FileChangedError
        If it is another file.
    ReadOnlyFileError
        If the file, or its folder, cannot be written.
    NoRoomError
        If there is no room for what is added, also for what will be written there later. The file is as it was.

    Notes
    -----
    What is written inside the old file lives in memory until the end; of what is added no more than a few MiB.
    The caller must hold the run's lock, so that no two transactions meet.
    """
    recover(path)
    with _held(path) as descriptor:
        refuse_marked(descriptor, path)
        _refuse_own_handles(descriptor, path)
        if same is not None:
            check_same_file(descriptor, path, same, "the results")
        _cut_off_rest(descriptor, path)
        overlay = Overlay(descriptor, path, spills=True)
        try:
            with h5py.File(overlay, "r+") as file:
                check_end(file, os.pread(descriptor, SUPERBLOCK_BYTES, 0), overlay.old_size, path)
                yield file
        except BaseException as error:
            if overlay.has_spilled:
                os.ftruncate(descriptor, overlay.old_size)
            if overlay.failure is not None:
                raise overlay.failure from error
            raise
        _apply(path, descriptor, overlay)


def _cut_off_rest(descriptor: int, path: str) -> None:
    """Cut off what a transaction has left beyond the end that died: else the next one would have to journal it all."""
    superblock, size = os.pread(descriptor, SUPERBLOCK_BYTES, 0), os.fstat(descriptor).st_size
    end = end_of(superblock)
    if end is not None and size - end > _LARGEST_REST:
        with h5py.File(Overlay(descriptor, path), "r") as file:
            check_end(file, superblock, size, path)
        os.ftruncate(descriptor, end)


@contextmanager
def _held(path: str) -> Iterator[int]:
    """Open the file for raw writing and keep foreign `r+` handles away, which want it exclusively."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise ReadOnlyFileError(
            f"{path}: the file cannot be written ({error.strerror}). Give h5_target_group in another file, or change "
            "the permissions."
        ) from error
    try:
        share_lock(descriptor, path)
        yield descriptor
    finally:
        os.close(descriptor)


def refuse_marked(descriptor: int, path: str) -> None:
    """Raise if a file is marked as being written: HDF5 gives up its lock where a writer has begun SWMR.

    Raises
    ------
    FileBusyError
        If it is. HDF5's own tools would not open it for writing, either.
    """
    if is_open_for_writing(os.pread(descriptor, SUPERBLOCK_BYTES, 0)):
        raise FileBusyError(
            f"{path}: the file is marked as open for writing, perhaps in SWMR mode, which keeps no lock. Close it in "
            "the program that writes it, or give h5_target_group in another file. If that program is gone, "
            f"`h5clear -s {path}` takes the mark away."
        )


def _refuse_own_handles(descriptor: int, path: str) -> None:
    """Raise if this process has the file open for writing without a lock, as where locking is switched off."""
    status = os.fstat(descriptor)
    for file in h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE):
        with suppress(Exception):  # of another thread, which just closes it; or of no file that has a name
            if file.get_intent() != h5py.h5f.ACC_RDONLY and os.path.samestat(os.stat(file.name), status):
                break
    else:
        return
    raise _in_use(path)


def share_lock(descriptor: int, path: str) -> None:
    """Hold the HDF5 file's own lock shared: readers come in, writers are turned away.

    Raises
    ------
    FileBusyError
        If somebody has the file open for writing.
    LockingError
        If the file system cannot lock files, and the environment does not say that this does not matter.
    """
    if not lock_hdf5(descriptor, path, locking()):
        raise _in_use(path)


def _in_use(path: str) -> FileBusyError:
    return FileBusyError(
        f"{path}: the file is open for writing in another program, or in this one. Close it there, or hand the open "
        "dataset itself to the Process instead of its path."
    )


def _apply(path: str, descriptor: int, overlay: Overlay) -> None:
    patches, added = overlay.changes()
    journal = sidecar(path, JOURNAL)
    n_new = max(0, overlay.size - overlay.old_size)
    try:
        with writing(path, "what is added to it", n_new):
            reserve(descriptor, overlay.old_size, n_new, path, "what is added to it")
            for offset, data in added:
                write_all(descriptor, data, offset)
            if n_new:
                os.ftruncate(descriptor, overlay.size)
            sync_data(descriptor)
            if not patches:
                return
            _write_journal(journal, os.fstat(descriptor), patches)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(journal)
            sync_folder(journal)  # one that came back after a power cut would point to what is cut off here
        os.ftruncate(descriptor, overlay.old_size)  # nothing points beyond the old end yet
        raise
    try:
        _finish(descriptor, journal, patches)
    except BaseException:
        _finish(descriptor, journal, patches)  # half of the changes would be worse than an interrupt that comes late
        raise


def _finish(descriptor: int, journal: str, patches: list[Patch]) -> None:
    """Apply the changes of a complete journal, as often as need be, and remove it for good."""
    for offset, _, new in patches:
        write_all(descriptor, new, offset)
    sync_data(descriptor)
    with suppress(FileNotFoundError):
        os.unlink(journal)
    sync_folder(journal)  # a journal that came back after a power cut would undo what is written from now on


def _write_journal(journal: str, status: os.stat_result, patches: list[Patch]) -> None:
    body = json.dumps(
        {
            "inode": status.st_ino,
            "size": status.st_size,
            "patches": [
                [offset, base64.b64encode(old).decode(), base64.b64encode(new).decode()] for offset, old, new in patches
            ],
        }
    ).encode()
    descriptor = open_sidecar(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(descriptor, b"%08x\n" % zlib.crc32(body) + body, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(journal)


def read_journal(path: str) -> list[Patch] | None:
    """Return what a killed change left to be done beside the file; None without a complete journal.

    Of a transaction these are its changes; of a change through an open handle, the bytes that stood there before.

    Raises
    ------
    JournalError
        If the journal belongs to another file, or the file was changed by somebody else since.
    """
    redo = _read_redo(path)
    return read_undo(path) if redo is None else redo


def _read_redo(path: str, *, force: bool = False) -> list[Patch] | None:
    """Return the changes of a killed transaction; somebody else's bytes in their place are refused."""
    journal = sidecar(path, JOURNAL)
    while (content := _load_journal(journal)) is not None:
        inode, size, patches = content
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != inode and not (force and 0 < size <= status.st_size):
                raise JournalError(
                    f"{path}: the journal {journal} was written for another file: one that lay here before, or that "
                    "was copied from elsewhere together with its journal. If this file opens and is whole, remove the "
                    f"journal. If both were copied together, run 'lazyproc recover --force {path}'."
                )
            now = [os.pread(file.fileno(), len(old), offset) for offset, old, _ in patches]
        strange = [
            offset for (offset, old, new), bytes_ in zip(patches, now, strict=True) if not _between(bytes_, old, new)
        ]
        if not strange:
            return patches
        if _load_journal(journal) == content:  # else a transaction that is going on has just ended
            raise JournalError(
                f"{path}: the journal {journal} tells of a change that was cut off, but the file has been changed by "
                f"somebody else since (at byte {strange[0]}). If the file opens, remove the journal."
            )
    return None


def _load_journal(journal: str) -> tuple[int, int, list[Patch]] | None:
    """Return what a complete journal holds: the file's inode, its bytes (0 if that was not noted), and the changes."""
    body = read_journal_file(journal)
    if body is None:
        return None
    decode = base64.b64decode
    with understood(journal):
        content = json.loads(body)
        patches = [(offset, decode(old), decode(new)) for offset, old, new in content["patches"]]
        return content["inode"], content.get("size", 0), patches


def _between(now: bytes, old: bytes, new: bytes) -> bool:
    """Tell whether a write of `new` over `old` that was cut off can have left `now`."""
    return len(now) == len(old) and all(n in (a, b) for n, a, b in zip(now, old, new, strict=True))


def recover(path: str, *, force: bool = False) -> bool:
    """Finish, or drop, a transaction that was killed; take back a change through an open handle that was.

    Parameters
    ----------
    path : str
        The HDF5 file.
    force : bool
        Take it back although the file has been changed since, which is lost then; and take a file that does not lie
        where it did for a copy of the one that the journal was written for, if it can be one.

    Returns
    -------
    bool
        Whether there was anything to do.

    Raises
    ------
    JournalError
        If the journal does not fit the file: see `read_journal`. Nothing was changed.
    FileBusyError
        If somebody has the file open for writing.
    """
    if not has_pending(path):
        return False
    journal, undo = sidecar(path, JOURNAL), sidecar(path, UNDO)
    with _held(path) as descriptor:
        if os.path.exists(journal):
            _finish(descriptor, journal, _read_redo(path, force=force) or [])
        if os.path.exists(undo):
            roll_back(descriptor, path, force=force)
    return True


def recover_locked(path: str, *, force: bool = False) -> bool:
    """Do as `recover`, for a caller who does not hold the run's lock; it is taken only if there is something to do.

    Something to do is also to remove the lock files that a death has left, if nobody holds them.

    Raises
    ------
    FileBusyError
        If another run has the file: what lies beside it may be of a change that is just being made.
    """
    if not has_pending(path) and not (os.path.exists(sidecar(path, LOCK)) and holder(path) is None):
        return False
    with RunLock(path):
        return recover(path, force=force)
