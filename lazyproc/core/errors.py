"""The errors that lazyproc raises, in one tree.

Every message has four parts: the name of the thing, what came, what was expected, what to do.
Each class is also the built-in error that a caller would expect (`ValueError`, `TypeError`, `OSError`), so that code
written against either keeps working.
"""

from __future__ import annotations

import errno

EXIT_STOPPED = 75
"""Exit code of a run that stopped early with its work committed: run again."""


class LazyprocError(Exception):
    """The root of all errors raised by lazyproc on purpose."""


class ArgumentTypeError(LazyprocError, TypeError):
    """An argument has the wrong type."""


class ArgumentValueError(LazyprocError, ValueError):
    """An argument has the right type and an impossible value."""


class DefinitionError(LazyprocError, TypeError):
    """A process class, or one of its outputs, is declared in a way that cannot work."""


class NotMainDatasetError(ArgumentValueError):
    """The dataset is not a USID Main dataset; the message says what is missing."""


class ReadOnlyFileError(LazyprocError, OSError):
    """Results would have to be written into a file that is open for reading only."""


class FileBusyError(LazyprocError, OSError):
    """The file, or the results in it, are in use by another program or another run."""


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
    """The file system cannot lock files, so runs cannot be kept apart; the message says what can be set."""


class MemoryLimitError(ArgumentValueError):
    """Not even one position fits into the memory allowed."""


class OutputError(LazyprocError, ValueError):
    """What the function returned does not fit the declared outputs."""


class ParameterError(ArgumentValueError, TypeError):
    """A parameter cannot be stored, or is given twice, is missing, or is not taken by the function."""


class ResultsError(LazyprocError, ValueError):
    """A results group or its status mask is not what it should be."""


class FileChangedError(ResultsError, OSError):
    """A file that is being read or written is gone, was replaced or cut off, or its disk cannot read it anymore."""


class StaleViewError(LazyprocError, RuntimeError):
    """A lazy view points to results that are no longer those it was made from."""


class WorkerError(LazyprocError, RuntimeError):
    """A worker was lost, or could not do its block, more often than is allowed."""


class BlockTakenError(LazyprocError, RuntimeError):
    """A worker came too late: its block was given to another one, or is done. Nothing was written."""


class LaunchError(LazyprocError, RuntimeError):
    """The processes of an MPI job do not find together, or the launcher and the MPI library do not belong together."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C; what was finished is committed, and the message says how to go on.

    Like every KeyboardInterrupt it is no `Exception`, so that ``except Exception`` does not swallow it.
    """


class InterruptedScript(Interrupted, SystemExit):
    """The same in a script, which ends with code 75 if it is not caught, as after SIGTERM: run it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = EXIT_STOPPED


class FunctionError(LazyprocError, RuntimeError):
    """The user's function raised an exception; `__cause__` is that exception, with its traceback.

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

    All that was done before is kept, and the failed positions with their errors.
    """
