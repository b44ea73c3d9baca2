"""The grids that the rows and the columns of a main dataset lie on, found from its ancillary datasets.

The ancillary datasets are read in pieces, never as a whole. Nothing here writes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.errors import ArgumentValueError
from lazyproc.hdf5.usid import Texts, main_dataset

_AXES = ("position", "spectroscopic")
_PIECE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Grid:
    """The N-D form of one axis of a main dataset.

    Attributes
    ----------
    labels : tuple of str
        Names of the dimensions in the order of the file, made different from each other ("X", "X_2").
    units : tuple of str
        Their units.
    sizes : tuple of int
        How many different indices each dimension has.
    order : tuple of int
        Numbers of the dimensions from the slowest to the fastest; without meaning if the grid is not regular.
    is_regular : bool
        Every combination of indices occurs exactly once, in plain order: the axis may be reshaped to `shape`.
        False for sparse sampling, for interrupted scans, and for rows in disorder.
    coordinates : tuple of ndarray
        One a dimension, in the order of the file. Regular: its values `(size,)` in the order in which the axis runs
        through them; or, where they change with other dimensions, too, the full column `(length,)`, to be reshaped
        as the data are. Not regular: the full columns.
    length : int
        Positions, or columns, of the main dataset.
    """

    labels: Texts
    units: Texts
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    is_regular: bool
    coordinates: tuple[NDArray[Any], ...]
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes from the slowest dimension to the fastest."""
        return tuple(self.sizes[dim] for dim in self.order)


def nd_shape_and_axes(grid: Grid) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return `shape` and `axes` so that `array.reshape(shape).transpose(axes)` has the dimensions as in the file.

    Raises
    ------
    ArgumentValueError
        If the grid is not regular: a reshape would put values at wrong places.
    """
    if not grid.is_regular:
        raise ArgumentValueError(
            f"grid of {', '.join(grid.labels)}: the {grid.length} points do not form a full grid of {grid.sizes} in "
            "plain order, so there is no N-D form. Keep the axis flat, with the coordinates of each point."
        )
    return grid.shape, tuple(grid.order.index(dim) for dim in range(len(grid.order)))


def position_grid(h5_main: h5py.Dataset) -> Grid:
    """Read the grid of the positions of a main dataset; raises as `main_dataset`."""
    pair = main_dataset(h5_main).position
    return read_grid(pair.indices, pair.values, pair.labels, pair.units, "position")


def spectroscopic_grid(h5_main: h5py.Dataset) -> Grid:
    """Read the grid of the columns of a main dataset; raises as `main_dataset`."""
    pair = main_dataset(h5_main).spectroscopic
    return read_grid(pair.indices, pair.values, pair.labels, pair.units, "spectroscopic")


def read_grid(
    indices: h5py.Dataset, values: h5py.Dataset, labels: Iterable[str], units: Iterable[str], axis: str
) -> Grid:
    """Find the grid behind a pair of ancillary datasets.

    Parameters
    ----------
    indices, values : h5py.Dataset
        `(length, n_dims)` for positions, `(n_dims, length)` for columns. Indices need not start at 0, nor be
        contiguous, nor rise.
    labels, units : iterable of str
        Of the dimensions, in the order of the file.
    axis : str
        "position" or "spectroscopic".

    Raises
    ------
    ArgumentValueError
        If `axis` is neither.

    Notes
    -----
    A regular grid is known from three passes over small pieces; memory grows with `length` only if it is not regular,
    or where values depend on several dimensions.
    """
    if axis not in _AXES:
        raise ArgumentValueError(f"axis is {axis!r}; expected one of {_AXES}.")
    along = _AXES.index(axis)
    length = int(indices.shape[along])
    runs = _first_runs(indices, along)
    order = tuple(sorted(range(len(runs)), key=lambda dim: -runs[dim]))
    sizes = _regular_sizes(length, runs, order)
    if sizes is not None:
        steps = _steps(indices, along, runs, sizes)
        if any(step is None or len(np.unique(step)) < len(step) for step in steps):
            sizes = None
    if sizes is None:
        coordinates = _columns(values, along, range(len(runs)))
    else:
        known = _steps(values, along, runs, sizes)
        full = _columns(values, along, [dim for dim, step in enumerate(known) if step is None])
        coordinates = full | {dim: step for dim, step in enumerate(known) if step is not None}
    for column in coordinates.values():
        column.setflags(write=False)
    return Grid(
        _different(labels),
        tuple(units),
        tuple(sizes or _count_distinct(indices, along)),
        order,
        sizes is not None,
        tuple(coordinates[dim] for dim in range(len(runs))),
        length,
    )


def spans(dataset: h5py.Dataset, along: int) -> Iterator[tuple[int, int]]:
    """Yield first and last+1 of pieces of some MiB of a 2-D dataset, cut along an axis on the edges of its chunks."""
    length = int(dataset.shape[along])
    step = max(1, _PIECE_BYTES // max(1, int(dataset.shape[1 - along]) * dataset.dtype.itemsize))
    if dataset.chunks is not None:
        step = math.ceil(step / dataset.chunks[along]) * dataset.chunks[along]
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _pieces(dataset: h5py.Dataset, along: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield where a piece starts, and the piece `(n_dims, n)`."""
    for start, stop in spans(dataset, along):
        yield start, dataset[:, start:stop] if along else dataset[start:stop, :].T


def _first_runs(indices: h5py.Dataset, along: int) -> list[int]:
    """Return for each dimension how many points go by until its index first changes; all points if it never does."""
    n_dims, length = int(indices.shape[1 - along]), int(indices.shape[along])
    runs = [length] * n_dims
    first = None
    for start, piece in _pieces(indices, along):
        first = piece[:, :1].copy() if first is None else first
        for dim in range(n_dims):
            if runs[dim] == length:
                changed = piece[dim] != first[dim]
                if changed.any():
                    runs[dim] = start + int(changed.argmax())
        if max(runs) < length:
            break
    return runs


def _regular_sizes(length: int, runs: list[int], order: tuple[int, ...]) -> list[int] | None:
    """Return the only sizes that a regular grid with these first runs can have; None if there are none.

    In a regular grid an index stays for as many points as the faster dimensions have together.
    """
    sizes = [0] * len(runs)
    slower = length
    for dim in order:
        sizes[dim], rest = divmod(slower, runs[dim])
        if rest:
            return None
        slower = runs[dim]
    return sizes if slower == 1 else None


def _steps(dataset: h5py.Dataset, along: int, runs: list[int], sizes: list[int]) -> list[NDArray[Any] | None]:
    """Return for each dimension its value at each step `(size,)`; None where points of a step differ.

    Point `i` belongs to step `(i // run) % size` of a dimension.
    """
    steps: list[NDArray[Any] | None] = [np.empty(size, dataset.dtype) for size in sizes]
    for start, piece in _pieces(dataset, along):
        points = np.arange(start, start + piece.shape[1])
        for dim, (run, size) in enumerate(zip(runs, sizes, strict=True)):
            values = steps[dim]
            if values is None:
                continue
            step, within = np.divmod(points, run)
            opens = (step < size) & (within == 0)
            values[step[opens]] = piece[dim, opens]
            if not _equal(piece[dim], values[step % size]):
                steps[dim] = None
        if all(values is None for values in steps):
            break
    return steps


def _equal(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Compare exactly; NaN, a value that was not recorded, equals NaN."""
    differ = left != right
    return not differ.any() or bool(np.all((left != left) & (right != right), where=differ))


def _columns(dataset: h5py.Dataset, along: int, dims: Iterable[int]) -> dict[int, NDArray[Any]]:
    """Read the full columns of some dimensions, `(length,)` each."""
    columns = {dim: np.empty(int(dataset.shape[along]), dataset.dtype) for dim in dims}
    for start, piece in _pieces(dataset, along) if columns else ():
        for dim, column in columns.items():
            column[start : start + piece.shape[1]] = piece[dim]
    return columns


def _count_distinct(indices: h5py.Dataset, along: int) -> list[int]:
    """Count the different indices of each dimension."""
    n_dims = int(indices.shape[1 - along])
    merged = [np.empty(0, indices.dtype) for _ in range(n_dims)]
    pending: list[list[NDArray[Any]]] = [[] for _ in range(n_dims)]
    for _, piece in _pieces(indices, along):
        for dim in range(n_dims):
            pending[dim].append(np.unique(piece[dim]))
            # Merging only once as much is pending as is merged keeps the whole work near that of one sort.
            if sum(part.size for part in pending[dim]) >= merged[dim].size:
                merged[dim] = np.unique(np.concatenate([merged[dim], *pending[dim]]))
                pending[dim] = []
    return [np.unique(np.concatenate([whole, *parts])).size for whole, parts in zip(merged, pending, strict=True)]


def _different(labels: Iterable[str]) -> Texts:
    """Give repeated labels a number: "X", "X_2"."""
    labels = list(labels)
    taken = set(labels)
    result: list[str] = []
    for label in labels:
        if label in result:
            label = next(name for number in itertools.count(2) if (name := f"{label}_{number}") not in taken)
            taken.add(label)
        result.append(label)
    return tuple(result)
