"""Streaming caches for pretrained decoders: every architecture against its own dense code.

The oracle never looks into the streaming code: a fresh copy of the model runs over the whole text, and its attention
modules, whose code stays the model's own, are called once a query on the hidden states of the tokens that the rule
keeps, with the masks and positions that the model makes for a text of just so many tokens.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.streaming import SYSTEMS, Reader, Settings, _measure, run, table
from lte.visibility import visible
from models.streaming import stream
from models.streaming_architectures import family_of
from models.streaming_cache import PIECE

VOCAB = 61
SMALL = dict(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
GATED = SMALL | dict(intermediate_size=40, num_key_value_heads=2)


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GATED)),
    "llama-linear": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GATED, **rope("linear", factor=3.0))),
    "llama-llama3": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GATED, **LLAMA3)),
    "llama-yarn": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**GATED, **rope("yarn", factor=4.0, original_max_position_embeddings=32))
    ),
    "llama-dynamic": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**GATED, max_position_embeddings=64, **rope("dynamic", factor=2.0))
    ),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GATED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GATED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GATED, head_dim=20)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            **(SMALL | {"hidden_size": 64}),
            intermediate_size=40,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        )
    ),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL)),
    "falcon-grouped": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon-alibi": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**(SMALL | {"num_attention_heads": 6}), alibi=True, multi_query=False, parallel_attn=False)
    ),
    "mpt": lambda: tf.MptForCausalLM(
        tf.MptConfig(vocab_size=VOCAB, d_model=48, n_layers=2, n_heads=3, max_seq_len=64)
    ),
}
PLAIN = ("llama", "gpt-neox", "falcon", "falcon-alibi", "mpt")
UNWAITING = (*PLAIN, "falcon-grouped", "qwen3")


def build(name: str) -> tf.PreTrainedModel:
    """A small model with weights large enough that positions matter."""
    torch.manual_seed(7)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model: tf.PreTrainedModel, cache: tf.Cache, ids: Tensor, sizes: list[int] | int = 1, **kwargs) -> Tensor:
    """Logits of ids [B, T], given to the model in pieces of these sizes."""
    pieces = ids.split(sizes, 1)
    return torch.cat([model(piece, past_key_values=cache, **kwargs).logits for piece in pieces], 1)


@torch.no_grad()
def oracle(model: tf.PreTrainedModel, ids: Tensor, sinks: int, window: int) -> Tensor:
    """Logits of ids [B, T] with dense attention over the kept tokens, at positions counted among them."""
    fresh = copy.deepcopy(model)
    length = ids.shape[1]
    mask_TT = visible(None, batch=1, length=length, heads=1, window=window, sinks=sinks)[0, 0]
    surroundings: dict[int, dict] = {}
    modules = family_of(fresh).modules(fresh)

    def note(module, args, kwargs):
        kwargs = {name: x for name, x in kwargs.items() if name != "hidden_states"}
        surroundings[len(surroundings) + 1] = kwargs

    handle = modules[0].register_forward_pre_hook(note, with_kwargs=True)
    for count in range(1, min(length, sinks + window) + 1):
        fresh(ids[:, :count], use_cache=False)
    handle.remove()

    def kept_only(dense):
        def forward(hidden_states, *args, **kwargs):
            rows = []
            for t in range(length):
                kept = hidden_states[:, mask_TT[t]]
                rows.append(dense(kept, **surroundings[kept.shape[1]])[0][:, -1:])
            return torch.cat(rows, 1), None

        return forward

    for module in modules:
        module.forward = kept_only(module.forward)
    return fresh(ids, use_cache=False).logits


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).square().mean().sqrt() <= tolerance * b.square().mean().sqrt()
    assert (a - b).abs().max() <= 10 * tolerance * b.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_model_until_full(name):
    model, ids = build(name), tokens(2, 29)
    with torch.no_grad():
        dense = model(ids).logits
    close(feed(model, stream(model, 4, 25), ids, 29), dense)
    close(feed(model, stream(model, 3, 26), ids, [7, 1, 1, 20]), dense)
    # a smaller cache differs once it is full, and only then
    small = feed(model, stream(model, 2, 9), ids)
    close(small[:, :11], dense[:, :11])
    assert (small[:, 11:] - dense[:, 11:]).abs().max() > 0.01
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("name", MODELS)
def test_full_cache_equals_the_kept_tokens_from_scratch(name):
    model, ids = build(name), tokens(2, 37, seed=1)
    expected = oracle(model, ids, 3, 8)
    close(feed(model, stream(model, 3, 8), ids), expected)
    close(feed(model, stream(model, 3, 8), ids, [2, 5, 1, 17, 1, 11]), expected)
    close(feed(model, stream(model, 3, 8), ids, [10, 2, 25]), expected)
    close(feed(model, stream(model, 3, 8), ids, 37), expected)


@pytest.mark.parametrize(("sinks", "window"), [(0, 7), (5, 1), (1, 2), (9, 4), (0, 1)])
@pytest.mark.parametrize("name", ["llama", "falcon-alibi", "mpt"])
def test_unusual_cache_sizes(name, sinks, window):
    model, ids = build(name), tokens(1, 23, seed=2)
    expected = oracle(model, ids, sinks, window)
    close(feed(model, stream(model, sinks, window), ids), expected)
    close(feed(model, stream(model, sinks, window), ids, [3, 9, 1, 10]), expected)


@pytest.mark.parametrize("name", ["qwen3", "gpt-neox", "mpt"])
def test_inputs_longer_than_a_piece(name):
    model, ids = build(name), tokens(1, PIECE + 70, seed=3)
    with torch.no_grad():
        whole = model(ids, past_key_values=stream(model, 4, 29), output_hidden_states=True)
    close(whole.logits, feed(model, stream(model, 4, 29), ids))
    assert [x.shape[1] for x in whole.hidden_states] == [PIECE + 70] * 3
    close(model.lm_head(whole.hidden_states[-1]), whole.logits)


@pytest.mark.parametrize("name", PLAIN)
def test_rows_are_independent_of_padding_and_neighbours(name):
    """Left-padded first and second turns, then one token at a time, beside each row alone."""
    model = build(name)
    turns = [[tokens(1, n, seed=n)[0] for n in lengths] for lengths in ((13, 4, 1), (2, 19, 7), (1, 1, 1), (1, 1, 1))]
    cache, mask, outputs = stream(model, 3, 8), torch.zeros(3, 0, dtype=torch.long), []
    for rows in turns:
        width = max(len(row) for row in rows)
        ids = torch.stack([torch.cat([torch.full((width - len(row),), 5), row]) for row in rows])
        real = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
        mask = torch.cat([mask, real], 1)
        with torch.no_grad():
            outputs.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
    for b in range(3):
        mine = torch.cat([turn[b] for turn in turns])[None]
        alone = feed(model, stream(model, 3, 8), mine, mine.shape[1])
        batched = torch.cat([out[b, -len(turn[b]) :] for out, turn in zip(outputs, turns, strict=True)])
        close(batched[None], alone)
    assert all(out.isfinite().all() for out in outputs)


@pytest.mark.parametrize("bounds", [[0, 12, 14, 15, 16, 20], list(range(21))])
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_padding_in_the_middle_and_a_row_that_pauses(name, bounds):
    model, ids = build(name), tokens(2, 20, seed=4)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, [3, 9, 10, 15]] = 0
    mask[1, [0, 1, 14]] = 0
    cache, out = stream(model, 2, 5), []
    with torch.no_grad():
        for first, last in pairwise(bounds):
            piece = slice(first, last)
            out.append(model(ids[:, piece], attention_mask=mask[:, piece], past_key_values=cache).logits)
    out = torch.cat(out, 1)
    for b in range(2):
        real = mask[b].bool()
        close(out[b, real][None], feed(model, stream(model, 2, 5), ids[b, real][None], int(real.sum())))
    assert out.isfinite().all()


@pytest.mark.parametrize("name", PLAIN)
def test_generate_with_padding_and_second_turn(name):
    """`generate` gives the tokens of a plain greedy loop, in both turns."""
    model = build(name)
    settings = dict(max_new_tokens=9, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    ids, mask = tokens(2, 14, seed=5), torch.ones(2, 14, dtype=torch.long)
    mask[1, :6] = 0
    cache = stream(model, 3, 8)
    first = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    more = tokens(2, 17, seed=6)
    both = torch.cat([first, more], 1)
    mask = torch.cat([mask, torch.ones(2, 9 + 17, dtype=torch.long)], 1)
    second = model.generate(both, attention_mask=mask, past_key_values=cache, **settings)
    assert cache.get_seq_length() == second.shape[1] - 1
    for b, pad in ((0, 0), (1, 6)):
        alone = stream(model, 3, 8)
        text = ids[b : b + 1, pad:]
        for turn in (text, more[b : b + 1]):
            if turn is not text:
                text = torch.cat([text, turn], 1)
            for _ in range(9):
                logits = feed(model, alone, text[:, alone.get_seq_length() :], text.shape[1])
                text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(second[b, pad:], text[0])


def test_beam_search_equals_dense_while_not_full_and_reorders_after():
    model, ids = build("qwen2"), tokens(2, 9, seed=7)
    settings = dict(num_beams=3, max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None)
    mask = torch.ones_like(ids)
    dense = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, past_key_values=stream(model, 4, 20), **settings), dense
    )
    cache, ids = stream(model, 2, 5), tokens(3, 12, seed=8)
    feed(model, cache, ids, 12)
    addresses = [x.data_ptr() for x in cache.tensors]
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    assert [x.data_ptr() for x in cache.tensors] == addresses
    more = tokens(3, 6, seed=9)
    after = feed(model, cache, more)
    close(after, feed(model, stream(model, 2, 5), torch.cat([ids[order], more], 1), 18)[:, 12:])


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_a_hundred_thousand_tokens_at_constant_bytes(name):
    """With one layer the kept keys come from the kept tokens alone, so the end has a dense answer."""
    torch.manual_seed(11)
    if name == "llama":
        config = tf.LlamaConfig(
            vocab_size=13,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        model = tf.LlamaForCausalLM(config).eval()
    else:
        model = tf.MptForCausalLM(
            tf.MptConfig(vocab_size=13, d_model=8, n_layers=1, n_heads=2, max_seq_len=64)
        ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.7)
    ids = torch.randint(0, 13, (1, 100_003))
    cache = stream(model, 3, 29)
    marks = []
    with torch.no_grad():
        for piece in ids.split(20_001, 1):
            logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
            marks.append((cache.nbytes, [x.data_ptr() for x in cache.tensors]))
        last = feed(model, cache, ids[:, :3])
        marks.append((cache.nbytes, [x.data_ptr() for x in cache.tensors]))
        assert all(mark == marks[0] for mark in marks)
        assert cache.get_seq_length() == 100_006
        ids = torch.cat([ids, ids[:, :3]], 1)
        close(logits, model(torch.cat([ids[:, :3], ids[:, -32:-3]], 1)).logits[:, -1:])
        close(last[:, -1:], model(torch.cat([ids[:, :3], ids[:, -29:]], 1)).logits[:, -1:])


def test_bytes_count_kv_heads_only():
    model = build("falcon-grouped")
    cache = stream(model, 2, 5)
    feed(model, cache, tokens(3, 2), 2)
    assert (
        cache.nbytes == 2 * 2 * 3 * 2 * 7 * 12 * 4 + 3 * 8
    )  # k and v, layers, rows, KV heads, slots, D, float32; seen


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "falcon", "falcon-alibi", "mpt"])
def test_bfloat16(name):
    model, ids = build(name), tokens(2, 31, seed=12)
    expected = feed(model, stream(model, 3, 8), ids, 31)
    model = model.bfloat16()
    cache = stream(model, 3, 8)
    out = feed(model, cache, ids, [20, 1, 1, 9]).float()
    assert all(x.dtype == torch.bfloat16 for x in (*cache.keys, *cache.values))
    assert ((out - expected).square().mean() / expected.square().mean()).sqrt() < 0.06
    with torch.no_grad():
        dense = model(ids).logits.float()
    assert (feed(model, stream(model, 4, 40), ids, 31) - dense).square().mean().sqrt() < 0.02 * dense.std()


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_decoding_compiles_into_one_graph(name):
    model, ids = build(name), tokens(2, 20, seed=13)
    expected = feed(model, stream(model, 3, 5), ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(feed(compiled, stream(model, 3, 5), ids), expected)


def test_embeddings_as_input_and_logits_to_keep():
    model, ids = build("llama"), tokens(2, 19, seed=14)
    expected = feed(model, stream(model, 3, 5), ids, 19)
    cache = stream(model, 3, 5)
    with torch.no_grad():
        out = model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache, logits_to_keep=2)
    assert out.past_key_values is cache
    close(out.logits, expected[:, -2:])


@pytest.mark.parametrize("name", ["llama", "falcon-alibi"])
def test_inference_mode_and_gradient_mode_mix(name):
    model, ids = build(name), tokens(1, 20, seed=19)
    expected = feed(model, stream(model, 2, 5), ids, 20)
    cache, out = stream(model, 2, 5), []
    for number, piece in enumerate(ids.split([4, 1, 9, 1, 5], 1)):
        with torch.inference_mode(number % 2 == 0):
            out.append(model(piece, past_key_values=cache).logits.detach())
    close(torch.cat(out, 1), expected)


def test_copies_and_reset():
    """A copied cache branches the text; a copied model streams with its own weights."""
    model, ids = build("falcon"), tokens(1, 16, seed=15)
    cache = stream(model, 2, 5)
    feed(model, cache, ids[:, :10], 10)
    branch = copy.deepcopy(cache)
    a, b = feed(model, cache, ids[:, 10:]), feed(model, branch, ids[:, 10:], 6)
    close(a, b)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    fresh = feed(other, stream(other, 2, 5), ids, 16)
    close(fresh[:, 10:], a)
    addresses = [x.data_ptr() for x in branch.tensors]
    branch.reset()
    close(feed(other, branch, ids), fresh)
    assert [x.data_ptr() for x in branch.tensors] == addresses


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_streamed_is_saved_whole(name):
    model, ids = build(name), tokens(1, 12, seed=16)
    stream(model, 2, 5)
    again = pickle.loads(pickle.dumps(model))
    close(feed(again, stream(again, 2, 5), ids), feed(model, stream(model, 2, 5), ids))


def test_dense_calls_are_untouched():
    model, ids = build("qwen3"), tokens(1, 12, seed=16)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    before = model.generate(ids, **settings)
    cache = stream(model, 2, 5)
    stream(model, 2, 5)
    feed(model, cache, ids)
    assert torch.equal(model.generate(ids, **settings), before)


def test_architectures_that_can_not_be_served():
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="GPT2LMHeadModel can't be streamed"):
        stream(gpt2)
    with pytest.raises(ValueError, match="LlamaModel can't be streamed"):
        stream(build("llama").model)
    split = build("llama")
    split.model.embed_tokens.to("meta")
    with pytest.raises(ValueError, match="lies on cpu, meta"):
        stream(split)
    dynamic = build("llama-dynamic")
    with pytest.raises(ValueError, match=r"'dynamic' changes its frequencies.*make them 64 or less"):
        stream(dynamic, 4, 61)
    stream(dynamic, 4, 60)
    mistral = tf.MistralForCausalLM(tf.MistralConfig(**GATED, sliding_window=16))
    with pytest.raises(ValueError, match=r"sinks \+ window = 17.*make them 16 or less"):
        stream(mistral, 4, 13)
    stream(mistral, 4, 12)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((-1, 5), "sinks=-1"), ((2, 0), "window=0"), ((2, 5.0), "window=5.0"), ((True, 5), "sinks=True")],
)
def test_numbers_that_are_no_cache(numbers, message):
    with pytest.raises(ValueError, match=message):
        stream(build("llama"), *numbers)


def test_calls_that_can_not_be_served():
    model, ids = build("llama"), tokens(2, 6)
    cache = stream(model, 2, 5)
    feed(model, cache, ids, 6)
    with pytest.raises(ValueError, match="cache holds 2 rows and the input has 3"):
        feed(model, cache, tokens(3, 1))
    with pytest.raises(ValueError, match="output_attentions"):
        feed(model, cache, ids[:, :1], output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask"):
        feed(model, cache, ids[:, :1], attention_mask=torch.ones(2, 1, 1, 7))
    with pytest.raises(ValueError, match="attention_mask"):
        feed(model, cache, ids[:, :1], attention_mask=torch.ones(2, 5))
    for other in (build("qwen2"), build("gpt-neox")):
        with pytest.raises(ValueError, match="made for another model"):
            feed(other, cache, ids[:, :1])
        stream(other, 2, 5)
        with pytest.raises(ValueError, match="made for another model"):
            feed(other, cache, ids[:, :1])
    for call in (cache.crop, cache.batch_repeat_interleave, cache.batch_select_indices):
        with pytest.raises(ValueError, match="StreamingCache"):
            call(1)
    with pytest.raises(ValueError, match="use_cache=True"):
        model.generate(ids, past_key_values=cache, use_cache=False, max_new_tokens=2)
    assert cache.get_seq_length() == 6
    with pytest.raises(ValueError, match=r"model\.eval"):
        feed(model.train(), cache, ids[:, :1])
    with pytest.raises(ValueError, match="one dtype"):
        feed(model.eval().bfloat16(), cache, ids[:, :1])


def test_benchmark_systems_agree_while_nothing_is_dropped():
    model, ids = build("llama"), tokens(1, 31, seed=18)
    with torch.no_grad():
        logits = model(ids).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[11:30], ids[0, 12:31], reduction="none")
        for system in (*SYSTEMS, "lalte tova"):
            reader = Reader(system, model, ids, None if system == "dense" else 40, Settings(sinks=4))
            reader.skip(11)
            found = reader.losses(30, 19)
            assert reader.at == 30
            close(torch.tensor(found), losses)


def test_benchmark_writes_a_result_once_and_continues_it(tmp_path, monkeypatch):
    settings = Settings(
        out=str(tmp_path / "streaming.json"),
        figure=str(tmp_path / "streaming.svg"),
        cache_sizes=(8, 16),
        lengths=(24, 48),
        band=8,
        sampled=3,
        steps=2,
        dense_limit=24,
        retention=("key_norm",),
        device="cpu",
    )
    measured, stops = [], ["recompute"]

    def measure(system, *rest):
        if system in stops:
            raise KeyboardInterrupt
        measured.append(system)
        return _measure(system, *rest)

    monkeypatch.setattr("benchmarks.streaming._measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    with pytest.raises(ValueError, match="unfinished run with another config"):
        run(replace(settings, band=7))
    stops.clear()
    content = run(settings)
    assert measured == [*["lalte", "lalte key_norm", "window", "recompute"] * 2, "dense"]
    found = {(row["case"], row["system"], row["metric"]): row for row in content["rows"]}
    assert len(found) == len(content["rows"]) == 2 * 2 * (4 + 4 + 4 + 3) + 4
    for size in (8, 16):
        own = [found[f"cache {size} text {n}", "lalte", "bytes"]["median"] for n in (24, 48)]
        assert own == [4 * 2 * 2 * size * 32 * 4 + 8] * 2  # layers, k and v, KV heads, slots, D, float32; seen
    assert found["text 24", "dense", "perplexity"]["n"] == 8
    assert found["cache 8 text 48 sampled", "recompute", "perplexity"]["n"] == 3
    assert all(" [" in line for line in table(content).splitlines() if "sampled" in line and "recompute" in line)
    assert (tmp_path / "streaming.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"streaming\.json exists"):
        run(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (511,)}, "lengths: 511 must be 512 or more"),
        ({"lengths": (512, 600)}, "lengths: 600 must be 786 or more"),
        ({"cache_sizes": (4,)}, "cache-sizes"),
        ({"sampled": 257}, "sampled: 257"),
        ({"retention": ("h2o",), "budget": 60}, "budget: 60"),
        ({"retention": ("h2o",), "budget": 0}, "budget: 0"),
        ({"budget": 6}, "budget: 6 has no policy"),
        ({"retention": ("lte",)}, "retention='lte'"),
        ({"model": "somewhere"}, "text: none given"),
        ({"text": "book.txt"}, "text: book.txt can't be read by the random small model"),
        ({"model": "somewhere", "text": "/nowhere.txt"}, "nowhere.txt can't be read"),
    ],
)
def test_benchmark_settings_that_can_not_be_run(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(Settings(**({"out": str(tmp_path / "x.json")} | change)))


WAITING = (
    torch.ops.aten.lift_fresh.default,  # torch.tensor(...), and an index that is a list
    torch.ops.aten._local_scalar_dense.default,  # item(), bool(), int()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)


class Unwaiting(TorchDispatchMode):
    """Refuses what on a CUDA device copies between it and the host, and so waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype is torch.bool for x in args[1])
        assert func not in WAITING, f"{func} waits for the device"
        assert not masked, "an index that is a mask waits for the device"
        return func(*args, **(kwargs or {}))


WAITS = {
    "number": lambda x: x.sum().item(),
    "choice": lambda x: 1 if (x > 0).any() else 0,
    "list": lambda x: x[:, [-2]],
    "mask": lambda x: x[x > 0],
    "constant": lambda x: x + torch.tensor(0.0),
}


@pytest.mark.parametrize("case", WAITS)
def test_waiting_is_noticed(case):
    with pytest.raises(AssertionError, match="waits for the device"), Unwaiting():
        WAITS[case](torch.ones(3, 4))


@pytest.mark.parametrize("name", [*UNWAITING, "llama eager", "gpt-neox eager", "falcon eager", "qwen3 eager"])
def test_a_decoding_step_holds_nothing_that_waits(name):
    model, ids = build(name.removesuffix(" eager")), tokens(2, 30, seed=17)
    if name.endswith(" eager"):
        model.set_attn_implementation("eager")
    cache = stream(model, 3, 5)
    feed(model, cache, ids[:, :12], 12)
    with Unwaiting():
        feed(model, cache, ids[:, 12:])


@pytest.mark.gpu
@pytest.mark.parametrize("name", UNWAITING)
def test_a_decoding_step_never_waits_for_the_device(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, ids = build(name), tokens(2, 30, seed=17)
    expected = feed(model, stream(model, 3, 5), ids)
    model, ids = model.cuda(), ids.cuda()
    cache = stream(model, 3, 5)
    out = [feed(model, cache, ids[:, :12], 12), feed(model, cache, ids[:, 12:14])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out.append(feed(model, cache, ids[:, 14:]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(torch.cat(out, 1).cpu(), expected, 1e-3)
