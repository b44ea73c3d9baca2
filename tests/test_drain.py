"""Real signals to real drivers: what is finished is kept, the exit code says so, nothing stays behind."""

from __future__ import annotations

import faulthandler
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core.events import Started
from lazyproc.drain import GRACE_SECONDS, Drain, grace_seconds, stoppable
from lazyproc.hdf5.holder import holder
from lazyproc.status import file_status

MAIN = f"{CHANNEL}/Raw_Data"
N_POSITIONS = 120
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
CASES = [(name, kind) for name in SIGNALS for kind in ("once", "twice")] + [("SIGTERM", "grace")]
ENGINES = dict.fromkeys(("serial", "both", "threads", "processes", "client", "hooks"), CASES)
ENGINES["hooks, pool"] = [("SIGTERM", "once"), ("SIGINT", "twice"), ("SIGUSR1", "twice")]

DRIVER = """
import contextlib, json, os, signal, sys, time
import h5py, psutil
import lazyproc
from lazyproc.core.events import BlockDone, Started
from lazyproc.engine import choose
from lazyproc.hdf5.holder import holder

engine, path, main, folder, cases, scheduler = json.loads(sys.argv[1])
hang, calls = os.path.join(folder, "hang"), os.path.join(folder, "calls")
if engine == "both":  # whatever a busy machine makes of the time that a position takes
    choose.HELP_PAYS, choose.POOL_PAYS = 0.0, 1e9

def work(rows, hang, calls, engine, case):
    import os, time
    time.sleep(0 if os.path.exists(f"{hang} no more") else (0.01 if engine == "both" else 0.015) * len(rows))
    while os.path.exists(hang):
        open(f"{hang} reached", "w").close()
        time.sleep(0.02 if engine in ("threads", "client") else 1000)
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

    @staticmethod
    def _map_function(row, **options):
        return work(row[None], **options)[0]

    def _unit_computation(self):
        if engine == "hooks, pool":
            super()._unit_computation(**self.parms_dict)
        else:
            self._results = work(self.data, **self.parms_dict)

    def _write_results_chunk(self):
        self.means[self._get_pixels_in_current_batch(), 0] = self._results

def make(case, cores=1 if engine == "serial" else 2):
    cls = {"threads": Blocks, "hooks": Hooks, "hooks, pool": Hooks}.get(engine, Rows)
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
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
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


def living(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return what lives of a driver's session; whoever was killed and not seen off yet does not."""
    found = [one for one in psutil.process_iter(["status"]) if session_of(one.pid) == process.pid]
    return [one for one in found if one.info["status"] != psutil.STATUS_ZOMBIE]


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def drive(engine: str, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Send the signals of all cases to one driver after the other case; return what it reports."""
    cases = ENGINES[engine]
    folder.mkdir()
    path = make_scan(folder)
    (folder / "driver.py").write_text(DRIVER)
    scheduler, cluster = "", None
    if engine == "client":
        (folder / "cluster.py").write_text(CLUSTER)
        cluster = start(folder / "cluster.py")
        assert cluster.stdout is not None
        scheduler = next(line.strip() for line in cluster.stdout if line.startswith("tcp://"))
    process = start(folder / "driver.py", json.dumps([engine, path, MAIN, str(folder), cases, scheduler]))
    talk = Talk(process)
    reports = {}
    try:
        for name, kind in cases:
            under_way = talk.wait_for("under way")
            while kind != "once" and not (folder / "hang reached").exists():
                time.sleep(0.005)
            os.killpg(process.pid, signal.Signals[name])  # to all of its processes, as a terminal and Slurm do
            said = talk.wait_for("interrupt again")
            if kind == "twice":
                time.sleep(1.1)  # sooner it would be the same one
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


@pytest.mark.parametrize(("engine", "name", "kind"), [(one, *case) for one, cases in ENGINES.items() for case in cases])
def test_a_signal_to_a_run(drivers: dict[str, Future[Any]], engine: str, name: str, kind: str) -> None:
    report = drivers[engine].result()[name, kind]
    said = "".join(report["said"])
    where = {"both": "this process and 1 more", "threads": "2 threads", "processes": "2 processes"}
    assert {"serial": "this process", "client": "Dask cluster", **where}.get(engine, "hooks") in said
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
from lazyproc.hdf5.holder import holder

path, main, name, times, by_path = json.loads(sys.argv[1])
number = signal.Signals[name]
pristine = open(path, "rb").read()
CALLS = ("pwrite", "pwritev", "fdatasync", "fsync", "ftruncate", "unlink")
real = {call: getattr(os, call) for call in CALLS}
count, when = 0, times  # every other step here, and the others with another signal
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
    if reached < when_before:
        break
    when = when_before + 2
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
    assert len(caught) > 15
    assert caught[:-1] == [expected] * (len(caught) - 1)


# -- before anything is computed ---------------------------------------------------------------------------------------

HANGS = """
import os, sys, time
import lazyproc

class Slow(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row, folder, delay=0.0):
        time.sleep(delay)
        if not delay or os.path.exists(os.path.join(folder, "hang")):
            open(os.path.join(folder, "reached"), "w").close()
            time.sleep(1000)
        return row.mean()

if __name__ == "__main__":
    Slow(sys.argv[1], parms_dict={"folder": sys.argv[2]}).compute()
"""


def wait_for_file(path: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.005)


def test_a_signal_while_the_function_is_tried(tmp_path: Path) -> None:
    """There is nothing to finish, so the first one is enough; nothing is made."""
    started = {}
    for name in SIGNALS:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "hangs.py").write_text(HANGS)
        words = [str(folder / "hangs.py"), f"{make_scan(folder)}::{MAIN}", str(folder)]
        before = (folder / "scan.h5").read_bytes()
        started[name] = before, subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    for name, (before, process) in started.items():
        wait_for_file(tmp_path / name / "reached", process)
        process.send_signal(signal.Signals[name])
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 75
        assert "Slow: stopped before a block was computed. The same call of compute() starts, or goes on." in errors
        assert "Traceback" not in errors
        assert "is finished and committed" not in errors
        assert (tmp_path / name / "scan.h5").read_bytes() == before
        assert sorted(os.listdir(tmp_path / name)) == ["hangs.py", "reached", "scan.h5"]


# -- the command line, a terminal, a notebook --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["USR1", "TERM twice"])
def test_the_command_line_leaves_with_75(tmp_path: Path, kind: str) -> None:
    (tmp_path / "slow.py").write_text(HANGS)
    words = ["run", str(tmp_path / "slow.py:Slow"), f"{make_scan(tmp_path)}::{MAIN}", "-p", "delay=0.015"]
    command = [sys.executable, "-m", "lazyproc.cli", *words, "-p", f"folder={tmp_path}", "--cores", "2", "--verbose"]
    process = start_words(command)
    talk = Talk(process)
    try:
        talk.wait_for("positions in")
        if kind == "TERM twice":
            (tmp_path / "hang").touch()
            wait_for_file(tmp_path / "reached", process)
        os.killpg(process.pid, signal.SIGUSR1 if kind == "USR1" else signal.SIGTERM)
        talk.wait_for("interrupt again")
        if kind == "TERM twice":
            time.sleep(1.1)
            os.killpg(process.pid, signal.SIGTERM)
        talk.wait_for("The same call of compute() goes on from there")
        assert process.wait(60) == 75
        assert living(process) == []
    finally:
        talk.close()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def start_words(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """The key, pressed: the bar says that it is stopping, the command line leaves with 75 and a message."""
    (tmp_path / "slow.py").write_text(HANGS)
    words = ["run", str(tmp_path / "slow.py:Slow"), f"{make_scan(tmp_path)}::{MAIN}", "-p", "delay=0.1"]
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            command = [sys.executable, "-m", "lazyproc.cli", *words, "-p", f"folder={tmp_path}", "--cores", "2"]
            os.execv(sys.executable, command)
        finally:
            os._exit(1)
    alarm = threading.Timer(120, lambda: os.kill(pid, signal.SIGKILL))
    alarm.start()
    shown = b""
    pressed = False
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not pressed and b"positions/s" in shown:
            os.write(terminal, b"\x03")
            pressed = True
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    alarm.cancel()
    os.close(terminal)
    text = shown.decode(errors="replace")
    assert code == 75, text
    assert "Slow: stopping" in text, "in the bar"
    assert "interrupt again to leave at once" in text
    assert re.search(r"Slow: stopped early; \d+ of 120 positions", text)
    assert "Traceback" not in text


def test_ctrl_c_in_a_notebook(tmp_path: Path) -> None:
    """In a real kernel: the cell ends with Interrupted, and the same cell goes on."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    manager = pytest.importorskip("jupyter_client.manager", reason="jupyter_client is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel, client = manager.start_new_kernel(kernel_name="python3")
    replies: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []

    def run(cell: str) -> None:
        replies.append(client.execute_interactive(cell, output_hook=messages.append, timeout=120)["content"])

    def interrupt_when_begun() -> None:
        while not any(one.n_done for one in file_status(str(tmp_path / "scan.h5")).results):
            time.sleep(0.01)
        os.kill(kernel.provisioner.pid, signal.SIGINT)  # what "Interrupt the kernel" does

    try:
        run(HANGS.partition("if __name__")[0])
        address = f"{make_scan(tmp_path)}::{MAIN}"
        parameters = {"delay": 0.02, "folder": str(tmp_path)}
        run(f"options = dict(parms_dict={parameters!r}, checkpoint_interval=0.2, cores=1)")
        cell = f"group = Slow({address!r}, **options).compute()\nint(group['completed_positions'][:].sum())"
        thread = threading.Thread(target=interrupt_when_begun)
        thread.start()
        run(cell)
        thread.join()
        run(cell)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
        kernel.cleanup_resources()
        kernel.context.destroy()
    assert [reply["status"] for reply in replies] == ["ok", "ok", "error", "ok"]
    assert replies[2]["ename"] == "Interrupted"
    assert re.match(r"Slow: stopped early; \d+ of 120 positions .* The same call", replies[2]["evalue"])
    results = [one["content"]["data"]["text/plain"] for one in messages if one["msg_type"] == "execute_result"]
    assert results == ["120"]


# -- whose signals they are --------------------------------------------------------------------------------------------


WATCHED = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGURG]


class InLoop(lazyproc.Process):
    """Does `act` once, at the tenth position of its loop."""

    outputs = {"Mean": lazyproc.Output("f8")}
    n_calls = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, cores=1, **options)
        InLoop.n_calls = -(2**30)  # until the loop begins
        self._progress = self._begin

    def _begin(self, event: Any) -> None:
        if isinstance(event, Started):
            InLoop.n_calls = 0

    @staticmethod
    def _map_function(row: np.ndarray, act: str = "", number: int = 0) -> float:
        time.sleep(0.002)
        InLoop.n_calls += 1
        return ACTS[act](row, number) if act and InLoop.n_calls == 10 else row.mean()


def raise_signal(row: np.ndarray, number: int) -> float:
    HANDLERS[:] = [signal.getsignal(one) for one in WATCHED]
    if number:
        signal.raise_signal(number)
    return row.mean()


def raise_and_fail(row: np.ndarray, number: int) -> float:
    signal.raise_signal(number)
    raise ZeroDivisionError


def swallow(row: np.ndarray, number: int) -> float:
    try:
        signal.raise_signal(number)
        signal.raise_signal(number)
    except BaseException:
        return -1.0
    return row.mean()


def fork(row: np.ndarray, number: int) -> float:
    pid = os.fork()
    if pid == 0:
        try:
            time.sleep(1000)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(1)
    time.sleep(0.05)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


ACTS = {"raise": raise_signal, "raise and fail": raise_and_fail, "swallow": swallow, "fork": fork}
HANDLERS: list[Any] = []


@pytest.fixture
def scan(tmp_path: Path) -> str:
    return f"{make_scan(tmp_path)}::{MAIN}"


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts handlers back."""
    before = [signal.getsignal(number) for number in WATCHED]
    yield
    for number, handler in zip(WATCHED, before, strict=True):
        signal.signal(number, handler)


def in_loop(main: Any, act: str, number: int = 0) -> InLoop:
    return InLoop(main, parms_dict={"act": act, "number": int(number)})


@pytest.mark.usefixtures("restored")
def test_handlers_of_the_caller_are_left_alone(scan: str) -> None:
    calls: list[int] = []
    own = {number: lambda number, frame: calls.append(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in own.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for number in (*own, signal.SIGUSR1):
        with in_loop(scan, "raise", number) as process:
            assert process.compute()["completed_positions"][:].all()
        assert HANDLERS[:3] == [*own.values(), signal.SIG_IGN]
    assert calls == list(own)


@pytest.mark.usefixtures("restored")
def test_a_handler_that_python_does_not_know_is_left_alone(scan: str, tmp_path: Path) -> None:
    with open(tmp_path / "stacks", "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        try:
            assert in_loop(scan, "raise", signal.SIGUSR1).compute()["completed_positions"][:].all()
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    assert "_map_function" in (tmp_path / "stacks").read_text()


def test_signals_of_a_run_in_a_thread_are_the_main_threads(scan: str) -> None:
    before = [signal.getsignal(number) for number in WATCHED]
    thread = threading.Thread(target=lambda: in_loop(scan, "raise").compute())
    thread.start()
    thread.join()
    assert before == HANDLERS


def test_an_error_goes_before_a_signal(scan: str) -> None:
    with pytest.raises(lazyproc.FunctionError):
        in_loop(scan, "raise and fail", signal.SIGTERM).compute()


def test_a_function_that_swallows_an_interrupt(scan: str) -> None:
    """What it returns then is not to be trusted, and is not kept."""

    with in_loop(scan, "swallow", signal.SIGINT) as process:
        with pytest.raises(lazyproc.Interrupted):
            process.compute()
        (group,) = process.partial_h5_groups
        done = group["completed_positions"][:] == 1
        assert 0 < done.sum() < N_POSITIONS
        assert not (group["Mean"][:, 0][done] == -1).any()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_within_a_run(scan: str, number: int) -> None:
    """A signal while the inner one computes ends both."""

    class Outer(lazyproc.Process):
        process_name = "Outer"

        def _create_results_datasets(self) -> None:
            self.h5_results_grp = self._h5_target_group.create_group("Raw_Data-Outer_000")
            self.h5_results_grp.create_dataset("Mean", (N_POSITIONS, 1), "f8")

        def _unit_computation(self) -> None:
            options = {"parms_dict": {"act": "raise", "number": int(number)}}
            InLoop(self.h5_main, h5_target_group=f"{path}-inner::/", **options).compute()

        def _write_results_chunk(self) -> None:
            raise AssertionError("the outer run is over")

    path, _, name = scan.partition("::")
    with h5py.File(path, "r+") as file:
        with pytest.raises(BaseException, match=r"stopped early|75") as left:
            Outer(file[name]).compute()
        assert isinstance(left.value, lazyproc.Interrupted if number == signal.SIGINT else SystemExit)
        (inner,) = file_status(f"{path}-inner").results
        assert 0 < inner.n_done < N_POSITIONS
        assert not file[f"{CHANNEL}/Raw_Data-Outer_000/completed_positions"][:].any()
    assert holder(path) is None


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_where_no_run_is_under_way(number: int) -> None:
    """It leaves at once, and with the same code if that was swallowed."""
    seen: list[str] = []

    def swallow_it() -> None:
        try:
            signal.raise_signal(number)
            seen.append("went on")
        except KeyboardInterrupt:
            seen.append("swallowed")

    with pytest.raises(SystemExit) as left, stoppable():
        swallow_it()
    assert (left.value.code, seen) == (75, ["swallowed"])
    assert signal.getsignal(number) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt) as interrupted, stoppable():
        signal.raise_signal(signal.SIGINT)
    assert type(interrupted.value) is KeyboardInterrupt, "Ctrl-C is what it is elsewhere"


@pytest.mark.usefixtures("restored")
def test_a_signal_is_heard_of_where_a_thousand_files_are_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500) if hard == -1 else min(hard, 1500), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        opened = [stack.enter_context(open(os.devnull)) for _ in range(1100)]
        assert opened[-1].fileno() > 1024
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(SystemExit), stoppable():
            time.sleep(60)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_goes_wrong_after_a_run_was_left_is_told(number: int) -> None:
    drain = Drain("stopped early")

    def leave() -> None:
        try:
            with drain.interruptible(at_first=True):
                signal.raise_signal(number)
        finally:
            raise lazyproc.NoRoomError("the last commit did not get through")

    with pytest.raises(lazyproc.NoRoomError), drain.on_signals():
        leave()


@pytest.mark.usefixtures("restored")
def test_a_handler_that_is_installed_meanwhile_stays() -> None:
    def mine(*_: object) -> None:
        pass

    with stoppable():
        signal.signal(signal.SIGTERM, mine)
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_process_that_the_function_forks_can_be_ended(scan: str) -> None:
    """It has the handlers of the run, and must not mistake its own signals for a wish to stop the run."""

    for number, code in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)):
        with in_loop(scan, "fork", number) as process:
            means = process.compute()["Mean"][:, 0].tolist()
        assert means.count(code) == 1


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_grace_that_is_no_number(scan: str, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LAZYPROC_GRACE_SECONDS", text)
    with pytest.raises(lazyproc.ArgumentValueError, match=f"LAZYPROC_GRACE_SECONDS: '{text}' came; expected a number"):
        in_loop(scan, "").compute()


def test_grace() -> None:
    assert grace_seconds() == GRACE_SECONDS < 30


PROGRAMS = """
import os, subprocess, sys, time
import lazyproc

class Runs(lazyproc.Process):
    outputs = {"Code": lazyproc.Output("i4")}

    @staticmethod
    def _map_function(row, folder):
        seconds = 1000 if os.path.exists(os.path.join(folder, "hang")) else 0.03
        running = subprocess.Popen(["sleep", str(seconds)])
        open(os.path.join(folder, f"pid {running.pid}"), "w").close()
        return running.wait()

if __name__ == "__main__":
    Runs(sys.argv[1], parms_dict={"folder": sys.argv[2]}, cores=2, verbose=True).compute()
"""


@pytest.mark.parametrize("kind", ["once", "twice"])
def test_programs_that_the_function_runs(tmp_path: Path, kind: str) -> None:
    """Ctrl-C does not end them, so that blocks under way can be finished; a second one ends them, too."""
    (tmp_path / "runs.py").write_text(PROGRAMS)
    scan = make_scan(tmp_path)
    process = start(tmp_path / "runs.py", f"{scan}::{MAIN}", str(tmp_path))
    talk = Talk(process)
    try:
        talk.wait_for("positions in")
        if kind == "twice":
            (tmp_path / "hang").touch()
        before = len(os.listdir(tmp_path))
        while len(os.listdir(tmp_path)) < before + 2:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)
        talk.wait_for("interrupt again")
        if kind == "twice":
            os.killpg(process.pid, signal.SIGINT)
        talk.wait_for("The same call of compute() goes on from there")
        process.wait(60)
        assert living(process) == []
    finally:
        talk.close()
    with h5py.File(scan) as file:
        group = file[f"{CHANNEL}/Raw_Data-Runs_000"]
        done = group["completed_positions"][:] == 1
        assert 0 < done.sum() < N_POSITIONS
        assert set(group["Code"][:, 0][done]) == {0}
