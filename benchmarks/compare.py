"""Compare lazyproc with its peers: in turn, each in a fresh process, start-up and commits included.

    python benchmarks/compare.py                                   the two workloads of the README
    python benchmarks/compare.py --workloads fit tiny --contenders limit lazyproc joblib dask pyusid --runs 5

Prints medians and the ratio to the limit (two hand-written processes: pread, kernel, pwrite). Absolute times depend on
the machine and mean little; ratios of runs that took turns are what to look at.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from contenders import CONTENDERS
from workloads import WORKLOADS, make_file

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class Run:
    """One run of one contender: wall seconds, and CPU seconds of its whole process tree."""

    wall: float
    cpu: float


def measure(contender: str, workload: str, path: str) -> Run:
    """Run a contender in a fresh process on a fresh copy of the file's metadata."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    command = [sys.executable, os.path.join(HERE, "contenders.py"), contender, workload, path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu)


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["mean", "fft"])
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=["limit", "lazyproc", "joblib"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "lazyproc-benchmarks"))
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    for workload in options.workloads:
        original = make_file(options.folder, workload)
        runs: dict[str, list[Run]] = {name: [] for name in options.contenders}
        for turn in range(options.runs + 1):
            for name in options.contenders:
                path = original + ".copy"
                shutil.copy(original, path)
                os.sync()
                run = measure(name, workload, path)
                os.unlink(path)
                if turn:  # the first turn warms the page cache and compiled files
                    runs[name].append(run)
        print_table(workload, runs)


def print_table(workload: str, runs: dict[str, list[Run]]) -> None:
    """Print medians of one workload, and ratios to its first contender."""
    first = statistics.median(run.wall for run in next(iter(runs.values())))
    print(f"\n{workload}: {WORKLOADS[workload].n_positions} positions of {WORKLOADS[workload].n_spectral}")
    print(f"{'contender':<12}{'wall s':>9}{'min':>9}{'max':>9}{'cpu s':>9}{'ratio':>8}")
    for name, measured in runs.items():
        walls = [run.wall for run in measured]
        wall, cpu = statistics.median(walls), statistics.median(run.cpu for run in measured)
        print(f"{name:<12}{wall:9.2f}{min(walls):9.2f}{max(walls):9.2f}{cpu:9.2f}{wall / first:8.2f}")


if __name__ == "__main__":
    main()
