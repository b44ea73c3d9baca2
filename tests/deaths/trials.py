"""Which points of death there are in each phase of a run; trying them, and counting."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

from . import shim
from .check import is_journal
from .layouts import BY_NAME
from .stage import Stage
from .tally import Outcome, Point, Step, Tally

PHASES = ("creation", "loop", "completion", "resume", "recovery")
"""The three parts of a first run; a second run of what a first one left half done; recovery from a cut-off change."""

KEPT = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Chances that something is kept that was not synced when the power was cut."""


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

    def points(self, phase: str, number: int | None = None, chance: random.Random | None = None) -> list[Point]:
        """Return all points of a phase, before, half-way through and after each call; or so many of them."""
        if phase == "recovery":
            return self._recovering(number, chance or random.Random(0))
        if phase == "resume":
            points = self._second("resume", self._first_of_resume(), self.action, lambda events: events)
        else:
            points = [
                Point(phase, ({"action": self.action, "at": event.count, "moment": moment},), _text(event, moment))
                for event in split_phases(self.events)[phase]
                for moment in _moments(event)
            ]
        return points if number is None else sample(points, number, chance or random.Random(0))

    def safe_phases(self) -> list[str]:
        """Return the phases in which every point must pass."""
        return [phase for phase in PHASES if phase not in self.layout.unsafe]

    def _first_of_resume(self) -> Step:
        """Let the first run die in the middle of its loop."""
        done = [event.count for event in split_phases(self.events)["loop"]]
        return {"action": self.action, "at": done[len(done) // 2], "moment": shim.BEFORE}

    def _recovering(self, number: int | None, chance: random.Random) -> list[Point]:
        """Give points of drivers that find a journal; if only some are wanted, four for each death before."""
        firsts = [
            ({"action": self.action, "at": event.count, "moment": moment}, action)
            for event in journalled(self.events)
            for moment in _moments(event)
            for action in ("recover", self.action)
        ]
        if number is not None:
            firsts = sample(firsts, -(-number // 4), chance)
        points: list[Point] = []
        for first, action in firsts:
            found = self._second("recovery", first, action, until_recovered)
            points += found if number is None else sample(found, 4, chance)
        return points if number is None else sample(points, number, chance)

    def _second(self, phase: str, first: Step, action: str, part: Any) -> list[Point]:
        """Give the points of a second driver that starts where the first one died."""
        record = str(self.stage.folder / "second")
        if os.path.exists(record):
            os.unlink(record)
        self.stage.ask("run", steps=[first, {"action": action, "record": record}])
        if not os.path.exists(record):
            return []
        return [
            Point(phase, (first, {"action": action, "at": event.count, "moment": moment}), _text(event, moment))
            for event in part(_after_ready(list(shim.read_record(record))))
            if event.kind != shim.NOTE and event.count > 0
            for moment in _moments(event)
        ]

    def try_point(self, point: Point, *, recover: bool = True) -> Outcome:
        """Let the drivers of a point run and die, and examine what they leave."""
        answer = self.stage.ask("trial", steps=list(point.steps), recover=recover)
        last = answer["steps"][-1]
        problems = [f"a driver failed: {step['error']}" for step in answer["steps"] if "error" in step]
        problems += answer["problems"]
        return Outcome(point, last["died"], problems, answer["n_marked"], answer["n_lost"])

    def kill_at_random(self, chance: random.Random) -> Outcome:
        """Kill a run, or one that goes on after a first kill, at random times."""
        steps = tuple(
            {"action": self.action, "after": chance.uniform(0, 1.1 * self.seconds)}
            for _ in range(chance.choice([1, 1, 2]))
        )
        point = Point("random", steps, f"killed after {steps[-1]['after']:.4f} s")
        return self.try_point(point, recover=chance.random() < 0.5)

    def cut_all(self, places: list[int], chance: random.Random, seed: str, **how: Any) -> Tally:
        """Cut the power at places of the stage's record (`server.Server.record`), and examine what is left."""
        tally = Tally()
        for number, place in enumerate(places):
            cut = {"n_events": place, "seed": f"{seed} {number}", "keep": chance.choice(KEPT)}
            cut["recover"] = chance.random() < 0.5
            answer = self.stage.ask("cut", **{**cut, **how})
            point = Point("power", (cut,), f"cut after {place} calls and notes")
            tally.add(Outcome(point, True, answer["problems"], answer["n_marked"], answer["n_lost"]))
        return tally


def split_phases(events: list[shim.Event]) -> dict[str, list[shim.Event]]:
    """Divide the calls of a run that was not disturbed."""
    parts: dict[str, list[shim.Event]] = {"creation": [], "loop": [], "completion": []}
    phase = "creation"
    for event in _after_ready(events):
        if event.kind == shim.NOTE:
            word = event.path.split()[0]
            if word in ("started", "done") and phase == "creation":
                phase = "loop"
            elif word == "finished":
                phase = "completion"
        elif event.count > 0:
            parts[phase].append(event)
    return parts


def _after_ready(events: list[shim.Event]) -> list[shim.Event]:
    """Leave out what a caller does who has used the file before: the changes, and closing it with what they left."""
    notes = [event.path if event.kind == shim.NOTE else "" for event in events]
    if "ready" not in notes:
        return events
    last = notes.index("returned") if "returned" in notes else len(events)
    return events[notes.index("ready") : last]


def journalled(events: list[shim.Event]) -> list[shim.Event]:
    """Return the calls from the one that completes a journal to the one that removes it."""
    found: list[shim.Event] = []
    window: list[shim.Event] | None = None
    for event in events:
        if event.kind == shim.NOTE:
            continue
        if is_journal(event.path):
            if event.kind == shim.UNLINK and window is not None:
                found += [*window, event]
            window = [] if event.kind in (shim.SYNC, shim.DATASYNC) else None
        elif window is not None:
            window.append(event)
    return found


def until_recovered(events: list[shim.Event]) -> list[shim.Event]:
    """Return the calls up to the removal of the journal and the sync that follows; none if no journal is removed."""
    removals = [place for place, event in enumerate(events) if event.kind == shim.UNLINK and is_journal(event.path)]
    return events[: removals[0] + 2] if removals else []


def _moments(event: shim.Event) -> list[int]:
    if event.kind == shim.WRITE and len(event.data) > 1:
        return [shim.BEFORE, shim.HALF, shim.AFTER]
    return [shim.BEFORE, shim.AFTER]


def _text(event: shim.Event, moment: int) -> str:
    return f"{shim.MOMENTS[moment]} call {event.count}, {event}"


def sample(points: list[Any], number: int, chance: random.Random) -> list[Any]:
    """Choose some, spread over all of them."""
    if len(points) <= number:
        return points
    edges = [round(place * len(points) / number) for place in range(number + 1)]
    return [points[chance.randrange(start, stop)] for start, stop in itertools.pairwise(edges)]


def try_phase(scene: Scene, phase: str, number: int | None = None, chance: random.Random | None = None) -> Tally:
    """Try all points of a phase, or so many of them; every other one is left to `compute` to recover."""
    tally = Tally()
    for place, point in enumerate(scene.points(phase, number, chance)):
        tally.add(scene.try_point(point, recover=place % 2 == 0))
    return tally


def worker_calls(events: list[shim.Event]) -> dict[int, int]:
    """Count the calls of an undisturbed run with worker processes, for `worker_points`."""
    calls = [event for event in events if event.kind != shim.NOTE]
    n_driver = sum(event.pid == events[0].pid for event in calls)
    # Of the workers only half: how many calls there are depends on the blocks, which depend on the clock.
    return {shim.ALL: len(calls), shim.DRIVERS: n_driver, shim.WORKERS: (len(calls) - n_driver) // 2}


def worker_points(counts: dict[int, int], number: int, chance: random.Random) -> list[Point]:
    """Give points for runs with worker processes: who dies, and at whose call.

    Parameters
    ----------
    counts : dict of int to int
        How many calls there are of all, of the driver, and of the workers (`shim.ALL` and so on).
    number : int
        How many points of each kind.
    chance : random.Random
        Chooses.
    """
    kinds = [
        ("the driver dies, its workers live on", shim.DRIVERS, shim.CALLER, shim.AFTER),
        ("the driver dies while a worker writes", shim.WORKERS, shim.DRIVER, shim.HALF),
        ("all die", shim.ALL, shim.EVERYBODY, shim.HALF),
        ("a worker dies", shim.WORKERS, shim.CALLER, shim.HALF),
    ]
    points: list[Point] = []
    for what, counted, victim, moment in kinds:
        for _ in range(number):
            step = {"at": chance.randint(1, counts[counted]), "moment": moment, "counted": counted, "victim": victim}
            points.append(Point("workers", (step,), what))
    return points
