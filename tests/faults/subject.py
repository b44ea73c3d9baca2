"""A scan, processes on it, and what must be true of the file whatever happened."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
from usid_files import CHANNEL, make_usid_file

import lazyproc

MAIN = f"{CHANNEL}/Raw_Data"
MASK = "completed_positions"
N_POSITIONS, N_SPECTRAL = 240, 64
RESULT_BYTES = N_POSITIONS * (N_SPECTRAL + 1) * 8


class Twice(lazyproc.Process):
    """Takes a parameter `seconds` a position, so that there are several blocks."""

    process_name = "Twice"
    outputs = {
        "Double": lazyproc.Output("f8", shape_from_main=True, units="V"),
        "Mean": lazyproc.Output("f8", units="V"),
    }

    @staticmethod
    def _map_function(spectrum, seconds=0.0):
        time.sleep(seconds)
        return 2.0 * spectrum, np.mean(spectrum, dtype=float)


class Zipped(Twice):
    """The same, compressed."""

    outputs = {
        "Double": lazyproc.Output("f8", shape_from_main=True, units="V", compression="gzip"),
        "Mean": lazyproc.Output("f8", units="V", compression="gzip", shuffle=True),
    }


class OldTwice(lazyproc.Process):
    """The same by the hooks of the old contract."""

    process_name = "Twice"

    @staticmethod
    def _map_function(spectrum):
        return 2.0 * spectrum, np.mean(spectrum, dtype=float)

    def _create_results_datasets(self):
        numbers = [int(name[-3:]) for name in self._h5_target_group if name.startswith("Raw_Data-Twice_")]
        group = self._h5_target_group.create_group(f"Raw_Data-Twice_{max(numbers, default=-1) + 1:03d}")
        self.h5_results_grp = group
        self._double = group.create_dataset("Double", (N_POSITIONS, N_SPECTRAL), "f8")
        self._mean = group.create_dataset("Mean", (N_POSITIONS, 1), "f8")

    def _get_existing_datasets(self):
        self._double, self._mean = self.h5_results_grp["Double"], self.h5_results_grp["Mean"]

    def _write_results_chunk(self):
        pixels = self._get_pixels_in_current_batch()
        self._double[pixels[0] : pixels[-1] + 1] = np.stack([double for double, _ in self._results])
        self._mean[pixels[0] : pixels[-1] + 1] = np.array([[mean] for _, mean in self._results])

    def _read_data_chunk(self):
        self._max_pos_per_read = 60
        super()._read_data_chunk()


class Narrow(lazyproc.Process):
    """So little a position that the status mask is a good part of the results."""

    process_name = "Narrow"
    outputs = {"Mean": lazyproc.Output("f8", units="V")}

    @staticmethod
    def _block_function(block):
        return block.mean(axis=1, dtype=float)


def make_scan(path: str, **storage: Any) -> None:
    """Write a scan with neighbours in its group."""
    storage = {"n_rows": 12, "n_cols": 20, "n_spectral": N_SPECTRAL, "seed": 5, **storage}
    make_usid_file(path, **storage)
    with h5py.File(path, "r+") as file:
        for number in range(4):
            notes = file.create_group(f"{CHANNEL}/Notes_{number}")
            notes.attrs["author"] = "nobody"
            notes.create_dataset("Log", data=np.arange(100) + number)


@contextmanager
def opened(path: str, by: str, **options: Any) -> Iterator[lazyproc.Process]:
    """Open a process by "path", by "handle", by "hooks", with results "elsewhere", or a "narrow" one by its path.

    "zipped" and "zipped handle" have compressed results.
    """
    options = {"cores": 1, "checkpoint_interval": 0.0, **options}
    if by == "elsewhere":
        options["h5_target_group"] = f"{path}.out.h5::/results"
    kind = Zipped if "zipped" in by else Narrow if by == "narrow" else OldTwice if by == "hooks" else Twice
    if by in ("path", "elsewhere", "narrow", "zipped"):
        with kind(f"{path}::{MAIN}", **options) as process:
            yield process
        return
    # After an error it stays open: on a full disk HDF5 cannot close it, and may crash when it tries.
    file = h5py.File(path, "r+")
    with kind(file[MAIN], **options) as process:
        yield process
    file.close()


def results_path(path: str, by: str) -> str:
    """Return the file that results go to."""
    return f"{path}.out.h5" if by == "elsewhere" else path


def others(path: str) -> str:
    """Return a hash of all that is none of lazyproc's in a file, read by plain h5py."""
    digest = hashlib.sha256()

    def take(name: str, item: Any) -> None:
        if _is_results(name):
            return
        digest.update(name.encode())
        for key in sorted(item.attrs):
            value = item.attrs[key]
            digest.update(f"{key} {'reference' if isinstance(value, h5py.Reference) else value!r}".encode())
        if isinstance(item, h5py.Dataset):
            digest.update(item[()].tobytes())

    with h5py.File(path, "r") as file:
        file.visititems(take)
    return digest.hexdigest()


def problems(path: str, by: str, scan: str) -> list[str]:
    """Return what is wrong with the results in a file: whatever is marked done must be right.

    Parameters
    ----------
    path : str
        The scan's file.
    by : str
        How it was computed.
    scan : str
        An untouched copy of the scan.
    """
    found = []
    if others(path) != others(scan):
        found.append("something else has changed")
    with h5py.File(scan, "r") as file:
        rows = file[MAIN][()]
    expected = {"Double": 2.0 * rows, "Mean": rows.mean(axis=1, dtype=float)[:, np.newaxis]}
    results = results_path(path, by)
    if not os.path.exists(results):
        return found
    with h5py.File(results, "r") as file:
        for name, group in file.get("/results" if by == "elsewhere" else CHANNEL, {}).items():
            if not _is_results(name) or MASK not in group:
                continue
            mask = group[MASK][()]
            if mask.max() > 1:
                found.append(f"{name}: the mask holds {mask.max()}")
            for key, values in expected.items():
                if key not in group:
                    continue
                bad = np.flatnonzero((group[key][()] != values).any(axis=1) & (mask == 1))
                if bad.size:
                    found.append(f"{name}/{key}: wrong at {bad.tolist()[:10]}")
    return found


def masks(path: str, by: str) -> dict[str, int]:
    """Return how many positions each results group has done."""
    results = results_path(path, by)
    if not os.path.exists(results):
        return {}
    with h5py.File(results, "r") as file:
        groups = file.get("/results" if by == "elsewhere" else CHANNEL, {})
        return {
            name: int(group[MASK][()].sum()) for name, group in groups.items() if _is_results(name) and MASK in group
        }


def _is_results(name: str) -> bool:
    return "Raw_Data-" in name
