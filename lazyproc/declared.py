"""The work of a declared process on one main dataset: what it is, whether it was done before, doing it."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.blocks import BlockPlan
from lazyproc.core.errors import MemoryLimitError, ParameterError
from lazyproc.core.identity import code_hash, unnamed
from lazyproc.core.imports import imports_to_come
from lazyproc.core.memory import MemoryModel
from lazyproc.core.parameters import arguments_text
from lazyproc.core.probe import Probe, run_probe
from lazyproc.core.runs import Runs
from lazyproc.core.signature import keyword_arguments
from lazyproc.core.sizing import Division
from lazyproc.core.specs import ResolvedOutput
from lazyproc.engine.choose import HELP_PAYS, POOL_PAYS, Scheduler, can_be_sent, choose_local
from lazyproc.engine.cluster import active_client
from lazyproc.engine.crew import Crew
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import BlockSink, Kernel, pack_for_cluster
from lazyproc.engine.limits import available_bytes
from lazyproc.engine.own_job import native_threads
from lazyproc.engine.trial import Trial, try_in_process, try_on_cluster
from lazyproc.hdf5.chunks import ChunkSource, chunked_source
from lazyproc.hdf5.compress import peak_bytes
from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.extents import ExtentSource
from lazyproc.hdf5.fingerprint import fingerprint
from lazyproc.hdf5.place import Place
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.search import Found, Work, search
from lazyproc.hdf5.sink import Sink
from lazyproc.hdf5.source import FileSource, HandleSource, Source, write_out

_LOCAL_BYTES = 8 * 2**20
"""Source and results of a block that costs next to nothing to start: small enough for the processor's caches."""
_SENT_BYTES = 32 * 2**20
"""The same for a block that is sent to another process."""

_EARLY_PROCESSES = 4
_HDF5_PER_SECOND = 1e9
"""Bytes that HDF5 decodes and copies in one process: measured 0.5-2 GB/s, from the page cache."""
_ARENA_BYTES = 2 * 2**20
"""What the allocator keeps for each thread, over what blocks take: measured 1 to 9 MiB for two threads together."""
_FEW_POSITIONS = 16
"""For so few no process is worth its start, whatever the function is."""

log = logging.getLogger("lazyproc")


@dataclass(frozen=True, eq=False)
class Declared:
    """All that is fixed about a declared process on a main dataset. Holds open handles; never travels.

    Attributes
    ----------
    process_name : str
        As given; ``-`` becomes ``_`` in names of groups.
    main : h5py.Dataset
        The main dataset.
    main_path : str or None
        Its file, where lazyproc opened it by path.
    source : Source
        How its positions are read.
    place : Place
        Where results go.
    function : callable
        Of one position, or of a block.
    vectorized : bool
        Which of the two.
    outputs : tuple of ResolvedOutput
        What it returns.
    parameters : dict
        The parameters.
    cores : int
        Workers at most, on this machine.
    max_bytes : int or None
        Memory for the whole computation; None: what is available.
    multiplier : float
        The user's `mem_multiplier`.
    client : Client or None
        A cluster that was handed over.
    interval : float
        Seconds between commits.
    verify : str
        How a changed source is noticed.
    status_name : str
        The name of the status mask.
    max_failures : int or None
        So many positions may fail, and are recorded; None: the first one that fails stops the run.
    apart : bool
        The function is called in worker processes only: it may crash its process, as it did another driver's, or would
        load modules in this process that the others need anyway.
    may_be_here : bool
        Though it is `apart`, it may be called in this process if the others cannot load it: none has died of it.
    argument_bytes : int
        Of the function's arguments, where it is known with which ones it is called. The driver has a copy of them, and
        another one of what is stored of them while it is written, or read to be compared.
    """

    process_name: str
    main: h5py.Dataset
    main_path: str | None
    source: Source
    place: Place
    function: Callable[..., Any]
    vectorized: bool
    outputs: tuple[ResolvedOutput, ...]
    parameters: Mapping[str, Any]
    cores: int
    max_bytes: int | None
    multiplier: float
    client: Any
    interval: float
    verify: str
    status_name: str
    max_failures: int | None = None
    apart: bool = False
    may_be_here: bool = False
    argument_bytes: int = 0
    _fingerprints: dict[str, str] = field(default_factory=dict, repr=False)
    """Made once for each call of a method of Process: the values are taken not to change within it."""
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)
    """The same for the function's code, and for its name."""

    @property
    def n_positions(self) -> int:
        """Rows of the main dataset."""
        return int(self.main.shape[0])

    @property
    def main_file(self) -> str:
        """The file of the main dataset."""
        return self.main_path or str(self.main.file.filename)

    @property
    def label(self) -> str:
        """The main dataset with its file, for messages."""
        return f"{self.main_file}::{self.main.name}"

    def work(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Work:
        """Return what decides whether two runs are the same."""
        return Work(
            main_name=str(self.main.name),
            main_file=self.main_file,
            n_positions=self.n_positions,
            process_name=self.process_name.replace("-", "_"),
            parameters=self.parameters,
            arguments=_all_arguments(self.function, args, kwargs),
            outputs=self.outputs,
            code=self._code(),
            unnamed=self._unnamed(),
            status_name=self.status_name,
            fingerprint=self._fingerprint_like,
            is_renamed=self._is_renamed,
        )

    def _is_renamed(self, stored: str) -> bool:
        """Tell whether a path leads to the main dataset, too; or nowhere, where the values are known to be the same."""
        try:
            there = self.main.file.get(stored)
        except H5_ERRORS:  # a link that leads nowhere, or to what is damaged
            there = None
        return self.verify != "none" if there is None else there == self.main

    def _code(self) -> str:
        if "code" not in self._hashes:
            self._hashes["code"] = code_hash(self.function)
        return self._hashes["code"]

    def _unnamed(self) -> str:
        if "unnamed" not in self._hashes:
            self._hashes["unnamed"] = unnamed(self.function).replace("-", "_")
        return self._hashes["unnamed"]

    def fingerprint(self) -> str:
        """Return the fingerprint of the main dataset's values as they are now."""
        return self._fingerprint(self.verify)

    def know_fingerprint(self, made: str) -> None:
        """Take the fingerprint that another rank has made; all ranks then know as much, and ask HDF5 the same."""
        self._fingerprints.setdefault(self.verify, made)

    def _fingerprint_like(self, stored: str) -> str:
        """Return the present fingerprint, made as far as possible as the stored one was."""
        if self.verify == "none":
            return ""
        if stored in self._fingerprints.values():
            return stored
        return self._fingerprint("full" if stored.startswith("all:") else "sampled")

    def _fingerprint(self, verify: str) -> str:
        if verify not in self._fingerprints:
            if verify != "none" and self.main_path is None:
                write_out(self.main, self.source)
            self._fingerprints[verify] = fingerprint(self.main, self.source, verify, self.main_path)
        return self._fingerprints[verify]

    def flush_main(self) -> None:
        """Write out what the caller's own handle still holds back: workers read the file, not the handle."""
        if self.main_path is None and self.main.file.mode != "r":
            self.main.file.flush()

    def rows_now(self, runs: Runs) -> NDArray[Any]:
        """Read positions as the caller's own handle knows them; of the file's structure nothing is written out."""
        if self.main_path is None and self.main.file.mode != "r":
            write_out(self.main, self.source)
            if not isinstance(self.source, ExtentSource):
                return HandleSource(self.main, self.source.chunk_rows, self.source.chunk_bytes).rows(runs)
        return self.source.rows(runs)

    def settled(self) -> Declared:
        """Return the same with the quickest way to read the main dataset, which must not change from now on."""
        if not isinstance(self.source, FileSource) or self.source.many_files:
            return self
        self.flush_main()
        # It reads some chunks to compare them.
        self.blocks(Runs.full(self.n_positions), Scheduler("serial", 1), None, driver_writes=False)
        quick = chunked_source(self.main, self.source.path)
        return self if quick is None else replace(self, source=quick)

    def found(self, work: Work) -> list[Found]:
        """Search for results groups that bear the name of the work."""
        with self.place.briefly() as place:
            return search(place.group(), work)

    def kernel(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], sink: BlockSink | None = None) -> Kernel:
        """Return what a worker needs to do a block; checks the arguments.

        Raises
        ------
        ParameterError
            If the function cannot be called with them.
        """
        keywords = keyword_arguments(self.function, self.parameters, args, kwargs)
        return Kernel(
            self.function,
            self.vectorized,
            tuple(map(_own, args)),
            {name: _own(value) for name, value in keywords.items()},
            self.outputs,
            self.source,
            sink,
            max_failures=self.max_failures,
        )

    @property
    def argument_books(self) -> int:
        """Bytes that the driver has for arguments at most: see `argument_bytes`."""
        return 2 * self.argument_bytes

    def called_with(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Declared, Kernel]:
        """Return the same where it is known with which arguments it is called, and its kernel; raises as `kernel`."""
        kernel = self.kernel(args, kwargs)
        return replace(self, argument_bytes=kernel.argument_bytes), kernel

    def memory(
        self, probe: Probe | None, scheduler: Scheduler | None = None, books_bytes: int | None = None
    ) -> MemoryModel:
        """Return the memory model, with what the probe measured.

        Parameters
        ----------
        probe : Probe or None
            What was measured.
        scheduler : Scheduler, optional
            Where blocks are computed: each process there keeps what the function keeps. Default: in this process.
        books_bytes : int, optional
            What the driver was found to keep, over the usual. Default: what is known without looking.
        """
        table = self.source.table_bytes if isinstance(self.source, ChunkSource) else 0
        kept = (probe.kept_bytes if probe else 0) + table
        fixed = (probe.fixed_bytes if probe else 0) + self.source.chunk_bytes
        driver = (kept if books_bytes is None else books_bytes) + self.argument_books
        if scheduler is not None and scheduler.kind not in ("serial", "threads"):
            fixed += kept  # of each worker
            if scheduler.n_processes:
                driver += table + scheduler.sent_bytes  # packed for the others
                fixed += 2 * scheduler.sent_bytes  # as it comes, and loaded
            if scheduler.kind == "both":
                driver -= kept + 2 * scheduler.sent_bytes  # the driver is one of them
        if scheduler is not None and scheduler.kind == "threads":
            fixed += _ARENA_BYTES
        return MemoryModel(
            source_bytes=self.source.shape[1] * self.source.dtype.itemsize,
            result_bytes=sum(output.row_bytes for output in self.outputs),
            multiplier=self.multiplier,
            temporary_bytes=probe.temporary_bytes if probe else 0.0,
            fixed_bytes=fixed,
            driver_bytes=max(0, driver),
            chunk_rows=self.source.chunk_rows if self.source.chunk_bytes else 1,
        )

    def limit_bytes(self) -> int:
        """Return the memory allowed, never more than is available."""
        available = available_bytes()
        return available if self.max_bytes is None else min(self.max_bytes, available)

    def probe(
        self,
        kernel: Kernel,
        remaining: Runs,
        early: Callable[[float], None] | None = None,
        crew: Crew | None = None,
    ) -> Probe | Failure:
        """Measure the function on a few positions, and check what it returns; `early` is told of the first calls.

        In this process, where what it raises comes out as it is; or, on a cluster and where the function is called in
        worker processes only, in a worker. One that cannot load the kernel leaves all to this one, if it may be here.
        """
        memory = self.memory(None)
        record = self.max_failures is not None
        sizes = memory.source_bytes, memory.result_bytes
        client = self.client or active_client()
        if client is not None and self.source.travels:
            packed = pack_for_cluster(kernel, self.process_name)
            return try_on_cluster(client, packed, Trial(remaining, *sizes, self.vectorized, record))
        if self.apart and can_be_sent(kernel):
            trial = Trial(remaining, *sizes, self.vectorized, record)
            with Crew() if crew is None else nullcontext(crew) as processes:
                made = try_in_process(kernel, trial, processes)
                if not (isinstance(made, Failure) and made.kind == "loading" and self.may_be_here):
                    return made
                processes.close()
            kernel.parcel.refuse(f"loaded there, it raises {type(made.error).__name__}: {made.error}")
        with nullcontext() if kernel.around is None else kernel.around():
            return run_probe(
                kernel.compute,
                self.source.rows,
                remaining,
                source_bytes=memory.source_bytes,
                result_bytes=memory.result_bytes,
                vectorized=self.vectorized,
                try_threads=self.cores > 1 and self.client is None,
                timed_chunk_rows=self.source.chunk_rows if self._may_send() and not self.source.read_seconds else 0,
                record=record,
                early=early,
            )

    def scheduler(self, kernel: Kernel, probe: Probe | None, n_remaining: int, *, wait: bool = True) -> Scheduler:
        """Choose where blocks are computed: the client handed over, the active one, else what the job calls for."""
        client = self.client or active_client()
        if client is not None and self.source.travels:
            return Scheduler.on_cluster(client, native_threads(client), wait=wait)
        if client is not None:
            log.warning("%s lies behind a handle that other processes cannot open: it is computed here", self.label)
        if probe is None:
            return Scheduler("processes" if self.cores > 1 else "serial", self.cores)
        return choose_local(kernel, probe, n_remaining, self.cores, apart=self.apart).sending(kernel)

    @property
    def early_processes(self) -> int:
        """How many worker processes may be started before it is known what the job takes; the others come later."""
        return min(self.cores, _EARLY_PROCESSES)

    def likely_processes(self, seconds_per_position: float) -> int:
        """Return how many worker processes are worth being started when it was just found how long a position takes.

        They are ready when the rest of the probe is done, and the results group made. No more than a few: the others
        are started when they are needed.
        """
        if self.apart or not self._may_use_processes():
            return 0
        seconds = seconds_per_position * self.n_positions
        n_processes = self.cores if seconds >= POOL_PAYS else self.cores - 1 if seconds >= HELP_PAYS else 0
        return min(n_processes, self.early_processes)

    def imports_to_spare(self) -> list[str]:
        """Return modules that the function would load in this process, but for worker processes that need them, too."""
        is_worth_it = self._may_use_processes() and self.n_positions > _FEW_POSITIONS
        return imports_to_come(self.function) if is_worth_it else []

    def processes_for_reading(self) -> int:
        """Return how many worker processes are worth being started because HDF5 has so much to read."""
        n_bytes = self.main.size * self.main.dtype.itemsize
        is_long = not self.source.read_seconds and n_bytes >= POOL_PAYS * _HDF5_PER_SECOND
        return self.early_processes if is_long and not self.apart and self._may_send() else 0

    def _may_use_processes(self) -> bool:
        """Tell whether the function, by its kind, would be called in worker processes of this machine."""
        return self._may_send() and not self.vectorized

    def _may_send(self) -> bool:
        """Tell whether worker processes of this machine would get blocks, if that is worth it."""
        return self.cores > 1 and self.source.travels and (self.client or active_client()) is None

    def in_place_everywhere(self, scheduler: Scheduler, sink: Sink | None) -> bool:
        """Tell whether all workers may write into the file themselves; if not, the log says why."""
        if sink is None or not sink.fence.holds_workers:
            return False
        if scheduler.client is None:
            return True
        from lazyproc.engine.handshake import why_not_in_place

        reason = why_not_in_place(scheduler.client, sink.trial())
        if reason:
            log.warning("%s: results travel to the driver, which writes them: %s", self.process_name, reason)
        return not reason

    def blocks(
        self,
        remaining: Runs,
        scheduler: Scheduler,
        probe: Probe | None,
        *,
        driver_writes: bool,
        limit: int | None = None,
        books_bytes: int | None = None,
    ) -> BlockSizes:
        """Divide what remains into blocks that fit into memory and last about a second, less toward the end.

        `limit` are the bytes allowed if that was found before: what is available becomes less by what the run takes.
        `books_bytes`: see `memory`.
        """
        memory = self.memory(probe, scheduler, books_bytes)
        limit = self.limit_bytes() if limit is None else limit
        beside, rows = memory.fit(limit, scheduler.n_on_machine, driver_writes=driver_writes)
        workers = beside
        if workers == scheduler.n_on_machine:  # else it is not known on which machines fewer blocks would be
            workers = scheduler.n_workers
        division = Division(
            memory_rows=rows,
            n_workers=workers,
            align=min(self.source.chunk_rows, self.n_positions),
            bytes_per_position=memory.source_bytes + memory.result_bytes,
            preferred_bytes=_LOCAL_BYTES if scheduler.kind in ("serial", "threads") else _SENT_BYTES,
            interval=self.interval,
        )
        careful = memory.careful_rows(limit, beside, driver_writes=driver_writes)
        division = division.within(rows, careful)
        seconds = None if probe is None else probe.seconds_per_position
        plan = division.plan(remaining, seconds, begins=True)
        most = plan.max_positions if probe is None or probe.is_measured else division.largest
        projected = memory.peak(min(most, max(1, remaining.n_positions)), beside, driver_writes=driver_writes)
        projected = max(projected, peak_bytes(self.outputs, self.n_positions, self.cores, limit))
        return BlockSizes(plan, workers, memory, driver_writes, division, limit, projected, most)

    def most_positions(self) -> int:
        """Return how many positions a block may have in this process, as far as is known before the first call."""
        try:
            sizes = self.blocks(Runs.full(self.n_positions), Scheduler("serial", 1), None, driver_writes=False)
        except MemoryLimitError:  # whoever computes will be told
            return 0
        return sizes.most_positions


@dataclass(frozen=True)
class BlockSizes:
    """The division into blocks, and how many of them are computed at the same time.

    Attributes
    ----------
    plan : BlockPlan
        The blocks.
    n_workers : int
        As many as the memory allows.
    memory : MemoryModel
        What a position takes.
    driver_writes : bool
        Results travel to the driver.
    division : Division
        Divides what is left of the positions anew, when it is known better how long they take.
    limit : int
        Bytes allowed.
    projected : int
        Bytes to expect at most on one machine.
    most_positions : int
        Of a block at most, for memory's sake: more than in the plan only if nothing is known of the function yet.
    """

    plan: BlockPlan
    n_workers: int
    memory: MemoryModel
    driver_writes: bool
    division: Division
    limit: int
    projected: int
    most_positions: int


def _own(value: Any) -> Any:
    """Return a copy of a value that the function could change: what was given is what is stored, and compared."""
    if not isinstance(value, list | dict | set | bytearray | np.ndarray):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # something in it cannot be copied
        return value


def _all_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Write the arguments as a text, with those that were bound to the function by `functools.partial`."""
    bound: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        bound, named = (*function.args, *bound), {**function.keywords, **named}
        function = function.func
    try:
        return arguments_text((*bound, *args), {**named, **kwargs})
    except ParameterError:  # what is bound need not have a form that can be stored, and has never been stored
        return arguments_text(args, kwargs)


def stored_probe(group: h5py.Group) -> Probe | None:
    """Return what was measured when a results group was begun; None if that is not known, or not readable."""
    try:
        stored = json.loads(attribute(group, "lazyproc_probe", "null"))
        if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in stored.values()):
            return None
        return Probe(**stored) if stored["seconds_per_position"] > 0 and stored.get("thread_gain", 1) > 0 else None
    except H5_ERRORS:
        return None
