"""The commit layer: data before mask, at least every interval, in whichever file and through whatever handle."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file, random_data

import lazyproc
from lazyproc.core import sizing
from lazyproc.core.errors import FileBusyError, FunctionError, OutputError
from lazyproc.core.events import Committed
from lazyproc.engine import local
from lazyproc.engine.kernel import Kernel
from lazyproc.hdf5.files import Files
from lazyproc.status import file_status

MAIN = f"{CHANNEL}/Raw_Data"
MASK = "completed_positions"
N_POSITIONS = 60
OUTPUTS = {"Mean": lazyproc.Output("f8"), "Twice": lazyproc.Output("f4", shape_from_main=True)}


def numbered(n_positions: int = N_POSITIONS, n_spectral: int = 6) -> np.ndarray:
    """Return data in which every row begins with its position."""
    data = np.random.default_rng(3).standard_normal((n_positions, n_spectral))
    data[:, 0] = np.arange(n_positions)
    return data


def make_file(path: Path, data: np.ndarray | None = None, **how: Any) -> str:
    data = numbered() if data is None else data
    return make_usid_file(path, n_rows=len(data) // 10, n_cols=10, n_spectral=data.shape[1], data=data, **how)[0]


class Work(lazyproc.Process):
    """Appends the positions that it is called for to a file; fails where it is told to."""

    process_name = "Work"
    outputs = OUTPUTS
    calls: Path
    fails_at: float | None = None
    seconds = 0.0

    @staticmethod
    def _map_function(row):
        with open(Work.calls, "a") as file:
            file.write(f"{int(row[0])}\n")
        time.sleep(Work.seconds)
        if row[0] == Work.fails_at:
            raise ValueError("told to fail")
        return {"Mean": row.mean(), "Twice": 2 * row}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "calls", tmp_path / "calls", raising=False)


def called() -> list[int]:
    return [int(line) for line in Work.calls.read_text().split()]


def check(group: h5py.Group, data: np.ndarray, *, complete: bool = True) -> np.ndarray:
    """Compare what is marked done with a plain loop; return the mask."""
    mask = group[MASK][:]
    assert set(mask.tolist()) <= {0, 1}
    if complete:
        assert mask.all()
    done = mask.astype(bool)
    wanted_mean = np.array([row.mean() for row in data])
    wanted_twice = np.array([2 * row for row in data]).astype("f4")
    assert (group["Mean"][:, 0][done] == wanted_mean[done]).all()
    assert (group["Twice"][:][done] == wanted_twice[done]).all()
    for name in ("Mean", "Twice", MASK):
        assert group[name].chunks is None
        assert group[name].id.get_offset() is not None
        assert group[name].id.get_create_plist().get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
    return mask


def partial(make: Callable[[], Work], fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run stop at a position."""
    with monkeypatch.context() as patch:
        patch.setattr(Work, "fails_at", float(fails_at))
        with pytest.raises(FunctionError, match=f"position {fails_at} "):
            make().compute()


@contextmanager
def fresh(path: str | Path) -> Iterator[h5py.File]:
    """Look at what is on disk, whoever has the file open."""
    files = Files()
    try:
        yield files.open(str(path))
    finally:
        files.close()


# -- where the results are, and by what they are known ---------------------------------------------------------------


@dataclass
class Way:
    """One way of naming the main dataset and the target group."""

    main: Any
    target: Any
    results: str
    """The file of the results."""


def ways(folder: Path, stack: ExitStack, how: str) -> Way:
    scan, out = str(folder / "scan.h5"), str(folder / "out.h5")
    if how == "path":
        return Way(f"{scan}::{MAIN}", None, scan)
    if how == "path, to a new file":
        return Way(f"{scan}::{MAIN}", f"{out}::/deep/results", out)
    if how == "handle":
        return Way(stack.enter_context(h5py.File(scan, "r+"))[MAIN], None, scan)
    if how == "handle, to a path":
        return Way(stack.enter_context(h5py.File(scan, "r"))[MAIN], f"{out}::/", out)
    if how == "handle, to a handle":
        target = stack.enter_context(h5py.File(out, "a")).require_group("results")
        return Way(stack.enter_context(h5py.File(scan, "r"))[MAIN], target, out)
    assert how == "path, to a handle"
    return Way(f"{scan}::{MAIN}", stack.enter_context(h5py.File(out, "a")), out)


HOW = ["path", "path, to a new file", "handle", "handle, to a path", "handle, to a handle", "path, to a handle"]


@pytest.mark.parametrize(
    ("how", "storage"),
    [(how, "contiguous") for how in HOW] + [("path", "gzip"), ("handle", "gzip"), ("handle, to a path", "chunked")],
)
def test_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, storage: str) -> None:
    """The results are on disk when `compute` returns or raises, and no position is computed twice."""
    data = numbered()
    chunks = None if storage == "contiguous" else (7, 3)
    make_file(tmp_path / "scan.h5", chunks=chunks, compression="gzip" if storage == "gzip" else None)
    with ExitStack() as stack:
        way = ways(tmp_path, stack, how)

        def make() -> Work:
            work = Work(way.main, h5_target_group=way.target, cores=1, checkpoint_interval=0.0)
            stack.callback(work.close)
            return work

        partial(make, 43, monkeypatch)
        with fresh(way.results) as file:
            group = file[find_results(file)]
            done = check(group, data, complete=False)
        assert 0 < done.sum() < N_POSITIONS
        assert not done[43]
        before = called()
        assert set(np.flatnonzero(done)) <= set(before)
        group = make().compute()
        check(group, data)
        with fresh(way.results) as file:
            check(file[group.name], data)
            assert file[group.name].attrs["last_pixel"] == N_POSITIONS
        resumed = called()[len(before) :]
        assert sorted(resumed) == np.flatnonzero(done == 0).tolist()
        assert make().compute().name == group.name
        assert len(called()) == len(before) + len(resumed), "a finished duplicate is returned"
    with h5py.File(way.results) as file:
        check(file[find_results(file)], data)
    with h5py.File(tmp_path / "scan.h5") as file:
        assert (file[MAIN][:] == data).all()
    assert {name for name in os.listdir(tmp_path) if name.startswith(".")} == set()


def find_results(file: h5py.File) -> str:
    """Return the name of the only results group in a file."""
    found: list[str] = []
    file.visit(lambda name: found.append(name) if "Raw_Data-Work_" in name.rpartition("/")[2] else None)
    (name,) = found
    return name


@pytest.mark.parametrize("how", HOW)
def test_a_fresh_run_calls_the_function_once_a_position(tmp_path: Path, how: str) -> None:
    make_file(tmp_path / "scan.h5")
    with ExitStack() as stack:
        way = ways(tmp_path, stack, how)
        with Work(way.main, h5_target_group=way.target, cores=1) as work:
            check(work.compute(), numbered())
    assert sorted(called()) == list(range(N_POSITIONS))


@pytest.mark.parametrize("held", [["Mean"], [MASK], ["Mean", "Twice", MASK]], ids="+".join)
def test_a_caller_who_holds_a_dataset_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: list[str]
) -> None:
    """HDF5 buffers what an open dataset read: rows written beside it would be overwritten, and would not be seen."""
    data = numbered()
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:

        def make() -> Work:
            return Work(file[MAIN], cores=1, checkpoint_interval=0.0)

        partial(make, 43, monkeypatch)
        group = file[find_results(file)]
        handles = {name: group[name] for name in held}
        for handle in handles.values():
            handle[:]
        assert make().compute() == group
        for name, handle in handles.items():
            assert (handle[:] == group[name][:]).all()
            handle[:1] = handle[:1]
        check(group, data)
    with h5py.File(path) as file:
        check(file[find_results(file)], data)


@pytest.mark.parametrize("kind", ["core", "core with a file", "BytesIO", "file object", "stdio"])
def test_foreign_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Handles with no plain file behind them: everything goes through the handle."""
    data = numbered()
    path = make_file(tmp_path / "scan.h5")
    with ExitStack() as stack:
        if kind == "BytesIO":
            file = h5py.File(io.BytesIO(Path(path).read_bytes()), "r+")
        elif kind == "file object":
            file = h5py.File(stack.enter_context(open(path, "r+b")), "r+")
        elif kind == "stdio":
            file = h5py.File(path, "r+", driver="stdio")
        else:
            file = h5py.File(path, "r+", driver="core", backing_store=kind != "core")
        stack.enter_context(file)

        def make() -> Work:
            return Work(file[MAIN], cores=1, checkpoint_interval=0.0)

        partial(make, 43, monkeypatch)
        n_before = len(called())
        done = check(file[find_results(file)], data, complete=False)
        assert 0 < done.sum() < N_POSITIONS
        check(make().compute(), data)
        assert sorted(called()[n_before:]) == np.flatnonzero(done == 0).tolist()
    with h5py.File(path) as file:
        if kind in ("core", "BytesIO"):
            assert len(file[CHANNEL]) == 5
        else:
            check(file[find_results(file)], data)


def test_results_that_cannot_be_written_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunked status mask, as older programs make them: written through HDF5, by path too."""
    path = make_file(tmp_path / "scan.h5")

    def make() -> Work:
        return Work(f"{path}::{MAIN}", cores=1, checkpoint_interval=0.0)

    partial(make, 43, monkeypatch)
    with h5py.File(path, "r+") as file:
        group = file[find_results(file)]
        mask = group[MASK][:]
        del group[MASK]
        group.create_dataset(MASK, data=mask, chunks=(9,), maxshape=(None,))
        del group.attrs["lazyproc_places"]  # which older programs do not write; else the mask would be missed there
    n_before = len(called())
    with make() as work:
        group = work.compute()
        assert group[MASK][:].all()
        assert (group["Mean"][:, 0] == [row.mean() for row in numbered()]).all()
        with h5py.File(path, "r+"):
            pass  # nothing of the run keeps the file open
    assert len(called()) - n_before == (mask == 0).sum()


# -- values ----------------------------------------------------------------------------------------------------------

PAIR = np.dtype([("Amplitude", "f4"), ("Count", "i2")])
DTYPES = [">f4", ">i2", "?", "c8", ">c16", PAIR, np.dtype([("Value", ">f8"), ("Good", "?")])]


def same(row: np.ndarray) -> dict[str, Any]:
    return {"First": row[0], "All": row}


@pytest.mark.parametrize(("how", "chunks"), [("path", None), ("path", (7, 3)), ("handle", None), ("core", (7, 3))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_sources_and_results(tmp_path: Path, dtype: Any, chunks: Any, how: str) -> None:
    data = random_data((N_POSITIONS, 6), dtype, seed=9)
    path = make_file(tmp_path / "scan.h5", data, chunks=chunks)
    outputs = {"First": lazyproc.Output(dtype), "All": lazyproc.Output(dtype, shape_from_main=True)}
    with ExitStack() as stack:
        main: Any = f"{path}::{MAIN}"
        if how != "path":
            main = stack.enter_context(h5py.File(path, "r+", driver=None if how == "handle" else how))[MAIN]
        group = lazyproc.map_positions(same, main, outputs, cores=1)
        stack.callback(group.file.close) if how == "path" else None
        for result, wanted in ((group["First"][:, 0], data[:, 0]), (group["All"][:], data)):
            assert result.dtype == np.dtype(dtype)
            assert result.tobytes() == wanted.astype(result.dtype).tobytes()


def test_nans_and_infinities_pass(tmp_path: Path) -> None:
    data = numbered()
    data[::7, 1:] = np.nan
    data[3::7, 1] = -np.inf
    path = make_file(tmp_path / "scan.h5", data)
    with Work(f"{path}::{MAIN}", cores=1) as work:
        group = work.compute()
        assert np.array_equal(group["Twice"][:], (2 * data).astype("f4"), equal_nan=True)
        assert np.array_equal(group["Mean"][:, 0], [row.mean() for row in data], equal_nan=True)


class Odd(lazyproc.Process):
    """Returns something of the wrong form at one position."""

    process_name = "Odd"
    outputs = OUTPUTS

    @staticmethod
    def _map_function(row):
        return row.mean(), 2 * row if row[0] != 43 else row[:4]


@pytest.mark.parametrize("how", ["path", "handle"])
def test_results_are_validated_before_they_are_written(tmp_path: Path, how: str) -> None:
    data = numbered()
    path = make_file(tmp_path / "scan.h5")
    with ExitStack() as stack:
        main: Any = f"{path}::{MAIN}" if how == "path" else stack.enter_context(h5py.File(path, "r+"))[MAIN]
        work = stack.enter_context(Odd(main, cores=1, checkpoint_interval=0.0))
        with pytest.raises(OutputError, match=r"position 43 .*Twice.*shape"):
            work.compute()
    with h5py.File(path) as file:
        group = file[CHANNEL]["Raw_Data-Odd_000"]
        mask = check(group, data, complete=False)
        assert not mask[43]
        assert mask.any()
        assert np.isnan(group["Twice"][:][mask == 0]).all(), "nothing of the block that failed"


# -- room that was used before ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "handle"])
def test_freed_room_does_not_count_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """HDF5 hands out the room of what was deleted with the old bytes in it."""
    n_positions = 4000
    data = numbered(n_positions)
    path = str(tmp_path / "scan.h5")
    with h5py.File(path, "w", fs_strategy="fsm", fs_persist=True) as file:
        file.create_dataset("Rubbish", data=np.full(2**20, 0xFF, "u1"))
        room = range(file["Rubbish"].id.get_offset(), file["Rubbish"].id.get_offset() + 2**20)
    source = make_file(tmp_path / "source.h5", data)
    with ExitStack() as stack:
        target: Any = f"{path}::/results"
        if how == "handle":
            file = stack.enter_context(h5py.File(path, "r+"))
            del file["Rubbish"]
            target = file.create_group("results")
        else:
            with h5py.File(path, "r+") as file:
                del file["Rubbish"]

        def make() -> Work:
            return stack.enter_context(
                Work(f"{source}::{MAIN}", h5_target_group=target, cores=1, checkpoint_interval=0.0)
            )

        partial(make, 3500, monkeypatch)
        with fresh(path) as file:
            group = file[find_results(file)]
            assert group[MASK].id.get_offset() in room, "or this test shows nothing"
            mask = check(group, data, complete=False)
        assert set(np.flatnonzero(mask)) <= set(called())
        assert not mask[3500]
        check(make().compute(), data)


# -- the order of writes ---------------------------------------------------------------------------------------------


@dataclass
class Event:
    """A write, or a sync, of the file with the results: when it began and when it had ended, as counters."""

    kind: str
    offset: int
    data: bytes
    begun: int
    ended: int


def check_order(events: list[Event], group: h5py.Group) -> int:
    """Check for each position: its values, sync, its mark, sync. Return the number of times that marks were set."""
    syncs = [event for event in events if event.kind == "sync"]
    writes = [event for event in events if event.kind == "write"]
    marks: set[int] = set()
    for position in range(group[MASK].shape[0]):
        mark = first_write(writes, group[MASK], position)
        marks.add(mark.begun)
        for name in ("Mean", "Twice"):
            row = first_write(writes, group[name], position)
            assert any(row.ended < sync.begun and sync.ended < mark.begun for sync in syncs), "values, sync, mark"
        assert any(mark.ended < sync.begun for sync in syncs), "mark, sync"
    return len(marks)


def first_write(writes: list[Event], dataset: h5py.Dataset, position: int) -> Event:
    """Return the write from which on a row of a dataset is what it is in the end."""
    wanted = dataset[position].tobytes()
    offset = dataset.id.get_offset() + position * len(wanted)
    found = None
    for event in writes:
        within = offset - event.offset
        if -len(wanted) < within < len(event.data):
            assert 0 <= within <= len(event.data) - len(wanted), "a row is written as a whole"
            if event.data[within : within + len(wanted)] == wanted:
                found = found or event
            else:
                assert found is None, "what was right is not overwritten"
    assert found is not None, (dataset.name, position)
    return found


class Recorder:
    """Notes writes and syncs of this process; each is done for real."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = os.path.realpath(path)
        self.events: list[Event] = []
        self._clock = 0
        for name in ("pwrite", "fdatasync"):
            monkeypatch.setattr(os, name, self._record(name, getattr(os, name)))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _record(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            if os.readlink(f"/proc/self/fd/{descriptor}") != self.path:
                return original(descriptor, *args)
            begun = self._tick()
            result = original(descriptor, *args)
            kind, data, offset = ("sync", b"", 0) if name == "fdatasync" else ("write", bytes(args[0]), args[1])
            self.events.append(Event(kind, offset, data, begun, self._tick()))
            return result

        return call


def test_order_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_file(tmp_path / "scan.h5")
    partial(lambda: Work(f"{path}::{MAIN}", cores=1), 43, monkeypatch)
    with h5py.File(path, "r+") as file:
        file[find_results(file)][MASK][:] = 0  # all is to be done again, in a group that is there
    recorder = Recorder(path, monkeypatch)
    with Work(f"{path}::{MAIN}", cores=1, checkpoint_interval=0.0) as work:
        group = work.compute()
        assert check_order(recorder.events, group) > 3


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

SCRIPT = """
import sys, time
import h5py, lazyproc

class Work(lazyproc.Process):
    process_name = "Work"
    outputs = {{"Mean": lazyproc.Output("f8"), "Twice": lazyproc.Output("f4", shape_from_main=True)}}

    @staticmethod
    def _map_function(row):
        time.sleep({seconds})
        if row[0] == {fails_at}:
            raise ValueError("told to fail")
        return {{"Mean": row.mean(), "Twice": 2 * row}}

options = dict(cores={cores}, checkpoint_interval={interval})
if {by_path}:
    with Work(sys.argv[1] + "::{main}", **options) as work:
        work.compute()
else:
    with h5py.File(sys.argv[1], "r+") as file:
        held = []
        if {held}:
            group = file["{channel}/Raw_Data-Work_000"]
            held = [group["Mean"], group["Twice"], group["completed_positions"]]
            assert all(item[...].size for item in held)
        Work(file["{main}"], **options).compute()
"""


def write_script(folder: Path, **options: Any) -> str:
    defaults = {"seconds": 0, "fails_at": -1, "cores": 1, "interval": 0.0, "by_path": True, "held": False}
    script = folder / "script.py"
    script.write_text(SCRIPT.format(main=MAIN, channel=CHANNEL, **{**defaults, **options}))
    return str(script)


CALL = re.compile(r'(pwrite64|fdatasync)\(\d+<(.*?)>(?:, "((?:\\x..)*)", \d+, (\d+))?')


def trace(script: str, path: str, folder: Path) -> list[Event]:
    """Run a script under strace and return what it, and its workers, did to a file."""
    log = folder / "trace"
    command = ["strace", "-f", "-qq", "-y", "-xx", "-s", "100000", "-e", "trace=pwrite64,fdatasync", "-o", str(log)]
    subprocess.run([*command, sys.executable, script, path], check=True, capture_output=True)
    shown = "".join(rf"\x{byte:02x}" for byte in os.fsencode(path))
    events: list[Event] = []
    going_on: dict[str, Event] = {}
    for number, line in enumerate(log.read_text().splitlines()):
        thread = line.split()[0]
        call = CALL.search(line)
        if call and call[2] in (path, shown):
            kind = "write" if call[1] == "pwrite64" else "sync"
            data = bytes.fromhex((call[3] or "").replace(r"\x", ""))
            event = Event(kind, int(call[4] or 0), data, 2 * number, 2 * number + 1)
            events.append(event)
            if "<unfinished" in line:
                going_on[thread] = event
        elif "resumed>" in line and thread in going_on:
            going_on.pop(thread).ended = 2 * number + 1
    return events


@needs_strace
@pytest.mark.parametrize("what", ["pool", "handle", "held handle"])
def test_order_in_all_processes(tmp_path: Path, what: str) -> None:
    path = os.path.realpath(make_file(tmp_path / "scan.h5", numbered(100)))
    script = write_script(tmp_path, fails_at=77)
    assert subprocess.run([sys.executable, script, path], capture_output=True).returncode == 1
    with h5py.File(path, "r+") as file:
        file[find_results(file)][MASK][:] = 0
        file[find_results(file)].attrs.pop("lazyproc_probe")
    if what == "pool":
        write_script(tmp_path, seconds=0.04, cores=2, interval=0.2)
    else:
        write_script(tmp_path, by_path=False, held=what == "held handle")
    events = trace(script, path, tmp_path)
    with h5py.File(path) as file:
        assert file[find_results(file)][MASK][:].all()
        assert check_order(events, file[find_results(file)]) > 2


@needs_strace
@pytest.mark.parametrize("held", [False, True])
def test_killed_at_writes_through_a_handle(tmp_path: Path, held: bool) -> None:
    """From when the group is there on, a kill at any write leaves a file that opens, its mask true, old neighbours."""
    data = numbered(100)
    start = tmp_path / "start.h5"
    make_file(start, data)
    with h5py.File(start, "r+") as file:
        for number in range(5):
            file[CHANNEL].create_group(f"Sibling_{number}").attrs["number"] = number
    script = write_script(tmp_path, by_path=False, fails_at=77)
    assert subprocess.run([sys.executable, script, str(start)], capture_output=True).returncode == 1
    path = tmp_path / "scan.h5"
    shutil.copy(start, path)
    write_script(tmp_path, by_path=False, held=held)
    trace(script, str(path), tmp_path)
    n_writes = (tmp_path / "trace").read_text().count("pwrite64(")  # of all files, as strace counts them below
    assert n_writes > 8
    for at in np.unique(np.linspace(1, n_writes, 8).astype(int)):
        shutil.copy(start, path)
        for left in tmp_path.glob(".scan.h5.*"):  # it would tell that the driver before has died within the function
            left.unlink()
        kill = ["-e", "trace=pwrite64", "-e", f"inject=pwrite64:signal=SIGKILL:when={at}", "-o", os.devnull]
        subprocess.run(["strace", "-f", *kill, sys.executable, script, str(path)], capture_output=True)
        with h5py.File(path) as file:
            mask = check(file[find_results(file)], data, complete=False)
            assert (file[MAIN][:] == data).all()
            assert [file[CHANNEL][f"Sibling_{n}"].attrs["number"] for n in range(5)] == list(range(5))
    assert mask.all(), "the last write comes after the end of the loop"


# -- how often -------------------------------------------------------------------------------------------------------


def test_the_count_grows_while_a_run_goes_on(tmp_path: Path) -> None:
    """Watched from another process, through plain h5py and through `file_status`."""
    data = numbered()
    path = make_file(tmp_path / "scan.h5")
    script = write_script(tmp_path, seconds=0.04, interval=0.2)
    seen: dict[str, list[int]] = {"status": [], "h5py": []}
    with subprocess.Popen([sys.executable, script, path]) as run:
        while run.poll() is None:
            seen["status"] += [one.n_done for one in file_status(path).results]
            with h5py.File(path) as file:
                names = [name for name in file[CHANNEL] if "-Work_" in name]
                seen["h5py"] += [int(check(file[CHANNEL][name], data, complete=False).sum()) for name in names]
            time.sleep(0.02)
    assert run.returncode == 0
    for counts in seen.values():
        assert counts == sorted(counts)
        assert len({*counts} - {0, N_POSITIONS}) >= 4, "2.4 s of computing, a commit at least every 0.2 s"
    assert file_status(path).results[0].n_done == N_POSITIONS
    assert file_status(path).running is None


@pytest.mark.parametrize(("interval", "least", "most"), [(0.0, 20, 60), (0.1, 8, 45), (10.0, 1, 2)])
def test_number_of_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: float, least: int, most: int
) -> None:
    monkeypatch.setattr(Work, "seconds", 0.02)
    path = make_file(tmp_path / "scan.h5")
    events: list[Any] = []
    with Work(f"{path}::{MAIN}", cores=1, checkpoint_interval=interval) as work:
        work._progress = events.append
        work.compute()
    commits = [event for event in events if isinstance(event, Committed)]
    assert least <= len(commits) <= most
    assert commits[-1].n_done == N_POSITIONS


# -- others ----------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_meanwhile(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    script = write_script(tmp_path, seconds=0.03, interval=0.1)
    with subprocess.Popen([sys.executable, script, path]) as run:
        while file_status(path).running is None:
            time.sleep(0.01)
        with (
            Work(f"{path}::{MAIN}", cores=1) as work,
            pytest.raises(FileBusyError, match=rf"host .*, pid {run.pid}, since 20"),
        ):
            work.compute()
    assert run.returncode == 0
    with Work(f"{path}::{MAIN}", cores=1) as work:
        check(work.compute(override=True), numbered())


def test_readers_and_writers_beside_a_run(tmp_path: Path) -> None:
    """By path: readers come and go, a program that wants to write is turned away by HDF5's own lock."""
    path = make_file(tmp_path / "scan.h5")
    script = write_script(tmp_path, seconds=0.03, interval=0.1)
    write = textwrap.dedent(
        """
        import sys, h5py
        try:
            h5py.File(sys.argv[1], "r+")
        except OSError as error:
            print("refused" if "lock" in str(error) else error)
        """
    )
    with h5py.File(path) as reader, subprocess.Popen([sys.executable, script, path]) as run:
        while not any(one.n_done for one in file_status(path).results):
            time.sleep(0.01)
        refused = subprocess.run([sys.executable, "-c", write, path], capture_output=True, text=True)
        assert refused.stdout.strip() == "refused"
        assert run.poll() is None
        assert (reader[MAIN][:] == numbered()).all()
    assert run.returncode == 0
    with h5py.File(path) as file:
        check(file[find_results(file)], numbered())


def test_a_writer_keeps_a_run_away(tmp_path: Path) -> None:
    path = make_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+"):
        before = Path(path).read_bytes()
        with Work(f"{path}::{MAIN}", cores=1) as work, pytest.raises(FileBusyError, match="hand the open dataset"):
            work.compute()
        assert Path(path).read_bytes() == before
    assert {*os.listdir(tmp_path)} == {"scan.h5", "calls"}


# -- counts: calls of the system, and copies -------------------------------------------------------------------------


class Copying(lazyproc.Process):
    """Returns a result as large as the source, and a narrow one."""

    outputs = {"Twice": lazyproc.Output("f8", shape_from_main=True), "First": lazyproc.Output("f8")}

    @staticmethod
    def _block_function(block):
        return {"Twice": 2 * block, "First": block[:, 0]}


@dataclass
class BlockNotes:
    """What was noted of a block.

    Attributes
    ----------
    n_runs, n_positions : int
        Of the block.
    calls : Counter
        Calls of the system, by name and file.
    read, written : list of ndarray
        The memory that `preadv` was to fill, and that `pwrite` took for the results.
    data : ndarray
        What the function got.
    results : tuple of ndarray
        What it returned, checked.
    peak : int
        Bytes that Python and NumPy took at most.
    """

    n_runs: int
    n_positions: int
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    read: list[np.ndarray] = field(default_factory=list)
    written: list[np.ndarray] = field(default_factory=list)
    data: np.ndarray = field(default_factory=lambda: np.empty(0))
    results: tuple[np.ndarray, ...] = ()
    peak: int = 0


class BlockWatch:
    """Notes what is done for each block in this process; each call is made for real."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[BlockNotes] = []
        self._path = os.path.realpath(path)
        self._now: BlockNotes | None = None
        for name in ("open", "pread", "preadv", "pwrite", "fdatasync", "ftruncate"):
            monkeypatch.setattr(os, name, self._call(name, getattr(os, name)))
        monkeypatch.setattr(local, "run_block", self._block(local.run_block))
        monkeypatch.setattr(Kernel, "compute", self._compute(Kernel.compute))

    def _call(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(where: Any, *args: Any) -> Any:
            if (now := self._now) is not None:
                file = os.path.realpath(where) if name == "open" else os.readlink(f"/proc/self/fd/{where}")
                if os.path.dirname(file) == os.path.dirname(self._path):
                    now.calls[name, os.path.basename(file)] += 1
                if file == self._path and name == "preadv":
                    now.read += [np.frombuffer(buffer, np.uint8) for buffer in args[0]]
                if file == self._path and name == "pwrite":
                    now.written.append(np.frombuffer(args[0], np.uint8))
            return real(where, *args)

        return call

    def _block(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def run_block(kernel: Any, block: Any) -> Any:
            self._now = BlockNotes(len(block.starts), block.n_positions)
            tracemalloc.start()
            try:
                return real(kernel, block)
            finally:
                self._now.peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                self.notes.append(self._now)
                self._now = None

        return run_block

    def _compute(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def compute(kernel: Any, data: np.ndarray, *args: Any) -> Any:
            results = real(kernel, data, *args)
            if self._now is not None:
                self._now.data, self._now.results = data, results
            return results

        return compute


@pytest.mark.parametrize("how", ["path", "handle"])
def test_calls_and_copies_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The file is opened once to read and once to write; what is returned is copied once, to be checked; no more."""
    n_positions, n_spectral, size = 12_000, 64, 1_000
    data = numbered(n_positions, n_spectral)
    path = make_file(tmp_path / "scan.h5", data)
    monkeypatch.setattr(sizing, "positions_per_block", lambda **_: size)
    watch = BlockWatch(path, monkeypatch)
    with ExitStack() as stack:
        main = f"{path}::{MAIN}" if how == "path" else stack.enter_context(h5py.File(path, "r+"))[MAIN]
        with Copying(main, cores=1, checkpoint_interval=3600.0) as process:
            group = process.compute()
            assert (group["Twice"][:] == 2 * data).all()
            assert (group["First"][:, 0] == data[:, 0]).all()
    assert len(watch.notes) > 5
    for block in watch.notes:
        assert block.calls == {
            ("open", "scan.h5"): 2,
            ("preadv", "scan.h5"): block.n_runs,
            ("pwrite", "scan.h5"): 2 * block.n_runs,
            ("open", ".scan.h5.lazyproc-fence"): 1,
            ("pread", ".scan.h5.lazyproc-fence"): 1,
            ("open", ".scan.h5.lazyproc-lock"): 1,
            ("pwrite", ".scan.h5.lazyproc-lock"): 2,  # that the function is being called, and that it is no more
        }
        assert sum(part.nbytes for part in block.read) == block.data.nbytes == 8 * n_spectral * block.n_positions
        assert all(np.shares_memory(part, block.data) for part in block.read), "the function gets what was read into"
        assert sum(part.nbytes for part in block.written) == sum(array.nbytes for array in block.results)
        twice, first = block.results
        for part in block.written:
            assert np.shares_memory(part, twice) or np.shares_memory(part, first), "what was checked is written"
        if block.n_positions == size:  # what was read, what the function returned, what was checked
            assert 3 <= block.peak / block.data.nbytes < 3.5
