"""A Dask scheduler in this process, in a thread of its own, for workers that are started elsewhere. Quiet."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import Any

_CLOSE_SECONDS = 10.0


def quiet(level: int) -> None:
    """Let Dask's own loggers say nothing below a level: a clean start and end logs dozens of lines."""
    import distributed  # noqa: F401  its import sets the levels

    for name in ("distributed", "distributed.client", "tornado", "tornado.application"):
        logger = logging.getLogger(name)
        logger.setLevel(max(level, logger.level))


def start_scheduler(host: str, dashboard_address: str, name: str, *, patient: bool = False, **more: Any) -> Any:
    """Start a scheduler and return the cluster object around it.

    Parameters
    ----------
    host : str
        The address to listen at.
    dashboard_address : str
        Where the dashboard listens; a port that is taken is replaced by a free one.
    name : str
        What the cluster is called.
    patient : bool
        Never give up a worker that is not heard of: it may well be in a function that does not let go of Python's lock
        for long. That a process is dead shows at its connection.
    **more
        Further options of `distributed.SpecCluster`: workers to be started with it.
    """
    import dask
    from distributed import Scheduler, SpecCluster

    options = {"host": host, "port": 0, "dashboard": True, "dashboard_address": dashboard_address}
    with dask.config.set({"distributed.scheduler.worker-ttl": None} if patient else {}):
        return SpecCluster(
            scheduler={"cls": Scheduler, "options": options}, name=name, silence_logs=logging.ERROR, **more
        )


def stop_scheduler(cluster: Any) -> None:
    """Close a cluster, and whatever clients are left of it, without a word and without waiting for long."""
    from distributed import Client

    quiet(logging.CRITICAL + 1)
    for client in [one for one in Client._instances if one.cluster is cluster]:
        with suppress(Exception):
            client.close(timeout=_CLOSE_SECONDS)
    with suppress(Exception):
        cluster.close(timeout=_CLOSE_SECONDS)


def address_of_this_machine(interface: str | None) -> str:
    """Return the address at which other machines reach this one."""
    import warnings

    from distributed.utils import get_ip, get_ip_interface

    if interface is not None:
        return str(get_ip_interface(interface))
    with suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it had to guess
        return str(get_ip())
