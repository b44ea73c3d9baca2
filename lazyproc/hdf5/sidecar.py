"""The small files beside an HDF5 file: their names, and how they are opened.

Each is hidden, and named after the HDF5 file and its kind: ``.scan.h5.lazyproc-lock``. The kinds::

    kind        written by                                      goes away
    lock        the driver: who it is, and what it does         when it gives the lock back; after a death, or if its
                                                                function ends processes, when the next one does
    lock-…      the next driver, where files are not locked:    at once
                puts the lock file of a dead one aside
    fence       the driver: which run may write                 as the lock
    claims      the driver of a cluster and its workers, or     when all blocks are done; after a death when the next
                MPI ranks: who has which block                  driver gives the lock back
    handshake   the driver and workers on other machines:       when that is known; after a death when the next driver
                whether they see what each other writes         gives the lock back
    journal     a transaction: what it is about to change       when that is changed; after a death when it is recovered
    undo        a change through an open handle, or opening     when that is done; after a death when it is put back
                a file that HDF5 marks: what stood there
    new         whoever makes the HDF5 file: that file          when it has its name; after a death with the next call
    rows-…      whoever writes results to be compressed         when they are compressed; if nothing refers to it, with
                later: the rows until then                      the next call

A death may leave any of them. Only a journal and an undo journal then tell of a change that waits.
"""

from __future__ import annotations

import os

LOCK = "lock"
FENCE = "fence"
CLAIMS = "claims"
HANDSHAKE = "handshake"
JOURNAL = "journal"
UNDO = "undo"
NEW = "new"
ROWS = "rows-"
"""How these kinds begin: the run, the output, and a checksum follow."""

_TAG = ".lazyproc-"


def sidecar(path: str, kind: str) -> str:
    """Return the name of a file beside `path`: hidden, and named after it."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}{_TAG}{kind}")


def file_beside(name: str) -> str:
    """Return the name of the file that a sidecar file lies beside."""
    folder, hidden = os.path.split(name)
    return os.path.join(folder, hidden.removeprefix(".").rpartition(_TAG)[0])


def has_pending(path: str) -> bool:
    """Tell whether a journal or an undo journal lies beside a file: a change was cut off, or is just being made."""
    return any(os.path.exists(sidecar(path, kind)) for kind in (JOURNAL, UNDO))


def open_sidecar(path: str, flags: int) -> int:
    """Open a file beside an HDF5 file: itself, never what a link in its place leads to, and without waiting.

    Raises
    ------
    OSError
        If there is none, or something else than a file has its name.
    """
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
