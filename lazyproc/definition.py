"""What a process class declares: its function, and which of the two ways it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lazyproc.core.errors import ArgumentValueError, DefinitionError
from lazyproc.core.specs import validate_outputs
from lazyproc.hooks.contract import HOOKS, HookContract

_OPTIONS = ("on_error", "checkpoint_interval", "verify")
"""Of the constructor, which are likely to be taken for attributes of the class, as `max_failures` is."""


def check_definition(cls: Any) -> None:
    """Check a class that declares outputs, when it is made.

    Raises
    ------
    DefinitionError
        If the outputs cannot be used, or it overrides hooks of the old contract, too, or has two functions.
    """
    validate_outputs(cls.outputs, cls.__name__)
    hooks = [name for name in HOOKS if overrides(cls, name)]
    if hooks:
        raise DefinitionError(
            f"{cls.__name__}: declares outputs and overrides {hooks}; expected one or the other. With outputs lazyproc "
            "creates, reads and writes the datasets itself: remove these methods."
        )
    options = [name for name in _OPTIONS if name in vars(cls)]
    if options:
        raise DefinitionError(
            f"{cls.__name__}: sets {options[0]} as an attribute of the class, where nobody looks for it; it is an "
            f"argument of the constructor: {cls.__name__}(h5_main, {options[0]}={vars(cls)[options[0]]!r})."
        )
    if overrides(cls, "_map_function") and hasattr(cls, "_block_function"):
        raise DefinitionError(f"{cls.__name__}: has _map_function and _block_function; expected one of them.")


def overrides(cls: type, name: str, base: type = HookContract) -> bool:
    """Tell whether a class, or one of its bases below `base`, has its own form of a method."""
    return inspect.getattr_static(cls, name, None) is not inspect.getattr_static(base, name, None)


def check_hook_style(cls: type, process: type) -> None:
    """Refuse a class that looks as if its outputs were forgotten."""
    functions = [name for name in ("_map_function", "_block_function") if overrides(cls, name)]
    others = [name for name in (*HOOKS, "compute", "test") if overrides(cls, name, process)]
    if functions and not others:
        raise DefinitionError(
            f"{cls.__name__}: has {functions[0]}, but declares no outputs; expected a dict such as "
            "outputs = {'Mean': Output('f4')}: what the function gives for each position."
        )


def check_recordable(cls: type, on_error: str) -> None:
    """Refuse to record failures of a class that creates its datasets itself: nobody knows their fill values."""
    if on_error != "raise":
        raise ArgumentValueError(
            f"on_error: {on_error!r} came for {cls.__name__}, which creates and writes its results itself; expected "
            "'raise'. Only a class that declares outputs tells what a failed position gets: its fill value."
        )


def function_of(cls: type) -> tuple[Callable[..., Any], bool]:
    """Return the declared function, free of any instance, and whether it takes blocks."""
    vectorized = hasattr(cls, "_block_function")
    name = "_block_function" if vectorized else "_map_function"
    if not vectorized and not overrides(cls, name):
        raise DefinitionError(
            f"{cls.__name__}: has no function; expected a static method _map_function(spectrum, …) of one position, or "
            "_block_function(block, …) of a block `(n_positions, n_spectral)`."
        )
    declared = inspect.getattr_static(cls, name)
    if isinstance(declared, staticmethod):
        declared = declared.__func__
    elif isinstance(declared, classmethod) or _takes_self(declared):
        raise DefinitionError(
            f"{cls.__name__}: {name} is a method of the instance; expected a static method or a plain function. A "
            "worker gets the function alone: an instance would drag its open files along. Write @staticmethod above "
            "it, and hand over what it needs by parms_dict."
        )
    if not callable(declared):
        raise DefinitionError(f"{cls.__name__}: {name} is {declared!r}; expected a function.")
    return declared, vectorized


def _takes_self(function: Any) -> bool:
    if not inspect.isfunction(function):
        return False
    first = next(iter(inspect.signature(function).parameters), "")
    return first in ("self", "cls")
