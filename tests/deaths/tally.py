"""Points of death, what came of each, and how many there were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Step = dict[str, Any]
"""What `server.Server.step` takes."""


@dataclass(frozen=True)
class Point:
    """One point of death.

    Attributes
    ----------
    phase : str
        One of `PHASES`.
    steps : tuple of dict
        What `server.Server.step` takes, one driver after the other; the last one dies at the point.
    what : str
        The call, in words.
    """

    phase: str
    steps: tuple[Step, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.phase}: {self.what}, steps={list(self.steps)}"


@dataclass
class Outcome:
    """What came of a trial.

    Attributes
    ----------
    point : Point
        Where the process was to die.
    reached : bool
        Whether it did.
    problems : list of str
        What must not be.
    n_marked, n_lost : int
        Positions marked when it died; positions computed by then that had to be computed again.
    """

    point: Point
    reached: bool
    problems: list[str]
    n_marked: int
    n_lost: int


@dataclass
class Tally:
    """Points tried and failures of one layout and phase.

    Attributes
    ----------
    tried, failed, missed : int
        Points at which a process died; those with problems; those that the run did not come to.
    most_lost, all_lost : int
        Most positions that had to be computed again after one death, and the sum over all.
    problems : list of str
        The first problem of each failure, with its point.
    """

    tried: int = 0
    failed: int = 0
    missed: int = 0
    most_lost: int = 0
    all_lost: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one trial."""
        self.tried += outcome.reached
        self.missed += not outcome.reached
        self.failed += bool(outcome.problems)
        self.most_lost = max(self.most_lost, outcome.n_lost)
        self.all_lost += outcome.n_lost
        self.problems += [f"{outcome.point}: {outcome.problems[:3]}"] if outcome.problems else []

    def join(self, other: Tally) -> None:
        """Count another tally's trials, too."""
        self.tried += other.tried
        self.failed += other.failed
        self.missed += other.missed
        self.most_lost = max(self.most_lost, other.most_lost)
        self.all_lost += other.all_lost
        self.problems += other.problems
