"""`lalte eval answers`: which documents are read, what counts as right, and what a run refuses.

Shapes: T tokens of a document, V pieces of the vocabulary.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

import lalte
from eval import answers_cli
from eval.answers import Counts, count_right, length_class, run_answers, silent_tokens
from tests.tiny_models import make_model, make_tokenizer
from training.config import load_config
from training.data import TrainingRows
from training.held_out import HeldOutDocuments
from training.rows import IGNORED
from training.setup import plan_steps

RECIPE = {
    "model": {"config": "configs/models/lalte-tiny.json"},
    "tokenizer": {"path": "somewhere"},
    "data": {"sequence_length": 400},
    "needles": {
        "fraction": 1.0,
        "digits": 5,
        "length": [150, 300],
        "loss_on": "answer",
        "keys": [1, 3],
        "questions": [1, 2],
        "preamble": "Numbers.",
        "question": "What of {key}?",
        "prefix": "It is",
        "variants": [{"needle": "{key} has {value}."}, {"needle": "{key}: {value}|", "length": None}],
    },
    "curriculum": [{"until_step": 2, "sequence_length": 200, "needles": {"variants": []}}],
    "batch": {"sequences": 2},
    "steps": 4,
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model("lalte", vocab_size=320)


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


def make(recipe, tokenizer, changes=(), **given):
    return HeldOutDocuments(recipe, tokenizer, changes, progress=False, **given)


def read(recipe, tokenizer, kind=0, rows=3, **given):
    """Tokens of the documents of a kind."""
    return [tokens.tolist() for tokens, _ in make(recipe, tokenizer, rows=rows, **given).of_kind(kind)]


def next_tokens(model, monkeypatch, right=lambda place, ids_T: True):
    """The model knows the token that follows, at the places where `right` says so."""

    def forward(input_ids, use_cache):
        assert not model.training
        assert not torch.is_grad_enabled()
        ids_T = input_ids[0]
        following_T = torch.tensor(
            [
                int(ids_T[(place + 1) % len(ids_T)]) if right(place, ids_T) else int(ids_T[0]) % 2 + 300
                for place in range(len(ids_T))
            ]
        )
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following_T, 320)[None].float())

    monkeypatch.setattr(model, "forward", forward)


def test_an_answer_begins_with_its_first_token_that_says_something():
    # two answers; 9 is a space, 8 ends the document
    labels = torch.tensor([IGNORED, 9, 1, 2, 9, 3, IGNORED, IGNORED, 9, 4, 5, 8])
    guess = torch.tensor([7, 7, 1, 2, 7, 7, 7, 7, 9, 7, 5, 7])
    assert count_right(guess, labels, {8, 9}) == Counts(answers=2, begun=1, tokens=5, right=3)
    assert count_right(labels, labels, set()) == Counts(answers=2, begun=2, tokens=9, right=9)


def test_spaces_and_special_tokens_say_nothing(tokenizer):
    silent = silent_tokens(tokenizer)
    assert set(tokenizer.all_special_ids) <= silent
    assert silent.isdisjoint(tokenizer("A7.").input_ids)
    assert set(tokenizer(" \n").input_ids) <= silent


def test_documents_are_those_of_the_last_stage_and_new(recipe, tokenizer):
    config = load_config(recipe)
    trained = TrainingRows(config.data, plan_steps(config, 1)[0], tokenizer, seed=0, progress=False)
    seen = {tuple(trained[1, index].tokens) for index in range(4)}
    texts = [tokenizer.decode(document) for document in read(recipe, tokenizer)]
    assert all(text.startswith("Numbers.") and " has " in text and "|" not in text for text in texts)
    lengths = [len(document) for document in read(recipe, tokenizer, rows=8)]
    assert len(lengths) > 8
    assert max(lengths) <= 300
    assert [len(document) > 360 for document in read(recipe, tokenizer, kind=1)] == [True] * 3
    new = read(recipe, tokenizer, kind=1)
    assert new == read(recipe, tokenizer, kind=1)
    assert new[:2] == read(recipe, tokenizer, kind=1, rows=2)
    other = read(recipe, tokenizer, kind=1, seed=1)
    assert not {tuple(document) for document in new} & ({tuple(document) for document in other} | seen)


@pytest.mark.parametrize(
    ("length", "found"), [(1, 128), (128, 128), (129, 256), (256, 256), (257, 512), (4096, 4096)]
)
def test_lengths_are_told_apart_by_powers_of_two(length, found):
    assert length_class(length) == found


def test_a_model_that_knows_what_follows_is_right_everywhere(model, tokenizer, recipe, tmp_path, monkeypatch):
    next_tokens(model, monkeypatch)
    model.train()
    content = run_answers(model, tokenizer, make(recipe, tokenizer, rows=2), tmp_path / "out", progress=False)
    assert model.training, "as before"
    model.eval()
    cases = {row["case"]: row for row in content["rows"]}
    assert all(row["median"] == row["high"] == 1 for row in cases.values())
    assert list(cases) == [
        f"{name}{length}" for length in ("", " L256", " L512") for name in ("first token", "tokens")
    ]
    for name, key in (("first token", "answers"), ("tokens", "tokens")):
        count = sum(entry[key] for entry in content["kinds"])
        assert cases[name]["n"] == count == sum(cases[f"{name} L{length}"]["n"] for length in (256, 512))
    assert cases["tokens"]["n"] > 3 * cases["first token"]["n"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 1 | {key}: {value}\\| | " in table
    assert table.count("| 1.000 | 1.000 |") == 2


def test_documents_depend_on_the_recipe_and_its_seed(recipe, tokenizer, tmp_path):
    documents = read(recipe, tokenizer)
    assert read(recipe, tokenizer, changes=["needles.fraction=0.5"]) == documents, "rows of text have no part"
    assert read(recipe, tokenizer, changes=["seed=7"]) != documents
    digests = {make(recipe, tokenizer).settings["recipe"]}
    digests.add(make(recipe, tokenizer, ["batch.sequences=1", "steps=9"]).settings["recipe"])  # no part of it
    digests.add(make(recipe, tokenizer, ["data.sequence_length=390"]).settings["recipe"])
    digests.add(make(recipe, tokenizer, ["needles.digits=4"]).settings["recipe"])
    digests.add(make(recipe, tokenizer, ["seed=7"]).settings["recipe"])
    assert len(digests) == 4
    for count in (1, 2):
        (tmp_path / "text.txt").write_text("\n<end>\n".join([f"Some text of {count}."] * count))
        source = f"data.sources=[{{path: {tmp_path}/text.txt, separator: '\\n<end>\\n'}}]"
        changes = [source, f"data.cache_dir={tmp_path}/cache-{count}"]
        digests.add(make(recipe, tokenizer, changes).settings["recipe"])
    assert len(digests) == 6


def test_copying_what_was_found_is_told_from_finding_it(model, tokenizer, recipe, tmp_path, monkeypatch):
    figures = {tokenizer(str(figure)).input_ids[0] for figure in range(10)}
    next_tokens(model, monkeypatch, right=lambda place, ids_T: int(ids_T[place]) in figures)
    content = run_answers(model, tokenizer, make(recipe, tokenizer, rows=2), tmp_path / "out", progress=False)
    first, tokens = content["rows"][:2]
    assert first["median"] == 0
    assert 0.5 < tokens["median"] < 1, "all but the first figure of a value"


def test_answers_alone_count_whatever_the_training_predicts(model, tokenizer, recipe, tmp_path, monkeypatch):
    next_tokens(model, monkeypatch)
    counts = []
    for loss in ("answer", "all"):
        changed = {**RECIPE["needles"], "loss_on": loss}
        changed["variants"] = [{**kind, "loss_on": loss} for kind in changed["variants"]]
        recipe.write_text(yaml.safe_dump(RECIPE | {"needles": changed}))
        content = run_answers(model, tokenizer, make(recipe, tokenizer, rows=1), tmp_path / loss, progress=False)
        counts.append(content["kinds"])
    assert counts[0] == counts[1]


def test_a_run_writes_its_folder_once(model, tokenizer, recipe, tmp_path):
    documents = make(recipe, tokenizer, rows=1)
    run = lambda documents=documents, **given: run_answers(
        model, tokenizer, documents, tmp_path / "out", progress=False, **given
    )
    content = run()
    assert content == json.loads((tmp_path / "out" / "result.json").read_text())
    assert run() == content
    with pytest.raises(ValueError, match="holds another run: budget is None there and 1 here"):
        run(budget=1)
    with pytest.raises(ValueError, match="holds another run: recipe is"):
        run(make(recipe, tokenizer, ["needles.digits=4"], rows=1))
    with pytest.raises(ValueError, match="holds another run: seed is 0 there and 3 here"):
        run(make(recipe, tokenizer, rows=1, seed=3))
    with pytest.raises(ValueError, match="holds a run already"):
        run(resume=False)


def test_a_refused_run_leaves_the_folder_free(model, tokenizer, recipe, tmp_path):
    with pytest.raises(ValueError, match="budget: -1 is negative"):
        run_answers(model, tokenizer, make(recipe, tokenizer, rows=1), tmp_path / "out", budget=-1, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ([], {"rows": 0}, "rows: 0 is not a whole number from 1"),
        ([], {"rows": (1 << 20) + 1}, "rows: 1048577 is not a whole number from 1 to 1048576"),
        ([], {"seed": -1}, "seed: -1 is not a whole number from 0"),
        ([], {"seed": 1 << 20}, "seed: 1048576 is not a whole number from 0 to 1048575"),
        (["needles.fraction=0.0", "data.sources=[{path: x.txt}]"], {}, "ends without needle documents"),
        (["data.sources=[{path: missing.txt}]"], {}, "missing.txt"),
        (["needles.no=1"], {}, "needles.no"),
    ],
)
def test_documents_that_cannot_be_made_are_refused(tokenizer, recipe, changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(recipe, tokenizer, changes, **arguments)


def test_a_recipe_must_be_a_file(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"recipe: .*config.yaml is not a file; give the configuration of"):
        make(tmp_path / "config.yaml", tokenizer)


@pytest.mark.parametrize(
    ("folder", "kept"),
    [
        ("run", "run"),
        ("run/checkpoint-20", "run"),
        ("checkpoint-2/x", "checkpoint-2/x"),
        ("checkpoint2", "checkpoint2"),
    ],
)
def test_a_checkpoint_is_of_the_run_above_it(tmp_path, folder, kept):
    assert answers_cli.kept_recipe(str(tmp_path / folder)) == tmp_path / kept / "config.yaml"


def test_the_command_reads_the_configuration_beside_the_model(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    line = ["eval", "answers", "--model", str(tmp_path / "model"), "--device", "cpu", "--rows", "1", "--budget", "2"]
    out = tmp_path / "out"
    changes = ["--change", "needles.digits=4", "--change", "data.sequence_length=350"]
    assert lalte.main([*line, *changes, "--out", str(out)]) == 0
    assert "first token" in capsys.readouterr().out
    settings = json.loads((out / "result.json").read_text())["config"]
    assert (settings["budget"], settings["rows"], settings["seed"]) == (2, 1, 0)
    assert yaml.safe_load((out / "config.yaml").read_text())["change"] == ["needles.digits=4", changes[-1]]
    recipe = tmp_path / "other.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"seed": 5}))
    assert lalte.main([*line, "--recipe", str(recipe), "--seed", "3", "--out", str(tmp_path / "other")]) == 0
    other = json.loads((tmp_path / "other" / "result.json").read_text())["config"]
    assert (other["seed"], other["recipe"]) == (3, make(recipe, tokenizer).settings["recipe"])
    assert lalte.main([*line, "--out", str(out), "--retention", "h2o"]) == 2
    assert "retention: 'h2o' needs a cache" in capsys.readouterr().err
