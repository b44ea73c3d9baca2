"""A death at every write: nothing of the user's is harmed, what is marked done is right, and the rest can follow.

An ordinary run tries a part of all points, chosen by a seed; LAZYPROC_EXHAUSTIVE=1 tries every one. See `deaths` for
the harness, and benchmarks/promise.py for the numbers.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from deaths import shim
from deaths.layouts import LAYOUTS
from deaths.stage import Stage
from deaths.trials import PHASES, Scene, Tally, split_phases, try_phase, worker_calls, worker_points

SEED = os.environ.get("LAZYPROC_TEST_SEED", "2024")
EXHAUSTIVE = bool(os.environ.get("LAZYPROC_EXHAUSTIVE"))
NUMBERS = {"creation": 2, "loop": 2, "completion": 2, "resume": 1, "recovery": 1}
"""Points of an ordinary run, for each layout and phase."""

pytestmark = [
    pytest.mark.skipif(shim.compiler() is None, reason="no C compiler: install gcc, or set CC, to build the shim"),
    pytest.mark.timeout(6 * 3600 if EXHAUSTIVE else 600),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def stage(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stage"), library) as stage:
        yield stage


def report(tally: Tally, seed: str) -> str:
    return "\n".join([f"seed {seed}: {tally.failed} of {tally.tried} points failed", *tally.problems[:5]])


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS if layout.cores == 1])
def test_a_death_at_every_write(stage: Stage, name: str) -> None:
    seed = f"{SEED} {name}"
    chance = random.Random(seed)
    scene = Scene(stage, name)
    for phase in scene.safe_phases():
        number = None if EXHAUSTIVE and phase != "recovery" else 400 if EXHAUSTIVE else NUMBERS[phase]
        tally = try_phase(scene, phase, number, chance)
        assert not tally.failed, report(tally, seed)
        if phase not in ("recovery", "resume"):
            assert tally.tried, f"{phase}: no process died"


def test_deaths_with_worker_processes(library: Path, tmp_path: Path) -> None:
    """The driver dies and its workers live on, a worker dies alone, or all of them."""
    seed = f"{SEED} workers"
    chance = random.Random(seed)
    with Stage(tmp_path, library, pause=0.05) as stage:
        scene = Scene(stage, "path, contiguous, two workers")
        n_calls = worker_calls(scene.events)
        assert n_calls[shim.WORKERS] >= 2, "there have to be worker processes"
        tally = Tally()
        for point in worker_points(n_calls, 10 if EXHAUSTIVE else 1, chance):
            tally.add(scene.try_point(point))
        assert not tally.failed, report(tally, seed)
        assert tally.tried >= 3


def test_killed_at_random(stage: Stage) -> None:
    """Not at a call, but at any time; the second run is killed, too, now and then."""
    seed = f"{SEED} random"
    chance = random.Random(seed)
    names = ["path, gzip, 200 siblings", "path, contiguous, existing file", "handle, chunked, 20 siblings"]
    for name in names:
        scene = Scene(stage, name)
        tally = Tally()
        for _ in range(400 if EXHAUSTIVE else 4):
            tally.add(scene.kill_at_random(chance))
        assert not tally.failed, report(tally, seed)


# -- can it fail at all? ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "phase", "what"),
    [
        ("mask first", "loop", "marked but wrong"),
        ("plain creation", "creation", r"scan\.h5 cannot be read: (RuntimeError|OSError)"),
    ],
)
def test_wrong_ways_are_noticed(stage: Stage, action: str, phase: str, what: str) -> None:
    """Marking before writing, and creating the group with plain h5py, must both show."""
    scene = Scene(stage, "path, contiguous, 3 siblings", action)
    tally = try_phase(scene, phase, 16, random.Random(SEED))
    assert tally.failed, f"{tally.tried} points, and nothing was noticed"
    assert tally.missed * 4 <= tally.tried, "most must live until their point"
    assert any(re.search(what, problem) for problem in tally.problems), tally.problems


@pytest.mark.parametrize("name", ["path, gzip, new file", "handle, gzip, existing file", "hooks, handle, gzip results"])
def test_nothing_goes_past_the_shim(stage: Stage, name: str) -> None:
    """The record of a run, done again in memory, gives the files byte by byte: so each call was seen and counted."""
    stage.ask("set_layout", name=name)
    recorded = stage.ask("record", steps=[{}])
    assert stage.ask("replay_all") == []
    events = list(shim.read_record(recorded["record"]))
    assert [event.count for event in events if event.kind != shim.NOTE and event.count > 0]
    parts = split_phases(events)
    assert all(parts[phase] for phase in PHASES[:3])
