"""The README and the page on how to use lazyproc: their Python runs as it is written, and does what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np

import lazyproc
from lazyproc.demo.simulate import simulate_scan

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "mine.h5::/Measurement_000/Channel_000/Raw_Data"


def blocks_of(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def run(blocks: list[str], folder: Path, *more: str) -> str:
    """Run blocks of a page as one script, and return what it prints."""
    (folder / "page.py").write_text("\n".join([*blocks, *more]))
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_page_on_using_it_runs(tmp_path):
    blocks = blocks_of("docs/usage.md")
    if importlib.util.find_spec("numba") is None:
        blocks = [block for block in blocks if "numba" not in block]
    assert len(blocks) >= 3
    failures = run(blocks, tmp_path, "print(lazyproc.failures(group))")
    with h5py.File(tmp_path / "mine.h5", "r") as file:
        data = file["Measurement_000/Channel_000/Raw_Data"][()]
        offsets = file["Measurement_000/Channel_000/Raw_Data-Fit_000/Offset"][:, 0]
    failed = data[:, 0] > 0.98
    assert failed.sum() == failures.count("FailedPosition(") == 14, "as the page says"
    assert failures.partition("), ")[0] in (ROOT / "docs" / "usage.md").read_text(), failures
    np.testing.assert_allclose(offsets[~failed], data.mean(axis=1)[~failed], rtol=1e-5)


def test_the_array_of_the_page_is_a_main_dataset(tmp_path, monkeypatch):
    first = blocks_of("docs/usage.md")[0]
    run([first], tmp_path)
    monkeypatch.chdir(tmp_path)
    assert f'address = "{ADDRESS}"' in first
    outputs = {"First": lazyproc.Output("f4"), "Same": lazyproc.Output("f4", shape_from_main=True)}
    with lazyproc.open_results(lazyproc.map_positions(first_and_all, ADDRESS, outputs)) as maps:
        assert dict(maps.sizes) == {"Y": 20, "X": 30, "Energy": 80}
        spectra = np.random.default_rng(0).random((20, 30, 80), "f4")
        np.testing.assert_array_equal(maps["Same"], spectra)
        np.testing.assert_array_equal(maps["First"], spectra[:, :, 0])
        np.testing.assert_allclose(maps["Y"], 0.1 * np.arange(20))
        np.testing.assert_allclose(maps["Energy"], np.linspace(-5, 5, 80))
        assert maps["X"].attrs["units"] == "um"


def first_and_all(spectrum):
    return spectrum[0], spectrum


def test_the_example_of_the_readme_runs_and_draws_x_to_the_right(tmp_path):
    (tmp_path / "lazyproc_demo").mkdir()
    simulate_scan(tmp_path / "lazyproc_demo" / "scan.h5", 40, 50, 32)
    example = next(block for block in blocks_of("README.md") if "class PeakFinder" in block)
    axes = 'from matplotlib import pyplot\nprint(pyplot.gca().get_xlabel(), "/", pyplot.gca().get_ylabel())\n'
    drawn = run([example], tmp_path, axes)
    assert re.fullmatch(r"X \[.*\] / Y \[.*\]\n", drawn), drawn


def test_an_output_may_take_the_name_of_the_status(tmp_path):
    run(blocks_of("docs/usage.md")[:1], tmp_path)
    address = f"{tmp_path}/{ADDRESS}"
    maps = lazyproc.open_results(lazyproc.map_positions(np.ptp, address, {"status": lazyproc.Output("f4")}))
    assert set(maps) == {"status", "completed_positions"}
    assert (maps["completed_positions"] == 1).all()
