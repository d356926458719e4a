"""What each key's being there changes for the queries beyond its window, kept or not (lte/straight_through.py).

A tile of keys takes all later rows of its documents, so the cost is that of full attention, whatever is kept. Letters
as in lte/kernels/attention.py; tiles are [keys, rows].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.attention_backward import LOG2E
from lte.kernels.attention_tiles import load_key_tile, load_row_block
from lte.kernels.columns import Geometry, Tile
from lte.kernels.launch import ceil_div
from lte.straight_through import LEAST_REST


@triton.jit(do_not_specialize=["tokens", "window"])
def _presence_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, stop_ptr, do_ptr, lse_ptr, delta_ptr, far_ptr, q_b, q_t, q_h, k_b, k_t, k_h, v_b,
    v_t, v_h, do_b, do_t, do_h, tokens, window, scale_log2, batch_heads,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, LEAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) % batch_heads).to(tl.int64)
    tile = tl.program_id(0) // batch_heads
    b = n // HEADS
    h = n % HEADS
    q_ptr += b * q_b + h * GROUP * q_h
    do_ptr += b * do_b + h * GROUP * do_h
    lse_ptr += n * tokens * GROUP
    delta_ptr += n * tokens * GROUP
    j = tile * KEYS + tl.arange(0, KEYS)
    inside = j < tokens
    e = tl.load(end_ptr + n * tokens + j, mask=inside, other=0)
    stop = tl.minimum(tl.load(stop_ptr + b * tokens + j, mask=inside, other=0), tokens)
    j_row = j.to(tl.int64)
    k, v = load_key_tile(
        k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h, j_row, k_t, v_t, inside, DIM, PAD_DIM, True
    )
    far = tl.zeros([KEYS], tl.float32)
    for block in range((tile * KEYS + window) * GROUP // ROWS, tl.cdiv(tl.max(stop, 0) * GROUP, ROWS)):
        q, do, lse, delta = load_row_block(
            q_ptr, do_ptr, lse_ptr, delta_ptr, block, q_t, q_h, do_t, do_h, tokens * GROUP,
            GROUP, DIM, PAD_DIM, ROWS, True,
        )  # fmt: skip
        i = (block * ROWS + tl.arange(0, ROWS)) // GROUP
        above = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :]
        weight = tl.math.exp2(above)
        kept = weight / tl.maximum(1 - weight, LEAST)
        absent = 1 / (1 + tl.math.exp2(-above))
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        late = (i[None, :] >= j[:, None] + window) & (i[None, :] < stop[:, None])
        change = tl.where(i[None, :] < e[:, None], kept, absent) * (dp - delta[None, :])
        far += tl.sum(tl.where(late, change, 0.0), 1)
    tl.store(far_ptr + n * tokens + j_row, far, mask=inside)


def presence_gradient(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_NR: Tensor,
    delta_NR: Tensor,
    end_NS: Tensor,
    stop_BS: Tensor,
    sizes: Geometry,
    tile: Tile,
) -> Tensor:
    """The gradient of each key's being there, float32 [N, S], summed over the queries at least a window behind it.

    Args:
        do, q, k, v: of the attention, as many keys as queries.
        lse_NR: base-2 logarithms of the softmax sums; delta_NR: each row's sum of do * out.
        end_NS, stop_BS: int32, the query that no longer reads a key, and the end of its document.
    """
    far_NS = torch.empty(end_NS.shape, dtype=torch.float32, device=q.device)
    heads = sizes.batch * sizes.heads
    _presence_kernel[(ceil_div(sizes.tokens, tile.keys) * heads,)](
        q, k, v, end_NS, stop_BS, do, lse_NR, delta_NR, far_NS,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
        sizes.tokens, sizes.window, sizes.scale * LOG2E, heads,
        **sizes.constants(), ROWS=tile.rows, KEYS=tile.keys, LEAST=LEAST_REST, **tile.options(),
    )  # fmt: skip
    return far_NS
