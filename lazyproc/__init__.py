"""lazyproc: process big spectroscopic and imaging files, position by position, lazily, from a laptop to a cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lazyproc.clusters import cluster
    from lazyproc.compat import replace_pyusid
    from lazyproc.core.errors import (
        ArgumentTypeError,
        ArgumentValueError,
        DefinitionError,
        FailureLimitError,
        FileBusyError,
        FileChangedError,
        FunctionError,
        Interrupted,
        JournalError,
        LaunchError,
        LazyprocError,
        LockingError,
        MemoryLimitError,
        MissingFileError,
        NoRoomError,
        NotMainDatasetError,
        OutputError,
        ParameterError,
        ReadOnlyFileError,
        ResultsError,
        StaleViewError,
        WorkerError,
    )
    from lazyproc.core.plan import Plan
    from lazyproc.core.specs import Dimension, Output
    from lazyproc.engine.parallel import parallel_compute, recommend_cpu_cores
    from lazyproc.mapping import map_positions
    from lazyproc.process import Process
    from lazyproc.results import failures, open_results

# Names load when they are first used: a worker that only needs the block function does not pay for all the rest.
_HOMES = {
    "Dimension": "lazyproc.core.specs",
    "Output": "lazyproc.core.specs",
    "Plan": "lazyproc.core.plan",
    "Process": "lazyproc.process",
    "cluster": "lazyproc.clusters",
    "failures": "lazyproc.results",
    "map_positions": "lazyproc.mapping",
    "open_results": "lazyproc.results",
    "parallel_compute": "lazyproc.engine.parallel",
    "recommend_cpu_cores": "lazyproc.engine.parallel",
    "replace_pyusid": "lazyproc.compat",
} | dict.fromkeys(
    (
        "ArgumentTypeError",
        "ArgumentValueError",
        "DefinitionError",
        "FailureLimitError",
        "FileBusyError",
        "FileChangedError",
        "FunctionError",
        "Interrupted",
        "JournalError",
        "LaunchError",
        "LazyprocError",
        "LockingError",
        "MemoryLimitError",
        "MissingFileError",
        "NoRoomError",
        "NotMainDatasetError",
        "OutputError",
        "ParameterError",
        "ReadOnlyFileError",
        "ResultsError",
        "StaleViewError",
        "WorkerError",
    ),
    "lazyproc.core.errors",
)

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "DefinitionError",
    "Dimension",
    "FailureLimitError",
    "FileBusyError",
    "FileChangedError",
    "FunctionError",
    "Interrupted",
    "JournalError",
    "LaunchError",
    "LazyprocError",
    "LockingError",
    "MemoryLimitError",
    "MissingFileError",
    "NoRoomError",
    "NotMainDatasetError",
    "Output",
    "OutputError",
    "ParameterError",
    "Plan",
    "Process",
    "ReadOnlyFileError",
    "ResultsError",
    "StaleViewError",
    "WorkerError",
    "cluster",
    "failures",
    "map_positions",
    "open_results",
    "parallel_compute",
    "recommend_cpu_cores",
    "replace_pyusid",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lazyproc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
