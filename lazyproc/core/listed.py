"""The functions that one leads to, as a numbered list of plain values: what a hash of code is made of."""

from __future__ import annotations

import dis
import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from lazyproc.core.canonical import NUMBERS, canonical, is_of_numbers, payload_of
from lazyproc.core.errors import ParameterError
from lazyproc.core.naming import function_name, inner_function, is_opaque, method_function
from lazyproc.core.source_code import Files, code_of, source_of
from lazyproc.core.state import Form, opaque

_CONSTANTS = (bool, int, float, complex, str, bytes, np.generic, np.ndarray)


class Listed:
    """The numbered list of functions that one leads to, each in plain values, where others stand as their numbers."""

    def __init__(self, files: Files) -> None:
        self.nodes: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.files = files

    def parts(self, root: Any) -> list[Any]:
        """Describe a function, and all that it leads to."""
        self.number(root)
        return [self.describe(node) for node in self.nodes]  # grows while it is walked

    def number(self, node: Any) -> Form:
        """Put a function on the list, if it is not there, and return its number."""
        if id(node) not in self.numbers:
            self.numbers[id(node)] = len(self.nodes)
            self.nodes.append(node)
        return ("function", self.numbers[id(node)])

    def value(self, item: Any) -> Form:
        """Return a value in plain form; a function's is its number."""
        item = method_function(item)
        if callable(item) and (isinstance(item, types.FunctionType | functools.partial) or not is_opaque(item)):
            return self.number(item)
        return plain_form(item)

    def describe(self, node: Any) -> tuple[Any, ...]:
        """Describe what is on the list: its code, and what it takes from outside."""
        if isinstance(node, functools.partial):
            keywords = [(name, self.value(item)) for name, item in sorted(node.keywords.items())]
            return ("partial", self.value(node.func), [self.value(item) for item in node.args], keywords)
        if not isinstance(node, types.FunctionType):
            return self.object(node)
        tree = source_of(node.__code__, self.files)
        defaults = [self.value(item) for item in node.__defaults__ or ()]
        keywords = [(name, self.value(item)) for name, item in sorted((node.__kwdefaults__ or {}).items())]
        outside = [(name, self.value(item)) for name, item in taken_from_outside(node)]
        return (*code_of(node.__code__, tree), defaults, keywords, outside)

    def object(self, node: Any) -> tuple[Any, ...]:
        """Describe an object with ``__call__``, or one that wraps a function."""
        inner = inner_function(node)
        if inner is not None:
            return ("wrapper", function_name(type(node)), self.value(inner))
        state = [(name, self.value(item)) for name, item in sorted(getattr(node, "__dict__", {}).items())]
        return ("object", function_name(type(node)), self.value(type(node).__call__), state)


def plain_form(item: Any) -> Form:
    """Return a value as numbers and texts, arrays by their digests; what cannot be taken apart by its type or name."""
    if is_of_numbers(item) and item.size:
        pieces = payload_of(item)
        if pieces is not None:  # perhaps a large array, of which no form is made as a whole
            made = hashlib.sha256()
            for piece in pieces:
                made.update(piece)
            return (NUMBERS[item.dtype.kind], item.shape, made.hexdigest())
    try:
        form: Any = canonical(item)
    except ParameterError:
        return opaque(item)
    match form:
        case (kind, shape, bytes() as payload):
            return (kind, shape, hashlib.sha256(payload).hexdigest())
    return tuple(form)


def taken_from_outside(f: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Give what a function takes from outside: closed-over values, functions and constants of its own module."""
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            yield f"free {name}", cell.cell_contents
        except ValueError:  # not yet assigned
            yield f"free {name}", None
    for name in sorted(global_names(f.__code__)):
        item = f.__globals__.get(name)
        if (isinstance(item, types.FunctionType) and item.__module__ == f.__module__) or is_constant(item):
            yield f"global {name}", item


def is_constant(item: Any) -> bool:
    """Tell whether a global counts: not lists and dicts, which are often caches that change while the code does not."""
    return isinstance(item, _CONSTANTS) or (isinstance(item, tuple) and all(map(is_constant, item)))


def global_names(code: types.CodeType) -> set[str]:
    """Return the names that a function's code, and the functions within it, look up in its module."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return {name for name in names if not name.startswith("__")}
