"""benchmarks.small: what is measured for whom, and the validation perplexity; its results through small_tables."""

import json
import math

import pytest
import torch

from benchmarks import small, small_tables
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
    common = ["niah-lines", "niah-essays", "validation", "answers", "squad", "swde"]
    assert of("gdn") == of("gdn-swa") == common
    more = ["budget-0-niah-lines", "budget-0-niah-essays", "budget-32-niah-essays", "budget-0-answers"]
    more += ["policy-h2o-niah-essays"]
    assert of("lalte") == [*common, *more, "retained-lines", "retained-essays"]
    least = config("--answers", "0")
    assert [folder for folder, _ in small.jobs(make_model("gdn"), tokenizer, least)] == common[:2]


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
    (tmp_path / "model" / "config.yaml").write_text(
        "model: {config: configs/models/lalte-tiny.json}\ntokenizer: {path: t}\ndata: {sequence_length: 512}\n"
        "needles: {fraction: 1.0}\nsteps: 1"
    )
    line = ["--config", CONFIG, "--model", tmp_path / "model", "--name", "mine", "--out", tmp_path / "runs" / "mine"]
    line += ["--tasks", "single_1", "--lengths", 1700, "--samples", 1, "--text", tmp_path / "text.txt", "--rows", 64]
    line += ["--budgets", "0,2", "--policies", "key_norm", "--memory-tasks", "single_1", "--memory-lengths", 1700]
    line += ["--memory-samples", 1, "--kept-tasks", "single_1", "--kept-lengths", 1700, "--kept-samples", 1]
    line += ["--answers", 1, "--dtype", "float32", "--device", "cpu"]
    line += ["--squad", tmp_path / "gone.jsonl"]
    assert small.main([str(word) for word in line]) == 1, "one fails, and the others are measured"
    shown = capsys.readouterr()
    assert shown.out.count("niah_single_1 L1700 ") == 4
    assert shown.out.count("first token L512 ") == 2
    assert "mine squad failed: " in shown.err
    assert small_tables.main([str(tmp_path / "runs"), "--out", str(tmp_path / "results")]) == 0
    names = {path.name for path in (tmp_path / "results").glob("*.json")}
    changed = ["budget-0-niah-lines", "budget-0-answers", "budget-2-niah-lines", "policy-key_norm-niah-lines"]
    own = ["niah-lines", "validation", "answers", "retained-lines"]
    assert names == {f"mine.{evaluation}.json" for evaluation in own + changed}
    content = json.loads((tmp_path / "results" / "mine.policy-key_norm-niah-lines.json").read_text())
    assert (content["config"]["retention"], content["config"]["budget"]) == ("key_norm", 3)
    content = json.loads((tmp_path / "results" / "mine.budget-0-answers.json").read_text())
    assert (content["config"]["budget"], content["config"]["rows"]) == (0, 1)
    assert "| value | needle | other |" in (tmp_path / "results" / "kept.md").read_text()
    assert "| niah_single_1 L1700 | " in (tmp_path / "results" / "answers.md").read_text()
    members = (tmp_path / "results" / "members" / "table.md").read_text()
    assert "| niah_single_1 L1700 | accuracy |" in members
    assert "rows T64" in members
    assert "| first token L512 | accuracy |" in members
    assert "budget-2" not in members
    memory = (tmp_path / "results" / "memory" / "table.md").read_text()
    assert "| mine-budget-0 | mine-budget-2 | mine-policy-key_norm |" in memory
    assert (tmp_path / "results" / "memory" / "memory-mine-niah_single_1-l1700.png").stat().st_size > 5000


def test_what_is_missing_is_named(capsys):
    assert small.main(["--config", CONFIG, "--model", "m", "--out", "o"]) == 2
    assert "name: missing; give --name" in capsys.readouterr().err
