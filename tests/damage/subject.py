"""What is damaged: a scan with neighbours, finished results and partial ones, and the truth about them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from usid_files import CHANNEL, make_usid_file

from lazyproc import Dimension, Output, Process
from lazyproc.hdf5.on_disk import find_extent

MAIN = f"{CHANNEL}/Raw_Data"
FINISHED, PARTIAL = "Raw_Data-Peaks_000", "Raw_Data-Peaks_001"
N_POSITIONS = 30
MASK = "completed_positions"
DONE = np.arange(N_POSITIONS) % 3 != 1
"""What the partial results have done."""
TABLE = np.arange(5000.0)
"""A parameter too large for an attribute."""
GARBAGE = -1e6
"""What lies where nothing is done; never a result."""


class Peaks(Process):
    process_name = "Peaks"
    outputs = {
        "Height": Output("f8", units="nA"),
        "Fit": Output("f4", dims=[Dimension("Parameter", "a.u.", 3)], units="a.u."),
    }

    @staticmethod
    def _block_function(block, power=1, table=(0.0,)):
        return block.max(axis=1) * power + float(np.sum(table)), block[:, :3] * power


PARAMETERS: dict[str, dict[str, Any]] = {
    FINISHED: {"power": 2, "table": TABLE, "label": "first"},
    PARTIAL: {"power": 3, "limits": {"low": None, "high": [1.0, 2.0]}},
}


def truth(rows: NDArray[Any], parameters: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Return what the results must be."""
    height, fit = Peaks._block_function(rows, parameters["power"], parameters.get("table", (0.0,)))
    return {"Height": height.reshape(-1, 1).astype("f8"), "Fit": fit.astype("f4")}


@dataclass
class Subject:
    """A file to be damaged, in memory.

    Attributes
    ----------
    content : bytes
        The file, with its results.
    n_before : int
        Its length before there were results.
    inner : list of (int, int)
        Bytes before `n_before` that the results changed: the parent group's. Start and stop.
    raw : dict
        Start and stop of the values of results and masks, by the names of their datasets.
    kept : dict
        The same of everything that is none of lazyproc's: source, ancillary and sibling datasets.
    objects : list of int
        Where the headers of the results' groups and datasets, their trees and heaps begin.
    source : ndarray
        The main dataset.
    """

    content: bytes
    n_before: int
    inner: list[tuple[int, int]]
    raw: dict[str, tuple[int, int]]
    kept: dict[str, tuple[int, int]]
    objects: list[int]
    source: NDArray[Any] = field(repr=False)

    def write(self, path: Path) -> None:
        """Write the undamaged file."""
        path.write_bytes(self.content)

    def metadata(self) -> list[tuple[int, int]]:
        """Return the bytes of the results that are no values: start and stop of each piece."""
        pieces, place = [], self.n_before
        for start, stop in sorted(self.raw.values()):
            if start > place:
                pieces.append((place, start))
            place = max(place, stop)
        return [*pieces, (place, len(self.content))] if place < len(self.content) else pieces


def build(folder: Path) -> Subject:
    """Make the scan and its results with lazyproc, and read them into memory."""
    path = folder / "subject.h5"
    make_usid_file(path, n_rows=5, n_cols=6)
    with h5py.File(path, "r+") as file:
        notes = file.create_group(f"{CHANNEL}/Notes")
        notes.attrs["author"] = "nobody"
        notes.create_dataset("Log", data=np.arange(100))
        file[CHANNEL].create_dataset("Other", data=np.random.default_rng(3).random((20, 5)))
    before = path.read_bytes()
    for parameters in PARAMETERS.values():
        with Peaks(f"{path}::{MAIN}", parms_dict=parameters, cores=1) as process:
            process.compute()
    extents = _extents(path)
    _undo(path, extents)
    after = path.read_bytes()
    with h5py.File(path, "r") as file:
        source = file[MAIN][()]
        objects = _objects(file, after)
    inner = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after[: len(before)], np.uint8))
    raw = {name: place for name, place in extents.items() if "-Peaks_" in name}
    kept = {name: place for name, place in extents.items() if name not in raw}
    return Subject(after, len(before), _spans(inner), raw, kept, objects, source)


def _extents(path: Path) -> dict[str, tuple[int, int]]:
    found = {}

    def note(name: str, item: object) -> None:
        extent = find_extent(item) if isinstance(item, h5py.Dataset) and item.ndim in (1, 2) else None
        if extent is not None:
            found[name] = (extent.offset, extent.offset + extent.shape[0] * extent.row_bytes)

    with h5py.File(path, "r") as file:
        file.visititems(note)
    return found


def _undo(path: Path, extents: dict[str, tuple[int, int]]) -> None:
    """Make the second group partial, with garbage where nothing is done."""
    group = f"{CHANNEL}/{PARTIAL}".lstrip("/")
    with h5py.File(path, "r+") as file:
        file[group]["completed_positions"][...] = DONE
        file[group]["position_status"][...] = DONE
        file[group].attrs["last_pixel"] = np.int64(0)
        for name in Peaks.outputs:
            values = file[group][name][()]
            values[~DONE] = GARBAGE
            file[group][name][...] = values
    assert _extents(path) == extents


def _objects(file: h5py.File, content: bytes) -> list[int]:
    places = set()

    def note(name: bytes, info: Any) -> None:
        if b"-Peaks_" in name:
            places.add(int(info.addr))

    h5py.h5o.visit(file.id, note, info=True)
    for mark in (b"TREE", b"HEAP", b"SNOD", b"GCOL"):
        place = content.find(mark)
        while place >= 0:
            places.add(place)
            place = content.find(mark, place + 1)
    return sorted(places)


def _spans(places: NDArray[np.int64]) -> list[tuple[int, int]]:
    if not places.size:
        return []
    cuts = np.flatnonzero(np.diff(places) > 8) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(places, cuts)]


def unharmed(path: str | os.PathLike[str], subject: Subject, damaged: list[tuple[int, int]]) -> list[str]:
    """Return the names of datasets that are none of lazyproc's and whose bytes have changed since the damage."""
    content = Path(path).read_bytes()
    wrong = []
    for name, (start, stop) in subject.kept.items():
        if not any(first < stop and last > start for first, last in damaged):
            if content[start:stop] != subject.content[start:stop]:
                wrong.append(name)
    return wrong
