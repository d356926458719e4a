"""Element-wise kernels of training that a chain of PyTorch operations would pay for several times.

Letters in shape suffixes: M rows, D head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.launch import on_device

BLOCK = 2048  # elements of a program
ROW_BLOCK = 8192  # elements of a program over whole rows


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    grad_gate = grad * up * s * (1.0 + gate * (1.0 - s))
    tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + at, (grad * gate * s).to(grad_up_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _through_kernel(
    grad_ptr, v_ptr, logits_ptr, out_ptr, rows, DIM: tl.constexpr, PAD_DIM: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PAD_DIM)
    at = row[:, None] * DIM + dim[None, :]
    inside = (row < rows)[:, None] & (dim < DIM)[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.sigmoid(tl.load(logits_ptr + row, mask=row < rows, other=0.0).to(tl.float32))
    out = tl.sum(grad * v, 1) * r * (1.0 - r)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < rows)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32; both contiguous, of one shape and dtype."""
    out = torch.empty_like(gate)
    count = gate.numel()
    with on_device(gate):
        _swiglu_kernel[(triton.cdiv(count, BLOCK),)](gate, up, out, count, BLOCK=BLOCK, num_warps=8)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; all contiguous."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    count = gate.numel()
    with on_device(gate):
        _swiglu_backward_kernel[(triton.cdiv(count, BLOCK),)](
            grad, gate, up, grad_gate, grad_up, count, BLOCK=BLOCK, num_warps=8
        )
    return grad_gate, grad_up


def straight_through_gradient(grad: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    """Gradient of logits [...] through v * sigmoid(logits): sum over D of grad * v, times the sigmoid's slope.

    Args:
        grad, v: [..., D], contiguous; sums are float32.
        logits: [...], contiguous.
    """
    out = torch.empty_like(logits)
    rows, dim = logits.numel(), v.shape[-1]
    pad_dim = triton.next_power_of_2(dim)
    at_once = max(1, ROW_BLOCK // pad_dim)
    with on_device(v):
        _through_kernel[(triton.cdiv(rows, at_once),)](
            grad, v, logits, out, rows, DIM=dim, PAD_DIM=pad_dim, ROWS=at_once, num_warps=8
        )
    return out
