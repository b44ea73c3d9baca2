"""Write what `compare.py --save` measured as two tables in Markdown: times as ratios, and what else it cost.

python benchmarks/table.py results.json [more.json ...]
python benchmarks/table.py results.json --costs limit lazyproc joblib dask     what it cost for these only
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from workloads import WORKLOADS

Measured = dict[str, dict[str, dict[str, Any]]]


def main() -> None:
    """Print the tables of all files together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--costs", nargs="+", help="contenders in the second table; default: all")
    options = parser.parse_args()
    measured: Measured = {}
    for path in options.files:
        with open(path, encoding="utf-8") as file:
            measured.update(json.load(file))
    names = list(dict.fromkeys(name for rows in measured.values() for name in rows))
    print(*times(measured, names), "", *costs(measured, options.costs or names), sep="\n")


def times(measured: Measured, names: list[str]) -> list[str]:
    """Return the lines of the table of times: the first contender in seconds, the others over it, the best one bold."""
    first, *others = names
    lines = [f"| workload | {first} | {' | '.join(others)} |", "|---" * (len(others) + 2) + "|"]
    for workload, rows in measured.items():
        best = min(rows[name]["ratio"] for name in others if name in rows)
        cells = [ratio(rows.get(name), best) for name in others]
        about = f"`{workload}`: {WORKLOADS[workload].about}"
        lines.append(f"| {about} | 1.00 ({rows[first]['wall']:.2f} s) | {' | '.join(cells)} |")
    return lines


def ratio(row: dict[str, Any] | None, best: float) -> str:
    """Return a cell of the table of times."""
    if row is None:
        return ""
    text = f"{row['ratio']:.2f}"
    return f"**{text}**" if text == f"{best:.2f}" else text


def costs(measured: Measured, names: list[str]) -> list[str]:
    """Return the lines of the table of what else each cost, in the order of the contenders."""
    counted = [name for name in names if any(rows.get(name, {}).get("tasks") is not None for rows in measured.values())]
    heads = [f"CPU s: {', '.join(names)}", f"MiB: {', '.join(names)}", f"tasks: {', '.join(counted)}", "graph bytes"]
    lines = [f"| workload | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for workload, rows in measured.items():
        cells = [
            several(rows, names, "cpu", ".2f"),
            several(rows, names, "memory", ".0f"),
            several(rows, counted, "tasks", ",d"),
            several(rows, counted, "graph_bytes", ",d"),
        ]
        lines.append(f"| `{workload}` | {' | '.join(cells)} |")
    return lines


def several(rows: dict[str, dict[str, Any]], names: list[str], what: str, form: str) -> str:
    """Return a cell with one number a contender, and a dash where there is none."""
    values = (rows.get(name, {}).get(what) for name in names)
    return " / ".join("–" if value is None else format(value, form) for value in values)


if __name__ == "__main__":
    main()
