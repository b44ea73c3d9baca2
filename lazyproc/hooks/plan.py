"""What `compute` of a hook-style process would do, and why it would not use some results: reads only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import h5py

from lazyproc.core.errors import ArgumentValueError
from lazyproc.core.memory import HOOKS_BYTES
from lazyproc.core.plan import Plan
from lazyproc.core.runs import Runs
from lazyproc.engine.cluster import active_client
from lazyproc.engine.limits import available_bytes
from lazyproc.hdf5.hook_record import group_differences, text_of
from lazyproc.hdf5.search import named_groups, remaining_positions
from lazyproc.hooks.step import next_step, of_same_work

if TYPE_CHECKING:
    from lazyproc.hooks.contract import HookContract


def plan_of_hooks(process: HookContract, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
    """Return what `compute` would do with these arguments, as the attributes of the process are now.

    Raises
    ------
    ArgumentValueError
        If the files are closed, or ``_max_pos_per_read`` leaves no position for a batch.
    """
    target_of_hooks(process)
    main = process.h5_main
    n_positions = int(main.shape[0])
    work, arguments = process._hook_work(), text_of(args, kwargs)
    finished = of_same_work([one for one in process.duplicate_h5_groups if one], work, arguments)
    partial = of_same_work([one for one in process.partial_h5_groups if one], work, arguments)
    step = next_step(process, work, arguments, finished, partial)
    action, group = step.action, step.group
    remaining = Runs.full(n_positions)
    if group is not None and (process._status_dset_name in group or "last_pixel" in group.attrs):
        remaining = remaining_positions(group, n_positions, process._status_dset_name)
    if action == "resume" and not remaining:
        action = "return"
    n_remaining = 0 if action == "return" else remaining.n_positions
    most = process._max_pos_per_read
    if not most >= 1:
        raise ArgumentValueError(f"_max_pos_per_read: is {most!r}; expected at least one position a batch.")
    batch = int(min(most, max(1, n_remaining)))
    source, position = process._bytes_per_position()
    available = available_bytes()
    allowed = available if process._max_bytes is None else min(process._max_bytes, available)
    return Plan(
        process_name=str(process.process_name),
        dataset=f"{process._main_path or main.file.filename}::{main.name}",
        action=action,
        group=None if group is None else str(group.name),
        duplicates=tuple(str(one.name) for one in finished),
        partial=tuple(str(one.name) for one in partial),
        n_positions=n_positions,
        n_done=n_positions - n_remaining,
        n_remaining=n_remaining,
        n_failed=0,
        n_blocks=-(-n_remaining // batch),
        block_positions=int(min(most, n_positions)),
        chunk_positions=1,
        n_workers=process._cores,
        scheduler=_where(process),
        bytes_per_position=int(position),
        worker_bytes=int(batch * position),
        projected_bytes=int(batch * position) + HOOKS_BYTES,
        allowed_bytes=allowed,
        source_bytes=n_remaining * source,
        result_bytes=None if group is None else n_remaining * _result_bytes(group, n_positions),
        seconds=None,
    )


def _where(process: HookContract) -> str:
    from lazyproc.hooks.contract import HookContract

    own = getattr(process._unit_computation, "__func__", process._unit_computation)
    if own is not HookContract._unit_computation:
        return "as its own _unit_computation does it"
    if process._client is not None or (process._cores > 1 and active_client() is not None):
        return "Dask cluster"
    return "this process" if process._cores == 1 else f"{process._cores} processes"


def _result_bytes(group: h5py.Group, n_positions: int) -> int:
    """Return the bytes that a position takes in the datasets of a results group."""
    datasets = (item for item in group.values() if isinstance(item, h5py.Dataset))
    return sum(one.size * one.dtype.itemsize // n_positions for one in datasets if one.shape[:1] == (n_positions,))


def why_not_of_hooks(process: HookContract, group: h5py.Group, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Tell what is different about the results in `group`, so that `compute` does not return or resume them."""
    work, target = process._hook_work(), target_of_hooks(process)
    lines = []
    there = [] if target is None else named_groups(target, work.main_name, work.process_name)
    if group.name not in [one.name for one in there]:
        wanted = f"{work.main_name.rpartition('/')[2]}-{work.process_name}_000"
        where = process._place.name if target is None else target.name
        lines.append(f"name: looked for are groups in {where} named like {wanted}, not {group.name}")
    lines += group_differences(group, work, text_of(args, kwargs))
    if lines:
        return "\n".join(lines)
    remaining = remaining_positions(group, work.n_positions, work.status_name)
    n_done = work.n_positions - remaining.n_positions
    lines = [f"no difference: {n_done} of {work.n_positions} positions of the same work are done"]
    if remaining and not process._can_resume():
        lines.append("the class has no _get_existing_datasets, so partial results cannot be resumed")
    return "\n".join(lines)


def target_of_hooks(process: HookContract) -> h5py.Group | None:
    """Return the target group, None if it is not there yet; raises ArgumentValueError if the files are closed."""
    target = process._target
    if not process.h5_main or not (target is None or target):
        raise ArgumentValueError(
            f"{process.process_name}: the main dataset's file is closed. Open it again and make a new Process."
        )
    return target
