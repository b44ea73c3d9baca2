"""Workers, schedulers and connections that die, and come back: nothing finished is lost, nothing stale is written."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from distributed import Client
from farm import Farm, members, wait_for
from test_engine import kernel_of, twice
from usid_files import CHANNEL, make_usid_file

from lazyproc.core.blocks import Block, BlockPlan
from lazyproc.core.errors import BlockTakenError, FileBusyError, WorkerError
from lazyproc.core.runs import Runs
from lazyproc.core.specs import Dimension, Output
from lazyproc.engine import lane
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.crew import Crew
from lazyproc.engine.local import run_processes
from lazyproc.engine.receipt import Receipt
from lazyproc.engine.streams import never
from lazyproc.hdf5.claims import Claims
from lazyproc.hdf5.lock import FencedError, RunLock
from lazyproc.status import file_status

MAIN = f"{CHANNEL}/Raw_Data"
GROUP = f"{MAIN}-Measure_000"
MASK = "completed_positions"
N_POSITIONS = 60
KILLS = "os.kill(os.getpid(), 9)"
ONCE = """
try:
    os.close(os.open(place / f"once_{position}", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    pass
else:
"""
TWICE = f"""
n = len(list(place.glob("death_*")))
if n < 2:
    (place / f"death_{{n}}").touch()
    {KILLS}
"""
WAITS = """
while not (place / f"gate_{position}").exists():
    time.sleep(0.01)
"""
# None of these is tried by the driver itself, before it starts any worker.
FIRST, SECOND, THIRD = 17, 38, 43


BEHIND = 5
WIDTH = 2**14


def die(row: np.ndarray) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def big_or_slow(row: np.ndarray, folder: str) -> Any:
    """Return a large result; at position 3 wait."""
    place = Path(folder)
    (place / str(int(row[0]))).touch()
    while row[0] == 3 and not (place / "gate").exists():
        time.sleep(0.01)
    return np.zeros(WIDTH)


def raw_data() -> np.ndarray:
    data = np.random.default_rng(4).standard_normal((N_POSITIONS, 64))
    data[:, 0] = np.arange(N_POSITIONS)
    return data


class Stage:
    """A scan, the drivers that compute on it, and what the function did."""

    def __init__(self, farm: Farm, folder: Path) -> None:
        self.farm = farm
        self.folder = folder
        self.path = str(folder / "scan.h5")
        make_usid_file(self.path, n_rows=6, n_cols=10, n_spectral=64, data=raw_data())
        self.driver = 0

    # -- acting --------------------------------------------------------------------------------------------------

    def order(self, position: int, what: str) -> None:
        """Let the function do something at a position, in a worker."""
        (self.folder / f"at_{position}").write_text(what)

    def hold(self, *positions: int) -> None:
        """Let the function wait at these positions."""
        for position in positions:
            self.order(position, WAITS)

    def forget(self, position: int) -> None:
        (self.folder / f"at_{position}").unlink()

    def open_gate(self, position: int) -> None:
        (self.folder / f"gate_{position}").touch()

    def start(self, **options: Any) -> None:
        (self.folder / "outcome").unlink(missing_ok=True)
        self.driver = self.farm.start("driver", self.folder, address=f"{self.path}::{MAIN}", **options)

    def start_cluster(self, n_workers: int = 2, *, nanny: bool = False, memory: int = 0, **options: Any) -> str:
        (self.folder / "address").unlink(missing_ok=True)
        self.scheduler = self.farm.start("scheduler", self.folder, **options)
        self.address = wait_for(lambda: read(self.folder / "address"))
        self.workers = [self.start_worker(nanny=nanny, memory=memory) for _ in range(n_workers)]
        return self.address

    def start_worker(self, **options: Any) -> int:
        return self.farm.start("worker", self.folder, scheduler=self.address, **options)

    # -- looking -------------------------------------------------------------------------------------------------

    def begun(self) -> list[tuple[int, int]]:
        """Positions and process ids, as workers began them."""
        return pairs(self.folder / "begun")

    def ended(self) -> list[tuple[int, int]]:
        return pairs(self.folder / "ended")

    def worker_at(self, position: int) -> int:
        """Wait until a worker is at a position, and return its process."""
        return wait_for(lambda: [pid for one, pid in self.begun() if one == position])[-1]

    def n_done(self) -> int:
        return sum(one.n_done for one in file_status(self.path).results)

    def wait_until_held(self) -> None:
        """Wait until the straggler is all that is left, but for what may stand behind it, and the rest is marked.

        Dask gives each worker two blocks, and those that wait to somebody else only if their time is worth that.
        """

        def is_held() -> bool:
            ended = [position for position, _ in self.ended()]
            done = self.check()
            return done.sum() >= N_POSITIONS - BEHIND - 1 and done[ended].all()

        self.worker_at(FIRST)
        wait_for(is_held)

    def outcome(self) -> dict[str, str]:
        """Wait until the driver has ended, and all that it started; return what it said."""
        wait_for(lambda: (self.folder / "outcome").exists() or not members(self.driver))
        wait_for(lambda: not members(self.driver))
        assert (self.folder / "outcome").exists(), self.log()
        return json.loads((self.folder / "outcome").read_text())

    def log(self, what: str = "driver") -> str:
        return read(self.folder / f"{what}.log")

    def succeed(self, **options: Any) -> None:
        """Let a driver finish all, and compare with a plain loop."""
        self.start(**options)
        assert self.outcome()["error"] == "", self.log()
        assert self.check().all()
        assert not list(self.folder.glob(".scan.h5*")), "nothing is left beside the file"

    def check(self) -> np.ndarray:
        """Compare what is marked done with a plain loop; return which positions that are."""
        data = raw_data()
        with h5py.File(self.path) as file:
            assert (file[MAIN][:] == data).all()
            group = file[GROUP]
            mask = group[MASK][:]
            assert set(mask.tolist()) <= {0, 1}
            done = mask == 1
            assert (group["Mean"][:, 0][done] == data.mean(axis=1)[done]).all()
            assert not np.isnan(group["By"][:, 0][done]).any()
        return done

    def by(self) -> np.ndarray:
        """Who computed each position."""
        with h5py.File(self.path) as file:
            return file[GROUP]["By"][:, 0]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def pairs(path: Path) -> list[tuple[int, int]]:
    lines = [line.split() for line in read(path).splitlines()]
    return [(int(line[0]), int(line[1])) for line in lines if len(line) == 2]


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    farm = Farm()
    yield farm
    farm.end()


@pytest.fixture
def stage(farm: Farm, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(farm, tmp_path)
    yield stage
    farm.kill_all()


def stop(pid: int) -> None:
    """Stop a process, and wait until all of its threads stand still."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def contents(path: str) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[GROUP][name][:].ravel() for name in ("Mean", "By", MASK)}


def times(calls: list[tuple[int, int]]) -> Counter[int]:
    """Count how often each position was called."""
    return Counter(position for position, _ in calls)


# -- attempts at a block -----------------------------------------------------------------------------------------------


@dataclass
class Lines:
    """A sink that writes down what it is given."""

    path: Path

    def write(self, block: Block, arrays: Any) -> tuple[int, int]:
        with open(self.path, "a") as file:
            file.write(f"{block.index} {arrays}\n")
        return 0, 0


BLOCK, OTHER = Block(3, (30,), (40,)), Block(4, (40,), (50,))


@pytest.fixture(params=[True, False], ids=["locks on bytes", "lock on the file"])
def claims(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Claims]:
    lock = RunLock(str(tmp_path / "scan.h5"), "0123")
    lock.acquire()
    claims = Claims(Lines(tmp_path / "lines"), lock.fence, str(tmp_path / "claims"), byte_locks=request.param)
    assert claims.begin() == claims
    yield claims
    claims.end()
    lock.release()


def test_the_attempt_that_began_last_writes(claims: Claims) -> None:
    first, other = claims.take(BLOCK), claims.take(OTHER)
    first.write(BLOCK, "by the first")
    second = claims.take(BLOCK)
    with pytest.raises(BlockTakenError, match="positions 30 to 39 was given to another worker"):
        first.write(BLOCK, "too late")
    other.write(OTHER, "by the other")
    second.write(BLOCK, "by the second")
    assert not claims.settle(BLOCK, first.number), "its receipt came late"
    assert claims.settle(BLOCK, second.number)
    assert not claims.settle(BLOCK, second.number), "once only"
    for attempt in (first, second):
        with pytest.raises(BlockTakenError):
            attempt.write(BLOCK, "after it was marked")
    with pytest.raises(BlockTakenError, match="is done already"):
        claims.take(BLOCK)
    other.write(OTHER, "still")
    assert (claims.sink.path).read_text() == "3 by the first\n4 by the other\n3 by the second\n4 still\n"
    claims.end()
    for attempt in (other.write, lambda block, _: claims.take(block)):
        with pytest.raises(FencedError, match="run 0123 is over"):
            attempt(OTHER, "after the run")


WRITER = """
import sys, time, pickle
claims, block, number = pickle.loads(bytes.fromhex(sys.argv[1]))
with claims.held(block, number), claims.fence.passed():
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_a_worker_that_is_stopped_in_the_middle_of_a_write(
    claims: Claims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else gets at the block, nor a later run at the file, as long as it may go on; and nobody hangs."""
    import lazyproc.hdf5.claims
    import lazyproc.hdf5.lock

    monkeypatch.setattr(lazyproc.hdf5.claims, "_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(lazyproc.hdf5.lock, "_WRITE_SECONDS", 0.2)
    first = claims.take(BLOCK)
    packed = pickle.dumps((claims, BLOCK, first.number)).hex()
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, packed], stdin=pipe, stdout=pipe, env=environment)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    stop(writer.pid)
    try:
        with pytest.raises(BlockTakenError, match=r"writing the block .* more than 0.2 s"):
            claims.take(BLOCK)
        assert not claims.settle(BLOCK, first.number)
        later = RunLock(str(tmp_path / "scan.h5"), "4567")
        os.rename(claims.fence.lock_path, tmp_path / "of a driver that was killed")
        with pytest.raises(FileBusyError, match=r"a worker has been writing for more than 0.2 s"):
            later.acquire()
        os.rename(tmp_path / "of a driver that was killed", claims.fence.lock_path)
    finally:
        writer.kill()
        writer.communicate()
    assert claims.settle(BLOCK, first.number)


# -- worker processes of this machine --------------------------------------------------------------------------------


def test_a_block_that_kills_its_worker_is_lost_alone(stage: Stage) -> None:
    """All others are done and called once only; three attempts are made; the next call tries it again."""
    stage.order(FIRST, KILLS)
    stage.order(THIRD, KILLS)
    stage.start()
    outcome = stage.outcome()
    assert outcome["error"] == "WorkerError"
    assert f"workers died each time they had position {FIRST}, position {THIRD} of" in outcome["text"]
    assert np.flatnonzero(~stage.check()).tolist() == [FIRST, THIRD]
    n_begun = times(stage.begun())
    assert n_begun.pop(FIRST) == n_begun.pop(THIRD) == 3
    assert set(n_begun.values()) == {1}, "nobody else was under way twice"
    assert "was killed by SIGKILL" in stage.log()
    stage.forget(FIRST)
    stage.forget(THIRD)
    stage.succeed()


def test_an_innocent_block_is_not_given_up(stage: Stage) -> None:
    """Its workers die twice among others, by no fault of its own; alone, at the end, it is done."""
    stage.order(FIRST, TWICE)
    stage.succeed()
    assert times(stage.begun())[FIRST] == 3
    assert stage.ended()[-1][0] == FIRST


def test_a_worker_without_memory_is_replaced(stage: Stage) -> None:
    """The limit is that of the process, so a fresh one has none: MemoryError does not fail the block at once."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)); bytes(2**29)"
    stage.order(FIRST, f"{ONCE}    {limit}")
    stage.succeed()
    n_begun = times(stage.begun())
    assert n_begun.pop(FIRST) == 2
    assert set(n_begun.values()) == {1}
    assert "out of memory, tried again" in stage.log()


def test_a_block_that_is_always_out_of_memory_fails_with_that(stage: Stage) -> None:
    stage.order(FIRST, "raise MemoryError('not that much')")
    stage.start()
    outcome = stage.outcome()
    assert outcome["error"] == "FunctionError"
    assert f"at position {FIRST} of" in outcome["text"]
    assert "MemoryError: not that much" in outcome["text"]
    assert times(stage.begun())[FIRST] == 2


def test_processes_that_all_die(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are given: there is an end to it."""
    monkeypatch.setattr(lane, "_DEATHS_IN_A_ROW", 6)
    begin = len(psutil.Process().children())
    with pytest.raises(WorkerError, match=r"6 worker processes died without one block .* was killed by SIGKILL"):
        list(run_processes(kernel_of(die), BlockPlan(Runs.full(100), 1), 2, never))
    assert len(psutil.Process().children()) == begin


def test_processes_that_were_started_beforehand_are_taken_and_none_is_left() -> None:
    """More lanes than there are of them, one of which is dead already; and more of them than lanes."""
    before = {child.pid for child in psutil.Process().children()}
    for n_started, n_workers in ((2, 4), (4, 1)):
        with Crew(["lazyproc.hdf5.sink", "no.such.module"]) as crew:
            crew.start(n_started)
            started = {child.pid for child in psutil.Process().children()} - before
            os.kill(next(iter(started)), signal.SIGKILL)
            receipts = list(run_processes(kernel_of(twice), BlockPlan(Runs.full(100), 1), n_workers, never, crew=crew))
        done = [one for one in receipts if one is not None]
        assert sorted(one.block.start for one in done) == list(range(100))
        assert not [one for one in done if one.failure is not None]
        workers = {int(one.worker.split(":")[1]) for one in done}
        assert workers & started, "those are used first"
        assert {child.pid for child in psutil.Process().children()} == before


def test_lanes_that_ask_at_once_each_get_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if there are fewer than lanes: asking whether one is left, and taking it, must be one step."""

    class Dead:
        def poll(self) -> int | None:
            return None

    monkeypatch.setattr("lazyproc.engine.crew._start_process", lambda modules: (Dead(), None))
    for _ in range(200):
        crew = Crew()
        crew.start(3)
        taken: list[Any] = []
        threads = [threading.Thread(target=lambda: taken.append(crew.take())) for _ in range(8)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(process) for process, _ in taken}) == 8


def is_loaded(row: np.ndarray) -> float:
    return float("colorsys" in sys.modules)


@pytest.mark.parametrize("late", [False, True], ids=["started before", "started later"])
def test_processes_load_what_the_first_call_has_loaded(late: bool) -> None:
    for names in (["colorsys", "no.such.module"], []):
        with Crew() as crew:
            crew.start(0 if late else 1)
            crew.load(names)
            crew.start(1)
            receipts = list(run_processes(kernel_of(is_loaded), BlockPlan(Runs.full(1), 1), 1, never, crew=crew))
        done = [one for one in receipts if one is not None and one.arrays is not None]
        assert [float(one.arrays[0][0, 0]) for one in done] == [float(bool(names))]


def test_processes_start_beside_a_call_that_takes_long() -> None:
    begin = len(psutil.Process().children())
    with Crew() as crew:
        with crew.standby(2, 0.01):
            wait_for(lambda: len(psutil.Process().children()) == begin + 2)
        crew.start(2)
        assert len(psutil.Process().children()) == begin + 2, "they are there already"
        crew.reduce(1)
        assert len(psutil.Process().children()) == begin + 1
    assert len(psutil.Process().children()) == begin
    for ends in (Crew.stand_down, lambda crew: None):
        with Crew() as crew, crew.standby(2, 5.0):
            ends(crew)
        assert len(psutil.Process().children()) == begin
    with Crew() as crew, crew.standby(0, 0.0):
        time.sleep(0.1)
        assert len(psutil.Process().children()) == begin


def test_processes_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match=r"do not start: the last one ended with exit code 1"):
        list(run_processes(kernel_of(twice), BlockPlan(Runs.full(100), 1), 2, never))


@pytest.mark.parametrize("on_cluster", [False, True], ids=["processes", "cluster"])
def test_a_straggler_holds_back_nobody(stage: Stage, on_cluster: bool) -> None:
    """While it runs on, all others are done and committed."""
    stage.hold(FIRST)
    stage.start(scheduler=stage.start_cluster() if on_cluster else None)
    stage.wait_until_held()
    assert not stage.check()[FIRST]
    stage.open_gate(FIRST)
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()


@pytest.mark.parametrize("engine", ["processes", "client"])
def test_receipts_held_are_bounded(tmp_path: Path, engine: str) -> None:
    """One block takes long, the driver its time: what is begun and not taken stays below the window, in bytes, too."""
    blocks = BlockPlan(Runs.full(40), 1)
    outputs = (Output("f8", dims=[Dimension("X", "m", WIDTH)]).resolve("Big", 1),)
    kernel = replace(kernel_of(big_or_slow, folder=str(tmp_path)), outputs=outputs)
    with contextlib.ExitStack() as stack:
        client = None
        if engine == "client":
            client = stack.enter_context(
                Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0")
            )
        window, behind = (6, BEHIND) if client else (4, 0)
        taken: list[Receipt] = []
        for receipt in Scheduler(engine, 2, client).run(kernel, blocks, never, "window"):
            if receipt is not None:
                assert receipt.arrays is not None
                taken.append(receipt)
                time.sleep(0.02)
            begun = {int(path.name) for path in tmp_path.glob("[0-9]*")}
            assert len(begun) - len(taken) <= window
            if len(taken) >= 39 - behind:
                (tmp_path / "gate").touch()
    order = [receipt.block.start for receipt in taken]
    assert sorted(order) == list(range(40))
    assert order.index(3) >= 39 - behind, "the others are done, and taken, while it runs on"
    assert all(receipt.arrays[0].nbytes == 8 * WIDTH for receipt in taken if receipt.arrays)


def leave_at_seven(row: np.ndarray) -> Any:
    return sys.exit(3) if row[0] == 7 else row[0]


@pytest.mark.parametrize("engine", ["processes", "client"])
def test_a_function_that_exits_fails_its_block_and_ends_no_worker(engine: str) -> None:
    with contextlib.ExitStack() as stack:
        client = None
        if engine == "client":
            client = stack.enter_context(
                Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0")
            )
        receipts = Scheduler(engine, 2, client).run(kernel_of(leave_at_seven), BlockPlan(Runs.full(20), 1), never, "x")
        failures = [one.failure for one in receipts if one is not None and one.failure is not None]
    assert [(one.kind, one.positions, one.error.code) for one in failures] == [("worker", (7, 8), 3)]


# -- workers of a cluster --------------------------------------------------------------------------------------------


def test_workers_that_were_cut_off_write_nothing_late(stage: Stage) -> None:
    """Three workers are stopped and declared lost, and go on later. The function returns who computed a position.

    The first one ends while another worker is at its block, the second one when its block is done and marked, the third
    one when the run is over.
    """
    scheduler = stage.start_cluster(5, ttl="1s")
    (stage.folder / "slow").write_text("0.25")  # worth it for Dask to give blocks to whoever is free
    waits = "while not (place / f'gate_{os.getpid()}').exists(): time.sleep(0.01)"
    for position in (FIRST, SECOND, THIRD):
        stage.order(position, f"{ONCE}    {waits}")
    stage.start(scheduler=scheduler, ballast=0)
    lost = [stage.worker_at(position) for position in (FIRST, SECOND, THIRD)]
    wait_for(lambda: all((stage.folder / f"once_{position}").exists() for position in (FIRST, SECOND, THIRD)))
    stage.order(FIRST, waits)
    free = set(stage.workers) - set(lost)
    for pid in lost:
        stop(pid)
        (stage.folder / f"gate_{pid}").touch()
    (at_first,) = wait_for(lambda: free & {pid for position, pid in stage.begun() if position == FIRST})
    wait_for(lambda: stage.check()[[SECOND, THIRD]].all())
    assert {*stage.by()[[SECOND, THIRD]]} <= free
    before = contents(stage.path)
    for position, pid in zip((FIRST, SECOND), lost, strict=False):
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda pid=pid: not members(pid))
        assert (position, pid) in stage.ended()
    after = contents(stage.path)
    for name in before:
        assert (after[name][before[MASK] == 1] == before[name][before[MASK] == 1]).all(), name
    assert after[MASK][FIRST] == 0
    assert np.isnan(after["By"][FIRST]), "not written, though not marked either"
    (stage.folder / f"gate_{at_first}").touch()
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()
    assert stage.by()[FIRST] == at_first
    at_rest = Path(stage.path).read_bytes()
    os.kill(lost[2], signal.SIGCONT)
    wait_for(lambda: not members(lost[2]))
    assert (THIRD, lost[2]) in stage.ended()
    assert Path(stage.path).read_bytes() == at_rest


def test_a_block_that_kills_workers_of_a_cluster_is_lost_alone(stage: Stage) -> None:
    """Tried as often as the scheduler allows, then once more, by one worker, when all others are done."""
    stage.order(FIRST, KILLS)
    stage.start(scheduler=stage.start_cluster(nanny=True, allowed_failures=1))
    outcome = stage.outcome()
    assert outcome["error"] == "WorkerError"
    assert f"workers died each time they had position {FIRST} of" in outcome["text"]
    assert np.flatnonzero(~stage.check()).tolist() == [FIRST]
    assert times(stage.begun())[FIRST] == 3
    stage.forget(FIRST)
    stage.succeed()


def test_a_block_that_is_tried_again_while_it_is_alone_is_begun(stage: Stage) -> None:
    """Its workers die among others; alone it runs out of memory, which counts as often as at any other time."""
    stage.order(FIRST, f"{TWICE}\nraise MemoryError('no room')")
    stage.start(scheduler=stage.start_cluster(nanny=True, allowed_failures=1, saturation=1.0))
    outcome = stage.outcome()
    assert outcome["error"] == "FunctionError", outcome
    assert f"at position {FIRST} of" in outcome["text"]
    assert "MemoryError: no room" in outcome["text"]
    assert np.flatnonzero(~stage.check()).tolist() == [FIRST]
    assert times(stage.begun())[FIRST] == 2 + 5


def test_a_nanny_ends_a_worker_that_takes_too_much(stage: Stage) -> None:
    stage.order(FIRST, f"{ONCE}    b = [bytearray(b'1') * 2**29]; time.sleep(60)")
    stage.succeed(scheduler=stage.start_cluster(nanny=True, memory=400 * 2**20))
    assert times(stage.begun())[FIRST] == 2


def test_all_workers_die_and_others_come(stage: Stage) -> None:
    """No block is lost, and the function, which is too large to be sent along with each task, comes back, too."""
    stage.hold(FIRST)
    stage.start(scheduler=stage.start_cluster())
    stage.worker_at(FIRST)
    for pid in stage.workers:
        os.kill(pid, signal.SIGKILL)
    stage.open_gate(FIRST)
    wait_for(lambda: not any(members(pid) for pid in stage.workers))
    stage.start_worker()
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()


def test_workers_that_wait_for_one_that_was_cut_off(stage: Stage) -> None:
    """They may be sent for the function, which is large, to a worker that is stopped, and wait: the driver sees that.

    Dask has given it back by then where it was not needed, and the workers that are stopped are declared lost one after
    the other. Whether the free ones still ask one of these depends on milliseconds; the end is the same.
    """
    held = (FIRST, SECOND, THIRD)
    stage.hold(*held)
    stage.start(scheduler=stage.start_cluster(5, ttl="1s"), patience=2.0)
    for position in held:
        stop(stage.worker_at(position))
        stage.open_gate(position)
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()


@pytest.mark.parametrize("what", ["no workers", "a mute scheduler"])
def test_nothing_is_waited_for_without_end(stage: Stage, what: str) -> None:
    """All workers are gone, or the scheduler says nothing: what is finished is kept, the message says what to do."""
    stage.hold(FIRST)
    stage.start(scheduler=stage.start_cluster(), patience=2.0)
    stage.wait_until_held()
    n_done = stage.n_done()
    if what == "no workers":
        for pid in stage.workers:
            os.kill(pid, signal.SIGKILL)
        expected = "has had no worker that takes tasks for 2 s (all workers are gone)"
    else:
        stop(stage.scheduler)
        expected = "has not answered for 2 s, though the connection stands"
    wait_for(lambda: (stage.folder / "outcome").exists())
    for pid in [*stage.workers, stage.scheduler]:  # or the driver's client would take its time to leave
        for one in members(pid):
            os.kill(one, signal.SIGKILL)
    outcome = stage.outcome()
    assert outcome["error"] == "WorkerError"
    assert expected in outcome["text"]
    assert "All that was finished is kept; the same call goes on from there" in outcome["text"]
    assert not stage.check()[FIRST]
    assert stage.n_done() >= n_done
    stage.forget(FIRST)
    stage.succeed()


# -- schedulers and connections --------------------------------------------------------------------------------------


def test_a_scheduler_that_dies(stage: Stage) -> None:
    """An error soon, with what was finished kept; the same call goes on without a cluster."""
    stage.hold(FIRST)
    stage.start(scheduler=stage.start_cluster(), connect=1.0)
    stage.wait_until_held()
    n_done = stage.n_done()
    os.kill(stage.scheduler, signal.SIGKILL)
    stage.open_gate(FIRST)  # its worker goes on, and brings something that nobody waits for
    outcome = stage.outcome()
    assert outcome["error"] == "WorkerError"
    assert f"the connection to the cluster {stage.address} is lost" in outcome["text"]
    assert "the same call goes on from there, on another cluster, or without a client" in outcome["text"]
    assert not stage.check()[FIRST]
    assert stage.n_done() >= n_done
    for pid in stage.workers:
        wait_for(lambda pid=pid: not members(pid))
    assert not stage.check()[FIRST]
    stage.succeed()


def test_a_scheduler_that_dies_and_comes_back(stage: Stage) -> None:
    """With other workers, while the client still tries to reach it: the run goes on as if nothing had been."""
    stage.hold(FIRST)
    scheduler = stage.start_cluster()
    stage.start(scheduler=scheduler, connect=30.0)
    stage.worker_at(FIRST)
    os.kill(stage.scheduler, signal.SIGKILL)
    stage.open_gate(FIRST)
    old = stage.workers
    for pid in old:
        wait_for(lambda pid=pid: not members(pid))
    n_done = stage.n_done()
    assert stage.start_cluster(port=int(scheduler.rpartition(":")[2])) == scheduler
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()
    assert not set(old) & {pid for _, pid in stage.begun()[-(N_POSITIONS - n_done) // 2 :]}


def test_a_cluster_that_is_restarted(stage: Stage) -> None:
    """As by a button of the dashboard: all tasks are cancelled, all workers new."""
    stage.hold(FIRST)
    scheduler = stage.start_cluster(nanny=True)
    stage.start(scheduler=scheduler)
    before = stage.worker_at(FIRST)
    with Client(scheduler) as client:
        client.restart()
    stage.open_gate(FIRST)
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()
    assert before not in stage.by()[[FIRST]]


def test_a_connection_that_breaks_and_comes_back(stage: Stage) -> None:
    """Twice; the workers never notice, and what they had under way is taken away from them."""
    stage.hold(FIRST, SECOND)
    with Proxy(stage.start_cluster()) as proxy:
        stage.start(scheduler=proxy.address, connect=30.0)
        for position in (FIRST, SECOND):
            stage.worker_at(position)
            proxy.cut()
            wait_for(lambda: "reconnect" in stage.log().lower() or proxy.n_connections)
            stage.open_gate(position)
        assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()
    assert proxy.n_cut >= 2
    assert times(stage.begun())[FIRST] > 1


class Proxy:
    """Passes on what a driver and a scheduler say to each other, until the line is cut; then takes calls again."""

    def __init__(self, address: str) -> None:
        host, port = address.rpartition("/")[2].split(":")
        self._there = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._lines: list[socket.socket] = []
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self.n_cut = 0
        self.n_connections = 0

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()

    def cut(self) -> None:
        lines, self._lines = self._lines, []
        self.n_cut += bool(lines)
        self.n_connections = 0
        for line in lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listening.accept()
            except OSError:
                return
            there = socket.create_connection(self._there)
            self._lines += [here, there]
            self.n_connections += 1
            for source, target in ((here, there), (there, here)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        for line in (source, target):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
