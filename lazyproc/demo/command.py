"""`lazyproc demo`: simulate a scan, fit it, stop once on purpose, resume, compare with the truth, draw the maps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from typing import Any

import h5py
import numpy as np

from lazyproc.core.errors import ArgumentValueError, Interrupted
from lazyproc.core.events import BlockDone, Event, Listener
from lazyproc.core.specs import Output
from lazyproc.demo.maps import compare, draw_maps
from lazyproc.demo.oscillator import fit, response
from lazyproc.demo.simulate import MAIN_DATASET, TRUTH_GROUP, UNITS, simulate_scan
from lazyproc.engine.limits import available_cores
from lazyproc.hdf5.files import Files
from lazyproc.process import Process
from lazyproc.results import open_results

_STOP_AT = 0.4
"""Share of the positions after which the first run is stopped on purpose."""


class OscillatorFit(Process):
    """Fit a damped harmonic oscillator to the band-excitation spectrum of every position."""

    process_name = "Oscillator_Fit"
    outputs = {  # noqa: RUF012
        "Amplitude": Output("f4", quantity="Amplitude", units=UNITS["Amplitude"]),
        "Resonance": Output("f8", quantity="Resonance frequency", units=UNITS["Resonance"]),
        "Quality": Output("f4", quantity="Quality factor", units=UNITS["Quality"]),
        "Phase": Output("f4", quantity="Phase", units=UNITS["Phase"]),
        "R2": Output("f4", quantity="Coefficient of determination", units=""),
    }
    _map_function = staticmethod(fit)


class _StopOnPurpose:
    """Passes events on, and presses Ctrl-C once when enough blocks are done."""

    def __init__(self, listener: Listener, n_positions: int) -> None:
        self._listener = listener
        self._left = _STOP_AT * n_positions

    def __call__(self, event: Event) -> None:
        self._listener(event)
        if isinstance(event, BlockDone):
            before, self._left = self._left, self._left - event.n_positions
            if before > 0 >= self._left:
                signal.raise_signal(signal.SIGINT)


def run_demo(directory: str, *, say: Callable[[str], None], n_rows: int = 96, n_columns: int = 96) -> dict[str, Any]:
    """Run the demo in a folder.

    Parameters
    ----------
    directory : str
        Made if it is not there. A scan that an earlier demo left is used again, and fitted afresh.
    say : callable
        Takes the lines for the person who watches.
    n_rows, n_columns : int
        Size of the scan.

    Returns
    -------
    dict
        Where things are, and the errors against the truth.
    """
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "scan.h5")
    picture = os.path.join(directory, "maps.png")
    if not os.path.exists(path):
        say(f"1  simulating a scan of {n_rows} x {n_columns} positions: {path}")
        simulate_scan(path, n_rows, n_columns)
    else:
        say(f"1  using the scan of an earlier demo: {path}")
    address = f"{path}::{MAIN_DATASET}"
    _check_scan(path)
    with h5py.File(path, "r") as file:
        attributes = dict(file["Measurement_000"].attrs)
        truth = {name: item[()] for name, item in file[TRUTH_GROUP].items()}
    parameters = {key: float(attributes[key]) for key in ("first_frequency", "last_frequency")}
    say("2  fitting an oscillator to every position, and pressing Ctrl-C on purpose on the way")
    stopped = _fit(address, parameters, stop=True, say=say)
    say("3  the same call again goes on from there")
    _fit(address, parameters, stop=False, say=say)
    with OscillatorFit(address, parms_dict=parameters, lazy=True) as process:
        results = f"{path}::{process.duplicate_h5_groups[-1].name}"
    fitted, errors = _compare(results, truth)
    for name, (median, worst) in errors.items():
        unit = "rad" if name == "Phase" else "relative"
        say(f"   {name:<10} error against the truth: median {median:.2g}, 95 % below {worst:.2g} ({unit})")
    _draw(picture, path, fitted, truth, parameters, float(attributes["pixel_size_um"]))
    say(f"4  maps: {picture}")
    say(f"   open the results:  lazyproc.open_results({results!r})")
    return {"results": results, "picture": picture, "stopped_at": stopped, "errors": errors}


def _check_scan(path: str) -> None:
    """Raise ArgumentValueError if the file is none that a demo has made."""
    with closing(Files()) as files:
        file = files.open(path)
        if MAIN_DATASET not in file or TRUTH_GROUP not in file:
            raise ArgumentValueError(
                f"{path}: this file was not made by a demo, which is left as it is; expected none, or the scan of an "
                "earlier demo. Choose another folder."
            )


def _fit(address: str, parameters: dict[str, float], *, stop: bool, say: Callable[[str], None]) -> float:
    """Compute; return the share that was done when it stopped."""
    with OscillatorFit(address, parms_dict=parameters, cores=available_cores(), checkpoint_interval=1.0) as process:
        n_positions = int(process.h5_main.shape[0])
        if stop:
            process._progress = _StopOnPurpose(process._progress, n_positions)
        try:
            # A demo that was run before in this folder has finished results: the first call computes afresh.
            process.compute(override=stop)
        except Interrupted as interrupted:
            say(f"   {interrupted}")
            done = int(process.partial_h5_groups[-1]["completed_positions"][()].sum())
            return done / n_positions
    return 1.0


def _compare(
    results: str, truth: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[float, float]]]:
    maps = open_results(results).load()
    fitted = {name: maps[name].transpose("Y", "X").to_numpy() for name in truth}
    return fitted, compare(fitted, truth)


def _draw(
    picture: str,
    path: str,
    fitted: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    parameters: dict[str, float],
    pixel: float,
) -> None:
    n_rows, n_columns = fitted["Amplitude"].shape
    row, column = n_rows // 3, n_columns // 3
    with h5py.File(path, "r") as file:
        spectrum = file[MAIN_DATASET][row * n_columns + column]
    ends = parameters["first_frequency"], parameters["last_frequency"]
    names = ("Amplitude", "Resonance", "Quality", "Phase")
    values = [float(fitted[name][row, column]) for name in names]
    curve = response(np.linspace(*ends, 1000), *values)
    draw_maps(
        picture,
        fitted,
        truth,
        "Simulated band-excitation scan: every position fitted",
        example=(np.linspace(*ends, len(spectrum)), spectrum, curve),
        extent=(0, n_columns * pixel, n_rows * pixel, 0),
    )
