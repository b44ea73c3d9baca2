"""What a declared process is on one main dataset: the work, what it reads, and what a worker needs to do it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ParameterError
from lazyproc.core.identity import code_hash, unnamed
from lazyproc.core.parameters import arguments_text
from lazyproc.core.runs import Runs
from lazyproc.core.signature import keyword_arguments
from lazyproc.core.specs import ResolvedOutput
from lazyproc.engine.kernel import BlockSink, Kernel
from lazyproc.hdf5.chunks import chunked_source
from lazyproc.hdf5.extents import ExtentSource
from lazyproc.hdf5.fingerprint import fingerprint
from lazyproc.hdf5.place import Place
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.search import Found, Work, search
from lazyproc.hdf5.source import FileSource, HandleSource, Source, write_out


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
    batch : str
        Of which jobs, one after another, results that are begun are said to be; empty if of none.
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
    batch: str = ""
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
        """Return the same with the quickest way to read the main dataset, which must not change from now on.

        Reads some storage chunks, so it must be known that one fits into memory: see `lazyproc.run.sizes.check_fits`.
        """
        if not isinstance(self.source, FileSource) or self.source.many_files:
            return self
        self.flush_main()
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

    def called_with(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Declared, Kernel]:
        """Return the same where it is known with which arguments it is called, and its kernel; raises as `kernel`."""
        kernel = self.kernel(args, kwargs)
        return replace(self, argument_bytes=kernel.argument_bytes), kernel


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
