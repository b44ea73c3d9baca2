"""How a process finds out that it was launched with others, notices that they die, and whether they share a file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from dask import config

from lazyproc.engine.choose import Scheduler
from lazyproc.engine.handshake import why_not_in_place
from lazyproc.engine.launch import Launch, detect
from lazyproc.engine.line import Line, LineAddress, Switchboard
from lazyproc.hdf5.file_id import FileId, this_machine
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.shared_file import SharedFileTrial

# --- the launcher ----------------------------------------------------------------------------------------------------

HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_NPROCS": "16"}
STEP = {**BATCH, "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "5"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        (HYDRA, Launch(4, 2, "PMI_RANK")),
        (OPEN_MPI, Launch(8, 0, "OMPI_COMM_WORLD_RANK")),
        ({**HYDRA, **OPEN_MPI}, Launch(8, 0, "OMPI_COMM_WORLD_RANK")),  # an inner mpiexec inherits what an outer set
        ({"PMIX_RANK": "3"}, Launch(None, 3, "PMIX_RANK")),
        # a plain batch script tells how many tasks it could start, and that is all
        (BATCH, None),
        ({**BATCH, "SLURM_STEP_NUM_TASKS": "1"}, None),
        # srun of several tasks: with pmi2, with pmix, without MPI
        ({**STEP, "PMI_RANK": "5", "PMI_SIZE": "16"}, Launch(16, 5, "PMI_RANK")),
        ({**STEP, "PMIX_RANK": "5"}, Launch(16, 5, "PMIX_RANK")),
        (STEP, Launch(16, 5, "SLURM_STEP_NUM_TASKS", by_mpi=False)),
        # srun of one task is how any program is started there; mpiexec -n 1 is a job of one rank
        ({**BATCH, "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"}, None),
        ({**BATCH, "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"}, Launch(1, 0, "PMI_RANK")),
        (
            {**BATCH, "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"},
            Launch(1, 0, "PMI_RANK"),
        ),
        # mpiexec inside of a batch script starts its helpers, one a node, as a step
        ({**BATCH, "SLURM_STEP_NUM_TASKS": "2", **HYDRA}, Launch(4, 2, "PMI_RANK")),
        # nonsense tells nothing
        ({"PMI_RANK": "", "PMI_SIZE": "4"}, None),
        ({"PMI_RANK": "-1", "PMI_SIZE": "4"}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "many"}, Launch(None, 1, "PMI_RANK")),
    ],
)
def test_the_environment_tells_the_launcher(environ, found):
    assert detect(environ) == found
    assert found is None or found.is_driver == (found.rank == 0)


def test_asking_does_not_touch_mpi():
    code = "import sys, lazyproc.clusters; lazyproc.clusters.detect(); print([m for m in sys.modules if 'mpi4py' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# --- the line --------------------------------------------------------------------------------------------------------


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


CALLER = """
import sys, time
from lazyproc.engine.line import Line, LineAddress
line = Line(LineAddress("127.0.0.1", int(sys.argv[1]), bytes.fromhex(sys.argv[2])), int(sys.argv[3]), 10)
print("connected", flush=True)
time.sleep(60)
"""


def caller(board, rank):
    arguments = [str(board.address.port), board.address.token.hex(), str(rank)]
    process = subprocess.Popen([sys.executable, "-c", CALLER, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"connected\n"
    process.stdout.close()
    return process


def test_the_driver_notices_who_is_killed():
    cut: list[int] = []
    board = Switchboard("127.0.0.1", cut.append)
    first, second = caller(board, 1), caller(board, 2)
    second.kill()
    second.wait()
    wait_until(lambda: cut == [2])
    board.close()
    first.kill()
    first.wait()
    time.sleep(1)
    assert cut == [2]  # what ends after the end was meant to


def test_the_driver_waits_until_all_have_ended_and_not_for_ever():
    board = Switchboard("127.0.0.1", lambda rank: None)
    callers = [caller(board, 1), caller(board, 2)]
    board.close()
    ended = threading.Event()

    def wait():
        board.wait_until_cut(60)
        ended.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    for one in callers:
        assert not ended.wait(0.5)
        one.kill()
        one.wait()
    assert ended.wait(30)
    waiting.join()
    slow = Switchboard("127.0.0.1", lambda rank: None)
    one = caller(slow, 1)
    slow.close()
    slow.wait_until_cut(0.1)
    assert one.poll() is None
    one.kill()
    one.wait()


def test_the_others_notice_that_the_driver_is_killed(tmp_path):
    code = (
        "import sys, time\nfrom lazyproc.engine.line import Switchboard\n"
        "address = Switchboard('127.0.0.1', print).address\nprint(address.port, address.token.hex(), flush=True)\n"
        "time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    port, token = driver.stdout.readline().split()
    driver.stdout.close()
    line = Line(LineAddress("127.0.0.1", int(port), bytes.fromhex(token)), 1, 10)
    time.sleep(0.2)
    assert not line.is_cut()
    driver.kill()
    driver.wait()
    wait_until(line.is_cut)
    line.close()


def test_strangers_on_the_line_are_nobody():
    cut: list[int] = []
    board = Switchboard("127.0.0.1", cut.append)
    for said in (b"GET / HTTP/1.1\r\n\r\n" * 4, b"", bytes(20)):
        with socket.create_connection((board.address.host, board.address.port)) as stranger:
            stranger.sendall(said)
    time.sleep(0.5)
    assert cut == []
    board.close()


# --- memory is counted by the machine ---------------------------------------------------------------------------------


def test_a_cluster_gets_only_as_many_blocks_as_fit_on_one_machine():
    cluster = Scheduler("client", 64, n_beside=16)
    assert cluster.n_on_machine == 16
    assert cluster.with_workers(64).most is None
    assert cluster.with_workers(5).most == 5
    assert Scheduler("processes", 8).n_on_machine == 8


# --- one file, seen from several machines ----------------------------------------------------------------------------


@pytest.fixture
def trial(tmp_path):
    path = tmp_path / "scan.h5"
    path.write_bytes(bytes(100))
    lock = RunLock(str(path), "this_run")
    lock.acquire()
    yield replace(SharedFileTrial.of(str(path), FileId.of(os.stat(path)), lock.fence), patience=3.0)
    lock.release()


def try_with(driver, *workers):
    """Let a driver and workers, each with a trial of its own, do their parts; return what each says went wrong."""
    said = [""] * len(workers)

    def work(number):
        said[number] = workers[number].answer(number + 1)

    driver.begin(len(workers))
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(workers))]
    for thread in threads:
        thread.start()
    wrong = driver.meet(len(workers), lambda: not all(thread.is_alive() for thread in threads))
    for thread in threads:
        thread.join()
    wrong = wrong or driver.check(len(workers))
    driver.end()
    return wrong, said


class Asked(Exception):
    """The workers would be asked."""


class Client:
    def run(self, *_, **__):
        raise Asked


@pytest.mark.parametrize("text", ["no", "off", "false", "0", "none", "No", "OFF", "False", "NONE", "None", " off "])
def test_workers_are_not_asked_where_the_setting_is_off(trial, text):
    with config.set(config.collect_env({"DASK_LAZYPROC__IN_PLACE": text})):
        assert why_not_in_place(Client(), trial) == "the setting lazyproc.in-place is off"


@pytest.mark.parametrize("text", ["yes", "on", "true", "1", "True"])
def test_workers_are_asked_where_the_setting_is_on(trial, text):
    with config.set(config.collect_env({"DASK_LAZYPROC__IN_PLACE": text})), pytest.raises(Asked):
        why_not_in_place(Client(), trial)


def test_one_file_passes_the_trial(trial, tmp_path):
    assert trial.machine() == this_machine()
    assert try_with(trial, trial, trial, trial) == ("", ["", "", ""])
    assert not os.path.exists(trial.path)


def test_the_trial_fails_without_the_drivers_lock(trial, tmp_path):
    elsewhere = tmp_path / "not_locked"
    elsewhere.touch()
    deaf = replace(trial, fence=replace(trial.fence, lock_path=str(elsewhere)))
    wrong, said = try_with(trial, trial, deaf)
    assert wrong
    assert said[0] == ""
    assert "does not see the driver's locks" in said[1]


def test_the_trial_fails_without_the_workers_locks(trial, tmp_path):
    fence = tmp_path / "another_fence"
    fence.write_text("this_run")
    unseen = replace(trial, fence=replace(trial.fence, fence_path=str(fence)))
    wrong, said = try_with(trial, unseen)
    assert "locks of its workers are not seen" in wrong
    assert said == [""]


def test_the_trial_fails_if_bytes_do_not_arrive(trial, tmp_path):
    elsewhere = replace(trial, path=str(tmp_path / "another_copy"))
    elsewhere.begin(1)
    wrong, said = try_with(trial, elsewhere)
    assert "what its workers write is not seen" in wrong
    assert "does not see what the driver writes" in said[0]


def test_the_trial_fails_if_an_old_page_is_written_back(trial):
    descriptor = os.open(trial.path, os.O_RDWR | os.O_CREAT)
    trial.begin(1)
    old = os.pread(descriptor, 100, 0)
    worker = threading.Thread(target=trial.answer, args=(1,))
    worker.start()
    assert trial.meet(1, lambda: False) == ""
    worker.join()
    assert trial.check(1) == ""
    os.pwrite(descriptor, old[:8], 0)  # as a machine does that writes whole pages
    os.close(descriptor)
    assert "is not all there" in trial.check(1)


def test_another_file_under_the_same_path_is_seen(trial, tmp_path):
    os.rename(trial.results, tmp_path / "old.h5")
    (tmp_path / "scan.h5").write_bytes(bytes(100))
    assert trial.machine() == ""
    os.unlink(trial.results)
    assert trial.machine() == ""


def test_devices_are_compared_on_their_own_machine_only(tmp_path):
    status = os.stat(tmp_path)
    assert FileId.of(status).fits(status)
    assert not FileId(status.st_dev + 1, status.st_ino, this_machine()).fits(status)
    assert FileId(status.st_dev + 1, status.st_ino, "elsewhere").fits(status)
    assert not FileId(status.st_dev, status.st_ino + 1, "elsewhere").fits(status)
    assert not FileId(status.st_dev, status.st_ino, "elsewhere").is_local
