"""What the models return, in the form of transformers.

Shapes: B batch, T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from lte.sparsity import RetentionStats
from models.cache import HybridCache


@dataclass
class HybridOutput(ModelOutput):
    """Output of `HybridForCausalLM`; in front, as a tuple too, what transformers' causal models give.

    Attributes:
        loss: language-model loss, plus the penalty while training; None without labels.
        logits: [B, T or logits_to_keep, V]; None in training with labels on CUDA, where only pieces of them exist.
        past_key_values: the cache, if one was used.
        hidden_states: inputs of every block and the final norm's output, if asked for.
        lm_loss: mean cross-entropy in nats per predicted token.
        aux_loss: the L1 penalty on retention, Σ λ · mean relu(r - 0.5); already part of `loss` while training.
        retention: what each scorer decided (lte/sparsity.py), one entry an attention layer; None with a cache.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    retention: list[RetentionStats] | None = None


@dataclass
class HybridModelOutput(ModelOutput):
    """Output of `HybridModel`: the normed hidden states [B, T, C] and what the scorers decided."""

    last_hidden_state: Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    retention: list[RetentionStats] | None = None
