"""`Process`: a function applied to every position of a main dataset, its results kept beside the data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import h5py
import numpy as np

from lazyproc.arguments import (
    check_client,
    check_cores,
    check_flag,
    check_interval,
    check_main,
    check_max_failures,
    check_memory,
    check_multiplier,
    check_name,
    check_on_error,
    check_parms,
    check_positions,
    check_verify,
)
from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError, DefinitionError, FileChangedError
from lazyproc.core.events import Listener
from lazyproc.core.jsonform import show
from lazyproc.core.runs import Runs
from lazyproc.core.specs import STATUS_MASK, Output, check_status_name, resolve_outputs, validate_outputs
from lazyproc.declared import Declared
from lazyproc.definition import check_definition, check_hook_style, check_recordable, function_of
from lazyproc.engine.limits import available_cores, default_cores
from lazyproc.engine.own_job import mpi_attributes
from lazyproc.hdf5.extents import ExtentSource
from lazyproc.hdf5.files import Files, check_heaps
from lazyproc.hdf5.place import place_of, results_in
from lazyproc.hdf5.search import Found, best_of, examine
from lazyproc.hdf5.source import source_of
from lazyproc.holding import flush_for_views
from lazyproc.hook_ranks import leaving_alike, made_alike, opened_together
from lazyproc.hooks import HookContract
from lazyproc.main_handle import MainDatasetHandle
from lazyproc.opening import made_target, open_main, stamp_of, target_handle
from lazyproc.perform import compute_here, perform, warn_of
from lazyproc.progress import ProgressBar, has_standard_error

if TYPE_CHECKING:
    import xarray

    from lazyproc.core.plan import Plan
    from lazyproc.views import Committed


class Process(HookContract):
    """A function applied to every position of a USID Main dataset; the results are kept beside the data.

    A subclass declares its `outputs` and a function, of one position (`_map_function`) or of a block of positions
    (`_block_function`); there is nothing else to write.

    Parameters
    ----------
    h5_main : h5py.Dataset or str
        The main dataset `(n_positions, n_spectral)`: an open dataset, or its address
        ``"scan.h5::/Measurement_000/Channel_000/Raw_Data"``. With an address lazyproc opens the file itself, and others
        can read it, and watch, while it computes.
    process_name : str, optional
        Names the results group. Default: the class attribute `process_name`, else the name of the class.
    parms_dict : dict, optional
        The parameters. The function gets those it accepts; all are stored, and decide whether two runs are the same.
    cores : int, optional
        CPU cores to use. Default: all but two (all but one of four or fewer). Not used with a client.
    max_mem_mb : int, optional
        MiB for the whole computation on this machine, all workers together. None: what is available.
    mem_multiplier : float
        At least 1: bytes that a position really takes over its source bytes, results not counted.
    lazy : bool
        The file may be read-only: for `plan`, `test` and `to_xarray`. `data` is a dask array.
    h5_target_group : h5py.Group or str, optional
        Where results are looked for and put, in any file: an open group, or an address such as ``"out.h5::/fits"``,
        made if it is not there. Default: the group that holds the main dataset.
    verbose : bool
        Log what is done.
    client : distributed.Client, optional
        A Dask cluster. Default: the active client, else what the size of the job calls for. Never closed here.
    checkpoint_interval : float
        Seconds: the longest that a finished block waits until it is committed.
    verify : str
        How changed source data are noticed: ``"sampled"`` (all bytes up to 256 MiB, samples above), ``"full"`` or
        ``"none"``.
    on_error : str
        ``"raise"``: the first position whose function fails stops the run. ``"record"``: it gets the fill value of each
        output, counts as done, and its error is kept with the results, up to `max_failures` of them; `retry_failed`
        computes such positions again. Makes no difference to what counts as the same work.

    Attributes
    ----------
    max_failures : int
        Of the class or the object: so many positions may fail and be recorded, then the run stops. Default: 1000.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, NotMainDatasetError, ReadOnlyFileError
        If an argument is wrong. The file is as it was: the constructor reads and never writes.
    DefinitionError
        If the class declares no outputs or no function.

    Notes
    -----
    One driver a file: a second `compute` into the same file is refused while the first one runs. A run may be killed at
    any time; what is marked in the status mask is right, and the same call goes on from there.

    Examples
    --------
    >>> import numpy as np
    >>> class Mean(Process):
    ...     outputs = {"Mean": Output("f4", units="V")}
    ...
    ...     @staticmethod
    ...     def _map_function(spectrum):
    ...         return np.mean(spectrum)
    >>> group = Mean("scan.h5::/Measurement_000/Channel_000/Raw_Data").compute()  # doctest: +SKIP
    """

    process_name: Any = None
    outputs: ClassVar[Mapping[str, Output] | None] = None
    max_failures: int = 1000

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.outputs is not None:
            check_definition(cls)

    @made_alike
    def __init__(
        self,
        h5_main: h5py.Dataset | str,
        process_name: str | None = None,
        parms_dict: Mapping[str, Any] | None = None,
        cores: int | None = None,
        max_mem_mb: int | None = 4096,
        mem_multiplier: float = 1.0,
        lazy: bool = False,
        h5_target_group: h5py.Group | str | None = None,
        verbose: bool = False,
        *,
        client: Any = None,
        checkpoint_interval: float = 10.0,
        verify: str = "sampled",
        on_error: str = "raise",
    ) -> None:
        self._declares = type(self).outputs is not None
        main = check_main(h5_main)
        if process_name is not None or self.process_name is None:
            process_name = process_name if process_name is not None else type(self).__name__
            self.process_name = check_name(process_name)
        else:
            self.process_name = check_name(self.process_name)
        self.parms_dict = check_parms(parms_dict, storable=self._declares)
        wanted_cores = check_cores(cores)
        self._cores = min(wanted_cores, available_cores()) if wanted_cores else default_cores()
        self._max_bytes = check_memory(max_mem_mb)
        self._multiplier = check_multiplier(mem_multiplier)
        self._lazy = check_flag(lazy, "lazy")
        self.verbose = check_flag(verbose, "verbose")
        self._client = check_client(client)
        self._interval = check_interval(checkpoint_interval)
        self._verify = check_verify(verify)
        self._on_error = check_on_error(on_error)
        if self._declares:
            self._function, self._vectorized = function_of(type(self))
        else:
            check_hook_style(type(self), Process)
            check_recordable(type(self), self._on_error)

        self._files = Files()
        try:
            self._main_path, dataset = open_main(main, self._files, writable=not self._declares)
            self.h5_main = MainDatasetHandle(dataset)
            if self._declares:
                declared = validate_outputs(self.outputs, type(self).__name__)
                self._outputs = resolve_outputs(declared, self.h5_main.shape[1])
            self._place = place_of(h5_target_group, self.h5_main, self._main_path, self._files)
            if not (self._lazy and self._declares):
                self._place.check_writable()
            self._status_dset_name = STATUS_MASK
            self._progress: Listener = ProgressBar()
            self._chosen: str | None = None
            self._n_failed: dict[str, int] = {}
            self.h5_results_grp: h5py.Group | None = None
            self.mpi_comm, self.mpi_rank, self.mpi_size = mpi_attributes(self._client)
            with self._logging():
                if self._declares:
                    self._stamp = stamp_of(self._main_path)
                    self._source = source_of(self.h5_main, self._main_path)
                    work = self._declared()
                    self._look(work, (), {})
                    self._max_pos_per_read = work.most_positions()
                else:
                    self._target = target_handle(self._place, self._main_path, self.h5_main, self._files)
                    self._start_hooks(wanted_cores, max_mem_mb, self._multiplier)
        except BaseException:
            self.close()
            raise

    # -- what was done before ------------------------------------------------------------------------------------

    def _declared(self) -> Declared:
        """Gather what is fixed about this process; read at each call, since attributes may be changed in between."""
        if not self._declares:
            raise DefinitionError(
                f"{type(self).__name__}: declares no outputs; expected a dict such as "
                "outputs = {'Mean': Output('f4')}. A class with the hooks of the old contract has compute(), "
                "plan(), why_not_duplicate(), and test() if it writes one."
            )
        if not self.h5_main:
            raise ArgumentValueError(
                f"{self.process_name}: the main dataset's file is closed. Open it again and make a new Process."
            )
        self._look_again()
        return Declared(
            process_name=check_name(self.process_name),
            main=self.h5_main,
            main_path=self._main_path,
            source=self._source,
            place=self._place,
            function=self._function,
            vectorized=self._vectorized,
            outputs=self._outputs,
            parameters=check_parms(self.parms_dict),
            cores=self._cores,
            max_bytes=self._max_bytes,
            multiplier=self._multiplier,
            client=self._client,
            interval=self._interval,
            verify=self._verify,
            status_name=check_status_name(self._status_dset_name),
            max_failures=check_max_failures(self.max_failures) if self._on_error == "record" else None,
        )

    def _look_again(self) -> None:
        """Open the main dataset anew if its file was changed since: another one may have been put in its place."""
        stamp = stamp_of(self._main_path)
        if stamp == self._stamp:
            return
        address, files = f"{self._main_path}::{self.h5_main.name}", Files()
        try:
            path, dataset = open_main(address, files, writable=False)
            if (dataset.shape, dataset.dtype) != (self.h5_main.shape, self.h5_main.dtype):
                raise FileChangedError(
                    f"h5_main: {address} has the shape {dataset.shape} and dtype {dataset.dtype} now; it had "
                    f"{self.h5_main.shape} and {self.h5_main.dtype} when this Process was made. Make a new one."
                )
            main = MainDatasetHandle(dataset)
            source = source_of(main, path)
        except BaseException:
            files.close()
            raise
        self._stamp = stamp
        if isinstance(source, ExtentSource) and source == self._source:
            files.close()
            return
        self._files.take(files)
        self.h5_main, self._source = main, source

    def _look(self, declared: Declared, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look for results of the same work and keep what is found."""
        found = declared.found(declared.work(args, kwargs))
        self._n_failed = {one.name: one.n_failed for one in found if one.n_failed}
        self._files.close_unused()
        parent = self._place.group()
        self.duplicate_h5_groups = [parent.file[one.name] for one in found if one.is_complete] if parent else []
        self.partial_h5_groups = [parent.file[one.name] for one in found if one.is_partial] if parent else []
        self._target = parent

    def use_partial_computation(self, h5_partial_group: h5py.Group | None = None) -> None:
        """Choose the partial results that `compute` resumes, though there are finished ones; `plan` tells, too.

        Parameters
        ----------
        h5_partial_group : h5py.Group, optional
            One of `partial_h5_groups`. Default: the last of them.

        Raises
        ------
        ArgumentValueError
            If it is none of them, or there are none.
        """
        names = [str(group.name) for group in self.partial_h5_groups]
        if not names:
            raise ArgumentValueError(f"h5_partial_group: {self.process_name} has no partial results here to resume.")
        if h5_partial_group is None:
            h5_partial_group = self.partial_h5_groups[-1]
        elif not isinstance(h5_partial_group, h5py.Group) or h5_partial_group.name not in names:
            raise ArgumentValueError(
                f"h5_partial_group: {getattr(h5_partial_group, 'name', h5_partial_group)!r} came; expected one of the "
                f"partial results of the same work: {names}."
            )
        self._chosen = str(h5_partial_group.name)
        self.h5_results_grp = h5_partial_group

    def why_not_duplicate(self, group: h5py.Group | str, *args: Any, **kwargs: Any) -> str:
        """Tell what is different about the results in `group`, so that `compute` does not return or resume them.

        Parameters
        ----------
        group : h5py.Group or str
            A results group, or its name in the target's file.
        *args, **kwargs
            The arguments of `compute`.

        Returns
        -------
        str
            A line for each difference: parameters, arguments, code, input. Says so if there is none.

        Raises
        ------
        ArgumentTypeError
            If it is no group.
        ParameterError
            If the function cannot be called with these arguments.
        ResultsError
            If it is so damaged that HDF5 would never return from reading it.
        """
        from lazyproc.hook_plan import open_target, why_not_of_hooks

        declared = self._declared() if self._declares else None
        with self._place.briefly() as place:
            parent = place.group() if declared else open_target(self)
            if isinstance(group, str) and parent:
                name = group.rpartition("::")[2]
                group = (parent.file if name.startswith("/") else parent).get(name)
            if not isinstance(group, h5py.Group):
                raise ArgumentTypeError("group: expected a results group, or its name in the file of the results.")
            check_heaps(group)
            if declared is None:
                return why_not_of_hooks(self, group, args, kwargs)
            declared.called_with(args, kwargs)  # may it be?
            one = examine(group, declared.work(args, kwargs))
        lines = list(one.differences) or [
            f"no difference: {one.n_done} of {one.n_positions} positions of the same work are done"
            + (f", {one.n_failed} of them failed" if one.n_failed else "")
        ]
        return "\n".join([*lines, *(f"code: {remark}" for remark in one.remarks)])

    # -- doing it ------------------------------------------------------------------------------------------------

    def compute(self, override: bool = False, *args: Any, **kwargs: Any) -> h5py.Group:
        """Return the finished results of this work: found, resumed or computed afresh.

        Parameters
        ----------
        override : bool
            Compute afresh, whatever there is; in a new results group.
        *args, **kwargs
            Go to the function, and are part of what makes two runs the same.

        Returns
        -------
        h5py.Group
            The results group. With an address it is read-only and closed together with this Process.

        Raises
        ------
        FunctionError
            If the function raised; says at which positions, and from which exception. With ``on_error="record"`` only
            if it raised for all of the first positions tried.
        OutputError
            If what it returned does not fit the outputs; nothing is created if that shows on the first positions.
        FailureLimitError
            If more than `max_failures` positions failed, where failures are recorded. All is kept.
        MemoryLimitError
            If one position does not fit into `max_mem_mb`.
        FileBusyError
            If somebody else computes into this file, or has it open for writing.
        LockingError
            If the file system cannot lock files; says what can be set.
        Interrupted
            After Ctrl-C (it is a KeyboardInterrupt; in a script it is a SystemExit, too, with code 75); what was
            finished is committed.
        SystemExit
            With code 75, after SIGTERM or SIGUSR1; what was finished is committed.

        Notes
        -----
        Safe to kill at any instant: positions marked done hold right values, and the same call goes on from there. At
        most the blocks under way and those of the last `checkpoint_interval` are computed again.
        """
        with leaving_alike(self.h5_main):
            check_flag(override, "override")
            if not self._declares:
                with self._logging():
                    return self._compute_hooks(bool(override), args, kwargs)
            run = perform
            if opened_together(self.h5_main):
                from lazyproc.collective import perform_together as run
            return self._settle(
                partial(run, override=bool(override), chosen=self._chosen, listener=self._progress), args, kwargs
            )

    def retry_failed(self, *args: Any, **kwargs: Any) -> h5py.Group:
        """Compute again the positions that failed and were recorded, and only these.

        Parameters
        ----------
        *args, **kwargs
            The arguments of `compute`.

        Returns
        -------
        h5py.Group
            The results group, as `compute` returns it: the finished one of this work, else the partial one that would
            be resumed. Without failed positions nothing is run.

        Raises
        ------
        ResultsError
            If there are no results of this work.
        FunctionError, OutputError
            With ``on_error="raise"``, once all have been tried, if some have failed again.
        FileBusyError, MemoryLimitError, Interrupted
            As `compute` does.

        Notes
        -----
        Positions that fail again stay recorded, with what they raised now, whatever `on_error` is. Safe to kill at any
        instant: recorded positions that were not computed again yet are then not done any more, and `compute` or
        `retry_failed` goes on with them.
        """
        if opened_together(self.h5_main):
            raise ArgumentValueError(
                "h5_main: the dataset of a file that several ranks have opened with driver='mpio' came; expected one "
                "that this process has to itself. Give its address, under lazyproc.cluster(), to retry."
            )
        from lazyproc.retry import retry

        return self._settle(partial(retry, chosen=self._chosen, listener=self._progress), args, kwargs)

    def _settle(self, work: Callable[..., str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> h5py.Group:
        """Let a run do its work, look for results again, and return the group."""
        if self._lazy:
            self._place.check_writable()
        declared = self._declared()
        self._h5_status_dset = None  # h5py would go on showing what it has read of it
        try:
            with self._logging(), declared.place.briefly() as place:
                name = work(replace(declared, place=place), args, kwargs)
        except BaseException:
            with contextlib.suppress(Exception):  # what stopped the run is what the user must see
                self._look(declared, args, kwargs)
            raise
        finally:
            self._chosen = None
        if self._place.lock_path == self._main_path:  # then the lock kept others from writing meanwhile
            self._stamp = stamp_of(self._main_path)
        self._look(declared, args, kwargs)
        assert self._target is not None
        self.h5_results_grp = results_in(self._target.file, name)
        self._h5_status_dset = self.h5_results_grp.get(self._status_dset_name)
        return self.h5_results_grp

    def test(self, positions: int | Any = None, **kwargs: Any) -> dict[str, np.ndarray]:
        """Compute one or a few positions and return the results; nothing is written.

        Parameters
        ----------
        positions : int or sequence of int, optional
            Which positions. Default: the one in the middle.
        **kwargs
            Arguments of the function.

        Returns
        -------
        dict of str to ndarray
            For each output the result of the position, or `(n_positions, …)` for a sequence of them.
        """
        if not self._declares:
            raise NotImplementedError(f"{type(self).__name__}: test is for the class itself to write.")
        declared = self._declared()
        wanted = check_positions(positions, declared.n_positions)
        runs = Runs.from_positions(wanted)
        kernel = declared.kernel((), kwargs)
        arrays = compute_here(declared, kernel, runs)
        order = np.searchsorted(runs.positions(), wanted)
        shaped = {
            output.name: array[order].reshape(len(wanted), *output.shape)
            for output, array in zip(self._outputs, arrays, strict=True)
        }
        single = positions is None or np.ndim(positions) == 0
        return {name: array[0] for name, array in shaped.items()} if single else shaped

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Return what `compute` would do with these arguments, without doing it; reads metadata and masks only."""
        if not self._declares:
            from lazyproc.hook_plan import plan_of_hooks

            return plan_of_hooks(self, args, kwargs)
        from lazyproc.planning import plan_of

        declared, kernel = self._declared().called_with(args, kwargs)
        work = declared.work(args, kwargs)
        return plan_of(declared, work, declared.found(work), kernel, self._chosen)

    def to_xarray(self, *args: Any, **kwargs: Any) -> xarray.Dataset:
        """Return all outputs as lazy N-D arrays: positions already committed are read, the others computed when asked.

        Parameters
        ----------
        *args, **kwargs
            The arguments of `compute`.

        Returns
        -------
        xarray.Dataset
            With coordinates and units, and with `status` (1 where there is a result, 2 where the function fails) if
            failures are recorded. Nothing runs until its ``.compute()``, on whatever Dask scheduler is active
            then, and that commits nothing.

        Raises
        ------
        StaleViewError
            On computing, if the results that it reads were replaced.
        """
        from lazyproc.results import lazy_results

        declared = self._declared()
        flush_for_views(declared)
        work = declared.work(args, kwargs)
        kernel = declared.kernel(args, kwargs)
        found = declared.found(work)
        committed = self._committed(found)
        for one in found:
            if committed is not None and one.name == committed.name:
                warn_of(one)
        return lazy_results(
            self.h5_main,
            self._outputs,
            kernel,
            committed,
            declared.process_name,
            declared.label,
            self.parms_dict,
            recorded=self._on_error == "record"
            or (committed is not None and any(one.n_failed for one in found if one.name == committed.name)),
        )

    def _committed(self, found: list[Found]) -> Committed | None:
        """Return the results that a view reads: those that `compute` would return or resume."""
        from lazyproc.results import path_of_group
        from lazyproc.views import Committed, group_id

        best = best_of(found, self._chosen)
        if best is None:
            return None
        with self._place.briefly() as place:
            group = place.results(best.name)
            mask = self._status_dset_name if self._status_dset_name in group else ""
            if not mask and best.is_partial:
                return None
            path = place.path if not place.by_handle else path_of_group(group)
            handle = None if path else group
            return Committed(path, handle, best.name, group_id(group), self._outputs, mask)

    @property
    def _h5_target_group(self) -> h5py.Group | None:
        """The group that results go into, as old hooks know it; made when a hook first asks, not by the constructor."""
        if self._target is None and not self._declares:
            self._target = made_target(self._place, self._main_path, self.h5_main, self._files)
        return self._target

    @_h5_target_group.setter
    def _h5_target_group(self, group: h5py.Group) -> None:
        self._target = group

    @property
    def results_path(self) -> str:
        """The file that results are put into."""
        return self._place.path

    @property
    def data(self) -> Any:
        """The main dataset as a dask array `(n_positions, n_spectral)`, if the process is lazy; else None.

        For a class with the hooks of the old contract: the batch that was read, or whatever the hooks have put here.
        """
        if self._data is None and self._lazy and self._declares:
            from lazyproc.views import lazy_rows

            self._data = lazy_rows(self._source, str(self.process_name))
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        self._data = value

    # -- housekeeping --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close what this Process opened itself: with an address, its files and the groups it returned."""
        self._files.close()

    def __enter__(self) -> Process:
        self._left_alike = contextlib.ExitStack()
        self._left_alike.enter_context(leaving_alike(self.h5_main))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()
        self._left_alike.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Show what is logged while this object works, if it is verbose."""
        log = logging.getLogger("lazyproc")
        level = log.level
        handler: logging.Handler | None = None
        if not has_standard_error():  # logging would raise where it wants to say that it cannot write
            handler = logging.NullHandler()
        elif self.verbose:
            handler = logging.StreamHandler()
        if log.hasHandlers():
            handler = None
        if self.verbose:
            log.setLevel(logging.INFO)
        if handler is not None:
            log.addHandler(handler)
        try:
            yield
        finally:
            log.setLevel(level)
            if handler is not None:
                log.removeHandler(handler)

    def _lines(self) -> list[tuple[str, str]]:
        if not self.h5_main:
            return [("process", str(self.process_name)), ("main dataset", "closed")]
        n_positions, n_spectral = self.h5_main.shape
        return [
            ("process", str(self.process_name)),
            ("main dataset", f"{self._main_path or self.h5_main.file.filename}::{self.h5_main.name}"),
            ("shape", f"{n_positions:,} positions x {n_spectral:,} values, {self.h5_main.dtype}"),
            ("outputs", self._output_texts()),
            (
                "parameters",
                ", ".join(f"{key}={show(value)}" for key, value in (self.parms_dict or {}).items()) or "none",
            ),
            ("target group", f"{self._place.path}::{self._place.name}"),
            ("finished results", ", ".join(_names(self.duplicate_h5_groups)) or "none"),
            ("partial results", ", ".join(_names(self.partial_h5_groups)) or "none"),
            *([("failed positions", ", ".join(self._failed_texts()))] if self._n_failed else []),
        ]

    def _failed_texts(self) -> list[str]:
        return [f"{count:,} in {name.rpartition('/')[2]}" for name, count in self._n_failed.items()]

    def _output_texts(self) -> str:
        if not self._declares:
            return "created by the class itself"
        return ", ".join(f"{one.name} {one.shape or ''} {one.dtype}" for one in self._outputs)

    def __repr__(self) -> str:
        rows = self._lines()
        width = max(len(label) for label, _ in rows)
        return "\n".join(["<lazyproc.Process>", *(f"  {label:<{width}}  {text}" for label, text in rows)])

    def _repr_html_(self) -> str:
        from lazyproc.core.plan import html_table

        return html_table("lazyproc.Process", self._lines())


def _names(groups: list[h5py.Group]) -> list[str]:
    return [str(group.name).rpartition("/")[2] if group else "closed" for group in groups]
