"""The N-D form of results: which dimensions, which coordinates, and a grid of blocks whose rows lie together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.specs import ResolvedOutput
from lazyproc.hdf5.grid import Grid, nd_shape_and_axes

_BLOCK_BYTES = 16 * 2**20
_FEW_POSITIONS, _MANY_BLOCKS = 256, 4096

Coordinates = dict[str, tuple[tuple[str, ...], NDArray[Any], dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Axis:
    """Positions, or the values of one position, as dimensions.

    Attributes
    ----------
    dims : tuple of str
        Names in the order of the file.
    shape : tuple of int
        Sizes from the slowest dimension to the fastest: the axis is reshaped to this.
    axes : tuple of int
        Transposing by these brings the dimensions into the order of the file.
    coordinates : dict
        Name to dimensions, values and attributes.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    coordinates: Coordinates


def axis_of_grid(grid: Grid, flat_name: str, taken: Iterable[str]) -> Axis:
    """Turn a grid of a main dataset into dimensions.

    Parameters
    ----------
    grid : Grid
        Of the positions or of the columns.
    flat_name : str
        The one dimension of a grid that is not regular; its coordinates lie along it.
    taken : iterable of str
        Names that are used already.
    """
    used = set(taken)
    names = [_free(label, used) for label in grid.labels]
    units = [{"units": unit} for unit in grid.units]
    if not grid.is_regular:
        flat = _free(flat_name, used)
        columns: Coordinates = {
            name: ((flat,), np.asarray(values), dict(unit))
            for name, values, unit in zip(names, grid.coordinates, units, strict=True)
        }
        return Axis((flat,), (grid.length,), (0,), columns)
    shape, axes = nd_shape_and_axes(grid)
    dims = tuple(names)
    coordinates: Coordinates = {}
    for name, size, values, unit in zip(names, grid.sizes, grid.coordinates, units, strict=True):
        if len(values) == size:
            coordinates[name] = ((name,), np.asarray(values), dict(unit))
        else:  # its values depend on other dimensions, too: a coordinate over all of them, under another name
            whole = np.asarray(values).reshape(shape).transpose(axes)
            coordinates[_free(f"{name}_values", used)] = (dims, whole, dict(unit))
    return Axis(dims, shape, axes, coordinates)


def axis_of_output(output: ResolvedOutput, spectroscopic: Axis) -> Axis:
    """Turn the dimensions of an output into dimensions of the dataset, under the names as declared.

    Parameters
    ----------
    output : ResolvedOutput
        The output.
    spectroscopic : Axis
        The columns of the main dataset, for outputs that keep them.
    """
    if output.spec.shape_from_main:
        return spectroscopic
    dims = output.dims or ()
    names = tuple(dim.name for dim in dims)
    coordinates: Coordinates = {dim.name: ((dim.name,), np.asarray(dim.values), {"units": dim.units}) for dim in dims}
    return Axis(names, output.shape, tuple(range(len(names))), coordinates)


def name_apart(axes: Mapping[str, Axis], taken: Iterable[str]) -> list[Axis]:
    """Name the dimensions of outputs so that they can stand in one dataset.

    Equal dimensions of several outputs stay one dimension. A name that means different things, or that is taken, gets
    the output's name in front, for all outputs alike: what things are called does not depend on their order.

    Parameters
    ----------
    axes : mapping of str to Axis
        The dimensions of each output.
    taken : iterable of str
        Names in use.
    """
    used = set(taken)
    meanings: dict[str, set[Any]] = {}
    for axis in axes.values():
        for name, meaning in _meanings(axis).items():
            meanings.setdefault(name, set()).add(meaning)
    apart = {name for name, different in meanings.items() if len(different) > 1 or name in used}
    used |= meanings.keys()
    return [
        _renamed(axis, {name: _free(f"{output}_{name}", used) for name in _meanings(axis) if name in apart})
        for output, axis in axes.items()
    ]


def _meanings(axis: Axis) -> dict[str, Any]:
    """Return what the names of an axis stand for: sizes and values."""
    sizes = {dim: axis.shape[place] for dim, place in zip(axis.dims, axis.axes, strict=True)}
    meanings: dict[str, Any] = {dim: (size, None) for dim, size in sizes.items()}
    for name, (dims, values, attrs) in axis.coordinates.items():
        along = tuple((dim, sizes[dim]) for dim in dims)
        meanings[name] = (along, values.astype(np.complex128).tobytes(), str(attrs))  # NaN equals NaN as bytes
    return meanings


def _renamed(axis: Axis, names: Mapping[str, str]) -> Axis:
    coordinates: Coordinates = {
        names.get(name, name): (tuple(names.get(dim, dim) for dim in dims), values, attrs)
        for name, (dims, values, attrs) in axis.coordinates.items()
    }
    return Axis(tuple(names.get(dim, dim) for dim in axis.dims), axis.shape, axis.axes, coordinates)


def _free(name: str, used: set[str]) -> str:
    """Return the name, or one like it that is not used yet, and note it as used."""
    for number in itertools.count(1):
        candidate = name if number == 1 else f"{name}_{number}"
        if candidate not in used:
            used.add(candidate)
            return candidate
    raise AssertionError


@dataclass(frozen=True)
class BlockGrid:
    """Positions cut into blocks such that each is one run of rows and a rectangle of the N-D form at the same time.

    Travels with each task, so it holds a few numbers whatever the number of blocks.

    Attributes
    ----------
    shape : tuple of int
        Of the positions, from the slowest dimension to the fastest.
    steps : tuple of int
        Size of a block along each dimension; the last block along a dimension may be smaller.
    """

    shape: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the blocks along each dimension."""
        return tuple(
            tuple(min(step, size - start) for start in range(0, size, step))
            for size, step in zip(self.shape, self.steps, strict=True)
        )

    def span(self, block_id: Sequence[int]) -> tuple[int, int]:
        """Return the first row and the last row plus one of a block."""
        start = 0
        for size, step, number in zip(self.shape, self.steps, block_id, strict=True):
            start = start * size + number * step
        # Before the dimension that is cut all blocks are single, behind it all are whole: rows lie together.
        return start, start + math.prod(self.block_shape(block_id))

    def block_shape(self, block_id: Sequence[int]) -> tuple[int, ...]:
        """Return the N-D shape of a block."""
        return tuple(
            min(step, size - number * step) for size, step, number in zip(self.shape, self.steps, block_id, strict=True)
        )


def block_grid(shape: tuple[int, ...], most_positions: int) -> BlockGrid:
    """Cut positions of an N-D form into blocks of at most so many positions.

    Parameters
    ----------
    shape : tuple of int
        Sizes from the slowest dimension to the fastest.
    most_positions : int
        At least 1.

    Examples
    --------
    >>> block_grid((6, 10), 25).chunks
    ((2, 2, 2), (10,))
    """
    steps: list[int] = []
    for number, size in enumerate(shape):
        if any(step > 1 for step in steps):
            steps.append(size)  # an earlier dimension is cut: blocks are whole along this one
        else:
            steps.append(max(1, min(size, most_positions // math.prod(shape[number + 1 :]))))
    return BlockGrid(shape, tuple(steps))


def positions_per_view_block(row_bytes: int) -> int:
    """Return how many positions of a lazy view make a block of about 16 MiB."""
    return max(1, _BLOCK_BYTES // max(1, row_bytes))


def positions_to_compute(n_positions: int, chunk_rows: int) -> int:
    """Return how many positions a block may have that calls a function for each: one pixel is not to take minutes.

    More where there would be very many blocks, and where storage chunks, which are decoded as a whole, hold more.
    """
    return max(_FEW_POSITIONS, n_positions // _MANY_BLOCKS, chunk_rows)
