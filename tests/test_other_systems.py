"""Systems other than Linux: a run in a Python that lacks what Python's own manual says macOS has not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from usid_files import make_usid_file

WITHOUT = """
import fcntl, os, signal, sys
for module, names in (
    (os, ("fdatasync", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "pipe2",
          "memfd_create", "copy_file_range", "eventfd", "splice", "pidfd_open", "getrandom")),
    (fcntl, ("F_OFD_GETLK", "F_OFD_SETLK", "F_OFD_SETLKW")),
    (signal, ("sigtimedwait", "sigwaitinfo", "SIGRTMIN", "SIGPWR", "SIGSTKFLT")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.path.insert(0, os.path.dirname(sys.argv[1]))
"""

RUN = """
import sys
import h5py
import numpy as np
import lazyproc
from lazyproc.core.events import BlockDone

class Mean(lazyproc.Process):
    outputs = {"Value": lazyproc.Output("f8")}
    @staticmethod
    def _map_function(spectrum):
        return spectrum.mean()

def stop(event):
    if isinstance(event, BlockDone):
        raise KeyboardInterrupt

address, how = sys.argv[1:]
path, _, name = address.partition("::")
with h5py.File(path, "r") as file:
    expected = file[name][()].mean(axis=1, keepdims=True)
first = Mean(address, cores=1)
first._progress = stop
try:
    first.compute()
except KeyboardInterrupt:
    pass
first.close()
assert first.partial_h5_groups
if how == "handle":
    with h5py.File(path, "r+") as file:
        process = Mean(file[name], cores=2)
        group = process.compute()
        assert np.allclose(group["Value"][()], expected)
else:
    with Mean(address, cores=2) as process:
        group = process.compute()
        assert np.allclose(group["Value"][()], expected)
"""


@pytest.mark.parametrize("how", ["address", "handle"])
def test_a_run_is_stopped_and_resumed_without_what_only_linux_has(tmp_path: Path, how: str) -> None:
    address = "::".join(make_usid_file(tmp_path / "scan.h5", n_rows=40, n_cols=50))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + RUN, address, how], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
