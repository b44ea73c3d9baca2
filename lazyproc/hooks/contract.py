"""The contract towards subclasses written for pyUSID: the hooks they override, and the order in which they are called.

A batch of positions is read into ``self.data``, computed by `_unit_computation`, written by `_write_results_chunk`, and
then marked in the status mask. Hooks are looked up on the instance at each call, since old subclasses exchange them
between phases. All HDF5 is done through the handles that are open: subclasses keep datasets of their own.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ArgumentValueError, MemoryLimitError
from lazyproc.core.events import Listener
from lazyproc.core.memory import HOOKS_BYTES, MEBIBYTE
from lazyproc.core.runs import Runs
from lazyproc.drain import Drain, nothing_yet
from lazyproc.engine.cluster import active_client
from lazyproc.engine.limits import available_bytes, available_cores, default_cores
from lazyproc.engine.parallel import parallel_compute
from lazyproc.hdf5.apart import check_apart
from lazyproc.hdf5.create import group_name
from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.fingerprint import fingerprint
from lazyproc.hdf5.guard import guarded
from lazyproc.hdf5.hook_record import (
    NOT_COMPARABLE,
    HookWork,
    ensure_status_mask,
    find_groups,
    has_record,
    is_first_phase,
    text_of,
)
from lazyproc.hdf5.source import source_of, write_out
from lazyproc.hooks.loop import (
    Batches,
    HookLoop,
    allocate_results,
    check_group,
    complete_mask,
    files_of,
    holding_lock_of,
    settle_end,
)
from lazyproc.hooks.step import Step, next_step
from lazyproc.together import counter_of, locked_by_first, opened_together, ranks_of

if TYPE_CHECKING:
    from lazyproc.hdf5.place import Place

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
_OBJECT_BYTES = 1024
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
    use_partial_computation: Any
    parms_dict: Any
    process_name: Any
    verbose: bool
    duplicate_h5_groups: list[h5py.Group]
    partial_h5_groups: list[h5py.Group]
    _results: Any = None
    _lazyproc_rows: int | None = None
    _lazyproc_one_each: bool = False
    _status_dset_name: str
    _h5_status_dset: Any = None
    _h5_target_group: Any
    _target: h5py.Group | None = None
    _place: Place
    _cores: int
    _lazyproc_asked: int | None = None
    _multiplier: float
    _max_bytes: int | None
    _max_pos_per_read: Any
    _client: Any
    _main_path: str | None
    _verify: str
    _lazy: bool
    _progress: Listener
    _data: Any = None
    _lazyproc_pixels: NDArray[np.int64] | None = None
    _lazyproc_batches: Batches | None = None
    _chosen: str | None = None
    _lazyproc_batch: str = ""
    _lazyproc_constructing: bool = False
    _lazyproc_searched: tuple[str, str] = ("", NOT_COMPARABLE)

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
        if self._lazyproc_batches is None:
            self._lazyproc_batches = Batches(Runs.full(self.h5_main.shape[0]))
        self._lazyproc_pixels = self._lazyproc_batches.next(self._max_pos_per_read)
        self._data = (
            None
            if self._lazyproc_pixels is None
            else self._lazyproc_batches.read(self.h5_main, self._lazyproc_pixels, self._lazy)
        )

    def _unit_computation(self, *args: Any, **kwargs: Any) -> None:
        """Compute the batch: the function applied to each item of ``self.data`` gives ``self._results``."""
        # One core that was asked for means this process; where it is all there is, a cluster is welcome.
        in_process = self._cores == 1 and (self._lazyproc_asked == 1 or default_cores() > 1)
        client = self._client or (None if in_process else active_client())
        self._results = parallel_compute(
            self._data,
            self._map_function,
            cores=None if client else self._cores,
            func_args=list(args),
            func_kwargs=kwargs,
            verbose=self.verbose,
            client=client,
        )
        self._lazyproc_rows = len(self._results)

    def _get_pixels_in_current_batch(self) -> NDArray[np.int64] | None:
        """Return the positions of the batch that is in ``self.data``, ascending."""
        return self._lazyproc_pixels

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

        self._lazyproc_asked = wanted = check_cores(cores)
        self._cores = min(wanted, available_cores()) if wanted else default_cores()
        limit = check_memory(man_mem_limit if man_mem_limit is not None else mem)
        available = available_bytes()
        limit = available if limit is None else min(limit, available)
        self._multiplier = check_multiplier(mem_multiplier)
        source, position = self._bytes_per_position()
        self._max_pos_per_read = int(max(0, limit - HOOKS_BYTES) // position)
        if self._max_pos_per_read < 1:
            needed = -(-int(position + HOOKS_BYTES) // MEBIBYTE)
            raise MemoryLimitError(
                f"max_mem_mb: {limit // MEBIBYTE} MiB are allowed, but one position of {source / MEBIBYTE:.1f} MiB "
                f"takes {position / MEBIBYTE:.1f} MiB with its copies and results. Raise max_mem_mb to {needed}."
            )

    def _bytes_per_position(self) -> tuple[int, float]:
        """Return the bytes of a position of the source, and what it is taken to need with its copies and results."""
        source = int(self.h5_main.dtype.itemsize * self.h5_main.shape[1])
        return source, source * (self._multiplier + _COPIES) + _OBJECT_BYTES

    def _check_for_duplicates(self) -> tuple[list[h5py.Group], list[h5py.Group]]:
        """Return the results groups of the same work, finished and partial; reads the attributes as they are now."""
        self._lazyproc_searched = self._status_dset_name, text_of((), self.parms_dict or {})
        if self._target is None:
            return [], []
        return find_groups(self._target, self._hook_work(), exact=self._lazyproc_constructing)

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
            searched=self._lazyproc_searched[1]
            if self._lazyproc_searched[0] == self._status_dset_name
            else NOT_COMPARABLE,
            batch=self._lazyproc_batch,
        )

    def _hook_fingerprint(self, stored: str = "") -> str:
        """Return the fingerprint of the main dataset as it is now, made as the stored one was."""
        if self._verify == "none":
            return ""
        dataset = h5py.Dataset(self.h5_main.id)
        source = source_of(dataset)
        write_out(dataset, source)
        verify = "full" if stored.startswith("all:") else self._verify
        return fingerprint(dataset, source, verify)

    def _start_hooks(self, cores: Any, max_mem_mb: Any, mem_multiplier: Any) -> None:
        """Do what the old constructor did: sizes, a first try of `_get_existing_datasets`, the search."""
        self.duplicate_h5_groups, self.partial_h5_groups = [], []
        self._set_memory_and_cores(cores=cores, man_mem_limit=max_mem_mb, mem_multiplier=mem_multiplier)
        try:
            self._get_existing_datasets()
        except Exception as error:  # old hooks are not made to be called before there is a group; the call is theirs
            log.debug("%s: _get_existing_datasets raised in the constructor: %s", type(self).__name__, error)
        self._lazyproc_constructing = True
        try:
            self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()
        finally:
            self._lazyproc_constructing = False

    def _compute_hooks(self, override: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> h5py.Group:
        """Return the finished results: found, resumed or computed afresh, by calling the hooks in the old order."""
        work = self._hook_work()  # as it is now: hooks may change the attributes that it is read from
        arguments = text_of(args, kwargs)
        afresh = override
        if not override:
            step = next_step(self, work, arguments, self.duplicate_h5_groups, self.partial_h5_groups)
            if step.action == "return":
                if step.why == "found":
                    self._take_finished(step.group, work)
                return step.group
            afresh = self._take_up(step, work)
        if afresh and self.h5_results_grp is not None and _belongs_to_one_phase(self.h5_results_grp, work):
            self.h5_results_grp = None
        drain = Drain(nothing_yet(str(self.process_name)), self._progress)
        drain.afresh = override and not work.batch
        if opened_together(self.h5_main):
            return self._compute_together(work, arguments, afresh, drain, args, kwargs)
        with ExitStack() as locks:
            locks.enter_context(drain.on_signals())
            locks.enter_context(holding_lock_of(self._h5_target_group.file))
            with guarded(before := files_of(self), own=[self._own_group()]):
                with drain.interruptible():
                    self._make_or_find_results()
                locks.enter_context(holding_lock_of(self.h5_results_grp.file))
                work = replace(self._hook_work(), parameters=work.parameters, searched=work.searched)
                others = {self.h5_results_grp.file} - before  # which the hook has opened itself
                with guarded(others, own=[str(self.h5_results_grp.name)]):
                    mask = ensure_status_mask(self.h5_results_grp, work, arguments, afresh=afresh)
                    allocate_results(self)
                    check_apart(self.h5_results_grp, [self.h5_main])
            HookLoop(self, mask).go(args, kwargs, drain)
        return self.h5_results_grp

    def _make_or_find_results(self) -> None:
        """Have the hooks make the results group, or open the one that is held."""
        if self.h5_results_grp is None:
            self._create_results_datasets()
            check_group(self)
            self._write_source_dset_provenance()
        else:
            self._get_existing_datasets()
        check_group(self)

    def _holds_chosen(self) -> bool:
        """Tell whether the group that is held was chosen by `use_partial_computation`: it goes before finished ones."""
        return bool(self.h5_results_grp) and self._chosen == str(self.h5_results_grp.name)

    def _own_group(self) -> str:
        """Return the path of the group that is written to, or that is about to be made by the usual name."""
        if self.h5_results_grp is not None:
            return str(self.h5_results_grp.name)
        target = self._h5_target_group
        try:
            name = group_name(str(self.h5_main.name), str(self.process_name), target)
        except ArgumentValueError:  # the subclass has names of its own
            return str(target.name)
        return f"{str(target.name).rstrip('/')}/{name}"

    def _compute_together(
        self,
        work: HookWork,
        arguments: str,
        afresh: bool,
        drain: Drain,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> h5py.Group:
        """Do the same on all ranks of a file that they have opened together."""
        from lazyproc.hooks.ranks import RankedLoop

        ranks = ranks_of(self.h5_main.file)
        path = os.path.abspath(self._h5_target_group.file.filename)
        with ranks.ending_all(), drain.on_signals(), locked_by_first(path, ranks) as lock:
            self._make_or_find_results()
            work = replace(self._hook_work(), parameters=work.parameters, searched=work.searched)
            mask = ensure_status_mask(self.h5_results_grp, work, arguments, afresh=afresh)
            allocate_results(self)
            RankedLoop(self, mask, ranks).go(args, kwargs, drain, counter_of(path, ranks, lock.fence))
        return self.h5_results_grp

    def _take_finished(self, group: h5py.Group, work: HookWork) -> None:
        """Hold finished results that were found, and add what they may lack."""
        self.h5_results_grp = group
        if has_record(group, work.status_name):
            settle_end(group, work.n_positions, work.status_name)
        elif work.status_name not in group:
            complete_mask(group, work.n_positions, work.status_name)

    def _take_up(self, step: Step, work: HookWork) -> bool:
        """Hold partial results that are resumed, and say which are not; return whether these are the ones held."""
        is_held = self.h5_results_grp is not None
        if step.action == "resume" and not is_held:
            self.use_partial_computation(step.group)
        if step.passed is not None and step.why == "other":
            log.info("%s: %s holds results of other parameters or arguments", work.process_name, step.passed.name)
        elif step.passed is not None:
            log.warning(
                "%s has no _get_existing_datasets, so the partial results in %s cannot be resumed; all is computed "
                "afresh",
                type(self).__name__,
                step.passed.name,
            )
        return is_held and step.action == "start"

    def _can_resume(self) -> bool:
        own = getattr(self._get_existing_datasets, "__func__", self._get_existing_datasets)
        return own is not HookContract._get_existing_datasets


def _belongs_to_one_phase(group: h5py.Group, work: HookWork) -> bool:
    """Tell whether computing afresh means another group: not for a later phase, which builds on what is in this one."""
    return is_first_phase(group, work) and (work.status_name in group or int(attribute(group, "last_pixel", 0)) > 0)
