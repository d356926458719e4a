"""What streaming has to know of the decoders of transformers: their attention modules, projections, positions.

Shapes: B batch, T tokens, C hidden size, N query heads, H KV heads, D head dimension, R rotary channels,
P places, S cache slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

Projected = tuple[Tensor, Tensor, Tensor]  # q [B, T, N, D], k and v [B, T, H, D], without any position


@dataclass(frozen=True)
class Family:
    """Attention modules of one kind.

    Attributes:
        models: names of transformers' causal language models that have it.
        layers: attribute of the base model that lists its layers.
        attention: attribute of a layer that is its attention module.
        output: attribute of the attention module that is its last projection.
        project: queries, keys and values of hidden states [B, T, C].
        scale: attribute of the attention module that is the factor of the scores.
    """

    models: tuple[str, ...]
    layers: str
    attention: str
    output: str
    project: Callable[[nn.Module, Tensor], Projected]
    scale: str

    def modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The attention modules of a model, from the first layer to the last."""
        return [getattr(layer, self.attention) for layer in getattr(model.base_model, self.layers)]


def _project_separate(module: nn.Module, x_BTC: Tensor) -> Projected:
    q, k, v = (
        proj(x_BTC).unflatten(-1, (-1, module.head_dim)) for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):  # Qwen3 normalises heads before it rotates them
        q, k = module.q_norm(q), module.k_norm(k)
    return q, k, v


def _project_gpt_neox(module: nn.Module, x_BTC: Tensor) -> Projected:
    return module.query_key_value(x_BTC).unflatten(-1, (-1, 3, module.head_size)).unbind(-2)


def _project_falcon(module: nn.Module, x_BTC: Tensor) -> Projected:
    shares = module.new_decoder_architecture or module.multi_query
    heads = module.num_kv_heads if shares else module.num_heads
    # each KV head's queries, key and value; slices, since an index that is a list waits for the device
    fused = module.query_key_value(x_BTC).unflatten(-1, (heads, -1, module.head_dim))
    return fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]


def _project_mpt(module: nn.Module, x_BTC: Tensor) -> Projected:
    qkv = module.Wqkv(x_BTC)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    return qkv.unflatten(-1, (3, module.n_heads, module.head_dim)).unbind(-3)


FAMILIES = (
    Family(
        ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        "layers",
        "self_attn",
        "o_proj",
        _project_separate,
        "scaling",
    ),
    Family(
        ("GPTNeoXForCausalLM",),
        "layers",
        "attention",
        "dense",
        _project_gpt_neox,
        "scaling",
    ),
    Family(
        ("FalconForCausalLM",),
        "h",
        "self_attention",
        "dense",
        _project_falcon,
        "inv_norm_factor",
    ),
    Family(
        ("MptForCausalLM",),
        "blocks",
        "attn",
        "out_proj",
        _project_mpt,
        "softmax_scale",
    ),
)


def passes_masks_on(base: nn.Module) -> bool:
    """Whether a base model hands a mask with four dimensions on as it is, instead of making one of its own.

    Falcon with linear biases builds them from the mask, and wants it with two.
    """
    return not getattr(base, "use_alibi", False)


def family_of(model: object) -> Family:
    """The family of a model.

    Raises:
        ValueError: not one of the decoders that can be streamed.
    """
    for family in FAMILIES:
        if isinstance(model, tuple(getattr(transformers, name) for name in family.models)):
            return family
    served = ", ".join(name for family in FAMILIES for name in family.models)
    raise ValueError(
        f"model: {type(model).__name__} can't be streamed, since nothing is known of its positions; "
        f"load one of {served}"
    )


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding, looked up by place.

    Attributes:
        frequencies: [R / 2] float32 radians a place; the first R channels of a head are rotated.
        factor: what the model multiplies cosine and sine with (1 but for some scalings).
    """

    frequencies: Tensor
    factor: float

    def table(self, places: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [P, R] of places 0 to P - 1, float32."""
        angle = torch.arange(places, device=device).float()[:, None] * self.frequencies.to(device)
        angle = torch.cat([angle, angle], -1)
        return angle.cos() * self.factor, angle.sin() * self.factor


@dataclass(frozen=True)
class Alibi:
    """Linear biases (arXiv 2108.12409), as the model makes them: a function from S to biases [N, S] of places."""

    biases: Callable[[int], Tensor]

    def table(self, places: int, device: torch.device) -> Tensor:
        """Biases [N, P] of keys at places 0 to P - 1, float32; only differences of a row count."""
        return self.biases(places).to(device, torch.float32)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with its first R channels rotated, in x's dtype as the models do it.

    Args:
        cos, sin: [B, 1, T, R] in x's dtype.
    """
    channels = cos.shape[-1]
    turned, rest = x_BHTD[..., :channels], x_BHTD[..., channels:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def encoding_of(model: PreTrainedModel, sinks: int, window: int, budget: int = 0) -> Rotary | Alibi:
    """The model's own encoding of positions, for places inside a cache of so many keys.

    Raises:
        ValueError: a rotary scaling that depends on the length of the text within the cache's size, a sliding
            window of the model shorter than the cache, or an embedding that isn't rotary as known.
    """
    config, base = model.config, model.base_model
    if isinstance(model, transformers.MptForCausalLM):
        return Alibi(lambda places: base.build_mpt_alibi_tensor(config.n_heads, places)[:, 0])
    if getattr(config, "alibi", False):
        heads, root = config.num_attention_heads, math.sqrt(config.hidden_size // config.num_attention_heads)
        dtype = base.get_input_embeddings().weight.dtype
        return Alibi(lambda places: build_alibi_tensor(torch.ones(1, places).long(), heads, dtype)[:, 0] / root)
    slots = sinks + window + budget
    said = f"{'sinks + window + budget' if budget else 'sinks + window'} = {slots}"
    _check_sliding_window(config, slots, said)
    return _rotary(base, slots, said)


def _check_sliding_window(config: transformers.PreTrainedConfig, slots: int, said: str) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is not None and (kinds is None or "sliding_attention" in kinds) and slots > window:
        raise ValueError(
            f"{said}: the model itself reads {window} keys at most (sliding_window of its "
            f"config); make them {window} or less together"
        )


def _rotary(base: nn.Module, slots: int, said: str) -> Rotary:
    embedding = base.rotary_emb
    kind, config = embedding.rope_type, embedding.config
    if "dynamic" in kind or kind == "longrope":
        limit = config.rope_parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if slots > limit:
            raise ValueError(
                f"{said}: rope_type {kind!r} changes its frequencies with the length beyond "
                f"{limit} tokens, and the keys of a cache can't follow; make them {limit} or less together"
            )
    rotary = Rotary(embedding.original_inv_freq.float(), float(embedding.attention_scaling))
    places = torch.arange(slots, device=embedding.inv_freq.device)
    theirs = embedding(places.new_zeros((), dtype=torch.float32), places[None])
    ours = rotary.table(slots, places.device)
    pairs = zip(ours, (x[0] for x in theirs), strict=True)
    same = all(a.shape == b.shape and torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    if not same:
        raise ValueError(
            f"rope_parameters: {config.rope_parameters} gives positions that can't be taken from a table of places; "
            "use another rope_type"
        )
    return rotary
