"""Work of hook-style processes in a file: the record kept with each status mask, and finding groups of the same work.

A subclass of the old contract creates its datasets itself, in its own ways, so the base keeps its record on the one
thing that it creates: the status mask of each phase. Groups that pyUSID wrote have no record; there the parameters must
stand among the group's attributes, exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from lazyproc.core.canonical import same
from lazyproc.core.errors import ParameterError, ResultsError
from lazyproc.core.jsonform import dumps, from_json, show
from lazyproc.core.parameters import arguments_text, same_arguments
from lazyproc.core.runs import Runs
from lazyproc.hdf5.attributes import read_parameters
from lazyproc.hdf5.create import create_status_mask
from lazyproc.hdf5.damage import members, reading
from lazyproc.hdf5.origin import file_differences, other_file_differences, source_name
from lazyproc.hdf5.search import BATCH, named_groups, remaining_positions
from lazyproc.hdf5.usid import read_text

NO_ARGUMENTS = arguments_text((), {})
NOT_COMPARABLE = ""
"""Stands for parameters or arguments that have no text, such as references: never the same as any others."""
_PARAMETERS, _SEARCHED, _ARGUMENTS, _FINGERPRINT, _SOURCE, _PHASE = (
    "lazyproc_parameters",
    "lazyproc_searched",
    "lazyproc_arguments",
    "lazyproc_fingerprint",
    "lazyproc_source",
    "lazyproc_phase",
)
_LONGEST_TEXT = 2**14
"""Bytes: longer texts are kept as their hash, since HDF5 refuses attributes above 64 KiB in all."""


def text_of(args: tuple[Any, ...], values: Mapping[str, Any]) -> str:
    """Return arguments or parameters as text, to compare them; `NOT_COMPARABLE` where that is impossible."""
    try:
        return arguments_text(args, values)
    except ParameterError:
        return NOT_COMPARABLE


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
        What the subclass calls its parameters.
    status_name : str
        The status mask of the present phase.
    fingerprint : callable
        A stored fingerprint to the present one, made the same way; empty if it is not verified.
    searched : str
        The parameters as text when the process last looked for earlier results; they may have grown since.
    batch : str
        Of which jobs, one after another, results that are begun are said to be; empty if of none.
    """

    main_name: str
    main_file: str
    n_positions: int
    process_name: str
    parameters: Mapping[str, Any]
    status_name: str
    fingerprint: Callable[[str], str] = field(repr=False)
    searched: str = NOT_COMPARABLE
    batch: str = ""


def find_groups(
    target: h5py.Group, work: HookWork, *, exact: bool = False
) -> tuple[list[h5py.Group], list[h5py.Group]]:
    """Find groups of the same work, finished and partial; writes nothing.

    Groups without a usable status mask or ``last_pixel`` are leftovers, and are passed over. Unless `exact`, empty
    parameters match whatever was stored: so do old subclasses look for the results of an earlier phase.
    """
    finished: list[h5py.Group] = []
    partial: list[h5py.Group] = []
    for group in named_groups(target, work.main_name, work.process_name):
        try:
            if not (_same_parameters(group, work, exact) and _same_source(group, work)):
                continue
            remaining = remaining_positions(group, work.n_positions, work.status_name)
        except ResultsError:  # one damaged group must not stand in the way of all others
            continue
        (partial if remaining else finished).append(group)
    return finished, partial


def _record(group: h5py.Group, status_name: str) -> Mapping[str, Any]:
    mask = group.get(status_name)
    return mask.attrs if isinstance(mask, h5py.Dataset) else {}


def has_record(group: h5py.Group, status_name: str) -> bool:
    """Tell whether the phase with this status mask was computed here, not by pyUSID."""
    return _PHASE in _record(group, status_name)


def group_differences(group: h5py.Group, work: HookWork, arguments: str) -> list[str]:
    """Tell in words why a group is not one of the same work, or not one that can be used; empty if it is."""
    lines: list[str] = []
    try:
        with reading(f"Results group {group.name!r}"):
            if not (_same_parameters(group, work, True) and same_parameters_recorded(group, work)):
                lines += _parameter_differences(group, work)
            if not same_arguments_recorded(group, work, arguments):
                stored = read_text(_record(group, work.status_name).get(_ARGUMENTS, NO_ARGUMENTS))
                wanted = arguments or "some that cannot be compared"
                lines.append(f"arguments of compute: stored {stored or 'some that could not be'}, wanted {wanted}")
            lines += _source_differences(group, work)
            remaining_positions(group, work.n_positions, work.status_name)
    except ResultsError as error:
        lines.append(str(error))
    return lines


def _parameter_differences(group: h5py.Group, work: HookWork) -> list[str]:
    """Tell how the parameters differ, by name; at least one line."""
    wanted_text = text_of((), work.parameters)
    if wanted_text == NOT_COMPARABLE:
        return ["parameters: some of them, such as HDF5 references, cannot be compared, so no results count as theirs"]
    stored_text = read_text(_record(group, work.status_name).get(_PARAMETERS, NOT_COMPARABLE))
    lines: list[str] = []
    if stored_text.startswith("{"):
        stored, wanted = (json.loads(text)["kwargs"] for text in (stored_text, wanted_text))
        for name in dict.fromkeys((*stored, *wanted)):
            pair = [dumps({"args": [], "kwargs": {name: one[name]}}) if name in one else "" for one in (stored, wanted)]
            if not same_arguments(*pair):
                told = [show(from_json(one[name])) if name in one else "none" for one in (stored, wanted)]
                lines.append(f"{name}: stored {told[0]}, wanted {told[1]}")
    elif stored_text == NOT_COMPARABLE:
        attributes = read_parameters(group)
        for name, value in work.parameters.items():
            if value is None and name in attributes:
                lines.append(f"{name}: stored {show(attributes[name])}, wanted None")
            elif value is not None and name not in attributes:
                lines.append(f"{name}: stored none, wanted {show(value)}")
            elif value is not None and not same(attributes[name], value):
                lines.append(f"{name}: stored {show(attributes[name])}, wanted {show(value)}")
    return lines or ["parameters: stored others, which are too long, or of a kind, to be told"]


def _same_source(group: h5py.Group, work: HookWork) -> bool:
    return next(_source_differences(group, work), None) is None


def _source_differences(group: h5py.Group, work: HookWork) -> Iterator[str]:
    record = _record(group, work.status_name)
    stored = read_text(record.get(_FINGERPRINT, ""))
    recorded_name = read_text(record[_SOURCE]) if _SOURCE in record else source_name(group)
    if stored and recorded_name == work.main_name:
        now = work.fingerprint(stored)
        if now:
            if now != stored:
                yield f"source: the values of {work.main_name} have changed since (fingerprint {stored}, now {now})"
            yield from other_file_differences(group, work.main_file)
            return
    # A later phase may have worked on another dataset of the same group; the group tells what the first one was.
    first_name = source_name(group)
    if first_name not in (None, work.main_name):
        yield f"source: stored results of {first_name}, wanted {work.main_name}"
    yield from file_differences(group, work.main_file)


def _same_parameters(group: h5py.Group, work: HookWork, exact: bool) -> bool:
    if not work.parameters and not exact:
        return True
    wanted = text_of((), work.parameters)
    if wanted == NOT_COMPARABLE:
        return False
    record = _record(group, work.status_name)
    if _PARAMETERS in record:
        if any(_same_text(record, key, wanted) for key in (_PARAMETERS, _SEARCHED)):
            return True
        if not work.parameters or not _same_text(record, _PARAMETERS, NO_ARGUMENTS):
            return False
    # No record, or one of a process that keeps its parameters elsewhere: what the subclass wrote has to tell.
    stored_parameters = read_parameters(group)
    return all(
        key in stored_parameters and same(stored_parameters[key], value)
        for key, value in work.parameters.items()
        if value is not None  # HDF5 has no None: pyUSID leaves such attributes out
    ) and not any(key in stored_parameters for key, value in work.parameters.items() if value is None)


def _short(text: str) -> str:
    encoded = text.encode("utf-8", "surrogatepass")
    return text if len(encoded) <= _LONGEST_TEXT else f"sha256:{hashlib.sha256(encoded).hexdigest()}"


def _same_text(record: Mapping[str, Any], key: str, wanted: str) -> bool:
    stored = read_text(record.get(key, NOT_COMPARABLE))
    return stored != NOT_COMPARABLE and (stored == _short(wanted) or same_arguments(stored, wanted))


def same_arguments_recorded(group: h5py.Group, work: HookWork, arguments: str, *, unknown: bool = False) -> bool:
    """Tell whether a group was begun with these arguments of `compute`.

    Without a record it was begun with none; or, with `unknown`, with whatever is wanted.
    """
    record = _record(group, work.status_name)
    if _ARGUMENTS not in record:
        return unknown or arguments == NO_ARGUMENTS
    return _same_text(record, _ARGUMENTS, arguments)


def same_parameters_recorded(group: h5py.Group, work: HookWork) -> bool:
    """Tell whether nothing speaks against a group having been begun with just these parameters."""
    record = _record(group, work.status_name)
    wanted = text_of((), work.parameters)
    if wanted == NOT_COMPARABLE or _PARAMETERS not in record or _same_text(record, _PARAMETERS, NO_ARGUMENTS):
        return True
    return _same_text(record, _PARAMETERS, wanted)


def is_first_phase(group: h5py.Group, work: HookWork) -> bool:
    """Tell whether the phase with the present status mask is the one that the group was created for."""
    record = _record(group, work.status_name)
    if _PHASE in record:
        return int(record[_PHASE]) == 0
    return not _other_masks(group, work)


def _other_masks(group: h5py.Group, work: HookWork) -> list[str]:
    """Return the names of the status masks of other phases."""
    return [
        name for name in status_masks(group) if name != work.status_name and group[name].shape == (work.n_positions,)
    ]


def status_masks(group: h5py.Group) -> list[str]:
    """Return the names of all status masks in a group: with a record, or looking like one and named like one."""
    return [
        str(name)
        for name, item in members(group, follow=True)
        if isinstance(item, h5py.Dataset)
        and item.ndim == 1
        and item.dtype == np.uint8
        and (_PHASE in item.attrs or name.startswith("completed"))
    ]


def ensure_status_mask(group: h5py.Group, work: HookWork, arguments: str, *, afresh: bool = False) -> h5py.Dataset:
    """Return the status mask of the present phase; made, and filled up to ``last_pixel``, if it is not there.

    Parameters
    ----------
    group : h5py.Group
        The results group.
    work : HookWork
        What is being done.
    arguments : str
        The arguments of `compute`, as text.
    afresh : bool
        Nothing counts as done, whatever the mask and ``last_pixel`` say.

    Raises
    ------
    ResultsError
        If something else has its name, or it has another shape or type.
    """
    if work.status_name in group:
        remaining_positions(group, work.n_positions, work.status_name)  # checks it
        mask = group[work.status_name]
        if afresh:
            mask[...] = 0
            _write_record(mask, work, arguments)
    else:
        done = Runs.empty()
        if "last_pixel" in group.attrs and not afresh:
            left = remaining_positions(group, work.n_positions, work.status_name)
            done = Runs.full(work.n_positions).difference(left)
        phase = len(_other_masks(group, work))
        mask = create_status_mask(group, work.n_positions, work.status_name)
        for start, stop in done:
            mask[start:stop] = 1
        mask.attrs[_PHASE] = phase
        _write_record(mask, work, arguments)
    if afresh:
        group.attrs["last_pixel"] = np.int64(0)
    return mask


def _write_record(mask: h5py.Dataset, work: HookWork, arguments: str) -> None:
    mask.attrs[_PARAMETERS] = _short(text_of((), work.parameters))
    mask.attrs[_SEARCHED] = _short(work.searched)
    mask.attrs[_ARGUMENTS] = _short(arguments)
    mask.attrs[_FINGERPRINT] = work.fingerprint("")
    mask.attrs[_SOURCE] = work.main_name
    if work.batch:
        mask.attrs[BATCH] = work.batch
