"""The blocks of a run, one by one; divided anew when positions take another time, or more memory, than was thought.

What a probe of a few positions tells may be wrong by far where their cost varies. Blocks that are much too long leave
workers idle at the end; blocks that are much too short can be more than are handed out in time to all workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from lazyproc.core.blocks import Block, BlockPlan
from lazyproc.core.runs import Runs
from lazyproc.core.sizing import HANDOUT_SECONDS, LEAST_SECONDS

_WRONG = 1.5
"""Only if positions take so many times longer, or less long, the rest is divided anew."""
_PATIENCE = 3.0
"""A worker may take so many times longer for a block before it gives back the rest of it."""
_LEAST_BLOCKS = 4


class BlockFeed:
    """An iterator over the blocks of a plan, told meanwhile how long they took.

    Parameters
    ----------
    plan : BlockPlan
        What to begin with.
    seconds_per_position : float or None
        What it reckons with; None if that is not known.
    divide : callable
        Divides positions, given how long one takes, into another plan.
    n_workers : int
        How many blocks are computed at the same time. Since the first to come back are the shortest ones, twice as many
        are waited for before anything is concluded.

    Notes
    -----
    Blocks become smaller if positions take longer; larger only if blocks are done faster than workers get new ones.
    What they may hold at most for the sake of memory is for others to know (`resize`).

    A worker gives back what it has not begun of a block that takes three times as long as was thought: that comes next,
    in small blocks.
    The blocks are disjoint and hold exactly the positions of the plan, in order but for what was given back; they are
    numbered from 0. Since that may happen after the last one was taken, the iterator may end and go on later. Used by
    one thread. Memory does not depend on how many blocks there are.
    """

    def __init__(
        self,
        plan: BlockPlan,
        seconds_per_position: float | None,
        divide: Callable[[Runs, float | None], BlockPlan],
        n_workers: int,
    ) -> None:
        self._remaining = plan.remaining
        self._blocks = iter(plan)
        self._given_back: deque[Iterator[Block]] = deque()
        self._expected = seconds_per_position
        self._divide = divide
        self._set_workers(n_workers)
        self._next = 0
        self._stop = 0
        self._most: int | None = None
        self._forget()

    def _set_workers(self, n_workers: int) -> None:
        self._n_workers = n_workers
        self._least = max(LEAST_SECONDS, n_workers * HANDOUT_SECONDS)

    def _forget(self) -> None:
        self._n_blocks, self._n_positions, self._seconds = 0, 0, 0.0

    def __iter__(self) -> Iterator[Block]:
        return self

    def __next__(self) -> Block:
        block = self._next_given_back()
        if block is None:
            block = next(self._blocks)
            self._stop = block.stop
        if self._most is not None and block.n_positions > self._most:
            block, rest = block.split(self._most)
            self._given_back.appendleft(iter([rest]))
        self._next += 1
        return replace(block, index=self._next - 1, limit=self._limit(block.n_positions))

    def _next_given_back(self) -> Block | None:
        while self._given_back:
            block = next(self._given_back[0], None)
            if block is not None:
                return block
            self._given_back.popleft()
        return None

    def _limit(self, n_positions: int) -> float | None:
        if self._expected is None or self._n_workers == 1:
            return None
        return _PATIENCE * max(self._least, self._expected * n_positions)

    def give_back(self, rest: Block) -> None:
        """Take positions that were not begun: they come next."""
        self._given_back.appendleft(iter([rest]))

    def resize(self, most: int) -> None:
        """Divide the rest anew, since memory allows another size than before: so many positions a block at most."""
        self._most = most
        self._divide_rest(self._expected)

    def rest(self) -> Runs:
        """Return the positions of which no block was made yet."""
        return self._remaining.clip(self._stop, 2**63 - 1)

    def share(self, n_workers: int, most: int) -> None:
        """Divide the rest anew, for another number of workers; memory allows so many positions a block."""
        self._set_workers(n_workers)
        self._forget()
        self.resize(most)

    def note(self, n_positions: int, seconds: float, rest: Block | None = None) -> None:
        """Take note of a block that is done: how many positions it had, how long it took, what was given back of it."""
        if rest is not None:
            size = max(1, int(n_positions * 2 * self._least / seconds))
            self._given_back.append(iter(BlockPlan(Runs(rest.starts, rest.stops), size)))
        self._n_blocks += 1
        self._n_positions += n_positions
        self._seconds += seconds
        if self._n_blocks >= max(_LEAST_BLOCKS, 2 * self._n_workers):
            measured = self._seconds / self._n_positions
            if self._expected is None or self._is_wrong(measured, self._expected):
                self._divide_rest(measured)
            self._forget()

    def _is_wrong(self, measured: float, expected: float) -> bool:
        if measured < expected:
            return measured * _WRONG < expected and self._seconds / self._n_blocks < self._n_workers * HANDOUT_SECONDS
        return measured > expected * _WRONG

    def _divide_rest(self, seconds: float | None) -> None:
        self._expected = seconds
        rest = self.rest()
        if rest:
            self._remaining = rest
            self._blocks = iter(self._divide(rest, seconds))
