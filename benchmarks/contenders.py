"""What is compared: lazyproc, and what a person would write instead. Each is run in a fresh process, start-up included.

python benchmarks/contenders.py CONTENDER WORKLOAD FILE
"""

from __future__ import annotations

import os
import sys
from typing import Any

from workloads import MAIN, WORKLOADS

_BLOCK_BYTES = 8 * 2**20


def limit(path: str, name: str) -> None:
    """The limit: two processes, each pread, kernel, pwrite over its half; no checkpoints, no resuming."""
    import h5py
    import numpy as np

    workload = WORKLOADS[name]
    with h5py.File(path, "r") as file:
        offset = file[MAIN].id.get_offset()
    result = path + ".limit"
    with open(result, "wb") as file:
        file.truncate(workload.n_positions * workload.width * 4)
    rows = max(1, _BLOCK_BYTES // (4 * (workload.n_spectral + workload.width)))
    half = workload.n_positions // 2
    children = []
    for start, stop in ((0, half), (half, workload.n_positions)):
        child = os.fork()
        if child == 0:
            source = os.open(path, os.O_RDONLY)
            target = os.open(result, os.O_RDWR)
            buffer = np.empty((rows, workload.n_spectral), "f4")
            for first in range(start, stop, rows):
                block = buffer[: min(rows, stop - first)]
                os.preadv(source, [block.data.cast("B")], offset + first * workload.n_spectral * 4)
                if workload.vectorized:
                    out = workload.function(block)
                else:
                    out = [workload.function(row) for row in block]
                out = np.ascontiguousarray(np.asarray(out, "f4").reshape(len(block), workload.width))
                os.pwrite(target, out.data.cast("B"), first * workload.width * 4)
            os._exit(0)
        children.append(child)
    for child in children:
        _, code = os.waitpid(child, 0)
        assert code == 0
    os.unlink(result)


def lazyproc(path: str, name: str, cores: int = 2) -> None:
    """lazyproc, everything on: probe, fingerprint, results beside the data, status mask, commits."""
    import lazyproc as package

    workload = WORKLOADS[name]
    dims = [package.Dimension("Value", "a.u.", workload.width)] if workload.width > 1 else None
    package.map_positions(
        workload.function,
        f"{path}::{MAIN}",
        {"Result": package.Output("f4", dims)},
        vectorized=workload.vectorized,
        cores=cores,
        override=True,
    )


def joblib(path: str, name: str) -> None:
    """joblib over blocks, results written by the parent through h5py."""
    import h5py
    import numpy as np
    from joblib import Parallel, delayed

    workload = WORKLOADS[name]
    rows = max(1, _BLOCK_BYTES // (4 * (workload.n_spectral + workload.width)))
    starts = range(0, workload.n_positions, rows)
    blocks = Parallel(n_jobs=2, return_as="generator")(
        delayed(_joblib_block)(path, name, start, min(start + rows, workload.n_positions)) for start in starts
    )
    with h5py.File(path + ".joblib", "w") as file:
        target = file.create_dataset("Result", (workload.n_positions, workload.width), "f4")
        for start, out in zip(starts, blocks, strict=True):
            target[start : start + len(out)] = np.asarray(out)
    os.unlink(path + ".joblib")


def _joblib_block(path: str, name: str, start: int, stop: int) -> Any:
    import h5py
    import numpy as np

    workload = WORKLOADS[name]
    with h5py.File(path, "r") as file:
        block = file[MAIN][start:stop]
    out = workload.function(block) if workload.vectorized else [workload.function(row) for row in block]
    return np.asarray(out, "f4").reshape(len(block), workload.width)


def dask(path: str, name: str) -> None:
    """Plain dask: from_array, map_blocks, store, on threads."""
    import dask.array as da
    import h5py
    import numpy as np

    workload = WORKLOADS[name]
    rows = max(1, _BLOCK_BYTES // (4 * (workload.n_spectral + workload.width)))

    def block_function(block: Any) -> Any:
        out = workload.function(block) if workload.vectorized else [workload.function(row) for row in block]
        return np.asarray(out, "f4").reshape(len(block), workload.width)

    with h5py.File(path, "r") as source, h5py.File(path + ".dask", "w") as file:
        array = da.from_array(source[MAIN], chunks=(rows, -1))
        result = array.map_blocks(block_function, chunks=(array.chunks[0], (workload.width,)), dtype="f4")
        target = file.create_dataset("Result", (workload.n_positions, workload.width), "f4")
        da.store(result, target, num_workers=2)
    os.unlink(path + ".dask")


def pyusid(path: str, name: str, cores: int = 2) -> None:
    """pyUSID.Process, a subclass as its documentation teaches."""
    import h5py
    import numpy as np
    import pyUSID as usid

    workload = WORKLOADS[name]

    class Benchmark(usid.Process):  # type: ignore[misc]
        def _create_results_datasets(self) -> None:
            from pyUSID.io.hdf_utils import create_results_group, write_main_dataset

            self.h5_results_grp = create_results_group(self.h5_main, self.process_name)
            self.h5_results = write_main_dataset(
                self.h5_results_grp, (workload.n_positions, workload.width), "Result", "Result", "a.u.", None,
                usid.Dimension("Value", "a.u.", workload.width), dtype=np.float32,
                h5_pos_inds=self.h5_main.h5_pos_inds, h5_pos_vals=self.h5_main.h5_pos_vals,
            )  # fmt: skip

        def _write_results_chunk(self) -> None:
            values = np.asarray(self._results, "f4").reshape(-1, workload.width)
            self.h5_results[self._get_pixels_in_current_batch(), :] = values

        @staticmethod
        def _map_function(spectrum: Any) -> Any:
            return workload.function(spectrum[np.newaxis])[0] if workload.vectorized else workload.function(spectrum)

    with h5py.File(path, "r+") as file:
        Benchmark(file[MAIN], "Benchmark", cores=cores).compute(override=True)


CONTENDERS = {
    "limit": limit,
    "lazyproc": lazyproc,
    "joblib": joblib,
    "dask": dask,
    "pyusid": pyusid,
}

if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](sys.argv[3], sys.argv[2])
