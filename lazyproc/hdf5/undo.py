"""The undo journal: what stood in an HDF5 file before a change through an open handle, to be put back if that dies.

HDF5 writes a change of a file's structure in several steps, and a death between two of them can cost the whole file. A
handle that the caller has open cannot be given an overlay. So all bytes but raw data are kept beside the file before::

    1  the file is flushed and synced; its metadata go into the journal, with a checksum; that is synced
    2  the change is made through the handle, flushed and synced         all raw data stay where they were
    3  the journal is removed

A journal that is found later is either incomplete (the change had not begun: it is dropped) or complete: its bytes are
put back, and the file cut off where it ended. That must not undo what somebody else has written after the death. While
its writer lives, the journal's time of modification moves on several times a second. A file that is clearly younger, or
was closed properly, has been open for writing since, and one that is older than it was before the change is a copy that
was brought back; then both states are compared (see `lazyproc.hdf5.foreign`).
"""

from __future__ import annotations

import os

import numpy as np

from lazyproc.core.errors import JournalError
from lazyproc.hdf5.durable import write_all
from lazyproc.hdf5.foreign import changes_since
from lazyproc.hdf5.holder import holder
from lazyproc.hdf5.overlay import Patch
from lazyproc.hdf5.superblock import place_of_flags
from lazyproc.hdf5.undo_journal import UndoJournal, drop_undo, kept_fresh, load_undo

_LATEST = 1_000_000_000
"""Nanoseconds: a file so much younger than its journal has been open for writing since."""
_ALIKE = 0.25
"""Share of what a journal holds that a file must have in the same places, to be a copy of the one it is for."""


def _check(path: str, journal: UndoJournal, *, force: bool = False) -> None:
    """Raise JournalError if the journal does not fit the file as it is."""
    file = os.stat(path)
    if file.st_ino != journal.inode and not (force and _is_a_copy(path, journal)):
        raise JournalError(
            f"{path}: the journal {journal.name} was written for another file: one that lay here before, or that was "
            "copied from elsewhere together with its journal. If this file opens and is whole, remove the journal. If "
            f"both were copied together, run 'lazyproc recover --force {path}'."
        )
    try:
        late = file.st_mtime_ns - os.stat(journal.name).st_mtime_ns
        is_older = file.st_mtime_ns < journal.modified
        if force or (late <= _LATEST and not is_older and not _was_closed(path, journal)):
            return
        before = [(offset, b"", piece) for offset, piece in journal.pieces()]
        changes = changes_since(path, before, journal.size, journal.own)
    except FileNotFoundError:  # its writer lives, and has just finished
        return
    if changes:
        raise JournalError(
            f"{path}: the journal {journal.name} tells of a change that was cut off, but the file has been changed by "
            f"somebody else since: {_listed(changes)}. If the file opens and is whole, remove the journal. To put back "
            f"what was there before, and lose what was changed since, run 'lazyproc recover --force {path}'."
        )


def _is_a_copy(path: str, journal: UndoJournal) -> bool:
    """Tell whether the file can be a copy of the one that the journal was written for: most metadata do not change."""
    n_alike = n_bytes = 0
    with open(path, "rb") as file:
        for offset, piece in journal.pieces():
            before = np.frombuffer(piece, np.uint8)
            now = np.frombuffer(os.pread(file.fileno(), len(piece), offset).ljust(len(piece), b"\0"), np.uint8)
            n_alike += int(np.count_nonzero((now == before) & (before != 0)))
            n_bytes += int(np.count_nonzero(before))
    return n_alike >= _ALIKE * n_bytes


def _was_closed(path: str, journal: UndoJournal) -> bool:
    """Tell whether a program has closed the file properly since: HDF5 notes in the superblock that it has it open."""
    begin, superblock = next(journal.pieces(), (0, b""))
    place = place_of_flags(superblock)
    with open(path, "rb") as file:
        now = os.pread(file.fileno(), 1, begin + place)
    return superblock[place : place + 1] == b"\1" and now == b"\0"


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
                place = place_of_flags(piece)
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
