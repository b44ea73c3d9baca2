"""Clusters whose workers come and go while tasks call for them, or wait in a queue: real ones, of this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster, Scheduler, SpecCluster
from distributed.deploy.spec import ProcessInterface
from usid_files import make_usid_file

import lazyproc
import lazyproc.engine.cluster
import lazyproc.engine.pulse
from lazyproc.core.errors import WorkerError
from lazyproc.core.feed import BlockFeed
from lazyproc.core.runs import Runs
from lazyproc.core.sizing import Division

N_POSITIONS = 240
WAITED = "waiting for workers"
CRASHED = "the function was tried on a few positions in"


class Slow(lazyproc.Process):
    """Takes 50 ms for each position, and notes what it does; the first calls in all take much longer."""

    outputs = {"Mean": lazyproc.Output("f8"), "Worker": lazyproc.Output("i8")}

    @staticmethod
    def _map_function(row: Any, notes: str, n_long: int = 0) -> Any:
        def note(what: str) -> int:
            with open(notes, "a+") as file:
                file.write(f"{what}\n")
                file.seek(0)
                return file.read().count(what)

        time.sleep(1.5 if note("begin") <= n_long else 0.05)
        note("end")
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


def compute(source: str, client: Any, notes: Path, n_long: int = 0) -> set[int]:
    """Compute on a cluster; return who did it. The results must be right."""
    with Slow(source, client=client, parms_dict={"notes": os.fspath(notes), "n_long": n_long}) as process:
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
        assert len(compute(source, client, notes)) >= 2
    assert "the cluster has 2 threads by now, 1 before" in caplog.text


def test_a_worker_that_tries_the_function_is_not_taken_for_idle(source, notes, adapting, caplog):
    with Client(adapting) as client:
        compute(source, client, notes, n_long=2)  # a worker without a task is sent away after 0.6 s
    assert n_calls(notes) == N_POSITIONS
    assert CRASHED not in caplog.text


def test_a_worker_that_is_sent_away_while_it_tries_the_function_is_no_crash(source, notes, adapting, caplog):
    with Client(adapting.scheduler_address) as client:  # which does not know that the cluster adapts
        compute(source, client, notes, n_long=2)
    assert n_calls(notes) > N_POSITIONS  # what was tried was tried again
    assert CRASHED not in caplog.text


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
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
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
    feed.share(200)
    assert feed.rest().n_positions == 10_000 - 30
    blocks = list(feed)
    assert sum(block.n_positions for block in blocks) == 10_000 - 30
    assert blocks[0].n_positions == 8  # 0.8 s: all workers get theirs meanwhile
    assert blocks[-1].n_positions == 2  # 0.2 s: smaller toward the end
    assert all(block.limit is not None for block in blocks)
    assert [block.index for block in blocks] == list(range(3, 3 + len(blocks)))
