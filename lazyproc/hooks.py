"""The contract towards subclasses written for pyUSID: the hooks they override, and the loop that calls them.

A batch of positions is read into ``self.data``, computed by `_unit_computation`, written by `_write_results_chunk`, and
then marked in the status mask. Hooks are looked up on the instance at each call, since old subclasses exchange them
between phases. All HDF5 is done through the handles that are open: subclasses keep datasets of their own.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import psutil
from numpy.typing import NDArray

from lazyproc.core.errors import ArgumentValueError, DefinitionError, MemoryLimitError, ResultsError
from lazyproc.core.events import BlockDone, Finished, Listener, Started
from lazyproc.core.memory import DRIVER_BYTES, MEBIBYTE
from lazyproc.core.parameters import arguments_text, same_arguments
from lazyproc.core.runs import Runs
from lazyproc.engine.choose import available_cores, default_cores
from lazyproc.engine.parallel import parallel_compute
from lazyproc.hdf5.extents import real_path
from lazyproc.hdf5.fingerprint import fingerprint
from lazyproc.hdf5.hook_record import HookWork, ensure_status_mask, find_groups, stored_arguments
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.search import remaining_positions
from lazyproc.hdf5.source import source_of

if TYPE_CHECKING:
    from lazyproc.process import Process

HOOKS = (
    "_create_results_datasets",
    "_read_data_chunk",
    "_unit_computation",
    "_write_results_chunk",
    "_get_existing_datasets",
)
"""Methods that old subclasses of pyUSID's Process override."""

_COPIES = 1.5
"""Copies of a batch beside the batch itself: pieces on their way to workers, and there."""
_OBJECT_BYTES = 256
"""What a result takes as a Python object, over its bytes in the file."""

log = logging.getLogger("lazyproc")


class HookContract:
    """What old subclasses find in their base, under the old names.

    Notes
    -----
    ``_create_results_datasets``, ``_write_results_chunk`` and a function are the subclass's to write;
    ``_get_existing_datasets`` makes it resumable. None of them is called for a process that declares outputs.
    """

    h5_main: Any
    h5_results_grp: Any
    parms_dict: Any
    process_name: Any
    verbose: bool
    duplicate_h5_groups: list[h5py.Group]
    partial_h5_groups: list[h5py.Group]
    _results: Any = None
    _status_dset_name: str
    _h5_status_dset: Any = None
    _h5_target_group: Any = None
    _cores: int
    _max_pos_per_read: Any
    _client: Any
    _verify: str
    _lazy: bool
    _progress: Listener
    _data: Any = None
    _pixels: NDArray[np.int64] | None = None
    _batches: Batches | None = None

    # -- what a subclass writes ----------------------------------------------------------------------------------

    @staticmethod
    def _map_function(*args: Any, **kwargs: Any) -> Any:
        """Compute one position; the default `_unit_computation` applies it to each."""
        raise NotImplementedError("_map_function: write it, as a static method of one position's spectrum.")

    def _create_results_datasets(self) -> None:
        """Create the results group, as ``self.h5_results_grp``, and its datasets."""
        raise NotImplementedError(
            "_create_results_datasets: write it: create self.h5_results_grp and the datasets; or declare outputs, and "
            "lazyproc creates them."
        )

    def _get_existing_datasets(self) -> None:
        """Find the datasets of ``self.h5_results_grp`` again, to resume."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot resume: write _get_existing_datasets, which finds the datasets in "
            "self.h5_results_grp again; or compute with override=True."
        )

    def _write_results_chunk(self) -> None:
        """Write ``self._results`` of the positions `_get_pixels_in_current_batch`."""
        raise NotImplementedError("_write_results_chunk: write it: put self._results into the datasets.")

    # -- what a subclass may replace -----------------------------------------------------------------------------

    def _read_data_chunk(self) -> None:
        """Read the next batch of positions into ``self.data``; None when there are no more."""
        if self._batches is None:
            self._batches = Batches(Runs.full(self.h5_main.shape[0]))
        self._pixels = self._batches.next(self._max_pos_per_read)
        self._data = None if self._pixels is None else self._batches.read(self.h5_main, self._pixels, self._lazy)

    def _unit_computation(self, *args: Any, **kwargs: Any) -> None:
        """Compute the batch: the function applied to each item of ``self.data`` gives ``self._results``."""
        self._results = parallel_compute(
            self._data,
            self._map_function,
            cores=self._cores,
            func_args=list(args),
            func_kwargs=kwargs,
            verbose=self.verbose,
            client=None if self._cores == 1 else self._client,
        )

    def _get_pixels_in_current_batch(self) -> NDArray[np.int64] | None:
        """Return the positions of the batch that is in ``self.data``, ascending."""
        return self._pixels

    def _estimate_compute_time_per_pixel(self, *args: Any, **kwargs: Any) -> float:
        """Return the seconds that a position takes on one core, from a few of them."""
        positions = Runs.full(self.h5_main.shape[0]).spread(5)
        rows = self.h5_main[positions, :]
        begin = time.perf_counter()
        parallel_compute(rows, self._map_function, cores=1, func_args=list(args), func_kwargs=kwargs)
        return (time.perf_counter() - begin) / len(positions)

    def _write_source_dset_provenance(self) -> None:
        """Note in the results group where the data came from, if that is another file."""
        if self.h5_main.file == self.h5_results_grp.file:
            return
        self.h5_results_grp.attrs["source_file_path"] = os.path.abspath(self.h5_main.file.filename)
        self.h5_results_grp.attrs["source_dataset_path"] = self.h5_main.name

    def _set_memory_and_cores(
        self, cores: int | None = None, man_mem_limit: int | None = None, mem_multiplier: float = 1.0, mem: Any = None
    ) -> None:
        """Set ``_cores`` and ``_max_pos_per_read``, the positions that a batch may have.

        Parameters
        ----------
        cores : int, optional
            CPU cores. Default: all but two, all but one of four or fewer.
        man_mem_limit : int, optional
            MiB for everything together. Default: what is available.
        mem_multiplier : float
            At least 1: bytes a position really takes over its source bytes.
        mem : None
            An older name of `man_mem_limit`.
        """
        from lazyproc.arguments import check_cores, check_memory, check_multiplier

        wanted = check_cores(cores)
        self._cores = min(wanted, available_cores()) if wanted else default_cores()
        limit = check_memory(man_mem_limit if man_mem_limit is not None else mem)
        available = int(psutil.virtual_memory().available)
        limit = available if limit is None else min(limit, available)
        source = self.h5_main.dtype.itemsize * self.h5_main.shape[1]
        position = source * (check_multiplier(mem_multiplier) + _COPIES) + _OBJECT_BYTES
        self._max_pos_per_read = int(max(0, limit - DRIVER_BYTES) // position)
        if self._max_pos_per_read < 1:
            needed = -(-int(position + DRIVER_BYTES) // MEBIBYTE)
            raise MemoryLimitError(
                f"max_mem_mb: {limit // MEBIBYTE} MiB are allowed, but one position of {source / MEBIBYTE:.1f} MiB "
                f"takes {position / MEBIBYTE:.1f} MiB with its copies and results. Raise max_mem_mb to {needed} or more."
            )

    def _check_for_duplicates(self) -> tuple[list[h5py.Group], list[h5py.Group]]:
        """Return the results groups of the same work, finished and partial; reads the attributes as they are now."""
        return find_groups(self._h5_target_group, self._hook_work())

    def _hook_work(self) -> HookWork:
        source = self.h5_main
        return HookWork(
            main_name=str(source.name),
            main_file=str(source.file.filename),
            n_positions=int(source.shape[0]),
            process_name=str(self.process_name).replace("-", "_"),
            parameters=dict(self.parms_dict or {}),
            status_name=self._status_dset_name,
            fingerprint=self._hook_fingerprint,
        )

    def _hook_fingerprint(self, stored: str = "") -> str:
        """Return the fingerprint of the main dataset as it is now, made as the stored one was."""
        if self._verify == "none":
            return ""
        dataset = h5py.Dataset(self.h5_main.id)
        if dataset.file.mode != "r":
            dataset.file.flush()
        verify = "full" if stored.startswith("all:") else self._verify
        return fingerprint(dataset, source_of(dataset), verify)

    def _start_hooks(self, cores: Any, max_mem_mb: Any, mem_multiplier: Any) -> None:
        """Do what the old constructor did: sizes, a first try of `_get_existing_datasets`, the search."""
        self._set_memory_and_cores(cores=cores, man_mem_limit=max_mem_mb, mem_multiplier=mem_multiplier)
        try:
            self._get_existing_datasets()
        except Exception as error:  # old hooks are not made to be called before there is a group; the call is theirs
            log.debug("%s: _get_existing_datasets raised in the constructor: %s", type(self).__name__, error)
        self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()

    def _compute_hooks(self, override: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> h5py.Group:
        """Return the finished results: found, resumed or computed afresh, by calling the hooks in the old order."""
        arguments = _arguments_text(args, kwargs)
        if not override:
            finished = _of_arguments(self.duplicate_h5_groups, self._status_dset_name, arguments)
            if finished:
                self.h5_results_grp = finished[-1]
                return finished[-1]
            partial = _of_arguments(self.partial_h5_groups, self._status_dset_name, arguments)
            if partial and self.h5_results_grp is None:
                self.h5_results_grp = partial[-1]
        else:
            _leave_old_results(self)
        with _locked(self._h5_target_group.file):
            if self.h5_results_grp is None:
                self._create_results_datasets()
                _check_group(self)
                self._write_source_dset_provenance()
            else:
                self._get_existing_datasets()
            _check_group(self)
            _Loop(self, arguments).go(args, kwargs)
        return self.h5_results_grp


def _arguments_text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the arguments of `compute` as text; what cannot be compared is told apart by being itself."""
    from lazyproc.core.errors import ParameterError

    try:
        return arguments_text(args, kwargs)
    except ParameterError:
        return arguments_text((uuid.uuid4().hex,), {})


def _of_arguments(groups: list[h5py.Group], status_name: str, arguments: str) -> list[h5py.Group]:
    return [group for group in groups if same_arguments(stored_arguments(group, status_name), arguments)]


def _leave_old_results(process: HookContract) -> None:
    """Start afresh although a group is held: in a new group, or in the same one if this is a later phase of it."""
    group = process.h5_results_grp
    if group is None or process._status_dset_name not in group:
        return
    masks = [
        name
        for name, item in group.items()
        if isinstance(item, h5py.Dataset) and item.shape == (process.h5_main.shape[0],) and item.dtype == np.uint8
    ]
    if masks == [process._status_dset_name]:
        process.h5_results_grp = None
    else:
        group[process._status_dset_name][...] = 0


def _check_group(process: HookContract) -> None:
    if not isinstance(process.h5_results_grp, h5py.Group) or not process.h5_results_grp:
        raise DefinitionError(
            f"{type(process).__name__}: self.h5_results_grp is {process.h5_results_grp!r} after the results were "
            "created or found again; expected an open h5py.Group: _create_results_datasets has to set it."
        )


@contextmanager
def _locked(file: h5py.File) -> Iterator[None]:
    """Hold the run's lock of the file, if there is one on disk."""
    path = real_path(file)
    if path is None:
        yield
        return
    lock = RunLock(path, uuid.uuid4().hex)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Batches:
    """The positions that remain, handed out batch after batch.

    Parameters
    ----------
    remaining : Runs
        What has to be computed.
    """

    def __init__(self, remaining: Runs) -> None:
        self._left = remaining

    def next(self, most: Any) -> NDArray[np.int64] | None:
        """Return the next positions, at most `most` of them (any number; fractions are dropped); None at the end."""
        if not self._left:
            return None
        if int(most) < 1:
            raise ArgumentValueError(f"_max_pos_per_read: is {most!r}; expected at least one position a batch.")
        batch = self._left.take(int(most))
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
            return lazy_rows(source_of(dataset), "positions", runs)
        rows = np.empty((len(pixels), *dataset.shape[1:]), dataset.dtype)
        place = 0
        for start, stop in runs:
            dataset.read_direct(rows, np.s_[start:stop], np.s_[place : place + stop - start])
            place += stop - start
        return rows


class _Loop:
    """Batches of a hook-style process, from the status mask to the last commit."""

    def __init__(self, process: HookContract, arguments: str) -> None:
        self._process = process
        self._group: h5py.Group = process.h5_results_grp
        work = process._hook_work()
        recorded = work.status_name in self._group
        self._mask = ensure_status_mask(self._group, work, arguments, "" if recorded else process._hook_fingerprint())
        process._h5_status_dset = self._mask
        self._remaining = remaining_positions(self._group, work.n_positions, work.status_name)
        self._n_positions = work.n_positions
        process._batches = Batches(self._remaining)

    def go(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run all batches; what a hook raises leaves this at once, finished batches stay marked."""
        process = self._process
        n_done = self._n_positions - self._remaining.n_positions
        process._progress(Started(str(process.process_name), self._n_positions, n_done, "hooks"))
        try:
            process._read_data_chunk()
            while process._data is not None:
                pixels = process._get_pixels_in_current_batch()
                process._unit_computation(*args, **kwargs)
                self._write(pixels)
                n_done += len(pixels)  # type: ignore[arg-type]
                process._progress(BlockDone(len(pixels)))  # type: ignore[arg-type]
                # The old batch is let go before the next one is read: only one is ever in memory.
                process._data = process._results = None
                process._read_data_chunk()
        finally:
            process._progress(Finished(n_done))
            process._batches = None
        self._group.attrs["last_pixel"] = np.int64(self._n_positions)
        self._sync()

    def _write(self, pixels: NDArray[np.int64] | None) -> None:
        """Let the hook write, make that durable, then mark the batch and make that durable."""
        if pixels is None or len(pixels) == 0:
            raise ResultsError(
                f"{type(self._process).__name__}: self.data is set, but no positions belong to it: a _read_data_chunk "
                "that sets self.data has to call the one of the base first."
            )
        watch = _WriteWatch()
        self._process._write_results_chunk()
        self._sync()
        if watch.saw_nothing():
            raise ResultsError(
                f"{type(self._process).__name__}: _write_results_chunk wrote nothing for the positions {pixels[0]} to "
                f"{pixels[-1]}; expected results in the datasets of {self._group.name}. They are not marked as done."
            )
        for start, stop in Runs.from_positions(pixels):
            self._mask[start:stop] = 1
        self._sync()

    def _sync(self) -> None:
        """Flush the file that the results are in, whichever that is, down to the disk."""
        for file in {self._group.file, self._mask.file}:
            file.flush()
            if real_path(file) is not None:
                os.fdatasync(file.id.get_vfd_handle())


class _WriteWatch:
    """Tells whether this process has written any bytes at all since; only where the system counts them."""

    def __init__(self) -> None:
        self._before = self._count()

    @staticmethod
    def _count() -> int | None:
        try:
            with open("/proc/self/io", "rb") as file:
                return int(file.read().split(b"wchar:")[1].split()[0])
        except (OSError, IndexError, ValueError):
            return None

    def saw_nothing(self) -> bool:
        """Return True only if it is certain that nothing was written."""
        now = self._count()
        return now is not None and now == self._before


def is_hook_style(cls: type[Process]) -> bool:
    """Tell whether a class runs by the old contract: it declares no outputs."""
    return cls.outputs is None
