"""Find a process class by what a person types: ``module:Class``, ``path/to/file.py:Class``, or a registered name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from lazyproc.core.errors import EXIT_STOPPED, ArgumentValueError, LazyprocError
from lazyproc.process import Process

ENTRY_POINTS = "lazyproc.processes"
"""Packages register processes under this entry-point group."""


class LoadingError(LazyprocError, ImportError):
    """The user's module raised while it was loaded; `__cause__` is its exception, with the user's own frames."""


def load_process(text: str) -> type[Process]:
    """Return the process class that `text` names.

    Raises
    ------
    ArgumentValueError
        If there is no such file, module or class, or it is no Process.
    LoadingError
        If the module is there and raises.
    """
    place, _, name = text.rpartition(":")
    if not place:
        return _checked(_registered(text), text)
    module = _load_file(place) if place.endswith(".py") else _import(place)
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if _is_process(value)]
        raise ArgumentValueError(f"{text}: there is no {name} in {place}; the processes there are {there}.")
    return _checked(getattr(module, name), text)


def _is_process(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Process) and value is not Process


def _checked(value: Any, text: str) -> type[Process]:
    if not _is_process(value):
        raise ArgumentValueError(f"{text}: is {value!r}; expected a subclass of lazyproc.Process.")
    return value  # type: ignore[no-any-return]


def _registered(name: str) -> Any:
    known = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in known:
        raise ArgumentValueError(
            f"{name}: no process of that name is registered ({sorted(known) or 'none are'}); expected module:Class, "
            "path/to/file.py:Class, or a registered name."
        )
    try:
        return known[name].load()
    except (Exception, SystemExit) as error:
        raise _loading_error(name, error) from _users_part(error)


def _load_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        raise ArgumentValueError(f"{path}: there is no such file; expected path/to/file.py:Class.")
    # The name cannot be imported, so that the functions travel to workers by value.
    stem = os.path.splitext(os.path.basename(path))[0]
    name = f"lazyproc_file_{stem}"
    spec = importlib.util.spec_from_file_location(name, os.path.abspath(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _on_path(os.path.dirname(os.path.abspath(path)))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception | SystemExit):
            raise _loading_error(path, error) from _users_part(error)
        raise
    return module


def _import(name: str) -> ModuleType:
    _on_path(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if not isinstance(error, ModuleNotFoundError) or not f"{name}.".startswith(f"{error.name}."):
            raise _loading_error(name, error) from _users_part(error)
        raise ArgumentValueError(
            f"{name}: there is no such module; expected module:Class of an installed package or of this folder, or "
            "path/to/file.py:Class."
        ) from error


def _loading_error(place: str, error: Exception | SystemExit) -> LoadingError:
    """Return what to raise; a run within the module that a signal has ended goes on its way."""
    if not isinstance(error, SystemExit):
        return LoadingError(f"{place}: could not be loaded: {type(error).__name__}: {error}")
    if error.code == EXIT_STOPPED:
        raise error
    return LoadingError(
        f"{place}: has called sys.exit({error.code!r}) while it was loaded; expected a module that can be imported. "
        'Put what it does as a script under `if __name__ == "__main__":`.'
    )


def _users_part(error: BaseException) -> BaseException:
    """Take the frames of lazyproc and of Python's importing off the front of a traceback."""
    trace = error.__traceback__
    while trace is not None and _is_importing(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return error.with_traceback(trace)


def _is_importing(file: str) -> bool:
    return (
        file == __file__ or file.startswith("<frozen importlib") or "importlib" in os.path.dirname(file).split(os.sep)
    )


def _on_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def parse_parameters(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn ``name=value`` texts into parameters: JSON or Python values where they are ones, else texts.

    Examples
    --------
    >>> parse_parameters(["smoothing=3", "window=[1, 2]", "kind=hann", "strict=true", "nothing=None"])
    {'smoothing': 3, 'window': [1, 2], 'kind': 'hann', 'strict': True, 'nothing': None}
    """
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ArgumentValueError(f"-p {pair}: expected name=value, such as -p smoothing=3.")
        if name.strip() in parameters:
            raise ArgumentValueError(f"-p {name.strip()}: is given twice; give it once.")
        parameters[name.strip()] = _value(value)
    return parameters


def _value(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text
