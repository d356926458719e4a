"""Every member of the family, from text to a score, by commands only: train, generate, eval niah, info."""

import json
from pathlib import Path

import pytest

import lalte

ROOT = Path(__file__).parents[1]
SPARSE = {"nsa_selected_blocks": 3, "nsa_window": 48}
# what is changed of the shipped sizes, so that texts of 450 tokens outgrow a window; and further options of
# generation and evaluation, a policy and a budget
MEMBERS = {
    "transformer": ({}, ()),
    "gdn": ({}, ()),
    "gdn-swa": ({"window": 48}, ("--retention", "recency", "--budget", 3)),
    "gdn-full": ({}, ()),
    "streaming": ({"window": 44}, ("--retention", "delta_error", "--budget", 3)),
    "nsa": (SPARSE, ()),
    "lansa": (SPARSE, ()),
    "lalte": ({"window": 40, "budget": 8}, ("--retention", "key_norm")),
}
STEPS = 8
TRAINING = """
model: {{config: {config}, overrides: {overrides}}}
data: {{sources: [{{path: {folder}/text.txt}}], sequence_length: 96, cache_dir: {folder}/cache}}
tokenizer: {{train_vocab_size: 300}}
optimizer: {{lr: 3.0e-3, warmup_steps: 2}}
batch: {{sequences: 2}}
log: {{every: 1, progress: false, tensorboard: false}}
device: cpu
output: {folder}/run
steps: {steps}
"""


def test_every_shipped_member_is_here():
    shipped = {path.name.removesuffix("-tiny.json") for path in ROOT.glob("configs/models/*-tiny.json")}
    assert shipped == MEMBERS.keys()


@pytest.mark.parametrize("name", MEMBERS)
def test_train_generate_and_evaluate(name, tmp_path, capsys):
    def run(*words):
        capsys.readouterr()
        assert lalte.main([str(word) for word in words]) == 0
        return capsys.readouterr()

    text = "the grass is green and the sky is blue; one of the special magic numbers is 1234567.\n"
    (tmp_path / "text.txt").write_text(text * 60)
    recipe = tmp_path / "train.yaml"
    changes, options = MEMBERS[name]
    values = {"config": ROOT / f"configs/models/{name}-tiny.json", "overrides": {"vocab_size": 300, **changes}}
    recipe.write_text(TRAINING.format(**values, folder=tmp_path, steps=STEPS))
    run("train", recipe)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["lm_loss"] for entry in log if "lm_loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5, "the loss falls"

    model = ("--model", tmp_path / "run", "--device", "cpu", *options)
    written = run("generate", *model, "--prompt", text, "--max-new-tokens", 6, "--ignore-end")
    assert "new: 6 tokens" in written.err
    sizes = ("--tasks", "single_1", "--lengths", 450, "--samples", 2, "--new-tokens", 4)
    run("eval", "niah", *model, *sizes, "--out", tmp_path / "niah")
    found = json.loads((tmp_path / "niah" / "result.json").read_text())
    (row,) = found["rows"]
    assert (row["case"], row["metric"], row["n"]) == ("niah_single_1 L450", "accuracy", 2)
    chosen = dict(zip(options[::2], options[1::2], strict=True))
    assert found["config"]["retention"] == chosen.get("--retention")
    assert found["config"]["budget"] == chosen.get("--budget")
    assert "parameters" in run("info", tmp_path / "run").out
