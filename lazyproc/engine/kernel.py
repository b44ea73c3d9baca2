"""The block function: read a block, compute it, write it, and return a receipt. The same for every scheduler."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.apply import OutputMismatch, RowError, compute_rows
from lazyproc.core.blocks import Block
from lazyproc.core.errors import WorkerError
from lazyproc.core.failed import FailedPosition, FailedRows
from lazyproc.core.highwater import high_water
from lazyproc.core.memory import bytes_of
from lazyproc.core.runs import Runs
from lazyproc.core.specs import ResolvedOutput
from lazyproc.engine.failure import FailedElsewhere, Failure
from lazyproc.engine.native import limits
from lazyproc.engine.parcel import Parcel


class BlockSource(Protocol):
    """What reads positions; `travels` tells whether other processes can use it.

    `read_seconds` is what reading a position takes, roughly, where threads can do it side by side; else 0.
    """

    travels: Any

    @property
    def read_seconds(self) -> float:
        """Seconds, as above."""

    def rows(self, runs: Any) -> NDArray[Any]:
        """Read runs of positions into one array `(n_positions, n_spectral)`."""


class BlockSink(Protocol):
    """What writes a block in place."""

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> int:
        """Write the rows; return a checksum."""

    def claims(self) -> BlockClaims:
        """Return what tells attempts at a block apart."""


class BlockClaims(Protocol):
    """What tells two attempts at a block apart, so that only the last one writes, and none after it is settled."""

    def begin(self) -> Any:
        """Get ready, in the driver; return the claims to be used."""

    def take(self, block: Block) -> Any:
        """Begin an attempt, in the worker; return the sink of this attempt, with its `number`."""

    def settle(self, block: Block, number: bytes) -> bool:
        """Let nobody write the block anymore, in the driver; False if that attempt is not the last one."""

    def close(self, block: Block) -> bool:
        """Let nobody write the block anymore, which will be done in parts, in the driver; False if somebody does."""

    def end(self) -> None:
        """Let nobody write anything anymore, in the driver."""


RunDetails = tuple[BlockSink | None, int | None, bool]
"""Where results go, threads of BLAS and OpenMP, whether memory is watched: known only when the run begins."""

_USUAL_ERRORS = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}
"""NumPy's error settings where nobody has changed them."""


def _unusual_errors() -> dict[str, Any] | None:
    """Return NumPy's error settings as they are here; None if they are the usual ones.

    Those that call or log are left out: their handlers cannot travel, and NumPy fails without them.
    """
    errors = {kind: rule for kind, rule in np.geterr().items() if rule not in ("call", "log")}
    return errors if any(_USUAL_ERRORS[kind] != rule for kind, rule in errors.items()) else None


@dataclass(frozen=True)
class Kernel:
    """All that a worker needs to do a block. Travels once to each worker.

    Attributes
    ----------
    function : callable
        One position, or a block of them, to its results.
    vectorized : bool
        Whether the function takes a whole block.
    args, kwargs
        Its further arguments.
    outputs : tuple of ResolvedOutput
        What it returns.
    source : BlockSource
        Where positions are read from.
    sink : BlockSink or None
        Where workers write; None sends the results to the driver.
    native_threads : int or None
        How many threads BLAS and OpenMP may use in a worker; None leaves them alone.
    max_failures : int or None
        So many positions of a block may fail and get the fill value; None: a failure fails the block.
    claims : BlockClaims or None
        Tells attempts at a block apart, where a block can be under way twice.
    watched : bool
        Whether it is found out what memory blocks take: in processes that have little else to do.
    around : callable or None
        Returns a context for each call of the function in the driver's process; stays there.
    errors : dict or None
        NumPy's error settings where the kernel was made, under which the function is called in other processes and
        threads, too; None for the usual ones.
    parcel : Parcel
        Keeps it in bytes, as `pack_once` makes them; those that `for_run` returns share it, all others begin anew.
    """

    function: Callable[..., Any]
    vectorized: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[ResolvedOutput, ...]
    source: BlockSource
    sink: BlockSink | None
    native_threads: int | None = None
    max_failures: int | None = None
    claims: BlockClaims | None = None
    watched: bool = False
    around: Callable[[], AbstractContextManager[None]] | None = None
    errors: Mapping[str, Any] | None = field(default_factory=_unusual_errors)
    parcel: Parcel = field(default_factory=Parcel, init=False, repr=False, compare=False)

    def for_run(self, sink: BlockSink | None, native_threads: int | None, *, watched: bool = False) -> Kernel:
        """Return the kernel with the way its results go, and its threads."""
        kernel = replace(self, sink=sink, native_threads=native_threads, watched=watched)
        object.__setattr__(kernel, "parcel", self.parcel)
        return kernel

    @property
    def argument_bytes(self) -> int:
        """Bytes of the function's further arguments, of which the kernel has copies of its own."""
        return bytes_of(self.args) + bytes_of(self.kwargs)

    @property
    def run_details(self) -> RunDetails:
        """What `for_run` has set, which goes to worker processes beside the rest of it."""
        return self.sink, self.native_threads, self.watched

    def compute(
        self, data: NDArray[Any], failed: FailedRows | None = None, seconds: float | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Compute the results of positions that were read already, `(n_positions, n_spectral)`.

        Parameters
        ----------
        data : ndarray
            The positions.
        failed : FailedRows, optional
            Collects rows that fail. Default: the first one raises.
        seconds : float, optional
            About how long it may take, after which the results are those of the first rows only. Default: for ever.
        """
        errors = nullcontext() if self.errors is None else np.errstate(**self.errors)
        with nullcontext() if self.around is None else self.around(), errors:
            return compute_rows(
                self.function,
                data,
                self.outputs,
                self.args,
                self.kwargs,
                vectorized=self.vectorized,
                failed=failed,
                deadline=None if seconds is None else time.perf_counter() + seconds,
            )

    def collector(self, spans: Iterable[tuple[int, int]]) -> FailedRows | None:
        """Return what collects the positions of a block that fail; None where a failure fails the block."""
        if self.max_failures is None:
            return None
        return FailedRows(self.source.rows, Runs.from_spans(spans), self.max_failures)


@dataclass
class Receipt:
    """What a worker reports of a block.

    Attributes
    ----------
    block : Block
        Which positions.
    rest : Block or None
        Those that the worker gives back, since it has taken long for the others.
    worker : str
        Host, process and thread that did it.
    seconds : float
        How long it took, reading and writing included.
    checksum : int
        Of the first bytes written, so that the driver can see whether they arrived.
    taken : int
        Bytes of memory that the block took at most, over what its process had at first; 0 if not known.
    taken_by_all : int
        The same of all blocks in its process together.
    arrays : tuple of ndarray or None
        The results, where the driver writes; taken away once they are written.
    failure : Failure or None
        Why there are no results.
    failed : tuple of FailedPosition
        Positions whose function failed; they have the fill value.
    example : Failure or None
        What the first of these raised.
    attempt : bytes
        The number of the attempt, where these are told apart.
    """

    block: Block
    worker: str = ""
    seconds: float = 0.0
    checksum: int = 0
    arrays: tuple[NDArray[Any], ...] | None = field(default=None, repr=False)
    failure: Failure | None = None
    failed: tuple[FailedPosition, ...] = ()
    example: Failure | None = None
    attempt: bytes = b""
    rest: Block | None = None
    taken: int = 0
    taken_by_all: int = 0

    @property
    def out_of_memory(self) -> bool:
        """Whether the block, or a position of it, failed for lack of memory: elsewhere, or later, it may not."""
        failures = (self.failure, self.example)
        return any(isinstance(one.error, MemoryError) for one in failures if one is not None)

    @property
    def is_from_here(self) -> bool:
        """Whether the block was done in this process."""
        return self.worker.startswith(f"{_this_process()}:")


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def run_part(block: Block, most: int | None, run: Callable[[Block], Receipt]) -> Receipt:
    """Do as many positions of a block as memory allows by now; the others come back with the receipt.

    Blocks may have been cut before it was known what they take.
    """
    if most is None or block.n_positions <= most:
        return run(block)
    first, later = block.split(most)
    receipt = run(first)
    receipt.rest = later if receipt.rest is None else receipt.rest.join(later)
    return receipt


def run_block(kernel: Kernel, block: Block) -> Receipt:
    """Do one block. Never raises for what goes wrong with the block itself: the receipt says so."""
    if not kernel.watched:
        return _do_block(kernel, block)
    with high_water.watch(block.n_positions) as memory:
        receipt = _do_block(kernel, block)
    receipt.taken, receipt.taken_by_all = memory.peak, memory.whole
    return receipt


def _do_block(kernel: Kernel, block: Block) -> Receipt:
    begin = time.perf_counter()
    receipt = Receipt(block, f"{_this_process()}:{threading.get_ident()}")
    failed = kernel.collector(block.runs())
    sink: Any = kernel.sink
    try:
        if kernel.claims is not None:
            sink = kernel.claims.take(block)
            receipt.attempt = sink.number
        with _native_threads(kernel.native_threads):
            data = kernel.source.rows(block.runs())
            arrays = kernel.compute(data, failed, block.limit)
            del data
        if arrays and len(arrays[0]) < block.n_positions:
            block, receipt.rest = block.split(len(arrays[0]))
            receipt.block = block
        if sink is None:
            receipt.arrays = arrays
        else:
            receipt.checksum = sink.write(block, arrays)
    except Exception as error:
        receipt.failure = failure_of(error, block)
    if failed is not None and failed.first is not None:
        receipt.failed = failed.positions()
        receipt.example = failure_of(failed.first, block)
    receipt.seconds = time.perf_counter() - begin
    return receipt


def failure_of(error: Exception, block: Block) -> Failure:
    """Return what went wrong with a block as a `Failure`: of the function, of what it returned, or of the worker."""
    if isinstance(error, FailedElsewhere):
        return error.failure
    if isinstance(error, RowError):
        return Failure.of_function(error, block)
    if isinstance(error, OutputMismatch):
        return Failure.of_output(error, block)
    return Failure.of_worker(error, block)


def _native_threads(limit: int | None) -> AbstractContextManager[None]:
    """Limit the threads of BLAS and OpenMP."""
    return nullcontext() if limit is None else limits.held(limit)


def pack(kernel: Kernel) -> bytes:
    """Serialise a kernel for other processes, its function by value where they could not import it.

    Raises
    ------
    Exception
        Whatever cloudpickle says when the function, or an argument, cannot be serialised.
    """
    import cloudpickle

    from lazyproc.engine.sending import dumps

    kernel = replace(kernel, around=None)
    module = _own_module(kernel.function)
    if module is not None:
        cloudpickle.register_pickle_by_value(module)
        try:
            return dumps(kernel)
        except Exception:  # something in the module cannot be sent: let the workers import it
            pass
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    return dumps(kernel)


def pack_once(kernel: Kernel) -> bytes:
    """Serialise a kernel for worker processes of this machine, but for what `for_run` sets.

    So the same bytes show that it can be sent, and serve for a trial of the function and for the run. They are kept
    until the kernel's parcel lets go of them. Raises as `pack`.
    """
    return kernel.parcel.get(lambda: pack(kernel.for_run(None, None)))


def pack_for_cluster(kernel: Kernel, name: str) -> bytes:
    """Serialise a kernel; raises WorkerError where that cannot be done."""
    try:
        return pack(kernel)
    except Exception as error:
        raise WorkerError(
            f"{name}: the function, or an argument of it, cannot be sent to the workers of the cluster "
            f"({type(error).__name__}: {error}). Define the function at the top level of a module, and keep open files "
            "and locks out of its arguments."
        ) from error


def _own_module(function: Callable[..., Any]) -> Any:
    """Return the function's module if it belongs to no installed package: workers elsewhere would not find it."""
    import sys
    import sysconfig

    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None) or ""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None or name == "__main__" or name.partition(".")[0] == "lazyproc":
        return None  # built in, or sent by value by cloudpickle itself, or surely there
    installed = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    return None if any(os.path.realpath(file).startswith(path + os.sep) for path in installed) else module


@functools.lru_cache(maxsize=4)
def unpack(packed: bytes) -> Kernel:
    """Load a kernel; the last few are kept, so that a worker loads it once."""
    import pickle

    kernel = pickle.loads(packed)
    assert isinstance(kernel, Kernel)
    return kernel


def run_loaded(load: Callable[[], Kernel], block: Block) -> Receipt:
    """Do one block with a kernel that may have to be loaded, in a process that does not end for a function's exit."""
    try:
        kernel = load()
    except MemoryError as error:  # elsewhere, or later, there may be enough
        return Receipt(block, failure=Failure.of_worker(error, block))
    except (Exception, SystemExit) as error:
        return Receipt(block, failure=Failure.of_loading(error, block))
    try:
        return run_block(kernel, block)
    except SystemExit as error:  # it raises no Exception
        return Receipt(block, failure=Failure.of_worker(error, block))


def run_task(packed: bytes, block: Block) -> Receipt:
    """Do one block as a task of a cluster, whose workers keep data of others, too, and grow as long as they live.

    What it takes of memory is over what its process has now, unless another block is under way there.
    """

    def load() -> Kernel:
        kernel = unpack(packed)
        if kernel.watched:
            high_water.forget()
        return kernel

    return run_loaded(load, block)
