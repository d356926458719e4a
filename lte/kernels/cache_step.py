"""One token into a `RetainedCache`: evict, insert, and stream the scorer, in one launch.

The score that arrives with a token belongs to the one `lookahead` before it, and matters when that one leaves the
window, which is later since the window is larger than the lookahead. So eviction and scoring don't wait for each
other: half of the programs evict and insert, the other half score.

Letters in shape suffixes: B batch, H KV heads, D head dimension, S slots, P past inputs, C channels, O outputs.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.launch import launch_options, on_device, wait_for_inputs

# most bytes of a head's scorer: about what the registers of a multiprocessor hold
SCORER_BYTES = 264 * 1024

if TYPE_CHECKING:
    from lte.cache import RetainedCache
    from lte.scorer import RetentionScorer, ScorerState


@triton.jit
def _place_to_evict(positions_ptr, logits_ptr, SINKS: tl.constexpr, BUDGET: tl.constexpr, PAD: tl.constexpr):
    """The retained slot that goes first, and its logit: the lowest one, ties to the larger position."""
    r = tl.arange(0, PAD)
    held = tl.load(logits_ptr + SINKS + r, mask=r < BUDGET, other=float("inf"))
    position = tl.load(positions_ptr + SINKS + r, mask=r < BUDGET, other=-3)
    lowest = tl.min(held, 0)
    rank = tl.where((held == lowest) & (r < BUDGET), position, -2)
    target = tl.min(tl.where(rank == tl.max(rank, 0), r, PAD), 0)
    return SINKS + target, lowest


@triton.jit
def _evict_and_insert(
    n, b, seen, k_new_ptr, v_new_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, positions_ptr, logits_ptr, scores_ptr,
    lookahead, WINDOW: tl.constexpr, SINKS: tl.constexpr, BUDGET: tl.constexpr, PAD_BUDGET: tl.constexpr,
    DIM: tl.constexpr, PAD_DIM: tl.constexpr, RETAINS: tl.constexpr, SCORED: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    slots: tl.constexpr = SINKS + BUDGET + WINDOW
    first_ring: tl.constexpr = SINKS + BUDGET
    dim = tl.arange(0, PAD_DIM)
    in_dim = dim < DIM
    k_ptr += n * slots * DIM
    v_ptr += n * slots * DIM
    positions_ptr += n * slots
    logits_ptr += n * slots
    ring = first_ring + seen % WINDOW  # what leaves lies where the new token goes
    k_new = tl.load(k_new_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
    v_new = tl.load(v_new_ptr + dim, mask=in_dim, other=0.0)
    if ROTARY:
        half: tl.constexpr = DIM // 2
        partner = tl.where(dim < half, dim + half, dim - half)
        other = tl.load(k_new_ptr + partner, mask=in_dim, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + b * half + dim % half, mask=in_dim, other=0.0)
        sin = tl.load(sin_ptr + b * half + dim % half, mask=in_dim, other=0.0)
        k_new = k_new * cos + other * tl.where(dim < half, -sin, sin)
    if RETAINS:
        logit = tl.load(logits_ptr + ring)
        position = tl.load(positions_ptr + ring)
        k_leaving = tl.load(k_ptr + ring * DIM + dim, mask=in_dim, other=0.0)
        v_leaving = tl.load(v_ptr + ring * DIM + dim, mask=in_dim, other=0.0)
        target, lowest = _place_to_evict(positions_ptr, logits_ptr, SINKS, BUDGET, PAD_BUDGET)
        tl.debug_barrier()  # every thread has read what is overwritten from here on
        if logit > tl.maximum(lowest, 0.0):
            tl.store(k_ptr + target * DIM + dim, k_leaving, mask=in_dim)
            tl.store(v_ptr + target * DIM + dim, v_leaving, mask=in_dim)
            tl.store(positions_ptr + target, position)
            tl.store(logits_ptr + target, logit)
    slot = tl.where(seen < SINKS, seen, ring)
    tl.store(k_ptr + slot * DIM + dim, k_new.to(k_ptr.dtype.element_ty), mask=in_dim)
    tl.store(v_ptr + slot * DIM + dim, v_new.to(v_ptr.dtype.element_ty), mask=in_dim)
    tl.store(positions_ptr + slot, seen)
    tl.store(logits_ptr + slot, float("-inf"))
    if SCORED:
        tl.debug_barrier()  # with lookahead 0 the score belongs to the token just inserted
        scored = seen - lookahead
        place = first_ring + tl.maximum(scored, 0) % WINDOW
        tl.store(logits_ptr + place, tl.load(scores_ptr + n), mask=scored >= SINKS)


@triton.jit
def _scorer_weights(weights, stack, SIZES: tl.constexpr, PADS: tl.constexpr, TAPS: tl.constexpr):
    """All weights of a head's scorer, a tile [C, O] a tap: asked for at once, so that no layer waits for its own."""
    tiles = ()
    for layer in tl.static_range(len(TAPS)):
        c = tl.arange(0, PADS[layer])[:, None]
        o = tl.arange(0, PADS[layer + 1])[None, :]
        for tap in tl.static_range(tl.constexpr(TAPS[layer])):
            at = weights[layer] + ((stack * TAPS[layer] + tap) * SIZES[layer] + c) * SIZES[layer + 1] + o
            tiles = tiles + (tl.load(at, mask=(c < SIZES[layer]) & (o < SIZES[layer + 1]), other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def _move_on(x, past_ptr, PAST: tl.constexpr, PAD_PAST: tl.constexpr, SIZE: tl.constexpr, PAD_SIZE: tl.constexpr):
    """The oldest of a layer's past inputs goes, x becomes the newest."""
    p = tl.arange(0, PAD_PAST)[:, None]
    c = tl.arange(0, PAD_SIZE)
    moving = (p < PAST - 1) & (c < SIZE)[None, :]
    following = tl.load(past_ptr + (p + 1) * SIZE + c[None, :], mask=moving, other=0.0)
    tl.debug_barrier()  # every thread has read what is overwritten now
    tl.store(past_ptr + p * SIZE + c[None, :], following, mask=moving)
    tl.store(past_ptr + (PAST - 1) * SIZE + c, x, mask=c < SIZE)


@triton.jit
def _stream_score(
    n, stack, seen, k_new_ptr, v_new_ptr, logits_ptr, tiles, biases, pasts, out_weight_ptr, out_bias_ptr,
    lookahead, WINDOW: tl.constexpr, SINKS: tl.constexpr, BUDGET: tl.constexpr, DIM: tl.constexpr,
    SIZES: tl.constexpr, PADS: tl.constexpr, TAPS: tl.constexpr, FIRST_TAPS: tl.constexpr,
    DILATIONS: tl.constexpr, PASTS: tl.constexpr, PAD_PASTS: tl.constexpr,
):  # fmt: skip
    """The logit of the token `lookahead` before the new one, written to its slot; the scorer's state moves on."""
    slots: tl.constexpr = SINKS + BUDGET + WINDOW
    c = tl.arange(0, PADS[0])
    x = tl.load(k_new_ptr + c, mask=c < DIM, other=0.0)
    x += tl.load(v_new_ptr + c - DIM, mask=(c >= DIM) & (c < 2 * DIM), other=0.0)  # [k ; v], each in its place
    position = seen
    for layer in tl.static_range(len(TAPS)):
        past_ptr = pasts[layer] + n * (PASTS[layer] * SIZES[layer])
        c = tl.arange(0, PADS[layer])
        o = tl.arange(0, PADS[layer + 1])
        y = tl.load(biases[layer] + stack * SIZES[layer + 1] + o, mask=o < SIZES[layer + 1], other=0.0).to(tl.float32)
        for tap in tl.static_range(tl.constexpr(TAPS[layer] - 1)):
            earlier = tl.load(past_ptr + tap * DILATIONS[layer] * SIZES[layer] + c, mask=c < SIZES[layer], other=0.0)
            y += tl.sum(tiles[FIRST_TAPS[layer] + tap].to(tl.float32) * earlier.to(tl.float32)[:, None], 0)
        y += tl.sum(tiles[FIRST_TAPS[layer + 1] - 1].to(tl.float32) * x.to(tl.float32)[:, None], 0)
        if PASTS[layer] > 0:
            _move_on(x, past_ptr, PASTS[layer], PAD_PASTS[layer], SIZES[layer], PADS[layer])
        # an output arrives late; before position 0 there is the padding's zero
        position = position - PASTS[layer] // 2
        x = tl.where(position >= 0, y * tl.sigmoid(y), 0.0).to(x.dtype)
    o = tl.arange(0, PADS[len(TAPS)])
    out_at = out_weight_ptr + stack * SIZES[len(TAPS)] + o
    w = tl.load(out_at, mask=o < SIZES[len(TAPS)], other=0.0).to(tl.float32)
    score = tl.sum(x.to(tl.float32) * w, 0) + tl.load(out_bias_ptr + stack).to(tl.float32)
    scored = seen - lookahead
    place = SINKS + BUDGET + tl.maximum(scored, 0) % WINDOW
    tl.store(logits_ptr + n * slots + place, score, mask=scored >= SINKS)


@triton.jit(do_not_specialize=["lookahead"])
def _cache_step_kernel(
    k_new_ptr, v_new_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, positions_ptr, logits_ptr, seen_ptr, counter_ptr,
    scores_ptr, weights, biases, pasts, out_weight_ptr, out_bias_ptr, new_b, new_h, lookahead,
    HEADS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, BUDGET: tl.constexpr, PAD_BUDGET: tl.constexpr,
    DIM: tl.constexpr, PAD_DIM: tl.constexpr, RETAINS: tl.constexpr, SCORED: tl.constexpr, STREAMS: tl.constexpr,
    SHARED: tl.constexpr, SIZES: tl.constexpr, PADS: tl.constexpr, TAPS: tl.constexpr, FIRST_TAPS: tl.constexpr,
    DILATIONS: tl.constexpr, PASTS: tl.constexpr, PAD_PASTS: tl.constexpr, ROTARY: tl.constexpr,
    COUNTER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    b = n // HEADS
    h = n % HEADS
    k_new_ptr += b * new_b + h * new_h
    v_new_ptr += b * new_b + h * new_h
    if tl.program_id(1) == 0:
        wait_for_inputs(OVERLAP)
        seen = tl.load(seen_ptr + b)
        if COUNTER:
            tl.store(counter_ptr + n, 0)
        _evict_and_insert(
            n, b, seen, k_new_ptr, v_new_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, positions_ptr, logits_ptr, scores_ptr,
            lookahead, WINDOW, SINKS, BUDGET, PAD_BUDGET, DIM, PAD_DIM, RETAINS, SCORED, ROTARY,
        )  # fmt: skip
    elif STREAMS:
        stack = n * 0 if SHARED else h
        tiles = _scorer_weights(weights, stack, SIZES, PADS, TAPS)
        wait_for_inputs(OVERLAP)
        _stream_score(
            n, stack, tl.load(seen_ptr + b), k_new_ptr, v_new_ptr, logits_ptr, tiles, biases, pasts, out_weight_ptr,
            out_bias_ptr, lookahead, WINDOW, SINKS, BUDGET, DIM, SIZES, PADS, TAPS, FIRST_TAPS, DILATIONS, PASTS,
            PAD_PASTS,
        )  # fmt: skip


def fits_kernel(scorer: RetentionScorer) -> bool:
    """Whether the kernel can stream this scorer: a program holds all weights of a head in its registers.

    A scorer that looks at no later token is left out too: its score would race with its token's insertion.
    """
    return scorer.lookahead > 0 and sum(x[0].nbytes for x in scorer.weights) <= SCORER_BYTES


def cache_step(
    cache: RetainedCache,
    k_BHD: Tensor,
    v_BHD: Tensor,
    *,
    scores_BH: Tensor | None = None,
    scorer: RetentionScorer | None = None,
    state: ScorerState | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    counter: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """One token of every row into the cache, in place. `cache.seen` is read, but left to go up elsewhere.

    Args:
        k_BHD, v_BHD: of the new tokens; k before rotation if `rotary` is given.
        scores_BH: float32 logits of the tokens `lookahead` earlier; or
        scorer, state: what computes them here, where `fits_kernel`. Neither: nothing is retained.
        rotary: cos and sin, D / 2 contiguous float32 numbers a row, for the keys in the cache; the scorer reads
            them unrotated.
        counter: [B * H] int32, set to zero.
    """
    batch, heads, dim = k_BHD.shape
    if k_BHD.stride() != v_BHD.stride() or k_BHD.stride(2) != 1:
        k_BHD, v_BHD = k_BHD.contiguous(), v_BHD.contiguous()
    streams = scorer is not None and state is not None and cache.budget > 0
    scored = scores_BH is not None and cache.budget > 0
    assert not (streams and scored)
    assert not streams or fits_kernel(scorer)
    weights = biases = pasts = ()
    sizes, taps, dilations = (), (), ()
    out_weight = out_bias = None
    shared = True
    if streams:
        weights, biases, pasts = tuple(scorer.weights), tuple(scorer.biases), tuple(state.inputs)
        out_weight, out_bias = scorer.out_weight, scorer.out_bias
        sizes, taps, dilations = tuple(scorer.channels), scorer.kernel_sizes, scorer.dilations
        shared = out_bias.shape[0] == 1
    if scored:
        scores_BH = scores_BH.contiguous()
    cos, sin = rotary if rotary is not None else (None, None)
    past_sizes = tuple((tap - 1) * dilation for tap, dilation in zip(taps, dilations, strict=True))
    with on_device(k_BHD):
        _cache_step_kernel[(batch * heads, 2 if streams else 1)](
            k_BHD, v_BHD, cos, sin, cache.k, cache.v, cache.positions, cache.logits, cache.seen, counter, scores_BH,
            weights, biases, pasts, out_weight, out_bias, *k_BHD.stride()[:2], cache.lookahead,
            HEADS=heads, WINDOW=cache.window, SINKS=cache.sinks, BUDGET=cache.budget,
            PAD_BUDGET=triton.next_power_of_2(max(1, cache.budget)), DIM=dim,
            PAD_DIM=triton.next_power_of_2(dim), RETAINS=streams or scored, SCORED=scored, STREAMS=streams,
            SHARED=shared, SIZES=sizes, PADS=tuple(map(triton.next_power_of_2, sizes)), TAPS=taps,
            FIRST_TAPS=tuple(accumulate(taps, initial=0)), DILATIONS=dilations, PASTS=past_sizes,
            PAD_PASTS=tuple(triton.next_power_of_2(max(1, past)) for past in past_sizes), ROTARY=rotary is not None,
            COUNTER=counter is not None, OVERLAP=overlap, **launch_options(overlap, warps=8 if streams else 4),
        )  # fmt: skip
