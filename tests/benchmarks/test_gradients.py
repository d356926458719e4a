"""benchmarks.gradients: what is trained, what is measured, and the files."""

import json

import pytest
import torch

from benchmarks import gradients

SHORT = ["--steps", "1", "--every", "1", "--sequences", "1", "--held-out", "1", "--seeds", "0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pytest.importorskip("wonderwords")
    return gradients.Rows(str(tmp_path_factory.mktemp("cache")))


def test_only_the_scorer_is_new_and_learns():
    model, shipped = (gradients.make_model("presence_beyond_window", 0) for _ in range(2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".scorer." in name}
    assert model.config.straight_through == "presence_beyond_window"
    assert all(torch.equal(p, dict(shipped.named_parameters())[name]) for name, p in model.named_parameters())
    assert not model.penalty_control.penalty_weight.any()


def test_answers_need_retention(rows):
    """The rows' answers lie beyond the window: with everything kept they are right, with nothing they are not."""
    model, batch = gradients.make_model("all", 0), rows.batch(gradients.HELD_OUT, 3)
    assert batch["input_ids"].shape == (3, gradients.MODEL["max_position_embeddings"])
    assert gradients.accuracy(model, batch, 640) == 1.0
    assert gradients.accuracy(model, batch, 0) < 0.6


def test_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    line = ["--gradients", "all,presence_beyond_window", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert gradients.main([*SHORT, *line]) == 0
    content = json.loads((tmp_path / "gradients.json").read_text())
    assert [(r["system"], r["metric"], r["n"]) for r in content["rows"]] == [
        ("all", "accuracy", 1),
        ("presence_beyond_window", "accuracy", 1),
    ]
    assert [e["kept_per_head"] for e in content["entries"]] == [544, 544]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "all_retained.png").exists()
    assert (tmp_path / "kept_per_head.svg").exists()


@pytest.mark.parametrize("line", [["--steps", "0"], ["--gradients", "some"]])
def test_errors(line, tmp_path, capsys):
    assert gradients.main([*SHORT, *line, "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 2
    assert line[0][2:].rstrip("s") in capsys.readouterr().err
