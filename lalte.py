"""The public face: `import lalte` registers the models with transformers' Auto classes; `load` loads one; `stream`
gives a pretrained model of another kind a cache of fixed size; `main` is the command `lalte`.

    import lalte
    model, tokenizer = lalte.load("runs/quickstart")

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
  lalte train configs/train/quickstart.yaml              train a model; its folder is runs/quickstart
  lalte eval niah --model runs/quickstart --out runs/niah --lengths 512,1024
  lalte generate --model runs/quickstart --prompt "Once upon a time" --max-new-tokens 100
  lalte info configs/models/lalte-0.4b.json              parameters and cache bytes

`lalte COMMAND --help` explains a command. DIR is always the folder of a trained model and its tokenizer.
"""


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
        "  lalte train configs/train/tiny.yaml steps=200 optimizer.lr=3e-4 output=runs/second\n"
        "  torchrun --nproc_per_node 8 -m lalte train configs/train/tiny.yaml precision=bf16"
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as one of configs/train")
    parser.add_argument("changes", metavar="key=value", nargs="*", help="replaces a setting of the file")
    parser.add_argument("--tokenise", action="store_true", help="only put the text into data.cache_dir, and stop")


def _train(args: argparse.Namespace) -> int:
    from training.config import load_config

    if args.tokenise:
        from training.setup import tokenise

        for name, tokens in tokenise(load_config(args.config, args.changes)).items():
            print(f"{name}: {tokens} tokens in the cache")
        return 0
    from training.trainer import train

    folder = train(load_config(args.config, args.changes))
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"the model is in {folder}; try: lalte generate --model {folder} --prompt …")
    return 0


# ---- lalte eval ----


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measures a trained model. Each evaluation has a --help of its own."
    parser.epilog = "example:\n  lalte eval niah --model runs/quickstart --lengths 512,1024 --out runs/niah"
    _add_commands(parser, EVALUATIONS, "EVALUATION")


# ---- lalte bench ----


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures ours and others in one run, and writes the times as JSON. Each has a --help of its own."
    )
    parser.epilog = "example:\n  lalte bench attention --quick"
    _add_commands(parser, BENCHMARKS, "BENCHMARK")


# ---- lalte generate ----


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Continues a text and prints what the model writes as it arises, at constant memory. A session file keeps\n"
        "what the model has read and written: the next call with it continues there, however long the text is."
    )
    parser.epilog = (
        "examples:\n"
        '  lalte generate --model runs/quickstart --prompt "Once upon a time" --temperature 0.8\n'
        "  lalte generate --model runs/quickstart --prompt-file book.txt --max-new-tokens 500\n"
        "  cat book.txt | lalte generate --model runs/quickstart -\n"
        "  lalte generate --model runs/quickstart --prompt-file book.txt --session book.session --max-new-tokens 0\n"
        '  lalte generate --model runs/quickstart --session book.session --prompt "What was the number?"\n'
        "  lalte generate --model runs/quickstart --prompt-file book.txt --retention h2o --budget 64\n"
        "Ctrl-C ends the text; the session is kept."
    )
    from eval.settings import add_retention_arguments

    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="folder of the model and its tokenizer")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="a file with it, in UTF-8; - is the standard input")
    source.add_argument("stdin", metavar="-", nargs="?", choices=["-"], help="the same as --prompt-file -")
    add("--session", metavar="FILE", help="continue this session if the file exists; write it at the end")
    add("--max-new-tokens", metavar="N", type=int, default=256, help="default: 256; -1: no limit; 0: only read")
    add("--ignore-end", action="store_true", help="write on after an end-of-text token")
    add("--temperature", metavar="X", type=float, default=0.0, help="default: 0, always the likeliest token")
    add("--top-k", metavar="N", type=int, help="draw from the N likeliest tokens")
    add("--top-p", metavar="X", type=float, help="draw from the likeliest tokens of total probability X")
    add("--seed", metavar="N", type=int, default=0, help="of the draws; default: 0")
    add_retention_arguments(parser)
    add("--device", metavar="NAME", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    add("--dtype", metavar="NAME", default="auto", help="auto (default: as saved), float32, bfloat16, float16")


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt of a call, empty if there is none.

    Raises:
        ValueError: missing, empty, or no text in UTF-8.
    """
    if args.prompt is not None:
        name, data = "--prompt", os.fsencode(args.prompt)
    elif args.stdin or args.prompt_file == "-":
        name, data = "the standard input", sys.stdin.buffer.read()
    elif args.prompt_file is not None:
        name = args.prompt_file
        if not Path(name).is_file():
            raise ValueError(f"--prompt-file {name} is no file; give a text file, or - for the standard input")
        data = Path(name).read_bytes()
    elif args.session and Path(args.session).exists():
        return ""
    else:
        raise ValueError("there is nothing to continue; give --prompt, --prompt-file or an existing --session")
    from models.files import decode_text

    return decode_text(data, name)


def _check_session(path: Path) -> None:
    """Raises ValueError where a session can't be written, before any work is done for it."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--session {path} can't be written; name a file in a folder that exists and is yours")


def _generate(args: argparse.Namespace) -> int:
    prompt = _read_prompt(args)
    if args.max_new_tokens < -1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} must be 0 or more, or -1 for no limit")
    session = Path(args.session) if args.session else None
    if session is not None:
        _check_session(session)
    from models import terminal
    from models.generation import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    _quiet()
    model, tokenizer = load(args.model, args.device, args.dtype)
    model.use_retention(args.retention, args.budget)
    return terminal.run(
        model,
        tokenizer,
        prompt,
        session=session,
        max_new_tokens=None if args.max_new_tokens < 0 else args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
        ignore_end=args.ignore_end,
    )


def _quiet() -> None:
    """No progress bars nor notes of transformers between the prompt and its continuation."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


# ---- lalte info ----


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Parameters of a model by part, its rule, the bytes of its cache, and what a token costs. Nothing is\n"
        "loaded or allocated. Operations are those of matrix products; docs/mixers.md has the formulas."
    )
    parser.epilog = (
        "examples:\n"
        "  lalte info configs/models/lalte-0.4b.json\n"
        "  lalte info runs/quickstart --batch 8 --dtype float32\n"
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
    "generate": Command("continue a text, at constant memory", _generate_arguments, _generate),
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
        return super().parse_known_args(args, namespace)


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
    """Run the command line; the exit status is 2 for an error of the user's, 130 after Ctrl-C."""
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
    import models  # noqa: F401 - registers the models; the command does so when it needs them
