"""The loop of a hook-style process on all ranks that have opened the file together (``driver="mpio"``).

Every rank runs the same script and calls the same hooks; `_create_results_datasets` is collective by nature. Batches
are taken from a counter that the ranks share. Each rank writes its batches through its own handle, syncs the file, and
then marks them; nothing in the loop is collective.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import LazyprocError
from lazyproc.core.events import BlockDone, Finished, Started
from lazyproc.core.runs import Runs
from lazyproc.drain import Drain, how_far
from lazyproc.engine.ranks import Counter, Ranks
from lazyproc.hdf5.durable import sync_data
from lazyproc.hdf5.search import remaining_positions
from lazyproc.hdf5.whole import Whole
from lazyproc.hooks.loop import Batches, batch_of, check_number
from lazyproc.together import agree_on_signal

if TYPE_CHECKING:
    from lazyproc.hooks.contract import HookContract


class SharedBatches(Batches):
    """The positions that remain, cut into equal batches, of which this rank takes those that the counter gives it.

    Parameters
    ----------
    remaining : Runs
        What has to be computed, the same on all ranks.
    size : int
        Positions a batch, the same on all ranks.
    counter : Counter
        Hands out the numbers of batches.
    """

    def __init__(self, remaining: Runs, size: int, counter: Counter) -> None:
        super().__init__(remaining)
        self._size = size
        self._counter = counter
        self._position = 0

    def next(self, most: Any) -> NDArray[np.int64] | None:
        """Return the positions of the batch that is drawn; None if all are taken. `most` is what all have agreed on."""
        wanted = self._counter.next()
        while self._position < wanted and self:
            super().next(self._size)
            self._position += 1
        self._position += 1
        return super().next(self._size)


class RankedLoop:
    """This rank's part of the batches of a hook-style process.

    Parameters
    ----------
    process : HookContract
        The object; the results group is set, and the same on all ranks.
    mask : h5py.Dataset
        The status mask.
    ranks : Ranks
        All ranks, each of which makes such a loop.
    """

    def __init__(self, process: HookContract, mask: h5py.Dataset, ranks: Ranks) -> None:
        self._process = process
        self._group: h5py.Group = process.h5_results_grp
        self._mask = process._h5_status_dset = mask
        self._ranks = ranks
        self._n_positions = int(mask.shape[0])
        self._status_name = str(mask.name).rpartition("/")[2]
        self._path = os.path.abspath(self._group.file.filename)
        main = process.h5_main
        self._whole = Whole.of(h5py.Dataset(main.id), os.path.abspath(main.file.filename))

    def go(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], drain: Drain, counter: Counter) -> None:
        """Run this rank's batches, then note together how far all are."""
        process, ranks = self._process, self._ranks
        process._cores = 1  # the ranks are the cores
        self._group.file.flush()
        remaining = ranks.first(remaining_positions(self._group, self._n_positions, self._status_name))
        n_before = self._n_positions - remaining.n_positions
        size = min(ranks.gather(int(min(process._max_pos_per_read, self._n_positions))))
        size = max(1, min(size, -(-remaining.n_positions // (4 * ranks.size))))
        if ranks.rank == 0:
            process._progress(Started(str(process.process_name), self._n_positions, n_before, f"{ranks.size} ranks"))
        error = self._batches(SharedBatches(remaining, size, counter), args, kwargs, drain, counter)
        errors = [one for one in ranks.gather(error) if one]
        counter.free()
        left = ranks.first(remaining_positions(self._group, self._n_positions, self._status_name))
        self._group.attrs["last_pixel"] = np.int64(left.starts[0] if left else self._n_positions)
        self._group.file.flush()
        n_done = self._n_positions - left.n_positions
        if ranks.rank == 0:
            process._progress(Finished(n_done))
        name = str(process.process_name)
        drain.message = how_far(name, n_done, self._n_positions, self._path, afresh=drain.afresh)
        agree_on_signal(drain, ranks)
        if errors:
            with ranks.agreeing():
                raise LazyprocError(f"{process.process_name}: a hook failed on a rank: {errors[0]}. {drain.message}")

    def _batches(
        self,
        batches: SharedBatches,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        drain: Drain,
        counter: Counter,
    ) -> str:
        """Run batches until there are none, or any rank has failed; return what failed here."""
        process = self._process
        process._lazyproc_batches = batches
        process._lazyproc_one_each = False
        try:
            process._read_data_chunk()
            while process._data is not None:
                n_batch = self._batch(args, kwargs)
                if self._ranks.rank == 0:
                    process._progress(BlockDone(n_batch))
                if drain.requested():
                    counter.stop()
                    break
                process._data = process._results = None
                process._read_data_chunk()
        except Exception as error:
            counter.stop()
            import traceback

            return "".join(traceback.format_exception(error)).strip()
        finally:
            process._lazyproc_batches = None
        return ""

    def _batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Compute a batch, let the hook write it, sync, then mark it and sync."""
        process = self._process
        block = batch_of(process)
        process._lazyproc_rows = None
        process._unit_computation(*args, **kwargs)
        check_number(process, block.n_positions)
        self._whole.check()
        process._write_results_chunk()
        self._sync()
        for start, stop in block:
            self._mask[start:stop] = 1
        self._sync()
        return block.n_positions

    def _sync(self) -> None:
        """Sync the file by the system: parallel HDF5 keeps no raw data in memory, and its flush is collective."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            sync_data(descriptor)
        finally:
            os.close(descriptor)
