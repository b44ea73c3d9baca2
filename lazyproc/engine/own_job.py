"""The MPI job that this process drives, if any: asked by all runs, so without loading what makes one."""

from __future__ import annotations

import sys
from typing import Any, Protocol


class DrivenJob(Protocol):
    """What is asked of a job."""

    size: int
    native_threads: int

    def owns(self, client: Any) -> bool:
        """Tell whether a client is connected to the ranks of this job."""
        ...

    def communicator(self) -> Any:
        """Return a communicator that holds only the driver."""
        ...


_job: DrivenJob | None = None
"""The job that this process drives. A process can be part of one only, since MPI starts and ends once."""


def drive(job: DrivenJob) -> None:
    """Note that this process drives the job."""
    global _job
    _job = job


def driven() -> DrivenJob | None:
    """Return the job that this process drives."""
    return _job


def native_threads(client: Any) -> int:
    """Return how many threads of BLAS and OpenMP a worker gets: one, or more in an MPI job that has cores to spare."""
    return _job.native_threads if _job is not None and _job.owns(client) else 1


def mpi_attributes(client: Any = None) -> tuple[Any, int, int]:
    """Return what `Process` has as ``mpi_comm``, ``mpi_rank`` and ``mpi_size``.

    Parameters
    ----------
    client : Client, optional
        The client that was handed over. Default: the active one.

    Returns
    -------
    tuple
        In the driver of an MPI job (lazyproc's own, or one that the script has made with dask-mpi): a communicator that
        holds this process only, so that nobody else is waited for, the rank 0, and the number of ranks. Else None, 0
        and 1.
    """
    from lazyproc.engine.cluster import active_client

    if _job is not None and _job.size > 1:
        return _job.communicator(), 0, _job.size
    library = sys.modules.get("mpi4py.MPI")
    if library is None or (client or active_client()) is None:
        return None, 0, 1
    if not library.Is_initialized() or library.Is_finalized() or library.COMM_WORLD.size == 1:
        return None, 0, 1
    return library.COMM_SELF, 0, int(library.COMM_WORLD.size)
