"""Operations and bytes of a model by formula: a new token in decoding, and a token of training.

A multiplication with its addition counts as two operations. Norms, gates, rotary embeddings and softmax are left
out. Formulas and their letters are those of docs/mixers.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lte.scorer import channels_of
from models.config import HybridConfig
from models.mixer import Mixer
from models.modeling import HybridForCausalLM

CHUNK = 64  # tokens that the chunked form of Gated DeltaNet takes at once


@dataclass(frozen=True)
class MixerCosts:
    """What one layer costs for one row; its linear maps are left out.

    Attributes:
        layers: layers of this kind.
        cache_fixed: bytes of a cache that never grows; 0 for a growing one.
        cache_per_token: bytes that every further token adds.
        step_operations: of a new token, at the end of a text.
        step_bytes: read and written for it: keys and values in reach, the state, the scorer's weights.
        training_operations: of a token in the forward pass, mean over a row.
    """

    layers: int
    cache_fixed: int
    cache_per_token: int
    step_operations: int
    step_bytes: int
    training_operations: int


@dataclass(frozen=True)
class Costs:
    """What a token costs.

    Attributes:
        length: tokens of the text before the new one, and of a row in training.
        mixers: by layer type.
        linear_operations: of all linear maps for one token, the output layer included.
        weight_bytes: read for a step: all parameters but the rows of an embedding of its own.
        step_operations, step_bytes: of a new token of one row in decoding, weights read once.
        training_operations: of a token in the forward pass. The backward pass takes about twice as much.
    """

    length: int
    mixers: dict[str, MixerCosts]
    linear_operations: int
    weight_bytes: int
    step_operations: int
    step_bytes: int
    training_operations: int


def costs(config: HybridConfig, length: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Costs:
    """Operations and bytes of a token after `length` others; None: the length that the model is trained on.

    Args:
        dtype: of weights, keys, values and convolution states.

    Raises:
        ValueError: length below 1.
    """
    length = config.max_position_embeddings if length is None else length
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    model.tie_weights()
    formulas = {"attention": _attention, "gated_deltanet": _gated_deltanet, "nsa": _native_sparse}
    mixers = {}
    for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
        if kind not in mixers:
            work = formulas[kind](config, length, dtype.itemsize)
            mixers[kind] = MixerCosts(config.layer_types.count(kind), *_cache(layer.mixer, dtype), *work)
    linear = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    unread = 0 if config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    weights = (sum(p.numel() for p in model.parameters()) - unread) * dtype.itemsize
    scorer = sum(p.numel() for name, p in model.named_parameters() if "scorer." in name) * dtype.itemsize
    total = lambda name: sum(cost.layers * getattr(cost, name) for cost in mixers.values())
    return Costs(
        length=length,
        mixers=mixers,
        linear_operations=linear,
        weight_bytes=weights,
        step_operations=linear + total("step_operations"),
        step_bytes=weights - scorer + total("step_bytes"),
        training_operations=linear + total("training_operations"),
    )


def _cache(mixer: Mixer, dtype: torch.dtype) -> tuple[int, int]:
    """Fixed bytes and growth of a layer's cache of one row."""
    state = mixer.allocate_state(1, dtype, torch.device("meta"))
    return 0 if state.bytes_per_token else state.nbytes, state.bytes_per_token


def mean_reach(length: int, reach: int | None) -> float:
    """Mean over a row of the keys that a query reads: itself and those before, at most `reach`."""
    full = length if reach is None else min(length, reach)
    return (full * (full + 1) / 2 + (length - full) * full) / length


def _attention(config: HybridConfig, length: int, itemsize: int) -> tuple[int, int, int]:
    """Step operations, step bytes, training operations."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    reach = None if config.window is None else config.sinks + config.budget + config.window
    read = length + 1 if reach is None else min(length + 1, reach)
    scorer = stack = 0
    if config.has_scorer:
        channels = channels_of(dim, len(config.scorer_kernel_sizes))
        taps = zip(config.scorer_kernel_sizes, channels, channels[1:], strict=False)
        stack = sum(size * c * o for size, c, o in taps) + channels[-1]
        scorer = 2 * kv_heads * stack
        stack *= kv_heads if config.scorer_sharing == "none" else 1
    return (
        4 * heads * dim * read + scorer,
        (2 * kv_heads * dim * read + stack) * itemsize,
        round(4 * heads * dim * mean_reach(length, reach)) + scorer,
    )


def _gated_deltanet(config: HybridConfig, length: int, itemsize: int) -> tuple[int, int, int]:
    """As `_attention`."""
    heads, keys = config.gdn_num_heads, config.gdn_head_dim
    values = round(keys * config.gdn_expand_v)
    convolutions = 2 * config.gdn_conv_size * heads * (2 * keys + values)
    chunked = heads * (6 * keys * values + 2 * CHUNK * (keys + values) + CHUNK**2)
    # the state is float32 whatever the model's dtype, and both read and written
    return 7 * heads * keys * values + convolutions, 8 * heads * keys * values, chunked + convolutions


def _native_sparse(config: HybridConfig, length: int, itemsize: int) -> tuple[int, int, int]:
    """As `_attention`."""
    heads, kv_heads, dim, block = (
        config.nsa_num_heads,
        config.nsa_num_key_value_heads,
        config.nsa_head_dim,
        config.nsa_block_size,
    )
    chosen = config.nsa_selected_blocks * block
    read = (length + 1) // block + min(length + 1, chosen) + min(length + 1, config.nsa_window)
    blocks = length // block  # a query reads the means of the blocks that are full
    means = (block * blocks * (blocks - 1) / 2 + blocks * (length - blocks * block + 1)) / length
    mean = means + mean_reach(length, chosen) + mean_reach(length, config.nsa_window)
    return 4 * heads * dim * read, 2 * kv_heads * dim * read * itemsize, round(4 * heads * dim * mean)
