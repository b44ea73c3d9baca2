"""Who computes into a file: what the lock file beside it tells, and whether that is still so."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from lazyproc.core.errors import LockingError
from lazyproc.hdf5.locking import FLOCK, KINDS, NONE, lock
from lazyproc.hdf5.sidecar import LOCK, open_sidecar, sidecar

TIME = "%Y-%m-%d %H:%M:%S"
"""How a lock file tells since when."""
_LONGEST = 2**14
"""Characters: what is longer was not written by a run."""
_SLACK_SECONDS = 2.0
"""How much later than its lock file a process may seem to have started."""


def is_locked(path: str, kind: str) -> bool:
    """Tell whether somebody holds the lock exclusively; the question itself holds it shared for a moment."""
    try:
        descriptor = open_sidecar(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not lock(descriptor, path, kind, exclusive=False)
    finally:
        os.close(descriptor)


def holder(path: str) -> dict[str, Any] | None:
    """Tell who computes on the results in `path` now: host, pid, since when, run id; None if nobody does.

    Where locks do not work, a run on another host counts until its lock file is removed.
    """
    lock_path = sidecar(path, LOCK)
    about = read_holder(lock_path)
    try:
        return about if about is not None and is_held(lock_path, about) else None
    except OSError:  # a lock file that may not be read tells nothing
        return None


def say_who(about: dict[str, Any]) -> str:
    """Say who computes into a file, from what `holder` returns."""
    who = ", ".join(f"{what} {about.get(what, 'unknown')}" for what in ("host", "pid"))
    return f"another run is computing into this file: {who}, since {about.get('since', 'unknown')}"


def is_held(lock_path: str, about: dict[str, Any]) -> bool:
    """Tell whether whoever wrote a lock file still holds it, by the kind of lock that it tells of."""
    kind = about.get("locking", FLOCK)
    try:
        if kind in KINDS and kind != NONE:
            return is_locked(lock_path, kind)
    except LockingError:  # it cannot be locked from here
        pass
    return about.get("host") != socket.gethostname() or is_alive(about)


def is_alive(about: dict[str, Any]) -> bool:
    """Tell whether the process that wrote a lock file on this host is still there, and no later one with its number."""
    try:
        pid = int(about["pid"])
        since = time.mktime(time.strptime(about["since"], TIME))
        os.kill(pid, 0)
    except PermissionError:  # somebody else's
        pass
    except (
        ProcessLookupError,
        KeyError,
        OverflowError,
        TypeError,
        ValueError,
    ):  # gone, or nobody can have written this
        return False
    state, started = _look_up(pid)
    return state != "Z" and started <= since + _SLACK_SECONDS


def _look_up(pid: int) -> tuple[str, float]:
    """Return a process's state, "Z" if it has ended and nobody has noticed, and when it started."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/stat", encoding="ascii", errors="replace") as file:
            booted = next(int(line.split()[1]) for line in file if line.startswith("btime"))
        return fields[0], booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):  # no Linux
        return "", 0.0


def read_holder(lock_path: str) -> dict[str, Any] | None:
    """Return what a lock file tells; nothing if it is empty or damaged, None if there is none."""
    try:
        with os.fdopen(open_sidecar(lock_path, os.O_RDONLY), encoding="utf-8") as file:
            return dict(json.loads(file.read(_LONGEST)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
