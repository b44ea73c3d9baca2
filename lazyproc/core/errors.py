"""The errors that lazyproc raises, in one tree.

Every message has four parts: the name of the thing, what came, what was expected, what to do.
Each class is also the built-in error that a caller would expect (`ValueError`, `TypeError`, `OSError`), so that code
written against either keeps working.
"""

from __future__ import annotations


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


class MemoryLimitError(ArgumentValueError):
    """Not even one position fits into the memory allowed."""


class OutputError(LazyprocError, ValueError):
    """What the function returned does not fit the declared outputs."""


class ParameterError(ArgumentValueError, TypeError):
    """A parameter cannot be stored, or is given twice, is missing, or is not taken by the function."""


class ResultsError(LazyprocError, ValueError):
    """A results group or its status mask is not what it should be."""


class StaleViewError(LazyprocError, RuntimeError):
    """A lazy view points to results that are no longer those it was made from."""


class WorkerError(LazyprocError, RuntimeError):
    """A worker was lost, or could not do its block, more often than is allowed."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C; what was finished is committed, and the message says how to go on.

    Like every KeyboardInterrupt it is no `Exception`, so that ``except Exception`` does not swallow it.
    """


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
