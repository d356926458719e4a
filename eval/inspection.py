"""What a model kept of a text: each token's retention logit and lifetime, per attention layer and KV head.

The model reads the text as it always does, in its parallel form with the budget enforced; noted are what the scorers
answer, and how long the mixers then let each token be read. Attention maps come out of the mixers too: where every
value is replaced by the indicator of a stretch of the text, a mixer's output is the share of attention that the
stretch gets.

Shapes: B rows, T tokens, C hidden size, N query heads, H KV heads, D head dimension, R rows and columns of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lte.policies import POLICIES
from models.attention import RetainedAttention
from models.mixer import Context

from .conditions import retained

PIECE_TOKENS = 16  # as in StreamingLLM's figure of average attention
MOST_PIECES = 256
SINK = "[sink]"  # how a learned sink is shown
MAP_CELLS = 96  # about the rows and columns of a map of the whole text


@dataclass(frozen=True)
class Tokens:
    """A text in tokens.

    Attributes:
        ids: token ids, special tokens at the beginning included.
        texts: the characters of the text that each token stands for; "" where the token before has them already
            (a character of several tokens). Joined, without special tokens, they are the text.
        special: whether the tokenizer added the token; its text is then its name.
        total: tokens of the whole text, more than len(ids) where it was cut.
    """

    ids: list[int]
    texts: list[str]
    special: list[bool]
    total: int


@dataclass(frozen=True)
class LayerRecord:
    """What one attention layer kept.

    Attributes:
        layer: its number, from 0, all kinds of layers counted.
        logits_TH: retention logits [T, H] (float32); None without a scorer.
        end_TH: [T, H] int32; token j is read by the positions j, j + 1, …, end - 1 (lte/visibility.py).
    """

    layer: int
    logits_TH: Tensor | None
    end_TH: Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of one layer, averaged.

    Attributes:
        layer: its number, from 0.
        pieces_NRR: [N, R, R] mean over short pieces of the text, each read alone; row: query, column: key.
        text_NRR: [N, R, R] of the whole text in R stretches: mean over a stretch's queries of the weight that all
            keys of another stretch get together.
    """

    layer: int
    pieces_NRR: Tensor
    text_NRR: Tensor


@dataclass(frozen=True, eq=False)
class Inspection:
    """Everything that the page shows.

    Attributes:
        pieces: short pieces averaged in `AttentionMaps.pieces_NRR`.
        maps: one entry an attention layer; empty without maps.
        policy: what chose the retained tokens in place of a scorer (lte/policies.py); None: a scorer, or none are.
    """

    tokens: Tokens
    layer_types: list[str]
    query_heads: int
    heads: int
    window: int | None
    sinks: int
    budget: int
    layers: list[LayerRecord]
    pieces: int = 0
    maps: list[AttentionMaps] = field(default_factory=list)
    policy: str | None = None


# ---- the text ----


def split_text(tokenizer: Any, text: str, limit: int | None = None) -> Tokens:
    """The tokens of a text, with the characters of each.

    Special tokens are those that the tokenizer adds by itself, but for an end-of-text token at the end.

    Args:
        limit: most tokens to keep, from the beginning; None: all.

    Raises:
        ValueError: the text has no tokens, or the limit leaves none of them.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} leaves no tokens; use 1 or more")
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, return_offsets_mapping=fast, return_special_tokens_mask=True, verbose=False)
    ids, special = list(encoded.input_ids), [bool(x) for x in encoded.special_tokens_mask]
    if len(ids) > 1 and special[-1] and ids[-1] == tokenizer.eos_token_id:
        ids, special = ids[:-1], special[:-1]
    if not ids or all(special):
        raise ValueError("text: it has no tokens; give a text with at least one character")
    if all(special[:limit]):
        least = special.index(False) + 1
        raise ValueError(f"limit: {limit} leaves only what the tokenizer adds to the text; use {least} or more")
    names = tokenizer.convert_ids_to_tokens(ids)
    if fast:
        texts = _texts_by_offset(text, encoded.offset_mapping[: len(ids)], special, names)
    else:
        texts = [name if added else tokenizer.decode([i]) for i, added, name in zip(ids, special, names, strict=True)]
    return Tokens(ids[:limit], texts[:limit], special[:limit], len(ids))


def _texts_by_offset(
    text: str, offsets: Sequence[tuple[int, int]], special: Sequence[bool], names: Sequence[str]
) -> list[str]:
    """Slices of the text in order, without overlap; what lies between two tokens goes to the second."""
    texts, done, last = [], 0, None
    for index, ((_, end), added, name) in enumerate(zip(offsets, special, names, strict=True)):
        if added:
            texts.append(name)
            continue
        texts.append(text[done:end])
        done, last = max(done, end), index
    if last is not None:
        texts[last] += text[done:]
    return texts


# ---- the model ----


@dataclass
class _Seen:
    """One forward pass of an attention layer: its input, its context, the ends of its tokens' lives [B, T, H], and
    what the scorer answered."""

    x_BTC: Tensor
    context: Context
    end_BTH: Tensor | None = None
    logits_BTH: Tensor | None = None


def attention_layers(model: Any) -> dict[int, RetainedAttention]:
    """The attention mixers of a model by layer number.

    Raises:
        ValueError: there are none.
    """
    layers = getattr(getattr(model, "model", None), "layers", ())
    found = {
        i: layer.mixer
        for i, layer in enumerate(layers)
        if isinstance(getattr(layer, "mixer", None), RetainedAttention)
    }
    if not found:
        kinds = ", ".join(sorted(set(getattr(model.config, "layer_types", None) or [type(model).__name__])))
        raise ValueError(
            f"model: it has no layers of the kind attention (only {kinds}), so no tokens are kept or evicted; "
            "give a model with attention layers, such as laLTE"
        )
    return found


@contextmanager
def _hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _read(model: Any, ids_BT: Tensor) -> dict[int, _Seen]:
    """One parallel forward pass; of each attention layer its input, its scorer's answer, and its tokens' ends."""
    seen: dict[int, _Seen] = {}
    mixers = attention_layers(model)
    scorers = {id(s): s for s in (model.model.shared_scorer, *(m.scorer for m in mixers.values())) if s is not None}

    def note_input(layer: int):
        def hook(_: nn.Module, args: tuple) -> None:
            seen[layer] = _Seen(args[0], args[1])

        return hook

    def note_logits(_module: nn.Module, _args: tuple, logits_BTH: Tensor) -> None:
        seen[max(seen)].logits_BTH = logits_BTH  # of the layer that runs now: layers run in order

    def note_end(layer: int, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(q: Tensor, k: Tensor, v: Tensor, end_BTH: Tensor, *args: Any, **options: Any) -> Tensor:
            seen[layer].end_BTH = end_BTH
            return attend(q, k, v, end_BTH, *args, **options)

        return noted

    handles = [mixer.register_forward_pre_hook(note_input(layer)) for layer, mixer in mixers.items()]
    handles += [scorer.register_forward_hook(note_logits) for scorer in scorers.values()]
    with _hooks(*handles), ExitStack() as stack:
        for layer, mixer in mixers.items():
            # scorer, policy or neither: the ends that a mixer reads by are the ones to show
            mixer._attend = note_end(layer, mixer._attend)
            stack.callback(delattr, mixer, "_attend")
        model.model(input_ids=ids_BT.to(model.device), use_cache=False)
    return seen


def _record(layer: int, seen: _Seen) -> LayerRecord:
    logits_TH = seen.logits_BTH[0].float().cpu() if seen.logits_BTH is not None else None
    return LayerRecord(layer, logits_TH, seen.end_BTH[0].cpu())


@torch.no_grad()
def attention_shares(mixer: RetainedAttention, seen: _Seen, column_BT: Tensor, columns: int) -> Tensor:
    """The share of attention that each query gives to the keys of each column: [B, T, N, columns] (float32).

    The mixer itself is run, with values that are 1 for keys of the column and 0 for others, and with the scorer's
    former answers (it reads values too).

    Args:
        column_BT: [B, T] integers in [0, columns), the column that each key belongs to.
    """
    batch, length = column_BT.shape
    dim, scorer = mixer.head_dim, mixer.scorer if mixer.scorer is not None else seen.context.shared_scorer
    outputs: list[Tensor] = []
    for first in range(0, columns, dim):
        wanted_D = torch.arange(first, first + dim, device=column_BT.device)
        values = (column_BT[..., None] == wanted_D).to(seen.x_BTC.dtype).repeat(1, 1, mixer.kv_heads)
        with ExitStack() as stack:
            answer = lambda module, output: stack.enter_context(
                _hooks(module.register_forward_hook(lambda *_, output=output: output))
            )
            answer(mixer.v_proj, values)
            if seen.logits_BTH is not None:
                answer(scorer, seen.logits_BTH)
            keep = mixer.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0].float()))
            stack.enter_context(_hooks(keep))
            mixer(seen.x_BTC, seen.context)
    shares = torch.cat([out.view(batch, length, mixer.heads, dim) for out in outputs], -1)
    return shares[..., :columns]


def _pieces_map(mixer: RetainedAttention, seen: _Seen) -> Tensor:
    batch, length = seen.x_BTC.shape[:2]
    column_BT = torch.arange(length, device=seen.x_BTC.device).expand(batch, length)
    return attention_shares(mixer, seen, column_BT, length).mean(0).transpose(0, 1).cpu()


def _text_map(mixer: RetainedAttention, seen: _Seen) -> Tensor:
    length, device = seen.x_BTC.shape[1], seen.x_BTC.device
    # whole multiples of D: every run of the mixer gives D columns
    cells = min(length, max(mixer.head_dim, MAP_CELLS // mixer.head_dim * mixer.head_dim))
    cell_T = torch.arange(length, device=device) * cells // length
    shares_TNR = attention_shares(mixer, seen, cell_T[None], cells)[0]
    sums_RNR = torch.zeros(cells, *shares_TNR.shape[1:], device=device).index_add_(0, cell_T, shares_TNR)
    return (sums_RNR / cell_T.bincount(minlength=cells)[:, None, None]).transpose(0, 1).cpu()


def short_pieces(tokens: Tokens) -> Tensor:
    """Up to 256 pieces of 16 tokens from the text [B, 16], each with the text's leading special tokens; a text that
    is shorter is one piece."""
    start = tokens.special.index(False)
    prefix, rest = tokens.ids[:start], tokens.ids[start:]
    size = max(1, PIECE_TOKENS - len(prefix))
    pieces = [rest[i : i + size] for i in range(0, len(rest) - size + 1, size)] or [rest]
    return torch.tensor([prefix + piece for piece in pieces[:MOST_PIECES]])


def after_sink(tokens: Tokens) -> Tokens:
    """The tokens as a model with a learned sink reads them: the sink, which has no id, in front."""
    return Tokens([-1, *tokens.ids], [SINK, *tokens.texts], [True, *tokens.special], tokens.total + 1)


def inspect_text(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    limit: int | None = None,
    budget: int | None = None,
    maps: bool = True,
    progress: bool = True,
) -> Inspection:
    """Reads a text and tells which tokens each head of each attention layer kept, and when it lost them.

    Args:
        model: a `HybridForCausalLM` in evaluation mode, with at least one attention layer.
        limit: most tokens to read; None: all. The time and the memory of maps grow with the square.
        budget: retained tokens per head; None: the model's own number.
        maps: whether attention maps are made too.

    Raises:
        ValueError: a model without attention layers, a text without tokens, a limit or budget that isn't one.
    """
    mixers = attention_layers(model)
    tokens = split_text(tokenizer, text, limit)
    assert not model.training, "the budget is only enforced in evaluation mode"
    layers, found = [], []
    with retained(model, budget):
        any_mixer = next(iter(mixers.values()))
        rule = {"window": any_mixer.window, "sinks": any_mixer.sinks, "budget": any_mixer.budget}
        whole = _read(model, torch.tensor([tokens.ids]))
        pieces_BT = short_pieces(tokens) if maps else None
        short = _read(model, pieces_BT) if maps else {}
        for layer in tqdm(mixers, desc="attention layers", disable=not progress, unit="layer"):
            mixer = mixers[layer]
            layers.append(_record(layer, whole[layer]))
            if maps:
                found.append(AttentionMaps(layer, _pieces_map(mixer, short[layer]), _text_map(mixer, whole[layer])))
    return Inspection(
        tokens if model.model.sink_token is None else after_sink(tokens),
        list(model.config.layer_types),
        any_mixer.heads,
        any_mixer.kv_heads,
        **rule,
        layers=layers,
        pieces=len(pieces_BT) if maps else 0,
        maps=found,
        policy=any_mixer.retention if any_mixer.retention in POLICIES and rule["budget"] else None,
    )
