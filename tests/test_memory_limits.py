"""A function that needs more memory than the probe saw is noticed, and blocks shrink before the limit is broken."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from usid_files import make_usid_file

import lazyproc
from lazyproc.core.blocks import Block, BlockPlan
from lazyproc.core.events import BlockDone, Committed, Started
from lazyproc.core.feed import BlockFeed
from lazyproc.core.highwater import HighWater, can_measure, peak_of
from lazyproc.core.learn import MemoryLearner, Room
from lazyproc.core.memory import DRIVER_BYTES, MEBIBYTE, WORKER_BYTES, MemoryModel
from lazyproc.core.runs import Runs
from lazyproc.core.sizing import Division
from lazyproc.core.specs import Output
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.kernel import Kernel
from lazyproc.run.loop import Committer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from hungry import HUNGRY, make_file  # noqa: E402
from private_memory import Sampler  # noqa: E402

measures = pytest.mark.skipif(not can_measure(), reason="this system keeps no high-water mark that can be reset")


@measures
def test_loading_the_package_leaves_the_mark_of_the_process_alone():
    code = (
        "import numpy\n"
        "numpy.ones(200 * 2**17)\n"
        "import lazyproc; lazyproc.Process\n"
        "from lazyproc.core.highwater import read\n"
        "print(read()[0] // 2**20)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(told) > 190


# -- what is learnt ----------------------------------------------------------------------------------------------------


def learner_of(vectorized: bool, limit_mib: int = 64, n_workers: int = 2, **options: Any) -> MemoryLearner:
    model = MemoryModel(2048, 4)
    rows = model.careful_rows(limit_mib * MEBIBYTE, n_workers)
    return MemoryLearner(model, limit_mib * MEBIBYTE, n_workers, rows, vectorized=vectorized, **options)


@settings(deadline=None)
@given(
    vectorized=st.booleans(),
    each=st.integers(2052, 200_000),
    fixed=st.integers(0, 12 * MEBIBYTE),
    n_workers=st.integers(1, 3),
)
def test_blocks_come_to_fit_whatever_they_really_take(vectorized, each, fixed, n_workers):
    """Within a few blocks, and they are not made smaller for ever."""
    if not vectorized:
        each = 2052  # source and results: what else such a function takes does not go with the size of the block
    learner = learner_of(vectorized, 128, n_workers)
    sizes = []
    for _ in range(40):
        n = learner.careful_rows
        sizes.append(n)
        taken = fixed + n * each + 2 * MEBIBYTE
        learner.note(n, taken)
        assert learner.projected >= DRIVER_BYTES + taken
        assert 1 <= learner.careful_rows <= learner.rows
        assert 1 <= learner.n_workers <= n_workers
    assert learner.n_workers * (fixed + learner.careful_rows * each) + DRIVER_BYTES <= 128 * MEBIBYTE
    assert len(set(sizes[20:])) == 1, sizes
    if not fixed:
        assert learner.n_workers == n_workers


@given(taken=st.integers(0, 2**40), n=st.integers(1, 10**6), vectorized=st.booleans(), together=st.booleans())
def test_less_than_reckoned_or_nothing_teaches_nothing(taken, n, vectorized, together):
    learner = learner_of(vectorized, together=together)
    before = learner.model, learner.rows, learner.n_workers
    learnt = learner.note(n, min(taken, WORKER_BYTES + n * 2052), taken)
    assert not learnt
    assert (learner.model, learner.rows, learner.n_workers) == before


def test_what_was_learnt_is_forgotten_by_half_if_it_was_but_once():
    learner = learner_of(True)
    before = learner.careful_rows
    assert learner.note(before, WORKER_BYTES + 10 * before * 2052)
    least = learner.careful_rows
    assert least < before / 3
    for _ in range(200):
        learner.note(learner.careful_rows, learner.careful_rows * 2052)
    assert least < learner.careful_rows <= before


@given(kept=st.integers(0, 24))
def test_what_an_allocator_keeps_of_larger_blocks_makes_no_blocks_of_one_position(kept):
    learner = learner_of(True)
    learner.note(learner.careful_rows, (kept + 4) * MEBIBYTE)
    for _ in range(300):
        learner.note(learner.careful_rows, kept * MEBIBYTE + 12_000 * learner.careful_rows)
    assert learner.careful_rows > 20
    assert learner.n_workers == 2 or kept > 18


def test_what_the_driver_keeps_is_not_blamed_on_blocks():
    """Its books are in its process, and so in what is measured of blocks there."""
    books = 30 * MEBIBYTE
    model = MemoryModel(2048, 4, driver_bytes=books)
    learner = MemoryLearner(model, 64 * MEBIBYTE, 1, 100, vectorized=True, together=True)
    before = learner.careful_rows
    assert learner.projected >= DRIVER_BYTES + books
    taken = DRIVER_BYTES + books + 2 * MEBIBYTE
    assert not learner.note(100, taken, taken)
    assert learner.too_much(1, taken) is None
    assert learner.by_block(taken) < taken - books + 1
    assert (learner.model, learner.careful_rows) == (model, before)
    assert learner.ahead <= 64 * MEBIBYTE


def test_fewer_workers_and_then_an_error_if_one_position_does_not_fit():
    learner = learner_of(False, 64, 4)
    assert learner.note(10, 30 * MEBIBYTE)
    assert learner.n_workers == 1
    assert learner.too_much(10, 30 * MEBIBYTE) is None
    learner.note(10, 100 * MEBIBYTE)
    assert learner.too_much(10, 100 * MEBIBYTE) is None, "once may be somebody else"
    needed = learner.too_much(10, 100 * MEBIBYTE)
    assert needed is not None
    assert 108 < needed < 130


@given(
    spans=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 500)), min_size=1, max_size=6),
    most=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    every=st.integers(1, 5),
    ahead=st.integers(0, 4),
)
def test_blocks_are_cut_to_what_memory_allows_and_none_is_lost(spans, most, every, ahead):
    remaining = Runs.from_spans((start, start + length) for start, length in spans)
    division = Division(10**9, 2, 7, 1, 2**60, 10.0)
    feed = BlockFeed(division.plan(remaining, 1e-3), 1e-3, lambda rest, _: BlockPlan(rest, 10**6), 2)
    covered, numbers, under_way, now, count = [], [], deque(), 10**9, 0
    while (block := next(feed, None)) is not None or under_way:
        if block is not None:
            assert block.n_positions <= now
            numbers.append(block.index)
            under_way.append(block)
        if block is None or len(under_way) > ahead:
            one = under_way.popleft()
            if one.n_positions > 2 and one.index % 3 == 0:
                one, rest = one.split(one.n_positions // 2)
                feed.give_back(rest)
            covered += [p for start, stop in one.runs() for p in range(start, stop)]
            count += 1
            if count % every == 0:
                now = most[count // every % len(most)]
                feed.resize(now)
    assert sorted(covered) == remaining.positions().tolist()
    assert numbers == list(range(len(numbers)))


@given(
    rows=st.integers(1, 10**5),
    careful=st.integers(1, 10**5),
    align=st.sampled_from([1, 64, 1000]),
    bytes_per_position=st.integers(1, 10**7),
    seconds=st.none() | st.floats(1e-6, 1),
)
def test_no_block_is_larger_than_memory_allows(rows, careful, align, bytes_per_position, seconds):
    """And no larger than it should be, but for one storage chunk that fits."""
    division = Division(10**9, 2, align, bytes_per_position, 2**25, 10.0).within(rows, careful)
    size = division.plan(Runs.full(10**6), seconds).max_positions
    assert size <= division.largest <= rows
    assert division.largest <= max(careful, 2**25 // bytes_per_position, align)
    assert division.largest <= careful or division.largest == align


@given(
    spans=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    places=st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
def test_a_block_that_was_split_is_joined_again(spans, places):
    starts, stops, position = [], [], 0
    for gap, length in spans:
        starts.append(position + gap)
        position = starts[-1] + length
        stops.append(position)
    block = Block(3, tuple(starts), tuple(stops), 1.5)
    for place in places:
        if block.n_positions > 1:
            first, rest = block.split(1 + int(place * (block.n_positions - 2)))
            assert first.join(rest) == block
    assert block.join(None) is block


# -- what is measured --------------------------------------------------------------------------------------------------

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def take(mib: int) -> None:
    address = libc.malloc(mib * MEBIBYTE)
    libc.memset(address, 1, mib * MEBIBYTE)
    libc.free(address)


@measures
def test_native_memory_is_seen_and_forgotten_again():
    """In a process of its own: threads that other tests have left take memory, too, and give it back."""
    code = "from test_memory_limits import check_what_is_seen; check_what_is_seen()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def check_what_is_seen() -> None:
    water = HighWater()
    water.forget()
    for mib in (50, 5, 80):
        with water.watch(10) as taken:
            take(mib)
        assert mib - 2 < taken.peak / MEBIBYTE < mib + 5
        assert taken.whole == taken.peak
    with peak_of() as found:
        take(60)
    assert 58 < found[0] / MEBIBYTE < 65


def module_in(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)


@measures
def test_what_is_kept_counts_though_a_module_was_imported_with_it(tmp_path, monkeypatch):
    """In the block that imports the module, and in all later ones."""
    monkeypatch.syspath_prepend(tmp_path)
    module_in(tmp_path, "kept_in_module", "table = bytearray(b'1') * 40 * 2**20")
    water = HighWater()
    water.forget()
    with water.watch(10) as taken:
        import kept_in_module
    with water.watch(10) as later:
        pass
    assert 36 < taken.peak / MEBIBYTE < 90
    assert 36 < later.peak / MEBIBYTE < 45
    assert 36 < water.kept() / MEBIBYTE < 45
    del kept_in_module.table, sys.modules["kept_in_module"]


@measures
def test_modules_of_usual_size_are_not_blamed_on_blocks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"usual_module_{number}" for number in range(200)]
    for name in names:
        module_in(tmp_path, name, "code = bytearray(b'1') * 60 * 2**10")
    water = HighWater()
    water.forget()
    with water.watch(10) as taken:
        for name in names:
            __import__(name)
    with water.watch(10) as later:
        pass
    assert taken.peak < 2 * MEBIBYTE
    assert later.peak < 2 * MEBIBYTE
    with water.watch(10) as other:
        take(30)
    assert 28 < other.peak / MEBIBYTE < 35
    for name in names:
        del sys.modules[name]


@measures
def test_blocks_in_threads_share_what_the_process_takes():
    """By their positions while both are under way; what one takes alone is its own."""
    water = HighWater()
    water.forget()
    inside, over = threading.Event(), threading.Event()
    found = []

    def other() -> None:
        with water.watch(30) as taken:
            inside.set()
            assert over.wait(60)
        found.append(taken)

    thread = threading.Thread(target=other)
    with water.watch(10) as mine:
        thread.start()
        assert inside.wait(60)
        take(80)
    over.set()
    thread.join(60)
    assert 18 < mine.peak / MEBIBYTE < 25
    assert 58 < found[0].peak / MEBIBYTE < 68
    assert found[0].whole / MEBIBYTE < 90


def test_without_a_high_water_mark_nothing_is_known(monkeypatch):
    monkeypatch.setattr("lazyproc.core.highwater._CLEAR", "/nonexistent/clear_refs")
    assert not can_measure()
    water = HighWater()
    water.forget()
    with water.watch(1) as taken:
        take(10)
    assert taken.peak == taken.whole == 0


# -- engines -----------------------------------------------------------------------------------------------------------


class NumberSource:
    """Positions whose values are their own numbers."""

    travels = True
    read_seconds = 0.0

    def rows(self, runs: Any) -> Any:
        return np.concatenate([np.arange(start, stop, dtype=float) for start, stop in runs]).reshape(-1, 1)


def same(block: Any) -> Any:
    return block[:, 0]


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_blocks_that_are_cut_already_are_made_smaller_and_fewer_at_once(kind):
    kernel = Kernel(same, True, (), {}, (Output("f8").resolve("Out", 1),), NumberSource(), None)
    feed = BlockFeed(BlockPlan(Runs.full(2000), 50), None, lambda rest, _: BlockPlan(rest, 50), 2)
    room = Room(50, 2)
    found = np.full(2000, np.nan)
    sizes, workers = [], []
    for receipt in Scheduler(kind, 2).run(kernel, feed, lambda: False, "small", room=room):
        if receipt is not None:
            assert receipt.failure is None
            rows = slice(receipt.block.start, receipt.block.stop)
            assert np.isnan(found[rows]).all(), "no position twice"
            found[rows] = receipt.arrays[0][:, 0]
            sizes.append(receipt.block.n_positions)
            workers.append(receipt.worker)
            room.rows, room.n_workers = 20, 1
            feed.note(receipt.block.n_positions, receipt.seconds, receipt.rest)
    np.testing.assert_array_equal(found, np.arange(2000))
    assert sum(size > 20 for size in sizes) <= 6, "those under way, or waiting for the driver, when it was told"
    if kind == "processes":
        assert min(workers.count(one) for one in set(workers)) <= 6, "likewise"


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hungry")

    def made(name: str) -> str:
        path = str(folder / f"{name}.h5")
        make_file(path, HUNGRY[name])
        return path

    return made


def run(name: str, path: str, engine: str, limit: int) -> tuple[float, dict[str, Any]]:
    program = str(BENCHMARKS / "hungry.py")
    if HUNGRY[name].is_half_done:
        subprocess.run([sys.executable, program, name, path, "half-done", "0"], check=True)
    bare = Sampler([program, name, path, f"baseline-{engine}", "0"]).baseline()
    taken, answer = Sampler([program, name, path, engine, str(limit)]).peak(bare)
    measured = taken / MEBIBYTE
    print(f"{name}, {engine}: measured {measured:.0f}, projected {answer['projected'] / MEBIBYTE:.0f}, allowed {limit}")
    print(*answer["told"], sep="\n")
    return measured, answer


@measures
@pytest.mark.parametrize("engine", ["serial", "both", "threads", "processes"])
def test_five_times_what_the_probe_saw_does_not_break_the_limit(scan, engine):
    """From the C library, and not for the positions that the probe tries."""
    path = scan("later-native")
    measured, answer = run("later-native", path, engine, 64)
    assert answer["error"] is None
    assert answer["is_done"]
    assert measured <= 64
    assert measured <= answer["projected"] / MEBIBYTE
    assert answer["projected"] <= 64 * MEBIBYTE
    sizes = answer["sizes"]
    assert sum(sizes) == HUNGRY["later-native"].n_positions, "each position once"
    assert np.median(sizes[len(sizes) // 2 :]) < max(sizes[: len(sizes) // 2]) / 2, sizes
    assert any("were reckoned" in text for text in answer["told"])
    with h5py.File(path, "r") as file:
        for start in range(0, HUNGRY["later-native"].n_positions, 20_000):
            rows = slice(start, start + 1000)
            np.testing.assert_allclose(
                file[answer["group"]]["Out"][rows, 0], file["Raw_Data"][rows].mean(axis=1), atol=1e-6
            )


@measures
def test_fewer_are_computed_at_once_if_one_position_takes_more_than_its_share(scan):
    """Two have taken so much at the same time until that was known: what is projected then says that it was too much.

    From then on it is not.
    """
    measured, answer = run("big-one", scan("big-one"), "processes", 64)
    assert answer["error"] is None
    assert answer["is_done"]
    assert measured <= answer["projected"] / MEBIBYTE
    assert answer["ahead"] <= 64 * MEBIBYTE < answer["projected"]
    assert sum(answer["sizes"]) == 200
    assert any("1 at a time" in text for text in answer["told"])


@measures
@pytest.mark.parametrize(
    ("name", "engine", "limit"),
    [
        ("keeps", "serial", 64),
        ("keeps", "processes", 64),
        ("holes", "serial", 64),
        ("narrow", "serial", 64),
        ("table", "serial", 64),
        ("table", "threads", 64),
        ("table", "processes", 128),
        ("table-one", "both", 128),
        ("coarse", "serial", 64),
        ("coarse", "processes", 128),
    ],
)
def test_what_function_and_driver_keep_is_projected(scan, name, engine, limit):
    """A table that comes with a module, in each process; 500,000 holes; ten million positions; large parameters.

    And storage chunks of 8 MiB that HDF5 decodes.
    """
    measured, answer = run(name, scan(name), engine, limit)
    assert answer["error"] is None
    assert answer["is_done"]
    assert measured <= answer["projected"] / MEBIBYTE
    assert answer["projected"] <= limit * MEBIBYTE


def table_of(process: lazyproc.Process, **options: Any) -> int:
    return process.plan(**options).projected_bytes


def test_arguments_count_for_the_plan_and_too_large_ones_are_named(tmp_path):
    """Whether they are parameters, which are stored, or arguments of compute; the file is as it was."""
    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=5, n_cols=4)
    table = np.ones(2**20)
    before = Path(path).read_bytes()
    body = {"outputs": {"Out": Output("f8")}, "_map_function": staticmethod(lambda spectrum, table=None: spectrum[0])}
    work = type("Work", (lazyproc.Process,), body)
    with work(f"{path}::{name}", cores=1, max_mem_mb=64) as process:
        little = table_of(process)
        assert table_of(process, table=table) - little == pytest.approx(2 * table.nbytes, rel=0.01)
        assert table_of(process, table=[table, {"b": table}]) - little == pytest.approx(4 * table.nbytes, rel=0.01)
        with pytest.raises(
            lazyproc.MemoryLimitError, match=r"driver 9\d\.\d MiB .*arguments.* Raise max_mem_mb to 1\d\d"
        ):
            process.compute(table=np.ones(6 * 2**20))
    with work(f"{path}::{name}", parms_dict={"table": table}, cores=1, max_mem_mb=64) as process:
        assert table_of(process) - little == pytest.approx(2 * table.nbytes, rel=0.01)
    assert Path(path).read_bytes() == before


def doubled(block: Any) -> Any:
    return 2 * block[:, 0]


@pytest.mark.parametrize("cores", [1, 2])
def test_results_with_many_holes_are_resumed_part_by_part_and_nothing_is_computed_twice(tmp_path, monkeypatch, cores):
    """So that what describes the holes stays small; the constants are made smaller here, as the holes are fewer."""
    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=20, n_cols=20)
    work = {"process_name": "Doubled", "vectorized": True, "cores": cores}
    group = lazyproc.map_positions(doubled, f"{path}::{name}", {"Out": lazyproc.Output("f8")}, **work)
    with h5py.File(path, "r+") as file:
        group_name = next(key for key in file[name].parent if "Doubled" in key)
        group = file[name].parent[group_name]
        group["completed_positions"][10:390:2] = 0
        group["Out"][10:390:2] = -1
    monkeypatch.setattr("lazyproc.run.perform._MOST_RUNS", 20)
    monkeypatch.setattr("lazyproc.core.runs._PART", 16)
    monkeypatch.setattr("lazyproc.run.loop._MANY_SPANS", 5)
    events: list[Any] = []
    cls = type(
        "Doubled",
        (lazyproc.Process,),
        {"outputs": {"Out": lazyproc.Output("f8")}, "_block_function": staticmethod(doubled)},
    )
    with cls(f"{path}::{name}", cores=cores) as process:
        process._progress = events.append
        process.compute()
    n_done = [event.n_done for event in events if isinstance(event, Committed)]
    assert sum(event.n_positions for event in events if isinstance(event, BlockDone)) == 190
    assert sum(isinstance(event, Started) for event in events) > 5
    assert n_done == sorted(set(n_done))
    assert n_done[0] > 210
    assert n_done[-1] == 400
    with h5py.File(path, "r") as file:
        group = file[name].parent[group_name]
        assert group["completed_positions"][()].all()
        assert len([key for key in file[name].parent if "Doubled" in key]) == 1
        np.testing.assert_array_equal(group["Out"][:, 0], 2 * file[name][:, 0].astype("f8"))


class Counting:
    """A target that keeps nothing but how many spans come at a time."""

    sink = None

    def __init__(self) -> None:
        self.n_spans: list[int] = []

    def commit(self, done: Runs) -> None:
        self.n_spans.append(len(done))


def test_many_holes_are_committed_before_they_take_much_memory(monkeypatch):
    """However long the interval is; and blocks without holes between them are not."""
    monkeypatch.setattr("lazyproc.run.loop._MANY_SPANS", 5000)
    target = Counting()
    committer = Committer(target, 1e9, 0, lambda event: None)
    for start in range(0, 100_000, 100):
        committer.take_positions([(position, position + 1) for position in range(start, start + 100, 2)])
        committer.commit_if_due()
    committer.commit()
    assert sum(target.n_spans) == 50_000
    assert max(target.n_spans) < 6000
    target.n_spans.clear()
    for start in range(100_000, 200_000):
        committer.take_positions([(start, start + 1)])
        committer.commit_if_due()
    assert not target.n_spans


@measures
def test_a_table_that_does_not_fit_is_noticed_before_anything_is_created(scan):
    path = scan("keeps-much")
    _, answer = run("keeps-much", path, "serial", 64)
    assert answer["error"].startswith("MemoryLimitError: max_mem_mb: 64 MiB are allowed")
    assert 200 < int(answer["error"].rpartition("Raise max_mem_mb to ")[2].split()[0]) < 240
    with h5py.File(path, "r") as file:
        assert not [key for key in file if "-" in key]


@measures
@pytest.mark.parametrize("engine", ["serial", "processes"])
def test_one_position_that_does_not_fit_ends_the_run_with_its_number_and_what_to_do(scan, engine):
    path = scan("huge-one")
    with h5py.File(path, "r+") as file:
        for group in [key for key in file if "-" in key]:
            del file[group]
    _, answer = run("huge-one", path, engine, 64)
    error = answer["error"]
    assert error.startswith("MemoryLimitError: max_mem_mb: 64 MiB are allowed")
    assert "at positions " in error
    assert 100 < int(error.rpartition("Raise max_mem_mb to ")[2].split()[0]) < 160
    with h5py.File(path, "r") as file:
        (group,) = [file[key] for key in file if "-" in key]
        done = group["completed_positions"][()].astype(bool)
        assert 5 < done.sum() < 200
        np.testing.assert_array_equal(group["Out"][()][done, 0], file["Raw_Data"][()][done, 0])
