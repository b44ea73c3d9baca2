"""Signals of a run that drains: which are free to be used, and a thread that sees that they reach the main thread."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from typing import Protocol

NUDGE = signal.SIGURG
"""What wakes the main thread up: ignored by default, and used by hardly anybody."""
_LOOK_SECONDS = 0.25
_SOON_SECONDS = 0.05

log = logging.getLogger("lazyproc")


class Wish(Protocol):
    """What the watch needs to know of the wish to stop."""

    grace: float
    """Seconds for what is under way."""

    @property
    def n_signals(self) -> int:
        """How many signals have come, of those that ask for an end of what is under way."""

    def drop(self) -> None:
        """Let what is under way be dropped."""


class Watch:
    """A thread that says what happens, keeps the time, and sees to it that signals reach the main thread.

    Parameters
    ----------
    wish : Wish
        Told when the grace is over.
    watched : sequence of int
        The signals, whose handlers are installed.

    Notes
    -----
    The system gives a signal to any thread, and Python runs handlers in the main thread only, which may sleep in a
    function for ever. So the system's own handler writes a byte to a pipe, in whichever thread it runs; if the handler
    in Python has not run soon after, the main thread is sent another signal, and wakes up.
    """

    def __init__(self, wish: Wish, watched: Sequence[int]) -> None:
        self._wish = wish
        self._watched = frozenset(watched)
        self._main = threading.get_ident()
        self._read, self._write = os.pipe()
        self._poll = select.poll()  # takes descriptors of any number, which select does not
        self._poll.register(self._read, select.POLLIN)
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._work, name="lazyproc-drain", daemon=True)
        self._hears = False
        self._before = -1

    def start(self, outer: Watch | None = None) -> None:
        """Begin; called by the main thread, as is `end`. The watch of an outer run hears nothing until then."""
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._hears = self._before == -1 or (outer is not None and outer._hears)
        if not self._hears:  # somebody else hears of signals in this way: asyncio
            signal.set_wakeup_fd(self._before)
        self._thread.start()

    def end(self) -> None:
        """End the thread; a signal that it has sent is taken by its handler before this returns."""
        if self._hears:
            signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)
        os.close(self._write)
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._read)
        os.getppid()  # on its way back from any system call a thread takes the signals that were sent to it

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._watched)
        n_said = 0
        deadline = math.inf
        while (heard := self._wait(min(max(0.0, deadline - time.monotonic()), _LOOK_SECONDS))) is not None:
            if heard and self._wish.n_signals == n_said:
                time.sleep(_SOON_SECONDS)
                if self._wish.n_signals == n_said:
                    self._nudge()
            if n_said == 0 and self._wish.n_signals:
                n_said, deadline = 1, time.monotonic() + self._wish.grace
                log.warning(
                    "stopping: what is under way is finished and committed, for at most %g s; interrupt again to leave "
                    "at once",
                    self._wish.grace,
                )
            if n_said == 1 and self._wish.n_signals > 1:
                n_said, deadline = 2, math.inf
                log.warning("leaving at once: what is under way is dropped")
            elif time.monotonic() >= deadline:
                deadline = math.inf
                log.warning("the grace of %g s is over: what is under way is dropped", self._wish.grace)
                self._wish.drop()
                self._nudge()

    def _wait(self, seconds: float) -> bool | None:
        """Tell whether a signal has come within the time; None at the end."""
        if not self._poll.poll(1000 * seconds):
            return False
        numbers = os.read(self._read, 64)
        return bool(self._watched.intersection(numbers)) if numbers else None

    def _nudge(self) -> None:
        handler = signal.getsignal(NUDGE)
        if isinstance(getattr(handler, "__self__", None), type(self._wish)):  # ours, or that of an inner run
            signal.pthread_kill(self._main, NUDGE)


def is_free(number: int, kind: type) -> bool:
    """Tell whether a signal has no handler but the default one, or the method of an object of this kind."""
    handler = signal.getsignal(number)
    if handler is signal.default_int_handler or isinstance(getattr(handler, "__self__", None), kind):
        return True
    return handler is signal.SIG_DFL and not _caught_by_the_system() >> (number - 1) & 1


def _caught_by_the_system() -> int:
    """Return which signals have a handler, one bit each: C code (MPI, faulthandler) sets some unknown to Python."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1], 16) for line in file if line.startswith("SigCgt:")), 0)
    except OSError:  # no Linux
        return 0
