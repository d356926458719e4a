"""The only door to flash-linear-attention 0.6: kernels of Gated DeltaNet and native sparse attention, on CUDA.

The library is imported inside the functions, so that nothing of it, nor of Triton, loads without a GPU.

Shapes: B batch, T tokens, H heads, K key channels of a head, V value channels of a head, N documents
(B rows where nothing is packed), C channels, L inputs that a convolution remembers, W its width. In native sparse
attention: N query heads, H KV heads, D head dimension.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _load(module: str) -> ModuleType:
    """Import a module of the library.

    Raises:
        ImportError: it is missing, or of a version that lacks the module.
    """
    try:
        _offer_configurations()
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Gated DeltaNet and native sparse attention on a CUDA device need {module}: "
            "pip install 'flash-linear-attention>=0.6,<0.7', or move the model to the CPU"
        ) from error


def _offer_configurations() -> None:
    """Point the library to kernel configurations that were tuned for our sizes, so that a first step need not tune.

    It reads the two variables once, when it is imported; whoever set one, or imported it before, is not overruled.
    Sizes that aren't in the files are tuned as ever.
    """
    if "fla" in sys.modules or {"FLA_CACHE_MODE", "FLA_CONFIG_DIR"} & os.environ.keys():
        return
    if not torch.cuda.is_available():
        return
    folder = Path(__file__).with_name("fla_configs") / "sm{}{}".format(*torch.cuda.get_device_capability())
    if folder.is_dir():
        os.environ["FLA_CACHE_MODE"] = "strict"
        os.environ["FLA_CONFIG_DIR"] = str(folder)


def bare_kernel(module: str, name: str) -> Any:
    """A Triton kernel of the library without its autotuner: whoever launches it chooses the configuration."""
    kernel = getattr(_load(module), name)
    while not kernel.__class__.__name__.endswith("Function"):  # Autotuner and Heuristics wrap a JITFunction
        kernel = kernel.fn
    return kernel


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTH: Tensor,
    b_BTH: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    *,
    initial_state_NHKV: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Chunked form, differentiable. Normalises q and k, and computes decay and strength, inside the kernels.

    Args:
        q_BTHK, k_BTHK, v_BTHV: after convolution and activation, not normalised.
        a_BTH, b_BTH: projections before softplus and sigmoid.
        A_log_H, dt_bias_H: parameters of the decay.
        initial_state_NHKV: float32 state before the first token; zeros if None.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] boundaries of packed documents, with B = 1.

    Returns:
        Outputs [B, T, H, V] and the final state [N, H, K, V] (float32) or None.
    """
    return _load("fla.ops.gated_delta_rule").chunk_gated_delta_rule(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        a_BTH,
        b_BTH,
        initial_state=initial_state_NHKV,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log_H,
        dt_bias=dt_bias_H,
    )


@torch.no_grad()
def gated_delta_rule_step(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    a_B1H: Tensor,
    b_B1H: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    state_BHKV: Tensor,
) -> Tensor:
    """One token for every row; arguments as in `gated_delta_rule`, the float32 state is updated in place.

    Returns:
        Output [B, 1, H, V] in the dtype of v.
    """
    kernel = _load("fla.ops.gated_delta_rule.fused_recurrent").fused_recurrent_gated_delta_rule_fwd_kernel
    assert state_BHKV.dtype == torch.float32
    assert state_BHKV.is_contiguous()
    q, k, v, a, b = (x.contiguous() for x in (q_B1HK, k_B1HK, v_B1HV, a_B1H, b_B1H))
    batch, length, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    value_block = min(8, _power_of_2(value_dim))
    output_B1HV = torch.empty_like(v)
    grid = (-(-value_dim // value_block) * batch * heads,)
    # The kernel rather than its wrapper: each program reads its part of the state before it writes it, so one
    # tensor can be both, while the wrapper would allocate a second state and have it copied.
    with torch.cuda.device_of(q):
        kernel[grid](
            q=q,
            k=k,
            v=v,
            g=a,
            gk=None,
            gv=None,
            beta=b,
            A_log=A_log_H,
            dt_bias=dt_bias_H,
            o=output_B1HV,
            h0=state_BHKV,
            ht=state_BHKV,
            cu_seqlens=None,
            scale=key_dim**-0.5,
            T=length,
            H=heads,
            HV=heads,
            K=key_dim,
            V=value_dim,
            BK=_power_of_2(key_dim),
            BV=value_block,
            IS_BETA_HEADWISE=True,
            USE_QK_L2NORM_IN_KERNEL=True,
            APPLY_BETA_SIGMOID=True,
            ALLOW_NEG_EIGVAL=False,
            STATE_V_FIRST=False,
            num_warps=1,
            num_stages=3,
        )
    return output_B1HV


def causal_conv1d(
    x_BTC: Tensor, weight_CW: Tensor, *, state_NCL: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution, then SiLU [B, T, C]; reads the state [N, C, W - 1] but doesn't update it."""
    # the library's states have W columns, of which it never reads the first
    initial_state_NCW = None if state_NCL is None else F.pad(state_NCL, (1, 0))
    output_BTC, _ = _load("fla.modules.causal_conv1d").causal_conv1d(
        x_BTC, weight_CW, initial_state=initial_state_NCW, activation="silu", cu_seqlens=cu_seqlens
    )
    return output_BTC


def gated_rms_norm(x_BTHV: Tensor, gate_BTHV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension times SiLU of the gate [B, T, H, V]."""
    norm = _load("fla.modules.norm.fused_norm_gate").rms_norm_gated
    return norm(x_BTHV, gate_BTHV, weight_V, None, activation="swish", eps=eps)


def cross_entropy_rows(logits_MV: Tensor, targets_M: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy of every row [M] (float32), 0 where ignored; overwrites the logits with its gradient."""
    ops = _load("fla.modules.fused_cross_entropy.ops")
    with torch.cuda.device_of(logits_MV):
        losses_M, _, lse_M, classes, first = ops.cross_entropy_fwd(logits_MV, targets_M, ignore_index=ignore_index)
        ops.cross_entropy_bwd(
            logits_MV,
            targets_M,
            lse_M,
            losses_M.new_ones(()).expand(len(losses_M)),
            ignore_index=ignore_index,
            total_classes=classes,
            class_start_idx=first,
            inplace_backward=True,
        )
    return losses_M


def causal_attention(q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None = None) -> Tensor:
    """The library's own dense attention [B, T, N, D], full or over the last `window` keys: a peer to measure."""
    return _load("fla.ops.attn.parallel").parallel_attn(q_BTND, k_BTHD, v_BTHD, window_size=window)


def nsa_obstacle(dtype: torch.dtype, group: int, head_dim: int, block_size: int, selected_blocks: int) -> str | None:
    """Why `nsa_blocks` can't take these sizes; None if it can.

    Args:
        group: query heads that share a KV head.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels would compute {dtype} in TF32; use bfloat16"
    if group < 16 or group != _power_of_2(group):
        return f"{group} query heads share a KV head, the kernels want a power of 2 from 16 on"
    if not 16 <= head_dim <= 256:
        return f"head_dim is {head_dim}, the kernels want 16 to 256"
    if block_size < 16 or block_size != _power_of_2(block_size):
        return f"the block size is {block_size}, the kernels want a power of 2 from 16 on"
    if selected_blocks != _power_of_2(selected_blocks) or block_size < 2 * selected_blocks:
        return (
            f"{selected_blocks} blocks are selected, the kernels want a power of 2 up to half a block's {block_size}"
        )
    return None


def nsa_blocks(
    q_BTND: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    gates_BTN3: Tensor,
    *,
    block_size: int,
    selected_blocks: int,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compressed and selected branch of native sparse attention, gated and added [B, T, N, D] (arXiv 2502.11089).

    Args:
        gates_BTN3: weights of the compressed, the selected and the window branch; the last is not used here, for
            the library's own window needs another library.
        cu_seqlens: [M + 1] boundaries of packed documents, with B = 1. Two such: those of the queries and those of
            the keys, where a document's queries are its last tokens; without gradients, and without empty documents.
    """
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = _without_empty(cu_seqlens)
    g_cmp, g_slc, _ = gates_BTN3.to(q_BTND.dtype).unbind(-1)
    return _load("fla.ops.nsa.parallel").parallel_nsa(
        q_BTND,
        k_BTHD,
        v_BTHD,
        g_cmp=g_cmp,
        g_slc=g_slc,
        block_counts=selected_blocks,
        block_size=block_size,
        window_size=0,
        cu_seqlens=cu_seqlens,
    )


@lru_cache(maxsize=4)
def _without_empty(cu_seqlens: Tensor) -> Tensor:
    """Boundaries without empty documents, which the library would miscount.

    Kept for the tensor it was asked for: all layers ask for the same, and each answer waits for the device.
    """
    return torch.unique_consecutive(cu_seqlens)


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
