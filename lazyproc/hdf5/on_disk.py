"""What an open handle stands for on the disk: which file, and where in it the rows of a contiguous dataset lie.

`find_extent` checks the driver, the signature, the inode and the type, since raw bytes are right only for a plain file.
"""

from __future__ import annotations

import os

import h5py

from lazyproc.hdf5.extents import Extent
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.superblock import SIGNATURE


def find_extent(dataset: h5py.Dataset, path: str | None = None) -> Extent | None:
    """Find where the rows of a dataset lie, or None if raw reading and writing would not be the same as HDF5's.

    Parameters
    ----------
    dataset : h5py.Dataset
        Any dataset of one or two dimensions.
    path : str, optional
        The file behind the handle, where lazyproc opened it as a Python file object itself.

    Notes
    -----
    The offset that HDF5 tells looks right for drivers, too, that have no file on disk (`core`, `family`, a Python file
    object of somebody else), hence the checks.
    """
    if path is None:
        path = real_path(dataset.file)
    if path is None or not _plain_layout(dataset) or not plain_type(dataset):
        return None
    offset = dataset.id.get_offset()
    if offset is None:
        return None
    with open(path, "rb") as file:
        file.seek(dataset.file.userblock_size)
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return None
        status = os.fstat(file.fileno())
    shape = tuple(int(n) for n in dataset.shape)
    return Extent(os.path.abspath(path), FileId.of(status), str(dataset.name), int(offset), shape, dataset.dtype)


def real_path(file: h5py.File) -> str | None:
    """Return the file's path if the handle is a plain one of just this file on disk."""
    if file.driver != "sec2":
        return None
    path = os.path.abspath(file.filename)
    try:
        same = os.path.samestat(os.fstat(file.id.get_vfd_handle()), os.stat(path))
    except (OSError, RuntimeError, NotImplementedError):
        return None
    return path if same else None


def _plain_layout(dataset: h5py.Dataset) -> bool:
    creation = dataset.id.get_create_plist()
    return (
        dataset.ndim in (1, 2)
        and creation.get_layout() == h5py.h5d.CONTIGUOUS
        and creation.get_external_count() == 0
        and creation.get_nfilters() == 0
    )


def plain_type(dataset: h5py.Dataset) -> bool:
    """Tell whether the bytes on disk are those that NumPy has in memory for the dataset's dtype."""
    dtype = dataset.dtype
    if dtype.hasobject:
        return False
    stored = dataset.id.get_type()
    try:
        return bool(stored.get_size() == dtype.itemsize and stored == h5py.h5t.py_create(dtype, logical=True))
    except TypeError:
        return False
