"""Code as people write it: scripts without a guard, notebooks, lambdas, classes in files; pools, clusters, clients."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc import Output, Process
from lazyproc.core.events import Started

OUTPUTS = {"Mean": Output("f8"), "Pid": Output("i8")}
N_POSITIONS = 400
DELAY = 0.006
"""Seconds a position: enough for worker processes to pay."""


@pytest.fixture
def address(tmp_path: Path) -> str:
    """The address of a scan of 400 positions."""
    return "::".join(make_usid_file(tmp_path / "scan.h5", n_rows=20, n_cols=20, n_spectral=5))


def means(address: str) -> np.ndarray:
    path, _, name = address.partition("::")
    with h5py.File(path, "r") as file:
        return file[name][()].mean(1, dtype=float)


def run_script(folder: Path, code: str, *arguments: str, name: str = "script.py") -> dict[str, Any]:
    """Run a script in a process of its own and return the JSON that it prints."""
    script = folder / name
    script.write_text(textwrap.dedent(code))
    words = [sys.executable, str(script), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def check_pool(answer: dict[str, Any], address: str, scale: float = 1.0) -> None:
    """See that the values are right, and that two other processes computed most of them."""
    np.testing.assert_allclose(answer["means"], scale * means(address))
    others = [pid for pid in answer["pids"] if pid != answer["driver"]]
    assert len(set(others)) == 2
    assert len(others) > N_POSITIONS // 2, "all but the first look at the function"


REPORT = """
    group_data = (group["Mean"][:, 0].tolist(), group["Pid"][:, 0].tolist())
    print(json.dumps({"means": group_data[0], "pids": group_data[1], "driver": os.getpid()}))
"""

UNGUARDED = (
    """
    import json, os, sys, time
    import numpy as np
    import lazyproc

    FACTOR = 2.0  # a global of the script

    def scaled(values):
        return FACTOR * values.mean(dtype=float)

    class Slow(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8"), "Pid": lazyproc.Output("i8")}

        @staticmethod
        def _map_function(spectrum, delay):
            time.sleep(delay)
            return scaled(spectrum), os.getpid()

    group = Slow(sys.argv[1], parms_dict={"delay": float(sys.argv[2])}, cores=2).compute()
"""
    + REPORT
)


def test_a_script_without_a_guard(tmp_path, address):
    """The script runs once: its JSON is all that it prints, though workers were started."""
    check_pool(run_script(tmp_path, UNGUARDED, address, str(DELAY)), address, 2.0)


ANY_FUNCTION = (
    """
    import functools, json, os, sys, time
    import lazyproc

    def slow(spectrum, delay, scale):
        time.sleep(delay)
        return scale * spectrum.mean(dtype=float), os.getpid()

    def closure(delay, scale):
        def inside(spectrum):
            return slow(spectrum, delay, scale)
        return inside

    class Callable:
        def __init__(self, delay):
            self.delay = delay
        def __call__(self, spectrum):
            return slow(spectrum, self.delay, 3.0)

    delay = float(sys.argv[2])
    function = {
        "lambda": lambda spectrum: slow(spectrum, delay, 3.0),
        "closure": closure(delay, 3.0),
        "partial": functools.partial(slow, delay=delay, scale=3.0),
        "object": Callable(delay),
    }[sys.argv[3]]
    outputs = {"Mean": lazyproc.Output("f8"), "Pid": lazyproc.Output("i8")}
    group = lazyproc.map_positions(function, sys.argv[1], outputs, cores=2)
"""
    + REPORT
)


@pytest.mark.parametrize("kind", ["lambda", "closure", "partial", "object"])
def test_any_function_goes_to_worker_processes(tmp_path, address, kind):
    check_pool(run_script(tmp_path, ANY_FUNCTION, address, str(DELAY), kind), address, 3.0)


NAMESPACE = """
    import json, os, sys

    source = open(sys.argv[3]).read()
    namespace = {"__name__": sys.argv[4], "sys": sys}
    exec(compile(source, "<cell 1>", "exec"), namespace)
"""


@pytest.mark.parametrize("name", ["__main__", "__console__", "builtins_of_nobody"])
def test_a_namespace_that_is_no_module(tmp_path, address, name):
    """As in consoles and other hosts of Python: the functions' globals belong to no importable module."""
    (tmp_path / "cell.txt").write_text(textwrap.dedent(UNGUARDED))
    answer = run_script(tmp_path, NAMESPACE, address, str(DELAY), "cell.txt", name)
    check_pool(answer, address, 2.0)


CELLS = (
    """
    import json, os, sys, time
    import lazyproc
    FACTOR = 1.0
    """,
    """
    def scaled(values):
        return FACTOR * values.mean(dtype=float)
    """,
    """
    class Slow(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8"), "Pid": lazyproc.Output("i8")}

        @staticmethod
        def _map_function(spectrum, delay):
            time.sleep(delay)
            return scaled(spectrum), os.getpid()
    """,
    "FACTOR = 2.0",
    "group = Slow(ADDRESS, parms_dict={'delay': DELAY}, cores=2).compute()",
    """
    answer = {"means": group["Mean"][:, 0].tolist(), "pids": group["Pid"][:, 0].tolist(), "driver": os.getpid()}
    print(json.dumps(answer))
    """,
)


def test_a_notebook(address):
    """In a real kernel, cell by cell."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    manager = pytest.importorskip("jupyter_client.manager", reason="jupyter_client is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel, client = manager.start_new_kernel(kernel_name="python3")
    printed: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            printed.append(content["text"])
        assert message["msg_type"] != "error", "\n".join(content.get("traceback", []))

    try:
        for cell in (f"ADDRESS, DELAY = {address!r}, {DELAY}", *CELLS):
            client.execute_interactive(textwrap.dedent(cell), output_hook=hear, timeout=120)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
        kernel.cleanup_resources()
        kernel.context.destroy()
    check_pool(json.loads("".join(printed)), address, 2.0)


IN_A_FILE = """
    import os, time
    import lazyproc
    from beside import scaled

    class Slow(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8"), "Pid": lazyproc.Output("i8")}

        @staticmethod
        def _map_function(spectrum, delay):
            time.sleep(delay)
            return scaled(spectrum), os.getpid()
"""

LOADS = (
    """
    import json, os, sys
    from lazyproc.loading import load_process

    group = load_process(sys.argv[3])(sys.argv[1], parms_dict={"delay": float(sys.argv[2])}, cores=2).compute()
"""
    + REPORT
)


def test_a_class_in_a_file_with_a_helper_beside_it(tmp_path, address):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my_fit.py").write_text(textwrap.dedent(IN_A_FILE))
    (folder / "beside.py").write_text("def scaled(values):\n    return 2.0 * values.mean(dtype=float)\n")
    check_pool(run_script(tmp_path, LOADS, address, str(DELAY), "code/my_fit.py:Slow"), address, 2.0)


IMPORTS = (
    """
    import json, os, sys
    from my_fit import Slow  # beside this script

    group = Slow(sys.argv[1], parms_dict={"delay": float(sys.argv[2])}, cores=2).compute()
"""
    + REPORT
)


def test_a_class_in_a_module_beside_the_script(tmp_path, address):
    (tmp_path / "my_fit.py").write_text(textwrap.dedent(IN_A_FILE))
    (tmp_path / "beside.py").write_text("def scaled(values):\n    return 2.0 * values.mean(dtype=float)\n")
    check_pool(run_script(tmp_path, IMPORTS, address, str(DELAY)), address, 2.0)


NATIVE = (
    """
    import json, os, sys, time
    import numpy as np
    import lazyproc
    from threadpoolctl import threadpool_info

    class Threads(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8"), "Pid": lazyproc.Output("i8")}

        @staticmethod
        def _map_function(spectrum, delay):
            time.sleep(delay)
            np.ones((4, 4)) @ np.ones((4, 4))
            return max(pool["num_threads"] for pool in threadpool_info()), os.getpid()

    group = Threads(sys.argv[1], parms_dict={"delay": float(sys.argv[2])}, cores=2).compute()
"""
    + REPORT
)


def test_native_threads_are_limited_in_worker_processes(tmp_path, address):
    answer = run_script(tmp_path, NATIVE, address, str(DELAY))
    threads = {pid: set() for pid in answer["pids"]}
    for pid, count in zip(answer["pids"], answer["means"], strict=True):
        threads[pid].add(count)
    assert len(threads) == 3
    assert all(counts == {1} for pid, counts in threads.items() if pid != answer["driver"])


# --- clusters --------------------------------------------------------------------------------------------------------


def mean_and_pid(spectrum, scale=1.0):
    return scale * spectrum.mean(dtype=float), os.getpid()


class OnCluster(Process):
    process_name = "On_Cluster"
    outputs = OUTPUTS
    _map_function = staticmethod(mean_and_pid)


@pytest.fixture(scope="module")
def quiet_cluster():
    """Leave out the warnings of distributed itself while its clusters start and stop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def watch(process: Process) -> list[str]:
    """Note where the process runs."""
    seen: list[str] = []
    process._progress = lambda event: seen.append(event.scheduler) if isinstance(event, Started) else None
    return seen


def make_counter() -> Any:
    """Make a scheduler plugin that counts the finished tasks of each prefix."""
    from distributed.diagnostics.plugin import SchedulerPlugin

    class Counter(SchedulerPlugin):
        name = "lazyproc-test-counter"

        def __init__(self) -> None:
            self.finished: dict[str, int] = {}

        def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
            if finish == "memory":
                from distributed.utils import key_split

                prefix = key_split(key)
                self.finished[prefix] = self.finished.get(prefix, 0) + 1

    return Counter()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_active_client_is_used_with_one_task_a_block_under_the_name_of_the_process(tmp_path):
    from distributed import Client

    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=100, n_cols=300, n_spectral=64)
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        counter = make_counter()
        scheduler = client.cluster.scheduler
        scheduler.add_plugin(counter)
        with OnCluster(f"{path}::{name}", max_mem_mb=32, checkpoint_interval=0.2) as process:
            seen = watch(process)
            assert process.plan().scheduler == "Dask cluster, 2 threads"
            group = process.compute()
            np.testing.assert_allclose(group["Mean"][:, 0], means(f"{path}::{name}"))
            n_blocks = int(group.attrs["lazyproc_workers"].split(",")[1].split()[0])
        assert seen == ["Dask cluster, 2 threads"]
        assert "On_Cluster" in scheduler.task_prefixes
        assert counter.finished == {"try": 1, "On_Cluster": n_blocks}
        assert n_blocks > 4
        assert client.status == "running"
        assert client.submit(abs, -3).result() == 3
        scheduler.remove_plugin(counter.name)


@pytest.fixture(scope="module")
def outside(quiet_cluster):
    """A cluster whose scheduler and worker are processes that were started by a command."""
    from distributed import Client
    from distributed.deploy.subprocess import SubprocessCluster

    with SubprocessCluster(n_workers=1, threads_per_worker=2, silence_logs=False) as cluster:
        with Client(cluster, set_as_default=False) as client:
            # As for any Dask cluster: modules that are not installed are made known to workers that were started apart.
            client.wait_for_workers(1)
            client.run(lambda folder: sys.path.insert(0, folder), os.path.dirname(__file__))
            yield client


KINDS = [
    pytest.param(mean_and_pid, {"Mean": 1.0}, id="function"),
    pytest.param(functools.partial(mean_and_pid, scale=2.0), {"Mean": 2.0}, id="partial"),
    pytest.param(lambda spectrum: (3 * spectrum.mean(dtype=float), os.getpid()), {"Mean": 3.0}, id="lambda"),
]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("function", "scale"), KINDS)
def test_a_client_that_is_handed_over_is_used_and_left_open(address, outside, function, scale):
    group = lazyproc.map_positions(function, address, OUTPUTS, client=outside)
    np.testing.assert_allclose(group["Mean"][:, 0], scale["Mean"] * means(address))
    assert set(group["Pid"][:, 0]) - {os.getpid()}, "the workers did it"
    assert outside.status == "running"
    assert outside.submit(abs, -3).result() == 3


NATIVE_FUNCTIONS = [
    pytest.param(np.ptp, {}, lambda data: np.ptp(data, 1), id="NumPy function"),
    pytest.param(len, {}, lambda data: np.full(len(data), data.shape[1]), id="builtin"),
    pytest.param(np.abs, {"shape_from_main": True}, np.abs, id="ufunc"),
]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("function", "form", "expected"), NATIVE_FUNCTIONS)
def test_functions_written_in_c_go_to_a_cluster(address, outside, function, form, expected):
    group = lazyproc.map_positions(function, address, {"Out": Output("f4", **form)}, client=outside)
    path, _, name = address.partition("::")
    with h5py.File(path, "r") as file:
        wanted = expected(file[name][()])
    np.testing.assert_allclose(group["Out"][()].squeeze(), wanted, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_handle_and_results_in_another_file_on_a_cluster(tmp_path, address, outside):
    path, _, name = address.partition("::")
    with h5py.File(path, "r+") as file:
        file[name][0] = 7.0
        with OnCluster(file[name], h5_target_group=f"{tmp_path / 'out.h5'}::/", client=outside) as process:
            group = process.compute()
            assert group["Mean"][0, 0] == 7.0, "what was only in the handle reached the workers"
        group = OnCluster(file[name], client=outside).compute()
        assert group.file == file
    np.testing.assert_array_equal(means(address)[0], 7.0)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_native_threads_are_limited_on_a_cluster(address, outside):
    group = lazyproc.map_positions(blas_threads, address, OUTPUTS, client=outside)
    threads, pids = group["Mean"][:, 0], group["Pid"][:, 0]
    assert set(threads[pids != os.getpid()]) == {1}


def blas_threads(spectrum):
    from threadpoolctl import threadpool_info

    return max(pool["num_threads"] for pool in threadpool_info()), os.getpid()


GUARDLESS_CLIENT = """
    import json, os, sys
    from distributed import Client
    import lazyproc

    client = Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0")

    class Mean(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8"), "Thread": lazyproc.Output("i8")}

        @staticmethod
        def _map_function(spectrum):
            import threading
            return spectrum.mean(dtype=float), threading.get_ident()

    with Mean(sys.argv[1]) as process:
        group = process.compute()
        answer = {"means": group["Mean"][:, 0].tolist(), "threads": group["Thread"][:, 0].tolist()}
    import threading
    answer["main"] = threading.get_ident()
    answer["status"] = client.status
    client.close()
    print(json.dumps(answer))
"""


def test_a_script_with_a_client_of_threads(tmp_path, address):
    answer = run_script(tmp_path, GUARDLESS_CLIENT, address)
    np.testing.assert_allclose(answer["means"], means(address))
    assert set(answer["threads"]) - {answer["main"]}
    assert answer["status"] == "running"


def test_a_file_in_memory_is_computed_here_whatever_client_there_is(address, outside, caplog):
    expected = means(address)
    path, _, name = address.partition("::")
    with h5py.File(path, "r+", driver="core", backing_store=False) as file:
        group = OnCluster(file[name], client=outside).compute()
        assert set(group["Pid"][:, 0]) == {os.getpid()}
        np.testing.assert_allclose(group["Mean"][:, 0], expected)
    assert "other processes cannot open" in caplog.text


def test_a_process_in_a_thread_of_the_program(address):
    """As in servers and graphical programs: signals cannot be caught there, and need not be."""
    groups: list[str] = []

    def work() -> None:
        with OnCluster(address, cores=1) as process:
            groups.append(process.compute().name)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with h5py.File(address.partition("::")[0], "r") as file:
        np.testing.assert_allclose(file[groups[0]]["Mean"][:, 0], means(address))
        assert groups[0].startswith(CHANNEL)
