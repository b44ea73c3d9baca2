"""The errors that lazyproc raises, in one tree.

Every message has four parts: the name of the thing, what came, what was expected, what to do.
Each class is also the built-in error that a caller would expect (`ValueError`, `TypeError`, `OSError`), so that code
written against either keeps working.
"""

from __future__ import annotations

import errno
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that stopped early with its work committed: run again."""


class LazyprocError(Exception):
    """The root of all errors raised by lazyproc on purpose.

    Whichever of them ends a run, what was committed is kept, and the same call computes the rest. Only after
    ``override=True`` would it start afresh again: then leave that out. `Interrupted` is not among them, since it is no
    `Exception`.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # That of Exception would do, but Dask has tblib make another one, which fails for classes with two bases.
        return type(self), self.args, self.__dict__


class ArgumentTypeError(LazyprocError, TypeError):
    """An argument has the wrong type; nothing was computed. Correct it: the message says what was expected."""


class ArgumentValueError(LazyprocError, ValueError):
    """An argument has the right type and an impossible value, or refers to a file that is closed, or is no HDF5 file.

    Correct it: the message says what was expected. Of the classes below this one, `MemoryLimitError` may also come when
    part of the work is done and kept.
    """


class DefinitionError(LazyprocError, TypeError):
    """A process class, or one of its outputs, is declared in a way that cannot work. Correct the class.

    It comes where the mistake shows first: when an `Output`, a `Dimension` or the class is made, when the process is
    constructed, or, for a class with the hooks of the old contract, when it is asked for what needs declared outputs,
    or its hooks have left no results group.
    """


class NotMainDatasetError(ArgumentValueError):
    """The dataset is not a USID Main dataset; the message says what is missing.

    Raised when a process is constructed; the file is as it was. Give the address of another dataset, or add what is
    missing.
    """


class ReadOnlyFileError(LazyprocError, OSError):
    """Results would have to be written where that is not possible: a handle opened for reading, or no permission.

    Mostly raised when a process is constructed, else when `compute` takes its lock or creates the results: also the
    folder must be writable, for the lock file. Give `h5_target_group` in another file, or ``lazy=True`` to look without
    computing.
    """


class FileBusyError(LazyprocError, OSError):
    """The file, or the results in it, are in use by another program or another run.

    Raised when a run begins, and when a class with the hooks of the old contract is constructed with an address, since
    that opens the file for writing. What is committed is kept. Wait for the other run, which the message names, or
    close the file in the other program; then run the same again.
    """


class MissingFileError(LazyprocError, FileNotFoundError):
    """There is no file of this name; `errno` is ENOENT."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOENT


class NoRoomError(LazyprocError, OSError):
    """The disk is full, or a quota or a limit of a file's size is reached; `errno` tells which.

    What was committed is kept. Once there is room the same call goes on.

    Parameters
    ----------
    message : str
        Which file, how much was needed, and how much room there is.
    code : int
        ENOSPC, EDQUOT or EFBIG.
    """

    def __init__(self, message: str, code: int = errno.ENOSPC) -> None:
        super().__init__(message)
        self.errno = code

    def __reduce__(self) -> tuple[type[NoRoomError], tuple[str, int]]:
        return type(self), (str(self), int(self.errno or errno.ENOSPC))


class LockingError(LazyprocError, OSError):
    """The file system cannot lock files, so runs cannot be kept apart; nothing was computed.

    Put the results on another file system, or set the environment variable ``LAZYPROC_LOCKING`` as the message says.
    """


class MemoryLimitError(ArgumentValueError):
    """Not even one position fits into the memory allowed, as reckoned beforehand or as measured in the run.

    Beforehand, in `plan` and at the beginning of `compute`, mostly nothing was created. In the run it comes if blocks
    that cannot be made smaller take more than the first positions have shown; what is finished is kept, and the same
    call goes on. Either way the message says what to raise `max_mem_mb` to.
    """


class OutputError(LazyprocError, ValueError):
    """What the function returned does not fit the declared outputs: another number, shape or type.

    On the first positions, which are tried before anything is created, or later; then the blocks under way are
    finished, and what is committed is kept. Correct the function or the outputs. With ``on_error="record"`` such a
    position is recorded as failed.
    """


class ParameterError(ArgumentValueError, TypeError):
    """A parameter cannot be stored, or is given twice, is missing, or is not taken by the function.

    Raised before anything is computed, with `parms_dict` alone by the constructor, else by the method that got the
    arguments. Correct the name or the value.
    """


class ResultsError(LazyprocError, ValueError):
    """A results group or its status mask is not what it should be: damaged, changed by another program, or not there.

    Raised by what reads results, and by a run whose results were removed or damaged meanwhile. `compute` does not raise
    for a damaged group that it finds: it passes it over, and `why_not_duplicate` tells what is wrong. Restore the file
    from a copy, or compute again with ``override=True``.
    """


class FileChangedError(ResultsError, OSError):
    """A file that is being read or written is gone, was replaced or cut off, or its disk cannot read it anymore.

    What was committed before is kept where it is. Put the file back, or restore it from a copy, and run the same again;
    if the main dataset has another shape or type now, make a new process.
    """


class JournalError(LazyprocError, RuntimeError):
    """What a death has left beside a file does not belong to the file as it is now, or has to be settled first.

    The message says what to do: to open the file again, to call ``lazyproc recover``, or to remove what lies there. The
    file is as it was, and what was committed is kept.
    """


class StaleViewError(LazyprocError, RuntimeError):
    """A lazy view points to results that are no longer those it was made from: they were removed or replaced.

    Raised when a view is computed, instead of giving wrong numbers; views write nothing. Make the view again, with
    `open_results` or `Process.to_xarray`.
    """


class WorkerError(LazyprocError, RuntimeError):
    """A worker was lost, or could not do its block, more often than is allowed; or none can be had.

    A block whose workers die each time is given up: all others are computed before this is raised, and the message
    names the positions. The run stops earlier if no worker lives long enough to finish anything, if a cluster has been
    gone for a minute, if the function cannot be sent to it, or if what its workers write is not seen here. Finished
    blocks are kept, and the same call tries the others again: perhaps with a smaller `max_mem_mb` or another cluster.
    `parallel_compute`, which keeps nothing, raises it, too.
    """


class BlockTakenError(LazyprocError, RuntimeError):
    """A worker came too late: its block was given to another one, or is done. Nothing was written."""


class LaunchError(LazyprocError, RuntimeError):
    """The processes of an MPI job do not find together, or the launcher and the MPI library do not belong together.

    Raised by `cluster`, in the first rank only, before anything is computed. Install an mpi4py that belongs to the
    ``mpiexec`` or ``srun`` that is used; where ranks start slowly, give a longer `timeout`.
    """


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C; what was finished is committed, and the message says how to go on.

    Raised at the end of the call, when the blocks under way are finished or, after 20 s or a second Ctrl-C, dropped.
    Like every KeyboardInterrupt it is no `Exception`, so that ``except Exception`` does not swallow it.
    """


class InterruptedScript(Interrupted, SystemExit):
    """The same in a script, which ends with code 75 if it is not caught, as after SIGTERM: run it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = EXIT_STOPPED


class FunctionError(LazyprocError, RuntimeError):
    """The user's function raised an exception; `__cause__` is that exception, with its traceback.

    On the first positions, which are tried before anything is created, or later; then the blocks under way are
    finished, and what is committed is kept. Correct the function, and the same call computes the rest; or have such
    positions recorded with ``on_error="record"``. `Process.test` computes single ones of `positions`. Views raise it,
    too, when they are computed.

    Parameters
    ----------
    message : str
        What failed, and where.
    positions : tuple of (int, int)
        First position and last position plus one: the position, or the block, that the function was given.
    """

    def __init__(self, message: str, positions: tuple[int, int]) -> None:
        super().__init__(message)
        self.positions = positions

    def __reduce__(self) -> tuple[type[FunctionError], tuple[str, tuple[int, int]]]:
        return type(self), (str(self), self.positions)


class FailureLimitError(FunctionError):
    """More positions failed than `max_failures` allows; `positions` is the first of them.

    All that was done before is kept, and the failed positions with their errors (`failures`). If it shows on the first
    positions already, nothing is created. Correct the function or raise `max_failures`, and the same call goes on.
    """
