"""`replace_pyusid`: third-party processes stand on lazyproc while it holds, and on pyUSID again afterwards."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import textwrap
import warnings

import h5py
import numpy as np
import pytest
from hook_classes import make_mean, mean_of
from usid_files import make_usid_file

import lazyproc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyUSID = pytest.importorskip("pyUSID")
    old_process = importlib.import_module("pyUSID.processing.process")
    comp_utils = importlib.import_module("pyUSID.processing.comp_utils")

PLACES = (
    ("pyUSID.processing.process", "Process"),
    ("pyUSID.processing.process", "parallel_compute"),
    ("pyUSID.processing.comp_utils", "parallel_compute"),
    ("pyUSID.processing.comp_utils", "recommend_cpu_cores"),
    ("pyUSID.processing", "Process"),
    ("pyUSID", "Process"),
)


def now():
    return {place: getattr(sys.modules[place[0]], place[1]) for place in PLACES}


BEFORE = now()


@pytest.fixture(autouse=True)
def all_is_put_back():
    yield
    assert now() == BEFORE


def test_the_places_from_which_old_code_imports_are_lazyproc_then():
    replacement = lazyproc.replace_pyusid()
    try:
        from pyUSID import Process as short
        from pyUSID.processing.comp_utils import recommend_cpu_cores
        from pyUSID.processing.process import Process, parallel_compute

        assert Process is short is lazyproc.Process
        assert parallel_compute is comp_utils.parallel_compute is lazyproc.parallel_compute
        assert recommend_cpu_cores is lazyproc.recommend_cpu_cores
        assert pyUSID.processing.Process is lazyproc.Process
        assert pyUSID.processing.process.Process is lazyproc.Process
    finally:
        replacement.undo()
    assert now() == BEFORE
    from pyUSID.processing.process import Process

    assert Process is not lazyproc.Process


def test_as_a_context():
    with lazyproc.replace_pyusid() as replacement:
        assert old_process.Process is lazyproc.Process
        assert "pyUSID.processing.process.Process" in repr(replacement)
    assert old_process.Process is BEFORE["pyUSID.processing.process", "Process"]
    assert "nothing" in repr(replacement)


def test_an_error_in_the_context_puts_all_back():
    with pytest.raises(ZeroDivisionError), lazyproc.replace_pyusid():
        raise ZeroDivisionError
    assert now() == BEFORE


def test_twice_changes_nothing_more():
    first = lazyproc.replace_pyusid()
    second = lazyproc.replace_pyusid()
    second.undo()
    assert old_process.Process is lazyproc.Process
    first.undo()
    first.undo()
    assert now() == BEFORE
    with lazyproc.replace_pyusid(), lazyproc.replace_pyusid():
        assert old_process.Process is lazyproc.Process
    with lazyproc.replace_pyusid():
        assert old_process.Process is lazyproc.Process


def test_what_somebody_else_put_there_meanwhile_is_left_alone():
    replacement = lazyproc.replace_pyusid()
    own = old_process.parallel_compute = lambda *args: []
    replacement.undo()
    try:
        assert old_process.parallel_compute is own
    finally:
        old_process.parallel_compute = BEFORE["pyUSID.processing.process", "parallel_compute"]


def test_a_class_keeps_the_base_it_was_defined_with(tmp_path):
    with lazyproc.replace_pyusid():
        cls = make_mean(old_process.Process)
    assert issubclass(cls, lazyproc.Process)
    path, name = make_usid_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        group = cls(file[name], cores=1).compute()
        np.testing.assert_array_equal(group["Results"][:, 0], np.array([mean_of(row) for row in file[name]], "f4"))


def test_classes_that_came_too_early_are_named(caplog):
    cls = make_mean(old_process.Process)
    with caplog.at_level(logging.WARNING, "lazyproc"), lazyproc.replace_pyusid():
        pass
    assert "hook_classes" in caplog.text
    assert issubclass(cls, BEFORE["pyUSID.processing.process", "Process"])


def test_a_package_imported_afterwards_runs_on_lazyproc(tmp_path):
    package = tmp_path / "thirdparty"
    package.mkdir()
    (package / "__init__.py").write_text("from .analysis import Means\n")
    (package / "analysis.py").write_text(
        textwrap.dedent(
            """
            import numpy as np
            from pyUSID.processing.process import Process, parallel_compute

            class Means(Process):
                def __init__(self, h5_main, **kwargs):
                    super(Means, self).__init__(h5_main, "Means", **kwargs)

                def _create_results_datasets(self):
                    self.h5_results_grp = self._h5_target_group.create_group("Raw_Data-Means_000")
                    self.h5_results = self.h5_results_grp.create_dataset("Results", (self.h5_main.shape[0], 1), "f8")

                def _unit_computation(self):
                    self._results = parallel_compute(self.data, np.mean, cores=self._cores)

                def _write_results_chunk(self):
                    self.h5_results[self._get_pixels_in_current_batch(), 0] = self._results
            """
        )
    )
    path, name = make_usid_file(tmp_path / "scan.h5")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import warnings
            warnings.simplefilter("ignore")
            import h5py, numpy as np, lazyproc
            lazyproc.replace_pyusid()
            import thirdparty
            with h5py.File({path!r}, "r+") as file:
                group = thirdparty.Means(file[{name!r}], cores=1).compute()
                assert np.allclose(group["Results"][:, 0], file[{name!r}][()].mean(axis=1))
            print(thirdparty.Means.__mro__[1].__module__)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.stdout.strip() == "lazyproc.process", done.stderr


def test_without_pyusid_the_remedy_is_told(tmp_path):
    (tmp_path / "pyUSID.py").write_text("raise ImportError('not here')\n")
    code = """
        import lazyproc
        try:
            lazyproc.replace_pyusid()
        except lazyproc.LazyprocError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
    )
    assert "from lazyproc import Process" in done.stdout, done.stderr
