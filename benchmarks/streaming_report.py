"""The result of `lalte bench streaming`: as a table, as a figure, and taken up again where a run was interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def size_of(row: dict[str, Any]) -> int | None:
    """Cache size of a row's case."""
    words = row["case"].split()
    return int(words[1]) if words[0] == "cache" else None


def earlier_rows(out: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an interrupted run of the same settings on the same kind of device.

    Raises:
        ValueError: the file holds a finished run, or another one.
    """
    from eval.results import read_json

    there = read_json(out)
    if there.get("complete", True):
        raise ValueError(f"out: {out} exists; choose another file, or give --overwrite")
    here = json.loads(json.dumps(here))
    for name in ("device", "config", "versions"):
        if there[name] != here[name]:
            raise ValueError(
                f"out: {out} holds an unfinished run with another {name}; choose another file, or give --overwrite"
            )
    return there["rows"]


def table(content: dict[str, Any]) -> str:
    """The rows as lines for a terminal, with the ratios of times and perplexities to those of lalte in the case.

    Where both are of the same tokens, the ratio of perplexities has its 95 % interval.
    """
    own = {
        (row["case"], row["metric"]): row
        for row in content["rows"]
        if row["system"] == "lalte" and row["metric"] != "bytes"
    }
    lines = [f"{'case':<34}{'system':<16}{'metric':<12}{'median':>14}  ratio"]
    for row in content["rows"]:
        key = row["case"], row["metric"]
        ratio = _ratio_text(row, own[key]) if key in own else ""
        value = f"{row['median']:.0f}" if row["metric"] == "bytes" else f"{row['median']:.2f}"
        lines.append(f"{row['case']:<34}{row['system']:<16}{row['metric']:<12}{value:>14}  {ratio}".rstrip())
    return "\n".join(lines)


def _ratio_text(row: dict[str, Any], own: dict[str, Any]) -> str:
    text = f"{row['median'] / own['median']:6.2f}"
    if row is own or "losses" not in row:
        return text
    differences = [a - b for a, b in zip(row["losses"], own["losses"], strict=True)]
    mean, n = sum(differences) / len(differences), len(differences)
    error = math.sqrt(sum((x - mean) ** 2 for x in differences) / max(1, n - 1) / n)
    return f"{text} [{math.exp(mean - 1.96 * error):.2f}, {math.exp(mean + 1.96 * error):.2f}]"


def draw(content: dict[str, Any], path: str) -> None:
    """Perplexity and milliseconds a token against the length of the text, one panel a cache size."""
    from matplotlib.figure import Figure

    sizes = content["config"]["cache_sizes"]
    systems = list(dict.fromkeys(row["system"] for row in content["rows"]))
    figure = Figure(figsize=(4 * len(sizes), 6), layout="constrained")
    for r, metric in enumerate(("perplexity", "ms")):
        for c, size in enumerate(sizes):
            axes = figure.add_subplot(2, len(sizes), r * len(sizes) + c + 1)
            for system in systems:
                points = _points(content["rows"], system, metric, size)
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=system)
            axes.set(title=f"cache of {size}", xlabel="tokens read")
            axes.set_xscale("log", base=2)
            if metric == "ms":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            axes.set_ylabel("perplexity" if metric == "perplexity" else "ms a token")
            axes.legend()
    figure.savefig(path)


def _points(rows: list[dict[str, Any]], system: str, metric: str, size: int) -> list[tuple[int, float]]:
    """(length, median) of a system; perplexities are those of the sampled tokens, which all systems share."""
    found = []
    for row in rows:
        words = row["case"].split()
        mine = words[0] == "text" or words[1] == str(size)
        shared = ("sampled" in words) == (metric == "perplexity")
        if row["system"] == system and row["metric"] == metric and mine and shared:
            found.append((int(words[words.index("text") + 1]), row["median"]))
    return found
