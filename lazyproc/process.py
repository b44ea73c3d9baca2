"""`Process`: a function applied to every position of a main dataset, its results kept beside the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
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
from lazyproc.core.runs import Runs
from lazyproc.core.specs import STATUS_MASK, Output, check_status_name, resolve_outputs, validate_outputs
from lazyproc.definition import check_definition, check_hook_style, check_recordable, function_of
from lazyproc.engine.limits import available_cores, default_cores
from lazyproc.engine.own_job import mpi_attributes
from lazyproc.hdf5.extents import ExtentSource
from lazyproc.hdf5.files import Files, check_heaps
from lazyproc.hdf5.place import place_of, results_in
from lazyproc.hdf5.search import Found, best_of, examine
from lazyproc.hooks.contract import HookContract
from lazyproc.main_handle import MainDatasetHandle
from lazyproc.opening import made_target, open_main, open_source, stamp_of, target_handle
from lazyproc.progress import ProgressBar
from lazyproc.run.declared import Declared
from lazyproc.run.holding import flush_for_views
from lazyproc.run.perform import compute_here, finished_to_read, perform
from lazyproc.run.recording import warn_of
from lazyproc.run.sizes import most_positions
from lazyproc.together import leaving_alike, made_alike, opened_together
from lazyproc.verbose import logging_as

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
    h5_main : h5py.Dataset, str or path-like
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
    h5_target_group : h5py.Group, str or path-like, optional
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
    h5_main : h5py.Dataset
        The main dataset `(n_positions, n_spectral)`; with an address lazyproc's own handle of it.
    process_name, parms_dict, verbose
        As given; they, and `max_failures`, may be changed between calls, which read them anew.
    max_failures : int
        Of the class or the object: so many positions may fail and be recorded, then the run stops. Default: 1000.
    h5_results_grp : h5py.Group or None
        The results that `compute` or `retry_failed` returned last, or `use_partial_computation` chose.
    duplicate_h5_groups, partial_h5_groups : list of h5py.Group
        Finished and unfinished results of the same work, the latest last: as found by the constructor, without further
        arguments, and, where outputs are declared, by each `compute` and `retry_failed`, with theirs.
    mpi_comm, mpi_rank, mpi_size
        In the driver of an MPI job a communicator of this process alone, 0, and the number of ranks; else None, 0 and
        1. So old code that calls ``mpi_comm.Barrier()`` waits for nobody.
    _cores, _max_pos_per_read : int
        For subclasses: workers on this machine at most, and positions of a block as far as memory is concerned. A class
        with the hooks of the old contract sets its batches by them.
    _status_dset_name : str
        For subclasses: the name of the status mask; may be changed between phases. Default: ``"completed_positions"``.
    _h5_status_dset, _h5_target_group, _results
        For subclasses: the status mask, the target group (made when a hook first asks for it; else None if there is
        none yet), and, for hooks, the results of the batch.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, NotMainDatasetError, ReadOnlyFileError
        If an argument is wrong. The file is as it was: the constructor reads and never writes. (A class with the hooks
        of the old contract opens the file of an address for writing, and so may raise FileBusyError; and
        MemoryLimitError, if one position does not fit.)
    ParameterError
        If a parameter cannot be stored.
    FileNotFoundError
        If there is no such file.
    DefinitionError
        If the class declares no outputs or no function.
    LazyprocError
        If a killed program left the file that is open here in the middle of a change; says how to recover it.

    Notes
    -----
    One driver a file: while a `compute` or `retry_failed` runs, a second one into the same file is refused at once, by
    FileBusyError, from wherever it is called: another process or thread, another object or the same one. Runs into
    different files may go on in several threads at the same time. Beside a run `plan`, `test`, `to_xarray` and
    `open_results` may be used, also in other threads and with the very object that computes. Only in the instants, of
    some milliseconds, in which a run creates its results or notes the end, the first three and the constructor may
    raise an error that a second try does not.

    A run may call a `_block_function` in several threads of a process at once, a `_map_function` only on a cluster
    whose workers have more than one thread. Views call either in as many threads as the Dask scheduler has.

    A run may be killed at any time; what is marked in the status mask is right, and the same call goes on from there.

    Examples
    --------
    ``scan.h5`` has 4 x 5 positions of 6 values, 0 to 119:

    >>> import lazyproc, numpy as np
    >>> address = "scan.h5::/Measurement_000/Channel_000/Raw_Data"
    >>> class Mean(lazyproc.Process):
    ...     outputs = {"Mean": lazyproc.Output("f4", units="V")}
    ...
    ...     @staticmethod
    ...     def _map_function(spectrum):
    ...         return np.mean(spectrum)
    >>> with Mean(address) as process:
    ...     group = process.compute()
    ...     group.name, group["Mean"].shape, group["Mean"][:3, 0].tolist()
    ('/Measurement_000/Channel_000/Raw_Data-Mean_000', (20, 1), [2.5, 8.5, 14.5])
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
            if self._declares:
                self._main_path, self.h5_main, self._source = open_source(main, self._files)
                self._stamp = stamp_of(self._main_path)
                declared = validate_outputs(self.outputs, type(self).__name__)
                self._outputs = resolve_outputs(declared, self.h5_main.shape[1])
            else:
                self._main_path, dataset = open_main(main, self._files, writable=True)
                self.h5_main = MainDatasetHandle(dataset)
            self._place = place_of(h5_target_group, self.h5_main, self._main_path, self._files)
            if not self._declares:
                self._place.check_writable()
            self._status_dset_name = STATUS_MASK
            self._progress: Listener = ProgressBar()
            self._chosen: str | None = None
            self._n_failed: dict[str, int] = {}
            self.h5_results_grp: h5py.Group | None = None
            self.mpi_comm, self.mpi_rank, self.mpi_size = mpi_attributes(self._client)
            with logging_as(self.verbose):
                if self._declares:
                    work = self._declared()
                    self._look(work, (), {})
                    if not self._lazy and not self.duplicate_h5_groups:
                        self._place.check_writable()
                    self._max_pos_per_read = most_positions(work)
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
            batch=self._lazyproc_batch,
        )

    def _look_again(self) -> None:
        """Open the main dataset anew if its file was changed since: another one may have been put in its place."""
        stamp = stamp_of(self._main_path)
        if stamp == self._stamp:
            return
        address, files = f"{self._main_path}::{self.h5_main.name}", Files()
        try:
            _, main, source = open_source(address, files, self._check_form)
        except BaseException:
            files.close()
            raise
        self._stamp = stamp
        if isinstance(source, ExtentSource) and source == self._source:
            files.close()
            return
        self._files.take(files)
        self.h5_main, self._source = main, source

    def _check_form(self, main: h5py.Dataset) -> None:
        """Raise FileChangedError if the main dataset has another form than it had."""
        if (main.shape, main.dtype) != (self.h5_main.shape, self.h5_main.dtype):
            raise FileChangedError(
                f"h5_main: {self._main_path}::{main.name} has the shape {main.shape} and dtype {main.dtype} now; it "
                f"had {self.h5_main.shape} and {self.h5_main.dtype} when this Process was made. Make a new one."
            )

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

        Notes
        -----
        Holds until the next `compute` or `retry_failed` ends, for `to_xarray`, too. Reads and writes nothing.

        Examples
        --------
        With `Mean` and `address` as in the example of the class, and results as a killed run leaves them:

        >>> import h5py
        >>> names = [Mean(address).compute(override=True).name for _ in range(2)]
        >>> with h5py.File("scan.h5", "r+") as file:
        ...     file[names[0]]["completed_positions"][5:] = 0
        >>> process = Mean(address)
        >>> process.plan().action
        'return'
        >>> process.use_partial_computation()
        >>> process.plan().action, process.compute().name == names[0]
        ('resume', True)
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

        Examples
        --------
        With `Mean` and `address` as in the example of the class:

        >>> group = Mean(address, parms_dict={"operator": "A"}).compute()
        >>> print(Mean(address, parms_dict={"operator": "B"}).why_not_duplicate(group))
        operator: stored 'A' (str), wanted 'B' (str)
        """
        from lazyproc.hooks.plan import target_of_hooks, why_not_of_hooks

        declared = self._declared() if self._declares else None
        with self._place.briefly() as place:
            parent = place.group() if declared else target_of_hooks(self)
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
        ArgumentTypeError, ArgumentValueError
            If `override` is no truth value, or the main dataset's file was closed.
        ParameterError
            If the function cannot be called with the parameters and these arguments, or they cannot be stored.
        FunctionError
            If the function raised; says at which positions, and from which exception. With ``on_error="record"`` only
            if it raised for all of the first positions tried.
        OutputError
            If what it returned does not fit the outputs; nothing is created if that shows on the first positions.
        FailureLimitError
            If more than `max_failures` positions failed, where failures are recorded. All is kept.
        MemoryLimitError
            If one position does not fit into `max_mem_mb`, or blocks of the least size took more than that.
        NoRoomError
            If the disk is full, or a quota reached; an OSError.
        ReadOnlyFileError
            If the results, or the lock file beside them, cannot be written.
        FileBusyError
            If somebody else computes into this file, or has it open for writing.
        FileChangedError
            If a file is gone, was replaced or cut off, or its disk fails; an OSError and a ResultsError.
        LockingError
            If the file system cannot lock files; says what can be set.
        ResultsError
            If the target group cannot be read, or the results were removed or damaged while they were computed. Damaged
            ones that are there already are passed over.
        WorkerError
            If workers died again and again, or a cluster does not answer; what is finished is kept.
        Interrupted
            After Ctrl-C (it is a KeyboardInterrupt; in a script it is a SystemExit, too, with code 75); what was
            finished is committed.
        SystemExit
            With code 75, after SIGTERM or SIGUSR1; what was finished is committed.

        Notes
        -----
        Safe to kill at any instant: positions marked done hold right values, and the same call goes on from there. At
        most the blocks under way and those of the last `checkpoint_interval` are computed again. The same holds after
        each of the errors: what is committed is kept. After ``override=True`` leave that out to go on.

        Threads: see `Process`. Signals, Ctrl-C among them, are only heeded if this is called in the main thread.

        Examples
        --------
        With `Mean` and `address` as in the example of the class; the second call finds what the first one has computed:

        >>> process = Mean(address)
        >>> process.compute().name
        '/Measurement_000/Channel_000/Raw_Data-Mean_000'
        >>> process.compute().name
        '/Measurement_000/Channel_000/Raw_Data-Mean_000'
        >>> process.compute(override=True).name
        '/Measurement_000/Channel_000/Raw_Data-Mean_001'
        """
        with leaving_alike(self.h5_main):
            check_flag(override, "override")
            if not self._declares:
                with logging_as(self.verbose):
                    return self._compute_hooks(bool(override), args, kwargs)
            run = perform
            if opened_together(self.h5_main):
                from lazyproc.run.collective import perform_together as run
            return self._settle(
                partial(run, override=bool(override), chosen=self._chosen, listener=self._progress),
                args,
                kwargs,
                may_return=not override,
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
        DefinitionError
            If the class has the hooks of the old contract, which do not record failures.
        ArgumentValueError
            If several ranks have opened the file with ``driver="mpio"``.
        LazyprocError, Interrupted, SystemExit
            All others of `compute`, but for FailureLimitError.

        Notes
        -----
        Positions that fail again stay recorded, with what they raised now, whatever `on_error` is. Safe to kill at any
        instant: recorded positions that were not computed again yet are then not done any more, and `compute` or
        `retry_failed` goes on with them.

        Examples
        --------
        With `address` as in the example of the class:

        >>> class Ratio(lazyproc.Process):
        ...     outputs = {"Ratio": lazyproc.Output("f4")}
        ...
        ...     @staticmethod
        ...     def _map_function(spectrum):
        ...         return 1 / int(spectrum[0])
        >>> for one in lazyproc.failures(Ratio(address, on_error="record").compute()):
        ...     print(one)
        position 0: ZeroDivisionError: division by zero
        >>> class Corrected(Ratio):
        ...     process_name = "Ratio"
        ...
        ...     @staticmethod
        ...     def _map_function(spectrum):
        ...         return 1 / max(1, int(spectrum[0]))
        >>> lazyproc.failures(Corrected(address).retry_failed())
        []
        """
        if opened_together(self.h5_main):
            raise ArgumentValueError(
                "h5_main: the dataset of a file that several ranks have opened with driver='mpio' came; expected one "
                "that this process has to itself. Give its address, under lazyproc.cluster(), to retry."
            )
        from lazyproc.run.retry import retry

        return self._settle(
            partial(retry, chosen=self._chosen, listener=self._progress), args, kwargs, may_return=False
        )

    def _settle(
        self, work: Callable[..., str], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, may_return: bool
    ) -> h5py.Group:
        """Let a run do its work, look for results again, and return the group."""
        declared = self._declared()
        self._h5_status_dset = None  # h5py would go on showing what it has read of it
        try:
            with logging_as(self.verbose), declared.place.briefly() as place:
                declared = replace(declared, place=place)
                if not may_return:
                    place.check_writable()
                unwritable = finished_to_read(declared, args, kwargs, self._chosen) if may_return else None
                name = unwritable or work(declared, args, kwargs)
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

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If `positions` are no whole numbers, or out of range; or the main dataset's file was closed.
        ParameterError
            If the function cannot be called with the parameters and these arguments.
        FunctionError, OutputError
            If the function raised, or what it returned does not fit the outputs; also with ``on_error="record"``.
        FileChangedError
            If the positions cannot be read.
        NotImplementedError
            If the class has the hooks of the old contract, and has not written `test` itself.

        Notes
        -----
        The function is called in this process and this thread: whatever crashes it ends the program. Memory is not
        bounded.

        Examples
        --------
        With `Mean` and `address` as in the example of the class:

        >>> float(Mean(address).test(3)["Mean"])
        20.5
        >>> Mean(address).test([0, 1])["Mean"].tolist()
        [2.5, 8.5]
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
        """Return what `compute` would do with these arguments, without doing it.

        Parameters
        ----------
        *args, **kwargs
            The arguments of `compute`, without `override`.

        Returns
        -------
        Plan
            Shows itself as text and as HTML, and has all numbers as attributes.

        Raises
        ------
        ArgumentValueError
            If the main dataset's file was closed.
        ParameterError
            If the function cannot be called with the parameters and these arguments, or they cannot be stored.
        MemoryLimitError
            If one position does not fit into `max_mem_mb`.
        ResultsError
            If the target group, or what would be resumed, cannot be read.
        WorkerError
            If a cluster does not answer.

        Notes
        -----
        Reads metadata and masks, and, where there are results that may be of the same work, values of the main dataset,
        as `verify` says. Calls no function and takes no lock: what it tells is the state of this moment.

        Examples
        --------
        With `Mean` and `address` as in the example of the class:

        >>> plan = Mean(address).plan()
        >>> plan.action, plan.n_remaining, plan.seconds is None
        ('start', 20, True)
        """
        if not self._declares:
            from lazyproc.hooks.plan import plan_of_hooks

            return plan_of_hooks(self, args, kwargs)
        from lazyproc.run.planning import plan_of

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
        ArgumentValueError
            If the main dataset's file was closed.
        DefinitionError
            If the class has the hooks of the old contract: it does not tell its outputs.
        ParameterError
            If the function cannot be called with the parameters and these arguments, or they cannot be stored.
        ResultsError
            If the target group cannot be read; and on computing, if the results that it reads are damaged.
        FunctionError, OutputError
            On computing, if the function raised, or what it returned does not fit the outputs. Not with
            ``on_error="record"``: then `status` tells.
        StaleViewError
            On computing, if the results that it reads were replaced.
        FileChangedError
            On computing, if the main dataset cannot be read.

        Notes
        -----
        Which results are read is settled when the view is made; which of their positions are done is looked up
        whenever a block is computed, so that beside a run that resumes them each computation may find more. The view of
        a file on disk outlives this Process, and the caller's handle.

        Examples
        --------
        With `Mean` and `address` as in the example of the class:

        >>> maps = Mean(address).to_xarray()
        >>> maps["Mean"].dims, float(maps["Mean"][0, 0].compute())
        (('X', 'Y'), 2.5)
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
        """Close what this Process opened itself: with an address, its files and the groups it returned.

        Views of `to_xarray` and `open_results` go on working. May be called twice; a Process that is not closed lets go
        of its files when nothing of it is held any more.
        """
        self._files.close()

    def __enter__(self) -> Process:
        self._left_alike = contextlib.ExitStack()
        self._left_alike.enter_context(leaving_alike(self.h5_main))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()
        self._left_alike.__exit__(kind, error, trace)

    def __repr__(self) -> str:
        from lazyproc.showing import lines_of

        rows = lines_of(self)
        width = max(len(label) for label, _ in rows)
        return "\n".join(["<lazyproc.Process>", *(f"  {label:<{width}}  {text}" for label, text in rows)])

    def _repr_html_(self) -> str:
        from lazyproc.core.plan import html_table
        from lazyproc.showing import lines_of

        return html_table("lazyproc.Process", lines_of(self))
