"""Make a process from what was typed: options and parameters go to the arguments that its constructor has for them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from lazyproc.core.errors import LazyprocError
from lazyproc.core.jsonform import show
from lazyproc.process import Process

_NOT_TAKEN = re.compile(r"got (?:multiple values for|an unexpected) keyword argument '(\w+)'")
_MISSING = re.compile(r"missing \d+ required (?:positional|keyword-only) argument")
_OF_PROCESS = frozenset(inspect.signature(Process).parameters)


class ConstructorError(LazyprocError, TypeError):
    """The constructor of a class does not take what came, or wants more."""


def make_process(
    process_class: type[Process],
    address: str,
    *,
    parameters: Mapping[str, Any],
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Process:
    """Return a process on a main dataset.

    Parameters
    ----------
    process_class : type
        The class. One written for pyUSID may have a constructor of its own, and make its `parms_dict` there.
    address : str
        Of the main dataset.
    parameters : dict
        Those that the constructor has as arguments of its own go there, the others to `parms_dict`; all of them do if
        the constructor takes that by name.
    options : dict
        Arguments of `Process`.
    defaults : dict
        More of them; one that the constructor does not take is left out.

    Raises
    ------
    ConstructorError
        If the constructor does not take what came; names the class, what it takes, and what came.
    LazyprocError
        What the constructor raises.
    """
    takes = _arguments(process_class)
    own = set() if "parms_dict" in takes else takes - _OF_PROCESS
    rest = {name: value for name, value in parameters.items() if name not in own}
    arguments = {**defaults, **options, **{name: parameters[name] for name in parameters if name in own}}
    if rest or "parms_dict" in takes:
        arguments["parms_dict"] = rest
    while True:
        try:
            return process_class(address, **arguments)
        except TypeError as error:
            refused = None if isinstance(error, LazyprocError) else _refused(error)
            if refused in defaults and refused in arguments and refused not in options:
                del arguments[refused]
                continue
            if refused not in arguments and refused != "":
                raise
            came = [f"-p {name}={show(value)}" for name, value in (rest if refused == "parms_dict" else {}).items()]
            came += [_option(refused)] if refused and not came else []
            raise ConstructorError(
                f"{process_class.__name__}: its constructor takes {inspect.signature(process_class)}, and this came: "
                f"{', '.join(came) or 'too little'} ({error}). Expected what it takes; -p goes to "
                f"{', '.join(sorted(own)) or 'none of its arguments'}."
            ) from error


def _arguments(process_class: type) -> set[str]:
    """Return the names that the constructors below `Process` have, down to the first that hands nothing on."""
    names: set[str] = set()
    for cls in process_class.__mro__[: process_class.__mro__.index(Process)]:
        if "__init__" not in vars(cls):
            continue
        given = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
        named = [one.name for one in given if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        names.update(named)
        if not any(one.kind is one.VAR_KEYWORD for one in given):
            break
    return names


def _refused(error: TypeError) -> str | None:
    """Return the argument that a constructor does not take, "" if it wants more, None if the error is another one."""
    found = _NOT_TAKEN.search(str(error))
    if found is not None:
        return found[1]
    trace = error.__traceback__
    is_of_the_call = trace is not None and trace.tb_next is None  # and not from within the constructor
    return "" if is_of_the_call and _MISSING.search(str(error)) else None


def _option(argument: str) -> str:
    """Return an argument of `Process` as the option of the command line that it is given by."""
    return "--target" if argument == "h5_target_group" else "--" + argument.replace("_", "-")
