"""The examples in docstrings do what they say, each in a folder of its own with the small file that they speak of."""

from __future__ import annotations

import doctest
import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file

import lazyproc

PACKAGE = Path(lazyproc.__file__).parent
ADDRESS = f"scan.h5::{CHANNEL}/Raw_Data"


class Mean(lazyproc.Process):
    """As in the example of `Process`, for those of its methods."""

    outputs = {"Mean": lazyproc.Output("f4", units="V")}

    @staticmethod
    def _map_function(spectrum):
        return np.mean(spectrum)


def examples() -> list[Any]:
    found: list[Any] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            of_module = doctest.DocTestFinder().find(importlib.import_module(name))
            found += [pytest.param(one, id=one.name.removeprefix("lazyproc.")) for one in of_module if one.examples]
    return found


@pytest.mark.parametrize("example", examples())
def test_an_example_is_right(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.name.endswith(".replace_pyusid"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("pyUSID")
    monkeypatch.chdir(tmp_path)
    make_usid_file("scan.h5", n_rows=4, n_cols=5, data=np.arange(120, dtype="f4").reshape(20, 6))
    example.globs |= {"Mean": Mean, "address": ADDRESS, "lazyproc": lazyproc, "np": np}
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


def test_every_public_name_that_is_called_has_an_example() -> None:
    methods = ["compute", "plan", "test", "to_xarray", "retry_failed", "use_partial_computation", "why_not_duplicate"]
    called = [getattr(lazyproc, name) for name in lazyproc.__all__]
    called = [one for one in called if not (isinstance(one, type) and issubclass(one, BaseException))]
    for one in (*called, *(getattr(lazyproc.Process, name) for name in methods)):
        text = one.__doc__ or ""
        assert ">>> " in text, one
        assert "+SKIP" not in text, one
