"""What a Process shows of itself, at a prompt and in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

import h5py

from lazyproc.core.jsonform import show

if TYPE_CHECKING:
    from lazyproc.process import Process


def lines_of(process: Process) -> list[tuple[str, str]]:
    """Return the lines, each with its label."""
    name = str(process.process_name)
    if not process.h5_main:
        return [("process", name), ("main dataset", "closed")]
    main = process.h5_main
    n_positions, n_spectral = main.shape
    parameters = (f"{key}={show(value)}" for key, value in (process.parms_dict or {}).items())
    lines = [
        ("process", name),
        ("main dataset", f"{process._main_path or main.file.filename}::{main.name}"),
        ("shape", f"{n_positions:,} positions x {n_spectral:,} values, {main.dtype}"),
        ("outputs", _outputs(process)),
        ("parameters", ", ".join(parameters) or "none"),
        ("target group", f"{process._place.path}::{process._place.name}"),
        ("finished results", _names(process.duplicate_h5_groups)),
        ("partial results", _names(process.partial_h5_groups)),
    ]
    failed = (f"{count:,} in {group.rpartition('/')[2]}" for group, count in process._n_failed.items())
    return [*lines, ("failed positions", ", ".join(failed))] if process._n_failed else lines


def _outputs(process: Process) -> str:
    if not process._declares:
        return "created by the class itself"
    return ", ".join(f"{one.name} {one.shape or ''} {one.dtype}" for one in process._outputs)


def _names(groups: list[h5py.Group]) -> str:
    return ", ".join(str(group.name).rpartition("/")[2] if group else "closed" for group in groups) or "none"
