"""Accuracy tables for the terminal and for Markdown, and heat maps of accuracy over depth and length."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .results import write_bytes

DEPTH_BINS = 10


def _grid(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[int], dict[tuple[str, int], dict[str, Any]]]:
    """(names, lengths, cells) of the accuracy rows, whose case reads `task L1024`."""
    rows = [row for row in rows if row["metric"] == "accuracy"]
    several = len({row["system"] for row in rows}) > 1
    names: list[str] = []
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        task, _, length = row["case"].rpartition(" L")
        name = f"{row['system']} {task}" if several else task
        if name not in names:
            names.append(name)
        cells[name, int(length)] = row
    return names, sorted({length for _, length in cells}), cells


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['median']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"


def markdown_table(rows: Iterable[dict[str, Any]]) -> str:
    """Accuracy [95 % interval] as a Markdown table: a line for each task, a column for each length."""
    names, lengths, cells = _grid(rows)
    lines = ["| task | " + " | ".join(str(length) for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_cell(cells.get((name, length))) for length in lengths) + " |")
    return "\n".join(lines) + "\n"


def print_table(rows: Iterable[dict[str, Any]], title: str = "accuracy [95 % interval]") -> None:
    """The same table for the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names, lengths, cells = _grid(rows)
    table = Table(title=title.replace("[", "\\["), box=box.SIMPLE, title_justify="left")
    table.add_column("task", no_wrap=True)
    for length in lengths:
        table.add_column(f"{length} tokens", justify="right")
    for name in names:
        table.add_row(name, *(_cell(cells.get((name, length))).replace("[", "\\[") for length in lengths))
    Console().print(table)


def depth_grid(
    samples: Iterable[dict[str, Any]], lengths: Sequence[int], bins: int = DEPTH_BINS
) -> list[list[float | None]]:
    """Mean score in each depth bin (rows, start of the text first) and length (columns); None: no sample."""
    sums: dict[tuple[int, int], list[float]] = {}
    for sample in samples:
        if sample["score"] is not None:
            place = min(int(sample["depth_percent"] * bins / 100), bins - 1)
            sums.setdefault((place, sample["length"]), []).append(sample["score"])
    mean = lambda scores: sum(scores) / len(scores) if scores else None
    return [[mean(sums.get((place, length), [])) for length in lengths] for place in range(bins)]


def heat_map(
    path: str | Path,
    samples: Iterable[dict[str, Any]],
    lengths: Sequence[int],
    title: str,
    *,
    bins: int = DEPTH_BINS,
    overwrite: bool = False,
) -> None:
    """Draws accuracy over depth and length as a PNG; cells without a sample stay grey.

    Args:
        samples: records with `depth_percent` (0 to 100), `length` and `score` (0 to 1, None: failed).
        lengths: the columns, in tokens.

    Raises:
        ValueError: the file exists and `overwrite` is off.
    """
    # a Figure of its own with Agg: no window system, and none of pyplot's global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = depth_grid(samples, lengths, bins)
    figure = Figure(figsize=(2.2 + 0.9 * len(lengths), 1.6 + 0.36 * bins), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    values = [[float("nan") if value is None else value for value in line] for line in grid]
    image = axes.imshow(values, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if value is not None:
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(bins), [f"{100 * b // bins}-{100 * (b + 1) // bins}" for b in range(bins)])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the needle (%)")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="accuracy")
    data = io.BytesIO()
    canvas.print_png(data)
    write_bytes(path, data.getvalue(), overwrite=overwrite)
