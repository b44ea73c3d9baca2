"""Lazy N-D views: the numbers that a run gives, read where committed, else computed, and only when asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import h5py
import numpy as np
import pytest
import xarray
from hypothesis import given
from hypothesis import strategies as st
from usid_files import (
    CHANNEL,
    grid_points,
    make_4d_file,
    make_compound_file,
    make_sparse_file,
    make_usid_file,
    random_data,
    real_file,
    write_ancillary,
    write_main,
)

import lazyproc
from lazyproc import Dimension, FunctionError, Output, Process, StaleViewError
from lazyproc.layout import block_grid
from lazyproc.loading import load_process
from lazyproc.views import Committed


class Counted(Process):
    """Leaves a byte in a file for each call, so that calls in other processes count, too."""

    process_name = "Counted"
    outputs = {
        "Mean": Output("f8", quantity="Current", units="nA"),
        "Ends": Output("f4", dims=[Dimension("End", "V", [-2, 2])], units="nA"),
        "Twice": Output("f8", shape_from_main=True, units="nA"),
    }

    @staticmethod
    def _map_function(spectrum, counter=None):
        note_call(counter)
        return {"Mean": spectrum.mean(dtype=float), "Ends": spectrum[[0, -1]], "Twice": 2 * spectrum}


class Never(Process):
    process_name = "Never"
    outputs = {"Mean": Output("f8")}

    @staticmethod
    def _map_function(spectrum):
        raise AssertionError("this must not be called")


def note_call(counter: str | None) -> None:
    if counter is not None:
        descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b".")
        os.close(descriptor)


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    """A file that holds a byte for each call of the function."""
    path = tmp_path / "calls"
    path.touch()
    return path


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut views into blocks of a few positions, as only large files would be."""
    monkeypatch.setattr("lazyproc.layout._BLOCK_BYTES", 400)


@contextlib.contextmanager
def nothing_may_run() -> Iterator[None]:
    """Let every computation of Dask fail."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        yield


def assert_same(view: xarray.Dataset, results: xarray.Dataset) -> None:
    """Compare a view of a process with what is in the file: variables, coordinates, units."""
    view, results = view.compute(), results.compute()
    xarray.testing.assert_equal(view, results.drop_vars("status"))
    for name, variable in view.variables.items():
        assert variable.dtype == results[name].dtype
        assert variable.attrs == results[name].attrs
        assert variable.dims == results[name].dims


def make_nd_file(path: Path, sizes: Sequence[int], speed: Sequence[int], dtype: Any = "f4") -> str:
    """Write a scan over any number of position dimensions, `speed` from the slowest to the fastest."""
    dims = [(f"P{number}", "nm", np.linspace(0, 1, size)) for number, size in enumerate(sizes)]
    points, values = grid_points(dims, speed)
    columns, column_values = grid_points([("Bias", "V", 5)], [0])
    with h5py.File(path, "w") as file:
        group = file.create_group(CHANNEL)
        labels = [label for label, _, _ in dims]
        positions = write_ancillary(group, "Position", points, values, labels, ["nm"] * len(dims))
        spectral = write_ancillary(group, "Spectroscopic", columns.T, column_values.T, ["Bias"], ["V"])
        write_main(group, "Raw_Data", random_data((len(points), 5), dtype), positions, spectral)
    return f"{path}::{CHANNEL}/Raw_Data"


def address_of(made: tuple[str, str]) -> str:
    return "::".join(made)


# --- form: dimensions, coordinates, units, attributes ----------------------------------------------------------------


def test_dimensions_coordinates_units_and_attributes(tmp_path):
    address = address_of(make_usid_file(tmp_path / "a.h5", n_rows=3, n_cols=4, n_spectral=6))
    view = Counted(address).to_xarray()
    assert dict(view.sizes) == {"X": 4, "Y": 3, "End": 2, "Bias": 6}
    assert view["Mean"].dims == ("X", "Y")
    assert view["Ends"].dims == ("X", "Y", "End")
    assert view["Twice"].dims == ("X", "Y", "Bias")
    np.testing.assert_allclose(view["X"], np.linspace(0, 1, 4), rtol=1e-6)
    np.testing.assert_allclose(view["Bias"], np.linspace(-2, 2, 6), rtol=1e-6)
    np.testing.assert_array_equal(view["End"], [-2, 2])
    assert [view[name].attrs["units"] for name in ("X", "Y", "End", "Bias")] == ["nm", "µm", "V", "V"]
    assert view["Mean"].attrs == {"long_name": "Current", "units": "nA"}
    assert view.attrs == {"tool": "Counted"}
    assert {view[name].dtype.str for name in ("Mean", "Twice")} == {"<f8"}


def test_results_come_in_the_order_of_declaration_and_parameters_first(tmp_path):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    outputs = {name: Output("f8") for name in ("Zero", "Area", "Mid")}
    group = lazyproc.map_positions(
        lambda x: (0, 1, 2), address, outputs, process_name="Three", params={"window": 3}, cores=1
    )
    found = lazyproc.open_results(group)
    assert list(found.data_vars) == [*outputs, "status"]
    assert next(iter(found.attrs)) == "window"
    assert found.attrs["lazyproc_function"].endswith("<lambda>")
    assert not {"lazyproc_seal", "lazyproc_places", "lazyproc_probe"} & set(found.attrs)


SCANS = [
    ((6,), (0,)),
    ((3, 4), (1, 0)),
    ((3, 4), (0, 1)),
    ((2, 3, 4), (2, 1, 0)),
    ((2, 3, 4), (1, 2, 0)),
    ((4, 1, 3), (0, 1, 2)),
    ((2, 3, 2, 4), (3, 2, 1, 0)),
    ((2, 3, 2, 4), (2, 0, 3, 1)),
]


@pytest.mark.parametrize(("sizes", "speed"), SCANS)
def test_a_view_equals_the_results_and_what_pyusid_makes_of_them(tmp_path, small_blocks, sizes, speed):
    address = make_nd_file(tmp_path / "a.h5", sizes, speed)
    process = Counted(address, cores=1)
    before = process.to_xarray().compute()
    with Counted(address, cores=1) as process:
        group = process.compute()
        assert_same(process.to_xarray(), lazyproc.open_results(group))
        assert_same(before, lazyproc.open_results(group))
        raw = group.parent["Raw_Data"][()]
        order = [f"P{number}" for number in speed]
        flat = before["Mean"].transpose(*order).to_numpy().ravel()
        np.testing.assert_allclose(flat, raw.mean(1, dtype=float))
        for name in ("Mean", "Ends", "Twice"):
            assert before[name].dims[: len(sizes)] == tuple(f"P{number}" for number in range(len(sizes)))
            theirs = pyusid_form(group[name])
            np.testing.assert_array_equal(before[name].to_numpy().squeeze(), theirs.squeeze())


def pyusid_form(dataset: h5py.Dataset) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyUSID = pytest.importorskip("pyUSID")
        return np.asarray(pyUSID.USIDataset(dataset).get_n_dim_form())


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    most=st.integers(1, 200),
)
def test_blocks_of_a_grid_are_runs_of_rows_and_rectangles(sizes, most):
    grid = block_grid(sizes, most)
    numbers = np.arange(np.prod(sizes)).reshape(sizes)
    seen = []
    for block_id in np.ndindex(*(len(chunks) for chunks in grid.chunks)):
        start, stop = grid.span(block_id)
        assert 1 <= stop - start <= most
        corner = [sum(chunks[:number]) for chunks, number in zip(grid.chunks, block_id, strict=True)]
        shape = grid.block_shape(block_id)
        rectangle = numbers[tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))]
        np.testing.assert_array_equal(rectangle, np.arange(start, stop).reshape(shape))
        seen.append((start, stop))
    assert [start for start, _ in seen] == [0, *(stop for _, stop in seen[:-1])]
    assert seen[-1][1] == numbers.size
    assert grid.chunks == tuple(map(tuple, grid.chunks))


def test_sparse_positions_stay_flat_with_their_coordinates(tmp_path, small_blocks):
    address = address_of(make_sparse_file(tmp_path / "a.h5", 9))
    with Counted(address, cores=1) as process:
        view = process.to_xarray()
        assert view["Mean"].dims == ("position",)
        assert view["X"].dims == view["Y"].dims == ("position",)
        np.testing.assert_array_equal(view["X"], process.h5_main.parent["Position_Values"][:, 0])
        view = view.compute()
        np.testing.assert_allclose(view["Mean"], process.h5_main[()].mean(1, dtype=float))
        assert_same(view, lazyproc.open_results(process.compute()))


def test_a_full_grid_in_disorder_stays_flat(tmp_path):
    order = np.random.default_rng(3).permutation(20)
    address = address_of(make_usid_file(tmp_path / "a.h5", keep=order))
    view = Counted(address).to_xarray()
    assert dict(view.sizes) == {"position": 20, "End": 2, "Bias": 6}
    assert view["X"].dims == ("position",)


@pytest.mark.parametrize("order", ["XY", "YX"])
def test_two_spectroscopic_dimensions(tmp_path, small_blocks, order):
    address = address_of(make_4d_file(tmp_path / "a.h5", n_cycles=3, n_bias=4, order=order))
    with Counted(address, cores=1) as process:
        view = process.to_xarray()
        assert view["Twice"].dims == (*order, "Cycle", "Bias")
        assert view["Cycle"].attrs == {"units": ""}
        group = process.compute()
        assert_same(view, lazyproc.open_results(group))
        np.testing.assert_array_equal(view["Twice"], pyusid_form(group["Twice"]))


def test_spectroscopic_dimensions_of_which_the_first_is_the_fastest(tmp_path, small_blocks):
    path, name = make_usid_file(tmp_path / "a.h5", n_spectral=6)
    fast, slow = np.tile([0, 1], 3), np.repeat([0, 1, 2], 2)
    with h5py.File(path, "r+") as file:
        group, main = file[CHANNEL], file[name]
        indices = np.stack([fast, slow])
        pair = write_ancillary(group, "Other", indices, indices, ["Fast", "Slow"], ["", ""])
        for what, dataset in zip(("Indices", "Values"), pair, strict=True):
            main.attrs[f"Spectroscopic_{what}"] = dataset.ref
    with Counted(f"{path}::{name}", cores=1) as process:
        view = process.to_xarray()
        assert view["Twice"].dims == ("X", "Y", "Fast", "Slow")
        group = process.compute()
        assert_same(view, lazyproc.open_results(group))
        np.testing.assert_array_equal(view["Twice"], pyusid_form(group["Twice"]))


PAIR = np.dtype([("Amplitude", "f4"), ("Count", "i2")])


class Forms(Process):
    """Outputs of all shapes, whose dimensions have names in common: equal, different, and taken by others."""

    process_name = "Forms"
    outputs = {
        "Zeta": Output("f4", dims=[Dimension("Parameter", "", 3)]),
        "Alpha": Output("f4", dims=[Dimension("Parameter", "", 2)]),
        "Loop": Output("f4", dims=[Dimension("Field", "T", [1, 5]), Dimension("Repeat", "", 3)]),
        "Other": Output("i8", dims=[Dimension("Repeat", "", 3)]),
        "Pair": Output(PAIR),
        "Pairs": Output(PAIR, dims=[Dimension("Cycles", "", 2)]),
        "One": Output("f4", dims=[Dimension("Single", "", 1)]),
        "X": Output("f4", units="V"),
        "status": Output("i4", dims=[Dimension("Y", "", 2), Dimension("Bias", "", 2)]),
        "Flag": Output("?"),
        "Same": Output("f4", shape_from_main=True),
    }

    @staticmethod
    def _map_function(spectrum):
        first = spectrum[0]
        return {
            "Zeta": first * np.arange(3),
            "Alpha": first * np.arange(2),
            "Loop": first * np.arange(6).reshape(2, 3),
            "Other": np.arange(3),
            "Pair": np.array((first, 3), PAIR),
            "Pairs": np.array([(first, 3), (-first, 4)], PAIR),
            "One": [first],
            "X": -first,
            "status": [[1, 2], [3, 4]],
            "Flag": first > 0,
            "Same": spectrum,
        }


def test_outputs_of_all_shapes_share_and_part_their_dimensions(tmp_path, small_blocks):
    address = address_of(make_usid_file(tmp_path / "a.h5", n_rows=3, n_cols=4))
    with Forms(address, cores=1) as process:
        view = process.to_xarray()
        scan = view["Flag"].dims
        dims = {name: view[name].dims[2:] for name in Forms.outputs}
        assert dims == {
            "Zeta": ("Zeta_Parameter",),
            "Alpha": ("Alpha_Parameter",),
            "Loop": ("Field", "Repeat"),
            "Other": ("Repeat",),
            "Pair": (),
            "Pairs": ("Cycles",),
            "One": ("Single",),
            "X": (),
            "status": ("status_Y", "status_Bias"),
            "Flag": (),
            "Same": ("Same_Bias",),
        }
        assert scan == ("X_2", "Y"), "an output took the name X"
        results = lazyproc.open_results(process.compute()).compute()
        assert (results["completed_positions"] == 1).all(), "an output took the name status"
        view = view.compute()
        xarray.testing.assert_equal(view, results.drop_vars("completed_positions"))
        first = process.h5_main[:, 0].reshape(3, 4).T
        np.testing.assert_array_equal(view["Pairs"].to_numpy()["Amplitude"], np.stack([first, -first], -1))
        np.testing.assert_allclose(view["Loop"], first[..., None, None] * np.arange(6.0).reshape(2, 3), rtol=1e-6)


def test_dimensions_are_called_the_same_whatever_the_order_of_declaration(tmp_path):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    outputs = dict(reversed(Forms.outputs.items()))
    turned = type("Turned", (Forms,), {"outputs": outputs})
    one, other = Forms(address).to_xarray(), turned(address).to_xarray()
    assert {name: one[name].dims for name in outputs} == {name: other[name].dims for name in outputs}


def test_a_compound_main_dataset(tmp_path, small_blocks):
    address = address_of(make_compound_file(tmp_path / "a.h5"))
    outputs = {"Phase": Output("f8"), "All": Output(np.dtype([("Amplitude", "f4"), ("Phase", "f8"), ("Count", "i2")]))}
    lazy = lazyproc.map_positions(first_of_compound, address, outputs, process_name="First", lazy=True)
    results = lazyproc.open_results(lazyproc.map_positions(first_of_compound, address, outputs, process_name="First"))
    assert_same(lazy, results)


def first_of_compound(spectrum):
    return spectrum["Phase"][0], spectrum[0]


def test_columns_without_an_n_d_form_are_one_dimension_that_filters_share(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5", n_spectral=5)
    with h5py.File(path, "r+") as file:
        indices = np.array([[0, 0, 1, 1, 2], [0, 1, 0, 1, 0]])
        pair = write_ancillary(file[CHANNEL], "Odd", indices, indices / 2, ["Cycle", "Bias"], ["", "V"])
        for what, dataset in zip(("Indices", "Values"), pair, strict=True):
            file[name].attrs[f"Spectroscopic_{what}"] = dataset.ref
    outputs = {"Up": Output("f4", shape_from_main=True), "Down": Output("f4", shape_from_main=True)}
    lazy = lazyproc.map_positions(up_and_down, f"{path}::{name}", outputs, lazy=True)
    assert lazy["Up"].dims == lazy["Down"].dims == ("X", "Y", "spectral")
    np.testing.assert_array_equal(lazy["Bias"], [0, 0.5, 0, 0.5, 0])
    assert_same(lazy, lazyproc.open_results(lazyproc.map_positions(up_and_down, f"{path}::{name}", outputs)))


def up_and_down(spectrum):
    return spectrum + 1, spectrum - 1


# --- lazy: nothing runs until it is asked for ------------------------------------------------------------------------


def test_nothing_is_computed_until_it_is_asked_for(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5", chunks=(4, 6), compression="gzip")
    with nothing_may_run():
        with Never(f"{path}::{name}", lazy=True) as process:
            view = process.to_xarray()
            process.plan()
            assert process.data.shape == (20, 6)
            repr(process), repr(view), process._repr_html_(), view._repr_html_()
            assert view["Mean"].T.mean("X").dims == ("Y",)
        view = lazyproc.map_positions(Never._map_function, f"{path}::{name}", {"Mean": Output("f8")}, lazy=True)
        with pytest.raises(AssertionError, match="something was computed"):
            view.compute()
    with pytest.raises(FunctionError, match="this must not be called"):
        view.compute(scheduler="synchronous")


def test_lazy_on_a_read_only_file_looks_and_writes_nothing(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    path, name = make_usid_file(folder / "a.h5")
    content = Path(path).read_bytes()
    os.chmod(path, stat.S_IRUSR)
    os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR)
    try:
        with h5py.File(path, "r") as file:
            for main in (f"{path}::{name}", file[name]):
                process = Counted(main, lazy=True)
                assert process.plan().action == "start"
                expected = file[name][7].mean(dtype=float)
                assert process.test(7)["Mean"] == pytest.approx(expected)
                assert process.to_xarray()["Mean"].transpose("Y", "X").to_numpy().flat[7] == pytest.approx(expected)
                np.testing.assert_array_equal(process.data.compute(), file[name][()])
                process.close()
    finally:
        os.chmod(folder, stat.S_IRWXU)
    assert os.listdir(folder) == ["a.h5"]
    assert Path(path).read_bytes() == content


@pytest.mark.parametrize("storage", [{}, {"chunks": (8, 3)}, {"chunks": (8, 6), "compression": "gzip"}])
def test_data_is_a_dask_array_of_whole_spectra(tmp_path, small_blocks, storage):
    path, name = make_usid_file(tmp_path / "a.h5", n_rows=10, **storage)
    with Counted(f"{path}::{name}", lazy=True) as process:
        data = process.data
        assert data is process.data, "made once"
        assert data.chunks[1] == (6,)
        assert len(data.chunks[0]) > 1
        if storage:
            assert all(size % 8 == 0 for size in data.chunks[0][:-1]), "blocks end where storage chunks end"
        expected = process.h5_main[()]
    np.testing.assert_array_equal(data.compute(scheduler="threads"), expected)
    np.testing.assert_array_equal(data[13:29].compute(scheduler="synchronous"), expected[13:29])
    assert Counted(f"{path}::{name}").data is None


# --- one definition, both ways: read what is committed, compute the rest ---------------------------------------------


def test_what_is_committed_is_read_and_not_computed_again(tmp_path, counter, small_blocks):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    with Counted(address, parms_dict={"counter": str(counter)}, cores=1) as process:
        process.to_xarray().compute()
        assert counter.stat().st_size == 20, "three outputs together: once a position"
        early = process.to_xarray()
        process.compute()
        n_calls = counter.stat().st_size
        view = process.to_xarray().compute()
        assert counter.stat().st_size == n_calls
        assert_same(view, lazyproc.open_results(process.h5_results_grp))
        early.compute()
        assert counter.stat().st_size == n_calls + 20, "made before the run, it knows of no results"


def test_of_a_partial_group_the_done_are_read_and_the_others_computed(tmp_path, counter, small_blocks):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    missing = [0, 3, 4, 19]
    with Counted(address, parms_dict={"counter": str(counter)}, cores=1) as process:
        name = process.compute().name
        expected = process.to_xarray().compute()
    with h5py.File(address.partition("::")[0], "r+") as file:
        file[name]["completed_positions"][missing] = 0
        file[name]["Twice"][missing] = np.full((4, 6), 77.0)
    n_calls = counter.stat().st_size
    with Counted(address, parms_dict={"counter": str(counter)}, cores=1) as process:
        assert [group.name for group in process.partial_h5_groups] == [name]
        view = process.to_xarray()
        xarray.testing.assert_equal(view.compute(), expected)
        assert counter.stat().st_size == n_calls + len(missing)
        results = lazyproc.open_results(process.partial_h5_groups[0]).compute()
    status = np.ones(20)
    status[missing] = 0
    np.testing.assert_array_equal(results["status"].transpose("Y", "X").to_numpy().ravel(), status)
    assert results["status"].attrs["flag_meanings"] == "not_done done"
    for output in Counted.outputs:
        xarray.testing.assert_equal(results[output], expected[output].where(results["status"] == 1))


def as_others_leave_them(folder, last_pixel, **masks):
    """Take out of results what lazyproc knows them by; return what they were, and what they are shown as then."""
    address = address_of(make_usid_file(folder / "a.h5"))
    name, path = str(lazyproc.map_positions(np.mean, address, {"Mean": Output("f8")}).name), address.partition("::")[0]
    before = lazyproc.open_results(f"{path}::{name}").compute()["Mean"]
    with h5py.File(path, "r+") as file:
        group = file[name]
        for one in [one for one in group.attrs if one.startswith("lazyproc_")]:
            del group.attrs[one]
        del group["completed_positions"]
        for mask, values in masks.items():
            group.create_dataset(mask, data=values)
        group.attrs["last_pixel"] = last_pixel
    return before, lazyproc.open_results(f"{path}::{name}").compute()


@pytest.mark.parametrize("n_done", [0, 12, 20, 25])
def test_of_old_results_without_a_mask_only_what_is_before_last_pixel_counts(tmp_path, n_done):
    """As pyUSID has left them before 0.0.5."""
    expected, results = as_others_leave_them(tmp_path, last_pixel=n_done)
    assert ("status" in results) == (n_done < 20)
    means, is_done = results["Mean"].transpose("Y", "X"), np.arange(20).reshape(4, 5) < n_done
    np.testing.assert_array_equal(means, expected.transpose("Y", "X").where(is_done))
    if n_done < 20:
        np.testing.assert_array_equal(results["status"].transpose("Y", "X"), is_done)


@pytest.mark.parametrize(("mask", "n_rows"), [("completed_guess_positions", 20), ("completed_positions", 30)])
def test_results_with_masks_of_their_own_are_shown_whatever_last_pixel_is(tmp_path, mask, n_rows):
    """Fitters of two phases set it to 0 between them; in a decomposition the mask is not that of all datasets."""
    expected, results = as_others_leave_them(tmp_path, last_pixel=0, **{mask: np.ones(n_rows, np.uint8)})
    assert "status" not in results
    np.testing.assert_array_equal(results["Mean"], expected)


def test_a_view_beside_a_retry_shows_no_rows_that_were_written_meanwhile(tmp_path, monkeypatch):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    path = address.partition("::")[0]
    group = lazyproc.map_positions(inverse, address, {"Mean": Output("f8")}, cores=1, on_error="record")
    view, rows_of, n_read = lazyproc.open_results(group), Committed._rows, []

    def torn(self, group, *args):
        rows = rows_of(self, group, *args)
        n_read.append(len(rows))
        if len(n_read) == 1:
            rows[0] = -1  # half written
            with h5py.File(path, "r+") as file:  # by the end of this piece position 0 is done
                file[group.name]["Mean"][0] = 5
                file[group.name]["position_status"][0] = 1
        return rows

    monkeypatch.setattr(Committed, "_rows", torn)
    results = view.compute(scheduler="synchronous")
    assert results["Mean"].transpose("Y", "X").to_numpy().ravel()[0] == 5
    assert len(n_read) == 2


def inverse(spectrum):
    return 1 / int(spectrum[0])


def test_the_declared_fill_value_shows_where_nothing_is_done(tmp_path):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    fills = {"One": -1, "Row": -2, "Twin": (5.0, 6), "Text": b"none"}
    outputs = {
        "One": Output("i4", fill_value=-1),
        "Row": Output("f4", dims=[Dimension("N", "", 2)], fill_value=-2),
        "Twin": Output(PAIR, fill_value=np.array((5.0, 6), PAIR)),
        "Text": Output("S4", fill_value=b"none"),
    }
    group = lazyproc.map_positions(four_forms, address, outputs, cores=1)
    with h5py.File(address.partition("::")[0], "r+") as file:
        file[group.name]["completed_positions"][...] = 0
    results = lazyproc.open_results(group).compute()
    for name, fill in fills.items():
        assert np.unique(results[name]).tolist() == [fill]


def test_texts_and_fill_values_of_a_file_are_shown_as_they_are(tmp_path):
    """What a new output may not have is no error in results that are there."""
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    group = lazyproc.map_positions(np.mean, address, {"Mean": Output("f8")}, cores=1)
    with h5py.File(address.partition("::")[0], "r+") as file:
        file[group.name]["Mean"].attrs["units"] = np.bytes_(b"a\0b")
    results = lazyproc.open_results(group).compute()
    assert results["Mean"].attrs["units"] == "a\0b"
    assert Output.stored(np.dtype("S3"), "", "", b"a\0b").fill_value.item() == b"a\0b"


def four_forms(spectrum):
    return 1, [1, 2], np.array((1.0, 2), PAIR), b"text"


def test_outputs_computed_together_call_the_function_once_a_position(tmp_path, counter, small_blocks):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    view = Counted(address, parms_dict={"counter": str(counter)}, lazy=True).to_xarray()
    assert view["Mean"].data.npartitions > 4
    dask.compute(view["Mean"].data, view["Twice"].data, view["Ends"].sum().data)
    assert counter.stat().st_size == 20
    (view["Mean"] + view["Twice"].max("Bias") + view["Ends"].isel(End=0)).compute()
    assert counter.stat().st_size == 40


@pytest.mark.parametrize("name", ["Mean", "Twice"])
def test_a_single_output_is_one_task_a_block(tmp_path, small_blocks, name):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    array = Counted(address, lazy=True).to_xarray()[name].data
    (optimised,) = dask.optimize(array)
    assert array.npartitions > 4
    assert len(optimised.__dask_graph__()) == array.npartitions


def test_a_part_of_a_view_computes_only_its_blocks(tmp_path, counter, small_blocks):
    address = address_of(make_usid_file(tmp_path / "a.h5", n_rows=20, n_cols=4))
    view = Counted(address, parms_dict={"counter": str(counter)}, lazy=True).to_xarray()
    rows_a_block = view["Mean"].chunks[1][0]
    view["Mean"].isel(Y=10).compute()
    assert counter.stat().st_size == 4 * rows_a_block < 80


def test_one_pixel_costs_few_positions_of_a_function_of_one(tmp_path, counter):
    """However little a position takes of memory, it may take long; a block function is called for larger blocks."""
    address = address_of(make_usid_file(tmp_path / "a.h5", n_rows=60, n_cols=70))
    view = Counted(address, parms_dict={"counter": str(counter)}, lazy=True).to_xarray()
    view["Mean"].isel(X=3, Y=4).compute()
    assert 0 < counter.stat().st_size <= 256
    mean = {"Mean": Output("f8")}
    of_blocks = lazyproc.map_positions(np.mean, address, mean, vectorized=True, lazy=True)
    assert of_blocks["Mean"].data.npartitions == 1
    lazyproc.map_positions(np.mean, address, mean)
    committed = lazyproc.open_results(f"{address.rpartition('/')[0]}/Raw_Data-mean_000")
    assert committed["Mean"].data.npartitions == 1


def test_a_task_travels_with_a_few_numbers_only(tmp_path, monkeypatch):
    """Else a graph of n blocks would take n times n."""
    import cloudpickle

    address = address_of(make_usid_file(tmp_path / "a.h5", n_rows=100, n_cols=100, n_spectral=2))
    sizes = []
    for block_bytes in (2**20, 64):
        monkeypatch.setattr("lazyproc.layout._BLOCK_BYTES", block_bytes)
        with Never(address, lazy=True) as process:
            tasks = [dict(array.__dask_graph__()) for array in (process.data, process.to_xarray()["Mean"].data)]
            sizes.append([max(len(cloudpickle.dumps(task)) for task in graph.values()) for graph in tasks])
    assert max(len(graph) for graph in tasks) > 1000
    assert np.max(np.subtract(sizes[1], sizes[0])) < 100


# --- a view that was left behind -------------------------------------------------------------------------------------


def test_a_view_whose_results_are_gone_fails(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with Counted(f"{path}::{name}", cores=1) as process:
        group = process.compute().name
        views = [process.to_xarray(), lazyproc.open_results(process.h5_results_grp)]
    with h5py.File(path, "r+") as file:
        del file[group]
    for view in views:
        with pytest.raises(StaleViewError, match=r"Raw_Data-Counted_000.*no longer there"):
            view.compute()
    with Counted(f"{path}::{name}", cores=1) as process:
        assert process.compute().name == group, "another group under the old name"
        fresh = process.to_xarray()
    for view in views:
        with pytest.raises(StaleViewError, match="Open the results again"):
            view["Mean"].compute()
    fresh.compute()
    os.unlink(path)
    with pytest.raises(StaleViewError, match="is gone"):
        fresh.compute()


def test_override_leaves_the_old_view_with_the_old_results(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5")
    with Counted(f"{path}::{name}", cores=1) as process:
        group = process.compute().name
        old = process.to_xarray()
        expected = old.compute()
        assert process.compute(override=True).name != group
        xarray.testing.assert_equal(old.compute(), expected)
    with h5py.File(path, "r+") as file:
        del file[group]
        file.move(f"{CHANNEL}/Raw_Data-Counted_001", group)
    with pytest.raises(StaleViewError):
        old.compute()


# --- where views work ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    from distributed import Client

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Client(n_workers=1, threads_per_worker=2, dashboard_address=":0", set_as_default=False) as client:
            yield client


STORAGE = [{}, {"chunks": (4, 6), "compression": "gzip"}]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("storage", STORAGE)
def test_views_work_in_threads_processes_and_a_cluster_after_the_process_is_closed(
    tmp_path, counter, small_blocks, client, storage
):
    address = address_of(make_usid_file(tmp_path / "a.h5", **storage))
    with Counted(address, parms_dict={"counter": str(counter)}, cores=1) as process:
        view, data = process.to_xarray(), Counted(address, lazy=True).data
        expected = process.test(range(20))["Mean"].reshape(4, 5).T
        name = process.compute().name
        partial = process.to_xarray()
        results = lazyproc.open_results(process.h5_results_grp)
        raw = process.h5_main[()]
    with h5py.File(address.partition("::")[0], "r+") as file:
        file[name]["completed_positions"][:5] = 0
    lazy = (view["Mean"].data, partial["Mean"].data, results["Mean"].data, data)
    for schedule in ({"scheduler": "threads"}, {"scheduler": "processes", "num_workers": 2}):
        of_view, of_partial, of_results, of_data = dask.compute(*lazy, **schedule)
        np.testing.assert_array_equal(of_view, expected)
        np.testing.assert_array_equal(of_partial, expected)
        np.testing.assert_array_equal(of_results[:, 1:], expected[:, 1:])
        np.testing.assert_array_equal(of_data, raw)
    n_calls = counter.stat().st_size
    for array, wanted in ((view["Mean"].data, expected), (partial["Mean"].data, expected), (data, raw)):
        np.testing.assert_array_equal(client.compute(array).result(), wanted)
    assert counter.stat().st_size == n_calls + 20 + 5


def test_a_view_from_the_callers_writable_handle(tmp_path, small_blocks):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        process = Counted(file[name], cores=1)
        view = process.to_xarray()
        file[name][3] = 5.0
        file.flush()
        for scheduler in ("threads", "processes"):
            computed = view["Mean"].transpose("Y", "X").compute(scheduler=scheduler)
            np.testing.assert_allclose(computed.to_numpy().ravel(), file[name][()].mean(1, dtype=float))
        group = process.compute()
        assert_same(process.to_xarray(), lazyproc.open_results(group))
    assert_same(view.compute(), lazyproc.open_results(f"{path}::{CHANNEL}/Raw_Data-Counted_000"))


def test_what_the_callers_handle_has_not_flushed_is_seen(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5", chunks=(20, 6), n_cols=5)
    with h5py.File(path, "r+") as file:
        file[name][3] = 5.0
        assert Counted(file[name], cores=1).to_xarray()["Mean"].transpose("Y", "X").to_numpy().flat[3] == 5.0


def test_a_view_of_a_file_in_memory(tmp_path, small_blocks, counter):
    path, name = make_usid_file(tmp_path / "a.h5")
    with h5py.File(path, "r+", driver="core", backing_store=False) as file:
        process = Counted(file[name], parms_dict={"counter": str(counter)}, cores=1)
        expected = process.to_xarray().compute(scheduler="threads")
        group = process.compute()
        n_calls = counter.stat().st_size
        view, results = process.to_xarray(), lazyproc.open_results(group)
        xarray.testing.assert_equal(view.compute(scheduler="threads"), expected)
        xarray.testing.assert_equal(results.compute(scheduler="threads").drop_vars("status"), expected)
        assert counter.stat().st_size == n_calls
        del file[group.name]
        with pytest.raises(StaleViewError):
            view.compute(scheduler="threads")
    with pytest.raises(StaleViewError):
        results.compute(scheduler="threads")


def test_a_view_of_results_in_another_file(tmp_path, counter, small_blocks):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    options = {"parms_dict": {"counter": str(counter)}, "cores": 1, "h5_target_group": f"{tmp_path / 'b.h5'}::/fits"}
    with Counted(address, **options) as process:
        expected = process.to_xarray().compute()
        group = process.compute()
        n_calls = counter.stat().st_size
        xarray.testing.assert_equal(process.to_xarray().compute(), expected)
        assert counter.stat().st_size == n_calls
        os.unlink(tmp_path / "a.h5")
        assert_same(expected, lazyproc.open_results(group))


def test_a_view_of_a_class_in_a_file_works_in_other_processes(tmp_path, small_blocks):
    (tmp_path / "elsewhere.py").write_text(
        "import numpy as np\nimport lazyproc\n"
        "def weight(spectrum):\n    return np.arange(spectrum.size)\n"
        "class Moment(lazyproc.Process):\n"
        "    outputs = {'Moment': lazyproc.Output('f8')}\n"
        "    @staticmethod\n"
        "    def _map_function(spectrum, scale=2.0):\n"
        "        return scale * (weight(spectrum) * spectrum).sum()\n"
    )
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    moment = load_process(f"{tmp_path / 'elsewhere.py'}:Moment")
    view = moment(address, lazy=True, parms_dict={"scale": 3.0}).to_xarray()["Moment"].transpose("Y", "X")
    assert view.attrs["units"] == "a.u."
    with h5py.File(address.partition("::")[0]) as file:
        expected = 3.0 * (file[f"{CHANNEL}/Raw_Data"][()] * np.arange(6)).sum(1)
    computed = view.compute(scheduler="processes", num_workers=2).to_numpy().ravel()
    np.testing.assert_allclose(computed, expected)


def test_a_failure_while_a_view_is_computed_names_the_position(tmp_path, small_blocks):
    address = address_of(make_usid_file(tmp_path / "a.h5", data=np.arange(120.0).reshape(20, 6)))
    view = lazyproc.map_positions(fail_from_48, address, {"Out": Output("f4")}, lazy=True)
    with pytest.raises(FunctionError, match=r"at position 8 of .*Raw_Data: ValueError: too large") as caught:
        view.compute(scheduler="synchronous")
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.positions == (8, 9)


def fail_from_48(spectrum):
    if 48 <= spectrum[0] < 54:
        raise ValueError("too large")
    return spectrum[0]


# --- results of others, and results for others -----------------------------------------------------------------------


def test_results_that_pyusid_left_in_a_real_file(tmp_path):
    path = shutil.copy(real_file("sparse_sampling.h5"), tmp_path)
    os.chmod(path, 0o644)
    group = f"{CHANNEL}/Raw_Data-Simple_Process_009"
    results = lazyproc.open_results(f"{path}::{group}")
    assert results["Filtered_Data"].dims == ("position", "Frequency")
    assert results["Filtered_Data"].attrs == {"long_name": "Cantilever Deflection", "units": "V"}
    np.testing.assert_array_equal(results["Frequency"], [300, 315, 330])
    assert results.attrs["tool"] == "Simple_Process"
    assert results["status"].to_numpy().tolist() == [0] * 8, "it was left before anything was done"
    assert np.isnan(results["Filtered_Data"]).all(), "not the zeros that lie in the file"
    written = np.arange(24, dtype="f4").reshape(8, 3)
    with h5py.File(path, "r+") as file:
        file[group]["Filtered_Data"][...] = written
        file[group]["completed_positions"][2:5] = 1
        np.testing.assert_array_equal(results["X"], file[f"{CHANNEL}/Position_Values"][:, 0])
    shown = results["Filtered_Data"].to_numpy()
    np.testing.assert_array_equal(shown[2:5], written[2:5])
    assert np.isnan(shown[:2]).all()
    assert np.isnan(shown[5:]).all()
    single = lazyproc.open_results(f"{path}::{CHANNEL}/Raw_Data-Simple_Process_006")
    assert single["Results"].dims == ("position",), "one column is one value"


def test_what_cannot_be_opened_is_refused(tmp_path):
    path, _ = make_usid_file(tmp_path / "a.h5")
    with pytest.raises(lazyproc.ResultsError, match="holds no main dataset"):
        lazyproc.open_results(f"{path}::/Measurement_000")
    with pytest.raises(lazyproc.ArgumentTypeError, match="not there"):
        lazyproc.open_results(f"{path}::/nothing")
    with pytest.raises(lazyproc.ArgumentTypeError, match="expected an open results group"):
        lazyproc.open_results(3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        lazyproc.open_results(f"{tmp_path / 'b.h5'}::/group")
    (tmp_path / "c.h5").write_text("nothing of the kind")
    with pytest.raises(lazyproc.ArgumentValueError, match="not an HDF5 file"):
        lazyproc.open_results(tmp_path / "c.h5")


PARAMETERS = {
    "text": "Ω",
    "number": 3,
    "real": np.float32(0.5),
    "flag": True,
    "nothing": None,
    "nested": {"low": None, "high": [1, (2, np.int16(3))], "values": np.arange(3), "deep": {"z": 1 + 2j}},
    "complex": 1 - 1j,
    "rows": np.arange(6.0).reshape(2, 3),
    "waves": np.array([1j, 2.0]),
    "texts": ["a", "b"],
    "bytes": b"\xff\x00raw",
    "pair": (1, "x"),
    "long": np.zeros(10**4),
    "nan": float("nan"),
}


def test_views_with_any_parameters_are_written_to_zarr(tmp_path):
    address = address_of(make_usid_file(tmp_path / "a.h5"))
    with Counted(address, parms_dict=PARAMETERS, cores=1) as process:
        lazy = process.to_xarray()
        lazy.to_zarr(tmp_path / "lazy.zarr", consolidated=False)
        results = lazyproc.open_results(process.compute())
        results.to_zarr(tmp_path / "results.zarr", consolidated=False)
        assert results.attrs["nested"]["high"] == [1, [2, 3]]
        assert results.attrs["number"] == 3
        assert results.attrs["nothing"] is None
        np.testing.assert_array_equal(results.attrs["rows"], PARAMETERS["rows"])
        for name in PARAMETERS:
            assert str(results.attrs[name]) == str(lazy.attrs[name])
    again = xarray.open_zarr(tmp_path / "lazy.zarr", consolidated=False)
    xarray.testing.assert_equal(again.compute(), lazy.compute())
    assert again.attrs["text"] == "Ω"
    assert again.attrs["rows"] == [[0, 1, 2], [3, 4, 5]]
    xarray.testing.assert_equal(
        xarray.open_zarr(tmp_path / "results.zarr", consolidated=False).compute(), results.compute()
    )
