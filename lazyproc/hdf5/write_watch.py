"""Files that hooks write through their own handles: whether anything was written, and syncing it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import h5py

from lazyproc.hdf5.durable import sync_data
from lazyproc.hdf5.extents import using
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.room import writing
from lazyproc.hdf5.unmark import take_back


def sync_files(files: Iterable[h5py.File]) -> None:
    """Flush files down to the disk: what HDF5 holds back of them, then what the system does."""
    for file in files:
        if file.mode == "r":
            continue
        path = real_path(file)
        with writing(str(file.filename), "the results"):
            file.flush()
            if path is not None:
                with using(path, "what was written"):
                    take_back(file)
                    sync_data(file.id.get_vfd_handle())


class WriteWatch:
    """Tells whether anything was written into some files while its context lasts, by their time of modification.

    Parameters
    ----------
    files : iterable of h5py.File
        Open and flushed. Meanwhile their time of modification is set back by a microsecond: the clock of a file system
        ticks too slowly to tell two writes apart, but any write moves that time away from where it was put.
    """

    def __init__(self, files: Iterable[h5py.File]) -> None:
        self._files = [file for file in files if file.mode != "r"]
        self._put: list[tuple[h5py.File, int, int]] = []

    def __enter__(self) -> WriteWatch:
        for file in self._files:
            if real_path(file) is None:
                continue
            descriptor = file.id.get_vfd_handle()
            before = os.fstat(descriptor).st_mtime_ns
            try:
                _set_modified(descriptor, before - 1000)
            except OSError:  # the file is somebody else's
                continue
            self._put.append((file, before, os.fstat(descriptor).st_mtime_ns))
        return self

    def __exit__(self, *exception: object) -> None:
        for file, before, put in self._put:
            if file and os.fstat(file.id.get_vfd_handle()).st_mtime_ns == put:
                _set_modified(file.id.get_vfd_handle(), before)

    def saw_nothing(self) -> bool:
        """Return True only if it is certain that nothing was written; flush the files before."""
        untouched = [os.fstat(file.id.get_vfd_handle()).st_mtime_ns == put for file, _, put in self._put]
        return len(untouched) == len(self._files) and all(untouched)


def _set_modified(descriptor: int, nanoseconds: int) -> None:
    os.utime(descriptor, ns=(os.fstat(descriptor).st_atime_ns, nanoseconds))
