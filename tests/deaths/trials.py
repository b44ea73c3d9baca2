"""Which points of death there are in each phase of a run; trying them, and counting."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import shim
from .layouts import BY_NAME, N_POSITIONS
from .server import Stage

PHASES = ("creation", "loop", "completion", "resume", "recovery")
"""The three parts of a first run; a second run of what a first one left half done; recovery from a cut-off change."""

Step = dict[str, Any]


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
        return f"{self.phase}: {self.what} (steps {list(self.steps)})"


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
    most_lost : int
        Most positions that had to be computed again.
    problems : list of str
        The first problem of each failure, with its point.
    """

    tried: int = 0
    failed: int = 0
    missed: int = 0
    most_lost: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one trial."""
        self.tried += outcome.reached
        self.missed += not outcome.reached
        self.failed += bool(outcome.problems)
        self.most_lost = max(self.most_lost, outcome.n_lost)
        self.problems += [f"{outcome.point}: {outcome.problems[:3]}"] if outcome.problems else []


class Scene:
    """A layout on a stage: its undisturbed run has been recorded, and can now be ended anywhere.

    Parameters
    ----------
    stage : Stage
        The process that forks the drivers.
    name : str
        The layout's name.
    action : str
        What the driver does (`actions.ACTIONS`).
    """

    def __init__(self, stage: Stage, name: str, action: str = "compute") -> None:
        self.stage = stage
        self.layout = BY_NAME[name]
        self.action = action
        made = stage.ask("set_layout", name=name)
        self.seconds = float(made["seconds"])
        self.events = list(shim.read_record(made["record"]))

    def points(self, phase: str) -> list[Point]:
        """Return all points of a phase, before, half-way through and after each call."""
        if phase == "resume":
            return list(self._resuming())
        if phase == "recovery":
            return list(self._recovering())
        parts = split_phases(self.events)
        return [
            Point(phase, ({"action": self.action, "at": event.count, "moment": moment},), _text(event, moment))
            for event in parts[phase]
            for moment in _moments(event)
        ]

    def safe_phases(self) -> list[str]:
        """Return the phases in which every point must pass."""
        return [phase for phase in PHASES if phase not in self.layout.unsafe]

    def _resuming(self) -> Iterator[Point]:
        commits = [event.count for event in self.events if event.kind == shim.NOTE and event.path.startswith("committed")]
        if self.layout.kind != "declared":
            commits = [event.count for event in self.events if event.kind == shim.NOTE and event.path.startswith("done")]
        first = {"action": self.action, "at": commits[len(commits) // 2] + 1, "moment": shim.BEFORE}
        yield from self._second("resume", first, self.action, lambda events: events)

    def _recovering(self) -> Iterator[Point]:
        for event in journalled(self.events):
            for moment in _moments(event):
                first = {"action": self.action, "at": event.count, "moment": moment}
                for action in ("recover", self.action):
                    yield from self._second("recovery", first, action, until_recovered)

    def _second(self, phase: str, first: Step, action: str, part: Any) -> Iterator[Point]:
        """Give the points of a second driver that starts where the first one died."""
        record = str(self.stage.folder / "second")
        if os.path.exists(record):
            os.unlink(record)
        self.stage.ask("run", steps=[first, {"action": action, "record": record}])
        for event in part(list(shim.read_record(record))):
            if event.kind != shim.NOTE and event.count > 0:
                for moment in _moments(event):
                    steps = (first, {"action": action, "at": event.count, "moment": moment})
                    yield Point(phase, steps, f"{action}, {_text(event, moment)}")

    def try_point(self, point: Point, *, recover: bool = True) -> Outcome:
        """Let the drivers of a point run and die, and examine what they leave."""
        answer = self.stage.ask("trial", steps=list(point.steps), recover=recover)
        last = answer["steps"][-1]
        problems = [f"a driver failed: {step['error']}" for step in answer["steps"] if "error" in step]
        problems += answer["problems"]
        return Outcome(point, last["signal"] != 0, problems, answer["n_marked"], answer["n_lost"])

    def kill_at_random(self, chance: random.Random) -> Outcome:
        """Kill a run, or one that goes on after a first kill, at random times."""
        steps = tuple(
            {"action": self.action, "after": chance.uniform(0, 1.1 * self.seconds)} for _ in range(chance.choice([1, 1, 2]))
        )
        point = Point("random", steps, f"killed after {steps[-1]['after']:.4f} s")
        return self.try_point(point, recover=chance.random() < 0.5)


def split_phases(events: list[shim.Event]) -> dict[str, list[shim.Event]]:
    """Divide the calls of a run that was not disturbed."""
    parts: dict[str, list[shim.Event]] = {"creation": [], "loop": [], "completion": []}
    phase = "creation"
    for event in events:
        if event.kind == shim.NOTE:
            word = event.path.split()[0]
            if word in ("started", "done") and phase == "creation":
                phase = "loop"
            elif word == "finished":
                phase = "completion"
        elif event.count > 0:
            parts[phase].append(event)
    return parts


def _is_journal(event: shim.Event) -> bool:
    name = os.path.basename(event.path)
    return ".lazyproc-" in name and not name.endswith(("-lock", "-fence", "-new"))


def journalled(events: list[shim.Event]) -> list[shim.Event]:
    """Return the calls from the one that completes a journal to the one that removes it."""
    found: list[shim.Event] = []
    window: list[shim.Event] | None = None
    for event in events:
        if event.kind == shim.NOTE:
            continue
        if _is_journal(event):
            if event.kind == shim.UNLINK and window is not None:
                found += [*window, event]
            window = [] if event.kind in (shim.SYNC, shim.DATASYNC) else None
        elif window is not None:
            window.append(event)
    return found


def until_recovered(events: list[shim.Event]) -> list[shim.Event]:
    """Return the calls up to the removal of the journal and the sync that follows; none if no journal is removed."""
    removals = [place for place, event in enumerate(events) if event.kind == shim.UNLINK and _is_journal(event)]
    return events[: removals[0] + 2] if removals else []


def _moments(event: shim.Event) -> list[int]:
    if event.kind == shim.WRITE and len(event.data) > 1:
        return [shim.BEFORE, shim.HALF, shim.AFTER]
    return [shim.BEFORE, shim.AFTER]


def _text(event: shim.Event, moment: int) -> str:
    return f"{shim.MOMENTS[moment]} call {event.count}, {event}"


def sample(points: list[Point], number: int, chance: random.Random) -> list[Point]:
    """Choose some points, spread over all of them."""
    if len(points) <= number:
        return points
    edges = [round(place * len(points) / number) for place in range(number + 1)]
    return [points[chance.randrange(start, stop)] for start, stop in zip(edges, edges[1:], strict=False)]


def bound_of_lost() -> int:
    """Return how many positions may be computed again when every block is committed at once: the largest block.

    What the probe has computed counts as a block: it is committed once the group is there.
    """
    return N_POSITIONS // 2
