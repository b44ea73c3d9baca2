"""Reading what may be damaged: HDF5's own errors become one that names the place, and walks go round what is broken.

h5py raises KeyError, RuntimeError, OSError, TypeError or ValueError for the same kinds of damage, and its words name
neither the file nor the group. HDF5's own walk through a file ends at the first thing that it cannot open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py

from lazyproc.core.errors import LazyprocError, ResultsError
from lazyproc.hdf5.raised import H5_ERRORS

_REQUIRED = object()
_VARIABLE_KINDS = (0, 1)
"""Types of variable length are sequences or texts: "Datatype Message" of the HDF5 File Format Specification."""

Member = tuple[str, h5py.Group | h5py.Dataset | h5py.Datatype | Exception]
"""A name, and the object or why it cannot be opened."""


@contextmanager
def reading(what: str, advice: str = "Compute with override=True.") -> Iterator[None]:
    """Turn errors of HDF5 into a ResultsError that names what was being read.

    Parameters
    ----------
    what : str
        What is being read, with its file or its group.
    advice : str
        What to do.

    Raises
    ------
    ResultsError
        In the place of anything that h5py raises. Errors of lazyproc itself pass.
    """
    try:
        yield
    except LazyprocError:
        raise
    except H5_ERRORS as error:
        raise ResultsError(
            f"{what}: cannot be read ({_first_line(error)}). It is damaged, or another program has changed it. {advice}"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def address_of(item: h5py.Group | h5py.Dataset | h5py.Datatype) -> int:
    """Return where an object's header lies in its file, which is what HDF5 knows it by."""
    return int(h5py.h5o.get_info(item.id).addr)


def attribute(item: h5py.Group | h5py.Dataset, name: str, default: Any = _REQUIRED) -> Any:
    """Read an attribute that may be damaged.

    Parameters
    ----------
    item : h5py.Group or h5py.Dataset
        What has it.
    name : str
        Of the attribute.
    default : object, optional
        What is returned if there is none.

    Raises
    ------
    KeyError
        If there is none, and no default.
    TypeError
        If its type is one with which HDF5 would end the process.
    OSError, RuntimeError, ValueError
        Whatever h5py raises for others that cannot be read.
    """
    attrs = item.attrs
    if default is not _REQUIRED and name not in attrs:
        return default
    _check_type(name, attrs.get_id(name).get_type())
    return attrs[name]


def attributes(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """Read all attributes, as `attribute` does."""
    return {name: attribute(item, name) for name in item.attrs}


def _check_type(name: str, kind: h5py.h5t.TypeID) -> None:
    """Refuse types of variable length of a kind that does not exist: HDF5 calls what is not there, without a look."""
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        for number in range(kind.get_nmembers()):
            _check_type(name, kind.get_member_type(number))
    elif isinstance(kind, h5py.h5t.TypeArrayID):
        _check_type(name, kind.get_super())
    elif isinstance(kind, h5py.h5t.TypeVlenID):
        if kind.encode()[3] & 0x0F not in _VARIABLE_KINDS:  # two bytes of H5Tencode, the class, the kind
            raise TypeError(f"the type of the attribute {name} is damaged")
        _check_type(name, kind.get_super())


def members(group: h5py.Group, *, follow: bool = False) -> Iterator[Member]:
    """Yield name and object of all hard links in a group; what cannot be opened comes as the exception.

    Parameters
    ----------
    group : h5py.Group
        The group.
    follow : bool
        Soft and external links, too; those that lead nowhere come as exceptions.

    Raises
    ------
    ResultsError
        If the group cannot be listed.
    """
    with reading(f"{group.file.filename}::{group.name}"):
        names = list(group)
    for name in names:
        if not isinstance(name, str):  # h5py gives names that are not UTF-8 as bytes
            yield repr(name), ValueError("its name is no text")
            continue
        try:
            if not follow and not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item = group[name]
        except H5_ERRORS as error:
            item = error
        yield name, item


def walk(group: h5py.Group) -> Iterator[Member]:
    """Yield full name and object of all that lies below a group, each object once; damaged parts come as exceptions.

    Soft and external links are not followed. A group comes before what is in it.

    Raises
    ------
    ResultsError
        If the group itself is damaged.
    """
    with reading(f"{group.file.filename}::{group.name}", "Restore the file from a copy."):
        seen = {address_of(group)}
    under_way = [_inside(str(group.name), group)]
    while under_way:
        for name, item in under_way[-1]:
            if isinstance(item, Exception):
                yield name, item
                continue
            try:
                address = address_of(item)
            except H5_ERRORS as error:
                yield name, error
                continue
            if address not in seen:
                seen.add(address)
                yield name, item
                if isinstance(item, h5py.Group):
                    under_way.append(_inside(name, item))
                    break
        else:
            under_way.pop()


def _inside(path: str, group: h5py.Group) -> Iterator[Member]:
    try:
        for name, item in members(group):
            yield f"{path.rstrip('/')}/{name}", item
    except ResultsError as error:
        yield path, error
