"""What a model is made of and what its cache takes, found on the meta device: nothing is allocated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from models.cache import cache_bytes
from models.config import HybridConfig
from models.costs import costs
from models.modeling import HybridForCausalLM

MIXERS = {
    "gated_deltanet": "Gated DeltaNet",
    "attention": "attention",
    "nsa": "native sparse attention",
}
PARTS = ("embeddings", *MIXERS.values(), "scorer", "MLP", "norms", "head")


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of a model.

    Attributes:
        parameters: number by part, in the order of `PARTS`; tied weights count as embeddings.
        total: all parameters.
        layers: number of layers by mixer, zero ones left out.
        cache_fixed: bytes of a cache's layers that never grow.
        cache_per_token: bytes that every further token of the rows adds; 0 where memory is constant.
    """

    parameters: dict[str, int]
    total: int
    layers: dict[str, int]
    cache_fixed: int
    cache_per_token: int


def describe(config: HybridConfig, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> ModelInfo:
    """Count a model's parameters and the bytes of its cache.

    Args:
        batch: rows of the cache.
        dtype: of keys, values and convolution states.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    model.tie_weights()
    parameters = dict.fromkeys(PARTS, 0)
    for part, count in _parts(model):
        parameters[part] += count
    fixed, per_token = cache_bytes(model.model, batch, dtype)
    kinds = {name: config.layer_types.count(kind) for kind, name in MIXERS.items()}
    return ModelInfo(
        parameters=parameters,
        total=sum(p.numel() for p in model.parameters()),
        layers={name: count for name, count in kinds.items() if count},
        cache_fixed=fixed,
        cache_per_token=per_token,
    )


def _parts(model: HybridForCausalLM) -> Iterator[tuple[str, int]]:
    """Part and size of every parameter."""
    for name, parameter in model.named_parameters():
        names = name.split(".")
        if "scorer" in names or "shared_scorer" in names:
            part = "scorer"
        elif "mixer" in names:
            part = MIXERS[model.config.layer_types[int(names[2])]]
        elif "mlp" in names:
            part = "MLP"
        elif "embed_tokens" in names or "sink_token" in names:
            part = "embeddings"
        elif "lm_head" in names:
            part = "head"
        else:
            assert names[-2].endswith("norm"), f"{name} belongs to no part"
            part = "norms"
        yield part, parameter.numel()


def as_json(config: HybridConfig, batch: int, dtype: torch.dtype, length: int | None = None) -> str:
    """`describe` and `models.costs.costs` as a JSON object, for programs."""
    content = asdict(describe(config, batch, dtype))
    more = {"batch": batch, "dtype": str(dtype).removeprefix("torch."), "rules": dict(_rules(config))}
    return json.dumps({**content, **more, "costs": asdict(costs(config, length, dtype))}, indent=2)


def render(config: HybridConfig, batch: int, dtype: torch.dtype, length: int | None = None) -> str:
    """The sizes, rules and costs of a model as text for a terminal; `length` as in `models.costs.costs`."""
    info = describe(config, batch, dtype)
    lines = [_line("parameters", f"{info.total:>15,}")]
    for part, count in info.parameters.items():
        if count:
            lines.append(_line(f"  {part}", f"{count:>15,}"))
        elif part == "head":
            lines.append(_line("  head", f"{0:>15} (tied to the embeddings)"))
    lines.append(_line("layers", ", ".join(f"{count} {name}" for name, count in info.layers.items())))
    lines += [_line(label, text) for label, text in _rules(config)]
    rows = "a sequence" if batch == 1 else f"{batch} sequences"
    text = f"{info.cache_fixed:,} bytes for {rows} in {str(dtype).removeprefix('torch.')}"
    if info.cache_per_token:
        text += f", and {info.cache_per_token:,} bytes more with every token: it grows without limit"
    else:
        text += ", the same at any length"
    lines.append(_line("cache", text))
    token = costs(config, length, dtype)
    lines.append(
        _line(
            "a new token",
            f"{_short(token.step_operations)} operations, {_short(token.step_bytes)}B to read, after "
            f"{token.length:,} tokens of one sequence",
        )
    )
    text = f"{_short(token.training_operations)} operations forward, in rows of {token.length:,} tokens"
    lines.append(_line("a token of training", text))
    return "\n".join(lines)


def _line(label: str, text: str) -> str:
    return f"{label:<26}{text}"


def _short(number: int) -> str:
    """Three digits that count, with a letter for thousands."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return f"{number} "


def _retention(config: HybridConfig) -> str:
    """What fills the slots for retained tokens."""
    if config.window is None:
        return "none: nothing is evicted"
    if config.has_scorer:
        return f"lte (trained scorer), lookahead {config.lookahead}, shared over: {config.scorer_sharing}"
    return config.retention if config.retention == "none" else f"{config.retention} (needs no training)"


def _rules(config: HybridConfig) -> Iterator[tuple[str, str]]:
    """Label and numbers of each kind of layer that the model has."""
    if "gated_deltanet" in config.layer_types:
        text = f"{config.gdn_num_heads} heads of {config.gdn_head_dim}, expand_v {config.gdn_expand_v:g}"
        yield MIXERS["gated_deltanet"], f"{text}, convolution {config.gdn_conv_size}"
    if "attention" in config.layer_types:
        yield (
            MIXERS["attention"],
            f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} KV heads, "
            f"positions {config.position_encoding}",
        )
        if config.window is None:
            yield "visible keys", "all before the query"
        else:
            slots = config.sinks + config.budget + config.window
            yield (
                "visible keys",
                f"{config.sinks} sinks + {config.budget} retained + window of {config.window} = {slots} a KV head",
            )
        yield "retention", _retention(config)
    if "nsa" in config.layer_types:
        yield (
            MIXERS["nsa"],
            f"{config.nsa_num_heads} heads of {config.nsa_head_dim}, {config.nsa_num_key_value_heads} KV heads; "
            f"blocks of {config.nsa_block_size}, {config.nsa_selected_blocks} selected, window {config.nsa_window}",
        )
