"""`max_mem_mb` on a cluster: workers find out what their blocks take, and the driver learns from it."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from distributed import Client, LocalCluster, SpecCluster, Worker
from distributed import Scheduler as DaskScheduler
from usid_files import make_usid_file

import lazyproc
from lazyproc.core.errors import MemoryLimitError
from lazyproc.core.highwater import can_measure
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.cluster import most_on_machine, tells_memory

N_POSITIONS = 240
measures = pytest.mark.skipif(not can_measure(), reason="the system keeps no high-water mark that can be taken back")


def take(mib: float) -> None:
    """Take memory from the C library for a moment."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = int(mib * 2**20)
    address = libc.malloc(size)
    libc.memset(address, 1, size)
    libc.free(address)


class Hungry(lazyproc.Process):
    """Takes memory at positions that the probe does not try, and notes when it is called."""

    outputs = {"Number": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row: Any, mib: float, notes: str) -> Any:
        begin = time.monotonic()
        take(mib if 140 < row[0] < 190 else 0.01)
        time.sleep(0.02)
        with open(notes, "a") as file:
            file.write(f"{int(row[0])} {os.getpid()} {begin} {time.monotonic()}\n")
        return row[0]


class HungryBlocks(lazyproc.Process):
    """Takes twenty times the source from the position 1000 on, and notes how large its blocks are."""

    outputs = {"Number": lazyproc.Output("f8")}

    @staticmethod
    def _block_function(block: Any, notes: str) -> Any:
        if block[0, 0] >= 1000:
            take(20 * block.nbytes / 2**20)
        with open(notes, "a") as file:
            file.write(f"{int(block[0, 0])} {len(block)}\n")
        return block[:, 0].astype(float)


def make_scan(folder: Path, n_rows: int, n_cols: int, n_spectral: int) -> str:
    """Make a file of positions that begin with their numbers; return the main dataset's address."""
    data = np.zeros((n_rows * n_cols, n_spectral), "f4")
    data[:, 0] = np.arange(n_rows * n_cols)
    made = make_usid_file(folder / "scan.h5", n_rows=n_rows, n_cols=n_cols, n_spectral=n_spectral, data=data)
    return "::".join(made)


@pytest.fixture
def scan(tmp_path: Path) -> str:
    return make_scan(tmp_path, 12, 20, 8)


@pytest.fixture(params=[(2, 1), (1, 2)], ids=["two processes", "two threads"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    n_workers, threads = request.param
    with Client(n_workers=n_workers, threads_per_worker=threads, dashboard_address=":0") as client:
        yield client


@measures
def test_one_position_that_does_not_fit_ends_the_run_as_it_does_locally(
    scan: str, tmp_path: Path, client: Client
) -> None:
    parameters = {"mib": 300.0, "notes": str(tmp_path / "notes")}
    with Hungry(scan, client=client, parms_dict=parameters, max_mem_mb=128) as process:
        with pytest.raises(MemoryLimitError, match="128 MiB are allowed, but Hungry was found to take") as caught:
            process.compute()
        assert "What is finished is kept" in str(caught.value)
        needed = int(str(caught.value).rpartition("Raise max_mem_mb to ")[2].split()[0])
        shared = max(client.ncores().values()) > 1  # the mark, by the blocks of a process: it may show a part of it
        assert (128 if shared else 300) < needed < 700
    with h5py.File(scan.partition("::")[0]) as file:
        (group,) = (one for name, one in file["/Measurement_000/Channel_000"].items() if "-Hungry" in name)
        done = group["completed_positions"][()].astype(bool)
        assert 50 < done.sum() < N_POSITIONS
        np.testing.assert_array_equal(group["Number"][done, 0], np.flatnonzero(done))


@measures
def test_fewer_blocks_are_given_if_one_position_takes_more_than_its_share(
    scan: str, tmp_path: Path, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = {"mib": 60.0, "notes": str(tmp_path / "notes")}
    with caplog.at_level(logging.WARNING, "lazyproc"):
        with Hungry(scan, client=client, parms_dict=parameters, max_mem_mb=110) as process:
            group = process.compute()
            np.testing.assert_array_equal(group["Number"][:, 0], np.arange(N_POSITIONS))
    assert "1 at a time" in caplog.text
    calls = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    late = sorted((float(begin), float(end)) for number, _, begin, end in calls if int(number) >= 210)
    assert len(late) == 30
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(late)), "one after the other"


@measures
def test_blocks_become_smaller_if_they_take_more_than_the_probe_saw(tmp_path: Path) -> None:
    scan = make_scan(tmp_path, 52, 100, 2048)
    notes = tmp_path / "notes"
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=":0") as client:
        with HungryBlocks(scan, client=client, parms_dict={"notes": str(notes)}, max_mem_mb=40) as process:
            group = process.compute()
            np.testing.assert_array_equal(group["Number"][:, 0], np.arange(5200))
    sizes = dict(tuple(map(int, line.split())) for line in notes.read_text().splitlines())
    assert max(size for start, size in sizes.items() if 100 < start < 1000) > 100
    assert max(size for start, size in sizes.items() if start >= 3900) <= 43, "twenty times the source fits"


def test_the_machine_with_the_most_threads_counts() -> None:
    """Two workers at one address, and one at another, as on two machines."""
    there = [("127.0.0.1", 2), ("127.0.0.1", 3), ("127.0.0.2", 4)]
    workers = {
        number: {"cls": Worker, "options": {"host": host, "nthreads": threads, "dashboard": False}}
        for number, (host, threads) in enumerate(there)
    }
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False}
    with SpecCluster(workers, {"cls": DaskScheduler, "options": options}) as cluster, Client(cluster) as client:
        client.wait_for_workers(3, timeout=60)
        assert most_on_machine(client) == 5
        scheduler = Scheduler.on_cluster(client)
        assert (scheduler.n_workers, scheduler.n_on_machine) == (9, 5)
        assert scheduler.with_workers(4).most == 4


@pytest.mark.parametrize(
    ("options", "can"),
    [({"processes": False}, False), ({"threads_per_worker": 17}, False), ({"threads_per_worker": 2}, True)],
)
def test_who_can_tell_what_a_block_takes(options: dict[str, Any], can: bool) -> None:
    with LocalCluster(n_workers=1, dashboard_address=":0", **options) as cluster, Client(cluster) as client:
        client.wait_for_workers(1, timeout=60)
        assert tells_memory(client) is can
