"""Which code computed a result: the name of a function, and a hash of its code that survives cosmetic changes.

A function is hashed together with what it closes over, its default values, and the functions and constants of its own
module that it uses. From all functions reached that way a numbered list is made, so that functions which call each
other are no problem. The hash says how it was found:

- ``src:…`` from the source: comments, layout, docstrings, decorators' names and the version of Python do not matter;
- ``byte311:…`` from the byte code, where any part has no source (lambdas, `exec`): only for one version of Python;
- ``name:…`` just a name: what is written in C has no code to look at.

Where there is more that decides what is computed (an object that a method belongs to, that is closed over, or read by
its name; lists, dicts and classes of the module), a second hash of all that, and of the first, follows:
``src:…+src:…``. What earlier versions have hashed thus keeps its hash.
"""

from __future__ import annotations

import functools
import hashlib
import re
import types
from collections.abc import Callable
from typing import Any

from lazyproc.core.carried import Carried
from lazyproc.core.listed import Listed, plain_form
from lazyproc.core.naming import function_name, inner_function, is_opaque, method_function
from lazyproc.core.source_code import BYTE, Files
from lazyproc.core.state import is_empty, taken_apart

_MORE = re.compile(r"(.*?)(?:\+((?:src|byte\d+):[0-9a-f]{16}))?", re.DOTALL)


def code_hash(f: Callable[..., Any]) -> str:
    """Hash the code of a function, and what it carries along or reads.

    Values that cannot be taken apart (locks, open files), or only with too much effort (above 64 MiB), count by their
    type or name only; so do modules, and whatever comes from other modules.

    Parameters
    ----------
    f : callable
        A function, method, partial, builtin, or object with ``__call__``.

    Returns
    -------
    str
        ``src:``, ``byte<version>:`` and 16 hexadecimal digits, or ``name:`` and the name; with a second hash after a
        ``+`` where there is more than code and constants.
    """
    files: Files = {}
    first = Listed(files)
    if not isinstance(method_function(f), types.FunctionType | functools.partial) and is_opaque(f):
        base = f"name:{function_name(f)}"
    else:
        base = _hashed(first.parts(method_function(f)))
    every = Carried(files, f, first.numbers)
    parts = every.all_parts(f)
    return f"{base}+{_hashed([base, *parts])}" if every.has_more else base


def _hashed(parts: list[Any]) -> str:
    prefix = BYTE if any(part[0] == "byte" for part in parts) else "src"
    return f"{prefix}:{hashlib.sha256(ascii(parts).encode()).hexdigest()[:16]}"


def code_changed(stored: str, now: str) -> bool | None:
    """Compare two hashes of `code_hash`.

    Returns
    -------
    bool or None
        None when they were found in different ways (one from the source, one from the byte code; two versions of
        Python; one by a version of lazyproc that looked at less), so that nothing can be said.

    Examples
    --------
    >>> code_changed("src:0123456789abcdef", "src:0123456789abcdef")
    False
    """
    pairs = zip(_parted(stored), _parted(now), strict=True)
    (code, more) = (_differ(*pair) for pair in pairs)
    return code if code is not False else more


def _parted(text: str) -> tuple[str, str]:
    match = _MORE.fullmatch(text)
    assert match is not None
    return match[1], match[2] or "none:"


def _differ(stored: str, now: str) -> bool | None:
    ways = [text.partition(":")[0] if ":" in text else "" for text in (stored, now)]
    return stored != now if ways[0] == ways[1] != "" else None


def unnamed(f: Any) -> str:
    """Return by what name a callable goes that does not say what it computes; an empty text if its name does.

    The name of a function written in Python says it. That of a lambda, of a builtin, of an object, of a method of an
    object or of a partial that binds an object does not: many different ones share it.

    Examples
    --------
    >>> import numpy as np
    >>> unnamed(np.add.reduce), unnamed(lambda x: x), unnamed(code_hash)
    ('reduce', 'lambda', '')
    """
    bound: list[Any] = []
    while isinstance(f, functools.partial):
        bound += [*f.args, *f.keywords.values()]
        f = f.func
    name = str(getattr(f, "__name__", type(f).__name__)).strip("<>")
    if isinstance(f, types.MethodType) and not isinstance(f.__self__, type):
        bound.append(f.__self__)
    inner = method_function(f)
    while not isinstance(inner, types.FunctionType) and (within := inner_function(inner)) is not None:
        inner = method_function(within)
    says = isinstance(inner, types.FunctionType) and inner.__name__.strip("<>") == name != "lambda"
    return "" if says and all(_is_plain(item) for item in bound) else name


def _is_plain(item: Any) -> bool:
    """Tell whether a value is a parameter, or a function that is named."""
    return not unnamed(item) if callable(item) else plain_form(item)[0] != "name" or is_empty(item, taken_apart(item))
