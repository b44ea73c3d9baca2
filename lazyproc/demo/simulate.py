"""A simulated band-excitation scan of a ferroelectric film, whose truth is known, as a USID file of any size.

The film has up and down domains (the phase turns by half a turn across their walls, and the amplitude drops there),
grains with their own resonance and quality factor, thin lamellae of in-plane domains in some grains, topography and
a slow drift. All are functions of the place, in units of the longer side of the scan, and not of the pixel: a scan
with more pixels shows the same picture, finer, and any part of it is computed without the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.spatial import cKDTree

from lazyproc.core.errors import ArgumentValueError
from lazyproc.demo.oscillator import response

MAIN_DATASET = "/Measurement_000/Channel_000/Raw_Data"
TRUTH_GROUP = "/Measurement_000/Truth"
FIRST_FREQUENCY, LAST_FREQUENCY = 330e3, 370e3
"""The band, in Hz."""

UNITS = {"Amplitude": "V", "Resonance": "Hz", "Quality": "", "Phase": "rad"}
"""The maps of the truth, and their units."""

_PIECE_BYTES = 2 << 20
_NOMINAL_PEAK = 0.2  # volts: the amplitude of 1 mV times the quality factor of 200, about the middle of the film's
_N_GRAINS = 26

Floats = NDArray[np.float64]


def truth(n_rows: int, n_columns: int, seed: int = 1) -> dict[str, Floats]:
    """Return the true maps of a simulated scan.

    Parameters
    ----------
    n_rows, n_columns : int
        Pixels along Y and along X.
    seed : int
        Which film.

    Returns
    -------
    dict of arrays `(n_rows, n_columns)`
        ``"Amplitude"`` in V, ``"Resonance"`` in Hz, ``"Quality"`` and ``"Phase"`` in radians, above -pi and up to pi.

    Examples
    --------
    >>> sorted(truth(4, 6))
    ['Amplitude', 'Phase', 'Quality', 'Resonance']
    """
    _check_sizes(n_rows=n_rows, n_columns=n_columns)
    longest = max(n_rows, n_columns)
    return _Film.grow(seed).maps(_places(slice(0, n_rows), longest), _places(slice(0, n_columns), longest))


def simulate_scan(
    path: str | os.PathLike[str],
    n_rows: int = 96,
    n_columns: int = 96,
    n_bins: int = 64,
    noise: float = 0.03,
    seed: int = 1,
    *,
    dtype: DTypeLike = np.complex64,
    scan_size: float = 4.0,
) -> str:
    """Write a simulated scan into a new USID file, and its truth beside it in ``/Measurement_000/Truth``.

    The file appears under its name once it is complete. It is written in pieces of a few MiB, so that the memory
    needed does not depend on its size.

    Parameters
    ----------
    path : path
        The new file.
    n_rows, n_columns : int
        Pixels along Y and along X (which varies fastest).
    n_bins : int
        Frequencies, spread evenly from 330 kHz to 370 kHz, at least 4.
    noise : float
        Standard deviation of the real part and of the imaginary part, in units of the usual height of the peak.
    seed : int
        Which film, and which noise: the same arguments give the same numbers.
    dtype : dtype
        A complex type; or a floating-point type, and only the magnitude of the response is stored.
    scan_size : float
        Length of the longer side, in µm.

    Returns
    -------
    str
        ``"path::/Measurement_000/Channel_000/Raw_Data"``, the main dataset `(n_rows * n_columns, n_bins)`, contiguous.

    Raises
    ------
    ArgumentValueError
        If the file exists already, or a number is out of its range.
    """
    stored = np.dtype(dtype)
    _check_sizes(n_rows=n_rows, n_columns=n_columns)
    if n_bins < 4 or not noise >= 0.0 or not scan_size > 0.0 or stored.kind not in "cf":
        raise ArgumentValueError(
            f"simulate_scan: n_bins={n_bins}, noise={noise}, scan_size={scan_size}, dtype={stored}; expected at least "
            "4 bins, noise of 0 or more, a size above 0 and a complex or floating-point dtype."
        )
    target = Path(path)
    if target.exists():
        raise ArgumentValueError(f"simulate_scan: {target} exists; expected a new file. Remove it or name another.")
    unfinished = target.with_name(target.name + ".part")
    try:
        with h5py.File(unfinished, "w") as file:
            main = _create(file, (n_rows, n_columns, n_bins), stored, scan_size / max(n_rows, n_columns))
            file.attrs.update({"simulated": True, "noise": noise, "seed": seed})
            _fill(main, file[TRUTH_GROUP], noise, seed)
        os.replace(unfinished, target)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    return f"{target}::{MAIN_DATASET}"


def frequencies(n_bins: int) -> Floats:
    """Return the frequencies of the bins, in Hz, `(n_bins,)`."""
    return np.linspace(FIRST_FREQUENCY, LAST_FREQUENCY, n_bins)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentValueError(f"{name}: is {size}; expected 1 or more.")


def _places(pixels: slice, longest: int) -> Floats:
    """Return where the middles of pixels lie, in units of the longer side."""
    return (np.arange(pixels.start, pixels.stop) + 0.5) / longest


# --- the film --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Waves:
    """A smooth random field of mean 0 and standard deviation 1: a sum of plane waves, each array `(n_waves,)`."""

    along_x: Floats
    along_y: Floats
    phase: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, length: float, n_waves: int = 40) -> _Waves:
        """Draw a field whose correlation has the given length."""
        along_x, along_y = rng.normal(0.0, 1.0 / length, (2, n_waves))
        return cls(along_x, along_y, rng.uniform(0.0, 2.0 * np.pi, n_waves))

    def on(self, y: Floats, x: Floats) -> Floats:
        """Return the field on a grid: `(y.size, x.size)`."""
        # exp(i(ax + by)) = exp(iax) exp(iby): a product of two small matrices in place of a cosine for each wave and
        # each pixel.
        down = np.exp(1j * y[:, None] * self.along_y)
        across = np.exp(1j * (self.along_x[:, None] * x + self.phase[:, None]))
        total: Floats = down.real @ across.real - down.imag @ across.imag
        return total * float(np.sqrt(2.0 / self.phase.size))


@dataclass(frozen=True)
class _Film:
    """What is drawn at random for a film: fields over it, and values for each grain `(n_grains,)`."""

    warp_x: _Waves
    warp_y: _Waves
    domains: _Waves
    topography: _Waves
    drift: _Waves
    tilt: float
    centres: Floats
    grain_resonance: Floats
    grain_quality: Floats
    grain_amplitude: Floats
    lamella_angle: Floats
    has_lamellae: Floats

    @classmethod
    def grow(cls, seed: int) -> _Film:
        """Draw a film."""
        rng = np.random.default_rng([seed, 0])
        warp_x, warp_y, domains, topography, drift = (_Waves.draw(rng, s) for s in (0.16, 0.16, 0.11, 0.05, 0.5))
        # Of a few random sets of centres the most even one is taken: grains of similar size.
        candidates = rng.uniform(-0.05, 1.05, (30, _N_GRAINS, 2))
        nearest = [cKDTree(points).query(points, k=2)[0][:, 1].min() for points in candidates]
        return cls(
            warp_x,
            warp_y,
            domains,
            topography,
            drift,
            tilt=rng.uniform(0.2, 1.2),
            centres=candidates[int(np.argmax(nearest))],
            grain_resonance=rng.uniform(-2.5e3, 2.5e3, _N_GRAINS),
            grain_quality=rng.uniform(130.0, 280.0, _N_GRAINS),
            grain_amplitude=rng.uniform(0.85, 1.15, _N_GRAINS),
            lamella_angle=np.pi / 4 + np.pi / 2 * rng.integers(0, 2, _N_GRAINS) + rng.normal(0.0, 0.08, _N_GRAINS),
            has_lamellae=(rng.uniform(size=_N_GRAINS) < 0.45).astype(np.float64),
        )

    def maps(self, y: Floats, x: Floats) -> dict[str, Floats]:
        """Return the four maps on a grid, each `(y.size, x.size)`."""
        warped_x = x[None, :] + 0.03 * self.warp_x.on(y, x)
        warped_y = y[:, None] + 0.03 * self.warp_y.on(y, x)
        grain, inside = self._grains(warped_y, warped_x)
        lamella = self._lamellae(warped_y, warped_x, grain) * inside
        height = self.topography.on(y, x)
        drift = self.drift.on(y, x)
        polarisation = self._polarisation(y, x, warped_y, warped_x)
        # A small signal in quadrature, the electrostatic background, is what remains at a domain wall.
        signal = polarisation * (1.0 - 0.5 * lamella) + 0.2j
        signal = signal * self.grain_amplitude[grain] * (0.75 + 0.25 * inside) * np.exp(1j * (0.08 * drift - 0.8))
        resonance = 350e3 + self.grain_resonance[grain] * inside + 700.0 * height - 900.0 * lamella
        resonance += 2.5e3 * np.tanh(drift) + 3e3 * (y[:, None] - 0.5)
        quality = self.grain_quality[grain] * (0.7 + 0.3 * inside) * (1.0 + 0.04 * np.tanh(height)) - 20.0 * lamella
        phase = np.angle(signal)
        return {"Amplitude": 1e-3 * np.abs(signal), "Resonance": resonance, "Quality": quality, "Phase": phase}

    def _grains(self, y: Floats, x: Floats) -> tuple[NDArray[np.intp], Floats]:
        """Return the number of the grain, and how far inside of it a place is, from 0 at its edge to 1."""
        distance, index = cKDTree(self.centres).query(np.stack([y, x], axis=-1), k=2)
        return index[..., 0], np.tanh((distance[..., 1] - distance[..., 0]) / 0.025)

    def _lamellae(self, y: Floats, x: Floats, grain: NDArray[np.intp]) -> Floats:
        """Return 1 within lamellae of in-plane domains and 0 elsewhere, with soft edges."""
        angle = self.lamella_angle[grain]
        wave = np.cos(2.0 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / 0.085)
        return self.has_lamellae[grain] * 0.5 * (1.0 + np.tanh((wave - 0.45) / 0.3))

    def _polarisation(self, y: Floats, x: Floats, warped_y: Floats, warped_x: Floats) -> Floats:
        """Return the polarisation: 1 in up domains, -1 in down domains, and a thin wall between them."""
        along = warped_x * np.cos(self.tilt) + warped_y * np.sin(self.tilt)
        level = np.sin(2.0 * np.pi * along / 0.36) + 0.75 * self.domains.on(y, x)
        wall: Floats = np.tanh(level / 0.3)
        return wall


# --- the file --------------------------------------------------------------------------------------------------------


def _create(
    file: h5py.File, sizes: tuple[int, int, int], dtype: np.dtype[np.generic], pixel_size: float
) -> h5py.Dataset:
    """Create all groups and datasets; those of the size of the scan are still empty. `pixel_size` is in µm."""
    n_rows, n_columns, n_bins = sizes
    measurement = file.create_group("Measurement_000")
    channel = measurement.create_group("Channel_000")
    truth_group = file.create_group(TRUTH_GROUP)
    for name, units in UNITS.items():
        dataset = truth_group.create_dataset(name, (n_rows, n_columns), np.float32)
        dataset.attrs["units"] = units
    main = channel.create_dataset(MAIN_DATASET.rsplit("/", 1)[1], (n_rows * n_columns, n_bins), dtype)
    main.attrs["quantity"] = "Cantilever response"
    main.attrs["units"] = "V"
    of_positions = {"labels": np.array(["X", "Y"], "S"), "units": np.array(["um", "um"], "S")}
    of_bins = {"labels": np.array(["Frequency"], "S"), "units": np.array(["Hz"], "S")}
    for kind, integer_or_float in (("Indices", np.uint32), ("Values", np.float32)):
        positions = measurement.create_dataset(f"Position_{kind}", (n_rows * n_columns, 2), integer_or_float)
        positions.attrs.update(of_positions)
        bins = np.arange(n_bins) if kind == "Indices" else frequencies(n_bins)
        spectroscopic = channel.create_dataset(f"Spectroscopic_{kind}", data=bins.astype(integer_or_float)[None])
        spectroscopic.attrs.update(of_bins)
        main.attrs[f"Position_{kind}"] = positions.ref
        main.attrs[f"Spectroscopic_{kind}"] = spectroscopic.ref
    measurement.attrs.update({"first_frequency": FIRST_FREQUENCY, "last_frequency": LAST_FREQUENCY})
    measurement.attrs.update({"n_rows": n_rows, "n_columns": n_columns, "pixel_size_um": pixel_size})
    return main


def _fill(main: h5py.Dataset, truth_group: h5py.Group, noise: float, seed: int) -> None:
    """Compute and write the scan, piece by piece."""
    indices, values = (main.file[main.attrs[f"Position_{kind}"]] for kind in ("Indices", "Values"))
    n_rows, n_columns = truth_group["Amplitude"].shape
    longest, pixel_size = max(n_rows, n_columns), main.file["Measurement_000"].attrs["pixel_size_um"]
    film = _Film.grow(seed)
    bins = frequencies(main.shape[1])
    for rows, columns in _pieces(n_rows, n_columns, main.shape[1]):
        maps = film.maps(_places(rows, longest), _places(columns, longest))
        for name, part in maps.items():
            truth_group[name][rows, columns] = part
        first = rows.start * n_columns + columns.start
        last = first + maps["Amplitude"].size
        y, x = np.mgrid[rows, columns]
        places = np.stack([x.ravel(), y.ravel()], axis=1)
        indices[first:last] = places
        values[first:last] = places * pixel_size
        parameters = [maps[name].reshape(-1, 1) for name in ("Amplitude", "Resonance", "Quality", "Phase")]
        spectra = response(bins, *parameters)
        if noise:
            # Seeded by its first position, a piece can be computed without those before it.
            rng = np.random.default_rng([seed, 1, first])
            random = rng.standard_normal((*spectra.shape, 2), np.float32) * np.float32(noise * _NOMINAL_PEAK)
            spectra += random.view(np.complex64)[..., 0]
        main[first:last] = (spectra if main.dtype.kind == "c" else np.abs(spectra)).astype(main.dtype)


def _pieces(n_rows: int, n_columns: int, n_bins: int) -> Iterator[tuple[slice, slice]]:
    """Cut a scan into runs of positions: whole rows, or parts of one row where a row is long."""
    at_once = max(1, _PIECE_BYTES // (n_bins * np.dtype(np.complex64).itemsize))
    height, width = max(1, at_once // n_columns), min(n_columns, at_once)
    for row in range(0, n_rows, height):
        for column in range(0, n_columns, width):
            yield slice(row, min(row + height, n_rows)), slice(column, min(column + width, n_columns))
