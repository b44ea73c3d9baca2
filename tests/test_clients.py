"""Clients that are active where a run begins: in a task of a cluster, in an event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from distributed import Client, get_client, get_worker
from usid_files import make_usid_file

import lazyproc
from lazyproc.core.errors import ArgumentValueError

MEAN = {"Mean": lazyproc.Output("f8")}


def mean_of(address: str, *, with_client: bool = False) -> list[float]:
    """Compute, as a task may."""
    if with_client:
        get_client()
    group = lazyproc.map_positions(np.mean, address, MEAN)
    assert group["completed_positions"][:].all()
    return [float(value) for value in group["Mean"][:, 0]]


@pytest.mark.parametrize("options", [{"processes": False}, {"processes": True}], ids=["threads", "processes"])
def test_runs_in_all_threads_of_a_cluster_do_not_wait_for_each_other(tmp_path: Path, options: dict[str, Any]) -> None:
    """A run in a task computes by itself: the tasks that it would wait for could not begin."""
    addresses = ["::".join(make_usid_file(tmp_path / f"scan-{number}.h5", seed=number)) for number in range(2)]
    with Client(n_workers=1, threads_per_worker=2, dashboard_address=":0", **options) as client:
        computed = client.gather(client.map(mean_of, addresses, with_client=True), asynchronous=False)
    for address, means in zip(addresses, computed, strict=True):
        path, _, name = address.partition("::")
        with h5py.File(path) as file:
            main = file[name][:]
        np.testing.assert_allclose(means, main.mean(axis=1), rtol=1e-6)


def test_an_active_asynchronous_client_is_refused_in_its_event_loop(tmp_path: Path) -> None:
    address = "::".join(make_usid_file(tmp_path / "scan.h5"))

    async def run() -> None:
        async with Client(processes=False, n_workers=1, dashboard_address=":0", asynchronous=True):
            with pytest.raises(ArgumentValueError, match="the active client is an asynchronous one"):
                mean_of(address)
            assert len(await asyncio.to_thread(mean_of, address)) == 20

    asyncio.run(run())


def by_dask_array(row: Any) -> Any:
    import dask.array as da

    return da.from_array(row, chunks=2).mean().compute()


def by_parallel_compute(row: Any) -> Any:
    return np.mean(lazyproc.parallel_compute(row[:, None], np.sum, cores=1))


def by_run_of_its_own(row: Any, folder: str) -> Any:
    path = Path(folder) / f"{int(row[0])}.h5"
    if not path.exists():  # a position may be tried more than once
        inner = "::".join(make_usid_file(path, n_rows=1, n_cols=1, n_spectral=len(row), data=row[None]))
        assert len(mean_of(inner)) == 1
    return row.mean()


def by_worker(row: Any) -> Any:
    assert get_worker().address
    assert get_client().scheduler.address
    return row.mean()


@pytest.mark.timeout(90)
@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
@pytest.mark.parametrize("function", [by_dask_array, by_parallel_compute, by_run_of_its_own, by_worker])
def test_a_function_that_uses_the_cluster_itself(tmp_path: Path, function: Any, processes: bool) -> None:
    """It may do in the first positions, which are tried, what it may in all: they are a task, too."""
    data = np.random.default_rng(2).random((20, 4))
    data[:, 0] = np.arange(20)
    address = "::".join(make_usid_file(tmp_path / "scan.h5", n_rows=4, n_cols=5, n_spectral=4, data=data))
    params = {"folder": str(tmp_path)} if function is by_run_of_its_own else None
    with Client(n_workers=1, threads_per_worker=1, processes=processes, dashboard_address=":0"):
        group = lazyproc.map_positions(function, address, MEAN, params=params, on_error="record")
    assert group["completed_positions"][:].tolist() == [1] * 20
    np.testing.assert_allclose(group["Mean"][:, 0], data.mean(axis=1), rtol=1e-6)
