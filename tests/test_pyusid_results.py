"""Results of the real pyUSID are recognised and resumed, pyUSID recognises ours, and real leftovers do no harm."""

from __future__ import annotations

import logging
import shutil
import warnings

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file, real_file

import lazyproc
from lazyproc.core.errors import FunctionError
from lazyproc.status import file_status

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyUSID = pytest.importorskip("pyUSID")
    hdf_utils = pytest.importorskip("pyUSID.io.hdf_utils")
    old_module = pytest.importorskip("pyUSID.processing.process")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of pyUSID with today's NumPy

N_POSITIONS, BATCH = 80, 10
PARAMETERS = {"power": 2, "limits": [1.0, 2.0], "model": "a"}
DROPPED_BY_NUMPY = {
    "product": np.prod,
    "object": object,
    "float": float,
    "int": int,
    "bool": bool,
    "complex": complex,
    "float_": np.float64,
    "string_": np.bytes_,
    "unicode_": np.str_,
}


@pytest.fixture(autouse=True)
def _names_that_numpy_dropped(monkeypatch):
    for name, meaning in DROPPED_BY_NUMPY.items():
        if name not in np.__dict__:
            monkeypatch.setattr(np, name, meaning, raising=False)
    CALLS.clear()
    FAIL["at"] = None


CALLS: list[float] = []
FAIL: dict[str, float | None] = {"at": None}


class OldMean(old_module.Process):
    """A mean over each spectrum as it is written for pyUSID; stops where it is told to."""

    def __init__(self, h5_main, parms_dict=None, **options):
        self.stop_at = None
        self.storage: dict = {}
        super().__init__(h5_main, "Mean", parms_dict=dict(PARAMETERS, **(parms_dict or {})), cores=1, **options)
        self._max_pos_per_read = BATCH

    def _create_results_datasets(self):
        self.h5_results_grp = hdf_utils.create_results_group(
            self.h5_main, self.process_name, h5_parent_group=self._h5_target_group
        )
        hdf_utils.write_simple_attrs(self.h5_results_grp, self.parms_dict)
        self.h5_value = hdf_utils.write_main_dataset(
            self.h5_results_grp,
            (self.h5_main.shape[0], 1),
            "Value",
            "Mean",
            "nA",
            None,
            pyUSID.Dimension("Mean", "nA", [0]),
            h5_pos_inds=self.h5_main.h5_pos_inds,
            h5_pos_vals=self.h5_main.h5_pos_vals,
            aux_spec_prefix="Mean_Spec_",
            dtype="f8",
            **self.storage,
        )

    def _get_existing_datasets(self):
        self.h5_value = self.h5_results_grp["Value"]

    @staticmethod
    def _map_function(spectrum):
        CALLS.append(float(spectrum[0]))
        return float(np.mean(spectrum))

    def _unit_computation(self, *args, **kwargs):
        if self.stop_at in self._get_pixels_in_current_batch():
            raise RuntimeError("told to stop")
        super()._unit_computation(*args, **kwargs)

    def _write_results_chunk(self):
        self.h5_value[self._get_pixels_in_current_batch(), 0] = self._results


class NewMean(lazyproc.Process):
    """The same as it is declared for lazyproc."""

    process_name = "Mean"
    outputs = {"Value": lazyproc.Output("f8", quantity="Mean", units="nA")}

    @staticmethod
    def _map_function(spectrum):
        CALLS.append(float(spectrum[0]))
        if spectrum[0] == FAIL["at"]:
            raise RuntimeError("told to fail")
        return float(np.mean(spectrum))


class Scan:
    """A small scan, its values, and both kinds of Process on it."""

    def __init__(self, folder, n_positions=N_POSITIONS):
        data = np.arange(n_positions, dtype="f8")[:, None] + np.linspace(0, 1, 4)
        self.path, self.name = make_usid_file(
            folder / "scan.h5", n_rows=n_positions // 10, n_cols=10, n_spectral=4, data=data
        )
        with h5py.File(self.path, "r+") as file:  # pyUSID cannot copy a "µm" to another file
            for what in ("Indices", "Values"):
                file[f"{CHANNEL}/Position_{what}"].attrs["units"] = [b"nm", b"nm"]
        self.means = data.mean(axis=1)

    def old(self, stop_at=None, storage=None, target=None, **options):
        """Compute with pyUSID; return the group's name."""
        with h5py.File(self.path, "r+") as file:
            if target is not None:
                with h5py.File(target, "a") as results:
                    return self._compute_old(OldMean(file[self.name], h5_target_group=results, **options), stop_at, {})
            return self._compute_old(OldMean(file[self.name], **options), stop_at, storage or {})

    def _compute_old(self, process, stop_at, storage):
        process.stop_at, process.storage = stop_at, storage
        if stop_at is None:
            return process.compute().name
        with pytest.raises(RuntimeError, match="told to stop"):
            process.compute()
        return process.h5_results_grp.name

    def new(self, parms_dict=PARAMETERS, **options):
        return NewMean(f"{self.path}::{self.name}", parms_dict=parms_dict, cores=1, **options)

    def values(self, name, path=None):
        with h5py.File(path or self.path, "r") as file:
            return file[name]["Value"][:, 0]


@pytest.fixture
def scan(tmp_path):
    return Scan(tmp_path)


@pytest.mark.parametrize("by", ["path", "handle"])
def test_finished_results_of_pyusid_are_returned(scan, by, caplog):
    name = scan.old()
    CALLS.clear()
    with caplog.at_level(logging.WARNING, "lazyproc"):
        if by == "path":
            with scan.new() as process:
                assert [group.name for group in process.duplicate_h5_groups] == [name]
                assert process.plan().action == "return"
                assert process.compute().name == name
        else:
            with h5py.File(scan.path, "r+") as file:
                assert NewMean(file[scan.name], parms_dict=PARAMETERS).compute().name == name
    assert CALLS == []
    assert caplog.records == []  # nothing is known about the code, so nothing is said
    np.testing.assert_allclose(scan.values(name), scan.means)


STORAGE = {"as pyUSID does": {}, "gzip": {"compression": "gzip"}, "chunked": {"chunks": (16, 1)}}


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize("storage", STORAGE)
def test_partial_results_of_pyusid_are_resumed(scan, by, storage):
    name = scan.old(stop_at=45, storage=STORAGE[storage])
    CALLS.clear()
    if by == "path":
        with scan.new() as process:
            assert process.duplicate_h5_groups == []
            assert [group.name for group in process.partial_h5_groups] == [name]
            assert "40 of 80" in process.why_not_duplicate(name)
            assert process.compute().name == name
    else:
        with h5py.File(scan.path, "r+") as file:
            process = NewMean(file[scan.name], parms_dict=PARAMETERS, cores=1)
            process.use_partial_computation()
            assert process.compute().name == name
    assert sorted(CALLS) == list(range(40, N_POSITIONS))
    np.testing.assert_allclose(scan.values(name), scan.means)
    with h5py.File(scan.path, "r") as file:
        assert file[name]["completed_positions"][()].tolist() == [1] * N_POSITIONS
        assert file[name].attrs["last_pixel"] == N_POSITIONS


def test_holes_in_a_mask_of_pyusid_are_filled(scan):
    name = scan.old()
    holes = [0, 3, 4, 41, 79]
    with h5py.File(scan.path, "r+") as file:
        file[name]["completed_positions"][holes] = 0
        file[name]["Value"][holes] = np.full((len(holes), 1), -1.0)
    CALLS.clear()
    with scan.new() as process:
        assert process.compute().name == name
    assert sorted(CALLS) == holes
    np.testing.assert_allclose(scan.values(name), scan.means)


@pytest.mark.parametrize("stop_at", [None, 45])
@pytest.mark.parametrize("by", ["path", "handle"])
def test_legacy_results_without_a_mask(scan, stop_at, by):
    name = scan.old(stop_at=stop_at)
    with h5py.File(scan.path, "r+") as file:
        del file[name]["completed_positions"]
        assert file[name].attrs["last_pixel"] == (40 if stop_at else N_POSITIONS)
    CALLS.clear()
    if by == "path":
        with scan.new() as process:
            found = process.partial_h5_groups if stop_at else process.duplicate_h5_groups
            assert [group.name for group in found] == [name]
            assert process.compute().name == name
    else:
        with h5py.File(scan.path, "r+") as file:
            assert NewMean(file[scan.name], parms_dict=PARAMETERS, cores=1).compute().name == name
    assert sorted(CALLS) == (list(range(40, N_POSITIONS)) if stop_at else [])
    np.testing.assert_allclose(scan.values(name), scan.means)


@pytest.mark.parametrize("last_pixel", ["many", [1, 2], -5, 10**6])
def test_a_strange_last_pixel_is_no_obstacle(scan, last_pixel):
    name = scan.old(stop_at=45)
    with h5py.File(scan.path, "r+") as file:
        del file[name]["completed_positions"]
        file[name].attrs["last_pixel"] = last_pixel
    with scan.new() as process:
        process.why_not_duplicate(name)
        process.compute()
    assert file_status(scan.path).results[0].group == name


@pytest.mark.parametrize("stop_at", [None, 45])
def test_results_of_pyusid_in_another_file(tmp_path, scan, stop_at):
    target = tmp_path / "results.h5"
    name = scan.old(stop_at=stop_at, target=target)
    with scan.new(h5_target_group=f"{target}::/") as process:
        found = process.partial_h5_groups if stop_at else process.duplicate_h5_groups
        assert [group.name for group in found] == [name]
        assert process.compute().name == name
    np.testing.assert_allclose(scan.values(name, target), scan.means)


def test_a_group_of_pyusid_that_does_not_tell_its_source_file_is_not_taken(tmp_path, scan):
    target = tmp_path / "results.h5"
    name = scan.old(target=target)
    with h5py.File(target, "r+") as file:
        del file[name].attrs["source_file_path"]
        del file[name].attrs["source_dataset_path"]
    with scan.new(h5_target_group=f"{target}::/") as process:
        assert process.duplicate_h5_groups == []
        assert "not known" in process.why_not_duplicate(name)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"power": 2, "limits": [1.0, 2.0]}, "model"),
        (PARAMETERS | {"more": 1}, "more"),
        (PARAMETERS | {"power": 2.5}, "power"),
        (PARAMETERS | {"limits": [1.0, 2.0 + 1e-12]}, "limits"),
        (PARAMETERS | {"limits": [1.0, 2.0, 3.0]}, "limits"),
        (PARAMETERS | {"model": "A"}, "model"),
        ({}, "power"),
    ],
)
def test_parameters_of_pyusid_match_exactly(scan, parameters, name):
    group = scan.old()
    with scan.new(parms_dict=parameters) as process:
        assert process.duplicate_h5_groups == []
        assert f"{name}: " in process.why_not_duplicate(group)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ({"Value": lazyproc.Output("f4")}, ["'Value'", "float64", "float32"]),
        ({"Value": lazyproc.Output("f8", dims=[lazyproc.Dimension("D", "", 2)])}, ["'Value'", "(80, 1)", "(80, 2)"]),
        ({"Other": lazyproc.Output("f8")}, ["'Other'", "not stored"]),
    ],
)
def test_outputs_of_pyusid_must_be_as_declared(scan, output, words):
    name = scan.old()
    other = type("Other", (NewMean,), {"outputs": output})
    with other(f"{scan.path}::{scan.name}", parms_dict=PARAMETERS) as process:
        assert process.duplicate_h5_groups == []
        assert all(word in process.why_not_duplicate(name) for word in words)


# -- the other way ---------------------------------------------------------------------------------------------------


def test_pyusid_recognises_what_lazyproc_finished(scan):
    with scan.new() as process:
        name = process.compute().name
    CALLS.clear()
    with h5py.File(scan.path, "r+") as file:
        main = pyUSID.USIDataset(file[scan.name])
        assert hdf_utils.check_for_old(main, "Mean", new_parms=PARAMETERS) == [file[name]]
        assert hdf_utils.check_for_old(main, "Mean", new_parms=PARAMETERS | {"power": 3}) == []
        old = OldMean(file[scan.name])
        assert old.duplicate_h5_groups == [file[name]]
        assert old.partial_h5_groups == []
        assert old.compute() == file[name]
    assert CALLS == []


def test_pyusid_resumes_what_lazyproc_began_and_lazyproc_knows_it_then(tmp_path):
    scan = Scan(tmp_path, n_positions=2000)
    FAIL["at"] = 1700
    with scan.new() as process:
        with pytest.raises(FunctionError):
            process.compute()
        (partial,) = process.partial_h5_groups
        name = partial.name
        done = partial["completed_positions"][()] == 1
        assert 0 < done.sum() < 2000
    FAIL["at"] = None
    CALLS.clear()
    with h5py.File(scan.path, "r+") as file:
        old = OldMean(file[scan.name])
        assert old.partial_h5_groups == [file[name]]
        assert old.compute() == file[name]
    assert sorted(CALLS) == np.flatnonzero(~done).tolist()
    np.testing.assert_allclose(scan.values(name), scan.means)
    with scan.new() as process:
        assert process.compute().name == name


def test_a_group_of_pyusid_finished_by_lazyproc_is_recognised_by_pyusid(scan):
    name = scan.old(stop_at=45)
    with scan.new() as process:
        assert process.compute().name == name
    CALLS.clear()
    assert scan.old() == name
    assert CALLS == []


# -- real leftovers --------------------------------------------------------------------------------------------------


class SimpleProcess(lazyproc.Process):
    """Bears the name of the process that left its groups in the file."""

    process_name = "Simple_Process"
    outputs = {"Results": lazyproc.Output("f4", quantity="Mean", units="a.u.")}

    @staticmethod
    def _map_function(spectrum):
        return np.mean(spectrum)


class SimpleFilter(SimpleProcess):
    outputs = {"Filtered_Data": lazyproc.Output("f4", shape_from_main=True)}

    @staticmethod
    def _map_function(spectrum):
        return 2 * spectrum


@pytest.fixture
def leftovers(tmp_path):
    path = tmp_path / "sparse.h5"
    shutil.copyfile(real_file("sparse_sampling.h5"), path)
    return path


MAIN = f"{CHANNEL}/Raw_Data"


def test_the_status_of_real_leftovers_names_what_is_wrong(leftovers):
    status = file_status(str(leftovers))
    with h5py.File(leftovers, "r") as file:
        groups = {f"{MAIN}-Simple_Process_{number:03d}" for number in range(12)}
        assert {one.group for one in status.results} == groups
        for one in status.results:
            assert one.process == "Simple_Process"
            assert one.started.startswith("2019_07_")
            assert one.n_done == 0
            if len(file[one.group]) == 0:
                assert "neither a status mask nor a main dataset" in one.problem
            else:
                assert one.n_positions == 8
    assert status.running is None


@pytest.mark.parametrize("cls", [SimpleProcess, SimpleFilter])
@pytest.mark.parametrize("by", ["path", "handle"])
def test_a_process_of_the_same_name_works_among_real_leftovers(leftovers, cls, by):
    before = leftovers.read_bytes()
    with h5py.File(leftovers, "r") as file:
        data = file[MAIN][()]
    expected = data.mean(axis=1, keepdims=True) if cls is SimpleProcess else 2 * data
    (output,) = cls.outputs

    def check(process):
        name = f"{MAIN}-Simple_Process_000"
        assert f"output {output!r}: not stored" in process.why_not_duplicate(name)
        assert process.duplicate_h5_groups == []
        group = process.compute()
        np.testing.assert_allclose(group[output][()], expected, rtol=1e-6)
        assert group["completed_positions"][()].tolist() == [1] * 8
        assert process.compute().name == group.name
        return group.name

    if by == "path":
        with cls(f"{leftovers}::{MAIN}") as process:
            assert leftovers.read_bytes() == before
            name = check(process)
    else:
        with h5py.File(leftovers, "r+") as file:
            name = check(cls(file[MAIN]))
    # groups with a mask of zeros and datasets of the declared form are begun work, which is resumed
    assert name.startswith(f"{MAIN}-Simple_Process_0")
    with h5py.File(leftovers, "r") as file:
        assert hdf_utils.check_if_main(file[name][output])


def test_parameters_keep_leftovers_away(leftovers):
    with SimpleProcess(f"{leftovers}::{MAIN}", parms_dict={"smoothing": 3}) as process:
        assert process.partial_h5_groups == []
        assert process.compute().name == f"{MAIN}-Simple_Process_012"
