"""How the models of the first results were trained: their logs in one file, and figures of it.

    python -m benchmarks.small_training runs/small --out results/small --overwrite

Writes OUT/training.json, OUT/training.md with the losses at the end of each length of rows, and OUT/training-loss and
OUT/training-kept as PNG and SVG, from RUNS/NAME/log.jsonl.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.small import exit_status, results_parser

KEPT, LAMBDA = "kept_per_head", "lambda"
OF_LAYER = re.compile(rf"(?:{KEPT}|{LAMBDA})/layer_\d+")
SMOOTHED = 5  # entries of a log whose mean is a point of the loss's figure
LAST = 100  # steps whose mean loss stands in the table


def read_log(file: Path) -> dict[str, list[float | None]]:
    """Columns of a run's log: `step`, `sequence_length`, `loss`, `tokens_per_s`; of a scorer `kept_per_head`, and for
    each sparse layer that and `lambda`, None until it is switched on.

    Where a run went on from a checkpoint, the later entry of a step counts.

    Args:
        file: log.jsonl of a run's folder.

    Raises:
        ValueError: no entry of a training step.
    """
    steps = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            raise ValueError(f"runs: line {number} of {file} is no JSON; remove it, it may be cut off") from None
        if "lm_loss" in entry:
            steps[entry["step"]] = entry
    if not steps:
        raise ValueError(f"runs: {file} holds no training step; train that model first")
    taken = [steps[step] for step in sorted(steps)]
    number = lambda value: round(value, 1) if value >= 1000 else float(f"{value:.5g}")
    columns: dict[str, list[float | None]] = {
        "step": [entry["step"] for entry in taken],
        "sequence_length": [entry["sequence_length"] for entry in taken],
        "loss": [number(entry["lm_loss"]) for entry in taken],
        "tokens_per_s": [number(entry["tokens_per_s"]) for entry in taken],
    }
    for name in (KEPT, *sorted(name for name in taken[-1] if OF_LAYER.fullmatch(name))):
        if name in taken[-1]:
            columns[name] = [number(entry[name]) if KEPT in entry else None for entry in taken]
    return columns


def as_text(logs: dict[str, dict[str, list[Any]]]) -> str:
    """JSON with a line for each column."""
    column = lambda item: f"   {json.dumps(item[0])}: {json.dumps(item[1])}"
    model = lambda item: f"  {json.dumps(item[0])}: {{\n" + ",\n".join(map(column, item[1].items())) + "\n  }"
    return '{\n "name": "training",\n "members": {\n' + ",\n".join(map(model, logs.items())) + "\n }\n}\n"


def losses_table(logs: dict[str, dict[str, list[Any]]]) -> str:
    """Mean loss of the last `LAST` steps with rows of each length, and the tokens kept at the end, as Markdown."""
    lengths = sorted({length for log in logs.values() for length in log["sequence_length"]})
    lines = [
        f"Mean loss of the predicted tokens in the last {LAST} steps that had rows of so many tokens, up to the step",
        "in brackets; and the tokens beyond the window that a head keeps at the end.",
        "",
        f"| model | {' | '.join(f'{length:,}' for length in lengths)} | kept |",
        "|---|" + "---:|" * (len(lengths) + 1),
    ]
    for name, log in logs.items():
        cells = []
        for length in lengths:
            losses = {
                step: loss
                for step, own, loss in zip(log["step"], log["sequence_length"], log["loss"], strict=True)
                if own == length
            }
            last = max(losses, default=0)
            some = [loss for step, loss in losses.items() if step > last - LAST]
            cells.append(f"{mean(some):.3f} ({last:,})" if some else "")
        kept = log.get(KEPT, [None])[-1]
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if kept is None else f'{kept:.0f}'} |")
    return "\n".join(lines) + "\n"


def curve(name: str, log: dict[str, list[Any]], column: str, smoothed: int = 1) -> Any:
    """A column over steps of the log's last length of rows, each point the mean of some entries.

    None if the column is missing or never had a value.
    """
    from eval.figures import Curve

    whole = log["sequence_length"][-1]
    columns = (log["step"], log["sequence_length"], log.get(column, [None] * len(log["step"])))
    points = [(step, value) for step, length, value in zip(*columns, strict=True) if length == whole]
    points = [point for point in points if point[1] is not None]
    groups = [points[i : i + smoothed] for i in range(0, len(points), smoothed)]
    if not groups:
        return None
    values = [mean(value for _, value in group) for group in groups]
    none = [None] * len(groups)
    return Curve(name, [group[-1][0] for group in groups], values, none, none)


def collect(runs: Path, out: Path, overwrite: bool) -> dict[str, dict[str, list[float | None]]]:
    """Write the logs' columns and the figures; returns the columns of each model.

    Raises:
        ValueError: no logs, or a file exists and `overwrite` is off.
    """
    from eval.figures import curves
    from eval.results import write_bytes

    found = {file.parent.name: read_log(file) for file in sorted(runs.glob("*/log.jsonl"))}
    if not found:
        raise ValueError(f"runs: {runs} holds no NAME/log.jsonl; train the models first")
    write_bytes(out / "training.json", as_text(found).encode(), overwrite=overwrite)
    write_bytes(out / "training.md", losses_table(found).encode(), overwrite=overwrite)
    for file, column, smoothed, title in (
        ("training-loss", "loss", SMOOTHED, f"loss of the predicted tokens, means of {SMOOTHED} entries"),
        ("training-kept", KEPT, 1, "tokens beyond the window that a head keeps"),
    ):
        lines = [line for name, log in found.items() if (line := curve(name, log, column, smoothed))]
        if lines:
            text = {"title": title, "x_label": "optimizer steps", "y_label": column.replace("_", " ")}
            curves(out / file, lines, metric=column, **text, logarithmic_x=False, overwrite=overwrite)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 for an error of the user's."""
    args = results_parser(__doc__, what="folder of the runs' folders").parse_args(argv)

    def command() -> None:
        for name, log in collect(Path(args.runs), Path(args.out), args.overwrite).items():
            print(f"{name}: step {log['step'][-1]}, loss {log['loss'][-1]:.3f}, kept {log.get(KEPT, [None])[-1]}")

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
