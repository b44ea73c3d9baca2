"""Global heaps, where HDF5 keeps texts of variable length: a check before HDF5 reads one.

HDF5 walks through the objects of a heap by the sizes that stand in front of them, and believes them: a size of 0, as
zeroed sectors leave, keeps it in that loop for ever, and a huge one leads it out of its buffer.
"""

from __future__ import annotations

from typing import Any


class DamagedHeapError(OSError):
    """A heap was not shown to HDF5, which would not get through it."""


_HEAD = b"GCOL\x01\x00\x00\x00"
_HEAD_BYTES = _OBJECT_BYTES = 16


def is_endless_heap(read: Any) -> bool:
    """Tell whether bytes that HDF5 has read are a whole global heap that it would not get through.

    Parameters
    ----------
    read : bytes-like
        What was read in one call. Anything but a whole heap counts as sound.
    """
    view = memoryview(read)
    if bytes(view[: len(_HEAD)]) != _HEAD or int.from_bytes(view[8:_HEAD_BYTES], "little") != len(view):
        return False
    place = _HEAD_BYTES
    while place + _OBJECT_BYTES <= len(view):
        number = int.from_bytes(view[place : place + 2], "little")
        size = int.from_bytes(view[place + 8 : place + _OBJECT_BYTES], "little")
        step = _OBJECT_BYTES + -(-size // 8) * 8 if number else size  # number 0: free space, its own head included
        if not 0 < step <= len(view) - place:
            return True
        place += step
    return False
