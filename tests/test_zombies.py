"""Workers of an external cluster whose driver was killed: nothing that they still write may appear anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from distributed import Client
from usid_files import CHANNEL, make_usid_file

from lazyproc.core.blocks import Block
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.holder import holder
from lazyproc.hdf5.lock import Fence, FencedError
from lazyproc.hdf5.on_disk import find_extent
from lazyproc.hdf5.sidecar import sidecar
from lazyproc.hdf5.sink import Sink
from lazyproc.status import file_status

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning:distributed", "ignore::DeprecationWarning:distributed")

MAIN = f"{CHANNEL}/Raw_Data"
MASK = "completed_positions"
N_POSITIONS = 60
N_SPECTRAL = 64
FIRST_GATED = 30
RUBBISH = 0xAB

CLUSTER = """
import sys
import distributed

if __name__ == "__main__":
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.readline()
"""

DRIVER = """
import json, sys
import h5py, lazyproc
from distributed import Client

address, path, main, folder, by_path = json.loads(sys.argv[1])

def measure(row, folder, seen=[]):
    import os, time
    from pathlib import Path
    from distributed import get_worker

    folder, position = Path(folder), int(row[0])
    time.sleep(0.003)
    if not str(get_worker().get_current_task()).startswith("try-"):  # as a few positions are before
        if not seen:  # once a run and worker: what is left of an older run stays with its own gate
            seen.append((folder / "phase").read_text())
        phase = seen[0]
        with open(folder / f"called_{phase}", "a") as file:
            file.write(f"{position} {os.getpid()}\\n")
        while position >= 30 and not (folder / f"gate_{phase}").exists():
            time.sleep(0.01)
    return {"Mean": row.mean(), "Twice": 2 * row}

outputs = {"Mean": lazyproc.Output("f8"), "Twice": lazyproc.Output("f4", shape_from_main=True)}
with Client(address) as client:
    options = dict(client=client, checkpoint_interval=0.05, params={"folder": folder})
    if by_path:
        group = lazyproc.map_positions(measure, f"{path}::{main}", outputs, **options)
    else:
        with h5py.File(path, "r+") as file:
            lazyproc.map_positions(measure, file[main], outputs, **options)
print("finished", flush=True)
"""


def raw_data() -> np.ndarray:
    data = np.random.default_rng(4).standard_normal((N_POSITIONS, N_SPECTRAL))
    data[:, 0] = np.arange(N_POSITIONS)
    return data


class Stage:
    """A cluster in processes of its own, a scan, and drivers that are started on it; gates hold the function back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = str(folder / "scan.h5")
        make_usid_file(self.path, n_rows=6, n_cols=10, n_spectral=N_SPECTRAL, data=raw_data())
        (folder / "cluster.py").write_text(CLUSTER)
        (folder / "driver.py").write_text(DRIVER)
        self.drivers: list[subprocess.Popen[str]] = []
        self.set_phase("one")
        self.cluster = self._start("cluster.py")
        assert self.cluster.stdout is not None
        self.address = self.cluster.stdout.readline().strip()

    def _start(self, script: str, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.folder / script), *args]
        pipe = subprocess.PIPE
        folders = [
            os.path.dirname(__file__),
            os.environ.get("PYTHONPATH", ""),
        ]  # the first for `_write`, on the cluster
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
        environment["DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT"] = "5s"  # how long a dead cluster is tried
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment
        )

    def set_phase(self, phase: str) -> None:
        temporary = self.folder / "new_phase"
        temporary.write_text(phase)
        os.replace(temporary, self.folder / "phase")

    def open_gate(self, phase: str) -> None:
        (self.folder / f"gate_{phase}").touch()

    def called(self, phase: str) -> list[int]:
        path = self.folder / f"called_{phase}"
        return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []

    def start_driver(self, *, by_path: bool = True) -> subprocess.Popen[str]:
        arguments = [self.address, self.path, MAIN, str(self.folder), by_path]
        self.drivers.append(self._start("driver.py", json.dumps(arguments)))
        return self.drivers[-1]

    def wait_until_held_back(self, phase: str) -> list[int]:
        """Wait until both workers stand before the gate; return their positions."""
        wait_for(lambda: sum(position >= FIRST_GATED for position in self.called(phase)) == 2)
        wait_for(lambda: self.n_done() > 0)
        time.sleep(0.3)  # for what was finished before to be committed
        return [position for position in self.called(phase) if position >= FIRST_GATED]

    def n_done(self) -> int:
        return sum(one.n_done for one in file_status(self.path).results)

    def kill_driver_with_zombies(self, *, by_path: bool = True) -> list[int]:
        """Leave two workers behind that will write as soon as the gate opens; return the positions they are at."""
        driver = self.start_driver(by_path=by_path)
        positions = self.wait_until_held_back("one")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        return positions

    def wait_for_workers(self) -> None:
        """Wait until each worker thread has ended what it was doing."""
        with Client(self.address) as client:
            workers = list(client.nthreads())
            assert len(workers) == 2
            client.gather([client.submit(os.getpid, workers=[one], pure=False) for one in workers])

    def end(self) -> None:
        for process in (*self.drivers, self.cluster):
            members = [one for one in psutil.process_iter() if session_of(one.pid) == process.pid]
            for one in members:
                one.kill()
            process.communicate()


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.end()


def results_of(file: h5py.File) -> h5py.Group:
    (name,) = [name for name in file[CHANNEL] if name.startswith("Raw_Data-")]
    return file[CHANNEL][name]


def check(path: str, *, complete: bool) -> np.ndarray:
    """Compare what is marked done with a plain loop; return which positions that are."""
    data = raw_data()
    with h5py.File(path) as file:
        group = results_of(file)
        done = group[MASK][:].astype(bool)
        assert done.all() or not complete
        assert (group["Mean"][:, 0][done] == np.array([row.mean() for row in data])[done]).all()
        assert (group["Twice"][:][done] == np.array([2 * row for row in data]).astype("f4")[done]).all()
        assert (file[MAIN][:] == data).all()
        if not complete:
            assert np.isnan(group["Mean"][:, 0][~done]).all(), "nothing is written that is not marked, at rest"
    return done


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "handle"])
@pytest.mark.parametrize("keeps_open", [False, True], ids=["closed again", "still open"])
def test_a_file_that_has_moved_on_is_not_written(stage: Stage, by_path: bool, keeps_open: bool) -> None:
    """Another program deletes the results and puts other data where they were; then the workers wake up."""
    stage.kill_driver_with_zombies(by_path=by_path)
    with h5py.File(stage.path, "r+") as file:
        group = results_of(file)
        room = [(group[name].id.get_offset(), group[name].id.get_storage_size()) for name in ("Mean", "Twice")]
        name = group.name
        del group  # an object that is open keeps its room
        del file[name]
        for number in range(6):
            file.create_dataset(f"Rubbish_{number}", data=np.full(4096, RUBBISH, "u1"))
        file.flush()
        taken = {rubbish.id.get_offset() for rubbish in file.values() if isinstance(rubbish, h5py.Dataset)}
        assert any(start <= offset < start + size for offset in taken for start, size in room)
        if keeps_open:
            before = Path(stage.path).read_bytes()
            stage.open_gate("one")
            stage.wait_for_workers()
            assert Path(stage.path).read_bytes() == before
    before = Path(stage.path).read_bytes()
    stage.open_gate("one")
    stage.wait_for_workers()
    assert Path(stage.path).read_bytes() == before
    with h5py.File(stage.path) as file:
        assert all((file[f"Rubbish_{number}"][:] == RUBBISH).all() for number in range(6))
        assert (file[MAIN][:] == raw_data()).all()


def test_nobody_took_over(stage: Stage) -> None:
    """The driver is dead and the file as it left it: the workers do not write, since nobody would ever mark it."""
    positions = stage.kill_driver_with_zombies()
    before = Path(stage.path).read_bytes()
    stage.open_gate("one")
    stage.wait_for_workers()
    assert Path(stage.path).read_bytes() == before
    assert not check(stage.path, complete=False)[positions].any()


def test_the_gate_alone_does_not_keep_them(stage: Stage) -> None:
    """The control: with their driver alive, the same workers do write once the gate opens."""
    driver = stage.start_driver()
    stage.wait_until_held_back("one")
    stage.open_gate("one")
    output, errors = driver.communicate(timeout=60)
    assert "finished" in output, errors
    check(stage.path, complete=True)
    assert len(stage.called("one")) == len({*stage.called("one")})


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "handle"])
def test_a_new_driver_on_the_same_cluster(stage: Stage, by_path: bool) -> None:
    """It resumes while the old workers are still at it; what they bring too late is refused, not mixed in."""
    positions = stage.kill_driver_with_zombies(by_path=by_path)
    old = run_of(stage.path)
    n_done = stage.n_done()
    stage.set_phase("two")
    driver = stage.start_driver(by_path=by_path)
    wait_for(lambda: holder(stage.path) is not None)
    wait_for(lambda: run_of(stage.path) != old)
    assert (holder(stage.path) or {})["pid"] == driver.pid

    stage.open_gate("one")
    wait_for(lambda: len([one for one in stage.called("two") if one >= FIRST_GATED]) == 2)
    with fresh(stage.path) as file:
        group = results_of(file)
        assert np.isnan(group["Mean"][:, 0][positions]).all(), "the old workers have left, and written nothing"
        assert group[MASK][:].sum() >= n_done
        assert_refused(stage, group, old)

    stage.open_gate("two")
    output, errors = driver.communicate(timeout=60)
    assert "finished" in output, errors
    check(stage.path, complete=True)
    assert sorted(stage.called("two")) == sorted({*stage.called("two")}), "none twice"
    assert {*positions} <= {*stage.called("two")}, "what the old workers had under way is computed by the new ones"
    assert len(stage.called("two")) == N_POSITIONS - n_done


def run_of(path: str) -> str:
    """Return the run that may write."""
    return Path(sidecar(path, "fence")).read_text()


def fresh(path: str) -> Any:
    """Look at what is on disk, whoever has the file open."""
    return _Fresh(path)


class _Fresh:
    def __init__(self, path: str) -> None:
        self.path, self.files = path, Files()

    def __enter__(self) -> h5py.File:
        return self.files.open(self.path)

    def __exit__(self, *exception: object) -> None:
        self.files.close()


def sink_of(path: str, group: h5py.Group, run_id: str) -> Sink:
    extents = [find_extent(group[name], path) for name in ("Mean", "Twice")]
    fence = Fence(sidecar(path, "lock"), sidecar(path, "fence"), run_id)
    return Sink(tuple(one for one in extents if one is not None), fence, shares_lock=False)


def assert_refused(stage: Stage, group: h5py.Group, old: str) -> None:
    """Let workers of the cluster write for the old run, which is refused, and for the present one, which is not."""
    data = raw_data()
    last = int(np.flatnonzero(group[MASK][:] == 0)[-1])  # the driver has tried some positions itself
    block = Block(0, (last,), (last + 1,))
    wrong = [np.full((1, 1), 7.0), np.full((1, N_SPECTRAL), 7.0, "f4")]
    right = [np.array([[data[last].mean()]]), (2 * data[last : last + 1]).astype("f4")]
    before = Path(stage.path).read_bytes()
    with Client(stage.address) as client:
        answers = client.run(_write, sink_of(stage.path, group, old), block, wrong)
        assert len(answers) == 2
        for answer in answers.values():
            assert isinstance(answer, FencedError)
            assert f"The run {old} is over: the file belongs to the run" in str(answer)
        assert Path(stage.path).read_bytes() == before
        now = sink_of(stage.path, group, run_of(stage.path))
        assert all(isinstance(one, int) for one in client.run(_write, now, block, right).values())
        assert Path(stage.path).read_bytes() != before


def _write(sink: Sink, block: Block, arrays: list[np.ndarray]) -> Any:
    try:
        return sink.write(block, arrays)
    except FencedError as error:
        return error


def test_a_cluster_that_is_lost(stage: Stage) -> None:
    """Scheduler and workers die under a driver: it ends, what was finished is kept, and the work goes on elsewhere."""
    driver = stage.start_driver()
    stage.wait_until_held_back("one")
    n_done = stage.n_done()
    os.killpg(stage.cluster.pid, signal.SIGKILL)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1, errors
    assert "WorkerError: client: the connection to the cluster" in errors
    assert "the same call goes on from there, on another cluster, or without a client" in errors
    assert stage.n_done() >= n_done > 0
    done = check(stage.path, complete=False)
    assert holder(stage.path) is None
    stage.cluster.communicate()
    stage.cluster = stage._start("cluster.py")
    assert stage.cluster.stdout is not None
    stage.address = stage.cluster.stdout.readline().strip()
    stage.set_phase("two")
    stage.open_gate("two")
    output, errors = stage.start_driver().communicate(timeout=60)
    assert "finished" in output, errors
    check(stage.path, complete=True)
    assert sorted(stage.called("two")) == np.flatnonzero(~done).tolist()


def test_workers_that_are_lost(stage: Stage) -> None:
    """One worker process is killed with a block under way: its block is done again, once, and the run ends right."""
    driver = stage.start_driver()
    stage.wait_until_held_back("one")
    lines = (stage.folder / "called_one").read_text().splitlines()
    position, pid = next(map(int, line.split()) for line in lines if int(line.split()[0]) >= FIRST_GATED)
    os.kill(pid, signal.SIGKILL)
    stage.open_gate("one")
    output, errors = driver.communicate(timeout=60)
    assert "finished" in output, errors
    check(stage.path, complete=True)
    assert stage.called("one").count(position) == 2
