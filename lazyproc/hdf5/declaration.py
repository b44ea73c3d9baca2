"""Compare what is stored of an output beside its values with its declaration: dimensions, units, fill value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ArgumentTypeError
from lazyproc.core.jsonform import show
from lazyproc.core.specs import ResolvedOutput
from lazyproc.hdf5.create import SINGLE_VALUE, index_along, spectroscopic_name
from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.usid import REFERENCES, read_text, read_texts


def declared_differences(dataset: h5py.Dataset, output: ResolvedOutput) -> Iterator[str]:
    """Tell in words how an output that lazyproc wrote was declared otherwise; its shape and dtype are the same.

    Parameters
    ----------
    dataset : h5py.Dataset
        The output in a results group.
    output : ResolvedOutput
        The declaration.
    """
    for name, wanted in (("quantity", output.quantity), ("units", output.units)):
        stored = read_text(attribute(dataset, name, ""))
        if stored != _as_stored(wanted):
            yield f"stored with the {name} {stored!r}, wanted {wanted!r}"
    fill_value = np.asarray(dataset.fillvalue, dataset.dtype)
    # of texts earlier versions have stored whatever memory held
    if output.dtype.kind != "S" and not _same_values(fill_value, output.fill_value):
        yield f"stored with the fill value {fill_value}, wanted {output.fill_value}"
    indices, values = (_referred(dataset, name) for name in REFERENCES[2:])
    if indices is None or values is None:
        return
    has_own = str(indices.name) == f"{dataset.parent.name}/{spectroscopic_name(output)}Indices"
    if not output.spec.shape_from_main:
        yield from _dimension_differences(indices, values, output)
    elif has_own:
        yield "stored with dimensions of its own, wanted with those of the main dataset"


def _dimension_differences(indices: h5py.Dataset, values: h5py.Dataset, output: ResolvedOutput) -> Iterator[str]:
    dims = output.dims or (SINGLE_VALUE,)
    for name, wanted in (("labels", [dim.name for dim in dims]), ("units", [dim.units for dim in dims])):
        stored = list(read_texts(attribute(values, name, "")))
        if stored != list(map(_as_stored, wanted)):
            yield f"stored with dimensions of the {name} {stored}, wanted {wanted}"
            return
    shape = (len(dims), output.width)
    if indices.shape != shape or values.shape != shape:
        yield f"stored with dimensions of the shape {values.shape}, wanted {shape}"
        return
    faster = output.width
    for row, dim in enumerate(dims):
        faster //= dim.size
        index = index_along(dim, output.width, faster)
        if not np.array_equal(indices[row], index) or not np.array_equal(values[row], dim.values[index]):
            told = _told(indices[row], values[row])
            yield f"stored with the dimension {dim.name!r} at {told}, wanted {show(dim.values)}"


def _told(indices: NDArray[Any], values: NDArray[Any]) -> str:
    """Show the values along a stored dimension, in their order."""
    return show(values[np.unique(indices, return_index=True)[1]])


def _referred(dataset: h5py.Dataset, name: str) -> h5py.Dataset | None:
    """Follow a reference; None where it leads to no dataset, which whoever opens the results is told."""
    try:
        item = dataset.file[attribute(dataset, name)]
    except (ArgumentTypeError, *H5_ERRORS):
        return None
    return item if isinstance(item, h5py.Dataset) else None


def _as_stored(text: str) -> str:
    """Return a text as it is read again: HDF5 pads with NUL, and has no lone surrogates."""
    return text.encode("utf-8", "replace").rstrip(b"\0").decode()


def _same_values(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if a.dtype.fields is not None:
        return all(_same_values(a[name], b[name]) for name in a.dtype.fields)
    return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
