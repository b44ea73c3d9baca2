"""Runs on a disk that is full, or fills up. In a child of its own, which may mount."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import h5py

from faults import serve
from faults.subject import CHANNEL, MAIN, MASK, OldTwice, Twice, make_scan, masks, opened, problems, results_path
from lazyproc.hdf5.on_disk import find_extent
from lazyproc.hdf5.transaction import recover_locked

PAGE = 4096


class Disk:
    """A folder with little room.

    Parameters
    ----------
    folder : str
        Where it is.
    kind : str
        "disk": a small file system is mounted there, and filled with ballast. "limit": the size of files is limited.
    size : int
        Bytes of the small file system.
    """

    def __init__(self, folder: str, kind: str, size: int = 8 * 2**20) -> None:
        self.folder, self.kind = folder, kind
        self._ballast = os.path.join(folder, "ballast")
        if kind == "disk":
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)

    def leave(self, n_bytes: int, path: str) -> None:
        """Leave so much room: on the disk, or for the file to grow."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + n_bytes, resource.RLIM_INFINITY))
            return
        free = os.statvfs(self.folder)
        with open(self._ballast, "wb") as file:
            if (size := free.f_bavail * free.f_frsize - n_bytes) > 0:
                os.posix_fallocate(file.fileno(), 0, size)

    def make_room(self) -> None:
        """Take the ballast, or the limit, away."""
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        elif os.path.exists(self._ballast):
            os.unlink(self._ballast)


def attempt(path: str, by: str, **options: Any) -> dict[str, Any]:
    """Compute in a process of its own, and tell what came of it; what HDF5 could not close then dies with it."""
    return in_child(lambda: told_of(_attempt, path, by, **options))


def in_child(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do something in a forked process, which ends without ado, and return what it returned."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.enable()
        try:
            os.write(writable, json.dumps(action()).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        told = json.loads(pipe.read() or "{}")
    _, status = os.waitpid(child, 0)
    return told or {"error": f"died with {status}", "known": False, "errno": None, "text": ""}


def _attempt(path: str, by: str, **options: Any) -> None:
    with opened(path, by, **options) as process:
        process.compute()


def told_of(action: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Do something and tell what it raised."""
    try:
        action(*arguments, **options)
    except Exception as error:
        names = [one.__name__ for one in type(error).__mro__]
        return {
            "error": names[0],
            "known": "LazyprocError" in names,
            "errno": getattr(error, "errno", None),
            "text": str(error),
        }
    return {"error": "", "known": True, "errno": None, "text": ""}


def create(folder: str, scan: str, kind: str, by: str, levels: list[int]) -> list[dict[str, Any]]:
    """For each level leave so much room, compute, look at the file, make room, and compute again."""
    disk = Disk(folder, kind)
    path = os.path.join(folder, "scan.h5")
    told = []
    for level in levels:
        shutil.copy(scan, path)
        disk.leave(level, path)
        before = open(path, "rb").read()
        told.append(one := {"level": level, **attempt(path, by)})
        one["same"] = open(path, "rb").read() == before
        one["left"] = sorted(set(os.listdir(folder)) - {"scan.h5", "ballast", os.path.basename(results_path(path, by))})
        disk.make_room()
        recover(path, by)
        one["problems"] = problems(path, by, scan)
        one["masks"] = masks(path, by)
        one["again"] = attempt(path, by)
        one["problems again"] = problems(path, by, scan)
        one["masks again"] = masks(path, by)
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
    return told


def recover(path: str, by: str) -> None:
    """Do what `lazyproc recover` does."""
    for one in {path, results_path(path, by)}:
        if os.path.exists(one):
            recover_locked(one)


def sparse(folder: str, scan: str, partial: str, which: str, free: int) -> dict[str, Any]:
    """Go on with a copy of partial results that have holes, on a disk that is full.

    `which` tells what of the results has room already: "nothing", or the "outputs", so that the mask has none.
    """
    disk = Disk(folder, "disk")
    path = os.path.join(folder, "scan.h5")
    subprocess.run(["cp", "--sparse=always", partial, path], check=True)
    if which == "outputs":
        with h5py.File(path, "r") as file:
            extent = find_extent(file[CHANNEL]["Raw_Data-Narrow_000/Mean"])
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), extent.offset, extent.stop - extent.offset)
    disk.leave(free, path)
    told = attempt(path, "narrow")
    disk.make_room()
    told["problems"] = problems(path, "path", scan)
    told["masks"] = masks(path, "path")
    told["again"] = attempt(path, "narrow")
    told["problems again"] = problems(path, "path", scan)
    told["masks again"] = masks(path, "path")
    return told


def begin(path: str) -> None:
    """Make results in which nothing is done yet, as a kill right after their creation leaves them."""
    make_scan(path, n_rows=160, n_cols=256, n_spectral=4)
    with opened(path, "narrow") as process:
        process.compute()
    with h5py.File(path, "r+") as file:
        group = file[CHANNEL]["Raw_Data-Narrow_000"]
        for name in ("Mean", MASK):
            group[name][...] = 0
        group.attrs["last_pixel"] = 0


def goes_on(path: str, by: str, flag: str) -> dict[str, Any]:
    """Compute while calls fail, once more with the same object when they do not, and then in another process."""
    scan = f"{path}.copy"
    make_scan(path)
    shutil.copy(path, scan)

    def twice() -> dict[str, Any]:
        file = h5py.File(path, "r+")  # never closed: HDF5 may crash then
        process = (OldTwice if by == "hooks" else Twice)(file[MAIN], cores=1)
        open(flag, "w").close()
        told = told_of(process.compute)
        os.unlink(flag)
        told["same object"] = told_of(process.compute)
        return told

    told = in_child(twice)
    recover(path, by)
    told["problems"] = problems(path, by, scan)
    told["again"] = attempt(path, by)
    told["problems again"] = problems(path, by, scan)
    told["masks again"] = masks(path, by)
    told["left"] = sorted(name for name in os.listdir(os.path.dirname(path)) if "lazyproc" in name)
    return told


def full_at(path: str, by: str, flag: str, cores: int, seconds: float) -> dict[str, Any]:
    """Compute while calls fail (see faults.c), then once more when they do not."""
    scan = f"{path}.copy"
    make_scan(path)
    shutil.copy(path, scan)
    open(flag, "w").close()
    options = {"cores": cores, "parms_dict": {"seconds": seconds}} if by != "hooks" else {"cores": 1}
    told = attempt(path, by, **options)
    os.unlink(flag)
    recover(path, by)
    told["problems"] = problems(path, by, scan)
    told["masks"] = masks(path, by)
    told["again"] = attempt(path, by, **options)
    told["problems again"] = problems(path, by, scan)
    told["masks again"] = masks(path, by)
    return told


if __name__ == "__main__":
    serve({"create": create, "sparse": sparse, "begin": begin, "full_at": full_at, "goes_on": goes_on})
