"""Fingerprints of main datasets: every changed byte is noticed, whatever the layout; samples are spread over all."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from usid_files import make_usid_file

import lazyproc.hdf5.fingerprint as module
from lazyproc.hdf5.extents import ExtentSource
from lazyproc.hdf5.files import Files
from lazyproc.hdf5.fingerprint import VERIFY, fingerprint
from lazyproc.hdf5.source import FileSource, HandleSource, source_of, write_out

N_ROWS, N_COLUMNS = 48, 10
COMPOUND = np.dtype([("Amplitude", "f4"), ("Phase", "f8")])
LAYOUTS = {
    "contiguous": {},
    "big endian": {"dtype": ">f8"},
    "compound": {"dtype": COMPOUND},
    "truth values": {"dtype": "?"},
    "half": {"dtype": "f2"},
    "chunked": {"chunks": (7, 4)},
    "gzip": {"chunks": (16, 10), "compression": "gzip"},
    "shuffled": {"chunks": (16, 10), "compression": "gzip", "shuffle": True, "fletcher32": True},
    "one chunk": {"chunks": (48, 10)},
    "scale-offset": {"chunks": (7, 4), "scaleoffset": 0, "dtype": "i4"},
}


def values_of(dtype, seed=0):
    random = np.random.default_rng(seed).integers(1, 100, (N_ROWS, N_COLUMNS))
    if dtype.fields is None:
        return (random % 2 if dtype.kind == "b" else random).astype(dtype)
    values = np.zeros(random.shape, dtype)
    for name in dtype.names:
        values[name] = random
    return values


def write(path, *, userblock=0, dtype="f4", values=None, **storage):
    """Write the dataset "main" with something before it and after it."""
    dtype = np.dtype(dtype)
    with h5py.File(path, "w", userblock_size=userblock) as file:
        file["before"] = np.arange(17)
        file.create_dataset("main", data=values_of(dtype) if values is None else values, dtype=dtype, **storage)
        file["after"] = np.arange(5)
    return os.fspath(path)


def fingerprint_of(path, verify="full", by="path"):
    """Return the fingerprint through one of the ways in which lazyproc holds a file."""
    if by == "path":
        files = Files()
        try:
            main = files.open(path)["main"]
            return fingerprint(main, source_of(main, path), verify, path)
        finally:
            files.close()
    driver = {"driver": "core", "backing_store": False} if by == "core" else {}
    with h5py.File(path, "r+" if by == "writable" else "r", **driver) as file:
        return fingerprint(file["main"], source_of(file["main"]), verify)


def stored_bytes(path):
    """Return where the bytes of the dataset lie in the file, found without the code under test."""
    raw = Path(path).read_bytes()
    with h5py.File(path, "r") as file:
        main = file["main"]
        if main.chunks is None:
            offset = main.id.get_offset()
            size = main.id.get_storage_size()
            assert raw[offset : offset + size] == main[()].tobytes()
            return [(offset, size)]
        places = []
        for number in range(main.id.get_num_chunks()):
            info = main.id.get_chunk_info(number)
            content = main.id.read_direct_chunk(info.chunk_offset)[1]
            places.append((raw.index(content), len(content)))
            assert len(content) == info.size
        return places


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("userblock", [0, 512, 4096])
def test_the_same_by_path_and_by_handle(tmp_path, layout, userblock):
    path = write(tmp_path / "a.h5", userblock=userblock, **LAYOUTS[layout])
    for verify in ("sampled", "full"):
        found = {fingerprint_of(path, verify, by) for by in ("path", "reading", "writable")}
        assert len(found) == 1
        (text,) = found
        assert text.startswith("all:")
        assert len(text) == len("all:") + 32
    assert fingerprint_of(path, "none") == ""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("userblock", [0, 512])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, layout, userblock, data):
    path = f"{tmp_path_factory.getbasetemp()}/any-{layout}-{userblock}.h5"
    if not os.path.exists(path):
        write(path, userblock=userblock, **LAYOUTS[layout])
    before = fingerprint_of(path)
    offset, size = data.draw(st.sampled_from(stored_bytes(path)))
    place = offset + data.draw(st.integers(0, size - 1))
    change = data.draw(st.integers(1, 255))
    with open(path, "r+b") as raw:
        raw.seek(place)
        old = raw.read(1)[0]
        raw.seek(place)
        raw.write(bytes([old ^ change]))
        raw.flush()
        try:
            assert fingerprint_of(path) != before
            assert fingerprint_of(path, "sampled", "reading") != before
        finally:
            raw.seek(place)
            raw.write(bytes([old]))
    assert fingerprint_of(path) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_changed_value_is_noticed(tmp_path, layout):
    path = write(tmp_path / "a.h5", **LAYOUTS[layout])
    seen = {fingerprint_of(path)}
    for number, place in enumerate([(0, 0), (47, 9), (20, 3)]):
        with h5py.File(path, "r+") as file:
            other = values_of(file["main"].dtype, seed=99)[place]
            file["main"][place] = ~other if other.dtype == bool else other
            changed = file["main"][place] != values_of(file["main"].dtype)[place]
        if changed:
            found = fingerprint_of(path)
            assert found not in seen, number
            seen.add(found)
    assert len(seen) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_beside_the_dataset_does_not_count(tmp_path, layout):
    path = write(tmp_path / "a.h5", **LAYOUTS[layout])
    before = fingerprint_of(path)
    with h5py.File(path, "r+") as file:
        file["before"][...] = 1
        file["main"].attrs["units"] = "V"
        file.create_dataset("more/data", data=np.arange(1000))
    assert fingerprint_of(path) == before


def test_the_same_bytes_of_another_shape_or_type_are_others(tmp_path):
    values = values_of(np.dtype("f4"))
    texts = set()
    for number, (dtype, shape) in enumerate([("f4", (48, 10)), ("f4", (10, 48)), ("i4", (48, 10)), ("f8", (48, 5))]):
        same_bytes = np.frombuffer(values.tobytes(), dtype).reshape(shape)
        texts.add(fingerprint_of(write(tmp_path / f"{number}.h5", dtype=dtype, values=same_bytes)))
    texts.add(fingerprint_of(write(tmp_path / "fields.h5", dtype=COMPOUND)))
    renamed = np.dtype([("Amplitude", "f4"), ("Angle", "f8")])
    texts.add(fingerprint_of(write(tmp_path / "renamed.h5", dtype=renamed)))
    assert len(texts) == 6


def test_chunks_that_change_places_are_noticed(tmp_path):
    values = values_of(np.dtype("f4"))
    swapped = np.concatenate([values[16:32], values[:16], values[32:]])
    storage = {"chunks": (16, 10), "compression": "gzip"}
    assert fingerprint_of(write(tmp_path / "a.h5", values=values, **storage)) != fingerprint_of(
        write(tmp_path / "b.h5", values=swapped, **storage)
    )


@pytest.mark.parametrize("storage", [{}, {"chunks": (16, 10)}])
def test_a_copy_at_another_place_of_another_file_is_the_same(tmp_path, storage):
    first = write(tmp_path / "a.h5", **storage)
    second = write(tmp_path / "b.h5", userblock=1024, **storage)
    with h5py.File(second, "r+") as file:
        file["padding"] = np.arange(1000)
        file.copy("main", "copied")
        del file["main"]
        file["main"] = file["copied"]
    assert fingerprint_of(first) == fingerprint_of(second)


@pytest.mark.parametrize("verify", VERIFY)
@pytest.mark.parametrize("large", [False, True])
def test_datasets_that_were_never_written(tmp_path, monkeypatch, verify, large):
    if large:
        monkeypatch.setattr(module, "FULL_UP_TO", 10)
    for number, chunks in enumerate([None, (5, 5)]):
        path = os.fspath(tmp_path / f"{number}.h5")
        with h5py.File(path, "w") as file:
            file.create_dataset("main", (40, 10), "f8", chunks=chunks)
        before = fingerprint_of(path, verify)
        with h5py.File(path, "r+") as file:
            file["main"][17, 3] = 1
        assert (fingerprint_of(path, verify) != before) == (verify != "none")


def test_forms_that_are_read_through_hdf5(tmp_path):
    """External storage, virtual datasets and files in memory are hashed by their values."""
    values = values_of(np.dtype("f4"))
    outside = write(tmp_path / "outside.h5", values=values)
    paths = {name: os.fspath(tmp_path / f"{name}.h5") for name in ("external", "virtual")}
    with h5py.File(paths["external"], "w") as file:
        stored = [(os.fspath(tmp_path / "raw.bin"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("main", values.shape, "f4", external=stored)[...] = values
    with h5py.File(paths["virtual"], "w") as file:
        layout = h5py.VirtualLayout(values.shape, "f4")
        layout[...] = h5py.VirtualSource(outside, "main", values.shape)
        file.create_virtual_dataset("main", layout)
    before = {name: fingerprint_of(path, by="reading") for name, path in paths.items()}
    with h5py.File(outside, "r") as file:
        assert isinstance(source_of(file["main"]), ExtentSource)
    with h5py.File(paths["virtual"], "r") as file:
        assert isinstance(source_of(file["main"]), FileSource)
    with open(outside, "rb") as raw, h5py.File(raw, "r") as file:
        assert isinstance(source_of(file["main"]), HandleSource)
        in_memory = fingerprint(file["main"], source_of(file["main"]), "full")
    assert in_memory == fingerprint_of(outside, by="core")
    with h5py.File(paths["external"], "r+") as file:
        file["main"][4, 4] = -1
    with h5py.File(outside, "r+") as file:
        file["main"][4, 4] = -1
    assert all(fingerprint_of(path, by="reading") != before[name] for name, path in paths.items())
    assert fingerprint_of(outside, by="core") != in_memory


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_samples(monkeypatch):
    monkeypatch.setattr(module, "FULL_UP_TO", 1000)
    monkeypatch.setattr(module, "_SAMPLES", 8)
    monkeypatch.setattr(module, "_SAMPLE", 100)


@pytest.mark.usefixtures("small_samples")
@pytest.mark.parametrize("storage", [{}, {"chunks": (1, 4)}, {"chunks": (7, 4)}, {"chunks": (16, 10)}])
def test_samples_are_spread_over_the_whole_dataset(tmp_path, storage):
    path = write(tmp_path / "a.h5", values=values_of(np.dtype("f4")), **storage)
    before = fingerprint_of(path, "sampled")
    assert before.startswith("spread:")
    assert fingerprint_of(path, "full").startswith("all:")
    seen = 0
    for row in range(N_ROWS):
        with h5py.File(path, "r+") as file:
            kept = file["main"][row]
            file["main"][row] = -1
        seen += fingerprint_of(path, "sampled") != before
        first_or_last = row in (0, N_ROWS - 1)
        with h5py.File(path, "r+") as file:
            file["main"][row] = kept
        assert not first_or_last or seen
    # 8 samples of 100 of 1920 bytes, 40 bytes a row: a sample sees 3 or 4 rows, or all those of a chunk.
    assert seen >= 20
    assert storage or seen < N_ROWS
    assert fingerprint_of(path, "sampled") == before


spans_of_any_size = st.lists(st.integers(0, 500), min_size=0, max_size=40)


@settings(max_examples=300, deadline=None)
@given(sizes=spans_of_any_size, samples=st.integers(1, 12), sample=st.integers(1, 300))
def test_samples_lie_within_the_spans_in_order_and_are_as_many_bytes_as_promised(sizes, samples, sample):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SAMPLES", samples)
        patch.setattr(module, "_SAMPLE", sample)
        gap = 1000  # between spans, so that a sample beyond its span would show
        spans = [(number * gap, size) for number, size in enumerate(sizes)]
        chosen = list(module._samples(np.array(spans, np.int64).reshape(-1, 2)))
    total = sum(sizes)
    flat = []  # the samples, in bytes of all spans one after the other
    for offset, size in chosen:
        number, within = divmod(offset, gap)
        assert size > 0
        assert within + size <= sizes[number]
        start = sum(sizes[:number]) + within
        flat.append((start, start + size))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(flat))
    count = sum(stop - start for start, stop in flat)
    assert count <= samples * sample
    assert count >= min(total, sample)
    if total >= samples * sample:
        assert count == samples * sample
    if total and samples > 1:
        assert flat[0][0] == 0
        assert flat[-1][1] == total


@pytest.mark.parametrize("verify", ["full", "sampled"])
def test_many_small_chunks_take_some_dozen_bytes_each(tmp_path, monkeypatch, verify):
    """And not a tuple of numbers each, which takes some hundreds: the driver's books count for the memory allowed."""
    monkeypatch.setattr(module, "FULL_UP_TO", 1000)
    n_chunks = 30_000
    with h5py.File(tmp_path / "a.h5", "w") as file:
        main = file.create_dataset("main", (n_chunks, 4), "f4", chunks=(1, 4))
        for row in range(n_chunks):
            main.id.write_direct_chunk((row, 0), bytes(16))
    with h5py.File(tmp_path / "a.h5", "r") as file:
        source = source_of(file["main"])
        tracemalloc.start()
        try:
            assert fingerprint(file["main"], source, verify)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 100 * n_chunks, "bytes, with a MiB for what is read at a time"


def test_comparing_contiguous_data_writes_out_nothing_else_of_the_caller(tmp_path):
    """He may have changed the structure: HDF5 would write that in several steps, which nobody guards."""
    path = tmp_path / "a.h5"
    make_usid_file(path, n_rows=2, n_cols=3, n_spectral=4)
    with h5py.File(path, "r+") as file:
        main = file["/Measurement_000/Channel_000/Raw_Data"]
        main[0, 0] = 77
        file.create_group("Mine").attrs["text"] = "x" * 500
        before = path.read_bytes()
        source = source_of(main)
        write_out(main, source)
        after = path.read_bytes()
        offset, size = main.id.get_offset(), main.nbytes
        assert source.rows([(0, 1)])[0, 0] == 77
        assert before[:offset] == after[:offset]
        # HDF5 may make the file longer: nothing points there yet. It must not become shorter.
        assert before[offset + size :] == after[offset + size : len(before)]


@pytest.mark.parametrize("filters", [{}, {"compression": "gzip", "shuffle": True}])
@pytest.mark.parametrize("room", [0, 2**16])
def test_comparing_chunked_data_writes_out_nothing_of_the_structure(tmp_path, filters, room):
    """What the caller's handle knows is compared, and the file on disk stays one that opens, as it was."""
    path = tmp_path / "a.h5"
    options = {"page_buf_size": room, "fs_strategy": "page", "fs_page_size": 4096} if room else {}
    values = np.random.default_rng(5).normal(size=(48, 10))
    with h5py.File(path, "w", **options) as file:
        file.create_dataset("main", data=values, chunks=(8, 5), **filters)
    with h5py.File(path, "r") as file:
        old = fingerprint(file["main"], source_of(file["main"]), "full")
    with h5py.File(path, "r+", **({"page_buf_size": room} if room else {})) as file:
        main = file["main"]
        main[3, 3] = 77
        file.create_group("Mine").attrs["text"] = "x" * 500
        before = path.read_bytes()
        source = source_of(main)
        write_out(main, source)
        new = fingerprint(main, source, "full")
        after = path.read_bytes()
        (tmp_path / "killed.h5").write_bytes(after)
        places = [main.id.get_chunk_info(number) for number in range(main.id.get_num_chunks())]
    chunks = {place for one in places for place in range(one.byte_offset, one.byte_offset + one.size)}
    changed = {place for place in range(len(before)) if before[place : place + 1] != after[place : place + 1]}
    assert changed <= chunks, "but for rows of the main dataset, the file is as it was"
    with h5py.File(tmp_path / "killed.h5", "r") as file:
        assert "Mine" not in file
        np.testing.assert_array_equal(np.delete(file["main"][()], np.s_[:8], axis=0), values[8:])
        if not filters:
            assert file["main"][3, 3] in (77, values[3, 3])
    with h5py.File(path, "r") as file:
        assert file["main"][3, 3] == 77
        assert new != old
        assert fingerprint(file["main"], source_of(file["main"]), "full") == new
