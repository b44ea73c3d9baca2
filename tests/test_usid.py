"""Main datasets are recognised, broken ones refused by name, grids found exactly; what is created has its place."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from usid_files import (
    grid_points,
    make_4d_file,
    make_compound_file,
    make_shared_file,
    make_sparse_file,
    make_usid_file,
    names_of_mains,
    real_file,
    write_ancillary,
    write_main,
)

from lazyproc.core.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    NotMainDatasetError,
    ReadOnlyFileError,
    ResultsError,
)
from lazyproc.core.specs import Dimension, Output
from lazyproc.hdf5 import create, usid
from lazyproc.hdf5.grid import nd_shape_and_axes, position_grid, read_grid, spectroscopic_grid

REFERENCES = usid.REFERENCES


@pytest.fixture
def memory():
    """A file that lives in memory only."""
    with h5py.File("memory.h5", "w", driver="core", backing_store=False) as file:
        yield file


def grid_of(file, indices, values, axis="position", labels=None, chunks=None):
    """Read the grid of points `(n_points, n_dims)` written along an axis."""
    for name, data in (("i", indices), ("v", values)):
        if name in file:
            del file[name]
        file.create_dataset(name, data=data if axis == "position" else data.T, chunks=chunks)
    labels = labels or [f"d{dim}" for dim in range(indices.shape[1])]
    return read_grid(file["i"], file["v"], labels, ["u"] * len(labels), axis)


# ---- texts


@pytest.mark.parametrize(
    "value",
    ["µm", "µm".encode(), np.str_("µm"), np.bytes_("µm".encode()), "µm".encode("latin-1"), "\udcb5m", np.array(["µm"])],
)
def test_a_text_is_read_in_whatever_way_it_was_written(value):
    assert usid.read_text(value) == "µm"
    assert usid.read_texts(value) == ("µm",)


def test_several_texts(memory):
    memory.attrs["bytes"] = np.array([b"X", b"Y"])
    memory.attrs["str"] = ["X", "Y"]
    assert usid.read_texts(memory.attrs["bytes"]) == usid.read_texts(memory.attrs["str"]) == ("X", "Y")


@pytest.mark.parametrize("value", [3, None, np.array([1.0]), np.array(["a", "b"]), h5py.Empty("f4")])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ArgumentTypeError, match="expected str or bytes"):
        usid.read_text(value)


# ---- main datasets


@pytest.mark.parametrize("text", ["bytes", "str"])
@pytest.mark.parametrize("make", [make_usid_file, make_sparse_file, make_4d_file, make_compound_file, make_shared_file])
def test_a_main_dataset_is_described(tmp_path, make, text):
    path, name = make(tmp_path / "a.h5", text=text, ancillary_level=1)
    with h5py.File(path, "r") as file:
        main = usid.main_dataset(file[name])
        handles = usid.ancillary_handles(file[name])
        assert usid.is_main(file[name])
        assert (main.quantity, main.units) == ("Current", "nA")
        assert (main.position.labels, main.position.units) == (("X", "Y"), ("nm", "µm"))
        assert main.position.indices.name == "/Measurement_000/Position_Indices"
        assert main.spectroscopic.values.name == "/Measurement_000/Spectroscopic_Values"
        assert main.handles == handles
        assert handles[2].shape == handles[3].shape
        assert [handle.name.rpartition("/")[2] for handle in handles] == list(REFERENCES)


def test_all_main_datasets_of_a_file_are_found(tmp_path):
    path, _ = make_shared_file(tmp_path / "a.h5", 3)
    names = [f"/Measurement_000/Channel_{number:03d}/Raw_Data" for number in range(3)]
    with h5py.File(path, "r") as file:
        assert names_of_mains(file) == names
        assert names_of_mains(file["Measurement_000/Channel_001"]) == names[1:2]


def reshaped(n_rows, n_cols):
    def change(main, group):
        attrs = dict(main.attrs)
        del group["Raw_Data"]
        shape = (n_rows,) if n_cols is None else (n_rows, n_cols)
        group.create_dataset("Raw_Data", shape, "f4").attrs.update(attrs)

    return change


def set_attribute(name, value):
    return lambda main, group: main.attrs.__setitem__(name, value)


def refer(name, **kwargs):
    def change(main, group):
        main.attrs[name] = group.create_dataset("other", **kwargs).ref

    return change


def on_ancillary(ancillary, attribute, value):
    def change(main, group):
        if value is None:
            del group[ancillary].attrs[attribute]
        else:
            group[ancillary].attrs[attribute] = value

    return change


def delete_ancillary(name):
    return lambda main, group: group.__delitem__(name)


BROKEN = [
    *((lambda main, group, name=name: main.attrs.__delitem__(name), [name]) for name in REFERENCES),
    (lambda main, group: main.attrs.__delitem__("quantity"), ["no attribute quantity"]),
    (lambda main, group: main.attrs.__delitem__("units"), ["no attribute units"]),
    (lambda main, group: [main.attrs.__delitem__(n) for n in ("units", REFERENCES[2])], ["units, Spectroscopic_Indic"]),
    (set_attribute("quantity", 5), ["quantity", "5", "expected a text"]),
    (set_attribute("units", ["nA", "V"]), ["units", "2 text(s)", "expected a text"]),
    (set_attribute("Position_Values", "there"), ["Position_Values", "'there'", "expected a reference"]),
    (lambda m, g: m.attrs.create("Position_Values", None, (), h5py.ref_dtype), ["Position_Values", "null"]),
    (lambda m, g: m.attrs.__setitem__("Spectroscopic_Values", g.ref), ["Spectroscopic_Values", "expected a dataset"]),
    (delete_ancillary("Position_Indices"), ["Position_Indices", "deleted"]),
    (delete_ancillary("Spectroscopic_Values"), ["Spectroscopic_Values", "deleted"]),
    (reshaped(20, None), ["(20,)", "(n_positions, n_spectral)"]),
    (reshaped(0, 6), ["no positions", "(0, 6)"]),
    (reshaped(20, 0), ["no columns", "(20, 0)"]),
    (reshaped(21, 6), ["Position_Indices", "(20, 2)", "(21, 6)", "(21, n_position_dims)"]),
    (reshaped(20, 7), ["Spectroscopic_Indices", "(1, 6)", "(20, 7)", "(n_spectral_dims, 7)"]),
    (refer("Position_Values", shape=(20,), dtype="f4"), ["Position_Values", "(20,)"]),
    (
        refer("Position_Values", shape=(20, 3), dtype="f4"),
        ["Position_Indices", "(20, 2)", "Position_Values", "(20, 3)"],
    ),
    (refer("Position_Indices", shape=(20, 0), dtype="f4"), ["Position_Indices", "(20, 0)"]),
    (refer("Position_Indices", data=h5py.Empty("f4")), ["Position_Indices", "None"]),
    (refer("Position_Indices", shape=(20, 2), dtype="S3"), ["Position_Indices", "|S3", "expected numbers"]),
    (on_ancillary("Position_Indices", "labels", None), ["Position_Indices", "labels is missing"]),
    (on_ancillary("Spectroscopic_Values", "units", None), ["Spectroscopic_Values", "units is missing"]),
    (on_ancillary("Position_Values", "labels", ["X"]), ["Position_Values", "labels", "('X',)", "2 text(s)"]),
    (on_ancillary("Position_Values", "units", [1, 2]), ["Position_Values", "units", "expected 2 text(s)"]),
    (on_ancillary("Position_Values", "labels", ["X", "Z"]), ["labels of Position_Indices", "'Z'"]),
    (on_ancillary("Spectroscopic_Values", "units", ["A"]), ["units of Spectroscopic_Indices", "'A'", "'V'"]),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=[" ".join(words)[:40] for _, words in BROKEN])
def test_a_broken_main_dataset_is_refused_by_name(tmp_path, change, words):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        change(file[name], file[name].parent)
    with h5py.File(path, "r") as file:
        with pytest.raises(NotMainDatasetError) as caught:
            usid.main_dataset(file[name])
        for word in [f"{name}: not a USID Main dataset", "expected" if "deleted" not in words else "deleted", *words]:
            assert word in str(caught.value)
        assert not usid.is_main(file[name])
        assert names_of_mains(file) == []


def test_an_ancillary_dataset_that_is_deleted_but_still_open_is_refused(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        held = file[name].parent["Position_Values"]
        del file[name].parent["Position_Values"]
        with pytest.raises(NotMainDatasetError, match=r"Position_Values.*deleted"):
            usid.main_dataset(file[name])
        assert held.shape == (20, 2)


@pytest.mark.parametrize("thing", ["/Raw_Data", None, np.zeros((3, 3)), 5])
def test_what_is_no_dataset_is_refused(thing):
    assert not usid.is_main(thing)
    with pytest.raises(ArgumentTypeError, match=r"expected an open h5py\.Dataset"):
        usid.main_dataset(thing)


def test_a_dataset_of_a_closed_file_is_refused(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r") as file:
        dataset = file[name]
    assert not usid.is_main(dataset)
    with pytest.raises(ArgumentValueError, match="closed"):
        usid.main_dataset(dataset)


# ---- real files


def test_real_image_stack(tmp_path):
    with h5py.File(real_file("SingFreqPFM_0003.h5"), "r") as file:
        names = names_of_mains(file)
        assert names == [f"/Measurement_000/Channel_{number:03d}/Raw_Data" for number in range(4)]
        mains = [usid.main_dataset(file[name]) for name in names]
        assert {main.position.indices.name for main in mains} == {"/Measurement_000/Position_Indices"}
        grid = position_grid(file[names[0]])
        assert (grid.labels, grid.sizes, grid.is_regular, grid.shape) == (("X", "Y"), (128, 128), True, (128, 128))
        assert nd_shape_and_axes(grid) == ((128, 128), (1, 0))
        x, y = file["Measurement_000/Position_Values"][:].T
        np.testing.assert_array_equal(grid.coordinates[0], x[:128])
        np.testing.assert_array_equal(grid.coordinates[1], y[::128])
        assert spectroscopic_grid(file[names[0]]).sizes == (1,)


def test_real_sparse_sampling(tmp_path):
    copy = shutil.copy(real_file("sparse_sampling.h5"), tmp_path)
    with h5py.File(copy, "r") as file:
        names = names_of_mains(file)
        assert "/Measurement_000/Channel_000/Raw_Data" in names
        assert "/Measurement_000/Channel_000/Raw_Data-Simple_Process_009/Filtered_Data" in names
        for name in names:
            grid = position_grid(file[name])
            assert (grid.is_regular, grid.sizes, grid.length) == (False, (8, 8), 8)
            np.testing.assert_array_equal(np.stack(grid.coordinates, 1), usid.ancillary_handles(file[name])[1][:])
        assert spectroscopic_grid(file["/Measurement_000/Channel_000/Raw_Data"]).is_regular


# ---- grids


@st.composite
def scans(draw, max_dims=4):
    """Sizes in the order of the file, and the dimensions from the slowest to the fastest."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=max_dims))
    return sizes, draw(st.permutations(range(len(sizes))))


def relabelled(indices, draw_values):
    """Replace the indices 0, 1, 2 … of each dimension by other numbers, all different."""
    return np.stack([np.asarray(draw_values[dim])[indices[:, dim]] for dim in range(indices.shape[1])], axis=1)


def naive_is_regular(indices):
    """Try every order of the dimensions, and take the numbers along each as they appear."""
    ranks = []
    for column in indices.T:
        seen = list(dict.fromkeys(column.tolist()))
        ranks.append([seen.index(number) for number in column.tolist()])
    sizes = [max(rank) + 1 for rank in ranks]
    points = list(zip(*ranks, strict=True))
    for speed in itertools.permutations(range(len(sizes))):
        full = itertools.product(*(range(sizes[dim]) for dim in speed))
        if points == [tuple(point[speed.index(dim)] for dim in range(len(sizes))) for point in full]:
            return True
    return False


@pytest.mark.parametrize("piece_bytes", [1, 100, 4 * 2**20])
@pytest.mark.parametrize("axis", ["position", "spectroscopic"])
@given(scan=scans(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_full_grid_in_any_order_is_regular(axis, piece_bytes, scan, data):
    sizes, speed = scan
    numbers = [data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n, unique=True)) for n in sizes]
    plain, values = grid_points([("d", "u", np.linspace(0, 1, n)) for n in sizes], speed)
    with h5py.File("memory.h5", "w", driver="core", backing_store=False) as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazyproc.hdf5.grid._PIECE_BYTES", piece_bytes)
        grid = grid_of(file, relabelled(plain, numbers), values, axis, chunks=data.draw(st.sampled_from([None, True])))
    assert grid.is_regular
    assert grid.sizes == tuple(sizes)
    assert grid.length == len(plain)
    assert sorted(grid.order) == list(range(len(sizes)))
    shape, axes = nd_shape_and_axes(grid)
    assert shape == grid.shape
    points = np.arange(len(plain)).reshape(shape).transpose(axes)
    assert points.shape == tuple(sizes)
    for place in np.ndindex(*sizes):
        assert plain[points[place]].tolist() == list(place)
        found = [coordinates[step] for coordinates, step in zip(grid.coordinates, place, strict=True)]
        np.testing.assert_array_equal(found, values[points[place]])


@pytest.mark.parametrize("piece_bytes", [20, 4 * 2**20])
@given(
    indices=st.integers(1, 3).flatmap(
        lambda n_dims: st.lists(st.tuples(*[st.integers(0, 2)] * n_dims), min_size=1, max_size=8)
    )
)
@example([(0, 0), (1, 1), (2, 2)])
@example([(0, 0), (0, 1), (1, 1), (1, 0)])
@example([(0, 0), (0, 1), (1, 0)])
@example([(0, 0), (0, 0), (1, 1), (1, 1)])
@example([(1,), (1,)])
@example([(0, 0), (0, 1), (0, 0), (0, 1)])
@settings(max_examples=150, deadline=None)
def test_a_grid_is_regular_exactly_if_a_naive_search_says_so(piece_bytes, indices):
    indices = np.array(indices, np.uint16)
    values = indices * 1.5 + np.arange(len(indices))[:, None]
    with h5py.File("memory.h5", "w", driver="core", backing_store=False) as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazyproc.hdf5.grid._PIECE_BYTES", piece_bytes)
        grid = grid_of(file, indices, values)
    assert grid.is_regular == naive_is_regular(indices)
    assert grid.sizes == tuple(len(np.unique(column)) for column in indices.T)
    if not grid.is_regular:
        np.testing.assert_array_equal(np.stack(grid.coordinates, 1), values)
        with pytest.raises(ArgumentValueError, match="do not form a full grid"):
            nd_shape_and_axes(grid)


def test_disordered_and_incomplete_rows_are_not_regular(tmp_path):
    for keep in ([0, 2, 1, *range(3, 20)], list(range(19)), [*range(19), 18], list(range(0, 20, 6))):
        path, name = make_usid_file(tmp_path / "a.h5", keep=keep)
        with h5py.File(path, "r") as file:
            grid = position_grid(file[name])
            assert not grid.is_regular
            np.testing.assert_array_equal(np.stack(grid.coordinates, 1), usid.ancillary_handles(file[name])[1][:])


def test_a_scan_that_runs_backwards_is_regular_with_falling_coordinates(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5", keep=list(range(19, -1, -1)))
    with h5py.File(path, "r") as file:
        grid = position_grid(file[name])
    assert grid.is_regular
    np.testing.assert_array_equal(grid.coordinates[0], np.linspace(0, 1, 5, dtype="f4")[::-1])


def test_values_that_depend_on_another_dimension_come_as_a_full_column(memory):
    indices, values = grid_points([("Cycle", "", 2), ("Bias", "V", 3)], (0, 1))
    values[3:, 1] += 0.5
    grid = grid_of(memory, indices, values, "spectroscopic")
    assert grid.is_regular
    np.testing.assert_array_equal(grid.coordinates[0], [0, 1])
    np.testing.assert_array_equal(grid.coordinates[1], values[:, 1])


def test_a_single_step_whose_value_drifts_keeps_its_full_column(memory):
    indices, values = grid_points([("Time", "s", 1), ("X", "m", 4)], (0, 1))
    values[:, 0] = [0.0, 0.1, 0.2, 0.3]
    grid = grid_of(memory, indices, values)
    assert (grid.is_regular, grid.sizes) == (True, (1, 4))
    np.testing.assert_array_equal(grid.coordinates[0], values[:, 0])


def test_values_that_were_not_recorded_do_not_make_a_dimension_dependent(memory):
    indices, values = grid_points([("Y", "m", 2), ("X", "m", [1, np.nan, 3])], (0, 1))
    grid = grid_of(memory, indices, values)
    np.testing.assert_array_equal(grid.coordinates[1], [1, np.nan, 3])


def test_repeated_labels_become_different(memory):
    indices, values = grid_points([("", "", 2)] * 5, range(5))
    grid = grid_of(memory, indices, values, labels=["X", "X_2", "X", "Y", "X"])
    assert grid.labels == ("X", "X_2", "X_3", "Y", "X_4")


def test_an_axis_has_one_of_two_names(memory):
    with pytest.raises(ArgumentValueError, match="expected one of"):
        grid_of(memory, np.zeros((1, 1), int), np.zeros((1, 1)), axis="rows")


# ---- creation


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        ([], "Raw-Fit_000"),
        (["Raw-Fit_000", "Raw-Fit_004", "Raw"], "Raw-Fit_005"),
        (
            ["Raw-Fit_extra_003", "Raw-Fits_002", "Raw-My_Fit_001", "My_Raw-Fit_007", "Raw-Fit_", "Raw-Fit"],
            "Raw-Fit_000",
        ),
        (["Raw-Fit_999"], "Raw-Fit_1000"),
    ],
)
def test_groups_are_numbered_by_their_exact_name(existing, expected):
    assert create.group_name("/Measurement_000/Raw", "Fit", existing) == expected


def test_a_dash_in_the_process_name_becomes_an_underscore():
    assert create.group_name("Raw", "a-b", ["Raw-a_b_000"]) == "Raw-a_b_001"


@pytest.mark.parametrize("name", ["", " ", "a/b", "a\0b"])
def test_a_process_name_that_is_no_name_of_a_group_is_refused(name):
    with pytest.raises(ArgumentValueError, match="process_name"):
        create.group_name("Raw", name, [])


def test_the_group_tells_where_it_comes_from(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file, h5py.File(path, "r+") as again, h5py.File(tmp_path / "b.h5", "w") as other:
        main = file[name]
        group = create.create_results_group(again[name].parent, main, "Peak-Fit", {"smoothing": 3})
        assert group.name == "/Measurement_000/Channel_000/Raw_Data-Peak_Fit_000"
        assert (group.attrs["tool"], group.attrs["num_source_dsets"], group.attrs["smoothing"]) == ("Peak_Fit", 1, 3)
        assert file[group.attrs["source_000"]] == main
        assert {"machine_id", "platform", "timestamp"} <= set(group.attrs)
        assert "source_file_path" not in group.attrs
        elsewhere = create.create_results_group(other, main, "Peak-Fit", {})
        assert "source_000" not in elsewhere.attrs
        assert elsewhere.attrs["source_file_path"] == str(Path(path).resolve())
        assert elsewhere.attrs["source_dataset_path"] == name


def test_a_file_that_is_open_for_reading_is_refused(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r") as file, pytest.raises(ReadOnlyFileError, match=r"r\+"):
        create.create_results_group(file, file[name], "Fit", {})


OUTPUTS = {
    "Scalar": Output("f4", quantity="Height", units="µm"),
    "Row": Output("f8", dims=[Dimension("Parameter", "a.u.", 4)]),
    "Map": Output("i2", dims=[Dimension("Länge", "µm", [1, 2.5]), Dimension("B", "", 3)], fill_value=-7),
    "Fields": Output([("a", "f4"), ("b", "?"), ("c", "S3")], dims=[Dimension("P", "", 2)]),
    "Filtered": Output("c8", shape_from_main=True),
    "Flag": Output("?"),
}


def resolved(name, n_spectral):
    return OUTPUTS[name].resolve(name, n_spectral)


@pytest.mark.parametrize("driver", ["plain", "core", "fileobj"])
@pytest.mark.parametrize("same_file", [True, False])
def test_outputs_are_main_datasets_with_their_place_in_the_file(tmp_path, same_file, driver):
    path, name = make_4d_file(tmp_path / "a.h5")
    target_path = path if same_file else str(tmp_path / "b.h5")
    with open(target_path, "r+b" if same_file else "w+b") as raw:
        place = raw if driver == "fileobj" else target_path
        options = {"driver": "core"} if driver == "core" else {}
        with (
            h5py.File(place, "r+" if same_file else "w", **options) as target,
            h5py.File(path, "r") if (not same_file) else target as source,
        ):
            check_outputs(target, source[name], same_file)


def check_outputs(target, main, same_file):
    group = create.create_results_group(target, main, "Fit", {})
    n_positions, n_spectral = main.shape
    for name in OUTPUTS:
        output = resolved(name, n_spectral)
        dataset = create.create_output(group, main, output, same_file=same_file)
        creation = dataset.id.get_create_plist()
        assert dataset.chunks is None
        assert dataset.id.get_offset() is not None
        assert creation.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
        assert (dataset.shape, dataset.dtype) == ((n_positions, output.width), output.dtype)
        assert dataset[:].tobytes() == np.full(dataset.shape, output.fill_value, output.dtype).tobytes()
        described = usid.main_dataset(dataset)
        assert (described.quantity, described.units) == (output.quantity, output.units)
        assert described.position.indices.name.startswith("/Measurement_000") == same_file
        np.testing.assert_array_equal(position_grid(dataset).coordinates[0], position_grid(main).coordinates[0])
        grid = spectroscopic_grid(dataset)
        assert grid.is_regular
        dims = output.dims or ((Dimension("Single_Value", "a.u.", 1),) if output.shape == () else ())
        if output.spec.shape_from_main:
            assert grid.labels == spectroscopic_grid(main).labels
            assert described.spectroscopic.indices.name.startswith("/Measurement_000") == same_file
        else:
            assert grid.labels == tuple(dim.name for dim in dims)
            assert grid.units == tuple(dim.units for dim in dims)
            assert nd_shape_and_axes(grid)[0] == tuple(dim.size for dim in dims)
            for dim, coordinates in zip(dims, grid.coordinates, strict=True):
                np.testing.assert_array_equal(coordinates, dim.values)
        assert dataset.attrs.get("lazyproc_scalar", False) == (output.shape == ())
    assert ("Position_Indices" in group) == (not same_file)
    with pytest.raises(ResultsError, match="Scalar"):
        create.create_output(group, main, resolved("Scalar", n_spectral), same_file=same_file)


@pytest.mark.parametrize("fill", [None, b"", b"ab", b"abcd", b"\xff\xfe"])
@pytest.mark.parametrize(
    "dtype", ["S4", "S1", "S40", np.dtype([("Name", "S4"), ("Names", "S3", (2,)), ("N", "f4")])], ids=str
)
def test_bytes_as_a_fill_value(tmp_path, dtype, fill):
    """HDF5 once got the address of the bytes: what lay in memory there was shown, and written into the file."""
    fill = fill if fill is None else fill[: 1 if dtype == "S1" else 4]
    value = fill if fill is None or isinstance(dtype, str) else (fill, fill[:3], -1)
    output = Output(dtype, [Dimension("N", "", 3)], fill_value=value).resolve("Texts", 6)
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        create.create_output(file[name].parent, file[name], output, same_file=True)
    with h5py.File(path, "r") as file:
        dataset = file[name].parent["Texts"]
        assert np.asarray(dataset.fillvalue, dtype).tobytes() == output.fill_value.tobytes()
        assert dataset[:].tobytes() == output.fill_value.tobytes() * dataset.size


def test_copies_hold_the_same_in_another_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lazyproc.hdf5.grid._PIECE_BYTES", 48)
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file, h5py.File(tmp_path / "b.h5", "w") as other:
        source = usid.ancillary_handles(file[name])[0]
        source.attrs["incomplete_dimensions"] = np.array([b"X"])
        source.attrs["X"] = source.regionref[:, 0]
        source.attrs["points"] = np.array([source.ref], h5py.ref_dtype)
        source.attrs["nothing"] = h5py.Empty("f4")
        create.create_output(other, file[name], resolved("Filtered", 6), same_file=False)
        for copy, original in zip(
            usid.ancillary_handles(other["Filtered"]), usid.ancillary_handles(file[name]), strict=True
        ):
            assert copy.dtype == original.dtype
            np.testing.assert_array_equal(copy[:], original[:])
            assert usid.read_texts(copy.attrs["units"]) == usid.read_texts(original.attrs["units"])
        assert set(other["Position_Indices"].attrs) == {"labels", "units", "incomplete_dimensions", "nothing"}


def test_a_large_output_is_allocated_without_being_written(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        wide = Output("f4", dims=[Dimension("Parameter", "", create.LARGEST_FILLED // 80 + 1)]).resolve("Wide", 6)
        dataset = create.create_output(file[name].parent, file[name], wide, same_file=True)
        assert dataset.id.get_create_plist().get_fill_time() == h5py.h5d.FILL_TIME_NEVER
        assert np.isnan(dataset.fillvalue)
        end = dataset.id.get_offset() + dataset.shape[0] * wide.row_bytes
        dataset[-1, -1] = 4
        file.flush()
        assert Path(path).stat().st_size >= end


@pytest.mark.parametrize("n_positions", [1, 1000, 3 * 2**20 + 5])
def test_a_status_mask_starts_with_zeros_even_in_freed_space(tmp_path, n_positions):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["old"] = np.full(n_positions, 255, np.uint8)
        file["last"] = 1
        file.flush()
        del file["old"]
        mask = create.create_status_mask(file, n_positions, "completed_positions")
        assert (mask.shape, mask.dtype, mask.chunks) == ((n_positions,), np.uint8, None)
        offset = mask.id.get_offset()
        assert offset is not None
        assert not mask[:].any()
    with open(tmp_path / "a.h5", "rb") as raw:
        raw.seek(offset)
        assert not any(raw.read(n_positions))


@pytest.mark.parametrize("texts", [["X", "µm"], [""], ["日本", ""], ["a" * 300]])
def test_texts_are_written_so_that_they_come_back(memory, texts):
    create.write_texts(memory.attrs, "labels", texts)
    assert usid.read_texts(memory.attrs["labels"]) == tuple(texts)
    assert memory.attrs["labels"].dtype.kind == "S"


def test_the_builder_writes_shared_data_that_differ(tmp_path):
    path, _ = make_shared_file(tmp_path / "a.h5", 2, dtype="c8", chunks=(3, 6), compression="gzip")
    with h5py.File(path, "r") as file:
        first, second = (file[name] for name in names_of_mains(file))
        assert (first.dtype, first.chunks, first.compression) == (np.dtype("c8"), (3, 6), "gzip")
        assert not np.array_equal(first[:], second[:])


def test_an_output_of_several_dimensions_runs_through_them_slowest_first(memory):
    indices, values = grid_points([("X", "m", 3)], (0,))
    positions = write_ancillary(memory, "Position", indices, values, ["X"], ["m"])
    spectroscopic = write_ancillary(memory, "Spectroscopic", indices.T, values.T, ["V"], ["V"])
    main = write_main(memory, "Raw", np.zeros((3, 3)), positions, spectroscopic)
    create.create_output(memory, main, resolved("Map", 3), same_file=True)
    assert memory["Map_Spectroscopic_Indices"].dtype == np.uint32
    assert memory["Map_Spectroscopic_Values"].dtype == np.float64
    np.testing.assert_array_equal(memory["Map_Spectroscopic_Indices"], [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]])
    np.testing.assert_array_equal(memory["Map_Spectroscopic_Values"], [[1, 1, 1, 2.5, 2.5, 2.5], [0, 1, 2, 0, 1, 2]])
