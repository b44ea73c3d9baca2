"""What a process gives for each position: `Output` and `Dimension`, and their shapes once the main dataset is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazyproc.core.compression import Compression
from lazyproc.core.errors import ArgumentValueError, DefinitionError
from lazyproc.core.storable import check_fields, check_text, fill_of, fixed_dtype

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
        If the name is empty, name or units cannot be stored, there are no values, or they are not finite numbers in one
        row.

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
        check_text("Dimension: name", name)
        check_text(f"Dimension {name!r}: units", units)
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
        What views show for positions that are not computed: a value that is the same in the dtype, but for floats,
        which may be rounded. Default: NaN for floats, 0 for integers, field by field.
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
        If the parts contradict each other, the type cannot be stored at fixed offsets, its fields are not in the order
        of their offsets, the fill value is not the same in it, a text cannot be stored, or the compression is another
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
        resolved = fixed_dtype(dtype)
        check_fields(resolved)
        dims = None if dims is None else _dimensions(dims)
        if dims is not None and shape_from_main:
            raise DefinitionError("Output: dims and shape_from_main exclude each other; give one of them.")
        for label, text in (("quantity", quantity), ("units", units)):
            if isinstance(text, str):
                check_text(f"Output: {label}", text)
            elif text is not None or label == "units":
                raise DefinitionError(f"Output: {label} is {text!r}; expected a text.")
        if not isinstance(shape_from_main, bool):
            raise DefinitionError(f"Output: shape_from_main is {shape_from_main!r}; expected True or False.")
        filters = Compression.of(compression, compression_opts, shuffle)
        self._set(resolved, dims, quantity, units, shape_from_main, fill_of(resolved, fill_value), filters)

    def _set(self, *values: Any) -> None:
        for one, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, one.name, value)

    @classmethod
    def stored(cls, dtype: np.dtype[Any], quantity: str, units: str, fill_value: Any = None) -> Output:
        """Describe a dataset that is there, whoever made it: what a new one could not have is no error.

        Parameters
        ----------
        dtype : numpy.dtype
            Its type.
        quantity, units : str
            As they are stored.
        fill_value : scalar, optional
            What it shows for positions that are not computed. Default: NaN for floats, 0 for integers.

        Raises
        ------
        DefinitionError
            If its values have no place of fixed size.
        """
        filled = fill_of(fixed_dtype(dtype), None)
        if fill_value is not None:
            filled = np.array(fill_value, dtype)
            filled.setflags(write=False)
        output = cls.__new__(cls)
        output._set(dtype, None, quantity, units, False, filled, None)
        return output

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


def _dimensions(dims: Any) -> tuple[Dimension, ...]:
    """Return what is given as the dimensions of an output."""
    if not isinstance(dims, Dimension | Iterable):
        raise DefinitionError(f"Output: dims is {dims!r}; expected a list of Dimension objects, or leave it out.")
    found = (dims,) if isinstance(dims, Dimension) else tuple(dims)
    if not found or not all(isinstance(dim, Dimension) for dim in found):
        raise DefinitionError(f"Output: dims is {list(found)!r}; expected Dimension objects, or leave it out.")
    names = [dim.name for dim in found]
    if len(set(names)) < len(names):
        raise DefinitionError(f"Output: the dimensions are named {names}; expected different names.")
    return found


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
        check_text(f"{owner}: the name of an output", name)
        if name in _RESERVED_NAMES or name.endswith(("_Spectroscopic_Indices", "_Spectroscopic_Values")):
            raise DefinitionError(f"{owner}: the output name {name!r} is used by the file format; choose another one.")
        if not isinstance(output, Output):
            raise DefinitionError(f"{owner}: output {name!r} is {output!r}; expected a lazyproc.Output.")
    return dict(outputs)
