"""What is known here of HDF5's superblock: where a file ends, and whether it is marked as open for writing.

Of what it tells, the following is used, with the byte where it begins (HDF5 File Format Specification, version 3.0,
section II.A)::

    version of the superblock      0     1    2, 3
    bytes of an address           13    13       9    only those with eight are known here
    flags                         20    20      11    bit 0: a writer has the file open; bit 2: in SWMR mode
    base address                  24    28      12    0 without a user block
    end of the file               40    44      28
    checksum                       -     -      44    of all bytes before it, where addresses have eight bytes

In files with superblocks of version 3 the flags keep others away: nobody can open the file until they are cleared.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUPERBLOCK_BYTES = 64
"""How many of a file's first bytes to look at: superblocks of all versions hold in them what is used here."""
_VERSION = 8
_MARKING = 3
"""The version with flags that keep others away."""


class _Places(NamedTuple):
    """Where a superblock has what is used."""

    address_bytes: int
    flags: int
    base: int
    end: int


_UNCHECKED = {0: _Places(13, 20, 24, 40), 1: _Places(13, 20, 28, 44)}
_LATER = _Places(9, 11, 12, 28)
_PLACES = {**_UNCHECKED, 2: _LATER, _MARKING: _LATER}
_ADDRESS_BYTES = 8
_CHECKED = 44
_MARKING_BYTES = _CHECKED + 4
_FIRST_USERBLOCK = 512
_WRITER, _SWMR = 0b001, 0b100
_WORD = 0xFFFFFFFF


def end_of(superblock: bytes) -> int | None:
    """Return where HDF5 believes a file to end.

    Parameters
    ----------
    superblock : bytes
        The first `SUPERBLOCK_BYTES` of the file.

    Returns
    -------
    int or None
        None if these bytes are of a kind that is not known here, or too few, or addresses do not count from byte 0.
    """
    places = _places(superblock, _PLACES) if len(superblock) == SUPERBLOCK_BYTES else None
    return _address(superblock, places.end) if places and _address(superblock, places.base) == 0 else None


def unchecked_end_of(superblock: bytes) -> int | None:
    """Return the same, wherever addresses count from, of a superblock that has no checksum; None of all others."""
    places = _places(superblock, _UNCHECKED)
    return _address(superblock, places.end) if places else None


def _places(superblock: bytes, known: dict[int, _Places]) -> _Places | None:
    """Return where a superblock has what is used; None if it is none, or of another kind than those known."""
    places = known.get(superblock[_VERSION]) if superblock.startswith(SIGNATURE) else None
    return places if places and superblock[places.address_bytes] == _ADDRESS_BYTES else None


def _address(superblock: bytes, place: int) -> int:
    return int.from_bytes(superblock[place : place + _ADDRESS_BYTES], "little")


def place_of_flags(superblock: bytes) -> int:
    """Return where a superblock has the byte that tells whether the file is open for writing."""
    is_early = superblock[_VERSION : _VERSION + 1] in (b"\0", b"\1")
    return (_UNCHECKED[0] if is_early else _LATER).flags


def is_open_for_writing(superblock: bytes) -> bool:
    """Tell whether a file is marked as open for writing, in SWMR mode or not, as only those of version 3 are."""
    is_marking = superblock.startswith(SIGNATURE + bytes([_MARKING]))
    return is_marking and bool(superblock[_LATER.flags] & (_WRITER | _SWMR))


def has_writer_mark(superblock: bytes) -> bool:
    """Tell whether a superblock of version 3 has the mark of a writer, and of one that is not in SWMR mode."""
    return superblock[_LATER.flags] & (_WRITER | _SWMR) == _WRITER


def find_superblock(descriptor: int) -> tuple[int, bytes] | None:
    """Return place and bytes of an intact superblock of version 3, which may lie behind a user block."""
    place, size = 0, os.fstat(descriptor).st_size
    while place < size:
        superblock = os.pread(descriptor, _MARKING_BYTES, place)
        if superblock.startswith(SIGNATURE):
            return (place, superblock) if _is_intact(superblock) else None
        place = 2 * place or _FIRST_USERBLOCK
    return None


def _is_intact(superblock: bytes) -> bool:
    """Tell whether a superblock is one of version 3, and as it was written, by its checksum."""
    if len(superblock) != _MARKING_BYTES or superblock[_VERSION] != _MARKING:
        return False
    return _places(superblock, _PLACES) is not None and _checked(superblock[:_CHECKED]) == superblock


def without_mark(superblock: bytes) -> bytes:
    """Return a superblock of version 3 without the mark of a writer, and with the checksum that belongs to it."""
    place = _LATER.flags
    cleared = bytes([superblock[place] & ~_WRITER])
    return _checked(superblock[:place] + cleared + superblock[place + 1 : _CHECKED])


def _checked(content: bytes) -> bytes:
    """Return all that a checksum is of, with that checksum."""
    return content + lookup3(content).to_bytes(4, "little")


def lookup3(data: bytes) -> int:
    """Return Jenkins' hash of some bytes (``hashlittle`` of lookup3.c), HDF5's checksum of metadata."""
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    words = np.frombuffer(data + bytes(-len(data) % 12), "<u4").tolist()
    for first in range(0, len(words), 3):
        a, b, c = (a + words[first]) & _WORD, (b + words[first + 1]) & _WORD, (c + words[first + 2]) & _WORD
        if first + 3 < len(words):
            for bits in (4, 6, 8, 16, 19, 4):
                a, b, c = b, (c + b) & _WORD, ((a - c) ^ _turned(c, bits)) & _WORD
        else:
            for bits in (14, 11, 25, 16, 4, 14, 24):
                a, b, c = b, ((c ^ b) - _turned(b, bits)) & _WORD, a
    return b if words else c


def _turned(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _WORD
