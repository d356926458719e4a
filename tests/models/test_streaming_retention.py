"""Streaming caches with retained tokens: every policy against a plain decoder over the model's own attention code.

The oracle chooses the kept tokens of each KV head in plain Python, and calls the model's own attention modules once
a query and head on the hidden states of the kept tokens alone, as if they were the text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lte.policies import Arrivals, Random
from models.streaming import stream
from models.streaming_architectures import family_of
from models.streaming_cache import PIECE
from tests.models.test_streaming import GATED, Unwaiting, build, close, feed

POLICIES = ("h2o", "tova", "key_norm", "random", "recency")
KEYS: dict[str, tuple[int, Callable[[nn.Module, Tensor], Tensor]]] = {  # KV heads; keys [T, H, D] before rotation
    "llama": (2, lambda m, x: m.k_proj(x)[0].unflatten(-1, (2, -1))),
    "llama-yarn": (2, lambda m, x: m.k_proj(x)[0].unflatten(-1, (2, -1))),
    "gpt-neox": (4, lambda m, x: m.query_key_value(x)[0].unflatten(-1, (4, 3, -1))[:, :, 1]),
    "mpt": (3, lambda m, x: m.Wqkv(x)[0].unflatten(-1, (3, 3, -1))[:, 1]),
}
RULES = [(2, 5, 4), (0, 1, 3), (3, 4, 40)]


def distinct(batch: int, length: int, seed: int = 0) -> Tensor:
    """Rows without a token twice: its keys would be equal in the first layer, and rounding would choose."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(61, generator=generator)[:length] for _ in range(batch)])


def first_rank(retention: str, keys_THD: Tensor, j: int, h: int) -> float:
    if retention == "random":
        return float(Random().ranks(Arrivals(keys_THD[None, j : j + 1], torch.tensor([[j]])))[0, 0, h])
    return {"recency": j, "key_norm": -float(keys_THD[j, h].norm())}.get(retention, 0.0)


def watched(module: nn.Module, dense: Callable, output: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The module's own forward for the last query: its heads before the last projection [N * D], and its weights."""

    def run(hidden: Tensor, surroundings: dict) -> tuple[Tensor, Tensor]:
        seen = []
        handle = getattr(module, output).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        weights = dense(hidden, **surroundings)[1]
        handle.remove()
        return seen[0][0, -1], weights[0, :, -1]

    return run


@torch.no_grad()
def oracle(name: str, ids_1T: Tensor, retention: str, sinks: int, window: int, budget: int) -> Tensor:
    """Logits [1, T, V], one token after the other."""
    fresh = copy.deepcopy(build(name))
    fresh.set_attn_implementation("eager")  # which returns attention weights
    length, (heads, keys_of) = ids_1T.shape[1], KEYS[name]
    family = family_of(fresh)
    surroundings: dict[int, dict] = {}

    def note(module, args, kwargs):
        surroundings[len(surroundings) + 1] = {n: x for n, x in kwargs.items() if n != "hidden_states"}

    handle = family.modules(fresh)[0].register_forward_pre_hook(note, with_kwargs=True)
    for count in range(1, min(length, sinks + window + budget) + 1):
        fresh(ids_1T[:, :count], use_cache=False)
    handle.remove()

    def kept_only(module: nn.Module, dense: Callable):
        run = watched(module, dense, family.output)

        def forward(hidden_states, *args, **kwargs):
            keys_THD = keys_of(module, hidden_states)
            held, rank = [[] for _ in range(heads)], [{} for _ in range(heads)]
            rows = []
            for i in range(length):
                out, weights = [], []
                for h in range(heads):
                    rank[h][i] = first_rank(retention, keys_THD, i, h)
                    if i - window >= sinks:
                        held[h].append(i - window)
                        if len(held[h]) > budget:
                            held[h].remove(min(held[h], key=lambda j, h=h: (rank[h][j], -j)))
                    near = range(max(0, i - window + 1), i + 1)
                    kept = sorted({*range(min(sinks, i + 1)), *held[h], *near})
                    heads_out, weight = run(hidden_states[:, kept], surroundings[len(kept)])
                    out.append(heads_out.chunk(heads)[h])
                    weights.append(dict(zip(kept, weight.chunk(heads)[h].T, strict=True)))
                for h in range(heads):
                    for j in weights[h]:
                        if retention == "h2o":
                            rank[h][j] += float(weights[h][j].sum())
                        if retention == "tova":
                            rank[h][j] = float(torch.stack([weights[g][j] for g in range(heads)]).mean())
                rows.append(getattr(module, family.output)(torch.cat(out)))
            return torch.stack(rows)[None], None

        return forward

    for module in family.modules(fresh):
        module.forward = kept_only(module, module.forward)
    return fresh(ids_1T, use_cache=False).logits


@pytest.mark.parametrize("retention", POLICIES)
@pytest.mark.parametrize("name", KEYS)
def test_equals_the_kept_tokens_from_scratch(name, retention):
    """In one piece, token by token, and in pieces of any size, at constant bytes and addresses."""
    model, ids = build(name), distinct(1, 27)
    for rule in RULES:
        expected = oracle(name, ids, retention, *rule)
        cache = stream(model, *rule, retention)
        feed(model, cache, ids[:, :1])
        before = cache.nbytes, [x.data_ptr() for x in cache.tensors]
        close(feed(model, cache, ids[:, 1:]), expected[:, 1:])
        assert (cache.nbytes, [x.data_ptr() for x in cache.tensors]) == before
        close(feed(model, stream(model, *rule, retention), ids, 27), expected)
        close(feed(model, stream(model, *rule, retention), ids, [3, 9, 1, 1, 13]), expected)


@pytest.mark.parametrize("retention", POLICIES)
@pytest.mark.parametrize("name", ["qwen3", "falcon", "falcon-grouped", "falcon-alibi"])
def test_pieces_equal_single_tokens(name, retention):
    model, ids = build(name), distinct(2, 37, seed=1)
    expected = feed(model, stream(model, 2, 5, 4, retention), ids)
    close(feed(model, stream(model, 2, 5, 4, retention), ids, [12, 1, 24]), expected)
    with torch.no_grad():
        dense = model(ids).logits
    close(expected[:, :11], dense[:, :11])
    assert (expected[:, 11:] - dense[:, 11:]).abs().max() > 0.01


@pytest.mark.parametrize("retention", POLICIES)
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_rows_are_independent(name, retention):
    """Left-padded first and second turns, rows that pause, single tokens, beside each row alone."""
    model, texts = build(name), distinct(3, 45, seed=2)
    cache, read, mask = stream(model, 2, 5, 4, retention), torch.zeros(3, dtype=torch.long), []
    outputs = [[] for _ in range(3)]
    for lengths in ((13, 4, 1), (2, 19, 7), (1, 1, 1), (1, 0, 1), (6, 9, 0), (0, 1, 1), (1, 1, 0)):
        width = max(lengths)
        ids = torch.full((3, width), 5)
        mask.append(torch.arange(width) >= width - torch.tensor(lengths)[:, None])
        for b, n in enumerate(lengths):
            ids[b, width - n :] = texts[b, read[b] : read[b] + n]
        with torch.no_grad():
            out = model(ids, attention_mask=torch.cat(mask, 1).long(), past_key_values=cache).logits
        assert out.isfinite().all()
        for b, n in enumerate(lengths):
            outputs[b].append(out[b, width - n :])
        read += torch.tensor(lengths)
    for b in range(3):
        alone = feed(model, stream(model, 2, 5, 4, retention), texts[b : b + 1, : read[b]], int(read[b]))
        close(torch.cat(outputs[b])[None], alone)


@pytest.mark.parametrize(("name", "retention"), [("llama", "tova"), ("gpt-neox", "key_norm"), ("mpt", "h2o")])
def test_generate_with_padding_and_second_turn(name, retention):
    model = build(name)
    settings = dict(max_new_tokens=7, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    ids, mask = distinct(2, 14, seed=5), torch.ones(2, 14, dtype=torch.long)
    mask[1, :6] = 0
    cache = stream(model, 3, 5, 4, retention)
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    both = torch.cat([first, distinct(2, 17, seed=6)], 1)
    mask = torch.cat([mask, torch.ones(2, 7 + 17, dtype=torch.long)], 1)
    second = model.generate(both, attention_mask=mask, past_key_values=cache, **settings)
    for b, pad in ((0, 0), (1, 6)):
        alone = stream(model, 3, 5, 4, retention)
        text = second[b : b + 1, pad:]
        guess = feed(model, alone, text).argmax(-1)[0]  # of the token after each
        for start in (14, 14 + 7 + 17):
            assert torch.equal(guess[start - pad - 1 : start - pad + 6], text[0, start - pad : start - pad + 7])


@pytest.mark.parametrize("retention", ["h2o", "random"])
def test_inputs_longer_than_a_piece(retention):
    """Places beyond the cache's own are needed while a piece passes; memory stays what it was."""
    model = build("llama")
    ids = torch.randint(0, 61, (1, PIECE + 40), generator=torch.Generator().manual_seed(3))
    cache = stream(model, 4, 9, 17, retention)
    with torch.no_grad():
        whole = model(ids, past_key_values=cache).logits
    close(whole, feed(model, stream(model, 4, 9, 17, retention), ids))
    assert cache.nbytes == sum(x.nbytes for x in cache.tensors)
    keys = 2 * 2 * 2 * 30 * 12 * 4  # layers, k and v, KV heads, slots, D, float32
    assert cache.nbytes == keys + 2 * 2 * 30 * (8 + 4) + 3 * 8  # positions and ranks; seen, of all and a layer


@pytest.mark.parametrize(("name", "retention"), [("llama", "h2o"), ("llama", "key_norm"), ("mpt", "tova")])
def test_other_uses_of_a_cache(name, retention):
    """Copies, rows reordered, reset, inference mode, bfloat16, and one graph of a decoding step."""
    model, ids = build(name), distinct(3, 30, seed=4)
    make = lambda: stream(model, 2, 5, 4, retention)
    expected = feed(model, make(), ids)
    cache = make()
    with torch.inference_mode():
        model(ids[:, :15], past_key_values=cache)
    branch = copy.deepcopy(cache)
    close(model(ids[:, 15:], past_key_values=cache).logits.detach(), expected[:, 15:])
    order = torch.tensor([2, 0, 2])
    branch.reorder_cache(order)
    close(feed(model, branch, ids[order, 15:], [7, 8]), expected[order, 15:])
    addresses = [x.data_ptr() for x in branch.tensors]
    branch.reset()
    close(feed(model, branch, ids, 30), expected)
    assert [x.data_ptr() for x in branch.tensors] == addresses
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(feed(compiled, make(), ids[:, :14]), expected[:, :14])
    half = copy.deepcopy(model).bfloat16()
    cache = stream(half, 2, 5, 40, retention)  # nothing is evicted: a rounded rank may choose another token
    out = feed(half, cache, ids, [20, 1, 9]).float()
    assert all(x.dtype == torch.bfloat16 for x in (*cache.keys, *cache.values))
    dense = feed(model, None, ids, 30)
    assert ((out - dense).square().mean() / dense.square().mean()).sqrt() < 0.06


@pytest.mark.parametrize("retention", POLICIES)
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_a_decoding_step_holds_nothing_that_waits(name, retention):
    model, ids = build(name), distinct(2, 30, seed=3)
    cache = stream(model, 2, 5, 4, retention)
    feed(model, cache, ids[:, :12], 12)
    with Unwaiting():
        feed(model, cache, ids[:, 12:])
    padded = torch.tensor([[1], [0]])
    with Unwaiting():
        feed(model, cache, ids[:, :1], attention_mask=padded)


def test_what_can_not_be_retained():
    model = build("llama")
    for numbers, words in (
        ((4, 9, 3), r"budget=3 needs a policy.*one of recency, random, h2o, tova, key_norm"),
        ((4, 9, -1), "budget=-1"),
        ((4, 9, 0, "h2o"), "retention='h2o' has no slots"),
        ((4, 9, 3, "lte"), "retention='lte' is unknown"),
        ((4, 9, 3, "delta_error"), "Gated DeltaNet layers, and the model has none"),
    ):
        with pytest.raises(ValueError, match=words):
            stream(model, *numbers)
    mistral = tf.MistralForCausalLM(tf.MistralConfig(**GATED, sliding_window=16))
    with pytest.raises(ValueError, match=r"sinks \+ window \+ budget = 17.*make them 16 or less"):
        stream(mistral, 4, 9, 4, "h2o")
    cache = stream(model, 2, 5, 4, "h2o")
    feed(model, cache, distinct(2, 6), 6)
    with pytest.raises(ValueError, match="cache holds 2 rows"):
        feed(model, cache, distinct(3, 1))
    with pytest.raises(ValueError, match="one dtype"):
        feed(model.bfloat16(), cache, distinct(2, 1))
