"""The command line as people use it: real commands in real processes, their words, their JSON, their exit codes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file, real_file

import lazyproc

COMMAND = [str(Path(sys.executable).with_name("lazyproc"))]
if not Path(COMMAND[0]).exists():
    COMMAND = [sys.executable, "-m", "lazyproc.cli"]

PEAKS = """
    import functools
    import os

    import lazyproc
    import numpy as np

    from smoothing import smooth  # a helper beside this file


    class Peaks(lazyproc.Process):
        process_name = "Peak-Finding"
        outputs = {"Height": lazyproc.Output("f8", units="nA"), "Place": lazyproc.Output("i4")}

        @staticmethod
        def _map_function(spectrum, width=1, sign="+", window=None, counter=None, delay=0.0, fail_above=np.inf):
            if counter:
                note(counter)
            lazy(delay)
            smoothed = smooth(spectrum, width) * (1 if sign == "+" else -1)
            return {"Height": check(smoothed.max(), fail_above), "Place": smoothed.argmax()}


    def note(counter):
        descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b".")
        os.close(descriptor)


    def lazy(delay):
        import time

        time.sleep(delay)


    def check(height, limit):
        if height > limit:
            raise ValueError(f"the height {height:.1f} cannot be")
        return height


    class NoProcess:
        pass
"""

SMOOTHING = """
    import numpy as np


    def smooth(spectrum, width):
        return np.convolve(spectrum, np.ones(width) / width, mode="same")
"""


def lazyproc_command(*arguments: Any, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **(env or {})}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a scan, a process in a file, and its helper."""
    make_usid_file(tmp_path / "scan.h5", n_rows=10, n_cols=10, n_spectral=16, seed=3)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "peaks.py").write_text(textwrap.dedent(PEAKS))
    (tmp_path / "code" / "smoothing.py").write_text(textwrap.dedent(SMOOTHING))
    return tmp_path


ADDRESS = f"scan.h5::{CHANNEL}/Raw_Data"
PROCESS = "code/peaks.py:Peaks"


def expected_heights(folder: Path, width: int = 1) -> np.ndarray:
    with h5py.File(folder / "scan.h5", "r") as file:
        data = file[f"{CHANNEL}/Raw_Data"][()]
    return np.array([np.convolve(row, np.ones(width) / width, mode="same").max() for row in data])


def stored_heights(address: str, folder: Path) -> np.ndarray:
    path, _, name = address.partition("::")
    with h5py.File(folder / path, "r") as file:
        return file[name]["Height"][:, 0]


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_of_a_class_in_a_file(folder):
    done = lazyproc_command("run", PROCESS, ADDRESS, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{folder / 'scan.h5'}::{CHANNEL}/Raw_Data-Peak_Finding_000\n"
    np.testing.assert_allclose(stored_heights(done.stdout.strip(), folder), expected_heights(folder), rtol=1e-6)


def test_run_of_a_class_in_a_module_of_this_folder(folder):
    done = lazyproc_command("run", "peaks:Peaks", f"../{ADDRESS}", "--json", cwd=folder / "code")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["n_positions"] == 100
    np.testing.assert_allclose(stored_heights(answer["results"], folder), expected_heights(folder), rtol=1e-6)


def test_run_of_a_registered_process(folder):
    info = folder / "code" / "peakpack-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peakpack\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[lazyproc.processes]\npeak-finder = peaks:Peaks\nbroken = peaks:Nothing\n")
    paths = {"PYTHONPATH": str(folder / "code")}
    done = lazyproc_command("run", "peak-finder", ADDRESS, cwd=folder, env=paths)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(stored_heights(done.stdout.strip(), folder), expected_heights(folder), rtol=1e-6)
    unknown = lazyproc_command("run", "peek-finder", ADDRESS, cwd=folder, env=paths)
    assert unknown.returncode == 2
    assert "no process of that name is registered (['broken', 'peak-finder'])" in unknown.stderr
    broken = lazyproc_command("run", "broken", ADDRESS, cwd=folder, env=paths)
    assert broken.returncode == 1
    assert "Error: broken: could not be loaded: AttributeError" in broken.stderr


def test_parameters_are_values(folder):
    options = ["-p", "width=3", "-p", "sign=-", "-p", "window=[1, 2.5]", "-p", "operator=me and you", "-p", "flag=true"]
    done = lazyproc_command("run", PROCESS, ADDRESS, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    results = lazyproc.open_results(done.stdout.strip())
    wanted = {"width": 3, "sign": "-", "window": [1, 2.5], "operator": "me and you", "flag": True}
    assert {name: results.attrs[name] for name in wanted} == wanted
    assert isinstance(results.attrs["width"], int)


def test_finished_work_is_returned_and_override_computes_afresh(folder):
    counter = folder / "calls"
    options = [PROCESS, ADDRESS, "-p", f"counter={counter}"]
    first = lazyproc_command("run", *options, cwd=folder).stdout
    assert counter.stat().st_size == 100
    assert lazyproc_command("run", *options, cwd=folder).stdout == first
    assert counter.stat().st_size == 100
    afresh = lazyproc_command("run", *options, "--override", cwd=folder)
    assert afresh.stdout == first.replace("_000\n", "_001\n")
    assert counter.stat().st_size == 200


def test_target_memory_and_cores(folder):
    os.chmod(folder / "scan.h5", 0o444)
    content = (folder / "scan.h5").read_bytes()
    options = ["--target", "out.h5::/fits/first", "--max-mem-mb", 200, "--cores", 1, "--verbose"]
    done = lazyproc_command("run", PROCESS, ADDRESS, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'out.h5'}::/fits/first/Raw_Data-Peak_Finding_000\n"
    assert "100 positions" in done.stderr or "positions in" in done.stderr
    np.testing.assert_allclose(stored_heights(done.stdout.strip(), folder), expected_heights(folder), rtol=1e-6)
    assert (folder / "scan.h5").read_bytes() == content
    little = lazyproc_command("run", PROCESS, ADDRESS, "--target", "out.h5", "--max-mem-mb", 1, cwd=folder)
    assert little.returncode == 1
    assert little.stderr.startswith("Error: max_mem_mb: 1 MiB are allowed")


# --- stop and go on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_group", [False, True], ids=["kill -INT", "Ctrl-C"])
def test_ctrl_c_commits_exits_with_75_and_the_same_line_goes_on(tmp_path, folder, whole_group):
    """Ctrl-C in a terminal reaches the workers, too; `kill -INT` the driver alone."""
    n_positions = 900
    make_usid_file(folder / "long.h5", n_rows=30, n_cols=30, n_spectral=4)
    counter = folder / "calls"
    words = ["run", PROCESS, f"long.h5::{CHANNEL}/Raw_Data", "-p", "delay=0.02", "-p", f"counter={counter}"]
    words += ["--cores", "2", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*COMMAND, *words], cwd=folder, start_new_session=True, **pipes) as running:
        wait_for(lambda: counter.exists() and counter.stat().st_size > 60, running)
        state = json.loads(lazyproc_command("status", "long.h5", "--json", cwd=folder).stdout)
        assert state["running"]["pid"] == running.pid
        assert "running: host" in lazyproc_command("status", "long.h5", cwd=folder).stdout
        busy = lazyproc_command(*words, cwd=folder)
        assert busy.returncode == 1
        assert f"pid {running.pid}" in busy.stderr
        (os.killpg if whole_group else os.kill)(running.pid, signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 75, err
    assert out == ""
    assert "Traceback" not in err
    n_called = counter.stat().st_size
    assert n_called < n_positions
    assert f"stopped early; {n_called} of {n_positions} positions" in err
    (state,) = json.loads(lazyproc_command("status", "long.h5", "--json", cwd=folder).stdout)["results"]
    assert state["n_done"] == n_called
    assert state["finished"] == ""
    plan = lazyproc_command("plan", *words[1:], cwd=folder)
    assert json.loads(plan.stdout)["action"] == "resume"
    done = lazyproc_command(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert counter.stat().st_size == n_positions, "every position was computed once"
    (state,) = json.loads(lazyproc_command("status", "long.h5", "--json", cwd=folder).stdout)["results"]
    assert state["n_done"] == n_positions
    assert state["finished"]


def wait_for(condition: Any, running: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_stops_as_ctrl_c_does(folder):
    counter = folder / "calls"
    words = ["run", PROCESS, ADDRESS, "-p", "delay=0.03", "-p", f"counter={counter}", "--cores", "1"]
    with subprocess.Popen([*COMMAND, *words], cwd=folder, stderr=subprocess.PIPE, text=True) as running:
        wait_for(lambda: counter.exists() and counter.stat().st_size > 20, running)
        time.sleep(0.3)
        running.terminate()
        _, err = running.communicate(timeout=60)
    assert running.returncode == 75, err
    assert "goes on from there" in err
    done = lazyproc_command(*words[:-4], "-p", f"counter={counter}", "--cores", "1", cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGINT, "Stopped: run again."),
        (signal.SIGTERM, "stopped while no blocks were computed; what was finished before is kept. Run again."),
        (signal.SIGUSR1, "stopped while no blocks were computed; what was finished before is kept. Run again."),
    ],
)
def test_a_signal_before_the_run_begins_exits_with_75_too(folder, number, says):
    (folder / "slow.py").write_text("open('importing', 'w').close()\nimport time\ntime.sleep(60)\n")
    with subprocess.Popen(
        [*COMMAND, "run", "slow.py:Peaks", ADDRESS], cwd=folder, stderr=subprocess.PIPE, text=True
    ) as running:
        wait_for((folder / "importing").exists, running)
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 75, err
    assert err.strip() == says


# --- what goes wrong -------------------------------------------------------------------------------------------------


WHO = """
    import os

    import lazyproc


    class Who(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8"), "Pid": lazyproc.Output("i8")}

        @staticmethod
        def _map_function(spectrum):
            return spectrum.mean(), os.getpid()
"""

EXISTING = """
    import os, sys, time

    import distributed

    if __name__ == "__main__":
        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
        with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
            client.write_scheduler_file("scheduler.json")
            print(cluster.scheduler_address, *client.run(os.getpid).values(), flush=True)
            time.sleep(600)
"""


@pytest.fixture(scope="module")
def existing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, set[int]]]:
    """Give the address and the file of a scheduler in another folder, and its workers' process ids."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "existing.py").write_text(textwrap.dedent(EXISTING))
    with subprocess.Popen(
        [sys.executable, "existing.py"], cwd=elsewhere, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            address, *pids = process.stdout.readline().split()
            yield address, elsewhere / "scheduler.json", set(map(int, pids))
            assert process.poll() is None, "it is left alone"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["variable", "address", "file"])
def test_a_cluster_that_exists_is_used(folder: Path, existing: Any, how: str) -> None:
    address, file, pids = existing
    (folder / "who.py").write_text(textwrap.dedent(WHO))
    environ = {"DASK_SCHEDULER_ADDRESS": address} if how == "variable" else {}
    words = {"variable": [], "address": ["--scheduler", address], "file": ["--scheduler", file]}[how]
    command = ["who.py:Who", ADDRESS, *words, "--override"]
    done = lazyproc_command("plan", *command[:-1], "--json", cwd=folder, env=environ)
    assert json.loads(done.stdout)["scheduler"] == "Dask cluster, 2 threads", done.stderr
    done = lazyproc_command("run", *command, cwd=folder, env=environ)
    assert (done.returncode, done.stderr) == (0, ""), done
    dashboard, results = done.stdout.splitlines()
    assert dashboard.startswith("lazyproc: dashboard at ")
    path, _, group = results.partition("::")
    with h5py.File(path) as opened:
        np.testing.assert_allclose(opened[group]["Mean"][:, 0], opened[f"{CHANNEL}/Raw_Data"][()].mean(axis=1))
        assert pids >= set(opened[group]["Pid"][:, 0].tolist()), "all was done by its workers"
    done = lazyproc_command("run", *command[:-1], "--json", cwd=folder, env=environ)
    assert json.loads(done.stdout)["results"] == results, "nothing but JSON"


@pytest.mark.parametrize(
    ("scheduler", "environ", "message"),
    [
        ("nonsense.json", {}, "is a file that names no address"),
        ("nofile.json", {}, "there is no scheduler file nofile.json, and an address ends with a port; expected a file"),
        ("tcp://127.0.0.1", {}, "is no address of a Dask scheduler (missing port number"),
        ("foo://127.0.0.1:1", {}, "is no address of a Dask scheduler (unknown address scheme"),
        ("tcp://127.0.0.1:1", {"PMI_SIZE": "1", "PMI_RANK": "0"}, "this was launched by mpiexec or srun"),
    ],
)
def test_a_scheduler_that_cannot_be_is_named(folder: Path, scheduler: str, environ: Any, message: str) -> None:
    (folder / "nonsense.json").write_text("{}")
    done = lazyproc_command("run", PROCESS, ADDRESS, "--scheduler", scheduler, cwd=folder, env=environ)
    assert done.returncode == 1, done
    assert done.stderr.startswith("Error: ")
    assert scheduler in done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_a_failing_function_shows_its_own_traceback_and_the_positions(folder):
    limit = float(np.sort(expected_heights(folder))[-2] + 1e-6)
    position = int(np.argmax(expected_heights(folder)))
    done = lazyproc_command("run", PROCESS, ADDRESS, "-p", f"fail_above={limit}", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert f'File "{folder / "code" / "peaks.py"}", line' in done.stderr
    assert "in check" in done.stderr
    assert "ValueError: the height" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: Peak-Finding: the function failed at position {position} of {folder / 'scan.h5'}::")
    package = os.path.dirname(lazyproc.__file__)
    assert f'File "{package}' not in done.stderr, "the frames of lazyproc itself help nobody"
    assert done.stderr.count("Traceback") == 1


def test_a_file_that_cannot_be_loaded_shows_why(folder):
    (folder / "code" / "peaks.py").write_text("import numpy\nnumpy.no_such_thing\n")
    for process, cwd in ((PROCESS, folder), ("peaks:Peaks", folder / "code")):
        done = lazyproc_command("run", process, f"{folder / 'scan.h5'}::/x", cwd=cwd)
        assert done.returncode == 1
        assert 'peaks.py", line 2' in done.stderr
        assert "could not be loaded: AttributeError: module 'numpy' has no attribute 'no_such_thing'" in done.stderr
        assert "loading.py" not in done.stderr
        assert "importlib" not in done.stderr
    (folder / "code" / "peaks.py").write_text("class Peaks(:\n")
    done = lazyproc_command("run", PROCESS, ADDRESS, cwd=folder)
    assert (done.returncode, "SyntaxError" in done.stderr) == (1, True)
    (folder / "code" / "peaks.py").write_text("import not_installed_anywhere\n")
    done = lazyproc_command("plan", PROCESS, ADDRESS, cwd=folder)
    assert (done.returncode, "No module named 'not_installed_anywhere'" in done.stderr) == (1, True)


USAGE = [
    pytest.param(["code/peaks.py:Peeks", ADDRESS], "the processes there are ['Peaks']", id="no such class"),
    pytest.param(["code/peaks.py:NoProcess", ADDRESS], "expected a subclass of lazyproc.Process", id="no process"),
    pytest.param(["code/peeks.py:Peaks", ADDRESS], "code/peeks.py: there is no such file", id="no such file"),
    pytest.param(["peeks:Peaks", ADDRESS], "peeks: there is no such module", id="no such module"),
    pytest.param(["Peaks", ADDRESS], "expected module:Class", id="no module"),
    pytest.param([PROCESS, "scan.h5"], "expected FILE::DATASET", id="no dataset"),
    pytest.param([PROCESS, "scam.h5::/x"], "scam.h5: there is no such file", id="no such data"),
    pytest.param([PROCESS, ADDRESS, "-p", "width"], "expected name=value", id="no value"),
    pytest.param([PROCESS, ADDRESS, "-p", "width=1", "-p", "width=2"], "is given twice", id="twice"),
    pytest.param([PROCESS, ADDRESS, "--max-mem-mb", "much"], "max-mem-mb", id="no number"),
    pytest.param([PROCESS, ADDRESS, "--max-mem-mb", "0"], "'--max-mem-mb': 0 is not in the range x>=1", id="no memory"),
    pytest.param([PROCESS, ADDRESS, "--cores", "0"], "'--cores': 0 is not in the range x>=1", id="no cores"),
    pytest.param([PROCESS, ADDRESS, "--cores", "-1"], "'--cores': -1 is not in the range x>=1", id="fewer"),
    pytest.param([PROCESS, ADDRESS, "--max-failures", "9"], "without --on-error record", id="a limit of nothing"),
    pytest.param(
        [PROCESS, ADDRESS, "--max-failures", "9", "--on-error", "raise"], "without --on-error record", id="raise at 9"
    ),
    pytest.param([PROCESS, ADDRESS, "-p", "window=[1,2"], "window=[1,2: the value begins as a list", id="half a list"),
    pytest.param([PROCESS, ADDRESS, "--batch", "a"], "--batch: came without --override", id="batch alone"),
    pytest.param([PROCESS, ADDRESS, "--override", "--batch", "a\nb"], "a name of printable characters", id="no name"),
    pytest.param([PROCESS, ADDRESS, "--override", "--batch", "a" * 201], "a name of printable", id="long name"),
    pytest.param([PROCESS, ADDRESS, "-p", "window={[1]: 2}"], "and is none; expected JSON or Python", id="no dict"),
    pytest.param([PROCESS, ADDRESS, "-p", "window={1: a}"], "and is none; expected JSON or Python", id="half a dict"),
    pytest.param([PROCESS, ADDRESS, "-p", "sign='+"], """as a text: -p 'sign="'"'"'+"'""", id="half a text"),
    pytest.param([PROCESS], "FILE::DATASET", id="an argument missing"),
    pytest.param([PROCESS, ADDRESS, "--nonsense"], "--nonsense", id="no such option"),
]


@pytest.mark.parametrize("value", ["[1, 2.5", '{"a', "'+", '"+'])
def test_a_text_that_looks_like_something_else_is_given_as_the_message_says(folder, value):
    refused = lazyproc_command("run", PROCESS, ADDRESS, "-p", f"window={value}", cwd=folder)
    advised = shlex.split(refused.stderr.strip().rpartition(" -p ")[2])
    done = lazyproc_command("run", PROCESS, ADDRESS, "-p", *advised, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert lazyproc.open_results(done.stdout.strip()).attrs["window"] == value


@pytest.mark.parametrize(("words", "message"), USAGE)
def test_wrong_usage_exits_with_2(folder, words, message):
    done = lazyproc_command("run", *words, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


FAILED = [
    pytest.param([PROCESS, "scan.h5::/nothing"], "is not there; expected a dataset", id="no such dataset"),
    pytest.param([PROCESS, f"scan.h5::{CHANNEL}"], "is a group; expected a dataset", id="a group"),
    pytest.param([PROCESS, f"scan.h5::{CHANNEL}/Position_Values"], "not a USID Main dataset", id="not main"),
    pytest.param([PROCESS, "text.h5::/x"], "not an HDF5 file", id="not HDF5"),
    pytest.param([PROCESS, ADDRESS, "-p", "timestamp=1"], "this name is reserved", id="reserved name"),
    pytest.param([PROCESS, ADDRESS, "--target", "nowhere/out.h5"], "cannot be written, or does not exist", id="target"),
]


@pytest.mark.parametrize(("words", "message"), FAILED)
def test_what_cannot_be_done_exits_with_1(folder, words, message):
    (folder / "text.h5").write_text("nothing of the kind")
    before = sorted(os.listdir(folder)), (folder / "scan.h5").read_bytes()
    for command in ("run", "plan"):
        if command == "plan" and "--target" in words:
            continue
        done = lazyproc_command(command, *words, cwd=folder)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert (sorted(os.listdir(folder)), (folder / "scan.h5").read_bytes()) == before


UNWRITTEN = """
    import lazyproc


    class Nothing(lazyproc.Process):
        pass


    class Own(lazyproc.Process):
        def _create_results_datasets(self):
            raise NotImplementedError("of the class itself")
"""


@pytest.mark.parametrize("json_too", [False, True])
def test_a_class_that_says_nothing_is_told_what_to_write(folder, json_too):
    (folder / "unwritten.py").write_text(textwrap.dedent(UNWRITTEN))
    more = ["--json"] * json_too
    done = lazyproc_command("run", "unwritten.py:Nothing", ADDRESS, *more, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: _create_results_datasets: write it: ")
    assert "or declare outputs" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = lazyproc_command("run", "unwritten.py:Own", ADDRESS, *more, cwd=folder)
    assert (done.returncode, "Traceback" in done.stderr) == (1, True), "what the class raises is shown where it does"


# --- constructors of the user's own ----------------------------------------------------------------------------------

CONSTRUCTORS = """
    import lazyproc


    class Scaled(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8")}

        @staticmethod
        def _map_function(spectrum, scale=1, shift=0):
            return spectrum.mean() * scale + shift


    class Handing(Scaled):
        def __init__(self, h5_main, scale=1, **kwargs):
            lazyproc.Process.__init__(self, h5_main, "Handing", parms_dict={"scale": scale}, **kwargs)


    class Below(Handing):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)


    class Closed(Scaled):
        def __init__(self, h5_main, scale=1):
            super().__init__(h5_main, "Closed", parms_dict={"scale": scale})


    class OneCore(Scaled):
        def __init__(self, h5_main, **kwargs):
            super().__init__(h5_main, "OneCore", cores=1, **kwargs)


    class Needing(Scaled):
        def __init__(self, h5_main, scale, **kwargs):
            super().__init__(h5_main, "Needing", parms_dict={"scale": scale}, **kwargs)


    class Asking(Scaled):
        def __init__(self, h5_main, parms_dict, scale=0, **kwargs):
            super().__init__(h5_main, "Asking", {"scale": 1, **parms_dict}, **kwargs)


    class Wrong(Scaled):
        def __init__(self, h5_main, **kwargs):
            super().__init__(h5_main, **kwargs)
            len(5)
"""


@pytest.mark.parametrize(
    ("name", "words", "parameters"),
    [
        ("Handing", [], {"scale": 1}),
        ("Handing", ["-p", "scale=3", "--cores", "1", "--target", "out.h5"], {"scale": 3}),
        ("Below", ["-p", "scale=3"], {"scale": 3}),
        ("Closed", ["-p", "scale=3"], {"scale": 3}),
        ("OneCore", ["-p", "scale=3"], {"scale": 3}),
        ("OneCore", ["--max-mem-mb", "200"], {}),
        ("Needing", ["-p", "scale=3"], {"scale": 3}),
        ("Asking", [], {"scale": 1}),
        ("Asking", ["-p", "scale=3"], {"scale": 3}),
    ],
)
def test_parameters_go_to_a_constructor_that_makes_its_own_dict(folder, name, words, parameters):
    (folder / "own.py").write_text(textwrap.dedent(CONSTRUCTORS))
    plan = lazyproc_command("plan", f"own.py:{name}", ADDRESS, *words, cwd=folder)
    assert (plan.returncode, plan.stderr) == (0, "")
    done = lazyproc_command("run", f"own.py:{name}", ADDRESS, *words, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    results = lazyproc.open_results(done.stdout.strip())
    assert {key: results.attrs[key] for key in ("scale", "shift") if key in results.attrs} == parameters
    path, _, group = done.stdout.strip().partition("::")
    assert Path(path).name == ("out.h5" if "out.h5" in words else "scan.h5")
    with h5py.File(folder / "scan.h5") as file, h5py.File(path) as target:
        means = file[f"{CHANNEL}/Raw_Data"][()].mean(axis=1) * parameters.get("scale", 1)
        np.testing.assert_allclose(target[group]["Mean"][:, 0], means, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("Handing", ["-p", "shift=3"], "takes (h5_main, scale=1, **kwargs), and this came: -p shift=3 ("),
        ("Handing", ["-p", "cores=3"], "and this came: -p cores=3 ("),
        ("Closed", ["-p", "width=a", "-p", "scale=1"], "takes (h5_main, scale=1), and this came: -p width='a' ("),
        ("Closed", ["--cores", "2"], "this came: --cores (Closed.__init__() got an unexpected"),
        ("Closed", ["--target", "out.h5"], "this came: --target ("),
        ("OneCore", ["--cores", "2"], "this came: --cores ("),
        ("Needing", [], "missing 1 required positional argument: 'scale'). Expected what it takes; -p goes to scale."),
    ],
)
def test_a_constructor_that_does_not_take_what_came_is_named(folder, name, words, message):
    (folder / "own.py").write_text(textwrap.dedent(CONSTRUCTORS))
    before = sorted(os.listdir(folder))
    done = lazyproc_command("run", f"own.py:{name}", ADDRESS, *words, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Error: {name}: its constructor takes" in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(set(os.listdir(folder)) - {"__pycache__"}) == before


def test_an_error_within_a_constructor_is_shown_as_it_is(folder):
    (folder / "own.py").write_text(textwrap.dedent(CONSTRUCTORS))
    done = lazyproc_command("run", "own.py:Wrong", ADDRESS, cwd=folder)
    assert (done.returncode, "TypeError: object of type 'int' has no len()" in done.stderr) == (1, True)
    assert done.stderr.count("Traceback") == 1


# --- go on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [["--resume"], ["--override", "--resume"]], ids=" ".join)
def test_resume_goes_on_with_what_an_override_left(folder, both):
    counter = folder / "calls"
    words = ["run", PROCESS, ADDRESS, "-p", f"counter={counter}"]
    first = lazyproc_command(*words, "--resume", cwd=folder)
    assert (first.returncode, counter.stat().st_size) == (0, 100), "nothing is unfinished: as without it"
    assert lazyproc_command(*words, "--resume", cwd=folder).stdout == first.stdout
    afresh = lazyproc_command(*words, "--override", cwd=folder).stdout
    path, _, group = afresh.strip().partition("::")
    with h5py.File(path, "r+") as file:
        file[group]["completed_positions"][40:] = 0
    counter.unlink()
    assert lazyproc_command(*words, cwd=folder).stdout == first.stdout
    assert not counter.exists()
    for more, action, n_left in (([], "return", 0), (["--resume"], "resume", 60)):
        plan = json.loads(lazyproc_command("plan", *words[1:], *more, "--json", cwd=folder).stdout)
        assert (plan["action"], plan["n_remaining"]) == (action, n_left)
    resumed = lazyproc_command(*words, *both, cwd=folder)
    assert (resumed.returncode, resumed.stdout) == (0, afresh), resumed.stderr
    assert counter.stat().st_size == 60
    with h5py.File(path, "r") as file:
        assert file[group]["completed_positions"][()].all()
    last = lazyproc_command(*words, *both, cwd=folder)
    assert (last.stdout == afresh) == ("--override" not in both), "nothing is unfinished: as without --resume"


ROWS = """
    import lazyproc


    def work(row):
        with open("calls", "a") as calls:
            calls.write(".")
        return row.mean()


    class Declared(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8")}
        _map_function = staticmethod(work)


    class Hooks(lazyproc.Process):
        process_name = "Hooks"
        _map_function = staticmethod(work)

        def _create_results_datasets(self):
            parent = self.h5_main.parent
            number = sum(name.startswith("Raw_Data-Hooks") for name in parent)
            self.h5_results_grp = parent.create_group(f"Raw_Data-Hooks_{number:03d}")
            self.h5_results_grp.attrs["tool"] = "Hooks"
            self.h5_results_grp.create_dataset("Mean", (self.h5_main.shape[0], 1), "f8")
            self._get_existing_datasets()

        def _get_existing_datasets(self):
            self.means = self.h5_results_grp["Mean"]

        def _write_results_chunk(self):
            self.means[self._get_pixels_in_current_batch(), 0] = self._results
"""


@pytest.mark.parametrize("kind", ["declared", "hooks"])
def test_jobs_of_one_row_start_afresh_once_whatever_else_is_unfinished(folder, kind):
    (folder / "rows.py").write_text(textwrap.dedent(ROWS))
    words = ["run", f"rows.py:{kind.capitalize()}", ADDRESS, "--cores", "1", "--override"]
    path, groups = folder / "scan.h5", []

    def run(batch: str | None) -> tuple[str, bytes]:
        (folder / "calls").unlink(missing_ok=True)
        done = lazyproc_command(*words, *([] if batch is None else ["--batch", batch]), cwd=folder)
        assert done.returncode == 0, done.stderr
        group = done.stdout.strip().partition("::")[2]
        if group not in groups:
            groups.append(group)
        return group, (folder / "calls").read_bytes() if (folder / "calls").exists() else b""

    def undo(group: str, first: int) -> None:
        with h5py.File(path, "r+") as file:
            file[group]["completed_positions"][first:] = 0

    old, _ = run(None)
    undo(old, 30)  # of an older run, which shall not be gone on with
    first, calls = run("17")
    assert (first != old, len(calls)) == (True, 100)
    assert run("17") == (first, b""), "finished by the job before, which died then"
    undo(first, 60)
    assert run("17") == (first, b"." * 40)
    other, calls = run("18")
    assert (other not in (old, first), len(calls)) == (True, 100)
    with h5py.File(path, "r") as file:
        assert [int(file[name]["completed_positions"][()].sum()) for name in groups] == [30, 100, 100]


# --- plan, status, recover -------------------------------------------------------------------------------------------


def test_plan_as_text_and_as_json(folder):
    os.chmod(folder / "scan.h5", 0o444)
    content = (folder / "scan.h5").read_bytes()
    text = lazyproc_command("plan", PROCESS, ADDRESS, "-p", "width=3", cwd=folder)
    assert (text.returncode, text.stderr) == (0, "")
    assert "start afresh" in text.stdout
    assert "100 to compute of 100" in text.stdout
    plan = json.loads(lazyproc_command("plan", PROCESS, ADDRESS, "--json", cwd=folder).stdout)
    assert (plan["action"], plan["n_remaining"], plan["group"]) == ("start", 100, None)
    assert (folder / "scan.h5").read_bytes() == content
    assert sorted(os.listdir(folder)) == ["code", "scan.h5"]


def test_a_function_that_uses_what_only_this_process_has_is_done_here(folder):
    """A cache is pickled by the name of its module, which no other process can import."""
    (folder / "code" / "cached.py").write_text(
        "import functools, time, lazyproc\n"
        "@functools.lru_cache\n"
        "def factor(number): return 2.0\n"
        "class Cached(lazyproc.Process):\n"
        "    outputs = {'Value': lazyproc.Output('f8')}\n"
        "    @staticmethod\n"
        "    def _map_function(row):\n"
        "        time.sleep(0.02)\n"
        "        return factor(len(row)) * float(row.sum())\n"
    )
    done = lazyproc_command("run", "code/cached.py:Cached", ADDRESS, "--cores", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be loaded in worker processes") == 1
    with h5py.File(folder / "scan.h5") as file:
        expected = 2 * file[f"{CHANNEL}/Raw_Data"][()].sum(axis=1, keepdims=True, dtype="f8")
        np.testing.assert_allclose(file[f"{CHANNEL}/Raw_Data-Cached_000/Value"][()], expected, rtol=1e-5)


def test_a_function_that_exits_is_no_success(folder):
    (folder / "code" / "leaving.py").write_text(
        "import sys, lazyproc\n"
        "class Leaving(lazyproc.Process):\n"
        "    outputs = {'Value': lazyproc.Output('f8')}\n"
        "    @staticmethod\n"
        "    def _map_function(row):\n"
        "        sys.exit(0)\n"
    )
    done = lazyproc_command("run", "code/leaving.py:Leaving", ADDRESS, "--cores", "1", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert "has called sys.exit(0)" in done.stderr


@pytest.mark.parametrize("code", [None, 0, 3, "no"])
def test_a_file_that_exits_when_it_is_loaded_is_no_success(folder, code):
    (folder / "leaving.py").write_text(f"import sys\nsys.exit({code!r})\n")
    done = lazyproc_command("run", "leaving.py:Leaving", ADDRESS, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"leaving.py: has called sys.exit({code!r}) while it was loaded" in done.stderr


def test_a_job_script_is_written_over_nothing_but_by_force(folder):
    before = (folder / "scan.h5").read_bytes()
    done = lazyproc_command("slurm", "-o", "scan.h5", "--", "true", cwd=folder)
    assert done.returncode == 1
    assert "there is a file of this name already" in done.stderr
    assert (folder / "scan.h5").read_bytes() == before
    for more in ([], ["--force", "--time", "02:00:00"]):
        assert lazyproc_command("slurm", *more, "--", "true", cwd=folder).returncode == 0
    assert "02:00:00" in (folder / "lazyproc-job.sh").read_text()
    assert lazyproc_command("slurm", "--", "true", cwd=folder).returncode == 1


def test_a_job_script_is_there_as_a_whole_or_as_it_was(folder):
    """Half a script would be submitted; here no file may become larger than nothing."""
    script = folder / "job.sh"
    for before in (None, "an older one\n"):
        if before is not None:
            script.write_text(before)
        done = subprocess.run(
            ["bash", "-c", 'ulimit -f 0; trap "" XFSZ; exec "$@"', "bash", sys.executable, "-B", "-m", "lazyproc",
             "slurm", "-o", "job.sh", "--force", "--", "true"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "cannot be written (File too large)" in done.stderr
        assert (script.read_text() if script.exists() else None) == before
        assert [one.name for one in folder.iterdir() if one.name.startswith("job.sh")] == ["job.sh"] * script.exists()


def test_the_demo_leaves_a_scan_of_somebody_else_alone(folder):
    before = (folder / "scan.h5").read_bytes()
    done = lazyproc_command("demo", ".", cwd=folder)
    assert done.returncode == 1
    assert "was not made by a demo" in done.stderr
    assert (folder / "scan.h5").read_bytes() == before


def test_the_package_can_be_called(folder):
    done = subprocess.run(
        [sys.executable, "-m", "lazyproc", "status", "scan.h5"], cwd=folder, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "scan.h5: no results\n")


def test_status_as_text_and_as_json(folder):
    empty = lazyproc_command("status", "scan.h5", cwd=folder)
    assert (empty.returncode, empty.stdout) == (0, "scan.h5: no results\n")
    lazyproc_command("run", PROCESS, ADDRESS, cwd=folder)
    text = lazyproc_command("status", "scan.h5", cwd=folder).stdout
    assert f"{CHANNEL}/Raw_Data-Peak_Finding_000" in text
    assert "100.0%  100 of 100 positions, finished 20" in text
    state = json.loads(lazyproc_command("status", "scan.h5", "--json", cwd=folder).stdout)
    assert state["running"] is None
    (results,) = state["results"]
    assert (results["process"], results["n_done"], results["n_positions"]) == ("Peak_Finding", 100, 100)
    assert results["started"] <= results["finished"]
    with h5py.File(folder / "scan.h5", "r+"):
        assert lazyproc_command("status", "scan.h5", cwd=folder).stdout == text, "whoever has it open"
    missing = lazyproc_command("status", "scam.h5", cwd=folder)
    assert missing.returncode == 2
    (folder / "text.h5").write_text("nothing of the kind")
    assert lazyproc_command("status", "text.h5", cwd=folder).returncode == 1


@pytest.mark.parametrize("n_positions", [4096, 100])
def test_status_rounds_down_and_calls_finished_only_what_is_complete(folder, n_positions):
    n_rows = n_positions // 64 or 1
    path, name = make_usid_file(folder / "many.h5", n_rows=n_rows, n_cols=n_positions // n_rows, n_spectral=4)
    done = lazyproc_command("run", PROCESS, f"{path}::{name}", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "100.0%" in lazyproc_command("status", path, cwd=folder).stdout
    with h5py.File(path, "r+") as file:
        file[done.stdout.strip().partition("::")[2]]["completed_positions"][17] = 0
    text = lazyproc_command("status", path, cwd=folder).stdout
    assert (
        text.splitlines()[1].split()
        == {
            4096: ["99.9%", "4,095", "of", "4,096", "positions"],
            100: ["99.0%", "99", "of", "100", "positions"],
        }[n_positions]
    )
    (state,) = json.loads(lazyproc_command("status", path, "--json", cwd=folder).stdout)["results"]
    assert (state["n_done"], state["finished"]) == (n_positions - 1, "")


@pytest.mark.parametrize("json_too", [False, True])
def test_a_reader_that_ends_early_is_left_in_peace(folder, json_too):
    """As of ``lazyproc status scan.h5 | head -1``."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "status", "scan.h5", *["--json"] * json_too],
        cwd=folder,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_status_of_a_real_file_with_what_pyusid_left(tmp_path):
    shutil.copy(real_file("sparse_sampling.h5"), tmp_path / "sparse.h5")
    done = lazyproc_command("status", "sparse.h5", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    by_name = {one["group"].rpartition("_")[2]: one for one in json.loads(done.stdout)["results"]}
    assert len(by_name) == 12
    assert (by_name["009"]["process"], by_name["009"]["n_done"], by_name["009"]["n_positions"]) == (
        "Simple_Process",
        0,
        8,
    )
    assert by_name["008"]["problem"] == "holds neither a status mask nor a main dataset."


CUT_OFF = """
    import os, sys
    import lazyproc.hdf5.transaction
    from lazyproc.loading import load_process

    lazyproc.hdf5.transaction._finish = lambda *_: os._exit(9)  # dies with the journal written and not applied
    load_process(sys.argv[1])(sys.argv[2], cores=1).compute()
"""


def test_recover_settles_a_change_that_was_cut_off(folder):
    nothing = lazyproc_command("recover", "scan.h5", cwd=folder)
    assert (nothing.returncode, nothing.stdout) == (0, "scan.h5: nothing to recover\n")
    (folder / "cut_off.py").write_text(textwrap.dedent(CUT_OFF))
    died = subprocess.run([sys.executable, "cut_off.py", PROCESS, ADDRESS], cwd=folder, check=False)
    assert died.returncode == 9
    with h5py.File(folder / "scan.h5", "r") as file:
        assert "Raw_Data-Peak_Finding_000" not in file[CHANNEL]
    shown = json.loads(lazyproc_command("status", "scan.h5", "--json", cwd=folder).stdout)
    assert [one["n_done"] for one in shown["results"]] == [0], "shown as it will be"
    done = lazyproc_command("recover", "scan.h5", "--json", cwd=folder)
    assert json.loads(done.stdout) == {"path": "scan.h5", "recovered": True}
    with h5py.File(folder / "scan.h5", "r") as file:
        assert "Raw_Data-Peak_Finding_000" in file[CHANNEL]
    assert json.loads(lazyproc_command("recover", "scan.h5", "--json", cwd=folder).stdout)["recovered"] is False
    finished = lazyproc_command("run", PROCESS, ADDRESS, cwd=folder)
    assert finished.stdout.endswith("Raw_Data-Peak_Finding_000\n")
    np.testing.assert_allclose(stored_heights(finished.stdout.strip(), folder), expected_heights(folder), rtol=1e-6)
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []


@pytest.mark.parametrize("json_too", [False, True])
def test_recover_says_of_what_is_no_hdf5_file_that_it_is_none(folder, json_too):
    (folder / "text.h5").write_text("nothing of the kind")
    before = sorted(os.listdir(folder))
    done = lazyproc_command("recover", "text.h5", *["--json"] * json_too, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: text.h5: is no HDF5 file; expected one")
    assert sorted(os.listdir(folder)) == before


def test_recover_puts_right_what_is_no_hdf5_file_for_now(folder):
    """A journal lies beside a file whose head was hit."""
    (folder / "cut_off.py").write_text(textwrap.dedent(CUT_OFF))
    subprocess.run([sys.executable, "cut_off.py", PROCESS, ADDRESS], cwd=folder, check=False)
    with open(folder / "scan.h5", "r+b") as file:
        file.write(bytes(8))
    done = lazyproc_command("recover", "scan.h5", cwd=folder)
    assert (done.returncode, "settled" in done.stdout) == (0, True), done.stderr


def test_status_and_recover_take_an_address_for_its_file(folder):
    address = lazyproc_command("run", PROCESS, ADDRESS, cwd=folder).stdout.strip()
    for given in (address, ADDRESS):
        shown = lazyproc_command("status", given, cwd=folder)
        assert (shown.returncode, "100 of 100 positions" in shown.stdout) == (0, True), shown.stderr
        settled = lazyproc_command("recover", given, cwd=folder)
        assert (settled.returncode, settled.stdout) == (0, f"{given.partition('::')[0]}: nothing to recover\n")
    missing = lazyproc_command("status", "scam.h5::/x", cwd=folder)
    assert (missing.returncode, "'scam.h5' does not exist" in missing.stderr) == (2, True)
    os.rename(folder / "scan.h5", folder / "odd::name.h5")
    odd = lazyproc_command("status", "odd::name.h5", cwd=folder)
    assert "100 of 100 positions" in odd.stdout, "a file of that name goes first"


def test_status_tells_a_problem_and_when_it_was_finished(folder):
    group = lazyproc_command("run", PROCESS, ADDRESS, cwd=folder).stdout.strip().partition("::")[2]
    with h5py.File(folder / "scan.h5", "r+") as file:
        for name in ("Height", "Place"):
            del file[group][name]
    text = lazyproc_command("status", "scan.h5", cwd=folder).stdout
    assert "compute() passes it over. It was finished 20" in text
    assert ".," not in text


# --- slurm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["90", "90:30", "01:30:00", "2-12", "2-12:30", "2-12:30:00"])
def test_slurm_takes_the_times_that_slurm_takes(folder, time):
    done = lazyproc_command("slurm", "--time", time, "--", "true", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"#SBATCH --time={time}\n" in (folder / "lazyproc-job.sh").read_text()


SLURM_USAGE = [
    *(pytest.param(["--time", time], f"'{time}' is no time; expected minutes", id=f"time {time}") for time in (
        "bogus", "", "1h", "-5", "1:2:3:4", "1-", "1-2:3:4:5", "1.5", "٣"
    )),
    *(pytest.param([option, "0"], f"'{option}': 0 is not in the range x>=1", id=option) for option in (
        "--ntasks", "--cpus-per-task", "--drain", "--max-jobs"
    )),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), SLURM_USAGE)
def test_slurm_refuses_what_cannot_be(folder, words, message):
    done = lazyproc_command("slurm", *words, "--", "true", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())
    assert not (folder / "lazyproc-job.sh").exists()


def test_slurm_names_the_folder_that_is_not_there(folder):
    done = lazyproc_command("slurm", "-o", "nowhere/job.sh", "--", "true", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"job.sh: there is no folder {folder / 'nowhere'}; expected one that is there" in done.stderr
    done = lazyproc_command("slurm", "-o", "code", "--", "true", cwd=folder)
    assert (done.returncode, done.stderr.startswith(f"Error: -o {folder / 'code'}: cannot be written (")) == (1, True)


def test_help_and_version(tmp_path):
    text = lazyproc_command("--help", cwd=tmp_path).stdout
    assert all(command in text for command in ("demo", "run", "status", "plan", "recover", "75 stopped early"))
    assert lazyproc.__version__ in lazyproc_command("--version", cwd=tmp_path).stdout
    assert "module:Class, path/to/file.py:Class" in lazyproc_command("run", "-h", cwd=tmp_path).stdout
    assert lazyproc_command("jump", cwd=tmp_path).returncode == 2


# --- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, lazyproc_command("demo", "shown", "--json", cwd=folder)


def test_the_demo_stops_resumes_fits_and_draws(demo):
    folder, done = demo
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert sorted(os.listdir(folder / "shown")) == ["maps.png", "scan.h5"]
    assert (folder / "shown" / "maps.png").stat().st_size > 100_000
    assert 0.3 < summary["stopped_at"] < 0.95
    worst = {"Amplitude": 0.05, "Resonance": 0.001, "Quality": 0.08, "Phase": 0.06}
    assert set(summary["errors"]) == set(worst)
    for name, (median, most) in summary["errors"].items():
        assert 0 < median < worst[name]
        assert median < most
    for words in ("simulating a scan", "stopped early;", "goes on from there", "error against the truth", "maps.png"):
        assert words in done.stderr, "what a person reads is apart from the JSON"


def test_the_results_of_the_demo_are_complete_maps(demo):
    folder, done = demo
    path, _, group = json.loads(done.stdout)["results"].partition("::")
    maps = lazyproc.open_results(f"{folder / path}::{group}")
    assert dict(maps.sizes) == {"X": 96, "Y": 96}
    assert (maps["status"] == 1).all()
    assert np.isfinite(maps["Resonance"]).all()
    assert maps["Resonance"].attrs["units"] == "Hz"
    listed = lazyproc_command("status", "shown/scan.h5", cwd=folder).stdout
    assert "9,216 of 9,216 positions" in listed
