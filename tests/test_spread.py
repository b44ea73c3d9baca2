"""Calls spread over a cluster come back in order, and all are done, whatever becomes of it; so chunks are encoded."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import h5py
import numpy as np
import pytest
from distributed import Client, LocalCluster
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core import compression
from lazyproc.engine.spread import Spread

MAIN = f"{CHANNEL}/Raw_Data"
HERE = os.getpid()


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def only_here(here: int, number: int) -> int:
    if os.getpid() != here:
        raise OSError("no such file on this machine")
    return number


def fails_at_three(number: int) -> int:
    if number == 3:
        raise ZeroDivisionError("three")
    return number


def ends_its_worker(here: int, number: int) -> int:
    if number == 5 and os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        yield client


@pytest.mark.parametrize("most", [1, 5, 1000])
def test_workers_do_it_and_the_order_stays(client: Client, most: int) -> None:
    answers = list(Spread(client, most)(square, range(50)))
    assert [square for square, _ in answers] == [number * number for number in range(50)]
    assert HERE not in {pid for _, pid in answers}


def test_no_more_than_so_many_are_under_way(client: Client) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(30):
            taken.append(number)
            yield number

    for n_done, _ in enumerate(Spread(client, 4)(square, items()), start=1):
        assert len(taken) <= n_done + 3


def test_what_workers_cannot_do_is_done_here(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    assert list(Spread(client, 4)(partial(only_here, HERE), range(20))) == list(range(20))
    (record,) = [one for one in caplog.records if one.name == "lazyproc"]
    assert "no such file on this machine" in record.message


def test_what_fails_here_too_is_raised(client: Client) -> None:
    with pytest.raises(ZeroDivisionError, match="three"):
        list(Spread(client, 4)(fails_at_three, range(20)))


def test_a_call_that_ends_workers_is_done_here(client: Client) -> None:
    assert list(Spread(client, 4)(partial(ends_its_worker, HERE), range(20))) == list(range(20))


def test_a_client_that_is_closed_meanwhile() -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        answers = Spread(client, 4)(square, range(12))
        first = [next(answers) for _ in range(3)]
        client.close()
        rest = list(answers)
    assert [square for square, _ in first + rest] == [number * number for number in range(12)]
    assert rest[-1][1] == HERE


def test_nothing_is_left_on_the_cluster(client: Client) -> None:
    def kept() -> list[Any]:
        return client.run_on_scheduler(lambda dask_scheduler: [key for key in dask_scheduler.tasks])

    answers = Spread(client, 8)(square, range(100))
    next(answers)
    answers.close()
    list(Spread(client, 8)(square, range(20)))
    deadline = time.monotonic() + 20
    while any("lazyproc-encode" in str(key) for key in kept()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [key for key in kept() if "lazyproc-encode" in str(key)] == []


class Twice(lazyproc.Process):
    outputs = {
        "Twice": lazyproc.Output("f8", shape_from_main=True, compression="gzip", shuffle=True),
        "Mean": lazyproc.Output("f8"),
    }

    @staticmethod
    def _block_function(block: Any) -> Any:
        return 2 * block, block.mean(axis=1)


@pytest.mark.parametrize("by", ["path", "handle"])
def test_results_are_compressed_by_the_workers(
    tmp_path: Any, client: Client, by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compression, "CHUNK_BYTES", 2**12)
    caplog.set_level(logging.INFO)
    data = np.random.default_rng(1).integers(0, 99, (400, 64)).astype("f8")
    path, _ = make_usid_file(tmp_path / "scan.h5", n_rows=20, n_cols=20, n_spectral=64, data=data, dtype="f8")
    done: list[str] = []
    monkeypatch.setattr(Spread, "_end", _counting(Spread._end, done))
    with h5py.File(path, "r+" if by == "handle" else "r") as file:
        main = file[MAIN] if by == "handle" else f"{path}::{MAIN}"
        with Twice(main, "Twice", client=client) as process:
            group = process.compute()
            assert (group["Twice"][:] == 2 * data).all()
            assert (group["Twice"].compression, group["Twice"].shuffle) == ("gzip", True)
            assert len(done) == group["Twice"].id.get_num_chunks() > 40
    assert "compressed, by the workers of the cluster" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["scan.h5"]


def _counting(original: Any, done: list[str]) -> Any:
    def end(self: Any, call: Any, item: Any, future: Any) -> Any:
        done.append(future.key)
        return original(self, call, item, future)

    return end
