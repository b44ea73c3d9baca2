"""The helpers of old subclasses on Dask: the same results, the same complaints, and nothing pickled on one core."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyproc import ArgumentTypeError, ArgumentValueError, WorkerError, parallel_compute, recommend_cpu_cores
from lazyproc.engine.limits import available_cores

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    old = pytest.importorskip("pyUSID.processing.comp_utils")

CORES = available_cores()
two_cores = pytest.mark.skipif(CORES < 2, reason="needs two cores")
DATA = np.random.default_rng(3).standard_normal((200, 16))
quiet_cluster = pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")


def moment(row, power=1, *, shift=0.0):
    return np.sum((row - shift) ** power)


def spread_out(row):
    row -= row.mean()  # in place, as old functions do
    return row


def where(row):
    return os.getpid()


def refuse(row):
    raise ValueError(f"no good: {row.size}")


class Odd(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def refuse_oddly(row):
    raise Odd("this", "that")


def lock_of(row):
    return threading.Lock()


def die(row):
    os._exit(7)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.Client(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", set_as_default=False
    ) as client:
        yield client


# ---- results


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=two_cores), None])
@pytest.mark.parametrize("args", [((), {}), ((3,), {}), ([2], {"shift": 0.5}), (None, None)])
def test_each_row_in_order(cores, args):
    func_args, func_kwargs = args
    results = parallel_compute(DATA, moment, cores=cores, func_args=func_args, func_kwargs=func_kwargs)
    assert type(results) is list
    assert results == [moment(row, *(func_args or ()), **(func_kwargs or {})) for row in DATA]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 90), st.integers(0, 5)),
    dtype=st.sampled_from(["f4", "c16", "i2", ">u4", "f4,i2"]),
    cores=st.sampled_from([1, 2]),
)
def test_rows_arrive_as_they_are(shape, dtype, cores):
    data = np.zeros(shape, dtype)
    data.view("u1")[...] = np.random.default_rng(0).integers(0, 50, data.view("u1").shape)
    results = parallel_compute(data, np.copy, cores=cores, lengthy_computation=True)
    assert len(results) == len(data)
    for row, result in zip(data, results, strict=True):
        assert result.dtype == row.dtype
        assert result.tobytes() == row.tobytes()


@pytest.mark.parametrize("cores", [1, 2])
def test_the_same_as_the_old_helper(cores):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = old.parallel_compute(DATA, moment, cores=1, func_args=[3], func_kwargs={"shift": 0.25})
    ours = parallel_compute(DATA, moment, cores=cores, func_args=[3], func_kwargs={"shift": 0.25})
    assert [value.tobytes() for value in ours] == [value.tobytes() for value in theirs]


@pytest.mark.parametrize("backend", [None, "loky", "multiprocessing", "threading"])
def test_the_backend_of_old_callers_is_taken(backend):
    assert parallel_compute(DATA, moment, 1, False, [2], {}, False, backend) == [moment(row, 2) for row in DATA]


def test_no_rows_give_no_results():
    assert parallel_compute(DATA[:0], refuse) == []


@two_cores
def test_several_cores_are_other_processes_and_all_are_used():
    pids = set(parallel_compute(DATA, lambda row: (time.sleep(0.005), os.getpid())[1], cores=2))
    assert os.getpid() not in pids
    assert len(pids) == 2


@two_cores
def test_few_short_calls_stay_here_and_few_long_ones_do_not():
    assert set(parallel_compute(DATA[:8], where, cores=2)) == {os.getpid()}
    assert os.getpid() not in parallel_compute(DATA[:8], where, cores=2, lengthy_computation=True)


@two_cores
def test_pieces_are_few():
    """Positions travel together: a lone call a task would make this slower than one core by far."""
    from lazyproc.engine import parallel

    sizes = []
    own = parallel._on_processes

    def counting(name, packed, pieces, cores):
        sizes.append([len(piece) for piece in pieces])
        return own(name, packed, pieces, cores)

    parallel._on_processes = counting
    try:
        parallel_compute(np.zeros((10000, 4)), np.sum, cores=2)
    finally:
        parallel._on_processes = own
    assert sum(sizes[0]) == 10000
    assert 2 <= len(sizes[0]) <= 16


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=two_cores)])
def test_a_dask_array_goes_whole_rows_at_a_time(cores):
    import dask.array

    lazy = dask.array.from_array(DATA, chunks=(30, 5))
    results = parallel_compute(lazy, np.copy, cores=cores, lengthy_computation=True)
    assert np.array(results).tobytes() == DATA.tobytes()


def forms(row):
    """Return results of many forms: the one that a row's first number names."""
    number = int(row[0])
    return [
        np.float32(number),
        np.longdouble(number) / 3,
        float(number),
        np.full(3, number, ">i2"),
        np.full((2, 2), number, "f8"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(number),
        np.zeros(2, "f4,i8"),
        np.array([None, number], object),
        np.ma.masked_array([1, 2], [True, False]),
        np.bool_(number % 2),
        np.str_("text"),
        np.datetime64("2020-01-01"),
        np.arange(number % 4),
        (np.float64(number), np.arange(2)),
        {"key": number},
        None,
        complex(number, float("nan")),
    ][int(row[1])]


def told(value):
    """Return all that can be told of a result."""
    flags = str(value.flags) if isinstance(value, np.ndarray) else ""
    dtype = str(getattr(value, "dtype", ""))
    order = flags.replace("OWNDATA : False", "OWNDATA : True")
    return type(value), dtype, getattr(value, "shape", ()), order, repr(value)


@two_cores
@pytest.mark.parametrize("form", range(18))
def test_results_of_any_form_come_back_as_they_were(form):
    data = np.stack([np.arange(50), np.full(50, form)], axis=1)
    theirs = parallel_compute(data, forms, cores=1)
    ours = parallel_compute(data, forms, cores=2)
    assert list(map(told, ours)) == list(map(told, theirs))


# ---- one core


def test_one_core_pickles_nothing_and_works_on_the_data_itself():
    lock, data = threading.Lock(), DATA.copy()
    assert not lock.locked()

    def guarded(row):
        with lock:
            return spread_out(row)

    results = parallel_compute(data, guarded, cores=1)
    assert all(np.shares_memory(result, data) for result in results)


@two_cores
def test_several_cores_leave_the_data_alone():
    data = DATA.copy()
    results = parallel_compute(data, spread_out, cores=2)
    assert data.tobytes() == DATA.tobytes()
    assert np.array(results).tobytes() == np.array([spread_out(row) for row in DATA.copy()]).tobytes()


# ---- what goes wrong


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=two_cores)])
def test_what_the_function_raises_is_raised(cores):
    with pytest.raises(ValueError, match="no good: 16") as caught:
        parallel_compute(DATA, refuse, cores=cores)
    assert "refuse" in [entry.name for entry in caught.traceback]


@two_cores
def test_an_exception_that_cannot_be_unpickled_still_tells():
    with pytest.raises(Exception, match="this and that"):
        parallel_compute(DATA, refuse_oddly, cores=2)


@two_cores
def test_what_cannot_be_sent_is_named_with_the_remedy():
    lock = threading.Lock()

    def guarded(row):
        return lock

    with pytest.raises(WorkerError, match=re.compile("guarded.*lock.*cores=1", re.DOTALL)):
        parallel_compute(DATA, guarded, cores=2)
    with pytest.raises(WorkerError, match="cores=1"):
        parallel_compute(DATA, moment, cores=2, func_args=[lock])
    with pytest.raises(WorkerError, match=re.compile("lock_of.*cores=1", re.DOTALL)):
        parallel_compute(DATA, lock_of, cores=2)


@two_cores
def test_a_worker_that_dies_is_told_and_the_next_call_works():
    with pytest.raises(WorkerError, match="die: a worker failed"):
        parallel_compute(DATA, die, cores=2)
    assert parallel_compute(DATA, moment, cores=2) == [moment(row) for row in DATA]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"func": "moment"}, TypeError),
        ({"data": [1, 2, 3]}, TypeError),
        ({"data": ((1, 2), (3, 4))}, TypeError),
        ({"func_args": "a"}, TypeError),
        ({"func_args": {"a": 1}}, TypeError),
        ({"func_kwargs": [1]}, TypeError),
        ({"cores": "2"}, TypeError),
        ({"cores": 1.5}, TypeError),
    ],
)
def test_wrong_arguments_raise_what_the_old_helper_raised(arguments, error):
    given_arguments = {"data": DATA, "func": moment, **arguments}
    for helper in (old.parallel_compute, parallel_compute):
        with pytest.raises(error):
            helper(**given_arguments)


# ---- a cluster


@quiet_cluster
@pytest.mark.parametrize("rows", [3, 200])
def test_a_cluster_gives_the_same(cluster, rows):
    results = parallel_compute(DATA[:rows], moment, func_args=[3], client=cluster)
    assert results == [moment(row, 3) for row in DATA[:rows]]
    assert os.getpid() not in parallel_compute(DATA[:rows], where, client=cluster)


@quiet_cluster
def test_functions_may_work_in_place_on_a_cluster(cluster):
    results = parallel_compute(DATA.copy(), spread_out, client=cluster)
    assert np.array(results).tobytes() == np.array([spread_out(row) for row in DATA.copy()]).tobytes()


@quiet_cluster
def test_large_data_and_large_arguments_go_to_a_cluster_without_a_warning(cluster):
    data, weights = np.ones((40, 2**16)), np.ones(2**16)
    results = parallel_compute(data, np.dot, func_args=[weights], client=cluster)
    assert results == [2.0**16] * 40
    wide = np.ones((3, 2**21))
    assert parallel_compute(wide, np.sum, client=cluster) == [2.0**21] * 3


@quiet_cluster
def test_what_a_function_raises_on_a_cluster_is_raised(cluster):
    with pytest.raises(ValueError, match="no good"):
        parallel_compute(DATA, refuse, client=cluster)
    with pytest.raises(WorkerError, match="cores=1"):
        parallel_compute(DATA, functools.partial(moment, threading.Lock()), client=cluster)
    assert not cluster.futures


@quiet_cluster
def test_the_active_client_is_used_unless_one_core_is_asked_for():
    from distributed import Client

    with Client(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"):
        assert os.getpid() not in parallel_compute(DATA, where)
        assert set(parallel_compute(DATA, where, cores=1)) == {os.getpid()}


# ---- how many cores


@pytest.mark.parametrize("lengthy", [False, True])
@pytest.mark.parametrize("requested", [None, *range(1, CORES + 1), CORES + 5, -1])
@pytest.mark.parametrize("jobs", [1, 2, 19, 20, 40, 41, 79, 80, 1000])
def test_recommended_cores_are_those_of_the_old_helper(monkeypatch, jobs, requested, lengthy):
    sidpy = sys.modules[old.recommend_cpu_cores.__module__]
    monkeypatch.setattr(sidpy, "cpu_count", lambda: CORES)
    theirs = old.recommend_cpu_cores(jobs, requested_cores=requested, lengthy_computation=lengthy)
    assert recommend_cpu_cores(jobs, requested_cores=requested, lengthy_computation=lengthy) == theirs


@pytest.mark.parametrize("free", range(CORES))
def test_cores_that_shall_stay_free(monkeypatch, free):
    sidpy = sys.modules[old.recommend_cpu_cores.__module__]
    monkeypatch.setattr(sidpy, "cpu_count", lambda: CORES)
    theirs = old.recommend_cpu_cores(10**6, min_free_cores=free)
    assert recommend_cpu_cores(10**6, min_free_cores=free) == theirs == CORES - free


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_jobs": 2.5}, ArgumentTypeError),
        ({"num_jobs": "2"}, ArgumentTypeError),
        ({"num_jobs": 0}, ArgumentValueError),
        ({"num_jobs": -3}, ArgumentValueError),
        ({"num_jobs": 10, "requested_cores": 2.5}, ArgumentTypeError),
        ({"num_jobs": 10, "min_free_cores": 1.5}, ArgumentTypeError),
        ({"num_jobs": 10, "min_free_cores": -1}, ArgumentValueError),
        ({"num_jobs": 10, "min_free_cores": 10**6}, ArgumentValueError),
    ],
)
def test_wrong_numbers_raise_what_the_old_helper_raised(arguments, error):
    old_error = TypeError if issubclass(error, TypeError) else ValueError
    for helper, expected in ((old.recommend_cpu_cores, old_error), (recommend_cpu_cores, error)):
        with pytest.raises(expected):
            helper(**arguments)


def test_nothing_is_printed(capfd):
    recommend_cpu_cores(100, verbose=True)
    parallel_compute(DATA, moment, cores=1, verbose=True)
    assert capfd.readouterr().out == ""


# ---- in a script


@two_cores
def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import numpy as np
            import lazyproc

            def own(row):
                return row.sum()

            print(sum(lazyproc.parallel_compute(np.ones((100, 3)), own, cores=2)))
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "300.0", done.stderr
    assert done.stderr == ""
