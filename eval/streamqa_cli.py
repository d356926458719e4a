"""`lalte eval streamqa`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from .settings import (
    StreamSettings,
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
Reads multiple-choice questions (ARC) one after the other in one stream, each followed by its right answer, and counts
how often the model would have written exactly that answer. Systems: dense (the whole stream in the cache), window,
streaming (sinks and a window), one-shot (each question in a fresh cache, after one example); a model of this project
has its own cache instead of the first three.
"""
EPILOG = """\
examples:
  lalte eval streamqa --model other/chat --task arc_easy --out runs/streamqa
  lalte eval streamqa --model small.gguf --data arc.jsonl --samples 200 --systems window,streaming --out runs/qa

--data is a file of JSON lines (or one JSON list, also .gz) with question, choices and gold (number of the right one,
from 0), or the form of the hub's allenai/ai2_arc. The folder of --out gets result.json, table.md, samples/*.jsonl and
config.yaml. The same command continues an interrupted run with the streams that aren't finished.
"""


@dataclass
class StreamqaConfig(StreamSettings):
    """Settings of a run; see `streamqa.run_streamqa`."""

    task: str = "arc_easy"
    data: str | None = None
    systems: list[str] | None = None
    samples: int | None = None
    answers: str = "letter"
    chat: bool | None = None
    streams: int = 1
    seed: int = 0
    batch_size: int = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval streamqa`."""
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--task", metavar="NAME", help="arc_easy (default) or arc_challenge")
    add("--data", metavar="FILE", help="questions; or a data set of the hub, by default allenai/ai2_arc")
    add(
        "--systems", metavar="A,B", type=names, help="of own, dense, window, streaming, one-shot; default: all it can"
    )
    add("--samples", metavar="N", type=int, help="questions, drawn at random; default: all")
    add("--answers", metavar="KIND", help="letter (default) or text of the right choice")
    flag = argparse.BooleanOptionalAction
    add("--chat", action=flag, default=None, help="turns of the chat template; default: if there is one")
    add("--streams", metavar="N", type=int, help="that the questions are dealt out to; default: 1")
    add("--seed", metavar="N", type=int, help="of the questions drawn; default: 0")
    add_cache_arguments(parser, 256, kinds=False)
    add_run_arguments(parser, batch="streams read side by side; default: 8")


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs `lalte eval streamqa`; the exit status is 1 if a stream failed.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(StreamqaConfig, args)
    from .choices import read_questions
    from .reports import print_cases
    from .streamqa import run_streamqa

    questions, source = read_questions(config.task, config.data)
    model, tokenizer = load(config)
    content = run_streamqa(model, tokenizer, questions, config.out, source=source, **options(config, "data"))
    keep(config)
    for system in content["config"]["systems"]:
        print_cases((row for row in content["rows"] if row["system"] == system), f"{system} [95 % interval]")
    return int(any(cell["errors"] for cell in content["cells"]))
