"""Which parameters and arguments a function gets, found out before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lazyproc.core.errors import ParameterError

_ALIKE = 0.8
"""How like two names are, of 0 to 1, where one may be meant by the other: those of one slip of five letters or more."""
_KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def keyword_arguments(
    function: Callable[..., Any], parameters: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments of each call.

    Parameters
    ----------
    function : callable
        Its first argument is the data.
    parameters : mapping
        The parameters of the process: the function gets those it accepts.
    args, kwargs
        The arguments of `compute`: the function gets them all.

    Raises
    ------
    ParameterError
        If a name is given twice, is not taken by the function, or a required one is missing.

    Examples
    --------
    >>> keyword_arguments(lambda spectrum, smoothing=3: spectrum, {"smoothing": 5, "operator": "A"}, (), {})
    {'smoothing': 5}
    """
    twice = sorted(set(parameters) & set(kwargs))
    if twice:
        raise ParameterError(f"parms_dict and the arguments of compute both give {twice}; give each in one place only.")
    name = getattr(function, "__qualname__", repr(function))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not tell
        if parameters:
            raise ParameterError(
                f"{name}: does not tell which arguments it takes, so it cannot be told which of the parameters "
                f"{sorted(parameters)} are for it; expected a function with a signature. Wrap it: def function(data, "
                f"{sorted(parameters)[0]}=…), or give what it takes to compute()."
            ) from None
        return dict(kwargs)
    own = list(signature.parameters.values())
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own)
    accepted = {parameter.name for parameter in own[1:] if parameter.kind in _KEYWORDS}
    surplus = [key for key in kwargs if key not in accepted]
    if surplus and not takes_any:
        raise ParameterError(
            f"{name}: does not take the argument {surplus[0]!r}; it takes {sorted(accepted)}. Correct the name, or put "
            "what only describes the run into parms_dict."
        )
    # Names that positional arguments fill already are not given again as parameters.
    by_position = {parameter.name for parameter in own[1 : 1 + len(args)] if parameter.kind in _KEYWORDS}
    double = sorted(by_position & (set(parameters) | set(kwargs)))
    if double:
        raise ParameterError(f"{name}: {double[0]!r} is given by position and by name; give it once.")
    unused = [] if takes_any else [key for key in parameters if key not in accepted]
    given = {key: value for key, value in parameters.items() if takes_any or key in accepted} | dict(kwargs)
    _check_number(name, own, args)
    try:
        signature.bind(None, *args, **given)
    except TypeError as error:
        stored = f" (it takes none that is called {unused}, of parms_dict)" if unused else ""
        raise ParameterError(
            f"{name}: {error}. It is called with the data and {sorted(given) or 'nothing else'}{stored}; give the "
            "missing ones in parms_dict, or as arguments of compute."
        ) from error
    return given


def slips(function: Callable[..., Any], parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters that the function does not take, with the argument, given no value, that was perhaps meant.

    Examples
    --------
    >>> slips(lambda spectrum, smoothing=3: spectrum, {"smothing": 5, "operator": "A"})
    {'smothing': 'smoothing'}
    """
    try:
        own = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):  # some functions written in C do not tell
        return {}
    accepted = [parameter.name for parameter in own if parameter.kind in _KEYWORDS]
    unused = [key for key in parameters if key not in accepted]
    if not unused or any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
        return {}
    import difflib

    free = [name for name in accepted if name not in parameters]
    alike = {key: difflib.get_close_matches(key, free, 1, _ALIKE) for key in unused}
    return {key: names[0] for key, names in alike.items() if names}


def _check_number(name: str, own: Sequence[inspect.Parameter], args: Sequence[Any]) -> None:
    """Check that there are not more positional arguments than the function takes beside the data."""
    kinds = [parameter.kind for parameter in own]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return
    most = sum(kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds) - 1
    if args and len(args) > most:
        raise ParameterError(
            f"{name}: {len(args)} positional arguments came; expected at most {max(0, most)} beside the data. Leave "
            "out the others, or give them by name."
        )
