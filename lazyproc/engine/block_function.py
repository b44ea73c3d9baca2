"""The block function: read a block, compute it, write it, and return a receipt. The same for every scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.highwater import high_water
from lazyproc.core.no_result import OutputMismatch, RowError
from lazyproc.engine.failure import FailedElsewhere, Failure
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.native import limits
from lazyproc.engine.receipt import Receipt, this_process


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
    receipt = Receipt(block, f"{this_process()}:{threading.get_ident()}")
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
