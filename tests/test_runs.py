"""Runs, against Python sets: whatever is done to runs must be what is done to the set of their positions."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.core import runs as runs_module
from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError
from lazyproc.core.runs import Runs

# Small numbers, so that runs often touch, overlap and end at the same position.
position_sets = st.sets(st.integers(0, 40), max_size=30)
spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)
masks = st.lists(st.sampled_from([0, 0, 1, 1, 2, 255]), max_size=80)


def laid_out(runs: Runs) -> list[int]:
    """Return the positions by the slow way, having checked all that is promised about the arrays."""
    for array in (runs.starts, runs.stops):
        assert array.dtype == np.int64
        assert array.ndim == 1
        assert not array.flags.writeable
    pairs = list(runs)
    assert len(pairs) == len(runs)
    assert all(type(number) is int for pair in pairs for number in pair)
    assert all(0 <= start < stop for start, stop in pairs)
    assert all(stop < start for (_, stop), (start, _) in pairwise(pairs))  # as long as can be: never touching
    found = [position for start, stop in pairs for position in range(start, stop)]
    assert runs.n_positions == len(found)
    assert bool(runs) == bool(found)
    return found


# --- making them -----------------------------------------------------------------------------------------------------


@given(position_sets, st.randoms())
def test_from_positions_takes_any_order_and_duplicates(positions, random):
    given_twice = [*positions, *positions]
    random.shuffle(given_twice)
    assert laid_out(Runs.from_positions(np.array(given_twice, dtype="i4"))) == sorted(positions)


@pytest.mark.parametrize("dtype", ["u1", "u8", ">i4", "i8"])
def test_from_positions_takes_any_integer_dtype_and_shape(dtype):
    assert list(Runs.from_positions(np.array([[9, 3], [2, 1]], dtype))) == [(1, 4), (9, 10)]


@given(spans)
def test_from_spans_takes_any_order_and_overlap(pairs):
    assert laid_out(Runs.from_spans(pairs)) == sorted({p for start, stop in pairs for p in range(start, stop)})
    assert Runs.from_spans(iter(pairs)) == Runs.from_spans(np.array(pairs, dtype="i4").reshape(-1, 2))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], []),
        ([(3, 3), (5, 2)], []),  # empty, as range(3, 3) and range(5, 2) are
        ([(5, 2), (-4, -4)], []),  # an empty span may lie anywhere
        ([(2, 4), (0, 2)], [(0, 4)]),  # touching: one run
        ([(0, 9), (1, 2), (3, 4)], [(0, 9)]),  # a long one swallows those that follow: the reach, not the last stop
        ([(0, 9), (1, 2), (10, 11)], [(0, 9), (10, 11)]),  # and the gap is counted from that reach
    ],
)
def test_from_spans_by_hand(pairs, expected):
    assert list(Runs.from_spans(pairs)) == expected


@given(masks, st.sampled_from([0, 1, 255, 300]), st.integers(0, 1000))
def test_from_mask(mask, value, offset):
    expected = [offset + at for at, here in enumerate(mask) if here == value]
    assert laid_out(Runs.from_mask(np.array(mask, np.uint8), value, offset)) == expected


def test_from_mask_takes_truth_values_and_strided_views():
    mask = np.array([True, False, False, True, False])
    assert list(Runs.from_mask(mask)) == [(1, 3), (4, 5)]
    assert list(Runs.from_mask(mask[::2], value=1)) == [(0, 1)]


@given(masks, st.lists(st.integers(0, 80), max_size=10), st.sampled_from([0, 1]))
def test_pieces_cut_anywhere_give_the_runs_of_the_whole(mask, cuts, value):
    whole = np.array(mask, np.uint8)
    pieces = np.split(whole, sorted(min(cut, whole.size) for cut in cuts))  # some are empty, as readers may give
    runs = Runs.from_mask_pieces(iter(pieces), value)
    assert runs == Runs.from_mask(whole, value)
    assert laid_out(runs) == np.flatnonzero(whole == value).tolist()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        ([[], []], []),
        ([[0, 0], [0], [0, 0]], [(0, 5)]),  # uniform pieces: one run over all cuts
        ([[1, 1], [0, 0], [1]], [(2, 4)]),  # uniform pieces that differ: the cuts themselves are the edges
        ([[1, 0], [0, 1]], [(1, 3)]),  # a run over a cut between mixed pieces
        ([[0, 1], [0, 1]], [(0, 1), (2, 3)]),  # ends right before a cut, begins right after it: two runs
        ([[1], [0]], [(1, 2)]),  # open at the very end
    ],
)
def test_pieces_by_hand(pieces, expected):
    assert list(Runs.from_mask_pieces(np.array(piece, np.uint8) for piece in pieces)) == expected


def test_pieces_may_share_one_buffer():
    buffer = np.zeros(4, np.uint8)

    def pieces():
        for done in (0, 1, 0):
            buffer[:] = done
            yield buffer

    assert list(Runs.from_mask_pieces(pieces())) == [(0, 4), (8, 12)]


def test_the_inner_parts_of_a_long_piece_do_not_show(monkeypatch):
    # Masks are searched part by part; with parts of 3 positions, every kind of edge falls on every place in a part.
    mask = np.random.default_rng(3).integers(0, 2, 200).astype(np.uint8)
    whole = Runs.from_mask(mask)
    monkeypatch.setattr(runs_module, "_PART", 3)
    assert Runs.from_mask(mask) == whole


def test_full_and_empty():
    assert list(Runs.full(7)) == [(0, 7)]
    assert Runs.full(0) == Runs.empty() == Runs([], [])
    assert laid_out(Runs.empty()) == []
    assert Runs.full(10**15).n_positions == 10**15


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "stops"),
    [
        ([3], [3]),  # empty run
        ([3], [2]),  # backwards
        ([-1], [2]),  # before the first position
        ([0, 5], [5, 7]),  # touching: it is one run
        ([0, 4], [5, 7]),  # overlapping
        ([6, 0], [8, 2]),  # not in order
        ([0, 4], [2]),  # one stop is missing
        ([[0]], [[2]]),  # not in one row
    ],
)
def test_runs_that_are_not_proper_are_refused(starts, stops):
    with pytest.raises(ArgumentValueError, match="Runs"):
        Runs(starts, stops)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Runs([0.0], [2.0]), ArgumentTypeError),  # would be rounded
        (lambda: Runs.full(-1), ArgumentValueError),
        (lambda: Runs.from_positions([0.5]), ArgumentTypeError),
        (lambda: Runs.from_positions([True, False]), ArgumentTypeError),  # a mask: positions 1 and 0 are not meant
        (lambda: Runs.from_positions([2, -1]), ArgumentValueError),  # not "the last one", as in Python
        (lambda: Runs.from_positions(np.array([2**63], np.uint64)), ArgumentValueError),  # would wrap to below 0
        (lambda: Runs.from_spans([(-2, 3)]), ArgumentValueError),
        (lambda: Runs.from_spans([(1, 2, 3)]), ArgumentValueError),
        (lambda: Runs.from_spans([(1.0, 2.0)]), ArgumentTypeError),
        (lambda: Runs.from_mask([[0, 1]]), ArgumentValueError),
        (lambda: Runs.from_mask([0.0, 1.0]), ArgumentTypeError),
        (lambda: Runs.from_mask([0, 1], offset=-1), ArgumentValueError),
        (lambda: Runs.full(3).take(-1), ArgumentValueError),
        (lambda: Runs.full(3).spread(-1), ArgumentValueError),
    ],
)
def test_impossible_arguments_are_refused(make, error):
    with pytest.raises(error):
        make()


# --- values ----------------------------------------------------------------------------------------------------------


@given(position_sets, position_sets)
def test_equal_exactly_if_the_sets_are_and_then_of_one_hash(left, right):
    one, two = Runs.from_positions(sorted(left)), Runs.from_positions(sorted(right))
    assert (one == two) == (left == right)
    assert one != left
    if one == two:
        assert hash(one) == hash(two)


def test_immutable_whatever_the_caller_does_with_his_arrays():
    starts, stops = np.array([0, 5]), np.array([2, 9])
    runs = Runs(starts, stops)
    starts[0] = 1
    assert runs.starts[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        runs.starts[0] = 1
    with pytest.raises(AttributeError):
        runs.starts = starts


def test_pickled_runs_are_equal_and_still_read_only():
    runs = Runs([0, 5], [2, 9])
    copy = pickle.loads(pickle.dumps(runs))
    assert copy == runs
    assert laid_out(copy) == laid_out(runs)


def test_the_repr_is_short_however_many_runs_there_are():
    assert repr(Runs.empty()) == "<Runs: 0 positions in 0 runs>"
    assert repr(Runs([0, 5], [2, 9])) == "<Runs: 6 positions in 2 runs: 0:2, 5:9>"
    assert len(repr(Runs.from_positions(np.arange(0, 20_000, 2)))) < 100


# --- operations ------------------------------------------------------------------------------------------------------


@given(position_sets, position_sets)
def test_union_difference_intersection(left, right):
    one, two = Runs.from_positions(sorted(left)), Runs.from_positions(sorted(right))
    assert laid_out(one.union(two)) == sorted(left | right)
    assert laid_out(one.difference(two)) == sorted(left - right)
    assert laid_out(one.intersection(two)) == sorted(left & right)


@given(spans, spans)
def test_the_same_for_longer_runs(left_spans, right_spans):
    one, two = Runs.from_spans(left_spans), Runs.from_spans(right_spans)
    left, right = set(laid_out(one)), set(laid_out(two))
    assert laid_out(one.union(two)) == sorted(left | right)
    assert laid_out(one.difference(two)) == sorted(left - right)
    assert laid_out(one.intersection(two)) == sorted(left & right)


@given(position_sets, st.integers(-5, 50), st.integers(-5, 50))
def test_clip(positions, start, stop):
    clipped = Runs.from_positions(sorted(positions)).clip(start, stop)
    assert laid_out(clipped) == sorted(p for p in positions if start <= p < stop)


@given(position_sets, st.integers(0, 40))
def test_take(positions, n):
    assert laid_out(Runs.from_positions(sorted(positions)).take(n)) == sorted(positions)[:n]


@given(position_sets)
def test_positions_and_counts(positions):
    runs = Runs.from_positions(sorted(positions))
    assert runs.positions().tolist() == sorted(positions)
    assert runs.positions().dtype == np.int64
    assert runs.before.tolist() == [sum(p < start for p in positions) for start in runs.starts] + [len(positions)]


@given(position_sets, st.integers(0, 45))
def test_spread(positions, k):
    chosen = Runs.from_positions(sorted(positions)).spread(k)
    ordered = sorted(positions)
    assert chosen.dtype == np.int64
    assert len(chosen) == min(k, len(positions))
    ranks = [ordered.index(position) for position in chosen]  # each is of the set
    assert ranks == sorted(set(ranks))
    if ranks:
        assert ranks[0] == 0
    if len(ranks) > 1:
        assert ranks[-1] == len(ordered) - 1
        steps = np.diff(ranks)
        assert steps.max() - steps.min() <= 1  # as even as whole numbers allow


def test_spread_does_not_lay_out_the_set_nor_overflow():
    # 1e6 times 1e15 does not fit into 64 bits; and 1e15 positions fit into no memory.
    chosen = Runs.full(10**15).spread(10**6)
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 10**15 - 1, 10**6)
    assert np.diff(chosen).min() > 0


@given(
    mask=st.lists(st.integers(0, 1), min_size=1, max_size=300),
    most_runs=st.integers(1, 20),
    n_in_piece=st.integers(1, 70),
)
def test_a_mask_can_be_searched_for_a_few_runs_at_a_time(mask, most_runs, n_in_piece):
    """The next ones are those after the last position found; a run may be cut where a part of the search ends."""
    values, start, found = np.array(mask, np.uint8), 0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazyproc.core.runs._PART", 16)
        while True:
            pieces = (values[at : at + n_in_piece] for at in range(start, len(values), n_in_piece))
            runs = Runs.from_mask_pieces(pieces, offset=start, most_runs=most_runs)
            if not runs:
                break
            assert len(runs) < most_runs + 9, "a part of 16 has 8 runs at most"
            found += runs.positions().tolist()
            start = int(runs.stops[-1])
    assert found == np.flatnonzero(values == 0).tolist()
