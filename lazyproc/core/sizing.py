"""How large blocks are: small enough for memory and to be lost, large enough to be worth sending.

The first ones of many workers are smaller, so that these do not all come back at once; so are the last ones, so that
all workers end at about the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lazyproc.core.blocks import BlockPlan, at_least
from lazyproc.core.errors import ArgumentValueError
from lazyproc.core.runs import Runs

_SHARES = 2
"""In the tail a worker would have at least so many more blocks to do of what is left, if all got equal shares."""
HANDOUT_SECONDS = 0.001
"""What a block costs whoever hands them out, one after the other: measured 0.7-1.2 ms with a distributed scheduler."""
_MANY_WORKERS = 16
"""With so many workers it matters when all blocks come back at once."""
_HEAD_STEPS = 16
"""Sizes of the first blocks, at most."""
_LEAST_BLOCKS, _USUAL_BLOCKS = 4, 16
"""How many blocks each worker should get: at least, and if they are still long enough."""
_USUAL_SECONDS, LEAST_SECONDS = 1.0, 0.05


@dataclass(frozen=True)
class Division:
    """How positions are divided into blocks, whichever are left and however long one takes.

    Attributes
    ----------
    memory_rows : int
        The most positions for which a worker has memory.
    n_workers : int
        How many blocks are computed at the same time.
    align : int
        The rows of a storage chunk; 1 if there are no chunks.
    bytes_per_position : int
        Bytes that a position has in the main dataset and in the results.
    preferred_bytes : int
        How many of them a block should have at most.
    interval : float
        Seconds between commits.
    """

    memory_rows: int
    n_workers: int
    align: int
    bytes_per_position: int
    preferred_bytes: int
    interval: float

    def within(self, memory_rows: int, careful_rows: int) -> Division:
        """Return the same with blocks that memory allows: at most, and where storage chunks do not ask for more."""
        careful_bytes = max(1, careful_rows * self.bytes_per_position)
        return replace(self, memory_rows=memory_rows, preferred_bytes=min(self.preferred_bytes, careful_bytes))

    @property
    def largest(self) -> int:
        """Positions of a block at most, as far as memory and preferred bytes are concerned."""
        size = max(1, min(self.memory_rows, self.preferred_bytes // self.bytes_per_position))
        return max(size, self.align) if self.align <= self.memory_rows else size

    def plan(self, remaining: Runs, seconds_per_position: float | None, *, begins: bool = False) -> BlockPlan:
        """Divide positions, each of which takes so many seconds; None if that is not known.

        `begins` tells that no worker has a block yet.
        """
        n_remaining = max(1, remaining.n_positions)
        target_seconds, least_seconds = block_seconds(self.n_workers, self.interval)
        size = positions_per_block(
            memory_rows=self.memory_rows,
            n_remaining=n_remaining,
            n_workers=self.n_workers,
            align=self.align,
            seconds_per_position=seconds_per_position,
            bytes_per_position=self.bytes_per_position,
            target_seconds=target_seconds,
            least_seconds=least_seconds,
            preferred_bytes=self.preferred_bytes,
        )
        tail = tail_of(
            size,
            n_remaining=n_remaining,
            n_workers=self.n_workers,
            align=self.align,
            seconds_per_position=seconds_per_position,
            least_seconds=least_seconds,
        )
        head = head_of(size, n_remaining=n_remaining, n_workers=self.n_workers, align=self.align) if begins else ()
        return BlockPlan(remaining, size, align=self.align, sizes=(*head, *tail))


def block_seconds(n_workers: int, interval: float) -> tuple[float, float]:
    """Choose how long a block should take, and how long at least, in the tail.

    About a second: what is lost when a worker dies is a block, and progress is seen block by block. A quarter of the
    interval between commits, if that is less. More with many workers: while one of them does a block, all the others
    must be given theirs, and that should keep the scheduler busy for a quarter of the time; in the tail, all of it.

    Parameters
    ----------
    n_workers : int
        How many blocks are computed at the same time.
    interval : float
        Seconds between commits.

    Examples
    --------
    >>> block_seconds(8, interval=10.0), block_seconds(512, interval=10.0)
    ((1.0, 0.05), (2.048, 0.512))
    """
    round_seconds = n_workers * HANDOUT_SECONDS
    usual = min(_USUAL_SECONDS, max(LEAST_SECONDS, interval / 4))
    return max(usual, 4 * round_seconds), max(LEAST_SECONDS, round_seconds)


def positions_per_block(
    *,
    memory_rows: int,
    n_remaining: int,
    n_workers: int,
    align: int,
    seconds_per_position: float | None,
    bytes_per_position: int,
    target_seconds: float = 1.0,
    least_seconds: float = LEAST_SECONDS,
    preferred_bytes: int = 16 * 2**20,
) -> int:
    """Choose how many positions a block may hold.

    The smallest of these limits counts, and each has its reason:

    - `memory_rows`: the promise about memory. Nothing below may exceed it.
    - `preferred_bytes`: larger reads are not faster, and leave the processor's caches.
    - `target_seconds`: what is lost when a worker dies is a block, and progress is seen block by block. Much shorter
      blocks would be dominated by the cost of scheduling them.
    - `n_workers`: with one block a worker all would wait for the slowest one; with few, too, if some positions take a
      hundred times as long as others. But not so many that a block would take less than four times `least_seconds`.

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
        Bytes that a position has in the main dataset, and in the results.
    target_seconds : float, optional
        How long a block should take at most.
    least_seconds : float, optional
        How long a block should take at least, in the tail.
    preferred_bytes : int, optional
        How many of these bytes a block should have at most.

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
    memory_rows = at_least(1, "positions_per_block: memory_rows", memory_rows)
    n_remaining = at_least(0, "positions_per_block: n_remaining", n_remaining)
    n_workers = at_least(1, "positions_per_block: n_workers", n_workers)
    align = at_least(1, "positions_per_block: align", align)
    bytes_per_position = at_least(1, "positions_per_block: bytes_per_position", bytes_per_position)
    seconds = 0.0 if seconds_per_position is None else seconds_per_position
    if not seconds >= 0 or not target_seconds > 0:
        raise ArgumentValueError(
            f"positions_per_block: seconds_per_position is {seconds_per_position} and target_seconds {target_seconds}; "
            "expected times above 0, or None for a time that is not known."
        )
    share = -(-n_remaining // (n_workers * _LEAST_BLOCKS))
    size = max(1, min(memory_rows, preferred_bytes // bytes_per_position, share))
    if size * seconds > target_seconds:
        size = max(1, int(target_seconds / seconds))
    if size * seconds > 4 * least_seconds:
        share = -(-n_remaining // (n_workers * _USUAL_BLOCKS))
        size = min(size, max(share, int(4 * least_seconds / seconds), 1))
    if size >= align:
        return size - size % align
    if align <= memory_rows and align * seconds <= 4 * target_seconds:
        return align
    return size


def head_of(size: int, *, n_remaining: int, n_workers: int, align: int) -> tuple[tuple[int, int], ...]:
    """Choose smaller blocks for the beginning, so that workers do not all end theirs at the same time.

    Each worker's first block gets another share of the usual size, from little to all of it. The next ones are alike,
    and so workers come one after the other for as long as positions cost about the same: those who hand out blocks and
    take receipts are then busy evenly. With 512 simulated workers that ended their blocks together, a worker waited
    for 65 ms between two blocks; with these first ones for 47 ms.

    Parameters
    ----------
    size : int
        Positions of a block later; as from `positions_per_block`.
    n_remaining : int
        How many positions are to be computed.
    n_workers : int
        How many blocks are computed at the same time.
    align : int
        The rows of a storage chunk; 1 if there are no chunks.

    Returns
    -------
    tuple of (int, int)
        The first ``sizes`` of a `BlockPlan` with ``max_positions=size``, which come before those of `tail_of`; empty
        for few workers, or if they get only few blocks each.

    Examples
    --------
    >>> head_of(4, n_remaining=10**6, n_workers=100, align=1)
    ((1000000, 1), (999975, 2), (999925, 3), (999850, 4))
    """
    if n_workers < _MANY_WORKERS or n_remaining < 2 * _SHARES * n_workers * size:
        return ()
    steps = min(_HEAD_STEPS, size // align)
    if steps < 2:
        return ()
    pairs, left = [], n_remaining
    for step in range(steps):
        share = size * (step + 1) // steps
        share -= share % align
        pairs.append((left, share))
        left -= share * (n_workers * (step + 1) // steps - n_workers * step // steps)
    return tuple(pairs)


def tail_of(
    size: int,
    *,
    n_remaining: int,
    n_workers: int,
    align: int,
    seconds_per_position: float | None,
    least_seconds: float,
) -> tuple[tuple[int, int], ...]:
    """Choose how blocks become smaller toward the end, so that all workers end at about the same time.

    As long as much is left, it does not matter that some blocks take a hundred times as long as others: whoever ends
    early takes the next one. What is lost is the time in which the last block is waited for. So a block holds at most
    half of an equal share of what is left for each worker: the size is halved again and again as that falls.
    The end of it is a block that takes about `least_seconds`, or one storage chunk, which would be decoded as a whole
    for each of its parts.

    Parameters
    ----------
    size : int
        Positions of a block while much is left; as from `positions_per_block`.
    n_remaining : int
        How many positions are to be computed.
    n_workers : int
        How many blocks are computed at the same time.
    align : int
        The rows of a storage chunk; 1 if there are no chunks.
    seconds_per_position : float or None
        As measured by a probe, on one worker; None if not known: then blocks are halved three times.
    least_seconds : float
        A block that takes less is not worth sending.

    Returns
    -------
    tuple of (int, int)
        The last ``sizes`` of a `BlockPlan` with ``max_positions=size``; empty for a single worker.

    Examples
    --------
    >>> tail_of(100, n_remaining=10**6, n_workers=8, align=1, seconds_per_position=0.01, least_seconds=0.2)
    ((1600, 50), (800, 25), (400, 20))
    """
    if n_workers == 1:
        return ()
    if seconds_per_position is None:
        least = size // 8
    else:
        least = int(least_seconds / seconds_per_position) if seconds_per_position * size > least_seconds else size
    pairs: list[tuple[int, int]] = []
    while size > max(1, least):
        smaller = max(1, least, size // 2)
        if smaller >= align:
            smaller -= smaller % align
        elif size >= align:
            smaller = align
        if smaller == size:
            break
        left = _SHARES * n_workers * size
        if left <= n_remaining:
            pairs.append((left, smaller))
        size = smaller
    return tuple(pairs)
