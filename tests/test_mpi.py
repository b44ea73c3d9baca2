"""The same script, and the same command, under mpiexec: results, exit codes, signals, deaths; and nothing hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from mpi_jobs import BIN, LAUNCHED, LIMIT, MPIEXEC, Ended, Job
from usid_files import CHANNEL, make_usid_file

GROUP = f"{CHANNEL}/Raw_Data-Total_000"
N_POSITIONS = 240

PROCESS = """
import lazyproc

class Total(lazyproc.Process):
    outputs = {"Total": lazyproc.Output("f8"), "Rank": lazyproc.Output("i4")}

    @staticmethod
    def _map_function(spectrum, wait=0.0, fails=-1, gate=""):
        import os, time
        time.sleep(wait)
        while gate and not os.path.exists(gate):
            time.sleep(0.01)
        if spectrum[0] == fails:
            raise ValueError("on purpose")
        return spectrum.sum(), int(os.environ.get("PMI_RANK", -1))
"""

SCRIPT = """
import json, os, sys
import lazyproc
from process import Total

asked = json.loads(sys.argv[1])
with lazyproc.cluster(timeout=asked.get("timeout")) as client:
    if "exit" in asked:
        sys.exit(asked["exit"])
    if "raise" in asked:
        raise ValueError(asked["raise"])
    with Total(asked["address"], parms_dict=asked.get("parms"), checkpoint_interval=0.1) as process:
        process.compute()
        comm = process.mpi_comm
        if comm is not None:
            comm.Barrier()
        found = {"size": process.mpi_size, "rank": process.mpi_rank, "comm": comm and comm.size}
    ranks = client.run(lambda: os.environ.get("PMI_RANK", ""))
    limits = [one["memory_limit"] for one in client.scheduler_info(n_workers=-1)["workers"].values()]
    threads = client.run(lambda: os.environ.get("OMP_NUM_THREADS", ""))
    found |= {"ranks": sorted(ranks.values()), "memory": limits, "threads": sorted(threads.values())}
print(json.dumps(found))
if "exit_after" in asked:
    sys.exit(asked["exit_after"])
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    (tmp_path / "script.py").write_text(SCRIPT)
    data = np.random.default_rng(5).random((N_POSITIONS, 8)).astype("f4")
    data[:, 0] = np.arange(N_POSITIONS)
    make_usid_file(tmp_path / "scan.h5", n_rows=12, n_cols=20, n_spectral=8, data=data)
    return tmp_path


@pytest.fixture
def start(folder):
    """Start the script, or any command, on a number of ranks; what still runs at the end of the test is killed."""
    jobs: list[Job] = []

    def starter(ranks: int | None, *command: object, environ: dict[str, str] | None = None, **asked: object) -> Job:
        if not command:
            address = f"{folder / 'scan.h5'}::{CHANNEL}/Raw_Data"
            command = (sys.executable, "script.py", json.dumps({"address": address, **asked}))
        jobs.append(Job(ranks, command, folder, environ))
        return jobs[-1]

    yield starter
    for job in jobs:
        job.kill()


def n_done(path: Path) -> int:
    try:
        with h5py.File(path, "r") as file:
            return int(file[f"{GROUP}/completed_positions"][()].sum()) if GROUP in file else 0
    except OSError:
        return 0  # just being created


def check_results(path: Path) -> np.ndarray:
    """Compare with a serial loop; return which rank did each position."""
    with h5py.File(path, "r") as file:
        expected = [row.sum() for row in file[f"{CHANNEL}/Raw_Data"]]
        assert np.array_equal(file[f"{GROUP}/Total"][:, 0], np.asarray(expected, "f8"))
        assert file[f"{GROUP}/completed_positions"][()].all()
        return file[f"{GROUP}/Rank"][:, 0]


def clean(ended: Ended) -> Ended:
    assert ended.code == 0, ended
    assert ended.err == [], ended
    assert not ended.left, ended
    return ended


# --- it works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_gives_the_results_of_a_serial_loop(folder, start, ranks):
    ended = clean(start(ranks, parms={"wait": 0.005}).end())
    done_by = check_results(folder / "scan.h5")
    assert len(ended.out) == 2, ended  # one line of ours, one of the script: the others have printed nothing
    found = json.loads(ended.out[1])
    if ranks == 1:
        assert (found["size"], found["comm"]) == (1, None)
        return
    said = LAUNCHED.fullmatch(ended.out[0])
    assert said, ended
    assert said[1] == str(ranks)
    assert (found["size"], found["rank"], found["comm"]) == (ranks, 0, 1)
    assert found["ranks"] == [str(rank) for rank in range(1, ranks)]
    assert set(done_by) >= {1, ranks - 1}
    from distributed.system import MEMORY_LIMIT

    assert found["memory"] == [MEMORY_LIMIT // ranks] * (ranks - 1)
    assert found["threads"] == [str(max(1, len(os.sched_getaffinity(0)) // ranks))] * (ranks - 1)


def test_the_same_command_line(folder, start):
    command = [BIN / "lazyproc", "run", "process.py:Total", f"scan.h5::{CHANNEL}/Raw_Data", "-p", "wait=0.002"]
    ended = clean(start(3, *command).end())
    assert len(ended.out) == 2, ended
    assert LAUNCHED.fullmatch(ended.out[0]), ended
    assert ended.out[1] == f"{folder / 'scan.h5'}::{GROUP}"
    check_results(folder / "scan.h5")
    ended = clean(start(2, *command, "--json").end())
    assert json.loads("".join(ended.out))["results"].endswith(GROUP)


BESIDE = """
import os
import lazyproc
from helper import total

class Total(lazyproc.Process):
    outputs = {"Total": lazyproc.Output("f8"), "Rank": lazyproc.Output("i4")}

    @staticmethod
    def _map_function(row):
        from helper import later
        return later(total(row)), int(os.environ.get("PMI_RANK", -1))
"""
HELPER = "def total(row):\n    return row.sum()\n\ndef later(value):\n    return value\n"


@pytest.fixture
def beside(folder):
    """A class in a folder where nobody works, with a module beside it."""
    (folder / "code").mkdir()
    (folder / "code" / "helper.py").write_text(HELPER)
    (folder / "code" / "peaks.py").write_text(BESIDE)
    return folder / "code"


@pytest.mark.parametrize("named", ["code/peaks.py:Total", "peaks:Total"])
def test_a_class_on_the_command_line_with_a_module_beside_it(folder, start, beside, named):
    if ":" in named and "/" not in named:  # of the folder where the command is given
        for name in ("helper.py", "peaks.py"):
            (beside / name).rename(folder / name)
    clean(start(3, BIN / "lazyproc", "run", named, f"scan.h5::{CHANNEL}/Raw_Data").end())
    assert set(check_results(folder / "scan.h5")) == {1, 2}


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_script_elsewhere_with_a_module_beside_it(folder, start, beside, ranks):
    address = f"{folder / 'scan.h5'}::{CHANNEL}/Raw_Data"
    run = f"with lazyproc.cluster(2) as client:\n    Total({address!r}).compute()\n"
    (beside / "script.py").write_text(BESIDE + run)
    clean(start(ranks, sys.executable, "code/script.py").end())
    check_results(folder / "scan.h5")


def test_one_process_speaks_for_all_where_the_command_line_is_wrong(folder, start):
    ended = start(3, BIN / "lazyproc", "run", "process.py:Total", "--nonsense").end()
    assert (ended.code, ended.out) == (2, []), ended
    assert sum("Error" in line for line in ended.err) == 1, ended


def test_a_script_that_uses_dask_mpi_itself(folder, start):
    (folder / "own.py").write_text(
        "from dask_mpi import initialize\n"
        "initialize(dashboard=False, worker_class='distributed.Worker', exit=True)\n"
        "import lazyproc\nfrom distributed import Client\nfrom process import Total\n"
        "with Client() as client, lazyproc.cluster() as same:\n"
        "    assert same is client\n"
        f"    process = Total('scan.h5::{CHANNEL}/Raw_Data')\n"
        "    process.compute()\n"
        "    print(process.mpi_size, process.mpi_rank, process.mpi_comm.size, flush=True)\n"
    )
    ended = start(3, sys.executable, "own.py").end()
    assert (ended.code, ended.out) == (0, ["3 0 1"]), ended
    check_results(folder / "scan.h5")


# --- it ends as the driver does --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "asked", "code", "last"),
    [
        (1, {"raise": "no"}, 1, "ValueError: no"),
        (2, {"exit": 3}, 3, ""),
        (3, {"raise": "no"}, 1, "ValueError: no"),
        (3, {"exit_after": 4}, 4, ""),
        (4, {"parms": {"fails": 200, "wait": 0.003}}, 1, "FunctionError"),
    ],
)
def test_the_exit_code_is_the_drivers(start, ranks, asked, code, last):
    ended = start(ranks, **asked).end()
    assert ended.code == code, ended
    assert not ended.left, ended
    text = "\n".join(ended.err)
    assert last in text, ended
    assert text.count("Traceback (most recent call last)") <= 2, ended  # the script's, and its cause
    assert bool(ended.err) == bool(last), ended


@pytest.mark.parametrize(("last", "code"), [("", 0), ("sys.exit(4)", 4)])
def test_an_exit_that_the_script_catches_is_not_that_of_the_job(folder, start, last, code):
    (folder / "caught.py").write_text(
        "import sys, lazyproc\n"
        "try:\n"
        "    with lazyproc.cluster() as client:\n"
        "        sys.exit(3)\n"
        "except SystemExit:\n"
        "    print('caught', flush=True)\n"
        f"{last}\n"
    )
    ended = start(3, sys.executable, "caught.py").end()
    assert (ended.code, ended.out[1:], ended.err) == (code, ["caught"], []), ended
    assert not ended.left, ended


def test_the_others_have_ended_when_the_driver_does(folder, start):
    """Some launchers end whoever is left once a process has ended with another code than 0."""
    (folder / "last.py").write_text(
        "import atexit, os, sys, time, lazyproc, psutil\n"
        "def look():\n"
        "    print([pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != 'zombie'])\n"
        "atexit.register(look)  # runs last, as it was registered first\n"
        "with lazyproc.cluster() as client:\n"
        "    pids = list(client.run(os.getpid).values())\n"
        "    sys.exit(75)\n"
    )
    ended = start(4, sys.executable, "last.py").end()
    assert (ended.code, ended.out[1:], ended.err) == (75, ["[]"], []), ended


def test_memory_is_kept_as_without_mpi(folder, start):
    (folder / "hungry.py").write_text(
        "import lazyproc, time\n"
        "import numpy as np\n"
        "class Hungry(lazyproc.Process):\n"
        "    outputs = {'Mean': lazyproc.Output('f8')}\n"
        "    @staticmethod\n"
        "    def _map_function(row):\n"
        "        time.sleep(0.02)\n"
        "        np.ones((300 if 140 < row[0] < 190 else 0) * 2**17)  # MiB, where the probe does not look\n"
        "        return row.mean()\n"
    )
    command = [BIN / "lazyproc", "run", "hungry.py:Hungry", f"scan.h5::{CHANNEL}/Raw_Data", "--max-mem-mb", 128]
    ended = start(3, *command).end()
    assert ended.code == 1, ended
    assert "where 4 were reckoned" in ended.err[0], ended
    assert "128 MiB are allowed, but Hungry was found to take" in ended.err[-1], ended


def test_functions_that_are_still_computing_do_not_hold_up_the_end(folder, start):
    (folder / "stuck.py").write_text(
        "import time, lazyproc\n"
        "with lazyproc.cluster() as client:\n"
        "    waiting = client.map(time.sleep, [300.0, 301.0, 302.0, 303.0])\n"
        "    time.sleep(0.5)\n"
        "    raise ValueError('no')\n"
    )
    ended = start(3, sys.executable, "stuck.py").end(LIMIT)
    assert ended.code == 1, ended
    assert not ended.left, ended
    assert ended.err[-1] == "ValueError: no", ended


def test_the_script_may_close_the_cluster_and_come_back(folder, start):
    (folder / "again.py").write_text(
        "import lazyproc, time\n"
        "for number in range(2):\n"
        "    with lazyproc.cluster() as client:\n"
        "        print(client.submit(abs, -number).result(), flush=True)\n"
        "        client.restart(timeout=60)\n"
        "client = None\n"
        "with lazyproc.cluster() as client:\n"
        "    print(client.submit(abs, -2).result(), flush=True)\n"
        "    client.shutdown()\n"
        "    time.sleep(1)\n"
    )
    ended = clean(start(3, sys.executable, "again.py").end())
    assert [line for line in ended.out if "dashboard" not in line] == ["0", "1", "2"], ended


def test_a_drain_ends_with_75_and_the_run_goes_on_with_other_ranks(folder, start):
    asked = {"parms": {"wait": 0.02}}
    job = start(3, **asked)
    job.wait_until(lambda: n_done(folder / "scan.h5") > 30, "the first commits")
    job.process.send_signal(signal.SIGTERM)
    ended = job.end()
    assert ended.code == 75, ended
    assert not ended.left, ended
    before = n_done(folder / "scan.h5")
    assert 30 < before < N_POSITIONS, ended
    clean(start(2, **asked).end())
    assert set(check_results(folder / "scan.h5")) == {1, 2}  # even what is tried beforehand is a worker's


# --- ranks die -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "afterwards"), [(2, 4), (0, None)])
def test_the_job_ends_with_a_rank_and_the_run_goes_on(folder, start, victim, afterwards):
    asked = {"parms": {"wait": 0.02}}
    job = start(3, **asked)
    job.wait_until(lambda: n_done(folder / "scan.h5") > 30, "the first commits")
    job.rank(victim).kill()
    ended = job.end()
    assert ended.code != 0, ended
    assert not ended.left, ended
    before = n_done(folder / "scan.h5")
    assert 30 < before < N_POSITIONS
    ended = clean(start(afterwards, **asked).end())  # without mpiexec: the same script on local processes
    check_results(folder / "scan.h5")
    if afterwards is None:
        assert json.loads(ended.out[-1])["size"] == 1


def test_nothing_is_left_of_a_job_whose_mpiexec_is_killed(folder, start):
    job = start(3, parms={"wait": 0.02})
    job.wait_until(lambda: n_done(folder / "scan.h5") > 30, "the first commits")
    job.process.kill()
    assert not job.end().left
    assert n_done(folder / "scan.h5") < N_POSITIONS


def test_a_crash_in_native_code_ends_the_job(folder, start):
    (folder / "crash.py").write_text(
        "import os, signal, lazyproc\n"
        "with lazyproc.cluster() as client:\n"
        "    client.submit(lambda: os.kill(os.getpid(), signal.SIGSEGV)).result()\n"
    )
    ended = start(3, sys.executable, "crash.py").end()
    assert ended.code != 0, ended
    assert not ended.left, ended


@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_never_comes_is_not_waited_for_without_end(folder, start, missing):
    (folder / "missing.py").write_text(
        "import os, sys, lazyproc\n"
        f"if os.environ['PMI_RANK'] == '{missing}':\n"
        "    from mpi4py import MPI\n"
        "    import time\n"
        "    time.sleep(300)\n"
        "with lazyproc.cluster(timeout=3) as client:\n"
        "    pass\n"
    )
    ended = start(3, sys.executable, "missing.py").end()
    assert ended.code != 0, ended
    assert not ended.left, ended
    assert any("cluster()" in line for line in ended.err), ended


# --- two at once -----------------------------------------------------------------------------------------------------


def test_two_jobs_at_once(folder, start):
    shutil.copy(folder / "scan.h5", folder / "other.h5")
    gate = folder / "gate"
    command = [BIN / "lazyproc", "run", "process.py:Total", "-p", f"gate={gate}"]
    first = start(3, *command, f"scan.h5::{CHANNEL}/Raw_Data")
    first.wait_until(lambda: (folder / ".scan.h5.lazyproc-lock").exists(), "the lock")
    elsewhere = start(2, *command, f"other.h5::{CHANNEL}/Raw_Data")
    refused = start(2, *command, f"scan.h5::{CHANNEL}/Raw_Data").end()
    assert refused.code == 1, refused
    assert not refused.left, refused
    assert len(refused.err) == 1, refused
    assert "another run is computing into this file" in refused.err[0]
    gate.touch()
    clean(first.end())
    clean(elsewhere.end())
    check_results(folder / "scan.h5")
    check_results(folder / "other.h5")


# --- a launcher that does not belong to the library ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"PMI_SIZE": "3", "PMI_RANK": "{}"}, "3 processes were launched, but for the MPI library"),
        ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "{}"}, "srun has started 3 processes that know nothing"),
    ],
)
def test_a_launcher_that_mpi_knows_nothing_of_is_refused(start, environ, says):
    command = (sys.executable, "-W", "ignore", "-c", "import lazyproc\nwith lazyproc.cluster(): print('on my own')")
    first, second = (
        start(None, *command, environ={name: value.format(rank) for name, value in environ.items()}) for rank in (0, 1)
    )
    ended = first.end()
    assert (ended.code, ended.out) == (1, []), ended
    assert says in ended.err[-1], ended
    ended = second.end()
    assert (ended.code, ended.out, ended.err) == (0, [], []), ended


# --- several machines, played by namespaces --------------------------------------------------------------------------


def on_another_machine(folder: Path, *, overlay: bool) -> list[object]:
    """Return what puts a command on a machine of another name; with `overlay` one that writes to a copy of its own."""
    over = folder.parent / f"over_{folder.name}"
    over.mkdir()
    layers = f"lowerdir={folder},upperdir={over}/u,workdir={over}/w"
    mount = (
        f"mount -t tmpfs none {over} && mkdir {over}/u {over}/w && "
        f"mount -t overlay overlay -o {layers} {folder} && cd {folder}"
    )
    shell = folder / "elsewhere.sh"
    shell.write_text(f'hostname elsewhere && {mount if overlay else "true"} && exec "$@"\n')
    for unshare in (["unshare", "-mu"], ["unshare", "-mUru"]):
        if _can([*unshare, "sh", shell, "true"]):
            return [*unshare, "sh", shell]
    pytest.skip("this system does not let us play another machine (unshare, mount)")


def _can(command: list[object]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("overlay", [False, True])
def test_workers_elsewhere_write_in_place_if_all_see_the_same_file(folder, start, overlay):
    elsewhere = on_another_machine(folder, overlay=overlay)
    script = [sys.executable, "script.py"]
    asked = json.dumps({"address": f"{folder / 'scan.h5'}::{CHANNEL}/Raw_Data", "parms": {"wait": 0.003}})
    ended = start(2, *script, asked, ":", "-n", 2, *elsewhere, *script, asked).end()
    assert ended.code == 0, ended
    said = LAUNCHED.fullmatch(ended.out[0])
    assert said, ended
    assert said[2] == "2"
    assert set(check_results(folder / "scan.h5")) >= {1, 2, 3}
    if overlay:
        assert len(ended.err) == 1, ended
        assert "results travel to the driver, which writes them: elsewhere: " in ended.err[0]
    else:
        assert ended.err == []
    assert not list(folder.glob(".scan.h5.*")), "something was left behind"


# --- without a launcher ----------------------------------------------------------------------------------------------


def test_local_processes_need_no_guard_and_leave_with_a_killed_driver(folder, start):
    job = start(None, parms={"wait": 0.02})
    job.wait_until(lambda: n_done(folder / "scan.h5") > 30, "the first commits")
    job.process.kill()
    assert not job.end().left
    ended = clean(start(None, parms={"wait": 0.02}).end())
    assert "dashboard at http://127.0.0.1:" in ended.out[0]
    assert len(ended.out) == 2
    check_results(folder / "scan.h5")


def test_a_scheduler_that_is_configured_is_used_and_left_alone(folder, start, beside):
    (folder / "scheduler.py").write_text(
        "import time, distributed\n"
        "if __name__ == '__main__':\n"
        "    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=':0') as cluster:\n"
        "        open('address', 'w').write(cluster.scheduler_address + '\\n')\n"
        "        time.sleep(600)\n"
    )
    existing = start(None, sys.executable, "scheduler.py")
    existing.wait_until(lambda: (folder / "address").exists() and bool((folder / "address").read_text()), "a scheduler")
    address = (folder / "address").read_text().strip()
    for _ in range(2):
        ended = clean(start(None, environ={"DASK_SCHEDULER_ADDRESS": address}).end())
        assert json.loads(ended.out[-1])["ranks"] == ["", ""]
    check_results(folder / "scan.h5")
    with h5py.File(folder / "scan.h5", "r+") as file:
        del file[GROUP]
    command = [BIN / "lazyproc", "run", "code/peaks.py:Total", f"scan.h5::{CHANNEL}/Raw_Data"]
    clean(start(None, *command, "--scheduler", address).end())
    check_results(folder / "scan.h5")
    assert existing.process.poll() is None


def test_the_environment_has_its_own_mpiexec():
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, check=True)
    assert "HYDRA" in version.stdout
