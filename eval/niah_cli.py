"""`lalte eval niah`: settings from defaults < file < command line. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

HELP = "needles in haystacks (RULER): can the model find a sentence far back in a long text?"
DESCRIPTION = """\
Hides sentences such as "One of the special magic numbers for brave-otter is: 3141592." in long texts and asks
for the number. Accuracy is reported for each task and length (tokens of prompt and answer together).

tasks:
  single_1     one needle, the haystack is one line repeated   (the easiest)
  single_2     one needle in essays
  single_3     the same, the value is a UUID
  multikey_1   four needles in essays, one asked
  multikey_2   every line is a needle, one asked
  multikey_3   the same with UUIDs                             (the hardest)
  multivalue   four values of one key, all asked
  multiquery   four keys, all asked
"""
EPILOG = """\
examples:
  lalte eval niah --model runs/quickstart --lengths 256,512,1024 --tasks single_1 --samples 50 --out runs/niah
  lalte eval niah --model runs/mine --config configs/eval/niah.yaml --budget 0 --out runs/niah-without-retained

The folder of --out gets result.json, table.md, heatmap-<task>.png, samples/*.jsonl and config.yaml. A run that
was interrupted continues when the same command is given again.
"""


@dataclass
class NiahConfig:
    """Settings of a run; see `niah.run_niah` and `loading.load_model`."""

    model: str | None = None
    out: str | None = None
    tasks: list[str] = field(default_factory=lambda: ["single_1", "single_2", "single_3"])
    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    samples: int = 500
    seed: int = 42
    batch_size: int = 8
    new_tokens: int = 128
    budget: int | None = None
    step: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    resume: bool = True
    save_prompts: bool = False


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1024,2048") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options, description and examples to a parser."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", metavar="DIR", help="folder of the model and its tokenizer")
    add("--out", metavar="DIR", help="folder for the results; an interrupted run in it is continued")
    add("--config", metavar="FILE", help="YAML with any of these settings; options given here win")
    add("--tasks", metavar="A,B", type=_names, help="default: single_1,single_2,single_3")
    add("--lengths", metavar="N,M", type=_numbers, help="tokens; default: 1024,2048,4096")
    add("--samples", metavar="N", type=int, help="for each task and length; default: 500, as RULER")
    add("--seed", metavar="N", type=int, help="of the prompts; default: 42")
    add("--batch-size", metavar="N", type=int, help="prompts at once; default: 8")
    add("--new-tokens", metavar="N", type=int, help="tokens generated at most; default: 128, as RULER")
    add("--budget", metavar="N", type=int, help="retained tokens per head (0: none); default: the model's own")
    add("--step", metavar="N", type=int, help="growth of the haystack in words or lines; default: RULER's")
    add("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:1, …")
    add("--dtype", metavar="NAME", help="auto (default: as saved), float32, bfloat16, float16")
    flag = argparse.BooleanOptionalAction
    add("--resume", action=flag, default=None, help="continue a run in --out (default), or refuse to")
    add("--save-prompts", action=flag, default=None, help="keep each prompt in samples/*.jsonl (default: no)")


def _read_file(path: str) -> Any:
    """The settings of a YAML file, checked for unknown names.

    Raises:
        ValueError: no such file, not YAML, or a setting that doesn't exist.
    """
    from omegaconf import DictConfig, OmegaConf

    if not Path(path).is_file():
        raise ValueError(f"config: {path} is not a file; configs/eval/niah.yaml is an example")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:
        raise ValueError(f"config: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"config: {path} is not a list of `name: value` lines")
    known = [f.name for f in fields(NiahConfig)]
    for name in loaded:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"config: {path} has the unknown setting {name!r}; {hint}")
    return loaded


def resolve(args: argparse.Namespace) -> NiahConfig:
    """Defaults < file < command line.

    Raises:
        ValueError: a setting that is unknown, of the wrong type, or missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = {f.name: getattr(args, f.name, None) for f in fields(NiahConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    layers = [_read_file(args.config)] if getattr(args, "config", None) else []
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(NiahConfig), *layers, given))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"config: {error.full_key}: {reason}") from error
    for name in ("model", "out"):
        if not getattr(config, name):
            raise ValueError(f"{name}: missing; give --{name} DIR")
    return config


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 1 if a sample failed.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(args)
    from omegaconf import OmegaConf

    from .loading import load_model
    from .needles import find_task
    from .niah import run_niah
    from .results import write_bytes

    for task in config.tasks:
        find_task(task)
    model, tokenizer = load_model(config.model, config.dtype, config.device)
    content = run_niah(
        model,
        tokenizer,
        config.tasks,
        config.lengths,
        config.samples,
        config.seed,
        config.batch_size,
        config.out,
        new_tokens=config.new_tokens,
        budget=config.budget,
        step=config.step,
        resume=config.resume,
        save_prompts=config.save_prompts,
    )
    write_bytes(Path(config.out) / "config.yaml", OmegaConf.to_yaml(config).encode(), overwrite=True)
    return int(any(cell["errors"] for cell in content["cells"]))
