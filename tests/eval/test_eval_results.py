"""Result files, intervals, logs, tables and figures."""

import json
import math

import pytest

from eval import results, tables
from eval.results import SampleLog, claim_folder, result, row, wilson, write_bytes, write_json


def test_wilson_against_known_values():
    low, high = wilson(8, 10)
    assert math.isclose(low, 0.49016, abs_tol=1e-4)
    assert math.isclose(high, 0.94332, abs_tol=1e-4)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    for k in range(8):
        low, high = wilson(k, 7)
        assert 0 <= low <= k / 7 <= high <= 1
    with pytest.raises(ValueError, match="n must be at least 1"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="successes"):
        wilson(3, 2)


def test_result_has_the_agreed_fields():
    rows = [row("a L5", "lalte", "accuracy", 0.5, 0.1, 0.9, 4)]
    content = result("niah", rows, config={"seed": 1}, device="cpu", definition="d")
    assert {"name", "device", "versions", "commit", "date", "config", "rows"} <= content.keys()
    assert content["rows"][0].keys() == {"case", "system", "metric", "median", "low", "high", "n"}
    assert "torch" in content["versions"]
    assert content["device"].startswith("cpu")
    json.dumps(content)
    with pytest.raises(ValueError, match="metric: 'recall'"):
        row("a", "lalte", "recall", 0, 0, 0, 1)


def test_files_are_whole_and_not_replaced_silently(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="exists already"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 3}, overwrite=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")}, overwrite=True)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        write_bytes(path, b"new", overwrite=True)
    assert json.loads(path.read_text()) == {"a": 3}
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_a_folder_belongs_to_one_run(tmp_path):
    settings = {"seed": 1, "lengths": (1, 2)}
    claim_folder(tmp_path, settings, resume=True)
    claim_folder(tmp_path, settings, resume=True)
    with pytest.raises(ValueError, match="seed is 1 there and 2 here"):
        claim_folder(tmp_path, settings | {"seed": 2}, resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        claim_folder(tmp_path, settings, resume=False)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: not readable"):
        claim_folder(tmp_path, settings, resume=True)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"without settings\.json"):
        claim_folder(tmp_path, settings, resume=True)
    with pytest.raises(ValueError, match="is a file"):
        claim_folder(tmp_path / "result.json", settings, resume=True)


def test_sample_log_survives_a_kill(tmp_path):
    path = tmp_path / "s" / "log.jsonl"
    with SampleLog(path) as log:
        log.append({"index": 0, "score": 1.0})
        log.append({"index": 1, "score": None})
    with open(path, "a") as file:
        file.write('{"index": 2, "sco')
    with SampleLog(path) as log:
        assert log.records == {0: {"index": 0, "score": 1.0}, 1: {"index": 1, "score": None}}
        log.append({"index": 1, "score": 0.0})
    assert SampleLog(path).records[1]["score"] == 0.0
    path.write_text('{"index": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        SampleLog(path)


ROWS = [
    row("niah_single_1 L1024", "lalte", "accuracy", 0.95, 0.9, 0.98, 100),
    row("niah_single_1 L512", "lalte", "accuracy", 1.0, 0.96, 1.0, 100),
    row("niah_single_2 L512", "lalte", "accuracy", 0.5, 0.4, 0.6, 100),
    row("niah_single_2 L512", "lalte", "bytes", 5, 5, 5, 1),
]


def test_tables(capsys):
    assert tables.markdown_table(ROWS).splitlines() == [
        "| task | 512 | 1024 |",
        "|---|---|---|",
        "| niah_single_1 | 1.000 [0.96, 1.00] | 0.950 [0.90, 0.98] |",
        "| niah_single_2 | 0.500 [0.40, 0.60] | - |",
    ]
    tables.print_table(ROWS)
    shown = capsys.readouterr().out
    assert "0.950 [0.90, 0.98]" in shown
    assert "1024 tokens" in shown
    other = row("niah_single_1 L512", "gdn", "accuracy", 0.1, 0.0, 0.2, 100)
    assert "| gdn niah_single_1 | 0.100" in tables.markdown_table([*ROWS, other])


def test_depth_grid_and_heat_map(tmp_path):
    samples = [
        {"depth_percent": 0.0, "length": 5, "score": 1.0},
        {"depth_percent": 9.9, "length": 5, "score": 0.0},
        {"depth_percent": 100.0, "length": 7, "score": 0.25},
        {"depth_percent": 50.0, "length": 7, "score": None},
    ]
    grid = tables.depth_grid(samples, [5, 7])
    assert len(grid) == 10
    assert grid[0] == [0.5, None]
    assert grid[9] == [None, 0.25]
    assert all(line == [None, None] for line in grid[1:9])
    path = tmp_path / "map.png"
    tables.heat_map(path, samples, [5, 7], "a task")
    from matplotlib.image import imread

    image = imread(path)
    assert min(image.shape[:2]) > 200
    assert image[..., :3].std() > 0.05  # something is drawn
    with pytest.raises(ValueError, match="exists already"):
        tables.heat_map(path, samples, [5, 7], "a task")
