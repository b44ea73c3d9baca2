"""Calls of a function on positions that are tried: what they took and gave, and which positions are left."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.apply import Arrays
from lazyproc.core.failed import FailedPosition, FailedRows
from lazyproc.core.highwater import Kept, peak_of
from lazyproc.core.no_result import NoResult
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs

_NOISE_BYTES = 2**20
"""So much of what the system tells is no measurement: it counts pages in lots, and tracing takes memory, too."""

_NOTHING = nullcontext()

Compute = Callable[..., Arrays]
Read = Callable[[Runs], NDArray[Any]]


class _Tracer:
    """A context in which what Python's allocators give out is traced; then `peak` holds the most bytes."""

    peak = 0

    def __enter__(self) -> None:
        tracemalloc.start()
        self._base = tracemalloc.get_traced_memory()[0]

    def __exit__(self, *exception: object) -> None:
        self.peak = tracemalloc.get_traced_memory()[1] - self._base
        tracemalloc.stop()


class Trials:
    """The positions still unused, and the results so far."""

    def __init__(self, compute: Compute, read: Read, remaining: Runs, result_bytes: int, *, record: bool) -> None:
        self._compute = compute
        self._read = read
        self._record = record
        self._result_bytes = result_bytes
        self.taken: list[tuple[int, int]] = []
        self.left = remaining
        self._computed: list[tuple[Runs, Arrays]] = []
        self._failed: list[FailedPosition] = []
        self._first: NoResult | None = None
        self.seconds: list[float] = []
        self.slowest = 0.0

    @property
    def all_failed(self) -> bool:
        """Whether the function failed wherever it was tried so far."""
        return self.measured(0.0).all_failed

    def measured(
        self, seconds: float, temporary: float = 0.0, fixed: int = 0, gain: float = 1.0, kept: int = 0
    ) -> Probe:
        """Return what was measured, with all that was computed on the way."""
        return Probe(seconds, temporary, fixed, gain, self._computed, self._failed, self._first, kept_bytes=kept)

    def kept_since(self, before: Kept | None) -> int:
        """Return bytes that the calls have left, beside the results, which are let go of when they are written.

        More rather than less, since each process will keep as much; 0 if a call has failed: its data are kept with what
        it raised.
        """
        if before is None or self._first is not None:
            return 0
        results = sum(array.nbytes for _, arrays in self._computed for array in arrays)
        kept = before.now() - results
        return kept + before.unsure if kept > _NOISE_BYTES else 0

    def traced(self, runs: Runs) -> int:
        """Compute these positions, and return the most bytes that Python's allocators had given out beside the rows."""
        tracer = _Tracer()
        self.call(runs, tracer)
        return tracer.peak

    def call(self, positions: NDArray[np.int64] | Runs, watch: AbstractContextManager[Any] = _NOTHING) -> float:
        """Compute these positions and return the seconds a position that it took.

        0.0 if there are none left, or the function failed for all: how long that takes says nothing about the others.
        """
        runs = positions if isinstance(positions, Runs) else Runs.from_positions(positions)
        runs = runs.intersection(self.left)
        if not runs:
            return 0.0
        rows = self._read(runs)
        with peak_of() as taken, watch:
            begin = time.perf_counter()
            results, failed = self._try(rows, runs)
            seconds = (time.perf_counter() - begin) / len(rows)
        if not taken and not self.taken:
            taken.append(0)  # so that the first call is the first one here, too
        self.taken += [(len(rows), max(0, peak - len(rows) * self._result_bytes - _NOISE_BYTES)) for peak in taken]
        self._keep(runs, results, failed)
        self.slowest = max(self.slowest, seconds)
        if len(failed.rows) == len(rows):
            return 0.0
        self.seconds.append(seconds)
        return seconds

    def reading_seconds(self, chunk_rows: int) -> float:
        """Return seconds that reading a position takes: of the most that were read at once, read once more.

        The first time may have to wait for the disk, and for memory that the process did not have yet; how long that
        takes depends neither on the function nor on the number of workers.
        """
        runs = max((runs for runs, _ in self._computed), key=lambda runs: runs.n_positions)
        begin = time.perf_counter()
        self._read(runs)
        seconds = time.perf_counter() - begin
        return seconds / (math.ceil(runs.n_positions / chunk_rows) * chunk_rows)

    def most_taken(self) -> float:
        """Return bytes a position beside source and results, as the system saw them: the most of all calls so far."""
        return max((taken / n_rows for n_rows, taken in self.taken), default=0.0)

    def _try(self, rows: NDArray[Any], runs: Runs) -> tuple[Arrays, FailedRows]:
        failed = FailedRows(self._read, runs)
        try:
            return self._compute(rows, failed) if self._record else self._compute(rows), failed
        except NoResult as error:
            error.runs = runs
            raise

    def _keep(self, runs: Runs, results: Arrays, failed: FailedRows) -> None:
        self._computed.append((runs, results))
        self.left = self.left.difference(runs)
        if failed.first is not None:
            failed.first.runs = runs
            self._failed += failed.positions()
            self._first = self._first or failed.first

    def call_in_threads(self, n_rows: int) -> float | None:
        """Compute twice `n_rows` positions in two threads at once and return the seconds; None if too few are left."""
        if self.left.n_positions < 2 * n_rows:
            return None
        both = self.left.take(2 * n_rows)
        one = both.take(n_rows)
        halves = [one, both.difference(one)]
        blocks = [self._read(half) for half in halves]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(abs, range(2)))  # threads started before the clock
            begin = time.perf_counter()
            results = list(pool.map(self._try, blocks, halves))
            seconds = time.perf_counter() - begin
        for half, (arrays, failed) in zip(halves, results, strict=True):
            self._keep(half, arrays, failed)
        return seconds
