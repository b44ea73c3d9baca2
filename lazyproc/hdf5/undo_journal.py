"""The file of an undo journal: which bytes are kept, a checksum, and a sign of life of whoever keeps it."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from lazyproc.hdf5.durable import sync_folder, write_all
from lazyproc.hdf5.journal_file import JOURNAL_HEAD, is_complete, opened_journal, understood
from lazyproc.hdf5.raw_bytes import Ranges
from lazyproc.hdf5.room import writing
from lazyproc.hdf5.sidecar import UNDO, open_sidecar, sidecar

_BEAT = 0.1
"""Seconds between two signs of life."""
_PIECE = 4 * 2**20
_UNCOMPRESSED = 2**18
"""Bytes: what is smaller is not worth compressing."""


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
    own : tuple of str
        Paths in the file of what was being changed, as far as results do not tell that themselves.
    modified : int
        When the HDF5 file was modified last before the change, nanoseconds; 0 if that was not noted.
    """

    name: str
    inode: int
    size: int
    ranges: Ranges
    compressed: bool
    place: int
    session: str
    own: tuple[str, ...]
    modified: int

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


def write_undo(
    path: str, descriptor: int, size: int, ranges: Ranges, session: str = "", own: Iterable[str] = ()
) -> None:
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
    own : iterable of str
        Paths in the file of what is changed, or made.
    """
    journal = sidecar(path, UNDO)
    compressed = int((ranges[:, 1] - ranges[:, 0]).sum()) > _UNCOMPRESSED
    status = os.fstat(descriptor)
    about = {
        "inode": status.st_ino,
        "modified": status.st_mtime_ns,
        "own": sorted(own),
        "size": size,
        "ranges": ranges.tolist(),
        "compressed": compressed,
        "session": session,
    }
    pieces = (piece for _, piece in read_ranges(descriptor, ranges))
    out = open_sidecar(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        checksum, place = 0, JOURNAL_HEAD
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
    journal = sidecar(path, UNDO)
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
    journal, over = sidecar(path, UNDO), threading.Event()

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
    journal = sidecar(path, UNDO)
    with opened_journal(journal) as file, understood(journal):
        if file is None or not is_complete(file):
            return None
        file.seek(JOURNAL_HEAD)
        about = json.loads(file.readline())
        place = file.tell()
        ranges = np.array(about["ranges"], np.int64).reshape(-1, 2)
        return UndoJournal(
            journal,
            about["inode"],
            about["size"],
            ranges,
            about["compressed"],
            place,
            about.get("session", ""),
            tuple(about.get("own", ())),
            about.get("modified", 0),
        )
