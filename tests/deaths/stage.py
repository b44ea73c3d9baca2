"""The face of the server: a folder for the files of a layout, and a process that can be made to die there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import shim

LIMIT = 120
"""Seconds after which a process that should end is taken to hang."""


class Stage:
    """A folder for the files of a layout, and a process that can be made to die there.

    Parameters
    ----------
    folder : Path
        An empty folder: ``work`` in it gets the files, and is the one that the shim watches.
    library : Path
        The built shim.
    pause : float
        Seconds that the functions take a position.
    """

    def __init__(self, folder: Path, library: Path, pause: float = 0.0) -> None:
        self.folder = folder
        tests = Path(__file__).resolve().parents[1]
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "LAZYPROC_DEATHS": str(folder / "control"),
            "LAZYPROC_CALLS": str(folder / "calls"),
            "LAZYPROC_PAUSE": str(pause),
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(tests), os.environ.get("PYTHONPATH", "")])),
        }
        shim.Control(folder / "control")
        self.errors = open(folder / "errors", "w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deaths.server", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def ask(self, what: str, **arguments: Any) -> Any:
        """Let the process call one of the methods of `server.Server` and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([what, arguments]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"the server died:\n{self.errors.read()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=LIMIT)
        self._process.stdout.close()
        self.errors.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
