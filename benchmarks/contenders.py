"""What is compared: lazyproc, and what a person would write instead. Each is run in a fresh process, start-up included.

    python benchmarks/contenders.py CONTENDER WORKLOAD FILE            compute
    python benchmarks/contenders.py CONTENDER WORKLOAD FILE --count    and print tasks and bytes of graphs as JSON
    python benchmarks/contenders.py CONTENDER WORKLOAD FILE --prepare  do the share that is to be done beforehand

Each leaves the results in a file, as a person would want them. Nothing is counted in a run that is timed.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from counting import start_counting
from workloads import MAIN, WORKLOADS, Workload

_BLOCK_BYTES = 8 * 2**20


def block_rows(workload: Workload) -> int:
    """Return the positions of a block: 8 MiB of source and results, and four blocks a process at least."""
    rows = _BLOCK_BYTES // (4 * (workload.n_spectral + workload.width))
    rows = max(1, min(rows, int(workload.n_positions * (1 - workload.done)) // 8))
    return max(64, rows - rows % 64) if workload.compression else rows


def compute_block(workload: Workload, block: Any) -> Any:
    """Return the results of a block, float32 `(n_positions, width)`."""
    import numpy as np

    function = workload.function
    out = function(block) if workload.vectorized else [function(row) for row in block]
    return np.ascontiguousarray(np.asarray(out, "f4").reshape(len(block), workload.width))


def limit(path: str, name: str, cores: int = 2) -> None:
    """The limit: two forked processes, each pread (h5py if filtered), kernel, pwrite over its half; no checkpoints."""
    import h5py
    import numpy as np

    workload = WORKLOADS[name]
    with h5py.File(path, "r") as file:
        offset = file[MAIN].id.get_offset()
    result = path + ".limit"
    with open(result, "wb") as file:
        file.truncate(workload.n_positions * workload.width * 4)
    rows = block_rows(workload)
    begin = int(workload.n_positions * workload.done)
    half = begin + (workload.n_positions - begin) // 2 // 64 * 64
    parts = [(begin, half), (half, workload.n_positions)] if cores == 2 else [(begin, workload.n_positions)]
    children = []
    for start, stop in parts:
        child = os.fork()
        if child == 0:
            source = h5py.File(path, "r")[MAIN] if offset is None else os.open(path, os.O_RDONLY)
            target = os.open(result, os.O_RDWR)
            buffer = np.empty((rows, workload.n_spectral), "f4")
            for first in range(start, stop, rows):
                block = buffer[: min(rows, stop - first)]
                if offset is None:
                    source.read_direct(block, np.s_[first : first + len(block)])
                else:
                    os.preadv(source, [block.data.cast("B")], offset + first * workload.n_spectral * 4)
                os.pwrite(target, compute_block(workload, block).data.cast("B"), first * workload.width * 4)
            os._exit(0)
        children.append(child)
    for child in children:
        _, code = os.waitpid(child, 0)
        assert code == 0
    os.unlink(result)


def limit_1(path: str, name: str) -> None:
    """The same with one process, to see what a second core gives where nothing else is in the way."""
    limit(path, name, 1)


def h5py_alone(path: str, name: str) -> None:
    """h5py in one process: what a person writes first, and what reading a filtered source through HDF5 costs."""
    import h5py

    workload = WORKLOADS[name]
    rows = block_rows(workload)
    with h5py.File(path, "r") as source, h5py.File(path + ".h5py", "w") as file:
        result = file.create_dataset("Result", (workload.n_positions, workload.width), "f4")
        for start in range(int(workload.n_positions * workload.done), workload.n_positions, rows):
            result[start : start + rows] = compute_block(workload, source[MAIN][start : start + rows])
    os.unlink(path + ".h5py")


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
        override=not workload.done,
    )


def lazyproc_1(path: str, name: str) -> None:
    """lazyproc on one core."""
    lazyproc(path, name, cores=1)


def prepare(path: str, name: str, compute: Callable[[str, str], None]) -> None:
    """Leave a file in which a share of the work is done, as a run that was killed leaves it: less of it is marked."""
    import h5py

    compute(path, name)
    workload = WORKLOADS[name]
    with h5py.File(path, "r+") as file:
        groups = [item for item in file[MAIN].parent.values() if isinstance(item, h5py.Group)]
        (mask,) = [group["completed_positions"] for group in groups if "completed_positions" in group]
        mask[int(workload.n_positions * workload.done) :] = 0


def joblib(path: str, name: str) -> None:
    """joblib over blocks, results written by the parent through h5py."""
    import h5py
    from joblib import Parallel, delayed

    workload = WORKLOADS[name]
    rows = block_rows(workload)
    starts = range(int(workload.n_positions * workload.done), workload.n_positions, rows)
    blocks = Parallel(n_jobs=2, return_as="generator")(
        delayed(_joblib_block)(path, name, start, min(start + rows, workload.n_positions)) for start in starts
    )
    with h5py.File(path + ".joblib", "w") as file:
        target = file.create_dataset("Result", (workload.n_positions, workload.width), "f4")
        for start, out in zip(starts, blocks, strict=True):
            target[start : start + len(out)] = out
    os.unlink(path + ".joblib")


def _joblib_block(path: str, name: str, start: int, stop: int) -> Any:
    import h5py

    with h5py.File(path, "r") as file:
        block = file[MAIN][start:stop]
    return compute_block(WORKLOADS[name], block)


def dask(path: str, name: str) -> None:
    """Plain dask: from_array, map_blocks, store, on threads."""
    import dask.array as da
    import h5py

    workload = WORKLOADS[name]
    with h5py.File(path, "r") as source, h5py.File(path + ".dask", "w") as file:
        array = da.from_array(source[MAIN], chunks=(block_rows(workload), -1))
        array = array[int(workload.n_positions * workload.done) :]
        result = array.map_blocks(
            lambda block: compute_block(workload, block), chunks=(array.chunks[0], (workload.width,)), dtype="f4"
        )
        target = file.create_dataset("Result", result.shape, "f4")
        da.store(result, target, num_workers=2)
    os.unlink(path + ".dask")


def xarray(path: str, name: str) -> None:
    """xarray's apply_ufunc over a dask-backed array, stored as Zarr."""
    import shutil

    import dask
    import dask.array as da
    import h5py
    import xarray as xr

    workload = WORKLOADS[name]
    with h5py.File(path, "r") as source, dask.config.set(num_workers=2):
        data = xr.DataArray(
            da.from_array(source[MAIN], chunks=(block_rows(workload), -1)), dims=("position", "spectral")
        )[int(workload.n_positions * workload.done) :].chunk(
            {"position": block_rows(workload)}
        )  # Zarr wants them equal
        result = xr.apply_ufunc(
            lambda block: compute_block(workload, block),
            data,
            input_core_dims=[["spectral"]],
            output_core_dims=[["value"]],
            dask="parallelized",
            output_dtypes=["f4"],
            dask_gufunc_kwargs={"output_sizes": {"value": workload.width}},
        )
        result.to_dataset(name="Result").to_zarr(path + ".zarr", mode="w")
    shutil.rmtree(path + ".zarr")


def hyperspy(path: str, name: str) -> None:
    """HyperSpy's lazy map, one position at a time as HyperSpy does it, stored through dask into HDF5."""
    import dask.array as da
    import h5py
    import numpy as np
    from hyperspy.signals import Signal1D

    workload = WORKLOADS[name]
    with h5py.File(path, "r") as source, h5py.File(path + ".hyperspy", "w") as file:
        array = da.from_array(source[MAIN], chunks=(block_rows(workload), -1))
        lazy = Signal1D(array[int(workload.n_positions * workload.done) :]).as_lazy()

        size = (workload.width,) if workload.width > 1 else ()  # (1,) ends in an IndexError with HyperSpy 2.5

        def one(row: Any) -> Any:
            return compute_block(workload, row[np.newaxis])[0].reshape(size)

        result = lazy.map(
            one, inplace=False, lazy_output=True, output_signal_size=size, output_dtype="f4", ragged=False
        )
        values = np.asarray(result.data.compute(num_workers=2))
        file["Result"] = values.reshape(len(array) - int(workload.n_positions * workload.done), workload.width)
    os.unlink(path + ".hyperspy")


def sidpy(path: str, name: str) -> None:
    """sidpy's fitter, which is for fits only; its own client of two processes."""
    import h5py
    import numpy as np
    import sidpy as package
    from sidpy.proc.fitter import SidFitter

    workload = WORKLOADS[name]
    assert name.startswith("fit")
    x = np.linspace(-1, 1, workload.n_spectral)

    def gaussian(x: Any, height: float, place: float, width: float, ground: float) -> Any:
        return height * np.exp(-(((x - place) / width) ** 2)) + ground

    with h5py.File(path, "r") as file:
        data = package.Dataset.from_array(file[MAIN][:])
    data.set_dimension(0, package.Dimension(np.arange(len(data)), "position", dimension_type="spatial"))
    data.set_dimension(1, package.Dimension(x, "x", dimension_type="spectral"))
    fitter = SidFitter(data, gaussian, guess_fn=lambda x, y: [1.0, 0.0, 0.3, 0.0], num_fit_parms=4, ind_dims=(0,))
    with h5py.File(path + ".sidpy", "w") as file:
        file["Result"] = np.asarray(fitter.do_fit()[0], "f4")
    os.unlink(path + ".sidpy")


def pyusid(path: str, name: str, cores: int = 2) -> None:
    """pyUSID.Process, a subclass as its documentation teaches, which can resume."""
    import h5py
    import numpy as np

    if not hasattr(np, "product"):
        np.product = np.prod  # type: ignore[attr-defined]  # which NumPy 2 has dropped, and pyUSID 0.0.12 calls
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

        def _get_existing_datasets(self) -> None:
            self.h5_results = self.h5_results_grp["Result"]

        def _write_results_chunk(self) -> None:
            values = np.asarray(self._results, "f4").reshape(-1, workload.width)
            self.h5_results[self._get_pixels_in_current_batch(), :] = values

        _map_function = staticmethod(functools.partial(_pyusid_map, name))  # which joblib can pickle

    with h5py.File(path, "r+") as file:
        Benchmark(file[MAIN], "Benchmark", cores=cores).compute(override=not workload.done)


def _pyusid_map(name: str, spectrum: Any) -> Any:
    workload = WORKLOADS[name]
    return workload.function(spectrum[None])[0] if workload.vectorized else workload.function(spectrum)


def pyusid_1(path: str, name: str) -> None:
    """pyUSID.Process on one core."""
    pyusid(path, name, cores=1)


CONTENDERS = {
    "limit": limit,
    "limit-1": limit_1,
    "lazyproc": lazyproc,
    "lazyproc-1": lazyproc_1,
    "h5py": h5py_alone,
    "joblib": joblib,
    "dask": dask,
    "xarray": xarray,
    "hyperspy": hyperspy,
    "sidpy": sidpy,
    "pyusid": pyusid,
    "pyusid-1": pyusid_1,
}
RESUMES = ["lazyproc", "lazyproc-1", "pyusid", "pyusid-1"]
"""Those that find what is done already in the file, by their status masks; to others only the rest is given."""


def main() -> None:
    """Run a contender."""
    name, workload, path, *how = sys.argv[1:]
    assert callable(WORKLOADS[workload].function), "imported now, where a script has its imports"
    counts = start_counting() if "--count" in how else None
    if "--prepare" in how:
        prepare(path, workload, CONTENDERS[name])
    else:
        CONTENDERS[name](path, workload)
    if counts is not None:
        sys.stdout.write(json.dumps(counts.told()) + "\n")


if __name__ == "__main__":
    main()
