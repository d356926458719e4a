"""Configuration: defaults < file < command line, and errors that name the key."""

from dataclasses import replace
from pathlib import Path

import pytest

from training.config import ModelSection, TrainConfig, difference, load_config, save_config
from training.setup import model_config, split_batch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    def write_file(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write_file


BASE = "model: {config: m.json}\ndata: {sources: [{path: a.txt, weight: 2}], sequence_length: 64}\nsteps: 7\n"


def test_order_of_precedence(write):
    config = load_config(write(BASE), ["steps=9", "optimizer.lr=1e-4", "data.sources.0.path=b.txt"])
    assert (config.steps, config.optimizer.lr, config.data.sources[0].path) == (9, 1e-4, "b.txt")
    assert (config.data.sources[0].weight, config.data.sequence_length) == (2, 64)
    assert config.optimizer.betas == TrainConfig().optimizer.betas
    assert config.output == "runs/run"
    other = load_config(
        write(BASE + "output: here\n"), ["needles.keys=[2,4]", "model.overrides.window=9", "needles={digits: 3}"]
    )
    assert (other.output, other.needles.keys, other.needles.digits) == ("here", [2, 4], 3)
    assert other.model.overrides == {"window": 9}


def test_resolved_file_gives_the_same_configuration(write, tmp_path):
    config = load_config(write(BASE + "curriculum: [{until_step: 3, needles: {digits: 2}}]\n"), ["seed=5"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (BASE + "stepz: 3\n", [], r"run\.yaml: unknown key stepz; did you mean steps\?"),
        ("data: {sorces: []}\n", [], r"unknown key data\.sorces; did you mean data\.sources\?"),
        ("data: {sources: [{pth: x}]}\n", [], r"unknown key data\.sources\[0\]\.pth; did you mean .*path"),
        ("data: {sources: {path: x}}\n", [], r"run\.yaml: data\.sources holds keys and values: a list is expected"),
        ("model: {overrides: [1]}\n", [], r"run\.yaml: model\.overrides holds a list: keys and values are expected"),
        ("curriculum: [{needles: [1]}]\n", [], r"run\.yaml: curriculum\[0\]\.needles holds a list"),
        ("curriculum: [{until: 3}]\n", [], r"unknown key curriculum\[0\]\.until"),
        (BASE + "steps: many\n", [], r"steps: .*many"),
        (BASE, ["optimizer.learn=3"], r"unknown key optimizer\.learn; did you mean optimizer\.lr|known here"),
        (BASE, ["data.sources.0.wieght=3"], r"unknown key data\.sources\.0\.wieght; did you mean .*weight"),
        (BASE, ["data.sources.4.weight=3"], r"data\.sources\.4\.weight=3: "),
        (BASE, ["steps.more=3"], r"steps\.more=…: steps has no keys below it"),
        (BASE, ["steps"], r"'steps' is no change to the configuration: write key=value"),
        (BASE, ["steps=x"], r"steps=x: .*x"),
        (BASE, ["steps=0"], r"steps=0: use 1 or more"),
        (BASE, ["seed=-1"], r"seed=-1: use 0 to 4294967295"),
        (BASE, ["optimizer.lr=.inf"], r"optimizer\.lr=inf: use a positive learning rate"),
        (BASE, ["optimizer.eps=-1"], r"optimizer\.eps=-1\.0: use a small positive number"),
        (BASE, ["optimizer.weight_decay=.nan"], r"optimizer\.weight_decay=nan: use 0 or more"),
        (BASE, ["precision=fp16"], r"precision='fp16': use fp32 or bf16"),
        (BASE, ["optimizer.betas=[0.9]"], r"optimizer\.betas=\[0\.9\]"),
        ("steps: 3\n", [], r"model\.config=None: name a model configuration"),
        ("- a\n- b\n", [], r"holds list: keys and values are expected"),
        ("a: [\n", [], r"run\.yaml is no YAML"),
    ],
)
def test_errors_name_the_key(write, text, changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(text), changes)


def test_nothing_in_the_place_of_overrides(write, tmp_path):
    base = "model: {config: m.json, overrides: {window: 3}}\noptimizer: {lr: 0.5}\n"
    (tmp_path / "base.yaml").write_text(base)
    assert load_config(write(base), ["model.overrides={}"]).model.overrides == {}
    assert load_config(write(base), ["model.overrides={}", "model.overrides.sinks=1"]).model.overrides == {"sinks": 1}
    config = load_config(write("extends: base.yaml\nmodel: {overrides: {}}\noptimizer: {}\n"))
    assert config.model.overrides == {}
    assert (config.model.config, config.optimizer.lr) == ("m.json", 0.5)


def test_a_file_extends_another(write, tmp_path):
    (tmp_path / "base.yaml").write_text(BASE + "optimizer: {lr: 0.5, clip: 2}\ncurriculum: [{until_step: 3}]\n")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\noptimizer: {clip: 3}\nsteps: 8\n")
    config = load_config(write("extends: middle.yaml\ncurriculum: []\n"), ["optimizer.eps=1e-7"])
    o = config.optimizer
    assert (o.lr, o.clip, o.eps, config.steps, config.curriculum) == (0.5, 3, 1e-7, 8, [])
    assert config.data.sources[0].path == "a.txt"
    assert config.output == "runs/run"
    with pytest.raises(ValueError, match=r"gone\.yaml \(extends in .*run\.yaml\) is no file"):
        load_config(write("extends: gone.yaml\n"))
    (tmp_path / "base.yaml").write_text("extends: middle.yaml\n")
    with pytest.raises(ValueError, match=r"extends='middle\.yaml' in .*base\.yaml: the files extend each other"):
        load_config(tmp_path / "middle.yaml")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "base.yaml").write_text("extends: ../middle.yaml\n")
    (tmp_path / "middle.yaml").write_text("extends: other/base.yaml\n")
    with pytest.raises(ValueError, match=r"extends='middle\.yaml' in .*base\.yaml: the files extend each other"):
        load_config(tmp_path / "middle.yaml")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\noptimizer: {clip: 3}\nsteps: 8\n")
    (tmp_path / "base.yaml").write_text("stepz: 2\n")
    with pytest.raises(ValueError, match=r"base\.yaml: unknown key stepz"):
        load_config(tmp_path / "middle.yaml")


MEMBERS = ("transformer", "gdn", "gdn-swa", "gdn-full", "nsa", "lansa", "lalte")


@pytest.mark.parametrize("size", ["0.4b", "1.4b"])
def test_the_recipes_of_a_size_differ_only_in_the_model(size):
    recipes = {}
    for member in MEMBERS:
        config = load_config(ROOT / "configs" / "train" / f"{member}-{size}.yaml")
        assert config.model == ModelSection(config=f"configs/models/{member}-{size}.json")
        assert config.output == f"runs/{member}-{size}"
        recipes[member] = replace(config, model=ModelSection(), output="")
    assert all(recipe == recipes["lalte"] for recipe in recipes.values())


def test_the_sizes_differ_only_in_model_tokens_and_rows():
    small, large = (load_config(ROOT / "configs" / "train" / f"lalte-{size}.yaml") for size in ("0.4b", "1.4b"))
    tokens = [config.steps * config.batch.tokens_per_step for config in (small, large)]
    assert tokens == [pytest.approx(10e9, rel=1e-4), pytest.approx(30e9, rel=1e-4)]
    assert large.data.sources[0].hub_config == "sample-100BT"
    data = replace(large.data, sources=[replace(large.data.sources[0], hub_config="sample-10BT")])
    batch = replace(large.batch, sequences=small.batch.sequences)
    changed = {"model": small.model, "output": small.output, "steps": small.steps, "data": data, "batch": batch}
    assert replace(large, **changed) == small
    assert (small.optimizer.lr, small.optimizer.min_lr_ratio, small.optimizer.clip) == (3e-4, 0.1, 1.0)
    assert (small.data.sequence_length, small.batch.tokens_per_step) == (4096, 2**19)


@pytest.mark.parametrize(("world", "expected"), [(1, (8, 16)), (8, (8, 2)), (16, (8, 1)), (64, (2, 1))])
def test_a_recipe_fits_any_number_of_devices(world, expected):
    config = load_config(ROOT / "configs" / "train" / "lalte-0.4b.yaml")
    assert split_batch(config, world) == expected
    assert config.data.lanes % world == 0


def test_tokens_that_can_not_be_shared():
    config = load_config(ROOT / "configs" / "train" / "lalte-0.4b.yaml")
    with pytest.raises(ValueError, match=r"tokens_per_step=524288 .* each of 3 ranks: use a multiple of 12288"):
        split_batch(config, 3)
    with pytest.raises(ValueError, match=r"batch\.accumulation=2: leave it at 1"):
        load_config(ROOT / "configs" / "train" / "lalte-0.4b.yaml", ["batch.accumulation=2"])


def test_missing_file():
    with pytest.raises(ValueError, match=r"nowhere\.yaml is no file"):
        load_config("nowhere.yaml")


def test_a_full_disk_leaves_the_saved_configuration(write, tmp_path, monkeypatch):
    config, path = load_config(write(BASE)), tmp_path / "saved.yaml"
    save_config(config, path)
    whole, write_text = path.read_text(), Path.write_text

    def full(self, text, **more):
        write_text(self, text[:9], **more)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        save_config(config, path)
    assert path.read_text() == whole
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_difference_names_the_first_key_that_matters(write, tmp_path):
    config = load_config(write(BASE))
    save_config(config, tmp_path / "config.yaml")
    free = load_config(
        write(BASE),
        ["output=there", "log.every=1", "data.workers=3", "fsdp=true", "batch={sequences: 1, accumulation: 9}"],
    )
    assert difference(tmp_path / "config.yaml", free) is None
    other = load_config(write(BASE), ["data.sources.0.weight=3"])
    assert difference(tmp_path / "config.yaml", other) == "data.sources[0].weight (there 2.0, now 3.0)"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_describes_a_model(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    model = model_config(config)
    assert model.max_position_embeddings == config.data.sequence_length
    assert (config.steps or 0) > 0
