"""Recognising work done: what is the same work, what is not and why, and which partial results are resumed."""

from __future__ import annotations

import functools
import logging
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file

import lazyproc
import lazyproc.hdf5.fingerprint
from lazyproc.core.errors import ArgumentValueError, FunctionError, Interrupted, ParameterError, ResultsError
from lazyproc.core.events import BlockDone
from lazyproc.hdf5.seal import write_seal
from lazyproc.status import file_status

N_ROWS, N_COLS = 40, 50
N_POSITIONS = N_ROWS * N_COLS
FAILING = 1700
"""A position far beyond those that are tried before the results group is created."""
VALUE = lazyproc.Output("f8", units="nA")

BREAK = {"at": -1.0}
"""The function fails on the spectrum that begins with this value. That this has changed is told, and no more."""
CALLS: list[float] = []


class Mean(lazyproc.Process):
    """Fails where it is told to, and counts its calls."""

    process_name = "Mean"
    outputs = {"Value": VALUE}

    @staticmethod
    def _map_function(spectrum, power=1):
        CALLS.append(float(spectrum[0]))
        if spectrum[0] == BREAK["at"]:
            raise RuntimeError("told to fail")
        return float(np.mean(spectrum)) ** power


class MeanWithOtherCode(lazyproc.Process):
    """The same name, outputs and parameters with another function."""

    process_name = "Mean"
    outputs = {"Value": VALUE}

    @staticmethod
    def _map_function(spectrum, power=1):
        return float(np.mean(spectrum)) ** power + 1000


class MeanSquare(Mean):
    process_name = "MeanSquare"

    @staticmethod
    def _map_function(spectrum):
        return float(np.mean(spectrum**2))


class MeanWithDash(Mean):
    process_name = "Mean-of-all"


@pytest.fixture(autouse=True)
def _whole_and_uncounted():
    BREAK["at"] = -1.0
    CALLS.clear()


def numbered(n_positions=N_POSITIONS, n_spectral=4, offset=0.0):
    """Return data whose first column is the position: a function can tell where it is."""
    return np.arange(n_positions, dtype="f8")[:, None] + offset + np.linspace(0, 1, n_spectral)


@pytest.fixture
def scan(tmp_path):
    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=N_ROWS, n_cols=N_COLS, n_spectral=4, data=numbered())
    return f"{path}::{name}"


def file_of(address):
    return address.partition("::")[0]


def means(address):
    with h5py.File(file_of(address), "r") as file:
        return file[address.partition("::")[2]][()].mean(axis=1)


def run(cls, address, *args, compute_kwargs=None, **options):
    """Compute in a Process of its own; return the group's name and the values in it."""
    with cls(address, cores=1, **options) as process:
        group = process.compute(False, *args, **(compute_kwargs or {}))
        return group.name, group["Value"][:, 0]


def stop_half_way(cls, address, at=FAILING, **options):
    """Run until the function raises; return the name of the partial group."""
    BREAK["at"] = at
    with cls(address, cores=1, **options) as process:
        with pytest.raises(FunctionError, match="told to fail"):
            process.compute()
        name = process.partial_h5_groups[-1].name
    BREAK["at"] = -1.0
    CALLS.clear()
    return name


def partial_on_purpose(address, **options):
    """Start a further group whatever there is, and stop it."""
    BREAK["at"] = FAILING
    with Mean(address, cores=1, **options) as process:
        with pytest.raises(FunctionError):
            process.compute(override=True)
        name = process.partial_h5_groups[-1].name
    BREAK["at"] = -1.0
    CALLS.clear()
    return name


# -- finished and partial results ------------------------------------------------------------------------------------


def test_finished_results_are_returned_and_nothing_is_computed(scan):
    name, values = run(Mean, scan)
    np.testing.assert_allclose(values, means(scan))
    CALLS.clear()
    with Mean(scan) as process:
        assert [group.name for group in process.duplicate_h5_groups] == [name]
        assert process.partial_h5_groups == []
        assert process.compute().name == name
        assert "no difference: 2000 of 2000" in process.why_not_duplicate(name)
    assert CALLS == []


def test_partial_results_are_resumed_and_only_what_is_missing_is_computed(scan):
    name = stop_half_way(Mean, scan)
    with h5py.File(file_of(scan), "r") as file:
        mask = file[name]["completed_positions"][()]
        n_done = int(mask.sum())
        assert 0 < n_done < N_POSITIONS
        np.testing.assert_allclose(file[name]["Value"][mask == 1, 0], means(scan)[mask == 1])
    with Mean(scan, cores=1) as process:
        assert process.duplicate_h5_groups == []
        assert [group.name for group in process.partial_h5_groups] == [name]
        plan = process.plan()
        assert (plan.action, plan.group, plan.n_done) == ("resume", name, n_done)
        assert f"{n_done} of 2000" in process.why_not_duplicate(name)
        assert process.compute().name == name
        assert [group.name for group in process.duplicate_h5_groups] == [name]
        assert process.partial_h5_groups == []
        np.testing.assert_allclose(process.h5_results_grp["Value"][:, 0], means(scan))
    assert sorted(CALLS) == np.flatnonzero(mask == 0).tolist()


def test_a_run_stopped_by_ctrl_c_is_resumed(tmp_path, scan):
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time, numpy as np, lazyproc\n"
        "class Slow(lazyproc.Process):\n"
        "    outputs = {'Value': lazyproc.Output('f8')}\n"
        "    @staticmethod\n"
        "    def _map_function(spectrum):\n"
        "        time.sleep(0.004)\n"
        "        return spectrum.mean()\n"
        "group = Slow(sys.argv[1], cores=1, checkpoint_interval=0.1).compute()\n"
        "print(group.name)\n"
    )
    command = [sys.executable, str(script), scan]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not any(one.n_done for one in file_status(file_of(scan)).results):
            assert time.monotonic() < deadline
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=120)
    finally:
        child.kill()
        child.wait()
    assert child.returncode != 0
    assert "stopped early" in errors
    (before,) = file_status(file_of(scan)).results
    assert 0 < before.n_done < N_POSITIONS
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == before.group
    with h5py.File(file_of(scan), "r") as file:
        np.testing.assert_allclose(file[before.group]["Value"][:, 0], means(scan))


def test_the_last_partial_group_is_resumed_or_the_one_that_is_chosen(scan):
    names = [partial_on_purpose(scan) for _ in range(3)]
    assert len(set(names)) == 3
    with Mean(scan, cores=1) as process:
        assert [group.name for group in process.partial_h5_groups] == names
        process.use_partial_computation(process.partial_h5_groups[0])
        assert process.compute().name == names[0]
    with h5py.File(file_of(scan), "r+") as file:
        del file[names[0]]
    with Mean(scan, cores=1) as process:
        process.use_partial_computation()
        assert process.h5_results_grp.name == names[2]
        assert process.compute().name == names[2]
    with h5py.File(file_of(scan), "r+") as file:
        del file[names[2]]
    with Mean(scan, cores=1) as process:
        assert process.compute().name == names[1]


def test_use_partial_computation_refuses_what_is_no_partial_group_of_the_same_work(scan):
    with Mean(scan) as process, pytest.raises(ValueError, match="no partial results"):
        process.use_partial_computation()
    finished, _ = run(Mean, scan)
    other = stop_half_way(Mean, scan, parms_dict={"power": 2})
    mine = partial_on_purpose(scan)
    with Mean(scan) as process:
        file = process.duplicate_h5_groups[0].file
        for wrong in (file[finished], file[other], file[CHANNEL], file, mine, 3, process.h5_main):
            with pytest.raises(ArgumentValueError, match="h5_partial_group") as caught:
                process.use_partial_computation(wrong)
            assert mine in str(caught.value)
        assert process.h5_results_grp is None
        process.use_partial_computation(file[mine])


def test_override_starts_afresh_each_time(scan):
    names = [run(Mean, scan)[0]]
    with Mean(scan, cores=1) as process:
        for _ in range(2):
            group = process.compute(override=True)
            names.append(group.name)
            np.testing.assert_allclose(group["Value"][:, 0], means(scan))
        assert [group.name for group in process.duplicate_h5_groups] == names
        assert process.compute().name == names[-1]
    assert len(set(names)) == 3
    assert [name[-3:] for name in names] == ["000", "001", "002"]


def test_override_leaves_partial_results_alone(scan):
    partial = stop_half_way(Mean, scan)
    with Mean(scan, cores=1) as process:
        group = process.compute(override=True)
        assert group.name != partial
        assert [one.name for one in process.partial_h5_groups] == [partial]
        assert process.compute().name == group.name


def test_a_partial_group_that_was_chosen_goes_before_finished_ones(scan):
    """In what is planned, shown and computed; without a choice the finished one is returned."""
    done, _ = run(Mean, scan)
    with Mean(scan, cores=1) as process:
        partial = [process.compute(override=True).name for _ in range(2)]
    with h5py.File(file_of(scan), "r+") as file:
        for name, n_done in zip(partial, (7, 9), strict=True):
            file[name]["completed_positions"][n_done:] = 0
            file[name]["Value"][n_done:] = -1
    CALLS.clear()
    with Mean(scan, cores=1) as process:
        assert process.plan().group == process.compute().name == done
        process.use_partial_computation(process.partial_h5_groups[0])
        plan = process.plan()
        assert (plan.action, plan.group, plan.n_remaining) == ("resume", partial[0], N_POSITIONS - 7)
        view = process.to_xarray()
        assert not CALLS
        assert sorted(view.Value.values.ravel().tolist()) == pytest.approx(means(scan).tolist())
        assert sorted(CALLS) == list(range(7, N_POSITIONS)), "the others were read from that group"
        CALLS.clear()
        assert process.compute().name == partial[0]
        assert sorted(set(CALLS)) == list(range(7, N_POSITIONS))
        assert process.compute().name == partial[0], "the last finished one"


def test_a_fresh_start_that_is_stopped_says_how_to_go_on(scan):
    run(Mean, scan)
    name = stop_half_way_afresh(Mean, scan)
    with Mean(scan, cores=1) as process:
        process.use_partial_computation()
        assert process.compute().name == name


def stop_half_way_afresh(cls, address):
    def stop(event):
        if isinstance(event, BlockDone):
            os.kill(os.getpid(), signal.SIGINT)

    with cls(address, cores=1, max_mem_mb=64) as process:
        process._progress = stop
        with pytest.raises(Interrupted, match=r"would start afresh: use_partial_computation\(\), and then compute\(\)"):
            process.compute(override=True)
        return process.partial_h5_groups[-1].name


# -- exactly the same work -------------------------------------------------------------------------------------------

PARAMETERS = [
    {},
    {"power": 2},
    {"model": None},
    {"model": "None"},
    {"model": 1},
    {"model": 1.0},
    {"model": True},
    {"model": "1"},
    {"limits": [1e-9, 2e-9]},
    {"limits": [3e-9, 4e-9]},
    {"limits": [1e-9, 2e-9], "model": None},
    {"nested": {"low": None, "high": [1, {"deep": (2, "three")}]}},
    {"nested": {"low": None, "high": [1, {"deep": (2, "four")}]}},
    {"array": np.arange(12.0).reshape(3, 4)},
    {"array": np.arange(12.0).reshape(4, 3)},
    {"array": np.arange(12.0)},
    {"empty": []},
    {"empty": ""},
    {"text": "größer ≥ 3 µm"},
    {"large": np.arange(12_500.0)},
    {"large": np.arange(12_500.0) + np.eye(1, 12_500, 12_499)[0] * 1e-12},
    {"large": "x" * 100_000},
    {"nan": float("nan"), "infinite": float("-inf")},
    {"complex": 1 + 2j, "bytes": b"\x00\xff"},
]


@pytest.fixture(scope="module")
def results_of_all_parameters(tmp_path_factory):
    path, name = make_usid_file(tmp_path_factory.mktemp("all") / "scan.h5")
    address = f"{path}::{name}"
    names = []
    for parameters in PARAMETERS:
        with Mean(address, parms_dict=parameters, cores=1) as process:
            assert process.duplicate_h5_groups == process.partial_h5_groups == [], parameters
            names.append(process.compute().name)
    return address, names


@pytest.mark.parametrize("number", range(len(PARAMETERS)))
def test_parameters_come_back_equal_and_match_exactly(results_of_all_parameters, number):
    address, names = results_of_all_parameters
    with Mean(address, parms_dict=PARAMETERS[number]) as process:
        assert [group.name for group in process.duplicate_h5_groups] == [names[number]]
        group = process.compute()
        assert group.name == names[number]
        stored = lazyproc.hdf5.attributes.read_parameters(group)
        assert list(stored) == list(PARAMETERS[number])
        for key, value in PARAMETERS[number].items():
            np.testing.assert_equal(stored[key], value)
            assert type(stored[key]) is type(value)
        other = number - 1
        named = set(PARAMETERS[number]) ^ set(PARAMETERS[other]) or set(PARAMETERS[other])
        why = process.why_not_duplicate(names[other])
        assert any(f"{key}: " in why for key in named)


SHOWN = {
    "real": (1.5, 1.5),
    "nothing": (None, None),
    "values": (np.arange(3.0), np.arange(3.0)),
    "nested": ({"a": [1, "b", None]}, {"a": [1, "b", None]}),
    "complex": (1 + 2j, "(1+2j)"),
    "complexes": (np.array([1j, 2]), ["1j", "(2+0j)"]),
    "bytes": (b"ab", "ab"),
    "tuple": ((1, 2), [1, 2]),
    "texts": (np.array(["a", "b"]), ["a", "b"]),
    "within": ({"a": np.arange(2)}, {"a": [0, 1]}),
}
"""What docs/usage.md says of the attributes of opened results: the parameter, and how it is shown."""


def test_parameters_are_shown_in_the_forms_that_the_docs_tell(scan):
    name, _ = run(Mean, scan, parms_dict={key: value for key, (value, _) in SHOWN.items()})
    attrs = lazyproc.open_results(f"{file_of(scan)}::{name}").attrs
    for key, (_, shown) in SHOWN.items():
        assert type(attrs[key]) is type(shown), key
        np.testing.assert_array_equal(attrs[key], shown)


def test_the_order_of_parameters_does_not_matter(scan):
    name, _ = run(Mean, scan, parms_dict={"power": 2, "operator": "A"})
    with Mean(scan, parms_dict={"operator": "A", "power": 2}) as process:
        assert process.compute().name == name


def test_arguments_of_compute_are_part_of_the_work(scan):
    first, values = run(Mean, scan, compute_kwargs={"power": 2})
    np.testing.assert_allclose(values, means(scan) ** 2)
    second, values = run(Mean, scan, 3)
    np.testing.assert_allclose(values, means(scan) ** 3)
    third, values = run(Mean, scan)
    assert len({first, second, third}) == 3
    CALLS.clear()
    with Mean(scan, cores=1) as process:
        assert [group.name for group in process.duplicate_h5_groups] == [third]
        assert process.compute(power=2).name == first
        assert process.compute(False, 3).name == second
        assert process.compute().name == third
        assert process.plan(power=2).group == first
        assert process.plan(power=5).action == "start"
        assert "arguments of compute" in process.why_not_duplicate(first)
        assert "no difference" in process.why_not_duplicate(first, power=2)
    assert CALLS == []


def test_a_partial_run_with_arguments_is_resumed_with_the_same_arguments_only(scan):
    BREAK["at"] = FAILING
    with Mean(scan, cores=1) as process:
        with pytest.raises(FunctionError):
            process.compute(power=2)
        name = process.partial_h5_groups[-1].name
        BREAK["at"] = -1.0
        assert process.plan().action == "start"
        assert process.compute().name != name
        assert process.compute(power=2).name == name
        np.testing.assert_allclose(process.h5_results_grp["Value"][:, 0], means(scan) ** 2)


@pytest.mark.parametrize("method", ["compute", "plan", "to_xarray"])
def test_a_name_in_parameters_and_in_arguments_is_an_error(scan, method):
    before = Path(file_of(scan)).read_bytes()
    with Mean(scan, parms_dict={"power": 2}) as process, pytest.raises(ParameterError, match="power"):
        getattr(process, method)(power=3)
    assert Path(file_of(scan)).read_bytes() == before


def test_outputs_are_part_of_the_work(scan):
    class Wide(Mean):
        outputs = {"Value": lazyproc.Output("f4", units="nA")}

    class More(Mean):
        outputs = {"Value": VALUE, "Another": VALUE}

        @staticmethod
        def _map_function(spectrum):
            return spectrum[0], spectrum[1]

    name, _ = run(Mean, scan)
    for cls, words in ((Wide, ["'Value'", "float64", "float32"]), (More, ["'Another'", "not stored"])):
        with cls(scan, cores=1) as process:
            assert process.duplicate_h5_groups == []
            assert all(word in process.why_not_duplicate(name) for word in words)
            assert process.compute().name != name


def test_a_damaged_group_is_named_and_passed_over(scan):
    name, _ = run(Mean, scan)
    with h5py.File(file_of(scan), "r+") as file:
        file[name].attrs["lazyproc_parameter_kinds"] = "not JSON"
    with Mean(scan, cores=1) as process:
        assert process.duplicate_h5_groups == process.partial_h5_groups == []
        assert "lazyproc_parameter_kinds" in process.why_not_duplicate(name)
        assert process.compute().name != name


def test_the_same_dataset_by_another_path_is_the_same_work(scan):
    """Through a link, and where it was moved to: as long as its values are the same."""
    path = file_of(scan)
    name, _ = run(Mean, scan)
    with h5py.File(path, "r+") as file:
        file["soft"] = h5py.SoftLink(CHANNEL)
        file["hard"] = file[CHANNEL]
    last = name.rpartition("/")[2]
    for other in ("soft", "hard"):
        assert run(Mean, f"{path}::/{other}/Raw_Data")[0] == f"/{other}/{last}"
    with h5py.File(path, "r+") as file:
        del file["soft"], file["hard"]
        file.move(CHANNEL, "/moved")
    moved = f"{path}::/moved/Raw_Data"
    with Mean(moved, cores=1, verify="none") as process:
        assert process.duplicate_h5_groups == []
        assert "source: stored results of" in process.why_not_duplicate(f"/moved/{last}")
    assert run(Mean, moved)[0] == f"/moved/{last}"
    with h5py.File(path, "r+") as file:
        file["moved/Raw_Data"][3, 2] += 1
    assert run(Mean, moved)[0] != f"/moved/{last}"


def test_results_of_other_parameters_cost_a_search_only_their_parameters(scan, monkeypatch):
    """A sweep leaves many of them, and each further call looks at all."""
    for power in (2, 3, 4):
        run(Mean, scan, parms_dict={"power": power})
    read = []
    take = h5py.AttributeManager.__getitem__

    def noted(attributes, name):
        read.append(name)
        return take(attributes, name)

    monkeypatch.setattr(h5py.AttributeManager, "__getitem__", noted)
    with Mean(scan, parms_dict={"power": 5}) as process:
        assert process.duplicate_h5_groups == process.partial_h5_groups == []
    of_results = read[read.index("lazyproc_parameter_kinds") :]
    assert of_results.count("lazyproc_parameter_kinds") == of_results.count("power") == 3
    assert not {"tool", "lazyproc_arguments", "lazyproc_code", "lazyproc_fingerprint"} & set(of_results)


def test_why_not_duplicate_tells_all_differences_at_once(scan):
    name, _ = run(Mean, scan, parms_dict={"power": 2})
    with h5py.File(file_of(scan), "r+") as file:
        file[f"{CHANNEL}/Raw_Data"][7, 2] += 1
    with MeanWithOtherCode(scan, parms_dict={"power": 3}) as process:
        text = process.why_not_duplicate(name)
        for words in ("power", "2", "3", "values", "changed", "code"):
            assert words in text
        with pytest.raises(TypeError, match="group"):
            process.why_not_duplicate("nothing of this name")
        with pytest.raises(TypeError, match="group"):
            process.why_not_duplicate(None)


# -- what the incumbent got wrong ------------------------------------------------------------------------------------


def copy_with_other_values(address, path):
    """Copy a scan and give it other values in the dataset of the same name; return its address."""
    shutil.copyfile(file_of(address), path)
    with h5py.File(path, "r+") as file:
        file[f"{CHANNEL}/Raw_Data"][...] = numbered(offset=5000)
    return f"{path}::{CHANNEL}/Raw_Data"


@pytest.mark.parametrize("verify", ["sampled", "full", "none"])
def test_defect_2_two_sources_of_one_name_share_a_results_file(tmp_path, scan, verify):
    other = copy_with_other_values(scan, tmp_path / "other.h5")
    options = {"h5_target_group": f"{tmp_path / 'results.h5'}::/fits", "verify": verify}
    first, values = run(Mean, scan, **options)
    np.testing.assert_allclose(values, means(scan))
    second, values = run(Mean, other, **options)
    np.testing.assert_allclose(values, means(other))
    assert first != second
    with Mean(other, **options) as process:
        assert [group.name for group in process.duplicate_h5_groups] == [second]
        assert "source" in process.why_not_duplicate(first)
    with Mean(scan, **options) as process:
        assert process.compute().name == first


def test_defect_2_two_channels_of_one_name_share_a_target_group(tmp_path):
    path, name = make_usid_file(tmp_path / "scan.h5", n_channels=2)
    channels = [f"{path}::{name}", f"{path}::{name.replace('Channel_000', 'Channel_001')}"]
    groups = []
    for address in channels:
        group, values = run(Mean, address, h5_target_group=f"{path}::/Results", verify="none")
        np.testing.assert_allclose(values, means(address), rtol=1e-6)
        groups.append(group)
    assert len(set(groups)) == 2
    for address, group in zip(channels, groups, strict=True):
        with Mean(address, h5_target_group=f"{path}::/Results") as process:
            assert [one.name for one in process.duplicate_h5_groups] == [group]


@pytest.mark.parametrize(
    "names", [("Mean", "MeanSquare"), ("MeanSquare", "Mean"), ("Mean", "Mean_1"), ("Mean", "mean")]
)
def test_defect_3_process_names_match_as_a_whole(scan, names):
    first, second = (run(Mean, scan, process_name=name)[0] for name in names)
    assert first != second
    for name, group in zip(names, (first, second), strict=True):
        with Mean(scan, process_name=name) as process:
            assert [one.name for one in process.duplicate_h5_groups] == [group]
    _, values = run(MeanSquare, scan, process_name="Squares")
    assert not np.allclose(values, means(scan))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ({"limits": [1e-9, 2e-9]}, {"limits": [3e-9, 4e-9]}),
        ({"limits": [1e-9, 2e-9]}, {"limits": [1e-9, np.nextafter(2e-9, 1)]}),
        ({"power": 1, "operator": "A"}, {"power": 1}),
        ({"power": 1}, {"power": 1, "operator": "A"}),
        ({"model": None}, {}),
        ({}, {"model": None}),
        ({"model": None}, {"model": "a"}),
        ({"model": [1, 2, 3]}, {"model": [1, 2]}),
        ({"model": "abc"}, {"model": "ab"}),
        ({"model": "ab"}, {"model": b"ab"}),
        ({"model": np.array([b"a", b"b"])}, {"model": ["a", "b"]}),
        ({"model": {"of": [b"a", 1]}}, {"model": {"of": ["a", 1]}}),
    ],
)
def test_defect_4_parameters_match_exactly(scan, stored, wanted):
    name, _ = run(Mean, scan, parms_dict=stored)
    with Mean(scan, parms_dict=wanted, cores=1) as process:
        assert process.duplicate_h5_groups == []
        assert any(f"{key}: " in process.why_not_duplicate(name) for key in stored | wanted)
        assert process.compute().name != name


def test_defect_5_arguments_of_compute_are_part_of_the_match(scan):
    with Mean(scan, cores=1) as process:
        first = process.compute(power=1)
        second = process.compute(power=2)
        assert first.name != second.name
        np.testing.assert_allclose(second["Value"][:, 0], means(scan) ** 2)


def test_defect_6_changed_source_data_are_noticed(scan):
    name, _ = run(Mean, scan)
    with h5py.File(file_of(scan), "r+") as file:
        file[f"{CHANNEL}/Raw_Data"][1234, 3] += 1
    with Mean(scan, cores=1) as process:
        assert process.duplicate_h5_groups == []
        assert "changed" in process.why_not_duplicate(name)
        group = process.compute()
        assert group.name != name
        np.testing.assert_allclose(group["Value"][:, 0], means(scan))


def test_defect_7_looking_again_changes_nothing_in_a_partial_group(scan):
    name = stop_half_way(Mean, scan)
    before = Path(file_of(scan)).read_bytes()
    for _ in range(2):
        with Mean(scan) as process:
            assert [group.name for group in process.partial_h5_groups] == [name]
            assert process.partial_h5_groups[0].attrs["last_pixel"] < N_POSITIONS
    assert Path(file_of(scan)).read_bytes() == before
    with h5py.File(file_of(scan), "r+") as file, h5py.File(f"{file_of(scan)}.copy", "w") as copy:
        file.copy("/", copy, "all")
        Mean(file[f"{CHANNEL}/Raw_Data"])
        assert file[name].attrs["last_pixel"] == copy["all" + name].attrs["last_pixel"]


def test_defect_8_a_dash_in_the_process_name_is_found_again(scan):
    name, _ = run(MeanWithDash, scan)
    assert name.endswith("/Raw_Data-Mean_of_all_000")
    for process_name in ("Mean-of-all", "Mean_of_all"):
        with MeanWithDash(scan, process_name=process_name) as process:
            assert process.compute().name == name


def test_defect_9_a_second_override_on_one_object_starts_afresh(scan):
    with Mean(scan, cores=1) as process:
        names = [process.compute(override=True).name for _ in range(3)]
    assert len(set(names)) == 3


@pytest.mark.parametrize("how", ["path", "handle", "target path", "target handle"])
def test_defect_17_the_constructor_and_the_search_write_nothing(tmp_path, scan, how):
    run(Mean, scan)
    partial_on_purpose(scan)
    target = f"{tmp_path / 'results.h5'}::/fits"
    run(Mean, scan, h5_target_group=target)
    files = [Path(file_of(scan)), tmp_path / "results.h5"]
    for path in files:
        os.utime(path, (1e9, 1e9))

    def look(h5_main, **options):
        process = Mean(h5_main, **options)
        process.plan()
        repr(process)
        process.test()
        assert process.duplicate_h5_groups
        process.close()

    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    listing = sorted(os.listdir(tmp_path))
    if how == "path":
        look(scan)
    elif how == "target path":
        look(scan, h5_target_group=target)
    else:
        with h5py.File(files[0], "r+") as file, h5py.File(files[1], "r+") as results:
            # HDF5 itself notes in a file that it is open; what counts is what is added to that.
            opened = {path: path.read_bytes() for path in files}
            os.utime(files[0], (1e9, 1e9))
            look(file[f"{CHANNEL}/Raw_Data"], **({} if how == "handle" else {"h5_target_group": results["fits"]}))
            assert {path: path.read_bytes() for path in files} == opened
    assert {path: path.read_bytes() for path in files} == {path: content for path, (content, _) in before.items()}
    if "path" in how:
        assert {path: path.stat().st_mtime_ns for path in files} == {path: mtime for path, (_, mtime) in before.items()}
    assert sorted(os.listdir(tmp_path)) == listing


def test_a_target_that_is_not_there_is_not_made_by_looking(tmp_path, scan):
    with Mean(scan, h5_target_group=f"{tmp_path / 'new.h5'}::/a/b") as process:
        assert process.duplicate_h5_groups == process.partial_h5_groups == []
        process.plan()
    assert not (tmp_path / "new.h5").exists()


# -- changed source, changed code ------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": {},
    "chunked": {"chunks": (64, 4)},
    "gzip": {"chunks": (64, 4), "compression": "gzip"},
}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verify", ["sampled", "full", "none"])
@pytest.mark.parametrize("by", ["path", "handle"])
def test_changed_values_make_no_duplicate(tmp_path, monkeypatch, verify, layout, size, by):
    if size == "large":
        monkeypatch.setattr(lazyproc.hdf5.fingerprint, "FULL_UP_TO", 1000)
    path, name = make_usid_file(
        tmp_path / "scan.h5", n_rows=20, n_cols=20, n_spectral=4, data=numbered(400), **LAYOUTS[layout]
    )

    def compute(expected_matches):
        if by == "path":
            with Mean(f"{path}::{name}", cores=1, verify=verify) as process:
                return look_and_compute(process, expected_matches)
        with h5py.File(path, "r+") as file:
            return look_and_compute(Mean(file[name], cores=1, verify=verify), expected_matches)

    def look_and_compute(process, expected_matches):
        assert len(process.duplicate_h5_groups) == expected_matches
        if groups and not expected_matches:
            assert "have changed" in process.why_not_duplicate(groups[0])
        group = process.compute()
        return group.name, group["Value"][:, 0]

    groups: list[str] = []
    groups.append(compute(0)[0])
    assert compute(1)[0] == groups[0]
    with h5py.File(path, "r+") as file:
        file[name][200, 1] = -5
    again, values = compute(0 if verify != "none" else 1)
    assert (again == groups[0]) == (verify == "none")
    if verify != "none":
        np.testing.assert_allclose(values, means(f"{path}::{name}"))


def test_a_partial_group_of_changed_values_is_not_resumed(scan):
    name = stop_half_way(Mean, scan)
    with h5py.File(file_of(scan), "r+") as file:
        file[f"{CHANNEL}/Raw_Data"][3, 3] += 1
    with Mean(scan, cores=1) as process:
        assert process.partial_h5_groups == []
        group = process.compute()
        assert group.name != name
        np.testing.assert_allclose(group["Value"][:, 0], means(scan))


def test_values_changed_through_the_open_handle_are_noticed(scan):
    with h5py.File(file_of(scan), "r+") as file:
        main = file[f"{CHANNEL}/Raw_Data"]
        process = Mean(main, cores=1)
        first = process.compute()
        main[0, 0] = -77
        second = process.compute()
        assert first.name != second.name
        assert second["Value"][0, 0] == main[0].mean()


def test_the_way_of_verifying_may_change_between_runs(tmp_path, monkeypatch, scan):
    """A group stays found when the next call verifies more, or less, than the one that made it."""
    for small in (True, False):
        if not small:
            monkeypatch.setattr(lazyproc.hdf5.fingerprint, "FULL_UP_TO", 1000)
        for stored in ("sampled", "full", "none"):
            target = f"{tmp_path / 'results.h5'}::/{stored}{small}"
            name, _ = run(Mean, scan, verify=stored, h5_target_group=target)
            for now in ("sampled", "full", "none"):
                with Mean(scan, verify=now, h5_target_group=target) as process:
                    assert [group.name for group in process.duplicate_h5_groups] == [name], (small, stored, now)


def test_changed_code_reuses_the_results_and_says_so(scan, caplog):
    name, values = run(Mean, scan)
    with caplog.at_level(logging.WARNING, "lazyproc"):
        again, same_values = run(Mean, scan)
        assert caplog.records == []
        again, same_values = run(MeanWithOtherCode, scan)
    assert again == name
    np.testing.assert_array_equal(values, same_values)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert name in record.message
    assert "code has changed" in record.message
    assert "override=True" in record.message
    with MeanWithOtherCode(scan) as process:
        assert "code has changed" in process.why_not_duplicate(name)


def test_another_lambda_is_other_work(scan):
    """Its name says nothing. With a name of the process it is as for any function."""
    outputs = {"Value": VALUE}
    values = []
    for function in (lambda x: x.max(), lambda x: x.min(), lambda x: x.max()):
        group = lazyproc.map_positions(function, scan, outputs, cores=1)
        values.append((group.name[-3:], float(group["Value"][0, 0])))
    assert values == [("000", 1.0), ("001", 0.0), ("000", 1.0)]
    named = [
        lazyproc.map_positions(function, scan, outputs, process_name="Limit", cores=1).name
        for function in (lambda x: x.max(), lambda x: x.min())
    ]
    assert named[0] == named[1]


class Gain:
    """What a function may belong to, or be."""

    def __init__(self, n):
        self.n = n

    def times(self, spectrum):
        if spectrum[0] == BREAK["at"]:
            raise RuntimeError("told to fail")
        return spectrum[0] * self.n

    def __call__(self, spectrum):
        return spectrum[0] * self.n


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.add.reduce, np.maximum.reduce),
        (operator.itemgetter(0), operator.itemgetter(3)),
        (functools.partial(np.add.reduce, axis=0), functools.partial(np.multiply.reduce, axis=0)),
        (Gain(2).times, Gain(3).times),
        (Gain(2), Gain(3)),
        (functools.partial(lambda spectrum, gain: gain(spectrum), gain=Gain(2)), lambda spectrum: spectrum[0]),
        (functools.partial(Gain.__call__, Gain(2)), functools.partial(Gain.__call__, Gain(3))),
    ],
    ids=["reduce", "itemgetter", "partial", "method", "object", "lambda", "partial with an object"],
)
def test_what_has_no_name_of_its_own_is_other_work_where_it_differs(scan, one, other):
    outputs = {"Value": VALUE}
    names = [lazyproc.map_positions(function, scan, outputs, cores=1).name[-3:] for function in (one, other, one)]
    assert names == ["000", "001", "000"]
    named = [lazyproc.map_positions(f, scan, outputs, process_name="Named", cores=1).name for f in (one, other)]
    assert named[0] == named[1]


def test_a_partial_run_with_one_object_is_not_continued_with_another(scan, caplog):
    BREAK["at"] = FAILING
    with pytest.raises(FunctionError):
        lazyproc.map_positions(Gain(2).times, scan, {"Value": VALUE}, cores=1)
    BREAK["at"] = FAILING + 0.5  # nowhere
    group = lazyproc.map_positions(Gain(3).times, scan, {"Value": VALUE}, cores=1)
    assert group.name.endswith("_001")
    np.testing.assert_array_equal(group["Value"][:, 0], 3 * np.arange(N_POSITIONS))


def closing_over(gain):
    def fit(spectrum):
        return spectrum[0] * gain.n

    return fit


def test_what_a_named_function_uses_is_told_when_it_has_changed(scan, caplog):
    outputs = {"Value": VALUE}
    with caplog.at_level(logging.WARNING, "lazyproc"):
        names = [lazyproc.map_positions(closing_over(Gain(n)), scan, outputs, cores=1).name for n in (2, 2, 3)]
    assert names[0] == names[1] == names[2]
    (record,) = caplog.records
    assert "the function's code has changed, or what it uses" in record.message


@pytest.mark.parametrize("stored", ["byte310:0123456789abcdef", "src", "src+src:0123456789abcdef"])
def test_where_it_cannot_be_told_whether_the_code_has_changed_that_is_said(scan, caplog, stored):
    """It was found in another way, as where the function uses a lambda now; or an earlier version looked at less."""
    name, _ = run(Mean, scan)
    with h5py.File(file_of(scan), "r+") as file:
        code = file[name].attrs["lazyproc_code"].partition("+")[0]
        file[name].attrs["lazyproc_code"] = stored.replace("src", code, 1) if stored.startswith("src") else stored
        write_seal(file[name])
    with caplog.at_level(logging.WARNING, "lazyproc"):
        assert run(Mean, scan)[0] == name
    (record,) = caplog.records
    if stored.endswith("+src:0123456789abcdef"):
        assert "the function's code has changed, or what it uses" in record.message
    else:
        assert "cannot be told" in record.message
        assert "override=True" in record.message


def declared(**changes):
    dims = [lazyproc.Dimension("Frequency", "Hz", [1.0, 2.0]), lazyproc.Dimension("Bias", "V", [0.5, 0.25])]
    return {"dtype": "f4", "dims": dims, "quantity": "Amplitude", "units": "nA", "fill_value": np.nan, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantity": "Phase"}, ["quantity 'Amplitude'", "wanted 'Phase'"]),
        ({"units": "V"}, ["units 'nA'", "wanted 'V'"]),
        ({"fill_value": -1}, ["fill value nan", "wanted -1"]),
        ({"dims": declared()["dims"][::-1]}, ["labels ['Frequency', 'Bias']", "wanted ['Bias', 'Frequency']"]),
        ({"dims": [lazyproc.Dimension("All", "a.u.", 4)]}, ["labels ['Frequency', 'Bias']", "wanted ['All']"]),
        ({"dims": [lazyproc.Dimension("Frequency", "kHz", [1, 2]), declared()["dims"][1]]}, ["['Hz', 'V']", "'kHz'"]),
        (
            {"dims": [lazyproc.Dimension("Frequency", "Hz", [1, 3]), declared()["dims"][1]]},
            ["[1.0, 2.0]", "[1.0, 3.0]"],
        ),
        ({"dims": None, "shape_from_main": True}, ["dimensions of its own", "those of the main dataset"]),
    ],
    ids=["quantity", "units", "fill value", "order", "number", "units of a dimension", "values", "from main"],
)
@pytest.mark.parametrize("where", ["same file", "another file"])
def test_results_declared_otherwise_are_other_work(tmp_path, scan, changes, words, where):
    options = {} if where == "same file" else {"h5_target_group": f"{tmp_path / 'results.h5'}::/"}

    def started(**changes):
        output = lazyproc.Output(**declared(**changes))
        shape = tuple(dim.size for dim in output.dims or ()) or 4
        attributes = {"outputs": {"Value": output}, "_map_function": staticmethod(lambda row: row.reshape(shape))}
        return type("Fit", (lazyproc.Process,), attributes)(scan, cores=1, **options)

    with started() as process:
        name = process.compute().name
    with started() as process:
        assert process.why_not_duplicate(name).startswith("no difference")
        assert process.compute().name == name
    with started(**changes) as process:
        told = process.why_not_duplicate(name)
        assert all(word in told for word in ["output 'Value': stored with", *words]), told
        again = process.compute().name
        assert again != name
        assert process.why_not_duplicate(again).startswith("no difference")


@pytest.mark.parametrize(
    "output",
    [
        {"dtype": "S5", "fill_value": b"ab"},
        {"dtype": [("a", "f4"), ("b", "S3"), ("c", "f8", 2)]},
        {"dtype": [("a", "f4"), ("b", "S3"), ("c", "f8", 2)], "fill_value": (1, b"x", [2, 3])},
        {"dtype": "?"},
        {"dtype": "c8", "compression": "gzip"},
        {"dtype": ">f4", "units": "", "quantity": " Ä ", "dims": [lazyproc.Dimension("µ ", " ", 1)]},
        {"dtype": "u8", "fill_value": 2**64 - 1, "dims": [lazyproc.Dimension("b\U0001f600", "", [0.1])]},
    ],
    ids=["text", "compound", "compound with a fill value", "bool", "compressed", "texts", "surrogates"],
)
def test_whatever_is_declared_is_found_again(scan, output):
    declared = lazyproc.Output(**output)
    zero = np.zeros([dim.size for dim in declared.dims or ()], declared.dtype)
    run = [lazyproc.map_positions(lambda row: zero[()], scan, declared, process_name="Zero", cores=1) for _ in range(2)]
    assert run[0].name == run[1].name


def test_a_parameter_with_a_slip_in_its_name_is_told_once(scan, caplog):
    """It is stored, and decides what is the same work, as any that the function does not take."""
    with caplog.at_level(logging.WARNING, "lazyproc"):
        for parameters in ({"powr": 2}, {"operator": "A"}, {"power": 2, "powr": 2}):
            run(Mean, scan, parms_dict=parameters)
    (message,) = [record.message for record in caplog.records]
    assert message == "Mean: the parameter 'powr' is stored, but no argument of the function; is 'power' meant?"

    def fit(spectrum, window):
        return window

    with pytest.raises(ParameterError, match=r"missing .*'window'.*it takes none that is called \['windw'\]"):
        lazyproc.map_positions(fit, scan, {"Value": VALUE}, params={"windw": 2})


def test_a_second_file_with_the_same_values_gets_results_of_its_own(tmp_path):
    """In a file that both share; a file that was moved since keeps its own."""
    addresses = []
    for name in ("one", "two"):
        path, main = make_usid_file(
            tmp_path / f"{name}.h5", n_rows=N_ROWS, n_cols=N_COLS, n_spectral=4, data=numbered()
        )
        addresses.append(f"{path}::{main}")
    target = f"{tmp_path / 'results.h5'}::/"
    names = [run(Mean, address, h5_target_group=target)[0] for address in (*addresses, *addresses)]
    assert names[0] == names[2] != names[1] == names[3]
    with h5py.File(tmp_path / "results.h5") as file:
        assert [file[name].attrs["source_file_path"] for name in names[:2]] == [file_of(one) for one in addresses]
    moved = tmp_path / "moved.h5"
    os.rename(tmp_path / "two.h5", moved)
    assert run(Mean, addresses[1].replace(str(tmp_path / "two.h5"), str(moved)), h5_target_group=target)[0] == names[1]


def test_what_the_function_cannot_take_is_an_error_also_where_differences_are_told(scan):
    name, _ = run(Mean, scan, parms_dict={"power": 2})
    with Mean(scan, parms_dict={"power": 2}) as process, pytest.raises(ParameterError, match="power"):
        process.why_not_duplicate(name, power=3)


def test_changed_code_resumes_and_says_so(scan, caplog):
    name = stop_half_way(Mean, scan)
    caplog.clear()
    with h5py.File(file_of(scan), "r") as file:
        done = file[name]["completed_positions"][()] == 1
    with caplog.at_level(logging.WARNING, "lazyproc"):
        again, values = run(MeanWithOtherCode, scan)
    assert again == name
    assert ["code has changed" in record.message for record in caplog.records] == [True]
    np.testing.assert_allclose(values, np.where(done, means(scan), means(scan) + 1000))


# -- results in another file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("written_by", ["path", "handle"])
@pytest.mark.parametrize("read_by", ["path", "handle"])
def test_results_in_another_file_are_found_by_path_and_by_handle(tmp_path, scan, written_by, read_by):
    target = tmp_path / "results.h5"
    with h5py.File(target, "w") as file:
        file.create_group("fits")

    def with_process(by, act):
        if by == "path":
            with Mean(scan, cores=1, h5_target_group=f"{target}::/fits") as process:
                return act(process)
        with h5py.File(file_of(scan), "r") as source, h5py.File(target, "r+") as results:
            return act(Mean(source[f"{CHANNEL}/Raw_Data"], cores=1, h5_target_group=results["fits"]))

    name = with_process(written_by, lambda process: process.compute().name)
    CALLS.clear()
    assert with_process(read_by, lambda process: [group.name for group in process.duplicate_h5_groups]) == [name]
    assert with_process(read_by, lambda process: process.compute().name) == name
    assert CALLS == []
    assert "Raw_Data-Mean_000" not in h5py.File(file_of(scan), "r")[CHANNEL]


@pytest.mark.parametrize("in_one_file", [True, False])
@pytest.mark.parametrize("finished", [True, False])
def test_files_moved_together_still_match(tmp_path, scan, in_one_file, finished):
    (tmp_path / "old").mkdir()
    source = tmp_path / "old" / "scan.h5"
    shutil.move(file_of(scan), source)
    addresses = [f"{folder / 'scan.h5'}::{CHANNEL}/Raw_Data" for folder in (tmp_path / "old", tmp_path / "new")]
    targets = [None if in_one_file else f"{tmp_path / folder / 'results.h5'}::/fits" for folder in ("old", "new")]
    act = run if finished else stop_half_way
    found = act(Mean, addresses[0], h5_target_group=targets[0])
    name = found[0] if finished else found
    shutil.move(tmp_path / "old", tmp_path / "new")
    CALLS.clear()
    again, values = run(Mean, addresses[1], h5_target_group=targets[1])
    assert again == name
    np.testing.assert_allclose(values, means(addresses[1]))
    assert len(CALLS) == 0 if finished else 0 < len(CALLS) < N_POSITIONS


def test_a_mask_that_is_not_one_makes_no_match(scan):
    for number, (values, dtype) in enumerate(
        [(np.ones(N_POSITIONS - 1), "u1"), (np.ones(N_POSITIONS), "f4"), (np.full(N_POSITIONS, 2), "u1")]
    ):
        name, _ = run(Mean, scan, parms_dict={"number": number})
        with h5py.File(file_of(scan), "r+") as file:
            del file[name]["completed_positions"]
            file[name].create_dataset("completed_positions", data=values.astype(dtype))
        with Mean(scan, parms_dict={"number": number}) as process:
            assert process.duplicate_h5_groups == process.partial_h5_groups == []
            assert "status mask" in process.why_not_duplicate(name)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "partial"])
def test_a_copy_of_a_group_that_lost_its_references_is_passed_over(scan, finished):
    """h5py makes the references in a copy null: it could be returned, but not be opened as results."""
    name = run(Mean, scan)[0] if finished else stop_half_way(Mean, scan)
    copy = name.removesuffix("_000") + "_007"
    with h5py.File(file_of(scan), "r+") as file:
        file.copy(file[name], file[CHANNEL], name=copy.rpartition("/")[2])
        del file[name]
    with Mean(scan, cores=1) as process:
        assert process.duplicate_h5_groups == process.partial_h5_groups == []
        told = process.why_not_duplicate(copy)
        assert told.startswith("output 'Value': stored, but ")
        assert "its attribute Position_Indices is a null reference" in told
        assert len([line for line in told.splitlines() if not line.startswith("code: ")]) == 1
        group = process.compute()
        assert group.name not in (name, copy)
        np.testing.assert_array_equal(lazyproc.open_results(group)["status"], 1)
        np.testing.assert_allclose(group["Value"][:, 0], means(scan))
        name = group.name
    state = {one.group: one for one in file_status(file_of(scan)).results}
    assert "or have lost their references" in state[copy].problem
    assert state[name].problem == ""


def test_the_errors_are_those_of_the_design():
    assert issubclass(ResultsError, ValueError)
    assert issubclass(ArgumentValueError, ValueError)
    assert issubclass(ParameterError, ValueError)
