"""What a worker needs to do a block: the function and its arguments, where positions come from, where results go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.apply import compute_rows
from lazyproc.core.blocks import Block
from lazyproc.core.failed import FailedRows
from lazyproc.core.memory import bytes_of
from lazyproc.core.runs import Runs
from lazyproc.core.specs import ResolvedOutput
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
