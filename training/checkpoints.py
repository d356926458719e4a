"""Checkpoints that are whole or absent: written beside their place, sealed with a list of files, then renamed."""

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training import sharded

SEAL = "complete.json"
SAVING = ".saving"
# seconds for which what another machine wrote may not be seen yet: network file systems keep listings
PATIENCE = 90.0
NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint could not be written; those written before are whole."""


def seal(folder: Path) -> None:
    """List every file of a finished checkpoint with its size, and force all of them to the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL)
    for file in files:
        _sync(file)
    text = json.dumps({"files": {str(p.relative_to(folder)): p.stat().st_size for p in files}}, indent=1)
    (folder / SEAL).write_text(text)
    _sync(folder / SEAL)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(folder: Path, target: Path) -> None:
    """Give a sealed checkpoint its name, replacing one that is there."""
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    if not folder.is_dir():
        return "it is no folder"
    try:
        listed = json.loads((folder / SEAL).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {SEAL}: it was not written by this program, or not to its end"
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return f"its {SEAL} can't be read"
    for name, size in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    found = NAME.fullmatch(folder.name)
    if found is None:
        raise ValueError(f"{folder} is not named checkpoint-<step>: name a checkpoint that this program wrote")
    return int(found.group(1))


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first, whole or not."""
    found = [p for p in output.glob("checkpoint-*") if p.is_dir() and NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def whole(output: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first."""
    return [folder for folder in checkpoints(output) if defect(folder) is None]


def newest(output: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder; None if the folder has no checkpoint.

    Damaged ones are passed over with a warning. Raises: ValueError if there are some and all are damaged.
    """
    found = checkpoints(output)
    for folder in reversed(found):
        wrong = defect(folder)
        if wrong is None:
            return folder
        warnings.warn(f"{folder} is passed over: {wrong}", stacklevel=2)
    if found:
        raise ValueError(
            f"output={str(output)!r}: no checkpoint in it is whole ({found[-1].name}: {defect(found[-1])}): restore "
            "one, or use another output folder"
        )
    return None


def rotate(output: Path, keep: int, step: int) -> None:
    """After checkpoint-`step` was saved: delete damaged ones, then whole ones but the `keep` newest up to `step`.

    Newer whole ones, left where a run went on from an older one, neither count nor go until it reaches their step.
    """
    others = [folder for folder in checkpoints(output) if step_of(folder) != step]
    damaged = [folder for folder in others if defect(folder) is not None]
    older = [folder for folder in others if folder not in damaged and step_of(folder) < step]
    for folder in damaged + older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(folder)


def check_fits(folder: Path, model: torch.nn.Module) -> None:
    """Compare names and shapes of a checkpoint's weights with a model, reading only the files' headers.

    Raises: ValueError naming the checkpoint and what is wrong with it.
    """
    from safetensors import SafetensorError

    wrong = defect(folder)
    if wrong is None:
        try:
            saved = sharded.shapes(folder) if sharded.is_sharded(folder) else _shapes(folder / "model.safetensors")
        except (SafetensorError, OSError) as error:
            wrong = f"its weights can't be read ({error})"
        else:
            own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            wrong = _mismatch(saved, own)
    if wrong is not None:
        raise ValueError(f"the checkpoint {folder} can't be continued: {wrong}; name one of this model")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _mismatch(saved: dict[str, tuple], own: dict[str, tuple]) -> str | None:
    for name, shape in saved.items():
        if name not in own:
            return f"its weight {name} does not exist in this model"
        if own[name] != shape:
            return f"its weight {name} has shape {shape}, the model's {own[name]}"
    # tied weights are saved once, so only a file that lacks most of the model is foreign
    missing = [name for name in own if name not in saved]
    return f"it lacks {missing[0]}" if len(missing) > 1 else None


def write_progress(folder: Path, rank: int, progress: dict[str, Any]) -> None:
    """Keep one rank's running sums and stream cursors beside the weights."""
    (folder / f"progress-{rank}.json").write_text(json.dumps(progress))


def await_progress(folder: Path, ranks: int) -> None:
    """Wait until the parts of all ranks are seen.

    Raises: CheckpointError for a rank whose part isn't, since it wrote to another folder.
    """
    for rank in range(ranks):
        file = folder / f"progress-{rank}.json"
        if not wait_for(file.is_file):
            raise CheckpointError(f"{file} of rank {rank} isn't there: all ranks must write to the same folder")


def wait_for(seen: Callable[[], bool]) -> bool:
    """Whether something comes true within `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not (found := seen()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def read_progress(folder: Path) -> list[dict[str, Any]]:
    """What `write_progress` kept, of all ranks in order, which need not be as many as now."""
    files = sorted(folder.glob("progress-*.json"), key=lambda file: int(file.stem.partition("-")[2]))
    return [json.loads(file.read_text()) for file in files]
