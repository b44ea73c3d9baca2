"""Failed positions in a results group: the richer status beside the mask, and a table of errors.

Two datasets, made only where failures are recorded, contiguous and allocated at once like the results::

    position_status     uint8 (n_positions,)   0 not done, 1 done, 2 failed; 3 is kept free
    failed_positions    (max_failures,)        position, type and text of the error, a checksum of these

Both are written before the status mask is set, so they may tell more than what counts. What counts: a position is
failed where the mask is 1 and the status is 2, and a row of the table counts if its position is failed and its checksum
is right. A position never has two such rows: what does not count is cleared when the next run begins.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ResultsError
from lazyproc.core.failed import (
    DONE,
    ERROR_BYTES,
    FAILED,
    STATUS_MEANINGS,
    TEXT_BYTES,
    FailedPosition,
    encode_text,
)
from lazyproc.core.runs import Runs
from lazyproc.core.specs import FAILED_POSITIONS, POSITION_STATUS
from lazyproc.hdf5.create import create_contiguous

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


class DatasetRows:
    """Rows behind an open, writable group.

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
    mask = group[mask_name]
    if POSITION_STATUS not in group:
        attrs = {
            "flag_values": np.arange(len(STATUS_MEANINGS), dtype=np.uint8),
            "flag_meanings": " ".join(STATUS_MEANINGS),
        }
        status = create_contiguous(group, POSITION_STATUS, mask.shape, np.dtype(np.uint8), attrs, np.uint8(0))
        for start in range(0, mask.shape[0], _PIECE):
            status[start : start + _PIECE] = mask[start : start + _PIECE]
    rows = np.empty(0, _ROW)
    if FAILED_POSITIONS in group:
        rows = _checked(group, FAILED_POSITIONS)[:]
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
    if POSITION_STATUS not in group or FAILED_POSITIONS not in group or mask_name not in group:
        return False
    _checked(group, POSITION_STATUS, group[mask_name].shape)
    _checked(group, FAILED_POSITIONS)
    return True


def capacity_of(group: h5py.Group) -> int:
    """Return how many failed positions there is room for."""
    return int(_checked(group, FAILED_POSITIONS).shape[0]) if FAILED_POSITIONS in group else 0


def read_status(group: h5py.Group, mask_name: str, start: int, stop: int) -> NDArray[np.uint8]:
    """Read the status of positions: 0 not done, 1 done, 2 failed; without recorded failures that is the mask."""
    mask = group[mask_name]
    done = np.asarray(mask[start:stop] == DONE)
    status = done.astype(np.uint8)
    if POSITION_STATUS in group:
        status[done & (_checked(group, POSITION_STATUS, mask.shape)[start:stop] == FAILED)] = FAILED
    return status


def count_failed(group: h5py.Group, mask_name: str) -> int:
    """Count the failed positions of a results group."""
    if POSITION_STATUS not in group or mask_name not in group:
        return 0
    pieces = _status_pieces(group, mask_name)
    return sum(int(np.count_nonzero(piece == FAILED)) for piece in pieces)


def positions_to_retry(group: h5py.Group, mask_name: str) -> Runs:
    """Return the positions whose status says failed: marked in the mask, or under way when a retry was killed."""
    if POSITION_STATUS not in group or mask_name not in group:
        return Runs.empty()
    status = _checked(group, POSITION_STATUS, group[mask_name].shape)
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


def _checked(group: h5py.Group, name: str, shape: tuple[int, ...] | None = None) -> h5py.Dataset:
    """Return one of the two datasets, if it is what it should be."""
    dataset = group[name]
    dtype = _ROW if name == FAILED_POSITIONS else np.dtype(np.uint8)
    came = "a group"
    if isinstance(dataset, h5py.Dataset):
        if dataset.dtype == dtype and dataset.ndim == 1 and shape in (None, dataset.shape):
            return dataset
        came = f"a dataset of the shape {dataset.shape} and the dtype {dataset.dtype}"
    raise ResultsError(
        f"{group.name}/{name}: {came} came; expected a dataset of the shape {shape or '(n,)'} and the dtype {dtype}. "
        "It was changed by another program: compute with override=True."
    )
