"""The shim of shim.c from Python: build it, set its control block, read what it recorded."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATH_MAX = 4096
BEFORE, HALF, AFTER = 0, 1, 2
MOMENTS = {BEFORE: "before", HALF: "half-way through", AFTER: "after"}
CALLER, DRIVER, EVERYBODY = 0, 1, 2
ALL, DRIVERS, WORKERS = 0, 1, 2
WRITE, TRUNCATE, SYNC, DATASYNC, CREATE, RENAME, LINK, UNLINK, NOTE = range(1, 10)
KINDS = {
    WRITE: "write",
    TRUNCATE: "truncate",
    SYNC: "fsync",
    DATASYNC: "fdatasync",
    CREATE: "create",
    RENAME: "rename",
    LINK: "link",
    UNLINK: "unlink",
    NOTE: "note",
}


def compiler() -> str | None:
    """Return the C compiler, or None."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def build(folder: Path) -> Path:
    """Compile the shim into a folder and return the library."""
    library = folder / "deaths.so"
    command = compiler()
    assert command is not None
    source = Path(__file__).with_name("shim.c")
    options = ["-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run([command, *options], check=True)
    return library


class Block(ctypes.Structure):
    """`struct control` of shim.c."""

    _fields_ = [
        ("armed", ctypes.c_int32),
        ("moment", ctypes.c_int32),
        ("victim", ctypes.c_int32),
        ("counted", ctypes.c_int32),
        ("driver", ctypes.c_int32),
        ("record", ctypes.c_int32),
        ("skip_syncs", ctypes.c_int32),
        ("lock", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("at", ctypes.c_int64),
        ("died_kind", ctypes.c_int64),
        ("syncs", ctypes.c_int64),
        ("sync_seconds", ctypes.c_double),
        ("folder", ctypes.c_char * PATH_MAX),
        ("record_path", ctypes.c_char * PATH_MAX),
        ("died_path", ctypes.c_char * PATH_MAX),
    ]


class EventHead(ctypes.Structure):
    """`struct event` of shim.c."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("pid", ctypes.c_int32),
        ("inode", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("path_size", ctypes.c_int32),
        ("other_size", ctypes.c_int32),
        ("time", ctypes.c_double),
    ]


class Control:
    """The control block in its file, shared with every process that has the shim.

    Parameters
    ----------
    path : Path
        The file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "a+b") as file:
            file.truncate(ctypes.sizeof(Block))
            self._map = mmap.mmap(file.fileno(), ctypes.sizeof(Block))
        self.block = Block.from_buffer(self._map)

    def arm(
        self,
        folder: str,
        *,
        at: int = 0,
        moment: int = BEFORE,
        victim: int = CALLER,
        counted: int = ALL,
        record: str = "",
        skip_syncs: bool = False,
    ) -> None:
        """Start counting in `folder`, with this process as the driver; with `at` somebody dies at that call."""
        block = self.block
        block.armed = 0
        block.moment, block.victim, block.counted, block.driver = moment, victim, counted, os.getpid()
        block.record, block.skip_syncs, block.lock, block.count, block.at = bool(record), skip_syncs, 0, 0, at
        block.died_kind, block.died_path, block.syncs, block.sync_seconds = 0, b"", 0, 0.0
        block.folder, block.record_path = os.path.realpath(folder).encode(), record.encode()
        block.armed = 1

    def disarm(self) -> None:
        """Stop counting."""
        self.block.armed = 0

    @property
    def count(self) -> int:
        """Calls so far."""
        return int(self.block.count)


@dataclass(frozen=True)
class Event:
    """A recorded call, or a note of the driver.

    Attributes
    ----------
    kind : int
        One of `KINDS`.
    pid : int
        Who called.
    inode : int
        Of the file; of the name's file for calls on names.
    path, other : str
        The file or folder; the second name of rename and link. For a note: its text.
    offset : int
        Where a write went; the size for a truncation.
    data : bytes
        What was written.
    count : int
        The number of the call; for a note, that of the call before. -1 if it was not to be counted.
    time : float
        Seconds of the monotonic clock.
    """

    kind: int
    pid: int
    inode: int
    path: str
    other: str
    offset: int
    data: bytes
    count: int
    time: float

    def __str__(self) -> str:
        where = os.path.basename(self.path) if self.kind != NOTE else self.path
        size = f" {len(self.data)} bytes at {self.offset}" if self.kind == WRITE else ""
        return f"{KINDS[self.kind]}{size} {where}"


def read_record(path: str | Path) -> Iterator[Event]:
    """Read what was recorded, in the order of the calls."""
    content = Path(path).read_bytes()
    place = 0

    def take(size: int) -> bytes:
        nonlocal place
        place += size
        return content[place - size : place]

    while place < len(content):
        head = EventHead.from_buffer_copy(take(ctypes.sizeof(EventHead)))
        path_, other = take(head.path_size).decode(), take(head.other_size).decode()
        yield Event(head.kind, head.pid, head.inode, path_, other, head.offset, take(head.size), head.count, head.time)
