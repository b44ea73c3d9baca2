"""Cores and memory of this machine: what control groups leave of them counts, in trees made up and in real groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from usid_files import make_usid_file

from lazyproc.engine.limits import Groups, available_bytes, available_cores

GIBIBYTE = 2**30
UNLIMITED = 9223372036854771712


def tree(folder: Path, own: str, mounts: str, files: dict[str, str]) -> Groups:
    """Write control groups as Linux shows them; ``{}`` in `mounts` is the folder that they are in."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    (folder / "mounts").write_text(mounts.replace("{}", str(folder)))
    return Groups(str(folder / "own"), str(folder / "mounts"))


SECOND = "30 23 0:26 / {}/all rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
FIRST = (
    "20 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
    "31 23 0:28 / {} rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / {}/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / {}/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / {}/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
FIRST_OWN = "4:memory:/slurm/job_7\n2:cpu,cpuacct:/slurm/job_7\n0::/\n"
STAT = "anon 100\nactive_file 1000000\ninactive_file 2000000\nslab 5\n"
OLD_STAT = "cache 9\nactive_file 7\ninactive_file 7\ntotal_active_file 1000000\ntotal_inactive_file 2000000\n"


def test_the_tightest_group_by_version_2_counts(tmp_path: Path) -> None:
    files = {
        "all/cpu.max": "max 100000",
        "all/memory.max": "max",
        "all/user/memory.max": f"{2 * GIBIBYTE}\n",
        "all/user/memory.current": f"{GIBIBYTE}\n",
        "all/user/memory.stat": STAT,
        "all/user/cpu.max": "100000 100000\n",
        "all/user/job/memory.max": "max\n",
        "all/user/job/memory.current": "5000\n",
        "all/user/job/cpu.max": "max 100000\n",
        "all/other/memory.max": "1\n",
        "all/other/memory.current": "1\n",
    }
    groups = tree(tmp_path, "0::/user/job\n", SECOND, files)
    assert available_bytes(groups) == GIBIBYTE + 3_000_000
    assert available_cores(groups) == 1


def test_groups_by_version_1(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{UNLIMITED}\n",
        "memory/memory.usage_in_bytes": "100\n",
        "memory/slurm/job_7/memory.limit_in_bytes": f"{GIBIBYTE}\n",
        "memory/slurm/job_7/memory.usage_in_bytes": f"{GIBIBYTE // 4}\n",
        "memory/slurm/job_7/memory.stat": OLD_STAT,
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "50000\n",
        "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
    }
    groups = tree(tmp_path, FIRST_OWN, FIRST, files)
    assert available_bytes(groups) == GIBIBYTE - GIBIBYTE // 4 + 3_000_000
    assert available_cores(groups) == 1


@pytest.mark.parametrize("own", ["0::/system.slice/docker-1.scope\n", "0::/../outside\n", "0::/\n"])
def test_a_container_sees_its_own_group_as_the_outermost(tmp_path: Path, own: str) -> None:
    files = {"all/memory.max": f"{GIBIBYTE}\n", "all/memory.current": f"{GIBIBYTE}\n"}
    assert available_bytes(tree(tmp_path, own, SECOND, files)) == 0


def test_a_mounted_part_of_the_tree(tmp_path: Path) -> None:
    mounts = "35 31 0:32 /docker/1 {}/all rw - cgroup2 cgroup2 rw\n"
    files = {"all/inner/memory.max": f"{GIBIBYTE}\n", "all/inner/memory.current": "0\n"}
    assert available_bytes(tree(tmp_path, "0::/docker/1/inner\n", mounts, files)) == GIBIBYTE
    assert available_bytes(tree(tmp_path, "0::/docker/2/inner\n", mounts, files)) > GIBIBYTE


def test_what_cannot_be_read_limits_nothing(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    for groups in (
        Groups(str(tmp_path / "none"), str(tmp_path / "none")),
        tree(tmp_path, "0::/a\n", SECOND, {"all/memory.max": "nonsense\n", "all/cpu.max": "\n"}),
    ):
        assert abs(available_bytes(groups) - free) < GIBIBYTE
        assert available_cores(groups) >= 1


RUN = """
import sys
import lazyproc
from lazyproc.core.errors import MemoryLimitError

class Mean(lazyproc.Process):
    outputs = {"Value": lazyproc.Output("f8")}
    @staticmethod
    def _map_function(spectrum):
        return spectrum.mean()

with Mean(sys.argv[1], cores=1, max_mem_mb=None) as process:
    print(process.plan().allowed_bytes)
"""


def test_a_real_group_limits_a_run(tmp_path: Path) -> None:
    """A process that joins a group with little memory is told that it has no more."""
    groups = Path("/sys/fs/cgroup/memory" if os.path.isdir("/sys/fs/cgroup/memory") else "/sys/fs/cgroup")
    group = groups / f"lazyproc-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if groups.name == "memory" else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(GIBIBYTE))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        address = "::".join(make_usid_file(tmp_path / "scan.h5"))
        join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
        done = subprocess.run([sys.executable, "-c", join + RUN, address], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert GIBIBYTE // 2 < int(done.stdout) < GIBIBYTE
    finally:
        group.rmdir()
