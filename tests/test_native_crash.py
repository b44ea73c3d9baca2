"""Functions that end their process: they are tried where that does no harm, and the positions to blame are found."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from distributed import Client, LocalCluster
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core.errors import FunctionError, OutputError, WorkerError
from lazyproc.hdf5.failures import read_failures
from lazyproc.hdf5.holder import holder, read_holder
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.sidecar import sidecar

MAIN = f"{CHANNEL}/Raw_Data"
N_POSITIONS = 400
SCRIPT = '''
"""Usage: script.py FILE position|block local|cluster"""
import json, os, signal, sys
from pathlib import Path

import numpy as np

import lazyproc

HERE = Path(__file__).parent


def crash(position):
    """Note that the position is being computed, and end the process if that is wanted."""
    with open(HERE / "calls", "a") as file:
        file.write(f"{position}\\n")
    if str(position) in (HERE / "bad").read_text().split():
        os.kill(os.getpid(), signal.SIGKILL)


class Position(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row):
        crash(int(row[0]))
        return row.mean()


class Block(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _block_function(rows):
        for row in rows:
            crash(int(row[0]))
        return rows.mean(axis=1)


if __name__ == "__main__":
    kind, where = sys.argv[2:]
    client = None
    if where == "cluster":
        from distributed import Client, LocalCluster

        client = Client(LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0"))
    process = {"position": Position, "block": Block}[kind](sys.argv[1], "Mean", client=client)
    said = ""
    try:
        process.compute()
    except lazyproc.LazyprocError as error:
        said = f"{type(error).__name__}: {error}"
    if client is not None:
        client.cluster.close()
        client.close()
    Path("said").write_text(json.dumps(said))
'''


class Stage:
    """A file, a script that computes on it, and what became of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = np.random.default_rng(3).standard_normal((N_POSITIONS, 8))
        self.data[:, 0] = np.arange(N_POSITIONS)
        self.path, _ = make_usid_file(
            folder / "scan.h5", n_rows=20, n_cols=20, n_spectral=8, data=self.data, dtype="f8"
        )
        (folder / "script.py").write_text(SCRIPT)

    def run(self, kind: str, where: str, bad: tuple[int, ...]) -> tuple[int, str]:
        """Run the script; return its exit code, and what the error said."""
        for name in ("said", "calls"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "bad").write_text(" ".join(map(str, bad)))
        ended = subprocess.run(
            [sys.executable, "script.py", f"{self.path}::{MAIN}", kind, where],
            cwd=self.folder,
            timeout=300,
            capture_output=True,
            text=True,
            # A local cluster gives up a nanny if its worker is just dead some seconds after another death.
            env=os.environ | {"DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "10 minutes"},
        )
        self.log = ended.stderr
        said = self.folder / "said"
        return ended.returncode, json.loads(said.read_text()) if said.exists() else ""

    def missing(self) -> list[int]:
        """Compare what is marked with a plain loop; return the positions that are not marked, of the one group."""
        with h5py.File(self.path) as file:
            (group,) = [item for name, item in file[CHANNEL].items() if name.startswith("Raw_Data-Mean_")]
            done = group["completed_positions"][:] == 1
            assert (file[MAIN][:] == self.data).all()
            assert (group["Mean"][:, 0][done] == self.data.mean(axis=1)[done]).all()
        return np.flatnonzero(~done).tolist()

    def calls(self) -> Counter[int]:
        return Counter(int(line) for line in (self.folder / "calls").read_text().split())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


# -- on this machine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["position", "block"])
@pytest.mark.parametrize("bad", [(0,), (200, 399), (77,)])
def test_what_ended_the_driver_is_called_in_workers_next_time(stage: Stage, kind: str, bad: tuple[int, ...]) -> None:
    """The same call again does all the others, and names the positions; mended, only these are left."""
    code, _ = stage.run(kind, "local", bad)
    assert code == -signal.SIGKILL, "a job so small is done in the process"
    code, said = stage.run(kind, "local", bad)
    assert code == 0, stage.log
    assert "in worker processes only now" in stage.log
    named = ", ".join(f"position {one}" for one in bad)
    assert f"WorkerError: Mean: workers died each time they had {named} of" in said
    assert stage.missing() == list(bad)
    for _ in range(2):
        code, said = stage.run(kind, "local", bad)
        assert code == 0, "as often as it is called"
        assert f"had {named} of" in said
    code, said = stage.run(kind, "local", ())
    assert (code, said) == (0, ""), stage.log
    assert stage.calls() == Counter(bad)
    assert stage.missing() == []
    assert sorted(one.name for one in stage.folder.glob(".*")) == []


def test_a_driver_that_died_elsewhere_leaves_no_suspicion(tmp_path: Path) -> None:
    script = """
        import os, sys
        from lazyproc.hdf5.lock import RunLock
        lock = RunLock(sys.argv[1], "1")
        lock.acquire()
        with lock.calling():
            if sys.argv[2] == "within":
                os.kill(os.getpid(), 9)
        os.kill(os.getpid(), 9)
    """
    path = str(tmp_path / "scan.h5")
    for where in ("within", "after", "within", "within"):
        ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script), path, where], check=False)
        assert ended.returncode == -signal.SIGKILL
        lock = RunLock(path, "2")
        lock.acquire()
        assert lock.died_calling == (where == "within")
        lock.release()
        again = RunLock(path, "3")
        again.acquire()
        assert not again.died_calling, "told once"
        again.release()


def test_what_was_found_to_end_processes_is_told_to_the_next_run(tmp_path: Path) -> None:
    path = str(tmp_path / "scan.h5")
    lock = RunLock(path, "1")
    lock.acquire()
    lock.suspect()
    lock.release()
    assert [one.name for one in tmp_path.glob(".*")] == [".scan.h5.lazyproc-lock"]
    assert holder(path) is None, "nobody computes"
    lock = RunLock(path, "2")
    lock.acquire()
    assert lock.died_calling
    lock.release()
    assert os.listdir(tmp_path) == []


class OnlyHere:
    """An argument that can be sent, but not be loaded in another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return load_only_here, (os.getpid(),)


def load_only_here(made: int) -> OnlyHere:
    if os.getpid() != made:
        raise RuntimeError("only where it was made")
    return OnlyHere()


def test_what_ended_a_driver_is_not_called_in_another_though_workers_cannot_load_it(tmp_path: Path) -> None:
    path, _ = make_usid_file(tmp_path / "scan.h5", n_rows=20, n_cols=20, n_spectral=8)
    lock = RunLock(str(path), "1")
    lock.acquire()
    lock.suspect()
    lock.release()
    calls = []

    def mean(row: Any, where: OnlyHere) -> Any:
        calls.append(row)
        return row.mean()

    with pytest.raises(WorkerError, match="only where it was made"):
        lazyproc.map_positions(
            functools.partial(mean, where=OnlyHere()), f"{path}::{MAIN}", {"Mean": lazyproc.Output("f8")}, cores=2
        )
    assert not calls


def test_calls_of_several_threads_count_as_one(tmp_path: Path) -> None:
    path = str(tmp_path / "scan.h5")
    lock = RunLock(path, "ü")
    lock.acquire()

    def told() -> Any:
        about = read_holder(sidecar(path, "lock"))
        assert about is not None
        assert about["run_id"] == "ü"
        return about["calling"]

    meeting = threading.Barrier(3)

    def call() -> None:
        with lock.calling():
            meeting.wait()
            meeting.wait()

    assert told() == 0
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    meeting.wait()
    assert told() == 1
    with lock.calling():
        pass
    assert told() == 1, "the others still do"
    meeting.wait()
    for thread in threads:
        thread.join()
    assert told() == 0
    lock.release()
    with lock.calling():  # a thread that nobody has waited for
        pass
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_sent_is_called_here_all_the_same(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    script = (
        "import os, sys; from lazyproc.hdf5.lock import RunLock; lock = RunLock(sys.argv[1], '1'); lock.acquire()\n"
    )
    script += "with lock.calling():\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, stage.path], check=False)
    lock = threading.Lock()

    class Held(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8")}

        @staticmethod
        def _map_function(row: Any) -> Any:
            with lock:
                return row.mean()

    group = Held(f"{stage.path}::{MAIN}", "Held").compute()
    assert (group["Mean"][:, 0] == stage.data.mean(axis=1)).all()
    assert "cannot be sent to worker processes" in caplog.text


# -- on a cluster ----------------------------------------------------------------------------------------------------


def test_a_cluster_keeps_the_driver_out_of_it(stage: Stage) -> None:
    """Even the first call is a worker's: the driver lives, and names what ends workers."""
    code, said = stage.run("position", "cluster", (0, 200))
    assert code == 0, stage.log
    assert "WorkerError: Mean: workers died each time they had position 0, position 200 of" in said
    assert "which is gone: a crash in native code" in stage.log
    assert stage.missing() == [0, 200]
    code, said = stage.run("position", "local", ())
    assert (code, said) == (0, ""), stage.log
    assert stage.missing() == []


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster, Client(cluster) as client:
        yield client


def whose(row: np.ndarray, wrong: int, pid: int) -> Any:
    """Return the mean; say at one position who is asked."""
    if row[0] == wrong:
        raise ValueError(f"by {'the driver' if os.getpid() == pid else 'a worker'}")
    return row.mean()


@pytest.mark.parametrize("wrong", [0, N_POSITIONS - 1])
def test_what_the_function_raises_when_it_is_tried_reaches_the_user(stage: Stage, client: Client, wrong: int) -> None:
    before = Path(stage.path).read_bytes()
    process = _Whose(f"{stage.path}::{MAIN}", client=client)
    with pytest.raises(FunctionError, match=f"failed at position {wrong} of .*ValueError: by a worker") as caught:
        process.compute(wrong=wrong, pid=os.getpid())
    assert caught.value.positions == (wrong, wrong + 1)
    trace = caught.value.__cause__.__traceback__
    names = []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names[-1] == "whose"
    assert Path(stage.path).read_bytes() == before, "nothing was made"


class _Whose(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}
    _map_function = staticmethod(whose)

    def __init__(self, main: str, **kwargs: Any) -> None:
        super().__init__(main, "Whose", **kwargs)


class _Wide(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row: Any) -> Any:
        return row[:2]


def test_results_that_do_not_fit_are_found_before_anything_is_made(stage: Stage, client: Client) -> None:
    before = Path(stage.path).read_bytes()
    with pytest.raises(OutputError, match="at position 0 of"):
        _Wide(f"{stage.path}::{MAIN}", "Wide", client=client).compute()
    assert Path(stage.path).read_bytes() == before


def test_positions_that_fail_when_they_are_tried_are_recorded(stage: Stage, client: Client) -> None:
    group = _Whose(f"{stage.path}::{MAIN}", client=client, on_error="record").compute(wrong=0, pid=os.getpid())
    (failed,) = read_failures(group, "completed_positions")
    assert (failed.position, failed.error, failed.text) == (0, "ValueError", "by a worker")
    assert (group["Mean"][1:, 0] == stage.data.mean(axis=1)[1:]).all()


class _Noting(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row: Any, folder: str) -> Any:
        with open(Path(folder) / "calls", "a") as file:
            file.write(f"{int(row[0])}\n")
        return row.mean()


def test_what_is_tried_is_not_computed_again(stage: Stage, client: Client) -> None:
    group = _Noting(f"{stage.path}::{MAIN}", "Noting", client=client).compute(folder=str(stage.folder))
    assert stage.calls() == Counter(range(N_POSITIONS))
    assert (group["Mean"][:, 0] == stage.data.mean(axis=1)).all()
