"""Which modules a function would load when it is first called: imports that stand inside it, and were not made yet."""

from __future__ import annotations

import dis
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from lazyproc.core.naming import inner_function, method_function

_QUICK = sys.stdlib_module_names | {"numpy", "h5py", "lazyproc"}
"""Packages of which nothing takes long to load."""


def imports_to_come(f: Callable[..., Any]) -> list[str]:
    """Return names of modules that the code of a function imports and that are not loaded, in the order of the code.

    Looked at are the function, what is defined in it, and functions of its own module that it uses. Modules of the
    standard library, of NumPy and of h5py are left out, since they are loaded at once, and packages that are not
    installed. Nothing is imported; so for ``from a import b`` there may be both ``a`` and ``a.b``.

    Parameters
    ----------
    f : callable
        A function, method, partial, or object with ``__call__``.

    Examples
    --------
    >>> def share(spectrum):
    ...     import json, no_such_package
    ...     return no_such_package.share(spectrum)
    >>> imports_to_come(share)
    []
    """
    first = _python_function(f)
    functions: list[types.FunctionType] = [] if first is None else [first]
    found: dict[str, None] = {}
    for function in functions:  # grows while it is walked
        for code in _all_code(function.__code__):
            found |= dict.fromkeys(_imports(code, function.__globals__))
            for name in code.co_names:
                used = function.__globals__.get(name)
                if isinstance(used, types.FunctionType) and used not in functions:
                    if used.__module__ == function.__module__:
                        functions.append(used)
    packages = {name: name.partition(".")[0] for name in found if name not in sys.modules}
    slow = {package for package in packages.values() if package not in _QUICK and _is_there(package)}
    return [name for name, package in packages.items() if package in slow]


def _python_function(f: Any) -> types.FunctionType | None:
    """Return the Python function inside a callable; None if there is none, or it is wrapped in itself."""
    seen: list[Any] = []
    while not any(f is one for one in seen):
        seen.append(f)
        f = method_function(f)
        inner = inner_function(f)
        if inner is None and isinstance(f, types.FunctionType):
            return f
        f = inspect.getattr_static(type(f), "__call__", None) if inner is None else inner
    return None


def _all_code(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_code(constant)


def _imports(code: types.CodeType, names: Mapping[str, Any]) -> Iterator[str]:
    """Find the import statements: each leaves its level and what it takes from the module on the stack before it."""
    before: list[Any] = [None, None]
    for instruction in dis.get_instructions(code):
        if instruction.opname == "EXTENDED_ARG":  # a part of the next one
            continue
        if instruction.opname == "IMPORT_NAME":
            level, taken = before
            module = _absolute(str(instruction.argval), level, names)
            if module is not None:
                yield module
                names_taken = taken if isinstance(taken, tuple) else ()
                yield from (f"{module}.{name}" for name in names_taken if _may_be_module(module, name))
        before = [before[1], instruction.argval]


def _absolute(name: str, level: Any, names: Mapping[str, Any]) -> str | None:
    if not level:
        return name
    with suppress(ImportError, TypeError):
        return importlib.util.resolve_name("." * level + name, names.get("__package__"))
    return None


def _may_be_module(package: str, name: str) -> bool:
    """Tell whether a name that is taken from a package may be a module of it; asking the package might load it."""
    loaded = sys.modules.get(package)
    if loaded is None:
        return name != "*"
    known = getattr(loaded, "__dict__", {})
    return name not in known and "__path__" in known and _is_there(f"{package}.{name}")


def _is_there(module: str) -> bool:
    with suppress(Exception):  # whatever raises in a finder, or for what a script has put together, is not of interest
        return importlib.util.find_spec(module) is not None
    return False
