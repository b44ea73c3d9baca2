"""Files given by their address, which others link to, change or write meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core.errors import (
    ArgumentValueError,
    FileBusyError,
    FileChangedError,
    ParameterError,
    ReadOnlyFileError,
)
from lazyproc.core.events import Finished

MAIN = f"{CHANNEL}/Raw_Data"
MEAN = {"Mean": lazyproc.Output("f8")}
STORAGE = {
    "contiguous": {},
    "chunked": {"chunks": (4, 3)},
    "gzip": {"chunks": (4, 3), "compression": "gzip"},
}
WRITER = """
import sys
import h5py
file = h5py.File(sys.argv[1], "r+", libver="latest")
main = file[sys.argv[2]]
if sys.argv[3] == "swmr":
    file.swmr_mode = True
print("open", flush=True)
sys.stdin.readline()
main[0] = 7
file.close()
"""


class Mean(lazyproc.Process):
    """The mean of each position."""

    outputs = MEAN

    @staticmethod
    def _map_function(row: Any) -> Any:
        return row.mean()


def means(group: h5py.Group) -> np.ndarray:
    """Return the results."""
    return group["Mean"][:, 0]


def tree(path: Path) -> list[str]:
    """Return the names of all that is in a file; raises if it cannot be read."""
    names: list[str] = []
    with h5py.File(path) as file:
        file.visit(names.append)
        for name in names:
            if isinstance(file[name], h5py.Dataset):
                file[name][()]
    return names


# -- somebody writes -------------------------------------------------------------------------------------------------


def test_a_file_that_a_swmr_writer_has_open_is_let_be(tmp_path: Path) -> None:
    """HDF5 gives up its lock as soon as such a writer begins, and writes its structure over ours when it ends."""
    path = tmp_path / "scan.h5"
    make_usid_file(path, libver="latest", chunks=(4, 3))
    before = tree(path)
    command = [sys.executable, "-c", WRITER, str(path), MAIN, "swmr"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(FileBusyError, match=r"marked as open for writing.*h5clear -s"):
            lazyproc.map_positions(np.mean, f"{path}::{MAIN}", MEAN)
        elsewhere = lazyproc.map_positions(
            np.mean, f"{path}::{MAIN}", MEAN, h5_target_group=f"{tmp_path}/results.h5::/here"
        )
        assert elsewhere["completed_positions"][:].all()
        writer.communicate("go on\n")
        assert writer.returncode == 0
    assert tree(path) == before
    assert lazyproc.map_positions(np.mean, f"{path}::{MAIN}", MEAN)["completed_positions"][:].all()


def test_a_handle_without_a_lock_in_this_process_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    make_usid_file(path)
    with h5py.File(path, "r+", locking=False), pytest.raises(FileBusyError, match="in this one"):
        lazyproc.map_positions(np.mean, f"{path}::{MAIN}", MEAN)
    with h5py.File(path, "r", locking=False):
        assert lazyproc.map_positions(np.mean, f"{path}::{MAIN}", MEAN)["completed_positions"][:].all()


# -- the main dataset is replaced ------------------------------------------------------------------------------------


def replace_main(path: Path, data: np.ndarray, **storage: Any) -> None:
    """Put another dataset in the place of the main one, and something else where that was."""
    with h5py.File(path, "r+") as file:
        channel = file[CHANNEL]
        old, attributes = channel["Raw_Data"], dict(channel["Raw_Data"].attrs)
        shape = old.shape
        del old, channel["Raw_Data"]
        channel.create_dataset("Calibration", data=np.full(shape, 777, "f4"), **storage)
        main = channel.create_dataset("Raw_Data", data=data, **storage)
        for name, value in attributes.items():
            main.attrs[name] = value


@pytest.mark.parametrize("computed_before", [False, True])
@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
def test_a_main_dataset_that_was_replaced_is_read_anew(
    tmp_path: Path, storage: dict[str, Any], computed_before: bool
) -> None:
    path = tmp_path / "scan.h5"
    make_usid_file(path, **storage)
    with Mean(f"{path}::{MAIN}") as process:
        data = process.h5_main[:]
        if computed_before:
            np.testing.assert_allclose(means(process.compute()), data.mean(axis=1), rtol=1e-6)
        replace_main(path, 2 * data, **storage)
        assert process.plan().n_remaining == len(data)
        np.testing.assert_allclose(process.test(3)["Mean"], 2 * data[3].mean(), rtol=1e-6)
        np.testing.assert_allclose(
            process.to_xarray()["Mean"].values.ravel().sum(), 2 * data.mean(axis=1).sum(), rtol=1e-5
        )
        np.testing.assert_allclose(means(process.compute()), 2 * data.mean(axis=1), rtol=1e-6)


def test_a_main_dataset_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    make_usid_file(path)
    with Mean(f"{path}::{MAIN}") as process:
        shape = process.h5_main.shape
        replace_main(path, np.zeros((shape[0], shape[1] + 1), "f4"))
        with pytest.raises(FileChangedError, match=r"has the shape \(20, 7\).*it had \(20, 6\).*Make a new one"):
            process.compute()


def test_what_is_not_replaced_stays_open_as_it_is(tmp_path: Path) -> None:
    """A file changes with each of our own results; no handle is opened for that."""
    path = tmp_path / "scan.h5"
    make_usid_file(path)
    with Mean(f"{path}::{MAIN}") as process:
        main = process.h5_main
        for _ in range(3):
            process.compute(override=True)
            lazyproc.map_positions(np.ptp, f"{path}::{MAIN}", MEAN, override=True)
        process.compute()
        assert process.h5_main is main


# -- links and parts in other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["L", "G/Raw_Data", "twice/Raw_Data"])
def test_an_address_leads_through_links_to_other_files(
    tmp_path: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    make_usid_file(tmp_path / "sub" / "real.h5")
    with h5py.File(tmp_path / "sub" / "between.h5", "w") as file:
        file["G"] = h5py.ExternalLink("real.h5", CHANNEL)
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file["L"] = h5py.ExternalLink("sub/real.h5", MAIN)
        file["G"] = h5py.ExternalLink("sub/real.h5", CHANNEL)
        file["twice"] = h5py.ExternalLink("sub/between.h5", "/G")
    monkeypatch.chdir("/")
    with Mean(f"{tmp_path}/links.h5::/{inside}") as process:
        group = process.compute()
        assert (
            Path(group.file.filename if isinstance(group.file.filename, str) else process._main_path).name == "real.h5"
        )
        np.testing.assert_allclose(means(group), process.h5_main[:].mean(axis=1), rtol=1e-6)


def test_a_virtual_dataset_is_read_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_usid_file(tmp_path / "real.h5")
    with h5py.File(tmp_path / "real.h5") as real, h5py.File(tmp_path / "virtual.h5", "w") as file:
        data = real[MAIN][:]
        layout = h5py.VirtualLayout(data.shape, data.dtype)
        layout[:] = h5py.VirtualSource("real.h5", MAIN, data.shape)
        main = file.create_virtual_dataset("Raw_Data", layout)
        for name in ("Position_Indices", "Position_Values", "Spectroscopic_Indices", "Spectroscopic_Values"):
            real.copy(real[MAIN].file[real[MAIN].attrs[name]], file, name)
            main.attrs[name] = file[name].ref
        main.attrs["quantity"], main.attrs["units"] = "Current", "nA"
    monkeypatch.chdir("/")
    with Mean(f"{tmp_path}/virtual.h5::/Raw_Data") as process:
        np.testing.assert_allclose(means(process.compute()), data.mean(axis=1), rtol=1e-6)
    with Mean(f"{tmp_path}/virtual.h5::/Raw_Data") as process:
        assert len(process.duplicate_h5_groups) == 1


def test_a_main_dataset_that_is_replaced_during_a_run_into_another_file_is_noticed_later(tmp_path: Path) -> None:
    """The run's lock is on the file of the results."""
    path = tmp_path / "scan.h5"
    make_usid_file(path)
    with Mean(f"{path}::{MAIN}", h5_target_group=f"{tmp_path}/results.h5::/here") as process:
        data = process.h5_main[:]

        def replace(event: Any) -> None:
            if isinstance(event, Finished):
                replace_main(path, 2 * data)

        process._progress = replace
        process.compute()
        process._progress = lambda event: None
        np.testing.assert_allclose(means(process.compute()), 2 * data.mean(axis=1), rtol=1e-6)


# --- files that stay open


def open_files() -> int:
    """Count this process's file descriptors."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts file descriptors by /proc")
@pytest.mark.parametrize("target", [None, "results.h5::/fits"])
def test_a_process_that_is_asked_again_and_again_keeps_no_more_files_open(tmp_path: Path, target: str | None) -> None:
    """Each of these opens files: in a notebook that looks now and then, a thousand of them would be the end."""
    address = "::".join(make_usid_file(tmp_path / "scan.h5"))
    where = target and str(tmp_path / target)
    with Mean(address, cores=1, h5_target_group=where, on_error="record") as process:
        process.plan()
        name = process.compute().name
        before = open_files()
        for _ in range(20):
            process.plan()
            assert "no difference" in process.why_not_duplicate(name)
            group = process.compute()
            process.retry_failed()
            process.to_xarray()
        assert open_files() <= before + 2
        assert group["Mean"].shape == (20, 1)


def test_results_that_somebody_holds_stay_open(tmp_path: Path) -> None:
    address = "::".join(make_usid_file(tmp_path / "scan.h5"))
    with Mean(address, cores=1) as process:
        held = [process.compute(override=True) for _ in range(3)]
        datasets = [process.compute(override=True)["Mean"] for _ in range(3)]
        files = [process.compute(override=True).file for _ in range(3)]
        process.compute()
        assert all(np.array_equal(group["Mean"], held[0]["Mean"]) for group in held)
        assert all(np.array_equal(dataset, held[0]["Mean"]) for dataset in datasets)
        assert all(MAIN in file for file in files)
    assert not any([*held, *datasets, *files])


# --- links, and files that cannot be written


def test_a_target_behind_a_link_is_refused_and_told(tmp_path: Path) -> None:
    """HDF5 would change the other file, which nobody has locked; or it would find nothing."""
    path, name = make_usid_file(tmp_path / "scan.h5")
    make_usid_file(tmp_path / "other.h5")
    with h5py.File(path, "r+") as file:
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/")
        file["nowhere"] = h5py.SoftLink("/is/nothing")
        file["here"] = h5py.SoftLink(CHANNEL)
    before = Path(path).read_bytes(), (tmp_path / "other.h5").read_bytes()
    for target, words in {
        "elsewhere": rf"link to another file.*{tmp_path}/other\.h5::/\.",
        "elsewhere/fits": rf"link to another file.*{tmp_path}/other\.h5::/fits",
        "nowhere": "leads nowhere",
        "nowhere/fits": "leads nowhere",
    }.items():
        with pytest.raises(ArgumentValueError, match=words):
            Mean(f"{path}::{name}", cores=1, h5_target_group=f"{path}::/{target}")
    assert (Path(path).read_bytes(), (tmp_path / "other.h5").read_bytes()) == before
    with Mean(f"{path}::{name}", cores=1, h5_target_group=f"{path}::/here/fits") as process:
        assert process.compute().name == "/here/fits/Raw_Data-Mean_000"


def test_finished_results_of_a_file_that_cannot_be_written_are_returned(tmp_path: Path) -> None:
    path, name = make_usid_file(tmp_path / "scan.h5")
    with Mean(f"{path}::{name}", cores=1) as process:
        expected = means(process.compute())
    before = Path(path).read_bytes()
    with h5py.File(path, "r") as file:
        for lazy in (False, True):
            process = Mean(file[name], cores=1, lazy=lazy)
            np.testing.assert_array_equal(means(process.compute()), expected)
            assert process.duplicate_h5_groups == [process.h5_results_grp]
            with pytest.raises(ReadOnlyFileError):
                process.compute(True)
            with pytest.raises(ParameterError):
                process.compute(False, 3)
            with pytest.raises(ReadOnlyFileError):
                process.retry_failed()
        with pytest.raises(ReadOnlyFileError):
            Mean(file[name], process_name="Another", cores=1)
    assert Path(path).read_bytes() == before
