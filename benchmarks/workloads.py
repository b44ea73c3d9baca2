"""The workloads that contenders are compared on: simulated files and the functions applied to their positions."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

MAIN = "/Measurement_000/Channel_000/Raw_Data"
PASS_BAND = 0.1


def mean_of_one(spectrum: np.ndarray) -> Any:
    """Average one spectrum: a cheap function of one position."""
    return np.mean(spectrum)


def mean_of_block(block: np.ndarray) -> Any:
    """Average each spectrum of a block."""
    return block.mean(axis=1)


def low_pass_block(block: np.ndarray) -> Any:
    """Keep the lowest tenth of each spectrum's frequencies; the result is as large as the source."""
    spectrum = np.fft.rfft(block, axis=1)
    spectrum[:, int(PASS_BAND * spectrum.shape[1]) :] = 0
    return np.fft.irfft(spectrum, block.shape[1], axis=1)


def fit_one(spectrum: np.ndarray) -> Any:
    """Fit a Gaussian on a background by least squares: some milliseconds."""
    from scipy.optimize import least_squares

    x = np.linspace(-1, 1, len(spectrum))

    def residual(p: np.ndarray) -> np.ndarray:
        return p[0] * np.exp(-(((x - p[1]) / p[2]) ** 2)) + p[3] - spectrum

    return least_squares(residual, [1.0, 0.0, 0.3, 0.0]).x


@dataclass(frozen=True)
class Workload:
    """A file's shape, a function and the width of its result.

    Attributes
    ----------
    n_positions, n_spectral : int
        Shape of the main dataset, float32.
    given : callable or str
        The function of a block, or of one position; or the module that has it as `fit_one`, to be imported when it is
        wanted, as a script imports it at its top.
    vectorized : bool
        Which of the two.
    width : int
        Values a position in the result, float32.
    compression : str or None
        Of the source.
    about : str
        What it stands for.
    done : float
        Share of the positions that is done before the clock starts. lazyproc and pyUSID get results of all positions,
        of which so many are marked as done, and find out themselves what is left; the others are given only the rest.
    """

    n_positions: int
    n_spectral: int
    given: Any
    vectorized: bool
    width: int
    compression: str | None = None
    about: str = ""
    done: float = 0.0

    @property
    def function(self) -> Any:
        """The function."""
        return importlib.import_module(self.given).fit_one if isinstance(self.given, str) else self.given

    @property
    def gibibytes(self) -> float:
        """Of the source, as NumPy has it."""
        return self.n_positions * self.n_spectral * 4 / 2**30


def four_moments(block: np.ndarray) -> Any:
    """Reduce each spectrum to four values."""
    mean = block.mean(axis=1)
    return np.stack([mean, block.std(axis=1), block.min(axis=1), block.max(axis=1)], axis=1)


WORKLOADS = {
    "mean": Workload(131_072, 512, mean_of_one, False, 1, about="a cheap Python function a position"),
    "mean-block": Workload(131_072, 512, mean_of_block, True, 1, about="the same with NumPy on blocks"),
    "reduce": Workload(1_048_576, 512, mean_of_block, True, 1, about="a reduction of 2 GiB at memory speed"),
    "fft": Workload(16_384, 8_192, low_pass_block, True, 8_192, about="an FFT filter, result as large as the source"),
    "fft-large": Workload(65_536, 8_192, low_pass_block, True, 8_192, about="the same on 2 GiB"),
    "fit": Workload(2_048, 256, fit_one, False, 4, about="least squares, a few ms a position"),
    "fit-top": Workload(2_048, 256, "fits", False, 4, about="the same, SciPy imported at the top of the module"),
    "fit-5": Workload(5_700, 256, fit_one, False, 4, about="the same, five seconds"),
    "fit-long": Workload(24_000, 256, fit_one, False, 4, about="the same, half a minute"),
    "gzip": Workload(200_000, 512, mean_of_block, True, 1, "gzip", about="a reduction of a gzip source"),
    "shuffle-gzip": Workload(200_000, 512, mean_of_block, True, 1, "shuffle-gzip", about="the same, shuffled before"),
    "shuffle-gzip-long": Workload(
        1_000_000, 512, mean_of_block, True, 1, "shuffle-gzip", about="the same, five times as long"
    ),
    "lzf": Workload(200_000, 512, mean_of_block, True, 1, "shuffle-lzf", about="the same with shuffle and LZF"),
    "lzf-long": Workload(1_000_000, 512, mean_of_block, True, 1, "shuffle-lzf", about="the same, five times as long"),
    "narrow-1": Workload(10_000_000, 16, mean_of_block, True, 1, about="one value a position, ten million positions"),
    "narrow-4": Workload(10_000_000, 16, four_moments, True, 4, about="four values a position, ten million positions"),
    "tiny": Workload(1_000, 128, mean_of_one, False, 1, about="start-up is all"),
    "resume": Workload(131_072, 512, mean_of_one, False, 1, about="resuming at 99 %", done=0.99),
}


def make_file(folder: str, name: str) -> str:
    """Write the file of a workload, once, and return its path."""
    import h5py

    workload = WORKLOADS[name]
    path = os.path.join(folder, f"{workload.n_positions}x{workload.n_spectral}-{workload.compression}.h5")
    if os.path.exists(path):
        return path
    random = np.random.default_rng(1)
    x = np.linspace(-1, 1, workload.n_spectral, dtype=np.float32)
    rows = max(512, 2**22 // workload.n_spectral)
    with h5py.File(path + ".part", "w") as file:
        group = file.create_group(MAIN.rpartition("/")[0])
        main = _create_main(group, workload)
        for start in range(0, workload.n_positions, rows):
            count = min(rows, workload.n_positions - start)
            centre = random.uniform(-0.5, 0.5, (count, 1)).astype("f4")
            noise = random.standard_normal((count, workload.n_spectral), dtype=np.float32)
            main[start : start + count] = np.exp(-(((x - centre) / 0.2) ** 2)) + np.float32(0.05) * noise
        _describe(file, group, main, workload)
    os.replace(path + ".part", path)
    return path


def _create_main(group: Any, workload: Workload) -> Any:
    shape = (workload.n_positions, workload.n_spectral)
    if workload.compression is None:
        return group.create_dataset("Raw_Data", shape, "f4")
    shuffled, _, compression = workload.compression.rpartition("-")
    return group.create_dataset(
        "Raw_Data", shape, "f4", chunks=(64, workload.n_spectral), compression=compression, shuffle=bool(shuffled)
    )


def _describe(file: Any, group: Any, main: Any, workload: Workload) -> None:
    """Add what makes it a USID Main dataset."""
    main.attrs["quantity"], main.attrs["units"] = "Deflection", "V"
    positions = np.arange(workload.n_positions, dtype="u4").reshape(-1, 1)
    columns = np.arange(workload.n_spectral, dtype="u4").reshape(1, -1)
    for name, values, label, unit in (
        ("Position_Indices", positions, "X", "um"),
        ("Position_Values", positions.astype("f4"), "X", "um"),
        ("Spectroscopic_Indices", columns, "Time", "s"),
        ("Spectroscopic_Values", columns.astype("f4"), "Time", "s"),
    ):
        dataset = group.create_dataset(name, data=values)
        dataset.attrs["labels"] = np.array([label], "S8")
        dataset.attrs["units"] = np.array([unit], "S8")
        main.attrs[name] = dataset.ref
