"""Functions that import what they need when they are called: worker processes load it, and the driver does not."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file

from lazyproc.core.imports import imports_to_come

MAIN = f"{CHANNEL}/Raw_Data"

# --- which modules would be loaded -----------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages that nobody has loaded, and that say so if somebody does."""
    for name in ("unloaded", "unloaded/inner", "other"):
        folder = tmp_path / "packages" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('loaded')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    return tmp_path / "packages"


def takes_a_module(row: Any) -> Any:
    import unloaded

    return unloaded.value


def takes_names(row: Any) -> Any:
    from unloaded.inner import value

    return value


def takes_everything_known(row: Any) -> Any:
    import json

    import h5py
    import numpy.polynomial
    import numpy.testing
    import pytest

    return json, h5py, numpy, pytest


def takes_what_is_not_there(row: Any) -> Any:
    try:
        import no_such_package_at_all as fast
    except ImportError:
        fast = None
    return fast


def uses_another(row: Any) -> Any:
    return takes_a_module(row)


def calls_itself(row: Any) -> Any:
    import other

    return calls_itself(other)


def has_one_inside(row: Any) -> Any:
    def inside() -> Any:
        return [__import__("json"), [takes for takes in (lambda: takes_names(row),)]]

    return inside()


class WithCall:
    def __call__(self, row: Any) -> Any:
        import other

        return other

    def method(self, row: Any) -> Any:
        return takes_a_module(row)


@functools.wraps(takes_a_module)
def wrapped(row: Any) -> Any:
    return takes_a_module(row)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (takes_a_module, ["unloaded"]),
        (takes_names, ["unloaded.inner", "unloaded.inner.value"]),
        (takes_everything_known, []),
        (takes_what_is_not_there, []),
        (uses_another, ["unloaded"]),
        (calls_itself, ["other"]),
        (has_one_inside, ["unloaded.inner", "unloaded.inner.value"]),
        (WithCall(), ["other"]),
        (WithCall().method, ["unloaded"]),
        (WithCall, []),
        (functools.partial(functools.partial(takes_a_module), 1), ["unloaded"]),
        (staticmethod(takes_a_module), ["unloaded"]),
        (wrapped, ["unloaded"]),
        (np.vectorize(takes_a_module), ["unloaded"]),
        (len, []),
        (np.mean, []),
        (np.add, []),
        (object(), []),
    ],
)
def test_what_a_function_would_import(packages: Path, function: Any, expected: list[str]) -> None:
    assert imports_to_come(function) == expected
    assert not {"unloaded", "other"} & set(sys.modules), "nothing is loaded to find out"


def test_long_functions_have_instructions_in_two_parts(packages: Path) -> None:
    """Of more than 256 constants and names, the byte code says the upper part of a number in an instruction before."""
    many = "".join(f" a{n} = b{n}.c{n} + {n}.5\n" for n in range(300))
    names: dict[str, Any] = {"__name__": "made", "__package__": ""}
    exec(f"def f(row):\n{many} from unloaded import this, that\n import other\n", names)
    assert imports_to_come(names["f"]) == ["unloaded", "unloaded.this", "unloaded.that", "other"]


def test_nonsense_has_no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def circle(row: Any) -> Any:
        from stand_in import part

        return part

    monkeypatch.setitem(sys.modules, "stand_in", 5)  # anything may stand there
    assert imports_to_come(circle) == []
    circle.__wrapped__ = circle  # type: ignore[attr-defined]
    assert imports_to_come(circle) == []
    assert imports_to_come(np.vectorize(takes_everything_known)) == []


def test_what_is_loaded_is_not_to_come(packages: Path) -> None:
    (packages / "other" / "__init__.py").write_text("ready = 1\ndef __getattr__(name): raise AssertionError(name)\n")
    (packages / "other" / "part.py").write_text("")
    names: dict[str, Any] = {"__package__": "other", "__name__": "other"}
    code = "def f(row):\n from other import ready, made_when_asked\n from . import part\n from .part import thing\n"
    exec(code, names)
    assert imports_to_come(names["f"]) == [
        *("other", "other.ready", "other.made_when_asked", "other.part", "other.part.thing")
    ]
    try:
        import other

        assert other.ready
        assert imports_to_come(names["f"]) == ["other.part", "other.part.thing"]
        import other.part

        assert imports_to_come(names["f"]) == []
    finally:
        for name in ("other", "other.part"):
            sys.modules.pop(name, None)


# --- who loads them --------------------------------------------------------------------------------------------------

HEAVY = """
import os
from pathlib import Path

with open(Path(__file__).parent / "loaded", "a") as file:
    file.write(f"{os.getpid()}\\n")
"""
SCRIPT = '''
import functools, json, os, sys, time, traceback

import lazyproc

HERE, WHAT = os.getpid(), sys.argv[2]


def position(row):
    """Return who computes."""
    import heavy

    if row[0] == 7 and WHAT == "raise":
        raise ValueError("at seven")
    return float(os.getpid())


def block(rows):
    import heavy

    return rows.mean(axis=1) * 0 + os.getpid()


class Table:
    """An argument that counts how often it is packed, and that worker processes may not be able to load."""

    packed = 0

    def __reduce__(self):
        Table.packed += sys._getframe(1).f_globals["__name__"] != "lazyproc.core.state"  # there it is only looked at
        return load, ()


def load():
    if WHAT.startswith("unloadable") and os.getpid() != HERE:
        raise RuntimeError("only where it was made")
    return Table()


def with_table(row, table):
    if WHAT == "unloadable, slow":
        time.sleep(0.005)
    return position(row)


def slow_with_table(row, table):
    time.sleep(0.005)
    return float(os.getpid())


blocks = WHAT == "block"
function = {
    "block": block,
    "table": functools.partial(with_table, table=Table()),
    "unloadable": functools.partial(with_table, table=Table()),
    "unloadable, slow": functools.partial(with_table, table=Table()),
    "slow": functools.partial(slow_with_table, table=Table()),
}.get(WHAT, position)
said = ""
try:
    group = lazyproc.map_positions(
        function,
        sys.argv[1],
        {"By": lazyproc.Output("f8")},
        vectorized=blocks,
        cores=int(sys.argv[3]),
    )
except lazyproc.FunctionError:
    said = traceback.format_exc()
else:
    said = sorted(set(group["By"][:].ravel().tolist()))
print(json.dumps({"driver": HERE, "said": said, "loaded": "heavy" in sys.modules, "packed": Table.packed}))
'''


def run_script(folder: Path, what: str, cores: int, n_rows: int = 400) -> tuple[dict[str, Any], list[int]]:
    """Run it on so many positions; return what it says, and logs, and which processes have loaded the module."""
    path, _ = make_usid_file(folder / "a.h5", n_rows=n_rows, n_cols=1)
    with h5py.File(path, "r+") as file:
        file[MAIN][:] = np.arange(n_rows).reshape(-1, 1)
    (folder / "heavy.py").write_text(HEAVY)
    (folder / "loaded").write_text("")
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(folder / "script.py"), f"{path}::{MAIN}", what, str(cores)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"log": done.stderr}, [int(pid) for pid in (folder / "loaded").read_text().split()]


def test_worker_processes_load_it_once_each_and_the_driver_never(tmp_path: Path) -> None:
    told, loaded = run_script(tmp_path, "position", cores=2)
    assert not told["loaded"]
    assert told["driver"] not in loaded
    assert len(set(loaded)) == len(loaded) <= 2, "the process in which the function was tried goes on"
    assert set(map(int, told["said"])) <= set(loaded)


@pytest.mark.parametrize(
    ("what", "cores", "n_rows"),
    [("position", 1, 400), ("block", 2, 400), ("position", 2, 10)],
    ids=["one core", "a function of blocks", "few positions"],
)
def test_where_no_processes_are_likely_the_driver_loads_it(tmp_path: Path, what: str, cores: int, n_rows: int) -> None:
    told, loaded = run_script(tmp_path, what, cores, n_rows)
    assert loaded == [told["driver"]]
    assert told["said"] == [told["driver"]]


def test_what_the_function_raises_there_names_its_line_and_the_position(tmp_path: Path) -> None:
    told, loaded = run_script(tmp_path, "raise", cores=2)
    assert told["driver"] not in loaded
    assert "at seven" in told["said"]
    assert "position 7" in told["said"]
    assert 'raise ValueError("at seven")' in told["said"]


@pytest.mark.parametrize("what", ["table", "slow"], ids=["imports to come", "a long job without"])
def test_arguments_are_packed_once(tmp_path: Path, what: str) -> None:
    """The same bytes show that they can be sent, and serve for the trial and for both processes of the run."""
    told, _ = run_script(tmp_path, what, cores=2)
    assert set(told["said"]) > {told["driver"]} if what == "slow" else told["driver"] not in told["said"]
    assert told["packed"] == 1


@pytest.mark.parametrize("what", ["unloadable", "unloadable, slow"])
def test_what_worker_processes_cannot_load_the_driver_does(tmp_path: Path, what: str) -> None:
    """It is found when the function is tried; then the driver tries it, and does all of it, however long that takes."""
    told, _ = run_script(tmp_path, what, cores=2)
    assert told["said"] == [told["driver"]]
    assert "cannot be sent to worker processes (loaded there, it raises RuntimeError: only where" in told["log"]
    assert told["packed"] == 1
