"""Commits through HDF5, where results have no place of their own in the file: chunked ones of older programs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lazyproc.core.blocks import Block
from lazyproc.core.errors import FileBusyError
from lazyproc.core.runs import Runs
from lazyproc.hdf5 import handle_target
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.handle_target import HandleTarget, TransactionTarget
from lazyproc.hdf5.lock import RunLock

N_POSITIONS = 300
SHAPES = {"Wide": (N_POSITIONS, 50), "Narrow": (N_POSITIONS, 1)}
MASK = "completed_positions"


def make_file(path: Path) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("results")
        group.create_dataset("Wide", SHAPES["Wide"], "f8", chunks=(7, 20), compression="gzip")
        group.create_dataset("Narrow", SHAPES["Narrow"], "f4", chunks=(11, 1))
        group.create_dataset(MASK, data=np.zeros(N_POSITIONS, np.uint8), chunks=(64,))
        group["neighbour"] = np.arange(500)
        group["further"] = np.zeros(N_POSITIONS, np.uint8)


def rows_of(start: int, stop: int) -> tuple[Any, Any]:
    wide = np.arange(start * 50, stop * 50, dtype="f8").reshape(-1, 50)
    return wide, wide[:, :1].astype("f4")


@contextmanager
def afresh(path: Path) -> Iterator[h5py.Group]:
    """Open the results group for reading, for as long as the context lasts."""
    with closing(Files()) as files:
        yield files.open(str(path))["results"]


@contextmanager
def opened(kind: str, path: Path) -> Iterator[HandleTarget | TransactionTarget]:
    lock = RunLock(str(path), "test")
    lock.acquire()
    try:
        if kind == "handle":
            with h5py.File(path, "r+") as file:
                yield HandleTarget(file["results"], list(SHAPES), MASK)
            return
        target = TransactionTarget(str(path), "/results", list(SHAPES), MASK, lambda: afresh(path))
        try:
            yield target
        finally:
            target.close()
    finally:
        lock.release()


def look(path: Path) -> tuple[Any, Any, Any]:
    """Read what is on disk, whoever has the file open."""
    files = Files()
    try:
        group = files.open(str(path))["results"]
        assert (group["neighbour"][:] == np.arange(500)).all()
        return group["Wide"][:], group["Narrow"][:], group[MASK][:]
    finally:
        files.close()


@pytest.mark.parametrize("kind", ["handle", "transaction"])
def test_rows_wait_for_the_commit(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out.h5"
    make_file(path)
    with opened(kind, path) as target:
        both = zip(rows_of(3, 20), rows_of(40, 90), strict=True)
        target.write(Block(0, (3, 40), (20, 90)), [np.concatenate(parts) for parts in both])
        wide, _, mask = look(path)
        assert not wide.any()
        assert not mask.any()
        target.commit(Runs.from_spans([(3, 20), (40, 90)]))
        wide, narrow, mask = look(path)
        for start, stop in ((3, 20), (40, 90)):
            assert (wide[start:stop] == rows_of(start, stop)[0]).all()
            assert (narrow[start:stop] == rows_of(start, stop)[1]).all()
        assert np.flatnonzero(mask).tolist() == [*range(3, 20), *range(40, 90)]
        target.unmark(Runs.from_spans([(5, 6)]))
        assert look(path)[2].sum() == 66
        target.rows("further").write(299, np.full(1, 7, np.uint8))
        target.commit(Runs.from_spans([(299, 300)]))
        assert target.rows("further").read(Runs.from_spans([(297, 300)])).tolist() == [0, 0, 7]
    assert os.listdir(tmp_path) == ["out.h5"]


@pytest.mark.parametrize("kind", ["handle", "transaction"])
def test_many_rows_do_not_wait(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is held in memory, and there is a limit to that; the mask still waits."""
    monkeypatch.setattr(handle_target, "_MOST_WAITING", 50 * 8 * 30)
    path = tmp_path / "out.h5"
    make_file(path)
    with opened(kind, path) as target:
        for start in range(0, N_POSITIONS, 10):
            target.write(Block(start // 10, (start,), (start + 10,)), rows_of(start, start + 10))
        wide, _, mask = look(path)
        assert (wide[:200] == rows_of(0, 200)[0]).all()
        assert not mask.any()
        target.commit(Runs.full(N_POSITIONS))
    wide, narrow, mask = look(path)
    assert (wide == rows_of(0, N_POSITIONS)[0]).all()
    assert (narrow == rows_of(0, N_POSITIONS)[1]).all()
    assert mask.all()


def test_writers_are_kept_out_between_transactions(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    make_file(path)
    with opened("transaction", path) as target:
        target.write(Block(0, (0,), (9,)), rows_of(0, 9))
        target.commit(Runs.from_spans([(0, 9)]))
        with pytest.raises(OSError, match="lock"):
            h5py.File(path, "r+")
    with h5py.File(path, "r+"), pytest.raises(FileBusyError, match="open for writing"):
        TransactionTarget(str(path), "/results", list(SHAPES), MASK, lambda: pytest.fail("not needed"))
