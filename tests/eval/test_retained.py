"""`lalte eval retained`: which tokens count as needles, and the counts against the rule's oracle.

Shapes: T tokens, H KV heads.
"""

import argparse
import json

import pytest
import torch

from eval import retained_cli
from eval.inspection import attention_layers, inspect_text, split_text
from eval.needles import NEEDLE, make_samples
from eval.retained import KINDS, count_kept, run_retained, table, token_kinds
from lte.visibility import visible
from tests.tiny_models import make_model, make_tokenizer

SENTENCE = NEEDLE.format(kind="number", key="brave-ice cream", value="1234567")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model("lalte", vocab_size=320)


def test_tokens_of_sentences_and_values():
    texts = ["A special magic number", " is hidden.", f"\n{SENTENCE[:30]}", SENTENCE[30:-9], SENTENCE[-9:-4]]
    texts += [SENTENCE[-4:-1], ".", " Then", "", " more"]
    assert [KINDS[kind] for kind in token_kinds(texts)] == (
        ["other"] * 2 + ["needle"] * 2 + ["value"] * 2 + ["needle"] + ["other"] * 3
    )


@pytest.mark.parametrize("task", ["single_1", "multikey_2"])
def test_values_are_those_of_the_prompt(task, tokenizer):
    (sample,) = make_samples(task, tokenizer, 1700, 1, 3)
    tokens = split_text(tokenizer, sample.text)
    kinds = token_kinds(tokens.texts)
    value = "".join(text for text, kind in zip(tokens.texts, kinds, strict=True) if KINDS[kind] == "value")
    assert sample.outputs[0] in value
    others = "".join(text for text, kind in zip(tokens.texts, kinds, strict=True) if KINDS[kind] == "other")
    assert "One of" not in others
    assert "is: " not in others


@pytest.mark.parametrize("budget", [None, 9, 0])
def test_counts_agree_with_the_rule(model, tokenizer, budget):
    text = "the lazy dog " * 9 + SENTENCE + " jumps over the quick brown fox" * 3
    found = inspect_text(model, tokenizer, text, budget=budget, maps=False, progress=False)
    kinds_T = token_kinds(found.tokens.texts)
    counts = count_kept(found, kinds_T)
    length = len(kinds_T)
    config = model.config
    rule = {"window": config.window, "sinks": config.sinks, "budget": config.budget if budget is None else budget}
    assert sorted(counts) == sorted(attention_layers(model))
    for layer in found.layers:
        count = counts[layer.layer]
        mask = visible(layer.logits_TH[None], batch=1, length=length, heads=2, **rule)[0, :, -1]
        eligible = torch.arange(length).ge(config.sinks) & torch.arange(length).lt(length - config.window)
        for kind in range(len(KINDS)):
            chosen = eligible & (kinds_T == kind)
            assert count[0, kind].tolist() == mask[:, chosen].sum(-1).tolist()
            assert count[1, kind].tolist() == [int(chosen.sum())] * 2
    kept = sum(int(count[0].sum()) for count in counts.values())
    assert (kept > 0) == (rule["budget"] > 0)


def test_a_run_writes_its_folder_once(model, tokenizer, tmp_path):
    run = (["single_1"], [1700], 2, 0, tmp_path)
    content = run_retained(model, tokenizer, *run, progress=False)
    assert content == json.loads((tmp_path / "result.json").read_text())
    assert content["rows"] == []
    layer, *heads = content["shares"][:3]
    assert [entry["head"] for entry in (layer, *heads)] == [None, 0, 1]
    for kind in KINDS:
        assert layer[kind]["tokens"] == sum(head[kind]["tokens"] for head in heads)
        assert layer[kind]["kept"] == sum(head[kind]["kept"] for head in heads)
        assert layer[kind]["low"] <= layer[kind]["share"] <= layer[kind]["high"]
    assert table(content["shares"]).count("niah_single_1 L1700") == len(attention_layers(model))
    assert run_retained(model, tokenizer, *run, progress=False) == content
    with pytest.raises(ValueError, match="holds another run: budget is None there and 1 here"):
        run_retained(model, tokenizer, *run, budget=1, progress=False)


@pytest.mark.parametrize(
    ("lengths", "budget", "message"),
    [
        ([100], None, "length: 100 tokens are too few"),
        ([], None, "lengths: \\[\\]"),
        ([1700, 1700], None, "lengths: \\[1700, 1700\\] names one twice"),
        ([1700], -1, "budget: -1 is negative"),
    ],
)
def test_a_refused_run_leaves_the_folder_free(model, tokenizer, tmp_path, lengths, budget, message):
    with pytest.raises(ValueError, match=message):
        run_retained(model, tokenizer, ["single_1"], lengths, 1, 0, tmp_path, budget=budget, progress=False)
    assert run_retained(model, tokenizer, ["single_1"], [1700], 1, 0, tmp_path, progress=False)["shares"]


def test_a_model_needs_a_scorer(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no retention scorer"):
        run_retained(make_model("gdn"), tokenizer, ["single_1"], [1700], 1, 0, tmp_path)


def test_the_command(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    parser = argparse.ArgumentParser()
    retained_cli.add_arguments(parser)
    line = [
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "out"),
        "--tasks",
        "single_1",
        "--device",
        "cpu",
    ]
    line += ["--lengths", "1700", "--samples", "1", "--budget", "2"]
    assert retained_cli.run_from_arguments(parser.parse_args(line)) == 0
    assert "niah_single_1 L1700" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "result.json").read_text())["config"]["budget"] == 2
    with pytest.raises(ValueError, match="retention: 'h2o' has no scorer"):
        retained_cli.run_from_arguments(parser.parse_args([*line, "--retention", "h2o"]))
