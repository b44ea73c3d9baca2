"""Which attempt at a block may write it, where a block can be under way twice: the one that took it last.

A cluster's scheduler gives a block to another worker when it hears nothing from the first one, which may well be alive
and finish later. Both would write into the same place, and the late one even after the block was marked done. So each
attempt draws a number, and a small file beside the results has a place of 8 bytes for each block::

    take      the worker, before it computes      puts its number there, unless the block is settled
    write     the worker, when it has computed    only if the number there is its own
    settle    the driver, before it marks         only if the number is that of the receipt; from then on nobody writes

Each holds a lock on the block's place meanwhile, the writer for as long as it writes. So a block that is marked done
does not change anymore, whatever its function returns and whoever else still computes it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from numpy.typing import NDArray

from lazyproc.core.blocks import Block
from lazyproc.core.errors import BlockTakenError
from lazyproc.hdf5.lock import Fence, FencedError
from lazyproc.hdf5.locking import has_range_locks, lock, lock_range, unlock, unlock_range
from lazyproc.hdf5.room import writing
from lazyproc.hdf5.sidecar import open_sidecar

_PLACE_BYTES = 8
_SETTLED = b"\xff" * _PLACE_BYTES
_WAIT_SECONDS = 30.0
"""How long to wait for another attempt that is just writing the block; it may be stopped, or its disk may hang."""


class _Writer(Protocol):
    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> int:
        """Write the rows of a block."""


@dataclass(frozen=True)
class Claims:
    """The sink of workers of which two may have the same block. Small; travels to any worker that sees the file.

    Attributes
    ----------
    sink : Sink
        Where the results go.
    fence : Fence
        Tells whether this run may still write.
    path : str
        The file with the places of the blocks.
    byte_locks : bool
        Ranges of bytes are locked, for an open file, as Linux can. Else the whole file is: one worker writes at a time.
    """

    sink: _Writer
    fence: Fence
    path: str
    byte_locks: bool = sys.platform == "linux" and has_range_locks()

    def begin(self) -> Claims:
        """Make the file, all places empty, and return the claims as they work there. By the driver, with its lock."""
        descriptor = open_sidecar(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            if self._lock(descriptor, 0):
                self._unlock(descriptor, 0)  # by itself: a process forked meanwhile may keep the file open
        except OSError:  # no locks on bytes in this file system; locks on files there are, or there would be no run
            return replace(self, byte_locks=False)
        finally:
            os.close(descriptor)
        return self

    def end(self) -> None:
        """Let nobody write anymore, and remove the file. By the driver, however the run ends."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def take(self, block: Block) -> Attempt:
        """Take a block, away from whoever else has it.

        Raises
        ------
        BlockTakenError
            If the block is settled, or another attempt does not get done with writing it.
        FencedError
            If the run is over.
        """
        number = os.urandom(_PLACE_BYTES - 1) + b"\1"  # neither nobody's nor settled
        with self.fence.passed(), self._place(block) as (descriptor, offset):
            if os.pread(descriptor, _PLACE_BYTES, offset) == _SETTLED:
                raise BlockTakenError(f"The block of positions {block.start} to {block.stop - 1} is done already.")
            with writing(self.path, "which worker has which block"):
                os.pwrite(descriptor, number, offset)
        return Attempt(self, number)

    @contextmanager
    def held(self, block: Block, number: bytes) -> Iterator[None]:
        """Hold the right to write a block for as long as the context lasts.

        Raises
        ------
        BlockTakenError
            If another attempt has taken the block meanwhile, or it is settled.
        FencedError
            If the run is over.
        """
        with self._place(block) as (descriptor, offset):
            if os.pread(descriptor, _PLACE_BYTES, offset) != number:
                raise BlockTakenError(
                    f"The block of positions {block.start} to {block.stop - 1} was given to another worker meanwhile; "
                    "nothing was written."
                )
            yield

    def settle(self, block: Block, number: bytes) -> bool:
        """Let nobody write a block anymore; by the driver, before it marks the block done.

        Returns
        -------
        bool
            False if the block belongs to another attempt by now, so that what the receipt tells no longer counts.
        """
        try:
            with self._place(block) as (descriptor, offset):
                if os.pread(descriptor, _PLACE_BYTES, offset) != number:
                    return False
                self._settle(descriptor, offset)
                return True
        except BlockTakenError:
            return False

    def close(self, block: Block) -> bool:
        """Let nobody write a block that will be done in parts with other numbers; False if somebody just does."""
        try:
            with self._place(block) as (descriptor, offset):
                self._settle(descriptor, offset)
                return True
        except BlockTakenError:
            return False

    def _settle(self, descriptor: int, offset: int) -> None:
        with writing(self.path, "which blocks are done"):
            os.pwrite(descriptor, _SETTLED, offset)

    @contextmanager
    def _place(self, block: Block) -> Iterator[tuple[int, int]]:
        """Hold the lock on a block's place: yields the open file and the offset."""
        offset = _PLACE_BYTES * block.index
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FencedError(f"The run {self.fence.run_id} is over: {self.path} is gone.") from error
        try:
            deadline = time.monotonic() + _WAIT_SECONDS
            pause = 1e-4
            while not self._lock(descriptor, offset):
                if time.monotonic() > deadline:
                    raise BlockTakenError(
                        f"Another worker has been writing the block of positions {block.start} to {block.stop - 1} for "
                        f"more than {_WAIT_SECONDS:g} s: it is stopped, or its file system hangs."
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            try:
                yield descriptor, offset
            finally:
                self._unlock(descriptor, offset)  # by itself: a process forked meanwhile may keep the file open
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, offset: int) -> bool:
        if self.byte_locks:
            return lock_range(descriptor, offset, _PLACE_BYTES)
        return lock(descriptor, self.path, self.fence.locking, exclusive=True)

    def _unlock(self, descriptor: int, offset: int) -> None:
        if self.byte_locks:
            unlock_range(descriptor, offset, _PLACE_BYTES)
        else:
            unlock(descriptor, self.fence.locking)


@dataclass(frozen=True)
class Attempt:
    """One worker's attempt at a block: a sink for this block only.

    Attributes
    ----------
    claims : Claims
        Where the block was taken.
    number : bytes
        What stands in its place as long as it is this attempt's.
    """

    claims: Claims
    number: bytes

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> int:
        """Write the rows of the block as `Sink.write` does.

        Raises
        ------
        BlockTakenError
            If the block is another attempt's by now, or settled. Nothing was written.
        FencedError, ResultsError
            As `Sink.write` does.
        """
        with self.claims.held(block, self.number):
            return self.claims.sink.write(block, arrays)
