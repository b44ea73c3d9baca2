"""The block plan, checked by a slow verifier which knows the promises and nothing of the way they are kept."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyproc.core.blocks import Block, BlockPlan
from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError
from lazyproc.core.runs import Runs
from lazyproc.core.sizing import Division, block_seconds, head_of, positions_per_block, tail_of


def n_runs(positions: set[int]) -> int:
    """Count the runs of a set: the positions without a predecessor."""
    return sum(position - 1 not in positions for position in positions)


def verify(
    blocks: list[Block],
    remaining: set[int],
    max_positions: int,
    align: int,
    max_runs: int,
    sizes: tuple[tuple[int, int], ...] = (),
) -> None:
    """Check every promise of a plan on plain sets of positions."""
    holds = [{p for start, stop in block.runs() for p in range(start, stop)} for block in blocks]
    assert [block.index for block in blocks] == list(range(len(blocks)))
    # Disjoint, in order, and covering exactly what remains: laid end to end they are the sorted set.
    in_order = [p for block in blocks for start, stop in block.runs() for p in range(start, stop)]
    assert in_order == sorted(remaining)
    limits, left = [], len(remaining)
    for block, held in zip(blocks, holds, strict=True):
        limits.append([max_positions, *(size for most_left, size in sizes if left <= most_left)][-1])
        left -= len(held)
        assert 1 <= len(held) <= limits[-1]
        assert len(block.starts) == len(block.stops) == n_runs(held) <= max_runs  # and its runs do not touch
    # Storage chunks.
    of_chunk, users = defaultdict(set), defaultdict(set)
    for position in remaining:
        of_chunk[position // align].add(position)
    for index, held in enumerate(holds):
        for position in held:
            users[position // align].add(index)
    divided = {chunk for chunk, indices in users.items() if len(indices) > 1}
    for chunk in divided:
        assert len(of_chunk[chunk]) > limits[min(users[chunk])] or n_runs(of_chunk[chunk]) > max_runs  # it had to be
        for index in users[chunk]:
            assert {position // align for position in holds[index]} == {chunk}  # and its blocks hold nothing else
    # Economy: a block stops only because what comes next, a whole chunk or in a divided one a position, does not fit.
    for limit, (held, following) in zip(limits, pairwise(holds), strict=False):
        chunk, next_chunk = max(held) // align, min(following) // align
        if chunk != next_chunk and {chunk, next_chunk} & divided:
            continue
        more = held | ({min(following)} if chunk == next_chunk else of_chunk[next_chunk])
        assert len(more) > limit or n_runs(more) > max_runs


@st.composite
def remaining_positions(draw) -> set[int]:
    """Stretches to do and stretches done, of quite different lengths: what an interrupted run leaves behind."""
    lengths = draw(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 90)), max_size=14))
    edges = np.cumsum([draw(st.integers(0, 30)), *lengths]).tolist()
    return {p for start, stop in zip(edges[::2], edges[1::2], strict=False) for p in range(start, stop)}


limits = {"max_positions": st.integers(1, 60), "align": st.integers(1, 25), "max_runs": st.integers(1, 6)}


@given(remaining=remaining_positions(), **limits)
@example(remaining=set(), max_positions=1, align=1, max_runs=1)
@example(remaining=set(range(3, 90)), max_positions=7, align=20, max_runs=1)  # chunks divided, the first one not whole
@example(remaining=set(range(0, 90, 2)), max_positions=50, align=20, max_runs=3)  # divided because of the runs alone
def test_blocks_keep_every_promise(remaining, max_positions, align, max_runs):
    plan = BlockPlan(Runs.from_positions(sorted(remaining)), max_positions, align, max_runs)
    blocks = list(plan)
    verify(blocks, remaining, max_positions, align, max_runs)
    assert plan.count() == len(blocks)
    assert list(plan) == blocks  # each iteration begins anew


@st.composite
def other_sizes(draw, n_positions: int, max_positions: int) -> tuple[tuple[int, int], ...]:
    """Any other sizes that blocks of a plan of so many positions may have, on the way."""
    if not n_positions:
        return ()
    lefts = draw(st.lists(st.integers(1, n_positions), max_size=6, unique=True))
    return tuple((left, draw(st.integers(1, max_positions))) for left in sorted(lefts, reverse=True))


@given(remaining=remaining_positions(), data=st.data(), **limits)
def test_blocks_of_other_sizes_keep_every_promise(remaining, data, max_positions, align, max_runs):
    sizes = data.draw(other_sizes(len(remaining), max_positions))
    plan = BlockPlan(Runs.from_positions(sorted(remaining)), max_positions, align, max_runs, sizes)
    blocks = list(plan)
    verify(blocks, remaining, max_positions, align, max_runs, sizes)
    assert plan.count() == len(blocks)


@given(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=150), *limits.values())
def test_blocks_of_a_mask_full_of_holes(mask, max_positions, align, max_runs):
    blocks = list(BlockPlan(Runs.from_mask(np.array(mask, np.uint8)), max_positions, align, max_runs))
    verify(blocks, {p for p, done in enumerate(mask) if not done}, max_positions, align, max_runs)


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 2000)), max_size=5),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 4),
    st.data(),
)
def test_count_is_the_number_of_blocks_in_long_runs_too(spans, max_positions, align, max_runs, data):
    runs = Runs.from_spans((start, start + length) for start, length in spans)
    plan = BlockPlan(runs, max_positions, align, max_runs, data.draw(other_sizes(runs.n_positions, max_positions)))
    assert plan.count() == sum(1 for _ in plan)


@pytest.mark.parametrize(
    ("spans", "limits", "expected"),
    [
        # Without chunks, blocks are simply filled.
        ([(0, 10)], {"max_positions": 4}, [[(0, 4)], [(4, 8)], [(8, 10)]]),
        # A hole does not end a block, and its positions do not count.
        ([(0, 3), (90, 93)], {"max_positions": 4}, [[(0, 3), (90, 91)], [(91, 93)]]),
        # Chunks of 4 begin at absolute multiples, not where the remaining positions begin: 3 alone, and not 3:7.
        ([(3, 12)], {"max_positions": 4, "align": 4}, [[(3, 4)], [(4, 8)], [(8, 12)]]),
        # Two chunks and a half would fit: two are taken.
        ([(0, 16)], {"max_positions": 10, "align": 4}, [[(0, 8)], [(8, 16)]]),
        # No chunk fits: each is divided by itself, and the rest of one (8:10) is not filled up from the next.
        ([(0, 14)], {"max_positions": 4, "align": 10}, [[(0, 4)], [(4, 8)], [(8, 10)], [(10, 14)]]),
        # What remains of the first chunk fits, though the chunk itself would not: not divided.
        ([(7, 12)], {"max_positions": 4, "align": 10}, [[(7, 10)], [(10, 12)]]),
        # A divided chunk that ends in a hole: its last block must not run on to the next chunk, over the hole.
        ([(0, 5), (12, 13)], {"max_positions": 4, "align": 10}, [[(0, 4)], [(4, 5)], [(12, 13)]]),
        # Too many runs in one chunk: divided because of them, the limit of positions is far.
        ([(0, 1), (2, 3), (4, 5)], {"max_positions": 99, "align": 10, "max_runs": 2}, [[(0, 1), (2, 3)], [(4, 5)]]),
        # The runs end a block at a chunk edge within a run, not at the end of that run.
        (
            [(0, 1), (6, 14), (15, 16)],
            {"max_positions": 99, "align": 10, "max_runs": 2},
            [[(0, 1), (6, 10)], [(10, 14), (15, 16)]],
        ),
        # Before the third block 4 are left, so it holds 2; before the fifth one 1, which it could hold anyway.
        (
            [(0, 10)],
            {"max_positions": 3, "sizes": ((4, 2), (1, 1))},
            [[(0, 3)], [(3, 6)], [(6, 8)], [(8, 10)]],
        ),
        # Sizes count positions, not what lies between them.
        ([(0, 4), (90, 94)], {"max_positions": 4, "sizes": ((4, 2),)}, [[(0, 4)], [(90, 92)], [(92, 94)]]),
        # A chunk of 4 is not divided as long as it fits; when it does not anymore, its parts hold nothing else.
        (
            [(0, 16)],
            {"max_positions": 8, "align": 4, "sizes": ((8, 4), (4, 3))},
            [[(0, 8)], [(8, 12)], [(12, 15)], [(15, 16)]],
        ),
    ],
)  # fmt: skip
def test_plans_by_hand(spans, limits, expected):
    plan = BlockPlan(Runs.from_spans(spans), **limits)
    assert [list(block.runs()) for block in plan] == expected
    assert plan.count() == len(expected)


def test_scattered_positions_become_a_few_blocks():
    plan = BlockPlan(Runs.from_positions(np.arange(0, 1_000_000, 10)), max_positions=10**6)
    assert plan.count() == -(-100_000 // 512)
    assert next(iter(plan)).n_positions == 512


@pytest.mark.parametrize(("max_positions", "align"), [(100_000, 1), (100_000, 64), (7, 64), (1, 10**9), (64, 64)])
def test_count_does_not_go_through_the_blocks(max_positions, align):
    # 1e15 positions: walking through them would not end in this test's time limit.
    step = max_positions - max_positions % align
    n = 10**15
    expected = -(-n // step) if step else n // align * -(-align // max_positions) + -(-(n % align) // max_positions)
    if step and n % step and step + n % step <= max_positions:
        expected -= 1  # the last block has room for the rest, since no chunk follows
    assert BlockPlan(Runs.full(n), max_positions, align).count() == expected


def test_count_does_not_go_through_the_blocks_of_other_sizes_either():
    sizes = ((10**14, 1000), (10**13, 100))
    counted = BlockPlan(Runs.full(10**15), 10_000, sizes=sizes).count()
    assert counted == 9 * 10**14 // 10_000 + 9 * 10**13 // 1000 + 10**13 // 100


def test_blocks_are_made_one_by_one():
    blocks = list(islice(BlockPlan(Runs.full(10**15), 1000), 3))
    assert [(block.start, block.stop) for block in blocks] == [(0, 1000), (1000, 2000), (2000, 3000)]


def masks_with_holes(n_pieces: int, piece: int, holes: int) -> Iterator[np.ndarray]:
    """Give a long mask piece by piece, all views of one zero buffer into which holes are poked."""
    buffer = np.zeros(piece, np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(n_pieces):
        # One in each stretch, never in the last place of it: holes do not touch, so their number is known.
        stretch = piece // holes
        at = np.arange(holes) * stretch + rng.integers(0, stretch - 1, holes)
        buffer[at] = 1
        yield buffer
        buffer[at] = 0


def test_a_billion_positions_with_1e5_holes_are_planned_in_little_memory():
    allowed = 64 * 2**20
    tracemalloc.start()
    try:
        remaining = Runs.from_mask_pieces(masks_with_holes(n_pieces=1000, piece=10**6, holes=100))
        plan = BlockPlan(remaining, max_positions=100_000, align=64)
        counted = plan.count()
        made = positions = 0
        for block in plan:
            made += 1
            positions += block.n_positions
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    projected = 6 * 8 * len(remaining) + 10**6 + 2**20  # arrays of the runs, also while they are made; a piece; parts
    assert peak < projected < allowed
    assert remaining.n_positions == positions == 10**9 - 10**5
    assert len(remaining) in (10**5, 10**5 + 1)
    assert counted == made
    assert 10**4 <= counted <= 10**4 + 20  # filled but for a chunk or so


# --- a block ---------------------------------------------------------------------------------------------------------


def test_what_a_block_says_about_itself():
    block = Block(3, (10, 20, 30), (12, 21, 34))
    assert (block.n_positions, block.start, block.stop) == (7, 10, 34)
    assert list(block.runs()) == [(10, 12), (20, 21), (30, 34)]
    assert list(block.offsets()) == [(10, 12, 0), (20, 21, 2), (30, 34, 3)]
    assert Block.of(Runs.from_spans([(5, 9), (12, 13)])) == Block(0, (5, 12), (9, 13))


@given(remaining=remaining_positions(), n=st.integers(1, 100))
def test_a_block_is_split_into_its_first_positions_and_the_others(remaining, n):
    for block in BlockPlan(Runs.from_positions(sorted(remaining)), 50, max_runs=4):
        if block.n_positions > n:
            first, rest = block.split(n)
            assert first.n_positions == n
            assert first.index == rest.index == block.index
            pieces = [p for part in (first, rest) for start, stop in part.runs() for p in range(start, stop)]
            assert pieces == [p for start, stop in block.runs() for p in range(start, stop)]
            assert all(start < stop for part in (first, rest) for start, stop in part.runs())


def test_a_block_pickles_small_and_comes_back_equal():
    for limit in (None, 1.5):
        block = Block(10**6, (10**9,), (10**9 + 10**5,), limit)
        assert pickle.loads(pickle.dumps(block)) == block
        assert len(pickle.dumps(block)) < 100
    many = next(iter(BlockPlan(Runs.from_positions(np.arange(10**9, 10**9 + 1024, 2)), 10**6)))
    assert len(many.starts) == 512
    assert len(pickle.dumps(many)) < 2 * 512 * 6 + 100


def test_a_block_holds_plain_ints():
    # NumPy's integers would pickle many times larger, and fail as JSON in the journal and the events.
    for block in BlockPlan(Runs([0, 9], [4, 12]), np.int64(5), np.int32(2)):
        assert {type(number) for number in (block.index, *block.starts, *block.stops)} == {int}


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"max_positions": 0}, ArgumentValueError),
        ({"align": 0}, ArgumentValueError),
        ({"max_runs": 0}, ArgumentValueError),
        ({"max_positions": 2.5}, ArgumentTypeError),
        ({"remaining": [(0, 3)]}, ArgumentTypeError),
        ({"sizes": ((4, 1),)}, ArgumentValueError),  # more are never left
        ({"sizes": ((2, 5),)}, ArgumentValueError),  # more than max_positions
        ({"sizes": ((1, 2), (2, 1))}, ArgumentValueError),
        ({"sizes": ((2, 0),)}, ArgumentValueError),
        ({"sizes": ((2, 1.5),)}, ArgumentTypeError),
    ],
)
def test_impossible_plans_are_refused(changed, error):
    (name,) = changed
    with pytest.raises(error, match=name):
        BlockPlan(**{"remaining": Runs.full(3), "max_positions": 4} | changed)


# --- the size of a block ---------------------------------------------------------------------------------------------

AMPLE = {  # nothing limits but what remains
    "memory_rows": 10**9,
    "n_remaining": 8_000,
    "n_workers": 2,
    "align": 1,
    "seconds_per_position": None,
    "bytes_per_position": 1,
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 1000),  # four blocks for each of two workers
        ({"n_remaining": 8_001}, 1001),  # rounded up: 8 blocks and not a ninth of one position
        ({"n_remaining": 0}, 1),  # nothing to do: still a size
        ({"memory_rows": 10}, 10),
        ({"bytes_per_position": 2**20}, 16),  # 16 MiB
        ({"bytes_per_position": 2**30}, 1),  # one position is more than preferred; it still must be read
        ({"seconds_per_position": 0.01}, 100),
        ({"seconds_per_position": 0.0}, 1000),  # too quick for the clock
        ({"seconds_per_position": 0.001}, 250),  # sixteen for each worker, of a quarter of a second
        ({"seconds_per_position": 0.0005}, 400),  # or as many as last a fifth of a second
        ({"seconds_per_position": 0.0002}, 1000),  # which they do already
        ({"seconds_per_position": 0.001, "least_seconds": 0.2}, 800),
        ({"seconds_per_position": 60.0}, 1),  # a position that takes longer than a block should
        ({"align": 64}, 960),  # whole chunks
        ({"align": 1000}, 1000),
        ({"align": 1001}, 1001),  # raised to one chunk: to be decoded once
        ({"align": 5000, "memory_rows": 4000}, 1000),  # memory has no room for a chunk: it is divided anyway
        ({"align": 64, "memory_rows": 63}, 63),  # and then to the limit
        ({"align": 64, "seconds_per_position": 0.05}, 64),  # 3.2 s a chunk: decoding it once is worth that
        ({"align": 64, "seconds_per_position": 0.1}, 10),  # 6.4 s a chunk: too long to wait for, and to lose
        ({"align": 64, "seconds_per_position": 0.1, "target_seconds": 2.0}, 64),  # unless longer blocks are wanted
    ],
)
def test_the_size_of_a_block_by_hand(changed, expected):
    assert positions_per_block(**AMPLE | changed) == expected


@given(
    memory_rows=st.integers(1, 10**7),
    n_remaining=st.integers(0, 10**9),
    n_workers=st.integers(1, 64),
    align=st.integers(1, 10**5),
    seconds=st.none() | st.floats(0, 1e3),
    row_bytes=st.integers(1, 10**8),
)
def test_the_size_of_a_block_is_within_its_limits(memory_rows, n_remaining, n_workers, align, seconds, row_bytes):
    size = positions_per_block(
        memory_rows=memory_rows,
        n_remaining=n_remaining,
        n_workers=n_workers,
        align=align,
        seconds_per_position=seconds,
        bytes_per_position=row_bytes,
    )
    assert type(size) is int
    assert 1 <= size <= memory_rows
    if size > align:
        assert size % align == 0
    if size not in (1, align):  # the floor, and the one chunk that may exceed the wishes
        assert size * row_bytes <= 16 * 2**20
        assert size * (seconds or 0) <= 1.0 + 1e-9
        assert (size - 1) * n_workers * 4 < n_remaining


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"memory_rows": 0}, ArgumentValueError),  # one position would break the promise about memory
        ({"n_remaining": -1}, ArgumentValueError),
        ({"n_workers": 0}, ArgumentValueError),
        ({"align": 0}, ArgumentValueError),
        ({"bytes_per_position": 0}, ArgumentValueError),
        ({"seconds_per_position": -1.0}, ArgumentValueError),
        ({"seconds_per_position": float("nan")}, ArgumentValueError),  # a probe that went wrong
        ({"align": 1.5}, ArgumentTypeError),
    ],
)
def test_impossible_sizes_are_refused(changed, error):
    (name,) = changed
    with pytest.raises(error, match=name):
        positions_per_block(**AMPLE | changed)


# --- smaller blocks toward the end -----------------------------------------------------------------------------------

ENOUGH = {  # blocks of ten seconds, and of a tenth of a second at least
    "size": 100,
    "n_remaining": 10**6,
    "n_workers": 8,
    "align": 1,
    "seconds_per_position": 0.1,
    "least_seconds": 0.1,
}


@pytest.mark.parametrize(
    ("changed", "sizes"),
    [
        ({}, [50, 25, 12, 6, 3, 1]),
        ({"n_workers": 1}, []),  # nobody to wait for
        ({"least_seconds": 2.0}, [50, 25, 20]),  # 20 positions take two seconds
        ({"least_seconds": 10.0}, []),  # the usual blocks are not worth more
        ({"seconds_per_position": None}, [50, 25, 12]),  # not known: three times
        ({"align": 10}, [50, 20, 10]),  # whole chunks, down to one
        ({"align": 100}, []),  # one chunk already
        ({"align": 1000}, [50, 25, 12, 6, 3, 1]),  # chunks are divided anyway
        ({"n_remaining": 800}, [25, 12, 6, 3, 1]),  # the first would begin before the beginning
        ({"size": 1}, []),
    ],
)
def test_tails_by_hand(changed, sizes):
    tail = tail_of(**ENOUGH | changed)
    assert [size for _, size in tail] == sizes


@given(
    n_remaining=st.integers(1, 3000),
    n_workers=st.integers(1, 40),
    align=st.integers(1, 200),
    seconds=st.none() | st.floats(1e-3, 10),
    least=st.floats(0.01, 1),
    rows=st.integers(1, 3000),
)
def test_a_tail_leaves_work_for_every_worker(n_remaining, n_workers, align, seconds, least, rows):
    """Before every block of more than the least size, each worker could get two such blocks of what is left."""
    size = positions_per_block(
        memory_rows=rows,
        n_remaining=n_remaining,
        n_workers=n_workers,
        align=align,
        seconds_per_position=seconds,
        bytes_per_position=1,
    )
    tail = tail_of(
        size,
        n_remaining=n_remaining,
        n_workers=n_workers,
        align=align,
        seconds_per_position=seconds,
        least_seconds=least,
    )
    plan = BlockPlan(Runs.full(n_remaining), size, align, sizes=tail)
    verify(list(plan), set(range(n_remaining)), size, align, 512, tail)
    floor = min([size, *(smaller for _, smaller in tail)])
    left = n_remaining
    for block in plan:
        if n_workers > 1 and block.n_positions > max(floor, align):
            assert left >= 2 * n_workers * block.n_positions or block.n_positions <= -(-n_remaining // (4 * n_workers))
        left -= block.n_positions


@given(
    n_remaining=st.integers(1, 10**6),
    n_workers=st.integers(1, 300),
    align=st.integers(1, 40),
    size=st.integers(1, 400),
    seconds=st.floats(1e-3, 1),
)
def test_the_first_blocks_of_many_workers_are_of_all_sizes(n_remaining, n_workers, align, size, seconds):
    """So that workers do not all end them at the same time; and no chunk is divided that need not be."""
    division = Division(size, n_workers, align, 1, size, interval=10.0)
    plan = division.plan(Runs.full(n_remaining), seconds, begins=True)
    largest = plan.max_positions
    tail = division.plan(Runs.full(n_remaining), seconds).sizes
    head = head_of(largest, n_remaining=n_remaining, n_workers=n_workers, align=align)
    assert plan.sizes == head + tail
    first = [block.n_positions for block in islice(plan, n_workers)]
    if not head:
        assert n_workers < 16 or largest < 2 * align or n_remaining < 4 * n_workers * largest
        return
    assert first == sorted(first)
    assert set(np.diff([0, *first])) <= {0, *range(1, max(largest // 16, align) + align + 1)}
    assert first[0] < largest == first[-1] or largest - largest % align == first[-1]
    assert all(size % align == 0 for _, size in head)
    assert [size for _, size in head] == sorted({size for _, size in head})


def test_blocks_take_as_long_as_it_takes_to_hand_them_out():
    """All workers are given their blocks within a quarter of the time that a block takes, in the tail within all."""
    for n_workers in (1, 8, 100, 10**5):
        usual, least = block_seconds(n_workers, interval=10.0)
        assert usual >= max(1.0, 4 * n_workers * 0.001)
        assert usual >= least >= max(0.05, n_workers * 0.001)
    assert block_seconds(8, interval=1.0) == (0.25, 0.05)
