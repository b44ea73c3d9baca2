"""Try a function on a few positions first: its time, its memory, and whether threads help. The results are kept."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from lazyproc.core.highwater import Kept, can_measure
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.core.trials import Compute, Read, Trials

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
    trials = Trials(compute, read, remaining, result_bytes, record=record)
    row_bytes = source_bytes + result_bytes
    most_rows = max(1, min(_MOST_ROWS, _MOST_BYTES // max(1, row_bytes)))
    # The first, the last and the middle position differ most: a function that fails on some is found early. Large ones
    # are tried one at a time, since nothing is known yet of the memory that the function takes.
    together = vectorized and most_rows >= 3
    first = trials.call(remaining.spread(3 if together else 1))
    if not together and first < _LONG_SECONDS:
        for position in remaining.spread(3):
            first = trials.call(np.array([position])) or first
    if trials.all_failed:
        first = _look_further(trials, remaining, first)
        if trials.all_failed:
            return trials.measured(trials.slowest)
    if early is not None:
        early(first if first > _LONG_SECONDS else 0.0)
    # The first call tells little of memory, since it may load and keep a lot, but enough to be careful with the next.
    most_rows = _frugal(most_rows, row_bytes + trials.most_taken())
    temporary, fixed = _measure_memory(trials, first, most_rows, source_bytes, result_bytes, vectorized=vectorized)
    most_rows = _frugal(most_rows, row_bytes + temporary)
    seconds, rows = _measure_time(trials, first, most_rows, row_bytes + temporary)
    if early is not None:
        early(seconds)
    temporary, fixed = _seen_by_the_system(trials, temporary, fixed, vectorized=vectorized)
    kept = trials.kept_since(before)
    gain = 1.0
    if try_threads and vectorized and seconds * remaining.n_positions > 20 * _ENOUGH_SECONDS:
        most_rows = _frugal(most_rows, 2 * (row_bytes + temporary))  # two at once
        gain = _measure_threads(trials, seconds, min(most_rows, max(rows, int(3 * _ENOUGH_SECONDS / seconds))))
    measured = trials.measured(seconds, temporary, fixed, gain, kept)
    return replace(measured, reading_seconds=trials.reading_seconds(timed_chunk_rows) if timed_chunk_rows else 0.0)


def _look_further(trials: Trials, remaining: Runs, first: float) -> float:
    """Try more positions, one at a time, of a function that has failed so far; return the seconds that one took."""
    begin = time.perf_counter()
    for number, position in enumerate(remaining.spread(_TRIED_BEFORE_GIVING_UP)):
        if not trials.all_failed or (number >= 3 and time.perf_counter() - begin > _GIVE_UP_SECONDS):
            break
        first = trials.call(np.array([position])) or first
    return first


def _measure_memory(
    trials: Trials, first: float, most_rows: int, source_bytes: int, result_bytes: int, *, vectorized: bool
) -> tuple[float, int]:
    """Return temporaries a position, and of a call; zero where the function is too slow to be watched.

    What a block function takes whatever its block is part of what is measured. So more positions at once are tried as
    long as it may be most of that, and that is much beside source and results.
    """
    if first > _SLOW_SECONDS or tracemalloc.is_tracing() or not trials.left:
        return 0.0, 0
    # The last position, and not the one beside the first: it may be the second and last that is tried.
    last = Runs.from_positions(trials.left.spread(2)[-1:])
    if not vectorized:
        return 0.0, max(0, trials.traced(last) - result_bytes)  # the results kept are reckoned elsewhere
    row_bytes, temporary, n_tried = source_bytes + result_bytes, 0.0, 0
    n_rows = min(most_rows, _WATCHED_ROWS)
    while True:
        n_rows = min(_frugal(n_rows, row_bytes + temporary), int(_WATCHED_SECONDS / first) if first else n_rows)
        runs = trials.left.take(n_rows) if n_rows > 1 else last
        if runs.n_positions <= n_tried:
            return temporary, 0
        peak = max(0, trials.traced(runs) - runs.n_positions * result_bytes)
        temporary, n_tried = peak / runs.n_positions, runs.n_positions
        if temporary < row_bytes * _SMALL_PART or peak > _PLAIN_BYTES:
            return temporary, 0
        n_rows = min(most_rows, 8 * n_tried)


def _frugal(rows: int, row_bytes: float) -> int:
    """Return how many positions may be tried at once, if one takes so much: the limit on memory holds here, too."""
    return max(1, min(rows, int(_MOST_BYTES / max(1.0, row_bytes))))


def _seen_by_the_system(trials: Trials, temporary: float, fixed: int, *, vectorized: bool) -> tuple[float, int]:
    """Return the larger of what Python's allocators told, and what the process took: native code has its own.

    Of block functions only the call with most positions counts, since what does not depend on them is least there; of
    others all calls. Never the first one: what it has loaded, or made once for all, stays.
    """
    calls = trials.taken[1:]
    if not calls:
        return temporary, fixed
    if vectorized:
        n_rows, taken = max(calls)
        return max(temporary, taken / n_rows), fixed
    return temporary, max(fixed, *(taken for _, taken in calls))


def _measure_time(trials: Trials, first: float, most_rows: int, row_bytes: float) -> tuple[float, int]:
    """Return seconds a position, and of how many positions: more and more until it can be believed.

    Each call shows what a larger one will take: `row_bytes` a position are known of.
    """
    if first > _LONG_SECONDS:
        return _mean_of_long(trials), 1
    seconds, rows = first, 1
    for n_rows in _growing(most_rows):
        left = trials.left
        n_rows = _frugal(n_rows, row_bytes + max((taken / n for n, taken in trials.taken[1:]), default=0.0))
        if left.n_positions < n_rows or n_rows < rows:
            break
        runs = Runs.from_positions(left.spread(n_rows)) if n_rows <= _SPREAD_ROWS else left.take(n_rows)
        seconds, rows = trials.call(runs), n_rows
        if seconds * rows > _ENOUGH_SECONDS:
            break
    return seconds, rows


def _mean_of_long(trials: Trials) -> float:
    """Return seconds a position, for positions that take long: the mean of two calls, or of three that differ."""
    first, *others = trials.seconds
    if others and not 1 / _ALIKE < others[0] / first < _ALIKE and trials.left:
        middle = trials.left.spread(3)
        others.append(trials.call(middle[len(middle) // 2 :][:1]))
    if others and first > _ALIKE * max(others):
        return sum(others) / len(others)  # the first call has loaded or compiled something
    return (first + sum(others)) / (1 + len(others))


def _growing(most: int) -> Iterator[int]:
    n_rows = 1
    while n_rows < most:
        yield n_rows
        n_rows = min(most, n_rows * 8)
    yield most


def _measure_threads(trials: Trials, seconds: float, rows: int) -> float:
    """Return the best of a few trials: what a busy machine takes away says nothing about the function."""
    best = 1.0
    for _ in range(_THREAD_TRIALS):
        together = trials.call_in_threads(rows)
        if together is None or together <= 0:
            break
        best = max(best, 2 * seconds * rows / together)
        if best > _CLEAR_GAIN:
            break
    return best
