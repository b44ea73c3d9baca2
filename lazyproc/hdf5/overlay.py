"""A file whose changes stay in memory, until somebody asks what they are.

What is written beyond the file's old end, where nothing points to yet, may go to the disk at once when it becomes much:
pages are *spilled* there. Whoever drops the overlay then cuts the file off where it ended.
"""

from __future__ import annotations

import io
import itertools
import os

import numpy as np

from lazyproc.hdf5.durable import write_all
from lazyproc.hdf5.heap import DamagedHeapError, is_endless_heap
from lazyproc.hdf5.room import writing

_PAGE = 4096
MOST_KEPT = 8 * 2**20
"""Bytes beyond the old end of the file that are kept in memory, where they may be spilled."""
_AT_ONCE = 256
"""Pages that are written together."""
Patch = tuple[int, bytes, bytes]
"""Where in the file, what stood there, what shall stand there."""


class Overlay(io.RawIOBase):
    """A file whose changes stay in memory.

    Parameters
    ----------
    descriptor : int
        The file, open for reading.
    path : str
        Its name, which h5py then tells as the file name.
    owns : bool
        Whether `close` closes the descriptor, too.
    spills : bool
        Whether pages beyond the old end may be written to the file, which is open for writing then.

    Notes
    -----
    Only pages that are written are held; a file may grow by any number of bytes at no cost.
    """

    def __init__(self, descriptor: int, path: str, *, owns: bool = False, spills: bool = False) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._path = path
        self._owns = owns
        self.old_size = os.fstat(descriptor).st_size
        self.size = self.old_size
        self._shown = self.old_size  # where the overlay was cut off, the file's old bytes never show again
        self._pages: dict[int, bytearray] = {}
        self._first_new = -(-self.old_size // _PAGE)  # the first page that is all beyond the old end
        self._most_kept = MOST_KEPT // _PAGE if spills else None
        self._n_new = 0
        self._spilled = bytearray()  # for each page from there on: whether the disk has it
        self.failure: BaseException | None = None  # why that could not be written
        self.has_spilled = False  # whether the file is to be cut off again if the changes are dropped
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
        size = self._place if size is None else size
        if size < self.size:
            self._shown = min(self._shown, size)
            self._take_back(size)
            for page in [page for page in self._pages if (page + 1) * _PAGE > size]:
                kept = max(0, size - page * _PAGE)
                self._pages[page][kept:] = bytes(_PAGE - kept)
        self.size = size
        return size

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
        if is_endless_heap(view[:count]):
            raise DamagedHeapError(f"{self._path}: the heap of texts at byte {self._place} is damaged")
        self._place += count
        return count

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        """Keep what is written."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            page, within = divmod(self._place + done, _PAGE)
            n_pages = (len(view) - done) // _PAGE
            if self.has_spilled and not within and n_pages and page >= self._first_new:
                part = n_pages * _PAGE
                self._put(page, view[done : done + part])
            else:
                part = min(_PAGE - within, len(view) - done)
                self._keep(page, within, view[done : done + part])
            done += part
        if self._most_kept is not None and self._n_new > self._most_kept:
            self._spill()
        self._place += len(view)
        if done:
            self.size = max(self.size, self._place)
        return done

    def _keep(self, page: int, within: int, part: memoryview) -> None:
        if page not in self._pages:
            if page * _PAGE >= self._shown and not self._is_spilled(page) and bytes(part).count(0) == len(part):
                return  # beyond the old end the file will be zero anyway: a large status mask costs nothing
            self._pages[page] = bytearray(self._page(page))
            self._n_new += page >= self._first_new
        self._pages[page][within : within + len(part)] = part

    def _page(self, page: int) -> bytes | bytearray:
        kept = self._pages.get(page)
        if kept is not None:
            return kept
        end = (page + 1) * _PAGE if self._is_spilled(page) else self._shown
        return self._on_disk(page * _PAGE, end).ljust(_PAGE, b"\0")

    def _on_disk(self, offset: int, end: int) -> bytes:
        return os.pread(self._descriptor, max(0, min(_PAGE, end - offset)), offset)

    # -- pages beyond the old end that are on the disk already

    def _is_spilled(self, page: int) -> bool:
        number = page - self._first_new
        return 0 <= number < len(self._spilled) and bool(self._spilled[number])

    def _spill(self) -> None:
        """Write all pages beyond the old end to the file, and keep them no longer."""
        new = sorted(page for page in self._pages if page >= self._first_new)
        for _, run in itertools.groupby(enumerate(new), lambda pair: pair[1] - pair[0]):
            pages = [page for _, page in run]
            for first in range(0, len(pages), _AT_ONCE):
                some = pages[first : first + _AT_ONCE]
                self._put(some[0], b"".join(self._pages[page] for page in some))

    def _put(self, page: int, data: bytes | memoryview) -> None:
        """Write whole pages to the file."""
        n_pages, number = len(data) // _PAGE, page - self._first_new
        self.has_spilled = True
        try:
            with writing(self._path, "what is added to it", len(data)):
                write_all(self._descriptor, data, page * _PAGE)
        except BaseException as error:  # on its way through HDF5 it may become another one
            self.failure = self.failure or error
            raise
        for one in range(page, page + n_pages) if self._n_new else ():
            self._n_new -= self._pages.pop(one, None) is not None
        self._spilled.extend(bytes(max(0, number + n_pages - len(self._spilled))))
        self._spilled[number : number + n_pages] = b"\1" * n_pages

    def _take_back(self, size: int) -> None:
        """Let nothing of the file show from `size` on that was spilled there."""
        number = max(0, size // _PAGE - self._first_new)
        if number < len(self._spilled):
            page = self._first_new + number
            if self._is_spilled(page) and page not in self._pages and size % _PAGE:
                self._pages[page] = bytearray(self._page(page))
                self._n_new += 1
            del self._spilled[number:]
            os.ftruncate(self._descriptor, max(self.old_size, page * _PAGE))

    def changes(self) -> tuple[list[Patch], list[tuple[int, memoryview]]]:
        """Return what changed inside the old file, and what was written beyond its end: as it is kept, not a copy."""
        patches: list[Patch] = []
        added: list[tuple[int, memoryview]] = []
        cut_off = range(self._shown // _PAGE, -(-min(self.size, self.old_size) // _PAGE))
        for page in sorted({*self._pages, *cut_off}):
            offset = page * _PAGE
            kept = memoryview(self._page(page))[: max(0, self.size - offset)]
            before = self._on_disk(offset, self.old_size)
            patches += _difference(offset, before[: len(kept)], kept[: len(before)])
            if len(kept) > len(before):
                added.append((offset + len(before), kept[len(before) :]))
        return patches, added

    def __repr__(self) -> str:
        return self._path


def _difference(offset: int, before: bytes, after: memoryview) -> list[Patch]:
    """Return the patch from the first to the last byte that differs; none if there is none."""
    differs = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    if differs.size == 0:
        return []
    part = slice(int(differs[0]), int(differs[-1]) + 1)
    return [(offset + part.start, before[part], bytes(after[part]))]
