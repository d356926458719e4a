"""benchmarks.small_tables: what stands in the tables of all models, and those of several seeds."""

import json

import pytest

from benchmarks import small_tables
from eval.results import result, row, write_json


def write(folder, case, value, budget=3, evaluation="niah"):
    rows = [row(case, "x", "accuracy", value, value - 0.1, value + 0.1, 50)]
    write_json(folder / "result.json", result(evaluation, rows, config={"budget": budget}, device="cpu"))


def test_members_stand_beside_budget_zero(tmp_path):
    a = "a-0.4b"
    for name, evaluation, value in ((a, "niah-lines", 0.9), (a, "budget-0-niah-lines", 0.2), ("b", "squad", 0.5)):
        kind = "niah" if "niah" in evaluation else "evaporate"
        write(tmp_path / "runs" / name / evaluation, "niah_single_1 L512", value, budget=0, evaluation=kind)
    small_tables.table(tmp_path / "runs", tmp_path / "out", overwrite=False)
    with pytest.raises(ValueError, match="exists already"):
        small_tables.table(tmp_path / "runs", tmp_path / "out", overwrite=False)
    small_tables.table(tmp_path / "runs", tmp_path / "out", overwrite=True)
    assert "| a-0.4b | a-0.4b-budget-0 | best |" in (tmp_path / "out" / "members" / "table.md").read_text()
    assert not (tmp_path / "out" / "memory").exists(), "budget 0 stands in the other table"
    assert not (tmp_path / "out" / "kept.md").exists()


def test_budgets_stand_in_order_and_several_make_a_figure(tmp_path):
    for member, budgets in (("a", (512, 0, 64)), ("b", (0, 64)), ("c", (0,))):
        for budget in budgets:
            write(tmp_path / "runs" / member / f"budget-{budget}-niah-lines", "niah_single_1 L512", 0.5, budget)
    small_tables.table(tmp_path / "runs", tmp_path / "out", overwrite=False)
    names = "| a-budget-0 | a-budget-64 | a-budget-512 | b-budget-0 | b-budget-64 | c-budget-0 | best |"
    assert names in (tmp_path / "out" / "memory" / "table.md").read_text()
    figures = {file.name for file in (tmp_path / "out" / "memory").glob("memory-*.png")}
    assert figures == {"memory-a-niah_single_1-l512.png"}, "one point shows nothing, and 0 has no place on the axis"


def answered(folder, answers, length=512):
    for index, (score, prediction) in enumerate(answers):
        sample = {"index": index, "task": "niah_single_1", "length": length, "depth_percent": 50.0}
        sample |= {"score": score, "prediction": prediction}
        file = folder / "samples" / f"niah_single_1-L{length}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as log:
            log.write(json.dumps(sample) + "\n")


def test_answers_are_told_apart_by_their_form(tmp_path):
    right, part, figures, prose = (1.0, " 123."), (0.5, " 1, 2"), (0.0, " 40 years"), (0.0, " a man of about 40")
    answered(tmp_path / "a/niah-lines", [right, right, right, figures])
    answered(tmp_path / "a/niah-lines", [part, prose], length=1024)
    answered(tmp_path / "b/budget-0-niah-lines", [prose, prose])
    answered(tmp_path / "b/budget-32-niah-lines", [right])
    lines = small_tables.answers_table(tmp_path).splitlines()
    assert lines[0] == "Percent of the answers that are right, right in part, wrong figures, no figures."
    assert lines[2] == "| case | a | b-budget-0 |"
    assert lines[4] == "| niah_single_1 L512 | 75 / 0 / 25 / 0 | 0 / 0 / 0 / 100 |"
    assert lines[5] == "| niah_single_1 L1024 | 0 / 50 / 0 / 50 |  |"
    assert small_tables.answers_table(tmp_path / "a") == "", "no samples"


@pytest.mark.parametrize("member", ["lalte", "lalte-0.4b", "v1.2.rc"])
def test_a_member_may_have_dots_in_its_name(member):
    assert small_tables.split_label(f"{member}.niah-lines") == (member, "")
    assert small_tables.split_label(f"{member}.budget-32-niah-lines") == (member, "budget-32")
    assert small_tables.split_label(f"{member}.policy-key_norm-niah-essays") == (member, "policy-key_norm")


def test_seeds_are_put_together(tmp_path):
    for seed, value in enumerate((0.5, 0.25, 0.75)):
        write(tmp_path / str(seed) / "a" / "niah-lines", "niah_single_1 L512", value)
        write(tmp_path / str(seed) / "a" / "policy-h2o-niah-lines", "niah_single_1 L512", value)
    write(tmp_path / "0" / "b" / "niah-lines", "niah_single_1 L512", 0.5)
    write(tmp_path / "0" / "b" / "niah-essays", "niah_single_2 L512", 0.5)
    folders = [str(tmp_path / str(seed)) for seed in range(3)]
    assert small_tables.main([*folders, "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "seeds.md").read_text().splitlines()
    assert lines[2:] == ["| case | a |", "|---|---|", "| niah_single_1 L512 | 0.5 (0.25 to 0.75; 3) |"]
    copied = json.loads((tmp_path / "out" / "seed-2" / "a.niah-lines.json").read_text())
    assert copied["rows"][0]["median"] == 0.75
    assert small_tables.main([folders[0], "--out", str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one" / "seeds.md").exists()


def test_every_seed_says_what_was_kept_and_how_was_answered(tmp_path):
    for seed, share in (("0", 0.25), ("1", 0.75)):
        folder = tmp_path / seed / "a"
        write(folder / "niah-lines", "niah_single_1 L512", share)
        answered(folder / "niah-lines", [(1.0, " 123.")] * int(4 * share) + [(0.0, " a man")] * int(4 - 4 * share))
        kinds = {kind: {"share": share, "tokens": 8} for kind in ("value", "needle", "other")}
        shares = [{"case": "niah_single_1 L512", "layer": 3, "head": head, **kinds} for head in (0, None)]
        content = result("retained", [], config={"budget": 3}, device="cpu", shares=shares)
        write_json(folder / "retained-lines" / "result.json", content)
    out = tmp_path / "out"
    assert small_tables.main([str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(out)]) == 0
    for folder, share in ((out, 0.25), (out / "seed-1", 0.75)):
        kept = (folder / "kept.md").read_text().splitlines()
        assert kept[0] == "## a"
        assert kept[4:] == [f"| niah_single_1 L512 | 3 |{f' {share:.3f} of 8 |' * 3}"]
        percent = f"{100 * share:.0f} / 0 / 0 / {100 - 100 * share:.0f}"
        assert (folder / "answers.md").read_text().splitlines()[2:] == [
            "| case | a |",
            "|---|---|",
            f"| niah_single_1 L512 | {percent} |",
        ]


def test_a_folder_without_results_is_named(tmp_path, capsys):
    assert small_tables.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no NAME/EVALUATION/result.json" in capsys.readouterr().err
