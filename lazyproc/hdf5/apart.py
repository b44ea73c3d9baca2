"""Do results lie apart from what is around them? A damaged address sends what is written to somebody else's bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import h5py

from lazyproc.core.errors import ResultsError
from lazyproc.hdf5.damage import address_of, members
from lazyproc.hdf5.raised import H5_ERRORS

_Span = tuple[int, int, str]


def check_apart(group: h5py.Group, others: Iterable[h5py.Dataset] = ()) -> None:
    """Make sure that the values of the datasets in a results group share no byte with each other or their neighbours.

    Parameters
    ----------
    group : h5py.Group
        The results group. Its neighbours are the datasets beside it, such as the main dataset.
    others : iterable of h5py.Dataset
        More datasets; those of other files do not matter.

    Raises
    ------
    ResultsError
        If two overlap. Only contiguous datasets are looked at.
    """
    found: dict[int, _Span] = {}
    for dataset in _datasets(group, others):
        try:
            offset = dataset.id.get_offset()
            if offset is not None and dataset.id.get_storage_size():
                start, stop = int(offset), int(offset + dataset.id.get_storage_size())
                found.setdefault(address_of(dataset), (start, stop, str(dataset.name)))
        except H5_ERRORS:  # chunked by a filter that is not there, and the like
            continue
    spans = sorted(found.values())
    for (_, stop, first), (start, _, second) in itertools.pairwise(spans):
        if start < stop:
            raise ResultsError(
                f"{group.file.filename}::{group.name}: {first} and {second} share bytes of the file, so what is "
                "written to one would overwrite the other. The file is damaged: compute with override=True, or restore "
                "it from a copy."
            )


def _datasets(group: h5py.Group, others: Iterable[h5py.Dataset]) -> Iterator[h5py.Dataset]:
    for place in (group, group.parent):
        for _, item in members(place):
            if isinstance(item, h5py.Dataset):
                yield item
    yield from (one for one in others if one and one.file == group.file)
