"""What h5py raises for a file that is damaged, full or gone."""

from __future__ import annotations

H5_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
"""What h5py, and the decoding of what it returns, raise for things that cannot be read, depending on what is wrong."""
