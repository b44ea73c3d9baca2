"""Results that are damaged at random: nothing hangs or crashes, no wrong number counts as done, nothing else is harmed.

Each case is a file with finished and partial results of which some bytes, or some attributes and datasets, were damaged
(`damage.harm`), and everything that can be done with it (`damage.check`), in a process of its own under a watchdog.

What is not promised: that changed values of results are noticed, or both bytes that mark a position. What is beyond
lazyproc: the group that holds the results, and the attributes of the source, may be damaged so that HDF5 cannot
read them; then the error says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
EXHAUSTIVE = os.environ.get("LAZYPROC_EXHAUSTIVE") == "1"
SEED = int(os.environ.get("LAZYPROC_TEST_SEED", "20250"))
N_SERVERS = 2
CASES = {
    ("bytes", "path"): 1500 if EXHAUSTIVE else 22,
    ("bytes", "handle"): 500 if EXHAUSTIVE else 8,
    ("objects", "path"): 1500 if EXHAUSTIVE else 22,
    ("objects", "handle"): 500 if EXHAUSTIVE else 8,
    ("marks", "path"): 500 if EXHAUSTIVE else 12,
    ("marks", "handle"): 500 if EXHAUSTIVE else 6,
}
"""How many of each kind: what is damaged, and how the process gets its main dataset."""
ONCE_FAILED = {
    ("bytes", "path"): [
        *(20290, 20458, 20557, 20573, 20666, 20670, 20772, 20809),
        *(20886, 20906, 21062, 21099, 21130, 21167, 21262, 21338),
    ],
    ("bytes", "handle"): [20290, 20316, 20321],
    ("objects", "path"): [20610, 21602],
}
"""Seeds of cases that went wrong once: a type of HDF5 that ends the process, a root that cannot be read, …"""
FATAL = ("BARE", "PLAIN", "NAMELESS", "WRONG", "HARMED", "SLOW", "WARNED")
"""Outcomes of a step that must not be; see `damage.check.Trial.step`."""
COMPUTES = ("compute", "override", "target")


@pytest.mark.parametrize(("how", "by"), CASES)
@pytest.mark.timeout(7200 if EXHAUSTIVE else 900)
def test_damaged_results(tmp_path: Path, how: str, by: str) -> None:
    seeds = dict.fromkeys([*ONCE_FAILED.get((how, by), []), *range(SEED, SEED + CASES[how, by])])
    cases = [{"how": how, "by": by, "seed": seed} for seed in seeds]
    with ThreadPoolExecutor(N_SERVERS) as pool:
        shares = pool.map(served, [cases[number::N_SERVERS] for number in range(N_SERVERS)], [tmp_path] * N_SERVERS)
        told = [one for share in shares for one in share]
    assert sorted(one["seed"] for one in told) == sorted(case["seed"] for case in cases)
    bad = [text for one in told for text in objections(one)]
    print(Counter(outcome for one in told for _, outcome, _ in one.get("result", [])))
    assert not bad, "\n".join(bad[:5])


def served(cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Have a server do the cases and return its answers."""
    done = subprocess.run(
        [sys.executable, "-m", "damage.check"],
        cwd=HERE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "TMPDIR": os.fspath(folder)},
        input="".join(json.dumps(case) + "\n" for case in cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def objections(told: dict[str, Any]) -> list[str]:
    """Return what must not have happened in a case."""
    about = f"seed {told['seed']} ({told['how']}, by {told['by']}): {told['harm']}"
    if "died" in told:
        return [f"{about}: {told['died']}\n{told['trace']}"]
    found = []
    for step, outcome, text in told["result"]:
        kept_from_work = told["sound"] and not told["parent"] and step.split()[0] in COMPUTES and outcome != "ok"
        if outcome.split()[0] in FATAL or kept_from_work:
            found.append(f"{about}: {step}: {outcome}\n{text[-2500:]}")
    return found
