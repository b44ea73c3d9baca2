"""What a person sees of a run: a progress bar with positions, rate and time left, in a terminal or a notebook."""

from __future__ import annotations

import os
import sys
from typing import Any

from lazyproc.core.events import BlockDone, Event, Finished, Started, Stopping

_PATIENCE = 1.0
"""Seconds before a bar appears: short jobs need none."""
_USUAL = {"ncols": 80, "nrows": 24}
"""Columns and rows of a terminal that does not tell its own."""


class ProgressBar:
    """A listener that draws a bar; silent where nobody looks (off a terminal and outside of notebooks).

    Parameters
    ----------
    delay : float
        Seconds before the bar appears.
    """

    def __init__(self, delay: float = _PATIENCE) -> None:
        self._delay = delay
        self._bar: Any = None
        self._name = ""

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        if isinstance(event, Started):
            self._bar, self._name = self._open(event), event.process_name
        elif self._bar is not None and isinstance(event, BlockDone):
            self._bar.update(event.n_positions)
        elif self._bar is not None and isinstance(event, Stopping):
            self._bar.set_description(f"{self._name}: stopping")
        elif self._bar is not None and isinstance(event, Finished):
            self._bar.close()
            self._bar = None

    def _open(self, event: Started) -> Any:
        from tqdm.auto import tqdm

        # disable=None makes tqdm silent unless standard error is a terminal; its notebook form knows better itself.
        return tqdm(
            total=event.n_positions,
            initial=event.n_done,
            desc=event.process_name,
            unit=" positions",
            unit_scale=False,
            **_width(),
            disable=None,
            delay=self._delay,
            leave=True,
        )


def _width() -> dict[str, Any]:
    """Follow the terminal's width; some terminals (containers, serial lines) tell 0, and no bar would be drawn."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # no terminal: a notebook, or a stream without a descriptor
        known = True
    return {"dynamic_ncols": True} if known else dict(_USUAL)


def quiet(event: Event) -> None:
    """Take events and show nothing."""
