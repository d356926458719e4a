"""`lalte eval answers`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .settings import ModelSettings, add_run_arguments, describe, keep, load, options, resolve

DESCRIPTION = """\
Makes new needle documents of a recipe, those of its last stage, and counts how many answers begin right and how many
of their tokens are right, each given the tokens before it. A model that answers these but not S-NIAH has learnt to
look up, but only in the wordings of its training.
"""
EPILOG = """\
examples:
  lalte eval answers --model runs/mine --out runs/mine-answers
  lalte eval answers --model runs/mine --budget 0 --out runs/mine-answers-0
  lalte eval answers --model runs/mine --change 'data.sources=[{path: held-out.txt}]' --out runs/mine-answers-new

The folder of --out gets result.json (shares by length, and counts of each kind), table.md and config.yaml.
"""


@dataclass
class AnswersConfig(ModelSettings):
    """Settings of a run; see `answers.run_answers`, and `training.held_out` for the documents."""

    recipe: str | None = None
    change: list[str] = field(default_factory=list)
    rows: int = 4
    seed: int = 0


def kept_recipe(model: str) -> Path:
    """The config.yaml of a run: in the model's folder, or above that of a checkpoint."""
    folder = Path(model).expanduser().resolve()
    return (folder.parent if folder.name.startswith("checkpoint-") else folder) / "config.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval answers`."""
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--recipe", metavar="FILE", help="configuration of `lalte train`; default: config.yaml in the run's folder")
    add(
        "--change",
        metavar="KEY=VALUE",
        action="append",
        help="to the recipe, as `lalte train` takes it; may be given more than once",
    )
    add("--rows", metavar="N", type=int, help="of each kind of document; default: 4")
    add("--seed", metavar="N", type=int, help="of the documents; default: 0")
    add_run_arguments(parser, batch=None)


def run_from_arguments(args: argparse.Namespace, make: Callable[..., Any]) -> int:
    """Runs `lalte eval answers`.

    Args:
        make: `training.held_out.HeldOutDocuments`; evaluations don't know the training.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(AnswersConfig, args)
    from .answers import run_answers
    from .reports import print_cases

    if config.retention not in (None, "lte"):
        raise ValueError(f"retention: {config.retention!r} needs a cache, and none is used here; leave it out")
    model, tokenizer = load(config)
    recipe = config.recipe or kept_recipe(config.model)
    documents = make(recipe, tokenizer, config.change, rows=config.rows, seed=config.seed)
    given = options(config, "retention", "recipe", "change", "rows", "seed")
    content = run_answers(model, tokenizer, documents, config.out, **given)
    keep(config)
    print_cases(content["rows"], "answers: accuracy [95 % interval]")
    return 0
