"""Configurations of other projects' checkpoints, and what they are here; both ways.

The kinds are flash-linear-attention's `gated_deltanet`, `transformer` and `nsa`, and `hybrid_gated_deltanet`, the one
of arXiv 2510.20787's reference code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from models.config import HybridConfig

HYBRID, DELTA, TRANSFORMER, NSA = "hybrid_gated_deltanet", "gated_deltanet", "transformer", "nsa"
FORMATS = (HYBRID, DELTA, TRANSFORMER, NSA)

# what a field means that a configuration leaves out
_SHARED_DEFAULTS = {
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "norm_eps": 1e-6,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DELTA_DEFAULTS = {
    **_SHARED_DEFAULTS,
    "num_hidden_layers": 21,
    "num_heads": 6,
    "head_dim": 256,
    "expand_v": 2,
    "conv_size": 4,
    "attn": None,
}
_ATTENTION_DEFAULTS = {**_SHARED_DEFAULTS, "num_hidden_layers": 24, "rope_theta": 10000.0}
_DEFAULTS = {
    HYBRID: {**_DELTA_DEFAULTS, "initializer_range": 0.006},
    DELTA: _DELTA_DEFAULTS,
    TRANSFORMER: {**_ATTENTION_DEFAULTS, "num_heads": 32, "num_kv_heads": None, "window_size": None},
    NSA: {
        **_ATTENTION_DEFAULTS,
        "num_heads": 64,
        "num_kv_heads": 4,
        "head_dim": 32,
        "block_size": 64,
        "block_counts": 16,
        "window_size": 512,
    },
}
# fields with which these models compute something that ours don't, and the values with which they don't
_ONLY = {
    "use_gate": (True,),
    "use_short_conv": (True,),
    "allow_neg_eigval": (False,),
    "num_v_heads": (None,),
    "output_gate_activation": ("swish", "silu"),
    "hidden_act": ("swish", "silu"),
    "attnres_block_size": (None,),
    "qkv_bias": (False,),
    "qk_norm": (False,),
    "elementwise_affine": (True, None),
}
_ONLY_IN_ATTENTION = {"qkv_bias": (False,), "routing_method": ("sigmoid",), "attn_type": (None, "attn", "lte", "nsa")}
# kernels to use, and how to train: without effect on what a model computes
_NEUTRAL = {
    "attn_mode",
    "fuse_norm",
    "fuse_swiglu",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "use_l2warp",
    "use_cache",
    "model_type",
    "torch_dtype",
    "auto_map",
}
_ATTENTION_FIELDS = {"layers", "num_heads", "num_kv_heads", "window_size", "rope_theta"}
_NSA_FIELDS = {"head_dim", "block_size", "block_counts"}
_LTE_FIELDS = {"conv_size", "conv_dilation", "dropout_prob", "buffer_size", "sink_size", "routing_shared"}
_TRAINING = ("l1_", "routing_grad", "routing_freeze_steps", "receptive_margin")
_SHARING = {"head": "none", "layer": "heads", "all": "layers"}


def read_config(source: Mapping[str, Any]) -> HybridConfig:
    """Our configuration of a model of another kind.

    Args:
        source: its config.json.

    Raises:
        ValueError: naming a field that is unknown, missing, or means something that our models don't compute.
    """
    kind = source.get("model_type")
    if kind not in FORMATS:
        raise ValueError(f"model_type={kind!r} can't be imported; known are {', '.join(FORMATS)}")
    defaults = _DEFAULTS[kind]
    _check_fields(source, {*defaults, *_ONLY, *_NEUTRAL, *PreTrainedConfig().to_dict()}, "")
    for name, values in _ONLY.items():
        own_heads = name == "num_v_heads" and source.get(name) == source.get("num_heads", defaults["num_heads"])
        if name in source and source[name] not in values and not own_heads:
            raise ValueError(f"{name}={source[name]!r} is not supported; only {', '.join(map(repr, values))}")
    given = {name: source.get(name, default) for name, default in defaults.items()}
    readers = {HYBRID: _read_delta, DELTA: _read_delta, TRANSFORMER: _read_transformer, NSA: _read_nsa}
    return HybridConfig(**_read_shared(given), **readers[kind](given, kind))


def _check_fields(source: Mapping[str, Any], known: set[str], prefix: str) -> None:
    for name, value in source.items():
        if name not in known and not name.startswith("_"):
            raise ValueError(
                f"{prefix}{name}={value!r} is a field that isn't known, so what the model computes isn't either; "
                "remove it from config.json if it has no effect"
            )


def _read_shared(given: Mapping[str, Any]) -> dict[str, Any]:
    intermediate = given["intermediate_size"]
    if intermediate is None:
        ratio = 4 if given["hidden_ratio"] is None else given["hidden_ratio"]
        intermediate = 256 * math.ceil(int(given["hidden_size"] * ratio * 2 / 3) / 256)
    same = ("hidden_size", "vocab_size", "max_position_embeddings", "num_hidden_layers", "tie_word_embeddings")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {
        **{name: given[name] for name in (*same, *tokens)},
        "intermediate_size": intermediate,
        "rms_norm_eps": float(given["norm_eps"]),
        "initializer_range": float(given["initializer_range"]),
        "architectures": ["HybridForCausalLM"],
    }


def _read_transformer(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    kinds = ["attention"] * given["num_hidden_layers"]
    return {"layer_types": kinds, **_read_attention(given, given["hidden_size"])}


def _read_nsa(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"layer_types": ["nsa"] * given["num_hidden_layers"], **_read_sparse(given), **_NO_ATTENTION}


def _read_delta(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    fields = {
        "gdn_num_heads": given["num_heads"],
        "gdn_head_dim": given["head_dim"],
        "gdn_expand_v": float(given["expand_v"]),
        "gdn_conv_size": given["conv_size"],
    }
    count, attn = given["num_hidden_layers"], given["attn"]
    if isinstance(attn, list):
        if len(attn) > 1:
            raise ValueError(f"attn has {len(attn)} kinds of attention layers; models with one kind can be imported")
        attn = attn[0] if attn else None
    if attn is None:
        return {"layer_types": ["gated_deltanet"] * count, "position_encoding": "none", **fields, **_NO_ATTENTION}
    attn_type = attn.get("attn_type") or "attn"
    known = _ATTENTION_FIELDS | _ONLY_IN_ATTENTION.keys()
    known |= {"nsa": _NSA_FIELDS, "lte": _LTE_FIELDS}.get(attn_type, set())
    _check_fields({k: v for k, v in attn.items() if not k.startswith(_TRAINING)}, known, "attn.")
    for name, values in _ONLY_IN_ATTENTION.items():
        if attn.get(name, values[0]) not in values:
            raise ValueError(f"attn.{name}={attn[name]!r} is not supported; only {', '.join(map(repr, values))}")
    if attn_type == "lte" and kind != HYBRID:
        raise ValueError(f"attn.attn_type='lte' belongs to model_type={HYBRID!r}, not to {kind!r}")
    for name in ("layers", "num_heads"):
        if name not in attn:
            raise ValueError(f"attn.{name} is missing; config.json has to tell it")
    if not set(attn["layers"]) <= set(range(count)):
        raise ValueError(f"attn.layers={attn['layers']} names layers beyond num_hidden_layers={count}; correct it")
    own = "nsa" if attn_type == "nsa" else "attention"
    kinds = [own if layer in attn["layers"] else "gated_deltanet" for layer in range(count)]
    attn = {"num_kv_heads": None, "window_size": None, "rope_theta": 10000.0, **attn}
    if attn_type == "nsa":
        rule = {**_read_sparse(attn), **_NO_ATTENTION}
    else:
        rule = _read_attention(attn, given["hidden_size"])
    if attn_type == "lte":
        rule |= _read_eviction(attn)
    return {"layer_types": kinds, **fields, **rule}


_NO_ATTENTION = {"num_attention_heads": 1, "head_dim": 64, "sinks": 0, "budget": 0, "retention": "none"}


def _read_attention(attn: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Full or sliding-window attention; the window counts the query's own key, as here."""
    if hidden_size % attn["num_heads"]:
        raise ValueError(
            f"num_heads={attn['num_heads']} doesn't divide hidden_size={hidden_size}; change one of them"
        )
    return {
        "num_attention_heads": attn["num_heads"],
        "num_key_value_heads": attn["num_kv_heads"] or attn["num_heads"],
        "head_dim": hidden_size // attn["num_heads"],
        "rope_theta": float(attn["rope_theta"]),
        "window": attn["window_size"],
        "sinks": 0,
        "budget": 0,
        "retention": "none",
    }


def _read_eviction(attn: Mapping[str, Any]) -> dict[str, Any]:
    """Learned eviction: there the window counts previous tokens, and the buffer holds the sinks too."""
    for name in sorted(_LTE_FIELDS | {"window_size"}):
        if attn.get(name) is None:
            raise ValueError(f"attn.{name} is missing; config.json has to tell it")
    if attn["buffer_size"] < attn["sink_size"]:
        raise ValueError(
            f"attn.buffer_size={attn['buffer_size']} holds the {attn['sink_size']} sinks too; make it larger"
        )
    if attn["routing_shared"] not in _SHARING:
        raise ValueError(
            f"attn.routing_shared={attn['routing_shared']!r} is unknown; use one of {', '.join(_SHARING)}"
        )
    return {
        "window": attn["window_size"] + 1,
        "sinks": attn["sink_size"],
        "budget": attn["buffer_size"] - attn["sink_size"],
        "retention": "lte",
        "scorer_kernel_sizes": list(attn["conv_size"]),
        "scorer_dilations": list(attn["conv_dilation"]),
        "scorer_dropout": float(attn["dropout_prob"]),
        "scorer_sharing": _SHARING[attn["routing_shared"]],
        "penalty_interval": int(attn.get("l1_lambda_update_steps", 32)),
        "penalty_min": float(attn.get("l1_lambda_min", 1e-9)),
        "penalty_max": float(attn.get("l1_lambda_max", 1.0)),
    }


def _read_sparse(attn: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("head_dim", "block_size", "block_counts", "window_size"):
        if not isinstance(attn.get(name), int):
            raise ValueError(f"{name}={attn.get(name)!r} of the nsa layers must be a whole number; set it")
    return {
        "nsa_num_heads": attn["num_heads"],
        "nsa_num_key_value_heads": attn["num_kv_heads"] or attn["num_heads"],
        "nsa_head_dim": attn["head_dim"],
        "nsa_block_size": attn["block_size"],
        "nsa_selected_blocks": attn["block_counts"],
        "nsa_window": attn["window_size"],
        "rope_theta": float(attn["rope_theta"]),
    }


def write_config(config: HybridConfig, kind: str) -> dict[str, Any]:
    """The config.json of a model of ours as one of another kind.

    Fields that only matter in training (the scorer's learning rate and gradient, keep_all_steps) have no place there.

    Raises:
        ValueError: naming what that kind can't express.
    """
    if kind not in FORMATS:
        raise ValueError(f"format {kind!r} is unknown; use one of {', '.join(FORMATS)}")
    kinds = set(config.layer_types)
    allowed = {HYBRID: {"gated_deltanet", "attention", "nsa"}, DELTA: {"gated_deltanet", "attention"}}
    allowed |= {TRANSFORMER: {"attention"}, NSA: {"nsa"}}
    if not kinds <= allowed[kind] or len(kinds - {"gated_deltanet"}) > 1:
        raise ValueError(f"format {kind!r} has no place for layer_types {sorted(kinds)}; use another format")
    _check_expressible(config, kind)
    source = {
        "model_type": kind,
        **{name: getattr(config, name) for name in _SHARED_DEFAULTS if hasattr(config, name)},
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_ratio": None,
        "norm_eps": config.rms_norm_eps,
        "hidden_act": "swish",
    }
    if kind == TRANSFORMER:
        return source | _write_attention(config)
    if kind == NSA:
        return source | _write_sparse(config)
    source |= {
        "num_heads": config.gdn_num_heads,
        "head_dim": config.gdn_head_dim,
        "expand_v": config.gdn_expand_v,
        "conv_size": config.gdn_conv_size,
        "use_gate": True,
        "use_short_conv": True,
        "attn": None,
    }
    other = "nsa" if "nsa" in kinds else "attention"
    if other in kinds:
        layers = [layer for layer, name in enumerate(config.layer_types) if name == other]
        attn = _write_sparse(config) if other == "nsa" else _write_attention(config)
        if config.has_scorer:
            attn |= _write_eviction(config)
        elif kind == HYBRID:
            attn["attn_type"] = "nsa" if other == "nsa" else "attn"
        source["attn"] = {"layers": layers, **attn}
    return source


def _check_expressible(config: HybridConfig, kind: str) -> None:
    kinds = set(config.layer_types)
    wanted = {"position_encoding": "rope"} if kinds & {"attention", "nsa"} else {}
    wanted |= {"sink_token": "none", "softmax_off_by_one": False}
    if "attention" in kinds:
        wanted["head_dim"] = config.hidden_size // config.num_attention_heads
        if not config.has_scorer:
            wanted |= {"retention": "none", "sinks": 0, "budget": 0}
        elif kind != HYBRID:
            wanted["retention"] = "none"
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no place in format {kind!r}, which has {value!r}; "
                "use another format, or keep the model as it is"
            )


def _write_attention(config: HybridConfig) -> dict[str, Any]:
    return {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "qkv_bias": False,
        "window_size": config.window,
        "rope_theta": config.rope_theta,
    }


def _write_eviction(config: HybridConfig) -> dict[str, Any]:
    return {
        "attn_type": "lte",
        "window_size": config.window - 1,
        "sink_size": config.sinks,
        "buffer_size": config.budget + config.sinks,
        "conv_size": list(config.scorer_kernel_sizes),
        "conv_dilation": list(config.scorer_dilations),
        "dropout_prob": config.scorer_dropout,
        "routing_method": "sigmoid",
        "routing_grad": True,
        "routing_shared": next(name for name, own in _SHARING.items() if own == config.scorer_sharing),
        "l1_lambda_init": config.penalty_min,
        "l1_lambda_min": config.penalty_min,
        "l1_lambda_max": config.penalty_max,
        "l1_lambda_update_steps": config.penalty_interval,
        "l1_lambda_shared": "head",
    }


def _write_sparse(config: HybridConfig) -> dict[str, Any]:
    return {
        "num_heads": config.nsa_num_heads,
        "num_kv_heads": config.nsa_num_key_value_heads,
        "head_dim": config.nsa_head_dim,
        "qkv_bias": False,
        "block_size": config.nsa_block_size,
        "block_counts": config.nsa_selected_blocks,
        "window_size": config.nsa_window,
        "rope_theta": config.rope_theta,
    }
