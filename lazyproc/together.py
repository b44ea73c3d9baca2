"""What ranks that have opened a file together (``driver="mpio"``) do alike: leave, agree, lock, share out blocks."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import h5py

from lazyproc.hdf5.lock import Fence, RunLock

if TYPE_CHECKING:  # most processes have no ranks, and load nothing of them
    from lazyproc.drain import Drain
    from lazyproc.engine.ranks import Counter, Ranks

Constructor = TypeVar("Constructor", bound=Callable[..., None])
log = logging.getLogger("lazyproc")


def opened_together(dataset: Any) -> bool:
    """Tell whether this is a dataset of a file that several ranks opened together; to be asked on all of them."""
    return isinstance(dataset, h5py.Dataset) and bool(dataset) and dataset.file.driver == "mpio"


def ranks_of(file: h5py.File) -> Ranks:
    """Return the ranks that have opened a file; collective."""
    from lazyproc.engine.ranks import Ranks

    comm, info = file.id.get_access_plist().get_fapl_mpio()  # both are duplicates, and ours to free
    if info:
        info.Free()
    return Ranks(comm)


def counter_of(path: str, ranks: Ranks, fence: Fence) -> Counter:
    """Return what hands out the blocks of a run, on all of its ranks; collective.

    Parameters
    ----------
    path : str
        The file with the results.
    ranks : Ranks
        All ranks.
    fence : Fence
        Of the run, whose lock rank 0 holds.

    Notes
    -----
    A number in a file, where all ranks see each other's locks. Elsewhere one in the memory of rank 0.
    """
    from lazyproc.hdf5.counter import FileCounter
    from lazyproc.hdf5.holder import is_locked

    if all(ranks.gather(fence.holds_workers and is_locked(fence.lock_path, fence.locking))):
        counter = FileCounter(path, fence)
        ranks.once(counter.begin)
        return counter
    if ranks.rank == 0:
        log.info("%s: not all ranks see the lock of rank 0; blocks are handed out by MPI, between its blocks", path)
    return ranks.counter()


@contextmanager
def leaving_alike(dataset: Any) -> Iterator[None]:
    """Let all ranks leave the context alike, with an error or without one, or end all of them.

    Parameters
    ----------
    dataset : h5py.Dataset
        Of a file that several ranks have opened together: all of them enter this context. With anything else this
        process leaves by itself.
    """
    if not opened_together(dataset):
        yield
        return
    with ranks_of(dataset.file).leaving_alike():
        yield


def made_alike(constructor: Constructor) -> Constructor:
    """Let a constructor, whose first argument is the main dataset, fail on all ranks alike, or end all of them."""

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        with leaving_alike(args[0] if args else kwargs.get("h5_main")):
            constructor(self, *args, **kwargs)

    return cast(Constructor, construct)


def agree_on_signal(drain: Drain, ranks: Ranks) -> None:
    """Let a signal that any rank got count for all of them."""
    came = [one for one in ranks.gather(drain.signal) if one is not None]
    drain.signal = drain.signal or next(iter(came), None)


@contextmanager
def locked_by_first(path: str, ranks: Ranks) -> Iterator[RunLock]:
    """Let rank 0 hold the run's lock of a file for all ranks.

    Raises
    ------
    FileBusyError
        On all ranks, if another run has it.
    """
    lock = RunLock(path, ranks.once(lambda: uuid.uuid4().hex))
    try:
        ranks.once(lock.acquire)
        yield lock
        ranks.gather(None)  # nobody may still want to write when the lock is given back
    finally:
        if ranks.rank == 0:
            lock.release()
