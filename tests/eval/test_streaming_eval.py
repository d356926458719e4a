"""Endless text: tokens, perplexity against one forward pass, resuming, constant memory; and StreamEval."""

import argparse
import gzip
import json
import lzma
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tokenizers import Tokenizer, decoders, normalizers, processors, trainers
from tokenizers import models as token_models
from transformers import MistralConfig, MistralForCausalLM

from eval import perplexity_cli, streameval_cli
from eval.intervals import Moments
from eval.perplexity import Curve, bucket_ends, run_perplexity
from eval.streameval import pieces, questions, run_streameval
from eval.streaming import (
    cache_bytes,
    chunks,
    load_cache,
    new_cache,
    read_chunk,
    save_cache,
    start_tokens,
    text_pieces,
    text_tokens,
)
from eval.streams import Piece, encode
from models.streaming import stream
from tests.tiny_models import make_model
from tests.tiny_texts import make_llama, make_tokenizer

LALTE = {"vocab_size": 400, "max_position_embeddings": 400}
LINES = [f"Line {n} of the book says that {n * n} is the square of {n}." for n in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(LINES[:100]) + "\n\x1e\n" + "\n".join(LINES[100:150]))
    return path


def all_tokens(path, tokenizer):
    return [token for some in text_tokens([path], tokenizer) for token in some]


# ---- text ----


def test_files_are_one_text(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.streaming.PIECE_CHARACTERS", 37)
    (tmp_path / "a.txt").write_text("one\ntwo two two two two two two two two two two two\nthree", encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\ufeffvier \N{LATIN SMALL LETTER SHARP S}\n\x1e\nfünf")  # a byte order mark is no text
    with lzma.open(tmp_path / "c.txt.xz", "wt") as file:
        file.write("six")
    found = list(text_pieces([tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.txt.xz"]))
    assert "".join(found) == "one\ntwo" + " two" * 11 + "\nthree\nvier \u00df\n\nfünf\nsix\n"
    assert all(piece.endswith("\n") for piece in found)
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    whole = gzip.compress(b"text " * 99, mtime=0)
    (tmp_path / "broken.gz").write_bytes(whole[:10] + b"\x06" + whole[11:])  # an unknown kind of block
    for name in ("bad.txt", "bad.gz", "broken.gz", "missing.txt"):
        with pytest.raises(ValueError, match=f"text: .*{name} can't be read"):
            list(text_pieces([tmp_path / name]))


def test_a_begin_token_that_also_ends_texts_is_one():
    tokenizer = make_tokenizer()
    assert start_tokens(tokenizer) == []
    assert start_tokens(make_tokenizer(bos=True)) == [2]
    both = processors.TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", 0)])
    tokenizer.backend_tokenizer.post_processor = both
    assert start_tokens(tokenizer) == [0]


def test_models_that_can_not_be_read_in_pieces_are_refused(tokenizer, book, tmp_path):
    """Their memory isn't where it is looked for: perplexity would be that of a model without one."""
    sizes = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    forgetful = tf.RwkvForCausalLM(tf.RwkvConfig(attention_hidden_size=16, intermediate_size=32, **sizes)).eval()
    other = tf.MambaForCausalLM(tf.MambaConfig(state_size=4, **sizes)).eval()
    for model in (forgetful, other):
        for parameter in model.parameters():
            parameter.data.normal_(std=0.5)
        with pytest.raises(ValueError, match=r"^model: (Rwkv|Mamba)ForCausalLM .* use another"):
            run_perplexity(model, tokenizer, [book], tmp_path / "out", tokens=64, progress=False)
    assert not (tmp_path / "out").exists()
    new_cache(make_llama(), "full", 1)


def test_tokens_come_in_chunks(book):
    tokens = all_tokens(book, make_tokenizer(bos=True))
    assert tokens[0] == 2
    assert tokens.count(2) == 1
    for skip in (0, 1, 33, len(tokens) - 1, len(tokens), len(tokens) + 5):
        parts = list(chunks(iter([tokens[:7], [], tokens[7:100], tokens[100:]]), 32, skip=skip))
        assert [token for part in parts for token in part] == tokens[skip:]
        assert all(len(part) == 32 for part in parts[:-1])


# ---- perplexity ----


def test_buckets_grow_with_the_position():
    assert bucket_ends(1000) == [64, 96, 128, 192, 256, 384, 512, 768, 1000]
    assert bucket_ends(64) == [64]
    assert bucket_ends(10) == [10]


def test_moments_are_those_of_all_numbers():
    values = torch.randn(517, generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments()
    for part in values.split(100):
        moments.add(part)
    assert moments.mean == pytest.approx(float(values.double().mean()), rel=1e-12)
    assert moments.error == pytest.approx(float(values.double().std()) / math.sqrt(517), rel=1e-9)
    few = Moments()
    assert (math.isnan(few.mean), few.error) == (True, math.inf)
    few.add(torch.tensor([2.0]))
    assert (few.mean, few.error) == (2.0, math.inf)
    few.add(torch.tensor([4.0]))
    assert (few.mean, few.error) == (3.0, 1.0)


def test_the_interval_covers_the_truth():
    """Losses of neighbours that go together: about 95 of 100 intervals hold the true mean."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        shared = torch.randn(64, generator=generator).repeat_interleave(32) * 0.3
        curve = Curve([2048])
        curve.add(0, 2.0 + shared + torch.randn(2048, generator=generator) * 0.1, 1.0, 0)
        (point,) = curve.points()
        held += point["low"] <= math.exp(2.0) <= point["high"]
    assert 180 <= held <= 199


def make_mistral():
    """Random, and each of its layers reads 50 keys."""
    torch.manual_seed(0)
    fields = {name: value for name, value in make_llama().config.to_dict().items() if name != "model_type"}
    return MistralForCausalLM(MistralConfig(**fields | {"sliding_window": 50})).eval()


CASES = {
    "lalte": (lambda: make_model("lalte", **LALTE), {}),
    "lalte, growing cache": (lambda: make_model("gdn-full", **LALTE), {}),
    "llama, full cache": (make_llama, {"cache": "full"}),
    "mistral, full cache of a sliding window": (make_mistral, {"cache": "full"}),
    "llama, streaming cache": (make_llama, {"cache": "stream", "sinks": 2, "window": 61}),
    "llama, retaining cache": (
        make_llama,
        {"cache": "stream", "sinks": 2, "window": 50, "budget": 11, "retention": "recency"},  # the same tokens
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_perplexity_is_that_of_one_pass_and_survives_a_stop(name, book, tokenizer, tmp_path):
    build, how = CASES[name]
    model = build()
    ids = torch.tensor([all_tokens(book, tokenizer)[:1000]])
    with torch.no_grad():
        cache = stream(model, 2, 61) if how.get("cache") == "stream" else None
        logits = model(ids, past_key_values=cache).logits[0]
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").double()  # of positions 1, 2, …
    run = lambda out, **more: run_perplexity(
        model, tokenizer, [book], out, tokens=1000, chunk=96, progress=False, **how, **more
    )
    content = run(tmp_path / "whole")
    ends = bucket_ends(1000)
    assert [point["to"] for point in content["curve"]] == ends
    for start, end, point in zip([1, *ends], ends, content["curve"], strict=False):
        expected = math.exp(losses[start - 1 : end - 1].mean())
        assert point["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert point["tokens"] == end - start
        assert point["low"] < expected < point["high"]
    assert content["ended_by"] == "tokens"

    def stop(position):
        if position == 96 * 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", save_every=96 * 2, on_chunk=stop)
    assert [path.name for path in (tmp_path / "stopped/state").iterdir()] == ["at-384"]
    positions = []
    again = run(tmp_path / "stopped", on_chunk=positions.append)
    assert positions[0] == 96 * 5, "it continues after the saved 384 tokens"
    strip = lambda curve: [{key: value for key, value in point.items() if key != "ms"} for point in curve]
    for got, expected in zip(strip(again["curve"]), strip(content["curve"]), strict=True):
        assert got == pytest.approx(expected, rel=1e-6)
    assert not (tmp_path / "stopped/state").exists()
    finished = run(tmp_path / "stopped", on_chunk=lambda position: pytest.fail("nothing is left to read"))
    assert finished == again
    with pytest.raises(ValueError, match="holds another run: chunk"):
        run_perplexity(model, tokenizer, [book], tmp_path / "stopped", tokens=1000, chunk=64, progress=False, **how)


def test_ours_are_read_under_another_rule(book, tokenizer, tmp_path):
    model = make_model("lalte", **LALTE)
    rule, seen = lambda: (model.retention, model.retention_budget), set()
    own = rule()
    how = {"tokens": 300, "chunk": 64, "progress": False, "on_chunk": lambda _: seen.add(rule())}
    content = run_perplexity(model, tokenizer, [book], tmp_path / "h2o", retention="h2o", budget=3, **how)
    assert (seen, rule()) == ({("h2o", 3)}, own)
    assert (content["config"]["retention"], content["config"]["budget"]) == ("h2o", 3)
    model.use_retention("h2o", 3)
    changed = run_perplexity(model, tokenizer, [book], tmp_path / "changed", **how)
    figures = lambda content: [row["median"] for row in content["rows"] if row["metric"] in ("perplexity", "bytes")]
    assert figures(content) == pytest.approx(figures(changed), rel=1e-6)
    model = make_model("lalte", **LALTE)
    assert figures(run_perplexity(model, tokenizer, [book], tmp_path / "own", **how)) != figures(content)
    lines = {"lines": 8, "every": 4, "streams": 1, "progress": False}
    nbytes = lambda out, **more: run_streameval(model, tokenizer, [2], tmp_path / out, **lines, **more)["rows"][-1]
    less, more = nbytes("a", retention="tova", budget=2), nbytes("b", retention="tova", budget=5)
    assert less["metric"] == more["metric"] == "bytes"
    assert 0 < less["median"] < more["median"]


def test_memory_is_constant_for_ours_and_grows_for_a_full_cache(book, tokenizer, tmp_path):
    curve_of = lambda model, **how: run_perplexity(
        model, tokenizer, [book], tmp_path / str(len(list(tmp_path.iterdir()))), tokens=900, progress=False, **how
    )
    ours = {point["bytes"] for point in curve_of(make_model("lalte", **LALTE))["curve"]}
    assert len(ours) == 1
    llama = make_llama()
    full = curve_of(llama, chunk=32)
    grown = [point["bytes"] for point in full["curve"]]
    assert grown == sorted(grown)
    assert grown[-1] == 900 * 2 * 2 * 2 * 6 * 4  # tokens, layers, keys and values, heads, channels, bytes
    rows = {row["case"]: row for row in full["rows"] if row["metric"] == "bytes"}
    assert rows["cache T900"]["median"] == grown[-1]
    streamed = {point["bytes"] for point in curve_of(llama, cache="stream", window=50)["curve"]}
    assert len(streamed) == 1


def test_a_run_ends_where_text_or_model_end(book, tokenizer, tmp_path):
    run = lambda out, model, **how: run_perplexity(model, tokenizer, [book], tmp_path / out, progress=False, **how)
    short = make_llama(positions=128)
    content = run("a", short)
    assert (content["ended_by"], content["tokens_read"]) == ("limit", 128)
    content = run("b", short, cache="stream", window=100, tokens=300)
    assert (content["ended_by"], content["tokens_read"]) == ("tokens", 300)
    content = run("c", make_model("lalte", **LALTE), tokens=10**6)
    assert (content["ended_by"], content["tokens_read"]) == ("end of the text", len(all_tokens(book, tokenizer)))


def test_one_token_has_no_interval_and_a_finished_run_is_shown_again(book, tokenizer, tmp_path, capsys):
    shown = []
    for _ in range(2):
        content = run_perplexity(make_llama(), tokenizer, [book], tmp_path, tokens=65)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "perplexity up to a position" in shown[0]
    first, last = content["curve"]
    assert (last["tokens"], last["low"], last["high"]) == (1, None, None)
    assert first["low"] < first["perplexity"] < first["high"]


def test_a_text_that_can_not_be_read_leaves_the_folder_to_another(book, tokenizer, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    run = lambda *texts: run_perplexity(make_llama(), tokenizer, texts, tmp_path / "out", tokens=64, progress=False)
    with pytest.raises(ValueError, match=r"text: .*bad\.txt can't be read"):
        run(book, tmp_path / "bad.txt")
    assert run(book)["tokens_read"] == 64


def test_perplexity_refuses_what_it_cannot_do(book, tokenizer, tmp_path):
    ours, llama = make_model("lalte", **LALTE), make_llama()
    (tmp_path / "empty.txt").write_text("")
    for model, texts, how, words in (
        (ours, [book], {"chunk": 50}, "chunk: 50 is not a multiple of 32; take 64"),
        (ours, [book], {"cache": "full"}, "has a cache of its own"),
        (llama, [book], {"cache": "rolling"}, "cache: 'rolling' is unknown"),
        (
            ours,
            [book],
            {"window": 50},
            "window: 50 is of cache stream only, this one has sinks and a window of its own",
        ),
        (
            llama,
            [book],
            {"sinks": 2, "cache": "full"},
            "sinks: 2 is of cache stream only, this one keeps every token",
        ),
        (llama, [book], {"tokens": 0}, "tokens: 0 is not"),
        (llama, [book], {"tokens": 1}, "tokens: 1 leaves none to predict; use 2 or more"),
        (llama, [book], {"limit": 1}, "limit: 1 leaves none to predict; use 2 or more"),
        (llama, [], {}, "text: no file given"),
        (llama, [tmp_path / "nothing.txt"], {}, "nothing.txt is not a file"),
        (llama, [tmp_path / "empty.txt"], {}, "fewer than two tokens"),
        (llama, [book], {"budget": 3}, "retains no tokens"),
        (llama, [book], {"retention": "h2o"}, "retains no tokens"),
        (ours, [book], {"cache": "stream", "retention": "h2o", "budget": 3}, "has a cache of its own"),
    ):
        with pytest.raises(ValueError, match=words):
            run_perplexity(model, tokenizer, texts, tmp_path / words[:9], progress=False, **how)
    with torch.no_grad():
        llama.lm_head.weight[0] = math.nan
    with pytest.raises(RuntimeError, match="not a finite number"):
        run_perplexity(llama, tokenizer, [book], tmp_path / "nan", progress=False)


@pytest.mark.parametrize("name", CASES)
def test_caches_are_saved_and_loaded(name, tmp_path):
    build, how = CASES[name]
    model = build()
    ids = torch.randint(400, (1, 150), generator=torch.Generator().manual_seed(1))
    how = {"cache": "auto"} | how
    make = lambda: new_cache(
        model, how["cache"], 1, *(how.get(x) for x in ("sinks", "window", "budget", "retention"))
    )
    cache = make()
    read_chunk(model, ids[:, :100], cache)
    save_cache(cache, tmp_path / "cache.safetensors")
    expected = read_chunk(model, ids[:, 100:], cache)
    other = make()
    load_cache(model, other, tmp_path / "cache.safetensors", 100)
    torch.testing.assert_close(read_chunk(model, ids[:, 100:], other), expected, rtol=0, atol=0)
    assert cache_bytes(other) == cache_bytes(cache) > 0


# ---- StreamEval ----


@pytest.mark.parametrize("names", ["numbers", "words"])
@pytest.mark.parametrize(("distance", "every"), [(1, 1), (3, 10), (20, 10), (25, 7)])
def test_streams_ask_for_earlier_lines(names, distance, every):
    lines, asked = {}, []
    order = []
    for piece in pieces(5, distance, every, names):
        if piece.line is not None:
            assert piece.text[piece.start :] == f"{piece.answer}\n"
            name = piece.text.partition("of line ")[2].partition("?")[0]
            assert order[-1 - distance] == name, "distance lines before the last one"
            assert lines[name] == piece.answer
            assert len(order) % every == 0
            asked.append(piece.line)
        elif piece.text.startswith("line "):
            name = piece.text.partition(": ")[0].removeprefix("line ")
            assert name not in order[-distance - every :]
            order.append(name)
            lines[name] = piece.text.partition("<")[2].strip()
        if len(order) == 60 and len(asked) == questions(60, distance, every):
            break
    assert len(asked) == questions(60, distance, every)
    assert len(set(asked)) == len(asked)
    first = [piece for _, piece in zip(range(40), pieces(5, distance, every, names), strict=False)]
    second = [piece for _, piece in zip(range(40), pieces(6, distance, every, names), strict=False)]
    assert first != second


def test_answers_are_found_among_the_tokens(tokenizer):
    piece = next(piece for piece in pieces(0, 2, 3, "numbers") if piece.line is not None)
    ids, inside = encode(piece, tokenizer)
    assert tokenizer.decode(ids) == piece.text
    said = tokenizer.decode([token for token, own in zip(ids, inside, strict=True) if own])
    assert piece.answer in said
    assert len(said) <= len(piece.answer) + 2


def test_lines_have_no_space_in_front():
    """Of a tokenizer that begins every text with one, as SentencePiece does."""
    inner = Tokenizer(token_models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Replace("▁", " ")
    source = [piece for piece, _ in zip(pieces(5, 2, 3, "numbers"), range(40), strict=False)]
    text = "".join(piece.text for piece in source)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    inner.train_from_iterator([text], trainer)
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    coded = [encode(piece, tokenizer, first=not n) for n, piece in enumerate(source)]
    assert tokenizer.decode([token for ids, _ in coded for token in ids]) == f" {text}"
    asked = [
        (piece, ids, inside) for piece, (ids, inside) in zip(source, coded, strict=True) if piece.line is not None
    ]
    assert len(asked) > 5
    for piece, ids, inside in asked:
        assert piece.answer in tokenizer.decode([token for token, own in zip(ids, inside, strict=True) if own])
    alone = Piece("\n next", 1, "next", 2)  # whose first token may be one with the line's end before it
    ids, inside = encode(alone, make_tokenizer(), first=False)
    assert make_tokenizer().decode(ids) == alone.text
    assert any(inside)


class Rememberer(torch.nn.Module):
    """Knows the last `memory` tokens: it continues as the longest repeated end of them did before.

    Its cache is a list of tokens for each row.
    """

    def __init__(self, memory, failing_rows=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = argparse.Namespace(model_type="rememberer", to_dict=dict)
        self.memory, self.failing_rows, self.calls = memory, failing_rows, []

    def new_cache(self, batch):
        return argparse.Namespace(rows=[[] for _ in range(batch)], tensors=lambda: {"x": torch.zeros(batch, 8)})

    def forward(self, input_ids, past_key_values, use_cache):
        self.calls.append(len(input_ids))
        if self.failing_rows and len(input_ids) >= self.failing_rows:
            raise torch.cuda.OutOfMemoryError("out of memory")
        logits = torch.zeros(*input_ids.shape, 400)
        for b, (row, new) in enumerate(zip(past_key_values.rows, input_ids.tolist(), strict=True)):
            for t, token in enumerate(new):
                row.append(token)
                logits[b, t, self.guess(row[-self.memory :])] = 1
        return argparse.Namespace(logits=logits)

    @staticmethod
    def guess(row):
        best, length = 0, 0
        for end in range(len(row) - 1, 0, -1):
            same = 0
            while same < end and row[end - 1 - same] == row[-1 - same]:
                same += 1
            if same > length:
                best, length = row[end], same
            if length > 30:
                break
        return best


def test_accuracy_falls_with_what_the_memory_holds(tokenizer, tmp_path):
    model = Rememberer(250)
    arguments = {"lines": 30, "every": 10, "streams": 3, "progress": False, "batch_size": 2, "chunk": 57}
    content = run_streameval(model, tokenizer, [2, 15], tmp_path / "out", **arguments)
    rows = {row["case"]: row for row in content["rows"]}
    assert rows["streameval D2"]["median"] == 1.0
    assert rows["streameval D2"]["n"] == 9
    assert rows["streameval D15"]["median"] == 0.0
    assert rows["streameval D2 tokens"]["median"] == 1.0 > rows["streameval D15 tokens"]["median"]
    assert rows["streameval D2 tokens"]["n"] > 9
    assert rows["cache D2"]["median"] == 32
    records = [json.loads(line) for line in (tmp_path / "out/samples/distance-2.jsonl").read_text().splitlines()]
    assert {record["stream"] for record in records} == {0, 1, 2}
    assert all(record["expected"] in record["prediction"] for record in records)
    calls = len(model.calls)
    assert run_streameval(model, tokenizer, [2, 15], tmp_path / "out", **arguments)["rows"] == content["rows"]
    assert len(model.calls) == calls, "nothing is left to read"
    whole = run_streameval(Rememberer(10**6), tokenizer, [15], tmp_path / "whole", **arguments)
    assert whole["rows"][0]["median"] == 1.0


def test_streams_that_fail_are_tried_alone_and_again(tokenizer, tmp_path):
    arguments = {"lines": 12, "every": 6, "streams": 3, "progress": False, "batch_size": 2, "chunk": 64}
    model = Rememberer(10**6, failing_rows=2)
    content = run_streameval(model, tokenizer, [2], tmp_path / "a", **arguments)
    assert content["rows"][0]["n"] == 6
    assert set(model.calls) == {1, 2}
    broken = Rememberer(10**6, failing_rows=1)
    with pytest.raises(RuntimeError, match="no stream could be read: OutOfMemoryError"):
        run_streameval(broken, tokenizer, [2], tmp_path / "b", **arguments)
    healed = run_streameval(Rememberer(10**6), tokenizer, [2], tmp_path / "b", **arguments)
    assert healed["cells"] == [{"case": "streameval D2", "samples": 6, "errors": 0}]


def test_logits_that_are_not_finite_are_no_wrong_answers(tokenizer, tmp_path):
    how = {"lines": 12, "every": 6, "streams": 1, "progress": False}
    model = make_llama()
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the logits of LlamaForCausalLM are not finite; its weights are damaged"):
        run_streameval(model, tokenizer, [2], tmp_path / "a", **how)
    late = Rememberer(10**6)
    late.forward = lambda input_ids, past_key_values, use_cache: argparse.Namespace(
        logits=torch.full((*input_ids.shape, 400), math.nan)
    )
    with pytest.raises(RuntimeError, match="no stream could be read: ValueError: the model's logits are not finite"):
        run_streameval(late, tokenizer, [2], tmp_path / "b", **how)


def test_streams_beyond_a_model_s_positions_are_told(tokenizer, tmp_path):
    how = {"lines": 30, "every": 5, "streams": 1, "progress": False}
    (warning,) = run_streameval(make_llama(positions=200), tokenizer, [2], tmp_path / "a", **how)["warnings"]
    assert warning.endswith("the model has 200 positions")
    for out, more in (("b", {"cache": "stream", "window": 50}), ("c", {})):
        model = make_llama(positions=200 if more else 4096)
        assert run_streameval(model, tokenizer, [2], tmp_path / out, **how, **more)["warnings"] == []


def test_streams_begin_as_the_tokenizer_begins_texts(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    model, read = Rememberer(10**6), []
    forward = model.forward
    model.forward = lambda input_ids, **more: (read.append(input_ids[0].tolist()), forward(input_ids, **more))[1]
    run_streameval(model, tokenizer, [2], tmp_path, lines=12, every=6, streams=1, progress=False)
    assert read[0][0] == 2
    assert sum(ids.count(2) for ids in read) == 1


@pytest.mark.parametrize("name", CASES)
def test_real_models_are_read_the_same_in_any_batch_and_chunk(name, tokenizer, tmp_path):
    build, how = CASES[name]
    model = build()
    arguments = {"lines": 14, "every": 4, "streams": 3, "progress": False, **how}
    one = run_streameval(model, tokenizer, [2], tmp_path / "a", batch_size=3, chunk=200, **arguments)
    run_streameval(model, tokenizer, [2], tmp_path / "b", batch_size=1, chunk=61, **arguments)
    read = lambda out: {
        record["index"]: (record["prediction"], record["position"], record["expected"])
        for record in map(json.loads, (tmp_path / out / "samples/distance-2.jsonl").read_text().splitlines())
    }
    assert read("a") == read("b")
    assert len({prediction for prediction, _, _ in read("a").values()}) > 1
    assert one["rows"][0]["n"] == 9


def test_streameval_refuses_what_it_cannot_do(tokenizer, tmp_path):
    model = make_llama()
    for distances, how, words in (
        ([], {}, "distances"),
        ([2, 2], {}, "distances"),
        ([0], {}, "distances: 0"),
        ([500], {"lines": 500}, "lines: 500 ask nothing at distance 500; give 510"),
        ([2], {"names": "letters"}, "names: 'letters'"),
        ([2], {"streams": 0}, "streams: 0"),
        ([2], {"retention": "h2o"}, "retention: LlamaForCausalLM retains tokens with cache stream only"),
        ([2], {"cache": "full", "budget": 3}, "budget: LlamaForCausalLM retains tokens with cache stream only"),
    ):
        with pytest.raises(ValueError, match=words):
            run_streameval(model, tokenizer, distances, tmp_path / "out", progress=False, **how)
    assert not (tmp_path / "out").exists()


def test_the_commands(tmp_path, tokenizer, book):
    model = make_model("lalte", **LALTE)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    parser = argparse.ArgumentParser()
    perplexity_cli.add_arguments(parser)
    line = ["--model", str(tmp_path / "model"), "--text", str(book), "--tokens", "400", "--out", str(tmp_path / "p")]
    line += ["--config", "configs/eval/perplexity.yaml", "--chunk", "64"]
    assert perplexity_cli.run_from_arguments(parser.parse_args(line)) == 0
    assert json.loads((tmp_path / "p/result.json").read_text())["tokens_read"] == 400
    assert "chunk: 64" in (tmp_path / "p/config.yaml").read_text()
    with pytest.raises(ValueError, match="text: missing"):
        perplexity_cli.run_from_arguments(parser.parse_args(["--model", "m", "--out", "o"]))
    parser = argparse.ArgumentParser()
    streameval_cli.add_arguments(parser)
    line = ["--model", str(tmp_path / "model"), "--distances", "2,5", "--lines", "20", "--streams", "2"]
    line += ["--out", str(tmp_path / "s"), "--config", "configs/eval/streameval.yaml", "--budget", "0"]
    assert streameval_cli.run_from_arguments(parser.parse_args(line)) == 0
    result = json.loads((tmp_path / "s/result.json").read_text())
    assert [row["case"] for row in result["rows"] if row["metric"] == "accuracy"] == [
        "streameval D2",
        "streameval D2 tokens",
        "streameval D5",
        "streameval D5 tokens",
    ]
