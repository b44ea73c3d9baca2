"""The damped harmonic oscillator near its resonance: its complex response, and a least-squares fit of it.

The response is that of a cantilever driven over a band of frequencies around one resonance (band excitation):

    A exp(i phi) w0^2 / (w^2 - i w w0 / Q - w0^2)

with the amplitude A, the resonance w0, the quality factor Q and the phase phi. At the resonance its magnitude is A Q.
Only ratios of frequencies enter, so Hz serve as well as radians per second.

Reference: S. Jesse, S. V. Kalinin et al., Nanotechnology 18, 435503 (2007).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from lazyproc.core.errors import ArgumentValueError

PARAMETERS = ("Amplitude", "Resonance", "Quality", "Phase", "R2")
"""What a fit gives, in the order of `fit_oscillator`."""

_QUALITY_RANGE = (1.0, 1e5)


def response(
    frequency: ArrayLike, amplitude: ArrayLike, resonance: ArrayLike, quality: ArrayLike, phase: ArrayLike
) -> NDArray[np.complex128]:
    """Return the complex response of a damped harmonic oscillator; the formula is at the top of the module.

    Parameters
    ----------
    frequency : array, usually `(n_bins,)`
        Driving frequencies in Hz.
    amplitude : float or array
        Static amplitude, in the units wanted for the response. All parameters broadcast against `frequency`:
        for many positions give them the shape `(n_positions, 1)`.
    resonance : float or array
        Resonance frequency in Hz.
    quality : float or array
        Quality factor, above 0.
    phase : float or array
        Phase in radians.

    Examples
    --------
    >>> float(abs(response(350e3, 1e-3, 350e3, 200.0, 0.0)).round(6))
    0.2
    """
    complex_amplitude = np.asarray(amplitude) * np.exp(1j * np.asarray(phase, dtype=np.float64))
    values: NDArray[np.complex128] = complex_amplitude * _unit_response(
        np.asarray(frequency, dtype=np.float64), resonance, quality
    )
    return values


def fit_oscillator(spectrum: ArrayLike, frequency: ArrayLike) -> tuple[float, float, float, float, float]:
    """Fit a damped harmonic oscillator to one complex spectrum, by least squares.

    Parameters
    ----------
    spectrum : complex array `(n_bins,)`
        The response measured, at least 4 values.
    frequency : array `(n_bins,)`
        Its frequencies in Hz, above 0 and ascending.

    Returns
    -------
    tuple of float
        Amplitude (above 0, in the units of the spectrum), resonance (Hz, at most half a band outside of the band),
        quality factor (1 to 100,000), phase (radians, above -pi and up to pi) and the coefficient of determination.
        Noise alone gives numbers, too, with a coefficient near 0. All are NaN if the spectrum has values that are
        not finite or is zero throughout: no oscillator is meant then.

    Raises
    ------
    ArgumentValueError
        If the spectrum is not complex, or does not go with the frequencies.

    Examples
    --------
    >>> frequency = np.linspace(330e3, 370e3, 64)
    >>> spectrum = response(frequency, 1e-3, 351e3, 180.0, 0.5)
    >>> [round(value, 6) for value in fit_oscillator(spectrum, frequency)]
    [0.001, 351000.0, 180.0, 0.5, 1.0]
    """
    measured, bins = _checked(spectrum, frequency)
    scale = float(np.abs(measured).max())
    if not np.isfinite(scale) or scale == 0.0:
        return (np.nan,) * 5
    measured = measured / scale
    resonance, quality = _guess(measured, bins)
    unit = _unit_response(bins, resonance, quality)
    start = np.vdot(unit, measured) / np.vdot(unit, unit).real
    solution = _minimise(measured, bins, resonance, quality, complex(start))
    resonance, quality, complex_amplitude = solution
    residual = measured - complex_amplitude * _unit_response(bins, resonance, quality)
    spread = measured - measured.mean()
    total = np.vdot(spread, spread).real
    r_squared = 1.0 - np.vdot(residual, residual).real / total if total > 0.0 else 0.0
    amplitude = max(scale * abs(complex_amplitude), np.finfo(np.float64).tiny)
    phase = float(np.angle(complex_amplitude))
    return float(amplitude), resonance, quality, phase if phase > -np.pi else np.pi, float(r_squared)


def fit(spectrum: ArrayLike, first_frequency: float, last_frequency: float) -> dict[str, float]:
    """Fit one spectrum whose bins are spread evenly over a band: the function that a process maps.

    Parameters
    ----------
    spectrum : complex array `(n_bins,)`
        The response measured.
    first_frequency, last_frequency : float
        Frequencies of the first and of the last bin, in Hz.

    Returns
    -------
    dict
        ``"Amplitude"``, ``"Resonance"``, ``"Quality"``, ``"Phase"`` and ``"R2"``, as `fit_oscillator` gives them.

    Raises
    ------
    ArgumentValueError
        As `fit_oscillator`.
    """
    frequency = np.linspace(first_frequency, last_frequency, np.size(spectrum))
    return dict(zip(PARAMETERS, fit_oscillator(spectrum, frequency), strict=True))


def _unit_response(frequency: NDArray[np.float64], resonance: Any, quality: Any) -> NDArray[np.complex128]:
    """Return the response for the amplitude 1 and the phase 0."""
    resonance = np.asarray(resonance, dtype=np.float64)
    denominator = (frequency - resonance) * (frequency + resonance) - 1j * (frequency * resonance / quality)
    values: NDArray[np.complex128] = resonance**2 / denominator
    return values


def _checked(spectrum: ArrayLike, frequency: ArrayLike) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
    """Return both in double precision, or raise."""
    measured, bins = np.asarray(spectrum), np.asarray(frequency, dtype=np.float64)
    if measured.dtype.kind != "c":
        raise ArgumentValueError(
            f"spectrum: has the dtype {measured.dtype}; expected complex values, since the phase is fitted as well."
        )
    if measured.ndim != 1 or measured.size < 4 or measured.shape != bins.shape:
        raise ArgumentValueError(
            f"spectrum: has the shape {measured.shape}, and frequency {bins.shape}; expected the same one dimension, "
            "and at least 4 values for the 4 parameters."
        )
    if not (bins[0] > 0.0 and np.all(np.diff(bins) > 0.0)):
        raise ArgumentValueError(
            f"frequency: goes from {bins[0]} to {bins[-1]}; expected frequencies above 0 Hz in ascending order."
        )
    return measured.astype(np.complex128), bins


def _guess(measured: NDArray[np.complex128], bins: NDArray[np.float64]) -> tuple[float, float]:
    """Guess resonance and quality factor from the peak of the power and from its width."""
    power = np.abs(measured) ** 2
    # Five bins are averaged because a single noisy bin must not win over a resonance that spans several.
    smooth = np.convolve(np.pad(power, 2, mode="edge"), (1.0, 2.0, 3.0, 2.0, 1.0), mode="valid")
    peak = int(smooth.argmax())
    height = float(power[max(0, peak - 2) : peak + 3].max())
    above = np.maximum(power - np.median(power), 0.0)
    # The power of a resonance is a Lorentzian: its area is pi/2 times its height times its full width at half height.
    width = 2.0 / np.pi * np.sum(above * np.gradient(bins)) / max(height, np.finfo(np.float64).tiny)
    narrowest = (bins[-1] - bins[0]) / (bins.size - 1) / 2
    width = min(max(width, narrowest), bins[-1] - bins[0])
    return float(bins[peak]), float(np.clip(bins[peak] / width, *_QUALITY_RANGE))


def _minimise(
    measured: NDArray[np.complex128],
    bins: NDArray[np.float64],
    resonance: float,
    quality: float,
    complex_amplitude: complex,
) -> tuple[float, float, complex]:
    """Refine resonance, quality factor and complex amplitude.

    The variables are all near 1: the resonance in widths of the first guess away from it, the logarithm of the
    quality factor, and the complex amplitude times the quality factor of the guess, which is the height of the peak.
    """
    width = resonance / quality
    amplitude_unit = 1.0 / quality

    def values(x: NDArray[np.float64]) -> tuple[float, float, complex]:
        return resonance + width * x[0], float(np.exp(x[1])), amplitude_unit * complex(x[2], x[3])

    def residual(x: NDArray[np.float64]) -> NDArray[np.float64]:
        at, q, c = values(x)
        return (c * _unit_response(bins, at, q) - measured).view(np.float64)

    def jacobian(x: NDArray[np.float64]) -> NDArray[np.float64]:
        at, q, c = values(x)
        unit = _unit_response(bins, at, q)
        squared = unit * unit
        slopes = np.empty((bins.size, 2, 4))
        columns = (
            c * width * (2.0 * unit / at + squared * (2.0 * at + 1j * bins / q) / at**2),
            c * squared * (-1j * bins / (at * q)),
            amplitude_unit * unit,
            1j * amplitude_unit * unit,
        )
        for place, column in enumerate(columns):
            slopes[:, 0, place], slopes[:, 1, place] = column.real, column.imag
        return slopes.reshape(2 * bins.size, 4)

    margin = (bins[-1] - bins[0]) / 2
    low, high = max(bins[0] - margin, bins[0] / 2), bins[-1] + margin
    lower = np.array([(low - resonance) / width, np.log(_QUALITY_RANGE[0]), -np.inf, -np.inf])
    upper = np.array([(high - resonance) / width, np.log(_QUALITY_RANGE[1]), np.inf, np.inf])
    start = np.array([0.0, np.log(quality), complex_amplitude.real * quality, complex_amplitude.imag * quality])
    found = least_squares(
        residual, start, jacobian, bounds=(lower, upper), ftol=1e-10, xtol=1e-10, gtol=1e-10, max_nfev=100
    )
    at, q, c = values(found.x)
    return float(at), float(np.clip(q, *_QUALITY_RANGE)), c
