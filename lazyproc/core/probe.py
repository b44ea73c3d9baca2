"""Try a function on a few positions first: its time, its memory, and whether threads help. The results are kept."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.apply import Arrays
from lazyproc.core.failed import FailedPosition, FailedRows
from lazyproc.core.highwater import Kept, can_measure, peak_of
from lazyproc.core.runs import Runs

_ENOUGH_SECONDS = 0.01
"""A measurement that lasted so long is believed."""
_LONG_SECONDS = 0.05
"""Positions that take so long are measured in two or three calls: hundreds of workers may be waiting."""
_SLOW_SECONDS = 2.0
"""A function this slow is not called for measurements alone."""
_WATCHED_SECONDS, _WATCHED_ROWS = 0.5, 64
_PLAIN_BYTES = 2**18
"""Temporaries of so many bytes are those of the positions, and not what Python takes for each call: some KiB."""
_SMALL_PART = 0.1
"""Temporaries that are so small a part of a position's source and results need not be known better."""
_ALIKE = 2.0
"""Two positions that differ less in time need no third one to tell how long they take."""
_SPREAD_ROWS = 8
"""So many positions are taken from all over the dataset: more could each need a storage chunk of their own."""
_THREAD_TRIALS = 3
_CLEAR_GAIN = 1.7
"""Two threads that are so much faster than one need no further trial."""
_MOST_ROWS = 4096
_MOST_BYTES = 8 * 2**20
_TRIED_BEFORE_GIVING_UP = 10
"""So many spread-out positions are tried before a function that fails for all of them is called broken."""
_GIVE_UP_SECONDS = 20
"""A function that takes so long to fail is tried on fewer."""
_NOISE_BYTES = 2**20
"""So much of what the system tells is no measurement: it counts pages in lots, and tracing takes memory, too."""

_UNKNOWN_SECONDS = 1.0

_NOTHING = nullcontext()

Compute = Callable[..., Arrays]
Read = Callable[[Runs], NDArray[Any]]


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes
    ----------
    seconds_per_position : float
        Of the function alone, on one core.
    temporary_bytes : float
        Temporaries a position, beside source and results; for a function that takes blocks. What Python's allocators
        told or, if that is more, what the process was seen to take.
    fixed_bytes : int
        Temporaries of one call; for a function that takes one position.
    kept_bytes : int
        What the function has left in its process, beside results and the modules it has imported: a table, a cache.
    thread_gain : float
        How many times faster two threads are than one; 1.0 where that was not tried.
    reading_seconds : float
        Of reading a position together with its neighbours, storage chunk by storage chunk, without what the disk takes;
        0.0 where that was not asked for.
    computed : list of (Runs, tuple of ndarray)
        The positions computed on the way, with their results: they need not be computed again.
    failed : list of FailedPosition
        Those among them whose function failed.
    first : Exception or None
        What the first of these raised; its attribute `runs` holds the positions that were tried.
    is_measured : bool
        Whether anything was; else the seconds are a careful guess.
    """

    seconds_per_position: float
    temporary_bytes: float = 0.0
    fixed_bytes: int = 0
    thread_gain: float = 1.0
    computed: list[tuple[Runs, Arrays]] = field(default_factory=list, repr=False)
    failed: list[FailedPosition] = field(default_factory=list, repr=False)
    first: Exception | None = field(default=None, repr=False)
    is_measured: bool = True
    kept_bytes: int = 0
    reading_seconds: float = 0.0

    @classmethod
    def unknown(cls) -> Probe:
        """Return a careful guess, where nothing could be measured: positions take long, so blocks are small."""
        return cls(_UNKNOWN_SECONDS, is_measured=False)

    def stored(self) -> dict[str, float]:
        """Return what is kept with the results, so that a resumed run need not measure: nothing if nothing was."""
        if not self.is_measured:
            return {}
        # Those of the second kind are not known to older versions, which then measure anew.
        more = {"kept_bytes": self.kept_bytes, "reading_seconds": self.reading_seconds}
        return {
            "seconds_per_position": self.seconds_per_position,
            "temporary_bytes": self.temporary_bytes,
            "fixed_bytes": self.fixed_bytes,
            "thread_gain": self.thread_gain,
            **{name: value for name, value in more.items() if value},
        }

    @property
    def all_failed(self) -> bool:
        """Whether the function failed wherever it was tried."""
        return len(self.failed) == sum(runs.n_positions for runs, _ in self.computed) > 0


def run_probe(
    compute: Compute,
    read: Read,
    remaining: Runs,
    *,
    source_bytes: int,
    result_bytes: int,
    vectorized: bool,
    try_threads: bool,
    timed_chunk_rows: int = 0,
    record: bool = False,
    early: Callable[[float], None] | None = None,
) -> Probe:
    """Measure a function on a few of the remaining positions.

    Parameters
    ----------
    compute : callable
        Rows `(n_positions, n_spectral)` to the checked results of these positions; with `record` its second argument
        is the `FailedRows` that collects rows whose function fails.
    read : callable
        Runs of positions to their rows.
    remaining : Runs
        What has to be computed; not empty.
    source_bytes, result_bytes : int
        Bytes of one position of the source and of all results.
    vectorized : bool
        Whether the function takes many positions at once.
    try_threads : bool
        Whether to find out if two threads are faster than one.
    timed_chunk_rows : int
        Where reading is to be timed, too: positions of a storage chunk, which is read as a whole; else 0.
    record : bool
        Go on where the function fails, and keep that. If it fails for the first ten positions tried (fewer of a slow
        function), which are spread over all that remain, nothing is measured: see `Probe.all_failed`.
    early : callable, optional
        Is told about how many seconds a position takes: once the first calls are back, though 0.0 if that is still
        little more than a guess, and when it is measured.

    Raises
    ------
    RowError, OutputMismatch
        From `compute`; the attribute `runs` of the exception holds the positions that were tried.
    """
    before = Kept() if can_measure() else None
    probing = _Probing(compute, read, remaining, result_bytes, record=record)
    row_bytes = source_bytes + result_bytes
    most_rows = max(1, min(_MOST_ROWS, _MOST_BYTES // max(1, row_bytes)))
    # The first, the last and the middle position differ most: a function that fails on some is found early. Large ones
    # are tried one at a time, since nothing is known yet of the memory that the function takes.
    together = vectorized and most_rows >= 3
    first = probing.call(remaining.spread(3 if together else 1))
    if not together and first < _LONG_SECONDS:
        for position in remaining.spread(3):
            first = probing.call(np.array([position])) or first
    if probing.all_failed:
        first = _look_further(probing, remaining, first)
        if probing.all_failed:
            return probing.measured(probing.slowest)
    if early is not None:
        early(first if first > _LONG_SECONDS else 0.0)
    # The first call tells little of memory, since it may load and keep a lot, but enough to be careful with the next.
    most_rows = _frugal(most_rows, row_bytes + probing.most_taken())
    temporary, fixed = _measure_memory(probing, first, most_rows, source_bytes, result_bytes, vectorized=vectorized)
    most_rows = _frugal(most_rows, row_bytes + temporary)
    seconds, rows = _measure_time(probing, first, most_rows, row_bytes + temporary)
    if early is not None:
        early(seconds)
    temporary, fixed = _seen_by_the_system(probing, temporary, fixed, vectorized=vectorized)
    kept = probing.kept_since(before)
    gain = 1.0
    if try_threads and vectorized and seconds * remaining.n_positions > 20 * _ENOUGH_SECONDS:
        most_rows = _frugal(most_rows, 2 * (row_bytes + temporary))  # two at once
        gain = _measure_threads(probing, seconds, min(most_rows, max(rows, int(3 * _ENOUGH_SECONDS / seconds))))
    measured = probing.measured(seconds, temporary, fixed, gain, kept)
    return replace(measured, reading_seconds=probing.reading_seconds(timed_chunk_rows) if timed_chunk_rows else 0.0)


class _Tracer:
    """A context in which what Python's allocators give out is traced; then `peak` holds the most bytes."""

    peak = 0

    def __enter__(self) -> None:
        tracemalloc.start()
        self._base = tracemalloc.get_traced_memory()[0]

    def __exit__(self, *exception: object) -> None:
        self.peak = tracemalloc.get_traced_memory()[1] - self._base
        tracemalloc.stop()


class _Probing:
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
        self._first: Exception | None = None
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

        0 if a call has failed: its data are kept with what it raised.
        """
        if before is None or self._first is not None:
            return 0
        results = sum(array.nbytes for _, arrays in self._computed for array in arrays)
        kept = before.now() - results
        return kept if kept > _NOISE_BYTES else 0

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
        except Exception as error:
            error.runs = runs  # type: ignore[attr-defined]
            raise

    def _keep(self, runs: Runs, results: Arrays, failed: FailedRows) -> None:
        self._computed.append((runs, results))
        self.left = self.left.difference(runs)
        if failed.first is not None:
            failed.first.runs = runs  # type: ignore[attr-defined]
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


def _look_further(probing: _Probing, remaining: Runs, first: float) -> float:
    """Try more positions, one at a time, of a function that has failed so far; return the seconds that one took."""
    begin = time.perf_counter()
    for number, position in enumerate(remaining.spread(_TRIED_BEFORE_GIVING_UP)):
        if not probing.all_failed or (number >= 3 and time.perf_counter() - begin > _GIVE_UP_SECONDS):
            break
        first = probing.call(np.array([position])) or first
    return first


def _measure_memory(
    probing: _Probing, first: float, most_rows: int, source_bytes: int, result_bytes: int, *, vectorized: bool
) -> tuple[float, int]:
    """Return temporaries a position, and of a call; zero where the function is too slow to be watched.

    What a block function takes whatever its block is part of what is measured. So more positions at once are tried as
    long as it may be most of that, and that is much beside source and results.
    """
    if first > _SLOW_SECONDS or tracemalloc.is_tracing() or not probing.left:
        return 0.0, 0
    # The last position, and not the one beside the first: it may be the second and last that is tried.
    last = Runs.from_positions(probing.left.spread(2)[-1:])
    if not vectorized:
        return 0.0, max(0, probing.traced(last) - result_bytes)  # the results kept are reckoned elsewhere
    row_bytes, temporary, n_tried = source_bytes + result_bytes, 0.0, 0
    n_rows = min(most_rows, _WATCHED_ROWS)
    while True:
        n_rows = min(_frugal(n_rows, row_bytes + temporary), int(_WATCHED_SECONDS / first) if first else n_rows)
        runs = probing.left.take(n_rows) if n_rows > 1 else last
        if runs.n_positions <= n_tried:
            return temporary, 0
        peak = max(0, probing.traced(runs) - runs.n_positions * result_bytes)
        temporary, n_tried = peak / runs.n_positions, runs.n_positions
        if temporary < row_bytes * _SMALL_PART or peak > _PLAIN_BYTES:
            return temporary, 0
        n_rows = min(most_rows, 8 * n_tried)


def _frugal(rows: int, row_bytes: float) -> int:
    """Return how many positions may be tried at once, if one takes so much: the limit on memory holds here, too."""
    return max(1, min(rows, int(_MOST_BYTES / max(1.0, row_bytes))))


def _seen_by_the_system(probing: _Probing, temporary: float, fixed: int, *, vectorized: bool) -> tuple[float, int]:
    """Return the larger of what Python's allocators told, and what the process took: native code has its own.

    Of block functions only the call with most positions counts, since what does not depend on them is least there; of
    others all calls. Never the first one: what it has loaded, or made once for all, stays.
    """
    calls = probing.taken[1:]
    if not calls:
        return temporary, fixed
    if vectorized:
        n_rows, taken = max(calls)
        return max(temporary, taken / n_rows), fixed
    return temporary, max(fixed, *(taken for _, taken in calls))


def _measure_time(probing: _Probing, first: float, most_rows: int, row_bytes: float) -> tuple[float, int]:
    """Return seconds a position, and of how many positions: more and more until it can be believed.

    Each call shows what a larger one will take: `row_bytes` a position are known of.
    """
    if first > _LONG_SECONDS:
        return _mean_of_long(probing), 1
    seconds, rows = first, 1
    for n_rows in _growing(most_rows):
        left = probing.left
        n_rows = _frugal(n_rows, row_bytes + max((taken / n for n, taken in probing.taken[1:]), default=0.0))
        if left.n_positions < n_rows or n_rows < rows:
            break
        runs = Runs.from_positions(left.spread(n_rows)) if n_rows <= _SPREAD_ROWS else left.take(n_rows)
        seconds, rows = probing.call(runs), n_rows
        if seconds * rows > _ENOUGH_SECONDS:
            break
    return seconds, rows


def _mean_of_long(probing: _Probing) -> float:
    """Return seconds a position, for positions that take long: the mean of two calls, or of three that differ."""
    first, *others = probing.seconds
    if others and not 1 / _ALIKE < others[0] / first < _ALIKE and probing.left:
        middle = probing.left.spread(3)
        others.append(probing.call(middle[len(middle) // 2 :][:1]))
    if others and first > _ALIKE * max(others):
        return sum(others) / len(others)  # the first call has loaded or compiled something
    return (first + sum(others)) / (1 + len(others))


def _growing(most: int) -> Iterator[int]:
    n_rows = 1
    while n_rows < most:
        yield n_rows
        n_rows = min(most, n_rows * 8)
    yield most


def _measure_threads(probing: _Probing, seconds: float, rows: int) -> float:
    """Return the best of a few trials: what a busy machine takes away says nothing about the function."""
    best = 1.0
    for _ in range(_THREAD_TRIALS):
        together = probing.call_in_threads(rows)
        if together is None or together <= 0:
            break
        best = max(best, 2 * seconds * rows / together)
        if best > _CLEAR_GAIN:
            break
    return best
