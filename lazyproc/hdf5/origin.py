"""Where results came from: the main dataset and the file that they name, compared with those at hand."""

from __future__ import annotations

import os
from collections.abc import Iterable

import h5py

from lazyproc.hdf5.damage import attribute
from lazyproc.hdf5.usid import text_attribute


def file_differences(group: h5py.Group, main_file: str) -> Iterable[str]:
    """Compare the recorded file of the main dataset with the present one; for groups without a fingerprint."""
    stored_file = _source_file(group)
    if stored_file is None:
        yield f"source: the file that these results were made from is not known, wanted {main_file}"
    elif not _same_path(stored_file, main_file):
        yield f"source: stored results of the file {stored_file}, wanted {main_file}"


def other_file_differences(group: h5py.Group, main_file: str) -> Iterable[str]:
    """Tell whether the recorded file is there, and another one; else the main dataset's was moved or renamed."""
    if os.path.exists(_source_file(group) or ""):
        yield from file_differences(group, main_file)


def source_name(group: h5py.Group) -> str | None:
    """Return the path of the main dataset that the results were made from, if it is recorded."""
    for name in ("lazyproc_source", "source_dataset_path"):
        if name in group.attrs:
            return text_attribute(group, name)
    reference = attribute(group, "source_000", None)
    if isinstance(reference, h5py.Reference) and reference:
        try:
            return str(group.file[reference].name)
        except (ValueError, KeyError):
            return None
    return None


def _source_file(group: h5py.Group) -> str | None:
    if "source_file_path" in group.attrs:
        return text_attribute(group, "source_file_path")
    return None if _is_elsewhere(group) else ""


def _is_elsewhere(group: h5py.Group) -> bool:
    """Tell whether the results may come from another file: nothing in this one is their source."""
    if "source_000" in group.attrs:
        return False
    main = str(group.name).rpartition("/")[2].partition("-")[0]
    return main not in group.parent


def _same_path(stored: str, now: str) -> bool:
    return stored == "" or os.path.realpath(stored) == os.path.realpath(now)
