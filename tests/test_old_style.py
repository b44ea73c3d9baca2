"""What owners of old subclasses do beyond the clauses of the contract: flags as numbers, plans, groups of old files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from hook_classes import Stop, make_mean, mean_of
from usid_files import make_usid_file

import lazyproc
from lazyproc import Process
from lazyproc.core.errors import ArgumentTypeError, ArgumentValueError, ResultsError
from lazyproc.hdf5.hook_record import text_of
from lazyproc.hdf5.lock import RunLock
from lazyproc.hooks.step import next_step

Mean = make_mean(Process)
MASK = "completed_positions"


class Declared(Process):
    outputs = {"Mean": lazyproc.Output("f4")}

    @staticmethod
    def _map_function(spectrum):
        return np.mean(spectrum)


@pytest.fixture
def main(tmp_path):
    """A main dataset of 20 positions and 6 values, in a file open for reading and writing."""
    path, name = make_usid_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        yield file[name]


def made(cls, main, batch=6, **options):
    process = cls(main, **{"cores": 1, **options})
    process._max_pos_per_read = batch
    return process


def expected_means(main):
    return np.array([mean_of(row) for row in main[()]], "f4")[:, None]


# ---- where results go


@pytest.mark.parametrize("target", ["scan.h5::/new/group", "other.h5::/fits"])
def test_the_target_group_is_made_by_compute_not_by_the_constructor(tmp_path, target):
    path, name = make_usid_file(tmp_path / "scan.h5")
    before = Path(path).read_bytes()
    with Mean(f"{path}::{name}", cores=1, h5_target_group=tmp_path / target) as process:
        plan = process.plan()
        assert (plan.action, plan.duplicates, plan.partial) == ("start", (), ())
        assert "closed" not in process.why_not_duplicate(process.h5_main.parent)
    assert Path(path).read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["scan.h5"]
    for _ in range(2):
        with Mean(f"{path}::{name}", cores=1, h5_target_group=tmp_path / target) as process:
            group = process.compute()
            assert group.name == f"{target.partition('::')[2]}/Raw_Data-Mean_Hooks_000"
            np.testing.assert_array_equal(group["Results"], expected_means(process.h5_main))


# ---- flags


@pytest.mark.parametrize("cls", [Mean, Declared])
@pytest.mark.parametrize("number", [1, np.int64(1), np.uint8(1), np.bool_(True)])
def test_flags_may_be_the_numbers_0_and_1(main, cls, number):
    process = cls(main, cores=1, lazy=0, verbose=number)
    assert process.verbose is True
    first = process.compute(number - number if not isinstance(number, np.bool_) else False)
    assert process.compute(0) == first
    assert process.compute(number) != first
    assert cls(main, cores=1, lazy=number, verbose=0)._lazy is True


@pytest.mark.parametrize("value", [2, -1, 1.0, np.float32(0), "1", None, [1], np.array([1])])
def test_other_things_are_no_flags(main, value):
    with pytest.raises(ArgumentTypeError, match="verbose"):
        Mean(main, verbose=value)
    with pytest.raises(ArgumentTypeError, match="lazy"):
        Mean(main, lazy=value)
    with pytest.raises(ArgumentTypeError, match="override"):
        Mean(main).compute(value)


# ---- self._results of classes that compute and write themselves


@pytest.mark.parametrize(
    "results",
    [
        lambda data: [np.stack([data.mean(1), data.max(1)])],
        lambda data: [np.stack([data.mean(1), data.max(1)]), {"rows": len(data)}],
        lambda data: [float(data.mean()), float(data.max()), 3.0, 4.0],
        lambda data: [np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([1.0, 2.0]), np.array([3.0, 4.0])],
    ],
)
def test_a_class_that_computes_and_writes_itself_may_keep_any_list(main, results):
    class Own(Mean):
        def _unit_computation(self):
            self._results = results(self.data)

        def _write_results_chunk(self):
            self.h5_results[self._get_pixels_in_current_batch(), 0] = np.mean(self.data.astype("f8"), axis=1)

    process = made(Own, main)
    np.testing.assert_array_equal(process.compute()["Results"], expected_means(main))
    assert process.h5_results_grp[MASK][()].all()


def test_what_the_base_has_computed_may_be_stacked(main):
    class Stacking(Mean):
        def _unit_computation(self):
            super()._unit_computation()
            self._results = [np.stack([self._results, self._results])]

        def _write_results_chunk(self):
            self.h5_results[self._get_pixels_in_current_batch(), 0] = self._results[0][0]

    np.testing.assert_array_equal(made(Stacking, main).compute()["Results"], expected_means(main))


def test_what_the_base_has_computed_may_not_get_lost_in_the_first_batch(main):
    class Losing(Mean):
        def _unit_computation(self):
            super()._unit_computation()
            self._results.pop()

        def _write_results_chunk(self):
            pixels = self._get_pixels_in_current_batch()
            self.h5_results[pixels[: len(self._results)], 0] = np.array(self._results)

    with pytest.raises(ResultsError, match="5 results for 6"):
        made(Losing, main).compute()


# ---- finished groups that have last_pixel alone


def legacy_group(main, last_pixel):
    process = Mean(main, cores=1)
    process._create_results_datasets()
    group = process.h5_results_grp
    group["Results"][...] = expected_means(main)
    group.attrs["last_pixel"] = last_pixel
    main.file.flush()
    return group


def test_finished_results_without_a_mask_get_one_from_compute_as_from_pyusid(main):
    group = legacy_group(main, 20)
    before = sorted(group)
    process = Mean(main, cores=1)
    assert sorted(group) == before, "the constructor does not write"
    assert process.duplicate_h5_groups == [group]
    assert process.compute() == group
    assert sorted(group) == sorted([*before, MASK])
    assert group[MASK].dtype == np.uint8
    assert group[MASK][()].tolist() == [1] * 20
    assert group.attrs["last_pixel"] == 20
    again = Mean(main, cores=1)
    assert again.duplicate_h5_groups == [group]
    assert again.compute() == group
    assert len([name for name in main.parent if "Mean_Hooks" in name]) == 1


def test_the_mask_that_was_added_is_one_for_pyusid(main):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = pytest.importorskip("pyUSID.processing.process")
        group = legacy_group(main, 20)
        Mean(main, cores=1).compute()
        process = make_mean(old.Process)(main, cores=1)
        assert process.duplicate_h5_groups == [group]


def test_finished_results_in_a_file_open_for_reading_are_returned_without_a_mask(main):
    path, name = Path(main.file.filename), main.name
    before = sorted(legacy_group(main, 20))
    main.file.close()
    content = path.read_bytes()
    with h5py.File(path, "r") as file, h5py.File(path.with_name("out.h5"), "w") as out:
        process = Mean(file[name], cores=1, h5_target_group=out)
        process._h5_target_group = file[name].parent
        process.duplicate_h5_groups, _ = process._check_for_duplicates()
        assert sorted(process.compute()) == before
    assert path.read_bytes() == content


def test_finished_results_are_returned_without_a_mask_while_somebody_computes_into_the_file(main):
    before = sorted(legacy_group(main, 20))
    process = Mean(main, cores=1)
    lock = RunLock(main.file.filename, "another")
    lock.acquire()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(lock.release)
        assert sorted(process.compute()) == before
    assert MASK in process.compute()


# ---- plan and why_not_duplicate


class Stopping(Mean):
    """Stops after its first batch, so that partial results stay."""

    def _write_results_chunk(self):
        super()._write_results_chunk()
        if self._get_pixels_in_current_batch()[0] >= 6:
            raise Stop


class NoResume(Stopping):
    _get_existing_datasets = Process._get_existing_datasets


def partial_group(main, cls=Stopping, *args, **options):
    process = made(cls, main, **options)
    with pytest.raises(Stop):
        process.compute(False, *args)
    return process


def state(main):
    main.file.flush()
    path = Path(main.file.filename)
    return path.read_bytes(), sorted(one.name for one in path.parent.iterdir())


def test_a_plan_tells_what_the_old_class_kept_in_mangled_names(main):
    process = made(Mean, main, max_mem_mb=100, mem_multiplier=3.0)
    before = state(main)
    plan = process.plan()
    assert state(main) == before
    assert (plan.action, plan.group, plan.duplicates, plan.partial) == ("start", None, (), ())
    assert (plan.n_positions, plan.n_done, plan.n_remaining) == (20, 0, 20)
    assert (plan.n_blocks, plan.block_positions) == (4, 6)
    source = 6 * main.dtype.itemsize
    assert plan.source_bytes == 20 * source
    assert plan.bytes_per_position >= 3 * source
    assert plan.projected_bytes <= plan.allowed_bytes <= 100 * 2**20
    assert plan.result_bytes is None
    assert plan.seconds is None
    assert "start afresh" in repr(plan)
    assert "to write" not in repr(plan)
    assert "<table>" in plan._repr_html_()
    assert json.loads(json.dumps(plan.as_dict()))["result_bytes"] is None


def test_a_plan_of_partial_and_of_finished_results(main):
    group = partial_group(main).h5_results_grp
    process = made(Mean, main)
    before = state(main)
    plan = process.plan()
    assert (plan.action, plan.group, plan.partial) == ("resume", group.name, (group.name,))
    assert (plan.n_done, plan.n_remaining, plan.n_blocks) == (6, 14, 3)
    assert plan.result_bytes == 14 * (4 + 1)
    assert made(Mean, main).plan(2).action == "start", "other arguments are other work"
    assert state(main) == before
    assert process.compute() == group
    assert (process.plan().action, process.plan().group) == ("return", group.name)
    plan = made(Mean, main).plan()
    assert (plan.action, plan.group, plan.duplicates) == ("return", group.name, (group.name,))
    assert (plan.n_done, plan.n_remaining, plan.n_blocks) == (20, 0, 0)


def test_a_plan_of_results_that_were_chosen(main):
    first = partial_group(main).h5_results_grp
    process = made(Stopping, main)
    with pytest.raises(Stop):
        process.compute(override=True)
    second = process.h5_results_grp
    process = made(Mean, main)
    assert process.plan().group == second.name
    process.use_partial_computation(first)
    assert process.plan().group == first.name
    assert process.compute() == first


def test_results_that_were_chosen_go_before_finished_ones(main):
    partial = partial_group(main).h5_results_grp
    process = made(Mean, main)
    finished = process.compute(override=True)
    assert finished != partial
    process = made(Mean, main)
    assert (process.plan().group, process.compute()) == (finished.name, finished)
    process = made(Mean, main)
    process.use_partial_computation()
    plan = process.plan()
    assert (plan.action, plan.group) == ("resume", partial.name)
    assert process.compute() == partial
    assert partial[MASK][()].all()
    np.testing.assert_array_equal(partial["Results"], expected_means(main))
    assert process.compute() == partial, "once more: it is done"


def test_a_second_file_with_the_same_values_gets_results_of_its_own(tmp_path):
    sources = [make_usid_file(tmp_path / name) for name in ("one.h5", "two.h5")]
    names = []
    with h5py.File(tmp_path / "results.h5", "w") as results:
        for path, main in (*sources, *sources):
            with h5py.File(path, "r+") as file:
                process = made(Mean, file[main], h5_target_group=results)
                names.append(process.compute().name)
    assert names[0] == names[2] != names[1] == names[3]


def test_a_fresh_start_that_is_stopped_says_how_to_go_on(main):
    made(Mean, main).compute()

    def stop(self):
        os.kill(os.getpid(), signal.SIGINT)
        return Mean._read_data_chunk(self)

    cls = type("Signalled", (Mean,), {"_read_data_chunk": stop, "process_name": "Mean"})
    with pytest.raises(lazyproc.Interrupted, match="would start afresh"):
        made(cls, main).compute(override=True)


def test_a_plan_of_a_class_that_cannot_resume(main, caplog):
    group = partial_group(main, NoResume).h5_results_grp
    process = made(NoResume, main)
    plan = process.plan()
    assert (plan.action, plan.group, plan.partial) == ("start", None, (group.name,))
    assert plan.n_remaining == 20
    assert not caplog.records
    assert "cannot be resumed" in process.why_not_duplicate(group)


class Unresumable(Mean):
    _get_existing_datasets = Process._get_existing_datasets


@pytest.mark.parametrize(
    ("first", "cls", "args", "expected"),
    [
        (None, Mean, (), ("start", "")),
        (Mean, Mean, (), ("return", "found")),
        (Mean, Mean, (2,), ("start", "")),
        (Stopping, Mean, (), ("resume", "")),
        (Stopping, Unresumable, (), ("start", "cannot resume")),
        (Mean, None, (), ("resume", "")),  # and nothing remains
        (Stopping, None, (), ("resume", "")),
        (Stopping, None, (2,), ("start", "other")),
        (Unresumable, None, (), ("return", "held")),
        (Unresumable, None, (2,), ("start", "other")),
        (NoResume, None, (), ("start", "cannot resume")),
    ],
)
def test_a_decision_has_no_effects_and_compute_acts_on_it(main, caplog, first, cls, args, expected):
    """One class may have computed before, up to its end or not; the same object goes on if there is no other class."""
    process = None if first is None else made(first, main, process_name="Mean")
    if process is not None:
        with contextlib.suppress(Stop):
            process.compute()
    before = None if process is None else process.h5_results_grp
    if cls is not None:
        process = made(cls, main, process_name="Mean")
    files, held = state(main), process.h5_results_grp
    work, arguments = process._hook_work(), text_of(args, {})
    step = next_step(process, work, arguments, process.duplicate_h5_groups, process.partial_h5_groups)
    assert (step.action, step.why) == expected
    assert step.group == (None if step.action == "start" else before)
    assert step.passed == (before if step.why in ("other", "cannot resume") else None)
    assert (state(main), process.h5_results_grp, caplog.records) == (files, held, [])
    with contextlib.suppress(Stop):
        process.compute(False, *args)
    assert (process.h5_results_grp == before) == (step.action != "start")
    assert ("cannot be resumed" in caplog.text) == (step.why == "cannot resume")


@pytest.mark.parametrize("most", [2.5, 100])
def test_a_plan_counts_the_batches_that_there_will_be(main, most):
    process = made(Counting, main, batch=most)
    wanted = process.plan().n_blocks
    process.compute()
    assert process.n_batches == wanted


class Counting(Mean):
    n_batches = 0

    def _unit_computation(self):
        super()._unit_computation()
        self.n_batches += 1


def test_plans_by_address_and_after_closing(main):
    address = f"{main.file.filename}::{main.name}"
    main.file.close()
    with made(Mean, address) as process:
        assert process.plan().dataset == address
        group = process.compute()
        assert process.why_not_duplicate(group.name).startswith("no difference: 20 of 20")
        name = group.name
    with pytest.raises(ArgumentValueError, match="closed"):
        process.plan()
    with pytest.raises(ArgumentValueError, match="closed"):
        process.why_not_duplicate(name)


def test_why_not_duplicate_tells_parameters_arguments_and_source(main):
    table = np.arange(5000.0)
    parms = {"a": 1, "b": [1, 2], "c": None, "table": table, "gone": "x"}
    group = made(Mean, main, parms_dict=parms).compute()
    before = state(main)
    same = made(Mean, main, parms_dict=parms)
    assert same.why_not_duplicate(group) == "no difference: 20 of 20 positions of the same work are done"
    other = made(Mean, main, parms_dict={"a": 2, "b": [1, 2], "c": 3, "table": table + 1, "new": 1.5})
    lines = other.why_not_duplicate(group, 2).splitlines()
    assert lines[:2] == ["a: stored 1, wanted 2", "c: stored None, wanted 3"]
    assert [line.partition(":")[0] for line in lines] == ["a", "c", "gone", "table", "new", "arguments of compute"]
    assert "wanted {" in lines[-1]
    assert state(main) == before
    main[0, 0] += 1
    main.file.flush()
    assert same.why_not_duplicate(group).startswith("source: the values of")


def test_why_not_duplicate_of_results_by_other_programs(main):
    group = legacy_group(main, 20)
    group.attrs["a"], group.attrs["note"] = 1, "by hand"
    assert made(Mean, main, parms_dict={"a": 1}).why_not_duplicate(group).startswith("no difference: 20 of 20")
    lines = made(Mean, main, parms_dict={"a": 2, "b": 1, "note": None}).why_not_duplicate(group).splitlines()
    assert lines == ["a: stored 1, wanted 2", "b: stored none, wanted 1", "note: stored 'by hand', wanted None"]
    other = made(Mean, main, process_name="Other").why_not_duplicate(group)
    assert other.startswith("name: looked for are groups in")
    del group.attrs["last_pixel"]
    assert "there is no status mask" in made(Mean, main).why_not_duplicate(group)
    assert "cannot be compared" in made(Mean, main, parms_dict={"a": main.ref}).why_not_duplicate(group)


@pytest.mark.parametrize("stored", [{}, {"a": 1}, {"a": 1.0}, {"a": [1, 2]}, {"a": None}])
@pytest.mark.parametrize("wanted", [{}, {"a": 1}, {"a": 1.0}, {"a": (1, 2)}, {"a": None}, {"a": 1, "b": None}])
def test_why_not_duplicate_says_what_compute_does(main, stored, wanted):
    group = made(Mean, main, parms_dict=stored).compute()
    process = made(Mean, main, parms_dict=wanted)
    told = process.why_not_duplicate(group).startswith("no difference")
    assert (process.plan().action == "return") == told
    assert (process.compute() == group) == told


@pytest.mark.parametrize("wrong", ["nothing", "Raw_Data", 3])
def test_why_not_duplicate_of_what_is_no_group(main, wrong):
    with pytest.raises(ArgumentTypeError, match="results group"):
        made(Mean, main).why_not_duplicate(wrong)


# ---- where results came from


@pytest.mark.parametrize("cls", [Mean, Declared])
@pytest.mark.parametrize("by", ["handles", "handle and address", "addresses"])
def test_the_source_of_results_elsewhere_is_an_absolute_path(tmp_path, monkeypatch, cls, by):
    monkeypatch.chdir(tmp_path)
    _, name = make_usid_file(Path("scan.h5"))
    with contextlib.ExitStack() as stack:
        main = f"scan.h5::{name}" if by == "addresses" else stack.enter_context(h5py.File("scan.h5", "r"))[name]
        target = stack.enter_context(h5py.File("out.h5", "w")) if by == "handles" else "out.h5::/"
        process = stack.enter_context(cls(main, cores=1, h5_target_group=target))
        group = process.compute()
        assert group.attrs["source_file_path"] == str(tmp_path / "scan.h5")
        again = stack.enter_context(cls(main, cores=1, h5_target_group=target))
        assert [one.name for one in again.duplicate_h5_groups] == [group.name]
