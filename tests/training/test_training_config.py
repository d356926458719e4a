"""Configuration: defaults < file < command line, and errors that name the key."""

import pytest

from training.config import TrainConfig, difference, load_config, save_config


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
        ("curriculum: [{until: 3}]\n", [], r"unknown key curriculum\[0\]\.until"),
        (BASE + "steps: many\n", [], r"steps: .*many"),
        (BASE, ["optimizer.learn=3"], r"unknown key optimizer\.learn; did you mean optimizer\.lr|known here"),
        (BASE, ["data.sources.0.wieght=3"], r"unknown key data\.sources\.0\.wieght; did you mean .*weight"),
        (BASE, ["data.sources.4.weight=3"], r"data\.sources\.4\.weight=3: "),
        (BASE, ["steps.more=3"], r"steps\.more=…: steps has no keys below it"),
        (BASE, ["steps"], r"'steps' is no change to the configuration: write key=value"),
        (BASE, ["steps=x"], r"steps=x: .*x"),
        (BASE, ["steps=0"], r"steps=0: use 1 or more"),
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


def test_missing_file():
    with pytest.raises(ValueError, match=r"nowhere\.yaml is no file"):
        load_config("nowhere.yaml")


def test_difference_names_the_first_key_that_matters(write, tmp_path):
    config = load_config(write(BASE))
    save_config(config, tmp_path / "config.yaml")
    free = load_config(write(BASE), ["output=there", "log.every=1", "checkpoint.keep=9", "data.workers=3"])
    assert difference(tmp_path / "config.yaml", free) is None
    other = load_config(write(BASE), ["data.sources.0.weight=3"])
    assert difference(tmp_path / "config.yaml", other) == "data.sources[0].weight (there 2.0, now 3.0)"
