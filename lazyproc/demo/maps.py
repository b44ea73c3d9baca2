"""Draw fitted maps beside the truth, and put numbers on the difference.

The figure is made without pyplot: no window, no backend to choose, nothing kept from one figure to the next.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from lazyproc.core.errors import ArgumentValueError

Maps = Mapping[str, NDArray[Any]]
Example = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class _Look:
    """How the maps of one parameter are drawn.

    Attributes
    ----------
    cmap : str
        The colour map of its values.
    units, scale
        The units shown, and what turns the values into them.
    difference : str
        The units of the difference: ``"%"`` of the truth; others are those of the value.
    difference_scale : float
        What turns the difference into them.
    """

    cmap: str
    units: str
    scale: float
    difference: str
    difference_scale: float


_LOOKS = {
    "Amplitude": _Look("magma", "mV", 1e3, "%", 100.0),
    "Resonance": _Look("viridis", "kHz", 1e-3, "Hz", 1.0),
    "Quality": _Look("cividis", "", 1.0, "%", 100.0),
    "Phase": _Look("twilight", "rad", 1.0, "rad", 1.0),
}
_ROWS = ("fit", "truth", "difference")
_ROW_TEXT: dict[str, Any] = {"rotation": 90, "va": "center", "ha": "center", "fontsize": 13, "fontweight": "bold"}
_PIXELS: dict[str, Any] = {"interpolation": "nearest", "origin": "upper"}
_EXAMPLE_INCHES = 2.7
_MISSING = "0.75"
_ACCENT = "#c8442c"


def compare(fitted: Maps, truth: Maps) -> dict[str, tuple[float, float]]:
    """Compare fitted maps with the truth.

    Parameters
    ----------
    fitted, truth : mapping of str to array `(n_rows, n_columns)`
        The maps; what is in both is compared. Pixels that are NaN in either are left out.

    Returns
    -------
    dict
        For each parameter the median and the 95th percentile of the error, relative to the truth; of ``"Phase"`` the
        error is absolute, in radians, the short way round the circle. NaN where no pixel is left.

    Raises
    ------
    ArgumentValueError
        If the maps of a parameter are not of one shape.

    Examples
    --------
    >>> median, _ = compare({"Phase": np.array([[3.1]])}, {"Phase": np.array([[-3.1]])})["Phase"]
    >>> round(median, 3)
    0.083
    """
    result = {}
    for name in fitted:
        if name in truth:
            errors = np.abs(_difference(name, *_pair(name, fitted, truth)))
            if name != "Phase":
                with np.errstate(divide="ignore", invalid="ignore"):
                    errors = errors / np.abs(np.asarray(truth[name], dtype=np.float64))
            errors = errors[np.isfinite(errors)]
            median, most = np.percentile(errors, (50, 95)) if errors.size else (np.nan, np.nan)
            result[name] = float(median), float(most)
    return result


def draw_maps(
    path_png: str | os.PathLike[str],
    fitted: Maps,
    truth: Maps,
    title: str,
    example: Example | None = None,
    extent: tuple[float, float, float, float] | None = None,
) -> None:
    """Draw fit, truth and difference of amplitude, resonance, quality factor and phase into a PNG, 1600 pixels wide.

    Parameters
    ----------
    path_png : path
        The picture; replaced if it exists.
    fitted, truth : mapping of str to array `(n_rows, n_columns)`
        The maps, in V, Hz, 1 and radians. Pixels that are NaN, those not fitted yet, are drawn grey.
    title : str
        The line on top.
    example : tuple of arrays `(n_bins,)`, optional
        Frequency in Hz, one complex spectrum in V and its fitted curve, drawn below the maps. A curve of another
        length is taken to be spread evenly over the same band.
    extent : tuple of float, optional
        Left, right, bottom and top edge of the maps in µm. Default: pixels.

    Raises
    ------
    ArgumentValueError
        If a map is missing, or the maps of a parameter are not of one shape.
    """
    missing = [name for name in _LOOKS if name not in fitted or name not in truth]
    if missing:
        raise ArgumentValueError(f"draw_maps: {missing} is not in both fitted and truth; expected {list(_LOOKS)}.")
    maps_height = _maps_height(np.shape(truth["Amplitude"]), extent)
    height = maps_height + (_EXAMPLE_INCHES if example is not None else 0.0)
    figure = Figure(figsize=(16.0, height), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.05))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold")
    parts: Any = (
        figure.subfigures(2, 1, height_ratios=(maps_height, _EXAMPLE_INCHES)) if example is not None else [figure]
    )
    if example is not None:
        _draw_example(parts[1], example)
    axes: Any = parts[0].subplots(3, 4, sharex=True, sharey=True)
    errors = compare(fitted, truth)
    for column, (name, look) in enumerate(_LOOKS.items()):
        _draw_parameter(axes[:, column], name, look, _pair(name, fitted, truth), extent)
        axes[2, column].set_title(_error_text(name, *errors[name]), fontsize=10)
    units = "pixel" if extent is None else "µm"
    for row, label in enumerate(_ROWS):
        axes[row, 0].set_ylabel(f"Y ({units})")
        axes[row, 0].annotate(label, (0.0, 0.5), (-54, 0), "axes fraction", "offset points", **_ROW_TEXT)
    for axis in axes[2]:
        axis.set_xlabel(f"X ({units})")
    figure.savefig(path_png, format="png")


def _pair(name: str, fitted: Maps, truth: Maps) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both maps of a parameter in double precision, or raise."""
    pair = np.asarray(fitted[name], dtype=np.float64), np.asarray(truth[name], dtype=np.float64)
    if pair[0].ndim != 2 or pair[0].shape != pair[1].shape or pair[0].size == 0:
        raise ArgumentValueError(
            f"{name}: the fitted map has the shape {pair[0].shape} and the truth {pair[1].shape}; expected two maps "
            "(n_rows, n_columns) of one shape."
        )
    return pair


def _difference(name: str, fitted: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return fitted minus true values; for the phase the short way round the circle."""
    difference = fitted - truth
    return difference - 2.0 * np.pi * np.round(difference / (2.0 * np.pi)) if name == "Phase" else difference


def _maps_height(shape: tuple[int, ...], extent: tuple[float, float, float, float] | None) -> float:
    """Return the inches that three rows of maps and the title need: less for a scan that is wider than high."""
    left, right, bottom, top = extent or (0.0, float(shape[-1]), float(shape[0]), 0.0)
    aspect = abs(top - bottom) / (abs(right - left) or 1.0)
    return 3 * (2.4 * min(max(aspect, 0.4), 1.0) + 0.55) + 0.45


def _limits(name: str, values: NDArray[np.float64]) -> Normalize:
    """Return the range of colours: the whole circle for a phase, else what nearly all values span."""
    if name == "Phase":
        return Normalize(-np.pi, np.pi)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 1.0)
    return Normalize(low, high if high > low else low + (abs(low) or 1.0) * 1e-6)


def _draw_parameter(axes: Any, name: str, look: _Look, pair: tuple[Any, Any], extent: Any) -> None:
    """Draw the three maps of one parameter, one below the other."""
    fitted, truth = pair
    figure = axes[0].figure
    for axis in axes:
        axis.set_facecolor(_MISSING)  # NaN is transparent
    norm = _limits(name, truth * look.scale)
    # The truth sets the colours of both, so that equal colours are equal values.
    for axis, values in zip(axes, (fitted, truth), strict=False):
        image = axis.imshow(values * look.scale, cmap=look.cmap, norm=norm, **_PIXELS, extent=extent)
    label = f"{name} ({look.units})" if look.units else name
    bar = figure.colorbar(image, ax=list(axes[:2]), aspect=32, pad=0.03, extend=_extend(name))
    bar.ax.tick_params(labelsize=9)
    if name == "Phase":
        bar.set_ticks([-np.pi, -np.pi / 2, 0.0, np.pi / 2, np.pi], labels=["−π", "−π/2", "0", "π/2", "π"])
    axes[0].set_title(label, fontsize=13)
    difference = _difference(name, fitted, truth)
    if look.difference == "%":
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = difference / truth
    difference = difference * look.difference_scale
    finite = np.abs(difference[np.isfinite(difference)])
    most = float(np.percentile(finite, 97)) if finite.size else 0.0
    image = axes[2].imshow(
        difference, cmap="RdBu_r", norm=Normalize(-(most or 1.0), most or 1.0), **_PIXELS, extent=extent
    )
    bar = figure.colorbar(image, ax=axes[2], aspect=16, pad=0.03, extend="both")
    bar.ax.tick_params(labelsize=9)
    bar.set_label(f"fit − truth ({look.difference})", fontsize=10)


def _extend(name: str) -> str:
    return "neither" if name == "Phase" else "both"


def _error_text(name: str, median: float, most: float) -> str:
    """Return the line above a difference."""
    if np.isnan(median):
        return "nothing to compare"
    if name == "Phase":
        return f"median {median * 1e3:.0f} mrad, 95 % below {most * 1e3:.0f} mrad"
    if name == "Resonance":
        return f"median {median * 1e6:.0f} ppm, 95 % below {most * 1e6:.0f} ppm"
    return f"median {median * 100:.1f} %, 95 % below {most * 100:.1f} %"


def _draw_example(figure: Any, example: Example) -> None:
    """Draw one spectrum and its fit: magnitude, phase, and the circle in the complex plane."""
    frequency, spectrum, curve = (np.asarray(part) for part in example)
    axes = figure.subplots(1, 3, width_ratios=(1.7, 1.7, 1.0))
    kilohertz = frequency / 1e3
    on_curve = kilohertz if curve.size == frequency.size else np.linspace(kilohertz[0], kilohertz[-1], curve.size)
    dots: dict[str, Any] = {"marker": "o", "s": 16, "color": "0.25", "label": "one spectrum"}
    line: dict[str, Any] = {"color": _ACCENT, "lw": 2.0, "label": "fit"}
    axes[0].scatter(kilohertz, np.abs(spectrum) * 1e3, **dots)
    axes[0].plot(on_curve, np.abs(curve) * 1e3, **line)
    axes[0].set(xlabel="Frequency (kHz)", ylabel="Magnitude (mV)")
    axes[0].legend(frameon=False)
    # Measured phases are shown within half a turn of the fitted one, so that they do not jump where the circle
    # closes; and paler the weaker the response is, because noise then decides the phase.
    fitted = np.unwrap(np.angle(curve))
    near = np.interp(kilohertz, on_curve, fitted)
    strength = np.abs(spectrum) / (np.abs(spectrum).max() or 1.0)
    axes[1].scatter(
        kilohertz, near + np.angle(spectrum * np.exp(-1j * near)), alpha=np.clip(3.0 * strength, 0.2, 1.0), **dots
    )
    axes[1].plot(on_curve, fitted, **line)
    axes[1].set(xlabel="Frequency (kHz)", ylabel="Phase (rad)")
    axes[2].scatter(spectrum.real * 1e3, spectrum.imag * 1e3, **dots)
    axes[2].plot(curve.real * 1e3, curve.imag * 1e3, **line)
    axes[2].set(xlabel="Real part (mV)", ylabel="Imaginary part (mV)")
    axes[2].set_aspect("equal", adjustable="datalim")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
