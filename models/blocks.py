"""The blocks of a model: a mixer and a SwiGLU MLP, each after a norm and added to the residual stream.

Shapes: B batch, T tokens, C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lte.sparsity import RetentionStats
from models.attention import RetainedAttention
from models.config import HybridConfig
from models.gated_deltanet import GatedDeltaNet
from models.mixer import Context, Mixer, MixerState
from models.native_sparse_attention import NativeSparseAttention
from models.ops import RMSNorm, linears, swiglu


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down_proj(swiglu(*linears(x_BTC, self.gate_proj, self.up_proj)))


def build_mixer(config: HybridConfig, kind: str) -> Mixer:
    """The mixer of a layer type, with the config's retention."""
    if kind == "attention":
        mixer = RetainedAttention(config)
    elif kind == "gated_deltanet":
        mixer = GatedDeltaNet(
            config.hidden_size,
            config.gdn_num_heads,
            config.gdn_head_dim,
            expand_v=config.gdn_expand_v,
            conv_size=config.gdn_conv_size,
            norm_eps=config.rms_norm_eps,
        )
    else:
        assert kind == "nsa", "the configuration knows no other layer types"
        mixer = NativeSparseAttention(config)
    mixer.set_retention(config.retention)
    return mixer


class Block(GradientCheckpointingLayer):
    """Pre-norm residual block.

    Raises:
        ValueError: a cache in training with gradient checkpointing, whose second pass would read the tokens again.
    """

    def __init__(self, config: HybridConfig, kind: str):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = build_mixer(config, kind)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        for linear in (self.mixer.o_proj, self.mlp.down_proj):
            linear.to_residual_stream = True

    def __call__(self, x_BTC: Tensor, context: Context, state: MixerState | None = None):
        if state is not None and self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "use_cache=True or past_key_values: gradient checkpointing computes a layer twice, and would read "
                "tokens into the cache twice; leave them out, or call model.gradient_checkpointing_disable()"
            )
        return super().__call__(x_BTC, context, state)

    def forward(
        self, x_BTC: Tensor, context: Context, state: MixerState | None = None
    ) -> tuple[Tensor, RetentionStats | None, Tensor | None]:
        mixed = self.mixer(self.mixer_norm(x_BTC), context, state)
        normed_BTC, x_BTC = self.mlp_norm(mixed.hidden, x_BTC)
        return x_BTC + self.mlp(normed_BTC), mixed.retention, mixed.writes
