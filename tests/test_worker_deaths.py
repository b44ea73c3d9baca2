"""Workers, schedulers and connections that die, and come back: nothing finished is lost, nothing stale is written."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from farm import Farm, members, wait_for
from usid_files import CHANNEL, make_usid_file

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
WAITS = """
while not (place / f"gate_{position}").exists():
    time.sleep(0.01)
"""
# None of these is tried by the driver itself, before it starts any worker.
FIRST, SECOND, THIRD = 17, 38, 43


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


def times(calls: list[tuple[int, int]]) -> Counter[int]:
    """Count how often each position was called."""
    return Counter(position for position, _ in calls)


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
    stage.order(
        FIRST,
        f"""
n = len(list(place.glob("death_*")))
if n < 2:
    (place / f"death_{{n}}").touch()
    {KILLS}
""",
    )
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


@pytest.mark.parametrize("on_cluster", [False, True], ids=["processes", "cluster"])
def test_a_straggler_holds_back_nobody(stage: Stage, on_cluster: bool) -> None:
    """While it runs on, all others are done and committed."""
    stage.order(FIRST, WAITS)
    stage.start(scheduler=stage.start_cluster() if on_cluster else None)
    wait_for(lambda: stage.n_done() == N_POSITIONS - 1 if stage.begun() else False)
    assert np.flatnonzero(~stage.check()).tolist() == [FIRST]
    stage.open_gate(FIRST)
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()


# -- workers of a cluster --------------------------------------------------------------------------------------------


def test_a_worker_that_was_cut_off_writes_nothing_late(stage: Stage) -> None:
    """Two workers are stopped and declared lost; one goes on while the run does, the other when it is over.

    The function returns who computed a position, so that a late writer would be seen.
    """
    scheduler = stage.start_cluster(4, ttl="1s")
    for position in (FIRST, SECOND, THIRD):
        stage.order(position, WAITS)
    stage.start(scheduler=scheduler)
    early, late, _ = (stage.worker_at(position) for position in (FIRST, SECOND, THIRD))
    stop(early)
    stop(late)
    stage.open_gate(FIRST)  # but they are stopped
    stage.open_gate(SECOND)
    wait_for(lambda: stage.n_done() == N_POSITIONS - 1)
    before, by = Path(stage.path).read_bytes(), stage.by()
    assert times(stage.ended())[FIRST] == times(stage.ended())[SECOND] == 1
    assert not {by[FIRST], by[SECOND]} & {early, late}

    os.kill(early, signal.SIGCONT)  # it ends what was done elsewhere and is marked done
    wait_for(lambda: not members(early))
    assert (FIRST, early) in stage.ended()
    assert Path(stage.path).read_bytes() == before

    stage.open_gate(THIRD)
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()
    before = Path(stage.path).read_bytes()
    os.kill(late, signal.SIGCONT)  # and here the run is over
    wait_for(lambda: not members(late))
    assert (SECOND, late) in stage.ended()
    assert Path(stage.path).read_bytes() == before


def test_the_attempt_before_the_last_writes_nothing(stage: Stage) -> None:
    """A worker that was cut off ends while another one is at its block: only what that one writes counts."""
    scheduler = stage.start_cluster(2, ttl="1s")
    stage.order(FIRST, "while not (place / f'gate_{os.getpid()}').exists(): time.sleep(0.01)")
    stage.start(scheduler=scheduler)
    first = stage.worker_at(FIRST)
    stop(first)
    wait_for(lambda: times(stage.begun())[FIRST] == 2)
    (second,) = {pid for position, pid in stage.begun() if position == FIRST} - {first}
    wait_for(lambda: stage.n_done() == N_POSITIONS - 1)
    before = Path(stage.path).read_bytes()
    (stage.folder / f"gate_{first}").touch()
    os.kill(first, signal.SIGCONT)
    wait_for(lambda: not members(first))
    assert (FIRST, first) in stage.ended()
    assert Path(stage.path).read_bytes() == before
    (stage.folder / f"gate_{second}").touch()
    assert stage.outcome()["error"] == "", stage.log()
    assert stage.check().all()
    assert stage.by()[FIRST] == second


def test_a_block_that_kills_workers_of_a_cluster_is_lost_alone(stage: Stage) -> None:
    """Tried as often as the scheduler allows, then once more like that, when all others are done."""
    stage.order(FIRST, KILLS)
    stage.start(scheduler=stage.start_cluster(nanny=True, allowed_failures=1))
    outcome = stage.outcome()
    assert outcome["error"] == "WorkerError"
    assert f"workers died each time they had position {FIRST} of" in outcome["text"]
    assert np.flatnonzero(~stage.check()).tolist() == [FIRST]
    assert times(stage.begun())[FIRST] == 4
    stage.forget(FIRST)
    stage.succeed()


def test_a_nanny_ends_a_worker_that_takes_too_much(stage: Stage) -> None:
    stage.order(FIRST, f"{ONCE}    b = [bytearray(b'1') * 2**29]; time.sleep(60)")
    stage.succeed(scheduler=stage.start_cluster(nanny=True, memory=400 * 2**20))
    assert times(stage.begun())[FIRST] == 2
