"""The only door to flash-linear-attention 0.6: Gated DeltaNet's kernels, for CUDA tensors.

The library is imported inside the functions, so that nothing of it, nor of Triton, loads without a GPU.

Shapes: B batch, T tokens, H heads, K key channels of a head, V value channels of a head, N documents
(B rows where nothing is packed), C channels, L inputs that a convolution remembers, W its width.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def _load(module: str) -> ModuleType:
    """Import a module of the library.

    Raises:
        ImportError: it is missing, or of a version that lacks the module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Gated DeltaNet on a CUDA device needs {module}: "
            "pip install 'flash-linear-attention>=0.6,<0.7', or move the model to the CPU"
        ) from error


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


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
