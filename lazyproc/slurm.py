"""Write job scripts for Slurm: drain before the wall time, submit themselves again until the work is done."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from lazyproc.core.errors import ArgumentValueError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_CORES = "${SLURM_CPUS_PER_TASK:-1}"
_LAUNCHERS = {"srun": f"SRUN_CPUS_PER_TASK={_CORES} srun --mpi=pmi2", "mpiexec": "mpiexec"}
"""What starts the ranks. Since 22.05 srun gives a rank the cores that the job has for it only if told so once more; not
for mpiexec, which starts one process a machine by srun."""


@dataclass(frozen=True)
class SlurmJob:
    """What goes into a job script.

    Attributes
    ----------
    command : tuple of str
        What is run: ``("lazyproc", "run", …)`` or ``("python", "script.py")``.
    path : str
        Where the script will lie, absolute: it submits itself again from there.
    ntasks : int
        Ranks. 1 runs the command by itself, without MPI; then `cpus_per_task` is what lazyproc uses.
    cpus_per_task : int
        Cores of a rank.
    time : str
        Wall time, as Slurm reads it.
    drain_seconds : int
        So long before the wall time the run is told to stop, to finish its blocks and to commit.
    launcher : str
        ``"srun"`` (PMI-2) or ``"mpiexec"``.
    max_jobs : int
        No more jobs than this one after another, in case none of them gets anything done.
    options : tuple of str
        More options of sbatch, such as ``"--partition=long"``.

    Raises
    ------
    ArgumentValueError
        If a value cannot be right; names it.
    """

    command: tuple[str, ...]
    path: str
    ntasks: int = 1
    cpus_per_task: int = 1
    time: str = "01:00:00"
    drain_seconds: int = 120
    launcher: str = "srun"
    max_jobs: int = 50
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.command:
            raise ArgumentValueError("command: is empty; expected what the job shall run, such as lazyproc run …")
        for name in ("ntasks", "cpus_per_task", "drain_seconds", "max_jobs"):
            if getattr(self, name) < 1:
                raise ArgumentValueError(f"{name}: is {getattr(self, name)}; expected 1 or more.")
        wall = _seconds_of(self.time)
        if wall is not None and self.drain_seconds >= wall:
            raise ArgumentValueError(
                f"drain_seconds: is {self.drain_seconds}, and the wall time of {self.time} is {wall} s; expected less: "
                "each job would be told to stop as it begins. Give a longer time, or a smaller --drain."
            )
        if self.launcher not in _LAUNCHERS:
            raise ArgumentValueError(f"launcher: is {self.launcher!r}; expected one of {', '.join(_LAUNCHERS)}.")
        if any("\n" in text for text in (self.path, self.time, *self.options, *self.command)):
            raise ArgumentValueError("A line break came in an option or in the command; expected each on one line.")

    def script(self) -> str:
        """Return the text of the job script.

        Notes
        -----
        Slurm sends USR1 to the script's shell (``--signal=B:``), which hands it on to the command; lazyproc then
        finishes the blocks under way, commits and leaves with code 75, and the script submits itself again. So it does
        if the command was ended by that signal, which came before lazyproc was there to take it. With any other code it
        ends with that code, and so it does after SIGTERM: a job that is cancelled is to stay away, and one whose node
        fails, that has to make room, or that is queued again by hand, Slurm itself starts again. Only at the wall time,
        by which it tells that it has passed, SIGTERM is no reason not to go on.

        ``lazyproc run … --override`` starts afresh in the first job: all that come after it, by either way, are given
        the number of that one as ``--batch``, and go on with what it has begun, or return what it has finished.
        """
        launch = _LAUNCHERS[self.launcher] if self.ntasks > 1 else ""
        afresh = self._starts_afresh()
        words = [
            shlex.quote(word) + (' --batch "$LAZYPROC_BATCH"' if number in afresh else "")
            for number, word in enumerate(self.command)
        ]
        command = " ".join([launch, *words]).strip()
        directives = [
            f"--ntasks={self.ntasks}",
            f"--cpus-per-task={self.cpus_per_task}",
            f"--time={self.time}",
            f"--signal=B:USR1@{self.drain_seconds}",
            "--requeue",
            "--open-mode=append",
            *self.options,
        ]
        threads = "\n".join(f"export {name}={_CORES}" for name in _THREAD_VARIABLES)
        return _TEMPLATE.format(
            directives="\n".join(f"#SBATCH {one}" for one in directives),
            threads=threads,
            grace=max(1, self.drain_seconds * 2 // 3),
            command=command,
            ended="yes138|yes10" if launch == "mpiexec" else "yes138",  # mpiexec does not add 128
            path=shlex.quote(self.path),
            again=_GOES_ON + shlex.quote(self.path)
            if "--override" in self.command
            else f"sbatch {shlex.quote(self.path)}",
            max_jobs=self.max_jobs,
        )

    def _starts_afresh(self) -> list[int]:
        """Return which words of the command tell `lazyproc run` to start afresh."""
        if "run" not in self.command:
            return []
        before = self.command[: self.command.index("run")]
        if not any(os.path.basename(word) == "lazyproc" or word == "lazyproc.cli" for word in before):
            return []
        return [number for number, word in enumerate(self.command) if word == "--override" and number > len(before)]


def _seconds_of(time: str) -> int | None:
    """Return the seconds of a wall time: minutes[:seconds], hours:minutes:seconds, or days-hours[:minutes[:seconds]].

    None for what Slurm may understand in another way, and for 0, by which it means no limit.

    Examples
    --------
    >>> _seconds_of("90"), _seconds_of("1:30"), _seconds_of("01:00:00"), _seconds_of("2-12")
    (5400, 90, 3600, 216000)
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return 86400 * int(days or 0) + seconds or None


_GOES_ON = "sbatch --export=ALL,LAZYPROC_JOB=2,LAZYPROC_BATCH=$LAZYPROC_BATCH "
"""What submits a script by hand that shall not start afresh once more."""

_TEMPLATE = """#!/bin/bash
{directives}

# One thread of BLAS and OpenMP a core that a rank has.
{threads}
# What is under way may take this long to end; then it is dropped, and there is time left to commit.
export LAZYPROC_GRACE_SECONDS=${{LAZYPROC_GRACE_SECONDS:-{grace}}}

job=${{LAZYPROC_JOB:-1}}
echo "job $SLURM_JOB_ID, number $job in a row, on $SLURM_JOB_NODELIST"
# What starts afresh does so once in all of them; a job that is queued again keeps its number.
if [ "$job" -eq 1 ] || [ -z "$LAZYPROC_BATCH" ]; then LAZYPROC_BATCH=${{SLURM_CLUSTER_NAME:-slurm}}-$SLURM_JOB_ID; fi
export LAZYPROC_BATCH

{command} &
child=$!
# Before the wall time Slurm signals this shell; the run finishes its blocks, commits and leaves with code 75.
trap 'signalled=yes; drained=yes; kill -USR1 "$child" 2>/dev/null' USR1
# By scancel, scontrol requeue, preemption, or at the wall time itself: Slurm sends it to all other processes, too.
trap 'signalled=yes; terminated=yes; kill -TERM "$child" 2>/dev/null' TERM
drained=
terminated=
code=127
while
    signalled=
    wait "$child"
    status=$?
    [ "$status" -eq 127 ] || code=$status  # 127: it had ended before the last signal came, or was not found
    [ -n "$signalled" ]
do :; done
# Ended by USR1 itself: no run was there to take it, and so nothing was under way.
case "$drained$code" in {ended}) code=75 ;; esac

# Whoever cancels a job wants none in its place, and one that is to run again Slurm queues by itself.
if [ -n "$terminated" ] && ! scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q "Reason=TimeLimit"; then
    [ "$code" -ne 75 ] || echo "ended by SIGTERM with work left: submit again with: {again}" >&2
    exit "$code"
fi
if [ "$code" -eq 75 ]; then
    if [ "$job" -lt {max_jobs} ]; then
        LAZYPROC_JOB=$((job + 1)) sbatch --export=ALL --dependency="afterany:$SLURM_JOB_ID" {path} && exit 0
    fi
    echo "stopped with work left: submit again with: {again}" >&2
fi
exit "$code"
"""
