"""Models with and without a sink of their own, streamed."""

import argparse

import pytest
import torch
import torch.nn.functional as F

from benchmarks import sinks
from benchmarks.harness import path_identity
from eval.results import read_json
from tests.tiny_models import make_model, make_tokenizer

VARIANTS = {
    "none": {},
    "zero": {"softmax_off_by_one": True},
    "learnable": {"sink_token": "learnable"},
}


def make(family="transformer", **changes):
    return make_model(family, vocab_size=300, **changes)


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sinks")
    for name, changes in VARIANTS.items():
        save(make(**changes), root / name)
    (root / "text.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 60)
    return root


def run(folders, *options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    sinks.add_arguments(parser)
    models = [f"--model={name}={folders / name}" for name in VARIANTS]
    text = ["--text", str(folders / "text.txt")]
    args = parser.parse_args([*models, *text, "--device", "cpu", *options])
    return sinks.run_from_arguments(args)


def test_table_of_all_variants_and_splits(folders, tmp_path, capsys):
    out = tmp_path / "sinks.json"
    run(folders, "--cache", "20", "--length", "90", "--pieces", "3", "--out", str(out))
    found = read_json(out)
    assert not found["unavailable"]
    cells = {(r["case"], r["system"]): r for r in found["rows"]}
    splits = ["cache 0+20", "cache 1+19", "cache 2+18", "cache 4+16"]
    assert set(cells) == {(case, name) for case in splits for name in VARIANTS}
    for cell in cells.values():
        assert (cell["metric"], cell["n"]) == ("perplexity", 3 * 70)
        assert 1 < cell["low"] < cell["median"] < cell["high"]
    assert "cache 4+16" in capsys.readouterr().out


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_cache_that_holds_the_text_is_no_loss(folders, name):
    model = sinks.streaming_model(folders / name, 200, 2).eval()
    ids = torch.randint(50, (2, 130))
    trained = make(**VARIANTS[name])
    logits = trained(ids).logits.float()
    expected = F.cross_entropy(logits[:, 39:-1].transpose(1, 2), ids[:, 40:], reduction="none")
    torch.testing.assert_close(sinks.losses(model, ids, 40), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_a_cache_with_sinks_keeps_the_trained_sink(folders):
    """After many tokens the learned sink matters with one sink slot, and not with none."""
    ids, differs = torch.randint(50, (1, 130), generator=torch.Generator().manual_seed(0)), {}
    for count in (0, 1):
        found = []
        for factor in (1.0, -1.0):
            model = sinks.streaming_model(folders / "learnable", 20, count).eval()
            # one layer sees no further than its own window
            model.model.layers = model.model.layers[:1]
            model.model.sink_token.mul_(factor)
            found.append(sinks.losses(model, ids, 40))
        differs[count] = not torch.equal(*found)
    assert differs == {0: False, 1: True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "x"], r"--model x must be a name and a folder"),
        (["--model", "none=y"], r"one name twice"),
        (["--cache", "4"], r"a cache holds more than 4 tokens"),
        (["--cache", "50", "--length", "51"], r"a\s+piece of text more than the cache"),
    ],
)
def test_refused(folders, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(folders, *options, "--out", str(tmp_path / "x.json"))


def test_too_little_text_and_another_model_are_told(folders, tmp_path):
    save(make("lalte"), tmp_path / "lalte")
    options = ["--model", f"lalte={tmp_path / 'lalte'}", "--cache", "20", "--length", "400", "--pieces", "3000"]
    run(folders, *options, "--out", str(tmp_path / "x.json"))
    reasons = {u["system"]: u["reason"] for u in read_json(tmp_path / "x.json")["unavailable"]}
    assert "fewer than 3000 pieces of 400 tokens" in reasons["none"]
    assert "is no model of full attention" in reasons["lalte"]


def test_another_model_of_the_same_name_is_another_run(tmp_path, folders):
    """A model that was trained again isn't measured before."""
    first, second = tmp_path / "a" / "final", tmp_path / "b" / "final"
    for seed, folder in enumerate((first, second)):
        save(make(seed=seed), folder)
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    sinks.add_arguments(parser)
    sizes = ["--cache", "20", "--length", "90", "--pieces", "2", "--device", "cpu"]
    where = ["--text", str(folders / "text.txt"), "--out", str(tmp_path / "sinks.json")]
    measure = lambda folder: sinks.run_from_arguments(parser.parse_args([f"--model=none={folder}", *sizes, *where]))
    assert measure(first) == measure(first) == 0
    assert path_identity(first) != path_identity(second)
    with pytest.raises(ValueError, match="holds results of another config"):
        measure(second)
