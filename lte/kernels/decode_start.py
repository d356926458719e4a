"""What a decoding step begins with: the tokens' embeddings, and the rotary angles of their positions.

Letters in shape suffixes: B batch, V vocabulary, C hidden size, D head dimension.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.launch import launch_options, on_device, wait_for_inputs

TURN = tl.constexpr(2 * math.pi)


@triton.jit
def _start_kernel(
    token_ptr, table_ptr, seen_ptr, frequency_ptr, x_ptr, cos_ptr, sin_ptr, token_row,
    SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PAD_HALF: tl.constexpr, ROTARY: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    token = tl.load(token_ptr + b * token_row)
    x = tl.load(table_ptr + token * SIZE + column, mask=column < SIZE, other=0.0)
    tl.store(x_ptr + b * SIZE + column, x, mask=column < SIZE)
    if ROTARY:  # noqa: SIM102
        if tl.program_id(0) == 0:
            d = tl.arange(0, PAD_HALF)
            # in float64: at a million positions float32 is off by 0.06 radians
            angle = tl.load(seen_ptr + b).to(tl.float64) * tl.load(frequency_ptr + d, mask=d < HALF, other=0.0)
            angle = (angle - tl.floor(angle / TURN) * TURN).to(tl.float32)
            tl.store(cos_ptr + b * HALF + d, tl.cos(angle), mask=d < HALF)
            tl.store(sin_ptr + b * HALF + d, tl.sin(angle), mask=d < HALF)


def start_step(
    token_B1: Tensor,
    table_VC: Tensor,
    seen_B: Tensor | None = None,
    frequencies: Tensor | None = None,
    *,
    overlap: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Embeddings [B, C] of the tokens, and cos and sin [B, D / 2] (float32) of their positions' angles.

    Args:
        token_B1: int64.
        table_VC: embeddings, contiguous.
        seen_B, frequencies: positions (int64) and radians per position [D / 2] (float64); None: no angles.
    """
    batch, size = len(token_B1), table_VC.shape[1]
    device = table_VC.device
    x_BC = torch.empty(batch, size, dtype=table_VC.dtype, device=device)
    half = 0 if frequencies is None else frequencies.shape[0]
    angles = None
    if half:
        angles = tuple(torch.empty(batch, half, dtype=torch.float32, device=device) for _ in range(2))
    cos, sin = angles if angles is not None else (None, None)
    with on_device(x_BC):
        _start_kernel[(triton.cdiv(size, 1024), batch)](
            token_B1, table_VC, seen_B, frequencies, x_BC, cos, sin, token_B1.stride(0), SIZE=size, HALF=half,
            BLOCK=1024, PAD_HALF=triton.next_power_of_2(max(1, half)), ROTARY=half > 0, OVERLAP=overlap,
            **launch_options(overlap, warps=4),
        )  # fmt: skip
    return x_BC, angles
