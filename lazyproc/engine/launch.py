"""Was this process launched together with others, by mpiexec or srun? Told by the environment alone.

MPI cannot be asked before it is initialised, and a process that was not launched by MPI must not initialise it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_TOLD_BY = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("", "PMIX_RANK"),
)
"""Variables with the number of ranks and the rank, in the order of asking: Open MPI; MPICH and its kin, `srun
--mpi=pmi2`; `srun --mpi=pmix`, which tells the rank only."""
_STEP_SIZE = "SLURM_STEP_NUM_TASKS"
"""Tasks of a Slurm step. SLURM_NTASKS and SLURM_PROCID are set in a plain batch script, too, and tell nothing."""
_SLURM_RANK = "SLURM_PROCID"
_MPIEXEC = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
"""Variables that only an mpiexec sets."""


@dataclass(frozen=True)
class Launch:
    """A process launched as one of several.

    Attributes
    ----------
    size : int or None
        How many there are; None if the launcher does not say.
    rank : int
        Which of them this one is.
    told_by : str
        The variable that told so.
    by_mpi : bool
        False if Slurm has started several processes that know nothing of each other.
    """

    size: int | None
    rank: int
    told_by: str
    by_mpi: bool = True

    @property
    def is_driver(self) -> bool:
        """Tell whether this process is the one that goes on with the script."""
        return self.rank == 0


def detect(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Return how this process was launched; None if it was started by itself.

    Parameters
    ----------
    environ : mapping
        The environment.

    Notes
    -----
    A Slurm step of one task is how any program is started there, so it counts as started by itself.
    """
    step = _number(environ, _STEP_SIZE)
    for size_name, rank_name in _TOLD_BY:
        rank = _number(environ, rank_name)
        if rank is None:
            continue
        size = _number(environ, size_name) if size_name else step
        if size == 1 and step == 1 and not any(name in environ for name in _MPIEXEC):
            return None
        return Launch(size, rank, rank_name)
    if step is not None and step > 1:
        return Launch(step, _number(environ, _SLURM_RANK) or 0, _STEP_SIZE, by_mpi=False)
    return None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None
