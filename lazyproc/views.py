"""Lazy N-D views: dask arrays whose blocks read what is committed and compute the rest. They commit nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc.core.blocks import Block, BlockPlan
from lazyproc.core.errors import StaleViewError
from lazyproc.core.failed import DONE, FAILED, NOT_DONE, FailedRows
from lazyproc.core.no_result import NoResult
from lazyproc.core.runs import Runs
from lazyproc.core.specs import FAILED_POSITIONS, Output, ResolvedOutput
from lazyproc.engine.block_function import failure_of
from lazyproc.engine.kernel import Kernel
from lazyproc.engine.packing import pack, unpack
from lazyproc.hdf5.damage import reading
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.marks import read_status
from lazyproc.hdf5.rows_file import check_readable
from lazyproc.hdf5.source import Source
from lazyproc.hdf5.steady import read_steadily
from lazyproc.hdf5.usid import text_attribute
from lazyproc.layout import Axis, BlockGrid, block_grid, positions_per_view_block

if TYPE_CHECKING:
    import dask.array

Arrays = tuple[NDArray[Any], ...]

STATUS_OUTPUT = Output("u1", quantity="status", units="", fill_value=NOT_DONE).resolve("status", 1)
"""The status of a position, as if it were an output."""


@dataclass(frozen=True, eq=False)
class Committed:
    """Results in a file, as a view reads them. Travels, unless it holds a handle.

    Attributes
    ----------
    path : str or None
        The file; opened afresh for each block.
    handle : h5py.Group or None
        The results group, where there is no file on disk behind it.
    name : str
        The results group.
    run_id : str
        Its identity: another group under the same name is refused.
    outputs : tuple of ResolvedOutput
        The datasets.
    status_name : str
        The name of the status mask; empty if there is none.
    n_done : int or None
        The first so many positions count as done where there is no status mask; None: all of them.
    """

    path: str | None
    handle: h5py.Group | None
    name: str
    run_id: str
    outputs: tuple[ResolvedOutput, ...]
    status_name: str
    n_done: int | None = None

    def read(self, start: int, stop: int) -> tuple[Arrays, NDArray[np.uint8]]:
        """Read rows of all outputs, and their status: 0 not done, 1 done, 2 failed.

        Raises
        ------
        StaleViewError
            If the results are gone, or others stand in their place.
        ResultsError
            If they are damaged.
        """
        # They may just have been compressed, or others begun: then some of what was read belongs to the state before.
        return read_steadily(self.path, lambda: self._read(start, stop))

    def _read(self, start: int, stop: int) -> tuple[Arrays, NDArray[np.uint8]]:
        with self._opened() as group:
            status = self._status(group, start, stop)
            while True:
                arrays = tuple(self._rows(group, output, start, stop, status != NOT_DONE) for output in self.outputs)
                if FAILED_POSITIONS not in group:
                    return arrays, status
                # Failed positions may be taken back, and computed again, while their rows are read.
                before, status = status, self._status(group, start, stop)
                if not ((before != NOT_DONE) & (status != before)).any():
                    return arrays, before

    def read_status(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Read the status alone; raises as `read` does."""

        def once() -> NDArray[np.uint8]:
            with self._opened() as group:
                return self._status(group, start, stop)

        return read_steadily(self.path, once)

    @contextmanager
    def _opened(self) -> Iterator[h5py.Group]:
        files = Files()
        try:
            with reading(f"{self.path or 'the file'}::{self.name}"):
                yield self._open(files)
        finally:
            files.close()

    def _open(self, files: Files) -> h5py.Group:
        if self.path is None:
            # By its name, too: what was deleted lives on behind a handle.
            group: Any = self.handle.file.get(self.name) if self.handle else None
        else:
            try:
                group = files.open(self.path).get(self.name)
            except FileNotFoundError as error:
                raise StaleViewError(f"{self.path}: the file of this view is gone.") from error
        if not isinstance(group, h5py.Group) or group_id(group) != self.run_id:
            raise StaleViewError(
                f"{self.path or 'the file'}::{self.name}: this view was made from results that are no longer there, or "
                "that others have replaced. Open the results again."
            )
        return group

    def _status(self, group: h5py.Group, start: int, stop: int) -> NDArray[np.uint8]:
        if not self.status_name:
            is_done = np.arange(start, stop) < (stop if self.n_done is None else self.n_done)
            return np.where(is_done, np.uint8(DONE), np.uint8(NOT_DONE))
        return read_status(group, self.status_name, start, stop)

    def _rows(
        self, group: h5py.Group, output: ResolvedOutput, start: int, stop: int, done: NDArray[np.bool_]
    ) -> NDArray[Any]:
        """Read the rows that are done; the others are the fill value, whatever lies in the file."""
        check_readable(group[output.name])
        if done.all():
            return np.asarray(group[output.name][start:stop])
        rows = np.empty((stop - start, output.width), output.dtype)
        rows[...] = output.fill_value
        for first, last in Runs.from_mask(done, value=1):
            rows[first:last] = group[output.name][start + first : start + last]
        return rows


def group_id(group: h5py.Group) -> str:
    """Return what tells a results group from another one of the same name."""
    return text_attribute(group, "lazyproc_run_id" if "lazyproc_run_id" in group.attrs else "timestamp")


@dataclass(frozen=True, eq=False)
class BlockView:
    """Gives the results of any block: reads what is committed, computes the rest.

    Attributes
    ----------
    grid : BlockGrid
        The blocks.
    outputs : tuple of ResolvedOutput
        The results.
    committed : Committed or None
        What is in the file already.
    kernel : Kernel, bytes or None
        How to compute the rest; None leaves the fill value. Packed once it has travelled.
    label : str
        The process and the main dataset, for messages.
    """

    grid: BlockGrid
    outputs: tuple[ResolvedOutput, ...]
    committed: Committed | None
    kernel: Kernel | bytes | None
    label: tuple[str, str] = ("", "")

    def __reduce__(self) -> tuple[Any, ...]:
        # As in a run, the function travels in a form that workers can load wherever it was defined.
        kernel = pack(self.kernel) if isinstance(self.kernel, Kernel) else self.kernel
        return BlockView, (self.grid, self.outputs, self.committed, kernel, self.label)

    @property
    def arrays(self) -> tuple[ResolvedOutput, ...]:
        """What a block holds: the outputs, and the status of each position."""
        return (*self.outputs, STATUS_OUTPUT)

    def __call__(self, block_id: Sequence[int]) -> NDArray[Any]:
        """Return one element, in as many dimensions as the positions have, that holds the arrays of all outputs."""
        start, stop = self.grid.span(block_id)
        element = np.empty((1,) * len(self.grid.shape), object)
        element.flat[0] = self._arrays(start, stop)
        return element

    def _arrays(self, start: int, stop: int) -> Arrays:
        if self.committed is None:
            arrays, status = self._compute(Runs.from_spans([(start, stop)]))
            return (*arrays, status)
        arrays, status = self.committed.read(start, stop)
        if self.kernel is None or status.all():
            return (*arrays, status)
        missing = Runs.from_mask(status, value=NOT_DONE, offset=start)
        rows = missing.positions() - start
        computed, status[rows] = self._compute(missing)
        for array, values in zip(arrays, computed, strict=True):
            array[rows] = values
        return (*arrays, status)

    def _compute(self, runs: Runs) -> tuple[Arrays, NDArray[np.uint8]]:
        """Compute positions, and tell which of them have failed, where that is to be recorded; else it raises."""
        assert self.kernel is not None
        kernel = unpack(self.kernel) if isinstance(self.kernel, bytes) else self.kernel
        block = Block.of(runs)
        failed = None if kernel.max_failures is None else FailedRows(kernel.source.rows, runs)
        status = np.full(runs.n_positions, DONE, np.uint8)
        try:
            arrays = kernel.compute(kernel.source.rows(block.runs()), failed)
        except NoResult as error:
            failure = failure_of(error, block)
        else:
            if failed is not None:
                status[[one.position for one in failed.rows]] = FAILED
            return arrays, status
        failure.raise_error(*self.label)


@dataclass(frozen=True, eq=False)
class StatusView:
    """Gives the status of the positions of any block, as far as it is committed.

    Attributes
    ----------
    grid : BlockGrid
        The blocks.
    committed : Committed
        What is in the file.
    """

    grid: BlockGrid
    committed: Committed

    @property
    def arrays(self) -> tuple[ResolvedOutput, ...]:
        """What a block holds."""
        return (STATUS_OUTPUT,)

    def __call__(self, block_id: Sequence[int]) -> NDArray[Any]:
        """Return one element, as `BlockView` does, that holds the status alone."""
        element = np.empty((1,) * len(self.grid.shape), object)
        element.flat[0] = (self.committed.read_status(*self.grid.span(block_id)),)
        return element


@dataclass(frozen=True, eq=False)
class _Pick:
    """Takes one output out of a block and gives it its N-D shape."""

    number: int
    grid: BlockGrid
    inner: tuple[int, ...]

    def __call__(self, block: NDArray[Any], block_id: Sequence[int]) -> NDArray[Any]:
        array: NDArray[Any] = block.flat[0][self.number]
        n_dims = len(self.grid.shape)
        return array.reshape(self.grid.block_shape(block_id[:n_dims]) + self.inner)


def lazy_arrays(
    view: BlockView | StatusView, positions: Axis, inner: Sequence[Axis], name: str
) -> list[dask.array.Array]:
    """Make one dask array for each that the blocks hold, with the dimensions in the order of the file.

    Parameters
    ----------
    view : BlockView or StatusView
        Gives the blocks; computed together, the outputs share one call of the function a position.
    positions : Axis
        The dimensions of the positions.
    inner : sequence of Axis
        The dimensions of each one's result.
    name : str
        What the tasks are called.
    """
    import dask.array as da
    from dask.base import tokenize

    grid = view.grid
    n_dims = len(grid.shape)
    token = tokenize(id(view), name, np.random.default_rng().bytes(8))
    blocks = da.map_blocks(
        view,
        chunks=tuple((1,) * len(sizes) for sizes in grid.chunks),
        dtype=object,
        meta=np.empty((0,) * n_dims, object),
        name=f"{name}-{token}",
    )
    arrays = []
    for number, (output, axis) in enumerate(zip(view.arrays, inner, strict=True)):
        new = list(range(n_dims, n_dims + len(axis.shape)))
        picked = da.map_blocks(
            _Pick(number, grid, axis.shape),
            blocks,
            chunks=grid.chunks + tuple((size,) for size in axis.shape),
            new_axis=new or None,
            dtype=output.dtype,
            meta=np.empty((0,) * (n_dims + len(axis.shape)), output.dtype),
            name=f"{output.name}-{tokenize(token, number)}",
        )
        order = positions.axes + tuple(n_dims + axis_number for axis_number in axis.axes)
        arrays.append(picked if order == tuple(range(len(order))) else picked.transpose(order))
    return arrays


@dataclass(frozen=True, eq=False)
class _Rows:
    """Reads one block of rows of a main dataset."""

    source: Source
    grid: BlockGrid

    def __call__(self, block_id: Sequence[int]) -> NDArray[Any]:
        return self.source.rows([self.grid.span(block_id[:1])])


@dataclass(frozen=True, eq=False)
class _ChosenRows:
    """Reads one block of chosen rows of a main dataset."""

    source: Source
    blocks: tuple[Block, ...]

    def __call__(self, block_id: Sequence[int]) -> NDArray[Any]:
        return self.source.rows(self.blocks[block_id[0]].runs())


def lazy_rows(source: Source, name: str, positions: Runs | None = None) -> dask.array.Array:
    """Make a dask array `(n_positions, n_spectral)` of a main dataset, with whole spectra in each chunk.

    Parameters
    ----------
    source : Source
        How its positions are read.
    name : str
        What the tasks are called.
    positions : Runs, optional
        Which of them. Default: all.
    """
    import dask.array as da
    from dask.base import tokenize

    n_positions, n_spectral = source.shape
    most = positions_per_view_block(n_spectral * source.dtype.itemsize)
    most = min(n_positions, max(1, most // source.chunk_rows) * source.chunk_rows)
    rows: _Rows | _ChosenRows
    if positions is None:
        grid = block_grid((n_positions,), most)
        rows, chunks = _Rows(source, grid), grid.chunks[0]
    else:
        blocks = tuple(BlockPlan(positions, most, align=min(source.chunk_rows, n_positions)))
        rows, chunks = _ChosenRows(source, blocks), tuple(block.n_positions for block in blocks)
    return da.map_blocks(
        rows,
        chunks=(chunks, (n_spectral,)),
        dtype=source.dtype,
        meta=np.empty((0, 0), source.dtype),
        name=f"{name}-rows-{tokenize(np.random.default_rng().bytes(8))}",
    )
