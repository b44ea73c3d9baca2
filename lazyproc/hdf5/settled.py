"""Whether writing rows of a dataset changes nothing of the file's structure, and making it so."""

from __future__ import annotations

from typing import Any

import h5py

from lazyproc.hdf5.create import LARGEST_FILLED
from lazyproc.hdf5.damage import walk


def datasets_below(item: Any) -> list[h5py.Dataset]:
    """Return the datasets in a group and in all below it, or the dataset itself; none of what is closed."""
    if not item:
        return []
    if isinstance(item, h5py.Dataset):
        return [item]
    return [one for _, one in walk(item) if isinstance(one, h5py.Dataset)]


def is_settled(dataset: h5py.Dataset) -> bool:
    """Tell whether the dataset is plain bytes that have their place in the file."""
    creation = dataset.id.get_create_plist()
    return (
        creation.get_layout() == h5py.h5d.CONTIGUOUS
        and not dataset.dtype.hasobject
        and (not dataset.size or creation.get_external_count() > 0 or dataset.id.get_offset() is not None)
    )


def allocate(dataset: h5py.Dataset) -> None:
    """Give a contiguous dataset its place in the file, which HDF5 else does at the first write.

    Notes
    -----
    Nothing is done where this would write much: a fill value of the user's into many bytes. What is read does not
    change. The caller guards the file.
    """
    creation = dataset.id.get_create_plist()
    if is_settled(dataset) or creation.get_layout() != h5py.h5d.CONTIGUOUS or dataset.dtype.hasobject:
        return
    fills = creation.fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED
    if fills and dataset.nbytes > LARGEST_FILLED:
        return
    first = (0,) * dataset.ndim
    dataset[first] = dataset[first]
