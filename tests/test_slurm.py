"""Job scripts for Slurm; and, where asked for, on a real one-node Slurm from Debian's packages.

LAZYPROC_TEST_SLURM=1 runs the second part, as root: it needs `apt-get install slurm-wlm munge` and starts both daemons
with settings of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from usid_files import CHANNEL, make_usid_file

from lazyproc.cli import main
from lazyproc.core.errors import ArgumentValueError
from lazyproc.slurm import SlurmJob

# -- the script, with a shell and a stand-in for nothing but sbatch's name on PATH ------------------------------------


@dataclass
class Shell:
    """A folder with an ``sbatch`` that writes down how it was called."""

    folder: Path

    def start(
        self, command: list[str], environ: dict[str, str] | None = None, **options: object
    ) -> subprocess.Popen[str]:
        script = self.folder / "job.sh"
        script.write_text(SlurmJob(tuple(command), str(script), **options).script())  # type: ignore[arg-type]
        sbatch = self.folder / "bin" / "sbatch"
        sbatch.parent.mkdir(exist_ok=True)
        sbatch.write_text(f'#!/bin/sh\necho "$LAZYPROC_JOB $LAZYPROC_BATCH $@" >> {self.folder}/submitted\n')
        sbatch.chmod(0o755)
        environment = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        environment |= environ or {}
        pipe = subprocess.PIPE
        return subprocess.Popen(["bash", str(script)], env=environment, stdout=pipe, stderr=pipe, text=True)

    def submitted(self) -> list[str]:
        path = self.folder / "submitted"
        return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", [0, 1, 3, 75])
def test_exit_code_decides(tmp_path: Path, code: int) -> None:
    shell = Shell(tmp_path)
    process = shell.start(["sh", "-c", f"exit {code}"])
    process.communicate(timeout=60)
    again = code == 75
    assert process.returncode == (0 if again else code)
    assert len(shell.submitted()) == again
    if again:
        assert shell.submitted()[0] == f"2 slurm-7 --export=ALL --dependency=afterany:7 {tmp_path}/job.sh"


def test_number_of_jobs_is_limited(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    process = shell.start(["sh", "-c", "exit 75"], max_jobs=1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "work left" in errors
    assert not shell.submitted()


def test_by_hand_an_override_goes_on_where_it_was(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    command = [stand_in(tmp_path), "run", "--override"]
    process = shell.start(command, {"LAZYPROC_JOB": "3", "LAZYPROC_BATCH": "5"}, max_jobs=3)
    _, errors = process.communicate(timeout=60)
    told = errors.partition("submit again with: ")[2].strip()
    assert told == f"sbatch --export=ALL,LAZYPROC_JOB=2,LAZYPROC_BATCH=5 {tmp_path}/job.sh"
    assert not shell.submitted()


def test_a_command_that_is_not_there_ends_with_127(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    _, errors = (process := shell.start(["no_such_command"])).communicate(timeout=60)
    assert process.returncode == 127
    assert len(errors.splitlines()) == 1, errors
    assert "no_such_command" in errors
    assert not shell.submitted()


def wait_for_line(process: subprocess.Popen[str], line: str, stream: Any = None) -> None:
    stream = stream or process.stdout
    while line not in (read := stream.readline()):
        assert read or process.poll() is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_a_command_that_the_signal_ends_is_submitted_again(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Before lazyproc is there to take it, nothing is under way. SIGTERM is that of `scancel`, though."""
    shell = Shell(tmp_path)
    process = shell.start([sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"])
    wait_for_line(process, "ready")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert len(shell.submitted()) == (code == 0)


def test_a_command_that_ends_itself_so_is_not(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    process = shell.start(["sh", "-c", "kill -USR1 $$"])
    process.communicate(timeout=60)
    assert process.returncode == 138
    assert not shell.submitted()


GAP = """
import sys, time
import lazyproc
with lazyproc.cluster(1) as client:
    sys.path.insert(0, sys.argv[2])
    from slow import Slow
    with Slow(sys.argv[1], parms_dict={"seconds": 0.0}) as process:
        process.compute()
    try:
        print("between", flush=True)
        time.sleep(60)
    finally:
        print("closed", flush=True)
print("not to be seen", flush=True)
"""


def test_a_signal_between_two_runs_leaves_the_script_in_order(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    address, data = make_scan(tmp_path)
    (tmp_path / "gap.py").write_text(GAP)
    process = shell.start([sys.executable, str(tmp_path / "gap.py"), address, str(tmp_path)])
    wait_for_line(process, "between")
    process.send_signal(signal.SIGUSR1)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.splitlines() == ["closed"], "what is open is closed, and nothing else is done"
    assert errors.splitlines() == [
        "stopped while no blocks were computed; what was finished before is kept. Run again."
    ]
    assert len(shell.submitted()) == 1
    check(tmp_path, data)


@pytest.mark.parametrize(("given", "cores"), [({}, "1"), ({"SLURM_CPUS_PER_TASK": "6"}, "6")])
def test_threads_are_the_cores_of_a_rank(tmp_path: Path, given: dict[str, str], cores: str) -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    environ = {**dict.fromkeys(names, "99"), **given}
    shell = Shell(tmp_path)
    process = shell.start(["sh", "-c", "echo threads " + " ".join(f"${name}" for name in names)], environ)
    out, errors = process.communicate(timeout=60)
    assert out.splitlines()[-1] == f"threads {cores} {cores} {cores} {cores}", errors


@pytest.mark.parametrize("launcher", ["srun", "mpiexec"])
def test_srun_is_told_once_more_how_many_cores_a_rank_has(tmp_path: Path, launcher: str) -> None:
    """As srun wants it since 22.05; mpiexec starts one process a machine by srun, which is to have all of its cores."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / launcher
    stand_in.write_text('#!/bin/sh\necho "started with ${SRUN_CPUS_PER_TASK:-nothing}: $*"\n')
    stand_in.chmod(0o755)
    shell = Shell(tmp_path)
    process = shell.start(["true"], {"SLURM_CPUS_PER_TASK": "6"}, ntasks=4, cpus_per_task=6, launcher=launcher)
    out, errors = process.communicate(timeout=60)
    started = {"srun": "started with 6: --mpi=pmi2 true", "mpiexec": "started with nothing: true"}
    assert out.splitlines()[-1] == started[launcher], errors


PATIENT = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *a: (time.sleep(0.5), sys.exit(75)))
print("ready", flush=True)
time.sleep(60)
"""


def test_signal_is_handed_on_and_the_end_waited_for(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    (tmp_path / "patient.py").write_text(PATIENT)
    process = shell.start([sys.executable, str(tmp_path / "patient.py")])
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(shell.submitted()) == 1


TERMINATED = PATIENT.replace("SIGUSR1", "SIGTERM")


@pytest.mark.parametrize(("state", "again"), [("JobState=COMPLETING Reason=None", 0), ("Reason=TimeLimit", 1)])
def test_a_job_that_is_ended_from_outside_is_not_submitted_again(tmp_path: Path, state: str, again: int) -> None:
    """By scancel, or scontrol requeue, or to make room; the wall time itself is no reason to stay away."""
    shell = Shell(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$*: {state}"\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    (tmp_path / "patient.py").write_text(TERMINATED)
    process = shell.start([sys.executable, str(tmp_path / "patient.py")])
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (0 if again else 75)
    assert len(shell.submitted()) == again
    assert ("ended by SIGTERM with work left" in errors) == (not again)


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to the command, and to the shell, which hands it on: what is under way is finished."""
    shell = Shell(tmp_path)
    address, _ = make_scan(tmp_path)
    parameters = ["-p", "seconds=0.3", "--cores", "2", "--verbose"]
    command = [sys.executable, "-m", "lazyproc.cli", "run", f"{tmp_path}/slow.py:Slow", address, *parameters]
    process = shell.start(command)
    assert process.stderr is not None
    while "positions in" not in (line := process.stderr.readline()):
        assert line
    time.sleep(1.0)
    (ours,) = psutil.Process(process.pid).children()
    ours.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "stopped early" in errors
    assert "leaving at once" not in errors
    assert not shell.submitted()


def test_command_line_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    options = ["slurm", "-o", str(path), "--ntasks", "4", "--time", "02:00:00", "--sbatch", "--partition=long"]
    result = CliRunner().invoke(main, [*options, "--", "lazyproc", "run", "a.py:B", "my file.h5::/data"])
    assert result.exit_code == 0, result.output
    text = path.read_text()
    assert "#SBATCH --ntasks=4\n" in text
    assert "#SBATCH --time=02:00:00\n" in text
    assert "#SBATCH --partition=long\n" in text
    assert "srun --mpi=pmi2 lazyproc run a.py:B 'my file.h5::/data' &" in text
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("environ", "batch"),
    [
        ({}, "slurm-7"),
        ({"SLURM_CLUSTER_NAME": "one"}, "one-7"),
        ({"LAZYPROC_BATCH": "of another row"}, "slurm-7"),
        ({"SLURM_RESTART_COUNT": "2"}, "slurm-7"),
        ({"LAZYPROC_JOB": "2"}, "slurm-7"),
        ({"LAZYPROC_JOB": "2", "LAZYPROC_BATCH": "one-5"}, "one-5"),
        ({"LAZYPROC_JOB": "2", "LAZYPROC_BATCH": "one-5", "SLURM_RESTART_COUNT": "1"}, "one-5"),
    ],
)
def test_all_jobs_of_a_row_are_told_which_was_the_first(tmp_path: Path, environ: dict[str, str], batch: str) -> None:
    """So that `--override` starts afresh in the first one only: see test_cli."""
    shell = Shell(tmp_path)
    command = [stand_in(tmp_path), "run", "a.py:B", "my file.h5::/data", "--override", "--cores", "2"]
    process = shell.start(command, environ)
    out, errors = process.communicate(timeout=60)
    words = [line.removeprefix("word ") for line in out.splitlines() if line.startswith("word ")]
    assert words == ["run", "a.py:B", "my file.h5::/data", "--override", "--batch", batch, "--cores", "2"], errors
    assert [line.split()[:2] for line in shell.submitted()] == [[str(int(environ.get("LAZYPROC_JOB", 1)) + 1), batch]]


def stand_in(folder: Path) -> str:
    """Make a command that says how it was called, and wants to go on."""
    path = folder / "bin" / "lazyproc"
    path.parent.mkdir(exist_ok=True)
    path.write_text('#!/bin/sh\nfor word; do echo "word $word"; done\nexit 75\n')
    path.chmod(0o755)
    return str(path)


def test_only_an_override_of_lazyproc_run_is_of_a_batch(tmp_path: Path) -> None:
    own = SlurmJob(("python", "script.py", "run", "--override"), str(tmp_path / "job.sh")).script()
    assert "\npython script.py run --override &\n" in own
    plain = SlurmJob(("lazyproc", "run", "a.py:B", "f.h5::/data"), str(tmp_path / "job.sh")).script()
    assert "--batch" not in own + plain
    module = SlurmJob(("python", "-m", "lazyproc.cli", "run", "a.py:B", "f.h5::/x", "--override"), "/job.sh").script()
    assert '\npython -m lazyproc.cli run a.py:B f.h5::/x --override --batch "$LAZYPROC_BATCH" &\n' in module


@pytest.mark.parametrize(
    ("time", "seconds", "is_refused"),
    [
        ("00:02:00", 120, True),
        ("00:02:00", 119, False),
        ("2", 120, True),
        ("2:01", 120, False),
        ("1-0", 86_400, True),
        ("1-0:0:1", 86_400, False),
        ("0", 120, False),
        ("as long as it takes", 120, False),
    ],
)
def test_a_job_that_would_be_told_to_stop_as_it_begins_is_refused(time: str, seconds: int, is_refused: bool) -> None:
    with pytest.raises(ArgumentValueError, match="drain_seconds: is") if is_refused else nullcontext():
        SlurmJob(("lazyproc", "run", "a.py:B", "f.h5::/data"), "/job.sh", time=time, drain_seconds=seconds).script()


def test_the_recipe_for_lsf_ends_with_the_code_of_the_command(tmp_path: Path) -> None:
    """LSF signals all processes of the job, and so the shell, too."""
    text = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text()
    (recipe,) = (part for part in text.split("```bash\n") if "#BSUB" in part)
    (tmp_path / "job.sh").write_text(recipe.partition("```")[0])
    (tmp_path / "patient.py").write_text(PATIENT)
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'patient.py'}\n")
    mpiexec.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["bash", str(tmp_path / "job.sh")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for_line(process, "ready")
        os.killpg(process.pid, signal.SIGUSR1)
        assert process.wait(60) == 75


@pytest.mark.parametrize(
    ("name", "value"),
    [("ntasks", 0), ("drain_seconds", 0), ("launcher", "prun"), ("time", "1\n2"), ("command", ())],
)
def test_nonsense_is_refused(name: str, value: object) -> None:
    options = {"command": ("true",), "path": "/job.sh", name: value}
    with pytest.raises(ArgumentValueError, match="line break" if name == "time" else name):
        SlurmJob(**options)  # type: ignore[arg-type]


# -- a real Slurm ----------------------------------------------------------------------------------------------------

on_demand = pytest.mark.skipif(
    os.environ.get("LAZYPROC_TEST_SLURM") != "1",
    reason="runs on demand: LAZYPROC_TEST_SLURM=1, as root, with slurm-wlm and munge from Debian's packages",
)

CONFIG = """
ClusterName=lazyproc
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=pmi2
DefMemPerCPU=100
KillWait=30
OverTimeLimit=0
MinJobAge=300
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """A one-node Slurm with everything of it in one folder."""

    folder: Path

    def call(self, *command: str) -> str:
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait(self, reached: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.5)

    def idle(self) -> bool:
        return not self.call("squeue", "-h")

    def logs(self) -> str:
        found = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in found)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    assert not missing, f"{missing}: install slurm-wlm and munge"
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=[free_port(), free_port()]))
    files = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    files += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = []
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    try:
        for command in (["munged", "-F", "--force", *files], ["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
            with open(folder / f"{command[0]}.start.log", "w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1.0)
        cluster = Slurm(folder)
        cluster.wait(lambda: "idle" in cluster.call("sinfo", "-h", "-o", "%t"), 60)
        yield cluster
        cluster.call("scancel", "--full", "--user=root")
        cluster.wait(cluster.idle, 60)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


PROCESS = """
import time
import lazyproc


class Slow(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row, seconds=0.05):
        time.sleep(seconds)
        return row.mean()
"""


def make_scan(folder: Path) -> tuple[str, np.ndarray]:
    data = np.random.default_rng(1).standard_normal((600, 8))
    make_usid_file(folder / "scan.h5", n_rows=20, n_cols=30, n_spectral=8, data=data)
    (folder / "slow.py").write_text(PROCESS)
    return f"{folder}/scan.h5::{CHANNEL}/Raw_Data", data


def check(folder: Path, data: np.ndarray) -> None:
    with h5py.File(folder / "scan.h5") as file:
        (name,) = (name for name in file[CHANNEL] if name.startswith("Raw_Data-Slow"))
        group = file[CHANNEL][name]
        assert group["completed_positions"][:].all()
        assert (group["Mean"][:, 0] == data.mean(axis=1)).all()


def lazyproc_command() -> str:
    return str(Path(sys.executable).with_name("lazyproc"))


@on_demand
@pytest.mark.parametrize("launcher", ["srun", "mpiexec"])
def test_ranks_in_one_job(slurm: Slurm, tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address, data = make_scan(tmp_path)
    script = tmp_path / "job.sh"
    command = (lazyproc_command(), "run", f"{tmp_path}/slow.py:Slow", address)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    job = SlurmJob(command, str(script), ntasks=4, launcher=launcher, options=(f"--output={slurm.folder}/%j.out",))
    script.write_text(job.script())
    slurm.call("sbatch", str(script))
    slurm.wait(slurm.idle)
    check(tmp_path, data)


@on_demand
@pytest.mark.parametrize("ntasks", [1, 4])
def test_job_drains_before_the_wall_time_and_submits_itself_again(
    slurm: Slurm, tmp_path: Path, ntasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, data = make_scan(tmp_path)
    script = tmp_path / "job.sh"
    seconds = 0.3 * max(1, ntasks - 1)  # 180 s of work for two minutes of wall time
    command = (
        lazyproc_command(),
        "run",
        f"{tmp_path}/slow.py:Slow",
        address,
        "-p",
        f"seconds={seconds}",
        "--cores",
        "1",
    )
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    output = f"--output={slurm.folder}/drain-{ntasks}.out"
    job = SlurmJob(command, str(script), ntasks=ntasks, time="00:02:00", drain_seconds=30, options=(output,))
    script.write_text(job.script())
    slurm.call("sbatch", str(script))
    slurm.wait(slurm.idle, 600)
    check(tmp_path, data)
    text = (slurm.folder / f"drain-{ntasks}.out").read_text()
    assert text.count("in a row") >= 2, text
    assert "CANCELLED" not in text, text


@on_demand
@pytest.mark.parametrize("ntasks", [1, 4])
def test_an_override_starts_afresh_in_the_first_job_only(
    slurm: Slurm, tmp_path: Path, ntasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves what was unfinished before as it is."""
    address, data = make_scan(tmp_path)
    script, output = tmp_path / "job.sh", tmp_path / "job.out"
    parameters = ("-p", f"seconds={0.05 * max(1, ntasks - 1)}", "--cores", "1", "--verbose")
    command = (lazyproc_command(), "run", f"{tmp_path}/slow.py:Slow", address, *parameters)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as before:
        wait_for_line(before, "positions in", before.stderr)
        before.send_signal(signal.SIGUSR1)
        before.communicate(timeout=60)
    assert before.returncode == 75
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    options = (f"--output={output}",)
    job = SlurmJob((*command, "--override"), str(script), ntasks=ntasks, launcher="srun", options=options)
    script.write_text(job.script())
    number = slurm.call("sbatch", "--parsable", str(script)).strip()
    slurm.wait(lambda: output.exists() and "positions in" in output.read_text())
    time.sleep(2)
    slurm.call("scancel", "--signal=USR1", "--batch", number)
    slurm.wait(lambda: "number 2 in a row" in output.read_text(), 120)
    slurm.wait(slurm.idle, 120)
    with h5py.File(tmp_path / "scan.h5") as file:
        first, second = (file[CHANNEL][name] for name in file[CHANNEL] if name.startswith("Raw_Data-Slow"))
        assert 0 < first["completed_positions"][:].sum() < 600
        assert second.attrs["lazyproc_batch"].endswith(f"-{number}")
        assert second["completed_positions"][:].all()
        assert (second["Mean"][:, 0] == data.mean(axis=1)).all()
    assert output.read_text().count("in a row") == 2, output.read_text()


CANCELS = (("scancel",), ("scancel", "--full"), ("scontrol", "requeue"))


@on_demand
@pytest.mark.parametrize("how", CANCELS, ids=" ".join)
@pytest.mark.parametrize(("ntasks", "launcher"), [(1, "srun"), (4, "srun"), (4, "mpiexec")])
def test_a_job_that_is_cancelled_stays_away(
    slurm: Slurm, tmp_path: Path, ntasks: int, launcher: str, how: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way is finished; one that is queued again is there under its old number only."""
    address, _ = make_scan(tmp_path)
    script, output = tmp_path / "job.sh", tmp_path / "job.out"
    parameters = ("-p", "seconds=0.3", "--cores", "1", "--verbose")
    command = (lazyproc_command(), "run", f"{tmp_path}/slow.py:Slow", address, *parameters)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    job = SlurmJob(command, str(script), ntasks=ntasks, launcher=launcher, options=(f"--output={output}",))
    script.write_text(job.script())
    number = slurm.call("sbatch", "--parsable", str(script)).strip()
    slurm.wait(lambda: output.exists() and "positions in" in output.read_text())
    time.sleep(2)
    slurm.call(*how, number)
    slurm.wait(lambda: "submit again with" in output.read_text(), 60)
    assert {line.split()[0] for line in slurm.call("squeue", "-h").splitlines()} <= {number}
    text = output.read_text()
    assert "stopped early" in text, text
    assert "leaving at once" not in text, text
    if how[0] == "scontrol":
        slurm.wait(lambda: "PD" in slurm.call("squeue", "-h", "-o", "%t"), 60)  # for two minutes
        slurm.call("scancel", number)
    slurm.wait(slurm.idle, 60)
    assert output.read_text().count("in a row") == 1, output.read_text()


JOBQUEUE = """
import logging, sys
import h5py, lazyproc
from dask_jobqueue import SLURMCluster
from distributed import Client

sys.path.insert(0, sys.argv[2])
from slow import Slow

cluster = SLURMCluster(
    cores=1, processes=1, memory="1GB", walltime="00:10:00", interface="lo",
    job_extra_directives=["--output=/dev/null"],
    scheduler_options={"dashboard_address": ":0"},
)
logging.getLogger("lazyproc").addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("lazyproc").setLevel(logging.INFO)
with cluster, Client(cluster) as client:
    if sys.argv[3] == "scale":
        cluster.scale(jobs=2)
        client.wait_for_workers(2, timeout=120)
    else:
        cluster.adapt(maximum_jobs=2)
    with Slow(sys.argv[1], client=client) as process:
        process.compute()
"""


@on_demand
@pytest.mark.parametrize("how", ["scale", "adapt"])
def test_dask_jobqueue(slurm: Slurm, tmp_path: Path, how: str) -> None:
    pytest.importorskip("dask_jobqueue")
    address, data = make_scan(tmp_path)
    (tmp_path / "jobqueue.py").write_text(JOBQUEUE)
    environment = {**os.environ, "SLURM_CONF": str(slurm.folder / "slurm.conf")}
    command = [sys.executable, str(tmp_path / "jobqueue.py"), address, str(tmp_path), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr + slurm.logs()
    said = "in Dask cluster, 2 threads" if how == "scale" else "the cluster has 2 threads by now, 1 before"
    assert said in done.stdout
    check(tmp_path, data)
