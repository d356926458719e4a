"""One token of the gated delta rule (arXiv 2412.06464), the state updated in place.

Letters in shape suffixes: B batch, H heads, K key channels of a head, V value channels of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.launch import launch_options, on_device, wait_for_inputs

# elements of the state that a program holds
STATE_TILE = 4096
SOFTPLUS_LINEAR = tl.constexpr(20.0)  # from here on softplus is the identity, as in torch


@triton.jit
def _softplus(x):
    e = tl.exp(x)
    u = 1.0 + e
    # log(1 + e) without losing the digits of a small e
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > SOFTPLUS_LINEAR, x, small)


@triton.jit
def _delta_kernel(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, rate_ptr, bias_ptr, state_ptr, out_ptr, in_row, out_row, scale,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PAD_KEY: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    row = (n // HEADS) * in_row
    h = n % HEADS
    key = tl.arange(0, PAD_KEY)
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_key = key < KEY
    in_value = value < VALUE
    at = state_ptr + n * (KEY * VALUE) + key[:, None] * VALUE + value[None, :]
    inside = in_key[:, None] & in_value[None, :]
    if FULL:
        state = tl.load(at)
    else:
        state = tl.load(at, mask=inside, other=0.0)
    rate = tl.exp(tl.load(rate_ptr + h).to(tl.float32))
    bias = tl.load(bias_ptr + h).to(tl.float32)
    wait_for_inputs(OVERLAP)
    a = tl.load(a_ptr + row + h).to(tl.float32)
    beta = tl.sigmoid(tl.load(b_ptr + row + h).to(tl.float32))
    q = tl.load(q_ptr + row + h * KEY + key, mask=in_key, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row + h * KEY + key, mask=in_key, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row + h * VALUE + value, mask=in_value, other=0.0).to(tl.float32)
    q = q * (tl.math.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale)
    k = k * tl.math.rsqrt(tl.sum(k * k, 0) + 1e-6)
    state = state * tl.exp(-rate * _softplus(a + bias))
    u = beta * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * u[None, :]
    out = tl.sum(state * q[:, None], 0)
    out_at = out_ptr + (n // HEADS) * out_row + h * VALUE + value
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=in_value)
    if FULL:
        tl.store(at, state)
    else:
        tl.store(at, state, mask=inside)


def delta_step(
    q_BC: Tensor,
    k_BC: Tensor,
    v_BC: Tensor,
    a_BH: Tensor,
    b_BH: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    state_BHKV: Tensor,
    *,
    overlap: bool = False,
) -> Tensor:
    """One token of every row: the state decays, takes the new key and value, and is read by the query.

    Args:
        q_BC, k_BC, v_BC: [B, H * K] and [B, H * V] after convolution and activation, not normalised; with a_BH and
            b_BH, the projections before softplus and sigmoid, columns of one tensor or of tensors of equal strides.
        A_log_H, dt_bias_H: parameters of the decay.
        state_BHKV: float32, contiguous, updated in place.

    Returns:
        [B, H * V] in the dtype of v.
    """
    batch, heads, key_dim, value_dim = state_BHKV.shape
    rows = {x.stride(0) for x in (q_BC, k_BC, v_BC, a_BH, b_BH)}
    assert len(rows) == 1, "columns of one tensor"
    assert state_BHKV.is_contiguous()
    pad_key = triton.next_power_of_2(key_dim)
    block = min(triton.next_power_of_2(value_dim), max(8, STATE_TILE // pad_key))
    out_BC = torch.empty(batch, heads * value_dim, dtype=v_BC.dtype, device=v_BC.device)
    with on_device(v_BC):
        _delta_kernel[(triton.cdiv(value_dim, block), batch * heads)](
            q_BC, k_BC, v_BC, a_BH, b_BH, A_log_H, dt_bias_H, state_BHKV, out_BC, rows.pop(), out_BC.stride(0),
            key_dim**-0.5, HEADS=heads, KEY=key_dim, VALUE=value_dim, PAD_KEY=pad_key, BLOCK=block,
            FULL=pad_key == key_dim and value_dim % block == 0, OVERLAP=overlap,
            **launch_options(overlap, warps=4),
        )  # fmt: skip
    return out_BC
