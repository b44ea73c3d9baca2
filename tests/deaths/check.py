"""What must hold after a death: nothing of the user's is harmed, and what is marked done is right."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lazyproc import cli
from lazyproc.status import file_status

from .layouts import MASK, N_POSITIONS, Layout, expected, set_sizes
from .processes import CALLS
from .snapshots import Snapshot, differences, seen_by_lazyproc, snapshot, steady


@dataclass
class Findings:
    """What was found after a death.

    Attributes
    ----------
    problems : list of str
        What must not be; empty if all is well.
    n_marked : int
        Positions marked done when the process died.
    n_lost : int
        Positions computed before the death that had to be computed again.
    n_again : int
        Positions computed to get to the end.
    recovered : bool
        Whether there was anything to recover.
    """

    problems: list[str] = field(default_factory=list)
    n_marked: int = 0
    n_lost: int = 0
    n_again: int = 0
    recovered: bool = False


class Checker:
    """Looks at a folder of a layout after a death.

    Parameters
    ----------
    layout : Layout
        The layout.
    folder : str
        Where its files are.
    before : dict of str to Snapshot
        The files before anything was computed, by their base names.
    after : dict of str to Snapshot
        The same after an undisturbed run.
    """

    def __init__(self, layout: Layout, folder: str, before: dict[str, Snapshot], after: dict[str, Snapshot]) -> None:
        self.layout = layout
        self.folder = folder
        self.before = before
        self.after = after
        self.new_group = f"{layout.parent}/{layout.prefix}"

    def examine(self, *, recover: bool) -> Findings:
        """Look at what a death left behind, go on to the end, and look again.

        Parameters
        ----------
        recover : bool
            Recover first, as `lazyproc recover` does, and then look; else leave that to `compute`.
        """
        findings = Findings()
        recover = recover or self.layout.needs_recover
        # While a journal lies there, plain h5py may find anything, and may even hang. lazyproc sees through it.
        found = self._problems_now(seen_by_lazyproc if self._has_journal() else snapshot)
        findings.problems += [f"as it was left: {one}" for one in found]
        with _collect(findings, "status"):
            if self.layout.results(self.folder).exists():
                file_status(str(self.layout.results(self.folder)))
        if recover:
            with _collect(findings, "recover"):
                findings.recovered = any([recover_file(path) for path in self._files()])
            findings.problems += [f"recovered: {one}" for one in self._problems_now(snapshot)]
        self._go_on(findings, looked=not self._has_journal())
        return findings

    def _go_on(self, findings: Findings, *, looked: bool) -> None:
        lines = _lines()
        called, committed = _positions(lines), _committed(lines)
        marked = np.zeros(N_POSITIONS, bool)
        if looked:
            with contextlib.suppress(Exception):
                marked = self.marked()
        set_sizes(self.layout)
        with _collect(findings, "resuming"), self.layout.process(self.folder) as process:
            process._progress = lambda event: None
            process.compute()
        again = sorted(_positions(_lines()[len(lines) :]))
        findings.n_marked = int(marked.sum())
        findings.n_lost, findings.n_again = len(called.intersection(again)), len(again)
        if self.layout.cores == 1 and committed.intersection(again):
            findings.problems.append(f"committed, but computed again: {sorted(committed.intersection(again))}")
        if looked and not findings.problems and again != np.flatnonzero(~marked).tolist():
            findings.problems.append(f"resuming computed {again}, marked were {np.flatnonzero(marked).tolist()}")
        findings.problems += [f"at the end: {one}" for one in self.problems_at_the_end()]

    def _files(self) -> list[str]:
        paths = dict.fromkeys((self.layout.scan(self.folder), self.layout.results(self.folder)))
        return [str(path) for path in paths if path.exists()]

    def _has_journal(self) -> bool:
        return any(is_journal(name) for name in os.listdir(self.folder))

    def _problems_now(self, look: Callable[[str], Snapshot]) -> list[str]:
        problems: list[str] = []
        for path in self._files():
            try:
                now = look(path)
            except Exception as error:
                problems.append(f"{os.path.basename(path)} cannot be read: {type(error).__name__}: {error}")
                continue
            before = self.before.get(os.path.basename(path))
            if before is not None:
                problems += differences(before, self._without_begun(now), self.new_group)
        if look is snapshot and not problems:
            try:
                self.marked()
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")
        return problems

    def _without_begun(self, now: Snapshot) -> Snapshot:
        """Take what was there of results from before: the rest of them may be filled in."""
        if self.layout.begun is None:
            return now
        before = self.before[self.layout.results(self.folder).name]
        return {
            name: before.get(name, content) if name.startswith(self.new_group) else content
            for name, content in now.items()
        }

    def groups(self, file: h5py.File) -> list[h5py.Group]:
        """Return the results groups."""
        parent = file.get(self.layout.parent)
        if parent is None:
            return []
        return [parent[name] for name in parent if name.startswith(self.layout.prefix)]

    def marked(self) -> NDArray[np.bool_]:
        """Return which positions are marked done; raises AssertionError if one of them is not right."""
        path = self.layout.results(self.folder)
        marked = np.zeros(N_POSITIONS, bool)
        if not path.exists():
            return marked
        with h5py.File(path, "r") as file:
            groups = self.groups(file)
            assert self.layout.may_leave_groups or len(groups) <= 1, groups
            for group in groups:
                if MASK not in group and self.layout.may_leave_groups:
                    continue
                mask = group[MASK][:]
                assert set(mask.tolist()) <= {0, 1}, f"{group.name}: the mask holds {mask.tolist()}"
                marked = mask.astype(bool)
                for name, values in expected(self.layout).items():
                    wrong = marked & _differ(group[name][:], values)
                    assert not wrong.any(), f"{group.name}/{name}: marked but wrong {np.flatnonzero(wrong).tolist()}"
        return marked

    def problems_at_the_end(self) -> Iterator[str]:
        """Compare with an undisturbed run."""
        try:
            if not self.marked().all():
                yield f"not all is marked: {self.marked().astype(int).tolist()}"
            files = {name for name in os.listdir(self.folder)}
            if files != self.after.keys():
                yield f"the folder holds {sorted(files)}, expected {sorted(self.after)}"
            for name, wanted in self.after.items():
                now = snapshot(os.path.join(self.folder, name))
                if self.layout.may_leave_groups:  # a further group is what tells it from an undisturbed run
                    yield from differences(self.before.get(name, {}), now, self.new_group)
                    continue
                yield from differences(steady(wanted), steady(now))
                yield from (f"{one} is missing" for one in wanted.keys() - now.keys())
        except Exception as error:
            yield f"{type(error).__name__}: {error}"


def _differ(now: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell in which rows bits differ."""
    bits = [np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1) for array in (now, wanted)]
    return (bits[0] != bits[1]).any(axis=1)


@contextlib.contextmanager
def _collect(findings: Findings, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        findings.problems.append(f"{what}: {type(error).__name__}: {error}")


def is_journal(path: str) -> bool:
    """Tell whether a file is a journal, by its name: not the lock, the fence, or another sidecar file."""
    return path.endswith((".lazyproc-journal", ".lazyproc-undo"))


def recover_file(path: str) -> bool:
    """Recover as `lazyproc recover` does; return whether there was anything to do."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.recover.callback is not None
        try:
            cli.recover.callback(file=path, as_json=False)
        except SystemExit as error:
            raise RuntimeError(f"lazyproc recover: exit code {error.code}") from error
    return "nothing to recover" not in output.getvalue()


BEGUN, COMMITTED = "begun", "committed"
"""Lines among those that tell which positions the function was called for: a run has begun, or has committed them."""


def _lines() -> list[str]:
    try:
        return Path(os.environ[CALLS]).read_text().split()
    except FileNotFoundError:
        return []


def _positions(lines: list[str]) -> set[int]:
    return {int(line) for line in lines if line not in (BEGUN, COMMITTED)}


def _committed(lines: list[str]) -> set[int]:
    """Return the positions that a run was called for before it committed what it had done."""
    found: set[int] = set()
    waiting: set[int] = set()
    for line in lines:
        if line == BEGUN:
            waiting = set()
        elif line == COMMITTED:
            found |= waiting
        else:
            waiting.add(int(line))
    return found


def note_line(line: str) -> None:
    """Put `BEGUN` or `COMMITTED` among the positions that were called."""
    with open(os.environ[CALLS], "a") as file:
        file.write(f"{line}\n")
