"""Joins the result files of several runs into one table and figures. A difference inside the intervals is no win."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import figures
from .intervals import winner
from .reports import metric_text, value_text
from .results import METRICS, read_json, wilson, write_bytes

TIMES = ("ms", "s", "tokens_per_s")
AXES = {"L": "length (tokens)", "T": "position (tokens)", "D": "distance (lines)"}
# settings that say which cases were measured, with what model and how it was run, or have notes of their own
NOT_WHAT = ("tasks", "lengths", "distances", "tokens", "limit", "model", "budget", "retention", "cache", "systems")
NOT_WHAT += ("batch_size", "chunk", "definition", "tokenizer", "seed", "samples", "wording")
CASE = re.compile(r"(?P<stem>.+) (?P<axis>[LTD])(?P<place>\d+)")
FIELDS = ("evaluation", "definition", "case", "metric", "system", "value", "low", "high", "n", "best", "file")


@dataclass
class Run:
    """A result file, under the name that its systems get in the comparison."""

    name: str
    path: Path
    content: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What was measured: the run's settings without those that a comparison is about."""
        config = self.content.get("config")
        config = config if isinstance(config, dict) and self.content.get("definition") else {}
        return {name: value for name, value in config.items() if name not in NOT_WHAT}


@dataclass
class Section:
    """What is comparable: rows of one evaluation under one definition, and what sets their files apart."""

    evaluation: str
    definition: str
    runs: list[Run] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def systems(self) -> list[str]:
        """In the order of the runs."""
        return list(dict.fromkeys(row["system"] for row in self.rows))

    @property
    def cases(self) -> list[tuple[str, str]]:
        """(case, metric), those of one task together and by length."""
        found = list(dict.fromkeys((row["case"], row["metric"]) for row in self.rows))
        stems = list(dict.fromkeys((_stem(case), metric) for case, metric in found))
        return sorted(found, key=lambda entry: (stems.index((_stem(entry[0]), entry[1])), _place(entry[0])))

    def at(self, case: str, metric: str) -> list[dict[str, Any]]:
        """The rows of a case, one a system."""
        return [row for row in self.rows if (row["case"], row["metric"]) == (case, metric)]

    def comparable(self, case: str, metric: str) -> bool:
        """Whether a case has several systems whose numbers say something about each other.

        Times of different files don't, nor do losses and perplexities of different tokenizers, nor what was measured
        on other text or questions.
        """
        rows = self.at(case, metric)
        if metric != "bytes" and differing([row["settings"] for row in rows]):
            return False
        if metric in TIMES and len({row["file"] for row in rows}) > 1:
            return False
        if metric in ("perplexity", "loss") and len({row["tokenizer"] for row in rows}) > 1:
            return False
        return len(rows) > 1

    def best(self, case: str, metric: str) -> str | None:
        """The system that is better than all others beyond chance, if there is one."""
        found = winner(self.at(case, metric)) if self.comparable(case, metric) else None
        return found["system"] if found else None

    def warnings(self) -> list[str]:
        """What sets the runs apart besides their models."""
        found = []
        for name in ("tokenizer", "seed", "samples", "device"):
            values = [(run.name, run.content.get(name)) for run in self.runs]  # runs of one model may share a name
            if name == "device" and not any(row["metric"] in TIMES for row in self.rows):
                continue
            if len({json.dumps(value, default=str) for _, value in values}) > 1:
                listed = ", ".join(dict.fromkeys(f"{run}: {value}" for run, value in values))
                found.append(f"{self.evaluation}: the runs differ in their {name} ({listed})")
        for name in differing([run.settings for run in self.runs]):
            values = ((run.name, run.settings.get(name)) for run in self.runs)
            listed = ", ".join(dict.fromkeys(f"{run}: {str(value)[:80]}" for run, value in values))
            found.append(f"{self.evaluation}: the runs differ in their {name} ({listed}), so none is called best")
        return found


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the settings that have several values; a run that doesn't know a setting has none."""
    names = dict.fromkeys(name for own in settings for name in own)
    several = lambda name: len({json.dumps(own[name], sort_keys=True) for own in settings if name in own}) > 1
    return [name for name in names if several(name)]


def _stem(case: str) -> str:
    match = CASE.fullmatch(case)
    return f"{match['stem']} {match['axis']}" if match else case


def _place(case: str) -> int:
    match = CASE.fullmatch(case)
    return int(match["place"]) if match else 0


# ---- reading ----


def read_run(argument: str) -> Run:
    """A run from `DIR` or `NAME=DIR`, where DIR may also be a result file itself.

    Raises:
        ValueError: no such folder, or no result file in it.
    """
    name, sign, place = argument.partition("=")
    if not sign or not name or Path(argument).exists():
        name, place = "", argument
    path = Path(place)
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        hint = "its run isn't finished" if path.is_dir() else "give the folder of a run, or NAME=DIR"
        raise ValueError(f"run: {file} is not a file; {hint}")
    content = read_json(file)
    rows = content.get("rows") if isinstance(content, dict) else None
    keys = {"case", "system", "metric", "median", "n"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= row.keys() for row in rows):
        raise ValueError(f"run: {file} is no result file: it needs rows with {', '.join(sorted(keys))}")
    if unknown := sorted({str(row["metric"]) for row in rows} - set(METRICS)):
        raise ValueError(f"run: {file} has the unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    own = path.resolve().name if path.is_dir() else path.stem
    return Run(name or own, file, content)


def _named(run: Run) -> Iterable[dict[str, Any]]:
    """The rows of a run with the names of the comparison, and an interval for every accuracy."""
    several = len({row["system"] for row in run.content["rows"]}) > 1
    for row in run.content["rows"]:
        row = {"low": None, "high": None} | row
        if row["metric"] == "accuracy" and row["low"] is None and row["n"]:
            row["low"], row["high"] = wilson(row["median"] * row["n"], row["n"])
        name = f"{run.name} {row['system']}" if several else run.name
        more = {"file": str(run.path), "tokenizer": run.content.get("tokenizer"), "settings": run.settings}
        yield row | {"system": name, **more}


def join(runs: Sequence[Run]) -> list[Section]:
    """Sections of what may be compared: one for each evaluation and definition.

    Raises:
        ValueError: two runs of one name give the same case.
    """
    sections: dict[tuple[str, str], Section] = {}
    seen: dict[tuple[str, ...], Path] = {}
    for run in runs:
        key = (str(run.content.get("name") or "results"), str(run.content.get("definition") or ""))
        section = sections.setdefault(key, Section(*key))
        section.runs.append(run)
        for row in _named(run):
            place = (*key, row["system"], row["case"], row["metric"])
            if place in seen:
                raise ValueError(
                    f"run: {seen[place]} and {run.path} both give {row['case']} of {row['system']!r}; name them "
                    "apart as NAME=DIR"
                )
            seen[place] = run.path
            section.rows.append(row)
    return list(sections.values())


# ---- tables ----


def markdown(sections: Sequence[Section]) -> str:
    """A table for each section: a line a case, a column a system, and which is best beyond the intervals."""
    parts = []
    for section in sections:
        systems = section.systems
        parts += [f"## {section.evaluation}", ""]
        parts += [section.definition, ""] if section.definition else []
        parts += [f"Note: {warning}." for warning in section.warnings()]
        parts += [""] if section.warnings() else []
        parts.append(f"| case | metric | {' | '.join(systems)} | best |")
        parts.append("|---" * (len(systems) + 3) + "|")
        for case, metric in section.cases:
            rows = {row["system"]: row for row in section.at(case, metric)}
            cells = [value_text(rows[system]) if system in rows else "-" for system in systems]
            best = section.best(case, metric) or ("no difference shown" if section.comparable(case, metric) else "-")
            parts.append(f"| {case} | {metric_text(metric)} | {' | '.join(cells)} | {best} |")
        parts.append("")
    return "\n".join(parts)


def table_csv(sections: Sequence[Section]) -> str:
    """One line for each row of every run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    for section in sections:
        for case, metric in section.cases:
            best = section.best(case, metric)
            for row in section.at(case, metric):
                ends = ["" if row[end] is None else row[end] for end in ("low", "high")]
                mine = int(row["system"] == best)
                head = (section.evaluation, section.definition, case, metric, row["system"], row["median"])
                writer.writerow([*head, *ends, row["n"], mine, row["file"]])
    return text.getvalue()


# ---- figures ----


def _slug(*words: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-").lower()


def _curves(section: Section, out: Path, prefix: str, overwrite: bool) -> list[Path]:
    """A figure for each task and metric that was measured at several lengths, positions or distances."""
    groups: dict[tuple[str, str, str], dict[str, list[tuple[int, dict[str, Any]]]]] = {}
    for row in section.rows:
        if match := CASE.fullmatch(row["case"]):
            group = groups.setdefault((match["stem"], match["axis"], row["metric"]), {})
            group.setdefault(row["system"], []).append((int(match["place"]), row))
    written = []
    for (stem, axis, metric), systems in groups.items():
        if len({place for points in systems.values() for place, _ in points}) < 2:
            continue
        lines = []
        for system, points in systems.items():
            points = sorted(points, key=lambda point: point[0])
            column = lambda name, points=points: [row[name] for _, row in points]
            places = [place for place, _ in points]
            lines.append(figures.Curve(system, places, column("median"), column("low"), column("high")))
        written += figures.curves(
            out / _slug(prefix, stem, metric),
            lines,
            title=f"{section.evaluation}: {stem}",
            x_label=AXES[axis],
            y_label={"ms": "ms a token", "tokens_per_s": "tokens a second"}.get(metric, metric),
            metric=metric,
            overwrite=overwrite,
        )
    return written


def read_samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Samples in the folder of a run by task: those that have a depth, a length and a score."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / "samples").glob("*.jsonl")):
        latest = {}
        # only the line feed ends a line: str.splitlines would also cut inside answers
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                record = json.loads(line)
                latest[record["index"]] = record
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut off, or a file of another kind
        for record in latest.values():
            values = [record.get(name) for name in ("depth_percent", "length", "score")]
            if None not in values and "task" in record:
                found.setdefault(record["task"], []).append(record)
    return found


def _heat_maps(section: Section, out: Path, prefix: str, overwrite: bool) -> list[Path]:
    """A figure for each task whose samples have a depth, a panel a run."""
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in section.runs:
        for task, records in read_samples(run.path.parent).items():
            tasks.setdefault(task, {}).setdefault(run.name, []).extend(records)
    written = []
    for task, samples in tasks.items():
        title = f"{section.evaluation}: {task}"
        written += figures.heat_maps(out / _slug(prefix, task, "heatmap"), samples, title=title, overwrite=overwrite)
    return written


def compare(arguments: Sequence[str], out_dir: str | Path, *, overwrite: bool = False) -> list[Section]:
    """Joins runs and writes table.md, table.csv and the figures into a folder.

    Args:
        arguments: folders or result files, each as DIR or NAME=DIR; runs of one model may have one name.
        out_dir: the folder.
        overwrite: whether files of an earlier comparison may be replaced.

    Returns:
        The sections that were written.

    Raises:
        ValueError: a run that can't be read, or a folder that holds a comparison already.
    """
    if not arguments:
        raise ValueError("run: none given; give the folders of the runs to compare")
    runs = [read_run(argument) for argument in arguments]
    sections = join(runs)
    out = Path(out_dir)
    if (out / "table.md").exists() and not overwrite:
        raise ValueError(f"out: {out} holds a comparison already; choose another folder, or give --overwrite")
    written: list[Path] = []
    for number, section in enumerate(sections):
        same = [other for other in sections[:number] if other.evaluation == section.evaluation]
        prefix = section.evaluation + (f"-{len(same) + 1}" if same else "")
        written += _curves(section, out, prefix, overwrite)
        written += _heat_maps(section, out, prefix, overwrite)
    text = markdown(sections)
    if written:
        pictures = [path.name for path in written if path.suffix == ".png"]
        text += "\n## figures\n\n" + "\n".join(f"![{name}]({name})" for name in pictures) + "\n"
    write_bytes(out / "table.csv", table_csv(sections).encode(), overwrite=overwrite)
    write_bytes(out / "table.md", text.encode(), overwrite=overwrite)
    return sections
