"""`Process.plan`: what would be done, from metadata alone, however many positions there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc import MemoryLimitError, Output, ParameterError, Process
from lazyproc.core.memory import MEBIBYTE, WORKER_BYTES
from lazyproc.core.plan import format_share
from lazyproc.run.sizes import divide


class Never(Process):
    process_name = "Never"
    outputs = {"Mean": Output("f4"), "Twice": Output("f8", shape_from_main=True)}

    @staticmethod
    def _map_function(spectrum, scale=1):
        raise AssertionError("a plan computes nothing")


class Works(Never):
    @staticmethod
    def _map_function(spectrum, scale=1):
        return scale * spectrum.mean(), 2.0 * spectrum


@pytest.fixture
def address(tmp_path: Path) -> str:
    return "::".join(make_usid_file(tmp_path / "a.h5", n_rows=20, n_cols=10, n_spectral=8))


def count_blocks(n: int, size: int, n_workers: int) -> int:
    """Count the blocks of a plan one by one: all alike, but halved, three times at most, as less is left for each."""
    count, now = 0, size
    while n > 0:
        while n_workers > 1 and now > max(1, size // 8) and n <= 2 * n_workers * now:
            now = max(1, size // 8, now // 2)
        n -= now
        count += 1
    return count


def test_a_plan_of_fresh_work(address):
    path = Path(address.partition("::")[0])
    content, folder = path.read_bytes(), os.listdir(path.parent)
    with Never(address, cores=2, max_mem_mb=100) as process:
        plan = process.plan()
    assert isinstance(plan, lazyproc.Plan)
    assert (plan.process_name, plan.dataset, plan.action, plan.group) == ("Never", address, "start", None)
    assert (plan.n_positions, plan.n_done, plan.n_remaining) == (200, 0, 200)
    assert (plan.duplicates, plan.partial, plan.seconds) == ((), (), None)
    assert plan.source_bytes == 200 * 8 * 4
    assert plan.result_bytes == 200 * (4 + 8 * 8)
    assert plan.chunk_positions == 1
    assert 1 <= plan.n_workers <= 2
    assert plan.n_blocks == count_blocks(200, plan.block_positions, plan.n_workers)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == folder


def test_a_plan_reads_no_values_of_the_main_dataset(tmp_path):
    """Data that cannot be decoded any more disturb only who reads them."""
    path, name = make_usid_file(tmp_path / "a.h5", chunks=(20, 6), compression="gzip")
    with h5py.File(path, "r") as file:
        chunk = file[name].id.get_chunk_info(0)
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, b"\xff" * chunk.size, chunk.byte_offset)
    os.close(descriptor)
    with Never(f"{path}::{name}") as process:
        assert process.plan().n_remaining == 20
        with pytest.raises(OSError, match="filter"):
            process.h5_main[()]


def test_a_plan_of_finished_and_of_partial_work(address):
    with Works(address, cores=1) as process:
        done = process.compute().name
        plan = process.plan()
        assert (plan.action, plan.group, plan.n_remaining, plan.n_blocks) == ("return", done, 0, 0)
        assert plan.duplicates == (done,)
        assert process.plan(2).action == process.plan(scale=3).action == "start"
        with pytest.raises(ParameterError, match="nonsense"):
            process.plan(nonsense=1)
    with h5py.File(address.partition("::")[0], "r+") as file:
        file[done]["completed_positions"][10:60] = 0
        file[done]["completed_positions"][100] = 0
    with Works(address, cores=1) as process:
        plan = process.plan()
        assert (plan.action, plan.group, plan.partial) == ("resume", done, (done,))
        assert (plan.n_done, plan.n_remaining) == (149, 51)
        assert plan.source_bytes == 51 * 8 * 4
        assert "resume" in repr(plan)
        assert "74.5%" in repr(plan)
        assert "width:74.5%" in plan._repr_html_()


def test_blocks_are_aligned_on_storage_chunks(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5", n_rows=100, n_cols=100, n_spectral=64, chunks=(64, 16))
    with Never(f"{path}::{name}", cores=1, max_mem_mb=least_mb(f"{path}::{name}") + 1) as process:
        plan = process.plan()
        sizes = divide(process._declared(), *remaining_of(process), driver_writes=False)
    assert plan.chunk_positions == 64
    assert plan.block_positions % 64 == 0
    assert plan.n_blocks > 1
    blocks = list(sizes.plan)
    assert len(blocks) == plan.n_blocks
    assert all(block.start % 64 == 0 for block in blocks)
    assert sum(block.n_positions for block in blocks) == 10**4


def least_mb(address: str, **options) -> int:
    """Return the least max_mem_mb with which one position fits, as the error says it."""
    with Never(address, max_mem_mb=1, **options) as process, pytest.raises(MemoryLimitError) as caught:
        process.plan()
    return int(str(caught.value).rpartition("Raise max_mem_mb to ")[2].split()[0])


def test_a_declared_process_has_the_attributes_of_subclasses(tmp_path):
    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=5, n_cols=4)
    body = {"outputs": {"Out": lazyproc.Output("f8")}, "_map_function": staticmethod(np.mean)}
    work = type("Mean", (lazyproc.Process,), body)
    with work(f"{path}::{name}", cores=1) as process:
        assert process._max_pos_per_read >= process.plan().block_positions > 0
        assert process._cores == 1
        assert process._h5_target_group.name == name.rpartition("/")[0]
        assert process._status_dset_name == "completed_positions"
        assert (process._h5_status_dset, process._results, process.data) == (None, None, None)
        assert process._get_pixels_in_current_batch is not None
        group = process.compute()
        assert process._h5_status_dset == group["completed_positions"]


def remaining_of(process):
    from lazyproc.core.runs import Runs
    from lazyproc.engine.choose import Scheduler

    return Runs.full(process.h5_main.shape[0]), Scheduler("serial", 1), None


@pytest.mark.parametrize("more_mb", [0, 3, 20, 1000])
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("multiplier", [1, 3.5])
def test_the_memory_numbers_hold_together(tmp_path, more_mb, cores, multiplier):
    path, name = make_usid_file(tmp_path / "a.h5", n_rows=100, n_cols=100, n_spectral=64)
    max_mem_mb = more_mb + least_mb(f"{path}::{name}", mem_multiplier=multiplier)
    with Never(f"{path}::{name}", cores=cores, max_mem_mb=max_mem_mb, mem_multiplier=multiplier) as process:
        plan = process.plan()
    assert plan.allowed_bytes == max_mem_mb * MEBIBYTE
    assert plan.bytes_per_position == pytest.approx(64 * 4 * multiplier + 4 + 64 * 8)
    assert plan.worker_bytes == WORKER_BYTES + min(plan.block_positions, 10**4) * plan.bytes_per_position
    assert plan.n_workers * plan.worker_bytes < plan.projected_bytes <= plan.allowed_bytes
    assert plan.n_blocks == count_blocks(10**4, plan.block_positions, plan.n_workers)


def test_one_position_that_does_not_fit_says_what_to_raise(tmp_path):
    path, name = make_usid_file(tmp_path / "a.h5", n_rows=1, n_cols=2, n_spectral=2**20)
    wanted = least_mb(f"{path}::{name}")
    with Never(f"{path}::{name}", max_mem_mb=wanted) as process:
        assert process.plan().block_positions == 1
    with Never(f"{path}::{name}", max_mem_mb=wanted - 1) as process, pytest.raises(MemoryLimitError):
        process.plan()


def test_a_plan_as_plain_values(address):
    with Never(address) as process:
        plan = process.plan()
    values = json.loads(json.dumps(plan.as_dict()))
    assert values["n_positions"] == 200
    assert values["group"] is None
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()} == plan.as_dict()


def test_after_a_run_the_time_of_another_is_estimated_only_if_it_was_measured(address):
    with Works(address, cores=1) as process:
        assert "not measured yet" in repr(process.plan())
        process.compute()
        assert process.plan().n_remaining == 0


N_MANY = 10**9
N_HOLES = 10**5

MANY = f"""
import json, resource, sys, time
import h5py, numpy as np
import lazyproc

N, CHUNK, GROUPS = {N_MANY}, 10**6, 100

class Never(lazyproc.Process):
    process_name = "Never"
    outputs = {{"Out": lazyproc.Output("f4")}}
    @staticmethod
    def _block_function(block):
        raise AssertionError("a plan computes nothing")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

address = sys.argv[1] + "::/Scan/Raw"
with Never(address) as process:
    before, begin = peak(), time.perf_counter()
    plan = process.plan()
    print(json.dumps(dict(plan.as_dict(), grown=peak() - before, took=time.perf_counter() - begin)))
"""


def make_huge_file(path: Path) -> None:
    """Write a scan of 10⁹ positions of which nothing is stored, and results that lack 10⁵ positions here and there."""
    texts = np.array([b"X"]), np.array([b"nm"])
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        scan = file.create_group("Scan")
        main = scan.create_dataset("Raw", (N_MANY, 1), "f4")
        result = scan.create_dataset("Raw-Never_000/Out", (N_MANY, 1), "f4")
        shapes = {"Position": (N_MANY, 1), "Spectroscopic": (1, 1)}
        for base, shape in shapes.items():
            for what, dtype in (("Indices", "u4"), ("Values", "f4")):
                ancillary = scan.create_dataset(f"{base}_{what}", shape, dtype)
                ancillary.attrs["labels"], ancillary.attrs["units"] = texts
                for dataset in (main, result):
                    dataset.attrs[f"{base}_{what}"] = ancillary.ref
        for dataset in (main, result):
            dataset.attrs["quantity"], dataset.attrs["units"] = "Height", "nm"
        group = result.parent
        group.attrs["tool"], group.attrs["source_000"] = "Never", main.ref
        mask = group.create_dataset(
            "completed_positions", (N_MANY,), "u1", chunks=(10**6,), compression="gzip", compression_opts=1, fillvalue=1
        )
        random = np.random.default_rng(5)
        for chunk in random.permutation(N_MANY // 10**6)[:100]:
            values = np.ones(10**6, np.uint8)
            values[random.permutation(10**6)[: N_HOLES // 100]] = 0
            mask[chunk * 10**6 : (chunk + 1) * 10**6] = values


def test_a_thousand_million_positions_with_many_holes_are_planned_in_little_memory(tmp_path):
    make_huge_file(tmp_path / "huge.h5")
    script = tmp_path / "plan.py"
    script.write_text(textwrap.dedent(MANY))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "huge.h5")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["action"] == "resume"
    assert plan["group"] == "/Scan/Raw-Never_000"
    assert (plan["n_positions"], plan["n_remaining"]) == (N_MANY, N_HOLES)
    assert plan["n_blocks"] >= 1
    assert plan["grown"] < 200 * MEBIBYTE
    assert os.path.getsize(tmp_path / "huge.h5") < 20 * MEBIBYTE


def test_the_plan_of_a_huge_scan_that_nobody_began(tmp_path):
    make_huge_file(tmp_path / "huge.h5")
    with h5py.File(tmp_path / "huge.h5", "r+") as file:
        del file["Scan/Raw-Never_000"]

    class Huge(Process):
        process_name = "Never"
        outputs = {"Out": Output("f4")}
        _block_function = staticmethod(np.sum)

    with Huge(f"{tmp_path / 'huge.h5'}::/Scan/Raw", max_mem_mb=128) as process:
        plan = process.plan()
        assert plan.n_remaining == N_MANY
        assert plan.n_blocks == count_blocks(N_MANY, plan.block_positions, plan.n_workers)
        assert plan.projected_bytes <= 128 * MEBIBYTE


def test_results_of_another_group_are_told_of(address):
    with Works(address, cores=1) as process:
        first, second = process.compute().name, process.compute(override=True).name
        text = repr(process.plan())
    assert f"return the finished results {second}" in text
    assert f"also there{'':>8}{first}".split() == next(line for line in text.splitlines() if "also" in line).split()
    assert first.startswith(CHANNEL)


def test_a_share_is_rounded_down(tmp_path):
    address = "::".join(make_usid_file(tmp_path / "b.h5", n_rows=64, n_cols=64, n_spectral=4))
    with Works(address, cores=1) as process:
        name = process.compute().name
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        file[name]["completed_positions"][17] = 0
    with Works(address, cores=1) as process:
        plan = process.plan()
    assert plan.n_done == 4095
    assert f"resume {name}, 99.9% done" in repr(plan)
    assert "width:99.9%" in plan._repr_html_()
    assert "100.0%" not in repr(plan) + plan._repr_html_()
    assert [format_share(done, 3) for done in range(4)] == ["0.0%", "33.3%", "66.6%", "100.0%"]
