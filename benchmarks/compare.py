"""Compare lazyproc with its peers: in turn, each in a fresh process, start-up and commits included.

    python benchmarks/compare.py                                   the workloads of the documentation
    python benchmarks/compare.py --workloads fit tiny --contenders limit lazyproc joblib dask pyusid --runs 5
    python benchmarks/compare.py --save results.json; python benchmarks/plot.py results.json comparison.png

Prints medians and the ratio to the limit (two hand-written processes: pread, kernel, pwrite), CPU seconds of the whole
process tree, and the peak of its private memory above that of bare interpreters, sampled in a run of its own. Absolute
times depend on the machine and mean little; ratios of runs that took turns are what to look at.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import psutil
from contenders import CONTENDERS, PREPARE
from workloads import WORKLOADS, make_file

HERE = os.path.dirname(os.path.abspath(__file__))
USUAL_WORKLOADS = ["mean", "mean-block", "fft", "fit", "gzip", "narrow-1", "tiny", "resume"]
USUAL_CONTENDERS = ["limit", "lazyproc", "joblib", "dask"]
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes
    ----------
    wall, cpu : float
        Seconds; CPU seconds of the whole process tree.
    tasks : int or None
        As the contender itself tells.
    """

    wall: float
    cpu: float
    tasks: int | None


def command(contender: str, workload: str, path: str, *more: str) -> list[str]:
    """Return the command of one run."""
    return [sys.executable, os.path.join(HERE, "contenders.py"), contender, workload, path, *more]


def measure(contender: str, workload: str, path: str) -> Run:
    """Run a contender in a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command(contender, workload, path), check=False, capture_output=True, text=True)
    wall = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{contender} on {workload} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Run(wall, cpu, told[-1].get("tasks") if told else None)


def measure_memory(contender: str, workload: str, path: str) -> float:
    """Return the peak private memory (USS) of the process tree above bare interpreters, in MiB."""
    bare = bare_interpreter()
    with subprocess.Popen(
        command(contender, workload, path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        root, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                family = [root, *root.children(recursive=True)]
                peak = max(peak, sum(max(0, _private(one) - bare) for one in family))
            except psutil.Error:
                pass
            time.sleep(_SAMPLE_SECONDS)
    return peak / 2**20


def bare_interpreter() -> int:
    """Return the private memory of a Python that has done nothing, in bytes."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        time.sleep(0.3)
        size = _private(psutil.Process(process.pid))
        process.communicate(b"\n")
    return size


def _private(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0


def compile_code() -> None:
    """Compile what is imported from a checkout, as pip has done with all that it has installed."""
    package = importlib.util.find_spec("lazyproc")
    for folder in (HERE, *(package.submodule_search_locations or () if package is not None else ())):
        compileall.compile_dir(folder, quiet=1)


def fresh_copy(original: str, contender: str, workload: str) -> str:
    """Copy the workload's file, and do the share of the work that shall be done before the clock starts."""
    path = original + ".copy"
    shutil.copy(original, path)
    if WORKLOADS[workload].done and contender in PREPARE:
        subprocess.run(command(contender, workload, path, "--prepare"), check=True, capture_output=True)
    os.sync()
    return path


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=USUAL_WORKLOADS)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=USUAL_CONTENDERS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave out the run that measures memory")
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "lazyproc-benchmarks"))
    parser.add_argument("--save", help="write all measurements to this JSON file")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    compile_code()
    saved: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for workload in options.workloads:
        original = make_file(options.folder, workload)
        contenders = [name for name in options.contenders if name != "sidpy" or workload.startswith("fit")]
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        memory: dict[str, float] = {}
        for turn in range(options.runs + 1):
            for name in contenders:
                path = fresh_copy(original, name, workload)
                run = measure(name, workload, path)
                if turn:  # the first turn warms the page cache and compiled files
                    runs[name].append(run)
                elif not options.no_memory:
                    memory[name] = measure_memory(name, workload, fresh_copy(original, name, workload))
                os.unlink(path)
        saved[workload] = summary(runs, memory)
        print_table(workload, saved[workload])
        if options.save:
            with open(options.save, "w", encoding="utf-8") as file:
                json.dump(saved, file, indent=1)


def summary(runs: dict[str, list[Run]], memory: dict[str, float]) -> dict[str, dict[str, float | int | None]]:
    """Return the medians of one workload."""
    medians = {name: statistics.median(run.wall for run in measured) for name, measured in runs.items()}
    first = next(iter(medians.values()))
    return {
        name: {
            "wall": medians[name],
            "least": min(run.wall for run in measured),
            "most": max(run.wall for run in measured),
            "cpu": statistics.median(run.cpu for run in measured),
            "ratio": medians[name] / first,
            "memory": memory.get(name),
            "tasks": measured[-1].tasks,
        }
        for name, measured in runs.items()
    }


def print_table(workload: str, rows: dict[str, dict[str, float | int | None]]) -> None:
    """Print medians of one workload, and ratios to its first contender."""
    about = WORKLOADS[workload]
    print(f"\n{workload}: {about.about}; {about.n_positions:,} x {about.n_spectral} float32, {about.gibibytes:.2f} GiB")
    print(f"{'contender':<12}{'wall s':>9}{'min':>9}{'max':>9}{'cpu s':>9}{'ratio':>8}{'MiB':>8}{'tasks':>9}")
    for name, row in rows.items():
        memory = "" if row["memory"] is None else f"{row['memory']:.0f}"
        tasks = "" if row["tasks"] is None else str(row["tasks"])
        print(
            f"{name:<12}{row['wall']:9.2f}{row['least']:9.2f}{row['most']:9.2f}{row['cpu']:9.2f}{row['ratio']:8.2f}"
            f"{memory:>8}{tasks:>9}",
            flush=True,
        )


if __name__ == "__main__":
    main()
