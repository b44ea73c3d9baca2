"""What the blocks of this process really take: its high-water mark, taken back before a block and read after it.

Linux keeps for each process the most memory that it ever had, and takes that back when asked to. So nothing has to be
watched while a block is computed, and nothing is missed: not what native code allocates, and not what lasts a
millisecond. It costs 5 µs before a block and 20 µs after it. Elsewhere, or where the system does not allow it (a
``/proc`` that is read-only), nothing is measured, and the memory model is all there is.

What is counted is anonymous memory: the pages of libraries, of files and of memory shared with others are not.
The mark belongs to the whole process, so whoever reads it beside (`getrusage`'s ``ru_maxrss``) finds that of the last
blocks only.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_STATUS, _CLEAR = "/proc/self/status", "/proc/self/clear_refs"
_RESET = b"5"
"""What takes back the mark, and does nothing else."""
_NAMES = (b"VmHWM:", b"RssAnon:", b"RssFile:", b"RssShmem:")
_LOADING_BYTES, _MODULE_BYTES = 2 * 2**20, 96 * 1024
"""What modules take that are imported meanwhile, at most: all together, and each of them beside. Measured 60-90 KiB
each of SciPy, pandas, Dask and scikit-learn, 120 of Matplotlib, up to 0.5 MiB of a single one."""


@dataclass(eq=False)
class Taken:
    """What a block under way is found to take.

    Attributes
    ----------
    n_positions : int
        Of the block.
    peak : int
        Bytes at most, so far: of the process over what it had at first, shared with blocks beside; 0 if not known.
    whole : int
        The same, not shared.
    """

    n_positions: int
    peak: int = 0
    whole: int = 0


class Kept:
    """What this process has come to keep since this was made, beside the modules that it has imported meanwhile.

    Modules are not counted, as by `max_mem_mb`, but no more is taken for them than modules usually take: a table that a
    module makes and keeps is memory like any other.
    """

    def __init__(self) -> None:
        give_back()
        self.first = self.base = read()[1]
        self._n_first = self._n_modules = len(sys.modules)

    def base_now(self) -> int:
        """Return bytes to count from: what there was at first, and what modules may have taken since."""
        n_new = len(sys.modules) - self._n_modules
        return self.base if n_new == 0 else max(self.base, self.first + self._for_modules())

    def move(self) -> None:
        """Count from what modules have really taken, if any were imported: while nothing else goes on."""
        if len(sys.modules) != self._n_modules:
            give_back()
            self.base = min(read()[1], self.first + self._for_modules())
            self._n_modules = len(sys.modules)

    def _for_modules(self) -> int:
        n_new = len(sys.modules) - self._n_first
        return _LOADING_BYTES + n_new * _MODULE_BYTES if n_new > 0 else 0

    @property
    def unsure(self) -> int:
        """Bytes that may be kept beside, since small modules do not take what is taken for them."""
        return min(self._for_modules(), 2 * _LOADING_BYTES)

    def now(self) -> int:
        """Return bytes kept."""
        give_back()
        return max(0, read()[1] - self.base_now())


class HighWater:
    """The high-water mark of this process, shared out to the blocks under way. Safe in threads.

    Notes
    -----
    The mark is read whenever a block begins or ends, so what it says is always of a known set of blocks; each gets a
    part of it by its positions, and in the end the largest of its parts. It is over what the process had before the
    first block, and what modules have taken that were imported since: see `Kept`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[Taken] = []
        self._kept: Kept | None = None
        self._works: bool | None = None  # not asked yet: asking takes back a mark that is others' until then

    def forget(self) -> None:
        """Count from what the process has now: another run begins."""
        with self._lock, self._while_it_works():
            if not self._blocks and self._does_work():
                self._kept = Kept()

    def kept(self) -> int:
        """Return bytes that the process keeps by now over what it had at first, rather more; 0 if not known.

        Between blocks.
        """
        with self._lock, self._while_it_works():
            if self._does_work() and self._kept is not None:
                return self._kept.now() + self._kept.unsure
        return 0

    @contextmanager
    def watch(self, n_positions: int) -> Iterator[Taken]:
        """Find out what is taken in this context, by a block of so many positions."""
        taken = Taken(max(1, n_positions))
        with self._lock:
            works = self._does_work()
        if not works:
            yield taken
            return
        with self._lock, self._while_it_works():
            if self._blocks:
                self._share_out()
            elif self._kept is None:
                self._kept = Kept()
            else:
                self._kept.move()
            self._blocks.append(taken)
            reset()
        try:
            yield taken
        finally:
            with self._lock, self._while_it_works():
                if taken in self._blocks:
                    self._share_out()
                    self._blocks.remove(taken)
                if self._blocks:
                    reset()

    def _does_work(self) -> bool:
        if self._works is None:
            self._works = can_measure()
        return self._works

    @contextmanager
    def _while_it_works(self) -> Iterator[None]:
        """Measure no more if the system does not let it be done any longer: a process may give up its rights."""
        try:
            yield
        except OSError:
            self._works = False
            for block in self._blocks:
                block.peak = block.whole = 0
            self._blocks.clear()

    def _share_out(self) -> None:
        """Give each block its part of what was taken since the last reset."""
        assert self._kept is not None
        taken = max(0, read()[0] - self._kept.base_now())
        whole = sum(block.n_positions for block in self._blocks)
        for block in self._blocks:
            block.peak = max(block.peak, taken * block.n_positions // whole)
            block.whole = max(block.whole, taken)


def can_measure() -> bool:
    """Tell whether the system keeps a high-water mark, and lets it be taken back."""
    try:
        reset()
        return read()[0] > 0
    except (OSError, ValueError):
        return False


def reset() -> None:
    """Take back the mark to what the process has now."""
    with open(_CLEAR, "wb", 0) as file:
        file.write(_RESET)


def read() -> tuple[int, int]:
    """Return bytes of memory of its own that the process had at most since the last reset, and that it has now."""
    with open(_STATUS, "rb", 0) as file:
        text = file.read(4096)
    mark, own, files, shared = (_value(text, name) for name in _NAMES)
    return max(own, mark - files - shared), own


def _value(text: bytes, name: bytes) -> int:
    begin = text.index(name) + len(name)
    return 1024 * int(text[begin : text.index(b"kB", begin)])


def give_back() -> None:
    """Let the allocator give back what it keeps of earlier work, so that later work is not found to take nothing."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
        if trim is not None:
            trim(0)


@contextmanager
def peak_of() -> Iterator[list[int]]:
    """Find the bytes that the process takes in this context over those it had; the list stays empty if not known.

    Not known is it also if modules were imported on the way. For one thread with nothing beside it.
    """
    found: list[int] = []
    if not can_measure():
        yield found
        return
    give_back()
    modules, before = len(sys.modules), read()[1]
    reset()
    yield found
    if modules == len(sys.modules):
        found.append(max(0, read()[0] - before))


high_water = HighWater()
"""That of this process: there is only one mark."""
