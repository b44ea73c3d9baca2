"""What is known of a function once it was tried on a few positions: its time, its memory, and the results."""

from __future__ import annotations

from dataclasses import dataclass, field

from lazyproc.core.apply import Arrays
from lazyproc.core.failed import FailedPosition
from lazyproc.core.no_result import NoResult
from lazyproc.core.runs import Runs

_UNKNOWN_SECONDS = 1.0


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes
    ----------
    seconds_per_position : float
        Of the function alone, on one core.
    temporary_bytes : float
        Temporaries a position, beside source and results; for a function that takes blocks. What Python's allocators
        told or, if that is more, what the process was seen to take.
    fixed_bytes : int
        Temporaries of one call; for a function that takes one position.
    kept_bytes : int
        What the function has left in its process, beside results and the modules it has imported: a table, a cache.
    thread_gain : float
        How many times faster two threads are than one; 1.0 where that was not tried.
    reading_seconds : float
        Of reading a position together with its neighbours, storage chunk by storage chunk, without what the disk takes;
        0.0 where that was not asked for.
    computed : list of (Runs, tuple of ndarray)
        The positions computed on the way, with their results: they need not be computed again.
    failed : list of FailedPosition
        Those among them whose function failed.
    first : NoResult or None
        What the first of these raised.
    is_measured : bool
        Whether anything was; else the seconds are a careful guess.
    """

    seconds_per_position: float
    temporary_bytes: float = 0.0
    fixed_bytes: int = 0
    thread_gain: float = 1.0
    computed: list[tuple[Runs, Arrays]] = field(default_factory=list, repr=False)
    failed: list[FailedPosition] = field(default_factory=list, repr=False)
    first: NoResult | None = field(default=None, repr=False)
    is_measured: bool = True
    kept_bytes: int = 0
    reading_seconds: float = 0.0

    @classmethod
    def unknown(cls) -> Probe:
        """Return a careful guess, where nothing could be measured: positions take long, so blocks are small."""
        return cls(_UNKNOWN_SECONDS, is_measured=False)

    def stored(self) -> dict[str, float]:
        """Return what is kept with the results, so that a resumed run need not measure: nothing if nothing was."""
        if not self.is_measured:
            return {}
        # Those of the second kind are not known to older versions, which then measure anew.
        more = {"kept_bytes": self.kept_bytes, "reading_seconds": self.reading_seconds}
        return {
            "seconds_per_position": self.seconds_per_position,
            "temporary_bytes": self.temporary_bytes,
            "fixed_bytes": self.fixed_bytes,
            "thread_gain": self.thread_gain,
            **{name: value for name, value in more.items() if value},
        }

    @property
    def all_failed(self) -> bool:
        """Whether the function failed wherever it was tried."""
        return len(self.failed) == sum(runs.n_positions for runs, _ in self.computed) > 0
