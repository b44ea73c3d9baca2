"""Power cuts: whatever was not synced is lost, kept or torn, and the promise holds.

The writes, names and syncs of a run are recorded below HDF5, cut off at any place, and replayed as a file system may
have left them: see `deaths.power`. LAZYPROC_EXHAUSTIVE=1 cuts at every call, several times.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deaths import shim
from deaths.check import is_journal
from deaths.layouts import LAYOUTS
from deaths.stage import Stage
from deaths.trials import Scene, Tally

SEED = os.environ.get("LAZYPROC_TEST_SEED", "2024")
EXHAUSTIVE = bool(os.environ.get("LAZYPROC_EXHAUSTIVE"))
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


def cut_all(stage: Stage, name: str, steps: list[dict[str, Any]], number: int, **how: Any) -> Tally:
    """Record drivers of a layout, one after the other, and cut the power at many places."""
    seed = f"{SEED} {name} {steps}"
    chance = random.Random(seed)
    scene = Scene(stage, name)
    n_events = len(list(shim.read_record(stage.ask("record", steps=steps)["record"])))
    places = [chance.randint(1, n_events) for _ in range(number)]
    if EXHAUSTIVE:
        places = [place for place in range(1, n_events + 1) for _ in range(4)]
    return scene.cut_all(places, chance, seed, **how)


def report(tally: Tally) -> str:
    return "\n".join([f"{tally.failed} of {tally.tried} cuts failed", *tally.problems[:5]])


# What a caller has changed through his own handle, and not synced, is not promised.
NAMES = [layout.name for layout in LAYOUTS if layout.cores == 1 and not layout.used_before]


@pytest.mark.parametrize("name", NAMES if EXHAUSTIVE else NAMES[1::2])
def test_power_is_cut_during_a_run(stage: Stage, name: str) -> None:
    tally = cut_all(stage, name, [{}], 5)
    assert not tally.failed, report(tally)


def test_power_is_cut_while_worker_processes_write(library: Path, tmp_path: Path) -> None:
    """Results come from one process, the mask that tells of them from another."""
    with Stage(tmp_path, library, pause=0.05) as stage:
        for number in range(10 if EXHAUSTIVE else 1):  # each run has its writes in another order
            scene = Scene(stage, "path, contiguous, two workers")
            events = list(shim.read_record(stage.ask("record", steps=[{}])["record"]))
            assert len({event.pid for event in events if event.kind != shim.NOTE}) > 2, "no worker wrote"
            seed = f"{SEED} workers {number}"
            chance = random.Random(seed)
            n_cuts = len(events) if EXHAUSTIVE else 10
            tally = scene.cut_all([chance.randint(1, len(events)) for _ in range(n_cuts)], chance, seed)
            assert not tally.failed, report(tally)


@pytest.mark.parametrize(
    "name", ["path, contiguous, 3 siblings", "path, gzip, new file", "handle, chunked, 20 siblings"]
)
def test_power_is_cut_during_a_second_run(stage: Stage, name: str) -> None:
    """The first one was killed: somewhere in its creation, so that there is a journal, or in its loop."""
    stage.ask("set_layout", name=name)
    recorded = stage.ask("record", steps=[{}])
    calls = [event for event in shim.read_record(recorded["record"]) if event.kind != shim.NOTE]
    journals = [event.count for event in calls if event.kind == shim.UNLINK and is_journal(event.path)]
    for at in (journals[0], calls[len(calls) // 2].count):
        tally = cut_all(stage, name, [{"at": at}, {}], 4)
        assert not tally.failed, report(tally)


def test_a_cut_costs_no_more_than_the_checkpoint_interval(library: Path, tmp_path: Path) -> None:
    """No block waits for its commit while others are finished an interval after it."""
    interval = 0.2
    with Stage(tmp_path, library, pause=0.02) as stage:
        tally = cut_all(stage, "path, contiguous, 3 siblings", [{"interval": interval}], 4)
        assert not tally.failed, report(tally)
        events = list(shim.read_record(tmp_path / "replayed"))
    notes = [(event.path.split()[0], event.time) for event in events if event.kind == shim.NOTE]
    assert sum(word == "committed" for word, _ in notes) >= 2
    waiting: list[float] = []
    for word, time in notes[notes.index(next(note for note in notes if note[0] == "started")) :]:
        if word == "done":
            assert not waiting or waiting[-1] - waiting[0] < interval, waiting
            waiting.append(time)
        elif word == "committed":
            waiting = []
    assert not waiting


def test_without_syncs_it_would_fail(stage: Stage) -> None:
    """Can it fail at all? The same record, with all syncs left out of the replay, and nothing kept."""
    tally = cut_all(stage, "path, contiguous, 3 siblings", [{}], 8, syncs=False, keep=0.0)
    assert tally.failed >= 2, report(tally)
