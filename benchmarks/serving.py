"""What the benchmarks of prompts and of decoding share: their models, a check, and caches as after a long text."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.harness import OURS, build_model, model_config, require_close
from lte.cache import GrowingCache, RetainedCache
from models.attention import AttentionState
from models.cache import HybridCache
from models.gated_deltanet import GatedDeltaNetState
from models.generation import decode_one_token, prefill

SYSTEMS = (OURS, "gdn", "gdn-swa", "gdn-full", "transformer")
ROOM = 4096  # slots for tokens to come, so that a growing cache isn't copied while steps are timed
QUICK = {"num_hidden_layers": 2, "vocab_size": 256}


def quick_changes(system: str) -> dict[str, Any]:
    """Fields that make the tiny configuration smaller still."""
    first = "attention" if system == "transformer" else "gated_deltanet"
    layers = [first, "gated_deltanet" if system == "gdn" else "attention"]
    rule = {"window": 24, "budget": 10, "prefill_chunk": 50} if system == OURS else {"prefill_chunk": 50}
    return {**QUICK, "layer_types": layers, **rule}


@functools.cache
@torch.no_grad()
def check(system: str, device: torch.device) -> None:
    """Prompt in chunks, then token by token, against the parallel form, on the device in float32.

    Raises: Disagreement.
    """
    rule = {"window": 40, "budget": 160, "scorer_dropout": 0.0} if system == OURS else {}
    config = model_config(system, "tiny", initializer_range=0.1, prefill_chunk=50, vocab_size=512, **rule)
    model = build_model(config, device, torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("scorer.out_bias"):
            parameter.zero_()  # about half of the tokens are kept
    ids = torch.randint(512, (2, 150), generator=torch.Generator().manual_seed(0)).to(device)
    cache = model.new_cache(2)
    logits = [prefill(model, ids[:, :130], cache)]
    logits += [decode_one_token(model, ids[:, [t]], cache) for t in range(130, 150)]
    expected = model(ids).logits[:, 129:]
    # the library's kernels take float32 products in TF32
    require_close("a cached logit", torch.stack(logits, 1), expected, 2e-2 if device.type == "cuda" else 1e-4)


@torch.no_grad()
def fill(cache: HybridCache, tokens: int) -> None:
    """Random contents as if every row had read so many tokens; nothing is computed."""
    for state in cache.states:
        if isinstance(state, GatedDeltaNetState):
            state.conv_BCL.normal_()
            state.recurrent_BHKV.normal_(std=0.1)
        elif isinstance(state, AttentionState):
            for x in () if state.scorer is None else state.scorer.inputs:
                x.normal_()
            if isinstance(state.kv, GrowingCache):
                _fill_growing(state.kv, tokens)
            else:
                _fill_retained(state.kv, tokens)
        else:
            raise ValueError(f"a {type(state).__name__} can't be filled; choose another system")
    cache.columns = tokens


def _fill_growing(kv: GrowingCache, tokens: int) -> None:
    batch, heads, capacity, dim = kv.k.shape
    kv.k = kv.k.new_empty(batch, heads, max(capacity, tokens + ROOM), dim).normal_()
    kv.v = torch.empty_like(kv.k).normal_()
    kv.seen.fill_(tokens)
    kv.longest.fill_(tokens)


def _fill_retained(kv: RetainedCache, tokens: int) -> None:
    """Sinks, random retained positions between them and the window, and the window's ring."""
    batch, heads, _ = kv.positions.shape
    device = kv.positions.device
    kv.k.normal_()
    kv.v.normal_()
    kv.logits.normal_()
    slot = torch.arange(kv.sinks, device=device)
    kv.positions[:, :, : kv.sinks] = torch.where(slot < tokens, slot, -1)
    first, ring = kv.sinks, kv.sinks + kv.budget
    middle = max(0, tokens - kv.window - kv.sinks)
    count = min(kv.budget, middle)
    kv.positions[:, :, first:ring] = -1
    kv.logits[:, :, first:ring] = -torch.inf
    if count:
        # distinct positions, equally far apart but for a random shift a head
        shift = torch.rand(batch, heads, 1, device=device)
        place = ((torch.arange(count, device=device) + shift) * (middle / count)).long().clamp(max=middle - 1)
        kv.positions[:, :, first : first + count] = kv.sinks + place
        kv.logits[:, :, first : first + count] = torch.rand(batch, heads, count, device=device) + 0.1
    newest = tokens - 1 - (tokens - 1 - torch.arange(kv.window, device=device)) % kv.window
    kv.positions[:, :, ring:] = torch.where(newest >= kv.sinks, newest, -1)
    kv.seen.fill_(tokens)
