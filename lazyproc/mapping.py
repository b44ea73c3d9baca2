"""`map_positions`: a process without a class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import h5py

from lazyproc.arguments import check_max_failures, check_name
from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError
from lazyproc.core.specs import Output
from lazyproc.process import Process

if TYPE_CHECKING:
    import xarray


def map_positions(
    function: Callable[..., Any],
    h5_main: h5py.Dataset | str,
    outputs: Mapping[str, Output] | Output,
    *,
    process_name: str | None = None,
    params: Mapping[str, Any] | None = None,
    vectorized: bool = False,
    lazy: bool = False,
    override: bool = False,
    max_failures: int | None = None,
    **options: Any,
) -> h5py.Group | xarray.Dataset:
    """Apply a function to every position of a main dataset.

    Parameters
    ----------
    function : callable
        One position `(n_spectral,)`, or with `vectorized` a block `(n_positions, n_spectral)`, to its results.
    h5_main : h5py.Dataset, str or path-like
        The main dataset, or its address ``"scan.h5::/Measurement_000/Channel_000/Raw_Data"``.
    outputs : dict of str to Output, or Output
        What the function returns. A single Output is called as the process is.
    process_name : str, optional
        Names the results group. Default: the name of the function.
    params : dict, optional
        Parameters: the function gets those it accepts.
    vectorized : bool
        Whether the function takes many positions at once.
    lazy : bool
        Return the results as an `xarray.Dataset` that computes what is asked for and writes nothing; else compute all
        and return the results group.
    override : bool
        Compute afresh, whatever there is.
    max_failures : int, optional
        With ``on_error="record"``: so many positions may fail. Default: 1000.
    **options
        Further arguments of `Process`.

    Returns
    -------
    h5py.Group or xarray.Dataset
        See `lazy`. A group that is found by an address is read-only; its file keeps nobody from writing, and is closed
        by itself when nobody holds the group any more. Files that the caller has opened are the caller's to close.

    Raises
    ------
    ArgumentTypeError
        If `function` cannot be called.
    LazyprocError, Interrupted, SystemExit
        As `Process` and its `compute`, or `to_xarray`, do.

    Notes
    -----
    Of concurrency and failure the same holds as of `Process`: one run a file at a time, and it may be killed at any
    instant; the same call goes on.

    Examples
    --------
    ``scan.h5`` has 4 x 5 positions of 6 values, 0 to 119:

    >>> import numpy as np, lazyproc
    >>> address = "scan.h5::/Measurement_000/Channel_000/Raw_Data"
    >>> group = lazyproc.map_positions(np.ptp, address, {"Range": lazyproc.Output("f4", units="V")})
    >>> group["Range"][:3, 0].tolist()
    [5.0, 5.0, 5.0]
    >>> maps = lazyproc.map_positions(np.max, address, lazyproc.Output("f4"), process_name="Highest", lazy=True)
    >>> float(maps["Highest"].max())
    119.0
    """
    if not callable(function):
        raise ArgumentTypeError(f"function: {function!r} came; expected a function of one position.")
    name = _name_of(function) if process_name is None else check_name(process_name)
    kind = "_block_function" if vectorized else "_map_function"
    declared = {name: outputs} if isinstance(outputs, Output) else outputs
    attributes: dict[str, Any] = {"outputs": declared, kind: staticmethod(function)}
    if lazy and override:
        raise ArgumentValueError(
            "override: True came with lazy=True, which computes what is asked for and keeps nothing; expected one of "
            "the two. Without lazy results are computed afresh and kept."
        )
    if max_failures is not None and options.get("on_error") != "record":
        raise ArgumentValueError(
            f"max_failures: {max_failures!r} came without on_error='record'; expected both, since without it the first "
            "position that fails stops the run."
        )
    if max_failures is not None:
        attributes["max_failures"] = check_max_failures(max_failures)
    process_class = type(name, (Process,), attributes)
    process = process_class(h5_main, name, params, lazy=lazy, **options)
    return process.to_xarray() if lazy else process.compute(override)


def _name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, behind whatever arguments were filled in already."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")
