"""What tells which positions of a results group are done: the status mask, and the richer status beside it.

Two datasets of one byte a position, contiguous and allocated at once like the results::

    completed_positions    0 not done, 1 done: the status mask, as pyUSID reads it
    position_status        0 not done, 1 done, 2 failed; 3 is kept free

The status is written, and durable, before the mask is set, so it may tell more than what counts. What counts: a
position is done where the mask is 1 and the status is not 0, failed where the mask is 1 and the status is 2. So a byte
of one of them that changes on the disk marks nothing. Results of older releases may have the mask alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ResultsError
from lazyproc.core.failed import DONE, FAILED, NOT_DONE, STATUS_MEANINGS
from lazyproc.core.specs import FAILED_POSITIONS, POSITION_STATUS
from lazyproc.hdf5.create import create_status_mask

PIECE = 2**21
"""Positions that are read at once."""


def create_status(group: h5py.Group, mask_name: str) -> None:
    """Create the richer status, if it is not there: it says of all positions what the mask says.

    Parameters
    ----------
    group : h5py.Group
        The results group, writable, with its status mask.
    mask_name : str
        The name of the mask.
    """
    if POSITION_STATUS in group:
        return
    mask = group[mask_name]
    attrs = {
        "flag_values": np.arange(len(STATUS_MEANINGS), dtype=np.uint8),
        "flag_meanings": " ".join(STATUS_MEANINGS),
    }
    status = create_status_mask(group, mask.shape[0], POSITION_STATUS, attrs)
    for start in range(0, mask.shape[0], PIECE):
        piece = mask[start : start + PIECE]
        if piece.any():
            status[start : start + PIECE] = piece


def has_status(group: h5py.Group, mask_name: str) -> bool:
    """Tell whether a results group has the richer status: one of lazyproc's, or beside its table of failures.

    Raises
    ------
    ResultsError
        If it is not what it should be.
    """
    if POSITION_STATUS not in group or mask_name not in group:
        return False
    if not _confirms(group) and FAILED_POSITIONS not in group:
        return False
    status_dataset(group, mask_name)
    return True


def status_dataset(group: h5py.Group, mask_name: str) -> h5py.Dataset:
    """Return the richer status; raises as `has_status` does."""
    return checked(group, POSITION_STATUS, np.dtype(np.uint8), group[mask_name].shape)


def read_status(group: h5py.Group, mask_name: str, start: int, stop: int) -> NDArray[np.uint8]:
    """Read what counts of positions: 0 not done, 1 done, 2 failed."""
    status: NDArray[np.uint8] = np.asarray(group[mask_name][start:stop] == DONE).astype(np.uint8)
    if POSITION_STATUS in group:
        richer = status_dataset(group, mask_name)[start:stop]
        if _confirms(group):
            status[richer == NOT_DONE] = NOT_DONE
        status[(status == DONE) & (richer == FAILED)] = FAILED
    return status


def done_pieces(
    group: h5py.Group, n_positions: int, mask_name: str, label: str, start: int = 0
) -> Iterator[NDArray[np.uint8]]:
    """Check a status mask and return piece by piece, from a position on, which positions count as done: 0 or 1.

    Parameters
    ----------
    group : h5py.Group
        The results group, with its mask.
    n_positions : int
        Positions that it must have.
    mask_name : str
        The name of the mask.
    label : str
        What messages call it.
    start : int, optional
        The first position.

    Raises
    ------
    ResultsError
        If the mask is no dataset of one byte a position, or holds anything but 0 and 1, or the status is not what it
        should be.
    """
    mask = group[mask_name]
    if not isinstance(mask, h5py.Dataset):
        raise ResultsError(f"{label}: the status mask is a {type(mask).__name__}; expected a dataset.")
    if mask.shape != (n_positions,) or mask.dtype != np.uint8:
        raise ResultsError(
            f"{label}: the status mask has the shape {mask.shape} and the dtype {mask.dtype}; expected "
            f"({n_positions},) and uint8, one byte a position. These results cannot be used: compute with "
            "override=True."
        )
    status = status_dataset(group, mask_name) if POSITION_STATUS in group and _confirms(group) else None
    return _done_pieces(mask, status, label, start)


def _done_pieces(
    mask: h5py.Dataset, status: h5py.Dataset | None, label: str, begin: int
) -> Iterator[NDArray[np.uint8]]:
    for start in range(begin, mask.shape[0], PIECE):
        piece = mask[start : start + PIECE]
        if piece.size and piece.max() > 1:
            raise ResultsError(f"{label}: the status mask holds {int(piece.max())}; expected only 0 and 1.")
        if status is not None and piece.any():
            piece &= status[start : start + PIECE] != NOT_DONE
        yield piece


def _confirms(group: h5py.Group) -> bool:
    """Tell whether the status belongs to a declared process of lazyproc: others may call anything by that name."""
    return "lazyproc_run_id" in group.attrs


def checked(group: h5py.Group, name: str, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None) -> h5py.Dataset:
    """Return a dataset with one row a position, or a row a failed position, if it is what it should be.

    Raises
    ------
    ResultsError
        If it is no dataset of that dtype and shape.
    """
    dataset = group[name]
    came = "a group"
    if isinstance(dataset, h5py.Dataset):
        if dataset.dtype == dtype and dataset.ndim == 1 and shape in (None, dataset.shape):
            return dataset
        came = f"a dataset of the shape {dataset.shape} and the dtype {dataset.dtype}"
    raise ResultsError(
        f"{group.name}/{name}: {came} came; expected a dataset of the shape {shape or '(n,)'} and the dtype {dtype}. "
        "It was changed by another program: compute with override=True."
    )
