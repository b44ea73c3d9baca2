"""Is it still the same file? Told by device and inode, and across machines by the inode."""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class FileId:
    """What tells a file from one that was put in its place. Small; travels to workers.

    Attributes
    ----------
    device, inode : int
        As the machine numbers them on which the file was found.
    machine : str
        That machine.
    """

    device: int
    inode: int
    machine: str

    @classmethod
    def of(cls, status: os.stat_result) -> FileId:
        """Return the identity of a file, by what this machine says of it."""
        return cls(status.st_dev, status.st_ino, this_machine())

    def fits(self, status: os.stat_result) -> bool:
        """Tell whether what this machine says of a file fits.

        File systems in a network have the same inode numbers everywhere, but each machine numbers its devices itself.
        """
        return status.st_ino == self.inode and (status.st_dev == self.device or self.machine != this_machine())

    @property
    def is_local(self) -> bool:
        """Tell whether the file was found on this machine: both see the same bytes at once."""
        return self.machine == this_machine()


@functools.lru_cache(maxsize=1)
def this_machine() -> str:
    """Return what tells the machine from others, also from one that has the same name: its name and its last start."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            started = file.read().strip()
    except OSError:  # no Linux
        started = ""
    return f"{socket.gethostname()} {started}".strip()
