"""The N-D form of results: which dimensions, which coordinates, and a grid of blocks whose rows lie together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyproc.core.specs import ResolvedOutput
from lazyproc.hdf5.usid import Grid, nd_shape_and_axes

_BLOCK_BYTES = 16 * 2**20

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

    @property
    def size(self) -> int:
        """Rows of the flat axis."""
        return math.prod(self.shape)


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


def axis_of_output(output: ResolvedOutput, spectroscopic: Axis, shared: dict[str, Any], taken: set[str]) -> Axis:
    """Turn the dimensions of an output into dimensions of the dataset.

    Parameters
    ----------
    output : ResolvedOutput
        The output.
    spectroscopic : Axis
        The columns of the main dataset, for outputs that keep them.
    shared : dict
        Dimensions that were used already, by name: equal ones are shared. Is added to.
    taken : set of str
        Names in use. Is added to.
    """
    if output.spec.shape_from_main:
        return spectroscopic
    names: list[str] = []
    coordinates: Coordinates = {}
    for dim in output.dims or ():
        name = dim.name
        if shared.get(name, None) != dim:
            if name in taken:
                name = _free(f"{output.name}_{dim.name}", taken)
            shared[name] = dim
            taken.add(name)
        names.append(name)
        coordinates[name] = ((name,), np.asarray(dim.values), {"units": dim.units})
    return Axis(tuple(names), output.shape, tuple(range(len(names))), coordinates)


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

    Attributes
    ----------
    shape : tuple of int
        Of the positions, from the slowest dimension to the fastest.
    chunks : tuple of tuple of int
        Sizes of the chunks along each dimension.
    """

    shape: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]

    def span(self, block_id: Sequence[int]) -> tuple[int, int]:
        """Return the first row and the last row plus one of a block."""
        start, count = 0, 1
        for size, sizes, number in zip(self.shape, self.chunks, block_id, strict=True):
            start = start * size + sum(sizes[:number])
            count *= sizes[number]
        trailing = [sizes[number] for sizes, number in zip(self.chunks, block_id, strict=True)]
        # Behind the first dimension with chunks of more than one, all others are whole: rows lie together.
        assert _lie_together(trailing, self.shape)
        return start, start + count

    def block_shape(self, block_id: Sequence[int]) -> tuple[int, ...]:
        """Return the N-D shape of a block."""
        return tuple(sizes[number] for sizes, number in zip(self.chunks, block_id, strict=True))


def _lie_together(block: Sequence[int], shape: Sequence[int]) -> bool:
    partial = [number for number, (part, size) in enumerate(zip(block, shape, strict=True)) if part != size]
    return not partial or all(part == 1 for part in block[: partial[-1]])


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
    chunks: list[tuple[int, ...]] = []
    cut = False
    for number, size in enumerate(shape):
        trailing = math.prod(shape[number + 1 :])
        if cut:
            chunks.append((size,))
            continue
        most = most_positions // trailing
        if most >= 1:
            cut = True
            step = min(size, most)
        else:
            step = 1
        chunks.append(tuple(min(step, size - start) for start in range(0, size, step)))
    return BlockGrid(shape, tuple(chunks))


def positions_per_view_block(row_bytes: int) -> int:
    """Return how many positions of a lazy view make a block of about 16 MiB."""
    return max(1, _BLOCK_BYTES // max(1, row_bytes))
