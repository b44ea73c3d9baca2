"""Compressed results against h5py's own writer with the same filters.

    python benchmarks/compressed.py                       128 MiB of results, three runs each, after one not counted
    python benchmarks/compressed.py --mebibytes 1024
    python benchmarks/compressed.py --cores 1             one core against one core
    python benchmarks/compressed.py --levels 1 2 3 4 5 6 7 8 9 --plain-levels

Both do the same: read blocks of the source, double their values, store them compressed in the same chunks, synced. h5py
is a plain loop in one process, ``results[a:b] = 2 * source[a:b]``, whose blocks are multiples of the storage chunks.
lazyproc is `compute()` as it is, with everything on. Each run is a fresh process and a fresh copy of the source, in
turn (h5py, lazyproc, h5py, lazyproc …); the clock starts after the imports. "plain" is lazyproc without compression;
"cluster" is lazyproc on a local Dask cluster of as many workers as cores, of one thread each, which is up before the
clock starts: its workers compress.

h5py always has one core, lazyproc two unless `--cores` says otherwise: HDF5 compresses in one thread and lets only one
process write a file, so this is what a person gets on such a machine, and not what either makes of a core. For that see
`--cores 1`, or the seconds of the processor ("cpu"), which also depend less on what else the machine does. Nor is the
algorithm the same: h5py has zlib, lazyproc up to level 4 ISA-L and from 5 on libdeflate, whose streams differ from
zlib's in size ("size").
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

MAIN = "/Measurement_000/Channel_000/Raw_Data"
N_SPECTRAL = 256


def filters_of(levels: list[int], plain_levels: list[int]) -> dict[str, dict[str, Any]]:
    """Return gzip of some levels after the shuffle filter, and of others without, by what they are called."""
    shuffled = {
        f"gzip {level}, shuffle": {"compression": "gzip", "compression_opts": level, "shuffle": True}
        for level in levels
    }
    return shuffled | {f"gzip {level}": {"compression": "gzip", "compression_opts": level} for level in plain_levels}


def make_source(path: str, mebibytes: int) -> None:
    """Write a main dataset of noisy oscillations, float32."""
    import h5py
    import numpy as np

    n_positions = mebibytes * 2**20 // (4 * N_SPECTRAL)
    chance = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        group = file.create_group(MAIN.rpartition("/")[0])
        main = group.create_dataset("Raw_Data", (n_positions, N_SPECTRAL), "f4")
        phase = np.linspace(0, 20, N_SPECTRAL)
        for start in range(0, n_positions, 4096):
            shape = (min(4096, n_positions - start), N_SPECTRAL)
            main[start : start + shape[0]] = np.sin(phase) * chance.uniform(1, 2, (shape[0], 1)) + (
                1e-3 * chance.standard_normal(shape)
            )
        main.attrs["quantity"], main.attrs["units"] = "Counts", "1"
        for kind, label, shape in (("Position", "X", (n_positions, 1)), ("Spectroscopic", "T", (1, N_SPECTRAL))):
            for what in ("Indices", "Values"):
                values = np.arange(max(shape)).reshape(shape)
                dataset = group.create_dataset(f"{kind}_{what}", data=values, dtype="u4" if what == "Indices" else "f4")
                dataset.attrs["labels"], dataset.attrs["units"] = np.array([label], "S8"), np.array(["1"], "S8")
                main.attrs[f"{kind}_{what}"] = dataset.ref


def cpu_seconds() -> float:
    """Return the seconds that this process and its children have kept processors busy."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, kinds))


def twice(block: Any) -> Any:
    """Return the block doubled."""
    return 2 * block


def with_lazyproc(path: str, filters: dict[str, Any], cores: int, client: Any = None) -> dict[str, float]:
    """Compute once, and tell the seconds and what the results take in the file."""
    import lazyproc
    import lazyproc.run.perform  # imported at the first run else

    outputs = {"Twice": lazyproc.Output("f4", shape_from_main=True, **filters)}
    cls = type("Double", (lazyproc.Process,), {"outputs": outputs, "_block_function": staticmethod(twice)})
    begin, used = time.perf_counter(), cpu_seconds()
    with cls(f"{path}::{MAIN}", cores=cores, client=client) as process:
        group = process.compute()
        seconds, cpu = time.perf_counter() - begin, cpu_seconds() - used
        return {"seconds": seconds, "cpu": cpu, "stored": int(group["Twice"].id.get_storage_size())}


def with_h5py(path: str, filters: dict[str, Any], cores: int) -> dict[str, float]:
    """Do the same with a plain loop, on one core."""
    import h5py

    from lazyproc.core.compression import chunk_shape

    begin, used = time.perf_counter(), cpu_seconds()
    with h5py.File(path, "r+") as file:
        source = file[MAIN]
        chunks = chunk_shape(*source.shape, 4)
        made = file.create_dataset("Twice", source.shape, "f4", chunks=chunks, **filters)
        rows = 8 * chunks[0]
        for start in range(0, source.shape[0], rows):
            made[start : start + rows] = 2 * source[start : start + rows]
        file.flush()
        os.fsync(file.id.get_vfd_handle())
        seconds, cpu = time.perf_counter() - begin, cpu_seconds() - used
        return {"seconds": seconds, "cpu": cpu, "stored": int(made.id.get_storage_size())}


def on_cluster(path: str, filters: dict[str, Any], cores: int) -> dict[str, float]:
    """Compute once on a cluster whose workers are up, and have loaded what they need."""
    from distributed import Client, LocalCluster

    local = LocalCluster(n_workers=cores, threads_per_worker=1, dashboard_address=":0")
    with local as cluster, Client(cluster) as client:
        client.run(_import)
        return with_lazyproc(path, filters, cores, client)


def _import() -> None:
    import lazyproc.engine.packing
    import lazyproc.hdf5.compress  # noqa: F401


CONTENDERS = {
    "h5py": with_h5py,
    "lazyproc": with_lazyproc,
    "plain": lambda path, filters, cores: with_lazyproc(path, {}, cores),
    "cluster": on_cluster,
}


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=128, help="of results, and of source")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="of lazyproc; h5py has one")
    parser.add_argument("--levels", nargs="*", type=int, default=[1, 4, 5, 6, 7, 8, 9], help="of gzip with shuffle")
    parser.add_argument("--plain-levels", nargs="*", type=int, default=[4], help="of gzip without")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        contender, path, filters = options.one
        print(json.dumps(CONTENDERS[contender](path, json.loads(filters), options.cores)))
        return
    n_bytes = options.mebibytes * 2**20
    heads = [
        "h5py s",
        "lazyproc s",
        "ratio",
        "plain s",
        "cluster s",
        "h5py cpu",
        "lazyproc cpu",
        "h5py size",
        "lazyproc size",
    ]
    print(f"h5py on one core, lazyproc on {options.cores}")
    print(f"{f'results of {options.mebibytes} MiB':21}", *heads, sep="  ")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = os.path.join(folder, "source.h5")
        make_source(source, options.mebibytes)
        for name, filters in filters_of(options.levels, options.plain_levels).items():
            found: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
            for _ in range(options.runs + 1):
                for contender, results in found.items():
                    path = shutil.copy(source, os.path.join(folder, "scan.h5"))
                    os.sync()
                    command = [sys.executable, os.path.abspath(__file__), "--cores", str(options.cores)]
                    command += ["--one", contender, path, json.dumps(filters)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    results.append(json.loads(done.stdout))
                    os.unlink(path)
            seconds = {who: statistics.median(one["seconds"] for one in runs[1:]) for who, runs in found.items()}
            cpu = {who: statistics.median(one["cpu"] for one in runs[1:]) for who, runs in found.items()}
            sizes = {who: runs[0]["stored"] / n_bytes for who, runs in found.items()}
            times = (f"{seconds[who]:{width}.2f}" for who, width in (("plain", 7), ("cluster", 9)))
            print(
                f"{name:21}  {seconds['h5py']:6.2f}  {seconds['lazyproc']:10.2f}  "
                f"{seconds['h5py'] / seconds['lazyproc']:5.1f}",
                *times,
                f"{cpu['h5py']:8.2f}  {cpu['lazyproc']:12.2f}  {sizes['h5py']:9.3f}  {sizes['lazyproc']:13.3f}",
                sep="  ",
                flush=True,
            )


if __name__ == "__main__":
    main()
