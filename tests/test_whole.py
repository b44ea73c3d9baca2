"""Sources that lose bytes, or files, under a run, where HDF5 would read zeros or the fill value without a word."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hook_classes import new_group
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core.errors import FileChangedError, ResultsError
from lazyproc.hdf5.whole import Whole

MAIN = f"{CHANNEL}/Raw_Data"
MASK = "completed_positions"
N_POSITIONS, N_SPECTRAL, BATCH = 240, 700, 60
AT = 100
"""The position at which it happens."""


def raw() -> np.ndarray[Any, Any]:
    data = np.random.default_rng(1).standard_normal((N_POSITIONS, N_SPECTRAL)).astype("f4") + 5
    data[:, 0] = np.arange(N_POSITIONS)
    return data


def disturb(what: str, victim: str) -> None:
    """Do it once."""
    if what and not os.path.exists(f"{victim}.copy"):
        shutil.copy(victim, f"{victim}.copy")
        if what == "gone":
            os.rename(victim, f"{victim}.moved")
        else:
            os.truncate(victim, os.path.getsize(victim) // 2)


class Declared(lazyproc.Process):
    process_name = "Average"
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(spectrum, what="", victim=""):
        if spectrum[0] == AT:
            disturb(what, victim)
        return np.mean(spectrum, dtype=float)


class Hooks(lazyproc.Process):
    process_name = "Average"

    @staticmethod
    def _map_function(spectrum):
        return np.mean(spectrum, dtype=float)

    def _create_results_datasets(self):
        self.h5_results_grp = new_group(self)
        self._mean = self.h5_results_grp.create_dataset("Mean", (N_POSITIONS, 1), "f8")

    def _get_existing_datasets(self):
        self._mean = self.h5_results_grp["Mean"]

    def _read_data_chunk(self):
        self._max_pos_per_read = BATCH
        if self._h5_status_dset[: 2 * BATCH].sum() == BATCH:
            disturb(self.parms_dict["what"], self.parms_dict["victim"])
        super()._read_data_chunk()

    def _write_results_chunk(self):
        pixels = self._get_pixels_in_current_batch()
        self._mean[pixels[0] : pixels[-1] + 1, 0] = self._results


@contextmanager
def made(kind: Any, path: Path, by: str, what: str, victim: Path) -> Iterator[lazyproc.Process]:
    """Make a process by "path", or by an open "handle", with results in another file."""
    options = {"parms_dict": {"what": what, "victim": str(victim)}, "cores": 1, "checkpoint_interval": 0.0}
    if by == "path":
        with kind(f"{path}::{MAIN}", h5_target_group=f"{path}.out.h5::/results", **options) as process:
            yield process
        return
    with h5py.File(path, "r") as file, h5py.File(f"{path}.out.h5", "a") as out:
        with kind(file[MAIN], h5_target_group=out.require_group("results"), **options) as process:
            yield process


def store_elsewhere(path: Path, kind: str, values: Path) -> None:
    """Store the main dataset in a file of its own."""
    with h5py.File(path, "r+") as file:
        attrs = dict(file[MAIN].attrs)
        del file[MAIN]
        if kind == "external":
            new = file.create_dataset(MAIN, raw().shape, "f4", external=[(values.name, 0, raw().nbytes)])
            new[...] = raw()
        else:
            with h5py.File(values, "w") as other:
                other["values"] = raw()
            layout = h5py.VirtualLayout(raw().shape, "f4")
            layout[...] = h5py.VirtualSource(values.name, "values", raw().shape, "f4")
            new = file.create_virtual_dataset(MAIN, layout)
        for key, value in attrs.items():
            new.attrs[key] = value


def check_marked(group: h5py.Group) -> int:
    """Make sure that what is marked is right; return how many positions are."""
    marked = group[MASK][()] == 1
    np.testing.assert_array_equal(group["Mean"][:, 0][marked], raw().mean(1, dtype=float)[marked])
    return int(marked.sum())


def disturbed(kind: Any, path: Path, by: str, what: str, victim: Path) -> None:
    """Compute while it happens, look, put the source back, and compute again."""
    with made(kind, path, by, what, victim) as process:
        with pytest.raises((FileChangedError, ResultsError), match=rf"{victim.name}|scan\.h5::{MAIN}"):
            process.compute()
    with h5py.File(f"{path}.out.h5", "r") as file:
        (group,) = file["results"].values()
        assert check_marked(group) < N_POSITIONS
    shutil.copy(f"{victim}.copy", victim)
    with made(kind, path, by, what, victim) as process:
        assert check_marked(process.compute()) == N_POSITIONS


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize("chunks", [None, (20, N_SPECTRAL)])
@pytest.mark.parametrize("kind", [Declared, Hooks])
def test_a_file_that_is_cut_off(tmp_path: Path, kind: Any, chunks: Any, by: str) -> None:
    path = tmp_path / "scan.h5"
    make_usid_file(path, n_rows=12, n_cols=20, n_spectral=N_SPECTRAL, data=raw(), chunks=chunks)
    disturbed(kind, path, by, "cut off", path)


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize(("storage", "what"), [("external", "cut off"), ("virtual", "gone"), ("virtual", "cut off")])
@pytest.mark.parametrize("kind", [Declared, Hooks])
def test_another_file_with_the_values(
    tmp_path: Path, kind: Any, storage: str, what: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, values = tmp_path / "scan.h5", tmp_path / "values"
    monkeypatch.chdir(tmp_path)  # HDF5 looks for external files from here
    make_usid_file(path, n_rows=12, n_cols=20, n_spectral=N_SPECTRAL, data=raw())
    store_elsewhere(path, storage, values)
    disturbed(kind, path, by, what, values)


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize("kind", [Declared, Hooks])
def test_a_source_that_is_missing_from_the_beginning(tmp_path: Path, kind: Any, by: str) -> None:
    path, values = tmp_path / "scan.h5", tmp_path / "values"
    make_usid_file(path, n_rows=12, n_cols=20, n_spectral=N_SPECTRAL, data=raw())
    store_elsewhere(path, "virtual", values)
    values.rename(tmp_path / "moved")
    with pytest.raises(FileChangedError, match="values is not there"):
        with made(kind, path, by, "", values) as process:
            process.compute()
    (tmp_path / "moved").rename(values)
    with made(kind, path, by, "", values) as process:
        assert check_marked(process.compute()) == N_POSITIONS


def test_a_file_that_became_shorter_and_is_whole_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        file["values"] = np.arange(1000)
        file["scrap"] = np.arange(5000)
    with h5py.File(path, "r") as file:
        whole = Whole.of(file["values"], str(path))
    with h5py.File(path, "r+") as file:
        del file["scrap"]
    assert path.stat().st_size < whole.files[0][1]
    whole.check()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FileChangedError, match=r"scan\.h5.*truncated"):
        whole.check()
    path.unlink()
    with pytest.raises(FileChangedError, match="gone"):
        whole.check()


def test_names_with_patterns_are_as_many_as_there_are(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "part-0", "w") as file:
        file["values"] = np.arange(10)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        layout = h5py.VirtualLayout((10,), "i8")
        layout[...] = h5py.VirtualSource(tmp_path / "part-0", "values", (10,), "i8")
        plain = file.create_virtual_dataset("plain", layout)
        assert [name for name, _ in Whole.of(plain, file.filename).files] == [file.filename, str(tmp_path / "part-0")]
        space, source = h5py.h5s.create_simple((10,), (h5py.h5s.UNLIMITED,)), h5py.h5s.create_simple((10,))
        space.select_hyperslab((0,), (h5py.h5s.UNLIMITED,), (10,), (10,))
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_virtual(space, b"part-%b", b"values", source)
        made = h5py.h5d.create(file.id, b"pattern", h5py.h5t.NATIVE_INT64, space, creation)
        assert [name for name, _ in Whole.of(h5py.Dataset(made), file.filename).files] == [file.filename]
