"""Plain tables of result rows: one line a case, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_UNITS = {"ms": "ms", "s": "s", "tokens_per_s": "tokens/s", "bytes": "bytes"}


def number_text(value: float, metric: str) -> str:
    """A number of this metric, as short as it can be said."""
    if metric == "accuracy":
        return f"{value:.3f}"
    if metric == "bytes":
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def value_text(row: dict[str, Any]) -> str:
    """`0.950 [0.91, 0.97]`; without brackets where the interval is missing or a point."""
    text = number_text(row["median"], row["metric"])
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or low == high == row["median"]:
        return text
    ends = [f"{end:.2f}" if row["metric"] == "accuracy" else number_text(end, row["metric"]) for end in (low, high)]
    return f"{text} [{', '.join(ends)}]"


def metric_text(metric: str) -> str:
    """The metric as a column's head."""
    return _UNITS.get(metric, metric)


def case_table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: case, metric, value [95 % interval], n."""
    lines = ["| case | metric | value [95 %] | n |", "|---|---|---|---|"]
    for row in rows:
        case = row["case"].replace("|", "\\|")
        lines.append(f"| {case} | {metric_text(row['metric'])} | {value_text(row)} | {row['n']} |")
    return "\n".join(lines) + "\n"


def print_cases(rows: Iterable[dict[str, Any]], title: str) -> None:
    """The same table for the terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), box=box.SIMPLE, title_justify="left")
    for name, side in (("case", "left"), ("metric", "left"), ("value [95 %]", "right"), ("n", "right")):
        table.add_column(escape(name), justify=side)
    for row in rows:
        table.add_row(escape(row["case"]), metric_text(row["metric"]), escape(value_text(row)), str(row["n"]))
    Console().print(table)
