"""Does another machine see what is written to the results' file here, and the other way round, and its locks? A trial.

Tried beside the results, on a small file that both write at once, as workers will do with rows of the results::

    worker      passes the fence: so it sees the driver's lock, and now holds its own
                reads the file, so that it may keep the page; writes "here" to its place
    driver      sees all of them; must not get through the fence now: so it sees the workers' lock
                writes "here" to its own place
    worker      sees it; writes "done" to its place, through the file that it has had open all along
    driver      sees all of them done, and its own mark still there: nobody has written back an old page

Each waits for the other by looking, for a few seconds. What is missing is said, and the driver writes all results.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from lazyproc.hdf5.file_id import FileId, this_machine
from lazyproc.hdf5.lock import Fence, FencedError
from lazyproc.hdf5.locking import lock
from lazyproc.hdf5.sidecar import HANDSHAKE, open_sidecar, sidecar

_MARK_BYTES = 8
_NOTHING, _HERE, _DONE, _GIVEN_UP = b"nothing ", b"here    ", b"done    ", b"given up"
_LOOK_SECONDS = 0.01
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class SharedFileTrial:
    """The trial on the results' file. Small; travels to workers.

    Attributes
    ----------
    results : str
        The file with the results.
    file_id : FileId
        Which file that is.
    fence : Fence
        Of the run.
    path : str
        The small file beside it.
    patience : float
        Seconds that each waits for the other.
    """

    results: str
    file_id: FileId
    fence: Fence
    path: str
    patience: float = _PATIENCE_SECONDS

    @classmethod
    def of(cls, results: str, file_id: FileId, fence: Fence) -> SharedFileTrial:
        """Return the trial on a file."""
        return cls(results, file_id, fence, sidecar(results, HANDSHAKE))

    # -- on any machine ----------------------------------------------------------------------------------------------

    def machine(self) -> str:
        """Return this machine, if it has the file under the same path, and may write to it; else nothing."""
        try:
            seen = self.file_id.fits(os.stat(self.results)) and os.access(self.results, os.R_OK | os.W_OK)
        except OSError:
            return ""
        return this_machine() if seen else ""

    # -- on another machine than the driver's ------------------------------------------------------------------------

    def answer(self, place: int) -> str:
        """Do the worker's part at a place of its own, 1 or more; return what went wrong, nothing if it went well."""
        try:
            with self.fence.passed():
                descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    os.pread(descriptor, os.fstat(descriptor).st_size, 0)
                    _write(descriptor, place, _HERE)
                    if not self._wait(lambda: self._marks()[0] != _NOTHING):
                        return "it does not see what the driver writes"
                    if self._marks()[0] != _GIVEN_UP:  # the driver knows why
                        _write(descriptor, place, _DONE)
                finally:
                    os.close(descriptor)
        except FencedError as error:
            return f"it does not see the driver's locks, or not in time ({error})"
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    # -- in the driver -----------------------------------------------------------------------------------------------

    def begin(self, n_places: int) -> None:
        """Make the small file, with places for the driver and so many workers."""
        descriptor = open_sidecar(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.pwrite(descriptor, _NOTHING * (n_places + 1), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def meet(self, n_places: int, given_up: Callable[[], bool]) -> str:
        """Do the driver's part until the workers are told to go on; return what went wrong, nothing if it went well."""
        wanted, wrong = [_HERE] * n_places, ""
        if not self._wait(lambda: self._marks()[1:] == wanted or given_up()) or self._marks()[1:] != wanted:
            wrong = "what its workers write is not seen here"
        elif self._fence_is_open():
            wrong = "the locks of its workers are not seen here"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _write(descriptor, 0, _GIVEN_UP if wrong else _HERE)
        finally:
            os.close(descriptor)
        return wrong

    def check(self, n_places: int) -> str:
        """Look, once the workers have said that they are done, whether all that was written is there."""
        if self._marks() != [_HERE] + [_DONE] * n_places:
            return "what several machines write to one page of the file is not all there"
        return ""

    def end(self) -> None:
        """Remove the small file."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def _fence_is_open(self) -> bool:
        descriptor = os.open(self.fence.fence_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return lock(descriptor, self.fence.fence_path, self.fence.locking, exclusive=True)
        finally:
            os.close(descriptor)

    def _marks(self) -> list[bytes]:
        """Return what stands at the places; opened afresh, since that is when file systems in a network look again."""
        with open(self.path, "rb") as file:
            marks = file.read()
        return [marks[start : start + _MARK_BYTES] for start in range(0, len(marks), _MARK_BYTES)]

    def _wait(self, happened: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + self.patience
        while not happened():
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True


def _write(descriptor: int, place: int, mark: bytes) -> None:
    os.pwrite(descriptor, mark, place * _MARK_BYTES)
    os.fsync(descriptor)
