"""Result files: one shape for every evaluation, written whole or not at all, and logs that survive a kill."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

METRICS = ("ms", "s", "tokens_per_s", "bytes", "accuracy", "perplexity", "loss")
PACKAGES = ("lalte", "torch", "transformers", "tokenizers", "triton", "flash-linear-attention")


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion; the default z gives 95 %.

    Args:
        successes: their number, 0 to n; a sum of partial scores (0 to 1 each) gives an interval that is
            a little too wide.
        n: number of samples, at least 1.

    Raises:
        ValueError: n below 1, or successes outside 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes: {successes} of n = {n}; n must be at least 1 and successes 0 to n")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def row(
    case: str, system: str, metric: str, median: float, low: float | None, high: float | None, n: int
) -> dict[str, Any]:
    """One row of a result file.

    Args:
        metric: one of `METRICS`.
        median: the value itself; for an accuracy the mean over samples.
        low, high: its interval; None where too little was measured for one.
        n: measurements or samples behind it.

    Raises:
        ValueError: unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: {metric!r} is unknown; use one of {', '.join(METRICS)}")
    return {
        "case": case,
        "system": system,
        "metric": metric,
        "median": median,
        "low": low,
        "high": high,
        "n": n,
    }


def _commit() -> str | None:
    """Commit of the checkout that this file lies in (`+changes` if it was edited); None outside of one."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    return str(device)


def result(
    name: str,
    rows: Iterable[dict[str, Any]],
    *,
    config: dict[str, Any],
    device: torch.device | str,
    **more: Any,
) -> dict[str, Any]:
    """A result file's content: name, device, versions, commit, date, config, rows, and `more`."""
    return {
        "name": name,
        "device": _device_name(device),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config,
        **more,
        "rows": list(rows),
    }


def write_bytes(path: str | Path, data: bytes, *, overwrite: bool = False) -> None:
    """Writes a file whole or not at all: next to it first, then renamed into place.

    Raises:
        ValueError: the file exists and `overwrite` is off, or it can't be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another folder, or remove it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"{path}: can't be written ({error.strerror}); check the disk and the folder") from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any, *, overwrite: bool = False) -> None:
    """Writes JSON as `write_bytes` does; NaN and infinity aren't JSON and raise ValueError."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode(), overwrite=overwrite)


def read_json(path: str | Path) -> Any:
    """Reads JSON; ValueError naming the file if it can't be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); remove it or restore it") from error


def claim_folder(folder: str | Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Makes `folder` belong to one set of settings, kept in its settings.json.

    Args:
        settings: everything that the results depend on; JSON values only.
        resume: whether a folder with the same settings may be continued.

    Raises:
        ValueError: the folder holds another run (the error names what differs), or a run when `resume` is off.
    """
    path = Path(folder) / "settings.json"
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"out: {folder} is a file; give a folder")
    if not path.exists():
        if (Path(folder) / "result.json").exists() or (Path(folder) / "samples").exists():
            raise ValueError(f"out: {folder} holds results without settings.json; choose another folder")
        write_json(path, settings)
        return
    if not resume:
        raise ValueError(f"out: {folder} holds a run already; choose another folder, or continue it")
    there = read_json(path)
    here = json.loads(json.dumps(settings))
    differences = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise ValueError(f"out: {folder} holds another run: {'; '.join(differences)}; choose another folder")


class SampleLog:
    """A JSONL file that grows by one finished sample at a time.

    A line that a kill cut off at the end is removed on opening; a later line with the same `index` replaces
    an earlier one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records: dict[int, dict[str, Any]] = {}
        self._file: TextIO | None = None
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self.records[record["index"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number} is no sample; remove the line or the file") from error

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; it is in the file when this returns.

        Raises:
            ValueError: the file can't be written; what it held stays.
        """
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"{self.path}: can't be written ({error.strerror}); finished samples are kept"
            ) from error
        self.records[record["index"]] = record

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def say(message: str) -> None:
    """A line for the person at the terminal, on standard error, so that standard output stays the result."""
    print(message, file=sys.stderr, flush=True)
