"""How results are stored compressed: which filters, and in which storage chunks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lazyproc.core.errors import DefinitionError

CHUNK_BYTES = 2**20
"""A storage chunk at most, unless one value is larger: what HDF5 keeps of a dataset in memory by default."""
DEFAULT_LEVEL = 4
"""Of gzip, as in h5py."""


@dataclass(frozen=True)
class Compression:
    """The filters of a compressed dataset: shuffle, if wanted, then gzip.

    Attributes
    ----------
    level : int
        Of gzip, 0 to 9.
    shuffle : bool
        Whether the bytes of the values are regrouped first: all first bytes, all second ones …
    """

    level: int
    shuffle: bool

    def text(self) -> str:
        """Return it as text, to be kept in a file while the results are not compressed yet."""
        return json.dumps({"compression": "gzip", "compression_opts": self.level, "shuffle": self.shuffle})

    @classmethod
    def from_text(cls, text: str) -> Compression:
        """Return what `text` has written.

        Raises
        ------
        ValueError
            If that is something else.
        """
        content = json.loads(text)
        try:
            return cls(int(content["compression_opts"]), bool(content["shuffle"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{text!r} tells of no compression") from error

    @classmethod
    def of(cls, compression: Any, options: Any, shuffle: Any) -> Compression | None:
        """Return what the keywords of h5py mean; None without compression.

        Raises
        ------
        DefinitionError
            If they mean nothing, or something that is not done here.
        """
        if not isinstance(shuffle, bool):
            raise DefinitionError(f"Output: shuffle is {shuffle!r}; expected True or False.")
        if compression is None or compression is False:
            if options is not None or shuffle:
                raise DefinitionError(
                    f"Output: compression_opts is {options!r} and shuffle is {shuffle!r}, but compression is None; "
                    "expected compression='gzip' with them. Add it, or leave them out."
                )
            return None
        if _is_level(compression) and options is None:
            return cls(int(compression), shuffle)
        if compression is not True and (not isinstance(compression, str) or compression != "gzip"):
            raise DefinitionError(
                f"Output: compression is {compression!r} with compression_opts {options!r}; expected 'gzip' with a "
                "level of 0 to 9 as compression_opts, that level alone, or None. Other filters are not written here: "
                "choose 'gzip', or convert the finished results with h5repack."
            )
        level = DEFAULT_LEVEL if options is None else options
        if not _is_level(level):
            raise DefinitionError(
                f"Output: compression_opts is {options!r}; expected a level of gzip, 0 to 9, or None."
            )
        return cls(int(level), shuffle)


def _is_level(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 9


def chunk_shape(n_positions: int, width: int, itemsize: int) -> tuple[int, int]:
    """Choose the storage chunks of `(n_positions, width)`: whole rows, or pieces of one row where that is large.

    Either way the values of a chunk lie one after the other in the rows. Chunks are about equal, so that the last one
    is hardly padded.

    Examples
    --------
    >>> chunk_shape(1_000_000, 64, 4)
    (4082, 64)
    >>> chunk_shape(100, 1, 8)
    (100, 1)
    >>> chunk_shape(100, 1_000_000, 4)
    (1, 250000)
    """
    row_bytes = width * itemsize
    if row_bytes <= CHUNK_BYTES:
        return _share(n_positions, CHUNK_BYTES // row_bytes), width
    return 1, _share(width, max(1, CHUNK_BYTES // itemsize))


def _share(n: int, most: int) -> int:
    """Return how many of `n` go into each of as few equal parts as possible, of at most so many."""
    n_parts = -(-n // most)
    return -(-n // n_parts)
