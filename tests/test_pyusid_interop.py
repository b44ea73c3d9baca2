"""The real pyUSID opens what lazyproc writes, lazyproc opens what pyUSID writes, and both see the same N-D forms."""

from __future__ import annotations

import warnings

import h5py
import numpy as np
import pytest
from usid_files import (
    make_4d_file,
    make_compound_file,
    make_sparse_file,
    make_usid_file,
    names_of_mains,
    random_data,
    real_file,
)

from lazyproc.core.specs import Dimension, Output
from lazyproc.hdf5.create import create_output, create_results_group, create_status_mask, group_name
from lazyproc.hdf5.grid import nd_shape_and_axes, position_grid, spectroscopic_grid
from lazyproc.hdf5.usid import is_main, main_dataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyUSID = pytest.importorskip("pyUSID")
    hdf_utils = pytest.importorskip("pyUSID.io.hdf_utils")

pytestmark = pytest.mark.filterwarnings("ignore")

OUTPUTS = {
    "Height": Output("f4", quantity="Height", units="µm"),
    "Parameters": Output("f8", dims=[Dimension("Parameter", "a.u.", 4)]),
    "Loops": Output("i4", dims=[Dimension("Field", "µT", [1, 2.5, 9]), Dimension("Repeat", "", 2)]),
    "Fit": Output([("Amplitude", "f4"), ("Phase", "f8")], dims=[Dimension("Cycles", "", 3)]),
    "Peak": Output([("Amplitude", "f4"), ("Phase", "f8")]),
    "Filtered": Output("c8", shape_from_main=True),
}


def nd_form(dataset):
    """Reshape a main dataset as lazyproc sees it, the dimensions as in the file."""
    (pos_shape, pos_axes), (spec_shape, spec_axes) = (
        nd_shape_and_axes(grid) for grid in (position_grid(dataset), spectroscopic_grid(dataset))
    )
    axes = pos_axes + tuple(len(pos_axes) + axis for axis in spec_axes)
    return dataset[()].reshape(pos_shape + spec_shape).transpose(axes)


def assert_same_in_both(dataset):
    """Check that lazyproc and pyUSID tell the same of a main dataset with an N-D form."""
    main = main_dataset(dataset)
    assert hdf_utils.check_if_main(dataset, verbose=True)
    theirs = pyUSID.USIDataset(dataset)
    assert theirs.data_descriptor == f"{main.quantity} ({main.units})"
    assert list(theirs.pos_dim_labels) == list(main.position.labels)
    assert list(theirs.spec_dim_labels) == list(main.spectroscopic.labels)
    descriptors = [
        [f"{label} ({unit})" for label, unit in zip(axis.labels, axis.units, strict=True)]
        for axis in (main.position, main.spectroscopic)
    ]
    assert [theirs.pos_dim_descriptors, theirs.spec_dim_descriptors] == descriptors
    grids = position_grid(dataset), spectroscopic_grid(dataset)
    assert list(theirs.n_dim_sizes) == [*grids[0].sizes, *grids[1].sizes]
    ours = nd_form(dataset)
    np.testing.assert_array_equal(np.asarray(theirs.get_n_dim_form()), ours)
    assert ours.shape == (*grids[0].sizes, *grids[1].sizes)
    for label, values in zip(grids[0].labels, grids[0].coordinates, strict=True):
        np.testing.assert_array_equal(theirs.get_pos_values(label), values)
    if main.spectroscopic.indices.shape[0] < main.spectroscopic.indices.shape[1]:  # else pyUSID takes columns for rows
        for label, values in zip(grids[1].labels, grids[1].coordinates, strict=True):
            np.testing.assert_array_equal(theirs.get_spec_values(label), values)


@pytest.mark.parametrize("same_file", [True, False])
@pytest.mark.parametrize("order", ["XY", "YX"])
@pytest.mark.parametrize("make", [make_usid_file, make_4d_file, make_compound_file])
def test_pyusid_opens_what_lazyproc_writes(tmp_path, make, order, same_file):
    path, name = make(tmp_path / "a.h5", order=order, fastest="Y")
    target_path = path if same_file else tmp_path / "b.h5"
    with h5py.File(path, "r+") as source, h5py.File(target_path, "a") as target:
        main = source[name]
        parent = target[name].parent if same_file else target
        group = create_results_group(parent, main, "Peak-Fit", {"smoothing": 3, "model": "SHO"})
        for key, output in OUTPUTS.items():
            dataset = create_output(group, main, output.resolve(key, main.shape[1]), same_file=same_file)
            dataset[...] = random_data(dataset.shape, dataset.dtype)
        create_status_mask(group, main.shape[0], "completed_positions")
    with h5py.File(path, "r") as source, h5py.File(target_path, "r") as target:
        main = source[name]
        parent = main.parent if same_file else target
        for key in OUTPUTS:
            assert_same_in_both(parent["Raw_Data-Peak_Fit_000"][key])
        group = parent["Raw_Data-Peak_Fit_000"]
        elsewhere = None if same_file else parent
        assert hdf_utils.find_results_groups(main, "Peak_Fit", h5_parent_group=elsewhere) == [group]
        assert check_for_old(main, {"smoothing": 3, "model": "SHO"}, elsewhere) == [group]
        assert check_for_old(main, {"smoothing": 4}, elsewhere) == []
        found = {item.name for item in hdf_utils.get_all_main(group)}
        assert found == {f"{group.name}/{key}" for key in OUTPUTS} == set(names_of_mains(group))
        if same_file:
            assert hdf_utils.get_source_dataset(group) == main


def check_for_old(main, parameters, parent):
    return hdf_utils.check_for_old(main, "Peak_Fit", new_parms=parameters, h5_parent_goup=parent)


def test_results_of_a_sparse_scan_are_main_datasets_for_both(tmp_path):
    path, name = make_sparse_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        group = create_results_group(file[name].parent, file[name], "Mean", {})
        dataset = create_output(group, file[name], OUTPUTS["Height"].resolve("Height", 6), same_file=True)
        assert hdf_utils.check_if_main(dataset)
        assert is_main(dataset)
        assert not position_grid(dataset).is_regular
        assert list(pyUSID.USIDataset(dataset).pos_dim_labels) == ["X", "Y"]


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (2, 1), (1, 3), (2, 1, 1), (3, 1, 2), (1, 2, 2)])
def test_dimensions_of_a_single_value_are_opened_by_pyusid(tmp_path, sizes):
    path, name = make_usid_file(tmp_path / "a.h5")
    dims = [Dimension(f"D{number}", "u", size) for number, size in enumerate(sizes)]
    with h5py.File(path, "r+") as file:
        output = Output("f4", dims=dims).resolve("Out", 6)
        dataset = create_output(file[name].parent, file[name], output, same_file=True)
        dataset[...] = random_data(dataset.shape, "f4")
        assert hdf_utils.check_if_main(dataset)
        ours = nd_form(dataset)
        assert ours.shape == (5, 4, *sizes)
        theirs = pyUSID.USIDataset(dataset)
        if len(sizes) <= output.width:  # else pyUSID takes columns for rows and finds no N-D form
            np.testing.assert_array_equal(np.squeeze(theirs.get_n_dim_form()), np.squeeze(ours))


def test_both_number_the_next_group_alike(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        main = file[name]
        for expected in ("Raw_Data-Fit_000", "Raw_Data-Fit_001"):
            assert group_name(main.name, "Fit", main.parent) == expected
            assert hdf_utils.create_results_group(main, "Fit").name.endswith(expected)
        assert create_results_group(main.parent, main, "Fit", {}).name.endswith("Raw_Data-Fit_002")
        assert hdf_utils.create_results_group(main, "Fit").name.endswith("Raw_Data-Fit_003")


def test_both_write_the_same_attributes_of_a_group(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        theirs = hdf_utils.create_results_group(file[name], "Fit").attrs
        ours = create_results_group(file[name].parent, file[name], "Fit", {}).attrs
        assert set(theirs) - set(ours) <= {"pyUSID_version", "sidpy_version"}
        for key in ("tool", "num_source_dsets", "platform"):
            assert ours[key] == theirs[key]
        assert file[ours["source_000"]] == file[theirs["source_000"]]
        assert len(ours["timestamp"]) == len(theirs["timestamp"])


def dimension(label, units, values):
    return pyUSID.Dimension(label, units, values)


@pytest.mark.parametrize("slow_to_fast", [True, False])
@pytest.mark.parametrize("n_spectral_dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["f4", "c16", [("a", "f4"), ("b", "i2")]])
def test_lazyproc_opens_what_pyusid_writes(tmp_path, dtype, n_spectral_dims, slow_to_fast):
    positions = [dimension("X", "nm", np.linspace(0, 1, 5)), dimension("Y", "µm", np.linspace(0, 2, 3))]
    spectral = [
        dimension("Bias", "V", np.linspace(-2, 2, 7)),
        dimension("Cycle", "", np.arange(2)),
        dimension("Field", "mT", np.linspace(0, 1, 3)),
    ][:n_spectral_dims]
    shape = 15, (7, 14, 42)[n_spectral_dims - 1]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("Measurement_000")
        # Given dimensions, write_main_dataset itself calls np.product, which NumPy 2 has no more; hence in two steps.
        pairs = [
            hdf_utils.write_ind_val_dsets(group, dims, is_spectral=is_spectral, slow_to_fast=slow_to_fast)
            for dims, is_spectral in ((positions, False), (spectral, True))
        ]
        names = ("h5_pos_inds", "h5_pos_vals", "h5_spec_inds", "h5_spec_vals")
        ancillary = dict(zip(names, pairs[0] + pairs[1], strict=True))
        data = random_data(shape, dtype)
        hdf_utils.write_main_dataset(group, data, "Raw", "Current", "µA", None, None, **ancillary)
    with h5py.File(tmp_path / "a.h5", "r") as file:
        assert names_of_mains(file) == ["/Measurement_000/Raw"]
        assert_same_in_both(file["/Measurement_000/Raw"])


def test_a_pyusid_dataset_is_a_main_dataset(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r") as file:
        assert main_dataset(pyUSID.USIDataset(file[name])) == main_dataset(file[name])


def test_both_find_the_same_in_real_files():
    for name in ("SingFreqPFM_0003.h5", "sparse_sampling.h5"):
        with h5py.File(real_file(name), "r") as file:
            assert names_of_mains(file) == [item.name for item in hdf_utils.get_all_main(file)]
    with h5py.File(real_file("SingFreqPFM_0003.h5"), "r") as file:
        assert_same_in_both(file["/Measurement_000/Channel_002/Raw_Data"])
