"""Memory measured, projected and allowed, in that order, for each workload, limit and engine.

    python benchmarks/memory.py                                                 everything, about ten minutes
    python benchmarks/memory.py --workloads filter native --limits 64 --engines processes

Each run is a fresh process. Measured is the most memory that the driver and its workers together have written to, for
themselves, looked at every 10 ms, each above a bare interpreter with the same imports. Projected is the highest that
the run has said: when it began, and whenever it found that positions take more than the probe had shown. In the end the
same again as a short table: "measured ≤ projected" for each limit, with what is not right about it, and how many runs
were how. Threads are only for functions that take blocks, "both" (this process and others) only for those that take a
position. The exit code is 1 if more was measured than projected, more projected than allowed, or a run has failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import h5py
from hungry import HUNGRY, USUAL, make_file
from private_memory import Sampler

LIMITS = (64, 128, 256, 512, 1024, 4096)
ENGINES = ("serial", "both", "threads", "processes")
_PROBED = 8
"""So many of the first blocks may be those of the probe."""
OK, IDLE = "ok", "over 2x"
OVER, OVER_PROJECTED, TOO_MUCH = "**over**", "over projected", "projected over allowed"
_HUNGRY = str(Path(__file__).with_name("hungry.py"))


def path_of(folder: str, name: str) -> str:
    """Make the workload's file, if no other one of the same shape is there."""
    workload = HUNGRY[name]
    path = os.path.join(folder, f"{workload.n_positions}x{workload.n_spectral}-{workload.compression}.h5")
    make_file(path, workload)
    return path


def prepare(name: str, path: str) -> None:
    """Take away what earlier runs left, the room in the file is used again; make results that are half done."""
    without_results(path)
    if HUNGRY[name].is_half_done:
        subprocess.run([sys.executable, _HUNGRY, name, path, "half-done", "0"], check=True)


def without_results(path: str) -> None:
    """Take away all results."""
    with h5py.File(path, "r+") as file:
        for group in [key for key in file if "-" in key]:
            del file[group]


def main() -> int:
    """Run and print the table, row by row; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(HUNGRY), default=USUAL)
    parser.add_argument("--limits", nargs="+", type=int, default=LIMITS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    options = parser.parse_args()
    rows = []
    print("| workload | engine | measured | projected | allowed | blocks of | |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="lazyproc-memory-") as folder:
        for name in options.workloads:
            path = path_of(folder, name)
            for engine in (one for one in options.engines if is_offered(name, one)):
                bare = Sampler([_HUNGRY, name, path, f"baseline-{engine}", "0"]).baseline()
                for limit in options.limits:
                    prepare(name, path)
                    taken, answer = Sampler([_HUNGRY, name, path, engine, str(limit)]).peak(bare)
                    measured, projected = taken / 2**20, answer["projected"] / 2**20
                    rows.append(_row(name, engine, measured, projected, limit, answer))
                    print(f"| {' | '.join(rows[-1])} |", flush=True)
            os.unlink(path)
    print("", *short(rows), "", counted(rows), sep="\n")
    return int(any(is_broken(row) for row in rows))


def is_offered(name: str, engine: str) -> bool:
    """Tell whether a run ever takes that engine for such a function: see `lazyproc.engine.choose.choose_local`."""
    return engine != ("both" if HUNGRY[name].vectorized else "threads")


def _row(name: str, engine: str, measured: float, projected: float, limit: int, answer: dict) -> list[str]:
    sizes = answer["sizes"][_PROBED:] or [0]
    verdict = verdict_of(measured, projected, limit)
    if answer["error"]:
        verdict += f" ({answer['error']})"
    early, late = max(sizes[: len(sizes) // 8 + 1]), sizes[len(sizes) // 2]
    return [name, engine, f"{measured:.0f}", f"{projected:.0f}", str(limit), f"{early}, {late}", verdict]


def verdict_of(measured: float, projected: float, limit: float) -> str:
    """Return how the three, in MiB, lie to each other."""
    if measured > limit:
        return OVER
    if measured > projected:
        return OVER_PROJECTED
    if projected > limit:
        return TOO_MUCH
    return IDLE if projected > max(2 * measured, measured + 16) else OK


def is_broken(row: list[str]) -> bool:
    """Tell whether the promise did not hold in this run, or it has failed. More than needed may be projected."""
    return row[6] not in (OK, IDLE)


def counted(rows: list[list[str]]) -> str:
    """Return in words how many runs were how."""
    kinds = Counter("failed" if "(" in row[6] else row[6].strip("*") for row in rows)
    return f"{len(rows)} runs: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}"


def short(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table with a row for each workload and engine, and a column for each limit."""
    limits = sorted({row[4] for row in rows}, key=int)
    lines = [f"| workload | engine | {' | '.join(limits)} | |", "|---" * (len(limits) + 3) + "|"]
    for which in dict.fromkeys((row[0], row[1]) for row in rows):
        mine = {row[4]: row for row in rows if (row[0], row[1]) == which}
        cells = [_cell(mine[limit]) if limit in mine else "" for limit in limits]
        bad = [f"{row[6]} at {limit}" for limit, row in mine.items() if is_broken(row)]
        lines.append(f"| {' | '.join([*which, *cells, ', '.join(bad) or OK])} |")
    return lines


def _cell(row: list[str]) -> str:
    measured, projected = float(row[2]), float(row[3])
    text = f"{row[2]} {'≤' if measured <= projected else '>'} {row[3]}"
    return f"{text} ({IDLE})" if row[6] == IDLE else text


if __name__ == "__main__":
    sys.exit(main())
