"""Read a file whose structure somebody may be changing just now: what goes wrong on the way is read again.

A run changes the structure of its file in two instants of some milliseconds, when it creates its group and when it
notes the end. A reader that has begun before, and comes to the changed places after that, sees halves of both.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import TypeVar

from lazyproc.core.errors import LazyprocError
from lazyproc.hdf5.raised import H5_ERRORS

_ATTEMPTS = 5
_PAUSE = 0.01
"""Seconds: about as long as a change takes, and longer than file systems need to tell of it by the time of a file."""

Result = TypeVar("Result")


def _always(result: object) -> bool:
    return True


def read_steadily(
    path: str | None, read: Callable[[], Result], looks_right: Callable[[Result], bool] = _always
) -> Result:
    """Read, and again if that fails while the file is being changed.

    Parameters
    ----------
    path : str or None
        The file; None if it is none of the disk.
    read : callable
        Opens the file afresh and reads.
    looks_right : callable, optional
        Tells whether what was read may be the truth. What does not look right is returned if the file stays as it is.

    Raises
    ------
    Exception
        What `read` raises, if it does so though the file is not changed any more, or for the fifth time.
    """
    for attempt in itertools.count(1):
        before = _stamp(path)
        try:
            result = read()
        except (LazyprocError, *H5_ERRORS):
            if _is_enough(attempt, path, before):
                raise
        else:
            if looks_right(result) or _is_enough(attempt, path, before):
                break
        time.sleep(_PAUSE)
    return result


def _is_enough(attempt: int, path: str | None, before: object) -> bool:
    """Tell whether reading again would show the same. Once is not enough: times of files are coarse."""
    return attempt == _ATTEMPTS or (attempt > 1 and _stamp(path) == before)


def _stamp(path: str | None) -> tuple[int, int] | None:
    """Return what changes whenever a file is written."""
    try:
        status = os.stat(path or "")
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
