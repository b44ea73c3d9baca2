"""Open what a process works on: its main dataset, and the group that old hooks write to."""

from __future__ import annotations

import os
from collections.abc import Callable

import h5py

from lazyproc.core.errors import ArgumentValueError
from lazyproc.hdf5.damage import reading
from lazyproc.hdf5.files import Files, check_heaps, split_address
from lazyproc.hdf5.guard import guarded
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.place import HandlePlace, Place
from lazyproc.hdf5.source import Source, source_of
from lazyproc.hdf5.steady import read_steadily
from lazyproc.hooks.loop import holding_lock_of
from lazyproc.main_handle import MainDatasetHandle

_MOST_LINKS = 16
"""Links from file to file that are followed: as many as HDF5 follows."""


def open_main(main: str | h5py.Dataset, files: Files, *, writable: bool) -> tuple[str | None, h5py.Dataset]:
    """Open the main dataset; old hooks write through its handle, so it is opened for writing for them."""
    if isinstance(main, h5py.Dataset):
        check_heaps(main)
        return None, main
    path, name = split_address(main, "h5_main")
    file = files.open(path, "h5_main")
    for _ in range(_MOST_LINKS):
        linked = _external(file, path, name)
        if linked is None:
            break
        path, name = linked
        file = files.open(path, "h5_main")
    with reading(f"h5_main: {path}::{name}", "Restore the file from a copy."):
        found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        what = "a group" if isinstance(found, h5py.Group) else "not there"
        raise ArgumentValueError(
            f"h5_main: {path}::{name} is {what}; expected a dataset: give its whole address, such as "
            "'scan.h5::/Measurement_000/Channel_000/Raw_Data'."
        )
    return path, files.open_for_writing(path)[name] if writable and os.access(path, os.W_OK) else found


def open_source(
    main: str | h5py.Dataset, files: Files, check: Callable[[h5py.Dataset], None] = lambda dataset: None
) -> tuple[str | None, MainDatasetHandle, Source]:
    """Open the main dataset for reading, with how it is read; once more if a run changes its file just now.

    `check` may raise if it is not the one that is expected, before it is looked at any closer.
    """

    def read() -> tuple[str | None, MainDatasetHandle, Source]:
        opened = Files()
        try:
            path, dataset = open_main(main, opened, writable=False)
            check(dataset)
            handle = MainDatasetHandle(dataset)
            source = source_of(handle, path)
        except BaseException:
            opened.close()
            raise
        files.take(opened)
        return path, handle, source

    if isinstance(main, h5py.Dataset):
        return read()
    return read_steadily(split_address(main, "h5_main")[0], read)


def _external(file: h5py.File, path: str, name: str) -> tuple[str, str] | None:
    """Return the file, and the path in it, that an address leads to through a link to another file.

    Files are opened as Python's, which do not know their folder: HDF5 would look for the other file elsewhere.
    """
    parts = name.strip("/").split("/")
    for count in range(1, len(parts) + 1):
        try:
            link = file.get("/".join(parts[:count]), getlink=True)
        except Exception:  # whatever is wrong will be said when the dataset is opened
            return None
        if isinstance(link, h5py.ExternalLink):
            rest = [link.path.strip("/"), *parts[count:]]
            return os.path.join(os.path.dirname(path), link.filename), "/" + "/".join(rest)
        if link is None:
            return None
    return None


def stamp_of(path: str | None) -> tuple[int, ...]:
    """Return what tells that a file was changed: its inode, size and time of change; nothing for an open handle."""
    if path is None:
        return ()
    try:
        status = os.stat(path)
    except OSError:  # will be said when it is opened
        return (0,)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def target_handle(place: Place, main_path: str | None, main: h5py.Dataset, files: Files) -> h5py.Group | None:
    """Return the target group, open and writable for hooks; None if it is not there yet. Writes nothing."""
    if isinstance(place, HandlePlace):
        return place.handle
    with place.briefly() as briefly:
        if briefly.group() is None:
            return None
    return main.file[place.name] if place.path == main_path else files.open_for_writing(place.path)[place.name]


def made_target(place: Place, main_path: str | None, main: h5py.Dataset, files: Files) -> h5py.Group:
    """Return the target group, open and writable for hooks; it is made if it is not there yet."""
    if (there := target_handle(place, main_path, main, files)) is not None:
        return there
    if place.path == main_path:
        with holding_lock_of(main.file), guarded([main.file]):
            return main.file.require_group(place.name)
    with RunLock(place.path), place.edit():
        pass
    return files.open_for_writing(place.path)[place.name]
