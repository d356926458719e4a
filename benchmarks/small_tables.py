"""Tables and figures of the first results, from the evaluations of all models (benchmarks/small.py).

    python -m benchmarks.small_tables runs/small-eval --out results/small
    python -m benchmarks.small_tables runs/small-eval runs/small-1-eval runs/small-2-eval --out results/small

A folder has one folder a model, with one for each of its evaluations. The first makes all tables; further ones, of
the same models trained from other seeds, join it in seeds.md, and have a folder of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.small import BUDGET, POLICY, exit_status, results_parser
from eval.compare import read_samples

# an answer that has none of the values is wrong by its figures if it begins with any, as an answer should
FORMS = ("right", "right in part", "wrong figures", "no figures")


def collect(runs: Path, out: Path, overwrite: bool) -> dict[str, Path]:
    """Copy RUNS/NAME/EVALUATION/result.json to OUT/NAME.EVALUATION.json; the copies by `NAME.EVALUATION`.

    Raises:
        ValueError: there are none, or a copy exists and `overwrite` is off.
    """
    from eval.results import write_bytes

    found = sorted(runs.glob("*/*/result.json"))
    if not found:
        raise ValueError(f"runs: {runs} holds no NAME/EVALUATION/result.json; evaluate models first")
    copies = {}
    for file in found:
        label = f"{file.parent.parent.name}.{file.parent.name}"
        copies[label] = out / f"{label}.json"
        write_bytes(copies[label], file.read_bytes(), overwrite=overwrite)
    return copies


def split_label(label: str) -> tuple[str, str]:
    """(member, change) of `NAME.EVALUATION`; the change is `budget-32`, `policy-h2o` or empty.

    NAME may have dots (lalte-0.4b), EVALUATION has none.
    """
    member, _, evaluation = label.rpartition(".")
    changed = evaluation.startswith((BUDGET, POLICY))
    return member, "-".join(evaluation.split("-")[:2]) if changed else ""


def place_of(label: str) -> tuple[str, str, int]:
    """Where a result stands in the tables: members by name, budgets by size."""
    member, change = split_label(label)
    kind, _, size = change.partition("-")
    return (member, kind, int(size)) if size.isdecimal() else (member, change, 0)


def memory_figures(copies: dict[str, Path], out: Path, overwrite: bool) -> None:
    """Accuracy over budget, a figure a case: the model's scorer, and other policies in its own slots."""
    from eval import figures
    from eval.results import read_json

    points: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = {}
    for label, file in copies.items():
        member, change = split_label(label)
        if not change:
            continue
        content = read_json(file)
        name = change.removeprefix(POLICY) if change.startswith(POLICY) else "lte"
        for row in content["rows"]:
            point = (content["config"]["budget"], row)
            points.setdefault(f"{member} {row['case']}", {}).setdefault(name, []).append(point)
    for case, systems in points.items():
        lines = []
        for name, found in systems.items():
            # the axis is logarithmic, so nothing stands at 0
            found = sorted((point for point in found if point[0] > 0), key=lambda point: point[0])
            column = lambda key, found=found: [row[key] for _, row in found]
            places = [budget for budget, _ in found]
            lines += [figures.Curve(name, places, column("median"), column("low"), column("high"))] if found else []
        if sum(len(line.x) for line in lines) < 2:
            continue  # one point shows nothing
        figures.curves(
            out / f"memory-{case.replace(' ', '-').lower()}",
            lines,
            title=f"{case}: what fills the slots",
            x_label="retained tokens a head (budget)",
            y_label="accuracy",
            metric="accuracy",
            overwrite=overwrite,
        )


def form_of(sample: dict[str, Any]) -> str:
    """Which of `FORMS` a sample's answer has."""
    if sample["score"] > 0:
        return FORMS[0] if sample["score"] == 1 else FORMS[1]
    begin = sample["prediction"].strip()[:12]
    return FORMS[2] if any(character.isdigit() for character in begin) else FORMS[3]


def answers_table(runs: Path) -> str:
    """What the answers to S-NIAH look like, as Markdown; empty if no samples lie in the folders of `runs`.

    All members as they are and with budget 0. A cell has the four shares of `FORMS` in percent.
    """
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for folder in sorted(runs.glob("*/*niah-*")):
        member, change = split_label(f"{folder.parent.name}.{folder.name}")
        if change not in ("", f"{BUDGET}0"):
            continue
        for task, samples in read_samples(folder).items():
            for length in sorted({sample["length"] for sample in samples}):
                forms = [form_of(sample) for sample in samples if sample["length"] == length]
                shares = " / ".join(f"{100 * forms.count(form) / len(forms):.0f}" for form in FORMS)
                cells.setdefault((task, length), {})["-".join(filter(None, (member, change)))] = shares
    if not cells:
        return ""
    names = sorted({name for found in cells.values() for name in found})
    lines = [f"Percent of the answers that are {', '.join(FORMS)}.", ""]
    lines += [f"| case | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for (task, length), found in sorted(cells.items()):
        lines.append(f"| {task} L{length} | {' | '.join(found.get(name, '') for name in names)} |")
    return "\n".join(lines) + "\n"


def write_notes(runs: Path, copies: dict[str, Path], out: Path, overwrite: bool) -> None:
    """OUT/kept.md, what the scorers retained, and OUT/answers.md, the forms of answers, as far as they were measured.

    Args:
        runs: folder of the models' folders, whose samples have the answers.
        copies: result files by `NAME.EVALUATION`.
    """
    from eval import retained
    from eval.results import read_json, write_bytes

    labels = sorted((label for label in copies if ".retained-" in label), key=place_of)
    kept = [f"## {split_label(label)[0]}\n\n{retained.table(read_json(copies[label])['shares'])}" for label in labels]
    for name, text in (("kept.md", "\n".join(kept)), ("answers.md", answers_table(runs))):
        if text:
            write_bytes(out / name, text.encode(), overwrite=overwrite)


def seeds_table(results: Sequence[dict[str, Path]]) -> str:
    """Means over seeds of accuracies and perplexities, with the least and the most, as Markdown.

    Args:
        results: of each seed the result files by `NAME.EVALUATION`. Rows that only one seed has are left out.
    """
    from eval.results import read_json

    values: dict[str, dict[str, list[float]]] = {}
    for copies in results:
        for label, file in copies.items():
            member, change = split_label(label)
            if ".retained-" in label or change not in ("", f"{BUDGET}0"):
                continue
            for row in read_json(file)["rows"]:
                name = "-".join(filter(None, (member, change)))
                values.setdefault(row["case"], {}).setdefault(name, []).append(row["median"])
    shared = {case: {name: v for name, v in found.items() if len(v) > 1} for case, found in values.items()}
    names = sorted({name for found in shared.values() for name in found})
    cell = lambda v: f"{mean(v):.3g} ({min(v):.3g} to {max(v):.3g}; {len(v)})" if v else ""
    lines = ["Mean over seeds, the least and the most, and how many seeds.", ""]
    lines += [f"| case | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for case, found in shared.items():
        if found:
            lines.append(f"| {case} | {' | '.join(cell(found.get(name, [])) for name in names)} |")
    return "\n".join(lines) + "\n"


def table(runs: Path, out: Path, overwrite: bool, other_seeds: Sequence[Path] = ()) -> None:
    """Results, tables and figures of all models that were evaluated into folders of `runs`.

    Args:
        other_seeds: folders like `runs`; their results, kept.md and answers.md go to OUT/seed-1 and so on.

    Raises:
        ValueError: a folder without results, or a file exists and `overwrite` is off.
    """
    from eval.compare import compare
    from eval.results import write_bytes

    copies = collect(runs, out, overwrite)
    members, memory = [], []
    for label, file in sorted(copies.items(), key=lambda copy: place_of(copy[0])):
        member, change = split_label(label)
        if ".retained-" in label:
            continue
        if not change or change == f"{BUDGET}0":
            members.append(f"{member}{'-' + change if change else ''}={file}")
        if change:
            memory.append(f"{member}-{change}={file}")
    compare(members, out / "members", overwrite=overwrite)
    if set(memory) - set(members):  # budget 0 stands in both, and alone needs no second table
        compare(memory, out / "memory", overwrite=overwrite)
        memory_figures(copies, out / "memory", overwrite)
    write_notes(runs, copies, out, overwrite)
    seeds = []
    for i, folder in enumerate(other_seeds, start=1):
        seeds.append(collect(folder, out / f"seed-{i}", overwrite))
        write_notes(folder, seeds[-1], out / f"seed-{i}", overwrite)
    if seeds:
        write_bytes(out / "seeds.md", seeds_table([copies, *seeds]).encode(), overwrite=overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 for an error of the user's."""
    what = "folders of evaluations: the first seed's, then others'"
    args = results_parser(__doc__, what=what, folders="+").parse_args(argv)
    first, *others = map(Path, args.runs)
    return exit_status(lambda: table(first, Path(args.out), args.overwrite, other_seeds=others))


if __name__ == "__main__":
    sys.exit(main())
