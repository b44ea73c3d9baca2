"""A set of positions, kept as the runs of consecutive positions that it consists of.

The positions left to compute are nearly always a few long runs, with holes where an earlier run was interrupted. So a
scan of 1e9 positions with 1e5 holes is 1e5 pairs of numbers here and never an array of positions, and what reads
or writes rows is given slices, which HDF5 serves many times faster than lists of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError

# Masks are searched in parts of this many positions: the temporaries stay small, and in the processor's cache.
_PART = 2**18


@dataclass(frozen=True, eq=False, repr=False)
class Runs:
    """An ordered set of positions, immutable: its runs are as long as they can be, and do not touch.

    Safe to share between threads; compares and hashes by value; pickles as two arrays.

    Parameters
    ----------
    starts : array-like of int, (n_runs,)
        The first position of each run, in order.
    stops : array-like of int, (n_runs,)
        The last position of each run, plus one. Both are copied and kept as read-only int64 arrays.

    Raises
    ------
    ArgumentTypeError
        If they are not integers.
    ArgumentValueError
        If they are not two rows of the same length, or a run is empty, or begins below 0, or the runs are not in order,
        overlap or touch. `Runs.from_spans` takes runs that do.

    Examples
    --------
    >>> runs = Runs([0, 7], [5, 9])
    >>> len(runs), runs.n_positions, list(runs)
    (2, 7, [(0, 5), (7, 9)])
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def __init__(self, starts: ArrayLike, stops: ArrayLike) -> None:
        first, last = _integers("Runs: starts", starts), _integers("Runs: stops", stops)
        if first.ndim != 1 or first.shape != last.shape:
            raise ArgumentValueError(
                f"Runs: starts and stops have the shapes {first.shape} and {last.shape}; expected the same number of "
                "integers in one row."
            )
        wrong = first >= last
        wrong[:1] |= first[:1] < 0
        wrong[1:] |= first[1:] <= last[:-1]
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ArgumentValueError(
                f"Runs: run {at} is {first[at]}:{last[at]}; expected runs from 0 upwards that are not empty, in order, "
                "with a gap before each. Use Runs.from_spans for spans that overlap or touch."
            )
        self._keep(first.copy(), last.copy())

    def _keep(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        for name, array in (("starts", starts), ("stops", stops)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @classmethod
    def _made(cls, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Runs:
        """Wrap arrays which are known to be right and belong to nobody else."""
        runs = cls.__new__(cls)
        runs._keep(starts, stops)
        return runs

    @classmethod
    def _from_edges(cls, edges: NDArray[np.int64]) -> Runs:
        """Make runs of the positions, in order, where the set begins, ends, begins …"""
        return cls._made(edges[::2].copy(), edges[1::2].copy())

    @classmethod
    def full(cls, n: int) -> Runs:
        """All positions from 0 to `n` - 1."""
        if n < 0:
            raise ArgumentValueError(f"Runs.full: n is {n}; expected a number of positions, 0 or more.")
        return cls([0], [n]) if n else cls.empty()

    @classmethod
    def empty(cls) -> Runs:
        """No position at all."""
        return cls._made(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def from_mask(cls, mask: ArrayLike, value: int = 0, offset: int = 0) -> Runs:
        """The positions where a mask has a value: with the default, those which a status mask says are not done.

        Parameters
        ----------
        mask : array-like of int or bool, (n_positions,)
            One value a position.
        value : int, optional
            The value looked for; any other value means that the position is not in the set.
        offset : int, optional
            The position of the first value of the mask.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the mask is not one row of integers or truth values, or `offset` is negative.

        Examples
        --------
        >>> list(Runs.from_mask([0, 0, 1, 0]))
        [(0, 2), (3, 4)]
        """
        if offset < 0:
            raise ArgumentValueError(f"Runs.from_mask: offset is {offset}; expected a position, 0 or more.")
        return cls._from_edges(_edges([np.asarray(mask)], value, offset))

    @classmethod
    def from_mask_pieces(
        cls, pieces: Iterable[NDArray[np.uint8]], value: int = 0, offset: int = 0, most_runs: int | None = None
    ) -> Runs:
        """The same as `from_mask`, of a mask that comes in consecutive pieces and need never be in memory as a whole.

        A piece is not looked at again once the next one is asked for, so all may share one buffer. Memory: the runs
        found, and a few hundred KiB.

        Parameters
        ----------
        pieces : iterable of array of int or bool, (n_in_piece,)
            The mask, cut anywhere; runs which go on over a cut stay whole.
        value : int, optional
            The value looked for.
        offset : int, optional
            The position of the first value.
        most_runs : int, optional
            Look no further once about so many runs are found: there may be more, and the last one may go on. It may be
            exceeded by half the positions of a part of the search, 2**17. Default: look at all.
        """
        return cls._from_edges(_edges(pieces, value, offset, most_runs))

    @classmethod
    def from_positions(cls, positions: ArrayLike) -> Runs:
        """The positions in an integer array of any shape and order, duplicates or not.

        Raises
        ------
        ArgumentTypeError
            If they are not integers. Truth values are a mask: see `from_mask`.
        ArgumentValueError
            If one is negative.

        Examples
        --------
        >>> list(Runs.from_positions([4, 1, 2, 2]))
        [(1, 3), (4, 5)]
        """
        ordered = np.sort(_integers("Runs.from_positions: positions", positions), axis=None)
        if not ordered.size:
            return cls.empty()
        if ordered[0] < 0:
            raise ArgumentValueError(
                f"Runs.from_positions: one position is {ordered[0]}; expected 0 or more: count from the first one."
            )
        jumps = np.diff(ordered) > 1
        return cls._made(ordered[np.r_[True, jumps]], ordered[np.r_[jumps, True]] + 1)

    @classmethod
    def from_spans(cls, spans: Iterable[tuple[int, int]]) -> Runs:
        """The positions in spans (start, stop), in any order, overlapping or not.

        As with `range`, a span which does not stop after its start is empty.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If they are not pairs of integers, or a span that is not empty begins below 0.

        Examples
        --------
        >>> list(Runs.from_spans([(5, 8), (0, 2), (2, 3), (4, 4)]))
        [(0, 3), (5, 8)]
        """
        pairs = _integers("Runs.from_spans: spans", spans if isinstance(spans, np.ndarray) else list(spans))
        if pairs.size and (pairs.ndim != 2 or pairs.shape[1] != 2):
            raise ArgumentValueError(
                f"Runs.from_spans: spans has the shape {pairs.shape}; expected (start, stop) each."
            )
        pairs = pairs.reshape(-1, 2)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        if not len(pairs):
            return cls.empty()
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        starts, reach = pairs[:, 0], np.maximum.accumulate(pairs[:, 1])
        if starts[0] < 0:
            raise ArgumentValueError(f"Runs.from_spans: one span begins at {starts[0]}; expected 0 or more.")
        gaps = starts[1:] > reach[:-1]
        return cls._made(starts[np.r_[True, gaps]], reach[np.r_[gaps, True]])

    @cached_property
    def before(self) -> NDArray[np.int64]:
        """How many positions of the set lie before each run, and then how many there are in all: (n_runs + 1,)."""
        counts = np.zeros(self.starts.size + 1, np.int64)
        np.cumsum(self.stops - self.starts, out=counts[1:])
        counts.setflags(write=False)
        return counts

    @property
    def n_positions(self) -> int:
        """How many positions there are."""
        return int(self.before[-1])

    def __len__(self) -> int:
        return int(self.starts.size)

    def __bool__(self) -> bool:
        return bool(self.starts.size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.tolist(), self.stops.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Runs):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.stops, other.stops)

    def __hash__(self) -> int:
        return hash((self.starts.tobytes(), self.stops.tobytes()))

    def __reduce__(self) -> tuple[type[Runs], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        # By way of the constructor, which makes the arrays read-only again; and the counts are not sent.
        return type(self), (self.starts, self.stops)

    def __repr__(self) -> str:
        shown = [
            f"{start}:{stop}" for start, stop in zip(self.starts[:3].tolist(), self.stops[:3].tolist(), strict=True)
        ]
        if len(self) > 4:
            shown.append("…")
        if len(self) > 3:
            shown.append(f"{self.starts[-1]}:{self.stops[-1]}")
        return f"<Runs: {self.n_positions} positions in {len(self)} runs{': ' if shown else ''}{', '.join(shown)}>"

    def positions(self) -> NDArray[np.int64]:
        """All positions, in order: an array of (n_positions,), so only for sets known to be small."""
        lengths = self.stops - self.starts
        return np.repeat(self.starts - self.before[:-1], lengths) + np.arange(self.n_positions, dtype=np.int64)

    def union(self, other: Runs) -> Runs:
        """The positions in either set."""
        return self._combine(other, only_self=True, only_other=True, both=True)

    def difference(self, other: Runs) -> Runs:
        """The positions in this set that are not in the other one."""
        return self._combine(other, only_self=True, only_other=False, both=False)

    def intersection(self, other: Runs) -> Runs:
        """The positions in both sets."""
        return self._combine(other, only_self=False, only_other=False, both=True)

    def _combine(self, other: Runs, *, only_self: bool, only_other: bool, both: bool) -> Runs:
        """Sweep over the edges of both sets, and keep the stretches asked for."""
        edges = np.concatenate([self.starts, self.stops, other.starts, other.stops])
        # Adds up to 1 within this set only, 2 within the other one only, 3 within both.
        steps = np.repeat(np.array([1, -1, 2, -2], np.int8), [len(self), len(self), len(other), len(other)])
        order = np.argsort(edges, kind="stable")
        edges, level = edges[order], np.cumsum(steps[order], dtype=np.int8)
        # Of several edges at one position, only what holds after the last of them is real.
        real = np.r_[edges[1:] != edges[:-1], np.ones(min(edges.size, 1), bool)]
        edges = edges[real]
        inside = np.array([False, only_self, only_other, both])[level[real]]
        return Runs._from_edges(edges[inside != np.r_[False, inside][: inside.size]])

    def clip(self, start: int, stop: int) -> Runs:
        """The positions from `start` up to and without `stop`; nothing is left if `stop` is not above `start`."""
        first = int(np.searchsorted(self.stops, start, side="right"))
        end = int(np.searchsorted(self.starts, stop, side="left"))
        if stop <= start or first >= end:
            return Runs.empty()
        starts, stops = self.starts[first:end].copy(), self.stops[first:end].copy()
        starts[0], stops[-1] = max(int(starts[0]), start), min(int(stops[-1]), stop)
        return Runs._made(starts, stops)

    def take(self, n: int) -> Runs:
        """The first `n` positions, or all if there are fewer."""
        if n < 0:
            raise ArgumentValueError(f"Runs.take: n is {n}; expected a number of positions, 0 or more.")
        if n >= self.n_positions:
            return self
        touched = int(np.searchsorted(self.before, n, side="left"))
        stops = self.stops[:touched].copy()
        stops[-1:] -= self.before[touched] - n
        return Runs._made(self.starts[:touched].copy(), stops)

    def spread(self, k: int) -> NDArray[np.int64]:
        """Up to `k` different positions, evenly spread over the set: the first, the last, and between; in order.

        Evenly by rank, so that a hole gets none and a long run its share; the set itself is not laid out.
        A single one is the first.

        Examples
        --------
        >>> Runs([0, 100], [5, 104]).spread(3)
        array([  0,   4, 103])
        """
        if k < 0:
            raise ArgumentValueError(f"Runs.spread: k is {k}; expected a number of positions, 0 or more.")
        if k >= self.n_positions:
            return self.positions()
        # Whole steps and their remainder apart: the product of k and n_positions may exceed 64 bits.
        step, rest = divmod(self.n_positions - 1, max(k - 1, 1))
        nth = np.arange(k, dtype=np.int64)
        ranks = nth * step + nth * rest // max(k - 1, 1)
        run = np.searchsorted(self.before, ranks, side="right") - 1
        return np.asarray(self.starts[run] + (ranks - self.before[run]), dtype=np.int64)


def _integers(name: str, values: Any) -> NDArray[np.int64]:
    """Return values as int64, without rounding or wrapping any."""
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        hint = " Runs.from_mask takes a mask." if array.dtype.kind == "b" else ""
        raise ArgumentTypeError(f"{name} has the dtype {array.dtype}; expected integers.{hint}")
    if array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
        raise ArgumentValueError(f"{name} goes up to {array.max()}; expected positions below 2**63.")
    return array.astype(np.int64, copy=False)


def _edges(pieces: Iterable[NDArray[Any]], value: int, offset: int, most_runs: int | None = None) -> NDArray[np.int64]:
    """Find where, along consecutive pieces of a mask, the positions with a value begin, end, begin …

    Since a cut between pieces is an edge only where the mask really changes, runs merge over the cuts by themselves.
    """
    found: list[NDArray[np.int64]] = []
    inside = False
    for hits in _parts(pieces, value):
        if hits[0] != inside:
            found.append(np.array([offset], np.int64))
        # Most parts of a real mask are all done or all to do: counting is far quicker than looking for changes.
        if 0 < np.count_nonzero(hits) < hits.size:
            found.append(np.flatnonzero(hits[1:] != hits[:-1]).astype(np.int64) + (offset + 1))
        inside = bool(hits[-1])
        offset += hits.size
        if most_runs is not None and sum(map(len, found)) >= 2 * most_runs:
            break
    if inside:
        found.append(np.array([offset], np.int64))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _parts(pieces: Iterable[NDArray[Any]], value: int) -> Iterator[NDArray[np.bool_]]:
    """Yield where a mask that comes in pieces has a value, for some positions at a time."""
    for piece in pieces:
        piece = np.asarray(piece)
        if piece.ndim != 1:
            raise ArgumentValueError(f"Mask: a piece has the shape {piece.shape}; expected one value a position.")
        if piece.size and piece.dtype.kind not in "biu":
            raise ArgumentTypeError(f"Mask: the dtype is {piece.dtype}; expected integers or truth values.")
        for begin in range(0, piece.size, _PART):
            yield np.equal(piece[begin : begin + _PART], value)
