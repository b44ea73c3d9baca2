"""Sort what functions return, for a block or for each row, into one column an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lazyproc.core.casting import describe
from lazyproc.core.no_result import OutputMismatch
from lazyproc.core.specs import ResolvedOutput


def columns_of_block(returned: Any, outputs: Sequence[ResolvedOutput]) -> list[Any]:
    """Sort what a block function returned into one array an output."""
    names = [output.name for output in outputs]
    if isinstance(returned, Mapping):
        _check_names(returned, names, 0)
        return [returned[name] for name in names]
    if isinstance(returned, tuple) and (len(outputs) > 1 or len(returned) == 1):
        _check_count(returned, names, 0)
        return list(returned)
    if len(outputs) == 1:
        return [returned]
    raise OutputMismatch(_wrong_form(returned, names))


def columns_of_rows(returned: list[Any], outputs: Sequence[ResolvedOutput], start: int) -> list[Any]:
    """Sort what the function returned for each row into one list an output."""
    names = [output.name for output in outputs]
    first = returned[0]
    if isinstance(first, Mapping):
        wanted = set(names)
        for row, item in enumerate(returned):
            if type(item) is dict and item.keys() == wanted:
                continue
            if not isinstance(item, Mapping):
                raise OutputMismatch(_wrong_form(item, names), start + row)
            _check_names(item, names, start + row)
        return [[item[name] for item in returned] for name in names]
    if isinstance(first, tuple) and (len(outputs) > 1 or len(first) == 1):
        for row, item in enumerate(returned):
            if not isinstance(item, tuple):
                raise OutputMismatch(_wrong_form(item, names), start + row)
            _check_count(item, names, start + row)
        return [list(column) for column in zip(*returned, strict=True)]
    if len(outputs) == 1:
        return [returned]
    raise OutputMismatch(_wrong_form(first, names), start)


def _check_names(item: Mapping[str, Any], names: list[str], row: int) -> None:
    if item.keys() != set(names):
        missing = [name for name in names if name not in item]
        surplus = [name for name in item if name not in names]
        raise OutputMismatch(
            f"The function returned a mapping with the names {list(item)}; expected the declared outputs {names}"
            + (f"; missing: {missing}" if missing else "")
            + (f"; not declared: {surplus}" if surplus else "")
            + ". Return each output once, under its name.",
            row,
        )


def _check_count(item: tuple[Any, ...], names: list[str], row: int) -> None:
    if len(item) != len(names):
        raise OutputMismatch(
            f"The function returned a tuple of {len(item)}; expected {len(names)} values, in the order of the declared "
            f"outputs {names}. Return one value an output.",
            row,
        )


def _wrong_form(returned: Any, names: list[str]) -> str:
    return (
        f"The function returned {describe(returned)}; expected a mapping with the names {names} or a tuple of "
        f"{len(names)} values in that order."
    )
