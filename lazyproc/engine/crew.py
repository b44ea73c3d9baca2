"""Worker processes from their start until a lane takes them, which may be before it is known what they will do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lazyproc.engine.worker import FOR_THE_DRIVER

_MAIN = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[2]); "
    "from lazyproc.engine.worker import serve; serve(int(sys.argv[1]), json.loads(sys.argv[3]))"
)
_MOST_MODULES = 2000
"""So many names fit into a socket that nobody reads from yet."""

Waiting = tuple[subprocess.Popen[bytes], Any]
"""A process, and the socket to it."""


class Crew:
    """Worker processes that are started before it is known what they will do, so that they are ready by then.

    Parameters
    ----------
    modules : sequence of str
        What they load meanwhile, where it is there.

    Notes
    -----
    Used by one thread (and the clock of `standby`) until lanes take processes, then by these; `close` ends those that
    nobody has taken.
    """

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._modules = tuple(modules)
        self._news: list[str] = []
        self._waiting: deque[Waiting] = deque()
        self._n_started = 0
        self._starting = threading.Lock()
        self._stand_down = threading.Event()

    def start(self, n_processes: int) -> None:
        """Start processes until there have been so many, and do not wait until they are ready."""
        with self._starting, suppress(OSError):  # whoever needs them will try again, and tell
            while self._n_started < n_processes:
                waiting = _start_process(self._modules)
                self._n_started += 1
                self._waiting.append(waiting)
                _tell(waiting, self._news)

    @contextmanager
    def standby(self, n_processes: int, seconds: float) -> Iterator[None]:
        """Start processes in so many seconds, unless `stand_down` is called before, or the context ends."""

        def wait() -> None:
            if not self._stand_down.wait(seconds):
                self.start(n_processes)

        if n_processes <= 0:
            yield
            return
        thread = threading.Thread(target=wait, name="lazyproc-standby", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stand_down()
            thread.join()

    def stand_down(self) -> None:
        """Start nothing by the clock from now on."""
        self._stand_down.set()

    def load(self, modules: Collection[str]) -> None:
        """Have processes load modules while they wait for work: those that were started, and that will be."""
        with self._starting:
            names = list(modules)[: _MOST_MODULES - len(self._news)]
            self._news += names
            for waiting in list(self._waiting):
                _tell(waiting, names)

    def is_here(self) -> bool:
        """Tell whether one of the processes has started, and waits for its kernel."""
        for process, socket in list(self._waiting):
            with suppress(OSError):
                if process.poll() is None and socket.poll():
                    return True
        return False

    def take(self) -> Waiting:
        """Return a process that waits for its kernel, and the socket to it; a new one if there is none."""
        while (waiting := self._next()) is not None:
            process, socket = waiting
            if process.poll() is None:
                return process, socket
            socket.close()
        return _start_process(self._modules)

    def give_back(self, waiting: Waiting) -> None:
        """Keep a process that waits for another kernel; it is the next one to be taken."""
        self._waiting.appendleft(waiting)

    def reduce(self, n_processes: int) -> None:
        """Kill those that nobody has taken, but for so many; not while lanes may take some."""
        while len(self._waiting) > n_processes:
            process, socket = self._waiting.pop()  # the last one is the least ready
            kill(process)
            process.wait()
            socket.close()

    def close(self) -> None:
        """Kill those that nobody has taken."""
        self.reduce(0)

    def _next(self) -> Waiting | None:
        try:
            return self._waiting.popleft()
        except IndexError:  # asked first would not do: several lanes may take the last one
            return None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _start_process(modules: Sequence[str]) -> tuple[subprocess.Popen[bytes], Any]:
    """Start a worker process; return it with the socket to it."""
    from multiprocessing import Pipe

    ours, theirs = Pipe()
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR")}
    folders = json.dumps([str(folder) for folder in sys.path])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_DRIVER)  # the process is to begin so
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno()), folders, json.dumps(list(modules))],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | one_thread,
                process_group=0,  # Ctrl-C does not reach programs that the function runs; killed together
            )
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process, ours


def _tell(waiting: Waiting, modules: Sequence[str]) -> None:
    """Have a process load modules; as messages, since a command line has not room for any number of names."""
    with suppress(OSError):  # it has died; whoever takes it will see
        if modules:
            waiting[1].send(list(modules))


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker process, if it is still there, with all that its function has started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
