"""Memory that only a program and its children have, watched from outside while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psutil

SAMPLE_SECONDS = 0.01


class Bare(NamedTuple):
    """Bytes of interpreters that have loaded what a run loads, and do nothing.

    Attributes
    ----------
    driver, worker : int
        Of the program itself, and of each of its children.
    """

    driver: int = 0
    worker: int = 0


NOTHING = Bare()


class Sampler:
    """A Python program in a fresh process, and its private memory.

    Counted is what a process has written to (dirty pages that nobody else has, and what of them is swapped out). Pages
    of libraries that are merely read are not: they are the system's, which drops them at will, and they are private in
    one moment and shared in the next, as other programs with the same libraries come and go.

    Parameters
    ----------
    arguments : list of str
        What follows `python`. The program prints one line of JSON when it is done; or, for `baseline`, the line
        ``baseline`` when it has imported everything, and then waits for the end of its input.
    """

    def __init__(self, arguments: list[str]) -> None:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.child = subprocess.Popen([sys.executable, *arguments], text=True, **pipes)
        self.process = psutil.Process(self.child.pid)

    def now(self) -> dict[int, int]:
        """Return the bytes of each process.

        A process that is being started runs in its parent's memory until it has loaded its program, under the parent's
        command line: that memory is counted once.
        """
        found: dict[int, int] = {}
        commands: dict[int, list[str]] = {}
        try:
            for one in [self.process, *self.process.children(recursive=True)]:
                try:
                    commands[one.pid] = one.cmdline()
                    if commands[one.pid] != commands.get(one.ppid()):
                        found[one.pid] = _dirty(one.pid)
                except (psutil.Error, OSError):
                    continue
        except psutil.Error:
            pass
        return found

    def peak(self, bare: Bare = NOTHING) -> tuple[int, dict[str, Any]]:
        """Watch until the end; return the most that all had together above bare ones, and what the program printed.

        A process that has less than a bare one, since it has only begun, makes up for nothing that others have.
        """
        highest = 0
        with ThreadPoolExecutor(1) as reader:  # what is printed may be more than a pipe holds
            end = reader.submit(self.child.communicate)
            while not end.done():
                above = [max(0, taken - self._of(bare, pid)) for pid, taken in self.now().items()]
                highest = max(highest, sum(above))
                time.sleep(SAMPLE_SECONDS)
            output, errors = end.result()
        if self.child.returncode:
            raise RuntimeError(f"exit code {self.child.returncode}: {errors}")
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return highest, answer

    def _of(self, bare: Bare, pid: int) -> int:
        return bare.driver if pid == self.child.pid else bare.worker

    def baseline(self) -> Bare:
        """Return what the program and each of its children have when they have imported everything, and end it."""
        line = self.child.stdout.readline()  # type: ignore[union-attr]
        if line != "baseline\n":
            raise RuntimeError(f"{line!r} came; expected 'baseline': {self.child.communicate()[1]}")
        time.sleep(0.3)
        found = self.now()
        self.child.communicate(timeout=60)
        return Bare(found.pop(self.child.pid), min(found.values(), default=0))


def _dirty(pid: int) -> int:
    """Return the bytes that a process, and no other one, has written to."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        lines = [line.split() for line in file]
    return sum(1024 * int(line[1]) for line in lines if line[0] in ("Private_Dirty:", "Swap:"))
