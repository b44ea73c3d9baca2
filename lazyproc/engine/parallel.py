"""`parallel_compute` and `recommend_cpu_cores`: the helpers of old subclasses, on Dask."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lazyproc.core.blocks import Block
from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError, WorkerError
from lazyproc.engine.cluster import active_client, count_threads
from lazyproc.engine.failure import Failure
from lazyproc.engine.limits import available_cores, default_cores
from lazyproc.engine.worker import set_up_worker

_PIECES = 4
"""Pieces a core: enough to even out, few enough to be worth their way."""
_PIECE_BYTES = 2**20
_PIECE_ROWS = 2**12
"""A piece has no more bytes, nor more rows: on its way it is held several times, and so are its results."""
_SENT_WITH_TASK = 2**23
"""Bytes of a piece, which may be one huge row, up to which it goes along with its task on a cluster."""
_INLINE_BYTES = 2**14
"""A function with its arguments up to this size goes along with each piece; a larger one is sent to a cluster once."""
_LEAST_JOBS = 20
"""Calls a core from which several cores are worth it, for short computations."""
_IDLE_SECONDS = 60
"""How long worker processes wait for the next batch before they go."""

log = logging.getLogger("lazyproc")


def recommend_cpu_cores(
    num_jobs: int,
    requested_cores: int | None = None,
    min_free_cores: int | None = None,
    lengthy_computation: bool = False,
    verbose: bool = False,
) -> int:
    """Say how many CPU cores are worth it for a number of calls.

    Parameters
    ----------
    num_jobs : int
        How many calls there are.
    requested_cores : int, optional
        What is wished for; no more than there are. Default: all but `min_free_cores`.
    min_free_cores : int, optional
        Cores to leave alone. Default: two, or one of four or fewer, or none of one.
    lengthy_computation : bool
        Each call takes seconds: many cores pay even for few calls.
    verbose : bool
        Log the answer.

    Returns
    -------
    int
        At least 1, and no more than this process may use, by affinity and control group.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a number is no whole number, or out of range.

    Examples
    --------
    >>> recommend_cpu_cores(10, requested_cores=1)
    1
    """
    cores = available_cores()
    if isinstance(num_jobs, bool) or not isinstance(num_jobs, int | np.integer):
        raise ArgumentTypeError(f"num_jobs: {num_jobs!r} came; expected a whole number.")
    if num_jobs < 1:
        raise ArgumentValueError(f"num_jobs: {num_jobs} came; expected 1 or more.")
    if min_free_cores is not None and not isinstance(min_free_cores, int | np.integer):
        raise ArgumentTypeError(f"min_free_cores: {min_free_cores!r} came; expected a whole number.")
    if min_free_cores is not None and not 0 <= min_free_cores < cores:
        raise ArgumentValueError(f"min_free_cores: {min_free_cores} came; expected 0 to {cores - 1}.")
    if requested_cores is None:
        chosen = default_cores() if min_free_cores is None else cores - min_free_cores
    elif isinstance(requested_cores, bool) or not isinstance(requested_cores, int | np.integer):
        raise ArgumentTypeError(f"requested_cores: {requested_cores!r} came; expected a whole number, or None.")
    else:
        chosen = max(1, min(abs(int(requested_cores)), cores))
    if not lengthy_computation and chosen > 1 and num_jobs // chosen < _LEAST_JOBS:
        chosen = max(1, min(chosen, num_jobs // (2 * _LEAST_JOBS)))
    if verbose:
        log.info("%d cores for %d calls", chosen, num_jobs)
    return chosen


def parallel_compute(
    data: Any,
    func: Callable[..., Any],
    cores: int | None = None,
    lengthy_computation: bool = False,
    func_args: Sequence[Any] | None = None,
    func_kwargs: Mapping[str, Any] | None = None,
    verbose: bool = False,
    joblib_backend: str | None = None,
    *,
    client: Any = None,
) -> list[Any]:
    """Apply a function to each row of an array, in pieces on several cores, and return the list of results.

    Parameters
    ----------
    data : ndarray or dask array
        `(n_items, …)`: the function gets each item along the first axis, `(…)`. Of a dask array one chunk after the
        other is loaded, whole items at a time.
    func : callable
        Of one item.
    cores : int, optional
        CPU cores; 1 stays in this process and pickles nothing, unless `client` is given. Default: what
        `recommend_cpu_cores` says.
    lengthy_computation : bool
        Each call takes seconds.
    func_args, func_kwargs
        Further arguments of the function.
    verbose : bool
        Log what is done.
    joblib_backend : str, optional
        Taken for the sake of old callers; has no effect, since the work runs on Dask.
    client : distributed.Client, optional
        Default: the active one, else worker processes of this machine under Dask's local scheduler.

    Returns
    -------
    list
        One result an item, in order.

    Raises
    ------
    ArgumentTypeError
        If `func` is no function, `data` no array, `func_args` no list or tuple, `func_kwargs` no dict, or `cores` no
        whole number.
    ArgumentValueError
        If the active client is an asynchronous one.
    WorkerError
        If the function cannot be sent to other processes, or its results back, or a worker process died.
    Exception
        Whatever the function raises.

    Notes
    -----
    Memory is not bounded: all results are in the list, and what the items and their copies take is not watched. Nothing
    is kept if an item fails or a worker dies. `Process` bounds memory, and keeps what is done.

    Examples
    --------
    >>> parallel_compute(np.arange(6).reshape(3, 2), lambda row: int(row.sum()), cores=1)
    [1, 5, 9]
    """
    if not callable(func):
        raise ArgumentTypeError(f"func: {func!r} came; expected a function of one position.")
    if not isinstance(data, np.ndarray) and not hasattr(data, "dask"):
        raise ArgumentTypeError(f"data: a {type(data).__name__} came; expected a NumPy array or a dask array.")
    if func_args is not None and not isinstance(func_args, list | tuple):
        raise ArgumentTypeError(f"func_args: {func_args!r} came; expected a list.")
    if func_kwargs is not None and not isinstance(func_kwargs, Mapping):
        raise ArgumentTypeError(f"func_kwargs: {func_kwargs!r} came; expected a dict.")
    args, kwargs = tuple(func_args or ()), dict(func_kwargs or {})
    if not len(data):
        return []
    if client is None and cores != 1:
        client = active_client()
    cores = recommend_cpu_cores(len(data), cores, lengthy_computation=lengthy_computation, verbose=verbose)
    results: list[Any] = []
    for rows in _in_memory(data):
        if cores == 1 and client is None:
            results += [func(row, *args, **kwargs) for row in rows]
        else:
            results += _spread(rows, func, args, kwargs, cores, client)
    return results


def _in_memory(data: Any) -> Iterator[Any]:
    """Yield arrays in memory, row after row: all of an array, or chunk by chunk of a dask array, whole rows."""
    if isinstance(data, np.ndarray):
        yield data
        return
    whole = data.rechunk({axis: -1 for axis in range(1, data.ndim)})
    for number in range(whole.numblocks[0]):
        yield np.asarray(whole.blocks[number])


def _spread(
    rows: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cores: int, client: Any
) -> list[Any]:
    """Apply the function in pieces, as Dask tasks."""
    packed = _pack(func, args, kwargs)
    label = getattr(func, "__qualname__", type(func).__name__)
    workers = cores if client is None else count_threads(client)
    n_pieces = max(_PIECES * workers, -(-rows.nbytes // _PIECE_BYTES), -(-len(rows) // _PIECE_ROWS))
    edges = np.linspace(0, len(rows), min(len(rows), n_pieces) + 1).astype(int).tolist()
    pieces = [rows[start:stop] for start, stop in itertools.pairwise(edges)]
    name = f"{getattr(func, '__name__', 'function').strip('<>')}-{uuid.uuid4().hex}"
    try:
        if client is not None:
            computed = _on_client(client, name, packed, pieces)
        else:
            computed = _on_processes(name, packed, pieces, cores)
    except _FunctionFailed as failed:
        raise failed.failure.error from None
    except Exception as error:
        raise WorkerError(
            f"{label}: a worker failed ({type(error).__name__}: {error}). If a worker process died: a crash in native "
            "code, or too little memory (fewer cores need less). If results cannot be pickled: return numbers, arrays "
            "or tuples of them, or use cores=1, which stays in this process."
        ) from error
    return [result for piece in computed for result in _writable(piece)]


def _on_processes(name: str, packed: bytes, pieces: list[Any], cores: int) -> Any:
    """Run the pieces as a Dask graph on light worker processes of this machine."""
    import dask.multiprocessing
    from loky import get_reusable_executor

    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR")}
    pool = get_reusable_executor(cores, timeout=_IDLE_SECONDS, initializer=set_up_worker, env=one_thread)
    graph = {(name, number): (_apply, packed, piece) for number, piece in enumerate(pieces)}
    try:
        # One piece at a time and worker: by default Dask hands out six, which is all there is, at once.
        return dask.multiprocessing.get(graph, list(graph), pool=pool, chunksize=1, optimize_graph=False)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, kill_workers=True)
        raise


def _on_client(client: Any, name: str, packed: bytes, pieces: list[Any]) -> list[Any]:
    """Run the pieces on a cluster: a few a worker thread under way, so that they do not pile up at the scheduler."""
    from distributed import as_completed

    payload = packed if len(packed) <= _INLINE_BYTES else client.scatter(packed, broadcast=True, hash=False)
    computed: dict[int, Any] = {}
    waiting = iter(enumerate(pieces))
    pending: dict[Any, int] = {}
    done = as_completed([], loop=client.loop)

    def submit(number: int, piece: Any) -> None:
        # A piece goes along with its task, so that it is not lost with a worker; only a huge row is sent beforehand.
        data = piece if piece.nbytes <= _SENT_WITH_TASK else client.scatter(piece, hash=False)
        future = client.submit(_apply, payload, data, key=(name, number), pure=False)
        pending[future] = number
        done.add(future)

    try:
        for number, piece in itertools.islice(waiting, _PIECES * count_threads(client)):
            submit(number, piece)
        while pending:
            future = next(done)
            computed[pending.pop(future)] = future.result()
            for number, piece in itertools.islice(waiting, 1):
                submit(number, piece)
    finally:
        client.cancel(list(pending))
    return [computed[number] for number in range(len(pieces))]


def _pack(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    from lazyproc.engine.sending import dumps

    try:
        return dumps((func, args, kwargs))
    except Exception as error:
        raise WorkerError(
            f"{getattr(func, '__qualname__', func)}: the function, or an argument of it, cannot be sent to worker "
            f"processes ({type(error).__name__}: {error}). Use cores=1, which stays in this process, or keep open "
            "files and locks out of it (a static method instead of a method of the instance)."
        ) from error


class _FunctionFailed(Exception):
    """The user's function raised, in a worker; carries the error in a form that always survives the way back."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def _apply(packed: bytes, rows: Any) -> Any:
    import pickle

    func, args, kwargs = pickle.loads(packed)
    if not rows.flags.writeable:  # as they come over a network; functions may work in place, as they always could
        rows = rows.copy()
    try:
        return _compact([func(row, *args, **kwargs) for row in rows])
    except Exception as error:
        failure = Failure.of_worker(error, Block(0, (0,), (len(rows),)))
    raise _FunctionFailed(failure)  # outside of the handler: an error's context would have to be pickled, too


def _compact(results: list[Any]) -> Any:
    """Return numbers, or arrays of one form, as one array of which they are the items; else the list as it is.

    A thousand small arrays take five times their room on the way, and most of the time.
    """
    first = results[0]
    if isinstance(first, np.generic):
        alike = first.dtype.kind in "biufc" and all(type(one) is type(first) for one in results)
    else:
        alike = (
            type(first) is np.ndarray
            and first.ndim > 0
            and not first.dtype.hasobject
            and all(
                type(one) is np.ndarray
                and one.dtype == first.dtype
                and one.shape == first.shape
                and one.flags.c_contiguous
                for one in results
            )
        )
    if not alike:
        return results
    together = np.empty((len(results), *first.shape), first.dtype)
    for number, one in enumerate(results):
        together[number] = one
    return together


def _writable(piece: Any) -> Any:
    return piece.copy() if isinstance(piece, np.ndarray) and not piece.flags.writeable else piece
