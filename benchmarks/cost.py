"""What the recipes of configs/train cost: GPU hours from measured tokens per second."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS
from eval.results import read_json

DESCRIPTION = """\
A table of GPU hours of the recipes in configs/train, from the tokens per second in result files of `lalte bench
train` and `lalte bench scaling`. Nothing is measured here, and a recipe without a measurement has no row. Cases of
`train` count only with `amp`, float32 weights under autocast as the recipes have them, and are forward and backward
alone unless they end in `steps`; `scaling` has the whole step.
"""
EPILOG = """\
examples:
  lalte bench cost benchmarks/results/*/scaling*.json
  lalte bench cost benchmarks/results/*/{scaling,train-amp,train-steps}.json --write docs/training.md
"""
BEGIN, END = "<!-- cost: begin -->", "<!-- cost: end -->"
CASE = re.compile(r"(train|scaling) (\d+(?:\.\d+)?b) ")
MANY = re.compile(r"(ddp|fsdp) x(\d+)")
CONFIGS = Path(__file__).parent.parent / "configs" / "train"


def costs(found: dict[str, Any]) -> list[list[str]]:
    """Cells of a result file's rows that belong to a recipe.

    Args:
        found: a result file's content.

    Returns:
        Rows of: recipe, tokens, device, what was measured, tokens a second of one device, GPU hours.
    """
    from training.config import load_config

    lines = []
    for row in found["rows"]:
        size, many = CASE.match(row["case"]), MANY.fullmatch(row["system"])
        recipe = CONFIGS / f"{OURS if many else row['system']}-{size.group(2)}.yaml" if size else None
        if row["metric"] != "tokens_per_s" or recipe is None or not recipe.is_file():
            continue
        if size.group(1) == "train" and " amp" not in row["case"]:
            continue  # no recipe has weights in bfloat16
        config = load_config(recipe)
        tokens = config.steps * config.batch.tokens_per_step
        speed = row["median"] / (int(many.group(2)) if many else 1)
        measured = row["case"] + (f", {row['system']}" if many else "")
        if size.group(1) == "train" and not measured.endswith(" steps"):
            measured += ", no optimizer"
        cells = [recipe.stem, f"{tokens / 1e9:.1f} B", found["device"], measured]
        lines.append([*cells, f"{speed:,.0f}", f"{tokens / speed / 3600:,.0f}"])
    return lines


def table(lines: list[list[str]]) -> str:
    """The rows as a table in Markdown."""
    head = ["recipe", "tokens", "device", "measured", "tokens/s a device", "GPU hours"]
    rule = ["---", "---:", "---", "---", "---:", "---:"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def write(path: Path, text: str) -> None:
    """Put a text between the two marks of a file. Raises: ValueError if they aren't there."""
    whole = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"--write {path}: the marks {BEGIN} and {END} aren't in it, one after the other; add them")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte bench cost`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("files", metavar="FILE", nargs="+", help="result files of the benchmarks train and scaling")
    parser.add_argument("--write", metavar="FILE", help="also put the table between the marks of this file")


def run_from_arguments(args: argparse.Namespace) -> int:
    """Print the table; the exit status."""
    lines = [cells for file in args.files for cells in costs(read_json(Path(file)))]
    if not lines:
        raise ValueError(
            f"{', '.join(args.files)}: no tokens_per_s of a recipe in configs/train; measure with lalte bench scaling"
        )
    print(table(lines))
    if args.write:
        write(Path(args.write), table(lines))
    return 0
