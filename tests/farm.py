"""A process that forks drivers, schedulers and workers, with all imports done: starting one costs some milliseconds.

Run as a script it takes one request a line, as JSON, and answers with the process id. What a process is at it writes
into files of its folder: ``address`` (a scheduler), ``outcome`` (a driver).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PEACE = "started"
"""What `Farm` waits for."""


class Farm:
    """The process, seen from a test. Everything that it forked is killed by `end`."""

    def __init__(self) -> None:
        # A group of its own: whoever is told to die in it takes nobody else along.
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._pids: list[int] = []
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == PEACE

    def start(self, what: str, folder: Path, **options: Any) -> int:
        """Fork a process, the leader of a new session, and return its id; what it writes goes to ``<what>.log``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([what, str(folder), options]), file=self._process.stdin, flush=True)
        pid = int(self._process.stdout.readline())
        self._pids.append(pid)
        wait_for(lambda: os.getsid(pid) == pid)  # else nobody would be found in its session yet
        return pid

    def kill_all(self) -> None:
        """Kill all that were forked, with all that these started."""
        for pid in self._pids:
            for one in members(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
        self._pids.clear()

    def end(self) -> None:
        self.kill_all()
        self._process.kill()
        self._process.communicate()


def members(session: int) -> list[int]:
    """Return the processes of a session, but for those that have ended and were not waited for."""
    import psutil

    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """Wait until a condition holds; return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return value


# -- in the forked processes -----------------------------------------------------------------------------------------


def measure(row: Any, folder: str, ballast: bytes = b"") -> dict[str, Any]:
    """Return the mean of a row, and who computed it; does what the file ``at_<position>`` says, in a worker only.

    Ballast makes the function too large to be sent along with each task of a cluster.
    """
    import os
    import time
    from pathlib import Path

    place, position, here = Path(folder), int(row[0]), os.getpid()
    time.sleep(0.03)  # long enough for worker processes to pay, and for each position to be a block of its own
    if here != int((place / "driver").read_text()):
        with open(place / "begun", "a") as file:
            file.write(f"{position} {here}\n")
        if (place / "slow").exists():
            time.sleep(float((place / "slow").read_text()))
        order = place / f"at_{position}"
        if order.exists():
            exec(order.read_text(), {"place": place, "position": position, "os": os, "time": time})
        with open(place / "ended", "a") as file:
            file.write(f"{position} {here}\n")
    return {"Mean": row.mean(), "By": float(here)}


def drive(
    folder: Path,
    address: str,
    scheduler: str | None = None,
    patience: float | None = None,
    connect: float = 3.0,
    ballast: int = 20_000,
) -> None:
    """Compute `measure` on a dataset, on two local processes or on a cluster; tell the outcome."""
    import logging

    import dask
    from distributed import Client

    import lazyproc
    import lazyproc.engine.pulse

    logging.basicConfig(level="INFO")
    (folder / "driver").write_text(str(os.getpid()))
    measure.__defaults__ = (bytes(ballast),)
    if patience is not None:
        lazyproc.engine.pulse.PATIENCE_SECONDS = patience
    dask.config.set({"distributed.comm.timeouts.connect": connect})
    outputs = {"Mean": lazyproc.Output("f8"), "By": lazyproc.Output("f8")}
    outcome = {"error": "", "text": ""}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(scheduler)) if scheduler else None
        try:
            lazyproc.map_positions(
                measure,
                address,
                outputs,
                process_name="Measure",
                params={"folder": str(folder)},
                cores=2,
                client=client,
                checkpoint_interval=0.05,
            )
        except Exception as error:
            traceback.print_exc()
            outcome = {"error": type(error).__name__, "text": str(error)}
        (folder / "new_outcome").write_text(json.dumps(outcome))
        os.replace(folder / "new_outcome", folder / "outcome")


def schedule(
    folder: Path, port: int = 0, allowed_failures: int = 1, ttl: str = "300s", saturation: float = 1.1
) -> None:
    """Be a scheduler; with a `saturation` of 1 a worker has no block that waits behind another one."""
    import dask
    from distributed import Scheduler

    dask.config.set({"distributed.scheduler.worker-ttl": ttl})
    dask.config.set({"distributed.scheduler.worker-saturation": saturation})

    async def run() -> None:
        options = {"dashboard": False, "allowed_failures": allowed_failures}
        async with Scheduler(host="127.0.0.1", port=port, **options) as scheduler:
            (folder / "new_address").write_text(scheduler.address)
            os.replace(folder / "new_address", folder / "address")
            await scheduler.finished()

    asyncio.run(run())


def work(folder: Path, scheduler: str, nanny: bool = False, memory: int = 0) -> None:
    """Be a worker of one thread, with a nanny that replaces it when it dies, or without."""
    from distributed import Nanny, Worker

    async def run() -> None:
        options = {"nthreads": 1, "memory_limit": memory, "dashboard": False, "local_directory": str(folder)}
        if nanny:
            options.pop("dashboard")
        async with (Nanny if nanny else Worker)(scheduler, **options) as worker:
            await worker.finished()

    asyncio.run(run())


ROLES = {"driver": drive, "scheduler": schedule, "worker": work}


def main() -> None:
    import distributed  # noqa: F401
    import h5py  # noqa: F401

    import lazyproc.demo.simulate
    import lazyproc.engine.distant
    import lazyproc.mapping  # noqa: F401

    import dask.array  # noqa: F401  # isort: skip

    np.ones(2) @ np.ones(2)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    print(PEACE, flush=True)
    for line in sys.stdin:
        what, folder, options = json.loads(line)
        pid = os.fork()
        if not pid:
            _be(what, Path(folder), options)
        print(pid, flush=True)


def _be(what: str, folder: Path, options: dict[str, Any]) -> None:
    """Go on as a forked process."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        with contextlib.suppress(OSError, AttributeError):  # Linux: be killed when the farm has ended
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        with open(os.devnull) as nothing, open(folder / f"{what}.log", "a") as log:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        ROLES[what](folder, **options)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
