"""Kernels in bytes: how they travel to other processes, and blocks that are done with them there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lazyproc.core.blocks import Block
from lazyproc.core.errors import WorkerError
from lazyproc.core.highwater import high_water
from lazyproc.engine.block_function import run_loaded
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.receipt import Receipt


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
    paths = sysconfig.get_paths()  # others hold more than what is installed: "data" may be /usr/local
    installed = {os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return None if any(os.path.realpath(file).startswith(path + os.sep) for path in installed) else module


@functools.lru_cache(maxsize=4)
def unpack(packed: bytes) -> Kernel:
    """Load a kernel; the last few are kept, so that a worker loads it once."""
    import pickle

    kernel = pickle.loads(packed)
    assert isinstance(kernel, Kernel)
    return kernel


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
