"""Uneven work keeps all workers busy to the end, and many blocks cost no more, each, than few: counts, no seconds."""

from __future__ import annotations

import gc
import heapq
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from usid_files import make_usid_file

import lazyproc
from lazyproc.core.apply import compute_rows
from lazyproc.core.blocks import Block, BlockPlan
from lazyproc.core.events import BlockDone
from lazyproc.core.feed import BlockFeed
from lazyproc.core.measure import run_probe
from lazyproc.core.runs import Runs
from lazyproc.core.sizing import Division
from lazyproc.core.specs import Output
from lazyproc.drain import Drain
from lazyproc.engine.choose import Scheduler
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.native import limits
from lazyproc.engine.receipt import Receipt
from lazyproc.hdf5.handle_target import HandleTarget
from lazyproc.run.loop import Committer, run_loop

AMPLE = Division(
    memory_rows=10**9, n_workers=8, align=1, bytes_per_position=1, preferred_bytes=2**60, interval=10.0
)  # nothing limits but time


# --- the end of uneven work, reckoned ---------------------------------------------------------------------------------


def end_of(blocks: Iterator[Block], seconds: NDArray[Any], n_workers: int, feed: BlockFeed | None = None) -> float:
    """Return when the last worker ends, if whoever is free takes the next block; and tell the feed as blocks end."""
    done_at = np.concatenate([[0.0], np.cumsum(seconds)])
    busy: list[Any] = [(0.0, number, None) for number in range(n_workers)]
    free: list[Any] = []
    now = 0.0
    while busy or free:
        while free and (block := next(blocks, None)) is not None:
            n = block.n_positions
            if block.limit is not None:
                in_time = int(np.searchsorted(done_at, done_at[block.start] + block.limit)) - block.start
                n = min(n, max(1, in_time))
            first, rest = block.split(n) if n < block.n_positions else (block, None)
            took = done_at[first.stop] - done_at[first.start]
            heapq.heappush(busy, (now + took, free.pop(), (n, took, rest)))
        if not busy:
            break
        now, worker, done = heapq.heappop(busy)
        free.append(worker)
        if feed is not None and done is not None:
            feed.note(*done)
    return now


def smooth_costs(seed: int, n_rows: int = 120, n_cols: int = 120) -> NDArray[Any]:
    """Return relative costs between 1 and 100, alike where positions lie close together, in the order of the scan."""
    random = np.random.default_rng(seed)
    rows, cols = np.mgrid[:n_rows, :n_cols] / n_rows
    hills = sum(
        random.uniform(-1, 1) * np.exp(-((rows - random.random()) ** 2 + (cols - random.random()) ** 2) / 0.02)
        for _ in range(40)
    )
    ranks = np.asarray(hills).ravel().argsort().argsort() / hills.size
    return 100.0**ranks


@pytest.mark.parametrize("wrong", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(5))
def test_workers_end_together_however_uneven_the_work_is(seed: int, wrong: float) -> None:
    """Even if the probe was wrong by a factor of five; equal shares take about twice as long."""
    seconds = smooth_costs(seed)
    seconds *= 60 * AMPLE.n_workers / seconds.sum()  # a minute of work for each
    everything = Runs.full(seconds.size)
    guess = wrong * seconds.mean()
    plan = AMPLE.plan(everything, guess)
    feed = BlockFeed(plan, guess, AMPLE.plan, AMPLE.n_workers)
    found = end_of(feed, seconds, AMPLE.n_workers, feed)
    static = end_of(iter(BlockPlan(everything, -(-seconds.size // AMPLE.n_workers))), seconds, AMPLE.n_workers)
    assert found < 1.02 * 60, f"seed {seed}: {found:.1f} s"
    assert static > 1.3 * 60, f"seed {seed}: {static:.1f} s, so these costs are not uneven"


@pytest.mark.parametrize("region", [(0, 300), (7000, 7300), (14000, 14300), (14100, 14400)])
def test_a_region_that_costs_a_hundred_times_as_much_is_shared_out(region: tuple[int, int]) -> None:
    """The probe has seen nothing of it; whoever meets it gives back what it has not begun."""
    seconds = np.ones(120 * 120)
    seconds[slice(*region)] = 100.0
    seconds *= 60 * AMPLE.n_workers / seconds.sum()
    feed = feed_of(Runs.full(seconds.size), seconds.min())
    found = end_of(feed, seconds, AMPLE.n_workers, feed)
    assert found < 1.05 * 60, f"{found:.1f} s"


# --- dividing anew ----------------------------------------------------------------------------------------------------


def feed_of(remaining: Runs, guess: float | None, division: Division = AMPLE) -> BlockFeed:
    return BlockFeed(division.plan(remaining, guess), guess, division.plan, division.n_workers)


@settings(deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 500)), max_size=6),
    guess=st.none() | st.floats(1e-3, 10),
    took=st.lists(st.floats(1e-4, 100), min_size=1, max_size=8),
    align=st.sampled_from([1, 7, 64]),
    ahead=st.integers(0, 6),
)
def test_blocks_stay_disjoint_and_complete_whatever_they_take(spans, guess, took, align, ahead):
    """However often the rest is divided anew or given back, also after the last block was taken."""
    remaining = Runs.from_spans((start, start + length) for start, length in spans)
    feed = feed_of(remaining, guess, Division(10**9, 3, align, 1, 2**60, 10.0))
    numbers, covered, under_way = [], [], deque()
    while (block := next(feed, None)) is not None or under_way:
        if block is not None:
            numbers.append(block.index)
            under_way.append(block)
        if block is None or len(under_way) > ahead:
            one, rest = under_way.popleft(), None
            seconds = took[one.index // 20 % len(took)]
            if one.limit is not None and one.n_positions > 1 and seconds * one.n_positions > one.limit:
                one, rest = one.split(max(1, min(one.n_positions - 1, int(one.limit / seconds))))
            covered += [p for start, stop in one.runs() for p in range(start, stop)]
            feed.note(one.n_positions, one.n_positions * seconds, rest)
    assert numbers == list(range(len(numbers)))
    assert sorted(covered) == remaining.positions().tolist()


# positions take so many times longer than was guessed, with so many workers -> blocks change
WRONG = [(10.0, 8, True), (0.1, 8, False), (0.001, 8, True), (0.1, 500, True)]


@pytest.mark.parametrize(("wrong", "n_workers", "changes"), WRONG)
def test_blocks_are_divided_anew_once_it_is_known_how_long_they_take(wrong: float, n_workers: int, changes: bool):
    """Smaller ones if that is longer; larger ones only if all workers could not be given new ones in time."""
    division = Division(10**9, n_workers, 1, 1, 2**60, 10.0)
    usual = max(1.0, 4 * n_workers * 0.001)
    feed = feed_of(Runs.full(10**9), 0.01, division)
    sizes = []
    for block, _ in zip(feed, range(4 * n_workers), strict=False):
        sizes.append(block.n_positions)
        feed.note(block.n_positions, wrong * 0.01 * block.n_positions)
    assert sizes[0] == pytest.approx(usual / 0.01, abs=1)
    assert sizes[-1] == pytest.approx(usual / 0.01 / (wrong if changes else 1), rel=0.01)
    assert sizes[: 2 * n_workers] == sizes[:1] * 2 * n_workers, "until two blocks a worker have come back"
    assert sizes[2 * n_workers :] == sizes[-1:] * 2 * n_workers


def test_a_guess_that_is_about_right_stays():
    plan = AMPLE.plan(Runs.full(10**5), 0.01)
    feed = feed_of(Runs.full(10**5), 0.01)
    blocks = []
    for block in feed:
        blocks.append(block)
        feed.note(block.n_positions, 0.012 * block.n_positions)
    assert [replace(block, limit=None) for block in blocks] == list(plan)


def slow_in_the_middle(row: NDArray[Any]) -> Any:
    time.sleep(0.02 if 400 <= row[0] < 480 else 0)
    return row[0]


@pytest.mark.parametrize("kind", ["threads", "processes", "client"])
def test_a_worker_gives_back_what_it_has_not_begun_of_a_long_block(kind: str) -> None:
    """Every position is still computed once; and the part that takes long comes back in many small blocks."""
    kernel = replace(kernel_of(slow_in_the_middle), vectorized=False)
    feed = feed_of(Runs.full(1000), 1e-5, Division(10**9, 2, 1, 1, 2**60, 10.0))
    found = np.full(1000, np.nan)
    sizes = []
    with make_scheduler(kind) as scheduler:
        for receipt in scheduler.run(kernel, feed, lambda: False, "long"):
            if receipt is None:
                continue
            assert receipt.failure is None
            assert receipt.arrays is not None
            assert len(receipt.arrays[0]) == receipt.block.n_positions
            rows = slice(receipt.block.start, receipt.block.stop)
            assert np.isnan(found[rows]).all(), "no position twice"
            found[rows] = receipt.arrays[0][:, 0]
            if receipt.block.stop > 400 and receipt.block.start < 480:
                sizes.append(receipt.block.n_positions)
            feed.note(receipt.block.n_positions, receipt.seconds, receipt.rest)
    np.testing.assert_array_equal(found, np.arange(1000))
    assert len(sizes) > 4, f"blocks of 125, if none was divided: {sizes}"


def test_a_deadline_ends_a_block_of_one_position_at_a_time_only() -> None:
    """At a sixteenth of the block, at the latest; never before anything is done."""
    data = np.arange(64.0).reshape(-1, 1)
    outputs = (Output("f8").resolve("Out", 1),)
    past = time.perf_counter() - 1
    (some,) = compute_rows(lambda row: row[0], data, outputs, vectorized=False, deadline=past)
    np.testing.assert_array_equal(some, data[:4])
    (one,) = compute_rows(lambda row: row[0], data[:8], outputs, vectorized=False, deadline=past)
    np.testing.assert_array_equal(one, data[:1])
    (every,) = compute_rows(lambda row: row[0], data, outputs, vectorized=False, deadline=past + 1000)
    np.testing.assert_array_equal(every, data)
    (block,) = compute_rows(lambda block: block[:, 0], data, outputs, vectorized=True, deadline=past)
    np.testing.assert_array_equal(block, data)


class Slower(lazyproc.Process):
    """Takes eight times as long in a block as when it is only tried."""

    outputs = {"Out": Output("f4")}

    @staticmethod
    def _map_function(spectrum: NDArray[Any]) -> Any:
        from distributed import get_worker

        tried = str(get_worker().get_current_task()).startswith("try-")
        time.sleep(0.001 if tried else 0.008)
        return spectrum[0]


def test_a_run_notices_that_positions_take_longer_than_the_probe_said(tmp_path: Path) -> None:
    path, name = make_usid_file(tmp_path / "a.h5", n_rows=20, n_cols=40, n_spectral=2)
    sizes: list[int] = []
    with make_scheduler("client") as scheduler:
        with Slower(f"{path}::{name}", client=scheduler.client, checkpoint_interval=0.2) as process:
            process._progress = lambda event: sizes.append(event.n_positions) if isinstance(event, BlockDone) else None
            group = process.compute()
            assert group["completed_positions"][:].all()
            np.testing.assert_array_equal(group["Out"][:, 0], process.h5_main[:, 0])
    assert max(sizes[-8:]) <= max(sizes) // 2, sizes


class make_scheduler:
    """A scheduler with two workers, and its cluster if it needs one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.cluster: Any = None

    def __enter__(self) -> Scheduler:
        if self.kind != "client":
            return Scheduler(self.kind, 2)
        from distributed import Client, LocalCluster

        self.cluster = LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0")
        self.client = Client(self.cluster, set_as_default=False)
        return Scheduler.on_cluster(self.client)

    def __exit__(self, *exception: object) -> None:
        if self.cluster is not None:
            self.client.close()
            self.cluster.close()


# --- many blocks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NumberSource:
    """Positions whose values are their own numbers."""

    travels = True
    read_seconds = 0.0

    def rows(self, runs: Any) -> NDArray[Any]:
        return np.concatenate([np.arange(start, stop, dtype=float) for start, stop in runs]).reshape(-1, 1)


def same_block(block: NDArray[Any]) -> Any:
    return block[:, 0]


def kernel_of(function: Any = same_block) -> Kernel:
    return Kernel(function, True, (), {}, (Output("f8").resolve("Out", 1),), NumberSource(), None)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[tuple[HandleTarget, h5py.File]]:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("Out", (200_000, 1), "f8")
        file.create_dataset("completed_positions", (200_000,), "u1")
        yield HandleTarget(file, ["Out"], "completed_positions"), file


def test_neighbours_that_wait_for_their_commit_are_one_span(target):
    """However long the interval is, and though blocks do not end in the order in which they began."""
    target, file = target
    committer = Committer(target, 3600.0, 0, lambda event: None)
    random = np.random.default_rng(0)
    kept = []
    for first in range(0, 100_000, 20):
        for start in random.permutation(np.arange(first, first + 20, 2)):
            committer.take(Receipt(Block(0, (int(start),), (int(start) + 2,))))
            kept.append(len(committer._spans))
    assert max(kept) < 1100, f"of {len(kept)} blocks"
    committer.commit()
    assert file["completed_positions"][:100_000].all()
    assert committer.n_done == 100_000


@pytest.mark.parametrize("kind", ["serial", "threads", "processes"])
def test_nothing_grows_with_the_number_of_blocks(target, kind: str) -> None:
    """As many objects are alive after many blocks as after few: none is kept of those that are done."""
    target, file = target
    n_blocks = 4_000
    alive: dict[int, int] = {}
    done = 0

    def listen(event: Any) -> None:
        nonlocal done
        if isinstance(event, BlockDone):
            done += 1
            if done in (n_blocks // 4, n_blocks // 2, n_blocks):
                gc.collect()
                alive[done] = len(gc.get_objects())

    remaining = Runs.full(2 * n_blocks)
    feed = BlockFeed(BlockPlan(remaining, 2), None, lambda rest, seconds: BlockPlan(rest, 2), 2)
    committer = Committer(target, 1.0, 0, listen)
    receipts = Scheduler(kind, 2).run(kernel_of(), feed, lambda: False, "many")
    outcome = run_loop(receipts, committer, Drain("stopped"))
    assert outcome.n_blocks == n_blocks
    few, _, many = alive.values()
    # Fewer is fine: something of the start was let go. A graph of Dask's local scheduler is some hundred objects.
    assert many - few < (100 if kind != "processes" else 3000), (kind, alive)
    np.testing.assert_array_equal(file["Out"][: 2 * n_blocks, 0], np.arange(2 * n_blocks))


def test_a_client_holds_the_window_only_and_begins_blocks_in_order():
    """Six blocks for two threads, however many there are; a late block never runs before one of an earlier graph."""
    held, order = [], []
    with make_scheduler("client") as scheduler:
        plan = BlockPlan(Runs.full(600), 2)
        for receipt in scheduler.run(kernel_of(), plan, lambda: False, "many"):
            if receipt is not None:
                assert receipt.failure is None
                deadline = time.monotonic() + 5  # the client's own thread forgets those that were taken, a little later
                while len(scheduler.client.futures) > 6 and time.monotonic() < deadline:
                    time.sleep(0.001)
                held.append(len(scheduler.client.futures))
                order.append(receipt.block.index)
    assert sorted(order) == list(range(300))
    assert max(held) <= 6
    assert max(abs(place - index) for place, index in enumerate(order)) <= 2 * 6


# --- what is paid once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorized", [False, True])
def test_positions_that_take_long_are_probed_a_few_times_only(vectorized: bool) -> None:
    """Hundreds of workers may be waiting meanwhile."""
    calls = []

    def function(data: NDArray[Any]) -> Any:
        calls.append(len(data))
        time.sleep(0.06 * (len(data) if vectorized else 1))
        return np.ravel(data)[::1] if vectorized else data[0]

    source = NumberSource()
    probe = run_probe(
        lambda rows: compute_rows(function, rows, (Output("f8").resolve("Out", 1),), vectorized=vectorized),
        lambda runs: source.rows(iter(runs)),
        Runs.full(1000),
        source_bytes=8,
        result_bytes=8,
        vectorized=vectorized,
        try_threads=False,
    )
    assert len(calls) <= 3
    assert 0.05 < probe.seconds_per_position
    tried = {p for runs, _ in probe.computed for p in runs.positions().tolist()}
    assert {0, 999} <= tried


def test_what_the_first_call_loads_is_not_taken_for_the_function() -> None:
    """An import or a compilation; the blocks would be far too small, and far too many."""
    calls = []

    def function(row: NDArray[Any]) -> Any:
        time.sleep(0.6 if not calls else 0.06)
        calls.append(row)
        return row[0]

    source = NumberSource()
    probe = run_probe(
        lambda rows: compute_rows(function, rows, (Output("f8").resolve("Out", 1),), vectorized=False),
        lambda runs: source.rows(iter(runs)),
        Runs.full(1000),
        source_bytes=8,
        result_bytes=8,
        vectorized=False,
        try_threads=False,
    )
    assert len(calls) == 3
    assert probe.seconds_per_position < 0.5


@pytest.mark.parametrize("chunk_rows", [0, 100])
def test_reading_is_timed_by_one_more_read_where_that_is_asked_for(chunk_rows: int) -> None:
    """Of the positions that were read at once, whose chunks have been read from the disk by then."""
    reads: list[int] = []
    calls: list[int] = []

    def read(runs: Any) -> NDArray[Any]:
        reads.append(runs.n_positions)
        return NumberSource().rows(iter(runs))

    def function(data: NDArray[Any]) -> Any:
        calls.append(len(data))
        return data[:, 0]

    probe = run_probe(
        lambda rows: compute_rows(function, rows, (Output("f8").resolve("Out", 1),), vectorized=True),
        read,
        Runs.full(1000),
        source_bytes=8,
        result_bytes=8,
        vectorized=True,
        try_threads=False,
        timed_chunk_rows=chunk_rows,
    )
    assert reads == calls + ([max(calls)] if chunk_rows else [])
    assert (probe.reading_seconds > 0) == bool(chunk_rows)


def blas_threads() -> int:
    from threadpoolctl import threadpool_info

    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def test_limits_of_native_threads_may_overlap_in_any_way() -> None:
    """As blocks in the threads of one worker do; the last one that ends restores what was before the first began."""
    before = blas_threads()
    if before == 1 and (os.cpu_count() or 1) == 1:
        pytest.skip("one core: nothing to limit")
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first() -> None:
        with limits.held(1):
            first_in.set()
            assert second_in.wait(60)
        first_out.set()

    def second() -> None:
        assert first_in.wait(60)
        with limits.held(1):
            second_in.set()
            assert first_out.wait(60)
            seen.append(blas_threads())

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [1], "the first one must not have lifted the limit"
    assert blas_threads() == before
