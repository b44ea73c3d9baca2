"""Workloads for the measurement of memory, and one run of them in this process: started by `memory.py` and by tests.

    python hungry.py WORKLOAD FILE ENGINE MAX_MEM_MB     engine: serial, threads, processes; baseline-… for imports
                                                 half-done: make results with a hole at every second position

The file is made if it is not there. The last line printed is JSON: what was projected, the sizes of the blocks, how
often positions were computed, and the error if there was one.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

N_WORKERS = 2
MORE = 5
"""So many times more some functions take than the probe can see."""


def mean_of_one(spectrum: np.ndarray) -> Any:
    """Average one spectrum: cheap, in Python."""
    return np.mean(spectrum)


def mean_of_block(block: np.ndarray) -> Any:
    """Average each spectrum."""
    return block.mean(axis=1)


def low_pass(block: np.ndarray) -> Any:
    """Keep a tenth of each spectrum's frequencies; the result is as large as the source."""
    spectrum = np.fft.rfft(block, axis=1)
    spectrum[:, spectrum.shape[1] // 10 :] = 0
    return np.fft.irfft(spectrum, block.shape[1], axis=1).astype("f4")


def fit_one(spectrum: np.ndarray) -> Any:
    """Fit a line and an exponential by least squares."""
    from scipy.optimize import least_squares

    x = np.linspace(0, 1, len(spectrum))
    return np.float32(least_squares(lambda p: p[0] + p[1] * np.exp(-p[2] * x) - spectrum, [0.0, 1.0, 1.0]).cost)


def fit_block(block: np.ndarray) -> Any:
    """Fit a whole block at once, by SciPy and LAPACK, which take buffers for each thread."""
    from scipy.linalg import lstsq

    x = np.linspace(-1, 1, block.shape[1])
    basis = np.stack([x**power for power in range(8)], axis=1)
    return np.stack([lstsq(basis, spectrum, check_finite=False)[0].sum() for spectrum in block])


def native(block: np.ndarray) -> Any:
    """Take five times the source from the C library, which Python's allocators know nothing of."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    address = libc.malloc(MORE * block.nbytes)
    libc.memset(address, 1, MORE * block.nbytes)
    libc.free(address)
    return block.mean(axis=-1)


def later(block: np.ndarray) -> Any:
    """Take once the source, and five times as much for positions after the first tenth; column 0 is that share."""
    some = [np.ones((int((block[:, 0] < 0.1).sum()), block.shape[1]), "f4")]
    some.append(np.ones((int((block[:, 0] >= 0.1).sum()), MORE * block.shape[1]), "f4"))
    return block.mean(axis=1) + 0 * some[0].sum() + 0 * some[1].sum()


def later_native(block: np.ndarray) -> Any:
    """Take five times the source from the C library, but for positions of the first tenth and the last ones."""
    return native(block) if ((block[:, 0] >= 0.1) & (block[:, 0] < 0.99)).any() else block.mean(axis=1)


def _take(spectrum: np.ndarray, size: int) -> Any:
    time.sleep(0.002)  # so that the probe believes eight positions, which lie beside these
    if 0.17 <= spectrum[0] < 0.26:
        native(np.broadcast_to(spectrum[:1], size // 4 // MORE))
    return spectrum[0]


def big_one(spectrum: np.ndarray) -> Any:
    """Take 30 MiB for some positions, which the probe does not try: two at once are too much for a limit of 64."""
    return _take(spectrum, 30 * 2**20)


def huge_one(spectrum: np.ndarray) -> Any:
    """Take 100 MiB for some positions, which the probe does not try."""
    return _take(spectrum, 100 * 2**20)


def later_one(spectrum: np.ndarray) -> Any:
    """Take 1 MiB for a position, and 5 MiB after the first tenth."""
    size = 2**17 * (MORE if 0.1 <= spectrum[0] < 0.99 else 1)
    return spectrum.mean() + 0 * np.ones(size).sum()


def _keep(mib: int) -> None:
    import colorsys as module  # one that nobody has loaded yet

    if not hasattr(module, "table"):
        module.table = np.ones(mib * 2**17)


def keeps(spectrum: np.ndarray) -> Any:
    """Import a module, and keep a table of 16 MiB in it."""
    _keep(16)
    return spectrum[0]


def keeps_much(block: np.ndarray) -> Any:
    """Import a module, and keep a table of 200 MiB in it."""
    _keep(200)
    return block[:, 0]


def first(block: np.ndarray) -> Any:
    """Return the first column."""
    return block[:, 0]


def first_of_block(block: np.ndarray, table: np.ndarray) -> Any:
    """Return the first column; a large table comes with every call."""
    return block[:, 0] + table[0]


def first_of_one(spectrum: np.ndarray, table: np.ndarray) -> Any:
    """Return the first value; a large table comes with every call."""
    return spectrum[0] + table[0]


@dataclass(frozen=True)
class Hungry:
    """A file's shape (float32), a function, whether it takes blocks, and whether its result is as large.

    And how the source and the results are compressed, whether every second position is done already, how the source
    is verified, the size of a table that is a parameter (MiB), and the positions in a storage chunk.
    """

    n_positions: int
    n_spectral: int
    function: Callable[..., Any]
    vectorized: bool
    filters: bool = False
    compression: str | None = None
    results: str | None = None
    is_half_done: bool = False
    verify: str = "none"
    table_mib: int = 0
    chunk_rows: int = 64

    def parameters(self) -> dict[str, Any]:
        """Return the parameters, made anew: memory of the caller's own."""
        return {"table": np.arange(self.table_mib * 2.0**17)} if self.table_mib else {}


HUNGRY = {
    "python": Hungry(131_072, 512, mean_of_one, False),
    "reduce": Hungry(131_072, 512, mean_of_block, True),
    "filter": Hungry(4_096, 8_192, low_pass, True, filters=True),
    "fit": Hungry(512, 256, fit_one, False),
    "fit-block": Hungry(16_384, 512, fit_block, True),
    "gzip": Hungry(50_000, 512, mean_of_block, True, compression="gzip"),
    "coarse": Hungry(65_536, 512, mean_of_block, True, compression="scaleoffset", chunk_rows=4096),
    "compressed": Hungry(50_000, 512, low_pass, True, filters=True, results="gzip"),
    "verified": Hungry(262_144, 512, mean_of_block, True, verify="sampled"),
    "narrow": Hungry(10**7, 1, first, True),
    "holes": Hungry(10**6, 1, first, True, is_half_done=True),
    "keeps": Hungry(524_288, 64, keeps, False),
    "keeps-much": Hungry(4_096, 512, keeps_much, True),
    "table": Hungry(131_072, 512, first_of_block, True, table_mib=8),
    "table-one": Hungry(262_144, 512, first_of_one, False, table_mib=8),
    "wide": Hungry(72, 2**21, mean_of_block, True),
    "native": Hungry(131_072, 512, native, True),
    "later": Hungry(131_072, 512, later, True),
    "later-native": Hungry(131_072, 512, later_native, True),
    "later-one": Hungry(4_096, 512, later_one, False),
    "big-one": Hungry(200, 512, big_one, False),
    "huge-one": Hungry(200, 512, huge_one, False),
}
USUAL = [name for name in HUNGRY if name not in ("big-one", "huge-one", "keeps-much")]
"""Those that are meant to fit into 64 MiB."""


def make_file(path: str, workload: Hungry) -> None:
    """Write a main dataset whose first column is the share of the positions that lie before."""
    import h5py

    if os.path.exists(path):
        return
    n, m = workload.n_positions, workload.n_spectral
    options = {"chunks": (workload.chunk_rows, m), "compression": workload.compression} if workload.compression else {}
    if workload.compression == "scaleoffset":
        options |= {"compression": None, "scaleoffset": 4}
    rows = max(1, 2**22 // m)
    with h5py.File(path + ".part", "w") as file:
        main = file.create_dataset("Raw_Data", (n, m), "f4", **options)
        piece = np.random.default_rng(0).standard_normal((rows, m), "f4")
        for start in range(0, n, rows):
            part = piece[: min(rows, n - start)].copy()
            part[:, 0] = (start + np.arange(len(part))) / n
            main[start : start + len(part)] = part
        main.attrs.update(quantity="Current", units="nA")
        for kind, label, size in (("Position", "X", n), ("Spectroscopic", "Time", m)):
            shape = (size, 1) if kind == "Position" else (1, size)
            for what in ("Indices", "Values"):
                ancillary = file.create_dataset(f"{kind}_{what}", data=np.arange(size, dtype="u4").reshape(shape))
                ancillary.attrs.update(labels=["X" if kind == "Position" else label], units=["m"])
                main.attrs[f"{kind}_{what}"] = ancillary.ref
    os.replace(path + ".part", path)


def imports(name: str, engine: str) -> None:
    """Load what a run of less than a minute loads in any case: in the driver, or in a worker, and for the function."""
    source = "lazyproc.hdf5.chunks" if HUNGRY[name].compression else "lazyproc.hdf5.extents"
    if HUNGRY[name].compression == "scaleoffset":
        source = "lazyproc.hdf5.source"
    worker = ["threadpoolctl", "encodings.ascii", "lazyproc.engine.worker", "lazyproc.hdf5.sink", source]
    driver = [*worker, "lazyproc.engine.sending", "lazyproc.run.perform", "lazyproc.process"]
    function = {"fit": ["scipy.optimize"], "fit-block": ["scipy.linalg"]}.get(name, [])
    for module in (*(worker if engine == "worker" else driver), *function):
        importlib.import_module(module)
    if HUNGRY[name].filters:
        np.fft.irfft(np.fft.rfft(np.ones(64, "f4")))


def baseline(name: str, engine: str) -> None:
    """Be bare interpreters with their imports, until the input ends."""
    imports(name, engine)
    parameters = HUNGRY[name].parameters()
    workers = []
    if engine in ("both", "processes"):
        code = f"import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); import hungry; "
        code += f"hungry.imports({name!r}, 'worker'); print(flush=True); input()"
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS")}
        how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | one_thread}
        workers = [subprocess.Popen([sys.executable, "-c", code], **how) for _ in range(N_WORKERS - (engine == "both"))]
        for worker in workers:
            worker.stdout.readline()
    print("baseline", flush=True)
    sys.stdin.read()
    for worker in workers:
        worker.communicate(b"\n")
    del parameters


def run(name: str, path: str, engine: str, max_mem_mb: int) -> dict[str, Any]:
    """Run a workload with an engine; return what was projected, and what happened."""
    import lazyproc
    import lazyproc.run.where
    from lazyproc.core.errors import LazyprocError
    from lazyproc.core.events import BlockDone
    from lazyproc.engine.choose import Scheduler

    workload = HUNGRY[name]
    parameters = workload.parameters()
    n_workers = 1 if engine == "serial" else N_WORKERS
    lazyproc.run.where.choose_local = lambda kernel, probe, n, workers, apart: Scheduler(
        engine, min(workers, n_workers)
    )
    projected, ahead, sizes, answer, told = [], [], [], {"error": None}, []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if hasattr(record, "projected_bytes"):
                projected.append(record.projected_bytes)
                ahead.append(getattr(record, "ahead_bytes", record.projected_bytes))
                told.append(record.getMessage())

    log = logging.getLogger("lazyproc")
    log.addHandler(Keep())
    log.setLevel(logging.INFO)
    hook = "_block_function" if workload.vectorized else "_map_function"
    output = lazyproc.Output("f4", shape_from_main=workload.filters, compression=workload.results)
    body = {"outputs": {"Out": output}, hook: staticmethod(workload.function), "process_name": name}
    process_class = type("Work", (lazyproc.Process,), body)
    options = {"cores": n_workers, "max_mem_mb": max_mem_mb, "verify": workload.verify}
    with process_class(f"{path}::/Raw_Data", parms_dict=parameters, **options) as process:
        process._progress = lambda event: sizes.append(event.n_positions) if isinstance(event, BlockDone) else None
        try:
            group = process.compute(override=not workload.is_half_done)
            answer["is_done"] = bool(group["completed_positions"][()].all())
            answer["group"] = group.name
        except LazyprocError as error:
            answer["error"] = f"{type(error).__name__}: {error}"
    found = {"projected": max(projected, default=0), "ahead": ahead[-1] if ahead else 0}
    return {**answer, **found, "sizes": sizes, "told": told}


def half_done(name: str, path: str) -> None:
    """Take every second position back, of results that are complete."""
    import h5py

    answer = run(name, path, "serial", 1024)
    with h5py.File(path, "r+") as file:
        file[answer["group"]]["completed_positions"][::2] = 0


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import hungry  # so that functions are found by workers, and not those of __main__

    workload_name, file_path, engine_name, limit = sys.argv[1:5]
    if engine_name.startswith("baseline-"):
        hungry.baseline(workload_name, engine_name.partition("-")[2])
    elif engine_name == "half-done":
        hungry.half_done(workload_name, file_path)
    else:
        hungry.imports(workload_name, engine_name)
        print(json.dumps(hungry.run(workload_name, file_path, engine_name, int(limit))), flush=True)
