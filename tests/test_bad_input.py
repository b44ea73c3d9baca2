# ruff: noqa: E501
"""Bad input, in one table: the right exception, a message that helps, and files that are byte for byte as before."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file, random_data

import lazyproc
from lazyproc import Dimension, Output, Process
from lazyproc.core.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DefinitionError,
    FunctionError,
    MemoryLimitError,
    NotMainDatasetError,
    OutputError,
    ParameterError,
    ReadOnlyFileError,
)
from lazyproc.hdf5.usid import REFERENCES
from lazyproc.status import file_status

TYPE, VALUE = (ArgumentTypeError, TypeError), (ArgumentValueError, ValueError)
PARAMETER = (ParameterError, ValueError, TypeError)
NOT_MAIN = (NotMainDatasetError, ValueError)
READ_ONLY = (ReadOnlyFileError, OSError)
MEMORY = (MemoryLimitError, ValueError)
OUTPUT = (OutputError, ValueError)
FUNCTION = (FunctionError, RuntimeError)
DEFINITION = (DefinitionError, TypeError)
MISSING = (FileNotFoundError, OSError)

MAIN = f"{CHANNEL}/Raw_Data"


class Mean(Process):
    outputs = {"Mean": Output("f8", units="nA")}

    @staticmethod
    def _map_function(spectrum, power=1):
        return float(np.mean(spectrum)) ** power


class NeedsWidth(Mean):
    @staticmethod
    def _map_function(spectrum, width):
        return float(np.mean(spectrum)) * width


@dataclass
class Env:
    """A scan in a folder of its own, reached by its path or through an open handle."""

    folder: Path
    by: str
    opened: list[h5py.File] = field(default_factory=list)

    @property
    def path(self) -> str:
        return os.fspath(self.folder / "scan.h5")

    def file(self, mode: str = "r+") -> h5py.File:
        self.opened.append(h5py.File(self.path, mode))
        return self.opened[-1]

    def main(self) -> Any:
        return f"{self.path}::{MAIN}" if self.by == "path" else self.file()[MAIN]

    def new(self, cls: type[Process] = Mean, **options: Any) -> Process:
        if "h5_main" not in options:
            options["h5_main"] = self.main()
        return cls(**options)

    def compute(self, cls: type[Process] = Mean, *args: Any, compute_kwargs: Any = None, **options: Any) -> Any:
        return self.new(cls, **options).compute(False, *args, **(compute_kwargs or {}))

    def close(self) -> None:
        for file in self.opened:
            if file:
                file.close()

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of all files in the folder: sidecar files would show, too."""
        return {os.fspath(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes
    ----------
    name : str
        What is wrong.
    act : callable
        Does it.
    error : tuple of type
        What must be raised: the class of lazyproc, and the built-in ones that it must be, too.
    words : tuple of str
        What the message must contain.
    prepare : callable, optional
        Changes the file before.
    by : tuple of str
        By path, by handle, or both.
    """

    name: str
    act: Callable[[Env], Any]
    error: tuple[type[BaseException], ...]
    words: tuple[str, ...]
    prepare: Callable[[h5py.File], Any] | None = None
    by: tuple[str, ...] = ("path", "handle")


def option(name: str, values: dict[str, Any], error: Any, *words: str, shown: bool = True) -> list[Row]:
    """Make a row for each bad value of one argument of the constructor; the message must show name and value."""
    return [
        Row(
            f"{name}={text}",
            lambda env, value=value: env.new(**{name: value}),
            error,
            (name, *((str(value),) if shown else ()), *words),
            by=("path",),
        )
        for text, value in values.items()
    ]


# -- the arguments of the constructor --------------------------------------------------------------------------------


def closed_dataset(env):
    with h5py.File(env.path, "r") as file:
        dataset = file[MAIN]
    return env.new(h5_main=dataset)


def closed_group(env):
    with h5py.File(env.path, "r") as file:
        group = file[CHANNEL]
    return env.new(h5_target_group=group)


def text_file(env, name="notes.txt", text=b"these are no data, and not HDF5 either"):
    """Write something that is no HDF5 file outside of the folder that is compared."""
    path = env.folder.parent / f"{env.folder.name}-{name}"
    path.write_bytes(text)
    return os.fspath(path)


def asynchronous_client(env):
    from distributed import Client

    async def use():
        async with Client(processes=False, asynchronous=True, dashboard_address=":0") as client:
            return env.new(client=client)

    return asyncio.run(use())


by_path = ("path",)
by_handle = ("handle",)

H5_MAIN = [
    Row("None", lambda env: env.new(h5_main=None), TYPE, ("h5_main", "NoneType", "h5py.Dataset", "scan.h5::/"), None, by_path),
    Row("an int", lambda env: env.new(h5_main=3), TYPE, ("h5_main", "int", "h5py.Dataset"), None, by_path),
    Row("bytes", lambda env: env.new(h5_main=b"scan.h5::/x"), TYPE, ("h5_main", "bytes"), None, by_path),
    Row("an array", lambda env: env.new(h5_main=np.ones((3, 3))), TYPE, ("h5_main", "ndarray"), None, by_path),
    Row("a group", lambda env: env.new(h5_main=env.file()[CHANNEL]), TYPE, ("h5_main", "Group", "Dataset"), None, by_handle),
    Row("a file", lambda env: env.new(h5_main=env.file()), TYPE, ("h5_main", "File", "Dataset"), None, by_handle),
    Row("a closed dataset", closed_dataset, VALUE, ("h5_main", "closed", "Open it again"), None, by_handle),
    Row("no such file", lambda env: env.new(h5_main=f"{env.folder}/none.h5::/a"), MISSING, ("none.h5", "no such file"), None, by_path),
    Row("a folder", lambda env: env.new(h5_main=f"{env.folder}::/a"), VALUE, ("{folder}",), None, by_path),
    Row("no HDF5 file", lambda env: env.new(h5_main=f"{text_file(env)}::/a"), VALUE, ("notes.txt", "not an HDF5 file"), None, by_path),
    Row("an empty file", lambda env: env.new(h5_main=f"{text_file(env, text=b'')}::/a"), VALUE, ("not an HDF5 file",), None, by_path),
    Row("a group's address", lambda env: env.new(h5_main=f"{env.path}::{CHANNEL}"), VALUE, ("h5_main", CHANNEL, "a group", "whole address"), None, by_path),
    Row("only the file", lambda env: env.new(h5_main=env.path), VALUE, ("h5_main", "a group", "whole address"), None, by_path),
    Row("nothing there", lambda env: env.new(h5_main=f"{env.path}::/nothing"), VALUE, ("h5_main", "/nothing", "not there"), None, by_path),
    Row("a part too much", lambda env: env.new(h5_main=f"{env.path}::{MAIN}/more"), VALUE, ("h5_main", "more", "not there"), None, by_path),
    Row("no file name", lambda env: env.new(h5_main=f"::{MAIN}"), VALUE, ("h5_main", "scan.h5::/"), None, by_path),
    Row("an empty text", lambda env: env.new(h5_main=""), VALUE, ("h5_main", "''"), None, by_path),
]  # fmt: skip

OPTIONS = [
    *option("process_name", {"a number": 3}, TYPE, "int", "text", shown=False),
    *option("process_name", {"bytes": b"Mean"}, TYPE, "bytes", "text", shown=False),
    *option("process_name", {"empty": "", "blank": "  ", "dots": "..", "slash": "a/b"}, VALUE, "without '/'"),
    *option("process_name", {"NUL": "a\0b", "surrogate": "a\ud800"}, VALUE, "text", shown=False),
    *option("parms_dict", {"list": [1], "text": "power", "number": 3}, TYPE, "dict", shown=False),
    *option("cores", {"0": 0, "-1": -1}, VALUE, "1 or more"),
    *option("cores", {"1.5": 1.5, "text": "2", "True": True}, TYPE, "whole number"),
    *option("max_mem_mb", {"0": 0, "-5": -5}, VALUE, "MiB"),
    *option("max_mem_mb", {"1.5": 1.5, "text": "64", "True": True, "NaN": float("nan")}, TYPE, "MiB"),
    *option("mem_multiplier", {"0.5": 0.5, "0": 0, "-1": -1, "NaN": float("nan"), "inf": float("inf")}, VALUE, "at least 1"),
    *option("mem_multiplier", {"text": "2", "True": True, "None": None}, TYPE, "at least 1"),
    *option("lazy", {"2": 2, "-1": -1, "1.0": 1.0, "text": "yes", "None": None}, TYPE, "True or False"),
    *option("verbose", {"2": 2, "numpy 2": np.int64(2), "None": None, "0.0": 0.0}, TYPE, "True or False"),
    *option("client", {"number": 3, "address": "tcp://127.0.0.1:8786"}, TYPE, "distributed.Client", shown=False),
    Row("client=asynchronous", asynchronous_client, VALUE, ("client", "asynchronous", "synchronous"), None, by_path),
    *option("checkpoint_interval", {"-1": -1, "NaN": float("nan")}, VALUE, "0 seconds or more"),
    *option("checkpoint_interval", {"text": "10", "None": None, "True": True}, TYPE, "seconds"),
    *option("verify", {"unknown": "all"}, VALUE, "'sampled', 'full', 'none'"),
    *option("verify", {"None": None, "number": 3, "True": True}, TYPE, "'sampled', 'full', 'none'"),
    Row("an unknown option", lambda env: env.new(colour="red"), (TypeError,), ("colour",), None, by_path),
]  # fmt: skip

TARGETS = [
    Row("a number", lambda env: env.new(h5_target_group=3), TYPE, ("h5_target_group", "int", "h5py.Group", "out.h5::/")),
    Row("a dataset", lambda env: env.new(h5_target_group=env.file()[MAIN], h5_main=env.file()[MAIN]), TYPE, ("h5_target_group", "Dataset", "Group"), None, by_handle),
    Row("a closed group", closed_group, VALUE, ("h5_target_group", "closed", "Open it again")),
    Row("a dataset's address", lambda env: env.new(h5_target_group=f"{env.path}::{MAIN}"), VALUE, ("h5_target_group", MAIN, "a dataset", "group"), None, by_path),
    Row("a path through a dataset", lambda env: env.new(h5_target_group=f"{env.path}::{MAIN}/fits"), VALUE, ("h5_target_group", "dataset", "group"), None, by_path),
    Row("no HDF5 file", lambda env: env.new(h5_target_group=f"{text_file(env)}::/fits"), VALUE, ("notes.txt", "not an HDF5 file"), None, by_path),
    Row("a folder that is not there", lambda env: env.new(h5_target_group=f"{env.folder}/none/out.h5::/"), READ_ONLY, ("h5_target_group", "none", "does not exist"), None, by_path),
    Row("a folder", lambda env: env.new(h5_target_group=f"{env.folder}::/"), (Exception,), ("{folder}",), None, by_path),
    Row("an empty text", lambda env: env.new(h5_target_group=""), VALUE, ("h5_target_group", "''"), None, by_path),
    Row("a read-only handle", lambda env: env.new(h5_target_group=env.file("r")["/"], h5_main=env.file("r")[MAIN]), READ_ONLY, ("h5_target_group", "mode 'r'", "r+", "lazy=True"), None, by_handle),
    Row("the default in a read-only file", lambda env: env.new(h5_main=env.file("r")[MAIN]), READ_ONLY, ("h5_target_group", "mode 'r'", "r+", "lazy=True"), None, by_handle),
    Row("computing in a read-only file", lambda env: env.new(h5_main=env.file("r")[MAIN], lazy=True).compute(), READ_ONLY, ("mode 'r'", "r+"), None, by_handle),
]  # fmt: skip


# -- what is no main dataset -----------------------------------------------------------------------------------------


def replaced(data: Any) -> Callable[[h5py.File], None]:
    """Put other data in the place of the main dataset, with its attributes."""

    def prepare(file):
        attrs = dict(file[MAIN].attrs)
        del file[MAIN]
        file.create_dataset(MAIN, data=data).attrs.update(attrs)

    return prepare


def ancillary(name: str, data: Any) -> Callable[[h5py.File], None]:
    """Let the main dataset refer to another ancillary dataset."""

    def prepare(file):
        other = file.create_dataset("other", data=data)
        other.attrs.update(file[f"{CHANNEL}/{name}"].attrs)
        file[MAIN].attrs[name] = other.ref

    return prepare


def without(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file[MAIN].attrs.__delitem__(name)


def with_attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    def prepare(file):
        file[MAIN].attrs[name] = value(file) if callable(value) else value

    return prepare


def not_main(name: str, prepare: Callable[[h5py.File], Any], *words: str) -> Row:
    return Row(name, lambda env: env.new(), NOT_MAIN, (MAIN, "not a USID Main dataset", *words), prepare)


NULL = h5py.h5r.Reference()
NOT_MAIN_DATASETS = [
    *(not_main(f"no {name}", without(name), name, "expected") for name in ("quantity", "units", *REFERENCES)),
    not_main("one dimension", replaced(np.ones(20)), "(20,)", "two dimensions", "n_positions, n_spectral"),
    not_main("three dimensions", replaced(np.ones((4, 5, 6))), "(4, 5, 6)", "two dimensions"),
    not_main("a single value", replaced(1.0), "()", "two dimensions"),
    not_main("zero positions", replaced(np.ones((0, 6))), "no positions", "(0, 6)", "at least one"),
    not_main("zero columns", replaced(np.ones((20, 0))), "no columns", "(20, 0)", "at least one"),
    not_main("a quantity that is no text", with_attribute("quantity", 3), "quantity", "3", "text"),
    *(not_main(f"{name} as text", with_attribute(name, "here"), name, "'here'", "reference") for name in REFERENCES),
    not_main("a null reference", with_attribute("Position_Values", NULL), "Position_Values", "null"),
    not_main("a reference to a group", with_attribute("Position_Values", lambda f: f[CHANNEL].ref), "Position_Values", "dataset"),
    *(not_main(f"{name} deleted", lambda file, name=name: file.__delitem__(f"{CHANNEL}/{name}"), name, "deleted") for name in REFERENCES),
    not_main("too few position indices", ancillary("Position_Indices", np.ones((19, 2))), "Position_Indices", "(19, 2)", "(20, n_position_dims)"),
    not_main("too many position values", ancillary("Position_Values", np.ones((21, 2))), "Position_Values", "(21, 2)"),
    not_main("transposed values", ancillary("Spectroscopic_Values", np.ones((6, 1))), "Spectroscopic_Values", "(6, 1)", "(n_spectral_dims, 6)"),
    not_main("a dimension more", ancillary("Position_Values", np.ones((20, 3))), "Position_Values", "(20, 3)"),
    not_main("no labels", lambda file: file[f"{CHANNEL}/Position_Indices"].attrs.__delitem__("labels"), "Position_Indices", "labels"),
    not_main("other labels", lambda file: file[f"{CHANNEL}/Position_Indices"].attrs.modify("labels", ["A", "B"]), "labels", "'A'"),
]  # fmt: skip


# -- what the function gives -----------------------------------------------------------------------------------------


def returning(value: Any, outputs: dict[str, Output] | None = None, *, block: bool = False) -> type[Process]:
    """Make a class whose function returns a value, or what a callable makes of its data."""
    outputs = outputs or {"Mean": Output("f8")}

    def function(data):
        return value(data) if callable(value) else value

    members = {"outputs": outputs, "_block_function" if block else "_map_function": staticmethod(function)}
    return type("Returning", (Process,), members)


def gives(name: str, value: Any, *words: str, outputs: Any = None, block: bool = False, where: str = "position") -> Row:
    cls = returning(value, outputs, block=block)
    what = f"{'a block function' if block else 'a function'} gives {name}"
    return Row(what, lambda env: env.compute(cls), OUTPUT, ("Returning", where, MAIN, *words))


def divide(data):
    return 1 // 0


TWO = {"Low": Output("f8"), "High": Output("f8")}
THREE = {"Fit": Output("f8", dims=[Dimension("Parameter", "a.u.", 3)])}
WHOLE = {"Count": Output("i2")}
RECORD = {"Fit": Output([("Amplitude", "f4"), ("Phase", "f4")])}
FUNCTIONS = [
    gives("a wrong shape", np.ones(2), "'Mean'", "(2,)", "()", "dims"),
    gives("too few values", np.ones(2), "'Fit'", "(2,)", "(3,)", outputs=THREE),
    gives("a matrix", np.ones((3, 3)), "'Fit'", "(3, 3)", "(3,)", outputs=THREE),
    gives("a wrong dtype", 1j, "'Mean'", "complex128", "float64"),
    gives("fractions for whole numbers", 1.5, "'Count'", "float64", "int16", outputs=WHOLE),
    gives("too large a number", 40_000, "'Count'", "40000", "int16", "wider", outputs=WHOLE),
    gives("too few outputs", (1.0,), "tuple of 1", "['Low', 'High']", outputs=TWO),
    gives("too many outputs", (1.0, 2.0, 3.0), "tuple of 3", "['Low', 'High']", outputs=TWO),
    gives("one value for two outputs", 1.0, "1.0", "['Low', 'High']", outputs=TWO),
    gives("a list for two outputs", [1.0, 2.0], "list", "['Low', 'High']", outputs=TWO),
    gives("wrong names", {"low": 1.0, "High": 2.0}, "missing: ['Low']", "not declared: ['low']", outputs=TWO),
    gives("a name too few", {"Low": 1.0}, "missing: ['High']", outputs=TWO),
    gives("a name too many", {"Mean": 1.0, "More": 1.0}, "not declared: ['More']"),
    gives("nothing", None, "'Mean'", "None", "float64"),
    gives("nothing for two outputs", None, "None", "['Low', 'High']", outputs=TWO),
    gives("ragged lists", [1.0, [2.0, 3.0], 4.0], "'Fit'", "list", "(3,)", outputs=THREE),
    gives("a text", "large", "'Mean'", "'large'", "float64"),
    gives("an object", object(), "'Mean'", "object", "float64"),
    gives("a number for a record", 1.0, "'Fit'", "float64", "'Amplitude'", outputs=RECORD),
    gives("a field too many", (1.0, 2.0, 3.0), "'Fit'", "(1.0, 2.0, 3.0)", "'Amplitude'", outputs=RECORD),
    gives("another shape later", lambda row: row[:3] if row[0] < np.inf else row, "'Mean'", "(3,)"),
    gives("one value", 1.0, "'Mean'", "shape ()", "positions come first", block=True),
    gives("too few positions", lambda b: np.ones(len(b) + 1), "'Mean'", "positions come first", block=True),
    gives("a wrong shape", lambda b: np.ones((len(b), 2)), "'Fit'", "(2,)", "(3,)", outputs=THREE, block=True),
    gives("a wrong dtype", lambda b: np.ones(len(b), "c8"), "complex64", "float64", block=True),
    gives("too large a number", lambda b: np.full(len(b), 40_000), "40000", "int16", outputs=WHOLE, block=True),
    gives("too few outputs", lambda b: (b[:, 0],), "tuple of 1", "['Low', 'High']", outputs=TWO, block=True),
    gives("one array for two outputs", lambda b: b[:, :2], "array of shape", "['Low', 'High']", outputs=TWO, block=True),
    gives("wrong names", lambda b: {"mean": b[:, 0]}, "missing: ['Mean']", "['mean']", block=True),
    gives("nothing", None, "'Mean'", "None", block=True),
    gives("ragged lists", lambda b: [[1.0, 2.0, 3.0]] * (len(b) - 1) + [[1.0]], "'Fit'", "list", outputs=THREE, block=True),
    gives("a text", "large", "'Mean'", "'large'", block=True),
    gives("texts", lambda b: ["large"] * len(b), "'Mean'", "'large'", block=True),
    Row("a function that fails", lambda env: env.compute(returning(divide)), FUNCTION, ("Returning", "position", MAIN, "ZeroDivisionError")),
    Row("a block function that fails", lambda env: env.compute(returning(divide, block=True)), FUNCTION, ("Returning", "positions", MAIN, "ZeroDivisionError")),
    Row("test of a function that fails", lambda env: env.new(returning(divide)).test(7), FUNCTION, ("position 7", "ZeroDivisionError")),
    Row("test of a wrong shape", lambda env: env.new(returning(np.ones(2))).test(7), OUTPUT, ("position 7", "(2,)", "()")),
]  # fmt: skip


# -- parameters and arguments ----------------------------------------------------------------------------------------


def in_itself():
    items: list[Any] = [1]
    items.append(items)
    return items


def parameter(name: str, parameters: dict[Any, Any], *words: str) -> Row:
    return Row(f"parameter: {name}", lambda env: env.new(parms_dict=parameters), PARAMETER, words, None, by_path)


PARAMETERS = [
    parameter("a function", {"model": divide}, "'model'", "function"),
    parameter("an object", {"model": object()}, "'model'", "object"),
    parameter("a class", {"model": Mean}, "'model'"),
    parameter("a set", {"model": {1, 2}}, "'model'", "set"),
    parameter("an array of objects", {"model": np.array([None, {}], object)}, "'model'", "object"),
    parameter("a masked array", {"model": np.ma.masked_equal([1, 2], 2)}, "'model'"),
    parameter("a dict with other keys", {"model": {1: 2}}, "'model'", "key"),
    parameter("itself", {"model": in_itself()}, "'model'"),
    parameter("deep inside", {"model": [1, {"x": (2, divide)}]}, "'model'"),
    parameter("a name that is no text", {3: 1}, "3", "text"),
    parameter("an empty name", {"": 1}, "''", "empty"),
    *(
        parameter(f"the reserved name {name}", {name: 1}, repr(name), "reserved", "Rename")
        for name in ("tool", "last_pixel", "timestamp", "source_000", "lazyproc_run_id", "source_file_path")
    ),
    Row("parameter: a dataset", lambda env: env.new(parms_dict={"d": env.file()[MAIN]}, h5_main=env.file()[MAIN]), PARAMETER, ("'d'", "Dataset"), None, by_handle),
    Row("parameter: changed to one that cannot be stored", lambda env: change_parameters(env), PARAMETER, ("'model'", "function")),
    Row("a required parameter is missing", lambda env: env.compute(NeedsWidth), PARAMETER, ("width", "parms_dict")),
    Row("an unknown argument", lambda env: env.compute(compute_kwargs={"colour": 1}), PARAMETER, ("'colour'", "power")),
    Row("too many arguments", lambda env: env.compute(Mean, 1, 2), PARAMETER, ("_map_function", "2 positional", "at most 1")),
    Row("a name given twice", lambda env: env.compute(parms_dict={"power": 1}, compute_kwargs={"power": 2}), PARAMETER, ("power", "parms_dict")),
    Row("a name given by position, too", lambda env: env.compute(Mean, 2, parms_dict={"power": 1}), PARAMETER, ("'power'", "once")),
    Row("an argument that cannot be told from others", lambda env: env.compute(compute_kwargs={"power": divide}), PARAMETER, ("power", "function")),
    Row("an unknown argument of test", lambda env: env.new().test(colour=1), PARAMETER, ("'colour'",)),
    Row("an unknown argument of plan", lambda env: env.new().plan(colour=1), PARAMETER, ("'colour'",)),
    Row("an unknown argument of to_xarray", lambda env: env.new().to_xarray(colour=1), PARAMETER, ("'colour'",)),
]  # fmt: skip


def change_parameters(env):
    process = env.new()
    process.parms_dict = {"model": divide}
    process.compute()


# -- methods ---------------------------------------------------------------------------------------------------------


def after_closing(env):
    process = env.new()
    process.close()
    env.close()
    return process.compute()


METHODS = [
    Row("override that is no truth value", lambda env: env.new().compute("yes"), TYPE, ("override", "'yes'", "True or False")),
    *(Row(f"test of {text}", lambda env, value=value: env.new().test(value), TYPE, ("positions", "sequence of positions")) for text, value in
      {"a text": "first", "a fraction": 1.5, "nothing": [], "ragged lists": [[1], [1, 2]], "a matrix": [[1, 2]], "truth values": [True, False]}.items()),
    Row("test beyond the end", lambda env: env.new().test(20), VALUE, ("positions", "20", "0 to 19")),
    Row("test far before the start", lambda env: env.new().test([0, -21]), VALUE, ("positions", "-21", "0 to 19")),
    Row("no partial results", lambda env: env.new().use_partial_computation(), VALUE, ("h5_partial_group", "no partial results")),
    Row("why_not_duplicate of nothing", lambda env: env.new().why_not_duplicate("nothing"), TYPE, ("group", "results group")),
    Row("why_not_duplicate of a dataset", lambda env: env.new().why_not_duplicate(MAIN), TYPE, ("group", "results group")),
    Row("computing after closing", after_closing, VALUE, ("Mean", "closed", "Open it again")),
    Row("a name changed to a bad one", lambda env: renamed(env), VALUE, ("process_name", "'a/b'")),
    Row("open_results of a number", lambda env: lazyproc.open_results(3), TYPE, ("group", "3"), None, by_path),
    Row("open_results of a dataset", lambda env: lazyproc.open_results(f"{env.path}::{MAIN}"), TYPE, ("group", MAIN), None, by_path),
    Row("open_results of another group", lambda env: lazyproc.open_results(f"{env.path}::/Measurement_000"), (lazyproc.LazyprocError, ValueError), ("Measurement_000", "main dataset"), None, by_path),
    Row("map_positions of no function", lambda env: lazyproc.map_positions(3, env.main(), Output("f4")), TYPE, ("function", "3")),
    Row("map_positions afresh and kept nowhere", lambda env: lazyproc.map_positions(np.mean, env.main(), Output("f4"), lazy=True, override=True), VALUE, ("override", "lazy=True")),
    Row("map_positions with a limit that nothing counts for", lambda env: lazyproc.map_positions(np.mean, env.main(), Output("f4"), max_failures=3), VALUE, ("max_failures", "3", "on_error='record'")),
    Row("map_positions with parameters that cannot be handed on", lambda env: lazyproc.map_positions(max, env.main(), Output("f4"), params={"key": "x"}), PARAMETER, ("max", "'key'", "Wrap it")),
    Row("map_positions without outputs", lambda env: lazyproc.map_positions(np.mean, env.main(), {}), DEFINITION, ("outputs", "{}")),
]  # fmt: skip


def renamed(env):
    process = env.new()
    process.process_name = "a/b"
    return process.compute()


# -- memory ----------------------------------------------------------------------------------------------------------


def hungry(block):
    return block[:, 0] + np.ones((len(block), 6 * 2**20)).sum() * 0


LIMIT = 15
HUNGRY = returning(hungry, block=True)
MEMORY_ROWS = [
    Row("less than lazyproc itself takes", lambda env: env.compute(max_mem_mb=1), MEMORY, ("max_mem_mb: 1 MiB", "Raise max_mem_mb to")),
    Row("plan with too little memory", lambda env: env.new(max_mem_mb=1).plan(), MEMORY, ("max_mem_mb: 1 MiB", "Raise max_mem_mb to")),
    Row("a multiplier that is too large", lambda env: env.compute(max_mem_mb=LIMIT, mem_multiplier=1e6), MEMORY, ("mem_multiplier 1e+06", "Raise max_mem_mb to")),
    Row("temporaries that are too large", lambda env: env.compute(HUNGRY, max_mem_mb=40), MEMORY, ("max_mem_mb: 40 MiB", "temporaries", "Raise max_mem_mb to")),
]  # fmt: skip


# -- declarations ----------------------------------------------------------------------------------------------------


def declares(name: str, members: dict[str, Any], *words: str) -> Row:
    """Make a row of a class that cannot work; shown when it is made or, at the latest, when it is used."""
    return Row(
        f"class: {name}",
        lambda env: env.new(type("Wrong", (Process,), dict(members))),
        DEFINITION,
        ("Wrong", *words),
        None,
        by_path,
    )


def raises(name: str, make: Callable[[], Any], *words: str) -> Row:
    return Row(name, lambda env: make(), DEFINITION, words, None, by_path)


ONE = {"Mean": Output("f8")}
PLAIN = staticmethod(lambda data: 1.0)
DECLARATIONS = [
    declares("no outputs at all", {"_map_function": PLAIN}, "_map_function", "outputs"),
    declares("empty outputs", {"outputs": {}, "_map_function": PLAIN}, "outputs", "{}"),
    declares("outputs in a list", {"outputs": [Output("f8")], "_map_function": PLAIN}, "outputs", "dict"),
    declares("a dtype for an output", {"outputs": {"Mean": "f8"}, "_map_function": PLAIN}, "'Mean'", "'f8'", "Output"),
    declares("no function", {"outputs": ONE}, "no function", "_map_function", "_block_function"),
    declares("both functions", {"outputs": ONE, "_map_function": PLAIN, "_block_function": PLAIN}, "_map_function", "_block_function", "one of them"),
    declares("an instance method", {"outputs": ONE, "_map_function": lambda self, spectrum: 1.0}, "_map_function", "instance", "@staticmethod"),
    declares("a class method", {"outputs": ONE, "_block_function": classmethod(lambda cls, block: 1.0)}, "_block_function", "@staticmethod"),
    declares("no function but a number", {"outputs": ONE, "_map_function": 3}, "_map_function", "3", "function"),
    *(declares(f"outputs and {hook}", {"outputs": ONE, "_map_function": PLAIN, hook: lambda self: None}, hook, "outputs", "remove") for hook in
      ("_create_results_datasets", "_read_data_chunk", "_unit_computation", "_write_results_chunk", "_get_existing_datasets")),
    *(declares(f"an output named {name!r}", {"outputs": {name: Output("f8")}, "_map_function": PLAIN}, repr(name)) for name in
      ("", "a/b", ".", "..", 3, "completed_positions", "Position_Indices", "Spectroscopic_Values", "Fit_Spectroscopic_Indices")),
    raises("an unknown dtype", lambda: Output("float17"), "Output", "'float17'", "NumPy dtype"),
    raises("objects", lambda: Output(object), "Output", "object"),
    raises("texts of any length", lambda: Output("U8"), "Output", "<U8", "fixed"),
    raises("times", lambda: Output("M8[s]"), "Output", "datetime64"),
    raises("nothing", lambda: Output("V0"), "Output"),
    raises("objects in a compound", lambda: Output([("a", "f4"), ("b", object)]), "Output"),
    raises("dims of numbers", lambda: Output("f4", dims=[3]), "dims", "[3]", "Dimension"),
    raises("no dims in a list", lambda: Output("f4", dims=[]), "dims", "[]"),
    raises("dims of one name", lambda: Output("f4", dims=[Dimension("A", "", 2), Dimension("A", "", 3)]), "['A', 'A']", "different names"),
    raises("dims and the source's shape", lambda: Output("f4", dims=[Dimension("A", "", 2)], shape_from_main=True), "dims", "shape_from_main"),
    raises("shape_from_main as a number", lambda: Output("f4", shape_from_main=1), "shape_from_main", "1"),
    raises("a quantity of numbers", lambda: Output("f4", quantity=3), "quantity", "3"),
    raises("units of None", lambda: Output("f4", units=None), "units", "None"),
    raises("a fill value of another type", lambda: Output("f4", fill_value="none"), "fill_value", "'none'", "float32"),
    *(raises(f"{value!r:.20} as a fill value of {dtype}", lambda dtype=dtype, value=value: Output(dtype, fill_value=value), "Output: fill_value", repr(value), str(np.dtype(dtype)), "same") for dtype, value in
      (("i4", 1.5), ("i4", np.float32(1.5)), ("i4", np.nan), ("i4", np.float32(np.nan)), ("i4", 2**31), ("u1", 300), ("u1", -1), ("u1", np.int64(300)), ("i8", 2.0**63),
       ("f4", 1e300), ("f4", -1e300), ("f2", 70000), ("f8", 2**2000), ("f4", 1j), ("f4", np.complex64(1)), ("c8", 1e300j), ("?", 2), ("f8", "1.5"),
       ("S3", b"abcd"), ("S3", "abcd"), ("S3", 7), ("S3", "é"), ("f4", [1, 2]), ("f4", [1]), ("f4,i2", (1, 2.5)), ("f4,i2", (1e300, 2)), ("f4,i2", 2.5), ("f4,i2", (1, 2, 3)), ("S2,i2", (b"abc", 2)))),
    raises("a fill value with a zero byte inside", lambda: Output("S3", fill_value=b"a\0b"), "fill_value", "zero byte"),
    *(raises(f"{label} with {text!r}", lambda label=label, text=text: Output("f4", **{label: text}), f"Output: {label}", repr(text), "zero bytes") for label in ("quantity", "units") for text in ("a\0b", "\ud800")),
    raises("a dimension with a zero byte", lambda: Dimension("a\0b", "V", 3), "Dimension: name", repr("a\0b"), "zero bytes"),
    raises("units of a dimension with a zero byte", lambda: Dimension("Bias", "\0", 3), "'Bias'", "units", "zero bytes"),
    declares("an output with a zero byte", {"outputs": {"a\0b": Output("f8")}, "_map_function": PLAIN}, repr("a\0b"), "zero bytes"),
    raises("dims of a number", lambda: Output("f4", dims=3), "dims is 3", "list of Dimension"),
    raises("fields in disorder", lambda: Output({"names": ["b", "a"], "formats": ["f8", "i1"], "offsets": [8, 0], "itemsize": 24}), "dtype", "'a'", "byte 0", "order of their offsets"),
    raises("fields in disorder in a field", lambda: Output([("n", {"names": ["b", "a"], "formats": ["f8", "i1"], "offsets": [8, 0]}, (2,))]), "'a'", "order of their offsets"),
    raises("fields that overlap", lambda: Output({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2], "itemsize": 8}), "'b'", "byte 2", "overlap"),
    raises("a field with a zero byte", lambda: Output([("a\0", "f4")]), repr("a\0"), "zero bytes"),
    *(raises(f"a field of {form}", lambda form=form: Output([("x", "f4"), ("a", *form)]), "'a'", "expected a number") for form in (("U4",), ("M8[s]",), ("m8[s]",), ("S0",), ("V0",), ("f4", (0,)))),
    raises("a text in a field of a field", lambda: Output([("a", [("b", "U2")], (3,))]), "'b'", "<U2", "expected a number"),
    raises("no fields", lambda: Output({"names": [], "formats": [], "itemsize": 8}), "at least one field"),
    raises("a dtype of unequal lists", lambda: Output({"names": ["a"], "formats": []}), "dtype", "NumPy dtype"),
    raises("a dimension without a name", lambda: Dimension("", "V", 3), "Dimension", "''"),
    raises("a dimension named by a number", lambda: Dimension(3, "V", 3), "Dimension", "3"),
    raises("a dimension with units of None", lambda: Dimension("Bias", None, 3), "'Bias'", "units", "None"),
    raises("a dimension without values", lambda: Dimension("Bias", "V", 0), "'Bias'", "values"),
    raises("a dimension with an empty list", lambda: Dimension("Bias", "V", []), "'Bias'", "(0,)"),
    raises("a dimension with fewer than none", lambda: Dimension("Bias", "V", -3), "'Bias'", "values"),
    raises("a dimension of two dimensions", lambda: Dimension("Bias", "V", [[1, 2]]), "'Bias'", "(1, 2)", "one row"),
    raises("a dimension of texts", lambda: Dimension("Bias", "V", ["low", "high"]), "'Bias'", "numbers"),
]  # fmt: skip


# -- the test --------------------------------------------------------------------------------------------------------

TABLE = {
    "h5_main": H5_MAIN,
    "option": OPTIONS,
    "target": TARGETS,
    "not main": NOT_MAIN_DATASETS,
    "function": FUNCTIONS,
    "parameter": PARAMETERS,
    "method": METHODS,
    "memory": MEMORY_ROWS,
    "declaration": DECLARATIONS,
}
ROWS = [(f"{part}: {row.name}", row, by) for part, rows in TABLE.items() for row in rows for by in row.by]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")
@pytest.mark.parametrize(("row", "by"), [row[1:] for row in ROWS], ids=[f"{row[0]}, by {row[2]}" for row in ROWS])
def test_bad_input_is_refused_and_changes_nothing(tmp_path, row, by):
    env = Env(tmp_path / "data", by)
    env.folder.mkdir()
    make_usid_file(env.path)
    if row.prepare is not None:
        with h5py.File(env.path, "r+") as file:
            row.prepare(file)
    before = env.contents()
    try:
        with pytest.raises(row.error[0]) as caught:
            row.act(env)
    finally:
        env.close()
    assert all(isinstance(caught.value, error) for error in row.error)
    message = str(caught.value)
    for word in row.words:
        assert word.format(folder=env.folder) if "{folder}" in word else word in message, message
    assert env.contents() == before


@pytest.mark.parametrize(("option", "value"), [("on_error", "record"), ("verify", "none"), ("checkpoint_interval", 1)])
def test_an_option_of_the_constructor_is_no_attribute_of_the_class(option, value):
    """It would not be looked at."""
    body = {"outputs": {"Out": lazyproc.Output("f8")}, "_map_function": staticmethod(np.mean), option: value}
    with pytest.raises(lazyproc.DefinitionError, match=rf"Mean\(h5_main, {option}={value!r}\)"):
        type("Mean", (lazyproc.Process,), body)


@pytest.mark.parametrize(
    ("dtype", "value", "stored"),
    [
        ("f4", 0.1, np.float32(0.1)), ("f4", 2**70, 2.0**70), ("f4", -np.inf, -np.inf), ("f8", np.bool_(True), 1), ("c8", 1, 1),
        ("c8", np.inf + 1j, np.inf + 1j), ("i4", 1.0, 1), ("u8", 2**64 - 1, 2**64 - 1), ("?", 1, True), ("u1", np.float32(255), 255),
        ("S3", b"abc", b"abc"), ("S3", "ab", b"ab"), ("S3", b"ab\0\0", b"ab"), ("f4,i2", -1, (-1, -1)), ("f4,i2", (0.5, 2), (0.5, 2)),
        ("f4,i2", np.array((0.5, 2), "f8,i8"), (0.5, 2)), ("f4,i2", np.array((0.5, 2), "f8,i8")[()], (0.5, 2)),
        ([("a", "f4,i2", (2,)), ("b", "i2", (2,))], ([(1, 2), (3, 4)], (5, 6)), ([(1, 2), (3, 4)], [5, 6])),
    ],
)  # fmt: skip
def test_fill_values_that_are_the_same_in_the_dtype(dtype, value, stored):
    assert repr(Output(dtype, fill_value=value).fill_value) == repr(np.array(stored, dtype))


def test_the_rows_of_the_table_have_names_of_their_own():
    names = [(name, by) for name, _, by in ROWS]
    assert len(names) == len(set(names))


# -- what needs more than a row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "handle"])
def test_the_cause_is_the_exception_of_the_function_with_its_own_lines(tmp_path, by):
    env = Env(tmp_path, by)
    make_usid_file(env.path)
    try:
        with pytest.raises(FunctionError) as caught:
            env.compute(returning(divide))
    finally:
        env.close()
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    trace = cause.__traceback__
    names = []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names == ["function", "divide"]
    start, stop = caught.value.positions
    assert 0 <= start < stop <= 20


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (np.ones(19, "u1"), "(19,)"),
        (np.ones((20, 1), "u1"), "(20, 1)"),
        (np.ones(20, "f4"), "float32"),
        (np.ones(20, "i1"), "int8"),
        (np.full(20, 2, "u1"), "2"),
        (np.array([0] * 19 + [255], "u1"), "255"),
        (None, "Group"),
    ],
)
def test_a_mask_that_is_none_is_named_and_its_group_is_left_alone(tmp_path, by, mask, word):
    env = Env(tmp_path, by)
    make_usid_file(env.path)
    name = env.compute().name
    env.close()
    with h5py.File(env.path, "r+") as file:
        del file[name]["completed_positions"]
        if mask is None:
            file[name].create_group("completed_positions")
        else:
            file[name]["completed_positions"] = mask
    before = env.contents()
    process = env.new()
    why = process.why_not_duplicate(name)
    assert "completed_positions" in why
    assert word in why
    with pytest.raises(ValueError, match="h5_partial_group"):
        process.use_partial_computation(process._place.group().file[name])
    process.close()
    env.close()
    assert env.contents() == before
    (status,) = file_status(env.path).results
    assert status.problem or status.n_positions != 20 or status.n_done == 0
    group = env.compute()
    assert group.name != name
    assert group["completed_positions"][()].tolist() == [1] * 20
    env.close()


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize("columns", [1, 2**18])
@pytest.mark.parametrize("multiplier", [1, 2.5])
def test_raising_the_memory_to_the_number_told_works(tmp_path, by, columns, multiplier):
    env = Env(tmp_path, by)
    make_usid_file(env.path, n_rows=1, n_cols=3, n_spectral=columns, dtype="f8")
    allowed = 1
    for _ in range(3):  # what is measured on the way may ask for more once
        before = env.contents()
        try:
            group = env.compute(max_mem_mb=allowed, mem_multiplier=multiplier)
            break
        except MemoryLimitError as error:
            raised = int(str(error).rpartition("Raise max_mem_mb to ")[2].split()[0])
            assert raised > allowed
            allowed = raised
            env.close()
            assert env.contents() == before
    with h5py.File(env.path, "r") if by == "path" else env.file() as file:
        np.testing.assert_allclose(group["Mean"][:, 0], file[MAIN][()].mean(axis=1))
    env.close()
    assert allowed < 64


@pytest.mark.parametrize("by", ["path", "handle"])
def test_values_of_other_types_that_are_fine(tmp_path, by):
    env = Env(tmp_path, by)
    make_usid_file(env.path)
    options = {
        "mem_multiplier": 2,
        "cores": np.int64(1),
        "max_mem_mb": np.int32(512),
        "lazy": np.False_,
        "checkpoint_interval": 0,
        "parms_dict": None,
        "h5_target_group": Path(f"{env.folder}/results.h5::/fits"),
    }
    process = env.new(**options)
    assert process.compute()["Mean"].shape == (20, 1)
    process.close()
    for more in ({"mem_multiplier": np.float32(1.5)}, {"max_mem_mb": None}, {"checkpoint_interval": float("inf")}):
        process = env.new(**options | more)
        assert len(process.duplicate_h5_groups) == 1
        process.close()
    env.close()
    with Mean(Path(f"{env.path}::{MAIN}")) as process:
        assert process.compute()["Mean"].shape == (20, 1)


@pytest.mark.parametrize("bad", [20, 35])
def test_a_failure_found_late_keeps_what_is_done_and_says_so(tmp_path, bad):
    """Beyond what the probe tries: the group is there, and what is finished stays."""
    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=40, n_cols=50)
    with h5py.File(path, "r+") as file:
        file[name][bad * 50, 0] = 1e6
    cls = returning(lambda row: "text" if row[0] == 1e6 else 1.0)
    with cls(f"{path}::{name}", cores=1) as process, pytest.raises(OutputError, match=f"position {bad * 50} "):
        process.compute()
    for one in file_status(path).results:  # none if the probe came upon it
        assert one.n_done < one.n_positions


# -- NaN and infinity ------------------------------------------------------------------------------------------------

SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 1.0, 0.0]


class Filter(Process):
    @staticmethod
    def _map_function(spectrum):
        return {"Same": spectrum, "First": spectrum[0], "Part": spectrum[1:4]}


class BlockFilter(Process):
    @staticmethod
    def _block_function(block):
        return {"Same": block, "First": block[:, 0], "Part": block[:, 1:4]}


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize("base", [Filter, BlockFilter])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "c8", "c16"])
def test_nan_and_infinity_pass_untouched_without_a_warning(tmp_path, dtype, base, by):
    values = np.resize(np.array(SPECIAL, dtype), (20, 6)).astype(dtype)
    values[1::2] = values[1::2, ::-1]
    outputs = {
        "Same": Output(dtype, shape_from_main=True),
        "First": Output(dtype),
        "Part": Output(dtype, dims=[Dimension("D", "", 3)]),
    }
    env = Env(tmp_path, by)
    make_usid_file(env.path, data=values, dtype=dtype)
    with h5py.File(env.path, "r") as file:
        stored = file[MAIN][()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = env.compute(type("Filtering", (base,), {"outputs": outputs}), cores=1)
        views = lazyproc.open_results(group)
        assert views["First"].values.size == 20
    assert group["Same"][()].tobytes() == stored.tobytes()
    assert group["First"][()].tobytes() == stored[:, :1].tobytes()
    assert group["Part"][()].tobytes() == np.ascontiguousarray(stored[:, 1:4]).tobytes()
    env.close()


def test_nan_and_infinity_in_compound_values(tmp_path):
    dtype = np.dtype([("Amplitude", "f4"), ("Phase", "f8"), ("Count", "i4")])
    values = random_data((20, 6), dtype)
    values["Amplitude"][3, :3] = np.nan, np.inf, -np.inf
    env = Env(tmp_path, "path")
    make_usid_file(env.path, data=values, dtype=dtype)
    outputs = {"Same": Output(dtype, shape_from_main=True), "First": Output(dtype), "Part": Output(dtype, dims=[Dimension("D", "", 3)])}  # fmt: skip
    for base in (Filter, BlockFilter):
        group = env.compute(type("Filtering", (base,), {"outputs": outputs}), cores=1)
        assert group["Same"][()].tobytes() == values.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_has_no_place_among_whole_numbers(tmp_path, value):
    env = Env(tmp_path, "path")
    make_usid_file(env.path)
    before = env.contents()
    for block in (False, True):
        cls = returning(lambda data: np.full(len(data), value) if np.ndim(data) > 1 else value, WHOLE, block=block)
        with pytest.raises(OutputError, match=r"float64.*int16"):
            env.compute(cls)
    assert env.contents() == before
