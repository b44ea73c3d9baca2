"""How many threads BLAS and OpenMP may use while blocks are computed; for the whole process, so it is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Limit:
    """The limit that is in force while at least one block is under way in this process.

    The libraries know one number for all threads, so the first block sets it and the last one puts the old one back:
    if each block did that for itself, one that began within another's time would restore the wrong number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._limits: Any = None

    @contextmanager
    def hold(self, n_threads: int) -> Iterator[None]:
        """Limit the native thread pools for as long as the context lasts."""
        with self._lock:
            if self._count == 0:
                from threadpoolctl import threadpool_limits

                self._limits = threadpool_limits(n_threads)
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    self._limits.restore_original_limits()


limited_native_threads = _Limit().hold
