"""Figures of compared runs, as PNG and SVG: curves over length or position, and heat maps side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import write_bytes
from .tables import DEPTH_BINS, depth_grid

# told apart by people who don't see all colours (Okabe and Ito), and by their marks
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX*"
DASHES = ("-", "--", ":", "-.")  # a further one when the colours begin again
LEGEND_INSIDE = 6  # more curves have their legend beside the axes


@dataclass(frozen=True)
class Curve:
    """A system's points: places on the x axis, values, and the ends of their intervals (None: no interval)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # a Figure of its own with Agg: no window system, and none of pyplot's global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, FigureCanvasAgg(figure)


def save(figure: Any, canvas: Any, path: Path, *, overwrite: bool) -> list[Path]:
    """Writes path.png and path.svg; the same figure gives the same SVG, byte for byte."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = []
    data = io.BytesIO()
    canvas.print_png(data)
    written.append(path.with_name(f"{path.name}.png"))
    write_bytes(written[-1], data.getvalue(), overwrite=overwrite)
    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "lalte", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(data, metadata={"Date": None})
    written.append(path.with_name(f"{path.name}.svg"))
    write_bytes(written[-1], data.getvalue(), overwrite=overwrite)
    return written


def _size_text(value: float, _: Any = None) -> str:
    for size, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _bytes_text(value: float, _: Any = None) -> str:
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:g}"


def curves(
    path: Path,
    lines: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    metric: str,
    logarithmic_x: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Draws curves with their intervals, each place of a logarithmic x axis marked; returns the files."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    beside = len(lines) > LEGEND_INSIDE
    figure, canvas = _figure(7.6 if beside else 6.4, 4.0)
    axes = figure.add_subplot()
    for number, line in enumerate(lines):
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        look = {"color": colour, "marker": mark, "linestyle": dashes, "markersize": 4, "linewidth": 1.4}
        axes.plot(line.x, line.y, label=line.name, **look)
        banded = [(x, a, b) for x, a, b in zip(line.x, line.low, line.high, strict=True) if a is not None is not b]
        if banded and metric in ("accuracy", "perplexity"):
            axes.fill_between(*zip(*banded, strict=True), color=colour, alpha=0.15, linewidth=0)
    if logarithmic_x:
        axes.set_xscale("log", base=2)
        places = sorted({x for line in lines for x in line.x})
        step = max(1, math.ceil(len(places) / 10))
        axes.xaxis.set_major_locator(FixedLocator(places[::step]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_size_text))
    values = [y for line in lines for y in line.y]
    if metric == "accuracy":
        axes.set_ylim(-0.03, 1.03)
    elif min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    elif metric not in ("perplexity", "loss"):
        axes.set_ylim(bottom=0)
    if metric == "bytes":
        axes.yaxis.set_major_formatter(FuncFormatter(_bytes_text))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if beside:
        figure.legend(loc="outside right center", fontsize=8)
    else:
        axes.legend(fontsize=8)
    return save(figure, canvas, path, overwrite=overwrite)


def heat_maps(
    path: Path, samples: Mapping[str, Sequence[dict[str, Any]]], *, title: str, overwrite: bool = False
) -> list[Path]:
    """Accuracy over depth and length, one panel a system, with common lengths; returns the files.

    Args:
        samples: of each system records with `depth_percent`, `length` and `score`.
    """
    lengths = sorted({sample["length"] for own in samples.values() for sample in own})
    figure, canvas = _figure(1.8 + (0.7 + 0.55 * len(lengths)) * len(samples), 1.6 + 0.3 * DEPTH_BINS)
    panels = figure.subplots(1, len(samples), squeeze=False, sharey=True)[0]
    image = None
    for axes, (name, own) in zip(panels, samples.items(), strict=True):
        grid = depth_grid(own, lengths)
        axes.set_facecolor("0.85")
        values = [[math.nan if value is None else value for value in line] for line in grid]
        image = axes.imshow(values, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value is not None:
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6)
        axes.set_xticks(range(len(lengths)), [_size_text(length) for length in lengths], fontsize=7)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("length (tokens)", fontsize=8)
    bins = range(DEPTH_BINS)
    panels[0].set_yticks(bins, [f"{100 * b // DEPTH_BINS}-{100 * (b + 1) // DEPTH_BINS}" for b in bins], fontsize=7)
    panels[0].set_ylabel("depth (%)", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=list(panels), label="accuracy")
    return save(figure, canvas, path, overwrite=overwrite)
