"""What decides beside its code what a function computes: objects that it belongs to or uses, classes, globals."""

from __future__ import annotations

import ast
import dis
import functools
import itertools
import logging
import operator
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from lazyproc.core.listed import Listed, global_names, is_constant
from lazyproc.core.naming import inner_function, method_function
from lazyproc.core.source_code import Files, source_of
from lazyproc.core.state import Form, States, bound_to, is_bare, is_empty, opaque

_CHANGING = frozenset(
    "add append appendleft clear discard extend extendleft insert pop popitem popleft remove reverse setdefault sort "
    "update".split()
)
"""Methods that change what they belong to."""
_MAKING = frozenset("__init__ __new__ __post_init__ __init_subclass__".split())
"""Methods that do not work on an object once it is made."""
_ASIDE = frozenset(
    "__repr__ __str__ __del__ __getstate__ __setstate__ __reduce__ __reduce_ex__ __getnewargs__ __getnewargs_ex__ "
    "__dict__ __weakref__ __doc__ __module__ __slots__".split()
)
"""What decides nothing, or is seen already."""


class Carried(Listed):
    """`Listed` with all that decides what is computed: the state of objects, and what is read by its name.

    Of the modules that the function comes from; what a function of another module reads there is its own affair.

    Attributes
    ----------
    has_more : bool
        Whether there is anything that `Listed` leaves out.
    """

    def __init__(self, files: Files, f: Any, known: dict[int, int]) -> None:
        super().__init__(files)
        self.has_more = False
        self._known = known
        self._home = {"__main__", *_modules(f)}
        self._states = States(self._met_function, self._met_class, self._home)
        self._used: set[str] = set()
        """Names of attributes that the code uses."""
        self._changed: set[str] = set()
        """Global names of what the code itself changes: caches, counters."""
        self._globals: dict[tuple[str, str], Any] = {}
        """What is read by its name in which module, and was not described yet."""
        self._classes: dict[type, bool] = {}
        """Whether the class itself is used, or objects of it only."""
        self._seen: set[tuple[type, str]] = set()

    def all_parts(self, root: Any) -> list[Any]:
        """Describe a callable, and all that it leads to."""
        parts: list[Any] = [("root", self.value(root))]
        n_described = 0
        while True:
            while n_described < len(self.nodes):
                parts.append(self.describe(self.nodes[n_described]))
                n_described += 1
            more = [*self._of_globals(), *self._of_classes()]
            if not more and n_described == len(self.nodes):
                return parts
            parts += more

    def value(self, item: Any) -> Form:
        item = item.__func__ if isinstance(item, staticmethod | classmethod) else item
        if isinstance(item, types.MethodType):
            function = self.value(item.__func__)
            if isinstance(item.__self__, type):
                self._met_class(item.__self__, True)
                return function
            if not self._is_empty(item.__self__):
                return ("method", function, self._state(item.__self__))
            self._met_class(type(item.__self__), False)
            return function
        if isinstance(item, type):
            self._met_class(item, True)
        form = super().value(item)
        return form if form[0] != "name" else self._state(item)

    def describe(self, node: Any) -> tuple[Any, ...]:
        if isinstance(node, types.FunctionType) and self._is_home(node):
            self._used |= _attribute_names(node.__code__)
            self._changed |= _changed_names(node.__code__, source_of(node.__code__, self.files))
            for name, item in _read(node):
                self._globals.setdefault((name, node.__module__), item)
        return super().describe(node)

    def object(self, node: Any) -> tuple[Any, ...]:
        described = super().object(node)
        if described[0] == "wrapper":
            if self._is_home(type(node)):  # a decorator that is a class of the user's
                inside = (*functools.WRAPPER_ASSIGNMENTS, "__wrapped__")
                state = {name: item for name, item in vars(node).items() if name not in inside}
                self.has_more |= bool(state)
                return (*described, self.value(type(node).__call__), self._states.form(state))
            return described
        made = self._states.taken_apart(node)
        self._met_class(type(node), False)
        return described if made is None or is_bare(node, made) else (*described, self._state(node))

    def _state(self, item: Any) -> Form:
        """Describe an object; one that has nothing but its class says no more than the name of that."""
        if self._is_empty(item):
            self._met_class(type(item), False)
            return opaque(item)
        form = self._states.form(item)
        self.has_more |= form[0] not in ("name", "class")
        return form

    def _is_empty(self, item: Any) -> bool:
        return is_empty(item, self._states.taken_apart(item))

    def _is_home(self, item: Any) -> bool:
        return getattr(item, "__module__", None) in self._home

    def _met_function(self, f: types.FunctionType) -> Form:
        if self._is_home(f) or "<" in f.__qualname__:
            return self.number(f)
        return ("named", self._states.name(f))

    def _met_class(self, kind: type, itself: bool) -> None:
        for base in kind.__mro__:
            if self._is_home(base):
                self._classes[base] = self._classes.get(base, False) or itself

    def _of_globals(self) -> list[Any]:
        """Describe what is read by its name and was not described yet: last, when it is known what the code changes."""
        taken = [
            (key[0], item)
            for key, item in sorted(self._globals.items(), key=operator.itemgetter(0))
            if key[0] not in self._changed
        ]
        self._globals = dict.fromkeys(self._globals)  # nothing more to tell
        parts = []
        for name, item in taken:
            if isinstance(item, type):
                self._met_class(item, True)
            elif item is not None and (form := self._global(item))[0] != "name":
                self.has_more = True
                parts.append(("global", name, form))
        return parts

    def _global(self, item: Any) -> Form:
        inner = item
        while not isinstance(inner, types.FunctionType) and (within := inner_function(inner)) is not None:
            inner = method_function(within)
        if isinstance(inner, types.FunctionType) and not isinstance(item, functools.partial):
            return self.value(item) if self._is_home(inner) or isinstance(item, types.MethodType) else opaque(item)
        return self.value(item) if callable(item) else self._states.form(item)

    def _of_classes(self) -> list[Any]:
        """Describe what the code uses of the classes that it met, by the names of attributes."""
        parts = []
        for base, itself in list(self._classes.items()):
            for name, item in sorted(vars(base).items()):
                if (base, name) in self._seen or not self._is_used(name, item, itself):
                    continue
                self._seen.add((base, name))
                for part in _accessors(item):
                    self.has_more |= id(method_function(part)) not in self._known
                    parts.append(("attribute", base.__qualname__, name, self.value(part)))
        return parts

    def _is_used(self, name: str, item: Any, itself: bool) -> bool:
        if name in _ASIDE:
            return False
        if not (name.startswith("__") and name.endswith("__")):
            return name in self._used
        # Python uses these by itself; those that `dataclass` makes say no more than its fields do
        is_written = isinstance(item, types.FunctionType) and item.__code__.co_filename != "<string>"
        return is_written and (itself or name not in _MAKING)


def _modules(f: Any) -> Iterator[str]:
    """Name the modules that a callable and what is inside of it come from."""
    while f is not None:
        named = method_function(f)
        has_own = isinstance(named, type | types.FunctionType)
        yield str(getattr(named if has_own else type(named), "__module__", None))
        f = None if isinstance(named, types.FunctionType) else inner_function(named)


def _accessors(item: Any) -> list[Any]:
    """Return the functions of a property; all else as it is."""
    return [one for one in (item.fget, item.fset) if one is not None] if isinstance(item, property) else [item]


def _read(f: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Give what a function reads by its name and the list leaves out, but for what comes from other modules."""
    for name in sorted(global_names(f.__code__)):
        item = f.__globals__.get(name)
        if not isinstance(item, types.FunctionType | types.ModuleType | logging.Logger) and not is_constant(item):
            is_from_elsewhere = isinstance(item, np.ufunc | types.BuiltinFunctionType) and bound_to(item) is None
            if item is not None and not is_from_elsewhere:
                yield name, item


def _attribute_names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_attribute_names, inner))


def _changed_names(code: types.CodeType, tree: ast.AST | None) -> set[str]:
    """Find the names of what a function changes in place, as in ``CACHE[key] = …`` or ``CALLS.append(…)``."""
    if tree is None:
        return _changed_by_calls(code)
    found = set()
    for node in ast.walk(tree):
        target: ast.AST | None = None
        if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            target = node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGING:
            target = node.func
        while isinstance(target, ast.Subscript | ast.Attribute):
            target = target.value
        if isinstance(target, ast.Name):
            found.add(target.id)
    return found


def _changed_by_calls(code: types.CodeType) -> set[str]:
    """Find the same in byte code, which a lambda can only do by calling methods."""
    steps = list(dis.get_instructions(code))
    found = {
        str(one.argval)
        for one, other in itertools.pairwise(steps)
        if one.opname == "LOAD_GLOBAL" and other.opname in ("LOAD_METHOD", "LOAD_ATTR") and other.argval in _CHANGING
    }
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found.union(*map(_changed_by_calls, inner))
