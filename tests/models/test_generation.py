"""Generation: transformers' `generate` on this cache, the plain functions, sampling, and text from tokens.

Shapes: B rows, T tokens, V vocabulary.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer

from models.generation import Sampling, TextStream, decode, decode_one_token, prefill, sample, stream_tokens
from models.loading import fingerprint
from tests.tiny_models import (
    VARIANTS,
    VOCAB,
    assert_close,
    make_ids,
    make_model,
    make_tokenizer,
    make_variant,
    run_in_pieces,
)

NEW = 15


@torch.no_grad()
def greedy(model, ids, count=NEW):
    """The definition: the likeliest token of the parallel forward, again and again."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def generate(model, ids, **options):
    return model.generate(ids, **{"do_sample": False, "max_new_tokens": NEW, **options})


def left_padded(texts):
    width = max(t.shape[1] for t in texts)
    ids, mask = make_ids(len(texts), width, seed=99), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, width - text.shape[1] :] = text[0]
        mask[row, width - text.shape[1] :] = 1
    return ids, mask


# ---- transformers' generate ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", [1, 60])
def test_greedy(variant, prompt):
    model, ids = make_variant(variant), make_ids(2, prompt)
    assert torch.equal(generate(model, ids), greedy(model, ids))


@pytest.mark.parametrize("variant", ["lalte", "gdn", "transformer", "lalte, rope_in_cache"])
def test_left_padded_batch(variant):
    model = make_variant(variant)
    texts = [make_ids(1, n, seed=n) for n in (1, 40, 77)]
    ids, mask = left_padded(texts)
    actual = generate(model, ids, attention_mask=mask)[:, ids.shape[1] :]
    for row, text in enumerate(texts):
        assert torch.equal(actual[row], greedy(model, text)[0, text.shape[1] :])


@pytest.mark.parametrize("piece", [1, 16, 50])
def test_left_padded_batch_in_pieces(piece):
    """transformers' own way of reading a prompt in pieces; one of a single token looks like a decoding step."""
    model = make_model()
    ids, mask = left_padded([make_ids(1, n, seed=n) for n in (1, 40, 77)])
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=piece), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_a_prompt_of_embeddings(options):
    """As soft prompts have it: they are read in place of tokens, and the new tokens alone come back."""
    model = make_model()
    ids, mask = left_padded([make_ids(1, n, seed=n) for n in (1, 40, 77)])
    if not options.get("use_cache", True):
        ids, mask = ids[2:], mask[2:]
    expected = generate(model, ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    embeddings = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    assert torch.equal(model.generate(**embeddings, do_sample=False, max_new_tokens=NEW, **options), expected)


@pytest.mark.parametrize("variant", ["lalte", "gdn-full", "lalte, one scorer"])
def test_beams_are_those_without_a_cache(variant):
    model = make_variant(variant)
    ids, mask = left_padded([make_ids(1, 30, seed=2), make_ids(1, 50, seed=3)])
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, "attention_mask": mask}
    expected = generate(model, ids, use_cache=False, **options)
    assert expected.shape == (4, 62)
    assert not torch.equal(expected, greedy(model, ids, 12).repeat_interleave(2, 0)), "beams must differ from greedy"
    assert torch.equal(generate(model, ids, **options), expected)


def test_sampling_with_return_sequences():
    model, ids = make_model(), make_ids(2, 30)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.9, "top_k": 9}
    texts = []
    for cached in (True, False):
        torch.manual_seed(3)
        texts.append(generate(model, ids, use_cache=cached, **options))
    assert texts[0].shape == (6, 30 + NEW)
    assert torch.equal(*texts)
    assert len({tuple(row.tolist()) for row in texts[0]}) == 6


@pytest.mark.parametrize("variant", ["lalte", "gdn", "gdn-full", "lalte, no positions"])
def test_second_turn(variant):
    """past_key_values go back in with all ids so far, any number of them new, and with the whole mask."""
    model = make_variant(variant)
    texts = [make_ids(1, n, seed=n) for n in (9, 60)]
    ids, mask = left_padded(texts)
    cache = model.new_cache(2)
    first = generate(model, ids, attention_mask=mask, past_key_values=cache)
    more = make_ids(2, 33, seed=4)
    ids2 = torch.cat([first, more], 1)
    mask2 = torch.cat([mask, torch.ones(2, NEW + 33, dtype=mask.dtype)], 1)
    second = generate(model, ids2, attention_mask=mask2, past_key_values=cache)[:, ids2.shape[1] :]
    for row, text in enumerate(texts):
        alone = torch.cat([greedy(model, text), more[row : row + 1]], 1)
        assert torch.equal(first[row, ids.shape[1] :], alone[0, text.shape[1] : -33])
        assert torch.equal(second[row], greedy(model, alone)[0, alone.shape[1] :])


def test_second_turn_of_mixed_lengths():
    """New turns padded at their left, in the middle of the rows."""
    model = make_model()
    texts, turns = [make_ids(1, n, seed=n) for n in (9, 60)], [make_ids(1, n, seed=n) for n in (21, 2)]
    ids, mask = left_padded(texts)
    cache = model.new_cache(2)
    with torch.no_grad():
        model(ids, mask, past_key_values=cache)
    more, more_mask = left_padded(turns)
    full, full_mask = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)
    second = generate(model, full, attention_mask=full_mask, past_key_values=cache)[:, full.shape[1] :]
    for row in range(2):
        alone = torch.cat([texts[row], turns[row]], 1)
        assert torch.equal(second[row], greedy(model, alone)[0, alone.shape[1] :])


def test_end_tokens_and_streamer():
    """Rows that ended are filled up; the streamer shows what the rows hold."""
    tokenizer, model = make_tokenizer(), make_model(vocab_size=300)
    ids = make_ids(1, 20)
    text = greedy(model, ids)[0, 20:]
    end = int(text[7])
    length = text.tolist().index(end) + 1
    out = generate(model, ids, eos_token_id=end, pad_token_id=2)
    assert torch.equal(out[0, 20:], text[:length])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    generate(model, ids, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(text)


def test_prompt_is_prefilled_in_chunks_with_one_logit_row():
    model, ids = make_model(), make_ids(1, 100)
    shapes = []
    model.lm_head.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    generate(model, ids, max_new_tokens=3)
    assert shapes == [(1, 1, VOCAB)] * 3


@pytest.mark.parametrize("piece", [None, 16])
def test_a_prompt_that_ends_in_padding_is_refused(piece):
    """Its next token would be drawn from what follows padding."""
    model, (ids, mask) = make_model(), left_padded([make_ids(1, n, seed=n) for n in (30, 22)])
    right = mask.flip(1)
    message = "attention_mask: row 1 ends in padding, .* pad at the left, as in tokenizer"
    with pytest.raises(ValueError, match=message):
        generate(model, ids, attention_mask=right, prefill_chunk_size=piece)
    with pytest.raises(ValueError, match=message):
        prefill(model, ids, model.new_cache(2), right)
    cache = model.new_cache(2)
    prefill(model, ids, cache, mask)
    pausing = torch.tensor([[1, 1], [0, 0]])  # a row without new tokens follows nothing
    prefill(model, ids[:, :2], cache, torch.cat([mask, pausing], 1))


def test_a_cache_without_anything_new():
    """The prompt would be read a second time."""
    model, ids = make_model(), make_ids(2, 20)
    cache = model.new_cache(2)
    prefill(model, ids, cache)
    for length in (20, 12):
        with pytest.raises(
            ValueError, match=rf"input_ids \(2, {length}\): past_key_values has read 20 columns of them"
        ):
            generate(model, ids[:, :length], past_key_values=cache)


def test_options_that_do_not_apply():
    model, ids = make_model(), make_ids(1, 10)
    with pytest.raises(ValueError, match="cache_implementation='static' doesn't apply"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="assisted"):
        generate(model, ids, assistant_model=make_model())


def test_budget_of_the_call():
    model, ids = make_model(), make_ids(1, 90)
    own = generate(model, ids)
    model.set_retention_budget(0)
    assert torch.equal(generate(model, ids), greedy(model, ids))
    assert not torch.equal(generate(model, ids), own)


# ---- saved models ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    model, ids = make_variant(variant), make_ids(2, 60)
    if model.penalty_control is not None:
        model.penalty_control.penalty_weight.uniform_()
        model.penalty_control.steps.fill_(70)
        model.penalty_control.counts.fill_(5)
    model.save_pretrained(tmp_path)
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(model)
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    if again.penalty_control is not None:
        assert (again.penalty_control.counts == 0).all()


def test_a_model_lies_on_one_device(tmp_path):
    make_model().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    spread = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "penalty_control": "cpu"}
    spread["model.layers"] = "disk"
    for device_map, places in ((spread, "cpu, disk"), (dict.fromkeys(spread, "disk"), "disk")):
        with pytest.raises(ValueError, match=rf"puts the model on {places}: it runs in the memory of one device;"):
            AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_stays_float32(dtype, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wide = {n for n, x in half.state_dict().items() if x.dtype == torch.float32}
    expected = {n for n in half.state_dict() if n.endswith(("A_log", "dt_bias", "penalty_weight", "density"))}
    assert wide == expected
    assert len(expected) == 2 * 2 + 2
    assert half.penalty_control.steps.dtype == torch.int64
    assert half.penalty_control.counts.dtype == torch.float32
    for name in expected:
        assert torch.equal(half.state_dict()[name], model.state_dict()[name])
    made = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    assert {n for n, x in made.state_dict().items() if x.dtype == torch.float32} == expected
    model.model.layers[0].mixer.A_log.grad = torch.ones_like(model.model.layers[0].mixer.A_log)
    cast = model.to(dtype)  # the other way to the same model
    assert all(torch.equal(x, half.state_dict()[name]) for name, x in cast.state_dict().items())
    assert cast.model.layers[0].mixer.A_log.grad.dtype == torch.float32
    ids = make_ids(2, 60)
    with torch.no_grad():
        expected = half(ids).logits.float()
        assert torch.isfinite(expected).all()
        assert_close(run_in_pieces(half, ids, [20, 1, 1, 38]).float(), expected, 5e-2)


def test_fingerprint_tells_models_apart():
    model = make_model()
    name = fingerprint(model)
    assert len(name) == 64
    assert fingerprint(make_model()) == name
    assert fingerprint(make_model(seed=1)) != name
    assert fingerprint(make_model(rope_theta=5e4)) != name
    assert fingerprint(make_model(prefill_chunk=9)) == name
    training = {"keep_all_steps": 7, "penalty_max": 0.5, "scorer_dropout": 0.3, "straight_through": "beyond_window"}
    assert fingerprint(make_model(**training)) == name
    assert fingerprint(make_model().bfloat16()) != name
    with torch.no_grad():
        model.model.layers[3].mixer.scorer.out_bias += 0.5
    assert fingerprint(model) != name


# ---- plain functions ----


@pytest.mark.parametrize("variant", ["lalte", "gdn", "transformer"])
def test_stream_of_tokens(variant):
    model, ids = make_variant(variant), make_ids(2, 70)
    tokens = torch.cat(list(stream_tokens(model, ids, max_new_tokens=NEW)), 1)
    assert torch.equal(torch.cat([ids, tokens], 1), greedy(model, ids))


def test_stream_with_padding():
    model = make_model()
    texts = [make_ids(1, n, seed=n) for n in (4, 55)]
    ids, mask = left_padded(texts)
    cache = model.new_cache(2)
    tokens = torch.cat(list(decode(model, prefill(model, ids, cache, mask), cache, NEW)), 1)
    for row, text in enumerate(texts):
        assert torch.equal(tokens[row], greedy(model, text)[0, text.shape[1] :])


def test_a_stopped_stream_goes_on():
    """A yielded token isn't read yet; reading it first continues exactly. Nothing is read after the last one."""
    model, ids = make_model(), make_ids(1, 40)
    expected = greedy(model, ids, 20)[0, 40:].tolist()
    cache = model.new_cache()
    first = [int(token) for token in stream_tokens(model, ids, cache, 8)]
    assert cache.columns == 40 + 7
    second = []
    for token in stream_tokens(model, torch.tensor([first[-1:]]), cache):
        second.append(int(token))
        if len(second) == 5:
            break
    assert cache.columns == 40 + 8 + 4
    third = [int(token) for token in stream_tokens(model, torch.tensor([second[-1:]]), cache, 7)]
    assert first + second + third == expected
    assert list(stream_tokens(model, ids, max_new_tokens=0)) == []


def test_decode_one_token():
    model, ids = make_model(), make_ids(2, 50)
    cache = model.new_cache(2)
    prefill(model, ids[:, :49], cache)
    with torch.no_grad():
        assert_close(decode_one_token(model, ids[:, 49:], cache), model(ids).logits[:, -1])


def test_stream_allocates_nothing():
    model = make_model()
    cache = model.new_cache()
    places = {name: x.data_ptr() for name, x in cache.tensors().items()}
    for _ in stream_tokens(model, make_ids(1, 120), cache, 60):
        assert {name: x.data_ptr() for name, x in cache.tensors().items()} == places


# ---- sampling ----


def test_greedy_sample():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits), logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7), Sampling(1.3, top_k=3), Sampling(1.0, top_p=0.7), Sampling(0.9, 4, 0.6)],
)
def test_sampled_frequencies(sampling):
    """Against the distribution that the definition gives, with 40000 draws."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.4, -1.0, -3.0])
    p = (logits / sampling.temperature).softmax(0)
    if sampling.top_k:
        p[sampling.top_k :] = 0
        p /= p.sum()
    if sampling.top_p:
        keep = next(n for n in range(1, 7) if p[:n].sum() >= sampling.top_p)
        p[keep:] = 0
        p /= p.sum()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    draws = 40_000
    tokens = sample(logits[order].expand(draws, -1), sampling, torch.Generator().manual_seed(1))
    frequencies = torch.bincount(tokens[:, 0], minlength=6) / draws
    assert (frequencies[p[order] == 0] == 0).all()
    assert (frequencies - p[order]).abs().max() < 4 * 0.5 / draws**0.5


def test_sampling_repeats_with_its_seed():
    model, ids = make_model(), make_ids(1, 20)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return [int(t) for t in stream_tokens(model, ids, None, NEW, Sampling(1.0), generator)]

    assert run(1) == run(1) != run(2)


def test_top_p_keeps_the_likeliest():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    assert all(int(sample(logits, Sampling(1.0, top_p=1e-6))) == 1 for _ in range(20))
    assert all(int(sample(logits, Sampling(1.0, top_k=1))) == 1 for _ in range(20))
    assert int(sample(logits, Sampling(1.0, top_k=50))) in (0, 1, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 5}, "top_k=5 has no use where temperature=0 takes the likeliest token: give a temperature"),
        ({"top_p": 0.5}, r"top_p=0\.5 has no use where temperature=0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
    ],
)
def test_sampling_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


# ---- text ----


@pytest.mark.parametrize(
    "text", ["the fox", "añb — “ж”", "日本語のテキスト", "👩‍👩‍👧 and 🦊🦊", " \n\t  two  spaces ", "e\u0301 x"]
)
def test_text_as_it_arises(text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text).input_ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    # whatever is complete has been shown at once
    seen = ""
    for index, piece in enumerate(pieces):
        seen += piece
        whole = tokenizer.decode(ids[: index + 1])
        assert seen == whole or whole.endswith("\N{REPLACEMENT CHARACTER}")


def test_text_of_special_tokens_and_broken_characters():
    """Special tokens are silent; bytes that are no text are shown late, and only a few tokens are remembered."""
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in (0, 1, 2) * 20] == [""] * 60
    assert len(stream.waiting) < stream.PATIENCE
    ids = tokenizer("a日b").input_ids
    assert len(ids) == 5
    shown = stream.push(ids[0]) + stream.push(ids[1])
    assert shown == "a"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    broken = TextStream(tokenizer)
    text = ""
    for token in [ids[1]] * 200:
        text += broken.push(token)
        assert len(broken.waiting) < broken.PATIENCE
    assert len(text) > 150
    text = "".join(broken.push(token) for token in tokenizer("the end").input_ids)
    assert text.endswith("the end")


def test_generation_config_of_a_saved_model(tmp_path):
    model = make_model()
    model.generation_config = GenerationConfig(max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generate(make_ids(1, 9)).shape == (1, 13)
