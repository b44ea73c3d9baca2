"""Ranks that have opened one file together (`driver="mpio"`): agreement, and blocks handed out by a shared counter.

The ranks run the same script. What only one may do (the lock, the search, the probe) rank 0 does, and tells the others
what came of it, errors too. Blocks are taken from a counter that all ranks raise: whoever is free takes the next one.
"""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from lazyproc.core.blocks import Block
from lazyproc.core.errors import Interrupted, LazyprocError
from lazyproc.engine.block_function import run_block
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.receipt import Receipt
from lazyproc.engine.world import LOST, code_of, flush

_STOP = 2**40
"""Raises the counter beyond all blocks; millions of ranks may do so, and more than once, before it overflows."""

_PATIENCE_SECONDS = 10.0
"""How long a rank that leaves with an error waits for the others to leave, too."""
_FIRST_PAUSE, _LAST_PAUSE = 1e-4, 0.05

T = TypeVar("T")
log = logging.getLogger("lazyproc")


class Ranks:
    """The ranks of a communicator, all of which call the same methods in the same order.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        A communicator of our own: no message of the script's can be mistaken for one of ours. Freed in the end.
    """

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        self._comm = MPI.Intracomm(comm)
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self._agreed: BaseException | None = None

    @contextmanager
    def ending_all(self) -> Iterator[None]:
        """End all ranks at once if this one fails on its own, else leave alike."""
        with self.leaving_alike():
            try:
                yield
            except BaseException as error:
                if error is not self._agreed and not isinstance(error, Interrupted | SystemExit):
                    self._end_all(error)
                raise

    @contextmanager
    def leaving_alike(self) -> Iterator[None]:
        """Let all ranks leave the context alike: each with an error of its own, or all without one.

        Notes
        -----
        A rank that leaves with an error waits a few seconds for the others, which may be about to leave with the same
        one, and ends all ranks if they do not. One without an error waits for as long as the others take.
        """
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failed = error
            raise
        finally:
            self._meet(failed)
            self._comm.Free()

    def _meet(self, error: BaseException | None) -> None:
        """Wait for all ranks, and end them if only some have an error."""
        import numpy as np

        mine, failed = np.array([error is not None], np.int8), np.zeros(self.size, np.int8)
        meeting = self._comm.Iallgather(mine, failed)
        deadline, pause = math.inf if error is None else time.monotonic() + _PATIENCE_SECONDS, _FIRST_PAUSE
        while not meeting.Test():
            if error is not None and time.monotonic() > deadline:
                self._end_all(error)
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
        if failed.any() and not failed.all():
            if error is None:
                time.sleep(_PATIENCE_SECONDS)  # those that failed say why, and end this rank, too
            self._end_all(error)

    def _end_all(self, error: BaseException | None) -> None:
        """End all ranks, this one too, in the middle of whatever they do."""
        what = "other ranks have" if error is None else "it alone has"
        log.critical("rank %d of %d: %s failed, which ends all", self.rank, self.size, what, exc_info=error)
        flush()
        code = code_of(error) or LOST
        _without_farewell(code)
        self._comm.Abort(code)

    def once(self, action: Callable[[], T]) -> T:
        """Do something in rank 0 only, and return on all ranks what came of it.

        Raises
        ------
        Exception
            What was raised in rank 0, on all ranks.
        """
        told: tuple[bool, bytes] = False, b""
        failed: BaseException | None = None
        if self.rank == 0:
            try:
                told = True, pickle.dumps(action())
            except Exception as error:
                failed, told = error, (False, _dumps(error))
        fine, content = self._comm.bcast(told, root=0)
        if fine:
            result: T = pickle.loads(content)
            return result
        self._raise(failed or pickle.loads(content))
        raise AssertionError

    def first(self, value: T) -> T:
        """Return rank 0's value on all ranks; for what all find by calls that are collective."""
        found: T = self._comm.bcast(value, root=0)
        return found

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order, on all of them."""
        found: list[Any] = self._comm.allgather(value)
        return found

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Take what is raised in the context for something that all ranks raise."""
        try:
            yield
        except BaseException as error:
            self._agreed = error
            raise

    def _raise(self, error: BaseException) -> None:
        self._agreed = error
        raise error

    def counter(self) -> WindowCounter:
        """Return a counter in the memory of rank 0, at 0; collective."""
        return WindowCounter(self._comm)


class Counter(Protocol):
    """A number that all ranks share, at 0 in the beginning. Any of them may raise it at any time."""

    def next(self) -> int:
        """Raise it by one, and return what it was before."""

    def stop(self) -> None:
        """Let no rank take anything more."""

    def free(self) -> None:
        """Give back what it takes; on all ranks, when none uses it any more."""


class WindowCounter:
    """A number in rank 0's memory, raised by one-sided communication. Made and freed by all ranks together.

    Notes
    -----
    While rank 0 computes a block, the others may have to wait: MPI libraries answer for it only when it calls them.
    """

    def __init__(self, comm: Any) -> None:
        import numpy as np
        from mpi4py import MPI

        self._mpi = MPI
        self._window = MPI.Win.Allocate(8 if comm.Get_rank() == 0 else 0, 8, comm=comm)
        self._result = np.zeros(1, np.int64)
        if comm.Get_rank() == 0:
            self._window.Lock(0)
            np.asarray(self._window.tomemory(), np.uint8).view(np.int64)[:] = 0
            self._window.Unlock(0)
        comm.Barrier()

    def next(self, by: int = 1) -> int:
        """Raise it, and return what it was before."""
        import numpy as np

        self._window.Lock(0)
        self._window.Fetch_and_op(np.array([by], np.int64), self._result, 0, 0, self._mpi.SUM)
        self._window.Unlock(0)
        return int(self._result[0])

    def stop(self) -> None:
        """Let no rank take anything more."""
        self.next(_STOP)

    def free(self) -> None:
        """Give the memory back; on all ranks."""
        self._window.Free()


def run_shared(
    kernel: Kernel,
    blocks: Iterable[Block],
    counter: Counter,
    stopping: Callable[[], bool],
    passed: Callable[[int], None],
) -> Iterator[Receipt]:
    """Do, in this rank, the blocks whose numbers it draws from the counter.

    Parameters
    ----------
    kernel : Kernel
        What is done to a block.
    blocks : iterable of Block
        All of them, the same on all ranks.
    counter : Counter
        Hands out their numbers.
    stopping : callable
        Tells whether nothing new shall be started, here or on any rank.
    passed : callable
        Is told the positions of blocks that others have taken.
    """
    wanted = -1
    try:
        for number, block in enumerate(blocks):
            if wanted < number:
                if stopping():
                    break
                wanted = counter.next()
            if wanted > number:
                passed(block.n_positions)
                continue
            receipt = run_block(kernel, block)
            if receipt.failure is not None:
                counter.stop()
            yield receipt
    finally:
        if stopping():
            counter.stop()


def _without_farewell(code: int) -> None:
    """Let the process end without closing files: HDF5 would do so at exit, together with ranks that do not come."""
    import ctypes

    library = ctypes.CDLL(None)
    leave = ctypes.cast(library._exit, ctypes.c_void_p)
    at_exit = getattr(library, "__cxa_atexit")  # not atexit, which programs are linked with, and need not export
    at_exit(leave, ctypes.c_void_p(code), None)


def _dumps(error: BaseException) -> bytes:
    """Serialise an error for the other ranks; its text at least."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        content = pickle.dumps(LazyprocError(f"{type(error).__name__}: {error}"))
    return content
