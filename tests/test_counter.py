"""The number beside a file from which ranks take their blocks: each is given out once, whoever asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lazyproc.core.errors import ResultsError
from lazyproc.hdf5.counter import FileCounter
from lazyproc.hdf5.lock import RunLock

ROOT = Path(__file__).parents[1]
DRAW = """
import sys
from lazyproc.hdf5.counter import FileCounter
from lazyproc.hdf5.lock import Fence

path, locking = sys.argv[1:3]
counter = FileCounter(path, Fence("", "", "", locking))
sys.stdin.readline()
print(*[counter.next() for _ in range(300)])
"""


def begun(folder: Path) -> FileCounter:
    counter = FileCounter(str(folder / "a.h5"), RunLock(str(folder / "a.h5"), "one").fence)
    counter.begin()
    return counter


@pytest.mark.parametrize("locking", ["flock", "lockf"])
def test_processes_draw_each_number_once(tmp_path, monkeypatch, locking):
    monkeypatch.setenv("LAZYPROC_LOCKING", locking)
    counter = begun(tmp_path)
    command = [sys.executable, "-c", DRAW, str(tmp_path / "a.h5"), locking]
    drawing = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    for one in drawing:
        one.stdin.write("\n")
        one.stdin.flush()
    drawn = [[int(number) for number in one.communicate(timeout=60)[0].split()] for one in drawing]
    assert sorted(number for numbers in drawn for number in numbers) == list(range(1200))
    assert all(numbers == sorted(numbers) for numbers in drawn)
    assert counter.next() == 1200
    counter.free()
    assert not list(tmp_path.iterdir())
    counter.free()


def test_nothing_is_given_out_any_more_once_it_is_stopped(tmp_path):
    counter = begun(tmp_path)
    assert [counter.next(), counter.next()] == [0, 1]
    for _ in range(100):
        counter.stop()
        assert counter.next() >= 2**62
    counter.begin()  # what a killed run has left counts for nothing
    assert counter.next() == 0


def test_a_file_that_others_have_removed_or_changed_is_named(tmp_path):
    counter = begun(tmp_path)
    (name,) = tmp_path.iterdir()
    name.write_bytes(b"123456789")
    with pytest.raises(ResultsError, match=r"lazyproc-claims: 9 bytes came; expected 8"):
        counter.next()
    name.unlink()
    for call in (counter.next, counter.stop):
        with pytest.raises(ResultsError, match=r"lazyproc-claims: the file is gone"):
            call()
