"""Compare lazyproc with its peers: in turn, each in a fresh process, start-up and commits included.

    python benchmarks/compare.py                                   all workloads but the longest
    python benchmarks/compare.py --workloads fit tiny --contenders limit lazyproc joblib dask pyusid --runs 5
    python benchmarks/compare.py --save results.json; python benchmarks/plot.py results.json comparison.png

Prints medians and the ratio to the limit (two hand-written processes: pread, kernel, pwrite), or to the first contender
if the limit is not among them; CPU seconds of the whole process tree; the peak of its private memory above that of bare
interpreters, sampled in a run of its own; and tasks and bytes of graphs, counted in the first turn, which is not timed.
Below stand the parallel efficiency, where lazyproc or the limit ran on one core, too, and how many times as fast as
h5py lazyproc was.
Absolute times depend on the machine and mean little; ratios of runs that took turns are what to look at.
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
from typing import Any

import psutil
from contenders import CONTENDERS, RESUMES
from workloads import WORKLOADS, make_file

HERE = os.path.dirname(os.path.abspath(__file__))
USUAL_WORKLOADS = [name for name in WORKLOADS if name != "fit-long"]
USUAL_CONTENDERS = ["limit", "lazyproc", "joblib", "dask"]
_SAMPLE_SECONDS = 0.02

Rows = dict[str, dict[str, Any]]
"""What was measured of each contender on one workload."""


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes
    ----------
    wall, cpu : float
        Seconds; CPU seconds of the whole process tree.
    tasks, graph_bytes : int or None
        What was counted, where that was wanted and there is any.
    """

    wall: float
    cpu: float
    tasks: int | None = None
    graph_bytes: int | None = None


def command(contender: str, workload: str, path: str, *more: str) -> list[str]:
    """Return the command of one run."""
    return [sys.executable, os.path.join(HERE, "contenders.py"), contender, workload, path, *more]


def usual_contenders(workload: str) -> list[str]:
    """Return who is compared if nobody says: for fits also one core, for filtered sources also h5py alone."""
    alone = ["lazyproc-1"] if workload.startswith("fit") else []
    return [*USUAL_CONTENDERS, *alone, *(["h5py"] if WORKLOADS[workload].compression else [])]


def measure(contender: str, workload: str, path: str, *more: str) -> Run:
    """Run a contender in a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command(contender, workload, path, *more), check=False, capture_output=True, text=True)
    wall = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{contender} on {workload} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Run(wall, cpu, **(told[-1] if told else {}))


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
    """Copy the workload's file, in which the share of the work is done that shall be before the clock starts."""
    if WORKLOADS[workload].done and contender in RESUMES:
        original = prepared(original, contender, workload)
    path = shutil.copy(original, original + ".copy")
    os.sync()
    return path


def prepared(original: str, contender: str, workload: str) -> str:
    """Return a file in which a contender has done that share; made once, since pyUSID takes long for it."""
    path = f"{original}.{workload}-{contender}"
    if not os.path.exists(path):
        part = shutil.copy(original, path + ".part")
        subprocess.run(command(contender, workload, part, "--prepare"), check=True, capture_output=True)
        os.replace(part, path)
    return path


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=USUAL_WORKLOADS)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), help="default: depends on the workload")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave out the run that measures memory")
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "lazyproc-benchmarks"))
    parser.add_argument("--save", help="write all measurements to this JSON file")
    options = parser.parse_args()
    os.makedirs(options.folder, exist_ok=True)
    compile_code()
    saved: dict[str, Rows] = {}
    for workload in options.workloads:
        original = make_file(options.folder, workload)
        wanted = options.contenders or usual_contenders(workload)
        contenders = [name for name in wanted if name != "sidpy" or workload.startswith("fit")]
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        memory: dict[str, float] = {}
        for turn in range(options.runs + 1):
            for name in contenders:
                path = fresh_copy(original, name, workload)
                # The first turn warms the page cache and compiled files.
                runs[name].append(measure(name, workload, path, *(() if turn else ("--count",))))
                if not turn and not options.no_memory:
                    memory[name] = measure_memory(name, workload, fresh_copy(original, name, workload))
                os.unlink(path)
        saved[workload] = summary(runs, memory)
        print_table(workload, saved[workload])
        if options.save:
            with open(options.save, "w", encoding="utf-8") as file:
                json.dump(saved, file, indent=1)


def summary(runs: dict[str, list[Run]], memory: dict[str, float]) -> Rows:
    """Return the medians of one workload, without the first run of each, which was counted."""
    medians = {name: statistics.median(run.wall for run in measured[1:]) for name, measured in runs.items()}
    reference = "limit" if "limit" in medians else next(iter(medians))
    rows: Rows = {
        name: {
            "wall": medians[name],
            "least": min(run.wall for run in measured[1:]),
            "most": max(run.wall for run in measured[1:]),
            "cpu": statistics.median(run.cpu for run in measured[1:]),
            "ratio": medians[name] / medians[reference],
            "ratio_to": reference,
            "memory": memory.get(name),
            "tasks": measured[0].tasks,
            "graph_bytes": measured[0].graph_bytes,
        }
        for name, measured in runs.items()
    }
    for name in ("limit", "lazyproc"):
        if {name, f"{name}-1"} <= rows.keys():
            rows[name]["efficiency"] = medians[f"{name}-1"] / (2 * medians[name])
    if {"lazyproc", "h5py"} <= rows.keys():
        rows["lazyproc"]["over_h5py"] = medians["h5py"] / medians["lazyproc"]
    return rows


def print_table(workload: str, rows: Rows) -> None:
    """Print medians of one workload, ratios and counts."""
    about = WORKLOADS[workload]
    print(f"\n{workload}: {about.about}; {about.n_positions:,} x {about.n_spectral} float32, {about.gibibytes:.2f} GiB")
    ratio = f"/ {next(iter(rows.values()))['ratio_to']}"
    print(
        f"{'contender':<12}{'wall s':>9}{'min':>9}{'max':>9}{'cpu s':>9}{ratio:>12}{'MiB':>8}{'tasks':>9}"
        f"{'graph bytes':>13}"
    )
    for name, row in rows.items():
        memory = "" if row["memory"] is None else f"{row['memory']:.0f}"
        counts = ("" if row[what] is None else str(row[what]) for what in ("tasks", "graph_bytes"))
        print(
            f"{name:<12}{row['wall']:9.2f}{row['least']:9.2f}{row['most']:9.2f}{row['cpu']:9.2f}{row['ratio']:12.2f}"
            f"{memory:>8}{next(counts):>9}{next(counts):>13}",
            flush=True,
        )
    ours = rows.get("lazyproc", {})
    for name, row in rows.items():
        if "efficiency" in row:
            print(f"parallel efficiency of {name}, T1 / (2 T2): {row['efficiency']:.3f}", flush=True)
    if "over_h5py" in ours:
        print(f"lazyproc is {ours['over_h5py']:.2f} times as fast as h5py alone", flush=True)


if __name__ == "__main__":
    main()
