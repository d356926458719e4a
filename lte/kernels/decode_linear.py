"""Matrix-vector products of a decoding step, each with what surrounds it: norm before, activation or sum after.

One token reads every weight once, so a step is as fast as its weights stream from memory. A program takes a few
whole rows of a weight: it asks for all of them before it waits for its input, and norms the input itself.

Letters in shape suffixes: B batch, K inputs, N outputs, I intermediate size, L remembered inputs of a convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.launch import launch_options, on_device, wait_for_inputs

# a program's share of a weight: elements held at once, by so many warps, and lanes of one row
TILE = 8192
WARPS = 4
MAX_LANES = 8192


@triton.jit
def _round(x, LIKE: tl.constexpr):
    """x with the digits that the tensor type LIKE keeps, in float32."""
    return x.to(LIKE).to(tl.float32)


@triton.jit
def _input(
    x_ptr, norm_ptr, gate_ptr, eps, column, channel, valid,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAD_GROUPS: tl.constexpr, PAD_WIDTH: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One row of inputs: as it is, or each group of WIDTH normed to unit mean square, scaled and gated."""
    x = tl.load(x_ptr + column, mask=valid, other=0.0)
    kept = x.dtype
    x = x.to(tl.float32)
    if NORM:
        scale = tl.load(norm_ptr + channel, mask=valid, other=0.0).to(tl.float32)
        squares = tl.reshape(x * x, [PAD_GROUPS, PAD_WIDTH])
        inverse = tl.math.rsqrt(tl.sum(squares, 1) / WIDTH + eps)
        x = tl.reshape(tl.reshape(x, [PAD_GROUPS, PAD_WIDTH]) * inverse[:, None], [PAD_GROUPS * PAD_WIDTH]) * scale
        if GATE:
            gate = tl.load(gate_ptr + column, mask=valid, other=0.0).to(tl.float32)
            x = x * (gate * tl.sigmoid(gate))
    return _round(x, kept)


@triton.jit
def _product(weight_ptr, row, column, in_rows, valid, SIZE: tl.constexpr, FULL: tl.constexpr):
    """The tile of a weight that a program multiplies."""
    at = weight_ptr + row.to(tl.int64)[:, None] * SIZE + column[None, :]
    if FULL:
        return tl.load(at)
    return tl.load(at, mask=in_rows[:, None] & valid[None, :], other=0.0)


@triton.jit
def _shift_and_convolve(y, row, in_rows, filter_ptr, state_ptr, channels, TAPS: tl.constexpr):
    """SiLU of the convolution for rows below `channels`, whose last inputs move on by one; others as they are."""
    convolved = in_rows & (row < channels)
    kept: tl.constexpr = state_ptr.dtype.element_ty
    newest = y.to(kept)
    at = state_ptr + row * (TAPS - 1)
    total = newest.to(tl.float32) * tl.load(filter_ptr + row * TAPS + TAPS - 1, mask=convolved, other=0.0).to(
        tl.float32
    )
    for tap in tl.static_range(TAPS - 1):
        past = tl.load(at + tap, mask=convolved, other=0.0).to(tl.float32)
        total += past * tl.load(filter_ptr + row * TAPS + tap, mask=convolved, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 2):
        following = tl.load(at + tap + 1, mask=convolved, other=0.0)
        tl.debug_barrier()  # every thread has read what the next line overwrites
        tl.store(at + tap, following, mask=convolved)
    tl.debug_barrier()
    tl.store(at + TAPS - 2, newest, mask=convolved)
    return tl.where(convolved, total * tl.sigmoid(total), y)


@triton.jit
def _matvec_kernel(
    x_ptr, weight_ptr, out_ptr, norm_ptr, gate_ptr, residual_ptr, filter_ptr, state_ptr, eps, outputs, channels,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAD_GROUPS: tl.constexpr,
    PAD_WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, TAPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < outputs
    lane = tl.arange(0, PAD_GROUPS * PAD_WIDTH)
    group = lane // PAD_WIDTH
    channel = lane % PAD_WIDTH
    if GROUPS == 1:
        column = lane
        valid = lane < SIZE
    else:
        column = group * WIDTH + channel
        valid = (channel < WIDTH) & (group < GROUPS)

    w = _product(weight_ptr, row, column, in_rows, valid, SIZE, FULL)
    if SWIGLU:
        w_up = _product(weight_ptr, row + outputs, column, in_rows, valid, SIZE, FULL)
    wait_for_inputs(OVERLAP)
    x = _input(
        x_ptr, norm_ptr, gate_ptr, eps, column, channel, valid, GROUPS, WIDTH, PAD_GROUPS, PAD_WIDTH, NORM, GATE
    )  # fmt: skip
    y = tl.sum(w.to(tl.float32) * x[None, :], 1)
    kept: tl.constexpr = out_ptr.dtype.element_ty
    if SWIGLU:
        up = tl.sum(w_up.to(tl.float32) * x[None, :], 1)
        y = _round(y, kept)
        y = y * tl.sigmoid(y) * _round(up, kept)
    if RESIDUAL:
        y = _round(y, kept) + tl.load(residual_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
    if TAPS:
        y = _shift_and_convolve(y, row, in_rows, filter_ptr, state_ptr, channels, TAPS)
    tl.store(out_ptr + row, y.to(kept), mask=in_rows)


@triton.jit
def _norm_kernel(
    x_ptr, x_row, norm_ptr, gate_ptr, gate_row, out_ptr, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAD_GROUPS: tl.constexpr, PAD_WIDTH: tl.constexpr,
    GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PAD_GROUPS * PAD_WIDTH)
    group = lane // PAD_WIDTH
    channel = lane % PAD_WIDTH
    column = group * WIDTH + channel
    valid = (channel < WIDTH) & (group < GROUPS)
    wait_for_inputs(OVERLAP)
    if GATE:
        gate_ptr += b * gate_row
    x = _input(
        x_ptr + b * x_row, norm_ptr, gate_ptr, eps, column, channel, valid,
        GROUPS, WIDTH, PAD_GROUPS, PAD_WIDTH, True, GATE,
    )  # fmt: skip
    tl.store(out_ptr + b * (GROUPS * WIDTH) + column, x.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    gate = tl.load(x_ptr + b * 2 * size + at, mask=at < size, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + b * 2 * size + size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + b * size + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _convolve_kernel(
    x_ptr, x_row, filter_ptr, state_ptr, channels, TAPS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows = row < channels
    wait_for_inputs(OVERLAP)
    at = x_ptr + b * x_row + row
    x = tl.load(at, mask=in_rows, other=0.0).to(tl.float32)
    state_ptr += b * channels * (TAPS - 1)
    y = _shift_and_convolve(x, row, in_rows, filter_ptr, state_ptr, channels, TAPS)
    tl.store(at, y.to(x_ptr.dtype.element_ty), mask=in_rows)


def _pad(size: int) -> int:
    return triton.next_power_of_2(size)


def fits_matvec(x_BK: Tensor, groups: int = 1) -> bool:
    """Whether a product takes the kernel above: one row that a program can hold. Otherwise it is cuBLAS's."""
    return x_BK.shape[0] == 1 and _pad(groups) * _pad(x_BK.shape[1] // groups) <= MAX_LANES


def _matvec(
    x_1K: Tensor,
    weight_NK: Tensor,
    *,
    norm: Tensor | None = None,
    gate_1K: Tensor | None = None,
    groups: int = 1,
    eps: float = 0.0,
    swiglu: bool = False,
    residual_1N: Tensor | None = None,
    convolution: tuple[Tensor, Tensor] | None = None,
    overlap: bool = False,
) -> Tensor:
    size = x_1K.shape[1]
    outputs = weight_NK.shape[0] // (2 if swiglu else 1)
    width = size // groups
    pad_groups, pad_width = _pad(groups), _pad(width)
    rows = max(1, TILE // (pad_groups * pad_width) // (2 if swiglu else 1))
    filters, state = convolution if convolution is not None else (None, None)
    out_1N = torch.empty(1, outputs, dtype=x_1K.dtype, device=x_1K.device)
    with on_device(x_1K):
        _matvec_kernel[(triton.cdiv(outputs, rows),)](
            x_1K, weight_NK, out_1N, norm, gate_1K, residual_1N, filters, state, eps, outputs,
            0 if state is None else state.shape[1],
            SIZE=size, GROUPS=groups, WIDTH=width, PAD_GROUPS=pad_groups, PAD_WIDTH=pad_width, ROWS=rows,
            FULL=pad_groups * pad_width == size and outputs % rows == 0, NORM=norm is not None,
            GATE=gate_1K is not None, SWIGLU=swiglu, RESIDUAL=residual_1N is not None,
            TAPS=0 if filters is None else filters.shape[-1], OVERLAP=overlap, **launch_options(overlap, warps=WARPS),
        )  # fmt: skip
    return out_1N


def norm_rows(
    x_BK: Tensor, norm: Tensor, eps: float, *, gate_BK: Tensor | None = None, groups: int = 1, overlap: bool = False
) -> Tensor:
    """RMSNorm of each of `groups` parts of every row [B, K], times SiLU of the gate if there is one.

    Args:
        x_BK, gate_BK: unit stride within a row.
        norm: [K / groups] scale.
    """
    batch, size = x_BK.shape
    out_BK = torch.empty(batch, size, dtype=x_BK.dtype, device=x_BK.device)
    with on_device(x_BK):
        _norm_kernel[(batch,)](
            x_BK, x_BK.stride(0), norm, gate_BK, 0 if gate_BK is None else gate_BK.stride(0), out_BK, eps,
            GROUPS=groups, WIDTH=size // groups, PAD_GROUPS=_pad(groups), PAD_WIDTH=_pad(size // groups),
            GATE=gate_BK is not None, OVERLAP=overlap, **launch_options(overlap, warps=4),
        )  # fmt: skip
    return out_BK


def norm_linear(
    x_BK: Tensor,
    norm: Tensor,
    eps: float,
    weight_NK: Tensor,
    *,
    convolution: tuple[Tensor, Tensor] | None = None,
    overlap: bool = False,
) -> Tensor:
    """The linear map of the normed input [B, N].

    Args:
        x_BK: inputs of one token a row.
        norm: [K] scale of the RMSNorm.
        weight_NK: contiguous.
        convolution: filters [C, W] and last inputs [B, C, W - 1]: the first C outputs go through a causal
            convolution and SiLU, and become the newest of the last inputs.
    """
    if fits_matvec(x_BK):
        return _matvec(x_BK, weight_NK, norm=norm, eps=eps, convolution=convolution, overlap=overlap)
    y_BN = F.linear(norm_rows(x_BK, norm, eps, overlap=overlap), weight_NK)
    if convolution is not None:
        convolve_rows(y_BN, *convolution)
    return y_BN


def norm_swiglu(x_BK: Tensor, norm: Tensor, eps: float, gate_up_MK: Tensor, *, overlap: bool = False) -> Tensor:
    """SiLU(gate) * up [B, I] of the normed input; the first half of the M = 2 I rows is gate, the second up."""
    if fits_matvec(x_BK):
        return _matvec(x_BK, gate_up_MK, norm=norm, eps=eps, swiglu=True, overlap=overlap)
    both_BM = F.linear(norm_rows(x_BK, norm, eps, overlap=overlap), gate_up_MK)
    batch, size = both_BM.shape[0], both_BM.shape[1] // 2
    out_BI = torch.empty(batch, size, dtype=x_BK.dtype, device=x_BK.device)
    with on_device(x_BK):
        _swiglu_kernel[(triton.cdiv(size, 1024), batch)](both_BM, out_BI, size, BLOCK=1024, OVERLAP=False)
    return out_BI


def linear_add(
    x_BK: Tensor,
    weight_NK: Tensor,
    residual_BN: Tensor,
    *,
    norm: Tensor | None = None,
    gate_BK: Tensor | None = None,
    groups: int = 1,
    eps: float = 0.0,
    overlap: bool = False,
) -> Tensor:
    """residual + the linear map of x [B, N], or of x normed in `groups` parts and gated (see `norm_rows`)."""
    if fits_matvec(x_BK, groups):
        return _matvec(
            x_BK, weight_NK, norm=norm, gate_1K=gate_BK, groups=groups, eps=eps, residual_1N=residual_BN,
            overlap=overlap,
        )  # fmt: skip
    if norm is not None:
        x_BK = norm_rows(x_BK, norm, eps, gate_BK=gate_BK, groups=groups, overlap=overlap)
    return torch.addmm(residual_BN, x_BK, weight_NK.t())


def convolve_rows(x_BN: Tensor, filters_CW: Tensor, state_BCL: Tensor) -> None:
    """SiLU of a causal convolution of the first C columns, in place; the state takes them as its newest inputs."""
    batch, channels = state_BCL.shape[:2]
    with on_device(x_BN):
        _convolve_kernel[(triton.cdiv(channels, 512), batch)](
            x_BN, x_BN.stride(0), filters_CW, state_BCL, channels, TAPS=filters_CW.shape[-1], BLOCK=512, OVERLAP=False
        )
