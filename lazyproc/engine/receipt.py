"""What a worker reports of a block that it has done, or has not been able to do."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from lazyproc.core.blocks import Block
from lazyproc.core.failed import FailedPosition
from lazyproc.engine.failure import Failure


@dataclass
class Receipt:
    """What a worker reports of a block.

    Attributes
    ----------
    block : Block
        Which positions.
    rest : Block or None
        Those that the worker gives back: it has taken long for the others, or memory allows fewer by now.
    worker : str
        Host, process and thread that did it.
    seconds : float
        How long it took, reading and writing included.
    checksum : int
        Of the first bytes written, so that the driver can see whether they arrived.
    taken : int
        Bytes of memory that the block took at most, over what its process had at first; 0 if not known.
    taken_by_all : int
        The same of all blocks in its process together.
    arrays : tuple of ndarray or None
        The results, where the driver writes; taken away once they are written.
    failure : Failure or None
        Why there are no results.
    failed : tuple of FailedPosition
        Positions whose function failed; they have the fill value.
    example : Failure or None
        What the first of these raised.
    attempt : bytes
        The number of the attempt, where these are told apart.
    """

    block: Block
    worker: str = ""
    seconds: float = 0.0
    checksum: int = 0
    arrays: tuple[NDArray[Any], ...] | None = field(default=None, repr=False)
    failure: Failure | None = None
    failed: tuple[FailedPosition, ...] = ()
    example: Failure | None = None
    attempt: bytes = b""
    rest: Block | None = None
    taken: int = 0
    taken_by_all: int = 0

    @property
    def out_of_memory(self) -> bool:
        """Whether the block, or a position of it, failed for lack of memory: elsewhere, or later, it may not."""
        failures = (self.failure, self.example)
        return any(isinstance(one.error, MemoryError) for one in failures if one is not None)

    @property
    def is_from_here(self) -> bool:
        """Whether the block was done in this process."""
        return self.worker.startswith(f"{this_process()}:")


def this_process() -> str:
    """Return the host and the number of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"
