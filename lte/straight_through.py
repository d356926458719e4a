"""Straight-through gradients of retention logits: what is kept is decided hard, and the logit learns all the same.

Shapes: B batch, T tokens (as many queries Q as keys K here), H KV heads, G query heads of each, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lte.layout import Layout
from lte.visibility import visible_pairs

# what a gradient from the queries beyond the window is of, by the names of the setting
LATE = {"beyond_window": "value", "weight_beyond_window": "weight", "presence_beyond_window": "presence"}
STRAIGHT_THROUGH = ("all", *LATE)
# what the other keys of a query have of its softmax counts as at least this: what they read is a difference of
# rounded numbers, divided by it
LEAST_REST = 1 / 8


class LateGradient(NamedTuple):
    """Logits that get a gradient from the queries i >= j + window alone, before the factor r (1 - r).

    Attributes:
        logits_BTH: retention logits.
        of: `value`, of a factor of the key's value; `weight`, of its softmax weight, where what one key loses the
            others win; `presence`, how much a query's output changes by the key's being there, which keys that are
            not retained have too.
        stop_BT: int32, one past the last query of each key's document.
    """

    logits_BTH: Tensor
    of: str
    stop_BT: Tensor


class _OfValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v_BTHD: Tensor, logits_BTH: Tensor) -> Tensor:
        ctx.save_for_backward(v_BTHD, logits_BTH)
        return v_BTHD.view_as(v_BTHD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTHD: Tensor):
        v_BTHD, logits_BTH = ctx.saved_tensors
        if all(x.is_cuda and x.dtype != torch.float64 for x in (grad_BTHD, v_BTHD, logits_BTH)):
            from lte.kernels.elementwise import straight_through_gradient

            tensors = (x.contiguous() for x in (grad_BTHD, v_BTHD, logits_BTH))
            return grad_BTHD, straight_through_gradient(*tensors)
        r_BTH = logits_BTH.to(torch.promote_types(logits_BTH.dtype, torch.float32)).sigmoid()
        # summed in at least float32: many small products of either sign
        through_BTH = torch.linalg.vecdot(grad_BTHD.to(r_BTH.dtype), v_BTHD.to(r_BTH.dtype))
        return grad_BTHD, (through_BTH * r_BTH * (1 - r_BTH)).to(logits_BTH.dtype)


def straight_through(v: Tensor, logits: Tensor) -> Tensor:
    """v unchanged [B, T, H, D], with the gradient to logits [B, T, H] as if it were v * sigmoid(logits)."""
    return _OfValues.apply(v, logits)


def give_gradient(
    v: Tensor, logits: Tensor, *, sinks: int, layout: Layout, gradient_from: str
) -> tuple[Tensor, LateGradient | None]:
    """Values, and what `interval_attention` needs besides, for the gradient that logits shall get.

    Args:
        v: [B, T, H, D].
        logits: [B, T, H].
        gradient_from: of STRAIGHT_THROUGH. From beyond the window, sinks, which are read in any case, give none.
    """
    if gradient_from == "all":
        return straight_through(v, logits), None
    batch, length = logits.shape[:2]
    sink_BT1 = (layout.positions(batch, length, logits.device) < sinks)[..., None]
    ends = lambda: layout.document_ends(batch, length, logits.device).to(torch.int32)
    stop_BT = layout.once(("int32 ends", batch, length, logits.device), ends)
    return v, LateGradient(torch.where(sink_BT1, logits.detach(), logits), LATE[gradient_from], stop_BT)


class _BeyondWindow(torch.autograd.Function):
    """An attention's output as it is; to logits the gradient of what only queries i >= j + window see."""

    @staticmethod
    def forward(ctx, out: Tensor, logits_BTH: Tensor, q, k, v, end, stop_BT: Tensor, *numbers):
        """`numbers`: of, window, scale, off_by_one."""
        ctx.save_for_backward(logits_BTH, q, k, v, end, stop_BT)
        ctx.numbers = numbers
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BQND: Tensor):
        logits_BTH, q, k, v, end, stop_BT = ctx.saved_tensors
        of, window, scale, off_by_one = ctx.numbers
        queries, heads = q.shape[1], k.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, grad = (x.to(dtype).unflatten(2, (heads, -1)) for x in (q, grad_BQND))
        score_BHGQK, read_BHGQK = (torch.einsum("bqhgd,bkhd->bhgqk", a, b.to(dtype)) for a, b in ((q, k), (grad, v)))
        score_BHGQK = score_BHGQK * scale
        seen_BH1QK = visible_pairs(end, queries)[:, :, None]
        total_BHGQ1 = score_BHGQK.masked_fill(~seen_BH1QK, -torch.inf).logsumexp(-1, keepdim=True)
        if off_by_one:
            total_BHGQ1 = torch.logaddexp(total_BHGQ1, torch.zeros_like(total_BHGQ1))
        total_BHGQ1 = total_BHGQ1.masked_fill(total_BHGQ1 == -torch.inf, torch.inf)  # a query that sees nothing
        above_BHGQK = score_BHGQK - total_BHGQ1
        weight_BHGQK = above_BHGQK.exp().masked_fill(~seen_BH1QK, 0)
        if of != "value":
            read_BHGQK = read_BHGQK - (weight_BHGQK * read_BHGQK).sum(-1, keepdim=True)
        if of == "presence":
            kept_BHGQK = weight_BHGQK / (1 - weight_BHGQK).clamp(min=LEAST_REST)
            weight_BHGQK = torch.where(seen_BH1QK, kept_BHGQK, above_BHGQK.sigmoid())
        index_Q = torch.arange(queries, device=q.device)
        far_BQK = (index_Q[:, None] >= index_Q + window) & (index_Q[:, None] < stop_BT[:, None])
        far_BTH = (weight_BHGQK * read_BHGQK * far_BQK[:, None, None]).sum((2, 3)).transpose(1, 2)
        r_BTH = logits_BTH.to(dtype).sigmoid()
        return grad_BQND, (far_BTH * r_BTH * (1 - r_BTH)).to(logits_BTH.dtype), *[None] * 9


def give_late_gradient(
    out: Tensor, late: LateGradient, q: Tensor, k: Tensor, v: Tensor, end: Tensor, *, window: int, scale: float,
    off_by_one: bool,
) -> Tensor:  # fmt: skip
    """The output [B, T, N, D] of `interval_attention` unchanged, with `late`'s gradient; memory grows with T²."""
    return _BeyondWindow.apply(out, late.logits_BTH, q, k, v, end, late.stop_BT, late.of, window, scale, off_by_one)
