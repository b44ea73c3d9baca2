"""Put a dataset of other storage in the place of one: the same name, type, shape, attributes and fill value."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from lazyproc.core.compression import Compression, chunk_shape
from lazyproc.hdf5.create import set_fill_value
from lazyproc.hdf5.rows_file import HEADER_BYTES, MARK


def compressed_layout(dataset: h5py.Dataset, filters: Compression) -> Any:
    """Return the creation properties of the compressed form of a dataset, chunks included."""
    creation = _fresh(dataset)
    creation.set_chunk(chunk_shape(int(dataset.shape[0]), int(dataset.shape[1]), dataset.dtype.itemsize))
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # every chunk is written
    if filters.shuffle:
        creation.set_shuffle()
    creation.set_deflate(filters.level)
    return creation


def external_layout(dataset: h5py.Dataset, rows: str) -> Any:
    """Return the creation properties of a dataset whose rows lie in the file `rows`."""
    creation = _fresh(dataset)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_external(os.fsencode(rows), HEADER_BYTES, int(dataset.id.get_storage_size()))
    return creation


def _fresh(dataset: h5py.Dataset) -> Any:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    set_fill_value(creation, dataset.fillvalue, dataset.dtype)
    return creation


def replaced(dataset: h5py.Dataset, creation: Any, fill: Callable[[h5py.Dataset], None], *, marked: bool) -> None:
    """Make a dataset of the given properties, let it be filled, and then give it the name of the other one.

    Parameters
    ----------
    dataset : h5py.Dataset
        The one to be replaced, in a file that is open for changes.
    creation : h5py.h5p.PropDCID
        The storage of the new one.
    fill : callable
        Writes its values.
    marked : bool
        Whether the new one is still to be compressed.
    """
    group, name = dataset.parent, str(dataset.name).rpartition("/")[2]
    made = h5py.Dataset(h5py.h5d.create(group.id, None, dataset.id.get_type(), dataset.id.get_space(), creation))
    fill(made)
    for key in dataset.attrs:
        if marked or key != MARK:
            _copy_attribute(dataset, made, key)
    del group[name]
    group[name] = made


def _copy_attribute(source: h5py.Dataset, target: h5py.Dataset, name: str) -> None:
    """Copy an attribute of any type as it is stored."""
    attribute = source.attrs.get_id(name)
    made = h5py.h5a.create(target.id, name.encode(), attribute.get_type(), attribute.get_space())
    values = np.zeros(attribute.shape, attribute.dtype)
    attribute.read(values)
    made.write(values)
