"""The division of the remaining positions into blocks: disjoint, in order, on the edges of storage chunks.

A block is what one task reads, computes and writes. Pure integers: the same positions and limits always give the same
blocks, and no more of them exist at a time than the caller holds.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError
from lazyproc.core.runs import Runs


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

    Examples
    --------
    >>> list(Block(0, (10, 20), (14, 21)).offsets())
    [(10, 14, 0), (20, 21, 4)]
    """

    index: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    def __reduce__(self) -> tuple[type[Block], tuple[int, tuple[int, ...], tuple[int, ...]]]:
        return Block, (self.index, self.starts, self.stops)

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

    @property
    def is_contiguous(self) -> bool:
        """Whether it is one run, that is, one slice of the main dataset."""
        return len(self.starts) == 1

    def runs(self) -> Iterator[tuple[int, int]]:
        """Its runs: (start, stop) of each."""
        return zip(self.starts, self.stops, strict=True)

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

    Raises
    ------
    ArgumentTypeError
        If `remaining` is not a `Runs`, or a limit is not an integer.
    ArgumentValueError
        If a limit is less than 1.

    Examples
    --------
    >>> plan = BlockPlan(Runs([10], [200]), max_positions=100, align=64)
    >>> [(block.start, block.stop) for block in plan], plan.count()
    ([(10, 64), (64, 128), (128, 200)], 3)
    """

    remaining: Runs
    max_positions: int
    align: int = 1
    max_runs: int = 512

    def __post_init__(self) -> None:
        if not isinstance(self.remaining, Runs):
            raise ArgumentTypeError(f"BlockPlan: remaining is {self.remaining!r}; expected Runs.")
        for name in ("max_positions", "align", "max_runs"):
            object.__setattr__(self, name, _at_least(1, f"BlockPlan: {name}", getattr(self, name)))

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
        """How many blocks there are: by arithmetic within a run, so it takes a time that depends on the runs only."""
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
    """

    __slots__ = (
        "align", "before", "chunk_stop", "max_positions", "max_runs", "n_positions", "n_runs", "position", "run",
        "starts", "stops",
    )  # fmt: skip

    def __init__(self, plan: BlockPlan) -> None:
        # An item of `data`, a memoryview, is a plain int: several times quicker than NumPy's, and nothing is copied.
        self.starts = plan.remaining.starts.data
        self.stops = plan.remaining.stops.data
        self.before = plan.remaining.before.data
        self.n_runs, self.n_positions = len(plan.remaining), plan.remaining.n_positions
        self.max_positions, self.max_runs, self.align = plan.max_positions, plan.max_runs, plan.align
        self.run = 0
        self.position: int = self.starts[0] if self.n_runs else 0
        self.chunk_stop: int | None = None

    @property
    def done(self) -> bool:
        """Whether nothing remains."""
        return self.run >= self.n_runs

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
        rank = self.before[run] + (position - self.starts[run]) + self.max_positions
        rank = min(rank, self.before[beyond])
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

        At least one position of the run is left, so that what happens at its end is up to `cut`.
        """
        size, align, stop = self.max_positions, self.align, self.stops[self.run]
        left = stop - self.position
        if self.chunk_stop is not None:
            # Within a divided chunk: full blocks, but for the last one.
            blocks = (min(stop, self.chunk_stop) - self.position - 1) // size
            self.position += blocks * size
        elif self.position % align:
            return 0
        elif size < align:
            # Whole chunks, each divided in the same way.
            chunks = (left - 1) // align
            blocks = chunks * -(-align // size)
            self.position += chunks * align
        else:
            # As many whole chunks as fit, as long as something in the run does not fit.
            step = size - size % align
            blocks = max(0, -(-(left - size) // step))
            self.position += blocks * step
        return blocks


def positions_per_block(
    *,
    memory_rows: int,
    n_remaining: int,
    n_workers: int,
    align: int,
    seconds_per_position: float | None,
    bytes_per_position: int,
    target_seconds: float = 1.0,
    preferred_bytes: int = 16 * 2**20,
    least_blocks_per_worker: int = 4,
) -> int:
    """Choose how many positions a block may hold.

    The smallest of these limits counts, and each has its reason:

    - `memory_rows`: the promise about memory. Nothing below may exceed it.
    - `preferred_bytes`: larger reads are not faster, and leave the processor's caches.
    - `target_seconds`: what is lost when a worker dies is a block, and progress is seen block by block. Much shorter
      blocks would be dominated by the cost of scheduling them.
    - `least_blocks_per_worker`: with one block a worker all would wait for the slowest one.

    Then the storage chunks, which are read and decoded as a whole: a size of a chunk or more is rounded down to whole
    chunks, which is what a block could use anyway. A smaller one is raised to one chunk, since each block of a divided
    chunk decodes all of it again; but not above `memory_rows`, and not if the chunk is known to take more than
    four times `target_seconds`: then decoding is the small part of the work.

    Parameters
    ----------
    memory_rows : int
        The most positions for which a worker has memory.
    n_remaining : int
        How many positions are to be computed.
    n_workers : int
        How many blocks are computed at the same time.
    align : int
        The rows of a storage chunk; 1 if there are no chunks.
    seconds_per_position : float or None
        As measured by a probe, on one worker; None if not known.
    bytes_per_position : int
        Bytes that a position has in the main dataset.
    target_seconds : float, optional
        How long a block should take at most.
    preferred_bytes : int, optional
        How many bytes of the main dataset a block should have at most.
    least_blocks_per_worker : int, optional
        How many blocks each worker should get at least.

    Returns
    -------
    int
        From 1 to `memory_rows`: the ``max_positions`` of a `BlockPlan`.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a number is not an integer, or is less than it can be. `memory_rows` of 0 is refused too: a
        block of one position would break the promise about memory.

    Examples
    --------
    >>> positions_per_block(memory_rows=100_000, n_remaining=10**6, n_workers=2, align=64,
    ...                     seconds_per_position=0.001, bytes_per_position=2048)
    960
    """
    memory_rows = _at_least(1, "positions_per_block: memory_rows", memory_rows)
    n_remaining = _at_least(0, "positions_per_block: n_remaining", n_remaining)
    n_workers = _at_least(1, "positions_per_block: n_workers", n_workers)
    align = _at_least(1, "positions_per_block: align", align)
    bytes_per_position = _at_least(1, "positions_per_block: bytes_per_position", bytes_per_position)
    least = _at_least(1, "positions_per_block: least_blocks_per_worker", least_blocks_per_worker)
    seconds = 0.0 if seconds_per_position is None else seconds_per_position
    if not seconds >= 0 or not target_seconds > 0:
        raise ArgumentValueError(
            f"positions_per_block: seconds_per_position is {seconds_per_position} and target_seconds {target_seconds}; "
            "expected times above 0, or None for a time that is not known."
        )
    size = max(1, min(memory_rows, preferred_bytes // bytes_per_position, -(-n_remaining // (n_workers * least))))
    if size * seconds > target_seconds:
        size = max(1, int(target_seconds / seconds))
    if size >= align:
        return size - size % align
    if align <= memory_rows and align * seconds <= 4 * target_seconds:
        return align
    return size


def _at_least(least: int, name: str, value: int) -> int:
    """Return a value as a plain int, if it is an integer and not less than it can be."""
    try:
        plain = operator.index(value)
    except TypeError as error:
        raise ArgumentTypeError(f"{name} is {value!r}; expected an integer.") from error
    if plain < least:
        raise ArgumentValueError(f"{name} is {plain}; expected {least} or more.")
    return plain
