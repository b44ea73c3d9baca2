"""Transactions on HDF5 files: all or nothing, whatever dies; and the overlay that makes it possible."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyproc.core.errors import FileBusyError, JournalError
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.overlay import MOST_KEPT, Overlay
from lazyproc.hdf5.sidecar import sidecar
from lazyproc.hdf5.transaction import read_journal, recover, transaction

# -- the overlay against a plain run of bytes ------------------------------------------------------------------------

FURTHEST = 5 * 4096
places = st.one_of(st.integers(0, FURTHEST), st.sampled_from([0, 4095, 4096, 4097, 8192, 12288]))
pieces = st.tuples(st.sampled_from([b"\0", b"a", b"b"]), st.integers(0, 9000)).map(lambda pair: pair[0] * pair[1])
steps = st.one_of(
    st.tuples(st.just("write"), places, pieces),
    st.tuples(st.just("read"), places, st.integers(0, 9000)),
    st.tuples(st.just("truncate"), places, st.none()),
    st.tuples(st.just("append"), st.integers(0, 100), pieces),
)


class Model:
    """What a file is: bytes, zeros where nothing was written."""

    def __init__(self, content: bytes) -> None:
        self.bytes = bytearray(content)

    def write(self, place: int, data: bytes) -> None:
        if data:
            self.bytes.extend(bytes(max(0, place - len(self.bytes))))
            self.bytes[place : place + len(data)] = data

    def truncate(self, size: int) -> None:
        del self.bytes[size:]
        self.bytes.extend(bytes(size - len(self.bytes)))


@settings(max_examples=150, deadline=None)
@given(
    content=st.tuples(st.integers(0, 3 * 4096), st.integers(1, 255)).map(lambda pair: bytes([pair[1]]) * pair[0]),
    sequence=st.lists(steps, max_size=12),
)
def test_overlay_is_a_file(tmp_path_factory: pytest.TempPathFactory, content: bytes, sequence: list[Any]) -> None:
    path = tmp_path_factory.mktemp("overlay") / "file"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        overlay, model = Overlay(descriptor, str(path)), Model(content)
        for kind, place, what in sequence:
            _step(overlay, model, kind, place, what)
            assert overlay.seek(0, os.SEEK_END) == len(model.bytes)
        overlay.seek(0)
        assert overlay.readall() == model.bytes
        assert path.read_bytes() == content
        assert _applied(content, overlay) == model.bytes
    finally:
        os.close(descriptor)


def _step(overlay: Overlay, model: Model, kind: str, place: int, what: Any) -> None:
    if kind == "truncate":
        assert overlay.truncate(place) == place
        model.truncate(place)
        return
    place = len(model.bytes) if kind == "append" else place
    assert overlay.seek(place) == place
    if kind == "read":
        assert overlay.read(what) == model.bytes[place : place + what]
    else:
        assert overlay.write(what) == len(what)
        assert overlay.tell() == place + len(what)
        model.write(place, what)


def test_what_is_added_is_not_copied_when_it_is_spilled_and_applied(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 4096)
    with open(tmp_path / "file", "r+b") as file, Overlay(file.fileno(), str(tmp_path / "file"), spills=True) as overlay:
        overlay.seek(4096)
        overlay.write(bytes([1]) * MOST_KEPT)
        tracemalloc.start()
        try:
            added = overlay.changes()[1]
            assert sum(len(data) for _, data in added) == MOST_KEPT
            assert tracemalloc.get_traced_memory()[1] < MOST_KEPT / 4
            del added
            tracemalloc.reset_peak()
            overlay.write(bytes([2]) * 4096)
            assert tracemalloc.get_traced_memory()[1] < MOST_KEPT / 2
        finally:
            tracemalloc.stop()
        assert overlay.has_spilled


def _applied(content: bytes, overlay: Overlay) -> bytes:
    """Do to a file what the changes say."""
    patches, added = overlay.changes()
    result = Model(content)
    for offset, old, new in patches:
        assert content[offset : offset + len(old)] == old
        assert len(old) == len(new)
        result.write(offset, new)
    for offset, data in added:
        assert offset >= len(content)
        result.write(offset, data)
    result.truncate(overlay.size)
    return bytes(result.bytes)


def test_overlay_holds_only_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    with open(path, "rb") as file:
        overlay = Overlay(file.fileno(), str(path))
        overlay.seek(20_000)
        overlay.write(bytes(64 * 4096))
        overlay.truncate(2**40)
        overlay.seek(9_998)
        overlay.write(b"yz?")
        assert overlay.changes() == ([(9_998, b"xx", b"yz")], [(10_000, b"?" + bytes(3 * 4096 - 10_001))])


# -- transactions on real files --------------------------------------------------------------------------------------

PARENT = "Measurement_000/Channel_000"


def make_file(path: Path, n_siblings: int = 3, **how: Any) -> Path:
    """Write a file with raw data, contiguous, chunked and compressed neighbours, and a parent with siblings."""
    random = np.random.default_rng(5)
    with h5py.File(path, "w", **how) as file:
        parent = file.create_group(PARENT)
        parent.create_dataset("Raw_Data", data=random.integers(1, 99, (40, 6)))
        if n_siblings:
            parent.create_dataset("Chunked", data=random.standard_normal((30, 30)), chunks=(7, 11))
            parent.create_dataset("Zipped", data=random.integers(0, 5, (50, 50)), chunks=(20, 20), compression="gzip")
        for number in range(3, n_siblings + 1):
            parent.create_group(f"Sibling_{number:03d}").attrs["number"] = number
    return path


def add_results(file: h5py.File) -> None:
    """Create what a run creates: attributes, contiguous datasets allocated early, a mask of zeros."""
    group = file[PARENT].create_group("Raw_Data-Fit_000")
    group.attrs["source"] = file[PARENT]["Raw_Data"].ref
    group.attrs["parameters"] = "p" * 3000
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((1000, 3))
    h5py.h5d.create(group.id, b"Fit", h5py.h5t.IEEE_F64LE, space, creation)
    mask = group.create_dataset("completed_positions", shape=(9000,), dtype="u1")
    mask[...] = 0
    group.create_dataset("Values", data=np.arange(5000.0))


def has_results(file: h5py.File) -> bool:
    """Tell whether all of it is there; fails if only some of it is."""
    if "Raw_Data-Fit_000" not in file[PARENT]:
        return False
    group = file[PARENT]["Raw_Data-Fit_000"]
    assert file[group.attrs["source"]] == file[PARENT]["Raw_Data"]
    assert group.attrs["parameters"] == "p" * 3000
    assert group["Fit"].id.get_offset() is not None
    assert group["Fit"].shape == (1000, 3)
    assert not group["completed_positions"][:].any()
    assert (group["Values"][:] == np.arange(5000.0)).all()
    return True


def content_of(file: h5py.File) -> dict[str, Any]:
    """Read everything but the new results."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if "-Fit_" not in name:
            found[name] = (item[()].tobytes() if isinstance(item, h5py.Dataset) else None, dict(item.attrs))

    file.visititems(visit)
    return found


LAYOUTS: dict[str, dict[str, Any]] = {"plain": {}, "latest": {"libver": "latest"}, "userblock": {"userblock_size": 512}}


@pytest.mark.parametrize("n_siblings", [0, 3, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_before_the_end_and_everything_after(tmp_path: Path, n_siblings: int, layout: str) -> None:
    path = make_file(tmp_path / "scan.h5", n_siblings, **LAYOUTS[layout])
    before = path.read_bytes()
    with h5py.File(path) as file:
        content = content_of(file)
    with transaction(str(path)) as file:
        add_results(file)
        file.flush()
        assert has_results(file)
        assert path.read_bytes() == before
    with h5py.File(path) as file:
        assert content_of(file) == content
        assert has_results(file)
    assert os.listdir(tmp_path) == ["scan.h5"]


def test_an_error_inside_leaves_every_byte(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    before = path.read_bytes()

    def fail() -> None:
        with transaction(str(path)) as file:
            add_results(file)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["scan.h5"]


def test_many_transactions_one_after_the_other(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path) as file:
        content = content_of(file)
    for number in range(40):
        with transaction(str(path)) as file:
            file[PARENT].create_dataset(f"Raw_Data-Fit_{number:03d}", data=np.full(700, number))
    with h5py.File(path) as file:
        assert content_of(file) == content
        for number in range(40):
            assert (file[PARENT][f"Raw_Data-Fit_{number:03d}"][:] == number).all()


def test_bytes_left_behind_beyond_the_end_do_no_harm(tmp_path: Path) -> None:
    """So a transaction leaves the file that dies before its journal: longer, with whatever was written there."""
    path = make_file(tmp_path / "scan.h5")
    with open(path, "ab") as raw:
        raw.write(b"\xff" * 100_000)
    with transaction(str(path)) as file:
        add_results(file)
    with h5py.File(path) as file:
        assert has_results(file)
        assert (file[PARENT]["Raw_Data"][:] == np.random.default_rng(5).integers(1, 99, (40, 6))).all()


# -- others who have the file open -----------------------------------------------------------------------------------

HOLD = """
import sys, h5py
with h5py.File(sys.argv[1], sys.argv[2]) as file:
    data = file["Measurement_000/Channel_000/Raw_Data"]
    before = data[:].tobytes()
    print("open", flush=True)
    sys.stdin.readline()
    assert data[:].tobytes() == before
    assert file["Measurement_000/Channel_000/Zipped"][:].shape == (50, 50)
    print("good", flush=True)
"""


class Holder:
    """Another process that has the file open."""

    def __init__(self, path: Path, mode: str) -> None:
        command = [sys.executable, "-c", HOLD, str(path), mode]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "open"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def reads_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self._line() == "good"
        self.end()

    def end(self) -> None:
        self.process.communicate(timeout=60)


def test_readers_go_on(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    elsewhere = Holder(path, "r")
    with h5py.File(path, "r") as here:
        content = content_of(here)
        with transaction(str(path)) as file:
            add_results(file)
            with h5py.File(path, "r") as another:
                assert not has_results(another)
        assert content_of(here) == content
    elsewhere.reads_on()
    with h5py.File(path) as file:
        assert has_results(file)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_writers_are_not_disturbed(tmp_path: Path, where: str) -> None:
    path = make_file(tmp_path / "scan.h5")
    before = path.read_bytes()
    if where == "here":
        with h5py.File(path, "r+"), pytest.raises(FileBusyError, match="open for writing"), transaction(str(path)):
            pass
    else:
        holder = Holder(path, "r+")
        with pytest.raises(FileBusyError, match=r"scan\.h5.*open for writing"), transaction(str(path)):
            pass
        holder.end()
    assert path.read_bytes() == before


def test_writers_are_kept_out_meanwhile(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    open_for_writing = "import sys, h5py; h5py.File(sys.argv[1], 'r+')"
    with transaction(str(path)) as file:
        add_results(file)
        refused = subprocess.run([sys.executable, "-c", open_for_writing, path], capture_output=True, text=True)
        assert "unable to lock file" in refused.stderr
    subprocess.run([sys.executable, "-c", open_for_writing, path], check=True)


# -- death at every call of the system -------------------------------------------------------------------------------

CALLS = ("pwrite", "ftruncate", "fdatasync", "fsync", "unlink")


class Watched:
    """The system's calls, made for real; before, half-way through or after one of them something happens."""

    def __init__(self, at: int | None, moment: str, happens: Callable[[], None]) -> None:
        self.count = 0
        self.at, self.moment, self.happens = at, moment, happens
        self.originals = {name: getattr(os, name) for name in CALLS}

    def __enter__(self) -> Watched:
        for name in CALLS:
            setattr(os, name, self._watch(name, self.originals[name]))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, original in self.originals.items():
            setattr(os, name, original)

    def _watch(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.count += 1
            now = self.count == self.at
            if now and self.moment == "before":
                self.happens()
            if now and self.moment == "half" and name == "pwrite":
                descriptor, data, offset = args
                original(descriptor, data[: len(data) // 2], offset)
                self.happens()
            result = original(*args)
            if now and self.moment != "before":
                self.happens()
            return result

        return call


def change(path: str) -> None:
    with transaction(path) as file:
        add_results(file)


DIE = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_transaction as tools
path, n_siblings = Path(sys.argv[2]), int(sys.argv[3])
with tools.Watched(None, "", lambda: None) as watched:
    tools.change(str(tools.make_file(path, n_siblings)))
outcomes = []
for at in range(1, watched.count + 1):
    for moment in ("before", "half", "after"):
        path.unlink()
        tools.make_file(path, n_siblings)
        child = os.fork()
        if child == 0:
            with tools.Watched(at, moment, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                tools.change(str(path))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), (at, moment, status)
        outcomes.append(tools.inspect_after_death(path))
print(json.dumps(outcomes))
"""


def inspect_after_death(path: Path) -> list[Any]:
    """Look at a file whose transaction was killed: as lazyproc reads it, recovered, and after a second try."""
    with h5py.File(path.with_name("untouched.h5")) as untouched:
        content = content_of(untouched)
    files = Files()
    try:
        seen = files.open(str(path))
        assert seen.filename == str(path)
        assert content_of(seen) == content
        as_read = has_results(seen)
    finally:
        files.close()
    had_journal = read_journal(str(path)) is not None
    left = recover(str(path))
    with h5py.File(path) as file:
        assert content_of(file) == content
        recovered = has_results(file)
    assert recovered == as_read
    assert not recover(str(path))
    if not recovered:
        change(str(path))
        with h5py.File(path) as file:
            assert content_of(file) == content
            assert has_results(file)
    return [left, had_journal, recovered]


@pytest.mark.parametrize("n_siblings", [0, 3, 20])
def test_killed_at_every_call(tmp_path: Path, n_siblings: int) -> None:
    make_file(tmp_path / "untouched.h5", n_siblings)
    command = [sys.executable, "-c", DIE, os.path.dirname(__file__), str(tmp_path / "scan.h5"), str(n_siblings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    kinds = {tuple(outcome) for outcome in outcomes}
    assert (False, False, False) in kinds, "before the journal"
    assert (True, False, False) in kinds, "an incomplete journal is dropped"
    assert (True, True, True) in kinds, "a complete one is applied"
    assert (False, False, True) in kinds, "after its end"
    assert len(kinds) == 4, kinds
    flags = [outcome[2] for outcome in outcomes]
    assert flags == sorted(flags), "old until some moment, new from then on"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_interrupted_at_every_call(tmp_path: Path, error: BaseException, moment: str) -> None:
    """An error or Ctrl-C inside the commit leaves no journal: plain h5py opens the file, old to the byte, or new."""
    path = tmp_path / "scan.h5"

    def fail() -> None:
        raise error

    states = []
    before = make_file(path).read_bytes()
    with Watched(None, "", lambda: None) as watched:
        change(str(path))
    for at in range(1, watched.count + 1):
        path.write_bytes(before)
        with Watched(at, moment, fail), pytest.raises(type(error)):
            change(str(path))
        assert os.listdir(tmp_path) == ["scan.h5"], at
        with h5py.File(path) as file:
            states.append(has_results(file))
        assert states[-1] or path.read_bytes() == before, at
    assert states == sorted(states)
    assert {*states} == {False, True}


# -- power cuts: what was not synced may or may not be there ---------------------------------------------------------


class Recorded:
    """Records what is done to the file and to its journal, while it is done for real."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Path(sidecar(str(path), "journal"))
        self.log: list[tuple[str, str, Any]] = []
        self.originals = {name: getattr(os, name) for name in CALLS}

    def _role(self, descriptor: int) -> str:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        return {str(self.path): "file", str(self.journal): "journal", str(self.path.parent): "folder"}[target]

    def __enter__(self) -> Recorded:
        for name in CALLS:
            setattr(os, name, self._record(name, self.originals[name]))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, original in self.originals.items():
            setattr(os, name, original)

    def _record(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any) -> Any:
            role = "journal" if name == "unlink" else self._role(first)
            kind = "sync" if name in ("fdatasync", "fsync") else name
            self.log.append((kind, role, args))
            return original(first, *args)

        return call


def cut_power(log: list[tuple[str, str, Any]], random: np.random.Generator) -> list[tuple[str, str, Any]]:
    """Return what reaches the disk: all that was synced, and of the rest whatever the system happened to write."""
    kept = []
    for number, entry in enumerate(log):
        kind, role, _ = entry
        waits_for = ("sync", "folder" if kind == "unlink" else role)
        synced = any(later[:2] == waits_for for later in log[number + 1 :])
        if kind != "sync" and (synced or random.random() < 0.5):
            kept.append(entry)
    return kept


def replay(path: Path, base: bytes, log: list[tuple[str, str, Any]]) -> None:
    """Bring the file, in its inode, and the journal to the state that some entries of the log lead to."""
    journal = Path(sidecar(str(path), "journal"))
    journal.unlink(missing_ok=True)
    with open(path, "r+b") as file:
        file.truncate(0)
        file.write(base)
        file.flush()
        for kind, role, args in log:
            if kind == "unlink":
                journal.unlink(missing_ok=True)
            elif role == "journal" and kind == "pwrite":
                with open(journal, "ab") as raw:
                    raw.write(args[0])
            elif kind != "sync":
                getattr(os, kind)(file.fileno(), *args)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_power_cut_after_every_call(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    path = make_file(tmp_path / "scan.h5")
    before = path.read_bytes()
    with h5py.File(path) as file:
        content = content_of(file)
    with Recorded(path) as recorded:
        change(str(path))
    last = [entry[:2] for entry in recorded.log[-2:]]
    assert last == [("unlink", "journal"), ("sync", "folder")], "a journal must not come back once others write"
    for end in range(len(recorded.log) + 1):
        for _ in range(4):
            replay(path, before, cut_power(recorded.log[:end], random))
            recover(str(path))
            with h5py.File(path) as file:
                assert content_of(file) == content, f"seed {seed}, call {end}"
                state = has_results(file)
            assert state or end < len(recorded.log), "what has returned is durable"


# -- journals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A file whose transaction was killed right after its journal was complete; nothing was applied yet."""
    path = make_file(tmp_path / "scan.h5")
    before = path.read_bytes()
    with Recorded(path) as recorded:
        change(str(path))
    last = max(number for number, entry in enumerate(recorded.log) if entry[:2] == ("sync", "folder"))
    complete = min(number for number, entry in enumerate(recorded.log) if entry[:2] == ("sync", "folder"))
    assert complete < last
    replay(path, before, recorded.log[: complete + 1])
    assert read_journal(str(path))
    return path


def test_incomplete_journals_are_dropped(interrupted: Path) -> None:
    journal = Path(sidecar(str(interrupted), "journal"))
    whole = journal.read_bytes()
    before = interrupted.read_bytes()
    for torn in (b"", whole[:5], whole[:9], whole[: len(whole) // 2], whole[:-1], whole[:-1] + b"?"):
        journal.write_bytes(torn)
        assert read_journal(str(interrupted)) is None
        assert recover(str(interrupted))
        assert not journal.exists()
        assert interrupted.read_bytes() == before


def test_a_journal_of_another_file_is_refused(interrupted: Path) -> None:
    other = interrupted.with_name("other.h5")
    other.write_bytes(interrupted.read_bytes())
    os.replace(other, interrupted)
    before = interrupted.read_bytes()
    for attempt in (recover, Files().open, change):
        with pytest.raises(JournalError, match=r"scan\.h5.*journal.*another file.*remove the journal"):
            attempt(str(interrupted))
    assert interrupted.read_bytes() == before


def test_a_file_that_was_copied_with_its_journal_is_finished_by_force(interrupted: Path, tmp_path: Path) -> None:
    """As from the disk of a node to that of a group; a copy that was made before the change is too short."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    names = [name for name in os.listdir(interrupted.parent) if "scan.h5" in name]
    for name in names:
        shutil.copy2(interrupted.with_name(name), folder / name)
    copy = folder / interrupted.name
    with pytest.raises(JournalError, match="copied together, run 'lazyproc recover --force"):
        recover(str(copy))
    whole = copy.read_bytes()
    with open(copy, "r+b") as file:
        file.truncate(len(whole) - 1)
    with pytest.raises(JournalError, match="another file"):
        recover(str(copy), force=True)
    copy.write_bytes(whole)
    assert recover(str(copy), force=True)
    assert recover(str(interrupted))
    assert copy.read_bytes() == interrupted.read_bytes()


def test_a_file_changed_by_somebody_else_is_left_alone(interrupted: Path) -> None:
    with h5py.File(interrupted, "r+") as file:
        for number in range(30):
            file[PARENT].create_dataset(f"mine_{number}", data=np.arange(number + 1))
    before = interrupted.read_bytes()
    for attempt in (recover, Files().open, change):
        with pytest.raises(JournalError, match=r"scan\.h5.*changed by somebody else.*remove the journal"):
            attempt(str(interrupted))
    assert interrupted.read_bytes() == before
    os.unlink(sidecar(str(interrupted), "journal"))
    with h5py.File(interrupted) as file:
        assert (file[PARENT]["mine_29"][:] == np.arange(30)).all()


def test_recovering_keeps_away_from_a_writer(interrupted: Path) -> None:
    holder = Holder(interrupted, "r+")
    with pytest.raises(FileBusyError):
        recover(str(interrupted))
    holder.process.kill()
    holder.end()
    assert recover(str(interrupted))
    with h5py.File(interrupted) as file:
        assert has_results(file)
