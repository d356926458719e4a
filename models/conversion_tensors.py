"""Tensor names and shapes of other projects' checkpoints, and what they are here; both ways.

All kinds of models/conversion_layouts.py name their tensors alike.

Shapes: H KV heads, O outputs of a convolution, C its inputs, K its taps, L attention layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import HybridConfig

LAMBDA, KEPT = "model.l1_lambda", "model.num_kept"
OWN_LAMBDA, OWN_DENSITY, OWN_STEPS = (f"penalty_control.{name}" for name in ("penalty_weight", "density", "steps"))


@dataclass(frozen=True)
class Pair:
    """A tensor there and here; the numbers are the same, the shape need not be.

    Attributes:
        foreign: its name there; our shared scorer is stored once for each layer there.
        own: its name here.
        to_own, to_foreign: from one shape to the other.
    """

    foreign: str
    own: str
    to_own: Callable[[Tensor], Tensor] = lambda x: x
    to_foreign: Callable[[Tensor], Tensor] = lambda x: x


def pairs(config: HybridConfig) -> Iterator[Pair]:
    """Every tensor of a model, but for those of the penalty's control and a tied output layer."""
    yield Pair("model.embeddings.weight", "model.embed_tokens.weight")
    yield Pair("model.norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield Pair("lm_head.weight", "lm_head.weight")
    for layer, kind in enumerate(config.layer_types):
        there = here = f"model.layers.{layer}"
        yield Pair(f"{there}.attn_norm.weight", f"{here}.mixer_norm.weight")
        for name in ("mlp_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            yield Pair(f"{there}.{name}.weight", f"{here}.{name}.weight")
        for name in _MIXER_TENSORS[kind]:
            yield Pair(f"{there}.attn.{name}", f"{here}.mixer.{name}")
        if kind == "attention" and config.has_scorer:
            scorer = f"{here}.mixer.scorer" if config.scorer_sharing != "layers" else "model.shared_scorer"
            yield from _scorer_pairs(config, f"{there}.attn.router.conv_stack", scorer)


_MIXER_TENSORS = {
    "attention": [f"{name}_proj.weight" for name in "qkvo"],
    "nsa": [f"{name}_proj.weight" for name in "qkvgo"],
    "gated_deltanet": [
        *(f"{name}_proj.weight" for name in "qkvabgo"),
        *(f"{name}_conv1d.weight" for name in "qkv"),
        "A_log",
        "dt_bias",
        "o_norm.weight",
    ],
}


def _scorer_pairs(config: HybridConfig, there: str, here: str) -> Iterator[Pair]:
    heads = config.num_key_value_heads if config.scorer_sharing == "none" else 1

    def to_taps(x: Tensor) -> Tensor:  # [H O, C, 1, K] -> [H, K, C, O]
        return x.squeeze(2).unflatten(0, (heads, -1)).permute(0, 3, 2, 1)

    def from_taps(x: Tensor) -> Tensor:
        return x.permute(0, 3, 2, 1).flatten(0, 1).unsqueeze(2)

    for layer in range(len(config.scorer_kernel_sizes)):
        yield Pair(f"{there}.convs.{layer}.weight", f"{here}.weights.{layer}", to_taps, from_taps)
        yield Pair(
            f"{there}.convs.{layer}.bias",
            f"{here}.biases.{layer}",
            lambda x: x.unflatten(0, (heads, -1)),
            lambda x: x.flatten(),
        )
    yield Pair(f"{there}.proj.weight", f"{here}.out_weight", lambda x: x.flatten(1), lambda x: x[:, :, None, None])
    yield Pair(f"{there}.proj.bias", f"{here}.out_bias")


# ---- the state of the penalty's control ----


def own_lambda(there: Tensor, config: HybridConfig) -> Tensor:
    """λ [L, H] from one for all (no dimension), one a layer [L], or one a head [L, H].

    Raises:
        ValueError: another shape.
    """
    size = (config.layer_types.count("attention"), config.num_key_value_heads)
    if there.shape not in (size, size[:1], ()):
        raise ValueError(f"{LAMBDA} has shape {tuple(there.shape)}; {size}, {size[:1]} or () is expected")
    return there.reshape(*there.shape, *[1] * (2 - there.ndim)).expand(size).clone()


def foreign_lambda(own_LH: Tensor, dimensions: int) -> Tensor:
    """λ with 2, 1 or 0 dimensions.

    Raises:
        ValueError: it differs where the other kind has one number.
    """
    there = own_LH.flatten(dimensions)[..., 0] if dimensions < 2 else own_LH
    if not torch.equal(there.reshape(*there.shape, *[1] * (2 - dimensions)).expand_as(own_LH), own_LH):
        raise ValueError(
            f"{OWN_LAMBDA} differs between heads or layers, and attn.l1_lambda_shared is not 'head'; "
            "export the model without import.json, which makes it so"
        )
    return there.clone()


def own_density(kept_LH: Tensor, config: HybridConfig) -> Tensor:
    """Share of eligible tokens that is kept, from their number at the length trained on; -1 if none was counted."""
    density_LH = kept_LH / _eligible(config)
    return density_LH if bool(kept_LH.any()) else torch.full_like(density_LH, -1.0)


def foreign_kept(density_LH: Tensor, config: HybridConfig) -> Tensor:
    """Number of kept tokens at the length trained on."""
    return density_LH.clamp(min=0) * _eligible(config)


def _eligible(config: HybridConfig) -> int:
    return max(1, config.max_position_embeddings - config.window)
