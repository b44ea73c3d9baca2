"""The contract towards old subclasses, clause by clause; then what is safe by order, and the defects not inherited."""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from hook_classes import (
    NUMPY_NAMES,
    Stop,
    assert_same_contents,
    contents,
    make_filter,
    make_fitter,
    make_mean,
    mean_of,
    new_group,
    stop_before_batch,
)
from usid_files import make_4d_file, make_sparse_file, make_usid_file, write_main

import lazyproc
from lazyproc import Process
from lazyproc.core.errors import ResultsError, WorkerError
from lazyproc.demo.simulate import simulate_scan
from lazyproc.status import file_status

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    old_process = pytest.importorskip("pyUSID.processing.process")
    from pyUSID import USIDataset
    from pyUSID.io import hdf_utils

OldProcess = old_process.Process
Mean = make_mean(Process)
HOOKS = (
    "_set_memory_and_cores",
    "_get_existing_datasets",
    "_check_for_duplicates",
    "_create_results_datasets",
    "_write_source_dset_provenance",
    "_read_data_chunk",
    "_unit_computation",
    "_write_results_chunk",
)
MASK = "completed_positions"
quiet_cluster = pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")


@pytest.fixture
def numpy_names(monkeypatch):
    for name, value in NUMPY_NAMES.items():
        if name not in vars(np):
            monkeypatch.setitem(vars(np), name, value)


@pytest.fixture
def main(tmp_path):
    """A main dataset of 20 positions and 6 values, in a file open for reading and writing."""
    path, name = make_usid_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        yield file[name]


def made(cls, main, batch=6, **options):
    process = cls(main, **{"cores": 1, **options})
    process._max_pos_per_read = batch
    return process


def expected_means(main, *args):
    return np.array([mean_of(row, *args) for row in main[()]], "f4")[:, None]


def logged(base, body=make_mean):
    """Return the class made by a factory, with a list in which each call of a hook leaves the hook's name."""
    cls = body(base)
    calls = []

    def leaving(name):
        def hook(self, *args, **kwargs):
            calls.append(name)
            return getattr(cls, name)(self, *args, **kwargs)

        return hook

    return type(cls.__name__, (cls,), {name: leaving(name) for name in HOOKS}), calls


def run_old(cls, main, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = made(cls, main, **options)
        process.compute()
    return process


# ---- clause 1: the constructor


def test_clause_01_same_parameters_in_the_same_order():
    old, new = (list(inspect.signature(base).parameters.values()) for base in (OldProcess, Process))
    assert [one.name for one in new[: len(old)]] == [one.name for one in old]
    assert [one.default for one in new[2 : len(old)]] == [one.default for one in old[2:]]
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in new[len(old) :])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"process_name": 5}, TypeError),
        ({"parms_dict": "nothing"}, TypeError),
        ({"parms_dict": [1]}, TypeError),
        ({"h5_target_group": 4}, TypeError),
        ({"h5_target_group": "dataset"}, TypeError),
        ({"max_mem_mb": 2500.5}, TypeError),
        ({"max_mem_mb": "1"}, TypeError),
        ({"cores": 3.5}, TypeError),
        ({"cores": "2"}, TypeError),
        ({"mem_multiplier": "2"}, TypeError),
        ({"mem_multiplier": 0.5}, ValueError),
    ],
)
def test_clause_01_wrong_arguments_raise_what_pyusid_raises(main, options, error):
    if options.get("h5_target_group") == "dataset":
        options = {"h5_target_group": main}
    for base in (OldProcess, Process):
        with warnings.catch_warnings():
            if base is OldProcess:
                warnings.simplefilter("ignore")
            with pytest.raises(error):
                make_mean(base)(main, **options)


@pytest.mark.parametrize("base", [OldProcess, Process])
def test_clause_01_what_is_no_main_dataset_is_a_value_error(main, base):
    with pytest.raises(ValueError, match=r"Main|Position"):
        make_mean(base)(main.parent["Position_Indices"])


@pytest.mark.parametrize("base", [OldProcess, Process])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_clause_01_a_read_only_file_is_an_os_error(tmp_path, base, elsewhere):
    path, name = make_usid_file(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "out.h5", "w"):
        pass
    with h5py.File(path, "r+" if elsewhere else "r") as file, h5py.File(tmp_path / "out.h5", "r") as out:
        options = {"h5_target_group": out} if elsewhere else {}
        with pytest.raises(OSError, match=r"read-only|reading only"):
            make_mean(base)(file[name], **options)


def test_clause_01_the_base_itself_constructs_and_its_hooks_are_to_be_written(main):
    process = Process(main)
    hooks = ("_create_results_datasets", "_get_existing_datasets", "_write_results_chunk", "_map_function", "test")
    for name in hooks:
        with pytest.raises(NotImplementedError):
            getattr(process, name)()
    with pytest.raises(NotImplementedError):
        process.compute()
    with pytest.raises(ValueError, match="partial"):
        process.use_partial_computation()
    assert process.duplicate_h5_groups == process.partial_h5_groups == []


def test_clause_01_attributes_have_their_old_values(main):
    process = Mean(main, parms_dict={"a": 1}, verbose=False)
    assert process.h5_main == main
    assert process.h5_results_grp is None
    assert process.parms_dict == {"a": 1}
    assert process.process_name == "Mean_Hooks"
    assert process._status_dset_name == MASK
    assert process._h5_target_group == main.parent
    assert (process.mpi_comm, process.mpi_rank, process.mpi_size) == (None, 0, 1)
    assert process._results is None
    assert process.data is None
    assert process.verbose is False


def test_clause_01_integers_serve_as_multiplier(main):
    assert Mean(main, mem_multiplier=2)._max_pos_per_read == Mean(main, mem_multiplier=2.0)._max_pos_per_read


# ---- clause 2: what the constructor calls


def test_clause_02_the_constructor_calls_virtual_methods_in_the_old_order(main):
    seen = []

    class Watching(Mean):
        def _set_memory_and_cores(self, *args, **kwargs):
            seen.append(("sizes", args, sorted(kwargs)))
            super()._set_memory_and_cores(*args, **kwargs)

        def _get_existing_datasets(self):
            seen.append(("existing", self.h5_results_grp, self.duplicate_h5_groups))
            raise NameError("not yet")

        def _check_for_duplicates(self):
            seen.append(("duplicates", self.parms_dict))
            return ["finished"], ["partial"]

    process = Watching(main, parms_dict={"a": 1}, cores=1, max_mem_mb=512, mem_multiplier=1.5)
    assert seen == [
        ("sizes", (), ["cores", "man_mem_limit", "mem_multiplier"]),
        ("existing", None, []),
        ("duplicates", {"a": 1}),
    ]
    assert (process.duplicate_h5_groups, process.partial_h5_groups) == (["finished"], ["partial"])


@pytest.mark.parametrize("error", [IndexError, AttributeError, TypeError, NotImplementedError, OSError, Exception])
def test_clause_02_errors_of_the_first_call_are_swallowed_and_the_group_is_kept(main, error):
    group = main.parent.create_group("somewhere")

    class Finding(Mean):
        def _get_existing_datasets(self):
            self.h5_results_grp = group
            raise error("there is nothing yet")

    assert Finding(main).h5_results_grp == group


def test_clause_02_keyboard_interrupt_leaves_the_constructor(main):
    class Finding(Mean):
        def _get_existing_datasets(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Finding(main)


def test_clause_02_the_constructor_writes_nothing(tmp_path):
    path, name = make_usid_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        process = made(Mean, file[name])
        stop_before_batch(process, 1)
        with pytest.raises(Stop):
            process.compute()
        process.h5_results_grp.copy(process.h5_results_grp, file[name].parent, "Raw_Data-Mean_Hooks_001")
        del file[name].parent["Raw_Data-Mean_Hooks_001"][MASK]
        file[name].parent["Raw_Data-Mean_Hooks_001"].attrs["last_pixel"] = 4
    before = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    with h5py.File(path, "r+") as file:
        process = Mean(file[name])
        assert len(process.partial_h5_groups) == 2
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == before


# ---- clause 3: looking for earlier results


def test_clause_03_the_search_reads_the_attributes_as_they_are_now(main):
    process = made(Mean, main, parms_dict={"a": 1})
    group = process.compute()
    other = Mean(main, parms_dict={"a": 1})
    assert other._check_for_duplicates() == ([group], [])
    other.parms_dict = {"a": 2}
    assert other._check_for_duplicates() == ([], [])
    for anything in ({}, None):
        other.parms_dict = anything
        assert other._check_for_duplicates() == ([group], [])
    other.process_name = "Another"
    assert other._check_for_duplicates() == ([], [])
    other.process_name = "Mean_Hooks"
    del group[MASK]
    del group.attrs["last_pixel"]
    assert other._check_for_duplicates() == ([], [])
    group["another_mask"] = np.arange(20, dtype=np.uint8) // 19
    other._status_dset_name = "another_mask"
    assert other._check_for_duplicates() == ([], [group])


def test_clause_03_parameters_that_grow_in_the_constructor_are_found_again(main):
    class Growing(Mean):
        def __init__(self, h5_main, b, **kwargs):
            super().__init__(h5_main, parms_dict={"a": 1}, **kwargs)
            self.parms_dict["b"] = b  # and nothing is searched again

    process = made(functools.partial(Growing, b=2), main)
    stop_before_batch(process, 1)
    with pytest.raises(Stop):
        process.compute()
    group = made(functools.partial(Growing, b=2), main).compute()
    assert group == process.h5_results_grp
    assert made(functools.partial(Growing, b=2), main).compute() == group
    assert made(functools.partial(Growing, b=3), main).compute() != group


def test_clause_03_parameters_changed_while_results_are_created(main):
    class Deriving(Mean):
        def _create_results_datasets(self):
            super()._create_results_datasets()
            self.parms_dict["derived"] = 7

    group = made(Deriving, main, parms_dict={"a": 1}).compute()
    assert made(Deriving, main, parms_dict={"a": 1}).compute() == group


def test_clause_03_long_parameters(main):
    parms = {"weights": [float(number) / 3 for number in range(20000)], "none": None}

    class Quiet(Mean):
        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self, {"short": 1})
            self.h5_results = self.h5_results_grp.create_dataset("Results", (20, 1), "f4")

    group = made(Quiet, main, parms_dict=parms).compute()
    assert made(Quiet, main, parms_dict=dict(parms)).compute() == group
    parms["weights"][7] = -1.0
    assert made(Quiet, main, parms_dict=parms).compute() != group


def test_clause_03_parameters_that_cannot_be_compared(main):
    """References to datasets, as ffta keeps them: they construct, compute, and are never the same."""
    parms = {"source": h5py.Dataset(main.id).ref}

    class Quiet(Mean):
        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self, {})
            self.h5_results = self.h5_results_grp.create_dataset("Results", (20, 1), "f4")

    process = made(Quiet, main, parms_dict=parms)
    group = process.compute()
    np.testing.assert_array_equal(group["Results"], expected_means(main))
    assert process.compute() == group
    assert made(Quiet, main, parms_dict=parms).compute() != group


def test_clause_03_the_callers_own_dict_is_kept(main):
    """Old subclasses hand over a dict and go on filling it."""
    parms = {}
    process = Mean(main, parms_dict=parms)
    parms["late"] = 1
    assert process.parms_dict == {"late": 1}


# ---- clause 4: hooks are looked up on the instance


@pytest.mark.parametrize("base", [OldProcess, Process])
def test_clause_04_everything_can_be_exchanged_on_the_instance(main, base):
    cls = make_mean(base)

    class Doubling(cls):
        def __init__(self, h5_main, **kwargs):
            super().__init__(h5_main, **kwargs)
            self.calls = []
            self._unit_computation = super()._unit_computation
            self._map_function = functools.partial(mean_of, power=2)
            create, write, find = (
                self._create_results_datasets,
                self._write_results_chunk,
                self._get_existing_datasets,
            )
            self._create_results_datasets = lambda: (self.calls.append("create"), create())
            self._write_results_chunk = lambda: (self.calls.append("write"), write())
            self._get_existing_datasets = lambda: (self.calls.append("find"), find())
            self._read_data_chunk = functools.partial(cls._read_data_chunk, self)
            self.compute = self.own_compute

        def own_compute(self):
            self.calls.append("compute")
            return super().compute(override=False)

    process = made(Doubling, main, batch=10)
    with warnings.catch_warnings():
        if base is OldProcess:
            warnings.simplefilter("ignore")
        group = process.compute()
    assert process.calls == ["compute", "create", "write", "write"]
    np.testing.assert_array_equal(group["Results"], expected_means(main, 2))


@pytest.mark.parametrize(
    "hook",
    ["compute", "_unit_computation", "_map_function", "_create_results_datasets", "_write_results_chunk"],
)
def test_clause_04_hooks_may_be_none_between_phases(main, hook):
    process = made(Mean, main)
    own = getattr(process, hook)
    setattr(process, hook, None)
    with pytest.raises(TypeError):
        process.compute()
    setattr(process, hook, own)
    np.testing.assert_array_equal(process.compute()["Results"], expected_means(main))


def test_clause_04_the_function_may_be_anything_callable(main):
    class Callable:
        def __call__(self, spectrum):
            return mean_of(spectrum)

    for function in (functools.partial(mean_of, power=1), Callable(), lambda spectrum: mean_of(spectrum), mean_of):
        process = made(Mean, main)
        process._map_function = function
        group = process.compute(override=True)
        np.testing.assert_array_equal(group["Results"], expected_means(main))


def test_clause_04_a_function_of_the_instance(main):
    class Bound(Mean):
        factor = 3

        def _map_function(self, spectrum):
            return self.factor * mean_of(spectrum)

    group = made(Bound, main).compute()
    np.testing.assert_array_equal(group["Results"][:, 0], np.array([3 * mean_of(row) for row in main[()]], "f4"))


# ---- clause 5: the order of calls


def calls_of_compute(base, main, prepare=lambda process: None, body=make_mean):
    cls, calls = logged(base, body)
    with warnings.catch_warnings():
        if base is OldProcess:
            warnings.simplefilter("ignore")
        process = made(cls, main)
        prepare(process)
        calls.clear()
        process.compute()
    return calls, process


@pytest.mark.parametrize("state", ["fresh", "partial", "finished", "legacy"])
def test_clause_05_hooks_are_called_in_the_order_of_pyusid(tmp_path, state):
    seen = {}
    for base in (OldProcess, Process):
        path, name = make_usid_file(tmp_path / f"{base.__module__}.h5")
        with h5py.File(path, "r+") as file:
            if state != "fresh":
                before = made(Mean, file[name])
                if state == "partial":
                    stop_before_batch(before, 2)
                try:
                    before.compute()
                except Stop:
                    assert state == "partial"
                if state == "legacy":
                    del before.h5_results_grp[MASK]
                    before.h5_results_grp.attrs["last_pixel"] = 11
            seen[base], process = calls_of_compute(base, file[name])
            assert process.h5_results_grp.attrs["last_pixel"] == 20
            assert process.h5_results_grp[MASK][()].all()
            np.testing.assert_array_equal(process.h5_results_grp["Results"], expected_means(file[name]))
    assert seen[Process] == seen[OldProcess]
    assert bool(seen[Process]) == (state != "finished")


def test_clause_05_the_mask_is_seeded_from_last_pixel(main):
    process = made(Mean, main)
    group = process.compute()
    del group[MASK]
    group.attrs["last_pixel"] = 13
    group["Results"][...] = -1
    again = made(Mean, main)
    assert again.partial_h5_groups == [group]
    assert again.compute() == group
    assert (group["Results"][:13] == -1).all()
    np.testing.assert_array_equal(group["Results"][13:], expected_means(main)[13:])


@pytest.mark.parametrize("base", [OldProcess, Process])
def test_clause_05_a_hook_may_choose_the_group_itself(main, base):
    """h5_results_grp that is set before compute() is gone on with, mask and all."""
    cls = make_mean(base)
    group = main.parent.create_group("Chosen")
    group.create_dataset("Results", (20, 1), "f4")
    group.attrs["last_pixel"] = 5
    with warnings.catch_warnings():
        if base is OldProcess:
            warnings.simplefilter("ignore")
        process = made(cls, main)
        process.h5_results_grp = group
        assert process.compute() == group
    assert (group["Results"][:5] == 0).all()
    np.testing.assert_array_equal(group["Results"][5:], expected_means(main)[5:])


def test_clause_05_arguments_go_to_each_unit_computation(main):
    class Taking(Mean):
        def _unit_computation(self, *args, **kwargs):
            self.seen.append((args, kwargs))
            super()._unit_computation(*args, **kwargs)

    process = made(Taking, main)
    process.seen = []
    group = process.compute(False, 2)
    assert process.seen == [((2,), {})] * 4
    np.testing.assert_array_equal(group["Results"], expected_means(main, 2))
    process = made(Taking, main)
    process.seen = []
    process.compute(power=3)
    assert process.seen == [((), {"power": 3})] * 4


def test_clause_05_partial_results_are_taken_by_the_virtual_method(main):
    process = made(Mean, main)
    stop_before_batch(process, 1)
    with pytest.raises(Stop):
        process.compute()

    class Choosing(Mean):
        def use_partial_computation(self, h5_partial_group=None):
            self.chosen = h5_partial_group or self.partial_h5_groups[-1]
            super().use_partial_computation(h5_partial_group)

    again = made(Choosing, main)
    again.compute()
    assert again.chosen == process.h5_results_grp == again.h5_results_grp


def test_clause_05_one_of_several_partial_groups_can_be_chosen(main):
    groups = []
    for _ in range(2):
        process = made(Mean, main)
        stop_before_batch(process, 1)
        with pytest.raises(Stop):
            process.compute(override=True)
        groups.append(process.h5_results_grp)
    again = made(Mean, main)
    assert again.partial_h5_groups == groups
    again.use_partial_computation(groups[0])
    assert again.compute() == groups[0]
    assert not groups[1][MASK][()].all()
    with pytest.raises(ValueError, match="partial"):
        made(Mean, main).use_partial_computation(groups[0])


# ---- clause 6 and 7: a batch and its positions


class Checking(Mean):
    """Looks in each hook whether self.data and the positions belong together."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def check(self):
        pixels = self._get_pixels_in_current_batch()
        assert isinstance(pixels, np.ndarray)
        assert pixels.dtype.kind in "iu"
        assert (np.diff(pixels.astype(int)) > 0).all()
        assert len(pixels) <= self._max_pos_per_read
        assert isinstance(self.data, np.ndarray)
        assert self.data.ndim == 2
        assert self.data.dtype == self.h5_main.dtype
        np.testing.assert_array_equal(self.data, self.h5_main[pixels, :])
        return pixels

    def _unit_computation(self, *args, **kwargs):
        self.batches.append(self.check().tolist())
        super()._unit_computation(*args, **kwargs)
        self.check()

    def _write_results_chunk(self):
        self.check()
        self.h5_results[self._get_pixels_in_current_batch(), 0] = np.mean(self.data.astype("f8"), axis=1)
        self.check()


def test_clause_06_data_and_positions_belong_to_the_same_batch_to_the_end_of_the_write(main):
    process = made(Checking, main, batch=6)
    np.testing.assert_array_equal(process.compute()["Results"], expected_means(main))
    assert [len(batch) for batch in process.batches] == [6, 6, 6, 2]


@pytest.mark.parametrize("most", [1, 6, 7.0, 4 / 3, 6.999, np.float64(7.9), np.int32(7), 1e9, float("inf")])
def test_clause_07_batches_are_no_larger_than_asked_for_whatever_number_that_is(main, most):
    process = made(Checking, main, batch=most)
    np.testing.assert_array_equal(process.compute()["Results"], expected_means(main))
    assert len(process.batches[0]) == int(min(most, 20))


def test_clause_07_the_limit_may_change_at_any_time(main):
    class Shrinking(Checking):
        def _write_results_chunk(self):
            super()._write_results_chunk()
            self._max_pos_per_read = self._max_pos_per_read // 1.5

    process = made(Shrinking, main, batch=9.0)
    process.compute()
    assert [len(batch) for batch in process.batches] == [9, 6, 4, 1]


@pytest.mark.parametrize("most", [0, 0.5, -3])
def test_clause_07_no_position_at_all_is_an_error(main, most):
    with pytest.raises(ValueError, match="_max_pos_per_read"):
        made(Mean, main, batch=most).compute()


def test_clause_07_resuming_with_holes(main):
    group = made(Mean, main).compute()
    holes = [0, 3, 4, 5, 11, 17, 19]
    group[MASK][holes] = 0
    group["Results"][...] = -1
    process = made(Checking, main, batch=4)
    assert process.compute() == group
    assert process.batches == [[0, 3, 4, 5], [11, 17, 19]]
    expected = np.full((20, 1), -1, "f4")
    expected[holes] = expected_means(main)[holes]
    np.testing.assert_array_equal(group["Results"], expected)


def test_clause_07_changing_the_positions_in_a_hook_does_not_change_what_is_marked(main):
    class Spoiling(Mean):
        def _write_results_chunk(self):
            super()._write_results_chunk()
            pixels = self._get_pixels_in_current_batch()
            pixels[:] = 0

    group = made(Spoiling, main).compute()
    assert group[MASK][()].all()


# ---- clause 8: what self.data is


def test_clause_08_the_default_leaves_one_result_a_row(main):
    class Reading(Mean):
        def _read_data_chunk(self):
            super()._read_data_chunk()
            if self.data is not None:
                self.data = self.data.reshape(-1, 2)

        def _write_results_chunk(self):
            assert type(self._results) is list
            assert len(self._results) == len(self.data) == 3 * len(self._get_pixels_in_current_batch())
            self._results = np.reshape(self._results, (-1, 3)).sum(axis=1)
            super()._write_results_chunk()

    group = made(Reading, main).compute()
    expected = np.mean(main[()].astype("f8").reshape(20, 3, 2), axis=2).sum(axis=1)
    np.testing.assert_array_equal(group["Results"][:, 0], expected.astype("f4"))


@pytest.mark.parametrize("lazy", [False, True])
def test_clause_08_data_may_be_replaced_by_anything(main, lazy):
    class Tuple(Mean):
        def _read_data_chunk(self):
            super()._read_data_chunk()
            if self.data is not None:
                self.data = [self.data[:, :2], self.data[:, 2:]], ["two", "axes"]

        def _unit_computation(self, *args, **kwargs):
            (first, second), axes = self.data
            assert axes == ["two", "axes"]
            self._results = tuple(np.asarray(part).sum(axis=1) for part in (first, second))

        def _write_results_chunk(self):
            self.h5_results[self._get_pixels_in_current_batch(), 0] = self._results[0] - self._results[1]

    group = made(Tuple, main, lazy=lazy).compute()
    expected = main[:, :2].sum(axis=1) - main[:, 2:].sum(axis=1)
    np.testing.assert_array_equal(group["Results"][:, 0], expected)


@pytest.mark.parametrize("lazy", [False, True])
def test_clause_08_data_overwritten_with_another_dtype(main, lazy):
    class Complex(Mean):
        def _unit_computation(self, *args, **kwargs):
            self.data = np.fft.fft(np.asarray(self.data), axis=1)

        def _write_results_chunk(self):
            assert self.data.dtype.kind == "c"
            self.h5_results[self._get_pixels_in_current_batch(), 0] = self.data[:, 0].real

    group = made(Complex, main, lazy=lazy).compute()
    np.testing.assert_array_equal(group["Results"][:, 0], np.fft.fft(main[()], axis=1)[:, 0].real.astype("f4"))


@pytest.mark.parametrize("storage", [{}, {"chunks": (3, 2)}, {"chunks": (3, 2), "compression": "gzip"}])
@pytest.mark.parametrize("dtype", ["f4", "c8", [("a", "f4"), ("b", "i2")], ">i2"])
def test_clause_08_lazy_data_are_whole_spectra_in_dask(tmp_path, storage, dtype):
    import dask.array

    path, name = make_usid_file(tmp_path / "scan.h5", dtype=dtype, **storage)
    seen = []

    class Looking(Process):
        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self)
            self.h5_copy = self.h5_results_grp.create_dataset("Copy", self.h5_main.shape, self.h5_main.dtype)

        def _unit_computation(self):
            assert isinstance(self.data, dask.array.Array)
            assert self.data.numblocks[1:] == (1,) * (self.data.ndim - 1)
            seen.append(self.data.shape)

        def _write_results_chunk(self):
            self.h5_copy[self._get_pixels_in_current_batch(), :] = self.data

    with h5py.File(path, "r+") as file:
        group = made(Looking, file[name], batch=8, lazy=True).compute()
        assert seen == [(8, 6), (8, 6), (4, 6)]
        assert group["Copy"][()].tobytes() == file[name][()].tobytes()


@pytest.mark.parametrize("chunks", [None, (3, 2)])
def test_clause_08_lazy_arrays_can_be_written_while_handles_are_collected(tmp_path, chunks):
    """h5py holds its lock while it makes an array of what it writes: threads that need it then would wait for ever."""
    import dask.array

    path, name = make_usid_file(tmp_path / "scan.h5", chunks=chunks)
    threads = set()

    def careless(block):
        threads.add(threading.get_ident())
        ring = [file[name]]
        ring.append(ring)
        del ring
        gc.collect()
        return block * 2

    class Writing(make_filter(Process)):
        def _unit_computation(self):
            self.data = dask.array.map_blocks(careless, self.data, dtype=self.data.dtype, meta=self.data)

    with h5py.File(path, "r+") as file:
        group = made(Writing, file[name], lazy=True).compute()
        np.testing.assert_array_equal(group["Filtered_Data"], file[name][()] * 2)
    assert threads == {threading.get_ident()}


@quiet_cluster
def test_clause_08_lazy_data_are_computed_on_a_cluster_if_there_is_one(tmp_path):
    from distributed import Client

    class There(Mean):
        def _unit_computation(self):
            pids = self.data.map_blocks(lambda block: np.full((len(block), 1), os.getpid()), chunks=(-1, 1), dtype=int)
            self.pids |= set(pids.compute().ravel().tolist())
            self._results = self.data.astype("f8").mean(axis=1)

    path, name = make_usid_file(tmp_path / "scan.h5", chunks=(5, 6))
    with (
        Client(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"),
        h5py.File(path, "r+") as file,
    ):
        process = made(There, file[name], lazy=True)
        process.pids = set()
        np.testing.assert_array_equal(process.compute()["Results"], expected_means(file[name]))
        assert process.pids
        assert os.getpid() not in process.pids


def test_clause_08_unchanged_classes_give_the_same_when_lazy(tmp_path, monkeypatch):
    import dask.array

    spoken = []
    own = lazyproc.hooks.contract.parallel_compute
    monkeypatch.setattr(
        lazyproc.hooks.contract, "parallel_compute", lambda data, *a, **k: (spoken.append(data), own(data, *a, **k))[1]
    )
    for make, key, storage in ((make_mean, "Results", {}), (make_filter, "Filtered_Data", {"chunks": (4, 3)})):
        results = []
        for lazy in (False, True):
            path, name = make_usid_file(tmp_path / f"{key}{lazy}.h5", **storage)
            with h5py.File(path, "r+") as file:
                results.append(made(make(Process), file[name], lazy=lazy).compute()[key][()])
        assert results[0].tobytes() == results[1].tobytes()
    assert {type(data) for data in spoken} == {np.ndarray, dask.array.Array}


@pytest.mark.parametrize("lazy", [False, True])
def test_clause_08_a_lazy_fitter_reshapes(main, lazy):
    process = made(make_fitter(Process), main, lazy=lazy)
    process._raw_pos_per_read = 9
    process.set_up_guess()
    process.compute()
    guess = contents(process.h5_results_grp)["Guess"]
    rows = main[()].reshape(-1, 3)
    np.testing.assert_array_equal(guess["Amplitude"].ravel(), np.abs(rows).max(axis=1))


# ---- clause 9: handles stay as they are


@pytest.mark.parametrize("elsewhere", [False, True])
def test_clause_09_no_handle_is_closed_and_no_file_is_opened_again(tmp_path, elsewhere):
    path, name = make_usid_file(tmp_path / "scan.h5")

    class Watching(Mean):
        def _write_results_chunk(self):
            assert self.opened == opened()
            assert self.h5_results.id.valid
            assert self.kept.id.valid
            super()._write_results_chunk()

    def opened():
        links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sorted(link for link in links if link.endswith(".h5"))

    with h5py.File(path, "r+") as file, h5py.File(tmp_path / "out.h5", "w") as out:
        before = opened()
        kept = file[name].parent["Position_Values"]
        process = made(Watching, file[name], **({"h5_target_group": out} if elsewhere else {}))
        process.kept, process.opened = kept, before
        group = process.compute()
        assert (group.file == out) == elsewhere
        assert opened() == before
        assert file.id.valid
        assert out.id.valid
        assert process.h5_results.id.valid
        assert process.h5_results[0, 0] == mean_of(file[name][0]).astype("f4")
        process.close()
        assert file.id.valid
        assert out.id.valid
        assert kept[0, 0] == kept[0, 0]


# ---- clause 10: several runs of one object


def test_clause_10_another_main_dataset_and_mask_and_other_hooks(main):
    process = made(Mean, main)
    first = process.compute()
    second = write_main(
        main.parent,
        "Other",
        main[()] * 2,
        tuple(main.parent[f"Position_{what}"] for what in ("Indices", "Values")),
        tuple(main.parent[f"Spectroscopic_{what}"] for what in ("Indices", "Values")),
    )
    process.h5_main = second
    process._status_dset_name = "completed_second"
    group_of = first.create_dataset("Second", (20, 1), "f8")
    process._get_existing_datasets = lambda: setattr(process, "h5_results", group_of)
    process._max_pos_per_read = 3.5
    first.attrs["last_pixel"] = 0
    assert process.compute() == first
    np.testing.assert_array_equal(first["Second"][:, 0], [mean_of(row) for row in second[()]])
    assert first["completed_second"][()].all()
    assert first[MASK][()].all()


def test_clause_10_the_second_phase_is_resumed(main):
    def phases(stop=None):
        process = made(Mean, main)
        group = process.compute()
        process._status_dset_name = "completed_second"
        if "Second" not in group:
            group.create_dataset("Second", (20, 1), "f4")
        process._get_existing_datasets = lambda: setattr(process, "h5_results", group["Second"])
        process._map_function = functools.partial(mean_of, power=2)
        if "completed_second" not in group:
            group.attrs["last_pixel"] = 0
        process.duplicate_h5_groups, process.partial_h5_groups = [], []
        if stop:
            stop_before_batch(process, stop)
        process.compute()
        return group

    with pytest.raises(Stop):
        phases(stop=2)
    group = phases()
    np.testing.assert_array_equal(group["Results"], expected_means(main))
    np.testing.assert_array_equal(group["Second"], expected_means(main, 2))


# ---- clause 11: one core is this process


def test_clause_11_one_core_pickles_nothing(main):
    lock, file, here = threading.Lock(), main.file, []

    class Locked(Mean):
        def _map_function(self, spectrum):
            with lock:
                assert file
                here.append(os.getpid())
                return mean_of(spectrum)

    group = made(Locked, main, cores=1).compute()
    np.testing.assert_array_equal(group["Results"], expected_means(main))
    assert here == [os.getpid()] * 20


@quiet_cluster
def test_clause_11_one_core_stays_here_beside_an_active_client(main):
    from distributed import Client

    lock = threading.Lock()
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0"):
        process = made(Mean, main, cores=1)
        process._map_function = lambda spectrum: (lock.acquire(), lock.release(), mean_of(spectrum))[2]
        np.testing.assert_array_equal(process.compute()["Results"], expected_means(main))


@pytest.mark.skipif(lazyproc.engine.limits.available_cores() < 2, reason="needs two cores")
def test_clause_11_several_cores_name_what_cannot_be_pickled_and_the_remedy(tmp_path):
    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=10, n_cols=10)
    with h5py.File(path, "r+") as file:

        class Bound(Mean):
            def _map_function(self, spectrum):
                return mean_of(spectrum)

        process = made(Bound, file[name], batch=100, cores=2)
        with pytest.raises(WorkerError, match=r"_map_function.*cores=1.*static method"):
            process.compute()
        assert not process.h5_results_grp[MASK][()].any()


@pytest.mark.skipif(lazyproc.engine.limits.available_cores() < 2, reason="needs two cores")
def test_clause_11_several_cores_give_the_same_bits(tmp_path):
    results = []
    for cores in (1, 2):
        path, name = make_usid_file(tmp_path / f"{cores}.h5", n_rows=20, n_cols=20, n_spectral=50)
        with h5py.File(path, "r+") as file:
            results.append(made(Mean, file[name], batch=150, cores=cores).compute(False, 3)["Results"][()])
    assert results[0].tobytes() == results[1].tobytes()


# ---- clause 12: failures leave compute(), finished batches stay marked


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("hook", ["_read_data_chunk", "_unit_computation", "_write_results_chunk", "_map_function"])
def test_clause_12_what_a_hook_raises_leaves_compute_with_finished_batches_marked(main, hook, error):
    process = made(Mean, main)
    stop_before_batch(process, 14 if hook == "_map_function" else 2, hook, error)
    with pytest.raises(error, match=hook):
        process.compute()
    group = process.h5_results_grp
    assert group[MASK][()].tolist() == [1] * 12 + [0] * 8
    np.testing.assert_array_equal(group["Results"][:12], expected_means(main)[:12])
    again = made(Mean, main)
    assert again.partial_h5_groups == [group]
    assert again.compute() == group
    np.testing.assert_array_equal(group["Results"], expected_means(main))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "hook", ["_create_results_datasets", "_get_existing_datasets", "_write_source_dset_provenance"]
)
def test_clause_12_hooks_before_the_loop_leave_compute_too(main, hook, error):
    if hook == "_get_existing_datasets":
        first = made(Mean, main)
        stop_before_batch(first, 1)
        with pytest.raises(Stop):
            first.compute()
    process = made(Mean, main)
    stop_before_batch(process, 0, hook, error)
    with pytest.raises(error, match=hook):
        process.compute()
    np.testing.assert_array_equal(made(Mean, main).compute()["Results"], expected_means(main))


def test_clause_12_the_same_object_goes_on_after_an_interruption(main):
    process = made(Mean, main)
    own = process._write_results_chunk
    stop_before_batch(process, 1)
    with pytest.raises(Stop):
        process.compute()
    process._write_results_chunk = own
    group = process.h5_results_grp
    process.parms_dict = None
    assert process.compute() == group
    np.testing.assert_array_equal(group["Results"], expected_means(main))


# ---- clause 14 and 15: the main dataset, and methods that subclasses call


@pytest.mark.parametrize("make", [make_usid_file, make_4d_file])
@pytest.mark.parametrize("order", ["XY", "YX"])
def test_clause_14_the_main_dataset_tells_what_a_usid_dataset_told(tmp_path, numpy_names, make, order):
    path, name = make(tmp_path / "scan.h5", order=order, fastest="Y")
    with h5py.File(path, "r+") as file:
        ours = Mean(file[name]).h5_main
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = USIDataset(file[name])
            for handle in ("h5_pos_inds", "h5_pos_vals", "h5_spec_inds", "h5_spec_vals"):
                assert isinstance(getattr(ours, handle), h5py.Dataset)
                assert getattr(ours, handle) == getattr(theirs, handle)
            for what in ("dim_labels", "dim_sizes", "dim_descriptors"):
                for kind in ("pos", "spec"):
                    assert list(getattr(ours, f"{kind}_{what}")) == list(getattr(theirs, f"{kind}_{what}"))
            assert list(ours.n_dim_labels) == list(theirs.n_dim_labels)
            assert list(ours.n_dim_sizes) == list(theirs.n_dim_sizes)
            assert ours.data_descriptor == theirs.data_descriptor
            for label in ours.pos_dim_labels:
                np.testing.assert_array_equal(ours.get_pos_values(label), theirs.get_pos_values(label))
            for label in ours.spec_dim_labels:
                np.testing.assert_array_equal(ours.get_spec_values(label), theirs.get_spec_values(label))
            np.testing.assert_array_equal(ours.get_n_dim_form(), theirs.get_n_dim_form())
            np.testing.assert_array_equal(ours.get_n_dim_form(lazy=True).compute(), theirs.get_n_dim_form())
            wrapped = USIDataset(ours)
            assert wrapped == ours == file[name]
            assert list(wrapped.spec_dim_labels) == list(ours.spec_dim_labels)
        assert isinstance(ours, h5py.Dataset)
        for what in ("shape", "dtype", "parent", "file", "name"):
            assert getattr(ours, what) == getattr(file[name], what)
        assert dict(ours.attrs).keys() == dict(file[name].attrs).keys()
        np.testing.assert_array_equal(ours[[0, 3], :], file[name][[0, 3], :])
        with pytest.raises(KeyError, match="nothing"):
            ours.get_pos_values("nothing")


def test_clause_14_a_sparse_scan_tells_what_it_can(tmp_path):
    path, name = make_sparse_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        ours = Mean(file[name]).h5_main
        assert ours.pos_dim_labels == ["X", "Y"]
        with pytest.raises(ValueError, match=r"."):
            ours.get_n_dim_form()
        group = made(Mean, file[name]).compute()
        np.testing.assert_array_equal(group["Results"], expected_means(file[name]))


def test_clause_14_a_usid_dataset_may_be_given_and_writers_take_the_handles(main, numpy_names, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = Mean(USIDataset(main))
        group = hdf_utils.create_results_group(process.h5_main, "Written")
        copy = hdf_utils.create_empty_dataset(process.h5_main, np.float32, "Copy", h5_group=group)
        assert hdf_utils.check_if_main(copy)
        hdf_utils.write_reduced_anc_dsets(
            group, process.h5_main.h5_spec_inds, process.h5_main.h5_spec_vals, "Bias", basename="Reduced"
        )
        written = hdf_utils.write_main_dataset(
            group,
            main.shape,
            "Results",
            "Q",
            "u",
            None,
            None,
            h5_pos_inds=process.h5_main.h5_pos_inds,
            h5_pos_vals=process.h5_main.h5_pos_vals,
            h5_spec_inds=process.h5_main.h5_spec_inds,
            h5_spec_vals=process.h5_main.h5_spec_vals,
            dtype="f4",
        )
        assert hdf_utils.check_if_main(written)
        assert hdf_utils.get_source_dataset(group) == main


def test_clause_14_lazyproc_does_not_need_pyusid(tmp_path):
    code = """import sys, lazyproc.process, lazyproc.hooks.contract
print([m for m in sys.modules if m in ('pyUSID', 'sidpy')])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_clause_15_the_time_of_a_position(main):
    class Slow(Mean):
        @staticmethod
        def _map_function(spectrum, wait=0.01):
            time.sleep(wait)
            return 1.0

    process = Slow(main)
    assert process._estimate_compute_time_per_pixel() >= 0.01
    assert process._estimate_compute_time_per_pixel(0.02) >= 0.02
    assert process._estimate_compute_time_per_pixel(wait=0.03) >= 0.03
    assert MASK not in main.parent


def test_clause_15_the_provenance_of_results_in_another_file(main, tmp_path):
    process = Mean(main)
    process.h5_results_grp = main.parent.create_group("here")
    process._write_source_dset_provenance()
    assert not dict(process.h5_results_grp.attrs)
    with h5py.File(tmp_path / "out.h5", "w") as out:
        process.h5_results_grp = out.create_group("there")
        process._write_source_dset_provenance()
        assert os.path.samefile(process.h5_results_grp.attrs["source_file_path"], main.file.filename)
        assert process.h5_results_grp.attrs["source_dataset_path"] == main.name


def test_clause_15_sizes_can_be_set_again(main):
    process = Mean(main, cores=1)
    process._set_memory_and_cores(cores=1, man_mem_limit=64, mem_multiplier=1.0)
    one = process._max_pos_per_read
    process._set_memory_and_cores(cores=1, man_mem_limit=64, mem_multiplier=4.0)
    assert 1 <= process._max_pos_per_read < one
    process._set_memory_and_cores(cores=1, man_mem_limit=None)
    assert process._max_pos_per_read > one
    assert process._cores == 1
    assert isinstance(process._max_pos_per_read, int)


# ---- override


def test_override_of_a_finished_process_starts_a_new_group_each_time(main):
    process = made(Mean, main)
    groups = [process.compute(), *(process.compute(override=True) for _ in range(3))]
    assert len({group.name for group in groups}) == 4
    for group in groups:
        np.testing.assert_array_equal(group["Results"], expected_means(main))
    assert made(Mean, main).compute(override=True) not in groups


def test_status_tells_how_far_each_phase_is(main):
    process = made(make_fitter(Process), main)
    process._raw_pos_per_read = 9
    process.set_up_guess()
    process.compute()
    process.set_up_fit()
    stop_before_batch(process, 1)
    with pytest.raises(Stop):
        process.compute()
    main.file.flush()
    fit, guess = file_status(main.file.filename).results
    assert (fit.phase, guess.phase) == ("completed_fit_positions", "completed_guess_positions")
    assert 0 < fit.n_done < 20 == guess.n_done == guess.n_positions == fit.n_positions
    assert fit.problem == guess.problem == ""


def test_override_of_a_later_phase_stays_in_its_group_and_computes_all_of_it(main):
    process = made(make_fitter(Process), main)
    process._raw_pos_per_read = 9
    for prepare in (process.set_up_guess, process.set_up_fit):
        prepare()
        process.compute()
    group, before = process.h5_results_grp, contents(process.h5_results_grp)
    for _ in range(2):
        process.set_up_fit()
        process.h5_fit[...] = 0
        process.compute(override=True)
        assert process.h5_results_grp == group
        assert_same_contents(contents(group), before)
    process.set_up_fit()
    stop_before_batch(process, 1)
    with pytest.raises(Stop):
        process.compute(override=True)
    assert 0 < group["completed_fit_positions"][()].sum() < 20
    assert group["completed_guess_positions"][()].all()
    again = made(make_fitter(Process), main)
    again._raw_pos_per_read = 9
    again.set_up_fit()
    again.compute()
    assert_same_contents(contents(group), before)


# ---- safe by order


@pytest.mark.parametrize("layout", [{}, {"chunks": (5, 1)}, {"chunks": (5, 1), "compression": "gzip"}])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_batch_of_which_nothing_was_written_is_not_marked(main, tmp_path, layout, elsewhere):
    class Forgetful(Mean):
        def _create_results_datasets(self):
            self.h5_results_grp = new_group(self)
            self.h5_results = self.h5_results_grp.create_dataset("Results", (20, 1), "f4", **layout)

        def _write_results_chunk(self):
            sys.stderr.write("all is well\n")
            assert self.h5_results[0, 0] == self.h5_results[0, 0]
            if self._get_pixels_in_current_batch()[0] < self.write_below:
                super()._write_results_chunk()

    with h5py.File(tmp_path / "out.h5", "w") as out:
        for below, marked in ((0, 0), (6, 6)):
            process = made(Forgetful, main, **({"h5_target_group": out} if elsewhere else {}))
            process.write_below = below
            with pytest.raises(ResultsError, match="wrote nothing"):
                process.compute(override=True)
            assert process.h5_results_grp[MASK][()].sum() == marked


def test_the_same_values_written_again_count_as_written(main):
    class Zero(Mean):
        @staticmethod
        def _map_function(spectrum):
            return 0.0

    process = made(Zero, main)
    assert process.compute()[MASK][()].all()
    assert process.compute(override=True)[MASK][()].all()


def test_results_may_go_to_any_open_file(main, tmp_path):
    with h5py.File(tmp_path / "side.h5", "w") as side:

        class Aside(Mean):
            def _create_results_datasets(self):
                self.h5_results_grp = new_group(self)
                self.h5_results = side.create_dataset("Results", (20, 1), "f4")

        assert made(Aside, main).compute()[MASK][()].all()
        np.testing.assert_array_equal(side["Results"], expected_means(main))


def test_results_may_be_in_memory_only(tmp_path, main):
    with h5py.File("nowhere.h5", "w", driver="core", backing_store=False) as out:
        group = made(Mean, main, h5_target_group=out).compute()
        np.testing.assert_array_equal(group["Results"], expected_means(main))
        assert made(Mean, main, h5_target_group=out).compute() == group


def test_the_source_stays_untouched_if_results_go_elsewhere(tmp_path):
    path, name = make_usid_file(tmp_path / "scan.h5")
    before, content = os.stat(path).st_mtime_ns, Path(path).read_bytes()
    with h5py.File(path, "r") as file, h5py.File(tmp_path / "out.h5", "w") as out:
        made(Mean, file[name], h5_target_group=out).compute()
    assert (os.stat(path).st_mtime_ns, Path(path).read_bytes()) == (before, content)
    with h5py.File(path, "r+") as file, h5py.File(tmp_path / "out.h5", "w") as out:
        opened = os.stat(path).st_mtime_ns
        process = made(Mean, file[name], h5_target_group=out)
        stop_before_batch(process, 2)
        with pytest.raises(Stop):
            process.compute()
        assert os.stat(path).st_mtime_ns == opened


class Losing(Mean):
    """Loses a result of the second batch, and would not notice."""

    def _unit_computation(self, *args, **kwargs):
        super()._unit_computation(*args, **kwargs)
        self.lose()

    def lose(self):
        if self._get_pixels_in_current_batch()[0] >= 6:
            self._results.pop()

    def _write_results_chunk(self):
        pixels = self._get_pixels_in_current_batch()
        self.h5_results[pixels[: len(self._results)], 0] = np.array(self._results)


class LosingItsOwn(Losing):
    def _unit_computation(self):
        self._results = [mean_of(row) for row in self.data]
        self.lose()


class One(Losing):
    """One result for all, which h5py would spread over all positions."""

    def lose(self):
        if self._get_pixels_in_current_batch()[0] >= 6:
            self._results = self._results[:1]


@pytest.mark.parametrize("cls", [Losing, LosingItsOwn, One])
def test_a_batch_with_the_wrong_number_of_results_is_not_marked(main, cls):
    process = made(cls, main)
    with pytest.raises(ResultsError, match=r"1 results for 6|5 results for 6"):
        process.compute()
    assert process.h5_results_grp[MASK][()].tolist() == [1] * 6 + [0] * 14


def test_a_write_of_the_wrong_shape_is_not_marked(main):
    class Wrong(Mean):
        def _write_results_chunk(self):
            self.h5_results[self._get_pixels_in_current_batch(), 0] = np.array(self._results)[:-1]

    process = made(Wrong, main)
    with pytest.raises(TypeError):
        process.compute()
    assert not process.h5_results_grp[MASK][()].any()


@pytest.mark.parametrize(
    "results",
    [
        lambda data: [np.mean(data, axis=1), np.std(data, axis=1)],
        lambda data: (np.mean(data, axis=1),),
        lambda data: {"mean": np.mean(data, axis=1)},
        lambda data: np.stack([np.mean(data, axis=1)]),
        lambda data: None,
        lambda data: [],
        lambda data: ["any", 1, "thing"],
        lambda data: [{"all": 1}, {"of": 2}],
    ],
)
def test_what_a_subclass_keeps_in_results_otherwise_is_its_own_business(main, results):
    class Own(Mean):
        def _unit_computation(self):
            self._results = results(self.data)

        def _write_results_chunk(self):
            self.h5_results[self._get_pixels_in_current_batch(), 0] = np.mean(self.data.astype("f8"), axis=1)

    np.testing.assert_array_equal(made(Own, main).compute()["Results"], expected_means(main))


def test_a_batch_without_positions_is_refused(main):
    class Inventing(Mean):
        def _read_data_chunk(self):
            self.data = np.zeros((3, 6))

    with pytest.raises(ResultsError, match="_read_data_chunk"):
        made(Inventing, main).compute()


def test_a_hook_may_run_another_process_on_the_same_file(main):
    class Nested(Mean):
        def _create_results_datasets(self):
            self.inner = made(Mean, self.h5_main, process_name="Inner").compute()
            super()._create_results_datasets()

    process = made(Nested, main)
    group = process.compute()
    np.testing.assert_array_equal(group["Results"], process.inner["Results"])


DRIVER = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import h5py
    from hook_classes import make_mean
    from lazyproc import Process

    class Dying(make_mean(Process)):
        def die(self, at):
            batch = self._get_pixels_in_current_batch()
            if at == {at!r} and batch is not None and batch[0] >= 12:
                os.kill(os.getpid(), signal.SIGKILL)

        def _read_data_chunk(self):
            super()._read_data_chunk()
            self.die("read")

        def _unit_computation(self, *args, **kwargs):
            super()._unit_computation(*args, **kwargs)
            self.die("compute")

        def _write_results_chunk(self):
            pixels = self._get_pixels_in_current_batch()
            half = len(pixels) // 2
            self.h5_results[pixels[:half], 0] = self._results[:half]
            if {at!r} == "half":
                self.h5_results.file.flush()
            self.die("half")
            super()._write_results_chunk()
            self.die("written")

    source = h5py.File({source!r}, "r+")
    options = {{}}
    if {target!r}:
        options["h5_target_group"] = h5py.File({target!r}, "r+")
    process = Dying(source[{name!r}], cores={cores}, **options)
    process._max_pos_per_read = 6
    process.compute()
"""


@pytest.mark.parametrize("at", ["read", "compute", "half", "written"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same_file", "other_file"])
def test_a_killed_driver_loses_no_finished_batch(tmp_path, at, elsewhere):
    source, name = make_usid_file(tmp_path / "scan.h5")
    target = str(tmp_path / "out.h5") if elsewhere else ""
    if elsewhere:
        with h5py.File(target, "w"):
            pass
    script = tmp_path / "driver.py"
    tests = os.path.dirname(__file__)
    script.write_text(
        textwrap.dedent(DRIVER).format(tests=tests, at=at, source=source, target=target, name=name, cores=1)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    with h5py.File(source, "r+") as file, h5py.File(target or tmp_path / "none.h5", "a") as out:
        process = made(Mean, file[name], **({"h5_target_group": out} if elsewhere else {}))
        (group,) = process.partial_h5_groups
        assert (group.file == out) == elsewhere
        assert group[MASK][()].tolist() == [1] * 12 + [0] * 8
        np.testing.assert_array_equal(group["Results"][:12], expected_means(file[name])[:12])
        assert process.compute() == group
        np.testing.assert_array_equal(group["Results"], expected_means(file[name]))
        assert group[MASK][()].all()


def test_a_driver_killed_from_outside_resumes(tmp_path):
    source, name = make_usid_file(tmp_path / "scan.h5", n_rows=20, n_cols=20)
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            sys.path.insert(0, {os.path.dirname(__file__)!r})
            import h5py
            from hook_classes import make_mean, mean_of
            from lazyproc import Process

            class Slow(make_mean(Process)):
                def _unit_computation(self):
                    super()._unit_computation()
                    print(self._get_pixels_in_current_batch()[0], flush=True)
                    time.sleep(0.01)

            process = Slow(h5py.File({source!r}, "r+")[{name!r}], cores=1)
            process._max_pos_per_read = 5
            process.compute()
            """
        )
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as driver:
        for line in driver.stdout:
            if int(line) >= 100:
                driver.kill()
                break
    with h5py.File(source, "r+") as file:
        process = made(Mean, file[name], batch=50)
        (group,) = process.partial_h5_groups
        mask = group[MASK][()].astype(bool)
        assert 100 <= mask.sum() < 400
        expected = expected_means(file[name])
        np.testing.assert_array_equal(group["Results"][mask], expected[mask])
        assert process.compute() == group
        np.testing.assert_array_equal(group["Results"], expected)


# ---- memory


MEMORY = """
    import sys
    sys.path.insert(0, {tests!r})
    import h5py, numpy as np
    from hook_classes import make_mean, mean_of
    import lazyproc
    lazyproc.parallel_compute(np.zeros((100, 4)), mean_of, cores={cores})
    with h5py.File({path!r}, "r+") as file:
        process = make_mean(lazyproc.Process)(file[{name!r}], cores={cores}, max_mem_mb={limit})
        process._map_function = {function}
        process._write_results_chunk = lambda: process.h5_results.__setitem__(
            (process._get_pixels_in_current_batch(), 0), np.reshape(process._results, (len(process._results), -1))[:, 0]
        )
        print("ready", flush=True)
        sys.stdin.readline()
        mask = process.compute(override=True)["completed_positions"][()]
        print("done", int(mask.sum()), mask.size, process._max_pos_per_read, flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 200 MB of long spectra, and one of 38 MB of short ones."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"long": (160, 160, 1024), "short": (500, 600, 16)}
    return {
        kind: (str(folder / kind), simulate_scan(folder / kind, *size, dtype="f8").partition("::")[2])
        for kind, size in sizes.items()
    }


def private_bytes(process):
    """Sum the private memory of a process and all below it."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


@pytest.mark.skipif(not hasattr(psutil.Process(), "memory_full_info"), reason="needs private memory")
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("kind", "limit", "function"),
    [
        ("long", 128, "mean_of"),
        ("short", 32, "lambda spectrum: spectrum[:2].copy()"),
        ("short", 32, "lambda spectrum: (float(spectrum[0]), float(spectrum[1]))"),
    ],
    ids=["long", "short-arrays", "short-tuples"],
)
def test_the_peak_of_private_memory_stays_within_the_limit(tmp_path, large, kind, limit, function, cores):
    path, name = large[kind]
    script, tests = tmp_path / "driver.py", os.path.dirname(__file__)
    script.write_text(
        textwrap.dedent(MEMORY).format(tests=tests, path=path, name=name, cores=cores, limit=limit, function=function)
    )
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        watched = psutil.Process(driver.pid)
        assert driver.stdout.readline() == "ready\n"
        before = peak = private_bytes(watched)
        driver.stdin.write("go\n")
        driver.stdin.flush()
        answers = []
        reader = threading.Thread(target=lambda: answers.append(driver.stdout.readline()))
        reader.start()
        while reader.is_alive():
            peak = max(peak, private_bytes(watched))
            time.sleep(0.01)
    assert driver.returncode == 0
    _, n_done, n_positions, rows = answers[0].split()
    assert int(n_done) == int(n_positions) > int(rows)  # more than one batch: else nothing was shown
    assert peak - before <= limit * 2**20, f"{(peak - before) / 2**20:.0f} MiB"


def test_a_position_that_does_not_fit_is_told_when_the_process_is_made(main):
    with pytest.raises(lazyproc.MemoryLimitError, match="max_mem_mb"):
        Mean(main, max_mem_mb=4)


# ---- defects of the old base that are not inherited


def test_defect_01_results_in_another_file_are_flushed(tmp_path, main):
    with h5py.File(tmp_path / "out.h5", "w") as out:
        seen = []

        class Looking(Mean):
            def _read_data_chunk(self):
                super()._read_data_chunk()
                if self.h5_results_grp is not None and self.data is not None:
                    seen.append(marked(tmp_path / "out.h5"))

        made(Looking, main, h5_target_group=out).compute()
    assert seen == [0, 6, 12, 18]


def marked(path):
    """Read how many positions are marked, as another process would see it."""
    with open(path, "rb") as raw, h5py.File(raw, "r") as file:
        group = file["Raw_Data-Mean_Hooks_000"]
        done = int(group[MASK][()].sum())
        assert (group["Results"][:done] != 0).all()
        return done


def test_defect_02_two_files_share_a_results_file(tmp_path):
    with h5py.File(tmp_path / "out.h5", "w") as out:
        groups = []
        for seed in (1, 2):
            path, name = make_usid_file(tmp_path / f"{seed}.h5", seed=seed)
            with h5py.File(path, "r+") as file:
                groups.append(made(Mean, file[name], h5_target_group=out).compute())
                np.testing.assert_array_equal(groups[-1]["Results"], expected_means(file[name]))
                assert made(Mean, file[name], h5_target_group=out).compute() == groups[-1]
        assert groups[0] != groups[1]


def test_defect_03_names_match_as_a_whole(main):
    square = made(Mean, main, process_name="MeanSquare").compute()
    assert made(Mean, main, process_name="Mean").compute() != square
    assert made(Mean, main, process_name="MeanSquare").compute() == square


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": [1e-9, 2e-9]}, {"a": [3e-9, 4e-9]}),
        ({"a": 1, "b": 2}, {"a": 1}),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, {"a": 1, "b": None}),
        ({"a": 1}, {}),
        ({"a": 1}, None),
        ({}, {"a": 1}),
        ({"a": "1"}, {"a": 1}),
    ],
)
def test_defect_04_other_parameters_are_other_results(main, one, other):
    group = made(Mean, main, parms_dict=one).compute()
    process = made(Mean, main, parms_dict=other)
    if {"b": None}.items() <= (other or {}).items():
        assert process.compute() == process.h5_results_grp
        return
    assert process.duplicate_h5_groups == []
    assert process.compute() != group
    assert made(Mean, main, parms_dict=one).compute() == group


def test_defect_05_arguments_are_part_of_the_work(main):
    process = made(Mean, main)
    one, two = process.compute(power=1), process.compute(power=2)
    assert one != two
    np.testing.assert_array_equal(one["Results"], expected_means(main))
    np.testing.assert_array_equal(two["Results"], expected_means(main, 2))
    assert process.compute(power=2) == two
    for power, group in ((1, one), (2, two)):
        assert made(Mean, main).compute(power=power) == group
    partial = made(Mean, main)
    stop_before_batch(partial, 1)
    with pytest.raises(Stop):
        partial.compute(power=3)
    assert made(Mean, main).compute(power=4) != partial.h5_results_grp
    assert made(Mean, main).compute(power=3) == partial.h5_results_grp


def test_defect_06_changed_data_are_noticed(main):
    group = made(Mean, main).compute()
    main[3, 3] += 1
    process = made(Mean, main)
    assert process.duplicate_h5_groups == []
    again = process.compute()
    assert again != group
    np.testing.assert_array_equal(again["Results"], expected_means(main))


def test_defect_07_looking_does_not_make_partial_results_finished(main):
    process = made(Mean, main)
    stop_before_batch(process, 1)
    with pytest.raises(Stop):
        process.compute()
    for _ in range(2):
        again = made(Mean, main)
        assert again.partial_h5_groups == [process.h5_results_grp]
        assert again.h5_main.shape[0] != process.h5_results_grp.attrs.get("last_pixel", 0)


def test_defect_08_a_hyphen_in_the_name(main):
    group = made(Mean, main, process_name="Peak-Fit").compute()
    assert group.name.endswith("Raw_Data-Peak_Fit_000")
    assert made(Mean, main, process_name="Peak-Fit").compute() == group


def test_defect_10_a_class_that_cannot_resume_computes_afresh(main, caplog):
    cls = make_filter(Process)
    process = made(cls, main)
    stop_before_batch(process, 1)
    with pytest.raises(Stop):
        process.compute()
    with caplog.at_level(logging.WARNING, "lazyproc"):
        again = made(cls, main)
        group = again.compute()
    assert "_get_existing_datasets" in caplog.text
    assert group != process.h5_results_grp
    assert group[MASK][()].all()
    assert again.compute() == group
    chosen = made(cls, main)
    chosen.duplicate_h5_groups = []
    chosen.use_partial_computation(process.h5_results_grp)
    with pytest.raises(NotImplementedError, match="_get_existing_datasets"):
        chosen.compute()
    del process._write_results_chunk
    assert process.compute()[MASK][()].all()


def test_defect_18_a_mask_in_freed_space_starts_with_zeros(main):
    parent = main.parent
    parent["junk"] = np.full(2**16, 255, np.uint8)
    main.file.flush()
    del parent["junk"]

    class Zeroless(Mean):
        def _unit_computation(self):
            raise Stop

    process = made(Zeroless, main)
    with pytest.raises(Stop):
        process.compute()
    assert not process.h5_results_grp[MASK][()].any()


def test_a_reader_that_ends_early_does_not_finish_the_work(main):
    class Early(Mean):
        def _read_data_chunk(self):
            super()._read_data_chunk()
            if self.data is not None and self._get_pixels_in_current_batch()[0] >= 12:
                self.data = None

    group = made(Early, main).compute()
    assert group[MASK][()].tolist() == [1] * 12 + [0] * 8
    assert group.attrs["last_pixel"] == 12
    assert made(Mean, main).compute() == group
    assert group.attrs["last_pixel"] == 20


@pytest.mark.parametrize("name", ["_pixels", "_batches", "_searched", "_rows", "_asked", "_loop", "_mask", "_group"])
def test_private_names_of_a_subclass_are_its_own(main, name):
    class Owning(Mean):
        def _unit_computation(self, *args, **kwargs):
            setattr(self, name, "mine")
            super()._unit_computation(*args, **kwargs)

    np.testing.assert_array_equal(made(Owning, main).compute()["Results"], expected_means(main))
