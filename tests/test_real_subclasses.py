"""Published subclasses of pyUSID's Process give the same files on lazyproc as on pyUSID, to the last bit.

Each package runs twice, in processes of its own: once on pyUSID, once after `lazyproc.replace_pyusid`. What is compared
is everything in the files, before and after being interrupted, in one file and with results in another.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from real_processes import CASES

HERE = Path(__file__).parent
ON_PYUSID = """
import sys
from pathlib import Path

if __name__ == "__main__":
    import real_processes

    real_processes.run(sys.argv[1], Path(sys.argv[2]))
    assert not any(name.partition(".")[0] == "lazyproc" for name in sys.modules)
"""
ON_LAZYPROC = """
import sys
from pathlib import Path

if __name__ == "__main__":
    import lazyproc

    lazyproc.replace_pyusid()
    import real_processes

    real_processes.run(sys.argv[1], Path(sys.argv[2]))
"""
OF_THE_MOMENT = {"timestamp", "machine_id", "platform"}
"""Attributes that differ from one run to the next."""
RUNS = [(name, mode) for name, case in CASES.items() for mode in case.modes()]


def require(package: str) -> None:
    """Skip unless a package is installed, in a version that has subclasses of pyUSID's Process."""
    for name in ("pyUSID", package):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if package == "pycroscopy" and not importlib.metadata.version(package).startswith("0.60."):
        pytest.skip("pycroscopy since 0.61 has no subclasses of pyUSID's Process; expected 0.60.7")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Run a package on both bases, at the same time, once; return the folders and reports."""
    done: dict[str, Any] = {}

    def run(package: str) -> dict[str, tuple[Path, dict[str, Any]]]:
        if package not in done:
            done[package] = run_both(package, tmp_path_factory.mktemp(package))
        return done[package]

    return run


def run_both(package: str, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    (folder / "sitecustomize.py").write_text("import dropped_names\n")
    path = os.pathsep.join([str(folder), str(HERE), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    threads = dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
    environment = {**os.environ, **threads, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    running = {}
    for base, text in (("pyusid", ON_PYUSID), ("lazyproc", ON_LAZYPROC)):
        script = folder / f"on_{base}.py"
        script.write_text(text)
        command = [sys.executable, str(script), package, str(folder / base)]
        with open(folder / f"{base}.log", "wb") as log:
            running[base] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for base, process in running.items():
            assert process.wait(timeout=240) == 0, (folder / f"{base}.log").read_text()[-3000:]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return {base: (folder / base, json.loads((folder / base / "report.json").read_text())) for base in running}


def content(path: Path) -> dict[str, Any]:
    """Return all that is in a file: values, dtypes, shapes, storage, attributes, and what references refer to."""
    found: dict[str, Any] = {}
    with h5py.File(path, "r") as file:

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            found[name] = item[()].tobytes() if isinstance(item, h5py.Dataset) else "group"
            if isinstance(item, h5py.Dataset):
                found[f"{name} stored as"] = (item.dtype, item.shape, item.chunks, item.maxshape, item.compression)
            for key, value in item.attrs.items():
                found[f"{name}@{key}"] = plain_value(value, file)

        visit("", file)
        file.visititems(visit)
    return found


def plain_value(value: Any, file: h5py.File) -> Any:
    if isinstance(value, h5py.Reference):
        return f"reference to {file[value].name}"
    if isinstance(value, str | bytes):
        return value
    array = np.asarray(value)
    return (array.dtype.str, array.shape, array.tolist() if array.dtype == object else array.tobytes())


def without(found: dict[str, Any], *, also: set[str] = frozenset()) -> dict[str, Any]:
    """Leave out what differs on purpose: the time, lazyproc's record of a run, where a file was opened from."""
    kept = {}
    for key, value in found.items():
        attribute = key.rpartition("@")[2]
        if attribute in OF_THE_MOMENT or attribute.startswith("lazyproc_") or key.split(" ")[0] in also:
            continue
        kept[key] = Path(value).name if attribute == "source_file_path" else value
    return kept


@pytest.mark.parametrize(("name", "mode"), RUNS, ids=[f"{name}-{mode}" for name, mode in RUNS])
def test_a_published_class_leaves_the_same_files_on_both_bases(both, name, mode):
    case = CASES[name]
    require(case.package)
    runs = both(case.package)
    (old_folder, old_report), (new_folder, new_report) = runs["pyusid"], runs["lazyproc"]
    old, new = old_report[f"{name}-{mode}"], new_report[f"{name}-{mode}"]
    assert not old["error"], f"on pyUSID: {old['error']}"
    assert not new["error"], new["error"]
    assert (old["base"], new["base"]) == ("pyUSID.processing.process", "lazyproc.process")
    assert [step["writes"] for step in old["steps"]] == [step["writes"] for step in new["steps"]]
    assert [step["group"] for step in old["steps"]] == [step["group"] for step in new["steps"]]
    paths = sorted(path.name for path in (old_folder / f"{name}-{mode}").glob("*.h5"))
    assert paths == (["elsewhere.h5", "scan.h5"] if mode.endswith("elsewhere") else ["scan.h5"])
    for path in paths:
        before, after = (content(folder / f"{name}-{mode}" / path) for folder in (old_folder, new_folder))
        # pyUSID's constructor writes a mask "completed_positions" into groups whose masks have other names.
        unwanted = {key for key in before if key.endswith("/completed_positions")} - after.keys()
        assert not unwanted or len(case.phases) == 2
        assert without(after) == without(before, also=unwanted)


STEADY = [name for name, case in CASES.items() if case.resumes and case.steady]


@pytest.mark.parametrize("name", STEADY)
def test_resumed_results_are_those_of_a_run_that_was_not_interrupted(both, name):
    case = CASES[name]
    require(case.package)
    folder, report = both(case.package)["lazyproc"]
    assert not report[f"{name}-resumed"]["error"], report[f"{name}-resumed"]["error"]
    assert without(content(folder / f"{name}-resumed" / "scan.h5")) == without(
        content(folder / f"{name}-fresh" / "scan.h5")
    )
    fresh = [len(step["writes"]) for step in report[f"{name}-fresh"]["steps"]]
    resumed = [len(step["writes"]) for step in report[f"{name}-resumed"]["steps"]]
    assert sum(fresh) == sum(resumed) - len(case.phases)  # the batch that each interruption was in, once more
    assert fresh[-1] == resumed[-1] == 0  # asked once more, nothing is computed
