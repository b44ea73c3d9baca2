"""Files that are moved, replaced or cut off while they are read and written, by the function that is computed."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import h5py
import numpy as np

import lazyproc
from faults import serve
from faults.full import in_child, told_of
from faults.subject import CHANNEL, MAIN, MASK, N_POSITIONS, N_SPECTRAL, make_scan, results_path

AT = 100
"""The position at which it happens."""


class Disturbed(lazyproc.Process):
    process_name = "Twice"
    outputs = {
        "Double": lazyproc.Output("f8", shape_from_main=True, units="V"),
        "Mean": lazyproc.Output("f8", units="V"),
    }

    @staticmethod
    def _map_function(spectrum, what, path, spare, seconds):
        time.sleep(seconds)
        if spectrum[0] == AT and not os.path.exists(f"{spare}.done"):
            open(f"{spare}.done", "w").close()
            disturb(what, path, spare)
        return 2.0 * spectrum, np.mean(spectrum, dtype=float)


def disturb(what: str, path: str, spare: str) -> None:
    """Do it."""
    if what == "moved":
        os.rename(path, f"{path}.moved")
    elif what == "replaced":
        os.rename(path, f"{path}.moved")
        os.rename(spare, path)
    elif what == "written anew":  # the same file, as far as the file system can tell
        content = open(spare, "rb").read()
        with open(path, "r+b") as file:
            file.truncate(0)
            file.write(content[: len(content) // 2])
    elif what == "truncated":
        os.truncate(path, int(os.path.getsize(path) * 0.6))
    elif what == "emptied":
        os.truncate(path, 0)
    elif what == "deleted":
        os.unlink(path)


def raw(seed: int) -> Any:
    data = np.random.default_rng(seed).standard_normal((N_POSITIONS, N_SPECTRAL)).astype("f4")
    data[:, 0] = np.arange(N_POSITIONS)
    return data


def under_run(folder: str, by: str, storage: dict[str, Any], which: str, what: str, cores: int) -> dict[str, Any]:
    """Disturb the file of the source, or that of the results, under a run; then look, mend, and compute again."""
    if "chunks" in storage:
        storage["chunks"] = tuple(storage["chunks"])
    path, spare = os.path.join(folder, "scan.h5"), os.path.join(folder, "spare.h5")
    make_scan(path, data=raw(1), **storage)
    victim = path if which == "source" else results_path(path, by)
    if victim == path:
        make_scan(spare, data=raw(2), **storage)
    else:
        with h5py.File(spare, "w") as file:
            file["results/Notes"] = np.arange(1000)
    new = open(spare, "rb").read()
    shutil.copy(path, f"{path}.copy")
    parameters = {"what": what, "path": victim, "spare": spare, "seconds": 0.001 if cores == 1 else 0.01}
    told = in_child(lambda: told_of(compute, path, by, parameters, cores))
    told["harmed"] = what == "replaced" and open(victim, "rb").read() != new
    told["left"] = sorted(set(os.listdir(folder)) - {"scan.h5", "scan.h5.copy", "spare.h5", "spare.h5.done"})
    mend(what, victim, f"{path}.copy" if which == "source" or by != "elsewhere" else None)
    told["wrong"] = wrong(results_path(path, by), by)
    told["again"] = in_child(lambda: told_of(compute, path, by, parameters, cores))
    told["wrong again"] = wrong(results_path(path, by), by)
    told["done"] = done(results_path(path, by), by)
    return told


def mend(what: str, victim: str, copy: str | None) -> None:
    """Put the file back under its name; what was lost comes from a copy, or not at all."""
    if what in ("moved", "replaced"):
        os.replace(f"{victim}.moved", victim)
    elif copy is not None:
        shutil.copy(copy, victim)
    elif os.path.exists(victim):
        os.unlink(victim)


def compute(path: str, by: str, parameters: dict[str, Any], cores: int) -> None:
    """Compute by a path, a handle, or into another file."""
    options = {"parms_dict": parameters, "cores": cores, "checkpoint_interval": 0.0}
    if by == "handle":
        file = h5py.File(path, "r+")
        Disturbed(file[MAIN], **options).compute()
        file.close()
        return
    target = f"{path}.out.h5::/results" if by == "elsewhere" else None
    with Disturbed(f"{path}::{MAIN}", h5_target_group=target, **options) as process:
        process.compute()


def _groups(path: str, by: str) -> dict[str, tuple[Any, Any, Any]]:
    if not os.path.exists(path):
        return {}
    with h5py.File(path, "r") as file:
        groups = file.get("/results" if by == "elsewhere" else CHANNEL, {})
        return {
            name: tuple(group[one][()] for one in ("Double", "Mean", MASK))
            for name, group in groups.items()
            if "Raw_Data-" in name
        }


def wrong(path: str, by: str) -> dict[str, list[int]]:
    """Return which positions are marked done and not right."""
    rows = raw(1)
    right = 2.0 * rows, rows.mean(axis=1, dtype=float)[:, np.newaxis]
    found = {}
    for name, (double, mean, mask) in _groups(path, by).items():
        bad = np.flatnonzero(((double != right[0]).any(axis=1) | (mean != right[1]).any(axis=1)) & (mask != 0))
        if bad.size:
            found[name] = bad.tolist()
    return found


def done(path: str, by: str) -> dict[str, int]:
    """Return how many positions each group has done."""
    return {name: int(mask.sum()) for name, (_, _, mask) in _groups(path, by).items()}


def broken(folder: str, kind: str, by: str) -> dict[str, Any]:
    """Compute on a source that cannot be read in the middle; then mend it, and compute again."""
    path = os.path.join(folder, "scan.h5")
    storage: dict[str, Any] = {"data": raw(1)}
    if kind in ("gzip", "fletcher32", "index"):
        storage |= {"chunks": (20, N_SPECTRAL), "compression": "gzip" if kind == "gzip" else None}
    make_scan(path, **storage)
    elsewhere = os.path.join(folder, "values")
    with h5py.File(path, "r+") as file:
        if kind in ("fletcher32", "external", "virtual"):
            again(file, kind, elsewhere)
        chunk = file[MAIN].id.get_chunk_info(6) if file[MAIN].chunks else None
    good = open(path, "rb").read()
    if chunk is not None:
        with open(path, "r+b") as file:
            file.seek(chunk.byte_offset + chunk.size // 2)
            file.write(b"\x55" * 4)
    elif kind != "virtual":
        os.rename(elsewhere, f"{elsewhere}.moved")
    else:
        os.truncate(elsewhere, 100)
    parameters = {"what": "", "path": path, "spare": os.path.join(folder, "spare"), "seconds": 0.0}
    told = in_child(lambda: told_of(compute, path, by, parameters, 1))
    told["wrong"] = wrong(path, by)
    if chunk is not None:
        with open(path, "r+b") as file:
            file.seek(chunk.byte_offset)
            file.write(good[chunk.byte_offset : chunk.byte_offset + chunk.size])
    elif kind != "virtual":
        os.rename(f"{elsewhere}.moved", elsewhere)
    else:
        with h5py.File(elsewhere, "w") as file:
            file["values"] = raw(1)
    told["again"] = in_child(lambda: told_of(compute, path, by, parameters, 1))
    told["wrong again"] = wrong(path, by)
    told["done"] = done(path, by)
    return told


def again(file: h5py.File, kind: str, elsewhere: str) -> None:
    """Store the main dataset in another way."""
    old = file[MAIN]
    attrs = dict(old.attrs)
    del file[MAIN]
    if kind == "external":
        new = file.create_dataset(MAIN, old.shape, old.dtype, external=[(elsewhere, 0, old.nbytes)])
        new[...] = raw(1)
    elif kind == "virtual":
        with h5py.File(elsewhere, "w") as other:
            other["values"] = raw(1)
        layout = h5py.VirtualLayout((N_POSITIONS, N_SPECTRAL), "f4")
        layout[...] = h5py.VirtualSource(elsewhere, "values", (N_POSITIONS, N_SPECTRAL), "f4")
        new = file.create_virtual_dataset(MAIN, layout)
    else:
        new = file.create_dataset(MAIN, data=raw(1), chunks=(20, N_SPECTRAL), fletcher32=True)
    for key, value in attrs.items():
        new.attrs[key] = value


if __name__ == "__main__":
    serve({"under_run": under_run, "broken": broken})
