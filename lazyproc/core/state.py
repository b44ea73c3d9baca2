"""The state of any object in plain values: the same in every process, and different where the object is different.

What pickle would take of an object is described, not pickled: its class by name, and its values by theirs, dicts and
sets in an order of their own. Nothing depends on addresses or on the order of hashes. Where an object cannot be taken
apart (a lock, an open file), the name of its class has to do.
"""

from __future__ import annotations

import copyreg
import hashlib
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import Enum
from typing import Any

import numpy as np

from lazyproc.core.canonical import NUMBERS, pack, payload_of

LARGEST = 64 * 2**20
"""Bytes of texts and arrays that are looked at in one value."""
MOST = 50_000
"""Objects that are looked at in one value, which takes about a second."""
_DEEPEST = 200  # objects within objects
_LEAVES = (bool, int, float, complex, type(None), type(...), type(NotImplemented))
_NAMED = (types.ModuleType, types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType)
_NEVER = ("itertools", "weakref")
"""Modules whose objects are not taken apart: pickling iterators warns, and what nobody else holds goes by itself."""
_FIELDS = ("reduced", "arguments", "state", "items", "pairs")

Form = tuple[Any, ...]


class TooLargeError(Exception):
    """A value has more, or larger, parts than are looked at."""


def opaque(item: Any) -> Form:
    """Describe what cannot be taken apart."""
    named = callable(item) or isinstance(item, types.ModuleType)
    return ("name", getattr(item, "__name__", "") if named else "", type(item).__qualname__)


def taken_apart(item: Any) -> tuple[Any, ...] | None:
    """Return what pickle takes of an object, or None if it can take nothing."""
    if isinstance(item, type) or type(item).__module__ in _NEVER or _is_ours(type(item)):
        return None
    try:
        reducer = copyreg.dispatch_table.get(type(item))
        made = item.__reduce_ex__(4) if reducer is None else reducer(item)
    except Exception:  # whatever an object raises that does not want to be pickled
        return None
    return made if isinstance(made, tuple) else None


def bound_to(item: Any) -> Any:
    """Return the object that a built-in method belongs to, or None: functions of modules and of classes have none."""
    owner = getattr(item, "__self__", None)
    return None if isinstance(owner, type | types.ModuleType) or not callable(item) else owner


def _is_ours(kind: type) -> bool:
    """Tell whether a class is lazyproc's: a Process holds open files, and is another one after each call."""
    return any(base.__module__.partition(".")[0] == "lazyproc" for base in kind.__mro__)


class States:
    """Describes values, and hands Python functions and classes that it meets in them to the caller.

    Parameters
    ----------
    function : callable
        Describes a Python function.
    meet : callable
        Is told the class of each object, and whether it is the class itself that was met.
    home : collection of str
        Modules whose names do not count: a script has another one when it is imported.
    """

    def __init__(
        self, function: Callable[[Any], Form], meet: Callable[[type, bool], None], home: Collection[str]
    ) -> None:
        self._function = function
        self._meet = meet
        self._home = home
        self._done: dict[int, Form] = {}
        self._kept: list[Any] = []
        """Their ids are known as long as they live."""
        self._apart: dict[int, tuple[Any, ...] | None] = {}
        self._within: list[int] = []
        self._bytes = self._objects = 0

    def form(self, item: Any) -> Form:
        """Describe a value; the name of its class where it cannot be taken apart, or is too large."""
        self._bytes = self._objects = 0
        self._within = []
        try:
            return self._form(item)
        except Exception:  # too large or too deep, it changes meanwhile, or one of its parts raises when looked at
            return opaque(item)

    def taken_apart(self, item: Any) -> tuple[Any, ...] | None:
        """Return what pickle takes of an object, or None; asked once, since it may be much."""
        if id(item) not in self._apart:
            self._apart[id(item)] = taken_apart(item)
            self._kept.append(item)
        return self._apart[id(item)]

    def name(self, item: Any) -> str:
        """Name a class or function by its package and its own name, which last longer than the modules between."""
        named = item if isinstance(getattr(item, "__qualname__", None), str) else type(item)
        module = str(getattr(named, "__module__", None) or "")
        return f"{'' if module in self._home else module.partition('.')[0]}:{named.__qualname__}"

    def _form(self, item: Any) -> Form:
        kind = type(item)
        self._count()
        if kind in _LEAVES:
            return (kind.__name__, ascii(item))
        if kind is str or kind is bytes or kind is bytearray:
            self._count(len(item))
            data = item.encode("utf-8", "surrogatepass") if kind is str else bytes(item)
            return (kind.__name__, _digest(data) if len(data) > 64 else ascii(item))
        if isinstance(item, Enum):
            return ("enum", self.name(kind), item.name)
        if isinstance(item, _NAMED):
            return opaque(item)
        if isinstance(item, type):
            self._meet(item, True)
            return ("class", self.name(item))
        if isinstance(item, types.FunctionType):
            return self._function(item)
        if id(item) in self._done:
            return self._done[id(item)]
        if id(item) in self._within:
            return ("again", len(self._within) - self._within.index(id(item)))
        if len(self._within) > _DEEPEST:
            raise TooLargeError
        self._within.append(id(item))
        form = self._inner(item, kind)
        self._within.pop()
        if form[0] != "name":
            form = (form[0], _digest(ascii(form).encode()))  # short, however often it occurs
        self._done[id(item)] = form
        self._kept.append(item)
        return form

    def _inner(self, item: Any, kind: type) -> Form:
        """Describe what contains others."""
        if kind is np.ndarray:
            return self._array(item)
        if isinstance(item, np.generic) and not isinstance(item, np.void):
            return ("scalar", item.dtype.str, _digest(item.tobytes()))
        if kind is list or kind is tuple:
            packed = pack(item)
            return (kind.__name__, *([self._array(packed)] if packed is not None else map(self._form, item)))
        if kind is dict:
            return ("dict", *self._pairs(item.items()))
        if kind is set or kind is frozenset:
            return (kind.__name__, *sorted(ascii(self._alone(one)) for one in item))
        if isinstance(item, types.MethodType):
            return ("method", self._form(item.__func__), self._form(item.__self__))
        inner = getattr(item, "__wrapped__", None)
        if isinstance(inner, types.FunctionType):  # functools.lru_cache, which is pickled by its name
            return ("wrapper", self.name(kind), self._form(inner))
        owner = bound_to(item)
        if isinstance(item, types.BuiltinFunctionType | types.MethodWrapperType):
            return ("bound", item.__name__, self._form(owner)) if owner is not None else opaque(item)
        made = self.taken_apart(item)
        if made is None:
            return opaque(item)
        self._meet(kind, False)
        return ("object", self.name(kind), *self._reduced(kind, made))

    def _reduced(self, kind: type, made: tuple[Any, ...]) -> Iterator[Form]:
        """Describe what pickle takes: a class or function to call, its arguments, a state, items, pairs of a dict."""
        for field, part in zip(_FIELDS, made, strict=False):
            if field == "reduced":
                yield ("class", self.name(part))
            elif field == "arguments":
                yield ("arguments", *(self._form(one) for one in part if one is not kind))
            elif field == "state" and part is not None:
                yield ("state", self._form(part))
            elif field == "items" and part is not None:
                yield ("items", *map(self._form, part))
            elif field == "pairs" and part is not None:
                yield ("pairs", *self._pairs(part))

    def _pairs(self, pairs: Iterable[tuple[Any, Any]]) -> list[Form]:
        """Describe a dict in an order that does not depend on how it was filled."""
        keyed = sorted(((ascii(self._alone(key)), item) for key, item in pairs), key=lambda pair: pair[0])
        return [(key, self._form(item)) for key, item in keyed]

    def _alone(self, item: Any) -> Form:
        """Describe a member of a set, or the key of a dict, where functions must not be numbered as they come."""
        function, meet = self._function, self._meet
        self._function, self._meet = (lambda f: ("named", self.name(f))), (lambda kind, itself: None)
        try:
            return self._form(item)
        finally:
            self._function, self._meet = function, meet

    def _array(self, array: Any) -> Form:
        self._count(array.nbytes)
        kind, shape = array.dtype.kind, array.shape
        if array.dtype.hasobject:
            return ("array", shape, str(array.dtype), *map(self._form, array.ravel().tolist()))
        pieces = payload_of(array) if kind in NUMBERS and array.size else None
        made = hashlib.sha256()
        for piece in pieces if pieces is not None else [np.ascontiguousarray(array).tobytes()]:
            made.update(piece)
        described = NUMBERS[kind] if pieces is not None else str(array.dtype.descr if kind == "V" else array.dtype.str)
        return ("array", described, shape, made.hexdigest())

    def _count(self, n_bytes: int = 0) -> None:
        self._objects += 1
        self._bytes += n_bytes
        if self._objects > MOST or self._bytes > LARGEST:
            raise TooLargeError


def is_empty(item: Any, made: tuple[Any, ...] | None) -> bool:
    """Tell whether an object has nothing but its class; `made` is what was taken of it."""
    if isinstance(item, type | types.ModuleType | types.FunctionType) or bound_to(item) is not None:
        return False
    return made is not None and is_bare(item, made) and not getattr(item, "__dict__", None)


def is_bare(item: Any, made: tuple[Any, ...]) -> bool:
    """Tell whether all that was taken of an object is its class and its ``__dict__``."""
    function, arguments, state, *others = (*made, None)
    if getattr(function, "__name__", "") != "__newobj__" or any(part is not None for part in others):
        return False
    if len(arguments) != 1 or arguments[0] is not type(item):
        return False
    return state is None or (type(state) is dict and state.keys() == getattr(item, "__dict__", {}).keys())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
