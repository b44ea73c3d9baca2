"""Clients that are active where a run begins: in a task of a cluster, in an event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from distributed import Client, get_client
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
