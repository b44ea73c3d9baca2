"""Stopping early on purpose: the wish to stop, set by a signal or by a failed block, seen by the engines."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that stopped early with its work committed: run again."""

log = logging.getLogger("lazyproc")


class Drain:
    """The wish to stop early: set by a signal or by a failed block, seen by the engines.

    The first Ctrl-C, or SIGTERM, lets the blocks under way finish; a second one leaves at once. Handlers are only
    installed in the main thread, and taken away again.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self.signal: int | None = None

    def requested(self) -> bool:
        """Tell whether nothing new shall be started."""
        return self._requested.is_set()

    def request(self) -> None:
        """Let nothing new be started."""
        self._requested.set()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Turn signals into the wish to stop, for as long as the context lasts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        watched = [signal.SIGINT]
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            watched.append(signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in watched}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested.is_set():
            raise KeyboardInterrupt
        self.signal = number
        self._requested.set()
        log.warning("stopping: blocks under way are finished and committed; interrupt again to leave at once")
