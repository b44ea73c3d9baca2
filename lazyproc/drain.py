"""Stopping early on purpose: the wish to stop, set by signals or by a failed block, seen by all that runs blocks.

::

    first Ctrl-C, SIGTERM or SIGUSR1    nothing new is started, what is under way is finished and committed
    second one, or the grace is over    what is under way is dropped, what is finished is committed
    SIGTERM twice within a second       one: batch systems signal all processes, and some of these hand it on
    SIGTERM, SIGUSR1 between two runs   the script is left, with the same code (`stoppable`)

Handlers raise nothing, except in places marked as `Drain.interruptible`: the function in this process, a look at it,
hooks. So no commit and no change of a file's structure is ever cut through.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lazyproc.core.errors import EXIT_STOPPED, ArgumentValueError, Interrupted, InterruptedScript, LazyprocError
from lazyproc.core.events import Listener, Stopping
from lazyproc.watch import NUDGE, Watch, is_free

GRACE_SECONDS = 20.0
"""How long blocks under way may take to end, if the environment does not say; Slurm kills 30 s after SIGTERM."""
GRACE_NAME = "LAZYPROC_GRACE_SECONDS"
"""The environment variable that says it."""

_SAME_SECONDS = 1.0
"""A signal of a batch system that comes so soon again is the same one, handed on by a shell, srun or mpiexec, too."""
_OF_BATCH_SYSTEMS = (signal.SIGTERM, signal.SIGUSR1)
_SIGNALS = (signal.SIGINT, *_OF_BATCH_SYSTEMS)
_PROTECTED, _AT_SECOND, _AT_FIRST = range(3)
"""Where the main thread is: not to be interrupted, or by the second signal, or by the first."""

log = logging.getLogger("lazyproc")


class Leave(KeyboardInterrupt):
    """Raised in the main thread to take it out of what it is doing; never seen outside of a run."""


class Drain:
    """The wish to stop early, from the first signal to the last commit.

    Parameters
    ----------
    message : str
        What to say when leaving.
    listener : callable, optional
        Is told, in the main thread, that the run is stopping.

    Attributes
    ----------
    signal : int or None
        The first signal that came; None if none did, or where signals are not watched.
    message : str
        What to say when leaving: to be kept up to date.
    afresh : bool
        The same call would not go on, but start afresh: for the message.
    grace : float
        Seconds for what is under way.

    Raises
    ------
    ArgumentValueError
        If ``LAZYPROC_GRACE_SECONDS`` is no number of seconds.

    Notes
    -----
    Flags are plain attributes: a handler runs between any two instructions of the main thread, which may hold a lock
    of whatever else would be used to tell.
    """

    def __init__(self, message: str, listener: Listener | None = None) -> None:
        self.signal: int | None = None
        self.message = message
        self.afresh = False
        self.grace = grace_seconds()
        self._listener = listener
        self._process = os.getpid()
        self._n_signals = 0
        self._came: dict[int, float] = dict.fromkeys(map(int, _SIGNALS), -math.inf)
        self._requested = False
        self._dropping = False
        self._told = False
        self._left = False
        self._level = _PROTECTED
        self._watch: Watch | None = None

    def requested(self) -> bool:
        """Tell whether nothing new shall be started."""
        return self._requested

    def dropping(self) -> bool:
        """Tell whether what is under way shall be dropped: the grace is over, or a second signal came."""
        return self._dropping

    def request(self) -> None:
        """Let nothing new be started."""
        self._requested = True

    def turn(self) -> None:
        """Tell the listener, once, that the run is stopping by a signal. For each turn of the loop."""
        if self.signal is not None and not self._told and self._listener is not None:
            self._told = True
            self._listener(Stopping(self.grace))

    def check(self) -> None:
        """Raise `Leave` if a signal came; for places where nothing is under way."""
        if self.signal is not None:
            self._left = True
            raise Leave

    @contextmanager
    def interruptible(self, *, at_first: bool = False) -> Iterator[None]:
        """Let the main thread be taken out of what it does in this context, by `Leave`.

        Parameters
        ----------
        at_first : bool
            By the first signal, since there is nothing to finish; else when what is under way is to be dropped.

        Raises
        ------
        Leave
            Also if the code inside has swallowed it, or made another error of it: its results are not to be trusted.
        """
        before, self._level = self._level, _AT_FIRST if at_first else _AT_SECOND
        try:
            self._interrupt()
            yield
        finally:
            self._level = before
            if self._left:
                raise Leave

    @contextmanager
    def on_signals(self, numbers: Sequence[int] = _SIGNALS) -> Iterator[None]:
        """Turn signals into the wish to stop, for as long as the context lasts; in the end leave, if one came.

        Parameters
        ----------
        numbers : sequence of int
            The signals.

        Raises
        ------
        Interrupted
            At the end, after Ctrl-C, with `message`. In a script it is a SystemExit, too, with code 75.
        SystemExit
            At the end, after other signals, with code 75; the message goes to the log. Errors of the code inside go
            before both.

        Notes
        -----
        Only in the main thread, and only signals that would otherwise end the process (or raise KeyboardInterrupt):
        handlers of the caller's own are left alone. All are restored in the end, but for those that were replaced
        meanwhile.
        """
        watched = self._free(numbers) if threading.current_thread() is threading.main_thread() else []
        if not watched:
            yield
            return
        owners = [getattr(signal.getsignal(number), "__self__", None) for number in watched]
        outer = next((one for one in owners if isinstance(one, Drain)), None)
        watch = self._watch = Watch(self, watched)
        before: dict[int, Any] = {}
        try:
            for number in watched:
                before[number] = signal.signal(number, self._handle)
            for number in self._free([NUDGE]):
                before[number] = signal.signal(number, self._handle_nudge)
            watch.start(None if outer is None else outer._watch)
            yield
        except LazyprocError:
            raise
        except BaseException:
            if not self._left:  # else it is a Leave, or what others have made of it
                raise
        finally:
            watch.end()
            for number, handler in before.items():
                if getattr(signal.getsignal(number), "__self__", None) is self:
                    signal.signal(number, handler)
        if self.signal is not None:
            self._leave(self.signal)

    def _leave(self, number: int) -> NoReturn:
        if number == signal.SIGINT and is_interactive():
            raise Interrupted(self.message)
        log.warning(self.message)
        if number == signal.SIGINT:
            raise InterruptedScript(self.message)
        raise SystemExit(EXIT_STOPPED)

    @staticmethod
    def _free(numbers: Iterable[int]) -> list[int]:
        """Return the signals that nobody else has a handler for; a run inside of another one takes over for a while."""
        return [number for number in numbers if is_free(number, Drain)]

    # -- in the handler ------------------------------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return _handle_in_fork(number)
        now = time.monotonic()
        before = self._came[number]
        self._came[number] = now  # no call in between: the same one again, handled inside of this one, would come there
        if number in _OF_BATCH_SYSTEMS and now - before < _SAME_SECONDS:
            return
        self.signal = self.signal or number
        self._requested = True
        self._n_signals += 1
        self._dropping = self._dropping or self._n_signals > 1
        self._interrupt()

    def _handle_nudge(self, number: int, frame: FrameType | None) -> None:
        self._interrupt()

    def _interrupt(self) -> None:
        """Raise where the main thread may be interrupted now, and not a second time."""
        wished = self._dropping or (self._level == _AT_FIRST and self.signal is not None)
        if wished and self._level != _PROTECTED and not self._left:
            self._left = True
            raise Leave

    # -- for the watch -------------------------------------------------------------------------------------------

    @property
    def n_signals(self) -> int:
        """How many signals have come; 0 as long as a first one takes the run out of where there is nothing to end."""
        return 0 if self._level == _AT_FIRST or (self._left and self._n_signals < 2) else self._n_signals

    def drop(self) -> None:
        """Let what is under way be dropped."""
        self._dropping = True


@contextmanager
def stoppable() -> Iterator[None]:
    """Leave by SIGTERM and SIGUSR1 also where no run is under way: between two runs, before the first, after the last.

    A run takes them over for as long as it lasts. Ctrl-C is none of them: it raises KeyboardInterrupt, as ever.

    Raises
    ------
    SystemExit
        At the end, with code 75, after such a signal. The code inside is left at once, by a KeyboardInterrupt, wherever
        it is: its own ``with`` and ``finally`` close what it has open.

    Notes
    -----
    Only in the main thread, and only signals that would otherwise end the process.
    """
    drain = Drain("stopped while no blocks were computed; what was finished before is kept. Run again.")
    with drain.on_signals(_OF_BATCH_SYSTEMS), drain.interruptible(at_first=True):
        yield


def is_interactive() -> bool:
    """Tell whether somebody goes on in this interpreter after an error: at its prompt, in IPython, in a notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def nothing_yet(name: str) -> str:
    """Say that a run is left before its first block."""
    return f"{name}: stopped before a block was computed. The same call of compute() starts, or goes on."


def how_far(name: str, n_done: int, n_positions: int, where: str, *, afresh: bool = False) -> str:
    """Say how far a run came that is left early, or at its very end, and how to go on.

    Parameters
    ----------
    name : str
        Of the process.
    n_done, n_positions : int
        Positions that are committed, and all.
    where : str
        The file of the results.
    afresh : bool
        The same call would start afresh, since it was made with `override`.
    """
    if n_done == n_positions:
        call = "compute() without override" if afresh else "the same call of compute()"
        return f"{name}: stopped when all {n_positions} positions were done; {call} returns them."
    again = "The same call of compute() goes on from there."
    if afresh:
        again = (
            "The same call would start afresh: use_partial_computation(), and then compute() without override, goes on "
            "from there (lazyproc run --resume)."
        )
    return (
        f"{name}: stopped early; {n_done} of {n_positions} positions ({min(n_done / n_positions, 0.999):.1%}) are done "
        f"and kept in {where}. {again}"
    )


def grace_seconds() -> float:
    """Return how long blocks under way may take to end once a run is asked to stop.

    Raises
    ------
    ArgumentValueError
        If the environment says nonsense.
    """
    text = os.environ.get(GRACE_NAME, "")
    try:
        seconds = float(text) if text.strip() else GRACE_SECONDS
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ArgumentValueError(f"{GRACE_NAME}: {text!r} came; expected a number of seconds, 0 or more, or inf.")
    return seconds


def _handle_in_fork(number: int) -> None:
    """Do what the signal does by default: a process that was forked from ours has a life of its own."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
