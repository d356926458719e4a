"""`lalte generate`: a text continued in the terminal. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from models.options import add_retention_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte generate`."""
    parser.description = (
        "Continues a text and prints what the model writes as it arises, at constant memory unless the model's\n"
        "cache grows (see `lalte info`). A session file keeps what the model has read and written: the next call\n"
        "with it continues there, however long the text is."
    )
    parser.epilog = (
        "examples:\n"
        '  lalte generate --model checkpoints/lalte-tiny --prompt "Once upon a time" --temperature 0.8\n'
        "  lalte generate --model checkpoints/lalte-tiny --prompt-file book.txt --max-new-tokens 500\n"
        "  cat book.txt | lalte generate --model checkpoints/lalte-tiny -\n"
        "  lalte generate --model checkpoints/lalte-tiny --prompt-file book.txt --session book.session "
        "--max-new-tokens 0\n"
        '  lalte generate --model checkpoints/lalte-tiny --session book.session --prompt "What was the number?"\n'
        "  lalte generate --model checkpoints/lalte-tiny --prompt-file book.txt --retention h2o --budget 64\n"
        "Ctrl-C ends the text; the session is kept."
    )
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


def run_from_arguments(args: argparse.Namespace) -> int:
    """Write the continuation; the exit status."""
    prompt = _read_prompt(args)
    if args.max_new_tokens < -1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} must be 0 or more, or -1 for no limit")
    session = Path(args.session) if args.session else None
    if session is not None:
        _check_session(session)
    from models import terminal
    from models.generation import Sampling
    from models.loading import load

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
