"""Applying a function to rows equals a naive loop, whatever form the results come in; what does not fit is refused."""

from __future__ import annotations

import pickle
import warnings
from array import array as array_of_numbers
from collections import UserList, deque, namedtuple

import numpy as np
import pandas
import pytest
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lazyproc.core.apply import compute_rows
from lazyproc.core.errors import OutputError
from lazyproc.core.failed import FailedRows
from lazyproc.core.no_result import OutputMismatch, RowError
from lazyproc.core.returned import as_it_is_now
from lazyproc.core.runs import Runs
from lazyproc.core.specs import Dimension, Output

N_SPECTRAL = 5
PAIR_OF_LARGE = np.dtype([("a", "u8"), ("b", "f8")])
FIT = np.dtype([("Amplitude", "f4"), ("Phase", "f8"), ("Count", "i2")])
PLAIN = ["f4", "f8", ">f4", "f2", "i1", "u2", "i8", "c8", "c16", "?", "S4"]


def resolved(**outputs):
    return tuple(output.resolve(name, N_SPECTRAL) for name, output in outputs.items())


def block_of(n_rows, dtype="f8"):
    return np.arange(n_rows * N_SPECTRAL, dtype=dtype).reshape(n_rows, N_SPECTRAL)


def output_of(dtype, shape, from_main=False):
    if from_main:
        return Output(dtype, shape_from_main=True)
    return Output(dtype, dims=[Dimension(f"D{n}", "", size) for n, size in enumerate(shape)] or None)


# -- equal to a naive loop -------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def declared(draw):
    """Draw an output and values of its dtype for each row."""
    dtype = np.dtype(draw(st.sampled_from([*PLAIN, FIT])))
    shape, from_main = draw(shapes), draw(st.booleans())
    output = output_of(dtype, shape, from_main)
    return output, (N_SPECTRAL,) if from_main else shape


@st.composite
def cases(draw):
    """Draw outputs, the values each row shall give, and the form in which the function gives them."""
    n_rows = draw(st.sampled_from([1, 2, 3, 17, 255, 256, 257, 513]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    specs, values = {}, {}
    for number in range(draw(st.integers(1, 3))):
        output, shape = draw(declared())
        specs[f"Out{number}"] = output
        values[f"Out{number}"] = random_values(random, (n_rows, *shape), output.dtype)
    single = ["value"] if len(specs) == 1 else []
    form = draw(st.sampled_from(["mapping", "reversed mapping", "tuple", *single]))
    flat = draw(st.booleans())
    as_lists = draw(st.booleans())
    return n_rows, resolved(**specs), values, form, flat, as_lists


def random_values(random, shape, dtype):
    if dtype.fields is not None:
        values = np.zeros(shape, dtype)
        for name in dtype.names:
            values[name] = random_values(random, shape, dtype[name])
        return values
    if dtype.kind == "S":
        return random.integers(97, 123, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype).reshape(shape)
    if dtype.kind in "fc":
        values = random.standard_normal(shape)
        return (values + 1j * values[::-1] if dtype.kind == "c" else values).astype(dtype)
    return random.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)


def in_form(values, form):
    """Bring the values of all outputs, by name, into the form in which a function returns them."""
    if form == "value":
        (value,) = values.values()
        return value
    if form == "tuple":
        return tuple(values.values())
    return dict(reversed(values.items())) if form == "reversed mapping" else values


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_a_function_of_one_position_equals_a_naive_loop(case):
    n_rows, outputs, values, form, flat, as_lists = case
    given_rows = []

    def function(row, factor=1):
        number = round(row[0]) // N_SPECTRAL
        given_rows.append(number)
        assert factor == 3
        returned = {name: column[number] for name, column in values.items()}
        if flat:
            returned = {name: np.reshape(value, -1) if np.ndim(value) else value for name, value in returned.items()}
        if as_lists:
            returned = {name: value.tolist() for name, value in returned.items()}
        return in_form(returned, form)

    arrays = compute_rows(function, block_of(n_rows), outputs, kwargs={"factor": 3}, vectorized=False)
    assert given_rows == list(range(n_rows))
    check_arrays(arrays, outputs, values)


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_a_function_of_blocks_gives_the_same(case):
    n_rows, outputs, values, form, flat, as_lists = case
    calls = []

    def function(block, offset):
        calls.append(block.shape)
        assert offset == 7
        returned = dict(values)
        if flat:
            returned = {name: column.reshape(n_rows, -1) for name, column in returned.items()}
        if as_lists:
            returned = {name: column.tolist() for name, column in returned.items()}
        return in_form(returned, form)

    arrays = compute_rows(function, block_of(n_rows), outputs, (7,), vectorized=True)
    assert calls == [(n_rows, N_SPECTRAL)]
    check_arrays(arrays, outputs, values)


def check_arrays(arrays, outputs, values):
    assert len(arrays) == len(outputs)
    for array, output in zip(arrays, outputs, strict=True):
        assert array.shape == (len(values[output.name]), output.width)
        assert array.dtype == output.dtype
        assert array.flags.c_contiguous
        expected = values[output.name].reshape(array.shape)
        np.testing.assert_array_equal(array, expected)
        assert array.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_examples_by_hand():
    data = block_of(3)
    mean, both = resolved(Mean=Output("f4")), resolved(Low=Output("f8"), High=Output("i4"))
    assert compute_rows(np.mean, data, mean, vectorized=False)[0].tolist() == [[2], [7], [12]]
    assert compute_rows(lambda b: b.mean(1), data, mean, vectorized=True)[0].tolist() == [[2], [7], [12]]
    low, high = compute_rows(lambda row: (row.min(), int(row.max())), data, both, vectorized=False)
    assert (low.tolist(), high.tolist()) == ([[0], [5], [10]], [[4], [9], [14]])
    arrays = compute_rows(lambda b: {"High": b.max(1).astype(int), "Low": b.min(1)}, data, both, vectorized=True)
    assert [array.tolist() for array in arrays] == [low.tolist(), high.tolist()]


def test_a_compound_value_may_be_a_record_or_a_tuple_in_a_tuple():
    fit = resolved(Fit=Output(FIT))
    for returned in (np.array((1, 2, 3), FIT)[()], np.array((1, 2, 3), FIT), ((1, 2, 3),), {"Fit": (1, 2, 3)}):
        (array,) = compute_rows(lambda row, returned=returned: returned, block_of(4), fit, vectorized=False)
        assert array.tolist() == [[(1, 2, 3)]] * 4
    two = resolved(Fit=Output(FIT), Mean=Output("f4"))
    arrays = compute_rows(lambda row: ((1, 2, 3), 4), block_of(2), two, vectorized=False)
    assert [array.tolist() for array in arrays] == [[[(1, 2, 3)]] * 2, [[4]] * 2]


def test_a_read_only_or_strided_result_is_fine():
    filtered = resolved(Filtered=Output("f4", shape_from_main=True))
    data = block_of(6, "f4")
    data.setflags(write=False)
    (array,) = compute_rows(lambda row: row[::-1], data, filtered, vectorized=False)
    np.testing.assert_array_equal(array, data[:, ::-1])
    (array,) = compute_rows(lambda block: np.asfortranarray(block)[:, ::-1], data, filtered, vectorized=True)
    np.testing.assert_array_equal(array, data[:, ::-1])
    assert array.flags.c_contiguous


# -- what the function raises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 255, 256, 257, 511, 599])
def test_the_failing_row_is_found(failing):
    def function(row):
        if row[0] == failing * N_SPECTRAL:
            raise ZeroDivisionError("told to")
        return 0.0

    with pytest.raises(RowError) as caught:
        compute_rows(function, block_of(600), resolved(Mean=Output("f4")), vectorized=False)
    assert (caught.value.first, caught.value.last) == (failing, failing + 1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


FORMS = {
    "as declared": lambda row: row[:3].copy(),
    "the same array again": lambda row: np.copyto(BUFFER, row[:3]) or BUFFER,
    "a list": lambda row: row[:3].tolist(),
    "another dtype": lambda row: row[:3].astype("i4"),
    "another byte order": lambda row: row[:3].astype(">f8"),
    "a subclass": lambda row: np.ma.masked_array(row[:3]),
}
WRONG = {
    "raises": (lambda row: 1 / 0, ZeroDivisionError),
    "stops an iteration": (lambda row: next(iter(())), StopIteration),
    "one too many": (lambda row: row[:4], None),
    "one row": (lambda row: row[None, :3], None),
    "one column": (lambda row: row[:3, None], None),
    "a square": (lambda row: np.outer(row[:3], row[:3]), None),
    "no dimension": (lambda row: np.array(row[0]), None),
    "one number": (lambda row: row[0], None),
    "nothing": (lambda row: None, None),
    "complex": (lambda row: row[:3] * 1j, None),
}
BUFFER = np.empty(3)


@pytest.mark.parametrize("record", [True, False])
@settings(deadline=None)
@given(st.lists(st.sampled_from([*FORMS, *WRONG, *["as declared"] * 9]), min_size=1, max_size=20), st.integers(0, 2))
def test_arrays_as_declared_among_others(record, kinds, n_args):
    """They take a shorter way, which must not show: not in the results, nor in the errors, nor in who is called."""
    calls = []

    def function(row, *args, **kwargs):
        assert args == (1, 2)[:n_args]
        assert kwargs == ({"c": 3} if n_args else {})
        calls.append(int(row[0]) // N_SPECTRAL)
        kind = kinds[calls[-1]]
        return FORMS[kind](row) if kind in FORMS else WRONG[kind][0](row)

    data = block_of(len(kinds))
    bad = [row for row, kind in enumerate(kinds) if kind in WRONG]
    failed = FailedRows(lambda runs: data, Runs.full(len(kinds))) if record else None

    def compute():
        return compute_rows(
            function, data, resolved(A=output_of("f8", (3,))), (1, 2)[:n_args], {"c": 3} if n_args else {},
            vectorized=False, failed=failed,
        )  # fmt: skip

    if bad and not record:
        error = WRONG[kinds[bad[0]]][1]
        raising = [row for row in bad if WRONG[kinds[row]][1]]
        with pytest.raises((RowError, OutputMismatch)) as caught:
            compute()
        if isinstance(caught.value, RowError):
            assert caught.value.first == raising[0]
            assert isinstance(caught.value.__cause__, WRONG[kinds[raising[0]]][1])
        else:
            assert error is None
        return
    (array,) = compute()
    wanted = data[:, :3].copy()
    wanted[bad] = np.nan
    np.testing.assert_array_equal(array, wanted)
    if record:
        assert [one.position for one in failed.rows] == bad
    assert [row for row in sorted(calls) if kinds[row] != "stops an iteration"] == [
        row for row, kind in enumerate(kinds) if kind != "stops an iteration"
    ]


def test_a_failing_block_is_all_of_its_rows():
    with pytest.raises(RowError) as caught:
        compute_rows(lambda block: block[99], block_of(60), resolved(Mean=Output("f4")), vectorized=True)
    assert (caught.value.first, caught.value.last) == (0, 60)
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("vectorized", [True, False])
def test_what_is_no_exception_of_the_function_passes(stop, vectorized):
    def function(data):
        raise stop

    with pytest.raises(stop):
        compute_rows(function, block_of(3), resolved(Mean=Output("f4")), vectorized=vectorized)


# -- what does not fit -----------------------------------------------------------------------------------------------

BAD_ROW = 300
MISFITS = {
    # what a row gives where all others are right: the outputs, the right value, the wrong one, words of the message
    "shape": ({"A": Output("f8")}, 1.0, [1.0, 2.0], ["'A'", "(2,)", "()"]),
    "too many values": ({"A": output_of("f8", (3,))}, np.ones(3), np.ones(4), ["'A'", "(4,)", "(3,)"]),
    "a dimension more": ({"A": output_of("f8", (3,))}, np.ones(3), np.ones((1, 3)), ["'A'", "(1, 3)", "(3,)"]),
    "transposed": ({"A": output_of("f8", (2, 3))}, np.ones((2, 3)), np.ones((3, 2)), ["'A'", "(3, 2)", "(2, 3)"]),
    "nothing": ({"A": Output("f8")}, 1.0, None, ["'A'", "None", "NoneType", "float64"]),
    "text": ({"A": Output("f8")}, 1.0, "one", ["'A'", "'one'", "str", "float64"]),
    "ragged": ({"A": output_of("f8", (2,))}, [1.0, 2.0], [1.0, [2.0]], ["'A'", "list", "(2,)"]),
    "complex": ({"A": Output("f8")}, 1.0, 1j, ["'A'", "complex128", "float64"]),
    "fraction": ({"A": Output("i4")}, 1, 1.5, ["'A'", "float64", "int32"]),
    "too large": ({"A": Output("i2")}, 1, 40_000, ["'A'", "40000", "int16", "wider"]),
    "negative": ({"A": Output("u1")}, 1, -1, ["'A'", "-1", "uint8"]),
    "beyond float": ({"A": Output("f4")}, 1.0, 1e300, ["'A'", "1e+300", "float32"]),
    "object": ({"A": Output("f8")}, 1.0, object(), ["'A'", "object", "float64"]),
    "a set": ({"A": Output("f8")}, 1.0, {1.0}, ["'A'", "set"]),
    "too few in a tuple": ({"A": Output("f8"), "B": Output("f8")}, (1, 2), (1,), ["tuple of 1", "2", "['A', 'B']"]),
    "too many in a tuple": ({"A": Output("f8"), "B": Output("f8")}, (1, 2), (1, 2, 3), ["tuple of 3", "['A', 'B']"]),
    "no tuple": ({"A": Output("f8"), "B": Output("f8")}, (1, 2), 1.0, ["1.0", "float", "['A', 'B']"]),
    "a list": ({"A": Output("f8"), "B": Output("f8")}, (1, 2), [1, 2], ["list", "['A', 'B']"]),
    "nothing for two": ({"A": Output("f8"), "B": Output("f8")}, (1, 2), None, ["None", "['A', 'B']"]),
    "wrong name": ({"A": Output("f8")}, {"A": 1}, {"a": 1}, ["['a']", "missing: ['A']", "not declared: ['a']"]),
    "missing name": ({"A": Output("f8"), "B": Output("f8")}, {"A": 1, "B": 2}, {"A": 1}, ["missing: ['B']"]),
    "surplus name": ({"A": Output("f8")}, {"A": 1}, {"A": 1, "B": 2}, ["not declared: ['B']"]),
    "compound of other fields": (
        {"A": Output([("x", "f4"), ("y", "f4")])},
        np.array((1, 2), [("x", "f4"), ("y", "f4")]),
        np.array((1, 2, 3), [("x", "f4"), ("y", "f4"), ("z", "f4")]),
        ["'A'", "'z'"],
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("bad_row", [0, 1, BAD_ROW])
def test_a_misfit_is_refused_and_its_row_is_found(kind, bad_row):
    specs, right, wrong, words = MISFITS[kind]
    outputs = resolved(**specs)

    def function(row):
        return wrong if row[0] == bad_row * N_SPECTRAL else right

    compute_rows(lambda row: right, block_of(4), outputs, vectorized=False)
    with pytest.raises(OutputMismatch) as caught:
        compute_rows(function, block_of(400), outputs, vectorized=False)
    assert caught.value.row == bad_row
    # Alone, the value itself is described; among others NumPy may have blurred what it was.
    with pytest.raises(OutputMismatch) as alone:
        compute_rows(lambda row: wrong, block_of(1), outputs, vectorized=False)
    for word in words:
        assert word in str(alone.value), str(alone.value)
    assert isinstance(alone.value, OutputError)
    assert isinstance(alone.value, ValueError)


@pytest.mark.parametrize("record", [True, False])
def test_rows_may_come_in_different_forms(record):
    two = resolved(A=Output("f8"), B=Output("f8"))
    forms = [lambda a, b: {"A": a, "B": b}, lambda a, b: (a, b), lambda a, b: {"B": [b], "A": np.array([a])}]
    data = block_of(600)
    failed = FailedRows(lambda runs: data, Runs.full(600)) if record else None
    for shift in range(3):
        found = compute_rows(
            lambda row, shift=shift: forms[(int(row[0]) // N_SPECTRAL + shift) % 3](row[0], row[1]),
            data, two, vectorized=False, failed=failed,
        )  # fmt: skip
        np.testing.assert_array_equal(np.hstack(found), data[:, :2])
    assert failed is None or not failed.rows


BLOCK_MISFITS = {
    "one value": (Output("f8"), lambda block: 1.0, ["'A'", "shape ()", "(7,)"]),
    "too few positions": (Output("f8"), lambda block: np.ones(6), ["'A'", "(6,)", "7 positions", "(7,)"]),
    "positions last": (
        output_of("f8", (3,)),
        lambda block: np.ones((3, 7)),
        ["(3, 7)", "(7, 3)", "positions come first"],
    ),
    "wrong inner shape": (output_of("f8", (3,)), lambda block: np.ones((7, 4)), ["(4,)", "(3,)"]),
    "nothing": (Output("f8"), lambda block: None, ["'A'", "None"]),
    "text": (Output("f8"), lambda block: "seven", ["'A'", "'seven'"]),
    "ragged": (output_of("f8", (2,)), lambda block: [[1, 2]] * 6 + [[1]], ["'A'", "list"]),
    "complex": (Output("f4"), lambda block: np.ones(7, "c8"), ["complex64", "float32"]),
    "objects": (Output("f4"), lambda block: np.array([1] * 7, object), ["'A'", "object"]),
    "surplus": (Output("f4"), lambda block: {"A": np.ones(7), "B": np.ones(7)}, ["not declared: ['B']"]),
    "unnamed": (Output("f4"), lambda block: {"B": np.ones(7)}, ["missing: ['A']"]),
    "a value that does not fit": (Output("i2"), lambda block: np.array([1, 2, 3, 4, 99_999, 6, 7]), ["99999", "int16"]),
    "field names": (Output([("x", "f4")]), lambda block: np.ones(7, [("y", "f4")]), ["'y'", "'x'"]),
}


@pytest.mark.parametrize("kind", BLOCK_MISFITS)
def test_a_misfit_of_a_block_function_is_refused(kind):
    output, function, words = BLOCK_MISFITS[kind]
    with pytest.raises(OutputMismatch) as caught:
        compute_rows(function, block_of(7), resolved(A=output), vectorized=True)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    if kind == "a value that does not fit":
        assert caught.value.row == 4


def test_two_outputs_of_a_block_function():
    two = resolved(A=Output("f8"), B=Output("f8"))
    for returned in (np.ones(7), [np.ones(7), np.ones(7)], np.ones((2, 7)), (np.ones(7),), None):
        with pytest.raises(OutputMismatch, match=r"\['A', 'B'\]"):
            compute_rows(lambda block, returned=returned: returned, block_of(7), two, vectorized=True)


def test_a_mismatch_survives_pickling():
    error = pickle.loads(pickle.dumps(OutputMismatch("Output 'A': wrong", 17)))
    assert (str(error), error.row) == ("Output 'A': wrong", 17)


# -- casting ---------------------------------------------------------------------------------------------------------

NUMBERS = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]


@pytest.mark.parametrize("wanted", NUMBERS)
@pytest.mark.parametrize("came", NUMBERS)
def test_which_types_are_taken(came, wanted):
    """Ones always fit where the kind does: a float is never cut to an integer, a complex number never to a real one."""
    came, wanted = np.dtype(came), np.dtype(wanted)
    kinds = "biufc".replace("i", "u")
    fits = kinds.index(came.kind.replace("i", "u")) <= kinds.index(wanted.kind.replace("i", "u"))
    output = resolved(A=Output(wanted))
    for vectorized, function in ((False, lambda row: came.type(1)), (True, lambda block: np.ones(len(block), came))):
        if fits:
            (array,) = compute_rows(function, block_of(3), output, vectorized=vectorized)
            assert array.dtype == wanted
            assert (array == 1).all()
        else:
            with pytest.raises(OutputMismatch, match=rf"{came}.*{wanted}"):
                compute_rows(function, block_of(3), output, vectorized=vectorized)


integers = st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])


@settings(max_examples=200, deadline=None)
@given(wanted=integers, came=integers, data=st.data())
def test_an_integer_fits_exactly_when_its_value_does(wanted, came, data):
    values = data.draw(hnp.arrays(came, st.integers(1, 5)))
    output = resolved(A=Output(wanted))
    limits = np.iinfo(wanted)
    misfits = [row for row, value in enumerate(values.tolist()) if not limits.min <= value <= limits.max]
    if misfits:
        with pytest.raises(OutputMismatch, match="does not fit") as caught:
            compute_rows(lambda block: values, block_of(len(values)), output, vectorized=True)
        assert caught.value.row == misfits[0]
    else:
        (array,) = compute_rows(lambda block: values, block_of(len(values)), output, vectorized=True)
        assert array[:, 0].tolist() == values.tolist()


@pytest.mark.parametrize("value", [2**63, 2**64 - 1, -(2**63), 2**64, -(2**63) - 1])
@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_python_integers_at_the_limits(value, dtype):
    limits = np.iinfo(dtype)
    output = resolved(A=Output(dtype))
    if limits.min <= value <= limits.max:
        (array,) = compute_rows(lambda row: value, block_of(2), output, vectorized=False)
        assert array[:, 0].tolist() == [value, value]
    else:
        with pytest.raises(OutputMismatch, match="'A'"):
            compute_rows(lambda row: value, block_of(2), output, vectorized=False)


TOGETHER = [
    # values that fit each, and have no type together in which they would fit
    pytest.param("u8", [2**63, 1, 2**64 - 1, 0], id="digests"),
    pytest.param("u8", [np.uint64(2**64 - 1), 1, True, np.int8(3)], id="unsigned beside others"),
    pytest.param("i8", [np.uint64(2**62 + 1), -1, np.int32(-5)], id="negative beside unsigned"),
    pytest.param("u8", [np.array([2**63], "u8"), np.array([1]), 2], id="arrays"),
    pytest.param("f8", [1, np.array([2]), [3.0], np.float32(4)], id="of different shapes"),
    pytest.param("f8", [2**70, 1.5, np.float32(2), -(2**64), True], id="large"),
    pytest.param("f4", [2**70, 1], id="large integers"),
    pytest.param("c16", [2**70, 1j, np.complex64(2)], id="large beside complex"),
    pytest.param(PAIR_OF_LARGE, [(2**63, 2**70), (1, 0.5)], id="records"),
    pytest.param(PAIR_OF_LARGE, [np.array((1, 2), [("a", "u1"), ("b", "f4")])[()], (2**63, 1)], id="mixed"),
]  # fmt: skip


@pytest.mark.parametrize("way", ["raise", "record", "block"])
@pytest.mark.parametrize(("dtype", "values"), TOGETHER)
def test_what_fits_alone_fits_together(dtype, values, way):
    data = block_of(3 * len(values))
    failed = FailedRows(lambda runs: data, Runs.full(len(data))) if way == "record" else None
    functions = {"block": lambda block: {"A": values * 3}}
    function = functions.get(way, lambda row: {"A": values[round(row[0]) // N_SPECTRAL % len(values)]})
    (found,) = compute_rows(function, data, resolved(A=Output(dtype)), vectorized=way == "block", failed=failed)
    plain = [value if isinstance(value, tuple) else np.ravel(value)[0] for value in values]
    assert found[:, 0].tolist() == [np.array(value, dtype).item() for value in plain] * 3
    assert failed is None or not failed.rows


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("u8", [2**63, 1]),
        ("u8", [np.uint64(2**64 - 1), 1]),
        ("f8", [2**70, 1.5]),
        ("c8", [2**70, 1j]),
        (PAIR_OF_LARGE, [(2**63, 2**70), (1, 0.5)]),
    ],
)
def test_a_list_of_values_that_fit_each(dtype, values):
    (found,) = compute_rows(
        lambda row: {"A": values}, block_of(3), resolved(A=output_of(dtype, (2,))), vectorized=False
    )
    assert found.tolist() == [[np.array(value, dtype).item() for value in values]] * 3


ODD = [
    *(2**n + more for n in (0, 8, 31, 63, 64, 70, 2000) for more in (-1, 0)), -1, -(2**63), 0.5, 1e300, np.nan, 1j,
    True, None, "text", b"ab", b"abc", np.uint64(2**64 - 1), np.int8(-7), np.float32(0.1), np.bool_(True), np.ma.masked,
    [1], [2**63], (3.5,), np.array([5], "u8"), np.array(6), [[7]], [1, 2], np.ma.array([8]), {"A": 9}, {"B": 1}, object,
]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    dtype=st.sampled_from(["u8", "i8", "u1", "f4", "f8", "c8", "?", "S2"]),
    shape=st.sampled_from([(), (1,), (2,)]),
    values=st.lists(st.sampled_from(ODD), min_size=1, max_size=5),
)
def test_values_are_judged_together_as_they_are_alone(dtype, shape, values):
    outputs = resolved(A=output_of(dtype, shape))
    alone = []
    for value in values:
        try:
            alone.append(compute_rows(lambda row, value=value: value, block_of(1), outputs, vectorized=False)[0][0])
        except OutputMismatch:
            alone.append(None)
    bad = [row for row, one in enumerate(alone) if one is None]
    wanted = [outputs[0].fill_value.tolist()] * outputs[0].width
    wanted = [wanted if one is None else one.tolist() for one in alone]

    def compute(failed=None):
        return compute_rows(
            lambda row: values[round(row[0]) // N_SPECTRAL], data, outputs, vectorized=False, failed=failed
        )[0]

    data = block_of(len(values))
    failed = FailedRows(lambda runs: data, Runs.full(len(values)))
    assert repr(compute(failed).tolist()) == repr(wanted)
    assert [one.position for one in failed.rows] == bad
    if bad:
        with pytest.raises(OutputMismatch) as caught:
            compute()
        assert caught.value.row == bad[0]
    else:
        assert repr(compute().tolist()) == repr(wanted)


@settings(max_examples=200, deadline=None)
@given(
    wanted=st.sampled_from(["f2", "f4", "f8", "c8", "c16"]),
    values=hnp.arrays("f8", st.integers(1, 6), elements=st.floats(width=64)),
)
def test_floats_are_rounded_but_never_become_infinite(wanted, values):
    with np.errstate(all="ignore"):
        expected = values.astype(wanted)
    overflowing = np.flatnonzero(np.isfinite(values) & np.isinf(expected))
    output = resolved(A=Output(wanted))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if overflowing.size:
            with pytest.raises(OutputMismatch, match="does not fit") as caught:
                compute_rows(lambda block: values, block_of(len(values)), output, vectorized=True)
            assert caught.value.row == overflowing[0]
        else:
            (array,) = compute_rows(lambda block: values, block_of(len(values)), output, vectorized=True)
            np.testing.assert_array_equal(array[:, 0], expected)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "c16"])
def test_nan_and_infinity_pass_without_a_warning(dtype):
    special = [np.nan, np.inf, -np.inf, -0.0, 1.0]
    output = resolved(A=Output(dtype, shape_from_main=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (array,) = compute_rows(lambda row: np.array(special), block_of(3), output, vectorized=False)
    for row in array:
        assert row.tobytes() == np.array(special, dtype).tobytes()


def test_texts_of_fixed_length():
    name = resolved(Name=Output("S4"))
    (array,) = compute_rows(lambda row: b"ab", block_of(2), name, vectorized=False)
    assert array[:, 0].tolist() == [b"ab", b"ab"]
    for wrong, words in ((b"abcdef", "b'abcdef'.*S4"), (7, "S4"), (1.5, "S4"), ("ab", "S4"), (None, "None")):
        with pytest.raises(OutputMismatch, match=words) as caught:
            compute_rows(lambda row, wrong=wrong: wrong if row[0] else b"ab", block_of(2), name, vectorized=False)
        assert caught.value.row == 1
        assert "'Name'" in str(caught.value)


RECORDS = [
    # a value of the record (Amplitude f4, Phase f8, Count i2) that does not fit, and words of the message
    ((1.0, 2.0, 40_000), ["'Count'", "int16"]),
    ((1.0, 2.0, 3.5), ["'Count'", "float64", "int16"]),
    ((1.0, 2j, 3), ["Phase", "complex128"]),
    ((1e300, 2.0, 3), ["'Amplitude'", "1e+300", "float32"]),
    ((1.0, "text", 3), ["'Phase'", "<U", "float64"]),
    ((1.0, None, 3), ["None"]),
    ((1.0, 2.0), ["'A'", "(1.0, 2.0)"]),
    ((1.0, 2.0, 3, 4), ["'A'"]),
    (1.0, ["'A'", "1.0"]),
    (np.array((1, 2, 40_000), [("Amplitude", "f4"), ("Phase", "f8"), ("Count", "i8")]), ["'Count'", "40000", "int16"]),
    (np.array((1, 2, 3), [("Amplitude", "f4"), ("Phase", "c8"), ("Count", "i8")]), ["'Phase'"]),
    (np.array((1, 2, 3), [("a", "f4"), ("b", "f8"), ("c", "i2")]), ["'Amplitude'"]),
]


@pytest.mark.parametrize(("wrong", "words"), RECORDS)
@pytest.mark.parametrize("n_values", [None, 2])
def test_records_are_not_cut_either(wrong, words, n_values):
    right = np.array((1, 2, 3), FIT) if isinstance(wrong, np.ndarray) else (1.0, 2.0, 3)
    output = output_of(FIT, () if n_values is None else (n_values,))

    def function(row):
        value = wrong if row[0] == 2 * N_SPECTRAL else right
        return {"A": value if n_values is None else [right, value]}

    with pytest.raises(OutputMismatch, match="'A'") as caught:
        compute_rows(function, block_of(4), resolved(A=output), vectorized=False)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.row == 2


def test_records_may_be_wider_where_the_values_fit():
    wide = np.dtype([("Amplitude", "f8"), ("Phase", "f4"), ("Count", "u8")])
    outputs = resolved(A=Output(FIT))
    for value in (np.array((1.5, 2.5, 7), wide), (1.5, np.float32(2.5), np.uint64(7))):
        (array,) = compute_rows(lambda row, value=value: {"A": value}, block_of(3), outputs, vectorized=False)
        assert array.tolist() == [[(1.5, 2.5, 7)]] * 3
    (array,) = compute_rows(
        lambda block: np.full(len(block), np.array((1, 2, 3), wide)), block_of(3), outputs, vectorized=True
    )
    assert array.tolist() == [[(1, 2, 3)]] * 3


@pytest.mark.parametrize("form", ["array", "list", "tuple", "mapping", "record", "nested"])
def test_whatever_the_function_uses_again_is_kept_as_it_was(form):
    buffer, listed, mapped = np.zeros(2), [0.0, 0.0], {"A": 0.0}
    record = np.zeros(1, FIT)

    def function(row):
        buffer[:] = row[:2]
        listed[:] = row[:2].tolist()
        mapped["A"] = row[0]
        record["Phase"] = row[0]
        forms = {"array": buffer, "list": listed, "mapping": mapped, "record": record[0]}
        return forms.get(form) if form in forms else (buffer,) if form == "tuple" else {"A": [buffer, buffer[::-1]]}

    shapes = {"mapping": (), "record": (), "nested": (2, 2)}
    output = output_of(FIT if form == "record" else "f8", shapes.get(form, (2,)))
    (array,) = compute_rows(function, block_of(300), resolved(A=output), vectorized=False)
    first = array["Phase"][:, 0] if form == "record" else array[:, 0]
    assert first.tolist() == block_of(300)[:, 0].tolist()


class Viewed:
    """An object that NumPy can read, of values elsewhere; refuses to be copied, as what holds a file or a lock does."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


class Counting:
    """A sequence of its own kind, of values elsewhere."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, number):
        return self.values[number]


class Listed(list):
    pass


Two = namedtuple("Two", "one two")
USED_AGAIN = {
    # makes an object of two values and what puts new values into it
    "DataArray": lambda: in_array(lambda buffer: xarray.DataArray(buffer, dims="d")),
    "Series": lambda: in_array(lambda buffer: pandas.Series(buffer, copy=False)),
    "memoryview": lambda: in_array(memoryview),
    "__array__": lambda: in_array(Viewed),
    "sequence": lambda: in_array(Counting),
    "views in a list": lambda: in_array(lambda buffer: [memoryview(buffer)[:1], memoryview(buffer)[1:]]),
    "named tuple": lambda: in_array(lambda buffer: Two(buffer[:1], buffer[1:])),
    "tuple of one": lambda: in_array(lambda buffer: (memoryview(buffer),)),
    "dict": lambda: in_array(lambda buffer: {"A": xarray.DataArray(buffer)}),
    "array": lambda: in_list(array_of_numbers("d", [0, 0])),
    "deque": lambda: in_list(deque([0, 0])),
    "UserList": lambda: in_list(UserList([0, 0])),
    "list of its own kind": lambda: in_list(Listed([0, 0])),
}


def in_array(make):
    buffer = np.zeros(2)
    return make(buffer), lambda values: np.copyto(buffer, values)


def in_list(values):
    def put(new):
        values[0], values[1] = new.tolist()

    return values, put


@pytest.mark.parametrize("kind", USED_AGAIN)
def test_an_object_of_any_type_is_kept_as_it_was(kind):
    value, put = USED_AGAIN[kind]()

    def function(row):
        put(row[:2])
        return value

    shape = (2, 1) if kind in ("views in a list", "named tuple") else (2,)
    (found,) = compute_rows(function, block_of(300), resolved(A=output_of("f8", shape)), vectorized=False)
    np.testing.assert_array_equal(found, block_of(300)[:, :2])


def test_a_table_and_bytes_are_kept_as_they_were():
    buffer, names = np.zeros((2, 2)), deque([b"", b""])
    table = pandas.DataFrame(buffer, copy=False)

    def function(row):
        buffer[:] = row[0]
        names[1] = b"%d" % row[0]
        return table, names

    outputs = resolved(Table=output_of("f8", (2, 2)), Names=output_of("S4", (2,)))
    values, texts = compute_rows(function, block_of(300), outputs, vectorized=False)
    first = block_of(300)[:, 0]
    np.testing.assert_array_equal(values, np.repeat(first[:, None], 4, axis=1))
    assert texts[:, 1].tolist() == [b"%d" % number for number in first]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1.0}, r"returned \{1.0\} \(set\); expected the shape \(2,\)"),
        (deque([1.0, [2.0]]), r"returned deque\(\[1.0, \[2.0\]\]\) \(deque\); expected the shape \(2,\)"),
        (deque([b"a", 7]), r"returned deque\(\[b'a', 7\]\) \(deque\)"),
        (UserList([1.0, None]), r"returned \[1.0, None\] \(UserList\)"),
        (Viewed([1.0, "text"]), r"Viewed object .* \(Viewed\)"),
        (Viewed([1.0, [2.0]]), r"Viewed object .* \(Viewed\)"),
        (iter([1.0, 2.0]), r"list_iterator object .* \(list_iterator\)"),
    ],
    ids=["set", "ragged", "mixed", "nothing in it", "text", "ragged __array__", "iterator"],
)
@pytest.mark.parametrize("dtype", ["f8", "S4"])
def test_an_object_that_does_not_fit_is_told_as_it_came(dtype, value, words):
    with pytest.raises(OutputMismatch, match=words) as caught:
        compute_rows(
            lambda row: value if row[0] == 2 * N_SPECTRAL else np.zeros(2).astype(dtype),
            block_of(4), resolved(A=output_of(dtype, (2,))), vectorized=False,
        )  # fmt: skip
    assert caught.value.row == 2


def test_what_did_not_fit_does_not_fit_later_either():
    """The object that did not fit has the values of a later call when all of them are looked at."""
    values = deque([None, None])

    def function(row):
        values[0] = None if row[0] == N_SPECTRAL else row[0]
        values[1] = row[1]
        return values

    data = block_of(4)
    failed = FailedRows(lambda runs: data, Runs.full(4))
    (found,) = compute_rows(function, data, resolved(A=output_of("f8", (2,))), vectorized=False, failed=failed)
    assert [one.position for one in failed.rows] == [1]
    np.testing.assert_array_equal(np.delete(found, 1, axis=0), np.delete(data[:, :2], 1, axis=0))


# -- masked arrays ----------------------------------------------------------------------------------------------------


SMALL = np.ma.masked_less
MASKED = [
    pytest.param(lambda row: SMALL(row, 1).max(), False, (), id="scalar"),
    pytest.param(lambda row: (SMALL(row, 1).max(),), False, (), id="in a tuple"),
    pytest.param(lambda row: SMALL(row, 1), False, (4,), id="rows"),
    pytest.param(lambda row: {"Out": SMALL(row, 1)}, False, (4,), id="rows by name"),
    pytest.param(lambda row: SMALL(row, 1) if row[0] else row - 5, False, (4,), id="some rows"),
    pytest.param(lambda rows: SMALL(rows, 1).max(axis=1), True, (), id="block"),
    pytest.param(lambda rows: SMALL(rows, 1), True, (4,), id="block of rows"),
]


@pytest.mark.parametrize("number", ["f8", "i4"])
@pytest.mark.parametrize(("function", "vectorized", "shape"), MASKED)
def test_what_a_masked_array_hides_becomes_the_fill_value(function, vectorized, shape, number):
    data = np.array([[4, 4, 4, 4], [0, 0, 0, 0], [4, 0, 4, 0]])
    if number == "f8":
        data = np.where(data == 0, -1e300, data.astype(float))  # what is hidden need not fit
    dims = [Dimension("X", "m", 4)] if shape else None
    output = Output(number, dims=dims, fill_value=-5).resolve("Out", 4)
    (result,) = compute_rows(function, data, (output,), (), {}, vectorized=vectorized)
    expected = np.where(data > 0, 4, -5)
    if not shape:
        expected = expected[:, :1]
    assert result.tolist() == expected.tolist()


PAIR = np.dtype([("A", "f4"), ("B", "i2")])
MASKED_FORMS = ["block", "list of rows", "row", "list", "some rows", "tuple", "dict", "named tuple", "reused"]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["f4", "f8", "i2", "u8", "c16", "?", "S4", PAIR]),
    form=st.sampled_from(MASKED_FORMS),
    shape=st.sampled_from([(), (1,), (3,), (2, 2)]),
)
def test_masked_values_equal_a_naive_fill(seed, dtype, form, shape):
    random, dtype = np.random.default_rng(seed), np.dtype(dtype)
    values = random_values(random, (7, *shape), dtype)
    mask = random_values(random, values.shape, np.dtype(np.ma.make_mask_descr(dtype)))
    masked = np.ma.MaskedArray(values, mask)
    output = output_of(dtype, shape)
    outputs = (
        resolved(Out=output, Other=Output("i4")) if form in ("tuple", "dict", "named tuple") else resolved(Out=output)
    )
    two = namedtuple("two", "out other")
    buffer = np.ma.MaskedArray(np.zeros(shape, dtype), np.zeros(shape, mask.dtype))

    def function(row):
        number = round(row[0]) // N_SPECTRAL
        value = masked[number]
        if form == "reused":
            buffer.data[...], buffer.mask[...] = values[number], mask[number]
            return buffer
        if form == "list":
            return nested(value) if shape else value
        if form == "some rows" and not any(mask[number].tobytes()):
            return values[number]
        pairs = {"tuple": (value, 1), "dict": {"Out": value, "Other": 1}, "named tuple": two(value, 1)}
        return pairs.get(form, value)

    def nested(value):
        return [nested(item) for item in value] if np.ndim(value) else value

    blocks = {"block": lambda block: masked, "list of rows": lambda block: list(masked)}
    found = compute_rows(blocks.get(form, function), block_of(7), outputs, vectorized=form in blocks)[0]
    expected = filled(values, mask, output.fill_value).reshape(found.shape)
    assert repr(found.tolist()) == repr(expected.tolist()), "NaN is NaN here"


def filled(values, mask, fill):
    if values.dtype.names:
        fields = [filled(values[name], mask[name], fill[name]) for name in values.dtype.names]
        return np.rec.fromarrays(fields, dtype=values.dtype).view(values.dtype, np.ndarray)
    return np.where(mask, fill, values).astype(values.dtype)


MISSING = np.ma.masked
IN_LISTS = [
    pytest.param(lambda row: [1, MISSING, 3, MISSING], False, "i8", (4,), [1, -5, 3, -5], id="list"),
    pytest.param(lambda row: [(1, MISSING), [3, 4]], False, "f8", (2, 2), [1, -5, 3, 4], id="nested"),
    pytest.param(lambda row: [np.uint64(1), MISSING], False, "u8", (2,), [1, 5], id="unsigned"),
    pytest.param(lambda row: [b"ab", MISSING], False, "S2", (2,), [b"ab", b"-5"], id="bytes"),
    pytest.param(lambda row: [np.ma.array([1, 2], mask=[0, 1])] * 2, False, "f8", (2, 2), [1, -5, 1, -5], id="arrays"),
    pytest.param(lambda row: (7, MISSING), False, PAIR, (), [(7, -5)], id="record"),
    pytest.param(lambda row: [(7, MISSING), MISSING], False, PAIR, (2,), [(7, -5), (-5, -5)], id="records"),
    pytest.param(lambda block: [[MISSING, 2]] * len(block), True, "i4", (2,), [-5, 2], id="block"),
    pytest.param(lambda block: {"Out": [MISSING] * len(block)}, True, "i4", (), [-5], id="block by name"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "vectorized", "dtype", "shape", "expected"), IN_LISTS)
def test_masked_values_in_lists_become_the_fill_value(function, vectorized, dtype, shape, expected):
    fill = {"S": b"-5", "u": 5}.get(np.dtype(dtype).kind, -5)
    dims = [Dimension(f"D{n}", "", size) for n, size in enumerate(shape)] or None
    outputs = resolved(Out=Output(dtype, dims=dims, fill_value=fill))
    (found,) = compute_rows(function, block_of(3), outputs, vectorized=vectorized)
    assert found.tolist() == [expected] * 3


def test_fill_values_that_nobody_declared():
    outputs = resolved(Number=Output("f4"), Count=Output("i4"), Pair=Output(PAIR))
    found = compute_rows(lambda row: (MISSING, MISSING, MISSING), block_of(2), outputs, vectorized=False)
    assert np.isnan(found[0]).all()
    assert found[1].tolist() == [[0], [0]]
    assert np.isnan(found[2]["A"]).all()
    assert found[2]["B"].tolist() == [[0], [0]]


BESIDE_MASKED = [
    pytest.param(lambda row: [1, MISSING] if row[0] == 10 else [1] * 4, "shape", id="shape"),
    pytest.param(lambda row: MISSING if row[0] == 10 else [1] * 4, "shape", id="one for all"),
    pytest.param(lambda row: [1.5, MISSING, 1, 1] if row[0] == 10 else [1] * 4, "dtype", id="dtype"),
    pytest.param(lambda row: [1, MISSING, 2**40, 1] if row[0] == 10 else [1] * 4, "does not fit", id="value"),
    pytest.param(lambda row: [1, MISSING, [1]] if row[0] == 10 else [1] * 4, "expected the shape", id="ragged"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "match"), BESIDE_MASKED)
def test_what_does_not_fit_beside_masked_values_is_refused(function, match):
    outputs = resolved(Out=Output("i4", dims=[Dimension("X", "", 4)]))
    with pytest.raises(OutputMismatch, match=match) as caught:
        compute_rows(function, block_of(4), outputs, vectorized=False)
    assert caught.value.row == 2


def test_a_list_with_masked_values_for_too_few_positions_is_refused():
    with pytest.raises(OutputMismatch, match="the positions come first"):
        compute_rows(lambda block: [MISSING], block_of(4), resolved(Out=Output("f4")), vectorized=True)


def test_no_memory_for_what_came_is_no_misfit():
    """It is tried again elsewhere, or later; a misfit would be recorded as a failed position."""

    class Heavy:
        def __array__(self, dtype=None, copy=None):
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        as_it_is_now(Heavy())
