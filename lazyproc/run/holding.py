"""Hold the run's lock of the file with the results: for a run, and while a caller's handle is written out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace

import h5py

from lazyproc.core.errors import FileBusyError, LockingError, NoRoomError, ReadOnlyFileError
from lazyproc.engine.kernel import Kernel
from lazyproc.hdf5.extents import ExtentSource
from lazyproc.hdf5.guard import finish_pending, flush_guarded
from lazyproc.hdf5.leftovers import remove_leftovers
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.place import HandlePlace
from lazyproc.hdf5.room import writing
from lazyproc.hdf5.source import write_out
from lazyproc.hdf5.transaction import recover
from lazyproc.run.declared import Declared

log = logging.getLogger("lazyproc")


@contextlib.contextmanager
def locked(declared: Declared) -> Iterator[RunLock | None]:
    """Hold the run's lock, if there is a file to lock; settle a change that was cut off by a death."""
    path = declared.place.lock_path
    if path is None:
        with writing(declared.place.path, "the results"):
            yield None
        return
    with RunLock(path) as lock:
        if isinstance(declared.place, HandlePlace):
            finish_pending(declared.place.handle.file, path)
        elif recover(path):
            log.warning("%s: a change that was cut off has been settled", path)
        with writing(path, "the results"):
            flush_guarded(handles_of(declared))
            remove_leftovers(path, target_file(declared))
            yield lock


def with_lock(declared: Declared, kernel: Kernel, lock: RunLock | None) -> tuple[Declared, Kernel]:
    """Return the same, with what the lock file tells: of the driver before, and from now on of this one."""
    if lock is None:
        return declared, kernel
    if lock.died_calling:
        log.warning(
            "%s: the run on this file before was ended, or lost worker processes, within a function; it is called in "
            "worker processes only now, if it can be sent there",
            declared.process_name,
        )
    return replace(declared, apart=lock.died_calling), replace(kernel, around=lock.calling)


def target_file(declared: Declared) -> h5py.File | None:
    """Return the file of the results if the caller has it open."""
    return declared.place.handle.file if isinstance(declared.place, HandlePlace) else None


def flush_for_views(declared: Declared) -> None:
    """Write out what the caller's handle holds back, since a view reads the file: guarded where the run's lock is free.

    Rows that are read as bytes have their place; to write out the index of chunked ones may change the structure.
    """
    if isinstance(declared.source, ExtentSource):
        write_out(declared.main, declared.source)
    elif declared.main_path is None and declared.main.file.mode != "r":
        try:
            with locked(declared):
                pass
        except (FileBusyError, LockingError, NoRoomError, ReadOnlyFileError) as error:
            log.info("%s: written out without an undo journal (%s)", declared.label, error)
        declared.flush_main()


def handles_of(declared: Declared) -> set[h5py.File]:
    """Return the files that the caller has open: what was changed there has to be on the disk before anything else."""
    target = {declared.place.handle.file} if isinstance(declared.place, HandlePlace) else set()
    return target | ({declared.main.file} if declared.main_path is None else set())
