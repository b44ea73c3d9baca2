"""What `compute` of a hook-style process does next without override: decided here, for the run and for its plan alike.

Nothing here has effects: `compute` acts on the decision, `plan` tells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h5py

from lazyproc.hdf5.hook_record import NOT_COMPARABLE, HookWork, same_arguments_recorded, same_parameters_recorded
from lazyproc.hdf5.search import remaining_positions

if TYPE_CHECKING:
    from lazyproc.hooks.contract import HookContract


@dataclass(frozen=True)
class Step:
    """What is done, and with which results.

    Attributes
    ----------
    action : str
        ``"return"``, ``"resume"`` or ``"start"``.
    group : h5py.Group or None
        What is returned or gone on with; None for a start.
    why : str
        Of a return: ``"found"`` finished, or ``"held"`` and finished by a class that cannot resume. Of a start:
        ``"other"`` work or ``"cannot resume"`` where there are results that are not gone on with; else empty.
    passed : h5py.Group or None
        These results.
    """

    action: str
    group: h5py.Group | None = None
    why: str = ""
    passed: h5py.Group | None = None


def next_step(
    process: HookContract,
    work: HookWork,
    arguments: str,
    finished: Sequence[h5py.Group],
    partial: Sequence[h5py.Group],
) -> Step:
    """Decide between returning, resuming and starting.

    Parameters
    ----------
    process : HookContract
        Whose group is held, perhaps, and whose class can resume or not.
    work : HookWork
        What is to be done.
    arguments : str
        The arguments of `compute`, as text.
    finished, partial : sequence of h5py.Group
        Open; as the search has found them. Partial ones are only looked at if no group is held.
    """
    same = of_same_work(finished, work, arguments)
    if same and not process._holds_chosen():
        return Step("return", same[-1], "found")
    held = process.h5_results_grp
    if held is None:
        same = of_same_work(partial, work, arguments)
        if not same:
            return Step("start")
        return Step("resume", same[-1]) if process._can_resume() else Step("start", None, "cannot resume", same[-1])
    if _is_done(process, held, work, arguments):
        return Step("return", held, "held")
    why = _why_afresh(process, held, work, arguments)
    return Step("start", None, why, held) if why else Step("resume", held)


def of_same_work(groups: Sequence[h5py.Group], work: HookWork, arguments: str) -> list[h5py.Group]:
    """Keep groups begun with the parameters as they are now, and these arguments of `compute`."""
    return [
        group
        for group in groups
        if same_arguments_recorded(group, work, arguments) and same_parameters_recorded(group, work)
    ]


def _is_done(process: HookContract, held: h5py.Group, work: HookWork, arguments: str) -> bool:
    """Tell whether a class that cannot resume has finished just this in the group that it holds."""
    if process._can_resume() or work.status_name not in held or not _is_same(held, work, arguments):
        return False
    return not remaining_positions(held, work.n_positions, work.status_name)


def _why_afresh(process: HookContract, held: h5py.Group, work: HookWork, arguments: str) -> str:
    """Tell why the group that is held is not gone on with; empty if it is: same work, or this phase not yet begun."""
    if work.status_name not in held:
        return ""
    if not _is_same(held, work, arguments):
        return "other"
    return "cannot resume" if not process._can_resume() and process._chosen != held.name else ""


def _is_same(held: h5py.Group, work: HookWork, arguments: str) -> bool:
    """Compare with the record of a group that is held; what cannot be compared counts as the same."""
    if work.parameters and not same_parameters_recorded(held, work):
        return False
    return arguments == NOT_COMPARABLE or same_arguments_recorded(held, work, arguments, unknown=True)
