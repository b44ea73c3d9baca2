"""Draw what `compare.py --save` measured: wall time as a ratio to the limit (or whatever it is to), and memory.

python benchmarks/plot.py results.json comparison.png
"""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLOURS = {
    "limit": "#c4c4c4",
    "limit-1": "#e2e2e2",
    "lazyproc": "#1b6ca8",
    "lazyproc-1": "#8ab8d8",
    "h5py": "#5b4a8a",
    "joblib": "#e08e0b",
    "dask": "#b23a48",
    "xarray": "#6a994e",
    "hyperspy": "#3f8f8b",
    "sidpy": "#c77dbb",
    "pyusid": "#7d7d7d",
    "pyusid-1": "#4d4d4d",
}


def main(source: str, target: str) -> None:
    """Draw a panel of times and a panel of memory."""
    with open(source, encoding="utf-8") as file:
        measured: dict[str, dict[str, dict[str, Any]]] = json.load(file)
    figure, (times, memory) = plt.subplots(2, 1, figsize=(10, 7), layout="constrained")
    names = list(dict.fromkeys(name for rows in measured.values() for name in rows))
    references = {row.get("ratio_to", "limit") for rows in measured.values() for row in rows.values()}
    draw(times, measured, [name for name in names if {name} != references], "ratio")
    times.axhline(1, color="black", linewidth=1)
    times.set_ylabel(f"wall time / {' or '.join(sorted(references))}")
    draw(memory, measured, names, "memory")
    memory.set_ylabel("peak private memory, MiB")
    memory.set_yscale("log")
    for axes in (times, memory):
        axes.legend(ncols=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(target, dpi=110)


def draw(axes: Any, measured: dict[str, dict[str, dict[str, Any]]], names: list[str], what: str) -> None:
    """Draw one bar a contender in a group a workload."""
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        bars = [(place, rows[name][what]) for place, rows in enumerate(measured.values()) if name in rows]
        bars = [(place, value) for place, value in bars if value is not None]
        places = [place + (number - (len(names) - 1) / 2) * width for place, _ in bars]
        axes.bar(places, [value for _, value in bars], width, label=name, color=_COLOURS.get(name))
    axes.set_xticks(range(len(measured)), list(measured), rotation=30, ha="right", rotation_mode="anchor")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(*sys.argv[1:])
