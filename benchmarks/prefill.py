"""Reading of prompts by whole models: tokens a second, and memory that doesn't grow."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from benchmarks.decode import numbers
from benchmarks.harness import Bench, add_common_arguments, build_model, model_config
from benchmarks.serving import SYSTEMS, check, quick_changes
from benchmarks.timing import measure, peak_bytes
from models.generation import prefill

DESCRIPTION = """\
Times the reading of a prompt into a new cache, in chunks, and counts the most bytes allocated at a time beyond the
weights, cache included. Models with full attention take quadratic time: they stop at --full-limit.
"""
EPILOG = """\
examples:
  lalte bench prefill
  lalte bench prefill --lengths 4096,1048576 --systems lalte,gdn
  lalte bench prefill --quick --device cpu --out prefill.json
"""
LONG = 131072


def time_system(bench: Bench, case: str, system: str, config: Any, batch: int, length: int) -> None:
    """Check, build, time."""
    if config.window is None and "attention" in config.layer_types and length > bench.args.full_limit:
        raise ValueError(f"left out: full attention over {length} tokens; --full-limit {length} takes it in")
    check(system, bench.device)
    cuda = bench.device.type == "cuda"
    model = build_model(config, bench.device, torch.bfloat16 if cuda else torch.float32).eval()
    sets = [torch.randint(config.vocab_size, (batch, length), device=bench.device) for _ in range(2)]
    # compile and tune on a prompt of two chunks and an odd rest
    prefill(model, sets[0][:, : 2 * model.model.prefill_chunk(batch) + 1], model.new_cache(batch))

    def run(i: int) -> None:
        prefill(model, sets[i % 2], model.new_cache(batch))

    with peak_bytes(bench.device) as peak:
        long = length > LONG
        timing = measure(
            run, bench.device, seconds=bench.args.seconds, warmup=0 if long else 1, least=2 if long else 3, most=50
        )
        bench.add_bytes(case, system, peak())
    bench.add_timing(case, system, timing, tokens=batch * length)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte bench prefill`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("--config", metavar="SIZE", default="1.4b", help="0.4b, 1.4b (default) or tiny")
    add("--batch", metavar="B", type=int, default=1, help="rows; default: 1")
    add(
        "--lengths",
        metavar="T,T",
        default="4096,16384,65536,262144,1048576",
        help="tokens of the prompt; default: 4096,16384,65536,262144,1048576",
    )
    add(
        "--full-limit", metavar="T", type=int, default=65536, help="longest prompt for full attention; default: 65536"
    )
    add_common_arguments(parser)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    size, lengths = args.config, numbers(args.lengths, "--lengths")
    if args.quick:
        size, lengths = "tiny", [60, 333]
    bench = Bench("prefill" if size == "1.4b" else f"prefill-{size}", args, {"size": size})
    for length in lengths:
        case = f"prefill {size} B{args.batch} T{length}"
        runs = {}
        for system in SYSTEMS:
            config = model_config(system, size, **(quick_changes(system) if args.quick else {}))
            runs[system] = partial(time_system, bench, case, system, config, args.batch, length)
        bench.add_case(case, runs)
    return bench.run()
