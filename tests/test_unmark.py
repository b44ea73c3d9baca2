"""Files of the newest format, which HDF5 marks while they are open for writing: they open whoever was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from hook_classes import make_mean, mean_of
from usid_files import make_usid_file

from lazyproc import Process
from lazyproc.core.errors import FileBusyError, NoRoomError
from lazyproc.hdf5 import unmark
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.guard import guarded
from lazyproc.hdf5.superblock import lookup3
from lazyproc.hdf5.transaction import recover_locked

Mean = make_mean(Process)
MASK = "completed_positions"
TESTS = os.path.dirname(__file__)

DRIVER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import h5py
from hook_classes import make_mean
from lazyproc import Process
from lazyproc.hdf5 import unmark

when, main, target = sys.argv[1:]

def die(at):
    if at == when:
        os.kill(os.getpid(), signal.SIGKILL)

class Dying(make_mean(Process)):
    def _create_results_datasets(self):
        super()._create_results_datasets()
        die("created")

    def _unit_computation(self, *args, **kwargs):
        super()._unit_computation(*args, **kwargs)
        if self._get_pixels_in_current_batch()[0] >= 12:
            self.h5_main.file.flush()
            die("computed")

    def _write_results_chunk(self):
        super()._write_results_chunk()
        self.h5_results.file.flush()
        die("written")

if when == "opening":
    unmark.take_back = lambda file: die("opening")
process = Dying(main, cores=1, h5_target_group=target or None)
process._max_pos_per_read = 6
die("constructed")
process.compute()
die("computed all")
process.close()
die("closed")
"""


def contents(path: Path) -> dict[str, object]:
    """Return all that was in the file at first: names, attributes and values."""
    found: dict[str, object] = {}
    with h5py.File(path, "r") as file:

        def look(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if "Hooks" not in name:
                found[name] = sorted(item.attrs), item[()].tobytes() if isinstance(item, h5py.Dataset) else None

        file.visititems(look)
    return found


def flags(path: Path) -> int:
    superblock = path.read_bytes()[:48]
    assert superblock[8] == 3
    assert int.from_bytes(superblock[44:], "little") == lookup3(superblock[:44])
    return superblock[11]


def sidecars(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path.parent) if name.endswith(("-undo", "-journal")))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    make_usid_file(tmp_path / "scan.h5", libver="latest")
    return tmp_path / "scan.h5"


@pytest.fixture
def name(scan: Path) -> str:
    with h5py.File(scan, "r") as file:
        names: list[str] = []
        file.visit(lambda name: names.append(name) if name.endswith("Raw_Data") else None)
    return f"/{names[0]}"


@pytest.mark.parametrize("elsewhere", ["", "new", "existing"])
@pytest.mark.parametrize(
    "when", ["opening", "constructed", "created", "computed", "written", "computed all", "closed", "not at all"]
)
def test_the_file_opens_and_the_same_call_goes_on(scan: Path, name: str, when: str, elsewhere: str) -> None:
    out = scan.with_name("out.h5")
    if elsewhere == "existing":
        h5py.File(out, "w", libver="latest").close()
    target = f"{out}::/" if elsewhere else ""
    before = contents(scan)
    code = textwrap.dedent(DRIVER).format(tests=TESTS)

    def run(when: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, when, f"{scan}::{name}", target]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run(when)
    assert done.returncode == (0 if when == "not at all" else -signal.SIGKILL), done.stderr
    if when in ("opening", "created", "written"):  # in the middle of a change, which an undo journal tells of
        assert sidecars(scan)
        for path in (scan, out):
            if path.exists():
                recover_locked(str(path))
    assert not sidecars(scan)
    assert flags(scan) == 0
    assert contents(scan) == before
    if elsewhere and out.exists():
        h5py.File(out, "r").close()
    done = run("not at all")
    assert done.returncode == 0, done.stderr
    assert contents(scan) == before
    with h5py.File(out if elsewhere else scan, "r") as file, h5py.File(scan, "r") as source:
        parent = file if elsewhere else source[name].parent
        groups = [parent[one] for one in parent if "Mean_Hooks" in one]
        assert len(groups) == 1
        np.testing.assert_array_equal(groups[0]["Results"][:, 0], [np.float32(mean_of(row)) for row in source[name]])
        assert groups[0][MASK][()].all()


@pytest.mark.parametrize("when", ["opening", "created", "written"])
def test_the_same_call_recovers_by_itself(scan: Path, name: str, when: str) -> None:
    before = contents(scan)
    code = textwrap.dedent(DRIVER).format(tests=TESTS)
    command = [sys.executable, "-c", code, when, f"{scan}::{name}", ""]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    with Mean(f"{scan}::{name}", cores=1) as process:
        assert process.compute()[MASK][()].all()
    assert flags(scan) == 0
    assert contents(scan) == before


def test_a_flush_and_the_end_of_a_guard_take_the_mark_back(scan: Path, name: str) -> None:
    files = Files()
    file = files.open_for_writing(str(scan))
    assert flags(scan) == 0
    assert not sidecars(scan)
    file["more"] = np.arange(1000)
    file.flush()
    assert flags(scan) == 1, "HDF5 sets it again: else there would be nothing to take back"
    with guarded([file]):
        file["still more"] = np.arange(1000)
        file.flush()
    assert flags(scan) == 0
    file["yet more"] = np.arange(1000)
    files.close()
    assert flags(scan) == 0
    with h5py.File(scan, "r") as again:
        assert {"more", "still more", "yet more"} <= set(again)


def test_what_the_caller_has_open_keeps_its_mark(scan: Path, name: str) -> None:
    with h5py.File(scan, "r+") as file:
        with Mean(f"{scan}::{name}", cores=1) as process:
            assert flags(scan) == 1
            process.compute()
            assert flags(scan) == 1
        with guarded([h5py.File(scan, "r+")]):
            pass
        assert flags(scan) == 1
        assert file.id
    assert flags(scan) == 0


def test_a_writer_in_swmr_mode_keeps_its_mark(scan: Path) -> None:
    with unmark.opening(str(scan)) as opened:
        opened.append(h5py.File(scan, "r+", libver="latest"))
    file = opened[0]
    assert flags(scan) == 0
    file.swmr_mode = True
    file.flush()
    assert flags(scan) == 5
    unmark.take_back(file)
    assert flags(scan) == 5
    unmark.close_unmarked(file)
    assert flags(scan) == 0


def test_a_file_that_is_open_elsewhere_is_refused_and_no_journal_stays(scan: Path) -> None:
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(scan)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(FileBusyError):
            Files().open_for_writing(str(scan))
        assert flags(scan) == 1
        assert not sidecars(scan)
        other.communicate(b"\n")


def test_without_room_for_the_journal_the_file_is_opened_all_the_same(
    scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise NoRoomError("full")

    monkeypatch.setattr(unmark, "write_undo", full)
    files = Files()
    files.open_for_writing(str(scan))
    assert flags(scan) == 0
    files.close()


@pytest.mark.parametrize("setting", [("LAZYPROC_LOCKING", "none"), ("HDF5_USE_FILE_LOCKING", "FALSE")])
def test_without_locks_there_is_no_journal_that_could_be_taken_for_another(
    scan: Path, monkeypatch: pytest.MonkeyPatch, setting: tuple[str, str]
) -> None:
    monkeypatch.setenv(*setting)
    monkeypatch.setattr(unmark, "write_undo", None)
    files = Files()
    files.open_for_writing(str(scan))["more"] = 1
    assert flags(scan) == 0
    files.close()
    assert flags(scan) == 0


def test_behind_a_user_block(tmp_path: Path) -> None:
    path = tmp_path / "block.h5"
    with h5py.File(path, "w", libver="latest", userblock_size=1024) as file:
        file["values"] = np.arange(10)
    path.write_bytes(b"of the user".ljust(1024) + path.read_bytes()[1024:])
    before = path.read_bytes()
    files = Files()
    file = files.open_for_writing(str(path))
    assert path.read_bytes() == before
    file["more"] = np.arange(10)
    files.close()
    with h5py.File(path, "r") as file:
        assert "more" in file


@pytest.mark.parametrize("options", [{}, {"libver": "v108"}])
def test_other_formats_need_nothing(tmp_path: Path, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unmark, "write_undo", None)
    path = tmp_path / "plain.h5"
    with h5py.File(path, "w", **options) as file:
        file["values"] = np.arange(10)
    files = Files()
    files.open_for_writing(str(path))["more"] = 1
    files.close()


@pytest.mark.parametrize(("data", "value"), [(b"", 0xDEADBEEF), (b"Four score and seven years ago", 0x17770551)])
def test_the_checksum_is_the_published_one(data: bytes, value: int) -> None:
    assert lookup3(data) == value
