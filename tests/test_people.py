"""What a person sees: a progress bar, the log, objects that show themselves, and errors that say what to do."""

from __future__ import annotations

import html.parser
import io
import logging
import os
import pty
import re
import select
import subprocess
import sys
import termios
import textwrap
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
from usid_files import CHANNEL, make_usid_file

import lazyproc
from lazyproc import Dimension, FunctionError, Output, OutputError, Process
from lazyproc.core.events import BlockDone, Finished, Started
from lazyproc.progress import ProgressBar

SLOW = """
    import os, sys, time
    import lazyproc

    class Slow(lazyproc.Process):
        process_name = "Slow_Fit"
        outputs = {"Mean": lazyproc.Output("f8")}

        @staticmethod
        def _map_function(spectrum, delay):
            time.sleep(delay)
            return spectrum.mean()

    cores = int(sys.argv[3])
    options = {"cores": cores, "checkpoint_interval": 0.4}
    Slow(sys.argv[1], parms_dict={"delay": float(sys.argv[2])}, **options).compute()
"""


@pytest.fixture
def address(tmp_path: Path) -> str:
    return "::".join(make_usid_file(tmp_path / "scan.h5", n_rows=20, n_cols=20, n_spectral=6))


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "slow.py"
    path.write_text(textwrap.dedent(SLOW))
    return str(path)


def run_on_terminal(*words: str, width: int = 100) -> tuple[int, str]:
    """Run a command whose standard error is a terminal; return its exit code and what the terminal showed."""
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, width))
    shown = b""
    with subprocess.Popen(words, stdin=there, stdout=there, stderr=there, start_new_session=True) as running:
        os.close(there)
        while True:
            ready, _, _ = select.select([here], [], [], 120)
            assert ready, "nothing for two minutes"
            try:
                part = os.read(here, 65536)
            except OSError:  # Linux says so that the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(here)
    return running.returncode, shown.decode()


# --- the progress bar ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "width"), [("1", 100), ("2", 100), ("1", 0)])
def test_a_terminal_shows_positions_rate_and_time_left(script, address, cores, width):
    """A width of 0 is what terminals tell that do not know it."""
    code, shown = run_on_terminal(sys.executable, script, address, "0.006", cores, width=width)
    assert code == 0, shown
    frames = [frame for frame in re.split(r"[\r\n]+", shown) if "Slow_Fit" in frame]
    bar = r"Slow_Fit: +(\d+)%\|.*\| (\d+)/400 \[\d\d:\d\d<(\d\d:\d\d|\?), +(\?|[\d.]+) ?(positions/s|s/ positions|s)"
    parts = [re.search(bar, frame) for frame in frames]
    assert len(parts) >= 3
    assert all(parts), frames
    counts = [int(part[2]) for part in parts if part]
    assert counts == sorted(counts)
    assert 0 < counts[0] < 400
    assert "Slow_Fit: 100%" in shown
    assert "400/400" in shown
    assert "positions/s" in shown


def test_a_resumed_run_begins_where_it_was(script, address):
    assert subprocess.run([sys.executable, script, address, "0.0065", "1"], check=False).returncode == 0
    path, _, _ = address.partition("::")
    with h5py.File(path, "r+") as file:
        file[f"{CHANNEL}/Raw_Data-Slow_Fit_000/completed_positions"][100:] = 0
    code, shown = run_on_terminal(sys.executable, script, address, "0.0065", "1")
    assert code == 0, shown
    counts = [int(count) for count in re.findall(r"(\d+)/400", shown)]
    assert counts
    assert min(counts) > 100
    assert counts[-1] == 400


def test_a_job_of_a_moment_shows_nothing(script, address):
    assert run_on_terminal(sys.executable, script, address, "0", "1") == (0, "")


def test_off_a_terminal_nothing_is_shown(script, address):
    done = subprocess.run([sys.executable, script, address, "0.005", "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


CELL = """
    import os, time, lazyproc

    class Slow(lazyproc.Process):
        outputs = {{"Mean": lazyproc.Output("f8")}}

        @staticmethod
        def _map_function(spectrum):
            time.sleep(0.006)
            return spectrum.mean()

    process = Slow({address!r}, cores=1, checkpoint_interval=0.4)
    process.compute()
    process
"""


def test_a_notebook_shows_a_bar_and_the_process(address):
    """In a real kernel; with ipywidgets the bar is a widget, without it a line of text."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    manager = pytest.importorskip("jupyter_client.manager", reason="jupyter_client is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel, client = manager.start_new_kernel(kernel_name="python3")
    messages: list[dict[str, Any]] = []
    try:
        cell = textwrap.dedent(CELL).format(address=address)
        reply = client.execute_interactive(cell, output_hook=messages.append, timeout=120)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
        kernel.cleanup_resources()
        kernel.context.destroy()
    assert reply["content"]["status"] == "ok", reply["content"]
    shown = [message["content"] for message in messages]
    bars = [str(one) for one in shown if "Slow" in str(one) and "400" in str(one) and "text/html" not in str(one)]
    widgets = [one for one in shown if "application/vnd.jupyter.widget-view+json" in one.get("data", {})]
    assert bars or widgets
    (result,) = [one["data"] for one in shown if "text/html" in one.get("data", {})]
    assert "Raw_Data-Slow_000" in result["text/html"]
    assert "Raw_Data-Slow_000" in result["text/plain"]


def test_a_bar_takes_events_in_any_number(capsys):
    bar = ProgressBar(delay=0.0)
    bar(BlockDone(3))
    bar(Finished(3))
    bar(Started("Fit", 10, 2, "this process"))
    bar(BlockDone(8))
    bar(Finished(10))
    bar(Finished(10))
    assert capsys.readouterr() == ("", "")


def test_a_run_without_a_standard_error_goes_on(script, address):
    """As a service, or under cron: nothing is open there, and Python has no sys.stderr."""
    words = [sys.executable, script, address, "0.005", "1"]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *words], stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    with h5py.File(address.partition("::")[0], "r") as file:
        assert file[f"{CHANNEL}/Raw_Data-Slow_Fit_000/completed_positions"][()].all()


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("how", ["sys.stderr = None", "sys.stderr.close()"])
def test_what_is_logged_without_a_standard_error_harms_no_run(address, how, verbose):
    code = f"""
import sys
import numpy as np
import lazyproc
{how}
for n in (1, 2):  # the second time it warns, since the code is another one
    function = [lambda row: row.mean(), lambda row: row.max()][n - 1]
    group = lazyproc.map_positions(function, {address!r}, lazyproc.Output("f8"), verbose={verbose}, cores=1)
assert group["completed_positions"][:].all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_standard_error_that_is_closed_takes_the_bar_along(monkeypatch, when):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = ProgressBar(delay=0.0)
    bar(Started("Fit", 10, 0, "this process"))
    if when == "meanwhile":
        bar(BlockDone(4))
        assert "Fit: " in stream.getvalue()
    stream.close()
    bar(BlockDone(6))
    bar(Finished(10))


def test_a_bar_that_fails_is_logged_and_shown_no_more(monkeypatch, caplog):
    opened = []

    class Broken:
        disable = False

        def update(self, _):
            raise RuntimeError("this terminal has had enough")

    def open_broken(_):
        opened.append(Broken())
        return opened[-1]

    monkeypatch.setattr(ProgressBar, "_open", open_broken)
    monkeypatch.setattr("lazyproc.progress._is_looked_at", lambda: True)  # as at a terminal
    bar = ProgressBar(delay=0.0)
    with caplog.at_level(logging.DEBUG, "lazyproc"):
        for event in (Started("Fit", 10, 0, "this process"), BlockDone(4), BlockDone(6), Finished(10)):
            bar(event)
    assert [one.disable for one in opened] == [True]
    (record,) = [one for one in caplog.records if "progress bar" in one.getMessage()]
    assert record.levelno == logging.DEBUG
    assert "RuntimeError: this terminal has had enough" in record.getMessage()
    bar(Started("Fit", 10, 0, "this process"))
    bar(BlockDone(4))
    assert len(opened) == 2, "the next run tries again"


# --- the log ---------------------------------------------------------------------------------------------------------

TALKS = """
    import sys, lazyproc
    class Mean(lazyproc.Process):
        outputs = {"Mean": lazyproc.Output("f8")}
        @staticmethod
        def _map_function(spectrum):
            return spectrum.mean()
    verbose = sys.argv[2] == "verbose"
    for _ in range(2):
        Mean(sys.argv[1], verbose=verbose, cores=1).compute()
"""


def test_verbose_logs_to_standard_error_and_quiet_says_nothing(tmp_path, address):
    (tmp_path / "talks.py").write_text(textwrap.dedent(TALKS))
    words = [sys.executable, str(tmp_path / "talks.py"), address]
    quiet = subprocess.run([*words, "quiet"], capture_output=True, text=True, check=False)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    os.unlink(address.partition("::")[0])
    make_usid_file(address.partition("::")[0])
    loud = subprocess.run([*words, "verbose"], capture_output=True, text=True, check=False)
    assert (loud.returncode, loud.stdout) == (0, "")
    lines = loud.stderr.splitlines()
    assert any("results go to" in line for line in lines)
    assert any("positions in" in line and "this process" in line for line in lines)
    assert "returning the finished results" in lines[-1]
    assert len(lines) == len(set(lines)), "nothing is said twice"


ONE_AFTER_THE_OTHER = """
    import logging, sys, threading
    import numpy as np
    import lazyproc

    log = logging.getLogger("lazyproc")
    second_in, first_out = threading.Event(), threading.Event()

    def mean(spectrum):
        if threading.current_thread() is second:
            second_in.set()
            assert first_out.wait(60)
        elif not second_in.is_set():
            second.start()
            assert second_in.wait(60)
        return np.mean(spectrum)

    def run(address, name):
        lazyproc.map_positions(mean, address, lazyproc.Output("f8"), process_name=name, verbose=True, cores=1)

    log.setLevel(logging.ERROR)
    second = threading.Thread(target=run, args=(sys.argv[2], "Second"))
    run(sys.argv[1], "First")
    assert log.level == logging.INFO
    first_out.set()
    second.join()
    assert (log.level, log.handlers) == (logging.ERROR, [])
"""


def test_a_verbose_object_goes_on_being_shown_when_another_one_ends(tmp_path, address):
    script, other = tmp_path / "two.py", "::".join(make_usid_file(tmp_path / "other.h5"))
    script.write_text(textwrap.dedent(ONE_AFTER_THE_OTHER))
    words = [sys.executable, str(script), address, other]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("First", "Second"):
        assert done.stderr.count(f"{name}: results go to") == 1, done.stderr


def test_logging_is_as_before_after_a_verbose_process(address, caplog):
    log = logging.getLogger("lazyproc")
    before = log.level, list(log.handlers)
    with caplog.at_level(logging.DEBUG):
        lazyproc.map_positions(np.mean, address, {"Mean": Output("f8")}, verbose=True, cores=1)
    assert (log.level, list(log.handlers)) == before
    assert any("results go to" in record.getMessage() for record in caplog.records)
    assert {record.name for record in caplog.records if record.name.startswith("lazy")} == {"lazyproc"}


# --- objects that show themselves ------------------------------------------------------------------------------------


class Shown(Process):
    process_name = "Shown"
    outputs = {"Mean": Output("f8", units="nA"), "Ends": Output("f4", dims=[Dimension("End", "V", 2)])}

    @staticmethod
    def _map_function(spectrum, smoothing=3, kind="<b>"):
        return spectrum.mean(), spectrum[[0, -1]]


class Tags(html.parser.HTMLParser):
    """Sees that every tag is closed, and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in {"div", "strong", "table", "tr", "th", "td"}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(html_form: str) -> str:
    tags = Tags()
    tags.feed(html_form)
    tags.close()
    assert tags.open == []
    return tags.text


def test_a_process_and_its_plan_show_themselves(address):
    with Shown(address, parms_dict={"smoothing": 5, "kind": "<b>"}, cores=1) as process:
        for form in (repr(process), text_of(process._repr_html_())):
            for part in ("lazyproc.Process", "Shown", address, "400 positions x 6 values, float32", "smoothing=5"):
                assert part in form
            assert "kind='<b>'" in form
            assert re.search(r"finished results\s*none", form)
            assert re.search(r"Mean +float64, Ends \(2,\) float32", form)
        plan = process.plan()
        for form in (repr(plan), text_of(plan._repr_html_())):
            for part in ("lazyproc.Plan", "start afresh", "400 to compute of 400", "allowed", "to read"):
                assert part in form
        process.compute()
        assert re.search(r"finished results\s*Raw_Data-Shown_000", repr(process))
        assert "return the finished results" in repr(process.plan())
    assert "closed" in repr(process)
    assert "closed" in text_of(process._repr_html_())


@pytest.mark.parametrize("large", [np.arange(500.0), list(range(1000)), "long" * 200, {"axis": np.zeros(1000)}])
def test_a_large_parameter_takes_one_short_line(address, large):
    with Shown(address, parms_dict={"large": large, "smoothing": 5}, cores=1) as process:
        forms = repr(process), text_of(process._repr_html_())
        (line,) = (line for line in forms[0].splitlines() if line.startswith("  parameters "))
    assert len(line) < 150, line
    assert "smoothing=5" in line
    for form in forms:
        assert "large=" in form
        assert len(form) < 1000


def test_results_show_what_they_are(address):
    with Shown(address, cores=1) as process:
        for dataset in (process.to_xarray(), lazyproc.open_results(process.compute())):
            assert "Mean" in repr(dataset)
            assert "dask.array" in repr(dataset)
            assert dataset["Mean"].attrs == {"long_name": "Mean", "units": "nA"}
            assert "Mean" in dataset._repr_html_()
            assert "Bias" not in dataset.dims


# --- the user's own traceback ----------------------------------------------------------------------------------------


class BadValue(Exception):
    """An exception of the user's own, which takes more than a message."""

    def __init__(self, message: str, value: float) -> None:
        super().__init__(message, value)
        self.value = value


def helper(value: float) -> None:
    raise BadValue("cannot be", value)  # the line that is looked for


def fails_at_250(spectrum):
    if spectrum[0] == 250:
        helper(float(spectrum[0]))
    return spectrum[0]


def fails_in_the_block_of_250(block, delay=0.0):
    if (block[:, 0] == 250).any():
        helper(float(block[0, 0]))
    return block[:, 0]


class OfPositions(Process):
    outputs = {"Out": Output("f8")}
    _map_function = staticmethod(fails_at_250)


class OfBlocks(Process):
    outputs = {"Out": Output("f8")}
    _block_function = staticmethod(fails_in_the_block_of_250)


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """A scan whose values are the numbers of its positions."""
    data = np.repeat(np.arange(400.0), 6).reshape(400, 6)
    return "::".join(make_usid_file(tmp_path / "numbered.h5", n_rows=20, n_cols=20, data=data))


@pytest.fixture(scope="module")
def client():
    from distributed import Client

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Client(n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
            yield client


def run_with(kind: str, process: Process) -> None:
    """Let a process run on a chosen scheduler, as a job of the right size would."""
    from lazyproc.engine.choose import Scheduler

    chosen = Scheduler(kind, 2 if kind != "serial" else 1)
    with mock.patch("lazyproc.run.group.scheduler_of", return_value=chosen):
        process.compute()


def check_failure(caught: pytest.ExceptionInfo[FunctionError], address: str) -> None:
    """See that the error carries the user's exception with the user's frames."""
    cause = caught.value.__cause__
    assert type(cause) is BadValue
    assert cause.args[0] == "cannot be"
    frames = [
        (os.path.basename(frame.filename), frame.name, frame.line)
        for frame in traceback.extract_tb(cause.__traceback__)
    ]
    assert frames[-1] == (
        "test_people.py",
        "helper",
        'raise BadValue("cannot be", value)  # the line that is looked for',
    )
    assert frames[0][:2] in [("test_people.py", "fails_at_250"), ("test_people.py", "fails_in_the_block_of_250")]
    assert len(frames) == 2, "the user's own frames, no others"
    assert f"of {address}: BadValue: " in str(caught.value)
    assert str(caught.value).endswith(
        " (To note such positions and compute the others: on_error='record', or --on-error record.)"
    )


SCHEDULERS = ["serial", "threads", "processes"]


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_failing_function_of_positions_is_shown_with_its_traceback_and_its_position(numbered, kind):
    with OfPositions(numbered, cores=2) as process:
        with pytest.raises(FunctionError, match="OfPositions: the function failed at position 250 of") as caught:
            run_with(kind, process)
        check_failure(caught, numbered)
        assert caught.value.positions == (250, 251)
        assert caught.value.__cause__.value == 250
        (partial,) = process.partial_h5_groups
        done = partial["completed_positions"][()] == 1
        assert not done[250]
        np.testing.assert_array_equal(partial["Out"][done, 0], np.arange(400.0)[done])


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_failing_function_of_blocks_is_shown_with_its_traceback_and_its_block(numbered, kind):
    with OfBlocks(numbered, cores=2) as process:
        with pytest.raises(FunctionError, match=r"failed in the block of positions \d+ to \d+ of") as caught:
            run_with(kind, process)
        check_failure(caught, numbered)
        first, stop = caught.value.positions
        assert f"positions {first} to {stop - 1} of" in str(caught.value)
        assert first <= 250 < stop


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("process_class", [OfPositions, OfBlocks])
def test_a_failing_function_on_a_cluster(numbered, client, process_class):
    with process_class(numbered, client=client, max_mem_mb=64) as process:
        with pytest.raises(FunctionError) as caught:
            process.compute()
        check_failure(caught, numbered)
        assert caught.value.positions[0] <= 250 < caught.value.positions[1]


def test_a_run_that_fails_keeps_what_is_finished(numbered, tmp_path):
    """And does it not again once the function is mended."""
    calls = tmp_path / "calls"
    flag = tmp_path / "mended"

    class Mended(Process):
        outputs = {"Out": Output("f8")}

        @staticmethod
        def _map_function(spectrum, calls, flag):
            with open(calls, "a") as file:
                file.write(f"{spectrum[0]:.0f} ")
            if spectrum[0] == 250 and not os.path.exists(flag):
                helper(250.0)
            return spectrum[0]

    parameters = {"calls": str(calls), "flag": str(flag)}
    with Mended(numbered, parms_dict=parameters, cores=1, checkpoint_interval=0.0) as process:
        with pytest.raises(FunctionError, match="position 250"):
            process.compute()
        n_done = int((process.partial_h5_groups[0]["completed_positions"][()] == 1).sum())
        assert n_done > 0
        flag.touch()
        n_calls = len(calls.read_text().split())
        group = process.compute()
        np.testing.assert_array_equal(group["Out"][:, 0], np.arange(400.0))
        assert len(calls.read_text().split()) - n_calls == 400 - n_done


def test_a_failure_is_shown_as_one_chain(numbered, tmp_path):
    """What a person reads at the end of a script: first the own traceback, then one sentence."""
    script = tmp_path / "fails.py"
    script.write_text(
        textwrap.dedent("""
            import sys, lazyproc

            def deep(value):
                return {}[value]

            def function(spectrum):
                return deep(spectrum[0]) if spectrum[0] == 250 else spectrum[0]

            lazyproc.map_positions(function, sys.argv[1], lazyproc.Output("f8"), cores=1)
        """)
    )
    done = subprocess.run([sys.executable, str(script), numbered], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == 2
    assert "During handling" not in done.stderr
    assert "RowError" not in done.stderr
    own, _, ours = done.stderr.partition("direct cause of the following exception")
    assert "in deep" in own
    assert "KeyError" in own
    assert "FunctionError: function: the function failed at position 250 of" in ours


def returns_nothing(spectrum):
    spectrum.mean()


@pytest.mark.parametrize("outputs", [Output("f4"), {"Low": Output("f4"), "High": Output("f4")}])
def test_a_function_that_returns_nothing_is_asked_for_its_return(numbered, outputs):
    with pytest.raises(OutputError, match=r"returned None \(NoneType; a missing return\?\)"):
        lazyproc.map_positions(returns_nothing, numbered, outputs, cores=1)


def test_where_failures_are_recorded_no_error_advises_to_record_them(numbered):
    def fails(spectrum):
        raise BadValue("cannot be", 0)

    with pytest.raises(FunctionError, match="the function failed at position 0 of") as caught:
        lazyproc.map_positions(fails, numbered, Output("f4"), on_error="record")
    assert "--on-error" not in str(caught.value)


def test_a_wrong_result_is_named_with_its_position(numbered):
    def sometimes_two(spectrum):
        return spectrum[:2] if spectrum[0] == 250 else spectrum[0]

    with pytest.raises(
        OutputError, match=r"sometimes_two: at position 250 of .*Output 'Out': .*shape \(2,\)"
    ) as caught:
        lazyproc.map_positions(sometimes_two, numbered, {"Out": Output("f8")}, cores=1)
    assert caught.value.__cause__ is None


def test_an_exception_that_cannot_travel_is_told_by_its_text(numbered, client):
    def hard(spectrum):
        if spectrum[0] == 250:
            import threading

            error = RuntimeError("holds a lock")
            error.lock = threading.Lock()
            raise error
        return spectrum[0]

    with pytest.raises(FunctionError, match=r"position 250 of .*holds a lock") as caught:
        lazyproc.map_positions(hard, numbered, {"Out": Output("f8")}, client=client)
    assert traceback.extract_tb(caught.value.__cause__.__traceback__)[-1].name == "hard"
