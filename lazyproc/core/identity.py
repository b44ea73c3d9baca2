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

import ast
import dis
import functools
import hashlib
import inspect
import itertools
import logging
import operator
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lazyproc.core.canonical import NUMBERS, canonical, is_of_numbers, payload_of
from lazyproc.core.errors import ParameterError
from lazyproc.core.source_code import BYTE, Files, code_of, source_of
from lazyproc.core.state import Form, States, bound_to, is_bare, is_empty, opaque, taken_apart

_CONSTANTS = (bool, int, float, complex, str, bytes, np.generic, np.ndarray)
_MORE = re.compile(r"(.*?)(?:\+((?:src|byte\d+):[0-9a-f]{16}))?", re.DOTALL)
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
    first = _Listed(files)
    if not isinstance(method_function(f), types.FunctionType | functools.partial) and _is_opaque(f):
        base = f"name:{function_name(f)}"
    else:
        base = _hashed(first.parts(method_function(f)))
    every = _Carried(files, f, first.numbers)
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
    >>> unnamed(np.add.reduce), unnamed(lambda x: x), unnamed(inner_function)
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
    return not unnamed(item) if callable(item) else _plain(item)[0] != "name" or is_empty(item, taken_apart(item))


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


class _Listed:
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
        if id(node) not in self.numbers:
            self.numbers[id(node)] = len(self.nodes)
            self.nodes.append(node)
        return ("function", self.numbers[id(node)])

    def value(self, item: Any) -> Form:
        item = method_function(item)
        if callable(item) and (isinstance(item, types.FunctionType | functools.partial) or not _is_opaque(item)):
            return self.number(item)
        return _plain(item)

    def describe(self, node: Any) -> tuple[Any, ...]:
        if isinstance(node, functools.partial):
            keywords = [(name, self.value(item)) for name, item in sorted(node.keywords.items())]
            return ("partial", self.value(node.func), [self.value(item) for item in node.args], keywords)
        if not isinstance(node, types.FunctionType):
            return self.object(node)
        tree = source_of(node.__code__, self.files)
        defaults = [self.value(item) for item in node.__defaults__ or ()]
        keywords = [(name, self.value(item)) for name, item in sorted((node.__kwdefaults__ or {}).items())]
        outside = [(name, self.value(item)) for name, item in _outside(node)]
        return (*code_of(node.__code__, tree), defaults, keywords, outside)

    def object(self, node: Any) -> tuple[Any, ...]:
        inner = inner_function(node)
        if inner is not None:
            return ("wrapper", function_name(type(node)), self.value(inner))
        state = [(name, self.value(item)) for name, item in sorted(getattr(node, "__dict__", {}).items())]
        return ("object", function_name(type(node)), self.value(type(node).__call__), state)


class _Carried(_Listed):
    """The same list with all that decides what is computed: the state of objects, and what is read by its name.

    Of the modules that the function comes from; what a function of another module reads there is its own affair.

    Attributes
    ----------
    has_more : bool
        Whether there is anything that is not in the first list.
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
    """Give what a function reads by its name and `_outside` leaves out, but for what comes from other modules."""
    for name in sorted(_global_names(f.__code__)):
        item = f.__globals__.get(name)
        if not isinstance(item, types.FunctionType | types.ModuleType | logging.Logger) and not _is_constant(item):
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


def _plain(item: Any) -> Form:
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
