"""Two runs on one file, readers beside a run, locks that are left behind, and file systems that have no locks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core.errors import ArgumentValueError, FileBusyError
from lazyproc.core.events import Started
from lazyproc.hdf5.holder import holder
from lazyproc.hdf5.lock import FencedError, RunLock
from lazyproc.hdf5.locking import KINDS, LOCKING_NAME
from lazyproc.hdf5.sidecar import sidecar
from lazyproc.status import file_status

MAIN = f"{CHANNEL}/Raw_Data"
N_POSITIONS = 60

DRIVER = """
import json, os, sys, time
import h5py, lazyproc
from lazyproc.core.events import Started

def measure(row, gate, slow=0.0):
    time.sleep(slow)
    if gate and 20 <= row[0] < 50:
        open(gate + " reached", "w").close()
        while not os.path.exists(gate):
            time.sleep(0.005)
    return row.mean()

class Declared(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}
    _map_function = staticmethod(measure)

class Hooks(lazyproc.Process):
    process_name = "Hooks"
    def _create_results_datasets(self):
        self.h5_results_grp = self._h5_target_group.create_group("Raw_Data-Hooks_000")
        for name, value in self.parms_dict.items():
            self.h5_results_grp.attrs[name] = value
        self.h5_results_grp.create_dataset("Mean", (self.h5_main.shape[0], 1), "f8")
        self._get_existing_datasets()
    def _get_existing_datasets(self):
        self.means = self.h5_results_grp["Mean"]
    def _unit_computation(self):
        self._results = [measure(row, **self.parms_dict) for row in self.data]
    def _write_results_chunk(self):
        self.means[self._get_pixels_in_current_batch(), 0] = self._results

def run(kind, path, main, gate="", slow=0.0, cores=1, target=None):
    parms = {"gate": gate, "slow": slow}
    options = dict(parms_dict=parms, cores=cores, h5_target_group=target, checkpoint_interval=0.1)
    try:
        if kind == "handle":
            with h5py.File(path, "r+", locking=False) as file:
                means = Declared(file[main], **options).compute()["Mean"][:, 0].tolist()
        else:
            with (Hooks if kind == "hooks" else Declared)(f"{path}::{main}", **options) as process:
                process._max_pos_per_read = 10
                means = process.compute()["Mean"][:, 0].tolist()
    except lazyproc.LazyprocError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"means": means}

def do(order):
    os.environ.update(order.pop("environment"))
    at = order.pop("at", 0.0)
    while time.time() < at:
        pass
    answer = json.dumps({"pid": os.getpid(), "answer": run(**order)})
    os.write(1, answer.encode() + b"\\n")

if __name__ == "__main__":
    lazyproc.Process  # imported once: each order is done by a fork of this process
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            do(json.loads(line))
            sys.exit()
        os.write(1, json.dumps({"pid": pid}).encode() + b"\\n")
        while any(os.waitpid(-1, os.WNOHANG)):
            pass
"""


def raw_data() -> np.ndarray:
    data = np.random.default_rng(5).standard_normal((N_POSITIONS, 8))
    data[:, 0] = np.arange(N_POSITIONS)
    return data


MEANS = [float(row.mean()) for row in raw_data()]


class Driver:
    """A process that does one run."""

    def __init__(self, pid: int, answers: queue.SimpleQueue[dict[str, Any]]) -> None:
        self.pid = pid
        self._answers = answers

    def answer(self) -> dict[str, Any]:
        return self._answers.get(timeout=120)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Drivers:
    """A process that has everything imported, and forks drivers."""

    def __init__(self, folder: Path, **environment: str) -> None:
        script = folder / "driver.py"
        script.write_text(DRIVER)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=pipe, stdout=pipe, text=True, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._started: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "answer" in told:
                self._answers.setdefault(told["pid"], queue.SimpleQueue()).put(told["answer"])
            else:
                self._answers.setdefault(told["pid"], queue.SimpleQueue())
                self._started.put(told["pid"])

    def begin(self, kind: str, path: Path, environment: dict[str, str] | None = None, **options: Any) -> Driver:
        assert self._process.stdin is not None
        order = {"kind": kind, "path": str(path), "main": MAIN, "environment": environment or {}, **options}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = self._started.get(timeout=60)
        return Driver(pid, self._answers[pid])

    def run(self, kind: str, path: Path, environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        return self.begin(kind, path, environment, **options).answer()

    def hold(self, kind: str, path: Path, environment: dict[str, str] | None = None) -> Driver:
        """Start a run that stands still in its loop until the file "gate" is there."""
        driver = self.begin(kind, path, environment, gate=str(path.parent / "gate"))
        wait_for(path.parent / "gate reached")
        return driver

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    started = Drivers(tmp_path_factory.mktemp("drivers"))
    yield started
    started.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where syncs cost nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture
def path(folder: Path) -> Path:
    return make_scan(folder / "scan.h5")


def make_scan(path: Path) -> Path:
    make_usid_file(path, n_rows=6, n_cols=10, n_spectral=8, data=raw_data())
    return path


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.005)


def wait_until_free(path: Path) -> None:
    """Wait until a process that was killed is gone."""
    deadline = time.monotonic() + 60
    while file_status(str(path)).running is not None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def beside(path: Path) -> set[str]:
    return {name for name in os.listdir(path.parent) if name.startswith(".")}


class Mean(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row: np.ndarray) -> float:
        return row.mean()


class Largest(lazyproc.Process):
    outputs = {"Largest": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row: np.ndarray) -> float:
        return row.max()


# -- a second run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["declared", "hooks", "handle"])
def test_a_second_run_is_refused(drivers: Drivers, path: Path, kind: str) -> None:
    """By whom, where and since when; whatever the second one is, and even if its results are others."""
    first = drivers.hold(kind, path)
    about = holder(str(path))
    assert about is not None
    assert about["pid"] == first.pid
    who = rf"another run is computing into this file: host {about['host']}, pid {about['pid']}, since {about['since']}"
    with Largest(f"{path}::{MAIN}") as second, pytest.raises(FileBusyError, match=who):
        second.compute()
    for second_kind in ("declared", "hooks"):
        answer = drivers.run(second_kind, path)
        assert answer["error"] == "FileBusyError"
        assert re.search(who, answer["message"]), answer["message"]
    # The same source with results in another file is nobody's business.
    with Mean(f"{path}::{MAIN}", h5_target_group=f"{path.parent / 'out.h5'}::/") as elsewhere:
        assert elsewhere.compute()["Mean"][:, 0].tolist() == MEANS
    (path.parent / "gate").touch()
    assert first.answer()["means"] == MEANS
    assert beside(path) == set()
    assert drivers.run("declared", path)["means"] == MEANS


def test_a_second_run_in_a_thread_is_refused(path: Path) -> None:
    gate, caught = threading.Event(), []

    class Gated(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8")}

        @staticmethod
        def _map_function(row: np.ndarray) -> float:
            if threading.current_thread() is not threading.main_thread() and row[0] == 30:
                gate.wait(60)
            return row.mean()

    with h5py.File(path, "r+") as file:
        begun = threading.Event()
        first = Gated(file[MAIN], cores=1)
        first._progress = lambda event: begun.set() if isinstance(event, Started) else None
        thread = threading.Thread(target=lambda: caught.append(first.compute().name))
        thread.start()
        begun.wait(60)
        try:
            for second in (Largest(file[MAIN], cores=1), first):
                with pytest.raises(FileBusyError, match=f"pid {os.getpid()}, since"):
                    second.compute()
        finally:
            gate.set()
            thread.join()
        assert caught == [f"{MAIN}-Gated_000"]
        Largest(file[MAIN], cores=1).compute()
    assert beside(path) == set()


def test_a_killed_run_leaves_nothing_in_the_way(drivers: Drivers, path: Path) -> None:
    """Nor does a lock file of a process of another host that is gone: its lock went with it."""
    drivers.hold("declared", path).kill()
    wait_until_free(path)
    assert {name.rpartition("-")[2] for name in beside(path)} == {"lock", "fence"}
    assert drivers.run("declared", path)["means"] == MEANS
    assert beside(path) == set()
    about = {"host": "elsewhere", "pid": 1, "since": "2020-01-01 00:00:00", "run_id": "of old"}
    Path(sidecar(str(path), "lock")).write_text(json.dumps(about))
    Path(sidecar(str(path), "fence")).write_text("of old")
    assert file_status(str(path)).running is None
    assert drivers.run("declared", path, slow=0.0001)["means"] == MEANS
    assert beside(path) == set()


def test_two_runs_at_the_same_instant(drivers: Drivers, folder: Path) -> None:
    """Exactly one computes; the other one is refused, or comes after it and gets its results."""
    template = make_scan(folder / "template.h5")
    refused = 0
    for number in range(12):
        path = Path(shutil.copy(template, folder / f"{number}.h5"))
        at = time.time() + 0.1
        # A second run asks for a fifth of a second before it believes that the first one is going on.
        slow = 0.008 if number % 3 == 0 else 0.0
        both = [drivers.begin("declared", path, at=at, slow=slow) for _ in range(2)]
        answers = [driver.answer() for driver in both]
        assert any("means" in answer for answer in answers), answers
        for answer in answers:
            if "error" in answer:
                assert answer["error"] == "FileBusyError", answer
                assert "another run is computing" in answer["message"]
                refused += 1
            else:
                assert answer["means"] == MEANS
        with h5py.File(path) as file:
            groups = [name for name in file[CHANNEL] if name.startswith("Raw_Data-")]
            assert groups == ["Raw_Data-Declared_000"], number
            assert file[CHANNEL][groups[0]]["completed_positions"][:].all()
        assert not [name for name in beside(path) if name.startswith(f".{number}.h5")]
    assert refused > 0, "they must meet at least once"


# -- readers -----------------------------------------------------------------------------------------------------------

READER = """
import json, os, sys
import h5py, lazyproc
from lazyproc.status import file_status

path, main, stop = sys.argv[1:]
counts = {"looks": 0, "again": 0, "partial": 0, "running": 0, "states": []}

def look():
    # What is in the file by plain h5py, opened as anybody would.
    with h5py.File(path, "r") as file:
        parent = file[main].parent
        groups = [name for name in parent if name.startswith("Raw_Data-")]
        means = file[main][:].mean(1)
        for name in groups:
            done = parent[name]["completed_positions"][:]
            assert set(done.tolist()) <= {0, 1}
            # Marks are read first: what they tell is on the disk.
            assert (parent[name]["Mean"][:, 0][done == 1] == means[done == 1]).all()
            counts["partial"] += int(0 < done.sum() < len(done))
    status = file_status(path)
    assert not any(one.problem for one in status.results), status
    counts["running"] += status.running is not None
    for one in status.results:
        with_views = lazyproc.open_results(f"{path}::{one.group}")
        assert int((with_views["status"].values == 1).sum()) >= one.n_done
        with_views.close()
    return [one.n_done for one in status.results]

import dask.array, xarray, lazyproc.results  # which takes a while
print("looking", flush=True)
stopped = False
while not stopped:
    stopped = os.path.exists(stop)  # once more then
    counts["looks"] += 1
    before = os.stat(path).st_mtime_ns
    try:
        state = look()
    except (OSError, KeyError, RuntimeError) as error:
        # The group was made between the opening and the reading: the file has to be opened again.
        assert os.stat(path).st_mtime_ns != before, error
        counts["again"] += 1
        state = look()
    if state not in counts["states"][-1:]:
        counts["states"].append(state)
print(json.dumps(counts), flush=True)
"""


def test_readers_beside_a_run(drivers: Drivers, path: Path, tmp_path: Path) -> None:
    """From before the group is made until the end: plain h5py, `lazyproc status`, and views of the results."""
    command = [sys.executable, "-c", READER, str(path), MAIN, str(tmp_path / "stop")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        for cores in (1, 2):
            assert drivers.run("declared", path, slow=0.04 - 0.01 * cores, cores=cores)["means"] == MEANS
        (tmp_path / "stop").touch()
        output, errors = reader.communicate(timeout=60)
    assert reader.returncode == 0, errors
    counts = json.loads(output)
    assert counts["looks"] > 20
    assert counts["partial"] > 2
    assert counts["running"] > 2
    assert counts["again"] <= 4, "only when the structure changes: twice a run"
    assert counts["states"][0] == []
    assert counts["states"][-1] == [N_POSITIONS, N_POSITIONS]
    totals = [sum(state) for state in counts["states"]]
    assert totals == sorted(totals), "what is done stays done"


# -- file systems without locks ----------------------------------------------------------------------------------------

NO_LOCKS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

/* Locks fail on files below the folder NO_LOCKS_BELOW, as they do on network file systems without a lock daemon. */
static int below(int descriptor) {
    char link[64], name[4096];
    const char *folder = getenv("NO_LOCKS_BELOW");
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, name, sizeof name);
    return folder && length > 0 && !strncmp(name, folder, strlen(folder));
}

static int refuse(void) {
    const char *number = getenv("NO_LOCKS_ERRNO");
    errno = number ? atoi(number) : ENOLCK;
    return -1;
}

int flock(int descriptor, int operation) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return below(descriptor) ? refuse() : real(descriptor, operation);
}

static int control(const char *name, int descriptor, int command, void *argument) {
    int (*real)(int, int, void *) = dlsym(RTLD_NEXT, name);
    int locks = command == F_OFD_SETLK || command == F_OFD_SETLKW || command == F_SETLK || command == F_SETLKW;
    return locks && getenv("NO_LOCKS_OF_BYTES") && below(descriptor) ? refuse() : real(descriptor, command, argument);
}

#define CONTROL(name) int name(int descriptor, int command, ...) { \
    va_list rest; va_start(rest, command); void *argument = va_arg(rest, void *); va_end(rest); \
    return control(#name, descriptor, command, argument); }
CONTROL(fcntl)
CONTROL(fcntl64)
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    """Drivers for which the folder named NO_LOCKS_BELOW is on a file system without locks."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler, and Linux")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(NO_LOCKS)
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "shim.c", "-ldl"], check=True)
    started = Drivers(folder, LD_PRELOAD=str(library))
    yield started
    started.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_without_locks_it_says_what_can_be_set(no_locks: Drivers, path: Path, number: int) -> None:
    before = path.read_bytes()
    environment = {"NO_LOCKS_BELOW": str(path.parent), "NO_LOCKS_ERRNO": str(number), "NO_LOCKS_OF_BYTES": "1"}
    for kind in ("declared", "handle", "hooks"):
        answer = no_locks.run(kind, path, environment)
        assert answer["error"] == "LockingError", answer
        for text in (str(path), os.strerror(number), "LAZYPROC_LOCKING=lockf", "LAZYPROC_LOCKING=none", "h5_target"):
            assert text in answer["message"]
    answer = no_locks.run("declared", path, environment | {LOCKING_NAME: "lockf"})
    assert answer["error"] == "LockingError"
    assert "LAZYPROC_LOCKING=lockf" not in answer["message"]
    assert "LAZYPROC_LOCKING=none" in answer["message"]
    assert path.read_bytes() == before
    assert beside(path) == set()


@pytest.mark.parametrize("kind", ["declared", "hooks", "handle"])
@pytest.mark.parametrize("locking", ["lockf", "none"])
def test_other_locks_and_none(no_locks: Drivers, path: Path, locking: str, kind: str) -> None:
    """A second run is refused, a killed one leaves nothing in the way, results are right."""
    environment = {"NO_LOCKS_BELOW": str(path.parent), LOCKING_NAME: locking}
    if locking == "none":
        environment["NO_LOCKS_OF_BYTES"] = "1"
    first = no_locks.hold(kind, path, environment)
    refused = no_locks.run("declared", path, environment)
    assert refused["error"] == "FileBusyError"
    who = f"another run is computing into this file: host {os.uname().nodename}, pid {first.pid}, since 20"
    assert who in refused["message"]
    about = holder(str(path)) or {}
    assert (about.get("pid"), about.get("locking")) == (first.pid, locking)
    first.kill()
    wait_until_free(path)
    (path.parent / "gate").touch()
    resumed = no_locks.run(kind, path, environment, gate=str(path.parent / "gate"))
    assert resumed.get("means") == MEANS, resumed
    if kind == "declared":
        fresh = no_locks.run("declared", path, environment, cores=2, slow=0.04)  # with worker processes
        assert fresh.get("means") == MEANS, fresh
    assert beside(path) == set()


def test_a_lock_file_of_another_host_where_there_are_no_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell from here whether its process lives: whoever knows removes the file."""
    monkeypatch.setenv(LOCKING_NAME, "none")
    lock_path = Path(sidecar(str(path), "lock"))
    about = {"host": "elsewhere", "pid": 1, "since": "2020-01-01 00:00:00", "run_id": "of old", "locking": "none"}
    lock_path.write_text(json.dumps(about))
    assert (file_status(str(path)).running or {})["host"] == "elsewhere"
    for kind in ("none", "flock", "lockf"):
        monkeypatch.setenv(LOCKING_NAME, kind)
        with pytest.raises(FileBusyError, match=rf"host elsewhere, pid 1, .* remove {re.escape(str(lock_path))}"):
            Mean(f"{path}::{MAIN}").compute()
    lock_path.unlink()
    for kind in ("none", "flock", "lockf"):
        monkeypatch.setenv(LOCKING_NAME, kind)
        with Mean(f"{path}::{MAIN}") as process:
            process.compute(override=True)
            assert process.h5_results_grp["Mean"][:, 0].tolist() == MEANS
        assert beside(path) == set()


def test_without_locks_only_the_driver_writes(path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv(LOCKING_NAME, "none")
    lock = RunLock(str(path), "run")
    lock.acquire()
    assert not lock.fence.holds_workers
    assert f"{path}: no locks: nothing keeps other programs from writing into this file" in caplog.text
    with pytest.raises(FileBusyError, match=f"pid {os.getpid()}, since"):
        RunLock(str(path), "second").acquire()
    with lock.fence.passed():
        pass
    lock.release()
    with pytest.raises(FencedError, match="is over"), lock.fence.passed():
        pass
    monkeypatch.setenv(LOCKING_NAME, "maybe")
    with pytest.raises(ArgumentValueError, match=r"LAZYPROC_LOCKING: 'maybe' came; expected one of flock, lockf, none"):
        RunLock(str(path), "run")


def test_runs_with_different_locks_see_each_other(drivers: Drivers, path: Path) -> None:
    for kind in KINDS:
        folder = path.parent / kind
        folder.mkdir()
        scan = make_scan(folder / "scan.h5")
        first = drivers.hold("declared", scan, {LOCKING_NAME: kind})
        for other in KINDS:
            answer = drivers.run("declared", scan, {LOCKING_NAME: other})
            assert answer["error"] == "FileBusyError", (kind, other, answer)
            assert f"pid {first.pid}" in answer["message"]
        (folder / "gate").touch()
        assert first.answer()["means"] == MEANS
