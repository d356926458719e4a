"""`lalte eval perplexity`. Imports nothing heavy, so that --help is quick."""

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
    names,
    options,
    resolve,
)

DESCRIPTION = """\
Reads text files as one text, in chunks, and reports perplexity, ms a token and cache bytes in buckets of positions:
64, 96, 128, 192, … tokens. Memory stays that of the cache and of one chunk.

Any causal model of transformers serves as a baseline: with a full cache (--cache full), up to --limit tokens, or
with the constant cache of StreamingLLM (--cache stream --sinks 4 --window 1020).
"""
EPILOG = """\
examples:
  lalte eval perplexity --model runs/mine --text books.txt.xz --tokens 1000000 --out runs/perplexity
  lalte eval perplexity --model other/llama --text books.txt.xz --limit 8192 --out runs/perplexity-llama
  lalte eval compare mine=runs/perplexity llama=runs/perplexity-llama --out runs/compared

The folder of --out gets result.json, table.md and config.yaml. The same command continues an interrupted run.
"""


@dataclass
class PerplexityConfig(CacheSettings):
    """Settings of a run; see `perplexity.run_perplexity`."""

    text: list[str] = field(default_factory=list)
    tokens: int = 1_000_000
    chunk: int = 512
    limit: int | None = None
    save_every: int = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval perplexity`."""
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--text", metavar="A,B", type=names, help="text files in UTF-8 (plain, .gz, .xz), read one after the other")
    add("--tokens", metavar="N", type=int, help="default: 1000000; fewer if the text ends before")
    add_cache_arguments(parser, 512)
    add("--limit", metavar="N", type=int, help="stop there; default: none, with a full cache the model's positions")
    add("--save-every", metavar="N", type=int, help="tokens between two saved states; default: 100000")
    add_run_arguments(parser, batch=None)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs `lalte eval perplexity`.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(PerplexityConfig, args, needed=("model", "out", "text"))
    from .perplexity import run_perplexity

    model, tokenizer = load(config)
    run_perplexity(model, tokenizer, config.text, config.out, **options(config, "text"))
    keep(config)
    return 0
