"""Find results groups of the same work, finished or partial; a search never writes.

The same work means: the same process name, exactly the same parameters and arguments, the same main dataset with the
same values, and outputs declared alike, compressed or not. What differs is told in words.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from lazyproc.core.errors import FileChangedError, NotMainDatasetError, ResultsError
from lazyproc.core.identity import code_changed
from lazyproc.core.parameters import differences, same_arguments
from lazyproc.core.runs import Runs
from lazyproc.core.specs import STATUS_MASK, ResolvedOutput
from lazyproc.hdf5.apart import check_apart
from lazyproc.hdf5.attributes import has_manifest, read_parameters
from lazyproc.hdf5.damage import attribute, reading
from lazyproc.hdf5.declaration import declared_differences
from lazyproc.hdf5.failures import count_failed
from lazyproc.hdf5.files import check_heaps
from lazyproc.hdf5.marks import done_pieces
from lazyproc.hdf5.origin import file_differences, other_file_differences, source_name
from lazyproc.hdf5.raised import H5_ERRORS
from lazyproc.hdf5.rows_file import check_rows
from lazyproc.hdf5.seal import check_places, check_seal
from lazyproc.hdf5.usid import REFERENCES, main_dataset, text_attribute

BATCH = "lazyproc_batch"
"""The attribute of a results group, or of a status mask, that tells which jobs have begun it."""

log = logging.getLogger("lazyproc")


@dataclass(frozen=True)
class Work:
    """What shall be computed, as far as it decides whether two runs are the same.

    Attributes
    ----------
    main_name : str
        The main dataset's path in its file.
    main_file : str
        Its file.
    n_positions : int
        Its rows.
    process_name : str
        With ``-`` already turned into ``_``.
    parameters : dict
        The parameters.
    arguments : str
        The arguments of `compute` as text.
    outputs : tuple of ResolvedOutput
        What is declared.
    code : str
        Hash of the function's code, and of what it uses.
    unnamed : str
        What the process is called where it is called by a name of the function that does not say what is computed.
    status_name : str
        The name of the status mask.
    fingerprint : callable
        A stored fingerprint to the present one of the main dataset, made the same way; empty if it is not verified.
    is_renamed : callable
        Tells of a stored path whether it may be an earlier one of the main dataset: it leads there too, or nowhere.
    """

    main_name: str
    main_file: str
    n_positions: int
    process_name: str
    parameters: Mapping[str, Any]
    arguments: str
    outputs: tuple[ResolvedOutput, ...]
    code: str
    unnamed: str
    status_name: str
    fingerprint: Callable[[str], str] = field(repr=False)
    is_renamed: Callable[[str], bool] = field(default=lambda stored: False, repr=False)


@dataclass(frozen=True)
class Found:
    """A results group that bears the name of the work.

    Attributes
    ----------
    name : str
        The group's path in its file.
    differences : tuple of str
        Why it is not the same work; empty if it is.
    remarks : tuple of str
        What is worth a warning though it is the same work: the function's code has changed, or that cannot be told.
    n_done : int
        Positions that are marked done.
    n_positions : int
        Of how many.
    n_failed : int
        Those among the done ones that failed, and hold the fill value.
    """

    name: str
    differences: tuple[str, ...]
    remarks: tuple[str, ...]
    n_done: int
    n_positions: int
    n_failed: int = 0

    @property
    def is_complete(self) -> bool:
        """The same work, and all of it done."""
        return not self.differences and self.n_done == self.n_positions

    @property
    def is_partial(self) -> bool:
        """The same work, and not all of it done."""
        return not self.differences and self.n_done < self.n_positions


def best_of(found: Sequence[Found], chosen: str | None = None) -> Found | None:
    """Return the partial group that was chosen, else the last finished one, else the last partial one, if any."""
    partial = [one for one in found if one.is_partial]
    wanted = [one for one in partial if one.name == chosen]
    best = wanted or [one for one in found if one.is_complete] or partial
    return best[-1] if best else None


def search(target: h5py.Group | None, work: Work) -> list[Found]:
    """Examine all groups below `target` that bear the name of the work, in the order of their numbers."""
    if target is None:
        return []
    groups = named_groups(target, work.main_name, work.process_name)
    return [examine(group, work, thorough=False) for group in groups]


def named_groups(target: h5py.Group, main_name: str, process_name: str) -> list[h5py.Group]:
    """Return the groups below `target` named ``<main>-<process>_<number>``, exactly, in the order of their numbers.

    One that cannot be opened is passed over: nothing can be taken from it, and others may be sound.

    Raises
    ------
    ResultsError
        If `target` itself cannot be listed.
    """
    prefix = re.escape(f"{main_name.rpartition('/')[2]}-{process_name}_")
    with reading(f"{target.file.filename}::{target.name}", "Give h5_target_group in another file."):
        matches = [re.fullmatch(prefix + r"(\d+)", name) for name in target if isinstance(name, str)]
    numbered = sorted((int(match[1]), match[0]) for match in matches if match)
    found = [(name, _opened(target, name)) for _, name in numbered]
    return [group for _, group in found if isinstance(group, h5py.Group)]


def _opened(parent: h5py.Group, name: str) -> Any:
    """Return what has the name; None if there is nothing, or it cannot be opened."""
    try:
        item = parent.get(name)
        if isinstance(item, h5py.Group):
            check_heaps(item)
        return item
    except (ResultsError, *H5_ERRORS) as error:
        log.warning("%s/%s cannot be opened (%s) and is passed over", parent.name, name, error)
        return None


def examine(group: h5py.Group, work: Work, *, thorough: bool = True) -> Found:
    """Compare one results group with the work.

    Parameters
    ----------
    group : h5py.Group
        The results group.
    work : Work
        What is wanted.
    thorough : bool
        Tell all differences. Else the first aspect that differs is enough: among many results of other parameters, as a
        sweep leaves them, a search is quick, and the values of the main dataset are read only where all else is equal.
    """
    lines: list[str] = []
    remarks: tuple[str, ...] = ()
    n_done = n_failed = 0
    try:
        with reading(f"Results group {group.name!r}"):
            for compare in _ASPECTS:
                lines += compare(group, work)
                if lines and not thorough:
                    return Found(str(group.name), tuple(lines), remarks, n_done, work.n_positions)
            lines += _source_differences(group, work)
            remarks = tuple(_remarks(group, work))
            if not lines:
                n_done = count_done(group, work.n_positions, work.status_name)
                n_failed = count_failed(group, work.status_name)
                check_seal(group)
                check_places(group)
                check_rows(group)
                if n_done < work.n_positions:
                    check_apart(group)
    except FileChangedError:  # of the source
        raise
    except ResultsError as error:  # one damaged group must not stand in the way of all others
        lines.append(str(error))
    return Found(str(group.name), tuple(lines), remarks, n_done, work.n_positions, n_failed)


def count_done(group: h5py.Group, n_positions: int, status_name: str) -> int:
    """Count the positions that are done; legacy groups without a mask tell it by the attribute ``last_pixel``."""
    label = f"{group.name}/{status_name}"
    with reading(label):
        if status_name in group:
            return sum(int(np.count_nonzero(piece)) for piece in done_pieces(group, n_positions, status_name, label))
    return n_positions - remaining_positions(group, n_positions, status_name).n_positions


def remaining_positions(
    group: h5py.Group, n_positions: int, status_name: str, *, start: int = 0, most_runs: int | None = None
) -> Runs:
    """Return the positions that are not done: from `start` on, and about so many runs of them at most.

    Raises
    ------
    ResultsError
        If there is neither a status mask nor ``last_pixel``, or the mask is not what it should be.
    """
    label = f"{group.name}/{status_name}"
    with reading(label):
        if status_name in group:
            pieces = done_pieces(group, n_positions, status_name, label, start)
            return Runs.from_mask_pieces(pieces, offset=start, most_runs=most_runs)
        has_last_pixel = "last_pixel" in group.attrs
    if not has_last_pixel:
        raise ResultsError(f"{label}: there is no status mask, nor the attribute last_pixel of older results.")
    try:
        last = int(np.asarray(attribute(group, "last_pixel")).ravel()[0])
    except H5_ERRORS as error:
        raise ResultsError(
            f"{group.name}: there is no status mask, and the attribute last_pixel is no number ({error}); expected how "
            "many positions are done. Compute with override=True."
        ) from error
    return Runs.from_spans([(min(max(last, start), n_positions), n_positions)])


def batch_of(group: h5py.Group, status_name: str) -> str:
    """Return which jobs, one after another, have begun a results group, or a phase of it; empty if none are known."""
    mask = group.get(status_name)
    return text_attribute(group, BATCH) or ("" if mask is None else text_attribute(mask, BATCH))


def status_name_of(group: h5py.Group) -> str:
    """Return the name of a results group's status mask: where a class has one of its own, the group says so."""
    return text_attribute(group, "lazyproc_status_mask") or STATUS_MASK


def _name_differences(group: h5py.Group, work: Work) -> Iterable[str]:
    tool = text_attribute(group, "tool", work.process_name)
    if tool.replace("-", "_") != work.process_name:
        yield f"process: stored {tool!r}, wanted {work.process_name!r}"


def _argument_differences(group: h5py.Group, work: Work) -> Iterable[str]:
    nothing = '{"args": [], "kwargs": {}}'
    stored = text_attribute(group, "lazyproc_arguments", nothing)
    if not same_arguments(stored, work.arguments):
        yield f"arguments of compute: stored {stored}, wanted {work.arguments}"


def _output_differences(group: h5py.Group, work: Work) -> Iterable[str]:
    """Compare shape, dtype, references and all that is declared; how the values are stored is no difference.

    Where h5py copies a group, references become null: such a copy could not be opened as results. What other programs
    have written, without dimensions of their own making perhaps, counts by shape and dtype.
    """
    for output in work.outputs:
        dataset = group.get(output.name)
        wanted = (work.n_positions, output.width)
        if not isinstance(dataset, h5py.Dataset):
            yield f"output {output.name!r}: not stored"
        elif dataset.shape != wanted or dataset.dtype != output.dtype:
            yield (
                f"output {output.name!r}: stored with the shape {dataset.shape} and the dtype {dataset.dtype}, "
                f"wanted {wanted} and {output.dtype}"
            )
        elif _has_null_references(dataset):
            try:
                main_dataset(dataset)
            except NotMainDatasetError as error:
                yield f"output {output.name!r}: stored, but {error}"
        elif has_manifest(group):
            yield from (f"output {output.name!r}: {line}" for line in declared_differences(dataset, output))


def _has_null_references(dataset: h5py.Dataset) -> bool:
    """Tell whether references of a dataset lead nowhere; other software may have stored results without any."""
    values = (attribute(dataset, name, None) for name in REFERENCES)
    return any(isinstance(value, h5py.Reference) and not value for value in values)


def _source_differences(group: h5py.Group, work: Work) -> Iterable[str]:
    stored_name = source_name(group)
    if stored_name is not None and stored_name != work.main_name and not work.is_renamed(stored_name):
        yield f"source: stored results of {stored_name}, wanted {work.main_name}"
        return
    stored = text_attribute(group, "lazyproc_fingerprint")
    now = work.fingerprint(stored) if stored else ""
    if now:
        if now != stored:
            yield f"source: the values of {work.main_name} have changed since (fingerprint {stored}, now {now})"
        yield from other_file_differences(group, work.main_file)
        return
    yield from file_differences(group, work.main_file)


def _nameless_differences(group: h5py.Group, work: Work) -> Iterable[str]:
    """Compare the code, and what it uses, where the name of the work says nothing: that of a lambda is ``lambda``."""
    if work.process_name == work.unnamed and code_changed(text_attribute(group, "lazyproc_code"), work.code):
        yield (
            f"function: stored results of another {work.unnamed}, or what it uses has changed; give process_name to "
            "tell by its name what is computed"
        )


def _parameter_differences(group: h5py.Group, work: Work) -> Iterable[str]:
    yield from differences(read_parameters(group), work.parameters, exact=has_manifest(group))


_ASPECTS = (
    _parameter_differences,
    _name_differences,
    _argument_differences,
    _output_differences,
    _nameless_differences,
)
"""What is compared before the main dataset, in this order."""


def _remarks(group: h5py.Group, work: Work) -> Iterable[str]:
    stored = text_attribute(group, "lazyproc_code")
    changed = code_changed(stored, work.code) if stored else False
    if changed:
        yield (
            "the function's code has changed, or what it uses, since these results were computed; they are used as "
            "they are. override=True computes afresh."
        )
    elif changed is None:
        yield (
            "whether the function's code, or what it uses, has changed since these results were computed cannot be "
            "told: its source was not at hand for one of the two, or another version of Python or lazyproc computed "
            "them. They are used as they are. override=True computes afresh."
        )
