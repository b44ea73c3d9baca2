"""The file beside the HDF5 file that holds the rows of a compressed output until all of them are there.

Rows that are still computed need a place that does not move, which compressed chunks do not have. A contiguous dataset
inside the HDF5 file would leave a hole there once the compressed one replaces it. So the dataset refers to HDF5's
external storage, ``.scan.h5.lazyproc-rows-<run>-<output>-<checksum>``: a page that tells whose rows these are, then the
rows.

HDF5 keeps the absolute path. What belongs to an HDF5 file, though, is only what lies beside it under the name that
follows from its own: a copy of the HDF5 file must never write into the rows of the original. Files that were moved
together are found by that name, and `adopt` makes the dataset refer to the new place.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from lazyproc.core.compression import Compression
from lazyproc.core.errors import ResultsError
from lazyproc.core.specs import ResolvedOutput
from lazyproc.hdf5.create import LARGEST_FILLED
from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.durable import sync_folder, write_all
from lazyproc.hdf5.extents import Extent
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.on_disk import plain_type, real_path
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.room import reserve, writing
from lazyproc.hdf5.sidecar import ROWS, open_sidecar, sidecar

MARK = "lazyproc_compression"
"""Attribute of a dataset that is to be compressed once all its rows are there: how, as text."""
HEADER_BYTES = 4096
_MAGIC = b"lazyproc rows 1\n"
_PIECE = 2**20
_ADVICE = "Restore it there, under this name, or compute with override=True."


def rows_path(path: str, run_id: str, output: str) -> str:
    """Return where the rows of an output lie that belongs to the HDF5 file `path`."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", output)[:24]
    return sidecar(path, f"{ROWS}{run_id[:12]}-{plain}-{zlib.crc32(output.encode()):08x}")


@dataclass(frozen=True)
class RowsFiles:
    """Makes these files for a results group that is being created.

    Attributes
    ----------
    path : str
        The HDF5 file on disk.
    """

    path: str

    def make(self, run_id: str, output: ResolvedOutput, n_positions: int) -> tuple[str, int, int]:
        """Make the file of an output, durable and with all its room set aside; return path, offset and size for HDF5.

        Raises
        ------
        NoRoomError
            If there is no room for it.
        """
        name, size = rows_path(self.path, run_id, output.name), n_positions * output.row_bytes
        about = {"run_id": run_id, "output": output.name, "bytes": size, "inode": os.stat(self.path).st_ino}
        what = f"the rows of {output.name}"
        with writing(name, what, size):
            descriptor = open_sidecar(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                reserve(descriptor, 0, HEADER_BYTES + size, name, what)
                os.ftruncate(descriptor, HEADER_BYTES + size)
                if size <= LARGEST_FILLED:  # what other readers see of positions that are not computed yet
                    _fill(descriptor, output, n_positions)
                write_all(descriptor, _MAGIC + json.dumps(about).encode(), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_folder(name)
        return name, HEADER_BYTES, size


def _fill(descriptor: int, output: ResolvedOutput, n_positions: int) -> None:
    """Write the fill value to all rows, a piece after the other."""
    piece = np.full((max(1, min(n_positions, _PIECE // output.row_bytes)), output.width), output.fill_value).tobytes()
    for start in range(0, n_positions * output.row_bytes, len(piece)):
        size = min(len(piece), n_positions * output.row_bytes - start)
        write_all(descriptor, piece[:size], HEADER_BYTES + start)


def remove(names: list[str]) -> None:
    """Remove files for good."""
    for name in names:
        with suppress(FileNotFoundError):
            os.unlink(name)
    if names:
        sync_folder(names[0])


def waiting(group: h5py.Group) -> list[str]:
    """Return the names of the datasets in a results group that are to be compressed when all is done."""
    return [name for name, item in group.items() if isinstance(item, h5py.Dataset) and MARK in item.attrs]


def wanted_compression(dataset: h5py.Dataset) -> Compression:
    """Return how a dataset is to be compressed when all is done.

    Raises
    ------
    ResultsError
        If that cannot be read.
    """
    try:
        return Compression.from_text(attribute(dataset, MARK))
    except H5_ERRORS as error:
        raise ResultsError(
            f"{dataset.name}: the attribute {MARK} cannot be read ({error}). Another program has changed it, or the "
            "file is damaged. Compute with override=True."
        ) from error


def is_outside(dataset: h5py.Dataset) -> bool:
    """Tell whether the rows of a dataset lie in a file of their own, made by lazyproc."""
    return dataset.id.get_create_plist().get_external_count() > 0 and MARK in dataset.attrs


def recorded_path(dataset: h5py.Dataset) -> str:
    """Return where HDF5 looks for the rows of such a dataset."""
    return os.fsdecode(dataset.id.get_create_plist().get_external(0)[0])


def path_behind(file: h5py.File) -> str | None:
    """Return the file on disk behind a handle, also one of a Python file object of lazyproc's own; None without one."""
    path = real_path(file)
    if path is None and file.driver == "fileobj" and os.path.isfile(str(file.filename)):
        path = os.path.abspath(str(file.filename))
    return path


def rows_beside(dataset: h5py.Dataset) -> str:
    """Return the file with the rows of such a dataset, which belongs to the HDF5 file that the dataset was opened in.

    Raises
    ------
    ResultsError
        If it is not there, is too short, or holds something else.
    """
    path, recorded = path_behind(dataset.file), recorded_path(dataset)
    output, run_id = str(dataset.name).rpartition("/")[2], str(attribute(dataset.parent, "lazyproc_run_id", ""))
    name = recorded if path is None else rows_path(path, run_id, output)
    try:
        descriptor = open_sidecar(name, os.O_RDONLY)
    except OSError as error:
        raise ResultsError(
            f"{dataset.name}: the file with its rows, {name}, is not there, or cannot be read ({error.strerror}); it "
            "has to lie beside the HDF5 file until the results are complete. "
            + ("" if recorded == name else f"It was made as {recorded}. ")
            + _ADVICE
        ) from error
    try:
        about, length = _header(descriptor) or {}, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    size = int(dataset.id.get_storage_size())
    told = about.get("run_id"), about.get("output"), about.get("bytes")
    refers = dataset.id.get_create_plist().get_external(0)[1:]
    if told != (run_id, output, size) or tuple(refers) != (HEADER_BYTES, size):
        raise ResultsError(f"{dataset.name}: the file {name} does not hold its rows, but something else. {_ADVICE}")
    if length < HEADER_BYTES + size:
        raise ResultsError(
            f"{dataset.name}: the file with its rows, {name}, has {length} bytes; expected {HEADER_BYTES + size}: it "
            f"was cut off, or copied in part. {_ADVICE}"
        )
    return name


def _header(descriptor: int) -> dict[str, Any] | None:
    """Return what the first page of a file tells; None if it is not one of these files."""
    page = os.pread(descriptor, HEADER_BYTES, 0)
    if not page.startswith(_MAGIC):
        return None
    try:
        return dict(json.loads(page[len(_MAGIC) :].rstrip(b"\0")))
    except (TypeError, ValueError):
        return None


def is_at_home(dataset: h5py.Dataset) -> bool:
    """Tell whether HDF5 looks for the rows where they are; raises as `rows_beside`."""
    try:
        return os.path.samefile(rows_beside(dataset), recorded_path(dataset))
    except OSError:
        return False


def check_rows(group: h5py.Group) -> None:
    """Make sure that the rows of all datasets in a results group that lie in files of their own are there.

    Raises
    ------
    ResultsError
        If not: see `rows_beside`.
    """
    for name in waiting(group):
        wanted_compression(group[name])
        if is_outside(group[name]):
            rows_beside(group[name])


def check_readable(dataset: h5py.Dataset) -> None:
    """Make sure that HDF5 reads the rows of a dataset, and those of this file.

    Raises
    ------
    ResultsError
        If its rows lie in a file of their own, and that is missing, damaged, or now elsewhere.
    """
    if is_outside(dataset) and not is_at_home(dataset):
        raise ResultsError(
            f"{dataset.name}: the HDF5 file was moved together with the file of its rows, {rows_beside(dataset)}, but "
            f"still refers to {recorded_path(dataset)}. The same call of compute() sets this right and goes on."
        )


def rows_extent(dataset: h5py.Dataset) -> Extent | None:
    """Find where the rows of a dataset lie in a file of their own; None if they do not. Raises as `rows_beside`."""
    if not is_outside(dataset) or not plain_type(dataset):
        return None
    name = rows_beside(dataset)
    shape = tuple(int(n) for n in dataset.shape)
    return Extent(name, FileId.of(os.stat(name)), str(dataset.name), HEADER_BYTES, shape, dataset.dtype)


def note_owner(name: str, path: str) -> None:
    """Note in a file with rows which HDF5 file it belongs to; for one that was moved."""
    descriptor = open_sidecar(name, os.O_RDWR)
    try:
        about = {**(_header(descriptor) or {}), "inode": os.stat(path).st_ino}
        write_all(descriptor, (_MAGIC + json.dumps(about).encode()).ljust(HEADER_BYTES, b"\0"), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def owner_of(name: str) -> int | None:
    """Return the inode of the HDF5 file for which a file with rows was made; None if that is not known."""
    try:
        descriptor = open_sidecar(name, os.O_RDONLY)
    except OSError:
        return None
    try:
        about = _header(descriptor)
    finally:
        os.close(descriptor)
    return about.get("inode") if about is not None else None
