"""What a process gives for each position: `Output` and `Dimension`, and their shapes once the main dataset is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazyproc.core.compression import Compression
from lazyproc.core.errors import ArgumentValueError, DefinitionError

STATUS_MASK = "completed_positions"
"""Name of the status mask, a dataset of 0 and 1 in the results group (pyUSID's convention)."""

POSITION_STATUS, FAILED_POSITIONS = "position_status", "failed_positions"
"""Names of the richer status, and of the table of errors where failures are recorded."""

_RESERVED_NAMES = (
    STATUS_MASK,
    POSITION_STATUS,
    FAILED_POSITIONS,
    "Position_Indices",
    "Position_Values",
    "Spectroscopic_Indices",
    "Spectroscopic_Values",
)


def check_status_name(name: str) -> str:
    """Return the name of the status mask.

    Raises
    ------
    ArgumentValueError
        If results have something else of that name.
    """
    if name in (POSITION_STATUS, FAILED_POSITIONS):
        raise ArgumentValueError(
            f"_status_dset_name: {name!r} came; expected another name, since results have a dataset of their own of "
            f"that name beside the status mask. The usual one is {STATUS_MASK!r}."
        )
    return name


@dataclass(frozen=True, eq=False)
class Dimension:
    """One dimension of an output.

    Parameters
    ----------
    name : str
        What varies along it, for instance ``"Frequency"``.
    units : str
        Its units, for instance ``"Hz"``.
    values : int or sequence of float
        The values along it, or how many there are (then they are 0, 1, 2 …).

    Raises
    ------
    DefinitionError
        If the name is empty, there are no values, or they are not finite numbers in one row.

    Examples
    --------
    >>> Dimension("Parameter", "a.u.", 4).values
    array([0., 1., 2., 3.])
    """

    name: str
    units: str
    values: NDArray[np.float64]

    def __init__(self, name: str, units: str, values: int | Sequence[float] | NDArray[Any]) -> None:
        if not isinstance(name, str) or not name.strip():
            raise DefinitionError(f"Dimension: name is {name!r}; expected a text that is not empty.")
        if not isinstance(units, str):
            raise DefinitionError(f"Dimension {name!r}: units is {units!r}; expected a text such as 'Hz' or 'a.u.'.")
        if isinstance(values, int | np.integer) and not isinstance(values, bool):
            array = np.arange(int(values), dtype=np.float64)
        else:
            try:
                array = np.array(values, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise DefinitionError(
                    f"Dimension {name!r}: values is {values!r}; expected their number or a sequence of numbers."
                ) from error
        if array.ndim != 1 or array.size == 0:
            raise DefinitionError(
                f"Dimension {name!r}: values has the shape {array.shape}; expected at least one value, in one row."
            )
        if not np.isfinite(array).all():
            raise DefinitionError(f"Dimension {name!r}: values is {values!r}; expected finite numbers.")
        array.setflags(write=False)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "units", units)
        object.__setattr__(self, "values", array)

    @property
    def size(self) -> int:
        """How many values there are."""
        return int(self.values.size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dimension):
            return NotImplemented
        return (self.name, self.units) == (other.name, other.units) and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.name, self.units, self.values.tobytes()))

    def __repr__(self) -> str:
        return f"Dimension({self.name!r}, {self.units!r}, size={self.size})"


@dataclass(frozen=True, eq=False)
class Output:
    """One result a position: becomes one USID Main dataset in the results group.

    Parameters
    ----------
    dtype : dtype-like
        The type stored, compound types too. Objects and texts of variable length are refused: they have no place
        in a dataset whose rows lie at fixed offsets.
    dims : list of Dimension, optional
        The dimensions of one position's result, slowest first. Default: one value a position.
    quantity : str, optional
        The physical quantity. Default: the name under which the output is declared.
    units : str, optional
        Its units. Default: ``"a.u."``.
    shape_from_main : bool, optional
        The result of a position has the spectroscopic dimensions of the main dataset (a filter). Excludes `dims`.
    fill_value : scalar, optional
        What views show for positions that are not computed. Default: NaN for floats, 0 for integers, field by field.
    compression : str or int, optional
        ``"gzip"``, or its level: the finished dataset is stored compressed, in chunks of up to 1 MiB of whole rows, as
        h5py's ``create_dataset`` would with the same keyword. Default: contiguous. It is no part of what makes two
        runs the same: results that are stored otherwise are the same results.
    compression_opts : int, optional
        The level of gzip, 0 to 9. Default: 4.
    shuffle : bool, optional
        Regroup the bytes of the values before they are compressed, which makes numbers of slowly varying size smaller.

    Attributes
    ----------
    dtype, dims, quantity, units, shape_from_main
        As given: a numpy.dtype, a tuple of Dimension or None, and so on. They cannot be changed.
    fill_value : ndarray
        The value, of the dtype and without dimensions.
    filters : Compression or None
        What `compression`, `compression_opts` and `shuffle` come to: its `level` of gzip, 0 to 9, and its `shuffle`.
        None without compression.

    Raises
    ------
    DefinitionError
        If the parts contradict each other, the type cannot be stored at fixed offsets, or the compression is another
        one.

    Notes
    -----
    While positions are computed, the rows of a compressed output lie uncompressed in a file of their own beside the
    HDF5 file (``.scan.h5.lazyproc-rows-…``), to which its dataset refers as HDF5's external storage, so that any reader
    sees them. When all are done they are compressed, in one step, and that file is removed. The disk needs room for
    both for a while.

    References
    ----------
    The results follow the Universal Spectroscopy and Imaging Data (USID) model: https://pycroscopy.github.io/USID/

    Examples
    --------
    >>> Output("f4", quantity="Amplitude", units="V").resolve("Amplitude", n_spectral=64).shape
    ()
    >>> Output("f4", dims=[Dimension("Parameter", "a.u.", 4)]).resolve("Fit", n_spectral=64).shape
    (4,)
    >>> Output("f4", shape_from_main=True, compression="gzip", shuffle=True).filters
    Compression(level=4, shuffle=True)
    """

    dtype: np.dtype[Any]
    dims: tuple[Dimension, ...] | None
    quantity: str | None
    units: str
    shape_from_main: bool
    fill_value: Any = field(repr=False)
    filters: Compression | None

    def __init__(
        self,
        dtype: DTypeLike,
        dims: Iterable[Dimension] | None = None,
        quantity: str | None = None,
        units: str = "a.u.",
        shape_from_main: bool = False,
        fill_value: Any = None,
        compression: str | int | None = None,
        compression_opts: int | None = None,
        shuffle: bool = False,
    ) -> None:
        try:
            resolved = np.dtype(dtype)
        except TypeError as error:
            raise DefinitionError(f"Output: dtype is {dtype!r}; expected a NumPy dtype such as 'f4'.") from error
        if resolved.hasobject or resolved.itemsize == 0 or (resolved.kind in "UVMm" and resolved.fields is None):
            raise DefinitionError(
                f"Output: dtype is {resolved}; expected a number, a truth value, bytes of fixed length ('S16') or a "
                "compound of these: rows must lie at fixed offsets in the HDF5 file."
            )
        if dims is not None:
            dims = (dims,) if isinstance(dims, Dimension) else tuple(dims)
            wrong = [dim for dim in dims if not isinstance(dim, Dimension)]
            if wrong or not dims:
                raise DefinitionError(f"Output: dims is {list(dims)!r}; expected Dimension objects, or leave it out.")
            names = [dim.name for dim in dims]
            if len(set(names)) < len(names):
                raise DefinitionError(f"Output: the dimensions are named {names}; expected different names.")
        if dims is not None and shape_from_main:
            raise DefinitionError("Output: dims and shape_from_main exclude each other; give one of them.")
        for label, text in (("quantity", quantity), ("units", units)):
            if not isinstance(text, str) and not (text is None and label == "quantity"):
                raise DefinitionError(f"Output: {label} is {text!r}; expected a text.")
        if not isinstance(shape_from_main, bool):
            raise DefinitionError(f"Output: shape_from_main is {shape_from_main!r}; expected True or False.")
        object.__setattr__(self, "dtype", resolved)
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "quantity", quantity)
        object.__setattr__(self, "units", units)
        object.__setattr__(self, "shape_from_main", shape_from_main)
        object.__setattr__(self, "fill_value", _fill(resolved, fill_value))
        object.__setattr__(self, "filters", Compression.of(compression, compression_opts, shuffle))

    def resolve(self, name: str, n_spectral: int) -> ResolvedOutput:
        """Give the output its name and its shape.

        Parameters
        ----------
        name : str
            The name of the dataset.
        n_spectral : int
            Columns of the main dataset.

        Returns
        -------
        ResolvedOutput
            With its `name`, and the `shape` of one position's result.
        """
        shape = (n_spectral,) if self.shape_from_main else tuple(dim.size for dim in self.dims or ())
        return ResolvedOutput(name, self.dtype, shape, self.quantity or name, self.units, self.dims, self)


@dataclass(frozen=True)
class ResolvedOutput:
    """An output whose shape is known.

    Attributes
    ----------
    name : str
        The name of its dataset.
    dtype : numpy.dtype
        The type stored.
    shape : tuple of int
        The shape of one position's result: ``()`` for a single value.
    quantity, units : str
        As declared.
    dims : tuple of Dimension or None
        As declared; None for a single value and for the dimensions of the main dataset.
    spec : Output
        The declaration.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    quantity: str
    units: str
    dims: tuple[Dimension, ...] | None
    spec: Output

    @property
    def width(self) -> int:
        """Values a position: the columns of the dataset."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes a position."""
        return self.width * self.dtype.itemsize

    @property
    def fill_value(self) -> Any:
        """The value shown for positions that are not computed, of the output's dtype."""
        return self.spec.fill_value

    @property
    def filters(self) -> Compression | None:
        """How it is stored compressed; None if it is not, or there is nothing to compress."""
        return self.spec.filters if self.row_bytes else None


def resolve_outputs(outputs: Mapping[str, Output], n_spectral: int) -> tuple[ResolvedOutput, ...]:
    """Resolve all outputs of a process, in their order."""
    return tuple(output.resolve(name, n_spectral) for name, output in outputs.items())


def validate_outputs(outputs: object, owner: str) -> dict[str, Output]:
    """Check what a class declares as its ``outputs``.

    Parameters
    ----------
    outputs : object
        What the class says.
    owner : str
        The name of the class, for the message.

    Raises
    ------
    DefinitionError
        If it is not a mapping of at least one usable name to an `Output`.
    """
    if not isinstance(outputs, Mapping) or not outputs:
        raise DefinitionError(
            f"{owner}: outputs is {outputs!r}; expected a dict of at least one name and its lazyproc.Output."
        )
    for name, output in outputs.items():
        if not isinstance(name, str) or not name or "/" in name or name in (".", ".."):
            raise DefinitionError(
                f"{owner}: an output is named {name!r}; expected a text without '/', since it names a dataset."
            )
        if name in _RESERVED_NAMES or name.endswith(("_Spectroscopic_Indices", "_Spectroscopic_Values")):
            raise DefinitionError(f"{owner}: the output name {name!r} is used by the file format; choose another one.")
        if not isinstance(output, Output):
            raise DefinitionError(f"{owner}: output {name!r} is {output!r}; expected a lazyproc.Output.")
    return dict(outputs)


def _fill(dtype: np.dtype[Any], value: Any) -> Any:
    """Return the fill value as a read-only zero-dimensional array of the dtype."""
    filled = np.zeros((), dtype)
    if value is not None:
        try:
            with np.errstate(all="ignore"):
                filled[()] = value
        except (TypeError, ValueError, OverflowError) as error:
            raise DefinitionError(f"Output: fill_value is {value!r}; expected a value of the dtype {dtype}.") from error
    elif dtype.fields is None:
        if dtype.kind in "fc":
            filled[()] = np.nan
    else:
        for name, (inner, *_) in dtype.fields.items():
            filled[name] = _fill(inner, None) if inner.subdtype is None else _fill(inner.subdtype[0], None)
    filled.setflags(write=False)
    return filled
