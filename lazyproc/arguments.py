"""Check the arguments of the constructor, each with a message that says what came and what was expected."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError
from lazyproc.core.memory import MEBIBYTE
from lazyproc.hdf5.attributes import check_parameters
from lazyproc.hdf5.fingerprint import VERIFY


def check_name(process_name: Any) -> str:
    """Check the process name: a text that can be part of a group's name."""
    if not isinstance(process_name, str):
        raise ArgumentTypeError(
            f"process_name: a value of the type {type(process_name).__name__} came; expected a text, which names the "
            "results group."
        )
    name = process_name.strip()
    storable = name.encode("utf-8", "ignore").decode() == name  # lone surrogates have no UTF-8
    if not name or not storable or "/" in name or "\0" in name or name in (".", ".."):
        raise ArgumentValueError(
            f"process_name: {process_name!r} came; expected a text that is not empty, without '/', since it names the "
            "results group."
        )
    return name


def check_parms(parms_dict: Any, *, storable: bool = True) -> dict[str, Any]:
    """Check that the parameters are a mapping of names to values; ones that can be stored, if lazyproc stores them.

    Else the very object is returned: old subclasses go on changing theirs.
    """
    if parms_dict is None:
        return {}
    if not isinstance(parms_dict, Mapping):
        raise ArgumentTypeError(
            f"parms_dict: a value of the type {type(parms_dict).__name__} came; expected a dict of parameter names and "
            "values."
        )
    if not storable and isinstance(parms_dict, dict):
        return parms_dict
    parameters = dict(parms_dict)
    check_parameters(parameters)
    return parameters


def check_cores(cores: Any) -> int | None:
    """Check the number of cores; None means the default."""
    if cores is None:
        return None
    if isinstance(cores, bool) or not isinstance(cores, int | np.integer):
        raise ArgumentTypeError(f"cores: {cores!r} came; expected a whole number of CPU cores, or None.")
    if cores < 1:
        raise ArgumentValueError(f"cores: {cores} came; expected 1 or more.")
    return int(cores)


def check_memory(max_mem_mb: Any) -> int | None:
    """Check the memory limit in MiB and return it in bytes; None means what is available."""
    if max_mem_mb is None:
        return None
    if isinstance(max_mem_mb, bool) or not isinstance(max_mem_mb, int | np.integer):
        raise ArgumentTypeError(f"max_mem_mb: {max_mem_mb!r} came; expected a whole number of MiB, or None.")
    if max_mem_mb <= 0:
        raise ArgumentValueError(f"max_mem_mb: {max_mem_mb} came; expected more than 0 MiB.")
    return int(max_mem_mb) * MEBIBYTE


def check_multiplier(mem_multiplier: Any) -> float:
    """Check the memory multiplier: at least 1."""
    if isinstance(mem_multiplier, bool) or not isinstance(mem_multiplier, int | float | np.integer | np.floating):
        raise ArgumentTypeError(
            f"mem_multiplier: {mem_multiplier!r} came; expected a number of at least 1: the bytes that a position "
            "really takes over its source bytes."
        )
    if not math.isfinite(mem_multiplier) or mem_multiplier < 1:
        raise ArgumentValueError(f"mem_multiplier: {mem_multiplier} came; expected at least 1.")
    return float(mem_multiplier)


def check_flag(value: Any, name: str) -> bool:
    """Check a truth value: True or False, or the whole numbers 1 and 0 that stand for them in older programs."""
    if not isinstance(value, bool | np.bool_ | int | np.integer) or value not in (0, 1):
        raise ArgumentTypeError(f"{name}: {value!r} came; expected True or False.")
    return bool(value)


def check_client(client: Any) -> Any:
    """Check that a client is one of Dask distributed, and synchronous."""
    if client is None:
        return None
    if not all(hasattr(client, name) for name in ("persist", "scatter", "nthreads")):
        raise ArgumentTypeError(
            f"client: a value of the type {type(client).__name__} came; expected a distributed.Client (make one of a "
            "cluster or of a scheduler's address with Client(...)), or None."
        )
    if getattr(client, "asynchronous", False):
        raise ArgumentValueError("client: an asynchronous Client came; expected a synchronous one.")
    return client


def check_interval(checkpoint_interval: Any) -> float:
    """Check the seconds between commits."""
    if isinstance(checkpoint_interval, bool) or not isinstance(
        checkpoint_interval, int | float | np.integer | np.floating
    ):
        raise ArgumentTypeError(f"checkpoint_interval: {checkpoint_interval!r} came; expected a number of seconds.")
    if math.isnan(checkpoint_interval) or checkpoint_interval < 0:
        raise ArgumentValueError(f"checkpoint_interval: {checkpoint_interval} came; expected 0 seconds or more.")
    return float(checkpoint_interval)


def check_verify(verify: Any) -> str:
    """Check how a changed source is noticed."""
    if not isinstance(verify, str):
        raise ArgumentTypeError(f"verify: {verify!r} came; expected one of {', '.join(map(repr, VERIFY))}.")
    if verify not in VERIFY:
        raise ArgumentValueError(f"verify: {verify!r} came; expected one of {', '.join(map(repr, VERIFY))}.")
    return verify


def check_on_error(on_error: Any) -> str:
    """Check what is done about positions that fail."""
    if not isinstance(on_error, str):
        raise ArgumentTypeError(f"on_error: {on_error!r} came; expected 'raise' or 'record'.")
    if on_error not in ("raise", "record"):
        raise ArgumentValueError(
            f"on_error: {on_error!r} came; expected 'raise' (the first position that fails stops the run) or 'record' "
            "(it gets the fill value, and its error is kept)."
        )
    return on_error


def check_max_failures(max_failures: Any) -> int:
    """Check how many positions may fail."""
    if isinstance(max_failures, bool) or not isinstance(max_failures, int | np.integer):
        raise ArgumentTypeError(f"max_failures: {max_failures!r} came; expected a whole number of positions.")
    if max_failures < 1:
        raise ArgumentValueError(
            f"max_failures: {max_failures} came; expected 1 or more. on_error='raise' stops at the first failure."
        )
    return int(max_failures)


def check_main(h5_main: Any) -> str | h5py.Dataset:
    """Check that the main dataset is an address or an open dataset; says what is wrong with other things."""
    if isinstance(h5_main, str | os.PathLike):
        return os.fspath(h5_main)
    if not isinstance(h5_main, h5py.Dataset):
        raise ArgumentTypeError(
            f"h5_main: a value of the type {type(h5_main).__name__} came; expected an open h5py.Dataset, or an address "
            "such as 'scan.h5::/Measurement_000/Channel_000/Raw_Data'."
        )
    if not h5_main:
        raise ArgumentValueError("h5_main: the dataset's file is closed. Open it again, or give its address.")
    return h5_main


def check_positions(positions: Any, n_positions: int) -> np.ndarray:
    """Check which positions shall be tried; negative ones count from the end, None means the one in the middle."""
    if positions is None:
        return np.array([n_positions // 2])
    try:
        wanted = np.atleast_1d(np.asarray(positions))
    except ValueError:  # lists of different lengths
        wanted = np.empty(0)
    if wanted.dtype.kind not in "iu" or wanted.ndim != 1 or wanted.size == 0:
        raise ArgumentTypeError(f"positions: {positions!r} came; expected a position, or a sequence of positions.")
    wanted = np.where(wanted < 0, wanted + n_positions, wanted)
    if wanted.min() < 0 or wanted.max() >= n_positions:
        raise ArgumentValueError(f"positions: {positions!r} came; expected numbers from 0 to {n_positions - 1}.")
    return wanted
