"""The code of a function in plain values: its syntax tree where its source is at hand, else its byte code.

Both say what the code does, and nothing of where it stands, how it is laid out, or what its docstring says.
"""

from __future__ import annotations
import __future__

import ast
import dis
import inspect
import linecache
import sys
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BYTE = f"byte{sys.version_info.major}{sys.version_info.minor}"
_FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
Function = ast.FunctionDef | ast.AsyncFunctionDef
_Import = ast.Import | ast.ImportFrom
_PARSING = threading.Lock()
"""Some versions of Python fail (SystemError) where two threads parse or compile at a time: CPython's issue 106905."""
_TRIES = 10


def code_of(code: types.CodeType, tree: Function | None) -> tuple[str, Any]:
    """Describe code by its syntax tree, or without one by its byte code, and say by which."""
    if tree is None:
        return ("byte", byte_code(code))
    return ("src", _dump(tree, skip=("kind", "type_comment", "decorator_list")))


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


Files = dict[tuple[str, bool], _File | None]
"""Of a file as a whole, and of its statements one by one."""


def source_of(code: types.CodeType, files: Files) -> Function | None:
    """Return the syntax tree of a function, or None if its source is not at hand.

    The file may have changed since it was imported, so the tree counts only if it compiles to the code that runs.
    """
    for in_parts in (False, True):
        key = (code.co_filename, in_parts)
        if key not in files:
            files[key] = _read(code, in_parts)
        file = files[key]
        alike = file.codes.get((code.co_name, code.co_firstlineno), []) if file is not None else []
        if file is not None and any(byte_code(one) == byte_code(code) for one in alike):
            return _function_of(code, file.tree)
    return None


def _function_of(code: types.CodeType, tree: ast.Module) -> Function | None:
    for node in ast.walk(tree):
        if isinstance(node, Function) and node.name == code.co_name and _first_line(node) == code.co_firstlineno:
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


def _first_line(node: Function) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _dump(node: Any, skip: tuple[str, ...] = ("kind", "type_comment")) -> Any:
    """Turn a syntax tree into plain values that are the same in all versions of Python: empty fields left out."""
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        if isinstance(node, Function | ast.ClassDef) and ast.get_docstring(node) is not None:
            fields["body"] = node.body[1:] or [ast.Pass()]
        kept = [(name, item) for name, item in fields.items() if name not in skip and item is not None and item != []]
        return (type(node).__name__, [(name, _dump(item)) for name, item in kept])
    if isinstance(node, list):
        return [_dump(item) for item in node]
    return (type(node).__name__, ascii(node))


# ---- the byte code


def byte_code(code: types.CodeType) -> tuple[Any, ...]:
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
        return ("code", item.co_name, byte_code(item))
    if isinstance(item, tuple):
        return ("tuple", [_constant(inner) for inner in item])
    if isinstance(item, frozenset):  # in no order that would last
        return ("frozenset", sorted(ascii(_constant(inner)) for inner in item))
    return (type(item).__name__, ascii(item))
