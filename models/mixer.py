"""What every mixer (Gated DeltaNet, attention, NSA) takes and returns, so that a block never asks which it holds.

Shapes: B batch, T tokens, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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

    def reset(self) -> None: ...

    def reorder(self, index: Tensor) -> None: ...
