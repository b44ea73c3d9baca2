"""What lazyproc adds to each call of a function: functions that do nothing, against a bare Python loop over a block.

    python benchmarks/overhead.py                                  20,000 positions of 128 float32, fifteen turns

The bare loop calls the function for each row and puts what it returns into arrays, without checking anything. Blocks
are computed as a worker does it, without reading and writing; `compute_rows` checks names, shapes, dtypes and lost
values, and keeps what the function returns from being changed by its next call. The two take turns; medians.

The second table is one function in the three ways in which it can be written: the steepest step of each position, for a
position, for a block with NumPy, and for a block with numba's guvectorize (if numba is installed).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc import Dimension, Output
from lazyproc.core.apply import compute_rows
from lazyproc.core.specs import ResolvedOutput

Outputs = tuple[ResolvedOutput, ...]


def number(row: NDArray[Any]) -> Any:
    """Return a constant."""
    return 0.0


def value(row: NDArray[Any]) -> Any:
    """Return a NumPy scalar."""
    return row[0]


def pair(row: NDArray[Any]) -> Any:
    """Return a tuple."""
    return row[0], 1


def mapping(row: NDArray[Any]) -> Any:
    """Return a dict."""
    return {"A": row[0], "B": 1}


def four(row: NDArray[Any]) -> Any:
    """Return a small array, as fits do."""
    return row[:4]


def spectrum(row: NDArray[Any]) -> Any:
    """Return an array as large as the position."""
    return row


def first_column(block: NDArray[Any]) -> Any:
    """Return a column of a whole block."""
    return block[:, 0]


def means(block: NDArray[Any]) -> Any:
    """Average each row of a whole block."""
    return block.mean(axis=1)


def steepest(row: NDArray[Any]) -> Any:
    """Find the steepest step of one position."""
    return np.abs(np.diff(row)).max()


def steepest_of_block(block: NDArray[Any]) -> Any:
    """Find it for a block, with NumPy."""
    return np.abs(np.diff(block, axis=1)).max(axis=1)


def steepest_compiled() -> Callable[..., Any] | None:
    """Compile it for a block; None without numba."""
    try:
        from numba import guvectorize
    except ImportError:
        return None

    @guvectorize(["(float32[:], float32[:])"], "(n)->()", nopython=True)
    def steps(row, largest):  # type: ignore[no-untyped-def]
        largest[0] = 0
        for place in range(1, row.size):
            largest[0] = max(largest[0], abs(row[place] - row[place - 1]))

    def find(block: NDArray[Any]) -> Any:
        """Find it for a block, with numba."""
        return steps(block)

    return find


def bare_loop(function: Callable[..., Any], data: NDArray[Any], outputs: Outputs) -> list[NDArray[Any]]:
    """Do what a person would write."""
    results = [np.empty((len(data), output.width), output.dtype) for output in outputs]
    if len(outputs) == 1:
        (only,) = results
        for place, row in enumerate(data):
            only[place] = function(row)
    elif function is mapping:
        for place, row in enumerate(data):
            returned = function(row)
            for result, output in zip(results, outputs, strict=True):
                result[place] = returned[output.name]
    else:
        for place, row in enumerate(data):
            for result, one in zip(results, function(row), strict=True):
                result[place] = one
    return results


def bare_block(function: Callable[..., Any], data: NDArray[Any], outputs: Outputs) -> list[NDArray[Any]]:
    """Call a function of whole blocks, and store what it returns."""
    result = np.empty((len(data), outputs[0].width), outputs[0].dtype)
    result[...] = np.reshape(function(data), result.shape)
    return [result]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=20_000)
    parser.add_argument("--spectral", type=int, default=128)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    data = np.random.default_rng(1).standard_normal((options.positions, options.spectral), dtype=np.float32)
    single = {"A": Output("f4")}
    both = {"A": Output("f4"), "B": Output("i4")}
    parameters = {"A": Output("f4", [Dimension("Parameter", "a.u.", 4)])}
    whole = {"A": Output("f4", shape_from_main=True)}
    cases: list[tuple[Callable[..., Any], dict[str, Output]]] = [
        (number, single), (value, single), (pair, both), (mapping, both), (four, parameters), (spectrum, whole),
        (first_column, single), (means, single),
    ]  # fmt: skip
    print(f"{'the function':<40}{'bare us':>9}{'lazyproc us':>13}{'ratio':>8}")
    for function, declared in cases:
        outputs = tuple(output.resolve(name, options.spectral) for name, output in declared.items())
        vectorized = function in (first_column, means)
        bare = bare_block if vectorized else bare_loop
        took: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.turns):
            begin = time.perf_counter()
            expected = bare(function, data, outputs)
            middle = time.perf_counter()
            results = compute_rows(function, data, outputs, vectorized=vectorized)
            took[0].append(middle - begin)
            took[1].append(time.perf_counter() - middle)
            assert all(map(np.array_equal, expected, results))
        ours, theirs = statistics.median(took[1]), statistics.median(took[0])
        scale = 1e6 / options.positions
        about = (function.__doc__ or "").rstrip(".").lower()
        print(f"{about:<40}{scale * theirs:>9.3f}{scale * ours:>13.3f}{ours / theirs:>8.2f}", flush=True)
    _three_ways(data, options.turns)


def _three_ways(data: NDArray[Any], n_turns: int) -> None:
    outputs = (Output("f4").resolve("Step", data.shape[1]),)
    ways = [way for way in (steepest, steepest_of_block, steepest_compiled()) if way is not None]
    expected = steepest_of_block(data)
    took: dict[str, list[float]] = {}
    for _ in range(n_turns):
        for way in ways:
            begin = time.perf_counter()
            (found,) = compute_rows(way, data, outputs, vectorized=way is not steepest)
            took.setdefault((way.__doc__ or "").rstrip("."), []).append(time.perf_counter() - begin)
            np.testing.assert_allclose(found[:, 0], expected)
    print(f"\n{'the steepest step':<40}{'us a position':>14}")
    for about, seconds in took.items():
        print(f"{about.lower():<40}{1e6 * statistics.median(seconds) / len(data):>14.3f}", flush=True)


if __name__ == "__main__":
    main()
