"""Room set aside behind an open file while something is created in it, so that HDF5 does not find the disk full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import h5py

from lazyproc.hdf5.on_disk import real_path
from lazyproc.hdf5.room import give_back, reserve


@contextmanager
def reserved(file: h5py.File, n_bytes: int, what: str) -> Iterator[None]:
    """Have room set aside behind the end of an open file, for as long as the context lasts; flushed at its end.

    Parameters
    ----------
    file : h5py.File
        Open for writing. One in memory, or an overlay, needs no room here: a transaction reserves for itself.
    n_bytes : int
        How much; what is not used is given back.
    what : str
        What it is for, for the message.

    Raises
    ------
    NoRoomError
        If there is not so much. Nothing was changed.

    Notes
    -----
    What HDF5 allocates in the context is then there to be written, also long after the context.
    """
    path = real_path(file)
    if path is None:
        yield
        return
    file.flush()
    descriptor = file.id.get_vfd_handle()
    reserve(descriptor, os.fstat(descriptor).st_size, n_bytes, path, what)
    try:
        yield
    finally:
        file.flush()
        give_back(descriptor)
