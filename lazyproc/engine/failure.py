"""What went wrong with a block, in a form that survives the way to the driver with the user's own traceback."""

from __future__ import annotations

import io
import pickle
import socket
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lazyproc.core.blocks import Block
from lazyproc.core.errors import (
    FileChangedError,
    FunctionError,
    LazyprocError,
    MissingFileError,
    OutputError,
    ReadOnlyFileError,
    WorkerError,
)
from lazyproc.core.no_result import NoResult, OutputMismatch, RowError

_NAMED_BLOCKS = 10
_OF_FILES = (FileChangedError, MissingFileError, ReadOnlyFileError)
"""What a worker finds that does not see the files that the driver sees."""
_ENDS = 25
"""So many of the outermost frames of a traceback travel, and of the innermost ones."""


@dataclass(frozen=True)
class Failure:
    """Why a block has no results.

    Attributes
    ----------
    kind : str
        ``"function"``: the user's function raised; ``"output"``: what it returned does not fit; ``"worker"``: reading
        or writing failed; ``"loading"``: the kernel cannot be loaded in the worker; ``"lost"``: the workers that had
        the block died, each time it was tried.
    positions : tuple of int
        First position and last position plus one that are concerned.
    error : Exception
        What was raised, its traceback included.
    host : str
        The machine of the worker, where it is known and may be to blame: it may not see a file that others see.
    """

    kind: str
    positions: tuple[int, int]
    error: BaseException
    host: str = ""

    @classmethod
    def of_function(cls, error: RowError, block: Block) -> Failure:
        """The user's function raised."""
        cause = error.__cause__ or error
        if cause.__traceback__ is not None and cause.__traceback__.tb_next is not None:
            cause = cause.with_traceback(cause.__traceback__.tb_next)  # the first frame is lazyproc's own loop
        cause.__suppress_context__ = cause.__suppress_context__ or isinstance(cause.__context__, RowError)
        return cls("function", positions_of(block, error.first, error.last), cause)

    @classmethod
    def of_output(cls, error: OutputMismatch, block: Block) -> Failure:
        """What the function returned does not fit."""
        return cls("output", positions_of(block, error.row, error.row + 1), error)

    @classmethod
    def of_worker(cls, error: BaseException, block: Block, host: str | None = None) -> Failure:
        """The block could not be read, written or started: on this machine, on another one, or nobody knows where."""
        return cls("worker", (block.start, block.stop), error, socket.gethostname() if host is None else host)

    @classmethod
    def of_loading(cls, error: BaseException, block: Block) -> Failure:
        """The kernel cannot be loaded in the worker."""
        return cls("loading", (block.start, block.stop), error, socket.gethostname())

    @classmethod
    def of_lost(cls, error: BaseException, block: Block) -> Failure:
        """The workers that had the block died."""
        return cls("lost", (block.start, block.stop), error)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.kind, self.positions, _dump_error(self.error), self.host)

    def raise_error(self, process_name: str, dataset: str, *, could_record: bool = False) -> NoReturn:
        """Raise what the user shall see; with `could_record` that such failures might be recorded, too."""
        first, last = self.positions
        where = f"at position {first}" if last - first == 1 else f"in the block of positions {first} to {last - 1}"
        what = f"{type(self.error).__name__}: {self.error}"
        elsewhere = f" on {self.host}" if self.host not in ("", socket.gethostname()) else ""
        advice = ""
        if could_record:
            advice = " (To note such positions and compute the others: on_error='record', or --on-error record.)"
        if self.kind == "function":
            raise FunctionError(
                f"{process_name}: the function failed {where} of {dataset}: {what}{advice}", self.positions
            ) from (self.error)
        if self.kind == "output":
            raise OutputError(f"{process_name}: {where} of {dataset}: {self.error}") from None
        if isinstance(self.error, LazyprocError):
            if elsewhere:
                must = " It must see the same files by these paths." if isinstance(self.error, _OF_FILES) else ""
                self.error.add_note(f"That is what a worker{elsewhere} found.{must}")
            raise self.error
        if self.kind == "loading":
            raise WorkerError(
                f"{process_name}: the workers{elsewhere} cannot load the function, or an argument of it ({what}); "
                "expected what they can import, or what can be sent. Define it, and what it uses, at the top level of "
                "a module that they find, too."
            ) from self.error
        raise WorkerError(f"{process_name}: a worker{elsewhere} failed {where} of {dataset}: {what}") from self.error


class FailedElsewhere(NoResult):
    """What a function raised in another process, where it was only tried.

    Attributes
    ----------
    failure : Failure
        What is known of it.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def raise_failures(failures: Sequence[Failure], process_name: str, dataset: str) -> NoReturn:
    """Raise what the user shall see of all failures: what stopped the run, else all blocks whose workers died."""
    stopping = [one for one in failures if one.kind != "lost"]
    if stopping:
        stopping[0].raise_error(process_name, dataset, could_record=True)  # else it would have been
    blocks = sorted(one.positions for one in failures)
    spans = ", ".join(_span(*positions) for positions in blocks[:_NAMED_BLOCKS])
    more = f" and {len(blocks) - _NAMED_BLOCKS} more blocks" if len(blocks) > _NAMED_BLOCKS else ""
    raise WorkerError(
        f"{process_name}: workers died each time they had {spans}{more} of {dataset}: a crash in native code, or too "
        "little memory. Try test() on them, in a process that may die, or a smaller max_mem_mb. All other blocks are "
        "done and kept; the same call tries these again."
    ) from failures[0].error


def _span(first: int, stop: int) -> str:
    return f"position {first}" if stop - first == 1 else f"the block of positions {first} to {stop - 1}"


def positions_of(block: Block, first: int, last: int) -> tuple[int, int]:
    """Translate rows of a block, first and last plus one, to positions of the main dataset."""

    def position(row: int) -> int:
        for start, stop, place in block.offsets():
            if place <= row < place + stop - start:
                return start + row - place
        return block.start

    return position(first), position(last - 1) + 1


def _dump_error(error: BaseException) -> tuple[bytes, Any, str]:
    from tblib import Traceback

    text = "".join(traceback.format_exception(error))
    trace = Traceback(_short(error.__traceback__)).to_dict() if error.__traceback__ is not None else None
    return _packed(error.with_traceback(None)), trace, text


def _packed(error: BaseException) -> bytes:
    """Return an error in bytes, none if that is impossible."""
    import cloudpickle

    class Plainly(cloudpickle.Pickler):  # type: ignore[misc]
        """By what the class itself says: that of tblib, which Dask brings along, cannot load all that it dumps."""

        def reducer_override(self, item: Any) -> Any:
            return item.__reduce_ex__(4) if isinstance(item, BaseException) else super().reducer_override(item)

    for pickler in (cloudpickle.Pickler, Plainly):
        buffer = io.BytesIO()
        try:
            pickler(buffer).dump(error)
            str(pickle.loads(buffer.getvalue()))  # some exceptions can be dumped but not loaded, or say nothing then
        except Exception:
            continue
        return buffer.getvalue()
    return b""


def _short(trace: types.TracebackType) -> types.TracebackType:
    """Leave out the middle of a traceback that is too deep to be pickled, as where a function calls itself for ever."""
    links = [trace]
    while links[-1].tb_next is not None:
        links.append(links[-1].tb_next)
    if len(links) <= 2 * _ENDS:
        return trace
    short: types.TracebackType | None = None
    for link in reversed([*links[:_ENDS], *links[-_ENDS:]]):
        short = types.TracebackType(short, link.tb_frame, link.tb_lasti, link.tb_lineno)
    assert short is not None
    return short


def _load(kind: str, positions: tuple[int, int], dumped: tuple[bytes, Any, str], host: str) -> Failure:
    from tblib import Traceback

    packed, trace, text = dumped
    try:
        error = pickle.loads(packed) if packed else RuntimeError(text.strip().rpartition("\n")[2])
    except Exception:
        error = RuntimeError(text)
    if isinstance(error, SystemExit) and error.args:
        error.code = error.args[0]  # tblib's way of pickling, which Dask brings along, loses it
    if trace is not None:
        error = error.with_traceback(Traceback.from_dict(trace).as_traceback())
    return Failure(kind, positions, error, host)
