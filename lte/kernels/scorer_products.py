"""Kernels of the retention scorer: dilated taps as matrix products (their use is in lte/kernels/scorer.py).

An output at token t reads its inputs at t + tap * DILATION - REACH. Inputs are x itself (first layer) or what the
layer before gave ahead of its SiLU (ACTIVATED); SiLU and dropout happen in registers.
"""

import triton
import triton.language as tl


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def _silu_slope(z):
    s = 1.0 / (1.0 + tl.exp(-z))
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def _keeps(number, seed, limit, SALT: tl.constexpr):
    """Whether the elements of these numbers stay: 31 bits of a hash against the limit."""
    x = number.to(tl.uint32) ^ (seed + SALT * 40503).to(tl.uint32)
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    x = x ^ (x >> 15)
    return (x >> 1).to(tl.int32) >= limit


@triton.jit
def _inputs(
    x_at, seed_ptr, n, t, inside, c, x_t, source, limit, scale,
    IN: tl.constexpr, ACTIVATED: tl.constexpr, DROPS: tl.constexpr, SALT: tl.constexpr,
):  # fmt: skip
    """A layer's inputs at tokens t and channels c, after SiLU and dropout; zero outside."""
    mask = inside[:, None] & (c < IN)[None, :]
    x = tl.load(x_at + t.to(tl.int64)[:, None] * x_t + c[None, :], mask=mask, other=0.0)
    if ACTIVATED or DROPS:
        y = x.to(tl.float32)
        if ACTIVATED:
            y = _silu(y)
        if DROPS:
            number = (n * source + t)[:, None] * IN + c[None, :]
            y = tl.where(_keeps(number, tl.load(seed_ptr), limit, SALT), y * scale, 0.0)
        x = y.to(x.dtype)
    return x


@triton.jit
def _within(t, other, source, document_at, HAS_DOCUMENTS: tl.constexpr):
    """Whether the tokens t read the tokens `other`: they exist, and lie in the same document."""
    inside = (other >= 0) & (other < source)
    if HAS_DOCUMENTS:
        here = tl.load(document_at + t, mask=t < source, other=-1)
        there = tl.load(document_at + other, mask=inside, other=-2)
        inside = inside & (here == there)
    return inside


@triton.jit(do_not_specialize=["tokens", "source", "limit"])
def convolve_kernel(
    x_ptr, w_ptr, bias_ptr, z_ptr, document_ptr, seed_ptr, out_w_ptr, out_b_ptr, logits_ptr,
    x_b, x_h, x_t, heads, w_h, bias_h, out_h, tokens, source, limit, scale,
    IN: tl.constexpr, OUT: tl.constexpr, PAD_OUT: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    REACH: tl.constexpr, ACTIVATED: tl.constexpr, DROPS: tl.constexpr, SALT: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1)
    b = (n // heads).to(tl.int64)
    h = (n % heads).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.arange(0, PAD_OUT)
    x_ptr += b * x_b + h * x_h
    w_ptr += h * w_h
    document_ptr += b * source
    bias = tl.load(bias_ptr + h * bias_h + o, mask=o < OUT, other=0.0).to(tl.float32)
    acc = tl.zeros([ROWS, PAD_OUT], tl.float32) + bias[None, :]
    chunks: tl.constexpr = (IN + BLOCK - 1) // BLOCK
    for step in range(TAPS * chunks):
        tap = step // chunks
        c = (step % chunks) * BLOCK + tl.arange(0, BLOCK)
        other = t + (tap * DILATION - REACH)
        inside = _within(t, other, source, document_ptr, HAS_DOCUMENTS)
        x = _inputs(x_ptr, seed_ptr, n, other, inside, c, x_t, source, limit, scale, IN, ACTIVATED, DROPS, SALT)
        x = x.to(w_ptr.dtype.element_ty)
        w_mask = (c < IN)[:, None] & (o < OUT)[None, :]
        w = tl.load(w_ptr + (tap * IN + c)[:, None] * OUT + o[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    rows = n.to(tl.int64) * tokens + t
    keep = (t < tokens)[:, None] & (o < OUT)[None, :]
    z = acc.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + rows[:, None] * OUT + o[None, :], z, mask=keep)
    if HAS_LOGITS:
        out_w = tl.load(out_w_ptr + h * OUT * out_h + o, mask=o < OUT, other=0.0).to(tl.float32)
        # rounded as in the streaming form, so that both keep the same tokens
        last = _silu(z.to(tl.float32)).to(w_ptr.dtype.element_ty).to(tl.float32)
        logit = tl.sum(last * out_w[None, :], 1) + tl.load(out_b_ptr + h * out_h).to(tl.float32)
        tl.store(logits_ptr + (b * tokens + t) * heads + h, logit, mask=t < tokens)


@triton.jit(do_not_specialize=["tokens"])
def logits_backward_kernel(
    grad_ptr, z_ptr, out_w_ptr, dz_ptr, partial_ptr, heads, out_h, tokens,
    OUT: tl.constexpr, PAD_OUT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dz of the last layer, and sums of a tile for the gradients of the last weight (OUT) and bias (one more)."""
    n = tl.program_id(1).to(tl.int64)
    b = n // heads
    h = n % heads
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.arange(0, PAD_OUT)
    grad = tl.load(grad_ptr + (b * tokens + t) * heads + h, mask=t < tokens, other=0.0)
    at = (n * tokens + t)[:, None] * OUT + o[None, :]
    keep = (t < tokens)[:, None] & (o < OUT)[None, :]
    z = tl.load(z_ptr + at, mask=keep, other=0.0).to(tl.float32)
    out_w = tl.load(out_w_ptr + h * OUT * out_h + o, mask=o < OUT, other=0.0).to(tl.float32)
    dz = grad[:, None] * out_w[None, :] * _silu_slope(z)
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=keep)
    partial_ptr += (tl.program_id(0) * tl.num_programs(1) + n) * (OUT + 1)
    tl.store(partial_ptr + o, tl.sum(grad[:, None] * _silu(z), 0), mask=o < OUT)
    tl.store(partial_ptr + OUT, tl.sum(grad, 0))


@triton.jit(do_not_specialize=["tokens", "limit"])
def input_gradient_kernel(
    dz_ptr, w_ptr, x_ptr, dx_ptr, document_ptr, seed_ptr, x_b, x_h, x_t, heads, w_h, tokens, limit, scale,
    IN: tl.constexpr, OUT: tl.constexpr, PAD_OUT: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    REACH: tl.constexpr, ACTIVATED: tl.constexpr, DROPS: tl.constexpr, SALT: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a layer's inputs before their SiLU, at the inputs' strides."""
    n = tl.program_id(1)
    b = (n // heads).to(tl.int64)
    h = (n % heads).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    o = tl.arange(0, PAD_OUT)
    dz_ptr += n.to(tl.int64) * tokens * OUT
    w_ptr += h * w_h
    document_ptr += b * tokens
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for tap in range(TAPS):
        other = t - (tap * DILATION - REACH)
        inside = _within(t, other, tokens, document_ptr, HAS_DOCUMENTS)
        dz_mask = inside[:, None] & (o < OUT)[None, :]
        dz = tl.load(dz_ptr + other.to(tl.int64)[:, None] * OUT + o[None, :], mask=dz_mask, other=0.0)
        w_mask = (o < OUT)[:, None] & (c < IN)[None, :]
        w = tl.load(w_ptr + (tap * IN + c)[None, :] * OUT + o[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(dz, w, acc, input_precision=PRECISION)
    keep = (t < tokens)[:, None] & (c < IN)[None, :]
    if DROPS:
        number = (n * tokens + t)[:, None] * IN + c[None, :]
        acc = tl.where(_keeps(number, tl.load(seed_ptr), limit, SALT), acc * scale, 0.0)
    at = b * x_b + h * x_h + t.to(tl.int64)[:, None] * x_t + c[None, :]
    if ACTIVATED:
        acc = acc * _silu_slope(tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32))
    tl.store(dx_ptr + at, acc.to(dx_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["batch", "tokens", "limit"])
def weight_gradient_kernel(
    dz_ptr, x_ptr, dw_ptr, dbias_ptr, document_ptr, seed_ptr, x_b, x_h, x_t, batch, tokens, limit, scale,
    IN: tl.constexpr, OUT: tl.constexpr, PAD_OUT: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    REACH: tl.constexpr, ACTIVATED: tl.constexpr, DROPS: tl.constexpr, SALT: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PAD_TAPS: tl.constexpr,
):  # fmt: skip
    """Sums over a share of the tokens: an input reaches the outputs of all taps in one product."""
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    heads = tl.num_programs(1)
    h = tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PAD_TAPS * PAD_OUT)
    tap = column // PAD_OUT
    o = column % PAD_OUT
    real = (tap < TAPS) & (o < OUT)
    back = tap * DILATION - REACH
    acc = tl.zeros([BLOCK, PAD_TAPS * PAD_OUT], tl.float32)
    total = tl.zeros([PAD_TAPS * PAD_OUT], tl.float32)
    blocks = tl.cdiv(tokens, ROWS)
    for step in range(part, batch * blocks, parts):
        b = step // blocks
        n = b * heads + h
        t = (step % blocks) * ROWS + tl.arange(0, ROWS)
        x_at = x_ptr + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h
        x = _inputs(x_at, seed_ptr, n, t, t < tokens, c, x_t, tokens, limit, scale, IN, ACTIVATED, DROPS, SALT)
        x = x.to(dz_ptr.dtype.element_ty)
        other = t[:, None] - back[None, :]
        inside = real[None, :] & (t < tokens)[:, None] & (other >= 0) & (other < tokens)
        if HAS_DOCUMENTS:
            here = tl.load(document_ptr + b.to(tl.int64) * tokens + t, mask=t < tokens, other=-1)
            there = tl.load(document_ptr + b.to(tl.int64) * tokens + other, mask=inside, other=-2)
            inside = inside & (here[:, None] == there)
        dz = tl.load(dz_ptr + (n.to(tl.int64) * tokens + other) * OUT + o[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(x), dz, acc, input_precision=PRECISION)
        total += tl.sum(dz.to(tl.float32), 0)
    at = (part * heads + h).to(tl.int64) * TAPS
    dw_at = (at + tap)[None, :] * (IN * OUT) + c[:, None] * OUT + o[None, :]
    tl.store(dw_ptr + dw_at, acc, mask=(c < IN)[:, None] & real[None, :])
    if tl.program_id(2) == 0:
        # the tap of an output's own token sees every output once
        own = real & (back == 0)
        tl.store(dbias_ptr + (part * heads + h) * OUT + o, total, mask=own)
