"""Look at, and compute into, a damaged file: every step in a child process of its own that may hang or crash.

Run as a script it reads cases from standard input, a JSON object a line, and writes what came of each.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from damage.harm import Harm, harm_bytes, harm_marks, harm_objects
from damage.subject import CHANNEL, FINISHED, MAIN, MASK, PARAMETERS, PARTIAL, Peaks, Subject, build, truth, unharmed
from lazyproc import open_results
from lazyproc.core.errors import LazyprocError, ResultsError
from lazyproc.status import file_status

WATCHDOG = 120.0
"""Seconds for all steps of a case: a limit against hanging."""


class WrongNumber(Exception):
    """Something that counts as done is not the truth."""


class BadReport(Exception):
    """An error that does not say what is wrong."""


def wrong(where: str, name: str, rows: Any) -> WrongNumber:
    return WrongNumber(f"{where}: {name} is wrong at positions {rows}")


class Trial:
    """The steps of one case.

    Parameters
    ----------
    path : Path
        The damaged file.
    subject : Subject
        What it was.
    harm : Harm
        What was done to it.
    by : str
        "path" or "handle".
    """

    def __init__(self, path: Path, subject: Subject, harm: Harm, by: str) -> None:
        self.path, self.subject, self.harm, self.by = path, subject, harm, by
        self.outcomes: list[tuple[str, str, str]] = []

    def run(self) -> list[tuple[str, str, str]]:
        """Return for each step its name, what came of it, and the message."""
        self.step("status", self.status)
        self.step("status command", self.command)
        for name in (FINISHED, PARTIAL):
            self.step(f"open_results {name[-3:]}", lambda name=name: self.open(name))
        for name in (FINISHED, PARTIAL):
            self.step(f"look {name[-3:]}", lambda name=name: self.look(name))
            self.step(f"view {name[-3:]}", lambda name=name: self.view(name))
        for name in (FINISHED, PARTIAL):
            self.step(f"compute {name[-3:]}", lambda name=name: self.compute(name, False))
            self.step(f"override {name[-3:]}", lambda name=name: self.compute(name, True))
        self.step("target", self.elsewhere)
        harmed = unharmed(self.path, self.subject, self.harm.spans)
        if harmed:
            self.outcomes.append(("afterwards", "HARMED", str(harmed)))
        return self.outcomes

    def step(self, name: str, action: Callable[[], None]) -> None:
        begin = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                action()
                outcome, text = "ok", ""
            except WrongNumber as error:
                outcome, text = "WRONG", str(error)
            except (LazyprocError, OSError) as error:
                outcome, text = type(error).__name__, str(error)
                if not isinstance(error, LazyprocError):
                    outcome, text = f"PLAIN {outcome}", "".join(traceback.format_exception(error))
                elif str(self.path) not in text and CHANNEL not in text and "Raw_Data" not in text:
                    outcome = f"NAMELESS {outcome}"
            except BaseException as error:
                outcome, text = f"BARE {type(error).__name__}", "".join(traceback.format_exception(error))
        if caught:
            text += f"\nwarnings: {[str(one.message) for one in caught]}"
            outcome = f"WARNED {outcome}" if outcome == "ok" else outcome
        if time.monotonic() - begin > 30:
            outcome = f"SLOW {outcome}"
        self.outcomes.append((name, outcome, text))

    # -- steps -----------------------------------------------------------------------------------------------------

    def status(self) -> None:
        file_status(str(self.path))

    def command(self) -> None:
        from lazyproc.cli import main

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                main(["status", str(self.path)], standalone_mode=True)
            except SystemExit as leaving:
                if leaving.code not in (0, None) and not said.getvalue().startswith("Error: "):
                    raise BadReport(said.getvalue()) from None

    def open(self, name: str) -> None:
        maps = open_results(f"{self.path}::{CHANNEL}/{name}").load()
        repr(maps)
        if "status" not in maps or self.harm.values:
            return
        done = np.asarray(maps["status"]).T.ravel() == 1
        expected = truth(self.subject.source, PARAMETERS[name])
        for key, values in expected.items():
            if key in maps:
                self.compare(f"open_results {name}", key, np.asarray(maps[key]), values, done)

    def compare(self, where: str, key: str, found: Any, values: Any, done: Any) -> None:
        found = found.reshape(found.shape[0] * found.shape[1], -1) if found.ndim > 1 else found.reshape(-1, 1)
        if found.shape != values.shape:
            return
        # X varies fastest, and comes first among the dimensions
        order = np.arange(len(values)).reshape(5, 6).T.ravel()
        rows = order[done[order]]
        pairs = zip(order, found, strict=True)
        bad = [int(row) for row, one in pairs if done[row] and not np.array_equal(one, values[row])]
        if bad and len(rows):
            raise wrong(where, key, bad)

    @contextlib.contextmanager
    def process(self, name: str, **options: Any) -> Iterator[Peaks]:
        parameters = PARAMETERS[name]
        if self.by == "path":
            with Peaks(f"{self.path}::{MAIN}", parms_dict=parameters, cores=1, **options) as process:
                yield process
            return
        try:
            file = h5py.File(self.path, "r+")
            main = file[MAIN]
        except Exception as error:  # the caller's own affair
            raise ResultsError(f"{self.path}: not opened by the caller: {error}") from error
        try:
            with Peaks(main, parms_dict=parameters, cores=1, **options) as process:
                yield process
        finally:
            with contextlib.suppress(Exception):
                file.close()

    def look(self, name: str) -> None:
        with self.process(name) as process:
            repr(process)
            repr(process.plan())
            for group in (FINISHED, PARTIAL):
                if isinstance(_get(process.h5_main.parent, group), h5py.Group):
                    process.why_not_duplicate(group)

    def view(self, name: str) -> None:
        with self.process(name) as process:
            maps = process.to_xarray().load()
            if self.harm.values:
                return
            for key, values in truth(self.subject.source, PARAMETERS[name]).items():
                self.compare("to_xarray", key, np.asarray(maps[key]), values, np.ones(len(values), bool))

    def compute(self, name: str, override: bool) -> None:
        with self.process(name) as process:
            group = process.compute(override)
            self.check(group, name, f"compute({override})", override)

    def elsewhere(self) -> None:
        with self.process(PARTIAL, h5_target_group=f"{self.path}.out.h5::/results") as process:
            self.check(process.compute(), PARTIAL, "another file", True)

    def check(self, group: h5py.Group, name: str, where: str, fresh: bool) -> None:
        if MASK in group and not np.all(group[MASK][()] == 1):
            raise WrongNumber(f"{where}: {group.name} is not all done")
        if self.harm.values and not fresh:
            return
        for key, values in truth(self.subject.source, PARAMETERS[name]).items():
            bad = np.flatnonzero((group[key][()] != values).any(axis=1))
            if bad.size:
                raise wrong(f"{where} {group.name}", key, bad.tolist())


def _get(group: h5py.Group, name: str) -> Any:
    try:
        return group.get(name)
    except Exception:
        return None


def parent_is_sound(path: Path, subject: Subject) -> bool:
    """Tell whether plain h5py finds the main dataset and can list its group."""
    try:
        with h5py.File(path, "r") as file:
            channel = file[CHANNEL]
            names = list(channel)
            for name in names:
                channel.get(name, getlink=True)
            if not all(isinstance(file.get(name), h5py.Dataset) for name in subject.kept):
                return False
            for name in subject.kept:
                dict(file[name].attrs)
            return bool(np.array_equal(file[MAIN][()], subject.source))
    except Exception:
        return False


def in_child(action: Callable[[], Any], seconds: float = WATCHDOG) -> dict[str, Any]:
    """Run in a forked process and return what it returned, or how it died."""
    readable, writable = os.pipe()
    crash = tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(readable)
            faulthandler.enable(crash)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(crash.fileno(), 2)
            with os.fdopen(writable, "w") as pipe:
                json.dump(action(), pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writable)
    text, hung = _read_all(readable, seconds)
    if hung:
        os.kill(child, signal.SIGABRT)
    _, status = os.waitpid(child, 0)
    if hung:
        crash.seek(0)
        return {"died": "hung", "trace": crash.read().decode(errors="replace")[:3000]}
    if status:
        crash.seek(0)
        died = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        return {"died": died, "trace": crash.read().decode(errors="replace")[:3000]}
    return {"result": json.loads(text)}


def _read_all(descriptor: int, seconds: float) -> tuple[str, bool]:
    parts, deadline = [], time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([descriptor], [], [], left)[0]:
                part = os.read(descriptor, 65536)
                if not part:
                    return b"".join(parts).decode(), False
                parts.append(part)
        return "", True
    finally:
        os.close(descriptor)


HARMS = {"bytes": harm_bytes, "objects": harm_objects, "marks": harm_marks}


def do_case(case: dict[str, Any], subject: Subject, folder: Path) -> dict[str, Any]:
    """Damage the subject, try everything, and tell what came of it."""
    random = np.random.default_rng(case["seed"])
    path = folder / "damaged.h5"
    for old in folder.iterdir():
        old.unlink()
    harm = HARMS[case["how"]](path, subject, random)
    by = "handle" if case.get("by") == "handle" else "path"
    sound = in_child(lambda: parent_is_sound(path, subject), 20).get("result", False)
    answer = in_child(lambda: Trial(path, subject, harm, by).run())
    return {**case, "harm": harm.text, "parent": harm.parent, "values": harm.values, "sound": sound, **answer}


def main() -> None:
    """Serve cases until the input ends."""
    for name in ("dask.array", "dask.threaded", "lazyproc.cli", "xarray"):  # once, not in each child
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        subject = build(root)
        folder = root / "case"
        folder.mkdir()
        for line in sys.stdin:
            print(json.dumps(do_case(json.loads(line), subject, folder)), flush=True)


if __name__ == "__main__":
    main()
