"""Make bytes of functions and their arguments for other processes; their code keeps the names of its files."""

from __future__ import annotations

import io
import types
from collections.abc import Callable
from typing import Any

from cloudpickle import Pickler


def dumps(item: Any) -> bytes:
    """Serialise whatever cloudpickle can: functions of scripts, notebooks and closures by value.

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
    _Pickler(buffer).dump(item)
    return buffer.getvalue()


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
