"""Numbers of the commit layer's promise: deaths at every write, kills at random, power cuts, and what the syncs cost.

    python benchmarks/promise.py                        everything, every point: hours
    python benchmarks/promise.py --points 20 --kills 60 --cuts 20 --layouts handle
    python benchmarks/promise.py --only throughput

Points are calls of the system that change a file: a process dies before, half-way through and after each of them. All
is done on files in a temporary folder by the harness of the tests (tests/deaths), which needs a C compiler.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from contenders import WORKLOADS  # noqa: E402
from deaths import shim  # noqa: E402
from deaths.layouts import LAYOUTS, Layout  # noqa: E402
from deaths.stage import Stage  # noqa: E402
from deaths.trials import Scene, Tally, try_phase, worker_calls, worker_points  # noqa: E402
from workloads import make_file  # noqa: E402

PARTS = ("points", "workers", "kills", "cuts", "throughput")
RECOVERY_POINTS = 100
"""So many of the pairs of a death and a death in the recovery after it, for each layout."""


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layouts", nargs="+", default=[""], help="parts of the names of layouts")
    parser.add_argument("--points", type=int, help="so many of each layout and phase; default: all")
    parser.add_argument("--kills", type=int, default=1000, help="kills at random times, in all")
    parser.add_argument("--cuts", type=int, help="power cuts of each layout; default: two at each call")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["fit-long", "mean", "fft"])
    parser.add_argument("--runs", type=int, default=5, help="runs with syncs, and as many without")
    parser.add_argument("--seed", default="2024")
    options = parser.parse_args()
    layouts = [one for one in LAYOUTS if any(part in one.name for part in options.layouts)]
    serial = [one for one in layouts if one.cores == 1]
    own = [one for one in serial if not one.used_before]  # what a caller does through his handle is not promised
    with tempfile.TemporaryDirectory(prefix="lazyproc-promise-") as name:
        folder = Path(name)
        library = shim.build(folder)
        if "points" in options.only:
            _table("a death at every write", _points(library, folder, serial, options.points, options.seed))
        if "workers" in options.only and len(serial) < len(layouts):
            _table("deaths with worker processes", _workers(library, folder, options.points or 20, options.seed))
        if "kills" in options.only:
            _table("kills at random times", _kills(library, folder, own, options.kills, options.seed))
        if "cuts" in options.only:
            _table("power cuts", _cuts(library, folder, own, options.cuts, options.seed))
        if "throughput" in options.only:
            _throughput(library, folder, options.workloads, options.runs)


def _table(title: str, rows: Iterator[tuple[str, str, Tally]]) -> None:
    print(
        f"\n{title}\n{'layout':<58}{'phase':<12}{'tried':>7}{'failed':>8}{'missed':>8}{'again':>8}{'most':>6}",
        flush=True,
    )
    total = Tally()
    for layout, phase, tally in rows:
        total.join(tally)
        _row(layout, phase, tally)
        for problem in tally.problems[:3]:
            print(f"    {problem[:1000]}", flush=True)
    _row("all", "", total)


def _row(layout: str, phase: str, tally: Tally) -> None:
    mean = tally.all_lost / max(1, tally.tried)
    print(
        f"{layout:<58}{phase:<12}{tally.tried:>7}{tally.failed:>8}{tally.missed:>8}{mean:>8.2f}{tally.most_lost:>6}",
        flush=True,
    )


def _points(
    library: Path, folder: Path, layouts: list[Layout], number: int | None, seed: str
) -> Iterator[tuple[str, str, Tally]]:
    with _stage(library, folder, "points") as stage:
        for layout in layouts:
            scene = Scene(stage, layout.name)
            chance = random.Random(f"{seed} {layout.name}")
            for phase in scene.safe_phases():
                most = number or (RECOVERY_POINTS if phase == "recovery" else None)
                yield layout.name, phase, try_phase(scene, phase, most, chance)


def _workers(library: Path, folder: Path, number: int, seed: str) -> Iterator[tuple[str, str, Tally]]:
    with _stage(library, folder, "workers", pause=0.05) as stage:
        for layout in (one for one in LAYOUTS if one.cores > 1):
            scene = Scene(stage, layout.name)
            tallies: dict[str, Tally] = {}
            for point in worker_points(worker_calls(scene.events), number, random.Random(seed)):
                tallies.setdefault(point.what, Tally()).add(scene.try_point(point))
            for what, tally in tallies.items():
                yield what, "", tally


def _kills(
    library: Path, folder: Path, layouts: list[Layout], number: int, seed: str
) -> Iterator[tuple[str, str, Tally]]:
    with _stage(library, folder, "kills", pause=0.002) as stage:
        for layout in layouts:
            scene = Scene(stage, layout.name)
            chance = random.Random(f"{seed} kills {layout.name}")
            tally = Tally()
            while tally.tried < -(-number // len(layouts)) and tally.missed < number:
                tally.add(scene.kill_at_random(chance))
            yield layout.name, "", tally


def _cuts(
    library: Path, folder: Path, layouts: list[Layout], number: int | None, seed: str
) -> Iterator[tuple[str, str, Tally]]:
    with _stage(library, folder, "cuts") as stage:
        for layout in layouts:
            scene = Scene(stage, layout.name)
            recorded = stage.ask("record", steps=[{}])
            n_events = len(list(shim.read_record(recorded["record"])))
            chance = random.Random(f"{seed} cuts {layout.name}")
            places = [place for place in range(1, n_events + 1) for _ in range(2)]
            if number is not None:
                places = [chance.randint(1, n_events) for _ in range(number)]
            yield layout.name, "", scene.cut_all(places, chance, seed)


def _stage(library: Path, folder: Path, name: str, pause: float = 0.0) -> Stage:
    (folder / name).mkdir()
    return Stage(folder / name, library, pause=pause)


# -- what the syncs cost ---------------------------------------------------------------------------------------------


def _throughput(library: Path, folder: Path, workloads: list[str], n_runs: int) -> None:
    """Time lazyproc with syncs and without, in turn, in fresh processes, at the default checkpoint_interval."""
    heads = f"{'workload':<14}{'with s':>9}{'without s':>11}{'ratio':>8}{'in syncs':>10}{'syncs':>7}"
    print(f"\nwhat the syncs cost\n{heads}", flush=True)
    control = shim.Control(folder / "throughput")
    for workload in workloads:
        original = make_file(str(folder), workload)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        shares: list[float] = []
        n_syncs = 0
        for turn in range(n_runs + 1):
            for skip in (False, True) if turn % 2 else (True, False):
                took = _run(library, control, folder, original, workload, skip)
                if turn:  # the first turn warms the page cache
                    seconds[skip].append(took)
                    if not skip:
                        shares.append(float(control.block.sync_seconds) / took)
                        n_syncs = int(control.block.syncs)
        synced, free = statistics.median(seconds[False]), statistics.median(seconds[True])
        print(
            f"{workload:<14}{synced:>9.2f}{free:>11.2f}{synced / free:>8.3f}"
            f"{statistics.median(shares):>10.2%}{n_syncs:>7}",
            flush=True,
        )
        os.unlink(original)


def _run(library: Path, control: shim.Control, folder: Path, original: str, workload: str, skip: bool) -> float:
    path = original + ".copy"
    shutil.copy(original, path)
    os.sync()
    control.arm(str(folder), skip_syncs=skip)
    environment = os.environ | {"LD_PRELOAD": str(library), "LAZYPROC_DEATHS": str(folder / "throughput")}
    command = [sys.executable, str(HERE / "contenders.py"), "lazyproc", workload, path]
    begin = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - begin
    control.disarm()
    os.unlink(path)
    return took


if __name__ == "__main__":
    main()
