"""Positions that fail: fill value, status and a row of the table for each; all others are right; and tried again."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core.apply import compute_rows
from lazyproc.core.blocks import BlockPlan
from lazyproc.core.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    FailureLimitError,
    FunctionError,
    OutputError,
    ResultsError,
)
from lazyproc.core.failed import ERROR_BYTES, TEXT_BYTES, FailedPosition, FailedRows
from lazyproc.core.no_result import RowError
from lazyproc.core.runs import Runs
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.kernel import Kernel
from lazyproc.hdf5.failure_log import FailureLog
from lazyproc.hdf5.failures import counting_rows, filled_pieces
from lazyproc.hdf5.transaction import recover_locked
from lazyproc.status import file_status

MAIN = f"{CHANNEL}/Raw_Data"
MASK, STATUS, TABLE = "completed_positions", "position_status", "failed_positions"
N_POSITIONS = 120
SEED = int(os.environ.get("LAZYPROC_TEST_SEED", "2024"))


def numbered(n_positions: int = N_POSITIONS) -> NDArray[Any]:
    """Return data in which every row begins with its position."""
    data = np.random.default_rng(3).standard_normal((n_positions, 6))
    data[:, 0] = np.arange(n_positions)
    return data


@pytest.fixture
def scan(tmp_path: Path) -> str:
    """Return the address of a scan."""
    data = numbered()
    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=12, n_cols=10, n_spectral=6, data=data)
    return f"{path}::{name}"


def fails(number: float, bad: Any) -> None:
    """Fail for some numbers, in different ways."""
    if number in bad:
        raise (ValueError if number % 2 else ZeroDivisionError)(f"told to fail at {number:g}")


class Fit(lazyproc.Process):
    """Fails at the positions that it is told, and once it returns something odd."""

    process_name = "Fit"
    outputs: ClassVar = {
        "Mean": lazyproc.Output("f8"),
        "Number": lazyproc.Output("i4", fill_value=-1),
        "Twice": lazyproc.Output("f4", shape_from_main=True),
    }
    bad: ClassVar[dict[float, str]] = {}
    calls: ClassVar[list[int]] = []

    @staticmethod
    def _map_function(row):
        Fit.calls.append(int(row[0]))
        if row[0] in Fit.bad:
            if Fit.bad[row[0]] == "odd":
                return {"Mean": row, "Number": 0, "Twice": row}
            raise ValueError(Fit.bad[row[0]])
        return {"Mean": row.mean(), "Number": int(row[0]), "Twice": 2 * row}


class BlockFit(lazyproc.Process):
    """The same on blocks; spoils its block before it fails."""

    process_name = "Fit"
    outputs = Fit.outputs

    @staticmethod
    def _block_function(block):
        numbers = block[:, 0].astype(int)
        Fit.calls.append(len(block))
        mean, twice = block.mean(axis=1), 2 * block
        block[...] = -5
        wrong = [Fit.bad[number] for number in numbers.tolist() if number in Fit.bad]
        if "odd" in wrong:
            return mean, numbers, twice[:0]
        if wrong:
            raise ValueError(wrong[0])
        return mean, numbers, twice


@pytest.fixture(autouse=True)
def _good_again() -> Iterator[None]:
    Fit.bad.clear()
    Fit.calls.clear()
    yield
    Fit.bad.clear()


def check(group: h5py.Group, bad: dict[float, str], *, complete: bool = True) -> None:
    """Compare a results group with a plain loop: results, mask, status and table."""
    data = numbered(len(group[MASK]))
    failed = sorted(int(number) for number in bad)
    mask, status = group[MASK][:], group[STATUS][:]
    assert set(mask.tolist()) <= {0, 1}
    if complete:
        assert mask.all()
    done = mask.astype(bool)
    expected = np.ones(len(data), np.uint8)
    expected[failed] = 2
    assert (status[done] == expected[done]).all()
    good = done & (expected == 1)
    assert (group["Mean"][:, 0][good] == data.mean(axis=1)[good]).all()
    assert (group["Number"][:, 0][good] == data[:, 0][good]).all()
    assert (group["Twice"][:][good] == (2 * data).astype("f4")[good]).all()
    lost = done & (expected == 2)
    assert np.isnan(group["Mean"][:][lost]).all()
    assert (group["Number"][:][lost] == -1).all()
    assert np.isnan(group["Twice"][:][lost]).all()
    found = lazyproc.failures(group)
    assert [one.position for one in found] == [position for position in failed if done[position]]
    for one in found:
        if bad[one.position] == "odd":
            assert one.error == "lazyproc.OutputError"
            assert "expected" in one.text
        else:
            assert (one.error, one.text) == ("ValueError", bad[one.position])
    rows = group[TABLE][:]
    used = rows[rows["error"] != b""]
    if complete:
        assert sorted(used["position"].tolist()) == failed, "each once, and nothing else"
    for name in (STATUS, TABLE):
        assert group[name].chunks is None
        assert group[name].id.get_create_plist().get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY


# -- the block function ----------------------------------------------------------------------------------------------


def count_bound(n_rows: int, n_bad: int) -> int:
    """Return what dividing a block may cost at most: calls of the function."""
    if n_bad == 0:
        return 1
    return int(2 * n_bad * (np.ceil(np.log2(max(n_rows / n_bad, 1))) + 2) + 1)


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(1, 700),
    bad=st.sets(st.integers(0, 699), max_size=40),
    odd=st.booleans(),
    vectorized=st.booleans(),
)
def test_all_other_rows_are_those_of_a_plain_loop(n_rows: int, bad: set[int], odd: bool, vectorized: bool) -> None:
    data = np.random.default_rng(1).standard_normal((n_rows, 3))
    data[:, 0] = np.arange(n_rows)
    kept = data.copy()
    bad = {row for row in bad if row < n_rows}
    calls = []

    def function(rows: NDArray[Any]) -> Any:
        calls.append(rows.shape)
        numbers = np.atleast_2d(rows)[:, 0].tolist()
        result = rows.sum(axis=-1)
        rows *= 0
        if bad.intersection(numbers):
            if odd and numbers[0] % 3 == 0:
                return "odd"
            raise KeyError(numbers[0])
        return result

    output = lazyproc.Output("f8", fill_value=-1).resolve("Sum", 3)
    read = lambda runs: np.concatenate([kept[start:stop] for start, stop in runs])  # noqa: E731
    failed = FailedRows(read, Runs.full(n_rows))
    (array,) = compute_rows(function, data, [output], vectorized=vectorized, failed=failed)
    expected = kept.sum(axis=-1)
    expected[list(bad)] = -1
    assert array[:, 0].tolist() == expected.tolist()
    assert [one.position for one in failed.positions()] == sorted(bad)
    assert len(calls) <= (count_bound(n_rows, len(bad)) if vectorized else n_rows)


def test_one_bad_position_in_a_large_block_costs_few_calls() -> None:
    sizes = []

    def function(block: NDArray[Any]) -> Any:
        sizes.append(len(block))
        if 6789 in block[:, 0]:
            raise ValueError
        return block[:, 0]

    data = np.arange(10_000.0)[:, None]
    failed = FailedRows(lambda runs: data[runs.starts[0] : runs.stops[-1]], Runs.full(10_000))
    output = lazyproc.Output("f8").resolve("A", 1)
    compute_rows(function, data, [output], vectorized=True, failed=failed)
    assert [one.position for one in failed.positions()] == [6789]
    assert len(sizes) <= 2 * 14 + 1
    assert sum(sizes) <= 3 * 10_000 + 14


def test_a_broken_function_is_given_up_after_as_many_failures_as_are_allowed() -> None:
    calls = []

    def function(rows: NDArray[Any]) -> Any:
        calls.append(len(rows))
        raise ValueError

    data = np.zeros((10_000, 1))
    output = lazyproc.Output("f8").resolve("A", 1)
    for vectorized in (True, False):
        calls.clear()
        failed = FailedRows(lambda runs: data[: runs.n_positions], Runs.full(10_000), limit=20)
        with pytest.raises(RowError):
            compute_rows(function, data, [output], vectorized=vectorized, failed=failed)
        assert len(calls) < 100
        assert len(failed.positions()) == 21


class Unspeakable(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        raise RuntimeError


def test_texts_are_cut_between_characters() -> None:
    def text_of(error: BaseException) -> str:
        one = FailedPosition.of(7, error)
        assert len(one.text.encode()) <= TEXT_BYTES
        assert len(one.error.encode()) <= ERROR_BYTES
        return one.text

    long = "µ☃𝄞" * 100
    assert long.startswith(text_of(ValueError(long)))
    assert len(text_of(ValueError(long)).encode()) > TEXT_BYTES - 4
    assert text_of(ValueError("a\0b\0")) == "a\\0b\\0"
    assert text_of(ValueError("\udc80")) == "\\udc80"
    assert "RuntimeError" in text_of(Unspeakable())
    assert text_of(ValueError()) == ""
    assert FailedPosition.of(1, OutputError("x")).error == "lazyproc.OutputError"
    assert FailedPosition.of(1, Unspeakable()).error == f"{Unspeakable.__module__}.Unspeakable"
    assert FailedPosition.of(1, type("Ä" * 99, (Exception,), {})()).error.endswith("Ä")


# -- every engine, every way to the results --------------------------------------------------------------------------


@dataclass(frozen=True)
class NumberSource:
    """Positions whose values are their own numbers."""

    travels = True
    read_seconds = 0.0

    def rows(self, runs: Any) -> NDArray[Any]:
        return np.concatenate([np.arange(start, stop, dtype=float) for start, stop in runs]).reshape(-1, 1)


def one_number(row: NDArray[Any], bad: frozenset[int]) -> Any:
    fails(row[0], bad)
    return 2 * row[0]


def many_numbers(block: NDArray[Any], bad: frozenset[int]) -> Any:
    for number in block[:, 0]:
        fails(number, bad)
    return 2 * block[:, 0]


@pytest.mark.parametrize(
    ("engine", "n_trials"), [("serial", 8), ("threads", 6), ("processes", 2)], ids=["serial", "threads", "processes"]
)
def test_engines_agree(engine: str, n_trials: int) -> None:
    chance = random.Random(SEED)
    output = lazyproc.Output("f8", fill_value=-1).resolve("Twice", 1)
    remaining = Runs.from_spans([(0, 17), (40, 41), (100, 640), (641, 1000)])
    for _ in range(n_trials):
        vectorized = engine == "threads" or chance.random() < 0.5
        positions = remaining.positions().tolist()
        bad = frozenset(chance.sample(positions, chance.choice([0, 1, 5, 60])))
        function = many_numbers if vectorized else one_number
        kernel = Kernel(function, vectorized, (), {"bad": bad}, (output,), NumberSource(), None, max_failures=1000)
        plan = BlockPlan(remaining, chance.choice([64, 1000]))
        found = np.full(1000, np.nan)
        failed: list[FailedPosition] = []
        for receipt in Scheduler(engine, 2).run(kernel, plan, lambda: False, "bad"):
            if receipt is None:
                continue
            assert receipt.failure is None
            failed += receipt.failed
            assert (receipt.example is None) == (not receipt.failed)
            assert receipt.arrays is not None
            found[Runs.from_spans(receipt.block.runs()).positions()] = receipt.arrays[0][:, 0]
        expected = np.full(1000, np.nan)
        expected[positions] = 2.0 * np.array(positions)
        expected[sorted(bad)] = -1
        np.testing.assert_array_equal(found, expected, err_msg=f"seed {SEED}")
        assert {(one.position, one.error, one.text) for one in failed} == {
            (number, "ValueError" if number % 2 else "ZeroDivisionError", f"told to fail at {number}") for number in bad
        }


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bad=st.dictionaries(st.integers(0, N_POSITIONS - 1), st.sampled_from(["no", "µ ☃ nein", "odd"]), max_size=30),
    process=st.sampled_from([Fit, BlockFit]),
    how=st.sampled_from(["path", "path", "elsewhere", "handle", "core"]),
)
def test_a_whole_run_is_right(tmp_path: Path, bad: dict[int, str], process: Any, how: str) -> None:
    Fit.bad.clear()
    Fit.bad.update(bad)
    folder = tmp_path / str(time.monotonic_ns())
    folder.mkdir()
    path, name = make_usid_file(folder / "scan.h5", n_rows=12, n_cols=10, n_spectral=6, data=numbered())
    options: dict[str, Any] = {"on_error": "record", "cores": 1}
    if how in ("path", "elsewhere"):
        target = f"{folder}/out.h5::/results" if how == "elsewhere" else None
        with process(f"{path}::{name}", h5_target_group=target, **options) as run:
            check(run.compute(), bad)
        return
    driver = {"driver": "core", "backing_store": False} if how == "core" else {}
    with h5py.File(path, "r+", **driver) as file:
        check(process(file[name], **options).compute(), bad)


@pytest.mark.parametrize("kind", ["threads", "processes", "client"])
def test_a_whole_run_on_every_scheduler(scan: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs of which the driver's process, its threads, others, and a cluster do the blocks."""
    monkeypatch.setattr("lazyproc.engine.choose.POOL_PAYS", 0.0)
    monkeypatch.setattr("lazyproc.engine.choose._THREADS_PAY", 0.0)
    monkeypatch.setattr("lazyproc.engine.choose._GAIN", 0.0 if kind == "threads" else 1e9)
    bad = {3.0, 4.0, 77.0, 119.0}

    def function(block):
        for number in block[:, 0]:
            if number in bad:
                raise ValueError(f"no {number:g}")
        time.sleep(0.001 * len(block))
        return {"Mean": block.mean(axis=1), "Number": block[:, 0].astype(int), "Twice": 2 * block}

    def run(**options: Any) -> None:
        group = lazyproc.map_positions(
            function, scan, Fit.outputs, vectorized=True, on_error="record", cores=2, process_name="Fit", **options
        )
        check(group, {number: f"no {number:g}" for number in bad})

    if kind != "client":
        run()
        return
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        run(client=client)


# -- what is kept, whatever is cut off -------------------------------------------------------------------------------


class Shelf:
    """Rows in memory that stop taking anything after so many bytes were written to all shelves together."""

    def __init__(self, rows: NDArray[Any], left: list[int]) -> None:
        self.rows = rows
        self.left = left

    def read(self, runs: Runs) -> NDArray[Any]:
        return self.rows[runs.positions()]

    def write(self, start: int, rows: NDArray[Any]) -> None:
        data = rows.tobytes()[: max(0, self.left[0])]
        self.left[0] -= len(rows.tobytes())
        place = start * self.rows.itemsize
        self.rows.view(np.uint8).reshape(-1)[place : place + len(data)] = np.frombuffer(data, np.uint8)

    def fill(self, runs: Runs, value: int) -> None:
        for start, rows in filled_pieces(runs, value):
            self.write(start, rows)


def committed(log: FailureLog, mask: Shelf, done: list[int], failed: list[FailedPosition]) -> None:
    """Commit as a target does: the log, then the mask."""
    log.write(Runs.from_positions(done), failed)
    for position in done:
        mask.write(position, np.ones(1, np.uint8))


def test_nothing_wrong_counts_wherever_the_writes_are_cut_off() -> None:
    """Two commits and a retry, cut off after every number of bytes; then all of it again, with other texts."""
    row = counting_rows.__globals__["EMPTY_ROW"]
    long = "x" * 300

    def failures(tag: str, *positions: int) -> list[FailedPosition]:
        return [FailedPosition(position, "ValueError", f"{tag} {position} {long}") for position in positions]

    def run(shelves: list[Shelf], tag: str, limit: int = 4) -> None:
        mask, status, table = shelves
        log = FailureLog(mask, status, table, 4, limit)
        todo = [position for position in range(10) if not mask.rows[position]]
        for part in (todo[:6], todo[6:]):
            committed(log, mask, part, failures(tag, *(one for one in part if one in (2, 5, 9))))
        again = Runs.from_positions([2, 9])
        for position in again.positions():  # taken back, as a retry does
            mask.write(int(position), np.zeros(1, np.uint8))
        log.release(again)
        committed(log, mask, [2, 9], failures(tag + " again", 9))

    def new(left: int) -> list[Shelf]:
        budget = [left]
        rows = (np.zeros(10, np.uint8), np.zeros(10, np.uint8), np.zeros(4, row.dtype))
        return [Shelf(one, budget) for one in rows]

    whole = new(10**6)
    run(whole, "first")
    total = 10**6 - whole[0].left[0]
    cuts = [*range(0, total, 37), *range(max(0, total - 40), total)]
    for cut in cuts:
        shelves = new(cut)
        run(shelves, "first")
        mask, status, table = (shelf.rows for shelf in shelves)
        counting = counting_rows(table, shelves[0], shelves[1])
        positions = table["position"][counting].tolist()
        assert len(set(positions)) == len(positions), cut
        assert set(positions) == {one for one in range(10) if mask[one] == 1 and status[one] == 2}, cut
        assert set(positions) <= {2, 5, 9}, cut
        for shelf in shelves:
            shelf.left = [10**6]
        run(shelves, "second")
        counting = counting_rows(table, shelves[0], shelves[1])
        assert sorted(table["position"][counting].tolist()) == [5, 9], cut
        assert int((table != row).sum()) == 2, "what does not count was cleared"
        assert mask.all(), cut
        assert status.tolist() == [1, 1, 1, 1, 1, 2, 1, 1, 1, 2], cut


DRIVER = """
import json, sys, time
import h5py, lazyproc

how, scan, main, calls, what = json.loads(sys.argv[1])

class Slow(lazyproc.Process):
    process_name = "Fit"
    outputs = {
        "Mean": lazyproc.Output("f8"),
        "Number": lazyproc.Output("i4", fill_value=-1),
        "Twice": lazyproc.Output("f4", shape_from_main=True),
    }

    @staticmethod
    def _map_function(row, calls):
        with open(calls, "a") as file:
            file.write(f"{int(row[0])}\\n")
        time.sleep(0.006)
        if row[0] % 3 == 1:
            raise ValueError(f"told to fail at {row[0]:g}")
        return {"Mean": row.mean(), "Number": int(row[0]), "Twice": 2 * row}

options = dict(parms_dict={"calls": calls}, cores=1, checkpoint_interval=0.05, verbose=True, on_error="record")
with h5py.File(scan, "r+" if how == "handle" else "r") as file:
    if how == "path":
        file.close()
    with Slow(file[main] if how == "handle" else f"{scan}::{main}", **options) as process:
        getattr(process, what)()
print("finished", flush=True)
"""


class Driver:
    """A run in a process of its own, which can be killed."""

    def __init__(self, folder: Path, how: str) -> None:
        self.scan, self.calls, self.how = folder / "scan.h5", folder / "calls", how
        make_usid_file(self.scan, n_rows=12, n_cols=10, n_spectral=6, data=numbered())
        self.calls.touch()
        self._script = folder / "driver.py"
        self._script.write_text(DRIVER)
        self.bad = {float(number): f"told to fail at {number}" for number in range(1, N_POSITIONS, 3)}

    def start(self, what: str) -> subprocess.Popen[str]:
        arguments = json.dumps([self.how, str(self.scan), MAIN, str(self.calls), what])
        command = [sys.executable, str(self._script), arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill(self, what: str, seconds: float) -> bool:
        """Kill a run some time after its loop has begun; tell whether it was still at work."""
        process = self.start(what)
        assert process.stderr is not None
        for line in process.stderr:
            if "positions in" in line or "returning the finished" in line or "no position of" in line:
                break
        time.sleep(seconds)
        working = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        recover_locked(str(self.scan))  # as `lazyproc recover` does, for one who opens the file before compute() can
        return working

    def finish(self, what: str) -> list[int]:
        """Let a run come to its end; return the positions that it called the function for."""
        before = len(self.calls.read_text())
        output, errors = self.start(what).communicate(timeout=120)
        assert "finished" in output, errors
        return [int(line) for line in self.calls.read_text()[before:].split()]

    def check(self, *, complete: bool = False) -> NDArray[Any]:
        """Check what counts; return the mask."""
        with h5py.File(self.scan, "r") as file:
            group = file[f"{MAIN}-Fit_000"]
            check(group, self.bad, complete=complete)
            return group[MASK][:]


@pytest.mark.parametrize("how", ["path", "handle"])
def test_killed_while_failures_are_recorded_and_resumed(tmp_path: Path, how: str) -> None:
    seed = f"{SEED} {how}"
    chance = random.Random(seed)
    driver = Driver(tmp_path, how)
    for _ in range(2):
        driver.kill("compute", chance.uniform(0, 0.35))
        mask = driver.check()
        print(f"seed {seed}: {int(mask.sum())} positions done")
    assert sorted(driver.finish("compute")) == np.flatnonzero(mask == 0).tolist(), seed
    driver.check(complete=True)
    # and the second try: what was recorded is taken back, computed again, and recorded once
    if driver.kill("retry_failed", chance.uniform(0, 0.2)):
        mask = driver.check()
        print(f"seed {seed}: {int(mask.sum())} positions done after a killed retry")
    remaining = np.flatnonzero(driver.check() == 0)
    assert set(remaining.tolist()) <= {int(number) for number in driver.bad}, "others are not touched"
    again = driver.finish("retry_failed")
    assert set(remaining.tolist()) <= set(again) <= {int(number) for number in driver.bad}, seed
    driver.check(complete=True)


def test_a_killed_retry_can_also_be_finished_by_compute(scan: str) -> None:
    """A retry that was killed after it had taken its positions back: mask cleared, nothing else done."""
    Fit.bad.update({5: "no", 80: "never"})
    with Fit(scan, on_error="record", cores=1) as process:
        name = process.compute().name
    path = scan.partition("::")[0]
    with h5py.File(path, "r+") as file:
        file[name][MASK][[5, 80]] = 0
        assert lazyproc.failures(file[name]) == [], "what the mask does not mark does not count"
    Fit.calls.clear()
    with Fit(scan, cores=1) as process:
        assert len(process.partial_h5_groups) == 1
        with pytest.raises(FunctionError, match="position 5 "):
            process.compute()
        assert set(Fit.calls) <= {5, 80}
        Fit.bad.pop(5)
        with pytest.raises(FunctionError, match=r"1 positions .* failed again.*position 80: ValueError: never"):
            process.retry_failed()
        check(process.duplicate_h5_groups[0], {80: "never"})


# -- begun one way, resumed another ----------------------------------------------------------------------------------


def unmark(path: str, group: str, positions: slice) -> None:
    """Take positions out of the mask, as if a run had been killed before its last commits."""
    with h5py.File(path, "r+") as file:
        file[group][MASK][positions] = 0


@pytest.mark.parametrize("name", [STATUS, TABLE])
def test_the_status_mask_has_a_name_of_its_own(scan: str, name: str) -> None:
    """A mask that is the richer status, too, would be written before the results are durable."""
    with Fit(scan, cores=1) as process:
        process._status_dset_name = name
        with pytest.raises(ArgumentValueError, match=f"_status_dset_name: '{name}' came; expected another name"):
            process.compute()


def test_status_is_told_of_a_mask_of_another_name(scan: str) -> None:
    Fit.bad = {7: "told to"}
    with Fit(scan, cores=1, on_error="record") as process:
        process._status_dset_name = "computed"
        process.compute()
    (found,) = file_status(scan.partition("::")[0]).results
    assert (found.n_done, found.n_failed, found.n_positions, found.problem) == (120, 1, 120, "")
    assert found.finished
    assert not found.phase


def test_a_status_of_somebody_else_is_left_alone(scan: str) -> None:
    """Results that are none of lazyproc's may have a dataset of that name: it says nothing, and is not written to."""
    with Fit(scan, cores=1) as process:
        name = process.compute().name
    path = scan.partition("::")[0]
    unmark(path, name, slice(40, 100))
    with h5py.File(path, "r+") as file:
        for attribute in [one for one in file[name].attrs if one.startswith("lazyproc_")]:
            del file[name].attrs[attribute]
        file[name][STATUS][:] = 7
    with Fit(scan, cores=1) as process:
        group = process.compute()
        assert group.name == name
        assert (group[MASK][:] == 1).all()
        assert (group[STATUS][:] == 7).all()


def test_begun_with_raise_and_resumed_with_record(scan: str) -> None:
    with Fit(scan, cores=1) as process:
        group = process.compute()
        assert (group[STATUS][:] == 1).all()
        assert TABLE not in group
        name = group.name
    unmark(scan.partition("::")[0], name, slice(40, 100))
    Fit.bad.update({50: "no", 90: "never"})
    with Fit(scan, cores=1) as process, pytest.raises(FunctionError, match="position 50 "):
        process.compute()
    with Fit(scan, on_error="record", cores=1) as process:
        group = process.compute()
        assert group.name == name
        check(group, Fit.bad)
        assert process.why_not_duplicate(group).startswith("no difference")


@pytest.mark.parametrize("by", ["path", "handle"])
def test_begun_with_record_and_resumed_with_raise(scan: str, by: str) -> None:
    """The datasets are kept up also by a run that does not record: what it does is done, not failed."""
    path, _, main = scan.partition("::")
    Fit.bad.update({number: "no" for number in range(30, 90, 3)})
    with Fit(scan, on_error="record", cores=1) as process:
        name = process.compute().name
    unmark(path, name, slice(50, 80))
    Fit.bad.clear()
    left = {number: "no" for number in range(30, 90, 3) if not 50 <= number < 80}
    if by == "path":
        with Fit(scan, cores=1) as process:
            check(process.compute(), left)
            assert process.h5_results_grp.name == name
        return
    with h5py.File(path, "r+") as file:
        check(Fit(file[main], cores=1).compute(), left)


# -- how many may fail -----------------------------------------------------------------------------------------------


def test_the_limit_stops_the_run_and_all_is_kept(scan: str) -> None:
    Fit.bad.update({number: f"no {number}" for number in range(10, 110, 2)})
    with Fit(scan, on_error="record", cores=1) as process:
        process.max_failures = 45
        with pytest.raises(FailureLimitError) as caught:
            process.compute()
        text = str(caught.value)
        for part in ("max_failures = 45", "position 10: ValueError: no 10; position 12: ", "are done and kept in"):
            assert part in text
        assert isinstance(caught.value, FunctionError)
        assert isinstance(caught.value.__cause__, ValueError)
        (group,) = process.partial_h5_groups
        assert 0 < len(lazyproc.failures(group)) <= 45
        check(group, Fit.bad, complete=False)
        done = int(group[MASK][:].sum())
        Fit.calls.clear()
        process.max_failures = 50  # the table is made larger
        group = process.compute()
        assert len(Fit.calls) == N_POSITIONS - done
        check(group, Fit.bad)


def test_as_many_as_are_allowed_do_not_stop_the_run(scan: str) -> None:
    Fit.bad.update({number: "no" for number in range(10, 110, 2)})
    group = lazyproc.map_positions(
        Fit._map_function, scan, Fit.outputs, on_error="record", max_failures=50, process_name="Fit", cores=1
    )
    check(group, Fit.bad)
    assert group[TABLE].shape == (50,)


def test_too_many_at_the_first_look_create_nothing(scan: str) -> None:
    Fit.bad.update({number: "no" for number in range(1, 119)})
    with Fit(scan, on_error="record", cores=1) as process:
        process.max_failures = 2
        with pytest.raises(FailureLimitError, match=r"that were tried failed.*Nothing was written"):
            process.compute()
        assert process.partial_h5_groups == []


@pytest.mark.parametrize("process", [Fit, BlockFit])
@pytest.mark.parametrize("text", ["broken", "odd"])
def test_a_broken_function_creates_nothing(scan: str, process: Any, text: str) -> None:
    Fit.bad.update(dict.fromkeys(range(N_POSITIONS), text))
    before = Path(scan.partition("::")[0]).read_bytes()
    with process(scan, on_error="record", cores=1) as run, pytest.raises((FunctionError, OutputError)) as caught:
        run.compute()
    assert not isinstance(caught.value, FailureLimitError)
    assert "position" in str(caught.value)
    if text == "broken":
        assert str(caught.value.__cause__) == "broken"
    assert Path(scan.partition("::")[0]).read_bytes() == before
    assert len(Fit.calls) < 40


def test_bad_corners_are_no_broken_function(scan: str) -> None:
    """The first, the last and the middle position, which are tried first, may well be the bad ones."""
    Fit.bad.update({0: "no", 59: "no", 60: "no", 119: "no"})
    for process in (Fit, BlockFit):
        with process(scan, on_error="record", cores=1, parms_dict={"of": process.__name__}) as run:
            check(run.compute(), Fit.bad)


# -- again -----------------------------------------------------------------------------------------------------------


def test_retry_computes_only_what_failed(scan: str, caplog: pytest.LogCaptureFixture) -> None:
    Fit.bad.update({4: "no", 70: "never", 71: "odd"})
    with Fit(scan, on_error="record", cores=1) as process, caplog.at_level(logging.WARNING, "lazyproc"):
        group = process.compute()
        assert "3 of 120 positions failed" in caplog.text
        assert "failed positions  3 in Raw_Data-Fit_000" in repr(process)
        assert "3 of those done" in repr(process.plan())
        assert process.plan().as_dict()["n_failed"] == 3
        caplog.clear()
        assert process.compute().name == group.name, "finished results like any other"
        assert "retry_failed()" in caplog.text

        Fit.calls.clear()
        Fit.bad.update({70: "still not"})
        Fit.bad.pop(4)
        group = process.retry_failed()
        assert sorted(Fit.calls) == [4, 70, 71]
        check(group, {70: "still not", 71: "odd"})
        assert process.h5_results_grp == group
        assert group.attrs["last_pixel"] == N_POSITIONS
        assert group.attrs["lazyproc_finished"].strip()

        Fit.bad.clear()
        Fit.calls.clear()
        caplog.clear()
        check(process.retry_failed(), {})
        assert sorted(Fit.calls) == [70, 71]
        assert "failed" not in caplog.text
        assert "failed" not in repr(process)
        Fit.calls.clear()
        assert process.retry_failed().name == group.name
        assert Fit.calls == [], "nothing has failed, so nothing is run"


def test_retry_takes_the_arguments_of_compute(scan: str) -> None:
    bad = [7.0]

    class Power(lazyproc.Process):
        outputs: ClassVar = {"Power": lazyproc.Output("f8")}

        @staticmethod
        def _map_function(row, power=1):
            fails(row[0], bad)
            return float(np.sum(row**power))

    with Power(scan, on_error="record", cores=1) as process:
        with pytest.raises(ResultsError, match="no results of this work"):
            process.retry_failed()
        group = process.compute(power=2)
        with pytest.raises(ResultsError, match="no results of this work"):
            process.retry_failed()
        bad.clear()
        assert process.retry_failed(power=2).name == group.name
        assert lazyproc.failures(process.h5_results_grp) == []
        assert process.h5_results_grp["Power"][7, 0] == np.sum(numbered()[7] ** 2)


def test_retry_that_raises_keeps_the_rest(scan: str) -> None:
    Fit.bad.update({4: "no", 70: "never", 71: "odd"})
    with Fit(scan, on_error="record", cores=1) as process:
        process.compute()
    Fit.bad.pop(70)
    Fit.bad[4] = "not now"
    with Fit(scan, cores=1) as process:
        with pytest.raises(
            FunctionError, match=r"2 positions.*failed again.*position 4: ValueError: not now"
        ) as caught:
            process.retry_failed()
        assert str(caught.value.__cause__) == "not now"
        assert caught.value.positions == (4, 5)
        (group,) = process.duplicate_h5_groups
        check(group, {4: "not now", 71: "odd"})


def test_retry_of_partial_results_leaves_the_rest_undone(scan: str) -> None:
    Fit.bad.update({number: "no" for number in range(10, 110, 2)})
    with Fit(scan, on_error="record", cores=1) as process:
        process.max_failures = 45
        with pytest.raises(FailureLimitError):
            process.compute()
        (group,) = process.partial_h5_groups
        mask = group[MASK][:]
        recorded = [one.position for one in lazyproc.failures(group)]
        Fit.bad.clear()
        Fit.calls.clear()
        group = process.retry_failed()
        assert sorted(Fit.calls) == recorded
        np.testing.assert_array_equal(group[MASK][:], mask)
        check(group, {}, complete=False)
        check(process.compute(), {})


def test_retry_on_a_read_only_object_is_refused(scan: str) -> None:
    path, _, main = scan.partition("::")
    with h5py.File(path, "r") as file, Fit(file[main], lazy=True) as process:
        with pytest.raises(lazyproc.ReadOnlyFileError):
            process.retry_failed()


@pytest.mark.parametrize("by", ["path", "handle"])
def test_an_end_that_was_not_recorded_is_recorded_later(scan: str, by: str) -> None:
    """A death between the last commit and the end: all is done, but older readers are told otherwise."""
    path, _, main = scan.partition("::")
    with Fit(scan, cores=1) as process:
        name = process.compute().name
    with h5py.File(path, "r+") as file:
        file[name].attrs["last_pixel"] = 7
        file[name].attrs["lazyproc_finished"] = "".ljust(19)
        if by == "handle":
            group = Fit(file[main], cores=1).compute()
            assert group.name == name
    if by == "path":
        with Fit(scan, cores=1) as process:
            assert process.compute().name == name
    with h5py.File(path, "r") as file:
        assert file[name].attrs["last_pixel"] == N_POSITIONS
        assert file[name].attrs["lazyproc_finished"].strip()
    assert len(Fit.calls) == N_POSITIONS


# -- what people and other programs see ------------------------------------------------------------------------------


def test_views_show_the_status(scan: str) -> None:
    pytest.importorskip("xarray")
    Fit.bad.update({4: "no", 70: "never"})
    expected = np.ones(N_POSITIONS, np.uint8)
    expected[[4, 70]] = 2
    with Fit(scan, on_error="record", cores=1) as process:
        lazy = process.to_xarray().compute(scheduler="threads")
        assert lazy["status"].transpose("Y", "X").to_numpy().ravel().tolist() == expected.tolist()
        assert np.isnan(lazy["Mean"].transpose("Y", "X").to_numpy().ravel()[[4, 70]]).all()
        group = process.compute()
        results = lazyproc.open_results(group)
        assert results["status"].transpose("Y", "X").to_numpy().ravel().tolist() == expected.tolist()
        assert results["status"].attrs["flag_meanings"] == "not_done done failed"
        Fit.calls.clear()
        read = process.to_xarray().compute(scheduler="threads")
        assert Fit.calls == [], "failed positions are not tried again by a view"
        import xarray

        xarray.testing.assert_equal(read, lazy)
        assert [one.position for one in lazyproc.failures(f"{scan.partition('::')[0]}::{group.name}")] == [4, 70]
    with Fit(scan, cores=1) as process:
        assert (process.to_xarray()["status"] == 2).sum() == 2
    with Fit(scan, cores=1, parms_dict={"other": 1}) as process:
        assert "status" not in process.to_xarray()
        with pytest.raises(FunctionError):
            process.to_xarray()["Mean"].compute(scheduler="threads")
    with pytest.raises(ArgumentTypeError, match="group"):
        lazyproc.failures(7)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # those of pyUSID with today's NumPy
def test_pyusid_sees_finished_results(scan: str) -> None:
    pyUSID = pytest.importorskip("pyUSID")
    Fit.bad.update({4: "no", 70: "never"})
    with Fit(scan, on_error="record", cores=1) as process:
        name = process.compute().name
    with h5py.File(scan.partition("::")[0], "r") as file:
        group = file[name]
        assert sorted(pyUSID.hdf_utils.check_if_main(item) for item in group.values()).count(True) == 3
        assert {one.name.rpartition("/")[2] for one in pyUSID.hdf_utils.get_all_main(group)} == set(Fit.outputs)
        assert group[MASK][:].sum() == N_POSITIONS, "as its Process asks"
        assert pyUSID.USIDataset(group["Number"])[:][4] == -1
        assert group.attrs["last_pixel"] == N_POSITIONS


def test_plain_h5py_reads_the_table(scan: str) -> None:
    Fit.bad.update({4: "nö"})
    with Fit(scan, on_error="record", cores=1) as process:
        name = process.compute().name
    with h5py.File(scan.partition("::")[0], "r") as file:
        (row,) = [row for row in file[name][TABLE] if row["error"]]
        assert (row["position"], row["error"], row["text"].decode()) == (4, b"ValueError", "nö")
        assert h5py.check_string_dtype(file[name][TABLE].dtype["text"]).encoding == "utf-8"
        assert file[name][STATUS].attrs["flag_values"].tolist() == [0, 1, 2]
        assert file[name][TABLE].attrs["description"]


@pytest.mark.parametrize("name", [STATUS, TABLE])
def test_damaged_datasets_stand_in_nobodys_way(scan: str, name: str) -> None:
    Fit.bad.update({4: "no"})
    with Fit(scan, on_error="record", cores=1) as process:
        group = process.compute().name
    with h5py.File(scan.partition("::")[0], "r+") as file:
        del file[group][name]
        file[group][name] = np.zeros(3)
        if name == STATUS:
            with pytest.raises(ResultsError, match=r"position_status: a dataset of the shape \(3,\)"):
                lazyproc.failures(file[group])
    with Fit(scan, on_error="record", cores=1) as process:
        assert name in process.why_not_duplicate(group)
        assert process.compute().name != group


def test_rows_of_the_table_that_were_changed_do_not_count(scan: str) -> None:
    Fit.bad.update({4: "no", 5: "no"})
    with Fit(scan, on_error="record", cores=1) as process:
        name = process.compute().name
    with h5py.File(scan.partition("::")[0], "r+") as file:
        rows = file[name][TABLE][:]
        rows["text"][rows["position"] == 4] = b"something else"
        file[name][TABLE][:] = rows
        assert lazyproc.failures(file[name]) == [FailedPosition(4, "", ""), FailedPosition(5, "ValueError", "no")]
    Fit.bad.clear()
    with Fit(scan, cores=1) as process:
        check(process.retry_failed(), {})


# -- what may be asked for -------------------------------------------------------------------------------------------


def test_arguments_are_checked(scan: str) -> None:
    with pytest.raises(ArgumentValueError, match=r"on_error: 'ignore'.*'raise'.*'record'"):
        Fit(scan, on_error="ignore")
    with pytest.raises(ArgumentTypeError, match="on_error: None"):
        Fit(scan, on_error=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Fit(scan, None, None, None, None, 1.0, False, None, False, "record")  # type: ignore[misc]
    with Fit(scan, on_error="record") as process:
        for wrong, error in ((0, ArgumentValueError), (2.5, ArgumentTypeError), (True, ArgumentTypeError)):
            process.max_failures = wrong  # type: ignore[assignment]
            with pytest.raises(error, match="max_failures"):
                process.compute()
    with pytest.raises(ArgumentValueError, match="max_failures"):
        lazyproc.map_positions(np.mean, scan, lazyproc.Output("f4"), max_failures=0)
    for name in (STATUS, TABLE):
        with pytest.raises(lazyproc.DefinitionError, match="used by the file format"):
            lazyproc.map_positions(np.mean, scan, {name: lazyproc.Output("f4")})


def test_a_class_with_hooks_cannot_record(scan: str) -> None:
    class Old(lazyproc.Process):
        def _create_results_datasets(self):
            pass

    path, _, main = scan.partition("::")
    with h5py.File(path, "r+") as file:
        with pytest.raises(ArgumentValueError, match=r"on_error: 'record' came for Old.*fill value"):
            Old(file[main], on_error="record")
        with pytest.raises(lazyproc.DefinitionError):
            Old(file[main]).retry_failed()


def test_trying_out_always_raises(scan: str) -> None:
    Fit.bad.update({4: "no"})
    with Fit(scan, on_error="record", cores=1) as process, pytest.raises(FunctionError, match="position 4 "):
        process.test(4)


MODULE = """
import lazyproc

class Odd(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row):
        if row[0] % 10 == 7:
            raise ValueError("told to fail")
        return row.mean()
"""


def test_command_line(scan: str, tmp_path: Path) -> None:
    click_testing = pytest.importorskip("click.testing")
    from lazyproc.cli import main

    (tmp_path / "odd.py").write_text(MODULE)
    process = f"{tmp_path / 'odd.py'}:Odd"

    def call(*words: str) -> Any:
        return click_testing.CliRunner().invoke(main, list(words))

    assert call("run", process, scan, "--on-error", "ignore").exit_code == 2
    failed = call("run", process, scan, "--cores", "1")
    assert failed.exit_code == 1
    few = call("run", process, scan, "--cores", "1", "--on-error", "record", "--max-failures", "3")
    assert few.exit_code == 1
    assert "max_failures = 3" in few.output
    done = call("run", process, scan, "--cores", "1", "--on-error", "record", "--json")
    assert done.exit_code == 0, done.output
    assert '"n_failed": 12' in done.output
    path = scan.partition("::")[0]
    shown = call("status", path)
    assert "120 of 120 positions, 12 of them failed" in shown.output
    (results,) = json.loads(call("status", path, "--json").output)["results"]
    assert (results["n_done"], results["n_failed"]) == (120, 12)
    assert json.loads(call("plan", process, scan, "--on-error", "record", "--json").output)["n_failed"] == 12
