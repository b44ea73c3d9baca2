"""Change the structure of a file through an open handle so that a death in the middle can be undone.

While a guard lasts, an undo journal lies beside the file (see `lazyproc.hdf5.undo`). Guards may lie within each other,
as when a hook runs another process on the same file: what the inner one has finished is then kept, whatever becomes of
the outer one.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import h5py

from lazyproc.core.errors import JournalError, NoRoomError
from lazyproc.core.runs import Runs
from lazyproc.hdf5.damage import address_of
from lazyproc.hdf5.durable import sync_data
from lazyproc.hdf5.end import check_end
from lazyproc.hdf5.extents import using
from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.raw_bytes import Ranges, RawBytes, Rewritten
from lazyproc.hdf5.room import writing
from lazyproc.hdf5.session import session_of
from lazyproc.hdf5.settled import datasets_below, is_settled
from lazyproc.hdf5.superblock import SUPERBLOCK_BYTES
from lazyproc.hdf5.undo import refuse_pending
from lazyproc.hdf5.undo_journal import drop_undo, kept_fresh, load_undo, read_ranges, write_undo
from lazyproc.hdf5.unmark import take_back

LARGEST = 256 * 2**20
"""Bytes of metadata: of more no journal is kept."""
_MOST_TRIES = 3
"""Times that a flush may show more to be flushed."""

log = logging.getLogger("lazyproc")

_GUARDED: ContextVar[Mapping[str, _Guard]] = ContextVar("lazyproc_guarded", default={})  # noqa: B039
"""The files that are guarded in this thread, by their paths."""


@contextmanager
def guarded(
    files: Iterable[h5py.File],
    results: Iterable[h5py.Group | h5py.Dataset] = (),
    rows: Runs | None = None,
    n_rows: int = -1,
    own: Iterable[str] = (),
) -> Iterator[None]:
    """Change open files so that a death before the end of the context can be undone; flushed and synced at the end.

    Parameters
    ----------
    files : iterable of h5py.File
        Those that may be changed. The ones open for reading only are passed over.
    results : iterable of h5py.Group and h5py.Dataset
        Datasets that were there before and are written to, and groups with such datasets: compressed chunks of theirs
        are kept, too.
    rows : Runs, optional
        The rows that are written, of those datasets that have `n_rows` rows. Default: any.
    n_rows : int
        See `rows`.
    own : iterable of str
        Paths in the files of groups that are made or changed, which carry no id of a run: the journal tells of them,
        so that nobody takes them for the work of another program. Those of `results` need not be named.

    Raises
    ------
    JournalError
        If a change of one of them, by a process that died, has not been undone yet. Nothing was written.

    Notes
    -----
    The caller holds the run's lock. Raw data of datasets that were there before are not undone, but for those that a
    death would leave unreadable; so a status mask that tells of what is written here is to be set afterwards. What
    other threads write through the same handles meanwhile may be undone, too. An error in the context undoes nothing:
    HDF5 still knows what it has in memory, and writes that. Without a file on disk, or with more than 256 MiB of
    metadata, nothing can be promised; the log says so.
    """
    written = list(results)
    datasets, names = _below(written), {*own, *_names(written)}
    with ExitStack() as stack:
        for file in _writable(files):
            path = real_path(file)
            if path is None:
                stack.enter_context(_unguarded(file))
            else:
                rewritten = _rewritten(file, datasets, rows, n_rows)
                stack.enter_context(_guard_of(_Guard(file, path, RawBytes(), rewritten, logging.WARNING, names)))
        yield


def flush_guarded(files: Iterable[h5py.File]) -> None:
    """Flush and sync open files so that a death meanwhile can be undone; the caller holds the run's lock."""
    with guarded(file for file in files if file and real_path(file) is not None):
        pass


def _below(results: Iterable[h5py.Group | h5py.Dataset]) -> list[h5py.Dataset]:
    return [dataset for one in results for dataset in datasets_below(one)]


def _names(results: Iterable[h5py.Group | h5py.Dataset]) -> set[str]:
    return {str(one.name) for one in results if one}


def finish_pending(file: h5py.File, path: str) -> None:
    """Have HDF5 write what it could not write before, as when the disk was full; refuse what waits of others.

    Parameters
    ----------
    file : h5py.File
        Open for writing.
    path : str
        The file on disk; the caller holds the run's lock.

    Raises
    ------
    JournalError
        If a change by a process that died, or by another opening of the file, has not been undone yet; or HDF5 cannot
        write it even now.
    NoRoomError
        If there is still no room.
    """
    journal = load_undo(path)
    if journal is not None and file.mode != "r" and journal.session == session_of(file):
        try:
            with writing(path, "what was to be written before"):
                file.flush()
                file.flush()
                take_back(file)
                sync_data(file.id.get_vfd_handle())
        except NoRoomError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # HDF5 2.0 can never flush again, once it could not
            raise JournalError(
                f"{path}: a change could not be written before, as when the disk is full, and HDF5 cannot write it "
                f"now ({error}). Nothing was computed. End this program, or restart the notebook's kernel; then run "
                f"'lazyproc recover {path}', which takes the change back, and go on."
            ) from error
        drop_undo(path)
    refuse_pending(path, locked=True)


def _rewritten(file: h5py.File, datasets: Iterable[h5py.Dataset], rows: Runs | None, n_rows: int) -> Rewritten:
    addresses = frozenset(address_of(dataset) for dataset in datasets if dataset.file == file)
    return Rewritten(addresses, Runs.empty() if rows is None else rows, -1 if rows is None else n_rows)


def _writable(files: Iterable[h5py.File]) -> list[h5py.File]:
    """Return those open for writing, one of each."""
    found = {real_path(file) or id(file): file for file in files if file and file.mode != "r"}
    return list(found.values())


@contextmanager
def _unguarded(file: h5py.File) -> Iterator[None]:
    log.warning("%s: no plain file on disk: a death while its structure is changed may damage it", file.filename)
    yield
    if file:
        file.flush()


@contextmanager
def _guard_of(guard: _Guard) -> Iterator[_Guard]:
    """Hold a guard, or the outer one that there is for its file already."""
    outer = _GUARDED.get().get(guard.path)
    if outer is not None:
        outer.add_own(guard)
        try:
            yield outer
        finally:
            outer.end()
            outer.begin()
        return
    guard.begin()
    before = _GUARDED.set({**_GUARDED.get(), guard.path: guard})
    try:
        yield guard
    finally:
        _GUARDED.reset(before)
        guard.end()


class _Guard:
    """The undo journal of one open file."""

    def __init__(
        self, file: h5py.File, path: str, raw: RawBytes, rewritten: Rewritten, level: int, own: set[str]
    ) -> None:
        self._file = file
        self.path = path
        self._level = level
        self._own = own
        self._raw = raw
        self._rewritten = rewritten
        self._fresh = ExitStack()
        self._kept: Ranges | None = None
        self._state = (0, 0)

    def add_own(self, inner: _Guard) -> None:
        """Tell from the next time on of what an inner guard is for, too."""
        self._own = self._own | inner._own

    def begin(self) -> None:
        """Keep the metadata as they are now.

        What the caller has changed and HDF5 holds back yet comes first. Writing it changes the file's structure, too,
        so the metadata on the disk are kept meanwhile; if that has changed them, they are kept anew.
        """
        with using(self.path, "its structure"):
            self._begin()
            try:
                self._check_end()
            except BaseException:
                self._settle()
                raise

    def _check_end(self) -> None:
        if self._file:
            descriptor = self._file.id.get_vfd_handle()
            size = os.fstat(descriptor).st_size
            check_end(self._file, os.pread(descriptor, SUPERBLOCK_BYTES, 0), size, self.path)

    def _begin(self) -> None:
        if self._file:
            finish_pending(self._file, self.path)
            take_back(self._file)  # which may have been flushed by a hook
        for _ in range(_MOST_TRIES):
            self._keep()
            if self._kept is None or not self.changed():
                return
            self._settle()
            self._raw.forget()
        self._keep()

    def _keep(self) -> None:
        self._kept = None
        if not self._file:
            return
        descriptor = self._file.id.get_vfd_handle()
        size = os.fstat(descriptor).st_size
        kept = self._raw.metadata(self._file, size, self._rewritten)
        n_bytes = int((kept[:, 1] - kept[:, 0]).sum())
        if n_bytes > LARGEST:
            log.log(
                self._level,
                "%s: %d MiB of metadata and unused space are too many to be kept: a death while the file's structure "
                "is changed may damage it",
                self.path,
                n_bytes // 2**20,
            )
            return
        write_undo(self.path, descriptor, size, kept, session_of(self._file), self._own)
        self._kept = kept
        self._state = self._state_of(descriptor, kept)
        self._fresh.enter_context(kept_fresh(self.path))

    def end(self) -> None:
        """Make the changes durable and drop the journal. It stays if HDF5 cannot write them."""
        try:
            self._settle()
        except Exception:  # HDF5 could not write: to ask it again at once brings it out of step
            raise
        except BaseException:
            self._settle()  # an interrupt that comes late must not leave a journal for what has been done
            raise

    def _settle(self) -> None:
        try:
            if self._file:
                self._sync()
        finally:
            self._fresh.close()
        if self._kept is not None:
            drop_undo(self.path)

    def changed(self) -> bool:
        """Tell whether any metadata have changed since the beginning."""
        if self._kept is None or not self._file:
            return True
        with using(self.path, "its structure"):
            return self._state_of(self._sync(), self._kept) != self._state

    def _sync(self) -> int:
        """Flush down to the disk; return the file's descriptor."""
        self._file.flush()
        self._file.flush()  # the first one may free space at the end of the file, and the second one cut it off
        descriptor = int(self._file.id.get_vfd_handle())
        with using(self.path, "its structure"):
            take_back(self._file)
            sync_data(descriptor)
        return descriptor

    @staticmethod
    def _state_of(descriptor: int, ranges: Ranges) -> tuple[int, int]:
        checksum = 0
        for _, piece in read_ranges(descriptor, ranges):
            checksum = zlib.crc32(piece, checksum)
        return os.fstat(descriptor).st_size, checksum


class BatchGuards:
    """Guards for the batches of a loop, in which mostly nothing but raw data of datasets is written.

    A batch is guarded if it is the first or the last one, if the last one that was guarded has changed metadata, or if
    a dataset may have to grow or move: one that is chunked, compressed or not allocated yet.
    """

    def __init__(self) -> None:
        self._raw: dict[str, RawBytes] = {}
        self._changes: dict[str, bool] = {}

    @contextmanager
    def batch(
        self,
        files: Iterable[h5py.File],
        results: Iterable[h5py.Group | h5py.Dataset],
        rows: Runs,
        n_rows: int,
        last: bool,
    ) -> Iterator[None]:
        """Guard the writing of a batch; files that need it are flushed and synced at the end.

        Parameters
        ----------
        files : iterable of h5py.File
            Those that may be written to.
        results : iterable of h5py.Group and h5py.Dataset
            What is written to: datasets, and groups with all below them.
        rows, n_rows
            The positions of the batch, and how many there are in all.
        last : bool
            Whether it is the last one.
        """
        written = list(results)
        datasets, names = _below(written), _names(written)
        with ExitStack() as stack:
            for file in _writable(files):
                inside = [dataset for dataset in datasets if dataset.file == file]
                settled = all(is_settled(dataset) for dataset in inside)
                path = real_path(file)
                if path is None or (settled and not last and not self._changes.get(path, True)):
                    continue
                rewritten = _rewritten(file, inside, rows, n_rows)
                raw = self._raw.setdefault(path, RawBytes())
                guard = _Guard(file, path, raw, rewritten, logging.DEBUG, names)
                stack.enter_context(self._observed(guard, settled))
            yield

    @contextmanager
    def _observed(self, guard: _Guard, settled: bool) -> Iterator[None]:
        """Hold a guard, and see whether it was needed."""
        with _guard_of(guard) as held:
            yield
            self._changes[guard.path] = not settled or held.changed()
