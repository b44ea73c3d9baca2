"""MPI jobs in processes of their own, each under a hard limit, and what is left of them afterwards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
MPIEXEC = BIN / "mpiexec"
"""The environment's own: another MPI may come first on PATH."""
LIMIT = 120.0
"""Seconds, against hanging; a job takes about four."""
LAUNCHED = re.compile(
    r"lazyproc: (\d+) MPI ranks on (\d+) machines?, dashboard at http://127\.0\.0\.1:\d+/status on \S+"
)


@dataclass
class Ended:
    """How a job ended.

    Attributes
    ----------
    code : int
        The exit code of mpiexec.
    out, err : list of str
        The lines of both streams.
    left : list
        Processes of the job that were still there a while after it.
    """

    code: int
    out: list[str]
    err: list[str]
    left: list[Any]

    def __str__(self) -> str:
        return "\n".join([f"code {self.code}, left {self.left}", "-- out", *self.out, "-- err", *self.err])


class Job:
    """A command under mpiexec, or without it, that is watched and cannot outlive its test.

    Parameters
    ----------
    ranks : int or None
        How many; None starts the command by itself.
    command : sequence
        What each rank runs.
    folder : Path
        Where it runs, and leaves its streams.
    environ : dict, optional
        Variables beside those that are there.
    """

    def __init__(self, ranks: int | None, command: Sequence[Any], folder: Path, environ: Any = None) -> None:
        assert MPIEXEC.exists(), f"{MPIEXEC} is missing: install lazyproc[test], which has MPICH"
        launcher = [] if ranks is None else [MPIEXEC, "-n", ranks]
        self._out, self._err = folder / f"out_{time.monotonic_ns()}", folder / f"err_{time.monotonic_ns()}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "SLURM"))}
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [str(part) for part in [*launcher, *command]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=inherited | (environ or {}),
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    def look(self) -> list[psutil.Process]:
        """Return all processes of the job, those included that mpiexec has started elsewhere in the tree."""
        try:
            root = psutil.Process(self.process.pid)
            for one in [root, *root.children(recursive=True)]:
                self._seen[one.pid] = one
        except psutil.NoSuchProcess:
            pass
        return [one for one in self._seen.values() if _lives(one)]

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            for one in self.look():
                try:
                    if one.environ().get("PMI_RANK") == str(number) and "python" in one.name():
                        return one
                except psutil.Error:
                    continue
            time.sleep(0.05)
        raise AssertionError(f"there is no rank {number}")

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait for something that the job does."""
        deadline = time.monotonic() + LIMIT
        while not happened():
            self.look()
            assert self.process.poll() is None, f"the job ended before {what}\n{self._err.read_text()}"
            assert time.monotonic() < deadline, f"{what} did not happen"
            time.sleep(0.02)

    def end(self, seconds: float = LIMIT) -> Ended:
        """Wait for the end, under a limit, and kill whatever is left."""
        self.look()
        deadline = time.monotonic() + seconds
        try:
            while self.process.poll() is None and time.monotonic() < deadline:
                self.look()
                time.sleep(0.05)
            assert self.process.poll() is not None, f"still there after {seconds} s\n{self._err.read_text()}"
            patience = time.monotonic() + 30
            while (left := self.look()) and time.monotonic() < patience:
                time.sleep(0.05)
        finally:
            self.kill()
        out, err = self._out.read_text().splitlines(), self._err.read_text().splitlines()
        return Ended(int(self.process.returncode), out, err, left)

    def kill(self) -> None:
        """End all processes of the job, whatever they are doing."""
        for one in self.look():
            with _ignored():
                os.kill(one.pid, signal.SIGKILL)
        self.process.wait(30)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _ignored() -> Any:
    import contextlib

    return contextlib.suppress(ProcessLookupError)
