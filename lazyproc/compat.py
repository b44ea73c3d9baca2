"""`replace_pyusid`: third-party packages written for pyUSID run their processes on lazyproc, unchanged."""

from __future__ import annotations

import importlib
import logging
import sys
from types import TracebackType
from typing import Any

from lazyproc.core.errors import LazyprocError

_PLACES = (
    ("pyUSID.processing.process", "Process"),
    ("pyUSID.processing.process", "parallel_compute"),
    ("pyUSID.processing", "Process"),
    ("pyUSID.processing", "parallel_compute"),
    ("pyUSID.processing.comp_utils", "parallel_compute"),
    ("pyUSID.processing.comp_utils", "recommend_cpu_cores"),
    ("pyUSID", "Process"),
    ("pyUSID", "parallel_compute"),
    ("pyUSID", "recommend_cpu_cores"),
)

log = logging.getLogger("lazyproc")


class Replacement:
    """What `replace_pyusid` has changed, so that it can be put back: by `undo`, or by the end of a ``with`` block.

    Its repr names the places. Whoever wants lazyproc for the whole program need not keep it: nothing is put back when
    it is forgotten.
    """

    def __init__(self, replaced: dict[tuple[str, str], tuple[Any, Any]]) -> None:
        self._replaced = replaced

    def undo(self) -> None:
        """Put pyUSID's own names back, but for those that somebody else has changed again.

        Classes defined meanwhile keep the base they were defined with.
        """
        for (module, name), (old, new) in self._replaced.items():
            if getattr(sys.modules[module], name, None) is new:
                setattr(sys.modules[module], name, old)
        self._replaced = {}

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        names = sorted(f"{module}.{name}" for module, name in self._replaced)
        return f"<lazyproc.Replacement of {', '.join(names) or 'nothing'}>"


def replace_pyusid() -> Replacement:
    """Let pyUSID's `Process`, `parallel_compute` and `recommend_cpu_cores` be lazyproc's.

    Call it before the package is imported whose processes shall run on lazyproc: a class keeps the base that it was
    defined with.

    Returns
    -------
    Replacement
        For those who want pyUSID's own back, as tests and notebooks do that compare both: its ``.undo()`` puts
        everything back; or use it as a context. Else it can be forgotten.

    Raises
    ------
    LazyprocError
        If pyUSID is not installed, or cannot be imported.

    Notes
    -----
    Changes attributes of pyUSID's modules, for the whole process and all its threads. Calling it twice changes nothing
    more; undoing the second call then does nothing.

    Examples
    --------
    Classes of a package that is imported within the context, such as ``BGlib.be.analysis``, run on lazyproc:

    >>> import lazyproc
    >>> with lazyproc.replace_pyusid():
    ...     from pyUSID.processing.process import Process
    >>> Process is lazyproc.Process
    True
    """
    from lazyproc.engine.parallel import parallel_compute, recommend_cpu_cores
    from lazyproc.process import Process

    new = {"Process": Process, "parallel_compute": parallel_compute, "recommend_cpu_cores": recommend_cpu_cores}
    replaced: dict[tuple[str, str], tuple[Any, Any]] = {}
    for place, name in _PLACES:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise LazyprocError(
                f"replace_pyusid: {place} cannot be imported ({error}); install pyUSID, or write your class on "
                "lazyproc.Process itself: from lazyproc import Process."
            ) from error
        old = getattr(module, name, None)
        if old is not None and old is not new[name]:
            replaced[place, name] = old, new[name]
            setattr(module, name, new[name])
    old_process, _ = replaced.get(("pyUSID.processing.process", "Process"), (None, None))
    late = [cls.__module__ for cls in old_process.__subclasses__()] if old_process is not None else []
    if late:
        log.warning(
            "replace_pyusid: classes of %s were defined before, and keep pyUSID's Process; call it before they are "
            "imported",
            ", ".join(sorted(set(late))),
        )
    return Replacement(replaced)
