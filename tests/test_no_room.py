"""A disk that is full, or fills up: an error that helps, a file that is whole, and the same call goes on afterwards.

Small disks are mounted in a child, in a namespace of its own; where that is not allowed, these tests are skipped, and
what is left are limits on the size of files, and system calls that fail with the disk's error numbers.
"""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from faults import library, run, small_disks
from faults.subject import N_POSITIONS, RESULT_BYTES, make_scan

from lazyproc.core.errors import LazyprocError, NoRoomError
from lazyproc.hdf5.room import full_code, reserve

EXHAUSTIVE = os.environ.get("LAZYPROC_EXHAUSTIVE") == "1"
PAGE = 4096
ENOUGH = RESULT_BYTES + 512 * 2**10
LEVELS = [0, 2 * PAGE, RESULT_BYTES // 2, RESULT_BYTES] if not EXHAUSTIVE else list(range(0, ENOUGH, PAGE))
"""Bytes that are free when the run begins: for the lock files, the journal, a part of the results."""


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    make_scan(os.fspath(path))
    return path


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library(tmp_path_factory.mktemp("faults"))


def check(told: dict[str, Any], code: int = errno.ENOSPC, path: str = "scan.h5") -> None:
    """The error helps, what is marked is right, nothing else has changed, and the second call has done it all."""
    assert told["error"] == "NoRoomError", told
    assert told["errno"] == code, told
    for words in (path, "no room for", "free on the disk", "run the same again"):
        assert words in told["text"], told
    assert told["problems"] == [], told
    check_again(told)


def check_again(told: dict[str, Any]) -> None:
    assert told["again"]["error"] == "", told
    assert told["problems again"] == [], told
    assert max(told["masks again"].values()) in (N_POSITIONS, 160 * 256), told


# -- while results are created ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "elsewhere", "handle", "hooks"])
def test_no_room_for_lock_journal_or_results(tmp_path: Path, scan: Path, by: str) -> None:
    """The whole of the results has its room reserved, so the disk is found full before anything is computed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    failed = 0
    for told in run("full", "create", folder, scan, "disk", by, LEVELS, under=small_disks()):
        if not told["error"]:  # no room for all that may be needed, but for what was
            check_again(told)
            continue
        failed += 1
        check(told)
        if by in ("path", "elsewhere"):
            assert told["same"], told
            assert told["left"] == [], told
        if by != "hooks":  # which create, and write, as they like
            assert told["masks"] == {}, told
    assert failed >= 3


@pytest.mark.parametrize("by", ["path", "elsewhere", "handle"])
def test_a_limit_on_the_size_of_files(tmp_path: Path, scan: Path, by: str) -> None:
    levels = [PAGE, RESULT_BYTES // 2] if not EXHAUSTIVE else list(range(0, RESULT_BYTES, PAGE))
    if by == "elsewhere":  # the limit counts from the size of the scan
        levels = [level // 4 for level in levels]
    for told in run("full", "create", tmp_path, scan, "limit", by, levels):
        check(told, errno.EFBIG)
        assert "a file may not grow that large here" in told["text"]
        assert told["masks"] == {}


def test_a_reservation_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with open(path, "r+b") as file:
        reserve(file.fileno(), 3, 10**6, os.fspath(path), "nothing")
        assert path.read_bytes() == b"abc"
        with pytest.raises(NoRoomError, match=r"file: no room for very much: .* \(.* MiB needed, .* free on the disk"):
            reserve(file.fileno(), 3, 2**45, os.fspath(path), "very much")
        assert path.read_bytes() == b"abc"


# -- in the loop, and in the mask ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("begun") / "begun.h5"
    run("full", "begin", path)
    return path


@pytest.mark.parametrize("reserves", [True, False], ids=["reserved", "cannot reserve"])
@pytest.mark.parametrize(
    ("which", "free", "named"), [("nothing", 40 * PAGE, "Mean"), ("outputs", 4 * PAGE, "completed")]
)
def test_a_copy_with_holes_on_a_full_disk(
    tmp_path: Path, begun: Path, faults: Path, which: str, free: int, named: str, reserves: bool
) -> None:
    """Rows, or the mask, find no room: at once where room can be reserved, else in the middle."""
    folder = tmp_path / "disk"
    folder.mkdir()
    env = {} if reserves else failing(faults, "reserve", errno.EOPNOTSUPP)
    told = run("full", "sparse", folder, begun, begun, which, free, under=small_disks(), env=env)
    check(told)
    assert named in told["text"]


def failing(faults: Path, calls: str, code: int, after: int = 0, flag: Path | None = None) -> dict[str, str]:
    """Return the environment in which calls on the scan fail, all but the first ones of each process."""
    env = {"LD_PRELOAD": os.fspath(faults), "FAULTS_NAME": "scan.h5", "FAULTS_CALLS": calls, "FAULTS_CODE": str(code)}
    return env | {"FAULTS_AFTER": str(after)} | ({"FAULTS_WHILE": os.fspath(flag)} if flag else {})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk full", "quota"])
@pytest.mark.parametrize("by", ["path", "elsewhere", "handle", "hooks"])
def test_the_disk_fills_up_in_the_loop(tmp_path: Path, faults: Path, by: str, code: int) -> None:
    """On file systems that cannot reserve, or copy what they write, the loop may find no room."""
    if code == errno.EDQUOT and by not in ("path", "hooks") and not EXHAUSTIVE:
        pytest.skip("the same code as for a full disk; tried with LAZYPROC_EXHAUSTIVE=1")
    flag = tmp_path / "full"
    env = failing(faults, "reserve,write", code, WRITES_BEFORE[by], flag)
    told = run("full", "full_at", tmp_path / "scan.h5", by, flag, 1, 0.001, env=env)
    check(told, code)
    assert 0 <= max(told["masks"].values()) < N_POSITIONS


WRITES_BEFORE = {"path": 45, "elsewhere": 60, "handle": 50, "hooks": 28}


@pytest.mark.parametrize("by", ["path", "handle"])
def test_a_workers_error_reaches_the_user(tmp_path: Path, faults: Path, by: str) -> None:
    flag = tmp_path / "full"
    env = failing(faults, "reserve,write", errno.ENOSPC, 60, flag)
    told = run("full", "full_at", tmp_path / "scan.h5", by, flag, 2, 0.02, env=env)
    check(told)


@pytest.mark.parametrize("calls", range(0, 120, 1 if EXHAUSTIVE else 24))
@pytest.mark.parametrize("by", ["path", "handle", "hooks"])
def test_the_disk_is_full_from_some_write_on(tmp_path: Path, faults: Path, by: str, calls: int) -> None:
    """Whatever is under way when the room ends: lock, creation, journal, rows, mask, the note of the end."""
    flag = tmp_path / "full"
    env = failing(faults, "write", errno.ENOSPC, calls, flag)
    told = run("full", "full_at", tmp_path / "scan.h5", by, flag, 1, 0.001, env=env)
    if told["error"] and told["text"].startswith("[Errno") and calls == 0:  # the caller's own h5py.File
        assert by != "path", told
        check_again(told)
    elif told["error"]:
        check(told)
    else:
        check_again(told)


@pytest.mark.parametrize("calls", range(1, 60, 1 if EXHAUSTIVE else 14))
@pytest.mark.parametrize("by", ["handle", "hooks"])
def test_the_same_object_goes_on_once_there_is_room(tmp_path: Path, faults: Path, by: str, calls: int) -> None:
    """HDF5 still has what it could not write, and writes it then; where it fails for good, the error tells what to do.

    HDF5 2.0 cannot flush a file again after a flush has failed.
    """
    flag = tmp_path / "full"
    env = failing(faults, "write", errno.ENOSPC, calls, flag)
    told = run("full", "goes_on", tmp_path / "scan.h5", by, flag, env=env)
    if told["error"]:
        check(told)
    check_again(told)
    assert told["left"] == [], told
    if told["same object"]["error"]:
        assert told["same object"]["error"] == "JournalError", told
        assert "lazyproc recover" in told["same object"]["text"], told


# -- the errors themselves -------------------------------------------------------------------------------------------


def test_the_error_travels() -> None:
    error = pickle.loads(pickle.dumps(NoRoomError("a.h5: no room", errno.EDQUOT)))
    assert isinstance(error, OSError)
    assert isinstance(error, LazyprocError)
    assert (str(error), error.errno) == ("a.h5: no room", errno.EDQUOT)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError("file write failed: time = now, errno = 122, error message = 'Disk quota exceeded'"), errno.EDQUOT),
        (RuntimeError("Can't decrement id ref count (unable to extend file properly, errno = 27, error"), errno.EFBIG),
        (OSError(errno.EIO, "Input/output error"), None),
        (ValueError("errno is not told"), None),
    ],
)
def test_what_counts_as_a_full_disk(error: Exception, code: int | None) -> None:
    assert full_code(error) == code
