"""The public face: `import lalte` registers the models with transformers' Auto classes; `load` loads one; `stream`
gives a pretrained model of another kind a cache of fixed size; `RetentionCallback` goes into a Trainer of
transformers; `main` is the command `lalte`.

    import lalte
    model, tokenizer = lalte.load("checkpoints/lalte-tiny")

Everything heavy is imported where it is used, so that the command's --help appears at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Language models that stay cheap at any length and still remember: Gated DeltaNet layers and sparse attention with
learned token eviction (arXiv 2510.20787).
"""
EPILOG = """\
examples:
  lalte train configs/train/tiny.yaml                    train a small model; its folder is runs/tiny
  lalte eval niah --model checkpoints/lalte-tiny --out runs/niah --lengths 512,1024
  lalte generate --model checkpoints/lalte-tiny --prompt "Once upon a time" --max-new-tokens 100
  lalte info configs/models/lalte-0.4b.json              parameters and cache bytes

`lalte COMMAND --help` explains a command. DIR is always the folder of a trained model and its tokenizer.
"""
# names that are imported when they are first asked for, and where they come from
LAZY = {"RetentionCallback": "training.callbacks"}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})


def load(folder: str | Path, device: Any = "auto", dtype: Any = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, ready for evaluation; see `models.loading.load`."""
    from models.loading import load

    return load(folder, device, dtype)


def stream(model: Any, sinks: int = 4, window: int = 1020, budget: int = 0, retention: str | None = None) -> Any:
    """A cache that lets a pretrained transformers model stream at constant memory; see `models.streaming.stream`."""
    from models.streaming import stream

    return stream(model, sinks, window, budget, retention)


# ---- lalte train ----


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains a model as a YAML file says. The run's folder gets the model, its tokenizer, checkpoints,\n"
        "log.jsonl, TensorBoard files and config.yaml, the configuration in full. The same command continues an\n"
        "interrupted run."
    )
    parser.epilog = (
        "examples:\n"
        "  lalte train configs/train/tiny.yaml\n"
        "  lalte train configs/train/tiny.yaml --show      every setting; docs/training.md names their explanations\n"
        "  lalte train configs/train/tiny.yaml steps=200 optimizer.lr=3e-4 output=runs/second\n"
        "  torchrun --nproc_per_node 8 -m lalte train configs/train/tiny.yaml precision=bf16"
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as one of configs/train")
    parser.add_argument("changes", metavar="key=value", nargs="*", help="replaces a setting of the file")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--tokenise", action="store_true", help="only put the text into data.cache_dir, and stop")
    only.add_argument("--show", action="store_true", help="only print the configuration in full, as YAML, and stop")


def _train(args: argparse.Namespace) -> int:
    from training.config import as_yaml, load_config

    config = load_config(args.config, args.changes)
    if args.show:
        print(as_yaml(config), end="")
        return 0
    if args.tokenise:
        from training.setup import tokenise

        for name, tokens in tokenise(config).items():
            print(f"{name}: {tokens} tokens in the cache")
        return 0
    from training.stopping import Stopped
    from training.trainer import train

    first = int(os.environ.get("RANK", 0)) == 0
    try:
        folder = train(config)
    except Stopped as stopped:
        if first:
            print(f"lalte: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    if first:
        print(f"the model is in {folder}; try: lalte generate --model {folder} --prompt …")
    return 0


# ---- lalte eval ----


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measures a trained model. Each evaluation has a --help of its own."
    parser.epilog = "example:\n  lalte eval niah --model checkpoints/lalte-tiny --lengths 512,1024 --out runs/niah"
    _add_commands(parser, EVALUATIONS, "EVALUATION")


def _answers_arguments(parser: argparse.ArgumentParser) -> None:
    from eval.answers_cli import add_arguments

    add_arguments(parser)


def _answers(args: argparse.Namespace) -> int:
    from eval.answers_cli import run_from_arguments

    def make(*given: Any, **options: Any) -> Any:  # what is missing shows before anything heavy is imported
        from training.held_out import HeldOutDocuments

        return HeldOutDocuments(*given, **options)

    return run_from_arguments(args, make)


# ---- lalte bench ----


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures ours and others in one run, and writes the times as JSON. Each has a --help of its own."
    )
    parser.epilog = "example:\n  lalte bench attention --quick"
    _add_commands(parser, BENCHMARKS, "BENCHMARK")


# ---- lalte info ----


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Parameters of a model by part, its rule, the bytes of its cache, and what a token costs. Nothing is\n"
        "loaded or allocated. Operations are those of matrix products; docs/mixers.md has the formulas."
    )
    parser.epilog = (
        "examples:\n"
        "  lalte info configs/models/lalte-0.4b.json\n"
        "  lalte info checkpoints/lalte-tiny --batch 8 --dtype float32\n"
        "  lalte info configs/models/lalte-1.4b.json --length 65536 --json"
    )
    parser.add_argument("config", metavar="CONFIG|DIR", help="a model configuration (JSON), or a model's folder")
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="sequences of the cache; default: 1")
    parser.add_argument("--dtype", metavar="NAME", default="bfloat16", help="of the cache; default: bfloat16")
    parser.add_argument("--length", metavar="N", type=int, help="tokens of a text; default: those trained on")
    parser.add_argument("--json", action="store_true", help="everything as JSON, for programs")


def _info(args: argparse.Namespace) -> int:
    from models.config import load_config
    from models.info import as_json, render
    from models.loading import DTYPES

    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype} is unknown; use {', '.join(DTYPES)}")
    show = as_json if args.json else render
    print(show(load_config(args.config), args.batch, DTYPES[args.dtype], args.length))
    return 0


# ---- the command ----


@dataclass(frozen=True)
class Command:
    """A command: a line of help, what adds its arguments, and what runs it and returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int] | None = None


def _command_of(module: str, help: str, prefix: str = "") -> Command:
    """The command of a module with functions `add_arguments` and `run_from_arguments`, loaded when it is asked for.

    Args:
        prefix: of the functions' middle, where a module serves two commands: `import` has `add_import_arguments` and
            `import_from_arguments`.
    """
    add, run = (
        (f"add_{prefix}_arguments", f"{prefix}_from_arguments") if prefix else ("add_arguments", "run_from_arguments")
    )
    return Command(
        help,
        lambda parser: getattr(importlib.import_module(module), add)(parser),
        lambda args: getattr(importlib.import_module(module), run)(args),
    )


EVALUATIONS = {
    "niah": _command_of("eval.niah_cli", "needles in haystacks: does the model find a sentence far back?"),
    "evaporate": _command_of("eval.evaporate_cli", "does the model find a value in a document (FDA, SWDE, SQuAD)?"),
    "build": _command_of("eval.build_cli", "make the data of `evaporate` from raw files"),
    "lm": _command_of("eval.harness_cli", "tasks of lm-evaluation-harness, such as arc_easy"),
    "perplexity": _command_of("eval.perplexity_cli", "perplexity of an endless text, over the position in it"),
    "streameval": _command_of("eval.streameval_cli", "an endless record: is a line from before still known?"),
    "streamqa": _command_of("eval.streamqa_cli", "an endless row of questions: are they answered right?"),
    "retained": _command_of("eval.retained_cli", "what the scorer keeps: the share of needle tokens retained"),
    "answers": Command(
        "needle documents like those of the training: are they answered?", _answers_arguments, _answers
    ),
    "compare": _command_of("eval.compare_cli", "join the results of several runs into one table and figures"),
}
BENCHMARKS = {
    "attention": _command_of("benchmarks.attention", "the attention op, forward and backward, beside its peers"),
    "train": _command_of("benchmarks.train", "training steps of models of equal size"),
    "scaling": _command_of("benchmarks.scaling", "training on one device and on several"),
    "cost": _command_of("benchmarks.cost", "GPU hours of the recipes, from what was measured"),
    "prefill": _command_of("benchmarks.prefill", "prompts of growing length"),
    "decode": _command_of("benchmarks.decode", "milliseconds a token, after texts of growing length"),
    "coldstart": _command_of("benchmarks.coldstart", "from an empty kernel cache to the first training step"),
    "sinks": _command_of("benchmarks.sinks", "models trained with and without a sink of their own, streamed"),
    "streaming": _command_of("benchmarks.streaming", "StreamingLLM caches on a pretrained model, beside its peers"),
}
COMMANDS = {
    "train": Command("train a model from a YAML file", _train_arguments, _train),
    "eval": Command("measure a trained model", _eval_arguments),
    "generate": _command_of("models.generation_cli", "continue a text"),
    "inspect": _command_of("eval.inspection_cli", "a page that shows which tokens of a text each head kept"),
    "info": Command("parameters and cache bytes of a model", _info_arguments, _info),
    "import": _command_of("models.conversion_cli", "convert a checkpoint of another project into ours", "import"),
    "export": _command_of("models.conversion_cli", "convert a model of ours for another project", "export"),
    "bench": Command("measure speed and memory side by side", _bench_arguments),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose command adds its arguments when it is chosen, so that nothing else is imported."""

    command: Command | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.command is not None:
            command, self.command = self.command, None
            command.add_arguments(self)
        found, rest = super().parse_known_args(args, namespace)
        if "changes" in found:  # argparse leaves over those that follow an option
            found.changes = [*found.changes, *(word for word in rest if not word.startswith("-"))]
            rest = [word for word in rest if word.startswith("-")]
        return found, rest


def _add_commands(parser: argparse.ArgumentParser, commands: dict[str, Command], name: str) -> None:
    places = parser.add_subparsers(title=name.lower() + "s", metavar=name, required=True, parser_class=_Parser)
    for word, command in commands.items():
        formatter = argparse.RawDescriptionHelpFormatter
        child = places.add_parser(word, help=command.help, formatter_class=formatter, allow_abbrev=False)
        # the default is the outermost parser's: one of an inner command would replace what was given to an outer one
        child.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error arose"
        )
        child.command = command
        if command.run is not None:
            child.set_defaults(run=command.run)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="lalte",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(debug=False)
    _add_commands(parser, COMMANDS, "COMMAND")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 2 for an error of the user's, 130 after Ctrl-C.

    A training that was told to stop by a signal ends with 128 and the signal's number, behind a checkpoint.
    """
    args = build_parser().parse_args(argv)
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # whoever read our output has enough; what is buffered can't be written any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RuntimeError):
            text += " (--debug shows where)"
        print(f"lalte: error: {text}", file=sys.stderr)
        return 2


def _is_command() -> bool:
    """Whether this process is the console command `lalte`."""
    return Path(sys.argv[0]).stem == "lalte" if sys.argv else False


if __name__ == "__main__":
    sys.exit(main())
if not _is_command():
    import models.auto  # noqa: F401 - registers the models; the command does so when it needs them
