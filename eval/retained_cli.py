"""`lalte eval retained`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from .settings import ModelSettings, add_run_arguments, describe, keep, load, names, numbers, options, resolve

DESCRIPTION = """\
Reads the prompts of `lalte eval niah` and counts, for each attention layer and KV head, which tokens are still
retained when the question has been read: those of the needles' values, of the rest of needle sentences, and others.
Only tokens that have left the window count.
"""
EPILOG = """\
example:
  lalte eval retained --model runs/mine --tasks single_2,multikey_1 --lengths 1024 --out runs/retained

The folder of --out gets result.json (a count for each case, layer and head), table.md and config.yaml.
"""


@dataclass
class RetainedConfig(ModelSettings):
    """Settings of a run; see `retained.run_retained`."""

    tasks: list[str] = field(default_factory=lambda: ["single_1", "single_2", "single_3"])
    lengths: list[int] = field(default_factory=lambda: [1024, 2048])
    samples: int = 50
    seed: int = 42
    step: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval retained`."""
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--tasks", metavar="A,B", type=names, help="of `lalte eval niah`; default: single_1,single_2,single_3")
    add("--lengths", metavar="N,M", type=numbers, help="tokens; default: 1024,2048")
    add("--samples", metavar="N", type=int, help="for each task and length; default: 50")
    add("--seed", metavar="N", type=int, help="of the prompts; default: 42")
    add("--step", metavar="N", type=int, help="growth of the haystack in words or lines; default: RULER's")
    add_run_arguments(parser, batch=None)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs `lalte eval retained`.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(RetainedConfig, args)
    from .results import say
    from .retained import run_retained, table

    if config.retention not in (None, "lte"):
        raise ValueError(f"retention: {config.retention!r} has no scorer to look at; leave it out")
    model, tokenizer = load(config)
    content = run_retained(model, tokenizer, out_dir=config.out, **options(config, "retention"))
    keep(config)
    say(table(content["shares"]))
    return 0
