"""Published subclasses of pyUSID's Process on simulated data of their kind; run by the scripts of a test.

Which base they run on is not decided here: the script that imports this module has, or has not, called
`lazyproc.replace_pyusid` before.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
from usid_files import make_usid_file

BIAS_CYCLE = np.concatenate([np.linspace(0, 8, 5)[:4], np.linspace(8, -8, 9)[:8], np.linspace(-8, 0, 5)[:4]])
"""Bias of one hysteresis loop, in V: up, down and back."""
FORCES = {
    "num_rows": 2,
    "num_cols": 4,
    "pnts_per_avg": 2048,
    "pnts_per_pixel": 1,
    "pnts_per_line": 4,
    "FastScanSize": 1e-6,
    "SlowScanSize": 5e-7,
    "total_time": 2.048e-3,
    "sampling_rate": 1e6,
    "trigger": 5e-4,
    "drive_freq": 80e3,
    "roi": 3e-4,
    "n_taps": 199,
    "filter_bandwidth": 10e3,
}
"""What an instrument notes of a measurement of forces: s, Hz and m."""


class Interrupted(Exception):
    """Raised in the middle of a computation, as Ctrl-C would be."""


@dataclass(frozen=True)
class Case:
    """One published class, its data, and how it is used.

    Attributes
    ----------
    package : str
        What has to be installed.
    source : callable
        Writes the file and returns the path of its main dataset.
    make : callable
        Takes the main dataset and options of `Process`; returns the object.
    phases : tuple of callables
        Each takes the object, sets up a phase, and returns the method that computes it.
    batch : int
        Positions a batch.
    cores : int
        For the runs that are not interrupted; 1 for classes that draw random numbers in the function.
    elsewhere : bool
        Whether the class can write into another file.
    resumes : bool
        Whether the class can be resumed.
    recognised : bool
        Whether the class finds its finished results again.
    steady : bool
        Whether the numbers are the same however the positions are split into batches.
    """

    package: str
    source: Callable[[Path], str]
    make: Callable[..., Any]
    phases: tuple[Callable[[Any], Callable[[], Any]], ...]
    batch: int
    cores: int = 1
    elsewhere: bool = True
    resumes: bool = True
    recognised: bool = True
    steady: bool = True

    def modes(self) -> Iterator[str]:
        """Yield the ways in which the class can be run."""
        yield "fresh"
        if self.elsewhere:
            yield "fresh_elsewhere"
        if self.resumes:
            yield "resumed"
        if self.resumes and self.elsewhere:
            yield "resumed_elsewhere"


# -- data ------------------------------------------------------------------------------------------------------------


def resonance(frequency: Any, amplitude: Any, centre: Any, quality: Any, phase: Any) -> Any:
    """Return the response of a harmonic oscillator."""
    return amplitude * np.exp(1j * phase) * centre**2 / (frequency**2 - 1j * frequency * centre / quality - centre**2)


def band_excitation(path: Path) -> str:
    """Write 12 positions of 3 bias steps of 24 frequencies each."""
    random = np.random.default_rng(3)
    frequency = np.linspace(300e3, 340e3, 24)
    shape = (12, 3, 1)
    amplitude, phase = random.uniform(1e-3, 3e-3, shape), random.uniform(-2, 2, shape)
    centre, quality = random.uniform(315e3, 325e3, shape), random.uniform(40, 90, shape)
    clean = resonance(frequency, amplitude, centre, quality, phase)
    noise = 2e-4 * random.standard_normal((*clean.shape, 2)) @ [1, 1j]
    steps = [("DC_Offset", "V", np.array([0.0, 3.0, -3.0])), ("Frequency", "Hz", frequency)]
    return _write(path, (3, 4), (clean + noise).reshape(12, -1).astype(np.complex64), steps)


def hysteresis_loops(path: Path, number: str = "f8") -> str:
    """Write 16 positions of what a fit of oscillators gives along two cycles of bias."""
    fields = ["Amplitude [V]", "Frequency [Hz]", "Quality Factor", "Phase [rad]", "R2 Criterion"]
    random = np.random.default_rng(4)
    rising = np.repeat([True, False, True], [4, 8, 4])
    coercive = np.where(rising, -1, 1) * random.uniform(2, 4, (16, 2, 1))
    response = np.tanh((BIAS_CYCLE + coercive) / 1.5) + 0.05 * random.standard_normal((16, 2, 16))
    data = np.zeros((16, 32), [(name, number) for name in fields])
    data["Amplitude [V]"] = np.abs(response).reshape(16, -1)
    data["Phase [rad]"] = np.where(response > 0, 0.3, 0.3 - np.pi).reshape(16, -1)
    data["Frequency [Hz]"], data["Quality Factor"], data["R2 Criterion"] = 320e3, 60, 0.98
    return _write(path, (4, 4), data, [("Cycle", "", 2), ("DC_Offset", "V", BIAS_CYCLE)])


def general_mode(path: Path) -> str:
    """Write 12 positions of a noisy current along 128 points of one period of voltage."""
    random = np.random.default_rng(5)
    bias = 6 * np.sin(2 * np.pi * np.arange(128) / 128)
    current = random.uniform(0.5, 1.5, (12, 1)) * bias + random.uniform(0.1, 0.3, (12, 1)) * bias**3 / 36
    return _write(path, (3, 4), current + 0.05 * random.standard_normal((12, 128)), [("Bias", "V", bias)])


def cantilever(path: Path) -> str:
    """Write 8 positions of a cantilever's motion of 2048 points, whose frequency falls after a trigger."""
    random = np.random.default_rng(6)
    time = np.arange(2048) / FORCES["sampling_rate"]
    since = np.clip(time - FORCES["trigger"], 0, None)
    fall = random.uniform(200, 600, (8, 1)) * (1 - np.exp(-since / random.uniform(5e-5, 2e-4, (8, 1))))
    phase = 2 * np.pi * np.cumsum(FORCES["drive_freq"] - fall, axis=1) / FORCES["sampling_rate"]
    name = _write(path, (2, 4), np.sin(phase) + 1e-3 * random.standard_normal(phase.shape), [("Time", "s", time)])
    with h5py.File(path, "r+") as file:
        file[name].attrs.update(FORCES)
    return name


def _write(path: Path, grid: tuple[int, int], data: Any, spectral: Any) -> str:
    name = make_usid_file(path, n_rows=grid[0], n_cols=grid[1], data=data, spectral=spectral, text="str")[1]
    with h5py.File(path, "r+") as file:
        file.attrs["data_type"] = "BEPSData"
    return name


# -- how the classes are used ----------------------------------------------------------------------------------------


def plain(process: Any) -> Callable[[], Any]:
    """Compute as it is."""
    return process.compute


def guess(process: Any) -> Callable[[], Any]:
    """Compute the first phase of a Fitter."""
    process.set_up_guess()
    return process.do_guess


def fit(process: Any) -> Callable[[], Any]:
    """Compute the second phase of a Fitter, in the group that holds the first."""
    process.set_up_fit()
    if process.h5_results_grp is None:
        process.h5_results_grp = (process.duplicate_h5_groups + process.partial_h5_groups)[-1]
    return process.do_fit


def tested(process: Any) -> Callable[[], Any]:
    """Compute after a test, from which the class learns the sizes of its results."""
    process.test([0, 0])
    return process.compute


def with_plain_numbers(fitter: type) -> type:
    """Return a BESHOfitter on which NumPy 2.4 does not stumble: it takes no array of one number for a number."""

    class OnPresentNumPy(fitter):
        def _reformat_results(self, results: Any, strategy: str = "wavelet_peaks") -> Any:
            for result in results if strategy == "least_squares" else ():
                result.fun = result.fun.item()
            return super()._reformat_results(results, strategy)

    return OnPresentNumPy


def bglib_oscillators(main: Any, **options: Any) -> Any:
    from BGlib.be.analysis import BESHOfitter

    return with_plain_numbers(BESHOfitter)(main, **options)


def bglib_loops(main: Any, **options: Any) -> Any:
    from BGlib.be.analysis import BELoopFitter

    return BELoopFitter(main, "BEPSData", "DC modulation mode", "full", **options)


def bglib_filter(main: Any, **options: Any) -> Any:
    from BGlib.gmode.proc.signal_filter import SignalFilter

    return SignalFilter(main, noise_threshold=1e-3, **options)


def bglib_bayesian(main: Any, **options: Any) -> Any:
    from BGlib.gmode.analysis.giv_bayesian import GIVBayesian

    return GIVBayesian(main, 200.0, 9, num_x_steps=40, **options)


def ffta_frequency(main: Any, **options: Any) -> Any:
    put_back_names_of_pyusid()
    from ffta.hdf_utils.process import FFtrEFM

    return FFtrEFM(main, **options)


def ffta_potential(main: Any, **options: Any) -> Any:
    put_back_names_of_pyusid()
    from ffta.gkpfm.gkprocess import GKPFM

    frequency = np.linspace(-0.5, 0.5, 2048) * FORCES["sampling_rate"]
    transfer = resonance(np.abs(frequency), 1.0, 80e3, 50.0, 0.0)
    return GKPFM(main, parm_dict=dict(FORCES, if_only=False), TF_norm=transfer, **options)


def ffta_svd(main: Any, **options: Any) -> Any:
    put_back_names_of_pyusid()
    from ffta.analysis.svd_utils import SVD

    return SVD(main, num_components=3, **options)


def pycroscopy_oscillators(main: Any, **options: Any) -> Any:
    module = module_of_pycroscopy("pycroscopy.analysis.be_sho_fitter")
    return with_plain_numbers(module.BESHOfitter)(main, **options)


def pycroscopy_loops(main: Any, **options: Any) -> Any:
    module = module_of_pycroscopy("pycroscopy.analysis.be_loop_fitter")
    return module.BELoopFitter(main, "BEPSData", "DC modulation mode", "full", **options)


def pycroscopy_filter(main: Any, **options: Any) -> Any:
    module = module_of_pycroscopy("pycroscopy.processing.signal_filter")
    return module.SignalFilter(main, noise_threshold=1e-3, **options)


def pycroscopy_bayesian(main: Any, **options: Any) -> Any:
    module = module_of_pycroscopy("pycroscopy.analysis.giv_bayesian")
    return module.GIVBayesian(main, 200.0, 9, num_x_steps=40, **options)


def pycroscopy_svd(main: Any, **options: Any) -> Any:
    return module_of_pycroscopy("pycroscopy.processing.svd_utils").SVD(main, num_components=3, **options)


def put_back_names_of_pyusid() -> None:
    """Put back what pyUSID 0.0.12 no longer has: names that moved to sidpy, and a module that was renamed."""
    import pyUSID
    import sidpy.hdf.hdf_utils
    import sidpy.viz.plot_utils
    from pyUSID.io import anc_build_utils, hdf_utils

    pyUSID.plot_utils = sidpy.viz.plot_utils
    for name in ("copy_attributes", "get_attributes"):
        setattr(hdf_utils, name, getattr(sidpy.hdf.hdf_utils, name))
    renamed = ModuleType("pyUSID.io.write_utils")
    renamed.Dimension, renamed.calc_chunks = pyUSID.Dimension, anc_build_utils.calc_chunks  # type: ignore[attr-defined]
    sys.modules["pyUSID.io.write_utils"] = renamed


def module_of_pycroscopy(name: str) -> Any:
    """Import one module without its packages' own modules: translators and viewers that need what is gone."""
    put_back_names_of_pyusid()
    for package in ("pycroscopy", "pycroscopy.analysis", "pycroscopy.io", "pycroscopy.processing"):
        if package not in sys.modules:
            parent, _, last = package.rpartition(".")
            places = sys.modules[parent].__path__ if parent else sys.path
            bare = ModuleType(package)
            bare.__path__ = [os.path.join(place, last) for place in places]
            sys.modules[package] = bare
    return importlib.import_module(name)


CASES = {
    "BESHOfitter": Case("BGlib", band_excitation, bglib_oscillators, (guess, fit), 5, cores=2),
    "BELoopFitter": Case("BGlib", hysteresis_loops, bglib_loops, (guess, fit), 6, steady=False),
    "SignalFilter": Case("BGlib", general_mode, bglib_filter, (plain,), 5, cores=2),
    "GIVBayesian": Case("BGlib", general_mode, bglib_bayesian, (plain,), 5, elsewhere=False, steady=False),
    "FFtrEFM": Case("ffta", cantilever, ffta_frequency, (plain,), 3, elsewhere=False),
    "GKPFM": Case("ffta", cantilever, ffta_potential, (tested,), 3, elsewhere=False, resumes=False, recognised=False),
    "SVD": Case("ffta", cantilever, ffta_svd, (plain,), 3, elsewhere=False, resumes=False),
    "px.BESHOfitter": Case("pycroscopy", band_excitation, pycroscopy_oscillators, (guess, fit), 5),
    "px.BELoopFitter": Case(
        "pycroscopy", partial(hysteresis_loops, number="f4"), pycroscopy_loops, (guess, fit), 6, steady=False
    ),
    "px.SignalFilter": Case("pycroscopy", general_mode, pycroscopy_filter, (plain,), 5),
    "px.GIVBayesian": Case("pycroscopy", general_mode, pycroscopy_bayesian, (plain,), 5, elsewhere=False, steady=False),
    "px.SVD": Case("pycroscopy", general_mode, pycroscopy_svd, (plain,), 5, elsewhere=False, resumes=False),
}
"""What cannot be run, on either base: in other files GIVBayesian and SVD (pyUSID's own writer fails for them); GKPFM a
second time (it looks for its results in the wrong group); pycroscopy's Cluster and Decomposition (they write where the
data came from before they have a group); BERelaxFit (it uses attributes that went with pyUSID 0.0.5, and gives no
process name, which pyUSID refuses); BESHOfitter's wavelets and SignalFilter's frequency filters (their own errors)."""


# -- running ---------------------------------------------------------------------------------------------------------


def run(package: str, folder: Path) -> None:
    """Run the classes of a package in each of their modes; leave files, and a report of each in ``report.json``."""
    import dask
    import matplotlib

    matplotlib.use("Agg")
    dask.config.set({"multiprocessing.context": "fork"})  # so that BELoopFitter's workers need not import all again
    report = {}
    for name, case in CASES.items():
        for mode in case.modes() if case.package == package else ():
            place = folder / f"{name}-{mode}"
            place.mkdir(parents=True)
            with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
                try:
                    report[place.name] = {"error": "", **run_mode(case, mode)}
                except Exception:
                    report[place.name] = {"error": traceback.format_exc()}
    (folder / "report.json").write_text(json.dumps(report))


def run_mode(case: Case, mode: str) -> dict[str, Any]:
    """Run one class in one way, in the working folder; tell its base and how often it wrote a batch in each step."""
    name = case.source(Path("scan.h5"))
    target = "elsewhere.h5" if mode.endswith("elsewhere") else None
    steps = []
    if mode.startswith("resumed"):
        for phase in case.phases:
            steps.append(compute(case, name, target, [phase], interrupt=True))
            steps.append(compute(case, name, target, [phase]))
    else:
        steps.append(compute(case, name, target, case.phases, cores=case.cores))
    if case.recognised:
        steps.append(compute(case, name, target, case.phases[:1]))
    return {"base": steps[0]["base"], "steps": steps}


def compute(
    case: Case, name: str, target: str | None, phases: Any, *, cores: int = 1, interrupt: bool = False
) -> dict[str, Any]:
    """Open the files, make an object and compute the phases with it; or leave within the second batch."""
    np.random.seed(11)  # the published classes draw from NumPy's global generator
    with h5py.File("scan.h5", "r+") as file, contextlib.ExitStack() as stack:
        options = {"h5_target_group": stack.enter_context(h5py.File(target, "a"))} if target else {}
        process = case.make(file[name], cores=cores, **options)
        writes: list[int] = []
        for phase in phases:
            method = phase(process)
            process._max_pos_per_read = case.batch
            process._write_results_chunk = counted(process._write_results_chunk, writes, 2 if interrupt else None)
            try:
                method()
            except Interrupted:
                marked = int(process._h5_status_dset[()].sum())
                assert marked == case.batch, f"{marked} positions are marked after the first batch of {case.batch}"
        base = next(cls.__module__ for cls in type(process).__mro__ if cls.__name__ == "Process")
        return {"base": base, "writes": writes, "group": str(getattr(process.h5_results_grp, "name", None))}


def counted(hook: Callable[[], Any], writes: list[int], fails_at: int | None) -> Callable[[], Any]:
    """Return the hook, noting the calls, and raising instead of the given one."""
    hook = getattr(hook, "counted_hook", hook)  # the hook of the phase before may still be there

    def wrapped() -> Any:
        writes.append(len(writes) + 1)
        if len(writes) == fails_at:
            raise Interrupted
        return hook()

    wrapped.counted_hook = hook  # type: ignore[attr-defined]
    return wrapped
