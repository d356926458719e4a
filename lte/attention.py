"""Attention over sinks, a sliding window and retained tokens, in interchangeable backends.

Every backend takes the rule as `end`: key j is visible to query i iff j <= i < end[j] (lte/visibility.py).

Shapes: B batch, T tokens, Q queries, K keys, H KV heads, N query heads, G = N / H, D head dimension.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lte.layout import Layout, check_cu_seqlens
from lte.straight_through import STRAIGHT_THROUGH, LateGradient, give_gradient, give_late_gradient
from lte.visibility import lifetimes, visible_pairs

BACKENDS = ("auto", "reference", "flex", "triton")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor | None = None,
    *,
    window: int | None,
    sinks: int = 0,
    budget: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    off_by_one: bool = False,
    backend: str = "auto",
    gradient_from: str = "all",
) -> Tensor:
    """Causal attention under the visibility rule (arXiv 2510.20787; sinks: arXiv 2309.17453).

    Differentiable in q, k, v, and in logits by the straight-through estimator: a logit receives the gradient that
    it would have if v had been multiplied by sigmoid(logit), or another one of lte/straight_through.py.

    Args:
        q: queries [B, T, N, D].
        k: keys [B, T, H, D]; N is a multiple of H, and a group of N / H query heads shares a KV head.
        v: values [B, T, H, D].
        logits: retention logits [B, T, H], or None if nothing is retained beyond the window.
        window: keys in the sliding window, the query's own included; None for full attention.
        sinks: first tokens of every document that stay visible.
        budget: most tokens retained at a time; None for no limit, as in training.
        cu_seqlens: [M + 1] integers, boundaries of M packed documents; then B is 1.
        scale: factor of the scores; D ** -0.5 by default.
        off_by_one: add 1 to the softmax's denominator, as if every query also saw a key of score 0 and value 0 (the
            "zero sink", arXiv 2309.17453 equation 2).
        backend: `reference` (PyTorch), `flex` (FlexAttention), `triton`, or `auto`: triton on CUDA, else reference.
        gradient_from: the queries from which a logit gets its gradient: `all` that read its key (as in the paper), or
            those beyond its window alone, where retention decides what they read: `beyond_window`, of a factor of the
            value; `weight_beyond_window`, of the softmax weight; `presence_beyond_window`, of the key's being there,
            which evicted keys have too. These three not with `flex`.

    Returns:
        [B, T, N, D] in q's dtype.

    Raises:
        ValueError: shapes, head counts, boundaries, rule or backend that don't fit.
    """
    batch, length, heads = _check_shapes(q, k, v, logits)
    if gradient_from not in STRAIGHT_THROUGH:
        raise ValueError(f"gradient_from={gradient_from!r} is unknown; use one of {', '.join(STRAIGHT_THROUGH)}")
    layout = Layout(cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
    end_BTH = lifetimes(
        logits,
        batch=batch,
        length=length,
        heads=heads,
        window=window,
        sinks=sinks,
        budget=budget,
        layout=layout,
        device=q.device,
    )
    late = None
    if logits is not None:
        v, late = give_gradient(v, logits, sinks=sinks, layout=layout, gradient_from=gradient_from)
    return interval_attention(
        q,
        k,
        v,
        end_BTH,
        window=window,
        scale=scale,
        off_by_one=off_by_one,
        backend=backend,
        cu_seqlens=cu_seqlens,
        late=late,
    )


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    *,
    window: int | None,
    scale: float | None = None,
    off_by_one: bool = False,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
    late: LateGradient | None = None,
) -> Tensor:
    """Attention in which key j serves the queries j, j + 1, …, end[j] - 1.

    Args:
        q: [B, Q, N, D]; query t stands at index t + K - Q of the keys.
        k, v: [B, K, H, D] with K >= Q. The first K - Q may be cached keys in any order.
        end: [B, K, H] int32.
        window: schedule hint: which keys are dense; the result never depends on it.
        scale: factor of the scores; D ** -0.5 by default.
        off_by_one, backend: as in `retained_attention`.
        cu_seqlens: schedule hint: no key is visible across these boundaries (as `end` says already).
        late: with K = Q, logits that get a gradient from the queries i >= j + window alone, so that the window is no
            mere hint then.

    Returns:
        [B, Q, N, D]; zero where no key is visible.

    Raises:
        ValueError: an unknown backend, or logits where it has no such gradient.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if q.is_cuda else "reference"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "triton":
        keys = k.shape[1]
        if q.shape[1] == 1 and _is_inference(q, k, v):
            from lte.kernels.decode_attention import decode_attention

            slots = (x.transpose(1, 2) for x in (k, v, end))
            out = decode_attention(q[:, 0], *slots, above=keys - 1, scale=scale, off_by_one=off_by_one)
            return out[:, None]
        from lte.kernels.attention import interval_attention as triton_attention

        window = keys if window is None else min(window, keys)
        return triton_attention(q, k, v, end, window=window, scale=scale, off_by_one=off_by_one, late=late)
    if backend == "flex":
        if late is not None:
            raise ValueError("backend='flex' has no gradient from beyond the window alone; use triton or reference")
        return _flex(q, k, v, end, scale, off_by_one)

    def attend(q: Tensor, k: Tensor, v: Tensor, end: Tensor, late: LateGradient | None) -> Tensor:
        out = _reference(q, k, v, end, scale, off_by_one)
        if late is None or window is None:
            return out
        return give_late_gradient(out, late, q, k, v, end, window=window, scale=scale, off_by_one=off_by_one)

    if cu_seqlens is None:
        return attend(q, k, v, end, late)
    pieces = [
        attend(
            *(x[:, a:b] for x in (q, k, v)),
            end[:, a:b] - a,
            late and LateGradient(late.logits_BTH[:, a:b], late.of, late.stop_BT[:, a:b] - a),
        )
        for a, b in pairwise(cu_seqlens.tolist())
        if b > a
    ]
    return torch.cat(pieces, 1)


def _is_inference(*tensors: Tensor) -> bool:
    """Whether the kernel for one query, which has no backward pass, may take these."""
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    one_dtype = all(x.dtype == tensors[0].dtype for x in tensors)
    return not differentiable and one_dtype and tensors[0].dtype in KERNEL_DTYPES and tensors[0].shape[-1] <= 256


def softmax_weights(score: Tensor, off_by_one: bool = False) -> Tensor:
    """Softmax over the last dimension, of scores of which some are -inf; 0 where all are.

    Args:
        off_by_one: with 1 added to the denominator (arXiv 2309.17453, equation 2).
    """
    if off_by_one:
        return F.pad(score, (0, 1)).softmax(-1)[..., :-1]
    return score.softmax(-1).nan_to_num(0.0)


def _reference(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float, off_by_one: bool) -> Tensor:
    """Masked attention in float32 (float64 stays), through torch's own scaled_dot_product_attention."""
    batch, queries, query_heads, _ = q.shape
    keys, heads = k.shape[1:3]
    group = query_heads // heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    # finite, so that a row without keys is no NaN; it is zeroed below
    hidden_BHQK = ~visible_pairs(end, queries)
    bias_BHQK = torch.zeros(hidden_BHQK.shape, dtype=dtype, device=q.device)
    bias_BHQK.masked_fill_(hidden_BHQK, torch.finfo(dtype).min / 2)

    def per_group(x_BTHD: Tensor) -> Tensor:
        """[B * H, G, T, D]: the heads of a group share a mask, and KV heads are not copied."""
        x = x_BTHD.to(dtype).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        return x.expand(-1, group, -1, -1)

    if off_by_one:
        bias_BHQK = F.pad(bias_BHQK, (0, 1))
        k, v = _with_zero_key(k), _with_zero_key(v)
    bias = bias_BHQK.flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(per_group(q), per_group(k), per_group(v), attn_mask=bias, scale=scale)
    out_BQHGD = out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2, 4)
    # some key serves query i iff the latest end among keys up to i lies beyond i
    i_Q = torch.arange(keys - queries, keys, device=end.device)
    empty_BQH = end.cummax(1).values[:, keys - queries :] <= i_Q[:, None]
    return out_BQHGD.masked_fill(empty_BQH[..., None, None], 0.0).flatten(2, 3).to(q.dtype)


def _with_zero_key(x_BKHD: Tensor) -> Tensor:
    """One more key (or value), of zeros: it has score 0 for every query."""
    return F.pad(x_BKHD, (0, 0, 0, 0, 0, 1))


def _flex(q: Tensor, k: Tensor, v: Tensor, end: Tensor, scale: float, off_by_one: bool) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, queries, query_heads, _ = q.shape
    keys, heads = k.shape[1:3]
    group = query_heads // heads
    end_BHK = end.transpose(1, 2).contiguous()

    def lives(b, h, i, j):
        i = i + (keys - queries)
        return (j <= i) & (i < end_BHK[b, h // group, j])

    def lives_or_zero(b, h, i, j):
        return (j == keys) | lives(b, h, i, j)

    total = keys
    if off_by_one:
        k, v, end_BHK, total = _with_zero_key(k), _with_zero_key(v), F.pad(end_BHK, (0, 1)), keys + 1
    if q.is_cuda:
        attend, build = torch.compile(flex_attention), torch.compile(create_block_mask)
    else:
        attend, build = flex_attention, create_block_mask
    mask = build(lives_or_zero if off_by_one else lives, batch, query_heads, queries, total, device=q.device)
    out = attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, scale=scale, enable_gqa=group > 1
    )
    return out.transpose(1, 2)


def in_cache_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    *,
    positions: Tensor,
    frequencies: Tensor,
    scale: float | None = None,
    off_by_one: bool = False,
    block: int = 64,
) -> Tensor:
    """Attention with rotary positions counted among the visible keys (arXiv 2309.17453, section 3.2).

    For a query that sees keys of positions 0, 1, 2, 3, 6, 7, 8 these have places 0 … 6, and the query, which sees
    itself, has the last one. A pair's place difference depends on the query, so scores are rotated pair by pair.

    Args:
        q: unrotated queries [B, Q, N, D]; k, v: unrotated [B, K, H, D]; end: [B, K, H] int32, as in
            `interval_attention`.
        positions: [B, K, H] integers that order the keys.
        frequencies: [D / 2] float32 radians per place.
        scale: factor of the scores; D ** -0.5 by default.
        off_by_one: as in `retained_attention`.
        block: queries taken at once; memory is block * K * D.
    """
    queries, query_heads, dim = q.shape[1:]
    heads = k.shape[2]
    group = query_heads // heads
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = dim**-0.5 if scale is None else scale
    mask_BHQK = visible_pairs(end, queries)
    order_BHK = positions.transpose(1, 2).argsort(-1)
    mask_BHQK = mask_BHQK.gather(-1, order_BHK[:, :, None, :].expand_as(mask_BHQK))
    k_BHKD, v_BHKD = (
        x.to(dtype).transpose(1, 2).gather(2, order_BHK[..., None].expand(-1, -1, -1, dim)) for x in (k, v)
    )
    k1, k2 = k_BHKD[:, :, None, None].chunk(2, -1)
    pieces = []
    for first in range(0, queries, block):
        mask = mask_BHQK[:, :, first : first + block]
        rank = mask.cumsum(-1)
        # the query's own place is the last visible one
        distance = (rank[..., -1:] - rank)[:, :, None, ..., None].to(frequencies.dtype)
        angle = distance * frequencies
        q1, q2 = (
            q[:, first : first + block].to(dtype).unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4)[..., None, :]
        ).chunk(2, -1)
        score = ((q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin()).sum(-1) * scale
        weight = softmax_weights(score.masked_fill(~mask[:, :, None], -torch.inf), off_by_one)
        out_BHGQD = weight @ v_BHKD[:, :, None]
        pieces.append(out_BHGQD.permute(0, 3, 1, 2, 4).flatten(2, 3))
    return torch.cat(pieces, 1).to(q.dtype)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None) -> tuple[int, int, int]:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q [B, T, N, D], k and v [B, T, H, D] expected, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch, length, heads, _ = k.shape
    if q.shape[2] % heads:
        raise ValueError(f"{q.shape[2]} query heads can't share {heads} KV heads: make the first a multiple")
    if logits is not None and logits.shape != (batch, length, heads):
        raise ValueError(f"logits {tuple(logits.shape)} must be one a KV head and token: {(batch, length, heads)}")
    return batch, length, heads
