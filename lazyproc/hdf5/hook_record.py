"""Work of hook-style processes in a file: what is recorded with a status mask, and finding groups of the same work.

A subclass of the old contract creates its datasets itself, in its own ways, so the base keeps its record on the one
thing that it creates: the status mask of each phase. Groups that pyUSID wrote have no record; there the parameters must
stand among the group's attributes, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import h5py

from lazyproc.core.errors import ParameterError, ResultsError
from lazyproc.core.parameters import arguments_text, same, same_arguments
from lazyproc.core.runs import Runs
from lazyproc.hdf5.attributes import read_parameters
from lazyproc.hdf5.create import create_status_mask
from lazyproc.hdf5.search import file_differences, named_groups, remaining_positions, source_name
from lazyproc.hdf5.usid import read_text

NO_ARGUMENTS = arguments_text((), {})
_PARAMETERS, _ARGUMENTS, _FINGERPRINT, _SOURCE = (
    "lazyproc_parameters",
    "lazyproc_arguments",
    "lazyproc_fingerprint",
    "lazyproc_source",
)


@dataclass(frozen=True)
class HookWork:
    """What a hook-style process is about to do, as far as it decides whether two runs are the same.

    Attributes
    ----------
    main_name, main_file : str
        The main dataset and its file.
    n_positions : int
        Its rows.
    process_name : str
        With ``-`` already turned into ``_``.
    parameters : mapping
        What the subclass calls its parameters; empty says nothing, and so matches whatever was stored.
    status_name : str
        The status mask of the present phase.
    fingerprint : callable
        A stored fingerprint to the present one, made the same way; empty if it is not verified.
    """

    main_name: str
    main_file: str
    n_positions: int
    process_name: str
    parameters: Mapping[str, Any]
    status_name: str
    fingerprint: Callable[[str], str] = field(repr=False)


def find_groups(target: h5py.Group, work: HookWork) -> tuple[list[h5py.Group], list[h5py.Group]]:
    """Find groups of the same work, finished and partial; writes nothing.

    Groups without a usable status mask or ``last_pixel`` are leftovers, and are passed over.
    """
    finished: list[h5py.Group] = []
    partial: list[h5py.Group] = []
    for group in named_groups(target, work.main_name, work.process_name):
        if not (_same_source(group, work) and _same_parameters(group, work)):
            continue
        try:
            remaining = remaining_positions(group, work.n_positions, work.status_name)
        except ResultsError:
            continue
        (partial if remaining else finished).append(group)
    return finished, partial


def _record(group: h5py.Group, status_name: str) -> Mapping[str, Any]:
    mask = group.get(status_name)
    return mask.attrs if isinstance(mask, h5py.Dataset) else {}


def _same_source(group: h5py.Group, work: HookWork) -> bool:
    record = _record(group, work.status_name)
    stored = read_text(record.get(_FINGERPRINT, ""))
    recorded_name = read_text(record[_SOURCE]) if _SOURCE in record else source_name(group)
    if stored and recorded_name == work.main_name:
        now = work.fingerprint(stored)
        if now:
            return now == stored
    # A later phase may have worked on another dataset of the same group; the group tells what the first one was.
    first_name = source_name(group)
    return first_name in (None, work.main_name) and not list(file_differences(group, work.main_file))


def _same_parameters(group: h5py.Group, work: HookWork) -> bool:
    if not work.parameters:
        return True
    try:
        wanted = arguments_text((), work.parameters)
    except ParameterError:
        return False  # such as a reference: it cannot be compared, so nothing is known to be the same
    record = _record(group, work.status_name)
    if _PARAMETERS in record:
        return same_arguments(read_text(record[_PARAMETERS]), wanted)
    stored_parameters = read_parameters(group)
    return all(
        key in stored_parameters and same(stored_parameters[key], value)
        for key, value in work.parameters.items()
        if value is not None  # HDF5 has no None: pyUSID leaves such attributes out
    ) and not any(key in stored_parameters for key, value in work.parameters.items() if value is None)


def stored_arguments(group: h5py.Group, status_name: str) -> str:
    """Return the arguments of `compute` with which a group was begun; none for groups without a record."""
    return read_text(_record(group, status_name).get(_ARGUMENTS, NO_ARGUMENTS))


def ensure_status_mask(group: h5py.Group, work: HookWork, arguments: str, fingerprint: str) -> h5py.Dataset:
    """Return the status mask of the present phase; made, and filled up to ``last_pixel``, if it is not there.

    Raises
    ------
    ResultsError
        If something else has its name, or it has another shape or type.
    """
    if work.status_name in group:
        remaining_positions(group, work.n_positions, work.status_name)  # checks it
        return group[work.status_name]
    done = Runs.empty()
    if "last_pixel" in group.attrs:
        done = Runs.full(work.n_positions).difference(remaining_positions(group, work.n_positions, work.status_name))
    mask = create_status_mask(group, work.n_positions, work.status_name)
    for start, stop in done:
        mask[start:stop] = 1
    try:
        mask.attrs[_PARAMETERS] = arguments_text((), work.parameters)
    except ParameterError:
        pass  # cannot be compared later either: such a group is found by the subclass itself
    mask.attrs[_ARGUMENTS] = arguments
    mask.attrs[_FINGERPRINT] = fingerprint
    mask.attrs[_SOURCE] = work.main_name
    return mask
