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
from deaths.layouts import LAYOUTS
from deaths.server import Stage

SEED = os.environ.get("LAZYPROC_TEST_SEED", "2024")
EXHAUSTIVE = bool(os.environ.get("LAZYPROC_EXHAUSTIVE"))
KEPT = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Chances that something pending is kept."""

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


def cuts(n_events: int, chance: random.Random, number: int) -> Iterator[dict[str, Any]]:
    """Choose where the power is cut, and how much of what is pending is kept."""
    places = (
        [place for place in range(1, n_events + 1) for _ in range(4)]
        if EXHAUSTIVE
        else [chance.randint(1, n_events) for _ in range(number)]
    )
    for number, place in enumerate(places):
        yield {
            "n_events": place,
            "seed": f"{SEED} {number}",
            "keep": chance.choice(KEPT),
            "recover": chance.random() < 0.5,
        }


def cut_all(stage: Stage, steps: list[dict[str, Any]], chance: random.Random, number: int, **how: Any) -> list[str]:
    """Record some drivers, one after the other, cut the power at many places, and return what went wrong."""
    recorded = stage.ask("record", steps=steps)
    events = list(shim.read_record(recorded["record"]))
    found: list[str] = []
    for cut in cuts(len(events), chance, number):
        problems = stage.ask("cut", **cut, **how)["problems"]
        if problems:
            found.append(f"after {events[cut['n_events'] - 1]}, {cut}: {problems[:3]}")
    return found


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS if layout.cores == 1])
def test_power_is_cut_during_a_run(stage: Stage, name: str) -> None:
    stage.ask("set_layout", name=name)
    problems = cut_all(stage, [{}], random.Random(f"{SEED} {name}"), 6)
    assert not problems, "\n".join([f"{len(problems)} cuts failed", *problems[:5]])


@pytest.mark.parametrize(
    "name", ["path, contiguous, 3 siblings", "path, gzip, new file", "handle, chunked, 20 siblings"]
)
def test_power_is_cut_during_a_second_run(stage: Stage, name: str) -> None:
    """The first one was killed: somewhere in its creation, so that there is a journal, or in its loop."""
    stage.ask("set_layout", name=name)
    recorded = stage.ask("record", steps=[{}])
    calls = [event for event in shim.read_record(recorded["record"]) if event.kind != shim.NOTE]
    journals = [
        event.count
        for event in calls
        if event.kind == shim.UNLINK and not event.path.endswith(("-fence", "-lock", "-new"))
    ]
    for at in (journals[0], calls[len(calls) // 2].count):
        problems = cut_all(stage, [{"at": at}, {}], random.Random(f"{SEED} {name} {at}"), 5)
        assert not problems, "\n".join([f"killed at call {at}: {len(problems)} cuts failed", *problems[:5]])


def test_a_cut_costs_no_more_than_the_checkpoint_interval(library: Path, tmp_path: Path) -> None:
    """No block waits for its commit while others are finished an interval after it."""
    interval = 0.04
    with Stage(tmp_path, library, pause=0.004) as stage:
        stage.ask("set_layout", name="path, contiguous, 3 siblings")
        recorded = stage.ask("record", steps=[{"interval": interval}])
        events = list(shim.read_record(recorded["record"]))
        waiting: list[float] = []
        n_commits = n_together = 0
        for event in events:
            if event.kind == shim.NOTE and event.path.startswith("done"):
                assert not waiting or waiting[-1] - waiting[0] < interval, waiting
                waiting.append(event.time)
            elif event.kind == shim.NOTE and event.path.startswith("committed"):
                n_commits += 1
                n_together += len(waiting) > 1
                waiting = []
        assert n_commits >= 3
        assert n_together >= 1
        problems = cut_all(stage, [{"interval": interval}], random.Random(f"{SEED} interval"), 5)
        assert not problems, "\n".join(problems)


def test_without_syncs_it_would_fail(stage: Stage) -> None:
    """Can it fail at all? The same record, with all syncs left out of the replay."""
    stage.ask("set_layout", name="path, contiguous, 3 siblings")
    problems = cut_all(stage, [{}], random.Random(SEED), 16, syncs=False)
    assert len(problems) >= 4, problems
