"""No rights, and no sense: read-only files, files that change under a run, broken disks, nonsense beside the file."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from faults import HERE, library, run, small_disks
from faults.subject import CHANNEL, MAIN, N_POSITIONS, Twice, make_scan, masks, opened, problems

from lazyproc import open_results
from lazyproc.core.errors import (
    ArgumentValueError,
    FileChangedError,
    JournalError,
    LazyprocError,
    MissingFileError,
    ResultsError,
)
from lazyproc.hdf5.heap import is_endless_heap
from lazyproc.hdf5.sidecar import sidecar
from lazyproc.hdf5.transaction import read_journal, recover
from lazyproc.status import file_status

EXHAUSTIVE = os.environ.get("LAZYPROC_EXHAUSTIVE") == "1"
SEED = int(os.environ.get("LAZYPROC_TEST_SEED", "2025"))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    make_scan(os.fspath(path))
    return path


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library(tmp_path_factory.mktemp("faults"))


# -- no such file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "act"),
    [
        ("h5_main", lambda path: Twice(f"{path}::{MAIN}")),
        ("group", lambda path: open_results(f"{path}::/results")),
        ("file", file_status),
    ],
)
def test_a_missing_file(tmp_path: Path, argument: str, act: Callable[[str], Any]) -> None:
    path = os.fspath(tmp_path / "not there.h5")
    with pytest.raises(MissingFileError, match=rf"^{argument}: .*not there\.h5: there is no such file") as caught:
        act(path)
    assert isinstance(caught.value, FileNotFoundError)
    assert isinstance(caught.value, LazyprocError)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("argument", "act"),
    [
        ("h5_main", lambda path: Twice(f"{path}::{MAIN}")),
        ("group", lambda path: open_results(f"{path}::/results")),
        ("file", file_status),
    ],
)
def test_a_folder_or_nonsense_in_place_of_a_file(tmp_path: Path, argument: str, act: Callable[[str], Any]) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no HDF5\n" * 100)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (".", "empty", "text", "loop"):
        with pytest.raises(ArgumentValueError, match=f"^{argument}: "):
            act(os.path.join(tmp_path, name))


# -- no rights -------------------------------------------------------------------------------------------------------

RIGHTS = {
    "file": (0o444, 0o777, False, "the file cannot be written"),
    "folder": (0o666, 0o555, False, "its folder (for the lock beside it) cannot be written"),
    "mount": (0o666, 0o777, True, "cannot be written"),
    "unreadable": (0, 0o777, False, "cannot be opened (Permission denied)"),
    "closed": (0o666, 0, False, "cannot be opened (Permission denied)"),
}


@pytest.mark.parametrize("name", RIGHTS)
def test_read_only_and_unreadable(name: str) -> None:
    file_mode, folder_mode, mount, words = RIGHTS[name]
    under = small_disks() if mount else []
    with tempfile.TemporaryDirectory() as folder:  # which others may enter, unlike tmp_path
        try:
            told = run("rights", "modes", folder, file_mode, folder_mode, "ro" if mount else "", under=under)
        finally:
            os.chmod(os.path.join(folder, "inner"), 0o755)
    assert told["same"]
    assert set(told["left"]) <= {"scan.h5", "new.h5"}  # no lock, no journal
    if name in ("unreadable", "closed"):
        for step in ("look", "open", "path", "finished", "other"):
            assert told[step]["error"] == "ArgumentValueError", (step, told)
            assert words in told[step]["text"], (step, told)
            assert "scan.h5" in told[step]["text"], (step, told)
        return
    for step in ("look", "open", "finished", "other"):  # all that writes nothing there
        assert told[step]["error"] == "", (step, told)
    for step in ("path", "handle"):
        assert told[step]["error"] == "ReadOnlyFileError", (step, told)
        assert "h5_target_group='other.h5::/'" in told[step]["text"], (step, told)
    assert words in told["path"]["text"]
    assert told["into"]["error"] == ("" if name == "file" else "ReadOnlyFileError"), told


# -- files that change under a run -----------------------------------------------------------------------------------

DISTURBANCES = ["moved", "replaced", "written anew", "truncated", "emptied", "deleted"]
GZIP = {"chunks": [20, 64], "compression": "gzip"}
WAYS = {
    "path": ("path", {}, "source", 1),
    "source of results elsewhere": ("elsewhere", {}, "source", 1),
    "compressed source of results elsewhere": ("elsewhere", GZIP, "source", 1),
    "results elsewhere": ("elsewhere", {}, "results", 1),
    "handle": ("handle", {}, "source", 1),
    "workers": ("path", {}, "source", 2),
    "workers, results elsewhere": ("elsewhere", {}, "results", 2),
}
ALL = list(itertools.product(WAYS, DISTURBANCES))
SOME = [case for number, case in enumerate(ALL) if number % len(DISTURBANCES) in (number // len(DISTURBANCES) % 3, 5)]


@pytest.mark.parametrize(("way", "what"), ALL if EXHAUSTIVE else SOME)
def test_a_file_disturbed_under_a_run(tmp_path: Path, way: str, what: str) -> None:
    by, storage, which, cores = WAYS[way]
    told = run("moving", "under_run", tmp_path, by, storage, which, what, cores)
    assert told["error"] in ("FileChangedError", "ResultsError"), told
    assert ("scan.h5.out.h5" if which == "results" else "scan.h5") in told["text"], told
    expected = {"moved": ("is gone",), "replaced": ("replaced",), "deleted": ("is gone",)}
    assert any(words in told["text"] for words in expected.get(what, ("truncated", "the file ends inside"))), told
    assert not told["harmed"], told  # never a write into the new file
    assert told["wrong"] == {}, told
    assert told["again"]["error"] == "", told
    assert told["wrong again"] == {}, told
    assert N_POSITIONS in told["done"].values(), told


# -- a source that cannot be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "handle"])
@pytest.mark.parametrize("kind", ["gzip", "fletcher32", "external", "virtual"])
def test_a_broken_source(tmp_path: Path, kind: str, by: str) -> None:
    told = run("moving", "broken", tmp_path, kind, by)
    assert told["error"] in ("FileChangedError", "ResultsError"), told
    assert f"scan.h5::{MAIN}" in told["text"], told
    if kind in ("gzip", "fletcher32"):
        assert "positions 120 to 139" in told["text"], told
    assert told["wrong"] == {}, told
    assert told["again"]["error"] == "", told
    assert told["wrong again"] == {}, told
    assert N_POSITIONS in told["done"].values(), told


@pytest.mark.parametrize("reads", range(0, 300, 3) if EXHAUSTIVE else [0, 12, 70, 140, 200])
@pytest.mark.parametrize("by", ["path", "handle", "hooks"])
def test_a_disk_that_cannot_be_read_anymore(tmp_path: Path, faults: Path, by: str, reads: int) -> None:
    flag = tmp_path / "broken"
    env = {
        "LD_PRELOAD": os.fspath(faults),
        "FAULTS_NAME": "scan.h5",
        "FAULTS_CALLS": "read",
        "FAULTS_CODE": str(errno.EIO),
        "FAULTS_AFTER": str(reads),
        "FAULTS_WHILE": os.fspath(flag),
    }
    told = run("full", "full_at", tmp_path / "scan.h5", by, flag, 1, 0.0005, env=env)
    if told["error"] and (told["known"] or by == "path" or reads > 30):  # else it was the caller's own h5py
        assert told["known"], told
        assert "scan.h5" in told["text"] or "Raw_Data" in told["text"], told
    assert told["problems"] == [], told
    assert told["again"]["error"] == "", told
    assert told["problems again"] == [], told
    assert max(told["masks again"].values()) == N_POSITIONS, told


@pytest.mark.parametrize("calls", ["sync", "write"])
@pytest.mark.parametrize("by", ["path", "elsewhere", "handle", "hooks"])
def test_a_disk_that_cannot_be_written_anymore(tmp_path: Path, faults: Path, by: str, calls: str) -> None:
    flag = tmp_path / "broken"
    env = {
        "LD_PRELOAD": os.fspath(faults),
        "FAULTS_NAME": "scan.h5",
        "FAULTS_CALLS": calls,
        "FAULTS_CODE": str(errno.EIO),
        "FAULTS_AFTER": "6" if calls == "sync" else "35",
        "FAULTS_WHILE": os.fspath(flag),
    }
    told = run("full", "full_at", tmp_path / "scan.h5", by, flag, 1, 0.0005, env=env)
    if by != "hooks" or calls == "sync":  # what a hook's own h5py raises is the hook's
        assert told["error"] == "FileChangedError", told
        assert "Input/output error" in told["text"], told
    assert told["problems"] == [], told
    assert told["again"]["error"] == "", told
    assert max(told["masks again"].values()) == N_POSITIONS, told


# -- journals of another file, or of another time --------------------------------------------------------------------


def interrupted(kind: str, scan: Path, folder: Path) -> tuple[Path, Path, bytes, bytes]:
    """Leave a file with a journal; return both, and what the file holds before and after the change."""
    path = folder / "scan.h5"
    shutil.copy(scan, path)
    before = path.read_bytes()
    command = [sys.executable, "-m", "faults.journals", kind, os.fspath(path)]
    subprocess.run(command, check=True, cwd=HERE.parent, timeout=120)
    journal = Path(sidecar(os.fspath(path), "journal" if kind == "redo" else "undo"))
    assert journal.is_file()
    return path, journal, before, path.read_bytes()


def closed(content: bytes) -> bytes:
    """Return the content of a file without HDF5's mark that it is open for writing."""
    return content[:20] + b"\0" + content[21:]


def closed_bytes(path: Path) -> bytes:
    return closed(path.read_bytes())


def settled(path: Path) -> bytes | str:
    """Recover; return the file's bytes, or the error's text."""
    try:
        recover(os.fspath(path))
    except JournalError as error:
        return str(error)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["redo", "undo"])
def test_a_journal_damaged_anywhere_is_dropped_or_refused(tmp_path: Path, scan: Path, kind: str) -> None:
    """Cut off at any byte, or with a bit flipped anywhere: it counts as none, or it is the whole of it."""
    path, journal, _, _ = interrupted(kind, scan, tmp_path)
    whole = journal.read_bytes()
    expected = read_journal(os.fspath(path))
    assert expected
    random = np.random.default_rng(SEED)
    places = range(len(whole)) if EXHAUSTIVE else sorted(random.choice(len(whole), 150, replace=False).tolist())
    for place in [0, 1, 8, 9, 10, *places]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        for what, content in (("cut at", whole[:place]), ("flipped at", bytes(flipped))):
            journal.write_bytes(content)
            assert read_journal(os.fspath(path)) is None, f"{what} {place} of {len(whole)}; seed {SEED}"
    journal.write_bytes(whole)
    assert read_journal(os.fspath(path)) == expected


@pytest.mark.parametrize("kind", ["redo", "undo"])
@pytest.mark.parametrize("what", ["whole", "cut", "garbage", "empty"])
def test_recovery_leaves_the_old_file_or_the_new_one(tmp_path: Path, scan: Path, kind: str, what: str) -> None:
    path, journal, before, now = interrupted(kind, scan, tmp_path)
    whole = journal.read_bytes()
    if what != "whole":
        journal.write_bytes({"cut": whole[: len(whole) // 2], "garbage": os.urandom(3000), "empty": b""}[what])
    left = settled(path)
    if kind == "redo":
        with h5py.File(path, "r") as file:
            assert ("New" in file[CHANNEL]) == (what == "whole")
    else:
        assert isinstance(left, bytes)
        assert closed_bytes(path) == (closed(before) if what == "whole" else closed(now))
    assert not journal.exists()
    assert problems(os.fspath(path), "path", scan) == [] or "New" in h5_names(path)


def h5_names(path: Path) -> list[str]:
    with h5py.File(path, "r") as file:
        return list(file[CHANNEL])


@pytest.mark.parametrize("kind", ["redo", "undo"])
def test_a_journal_of_another_file_is_refused(tmp_path: Path, scan: Path, kind: str) -> None:
    (tmp_path / "one").mkdir()
    _, journal, _, _ = interrupted(kind, scan, tmp_path / "one")
    path = tmp_path / "scan.h5"
    make_scan(os.fspath(path))
    shutil.copy2(journal, tmp_path / journal.name)
    before = path.read_bytes()
    text = settled(path)
    assert isinstance(text, str)
    for words in ("scan.h5", journal.name, "another file", "remove the journal"):
        assert words in text
    for act in (lambda: Twice(f"{path}::{MAIN}"), lambda: file_status(os.fspath(path))):
        with pytest.raises(JournalError, match="another file"):
            act()
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["redo", "undo"])
def test_a_journal_of_another_time_is_refused(tmp_path: Path, scan: Path, kind: str) -> None:
    """Put back from a backup, when the file has long gone on."""
    path, journal, _, _ = interrupted(kind, scan, tmp_path)
    kept = tmp_path / "kept"
    shutil.copy2(journal, kept)
    recover(os.fspath(path))
    time.sleep(1.1)  # a file counts as changed later if it is a second younger
    with h5py.File(path, "r+") as file:
        for number in range(6):
            file[CHANNEL].create_group(f"Later_{number}").attrs["text"] = "x" * 1000
            file[MAIN].attrs[f"later_{number}"] = number
    before = path.read_bytes()
    shutil.copy2(kept, journal)
    text = settled(path)
    assert isinstance(text, str)
    assert "changed by somebody else since" in text
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["redo", "undo"])
@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"inode": "x", "patches": 3}\n', b"[" * 10**5, b"\xff\xfe"])
def test_a_journal_that_nobody_can_have_written(tmp_path: Path, scan: Path, kind: str, content: bytes) -> None:
    """Its checksum is right; a future version may write something else."""
    import zlib

    path = tmp_path / "scan.h5"
    shutil.copy(scan, path)
    journal = Path(sidecar(os.fspath(path), "journal" if kind == "redo" else "undo"))
    journal.write_bytes(b"%08x\n" % zlib.crc32(content) + content)
    text = settled(path)
    assert isinstance(text, str)
    assert journal.name in text
    assert "nothing that this version of lazyproc has written" in text
    assert path.read_bytes() == scan.read_bytes()


# -- nonsense under the names of the small files beside a file -------------------------------------------------------

NONSENSE: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda path: path.mkdir(),
    "a folder with a file": lambda path: (path.mkdir(), (path / "file").touch()),
    "nothing": lambda path: path.touch(),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "a JSON list": lambda path: path.write_text("[1]"),
    "strange JSON": lambda path: path.write_text('{"pid": NaN, "host": null, "since": [], "locking": {}}'),
    "deep JSON": lambda path: path.write_text("[" * 100_000),
    "a link to nowhere": lambda path: path.symlink_to("/nothing/at/all"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to the data": lambda path: path.symlink_to(path.parent / "scan.h5"),
    "a pipe": lambda path: os.mkfifo(path),
    "very much": lambda path: (path.touch(), os.truncate(path, 2**33)),
}
HARMLESS = ("nothing", "bytes", "a JSON list", "strange JSON", "deep JSON", "very much")


@pytest.mark.parametrize("kind", ["lock", "fence", "journal", "undo", "claims", "new"])
@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_beside_the_file(tmp_path: Path, scan: Path, kind: str, what: str) -> None:
    path = tmp_path / "scan.h5"
    shutil.copy(scan, path)
    NONSENSE[what](Path(sidecar(os.fspath(path), kind)))
    by = ["path", "handle"][len(what + kind) % 2] if not EXHAUSTIVE else "path"
    try:
        file_status(os.fspath(path))
        with opened(os.fspath(path), by) as process:
            process.compute()
        refused = ""
    except LazyprocError as error:
        refused = str(error)
    assert problems(os.fspath(path), by, os.fspath(scan)) == []
    if refused:
        assert sidecar(os.fspath(path), kind) in refused
        assert what not in HARMLESS or (kind, what) == ("lock", "strange JSON"), refused
        assert closed_bytes(path) == closed_bytes(scan)
    else:
        assert masks(os.fspath(path), by) == {"Raw_Data-Twice_000": N_POSITIONS}


# -- the guard of heaps ----------------------------------------------------------------------------------------------


def heap(*objects: tuple[int, int], size: int = 4096) -> bytes:
    """Return a global heap with objects of these numbers and sizes."""
    content = b"GCOL\x01\0\0\0" + size.to_bytes(8, "little")
    for number, length in objects:
        content += number.to_bytes(2, "little") + b"\1\0\0\0\0\0" + length.to_bytes(8, "little")
        content += bytes(-(-length // 8) * 8) if number and length < size else b""
    return content.ljust(size, b"\0")


def test_a_heap_that_has_no_end_is_not_shown_to_hdf5(tmp_path: Path) -> None:
    free = 4096 - 16 - 32
    assert not is_endless_heap(heap((1, 10), (0, free)))
    assert not is_endless_heap(b"anything else" * 400)
    assert not is_endless_heap(heap((1, 10), (0, free))[:2000])  # a part of one
    assert is_endless_heap(heap((1, 10)))  # zeros from there on
    assert is_endless_heap(heap((1, 10), (0, 0)))
    assert is_endless_heap(heap((1, 2**63)))
    assert is_endless_heap(heap((0, 2**40)))


def test_heaps_that_hdf5_writes_are_sound(tmp_path: Path) -> None:
    path = tmp_path / "texts.h5"
    with h5py.File(path, "w") as file:
        for number in range(300):
            file.attrs[f"text {number}"] = "x" * (number * 7 % 900)
            if number % 5 == 0 and number:
                del file.attrs[f"text {number - 1}"]
        file["texts"] = ["y" * number for number in range(500)]
    content = path.read_bytes()
    place, found = content.find(b"GCOL"), 0
    while place >= 0:
        size = int.from_bytes(content[place + 8 : place + 16], "little")
        assert not is_endless_heap(content[place : place + size])
        place, found = content.find(b"GCOL", place + 1), found + 1
    assert found > 5


@pytest.mark.parametrize("by", ["path", "handle"])
def test_zeroed_texts_do_not_hang(tmp_path: Path, by: str) -> None:
    """HDF5 itself does not return from reading the attributes then."""
    path = os.fspath(tmp_path / "scan.h5")
    make_scan(path)
    content = bytearray(Path(path).read_bytes())
    place = content.find(b"GCOL")
    content[place + 16 : place + 528] = bytes(512)
    Path(path).write_bytes(content)
    with pytest.raises((ArgumentValueError, ResultsError), match="heap of texts"), opened(path, by):
        pass


def test_what_changes_under_a_run_is_a_kind_of_results_error() -> None:
    assert issubclass(FileChangedError, ResultsError)
    assert issubclass(FileChangedError, OSError)
