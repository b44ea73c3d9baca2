"""Threads of BLAS and OpenMP in a worker: limited while any thread of the process does a block, as before afterwards.

BLAS knows one number for the whole process, so the first block that begins sets it and the last one that ends restores
it. OpenMP knows one for each thread. To find out which libraries are loaded may take longer than the block, the more
threads the longer (each has a line in the process's memory map): it is done again only after modules were imported.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Limits:
    """What is limited now in this process, and for how many blocks. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._libraries: Any = None
        self._n_modules = 0
        self._n_blocks = 0
        self._blas: list[Any] = []

    @contextmanager
    def held(self, limit: int) -> Iterator[None]:
        """Limit both for as long as the context lasts; contexts in several threads may overlap in any way."""
        with self._lock:
            looked = self._look()
            if looked or not self._n_blocks:
                self._blas.append(self._libraries.limit(limits=limit, user_api="blas"))
            self._n_blocks += 1
        try:
            with self._libraries.limit(limits=limit, user_api="openmp"):
                yield
        finally:
            with self._lock:
                self._n_blocks -= 1
                while self._blas and not self._n_blocks:
                    self._blas.pop().restore_original_limits()

    def _look(self) -> bool:
        """Find the libraries, if more may have been loaded since the last time."""
        if self._n_modules == len(sys.modules):
            return False
        from threadpoolctl import ThreadpoolController

        self._libraries = ThreadpoolController()
        self._n_modules = len(sys.modules)
        return True


limits = _Limits()
"""Those of this process: what they are about belongs to the process, too."""
