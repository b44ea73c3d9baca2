"""A main dataset that also tells its dimensions, as subclasses written for pyUSID expect of ``self.h5_main``."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ArgumentValueError
from lazyproc.hdf5.grid import Grid, nd_shape_and_axes, position_grid, spectroscopic_grid
from lazyproc.hdf5.usid import main_dataset, read_text


class MainDatasetHandle(h5py.Dataset):  # type: ignore[misc]
    """An open USID Main dataset with its dimensions; reads only.

    Parameters
    ----------
    dataset : h5py.Dataset
        The main dataset, open. The new handle shares its id, so it lives and dies with the same file.

    Attributes
    ----------
    h5_pos_inds, h5_pos_vals, h5_spec_inds, h5_spec_vals : h5py.Dataset
        The ancillary datasets.
    pos_dim_labels, spec_dim_labels, n_dim_labels : list of str
        Names of the dimensions, in the order of the file.
    pos_dim_sizes, spec_dim_sizes, n_dim_sizes : list of int
        Their sizes.
    pos_dim_descriptors, spec_dim_descriptors : list of str
        Names with units: ``"X (um)"``.
    data_descriptor : str
        Quantity and units: ``"Deflection (V)"``.

    Raises
    ------
    NotMainDatasetError
        If it is not a main dataset.

    Notes
    -----
    Sizes and values are read from the ancillary datasets when they are first asked for.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        super().__init__(dataset.id)
        about = main_dataset(dataset)
        self.h5_pos_inds, self.h5_pos_vals, self.h5_spec_inds, self.h5_spec_vals = about.handles
        self.pos_dim_labels = list(about.position.labels)
        self.spec_dim_labels = list(about.spectroscopic.labels)
        self.n_dim_labels = self.pos_dim_labels + self.spec_dim_labels
        self.pos_dim_descriptors = _descriptors(about.position.labels, about.position.units)
        self.spec_dim_descriptors = _descriptors(about.spectroscopic.labels, about.spectroscopic.units)
        self.data_descriptor = f"{about.quantity} ({about.units})"

    @cached_property
    def _positions(self) -> Grid:
        return position_grid(h5py.Dataset(self.id))

    @cached_property
    def _columns(self) -> Grid:
        return spectroscopic_grid(h5py.Dataset(self.id))

    @property
    def pos_dim_sizes(self) -> list[int]:
        """Sizes of the position dimensions."""
        return list(self._positions.sizes)

    @property
    def spec_dim_sizes(self) -> list[int]:
        """Sizes of the spectroscopic dimensions."""
        return list(self._columns.sizes)

    @property
    def n_dim_sizes(self) -> list[int]:
        """Sizes of all dimensions."""
        return self.pos_dim_sizes + self.spec_dim_sizes

    def get_pos_values(self, dim_name: str) -> NDArray[Any]:
        """Return the values along a position dimension; KeyError if there is none of that name."""
        return _values(self._positions, self.pos_dim_labels, dim_name)

    def get_spec_values(self, dim_name: str) -> NDArray[Any]:
        """Return the values along a spectroscopic dimension; KeyError if there is none of that name."""
        return _values(self._columns, self.spec_dim_labels, dim_name)

    def get_n_dim_form(self, as_scalar: bool = False, lazy: bool = False) -> Any:
        """Return the data in N-D form, dimensions in the order of the file; with `lazy` as a dask array.

        Raises
        ------
        ArgumentValueError
            If the grid is not full, so that there is no N-D form.
        """
        if as_scalar:
            raise ArgumentValueError("as_scalar: is not supported; convert the array that is returned.")
        positions, columns = nd_shape_and_axes(self._positions), nd_shape_and_axes(self._columns)
        shape = positions[0] + columns[0]
        axes = positions[1] + tuple(len(positions[0]) + axis for axis in columns[1])
        return self._flat(lazy).reshape(shape).transpose(axes)

    def _flat(self, lazy: bool) -> Any:
        if not lazy:
            return self[()]
        import dask.array

        return dask.array.from_array(h5py.Dataset(self.id), chunks=(self.chunks and "auto") or ("auto", -1))


def _descriptors(labels: tuple[str, ...], units: tuple[str, ...]) -> list[str]:
    return [f"{read_text(label)} ({read_text(unit)})" for label, unit in zip(labels, units, strict=True)]


def _values(grid: Grid, labels: list[str], dim_name: str) -> NDArray[Any]:
    if dim_name not in labels:
        raise KeyError(f"{dim_name!r}: there is no such dimension; the dimensions are {labels}.")
    dim = labels.index(dim_name)
    values = np.asarray(grid.coordinates[dim])
    if len(values) == grid.sizes[dim]:
        return values
    _, first = np.unique(values, return_index=True)
    return values[np.sort(first)]
