"""What every mixer (Gated DeltaNet, attention, NSA) is, takes and returns, so that nobody asks which it is.

Shapes: B batch, T tokens, C hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lte.layout import Layout
from lte.scorer import RetentionScorer
from lte.sparsity import RetentionStats


@dataclass(frozen=True)
class Context(Layout):
    """The layout of a batch, with what all layers of one forward pass share.

    Attributes:
        rotary: cos and sin [B, T, 1, D / 2] of the tokens' text positions; None without rotary embedding of them.
        nsa_rotary: the same for native sparse attention, whose head dimension D is another.
        keep_all: whether the rule keeps everything and the scorer rests (the recipe's `keep_all_steps`).
        shared_scorer: the scorer of all layers where the config shares one.
        writes: [B, T, heads] how strongly the last Gated DeltaNet layer wrote each token, where the policy asks.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    nsa_rotary: tuple[Tensor, Tensor] | None = None
    keep_all: bool = False
    shared_scorer: RetentionScorer | None = None
    writes: Tensor | None = None


@dataclass(frozen=True)
class MixerOutput:
    """A mixer's result.

    Attributes:
        hidden: [B, T, C], to be added to the residual stream. Rows of padding hold finite values without meaning.
        retention: retention statistics of an attention layer with a scorer; None for every other mixer.
        writes: [B, T, heads] how strongly a Gated DeltaNet layer wrote each token, if it was told to report it.
    """

    hidden: Tensor
    retention: RetentionStats | None = None
    writes: Tensor | None = None


class MixerState(Protocol):
    """The cache of one layer."""

    @property
    def nbytes(self) -> int: ...

    @property
    def bytes_per_token(self) -> int:
        """Bytes that every further token of a row takes; 0 where the size is fixed."""

    @property
    def rule(self) -> dict[str, str | int]:
        """What its slots are for, by name: sinks, window, budget, retention; empty where nothing is evicted."""

    def reset(self) -> None: ...

    def reorder(self, index: Tensor) -> None: ...


class Mixer(nn.Module, ABC):
    """A layer that mixes tokens.

    Attributes:
        retention: what fills the slots for retained tokens; `none` in a mixer that has no such slots.
        budget: number of these slots.
    """

    retention = "none"
    budget = 0

    def set_retention(self, retention: str) -> None:
        """Prepare for a policy (`HybridForCausalLM.set_retention` has checked it)."""

    def set_budget(self, budget: int) -> None:
        """Slots for retained tokens from now on, where there are any."""

    @abstractmethod
    def allocate_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> MixerState:
        """An empty cache of `batch` rows, in this dtype and on this device."""

    @abstractmethod
    def forward(self, x_BTC: Tensor, context: Context, state: MixerState | None = None) -> MixerOutput:
        """Mix the tokens of x_BTC [B, T, C]; with a state, after the cached ones, updating it in place."""
