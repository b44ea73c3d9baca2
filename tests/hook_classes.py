"""Classes in the old style of `pyUSID.Process`, each made for any base, so that one body can run on two.

Written from descriptions of published subclasses (their hooks, their private names, their habits), not from their code.
The arithmetic is small and exact enough to be compared bit for bit. Everything is created with plain h5py, but for
`make_peak_finder`, which uses pyUSID's own writers.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings

import h5py
import joblib
import numpy as np

SHO = np.dtype([(name, "f8") for name in ("Amplitude", "Frequency", "Quality", "Phase", "R2")])


def parallel_compute_of(base):
    """Return the `parallel_compute` that belongs to a base: a class body imports both from the same package."""
    module = "lazyproc" if base.__module__.startswith("lazyproc") else "pyUSID.processing.process"
    return importlib.import_module(module).parallel_compute


def new_group(process, parms=None, parent=None):
    """Create the next results group, named and attributed as old subclasses do it."""
    parent, main = parent or process._h5_target_group, process.h5_main
    prefix = f"{main.name.rpartition('/')[2]}-{process.process_name.replace('-', '_')}_"
    taken = [int(name[len(prefix) :]) for name in parent if re.fullmatch(re.escape(prefix) + r"\d{3}", name)]
    group = parent.create_group(f"{prefix}{max(taken, default=-1) + 1:03d}")
    group.attrs["tool"] = process.process_name
    if main.file == group.file:
        group.attrs["source_000"] = h5py.Dataset(main.id).ref
    put_parms(group, process.parms_dict if parms is None else parms)
    return group


def put_parms(group, parms):
    """Write parameters as attributes; None has no form there and is left out."""
    for key, value in (parms or {}).items():
        if value is not None:
            group.attrs[key] = value


def mean_of(spectrum, power=1):
    """Return one number of a spectrum."""
    return np.mean(spectrum.astype("f8") ** power)


def largest(spectrum):
    """Return place and height of the maximum."""
    return np.array([np.argmax(spectrum), np.max(spectrum)], "f8")


def scaled(spectrum, factors, shift=0.0):
    """Return a spectrum changed by arguments that travel as a dict."""
    return spectrum.astype("f8") * factors["gain"] + shift


def guess_shape(spectrum, axis=None):
    """Return a first guess of four numbers of one spectrum over its axis."""
    axis = np.arange(spectrum.size, dtype="f8") if axis is None else axis
    place = int(np.argmax(np.abs(spectrum)))
    return np.array([np.abs(spectrum[place]), axis[place], spectrum.size, np.mean(spectrum)], "f8")


def refine(guess, spectrum):
    """Return a guess refined by its spectrum, and how well it fits."""
    return np.append(guess + np.mean(spectrum) / 3, np.sum(np.square(spectrum)))


def make_mean(base):
    """The least that works: creates, finds, maps and writes one number a position; an argument for the function."""

    class MeanHooks(base):
        def __init__(self, h5_main, process_name="Mean_Hooks", **kwargs):
            super().__init__(h5_main, process_name, **kwargs)

        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self)
            self.h5_results = self.h5_results_grp.create_dataset("Results", (self.h5_main.shape[0], 1), "f4")

        def _get_existing_datasets(self):
            self.h5_results = self.h5_results_grp["Results"]

        def _write_results_chunk(self):
            self.h5_results[self._get_pixels_in_current_batch(), 0] = np.array(self._results)

        @staticmethod
        def _map_function(spectrum, *args, **kwargs):
            return mean_of(spectrum, *args, **kwargs)

        def test(self, position=0):
            return mean_of(self.h5_main[position])

    return MeanHooks


def make_no_map(base):
    """Like `make_mean`, but its function was forgotten: NotImplementedError leaves compute()."""

    class NoMapHooks(make_mean(base)):
        _map_function = base._map_function

    return NoMapHooks


def make_filter(base):
    """Takes nothing but self, replaces ``self.data`` by a filtered form and writes that; cannot resume."""

    class FilterHooks(base):
        def __init__(self, h5_main, **kwargs):
            super().__init__(h5_main, "anything", **kwargs)
            self.process_name = "FFT_Filter"
            self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()

        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self)
            self.h5_filtered = self.h5_results_grp.create_dataset(
                "Filtered_Data", self.h5_main.shape, self.h5_main.dtype
            )

        def _unit_computation(self):
            spectrum = np.fft.rfft(self.data, axis=1)
            spectrum[:, -1] = 0
            self.data = np.fft.irfft(spectrum, self.data.shape[1], axis=1)

        def _write_results_chunk(self):
            self.h5_filtered[self._get_pixels_in_current_batch(), :] = self.data

    return FilterHooks


def make_peak_finder(base):
    """Uses pyUSID's writers with the handles of h5_main, and its parameters while it creates; cannot resume."""

    class PeakHooks(base):
        def __init__(self, h5_main, width=3, **kwargs):
            super().__init__(h5_main, "Peak_Hooks", parms_dict={"width": width, "method": "argmax"}, **kwargs)

        def _create_results_datasets(self):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from pyUSID import Dimension
                from pyUSID.io import hdf_utils

                group = hdf_utils.create_results_group(
                    self.h5_main, self.process_name, h5_parent_group=self._h5_target_group
                )
                put_parms(group, self.parms_dict)
                self.h5_results_grp = group
                self.h5_peaks = hdf_utils.write_main_dataset(
                    group,
                    (self.h5_main.shape[0], 1),
                    "Peak_Response",
                    f"Peak over {self.parms_dict['width']}",
                    "a. u.",
                    None,
                    Dimension("Peaks", "a. u.", np.arange(1)),
                    h5_pos_inds=self.h5_main.h5_pos_inds,
                    h5_pos_vals=self.h5_main.h5_pos_vals,
                    dtype=np.float32,
                )

        def _write_results_chunk(self):
            self.h5_peaks[self._get_pixels_in_current_batch(), 0] = np.array(self._results)[:, 1]

        @staticmethod
        def _map_function(spectrum):
            return largest(spectrum)

    return PeakHooks


def make_signal_filter(base):
    """Sets its own sizes and lists, computes with helpers, overwrites self.data with complex numbers."""
    parallel_compute = parallel_compute_of(base)

    class SignalFilterHooks(base):
        def __init__(self, h5_main, cutoff=2, write_filtered=True, **kwargs):
            super().__init__(h5_main, "Signal_Filter_Hooks", **kwargs)
            self.cutoff = cutoff
            self._max_pos_per_read = max(1, int(self._max_pos_per_read / 2))
            self.parms_dict = {"cutoff": cutoff, "write_filtered": write_filtered}
            self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()
            self.data = None
            self.filtered_data = self.noise_floors = None

        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self)
            self.h5_results_grp.attrs["last_pixel"] = 0
            n_positions, n_spectral = self.h5_main.shape
            self.h5_filtered = self.h5_results_grp.create_dataset("Filtered_Data", (n_positions, n_spectral), "f8")
            self.h5_noise = self.h5_results_grp.create_dataset("Noise_Floors", (n_positions, 1), "f8")
            self.h5_results_grp["Composite_Filter"] = np.arange(n_spectral) < self.cutoff
            if self.mpi_comm is not None:
                self.mpi_comm.Barrier()

        def _get_existing_datasets(self):
            self.h5_filtered = self.h5_results_grp["Filtered_Data"]
            self.h5_noise = self.h5_results_grp["Noise_Floors"]

        def _unit_computation(self, *args, **kwargs):
            floors = parallel_compute(self.data, np.std, cores=self._cores, verbose=self.verbose)
            self.noise_floors = np.array(floors, "f8")[:, None]
            self.data = np.fft.fft(self.data, axis=1)
            self.data[:, self.cutoff :] = 0
            self.filtered_data = np.real(np.fft.ifft(self.data, axis=1))

        def _write_results_chunk(self):
            pixels = self._get_pixels_in_current_batch()
            self.h5_filtered[pixels, :] = self.filtered_data
            self.h5_noise[pixels, :] = self.noise_floors
            self.filtered_data = self.noise_floors = None

    return SignalFilterHooks


def make_bayesian(base):
    """Overrides compute and the sizes, computes twice a batch, writes from self.data, keeps state between batches."""
    parallel_compute = parallel_compute_of(base)

    class BayesianHooks(base):
        def __init__(self, h5_main, gain=2.0, **kwargs):
            super().__init__(h5_main, "Bayesian_Hooks", parms_dict={"gain": gain}, **kwargs)
            self.gain = gain
            self.__first_batch = True
            self.forward = self.reverse = None

        def _set_memory_and_cores(self, cores=None, man_mem_limit=None, mem_multiplier=1.0):
            super()._set_memory_and_cores(cores=cores, mem_multiplier=2.0, man_mem_limit=man_mem_limit)
            self._max_pos_per_read = min(self._max_pos_per_read, 9)

        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self)
            create, n_positions = self.h5_results_grp.create_dataset, self.h5_main.shape[0]
            create("Corrected_Current", self.h5_main.shape, "f8")
            create("Resistance", (n_positions, 3), "f8")
            create("Capacitance", (n_positions, 1), [("Forward", "f4"), ("Reverse", "f4")])
            create("Spectroscopic_Values", (1, 3), "f4")
            self._get_existing_datasets()

        def _get_existing_datasets(self):
            assert self.gain  # an attribute that the constructor of the base cannot know yet
            names = ("Corrected_Current", "Resistance", "Capacitance", "Spectroscopic_Values")
            self.h5_current, self.h5_resistance, self.h5_capacitance, self.h5_values = (
                self.h5_results_grp[name] for name in names
            )

        def _unit_computation(self, *args, **kwargs):
            half = self.data.shape[1] // 2
            options = {"cores": self._cores, "lengthy_computation": False, "func_args": [{"gain": self.gain}]}
            self.forward = parallel_compute(self.data[:, :half], scaled, func_kwargs={"shift": 0.5}, **options)
            self.reverse = parallel_compute(self.data[:, half:], scaled, verbose=self.verbose, **options)

        def _write_results_chunk(self):
            if self.__first_batch:
                self.h5_values[0] = np.arange(3) * self.gain
                self.__first_batch = False
            pixels = self._get_pixels_in_current_batch()
            forward, reverse = np.array(self.forward), np.array(self.reverse)
            self.h5_current[pixels, :] = self.data - np.mean(forward, axis=1)[:, None]
            self.h5_resistance[pixels, :] = forward[:, :3] / 3
            both = np.zeros((len(pixels), 1), self.h5_capacitance.dtype)
            both["Forward"][:, 0], both["Reverse"][:, 0] = forward.sum(axis=1), reverse.sum(axis=1)
            self.h5_capacitance[pixels, :] = both

        def compute(self, override=False, *args, **kwargs):
            return super().compute(*args, override=override, **kwargs)

    return BayesianHooks


def make_fitter(base):
    """Runs twice in one group with two masks; exchanges its own hooks, compute included, between the phases."""

    class FitterHooks(base):
        def __init__(self, h5_main, process_name="Fit_Hooks", **kwargs):
            super().__init__(h5_main, process_name, **kwargs)
            self.parms_dict = None
            self.h5_guess = self.h5_fit = self._guess = self._fit = None
            self._is_guess = True
            self.compute = self.set_up_guess
            self._unit_computation = super()._unit_computation
            self._create_results_datasets = self._create_guess
            self._map_function = None
            self._raw_pos_per_read = self._max_pos_per_read

        def set_up_guess(self, power=1.0):
            self._is_guess = True
            self._status_dset_name = "completed_guess_positions"
            self.parms_dict = {"guess-method": "largest", "guess-power": power}
            self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()
            self._unit_computation = super()._unit_computation
            self._create_results_datasets = self._create_guess
            self._map_function = functools.partial(guess_shape, axis=np.arange(self.n_axis) * power)
            self._max_pos_per_read = self._raw_pos_per_read // 1.5
            self.compute = self.do_guess

        def do_guess(self, *args, override=False, **kwargs):
            self.h5_results_grp = super().compute(override=override)
            return self.h5_results_grp["Guess"]

        def set_up_fit(self, method="refined"):
            self._is_guess = False
            self.parms_dict = {"fit-method": method}
            self._map_function = self._unit_computation = None
            self._create_results_datasets = self._create_fit
            self._max_pos_per_read = self._raw_pos_per_read // 1.75
            self._status_dset_name = "completed_fit_positions"
            self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()
            if not self.duplicate_h5_groups and not self.partial_h5_groups:
                wanted, self.parms_dict = self.parms_dict.copy(), {}
                self._status_dset_name = "completed_guess_positions"
                finished, _ = self._check_for_duplicates()
                self.parms_dict.update(wanted)
                if not finished:
                    return
                self.h5_results_grp = finished[-1]
                self._status_dset_name = "completed_fit_positions"
                self._get_existing_datasets()
            else:
                self.h5_results_grp = (self.duplicate_h5_groups or self.partial_h5_groups)[-1]
            self._unit_computation = self._unit_fit
            self.compute = self.do_fit

        def do_fit(self, *args, override=False, **kwargs):
            self.h5_results_grp.attrs["last_pixel"] = 0
            self.h5_results_grp = super().compute(override=override)
            return self.h5_results_grp["Fit"]

        n_axis = 3

        @property
        def n_steps(self):
            return self.h5_main.shape[1] // self.n_axis

        def _read_data_chunk(self):
            super()._read_data_chunk()
            if self.data is not None:
                self.data = self.data.reshape(-1, self.n_axis)

        def _unit_fit(self):
            self._guess = self.h5_guess[self._get_pixels_in_current_batch(), :].reshape(-1)
            guesses = np.stack([self._guess[name] for name in SHO.names[:4]], axis=1)
            jobs = [joblib.delayed(refine)(guess, row) for guess, row in zip(guesses, self.data, strict=True)]
            self._results = joblib.Parallel(n_jobs=1)(jobs)

        def _write_results_chunk(self):
            assert len(self.data) == len(self._results) == len(self._get_pixels_in_current_batch()) * self.n_steps
            self._results = np.array(self._results)  # reformatted in place, as old fitters do
            compound = np.zeros(len(self._results), SHO)
            for column, name in enumerate(SHO.names[: self._results.shape[1]]):
                compound[name] = self._results[:, column]
            target = self.h5_guess if self._is_guess else self.h5_fit
            target[self._get_pixels_in_current_batch(), :] = compound.reshape(-1, self.n_steps)

        def _create_guess(self):
            self.h5_results_grp = new_group(self)
            self.h5_guess = self.h5_results_grp.create_dataset(
                "Guess", (self.h5_main.shape[0], self.n_steps), SHO, chunks=(1, self.n_steps)
            )

        def _create_fit(self):
            self.h5_results_grp.attrs["last_pixel"] = 0
            put_parms(self.h5_results_grp, self.parms_dict)
            self.h5_fit = self.h5_results_grp.create_dataset(
                "Fit", self.h5_guess.shape, SHO, chunks=self.h5_guess.chunks
            )
            self.h5_fit.file.flush()

        def _get_existing_datasets(self):
            self.h5_guess = self.h5_results_grp["Guess"]
            try:
                self._h5_status_dset = self.h5_results_grp[self._status_dset_name]
            except KeyError:
                self._h5_status_dset = None
            try:
                self.h5_fit = self.h5_results_grp["Fit"]
            except KeyError:
                self.h5_fit = None
                if not self._is_guess:
                    self._create_fit()

    return FitterHooks


def make_loop_fitter(base):
    """A fitter whose first phase projects compound data, and whose second works on that: h5_main changes."""

    class LoopFitterHooks(make_fitter(base)):
        def __init__(self, h5_main, **kwargs):
            super().__init__(h5_main, "Loop_Hooks", **kwargs)
            self.__h5_main_orig = h5_main
            self._write_results_chunk = None

        n_axis = 2

        def set_up_guess(self, **kwargs):
            self.h5_main = self.__h5_main_orig
            super().set_up_guess(**kwargs)
            self._unit_computation = self._unit_project
            self._write_results_chunk = self._write_guess

        def set_up_fit(self, **kwargs):
            self._write_results_chunk = None
            super().set_up_fit(**kwargs)
            self._write_results_chunk = self._write_fit

        def do_fit(self, *args, override=False, **kwargs):
            self.h5_main = self.h5_results_grp["Projected_Loops"]
            done = super().do_fit(override=override)
            self.h5_main = self.__h5_main_orig
            return done

        def _create_guess(self):
            self.h5_results_grp = new_group(self)
            create, n_positions = self.h5_results_grp.create_dataset, self.h5_main.shape[0]
            create("Projected_Loops", self.h5_main.shape, "f8")
            create("Loop_Metrics", (n_positions, self.n_steps), [("Area", "f8"), ("Offset", "f8")])
            create("Guess", (n_positions, self.n_steps), SHO)
            self._get_existing_datasets()

        def _get_existing_datasets(self):
            self.h5_projected = self.h5_results_grp["Projected_Loops"]
            self.h5_metrics = self.h5_results_grp["Loop_Metrics"]
            super()._get_existing_datasets()

        def _read_data_chunk(self):
            base._read_data_chunk(self)
            if self.data is not None:
                loops = [self.data[:, step :: self.n_steps] for step in range(self.n_steps)]
                self.data = loops, [np.arange(loop.shape[1]) for loop in loops]

        def _unit_project(self):
            loops, axes = self.data
            real = [loop["Amplitude"].astype("f8") * np.cos(loop["Phase"]) for loop in loops]
            metrics = np.array([[(np.sum(row), row[0]) for row in loop] for loop in real])
            self._results = real, metrics, [np.sum(axis) for axis in axes]

        def _write_guess(self):
            real, metrics, sums = self._results
            pixels = self._get_pixels_in_current_batch()
            projected = np.zeros((len(pixels), self.h5_main.shape[1]))
            guesses = np.zeros((len(pixels), self.n_steps), SHO)
            written = np.zeros((len(pixels), self.n_steps), self.h5_metrics.dtype)
            for step in range(self.n_steps):
                projected[:, step :: self.n_steps] = real[step]
                written["Area"][:, step], written["Offset"][:, step] = metrics[step].T
                guesses["Amplitude"][:, step] = real[step].max(axis=1) + sums[step]
            self.h5_projected[pixels, :] = projected
            self.h5_metrics[pixels, :] = written
            self.h5_guess[pixels, :] = guesses

        def _unit_fit(self):
            guesses = self.h5_guess[self._get_pixels_in_current_batch(), :]["Amplitude"]
            self._results = []
            for step, loop in enumerate(self.data[0]):
                self._results += [refine(guess, row) for guess, row in zip(guesses[:, step], loop, strict=True)]

        def _write_fit(self):
            pixels = self._get_pixels_in_current_batch()
            values = np.array(self._results).reshape(self.n_steps, len(pixels), 2)
            fits = np.zeros((len(pixels), self.n_steps), SHO)
            fits["Amplitude"], fits["R2"] = values[:, :, 0].T, values[:, :, 1].T
            self.h5_fit[pixels, :] = fits

    return LoopFitterHooks


def make_force_finder(base):
    """Finds its group itself, in the base's constructor too; its function gives arrays and numbers."""
    parallel_compute = parallel_compute_of(base)

    class ForceHooks(base):
        def __init__(self, h5_main, window=2, **kwargs):
            self.window = window
            parms = {"window": window, "source": h5py.Dataset(h5_main.id).ref}  # a reference never equals anything
            super().__init__(h5_main, "Force_Hooks", parms_dict=parms, **kwargs)

        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self, {"window": self.window}, self.h5_main.parent)  # whatever the target
            create, n_positions = self.h5_results_grp.create_dataset, self.h5_main.shape[0]
            self.h5_frequency = create("Inst_Freq", self.h5_main.shape, "f4")
            self.h5_amplitude = create("Amplitude", self.h5_main.shape, "f4")
            self.h5_tfp = create("tfp", (n_positions, 1), "f4")
            self.h5_shift = create("shift", (n_positions, 1), "f4")

        def _get_existing_datasets(self, index=-1):
            names = [name for name in self.h5_main.parent if "-Force_Hooks_" in name]
            self.h5_results_grp = self.h5_main.parent[sorted(names)[index]]
            self.h5_frequency, self.h5_amplitude, self.h5_tfp, self.h5_shift = (
                self.h5_results_grp[name] for name in ("Inst_Freq", "Amplitude", "tfp", "shift")
            )

        def _unit_computation(self, *args, **kwargs):
            args = [{"window": self.window}, {"gain": 0.5}]
            self._results = parallel_compute(self.data, self._map_function, cores=self._cores, func_args=args)

        def _write_results_chunk(self):
            pixels = self._get_pixels_in_current_batch()
            for column, target in enumerate((self.h5_frequency, self.h5_amplitude, self.h5_tfp, self.h5_shift)):
                target[pixels, :] = np.array([one[column] for one in self._results]).reshape(len(pixels), -1)

        @staticmethod
        def _map_function(spectrum, *args):
            window, gain = args[0]["window"], args[1]["gain"]
            return [np.gradient(spectrum) * gain, np.abs(spectrum), np.argmax(spectrum) / window, spectrum[window]]

    return ForceHooks


def make_force_mapper(base):
    """As `make_force_finder`, with two results groups, and a test() that has to come before compute()."""

    class ForceMapHooks(make_force_finder(base)):
        scale = None

        def test(self, position=0):
            self.scale = 2.0
            return self.scale * self.h5_main[position]

        def _create_results_datasets(self):
            super()._create_results_datasets()
            self.h5_cpd_grp = self.h5_results_grp.create_group("CPD")
            self.h5_cpd = self.h5_cpd_grp.create_dataset("CPD", (self.h5_main.shape[0], 1), "f8")

        def _get_existing_datasets(self, index=-1):
            super()._get_existing_datasets(index)
            self.h5_cpd = self.h5_results_grp["CPD/CPD"]

        def _write_results_chunk(self):
            super()._write_results_chunk()
            cpd = [one[3] * self.scale for one in self._results]
            self.h5_cpd[self._get_pixels_in_current_batch(), 0] = cpd

    return ForceMapHooks


def make_svd(base):
    """Has a compute of its own, and does the books itself: group, provenance and mask."""

    class SVDHooks(base):
        def __init__(self, h5_main, n_components=2, **kwargs):
            super().__init__(h5_main, "SVD_Hooks", parms_dict={"n_components": n_components}, **kwargs)
            self.n_components = n_components
            self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()
            self.parts = None

        def test(self, override=False):
            if self.duplicate_h5_groups and not override:
                return self.duplicate_h5_groups[-1]
            u, s, v = np.linalg.svd(self.h5_main[()], full_matrices=False)
            self.parts = u[:, : self.n_components], s[: self.n_components], v[: self.n_components]
            return self.parts

        def compute(self, override=False):
            if self.duplicate_h5_groups and not override:
                return self.duplicate_h5_groups[-1]
            if self.parts is None:
                self.test(override=True)
            self._write_results_chunk()
            return self.h5_results_grp

        def _write_results_chunk(self):
            self.h5_results_grp = new_group(self)
            self._write_source_dset_provenance()
            self.h5_results_grp.attrs["last_pixel"] = self.h5_main.shape[0]
            for name, part in zip("USV", self.parts, strict=True):
                self.h5_results_grp[name] = part
            self._h5_status_dset = self.h5_results_grp.create_dataset(
                self._status_dset_name, data=np.ones(self.h5_main.shape[0], np.uint8)
            )
            self.h5_results_grp.file.flush()

    return SVDHooks


def make_cluster(base):
    """Its compute takes something else first than override, and it maps a function that nothing can pickle."""
    parallel_compute = parallel_compute_of(base)

    class ClusterHooks(base):
        def __init__(self, h5_main, n_clusters=2, **kwargs):
            super().__init__(h5_main, "Cluster_Hooks", parms_dict={"n_clusters": n_clusters}, **kwargs)
            self.n_clusters = n_clusters
            self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()

        def test(self, rearrange_clusters=True, override=False):
            centres = self.h5_main[: self.n_clusters].astype("f8")
            file = self.h5_main.file

            def label(spectrum):
                assert file  # an open file in a closure
                return int(np.argmin(np.sum((centres - spectrum) ** 2, axis=1)))

            labels = np.array(parallel_compute(self.h5_main[()], label, cores=1), np.uint32)
            return labels[::-1] if rearrange_clusters else labels

        def compute(self, rearrange_clusters=True, override=False):
            if self.duplicate_h5_groups and not override:
                self.h5_results_grp = self.duplicate_h5_groups[-1]
                return self.h5_results_grp
            self._results = self.test(rearrange_clusters, override)
            self._write_results_chunk()
            return self.h5_results_grp

        def _write_results_chunk(self):
            self.h5_results_grp = new_group(self)
            self._write_source_dset_provenance()
            self.h5_results_grp["Labels"] = self._results[:, None]
            self.h5_results_grp[self._status_dset_name] = np.ones(self.h5_main.shape[0], np.uint8)

    return ClusterHooks


def make_adaptive(base):
    """Its hooks have optional positional parameters, which the base must leave alone."""
    parallel_compute = parallel_compute_of(base)

    class AdaptiveHooks(make_mean(base)):
        def __init__(self, h5_main, **kwargs):
            super().__init__(h5_main, "Adaptive_Hooks", **kwargs)
            self.parms_dict = {"cores": self._cores}
            self.duplicate_h5_groups, self.partial_h5_groups = self._check_for_duplicates()

        def _unit_computation(self, pos_in_batch=None, *args, **kwargs):
            assert pos_in_batch is None
            rows = self.data if pos_in_batch is None else self.data[pos_in_batch : pos_in_batch + 1]
            self._results = parallel_compute(rows, mean_of, cores=self._cores)

        def _write_results_chunk(self, pos_in_batch=None):
            assert pos_in_batch is None
            super()._write_results_chunk()

    return AdaptiveHooks


NUMPY_NAMES = {
    "product": np.prod,
    "cumproduct": np.cumprod,
    "object": object,
    "float": float,
    "int": int,
    "bool": bool,
    "complex": complex,
    "float_": np.float64,
    "complex_": np.complex128,
}
"""Names that NumPy 2 dropped and pyUSID 0.0.12 uses: set for a test with ``monkeypatch.setitem(vars(numpy), …)``."""


def contents(group):
    """Return the values of all datasets of a group."""
    found = {}
    group.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def assert_same_contents(one, other, *, masks=True):
    """Compare what `contents` gave, names, dtypes and bits; a mask has to be full."""
    assert set(one) == set(other)
    for name, values in one.items():
        assert values.dtype == other[name].dtype, name
        assert values.shape == other[name].shape, name
        assert values.tobytes() == other[name].tobytes(), name
        if masks and name.rpartition("/")[2].startswith("completed"):
            assert values.all(), name


class Stop(KeyboardInterrupt):
    """What `stop_before_batch` raises: as Ctrl-C would."""


def stop_before_batch(process, number, hook="_write_results_chunk", error=Stop):
    """Let a hook of this one object raise instead of doing its work, at its call of this number (from 0)."""
    own, calls = getattr(process, hook), []

    def hooked(*args, **kwargs):
        if len(calls) == number:
            raise error(f"{hook} {number}")
        calls.append(hook)
        return own(*args, **kwargs)

    setattr(process, hook, hooked)
