"""Failed positions in a results group: a table of errors beside the richer status, made where they are recorded::

    failed_positions    (max_failures,)        position, type and text of the error, a checksum of these

It is written before the status mask is set, so it may tell more than what counts: a row of the table counts if its
position is failed (see `lazyproc.hdf5.marks`) and its checksum is right. A position never has two such rows: what does
not count is cleared when the next run begins.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.failed import (
    DONE,
    ERROR_BYTES,
    FAILED,
    TEXT_BYTES,
    FailedPosition,
    encode_text,
)
from lazyproc.core.runs import Runs
from lazyproc.core.specs import FAILED_POSITIONS, POSITION_STATUS
from lazyproc.hdf5.create import create_contiguous
from lazyproc.hdf5.marks import checked, create_status, has_status, read_status, status_dataset

_PIECE = 2**20
_ROW = np.dtype(
    [
        ("position", "<i8"),
        ("error", h5py.string_dtype("utf-8", ERROR_BYTES)),
        ("text", h5py.string_dtype("utf-8", TEXT_BYTES)),
        ("checksum", "<u4"),
    ]
)
_CHECKED_BYTES = _ROW.fields["checksum"][1]  # type: ignore[index]
EMPTY_ROW = np.zeros(1, _ROW)
"""A row of the table that is not used."""


class Rows(Protocol):
    """A dataset as rows that can be read and written at any time."""

    def read(self, runs: Runs) -> NDArray[Any]:
        """Read runs of rows into one array."""

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Write rows from row `start` on."""

    def fill(self, runs: Runs, value: int) -> None:
        """Write the same value to all rows of some runs; for rows of one byte."""


def filled_pieces(runs: Runs, value: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Cut runs into pieces that take little memory: their first rows, and as many bytes of one value as they have."""
    longest = int((runs.stops - runs.starts).max()) if runs else 0
    values = np.full(min(_PIECE, longest), value, np.uint8)
    for start, stop in runs:
        for piece in range(start, stop, _PIECE):
            yield piece, values[: min(_PIECE, stop - piece)]


class DatasetRows:
    """Rows behind an open group; writable, where they are written.

    Parameters
    ----------
    group : h5py.Group
        The results group.
    name : str
        The dataset in it.
    """

    def __init__(self, group: h5py.Group, name: str) -> None:
        self._group = group
        self._name = name

    def read(self, runs: Runs) -> NDArray[Any]:
        """Read runs of rows into one array."""
        dataset = self._group[self._name]
        return np.concatenate([np.empty(0, dataset.dtype), *(dataset[start:stop] for start, stop in runs)])

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Write rows from row `start` on."""
        self._group[self._name][start : start + len(rows)] = rows

    def fill(self, runs: Runs, value: int) -> None:
        """Write the same value to all rows of some runs."""
        dataset = self._group[self._name]
        for start, stop in runs:
            dataset[start:stop] = np.uint8(value)


def create_failures(group: h5py.Group, mask_name: str, capacity: int) -> None:
    """Create what is missing of the two datasets; a table that is too small is replaced by a larger one.

    Parameters
    ----------
    group : h5py.Group
        The results group, writable, with its status mask.
    mask_name : str
        The name of the mask.
    capacity : int
        How many failed positions there shall be room for.
    """
    create_status(group, mask_name)
    rows = np.empty(0, _ROW)
    if FAILED_POSITIONS in group:
        rows = _table(group)[:]
        if len(rows) >= capacity:
            return
        del group[FAILED_POSITIONS]
    about = f"A row counts where {mask_name} is 1 and {POSITION_STATUS} is 2 at its position."
    table = create_contiguous(group, FAILED_POSITIONS, (capacity,), _ROW, {"description": about})
    table[: len(rows)] = rows
    for start in range(len(rows), capacity, _PIECE // _ROW.itemsize):
        table[start : start + _PIECE // _ROW.itemsize] = EMPTY_ROW  # HDF5 may place it where something was deleted


def has_failures(group: h5py.Group, mask_name: str) -> bool:
    """Tell whether failures of a results group are recorded.

    Raises
    ------
    ResultsError
        If the datasets are not what they should be.
    """
    if FAILED_POSITIONS not in group or not has_status(group, mask_name):
        return False
    _table(group)
    return True


def capacity_of(group: h5py.Group) -> int:
    """Return how many failed positions there is room for."""
    return int(_table(group).shape[0]) if FAILED_POSITIONS in group else 0


def count_failed(group: h5py.Group, mask_name: str) -> int:
    """Count the failed positions of a results group."""
    if FAILED_POSITIONS not in group or not has_status(group, mask_name):
        return 0
    pieces = _status_pieces(group, mask_name)
    return sum(int(np.count_nonzero(piece == FAILED)) for piece in pieces)


def positions_to_retry(group: h5py.Group, mask_name: str) -> Runs:
    """Return the positions whose status says failed: marked in the mask, or under way when a retry was killed."""
    if not has_status(group, mask_name):
        return Runs.empty()
    status = status_dataset(group, mask_name)
    pieces = (status[start : start + _PIECE] for start in range(0, status.shape[0], _PIECE))
    return Runs.from_mask_pieces(pieces, value=FAILED)


def read_failures(group: h5py.Group, mask_name: str) -> list[FailedPosition]:
    """Return the failed positions of a results group with their errors, in order.

    Raises
    ------
    ResultsError
        If the datasets are not what they should be.
    """
    if not has_failures(group, mask_name):
        return []
    rows = group[FAILED_POSITIONS][:]
    counting = counting_rows(rows, DatasetRows(group, mask_name), DatasetRows(group, POSITION_STATUS))
    texts = {int(row["position"]): (row["error"].decode(), row["text"].decode()) for row in rows[counting]}
    failed = Runs.from_mask_pieces(_status_pieces(group, mask_name), value=FAILED)
    unknown = ("", "")  # a row that was damaged: the position failed all the same
    return [FailedPosition(position, *texts.get(position, unknown)) for position in failed.positions().tolist()]


def counting_rows(rows: NDArray[Any], mask: Rows, status: Rows) -> NDArray[np.bool_]:
    """Tell which rows of the table count."""
    counting = np.zeros(len(rows), bool)
    for slot in np.flatnonzero(rows["checksum"]):
        counting[slot] = rows["checksum"][slot] == _checksum(rows[slot : slot + 1])
    positions = rows["position"][counting]
    runs = Runs.from_positions(positions)
    failed = (mask.read(runs) == DONE) & (status.read(runs) == FAILED)
    counting[counting] = failed[np.searchsorted(runs.positions(), positions)]
    return counting


def row_of(one: FailedPosition) -> NDArray[Any]:
    """Return a failed position as one row of the table."""
    row = np.zeros(1, _ROW)
    row["position"] = one.position
    row["error"] = encode_text(one.error, ERROR_BYTES)
    row["text"] = encode_text(one.text, TEXT_BYTES)
    row["checksum"] = _checksum(row)
    return row


def _checksum(row: NDArray[Any]) -> int:
    return zlib.crc32(row.tobytes()[:_CHECKED_BYTES]) or 1


def _status_pieces(group: h5py.Group, mask_name: str) -> Iterator[NDArray[np.uint8]]:
    n_positions = int(group[mask_name].shape[0])
    for start in range(0, n_positions, _PIECE):
        yield read_status(group, mask_name, start, start + _PIECE)


def _table(group: h5py.Group) -> h5py.Dataset:
    return checked(group, FAILED_POSITIONS, _ROW)
