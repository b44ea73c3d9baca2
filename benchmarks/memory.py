"""Memory measured, projected and allowed, in that order, for each workload, limit and engine.

    python benchmarks/memory.py                                                 everything, about ten minutes
    python benchmarks/memory.py --workloads filter native --limits 64 --engines processes

Each run is a fresh process. Measured is the highest private memory (USS) of the driver and its workers together, looked
at every 10 ms, above bare interpreters with the same imports. Projected is the highest that the run has said: when it
began, and whenever it found that positions take more than the probe had shown. In the end the same again as a short
table: "measured ≤ projected" for each limit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import h5py
from hungry import HUNGRY, USUAL, make_file
from private_memory import Sampler

LIMITS = (64, 128, 256, 512, 1024, 4096)
ENGINES = ("serial", "both", "threads", "processes")
_PROBED = 8
"""So many of the first blocks may be those of the probe."""
_HUNGRY = str(Path(__file__).with_name("hungry.py"))


def path_of(folder: str, name: str) -> str:
    """Make the workload's file, if no other one of the same shape is there."""
    workload = HUNGRY[name]
    path = os.path.join(folder, f"{workload.n_positions}x{workload.n_spectral}-{workload.compression}.h5")
    make_file(path, workload)
    return path


def without_results(path: str) -> None:
    """Take away what earlier runs left; the room in the file is used again."""
    with h5py.File(path, "r+") as file:
        for group in [key for key in file if "-" in key]:
            del file[group]


def main() -> None:
    """Run and print the table, row by row."""
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
            for engine in options.engines:
                bare = Sampler([_HUNGRY, name, path, f"baseline-{engine}", "0"]).baseline()
                for limit in options.limits:
                    without_results(path)
                    highest, answer = Sampler([_HUNGRY, name, path, engine, str(limit)]).peak()
                    measured, projected = (highest - bare) / 2**20, answer["projected"] / 2**20
                    rows.append(_row(name, engine, measured, projected, limit, answer))
                    print(f"| {' | '.join(rows[-1])} |", flush=True)
            os.unlink(path)
    print("", *short(rows), sep="\n")


def _row(name: str, engine: str, measured: float, projected: float, limit: int, answer: dict) -> list[str]:
    sizes = answer["sizes"][_PROBED:] or [0]
    verdict = "ok" if measured <= projected <= limit else "**over**" if measured > limit else "over projected"
    if measured <= projected and projected > max(2 * measured, measured + 16):
        verdict += ", idle"
    if answer["error"]:
        verdict += f" ({answer['error']})"
    early, late = max(sizes[: len(sizes) // 8 + 1]), sizes[len(sizes) // 2]
    return [name, engine, f"{measured:.0f}", f"{projected:.0f}", str(limit), f"{early}, {late}", verdict]


def short(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table with a row for each workload and engine, and a column for each limit."""
    limits = sorted({row[4] for row in rows}, key=int)
    lines = [f"| workload | engine | {' | '.join(limits)} | |", "|---" * (len(limits) + 3) + "|"]
    for which in dict.fromkeys((row[0], row[1]) for row in rows):
        mine = {row[4]: row for row in rows if (row[0], row[1]) == which}
        cells = [f"{mine[limit][2]} ≤ {mine[limit][3]}" if limit in mine else "" for limit in limits]
        bad = {f"{row[6]} at {limit}" for limit, row in mine.items() if not row[6].startswith("ok")}
        lines.append(f"| {' | '.join([*which, *cells, ', '.join(sorted(bad)) or 'ok'])} |")
    return lines


if __name__ == "__main__":
    main()
