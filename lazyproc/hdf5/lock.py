"""The sidecar lock of a file with results, and the fence that keeps workers of a dead driver from writing.

Two small files lie beside the HDF5 file while a run goes on::

    .scan.h5.lazyproc-lock     the driver holds it exclusively for its whole run; tells who it is
    .scan.h5.lazyproc-fence    holds the id of the run that may write; a worker holds it shared while it writes

A new driver changes the fence while it holds it exclusively, so it waits for writes under way and no later write of an
older run gets through. A worker whose driver has died sees that the first file is no longer locked, and does not write.
A kill frees both locks at once, since they belong to the open files (see `lazyproc.hdf5.locking`); the files may stay,
and do no harm. Where files are not locked at all, the first file alone keeps others away, workers do not write, and a
file that was left behind on another host has to be removed by hand.

The last character but one of the first file tells whether the driver is calling the function itself at this moment. If
it dies just then, which code of other languages can bring about, the next driver knows, and leaves the calls to
worker processes.

A worker that is stopped, or hangs, in the middle of a write holds the fence for as long as it does: a new driver is
refused then, after half a minute, since that write may still go on at any time.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lazyproc.core.errors import FileBusyError, LazyprocError, LockingError, MissingFileError, ReadOnlyFileError
from lazyproc.hdf5.holder import TIME, is_alive, is_held, is_locked, read_holder, say_who
from lazyproc.hdf5.locking import FLOCK, KINDS, NONE, lock, lock_inode, locking, unlock
from lazyproc.hdf5.room import full_code, no_room
from lazyproc.hdf5.sidecar import CLAIMS, FENCE, HANDSHAKE, LOCK, file_beside, open_sidecar, sidecar

_CALLING = "calling"
_WRITE_SECONDS = 30.0
"""How long to wait for writes under way, before the fence is changed."""

log = logging.getLogger("lazyproc")


class FencedError(LazyprocError):
    """A worker wanted to write for a run that is over; nothing was written."""


@dataclass(frozen=True)
class Fence:
    """What a worker needs to know whether it may write.

    Attributes
    ----------
    lock_path, fence_path : str
        The two sidecar files.
    run_id : str
        The run that the worker works for.
    locking : str
        How the driver locks files.
    """

    lock_path: str
    fence_path: str
    run_id: str
    locking: str = FLOCK

    @property
    def holds_workers(self) -> bool:
        """Whether it holds back workers of a run that is over; if not, only the driver may write."""
        return self.locking != NONE

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Hold the right to write for as long as the context lasts.

        Raises
        ------
        FencedError
            If another run has the file now, or the driver of this run is gone.
        MissingFileError
            If the file with the results is not there: a machine that does not see it, or it was removed.
        """
        try:
            descriptor = open_sidecar(self.fence_path, os.O_RDONLY)
        except FileNotFoundError as error:
            if not os.path.exists(path := file_beside(self.fence_path)):
                raise MissingFileError(
                    f"{path}: there is no such file on the machine {socket.gethostname()}; expected the one with the "
                    "results, which workers write to."
                ) from error
            raise FencedError(f"The run {self.run_id} is over: {self.fence_path} is gone.") from error
        try:
            lock(descriptor, self.fence_path, self.locking, exclusive=False, wait=True)
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace")
            if owner != self.run_id:
                raise FencedError(f"The run {self.run_id} is over: the file belongs to the run {owner or 'of nobody'}.")
            if self.holds_workers and not is_locked(self.lock_path, self.locking):
                raise FencedError(f"The run {self.run_id} is over: its driver is gone.")
            yield
        finally:
            with suppress(OSError):
                unlock(descriptor, self.locking)  # by itself: a process forked meanwhile may keep the file open
            os.close(descriptor)


class RunLock:
    """The right of one driver to compute into one HDF5 file.

    Parameters
    ----------
    path : str
        The HDF5 file with the results.
    run_id : str, optional
        The id of the run. Default: a new one.

    Attributes
    ----------
    died_calling : bool
        Whether the driver that had the lock before died while it called the function itself; known once it is taken.

    Notes
    -----
    Taken by `acquire`, given back by `release` or by the end of the process, however it ends; a ``with`` does both. One
    driver a file: a second one is refused at once, in the same process too.
    """

    def __init__(self, path: str, run_id: str | None = None) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._inode: int | None = None
        self._calling = threading.Lock()
        self._n_calls = self._place_of_calls = 0
        self._is_suspect = False
        self.died_calling = False
        self.fence = Fence(sidecar(path, LOCK), sidecar(path, FENCE), run_id or uuid.uuid4().hex, locking())

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock and let only this run's workers through the fence.

        Raises
        ------
        FileBusyError
            If another run has it; says who, where and since when. If a worker of an earlier run does not get done
            with its write.
        LockingError
            If the file system cannot lock files.
        ReadOnlyFileError
            If the sidecar files cannot be made.
        NoRoomError
            If the disk is full.
        """
        at_fence = False
        try:
            self._descriptor = self._lock_owner_file() if self.fence.holds_workers else self._make_owner_file()
            self._lock_all_names()
            self.died_calling = self.died_calling or _was_calling(read_holder(self.fence.lock_path))
            about = self._about()
            self._place_of_calls = len(about.encode()) - 2
            _overwrite(self._descriptor, about)
            at_fence = True
            self._set_fence(self.fence.run_id)
        except BaseException as error:
            if at_fence and (isinstance(error, FileBusyError) or not isinstance(error, Exception)):
                self._let_go()  # not to wait at the fence once more: the files stay, so that the next run waits, too
            else:
                with suppress(OSError):
                    self.release()
            if isinstance(error, LazyprocError) or not isinstance(error, OSError):
                raise
            if (code := full_code(error)) is not None:
                raise no_room(self._path, f"the lock file {self.fence.lock_path}", code) from error
            raise ReadOnlyFileError(
                f"{self._path}: the lock file {error.filename or self._named()} cannot be written "
                f"({error.strerror}). Results need a folder that can be written, with nothing else of this name in it: "
                "remove that, or give h5_target_group in another file."
            ) from error

    def _named(self) -> str:
        return f"{self.fence.lock_path}, or {self.fence.fence_path},"

    def _about(self) -> str:
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": time.strftime(TIME),
                "run_id": self.fence.run_id,
                "locking": self.fence.locking,
                _CALLING: 0,  # the last one: see `calling`
            }
        )

    def suspect(self) -> None:
        """Have the next driver know, when this one has given the lock back, that the function ends processes."""
        self._is_suspect = self.fence.holds_workers  # else a lock file that stays keeps everybody away

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Tell, for as long as the context lasts, that this process calls the function itself. From any thread."""
        self._tell_calls(1)
        try:
            yield
        finally:
            self._tell_calls(-1)

    def _tell_calls(self, more: int) -> None:
        with self._calling, suppress(OSError):  # it is worth nothing that anything else should fail
            before, self._n_calls = self._n_calls, self._n_calls + more
            if self._descriptor is not None and not (before and self._n_calls):
                os.pwrite(self._descriptor, b"1" if self._n_calls else b"0", self._place_of_calls)

    def _lock_owner_file(self) -> int:
        lock_path = self.fence.lock_path
        # A worker's question holds the lock shared for microseconds: try a few times before believing in a holder.
        for _ in range(20):
            descriptor = open_sidecar(lock_path, os.O_RDWR | os.O_CREAT)
            try:
                taken = lock(descriptor, self._path, self.fence.locking, exclusive=True)
                if taken and _same_file(descriptor, lock_path):
                    self._refuse_other_kind()
                    return descriptor
            except BaseException as error:
                if isinstance(error, LockingError) and not os.fstat(descriptor).st_size:
                    os.unlink(lock_path)  # we have made it
                os.close(descriptor)
                raise
            os.close(descriptor)  # held; or its last holder removed the file between our open and our lock
            if not taken:
                time.sleep(0.01)
        raise self._busy()

    def _lock_all_names(self) -> None:
        """Keep away a run that uses another name of the same file: it would look for other files beside it."""
        if not self.fence.holds_workers or not os.path.exists(self._path) or os.stat(self._path).st_nlink < 2:
            return
        self._inode = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        if not lock_inode(self._inode):
            raise FileBusyError(
                f"{self._path}: another run is computing into this file by another of its names: it has hard links. "
                "Wait for it, or stop it; its finished blocks are kept. Always use the same name."
            )
        log.warning(
            "%s: the file has several names (hard links). Always use this one: what a killed run leaves to be "
            "recovered from lies beside it, and is not found by another name",
            self._path,
        )

    def _refuse_other_kind(self) -> None:
        """Raise if a run holds the file by a lock of another kind, which does not keep ours away."""
        about = read_holder(self.fence.lock_path)
        if about and about.get("locking", FLOCK) != self.fence.locking and is_held(self.fence.lock_path, about):
            raise self._busy()

    def _make_owner_file(self) -> int:
        """Make the lock file where files are not locked: whoever makes it has it; one of the dead is removed."""
        lock_path = self.fence.lock_path
        for _ in range(20):
            with suppress(FileExistsError):
                descriptor = open_sidecar(lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                log.warning("%s: no locks: nothing keeps other programs from writing into this file", self._path)
                return descriptor
            about = read_holder(lock_path)
            if about and is_held(lock_path, about):
                raise self._busy()
            if about:
                self.died_calling = _was_calling(about)
                _remove(lock_path, about)
            else:
                time.sleep(0.01)  # just being written, or removed
        raise self._busy()

    def _busy(self) -> FileBusyError:
        """Say who has the lock."""
        about = read_holder(self.fence.lock_path) or {}
        here = about.get("host") == socket.gethostname()
        hint = "Wait for it, or stop it; its finished blocks are kept."
        unknown = about.get("locking", FLOCK) not in KINDS
        if unknown or (NONE in (self.fence.locking, about.get("locking")) and not here):
            hint += f" If it is gone, remove {self.fence.lock_path}: without locks that cannot be seen from here."
        elif about.get("locking", FLOCK) != NONE and here and not is_alive(about):
            hint = "That process is gone, but one that was forked from it still holds the lock: end it."
        return FileBusyError(f"{self._path}: {say_who(about)}. {hint}")

    def _set_fence(self, text: str) -> None:
        descriptor = open_sidecar(self.fence.fence_path, os.O_RDWR | os.O_CREAT)
        try:
            deadline = time.monotonic() + _WRITE_SECONDS
            while not lock(descriptor, self._path, self.fence.locking, exclusive=True):
                if time.monotonic() > deadline:
                    raise FileBusyError(
                        f"{self._path}: a worker has been writing for more than {_WRITE_SECONDS:g} s: it is stopped, "
                        f"or its file system hangs, and may go on at any time. End it; `fuser -v "
                        f"{self.fence.fence_path}` shows its process."
                    )
                time.sleep(0.005)
            _overwrite(descriptor, text)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Close the fence for this run's workers, then give the lock back and remove both files."""
        if self._descriptor is None:
            return
        try:
            self._set_fence("")
            with suppress(FileNotFoundError):
                os.unlink(self.fence.fence_path)
            for kind in (CLAIMS, HANDSHAKE):  # if a driver was killed that had a cluster
                with suppress(OSError):
                    os.unlink(sidecar(self._path, kind))
            if self._is_suspect:
                os.pwrite(self._descriptor, b"1", self._place_of_calls)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(self.fence.lock_path)
        except OSError as error:  # the files stay, so that the next run waits at the fence, too
            log.warning("%s: %s", self._path, error)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Give the lock back, and leave the files as they are."""
        with self._calling:  # a thread that was not waited for may still tell something
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
        if self._inode is not None:
            os.close(self._inode)
            self._inode = None


def _was_calling(about: dict[str, Any] | None) -> bool:
    return about is not None and about.get(_CALLING) == 1


def _overwrite(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    if text:
        os.pwrite(descriptor, text.encode(), 0)


def _remove(lock_path: str, about: dict[str, Any]) -> None:
    """Remove the lock file of a process that is gone, unless another run has taken it over meanwhile."""
    aside = f"{lock_path}-{os.getpid()}-{time.monotonic_ns()}"
    with suppress(FileNotFoundError):
        os.rename(lock_path, aside)
        if read_holder(aside) != about:
            with suppress(FileExistsError):
                os.link(aside, lock_path)
        os.unlink(aside)


def _same_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
