"""Journals beside an HDF5 file, as files: a line with a checksum, then the content. One that is cut off is none."""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from lazyproc.core.errors import JournalError
from lazyproc.hdf5.sidecar import open_sidecar

JOURNAL_HEAD = 9
"""Bytes of the checksum, in hexadecimal digits, and a line feed."""

_CHECKSUM = re.compile(rb"[0-9a-f]{8}\n")
_PIECE = 4 * 2**20


@contextmanager
def opened_journal(journal: str) -> Iterator[BinaryIO | None]:
    """Open a journal for reading; None if there is none.

    Raises
    ------
    JournalError
        If something else than a file has its name, or it may not be read.
    """
    try:
        descriptor = open_sidecar(journal, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise _unreadable(journal, error) from error
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _unreadable(journal, IsADirectoryError(errno.EISDIR, "it is a folder"))
    with os.fdopen(descriptor, "rb") as file:
        yield file


def is_complete(file: BinaryIO) -> bool:
    """Tell whether a journal is as it was written, by its checksum."""
    checksum, now = file.read(JOURNAL_HEAD), 0
    if not _CHECKSUM.fullmatch(checksum):
        return False
    while piece := file.read(_PIECE):
        now = zlib.crc32(piece, now)
    return checksum == b"%08x\n" % now


def read_journal_file(journal: str) -> bytes | None:
    """Return the content of a complete journal; None without one. Raises as `opened_journal`."""
    with opened_journal(journal) as file:
        if file is None or not is_complete(file):
            return None
        file.seek(JOURNAL_HEAD)
        return file.read()


@contextmanager
def understood(journal: str) -> Iterator[None]:
    """Turn what goes wrong with the content of a complete journal into an error that names it.

    Raises
    ------
    JournalError
        If the content is not what this version writes.
    """
    try:
        yield
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise JournalError(
            f"{journal}: is complete, but nothing that this version of lazyproc has written ({error}). Recover with "
            "the version that wrote it, or remove the journal if the file beside it opens and is whole."
        ) from error


def _unreadable(journal: str, error: OSError) -> JournalError:
    return JournalError(
        f"{journal}: cannot be read ({error.strerror or error}); expected a journal, or nothing, of this name. Look "
        "what it is, and remove it if the file beside it opens and is whole."
    )
