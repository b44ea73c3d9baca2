"""Files and folders that may not be read or written. In a child that gives up being root, if it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import Any

import h5py

from faults import serve
from faults.full import in_child, told_of
from faults.subject import CHANNEL, MAIN, make_scan, masks, opened, problems
from lazyproc import open_results
from lazyproc.status import file_status

NOBODY = 65534


def warm_up(folder: str) -> None:
    """Do all of it once: what is imported late could not be read anymore."""
    path = os.path.join(folder, "warm.h5")
    make_scan(path)
    look(path)
    for by in ("path", "hooks"):
        _compute(path, by)
    open_results(f"{path}::{CHANNEL}/Raw_Data-Twice_000").load()


def _compute(path: str, by: str, **options: Any) -> None:
    with opened(path, by, **options) as process:
        process.compute()


def look(path: str) -> None:
    """Do all that needs no writing."""
    file_status(path)
    with opened(path, "path", lazy=True) as process:
        process.plan()
        process.test(3)
        process.to_xarray()["Mean"].load(scheduler="synchronous")


def deprived(action: Any) -> dict[str, Any]:
    """Do something as nobody, if this is root, whom no mode stops."""

    def as_nobody() -> dict[str, Any]:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        tempfile.tempdir = os.environ.get("TMPDIR", "/tmp")
        return told_of(action)

    return in_child(as_nobody)


def modes(folder: str, file_mode: int, folder_mode: int, mount: str) -> dict[str, Any]:
    """Try everything on a scan with finished results, in a folder and a file of these modes, or mounted read-only."""
    os.chmod(folder, 0o755)
    warm_up(folder)
    inner, other = os.path.join(folder, "inner"), os.path.join(folder, "other")
    os.mkdir(inner)
    os.mkdir(other)
    os.chmod(other, 0o777)
    path, scan = os.path.join(inner, "scan.h5"), os.path.join(folder, "copy.h5")
    make_scan(path)
    with opened(path, "path", parms_dict={"seconds": 0.0}) as process:
        process.compute()
    shutil.copy(path, scan)
    before = open(path, "rb").read()
    os.chmod(path, file_mode)
    os.chmod(inner, folder_mode)
    if mount:
        subprocess.run(["mount", "--bind", inner, inner], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", inner], check=True)
    address = f"{path}::{CHANNEL}/Raw_Data-Twice_000"
    told: dict[str, Any] = {
        "look": deprived(lambda: look(path)),
        "open": deprived(lambda: open_results(address).load(scheduler="synchronous")),
        "path": deprived(lambda: _compute(path, "path")),
        "handle": deprived(lambda: _by_reading(path)),
        "finished": deprived(lambda: _compute(path, "path", parms_dict={"seconds": 0.0})),
        "other": deprived(lambda: _compute_into(path, f"{other}/out.h5::/")),
        "into": deprived(lambda: _compute_into(f"{folder}/warm.h5", f"{inner}/new.h5::/")),
    }
    told["same"] = open(path, "rb").read() == before
    told["left"] = sorted(os.listdir(inner))
    return told


def _by_reading(path: str) -> None:
    with h5py.File(path, "r") as file, opened_by(file) as process:
        process.compute()


def opened_by(file: h5py.File) -> Any:
    from faults.subject import Twice

    return Twice(file[MAIN], cores=1)


def _compute_into(path: str, target: str) -> None:
    from faults.subject import Twice

    with Twice(f"{path}::{MAIN}", cores=1, h5_target_group=target) as process:
        process.compute()


if __name__ == "__main__":
    serve({"modes": modes, "problems": problems, "masks": masks})
