"""Repeat a published strong-scaling run on simulated workers: sleeping instead of computing, all else real.

    python benchmarks/strong_scaling.py                            a quarter of the positions, 32 and 512 workers
    python benchmarks/strong_scaling.py --scale 1                  the true sizes: about six minutes
    python benchmarks/strong_scaling.py --workers 512 --each 1     each thread a worker of its own for the scheduler
    python benchmarks/strong_scaling.py --scale 1 --floor          plain Dask beside it: what can be had here

The published run: Bayesian inference of 68,096 positions of 500 float32, about 147 ms each, with results of 500, 250
and 250 float32 and one pair; 336.3 s on 32 ranks and 27.0 s on 512: a strong-scaling efficiency of 78 %, work split
into equal shares. Here the scheduler is a process of its own and the workers are threads in a few processes, which is
enough for workers that sleep; the HDF5 file, the blocks, the writes in place and the commits are real. Scheduler,
workers and driver share the cores of this machine: a real cluster has more of them, and a network.

Efficiency is T(32) * 32 / (T(512) * 512). The start of the cluster is not counted; all that lazyproc does is: looking
for earlier results, the probe, creating the results, the blocks, the commits, the end. `--scale 4` computes a quarter
of the positions: with as many seconds a position and as many messages a second, while what is paid once weighs four
times as much.

The floor is Dask alone, with blocks of the sizes that lazyproc used: `Client.map`, one task a block, which sleeps as
long and writes as many bytes with one `pwrite`, and one `gather` at the end. No probe, no results group, no mask, no
commits, no locks, nothing that could be resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

N_POSITIONS = 68_096
N_SPECTRAL = 500
SECONDS = 0.147
PUBLISHED = {32: 336.3, 512: 27.0}
MAIN = "/Measurement_000/Channel_000/Raw_Data"
PAIR = np.dtype([("Forward", "f4"), ("Reverse", "f4")])
_QUIET = {
    # Simulated workers share an interpreter: what each real one does for itself every 10 ms would be paid 128 times.
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "5s",
    "DASK_DISTRIBUTED__ADMIN__TICK__LIMIT": "60s",
    "DASK_LOGGING__DISTRIBUTED": "error",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def infer(spectrum: Any, seconds: float = SECONDS) -> Any:
    """Stand in for the inference of one position: as long, with results as large.

    A worker here shares cores and an interpreter with a hundred others, and so sleeps some milliseconds too long; a
    real one has its own. By as much it sleeps less at the next position.
    """
    worker: Any = threading.current_thread()
    begin, late = time.perf_counter(), getattr(worker, "late", 0.0)
    time.sleep(max(0.0, seconds - late))
    worker.late = late + time.perf_counter() - begin - seconds
    return {
        "Corrected_Current": spectrum,
        "Resistance": spectrum[:250],
        "R_variance": spectrum[250:],
        "Capacitance": np.zeros((), PAIR),
    }


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes
    ----------
    workers : int
        Simulated workers: blocks computed at a time.
    ideal : float
        Seconds a worker sleeps if all have equal shares.
    wall : float
        Seconds from the path of a file to its finished results.
    before, loop, after : float
        The parts of it: until the first block was sent, until the last one was taken, and then.
    blocks, commits : int
        Blocks that came back, and times that the status mask was brought up to date.
    driver_cpu, scheduler_cpu, workers_cpu : float
        CPU seconds.
    """

    workers: int
    ideal: float
    wall: float
    before: float
    loop: float
    after: float
    blocks: int
    commits: int
    driver_cpu: float
    scheduler_cpu: float
    workers_cpu: float


def make_file(path: str, n_positions: int) -> None:
    """Write the source: random currents, contiguous."""
    import h5py

    random = np.random.default_rng(1)
    with h5py.File(path, "w") as file:
        group = file.create_group(MAIN.rpartition("/")[0])
        main = group.create_dataset("Raw_Data", (n_positions, N_SPECTRAL), "f4")
        for start in range(0, n_positions, 4096):
            count = min(4096, n_positions - start)
            main[start : start + count] = random.standard_normal((count, N_SPECTRAL), dtype=np.float32)
        main.attrs["quantity"], main.attrs["units"] = "Current", "nA"
        positions = np.arange(n_positions, dtype="u4").reshape(-1, 1)
        columns = np.arange(N_SPECTRAL, dtype="u4").reshape(1, -1)
        for name, values, label, unit in (
            ("Position_Indices", positions, "X", "um"),
            ("Position_Values", positions.astype("f4"), "X", "um"),
            ("Spectroscopic_Indices", columns, "Bias", "V"),
            ("Spectroscopic_Values", columns.astype("f4"), "Bias", "V"),
        ):
            dataset = group.create_dataset(name, data=values)
            dataset.attrs["labels"] = np.array([label], "S8")
            dataset.attrs["units"] = np.array([unit], "S8")
            main.attrs[name] = dataset.ref


@contextlib.contextmanager
def cluster(folder: str, workers: int, processes: int, each: int) -> Iterator[str]:
    """Start a scheduler and workers; give the file that tells clients where the scheduler is."""
    environment = {**os.environ, **_QUIET}
    address = os.path.join(folder, "scheduler.json")
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", address]
    command += ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    started = [subprocess.Popen(command, env=environment)]
    try:
        while not os.path.exists(address):
            time.sleep(0.05)
        for number in range(processes):
            threads = workers // processes + (number < workers % processes)
            arguments = ["--host", address, str(threads), str(each or threads)]
            started.append(subprocess.Popen([sys.executable, os.path.abspath(__file__), *arguments], env=environment))
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=60)


def host(address: str, threads: int, each: int) -> None:
    """Be a process with workers in it, each with some of the threads."""
    import asyncio

    from distributed import Worker

    async def serve() -> None:
        own = [
            Worker(scheduler_file=address, nthreads=each, memory_limit=0, dashboard=False)
            for _ in range(threads // each)
        ]
        await asyncio.gather(*own)
        await asyncio.gather(*(worker.finished() for worker in own))

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


def measure(path: str, scheduler: str, workers: int, seconds: float, interval: float, sizes: list[int]) -> Run:
    """Compute once on a cluster that is up, from the path of the file to the finished results.

    `sizes` gets the positions of each block, in the order in which they came back.
    """
    from distributed import Client

    import lazyproc
    from lazyproc.core.events import BlockDone

    outputs = {
        "Corrected_Current": lazyproc.Output("f4", shape_from_main=True, quantity="Current", units="nA"),
        "Resistance": lazyproc.Output("f4", dims=[lazyproc.Dimension("Bias", "V", 250)], units="GOhm"),
        "R_variance": lazyproc.Output("f4", dims=[lazyproc.Dimension("Bias", "V", 250)], units="GOhm"),
        "Capacitance": lazyproc.Output(PAIR, units="pF"),
    }
    inference = type("Inference", (lazyproc.Process,), {"outputs": outputs, "_map_function": staticmethod(infer)})
    with Client(scheduler_file=scheduler) as client:
        while (seen := sum(client.nthreads().values())) < workers:
            time.sleep(0.1)
        assert seen == workers
        client.run(_import)  # as much a part of starting a worker as starting its interpreter
        times: dict[str, list[float]] = {}

        def note(event: Any) -> None:
            times.setdefault(type(event).__name__, []).append(time.perf_counter())
            if isinstance(event, BlockDone):
                sizes.append(event.n_positions)

        spent = _all_cpu(client)
        begin = time.perf_counter()
        options = {"parms_dict": {"seconds": seconds}, "client": client, "checkpoint_interval": interval}
        with inference(f"{path}::{MAIN}", **options) as process:
            process._progress = note
            group = process.compute(override=True)
            wall = time.perf_counter() - begin
            assert group["completed_positions"][:].all()
            n_positions = len(group["completed_positions"])
        driver, handing, others = (after - before for before, after in zip(spent, _all_cpu(client), strict=True))
    started, blocks = times["Started"][0], times["BlockDone"]
    in_loop = [one for one in blocks if one > started]
    last = max(in_loop)
    return Run(
        workers=workers, ideal=n_positions * seconds / workers, wall=wall, before=started - begin,
        loop=last - started, after=begin + wall - last, blocks=len(in_loop), commits=len(times["Committed"]),
        driver_cpu=driver, scheduler_cpu=handing, workers_cpu=others,
    )  # fmt: skip


def floor(path: str, scheduler: str, workers: int, seconds: float, sizes: list[int]) -> float:
    """Have blocks of these sizes computed by Dask alone; return the seconds that took."""
    from distributed import Client

    with Client(scheduler_file=scheduler) as client:
        while sum(client.nthreads().values()) < workers:
            time.sleep(0.1)
        client.run(_import)
        with open(path, "wb"):
            begin = time.perf_counter()
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        futures = client.map(_sleep_and_write, sizes, starts, path=path, seconds=seconds, pure=False)
        assert sum(client.gather(futures)) == sum(sizes)
        return time.perf_counter() - begin


def _sleep_and_write(size: int, start: int, path: str, seconds: float) -> int:
    source = np.zeros((size, N_SPECTRAL), "f4")
    results = np.zeros((size, 2 * N_SPECTRAL + 2), "f4")
    for row, spectrum in enumerate(source):
        results[row, :N_SPECTRAL] = infer(spectrum, seconds)["Corrected_Current"]
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, results.tobytes(), start * results.strides[0])
    os.close(descriptor)
    return size


def _import() -> None:
    import lazyproc.engine.packing  # noqa: F401


def _cpu() -> tuple[int, float]:
    return os.getpid(), time.process_time()


def _all_cpu(client: Any) -> tuple[float, float, float]:
    """CPU seconds until now of the driver, the scheduler, and all processes with workers."""
    return _cpu()[1], client.run_on_scheduler(_cpu)[1], sum(dict(client.run(_cpu).values()).values())


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=[32, 512])
    parser.add_argument("--scale", type=float, default=4, help="compute so many times fewer positions")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a position")
    parser.add_argument("--processes", type=int, default=4, help="that workers are spread over")
    parser.add_argument("--each", type=int, default=0, help="threads of a Dask worker; 0: all of its process")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between commits")
    parser.add_argument("--floor", action="store_true", help="have Dask alone sleep beside each run")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--json", help="append the runs to this file")
    options = parser.parse_args()
    runs: list[Run] = []
    print("workers   ideal    wall  before    loop   after  blocks commits  CPU s of driver scheduler workers")
    for workers in options.workers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = os.path.join(folder, "giv.h5")
            make_file(path, round(N_POSITIONS / options.scale))
            os.sync()
            with cluster(folder, workers, min(workers, options.processes), options.each) as scheduler:
                sizes: list[int] = []
                one = measure(path, scheduler, workers, options.seconds, options.interval, sizes)
            if options.floor:
                with cluster(folder, workers, min(workers, options.processes), options.each) as scheduler:
                    least = floor(os.path.join(folder, "bytes"), scheduler, workers, options.seconds, sizes)
        runs.append(one)
        print(
            f"{one.workers:7d} {one.ideal:7.2f} {one.wall:7.2f} {one.before:7.2f} {one.loop:7.2f} {one.after:7.2f} "
            f"{one.blocks:7d} {one.commits:7d} {one.driver_cpu:15.2f} {one.scheduler_cpu:9.2f} {one.workers_cpu:7.2f}",
            flush=True,
        )
        if options.floor:
            print(f"{workers:7d} {one.ideal:7.2f} {least:7.2f}   Dask alone, {len(sizes)} blocks of the same sizes")
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(vars(options) | asdict(one) | ({"least": least} if options.floor else {})) + "\n")
    first = runs[0]
    for one in runs[1:]:
        efficiency = first.wall * first.workers / (one.wall * one.workers)
        print(f"efficiency from {first.workers} to {one.workers} workers: {efficiency:.1%}")
    if {32, 512} <= PUBLISHED.keys() & {one.workers for one in runs}:
        print(f"published: {PUBLISHED[32] * 32 / (PUBLISHED[512] * 512):.1%}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--host"]:
        host(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
