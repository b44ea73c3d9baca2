"""Real signals to real drivers: what is finished is kept, the exit code says so, nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from usid_files import CHANNEL, make_usid_file

MAIN = f"{CHANNEL}/Raw_Data"
N_POSITIONS = 120
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
CASES = [(name, kind) for name in SIGNALS for kind in ("once", "twice")] + [("SIGTERM", "grace")]
ENGINES = ("serial", "threads", "processes", "client", "hooks")

DRIVER = """
import contextlib, json, os, signal, sys, time
import h5py, psutil
import lazyproc
from lazyproc.core.events import BlockDone, Started
from lazyproc.hdf5.lock import holder

engine, path, main, folder, cases, scheduler = json.loads(sys.argv[1])
hang, calls = os.path.join(folder, "hang"), os.path.join(folder, "calls")

def work(rows, hang, calls, engine, case):
    import os, time
    time.sleep(0 if os.path.exists(f"{hang} no more") else 0.015 * len(rows))
    while os.path.exists(hang):
        open(f"{hang} reached", "w").close()
        time.sleep(1000 if engine in ("serial", "processes", "hooks") else 0.02)
    with open(calls, "a") as file:
        file.write("".join(f"{int(row[0])}\\n" for row in rows))
    return rows.mean(1)

class Blocks(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}
    _block_function = staticmethod(work)

class Rows(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row, **options):
        return work(row[None], **options)[0]

class Hooks(lazyproc.Process):
    process_name = "Hooks"

    def _create_results_datasets(self):
        parent = self._h5_target_group
        number = sum(name.startswith("Raw_Data-Hooks") for name in parent)
        self.h5_results_grp = parent.create_group(f"Raw_Data-Hooks_{number:03d}")
        for name, value in self.parms_dict.items():
            self.h5_results_grp.attrs[name] = value
        self.h5_results_grp.create_dataset("Mean", (self.h5_main.shape[0], 1), "f8")
        self._get_existing_datasets()

    def _get_existing_datasets(self):
        self.means = self.h5_results_grp["Mean"]

    def _unit_computation(self):
        self._results = work(self.data, **self.parms_dict)

    def _write_results_chunk(self):
        self.means[self._get_pixels_in_current_batch(), 0] = self._results

def make(case, cores=1 if engine == "serial" else 2):
    cls = {"threads": Blocks, "hooks": Hooks}.get(engine, Rows)
    options = dict(hang=hang, calls=calls, engine=engine, case=case)
    process = cls(f"{path}::{main}", parms_dict=options, cores=cores, checkpoint_interval=0.2)
    process._max_pos_per_read = 3  # for hooks
    return process

class Listener:
    def __init__(self, hangs):
        self.events, self.hangs, self.scheduler = [], hangs, None

    def __call__(self, event):
        self.events.append(type(event).__name__)
        if isinstance(event, Started):
            self.scheduler = event.scheduler
            self.events.clear()
        if self.scheduler and self.events.count("BlockDone") == 2 and self.events[-1] == "BlockDone":
            if self.hangs:
                open(hang, "w").close()
            print("under way in", self.scheduler, flush=True)

def one(name, kind):
    case = f"{name} {kind}"
    os.environ["LAZYPROC_GRACE_SECONDS"] = "0.5" if kind == "grace" else "1000"
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    open(calls, "w").close()
    process = make(case)
    process._progress = listener = Listener(kind != "once")
    caught = message = None
    try:
        process.compute()
    except lazyproc.Interrupted as error:
        caught, message = "Interrupted", str(error)
    except SystemExit as error:
        caught = error.code
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    process.close()
    with h5py.File(path, "r") as file:  # nobody has it open for writing any more
        names = [name for name in file[main].parent if name.startswith("Raw_Data-")]
        mask = file[main].parent[names[-1]]["completed_positions"][()].tolist()
    report = dict(
        caught=caught, message=message, restored=before == after, events=listener.events, mask=mask,
        children=[line for line in children if "tracker" not in line], holder=holder(path), group=names[-1],
        sidecars=[name for name in os.listdir(os.path.dirname(path)) if name.startswith(".")],
        called=[int(line) for line in open(calls)],
    )
    open(f"{hang} no more", "w").close()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(hang)
        os.unlink(f"{hang} reached")
    open(calls, "w").close()
    with make(case, 1) as process:
        report["again"] = process.compute().name.rpartition("/")[2]
        report["means"] = process.h5_results_grp["Mean"][:, 0].tolist()
    os.unlink(f"{hang} no more")
    report["called_again"] = [int(line) for line in open(calls)]
    print(json.dumps(report), flush=True)

def run():
    for name, kind in cases:
        one(name, kind)

if scheduler:
    from distributed import Client
    with Client(scheduler):
        run()
else:
    run()
print("finished", flush=True)
"""

CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


def raw_data() -> np.ndarray:
    data = np.random.default_rng(8).standard_normal((N_POSITIONS, 16))
    data[:, 0] = np.arange(N_POSITIONS)
    return data


def make_scan(folder: Path) -> str:
    path, _ = make_usid_file(folder / "scan.h5", n_rows=N_POSITIONS // 10, n_cols=10, n_spectral=16, data=raw_data())
    return str(path)


def start(script: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(script), *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


class Talk:
    """What a driver says, line by line; kept for messages."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.alarm = threading.Timer(240, lambda: os.killpg(process.pid, signal.SIGKILL))
        self.alarm.start()

    def wait_for(self, *texts: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if any(text in line for text in texts):
                return line
        raise AssertionError(
            f"the driver ended without a word of {texts}:\n{''.join(line[:400] for line in self.lines)}"
        )

    def close(self) -> None:
        self.alarm.cancel()
        for one in psutil.process_iter(["pid"]):
            if session_of(one.pid) == self.process.pid:
                one.kill()
        self.process.communicate()


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def drive(engine: str, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Send the signals of all cases to one driver after the other case; return what it reports."""
    folder.mkdir()
    path = make_scan(folder)
    (folder / "driver.py").write_text(DRIVER)
    scheduler, cluster = "", None
    if engine == "client":
        (folder / "cluster.py").write_text(CLUSTER)
        cluster = start(folder / "cluster.py")
        assert cluster.stdout is not None
        scheduler = cluster.stdout.readline().strip()
    process = start(folder / "driver.py", json.dumps([engine, path, MAIN, str(folder), CASES, scheduler]))
    talk = Talk(process)
    reports = {}
    try:
        for name, kind in CASES:
            under_way = talk.wait_for("under way")
            while kind != "once" and not (folder / "hang reached").exists():
                time.sleep(0.005)
            os.killpg(process.pid, signal.Signals[name])  # to all of its processes, as a terminal and Slurm do
            said = talk.wait_for("interrupt again")
            if kind == "twice":
                os.killpg(process.pid, signal.Signals[name])
            n_before = len(talk.lines)
            report = json.loads(talk.wait_for('"caught"'))
            reports[name, kind] = report | {"said": [under_way, said, *talk.lines[n_before:-1]]}
        talk.wait_for("finished")
        assert process.wait(60) == 0
    finally:
        talk.close()
        if cluster is not None:
            os.killpg(cluster.pid, signal.SIGKILL)
            cluster.communicate()
    return reports


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """All drivers at once: they mostly wait."""
    folder = tmp_path_factory.mktemp("drivers")
    with ThreadPoolExecutor(len(ENGINES)) as pool:
        yield {engine: pool.submit(drive, engine, folder / engine) for engine in ENGINES}


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_to_a_run(drivers: dict[str, Future[Any]], engine: str, name: str, kind: str) -> None:
    report = drivers[engine].result()[name, kind]
    said = "".join(report["said"])
    where = {"serial": "this process", "threads": "2 threads", "processes": "2 processes", "client": "Dask cluster"}
    assert where.get(engine, engine) in said
    done = np.array(report["mask"], bool)
    message = report["message"] or said
    assert report["caught"] == ("Interrupted" if name == "SIGINT" else 75)
    assert f"{done.sum()} of {N_POSITIONS} positions ({done.mean():.1%}) are done and kept" in message
    assert "The same call of compute() goes on from there" in message
    assert ("leaving at once" in said) == (kind == "twice")
    assert ("the grace of 0.5 s is over" in said) == (kind == "grace")
    assert 0 < done.sum() < N_POSITIONS
    if kind == "once":
        assert sorted(report["called"]) == np.flatnonzero(done).tolist(), "what was under way is finished and kept"
    assert report["children"] == []
    assert report["restored"]
    assert report["events"][-1] == "Finished"
    assert ("Stopping" in report["events"]) or kind != "once"
    assert (report["holder"], report["sidecars"]) == (None, [])
    assert report["again"] == report["group"]
    assert set(np.flatnonzero(~done).tolist()) <= set(report["called_again"])
    assert not set(np.flatnonzero(done).tolist()) & set(report["called_again"]) or engine == "client"
    np.testing.assert_array_equal(report["means"], [row.mean() for row in raw_data()])


# -- before the first block, and after the last one --------------------------------------------------------------------

STEPS = """
import contextlib, hashlib, json, logging, os, random, signal, sys
import h5py
import lazyproc
import lazyproc.hdf5.transaction as transaction
from lazyproc.hdf5.lock import holder

path, main, name, times, by_path = json.loads(sys.argv[1])
number = signal.Signals[name]
pristine = open(path, "rb").read()
CALLS = ("pwrite", "pwritev", "fdatasync", "fsync", "ftruncate", "unlink")
real = {call: getattr(os, call) for call in CALLS}
count, when = 0, None
logging.getLogger("lazyproc").setLevel(logging.ERROR)

def wrapped(call):
    def function(*args, **kwargs):
        global count
        result = real[call](*args, **kwargs)
        count += signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # the run watches its signals
        if count == when and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return result
    return function

for call in CALLS:
    setattr(os, call, wrapped(call))

def mean(row):
    return row.mean()

def compute():
    outputs = {"Mean": lazyproc.Output("f8")}
    if by_path:
        lazyproc.map_positions(mean, f"{path}::{main}", outputs, process_name="Mean", cores=1)
    else:
        with h5py.File(path, "r+") as file:
            lazyproc.map_positions(mean, file[main], outputs, process_name="Mean", cores=1)

def trial():
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    caught = 0
    try:
        compute()
    except KeyboardInterrupt:
        caught = "Interrupted"
    except SystemExit as error:
        caught = error.code
    assert before == {one: signal.getsignal(one) for one in before}
    beside = [one for one in os.listdir(os.path.dirname(path)) if one.startswith(".")]
    assert holder(path) is None, beside
    assert not [one for one in beside if not one.endswith(("-lock", "-fence"))], beside
    with h5py.File(path, "r") as file:
        means = file[main][:].mean(1)
        for group in file[main].parent.values():
            if isinstance(group, h5py.Group) and "completed_positions" in group:
                done = group["completed_positions"][:] == 1
                assert (group["Mean"][:, 0][done] == means[done]).all()
    return caught

caught = []
while True:
    when = (when or 0) + 1
    with open(path, "wb") as file:
        file.write(pristine)
    count = 0
    caught.append(trial())
    reached, when_before, when = count, when, None
    again = trial()
    assert again == 0, again
    with h5py.File(path, "r") as file:
        names = [one for one in file[main].parent if one.startswith("Raw_Data-")]
        assert names == ["Raw_Data-Mean_000"], names
        assert (file[main].parent[names[0]]["completed_positions"][:] == 1).all()
    when = when_before
    if reached < when:
        break
print(json.dumps(caught))
"""


@pytest.fixture(scope="module")
def steps() -> Iterator[dict[tuple[str, int, bool], subprocess.Popen[str]]]:
    """The trials of a signal at every step, both at once; in memory, where syncs cost nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    started = {}
    with ExitStack() as stack:
        for kind in (("SIGTERM", 2, True), ("SIGINT", 1, False)):
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=memory))
            command = [sys.executable, "-c", STEPS, json.dumps([make_scan(Path(folder)), MAIN, *kind])]
            started[kind] = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            stack.callback(started[kind].kill)
        yield started


@pytest.mark.parametrize(("name", "times", "by_path"), [("SIGTERM", 2, True), ("SIGINT", 1, False)])
def test_a_signal_at_every_step(steps: Any, name: str, times: int, by_path: bool) -> None:
    """Of creation, loop and completion: nothing is left half made, and the next call goes on."""
    process = steps[name, times, by_path]
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    caught = json.loads(output)
    expected = "Interrupted" if name == "SIGINT" else 75
    assert caught[-1] == 0, "the last trial has no signal"
    assert len(caught) > 20
    assert caught[:-1] == [expected] * (len(caught) - 1)
