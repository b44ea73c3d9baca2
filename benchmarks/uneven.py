"""Positions whose cost varies a hundredfold: how long workers are idle at the end, by how the work is divided.

    python benchmarks/uneven.py                                    32 simulated workers on a cluster, 15 s each
    python benchmarks/uneven.py --workers 2 --kind processes       local worker processes

A position sleeps for as long as the source says. Costs are even; or between 1 and 100 at random, as those of iterative
fits; or the same but smooth in space, as where a sample has domains; or a region of a twentieth of the scan costs a
hundred times as much as the rest. The same work, by the same engine, is divided in three ways: `static` gives each
worker an equal share of the positions, as pyUSID.Process does; `equal` hands out blocks of one size; `lazyproc` hands
out blocks that become smaller toward the end, and of another size when positions turn out to take longer than the probe
said; and a worker gives back the rest of a block that takes much longer. All else is lazyproc for each of them, the
probe and the commits included.

Ratios are to the time that the sleeping alone would take if no worker were ever idle.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from strong_scaling import MAIN, cluster

SHAPE = (128, 128)
WAYS = ("static", "equal", "lazyproc")


def costs(kind: str, random: np.random.Generator) -> np.ndarray:
    """Return the cost of each position relative to the mean, in the order of the scan."""
    if kind == "even":
        values = np.ones(SHAPE)
    elif kind == "scattered":
        values = 100 ** random.random(SHAPE)
    else:
        # Smooth noise, then its ranks: so the values are spread as evenly as in the other case.
        k = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in SHAPE), indexing="ij"))
        noise = np.fft.ifft2(np.fft.fft2(random.standard_normal(SHAPE)) * np.exp(-((15 * k) ** 2))).real
        ranks = noise.ravel().argsort().argsort().reshape(SHAPE) / noise.size
        values = 100**ranks if kind == "smooth" else np.where(ranks >= 0.95, 100.0, 1.0)
    return (values / values.mean()).ravel()


KINDS = ("even", "scattered", "smooth", "region")


def wait(spectrum: Any) -> Any:
    """Take as long as the position says."""
    time.sleep(float(spectrum[0]))
    return spectrum[0]


def make_file(path: str, seconds: np.ndarray) -> None:
    """Write a main dataset whose values are the seconds that the positions take."""
    import h5py

    with h5py.File(path, "w") as file:
        group = file.create_group(MAIN.rpartition("/")[0])
        main = group.create_dataset("Raw_Data", data=np.repeat(seconds.astype("f4")[:, None], 16, axis=1))
        main.attrs["quantity"], main.attrs["units"] = "Cost", "s"
        for kind, label, count in (("Position", "X", len(seconds)), ("Spectroscopic", "Time", 16)):
            for what, dtype in (("Indices", "u4"), ("Values", "f4")):
                numbers = np.arange(count, dtype=dtype).reshape((-1, 1) if kind == "Position" else (1, -1))
                dataset = group.create_dataset(f"{kind}_{what}", data=numbers)
                dataset.attrs["labels"], dataset.attrs["units"] = np.array([label], "S8"), np.array(["1"], "S8")
                main.attrs[f"{kind}_{what}"] = dataset.ref


@contextlib.contextmanager
def divided(way: str, workers: int) -> Iterator[None]:
    """Have lazyproc divide the work in another way."""
    from lazyproc.core import feed, sizing

    kind = feed.BlockFeed
    before = sizing.positions_per_block, sizing.tail_of, kind.note, kind._limit
    if way == "static":
        sizing.positions_per_block = lambda **given: -(-given["n_remaining"] // workers)
    if way != "lazyproc":
        sizing.tail_of = lambda *_, **__: ()
        kind.note = kind._limit = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        sizing.positions_per_block, sizing.tail_of, kind.note, kind._limit = before  # type: ignore[method-assign]


def measure(path: str, way: str, workers: int, client: Any) -> tuple[float, int]:
    """Compute once; return the seconds and the number of blocks."""
    import lazyproc

    blocks = []
    cls = type(
        "Wait", (lazyproc.Process,), {"outputs": {"W": lazyproc.Output("f4")}, "_map_function": staticmethod(wait)}
    )
    begin = time.perf_counter()
    with divided(way, workers), cls(f"{path}::{MAIN}", cores=workers, client=client) as process:
        process._progress = lambda event: blocks.append(event) if type(event).__name__ == "BlockDone" else None
        group = process.compute(override=True)
        end = time.perf_counter()
        assert group["completed_positions"][:].all()
    return end - begin, len(blocks)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--kind", choices=["client", "processes"], default="client")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a worker, if none is ever idle")
    parser.add_argument("--costs", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        client = None
        if options.kind == "client":
            from distributed import Client

            scheduler = stack.enter_context(cluster(folder, options.workers, min(4, options.workers), 0))
            client = stack.enter_context(Client(scheduler_file=scheduler))
            while sum(client.nthreads().values()) < options.workers:
                time.sleep(0.1)
        print(f"{options.workers} workers, {options.kind}, {options.seconds:g} s if none is ever idle")
        print("costs       " + "".join(f"{way:>22}" for way in options.ways))
        for kind in options.costs:
            seconds = costs(kind, np.random.default_rng(options.seed))
            seconds *= options.seconds * options.workers / seconds.sum()
            path = os.path.join(folder, f"{kind}.h5")
            make_file(path, seconds)
            print(f"{kind:<12}", end="", flush=True)
            for way in options.ways:
                wall, blocks = measure(path, way, options.workers, client)
                print(f"{wall / options.seconds:9.2f} ({blocks:5d} bl.)", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
