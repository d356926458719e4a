"""`lalte eval niah`: settings from defaults < file < command line. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from .settings import PromptSettings, add_prompt_arguments, describe, keep, load, names, numbers, options, resolve

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
  lalte eval niah --model checkpoints/lalte-tiny --lengths 256,512,1024 --tasks single_1 --samples 50 --out runs/niah
  lalte eval niah --model runs/mine --config configs/eval/niah.yaml --budget 0 --out runs/niah-without-retained

The folder of --out gets result.json, table.md, heatmap-<task>.png, samples/*.jsonl and config.yaml. A run that
was interrupted continues when the same command is given again.
"""


@dataclass
class NiahConfig(PromptSettings):
    """Settings of a run; see `niah.run_niah`."""

    tasks: list[str] = field(default_factory=lambda: ["single_1", "single_2", "single_3"])
    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    samples: int = 500
    seed: int = 42
    new_tokens: int = 128
    step: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options, description and examples to a parser."""
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--tasks", metavar="A,B", type=names, help="default: single_1,single_2,single_3")
    add("--lengths", metavar="N,M", type=numbers, help="tokens; default: 1024,2048,4096")
    add("--samples", metavar="N", type=int, help="for each task and length; default: 500, as RULER")
    add("--new-tokens", metavar="N", type=int, help="tokens generated at most; default: 128, as RULER")
    add("--step", metavar="N", type=int, help="growth of the haystack in words or lines; default: RULER's")
    add_prompt_arguments(parser, seed="of the prompts; default: 42")


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 1 if a sample failed.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(NiahConfig, args)
    from .needles import find_task
    from .niah import run_niah

    for task in config.tasks:
        find_task(task)
    model, tokenizer = load(config)
    content = run_niah(model, tokenizer, out_dir=config.out, **options(config))
    keep(config)
    return int(any(cell["errors"] for cell in content["cells"]))
