"""Is it a masked array? Asked without `numpy.ma`, which takes a tenth of the time that loading lazyproc takes."""

from __future__ import annotations

import sys
from typing import Any


def masked_type() -> type[Any] | None:
    """Return the class of masked arrays; None as long as nobody has loaded `numpy.ma`, so that there can be none.

    Examples
    --------
    >>> from numpy import ma
    >>> masked_type() is ma.MaskedArray
    True
    """
    return getattr(sys.modules.get("numpy.ma.core"), "MaskedArray", None)


def is_masked(value: Any) -> bool:
    """Tell whether a value is a masked array."""
    kind = masked_type()
    return kind is not None and isinstance(value, kind)
