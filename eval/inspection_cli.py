"""`lalte inspect`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Reads a text with a model and writes one HTML page, which needs no network. It shows the text with, for each attention
layer and KV head, the tokens that were sinks, retained, in the window or evicted at any position, their scores, how
many tokens each head kept, and attention maps.
"""
EPILOG = """\
examples:
  lalte inspect --model checkpoints/lalte-tiny --text book.txt --out page.html
  lalte inspect --model checkpoints/lalte-tiny --text book.txt --budget 64 --position 2000 --out page.html
  lalte inspect --model runs/mine --text book.txt --tokens 2048 --attention-maps figures --out page.html

Time and memory grow with the square of the tokens. The page's footer lists its keys.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options, description and examples to a parser."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="folder of the model and its tokenizer")
    add("--text", metavar="FILE", required=True, help="the text, in UTF-8")
    add("--out", metavar="FILE", required=True, help="the page, such as page.html")
    add("--tokens", metavar="N", type=int, default=8192, help="read the text's first N tokens; default: 8192")
    add("--position", metavar="N", type=int, help="the position shown first, from 0; default: the last token's")
    add("--budget", metavar="N", type=int, help="retained tokens per head (0: none); default: the model's own")
    add("--no-maps", action="store_true", help="leave the attention maps out, which take most of the time")
    add("--attention-maps", metavar="DIR", help="also draw the attention maps of each layer as a PNG there")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--device", metavar="NAME", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    add("--dtype", metavar="NAME", default="auto", help="auto (default: as saved), float32, bfloat16, float16")


def read_text(path: str) -> str:
    """A text file.

    Raises:
        ValueError: there is no such file, it is empty, or it is no text in UTF-8.
    """
    if not Path(path).is_file():
        raise ValueError(f"text: {path} is no file; give a text file in UTF-8")
    data = Path(path).read_bytes()
    from models.files import decode_text

    return decode_text(data, f"text: {path}")


def _check(args: argparse.Namespace) -> None:
    """What can be refused before any work is done."""
    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder; name a file in it, such as {out / 'page.html'}")
    if out.exists() and not args.overwrite:
        raise ValueError(f"out: {out} exists already; name another file, or give --overwrite")
    if args.tokens < 1:
        raise ValueError(f"tokens: {args.tokens} must be 1 or more")
    if args.position is not None and not 0 <= args.position < args.tokens:
        raise ValueError(f"position: {args.position} must lie from 0 to tokens - 1, which is {args.tokens - 1}")
    if args.no_maps and args.attention_maps:
        raise ValueError(
            f"attention-maps: {args.attention_maps} would stay empty with --no-maps; leave one of them out"
        )


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: anything that the user can set right.
    """
    _check(args)
    text = read_text(args.text)
    from models.loading import load

    from .inspection import inspect_text, split_text
    from .inspection_page import check_position, render, write_figures
    from .results import write_bytes

    model, tokenizer = load(args.model, args.device, args.dtype)
    check_position(args.position, len(split_text(tokenizer, text, args.tokens).ids))  # before the long part
    found = inspect_text(model, tokenizer, text, limit=args.tokens, budget=args.budget, maps=not args.no_maps)
    name = Path(args.model).resolve().name
    page = render(found, model=name, text=Path(args.text).name, position=args.position)
    write_bytes(args.out, page.encode(), overwrite=args.overwrite)
    if args.attention_maps:
        write_figures(found, args.attention_maps, overwrite=args.overwrite)
    read, total = len(found.tokens.ids), found.tokens.total
    cut = f" (the first of {total}; --tokens {total} reads all)" if read < total else ""
    print(f"{args.out}: {read} tokens{cut}, {len(found.layers)} attention layers of {found.heads} KV heads")
    return 0
