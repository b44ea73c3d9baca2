"""The command line: demo, run, status, plan, recover, slurm."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from lazyproc import __version__
from lazyproc.clusters import cluster, configured_scheduler
from lazyproc.core.errors import (
    EXIT_STOPPED,
    ArgumentValueError,
    FunctionError,
    Interrupted,
    InterruptedScript,
    LazyprocError,
    MissingFileError,
)
from lazyproc.drain import Leave, stoppable
from lazyproc.engine.launch import detect

if TYPE_CHECKING:
    import h5py

    from lazyproc.process import Process

log = logging.getLogger("lazyproc")

_DEFAULT_MIB = 4096
_LONGEST_BATCH = 200
_EXIT_UNREAD = 128 + 13
"""What a shell says of programs that SIGPIPE has ended."""
_AT_LEAST_1 = click.IntRange(min=1)
_WALL_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", re.ASCII)
_NO_TEXT_BEGINS_SO = ("[", "{", '"', "'")
"""A value on the command line that begins so is meant to be JSON or Python."""


class _DataFile(click.Path):
    """A file that is there; of an address ``FILE::DATASET``, as `run` prints it, the file."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the file's name."""
        file = value if os.path.exists(value) else str(value).partition("::")[0]
        return super().convert(file, param, ctx)


def _wall_time(_: click.Context, __: click.Parameter, value: str) -> str:
    """Return a wall time that Slurm can read."""
    if _WALL_TIME.fullmatch(value) is None:
        raise click.BadParameter(
            f"{value!r} is no time; expected minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S, such as 04:00:00."
        )
    return value


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors into a message on standard error and an exit code."""
    import functools

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Leave:  # of `stoppable`
            raise
        except KeyboardInterrupt as error:
            # Another one than Interrupted comes before a run has begun, or after it has ended: nothing is lost.
            if not isinstance(error, InterruptedScript):  # the log has said it
                click.echo(str(error) if isinstance(error, Interrupted) else "Stopped: run again.", err=True)
            sys.exit(EXIT_STOPPED)
        except (LazyprocError, OSError, NotImplementedError) as error:
            if isinstance(error, NotImplementedError) and not _is_ours(error):
                raise
            if isinstance(error, FunctionError):
                _show_cause(error)
            click.echo("\n".join([f"Error: {error}", *getattr(error, "__notes__", ())]), err=True)
            sys.exit(1)

    return wrapper


def _say(text: str) -> None:
    """Write to standard output; end quietly, as other programs do, if who read it has ended (``| head``)."""
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it is written at the exit
        sys.exit(_EXIT_UNREAD)


def _is_ours(error: BaseException) -> bool:
    """Tell whether lazyproc itself has raised an error, not a function or a hook that it has called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(os.path.dirname(__file__) + os.sep)


def _on_cluster(*, ranks: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a command on the Dask cluster that is named, if one is; leave with 75 by the signals of batch systems.

    With `ranks` the processes that mpiexec or srun launched are a cluster: this one goes on for all, the others serve.
    """
    import functools

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(*args: Any, scheduler: str | None, **kwargs: Any) -> None:
            launched = detect() is not None
            say = _say if ranks and not kwargs.get("as_json") else log.info
            if launched and ranks:
                sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # what functions print shall be seen

            def connect() -> None:
                if ranks if launched else configured_scheduler(scheduler) is not None:
                    opened.enter_context(cluster(scheduler=scheduler, say=say))

            with ExitStack() as opened:
                if not launched:  # else all processes get the signal, which ends them until they are a cluster
                    opened.enter_context(stoppable())
                _reported(connect)()
                command(*args, **kwargs)

        return wrapper

    return wrap


def _show_cause(error: BaseException) -> None:
    """Show where the user's own code failed."""
    if error.__cause__ is not None:
        click.echo("".join(traceback.format_exception(error.__cause__)).rstrip(), err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lazyproc")
def main() -> None:
    """Process big spectroscopic and imaging files, position by position.

    Exit codes: 0 done, 1 failed, 2 usage, 75 stopped early with work committed: run again.
    """
    launch = detect()
    if launch is not None and not launch.is_driver:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # one process speaks for all
        if click.get_current_context().invoked_subcommand != "run":
            sys.exit(0)


def _work_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what `run` and `plan` have in common."""
    options = [
        click.argument("process"),
        click.argument("address", metavar="FILE::DATASET"),
        click.option(
            "-p", "--parameter", "pairs", multiple=True, metavar="NAME=VALUE", help="A parameter; repeatable."
        ),
        click.option("--target", metavar="FILE::GROUP", help="Where results go. Default: beside the main dataset."),
        click.option(
            "--max-mem-mb",
            type=_AT_LEAST_1,
            default=_DEFAULT_MIB,
            show_default=True,
            help="MiB for everything together.",
        ),
        click.option("--cores", type=_AT_LEAST_1, help="CPU cores. Default: all."),
        click.option(
            "--on-error",
            type=click.Choice(["raise", "record"]),
            help="Stop at the first position that fails, or give it the fill value and record its error.",
        ),
        click.option("--max-failures", type=_AT_LEAST_1, help="With --on-error record: so many may fail."),
        click.option(
            "--scheduler",
            metavar="ADDRESS",
            help="A Dask cluster's scheduler, or the file that it has written. Default: Dask's configuration.",
        ),
        click.option(
            "--resume",
            is_flag=True,
            help="Go on with the last unfinished results, as of a stopped --override, if there are any.",
        ),
        click.option("--verbose", is_flag=True, help="Say what is done."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _make(
    process: str,
    address: str,
    pairs: tuple[str, ...],
    target: str | None,
    max_mem_mb: int,
    cores: int | None,
    on_error: str | None,
    max_failures: int | None,
    resume: bool,
    verbose: bool,
    **more: Any,
) -> Any:
    """Make the process; what was typed wrongly is a usage error."""
    from lazyproc.engine.limits import available_cores
    from lazyproc.loading import LoadingError, load_process
    from lazyproc.making import ConstructorError, make_process

    if max_failures is not None and on_error != "record":
        raise click.UsageError("--max-failures: without --on-error record the first failure stops the run; give both.")
    try:
        process_class = load_process(process)
        parameters = _parameters(pairs)
    except LoadingError as error:
        _show_cause(error)
        raise
    except ArgumentValueError as error:
        raise click.UsageError(str(error)) from error
    file, separator, dataset = address.partition("::")
    if not separator or not dataset:
        raise click.UsageError(
            f"{address}: expected FILE::DATASET, such as scan.h5::/Measurement_000/Channel_000/Raw_Data."
        )
    if not os.path.exists(file):
        raise click.UsageError(f"{file}: there is no such file.")
    wanted = {"h5_target_group": target, "cores": cores, "on_error": on_error, "verbose": verbose or None}
    wanted["max_mem_mb"] = None if max_mem_mb == _DEFAULT_MIB else max_mem_mb
    try:
        made = make_process(
            process_class,
            address,
            parameters=parameters,
            options={name: value for name, value in wanted.items() if value is not None},
            defaults={"cores": available_cores(), "max_mem_mb": _DEFAULT_MIB, **more},
        )
    except ConstructorError as error:
        raise click.UsageError(str(error)) from error
    if max_failures is not None:
        made.max_failures = max_failures
    if resume and made.partial_h5_groups:
        made.use_partial_computation()
    return made


def _goes_on(process: Process, batch: str) -> bool:
    """Have a process go on with what calls of a batch have begun; tell whether they have. What it begins is theirs."""
    from lazyproc.hdf5.search import batch_of

    def own(groups: list[h5py.Group]) -> list[h5py.Group]:
        return [group for group in groups if batch_of(group, process._status_dset_name) == batch]

    process._lazyproc_batch = batch
    partial = own(process.partial_h5_groups) if process._declares or process._can_resume() else []
    if partial:
        process.use_partial_computation(partial[-1])
    return bool(partial or own(process.duplicate_h5_groups))


def _parameters(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters; what was meant as a list, a dict or a quoted text and is none is no text either."""
    from lazyproc.loading import parse_parameters

    parameters = parse_parameters(pairs)
    for pair in pairs:
        name, _, text = pair.partition("=")
        if text.lstrip().startswith(_NO_TEXT_BEGINS_SO) and parameters[name.strip()] == text:  # taken as it was typed
            as_text = shlex.quote(f"{name}={json.dumps(text, ensure_ascii=False)}")
            raise ArgumentValueError(
                f"-p {pair}: the value begins as a list, a dict or a quoted text, and is none; expected JSON or "
                f"Python, such as -p 'window=[1, 2]'. If it is meant as a text: -p {as_text}"
            )
    return parameters


@main.command()
@_work_options
@click.option("--override", is_flag=True, help="Compute afresh, whatever there is.")
@click.option("--batch", default="", metavar="NAME", help="With --override: afresh once for all calls of this name.")
@_on_cluster(ranks=True)
@_reported
def run(as_json: bool, override: bool, batch: str, **options: Any) -> None:
    """Compute PROCESS (module:Class, path/to/file.py:Class or a registered name) over a main dataset.

    Finished results of the same work are returned, partial ones resumed. The same under mpiexec and srun, and on the
    Dask cluster that --scheduler names, or DASK_SCHEDULER_ADDRESS, or Dask's configuration.
    """
    from lazyproc.hdf5.failures import count_failed
    from lazyproc.hdf5.search import status_name_of

    if batch and not override:
        raise click.UsageError("--batch: came without --override; expected both, or none.")
    if len(batch) > _LONGEST_BATCH or not batch.isprintable():  # it is kept with the results
        raise click.UsageError(
            f"--batch {batch[:20]!r}: expected a name of printable characters, {_LONGEST_BATCH} at most."
        )
    with _make(**options) as process:
        goes_on = options["resume"] and process.partial_h5_groups
        if batch and not goes_on:
            goes_on = _goes_on(process, batch)
        try:
            group = process.compute(override and not goes_on)
        except SystemExit as error:  # of lazyproc itself only after a signal
            if error.code == EXIT_STOPPED:
                raise
            raise LazyprocError(
                f"{process.process_name}: the function has called sys.exit({error.code!r}); expected a result, or an "
                "error. What is finished is kept: correct it, and run again."
            ) from error
        address = f"{process.results_path}::{group.name}"
        if as_json:
            n_positions, n_failed = int(process.h5_main.shape[0]), count_failed(group, status_name_of(group))
            _say(json.dumps({"results": address, "n_positions": n_positions, "n_failed": n_failed}))
        else:
            _say(address)


@main.command()
@_work_options
@_on_cluster(ranks=False)
@_reported
def plan(as_json: bool, **options: Any) -> None:
    """Show what `run` would do, without doing it."""
    with _make(lazy=True, **options) as process:
        planned = process.plan()
        _say(json.dumps(planned.as_dict()) if as_json else repr(planned))


@main.command()
@click.argument("file", type=_DataFile())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_reported
def status(file: str, as_json: bool) -> None:
    """Show the results in FILE and how far they are; also while a run goes on."""
    from lazyproc.core.plan import format_share
    from lazyproc.status import file_status

    state = file_status(file)
    if as_json:
        _say(json.dumps(dataclasses.asdict(state)))
        return
    if state.running is not None:
        about = ", ".join(f"{what} {state.running.get(what, 'unknown')}" for what in ("host", "pid", "since"))
        _say(f"running: {about}")
    for one in state.results:
        failed = f", {one.n_failed:,} of them failed" if one.n_failed else ""
        if one.problem:
            text = one.problem + (f" It was finished {one.finished}." if one.finished else "")
        else:
            share = format_share(one.n_done, one.n_positions)
            text = f"{share:>7}  {one.n_done:,} of {one.n_positions:,} positions{failed}"
            text += f", finished {one.finished}" if one.finished else ""
        phase = f" ({one.phase})" if one.phase else ""
        _say(f"{one.group}{phase}\n    {text}")
    if not state.results:
        _say(f"{file}: no results")


@main.command()
@click.argument("file", type=_DataFile())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--force", is_flag=True, help="Also if FILE was changed since: that is lost; or copied with its journal.")
@_reported
def recover(file: str, as_json: bool, force: bool = False) -> None:
    """Finish, or take back, a change of FILE that was cut off by a kill; `run` does so by itself."""
    from lazyproc.hdf5.leftovers import remove_leftovers_locked
    from lazyproc.hdf5.sidecar import has_pending
    from lazyproc.hdf5.transaction import recover_locked

    if not has_pending(file):
        _check_hdf5(file)
    changed = recover_locked(file, force=force)
    changed = remove_leftovers_locked(file) or changed
    if as_json:
        _say(json.dumps({"path": file, "recovered": changed}))
    else:
        _say(f"{file}: " + ("a change that was cut off has been settled" if changed else "nothing to recover"))


def _check_hdf5(file: str) -> None:
    """Make sure that a file begins as HDF5 files do; whether it is whole does not matter here."""
    import h5py

    if not h5py.is_hdf5(file):
        raise ArgumentValueError(f"{file}: is no HDF5 file; expected one, with results of lazyproc. Give another file.")


@main.command()
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-o", "--output", default="lazyproc-job.sh", show_default=True, help="The job script to write.")
@click.option(
    "--ntasks", type=_AT_LEAST_1, default=1, show_default=True, help="MPI ranks; 1 runs the command without MPI."
)
@click.option("--cpus-per-task", type=_AT_LEAST_1, default=1, show_default=True, help="Cores of a rank.")
@click.option(
    "--time", "wall_time", callback=_wall_time, default="01:00:00", show_default=True, help="Wall time of one job."
)
@click.option(
    "--drain", "drain_seconds", type=_AT_LEAST_1, default=120, show_default=True, help="Stop so many seconds before it."
)
@click.option("--launcher", type=click.Choice(["srun", "mpiexec"]), default="srun", show_default=True)
@click.option("--max-jobs", type=_AT_LEAST_1, default=50, show_default=True, help="Jobs in a row at most.")
@click.option("--force", is_flag=True, help="Write over the file if it is there.")
@click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="Another option of sbatch; repeatable.")
@_reported
def slurm(
    command: tuple[str, ...], output: str, force: bool, wall_time: str, options: tuple[str, ...], **more: Any
) -> None:
    """Write a Slurm job script for COMMAND that submits itself again until the work is done.

    Example: lazyproc slurm --ntasks 64 --time 04:00:00 --sbatch=--partition=long -- lazyproc run peaks.py:Peaks
    scan.h5::/Measurement_000/Channel_000/Raw_Data
    """
    from lazyproc.slurm import SlurmJob

    path = os.path.abspath(output)
    job = SlurmJob(command, path, time=wall_time, options=options, **more)
    _write_script(path, job.script(), force=force)
    _say(f"{path}\nsubmit it with: sbatch {path}")


def _write_script(path: str, text: str, *, force: bool) -> None:
    """Write a script that can be run, in the place of another file only by force."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise MissingFileError(f"-o {path}: there is no folder {folder}; expected one that is there. Make it first.")
    if os.path.lexists(path) and not force and not os.path.isdir(path):
        raise LazyprocError(
            f"-o {path}: there is a file of this name already; expected a new one. Choose another name, or give "
            "--force to write over it."
        )
    whole = f"{path}.{os.getpid()}"  # which gets its name when all of it is there: half a script must not be submitted
    try:
        try:
            with open(whole, "x", encoding="utf-8") as file:
                file.write(text)
            os.chmod(whole, 0o755)
            os.replace(whole, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(whole)
            raise
    except OSError as error:
        raise LazyprocError(
            f"-o {path}: cannot be written ({error.strerror}); expected a file's name. Choose another one."
        ) from error


@main.command()
@click.argument("directory", default="lazyproc_demo", type=click.Path(file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_reported
def demo(directory: str, as_json: bool) -> None:
    """Simulate a band-excitation scan, fit it, resume once on purpose, and draw the maps, in DIRECTORY."""
    from lazyproc.demo.command import run_demo

    summary = run_demo(directory, say=lambda text: click.echo(text, err=True) if as_json else _say(text))
    if as_json:
        _say(json.dumps(summary))


if __name__ == "__main__":
    main()
