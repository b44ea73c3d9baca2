"""A line from the driver to each other process of a job: a TCP connection on which nothing is said.

It is cut by the system when the process at the other end is gone, however it went and whatever its Python was doing. So
each side knows of the other's death without a question that could stay unanswered.
"""

from __future__ import annotations

import hmac
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

_TOKEN_BYTES = 16
_RANK = struct.Struct("!I")
_TURN_SECONDS = 0.5
_BACKLOG = 1024


@dataclass(frozen=True)
class LineAddress:
    """Where the driver can be called.

    Attributes
    ----------
    host, port
        Of the driver.
    token : bytes
        Tells callers of this job from others.
    """

    host: str
    port: int
    token: bytes


class Switchboard:
    """The driver's end of all lines.

    Parameters
    ----------
    host : str
        The address to listen at, which the others can reach.
    on_cut : callable
        Is called in a thread of its own with the rank whose line was cut, unless the lines were closed before.
    """

    def __init__(self, host: str, on_cut: Callable[[int], None]) -> None:
        self._on_cut = on_cut
        self._closed, self._all_cut, self._over = threading.Event(), threading.Event(), threading.Event()
        self._listener = socket.create_server((host, 0), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self.address = LineAddress(host, self._listener.getsockname()[1], os.urandom(_TOKEN_BYTES))
        threading.Thread(target=self._watch, name="lazyproc-lines", daemon=True).start()

    def close(self) -> None:
        """Take no further notice: what is cut from now on was meant to be. The lines stand until the process ends."""
        self._closed.set()

    def wait_until_cut(self, limit: float) -> None:
        """Wait until all others have ended, for so many seconds at most; after `close`."""
        self._all_cut.wait(limit)
        self._over.set()

    def _watch(self) -> None:
        ranks: dict[socket.socket, int] = {}
        with selectors.DefaultSelector() as ready, self._listener:
            ready.register(self._listener, selectors.EVENT_READ)
            while not self._over.is_set():
                if self._closed.is_set() and not ranks:
                    self._all_cut.set()
                for key, _ in ready.select(_TURN_SECONDS):
                    line = key.fileobj
                    assert isinstance(line, socket.socket)
                    if line is self._listener:
                        self._accept(ready)
                    elif line not in ranks and (rank := self._rank_of(line)) is not None:
                        ranks[line] = rank
                    else:
                        ready.unregister(line)
                        line.close()
                        if (gone := ranks.pop(line, None)) is not None and not self._closed.is_set():
                            self._on_cut(gone)
            for line in ranks:
                line.detach()  # the system closes it at the end of the process, and not before

    def _accept(self, ready: selectors.BaseSelector) -> None:
        try:
            line, _ = self._listener.accept()
        except OSError:  # the caller has hung up already
            return
        _keep_alive(line)
        line.setblocking(False)
        ready.register(line, selectors.EVENT_READ)

    def _rank_of(self, line: socket.socket) -> int | None:
        """Read who calls; None if it is nobody of this job."""
        try:
            said = line.recv(_TOKEN_BYTES + _RANK.size)
        except OSError:
            return None
        if len(said) < _TOKEN_BYTES + _RANK.size or not hmac.compare_digest(said[:_TOKEN_BYTES], self.address.token):
            return None
        return int(_RANK.unpack(said[_TOKEN_BYTES:])[0])


class Line:
    """The other end: of a rank that serves.

    Parameters
    ----------
    address : LineAddress
        The driver's.
    rank : int
        Who calls.
    limit : float
        Seconds to try.

    Raises
    ------
    OSError
        If the driver cannot be reached.
    """

    def __init__(self, address: LineAddress, rank: int, limit: float) -> None:
        self._line = socket.create_connection((address.host, address.port), timeout=limit)
        self._line.sendall(address.token + _RANK.pack(rank))
        self._line.setblocking(False)
        _keep_alive(self._line)

    def is_cut(self) -> bool:
        """Tell whether the driver is gone; asks only the own system."""
        try:
            return not self._line.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Hang up."""
        self._line.close()


def _keep_alive(line: socket.socket) -> None:
    """Let the system notice, within half a minute, when a whole machine is gone and so nobody cuts the line."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
