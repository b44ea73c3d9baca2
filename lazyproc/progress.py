"""What a person sees of a run: a progress bar with positions, rate and time left, in a terminal or a notebook."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from lazyproc.core.events import BlockDone, Event, Finished, Started, Stopping

_PATIENCE = 1.0
"""Seconds before a bar appears: short jobs need none."""
_USUAL = {"ncols": 80, "nrows": 24}
"""Columns and rows of a terminal that does not tell its own."""

log = logging.getLogger("lazyproc")


class ProgressBar:
    """A listener that draws a bar; silent where nobody looks (off a terminal and outside of notebooks).

    Parameters
    ----------
    delay : float
        Seconds before the bar appears.

    Notes
    -----
    A bar that cannot be drawn is none: what it raises is logged at debug, and nothing more is shown of this run.
    """

    def __init__(self, delay: float = _PATIENCE) -> None:
        self._delay = delay
        self._started: Started | None = None
        self._begin = 0.0
        self._n_done = 0
        self._says = ""
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        try:
            self._take(event)
        except Exception as error:  # whatever a terminal, a notebook or tqdm has: a run does not end for want of a bar
            log.debug("the progress bar is shown no more: %s: %s", type(error).__name__, error)
            if self._bar is not None:
                self._bar.disable = True  # nor is it closed once more when it is collected
            self._bar = self._started = None

    def _take(self, event: Event) -> None:
        if isinstance(event, Started):
            self._started, self._begin, self._n_done = event, time.monotonic(), 0
            self._says = event.process_name
        elif self._started is not None and isinstance(event, BlockDone):
            self._n_done += event.n_positions
            self._show(event.n_positions)
        elif self._started is not None and isinstance(event, Stopping):
            self._says = f"{self._started.process_name}: stopping"
            if self._bar is not None:
                self._bar.set_description(self._says)
        elif isinstance(event, Finished):
            if self._bar is not None:
                self._bar.close()
            self._bar = self._started = None

    def _show(self, n_more: int) -> None:
        """Move the bar on, which is made once it is time for it: a short job need not load what draws it."""
        if self._bar is not None:
            self._bar.update(n_more)
            return
        passed = time.monotonic() - self._begin
        if passed >= self._delay and has_standard_error() and _is_looked_at():
            self._bar = self._open()
            self._bar.start_t = self._bar.last_print_t = time.time() - passed  # as if it had been there all along
            self._bar.update(self._n_done)

    def _open(self) -> Any:
        from tqdm.auto import tqdm

        assert self._started is not None
        # disable=None makes tqdm silent unless standard error is a terminal; its notebook form knows better itself.
        return tqdm(
            total=self._started.n_positions,
            initial=self._started.n_done,
            desc=self._says,
            unit=" positions",
            unit_scale=False,
            **_width(),
            disable=None,
            delay=self._delay,
            leave=True,
        )


def has_standard_error() -> bool:
    """Tell whether there is a standard error to write to: none was given (``2>&-``, a service), or it was closed."""
    return sys.stderr is not None and not getattr(sys.stderr, "closed", False)


def _is_looked_at() -> bool:
    """Tell whether standard error is a terminal, or this is a notebook: else what draws a bar need not be loaded."""
    return "IPython" in sys.modules or sys.stderr.isatty()


def _width() -> dict[str, Any]:
    """Follow the terminal's width; some terminals (containers, serial lines) tell 0, and no bar would be drawn."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # no terminal: a notebook, or a stream without a descriptor
        known = True
    return {"dynamic_ncols": True} if known else dict(_USUAL)


def quiet(event: Event) -> None:
    """Take events and show nothing."""
