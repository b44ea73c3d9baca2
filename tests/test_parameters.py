"""Parameters: stored in a real HDF5 file and read back equal, compared exactly, refused clearly."""

from __future__ import annotations

import enum
import json
import math
import pathlib
import tracemalloc
from collections import OrderedDict, namedtuple
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lazyproc.core.canonical import canonical, digest_of, digest_of_array, same, texts_in
from lazyproc.core.errors import ParameterError, ResultsError
from lazyproc.core.identity import code_hash
from lazyproc.core.parameters import (
    RESERVED,
    arguments_text,
    decode,
    differences,
    encode,
    is_bookkeeping,
    same_arguments,
)
from lazyproc.hdf5.attributes import (
    LARGE_GROUP,
    LARGEST_ATTRIBUTE,
    MANIFEST,
    check_parameters,
    has_manifest,
    read_parameters,
    write_parameters,
)


def identical(a: Any, b: Any) -> bool:
    """An independent verifier: the same type, and the same value down to dtype, shape and NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and all(map(identical, a.ravel().tolist(), b.ravel().tolist()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, complex | np.complexfloating):
        return identical(a.real, b.real) and identical(a.imag, b.imag)
    return bool(a == b) or bool(a != a and b != b)


def in_memory() -> h5py.File:
    return h5py.File("parameters.h5", "w", driver="core", backing_store=False)


def through_file(parameters: dict[str, Any]) -> dict[str, Any]:
    with in_memory() as file:
        group = file.create_group("results")
        write_parameters(group, parameters)
        return read_parameters(group)


any_text = st.text(st.characters(exclude_categories=()), max_size=8)  # with surrogates and NUL
numbers = st.one_of(
    st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.complex_numbers(allow_nan=True)
)
dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.byte_string_dtypes(min_len=1, max_len=4),
    hnp.unicode_string_dtypes(min_len=1, max_len=4),
)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
arrays = hnp.arrays(dtypes, shapes)
numpy_scalars = dtypes.flatmap(lambda dtype: hnp.arrays(dtype.newbyteorder("="), (1,))).map(lambda array: array[0])
simple = st.one_of(st.none(), numbers, any_text, st.binary(max_size=6), numpy_scalars, arrays)
homogeneous = st.one_of(
    *(st.lists(item, max_size=4) for item in (st.booleans(), st.integers(), st.floats(), any_text, st.text("ab"))),
    st.lists(st.floats(width=32).map(np.float32), max_size=4),
)
values = st.recursive(
    st.one_of(simple, homogeneous, homogeneous.map(tuple)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(any_text, st.text("$a.", max_size=3)), inner, max_size=3),
    ),
    max_leaves=6,
)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names.filter(lambda name: not is_bookkeeping(name)), values, max_size=4))
def test_parameters_come_back_equal_with_their_types(parameters: dict[str, Any]) -> None:
    back = through_file(parameters)
    assert identical(back, {name: back[name] for name in parameters})
    assert identical([back[name] for name in parameters], list(parameters.values()))
    assert differences(back, parameters) == []


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        2**63 - 1,
        2**64 - 1,
        -(2**63) - 1,
        10**5000,
        -0.0,
        math.nan,
        -math.inf,
        complex(math.nan, -math.inf),
        "",
        "µm\n",
        "a\0",
        "\ud800",
        "\ud83d\ude00",
        b"",
        b"a\0b\0",
        b"\xff",
        np.bool_(True),
        np.uint64(2**64 - 1),
        np.float16(0.1),
        np.longdouble(1) / 3,
        np.clongdouble(1j) / 3,
        np.str_("a"),
        np.bytes_(b"\xff"),
        np.array(3.5),
        np.array("ab"),
        np.zeros((0, 3), ">i2"),
        np.zeros((2, 0), "U3"),
        np.array([["a", "µ"], ["", "c"]]),
        np.array(["a\0b"]),
        np.array([b"a\0b", b""]),
        np.arange(24.0).reshape(2, 3, 4)[:, ::2],
        [],
        (),
        [True, False],
        (1, 2),
        [2**64 - 1, 0],
        [2**63, -1],
        [1, 2.0],
        ["a", "µ"],
        ["\0"],
        [np.float32(0.1), np.float32(math.nan)],
        [np.float32(0.1), np.float64(0.1)],
        [np.str_("a")],
        [np.longdouble(1) / 3, {"x": np.longdouble(1) / 3, "y": np.array([1j], np.clongdouble) / 3}],
        [[1, 2], [3]],
        {"$tuple": [1], "b": {"$": (None, b"\xff", np.arange(3, dtype="u1"), {})}},
    ],
    ids=lambda value: repr(value)[:30] if not isinstance(value, int) else hex(value)[:30],
)
def test_chosen_values_come_back(value: Any) -> None:
    assert identical(through_file({"p": value})["p"], value)
    assert identical(through_file({"p": [value, {"q": value}]})["p"], [value, {"q": value}])
    assert identical(decode(*vars(encode("p", value)).values()), value)


def test_subclasses_of_plain_types_come_back_as_the_plain_type() -> None:
    class Side(enum.IntEnum):
        LEFT = 1

    class Model(str, enum.Enum):  # noqa: UP042  (its str() is not its value)
        A = "a"

    pair = namedtuple("pair", "x y")(1, 2.0)
    given = {"side": Side.LEFT, "model": Model.A, "pair": pair, "tree": OrderedDict(b=[Side.LEFT], a=Model.A)}
    expected = {"side": 1, "model": "a", "pair": (1, 2.0), "tree": {"b": [1], "a": "a"}}
    assert identical(through_file(given), expected)
    assert differences(expected, given) == []


def test_people_find_natural_attributes(tmp_path: pathlib.Path) -> None:
    parameters = {"n": 3, "on": True, "x": 0.5, "name": "µ", "row": [1.0, 2.0], "who": ["a", "b"], "none": None}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_parameters(file.create_group("results"), parameters)
    with h5py.File(tmp_path / "a.h5") as file:
        attrs = file["results"].attrs
        assert attrs["n"] == 3
        assert attrs["on"].dtype == bool
        assert attrs["x"] == 0.5
        assert attrs["name"] == "µ"
        assert attrs["row"].tolist() == [1, 2]
        assert attrs["who"].tolist() == ["a", "b"]
        assert attrs["none"] == "null"
        assert json.loads(attrs[MANIFEST])["row"] == "list:float"


@pytest.mark.parametrize("libver", [None, "latest", "earliest"])
def test_many_and_large_parameters(tmp_path: pathlib.Path, libver: str | None) -> None:
    parameters: dict[str, Any] = {f"middle {i}": np.arange(30_000 // 8) + i for i in range(40)}
    parameters |= {f"text {i}": "x" * 30_000 for i in range(10)}
    parameters |= {"edge": np.zeros(LARGEST_ATTRIBUTE, "u1"), "above": np.zeros(LARGEST_ATTRIBUTE + 1, "u1")}
    parameters |= {"a/b": np.arange(20_000.0), "a%2Fb": "µ" * 100_000, "..": ["x" * 100] * 1000, "b": b"y" * 70_000}
    parameters |= {
        "tree": {"a": list(range(20_000))},
        "U": np.array(["µ" * 20_000, "b"]),
        "0-d": np.array("z" * 40_000),
    }
    with h5py.File(tmp_path / "a.h5", "w", libver=libver) as file:
        write_parameters(file.create_group("results"), parameters)
        assert "edge" in file["results"].attrs
        assert set(file["results"][LARGE_GROUP]) == {"above", "a%2Fb", "a%252Fb", "%2E%2E", "b", "tree", "U", "0-d"}
    with h5py.File(tmp_path / "a.h5") as file:
        back = read_parameters(file["results"])
    assert back.keys() == parameters.keys()
    assert all(identical(back[name], parameters[name]) for name in parameters)


def test_a_manifest_may_be_large_and_is_replaced_as_a_whole() -> None:
    many = {f"{'long name ' * 10}{i}": i for i in range(1000)}
    with in_memory() as file:
        group = file.create_group("results")
        assert not has_manifest(group)
        write_parameters(group, many)
        assert has_manifest(group)
        assert MANIFEST not in group.attrs
        assert read_parameters(group) == many
        write_parameters(group, {"large": "x" * 50_000, "n": 1})
        write_parameters(group, {"n": 2})
        assert read_parameters(group) == {"n": 2}
        assert set(group.attrs) == {"n", MANIFEST}
        assert LARGE_GROUP not in group
        write_parameters(group, {})
        assert read_parameters(group) == {}
        assert has_manifest(group)


def test_with_a_manifest_other_attributes_are_no_parameters() -> None:
    with in_memory() as file:
        write_parameters(file, {"n": 1})
        file.attrs["note"] = "by somebody"
        assert read_parameters(file) == {"n": 1}


def test_a_group_by_another_program_is_read_naturally() -> None:
    with in_memory() as file:
        group = file.create_group("results")
        group.attrs["n"], group.attrs["x"], group.attrs["on"] = 3, 0.5, True
        group.attrs["text"], group.attrs["ascii"], group.attrs["raw"] = "µ", np.bytes_(b"ab"), np.bytes_(b"\xff")
        group.attrs["names"] = np.array([b"a", b"bc"])
        group.attrs["rows"] = np.array([[1.5, 2.5]])
        group.attrs["words"] = ["a", "µ"]
        group.attrs["empty"] = h5py.Empty("S1")
        group.attrs["nothing"] = h5py.Empty("f4")
        group.attrs["ref"] = group.ref
        group.attrs.create("refs", [group.ref], dtype=h5py.ref_dtype)
        for name in (*RESERVED, "source_000", "lazyproc_x"):
            group.attrs[name] = 1
        expected = {"n": 3, "x": 0.5, "on": True, "text": "µ", "ascii": "ab", "raw": b"\xff", "names": ["a", "bc"]}
        expected |= {"rows": np.array([[1.5, 2.5]]), "words": ["a", "µ"], "empty": "", "nothing": None}
        back = read_parameters(group)
        assert back.keys() == expected.keys()
        assert all(identical(back[name], expected[name]) for name in expected)


def test_what_pyusid_writes_is_the_same_parameters(tmp_path: pathlib.Path) -> None:
    from sidpy.hdf.hdf_utils import write_simple_attrs
    from sidpy.hdf.prov_utils import write_book_keeping_attrs

    parameters = {"n": 3, "x": 0.5, "model": "a", "names": ["a", "bc"], "row": [1, 2], "grid": np.ones((2, 2))}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_book_keeping_attrs(file)
        write_simple_attrs(file, parameters)
        assert differences(read_parameters(file), parameters) == []
        assert differences(read_parameters(file), {**parameters, "n": 4}) == ["n: stored 3 (int), wanted 4 (int)"]


@pytest.mark.parametrize("harm", ["removed", "manifest", "kind", "value", "not a dict"])
def test_damage_is_named(harm: str) -> None:
    with in_memory() as file:
        write_parameters(file, {"n": 1, "tree": [None]})
        if harm == "removed":
            del file.attrs["n"]
        elif harm == "value":
            file.attrs["tree"] = "["
        else:
            file.attrs[MANIFEST] = {"manifest": "{", "kind": '{"n": "quaternion"}', "not a dict": "[1]"}[harm]
        with pytest.raises(ResultsError, match=r"Results group '/'.*(parameter|MANIFEST|lazyproc_parameter_kinds)"):
            read_parameters(file)


def endless() -> list[Any]:
    items: list[Any] = [1]
    items.append({"again": items})
    return items


def deep() -> list[Any]:
    items: list[Any] = []
    for _ in range(5000):
        items = [items]
    return items


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (len, "builtin_function_or_method.*give its name"),
        (lambda: None, "function.*give its name"),
        ({1, 2}, "set.*sorted"),
        ({1: "a"}, "dict.*keys texts"),
        ([{"a": {1: 2}}], r"\[0\]\['a'\].*dict"),
        (object(), "builtins.object.*expected None, bool"),
        (range(3), "range"),
        (bytearray(b"a"), "bytearray"),
        (slice(3), "slice"),
        (pathlib.PurePath("a"), r"give str\("),
        (np.array([1, None]), "dtype object.*astype"),
        (np.array(["2020"], "M8[D]"), "datetime64"),
        (np.datetime64("2020"), "datetime64"),
        (np.zeros(2, "f4,i2"), "dtype"),
        (np.ma.masked_array([1, 2], [True, False]), "mask"),
        (h5py.Empty("f4"), "h5py.*path"),
        (endless(), "contains itself"),
        (deep(), "nested deeper"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored_is_refused(value: Any, words: str) -> None:
    with pytest.raises(ParameterError, match=f"(?s)^Parameter 'window'.*{words}"):
        encode("window", value)
    with pytest.raises(ParameterError):
        check_parameters({"good": 1, "window": value})
    with pytest.raises(ParameterError, match="Argument 1"):
        arguments_text((1, value), {})
    with pytest.raises(ParameterError, match=r"Keyword argument\['window'\]"):
        arguments_text((), {"window": value})
    assert not same(value, value) or isinstance(value, np.ndarray)


def test_open_hdf5_objects_are_refused_and_nothing_is_written() -> None:
    with in_memory() as file:
        with pytest.raises(ParameterError, match=r"'source'.*h5py.*path"):
            write_parameters(file, {"n": 1, "source": file.create_dataset("d", data=1)})
        with pytest.raises(ParameterError, match=r"'source'.*h5py"):
            write_parameters(file, {"n": 1, "source": file.ref})
        assert not file.attrs
        with pytest.raises(ParameterError, match="expected a dict"):
            check_parameters([("n", 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [3, None, "", "a\0", "\ud800", "n" * 1025, "tool", "last_pixel", "source_000", "lazyproc_", "sidpy_version"]
)
def test_names_that_cannot_be_used_are_refused(name: Any) -> None:
    with pytest.raises(ParameterError, match=r"[Rr]ename"):
        check_parameters({name: 1})


@pytest.mark.parametrize("name", ["a b", "/", "..", "source_1", "source_0000", "Tool", "lazyproc", "n" * 1024])
def test_unusual_names_can_be_used(name: str) -> None:
    assert through_file({name: 1}) == {name: 1}
    assert identical(through_file({name: "x" * 40_000}), {name: "x" * 40_000})
    assert not is_bookkeeping(name)


SAME = [
    (3, np.int64(3)),
    (3, np.uint8(3)),
    (2**63, np.uint64(2**63)),
    (True, np.bool_(True)),
    (0.5, np.float32(0.5)),
    (0.1, np.longdouble(0.1)),
    (math.nan, np.float32(math.nan)),
    (-math.nan, math.nan),
    (0.0, -0.0),
    (1 + 0j, np.complex64(1)),
    (complex(0.0, math.nan), complex(-0.0, math.nan)),
    ("a", b"a"),
    ("µ", "µ".encode()),
    ("a", np.str_("a")),
    (np.array(2.0), 2.0),
    ([1, 2], (1, 2)),
    ([1, 2], np.array([1, 2], ">i2")),
    ([2**63, 1], np.array([2**63, 1], "u8")),
    ([[1.0, 2.0], [3.0, 4.0]], np.array([[1, 2], [3, 4]], "f4")),
    ([np.array([1, 2]), (3, 4)], np.array([[1, 2], [3, 4]])),
    ([np.array([2**63, 2], "u8"), [1, 1]], [[2**63, 2], [1, 1]]),
    ([math.nan, 1.0], np.array([math.nan, 1.0])),
    (np.array([1, 2], np.longdouble) / 3, [np.longdouble(1) / 3, np.longdouble(2) / 3]),
    ([np.longdouble(1) / 3, 0.5], [np.longdouble(1) / 3, np.longdouble(0.5)]),
    (["a", "b"], np.array([b"a", b"b"])),
    (["a", "b"], np.array(["a", "b"])),
    ([b"a", b"\xff"], np.array([b"a", b"\xff"])),
    ([], ()),
    ([], np.zeros(0)),
    ([[], []], np.zeros((2, 0))),
    ({"a": 1, "b": [2]}, {"b": np.array([2]), "a": 1}),
    (None, None),
]
DIFFERENT = [
    (3, 3.0),
    (1, True),
    (1.0, 1 + 0j),
    (0, None),
    (0, "0"),
    ("", None),
    ("", []),
    ([], None),
    (0.1, np.float32(0.1)),
    (1 / 3, np.longdouble(1) / 3),
    (2**64, 2**64 + 1),
    (3, [3]),
    ([1, 2], [2, 1]),
    ([1, 2], [1, 2, 3]),
    ([1e-9, 2e-9], [3e-9, 4e-9]),
    ([1, 2], [1.0, 2.0]),
    ([1, 2], [[1, 2]]),
    ([1, 2.0], [1.0, 2.0]),
    ([0, 1], [False, True]),
    (np.zeros((2, 3)), np.zeros((3, 2))),
    (np.zeros((0, 3)), np.zeros((3, 0))),
    ("ab", ["a", "b"]),
    (["ab"], ["a", "b"]),
    ({}, []),
    ({"a": 1}, {"a": 1, "b": None}),
    ({"a": 1}, [["a", 1]]),
    (math.nan, None),
    (complex(math.nan, 0), complex(0, math.nan)),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a: Any, b: Any) -> None:
    assert canonical(a) == canonical(b)
    assert hash(canonical(a)) == hash(canonical(b))
    assert same([a, {"x": a}], (b, {"x": b}))
    texts = arguments_text((a,), {"k": a}), arguments_text((b,), {"k": b})
    assert same_arguments(*texts) == (texts_in(a) == texts_in(b))
    assert bool(differences({"k": [a]}, {"k": [b]})) == (texts_in(a) != texts_in(b))
    assert differences({"k": [a]}, {"k": [b]}, exact=False) == []


def test_arrays_of_texts_as_h5py_reads_them_compare_as_texts() -> None:
    assert same(np.array(["a", b"b"], object), ["a", "b"])
    assert same(np.array([["a"]], object), [["a"]])
    assert not same(np.array([None, len], object), [None, len])


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a: Any, b: Any) -> None:
    assert canonical(a) != canonical(b)
    assert not same([a, "x"], [b, "x"])
    assert not same({"x": a}, {"x": b})
    assert not same_arguments(arguments_text((a,), {}), arguments_text((b,), {}))
    assert len(differences({"p": a}, {"p": b})) == 1


@settings(max_examples=150, deadline=None)
@given(values)
def test_arguments_are_the_same_as_themselves(value: Any) -> None:
    text = arguments_text((value,), {"b": 1, "a": value})
    assert text == arguments_text((value,), {"a": value, "b": 1})
    assert json.loads(text).keys() == {"args", "kwargs"}
    assert same_arguments(text, arguments_text([value], {"a": decode(*vars(encode("p", value)).values()), "b": 1}))
    assert not same_arguments(text, arguments_text((value, 1), {"b": 1, "a": value}))


NUMBERS = hnp.arrays(
    st.sampled_from(["?", "i1", ">i4", "u8", "f2", ">f4", "f8", "g", "c8", ">c16", "G"]), hnp.array_shapes(max_dims=3)
)


@given(a=NUMBERS, b=NUMBERS, step=st.sampled_from([1, -1, 2]), data=st.data())
def test_arrays_are_the_same_whatever_the_pieces_in_which_they_are_looked_at(
    a: Any, b: Any, step: int, data: Any
) -> None:
    """The forms made as a whole, in one piece, tell what is right."""
    a, b = a[::step], data.draw(st.sampled_from([b, a.copy(), a.astype(a.dtype.newbyteorder()), a.T, a + 0]))
    whole = canonical(a), canonical(a) == canonical(b), digest_of(canonical(a))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazyproc.core.canonical._PIECE", 3)
        assert (canonical(a), same(a, b), digest_of_array(a, "a")) == whole


def test_to_compare_or_digest_a_large_array_takes_little_memory() -> None:
    a = np.random.default_rng(0).standard_normal((1000, 4000)).astype("f4")
    b = a.copy()
    tracemalloc.start()
    try:
        assert same(a, b)
        assert not same(a, b.T)
        arguments_text((a,), {"b": b.T})
        code_hash(lambda: a)
        assert tracemalloc.get_traced_memory()[1] < a.nbytes / 2
    finally:
        tracemalloc.stop()


def test_digests_stay_what_they_are_in_files() -> None:
    array = np.arange(3000).reshape(2, 1500) / 7
    stored = json.loads(arguments_text((array,), {}))["args"][0]["sha256"]
    assert stored == "30b0b054c32e7d88db1dc7531d88660983bd4b2f8ecc69b01b3cbc502d958836"


def test_large_arrays_among_the_arguments_become_digests() -> None:
    wide = np.arange(1000)
    text = arguments_text((wide,), {})
    assert len(text) < 200
    assert '"shape": [1000]' in text
    assert same_arguments(text, arguments_text((wide.astype("f4").astype("i2"),), {}))
    assert same_arguments(text, arguments_text((wide.tolist(),), {}))
    assert not same_arguments(text, arguments_text((wide.astype(float),), {}))
    assert not same_arguments(text, arguments_text((wide.reshape(10, 100),), {}))
    assert not same_arguments(text, arguments_text((wide[::-1],), {}))
    assert same_arguments(arguments_text((wide[:200],), {}), arguments_text((wide[:200].astype("u1"),), {}))
    words = np.array([b"\xff" * 10, b"a"] * 100)
    assert not same_arguments(arguments_text((words,), {}), arguments_text((words[::-1],), {}))


@pytest.mark.parametrize("text", ["", "{", "3", "{}", '{"args": [{"$new": 1}], "kwargs": {}}', '{"args": 1}'])
def test_a_text_that_is_none_is_the_same_as_no_arguments(text: str) -> None:
    assert not same_arguments(text, arguments_text((), {}))


def test_differences_in_words() -> None:
    long = np.arange(1000.0)
    changed = long.copy()
    changed[537] = -1
    stored = {"smoothing": 3, "model": "a", "row": long, "grid": np.zeros((2, 50)), "same": [1], "text": "a\nb", "f": 1}
    wanted = {"smoothing": 5, "window": 7, "row": changed, "grid": np.zeros((50, 2)), "same": (1,), "text": None}
    wanted["f"] = len
    assert differences(stored, wanted) == [
        "smoothing: stored 3 (int), wanted 5 (int)",
        "model: stored 'a', not wanted",
        "row: stored array (1000,) of float64 [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, …], wanted array (1000,) of float64 "
        "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, …]; first different at [537]: 537.0 and -1.0",
        "grid: stored array (2, 50) of float64 [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, …], "
        "wanted array (50, 2) of float64 [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, …]",
        r"text: stored 'a\nb' (str), wanted None",
        "f: stored 1 (int), wanted <built-in function len> (builtin_function_or_method) (cannot be compared)",
        "window: not stored, wanted 7",
    ]
    assert differences({"on": 1}, {"on": np.True_}) == ["on: stored 1 (int), wanted True (bool)"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=8, max_size=20), st.data())
def test_the_first_difference_of_long_lists(rows: list[list[int]], data: st.DataObject) -> None:
    i, j = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, 4))
    changed = [list(row) for row in rows]
    changed[i][j] = 9
    assert differences({"p": rows}, {"p": np.array(changed)})[0].endswith(
        f"first different at [{i}, {j}]: {rows[i][j]} and 9"
    )


@settings(max_examples=100, deadline=None)
@given(values, values)
def test_every_difference_is_told_in_one_short_line(a: Any, b: Any) -> None:
    lines = differences({"p": a}, {"p": b})
    assert bool(lines) == (canonical(a) != canonical(b))
    assert all("\n" not in line and len(line) < 2500 for line in lines)
