"""The guide for those who come from pyUSID runs as it is written, and what it says of its two classes is so."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

HERE = Path(__file__).parent
GUIDE = (HERE.parent / "docs" / "migration.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
CHANNEL = "Measurement_000/Channel_000"


def run(blocks: list[str], folder: Path, *, as_it_stands: bool = False) -> None:
    """Run blocks of the guide as one script; else with the names that pyUSID and BGlib still ask NumPy for."""
    for package in ("pyUSID", "sidpy"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; the guide's classes use its writers")
    (folder / "sitecustomize.py").write_text("" if as_it_stands else "import dropped_names\n")
    script = folder / "guide.py"
    script.write_text("\n".join(blocks))
    path = os.pathsep.join([str(folder), str(HERE), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def of_package(block: str) -> bool:
    return "from BGlib" in block


def lines_of_class(name: str) -> int:
    """Count the lines of a class in the guide that are not empty."""
    for block in BLOCKS:
        for node in ast.parse(block).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return sum(bool(line.strip()) for line in block.splitlines()[node.lineno - 1 : node.end_lineno])
    raise AssertionError(f"the guide has no class {name}")


def test_both_classes_of_the_guide_give_equal_results(tmp_path):
    faster = 'group = FastPeakFinder(address, parms_dict={"smoothing": 5}).compute(override=True)\n'
    run([*(block for block in BLOCKS if not of_package(block)), faster], tmp_path, as_it_stands=True)
    with h5py.File(tmp_path / "scan.h5", "r") as file:
        old, new, lazy, fast = (file[f"{CHANNEL}/Raw_Data-Peak_Finding_00{number}"] for number in range(4))
        assert [group.attrs["smoothing"] for group in (old, new, lazy, fast)] == [5, 5, 7, 5]
        assert all(group["completed_positions"][()].all() for group in (old, new, lazy, fast))
        for name in ("Height", "Place", "Area", "Smooth"):
            assert old[name].dtype == new[name].dtype
            np.testing.assert_array_equal(old[name][()], new[name][()])
            for attribute in ("quantity", "units"):
                assert old[name].attrs[attribute] == new[name].attrs[attribute]
            np.testing.assert_allclose(fast[name][()], new[name][()], rtol=1e-6)
        assert np.ptp(new["Place"][()]) > 0
        spectra = np.abs(file[f"{CHANNEL}/Raw_Data"][()])
        smooth = np.array([np.convolve(spectrum, np.ones(7) / 7, mode="same") for spectrum in spectra])
        np.testing.assert_array_equal(lazy["Smooth"][()], smooth.astype("f4"))


TAKEN_UP = """
import h5py
import numpy as np
from lazyproc.demo.simulate import simulate_scan

CLASS = {class_text!r}


def class_on(import_line):
    names = {{}}
    exec(CLASS.replace("from lazyproc import Process", import_line), names)
    return names["OldPeakFinder"]


def failing_at_the_second(write, calls):
    def hook():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("interrupted")
        write()
    return hook


ours, theirs = class_on("from lazyproc import Process"), class_on("from pyUSID import Process")
assert [cls.__mro__[1].__module__.partition(".")[0] for cls in (ours, theirs)] == ["lazyproc", "pyUSID"]
for name, first, second in (("begun_by_them.h5", theirs, ours), ("begun_by_us.h5", ours, theirs)):
    simulate_scan(name, 6, 8, 64)
    with h5py.File(name, "r+") as file:
        main = file["{channel}/Raw_Data"]
        process = first(main, smoothing=5, cores=1)
        process._max_pos_per_read = 20
        process._write_results_chunk = failing_at_the_second(process._write_results_chunk, [])
        try:
            process.compute()
        except RuntimeError:
            pass
        group = process.h5_results_grp
        assert group["completed_positions"][()].sum() == 20
        group["Height"][3] = -1.0  # what is marked is not computed again
        process = second(main, smoothing=5, cores=1)
        assert process.partial_h5_groups == [group], process.partial_h5_groups
        assert process.compute() == group
        assert group["completed_positions"][()].all()
        assert first(main, smoothing=5, cores=1).duplicate_h5_groups == [group]
        assert second(main, smoothing=4, cores=1).duplicate_h5_groups == []
"""


def test_each_base_takes_up_what_the_other_one_began(tmp_path):
    block = next(block for block in BLOCKS if "class OldPeakFinder" in block)
    class_text = block.partition("\nwith h5py")[0]
    run([TAKEN_UP.format(class_text=class_text, channel=CHANNEL)], tmp_path)
    begun_by_them, begun_by_us = tmp_path / "begun_by_them.h5", tmp_path / "begun_by_us.h5"
    with h5py.File(begun_by_them, "r") as theirs, h5py.File(begun_by_us, "r") as ours:
        groups = [file[f"{CHANNEL}/Raw_Data-Peak_Finding_000"] for file in (theirs, ours)]
        for name in ("Height", "Place", "Area", "Smooth", "completed_positions"):
            np.testing.assert_array_equal(groups[0][name][()], groups[1][name][()])
        assert groups[0]["Height"][3] == -1
        assert (groups[0]["Height"][4:] > 0).all()


def test_the_example_of_a_package_runs_on_lazyproc(tmp_path):
    if importlib.util.find_spec("BGlib") is None:
        pytest.skip("BGlib is not installed")
    run([BLOCKS[0], *(block for block in BLOCKS if of_package(block))], tmp_path, as_it_stands=True)
    with h5py.File(tmp_path / "scan.h5", "r") as file:
        group = file[f"{CHANNEL}/Raw_Data-SHO_Fit_000"]
        assert "lazyproc_parameters" in group["completed_guess_positions"].attrs
        assert group["completed_guess_positions"][()].all()
        assert (group["Guess"]["Frequency [Hz]"] > 0).all()


def test_a_declaration_has_a_tenth_of_the_lines():
    old, new = lines_of_class("OldPeakFinder"), lines_of_class("PeakFinder")
    assert f"has {old} lines, its declaration {new}." in GUIDE
    assert new <= 0.105 * old
