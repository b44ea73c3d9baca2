"""Real drivers, killed at many moments: the file opens, what was there is there, what is marked done is right."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from usid_files import CHANNEL, make_usid_file

from lazyproc.hdf5.transaction import read_journal, recover
from lazyproc.status import file_status

MAIN = f"{CHANNEL}/Raw_Data"
MASK = "completed_positions"
N_POSITIONS = 120
SEED = int(os.environ.get("LAZYPROC_TEST_SEED", "2024"))

DRIVER = """
import json, sys, time
import h5py, lazyproc

layout, scan, out, main, cores, seconds, calls = json.loads(sys.argv[1])

class Slow(lazyproc.Process):
    process_name = "Slow"
    outputs = {
        "Mean": lazyproc.Output("f8"),
        "Twice": lazyproc.Output("f4", shape_from_main=True),
    }

    @staticmethod
    def _map_function(row, seconds, calls):
        with open(calls, "a") as file:
            file.write(f"{int(row[0])}\\n")
        time.sleep(seconds)
        return {"Mean": row.mean(), "Twice": 2 * row}

options = dict(parms_dict={"seconds": seconds, "calls": calls}, cores=cores, checkpoint_interval=0.1, verbose=True)
if layout == "path":
    with Slow(f"{scan}::{main}", **options) as process:
        process.compute()
elif layout == "path, results elsewhere":
    with Slow(f"{scan}::{main}", h5_target_group=f"{out}::/results", **options) as process:
        process.compute()
elif layout == "handle":
    with h5py.File(scan, "r+") as file:
        Slow(file[main], **options).compute()
else:
    with h5py.File(scan, "r") as file, h5py.File(out, "a") as target:
        Slow(file[main], h5_target_group=target.require_group("results"), **options).compute()
print("finished", flush=True)
"""

LAYOUTS = ["path", "path, results elsewhere", "handle", "handle, results elsewhere"]


def raw_data() -> np.ndarray:
    data = np.random.default_rng(8).standard_normal((N_POSITIONS, 16))
    data[:, 0] = np.arange(N_POSITIONS)
    return data


@dataclass
class Case:
    """A scan, where its results go, and the driver that computes them."""

    folder: Path
    layout: str
    cores: int
    seconds: float

    @property
    def scan(self) -> Path:
        return self.folder / "scan.h5"

    @property
    def results(self) -> Path:
        return self.folder / "out.h5" if self.layout.endswith("elsewhere") else self.scan

    @property
    def calls(self) -> Path:
        return self.folder / "calls"

    def make(self) -> None:
        """Write the scan, with neighbours, and what the results' file holds already."""
        make_usid_file(self.scan, n_rows=N_POSITIONS // 10, n_cols=10, n_spectral=16, data=raw_data())
        with h5py.File(self.scan, "r+") as file:
            neighbours(file[CHANNEL])
        if self.layout == "handle, results elsewhere":
            with h5py.File(self.results, "w") as file:
                file.create_group("results")
        (self.folder / "driver.py").write_text(DRIVER)
        self.calls.touch()

    def start(self) -> subprocess.Popen[str]:
        arguments = [self.layout, str(self.scan), str(self.folder / "out.h5"), MAIN, self.cores, self.seconds]
        command = [sys.executable, str(self.folder / "driver.py"), json.dumps([*arguments, str(self.calls)])]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def finish(self) -> list[int]:
        """Let the driver finish; return the positions that it called the function for."""
        n_before = len(self.calls.read_text())
        process = self.start()
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "finished" in output
        return [int(line) for line in self.calls.read_text()[n_before:].split()]

    def check(self, *, complete: bool = False) -> np.ndarray:
        """Look at the file with plain h5py; return the mask (empty before there is one)."""
        if read_journal(str(self.results)) is not None:
            recover(str(self.results))  # killed within the few writes that a journal is for
        with h5py.File(self.scan) as file:
            assert file[MAIN][:].tobytes() == raw_data().tobytes()
            assert_neighbours(file[CHANNEL])
        if not self.results.exists():
            return np.empty(0)
        with h5py.File(self.results) as file:
            parent = file[CHANNEL] if self.results == self.scan else file.get("results", {})
            groups = [name for name in parent if "-Slow_" in name]
            if not groups:
                assert not complete
                return np.empty(0)
            assert groups == ["Raw_Data-Slow_000"]
            group = parent[groups[0]]
            mask = group[MASK][:]
            assert set(mask.tolist()) <= {0, 1}
            done = mask.astype(bool)
            assert done.all() or not complete
            data = raw_data()
            assert (group["Mean"][:, 0][done] == np.array([row.mean() for row in data])[done]).all()
            assert (group["Twice"][:][done] == np.array([2 * row for row in data]).astype("f4")[done]).all()
        return mask


def is_complete(mask: np.ndarray) -> bool:
    return bool(mask.size and mask.all())


def neighbours(parent: h5py.Group) -> None:
    for number in range(6):
        group = parent.create_group(f"Neighbour_{number}")
        group.attrs["number"] = number
        group["values"] = np.arange(50) + number
    parent.create_dataset("Zipped", data=np.arange(9000).reshape(90, 100), chunks=(20, 30), compression="gzip")


def assert_neighbours(parent: h5py.Group) -> None:
    for number in range(6):
        group = parent[f"Neighbour_{number}"]
        assert group.attrs["number"] == number
        assert (group["values"][:] == np.arange(50) + number).all()
    assert (parent["Zipped"][:] == np.arange(9000).reshape(90, 100)).all()


def wait_for_line(process: subprocess.Popen[str], *texts: str) -> None:
    """Wait until the driver has logged one of these texts."""
    assert process.stderr is not None
    for line in process.stderr:
        if any(text in line for text in texts):
            return
    pytest.fail(f"the driver ended without a word of {texts}")


def end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a driver's session and close its pipes."""
    members = [one for one in psutil.process_iter(["pid"]) if session_of(one.pid) == process.pid]
    for one in members:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def kill(process: subprocess.Popen[str], whole_group: bool) -> None:
    if process.returncode is not None:
        return
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Case:
    layout, cores, seconds = request.param
    case = Case(tmp_path, layout, cores, seconds)
    case.make()
    return case


def kill_at_random(case: Case, chance: random.Random, longest: float, *, in_loop: bool = False) -> bool:
    """Start a driver and kill it at a random moment; return whether it was still at work."""
    process = case.start()
    try:
        if in_loop:
            wait_for_line(process, "positions in", "returning the finished")
        elif case.layout.startswith("handle"):
            # Plain HDF5 creates the group in several steps, which a kill may cut through: that is not looked at here.
            wait_for_line(process, "results go to", "resuming", "returning the finished")
        time.sleep(chance.uniform(0, longest))
        working = process.poll() is None
        kill(process, whole_group=chance.random() < 0.5)
        case.check()  # while workers that have lost their driver may still be there
        return working
    finally:
        end(process)


@pytest.mark.parametrize(
    "case",
    [(layout, 1, 0.008) for layout in LAYOUTS] + [("path", 2, 0.014), ("handle, results elsewhere", 2, 0.014)],
    ids=lambda value: f"{value[0]}, {value[1]} cores",
    indirect=True,
)
def test_killed_and_resumed(case: Case) -> None:
    """Five kills, each of them of a run from the start or of one that goes on; then the rest, to the end."""
    seed = f"{SEED} {case.layout} {case.cores}"
    chance = random.Random(seed)
    pristine = {path: path.read_bytes() for path in (case.scan, case.results) if path.exists()}
    n_working = 0
    for number in range(5):
        if number % 2 == 0 or is_complete(case.check()):
            for path in (case.scan, case.results):
                path.unlink(missing_ok=True)
            for path, content in pristine.items():
                path.write_bytes(content)
        n_working += kill_at_random(case, chance, 0.8 if case.layout.startswith("handle") else 1.3)
        print(f"seed {seed}, kill {number}: {int(case.check().sum())} positions done")
    assert n_working >= 2, "the kills have to come before the end"
    mask = case.check()
    resumed = case.finish()
    assert case.check(complete=True).all()
    remaining = np.flatnonzero(mask == 0).tolist() if mask.size else list(range(N_POSITIONS))
    assert sorted(resumed) == remaining, seed


@pytest.mark.parametrize("case", [("path", 1, 0.01), ("handle", 2, 0.015)], ids=str, indirect=True)
def test_one_long_chain_of_kills(case: Case) -> None:
    """A run that is killed again and again gets to its end, and what is done stays done."""
    seed = f"{SEED} chain {case.layout}"
    chance = random.Random(seed)
    before = np.zeros(N_POSITIONS, bool)
    for number in range(8):
        kill_at_random(case, chance, 0.7, in_loop=True)
        mask = case.check()
        print(f"seed {seed}, kill {number}: {int(mask.sum())} positions done")
        done = mask.astype(bool) if mask.size else before
        assert done[before].all(), seed
        before = done
    assert before.any()
    resumed = case.finish()
    assert sorted(resumed) == np.flatnonzero(~before).tolist(), seed
    assert case.check(complete=True).all()


@pytest.mark.parametrize("case", [("path", 1, 0.01), ("path", 2, 0.02)], ids=str, indirect=True)
def test_computed_again_are_only_the_last_blocks(case: Case) -> None:
    """What a kill costs: the blocks under way, and those finished since the last commit."""
    process = case.start()
    try:
        wait_for(lambda: case.check().sum() > N_POSITIONS // 3)
        kill(process, whole_group=True)
    finally:
        end(process)
    n_called = len({*case.calls.read_text().split()})
    mask = case.check()
    resumed = case.finish()
    lost = n_called - int(mask.sum())
    assert sorted(resumed) == np.flatnonzero(mask == 0).tolist()
    # 0.1 s between commits, and blocks of a quarter of that, two of them waiting for each worker.
    assert lost <= 3 * case.cores * 0.1 / case.seconds


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- workers ---------------------------------------------------------------------------------------------------------


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the worker processes of a driver."""
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if "lazyproc.engine.worker" in command:
            workers.append(child)
    return workers


def wait_for_workers(case: Case, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until two workers are at work, and return them."""
    wait_for(lambda: len(workers_of(process)) == 2)
    n_before = sum(one.n_done for one in status(case))
    wait_for(lambda: sum(one.n_done for one in status(case)) > n_before + 10)  # more than the probe has done
    return workers_of(process)


@pytest.mark.parametrize("case", [("path", 2, 0.02), ("handle", 2, 0.02)], ids=str, indirect=True)
def test_a_killed_worker_is_replaced(case: Case) -> None:
    process = case.start()
    try:
        workers = wait_for_workers(case, process)
        workers[0].kill()
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "finished" in output
        assert "a worker process was lost" in errors
    finally:
        end(process)
    assert case.check(complete=True).all()


def status(case: Case) -> tuple[Any, ...]:
    return file_status(str(case.results)).results if case.results.exists() else ()


@pytest.mark.parametrize("case", [("path", 2, 0.02)], ids=str, indirect=True)
def test_workers_leave_when_their_driver_is_killed(case: Case) -> None:
    process = case.start()
    try:
        workers = wait_for_workers(case, process)
        kill(process, whole_group=False)
        before = case.check()
        gone, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        assert len(gone) == 2
        assert (case.check() == before).all()
    finally:
        end(process)


# -- signals that ask to stop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "sent"),
    [
        (("path", 1, 0.01), "SIGINT"),
        (("path", 1, 0.01), "SIGTERM"),
        (("path", 2, 0.015), "SIGINT to all"),
        (("path", 2, 0.015), "SIGTERM"),
        (("handle", 1, 0.01), "SIGINT"),
    ],
    ids=str,
    indirect=["case"],
)
def test_asked_to_stop(case: Case, sent: str) -> None:
    """What is under way is finished and committed; the message says how much, and how to go on."""
    process = case.start()
    try:
        wait_for_line(process, "positions in")
        wait_for(lambda: case.calls.read_text().count("\n") > 30)
        if sent == "SIGTERM":
            process.terminate()
        elif sent == "SIGINT":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does with Ctrl-C
        output, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert "finished" not in output
    mask = case.check()
    assert 0 < mask.sum() < N_POSITIONS
    called = [int(line) for line in case.calls.read_text().split()]
    assert sorted(called) == np.flatnonzero(mask).tolist(), "all that was computed is committed, nothing computed twice"
    share = f"{int(mask.sum())} of {N_POSITIONS} positions ({mask.mean():.1%}) are done"
    assert share in errors
    assert "The same call of compute() goes on from there" in errors
    assert process.returncode == 75
    assert "Traceback" not in errors
    assert len(list(case.folder.glob(".*"))) == 0, "the sidecar files are gone"
    assert sorted(case.finish()) == np.flatnonzero(mask == 0).tolist()
    assert case.check(complete=True).all()


@pytest.mark.parametrize("case", [("path", 1, 0.4)], ids=str, indirect=True)
def test_the_second_interrupt_leaves_at_once(case: Case) -> None:
    process = case.start()
    try:
        wait_for_line(process, "positions in")
        n_called = case.calls.read_text().count("\n")
        wait_for(lambda: case.calls.read_text().count("\n") > n_called)
        process.send_signal(signal.SIGINT)
        wait_for_line(process, "interrupt again")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert "The same call of compute() goes on from there" in errors
    assert process.returncode == 75
    assert case.check().sum() > 0


@pytest.mark.parametrize("case", [("path", 1, 0.01)], ids=str, indirect=True)
def test_a_signal_in_the_last_block_is_not_lost(case: Case) -> None:
    """The results are complete, and the caller's script still does not go on."""
    process = case.start()
    try:
        wait_for(lambda: case.calls.read_text().count("\n") >= N_POSITIONS)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        end(process)
    case.check(complete=True)
    assert process.returncode != 0
    assert "finished" not in output


RUNNABLE = """
import time, lazyproc

class Slow(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row):
        time.sleep(0.02)
        return row.mean()
"""


@pytest.mark.parametrize(("cores", "sent"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_the_command_line_asked_to_stop(tmp_path: Path, cores: int, sent: signal.Signals) -> None:
    case = Case(tmp_path, "path", 1, 0.0)
    case.make()
    (tmp_path / "slow.py").write_text(RUNNABLE)
    what = [str(tmp_path / "slow.py:Slow"), f"{case.scan}::{MAIN}", "--cores", str(cores)]
    command = [sys.executable, "-m", "lazyproc.cli", "run", *what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: file_status(str(case.scan)).results)
        time.sleep(0.7)
        process.send_signal(sent)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    (one,) = file_status(str(case.scan)).results
    assert 0 < one.n_done < N_POSITIONS
    assert f"{one.n_done} of {N_POSITIONS} positions" in output + errors
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert file_status(str(case.scan)).results[0].n_done == N_POSITIONS
