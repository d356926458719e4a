"""Attention of one query over the slots of a cache, split over programs, in one launch.

With few rows there are too few heads to fill a GPU, so the keys of a head are shared out. Each program leaves its
part of the softmax in memory; the one that finishes last adds the parts up, always in the same order.

Letters in shape suffixes: B batch, N query heads, H KV heads, S keys, D head dimension, P programs of a head.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.launch import launch_options, on_device, wait_for_inputs

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256
# most keys of one tile, bytes of their k, and the most programs that share a head
MAX_BLOCK = 64
BLOCK_BYTES = 16384
MAX_SPLITS = 64


@triton.jit
def _load_queries(
    q_at, cos_ptr, sin_ptr, b, in_group, q_head, DIM: tl.constexpr, PAD_DIM: tl.constexpr, ROTARY: tl.constexpr
):
    """The query heads of a group [heads, D], rotated by halves."""
    dim = tl.arange(0, PAD_DIM)
    g = tl.arange(0, in_group.shape[0])
    inside = in_group[:, None] & (dim < DIM)[None, :]
    q = tl.load(q_at + g[:, None] * q_head + dim[None, :], mask=inside, other=0.0)
    if ROTARY:
        half: tl.constexpr = DIM // 2
        partner = tl.where(dim < half, dim + half, dim - half)
        other = tl.load(q_at + g[:, None] * q_head + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + b * half + dim % half, mask=dim < DIM, other=0.0)
        sin = tl.load(sin_ptr + b * half + dim % half, mask=dim < DIM, other=0.0)
        sin = tl.where(dim < half, -sin, sin)
        q = (q.to(tl.float32) * cos[None, :] + other * sin[None, :]).to(q.dtype)
    return q


@triton.jit(do_not_specialize=["keys", "above", "share", "splits"])
def _split_kernel(
    q_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, marks_ptr, part_ptr, stats_ptr, counter_ptr, seen_ptr, out_ptr,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, m_b, m_h, m_s, keys, above, share, splits, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAD_GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr, PAD_SPLITS: tl.constexpr, ROTARY: tl.constexpr, OFF_BY_ONE: tl.constexpr,
    ADVANCE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = n // HEADS
    h = n % HEADS
    wait_for_inputs(OVERLAP)
    if ADVANCE:  # noqa: SIM102
        if (h == 0) & (split == 0):  # nothing else in this launch reads the count
            tl.store(seen_ptr + b, tl.load(seen_ptr + b) + 1)
    head = tl.arange(0, PAD_GROUP)
    dim = tl.arange(0, PAD_DIM)
    in_dim = dim < DIM
    q_at = q_ptr + b * q_b + h * GROUP * q_h
    q = _load_queries(q_at, cos_ptr, sin_ptr, b, head < GROUP, q_h, DIM, PAD_DIM, ROTARY)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    marks_ptr += b * m_b + h * m_h

    acc = tl.zeros([PAD_GROUP, PAD_DIM], tl.float32)
    total = tl.zeros([PAD_GROUP], tl.float32)
    peak = tl.full([PAD_GROUP], float("-inf"), tl.float32)
    if OFF_BY_ONE:  # the first program of a head has seen a key of score 0 and value 0
        total = tl.where(split == 0, total + 1.0, total)
        peak = tl.where(split == 0, 0.0, peak)
    for start in range(split * share, min(keys, (split + 1) * share), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < keys
        slot = slot.to(tl.int64)
        visible = inside & (tl.load(marks_ptr + slot * m_s, mask=inside, other=above) > above)
        at = inside[:, None] & in_dim[None, :]
        k = tl.load(k_ptr + slot[:, None] * k_s + dim[None, :], mask=at, other=0.0)
        v = tl.load(v_ptr + slot[:, None] * v_s + dim[None, :], mask=at, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        score = tl.where(visible[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key so far: keep -inf - -inf out
        p = tl.math.exp2(score - base[:, None])
        shrink = tl.math.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak

    inside = (head < GROUP)[:, None] & in_dim[None, :]
    out_at = out_ptr + n * (GROUP * DIM) + head[:, None] * DIM + dim[None, :]
    if PAD_SPLITS == 1:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part_at = part_ptr + (n * splits + split) * (GROUP * DIM)
        tl.store(part_at + head[:, None] * DIM + dim[None, :], acc, mask=inside)
        stats_at = stats_ptr + (n * splits + split) * (2 * GROUP) + head
        tl.store(stats_at, peak, mask=head < GROUP)
        tl.store(stats_at + GROUP, total, mask=head < GROUP)
        tl.debug_barrier()  # all threads have written their part
        if tl.atomic_add(counter_ptr + n, 1, sem="acq_rel") == splits - 1:
            _add_parts(
                part_ptr + n * splits * (GROUP * DIM), stats_ptr + n * splits * (2 * GROUP),
                out_ptr + n * (GROUP * DIM), splits, GROUP, DIM, min(PAD_DIM, 64), PAD_SPLITS,
            )  # fmt: skip


@triton.jit
def _add_parts(
    part_ptr, stats_ptr, out_ptr, splits, GROUP: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr,
    PAD_SPLITS: tl.constexpr,
):  # fmt: skip
    """The output of a head group from its parts; read past the first-level cache, which may be stale."""
    split = tl.arange(0, PAD_SPLITS)
    there = split < splits
    for g in range(GROUP):
        stats_at = stats_ptr + split * (2 * GROUP) + g
        peak = tl.load(stats_at, mask=there, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(stats_at + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        top = tl.max(peak, 0)
        weight = tl.math.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weight * total, 0)
        weight = weight / tl.where(total == 0.0, 1.0, total)
        for first in range(0, DIM, PART):
            dim = first + tl.arange(0, PART)
            part = tl.load(
                part_ptr + split[:, None] * (GROUP * DIM) + g * DIM + dim[None, :],
                mask=there[:, None] & (dim < DIM)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            out = tl.sum(weight[:, None] * part, 0)
            tl.store(out_ptr + g * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < DIM)


@cache
def _processors(device: torch.device) -> int:
    # without a GPU the kernel runs in the interpreter: any number will do
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _splits(keys: int, block: int, groups: int, device: torch.device) -> tuple[int, int]:
    """Programs of a head, and keys of each: about two programs a multiprocessor in all."""
    wanted = max(1, min(MAX_SPLITS, triton.cdiv(keys, block), triton.cdiv(2 * _processors(device), groups)))
    share = triton.cdiv(triton.cdiv(keys, wanted), block) * block
    return triton.cdiv(keys, share), share


def decode_attention(
    q_BND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    marks_BHS: Tensor,
    *,
    above: int = -1,
    scale: float | None = None,
    off_by_one: bool = False,
    rotary: tuple[Tensor, Tensor] | None = None,
    counter: Tensor | None = None,
    seen_B: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """Attention of one query a row over the keys whose mark is larger than `above`.

    Args:
        q_BND: N a multiple of H; unit stride in D.
        k_BHSD, v_BHSD: of q's dtype, any strides but unit in D.
        marks_BHS: integers, such as the slots' positions, -1 where they hold nothing.
        scale: factor of the scores; D ** -0.5 by default.
        off_by_one: with 1 added to the softmax's denominator (arXiv 2309.17453, equation 2).
        rotary: cos and sin, D / 2 contiguous float32 numbers a row, to rotate q by.
        counter: [B * H] int32 zeros, which the kernel uses up; None: made here.
        seen_B: int64 counts that go up by one.

    Returns:
        [B, N, D]; zero where no key is visible. Softmax and sums are float32.
    """
    batch, query_heads, dim = q_BND.shape
    heads, keys = k_BHSD.shape[1:3]
    q_BND, k_BHSD, v_BHSD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BND, k_BHSD, v_BHSD))
    pad_dim = max(16, triton.next_power_of_2(dim))
    block = max(16, min(MAX_BLOCK, BLOCK_BYTES // (pad_dim * q_BND.element_size())))
    splits, share = _splits(keys, block, batch * heads, q_BND.device)
    group = query_heads // heads
    device = q_BND.device
    out_BND = torch.empty(batch, query_heads, dim, dtype=q_BND.dtype, device=device)
    part = stats = None
    if splits > 1:
        part = torch.empty(batch * heads, splits, group, dim, dtype=torch.float32, device=device)
        stats = torch.empty(batch * heads, splits, 2, group, dtype=torch.float32, device=device)
        if counter is None:
            counter = torch.zeros(batch * heads, dtype=torch.int32, device=device)
    cos, sin = rotary if rotary is not None else (None, None)
    with on_device(q_BND):
        _split_kernel[(batch * heads, splits)](
            q_BND, cos, sin, k_BHSD, v_BHSD, marks_BHS, part, stats, counter, seen_B, out_BND,
            *q_BND.stride()[:2], *k_BHSD.stride()[:3], *v_BHSD.stride()[:3], *marks_BHS.stride(),
            keys, above, share, splits, (dim**-0.5 if scale is None else scale) * LOG2E,
            HEADS=heads, GROUP=group, PAD_GROUP=max(16, triton.next_power_of_2(group)), DIM=dim,
            PAD_DIM=pad_dim, BLOCK=block, PAD_SPLITS=triton.next_power_of_2(splits), ROTARY=rotary is not None,
            OFF_BY_ONE=off_by_one, ADVANCE=seen_B is not None,
            PRECISION="ieee" if q_BND.dtype == torch.float32 else "tf32", OVERLAP=overlap,
            **launch_options(overlap, warps=4),
        )  # fmt: skip
    return out_BND
