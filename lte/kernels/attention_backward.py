"""Gradients of interval attention: one kernel over query blocks (dq), two over keys (dk, dv), no atomics.

The key side is split by rows: a tile of keys takes the query rows of its window ("near", contiguous keys), and a
tile of gathered columns takes all later rows. The border is a row block per key tile (`near_rows`), so that every
visible pair is counted once. Column sums are left in the gradients themselves or, split over workers, in scratch;
the near kernel runs last and adds them. Letters as in lte/kernels/attention.py; S^T, P^T are [keys, rows] tiles.

With FAR both also sum, for each key, P^T * dP^T over the rows beyond the key's window: the gradient of a factor of
the value that only those rows see. With OF_WEIGHT they sum dS^T: that of a factor of the softmax weight. Rows of the
column kernel all lie there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.attention_tiles import load_key_tile, load_row_block, load_tile, row_offsets
from lte.kernels.columns import (
    BIG,
    Geometry,
    Schedule,
    Tile,
    block_tokens,
    build_schedule,
    is_column,
    list_columns,
    ranked_keys,
    read_plan,
    tile_shift,
)
from lte.kernels.launch import ceil_div

LOG2E = 1.4426950408889634
MAX_WORKERS = tl.constexpr(16)


@triton.jit
def _query_step(dq, q, do, k, v, i, j, e, lse, delta, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.math.exp2(s * scale - lse[:, None])
    if MASKED:
        p = tl.where((j[None, :] <= i[:, None]) & (i[:, None] < e[None, :]), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "keys", "offset", "first", "window", "blocks", "spans"])
def _query_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, plan_ptr, columns_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, q_b,
    q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, tokens, keys, offset, first, window, blocks,
    spans, capacity, scale_log2, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPAN: tl.constexpr, HAS_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
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
    i = first + row // GROUP
    q_at = q_ptr + b * q_b + h * GROUP * q_h
    do_at = do_ptr + b * do_b + h * GROUP * do_h
    packed_h = h * (GROUP * DIM) + b * tokens * (HEADS * GROUP * DIM)
    packed = row_offsets(row, HEADS * GROUP * DIM, DIM, GROUP)
    out = load_tile(out_ptr + packed_h, packed, 1, in_rows, DIM, PAD_DIM, True)
    do = load_tile(do_at, row_offsets(row, do_t, do_h, GROUP), 1, in_rows, DIM, PAD_DIM, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + n * tokens * GROUP + row, delta, mask=in_rows)
    lse = tl.load(lse_ptr + n * tokens * GROUP + row, mask=in_rows, other=float("inf"))
    q = load_tile(q_at, row_offsets(row, q_t, q_h, GROUP), 1, in_rows, DIM, PAD_DIM, True)
    dq = tl.zeros([ROWS, PAD_DIM], tl.float32)
    lane = tl.arange(0, KEYS)

    if HAS_COLUMNS:
        for at in range(0, full_columns, KEYS):
            j = tl.load(columns_ptr + at + lane).to(tl.int64)
            k, v = load_key_tile(k_ptr, v_ptr, j, k_t, v_t, None, DIM, PAD_DIM, False)
            dq = _query_step(dq, q, do, k, v, i, j, j, lse, delta, scale_log2, False, PRECISION)
    for tile in range(full, diagonal):
        start = (tile * KEYS - pad).to(tl.int64)
        k, v = load_key_tile(k_ptr + start * k_t, v_ptr + start * v_t, lane, k_t, v_t, None, DIM, PAD_DIM, False)
        dq = _query_step(dq, q, do, k, v, i, lane, lane, lse, delta, scale_log2, False, PRECISION)
    for at in range(full_columns, ranks, KEYS):
        j = ranked_keys(at + lane, columns_ptr, lasting, passing, capacity, rim, low, upper)
        inside = at + lane < ranks
        e = tl.load(end_ptr + j, mask=inside, other=0)
        k, v = load_key_tile(k_ptr, v_ptr, j.to(tl.int64), k_t, v_t, inside, DIM, PAD_DIM, True)
        latest = upper + at + lane - (lasting + passing + low)  # j from `upper` on, which is what the mask asks
        dq = _query_step(dq, q, do, k, v, i, latest, e, lse, delta, scale_log2, True, PRECISION)

    dim = tl.arange(0, PAD_DIM)
    dq_at = dq_ptr + packed_h + packed[:, None] + dim[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_rows[:, None] & (dim < DIM)[None, :])


@triton.jit
def _key_step(
    dk, dv, k, v, q, do, lse, delta, keep, scale,
    MASKED: tl.constexpr, OF_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.math.exp2(s * scale - lse[None, :])
    if MASKED:
        p = tl.where(keep, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, ds if OF_WEIGHT else p * dp


@triton.jit
def _near_rows(
    tile, pad, slot_tiles, tokens, first, window, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """One past the last row block of a key tile's near part; 0 for cache slots."""
    last = tile * KEYS - pad + KEYS - 1
    t_stop = tl.minimum(tl.maximum(last + window - first, 0), tokens)
    return tl.where(tile < slot_tiles, 0, tl.cdiv(t_stop * GROUP, ROWS))


@triton.jit
def _column_workers(columns, slots, KEYS: tl.constexpr):
    """Workers that share one tile of columns: few columns leave many scratch slots for each tile."""
    tiles = tl.cdiv(columns, KEYS)
    return tl.maximum(tl.minimum(slots // tl.maximum(tiles, 1), MAX_WORKERS), 1)


@triton.jit(do_not_specialize=["tokens", "keys", "offset", "first", "window", "tiles", "slots"])
def _column_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, columns_ptr, prefix_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, far_ptr,
    partial_ptr, far_partial_ptr, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, tokens, keys, offset,
    first, window, tiles, slots, scale_log2, scale, batch_heads,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, FAR: tl.constexpr, OF_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) % batch_heads).to(tl.int64)
    slot = tl.program_id(0) // batch_heads
    columns = tl.load(prefix_ptr + n * (tiles + 1) + tiles)
    workers = _column_workers(columns, slots, KEYS)
    at = slot // workers * KEYS + tl.arange(0, KEYS)
    if slot // workers * KEYS < columns:
        b = n // HEADS
        h = n % HEADS
        q_ptr += b * q_b + h * GROUP * q_h
        do_ptr += b * do_b + h * GROUP * do_h
        lse_ptr += n * tokens * GROUP
        delta_ptr += n * tokens * GROUP
        rows = tokens * GROUP
        pad, slot_tiles = tile_shift(offset, KEYS)
        inside = at < columns
        j = tl.load(columns_ptr + n * keys + at, mask=inside, other=0)
        e = tl.minimum(tl.load(end_ptr + n * keys + j, mask=inside, other=0), keys)
        start = _near_rows((j + pad) // KEYS, pad, slot_tiles, tokens, first, window, GROUP, ROWS, KEYS)
        # live row blocks [lo, hi) of any column, and those [full, full_stop) that all of them see whole
        lo = tl.min(tl.where(inside, start, BIG), 0)
        full = tl.max(tl.where(inside, start, 0), 0)
        hi = tl.cdiv((tl.max(tl.where(inside, e, first), 0) - first) * GROUP, ROWS)
        full_stop = (tl.min(tl.where(inside, e, keys), 0) - first) * GROUP // ROWS
        share = tl.cdiv(tl.maximum(hi - lo, 0), workers)
        lo = lo + slot % workers * share
        hi = tl.minimum(hi, lo + share)
        full = tl.minimum(tl.maximum(full, lo), tl.maximum(hi, lo))
        full_stop = tl.minimum(tl.maximum(full_stop, full), tl.maximum(hi, full))

        j_row = j.to(tl.int64)
        k, v = load_key_tile(
            k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h, j_row, k_t, v_t, inside, DIM, PAD_DIM, True
        )
        dk = tl.zeros([KEYS, PAD_DIM], tl.float32)
        dv = tl.zeros([KEYS, PAD_DIM], tl.float32)
        far = tl.zeros([KEYS], tl.float32)
        for block in range(full, full_stop):
            q, do, lse, delta = load_row_block(
                q_ptr, do_ptr, lse_ptr, delta_ptr, block, q_t, q_h, do_t, do_h, rows,
                GROUP, DIM, PAD_DIM, ROWS, False,
            )  # fmt: skip
            dk, dv, late = _key_step(dk, dv, k, v, q, do, lse, delta, None, scale_log2, False, OF_WEIGHT, PRECISION)
            if FAR:
                far += tl.sum(late, 1)
        for step in range(0, full - lo + tl.maximum(hi - full_stop, 0)):
            block = tl.where(step < full - lo, lo + step, full_stop + step - (full - lo))
            q, do, lse, delta = load_row_block(
                q_ptr, do_ptr, lse_ptr, delta_ptr, block, q_t, q_h, do_t, do_h, rows,
                GROUP, DIM, PAD_DIM, ROWS, True,
            )  # fmt: skip
            i = first + (block * ROWS + tl.arange(0, ROWS)) // GROUP
            keep = (start <= block)[:, None] & (i[None, :] < e[:, None])
            dk, dv, late = _key_step(dk, dv, k, v, q, do, lse, delta, keep, scale_log2, True, OF_WEIGHT, PRECISION)
            if FAR:
                far += tl.sum(late, 1)

        dk = dk * scale
        dim = tl.arange(0, PAD_DIM)
        if workers == 1:
            grad_at = ((b * keys + j_row) * HEADS + h)[:, None] * DIM + dim[None, :]
            mask = inside[:, None] & (dim < DIM)[None, :]
            tl.store(dk_ptr + grad_at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
            tl.store(dv_ptr + grad_at, dv.to(dv_ptr.dtype.element_ty), mask=mask)
            if FAR:
                tl.store(far_ptr + n * keys + j_row, far, mask=inside)
        else:
            part = partial_ptr + (n * slots + slot) * (2 * KEYS * DIM)
            part_at = part + tl.arange(0, KEYS)[:, None] * DIM + dim[None, :]
            tl.store(part_at, dk, mask=(dim < DIM)[None, :])
            tl.store(part_at + KEYS * DIM, dv, mask=(dim < DIM)[None, :])
            if FAR:
                tl.store(far_partial_ptr + (n * slots + slot) * KEYS + tl.arange(0, KEYS), far)


@triton.jit(do_not_specialize=["tokens", "keys", "offset", "first", "window", "tiles", "slots"])
def _near_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, prefix_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, far_ptr, partial_ptr,
    far_partial_ptr, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, tokens, keys, offset, first,
    window, tiles, slots, scale_log2, scale, batch_heads,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, HAS_COLUMNS: tl.constexpr, FAR: tl.constexpr, OF_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) % batch_heads).to(tl.int64)
    tile = tl.program_id(0) // batch_heads
    b = n // HEADS
    h = n % HEADS
    q_ptr += b * q_b + h * GROUP * q_h
    do_ptr += b * do_b + h * GROUP * do_h
    lse_ptr += n * tokens * GROUP
    delta_ptr += n * tokens * GROUP
    rows = tokens * GROUP
    pad, slot_tiles = tile_shift(offset, KEYS)
    j = tile * KEYS - pad + tl.arange(0, KEYS)
    inside = (j >= 0) & (j < keys)
    e = tl.minimum(tl.load(end_ptr + n * keys + j, mask=inside, other=0), keys)
    max_end = tl.maximum(tl.max(tl.where(inside, e, 0), 0), first)
    min_end = tl.maximum(tl.min(tl.where(inside, e, BIG), 0), first)
    j_first = tl.maximum(tile * KEYS - pad - first, 0)
    j_last = tl.maximum(tile * KEYS - pad + KEYS - 1 - first, 0)
    # live row blocks [lo, hi), and those [full, full_stop) that see every key of the tile
    hi = _near_rows(tile, pad, slot_tiles, tokens, first, window, GROUP, ROWS, KEYS)
    hi = tl.minimum(hi, tl.cdiv((max_end - first) * GROUP, ROWS))
    lo = tl.minimum(j_first * GROUP // ROWS, hi)
    full = tl.minimum(tl.maximum(tl.cdiv(j_last * GROUP, ROWS), lo), hi)
    full_stop = tl.minimum(tl.maximum((min_end - first) * GROUP // ROWS, full), hi)

    j_row = j.to(tl.int64)
    k, v = load_key_tile(
        k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h, j_row, k_t, v_t, inside, DIM, PAD_DIM, True
    )
    dk = tl.zeros([KEYS, PAD_DIM], tl.float32)
    dv = tl.zeros([KEYS, PAD_DIM], tl.float32)
    far = tl.zeros([KEYS], tl.float32)
    for block in range(full, full_stop):
        q, do, lse, delta = load_row_block(
            q_ptr, do_ptr, lse_ptr, delta_ptr, block, q_t, q_h, do_t, do_h, rows,
            GROUP, DIM, PAD_DIM, ROWS, False,
        )  # fmt: skip
        dk, dv, late = _key_step(dk, dv, k, v, q, do, lse, delta, None, scale_log2, False, OF_WEIGHT, PRECISION)
        if FAR:
            i = first + (block * ROWS + tl.arange(0, ROWS)) // GROUP
            far += tl.sum(tl.where(i[None, :] >= j[:, None] + window, late, 0.0), 1)
    for step in range(0, full - lo + hi - full_stop):
        block = tl.where(step < full - lo, lo + step, full_stop + step - (full - lo))
        q, do, lse, delta = load_row_block(
            q_ptr, do_ptr, lse_ptr, delta_ptr, block, q_t, q_h, do_t, do_h, rows,
            GROUP, DIM, PAD_DIM, ROWS, True,
        )  # fmt: skip
        i = first + (block * ROWS + tl.arange(0, ROWS)) // GROUP
        keep = (j[:, None] <= i[None, :]) & (i[None, :] < e[:, None])
        dk, dv, late = _key_step(dk, dv, k, v, q, do, lse, delta, keep, scale_log2, True, OF_WEIGHT, PRECISION)
        if FAR:
            far += tl.sum(tl.where(i[None, :] >= j[:, None] + window, late, 0.0), 1)

    dk = dk * scale
    dim = tl.arange(0, PAD_DIM)
    mask = inside[:, None] & (dim < DIM)[None, :]
    grad_at = ((b * keys + j_row) * HEADS + h)[:, None] * DIM + dim[None, :]
    if HAS_COLUMNS:
        columns = tl.load(prefix_ptr + n * (tiles + 1) + tiles)
        rank0 = tl.load(prefix_ptr + n * (tiles + 1) + tile)
        column = inside & is_column(j, e, offset, first, window)
        flag = column.to(tl.int32)
        rank = rank0 + tl.cumsum(flag, 0) - flag
        workers = _column_workers(columns, slots, KEYS)
        column_mask = column[:, None] & (dim < DIM)[None, :]
        if workers == 1:
            dk += tl.load(dk_ptr + grad_at, mask=column_mask, other=0.0).to(tl.float32)
            dv += tl.load(dv_ptr + grad_at, mask=column_mask, other=0.0).to(tl.float32)
            if FAR:
                far += tl.load(far_ptr + n * keys + j_row, mask=column, other=0.0)
        else:
            for worker in range(0, workers):
                slot = n * slots + rank // KEYS * workers + worker
                part_at = partial_ptr + ((slot * 2 * KEYS + rank % KEYS) * DIM)[:, None] + dim[None, :]
                dk += tl.load(part_at, mask=column_mask, other=0.0)
                dv += tl.load(part_at + KEYS * DIM, mask=column_mask, other=0.0)
                if FAR:
                    far += tl.load(far_partial_ptr + slot * KEYS + rank % KEYS, mask=column, other=0.0)
    tl.store(dk_ptr + grad_at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + grad_at, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    if FAR:
        tl.store(far_ptr + n * keys + j_row, far, mask=inside)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_NR: Tensor,
    end_NS: Tensor,
    sizes: Geometry,
    plan: Schedule,
    *,
    query_tile: Tile,
    key_tile: Tile,
    span_tokens: int,
    scan: int,
    late: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv from the forward pass's tensors; `lse_NR` is in base 2, +inf where a row sees no key.

    `plan` is the forward pass's schedule, used again as far as the tiles agree. The last two results: a row's sum of
    do * out, float32 [N, R]; and, float32 [N, S], the part of queries at least `window` tokens behind a key in
    sum(dv * v), if `late` is `value`, or in the gradients of its scores, if it is `weight`; None otherwise.
    """
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with_far = late is not None
    far_NS = torch.empty(end_NS.shape, dtype=torch.float32, device=q.device) if with_far else None
    delta_NR = torch.empty_like(lse_NR)
    border = (sizes.tokens, sizes.keys, sizes.offset, sizes.first, sizes.window)
    scales = (sizes.scale * LOG2E, sizes.scale)
    heads = sizes.batch * sizes.heads

    columns = plan.columns
    if not plan.fits(query_tile):
        plan = build_schedule(end_NS, sizes, query_tile, span_tokens=span_tokens, scan=scan)
    blocks = plan.plan_NQ5.shape[1]
    _query_kernel[(blocks * heads,)](
        q, k, v, end_NS, plan.plan_NQ5, plan.columns_NPS, out, do, lse_NR, delta_NR, dq,
        *strides, *border, blocks, *plan.columns_NPS.shape[1:], *scales,
        **sizes.constants(), ROWS=query_tile.rows, KEYS=query_tile.keys, SPAN=plan.span,
        HAS_COLUMNS=sizes.has_columns, **query_tile.options(),
    )  # fmt: skip

    width = key_tile.keys
    tiles = ceil_div(sizes.keys + -sizes.offset % width, width)
    column_tiles = ceil_div(sizes.keys, width)
    slots = max(column_tiles // 2, 1)
    numbers = (*border, tiles, slots, *scales, heads)
    shape = dict(ROWS=key_tile.rows, KEYS=width, **key_tile.options())
    options = dict(sizes.constants(), **shape, FAR=with_far, OF_WEIGHT=late == "weight")
    if columns is not None:
        if columns.width != width:
            columns = list_columns(end_NS, sizes, width, scan=scan)
        columns_NS, prefix_NK1 = columns.columns_NS, columns.prefix_NK1
        partial = torch.empty(heads, slots, 2, width, sizes.dim, dtype=torch.float32, device=q.device)
        far_partial = torch.empty(heads, slots, width, dtype=torch.float32, device=q.device) if with_far else None
        grads = (do, lse_NR, delta_NR, dk, dv, far_NS, partial, far_partial)
        _column_kernel[(column_tiles * heads,)](
            q, k, v, end_NS, columns_NS, prefix_NK1, *grads, *strides, *numbers, **options
        )
    else:
        prefix_NK1, grads = None, (do, lse_NR, delta_NR, dk, dv, far_NS, None, None)  # Nones aren't read
    _near_kernel[(tiles * heads,)](
        q, k, v, end_NS, prefix_NK1, *grads, *strides, *numbers, **options, HAS_COLUMNS=sizes.has_columns
    )
    return dq, dk, dv, delta_NR, far_NS
