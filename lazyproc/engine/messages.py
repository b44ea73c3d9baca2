"""What the ranks of an MPI job tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from lazyproc.engine.line import LineAddress

HELLO, ORDERS, END = 27701, 27702, 27703
"""Tags of our messages, unlikely to be anybody else's."""


@dataclass(frozen=True)
class Hello:
    """What a rank tells of itself.

    Attributes
    ----------
    machine : str
        Its host name.
    cores : frozenset of int
        The cores that it may use.
    n_cores : int
        How many of them at a time, by the quota of its control group.
    memory : int
        Bytes that the machine, or the control group, has.
    """

    machine: str
    cores: frozenset[int]
    n_cores: int
    memory: int


@dataclass(frozen=True)
class Orders:
    """What a rank is told.

    Attributes
    ----------
    scheduler : str
        The address of Dask's scheduler.
    host : str or None
        The address to listen at; None: the one from which the scheduler is reached.
    line : LineAddress
        Where the driver is called.
    memory : int
        Bytes for this rank.
    threads : int
        Threads of BLAS and OpenMP for this rank.
    """

    scheduler: str
    host: str | None
    line: LineAddress
    memory: int
    threads: int
