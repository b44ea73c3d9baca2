"""Clusters whose workers come and go while tasks call for them, or wait in a queue: real ones, of this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster, SpecCluster, Status
from distributed import Scheduler as DaskScheduler
from distributed.deploy.spec import ProcessInterface
from test_engine import kernel_of
from usid_files import make_usid_file

import lazyproc
import lazyproc.engine.cluster
import lazyproc.engine.pulse
from lazyproc.core.blocks import BlockPlan
from lazyproc.core.errors import WorkerError
from lazyproc.core.events import Started
from lazyproc.core.feed import BlockFeed
from lazyproc.core.runs import Runs
from lazyproc.core.sizing import Division
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.cluster import least_busy
from lazyproc.engine.distant import _ClusterRun

N_POSITIONS = 240
WAITED = "waiting for workers"
CRASHED = "the function was tried on a few positions in"


class Slow(lazyproc.Process):
    """Takes a while for each position, and notes its calls; the first ones in all take much longer."""

    outputs = {"Mean": lazyproc.Output("f8"), "Worker": lazyproc.Output("i8")}

    @staticmethod
    def _map_function(row: Any, notes: str, seconds: float, n_long: int) -> Any:
        with open(notes, "a+") as file:
            file.write("begin\n")
            file.seek(0)
            n_calls = file.read().count("begin")
        time.sleep(1.5 if n_calls <= n_long else seconds)
        return {"Mean": row.mean(), "Worker": os.getpid()}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Give a main dataset."""
    return "::".join(make_usid_file(tmp_path / "scan.h5", n_rows=12, n_cols=20))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Give the file for what the function notes."""
    return tmp_path / "notes"


@pytest.fixture
def adapting() -> Iterator[Any]:
    """Give a cluster without workers, which starts up to two when tasks wait, and ends those without tasks at once."""
    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0") as cluster:
        cluster.adapt(minimum=0, maximum=2, interval="200ms")
        yield cluster


def compute(source: str, client: Any, notes: Path, *, seconds: float = 0.01, n_long: int = 0) -> set[int]:
    """Compute on a cluster; return who did it. The results must be right."""
    parameters = {"notes": os.fspath(notes), "seconds": seconds, "n_long": n_long}
    with Slow(source, client=client, parms_dict=parameters) as process:
        group = process.compute(override=True)
        assert group["completed_positions"][:].all()
        np.testing.assert_array_equal(group["Mean"][:, 0], process.h5_main[:].astype("f4").mean(axis=1))
        return set(group["Worker"][:, 0].tolist())


def n_calls(notes: Path) -> int:
    """Count calls of the function."""
    return notes.read_text().split().count("begin")


def test_a_cluster_that_adapts_to_its_tasks_grows_for_a_run(source, notes, adapting, caplog):
    caplog.set_level(logging.INFO, "lazyproc")
    with Client(adapting) as client:
        assert not client.nthreads()
        assert len(compute(source, client, notes, seconds=0.05)) >= 2
    assert "the cluster has 2 threads by now, 1 before" in caplog.text


@pytest.mark.parametrize("known", [True, False])
def test_a_worker_that_tries_the_function_is_not_taken_for_idle(source, notes, adapting, caplog, known):
    with Client(adapting if known else adapting.scheduler_address) as client:  # who does not know that it adapts
        compute(source, client, notes, n_long=2)  # a worker without a task is sent away after 0.6 s
    assert n_calls(notes) < N_POSITIONS + 2  # what was tried was not tried again
    assert CRASHED not in caplog.text


def test_a_worker_that_is_sent_away_while_it_tries_the_function_is_no_crash(source, notes, caplog):
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster.scheduler_address) as client,
        Client(cluster.scheduler_address, set_as_default=False) as other,
    ):

        def send_away() -> None:
            while not notes.exists():
                time.sleep(0.05)
            other.retire_workers([worker for worker, keys in other.processing().items() if keys])

        helper = threading.Thread(target=send_away)
        helper.start()
        compute(source, client, notes, n_long=2)
        helper.join()
    assert n_calls(notes) > N_POSITIONS  # what was tried was tried again
    assert CRASHED not in caplog.text


class Deadly(lazyproc.Process):
    """Ends its process at one position, so many times; then takes some seconds for it."""

    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row: Any, notes: str, n_deaths: int) -> Any:
        time.sleep(0.02)
        if row[0] == 137:
            with open(notes, "a+") as file:
                file.write("begin\n")
                file.seek(0)
                n_calls = file.read().count("begin")
            if n_calls <= n_deaths:
                time.sleep(0.05)
                os._exit(1)
            Path(notes).with_name("alone").touch()
            time.sleep(3)
        return row.mean()


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Give a main dataset whose first column is the number of the position."""
    data = np.tile(np.arange(240, dtype="f4")[:, None], 4)
    return "::".join(make_usid_file(tmp_path / "scan.h5", n_rows=12, n_cols=20, n_spectral=4, data=data))


def test_a_worker_is_called_for_where_a_block_that_ends_workers_is_alone(numbered, notes, adapting):
    parameters = {"notes": os.fspath(notes), "n_deaths": 1000}
    with Client(adapting) as client, Deadly(numbered, client=client, parms_dict=parameters) as process:
        with pytest.raises(WorkerError, match="workers died each time they had position 137 of"):
            process.compute()
        (found,) = process.partial_h5_groups
        assert np.flatnonzero(found["completed_positions"][:] == 0).tolist() == [137]


def test_a_worker_that_is_sent_away_from_a_block_that_is_alone_was_not_ended_by_it(numbered, notes, monkeypatch):
    monkeypatch.setattr(
        _ClusterRun, "_has_nannies", lambda run: False
    )  # so nothing is halved, and one more death is one too many
    parameters = {"notes": os.fspath(notes), "n_deaths": 4}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster.scheduler_address) as client,
        Client(cluster.scheduler_address, set_as_default=False) as other,
    ):

        def send_away() -> None:
            while not notes.with_name("alone").exists():
                time.sleep(0.05)
            other.retire_workers([worker for worker, keys in other.processing().items() if keys])

        helper = threading.Thread(target=send_away)
        helper.start()
        with Deadly(numbered, client=client, parms_dict=parameters) as process:
            assert process.compute()["completed_positions"][:].all()
        helper.join()
    assert n_calls(notes) == 4 + 2


@pytest.mark.parametrize("pause", [0.0, 2.0])
def test_a_run_that_is_to_stop_takes_back_what_no_worker_has(adapting, pause):
    """Where a cluster adapts much more is given than workers can do at a time; what they have done counts."""
    stopping = threading.Event()
    with Client(adapting) as client:
        run = Scheduler("client", 1, client).run(
            kernel_of(slowly), BlockPlan(Runs.full(400), 1), stopping.is_set, "stopped"
        )
        n_before = n_after = 0
        for receipt in run:
            n_after += receipt is not None and stopping.is_set()
            n_before += receipt is not None and not stopping.is_set()
            if n_before == 60 and not stopping.is_set():
                time.sleep(pause)  # meanwhile the workers finish many, of which nothing is taken
                stopping.set()
    assert n_before == 60
    done_meanwhile = 2 * pause / 0.1
    assert 0.75 * done_meanwhile <= n_after <= done_meanwhile + 20  # two workers, of which each has one or two more


def test_a_worker_that_pauses_is_not_asked():
    with LocalCluster(n_workers=2, processes=False, dashboard_address=":0") as cluster, Client(cluster) as client:
        first = least_busy(client)
        assert first is not None
        client.run(pause, workers=[first])
        deadline = time.monotonic() + 30
        while least_busy(client) == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert least_busy(client) not in (None, first)


def pause(dask_worker: Any) -> None:
    """Have a worker begin nothing, as it does for lack of memory."""
    dask_worker.status = Status.paused


def test_a_cluster_that_grows_when_memory_is_scarce_ends_no_run(source, notes, monkeypatch, caplog):
    """What the run itself takes is no longer available, and must not be counted twice."""
    caplog.set_level(logging.INFO, "lazyproc")
    monkeypatch.setattr(lazyproc.engine.pulse, "_BUSY_SECONDS", 0.2)
    available = psutil.virtual_memory()
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        parameters = {"notes": os.fspath(notes), "seconds": 0.05, "n_long": 0}
        with Slow(source, client=client, parms_dict=parameters) as process:

            def grow(event: Any) -> None:
                if isinstance(event, Started):
                    monkeypatch.setattr(psutil, "virtual_memory", lambda: available._replace(available=10 * 2**20))
                    cluster.scale(3)

            process._progress = grow
            assert process.compute()["completed_positions"][:].all()
    assert "threads by now, 1 before" in caplog.text


def slowly(row: Any) -> Any:
    """Return the position's number, which takes a while."""
    time.sleep(0.1)
    return row[0]


class Job(ProcessInterface):
    """A worker that is asked for at once, and comes when a queue lets it; as those of job clusters."""

    def __init__(self, scheduler: str, name: str, queued_seconds: float) -> None:
        super().__init__(scheduler=scheduler, name=name)
        self.scheduler, self.name, self.queued_seconds = scheduler, name, queued_seconds
        self.process: Any = None

    async def start(self) -> None:
        await super().start()
        worker = f"import time; time.sleep({self.queued_seconds}); from distributed.cli.dask_worker import main; main()"
        arguments = [self.scheduler, "--name", str(self.name), "--nthreads", "1", "--no-dashboard", "--no-nanny"]
        self.process = subprocess.Popen([sys.executable, "-c", worker, *arguments])

    async def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        await super().close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for 2 s where a minute is the rule."""
    for module in (lazyproc.engine.cluster, lazyproc.engine.pulse):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(lazyproc.engine.cluster, "_TELL_SECONDS", 0.5)


def test_workers_that_wait_in_a_queue_are_waited_for(source, notes, impatient, caplog):
    scheduler = {"cls": DaskScheduler, "options": {"dashboard_address": ":0"}}
    worker = {"cls": Job, "options": {"queued_seconds": 4.0}}
    with SpecCluster(workers={"0": worker}, scheduler=scheduler) as cluster, Client(cluster) as client:
        assert not client.nthreads()
        compute(source, client, notes)
    assert WAITED in caplog.text


def test_workers_that_nobody_has_asked_for_are_not_waited_for(source, notes, impatient, caplog):
    with LocalCluster(n_workers=0, dashboard_address=":0") as cluster, Client(cluster) as client:
        with pytest.raises(WorkerError, match=r"has no workers, and none joined within 2 s\. Start workers"):
            compute(source, client, notes)
    assert WAITED in caplog.text
    assert not notes.exists()


def test_what_is_left_is_divided_among_the_workers_that_are_there():
    division = Division(
        memory_rows=10**6, n_workers=1, align=1, bytes_per_position=8, preferred_bytes=10**9, interval=10
    )
    feed = BlockFeed(
        division.plan(Runs.full(10_000), 0.1), 0.1, lambda rest, seconds: larger.plan(rest, seconds), n_workers=1
    )
    alone = [next(feed) for _ in range(3)]
    assert {block.n_positions for block in alone} == {10}
    assert all(block.limit is None for block in alone)  # nobody else could do what a block would give back
    larger = Division(**{**vars(division), "n_workers": 200})
    feed.share(200, most=10**6)
    assert feed.rest().n_positions == 10_000 - 30
    blocks = list(feed)
    assert sum(block.n_positions for block in blocks) == 10_000 - 30
    assert blocks[0].n_positions == 8  # 0.8 s: all workers get theirs meanwhile
    assert blocks[-1].n_positions == 2  # 0.2 s: smaller toward the end
    assert all(block.limit is not None for block in blocks)
    assert [block.index for block in blocks] == list(range(3, 3 + len(blocks)))
