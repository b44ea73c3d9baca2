"""What goes to worker processes in bytes, which may be many: made once for all of them, and let go of when sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Parcel:
    """Bytes that are made when they are first asked for, and again only if they are after they were let go of.

    Attributes
    ----------
    refused : str or None
        Why they cannot be made, or are of no use to those that get them.

    Notes
    -----
    Any thread may use it. Where it is sent itself, an empty one arrives.
    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self._bytes: bytes | None = None
        self._n_bytes = 0
        self._making = threading.Lock()

    def get(self, make: Callable[[], bytes]) -> bytes:
        """Return the bytes; raises whatever `make` raises."""
        with self._making:
            made = self._bytes
            if made is None:
                made = self._bytes = make()
                self._n_bytes = len(made)
            return made

    @property
    def n_bytes(self) -> int:
        """How many bytes were made last, kept or not."""
        return self._n_bytes

    def let_go(self) -> None:
        """Keep them no longer."""
        self._bytes = None

    def refuse(self, reason: str) -> None:
        """Note that nobody shall get them."""
        self.refused = reason
        self.let_go()

    def __reduce__(self) -> tuple[type[Parcel], tuple[Any, ...]]:
        return Parcel, ()
