"""Changes through open handles can be undone after a death: the journal, the guard, what refuses, what recovers."""

from __future__ import annotations

import inspect
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from hook_classes import make_mean, new_group
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc import cli
from lazyproc.core.errors import FileBusyError, JournalError
from lazyproc.core.runs import Runs
from lazyproc.hdf5 import guard as guard_module
from lazyproc.hdf5.damage import address_of
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.guard import guarded
from lazyproc.hdf5.lock import RunLock
from lazyproc.hdf5.raw_bytes import RawBytes, Rewritten
from lazyproc.hdf5.settled import allocate, datasets_below, is_settled
from lazyproc.hdf5.sidecar import sidecar
from lazyproc.hdf5.transaction import read_journal, recover, recover_locked
from lazyproc.hdf5.undo_journal import load_undo, write_undo
from lazyproc.status import file_status

MAIN = f"{CHANNEL}/Raw_Data"
MASK = "completed_positions"
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "latest": {"libver": "latest"},
    "userblock": {"userblock_size": 512},
    "pages": {"fs_strategy": "page", "fs_persist": True},
}


def journal_of(path: Any) -> Path:
    return Path(sidecar(str(path), "undo"))


def make_file(path: Path, **how: Any) -> Path:
    """Write a file with every kind of storage, and with groups."""
    numbers = np.random.default_rng(5)
    with h5py.File(path, "w", **how) as file:
        file.create_group("a").attrs["text"] = "x" * 300
        file["contiguous"] = numbers.integers(1, 99, (500, 6))
        file["small"] = np.arange(3)
        file.create_dataset("late", (4000,), "f8")
        file.create_dataset("chunked", data=numbers.standard_normal((91, 30)), chunks=(7, 11), maxshape=(None, 30))
        file.create_dataset("zipped", data=numbers.integers(0, 5, (90, 50)), chunks=(20, 20), compression="gzip")
        file.create_dataset("texts", data=[f"text {n}" * n for n in range(40)])
        file.create_dataset("empty", (0, 3), "f4")
        for n in range(30):
            file.create_group(f"b/{n}").attrs["number"] = n
        file["gone"] = np.arange(3000)
        del file["gone"]
    return path


def content_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update(
                {name: (repr(item[()].tolist()) if isinstance(item, h5py.Dataset) else "", repr(dict(item.attrs)))}
            )
        )
    return found


# -- which bytes are metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_data_are_not_metadata_and_all_else_is(tmp_path: Path, layout: str) -> None:
    """With everything but the metadata wiped out, the file still has its structure; raw data are not in them."""
    path = make_file(tmp_path / "scan.h5", **LAYOUTS[layout])
    with h5py.File(path) as file:
        wanted = {name: (file[name].shape, dict(file[name].attrs)) for name in ("contiguous", "chunked", "zipped")}
        raw = file["contiguous"][()].tobytes()
        ranges = RawBytes().metadata(file, path.stat().st_size, Rewritten())
    content = path.read_bytes()
    begin = LAYOUTS[layout].get("userblock_size", 0)
    assert ranges[0, 0] == begin
    assert (ranges[:, 0] < ranges[:, 1]).all()
    assert (ranges[1:, 0] > ranges[:-1, 1]).all()
    kept = bytearray(content[:begin] + b"\xee" * (len(content) - begin))
    for start, stop in ranges.tolist():
        kept[start:stop] = content[start:stop]
    assert raw[:200] in content
    assert raw[:200] not in kept
    if not begin:  # else places of chunks are not certain, and only the most part of large ones is left out
        assert bytes(kept).count(0xEE) >= len(raw) + 91 * 30 * 8, "raw data of chunks are left out, too"
    path.write_bytes(kept)
    with h5py.File(path) as file:
        assert {name: (file[name].shape, dict(file[name].attrs)) for name in wanted} == wanted
        assert file["texts"][39] == b"text 39" * 39, "what lies in a heap is not raw data"
        assert [file[f"b/{n}"].attrs["number"] for n in range(30)] == list(range(30))
        assert not file["late"][:].any()


def test_compressed_chunks_that_are_written_again_are_kept(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path) as file:
        zipped, size = file["zipped"], path.stat().st_size
        chunks = [zipped.id.get_chunk_info(n) for n in range(zipped.id.get_num_chunks())]
        for rows, firsts in (([(15, 25)], {0, 20}), ([(20, 21), (79, 80)], {20, 60}), ([], set())):
            rewritten = Rewritten(frozenset([address_of(zipped)]), Runs.from_spans(rows), 90)
            ranges = RawBytes().metadata(file, size, rewritten)
            kept = {one.chunk_offset[0] for one in chunks if _inside(ranges, one.byte_offset, one.size)}
            assert kept == firsts
        other = Rewritten(frozenset([address_of(zipped)]), Runs.full(5), 17)
        ranges = RawBytes().metadata(file, size, other)
        assert all(_inside(ranges, one.byte_offset, one.size) for one in chunks), "which rows are written is not known"


def _inside(ranges: Any, offset: int, size: int) -> bool:
    return any(start <= offset and offset + size <= stop for start, stop in ranges.tolist())


def test_what_is_known_is_not_looked_at_again_but_what_is_written_is(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        raw, written = RawBytes(), Rewritten(frozenset([address_of(file["chunked"])]))
        before = raw.metadata(file, path.stat().st_size, written)
        assert (raw.metadata(file, path.stat().st_size, written) == before).all()
        file["chunked"].resize((399, 30))
        file["chunked"][294:] = 1
        file.flush()
        size = path.stat().st_size
        now = raw.metadata(file, size, written)
        assert (now == RawBytes().metadata(file, size, Rewritten())).all()
        assert (now[:, 1] - now[:, 0]).sum() < size - 300 * 30 * 8


# -- whatever is changed, it can be put back -------------------------------------------------------------------------


def change_at_random(file: h5py.File, chance: random.Random, n_steps: int, below: str) -> None:
    """Change the structure in many ways, as programs do; raw data that are not below one group stay as they are."""
    for _ in range(n_steps):
        group = file.require_group(f"{below}/{chance.randrange(9)}")
        name = f"{chance.randrange(1000)}"
        what = chance.choice(
            ["attribute", "contiguous", "chunked", "zipped", "texts", "groups", "delete", "grow", "flush"]
        )
        if what == "attribute":
            chance.choice([group, file["a"], file["contiguous"], file]).attrs[name] = "y" * chance.randrange(2000)
        elif what == "delete" and len(group):
            del group[chance.choice(list(group))]
        elif what == "groups":
            for number in range(chance.randrange(30)):
                group.require_group(f"{name}/{number}")
        elif what == "grow":
            chunked = file["chunked"]
            chunked.resize((chunked.shape[0] + 21, 30))
            chunked[-21:] = 1
        elif what == "flush":
            file.flush()
        elif name not in group and what in ("contiguous", "chunked", "zipped", "texts"):
            values = np.arange(chance.randrange(50, 5000))
            ways: dict[str, Any] = {"chunked": {"chunks": (50,)}, "zipped": {"chunks": (50,), "compression": "gzip"}}
            data = [f"{value}" for value in values[:50]] if what == "texts" else values
            group.create_dataset(name, data=data, **ways.get(what, {}))


DIE_IN_GUARD = f"""
import os, random, signal, sys
from typing import Any
import h5py
import numpy as np
from lazyproc.hdf5.guard import guarded

{inspect.getsource(change_at_random)}

path, seed = sys.argv[1:]
chance = random.Random(seed)
with h5py.File(path, "r+") as file:
    change_at_random(file, chance, chance.randrange(30), "new")
    file.flush()
    open(path + ".before", "wb").write(open(path, "rb").read())
    with guarded([file]):
        change_at_random(file, chance, chance.randrange(1, 80), "newer")
        if chance.random() < 0.7:
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run_script(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(2))
def test_after_a_death_the_file_is_what_it_was_to_the_byte(tmp_path: Path, layout: str, seed: int) -> None:
    path = make_file(tmp_path / "scan.h5", **LAYOUTS[layout])
    done = run_script(DIE_IN_GUARD, path, f"{layout} {seed}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = Path(f"{path}.before").read_bytes()
    assert load_undo(str(path)) is not None
    assert path.read_bytes() != before
    assert recover_locked(str(path))
    assert path.read_bytes() == before, f"seed {layout} {seed}"
    assert not journal_of(path).exists()
    assert not recover_locked(str(path))


def cut_off_here(path: Path, attributes: dict[str, str]) -> dict[str, Any]:
    """Let a process die when it has created a group through a handle; return what was in the file before."""
    before = content_of(path)
    done = run_script(
        """
        import os, signal, sys, h5py
        from lazyproc.hdf5.guard import guarded
        with h5py.File(sys.argv[1], "r+") as file, guarded([file]):
            file.create_group("cut_off").attrs.update(eval(sys.argv[2]))
            for number in range(50):
                file.create_group(f"cut_off/{number}")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
        attributes,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return before


# -- the journal -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cut_off(tmp_path: Path) -> Path:
    """A file whose structure was just being changed through a handle when the process died: half of it is written."""
    path = make_file(tmp_path / "scan.h5")
    before = path.read_bytes()
    done = run_script(DIE_IN_GUARD, path, "plain 2")
    assert done.returncode == -signal.SIGKILL, done.stderr
    Path(f"{path}.before").unlink()
    assert path.read_bytes() != before
    return path


def test_incomplete_journals_are_dropped(cut_off: Path) -> None:
    """A journal is complete before anything is changed, so nothing was."""
    whole = journal_of(cut_off).read_bytes()
    before = cut_off.read_bytes()
    for torn in (b"", whole[:5], whole[:9], whole[: len(whole) // 2], whole[:-1], whole[:-1] + b"?"):
        journal_of(cut_off).write_bytes(torn)
        assert load_undo(str(cut_off)) is None
        assert read_journal(str(cut_off)) is None
        assert recover(str(cut_off))
        assert os.listdir(cut_off.parent) == ["scan.h5"]
        assert cut_off.read_bytes() == before


def test_a_large_journal_is_compressed_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    numbers = np.random.default_rng(2)
    content = numbers.integers(0, 3, 6_000_000, np.uint8).tobytes() + numbers.bytes(3_000_000)
    path.write_bytes(content)
    ranges = np.array([[0, 10], [100, 5_000_000], [5_000_001, 9_000_000]])
    with open(path, "r+b") as file:
        write_undo(str(path), file.fileno(), 9_000_000, ranges)
        assert journal_of(path).stat().st_size < 6_000_000
        file.write(bytes(99) * 100_000)
        file.truncate(8_000_000)
    assert recover(str(path))
    now = path.read_bytes()
    assert now == content[:10] + bytes(90) + content[100:5_000_000] + b"\0" + content[5_000_001:]


def test_a_journal_of_another_file_is_refused(cut_off: Path) -> None:
    other = cut_off.with_name("other.h5")
    other.write_bytes(cut_off.read_bytes())
    os.replace(other, cut_off)
    before = cut_off.read_bytes()
    for attempt in (recover, Files().open):
        with pytest.raises(JournalError, match=r"scan\.h5.*journal.*another file.*remove the journal"):
            attempt(str(cut_off))
    assert cut_off.read_bytes() == before


def test_a_file_that_is_nothing_like_it_is_refused_even_by_force(cut_off: Path) -> None:
    other = cut_off.with_name("other.h5")
    with h5py.File(other, "w", libver="latest") as file:
        file["notes"] = np.random.default_rng(3).integers(0, 255, 50_000)
    os.replace(other, cut_off)
    before = cut_off.read_bytes()
    with pytest.raises(JournalError, match="another file"):
        recover(str(cut_off), force=True)
    assert cut_off.read_bytes() == before


def test_a_file_that_was_copied_with_its_journal_is_recovered_by_force(cut_off: Path, tmp_path: Path) -> None:
    """As from the disk of a node to that of a group."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(cut_off.parent, folder, ignore=shutil.ignore_patterns("elsewhere"))
    copy = folder / cut_off.name
    with pytest.raises(JournalError, match="copied together, run 'lazyproc recover --force"):
        recover(str(copy))
    assert CliRunner().invoke(cli.main, ["recover", "--force", str(copy)]).exit_code == 0
    assert recover(str(cut_off))
    assert content_of(copy) == content_of(cut_off)
    assert os.listdir(folder) == ["scan.h5"]


def later(path: Path, seconds: float) -> None:
    """Let the file have been changed some time after the last sign of life of whoever kept the journal."""
    stamp = journal_of(path).stat().st_mtime_ns + int(seconds * 1e9)
    os.utime(path, ns=(stamp, stamp))


def add_group(file: h5py.File) -> None:
    file["b/0"].create_group("notes")


def set_attribute(file: h5py.File) -> None:
    file["contiguous"].attrs["unit"] = "V"


def grow(file: h5py.File) -> None:
    file["chunked"].resize((110, 30))
    file["chunked"][91:] = 5


def set_text(file: h5py.File) -> None:
    file["texts"][3] = "another text"


def add_results(file: h5py.File) -> None:
    file["b"].create_group("Raw_Data-Cluster_000").attrs["tool"] = "Cluster"


def add_to_results(file: h5py.File) -> None:
    file["results/labels"] = np.arange(10)


def copy_results(file: h5py.File) -> None:
    file.copy("finished", "saved")


def link(file: h5py.File) -> None:
    file["here"] = h5py.SoftLink("/contiguous")


def remove(file: h5py.File) -> None:
    del file["b/0"]


def replace_dataset(file: h5py.File) -> None:
    file["moved"] = file["contiguous"][()]
    del file["contiguous"]
    file.move("moved", "contiguous")


@pytest.fixture
def cut_off_at_its_end(tmp_path: Path) -> Path:
    """A file whose change through a handle was complete but for the removal of the journal: anybody can open it."""
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        file.create_group("results").attrs["tool"] = "Cluster"
        file.create_group("finished").attrs["lazyproc_run_id"] = "earlier"
    cut_off_here(path, {"tool": "Fit", "lazyproc_run_id": "run"})
    return path


@pytest.mark.parametrize("seconds", [0.1, 100.0])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (add_group, "/b/0/notes, which is new"),
        (set_attribute, "the attribute 'unit' of /contiguous"),
        (grow, "the dataset /chunked"),
        (set_text, "the dataset /texts"),
        (add_results, "/b/Raw_Data-Cluster_000, which is new"),
        (add_to_results, "/results/labels, which is new"),
        (copy_results, "/saved, which is new"),
        (link, "/here, which is new"),
        (remove, "/b/0, which is gone"),
        (replace_dataset, "the dataset /contiguous"),
    ],
)
def test_what_somebody_else_has_changed_since_is_not_undone(
    cut_off_at_its_end: Path, change: Callable[[h5py.File], None], what: str, seconds: float
) -> None:
    path = cut_off_at_its_end
    with h5py.File(path, "r+") as file:
        change(file)
    later(path, seconds)
    before = path.read_bytes()
    for attempt in (recover, Files().open, Files().open_for_writing):
        with pytest.raises(JournalError, match=rf"(?s)changed by somebody else since: {what}.*recover --force"):
            attempt(str(path))
    result = CliRunner().invoke(cli.main, ["recover", str(path)])
    assert result.exit_code == 1
    assert what in result.output
    assert path.read_bytes() == before
    assert journal_of(path).exists()
    result = CliRunner().invoke(cli.main, ["recover", "--force", str(path)])
    assert result.exit_code == 0
    assert "settled" in result.output
    found = content_of(path)
    assert "cut_off" not in found
    assert not {"b/0/notes", "b/Raw_Data-Cluster_000", "results/labels", "saved"} & found.keys()
    assert os.listdir(path.parent) == ["scan.h5"]


def test_who_only_opened_and_closed_the_file_since_is_in_nobodys_way(cut_off_at_its_end: Path) -> None:
    """HDF5 writes at that, too."""
    path = cut_off_at_its_end
    for seconds in (0.1, 100.0):
        with h5py.File(path, "r+") as file:
            assert "cut_off" in file
            file["contiguous"][7] = 7  # raw data stay
        later(path, seconds)
        files = Files()
        assert "cut_off" not in files.open(str(path))
        files.close()
    assert recover(str(path))
    with h5py.File(path) as file:
        assert "cut_off" not in file
        assert (file["contiguous"][7] == 7).all()


def test_a_backup_that_was_brought_back_is_noticed(cut_off_at_its_end: Path) -> None:
    """Copied over the file it has its inode; its time of modification may be the old one."""
    path = cut_off_at_its_end
    backup = make_file(path.with_name("backup.h5"))  # it has neither of the two groups of results
    shutil.copyfile(backup, path)
    os.utime(path, ns=(1, 1))
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"which is gone.*whole, remove the journal"):
        recover(str(path))
    assert path.read_bytes() == before


def test_what_the_journal_names_is_its_own(tmp_path: Path) -> None:
    """Groups of subclasses with hooks carry no id of a run."""
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        file.create_group("results").attrs["tool"] = "Fit"
    before = content_of(path)
    script = """
        import os, signal, sys, h5py
        from lazyproc.hdf5.guard import guarded
        with h5py.File(sys.argv[1], "r+") as file, guarded([file], [file["results"]], own=["/b/Fit_000"]):
            file.create_group("b/Fit_000").attrs["tool"] = "Fit"
            file["results/more"] = 1
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_script(script, path).returncode == -signal.SIGKILL
    with h5py.File(path, "r+") as file:
        assert "b/Fit_000" in file
    later(path, 100.0)
    assert recover(str(path))
    assert content_of(path) == before


def test_a_file_that_nobody_can_read_is_put_back_however_late(cut_off: Path) -> None:
    with open(cut_off, "r+b") as file:
        file.write(b"nothing that anybody could read")
    later(cut_off, 3600)
    assert recover(str(cut_off))
    assert "zipped" in content_of(cut_off)


def test_a_recovery_that_dies_is_not_taken_for_somebody_else(cut_off: Path) -> None:
    """It moves the journal's time on before it writes."""
    old = cut_off.stat().st_mtime_ns
    time.sleep(1.5)
    run_script(
        """
        import os, signal, sys
        from lazyproc.hdf5 import undo
        write_all = undo.write_all
        def die(*arguments):
            write_all(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        undo.write_all = die
        from lazyproc.hdf5.transaction import recover
        recover(sys.argv[1])
        """,
        cut_off,
    )
    assert journal_of(cut_off).exists()
    assert cut_off.stat().st_mtime_ns > old
    assert recover(str(cut_off))
    assert "zipped" in content_of(cut_off)


def test_readers_see_the_file_as_it_was(cut_off: Path) -> None:
    files = Files()
    try:
        seen = files.open(str(cut_off))
        assert "newer" not in seen
        assert seen["texts"][3] == b"text 3" * 3
        assert file_status(str(cut_off)).results == ()
    finally:
        files.close()
    assert journal_of(cut_off).exists(), "who only reads changes nothing"


HOLD = """
import sys, h5py
with h5py.File(sys.argv[1], "r+"):
    print(1, flush=True)
    input()
"""


def test_recovery_keeps_away_from_writers(cut_off: Path) -> None:
    holding = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import h5py\nwith h5py.File({str(cut_off)!r}, 'r+', locking=True):\n print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert holding.stdout is not None
        if holding.stdout.readline() == b"1\n":  # else the damage is such that nobody can open it
            with pytest.raises(FileBusyError):
                recover(str(cut_off))
            assert journal_of(cut_off).exists()
    finally:
        holding.communicate(b"\n", timeout=60)


def clear_flag(path: Path) -> None:
    """Do as ``h5clear -s`` does: note in a superblock of version 3 that nobody has the file open."""
    content = bytearray(path.read_bytes())
    assert content[8] == 3
    assert content[11] == 1, "marked as open"
    content[11] = 0
    content[44:48] = _lookup3(bytes(content[:44])).to_bytes(4, "little")
    path.write_bytes(content)


def _lookup3(data: bytes) -> int:
    """Return Jenkins' hash of bytes, which HDF5 has as its checksum of metadata."""

    def turn(value: int, bits: int) -> int:
        return (value << bits | value >> (32 - bits)) & 0xFFFFFFFF

    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    while data:
        last, words = len(data) <= 12, np.frombuffer(data[:12].ljust(12, b"\0"), "<u4").tolist()
        a, b, c = ((one + word) & 0xFFFFFFFF for one, word in zip((a, b, c), words, strict=True))
        data = data[12:]
        if not last:
            for x in (4, 6, 8, 16, 19, 4):
                a, b, c = (a - c ^ turn(c, x)) & 0xFFFFFFFF, b, (c + b) & 0xFFFFFFFF
                a, b, c = b, c, a
        else:
            for x in (14, 11, 25, 16, 4, 14, 24):
                c = ((c ^ b) - turn(b, x)) & 0xFFFFFFFF
                a, b, c = b, c, a
            a, b, c = c, a, b
    return c


def test_a_file_of_the_newest_format_is_right_once_it_is_cleared(tmp_path: Path) -> None:
    """HDF5 itself marks such files as open, and lets nobody in after a death: recover, then ``h5clear -s``."""
    path = make_file(tmp_path / "scan.h5", libver="latest")
    done = run_script(DIE_IN_GUARD, path, "latest 2")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert recover(str(path))
    with pytest.raises(OSError, match="already open for write"):
        content_of(path)
    before = Path(f"{path}.before")
    clear_flag(path)
    clear_flag(before)
    found = content_of(path)
    assert "zipped" in found
    assert found == content_of(before)


# -- guards ----------------------------------------------------------------------------------------------------------


def test_a_guard_leaves_nothing_behind(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        with guarded([file, file]):
            assert load_undo(str(path)) is not None
            file["mine"] = np.arange(9)
        assert os.listdir(tmp_path) == ["scan.h5"]
        with open(path, "rb") as raw, h5py.File(raw, "r") as on_disk:
            assert on_disk["mine"][8] == 8
    with h5py.File(path, "r") as file, guarded([file]):
        assert os.listdir(tmp_path) == ["scan.h5"], "nothing to guard"


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
def test_an_error_in_a_guard_undoes_nothing_and_leaves_no_journal(tmp_path: Path, error: BaseException) -> None:
    path = make_file(tmp_path / "scan.h5")

    def fail(file: h5py.File) -> None:
        with guarded([file]):
            file["mine"] = np.arange(9)
            raise error

    with h5py.File(path, "r+") as file:
        with pytest.raises(type(error)):
            fail(file)
        assert os.listdir(tmp_path) == ["scan.h5"]
        file["more"] = 1
    assert {"mine", "more"} <= content_of(path).keys()


def test_a_file_that_is_closed_in_a_guard(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    file = h5py.File(path, "r+")
    with guarded([file]):
        file["mine"] = 1
        file.close()
    assert os.listdir(tmp_path) == ["scan.h5"]
    assert "mine" in content_of(path)


def test_what_an_inner_guard_has_finished_stays(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    done = run_script(
        """
        import os, signal, sys, h5py
        from lazyproc.hdf5.guard import guarded
        with h5py.File(sys.argv[1], "r+") as file, guarded([file]):
            file["outer"] = 1
            with guarded([file]):
                file["inner"] = 2
            file["unfinished"] = 3
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert recover(str(path))
    found = content_of(path)
    assert {"outer", "inner"} <= found.keys()
    assert "unfinished" not in found


def test_two_files_at_once(tmp_path: Path) -> None:
    paths = [make_file(tmp_path / f"{name}.h5") for name in "ab"]
    wanted = [content_of(path) for path in paths]
    done = run_script(
        """
        import os, signal, sys, h5py
        from lazyproc.hdf5.guard import guarded
        with h5py.File(sys.argv[1], "r+") as one, h5py.File(sys.argv[2], "r+") as two, guarded([one, two]):
            for file in (one, two):
                for number in range(200):
                    file.create_group(f"mine/{number}")
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        *paths,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert all(recover(str(path)) for path in paths)
    assert [content_of(path) for path in paths] == wanted


def test_the_journal_tells_that_its_writer_lives(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file, guarded([file]):
        first = journal_of(path).stat().st_mtime_ns
        deadline = time.monotonic() + 60
        while journal_of(path).stat().st_mtime_ns < first + 200_000_000:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_what_is_not_promised_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "lazyproc")
    with h5py.File(tmp_path / "memory.h5", "w", driver="core", backing_store=False) as file, guarded([file]):
        file["mine"] = 1
    assert "no plain file on disk" in caplog.text
    path = make_file(tmp_path / "scan.h5")
    monkeypatch.setattr(guard_module, "LARGEST", 1000)
    with h5py.File(path, "r+") as file, guarded([file]):
        assert os.listdir(tmp_path) == ["scan.h5"]
        file["mine"] = 1
    assert "are too many to be kept" in caplog.text
    assert "mine" in content_of(path)


# -- settled datasets ------------------------------------------------------------------------------------------------


def test_what_lies_behind_a_broken_object_is_found(tmp_path):
    """HDF5's own walk would end there, and what comes after it would not be guarded."""
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        for name in ("a", "b", "c"):
            file[f"group/{name}"] = np.arange(5.0)
        place = address_of(file["group/b"])
    with open(path, "r+b") as raw:
        raw.seek(place)
        raw.write(b"\xff" * 16)
    with h5py.File(path) as file:
        assert [one.name for one in datasets_below(file)] == ["/group/a", "/group/c"]


def test_results_get_their_places(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        plain = file.create_dataset("plain", (400, 3), "f4")
        filled = file.create_dataset("filled", (400,), "i2", fillvalue=7)
        compound = file.create_dataset("compound", (5, 2), [("a", "f4"), ("b", "i8")])
        chunked = file.create_dataset("chunked", (400,), "f4", chunks=(9,))
        texts = file.create_dataset("texts", (400,), h5py.string_dtype())
        huge = file.create_dataset("huge", (2**40,), "u1", fillvalue=1)
        sparse = file.create_dataset("sparse", (2**30,), "f4")
        compact = file.create_dataset("compact", data=np.arange(3))
        empty = file.create_dataset("empty", (0, 7), "f4")
        null = file.create_dataset("null", dtype="f4")
        everything = datasets_below(file)
        assert len(everything) == 10
        assert {one.name for one in everything if is_settled(one)} == {"/empty", "/null", "/compact"}
        for one in everything:
            allocate(one)
        unsettled = {one.name for one in everything if not is_settled(one)}
        assert unsettled == {"/chunked", "/texts", "/huge"}, "what cannot have one place, or costs much to fill"
        assert not plain[()].any()
        assert not sparse[-1000:].any()
        assert (filled[()] == 7).all()
        assert not compound[()]["b"].any()
        assert (chunked.shape, texts.shape, huge.shape, compact[2]) == ((400,), (400,), (2**40,), 2)
        assert empty.shape == (0, 7)
        assert null.shape is None
    assert (tmp_path / "scan.h5").stat().st_blocks * 512 < 2**22, "nothing much was written"


# -- processes on open handles ---------------------------------------------------------------------------------------


class Doubled(lazyproc.Process):
    outputs = {"Doubled": lazyproc.Output("f8", shape_from_main=True)}

    @staticmethod
    def _map_function(spectrum):
        return 2 * spectrum


Plain: Any = make_mean(lazyproc.Process)


class Hooks(Plain):
    """Contiguous results, in batches of four."""

    storage: dict[str, Any] = {}

    def __init__(self, h5_main: Any, **kwargs: Any) -> None:
        super().__init__(h5_main, "Hooks", cores=1, **kwargs)
        self._max_pos_per_read = 4

    def _create_results_datasets(self) -> None:
        self.h5_results_grp = new_group(self)
        shape = (self.h5_main.shape[0], 1)
        self.h5_results = self.h5_results_grp.create_dataset("Results", shape, "f4", **self.storage)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path, _ = make_usid_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        for number in range(20):
            file[CHANNEL].create_group(f"Neighbour_{number}").attrs["number"] = number
    return Path(path)


@pytest.mark.parametrize("made", [Doubled, Hooks])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_process_on_a_handle_refuses_until_the_file_is_recovered(
    scan: Path, tmp_path: Path, made: Callable[..., Any], mode: str
) -> None:
    before = cut_off_here(scan, {"tool": "Fit", "lazyproc_run_id": "run"})
    with h5py.File(tmp_path / "other.h5", "w") as other, h5py.File(scan, mode) as file:
        damaged = scan.read_bytes()
        with pytest.raises(JournalError, match=rf"run 'lazyproc recover {scan}', and open it again"):
            made(file[MAIN], h5_target_group=other if mode == "r" else None)
        if mode == "r+":
            with pytest.raises(FileBusyError):
                recover(str(scan))
        assert scan.read_bytes() == damaged
    assert CliRunner().invoke(cli.main, ["recover", str(scan)]).exit_code == 0
    assert content_of(scan) == before
    with h5py.File(scan, "r+") as file:
        group = made(file[MAIN]).compute()
        assert group[MASK][()].all()
    assert os.listdir(tmp_path).count(".scan.h5.lazyproc-undo") == 0


def test_a_death_during_compute_is_noticed_by_an_object_made_before(scan: Path) -> None:
    """The journal appears after the constructor; the group is then not created through a handle that may be stale."""
    with h5py.File(scan, "r+", locking=False) as file:
        process = Doubled(file[MAIN])
        done = run_script(
            """
            import os, signal, sys, h5py
            from lazyproc.hdf5.guard import guarded
            with h5py.File(sys.argv[1], "r+", locking=False) as file, guarded([file]):
                file["mine"] = 1
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            """,
            scan,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        with pytest.raises(JournalError, match="lazyproc recover"):
            process.compute()
        assert journal_of(scan).exists()


@pytest.mark.parametrize("made", [Doubled, Hooks])
def test_with_an_address_the_file_is_recovered_by_itself(scan: Path, made: Callable[..., Any]) -> None:
    before = cut_off_here(scan, {"tool": "Fit", "lazyproc_run_id": "run"})
    with made(f"{scan}::{MAIN}") as process:
        group = process.compute()
        assert group[MASK][()].all()
    found = content_of(scan)
    assert {name: content for name, content in found.items() if "-" not in name} == before
    assert not journal_of(scan).exists()


@pytest.mark.parametrize("made", [Doubled, Hooks])
@pytest.mark.parametrize("there", [False, True])
def test_what_a_run_makes_is_told_from_what_others_have_made_since(scan: Path, made: Any, there: bool) -> None:
    """The run dies at the end of the creation; somebody opens the file, and puts other results beside it."""
    before = content_of(scan)
    script = f"""
        import os, signal, sys, h5py
        from lazyproc.hdf5 import guard
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_undo import {made.__name__}, MAIN
        def die(path):
            os.kill(os.getpid(), signal.SIGKILL)
        with h5py.File(sys.argv[1], "r+") as file:
            process = {made.__name__}(file[MAIN])
            begin = guard.drop_undo
            guard.drop_undo = lambda path: die(path) if any("-" in name for name in file[MAIN].parent) else begin(path)
            process.compute()
    """
    done = run_script(script, scan)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert journal_of(scan).exists()
    with h5py.File(scan, "r+") as file:
        assert len(content_of(scan)) > len(before)
        if there:
            file[MAIN].parent.create_group("Raw_Data-Cluster_000").attrs["tool"] = "Cluster"
    later(scan, 100.0)
    if there:
        with pytest.raises(JournalError, match="Raw_Data-Cluster_000, which is new"):
            recover(str(scan))
    else:
        assert recover(str(scan))
        assert content_of(scan) == before


def test_a_change_that_never_reached_the_disk_is_nothing_to_recover_from(scan: Path) -> None:
    """As when a process dies in the loop, where mostly nothing but rows is written."""
    done = run_script(
        """
        import os, signal, sys, h5py
        from lazyproc.hdf5.guard import guarded
        with h5py.File(sys.argv[1], "r+") as file, guarded([file]):
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        scan,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_undo(str(scan)) is not None
    with h5py.File(scan, "r+") as file:
        process = Doubled(file[MAIN])
        assert journal_of(scan).exists(), "the constructor writes nothing"
        assert process.compute()[MASK][()].all()
    assert not journal_of(scan).exists()


def test_a_change_that_is_just_being_made_is_none_that_was_cut_off(scan: Path) -> None:
    lock = RunLock(str(scan), "somebody")
    lock.acquire()
    try:
        with h5py.File(scan, "r+") as file, guarded([file]):
            file["mine"] = 1
            file.flush()
            Doubled(file[MAIN])
            with pytest.raises(FileBusyError):
                recover_locked(str(scan))
    finally:
        lock.release()


@contextmanager
def journals_seen(made: Any) -> Iterator[list[bool]]:
    """Tell for each batch whether there was a journal when the hook wrote it."""
    seen: list[bool] = []
    written = made._write_results_chunk

    def write(self: Any) -> None:
        seen.append(journal_of(self.h5_results_grp.file.filename).exists())
        written(self)

    made._write_results_chunk = write
    try:
        yield seen
    finally:
        made._write_results_chunk = written


@pytest.mark.parametrize(
    ("storage", "wanted"),
    [
        ({}, [True, False, False, False, True]),
        ({"chunks": (3, 1)}, [True] * 5),
        ({"chunks": (3, 1), "compression": "gzip"}, [True] * 5),
    ],
    ids=["contiguous", "chunked", "gzip"],
)
def test_the_loop_keeps_journals_where_the_structure_may_change(
    scan: Path, storage: dict[str, Any], wanted: list[bool]
) -> None:
    """Contiguous results are allocated before the loop, so its first batch shows that only rows are written."""
    made = type("Hooks", (Hooks,), {"storage": storage})
    with h5py.File(scan, "r+") as file, journals_seen(made) as seen:
        group = made(file[MAIN]).compute()
        assert group["Results"].chunks == storage.get("chunks")
        assert seen == wanted


def test_a_hook_that_notes_something_in_each_batch_is_guarded_in_each(scan: Path) -> None:
    class Noting(Hooks):
        def _write_results_chunk(self) -> None:
            super()._write_results_chunk()
            self.h5_results_grp.attrs["last_pixel"] = int(self._get_pixels_in_current_batch()[-1])

    with h5py.File(scan, "r+") as file, journals_seen(Noting) as seen:
        Noting(file[MAIN]).compute()
        assert seen == [True] * 5


def test_hooks_that_write_to_two_files(scan: Path, tmp_path: Path) -> None:
    class Both(Hooks):
        def _create_results_datasets(self) -> None:
            super()._create_results_datasets()
            self.seen = [journal_of(one.file.filename).exists() for one in (self.h5_main, self.h5_results_grp)]
            self.h5_main.attrs["used"] = "yes"

    with h5py.File(scan, "r+") as file, h5py.File(tmp_path / "out.h5", "w") as out:
        process = Both(file[MAIN], h5_target_group=out)
        process.compute()
        assert process.seen == [True, True]
    assert sorted(os.listdir(tmp_path)) == ["out.h5", "scan.h5"]


def test_a_finished_run_that_died_before_its_last_note(scan: Path) -> None:
    with h5py.File(scan, "r+") as file:
        group = Hooks(file[MAIN]).compute()
        group.attrs["last_pixel"] = 3
        lock_files = [Path(sidecar(str(scan), kind)) for kind in ("lock", "fence")]
        for one in lock_files:
            one.touch()
        assert Hooks(file[MAIN]).compute() == group
        assert group.attrs["last_pixel"] == 20
        assert not any(one.exists() for one in lock_files)


@pytest.mark.parametrize("storage", [{}, {"chunks": (3, 6)}, {"chunks": (3, 6), "compression": "gzip"}])
def test_a_look_at_positions_writes_out_no_structure(tmp_path: Path, storage: dict[str, Any]) -> None:
    """The rows that the caller has changed through his handle are seen, and what HDF5 holds back stays there."""
    path, _ = make_usid_file(tmp_path / "scan.h5", n_rows=40, **storage)
    with h5py.File(path, "r+") as file:
        file[MAIN][7] = np.arange(6)
        file.flush()
        file[MAIN][8] = 1 + np.arange(6)
        for number in range(50):
            file[CHANNEL].create_group(f"New_{number}").attrs["number"] = number
        before = Path(path).read_bytes()
        found = Doubled(file[MAIN]).test([7, 8])
        np.testing.assert_array_equal(found["Doubled"], [2 * np.arange(6), 2 + 2 * np.arange(6)])
        extent = file[MAIN].id.get_offset()
        after = Path(path).read_bytes()
        if extent is None:
            assert after == before
        else:
            stop = extent + file[MAIN].nbytes
            assert after[:extent] + after[stop:] == before[:extent] + before[stop:]


@pytest.mark.parametrize("storage", [{"chunks": (3, 6)}, {"chunks": (3, 6), "compression": "gzip"}])
def test_a_view_has_the_structure_written_out_under_a_guard(
    tmp_path: Path, storage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make_usid_file(tmp_path / "scan.h5", n_rows=40, **storage)
    seen: list[tuple[bool, bool]] = []
    flush = h5py.File.flush

    def noted(self: h5py.File) -> None:
        before = Path(path).read_bytes()
        flush(self)
        seen.append((Path(path).read_bytes() != before, journal_of(path).exists()))

    monkeypatch.setattr(h5py.File, "flush", noted)
    with h5py.File(path, "r+") as file:
        file[MAIN][8] = 1 + np.arange(6)
        for number in range(50):
            file[CHANNEL].create_group(f"New_{number}").attrs["number"] = number
        expected = file[MAIN][()]
        view = Doubled(file[MAIN]).to_xarray()
        assert any(changed for changed, _ in seen)
        assert all(guarded for changed, guarded in seen if changed)
        assert not journal_of(path).exists()
        computed = view["Doubled"].compute(scheduler="sync").values
    assert sorted(os.listdir(tmp_path)) == ["scan.h5"]
    np.testing.assert_array_equal(np.sort(computed, axis=None), np.sort(2.0 * expected, axis=None))
