"""Local processes as a Dask cluster: the same for scripts with and without ``if __name__ == "__main__"``.

Workers are started as programs of their own, not by `multiprocessing`, which would run an unguarded script again in
each of them. They leave when the driver does, however it ends, since the scheduler is a thread of the driver.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

import psutil

_JOIN_SECONDS = 60
_NATIVE = ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR")


def start_processes(n_workers: int, memory: int | None, dashboard_address: str) -> Any:
    """Start a scheduler in this process and worker processes around it, and return the cluster object.

    Parameters
    ----------
    n_workers : int
        Processes, of one thread each.
    memory : int or None
        Bytes for all of them together; None: what the machine has.
    dashboard_address : str
        Where the dashboard listens.
    """
    from lazyproc.engine.dask_scheduler import start_scheduler

    share = _memory(memory) // n_workers
    options = {"host": "127.0.0.1", "nthreads": 1, "memory_limit": share, "death_timeout": _JOIN_SECONDS}
    worker = {"cls": _worker_process(), "options": {"options": options}}
    return start_scheduler(
        "127.0.0.1",
        dashboard_address,
        "local processes",
        workers=dict.fromkeys(range(n_workers), worker),
        worker=worker,
    )


def _memory(wanted: int | None) -> int:
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT) if wanted is None else min(wanted, int(MEMORY_LIMIT))


def _worker_process() -> type[Any]:
    """Make the class of a worker process; here, since its base needs `distributed`."""
    from distributed.deploy.subprocess import Subprocess

    class WorkerProcess(Subprocess):  # type: ignore[misc]
        """A worker under a nanny, which starts it again when it dies."""

        def __init__(self, scheduler: str, name: Any = None, options: dict[str, Any] | None = None) -> None:
            self._command = [
                *(sys.executable, "-m", "dask", "spec", scheduler, "--spec"),
                json.dumps({"cls": "distributed.Nanny", "opts": {**(options or {}), "name": name}}),
            ]
            super().__init__()

        async def _start(self) -> None:
            quiet = {"DASK_LOGGING__DISTRIBUTED": "error"}
            one_thread = {f"{library}_NUM_THREADS": "1" for library in _NATIVE}
            self.process = await asyncio.create_subprocess_exec(
                *self._command,
                env={**quiet, **os.environ, **one_thread},
                start_new_session=True,  # Ctrl-C is for the driver: blocks under way shall be finished
            )

        async def close(self) -> None:
            """Kill it with all that it has started, at one blow: whoever outlived the others would complain of that."""
            if self.process is not None and self.process.returncode is None:
                started = psutil.Process(self.process.pid).children(recursive=True)
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                for child in started:  # in a group of its own
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                await self.process.communicate()
            await super().close()

    return WorkerProcess
