"""benchmarks.small_wrong: what wrong answers are, from samples whose prompts are made anew."""

import json

import pytest

from benchmarks import small_wrong
from eval.needles import make_samples
from eval.results import write_json
from tests.tiny_texts import make_tokenizer

SETTINGS = {"samples": 2, "seed": 42, "new_tokens": 16, "step": None}


@pytest.mark.parametrize(
    ("prediction", "columns"),
    [
        (" 1234567.", ["right"]),
        (" 7654321 or 1234567", ["of another needle"]),
        (" 123456.", ["first 6"]),
        (" 12345678", ["first 6"]),
        (" 1235567", ["first 3"]),
        (" 9234567", ["first 0", "inside"]),
        (" 9239567", ["first 0", "inside"]),
        (" 9129347", ["first 0"]),
        (" the king", ["first 0"]),
        ("", ["first 0"]),
    ],
)
def test_forms(prediction, columns):
    assert small_wrong.form(prediction, "1234567", {"7654321"}) == columns


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(folder, tokenizer, task, predictions, length=700, **changes):
    """An evaluation's folder, as far as it is read; predictions are functions of a prompt's own sample."""
    samples = make_samples(task, tokenizer, length, 2, 42, 16)
    write_json(folder / "settings.json", SETTINGS, overwrite=True)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    lines = []
    for sample, predict in zip(samples, predictions, strict=True):
        record = {"index": sample.index, "task": sample.task, "length": length, "depth_percent": 1.0, "score": 0.0}
        record |= {
            "tokens": sample.tokens,
            "expected": list(sample.outputs),
            "prediction": predict(sample),
            **changes,
        }
        lines.append(json.dumps(record))
    (folder / "samples" / f"{samples[0].task}-L{length}.jsonl").write_text("\n".join(lines) + "\n")


def right(sample):
    return f" {sample.outputs[0]}."


def other(sample):
    """The value of the first needle in the prompt that isn't asked for."""
    found = small_wrong.VALUE.findall(sample.prompt)
    assert len(found) > 1
    return f" {next(value for value in found if value not in sample.outputs)}."


def test_the_table_has_models_as_they_are_and_with_budget_zero(tmp_path, tokenizer, capsys):
    runs = tmp_path / "runs"
    write(runs / "b" / "niah-lines", tokenizer, "multikey_2", [right, other])
    write(runs / "b" / "budget-0-niah-lines", tokenizer, "multikey_2", [other, other])
    write(runs / "b" / "budget-32-niah-lines", tokenizer, "multikey_2", [right, right])
    write(runs / "a" / "niah-lines", tokenizer, "single_1", [right, lambda sample: right(sample)[:4]])
    write(runs / "a" / "niah-essays", tokenizer, "multikey_3", [right, right], length=2000)  # UUIDs
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [str(runs), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    assert small_wrong.main(command) == 0
    assert (tmp_path / "out" / "wrong.md").read_text().splitlines()[4:] == [
        "| model | case | answers | right | of another needle | first 0 | first 1 | first 2 | first 3 | first 4 "
        "| first 5 | first 6 | inside |",
        "|---|---|" + "---:|" * 11,
        "| a | niah_single_1 L700 | 2 | 1 | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 0 | 0 |",
        "| b | niah_multikey_2 L700 | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |",
        "| b-budget-0 | niah_multikey_2 L700 | 2 | 0 | 2 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |",
    ]
    assert small_wrong.main(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"expected": ["7"]}, {"tokens": 1}])
def test_samples_of_other_prompts_are_refused(tmp_path, tokenizer, changes):
    write(tmp_path / "a" / "niah-lines", tokenizer, "single_1", [right, right], **changes)
    with pytest.raises(ValueError, match="had another prompt; give the tokenizer"):
        small_wrong.wrong_table(tmp_path, tokenizer)


def test_no_samples(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no samples"):
        small_wrong.wrong_table(tmp_path, tokenizer)


def test_no_tokenizer(tmp_path, capsys):
    assert small_wrong.main([str(tmp_path), "--tokenizer", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "can't be read" in capsys.readouterr().err
