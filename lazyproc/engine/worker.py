"""What a worker process of this machine does: blocks, one after the other, for as long as its driver is there."""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

from lazyproc.core.blocks import Block
from lazyproc.engine.block_function import run_loaded
from lazyproc.engine.failure import Failure
from lazyproc.engine.kernel import Kernel, RunDetails
from lazyproc.engine.receipt import Receipt

LOOK_SECONDS = 0.5
"""How often a worker process looks whether its driver is still there, and the driver whether a worker is."""
FOR_THE_DRIVER = (signal.SIGTERM, signal.SIGUSR1)
"""Slurm sends them to each process of a job; the driver drains."""


def set_up_worker() -> None:
    """Set up a worker process: when to stop is the driver's affair, and without a driver there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = os.getpid()

    def go_on(number: int, frame: Any) -> None:
        if os.getpid() != worker:  # forked by the function: not ours to protect
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in FOR_THE_DRIVER:
        signal.signal(number, go_on)  # unlike SIG_IGN not inherited by programs that the function starts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_DRIVER)
    threading.Thread(target=_leave_with, args=(os.getppid(),), name="lazyproc-driver", daemon=True).start()


def _leave_with(driver: int) -> None:
    """End this process soon after the driver has gone: a driver that is killed cannot send its workers home."""
    while os.getppid() == driver:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def serve(descriptor: int, modules: Iterable[str] = ()) -> None:
    """Do blocks, or make a trial first, until the driver hangs up.

    Before them come, as messages, names of modules that will be needed, any number of times, then what `for_run` sets
    of a kernel, and the kernel. Says first that it is here, and then that it has the kernel. After a trial it is here
    again, for another kernel.
    """
    from multiprocessing.connection import Connection

    set_up_worker()
    driver = Connection(descriptor)
    _load(modules)
    try:
        while True:
            driver.send_bytes(b"here")
            while isinstance(run := driver.recv(), list):
                _load(run)
            packed = Packed(driver.recv_bytes(), run)
            driver.send_bytes(b"ready")
            work: Any = None
            while work is None or isinstance(work, Block):
                work = driver.recv()
                driver.send_bytes(_do(packed, work))
            del packed  # another one comes, which may be as large
    except (EOFError, OSError):
        _leave()  # the driver has hung up


def _leave() -> NoReturn:
    """End the process at once: taking apart what it has loaded takes as long as loading it, and the driver waits."""
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(0)


def _load(modules: Iterable[str]) -> None:
    for name in modules:
        with suppress(Exception, SystemExit):  # whoever needs it will try again, and tell
            importlib.import_module(name)


class Packed:
    """A kernel in bytes, which are kept until it is loaded, when there is a first block for it.

    Parameters
    ----------
    packed : bytes
        As `pack_once` makes them.
    run : RunDetails
        What `for_run` sets.
    """

    def __init__(self, packed: bytes, run: RunDetails) -> None:
        self.bytes = packed
        self._run = run
        self._kernel: Kernel | None = None

    def load(self) -> Kernel:
        """Return the kernel; raises whatever loading it raises, each time."""
        if self._kernel is None:
            sink, native_threads, watched = self._run
            self._kernel = pickle.loads(self.bytes).for_run(sink, native_threads, watched=watched)
            self.bytes = b""
        return self._kernel


def _do(packed: Packed, work: Any) -> bytes:
    """Do a block, or whatever else answers for itself with a packed kernel."""
    if isinstance(work, Block):
        return _dump(run_loaded(packed.load, work))
    try:
        return pickle.dumps(work.answer(packed.bytes), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps(work.failure(error))


def _dump(receipt: Receipt) -> bytes:
    try:
        return pickle.dumps(receipt, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # out of memory, most likely
        return pickle.dumps(Receipt(receipt.block, failure=Failure.of_worker(error, receipt.block)))
