"""The block function: read a block, compute it, write it, and return a receipt. The same for every scheduler."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from numpy.typing import NDArray

from lazyproc.core.apply import OutputMismatch, RowError, compute_rows
from lazyproc.core.blocks import Block
from lazyproc.core.specs import ResolvedOutput
from lazyproc.engine.failure import Failure


class BlockSource(Protocol):
    """What reads positions; `travels` tells whether other processes can use it."""

    travels: Any

    def rows(self, runs: Any) -> NDArray[Any]:
        """Read runs of positions into one array `(n_positions, n_spectral)`."""


class BlockSink(Protocol):
    """What writes a block in place."""

    def write(self, block: Block, arrays: Sequence[NDArray[Any]]) -> tuple[int, int]:
        """Write the rows; return the bytes written and a checksum."""


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
    """

    function: Callable[..., Any]
    vectorized: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[ResolvedOutput, ...]
    source: BlockSource
    sink: BlockSink | None
    native_threads: int | None = None

    def for_run(self, sink: BlockSink | None, native_threads: int | None) -> Kernel:
        """Return the kernel with the way its results go, and its threads."""
        return replace(self, sink=sink, native_threads=native_threads)

    def compute(self, data: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Compute the results of positions that were read already, `(n_positions, n_spectral)`."""
        return compute_rows(self.function, data, self.outputs, self.args, self.kwargs, vectorized=self.vectorized)


@dataclass
class Receipt:
    """What a worker reports of a block.

    Attributes
    ----------
    block : Block
        Which positions.
    worker : str
        Host, process and thread that did it.
    seconds : float
        How long it took, reading and writing included.
    bytes_read, bytes_written : int
        In the worker.
    checksum : int
        Of the first bytes written, so that the driver can see whether they arrived.
    arrays : tuple of ndarray or None
        The results, where the driver writes; taken away once they are written.
    failure : Failure or None
        Why there are no results.
    """

    block: Block
    worker: str = ""
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    checksum: int = 0
    arrays: tuple[NDArray[Any], ...] | None = field(default=None, repr=False)
    failure: Failure | None = None


def run_block(kernel: Kernel, block: Block) -> Receipt:
    """Do one block. Never raises for what goes wrong with the block itself: the receipt says so."""
    begin = time.perf_counter()
    receipt = Receipt(block, f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}")
    try:
        with _native_threads(kernel.native_threads):
            data = kernel.source.rows(block.runs())
            receipt.bytes_read = data.nbytes
            arrays = kernel.compute(data)
            del data
        if kernel.sink is None:
            receipt.arrays = arrays
        else:
            receipt.bytes_written, receipt.checksum = kernel.sink.write(block, arrays)
    except RowError as error:
        receipt.failure = Failure.of_function(error, block)
    except OutputMismatch as error:
        receipt.failure = Failure.of_output(error, block)
    except Exception as error:
        receipt.failure = Failure.of_worker(error, block)
    receipt.seconds = time.perf_counter() - begin
    return receipt


def _native_threads(limit: int | None) -> AbstractContextManager[Any]:
    """Limit the threads of BLAS and OpenMP; where threads of one process share them, the first one decides."""
    if limit is None:
        return nullcontext()
    from threadpoolctl import threadpool_limits

    limited: AbstractContextManager[Any] = threadpool_limits(limit)
    return limited


def pack(kernel: Kernel) -> bytes:
    """Serialise a kernel for other processes, its function by value where they could not import it.

    Raises
    ------
    Exception
        Whatever cloudpickle says when the function, or an argument, cannot be serialised.
    """
    import cloudpickle

    module = _own_module(kernel.function)
    if module is not None:
        cloudpickle.register_pickle_by_value(module)
        try:
            return bytes(cloudpickle.dumps(kernel))
        except Exception:  # something in the module cannot be sent: let the workers import it
            pass
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    return bytes(cloudpickle.dumps(kernel))


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


def run_packed(packed: bytes, block: Block) -> Receipt:
    """Do one block with a kernel that was packed."""
    try:
        kernel = unpack(packed)
    except Exception as error:
        return Receipt(block, failure=Failure.of_worker(error, block))
    return run_block(kernel, block)
