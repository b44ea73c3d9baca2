"""Make bytes of functions and their arguments for other processes: with the folders of modules, and names of files."""

from __future__ import annotations

import io
import os
import sys
import sysconfig
import types
from collections.abc import Callable
from typing import Any

from cloudpickle import Pickler


def dumps(item: Any) -> bytes:
    """Serialise whatever cloudpickle can: functions of scripts, notebooks and closures by value.

    Where it is loaded, modules are found that are found here, beside a script or on PYTHONPATH, if their folders are
    there, too: these come to the end of ``sys.path`` first, if they are not in it. Nothing is taken out.

    Parameters
    ----------
    item : object
        What is sent; where it is loaded, lazyproc has to be there, too.

    Raises
    ------
    Exception
        Whatever cloudpickle says of what cannot be sent.

    Examples
    --------
    >>> import pickle
    >>> pickle.loads(dumps(lambda x: x + 1))(2)
    3
    """
    buffer = io.BytesIO()
    _Pickler(buffer).dump(_WithFolders(item))
    return buffer.getvalue()


class _WithFolders:
    """Loaded as the item itself, and not before the folders are there."""

    def __init__(self, item: Any) -> None:
        self._item = item

    def __reduce__(self) -> tuple[Any, ...]:
        return _second, (_Folders(), self._item)  # loaded in this order


class _Folders:
    """Folders of this process for modules; of an installation, none: a worker elsewhere has its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        paths = sysconfig.get_paths()
        installed = tuple({paths[name] + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
        folders = dict.fromkeys(os.path.abspath(folder) for folder in sys.path if isinstance(folder, str))
        return add_folders, ([one for one in folders if not (one + os.sep).startswith(installed)],)


def add_folders(folders: list[str]) -> None:
    """Put folders at the end of ``sys.path``, those that exist here and are not in it."""
    known = {os.path.abspath(folder) for folder in sys.path if isinstance(folder, str)}
    sys.path += [folder for folder in folders if folder not in known and os.path.exists(folder)]


def _second(_: Any, item: Any) -> Any:
    return item


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    make, arguments, *_ = Pickler.dispatch_table[types.CodeType](code)
    return _load_code, (make, arguments, code.co_filename)


def _load_code(make: Callable[..., types.CodeType], arguments: tuple[Any, ...], filename: str) -> types.CodeType:
    return make(*arguments).replace(co_filename=filename)


class _Pickler(Pickler):  # type: ignore[misc]
    """cloudpickle's, but it does not call each file ``<dynamic-code>``, as cloudpickle does from 3.1.3 on.

    Tracebacks of errors that come back from workers would name no file then, and show no line of it.
    """

    dispatch_table = Pickler.dispatch_table.new_child({types.CodeType: _reduce_code})
