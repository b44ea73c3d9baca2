"""Which bytes of an HDF5 file are raw data of its datasets; all others may be metadata.

HDF5 tells where raw data lie, not where its metadata do. So what no dataset claims counts as metadata: headers,
indices, heaps, unused space, and whatever is not understood.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.runs import Runs

Ranges = NDArray[np.int64]
"""Where bytes lie in a file, `(n_ranges, 2)`: starts and stops."""

log = logging.getLogger("lazyproc")


@dataclass(frozen=True)
class Rewritten:
    """Datasets that a change writes to.

    Attributes
    ----------
    addresses : frozenset of int
        Of their object headers. Their compressed chunks may be written again elsewhere, and the old place be used for
        something else.
    rows : Runs
        The rows that are written, in datasets of `n_rows` rows. In others it may be any.
    n_rows : int
        Rows of these datasets.
    """

    addresses: frozenset[int] = frozenset()
    rows: Runs = Runs.empty()  # noqa: RUF009
    n_rows: int = -1


class RawBytes:
    """Tells where the metadata of an open file are, and remembers where the raw data of its datasets lie.

    Notes
    -----
    Only what is written to is looked at anew: the raw data of other datasets stay where they are, as long as the one
    program that has the file open for writing does not delete them.
    """

    def __init__(self) -> None:
        self._known: dict[int, Ranges] = {}

    def forget(self) -> None:
        """Look at everything anew."""
        self._known = {}

    def metadata(self, file: h5py.File, size: int, rewritten: Rewritten) -> Ranges:
        """Return all ranges below `size` but those of raw data, as HDF5 sees them now."""
        claimed = self._claimed(file, rewritten)
        self._known = {address: raw for address, raw in claimed.items() if address not in rewritten.addresses}
        return _others(np.concatenate([_NONE, *claimed.values()]), int(file.userblock_size), size)

    def _claimed(self, file: h5py.File, rewritten: Rewritten) -> dict[int, Ranges]:
        claimed: dict[int, Ranges] = {}

        def visit(name: bytes, about: Any) -> None:
            if about.type != h5py.h5o.TYPE_DATASET:
                return
            raw = self._known.get(about.addr)
            if raw is None or about.addr in rewritten.addresses:
                again = rewritten if about.addr in rewritten.addresses else None
                raw = _raw_of(file, name, again)
            claimed[about.addr] = raw

        try:
            h5py.h5o.visit(file.id, visit, info=True)
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # something in the file is damaged
            log.debug("%s: not all datasets were found: %s", file.filename, error)
        return claimed


_NONE = np.empty((0, 2), np.int64)


def _raw_of(file: h5py.File, name: bytes, rewritten: Rewritten | None) -> Ranges:
    """Return where the raw data of a dataset lie; nothing if it is not known, or if they refer to a heap."""
    try:
        dataset = h5py.h5o.open(file.id, name)
        if dataset.dtype.hasobject:
            return _NONE
        creation = dataset.get_create_plist()
        layout = creation.get_layout()
        if layout == h5py.h5d.CONTIGUOUS and creation.get_external_count() == 0:
            offset = dataset.get_offset()
            return _NONE if offset is None else np.array([[offset, offset + dataset.get_storage_size()]], np.int64)
        if layout == h5py.h5d.CHUNKED:
            return _chunks(dataset, creation, rewritten, int(file.userblock_size))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.debug("%s: the raw data of %r were not found: %s", file.filename, name, error)
    return _NONE


def _chunks(dataset: Any, creation: Any, rewritten: Rewritten | None, userblock: int) -> Ranges:
    """Return where chunks lie, but for compressed ones that are written again."""
    found: list[tuple[int, int, int]] = []

    def take(chunk: Any) -> None:
        found.append((chunk.chunk_offset[0], chunk.byte_offset, chunk.byte_offset + chunk.size))

    if hasattr(dataset, "chunk_iter"):
        dataset.chunk_iter(take)
    else:
        for number in range(dataset.get_num_chunks()):
            take(dataset.get_chunk_info(number))
    chunks = np.array(found, np.int64).reshape(-1, 3)
    if rewritten is not None and creation.get_nfilters() > 0:
        if dataset.shape[0] != rewritten.n_rows:
            return _NONE
        chunks = chunks[~_meet(rewritten.rows, chunks[:, 0], creation.get_chunk()[0])]
    # Releases of HDF5 differ in whether a chunk's place counts from the file's begin or from the end of its userblock:
    # only what both mean is claimed.
    chunks[:, 1] += userblock
    return chunks[:, 1:]


def _meet(rows: Runs, starts: NDArray[np.int64], n_rows: int) -> NDArray[np.bool_]:
    """Tell which chunks of `n_rows` rows, by their first rows, hold any of the rows."""
    before = np.searchsorted(rows.starts, starts + n_rows)  # runs that begin before the chunk's end
    last_stops = np.concatenate([[0], rows.stops])[before]
    return np.asarray(last_stops > starts)


def _others(raw: Ranges, begin: int, size: int) -> Ranges:
    """Return the ranges from `begin` to `size` that are not raw."""
    raw = np.clip(raw[np.argsort(raw[:, 0], kind="stable")], begin, size)
    raw = raw[raw[:, 1] > raw[:, 0]]
    reach = np.maximum.accumulate(raw[:, 1])
    first = np.ones(len(raw), bool)
    first[1:] = raw[1:, 0] > reach[:-1]
    last = np.roll(first, -1)
    others = np.stack([np.append(begin, reach[last]), np.append(raw[first, 0], size)], axis=1)
    return others[others[:, 1] > others[:, 0]]
