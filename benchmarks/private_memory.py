"""Private memory (USS) of a program and all its children, watched from outside while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

SAMPLE_SECONDS = 0.01


class Sampler:
    """A Python program in a fresh process, and its private memory.

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

    def now(self) -> int:
        """Return bytes of memory that nobody else has, of all processes together.

        A process that is being started runs in its parent's memory until it has loaded its program, under the parent's
        command line: that memory is counted once.
        """
        total = 0
        commands: dict[int, list[str]] = {}
        try:
            for one in [self.process, *self.process.children(recursive=True)]:
                try:
                    commands[one.pid] = one.cmdline()
                    if commands[one.pid] != commands.get(one.ppid()):
                        total += one.memory_full_info().uss
                except psutil.Error:
                    continue
        except psutil.Error:
            pass
        return total

    def peak(self) -> tuple[int, dict[str, Any]]:
        """Watch until the end; return the highest total and what the program printed."""
        highest = 0
        with ThreadPoolExecutor(1) as reader:  # what is printed may be more than a pipe holds
            end = reader.submit(self.child.communicate)
            while not end.done():
                highest = max(highest, self.now())
                time.sleep(SAMPLE_SECONDS)
            output, errors = end.result()
        if self.child.returncode:
            raise RuntimeError(f"exit code {self.child.returncode}: {errors}")
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return highest, answer

    def baseline(self) -> int:
        """Return what the program has when it has imported everything, and end it."""
        line = self.child.stdout.readline()  # type: ignore[union-attr]
        if line != "baseline\n":
            raise RuntimeError(f"{line!r} came; expected 'baseline': {self.child.communicate()[1]}")
        time.sleep(0.3)
        total = self.now()
        self.child.communicate(timeout=60)
        return total
