"""Interval attention: key j is visible to the query at index i iff j <= i < end[j] (arXiv 2510.20787).

A block of queries reads two kinds of keys: contiguous "near" keys that cover the window, and "columns", the earlier
keys that outlive their window, gathered through a list. So a query costs window + kept keys.

Letters in shape suffixes: B batch, T query tokens, S keys, Q query heads, H KV heads, D head_dim, N = B·H,
R = T·G rows (query token, head of the group), which is what a tile of queries consists of.
"""

import functools
import math
import os
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.attention_backward import attention_backward
from lte.kernels.attention_presence import presence_gradient
from lte.kernels.attention_tiles import load_key_tile, load_tile, row_offsets
from lte.kernels.columns import (
    Geometry,
    Schedule,
    Tile,
    block_tokens,
    build_schedule,
    ranked_keys,
    read_plan,
    tile_shift,
)
from lte.kernels.launch import next_power_of_2, on_device
from lte.straight_through import LateGradient

LOG2E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
HOPPER_SHARED_BYTES = 200 * 1024


@dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels, tokens per span of the column lists, and keys looked at in one scan step.

    A forward pass that no backward pass follows has spans of `prompt_span` tokens: shorter ones are faster and their
    lists larger, for which gradients leave no room. Up to `unlisted` keys it makes no list of all columns: a launch
    less.
    """

    forward: Tile
    query: Tile
    key: Tile
    span_tokens: int = 512
    scan: int = 4096
    prompt_span: int = 256
    unlisted: int = 8192


HALF_TILES = {
    32: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    64: Tiles(Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(32, 64, 4, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
}
SINGLE_TILES = {
    32: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 8, 1)),
    64: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    256: Tiles(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
}


STEEP = tl.constexpr(2.0**100)  # masks bound scores by half of it: no score of finite inputs worth having is larger


@triton.jit
def _lifetimes(j, e, origin):
    """Middle and half length of the spans [j, e) in which keys are seen, from origin, times STEEP.

    Exact, since distances are cut to 2**20: a block of queries is shorter, and twice that has 22 bits.
    """
    LONG: tl.constexpr = 2**20
    a = tl.minimum(tl.maximum(j - origin, -LONG), LONG).to(tl.float32)
    b = tl.minimum(tl.maximum(e - origin, -LONG), LONG).to(tl.float32)
    return (a + b - 1.0) * (0.5 * STEEP), (b - a) * (0.5 * STEEP)


@triton.jit
def _softmax_step(acc, total, peak, q, k, v, i, middle, half, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds keys to a block's sums. MASKED: row i sees those with |i - middle| < half, all three times STEEP."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:  # the bound is at least STEEP / 2 in size, so scores stay or fall out of sight; no comparisons
        s = tl.minimum(s, half[None, :] - tl.abs(i[:, None] - middle[None, :]), propagate_nan=tl.PropagateNan.ALL)
    highest = tl.max(s, 1)
    if MASKED:
        highest = tl.where(highest < -0.25 * STEEP, float("-inf"), highest)
    new_peak = tl.maximum(peak, highest * scale)
    base = new_peak
    if MASKED:  # a row that has seen no key yet: keep -inf - -inf out
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.math.exp2(s * scale - base[:, None])
    shrink = tl.math.exp2(peak - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit(do_not_specialize=["tokens", "keys", "offset", "first", "window", "blocks", "spans"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, plan_ptr, columns_ptr, out_ptr, lse_ptr, q_b, q_t, q_h, k_b, k_t, k_h,
    v_b, v_t, v_h, tokens, keys, offset, first, window, blocks, spans, capacity, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPAN: tl.constexpr, HAS_COLUMNS: tl.constexpr, OFF_BY_ONE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    heads = tl.num_programs(0) // blocks
    n = (tl.program_id(0) % heads).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) // heads  # the longest first
    b = n // HEADS
    h = n % HEADS
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    end_ptr += n * keys
    columns_ptr += (n * spans + block // SPAN) * capacity
    pad, _slot_tiles = tile_shift(offset, KEYS)
    t_first, t_last = block_tokens(block, tokens, GROUP, ROWS)
    full, diagonal, full_columns, lasting, passing, rim, low, upper, ranks = read_plan(
        plan_ptr + (n * blocks + block) * 5, t_first, t_last, offset, first, window, KEYS
    )

    row = block * ROWS + tl.arange(0, ROWS)
    in_rows = row < tokens * GROUP
    steep = (row // GROUP - t_first).to(tl.float32) * STEEP
    q_at = q_ptr + b * q_b + h * GROUP * q_h
    q = load_tile(q_at, row_offsets(row, q_t, q_h, GROUP), 1, in_rows, DIM, PAD_DIM, True)
    acc = tl.zeros([ROWS, PAD_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    if OFF_BY_ONE:  # every query has seen a key of score 0 and value 0
        total += 1.0
        peak = tl.zeros([ROWS], tl.float32)
    lane = tl.arange(0, KEYS)

    if HAS_COLUMNS:
        for at in range(0, full_columns, KEYS):
            j = tl.load(columns_ptr + at + lane).to(tl.int64)
            k, v = load_key_tile(k_ptr, v_ptr, j, k_t, v_t, None, DIM, PAD_DIM, False)
            acc, total, peak = _softmax_step(acc, total, peak, q, k, v, steep, steep, steep, scale, False, PRECISION)
    for tile in range(full, diagonal):
        start = (tile * KEYS - pad).to(tl.int64)
        k, v = load_key_tile(k_ptr + start * k_t, v_ptr + start * v_t, lane, k_t, v_t, None, DIM, PAD_DIM, False)
        acc, total, peak = _softmax_step(acc, total, peak, q, k, v, steep, steep, steep, scale, False, PRECISION)
    for at in range(full_columns, ranks, KEYS):
        j = ranked_keys(at + lane, columns_ptr, lasting, passing, capacity, rim, low, upper)
        inside = at + lane < ranks
        e = tl.load(end_ptr + j, mask=inside, other=0)
        k, v = load_key_tile(k_ptr, v_ptr, j.to(tl.int64), k_t, v_t, inside, DIM, PAD_DIM, True)
        latest = upper + at + lane - (lasting + passing + low)  # j from `upper` on, which is what the mask asks
        middle, half = _lifetimes(latest, e, first + t_first)
        acc, total, peak = _softmax_step(acc, total, peak, q, k, v, steep, middle, half, scale, True, PRECISION)

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("inf"), peak + tl.math.log2(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + n * tokens * GROUP + row, lse, mask=in_rows)
    dim = tl.arange(0, PAD_DIM)
    out_at = row_offsets(row, HEADS * GROUP * DIM, DIM, GROUP)[:, None] + dim[None, :]
    out_ptr += b * tokens * (HEADS * GROUP * DIM) + h * (GROUP * DIM)
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & (dim < DIM)[None, :])


def _check(q: Tensor, k: Tensor, v: Tensor, end: Tensor, window: int, scale: float, offset: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: give [batch, tokens, heads, head_dim]")
        if x.dtype not in DTYPES or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}: give q, k and v in one dtype "
                "(bfloat16, float16 or float32) on one device"
            )
    batch, tokens, q_heads, dim = q.shape
    keys, heads = k.shape[1], k.shape[2]
    if v.shape != k.shape or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} don't fit: k and v need one shape, "
            "and q's batch and head_dim"
        )
    if heads < 1 or q_heads % heads:
        raise ValueError(f"{q_heads} query heads over {heads} KV heads: give a multiple of the KV heads")
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {dim} is outside 1..{MAX_HEAD_DIM}: use another backend")
    if tokens < 1 or keys < tokens:
        raise ValueError(f"{tokens} queries over {keys} keys: give 1 <= queries <= keys")
    if end.shape != (batch, keys, heads) or end.dtype != torch.int32 or end.device != q.device:
        raise ValueError(
            f"end is {end.dtype} {tuple(end.shape)} on {end.device}: give int32 {(batch, keys, heads)} on {q.device}"
        )
    if window < 1:
        raise ValueError(f"window {window} is below 1: a window counts the query's own key")
    if not 0 <= offset <= keys - tokens:
        raise ValueError(f"offset {offset} is outside 0..{keys - tokens}: cache slots come before the query tokens")
    if not scale > 0:
        raise ValueError(f"scale {scale} is not positive: fold its sign into q")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"q is on {q.device}: move it to a CUDA device or use the reference backend")


@functools.cache
def _shared_bytes(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _choose_tiles(q: Tensor) -> Tiles:
    """The fixed table's entry for q's head_dim and dtype; one stage on devices with less shared memory."""
    table = SINGLE_TILES if q.dtype == torch.float32 else HALF_TILES
    tiles = table[max(32, next_power_of_2(q.shape[3]))]
    if q.is_cuda and _shared_bytes(q.device.index) < HOPPER_SHARED_BYTES:
        names = ("forward", "query", "key")
        tiles = replace(tiles, **{name: getattr(tiles, name)._replace(stages=1) for name in names})
    return tiles


def _forward(
    q: Tensor, k: Tensor, v: Tensor, end_NS: Tensor, sizes: Geometry, tiles: Tiles, *, gradients: bool
) -> tuple[Tensor, Tensor, Schedule]:
    """Output [B, T, Q, D]; the base-2 logarithm of each row's softmax sum, +inf where a row sees no key; the plan.

    With `gradients`, the plan is one that a backward pass can follow.
    """
    heads, tile = sizes.batch * sizes.heads, tiles.forward
    with on_device(q):
        plan = build_schedule(
            end_NS,
            sizes,
            tile,
            span_tokens=tiles.span_tokens if gradients else tiles.prompt_span,
            scan=tiles.scan,
            listed=gradients or sizes.keys > tiles.unlisted,
        )
        blocks = plan.plan_NQ5.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse_NR = torch.empty(heads, sizes.tokens * sizes.group, dtype=torch.float32, device=q.device)
        _forward_kernel[(blocks * heads,)](
            q, k, v, end_NS, plan.plan_NQ5, plan.columns_NPS, out, lse_NR,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            sizes.tokens, sizes.keys, sizes.offset, sizes.first, sizes.window,
            blocks, *plan.columns_NPS.shape[1:], sizes.scale * LOG2E,
            **sizes.constants(), ROWS=tile.rows, KEYS=tile.keys, SPAN=plan.span, HAS_COLUMNS=sizes.has_columns,
            OFF_BY_ONE=sizes.off_by_one, **tile.options(),
        )  # fmt: skip
    return out, lse_NR, plan


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, end_NS, logits_BSH, stop_BS, late, sizes, tiles):
        """`late`: what the logits' gradient is of; None: they get none here."""
        out, lse_NR, plan = _forward(q, k, v, end_NS, sizes, tiles, gradients=True)
        ctx.save_for_backward(q, k, v, out, lse_NR, end_NS, logits_BSH, stop_BS)
        ctx.sizes, ctx.tiles, ctx.plan, ctx.late = sizes, tiles, plan, late
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, out, lse_NR, end_NS, logits_BSH, stop_BS = ctx.saved_tensors
        tiles, do = ctx.tiles, _unit_stride(do)
        with on_device(q):
            dq, dk, dv, delta_NR, far_NS = attention_backward(
                do,
                q,
                k,
                v,
                out,
                lse_NR,
                end_NS,
                ctx.sizes,
                ctx.plan,
                query_tile=tiles.query,
                key_tile=tiles.key,
                span_tokens=tiles.span_tokens,
                scan=tiles.scan,
                late=None if ctx.late == "presence" else ctx.late,
            )
            if ctx.late == "presence":
                far_NS = presence_gradient(do, q, k, v, lse_NR, delta_NR, end_NS, stop_BS, ctx.sizes, tiles.key)
        dlogits = None
        if logits_BSH is not None:
            r_BSH = logits_BSH.float().sigmoid()
            far_BSH = far_NS.view(-1, ctx.sizes.heads, ctx.sizes.keys).transpose(1, 2)
            dlogits = (far_BSH * r_BSH * (1 - r_BSH)).to(logits_BSH.dtype)
        return dq, dk, dv, None, dlogits, None, None, None, None


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    *,
    window: int,
    scale: float | None = None,
    off_by_one: bool = False,
    offset: int | None = None,
    late: LateGradient | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Causal attention in which every key has a last query (arXiv 2510.20787, section 3), differentiable in q, k, v.

    Query t has index i = t + keys − queries; key j is visible to it iff j <= i < end[b, j, h]. Query head n reads
    KV head n // (query heads / KV heads). A query that sees nothing gives 0. Softmax and sums are float32.

    Args:
        q: [B, T, Q, D], bfloat16, float16 or float32.
        k, v: [B, S, H, D], S >= T, Q a multiple of H.
        end: [B, S, H] int32.
        window: keys up to this distance before a query (its own counted) are read as contiguous tiles, others one
            by one if they live longer. It decides the speed, never the result.
        scale: factor of the scores; None: D ** -0.5.
        off_by_one: with 1 added to the softmax's denominator (arXiv 2309.17453, equation 2).
        offset: keys below it are cache slots, whose ends have nothing to do with their place; None: S − T.
        late: with S = T, logits that get a straight-through gradient from the queries at least `window` tokens
            behind: there, `window` does decide.
        tiles: tile shapes; None: the fixed table's entry for head_dim and dtype.

    Returns:
        [B, T, Q, D] in q's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that don't fit; no CUDA device.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    offset = k.shape[1] - q.shape[1] if offset is None else offset
    _check(q, k, v, end, window, scale, offset)
    logits, of, stop = late or (None, None, None)
    if logits is not None and (logits.shape != end.shape or q.shape[1] != k.shape[1]):
        raise ValueError(
            f"logits {tuple(logits.shape)} for {q.shape[1]} queries and ends {tuple(end.shape)}: give one a KV head "
            "and token, and as many queries as keys"
        )
    batch, keys, heads, dim = k.shape
    sizes = Geometry(
        batch=batch,
        tokens=q.shape[1],
        keys=keys,
        heads=heads,
        group=q.shape[2] // heads,
        dim=dim,
        offset=offset,
        window=min(window, keys),
        scale=scale,
        single=q.dtype == torch.float32,
        off_by_one=off_by_one,
    )
    end_NS = end.transpose(1, 2).contiguous().view(batch * heads, keys)
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    tiles = tiles or _choose_tiles(q)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, logits) if x is not None):
        stop = stop.contiguous() if of == "presence" else None
        return _IntervalAttention.apply(q, k, v, end_NS, logits, stop, of, sizes, tiles)
    return _forward(q, k, v, end_NS, sizes, tiles, gradients=False)[0]
