"""Which code computed a result: the name of a function, and a hash of its code that survives cosmetic changes.

A function is hashed together with what it closes over, its default values, and the functions and constants of its own
module that it uses. From all functions reached that way a numbered list is made, so that functions which call each
other are no problem. The hash says how it was found:

- ``src:…`` from the source: comments, layout, docstrings, decorators' names and the version of Python do not matter;
- ``byte311:…`` from the byte code, where any part has no source (lambdas, `exec`): only for one version of Python;
- ``name:…`` just a name: what is written in C has no code to look at.
"""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import hashlib
import inspect
import linecache
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lazyproc.core.canonical import NUMBERS, canonical, is_of_numbers, payload_of
from lazyproc.core.errors import ParameterError

_BYTE = f"byte{sys.version_info.major}{sys.version_info.minor}"
_FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Import = ast.Import | ast.ImportFrom
_PARSING = threading.Lock()
"""Some versions of Python fail (SystemError) where two threads parse or compile at a time: CPython's issue 106905."""
_TRIES = 10
_CONSTANTS = (bool, int, float, complex, str, bytes, np.generic, np.ndarray)


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


def code_hash(f: Callable[..., Any]) -> str:
    """Hash the code of a function.

    Values that have no canonical form (objects, modules) count by their type or name only; so do the instance that a
    method is bound to, and whatever comes from other modules.

    Parameters
    ----------
    f : callable
        A function, method, partial, builtin, or object with ``__call__``.

    Returns
    -------
    str
        ``src:``, ``byte<version>:`` and 16 hexadecimal digits, or ``name:`` and the name.
    """
    if not isinstance(method_function(f), types.FunctionType | functools.partial) and _is_opaque(f):
        return f"name:{function_name(f)}"
    nodes: list[Any] = [method_function(f)]
    numbers = {id(nodes[0]): 0}
    files: _Files = {}
    parts: list[Any] = []
    for node in nodes:  # grows while it is walked
        parts.append(_describe(node, nodes, numbers, files))
    prefix = _BYTE if any(part[0] == "byte" for part in parts) else "src"
    return f"{prefix}:{hashlib.sha256(ascii(parts).encode()).hexdigest()[:16]}"


def code_changed(stored: str, now: str) -> bool | None:
    """Compare two hashes of `code_hash`.

    Returns
    -------
    bool or None
        None when they were found in different ways (one from the source, one from the byte code; two versions of
        Python), so that nothing can be said.

    Examples
    --------
    >>> code_changed("src:0123456789abcdef", "src:0123456789abcdef")
    False
    """
    ways = [text.partition(":")[0] if ":" in text else "" for text in (stored, now)]
    return stored != now if ways[0] == ways[1] != "" else None


# ---- what a function consists of


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


def _is_opaque(f: Any) -> bool:
    """Tell whether there is no Python code in a callable."""
    has_call = isinstance(inspect.getattr_static(type(f), "__call__", None), types.FunctionType)
    return isinstance(f, type) or (not has_call and inner_function(f) is None)


def _describe(node: Any, nodes: list[Any], numbers: dict[int, int], files: _Files) -> tuple[Any, ...]:
    """Describe one function in plain values; other functions stand in it as their numbers, and join the list."""

    def value(item: Any) -> Any:
        item = method_function(item)
        if callable(item) and (isinstance(item, types.FunctionType | functools.partial) or not _is_opaque(item)):
            if id(item) not in numbers:
                numbers[id(item)] = len(nodes)
                nodes.append(item)
            return ("function", numbers[id(item)])
        return _plain(item)

    if isinstance(node, functools.partial):
        keywords = [(name, value(item)) for name, item in sorted(node.keywords.items())]
        return ("partial", value(node.func), [value(item) for item in node.args], keywords)
    if not isinstance(node, types.FunctionType):
        inner = inner_function(node)
        if inner is not None:
            return ("wrapper", function_name(type(node)), value(inner))
        state = [(name, value(item)) for name, item in sorted(getattr(node, "__dict__", {}).items())]
        return ("object", function_name(type(node)), value(type(node).__call__), state)
    tree = _source(node.__code__, files)
    if tree is None:
        code = ("byte", _byte_code(node.__code__))
    else:
        code = ("src", _dump(tree, skip=("kind", "type_comment", "decorator_list")))
    defaults = [value(item) for item in node.__defaults__ or ()]
    keywords = [(name, value(item)) for name, item in sorted((node.__kwdefaults__ or {}).items())]
    return (*code, defaults, keywords, [(name, value(item)) for name, item in _outside(node)])


def _plain(item: Any) -> Any:
    if is_of_numbers(item) and item.size:
        pieces = payload_of(item)
        if pieces is not None:  # perhaps a large array, of which no form is made as a whole
            made = hashlib.sha256()
            for piece in pieces:
                made.update(piece)
            return (NUMBERS[item.dtype.kind], item.shape, made.hexdigest())
    try:
        form = canonical(item)
    except ParameterError:
        named = callable(item) or isinstance(item, types.ModuleType)
        return ("name", getattr(item, "__name__", "") if named else "", type(item).__qualname__)
    match form:
        case (kind, shape, bytes() as payload):
            return (kind, shape, hashlib.sha256(payload).hexdigest())
    return form


def _outside(f: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Give what a function takes from outside: closed-over values, functions and constants of its own module."""
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            yield f"free {name}", cell.cell_contents
        except ValueError:  # not yet assigned
            yield f"free {name}", None
    for name in sorted(_global_names(f.__code__)):
        item = f.__globals__.get(name)
        if (isinstance(item, types.FunctionType) and item.__module__ == f.__module__) or _is_constant(item):
            yield f"global {name}", item


def _is_constant(item: Any) -> bool:
    """Tell whether a global counts: not lists and dicts, which are often caches that change while the code does not."""
    return isinstance(item, _CONSTANTS) or (isinstance(item, tuple) and all(map(_is_constant, item)))


def _global_names(code: types.CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return {name for name in names if not name.startswith("__")}


# ---- the source


@dataclass(frozen=True)
class _File:
    """The source of a module, or of a notebook's cell.

    Attributes
    ----------
    tree : ast.Module
        Its syntax tree.
    codes : dict
        The code objects of all functions in it, by name and first line.
    """

    tree: ast.Module
    codes: dict[tuple[str, int], list[types.CodeType]]


_Files = dict[tuple[str, bool], _File | None]
"""Of a file as a whole, and of its statements one by one."""


def _source(code: types.CodeType, files: _Files) -> _Function | None:
    """Return the syntax tree of a function, or None if its source is not at hand.

    The file may have changed since it was imported, so the tree counts only if it compiles to the code that runs.
    """
    for in_parts in (False, True):
        key = (code.co_filename, in_parts)
        if key not in files:
            files[key] = _read(code, in_parts)
        file = files[key]
        alike = file.codes.get((code.co_name, code.co_firstlineno), []) if file is not None else []
        if file is not None and any(_byte_code(one) == _byte_code(code) for one in alike):
            return _function_of(code, file.tree)
    return None


def _function_of(code: types.CodeType, tree: ast.Module) -> _Function | None:
    for node in ast.walk(tree):
        if isinstance(node, _Function) and node.name == code.co_name and _first_line(node) == code.co_firstlineno:
            return node
    return None  # a lambda, a comprehension


def _read(code: types.CodeType, in_parts: bool) -> _File | None:
    """Read and compile the file that a code object came from: as a whole or, as notebooks do, statement by statement.

    The two differ: a call `np.mean(x)` compiles to other instructions where `np` is imported by the same unit.
    """
    for _ in range(_TRIES):
        try:
            with _PARSING:
                return _parse(code, in_parts)
        except SystemError:  # whoever else uses syntax trees, as NumPy does for some dtypes, has other locks
            time.sleep(0.01)
        except (OSError, TypeError, SyntaxError, ValueError, IndexError, RecursionError):
            break
    return None


def _parse(code: types.CodeType, in_parts: bool) -> _File:
    codes: dict[tuple[str, int], list[types.CodeType]] = {}
    tree = ast.parse("".join(_lines(code)))
    parts = (ast.Module([statement], []) for statement in tree.body if not isinstance(statement, _Import))
    for unit in parts if in_parts else [tree]:
        flags = code.co_flags & _FUTURE_FLAGS
        compiled = compile(unit, code.co_filename, "exec", flags=flags, dont_inherit=True)
        for one in _codes(compiled):
            codes.setdefault((one.co_name, one.co_firstlineno), []).append(one)
    return _File(tree, codes)


def _lines(code: types.CodeType) -> list[str]:
    """Return the lines of the file that a code object came from; `inspect` looks through all modules for it."""
    linecache.checkcache(code.co_filename)
    return linecache.getlines(code.co_filename) or inspect.findsource(code)[0]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _first_line(node: _Function) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _dump(node: Any, skip: tuple[str, ...] = ("kind", "type_comment")) -> Any:
    """Turn a syntax tree into plain values that are the same in all versions of Python: empty fields left out."""
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        if isinstance(node, _Function | ast.ClassDef) and ast.get_docstring(node) is not None:
            fields["body"] = node.body[1:] or [ast.Pass()]
        kept = [(name, item) for name, item in fields.items() if name not in skip and item is not None and item != []]
        return (type(node).__name__, [(name, _dump(item)) for name, item in kept])
    if isinstance(node, list):
        return [_dump(item) for item in node]
    return (type(node).__name__, ascii(node))


# ---- the byte code


def _byte_code(code: types.CodeType) -> tuple[Any, ...]:
    """Describe what a code object does, without where it stands and without its docstring, which nothing loads."""
    steps = [
        (step.opcode, _constant(step.argval) if step.opcode in dis.hasconst else step.arg)
        for step in dis.get_instructions(code)
        if step.opname != "EXTENDED_ARG"
    ]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    return (steps, code.co_exceptiontable, names, counts)


def _constant(item: Any) -> Any:
    if isinstance(item, types.CodeType):
        return ("code", item.co_name, _byte_code(item))
    if isinstance(item, tuple):
        return ("tuple", [_constant(inner) for inner in item])
    if isinstance(item, frozenset):  # in no order that would last
        return ("frozenset", sorted(ascii(_constant(inner)) for inner in item))
    return (type(item).__name__, ascii(item))
