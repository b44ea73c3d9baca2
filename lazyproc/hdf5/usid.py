"""The USID model, read: what makes a dataset a Main dataset.

A main dataset `(n_positions, n_spectral)` refers to four ancillary datasets, anywhere in its file::

                      Spectroscopic_Indices, Spectroscopic_Values   (n_spectral_dims, n_spectral)
    Position_Indices  +------------------------------------------+
    Position_Values   |              main dataset                |
    (n_positions,     |        one row a position                |
     n_position_dims) +------------------------------------------+

Nothing here writes, and only metadata are read; `lazyproc.hdf5.grid` reads the ancillary datasets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import h5py
import numpy as np

from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError, NotMainDatasetError, ResultsError
from lazyproc.hdf5.damage import attribute, reading, walk
from lazyproc.hdf5.raised import H5_ERRORS

REFERENCES = ("Position_Indices", "Position_Values", "Spectroscopic_Indices", "Spectroscopic_Values")
"""The attributes of a main dataset that refer to its ancillary datasets, in the order of `ancillary_handles`."""

Handles = tuple[h5py.Dataset, h5py.Dataset, h5py.Dataset, h5py.Dataset]
Texts = tuple[str, ...]


@dataclass(frozen=True)
class Ancillary:
    """The pair of ancillary datasets of one axis.

    Attributes
    ----------
    indices, values : h5py.Dataset
        `(n_positions, n_position_dims)` or `(n_spectral_dims, n_spectral)`; open as long as the file is.
    labels, units : tuple of str
        One a dimension, in the order of the file; as they are stored, so labels may repeat.
    """

    indices: h5py.Dataset
    values: h5py.Dataset
    labels: Texts
    units: Texts


@dataclass(frozen=True)
class MainDataset:
    """What the metadata of a main dataset say.

    Attributes
    ----------
    quantity, units : str
        What is measured, and in what.
    position, spectroscopic : Ancillary
        What describes its rows and its columns.
    """

    quantity: str
    units: str
    position: Ancillary
    spectroscopic: Ancillary

    @property
    def handles(self) -> Handles:
        """The four ancillary datasets, in the order of `REFERENCES`."""
        return self.position.indices, self.position.values, self.spectroscopic.indices, self.spectroscopic.values


def main_dataset(h5: Any) -> MainDataset:
    """Validate a main dataset and describe it, from metadata only.

    Parameters
    ----------
    h5 : h5py.Dataset
        Open; a pyUSID `USIDataset` is one, too.

    Raises
    ------
    ArgumentTypeError
        If it is not an h5py dataset.
    ArgumentValueError
        If its file is closed.
    NotMainDatasetError
        If it is not a USID Main dataset; the message says what is missing or wrong.
    """
    if not isinstance(h5, h5py.Dataset):
        raise ArgumentTypeError(f"h5_main is {h5!r} ({type(h5).__name__}); expected an open h5py.Dataset.")
    if not h5.id.valid:
        raise ArgumentValueError("h5_main is a dataset of a file that is closed. Open the file and get it again.")
    with reading(f"{h5.file.filename}::{h5.name}", "Restore the file from a copy."):
        return _validated(h5)


def is_main(h5: object) -> bool:
    """Tell whether an object is an open USID Main dataset."""
    try:
        main_dataset(h5)
    except (ArgumentTypeError, ArgumentValueError, ResultsError):
        return False
    return True


def ancillary_handles(h5: h5py.Dataset) -> Handles:
    """Return Position_Indices, Position_Values, Spectroscopic_Indices and Spectroscopic_Values of a main dataset.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, NotMainDatasetError
        As `main_dataset`.
    """
    return main_dataset(h5).handles


def read_text(value: object) -> str:
    """Return the text of an attribute: bytes, str, NumPy's kinds of both, or an array of just one.

    Bytes are UTF-8; those that are not are taken as Latin-1, which is how old instruments write "µ".

    Raises
    ------
    ArgumentTypeError
        If it is anything else.

    Examples
    --------
    >>> read_text(np.bytes_("µm".encode()))
    'µm'
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, str):
        # h5py keeps bytes that are not UTF-8 as lone surrogates, which cannot be written or shown again.
        value = value.encode("utf-8", "surrogateescape")
    if not isinstance(value, bytes):
        raise ArgumentTypeError(f"a text of the file is {value!r} ({type(value).__name__}); expected str or bytes.")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def read_texts(value: object) -> Texts:
    """Return the texts of an attribute that holds several; a single text counts as one.

    Raises
    ------
    ArgumentTypeError
        If one of them is no text.
    """
    if isinstance(value, np.ndarray):
        return tuple(read_text(item) for item in value.reshape(-1))
    if isinstance(value, list | tuple):
        return tuple(read_text(item) for item in value)
    return (read_text(value),)


def _validated(h5: h5py.Dataset) -> MainDataset:
    if h5.shape is None or len(h5.shape) != 2:
        _refuse(
            h5,
            f"its shape is {h5.shape}; expected two dimensions (n_positions, n_spectral). Write it as a matrix of one "
            "row a position, or choose another dataset.",
        )
    if 0 in h5.shape:
        what = "positions (rows)" if h5.shape[0] == 0 else "columns"
        _refuse(h5, f"it has no {what}, its shape is {h5.shape}; expected at least one. Was the measurement finished?")
    missing = [name for name in ("quantity", "units", *REFERENCES) if name not in h5.attrs]
    if missing:
        _refuse(
            h5,
            f"it has no attribute {', '.join(missing)}; expected the texts quantity and units and references to its "
            "four ancillary datasets. Choose another dataset, or add what is missing: the usage guide shows how.",
        )
    quantity, units = _texts(h5, h5, "quantity", 1)[0], _texts(h5, h5, "units", 1)[0]
    inds, vals, spec_inds, spec_vals = (_referred(h5, name) for name in REFERENCES)
    position = Ancillary(inds, vals, *_checked_pair(h5, 0, inds, vals))
    spectroscopic = Ancillary(spec_inds, spec_vals, *_checked_pair(h5, 1, spec_inds, spec_vals))
    return MainDataset(quantity, units, position, spectroscopic)


def _refuse(h5: h5py.Dataset, reason: str) -> NoReturn:
    raise NotMainDatasetError(f"{h5.name}: not a USID Main dataset: {reason}")


def _referred(h5: h5py.Dataset, name: str) -> h5py.Dataset:
    """Follow a reference to an ancillary dataset.

    What was deleted can often still be opened by a reference, until something else is written in its place; only that
    no name leads to it gives it away.
    """
    advice = f"Write the reference again: h5.attrs[{name!r}] = dataset.ref."
    try:
        reference = attribute(h5, name)
    except H5_ERRORS as error:
        _refuse(h5, f"its attribute {name} cannot be read ({error}). {advice}")
    if not isinstance(reference, h5py.Reference):
        _refuse(h5, f"its attribute {name} is {reference!r}; expected a reference to a dataset. {advice}")
    if not reference:
        _refuse(h5, f"its attribute {name} is a null reference; expected one to a dataset. {advice}")
    try:
        item = h5.file[reference]
    except H5_ERRORS as error:
        _refuse(h5, f"its attribute {name} refers to nothing ({error}); the dataset was deleted. {advice}")
    if not isinstance(item, h5py.Dataset):
        _refuse(h5, f"its attribute {name} refers to {item!r}; expected a dataset. {advice}")
    named = _by_name(h5, item, name)
    if named is None:
        _refuse(h5, f"its attribute {name} refers to a dataset that was deleted. {advice}")
    return named


def _by_name(h5: h5py.Dataset, item: h5py.Dataset, likely: str) -> h5py.Dataset | None:
    """Return a dataset under a name that leads to it; None if there is none.

    HDF5 finds the name of what a reference points to by a search through the whole file, which ends in vain at the
    first thing that is damaged. So the groups above the main dataset are looked through before.
    """
    wanted = _identity(item)
    group = h5
    while group.name != "/":
        group = group.parent
        for name in (likely, *_names(group)):
            if wanted == _identity(group, name):
                return group[name]
    try:
        if item.name is not None:
            return h5.file[item.name]
    except H5_ERRORS:
        pass
    everywhere = (other for _, other in walk(h5.file["/"]) if isinstance(other, h5py.Dataset))
    return next((other for other in everywhere if _identity(other) == wanted), None)


def _names(group: h5py.Group) -> list[str]:
    """Return the names in a group; none if it is damaged."""
    try:
        return [name for name in group if isinstance(name, str)]
    except H5_ERRORS:
        return []


def _identity(item: h5py.Group | h5py.Dataset, name: str = ".") -> tuple[int, int] | None:
    """Return the file and the address of an object, or of what has a name in a group; None if it cannot be opened."""
    try:
        about = h5py.h5o.get_info(item.id, name.encode())
    except H5_ERRORS:
        return None
    return int(about.fileno), int(about.addr)


def _checked_pair(h5: h5py.Dataset, axis: int, indices: h5py.Dataset, values: h5py.Dataset) -> tuple[Texts, Texts]:
    """Return labels and units of the dimensions of an axis, the same for indices and values."""
    length = h5.shape[axis]
    expected = f"({length}, n_position_dims)" if axis == 0 else f"(n_spectral_dims, {length})"
    names = REFERENCES[2 * axis : 2 * axis + 2]
    for name, ancillary, kinds in zip(names, (indices, values), ("biuf", "biufc"), strict=True):
        shape = ancillary.shape
        if shape is None or len(shape) != 2 or shape[axis] != length or 0 in shape:
            _refuse(
                h5,
                f"{name} ({ancillary.name}) has the shape {shape}, the dataset {h5.shape}; expected {expected}. "
                "Refer to the ancillary dataset that belongs to it.",
            )
        if ancillary.dtype.kind not in kinds:
            _refuse(h5, f"{name} ({ancillary.name}) holds {ancillary.dtype}; expected numbers. Write them as such.")
    if indices.shape != values.shape:
        _refuse(
            h5,
            f"{names[0]} has the shape {indices.shape} and {names[1]} {values.shape}; expected the same. "
            "Refer to a pair that belongs together.",
        )
    n_dims = indices.shape[1 - axis]
    pairs = [tuple(_texts(h5, item, what, n_dims) for what in ("labels", "units")) for item in (indices, values)]
    for what, of_indices, of_values in zip(("labels", "units"), *pairs, strict=True):
        if of_indices != of_values:
            _refuse(
                h5,
                f"the {what} of {names[0]} are {of_indices} and those of {names[1]} {of_values}; expected the same. "
                "Refer to a pair that belongs together, or correct the attribute.",
            )
    return pairs[0][0], pairs[0][1]


def _texts(h5: h5py.Dataset, item: h5py.Dataset, name: str, count: int) -> Texts:
    """Return the texts in an attribute of the main dataset or of an ancillary one."""
    wanted = "a text" if item is h5 else f"{count} text(s), one a dimension"
    try:
        value = attribute(item, name, None)
        texts = () if value is None else read_texts(value)
        problem = "is missing" if value is None else f"is {texts}, {len(texts)} text(s)"
    except ArgumentTypeError:
        texts, problem = (), f"is {value!r}"
    except H5_ERRORS as error:
        texts, problem = (), f"cannot be read ({error})"
    if len(texts) != count:
        owner = "its attribute" if item is h5 else f"{item.name}: the attribute"
        _refuse(h5, f"{owner} {name} {problem}; expected {wanted}. Write it again.")
    return texts


def text_attribute(group: h5py.Group, name: str, default: str = "") -> str:
    """Return the text in an attribute of a results group, or `default` without it.

    Raises
    ------
    ResultsError
        If it is no text, or cannot be read.
    """
    try:
        return read_text(attribute(group, name, default))
    except (ArgumentTypeError, *H5_ERRORS) as error:
        raise ResultsError(
            f"{group.name}: the attribute {name} cannot be read ({error}); expected a text. It was changed by another "
            "program, or the file is damaged: compute with override=True."
        ) from error
