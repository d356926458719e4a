"""`lalte eval build`: data for `lalte eval evaporate`. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse

from .settings import describe, numbers

DESCRIPTION = """\
Writes a JSONL file for `lalte eval evaporate --data`.

  squad  from SQuAD JSON: a passage and a question. With --lengths, paragraphs of one article are packed together.
         --form sentence asks with the answer's sentence, up to the answer, instead of the question.
  swde   from pages (JSONL with doc_id, text) and pairs (JSONL with doc_id, key, value)
  fda    from a folder of .txt files and pairs, as JSONL or as JSON {file: {key: value}}; long reports need --chunk

All files may be compressed (.gz).
"""
EPILOG = """\
examples:
  lalte eval build squad --source dev-v1.1.json --lengths 512,1024 --tokenizer runs/mine --out squad.jsonl
  lalte eval build swde --pages pages.jsonl.gz --pairs pairs.jsonl.gz --samples 500 --out swde.jsonl
  lalte eval build fda --pages reports/ --pairs table.json --chunk 1920 --tokenizer runs/mine --out fda.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lalte eval build`."""
    describe(parser, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("task", metavar="TASK", choices=["squad", "swde", "fda"], help="squad, swde or fda")
    add("--source", metavar="FILE", help="squad: JSON of SQuAD 1.1 or 2.0")
    add("--form", metavar="NAME", help="squad: question (default) or sentence")
    add("--lengths", metavar="N,M", type=numbers, help="squad: pack to so many tokens, answer included")
    add("--pages", metavar="FILE|DIR", help="swde, fda: JSONL with doc_id and text, or a folder of .txt files")
    add("--pairs", metavar="FILE", help="swde, fda: JSONL with doc_id, key, value, or JSON {file: {key: value}}")
    add("--chunk", metavar="N", type=int, help="swde, fda: break pages into pieces of so many tokens")
    add("--tokenizer", metavar="DIR", help="measures --lengths and --chunk; the folder of a model will do")
    add("--samples", metavar="N", type=int, help="keep so many, drawn at random; default: all")
    add("--seed", metavar="N", type=int, default=0, help="of the drawing; default: 0")
    add("--out", metavar="FILE", required=True, help="JSONL to write; compressed if the name ends in .gz")
    add("--overwrite", action="store_true", help="replace the file")


def run_from_arguments(args: argparse.Namespace) -> int:
    """Runs `lalte eval build`.

    Raises:
        ValueError: anything that the user can set right.
    """
    from .evaporate_data import build_pairs, build_squad, write_documents
    from .loading import load_tokenizer
    from .results import say

    needs = ("source",) if args.task == "squad" else ("pages", "pairs")
    for name in needs:
        if getattr(args, name) is None:
            raise ValueError(f"{name}: missing; {args.task} is built from {' and '.join(f'--{n}' for n in needs)}")
    foreign = ("pages", "pairs", "chunk") if args.task == "squad" else ("source", "lengths", "form")
    for name in foreign:
        if getattr(args, name) is not None:
            raise ValueError(f"{name}: {args.task} has no use for it; leave --{name} out")
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    chosen = {"tokenizer": tokenizer, "samples": args.samples, "seed": args.seed}
    if args.task == "squad":
        documents = build_squad(args.source, form=args.form or "question", lengths=args.lengths, **chosen)
    else:
        documents = build_pairs(args.pages, args.pairs, chunk=args.chunk, **chosen)
    count = write_documents(args.out, documents, overwrite=args.overwrite)
    say(f"{args.out}: {count} documents; try: lalte eval evaporate --task {args.task} --data {args.out}")
    return 0
