"""Scripts that open the file on every rank with driver="mpio": a real parallel h5py under a real mpiexec.

Runs on demand, since h5py has to be built with MPI: LAZYPROC_TEST_MPIO=1 builds one from source against Debian's
libhdf5-mpich-dev (some minutes); LAZYPROC_MPIO_PYTHON names a Python that has one, and lazyproc, already. Its mpiexec
has to be MPICH's, as mpiexec.mpich or mpiexec.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from usid_files import CHANNEL, make_usid_file

MAIN = f"{CHANNEL}/Raw_Data"
HDF5 = Path("/usr/lib/x86_64-linux-gnu/hdf5/mpich")
LIBRARIES = (
    "click cloudpickle dask deflate distributed isal loky matplotlib numcodecs psutil scipy tblib threadpoolctl tqdm "
    "xarray xxhash zarr"
)

pytestmark = [
    pytest.mark.skipif(
        not (os.environ.get("LAZYPROC_TEST_MPIO") == "1" or os.environ.get("LAZYPROC_MPIO_PYTHON")),
        reason="runs on demand: LAZYPROC_TEST_MPIO=1 builds h5py with MPI, or LAZYPROC_MPIO_PYTHON names a Python",
    ),
    pytest.mark.timeout(1200),
]

SCRIPT = """
import os, signal, sys, time
from mpi4py import MPI
import h5py
import lazyproc

path, main, mode = sys.argv[1:4]
os.environ["MODE"] = mode  # no parameter: the work stays the same


def wait_for_rank_1():
    "In rank 0, stay in this position until rank 1 has done most of them."
    if MPI.COMM_WORLD.Get_rank() == 1:
        with open(path + ".by_1", "a") as counted:
            counted.write(".")
        return
    deadline = time.monotonic() + 60
    while not os.path.exists(path + ".by_1") or os.path.getsize(path + ".by_1") < MOST:
        if time.monotonic() > deadline:
            raise TimeoutError("rank 1 does not get on while rank 0 computes")
        time.sleep(0.01)


class Together(lazyproc.Process):
    outputs = {
        "Mean": lazyproc.Output("f8"),
        "Twice": lazyproc.Output("f4", shape_from_main=True),
    }

    @staticmethod
    def _map_function(row):
        mode = os.environ["MODE"]
        if mode == "raise" and row[0] == 77:
            raise ValueError("seventy-seven")
        if mode == "early":
            time.sleep(0.02)
            if row[0] == 19:
                raise ValueError("nineteen")
        if mode == "busy":
            wait_for_rank_1()
        if mode in ("slow", "die"):
            time.sleep(0.1 if mode == "slow" else 0.02)
        if mode == "die" and row[0] == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"Mean": row.mean(), "Twice": 2 * row}


class Old(lazyproc.Process):
    "As subclasses for pyUSID are written."

    process_name = "Together"

    def _create_results_datasets(self):
        parent = self.h5_main.parent
        self.h5_results_grp = parent.create_group("Raw_Data-Together_000")
        self.h5_results_grp.attrs["tool"] = "Together"
        self.mean = self.h5_results_grp.create_dataset("Mean", (120, 1), "f8")
        self.twice = self.h5_results_grp.create_dataset("Twice", (120, 8), "f4")

    def _get_existing_datasets(self):
        self.mean, self.twice = self.h5_results_grp["Mean"], self.h5_results_grp["Twice"]

    def _write_results_chunk(self):
        pixels = self._get_pixels_in_current_batch()
        self.mean[pixels, 0] = [one["Mean"] for one in self._results]
        self.twice[pixels] = [one["Twice"] for one in self._results]

    @staticmethod
    def _map_function(row):
        return Together._map_function(row)


kind = Old if sys.argv[4:] == ["old"] else Together
with h5py.File(path, "r+", driver="mpio", comm=MPI.COMM_WORLD) as file:
    group = kind(file[main], checkpoint_interval=0.1).compute()
    done = int(group["completed_positions"][:].sum())
if MPI.COMM_WORLD.Get_rank() == 0:
    print("done", done, MPI.COMM_WORLD.Get_size(), flush=True)
"""

ALONE = """
import os, signal, sys, threading, time
from mpi4py import MPI
import h5py
import lazyproc

path, main, mode = sys.argv[1:4]
rank = MPI.COMM_WORLD.Get_rank()
alone = rank == 1


class Mean(lazyproc.Process):
    outputs = {"Mean": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(row):
        return row.mean()


class Old(lazyproc.Process):
    "As subclasses for pyUSID are written."

    def _create_results_datasets(self):
        if alone:
            raise ValueError("only here")
        self.h5_results_grp = self.h5_main.parent.create_group("Raw_Data-Old_000")

    _map_function, _write_results_chunk = Mean._map_function, None


def signal_this_rank():
    "Send a signal as soon as somebody waits for one."
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)


file = h5py.File(path, "r+", driver="mpio", comm=MPI.COMM_WORLD)
if mode == "outside":  # no `with`: it would wait for the others, to close the file
    group = Mean(file[main]).compute()
    if alone:
        raise ValueError("only here")
    group.attrs["all"] = "of us"
with file:
    if mode == "constructor":
        Mean(file[main], checkpoint_interval=-1.0 if alone else 1.0).compute()
    elif mode == "parameter":
        Mean(file[main], parms_dict={"only": print if alone else 1}).compute()
    elif mode == "all":
        try:
            Mean(file[main], checkpoint_interval=-1.0)
        except lazyproc.ArgumentValueError:
            Mean(file[main]).compute()
    elif mode == "compute":
        Mean(file[main]).compute("here" if alone else False)
    elif mode == "hook":
        Old(file[main]).compute()
    elif mode == "inside":
        with Mean(file[main]) as process:
            process.compute()
            if alone:
                raise ValueError("only here")
    elif mode == "exit":
        with Mean(file[main]) as process:
            process.compute()
            if alone:
                sys.exit()
    elif mode == "signal":
        process = Mean(file[main])
        process.compute()
        if alone:
            threading.Thread(target=signal_this_rank, daemon=True).start()
        while True:
            process.compute()
print("through", flush=True)
"""


def build(folder: Path) -> str:
    """Make an environment with an h5py of its own, and return its Python."""
    if not HDF5.exists() and os.getuid() == 0 and shutil.which("apt-get"):
        subprocess.run(
            ["apt-get", "install", "-y", "--no-install-recommends", "libhdf5-mpich-dev", "mpich"], check=True
        )
    if not HDF5.exists():
        pytest.skip("libhdf5-mpich-dev is not installed, and cannot be: not root, or no apt-get")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    built = {**os.environ, "CC": "mpicc.mpich", "MPICC": "mpicc.mpich", "HDF5_MPI": "ON", "HDF5_DIR": str(HDF5)}
    subprocess.run([*pip, "cython<4", "pkgconfig", "setuptools>=77", "numpy<2.5"], check=True)
    subprocess.run([*pip, "--no-binary=mpi4py", "mpi4py>=4"], check=True, env=built)
    subprocess.run([*pip, "--no-build-isolation", "--no-binary=h5py", "h5py"], check=True, env=built)
    subprocess.run([*pip, *LIBRARIES.split()], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(Path(__file__).parents[1])], check=True)
    return python


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return os.environ.get("LAZYPROC_MPIO_PYTHON") or build(tmp_path_factory.mktemp("mpio") / "venv")


def raw_data() -> np.ndarray:
    data = np.random.default_rng(4).standard_normal((120, 8))
    data[:, 0] = np.arange(120)
    return data


MOST = 70
"""Positions that rank 1 can only do if it gets on while rank 0 is busy: more than half of all."""


def make_scan(folder: Path, script: str = SCRIPT) -> Path:
    make_usid_file(folder / "scan.h5", n_rows=12, n_cols=10, n_spectral=8, data=raw_data())
    (folder / "script.py").write_text(script.replace("MOST", str(MOST)))
    return folder / "scan.h5"


def start(
    python: str, ranks: int, path: Path, mode: str, kind: str = "declared", options: Sequence[str] = ()
) -> subprocess.Popen[str]:
    mpiexec = shutil.which("mpiexec.mpich") or "mpiexec"
    command = [mpiexec, "-n", str(ranks), python, *options, str(path.parent / "script.py"), str(path), MAIN, mode, kind]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run(
    python: str, ranks: int, path: Path, mode: str = "calm", kind: str = "declared", options: Sequence[str] = ()
) -> tuple[int, str, str]:
    process = start(python, ranks, path, mode, kind, options)
    try:
        output, errors = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


def check(path: Path, *, complete: bool = True) -> np.ndarray:
    data = raw_data()
    with h5py.File(path) as file:
        assert (file[MAIN][:] == data).all()
        (name,) = (name for name in file[CHANNEL] if name.startswith("Raw_Data-Together"))
        group = file[CHANNEL][name]
        done = group["completed_positions"][:].astype(bool)
        assert done.all() or not complete
        assert (group["Mean"][:, 0][done] == np.array([row.mean() for row in data])[done]).all()
        assert (group["Twice"][:][done] == (2 * data).astype("f4")[done]).all()
        assert (int(group.attrs.get("last_pixel", 0)) == 120) == complete
    return done


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_all_ranks_compute(python: str, tmp_path: Path, ranks: int) -> None:
    path = make_scan(tmp_path)
    code, output, errors = run(python, ranks, path)
    assert (code, output) == (0, f"done 120 {ranks}\n"), errors
    assert not errors
    check(path)
    assert not list(tmp_path.glob(".*lazyproc*"))
    with h5py.File(path, "r+") as file:  # as a run that died after its last commit leaves it
        file[f"{CHANNEL}/Raw_Data-Together_000"].attrs["last_pixel"] = 0
    code, output, errors = run(python, ranks, path)  # the finished group is returned, and its end noted
    assert (code, output) == (0, f"done 120 {ranks}\n"), errors
    check(path)


@pytest.mark.parametrize("kind", ["declared", "old"])
def test_who_is_free_takes_the_next_block_while_rank_0_is_busy(python: str, tmp_path: Path, kind: str) -> None:
    path = make_scan(tmp_path)
    if kind == "declared":  # so that nothing is tried any more: rank 0 calls the function for its blocks only
        assert run(python, 1, path, "early")[0] != 0
        check(path, complete=False)
    code, output, errors = run(python, 2, path, "busy", kind)
    assert (code, output) == (0, "done 120 2\n"), errors
    assert (tmp_path / "scan.h5.by_1").stat().st_size >= MOST
    check(path)
    assert not list(tmp_path.glob(".*lazyproc*"))


@pytest.mark.parametrize("kind", ["declared", "old"])
def test_blocks_are_handed_out_by_mpi_where_files_are_not_locked(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("LAZYPROC_LOCKING", "none")
    path = make_scan(tmp_path)
    code, output, errors = run(python, 3, path, "calm", kind)
    assert (code, output) == (0, "done 120 3\n"), errors
    check(path)


def test_error_of_the_function_reaches_all_ranks(python: str, tmp_path: Path) -> None:
    path = make_scan(tmp_path)
    code, _, errors = run(python, 3, path, "raise")
    assert code != 0
    assert errors.count("FunctionError") >= 3, errors
    assert "seventy-seven" in errors
    assert "position 77" in errors
    check(path, complete=False)


def test_death_of_a_rank_ends_the_job_and_the_rest_is_kept(python: str, tmp_path: Path) -> None:
    path = make_scan(tmp_path)
    code, _, _ = run(python, 3, path, "die")
    assert code != 0
    done = check(path, complete=False)
    assert not done[60]
    code, output, errors = run(python, 2, path)
    assert (code, output) == (0, "done 120 2\n"), errors
    check(path)


@pytest.mark.parametrize("ranks", [1, 3])
def test_class_with_the_old_hooks(python: str, tmp_path: Path, ranks: int) -> None:
    path = make_scan(tmp_path)
    code, output, errors = run(python, ranks, path, "die" if ranks == 3 else "calm", "old")
    if ranks == 3:  # a rank died; the rest is resumed
        assert code != 0
        done = check(path, complete=False)
        assert not done[60]
        code, output, errors = run(python, ranks, path, "raise", "old")
        assert code != 0
        assert "seventy-seven" in errors
        assert not check(path, complete=False)[77]
        code, output, errors = run(python, 2, path, "calm", "old")
    assert (code, output) == (0, f"done 120 {min(2, ranks)}\n"), errors
    check(path)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("constructor", "checkpoint_interval"),
        ("parameter", "Parameter 'only'"),
        ("compute", "override"),
        ("hook", "ValueError: only here"),
        ("inside", "ValueError: only here"),
        ("exit", "SystemExit"),
    ],
)
def test_error_of_one_rank_ends_all(python: str, tmp_path: Path, mode: str, message: str) -> None:
    path = make_scan(tmp_path, ALONE)
    code, output, errors = run(python, 3, path, mode)
    assert code != 0, errors
    assert "through" not in output  # of mpiexec there may be something
    assert "rank 1 of 3: it alone has failed, which ends all" in errors
    assert message in errors
    assert "Traceback" in errors


def test_error_of_the_script_itself_ends_all_where_mpi4py_watches(python: str, tmp_path: Path) -> None:
    path = make_scan(tmp_path, ALONE)
    code, output, errors = run(python, 3, path, "outside", options=["-m", "mpi4py"])
    assert code == 1, errors
    assert "through" not in output
    assert "ValueError: only here" in errors


def test_error_of_all_ranks_can_be_caught(python: str, tmp_path: Path) -> None:
    path = make_scan(tmp_path, ALONE)
    code, output, errors = run(python, 3, path, "all")
    assert (code, output.count("through")) == (0, 3), errors


def test_signal_to_one_rank_ends_all_though_nothing_is_left_to_do(python: str, tmp_path: Path) -> None:
    path = make_scan(tmp_path, ALONE)
    code, output, errors = run(python, 3, path, "signal")
    assert code == 75, errors
    assert "through" not in output


@pytest.mark.parametrize(("kind", "told"), [("declared", "01"), ("declared", "1"), ("old", "1")])
def test_signal_drains_all_ranks(python: str, tmp_path: Path, kind: str, told: str) -> None:
    path = make_scan(tmp_path)
    process = start(python, 2, path, "slow", kind)
    deadline = time.monotonic() + 120
    while not committed(path):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    # To the ranks, as Slurm does it. Debian's mpiexec (MPICH 4.0.2) sends on what it gets itself, but then ends with 0
    # now and then, though all ranks have ended with 75.
    for rank in psutil.Process(process.pid).children(recursive=True):
        if "PMI_RANK" in (environ := rank.environ()) and environ["PMI_RANK"] in told:
            rank.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "which ends all" not in errors
    check(path, complete=False)
    code, output, errors = run(python, 4, path, "calm", kind)
    assert (code, output) == (0, "done 120 4\n"), errors
    check(path)


def committed(path: Path) -> bool:
    try:
        with open(path, "rb") as raw, h5py.File(raw) as file:
            names = [name for name in file[CHANNEL] if name.startswith("Raw_Data-Together")]
            return (
                bool(names)
                and "completed_positions" in file[CHANNEL][names[0]]
                and bool(file[CHANNEL][names[0]]["completed_positions"][:].any())
            )
    except (OSError, KeyError, RuntimeError):
        return False
