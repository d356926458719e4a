"""Attention alone: training (forward and backward) and prompts (forward), ours beside dense and masked peers.

Shapes: B batch, T tokens, N query heads, H KV heads, D head dimension.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import OURS, Bench, add_common_arguments, require_close
from benchmarks.timing import measure, peak_bytes, replayed
from lte.attention import interval_attention
from lte.scorer import RetentionScorer
from lte.visibility import lifetimes

DESCRIPTION = """\
Times attention under the rule (sinks, window, retained tokens) beside SDPA's causal attention, FlexAttention with
the same mask (with and without the making of the block mask) and flash-linear-attention's dense and windowed
kernels. `fwdbwd` is training, `prefill` the forward pass over a prompt with the running budget. Each system first
agrees with a float32 reference under its own mask, outputs and gradients.
"""
EPILOG = """\
examples:
  lalte bench attention
  lalte bench attention --cases prefill --systems lalte,sdpa
  lalte bench attention --quick --device cpu --out attention.json
"""
BUFFERS = 3
TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
PEER_TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-3}


@dataclass(frozen=True)
class Shape:
    """Sizes of one case, and which keys are kept: a number a head, `all`, or `budget` (random scores compete)."""

    batch: int
    length: int
    kept: int | str
    heads: int = 32
    kv_heads: int = 8
    dim: int = 64
    window: int = 768
    sinks: int = 4
    budget: int = 512

    def logits(self, device: torch.device) -> Tensor:
        """[B, T, H] float32."""
        noise = torch.randn(self.batch, self.length, self.kv_heads, device=device)
        if self.kept == "budget":
            return noise
        if self.kept == "all":
            return noise.abs() + 1
        count = min(int(self.kept), self.length)
        chosen = noise.topk(count, dim=1).indices
        return torch.full_like(noise, -1.0).scatter_(1, chosen, 1.0)

    def end(self, device: torch.device, window: int | None = -1, retained: bool = True) -> Tensor:
        """Ends [B, T, H] of the rule; with another window or without retained tokens those of a peer's mask."""
        window = self.window if window == -1 else window
        return lifetimes(
            self.logits(device) if retained else None,
            batch=self.batch,
            length=self.length,
            heads=self.kv_heads,
            window=window,
            sinks=self.sinks if retained else 0,
            budget=self.budget if self.kept == "budget" else None,
            device=device,
        )

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random q [B, T, N, D], k, v [B, T, H, D], and an output's gradient."""
        make = partial(torch.randn, dtype=dtype, device=device)
        q, grad = (make(self.batch, self.length, self.heads, self.dim) for _ in range(2))
        k, v = (make(self.batch, self.length, self.kv_heads, self.dim) for _ in range(2))
        return q, k, v, grad


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class System:
    """A way to attend: `prepare` makes it for a shape's ends; `window` and `retained` say which mask it has."""

    prepare: Callable[[Shape, Tensor], Attend]
    window: int | None
    retained: bool
    tolerance: dict[torch.dtype, float]


def _ours(shape: Shape, end: Tensor) -> Attend:
    return lambda q, k, v: interval_attention(q, k, v, end, window=shape.window)


def _sdpa(shape: Shape, end: Tensor) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


@cache
def _compiled(on_cuda: bool) -> tuple[Callable, Callable]:
    """FlexAttention and the maker of its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not on_cuda:
        return flex_attention, create_block_mask
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _flex(shape: Shape, end: Tensor, ready: bool) -> Attend:
    flex_attention, create_block_mask = _compiled(end.is_cuda)
    group = shape.heads // shape.kv_heads
    end_BHT = end.transpose(1, 2).contiguous()

    def lives(b, h, i, j):
        return (j <= i) & (i < end_BHT[b, h // group, j])

    def make():
        return create_block_mask(lives, shape.batch, shape.heads, shape.length, shape.length, device=end.device)

    mask = make() if ready else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        block_mask = mask if ready else make()
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=group > 1).transpose(1, 2)

    return attend


def _fla(shape: Shape, end: Tensor, windowed: bool) -> Attend:
    from models import fla_adapter

    if not end.is_cuda:
        raise RuntimeError("the library's kernels need a CUDA device")
    return partial(fla_adapter.causal_attention, window=shape.window if windowed else None)


def systems(shape: Shape) -> dict[str, System]:
    """Ours first."""
    return {
        OURS: System(_ours, shape.window, True, TOLERANCE),
        "sdpa": System(_sdpa, None, False, PEER_TOLERANCE),
        "flex": System(partial(_flex, ready=True), shape.window, True, PEER_TOLERANCE),
        "flex with mask": System(partial(_flex, ready=False), shape.window, True, PEER_TOLERANCE),
        "fla": System(partial(_fla, windowed=False), None, False, PEER_TOLERANCE),
        "fla window": System(partial(_fla, windowed=True), shape.window, False, PEER_TOLERANCE),
    }


def check(system: System, shape: Shape, device: torch.device, dtype: torch.dtype, backward: bool) -> None:
    """Raises: Disagreement with the float32 reference under the system's own mask."""
    q, k, v, grad = shape.tensors(device, dtype)
    end = shape.end(device, system.window, system.retained)
    attend = system.prepare(shape, end)
    inputs = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    exact = [x.detach().float().requires_grad_(backward) for x in (q, k, v)]
    out, expected = attend(*inputs), interval_attention(*exact, end, window=None, backend="reference")
    require_close("the output", out, expected, system.tolerance[dtype])
    if backward:
        grads = torch.autograd.grad(out, inputs, grad)
        wanted = torch.autograd.grad(expected, exact, grad.float())
        for name, a, b in zip("qkv", grads, wanted, strict=True):
            require_close(f"the gradient of {name}", a, b, system.tolerance[dtype])


def time_system(bench: Bench, case: str, name: str, shape: Shape, small: Shape, dtype: torch.dtype, backward: bool):
    """Check, then time one system of a case."""
    system = systems(shape)[name]
    # of the same mask, at a length that the reference can do
    check(systems(small)[name], small, bench.device, dtype, backward)
    sets = []
    for _ in range(BUFFERS):
        q, k, v, grad = shape.tensors(bench.device, dtype)
        attend = system.prepare(shape, shape.end(bench.device, system.window, system.retained))
        sets.append((attend, [x.requires_grad_(backward) for x in (q, k, v)], grad))

    def run(i: int) -> None:
        attend, inputs, grad = sets[i % BUFFERS]
        with torch.set_grad_enabled(backward):
            out = attend(*inputs)
            if backward:
                torch.autograd.grad(out, inputs, grad)

    timing = measure(run, bench.device, seconds=bench.args.seconds)
    with peak_bytes(bench.device) as peak:
        run(0)
        bench.add_bytes(case, name, peak())
    bench.add_timing(case, name, timing)


def time_scorer(bench: Bench, case: str, shape: Shape, dtype: torch.dtype) -> None:
    """The retention scorer, forward and backward in training."""
    scorer = RetentionScorer(shape.kv_heads, shape.dim).to(bench.device, dtype)
    small = torch.randn(2, 61, shape.kv_heads, 2 * shape.dim, device=bench.device, dtype=dtype)
    with torch.no_grad():
        logits = scorer.eval()(small)
        expected = RetentionScorer(shape.kv_heads, shape.dim)
        expected.load_state_dict(scorer.state_dict())
        require_close("the logits", logits, expected.eval()(small.float().cpu()), 2e-2)
    scorer.train()
    sizes = (shape.batch, shape.length, shape.kv_heads, 2 * shape.dim)
    sets = [torch.randn(sizes, device=bench.device, dtype=dtype, requires_grad=True) for _ in range(BUFFERS)]
    grad = torch.randn(sizes[:3], device=bench.device)
    parameters = list(scorer.parameters())

    def run(i: int) -> None:
        x = sets[i % BUFFERS]
        torch.autograd.grad(scorer(x), [x, *parameters], grad)

    launched = measure(run, bench.device, seconds=bench.args.seconds)
    bench.note(case, OURS, launched_ms=launched.median)
    replay = replayed(run, BUFFERS, bench.device)
    bench.add_timing(case, OURS, measure(replay, bench.device, seconds=bench.args.seconds))


def time_layer(bench: Bench, case: str, shape: Shape, dtype: torch.dtype) -> None:
    """What the scorer's time is compared with: projections and windowed attention of one layer, without a scorer."""
    from models.attention import RetainedAttention
    from models.config import HybridConfig
    from models.mixer import Context
    from models.rotary import rotary_angles

    hidden = shape.heads * shape.dim
    config = HybridConfig(
        hidden_size=hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        window=shape.window,
        sinks=shape.sinks,
        budget=0,
        retention="none",
    )
    layer = RetainedAttention(config).to(bench.device, dtype)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=hidden**-0.5)
    sizes = (shape.batch, shape.length, hidden)
    sets = [torch.randn(sizes, device=bench.device, dtype=dtype, requires_grad=True) for _ in range(BUFFERS)]
    grad = torch.randn(sizes, device=bench.device, dtype=dtype)
    positions = torch.arange(shape.length, device=bench.device).expand(shape.batch, -1)
    context = Context(rotary=rotary_angles(positions, shape.dim, config.rope_theta))
    parameters = list(layer.parameters())

    def run(i: int) -> None:
        x = sets[i % BUFFERS]
        torch.autograd.grad(layer(x, context).hidden, [x, *parameters], grad)

    replay = replayed(run, BUFFERS, bench.device)
    bench.add_timing(case, "attention layer", measure(replay, bench.device, seconds=bench.args.seconds))


def time_rule(bench: Bench, case: str, shape: Shape) -> None:
    """Every key's end under the running budget, from the logits of a whole prompt."""
    logits = [shape.logits(bench.device) for _ in range(BUFFERS)]

    def run(i: int) -> None:
        lifetimes(
            logits[i % BUFFERS],
            batch=shape.batch,
            length=shape.length,
            heads=shape.kv_heads,
            window=shape.window,
            sinks=shape.sinks,
            budget=shape.budget,
            device=bench.device,
        )

    bench.add_timing(case, OURS, measure(run, bench.device, seconds=bench.args.seconds))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte bench attention`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_common_arguments(parser)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    quick = {"heads": 4, "kv_heads": 2, "dim": 16, "window": 24, "sinks": 2, "budget": 10}
    if args.quick:
        train = [Shape(2, 96, 10, **quick), Shape(1, 160, 10, **quick), Shape(2, 96, "all", **quick)]
        prompts = [Shape(1, 128, "budget", **quick)]
    else:
        train = [Shape(4, 4096, 512), Shape(1, 16384, 512), Shape(1, 65536, 512), Shape(4, 4096, "all")]
        prompts = [Shape(1, length, "budget") for length in (4096, 16384, 65536)]
    bench = Bench("attention", args, {"train": [asdict(s) for s in train], "prefill": [asdict(s) for s in prompts]})
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    for shape, backward in [*((s, True) for s in train), *((s, False) for s in prompts)]:
        word = "fwdbwd" if backward else "prefill"
        case = f"{word} B{shape.batch} T{shape.length}" + (" all kept" if shape.kept == "all" else "")
        torch.manual_seed(shape.length)
        kept = shape.kept if isinstance(shape.kept, str) else min(shape.kept, 200)
        small = replace(shape, batch=2, length=min(shape.length, 1031), kept=kept, window=min(shape.window, 200))
        runs = {
            name: partial(time_system, bench, case, name, shape, small, dtype, backward) for name in systems(shape)
        }
        bench.add_case(case, runs)
    first = train[0]
    case = f"scorer fwdbwd B{first.batch} T{first.length}"
    bench.add_case(
        case,
        {
            OURS: partial(time_scorer, bench, case, first, dtype),
            "attention layer": partial(time_layer, bench, case, first, dtype),
        },
    )
    for shape in prompts:
        case = f"rule B{shape.batch} T{shape.length}"
        bench.add_case(case, {OURS: partial(time_rule, bench, case, shape)})
    return bench.run()
