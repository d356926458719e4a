"""Gated DeltaNet: a mixer with a state of fixed size (Yang et al., arXiv 2412.06464).

Parameters and arithmetic agree with flash-linear-attention's layer of that name with an output gate and short
convolutions, so that weights can be exchanged.

Shapes: B batch, T tokens, C hidden size (in the convolutions: channels), H heads, K key channels of a head,
V value channels of a head, L inputs that a convolution remembers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.exact import ExactTensors
from lte.layout import Layout
from models import delta_rule, fla_adapter
from models.mixer import Mixer, MixerOutput
from models.ops import linears

# arXiv 2405.21060 (Mamba-2): decay rates are drawn from (0, 16), time steps from [0.001, 0.1]
_MAX_RATE = 16.0
_MIN_RATE = 1e-4
_TIME_STEPS = (1e-3, 0.1)
# logit of padding: softplus and sigmoid of it are exactly 0 in float32, and bfloat16 can hold it
_PADDING_LOGIT = -1e4


@dataclass(frozen=True)
class GatedDeltaNetState:
    """What a layer remembers of each row; updated in place, at fixed addresses.

    Attributes:
        conv_BCL: [B, q + k + v channels, conv_size - 1], the last inputs of the convolutions, oldest first, in
            the dtype of the model.
        recurrent_BHKV: [B, H, K, V] float32.
    """

    conv_BCL: Tensor
    recurrent_BHKV: Tensor

    @classmethod
    def allocate(
        cls,
        batch: int,
        *,
        num_heads: int,
        head_dim: int,
        expand_v: float = 1.0,
        conv_size: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> GatedDeltaNetState:
        """An empty state of `batch` rows; the other arguments are those of the mixer."""
        value_dim = _value_dim(head_dim, expand_v)
        channels = num_heads * (2 * head_dim + value_dim)
        return cls(
            conv_BCL=torch.zeros(batch, channels, conv_size - 1, dtype=dtype, device=device),
            recurrent_BHKV=torch.zeros(batch, num_heads, head_dim, value_dim, dtype=torch.float32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.conv_BCL.nbytes + self.recurrent_BHKV.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Growth with every token: none."""
        return 0

    @property
    def rule(self) -> dict[str, str | int]:
        """Empty: there are no slots."""
        return {}

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything."""
        self.conv_BCL.zero_()
        self.recurrent_BHKV.zero_()

    @torch.no_grad()
    def reorder(self, index_B: Tensor) -> None:
        """Row b takes the state of row index_B[b] (beam search)."""
        for tensor in (self.conv_BCL, self.recurrent_BHKV):
            tensor.copy_(tensor.index_select(0, index_B.to(tensor.device)))


class ShortConvolution(nn.Module):
    """Weight [C, 1, conv_size] of a depthwise causal convolution, in the shape of `nn.Conv1d`."""

    def __init__(self, channels: int, conv_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, conv_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(conv_size), as `nn.Conv1d` starts."""
        bound = self.weight.shape[-1] ** -0.5
        self.weight.uniform_(-bound, bound)

    def forward(self, x_BTC: Tensor, layout: Layout, state_BCL: Tensor | None = None) -> Tensor:
        """Convolution and SiLU [B, T, C]; a state is updated in place."""
        weight_CW = self.weight.squeeze(1)
        if not x_BTC.is_cuda:
            return delta_rule.causal_conv1d(x_BTC, weight_CW, state_BCL, layout)
        y_BTC = fla_adapter.causal_conv1d(x_BTC, weight_CW, state_NCL=state_BCL, cu_seqlens=layout.cu_seqlens)
        if state_BCL is not None:
            delta_rule.update_conv_state(state_BCL, x_BTC, layout.lengths)
        return y_BTC


class GatedRMSNorm(nn.Module):
    """RMSNorm over the last dimension times SiLU(gate), computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_BTHV: Tensor, gate_BTHV: Tensor) -> Tensor:
        """[B, T, H, V] in the dtype of x."""
        if x_BTHV.is_cuda:
            return fla_adapter.gated_rms_norm(x_BTHV, gate_BTHV, self.weight, self.eps)
        dtype = delta_rule.compute_dtype(x_BTHV)
        x, gate, weight = (t.to(dtype) for t in (x_BTHV, gate_BTHV, self.weight))
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (normed * weight * F.silu(gate)).to(x_BTHV.dtype)


class GatedDeltaNet(ExactTensors, Mixer):
    """Gated DeltaNet mixer (arXiv 2412.06464).

    Args:
        hidden_size: width of the residual stream.
        num_heads: heads.
        head_dim: query and key channels of a head; K.
        expand_v: value channels of a head over `head_dim`; V = head_dim * expand_v.
        conv_size: width of the short convolutions, the own token included.
        norm_eps: epsilon of the output norm.

    Attributes:
        reports_writes: whether `MixerOutput.writes` tells how strongly each token was written (an eviction policy
            reads that, lte/policies.py). The rule then runs in PyTorch on CUDA too, whose kernels don't return it.

    Raises:
        ValueError: a size that isn't positive, conv_size < 2, or head_dim * expand_v not a whole number.
    """

    EXACT = ("A_log", "dt_bias")  # decays are exponentials of exponentials

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        expand_v: float = 1.0,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_heads", num_heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if conv_size < 2:
            raise ValueError(f"conv_size must be at least 2, got {conv_size}; the default is 4")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.expand_v = expand_v
        self.conv_size = conv_size
        self.value_dim = _value_dim(head_dim, expand_v)
        self.reports_writes = False
        keys, values = num_heads * head_dim, num_heads * self.value_dim

        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.g_proj = nn.Linear(hidden_size, values, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.q_conv1d = ShortConvolution(keys, conv_size)
        self.k_conv1d = ShortConvolution(keys, conv_size)
        self.v_conv1d = ShortConvolution(values, conv_size)
        self.A_log = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.o_norm = GatedRMSNorm(self.value_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values of decay, convolutions and norm; the linear maps are left to the model."""
        self.A_log.uniform_(0, _MAX_RATE).clamp_(min=_MIN_RATE).log_()
        low, high = _TIME_STEPS
        step_H = self.dt_bias.uniform_(math.log(low), math.log(high)).exp()
        # softplus of the bias is the time step
        self.dt_bias.copy_(step_H + torch.log(-torch.expm1(-step_H)))
        for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            conv.reset_parameters()
        self.o_norm.weight.fill_(1)

    def set_retention(self, retention: str) -> None:
        """Report writes for the policy that ranks by them."""
        self.reports_writes = retention == "delta_error"

    def allocate_state(
        self, batch: int, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> GatedDeltaNetState:
        """An empty state of `batch` rows for this mixer."""
        return GatedDeltaNetState.allocate(
            batch,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            expand_v=self.expand_v,
            conv_size=self.conv_size,
            dtype=dtype,
            device=device,
        )

    def forward(self, x_BTC: Tensor, layout: Layout, state: GatedDeltaNetState | None = None) -> MixerOutput:
        """Mix tokens of one document.

        With a state, the tokens continue what it holds, and it is updated in place. One token a row without
        gradients is a decoding step, free of host synchronisation.

        Args:
            x_BTC: normalised hidden states.
            layout: where the real tokens lie. Rows of length 0 leave their state as it is.
            state: the layer's state of the same B rows.

        Raises:
            ValueError: packed documents together with a state.
        """
        if state is not None and layout.is_packed:
            raise ValueError("a state holds one document a row: pass rows with lengths instead of cu_seqlens")
        writes_BTH = None
        if self.reports_writes:
            shape = (*x_BTC.shape[:2], self.num_heads)
            writes_BTH = torch.empty(shape, dtype=torch.float32, device=x_BTC.device)
        is_step = self._is_step(x_BTC, layout, state)
        padding_BT1 = None if is_step else _padding(x_BTC, layout)
        if padding_BT1 is not None:
            x_BTC = x_BTC.masked_fill(padding_BT1, 0)
        *inputs, gate_BTC = linears(
            x_BTC, self.q_proj, self.k_proj, self.v_proj, self.a_proj, self.b_proj, self.g_proj
        )
        if is_step:
            o_BTHV = self._step(*inputs, state, writes_BTH)
        else:
            o_BTHV = self._parallel(*inputs, padding_BT1, layout, state, writes_BTH)
        gate_BTHV = gate_BTC.unflatten(-1, (self.num_heads, self.value_dim))
        return MixerOutput(self.o_proj(self.o_norm(o_BTHV, gate_BTHV).flatten(2)), writes=writes_BTH)

    @staticmethod
    def _is_step(x_BTC: Tensor, layout: Layout, state: GatedDeltaNetState | None) -> bool:
        return state is not None and x_BTC.shape[1] == 1 and layout.lengths is None and not torch.is_grad_enabled()

    def _parallel(
        self,
        q_BTC: Tensor,
        k_BTC: Tensor,
        v_BTC: Tensor,
        a_BTH: Tensor,
        b_BTH: Tensor,
        padding_BT1: Tensor | None,
        layout: Layout,
        state: GatedDeltaNetState | None,
        writes_BTH: Tensor | None,
    ) -> Tensor:
        """All tokens at once [B, T, H, V], from the projections of their inputs."""
        states = (None, None, None) if state is None else state.conv_BCL.split(self._channels(), dim=1)
        q = self.q_conv1d(q_BTC, layout, states[0])
        k = self.k_conv1d(k_BTC, layout, states[1])
        v = self.v_conv1d(v_BTC, layout, states[2])
        if padding_BT1 is not None:
            a_BTH, b_BTH = (t.masked_fill(padding_BT1, _PADDING_LOGIT) for t in (a_BTH, b_BTH))
        # a copy, since the backward pass may need what is overwritten below
        initial_BHKV = None if state is None else state.recurrent_BHKV.clone()
        o_BTHV, final_BHKV = self._rule(*self._heads(q, k, v), a_BTH, b_BTH, initial_BHKV, layout, writes_BTH)
        if state is not None:
            state.recurrent_BHKV.copy_(final_BHKV.detach())
        return o_BTHV

    def _rule(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        a_BTH: Tensor,
        b_BTH: Tensor,
        initial_BHKV: Tensor | None,
        layout: Layout,
        writes_BTH: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The chunked rule; the final state is returned where an initial one is given."""
        if q_BTHK.is_cuda and writes_BTH is None:
            return fla_adapter.gated_delta_rule(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                a_BTH,
                b_BTH,
                self.A_log,
                self.dt_bias,
                initial_state_NHKV=initial_BHKV,
                output_final_state=initial_BHKV is not None,
                cu_seqlens=layout.cu_seqlens,
            )
        g_BTH, beta_BTH = decay_and_strength(a_BTH, b_BTH, self.A_log, self.dt_bias)
        return delta_rule.chunk_gated_delta_rule(
            l2_normalize(q_BTHK),
            l2_normalize(k_BTHK),
            v_BTHV,
            g_BTH,
            beta_BTH,
            initial_state=initial_BHKV,
            output_final_state=initial_BHKV is not None,
            layout=layout,
            writes=writes_BTH,
        )

    def _step(
        self,
        q_B1C: Tensor,
        k_B1C: Tensor,
        v_B1C: Tensor,
        a_B1H: Tensor,
        b_B1H: Tensor,
        state: GatedDeltaNetState,
        writes_B1H: Tensor | None = None,
    ) -> Tensor:
        """One token a row [B, 1, H, V], from the projections of its input."""
        inputs_BC = torch.cat([q_B1C, k_B1C, v_B1C], dim=-1)[:, 0]
        weight_CW = torch.cat([c.weight for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]).squeeze(1)
        qkv_BC = delta_rule.step_causal_conv1d(inputs_BC, weight_CW, state.conv_BCL)
        q, k, v = self._heads(*qkv_BC[:, None].split(self._channels(), dim=-1))
        if q_B1C.is_cuda and writes_B1H is None:
            return fla_adapter.gated_delta_rule_step(
                q, k, v, a_B1H, b_B1H, self.A_log, self.dt_bias, state.recurrent_BHKV
            )
        g_B1H, beta_B1H = decay_and_strength(a_B1H, b_B1H, self.A_log, self.dt_bias)
        return delta_rule.step_gated_delta_rule(
            l2_normalize(q), l2_normalize(k), v, g_B1H, beta_B1H, state.recurrent_BHKV, writes_B1H
        )

    def _channels(self) -> list[int]:
        """Channels of q, k and v."""
        return [self.num_heads * self.head_dim] * 2 + [self.num_heads * self.value_dim]

    def _heads(self, q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels split into heads."""
        keys, values = (self.num_heads, self.head_dim), (self.num_heads, self.value_dim)
        return q_BTC.unflatten(-1, keys), k_BTC.unflatten(-1, keys), v_BTC.unflatten(-1, values)


def decay_and_strength(a_BTH: Tensor, b_BTH: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the decay and writing strength [B, T, H], in float32 (float64 for float64 inputs)."""
    dtype = delta_rule.compute_dtype(a_BTH)
    g_BTH = -A_log_H.to(dtype).exp() * F.softplus(a_BTH.to(dtype) + dt_bias_H.to(dtype))
    return g_BTH, b_BTH.to(dtype).sigmoid()


def l2_normalize(x_BTHK: Tensor, eps: float = 1e-6) -> Tensor:
    """Unit length over the last dimension, computed and returned in float32 (float64 for float64 inputs)."""
    x = x_BTHK.to(delta_rule.compute_dtype(x_BTHK))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _padding(x_BTC: Tensor, layout: Layout) -> Tensor | None:
    """Whether each token is padding [B, T, 1]; None where there is none."""
    if layout.lengths is None:
        return None
    return (layout.documents(*x_BTC.shape[:2], x_BTC.device) < 0)[..., None]


def _value_dim(head_dim: int, expand_v: float) -> int:
    value_dim = round(head_dim * expand_v)
    if value_dim < 1 or not math.isclose(value_dim, head_dim * expand_v, rel_tol=1e-6):
        raise ValueError(
            f"expand_v {expand_v} times head_dim {head_dim} must be a positive whole number, got "
            f"{head_dim * expand_v}; choose another expand_v"
        )
    return value_dim
