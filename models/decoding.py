"""Decoding on CUDA: whole steps, sampling included, captured as graphs and replayed without work for the host.

`generate()` of transformers and `models.generation.decode` come here by themselves where a model's layers allow.

Shapes: B rows, T tokens, V vocabulary, E end-of-text tokens.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.cache import HybridCache
from models.decode_step import DecodeStep, addresses, fuse_projections, obstacle, unread_sink
from models.generation import GREEDY, Sampling, sample
from models.mixer import MixerState
from models.modeling import HybridForCausalLM


@dataclass(frozen=True, eq=False)
class Ending:
    """What ends a row: from the token after one of `tokens` [E] on, a row yields `pad`."""

    tokens: Tensor
    pad: int

    def same(self, other: Ending | None) -> bool:
        return other is not None and self.pad == other.pad and torch.equal(self.tokens, other.tokens)


class GraphedDecoder:
    """Decoding steps of one cache as a CUDA graph: each reads `token` into the cache and puts the next one there.

    Nothing is executed by making one: the cache stays as it is. A graph holds addresses, so it serves this model
    and this cache as long as both stay where they are (`fits`); the caller keeps them alive.

    Args:
        model: in evaluation. Its projections are put side by side (models/decode_step.py).
        cache: empty or filled; its rows are the batch.
        sampling: how the next token is drawn, inside the graph.
        generator: of the draws; None: the device's default one. Seeding it between steps works as usual.
        ending: end-of-text tokens, if rows may end.
        overlap: let kernels start while their predecessors run; None: where the device can.

    Attributes:
        token: [B, 1] int64, at a fixed address: what the next step reads, then what it has drawn.
        logits: [B, V] of the last step, at a fixed address.
        ended: [B] bool, rows in which an end-of-text token was drawn.

    Raises:
        ValueError: the model, the cache or the device can't be captured; the message names the reason.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        cache: HybridCache,
        sampling: Sampling = GREEDY,
        generator: torch.Generator | None = None,
        ending: Ending | None = None,
        overlap: bool | None = None,
    ):
        reason = obstacle(model, cache) or unread_sink(model, cache)
        if reason is not None:
            raise ValueError(f"a decoding step can't be captured as a CUDA graph: {reason}; decode without a graph")
        if overlap is None:
            from lte.kernels.launch import can_overlap

            overlap = can_overlap(model.device)
        self.sampling, self.generator, self.ending = sampling, generator, ending
        self._cache = weakref.ref(cache)
        device = model.device
        with torch.inference_mode(False):  # to be written to in any mode
            self.token = torch.zeros(cache.batch, 1, dtype=torch.int64, device=device)
            self.ended = torch.zeros(cache.batch, dtype=torch.bool, device=device)
        self.logits: Tensor | None = None
        step = DecodeStep(model, cache, overlap)
        self._frequencies = step.frequencies  # the graph reads them; the step itself would keep the cache alive
        self._replay = self._capture(step)
        self._addresses = addresses(model, cache)

    @property
    def cache(self) -> HybridCache:
        """The cache that the steps fill.

        Raises:
            ValueError: it is gone.
        """
        cache = self._cache()
        if cache is None:
            raise ValueError("the decoder's cache was freed, and its memory with it; keep a reference to the cache")
        return cache

    def fits(self, model: HybridForCausalLM, cache: HybridCache) -> bool:
        """Whether a replay reads this model's weights and fills this cache."""
        return self._cache() is cache and self._addresses == addresses(model, cache)

    def step(self) -> None:
        """Read `token` into the cache and draw the next one; the host doesn't wait for it."""
        cache = self.cache
        self._replay()
        cache.columns += 1

    def start(self, logits_BV: Tensor) -> None:
        """Draw the first token from the logits that follow what the cache holds."""
        self.ended.zero_()
        self._draw(logits_BV)

    def _draw(self, logits_BV: Tensor) -> None:
        """The next token into `token`."""
        token_B1 = sample(logits_BV, self.sampling, self.generator)
        if self.ending is not None:
            token_B1 = token_B1.masked_fill(self.ended[:, None], self.ending.pad)
            self.ended |= (token_B1 == self.ending.tokens).any(1)
        self.token.copy_(token_B1)

    def _capture(self, step: DecodeStep) -> Callable[[], None]:
        """A function that replays the step and the drawing of its token."""
        device = self.token.device
        stream = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.no_grad():
            with torch.cuda.stream(stream):
                self._warm_up(step)
            # other threads may go on using the device meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.logits = step(self.token)
                self._draw(self.logits)
        self.token.zero_()
        return graph.replay

    def _warm_up(self, step: DecodeStep) -> None:
        """Run every kernel once, so that all are compiled, and leave cache and generator as they were."""
        generator = self.generator
        if generator is None:
            generator = torch.cuda.default_generators[self.token.device.index]
        drawn = generator.get_state()
        self._draw(step(self.token, lambda *block: _undone(step.block, *block)))
        self.ended.zero_()
        generator.set_state(drawn)


def _undone(block: Callable[..., Tensor], layer: nn.Module, x_BC: Tensor, angles, state: MixerState) -> Tensor:
    """A block's output, its state being as before: a copy of one block's state is all the memory it takes."""
    tensors = HybridCache([state], len(x_BC)).tensors().values()
    before = [x.clone() for x in tensors]
    out = block(layer, x_BC, angles, state)
    for x, old in zip(tensors, before, strict=True):
        x.copy_(old)
    return out


# ---- graphs at hand: one a cache, as long as the cache lives

_DECODERS: weakref.WeakKeyDictionary[HybridCache, GraphedDecoder] = weakref.WeakKeyDictionary()
# caches that `generate` made for itself, one a model, kept for its next call together with their graph
_CACHES: weakref.WeakKeyDictionary[HybridForCausalLM, tuple[tuple, HybridCache]] = weakref.WeakKeyDictionary()


def decoder_for(
    model: HybridForCausalLM,
    cache: HybridCache,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    ending: Ending | None = None,
) -> GraphedDecoder:
    """The cache's decoder, captured anew if there is none or it doesn't fit any longer."""
    decoder = _DECODERS.get(cache)
    if decoder is not None:
        fuse_projections(model)
        same_ending = decoder.ending is ending or (decoder.ending is not None and decoder.ending.same(ending))
        same_draw = decoder.sampling == sampling and decoder.generator is generator
        if same_draw and same_ending and decoder.fits(model, cache):
            return decoder
        del _DECODERS[cache]
    decoder = _DECODERS[cache] = GraphedDecoder(model, cache, sampling, generator, ending)
    return decoder


def _kind(model: HybridForCausalLM, rows: int) -> tuple:
    """What a kept cache must agree in."""
    weight = model.model.embed_tokens.weight
    mixers = [layer.mixer for layer in model.model.layers]
    rules = tuple((mixer.budget, mixer.retention) for mixer in mixers)
    return rows, weight.dtype, weight.device, rules, torch.is_inference_mode_enabled()


def take_cache(model: HybridForCausalLM, rows: int) -> HybridCache:
    """An empty cache for one call of `generate`, which nobody sees: that of an earlier call if there is one."""
    kind, cache = _CACHES.pop(model, (None, None))
    if kind != _kind(model, rows):
        cache = model.new_cache(rows)
        cache.is_own = True
        return cache
    cache.reset()
    return cache


def release(model: HybridForCausalLM) -> None:
    """Free the cache and the graph that `generate` keeps for its next call."""
    _CACHES.pop(model, None)


# ---- generation without transformers


def serves(model: HybridForCausalLM, cache: HybridCache) -> bool:
    """Whether steps of this model can be graphs; a warning names the reason if they can't."""
    reason = obstacle(model, cache) or unread_sink(model, cache)
    if reason is not None:
        warnings.warn(f"decoding without a CUDA graph, which is slower: {reason}", stacklevel=3)
    return reason is None


def decode_graphed(
    model: HybridForCausalLM,
    logits_BV: Tensor,
    cache: HybridCache,
    max_new_tokens: int | None,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """As `models.generation.decode`, by replaying a graph."""
    decoder = decoder_for(model, cache, sampling, generator)
    decoder.start(logits_BV)
    done = 0
    while max_new_tokens is None or done < max_new_tokens:
        if done:
            decoder.step()
        done += 1
        yield decoder.token.clone()


# ---- transformers' generate


def served_sampling(processors: LogitsProcessorList, do_sample: bool) -> Sampling | str:
    """What transformers' processors of the logits come to, or the name of one that a graph can't serve."""
    order = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    found = [order.index(type(x)) if type(x) in order else -1 for x in processors]
    for place, processor in zip(found, processors, strict=True):
        infinite = getattr(processor, "filter_value", -torch.inf) == -torch.inf
        if place < 0 or not infinite or getattr(processor, "min_tokens_to_keep", 1) != 1:
            return type(processor).__name__
    if found != sorted(set(found)):
        return "processors in another order"
    values = dict(zip(found, processors, strict=True))
    if not do_sample:
        return GREEDY if not found else type(processors[0]).__name__
    return Sampling(
        temperature=float(values[0].temperature) if 0 in values else 1.0,
        top_k=values[1].top_k if 1 in values else None,
        top_p=float(values[2].top_p) if 2 in values else None,
    )


def _not_served(model, generation_config, processors, synced_gpus: bool, model_kwargs: dict) -> str | None:
    """Why a call of `generate` can't use a graph; None if it can."""
    cache = model_kwargs.get("past_key_values")
    if not model_kwargs.get("use_cache") or not isinstance(cache, HybridCache):
        return "it goes without the model's cache"
    if synced_gpus:
        return "synced_gpus=True"
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if generation_config.return_dict_in_generate and getattr(generation_config, name):
            return f"{name}=True"
    sampling = served_sampling(processors, generation_config.do_sample)
    if isinstance(sampling, str):
        return f"the logits are changed by {sampling}"
    # a learned sink is read with the prompt, before anything is captured
    return obstacle(model, cache)


def generate(
    model: HybridForCausalLM,
    otherwise: Callable,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config,
    synced_gpus: bool = False,
    streamer=None,
    **model_kwargs,
) -> GenerateDecoderOnlyOutput | Tensor:
    """The loop of transformers' `generate` for greedy decoding and sampling, by replaying a graph.

    Args:
        otherwise: the loop of transformers itself, called where a graph can't serve; a warning names the reason.
        others: as in `GenerationMixin._sample`.
    """
    reason = _not_served(model, generation_config, logits_processor, synced_gpus, model_kwargs)
    if reason is not None:
        warnings.warn(f"decoding without a CUDA graph, which is slower: {reason}", stacklevel=4)
        return otherwise(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )
    prefilled = model._prefill(input_ids, generation_config, model_kwargs)
    cache, logits_BV = prefilled.past_key_values, prefilled.logits[:, -1].clone()
    del prefilled
    stops = _Stops.of(stopping_criteria, generation_config, input_ids.device)
    sampling = served_sampling(logits_processor, generation_config.do_sample)
    decoder = decoder_for(model, cache, sampling, None, stops.ending)
    ids = _generate(decoder, logits_BV, _Columns(input_ids, stops.max_length), stops, streamer)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)
    if getattr(cache, "is_own", False):
        _CACHES[model] = _kind(model, cache.batch), cache
    return ids


def _generate(decoder: GraphedDecoder, logits_BV: Tensor, columns: _Columns, stops: _Stops, streamer) -> Tensor:
    """Draw, look whether that was the last token, step; the streamer's work is done while the device computes."""
    decoder.start(logits_BV)
    while True:
        columns.append(decoder.token)
        # the host only waits where it has to know what was drawn
        shown = decoder.token[:, 0].to("cpu", copy=True) if streamer is not None else None
        last = stops.reached(columns.ids, decoder)
        if not last:
            decoder.step()
        if streamer is not None:
            streamer.put(shown)
        if last:
            break
    if streamer is not None:
        streamer.end()
    return columns.ids


class _Columns:
    """Token ids [B, T] that grow in place, in memory that doubles."""

    def __init__(self, ids: Tensor, expected: int | None):
        batch, self.length = ids.shape
        self._ids = ids.new_empty(batch, max(expected or 0, self.length + 64))
        self._ids[:, : self.length] = ids

    @property
    def ids(self) -> Tensor:
        return self._ids[:, : self.length]

    def append(self, token_B1: Tensor) -> None:
        if self.length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.empty_like(self._ids)], 1)
        self._ids[:, self.length : self.length + 1].copy_(token_B1)
        self.length += 1


@dataclass(frozen=True, eq=False)
class _Stops:
    """When generation ends.

    Attributes:
        max_length: columns, or None.
        ending: end-of-text tokens, which the graph looks for.
        others: criteria that are asked after every token.
    """

    max_length: int | None
    ending: Ending | None
    others: StoppingCriteriaList

    @classmethod
    def of(cls, criteria: StoppingCriteriaList, generation_config, device: torch.device) -> _Stops:
        """Sort transformers' criteria."""
        others = StoppingCriteriaList([x for x in criteria if type(x) not in (MaxLengthCriteria, EosTokenCriteria)])
        ends = [x.eos_token_id.to(device) for x in criteria if type(x) is EosTokenCriteria]
        ending = None
        if ends:
            ending = Ending(torch.cat(ends), int(generation_config._pad_token_tensor))
        return cls(criteria.max_length, ending, others)

    def reached(self, ids: Tensor, decoder: GraphedDecoder) -> bool:
        """Whether the token just drawn was the last one."""
        if self.others:
            decoder.ended |= self.others(ids, None)
        if self.max_length is not None and ids.shape[1] >= self.max_length:
            return True
        if self.ending is None and not self.others:
            return False
        return bool(decoder.ended.all())
