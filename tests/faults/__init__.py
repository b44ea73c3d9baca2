"""Children that run where something fails: on a small disk, under a limit, or with system calls that fail."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SECONDS = 240
"""A limit against hanging."""


def library(folder: Path) -> Path:
    """Compile the library that lets system calls fail, or skip the test."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C compiler for the library that lets system calls fail")
    path = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", os.fspath(path), os.fspath(HERE / "faults.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the library that lets system calls fail cannot be built: {done.stderr[-300:]}")
    return path


@functools.lru_cache(maxsize=1)
def mounting() -> tuple[list[str], str]:
    """Return the command under which a child may mount, in a namespace of its own; or why there is none."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return [], "no unshare on this system"
    reasons = []
    for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        trial = [*command, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
        done = subprocess.run(trial, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return command, ""
        reasons.append(f"{' '.join(command)}: {done.stderr.strip()}")
    return [], "; ".join(reasons)


def small_disks() -> list[str]:
    """Return the command under which a child may mount small disks, or skip the test."""
    command, reason = mounting()
    if not command:
        pytest.skip(f"no small disk can be mounted here: {reason}")
    return command


def run(module: str, *arguments: Any, under: list[str] | None = None, env: dict[str, str] | None = None) -> Any:
    """Run a function of a module of this folder in a child and return what it returned.

    Parameters
    ----------
    module : str
        The module; the first argument names the function in it.
    *arguments
        What JSON can hold, or paths.
    under : list of str, optional
        The command that the child is run under.
    env : dict, optional
        More of the environment.
    """
    words = [json.dumps(one, default=os.fspath) for one in arguments]
    done = subprocess.run(
        [*(under or []), sys.executable, "-W", "error", "-m", f"faults.{module}", *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd=HERE.parent,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **(env or {})},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def serve(functions: dict[str, Any]) -> None:
    """Call the function that the command line names, and print what it returns. For the modules' ends."""
    name, *arguments = map(json.loads, sys.argv[1:])
    print(json.dumps(functions[name](*arguments)))
