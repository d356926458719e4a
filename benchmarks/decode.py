"""Decoding of whole models: time a token after short and long texts, alone and in a batch."""

from __future__ import annotations

import argparse
import time
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Bench, add_common_arguments, build_model, model_config
from benchmarks.serving import SYSTEMS, check, fill, quick_changes
from benchmarks.timing import Timing, copy_bandwidth, peak_bytes, quantile, synchronize
from models.cache import HybridCache
from models.generation import decode

DESCRIPTION = """\
Times greedy decoding token by token, from device event to device event. Caches aren't read in: they are filled with
random keys and values as if so many tokens had been seen (noted in the result as "filled"), which costs a step
exactly what a text would. Besides the median there are the 99th percentile (cases ending in p99), tokens a second
over the batch, the cache's bytes, and in the notes the bytes a step must read (weights and cache once) and the share
of the measured copy bandwidth that this is.
"""
EPILOG = """\
examples:
  lalte bench decode
  lalte bench decode --batches 1 --lengths 1024,16384,1048576 --systems lalte,transformer
  lalte bench decode --quick --device cpu --out decode.json
"""


def time_tokens(model: nn.Module, cache: HybridCache, batch: int, count: int, warmup: int) -> Timing:
    """Milliseconds between one token and the next."""
    device = model.device
    cuda = device.type == "cuda"
    logits = torch.randn(batch, model.config.vocab_size, device=device)
    stamps: list[Any] = []
    for _ in decode(model, logits, cache, warmup + count + 1):
        if cuda:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = 1e3 * time.perf_counter()
        stamps.append(stamp)
    synchronize(device)
    return Timing.of([a.elapsed_time(b) if cuda else b - a for a, b in pairwise(stamps[warmup:])])


def _obstacle(model: nn.Module, cache: HybridCache) -> str | None:
    """Why steps aren't replayed as a CUDA graph; None if they are."""
    if model.device.type != "cuda":
        return "no CUDA device"
    from models.decode_step import obstacle

    return obstacle(model, cache)


def bytes_of_step(model: nn.Module, cache: HybridCache) -> int:
    """Bytes that a step reads at least: every weight but unused rows of an embedding of its own, and the cache."""
    weights = sum(p.nbytes for p in model.parameters())  # tied ones once
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    return weights + cache.nbytes


def time_system(
    bench: Bench, case: str, system: str, config: Any, batch: int, length: int, bandwidth: float | None
) -> None:
    """Check, build, fill, time."""
    check(system, bench.device)
    cuda = bench.device.type == "cuda"
    model = build_model(config, bench.device, torch.bfloat16 if cuda else torch.float32).eval()
    torch.manual_seed(length)
    with peak_bytes(bench.device) as peak, torch.no_grad():
        cache = model.new_cache(batch)
        fill(cache, length)
        before = cache.nbytes
        # eager and long: fewer tokens, so that a slow peer doesn't take all the time
        trial = time_tokens(model, cache, batch, 5, warmup=10)
        most = 1000 if cuda else 20
        count = max(10, min(most, int(1e3 * bench.args.seconds / trial.median)))
        timing = time_tokens(model, cache, batch, count, warmup=10)
        bench.add_bytes(f"{case} peak", system, peak())
    bench.add_timing(case, system, timing, tokens=batch)
    bench.add(case, system, "bytes", cache.nbytes, before, cache.nbytes, 2)
    p99 = quantile(sorted(timing.samples), 0.99)
    bench.add(f"{case} p99", system, "ms", p99, p99, p99, timing.n)
    read = bytes_of_step(model, cache)
    share = read / (timing.median / 1e3) / bandwidth if bandwidth else None
    bench.note(
        case,
        system,
        filled=True,
        without_graph=_obstacle(model, cache),
        step_bytes=read,
        copy_bytes_per_s=bandwidth,
        bandwidth_share=share,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte bench decode`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("--config", metavar="SIZE", default="1.4b", help="0.4b, 1.4b (default) or tiny")
    add("--batches", metavar="B,B", default="1,64", help="rows; default: 1,64")
    add("--lengths", metavar="T,T", default="4096,65536,1048576", help="tokens before; default: 4096,65536,1048576")
    add("--figure", metavar="FILE", help="also draw time and memory against the length, as PNG or SVG")
    add_common_arguments(parser)


def numbers(text: str, name: str) -> list[int]:
    """Raises: ValueError naming the option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ValueError(f"{name} {text} must be whole numbers from 1 on, with commas between them")
    return found


def run_from_arguments(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    size = args.config
    batches, lengths = numbers(args.batches, "--batches"), numbers(args.lengths, "--lengths")
    if args.quick:
        size, batches, lengths = "tiny", [1, 3], [20, 300]
    name = "decode" if size == "1.4b" else f"decode-{size}"
    bench = Bench(name, args, {"size": size})
    bandwidth = copy_bandwidth(bench.device)
    for batch in batches:
        for length in lengths:
            case = f"decode {size} B{batch} T{length}"
            runs = {}
            for system in SYSTEMS:
                config = model_config(system, size, **(quick_changes(system) if args.quick else {}))
                runs[system] = partial(time_system, bench, case, system, config, batch, length, bandwidth)
            bench.add_case(case, runs)
    status = bench.run()
    if args.figure:
        draw(bench.rows, f"decode {size} B{batches[0]} T", args.figure)
    return status


def draw(rows: list[dict[str, Any]], prefix: str, path: str) -> None:
    """Milliseconds a token and bytes of the cache against the length, of the cases that are `prefix` and a length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, metric, label in zip(
        figure.subplots(1, 2), ("ms", "bytes"), ("milliseconds a token", "cache, bytes"), strict=True
    ):
        for system in SYSTEMS:
            points = {
                int(r["case"].removeprefix(prefix)): r["median"]
                for r in rows
                if (r["system"], r["metric"]) == (system, metric) and r["case"].removeprefix(prefix).isdigit()
            }
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=system)
        axes.set(yscale="log", xlabel="tokens before", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
