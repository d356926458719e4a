"""`lalte eval streameval`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from .settings import (
    CacheSettings,
    add_cache_arguments,
    add_run_arguments,
    describe,
    keep,
    load,
    numbers,
    options,
    resolve,
)

DESCRIPTION = """\
Reads lines "line 7: REGISTER_CONTENT is <31415>" without end; every 10 lines it is asked for a line 20 (or any other
--distances) before. Accuracy against distance, over all streams. The right answer follows each question.
"""
EPILOG = """\
examples:
  lalte eval streameval --model runs/mine --distances 10,20,40,80,160 --out runs/streameval
  lalte eval streameval --model other/llama --cache stream --window 508 --distances 20,40 --out runs/streameval-llama
  lalte eval streameval --model small.gguf --cache stream --window 252 --retention h2o --budget 256 --out runs/h2o

The folder of --out gets result.json, table.md, samples/*.jsonl and config.yaml. The same command continues an
interrupted run with the streams that aren't finished.
"""


@dataclass
class StreamevalConfig(CacheSettings):
    """Settings of a run; see `streameval.run_streameval`."""

    distances: list[int] = field(default_factory=lambda: [20])
    lines: int = 1000
    every: int = 10
    streams: int = 8
    names: str = "numbers"
    seed: int = 0
    batch_size: int = 8
    system: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval streameval`."""
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--distances", metavar="N,M", type=numbers, help="lines between the asked line and the question; default: 20")
    add("--lines", metavar="N", type=int, help="of a stream; default: 1000")
    add("--every", metavar="N", type=int, help="lines between two questions; default: 10")
    add("--streams", metavar="N", type=int, help="for each distance; default: 8")
    add("--names", metavar="KIND", help="of the lines: numbers (default) or words")
    add("--seed", metavar="N", type=int, help="of the first stream; default: 0")
    add("--system", metavar="NAME", help="name in the result; default: the model's type")
    add_cache_arguments(parser, 256)
    add_run_arguments(parser, batch="streams read side by side; default: 8")


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs `lalte eval streameval`; the exit status is 1 if a stream failed.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(StreamevalConfig, args)
    from .streameval import run_streameval

    model, tokenizer = load(config)
    content = run_streameval(model, tokenizer, config.distances, config.out, **options(config, "distances"))
    keep(config)
    return int(any(cell["errors"] for cell in content["cells"]))
