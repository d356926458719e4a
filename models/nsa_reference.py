"""Native sparse attention in PyTorch, for any device (Yuan et al., arXiv 2502.11089, with pooled blocks).

A document is cut into blocks. A query reads the mean key and value of every block that is full by then
(compressed branch), all tokens of a few blocks that its group of heads finds important (selected branch) and the
last tokens (window branch); a gate a head and branch weighs the three.

Keys lie in slots, and everything below is told in slots: a query's own, the first of its document and the first of
each block. A slot is an index of the row in the parallel form and the position in the cached one, where all
queries of a call may read all slots up to their own.

Shapes: B batch, T queries, K slots, H KV heads, N query heads, G = N / H, D head dimension, C blocks, S selected
blocks, L = S * block size, M slots asked for.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lte.attention import interval_attention
from lte.layout import Layout, check_cu_seqlens
from lte.visibility import lifetimes

# elements of gathered keys that one piece of the queries may take
_GATHERED = 1 << 23


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    block_size: int,
    selected_blocks: int,
    window: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The three branches over whole documents, differentiable in q, k, v and gates.

    Args:
        q: [B, T, N, D]; N is a multiple of H.
        k, v: [B, T, H, D].
        gates: [B, T, N, 3], weights of the compressed, the selected and the window branch.
        block_size: tokens in a block.
        selected_blocks: blocks read whole, of which the first, the previous and the own one are always three.
        window: keys in the window, the query's own included.
        scale: factor of the scores; D ** -0.5 by default.
        cu_seqlens: [M + 1] integers, boundaries of M packed documents; then B is 1.

    Returns:
        [B, T, N, D] in q's dtype.

    Raises:
        ValueError: fewer than three selected blocks, or boundaries that don't fit.
    """
    batch, length = q.shape[:2]
    check_blocks(block_size, selected_blocks)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
    layout = Layout(cu_seqlens=cu_seqlens)
    blocks = parallel_blocks(
        q, k, v, gates, block_size=block_size, selected_blocks=selected_blocks, scale=scale, layout=layout
    )
    near = parallel_window(q, k, v, window=window, scale=scale, layout=layout, backend="reference")
    return blocks + (near * gates[..., 2:]).to(q.dtype)


def check_blocks(block_size: int, selected_blocks: int) -> None:
    """Raises ValueError for an empty block, or for less than the blocks that are always selected."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    if selected_blocks < 3:
        raise ValueError(
            f"selected_blocks={selected_blocks} must be at least 3: a document's first block, the query's own and "
            "the one before are always among them"
        )


def parallel_blocks(
    q_BTND: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    gates_BTN3: Tensor,
    *,
    block_size: int,
    selected_blocks: int,
    layout: Layout,
    scale: float | None = None,
) -> Tensor:
    """Compressed and selected branch over whole documents, weighted and added [B, T, N, D]."""
    batch, length = q_BTND.shape[:2]
    device = q_BTND.device
    index_T = torch.arange(length, device=device)
    position_BT = layout.positions(batch, length, device)
    # padding stands before every block and reads nothing
    index_BT = torch.where(position_BT < 0, -1, index_T)
    start_C = block_starts(length, block_size, layout, device)
    k_BHKD, v_BHKD = k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2)
    # before queries gather them, or their gradients would be summed in the inputs' dtype
    dtype = torch.promote_types(q_BTND.dtype, torch.float32)
    slot_M = (start_C[:, None] + torch.arange(block_size, device=device)).flatten()
    slot_BHM = slot_M.clamp(max=length - 1).expand(batch, k_BHKD.shape[1], -1)
    return attend_blocks(
        q_BTND,
        k_BHKD.to(dtype),
        v_BHKD.to(dtype),
        pool(take(k_BHKD, slot_BHM), block_size),
        pool(take(v_BHKD, slot_BHM), block_size),
        gates_BTN3,
        index_BT=index_BT,
        first_BT=index_BT - position_BT,
        start_C=start_C,
        block_size=block_size,
        selected_blocks=selected_blocks,
        scale=scale,
    )


def parallel_window(
    q_BTND: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    *,
    window: int,
    layout: Layout,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Window branch over whole documents [B, T, N, D]; backends as in lte/attention.py."""
    batch, length, heads = k_BTHD.shape[:3]
    end_BTH = lifetimes(
        None, batch=batch, length=length, heads=heads, window=window, budget=0, layout=layout, device=q_BTND.device
    )
    return interval_attention(
        q_BTND, k_BTHD, v_BTHD, end_BTH, window=window, scale=scale, backend=backend, cu_seqlens=layout.cu_seqlens
    )


def block_starts(length: int, block_size: int, layout: Layout, device: torch.device) -> Tensor:
    """First row index [C] of every block; each document starts one, and its last may be short."""
    bounds = [0, length] if layout.cu_seqlens is None else layout.cu_seqlens.tolist()
    return torch.cat([torch.arange(a, b, block_size, device=device) for a, b in pairwise(bounds)])


def take(x_BHKD: Tensor, slot_BHM: Tensor) -> Tensor:
    """Entries [B, H, M, D] of the given slots."""
    return x_BHKD.gather(2, slot_BHM[..., None].expand(-1, -1, -1, x_BHKD.shape[-1]))


def pool(x_BHMD: Tensor, block_size: int) -> Tensor:
    """Means [B, H, C, D] of M = C * block_size entries, summed in at least float32, in x's dtype."""
    dtype = torch.promote_types(x_BHMD.dtype, torch.float32)
    return x_BHMD.unflatten(2, (-1, block_size)).to(dtype).mean(3).to(x_BHMD.dtype)


def attend_blocks(
    q_BTND: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    pooled_k_BHCD: Tensor,
    pooled_v_BHCD: Tensor,
    gates_BTN3: Tensor,
    *,
    index_BT: Tensor,
    first_BT: Tensor,
    start_C: Tensor,
    block_size: int,
    selected_blocks: int,
    scale: float | None = None,
) -> Tensor:
    """Compressed and selected branch, weighted by the first two gates and added; in at least float32 inside.

    Args:
        k_BHKD, v_BHKD: keys and values by slot; what lies after a query's slot is never read, but must be finite.
        pooled_k_BHCD, pooled_v_BHCD: means of the blocks; of a block that isn't full any finite value.
        index_BT: slot of each query; -1 for padding, which gets zeros.
        first_BT: first slot of the query's document.
        start_C: first slot of each block, rising.

    Returns:
        [B, T, N, D] in q's dtype.
    """
    batch, length, _, dim = q_BTND.shape
    heads = k_BHKD.shape[1]
    scale = dim**-0.5 if scale is None else scale
    count = min(selected_blocks, len(start_C))
    step = max(1, _GATHERED // max(1, batch * heads * count * block_size * dim))
    dtype = torch.promote_types(q_BTND.dtype, torch.float32)
    pieces = []
    for begin in range(0, max(1, length), step):
        piece = slice(begin, begin + step)
        with torch.autocast(q_BTND.device.type, enabled=False):
            out = _attend_piece(
                q_BTND[:, piece].to(dtype) * scale,
                k_BHKD,
                v_BHKD,
                pooled_k_BHCD.to(dtype),
                pooled_v_BHCD.to(dtype),
                gates_BTN3[:, piece].to(dtype),
                index_BT[:, piece, None],
                first_BT[:, piece, None],
                start_C,
                block_size,
                count,
            )
        pieces.append(out.to(q_BTND.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _attend_piece(
    q_BTND: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    pooled_k_BHCD: Tensor,
    pooled_v_BHCD: Tensor,
    gates_BTN3: Tensor,
    index_BT1: Tensor,
    first_BT1: Tensor,
    start_C: Tensor,
    block_size: int,
    count: int,
) -> Tensor:
    """`attend_blocks` for some of the queries, already scaled."""
    groups = k_BHKD.shape[1], -1
    q = q_BTND.unflatten(2, groups).permute(0, 2, 3, 1, 4)
    gates = gates_BTN3.unflatten(2, groups).permute(0, 2, 3, 1, 4)
    full_BTC = (start_C >= first_BT1) & (start_C + block_size <= index_BT1 + 1)
    weight_BHGTC = _softmax(torch.einsum("bhgtd,bhcd->bhgtc", q, pooled_k_BHCD), full_BTC[:, None, None])
    compressed = torch.einsum("bhgtc,bhcd->bhgtd", weight_BHGTC, pooled_v_BHCD)
    has_full = full_BTC.any(-1, keepdim=True)[:, None, None]
    importance_BHTC = weight_BHGTC.detach().sum(2)
    slot, visible = _select(importance_BHTC, index_BT1, first_BT1, start_C, block_size, count)
    k, v = (take(x, slot.flatten(2)).to(q.dtype).unflatten(2, slot.shape[2:]) for x in (k_BHKD, v_BHKD))
    weight_BHGTL = _softmax(torch.einsum("bhgtd,bhtld->bhgtl", q, k), visible[:, :, None])
    selected = torch.einsum("bhgtl,bhtld->bhgtd", weight_BHGTL, v)
    is_real = (index_BT1 >= 0)[:, None, None]
    out = compressed * gates[..., :1] * has_full + selected * gates[..., 1:2] * is_real
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _softmax(score: Tensor, mask: Tensor) -> Tensor:
    """Weights over the last axis, 0 where the mask doesn't hold; finite without meaning where it never does."""
    # added rather than filled in, since the backward pass of a sum is free
    bias = torch.zeros(mask.shape, dtype=score.dtype, device=score.device)
    return (score + bias.masked_fill_(~mask, torch.finfo(score.dtype).min)).softmax(-1)


def _select(
    importance_BHTC: Tensor, index_BT1: Tensor, first_BT1: Tensor, start_C: Tensor, block_size: int, count: int
) -> tuple[Tensor, Tensor]:
    """Slots [B, H, T, L] of each query's selected blocks, and whether it may read them.

    A document's first block, the query's own and the previous one come first, then those of largest importance
    (the sum of the compressed branch's weights over the group), ties to the earlier.
    """
    own_BT1 = index_BT1 - (index_BT1 - first_BT1) % block_size
    begun_BTC = (start_C >= first_BT1) & (start_C <= index_BT1)
    always_BTC = (start_C == first_BT1) | (start_C >= own_BT1 - block_size)
    rank_BHTC = importance_BHTC.masked_fill((begun_BTC & always_BTC)[:, None], torch.inf)
    rank_BHTC = rank_BHTC.masked_fill(~begun_BTC[:, None], -1.0)
    # stable, for topk breaks ties as it likes; blocks that underflow to 0 do tie
    best_BHTS = rank_BHTC.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    begin_BHTS = start_C[best_BHTS]
    slot = (begin_BHTS[..., None] + torch.arange(block_size, device=start_C.device)).flatten(3)
    index_B1T1 = index_BT1[:, None]
    # where fewer blocks have begun than are asked for, the rest are others, which may reach into this document
    begun_BHTS = begun_BTC[:, None].expand_as(importance_BHTC).gather(3, best_BHTS)
    visible = (slot <= index_B1T1) & begun_BHTS.repeat_interleave(block_size, dim=3)
    return slot.minimum(index_B1T1.clamp(min=0)), visible
