"""Deaths that leave journals: of a transaction, and of a change through an open handle. In a child that dies."""

from __future__ import annotations

import os
import sys
from typing import Any

import h5py
import numpy as np

from faults.subject import CHANNEL
from lazyproc.hdf5 import transaction
from lazyproc.hdf5.guard import guarded


def add(file: h5py.File) -> None:
    """Make a change of the file's structure."""
    group = file[CHANNEL].create_group("New")
    group["values"] = np.arange(50)
    group.attrs["text"] = "something"


def redo(path: str) -> None:
    """Die when the journal is complete, and nothing of it is done yet."""

    def die(*arguments: Any) -> None:
        os._exit(0)

    transaction._finish = die
    with transaction.transaction(path) as file:
        add(file)


def undo(path: str) -> None:
    """Die when the change is made, and not yet durable."""
    with h5py.File(path, "r+") as file, guarded([file]):
        add(file)
        file.flush()
        os._exit(0)


if __name__ == "__main__":
    {"redo": redo, "undo": undo}[sys.argv[1]](sys.argv[2])
