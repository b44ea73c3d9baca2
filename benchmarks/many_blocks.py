"""How the driver fares with many blocks: time a block and memory, from a thousand blocks to a million.

    python benchmarks/many_blocks.py                               up to 10**5 blocks, 10**8 positions
    python benchmarks/many_blocks.py --blocks 1000 1000000         10**9 positions: some minutes and 3 GB of disk
    python benchmarks/many_blocks.py --scheduler processes         Dask graphs, done by two worker processes
    python benchmarks/many_blocks.py --scheduler cluster           the same on a local Dask cluster of two workers

Each line is a fresh process and a fresh file: positions of one byte, never written, so that the file is nearly all
holes; a function of a block that does nothing; blocks of 1,000 positions, far smaller than the planner would choose,
done one after the other in the driver, or where `--scheduler` says, which no job so short would choose. What is left is
what lazyproc does: plan, read, check, write, collect, commit. Memory is that of the driver, with the scheduler of the
cluster, which is started before, not that of worker processes, whose start counts in the time a block.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAIN = "/Measurement_000/Channel_000/Raw_Data"


def make_file(path: str, n_positions: int) -> None:
    """Write a main dataset of one byte a position, and what belongs to it, as holes."""
    import h5py
    import numpy as np

    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)

    def holes(group: Any, name: str, shape: tuple[int, int], kind: str) -> Any:
        space, dtype = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(kind))
        return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), dtype, space, creation))

    with h5py.File(path, "w") as file:
        group = file.create_group(MAIN.rpartition("/")[0])
        main = holes(group, "Raw_Data", (n_positions, 1), "u1")
        main.attrs["quantity"], main.attrs["units"] = "Counts", "1"
        for kind, label, shape in (("Position", "X", (n_positions, 1)), ("Spectroscopic", "Time", (1, 1))):
            for what in ("Indices", "Values"):
                dataset = holes(group, f"{kind}_{what}", shape, "u4" if what == "Indices" else "f4")
                dataset.attrs["labels"], dataset.attrs["units"] = np.array([label], "S8"), np.array(["1"], "S8")
                main.attrs[f"{kind}_{what}"] = dataset.ref


def nothing(block: Any) -> Any:
    """Return the only column as the result."""
    return block[:, 0]


@contextmanager
def workers(kind: str, cores: int) -> Iterator[dict[str, Any]]:
    """Have blocks done where it is said, whatever lazyproc would choose; return the arguments of the process."""
    import lazyproc
    import lazyproc.run.where
    from lazyproc.engine.choose import Scheduler

    if kind == "cluster":
        with lazyproc.cluster(cores) as client:
            yield {"cores": cores, "client": client}
        return
    n_workers = 1 if kind == "serial" else cores
    lazyproc.run.where.choose_local = lambda kernel, probe, n, most, apart: Scheduler(kind, n_workers)
    yield {"cores": n_workers}


def measure(path: str, rows: int, interval: float, options: dict[str, Any]) -> dict[str, float]:
    """Plan and compute once in this process, and tell what it took."""
    import psutil

    import lazyproc
    from lazyproc.core import sizing

    sizing.positions_per_block = lambda **_: rows
    outputs = {"Same": lazyproc.Output("u1")}
    cls = type("Nothing", (lazyproc.Process,), {"outputs": outputs, "_block_function": staticmethod(nothing)})
    address = f"{path}::{MAIN}"
    cls(address, **options).close()  # all is imported now
    own = psutil.Process()
    base, peak, done = own.memory_full_info().uss, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak.append(own.memory_full_info().uss - base)

    watcher = threading.Thread(target=watch)
    watcher.start()
    times: dict[str, list[float]] = {}  # the first, the last, and how many: the benchmark shall take no memory either

    def note(event: Any) -> None:
        now = time.perf_counter()
        first, _, count = times.get(type(event).__name__, (now, now, 0))
        times[type(event).__name__] = [first, now, count + 1]

    begin = time.perf_counter()
    with cls(address, checkpoint_interval=interval, **options) as process:
        n_blocks = process.plan().n_blocks
        planned = time.perf_counter()
        process._progress = note
        process.compute()
        end = time.perf_counter()
    done.set()
    watcher.join()
    started, last = times["Started"][0], times["BlockDone"][1]
    return {
        "blocks": n_blocks, "plan": planned - begin, "before": started - planned,
        "block": (last - started) / n_blocks, "after": end - last, "commits": times["Committed"][2],
        "peak": max(peak), "cpu": time.process_time() / n_blocks,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--rows", type=int, default=1_000, help="positions a block")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between commits")
    parser.add_argument("--scheduler", choices=["serial", "threads", "processes", "cluster"], default="serial")
    parser.add_argument("--cores", type=int, default=2, help="worker processes or threads, if not serial")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with workers(options.scheduler, options.cores) as how:
            found = measure(options.one, options.rows, options.interval, how)
        print(json.dumps(found))
        return
    print("   blocks      positions    plan s  before s  us a block  after s  commits  memory MiB")
    for n_blocks in options.blocks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = os.path.join(folder, "holes.h5")
            make_file(path, n_blocks * options.rows)
            command = [sys.executable, os.path.abspath(__file__), "--one", path, "--rows", str(options.rows)]
            command += ["--interval", str(options.interval)]
            command += ["--scheduler", options.scheduler, "--cores", str(options.cores)]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(told.splitlines()[-1])  # a cluster says where its dashboard is
        print(
            f"{found['blocks']:9,d} {n_blocks * options.rows:14,d} {found['plan']:9.3f} {found['before']:9.3f} "
            f"{1e6 * found['block']:11.1f} {found['after']:8.2f} {found['commits']:8d} {found['peak'] / 2**20:11.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
