"""Remove files with rows that nothing refers to: a death has left them, or their results were deleted.

One is removed only if it was made for this very HDF5 file, and none of its results groups refers to it. Whoever does
that holds the run's lock.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import h5py

from lazyproc.core.errors import LazyprocError
from lazyproc.hdf5.damage import walk
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.rows_file import RowsFiles, is_outside, owner_of, recorded_path, remove
from lazyproc.hdf5.sidecar import ROWS, sidecar

log = logging.getLogger("lazyproc")


def _of_file(path: str) -> list[str]:
    """Return the files with rows beside an HDF5 file that were made for it, and those cut off while they were made."""
    inode = os.stat(path).st_ino
    return [name for name in glob.glob(f"{glob.escape(sidecar(path, ROWS))}*") if owner_of(name) in (inode, None)]


def remove_leftovers(path: str, file: h5py.File | None = None) -> bool:
    """Remove what nothing refers to; the caller holds the run's lock.

    Parameters
    ----------
    path : str
        The HDF5 file; nothing that was cut off is pending in it.
    file : h5py.File, optional
        A handle of it. Default: it is opened for reading.

    Returns
    -------
    bool
        Whether anything was removed.
    """
    if not os.path.exists(path) or not (found := _of_file(path)):
        return False
    files = Files()
    try:
        used = _referred(files.open(path) if file is None else file)
    except (LazyprocError, *H5_ERRORS) as error:  # better one file too many
        log.debug("%s: %s", path, error)
        return False
    finally:
        files.close()
    left = [name for name in found if os.path.basename(name) not in used]
    remove(left)
    return bool(left)


@contextmanager
def rows_files(path: str | None, file: h5py.File | None) -> Iterator[RowsFiles | None]:
    """Give what makes files for rows; after an error those are removed that no group came to refer to.

    Parameters
    ----------
    path : str or None
        The HDF5 file; None where there is none on disk, and so nothing beside it.
    file : h5py.File or None
        As for `remove_leftovers`.
    """
    if path is None:
        yield None
        return
    try:
        yield RowsFiles(path)
    except BaseException:
        remove_leftovers(path, file)
        raise


def _referred(file: h5py.File) -> set[str]:
    """Return the names of the files with rows that datasets refer to."""
    used = set()
    for name, item in walk(file["/"]):
        if isinstance(item, Exception):
            raise LazyprocError(f"{name}: {item}")
        if isinstance(item, h5py.Dataset) and is_outside(item):
            used.add(os.path.basename(recorded_path(item)))
    return used


def remove_leftovers_locked(path: str) -> bool:
    """Do as `remove_leftovers`, for a caller who does not hold the run's lock; does nothing while a run goes on."""
    if not os.path.exists(path) or not _of_file(path):
        return False
    with suppress(LazyprocError), RunLock(path):
        return remove_leftovers(path)
    return False
