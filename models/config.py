"""Configuration of a hybrid model: which mixer each layer has, and the numbers of each kind of mixer."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lte.attention import BACKENDS
from lte.policies import POLICIES
from lte.scorer import check_sizes, lookahead_of
from lte.straight_through import STRAIGHT_THROUGH
from models.files import config_path

LAYER_TYPES = ("gated_deltanet", "attention", "nsa")
POSITION_ENCODINGS = ("rope", "rope_in_cache", "none")
RETENTIONS = ("none", "lte", *POLICIES)
SINK_TOKENS = ("none", "learnable")
SCORER_SHARING = ("none", "heads", "layers")


@strict
class HybridConfig(PreTrainedConfig):
    r"""
    Configuration of `HybridForCausalLM` (laLTE, laNSA and the baselines).

    Args:
        vocab_size: size of the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU MLP; 256 * ceil(8/3 * hidden_size / 256) if null.
        num_hidden_layers: number of blocks.
        layer_types: mixer of each block, out of `gated_deltanet`, `attention`, `nsa`; if null, blocks 1, 3, 5, … are
            `attention` and the others `gated_deltanet`.
        num_attention_heads, num_key_value_heads, head_dim: of the attention layers; num_key_value_heads is
            num_attention_heads and head_dim hidden_size / num_attention_heads if null.
        window: keys in the sliding window, the query's own included; null for full attention.
        sinks: first tokens of a document that stay visible.
        budget: slots per head for retained tokens, enforced in evaluation and generation.
        retention: what fills the budget: `lte` (the trained scorer), `none`, or a policy that needs no training:
            `recency`, `random`, `h2o`, `tova`, `key_norm`, `delta_error` (lte/policies.py).
        position_encoding: `rope` (text positions), `rope_in_cache` (places among the visible tokens,
            arXiv 2309.17453), `none`.
        rope_theta: base of the rotary embedding.
        sink_token: `none`, or `learnable`: one learned embedding in front of every document, the first of its sinks
            (arXiv 2309.17453, section 3.3).
        softmax_off_by_one: add 1 to the denominator of the attention layers' softmax (the same, equation 2).
        scorer_kernel_sizes, scorer_dilations, scorer_dropout: the scorer's convolutions.
        scorer_sharing: `none` (one stack a KV head), `heads` (one a layer) or `layers` (one for the whole model).
        scorer_lr_scale: factor of the scorer's learning rate.
        scorer_init_scale: factor of the initial weights of the scorer's last map; with 0 it starts from keeping
            everything, however large keys and values are.
        straight_through: queries from which a token's retention logit gets its gradient: `all` that read the token
            (as in the paper), or `beyond_window`, those that read it because it is retained; in both cases that of a
            factor of the token's value. `weight_beyond_window`: of its softmax weight; `presence_beyond_window`: of
            its being there, which evicted tokens have too (docs/algorithm.md).
        keep_all_steps: optimizer steps at the start during which everything is kept and the scorer isn't trained.
        penalty_interval, penalty_min, penalty_max: the control of the L1 penalty's weight (lte/sparsity.py).
        gdn_num_heads, gdn_head_dim, gdn_expand_v, gdn_conv_size: of the Gated DeltaNet layers.
        nsa_num_heads, nsa_num_key_value_heads, nsa_head_dim, nsa_block_size, nsa_selected_blocks, nsa_window: of the
            native sparse attention layers.
        rms_norm_eps: epsilon of the norms.
        initializer_range: standard deviation of the initial weights; output projections are scaled by depth.
        embedding_range: standard deviation of the initial embeddings; null: initializer_range. Small hybrids want a
            larger one, so that a token is still seen beside the normalised outputs of Gated DeltaNet (docs/log.md).
        tie_word_embeddings: whether the output layer is the embedding.
        max_position_embeddings: length trained on; the target density is budget / (this - window). Nothing in the
            model limits the length of a text.
        prefill_chunk: tokens of a prompt that each row takes at once when there is a cache; null: 16384 shared by the
            rows (at least 1024 each) on CUDA, 2048 elsewhere.
        attention_backend: `auto`, `reference`, `flex` or `triton` (lte/attention.py).

    Raises:
        ValueError: naming the field and its value.
    """

    model_type = "lalte"
    keys_to_ignore_at_inference = ["past_key_values", "retention", "lm_loss", "aux_loss"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    layer_types: list[str] | None = None
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    window: int | None = 768
    sinks: int = 4
    budget: int = 512
    retention: str = "lte"
    position_encoding: str = "rope"
    rope_theta: float = 10000.0
    sink_token: str = "none"
    softmax_off_by_one: bool = False
    scorer_kernel_sizes: list[int] | tuple[int, ...] = (3, 3, 3)
    scorer_dilations: list[int] | tuple[int, ...] = (2, 2, 2)
    scorer_dropout: float = 0.1
    scorer_sharing: str = "none"
    scorer_lr_scale: float = 1.0
    scorer_init_scale: float = 1.0
    straight_through: str = "all"
    keep_all_steps: int = 0
    penalty_interval: int = 32
    penalty_min: float = 1e-9
    penalty_max: float = 1.0
    gdn_num_heads: int = 8
    gdn_head_dim: int = 128
    gdn_expand_v: float = 1.0
    gdn_conv_size: int = 4
    nsa_num_heads: int = 32
    nsa_num_key_value_heads: int = 2
    nsa_head_dim: int = 64
    nsa_block_size: int = 64
    nsa_selected_blocks: int = 16
    nsa_window: int = 512
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    embedding_range: float | None = None
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 4096
    prefill_chunk: int | None = None
    attention_backend: str = "auto"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        self._check_types()
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(8 * self.hidden_size / (3 * 256))
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPES[layer % 2] for layer in range(self.num_hidden_layers)]
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                    f"{self.num_attention_heads}; change one of them or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.scorer_kernel_sizes = list(self.scorer_kernel_sizes)
        self.scorer_dilations = list(self.scorer_dilations)
        super().__post_init__(**kwargs)
        self.check()

    def validate_layer_type(self) -> None:
        """Replaces the base class's check, which knows other layer types; `check` has ours."""

    @property
    def has_scorer(self) -> bool:
        return self.retention == "lte" and "attention" in self.layer_types

    def check_retention(self, retention: str) -> None:
        """Raises ValueError if this retention can't fill the budget of the attention layers."""
        if retention not in RETENTIONS:
            raise ValueError(f"retention={retention!r} is unknown; use one of {', '.join(RETENTIONS)}")
        if retention == "none" or "attention" not in self.layer_types:
            return
        if self.window is None:
            raise ValueError("window=null keeps every token; use retention='none', or set a window")
        before = self.layer_types[: self.layer_types.index("attention")]
        if retention == "delta_error" and "gated_deltanet" not in before:
            raise ValueError(
                f"retention='delta_error' needs a gated_deltanet layer before the first attention layer, which comes "
                f"after {before}; use another retention"
            )

    @property
    def lookahead(self) -> int:
        """Tokens that the scorer reads ahead."""
        return lookahead_of(tuple(self.scorer_kernel_sizes), tuple(self.scorer_dilations))

    @property
    def target_density(self) -> float:
        """Share of eligible tokens that fits the budget at the length trained on."""
        eligible = self.max_position_embeddings - (self.window or 0)
        return min(1.0, self.budget / eligible) if eligible > 0 else 1.0

    def _check_types(self) -> None:
        for name, kind in _own_fields().items():
            if not _fits(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r} must be {_in_words(kind)}")

    def check(self) -> None:
        """Raises: ValueError naming field, value and remedy. Models ask again, since fields can be set later."""
        self._check_types()
        if rope := getattr(self, "rope_parameters", None):  # transformers also puts rope_scaling there
            raise ValueError(f"rope_parameters={rope} is not read here; set rope_theta, and leave it out")

        def one_of(name: str, values: tuple[str, ...]) -> None:
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(values)}")

        def at_least(low: int, *names: str) -> None:
            for name in names:
                if getattr(self, name) < low:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")

        one_of("position_encoding", POSITION_ENCODINGS)
        one_of("sink_token", SINK_TOKENS)
        one_of("scorer_sharing", SCORER_SHARING)
        one_of("attention_backend", BACKENDS)
        one_of("straight_through", STRAIGHT_THROUGH)
        at_least(1, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        at_least(1, "num_key_value_heads", "head_dim", "gdn_num_heads", "gdn_head_dim")
        if self.prefill_chunk is not None:
            at_least(1, "prefill_chunk")
        if self.embedding_range is not None:
            at_least(0, "embedding_range")
        at_least(1, "max_position_embeddings", "penalty_interval")
        at_least(0, "sinks", "budget", "keep_all_steps", "penalty_min", "penalty_max")
        at_least(0, "scorer_lr_scale", "scorer_init_scale")
        at_least(0, "initializer_range")
        at_least(2, "gdn_conv_size")
        if not 0 <= self.scorer_dropout < 1:
            raise ValueError(f"scorer_dropout={self.scorer_dropout} must lie in [0, 1)")
        if self.penalty_min == 0 and self.penalty_max > 0:
            raise ValueError(
                "penalty_min=0, from which λ would never grow; set it to a small number, or penalty_max=0 for no λ"
            )
        if 0 < self.penalty_max < self.penalty_min:
            raise ValueError(f"penalty_max={self.penalty_max} is below penalty_min={self.penalty_min}; raise it")
        if self.rope_theta <= 0 or self.rms_norm_eps <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} and rms_norm_eps={self.rms_norm_eps} must be positive")
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types has {kind!r}; use {', '.join(LAYER_TYPES)}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers={self.num_hidden_layers}; "
                "make them equal"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by num_key_value_heads="
                f"{self.num_key_value_heads}; query heads share KV heads in equal groups"
            )
        if self.position_encoding != "none" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even for position_encoding={self.position_encoding!r}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 (the query's own key), or null for no limit")
        windowed = "attention" in self.layer_types and self.window is not None
        if self.sink_token == "learnable" and windowed and not self.sinks:
            raise ValueError("sinks=0 would evict the learned sink token; set sinks to at least 1")
        if self.softmax_off_by_one and "nsa" in self.layer_types:
            raise ValueError(
                "softmax_off_by_one=true is not defined for nsa layers; leave it out, or use attention layers"
            )
        if self.straight_through != "all":
            if self.position_encoding == "rope_in_cache":
                raise ValueError(
                    f"straight_through={self.straight_through!r} is not defined for "
                    "position_encoding='rope_in_cache'; use 'rope' or 'none', or straight_through='all'"
                )
            if self.attention_backend == "flex":
                raise ValueError(
                    f"straight_through={self.straight_through!r} has no gradient in attention_backend='flex'; use "
                    "'auto', 'reference' or 'triton'"
                )
        if not float(self.gdn_head_dim * self.gdn_expand_v).is_integer() or self.gdn_expand_v <= 0:
            raise ValueError(
                f"gdn_expand_v={self.gdn_expand_v} times gdn_head_dim={self.gdn_head_dim} must be a positive whole "
                "number; change one of them"
            )
        self.check_retention(self.retention)
        if self.has_scorer:
            check_sizes(self.head_dim, self.scorer_kernel_sizes, self.scorer_dilations)
            if self.window <= self.lookahead:
                raise ValueError(
                    f"window={self.window} must be larger than the scorer's lookahead {self.lookahead}, or tokens "
                    "would leave the window before their score is known; enlarge the window or shrink "
                    "scorer_kernel_sizes or scorer_dilations"
                )
        elif self.budget and self.retention == "none" and "attention" in self.layer_types:
            raise ValueError(
                f"budget={self.budget} has nothing to fill it with retention='none'; set budget to 0 or retention "
                "to 'lte' or a policy"
            )


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> HybridConfig:
    """The configuration in a JSON file, or in the config.json of a folder, with some fields replaced.

    A name such as configs/models/lalte-0.4b.json is found from any working folder (`files.config_path`).

    Unlike transformers' own loading, a field that doesn't exist is an error.

    Raises:
        ValueError: no such file, not JSON, another model_type, an unknown field, or what `HybridConfig` refuses; the
            message names it.
    """
    path = config_path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is no file; give a model configuration such as configs/models/lalte-tiny.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); give a model configuration") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; a JSON object of fields is expected")
    if values.get("model_type", HybridConfig.model_type) != HybridConfig.model_type:
        raise ValueError(
            f"{file}: model_type={values['model_type']!r} is another kind of model; "
            f"{HybridConfig.model_type!r} is read here"
        )
    overrides = dict(overrides or {})
    _check_names(values, str(file))
    _check_names(overrides, "overrides")
    merged = {**values, **overrides}
    merged.pop("model_type", None)
    try:
        return HybridConfig(**merged)
    except (ValueError, AttributeError) as error:
        # an unknown dtype is an AttributeError of torch
        raise ValueError(f"{file}{' with overrides' if overrides else ''}: {error}") from error


def _check_names(values: Mapping[str, Any], where: str) -> None:
    known = HybridConfig().to_dict().keys() | set(inspect.signature(HybridConfig).parameters)
    known |= {"model_type", "torch_dtype", "attn_implementation"}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(_own_fields()), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(_own_fields()))}"
            raise ValueError(f"{where}: unknown field {name}={values[name]!r}; {hint}")


@cache
def _own_fields() -> dict[str, Any]:
    return inspect.get_annotations(HybridConfig, eval_str=True)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has a field's type; a whole number is a number, true is no number."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, each) for each in inner)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_fits(each, inner[0]) for each in value)
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(kind: Any) -> str:
    """A field's type as a JSON author calls it."""
    words = {
        int: "a whole number",
        float: "a finite number",
        str: "a string",
        bool: "true or false",
        NoneType: "null",
    }
    if get_origin(kind) is UnionType:
        return " or ".join(dict.fromkeys(_in_words(each) for each in get_args(kind)))
    if get_origin(kind) in (list, tuple):
        return f"a list, each entry {_in_words(get_args(kind)[0])}"
    return words[kind]
