"""benchmarks.small_training: the logs of runs in one file, and figures of it."""

import json

import pytest

from benchmarks import small_training


def entry(step, loss, length=2048, **more):
    return {"step": step, "lm_loss": loss, "loss": 99.0, "sequence_length": length, "tokens_per_s": 1234.56, **more}


def keeps_all(step, loss, length=2048):
    return entry(step, loss, length, **{"lambda_max": 0.0, "lambda_mean": 0.0, "lambda/layer_0": 0.0})


def kept(step, loss, kept_per_head, penalty, length=2048):
    means = {"kept_per_head": kept_per_head, "lambda_max": penalty, "lambda_mean": penalty / 2}
    layers = {"kept_per_head/layer_0": 2 * kept_per_head, "lambda/layer_0": penalty}
    return entry(step, loss, length, **means, **layers)


@pytest.fixture
def runs(tmp_path):
    logs = {
        # the run was stopped after step 60 and went on from 40: the later entries count
        "gdn": [entry(20, 3.0, 256), entry(40, 2.5), entry(60, 9.0), entry(60, 2.25), {"runtime": 3, "step": 60}],
        "lalte": [keeps_all(20, 3.0, 256), keeps_all(40, 2.0), kept(60, 2.123456, 12.3456789, 1e-6)],
    }
    for name, entries in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in entries))
    return tmp_path


def test_logs_are_gathered(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert small_training.main([str(runs), "--out", str(out)]) == 0
    members = json.loads((out / "training.json").read_text())["members"]
    common = {"step": [20, 40, 60], "sequence_length": [256, 2048, 2048], "tokens_per_s": [1234.6] * 3}
    assert members["gdn"] == common | {"loss": [3.0, 2.5, 2.25]}
    switched_on = {"kept_per_head": [None, None, 12.346], "kept_per_head/layer_0": [None, None, 24.691]}
    switched_on |= {"lambda/layer_0": [None, None, 1e-6]}
    assert members["lalte"] == common | {"loss": [3.0, 2.0, 2.1235]} | switched_on
    assert "lalte: step 60, loss 2.123, kept 12.346" in capsys.readouterr().out
    assert (out / "training.md").read_text().splitlines()[3:] == [
        "| model | 256 | 2,048 | kept |",
        "|---|---:|---:|---:|",
        "| gdn | 3.000 (20) | 2.375 (60) |  |",
        "| lalte | 3.000 (20) | 2.062 (60) | 12 |",
    ]
    for name in ("training-loss", "training-kept"):
        assert (out / f"{name}.png").stat().st_size > 5000
    assert small_training.main([str(runs), "--out", str(out)]) == 2, "nothing is replaced unasked"
    assert "exists already" in capsys.readouterr().err
    assert small_training.main([str(runs), "--out", str(out), "--overwrite"]) == 0


def test_losses_are_means_of_the_last_steps():
    steps = [0, 20, 100, 120, 200]
    log = {"step": steps, "sequence_length": [256, 256, 512, 512, 512], "loss": [9.0, 4.0, 8.0, 2.0, 3.0]}
    rows = small_training.losses_table({"a": log, "b": {name: column[3:] for name, column in log.items()}})
    assert rows.splitlines()[5:] == ["| a | 6.500 (20) | 2.500 (200) |  |", "| b |  | 2.500 (200) |  |"]


def test_curves_show_the_rows_of_full_length(runs):
    log = small_training.read_log(runs / "gdn" / "log.jsonl")
    line = small_training.curve("gdn", log, "loss", 2)
    assert (line.x, line.y) == ([60], [2.375])
    assert small_training.curve("gdn", log, "kept_per_head") is None
    log = small_training.read_log(runs / "lalte" / "log.jsonl")
    line = small_training.curve("lalte", log, "kept_per_head")
    assert (line.x, line.y) == ([60], [12.346])


def test_what_is_missing_is_named(tmp_path, capsys):
    assert small_training.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no NAME/log.jsonl" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.jsonl").write_text("")
    assert small_training.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no training step" in capsys.readouterr().err
