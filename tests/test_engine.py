"""Every scheduler runs the same block function with the same results, in a bounded window, whoever dies."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dask.local
import numpy as np
import pytest
from numpy.typing import NDArray

from lazyproc.core.blocks import Block, BlockPlan
from lazyproc.core.errors import FileChangedError, FunctionError, WorkerError
from lazyproc.core.learn import Room
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.core.specs import Output
from lazyproc.engine.block_function import run_loaded
from lazyproc.engine.choose import Scheduler, can_be_sent, choose_local
from lazyproc.engine.cluster import block_graph
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.limits import available_cores, default_cores
from lazyproc.engine.local import run_processes, run_serial, run_threads
from lazyproc.engine.packing import pack, pack_once, unpack
from lazyproc.engine.receipt import Receipt
from lazyproc.engine.threads import BlockThreads
from lazyproc.engine.worker import Packed

N_POSITIONS = 1000
REMAINING = Runs.from_spans([(0, 17), (40, 41), (100, 640), (641, 1000)])


@dataclass(frozen=True)
class NumberSource:
    """Positions whose values are their own numbers."""

    travels = True
    read_seconds = 0.0

    def rows(self, runs: Any) -> NDArray[Any]:
        return np.concatenate([np.arange(start, stop, dtype=float) for start, stop in runs]).reshape(-1, 1)


@dataclass(frozen=True)
class NamedParameter:
    """A parameter that takes room."""

    values: NDArray[Any]


def twice(spectrum: NDArray[Any]) -> Any:
    return 2 * spectrum[0]


def twice_block(block: NDArray[Any]) -> Any:
    return 2 * block[:, 0]


def kernel_of(function: Any, *, vectorized: bool = False, **kwargs: Any) -> Kernel:
    outputs = (Output("f8").resolve("Twice", 1),)
    return Kernel(function, vectorized, (), kwargs, outputs, NumberSource(), None)


def never() -> bool:
    return False


def collect(receipts: Iterator[Receipt | None]) -> NDArray[Any]:
    """Gather the results of all receipts, and see that every position came once."""
    found = np.full(N_POSITIONS, np.nan)
    for receipt in receipts:
        if receipt is None:
            continue
        assert receipt.failure is None
        assert receipt.arrays is not None
        for start, stop, place in receipt.block.offsets():
            assert np.isnan(found[start:stop]).all()
            found[start:stop] = receipt.arrays[0][place : place + stop - start, 0]
    return found


EXPECTED = np.full(N_POSITIONS, np.nan)
EXPECTED[REMAINING.positions()] = 2.0 * REMAINING.positions()


both_ways = pytest.mark.parametrize("graph_after", [math.inf, 0.0], ids=["directly", "graphs"])
"""How blocks come to worker processes: a short job needs no Dask, a long one is graphs on its local scheduler."""


@pytest.mark.parametrize("max_positions", [1000, 64])
def test_engines_of_this_machine_agree(max_positions: int) -> None:
    plan = BlockPlan(REMAINING, max_positions)
    one, block = kernel_of(twice), kernel_of(twice_block, vectorized=True)
    np.testing.assert_array_equal(collect(run_serial(one, plan, never)), EXPECTED)
    np.testing.assert_array_equal(collect(run_serial(block, plan, never)), EXPECTED)
    np.testing.assert_array_equal(collect(run_threads(block, plan, 2, never)), EXPECTED)
    np.testing.assert_array_equal(collect(run_processes(one, plan, 2, never)), EXPECTED)
    np.testing.assert_array_equal(collect(run_processes(one, plan, 2, never, graph_after=0.0)), EXPECTED)
    np.testing.assert_array_equal(collect(Scheduler("both", 2).run(one, plan, never, "both")), EXPECTED)


def slowly_twice(spectrum: NDArray[Any]) -> Any:
    time.sleep(0.002)
    return 2 * spectrum[0]


def twice_together(spectrum: NDArray[Any], driver: int, folder: str) -> Any:
    """Go on slowly while the other process is not there: however long its start takes, there is work left for it."""
    if os.getpid() != driver:
        (Path(folder) / "here").touch()
    elif not (Path(folder) / "here").exists():
        time.sleep(0.2 if spectrum[0] > 100 else 0.002)
    return 2 * spectrum[0]


def test_this_process_works_until_others_are_there_and_beside_them(tmp_path: Path) -> None:
    kernel = kernel_of(twice_together, driver=os.getpid(), folder=str(tmp_path))
    receipts = [one for one in Scheduler("both", 2).run(kernel, BlockPlan(REMAINING, 10), never, "both") if one]
    np.testing.assert_array_equal(collect(iter(receipts)), EXPECTED)
    mine = [str(os.getpid()) in one.worker for one in receipts]
    assert mine[0]
    assert 0 < sum(mine) < len(mine)
    assert len({one.worker for one in receipts}) == 2


def test_this_process_does_it_all_if_no_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    receipts = Scheduler("both", 3).run(kernel_of(slowly_twice), BlockPlan(REMAINING, 50), never, "both")
    np.testing.assert_array_equal(collect(receipts), EXPECTED)


def die_elsewhere(spectrum: NDArray[Any], driver: int) -> Any:
    time.sleep(0.002)
    if os.getpid() != driver:
        os.kill(os.getpid(), signal.SIGKILL)
    return spectrum[0]


def test_this_process_goes_on_when_others_die() -> None:
    kernel = kernel_of(die_elsewhere, driver=os.getpid())
    receipts = [one for one in Scheduler("both", 2).run(kernel, BlockPlan(REMAINING, 20), never, "both") if one]
    assert {one.failure.kind for one in receipts if one.failure is not None} == {"lost"}
    assert sum(one.block.n_positions for one in receipts) == REMAINING.n_positions
    done = sum(one.block.n_positions for one in receipts if one.failure is None)
    assert done > REMAINING.n_positions / 3


def test_memory_for_one_block_at_a_time_leaves_this_process_idle() -> None:
    room = Room(1000, 1)
    receipts = Scheduler("both", 2).run(kernel_of(slowly_twice), BlockPlan(REMAINING, 20), never, "both", room=room)
    np.testing.assert_array_equal(collect(receipts), EXPECTED)


@both_ways
def test_more_blocks_than_one_graph_holds(graph_after: float) -> None:
    plan = BlockPlan(REMAINING, 2)
    assert plan.count() > 256, "or this would be one graph only"
    receipts = run_processes(kernel_of(twice), plan, 2, never, graph_after=graph_after)
    np.testing.assert_array_equal(collect(receipts), EXPECTED)


def test_graphs_take_over_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(monkeypatch)
    plan = BlockPlan(REMAINING, 5)
    receipts = run_processes(kernel_of(slowly_twice), plan, 2, never, graph_after=0.5)
    np.testing.assert_array_equal(collect(receipts), EXPECTED)
    assert 0 < sum(sent.graphs) < plan.count(), "some blocks went without"


def test_window_of_threads_is_bounded() -> None:
    """A slow consumer holds the workers back: what is computed and not taken stays below the window."""
    started: list[int] = []
    lock = threading.Lock()

    def count(block: NDArray[Any]) -> Any:
        with lock:
            started.append(len(block))
        return block[:, 0]

    taken = 0
    for receipt in run_threads(kernel_of(count, vectorized=True), BlockPlan(REMAINING, 20), 2, never):
        if receipt is not None:
            time.sleep(0.01)
            taken += 1
            assert len(started) - taken <= 2 * 2


@pytest.mark.parametrize("engine", ["serial", "both", "threads", "processes"])
def test_stopping_starts_nothing_new(engine: str) -> None:
    plan = BlockPlan(REMAINING, 5)
    taken: list[Receipt] = []

    def enough() -> bool:
        return len(taken) >= 3

    kernel = kernel_of(twice_block, vectorized=True)
    receipts = Scheduler(engine, 2).run(kernel, plan, enough, "stopping")
    for receipt in receipts:
        taken += [receipt] if receipt is not None else []
    # Two blocks a worker are under way, as many receipts may wait to be taken, and one is being handed on.
    assert 3 <= len(taken) <= 3 + 2 * 2 + 2 * 2 + 1 < plan.count(), "those under way, and no more"


def die_on_position_200(spectrum: NDArray[Any]) -> Any:
    if spectrum[0] == 200:
        os.kill(os.getpid(), signal.SIGKILL)
    return spectrum[0]


@both_ways
def test_a_block_that_always_kills_its_worker_is_given_up(graph_after: float) -> None:
    plan = BlockPlan(REMAINING, 50)
    receipts = run_processes(kernel_of(die_on_position_200), plan, 2, never, graph_after=graph_after)
    taken = [one for one in receipts if one is not None]
    (lost,) = [receipt for receipt in taken if receipt.failure is not None]
    assert lost.failure is not None
    assert lost.failure.kind == "lost"
    assert lost.failure.positions == (200, 201), "its block is halved until it is alone"
    (guilty,) = [block for block in plan if block.start <= 200 < block.stop]
    parts = [set(Runs(one.block.starts, one.block.stops).positions().tolist()) for one in taken]
    whole = set(Runs(guilty.starts, guilty.stops).positions().tolist())
    assert set().union(*parts) == set(REMAINING.positions().tolist())
    assert sum(map(len, parts)) == REMAINING.n_positions, "each once"
    within = [part <= whole for part in parts]
    assert within == sorted(within), "that is done when all others are"


def die_once(spectrum: NDArray[Any], flag: str) -> Any:
    if spectrum[0] == 200:
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return 2 * spectrum[0]


@both_ways
def test_a_lost_worker_is_replaced(tmp_path: Path, graph_after: float) -> None:
    kernel = kernel_of(die_once, flag=str(tmp_path / "died"))
    receipts = run_processes(kernel, BlockPlan(REMAINING, 50), 2, never, graph_after=graph_after)
    np.testing.assert_array_equal(collect(receipts), EXPECTED)
    assert (tmp_path / "died").exists()


def test_messages_are_small_whatever_the_parameters_are() -> None:
    """Parameters travel in the kernel, once a worker; a block's own message is a few numbers."""
    parameter = NamedParameter(np.zeros(10**6))
    packed = pack(kernel_of(twice, parameter=parameter))
    assert len(packed) > 8 * 10**6
    assert unpack(packed) is unpack(packed), "a worker loads it once"
    assert len(pickle.dumps(Block(123456, (10**9,), (10**9 + 5000,)))) < 200


def test_one_task_a_block() -> None:
    blocks = list(BlockPlan(REMAINING, 100))
    graph = block_graph("Peak_Finding-1234", itertools.count(7), blocks, b"")
    (layer,) = graph.layers.values()
    assert list(layer) == [("Peak_Finding-1234", 7 + number) for number in range(len(blocks))]
    assert [task[-1] for task in layer.values()] == blocks


# seconds a position, thread gain, vectorised, workers -> scheduler
CHOICES = [
    pytest.param(1e-6, 1.0, False, 2, "serial", id="too short for a pool"),
    pytest.param(1e-3, 1.0, False, 2, "both", id="between these: processes help"),
    pytest.param(1e-3, 1.0, True, 2, "serial", id="a block function of the same length"),
    pytest.param(1e-2, 1.0, False, 2, "processes", id="long: processes pay"),
    pytest.param(1e-2, 1.9, False, 2, "processes", id="functions of one position never run in threads"),
    pytest.param(1e-3, 1.9, True, 2, "threads", id="NumPy on blocks: threads cost nothing to start"),
    pytest.param(2e-3, 1.4, True, 2, "threads", id="threads that help a little, before processes were there"),
    pytest.param(1e-2, 1.4, True, 2, "processes", id="and not enough for a long job"),
    pytest.param(1e-2, 1.1, True, 2, "processes", id="a block function that holds Python's lock"),
    pytest.param(1e-2, 1.9, True, 1, "serial", id="one worker stays in the process"),
]


@pytest.mark.parametrize(("seconds", "gain", "vectorized", "workers", "expected"), CHOICES)
def test_choice_of_scheduler(seconds: float, gain: float, vectorized: bool, workers: int, expected: str) -> None:
    kernel = kernel_of(twice_block if vectorized else twice, vectorized=vectorized)
    assert choose_local(kernel, Probe(seconds, thread_gain=gain), N_POSITIONS, workers).kind == expected


@dataclass(frozen=True)
class DecodingSource(NumberSource):
    """One that threads read side by side."""

    read_seconds = 1e-2


@pytest.mark.parametrize(
    ("source", "reading", "vectorized", "expected"),
    [
        pytest.param(NumberSource(), 1e-2, True, "processes", id="HDF5 reads, long: with a lock a process"),
        pytest.param(NumberSource(), 1e-2, False, "processes", id="the same for functions of one position"),
        pytest.param(NumberSource(), 1e-3, True, "serial", id="HDF5 reads, not so long"),
        pytest.param(NumberSource(), 1e-3, False, "both", id="and functions of one position, which are helped"),
        pytest.param(DecodingSource(), 0.0, True, "threads", id="read side by side: threads"),
        pytest.param(DecodingSource(), 0.0, False, "processes", id="but never for functions of one position"),
    ],
)
def test_reading_counts_for_the_function(source: Any, reading: float, vectorized: bool, expected: str) -> None:
    kernel = replace(kernel_of(twice_block if vectorized else twice, vectorized=vectorized), source=source)
    probe = Probe(1e-6, reading_seconds=reading)
    assert choose_local(kernel, probe, N_POSITIONS, 2).kind == expected


def test_a_function_that_cannot_travel_stays_here_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    kernel = kernel_of(twice, lock=threading.Lock())
    assert choose_local(kernel, Probe(1.0), N_POSITIONS, 2).kind == "serial"
    assert "cannot be sent to worker processes" in caplog.text


def test_cores() -> None:
    assert 1 <= default_cores() <= available_cores() <= (os.cpu_count() or 1)


def blas_threads() -> int:
    from threadpoolctl import threadpool_info

    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def slow_blas_threads(block: NDArray[Any]) -> Any:
    time.sleep(0.02 * (block[0, 0] % 3))
    return np.full(len(block), float(blas_threads()))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_native_threads_are_limited_while_blocks_run_and_restored_after(kind: str) -> None:
    """Blocks in several threads begin and end within each other's time: the old number must come back all the same."""
    scheduler = Scheduler(kind, 3)
    kernel = kernel_of(slow_blas_threads, vectorized=True).for_run(None, scheduler.native_threads)
    before = blas_threads()
    plan = BlockPlan(REMAINING, 50)
    receipts = [one for one in scheduler.run(kernel, plan, never, "native") if one is not None]
    assert all(receipt.arrays is not None and (receipt.arrays[0] == 1).all() for receipt in receipts)
    assert blas_threads() == before


def refused(spectrum: NDArray[Any]) -> Any:
    time.sleep(0.001)
    try:
        np.float64(1) / np.float64(0)
    except FloatingPointError:
        return 1.0
    return 0.0


def refused_block(block: NDArray[Any]) -> Any:
    return np.full(len(block), refused(block[0]))


@pytest.mark.parametrize("kind", ["serial", "both", "threads", "processes"])
def test_error_settings_of_numpy_are_the_same_wherever_a_block_is_computed(kind: str) -> None:
    """New threads and processes begin with NumPy's own: one result would hold numbers made under different rules."""
    with np.errstate(divide="raise"):
        kernel = kernel_of(refused_block, vectorized=True) if kind == "threads" else kernel_of(refused)
    with np.errstate(divide="ignore"):
        receipts = [one for one in Scheduler(kind, 2).run(kernel, BlockPlan(REMAINING, 20), never, "rules") if one]
    assert all(one.arrays is not None and (one.arrays[0] == 1).all() for one in receipts)


class SaysNothingElsewhere(Exception):
    """Loses what it says on its way, as some exceptions of NumPy's do."""

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        if axis:
            self.axis = axis

    def __str__(self) -> str:
        return f"axis {self.axis} is out of bounds"

    def __reduce__(self) -> tuple[Any, ...]:
        return SaysNothingElsewhere, ()


def test_what_an_exception_says_arrives_even_if_it_says_nothing_there() -> None:
    failure = pickle.loads(pickle.dumps(Failure("function", (4, 5), SaysNothingElsewhere(3))))
    with pytest.raises(FunctionError, match="axis 3 is out of bounds"):
        failure.raise_error("Fit", "scan.h5::/Raw_Data")


TRAVELLERS = """
import pickle, sys
import lazyproc.core.errors as errors
from lazyproc.core.blocks import Block
from lazyproc.engine.failure import Failure

class Both(ValueError, OSError):
    pass

if sys.argv[1] == "tblib":
    import tblib.pickling_support
    tblib.pickling_support.install()  # as Dask does when it is imported, for all classes that are there by then

def tree(kind):
    return {kind}.union(*map(tree, kind.__subclasses__()))

for kind in tree(errors.LazyprocError):
    error = kind("What came.", (3, 5)) if issubclass(kind, errors.FunctionError) else kind("What came.")
    failure = Failure.of_worker(error, Block(0, (3,), (5,)))
    for there in (pickle.loads(pickle.dumps(error)), pickle.loads(pickle.dumps(failure)).error):
        assert type(there) is kind, (kind, there)
        assert str(there) == "What came.", (kind, there)
there = pickle.loads(pickle.dumps(Failure.of_worker(Both("of the user's"), Block(0, (3,), (5,))))).error
assert (type(there), str(there)) == (Both, "of the user's"), repr(there)
print(len(tree(errors.LazyprocError)))
"""


@pytest.mark.parametrize("reducers", ["tblib", "own"])
def test_every_error_arrives_as_it_was(reducers: str) -> None:
    """Whether Dask is imported after the errors or not at all; tblib cannot load errors of two bases that it dumps."""
    done = subprocess.run([sys.executable, "-c", TRAVELLERS, reducers], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_what_a_worker_of_another_machine_found_names_it() -> None:
    gone = FileChangedError("scan.h5: is gone; expected the file that the run began with. Restore it.")
    here = Failure.of_worker(gone, Block(0, (3,), (5,)))
    with pytest.raises(FileChangedError) as caught:
        pickle.loads(pickle.dumps(here)).raise_error("Fit", "scan.h5::/Raw_Data")
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(FileChangedError, match="is gone") as caught:
        pickle.loads(pickle.dumps(replace(here, host="node-7"))).raise_error("Fit", "scan.h5::/Raw_Data")
    assert caught.value.__notes__ == [
        "That is what a worker on node-7 found. It must see the same files by these paths."
    ]
    other = Failure.of_worker(OSError("no such device"), Block(0, (3,), (5,)))
    with pytest.raises(WorkerError, match="a worker failed in the block of positions 3 to 4"):
        other.raise_error("Fit", "scan.h5::/Raw_Data")
    with pytest.raises(WorkerError, match="a worker on node-7 failed in the block of positions 3 to 4"):
        replace(other, host="node-7").raise_error("Fit", "scan.h5::/Raw_Data")


def test_only_unusual_error_settings_travel() -> None:
    with np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):
        usual = kernel_of(twice)
        assert usual.errors is None
        with np.errstate(under="raise"):
            assert kernel_of(twice).errors == {"divide": "warn", "over": "warn", "under": "raise", "invalid": "warn"}
            assert usual.for_run(None, 1).errors is None
            assert unpack(pack(usual)).errors is None
        with np.errstate(invalid="ignore"):
            unusual = kernel_of(twice)
    assert unpack(pack(unusual.for_run(None, 1))).errors == unusual.errors


def divided(spectrum: NDArray[Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nobody handles it
        return np.float64(1) / (0 * spectrum[0])


def test_handlers_of_errors_stay_here_and_are_not_missed_elsewhere() -> None:
    called: list[str] = []
    with np.errstate(divide="call", under="raise", call=lambda kind, flag: called.append(kind)):
        kernel = kernel_of(divided)
        here = [one for one in run_serial(kernel, BlockPlan(REMAINING, 500), never) if one]
        assert len(called) == REMAINING.n_positions
        there = [one for one in run_processes(kernel, BlockPlan(REMAINING, 500), 1, never) if one]
    assert kernel.errors == {"over": "warn", "under": "raise", "invalid": "warn"}
    assert all(one.failure is None for one in [*here, *there])


def falls(spectrum: NDArray[Any], *, at: float, depth: int) -> Any:
    """Fail so deep at a position, or fall for ever."""

    def again(left: int) -> Any:
        if left == 0:
            raise ValueError("bottom")
        return again(left - 1)

    return again(depth) if spectrum[0] == at else 2 * spectrum[0]


@pytest.mark.parametrize(("depth", "error"), [(300, ValueError), (900, ValueError), (10**6, RecursionError)])
def test_an_error_from_ever_so_deep_comes_back_with_both_ends_of_its_traceback(depth: int, error: type) -> None:
    kernel = kernel_of(falls, at=7.0, depth=depth)
    receipts = list(filter(None, run_processes(kernel, BlockPlan(Runs.full(20), 5), 1, never)))
    (failure,) = [receipt.failure for receipt in receipts if receipt.failure is not None]
    assert (failure.kind, failure.positions) == ("function", (7, 8))
    assert isinstance(failure.error, error)
    names = [frame.name for frame in traceback.extract_tb(failure.error.__traceback__)]
    assert names[0] == "falls"
    assert names[-1] == "again"
    assert len(names) == 50


# -- counts: what is sent, and how often -----------------------------------------------------------------------------


class NotesItsTravels:
    """A function that notes, in a file, each time that it is pickled, and where it is loaded."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        self.path = str(path)
        self.ballast = os.urandom(n_bytes)

    def __call__(self, spectrum: NDArray[Any]) -> Any:
        return 2 * spectrum[0]

    def note(self, what: str) -> None:
        with open(self.path, "a", encoding="ascii") as file:
            file.write(f"{what}\n")

    def __getstate__(self) -> dict[str, Any]:
        self.note("pickled")
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.note(str(os.getpid()))


def check_travels(path: Path, receipts: list[Receipt]) -> None:
    """The kernel was pickled once, and loaded once by each process that has done blocks, however many these were."""
    np.testing.assert_array_equal(collect(iter(receipts)), EXPECTED)
    workers = {receipt.worker.split(":")[1] for receipt in receipts}
    assert len(receipts) > 2 * len(workers)
    assert sorted(path.read_text().split()) == sorted(["pickled", *workers])


def times_pickled(path: Path) -> int:
    return path.read_text().split().count("pickled")


@pytest.mark.parametrize("kind", ["serial", "threads", "both", "processes"])
def test_what_showed_that_a_kernel_can_be_sent_is_sent(tmp_path: Path, kind: str) -> None:
    """It is packed once for the check and the run, and not kept in bytes: to ask for them makes them anew."""
    kernel = kernel_of(NotesItsTravels(tmp_path / "travels", 10**6))
    assert can_be_sent(kernel)
    assert can_be_sent(kernel)
    receipts = Scheduler(kind, 2).run(kernel.for_run(None, 1, watched=True), BlockPlan(REMAINING, 20), never, kind)
    np.testing.assert_array_equal(collect(receipts), EXPECTED)
    assert times_pickled(tmp_path / "travels") == 1
    pack_once(kernel)
    assert times_pickled(tmp_path / "travels") == 2


def test_a_worker_process_keeps_no_bytes_of_a_kernel_that_it_has_loaded() -> None:
    kernel = kernel_of(twice)
    packed = Packed(pack(kernel), (None, 1, True))
    loaded = packed.load()
    assert loaded is packed.load()
    assert (loaded.native_threads, loaded.watched) == (1, True)
    assert not packed.bytes


def test_a_thread_that_waits_for_its_turn_begins_nothing_once_the_run_is_over() -> None:
    called, go_on = [], threading.Event()

    def wait(spectrum: NDArray[Any]) -> float:
        called.append(float(spectrum[0]))
        go_on.wait(30)
        return 0.0

    room = Room(rows=1, n_workers=1)
    threads = BlockThreads(kernel_of(wait), 2, room)
    for block in itertools.islice(BlockPlan(REMAINING, 1), 2):
        threads.submit(block)
    deadline = time.monotonic() + 30
    while not called or threads._tasks.qsize():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    threads.close()
    go_on.set()
    for thread in threads._threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(called) == 1


def test_a_kernel_that_cannot_be_loaded_fails_each_block() -> None:
    packed = Packed(b"no pickle", (None, 1, True))
    for _ in range(2):
        failure = run_loaded(packed.load, Block(0, (0,), (3,))).failure
        assert failure is not None
        assert failure.kind == "loading"


def test_processes_that_have_a_kernel_need_not_have_it_kept(tmp_path: Path) -> None:
    kernel = kernel_of(NotesItsTravels(tmp_path / "travels", 10**6))
    receipts = run_processes(kernel, BlockPlan(REMAINING, 5), 1, never)
    while next(receipts) is None:
        pass
    assert times_pickled(tmp_path / "travels") == 1
    pack_once(kernel)
    assert times_pickled(tmp_path / "travels") == 2, "in the middle of the run"
    receipts.close()  # type: ignore[attr-defined]


class DiesOnce(NotesItsTravels):
    """The same, but the first process that comes to position 200 dies."""

    def __call__(self, spectrum: NDArray[Any]) -> Any:
        if spectrum[0] == 200 and not Path(self.path + "-died").exists():
            Path(self.path + "-died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * spectrum[0]


def test_a_kernel_is_packed_again_for_a_process_that_takes_the_place_of_another(tmp_path: Path) -> None:
    kernel = kernel_of(DiesOnce(tmp_path / "travels", 10**6))
    np.testing.assert_array_equal(collect(run_processes(kernel, BlockPlan(REMAINING, 5), 1, never)), EXPECTED)
    assert times_pickled(tmp_path / "travels") == 2


class Sent:
    """Notes what goes through the sockets of this process and which graphs Dask gets; each is sent and run for real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: Counter[str] = Counter()
        self.block_bytes: list[int] = []
        self.graphs: list[int] = []
        for name in ("send", "send_bytes", "recv_bytes"):
            monkeypatch.setattr(Connection, name, self._noting(name, getattr(Connection, name)))
        real = dask.local.get_async

        def get_async(submit: Any, n_workers: int, graph: Any, *args: Any, **kwargs: Any) -> Any:
            self.graphs.append(len(graph))
            return real(submit, n_workers, graph, *args, **kwargs)

        monkeypatch.setattr(dask.local, "get_async", get_async)

    def _noting(self, name: str, real: Any) -> Any:
        def call(connection: Connection, *args: Any) -> Any:
            self.kinds[name if name == "recv_bytes" else type(args[0]).__name__] += 1
            if name == "send" and isinstance(args[0], Block):
                self.block_bytes.append(len(pickle.dumps(args[0])))
            return real(connection, *args)

        return call


@both_ways
def test_a_block_is_one_task_and_one_message_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph_after: float
) -> None:
    """The function goes to each process once, and no graph holds more than eight blocks a worker."""
    plan = BlockPlan(REMAINING, 20)
    n_blocks = plan.count()
    sent = Sent(monkeypatch)
    kernel = kernel_of(NotesItsTravels(tmp_path / "travels", 10**6))
    receipts = [one for one in run_processes(kernel, plan, 2, never, graph_after=graph_after) if one is not None]
    check_travels(tmp_path / "travels", receipts)
    assert len(receipts) == n_blocks
    in_graphs = n_blocks if graph_after == 0 else 0
    assert sum(sent.graphs) == in_graphs
    assert len(sent.graphs) == -(-in_graphs // 16)
    n_started = sent.kinds["bytes"]  # a second process may come when all is done already
    assert len({one.worker for one in receipts}) <= n_started <= 2
    assert sent.kinds == {
        "tuple": n_started,  # of the run
        "bytes": n_started,
        "Block": n_blocks,
        "recv_bytes": 2 * n_started + n_blocks,
    }
    assert max(sent.block_bytes) < 200


@pytest.mark.parametrize("n_bytes", [100, 10**5], ids=["small", "large"])
def test_the_function_goes_to_each_worker_of_a_cluster_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    """A large one is one task of its own, which the workers get it from; a small one is known again when it comes."""
    from distributed import Client, LocalCluster

    tasks: Counter[bool] = Counter()
    real = Client._graph_to_futures

    def graph_to_futures(client: Any, expr: Any, *args: Any, **kwargs: Any) -> Any:
        tasks.update(str(key).startswith("('kernel-") for key in dict(expr.__dask_graph__()))
        return real(client, expr, *args, **kwargs)

    monkeypatch.setattr(Client, "_graph_to_futures", graph_to_futures)
    plan = BlockPlan(REMAINING, 20)
    kernel = kernel_of(NotesItsTravels(tmp_path / "travels", n_bytes))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        scheduler = Scheduler.on_cluster(client)
        receipts = [one for one in scheduler.run(kernel, plan, never, "travels") if one is not None]
    check_travels(tmp_path / "travels", receipts)
    assert tasks == {False: plan.count()} | ({True: 1} if n_bytes > 10**4 else {})


@pytest.mark.parametrize(
    ("kind", "one", "two"),
    [
        ("threads", "1 thread", "2 threads"),
        ("processes", "1 process", "2 processes"),
        ("client", "Dask cluster, 1 thread", "Dask cluster, 2 threads"),
    ],
)
def test_a_scheduler_counts_in_words(kind, one, two):
    assert [str(Scheduler(kind, n)) for n in (1, 2)] == [one, two]


def test_a_file_in_the_folder_of_an_installation_but_not_in_its_libraries_travels(tmp_path, monkeypatch):
    """As a script below /usr/local, where Python is installed there: workers elsewhere cannot import it."""
    paths = sysconfig.get_paths() | {"data": str(tmp_path), "scripts": str(tmp_path / "bin")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    (tmp_path / "work.py").write_text("def twice(row):\n    return 2 * row\n")
    spec = importlib.util.spec_from_file_location("lazyproc_file_work", tmp_path / "work.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    packed = pack(Kernel(module.twice, False, (), {}, (), NumberSource(), None))
    monkeypatch.delitem(sys.modules, spec.name)
    assert unpack(packed).function(3) == 6
