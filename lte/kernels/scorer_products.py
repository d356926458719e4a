"""Kernels of the retention scorer: dilated taps as matrix products (their use is in lte/kernels/scorer.py).

An output at token t reads its inputs at t + tap * DILATION - REACH. Inputs are x itself (first layer) or what the
layer before gave ahead of its SiLU (ACTIVATED); SiLU and dropout happen in registers.
"""

import triton
import triton.language as tl


@triton.jit
def _silu(z):
    """SiLU and its slope."""
    gate = 1.0 / (1.0 + tl.exp(-z))
    return z * gate, gate * (1.0 + z * (1.0 - gate))


@triton.jit
def _keeps(row, c, seed, limit, IN: tl.constexpr, SALT: tl.constexpr):
    """Whether channels c of these rows stay: a hash serves two neighbours, 16 bits each against the limit."""
    x = (row[:, None] * ((IN + 1) // 2) + (c >> 1)[None, :]).to(tl.uint32) ^ (seed + SALT * 40503).to(tl.uint32)
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    x = x ^ (x >> 15)
    x = tl.where((c & 1)[None, :] == 0, x & 0xFFFF, x >> 16)
    return x.to(tl.int32) >= limit


@triton.jit
def _activated(
    x, row, c, seed_ptr, limit, scale, IN: tl.constexpr, ACTIVATED: tl.constexpr, DROPS: tl.constexpr,
    SALT: tl.constexpr,
):  # fmt: skip
    """A layer's inputs after SiLU and dropout, rounded as x is, and the slope of both (float32)."""
    y = x.to(tl.float32)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATED:
        y, slope = _silu(y)
    if DROPS:
        keep = _keeps(row, c, tl.load(seed_ptr), limit, IN, SALT)
        y = tl.where(keep, y * scale, 0.0)
        slope = tl.where(keep, slope * scale, 0.0)
    return y.to(x.dtype), slope


@triton.jit
def _within(t, other, source, document_ptr, first, HAS_DOCUMENTS: tl.constexpr):
    """Whether the tokens t read the tokens `other`: they exist, and lie in the same document."""
    inside = (other >= 0) & (other < source)
    if HAS_DOCUMENTS:
        here = tl.load(document_ptr + first + t, mask=t < source, other=-1)
        there = tl.load(document_ptr + first + other, mask=inside, other=-2)
        inside = inside & (here == there)
    return inside


@triton.jit(do_not_specialize=["tokens", "source", "limit"])
def convolve_kernel(
    x_ptr, w_ptr, bias_ptr, z_ptr, document_ptr, seed_ptr, out_w_ptr, out_b_ptr, logits_ptr,
    x_b, x_h, x_t, heads, tokens, source, limit, scale,
    IN: tl.constexpr, OUT: tl.constexpr, PAD_OUT: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    REACH: tl.constexpr, ACTIVATED: tl.constexpr, DROPS: tl.constexpr, SALT: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    IS_LAST: tl.constexpr, SHARED: tl.constexpr, ROUNDS: tl.constexpr, ACTIVATES: tl.constexpr,
):  # fmt: skip
    """z [B, H, T, OUT], and the logits in the last layer. ROUNDS: z is rounded as x before anything reads it.

    ACTIVATES: SiLU of z takes its place, rounded as x: what the next layer would make of z as its inputs.
    """
    n = tl.program_id(1)
    b = (n // heads).to(tl.int64)
    h = (n % heads).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.arange(0, PAD_OUT)
    x_ptr += b * x_b + h * x_h
    stack = 0 if SHARED else h
    w_ptr += stack * (TAPS * IN * OUT)
    bias = tl.load(bias_ptr + stack * OUT + o, mask=o < OUT, other=0.0).to(tl.float32)
    acc = tl.zeros([ROWS, PAD_OUT], tl.float32) + bias[None, :]
    chunks: tl.constexpr = (IN + BLOCK - 1) // BLOCK
    for step in range(TAPS * chunks):
        tap = step // chunks
        c = (step % chunks) * BLOCK + tl.arange(0, BLOCK)
        other = t + (tap * DILATION - REACH)
        inside = _within(t, other, source, document_ptr, b * source, HAS_DOCUMENTS)
        x_mask = inside[:, None] & (c < IN)[None, :]
        x = tl.load(x_ptr + other.to(tl.int64)[:, None] * x_t + c[None, :], mask=x_mask, other=0.0)
        x, _ = _activated(x, n * source + other, c, seed_ptr, limit, scale, IN, ACTIVATED, DROPS, SALT)
        x = x.to(w_ptr.dtype.element_ty)
        w_mask = (c < IN)[:, None] & (o < OUT)[None, :]
        w = tl.load(w_ptr + (tap * IN + c)[:, None] * OUT + o[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    rows = n.to(tl.int64) * tokens + t
    keep = (t < tokens)[:, None] & (o < OUT)[None, :]
    z = acc.to(w_ptr.dtype.element_ty).to(tl.float32) if ROUNDS else acc
    if ACTIVATES:
        z, _ = _silu(z)
    tl.store(z_ptr + rows[:, None] * OUT + o[None, :], z.to(z_ptr.dtype.element_ty), mask=keep)
    if IS_LAST:
        out_w = tl.load(out_w_ptr + stack * OUT + o, mask=o < OUT, other=0.0).to(tl.float32)
        # rounded as in the streaming form, so that both keep the same tokens
        last, _ = _silu(z)
        last = last.to(w_ptr.dtype.element_ty).to(tl.float32)
        logit = tl.sum(last * out_w[None, :], 1) + tl.load(out_b_ptr + stack).to(tl.float32)
        tl.store(logits_ptr + (b * tokens + t) * heads + h, logit, mask=t < tokens)


@triton.jit(do_not_specialize=["batch", "tokens", "limit"])
def backward_kernel(
    dz_ptr, w_ptr, x_ptr, dx_ptr, partial_ptr, document_ptr, seed_ptr, grad_ptr, out_w_ptr,
    x_b, x_h, x_t, batch, tokens, total, weight_at, input_bias_at, bias_at, out_weight_at, out_bias_at,
    limit, scale,
    IN: tl.constexpr, OUT: tl.constexpr, PAD_OUT: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    REACH: tl.constexpr, ACTIVATED: tl.constexpr, DROPS: tl.constexpr, SALT: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    IS_LAST: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """A share of the tokens: the gradient of their inputs, and sums for the gradients of the parameters.

    Both need the same tiles of dz, one a tap. The last layer's dz is made here of its z, which dz_ptr then holds,
    and of the logits' gradient. dx lies at x's strides; its sum is the gradient of the bias in the layer before.
    The sums of a share are a row of `total` numbers in partial, every parameter [S, ...] at its place; of heads
    that share their parameters each has its own row.
    """
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    heads = tl.num_programs(1)
    h = tl.program_id(1)
    if SHARED:
        stack = 0
        partial_ptr += (part * heads + h).to(tl.int64) * total
    else:
        stack = h
        partial_ptr += part.to(tl.int64) * total
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    o = tl.arange(0, PAD_OUT)
    real = (c < IN)[:, None] & (o < OUT)[None, :]
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    w_ptr += stack * (TAPS * IN * OUT)
    weights = ()
    sums = ()
    for tap in tl.static_range(TAPS):
        w = tl.load(w_ptr + (tap * IN + c)[:, None] * OUT + o[None, :], mask=real, other=0.0)
        weights = weights + (tl.trans(w),)  # noqa: RUF005
        sums = sums + (tl.zeros([PAD_OUT, BLOCK], tl.float32),)  # noqa: RUF005
    dx_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([PAD_OUT], tl.float32)
    out_weight_sum = tl.zeros([PAD_OUT], tl.float32)
    out_bias_sum = tl.zeros([ROWS], tl.float32)
    out_w = tl.zeros([PAD_OUT], tl.float32)
    if IS_LAST:
        out_w = tl.load(out_w_ptr + stack * OUT + o, mask=o < OUT, other=0.0).to(tl.float32)
    blocks = tl.cdiv(tokens, ROWS)
    for step in range(part, batch * blocks, parts):
        b = step // blocks
        n = b * heads + h
        t = (step % blocks) * ROWS + tl.arange(0, ROWS)
        start = b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + ((step % blocks) * ROWS).to(tl.int64) * x_t
        x_at = start + tl.arange(0, ROWS)[:, None] * x_t + c[None, :]
        keep = (t < tokens)[:, None] & (c < IN)[None, :]
        x = tl.load(x_ptr + x_at, mask=keep, other=0.0)
        x, slope = _activated(x, n * tokens + t, c, seed_ptr, limit, scale, IN, ACTIVATED, DROPS, SALT)
        x = x.to(dtype)
        first = b.to(tl.int64) * tokens
        dz_at = dz_ptr + n.to(tl.int64) * tokens * OUT
        dx = tl.zeros([ROWS, BLOCK], tl.float32)
        new = ()
        for tap in tl.static_range(TAPS):
            other = t - (tap * DILATION - REACH)
            inside = _within(t, other, tokens, document_ptr, first, HAS_DOCUMENTS)
            dz_mask = inside[:, None] & (o < OUT)[None, :]
            dz = tl.load(dz_at + other[:, None] * OUT + o[None, :], mask=dz_mask, other=0.0)
            if IS_LAST:
                grad = tl.load(grad_ptr + (first + other) * heads + h, mask=inside, other=0.0)
                z, z_slope = _silu(dz.to(tl.float32))
                dz = grad[:, None] * out_w[None, :] * z_slope
                # the tap of an output's own token sees every output once
                if tap * DILATION == REACH:
                    out_weight_sum += tl.sum(grad[:, None] * z, 0)
                    out_bias_sum += grad
                    bias_sum += tl.sum(dz.to(dtype).to(tl.float32), 0)
            dz = dz.to(dtype)
            # the slope once a tap, not once at the end: a chain of products would get all warps along the tokens
            dx += tl.dot(dz, weights[tap], input_precision=PRECISION) * slope
            new = new + (tl.dot(tl.trans(dz), x, sums[tap], input_precision=PRECISION),)  # noqa: RUF005
        sums = new
        dx = dx.to(dtype)
        tl.store(dx_ptr + x_at, dx, mask=keep)
        if ACTIVATED:
            dx_sum += tl.where(keep, dx.to(tl.float32), 0.0)
    for tap in tl.static_range(TAPS):
        w_at = weight_at + (stack * TAPS + tap) * (IN * OUT)
        tl.store(partial_ptr + w_at + c[:, None] * OUT + o[None, :], tl.trans(sums[tap]), mask=real)
    if ACTIVATED:
        tl.store(partial_ptr + input_bias_at + stack * IN + c, tl.sum(dx_sum, 0), mask=c < IN)
    if IS_LAST:  # noqa: SIM102
        if tl.program_id(2) == 0:
            tl.store(partial_ptr + bias_at + stack * OUT + o, bias_sum, mask=o < OUT)
            tl.store(partial_ptr + out_weight_at + stack * OUT + o, out_weight_sum, mask=o < OUT)
            tl.store(partial_ptr + out_bias_at + stack, tl.sum(out_bias_sum, 0))
