"""The undo journal: what stood in an HDF5 file before a change through an open handle, to be put back if that dies.

HDF5 writes a change of a file's structure in several steps, and a death between two of them can cost the whole file. A
handle that the caller has open cannot be given an overlay. So all bytes but raw data are kept beside the file before::

    1  the file is flushed and synced; its metadata go into the journal, with a checksum; that is synced
    2  the change is made through the handle, flushed and synced         all raw data stay where they were
    3  the journal is removed

A journal that is found later is either incomplete (the change had not begun: it is dropped) or complete: its bytes are
put back, and the file cut off where it ended. That must not undo what somebody else has written after the death. While
its writer lives, the journal's time of modification moves on several times a second. A file that is clearly younger, or
was closed properly, has been open for writing since; then both states are compared (see `lazyproc.hdf5.foreign`).
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lazyproc.hdf5.durable import JournalError, sync_folder, write_all
from lazyproc.hdf5.foreign import changes_since
from lazyproc.hdf5.lock import holder, sidecar
from lazyproc.hdf5.overlay import Patch
from lazyproc.hdf5.room import writing

_BEAT = 0.1
"""Seconds between two signs of life."""
_LATEST = 1_000_000_000
"""Nanoseconds: a file so much younger than its journal has been written by somebody else."""
_PIECE = 4 * 2**20
_UNCOMPRESSED = 2**18
"""Bytes: what is smaller is not worth compressing."""
_HEAD = 9
"""Bytes of the checksum and a line feed."""

Ranges = NDArray[np.int64]
"""Where bytes lie in a file, `(n_ranges, 2)`: starts and stops."""


@dataclass(frozen=True)
class UndoJournal:
    """A complete undo journal.

    Attributes
    ----------
    name : str
        The journal's file.
    inode : int
        Of the HDF5 file.
    size : int
        The HDF5 file's bytes before the change.
    ranges : ndarray
        What is kept of them: `(n_ranges, 2)` starts and stops.
    compressed : bool
        Whether the bytes are compressed.
    place : int
        Where in the journal they begin.
    session : str
        Which opening of the file the change was made through.
    """

    name: str
    inode: int
    size: int
    ranges: Ranges
    compressed: bool
    place: int
    session: str

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """Give the bytes that stood in the file, in pieces with their places."""
        stream = _decompressed(self.name, self.place) if self.compressed else _content(self.name, self.place)
        waiting = bytearray()
        for start, stop in self.ranges.tolist():
            for offset, end in _cut(start, stop):
                while len(waiting) < end - offset:
                    waiting += next(stream)
                yield offset, bytes(waiting[: end - offset])
                del waiting[: end - offset]


def write_undo(path: str, descriptor: int, size: int, ranges: Ranges, session: str = "") -> None:
    """Keep bytes of the file in an undo journal beside it, durably.

    Parameters
    ----------
    path : str
        The HDF5 file.
    descriptor : int
        The same, open for reading, flushed.
    size : int
        Its bytes.
    ranges : ndarray
        What to keep: `(n_ranges, 2)` starts and stops.
    session : str
        Which opening of the file the change is made through.
    """
    journal = sidecar(path, "undo")
    compressed = int((ranges[:, 1] - ranges[:, 0]).sum()) > _UNCOMPRESSED
    about = {
        "inode": os.fstat(descriptor).st_ino,
        "size": size,
        "ranges": ranges.tolist(),
        "compressed": compressed,
        "session": session,
    }
    pieces = (piece for _, piece in read_ranges(descriptor, ranges))
    out = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        checksum, place = 0, _HEAD
        with writing(path, f"the journal {journal}, which makes the change safe"):
            for block in _blocks([json.dumps(about).encode() + b"\n"], _compress(pieces) if compressed else pieces):
                write_all(out, block, place)
                checksum, place = zlib.crc32(block, checksum), place + len(block)
            write_all(out, b"%08x\n" % checksum, 0)
            os.fsync(out)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(journal)
        raise
    finally:
        os.close(out)
    sync_folder(journal)


def read_ranges(descriptor: int, ranges: Ranges) -> Iterator[tuple[int, bytes]]:
    """Give the bytes of a file in some ranges, in pieces with their places."""
    for start, stop in ranges.tolist():
        for offset, end in _cut(start, stop):
            yield offset, os.pread(descriptor, end - offset, offset).ljust(end - offset, b"\0")


def _cut(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((offset, min(offset + _PIECE, stop)) for offset in range(start, stop, _PIECE))


def _compress(pieces: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(1)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()


def _blocks(*streams: Iterator[bytes] | list[bytes]) -> Iterator[bytes]:
    """Join pieces, so that there are few writes."""
    waiting = bytearray()
    for stream in streams:
        for piece in stream:
            waiting += piece
            if len(waiting) >= _PIECE:
                yield bytes(waiting)
                waiting.clear()
    yield bytes(waiting)


def _content(name: str, place: int) -> Iterator[bytes]:
    with open(name, "rb") as file:
        file.seek(place)
        while piece := file.read(_PIECE):
            yield piece


def _decompressed(name: str, place: int) -> Iterator[bytes]:
    unpacker = zlib.decompressobj()
    for piece in _content(name, place):
        while piece:
            yield unpacker.decompress(piece, _PIECE)
            piece = unpacker.unconsumed_tail
    yield unpacker.flush()


def drop_undo(path: str) -> None:
    """Remove the undo journal for good: what has been changed stays."""
    journal = sidecar(path, "undo")
    with suppress(FileNotFoundError):
        os.unlink(journal)
    sync_folder(journal)  # a journal that came back after a power cut would undo what is written from now on


@contextmanager
def kept_fresh(path: str) -> Iterator[None]:
    """Move the time of modification of the file's journal on, several times a second: its writer lives.

    Notes
    -----
    A thread does it. h5py lets other threads run while HDF5 works, so also a write of minutes counts as alive.
    """
    journal, over = sidecar(path, "undo"), threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT):
            with suppress(OSError):
                os.utime(journal)

    thread = threading.Thread(target=beat, name="lazyproc-undo", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def load_undo(path: str) -> UndoJournal | None:
    """Return the file's undo journal; None if there is none, or an incomplete one."""
    journal = sidecar(path, "undo")
    try:
        with open(journal, "rb") as file:
            checksum, now = file.read(_HEAD), 0
            while piece := file.read(_PIECE):
                now = zlib.crc32(piece, now)
            if checksum != b"%08x\n" % now:
                return None
            file.seek(_HEAD)
            about = json.loads(file.readline())
            place = file.tell()
    except FileNotFoundError:
        return None
    ranges = np.array(about["ranges"], np.int64).reshape(-1, 2)
    return UndoJournal(
        journal, about["inode"], about["size"], ranges, about["compressed"], place, about.get("session", "")
    )


def _check(path: str, journal: UndoJournal, *, force: bool = False) -> None:
    """Raise JournalError if the journal does not fit the file as it is."""
    file = os.stat(path)
    if file.st_ino != journal.inode:
        raise JournalError(
            f"{path}: the journal {journal.name} was written for another file that lay here before. If this file is "
            "complete, remove the journal."
        )
    try:
        late = file.st_mtime_ns - os.stat(journal.name).st_mtime_ns
        if force or (late <= _LATEST and not _was_closed(path, journal)):
            return
        changes = changes_since(path, [(offset, b"", piece) for offset, piece in journal.pieces()], journal.size)
    except FileNotFoundError:  # its writer lives, and has just finished
        return
    if changes:
        raise JournalError(
            f"{path}: the journal {journal.name} tells of a change that was cut off, but the file has been changed by "
            f"somebody else since: {_listed(changes)}. If the file opens and is whole, remove the journal. To put back "
            f"what was there before, and lose what was changed since, run 'lazyproc recover --force {path}'."
        )


def _was_closed(path: str, journal: UndoJournal) -> bool:
    """Tell whether a program has closed the file properly since: HDF5 notes in the superblock that it has it open."""
    begin, superblock = next(journal.pieces(), (0, b""))
    place = _place_of_flag(superblock)
    with open(path, "rb") as file:
        now = os.pread(file.fileno(), 1, begin + place)
    return superblock[place : place + 1] == b"\1" and now == b"\0"


def _place_of_flag(superblock: bytes) -> int:
    """Return where a superblock has the byte that tells whether the file is open for writing."""
    return 20 if superblock[8:9] in (b"\0", b"\1") else 11


def _listed(changes: list[str]) -> str:
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def read_undo(path: str) -> list[Patch] | None:
    """Return the bytes that have to be put back to undo a change that was cut off; None if there is none.

    Raises
    ------
    JournalError
        If the journal belongs to another file, or the file was changed by somebody else since.
    """
    journal = load_undo(path)
    if journal is None:
        return None
    _check(path, journal)
    try:
        return [(offset, b"", piece) for offset, piece in journal.pieces()]
    except FileNotFoundError:  # its writer lives, and has just finished
        return None


def roll_back(descriptor: int, path: str, *, force: bool = False) -> None:
    """Put back what stood in the file before a change that was cut off, and remove the journal.

    Parameters
    ----------
    descriptor : int
        The file, open for writing; nobody else writes it.
    path : str
        Its name.
    force : bool
        Also if the file was changed since.

    Raises
    ------
    JournalError
        If the journal does not fit the file: see `read_undo`. Nothing was changed.

    Notes
    -----
    A death on the way does no harm: the next call begins again.
    """
    journal = load_undo(path)
    if journal is not None:
        _check(path, journal, force=force)
        os.utime(journal.name)  # what is written from here on is not by somebody else
        with kept_fresh(path):
            for offset, piece in journal.pieces():
                write_all(descriptor, piece, offset)
            os.ftruncate(descriptor, journal.size)
            os.fsync(descriptor)
    drop_undo(path)


def _is_as_before(path: str, journal: UndoJournal) -> bool:
    """Tell whether the change had not reached the disk when it was cut off."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if (status.st_ino, status.st_size) != (journal.inode, journal.size):
            return False
        for number, (offset, piece) in enumerate(journal.pieces()):
            now = os.pread(file.fileno(), len(piece), offset)
            if number == 0:  # whether somebody has the file open does not matter
                place = _place_of_flag(piece)
                now = now[:place] + piece[place : place + 1] + now[place + 1 :]
            if now != piece:
                return False
    return True


def refuse_pending(path: str | None, *, locked: bool = False, session: str = "") -> None:
    """Make sure that no change of an open file waits to be undone: the handle may have read what is damaged.

    Parameters
    ----------
    path : str or None
        The file; None if there is none on disk.
    locked : bool
        Whether the caller holds the run's lock; then a journal that has nothing to put back is dropped. If not,
        somebody else may be just at it; then nothing is refused.
    session : str
        The opening of the file that the caller has. What waits in this very one is not refused: HDF5 could not write
        it, since the disk was full, and will as soon as it can.

    Raises
    ------
    JournalError
        If one waits. Nothing was written.
    """
    if path is None or (journal := load_undo(path)) is None:
        return
    if not locked and (holder(path) is not None or load_undo(path) is None):
        return
    if session and session == journal.session:
        return
    if _is_as_before(path, journal):
        if locked:
            drop_undo(path)
        return
    raise JournalError(
        f"{path}: the process that changed this file last was killed in the middle of it, or found the disk full, so "
        f"what is open here may be damaged; nothing was written. Close the file, run 'lazyproc recover {path}', and "
        "open it again."
    )
