"""May a cluster's workers write into the results' file themselves? Tried before a run, with one of each machine."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol

from lazyproc.core.errors import WorkerError
from lazyproc.engine.pulse import answer, ask

_PATIENCE_SECONDS = 30.0
_OFF = frozenset({"0", "false", "no", "none", "off"})
"""Words for off, in any case: Dask leaves an environment variable that is no Python value as a text."""


class FileTrial(Protocol):
    """What shows whether machines see each other's bytes and locks in a file; travels to workers."""

    def machine(self) -> str:
        """Return the machine that this is called on, nothing if it does not have the file."""

    def answer(self, place: int) -> str:
        """Do the part of a worker; return what went wrong."""

    def begin(self, n_places: int) -> None:
        """Get ready for so many workers."""

    def meet(self, n_places: int, given_up: Any) -> str:
        """Do the part of the driver, until `given_up()` at most; return what went wrong."""

    def check(self, n_places: int) -> str:
        """Look whether all went well; return what went wrong."""

    def end(self) -> None:
        """Clear up."""


def why_not_in_place(client: Any, trial: FileTrial) -> str:
    """Return why the workers of a cluster cannot write into the file themselves; nothing if they can.

    Parameters
    ----------
    client : Client
        The cluster's client.
    trial : FileTrial
        On the file with the results.

    Notes
    -----
    Workers of the driver's own machine need no trial. Those that join later are not asked: the first block that each of
    them writes is compared by the driver anyway.
    """
    from dask import config

    setting = config.get("lazyproc.in-place", True)
    if not setting or str(setting).strip().lower() in _OFF:
        return "the setting lazyproc.in-place is off"
    question = client.run(trial.machine, on_error="return", asynchronous=True)
    machines: dict[str, str] = answer(client, question, "do all workers see the same file?")
    for worker, machine in machines.items():
        if not isinstance(machine, str):
            return f"{worker}: {type(machine).__name__}: {machine}"
        if not machine:
            return f"{worker} does not have the same file under this path, or may not write to it"
    others = {machine: worker for worker, machine in machines.items() if machine != trial.machine()}
    return _try(client, trial, others) if others else ""


def _try(client: Any, trial: FileTrial, others: dict[str, str]) -> str:
    """Let a worker of each machine and this process write to one small file at the same time."""
    answers: dict[str, Future[Any]] = {}
    n_places = len(others)
    trial.begin(n_places)
    try:
        for place, (machine, worker) in enumerate(others.items(), start=1):
            part = client.run(trial.answer, place, workers=[worker], on_error="return", asynchronous=True)
            answers[machine] = ask(client, part)
        wrong = trial.meet(n_places, lambda: any(one.done() for one in answers.values()))
        for machine, future in answers.items():
            if said := _said(future):
                return f"{machine.partition(' ')[0]}: {said}"
        return wrong or trial.check(n_places)
    finally:
        for future in answers.values():
            future.cancel()
        trial.end()


def _said(future: Future[Any]) -> str:
    """Return what a worker says went wrong."""
    try:
        with suppress(StopIteration):
            said = next(iter(future.result(_PATIENCE_SECONDS).values()))
            return str(said) if isinstance(said, str) else f"{type(said).__name__}: {said}"
    except (OSError, TimeoutError, WorkerError) as error:
        return f"no answer ({type(error).__name__})"
    return "its worker is gone"
