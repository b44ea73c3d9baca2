"""`map_positions`: any function over all positions, without a class."""

from __future__ import annotations

import functools
import gc
import operator
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray
from usid_files import make_usid_file

import lazyproc
from lazyproc import (
    ArgumentTypeError,
    ArgumentValueError,
    DefinitionError,
    Dimension,
    FunctionError,
    Output,
    ParameterError,
)

MEAN = {"Out": Output("f8", units="nA")}


@pytest.fixture
def address(tmp_path: Path) -> str:
    return "::".join(make_usid_file(tmp_path / "a.h5", n_spectral=6))


def raw(address: str) -> np.ndarray:
    path, _, name = address.partition("::")
    with h5py.File(path, "r") as file:
        return file[name][()]


def mean_of(spectrum, weight=1.0):
    return weight * spectrum.mean(dtype=float)


def means_of(block, weight=1.0):
    return weight * block.mean(1, dtype=float)


class Weighted:
    """An object that can be called."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, spectrum):
        return mean_of(spectrum, self.weight)


def adder(weight: float):
    return lambda spectrum: mean_of(spectrum, weight)


FUNCTIONS = [
    pytest.param(mean_of, False, 1.0, "mean_of", id="function"),
    pytest.param(lambda spectrum: mean_of(spectrum, 2.0), False, 2.0, "lambda", id="lambda"),
    pytest.param(adder(3.0), False, 3.0, "lambda", id="closure"),
    pytest.param(functools.partial(mean_of, weight=4.0), False, 4.0, "mean_of", id="partial"),
    pytest.param(Weighted(5.0), False, 5.0, "Weighted", id="callable object"),
    pytest.param(Weighted(6.0).__call__, False, 6.0, "__call__", id="bound method"),
    pytest.param(means_of, True, 1.0, "means_of", id="of blocks"),
    pytest.param(functools.partial(means_of, weight=7.0), True, 7.0, "means_of", id="partial of blocks"),
]


@pytest.mark.parametrize(("function", "vectorized", "weight", "name"), FUNCTIONS)
def test_any_function_goes(address, function, vectorized, weight, name):
    group = lazyproc.map_positions(function, address, MEAN, vectorized=vectorized, cores=1)
    assert group.name.endswith(f"/Raw_Data-{name}_000")
    np.testing.assert_allclose(group["Out"][:, 0], weight * raw(address).mean(1, dtype=float))


BUILT_IN = [
    pytest.param(np.ptp, lambda data: np.ptp(data, 1), id="NumPy function"),
    pytest.param(len, lambda data: np.full(len(data), data.shape[1]), id="builtin"),
    pytest.param(np.add.reduce, lambda data: np.add.reduce(data, 1), id="ufunc method"),
    pytest.param(operator.itemgetter(2), lambda data: data[:, 2], id="itemgetter"),
]


@pytest.mark.parametrize(("function", "expected"), BUILT_IN)
def test_functions_written_in_c_go(address, function, expected):
    group = lazyproc.map_positions(function, address, MEAN, process_name="Native", cores=1)
    np.testing.assert_allclose(group["Out"][:, 0], expected(raw(address)), rtol=1e-6)


def test_a_ufunc_keeps_the_shape_of_the_main_dataset(address):
    filtered = {"Out": Output("f4", shape_from_main=True)}
    for vectorized in (False, True):
        group = lazyproc.map_positions(np.abs, address, filtered, vectorized=vectorized, override=True, cores=1)
        np.testing.assert_array_equal(group["Out"], np.abs(raw(address)))
    assert group.name.endswith("/Raw_Data-absolute_001")


def test_a_single_output_bears_the_name_of_the_process(address):
    group = lazyproc.map_positions(mean_of, address, Output("f8"), process_name="Level", cores=1)
    np.testing.assert_allclose(group["Level"][:, 0], raw(address).mean(1, dtype=float))


def test_parameters_reach_the_function_and_the_results(address):
    group = lazyproc.map_positions(mean_of, address, MEAN, params={"weight": 2.5, "operator": "me"}, cores=1)
    np.testing.assert_allclose(group["Out"][:, 0], 2.5 * raw(address).mean(1, dtype=float))
    assert (group.attrs["weight"], group.attrs["operator"]) == (2.5, "me")
    again = lazyproc.map_positions(mean_of, address, MEAN, params={"operator": "me", "weight": 2.5}, cores=1)
    other = lazyproc.map_positions(mean_of, address, MEAN, params={"weight": 2.0}, cores=1)
    afresh = lazyproc.map_positions(mean_of, address, MEAN, params={"weight": 2.0}, cores=1, override=True)
    assert [int(one.name[-3:]) for one in (group, again, other, afresh)] == [0, 0, 1, 2]


def test_lazy_gives_the_same_numbers_and_writes_nothing(address):
    content = Path(address.partition("::")[0]).read_bytes()
    outputs = {"Out": Output("f8"), "Ends": Output("f4", dims=[Dimension("End", "V", 2)])}
    lazy = lazyproc.map_positions(mean_and_ends, address, outputs, lazy=True)
    assert isinstance(lazy, xarray.Dataset)
    computed = lazy.compute()
    assert Path(address.partition("::")[0]).read_bytes() == content
    group = lazyproc.map_positions(mean_and_ends, address, outputs, cores=1)
    xarray.testing.assert_equal(computed, lazyproc.open_results(group).compute().drop_vars("status"))


def mean_and_ends(spectrum):
    return mean_of(spectrum), spectrum[[0, -1]]


def test_the_group_can_be_read_for_as_long_as_it_is_held(address):
    group = lazyproc.map_positions(mean_of, address, MEAN, cores=1)
    gc.collect()
    np.testing.assert_allclose(group["Out"][:, 0], raw(address).mean(1, dtype=float))
    with h5py.File(address.partition("::")[0], "r+") as file:
        assert group.name in file, "and keeps nobody from writing"


def test_an_open_dataset_and_further_options(tmp_path, address):
    path, _, name = address.partition("::")
    with h5py.File(path, "r") as file:
        target = f"{tmp_path / 'out.h5'}::/fits"
        group = lazyproc.map_positions(mean_of, file[name], MEAN, h5_target_group=target, cores=1, max_mem_mb=64)
        assert group.name == "/fits/Raw_Data-mean_of_000"
        np.testing.assert_allclose(group["Out"][:, 0], file[name][()].mean(1, dtype=float))


def test_what_is_wrong_is_said(address):
    content = Path(address.partition("::")[0]).read_bytes()
    with pytest.raises(ArgumentTypeError, match="function: 3 came; expected a function"):
        lazyproc.map_positions(3, address, MEAN)
    with pytest.raises(DefinitionError, match=r"mean_of: outputs is \{\}"):
        lazyproc.map_positions(mean_of, address, {})
    with pytest.raises(ParameterError, match=r"lambda.*weight"):
        lazyproc.map_positions(lambda spectrum, weight: 0, address, MEAN)
    with pytest.raises(FunctionError, match=r"fail: the function failed at position 0 of .*: ZeroDivisionError"):
        lazyproc.map_positions(fail, address, MEAN, cores=1)
    with pytest.raises(TypeError, match="nonsense"):
        lazyproc.map_positions(mean_of, address, MEAN, nonsense=3)
    assert Path(address.partition("::")[0]).read_bytes() == content


def fail(spectrum):
    return 1 / 0


# -- what makes two calls the same ------------------------------------------------------------------------------------


def changes_its_parameters(spectrum, offsets, seen):
    offsets -= offsets.mean()
    seen.append(1)
    return spectrum.mean() + offsets[0]


def test_what_a_function_does_to_its_parameters_is_not_stored(address):
    offsets, seen = np.array([1.0, 3.0]), [0]
    options = {"params": {"offsets": offsets, "seen": seen}, "cores": 1}
    first = lazyproc.map_positions(changes_its_parameters, address, MEAN, **options)
    assert offsets.tolist() == [1.0, 3.0]
    assert seen == [0]
    assert first.attrs["offsets"].tolist() == [1.0, 3.0]
    assert lazyproc.map_positions(changes_its_parameters, address, MEAN, **options).name == first.name


def test_arguments_bound_to_a_function_make_a_difference(address):
    def means(weight):
        function = functools.partial(mean_of, weight=weight)
        return lazyproc.map_positions(function, address, MEAN, cores=1)

    groups = [means(weight) for weight in (2.0, 3.0, 2.0)]
    assert groups[0].name == groups[2].name != groups[1].name
    for group, weight in zip(groups, (2.0, 3.0, 2.0), strict=True):
        np.testing.assert_allclose(group["Out"][:, 0], weight * raw(address).mean(1, dtype=float))


def test_bound_arguments_without_a_form_to_be_stored_are_let_be(address):
    function = functools.partial(takes_an_object, scale=Scale())
    group = lazyproc.map_positions(function, address, MEAN, cores=1)
    assert lazyproc.map_positions(function, address, MEAN, cores=1).name == group.name


class Scale:
    """An object that no file can hold."""

    factor = 2.0


def takes_an_object(spectrum, scale):
    return scale.factor * spectrum.mean()


def test_a_view_of_what_another_function_has_computed_says_so(address, caplog):
    lazyproc.map_positions(lambda spectrum: mean_of(spectrum, 1.0), address, MEAN, process_name="Mean", cores=1)
    caplog.clear()
    lazyproc.map_positions(lambda spectrum: mean_of(spectrum, 9.0), address, MEAN, process_name="Mean", lazy=True)
    assert "code has changed" in caplog.text


@pytest.mark.parametrize("name", ["", "  ", "a/b", 5])
def test_a_name_that_cannot_be_is_refused(address, name):
    content = Path(address.partition("::")[0]).read_bytes()
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match="process_name: "):
        lazyproc.map_positions(np.mean, address, MEAN, process_name=name)
    assert Path(address.partition("::")[0]).read_bytes() == content
