"""Endless text through decoders that are already trained (StreamingLLM, arXiv 2309.17453).

The cache keeps the first `sinks` tokens, the last `window`, and on request `budget` others, and a key's position is
its place among the kept ones (section 3.2 there): keys are stored unrotated and rotated when they are read.
docs/streaming.md tells how a model of transformers is brought to do so.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from models.streaming_architectures import Family, encoding_of, family_of, passes_masks_on
from models.streaming_cache import PIECE, StreamingCache, StreamingStep
from models.streaming_retention import RetainingCache, policy_of


def stream(
    model: PreTrainedModel, sinks: int = 4, window: int = 1020, budget: int = 0, retention: str | None = None
) -> StreamingCache:
    """A cache of constant size with which a pretrained decoder reads and writes without end (arXiv 2309.17453).

    Pass it as `past_key_values` to the model or to `generate`, and again for the next turn. Until the cache is full,
    the model computes what it always does; later each query reads the first `sinks` tokens and the last `window`
    (its own included), and of those between the two the `budget` that a policy chose for each KV head, at places
    counted in the cache. Without this cache the model works as before.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3, GPT-NeoX, Falcon or MPT model for causal language modelling.
        sinks: first tokens of every row that are never dropped.
        window: last tokens that are kept.
        budget: tokens of each KV head that are retained beyond the window.
        retention: what chooses them: `h2o`, `tova`, `key_norm`, `random` or `recency` (lte/policies.py).

    Raises:
        ValueError: another architecture, numbers that make no cache, a policy that is unknown or can't be fed, or a
            config whose positions can't be counted inside a cache of that size.
    """
    family = family_of(model)
    for name, value, least in (("sinks", sinks, 0), ("window", window, 1), ("budget", budget, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: must be a whole number of {least} or more tokens")
    policy = policy_of(retention, budget)
    devices = sorted({str(parameter.device) for parameter in model.base_model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"model: lies on {', '.join(devices)}; a streaming cache needs it on one device")
    encoding, layers = encoding_of(model, sinks, window, budget), len(family.modules(model))
    if policy is None:
        cache = StreamingCache(model, sinks, window, encoding, layers)
    else:
        cache = RetainingCache(model, sinks, window, encoding, layers, budget, policy)
    _prepare(model, family)
    return cache


def _prepare(model: PreTrainedModel, family: Family) -> None:
    """Let the model recognise streaming caches; nothing changes for other calls. Done once a model."""
    base = model.base_model
    if getattr(base, "lalte_streams", False):
        return
    for module in family.modules(model):
        module.lalte_family = family
        module.lalte_dense_forward = module.forward
        module.forward = partial(_attention_forward, module)  # copies of a model, and saved ones, have their own
    base.register_forward_pre_hook(_begin, with_kwargs=True)
    base.register_forward_hook(_finish, with_kwargs=True)
    base.lalte_streams = True


def _attention_forward(self: nn.Module, hidden_states: Tensor, *args, **kwargs):
    step = kwargs.get("past_key_values")
    if step is None:
        step = kwargs.get("layer_past")
    if not isinstance(step, StreamingStep):
        return self.lalte_dense_forward(hidden_states, *args, **kwargs)
    family: Family = self.lalte_family
    out = step.attend(self.layer_idx, *family.project(self, hidden_states), getattr(self, family.scale))
    return getattr(self, family.output)(out.flatten(2)), None


def _begin(base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Before the base model runs: all pieces but the last go through it from here."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, StreamingCache):
        return None
    inputs = {name: x for name, x in kwargs.items() if name not in ("attention_mask", "position_ids")}
    if len(args) > 1:
        raise ValueError("with a streaming cache give all arguments after input_ids by keyword")
    if args:
        inputs["input_ids"] = args[0]
    cache.check_model(base.config)
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    tokens = inputs.pop(name)
    batch, length = tokens.shape[:2]
    _check_call(base, inputs)
    real_BT = _real(kwargs.get("attention_mask"), batch, length, cache.columns)
    cache.start(batch, tokens.device)
    if passes_masks_on(base):  # nobody reads it; a mask of the model's own costs time and may wait for the device
        inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    earlier: list[ModelOutput] = []
    for first in range(0, length, PIECE):
        last = min(first + PIECE, length)
        real = None if real_BT is None else real_BT[:, first:last]
        step = cache.step(real, last - first, earlier if last == length else ())
        inputs |= {name: tokens[:, first:last], "past_key_values": step}
        if last < length:
            earlier.append(base(**inputs))
    return (), inputs


def _finish(base: nn.Module, args: tuple, kwargs: dict, output: ModelOutput) -> ModelOutput | None:
    """After the base model ran: count the tokens, and join the pieces."""
    step = kwargs.get("past_key_values")
    if not isinstance(step, StreamingStep):
        return None
    step.cache.seen += step.new_B
    step.cache.columns += step.length
    output.past_key_values = step.cache
    if step.earlier:
        pieces = [*step.earlier, output]
        output.last_hidden_state = torch.cat([piece.last_hidden_state for piece in pieces], 1)
        if output.hidden_states is not None:
            layers = zip(*(piece.hidden_states for piece in pieces), strict=True)
            output.hidden_states = tuple(torch.cat(layer, 1) for layer in layers)
    return output


def _check_call(base: nn.Module, inputs: dict) -> None:
    if base.training:
        raise ValueError("a streaming cache is for inference: call model.eval() first")
    asked = inputs.get("output_attentions")
    if base.config.output_attentions if asked is None else asked:
        raise ValueError("output_attentions: the maps of a streaming cache have no columns of the text; leave it off")
    if inputs.get("return_dict") is False:
        raise ValueError("return_dict=False: a streaming cache needs named outputs; leave it out")
    if inputs.get("use_cache") is False:  # the default of MPT's configs
        raise ValueError(
            "use_cache=False: generate() then gives the whole text again at every token, and a streaming cache would "
            "read it again and again; pass use_cache=True"
        )


def _real(mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """Which of the new columns are tokens [B, T]; None for all.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must be [{batch}, {past + length}] for the cached and the new "
            f"columns, or [{batch}, {length}] for the new ones"
        )
    return mask[:, -length:].bool()
