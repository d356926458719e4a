"""`lalte eval compare`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse

from .settings import describe

DESCRIPTION = """\
Joins result files into one table (Markdown and CSV) and figures (PNG and SVG): accuracy over length, heat maps,
perplexity over position, ms a token and bytes over length. Every accuracy has its 95 % interval; `best` names a
system only if its interval lies apart from all others.
"""
EPILOG = """\
examples:
  lalte eval compare runs/niah-lalte runs/niah-gdn --out runs/compared
  lalte eval compare lalte=runs/a/niah lalte=runs/a/perplexity gdn=runs/b/niah --out runs/compared

Systems are named after the runs' folders, or as NAME=DIR says; runs of one model may share a name. Only runs of one
evaluation and definition come into one table, and what else sets them apart is noted. Times of different runs, and
perplexities of different tokenizers, stand side by side without a winner.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval compare`."""
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("runs", metavar="[NAME=]DIR", nargs="+", help="folders of finished runs, or result files")
    add("--out", metavar="DIR", required=True, help="folder for table.md, table.csv and the figures")
    add("--overwrite", action="store_true", help="replace an earlier comparison there")


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: anything that the user can set right.
    """
    from .compare import compare, markdown
    from .results import say

    sections = compare(args.runs, args.out, overwrite=args.overwrite)
    print(markdown(sections))
    say(f"written to {args.out}: table.md, table.csv and figures")
    return 0
