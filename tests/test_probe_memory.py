"""The memory model keeps its limit, the probe measures right, and a real run takes no more than it was allowed."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyproc.core.apply import compute_rows
from lazyproc.core.errors import MemoryLimitError
from lazyproc.core.highwater import can_measure
from lazyproc.core.measure import run_probe
from lazyproc.core.memory import DRIVER_BYTES, MEBIBYTE, WORKER_BYTES, MemoryModel
from lazyproc.core.no_result import OutputMismatch, RowError
from lazyproc.core.probe import Probe
from lazyproc.core.runs import Runs
from lazyproc.core.specs import Output
from lazyproc.hdf5.usid import REFERENCES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from private_memory import Sampler

# -- the model -------------------------------------------------------------------------------------------------------

models = st.builds(
    MemoryModel,
    source_bytes=st.integers(1, 2**28),
    result_bytes=st.integers(0, 2**28),
    multiplier=st.floats(1, 100),
    temporary_bytes=st.floats(0, 2**28),
    fixed_bytes=st.integers(0, 2**28),
    driver_bytes=st.integers(0, 2**28),
)
limits = st.integers(1, 2**40)
workers = st.integers(1, 128)


@settings(max_examples=500)
@given(model=models, limit=limits, n_workers=workers, driver_writes=st.booleans())
def test_what_is_projected_for_the_rows_given_is_allowed(model, limit, n_workers, driver_writes):
    rows = model.rows(limit, n_workers, driver_writes=driver_writes)
    assert rows >= 0
    if rows:
        assert model.peak(rows, n_workers, driver_writes=driver_writes) <= limit
    # and not one row less than would fit, but for rounding
    assert model.peak(rows + 2, n_workers, driver_writes=driver_writes) > limit


@settings(max_examples=500)
@given(model=models, limit=limits, n_workers=workers, driver_writes=st.booleans(), data=st.data())
def test_more_of_anything_never_leaves_more_rows(model, limit, n_workers, driver_writes, data):
    rows = model.rows(limit, n_workers, driver_writes=driver_writes)
    change = data.draw(st.sampled_from(list(MemoryModel.__dataclass_fields__)))
    hungrier = MemoryModel(**{**vars(model), change: getattr(model, change) + data.draw(st.integers(1, 2**20))})
    assert hungrier.bytes_per_position >= model.bytes_per_position
    assert hungrier.rows(limit, n_workers, driver_writes=driver_writes) <= rows
    assert hungrier.peak(7, n_workers) >= model.peak(7, n_workers)
    assert model.rows(limit, n_workers + 1, driver_writes=driver_writes) <= rows
    assert model.rows(limit + 2**20, n_workers, driver_writes=driver_writes) >= rows
    assert model.rows(limit, n_workers, driver_writes=True) <= model.rows(limit, n_workers)
    assert model.peak(8, n_workers, driver_writes=driver_writes) >= model.peak(
        7, n_workers, driver_writes=driver_writes
    )


def test_fewer_workers_where_each_would_decode_storage_chunks_anew_for_few_positions():
    """Two have room for 2 MiB each beside 26 MiB of chunks, one for 30 MiB; with more memory it makes no difference."""
    model = MemoryModel(2048, 4, fixed_bytes=20 * MEBIBYTE)
    coarse = MemoryModel(2048, 4, fixed_bytes=20 * MEBIBYTE, chunk_rows=2**17)
    assert model.fit(64 * MEBIBYTE, 2)[0] == 2
    assert coarse.fit(64 * MEBIBYTE, 2) == (1, model.rows(64 * MEBIBYTE, 1))
    assert coarse.fit(1024 * MEBIBYTE, 2) == model.fit(1024 * MEBIBYTE, 2)
    fine = MemoryModel(2048, 4, fixed_bytes=20 * MEBIBYTE, chunk_rows=64)
    assert fine.fit(64 * MEBIBYTE, 2)[0] == 2


@settings(max_examples=500)
@given(model=models, limit=limits, n_workers=workers, driver_writes=st.booleans())
def test_fit_gives_as_many_workers_as_can_run_or_says_what_to_raise(model, limit, n_workers, driver_writes):
    try:
        fitted, rows = model.fit(limit, n_workers, driver_writes=driver_writes)
    except MemoryLimitError as error:
        assert model.rows(limit, 1, driver_writes=driver_writes) == 0
        message = str(error)
        raised = int(message.rpartition("Raise max_mem_mb to ")[2].split()[0])
        assert "max_mem_mb" in message
        assert raised * MEBIBYTE > limit
        assert model.fit(raised * MEBIBYTE, n_workers, driver_writes=driver_writes)[1] >= 1
        with pytest.raises(MemoryLimitError):
            model.fit((raised - 1) * MEBIBYTE, n_workers, driver_writes=driver_writes)
    else:
        assert 1 <= fitted <= n_workers
        assert rows == model.rows(limit, fitted, driver_writes=driver_writes) >= 1
        if fitted < n_workers:
            assert model.rows(limit, fitted + 1, driver_writes=driver_writes) == 0


def test_the_larger_of_what_was_asked_and_what_was_measured_counts():
    assert MemoryModel(1000, 10).bytes_per_position == 1010
    assert MemoryModel(1000, 10, multiplier=3).bytes_per_position == 3010
    assert MemoryModel(1000, 10, temporary_bytes=5000).bytes_per_position >= 6010
    asked = MemoryModel(1000, 10, multiplier=10, temporary_bytes=100)
    assert asked.bytes_per_position == 10_010
    assert MemoryModel(1000, 10, fixed_bytes=10**6).bytes_per_position == 1010
    assert MemoryModel(0, 0).bytes_per_position == 1


def test_the_message_names_what_takes_the_memory():
    with pytest.raises(MemoryLimitError) as caught:
        MemoryModel(3 * MEBIBYTE, 2 * MEBIBYTE, 4.0, fixed_bytes=40 * MEBIBYTE).fit(20 * MEBIBYTE, 2)
    for word in (
        "max_mem_mb: 20 MiB",
        "14.0 MiB",
        "source 3.0",
        "mem_multiplier 4",
        "results 2.0",
        "40.0 MiB",
        "Raise",
    ):
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert 20 * MEBIBYTE > DRIVER_BYTES + WORKER_BYTES


# -- the probe -------------------------------------------------------------------------------------------------------

OUTPUT = (Output("f8").resolve("Out", 1),)
REMAINING = Runs.from_spans([(0, 17), (40, 41), (100, 900), (5000, 9000)])
spans = st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 400)), min_size=1, max_size=20)


def numbers(runs: Runs) -> Any:
    """Read positions whose value is their own number."""
    return runs.positions().astype("f8")[:, None]


def probe_of(function, remaining=REMAINING, *, vectorized, read=numbers, row_bytes=8, try_threads=False) -> Probe:
    return run_probe(
        lambda rows: compute_rows(function, rows, OUTPUT, vectorized=vectorized),
        read,
        remaining,
        source_bytes=row_bytes,
        result_bytes=8,
        vectorized=vectorized,
        try_threads=try_threads,
    )


def check_computed(probe: Probe, remaining: Runs, expected=lambda positions: 2 * positions) -> set[int]:
    """Check that what the probe computed on the way is right, and nothing twice."""
    seen: set[int] = set()
    for runs, (array,) in probe.computed:
        positions = runs.positions()
        assert array.shape == (len(positions), 1)
        np.testing.assert_array_equal(array[:, 0], expected(positions))
        assert not seen & set(positions.tolist())
        seen |= set(positions.tolist())
    assert seen <= set(remaining.positions().tolist())
    return seen


@settings(max_examples=60, deadline=None)
@given(spans=spans, vectorized=st.booleans(), try_threads=st.booleans(), row_bytes=st.sampled_from([8, 10**5, 10**8]))
def test_positions_computed_on_the_way_are_right_and_distinct(spans, vectorized, try_threads, row_bytes):
    spans = sorted((start, start + size) for start, size in spans)
    remaining = Runs.from_positions(np.unique(np.concatenate([np.arange(*span) for span in spans])))
    function = (lambda block: 2 * block[:, 0]) if vectorized else (lambda row: 2 * row[0])
    probe = probe_of(function, remaining, vectorized=vectorized, row_bytes=row_bytes, try_threads=try_threads)
    seen = check_computed(probe, remaining)
    assert 1 <= len(seen) <= remaining.n_positions
    assert probe.seconds_per_position >= 0
    assert probe.thread_gain >= 1
    assert probe.temporary_bytes >= 0 <= probe.fixed_bytes
    if remaining.n_positions >= 4:
        positions = remaining.positions()
        assert {int(positions[0]), int(positions[-1])} <= seen  # those differ most from the others


@pytest.mark.parametrize("vectorized", [True, False])
def test_one_position_is_enough(vectorized):
    remaining = Runs.from_spans([(7, 8)])
    probe = probe_of(lambda data: 2 * np.ravel(data), remaining, vectorized=vectorized, try_threads=True)
    assert check_computed(probe, remaining) == {7}


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_slow_function_is_called_a_few_times_only(vectorized):
    calls = []

    def function(data):
        calls.append(data.shape)
        time.sleep(0.6)
        return 2 * np.ravel(data)

    probe = probe_of(function, vectorized=vectorized, try_threads=False)
    assert len(calls) <= 3
    check_computed(probe, REMAINING)
    assert probe.seconds_per_position > 0.1


@pytest.mark.parametrize("vectorized", [True, False])
def test_the_second_of_few_positions_that_are_tried_is_the_last(vectorized):
    """And not the one beside the first: a slow function, or one that fails at the end, is told early."""
    tried = []

    def function(data):
        tried.extend(np.ravel(data).tolist() if vectorized else [data[0]])
        time.sleep(0.3)
        return 2 * (data[:, 0] if vectorized else data[0])

    probe_of(function, vectorized=vectorized, row_bytes=10**8)
    assert tried[:2] == [0, int(REMAINING.stops[-1]) - 1]


def test_large_positions_are_tried_one_at_a_time():
    """A position may be as large as the memory allows; the probe runs before there is any plan."""
    shapes = []

    def function(block):
        shapes.append(len(block))
        return 2 * block[:, 0]

    check_computed(probe_of(function, vectorized=True, row_bytes=50 * 2**20, try_threads=True), REMAINING)
    assert max(shapes) == 1


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_exception_of_the_function_tells_the_positions(vectorized, number):
    """The first, the last and the middle position are tried, so a function that fails there is found at once."""
    failing = int(REMAINING.spread(3)[number])

    def function(data):
        if (data == failing).any():
            raise ZeroDivisionError("told to")
        return 2 * np.ravel(data)

    with pytest.raises(RowError) as caught:
        probe_of(function, vectorized=vectorized)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    positions = caught.value.runs.positions()
    assert failing in positions[caught.value.first : caught.value.last]
    assert set(positions.tolist()) <= set(REMAINING.positions().tolist())


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_result_that_does_not_fit_tells_the_positions(vectorized):
    with pytest.raises(OutputMismatch) as caught:
        probe_of(lambda data: "text", vectorized=vectorized)
    assert isinstance(caught.value.runs, Runs)


def test_an_exception_in_a_thread_tells_its_positions():
    main_thread = threading.get_ident()

    def function(block):
        if threading.get_ident() != main_thread:
            raise ValueError("only in threads")
        time.sleep(0.001 * len(block))
        return 2 * block[:, 0]

    with pytest.raises(RowError) as caught:
        probe_of(function, vectorized=True, try_threads=True)
    assert isinstance(caught.value.runs, Runs)
    assert set(caught.value.runs.positions().tolist()) <= set(REMAINING.positions().tolist())


@pytest.mark.parametrize("size", [10**5, 10**6])
def test_big_temporaries_of_a_block_function_are_noticed(size):
    def function(block):
        temporary = np.ones((len(block), size // 8))
        return 2 * block[:, 0] + 0 * temporary.sum()

    probe = probe_of(function, vectorized=True)
    assert 0.9 * size <= probe.temporary_bytes <= 1.5 * size + 10_000
    assert probe.fixed_bytes == 0
    model = MemoryModel(8, 8, temporary_bytes=probe.temporary_bytes)
    assert model.rows(64 * MEBIBYTE, 1) <= 64 * MEBIBYTE // (0.9 * size)


@pytest.mark.parametrize("size", [10**5, 10**7])
def test_big_temporaries_of_a_function_of_one_position_are_noticed(size):
    def function(row):
        return 2 * row[0] + 0 * np.ones(size // 8).sum()

    probe = probe_of(function, vectorized=False)
    assert probe.temporary_bytes == 0
    assert 0.9 * size <= probe.fixed_bytes <= 1.5 * size + 100_000


def test_a_frugal_function_has_next_to_no_temporaries():
    probe = probe_of(lambda row: 2 * row[0], vectorized=False)
    assert probe.fixed_bytes < 100_000
    probe = probe_of(lambda block: 2 * block[:, 0], vectorized=True)
    assert probe.temporary_bytes < 10_000


def test_what_a_call_takes_is_not_taken_for_what_its_positions_take():
    """Where a position has a few bytes, the list of a call would be most of them."""

    def function(block):
        books = list(range(2000))  # 72 KB
        return 2 * block[:, 0] + 0 * len(books)

    probe = probe_of(function, Runs.from_positions(np.arange(100_000)), vectorized=True)
    assert probe.temporary_bytes < 72_000 / 64 / 8


@pytest.mark.skipif(not can_measure(), reason="this system keeps no high-water mark that can be reset")
@pytest.mark.parametrize("vectorized", [True, False])
def test_what_the_function_keeps_is_noticed_though_its_first_call_took_it(vectorized):
    kept = []

    def function(data):
        if not kept:
            kept.append(np.ones(30 * 2**17))
        return 2 * np.ravel(data)

    probe = probe_of(function, vectorized=vectorized)
    assert 28 * MEBIBYTE < probe.kept_bytes < 33 * MEBIBYTE
    assert probe.stored()["kept_bytes"] == probe.kept_bytes
    assert Probe(**probe.stored()).kept_bytes == probe.kept_bytes
    assert probe_of(function, vectorized=vectorized).kept_bytes < 2 * MEBIBYTE  # it has kept that before


# -- measured --------------------------------------------------------------------------------------------------------

N_POSITIONS, N_SPECTRAL = 6400, 8192
DRIVER = """
import json, logging, sys
import numpy as np
import lazyproc
from lazyproc.core.highwater import can_measure
from lazyproc.core.memory import MemoryModel

sys.path.insert(0, {folder!r})
from processes import Filter, PerPosition, warm_up, workers

def main(address, name, cores, max_mem_mb):
    warm_up(cores)
    if name == "baseline":
        print("baseline", flush=True)
        sys.stdin.read()
        for worker in workers:
            worker.communicate(b"\\n")
        return
    records = []
    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)
    log = logging.getLogger("lazyproc")
    log.addHandler(Keep())
    log.setLevel(logging.INFO)
    cls = {{"Filter": Filter, "PerPosition": PerPosition}}[name]
    with cls(address, cores=cores, max_mem_mb=max_mem_mb) as process:
        group = process.compute()
        probe = json.loads(group.attrs["lazyproc_probe"])
        row, scheduler = next(record.args[3:5] for record in records if " blocks of up to " in record.msg)
        declared = process._declared()
        from lazyproc.core.probe import Probe
        from lazyproc.run.sizes import memory_of
        model = memory_of(declared, Probe(**probe))
        answer = dict(projected=model.peak(row, scheduler.n_workers), scheduler=str(scheduler), rows=row)
    print(json.dumps(answer), flush=True)

main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
"""
PROCESSES = """
import numpy as np
import lazyproc

class Filter(lazyproc.Process):
    outputs = {"Filtered": lazyproc.Output("f4", shape_from_main=True), "Mean": lazyproc.Output("f4")}

    @staticmethod
    def _block_function(block):
        spectra = np.fft.rfft(block, axis=1)
        spectra[:, 100:] = 0
        return np.fft.irfft(spectra, n=block.shape[1], axis=1).astype("f4"), block.mean(axis=1)

class PerPosition(lazyproc.Process):
    outputs = {"Filtered": lazyproc.Output("f4", shape_from_main=True), "Mean": lazyproc.Output("f4")}

    @staticmethod
    def _map_function(spectrum):
        for _ in range(4):
            transform = np.fft.rfft(spectrum)
        transform[100:] = 0
        return np.fft.irfft(transform, n=len(spectrum)).astype("f4"), spectrum.mean()

def imports(number):
    # What a run loads in any case in the driver.
    import dask.local, h5py, psutil, tblib, threadpoolctl, xxhash
    import lazyproc.engine.kernel, lazyproc.hdf5.sink, lazyproc.run.loop, lazyproc.run.perform
    np.fft.irfft(np.fft.rfft(np.ones(64, "f4")))
    return number

WORKER = '''
import numpy as np
import threadpoolctl
import lazyproc.engine.worker, lazyproc.hdf5.chunks, lazyproc.hdf5.sink, lazyproc.hdf5.source
np.fft.irfft(np.fft.rfft(np.ones(64, "f4")))
print(flush=True)
input()
'''
workers = []

def warm_up(cores):
    # The bare interpreters with their imports: of the driver, and of the workers if there are any.
    imports(0)
    if BASELINE and cores > 1:
        import subprocess
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        workers.extend(subprocess.Popen([sys.executable, "-c", WORKER], **pipes) for _ in range(cores))
        for worker in workers:
            worker.stdout.readline()

import sys
BASELINE = sys.argv[2:3] == ["baseline"]
"""


@pytest.fixture(scope="module")
def big_scan(tmp_path_factory):
    """Write 200 MiB of numbers as a main dataset, piece by piece."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "driver.py").write_text(DRIVER.format(folder=str(folder)))
    (folder / "processes.py").write_text(PROCESSES)
    with h5py.File(folder / "scan.h5", "w") as file:
        main = file.create_dataset("Raw_Data", (N_POSITIONS, N_SPECTRAL), "f4")
        assert main.nbytes == 200 * MEBIBYTE
        piece = np.random.default_rng(0).standard_normal((256, N_SPECTRAL), "f4")
        for start in range(0, N_POSITIONS, 256):
            main[start : start + 256] = piece
        main.attrs.update(quantity="Current", units="nA")
        for name, shape in zip(REFERENCES, [(N_POSITIONS, 1)] * 2 + [(1, N_SPECTRAL)] * 2, strict=True):
            ancillary = file.create_dataset(name, data=np.arange(max(shape)).reshape(shape))
            ancillary.attrs.update(labels=["X"], units=["m"])
            main.attrs[name] = ancillary.ref
    return folder


def sampler(folder: Path, name: str, cores: int, max_mem_mb: int) -> Sampler:
    return Sampler([str(folder / "driver.py"), f"{folder / 'scan.h5'}::/Raw_Data", name, str(cores), str(max_mem_mb)])


@pytest.fixture(scope="module")
def baselines(big_scan):
    return {cores: sampler(big_scan, "baseline", cores, 0).baseline() for cores in (1, 2)}


@pytest.mark.parametrize(
    ("name", "cores", "max_mem_mb"),
    [("Filter", 1, 64), ("Filter", 1, 128), ("PerPosition", 2, 64), ("PerPosition", 2, 128)],
)
def test_a_real_run_takes_no_more_private_memory_than_allowed(big_scan, baselines, name, cores, max_mem_mb):
    with h5py.File(big_scan / "scan.h5", "r+") as file:
        for group in [key for key in file if "-" in key]:
            del file[group]
    taken, answer = sampler(big_scan, name, cores, max_mem_mb).peak(baselines[cores])
    measured = taken / MEBIBYTE
    print(
        f"{name}, {answer['scheduler']}, blocks of {answer['rows']}: measured {measured:.0f} MiB, "
        f"projected {answer['projected'] / MEBIBYTE:.0f} MiB, allowed {max_mem_mb} MiB"
    )
    assert ("processes" in answer["scheduler"]) == (cores == 2)
    assert answer["projected"] <= max_mem_mb * MEBIBYTE
    assert measured <= max_mem_mb
    assert measured <= answer["projected"] / MEBIBYTE
    with h5py.File(big_scan / "scan.h5", "r") as file:
        (group,) = [file[key] for key in file if "-" in key]
        assert group["completed_positions"][()].all()
        for position in (0, 255, N_POSITIONS - 1):
            spectrum = np.fft.rfft(file["Raw_Data"][position])
            spectrum[100:] = 0
            expected = np.fft.irfft(spectrum, n=N_SPECTRAL)
            np.testing.assert_allclose(group["Filtered"][position], expected, atol=1e-5)
