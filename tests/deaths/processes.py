"""The processes that are put to death: declared ones, and old hooks with results stored in several ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hook_classes import make_mean, new_group
from numpy.typing import NDArray

import lazyproc

CALLS = "LAZYPROC_CALLS"
"""Environment variable: the file into which the functions write the positions that they are called for."""
PAUSE = "LAZYPROC_PAUSE"
"""Environment variable: seconds that the functions take a position."""


def note_call(row: NDArray[Any]) -> None:
    """Remember that the function was called for a position."""
    import os
    import time

    descriptor = os.open(os.environ[CALLS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"%d\n" % int(row[0]))
    os.close(descriptor)
    time.sleep(float(os.environ.get(PAUSE, "0")))


class Measured(lazyproc.Process):
    """Two outputs, one value and one spectrum a position."""

    process_name = "Measured"
    outputs = {
        "Mean": lazyproc.Output("f8"),
        "Scaled": lazyproc.Output("f4", shape_from_main=True),
    }

    @staticmethod
    def _map_function(row: NDArray[Any], gain: float) -> dict[str, Any]:
        note_call(row)
        return {"Mean": row.mean(), "Scaled": gain * row}


class Recording(Measured):
    """Fails for some positions, and that is recorded."""

    process_name = "Recording"

    @staticmethod
    def _map_function(row: NDArray[Any], gain: float) -> dict[str, Any]:
        if int(row[0]) % 9 == 4:
            note_call(row)
            raise ValueError(f"position {int(row[0])} is bad")
        return Measured._map_function(row, gain)


class Compressed(Measured):
    """The same, to be compressed; in several storage chunks, as `actions` sees to."""

    process_name = "Compressed"
    outputs = {
        "Mean": lazyproc.Output("f8", compression="gzip"),
        "Scaled": lazyproc.Output("f4", shape_from_main=True, compression="gzip", shuffle=True),
    }


def _noted_mean(row: NDArray[Any], *args: Any, **kwargs: Any) -> float:
    note_call(row)
    return float(row.mean())


class HooksPlain(make_mean(lazyproc.Process)):  # type: ignore[misc]
    """Old hooks that leave everything to h5py's defaults: contiguous, allocated with the first write."""

    storage: dict[str, Any] = {}

    def __init__(self, h5_main: Any, **kwargs: Any) -> None:
        super().__init__(h5_main, type(self).__name__, **kwargs)
        self._max_pos_per_read = 8

    def _create_results_datasets(self) -> None:
        self.h5_results_grp = new_group(self)
        shape = (self.h5_main.shape[0], 1)
        self.h5_results = self.h5_results_grp.create_dataset("Results", shape, "f4", **self.storage)

    _map_function = staticmethod(_noted_mean)


class HooksChunked(HooksPlain):
    """Old hooks with chunked results: HDF5 makes a place for each chunk while the loop goes on."""

    storage = {"chunks": (5, 1)}


class HooksZipped(HooksPlain):
    """Old hooks with compressed results."""

    storage = {"chunks": (5, 1), "compression": "gzip"}


PROCESSES: dict[str, Callable[..., Any] | Any] = {
    "declared": Measured,
    "recording": Recording,
    "compressed": Compressed,
    "hooks": HooksPlain,
    "hooks, chunked": HooksChunked,
    "hooks, gzip": HooksZipped,
}
"""By the names that layouts use."""
