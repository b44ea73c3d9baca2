"""Whether all files that a main dataset lies in are still whole, where HDF5 reads it.

HDF5 does not tell when bytes are missing: rows beyond the end of a file that was cut off, or in a source of a virtual
dataset that is gone, come as zeros or as the fill value. So the files are looked at after their rows were read, and
what was computed from them is used only if none of them is gone, or shorter than it was.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import h5py

from lazyproc.core.errors import FileChangedError
from lazyproc.hdf5.extents import using
from lazyproc.hdf5.superblock import SUPERBLOCK_BYTES, end_of


@dataclass(frozen=True)
class Whole:
    """The files that a dataset lies in. Travels to workers.

    Attributes
    ----------
    label : str
        The dataset, for messages.
    files : tuple of (str, int)
        Each file, with its bytes when it was found.
    """

    label: str
    files: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, dataset: h5py.Dataset, path: str) -> Whole:
        """Find the files of a dataset.

        Parameters
        ----------
        dataset : h5py.Dataset
            Open.
        path : str
            Its file on disk.

        Raises
        ------
        FileChangedError
            If a source of a virtual dataset is not there: HDF5 would give the fill value in the place of its values. Or
            if the file itself has just gone.
        """
        label = f"{path}::{dataset.name}"
        files = [path, *_external(dataset, path), *_virtual(dataset, path, label)]
        sizes = []
        for name in dict.fromkeys(files):
            with using(name, label):
                sizes.append((name, os.stat(name).st_size))
        return cls(label, tuple(sizes))

    def check(self) -> None:
        """Make sure that no file is gone, and none ends before its data do.

        Raises
        ------
        FileChangedError
            If one is, or does. What was read since the last check may be wrong.
        """
        for name, size in self.files:
            with using(name, self.label):
                now = os.stat(name).st_size
                if now < size and _is_cut_off(name, now):
                    raise FileChangedError(
                        f"{self.label}: the file {name} has {now} bytes now; it had {size} when the run began: it was "
                        "truncated. What was read from it is not used. Restore it from a copy."
                    )


def _is_cut_off(name: str, size: int) -> bool:
    """Tell whether a file that became shorter ends before HDF5 thinks; files that are no HDF5 files always do."""
    with open(name, "rb") as file:
        end = end_of(file.read(SUPERBLOCK_BYTES))
    return end is None or size < end


def _external(dataset: h5py.Dataset, path: str) -> list[str]:
    """Return the files with its raw data; HDF5 itself tells if one is not there."""
    listed = dataset.external or ()
    prefix = os.fsdecode(dataset.id.get_access_plist().get_efile_prefix())
    found = (_find(os.fsdecode(name), path, prefix, "HDF5_EXTFILE_PREFIX") for name, *_ in listed)
    return [name for name in found if name is not None]


def _virtual(dataset: h5py.Dataset, path: str, label: str) -> list[str]:
    """Return the files that a virtual dataset is put together from."""
    if not dataset.is_virtual:
        return []
    prefix = os.fsdecode(dataset.id.get_access_plist().get_virtual_prefix())
    names = {source.file_name for source in dataset.virtual_sources()} - {"."}
    found = []
    for name in sorted(names):
        if "%" in name:  # a pattern of names, of which HDF5 takes as many as there are
            continue
        place = _find(name, path, prefix, "HDF5_VDS_PREFIX")
        if place is None:
            raise FileChangedError(
                f"{label}: is put together from several files, of which {name} is not there; HDF5 would give the fill "
                "value for it. Bring it back, or link to it from the folder of this file."
            )
        found.append(place)
    return found


def _find(name: str, path: str, prefix: str, variable: str) -> str | None:
    """Return where HDF5 finds a file that another one refers to: by its prefixes, beside it, or from where we are.

    As said of ``H5Pset_virtual_prefix`` and ``H5Pset_efile_prefix`` in HDF5's reference manual.
    """
    folder = os.path.dirname(os.path.abspath(path))
    prefixes = [one.replace("${ORIGIN}", folder) for one in (os.environ.get(variable, ""), prefix) if one]
    base = os.path.basename(name)
    places = [os.path.join(one, name) for one in (*prefixes, folder, os.getcwd())]
    places += [os.path.join(one, base) for one in (*prefixes, folder)] if os.path.isabs(name) else []
    return next((os.path.abspath(place) for place in places if os.path.exists(place)), None)
