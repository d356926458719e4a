"""benchmarks.small: what is measured for whom, the validation perplexity, and the table of all models."""

import json
import math

import pytest
import torch

from benchmarks import small
from eval.results import result, row, write_json
from tests.tiny_models import make_model, make_tokenizer

CONFIG = "configs/eval/small.yaml"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def config(*line):
    args = small.parser().parse_args(["--config", CONFIG, *line])
    return small.resolve(small.SmallConfig, args, needed=())


def test_only_a_scorer_has_evaluations_of_its_memory(tokenizer):
    given = config("--squad", "s", "--swde", "w", "--text", "t", "--budgets", "0,32", "--policies", "h2o")
    of = lambda name: [folder for folder, _ in small.jobs(make_model(name), tokenizer, given)]
    common = ["niah-lines", "niah-essays", "validation", "squad", "swde"]
    assert of("gdn") == of("gdn-swa") == common
    more = ["budget-0-niah-lines", "budget-0-niah-essays", "budget-32-niah-essays", "policy-h2o-niah-essays"]
    assert of("lalte") == [*common, *more, "retained-lines", "retained-essays"]
    assert [folder for folder, _ in small.jobs(make_model("gdn"), tokenizer, config())] == common[:2]


def test_the_shipped_settings_are_those_of_the_design():
    given = config("--name", "lalte")
    assert (given.samples, given.lengths, given.rows) == (200, [512, 1024, 2048, 4096], [2048, 4096])
    assert {"single_1", "single_2", "single_3", "multikey_1", "multivalue"} < set(given.tasks)
    assert set(given.memory_tasks) | set(given.kept_tasks) <= set(given.tasks)
    assert 0 in given.budgets
    assert 192 in given.budgets, "the model's own"


def test_rows_are_read_alone(tokenizer, tmp_path):
    model = make_model("lalte", vocab_size=320)
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog, then the other fox laughs. " * 40)
    ids = tokenizer(file.read_text(), add_special_tokens=False).input_ids
    run = ([file], [61, 113], 250)
    content = small.run_validation(model, tokenizer, *run, tmp_path / "out", system="mine")
    for length, found in zip([61, 113], content["rows"], strict=True):
        losses = []
        for start in range(0, 250 // length * length, length):
            piece = torch.tensor([ids[start : start + length]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, piece[0, 1:]))
        assert found["median"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
        assert found["low"] <= found["median"] <= found["high"]
        assert (found["case"], found["system"], found["n"]) == (f"rows T{length}", "mine", 250 // length)
    assert small.run_validation(model, tokenizer, *run, tmp_path / "out", system="mine") == content
    with pytest.raises(ValueError, match="less than a row of 9999 tokens"):
        small.run_validation(model, tokenizer, [file], [9999], 99999, tmp_path / "other", system="mine")


def test_a_model_is_evaluated_by_one_line(tokenizer, tmp_path, capsys):
    make_model("lalte", vocab_size=320).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    line = ["--config", CONFIG, "--model", tmp_path / "model", "--name", "mine", "--out", tmp_path / "runs" / "mine"]
    line += ["--tasks", "single_1", "--lengths", 1700, "--samples", 1, "--text", tmp_path / "text.txt", "--rows", 64]
    line += ["--budgets", 2, "--policies", "key_norm", "--memory-tasks", "single_1", "--memory-lengths", 1700]
    line += ["--memory-samples", 1, "--kept-tasks", "single_1", "--kept-lengths", 1700, "--kept-samples", 1]
    line += ["--dtype", "float32", "--device", "cpu"]
    line += ["--squad", tmp_path / "gone.jsonl"]
    assert small.main([str(word) for word in line]) == 1, "one fails, and the others are measured"
    shown = capsys.readouterr()
    assert shown.out.count("niah_single_1 L1700 ") == 3
    assert "mine squad failed: " in shown.err
    table = ["--table", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    assert small.main(table) == 0
    names = {path.name for path in (tmp_path / "results").glob("*.json")}
    changed = ["budget-2-niah-lines", "policy-key_norm-niah-lines"]
    own = ["niah-lines", "validation", "retained-lines"]
    assert names == {f"mine.{evaluation}.json" for evaluation in own + changed}
    content = json.loads((tmp_path / "results" / "mine.policy-key_norm-niah-lines.json").read_text())
    assert (content["config"]["retention"], content["config"]["budget"]) == ("key_norm", 3)
    assert "| value | needle | other |" in (tmp_path / "results" / "kept.md").read_text()
    assert "| niah_single_1 L1700 | " in (tmp_path / "results" / "answers.md").read_text()
    members = (tmp_path / "results" / "members" / "table.md").read_text()
    assert "| niah_single_1 L1700 | accuracy |" in members
    assert "rows T64" in members
    assert "budget-2" not in members
    memory = (tmp_path / "results" / "memory" / "table.md").read_text()
    assert "| mine-budget-2 | mine-policy-key_norm |" in memory
    assert (tmp_path / "results" / "memory" / "memory-mine-niah_single_1-l1700.png").stat().st_size > 5000


def test_members_stand_beside_budget_zero(tmp_path):
    a = "a-0.4b"
    for name, evaluation, value in ((a, "niah-lines", 0.9), (a, "budget-0-niah-lines", 0.2), ("b", "squad", 0.5)):
        rows = [row("niah_single_1 L512", "x", "accuracy", value, value - 0.1, value + 0.1, 50)]
        found = result("niah" if "niah" in evaluation else "evaporate", rows, config={"budget": 0}, device="cpu")
        write_json(tmp_path / "runs" / name / evaluation / "result.json", found)
    small.table(tmp_path / "runs", tmp_path / "out", overwrite=False)
    with pytest.raises(ValueError, match="exists already"):
        small.table(tmp_path / "runs", tmp_path / "out", overwrite=False)
    small.table(tmp_path / "runs", tmp_path / "out", overwrite=True)
    assert "| a-0.4b | a-0.4b-budget-0 | best |" in (tmp_path / "out" / "members" / "table.md").read_text()
    assert not list((tmp_path / "out" / "memory").glob("memory-*")), "a logarithmic axis has no 0"
    assert not (tmp_path / "out" / "kept.md").exists()


def test_answers_are_told_apart_by_their_form(tmp_path):
    def answered(folder, answers, length=512):
        for index, (score, prediction) in enumerate(answers):
            sample = {"index": index, "task": "niah_single_1", "length": length, "depth_percent": 50.0}
            sample |= {"score": score, "prediction": prediction}
            file = tmp_path / folder / "samples" / f"niah_single_1-L{length}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as log:
                log.write(json.dumps(sample) + "\n")

    right, part, figures, prose = (1.0, " 123."), (0.5, " 1, 2"), (0.0, " 40 years"), (0.0, " a man of about 40")
    answered("a/niah-lines", [right, right, right, figures])
    answered("a/niah-lines", [part, prose], length=1024)
    answered("b/budget-0-niah-lines", [prose, prose])
    answered("b/budget-32-niah-lines", [right])
    lines = small.answers_table(tmp_path).splitlines()
    assert lines[0] == "Percent of the answers that are right, right in part, wrong figures, no figures."
    assert lines[2] == "| case | a | b-budget-0 |"
    assert lines[4] == "| niah_single_1 L512 | 75 / 0 / 25 / 0 | 0 / 0 / 0 / 100 |"
    assert lines[5] == "| niah_single_1 L1024 | 0 / 50 / 0 / 50 |  |"
    assert small.answers_table(tmp_path / "a") == "", "no samples"


@pytest.mark.parametrize("member", ["lalte", "lalte-0.4b", "v1.2.rc"])
def test_a_member_may_have_dots_in_its_name(member):
    assert small.split_label(f"{member}.niah-lines") == (member, "")
    assert small.split_label(f"{member}.budget-32-niah-lines") == (member, "budget-32")
    assert small.split_label(f"{member}.policy-key_norm-niah-essays") == (member, "policy-key_norm")


def test_what_is_missing_is_named(tmp_path, capsys):
    assert small.main(["--table", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no NAME/EVALUATION/result.json" in capsys.readouterr().err
    assert small.main(["--table", str(tmp_path)]) == 2
    assert "give --out" in capsys.readouterr().err
    assert small.main(["--config", CONFIG, "--model", "m", "--out", "o"]) == 2
    assert "name: missing; give --name" in capsys.readouterr().err
