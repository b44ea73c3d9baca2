"""A Python process with the shim and all imports done, which forks a child for each thing that is to be tried.

It is told what to do by `stage.Stage`, one line of JSON after the other: the methods of `Server`. The child of a step
is the driver of a run; it is armed just before the run begins.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import shim

LIMIT = 120
"""Seconds after which a step is taken to hang."""


class Server:
    """What happens in the process: it keeps the pristine files of one layout at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.pristine = folder / "pristine"
        self.control = shim.Control(folder / "control")
        self.keepers = folder / "keepers"
        self.layout: Any = None
        self.checker: Any = None
        self.events: list[shim.Event] = []
        self.files: dict[str, tuple[int, bytes]] = {}
        self.drivers: list[int] = []

    def set_layout(self, name: str) -> dict[str, Any]:
        """Make a layout's files, let an undisturbed run work on them, and keep what came out; returns its record."""
        from .check import Checker, snapshot
        from .layouts import BY_NAME

        self.layout = BY_NAME[name]
        for path in (self.work, self.pristine):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        self.layout.make(self.work)  # with the paths that attributes may hold
        for path in self.work.iterdir():
            shutil.copy(path, self.pristine)
        before = {path.name: snapshot(path) for path in self.pristine.iterdir()}
        record = str(self.folder / "record")
        Path(record).unlink(missing_ok=True)
        begin = time.monotonic()
        first = self.run([{"record": record}])[0]
        seconds = time.monotonic() - begin
        if "error" in first or first["signal"]:
            raise RuntimeError(f"{name}: already the undisturbed run fails: {first}")
        after = {path.name: snapshot(path) for path in self.work.iterdir() if path.suffix == ".h5"}
        self.checker = Checker(self.layout, str(self.work), before, after)
        if problems := list(self.checker.problems_at_the_end()):
            raise RuntimeError(f"{name}: already the undisturbed run is not right: {problems}")
        return {"record": record, "seconds": seconds}

    def restore(self) -> None:
        """Put the pristine files back, into the same inodes: a journal knows its file by that."""
        for path in self.work.iterdir():
            if not (self.pristine / path.name).exists():
                path.unlink()
        for path in self.pristine.iterdir():
            with open(self.work / path.name, "r+b") as file:
                file.truncate(0)
                file.write(path.read_bytes())
        (self.folder / "calls").unlink(missing_ok=True)

    def run(self, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Start from the pristine files and let one driver after the other run; each may die. See `step`."""
        self.end_drivers()
        self.restore()
        return [self.step(**step) for step in steps]

    def step(
        self, action: str = "compute", after: float | None = None, interval: float = 0.0, **arm: Any
    ) -> dict[str, Any]:
        """Let a driver do something, armed with what `Control.arm` takes; killed after some seconds if told so."""
        pid, answers = _fork(lambda: self._act(action, interval, arm))
        begin = time.monotonic()
        answer = _wait(pid, answers, after)
        self.control.disarm()
        self.drivers.append(pid)
        return {
            **answer,
            "seconds": time.monotonic() - begin,
            "died": answer["signal"] != 0 or self.control.block.died_kind != 0,
        }

    def _act(self, action: str, interval: float, arm: dict[str, Any]) -> Any:
        from .actions import ACTIONS

        # A sync makes no difference to a process that dies; it only takes time.
        self.control.arm(str(self.work), **{"skip_syncs": True, **arm})
        ACTIONS[action](self.layout, str(self.work), interval)
        self.control.disarm()

    def end_drivers(self) -> None:
        """Kill what drivers have left behind."""
        while self.drivers:
            try:
                os.killpg(self.drivers.pop(), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def trial(self, steps: list[dict[str, Any]], recover: bool = True) -> dict[str, Any]:
        """Run steps from the pristine files and examine what they leave behind."""
        outcomes = self.run(steps)
        return {"steps": outcomes, **self.examine(recover)}

    def examine(self, recover: bool = True) -> dict[str, Any]:
        """Examine the files as they are now, in a child; workers of drivers that died may still be at work."""

        def work() -> dict[str, Any]:
            self.control.arm(str(self.work), skip_syncs=True)
            return asdict(self.checker.examine(recover=recover))

        pid, answers = _fork(work)
        answer = _wait(pid, answers, None)
        self.control.disarm()
        self.drivers.append(pid)
        self.end_drivers()
        if "error" in answer or answer["signal"]:
            return {"problems": [f"examining: {answer}"], "n_marked": 0, "n_lost": 0, "n_again": 0}
        return dict(answer["answer"])

    # -- power cuts

    def record(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """Run steps from the pristine files and keep the record of all of them, to be replayed; returns its place."""
        self.end_drivers()
        shutil.rmtree(self.keepers, ignore_errors=True)
        self.keepers.mkdir()
        self.restore()
        self.files = {path.name: (path.stat().st_ino, path.read_bytes()) for path in self.work.iterdir()}
        record = self.folder / "replayed"
        record.unlink(missing_ok=True)
        outcomes = [self.step(**{"record": str(record), **step}) for step in steps]
        self.events = list(shim.read_record(record))
        for path in self.work.iterdir():
            os.link(path, self.keepers / str(path.stat().st_ino))
        return {"record": str(record), "steps": outcomes}

    def replay_all(self) -> list[str]:
        """Compare the files with what the whole record says: nothing may have gone past the shim."""
        from .power import Disk

        disk = Disk(self.work, self.files)
        for event in self.events:
            disk.play(event)
        wanted = disk.without_cut()
        found = {path.name: path.read_bytes() for path in self.work.iterdir()}
        return [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]

    def cut(self, n_events: int, seed: str, keep: float, recover: bool = True, syncs: bool = True) -> dict[str, Any]:
        """Cut the power after so many calls of the record, and examine what is left; without syncs all is pending."""
        from .layouts import N_POSITIONS
        from .power import Disk, claimed, put_back

        disk = Disk(self.work, self.files)
        for event in self.events[:n_events]:
            disk.play(event, syncs=syncs)
        (self.folder / "calls").unlink(missing_ok=True)
        put_back(self.work, disk.after_cut(random.Random(seed), keep), self.keepers)
        findings = self.examine(recover)
        promised = claimed(self.events[:n_events], each_block=self.layout.kind.startswith("hooks"))
        if findings["n_again"] > N_POSITIONS - promised:
            findings["problems"].append(f"{findings['n_again']} positions were computed, {promised} were committed")
        return findings


def _fork(work: Callable[[], Any]) -> tuple[int, int]:
    """Let a child do some work; return its id and where it says what came of it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.setpgid(0, 0)
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)
        try:
            answer = {"answer": work()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with open(writing, "w") as file:
            json.dump(answer, file)
        sys.stderr.flush()
        code = 0
    finally:
        os._exit(code)


def _wait(pid: int, answers: int, kill_after: float | None) -> dict[str, Any]:
    """Wait for a child; kill it after some seconds, whatever it is doing, if told so."""
    descriptor = os.pidfd_open(pid)
    try:
        ended = select.select([descriptor], [], [], LIMIT if kill_after is None else kill_after)[0]
        if not ended:
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if not ended and kill_after is None:
            return {"error": f"still running after {LIMIT} s", "signal": died}
        os.set_blocking(answers, False)
        try:
            text = os.read(answers, 2**20)
        except BlockingIOError:  # workers that it left behind hold the other end
            text = b""
        return {**(json.loads(text) if text else {}), "signal": died}
    finally:
        os.close(answers)
        os.close(descriptor)


def main() -> None:
    """Answer until there are no more questions."""
    from . import actions, check, layouts  # noqa: F401  everything is imported before the first fork

    actions.import_all()
    server = Server(Path(sys.argv[1]))
    gc.freeze()
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = {"answer": getattr(server, what)(**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
