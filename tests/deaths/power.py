"""Power cuts: a record replayed so that what was not synced is lost, kept or torn, in random parts.

The model is meaner than most file systems. Of the calls before the cut, those on a file that no sync of that file
followed, are pending: each sector of 512 bytes of a pending write is on the disk or not, each pending truncation has
happened or not, a file that had grown has its new size with zeros, or not. Names (made, linked, renamed, unlinked) are
pending until their folder is synced, and each of them has happened or not, whatever the others did; a name may come
without the bytes of its file.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from . import shim

SECTOR = 512


@dataclass(eq=False)
class _Content:
    """A file: what is on the disk for sure, and what may be."""

    inode: int
    durable: bytes = b""
    pending: list[shim.Event] = field(default_factory=list)
    now: bytearray = field(default_factory=bytearray)

    def change(self, event: shim.Event) -> None:
        """Let a call change the file as every process sees it."""
        self.pending.append(event)
        if event.kind == shim.WRITE:
            _write(self.now, event.offset, event.data)
        else:
            _resize(self.now, event.offset)

    def sync(self) -> None:
        """Make all of it durable."""
        self.durable, self.pending = bytes(self.now), []

    def after_cut(self, chance: random.Random, keep: float) -> bytes:
        """Return what a power cut may leave."""
        left = bytearray(self.durable)
        for event in self.pending:
            if event.kind == shim.TRUNCATE:
                if chance.random() < keep:
                    _resize(left, event.offset)
                continue
            end = event.offset + len(event.data)
            for start in range(event.offset - event.offset % SECTOR, end, SECTOR):
                if chance.random() < keep:
                    first, last = max(start, event.offset), min(start + SECTOR, end)
                    _write(left, first, event.data[first - event.offset : last - event.offset])
            if end > len(left) and chance.random() < keep:
                _resize(left, end)
        return bytes(left)


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        _resize(content, offset)
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


class Disk:
    """A folder's files, through the calls of a record.

    Parameters
    ----------
    folder : Path
        The folder that was recorded, real.
    files : dict of str to (int, bytes)
        Names, inodes and contents at the beginning, all durable.
    """

    def __init__(self, folder: Path, files: dict[str, tuple[int, bytes]]) -> None:
        self._folder = os.path.realpath(folder)
        self._initial = {name: _Content(inode, content) for name, (inode, content) in files.items()}
        for content in self._initial.values():
            content.now = bytearray(content.durable)
        self._current = {content.inode: content for content in self._initial.values()}
        self._durable: dict[str, _Content] = dict(self._initial)
        self._pending: list[tuple[str | None, str | None, _Content]] = []

    def play(self, event: shim.Event, *, syncs: bool = True) -> None:
        """Let a call happen."""
        name = os.path.relpath(event.path, self._folder)
        if event.kind == shim.NOTE:
            return
        if event.kind in (shim.SYNC, shim.DATASYNC):
            if syncs:
                self._sync(event)
        elif event.kind in (shim.WRITE, shim.TRUNCATE):
            self._current[event.inode].change(event)
        elif event.kind == shim.CREATE:
            self._current[event.inode] = _Content(event.inode)
            self._pending.append((None, name, self._current[event.inode]))
        elif event.kind == shim.UNLINK:
            self._pending.append((name, None, self._current[event.inode]))
        else:
            other = os.path.relpath(event.other, self._folder)
            self._pending.append((name if event.kind == shim.RENAME else None, other, self._current[event.inode]))

    def _sync(self, event: shim.Event) -> None:
        if event.path == self._folder:
            self._durable, self._pending = self._names(lambda: True), []
        elif event.inode in self._current:
            self._current[event.inode].sync()

    def _names(self, happened: object) -> dict[str, _Content]:
        names = dict(self._durable)
        for gone, made, content in self._pending:
            if happened():  # type: ignore[operator]
                if gone is not None:
                    names.pop(gone, None)
                if made is not None:
                    names[made] = content
        return names

    def without_cut(self) -> dict[str, bytes]:
        """Return the files as the processes saw them."""
        return {name: bytes(content.now) for name, content in self._names(lambda: True).items()}

    def after_cut(self, chance: random.Random, keep: float) -> dict[str, tuple[int, bytes]]:
        """Return names, inodes and contents after a power cut; what was pending is kept with the chance `keep`."""
        names = self._names(lambda: chance.random() < keep)
        contents = {content: content.after_cut(chance, keep) for content in dict.fromkeys(names.values())}
        return {name: (content.inode, contents[content]) for name, content in names.items()}


def put_back(folder: Path, files: dict[str, tuple[int, bytes]], keepers: Path) -> None:
    """Write files into a folder, each into its own inode if that still exists: a journal knows its file by it.

    Parameters
    ----------
    folder, files
        What to write, as from `Disk.after_cut`; everything else in the folder is removed.
    keepers : Path
        A folder with further links to inodes, named by their number.
    """
    there = {path.name: path.stat().st_ino for path in folder.iterdir()}
    for name, inode in there.items():
        if name not in files or files[name][0] != inode:
            (folder / name).unlink()
    for name, (inode, content) in files.items():
        path, keeper = folder / name, keepers / str(inode)
        if not path.exists() and keeper.exists():
            os.link(keeper, path)
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.truncate(0)
            file.write(content)


def claimed(events: list[shim.Event], *, each_block: bool) -> int:
    """Return how many positions the driver had said to be committed; with `each_block` a finished block says so."""
    total = 0
    for event in events:
        if event.kind != shim.NOTE:
            continue
        word, _, number = event.path.partition(" ")
        if word == "committed" or (word == "started" and each_block):
            total = int(number)
        elif word == "done" and each_block:
            total += int(number)
    return total
