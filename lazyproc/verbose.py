"""What is logged is shown while verbose objects are at work, however many of them there are, in how many threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.progress import has_standard_error

log = logging.getLogger("lazyproc")
_changing = threading.Lock()


class _AtWork(logging.Handler):
    """A handler of the logger for as long as any verbose object is at work; keeps what the logger was before.

    Parameters
    ----------
    level_before : int
        Of the logger, before the first of them came.
    shown : Handler or None
        Shows what is logged, where nobody else does.

    Attributes
    ----------
    n_objects : int
        Verbose objects at work.
    """

    def __init__(self, level_before: int, shown: logging.Handler | None) -> None:
        super().__init__()
        self.level_before = level_before
        self._shown = shown
        self.n_objects = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record on."""
        if self._shown is not None:
            self._shown.handle(record)


@contextmanager
def logging_as(verbose: bool) -> Iterator[None]:
    """Show what is logged in the context, if it is wanted; keep quiet where there is no standard error to write to.

    Safe in any number of threads: the logger is as before when the last verbose one has left.
    """
    if verbose:
        handler: logging.Handler = _enter()
    elif has_standard_error():
        yield
        return
    else:  # logging would raise where it wants to say that it cannot write; others, if there are any, may leave first
        log.addHandler(handler := logging.NullHandler())
    try:
        yield
    finally:
        if isinstance(handler, _AtWork):
            _leave(handler)
        else:
            log.removeHandler(handler)


def _enter() -> _AtWork:
    with _changing:
        for one in log.handlers:
            if isinstance(one, _AtWork):
                one.n_objects += 1
                return one
        shown = None if log.hasHandlers() or not has_standard_error() else logging.StreamHandler()
        handler = _AtWork(log.level, shown)
        handler.n_objects = 1
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        return handler


def _leave(handler: _AtWork) -> None:
    with _changing:
        handler.n_objects -= 1
        if not handler.n_objects:
            log.removeHandler(handler)
            log.setLevel(handler.level_before)
