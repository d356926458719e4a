"""Comparing runs: names, intervals and winners, tables, figures, heat maps, and bad input."""

import argparse
import csv
import io
import json
import xml.etree.ElementTree as xml

import pytest

from eval import compare_cli, figures
from eval.compare import compare, join, markdown, read_run, read_samples, table_csv
from eval.intervals import bootstrap, winner
from eval.results import SampleLog, result, row, wilson, write_json


def accuracy(case, right, n=100, system="lalte"):
    return row(case, system, "accuracy", right / n, *wilson(right, n), n)


def write_run(folder, rows, name="niah", **more):
    more = {"definition": "RULER", "seed": 42, "config": {}} | more
    content = result(name, rows, device="cpu", **more)
    write_json(folder / "result.json", content)
    return str(folder)


@pytest.fixture
def two(tmp_path):
    """Two niah runs: clearly apart at 4096, not at 1024; and one of them has a length more."""
    a = [accuracy("niah_single_1 L1024", 99), accuracy("niah_single_1 L4096", 95), accuracy("niah_single_1 L8192", 9)]
    b = [accuracy("niah_single_1 L1024", 96), accuracy("niah_single_1 L4096", 40)]
    return [write_run(tmp_path / "ours", a), write_run(tmp_path / "gdn", b)]


def test_a_difference_inside_the_intervals_is_no_win(two):
    (section,) = join([read_run(path) for path in two])
    assert section.systems == ["ours", "gdn"]
    assert section.cases == [(f"niah_single_1 L{n}", "accuracy") for n in (1024, 4096, 8192)]
    assert [section.best(*case) for case in section.cases] == [None, "ours", None]
    text = markdown([section])
    assert "| case | metric | ours | gdn | best |" in text
    assert (
        "| niah_single_1 L1024 | accuracy | 0.990 [0.95, 1.00] | 0.960 [0.90, 0.98] | no difference shown |" in text
    )
    assert "| niah_single_1 L4096 | accuracy | 0.950 [0.89, 0.98] | 0.400 [0.31, 0.50] | ours |" in text
    assert text.rstrip().endswith("| - | - |")
    lines = list(csv.DictReader(io.StringIO(table_csv([section]))))
    assert len(lines) == 5
    assert [(line["system"], line["case"]) for line in lines if line["best"] == "1"] == [
        ("ours", "niah_single_1 L4096")
    ]
    assert float(lines[0]["low"]) == pytest.approx(wilson(99, 100)[0])


def test_winners_need_intervals_and_the_right_direction():
    make = lambda name, value, low, high, metric: row("c", name, metric, value, low, high, 9)
    lower, higher = (
        make(name, value, value - 1, value + 1, "perplexity") for name, value in (("a", 9.0), ("b", 12.0))
    )
    assert winner([higher, lower])["system"] == "a"
    assert winner([lower, make("b", 10.5, 9.5, 11.5, "perplexity")]) is None
    assert winner([lower]) is None
    assert winner([make("a", 1.0, None, None, "accuracy"), make("b", 0.0, None, None, "accuracy")]) is None
    assert winner([make("a", 1.0, 0.9, None, "accuracy"), make("b", 0.0, None, 0.1, "accuracy")]) is None
    assert winner([make("a", 9, 8, 10, "tokens_per_s"), make("b", 20, 19, 21, "tokens_per_s")])["system"] == "b"
    assert winner([make("a", 64, 64, 64, "bytes"), make("b", 64, 64, 64, "bytes")]) is None
    assert winner([make("a", 64, 64, 64, "bytes"), make("b", 32, 32, 32, "bytes")])["system"] == "b"


def test_what_sets_runs_apart_is_noted_or_decides_nothing(tmp_path):
    perplexity = lambda value: [row("text T64", "lalte", "perplexity", value, value - 0.1, value + 0.1, 60)]
    times = lambda value: [row("reading T64", "lalte", "ms", value, value, value, 60)]
    common = {"name": "perplexity", "definition": "d"}
    a = write_run(tmp_path / "a", perplexity(5.0) + times(1.0), tokenizer="one", **common)
    b = write_run(tmp_path / "b", perplexity(9.0) + times(2.0), tokenizer="one", **common)
    c = write_run(tmp_path / "c", perplexity(9.0), tokenizer="two", **common)
    (section,) = join([read_run(a), read_run(b)])
    assert section.best("text T64", "perplexity") == "a"
    assert section.best("reading T64", "ms") is None, "times of different files aren't compared"
    assert section.warnings() == []
    (section,) = join([read_run(a), read_run(c)])
    assert section.best("text T64", "perplexity") is None
    assert section.warnings() == ["perplexity: the runs differ in their tokenizer (a: one, c: two)"]
    other = write_run(tmp_path / "other", perplexity(1.0), name="perplexity", definition="another")
    assert len(join([read_run(a), read_run(other)])) == 2, "another definition is another table"
    bench = [
        row("decode T64", system, "ms", value, value, value, 9) for system, value in (("lalte", 1.0), ("sdpa", 2.0))
    ]
    (section,) = join([read_run(write_run(tmp_path / "bench", bench, name="decode"))])
    assert section.systems == ["bench lalte", "bench sdpa"]
    assert section.best("decode T64", "ms") == "bench lalte", "times of one file are"


def test_none_is_best_at_different_questions(two, tmp_path):
    """What was read decides nothing about the models; how it was read, and which cases there are, is as good."""
    rows = [accuracy("niah_single_1 L4096", 20)]
    settings = {"text": ["a.txt 9"], "model": "x", "budget": 3, "lengths": [4096], "batch_size": 8}
    a = write_run(tmp_path / "a", [accuracy("niah_single_1 L4096", 95)], config=settings)
    same = settings | {"model": "y", "budget": None, "lengths": [512, 4096], "batch_size": 1}
    b = write_run(tmp_path / "b", rows, config=same)
    (section,) = join([read_run(a), read_run(b)])
    assert section.best("niah_single_1 L4096", "accuracy") == "a"
    assert section.warnings() == []
    older = write_run(tmp_path / "older", rows, config={"model": "z"})
    assert join([read_run(a), read_run(older)])[0].best("niah_single_1 L4096", "accuracy") == "a", "it didn't say"
    c = write_run(tmp_path / "c", rows, config=settings | {"text": ["b.txt 7"]})
    (section,) = join([read_run(a), read_run(c)])
    assert section.best("niah_single_1 L4096", "accuracy") is None
    assert section.warnings() == [
        "niah: the runs differ in their text (a: ['a.txt 9'], c: ['b.txt 7']), so none is called best"
    ]
    assert "none is called best" in markdown([section])


def test_accuracies_without_an_interval_get_one(tmp_path):
    bare = {"case": "t L64", "system": "x", "metric": "accuracy", "median": 0.5, "n": 10}
    path = tmp_path / "bare.json"
    path.write_text(json.dumps({"name": "niah", "rows": [bare]}))
    (section,) = join([read_run(str(path))])
    assert section.systems == ["bare"]
    assert (section.rows[0]["low"], section.rows[0]["high"]) == pytest.approx(wilson(5, 10))


def test_answers_with_line_separators_are_read(tmp_path):
    with SampleLog(tmp_path / "samples" / "t.jsonl") as log:
        for index, answer in enumerate(("a\u2028b", "a\x85b", "a\nb")):
            log.append(
                {"index": index, "task": "t", "length": 64, "depth_percent": 5.0, "score": 1.0, "said": answer}
            )
    assert [record["said"] for record in read_samples(tmp_path)["t"]] == ["a\u2028b", "a\x85b", "a\nb"]


def test_runs_that_share_a_name_are_all_noted_and_drawn(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "heat_maps", lambda path, samples, **_: drawn.update(samples) or [])
    runs = []
    for name, length, seed in (("ours", 1024, 1), ("ours", 2048, 0), ("gdn", 1024, 0)):
        folder = tmp_path / f"{name}-{length}"
        runs.append(f"{name}={write_run(folder, [accuracy(f'niah_single_1 L{length}', 9)], seed=seed)}")
        with SampleLog(folder / "samples" / "t.jsonl") as log:
            log.append({"index": 0, "task": "niah_single_1", "length": length, "depth_percent": 5.0, "score": 1.0})
    (section,) = compare(runs, tmp_path / "out")
    assert section.warnings() == ["niah: the runs differ in their seed (ours: 1, ours: 0, gdn: 0)"]
    assert {name: [sample["length"] for sample in own] for name, own in drawn.items()} == {
        "ours": [1024, 2048],
        "gdn": [1024],
    }


def test_figures_and_heat_maps_are_written(two, tmp_path):
    for folder, score in (("ours", 1.0), ("gdn", 0.0)):
        samples = tmp_path / folder / "samples"
        samples.mkdir()
        records = [
            {"index": n, "task": "niah_single_1", "length": length, "depth_percent": 10.0 * n, "score": score}
            for length in (1024, 4096)
            for n in range(10)
        ]
        records[0]["score"] = None
        for length in (1024, 4096):
            own = [json.dumps(record) for record in records if record["length"] == length]
            (samples / f"niah_single_1-L{length}.jsonl").write_text("\n".join([*own, '{"index": 3, "ta']))
    curve = [row(f"text T{n}", "lalte", "perplexity", 5.0, 4.0, 6.0, 60) for n in (64, 96, 128)]
    curve += [row(f"cache T{n}", "lalte", "bytes", 100, 100, 100, 1) for n in (64, 96, 128)]
    curve += [row(f"reading T{n}", "lalte", "ms", 0.5, 0.5, 0.5, 1) for n in (64, 96, 128)]
    run = write_run(tmp_path / "p", curve, name="perplexity")
    out = tmp_path / "compared"
    compare([f"lalte={two[0]}", f"gdn={two[1]}", f"lalte={run}"], out)
    names = {path.stem for path in out.iterdir() if path.suffix == ".png"}
    assert names == {
        "niah-niah_single_1-accuracy",
        "niah-niah_single_1-heatmap",
        "perplexity-text-perplexity",
        "perplexity-cache-bytes",
        "perplexity-reading-ms",
    }
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        words = "".join(xml.parse(out / f"{name}.svg").getroot().itertext())
        assert "lalte" in words
    assert "depth (%)" in "".join(xml.parse(out / "niah-niah_single_1-heatmap.svg").getroot().itertext())
    first = (out / "niah-niah_single_1-accuracy.svg").read_bytes()
    assert "![perplexity-text-perplexity.png]" in (out / "table.md").read_text()
    arguments = [f"lalte={two[0]}", f"gdn={two[1]}", f"lalte={run}"]
    with pytest.raises(ValueError, match="holds a comparison already"):
        compare(arguments, out)
    compare(arguments, out, overwrite=True)
    assert (out / "niah-niah_single_1-accuracy.svg").read_bytes() == first, "the same figure is the same file"


def test_bad_runs_are_named(two, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "list.json").write_text("[1]")
    rows = [{"case": "c", "system": "s", "metric": "speed", "median": 1, "n": 1}]
    (tmp_path / "metric.json").write_text(json.dumps({"rows": rows}))
    for name, words in (
        ("nowhere", "nowhere is not a file; give the folder"),
        ("empty", "run isn't finished"),
        ("text.json", "not readable as JSON"),
        ("list.json", "no result file: it needs rows"),
        ("metric.json", "unknown metric 'speed'"),
    ):
        with pytest.raises(ValueError, match=words):
            compare([str(tmp_path / name)], tmp_path / "out")
    with pytest.raises(ValueError, match="both give niah_single_1 L1024 of 'x'; name them apart as NAME=DIR"):
        compare([f"x={path}" for path in two], tmp_path / "out")
    with pytest.raises(ValueError, match="run: none given"):
        compare([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(two, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    compare_cli.add_arguments(parser)
    assert "NAME=DIR" in parser.format_help()
    assert compare_cli.run_from_arguments(parser.parse_args([*two, "--out", str(tmp_path / "out")])) == 0
    assert "no difference shown" in capsys.readouterr().out
    assert (tmp_path / "out/table.csv").read_text().startswith("evaluation,definition,case")


def test_the_bootstrap_covers_a_mean():
    import torch

    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(40):
        values = torch.randn(80, 1, generator=generator) + 2
        low, high = bootstrap(values.tolist(), lambda means: means[:, 0], draws=300, seed=seed)
        held += low <= 2 <= high
        assert low < float(values.mean()) < high
    assert 34 <= held <= 40
    assert bootstrap([[1.0]], lambda means: means[:, 0]) == (None, None), "one sample tells nothing"


def test_many_curves_are_told_apart(tmp_path):
    lines = [figures.Curve(f"model {i}", [1, 2], [0.1 * i, 0.1 * i], [None] * 2, [None] * 2) for i in range(9)]
    text = {"title": "t", "x_label": "x", "y_label": "y"}
    _, svg = figures.curves(tmp_path / "many", lines, metric="accuracy", **text)
    paths = [
        path.get("style", "")
        for path in xml.parse(svg).iter("{http://www.w3.org/2000/svg}path")
        if path.get("clip-path")
    ]
    looks = [style for style in paths if "stroke-width: 1.4" in style]
    assert len(looks) == len(set(looks)) == 9, "colours come back with other dashes"
