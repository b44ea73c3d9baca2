"""The least-squares fit of `workloads.py`, in a module that imports SciPy at its top, as most do."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import least_squares


def fit_one(spectrum: np.ndarray) -> Any:
    """Fit a Gaussian on a background by least squares: some milliseconds."""
    x = np.linspace(-1, 1, len(spectrum))

    def residual(p: np.ndarray) -> np.ndarray:
        return p[0] * np.exp(-(((x - p[1]) / p[2]) ** 2)) + p[3] - spectrum

    return least_squares(residual, [1.0, 0.0, 0.3, 0.0]).x
