"""What `compute` would do, as a value to look at before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lazyproc.core.memory import MEBIBYTE


@dataclass(frozen=True)
class Plan:
    """What `compute` would do, as `Process.plan` tells it: shown as text or, in a notebook, as a table.

    Attributes
    ----------
    process_name, dataset : str
        The process, and the main dataset with its file.
    action : str
        ``"return"`` finished results, ``"resume"`` partial ones, or ``"start"`` afresh.
    group : str or None
        The results group that would be returned or resumed.
    duplicates, partial : tuple of str
        All results groups of the same work, finished and not.
    n_positions, n_done, n_remaining : int
        Positions of the main dataset, done in `group`, and left to compute.
    n_failed : int
        Those among the done ones whose function failed: they hold the fill value.
    n_blocks, block_positions : int
        How many blocks, and how many positions each has at most. A run measures the function first and may choose
        smaller ones.
    chunk_positions : int
        Block edges lie on multiples of this: the positions in a storage chunk.
    n_workers : int
        Blocks computed at the same time, at most.
    scheduler : str
        Where.
    bytes_per_position : int
        What a position takes while it is computed.
    worker_bytes, projected_bytes, allowed_bytes : int
        Peak of one worker, of everything together, and what `max_mem_mb` allows.
    source_bytes : int
        Size of what would be read.
    result_bytes : int or None
        Size of what would be written; None where the class creates its results itself, and has not done so yet.
    seconds : float or None
        Estimate for what remains, if the function has been measured.
    disk_bytes : int
        Room on the disk that results to be compressed take at most, while they are: rows and compressed form. 0 if
        none are.

    Notes
    -----
    Plain values, as things were when it was made: it holds no file, and is not kept up to date.

    Examples
    --------
    ``scan.h5`` has 4 x 5 positions of 6 values:

    >>> import lazyproc, numpy as np
    >>> class Mean(lazyproc.Process):
    ...     outputs = {"Mean": lazyproc.Output("f4", units="V")}
    ...     _map_function = staticmethod(np.mean)
    >>> plan = Mean("scan.h5::/Measurement_000/Channel_000/Raw_Data").plan()
    >>> plan.action, plan.n_remaining, plan.source_bytes, plan.result_bytes
    ('start', 20, 480, 80)
    >>> print(plan)  # doctest: +ELLIPSIS
    <lazyproc.Plan>
      process          Mean
      main dataset     ...scan.h5::/Measurement_000/Channel_000/Raw_Data
      compute() would  start afresh
      positions        20 to compute of 20
    ...
    """

    process_name: str
    dataset: str
    action: str
    group: str | None
    duplicates: tuple[str, ...]
    partial: tuple[str, ...]
    n_positions: int
    n_done: int
    n_remaining: int
    n_failed: int
    n_blocks: int
    block_positions: int
    chunk_positions: int
    n_workers: int
    scheduler: str
    bytes_per_position: int
    worker_bytes: int
    projected_bytes: int
    allowed_bytes: int
    source_bytes: int
    result_bytes: int | None
    seconds: float | None
    disk_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as labels and texts, for people."""
        share = format_share(self.n_done, self.n_positions)
        actions = {
            "return": f"return the finished results {self.group}",
            "resume": f"resume {self.group}, {share} done",
            "start": "start afresh",
        }
        rows = [
            ("process", self.process_name),
            ("main dataset", self.dataset),
            ("compute() would", actions[self.action]),
            ("positions", f"{self.n_remaining:,} to compute of {self.n_positions:,}"),
        ]
        if self.n_failed:
            rows.append(("failed", f"{self.n_failed:,} of those done; retry_failed() computes them again"))
        if self.n_remaining:
            written = "" if self.result_bytes is None else f", {format_bytes(self.result_bytes)} to write"
            rows += [
                ("blocks", f"{self.n_blocks:,} of up to {self.block_positions:,} positions"),
                ("workers", f"{self.n_workers} at most, {self.scheduler}"),
                ("data", f"{format_bytes(self.source_bytes)} to read{written}"),
                (
                    "memory",
                    f"{format_bytes(self.projected_bytes)} projected, {format_bytes(self.allowed_bytes)} allowed",
                ),
            ]
            if self.disk_bytes:
                rows.append(("disk", f"up to {format_bytes(self.disk_bytes)} until the results are compressed"))
            rows.append(
                ("time", "not measured yet" if self.seconds is None else f"about {format_seconds(self.seconds)}")
            )
        others = [name for name in (*self.duplicates, *self.partial) if name != self.group]
        if others:
            rows.append(("also there", ", ".join(others)))
        return rows

    def __repr__(self) -> str:
        rows = self.lines()
        width = max(len(label) for label, _ in rows)
        return "\n".join(["<lazyproc.Plan>", *(f"  {label:<{width}}  {text}" for label, text in rows)])

    def _repr_html_(self) -> str:
        return html_table("lazyproc.Plan", self.lines(), done=format_share(self.n_done, self.n_positions))


def html_table(title: str, rows: list[tuple[str, str]], done: str | None = None) -> str:
    """Return labels and texts as a small HTML table, with a bar for the share done, as of `format_share`."""
    import html  # which has a dictionary of all entities

    cells = "".join(
        f"<tr><th style='text-align:left;padding-right:1em'>{html.escape(label)}</th>"
        f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
        for label, text in rows
    )
    bar = ""
    if done is not None:
        bar = (
            "<div style='width:20em;height:.6em;background:#ddd;border-radius:.3em;overflow:hidden'>"
            f"<div style='width:{done};height:100%;background:#2a7f62'></div></div>"
        )
    return f"<div><strong>{html.escape(title)}</strong>{bar}<table>{cells}</table></div>"


def format_share(n_done: int, n_positions: int) -> str:
    """Return the share that is done, rounded down, so that 100.0% are all: ``"99.9%"``."""
    tenths = 1000 * n_done // n_positions if n_positions else 0
    return f"{tenths // 10}.{tenths % 10}%"


def format_bytes(count: float) -> str:
    """Return a number of bytes for people: ``"12.5 MiB"``."""
    if count < MEBIBYTE:
        return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count:.0f} B"
    return f"{count / MEBIBYTE:,.1f} MiB" if count < 1024 * MEBIBYTE else f"{count / 1024 / MEBIBYTE:,.1f} GiB"


def format_seconds(seconds: float) -> str:
    """Return a duration for people: ``"3.2 s"``, ``"5 min"``, ``"2.5 h"``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
