"""The retention scorer: a small dilated CNN that gives each token and KV head a retention logit (arXiv 2510.20787).

Shapes: B batch, T tokens, H KV heads, C channels of a layer, O its outputs, P past inputs kept for streaming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.attention import KERNEL_DTYPES
from lte.layout import Layout


def lookahead_of(kernel_sizes: tuple[int, ...], dilations: tuple[int, ...]) -> int:
    """Tokens after j that j's logit depends on."""
    return sum((size - 1) // 2 * dilation for size, dilation in zip(kernel_sizes, dilations, strict=True))


def channels_of(head_dim: int, layers: int) -> tuple[int, ...]:
    """Inputs of each layer and outputs of the last: 2 D, D, D / 2, …"""
    return (2 * head_dim, *(head_dim // 2**layer for layer in range(layers)))


def check_sizes(head_dim: int, kernel_sizes: Sequence[int], dilations: Sequence[int]) -> None:
    """Raises ValueError, naming the sizes, if a scorer can't be built of them."""
    if not kernel_sizes or len(kernel_sizes) != len(dilations):
        raise ValueError(
            f"scorer_kernel_sizes={list(kernel_sizes)} and scorer_dilations={list(dilations)}: give one of each "
            "a layer"
        )
    if any(size % 2 == 0 or size < 1 for size in kernel_sizes) or any(d < 1 for d in dilations):
        raise ValueError(
            f"scorer_kernel_sizes={list(kernel_sizes)} must be odd and scorer_dilations={list(dilations)} at least "
            "1, so that the padding is the same on both sides"
        )
    if head_dim % 2 ** (len(kernel_sizes) - 1):
        raise ValueError(
            f"head_dim={head_dim} can't be halved {len(kernel_sizes) - 1} times; use a multiple of "
            f"{2 ** (len(kernel_sizes) - 1)} or fewer scorer layers"
        )


@dataclass(frozen=True)
class ScorerState:
    """Streaming state: the last inputs of each convolution, [B, H, P_l, C_l] a layer, updated in place."""

    inputs: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        batch: int,
        heads: int,
        channels: tuple[int, ...],
        kernel_sizes: tuple[int, ...],
        dilations: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> ScorerState:
        """An empty state; `channels` are the inputs of each layer (further entries don't count)."""
        past = [(size - 1) * dilation for size, dilation in zip(kernel_sizes, dilations, strict=True)]
        return cls(
            tuple(
                torch.zeros(batch, heads, p, c, dtype=dtype, device=device)
                for p, c in zip(past, channels, strict=False)
            )
        )

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.inputs)

    def reset(self) -> None:
        for x in self.inputs:
            x.zero_()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes the former row index[b]."""
        for x in self.inputs:
            x.copy_(x.index_select(0, index.to(x.device)))


class RetentionScorer(nn.Module):
    """Logits of retention per KV head from its keys (before rotary embedding) and values.

    Layers of 1-D convolutions with "same" padding, each after dropout and before SiLU, then a linear map. Tokens
    up to `lookahead` ahead are read; sequences end in zeros, at document boundaries too.

    Args:
        heads: KV heads H.
        head_dim: D; the input has 2 D channels, the layers D, D / 2, D / 4, … (a multiple of 2 ** (layers - 1)).
        kernel_sizes: odd kernel sizes, one a layer.
        dilations: one a layer.
        dropout: before each layer, in training.
        share_heads: one stack for all heads instead of one each.
        init_scale: factor of the last map's initial weights. 0: logits start at +0.5 whatever the keys and values.

    Raises:
        ValueError: sizes that don't fit.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        kernel_sizes: tuple[int, ...] = (3, 3, 3),
        dilations: tuple[int, ...] = (2, 2, 2),
        dropout: float = 0.1,
        share_heads: bool = False,
        init_scale: float = 1.0,
    ):
        super().__init__()
        check_sizes(head_dim, kernel_sizes, dilations)
        self.heads = heads
        self.kernel_sizes = tuple(kernel_sizes)
        self.dilations = tuple(dilations)
        self.dropout = dropout
        self.init_scale = init_scale
        self.channels = channels_of(head_dim, len(kernel_sizes))
        stacks = 1 if share_heads else heads
        sizes = list(zip(self.kernel_sizes, self.channels, self.channels[1:], strict=False))
        # [stacks, taps, C, O]: one matrix product a tap
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(stacks, k, c, o)) for k, c, o in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(stacks, o)) for _, _, o in sizes)
        self.out_weight = nn.Parameter(torch.empty(stacks, self.channels[-1]))
        self.out_bias = nn.Parameter(torch.empty(stacks))
        self.reset_parameters()

    @property
    def lookahead(self) -> int:
        return lookahead_of(self.kernel_sizes, self.dilations)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming initialisation; the last bias is +0.5, so that while inputs are small everything is kept."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            nn.init.normal_(weight, std=math.sqrt(2 / (weight.shape[1] * weight.shape[2])))
            nn.init.zeros_(bias)
        nn.init.normal_(self.out_weight, std=self.init_scale * math.sqrt(1 / self.out_weight.shape[1]))
        nn.init.constant_(self.out_bias, 0.5)

    def forward(self, x_BTHC: Tensor, layout: Layout | None = None) -> Tensor:
        """Logits [B, T, H] (float32) of whole documents, from [k ; v] in x_BTHC; padding gets arbitrary numbers."""
        layout = layout or Layout()
        batch, length = x_BTHC.shape[:2]
        document_BT = None
        if layout.is_packed or layout.lengths is not None:
            document_BT = layout.documents(batch, length, x_BTHC.device)
        if _runs_kernels(x_BTHC):
            from lte.kernels.scorer import score

            return score(
                x_BTHC,
                list(self.weights),
                list(self.biases),
                self.out_weight,
                self.out_bias,
                dilations=self.dilations,
                dropout=self.dropout if self.training else 0.0,
                document_BT=document_BT,
            )
        x_HBTC = x_BTHC.permute(2, 0, 1, 3)
        if document_BT is not None:
            x_HBTC = x_HBTC * (document_BT >= 0)[..., None]
        for layer in range(len(self.weights)):
            reach = (self.kernel_sizes[layer] - 1) // 2 * self.dilations[layer]
            padded = F.pad(self._drop(x_HBTC), (0, 0, reach, reach))
            x_HBTC = self._convolve(layer, padded, length, document_BT)
        return self._logits(x_HBTC)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _convolve(self, layer: int, padded: Tensor, length: int, document_BT: Tensor | None) -> Tensor:
        """SiLU of the convolution of `padded` [H, B, length + 2 reach, C] at `length` places: a product a tap."""
        weight, dilation = self.weights[layer], self.dilations[layer]
        heads, batch = padded.shape[:2]
        reach = (self.kernel_sizes[layer] - 1) // 2 * dilation
        out = self.biases[layer][:, None].to(padded.dtype)
        for tap in range(self.kernel_sizes[layer]):
            x = padded[:, :, tap * dilation : tap * dilation + length]
            if document_BT is not None and tap * dilation != reach:
                x = x * _same_document(document_BT, tap * dilation - reach)[..., None]
            w = weight[:, tap].expand(heads, -1, -1)
            out = out + torch.bmm(x.reshape(heads, batch * length, -1), w)
        return F.silu(out).view(heads, batch, length, -1)

    def _convolve_joined(self, layer: int, joined_HBSC: Tensor, length: int) -> Tensor:
        """SiLU of the convolution at the last `length` tokens, all of whose inputs are there."""
        if not _runs_kernels(joined_HBSC):
            return self._convolve(layer, joined_HBSC, length, None)
        from lte.kernels.scorer import convolve

        y_BHTO = convolve(
            joined_HBSC.transpose(0, 1),
            self.weights[layer],
            self.biases[layer],
            self.dilations[layer],
            length,
            is_first=layer == 0,
        )
        return y_BHTO.transpose(0, 1)

    def _logits(self, x_HBTC: Tensor) -> Tensor:
        # the last product in float32: the sign and the order of logits decide what is kept
        x_BTHC = x_HBTC.permute(1, 2, 0, 3).to(torch.promote_types(x_HBTC.dtype, torch.float32))
        return (x_BTHC * self.out_weight.to(x_BTHC.dtype)).sum(-1) + self.out_bias.to(x_BTHC.dtype)

    def allocate_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> ScorerState:
        """An empty streaming state for `batch` rows."""
        return ScorerState.allocate(
            batch, self.heads, self.channels, self.kernel_sizes, self.dilations, dtype=dtype, device=device
        )

    def stream(self, x_BTHC: Tensor, state: ScorerState, seen_B: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Logits of the tokens `lookahead` earlier, from the next T tokens of each row; updates `state` in place.

        Args:
            x_BTHC: [k ; v] of the new tokens.
            seen_B: tokens of each row before these.
            lengths_B: real tokens of each row, at its left; None: all T.

        Returns:
            [B, T, H] float32; entry t belongs to position seen + t - lookahead (meaningless where that is negative or
            t is not below the row's length).
        """
        length = x_BTHC.shape[1]
        x_HBTC = x_BTHC.permute(2, 0, 1, 3)
        position_BT = seen_B[:, None] + torch.arange(length, device=seen_B.device)
        for layer, past_BHPC in enumerate(state.inputs):
            joined = torch.cat([past_BHPC.transpose(0, 1).to(x_HBTC.dtype), x_HBTC], 2)
            past = past_BHPC.shape[2]
            if lengths_B is None:
                tail = joined[:, :, length:]
            else:
                place_BP = lengths_B[:, None] + torch.arange(past, device=lengths_B.device)
                tail = joined.gather(2, place_BP[None, :, :, None].expand(len(joined), -1, -1, joined.shape[-1]))
            past_BHPC.copy_(tail.detach().transpose(0, 1))
            x_HBTC = self._convolve_joined(layer, joined, length)
            # an output arrives `reach` tokens late; before position 0 there is the padding's zero
            position_BT = position_BT - past // 2
            x_HBTC = x_HBTC * (position_BT >= 0)[..., None]
        return self._logits(x_HBTC)


def _runs_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take this: they sum in float32, so float64 is left to PyTorch."""
    return x.is_cuda and x.dtype in KERNEL_DTYPES and x.numel() > 0


def _same_document(document_BT: Tensor, shift: int) -> Tensor:
    """Whether the token `shift` places on belongs to the same document [B, T] (padding: never)."""
    length = document_BT.shape[1]
    other = F.pad(document_BT, (max(-shift, 0), max(shift, 0)), value=-1)
    start = max(shift, 0)
    return (other[:, start : start + length] == document_BT) & (document_BT >= 0)
