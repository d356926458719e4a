"""Models trained with and without a sink of their own, streamed over long texts (arXiv 2309.17453, table 3)."""

from __future__ import annotations

import argparse
import math
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench, add_common_arguments, path_identity
from eval.intervals import Moments
from eval.streaming import chunks, text_tokens, texts_identity
from models import HybridForCausalLM
from models.config import load_config
from models.loading import load_tokenizer

DESCRIPTION = """\
Reads long texts with models that attended to everything while they were trained, through a cache of fixed size that
splits into first tokens (sinks) and newest ones, and reports the perplexity of the tokens that come when the cache is
full. A trained sink token counts as the first one: with 0 sinks it is evicted like any other. Positions are places in
the cache. Each model is a folder of `lalte train` and a name for it.
"""
EPILOG = """\
examples:
  lalte bench sinks --model none=runs/sinks/none --model zero=runs/sinks/zero --text book.txt
  lalte bench sinks --model learnable=runs/sinks/learnable --text book.txt --cache 256 --length 4096
"""
CHUNK = 256  # tokens read at once
SINKS = (0, 1, 2, 4)
NORMAL = 1.96  # of a 95 % interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte bench sinks`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("--model", metavar="NAME=DIR", action="append", required=True, help="a trained model; may be repeated")
    add("--text", metavar="FILE", nargs="+", required=True, help="text files, plain, .gz or .xz")
    add("--cache", metavar="N", type=int, default=256, help="slots of the cache, sinks included; default: 256")
    add("--length", metavar="T", type=int, default=4096, help="tokens of each piece of text; default: 4096")
    add("--pieces", metavar="N", type=int, default=32, help="pieces, read side by side; default: 32")
    add_common_arguments(parser)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    models = dict(_named(text) for text in args.model)
    if len(models) < len(args.model):
        raise ValueError("--model has one name twice; give each folder a name of its own")
    if args.cache <= max(SINKS) or args.length <= args.cache + 1:
        raise ValueError(
            f"--cache {args.cache} and --length {args.length}: a cache holds more than {max(SINKS)} tokens, and a "
            "piece of text more than the cache"
        )
    settings = {"cache": args.cache, "length": args.length, "pieces": args.pieces, "text": texts_identity(args.text)}
    identities = {name: path_identity(folder) for name, folder in sorted(models.items())}
    bench = Bench("sinks", args, {**settings, "models": identities})
    for sinks in SINKS:
        case = f"cache {sinks}+{args.cache - sinks}"
        bench.add_case(
            case, {name: partial(measure_system, bench, case, name, folder, sinks) for name, folder in models.items()}
        )
    return bench.run()


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ValueError(f"--model {text} must be a name and a folder, such as none=runs/sinks/none")
    return name, Path(folder)


def measure_system(bench: Bench, case: str, name: str, folder: Path, sinks: int) -> None:
    """Perplexity of one model under one split of the cache."""
    args = bench.args
    model = streaming_model(folder, args.cache, sinks).to(bench.device).eval()
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    pieces = list(islice(chunks(text_tokens(args.text, tokenizer), args.length), args.pieces))
    if len(pieces[-1]) < args.length:
        raise ValueError(f"--text holds fewer than {args.pieces} pieces of {args.length} tokens; give more text")
    ids_BT = torch.tensor(pieces, device=bench.device)
    moments = Moments()
    moments.add(losses(model, ids_BT, args.cache).mean(1))
    spread = NORMAL * moments.error if len(pieces) > 1 else 0.0
    low, median, high = (math.exp(min(moments.mean + side * spread, 700.0)) for side in (-1, 0, 1))
    bench.add(case, name, "perplexity", median, low, high, len(pieces) * (args.length - args.cache))
    bench.note(case, name, sink_token=model.config.sink_token, softmax_off_by_one=model.config.softmax_off_by_one)


def streaming_model(folder: Path, cache: int, sinks: int) -> HybridForCausalLM:
    """The model with a cache of so many slots, the first `sinks` of them for sinks, in place of all tokens.

    Raises:
        ValueError: it was trained with a window already, or has other layers than attention.
    """
    trained = load_config(folder)
    if set(trained.layer_types) != {"attention"} or trained.window is not None:
        raise ValueError(f"{folder} is no model of full attention; train one with window null")
    # a configuration keeps a trained sink by at least one slot; that it is evicted is measured below
    kept = max(sinks, 1) if trained.sink_token == "learnable" else sinks
    changes: dict[str, Any] = {"window": cache - sinks, "sinks": kept, "position_encoding": "rope_in_cache"}
    model = HybridForCausalLM.from_pretrained(folder, config=load_config(folder, changes), local_files_only=True)
    for layer in model.model.layers:
        layer.mixer.sinks = sinks
    return model


@torch.no_grad()
def losses(model: HybridForCausalLM, ids_BT: Tensor, skip: int) -> Tensor:
    """Negative log-likelihood in nats of each token from `skip` on [B, T - skip], read as a stream."""
    cache = model.new_cache(len(ids_BT))
    found, last_BV = [], None
    for piece_BT in ids_BT.split(CHUNK, 1):
        logits_BTV = model(piece_BT, past_key_values=cache).logits.float()
        before = logits_BTV[:, :-1] if last_BV is None else torch.cat([last_BV[:, None], logits_BTV[:, :-1]], 1)
        targets_BT = piece_BT if last_BV is not None else piece_BT[:, 1:]
        found.append(F.cross_entropy(before.transpose(1, 2), targets_BT, reduction="none"))
        last_BV = logits_BTV[:, -1]
    return torch.cat(found, 1)[:, skip - 1 :]
