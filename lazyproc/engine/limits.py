"""What this process may use of its machine: cores and memory, by its affinity and by the limits of its control groups.

A container, a batch job and a login node's user are each a control group of Linux (cgroups(7)), often inside others,
each of which may have a limit of its own. psutil tells what the whole machine has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Groups:
    """Where control groups are found.

    Attributes
    ----------
    own : str
        The file that tells in which groups this process is.
    mounts : str
        The file that tells where they are mounted: proc(5), ``mountinfo``.
    """

    own: str = "/proc/self/cgroup"
    mounts: str = "/proc/self/mountinfo"

    def folders(self, controller: str) -> Iterator[tuple[str, bool]]:
        """Yield the folders of this process's groups with a controller, the outer ones too, and whether by version 2.

        A container may see its own group as the outermost one, or not see it where it is said to be: then the folder
        mounted is what counts, which is yielded always.
        """
        paths = self._paths(controller)
        for line in _text(self.mounts).splitlines():
            fields, _, rest = line.partition(" - ")
            kind, _, options = rest.partition(" ")
            if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in _options(options)):
                continue
            root, folder = fields.split()[3:5]
            is_second = kind == "cgroup2"
            inside = os.path.relpath(paths.get(is_second, root), root)
            parts = [] if inside.startswith("..") else [part for part in inside.split("/") if part != "."]
            for count in range(len(parts), -1, -1):
                yield os.path.join(folder, *parts[:count]), is_second

    def _paths(self, controller: str) -> dict[bool, str]:
        """Return this process's groups: by version 2 or not, the path."""
        found: dict[bool, str] = {}
        for line in _text(self.own).splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                found[not controllers] = path
        return found


def _options(text: str) -> list[str]:
    """Return the options of a mounted group, its controllers among them."""
    return text.rpartition(" ")[2].split(",")


def available_cores(groups: Groups | None = None) -> int:
    """Count the cores this process may use: by affinity, and by the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, is_second in (groups or Groups()).folders("cpu"):
        if is_second:
            quota, _, period = _text(folder, "cpu.max").partition(" ")
        else:
            quota, period = _text(folder, "cpu.cfs_quota_us"), _text(folder, "cpu.cfs_period_us")
        if quota.strip().isdigit() and period.strip().isdigit():  # else "max", or -1
            cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def default_cores() -> int:
    """Return all cores but two, all but one of four or fewer, and at least one."""
    cores = available_cores()
    return max(1, cores - (1 if cores <= 4 else 2))


def available_bytes(groups: Groups | None = None) -> int:
    """Return how much more memory this process may use before the machine, or one of its control groups, is full.

    What a group has of files in memory counts as free, as in the machine's own ``MemAvailable``: the system drops it
    where memory is wanted.
    """
    available = int(psutil.virtual_memory().available)
    for folder, is_second in (groups or Groups()).folders("memory"):
        names = ("memory.max", "memory.current") if is_second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_text(folder, name).strip() for name in names)
        if limit.isdigit() and used.isdigit():
            available = min(available, int(limit) - int(used) + _droppable(folder, is_second))
    return max(0, available)


def _droppable(folder: str, is_second: bool) -> int:
    """Return the bytes of files that a group has in memory."""
    prefix = "" if is_second else "total_"
    names = (f"{prefix}active_file", f"{prefix}inactive_file")
    pairs = (line.split() for line in _text(folder, "memory.stat").splitlines())
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in names)


def _text(*parts: str) -> str:
    """Return what is in a file; nothing if it cannot be read."""
    try:
        with open(os.path.join(*parts), encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
