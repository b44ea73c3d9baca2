"""What all engines have in common: streams of receipts, and how they are told to stop.

Each engine is a generator: blocks go in, receipts come out as they are ready; None comes out now and then while nothing
is ready, so that the driver can keep its checkpoint interval. Once `stopping()` is true nothing new is started and
what is under way is waited for; once `dropping()` is true it is not waited for any longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from lazyproc.engine.receipt import Receipt

TICK = 0.25
"""Seconds: how often an engine gives the driver a turn while nothing is ready."""

Receipts = Iterator[Receipt | None]
Wish = Callable[[], bool]
"""Tells whether somebody wishes that nothing new is started, or that what is under way is dropped."""
Interruptible = Callable[[], AbstractContextManager[None]]


def never() -> bool:
    """Return False: neither stop nor drop anything."""
    return False


def a_tick() -> float:
    """Return how long to wait, as a rule, for what is ready."""
    return TICK
