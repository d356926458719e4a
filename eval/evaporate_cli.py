"""`lalte eval evaporate`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from .settings import PromptSettings, add_prompt_arguments, describe, keep, load, numbers, options, resolve

DESCRIPTION = """\
The model reads a document that ends with the name of something in it, such as "Publisher:", and writes the value.
Accuracy is the share of answers (one line, at most 48 tokens) that contain the value.

tasks:
  fda     reports of the FDA, semi-structured
  swde    web pages, semi-structured
  squad   Wikipedia passages, the end is a question or a sentence to complete

With --lengths the documents are cut to windows around the value, of so many tokens with the answer. Without, they
are read whole, as lm-evaluation-harness does. Data that were packed to lengths by `lalte eval build` aren't cut.
"""
EPILOG = """\
examples:
  lalte eval evaporate --model runs/mine --task fda --lengths 512,1024,2048,4096 --out runs/fda
  lalte eval evaporate --model runs/mine --task swde --data swde.jsonl --twice --out runs/swde-twice

The data sets of the hub are read where --data isn't given. The folder of --out gets result.json, table.md,
samples/*.jsonl, config.yaml and, with lengths, a heat map. The same command continues an interrupted run.
"""


@dataclass
class EvaporateConfig(PromptSettings):
    """Settings of a run; see `evaporate.run_evaporate`."""

    task: str | None = None
    data: str | None = None
    lengths: list[int] = field(default_factory=list)
    twice: bool = False
    scoring: str = "v1"
    samples: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval evaporate`."""
    describe(parser, DESCRIPTION, EPILOG)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--task", metavar="NAME", help="fda, swde or squad")
    add("--data", metavar="FILE|NAME", help="JSONL (text, key, value), or a data set of the hub; default: the task's")
    add("--lengths", metavar="N,M", type=numbers, help="tokens of document and answer; default: whole documents")
    add("--twice", action=flag, default=None, help="the text is read two times, after what is asked")
    add("--scoring", metavar="V", help="v1 (default) strips text and value, v0 doesn't; of the harness's tasks")
    add("--samples", metavar="N", type=int, help="documents, drawn at random; default: all")
    add_prompt_arguments(parser)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs `lalte eval evaporate`; the exit status is 1 if a sample failed.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(EvaporateConfig, args, needed=("model", "out", "task"))
    from .evaporate import run_evaporate
    from .evaporate_data import check_task
    from .evaporate_prompts import SCORINGS

    check_task(config.task)
    if config.scoring not in SCORINGS:
        raise ValueError(f"scoring: {config.scoring!r} is unknown; use one of {', '.join(SCORINGS)}")
    model, tokenizer = load(config)
    content = run_evaporate(model, tokenizer, out_dir=config.out, **options(config))
    keep(config)
    return int(any(cell["errors"] for cell in content["cells"]))
