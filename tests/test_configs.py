"""The shipped configurations are found from any folder, in a checkout and where the project is installed."""

import shutil
import tomllib
from pathlib import Path

import pytest

import lalte
from models.config import load_config
from models.files import config_path

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(file for file in (ROOT / "configs").rglob("*") if file.is_file())


def test_a_name_is_that_of_the_working_folder_first(tmp_path, monkeypatch):
    name = "configs/models/lalte-tiny.json"
    monkeypatch.chdir(tmp_path)
    assert config_path(name) == ROOT / name
    assert config_path("configs/models/none.json") == Path("configs/models/none.json")
    for other in ("models/lalte-tiny.json", "lalte-tiny.json", str(tmp_path / name)):
        assert config_path(other) == Path(other), "nothing but configs/ is looked for elsewhere"
    (tmp_path / "configs" / "models").mkdir(parents=True)
    text = (ROOT / name).read_text()
    (tmp_path / name).write_text(text.replace('"vocab_size": ', '"vocab_size": 1'))
    assert config_path(name) == Path(name)
    assert load_config(name).vocab_size != load_config(ROOT / name).vocab_size


def test_commands_find_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert lalte.main(["info", "configs/models/lalte-0.4b.json"]) == 0
    assert "360,246,144" in capsys.readouterr().out
    assert lalte.main(["train", "configs/train/lalte-1.4b.yaml", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "config: configs/models/lalte-1.4b.json" in shown
    assert "output: runs/lalte-1.4b" in shown
    assert lalte.main(["eval", "niah", "--config", "configs/eval/none.yaml", "--out", "x"]) == 2
    assert "config: configs/eval/none.yaml is not a file" in capsys.readouterr().err
    command = ["eval", "niah", "--config", "configs/eval/niah.yaml", "--model", "none", "--out", "x"]
    assert lalte.main(command) == 2
    assert "none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_own_recipes_extend_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("extends: configs/train/gdn-0.4b.yaml\nsteps: 77\n")
    assert lalte.main(["train", "mine.yaml", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 77\n" in shown
    assert "config: configs/models/gdn-0.4b.json" in shown
    for name in ("configs/train/none.yaml", "none.yaml"):
        Path("mine.yaml").write_text(f"extends: {name}\n")
        assert lalte.main(["train", "mine.yaml", "--show"]) == 2
        assert f"{name} (extends in mine.yaml) is no file" in capsys.readouterr().err


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_they_are_installed_with_the_project(file):
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ".".join(file.parent.relative_to(ROOT).parts)
    assert package in setup["packages"]
    assert any(file.match(pattern) for pattern in setup["package-data"][package])


def test_a_copy_of_the_packages_has_its_own(tmp_path, monkeypatch):
    """As in site-packages, where the folder lies beside the packages."""
    (tmp_path / "site" / "configs").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "train" / "tiny.yaml", tmp_path / "site" / "configs")
    monkeypatch.setattr("models.files.__file__", str(tmp_path / "site" / "models" / "files.py"))
    monkeypatch.chdir(tmp_path)
    assert config_path("configs/tiny.yaml") == tmp_path / "site" / "configs" / "tiny.yaml"
