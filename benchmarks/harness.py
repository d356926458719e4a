"""What all benchmarks share: options, correctness before speed, result files and tables, models.

A benchmark is a list of cases, each with several systems. A time counts only after the system has agreed with a slow
reference at a small size, in the same process. Every finished case is written at once.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Timing, free
from eval.results import read_json, result, row, say, write_json

RESULTS = Path(__file__).parent / "results"
OURS = "lalte"


class Disagreement(RuntimeError):
    """A system's result is not the reference's: its times would mean nothing."""


# ---- options ----


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark."""
    add = parser.add_argument
    add("--device", metavar="NAME", default="auto", help="auto (default: cuda if there is one), cuda, cuda:1, cpu")
    add(
        "--quick", action="store_true", help="tiny sizes that a CPU does in seconds: tests the code, measures nothing"
    )
    add("--limit", metavar="SECONDS", type=float, help="start no case after so many seconds; what is left is named")
    add("--cases", metavar="TEXT", help="only cases whose name contains this")
    add("--systems", metavar="A,B", help="only these systems")
    add("--seconds", metavar="S", type=float, default=3.0, help="time spent on the timings of one system; default: 3")
    add("--out", metavar="FILE", help="result file; default: benchmarks/results/<device>/<name>.json")
    add("--overwrite", action="store_true", help="begin the result file anew, whatever it holds")
    add("--commit", metavar="SHA", help="commit to note, where this is no checkout that could tell it")


def device_of(name: str) -> torch.device:
    """Raises: ValueError for a device that isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; use cuda, cuda:1, cpu or auto") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no CUDA device here; use cpu with --quick")
    return device


# ---- correctness ----


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def require_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises: Disagreement."""
    error = relative_rms(actual, expected)
    if not error <= tolerance:
        raise Disagreement(f"{what} is off by {error:.1e} (relative RMS; {tolerance:.0e} is allowed)")


# ---- results ----


def path_identity(path: str | Path) -> str:
    """A digest that tells models of one name apart without loading them: sizes and both ends of a file, or of a
    folder's JSON and weights.

    Raises:
        ValueError: nothing is there.
    """
    path = Path(path)
    files = sorted([*path.glob("*.json"), *path.glob("*.safetensors")]) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path} holds nothing to measure; give a file, or the folder of a saved model")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as data:
            digest.update(f"{file.name if path.is_dir() else ''} {size} ".encode() + data.read(1 << 20))
            data.seek(max(0, size - (1 << 20)))
            digest.update(data.read())
    return digest.hexdigest()[:16]


class Bench:
    """One run of a benchmark: its options, its result file and the table at the end.

    Args:
        name: of the benchmark.
        args: parsed options, with those of `add_common_arguments`.
        config: what the results depend on; JSON values.

    Raises:
        ValueError: the result file holds results of another commit and --overwrite wasn't given.
    """

    def __init__(self, name: str, args: argparse.Namespace, config: dict[str, Any]):
        self.name, self.args, self.config = name, args, config
        self.device = device_of(args.device)
        self.started = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.unavailable: list[dict[str, str]] = []
        self.skipped: list[str] = []
        self.cases: dict[str, dict[str, Callable[[], None]]] = {}
        self.notes: dict[str, Any] = {}
        self.head = self._head()
        self.path = Path(args.out) if args.out else RESULTS / slug(self.head["device"]) / f"{name}.json"
        if self.path.exists() and not args.overwrite:
            self._continue()

    def _head(self) -> dict[str, Any]:
        head = result(self.name, [], config=self.config, device=self.device)
        if self.args.commit:
            head["commit"] = self.args.commit
        return head

    def _continue(self) -> None:
        """Take over what the same commit measured before with the same configuration: only what is missing is run."""
        there = read_json(self.path)
        for key in ("commit", "device", "config"):
            if there.get(key) != self.head[key]:
                raise ValueError(
                    f"{self.path} holds results of another {key} ({there.get(key)}, now {self.head[key]}); use "
                    "--overwrite to replace it, or --out for another file"
                )
        self.rows, self.notes = there["rows"], there.get("notes", {})
        self.unavailable = there.get("unavailable", [])

    def add(self, case: str, system: str, metric: str, median: float, low: float, high: float, n: int) -> None:
        """One row; an earlier one of the same case, system and metric is replaced."""
        same = (case, system, metric)
        self.rows = [r for r in self.rows if (r["case"], r["system"], r["metric"]) != same]
        self.rows.append(row(case, system, metric, median, low, high, n))

    def add_timing(self, case: str, system: str, timing: Timing, tokens: int | None = None) -> None:
        """Rows of a timing: ms, and tokens_per_s for so many tokens a run."""
        self.add(case, system, "ms", timing.median, timing.low, timing.high, timing.n)
        if tokens:
            self.add(case, system, "tokens_per_s", *timing.per(tokens), timing.n)

    def add_bytes(self, case: str, system: str, count: int | None) -> None:
        """A row of bytes; none where nobody counted."""
        if count is not None:
            self.add(case, system, "bytes", count, count, count, 1)

    def note(self, case: str, system: str, **values: Any) -> None:
        """Whatever else a reader has to know about a row."""
        self.notes.setdefault(case, {}).setdefault(system, {}).update(values)

    def add_case(self, case: str, systems: dict[str, Callable[[], None]]) -> None:
        """A case and its systems, each of which will measure and add its own rows."""
        self.cases[case] = systems

    def run(self) -> int:
        """Run every system of every case and print the table; exit status 1 if ours failed anywhere.

        Systems that are finished in the result file, ruled out by options or beyond the time limit are left out. A
        failure is recorded, not raised.

        Raises: ValueError for --systems and --cases that name nothing, before anything is measured.
        """
        wanted = self._wanted()
        for case, systems in self.cases.items():
            if self.args.cases and self.args.cases not in case:
                continue
            for system, measure_it in systems.items():
                if system not in wanted or self._is_done(case, system):
                    continue
                if self.args.limit is not None and time.monotonic() - self.started > self.args.limit:
                    self.skipped.append(f"{case} {system}")
                else:
                    self._run_system(case, system, measure_it)
        self.write()
        print(table(self.rows, self.unavailable))
        for name in self.skipped:
            print(f"skipped, the time was over: {name}")
        say(f"{self.path}")
        return int(any(u["system"] == OURS for u in self.unavailable))

    def _wanted(self) -> set[str]:
        """The systems asked for. Raises: ValueError for names of nothing."""
        names = set().union(*self.cases.values())
        wanted = set(self.args.systems.split(",")) if self.args.systems else names
        if unknown := wanted - names:
            raise ValueError(
                f"--systems {','.join(sorted(unknown))}: none has that name; there are {', '.join(sorted(names))}"
            )
        if self.args.cases and not any(self.args.cases in case for case in self.cases):
            raise ValueError(f"--cases {self.args.cases}: no name contains it; there are {', '.join(self.cases)}")
        return wanted

    def _run_system(self, case: str, system: str, measure_it: Callable[[], None]) -> None:
        name = f"{case} {system}"
        say(f"{self.name}: {name} …")
        self.unavailable = [u for u in self.unavailable if (u["case"], u["system"]) != (case, system)]
        failure = None
        try:
            measure_it()
        except Exception as error:  # no memory, no kernel for the size, a compiler's own class: a result too
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self.args.debug:
                raise
        if failure is not None:
            say(f"{self.name}: {name} is not available: {failure}")
            self.unavailable.append({"case": case, "system": system, "reason": failure})
        free(self.device)
        self.write()

    def _is_done(self, case: str, system: str) -> bool:
        return any((r["case"], r["system"]) == (case, system) for r in self.rows)

    def write(self) -> None:
        more = {"notes": self.notes, "unavailable": self.unavailable, "skipped": self.skipped}
        rows = self.head.pop("rows", [])
        assert not rows
        write_json(self.path, {**self.head, **more, "rows": self.rows}, overwrite=True)


def slug(device_name: str) -> str:
    """A folder's name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().split(",")[0]).strip("-")


def table(rows: list[dict[str, Any]], unavailable: list[dict[str, str]]) -> str:
    """Medians with their spread by case, metric and system, and each system's ratio to ours."""
    lines: list[str] = []
    for case in dict.fromkeys([*(r["case"] for r in rows), *(u["case"] for u in unavailable)]):
        lines.append(case)
        mine = [r for r in rows if r["case"] == case]
        for metric in dict.fromkeys(r["metric"] for r in mine):
            group = [r for r in mine if r["metric"] == metric]
            base = next((r["median"] for r in group if r["system"] == OURS), None)
            for r in group:
                ratio = f"{r['median'] / base:8.2f} x ours" if base else ""
                spread = f"[{number(r['low'])} … {number(r['high'])}]"
                lines.append(
                    f"  {metric:<13}{r['system']:<24}{number(r['median']):>13}  {spread:<30} n={r['n']:<4}{ratio}"
                )
        lines += [f"  not available: {u['system']}: {u['reason']}" for u in unavailable if u["case"] == case]
    return "\n".join(lines)


def number(value: float) -> str:
    """Four digits that count, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- models ----


def build_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model with random weights made on the device; what must be float32 (decays, λ) stays so."""
    from transformers import AutoModelForCausalLM

    import models.auto  # noqa: F401 - registers the classes of ours

    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def model_config(system: str, size: str, **changes: Any) -> Any:
    """configs/models/<system>-<size>.json, with some fields replaced."""
    from models.config import load_config

    folder = Path(__file__).parent.parent / "configs" / "models"
    return load_config(folder / f"{system}-{size}.json", changes)
