"""Launches of flash-linear-attention's kernels of norm and rotary embedding, on CUDA.

The kernels rather than the library's wrappers: those would tune each over up to 30 configurations at its first call,
take cos and sin only in the dtype of what is rotated, and return a norm in its input's dtype even where the next
product wants 16 bits. models/ops.py makes them differentiable.

Shapes: M rows (tokens), C channels, H heads, R = half of a head's channels, P programs of a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.fla_adapter import bare_kernel

NORM = "fla.modules.norm.layernorm"
ROTARY = "fla.modules.rotary.ops"
MAX_ROTARY_DIM = 256
TOKENS = 64  # of a program of the rotary embedding


def rms_norm_forward(
    x_MC: Tensor, residual_MC: Tensor | None, weight_C: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of the rows of x, or of x + residual, in float32.

    Args:
        x_MC: contiguous rows.
        residual_MC: the same; the sum is returned in its dtype.
        dtype: of the normed rows.

    Returns:
        Normed rows [M, C], what was normed (x, or the sum) [M, C], and 1 / RMS of every row [M] (float32).
    """
    rows, size = x_MC.shape
    added = residual_MC is not None
    normed_MC = torch.empty_like(x_MC, dtype=dtype)
    total_MC = torch.empty_like(residual_MC) if added else None
    inverse_M = torch.empty(rows, dtype=torch.float32, device=x_MC.device)
    with torch.cuda.device_of(x_MC):
        bare_kernel(NORM, "layer_norm_fwd_kernel_row")[(rows,)](
            x=x_MC,
            y=normed_MC,
            w=weight_C,
            b=None,
            res=residual_MC,
            res_out=total_MC,
            mean=None,
            rstd=inverse_M,
            eps=eps,
            G=1,
            D=size,
            BD=_power_of_2(size),
            IS_RMS_NORM=True,
            HAS_RESIDUAL=added,
            STORE_RESIDUAL_OUT=added,
            HAS_WEIGHT=True,
            HAS_BIAS=False,
            num_warps=_warps(size),
        )
    return normed_MC, total_MC if added else x_MC, inverse_M


def rms_norm_backward(
    grad_MC: Tensor,
    grad_total_MC: Tensor | None,
    total_MC: Tensor,
    inverse_M: Tensor,
    weight_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed [M, C], in its dtype, and of the weight [C].

    Args:
        grad_MC: gradient of the normed rows, contiguous.
        grad_total_MC: further gradient of what was normed, contiguous; None if there is none.
        total_MC, inverse_M: as returned by `rms_norm_forward`.
    """
    rows, size = total_MC.shape
    programs = min(rows, 4 * _multiprocessors(total_MC.device))  # several a multiprocessor hide each other's latency
    out_MC = torch.empty_like(total_MC)
    grad_weight_PC = torch.empty(programs, size, dtype=torch.float32, device=total_MC.device)
    with torch.cuda.device_of(total_MC):
        bare_kernel(NORM, "layer_norm_bwd_kernel_row")[(programs,)](
            x=total_MC,
            w=weight_C,
            b=None,
            y=None,
            dy=grad_MC,
            dx=out_MC,
            dw=grad_weight_PC,
            db=None,
            dres=grad_total_MC,
            dres_in=None,
            mean=None,
            rstd=inverse_M,
            T=rows,
            G=1,
            D=size,
            BS=-(-rows // programs),
            BD=_power_of_2(size),
            GS=programs,
            IS_RMS_NORM=True,
            HAS_DRESIDUAL=grad_total_MC is not None,
            STORE_DRESIDUAL=False,
            HAS_WEIGHT=True,
            HAS_BIAS=False,
            RECOMPUTE_OUTPUT=False,
            num_warps=_warps(size),
        )
    return out_MC, grad_weight_PC.sum(0).to(weight_C.dtype)


def rotary(x_MHD: Tensor, cos_MR: Tensor, sin_MR: Tensor, inverse: bool) -> Tensor:
    """Halves of every head rotated by a token's own angles, in float32; the dtype of x.

    Args:
        x_MHD: contiguous [M, H, D] with D = 2 R up to 256.
        cos_MR, sin_MR: contiguous float32.
        inverse: rotate the other way, as the backward pass does.
    """
    rows, heads, dim = x_MHD.shape
    out_MHD = torch.empty_like(x_MHD)
    tokens = TOKENS if rows >= TOKENS * TOKENS else 1
    with torch.cuda.device_of(x_MHD):
        bare_kernel(ROTARY, "rotary_embedding_kernel")[(-(-rows // tokens), 1, heads)](
            x=x_MHD,
            cos=cos_MR,
            sin=sin_MR,
            y=out_MHD,
            cu_seqlens=None,
            chunk_indices=None,
            seq_offsets=0,
            T=rows,
            B=1,
            H=heads,
            D=dim,
            R=dim // 2,
            TR=rows,
            BT=tokens,
            BD=_power_of_2(dim),
            IS_SEQLEN_OFFSETS_TENSOR=False,
            IS_VARLEN=False,
            INTERLEAVED=False,
            CONJUGATE=inverse,
            num_warps=4 if tokens > 1 else 1,
        )
    return out_MHD


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _warps(size: int) -> int:
    """Warps for a row: 8 elements a thread."""
    return max(1, min(16, _power_of_2(size) // 256))


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
