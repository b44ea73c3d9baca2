"""The loop of a hook-style process: batches of positions, what a batch must be like, and when it is durable.

A batch is read, computed and written by the hooks, then made durable, then marked in the status mask. Hooks write
through the handles that are open. Where that changes the structure of a file, a guard makes it safe (see
`lazyproc.hdf5.guard`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import (
    ArgumentValueError,
    DefinitionError,
    FileBusyError,
    LazyprocError,
    ReadOnlyFileError,
    ResultsError,
)
from lazyproc.core.events import BlockDone, Finished, Started
from lazyproc.core.runs import Runs
from lazyproc.drain import Drain, how_far
from lazyproc.engine.cluster import active_client
from lazyproc.hdf5.create import create_status_mask
from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.guard import BatchGuards, finish_pending, guarded
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.room import writing
from lazyproc.hdf5.search import remaining_positions
from lazyproc.hdf5.settled import allocate, datasets_below, is_settled
from lazyproc.hdf5.source import source_of
from lazyproc.hdf5.unmark import take_back
from lazyproc.hdf5.whole import Whole
from lazyproc.hdf5.write_watch import WriteWatch, sync_files

if TYPE_CHECKING:
    from lazyproc.hooks.contract import HookContract

log = logging.getLogger("lazyproc")

_HELD: ContextVar[frozenset[str]] = ContextVar("lazyproc_held", default=frozenset())
"""Files whose lock this thread holds: a hook may run another process on the same file."""


@contextmanager
def holding_lock_of(file: h5py.File) -> Iterator[None]:
    """Hold the run's lock of the file, if there is one on disk, and this thread does not hold it already.

    Raises
    ------
    FileBusyError
        If another run has it.
    JournalError
        If a change of the file was cut off by a death, and has not been undone.
    """
    path = real_path(file)
    if path is None or path in _HELD.get():
        yield
        return
    with RunLock(path):
        held = _HELD.set(_HELD.get() | {path})
        try:
            finish_pending(file, path)
            with writing(path, "the results", in_hdf5=True):
                yield
        finally:
            _HELD.reset(held)


def check_group(process: HookContract) -> None:
    """Raise DefinitionError if the hooks have not set the results group."""
    if not isinstance(process.h5_results_grp, h5py.Group) or not process.h5_results_grp:
        raise DefinitionError(
            f"{type(process).__name__}: self.h5_results_grp is {process.h5_results_grp!r} after the results were "
            "created or found again; expected an open h5py.Group: _create_results_datasets has to set it."
        )


def files_of(process: HookContract) -> set[h5py.File]:
    """Return the files that hooks may write to: of all that the process and its subclass hold."""
    return {one.file for one in vars(process).values() if isinstance(one, h5py.Dataset | h5py.Group) and one}


def written_by(process: HookContract) -> list[h5py.Group | h5py.Dataset]:
    """Return what the hooks are taken to write results to: the results group, and other datasets of all positions."""
    n_positions = process.h5_main.shape[0]
    held = [one for one in vars(process).values() if isinstance(one, h5py.Dataset) and one and one != process.h5_main]
    return [process.h5_results_grp, *(one for one in held if one.shape and one.shape[0] == n_positions)]


def allocate_results(process: HookContract) -> None:
    """Give results their places in the file, where they can have them at once: the loop then changes no structure."""
    for item in written_by(process):
        for dataset in datasets_below(item):
            if dataset.file.mode != "r":
                allocate(dataset)


def note_end(group: h5py.Group, n_positions: int, status_name: str) -> None:
    """Note for older readers how many positions are done, from the first one on."""
    left = remaining_positions(group, n_positions, status_name)
    with guarded([group.file], own=[str(group.name)]):
        group.attrs["last_pixel"] = np.int64(left.starts[0] if left else n_positions)


def settle_end(group: h5py.Group, n_positions: int, status_name: str) -> None:
    """Do what a run that was killed after its last batch has left to do; not if somebody else computes in the file."""
    if group.file.mode == "r" or real_path(group.file) is None:
        return
    with suppress(FileBusyError, ReadOnlyFileError), holding_lock_of(group.file):
        if attribute(group, "last_pixel", None) != n_positions:
            note_end(group, n_positions, status_name)


def complete_mask(group: h5py.Group, n_positions: int, status_name: str) -> None:
    """Give finished results that have nothing but ``last_pixel`` a status mask, as pyUSID does; not if that is refused.

    It carries no record: what is not known of results by older programs is not claimed.
    """
    if group.file.mode == "r" or group.file.driver == "mpio":
        return
    try:
        with holding_lock_of(group.file), guarded([group.file], own=[str(group.name)]):
            if status_name not in group:
                create_status_mask(group, n_positions, status_name)[...] = 1
    except LazyprocError as error:  # the results are there, whatever keeps the mask from being added
        log.info("%s: no status mask was added: %s", group.name, error)


class Batches:
    """The positions that remain, handed out batch after batch.

    Parameters
    ----------
    remaining : Runs
        What has to be computed.
    """

    def __init__(self, remaining: Runs) -> None:
        self._left = remaining

    def __bool__(self) -> bool:
        return bool(self._left)

    def next(self, most: Any) -> NDArray[np.int64] | None:
        """Return the next positions, at most `most` of them (any number; fractions are dropped); None at the end."""
        if not self._left:
            return None
        if not most >= 1:
            raise ArgumentValueError(f"_max_pos_per_read: is {most!r}; expected at least one position a batch.")
        batch = self._left.take(int(min(most, self._left.n_positions)))
        self._left = self._left.difference(batch)
        return batch.positions()

    def read(self, main: h5py.Dataset, pixels: NDArray[np.int64], lazy: bool) -> Any:
        """Read rows of the main dataset, `(n_positions, n_spectral)`; with `lazy` as a dask array of whole rows."""
        runs = Runs.from_positions(pixels)
        dataset = h5py.Dataset(main.id)
        if lazy:
            from lazyproc.views import lazy_rows

            if dataset.file.mode != "r":
                dataset.file.flush()
                take_back(dataset.file)
            return lazy_rows(source_of(dataset), "positions", runs)
        rows = np.empty((len(pixels), *dataset.shape[1:]), dataset.dtype)
        place = 0
        for start, stop in runs:
            dataset.read_direct(rows, np.s_[start:stop], np.s_[place : place + stop - start])
            place += stop - start
        return rows


class HookLoop:
    """Batches of a hook-style process, from the status mask to the last commit."""

    def __init__(self, process: HookContract, mask: h5py.Dataset) -> None:
        self._process = process
        self._group: h5py.Group = process.h5_results_grp
        self._mask = process._h5_status_dset = mask
        self._n_positions = int(mask.shape[0])
        self._status_name = str(mask.name).rpartition("/")[2]
        self._remaining = remaining_positions(self._group, self._n_positions, self._status_name)
        process._lazyproc_batches = Batches(self._remaining)
        process._lazyproc_one_each = False
        self._guards = BatchGuards()
        self._whole = whole_main(process)

    def go(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], drain: Drain) -> None:
        """Run all batches; what a hook raises leaves this at once, finished batches stay marked."""
        process = self._process
        n_done = self._n_positions - self._remaining.n_positions
        process._progress(Started(str(process.process_name), self._n_positions, n_done, "hooks"))
        try:
            self._sync()  # before any row is written: a mask that was cleared must not come back
            with _lazy_in_this_thread(process._lazy):
                drain.check()
                self._read(drain)
                while process._data is not None:
                    n_batch = self._batch(args, kwargs, drain)
                    n_done += n_batch
                    process._progress(BlockDone(n_batch))
                    drain.turn()
                    if drain.requested():
                        break
                    if process._lazyproc_batches:
                        # The old batch is let go before the next one is read: only one is ever in memory.
                        process._data = process._results = None
                    self._read(drain)
        finally:
            where = str(self._group.file.filename) if self._group else "its file"
            name = str(process.process_name)
            drain.message = how_far(name, n_done, self._n_positions, where, afresh=drain.afresh)
            process._progress(Finished(n_done))
            process._lazyproc_batches = None
        note_end(self._group, self._n_positions, self._status_name)
        self._sync()

    def _read(self, drain: Drain) -> None:
        with drain.interruptible():
            self._process._read_data_chunk()

    def _batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], drain: Drain) -> int:
        """Compute a batch, let the hook write it, make that durable, then mark it and make that durable."""
        process = self._process
        block = batch_of(process)
        process._lazyproc_rows = None
        with WriteWatch(files_of(process)) as watch:
            with _lazy_on_cluster(process._lazy), drain.interruptible():
                process._unit_computation(*args, **kwargs)
            check_number(process, block.n_positions)
            if self._whole is not None:  # now, since lazy data are read while they are computed
                self._whole.check()
            last = not process._lazyproc_batches
            with self._guards.batch(files_of(process), written_by(process), block, self._n_positions, last):
                with drain.interruptible():
                    process._write_results_chunk()
            self._sync()
            if watch.saw_nothing():
                raise ResultsError(
                    f"{type(process).__name__}: _write_results_chunk wrote nothing for the positions "
                    f"{block.starts[0]} to {block.stops[-1] - 1}; expected results in the datasets of "
                    f"{self._group.name}. They are not marked as done."
                )
        with ExitStack() as stack:
            if not is_settled(self._mask):  # as old programs may have made it
                stack.enter_context(guarded([self._mask.file], [self._mask], block, self._n_positions))
            for start, stop in block:
                self._mask[start:stop] = 1
        self._sync()
        return block.n_positions

    def _sync(self) -> None:
        sync_files(files_of(self._process))


def whole_main(process: HookContract) -> Whole | None:
    """Return the files that the main dataset lies in; None where there is none on disk."""
    main = process.h5_main
    path = real_path(main.file) or process._main_path
    return None if path is None else Whole.of(h5py.Dataset(main.id), path)


@contextmanager
def _lazy_in_this_thread(lazy: bool) -> Iterator[None]:
    """Compute lazy batches in this thread.

    A hook that writes a lazy array into a dataset holds h5py's only lock while the array is computed. Another thread
    that needs it meanwhile, to read a chunk or just to collect a handle as garbage, would wait for ever.
    """
    if not lazy:
        yield
        return
    import dask

    with dask.config.set(scheduler="synchronous"):
        yield


@contextmanager
def _lazy_on_cluster(lazy: bool) -> Iterator[None]:
    """Compute lazy batches on the active cluster, if it is one of other processes; for hooks that do not write."""
    client = active_client() if lazy else None
    scheduler = getattr(client, "scheduler", None)
    if scheduler is None or str(scheduler.address).startswith("inproc"):
        yield
        return
    import dask

    with dask.config.set(scheduler=client.get):  # type: ignore[union-attr]
        yield


def batch_of(process: HookContract) -> Runs:
    """Return the positions of the batch that was read: hooks get the array itself, and may change it."""
    pixels = process._get_pixels_in_current_batch()
    if pixels is None or len(pixels) == 0:
        raise ResultsError(
            f"{type(process).__name__}: self.data is set, but no positions belong to it: a _read_data_chunk "
            "that sets self.data has to call the one of the base first."
        )
    return Runs.from_positions(pixels)


def check_number(process: HookContract, n_positions: int) -> None:
    """Raise ResultsError if ``self._results`` is a list with a number of results that cannot be right.

    What the base's `_unit_computation` left is right with one result a position or a row of ``self.data``, with several
    a position, and as columns with one value a position. What a subclass's own leaves is its own business, until it has
    left one result a position for a batch: then fewer of them for another batch are results that were lost.
    """
    results, rows = process._results, process._lazyproc_rows
    if type(results) is not list or not results:
        return
    if rows is None:
        is_lost = process._lazyproc_one_each and len(results) < n_positions and _are_numbers(results)
        process._lazyproc_one_each = len(results) == n_positions
        if not is_lost:
            return
    fitting = {n_positions, rows, _length(process._data)}
    if len(results) in fitting or len(results) % n_positions == 0 or all(_fits(one, fitting) for one in results):
        return
    raise ResultsError(
        f"{type(process).__name__}: self._results has {len(results)} results for {n_positions} positions; expected "
        "one for each. The batch is not written and not marked as done."
    )


def _fits(value: Any, lengths: set[int | None]) -> bool:
    """Tell whether a column, or several of them in one array, has as many values as there are positions."""
    return _length(value) in lengths or not lengths.isdisjoint(getattr(value, "shape", ()))


def _length(value: Any) -> int:
    shape = getattr(value, "shape", None)
    return int(shape[0]) if shape else len(value) if isinstance(value, list | tuple) else -1


def _are_numbers(items: list[Any]) -> bool:
    """Tell whether all are numbers, or arrays or tuples of numbers, of one type and shape."""
    if len({type(item) for item in items}) != 1 or not isinstance(
        items[0], int | float | complex | np.generic | tuple | list | np.ndarray
    ):
        return False
    try:
        return np.asarray(items).dtype.kind in "biufcV"
    except ValueError:
        return False
