"""Bytes and names that are to outlive a power cut."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of the bytes at a place, in as many calls as it takes."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def sync_data(descriptor: int) -> None:
    """Make the bytes of an open file durable, and what is needed to find them.

    macOS has no `fdatasync`, and its `fsync` leaves the bytes in the disk's own memory; the manual page of fcntl there
    has F_FULLFSYNC for that. Not every file system has it.
    """
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
        return
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_file(path: str) -> None:
    """Make the bytes of a file durable."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: str) -> None:
    """Make the names in the folder of `path` durable."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
