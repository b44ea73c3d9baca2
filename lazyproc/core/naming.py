"""What callables are called, and what is inside of them: methods, partials, compiled and vectorised functions."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import numpy as np


def function_name(f: Any) -> str:
    """Name a function as ``module:qualname``.

    A `functools.partial` and a wrapper with ``__wrapped__`` have the name of the function inside, an object with
    ``__call__`` that of its class.

    Examples
    --------
    >>> function_name(len)
    'builtins:len'
    """
    inner = inner_function(f)
    if inner is not None:
        return function_name(inner)
    f = getattr(f, "__func__", f)
    owner = getattr(f, "__objclass__", None)  # str.upper
    named = f if isinstance(getattr(f, "__qualname__", None), str) or isinstance(f, np.ufunc) else type(f)
    module = getattr(named, "__module__", None) or getattr(owner, "__module__", None)
    if isinstance(named, np.ufunc):
        module = module or "numpy"
    return f"{module or 'builtins'}:{getattr(named, '__qualname__', None) or named.__name__}"


def method_function(f: Any) -> Any:
    """Return the function of a method."""
    return f.__func__ if isinstance(f, types.MethodType | staticmethod | classmethod) else f


def inner_function(f: Any) -> Any:
    """Return the Python function inside a partial, a compiled or a vectorised function, or None."""
    if isinstance(f, functools.partial):
        return f.func
    if isinstance(f, type | types.ModuleType):
        return None
    for name in ("__wrapped__", "py_func", "pyfunc"):
        if callable(inner := getattr(f, name, None)):
            return inner
    return None


def is_opaque(f: Any) -> bool:
    """Tell whether there is no Python code in a callable."""
    has_call = isinstance(inspect.getattr_static(type(f), "__call__", None), types.FunctionType)
    return isinstance(f, type) or (not has_call and inner_function(f) is None)
