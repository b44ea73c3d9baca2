"""A driver is killed while its blocks run on a cluster that lives on: nothing of them is written afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from usid_files import make_usid_file

import lazyproc

CLUSTER = """
import sys, time
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""

DRIVER = """
import os, sys, time
import lazyproc
from distributed import Client

class Slow(lazyproc.Process):
    outputs = {"Total": lazyproc.Output("f8")}

    @staticmethod
    def _map_function(spectrum, folder, wait):
        import os, time
        open(os.path.join(folder, f"began_{os.getpid()}"), "a").close()
        if os.path.exists(os.path.join(folder, "go")):
            time.sleep(wait)
            open(os.path.join(folder, "ended"), "a").close()
        return spectrum.sum()

if __name__ == "__main__":
    address, scheduler, folder = sys.argv[1:]
    with Client(scheduler) as client:
        with Slow(address, parms_dict={"folder": folder, "wait": 2.0}, client=client) as process:
            process.compute()
"""


@pytest.fixture
def cluster(tmp_path):
    """A cluster in a process of its own; yields the scheduler's address."""
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.communicate(timeout=60)


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.02)


def started_driver(tmp_path: Path, address: str, scheduler: str) -> subprocess.Popen[bytes]:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    return subprocess.Popen([sys.executable, script, address, scheduler, str(tmp_path)], stderr=subprocess.DEVNULL)


def test_workers_of_a_killed_driver_do_not_write(tmp_path, cluster):
    path, name = make_usid_file(tmp_path / "scan.h5", n_rows=4, n_cols=4)
    address = f"{path}::{name}"
    (tmp_path / "go").touch()  # each position waits from now on
    driver = started_driver(tmp_path, address, cluster)
    group = f"{name}-Slow_000"
    deadline = time.monotonic() + 60
    while len({*tmp_path.glob("began_*")} - {tmp_path / f"began_{driver.pid}"}) < 2:
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)  # blocks are on the workers now, asleep
    driver.wait()
    (tmp_path / "ended").unlink(missing_ok=True)
    with h5py.File(path, "r") as file:
        results = file[group]
        done = results["completed_positions"][()] == 1
        before = results["Total"][()]
        assert not done.all(), "the driver was too quick to be killed"
    # The file moves on: somebody else marks the place of the results with values of their own.
    with h5py.File(path, "r+") as file:
        file[group]["Total"][...] = np.where(done[:, None], before, -1.0)
    wait_for(tmp_path / "ended")
    time.sleep(6.0)  # time for the blocks under way, of a few positions each, to end and to try to write
    with h5py.File(path, "r") as file:
        np.testing.assert_array_equal(file[group]["Total"][~done], -1.0, err_msg="a zombie has written")
        np.testing.assert_array_equal(file[group]["Total"][done], before[done])
    # A new driver on another engine resumes; what the zombies do meanwhile does not matter.
    (tmp_path / "go").unlink(missing_ok=True)
    code = compile(DRIVER.partition("if __name__")[0], "driver.py", "exec")
    namespace: dict[str, object] = {"__name__": "driver"}
    exec(code, namespace)
    slow: type[lazyproc.Process] = namespace["Slow"]  # type: ignore[assignment]
    with slow(address, parms_dict={"folder": str(tmp_path), "wait": 2.0}, cores=1) as process:
        assert [one.name for one in process.partial_h5_groups] == [group]
        found = process.compute()["Total"][:, 0]
    with h5py.File(path, "r") as file:
        np.testing.assert_array_equal(found, [row.sum() for row in file[name][()]])
