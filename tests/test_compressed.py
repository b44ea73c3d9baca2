"""Compressed results: the same values, stored compressed, whatever dies or is missing on the way."""

from __future__ import annotations

import errno
import glob
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from faults import run, small_disks
from faults.subject import N_POSITIONS as FULL_SCAN
from faults.subject import RESULT_BYTES, make_scan
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from usid_files import CHANNEL, make_usid_file, random_data

import lazyproc
from lazyproc import cli
from lazyproc.core import compression
from lazyproc.core.compression import Compression, chunk_shape
from lazyproc.core.errors import ArgumentValueError, DefinitionError, LazyprocError, NoRoomError, ResultsError
from lazyproc.hdf5 import compress, overlay, transaction
from lazyproc.hdf5.compress import encode, n_threads
from lazyproc.hdf5.overlay import Overlay
from lazyproc.run import finishing
from lazyproc.run.collective import _refuse_compression
from lazyproc.status import file_status

MAIN = f"{CHANNEL}/Raw_Data"
N_POSITIONS, N_SPECTRAL = 240, 16
DIES_AT = "LAZYPROC_TEST_DIES_AT"


class Maps(lazyproc.Process):
    process_name = "Maps"
    outputs = {
        "Mean": lazyproc.Output("f8", compression="gzip", units="V"),
        "Scaled": lazyproc.Output("f4", shape_from_main=True, compression="gzip", compression_opts=6, shuffle=True),
        "First": lazyproc.Output("f4"),
    }

    @staticmethod
    def _map_function(row: NDArray[Any]) -> Any:
        if float(os.environ.get(DIES_AT, "-1")) == row[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return row.mean(), 2 * row, row[0]


def uncompressed(outputs: dict[str, lazyproc.Output]) -> dict[str, lazyproc.Output]:
    return {
        name: lazyproc.Output(one.dtype, one.dims, one.quantity, one.units, one.shape_from_main, one.fill_value)
        for name, one in outputs.items()
    }


class Plain(Maps):
    outputs = uncompressed(Maps.outputs)


class Recording(Maps):
    process_name = "Recording"
    bad = True

    @staticmethod
    def _map_function(row: NDArray[Any]) -> Any:
        if row[0] % 7 == 3 and not os.environ.get("LAZYPROC_TEST_MENDED"):
            raise ValueError("bad")
        return row.mean(), 2 * row, row[0]


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scans" / "scan.h5"
    path.parent.mkdir()
    data = np.random.default_rng(1).standard_normal((N_POSITIONS, N_SPECTRAL)).astype("f4")
    data[:, 0] = np.arange(N_POSITIONS)
    make_usid_file(path, n_rows=12, n_cols=20, n_spectral=N_SPECTRAL, data=data)
    return path


def address(path: Path) -> str:
    return f"{path}::{MAIN}"


def expected(path: Path) -> dict[str, NDArray[Any]]:
    """What the same function gives without compression, bit for bit."""
    with h5py.File(path, "r") as file:
        rows = file[MAIN][:]
    means = np.array([[row.mean()] for row in rows], "f8")
    return {"Mean": means, "Scaled": np.array([2 * row for row in rows], "f4"), "First": rows[:, :1]}


def compute(path: Path, kind: type[lazyproc.Process] = Maps, **options: Any) -> str:
    with kind(address(path), cores=1, **options) as process:
        return str(process.compute().name)


def check_stored(group: h5py.Group, values: dict[str, NDArray[Any]]) -> None:
    for name, wanted in values.items():
        dataset = group[name]
        assert dataset[:].tobytes() == wanted.tobytes(), name
        assert not dataset.external
        assert not any(key.startswith("lazyproc_compression") for key in dataset.attrs)
        output = Maps.outputs[name]
        filters = (dataset.compression, dataset.compression_opts, dataset.shuffle)
        if output.filters is None:
            assert filters == (None, None, False)
            assert dataset.chunks is None
        else:
            assert filters == ("gzip", output.filters.level, output.filters.shuffle)
            assert dataset.chunks == chunk_shape(*wanted.shape, wanted.dtype.itemsize)


def rows_beside(path: Path) -> list[str]:
    return sorted(glob.glob(f"{path.parent}/.{path.name}.lazyproc-rows-*"))


def die(path: Path, at: int = 150, *, by: str = "path", target: str | None = None) -> None:
    """Let a real process compute, and kill itself in the middle."""
    code = f"""
import h5py, test_compressed as t
from pathlib import Path
path = Path({str(path)!r})
file = h5py.File(path, "r+") if {by!r} == "handle" else None
main = t.address(path) if file is None else file[t.MAIN]
with t.Maps(main, cores=1, checkpoint_interval=0.0, h5_target_group={target!r}) as process:
    process.compute()
"""
    environment = os.environ | {DIES_AT: str(at), "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def group_in(path: Path, name: str = f"{CHANNEL}/Raw_Data-Maps_000") -> dict[str, Any]:
    """What plain h5py reads of a group."""
    with h5py.File(path, "r") as file:
        return {key: item[()] for key, item in file[name].items() if isinstance(item, h5py.Dataset)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "CHUNK_BYTES", 1000)


# -- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "level", "shuffle"),
    [
        ({"compression": "gzip"}, 4, False),
        ({"compression": True}, 4, False),
        ({"compression": 0}, 0, False),
        ({"compression": 9, "shuffle": True}, 9, True),
        ({"compression": "gzip", "compression_opts": 1}, 1, False),
    ],
)
def test_the_keywords_of_h5py(keywords: dict[str, Any], level: int, shuffle: bool) -> None:
    filters = lazyproc.Output("f4", **keywords).filters
    assert filters == Compression(level, shuffle)
    with h5py.File(io.BytesIO(), "w") as file:  # h5py means the same
        dataset = file.create_dataset("a", (10, 10), "f4", **keywords)
        assert (dataset.compression, dataset.compression_opts, dataset.shuffle) == ("gzip", level, shuffle)


@pytest.mark.parametrize(
    "keywords",
    [
        {"compression": "szip"},
        {"compression": "lzf"},
        {"compression": "GZIP"},
        {"compression": 10},
        {"compression": -1},
        {"compression": 4, "compression_opts": 4},
        {"compression": "gzip", "compression_opts": 10},
        {"compression": "gzip", "compression_opts": (1,)},
        {"compression": "gzip", "compression_opts": True},
        {"compression": 32001},
        {"compression_opts": 4},
        {"shuffle": True},
        {"compression": "gzip", "shuffle": "yes"},
    ],
)
def test_what_is_not_done_is_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match=r"Output: .*; expected"):
        lazyproc.Output("f4", **keywords)


@given(n=st.integers(1, 10**7), width=st.integers(1, 10**7), itemsize=st.integers(1, 10**7), most=st.just(2**20))
def test_chunks_are_one_piece_of_the_rows(n: int, width: int, itemsize: int, most: int) -> None:
    compression.CHUNK_BYTES = most
    rows, columns = chunk_shape(n, width, itemsize)
    assert 1 <= rows <= n
    assert 1 <= columns <= width
    assert columns == width or rows == 1
    assert rows * columns * itemsize <= most or rows * columns == 1
    for total, part in ((n, rows), (width, columns)):
        assert part * -(-total // part) < total + -(-total // part), "padded by less than one a chunk"


@given(
    data=st.binary(min_size=8, max_size=4000).map(lambda data: data[: len(data) // 8 * 8]),
    level=st.integers(0, 9),
    shuffle=st.booleans(),
    itemsize=st.sampled_from([1, 2, 4, 8]),
)
def test_what_is_encoded_h5py_decodes(data: bytes, level: int, shuffle: bool, itemsize: int) -> None:
    packed = encode(data, Compression(level, shuffle), itemsize)
    values = np.frombuffer(data, f"V{itemsize}")
    with h5py.File(io.BytesIO(), "w") as file:
        filters = {"compression": level, "shuffle": shuffle}
        made = file.create_dataset("b", values.shape, values.dtype, chunks=values.shape, **filters)
        made.id.write_direct_chunk((0,), packed)
        assert made[:].tobytes() == data
    if not shuffle:
        assert zlib.decompress(packed) == data


# -- values and storage ----------------------------------------------------------------------------------------------


@contextmanager
def opened(way: str, path: Path) -> Iterator[tuple[Any, Any]]:
    """Give main dataset and target group in one of the ways they can be handed over."""
    other = path.parent / "out.h5"
    if way == "path":
        yield address(path), None
    elif way == "path, new file":
        yield address(path), f"{other}::/some/where"
    elif way == "handle":
        with h5py.File(path, "r+") as file:
            yield file[MAIN], None
    elif way == "handle, existing file":
        with h5py.File(path, "r") as file, h5py.File(other, "w") as target:
            yield file[MAIN], target.create_group("some/where")
    else:
        with h5py.File(path, "r") as file, h5py.File("memory", "w", driver="core", backing_store=False) as target:
            yield file[MAIN], target


WAYS = ["path", "path, new file", "handle", "handle, existing file", "memory"]


@pytest.mark.parametrize("way", WAYS)
def test_values_and_storage(scan: Path, way: str) -> None:
    with opened(way, scan) as (main, target), Maps(main, h5_target_group=target, cores=1) as process:
        group = process.compute()
        check_stored(group, expected(scan) if not group.file.mode == "r+" or way != "handle" else values_of(main))
        assert group["Mean"].attrs["units"] == "V"
        assert group["Mean"].attrs["Position_Indices"]
        assert np.isnan(group["Mean"].fillvalue)
        maps = lazyproc.open_results(group)
        assert maps["Scaled"].size == N_POSITIONS * N_SPECTRAL
        assert np.isfinite(maps["Scaled"].values).all()
    assert rows_beside(scan) == []
    assert rows_beside(scan.parent / "out.h5") == []


def values_of(main: h5py.Dataset) -> dict[str, NDArray[Any]]:
    rows = main[:]
    return {"Mean": np.array([[row.mean()] for row in rows], "f8"), "Scaled": 2 * rows, "First": rows[:, :1]}


COMPOUND = np.dtype([("a", "f4"), ("b", "i2"), ("c", "S5")])


@pytest.mark.parametrize("dtype", ["?", "u1", ">i4", "c16", "S7", COMPOUND], ids=str)
def test_any_dtype(scan: Path, dtype: Any) -> None:
    wanted = random_data((N_POSITIONS, 5), dtype)

    class Any_(lazyproc.Process):
        process_name = "Any"
        outputs = {
            "Out": lazyproc.Output(dtype, [lazyproc.Dimension("N", "", 5)], compression=1, shuffle=True),
        }

        @staticmethod
        def _block_function(block: NDArray[Any]) -> Any:
            return wanted[block[:, 0].astype(int)]

    with Any_(address(scan), cores=1) as process:
        dataset = process.compute()["Out"]
        assert dataset[:].tobytes() == wanted.tobytes()
        assert dataset.dtype == wanted.dtype
        assert (dataset.compression, dataset.shuffle) == ("gzip", True)
        assert np.asarray(dataset.fillvalue, dtype).tobytes() == Any_.outputs["Out"].fill_value.tobytes()


@pytest.mark.parametrize("how", [{"libver": "latest"}, {"chunks": (7, 5), "compression": "gzip"}], ids=str)
@pytest.mark.parametrize("by", ["path", "handle"])
def test_files_of_other_kinds(tmp_path: Path, how: dict[str, Any], by: str) -> None:
    path = tmp_path / "scan.h5"
    data = random_data((N_POSITIONS, N_SPECTRAL), "f4")
    make_usid_file(path, n_rows=12, n_cols=20, n_spectral=N_SPECTRAL, data=data, **how)
    with opened(by, path) as (main, _), Maps(main, cores=1) as process:
        process.compute()
    with h5py.File(path, "r") as file:
        check_stored(file[f"{CHANNEL}/Raw_Data-Maps_000"], expected(path))
    assert rows_beside(path) == []


@pytest.mark.parametrize("size", [40, 4, 1])
def test_rows_wider_than_a_chunk(scan: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(compression, "CHUNK_BYTES", size)
    with Maps(address(scan), cores=1) as process:
        group = process.compute()
        assert group["Scaled"].chunks == (1, max(1, 8 if size == 40 else size // 4))
        check_stored(group, expected(scan))


def test_worker_processes_write_the_rows(scan: Path) -> None:
    with Maps(address(scan), cores=2) as process:
        check_stored(process.compute(), expected(scan))


def test_the_file_is_smaller_than_without(scan: Path) -> None:
    other = shutil.copy(scan, scan.parent / "other.h5")

    class Zeros(Maps):
        outputs = {"Out": lazyproc.Output("f8", [lazyproc.Dimension("N", "", 500)], compression="gzip")}

        @staticmethod
        def _map_function(row: NDArray[Any]) -> Any:
            return np.full(500, row[0])

    class PlainZeros(Zeros):
        outputs = uncompressed(Zeros.outputs)

    compute(scan, Zeros)
    compute(Path(other), PlainZeros)
    assert os.path.getsize(scan) < os.path.getsize(other) - 0.8 * 8 * 500 * N_POSITIONS


def test_stored_otherwise_is_the_same_result(scan: Path) -> None:
    name = compute(scan, Plain)
    assert compute(scan, Maps) == name
    assert group_in(scan)["Mean"].tobytes() == expected(scan)["Mean"].tobytes()
    with h5py.File(scan) as file:
        assert file[name]["Mean"].chunks is None, "it stays as it is"
    other = scan.parent / "out.h5"
    name = compute(scan, Maps, h5_target_group=f"{other}::/")
    assert compute(scan, Plain, h5_target_group=f"{other}::/") == name


def test_partial_results_end_as_they_were_begun(scan: Path) -> None:
    die(scan)
    with Plain(address(scan), cores=1) as process:
        group = process.compute()
        assert group.name == f"{CHANNEL}/Raw_Data-Maps_000"
        check_stored(group, expected(scan))


def test_override_makes_another_group(scan: Path) -> None:
    first = compute(scan)
    with Maps(address(scan), cores=1) as process:
        group = process.compute(override=True)
        assert group.name != first
        check_stored(group, expected(scan))


def test_map_positions_and_plan(scan: Path) -> None:
    with Maps(address(scan), cores=1) as process:
        plan = process.plan()
        assert plan.disk_bytes == 2 * N_POSITIONS * (8 + 4 * N_SPECTRAL)
        assert "until the results are compressed" in repr(plan)
    outputs = {"Sum": lazyproc.Output("f8", compression=2)}
    group = lazyproc.map_positions(lambda row: row.sum(), address(scan), outputs, process_name="Sums", cores=1)
    assert group["Sum"].compression_opts == 2


# -- killed, and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "cores"), [("path", 1), ("path", 2), ("handle", 2), ("new file", 1)])
def test_killed_and_resumed(scan: Path, way: str, cores: int) -> None:
    target = f"{scan.parent}/out.h5::/x" if way == "new file" else None
    results = scan.parent / "out.h5" if target else scan
    name = "/x/Raw_Data-Maps_000" if target else f"{CHANNEL}/Raw_Data-Maps_000"
    die(scan, by="handle" if way == "handle" else "path", target=target)
    assert len(rows_beside(results)) == 2
    found = group_in(results, name)  # plain h5py reads what is done
    done = found["completed_positions"].astype(bool)
    assert 0 < done.sum() < N_POSITIONS
    for key, wanted in expected(scan).items():
        assert found[key][done].tobytes() == wanted[done].tobytes()
        assert np.isnan(found[key][~done][-1]).all()
    maps = lazyproc.open_results(f"{results}::{name}")
    assert int((maps["status"] == 1).sum()) == done.sum()
    assert np.isfinite(maps["Mean"].values).sum() == done.sum()
    (state,) = file_status(str(results)).results
    assert (state.n_done, state.problem) == (done.sum(), "")
    with Maps(address(scan), cores=cores, h5_target_group=target) as process:
        assert [group.name for group in process.partial_h5_groups] == [name]
        everything = process.to_xarray()["Mean"].values
        assert np.isfinite(everything).all()
        group = process.compute()
        assert group.name == name
        check_stored(group, expected(scan))
    assert rows_beside(results) == []


def test_resumed_on_a_cluster(scan: Path) -> None:
    die(scan)
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        Maps(address(scan), client=client) as process,
    ):
        check_stored(process.compute(), expected(scan))
    assert rows_beside(scan) == []


def test_pyusid_reads_partial_and_finished_results(scan: Path) -> None:
    sid = pytest.importorskip("sidpy")
    usid = pytest.importorskip("pyUSID")
    assert sid is not None
    die(scan)
    for done in (False, True):
        if done:
            compute(scan)
        with h5py.File(scan, "r") as file:
            main = usid.USIDataset(file[f"{CHANNEL}/Raw_Data-Maps_000/Scaled"])
            assert main[()].shape == (N_POSITIONS, N_SPECTRAL)
            assert np.isfinite(main.get_n_dim_form()).all() == done


def test_resumed_through_a_handle_with_an_open_dataset(scan: Path) -> None:
    """The driver then writes through HDF5, and has to sync the rows' files, too."""
    die(scan)
    with h5py.File(scan, "r+") as file:
        held = file[f"{CHANNEL}/Raw_Data-Maps_000/Mean"]
        with Maps(file[MAIN], cores=1) as process:
            group = process.compute()
        check_stored(group, values_of(file[MAIN]))
        with pytest.raises(OSError, match="external raw data"):  # what was replaced cannot be read any more
            held[:]


def test_a_complete_group_is_compressed_by_the_next_call(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lazyproc.run.group.finish_results", lambda *args, **more: None)
        name = compute(scan)
    assert len(rows_beside(scan)) == 2
    monkeypatch.setenv(DIES_AT, "5")  # nothing is computed again
    with monkeypatch.context() as patch:  # a file that cannot be written
        patch.setattr(finishing, "finish", lambda *args, **more: (_ for _ in ()).throw(LazyprocError("read-only")))
        assert compute(scan) == name
    with Maps(address(scan), cores=1) as process:
        assert [group.name for group in process.duplicate_h5_groups] == [name]
        check_stored(process.compute(), expected(scan))
    assert rows_beside(scan) == []
    (state,) = file_status(str(scan)).results
    assert state.finished
    assert not state.problem


def test_ctrl_c_leaves_compressing_to_the_next_call(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupting(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT) if not interrupted else None
        interrupted.append(1)
        return encode(*args)

    interrupted: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(compress, "encode", interrupting)
        with pytest.raises(lazyproc.Interrupted, match="all 240 positions"):
            compute(scan)
    monkeypatch.setenv(DIES_AT, "5")
    with Maps(address(scan), cores=1) as process:
        check_stored(process.compute(), expected(scan))


# -- files that are missing, moved or left over ----------------------------------------------------------------------


def spoil(way: str, rows: Path) -> None:
    if way == "gone":
        rows.rename(rows.parent / "kept")
    elif way == "short":
        shutil.copy(rows, rows.parent / "kept")
        os.truncate(rows, 5000)
    else:
        shutil.copy(rows, rows.parent / "kept")
        rows.write_bytes(bytes(rows.stat().st_size))


@pytest.mark.parametrize("way", ["gone", "short", "another"])
def test_rows_that_are_missing_are_told(scan: Path, way: str) -> None:
    die(scan)
    name = f"{CHANNEL}/Raw_Data-Maps_000"
    rows = Path(rows_beside(scan)[0])
    spoil(way, rows)
    words = {"gone": "is not there", "short": "has 5000 bytes; expected", "another": "does not hold its rows"}[way]
    (state,) = file_status(str(scan)).results
    with Maps(address(scan), cores=1) as process:
        assert process.partial_h5_groups == []
        text = str(process.why_not_duplicate(process.h5_main.parent[name.rpartition("/")[2]]))
    for told in (state.problem, text):
        assert words in told
        assert str(rows) in told
        assert "Restore it" in told
        assert "override" in told
    maps = lazyproc.open_results(f"{scan}::{name}")
    with pytest.raises(ResultsError, match=words):
        maps["Mean"].values  # noqa: B018
    with Maps(address(scan), cores=1) as process:
        assert process.compute().name != name
    (rows.parent / "kept").rename(rows)  # restored
    with Maps(address(scan), cores=1) as process:
        assert [group.name for group in process.partial_h5_groups] == [name]


def test_moved_together(scan: Path, tmp_path: Path) -> None:
    die(scan)
    name = f"{CHANNEL}/Raw_Data-Maps_000"
    before = [Path(rows).read_bytes() for rows in rows_beside(scan)]
    shutil.copytree(scan.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / "scan.h5"
    maps = lazyproc.open_results(f"{moved}::{name}")
    with pytest.raises(ResultsError, match="moved together"):
        maps["Mean"].values  # noqa: B018  not the values of the other file
    with Maps(address(moved), cores=1) as process:
        group = process.compute()
        assert group.name == name
        check_stored(group, expected(moved))
    assert rows_beside(moved) == []
    assert [Path(rows).read_bytes() for rows in rows_beside(scan)] == before, "a copy leaves the original alone"
    assert compute(scan) == name


def test_moved_and_killed_again(scan: Path, tmp_path: Path) -> None:
    die(scan, 100)
    (tmp_path / "moved").mkdir()
    for path in [scan, *map(Path, rows_beside(scan))]:
        path.rename(tmp_path / "moved" / path.name)
    moved = tmp_path / "moved" / "scan.h5"
    die(moved, 200)
    with h5py.File(moved, "r") as file:  # plain h5py follows, too
        assert np.isfinite(file[f"{CHANNEL}/Raw_Data-Maps_000/Mean"][:190]).all()
    compute(moved)
    with h5py.File(moved, "r") as file:
        check_stored(file[f"{CHANNEL}/Raw_Data-Maps_000"], expected(moved))


def test_a_copy_of_the_file_alone_is_not_used(scan: Path) -> None:
    """Else two runs would write into the same rows."""
    die(scan)
    copied = Path(shutil.copy(scan, scan.parent / "copy.h5"))
    with Maps(address(copied), cores=1) as process:
        assert process.partial_h5_groups == []
        text = str(process.why_not_duplicate(process.h5_main.parent["Raw_Data-Maps_000"]))
    assert ".copy.h5.lazyproc-rows-" in text
    assert ".scan.h5.lazyproc-rows-" in text


@pytest.mark.parametrize("way", ["compute", "recover"])
def test_left_over_rows_are_removed(scan: Path, way: str) -> None:
    die(scan)
    partial = rows_beside(scan)
    inode = scan.stat().st_ino
    for number, owner in ((1, inode), (2, inode + 1)):
        about = {"run_id": "x", "output": "y", "bytes": 0, "inode": owner}
        left = scan.parent / f".scan.h5.lazyproc-rows-x-y-{number}"
        left.write_bytes(b"lazyproc rows 1\n" + json.dumps(about).encode())
    foreign = str(left)
    if way == "recover":
        result = CliRunner().invoke(cli.main, ["recover", str(scan)])
        assert result.exit_code == 0, result.output
        assert rows_beside(scan) == sorted([*partial, foreign])
    else:
        compute(scan)
        assert rows_beside(scan) == [foreign], "that of another file stays"


def test_a_deleted_group_leaves_no_rows_behind(scan: Path) -> None:
    die(scan)
    with h5py.File(scan, "r+") as file:
        del file[f"{CHANNEL}/Raw_Data-Maps_000"]
    compute(scan)
    assert rows_beside(scan) == []


# -- failures, full disks, ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["path", "handle"])
def test_failed_positions_are_retried(scan: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    bad = np.arange(N_POSITIONS) % 7 == 3
    wanted = expected(scan)
    with opened(way, scan) as (main, _), Recording(main, cores=1, on_error="record") as process:
        group = process.compute()
        assert group["Mean"].compression == "gzip"
        assert (np.isnan(group["Mean"][:, 0]) == bad).all()
        assert len(lazyproc.failures(group)) == bad.sum()
        monkeypatch.setenv("LAZYPROC_TEST_MENDED", "1")
        process.retry_failed()
    with h5py.File(scan, "r") as file:
        group = file[f"{CHANNEL}/Raw_Data-Recording_000"]
        check_stored(group, wanted)
    assert not lazyproc.failures(f"{scan}::{group.name or f'{CHANNEL}/Raw_Data-Recording_000'}")


def test_no_room_for_the_rows(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scan.read_bytes()

    def full(descriptor: int, start: int, n_bytes: int, path: str, what: str) -> None:
        if "rows" in what and "Scaled" in what:
            raise NoRoomError(f"{path}: no room for {what}", errno.ENOSPC)

    with monkeypatch.context() as patch:
        patch.setattr("lazyproc.hdf5.rows_file.reserve", full)
        with pytest.raises(NoRoomError, match="Scaled"):
            compute(scan)
    assert rows_beside(scan) == []
    assert scan.read_bytes() == before
    compute(scan)


@pytest.mark.parametrize("way", ["path", "handle"])
def test_no_room_to_compress(scan: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The results stay complete as they are; the next call compresses them."""
    really_finish = finishing.finish
    sizes: list[int] = []

    def finish(*args: Any, **more: Any) -> None:
        sizes.append(scan.stat().st_size)
        with monkeypatch.context() as patch:
            patch.setattr(overlay, "write_all", full)
            patch.setattr(overlay, "MOST_KEPT", 4096)
            patch.setattr(compress, "reserve", none_left)
            really_finish(*args, **more)

    def full(descriptor: int, data: bytes, offset: int) -> None:
        os.pwrite(descriptor, data[:100], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    def none_left(descriptor: int, start: int, n_bytes: int, path: str, what: str) -> None:
        if what == "the compressed results":
            raise NoRoomError(f"{path}: no room for {what}", errno.ENOSPC)

    monkeypatch.setattr(compression, "CHUNK_BYTES", 5000)
    with opened(way, scan) as (main, _):
        with monkeypatch.context() as patch:
            patch.setattr(finishing, "finish", finish)
            with Maps(main, cores=1) as process, pytest.raises(NoRoomError, match="no room"):
                process.compute()
        assert len(rows_beside(scan)) == 2
        assert way == "handle" or scan.stat().st_size == sizes[0], "what was written is cut off again"
        monkeypatch.setenv(DIES_AT, "5")
        with Maps(main, cores=1) as process:
            group = process.compute()
            check_stored(group, expected(scan) if way == "path" else values_of(main))
    assert rows_beside(scan) == []


@pytest.mark.parametrize("by", ["zipped", "zipped handle"])
def test_a_small_disk(tmp_path: Path, by: str) -> None:
    """At each step between no room at all and enough: an error that helps, nothing lost, and the same call goes on."""
    source, folder = tmp_path / "scan.h5", tmp_path / "disk"
    folder.mkdir()
    make_scan(os.fspath(source))
    levels = [0, RESULT_BYTES, RESULT_BYTES * 5 // 4, RESULT_BYTES * 13 // 8, 2 * RESULT_BYTES + 2**17]
    stages = set()
    for told in run("full", "create", folder, source, "disk", by, levels, under=small_disks()):
        assert told["error"] in ("", "NoRoomError"), told
        assert told["problems"] == told["problems again"] == [], told
        assert told["again"]["error"] == "", told
        assert set(told["masks again"].values()) == {FULL_SCAN}, told
        if told["error"]:
            stages.add("compressing" if told["masks"] else "creating")
            assert set(told["masks"].values()) <= {FULL_SCAN}, told
            assert told["masks"] or told["left"] == [] or "handle" in by, told
    assert {"creating", "compressing"} & stages


def test_ranks_together_are_refused(scan: Path) -> None:
    with Maps(address(scan), cores=1) as process:
        declared = process._declared()
    with pytest.raises(ArgumentValueError, match=r"'Mean'.*mpio.*expected none.*cluster"):
        _refuse_compression(declared)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_an_overlay_that_spills_shows_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one that keeps all in memory, in random writes, cuts and reads; then what both leave in the file."""
    monkeypatch.setattr(overlay, "MOST_KEPT", 3 * 4096)
    for seed in range(60):
        chance = random.Random(seed)
        start = chance.randbytes(chance.choice([0, 100, 4096, 9000, 20000]))
        files = [tmp_path / "spilled", tmp_path / "kept"]
        descriptors = []
        for path in files:
            path.write_bytes(start)
            descriptors.append(os.open(path, os.O_RDWR))
        both = [Overlay(descriptors[0], "a", spills=True), Overlay(descriptors[1], "b")]
        for _ in range(60):
            place, size = chance.randrange(60000), chance.choice([1, 100, 4096, 5000, 12288, 30000])
            data = chance.choice([chance.randbytes(size), bytes(size)])
            act = chance.random()
            seen = []
            for one in both:
                if act < 0.1:
                    one.truncate(place)
                elif act < 0.8:
                    one.seek(place)
                    one.write(data)
                one.seek(0)
                buffer = bytearray(one.size)
                assert one.readinto(buffer) == one.size
                seen.append(bytes(buffer))
            assert seen[0] == seen[1], seed
            assert both[0]._n_new <= 4
        left = []
        for one, descriptor, path in zip(both, descriptors, files, strict=True):
            patches, added = one.changes()
            for offset, _, new in patches:
                os.pwrite(descriptor, new, offset)
            for offset, new in added:
                os.pwrite(descriptor, new, offset)
            os.ftruncate(descriptor, one.size)
            os.close(descriptor)
            left.append(path.read_bytes())
        assert left[0] == left[1] == seen[0], seed


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressing 64 MiB of noise takes no more than the chunks under way and what a transaction keeps."""
    monkeypatch.setattr(compression, "CHUNK_BYTES", 2**20)
    path = tmp_path / "scan.h5"
    make_usid_file(path, n_rows=16, n_cols=16, n_spectral=4)

    class Noise(lazyproc.Process):
        outputs = {"Out": lazyproc.Output("f8", [lazyproc.Dimension("N", "", 2**15)], compression=1)}

        @staticmethod
        def _block_function(block: NDArray[Any]) -> Any:
            return np.random.default_rng(0).random((len(block), 2**15))

    with monkeypatch.context() as patch:
        patch.setattr("lazyproc.run.group.finish_results", lambda *args, **more: None)
        compute(path, Noise)
    tracemalloc.start()
    compute(path, Noise)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert os.path.getsize(path) > 56 * 2**20
    assert peak < 24 * 2**20, f"{peak / 2**20:.1f} MiB"


def test_threads_fit_into_the_memory() -> None:
    compression.CHUNK_BYTES = 2**20
    outputs = [lazyproc.Output("f8", compression=1).resolve("a", 1), lazyproc.Output("f8").resolve("b", 1)]
    assert n_threads(outputs, 10**6, 64, 2**40) == 64
    assert n_threads(outputs, 10**6, 64, 48 * 2**20) == 5
    assert n_threads(outputs, 10**6, 64, 1) == 1
    assert n_threads([], 10**6, 64, 2**40) == 64


def test_what_a_death_left_beyond_the_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for libver in ("earliest", "latest"):
        with h5py.File(path, "w", libver=libver) as file:
            file["a"] = np.arange(100)
        size = path.stat().st_size
        with open(path, "ab") as file:
            file.write(bytes(range(256)) * 2**13)
        with transaction.transaction(str(path)) as file:
            file["b"] = np.arange(100)
        assert size <= path.stat().st_size < size + 2**16
        with h5py.File(path, "r") as file:
            assert file["a"][:].tolist() == file["b"][:].tolist()
