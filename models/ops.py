"""Operations that every block needs: norm, linear maps, SwiGLU, rotary embedding and the loss, fused on CUDA.

Each has one meaning and two forms: plain PyTorch, and on CUDA kernels, mostly flash-linear-attention's
(models/fla_fused.py).
Under autocast the norms return its dtype, so that the products after them read 16 bits instead of casting.

Shapes: B batch, T tokens, H heads, D head dimension, C channels, V vocabulary, M = B · T rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import fla_adapter, fla_fused, rotary

IGNORE = -100
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK_BYTES = {"cuda": 2**28, "cpu": 2**25}  # of the logits that exist at a time


def _is_fused(*tensors: Tensor) -> bool:
    """Whether the kernels take these: they compute in float32, so float64 is left to PyTorch."""
    return all(x.is_cuda and x.dtype in FUSED_DTYPES and x.numel() > 0 for x in tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a matrix product would take x: autocast's, where that is on."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


# ---- RMSNorm ----


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension (arXiv 1910.07467), computed in at least float32."""

    def forward(self, x_BTC: Tensor, residual_BTC: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[B, T, C] in x's dtype, or autocast's; with a residual the norm of x + residual, and the sum itself."""
        if residual_BTC is None:
            return rms_norm(x_BTC, self.weight, self.eps)
        return add_rms_norm(x_BTC, residual_BTC, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension.

    Args:
        x: [..., C].
        weight: [C].

    Returns:
        [..., C] in x's dtype; under autocast in autocast's. Differentiable in x and weight.
    """
    if _is_fused(x, weight):
        return _RMSNorm.apply(x, None, weight, eps, compute_dtype(x))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(compute_dtype(x))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and the sum, which is in the wider of the two dtypes."""
    # the kernel writes the sum in the residual's dtype
    if _is_fused(x, residual, weight) and torch.promote_types(x.dtype, residual.dtype) == residual.dtype:
        return _RMSNorm.apply(x, residual, weight, eps, compute_dtype(residual))
    total = x + residual
    return rms_norm(total, weight, eps), total


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        added = None if residual is None else residual.reshape(rows.shape).contiguous()
        weight = weight.contiguous()
        normed, total, inverse = fla_fused.rms_norm_forward(rows, added, weight, eps, dtype)
        ctx.save_for_backward(total, inverse, weight)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        if residual is None:
            return normed.view(x.shape)
        return normed.view(x.shape), total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_total: Tensor | None = None):
        total, inverse, weight = ctx.saved_tensors
        out, grad_weight = grad_total, None  # if only the sum was used
        if grad is not None:
            shape = grad.shape
            grad, grad_total = (
                None if g is None else g.reshape(total.shape).contiguous() for g in (grad, grad_total)
            )
            out, grad_weight = fla_fused.rms_norm_backward(grad, grad_total, total, inverse, weight)
            out = out.view(shape)
        # the residual's gradient runs through all layers: it keeps the dtype of the sum
        grad_x, grad_residual = (None if dtype is None or out is None else out.to(dtype) for dtype in ctx.dtypes)
        return grad_x, grad_residual, grad_weight, None, None


# ---- SwiGLU ----


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202); both [..., C] in one dtype."""
    if _is_fused(gate, up) and gate.dtype == up.dtype:
        return _SwiGLU.apply(gate, up)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        from lte.kernels.elementwise import swiglu

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from lte.kernels.elementwise import swiglu_backward

        return swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


# ---- linear maps of one input ----


def linears(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """What each of several linear maps gives for one input.

    In training on CUDA the gradient of the input is summed inside the products instead of in passes of its own.
    Modules that aren't plain `nn.Linear` (adapters, quantized ones, those with hooks or a bias) are called as ever.

    Args:
        x: [..., C].
        modules: maps from C.
    """
    if not (_is_fused(x) and x.requires_grad and all(is_plain(m) for m in modules)):
        return tuple(module(x) for module in modules)
    dtype = compute_dtype(x)
    return _Linears.apply(x.to(dtype), *(module.weight.to(dtype) for module in modules))


def is_plain(module: nn.Module) -> bool:
    """Whether a module is its weight and nothing else: a linear map without bias, adapter, hook or other forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and module.bias is None and not any(hooks) and "forward" not in vars(module)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        with torch.autocast(x.device.type, enabled=False):
            return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        x, *weights = ctx.saved_tensors
        x_MC = x.flatten(0, -2)
        grad_x_MC = None
        grad_weights: list[Tensor | None] = []
        for weight, grad, wanted in zip(weights, grads, ctx.needs_input_grad[1:], strict=True):
            grad_MN = None if grad is None else grad.flatten(0, -2)
            grad_weights.append(grad_MN.mT @ x_MC if grad is not None and wanted else None)
            if grad is None or not ctx.needs_input_grad[0]:
                continue
            if grad_x_MC is None:
                grad_x_MC = grad_MN @ weight
            else:
                grad_x_MC.addmm_(grad_MN, weight)
        return None if grad_x_MC is None else grad_x_MC.view_as(x), *grad_weights


# ---- rotary embedding ----


def rotate(x_BTHD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864), computed in at least float32.

    Args:
        angles: cos and sin [B, T, 1, D / 2] of the tokens' positions, float32.

    Returns:
        [B, T, H, D] in x's dtype; differentiable in x.
    """
    if _is_fused(x_BTHD) and x_BTHD.shape[-1] <= fla_fused.MAX_ROTARY_DIM:
        return _Rotary.apply(x_BTHD, *angles)
    return rotary.rotate(x_BTHD, angles)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _, dim = x_BTHD.shape
        cos_MR, sin_MR = (
            a.to(torch.float32).expand(batch, length, 1, dim // 2).reshape(-1, dim // 2).contiguous()
            for a in (cos, sin)
        )
        ctx.save_for_backward(cos_MR, sin_MR)
        return _Rotary._turn(x_BTHD, cos_MR, sin_MR, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTHD: Tensor):
        return _Rotary._turn(grad_BTHD, *ctx.saved_tensors, True), None, None

    @staticmethod
    def _turn(x_BTHD: Tensor, cos_MR: Tensor, sin_MR: Tensor, inverse: bool) -> Tensor:
        return fla_fused.rotary(x_BTHD.flatten(0, 1).contiguous(), cos_MR, sin_MR, inverse).view(x_BTHD.shape)


# ---- cross-entropy of a linear map ----


def linear_cross_entropy(
    hidden: Tensor, weight_VC: Tensor, targets: Tensor, *, ignore_index: int = IGNORE, chunk: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of hidden @ weight.T in nats, without all logits ever existing.

    Tokens are taken a chunk at a time, forward and backward in one: a chunk's logits become its gradients, which
    are folded into those of hidden and weight (the latter summed in float32) before the next chunk begins.

    Args:
        hidden: [..., C].
        weight_VC: of the output layer; any dtype, products are taken in hidden's (or autocast's).
        targets: [...] int64 in [0, V), or `ignore_index`.
        chunk: tokens at a time; None: as many as give logits of 256 MiB on CUDA, of 32 MiB elsewhere.

    Returns:
        Scalar float32 (float64 for float64), differentiable once in hidden and weight.

    Raises:
        ValueError: not a target for each token.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be {tuple(hidden.shape[:-1])}, one for each token")
    hidden_MC, targets_M = hidden.flatten(0, -2), targets.flatten()
    dtype = compute_dtype(hidden_MC)
    if chunk is None:
        limit = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
        chunk = max(1, 2 ** ((limit // (len(weight_VC) * dtype.itemsize)).bit_length() - 1))
    return _LinearCrossEntropy.apply(hidden_MC.to(dtype), weight_VC.to(dtype), targets_M, ignore_index, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MC: Tensor, weight_VC: Tensor, targets_M: Tensor, ignore_index: int, chunk: int):
        exact = torch.promote_types(hidden_MC.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total = hidden_MC.new_zeros((), dtype=exact)
        grad_hidden_MC = torch.empty_like(hidden_MC) if needs_hidden else None
        grad_weight_VC = torch.zeros_like(weight_VC, dtype=exact) if needs_weight else None
        with torch.autocast(hidden_MC.device.type, enabled=False):
            for first in range(0, len(hidden_MC), chunk):
                part = slice(first, first + chunk)
                logits_MV = hidden_MC[part] @ weight_VC.mT
                losses_M, grad_MV = _cross_entropy_rows(logits_MV, targets_M[part], ignore_index)
                total = total + losses_M.sum()
                if needs_hidden:
                    torch.mm(grad_MV, weight_VC, out=grad_hidden_MC[part])
                if needs_weight:
                    grad_weight_VC += _product(grad_MV.mT, hidden_MC[part], exact)
        ctx.save_for_backward(grad_hidden_MC, grad_weight_VC)
        ctx.dtype = weight_VC.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_hidden_MC, grad_weight_VC = ctx.saved_tensors
        if grad_hidden_MC is not None:
            # not in the narrow dtype: that would round the factor, for all tokens alike
            grad_hidden_MC = (grad_hidden_MC.to(grad.dtype) * grad).to(grad_hidden_MC.dtype)
        if grad_weight_VC is not None:
            grad_weight_VC = (grad_weight_VC * grad).to(ctx.dtype)
        return grad_hidden_MC, grad_weight_VC, None, None, None


def _cross_entropy_rows(logits_MV: Tensor, targets_M: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy [M] in at least float32 and its gradient [M, V], both 0 where ignored; overwrites the logits."""
    if _is_fused(logits_MV):
        return fla_adapter.cross_entropy_rows(logits_MV, targets_M, ignore_index), logits_MV
    exact_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    log_p_MV = exact_MV.log_softmax(-1)
    real_M = targets_M != ignore_index
    target_M1 = torch.where(real_M, targets_M, 0)[:, None]
    losses_M = -log_p_MV.gather(1, target_M1)[:, 0] * real_M
    grad_MV = log_p_MV.exp_()
    grad_MV.scatter_add_(1, target_M1, grad_MV.new_full((), -1.0).expand_as(target_M1))
    return losses_M, (grad_MV * real_M[:, None]).to(logits_MV.dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, accumulated and returned unrounded where the inputs are narrower."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
