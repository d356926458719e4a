"""What all benchmarks share: options, timing, correctness before speed, result files and tables.

A benchmark is a list of cases, each with several systems. A time counts only after the system has agreed with a slow
reference at a small size, in the same process. Every finished case is written at once.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.results import read_json, result, row, say, write_json

RESULTS = Path(__file__).parent / "results"
OURS = "lalte"
WARMUP = 5
MIN_TIMINGS = 5


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


# ---- timing ----


@dataclass(frozen=True)
class Timing:
    """Milliseconds of many runs: median, 10th and 90th percentile, their number, and all of them."""

    median: float
    low: float
    high: float
    n: int
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        return cls(
            statistics.median(ordered), quantile(ordered, 0.1), quantile(ordered, 0.9), len(ordered), tuple(samples)
        )

    def per(self, amount: float) -> tuple[float, float, float]:
        """Median, low and high of `amount` per second."""
        return tuple(1e3 * amount / ms for ms in (self.median, self.high, self.low))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Value below which `share` of the ordered numbers lie, interpolated."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(
    run: Callable[[int], object],
    device: torch.device,
    *,
    seconds: float,
    warmup: int = WARMUP,
    most: int = 200,
    least: int = MIN_TIMINGS,
    before: Callable[[], object] | None = None,
) -> Timing:
    """Time run(0), run(1), … by device events (on a CPU by the clock).

    Args:
        run: takes the number of the call, by which it rotates its buffers.
        seconds: about how long all timings may take together.
        warmup: calls before them.
        least, most: bounds of their number.
        before: called before each timing, not timed itself (gradients to zero, say).
    """
    prepare = before or (lambda: None)
    for i in range(warmup):
        prepare()
        run(i)
    synchronize(device)
    started = time.perf_counter()
    prepare()
    run(warmup)
    synchronize(device)
    once = time.perf_counter() - started
    count = max(least, min(most, int(seconds / max(once, 1e-6))))
    if device.type != "cuda":
        samples = []
        for i in range(count):
            prepare()
            started = time.perf_counter()
            run(i)
            samples.append(1e3 * (time.perf_counter() - started))
        return Timing.of(samples)
    begin, end = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
    for i in range(count):
        prepare()
        begin[i].record()
        run(i)
        end[i].record()
    synchronize(device)
    return Timing.of([a.elapsed_time(b) for a, b in zip(begin, end, strict=True)])


def replayed(run: Callable[[int], object], calls: int, device: torch.device) -> Callable[[int], object]:
    """run(0), …, run(calls - 1) in turn as CUDA graphs: their time is the device's alone, without the launching.

    On a CPU, which has no graphs, it is `run` itself.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for i in range(2 * calls):  # compile and tune, outside of any capture
            run(i % calls)
    torch.cuda.current_stream(device).wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in range(calls)]
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            run(i)
    return lambda i: graphs[i % calls].replay()


def time_once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds from the start of a run to the end of all its work, by the clock."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Most bytes allocated at a time inside, beyond those allocated before; None on a CPU, which doesn't count."""
    if device.type != "cuda":
        yield lambda: None
        return
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes: what memory can do."""
    size = 2**30 if device.type == "cuda" else 2**24
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    timing = measure(lambda i: target.copy_(source), device, seconds=0.5)
    return 2 * size / (timing.median / 1e3)


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
        self.offered: dict[str, set[str]] = {}
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

    def run_case(self, case: str, systems: dict[str, Callable[[], None]]) -> None:
        """Run the systems of a case: each measures and adds its own rows. A failure is recorded, not raised.

        Systems that are finished in the result file, ruled out by options or beyond the time limit are left out.
        """
        wanted = self.args.systems.split(",") if self.args.systems else None
        self.offered[case] = set(systems)
        if self.args.cases and self.args.cases not in case:
            return
        for system, run in systems.items():
            if (wanted and system not in wanted) or self._is_done(case, system):
                continue
            name = f"{case} {system}"
            if self.args.limit is not None and time.monotonic() - self.started > self.args.limit:
                self.skipped.append(name)
                continue
            say(f"{self.name}: {name} …")
            self.unavailable = [u for u in self.unavailable if (u["case"], u["system"]) != (case, system)]
            failure = None
            try:
                run()
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

    def finish(self) -> int:
        """Write, print the table; exit status 1 if ours failed anywhere. Raises: ValueError for names of nothing."""
        self.write()
        print(table(self.rows, self.unavailable))
        for name in self.skipped:
            print(f"skipped, the time was over: {name}")
        say(f"{self.path}")
        names = sorted(set().union(*self.offered.values()))
        if unknown := set(self.args.systems.split(",") if self.args.systems else ()) - set(names):
            raise ValueError(
                f"--systems {','.join(sorted(unknown))}: none has that name; there are {', '.join(names)}"
            )
        if self.args.cases and not any(self.args.cases in case for case in self.offered):
            raise ValueError(f"--cases {self.args.cases}: no name contains it; there are {', '.join(self.offered)}")
        return int(any(u["system"] == OURS for u in self.unavailable))


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
