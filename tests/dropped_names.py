"""Names that NumPy and Python dropped after old packages were published; put back on import.

Only for processes that a test starts to run such packages: it puts this module's folder on their path, together with a
``sitecustomize`` that imports it, so that the worker processes which the packages start find the names as well.
"""

from __future__ import annotations

import collections
import collections.abc

import numpy as np
import numpy.lib.npyio as npyio

OF_NUMPY = {
    "product": np.prod,
    "object": object,
    "float": float,
    "int": int,
    "bool": bool,
    "complex": complex,
    "float_": np.float64,
    "complex_": np.complex128,
    "in1d": np.isin,
    "trapz": getattr(np, "trapezoid", None),
}

for name, value in OF_NUMPY.items():
    if name not in vars(np):
        setattr(np, name, value)
if not hasattr(npyio, "loadtxt"):
    npyio.loadtxt = np.loadtxt  # type: ignore[attr-defined]
if not hasattr(collections, "Iterable"):
    collections.Iterable = collections.abc.Iterable  # type: ignore[attr-defined]
