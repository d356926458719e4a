"""Rotary position embedding with integer positions (arXiv 2104.09864), halves rotated as in Llama.

Shapes: B batch, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians per position [D / 2], float64."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)


def rotary_angles(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, D / 2] in float32.

    The angles are taken in float64: in float32 a position of a million would be off by up to 0.06 radians.
    """
    angle = positions_BT[..., None, None].to(torch.float64) * rotary_frequencies(head_dim, theta, positions_BT.device)
    angle = torch.remainder(angle, 2 * math.pi).to(torch.float32)
    return angle.cos(), angle.sin()


def rotate(x_BTHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x rotated to its positions, computed in at least float32, in x's dtype."""
    cos, sin = rotary
    dtype = torch.promote_types(x_BTHD.dtype, torch.float32)
    first, second = x_BTHD.to(dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BTHD.dtype)
