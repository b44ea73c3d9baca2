"""The layouts that are put to death: the files of each, the process that works on them, and what it must give.

To add one, put a `Layout` into `LAYOUTS`; nothing else is needed unless it calls for another class of process, which
then goes into `processes.PROCESSES`, and what it has to give into `expected`. All files of a layout lie in one folder,
and all that the process writes has to lie there, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core import compression
from lazyproc.hdf5 import overlay

from .processes import PROCESSES

MAIN = f"{CHANNEL}/Raw_Data"
MASK = "completed_positions"
N_POSITIONS = 40
N_SPECTRAL = 8
TARGET = "some/results"
"""The target group in another file."""


@dataclass(frozen=True)
class Layout:
    """One arrangement of source, target, handles and class.

    Attributes
    ----------
    name : str
        In messages and tables.
    storage : dict
        How the main dataset is stored, as h5py takes it; empty: contiguous.
    n_siblings : int
        Groups and datasets beside the main dataset, and as many beside the results in another file.
    target : str
        Where results go: ``"same"`` file, an ``"existing"`` or a ``"new"`` file.
    source_handle, target_handle : bool
        Whether the main dataset, and the target group, are handed over as open `r+` handles, or by their address.
    kind : str
        One of `processes.PROCESSES`.
    file : dict
        How the files are made: libver, as h5py.File takes it.
    cores : int
        Two of them mean worker processes; then the function has to take a while (`processes.PAUSE`).
    begun : dict or None
        Results of older software are there, half done, and are resumed: how they are stored. None: there are none.
    unsafe : frozenset of str
        Phases (of `trials.PHASES`) in which a death is not promised to be harmless: points there are not tried.
    may_leave_groups : bool
        A death while the class itself creates its group may leave that group behind, without a mask.
    used_before : bool
        The caller has changed the structure of the results' file through its handle before: nothing is promised of
        deaths while it does that, nor of power cuts.
    """

    name: str
    storage: dict[str, Any] = field(default_factory=dict)
    n_siblings: int = 3
    target: str = "same"
    source_handle: bool = False
    target_handle: bool = False
    kind: str = "declared"
    file: dict[str, Any] = field(default_factory=dict)
    cores: int = 1
    begun: dict[str, Any] | None = None
    unsafe: frozenset[str] = frozenset()
    may_leave_groups: bool = False
    used_before: bool = False
    most_kept: int | None = None
    """Bytes beyond the old end of the file that a transaction keeps in memory (`overlay.MOST_KEPT`)."""

    def scan(self, folder: str | Path) -> Path:
        """Return the file with the main dataset."""
        return Path(folder) / "scan.h5"

    def results(self, folder: str | Path) -> Path:
        """Return the file with the results."""
        return self.scan(folder) if self.target == "same" else Path(folder) / "out.h5"

    @property
    def needs_recover(self) -> bool:
        """Whether the caller opens the results' file, so that `compute` cannot recover it before."""
        return self.target_handle or (self.source_handle and self.target == "same")

    @property
    def parent(self) -> str:
        """The target group."""
        return CHANNEL if self.target == "same" else f"/{TARGET}"

    @property
    def prefix(self) -> str:
        """How the names of its results groups begin."""
        return f"Raw_Data-{PROCESSES[self.kind].__name__}_"

    def make(self, folder: str | Path) -> None:
        """Write the files as they are before anything is computed."""
        _make_scan(self, self.scan(folder))
        if self.target == "existing":
            with h5py.File(self.results(folder), "w", **self.file) as file:
                _add_siblings(file.require_group(TARGET), self.n_siblings)
        if self.begun is not None:
            with h5py.File(self.results(folder), "r+") as file, h5py.File(self.scan(folder), "r") as scan:
                _begin(self, file[self.parent], (file if self.target == "same" else scan)[MAIN])

    @contextlib.contextmanager
    def process(self, folder: str | Path, interval: float = 0.0) -> Iterator[lazyproc.Process]:
        """Make the process on the files in a folder; closes them afterwards."""
        with contextlib.ExitStack() as stack:
            main: Any = f"{self.scan(folder)}::{MAIN}"
            target: Any = None if self.target == "same" else f"{self.results(folder)}::{TARGET}"
            if self.source_handle:
                mode = "r+" if self.target == "same" else "r"
                main = stack.enter_context(h5py.File(self.scan(folder), mode))[MAIN]
            if self.target_handle:
                target = stack.enter_context(h5py.File(self.results(folder), "r+"))[TARGET]
            options: dict[str, Any] = {"on_error": "record"} if self.kind == "recording" else {}
            options |= {"cores": self.cores, "h5_target_group": target, "checkpoint_interval": interval}
            if self.used_before:
                _change_and_take_back((target or main).file)
            made = PROCESSES[self.kind](main, parms_dict={"gain": 2.0}, **options)
            yield stack.enter_context(made)


def _change_and_take_back(file: h5py.File) -> None:
    """Do what leaves unused space and half-empty buffers in a file that is open, but nothing else."""
    from .actions import note

    for number in range(12):
        group = file.create_group(f"Scratch/{number}")
        group.attrs["text"] = "x" * 500
        group["values"] = np.arange(1000) * number
        group.create_dataset("zipped", data=np.arange(900), chunks=(100,), compression="gzip")
    for number in range(0, 12, 2):
        del file[f"Scratch/{number}"]
    file.flush()
    del file["Scratch"]
    file.flush()
    note("ready")


def set_sizes(layout: Layout) -> None:
    """Make what is large in earnest small enough for the layout."""
    compression.CHUNK_BYTES = 200
    if layout.most_kept is not None:
        overlay.MOST_KEPT = layout.most_kept


def siblings(n_siblings: int) -> Iterator[tuple[str, NDArray[np.int64], dict[str, Any]]]:
    """Tell what lies beside: names, values and storage."""
    ways: list[dict[str, Any]] = [{}, {"chunks": (7, 5)}, {"chunks": (10, 10), "compression": "gzip"}]
    for number in range(n_siblings):
        yield f"Sibling_{number:03d}", np.arange(300).reshape(30, 10) * (number + 1), ways[number % 3]


def _add_siblings(parent: h5py.Group, n_siblings: int) -> None:
    for name, values, storage in siblings(n_siblings):
        group = parent.create_group(name)
        group.attrs["text"] = f"of {name}"
        if n_siblings <= 20 or name.endswith("0"):
            group.create_dataset("values", data=values, **storage).attrs["units"] = "V"


def raw_data() -> NDArray[np.float64]:
    """Return the main dataset's values; the first column tells the position."""
    data = np.random.default_rng(3).standard_normal((N_POSITIONS, N_SPECTRAL))
    data[:, 0] = np.arange(N_POSITIONS)
    return data


def _make_scan(layout: Layout, path: Path) -> None:
    shape = {"n_rows": N_POSITIONS // 10, "n_cols": 10, "n_spectral": N_SPECTRAL}
    make_usid_file(path, **shape, data=raw_data(), **layout.storage, **layout.file)
    with h5py.File(path, "r+", **layout.file) as file:
        _add_siblings(file[CHANNEL], layout.n_siblings)


def _begin(layout: Layout, parent: h5py.Group, main: h5py.Dataset) -> None:
    """Write half of the results as older software would: its own storage, last_pixel, perhaps no mask."""
    assert layout.begun is not None
    group = parent.create_group(f"{layout.prefix}000")
    group.attrs["gain"] = 2.0
    group.attrs["tool"] = PROCESSES[layout.kind].__name__
    group.attrs["last_pixel"] = N_POSITIONS // 2
    group.attrs["source_file_path"] = os.path.abspath(main.file.filename)
    if layout.target == "same":
        group.attrs["source_000"] = main.ref
    for name, values in expected(layout).items():
        dataset = group.create_dataset(name, values.shape, values.dtype, **layout.begun)
        dataset[: N_POSITIONS // 2] = values[: N_POSITIONS // 2]
    mask = np.arange(N_POSITIONS) < N_POSITIONS // 2
    group.create_dataset(MASK, data=mask.astype(np.uint8))


def expected(layout: Layout) -> dict[str, NDArray[Any]]:
    """Return what an undisturbed run gives for each output, `(n_positions, width)`."""
    data = raw_data()
    means = np.array([[row.mean()] for row in data])
    if layout.kind in ("declared", "recording", "compressed"):
        found = {"Mean": means, "Scaled": np.array([2.0 * row for row in data]).astype("f4")}
        if layout.kind == "recording":
            bad = np.arange(N_POSITIONS) % 9 == 4
            for values in found.values():
                values[bad] = np.nan
            found["position_status"] = np.where(bad, 2, 1).astype("u1")
        return found
    return {"Results": means.astype("f4")}


# -- the layouts -----------------------------------------------------------------------------------------------------

CHUNKED = {"chunks": (4, 8)}
GZIP = {"chunks": (4, 8), "compression": "gzip"}
LAYOUTS = [
    Layout("path, contiguous, 0 siblings", n_siblings=0),
    Layout("path, contiguous, 3 siblings"),
    Layout("path, chunked, 20 siblings", CHUNKED, 20),
    Layout("path, gzip, 200 siblings", GZIP, 200),
    Layout("path, gzip, new file", GZIP, target="new"),
    Layout("path, contiguous, existing file", target="existing"),
    Layout("path, chunked, existing file, 20 siblings", CHUNKED, 20, target="existing"),
    Layout("path, contiguous, newest format, 20 siblings", n_siblings=20, file={"libver": "latest"}),
    Layout("path, source by handle, existing file", target="existing", source_handle=True),
    Layout("path, resuming chunked results", begun={"chunks": (5, 1), "compression": "gzip"}),
    Layout("path, bad positions recorded", kind="recording"),
    Layout("path, compressed results", kind="compressed"),
    Layout("path, compressed results, written as they come", kind="compressed", most_kept=0),
    Layout("path, compressed results, new file", kind="compressed", target="new"),
    Layout("handle, compressed results", kind="compressed", source_handle=True),
    Layout(
        "handle, compressed results, existing file",
        kind="compressed",
        target="existing",
        source_handle=True,
        target_handle=True,
    ),
    Layout("path, contiguous, two workers", cores=2),
    Layout("handle, resuming chunked results", source_handle=True, begun={"chunks": (5, 1), "compression": "gzip"}),
    Layout("handle, contiguous, 0 siblings", n_siblings=0, source_handle=True),
    Layout("handle, contiguous, 3 siblings", source_handle=True),
    Layout("handle, chunked, 20 siblings", CHUNKED, 20, source_handle=True),
    Layout("handle, gzip, 200 siblings", GZIP, 200, source_handle=True),
    Layout(
        "handle, gzip, existing file",
        GZIP,
        target="existing",
        source_handle=True,
        target_handle=True,
    ),
    Layout("handle, used before", n_siblings=20, source_handle=True, used_before=True),
    Layout("handle, gzip, used before", GZIP, 20, source_handle=True, used_before=True),
    Layout("hooks, handle", source_handle=True, kind="hooks"),
    Layout("hooks, path", kind="hooks"),
    Layout("hooks, path, gzip results, new file", target="new", kind="hooks, gzip"),
    Layout("hooks, path, newest format", kind="hooks", file={"libver": "latest"}),
    Layout("hooks, path, gzip results, newest format", kind="hooks, gzip", file={"libver": "latest"}),
    Layout(
        "hooks, path, gzip results, newest format, existing file",
        target="existing",
        kind="hooks, gzip",
        file={"libver": "latest"},
    ),
    Layout("hooks, handle, chunked results", source_handle=True, kind="hooks, chunked"),
    Layout("hooks, handle, gzip results", source_handle=True, kind="hooks, gzip"),
    Layout("hooks, handle, gzip results, used before", source_handle=True, kind="hooks, gzip", used_before=True),
    Layout(
        "hooks, handle, gzip results, existing file, 200 siblings",
        n_siblings=200,
        target="existing",
        source_handle=True,
        target_handle=True,
        kind="hooks, gzip",
    ),
]

BY_NAME = {layout.name: layout for layout in LAYOUTS}
