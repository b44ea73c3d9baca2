"""Which opening of a file by which process this is: HDF5 still has what it could not write in that one, in no other."""

from __future__ import annotations

import functools
import os

import h5py
import psutil

from lazyproc.hdf5.damage import reading
from lazyproc.hdf5.file_id import this_machine


def session_of(file: h5py.File) -> str:
    """Return what tells this opening of a file from all others, of this process and of others.

    Raises
    ------
    ResultsError
        If the file is so damaged that HDF5 cannot tell.
    """
    # HDF5 numbers the files that it opens, and never gives a number twice in a process.
    with reading(str(file.filename), "Restore the file from a copy."):
        number = h5py.h5o.get_info(file.id).fileno
    return f"{this_machine()} {_this_process(os.getpid())} {number}"


@functools.lru_cache(maxsize=1)
def _this_process(pid: int) -> str:
    return f"{pid} {psutil.Process(pid).create_time()}"
