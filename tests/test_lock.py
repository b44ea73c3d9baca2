"""The run's lock and its fence: one driver a file, and nothing written for a driver that is gone."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

from lazyproc.core.errors import FileBusyError, MissingFileError, ReadOnlyFileError
from lazyproc.hdf5.holder import holder
from lazyproc.hdf5.lock import Fence, FencedError, RunLock
from lazyproc.hdf5.sidecar import CLAIMS, HANDSHAKE, file_beside, has_pending, sidecar

DRIVER = """
import sys, time
from lazyproc.hdf5.lock import RunLock
lock = RunLock(sys.argv[1], sys.argv[2])
lock.acquire()
print("locked", flush=True)
sys.stdin.readline()
lock.release()
"""
WORKER = """
import sys
from lazyproc.hdf5.lock import Fence
with Fence(*sys.argv[1:]).passed():
    print("passed", flush=True)
    sys.stdin.readline()
"""


ASK = """
import sys
from lazyproc.hdf5.holder import holder
print("asking", flush=True)
while True:
    holder(sys.argv[1])
"""


class Starter:
    """Starts processes, and ends them with the test."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def __call__(self, script: str, *args: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, args)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        return process

    def and_wait(self, script: str, *args: object) -> subprocess.Popen[str]:
        process = self(script, *args)
        assert process.stdout is not None
        assert process.stdout.readline() in ("locked\n", "passed\n", "asking\n")
        return process

    def driver(self, path: Path, run_id: str) -> subprocess.Popen[str]:
        return self.and_wait(DRIVER, path, run_id)

    def worker(self, fence: Fence) -> subprocess.Popen[str]:
        return self.and_wait(WORKER, fence.lock_path, fence.fence_path, fence.run_id)


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    for process in starter.started:
        kill(process)


def fence_of(path: Path, run_id: str) -> Fence:
    return Fence(sidecar(str(path), "lock"), sidecar(str(path), "fence"), run_id)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    with process:
        process.wait()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "scan.h5"
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("kind", ["lock", "fence", "journal", "undo"])
def test_files_beside_keep_the_names_that_they_have_always_had(path: Path, kind: str) -> None:
    """Runs of older versions have left some."""
    beside = path.with_name(f".scan.h5.lazyproc-{kind}")
    assert sidecar(str(path), kind) == os.path.realpath(beside)
    assert file_beside(sidecar(str(path), kind)) == os.path.realpath(path)
    assert not has_pending(str(path))
    beside.touch()
    assert has_pending(str(path)) == (kind in ("journal", "undo"))


def test_a_second_run_is_refused_in_the_same_process(path: Path) -> None:
    first, second = RunLock(str(path), "first"), RunLock(str(path), "second")
    first.acquire()
    with pytest.raises(FileBusyError) as refused:
        second.acquire()
    message = str(refused.value)
    about = holder(str(path))
    assert about is not None
    assert about["run_id"] == "first"
    assert all(part in message for part in (str(path), about["host"], f"pid {os.getpid()}", f"since {about['since']}"))
    with first.fence.passed():
        pass
    first.release()
    second.acquire()
    second.release()


def test_a_second_run_is_refused_in_another_process_until_the_first_is_killed(path: Path, start: Starter) -> None:
    driver = start.driver(path, "first")
    lock = RunLock(str(path), "second")
    with pytest.raises(FileBusyError, match=rf"host .+, pid {driver.pid}, since 20\d\d-"):
        lock.acquire()
    assert (holder(str(path)) or {})["pid"] == driver.pid
    kill(driver)
    assert holder(str(path)) is None
    lock.acquire()
    assert (holder(str(path)) or {})["pid"] == os.getpid()
    lock.release()


def test_release_leaves_nothing(path: Path) -> None:
    lock = RunLock(str(path), "run")
    assert holder(str(path)) is None
    lock.acquire()
    assert len(os.listdir(path.parent)) == 3
    lock.release()
    lock.release()
    assert os.listdir(path.parent) == ["scan.h5"]
    assert holder(str(path)) is None


def test_files_left_by_a_killed_run_are_taken_over(path: Path, start: Starter) -> None:
    kill(start.driver(path, "first"))
    assert len(os.listdir(path.parent)) == 3
    for kind in (CLAIMS, HANDSHAKE):  # as if it had had a cluster
        Path(sidecar(str(path), kind)).write_bytes(b"")
    lock = RunLock(str(path), "second")
    lock.acquire()
    lock.release()
    assert os.listdir(path.parent) == ["scan.h5"]


def test_a_link_is_the_same_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.h5"
    link.symlink_to(path)
    lock = RunLock(str(path), "first")
    lock.acquire()
    with pytest.raises(FileBusyError):
        RunLock(str(link), "second").acquire()
    lock.release()


@pytest.mark.skipif(sys.platform != "linux", reason="locks of open files on byte ranges are Linux's")
def test_a_hard_link_is_the_same_file(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with h5py.File(path, "w") as file:
        file["values"] = 1
    link = tmp_path / "link.h5"
    os.link(path, link)
    lock = RunLock(str(path), "first")
    lock.acquire()
    assert "several names" in caplog.text
    with pytest.raises(FileBusyError, match=r"link\.h5: another run.*hard links"):
        RunLock(str(link), "second").acquire()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".link.h5")]
    with h5py.File(link, "r") as file:  # nobody else is kept away
        assert file["values"][()] == 1
    lock.release()
    for name in (link, path):
        again = RunLock(str(name), "third")
        again.acquire()
        again.release()
    link.unlink()
    caplog.clear()
    lock.acquire()
    lock.release()
    assert not caplog.text


def test_other_files_are_free(path: Path) -> None:
    locks = [RunLock(str(path), "first"), RunLock(str(path.with_name("other.h5")), "second")]
    for lock in locks:
        lock.acquire()
    for lock in locks:
        with lock.fence.passed():
            pass
        lock.release()


def refused(fence: Fence, why: str) -> None:
    written = []
    with pytest.raises(FencedError, match=why), fence.passed():
        written.append(fence)
    assert not written


def test_a_worker_that_does_not_see_the_file_says_so(tmp_path: Path) -> None:
    """As on a machine that has not mounted its folder, or has another one in its place."""
    for path in (tmp_path / "scan.h5", tmp_path / "gone" / "scan.h5"):
        fence, message = fence_of(path, "mine"), re.escape(f"{path}: there is no such file on the machine")
        with pytest.raises(MissingFileError, match=message), fence.passed():
            pass


def test_the_fence_stands_before_older_runs(path: Path, start: Starter) -> None:
    driver = start.driver(path, "first")
    old = fence_of(path, "first")
    with old.passed():
        pass
    kill(driver)
    refused(old, "run first is over: its driver is gone")
    lock = RunLock(str(path), "second")
    lock.acquire()
    refused(old, "run first is over: the file belongs to the run second")
    with lock.fence.passed():
        pass
    lock.release()
    refused(old, "run first is over")
    refused(lock.fence, "run second is over")


def test_the_fence_stands_after_a_clean_end(path: Path) -> None:
    first, second = RunLock(str(path), "first"), RunLock(str(path), "second")
    first.acquire()
    first.release()
    refused(first.fence, "is over")
    second.acquire()
    refused(first.fence, "belongs to the run second")
    second.release()


def test_the_fence_stands_without_its_files(path: Path) -> None:
    lock = RunLock(str(path), "run")
    lock.acquire()
    os.unlink(lock.fence.lock_path)
    refused(lock.fence, "its driver is gone")
    os.unlink(lock.fence.fence_path)
    refused(lock.fence, "is gone")
    lock.release()


def test_a_new_run_waits_for_a_write_under_way(path: Path, start: Starter) -> None:
    driver = start.driver(path, "first")
    worker = start.worker(fence_of(path, "first"))
    kill(driver)
    successor = start(DRIVER, path, "second")
    assert successor.stdout is not None
    assert not select.select([successor.stdout], [], [], 0.5)[0], "it must wait while the old worker may write"
    worker.communicate("\n")
    assert successor.stdout.readline() == "locked\n"
    refused(fence_of(path, "first"), "belongs to the run second")
    successor.communicate("\n")
    assert os.listdir(path.parent) == ["scan.h5"]


def test_a_write_that_does_not_end_is_waited_for_once(
    path: Path, start: Starter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who is refused at the fence does not wait there again to clear up: what is there keeps the next run away, too."""
    monkeypatch.setattr("lazyproc.hdf5.lock._WRITE_SECONDS", 0.1)
    driver = start.driver(path, "first")
    worker = start.worker(fence_of(path, "first"))
    kill(driver)
    for _ in range(2):
        with pytest.raises(FileBusyError, match="a worker has been writing"):
            RunLock(str(path), "second").acquire()
    assert caplog.text == ""
    assert holder(str(path)) is None
    worker.communicate("\n")
    lock = RunLock(str(path), "third")
    lock.acquire()
    os.unlink(sidecar(str(path), "fence"))
    lock.release()
    assert os.listdir(path.parent) == ["scan.h5"]


def test_release_waits_for_a_write_under_way(path: Path, start: Starter) -> None:
    driver = start.driver(path, "run")
    worker = start.worker(fence_of(path, "run"))
    assert driver.stdin is not None
    driver.stdin.write("\n")
    driver.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(0.5)
    worker.communicate("\n")
    driver.communicate(timeout=60)
    assert os.listdir(path.parent) == ["scan.h5"]


def test_questions_of_workers_do_not_turn_a_driver_away(path: Path, start: Starter) -> None:
    """Asking whether the driver lives holds its lock shared for a moment; a new driver must not fall over that."""
    kill(start.driver(path, "first"))
    asking = start.and_wait(ASK, path)
    try:
        for number in range(50):
            lock = RunLock(str(path), f"run {number}")
            lock.acquire()
            lock.release()
    finally:
        kill(asking)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "scan.h5", Path("/proc/scan.h5")):
        lock = RunLock(str(path), "run")
        with pytest.raises(ReadOnlyFileError, match=r"scan\.h5.*lock file.*cannot be written.*h5_target_group"):
            lock.acquire()
        lock.release()


def test_an_interrupted_acquire_keeps_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            RunLock(str(path), "first").acquire()
    lock = RunLock(str(path), "second")
    lock.acquire()
    lock.release()
