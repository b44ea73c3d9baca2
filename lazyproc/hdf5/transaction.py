"""Change the structure of an HDF5 file in one step: a kill at any instant leaves the old file or the new one.

Plain HDF5 writes a group in several steps, and a kill between two of them can make the *parent* group unreadable. Here
HDF5 writes into an `Overlay`, a Python file object that keeps what is written in memory and reads through to the file.
Then::

    1  bytes beyond the old end of the file are written and synced      nothing in the file points to them yet
    2  the changes inside the old file go into a journal beside it      with what stood there before, and a checksum
    3  they are applied and synced, the journal is removed

A journal that is found later is either incomplete (nothing was applied: it is dropped) or complete (it is applied
again). It is refused if the file shows neither the old nor the new bytes: somebody else has changed it since.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import h5py

from lazyproc.core.errors import FileBusyError, LazyprocError, ReadOnlyFileError
from lazyproc.hdf5.lock import sidecar

_PAGE = 4096
Patch = tuple[int, bytes, bytes]
"""Where in the file, what stood there, what shall stand there."""


class JournalError(LazyprocError, RuntimeError):
    """A journal does not belong to the file as it is now."""


class Overlay(io.RawIOBase):
    """A file whose changes stay in memory.

    Parameters
    ----------
    descriptor : int
        The file, open for reading.
    owns : bool
        Whether `close` closes the descriptor, too.

    Notes
    -----
    Only pages that are written are held; a file may grow by any number of bytes at no cost.
    """

    def __init__(self, descriptor: int, *, owns: bool = False) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._owns = owns
        self.old_size = os.fstat(descriptor).st_size
        self.size = self.old_size
        self._pages: dict[int, bytearray] = {}
        self._place = 0

    def close(self) -> None:
        """Forget the changes."""
        if self._owns and not self.closed:
            os.close(self._descriptor)
        super().close()

    def readable(self) -> bool:
        """Reads go through to the file where nothing was written."""
        return True

    def writable(self) -> bool:
        """Writes stay in memory."""
        return True

    def seekable(self) -> bool:
        """Any place can be sought."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; beyond the end is allowed."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def truncate(self, size: int | None = None) -> int:
        """Set the size; nothing is held for what is added."""
        self.size = self._place if size is None else size
        return self.size

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Read as much as there is."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self._place))
        done = 0
        while done < count:
            page, within = divmod(self._place + done, _PAGE)
            part = min(_PAGE - within, count - done)
            view[done : done + part] = self._page(page)[within : within + part]
            done += part
        self._place += count
        return count

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        """Keep what is written."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            page, within = divmod(self._place + done, _PAGE)
            part = min(_PAGE - within, len(view) - done)
            self._keep(page, within, view[done : done + part])
            done += part
        self._place += len(view)
        self.size = max(self.size, self._place)
        return len(view)

    def _keep(self, page: int, within: int, part: memoryview) -> None:
        if page not in self._pages:
            if page * _PAGE >= self.old_size and bytes(part).count(0) == len(part):
                return  # beyond the old end the file will be zero anyway: a large status mask costs nothing
            self._pages[page] = bytearray(self._page(page))
        self._pages[page][within : within + len(part)] = part

    def _page(self, page: int) -> bytes | bytearray:
        kept = self._pages.get(page)
        return kept if kept is not None else self._on_disk(page * _PAGE, _PAGE).ljust(_PAGE, b"\0")

    def _on_disk(self, offset: int, count: int) -> bytes:
        return os.pread(self._descriptor, max(0, min(count, self.old_size - offset)), offset)

    def changes(self) -> tuple[list[Patch], list[tuple[int, bytes]]]:
        """Return what changed inside the old file, and what was written beyond its end."""
        patches: list[Patch] = []
        added: list[tuple[int, bytes]] = []
        for page in sorted(self._pages):
            offset, kept = page * _PAGE, bytes(self._pages[page])
            before = self._on_disk(offset, _PAGE)
            if kept[: len(before)] != before:
                patches.append((offset, before, kept[: len(before)]))
            beyond = kept[len(before) : max(0, self.size - offset)]
            if beyond:
                added.append((offset + len(before), beyond))
        return patches, added


@contextmanager
def transaction(path: str) -> Iterator[h5py.File]:
    """Open a file for changes that take effect together, at the end of the context, or not at all.

    Parameters
    ----------
    path : str
        An HDF5 file that nobody has open for writing; readers may have it open and go on.

    Yields
    ------
    h5py.File
        Open for writing; every change stays in memory until the context ends without an error.

    Raises
    ------
    FileBusyError
        If somebody has the file open for writing.
    ReadOnlyFileError
        If the file, or its folder, cannot be written.

    Notes
    -----
    Large datasets must be allocated without being filled: what is written lives in memory until the end.
    The caller must hold the run's lock, so that no two transactions meet.
    """
    recover(path)
    with _held(path) as descriptor:
        overlay = Overlay(descriptor)
        with h5py.File(overlay, "r+") as file:
            yield file
        _apply(path, descriptor, overlay)


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


def share_lock(descriptor: int, path: str) -> None:
    """Hold the HDF5 file's own lock shared: readers come in, writers are turned away.

    Raises
    ------
    FileBusyError
        If somebody has the file open for writing.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileBusyError(
            f"{path}: the file is open for writing in another program, or in this one. Close it there, or hand the "
            "open dataset itself to the Process instead of its path."
        ) from error


def _apply(path: str, descriptor: int, overlay: Overlay) -> None:
    patches, added = overlay.changes()
    for offset, data in added:
        _write_all(descriptor, data, offset)
    if overlay.size > overlay.old_size:
        os.ftruncate(descriptor, overlay.size)
    os.fdatasync(descriptor)
    if not patches:
        return
    journal = sidecar(path, "journal")
    _write_journal(journal, os.fstat(descriptor), patches)
    for offset, _, new in patches:
        _write_all(descriptor, new, offset)
    os.fdatasync(descriptor)
    os.unlink(journal)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _write_journal(journal: str, status: os.stat_result, patches: list[Patch]) -> None:
    body = json.dumps(
        {
            "inode": status.st_ino,
            "patches": [
                [offset, base64.b64encode(old).decode(), base64.b64encode(new).decode()] for offset, old, new in patches
            ],
        }
    ).encode()
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        _write_all(descriptor, b"%08x\n" % zlib.crc32(body) + body, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(journal)


def sync_folder(path: str) -> None:
    """Make the names in the folder of `path` durable."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_journal(path: str) -> list[Patch] | None:
    """Return the changes that a killed transaction left beside the file; None without a complete journal.

    Raises
    ------
    JournalError
        If the journal belongs to another file.
    """
    journal = sidecar(path, "journal")
    try:
        with open(journal, "rb") as file:
            checksum, _, body = file.read().partition(b"\n")
    except FileNotFoundError:
        return None
    if checksum != b"%08x" % zlib.crc32(body):
        return None
    content = json.loads(body)
    if content["inode"] != os.stat(path).st_ino:
        raise JournalError(
            f"{path}: the journal {journal} was written for another file that lay here before. If this file is "
            "complete, remove the journal."
        )
    return [(offset, base64.b64decode(old), base64.b64decode(new)) for offset, old, new in content["patches"]]


def recover(path: str) -> bool:
    """Finish, or drop, a transaction that was killed.

    Returns
    -------
    bool
        Whether there was anything to do.

    Raises
    ------
    JournalError
        If the file was changed by somebody else since: neither the old nor the new bytes stand in it.
    """
    journal = sidecar(path, "journal")
    if not os.path.exists(journal):
        return False
    patches = read_journal(path)
    if patches is not None:
        with _held(path) as descriptor:
            for offset, old, new in patches:
                if not _between(os.pread(descriptor, len(old), offset), old, new):
                    raise JournalError(
                        f"{path}: the journal {journal} tells of a change that was cut off, but the file has been "
                        f"changed by somebody else since (at byte {offset}). If the file opens, remove the journal."
                    )
            for offset, _, new in patches:
                _write_all(descriptor, new, offset)
            os.fdatasync(descriptor)
    os.unlink(journal)
    return True


def _between(now: bytes, old: bytes, new: bytes) -> bool:
    """Tell whether a write of `new` over `old` that was cut off can have left `now`."""
    return len(now) == len(old) and all(n in (a, b) for n, a, b in zip(now, old, new, strict=True))
