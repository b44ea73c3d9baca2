"""Commit through HDF5, for results that cannot be written as bytes: the driver writes rows and mask.

Rows that have their place in the file are written as they come. Where HDF5 has to make a place for them (results that
are chunked, compressed or not allocated yet: older programs make such), a death would damage the file, so they wait in
memory until the next commit, or until there are too many of them. `HandleTarget` then writes them under the guard of an
undo journal, `TransactionTarget` in a transaction.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.blocks import Block
from lazyproc.core.runs import Runs
from lazyproc.hdf5.durable import sync_data, sync_file
from lazyproc.hdf5.extents import using
from lazyproc.hdf5.failures import DatasetRows, Rows, filled_pieces
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.guard import guarded
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.room import changing
from lazyproc.hdf5.rows_file import is_outside, recorded_path
from lazyproc.hdf5.settled import is_settled
from lazyproc.hdf5.sink import Sink
from lazyproc.hdf5.transaction import share_lock, transaction

_MOST_WAITING = 8 * 2**20
"""Bytes of rows that may wait; a journal holds them twice."""

Opener = Callable[[], AbstractContextManager[h5py.Group]]
"""Opens a results group afresh for reading, for the length of a context."""


class _Waiting:
    """Rows that wait to be written, in their order."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, int, NDArray[Any]]] = []
        self._bytes = 0

    def add(self, name: str, start: int, rows: NDArray[Any]) -> None:
        """Keep rows of a dataset, from row `start` on."""
        self._rows.append((name, start, rows))
        self._bytes += rows.nbytes

    @property
    def are_many(self) -> bool:
        """Whether they should not wait any longer."""
        return self._bytes > _MOST_WAITING

    @property
    def rows(self) -> Runs:
        """Which rows these are."""
        return Runs.from_spans([(start, start + len(rows)) for _, start, rows in self._rows])

    def write(self, group: h5py.Group) -> None:
        """Write them; `clear` when that is durable."""
        for name, start, rows in self._rows:
            dataset = group[name]
            dataset[start : start + len(rows)] = rows.reshape(len(rows), *dataset.shape[1:])

    def clear(self) -> None:
        """Forget them."""
        self._rows, self._bytes = [], 0


class HandleTarget:
    """Commit through an open, writable h5py group; every call from the driver.

    Parameters
    ----------
    group : h5py.Group
        The results group.
    outputs : sequence of str
        The names of the outputs, in their order.
    status_name : str
        The name of the status mask.

    Notes
    -----
    HDF5 orders its own writes as it likes between two flushes. After a kill the file opens as long as nothing but the
    contents of datasets was changed that have their place in the file; for all others there is the guard.
    """

    sink: Sink | None = None

    def __init__(self, group: h5py.Group, outputs: Sequence[str], status_name: str) -> None:
        self._group = group
        self._outputs = tuple(outputs)
        self._status_name = status_name
        self._waiting = _Waiting()
        self._rows_files = [recorded_path(group[name]) for name in outputs if is_outside(group[name])]
        on_disk = real_path(group.file) is not None
        self._guards = on_disk and not all(is_settled(group[name]) for name in (*outputs, status_name))

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> None:
        """Write the rows of a block, or let them wait."""
        _put(self._waiting, block, self._outputs, arrays)
        if not self._guards:
            self._waiting.write(self._group)
            self._waiting.clear()
        elif self._waiting.are_many:
            self._write_all(None, 1)

    def commit(self, done: Runs) -> None:
        """Flush the file that the results are in, then set the mask, then flush again."""
        if done:
            self._write_all(done, 1)

    def unmark(self, positions: Runs) -> None:
        """Clear the mask there, then flush."""
        if positions:
            self._write_all(positions, 0)

    def rows(self, name: str) -> Rows:
        """Return a further dataset of the group as rows that can be read and written at any time."""
        return DatasetRows(self._group, name)

    def _write_all(self, marked: Runs | None, value: int) -> None:
        # The mask comes after the journal of the rows is gone: what has been undone must not be marked.
        with self._guard(self._outputs, self._waiting.rows):
            self._waiting.write(self._group)
            self._flush()
        self._waiting.clear()
        if marked is not None:
            with self._guard([self._status_name], marked):
                _mark(self._group[self._status_name], marked, value)
                self._flush()

    def _guard(self, names: Sequence[str], rows: Runs) -> AbstractContextManager[None]:
        written = [self._group[name] for name in names]
        if not self._guards or all(is_settled(dataset) for dataset in written):
            return nullcontext()
        return guarded([self._group.file], written, rows, written[0].shape[0])

    def _flush(self) -> None:
        file = self._group.file
        file.flush()
        for path in self._rows_files:
            sync_file(path)
        if real_path(file) is not None:
            sync_data(file.id.get_vfd_handle())

    def close(self) -> None:
        """Leave the handle open: it belongs to whoever opened it."""


class TransactionTarget:
    """Commit into a file that nobody has open for writing; every commit is a transaction, rows and mask together.

    Parameters
    ----------
    path : str
        The file.
    name : str
        The results group.
    outputs : sequence of str
        The names of the outputs, in their order.
    status_name : str
        The name of the status mask.
    open_group : callable
        Opens the results group afresh for reading: a context, closed at its end.

    Notes
    -----
    Readers may have the file open; writers are kept out until `close`. The caller holds the run's lock.
    """

    sink: Sink | None = None

    def __init__(
        self,
        path: str,
        name: str,
        outputs: Sequence[str],
        status_name: str,
        open_group: Opener,
    ) -> None:
        self._path = path
        self._name = name
        self._outputs = tuple(outputs)
        self._status_name = status_name
        self._open_group = open_group
        self._waiting = _Waiting()
        with using(path, name):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._file_id = FileId.of(os.fstat(self._descriptor))
        try:
            share_lock(self._descriptor, path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> None:
        """Let the rows of a block wait."""
        _put(self._waiting, block, self._outputs, arrays)
        if self._waiting.are_many:
            self._write_all(None, 1)

    def commit(self, done: Runs) -> None:
        """Write what waits and set the mask, all at once."""
        if done:
            self._write_all(done, 1)

    def unmark(self, positions: Runs) -> None:
        """Clear the mask there."""
        if positions:
            self._write_all(positions, 0)

    def rows(self, name: str) -> Rows:
        """Return a further dataset of the group as rows: read as they are on disk, written with the next commit."""
        return _WaitingRows(self._open_group, self._waiting, name)

    def _write_all(self, marked: Runs | None, value: int) -> None:
        with changing(self._path, self._name), transaction(self._path, self._file_id) as file:
            group = file[self._name]
            self._waiting.write(group)
            if marked is not None:
                _mark(group[self._status_name], marked, value)
        self._waiting.clear()

    def close(self) -> None:
        """Let writers in again."""
        os.close(self._descriptor)


class _WaitingRows:
    """A dataset whose rows are written with those that wait."""

    def __init__(self, open_group: Opener, waiting: _Waiting, name: str) -> None:
        self._open_group = open_group
        self._waiting = waiting
        self._name = name

    def read(self, runs: Runs) -> NDArray[Any]:
        """Read runs of rows into one array."""
        with self._open_group() as group:
            return DatasetRows(group, self._name).read(runs)

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Let rows wait, from row `start` on."""
        self._waiting.add(self._name, start, rows.copy())

    def fill(self, runs: Runs, value: int) -> None:
        """Let the same value wait for all rows of some runs."""
        for start, rows in filled_pieces(runs, value):
            self.write(start, rows)


def _put(waiting: _Waiting, block: Block, outputs: Sequence[str], arrays: Sequence[NDArray[Any]]) -> None:
    for name, rows in zip(outputs, arrays, strict=True):
        for start, stop, place in block.offsets():
            waiting.add(name, start, rows[place : place + stop - start])


def _mark(mask: h5py.Dataset, positions: Runs, value: int) -> None:
    for start, stop in positions:
        mask[start:stop] = np.uint8(value)
