"""The sidecar lock of a file with results, and the fence that keeps workers of a dead driver from writing.

Two small files lie beside the HDF5 file while a run goes on::

    .scan.h5.lazyproc-lock     the driver holds it exclusively (flock) for its whole run; tells who it is
    .scan.h5.lazyproc-fence    holds the id of the run that may write; a worker holds it shared while it writes

A new driver changes the fence while it holds it exclusively, so it waits for writes under way and no later write of an
older run gets through. A worker whose driver has died sees that the first file is no longer locked, and does not write.
A kill frees both locks at once, since flock belongs to the open file; the files may stay, and do no harm.
A worker that is stopped, or hangs, in the middle of a write holds the fence for as long as it does: a new driver is
refused then, after half a minute, since that write may still go on at any time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lazyproc.core.errors import FileBusyError, LazyprocError, ReadOnlyFileError

_WRITE_SECONDS = 30.0
"""How long to wait for writes under way, before the fence is changed."""

log = logging.getLogger("lazyproc")


class FencedError(LazyprocError):
    """A worker wanted to write for a run that is over; nothing was written."""


def sidecar(path: str, kind: str) -> str:
    """Return the name of a file beside `path`: hidden, and named after it."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}.lazyproc-{kind}")


@dataclass(frozen=True)
class Fence:
    """What a worker needs to know whether it may write.

    Attributes
    ----------
    lock_path, fence_path : str
        The two sidecar files.
    run_id : str
        The run that the worker works for.
    """

    lock_path: str
    fence_path: str
    run_id: str

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Hold the right to write for as long as the context lasts.

        Raises
        ------
        FencedError
            If another run has the file now, or the driver of this run is gone.
        """
        try:
            descriptor = os.open(self.fence_path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise FencedError(f"The run {self.run_id} is over: {self.fence_path} is gone.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace")
            if owner != self.run_id:
                raise FencedError(f"The run {self.run_id} is over: the file belongs to the run {owner or 'of nobody'}.")
            if not _is_locked(self.lock_path):
                raise FencedError(f"The run {self.run_id} is over: its driver is gone.")
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # by itself: a process forked meanwhile may keep the file open
            os.close(descriptor)


def _is_locked(path: str) -> bool:
    """Tell whether somebody holds the lock exclusively; the question itself holds it shared for a moment."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def holder(path: str) -> dict[str, Any] | None:
    """Tell who computes on the results in `path` now: host, pid, since when, run id; None if nobody does."""
    lock_path = sidecar(path, "lock")
    if not os.path.exists(lock_path) or not _is_locked(lock_path):
        return None
    return _read_holder(lock_path)


def _read_holder(lock_path: str) -> dict[str, Any]:
    try:
        with open(lock_path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError):
        return {}


class RunLock:
    """The right of one driver to compute into one HDF5 file.

    Parameters
    ----------
    path : str
        The HDF5 file with the results.
    run_id : str
        The id of the run.

    Notes
    -----
    Taken by `acquire`, given back by `release` or by the end of the process, however it ends. One driver a file:
    a second one is refused at once, in the same process too.
    """

    def __init__(self, path: str, run_id: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        self.fence = Fence(sidecar(path, "lock"), sidecar(path, "fence"), run_id)

    def acquire(self) -> None:
        """Take the lock and let only this run's workers through the fence.

        Raises
        ------
        FileBusyError
            If another run has it; says who, where and since when. If a worker of an earlier run does not get done
            with its write.
        ReadOnlyFileError
            If the sidecar files cannot be made.
        """
        try:
            self._descriptor = self._lock_owner_file()
            about = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "run_id": self.fence.run_id,
            }
            _overwrite(self._descriptor, json.dumps(about))
            self._set_fence(self.fence.run_id)
        except BaseException as error:
            with suppress(OSError):
                self.release()
            if isinstance(error, FileBusyError) or not isinstance(error, OSError):
                raise
            raise ReadOnlyFileError(
                f"{self._path}: the lock file {self.fence.lock_path} cannot be written ({error.strerror}). Results "
                "need a folder that can be written: give h5_target_group in another file."
            ) from error

    def _lock_owner_file(self) -> int:
        # A worker's question holds the lock shared for microseconds: try a few times before believing in a holder.
        for _ in range(20):
            descriptor = os.open(self.fence.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                time.sleep(0.01)
                continue
            except OSError as error:
                os.close(descriptor)
                raise FileBusyError(
                    f"{self._path}: the file system does not lock files ({error.strerror}), so lazyproc cannot make "
                    "sure that nobody else computes here. Put the results on a file system with flock."
                ) from error
            if _same_file(descriptor, self.fence.lock_path):
                return descriptor
            os.close(descriptor)  # its last holder removed the file between our open and our lock
        about = _read_holder(self.fence.lock_path)
        raise FileBusyError(
            f"{self._path}: another run is computing into this file: host {about.get('host', 'unknown')}, pid "
            f"{about.get('pid', 'unknown')}, since {about.get('since', 'unknown')}. Wait for it, or stop it; its "
            "finished blocks are kept."
        )

    def _set_fence(self, text: str) -> None:
        descriptor = os.open(self.fence.fence_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            deadline = time.monotonic() + _WRITE_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise FileBusyError(
                            f"{self._path}: a worker has been writing for more than {_WRITE_SECONDS:g} s: it is "
                            f"stopped, or its file system hangs, and may go on at any time. End it; `fuser -v "
                            f"{self.fence.fence_path}` shows its process."
                        ) from error
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
            os.unlink(self.fence.fence_path)
            os.unlink(self.fence.lock_path)
        except FileNotFoundError:
            pass
        except FileBusyError as error:  # the files stay, so that the next run waits at the fence, too
            log.warning(str(error))
        finally:
            os.close(self._descriptor)
            self._descriptor = None


def _overwrite(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _same_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
