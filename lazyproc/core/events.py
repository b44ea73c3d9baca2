"""What a run tells while it goes on: plain values, for a progress bar, a log, a notebook or a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """The loop begins.

    Attributes
    ----------
    process_name : str
        Of the process.
    n_positions, n_done : int
        All positions of the main dataset, and those done before.
    scheduler : str
        Where the blocks run, in words.
    """

    process_name: str
    n_positions: int
    n_done: int
    scheduler: str


@dataclass(frozen=True)
class BlockDone:
    """A block was computed and written; `n_positions` of it count."""

    n_positions: int


@dataclass(frozen=True)
class Committed:
    """The status mask on disk now tells of `n_done` positions in all."""

    n_done: int


@dataclass(frozen=True)
class Stopping:
    """A signal asked to stop: nothing new is started, what is under way has `grace_seconds` to end."""

    grace_seconds: float


@dataclass(frozen=True)
class Finished:
    """The loop is over, for whatever reason; `n_done` positions are committed."""

    n_done: int


Event = Started | BlockDone | Committed | Stopping | Finished
Listener = Callable[[Event], None]
