"""The division of the remaining positions into blocks: disjoint, in order, on the edges of storage chunks.

A block is what one task reads, computes and writes. Pure integers: the same positions and limits always give the same
blocks, and no more of them exist at a time than the caller holds. How large they should be: `lazyproc.core.sizing`.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError
from lazyproc.core.runs import Runs

_SIZES = "BlockPlan: sizes"


@dataclass(frozen=True, slots=True)
class Block:
    """The positions that are read, computed and committed together.

    Its rows are those of its runs, one run after the other: row 0 is the first position of the first run.
    Nothing but plain integers, so it travels to a worker in some dozen bytes and a few more for each run.

    Attributes
    ----------
    index : int
        Which block of its plan it is, from 0.
    starts : tuple of int
        The first position of each run, in order.
    stops : tuple of int
        The last position of each run, plus one.
    limit : float or None
        Seconds of computing after which a worker gives back the positions that it has not begun; None: never.

    Examples
    --------
    >>> list(Block(0, (10, 20), (14, 21)).offsets())
    [(10, 14, 0), (20, 21, 4)]
    """

    index: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    limit: float | None = None

    def __reduce__(self) -> tuple[type[Block], tuple[Any, ...]]:
        fields = (self.index, self.starts, self.stops)
        return Block, fields if self.limit is None else (*fields, self.limit)

    @property
    def n_positions(self) -> int:
        """How many positions, and so rows, it has."""
        return sum(self.stops) - sum(self.starts)

    @property
    def start(self) -> int:
        """Its first position."""
        return self.starts[0]

    @property
    def stop(self) -> int:
        """Its last position, plus one."""
        return self.stops[-1]

    @classmethod
    def of(cls, runs: Runs) -> Block:
        """Return the positions of some runs as one block."""
        return cls(0, tuple(runs.starts.tolist()), tuple(runs.stops.tolist()))

    def runs(self) -> Iterator[tuple[int, int]]:
        """Its runs: (start, stop) of each."""
        return zip(self.starts, self.stops, strict=True)

    def split(self, n: int) -> tuple[Block, Block]:
        """Return a block of its first `n` positions, at least one, and a block of the others, at least one."""
        place, cut = next(
            (place, start + n - place) for start, stop, place in self.offsets() if n <= place + stop - start
        )
        run = next(number for number, (_, _, offset) in enumerate(self.offsets()) if offset == place)
        first = replace(self, starts=self.starts[: run + 1], stops=(*self.stops[:run], cut))
        if cut == self.stops[run]:
            return first, replace(self, starts=self.starts[run + 1 :], stops=self.stops[run + 1 :])
        return first, replace(self, starts=(cut, *self.starts[run + 1 :]), stops=self.stops[run:])

    def join(self, later: Block | None) -> Block:
        """Return this block with the positions of another one, which come after its own."""
        if later is None:
            return self
        if self.stop < later.start:
            return replace(self, starts=self.starts + later.starts, stops=self.stops + later.stops)
        return replace(self, starts=self.starts + later.starts[1:], stops=self.stops[:-1] + later.stops)

    def offsets(self) -> Iterator[tuple[int, int, int]]:
        """Its runs, and where their rows lie within the rows of the block: (start, stop, offset) of each."""
        offset = 0
        for start, stop in self.runs():
            yield start, stop, offset
            offset += stop - start


@dataclass(frozen=True)
class BlockPlan:
    """The remaining positions, divided into blocks; iterating makes the blocks one by one, each time from the first.

    The blocks are disjoint, in order, and hold exactly the remaining positions. A storage chunk is never shared by two
    blocks, since each of them would read and decode all of it, unless what remains of that chunk alone is more than a
    block may hold: then the chunk has several blocks to itself, which hold nothing of any other chunk.
    Holes do not end a block: many scattered positions become a few blocks.

    Parameters
    ----------
    remaining : Runs
        The positions to divide.
    max_positions : int
        The most positions that a block may hold.
    align : int, optional
        The rows of a storage chunk. Chunks begin at absolute multiples of it, whatever remains. Default: 1, for
        storage that has no chunks.
    max_runs : int, optional
        The most runs that a block may hold: it bounds the reads of a block and the size of its description.
    sizes : tuple of (int, int), optional
        Smaller blocks at the beginning and toward the end, so that not all workers end their blocks at the same
        time, but all of them the last one: ``(left, size)`` means that a block before which no more than `left`
        positions are left holds at most `size` of them. `left` falls from pair to pair; the last pair that applies
        counts. See `head_of` and `tail_of` in `lazyproc.core.sizing`.

    Raises
    ------
    ArgumentTypeError
        If `remaining` is not a `Runs`, or a limit is not an integer.
    ArgumentValueError
        If a limit is less than 1, a size is more than `max_positions`, or what is left does not fall.

    Examples
    --------
    >>> plan = BlockPlan(Runs([10], [200]), max_positions=100, align=64)
    >>> [(block.start, block.stop) for block in plan], plan.count()
    ([(10, 64), (64, 128), (128, 200)], 3)
    >>> [block.n_positions for block in BlockPlan(Runs.full(20), 8, sizes=((12, 4), (4, 1)))]
    [8, 4, 4, 1, 1, 1, 1]
    """

    remaining: Runs
    max_positions: int
    align: int = 1
    max_runs: int = 512
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.remaining, Runs):
            raise ArgumentTypeError(f"BlockPlan: remaining is {self.remaining!r}; expected Runs.")
        for name in ("max_positions", "align", "max_runs"):
            object.__setattr__(self, name, at_least(1, f"BlockPlan: {name}", getattr(self, name)))
        pairs = tuple((at_least(1, _SIZES, left), at_least(1, _SIZES, size)) for left, size in self.sizes)
        lefts = [self.remaining.n_positions + 1, *(left for left, _ in pairs)]
        falls = all(left < more for more, left in pairwise(lefts))
        if not falls or any(size > self.max_positions for _, size in pairs):
            raise ArgumentValueError(
                f"{_SIZES} is {self.sizes}, with max_positions {self.max_positions} and {self.remaining.n_positions} "
                "positions; expected pairs (left, size), left falling and not above the number of positions, size not "
                "above max_positions."
            )
        object.__setattr__(self, "sizes", pairs)

    def __iter__(self) -> Iterator[Block]:
        walk = _Walk(self)
        index = 0
        while not walk.done:
            first, start = walk.run, walk.position
            last, stop = walk.cut()
            if first == last:
                yield Block(index, (start,), (stop,))
            else:
                yield Block(index, (start, *walk.starts[first + 1 : last + 1]), (*walk.stops[first:last], stop))
            index += 1

    def count(self) -> int:
        """How many blocks there are: by arithmetic, in a time that depends on the runs and on the sizes only."""
        walk = _Walk(self)
        blocks = 0
        while not walk.done:
            blocks += walk.skip() + 1
            walk.cut()
        return blocks


class _Walk:
    """A place among the remaining positions, the beginning of the next block, which moves on block by block.

    Attributes
    ----------
    run, position : int
        The run, and the position in it, where the next block begins.
    chunk_stop : int or None
        The end of the storage chunk, while it is being divided among several blocks.
    size, until : int
        The most positions of the next block, and of all blocks before which less than `until` positions lie.
    """

    __slots__ = (
        "align", "before", "chunk_stop", "max_runs", "n_positions", "n_runs", "next_size", "position", "run", "size",
        "sizes", "starts", "stops", "until",
    )  # fmt: skip

    def __init__(self, plan: BlockPlan) -> None:
        # An item of `data`, a memoryview, is a plain int: several times quicker than NumPy's, and nothing is copied.
        self.starts = plan.remaining.starts.data
        self.stops = plan.remaining.stops.data
        self.before = plan.remaining.before.data
        self.n_runs, self.n_positions = len(plan.remaining), plan.remaining.n_positions
        self.max_runs, self.align = plan.max_runs, plan.align
        self.size = plan.max_positions
        self.sizes = iter([*((self.n_positions - left, size) for left, size in plan.sizes), (self.n_positions, 0)])
        self.until, self.next_size = next(self.sizes)
        self.run = 0
        self.position: int = self.starts[0] if self.n_runs else 0
        self.chunk_stop: int | None = None

    @property
    def done(self) -> bool:
        """Whether nothing remains."""
        return self.run >= self.n_runs

    def rank(self) -> int:
        """Return how many positions lie before the next block."""
        rank: int = self.before[self.run] + (self.position - self.starts[self.run])
        return rank

    def cut(self) -> tuple[int, int]:
        """Go to the end of the block that begins here; return its last run, and where it stops in that run.

        Greedy: the block takes whole chunks as long as they fit.

            p           position, the beginning           |    |    chunk edges
            n           the first position that does not fit anymore

            |  p###|####|## n##|   end on the last edge before n
            |  p## ## n |          no edge between: this chunk alone is too much, end at n, and until the
                                   chunk is used up let no block go beyond its edge
        """
        run, position = self.run, self.position
        beyond = min(run + self.max_runs, self.n_runs)
        rank = self.rank()
        while rank >= self.until:
            self.size = self.next_size
            self.until, self.next_size = next(self.sizes)
        rank = min(rank + self.size, self.before[beyond])
        if rank < self.n_positions:
            holder = bisect_right(self.before, rank, run, beyond + 1) - 1
            unfit = self.starts[holder] + (rank - self.before[holder])
            end = unfit - unfit % self.align
            if end <= position:
                end = unfit
                self.chunk_stop = position - position % self.align + self.align
        else:
            end = self.stops[self.n_runs - 1]
        if self.chunk_stop is not None:
            end = min(end, self.chunk_stop)
        last = bisect_left(self.starts, end, run + 1, beyond) - 1
        stop = min(end, self.stops[last])
        self._go(last, stop)
        return last, stop

    def _go(self, run: int, position: int) -> None:
        """Begin the next block at a position of a run, or with the next run if that one is used up."""
        if position == self.stops[run]:
            run += 1
            position = self.starts[run] if run < self.n_runs else position
        self.run, self.position = run, position
        if self.chunk_stop is not None and position >= self.chunk_stop:
            self.chunk_stop = None

    def skip(self) -> int:
        """Leap over blocks that lie wholly within the current run and are all alike; return how many.

        At least one position of the run is left, so that what happens at its end is up to `cut`; and so is a block
        that begins where the size of blocks changes.
        """
        size, align = self.size, self.align
        alike = self.until - self.rank()
        if alike <= 0:
            return 0
        left = self.stops[self.run] - self.position
        if self.chunk_stop is not None:
            # Within a divided chunk: full blocks, but for the last one.
            blocks = min((min(left, self.chunk_stop - self.position) - 1) // size, -(-alike // size))
            self.position += blocks * size
        elif self.position % align:
            return 0
        elif size < align:
            # Whole chunks, each divided in the same way.
            chunks = min(left - 1, alike) // align
            blocks = chunks * -(-align // size)
            self.position += chunks * align
        else:
            # As many whole chunks as fit, as long as something in the run does not fit.
            step = size - size % align
            blocks = max(0, min(-(-(left - size) // step), -(-alike // step)))
            self.position += blocks * step
        return blocks


def at_least(least: int, name: str, value: int) -> int:
    """Return a value as a plain int, if it is an integer and not less than it can be."""
    try:
        plain = operator.index(value)
    except TypeError as error:
        raise ArgumentTypeError(f"{name} is {value!r}; expected an integer.") from error
    if plain < least:
        raise ArgumentValueError(f"{name} is {plain}; expected {least} or more.")
    return plain
