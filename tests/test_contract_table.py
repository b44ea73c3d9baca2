"""One class for each row of published subclasses: the same body on pyUSID's Process and on lazyproc's, bit for bit."""

from __future__ import annotations

import contextlib
import warnings

import h5py
import hook_classes
import numpy as np
import pytest
from hook_classes import NUMPY_NAMES, Stop, assert_same_contents, contents, stop_before_batch
from usid_files import make_usid_file

import lazyproc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    old_process = pytest.importorskip("pyUSID.processing.process")

BASES = {"old": old_process.Process, "new": lazyproc.Process}


@pytest.fixture(autouse=True)
def numpy_names(monkeypatch):
    for name, value in NUMPY_NAMES.items():
        if name not in vars(np):
            monkeypatch.setitem(vars(np), name, value)


class Row:
    """What is the same for all rows; a subclass names its factory and says how it is driven.

    `phases` are called with the process, each followed by compute(); `batch` positions are read at a time.
    """

    make = staticmethod(hook_classes.make_mean)
    phases = (lambda process: None,)
    options: dict = {}
    batch = 7
    dtype = "f4"
    resumes = True

    def new(self, base, main, **options):
        process = self.make(BASES[base])(main, cores=1, **{**self.options, **options})
        # The fitters divide this before each phase, the others use it as it is.
        process._raw_pos_per_read = process._max_pos_per_read = self.batch
        return process

    def compute(self, process, phases=None, stop=None):
        """Go through the phases; the last of them may be stopped before a batch is written."""
        with warnings.catch_warnings():
            if not isinstance(process, lazyproc.Process):
                warnings.simplefilter("ignore")
            for phase in phases or self.phases:
                phase(process)
                if stop is not None and phase is (phases or self.phases)[-1]:
                    stop_before_batch(process, stop)
                process.compute()
        return process.h5_results_grp

    @contextlib.contextmanager
    def files(self, folder, elsewhere):
        """Open a new source, and the options for a target in this or another file."""
        folder.mkdir()
        path, name = make_usid_file(folder / "source.h5", dtype=self.dtype)
        with h5py.File(path, "r+") as source:
            for ancillary in ("Position_Indices", "Position_Values"):  # pyUSID copies ASCII only into another file
                source[name].parent[ancillary].attrs["units"] = np.array([b"nm", b"um"])
            if elsewhere:
                with h5py.File(folder / "target.h5", "w") as target:
                    yield source[name], {"h5_target_group": target.create_group("Here")}
            else:
                yield source[name], {}

    def reference(self, folder, elsewhere=False):
        with self.files(folder / "old", elsewhere) as (main, options):
            group = self.compute(self.new("old", main, **options))
            return contents(group), group.name

    @pytest.mark.parametrize("elsewhere", [False, True], ids=["same_file", "other_file"])
    def test_fresh_results_are_those_of_pyusid(self, tmp_path, elsewhere):
        expected, name = self.reference(tmp_path, elsewhere)
        with self.files(tmp_path / "new", elsewhere) as (main, options):
            group = self.compute(self.new("new", main, **options))
            assert_same_contents(contents(group), expected)
            assert group.name == name

    @pytest.mark.parametrize("elsewhere", [False, True], ids=["same_file", "other_file"])
    def test_resumed_results_are_those_of_pyusid(self, tmp_path, elsewhere):
        if not self.resumes:
            return self.check_without_resuming(tmp_path, elsewhere)
        expected, name = self.reference(tmp_path, elsewhere)
        for number in range(len(self.phases)):
            with self.files(tmp_path / f"new{number}", elsewhere) as (main, options):
                first = self.new("new", main, **options)
                with pytest.raises(Stop):
                    self.compute(first, self.phases[: number + 1], stop=1)
                mask = first.h5_results_grp[first._status_dset_name][()]
                assert 0 < mask.sum() < len(mask)
                if number:  # a finished phase is found, not computed again
                    assert all(one.all() for key, one in contents(first.h5_results_grp).items() if "guess_pos" in key)
                group = self.compute(self.new("new", main, **options))
                assert_same_contents(contents(group), expected)
                assert group.name == name
        return None

    def check_without_resuming(self, tmp_path, elsewhere):
        """A class that cannot find its results again computes afresh; what an interrupted run left stays as it is."""
        expected, _ = self.reference(tmp_path, elsewhere)
        with self.files(tmp_path / "new", elsewhere) as (main, options):
            first = self.new("new", main, **options)
            with pytest.raises(Stop):
                self.compute(first, stop=1)
            before = contents(first.h5_results_grp)
            group = self.compute(self.new("new", main, **options))
            assert_same_contents(contents(group), expected)
            assert group != first.h5_results_grp
            assert_same_contents(contents(first.h5_results_grp), before, masks=False)

    def test_a_second_object_is_handed_the_finished_results(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, options):
            group = self.compute(self.new("new", main, **options))
            siblings = set(main.parent)
            again = self.new("new", main, **options)
            for hook in ("_create_results_datasets", "_write_results_chunk"):
                stop_before_batch(again, 0, hook)
            assert self.compute(again) == group
            assert set(main.parent) == siblings

    def test_pyusid_takes_the_results_for_finished(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, options):
            group = self.compute(self.new("new", main, **options))
            assert self.compute(self.new("old", main, **options)) == group

    def test_results_of_pyusid_are_taken_for_finished(self, tmp_path):
        with self.files(tmp_path / "old", False) as (main, options):
            group = self.compute(self.new("old", main, **options))
            assert self.compute(self.new("new", main, **options)) == group

    @pytest.mark.parametrize("stop", [1, 2])
    def test_partial_results_of_pyusid_are_resumed(self, tmp_path, stop):
        if not self.resumes:
            return
        expected, name = self.reference(tmp_path)
        with self.files(tmp_path / "half", False) as (main, options):
            with pytest.raises(Stop):
                self.compute(self.new("old", main, **options), stop=stop)
            group = self.compute(self.new("new", main, **options))
            assert_same_contents(contents(group), expected)
            assert group.name == name


class TestMean(Row):
    """NoMapFunc, AvgSpecUltraBasic…, TempProc."""

    @pytest.mark.parametrize("base", BASES)
    def test_a_missing_function_leaves_compute(self, tmp_path, base):
        with self.files(tmp_path / "new", False) as (main, _):
            process = hook_classes.make_no_map(BASES[base])(main, cores=1)
            with pytest.raises(NotImplementedError):
                process.compute()

    def test_test_is_the_class_own(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, _):
            assert self.new("new", main).test(3) == self.new("old", main).test(3)


class TestSimpleProcess(Row):
    """SimpleProcess: an `_unit_computation` that takes nothing at all."""

    make = staticmethod(hook_classes.make_filter)
    resumes = False


class TestPeakFinder(Row):
    """PeakFinder of the notebook, with pyUSID's own writers."""

    make = staticmethod(hook_classes.make_peak_finder)
    resumes = False


class TestSignalFilter(Row):
    """SignalFilter."""

    make = staticmethod(hook_classes.make_signal_filter)

    def test_its_parameters_decide(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, _):
            one = self.compute(self.new("new", main))
            other = self.compute(self.new("new", main, cutoff=3))
            assert one != other
            assert self.new("new", main, cutoff=3).duplicate_h5_groups == [other]


class TestBayesian(Row):
    """GIVBayesian."""

    make = staticmethod(hook_classes.make_bayesian)

    def test_its_own_sizes_hold(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, _):
            assert self.make(lazyproc.Process)(main)._max_pos_per_read == 9


class TestFitter(Row):
    """Fitter and BESHOfitter: two phases, reshaped reads, compound results."""

    make = staticmethod(hook_classes.make_fitter)
    phases = (lambda process: process.set_up_guess(), lambda process: process.set_up_fit())
    batch = 7 * 1.5

    def test_another_fit_on_the_same_guess(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, _):
            process = self.new("new", main)
            group = self.compute(process)
            guess = contents(group)["Guess"]
            process.set_up_fit()
            process.h5_fit[...] = 0
            assert process.do_fit(override=True).parent == group
            assert contents(group)["Fit"]["Amplitude"].all()
            assert contents(group)["Guess"].tobytes() == guess.tobytes()

    def test_another_guess_is_another_group(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, _):
            process = self.new("new", main)
            group = self.compute(process)
            process.set_up_guess()
            process.do_guess(override=True)
            assert process.h5_results_grp != group
            assert "Fit" not in process.h5_results_grp
            other = self.new("new", main)
            other.set_up_guess(power=2.0)
            other.compute()
            assert len({group, process.h5_results_grp, other.h5_results_grp}) == 3

    def test_guess_and_fit_may_be_two_objects(self, tmp_path):
        expected, _ = self.reference(tmp_path)
        with self.files(tmp_path / "new", False) as (main, _):
            self.compute(self.new("new", main), self.phases[:1])
            fit = self.new("new", main)
            fit.set_up_fit()
            fit.compute()
            assert_same_contents(contents(fit.h5_results_grp), expected)


class TestLoopFitter(Row):
    """BELoopFitter: self.data a tuple, h5_main exchanged, `_write_results_chunk` None between the phases."""

    make = staticmethod(hook_classes.make_loop_fitter)
    phases = TestFitter.phases
    batch = TestFitter.batch
    dtype = np.dtype([("Amplitude", "f4"), ("Phase", "f4")])


class TestForceFinder(Row):
    """FFtrEFM: finds its group itself, while the base is being constructed."""

    make = staticmethod(hook_classes.make_force_finder)

    def test_the_constructor_keeps_the_group_that_was_found(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, _):
            first = self.new("new", main)
            assert first.h5_results_grp is None
            with pytest.raises(Stop):
                self.compute(first, stop=1)
            again = self.new("new", main)
            assert again.h5_results_grp == first.h5_results_grp
            assert again.partial_h5_groups == []


class TestForceMapper(TestForceFinder):
    """GKPFM: two groups, and test() before compute()."""

    make = staticmethod(hook_classes.make_force_mapper)
    phases = (lambda process: process.test(),)


class TestSVD(Row):
    """SVD of ffta and pycroscopy: does without the base's compute."""

    make = staticmethod(hook_classes.make_svd)
    resumes = False

    def check_without_resuming(self, tmp_path, elsewhere):
        with self.files(tmp_path / "new", elsewhere) as (main, options):
            process = self.new("new", main, **options)
            group = process.compute()
            assert ("source_dataset_path" in group.attrs) == elsewhere
            assert process._h5_status_dset.parent == group
            assert self.new("new", main, **options).compute() == group
            assert self.new("new", main, n_components=1, **options).compute() != group

    def test_a_second_object_is_handed_the_finished_results(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, _):
            group = self.new("new", main).compute()
            again = self.new("new", main)
            assert again.duplicate_h5_groups == [group] == [again.compute()]

    def test_pyusid_takes_the_results_for_finished(self, tmp_path):
        with self.files(tmp_path / "new", False) as (main, _):
            group = self.new("new", main).compute()
            assert self.new("old", main).compute() == group

    def test_results_of_pyusid_are_taken_for_finished(self, tmp_path):
        with self.files(tmp_path / "old", False) as (main, _):
            group = self.new("old", main).compute()
            assert self.new("new", main).compute() == group


class TestCluster(TestSVD):
    """Cluster, Decomposition: compute's first argument is something else, and nothing can pickle the function."""

    make = staticmethod(hook_classes.make_cluster)

    def check_without_resuming(self, tmp_path, elsewhere):
        with self.files(tmp_path / "new", elsewhere) as (main, options):
            straight = self.new("new", main, **options).compute(False)
            turned = self.new("new", main, **options).compute(True, override=True)
            np.testing.assert_array_equal(straight["Labels"][()][::-1], turned["Labels"][()])


class TestAdaptive(Row):
    """AdaptiveBayesianInference, KPFMBayesianInference: optional positional parameters of the hooks stay unused."""

    make = staticmethod(hook_classes.make_adaptive)
