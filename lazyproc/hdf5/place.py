"""The target group: where results are looked for and put, known by its path or by an open handle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import h5py

from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError, ReadOnlyFileError, ResultsError
from lazyproc.hdf5.damage import reading
from lazyproc.hdf5.durable import sync_file, sync_folder
from lazyproc.hdf5.file_id import FileId
from lazyproc.hdf5.files import Files, split_address
from lazyproc.hdf5.guard import guarded
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.room import changing, gone
from lazyproc.hdf5.session import session_of
from lazyproc.hdf5.sidecar import NEW, sidecar
from lazyproc.hdf5.transaction import transaction
from lazyproc.hdf5.undo import refuse_pending


@dataclass(frozen=True, eq=False)
class PathPlace:
    """A target group in a file that lazyproc opens itself.

    Attributes
    ----------
    path, name : str
        The file and the group inside.
    files : Files
        Who closes what is opened for reading here.
    may_make : bool
        Whether the file is made if it is not there.
    """

    path: str
    name: str
    files: Files
    may_make: bool = True
    by_handle = False

    @property
    def lock_path(self) -> str | None:
        """The file that the run's lock belongs to."""
        return self.path

    @property
    def disk_path(self) -> str | None:
        """The file behind the handles that `group` gives, for finding extents."""
        return self.path

    def group(self) -> h5py.Group | None:
        """Open the group afresh for reading; None if there is no such file or group yet."""
        if not os.path.exists(self.path):
            return None
        file = self.files.open(self.path, "h5_target_group")
        with reading(f"h5_target_group: {self.path}::{self.name}", "Give h5_target_group in another file."):
            _check_links(file, self.path, self.name)
            found, name = file.get(self.name), self.name
            while (nearest := file.get(name)) is None:  # the group may be made below what is there already
                name = name.rpartition("/")[0] or "/"
        if not isinstance(nearest, h5py.Group):
            raise ArgumentValueError(
                f"h5_target_group: {self.path}::{name} is a dataset; expected a group, to put results in {self.name}."
            )
        return found

    def results(self, name: str) -> h5py.Group:
        """Open a results group afresh for reading, by its name in the file; raises if it is gone or damaged."""
        if not os.path.exists(self.path):
            raise gone(self.path, name)
        return results_in(self.files.open(self.path), name)

    @contextmanager
    def briefly(self) -> Iterator[PathPlace]:
        """Give the same place; what is opened through it for reading is closed with the context."""
        files = Files()
        try:
            yield replace(self, files=files)
        finally:
            files.close()

    def file_id(self) -> FileId | None:
        """Return which file lies there now; None if there is none."""
        try:
            return FileId.of(os.stat(self.path))
        except FileNotFoundError:
            return None

    @contextmanager
    def edit(self, same: FileId | None = None) -> Iterator[h5py.Group]:
        """Open the group for changes that take effect together at the end of the context; made if not there.

        Parameters
        ----------
        same : FileId, optional
            The file that it must be.

        Raises
        ------
        FileChangedError
            If the file is gone, or another one was put in its place; that one is left alone.
        NoRoomError, ReadOnlyFileError, ResultsError
            If it cannot be changed: see `changing`.
        """
        with changing(self.path, self.name):
            if self.may_make and same is None:
                if not os.path.exists(self.path):
                    _make_file(self.path)
                elif os.path.exists(temporary := sidecar(self.path, NEW)):  # a death has left it after the link
                    os.unlink(temporary)
                    sync_folder(self.path)
            with transaction(self.path, same) as file:
                yield file.require_group(self.name)

    def check_writable(self) -> None:
        """Raise ReadOnlyFileError if the results could not be written."""
        folder = os.path.dirname(self.path)
        if os.path.exists(self.path):
            for place, what in ((self.path, "the file"), (folder, "its folder (for the lock beside it)")):
                if not os.access(place, os.W_OK):
                    raise ReadOnlyFileError(
                        f"h5_target_group: {self.path} cannot be used for results: {what} cannot be written. Give "
                        "h5_target_group='other.h5::/', or lazy=True to look without computing."
                    )
        elif not os.access(folder, os.W_OK):
            raise ReadOnlyFileError(f"h5_target_group: the folder {folder} cannot be written, or does not exist.")


@dataclass(frozen=True, eq=False)
class HandlePlace:
    """A target group that the caller has open.

    Attributes
    ----------
    handle : h5py.Group
        The group.
    """

    handle: h5py.Group
    by_handle = True
    disk_path = None

    @property
    def path(self) -> str:
        """The file's name, for messages."""
        return str(self.handle.file.filename)

    @property
    def name(self) -> str:
        """The group's name in the file."""
        return str(self.handle.name)

    @property
    def lock_path(self) -> str | None:
        """The file that the run's lock belongs to; None where there is none on disk."""
        return real_path(self.handle.file)

    def group(self) -> h5py.Group | None:
        """Return the handle."""
        return self.handle

    def results(self, name: str) -> h5py.Group:
        """Return a results group by its name in the file; raises if it is gone or damaged."""
        return results_in(self.handle.file, name)

    @contextmanager
    def briefly(self) -> Iterator[HandlePlace]:
        """Give this place itself: nothing is opened."""
        yield self

    def file_id(self) -> FileId | None:
        """Return None: a handle stays with its file, wherever that is moved."""
        return None

    @contextmanager
    def edit(self, same: FileId | None = None) -> Iterator[h5py.Group]:
        """Give the handle for changes; a death before the end of the context can be undone (`lazyproc recover`).

        Raises
        ------
        NoRoomError, ReadOnlyFileError, ResultsError
            If it cannot be changed: see `changing`.
        """
        with changing(self.path, self.name), guarded([self.handle.file]):
            yield self.handle

    def check_writable(self) -> None:
        """Raise ReadOnlyFileError if the handle is open for reading only."""
        if self.handle.file.mode == "r":
            raise ReadOnlyFileError(
                f"h5_target_group: {self.path} is open for reading only (mode 'r'), so results cannot be written. Open "
                "it with mode 'r+', give h5_target_group='other.h5::/', or lazy=True to look without computing."
            )


Place = PathPlace | HandlePlace


def results_in(file: h5py.File, name: str) -> h5py.Group:
    """Return a results group of a file; raises ResultsError if it is gone or damaged."""
    with reading(f"{file.filename}::{name}"):
        group = file.get(name)
    if not isinstance(group, h5py.Group):
        raise ResultsError(f"{file.filename}::{name}: the results group is gone: another program has removed it.")
    return group


def _check_links(file: h5py.File, path: str, name: str) -> None:
    """Refuse a path with a link in it through which nothing can be made.

    Raises
    ------
    ArgumentValueError
        If a link leads to another file, which would have to be locked and changed as a whole, too, or nowhere.
    """
    parts = name.strip("/").split("/")
    for count in range(1, len(parts) + 1):
        inner = "/".join(parts[:count])
        link = file.get(inner, getlink=True)
        if link is None:
            return  # to be made
        if isinstance(link, h5py.ExternalLink):
            there = os.path.join(os.path.dirname(path), link.filename)
            rest = "/".join(part for part in (link.path.strip("/"), *parts[count:]) if part)
            raise ArgumentValueError(
                f"h5_target_group: {path}::/{inner} is a link to another file; expected a group of this file. Give the "
                f"address there: {there}::/{rest}."
            )
        if isinstance(link, h5py.SoftLink) and file.get(inner) is None:
            raise ArgumentValueError(
                f"h5_target_group: {path}::/{inner} is a link that leads nowhere (to {link.path}); expected a group, "
                "or nothing. Make what it leads to, or remove the link."
            )


def place_of(target: Any, main: h5py.Dataset, main_path: str | None, files: Files) -> Place:
    """Find the place of the results.

    Parameters
    ----------
    target : None, str, path-like, h5py.Group
        As given by the user; None means the group that holds the main dataset.
    main : h5py.Dataset
        The main dataset.
    main_path : str or None
        Its file, if lazyproc opened it by path.
    files : Files
        Who closes what is opened.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If it is neither, or a handle that is closed.
    JournalError
        If a change of a file that is open here was cut off by a death, and has not been undone.
    """
    if main_path is None:
        _refuse_pending(main.file)
    if target is None:
        if main_path is not None:
            return PathPlace(main_path, str(main.parent.name), files, may_make=False)
        return HandlePlace(main.parent)
    if isinstance(target, str | os.PathLike):
        path, name = split_address(target, "h5_target_group")
        return PathPlace(path, name, files, may_make=path != main_path)
    if not isinstance(target, h5py.Group):
        raise ArgumentTypeError(
            f"h5_target_group: a {type(target).__name__} came; expected an open h5py.Group or h5py.File, or an address "
            "such as 'out.h5::/group'."
        )
    if not target:
        raise ArgumentValueError("h5_target_group: the group's file is closed. Open it again.")
    _refuse_pending(target.file)
    return HandlePlace(target)


def _refuse_pending(file: h5py.File) -> None:
    path = real_path(file)
    if path is not None:
        refuse_pending(path, session=session_of(file))


def _make_file(path: str) -> None:
    """Make an empty HDF5 file, complete and durable before it gets its name; the caller holds the run's lock."""
    temporary = sidecar(path, NEW)
    try:
        with suppress(FileNotFoundError):
            os.unlink(temporary)  # which a death has left
        with h5py.File(temporary, "x"):
            pass
        sync_file(temporary)
        os.link(temporary, path)  # unlike rename, never replaces a file that somebody made meanwhile
    except FileExistsError:
        pass
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_folder(path)
