"""What is known of HDF5's superblock, on files that HDF5 has written."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import pytest

from lazyproc.hdf5 import superblock as sb

VERSIONS = {0: {}, 2: {"libver": "v108"}, 3: {"libver": "v110"}}


def make(path: Path, version: int, **options: int) -> bytes:
    with h5py.File(path, "w", **VERSIONS[version], **options) as file:
        file["values"] = range(100)
    first = path.read_bytes()[options.get("userblock_size", 0) :][: sb.SUPERBLOCK_BYTES]
    assert first[8] == version
    return first


@pytest.mark.parametrize("version", VERSIONS)
def test_the_end_is_where_hdf5_has_put_it(tmp_path: Path, version: int) -> None:
    path = tmp_path / "scan.h5"
    first = make(path, version)
    size = path.stat().st_size
    assert sb.end_of(first) == size
    assert sb.unchecked_end_of(first) == (size if version == 0 else None)
    assert sb.end_of(first[:-1]) is None
    assert sb.end_of(b"\0" + first[1:]) is None


def test_only_one_end_looks_where_addresses_count_from(tmp_path: Path) -> None:
    first = make(tmp_path / "scan.h5", 0)
    moved = first[:24] + (512).to_bytes(8, "little") + first[32:]
    assert sb.end_of(moved) is None
    assert sb.unchecked_end_of(moved) == sb.end_of(first)


@pytest.mark.parametrize("user_block", [0, 512, 2048])
@pytest.mark.parametrize("swmr", [False, True])
def test_marks_are_told_apart_and_the_one_of_a_writer_is_taken_away(
    tmp_path: Path, user_block: int, swmr: bool
) -> None:
    path = tmp_path / "scan.h5"
    before = make(path, 3, userblock_size=user_block)[:48]
    with h5py.File(path, "r+", libver="latest") as file:
        if swmr:
            file.swmr_mode = True
        file.flush()
        descriptor = os.open(path, os.O_RDONLY)
        found = sb.find_superblock(descriptor)
        os.close(descriptor)
    assert found is not None
    place, marked = found
    assert place == user_block
    assert marked[sb.place_of_flags(marked)] == (5 if swmr else 1)
    assert sb.is_open_for_writing(marked)
    assert sb.has_writer_mark(marked) != swmr
    assert not sb.is_open_for_writing(before)
    assert not sb.has_writer_mark(before)
    if not swmr:
        assert sb.without_mark(marked) == before


@pytest.mark.parametrize("version", [0, 2])
def test_other_versions_have_no_mark(tmp_path: Path, version: int) -> None:
    path = tmp_path / "scan.h5"
    first = make(path, version)
    descriptor = os.open(path, os.O_RDONLY)
    assert sb.find_superblock(descriptor) is None
    os.close(descriptor)
    assert not sb.is_open_for_writing(first[:11] + b"\1" + first[12:])


def test_a_superblock_that_does_not_fit_its_checksum_is_none(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    make(path, 3)
    content = bytearray(path.read_bytes())
    content[11] = 1
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    assert sb.find_superblock(descriptor) is None
    os.close(descriptor)
