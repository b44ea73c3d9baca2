"""Chunked main datasets decoded as bytes: the same values as HDF5 reads, or HDF5 is asked."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc.core import sizing
from lazyproc.core.errors import FileChangedError, ResultsError
from lazyproc.core.events import Started
from lazyproc.engine.crew import Crew
from lazyproc.hdf5 import chunks
from lazyproc.hdf5.chunks import ChunkSource, chunked_source

SEEN: list[type] = []

layouts = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 70), st.integers(1, 40)),
        "chunks": st.tuples(st.integers(1, 80), st.integers(1, 50)),
        "dtype": st.sampled_from(["<f4", ">f4", "<f8", ">i2", "u1", "<c8", "<i8"]),
        "compression": st.sampled_from([None, 1, 6, "lzf"]),
        "shuffle": st.booleans(),
        "fletcher32": st.booleans(),
        "libver": st.sampled_from(["earliest", "latest"]),
        "written": st.floats(0, 1),
    }
)


def write(path: Path, layout: dict[str, Any], seed: int) -> np.ndarray:
    """Write a chunked dataset, the first rows of it only, and return what HDF5 reads."""
    n_rows, n_columns = layout["shape"]
    chunks = tuple(min(wanted, there) for wanted, there in zip(layout["chunks"], layout["shape"], strict=True))
    values = (np.random.default_rng(seed).standard_normal((n_rows, n_columns)) * 50).astype(layout["dtype"])
    with h5py.File(path, "w", libver=layout["libver"]) as file:
        dataset = file.create_dataset(
            "data", (n_rows, n_columns), layout["dtype"], chunks=chunks, fillvalue=np.array(7, layout["dtype"]),
            compression=layout["compression"], shuffle=layout["shuffle"], fletcher32=layout["fletcher32"],
        )  # fmt: skip
        stop = round(layout["written"] * n_rows)
        dataset[:stop] = values[:stop]
    with h5py.File(path) as file:
        return np.asarray(file["data"][:])


@settings(max_examples=120, deadline=None)
@given(layout=layouts, seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 70), max_size=8))
def test_reads_the_same_as_hdf5(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, Any], seed: int, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "file.h5"
    values = write(path, layout, seed)
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
    assert source is not None
    edges = sorted({0, len(values), *(cut for cut in cuts if cut <= len(values))})
    runs = list(itertools.pairwise(edges))[::2]
    rows = source.rows(runs)
    expected = np.concatenate([values[start:stop] for start, stop in runs])
    assert rows.dtype == values.dtype
    assert rows.tobytes() == expected.astype(values.dtype).tobytes()  # concatenating makes it native


def test_filter_that_was_skipped(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    values = np.arange(32, dtype="<f4").reshape(8, 4)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("data", (8, 4), "<f4", chunks=(4, 4), compression=4, shuffle=True)
        dataset[:] = values
        dataset.id.write_direct_chunk((4, 0), values[4:].tobytes(), filter_mask=0b11)
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
    assert source is not None
    assert (source.rows([(0, 8)]) == values).all()


@pytest.mark.parametrize(
    "options",
    [{"compression": "szip"}, {"scaleoffset": 2}, {"dtype": h5py.string_dtype()}],
    ids=["szip", "scaleoffset", "texts"],
)
def test_other_layouts_are_left_to_hdf5(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (8, 4), chunks=(4, 4), **{"dtype": "i4", **options})
    with h5py.File(path) as file:
        assert chunked_source(file["data"], str(path)) is None


def test_userblock_is_left_to_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("data", data=np.zeros((8, 4)), chunks=(4, 4))
    with h5py.File(path) as file:
        assert chunked_source(file["data"], str(path)) is None


@pytest.mark.parametrize("compression", [1, "lzf"])
def test_damaged_chunk_is_named(tmp_path: Path, compression: Any) -> None:
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("data", (400, 4), "f4", chunks=(100, 4), compression=compression)
        dataset[:] = np.random.default_rng(0).standard_normal((400, 4)).round(1)  # LZF leaves noise as it is
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
        offset = file["data"].id.get_chunk_info(1).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(offset + 40)
        raw.write(b"\xff" * 40)
    assert source is not None
    assert len(source.rows([(0, 100)])) == 100
    with pytest.raises(ResultsError, match="chunk of positions 100 to 199 cannot be decoded"):
        source.rows([(50, 150)])


def test_lzf_is_left_to_hdf5_where_its_decoder_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=np.ones((8, 4)), chunks=(4, 4), compression="lzf")
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
        assert source is not None
        assert (source.rows([(0, 8)]) == 1).all()
        for library in (h5py.__file__, h5py.h5d.__file__):  # no library at all; one without it
            chunks._lzf.cache_clear()
            monkeypatch.setattr(h5py.h5z, "__file__", library)
            assert chunked_source(file["data"], str(path)) is None
            with pytest.raises(ResultsError, match="does not give out its LZF decoder"):
                source.rows([(0, 8)])
    chunks._lzf.cache_clear()


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (MemoryError("no room"), MemoryError, "no room"),
        (ModuleNotFoundError("No module named 'deflate'"), ImportError, "deflate"),
        (OSError(errno.EIO, "Input/output error"), FileChangedError, "Input/output error"),
    ],
)
def test_what_says_nothing_of_a_chunk_is_not_told_as_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type, words: str
) -> None:
    """No memory is tried again in a fresh process, a missing library is named, a disk that fails is not the file."""
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (400, 4), "f4", chunks=(100, 4), compression=1)[:] = 1
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
    assert source is not None

    def fail(*arguments: Any) -> Any:
        raise error

    with monkeypatch.context() as context:
        context.setattr(os, "pread", fail)
        with pytest.raises(expected, match=words):
            source.rows([(0, 100)])
    assert source.rows([(0, 100)]).all()


def test_nonsense_is_never_decoded_to_more_than_there_is_room_for() -> None:
    """Whatever the stored bytes are: a damaged file must not end the process, nor change what lies beside."""
    decompress, random = chunks._lzf(), np.random.default_rng(0)
    assert decompress is not None
    for _ in range(20_000):
        stored, size = np.frombuffer(random.bytes(int(random.integers(1, 200))), np.uint8), int(random.integers(1, 400))
        room = np.full(size + 64, 0xA5, np.uint8)
        assert decompress(stored.ctypes.data, stored.nbytes, room.ctypes.data, size) <= size
        assert (room[size:] == 0xA5).all()


def test_chunks_that_are_stored_as_they_are_are_read_where_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte more than the positions have, and none by way of a copy; noise, which LZF leaves as it is, too."""
    path = tmp_path / "file.h5"
    values = np.random.default_rng(0).bytes(64 * 32)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("data", (64, 32), "u1", chunks=(16, 32), compression="lzf")
        dataset[:] = np.frombuffer(values, "u1").reshape(64, 32)
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
        offset = file["data"].id.get_chunk_info(3).byte_offset
    assert source is not None
    decoded = Decoded(monkeypatch)
    sizes: list[int] = []
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *of: (sizes.append(read(*of)), sizes[-1])[1])
    assert source.rows([(3, 5), (14, 18)]).tobytes() == values[3 * 32 : 5 * 32] + values[14 * 32 : 18 * 32]
    assert sizes == [2 * 32, 2 * 32, 2 * 32]
    assert decoded.calls[0][1] == []
    os.truncate(path, offset + 8)
    with pytest.raises(ResultsError, match=r"positions 48 to 63 cannot be decoded \(the file ends inside it"):
        source.rows([(48, 50)])


def test_file_put_in_its_place_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    write(path, {"shape": (8, 4), "chunks": (4, 4), "dtype": "f4", "compression": 1, "shuffle": False,
                 "fletcher32": False, "libver": "earliest", "written": 1.0}, 0)  # fmt: skip
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
    path.rename(tmp_path / "moved.h5")
    (tmp_path / "file.h5").write_bytes(b"another")
    assert source is not None
    with pytest.raises(ResultsError, match="replaced"):
        source.rows([(0, 1)])


def test_threads_decode_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    layout = {"shape": (64, 32), "chunks": (4, 8), "dtype": "f8", "compression": 1, "shuffle": True,
              "fletcher32": True, "libver": "latest", "written": 1.0}  # fmt: skip
    values = write(path, layout, 3)
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
    assert source is not None
    wrong: list[int] = []

    def read(start: int) -> None:
        for _ in range(20):
            if (source.rows([(start, start + 16)]) != values[start : start + 16]).any():
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 16, 32, 48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def total(block: np.ndarray) -> np.ndarray:
    return block.sum(axis=1)


@pytest.mark.parametrize("by_handle", [False, True], ids=["path", "handle"])
def test_run_uses_it(tmp_path: Path, by_handle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scan.h5"
    data = np.random.default_rng(2).standard_normal((60, 24))
    make_usid_file(path, n_rows=6, n_cols=10, n_spectral=24, data=data)
    with h5py.File(path, "r+") as file:
        main = file[f"{CHANNEL}/Raw_Data"]
        attributes = dict(main.attrs)
        del file[f"{CHANNEL}/Raw_Data"]
        main = file.create_dataset(f"{CHANNEL}/Raw_Data", (60, 24), data.dtype, chunks=(8, 24), compression=4)
        main.attrs.update(attributes)
        if not by_handle:
            main[:] = data
            address: Any = f"{path}::{main.name}"
        else:
            process = lazyproc.map_positions  # the values are written after HDF5 opened the file: not flushed yet
            main[:] = data
            group = process(total, main, {"Sum": lazyproc.Output("f8")}, vectorized=True)
            assert (group["Sum"][:, 0] == data.sum(axis=1)).all()
            return
    decoded = Decoded(monkeypatch)
    group = lazyproc.map_positions(total, address, {"Sum": lazyproc.Output("f8")}, vectorized=True)
    assert (group["Sum"][:, 0] == data.sum(axis=1)).all()
    decoded.check(60, 8)


class Decoded:
    """Notes which rows are asked for, and how many chunks are read and decoded for that; each is done for real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[tuple[int, int]], list[int]]] = []
        rows, read = ChunkSource.rows, chunks._read

        def noted_rows(source: ChunkSource, runs: Any) -> Any:
            spans = list(runs)
            self.calls.append((spans, []))
            return rows(source, spans)

        def noted_read(descriptor: int, offset: int, size: int) -> bytes:
            self.calls[-1][1].append(offset)
            return read(descriptor, offset, size)

        monkeypatch.setattr(ChunkSource, "rows", noted_rows)
        monkeypatch.setattr(chunks, "_read", noted_read)

    def check(self, n_positions: int, high: int) -> None:
        """Each position is read once, and each chunk once for each block, however many runs that has within it.

        Before that three chunks are compared with what HDF5 reads, of one position each.
        """
        compared, used = self.calls[:3], self.calls[3:]
        assert [len(offsets) for _, offsets in compared] == [1, 1, 1]
        asked = np.concatenate([np.arange(*span) for spans, _ in used for span in spans])
        assert sorted(asked) == list(range(n_positions)), "no position is read twice"
        chunk_of: dict[int, int] = {}
        for spans, offsets in used:
            wanted = sorted({down for start, stop in spans for down in range(start // high, -(-stop // high))})
            assert len(offsets) == len(wanted), "a chunk is decoded once for a block"
            for down, offset in zip(wanted, offsets, strict=True):
                assert chunk_of.setdefault(down, offset) == offset
        assert len(set(chunk_of.values())) == len(chunk_of) == -(-n_positions // high)


def test_no_chunk_is_decoded_for_two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks end where chunks end, so that what the function is not tried on costs one decoding a chunk."""
    n_positions, high = 20_000, 250
    path = tmp_path / "scan.h5"
    data = np.random.default_rng(4).standard_normal((n_positions, 4))
    make_usid_file(path, n_rows=200, n_cols=100, n_spectral=4, data=data, chunks=(high, 4), compression="gzip")
    monkeypatch.setattr(sizing, "positions_per_block", lambda **_: 4 * high)
    decoded = Decoded(monkeypatch)
    begun: list[int] = []

    class Sum(lazyproc.Process):
        outputs = {"Sum": lazyproc.Output("f8")}
        _block_function = staticmethod(total)

    with Sum(f"{path}::{CHANNEL}/Raw_Data", cores=1) as process:
        process._progress = lambda event: begun.append(len(decoded.calls)) if isinstance(event, Started) else None
        assert (process.compute()["Sum"][:, 0] == data.sum(axis=1)).all()
    decoded.check(n_positions, high)
    blocks = [set(offsets) for _, offsets in decoded.calls[begun[0] :]]
    assert len(blocks) > 10
    assert sum(map(len, blocks)) == len(set().union(*blocks)), "no two blocks share a chunk"


def test_chunks_that_move_before_the_run_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    make_usid_file(path, n_rows=6, n_cols=10, n_spectral=24, data=np.zeros((60, 24)))
    values = np.random.default_rng(5).standard_normal((60, 24))

    class Sum(lazyproc.Process):
        outputs = {"Sum": lazyproc.Output("f8")}
        _block_function = staticmethod(total)

    with h5py.File(path, "r+") as file:
        attributes = dict(file[f"{CHANNEL}/Raw_Data"].attrs)
        del file[f"{CHANNEL}/Raw_Data"]
        main = file.create_dataset(f"{CHANNEL}/Raw_Data", (60, 24), "f8", chunks=(8, 24), compression=4)
        main.attrs.update(attributes)
        main[:] = 0
        file.flush()
        process = Sum(main)
        main[:] = values  # takes more room compressed: the chunks move
        group = process.compute()
        assert (group["Sum"][:, 0] == values.sum(axis=1)).all()


def test_scattered_positions_cost_one_decoding_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run leaves them whose failed positions are tried again."""
    path = tmp_path / "file.h5"
    layout = {"shape": (60, 40), "chunks": (8, 25), "dtype": "f8", "compression": 1, "shuffle": False,
              "fletcher32": False, "libver": "earliest", "written": 1.0}  # fmt: skip
    values = write(path, layout, 3)
    with h5py.File(path) as file:
        source = chunked_source(file["data"], str(path))
    assert source is not None
    decoded = Decoded(monkeypatch)
    assert (source.rows([(start, start + 1) for start in range(0, 60, 2)]) == values[::2]).all()
    ((_, offsets),) = decoded.calls
    assert len(offsets) == len(set(offsets)) == 8 * 2


@pytest.mark.parametrize(
    ("compression", "chunks", "expected"),
    [("szip", True, 2), ("gzip", True, 0), ("lzf", True, 0), (None, None, 0)],
    ids=str,
)
def test_processes_start_at_once_where_hdf5_has_much_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Any, chunks: Any, expected: int
) -> None:
    """And what they compute is right, whether or not they are needed in the end."""
    path, name = make_usid_file(tmp_path / "a.h5", n_rows=40, chunks=chunks, compression=compression)
    monkeypatch.setattr("lazyproc.run.where._HDF5_PER_SECOND", 1.0)
    started: list[int] = []
    start = Crew.start
    monkeypatch.setattr(Crew, "start", lambda crew, n: (started.append(n), start(crew, n))[1])

    def means(block: Any) -> Any:
        return block.mean(axis=1)

    group = lazyproc.map_positions(means, f"{path}::{name}", {"Mean": lazyproc.Output("f4")}, vectorized=True, cores=2)
    with h5py.File(path, "r") as file:
        np.testing.assert_allclose(group["Mean"][:, 0], file[name][:].mean(axis=1), rtol=1e-6)
    assert max(started, default=0) == expected


def test_a_table_of_chunks_that_leaves_no_room_is_noticed_before_the_function_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known only once the chunks were looked at, when the first check, of one position alone, is over."""
    address = "::".join(make_usid_file(tmp_path / "a.h5", chunks=True, compression="gzip"))
    before = (tmp_path / "a.h5").read_bytes()
    monkeypatch.setattr(ChunkSource, "table_bytes", 100 * 2**20)
    called: list[int] = []

    def mean(spectrum: Any) -> Any:
        called.append(1)
        return spectrum.mean()

    with pytest.raises(
        lazyproc.MemoryLimitError, match=r"max_mem_mb: 64 MiB are allowed.*books of many holes or chunks"
    ):
        lazyproc.map_positions(mean, address, lazyproc.Output("f4"), max_mem_mb=64, cores=1)
    assert called == []
    assert (tmp_path / "a.h5").read_bytes() == before
