"""The memory model: what a block takes, how many positions fit, and what peak to expect."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lazyproc.core.errors import MemoryLimitError

MEBIBYTE = 2**20
DRIVER_BYTES = 6 * MEBIBYTE
"""What the driver itself takes for its books, runs, receipts, the progress bar: measured 1-5 MiB."""
WORKER_BYTES = 4 * MEBIBYTE
"""What a worker takes beside its block, the unpickled function, buffers of the runtime: measured 1-3 MiB."""
HOOKS_BYTES = 8 * MEBIBYTE
"""What a process of the old contract takes beside a batch and its results, in the driver and workers together."""
FRAGMENTATION = 1.5
"""Memory that the allocator keeps for temporaries, over what is in use at a time: measured 1.3 with NumPy's FFT."""
SURPRISE = 6
"""So many times more than was reckoned a block may take at once without breaking the limit: where the probe has seen
no temporaries at all, they may be five times the source, beside the source itself."""
_MUCH_MORE = 1.5
"""So many times more positions under way at a time are worth a worker less, where storage chunks are decoded anew for
each block."""


def bytes_of(value: Any) -> int:
    """Count the bytes that an argument takes: arrays, texts, and lists and dicts of these; of other objects little.

    Examples
    --------
    >>> bytes_of({"table": np.zeros(1000)}) >= 8000
    True
    """
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    own = sys.getsizeof(value, 0)
    if isinstance(value, Mapping):
        return own + sum(bytes_of(key) + bytes_of(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return own + sum(map(bytes_of, value))
    return own


@dataclass(frozen=True)
class MemoryModel:
    """What a position takes while its block is computed.

    Attributes
    ----------
    source_bytes : int
        Bytes of one position of the source, as the function sees it.
    result_bytes : int
        Bytes of one position of all results.
    multiplier : float
        The user's `mem_multiplier`: bytes a position really takes over its source bytes.
    temporary_bytes : float
        Bytes of temporaries a position, as measured by a probe; for a function that takes whole blocks.
    fixed_bytes : int
        Bytes a worker takes whatever the size of the block: temporaries of a function that takes one position at a
        time, decoded storage chunks, what the function keeps in its process, and arguments as they come and loaded.
    driver_bytes : int
        Bytes the driver keeps for the whole run, over the usual: books of many holes or chunks, and what the function
        keeps in its process.
    chunk_rows : int
        Positions of a storage chunk that is decoded as a whole, however few of them a block has.
    """

    source_bytes: int
    result_bytes: int
    multiplier: float = 1.0
    temporary_bytes: float = 0.0
    fixed_bytes: int = 0
    driver_bytes: int = 0
    chunk_rows: int = 1

    @property
    def driver_peak(self) -> int:
        """Bytes of the driver beside its blocks."""
        return DRIVER_BYTES + self.driver_bytes

    @property
    def bytes_per_position(self) -> int:
        """Bytes a position in the worker that computes it."""
        asked = self.source_bytes * self.multiplier + self.result_bytes
        measured = self.source_bytes + self.result_bytes + FRAGMENTATION * self.temporary_bytes
        return max(1, round(max(asked, measured)))

    def rows(self, limit_bytes: int, n_workers: int, *, driver_writes: bool = False) -> int:
        """Positions a block may have.

        Parameters
        ----------
        limit_bytes : int
            For all workers and the driver together.
        n_workers : int
            Blocks computed at the same time.
        driver_writes : bool
            Results travel to the driver: as many blocks of results again are held on their way.

        Returns
        -------
        int
            Zero if not even one position fits.
        """
        share = (limit_bytes - self.driver_peak) / n_workers - WORKER_BYTES - self.fixed_bytes
        return max(0, int(share // self._per_row(driver_writes)))

    def careful_rows(self, limit_bytes: int, n_workers: int, *, driver_writes: bool = False) -> int:
        """Positions a block should have where nothing else limits it: at least one, and room for surprises.

        A probe sees a few positions; others may take several times as much, and native code more than was seen. What a
        block takes may turn out to be so many times larger, and is still allowed. Larger blocks would not be faster.
        """
        rows = self.rows(limit_bytes, n_workers, driver_writes=driver_writes)
        return max(1, rows // SURPRISE)

    def worker_peak(self, rows: int, *, driver_writes: bool = False) -> int:
        """Bytes to expect at most of one worker, for a block of `rows` positions."""
        return int(WORKER_BYTES + self.fixed_bytes + rows * self._per_row(driver_writes))

    def peak(self, rows: int, n_workers: int, *, driver_writes: bool = False) -> int:
        """Bytes to expect at most, for blocks of `rows` positions."""
        block = rows * self._per_row(driver_writes)
        return int(self.driver_peak + n_workers * (WORKER_BYTES + self.fixed_bytes + block))

    def _per_row(self, driver_writes: bool) -> int:
        return self.bytes_per_position + (3 * self.result_bytes if driver_writes else 0)

    def fit(self, limit_bytes: int, n_workers: int, *, driver_writes: bool = False) -> tuple[int, int]:
        """Find how many workers can run at once, and with how many positions a block.

        Fewer workers are tried before giving up: one large position a time is better than none. So are they where
        blocks of less than a storage chunk, each of which decodes it anew, would become much larger then.

        Returns
        -------
        tuple of int
            Workers, and positions a block at most.

        Raises
        ------
        MemoryLimitError
            If one position in one worker does not fit; the message says what to raise `max_mem_mb` to.
        """
        for workers in range(n_workers, 0, -1):
            rows = self.rows(limit_bytes, workers, driver_writes=driver_writes)
            if workers > 1 and rows < self.chunk_rows:
                fewer = self.rows(limit_bytes, workers - 1, driver_writes=driver_writes)
                if (workers - 1) * fewer > _MUCH_MORE * workers * rows:
                    continue
            if rows:
                return workers, rows
        needed = -(-self.peak(1, 1, driver_writes=driver_writes) // MEBIBYTE)
        raise MemoryLimitError(
            f"max_mem_mb: {limit_bytes // MEBIBYTE} MiB are allowed, but one position takes "
            f"{_show(self._per_row(driver_writes))} (source {_show(self.source_bytes)} with mem_multiplier "
            f"{self.multiplier:g}, results {_show(self.result_bytes)}, and what was measured of temporaries), a worker "
            f"{_show(self.fixed_bytes)} whatever its block (storage chunks, temporaries of one call, what the function "
            f"keeps, arguments), the driver {_show(self.driver_bytes)} for the whole run (what the function keeps "
            "there, arguments, books of many holes or chunks), and lazyproc itself "
            f"{_show(DRIVER_BYTES + WORKER_BYTES)}. Raise max_mem_mb to {needed} or more."
        )


def _show(n_bytes: int) -> str:
    return f"{n_bytes / MEBIBYTE:.1f} MiB" if n_bytes >= MEBIBYTE / 10 or not n_bytes else f"{n_bytes / 1024:.1f} KiB"
