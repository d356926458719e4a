"""The recipes of the first results: one recipe for all members, and a wording that the evaluation never uses."""

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval import needles as evaluation
from models.config import load_config as load_model_config
from models.info import describe
from training.config import ModelSection, load_config
from training.data import TrainingRows, check_data, plan_stages
from training.setup import model_config, split_batch
from training.sources import SourceConfig
from training.tokenizer import TokenizerConfig, train_tokenizer
from training.wording import ALTERNATIVES, TEMPLATES, NeedleConfig, choose_wording, variants, wordings

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "train"
MEMBERS = ("transformer", "gdn", "gdn-swa", "gdn-swa-wide", "gdn-full", "lansa", "lalte")


def recipe(name):
    return load_config(RECIPES / "small" / f"{name}.yaml")


def stages_of(config):
    rows, parts = split_batch(config, 1)
    batch = {"sequences": rows, "parts": parts, "tokens_per_step": config.batch.tokens_per_step}
    return plan_stages(config.data, config.needles, config.curriculum, steps=config.steps, **batch)


@pytest.mark.parametrize("prefix", ["", "nano-"])
def test_members_differ_only_in_the_model(prefix):
    recipes = {member: recipe(prefix + member) for member in MEMBERS}
    assert len(set(path.stem for path in (RECIPES / "small").glob("*.yaml"))) == 2 * len(MEMBERS) + 4
    common = [replace(config, model=ModelSection(), output="") for config in recipes.values()]
    assert all(config == common[0] for config in common)
    tokens = common[0].steps * common[0].batch.tokens_per_step
    assert tokens >= (100e6 if prefix else 200e6)
    models = {member: model_config(config) for member, config in recipes.items()}
    memory = models["lalte"].sinks + models["lalte"].window + models["lalte"].budget
    assert (models["gdn-swa"].window, models["gdn-swa-wide"].window) == (models["lalte"].window, memory)
    assert models["lansa"].nsa_selected_blocks * models["lansa"].nsa_block_size + models["lansa"].nsa_window < memory
    assert {model.vocab_size for model in models.values()} == {common[0].tokenizer.train_vocab_size}
    assert {model.max_position_embeddings for model in models.values()} == {2048}
    sizes = [describe(model).total for model in models.values()]
    assert max(sizes) < (1.1 if prefix else 1.02) * min(sizes)


@pytest.mark.parametrize("prefix", ["", "nano-"])
def test_the_papers_gradients_are_a_recipe_of_their_own(prefix):
    ours, papers = recipe(f"{prefix}lalte"), recipe(f"{prefix}lalte-all")
    assert model_config(ours).straight_through == "beyond_window"
    assert model_config(papers).straight_through == "all"
    changes = {"straight_through": "beyond_window"}
    model = replace(papers.model, overrides={**papers.model.overrides, **changes})
    assert replace(papers, model=model, output=ours.output) == ours


def test_small_models_are_named_by_their_recipes():
    for member in MEMBERS:
        config = recipe(member)
        assert config.model.config == f"configs/models/{member}-small.json"
        assert 30e6 < describe(load_model_config(ROOT / config.model.config)).total < 45e6


@pytest.mark.parametrize("member", ["lalte", "gdn"])
def test_plain_recipes_have_the_same_steps_and_no_needles(member):
    plain, mixed = recipe(f"{member}-plain"), recipe(member)
    there, here = stages_of(plain), stages_of(mixed)
    assert [replace(stage, needles=NeedleConfig()) for stage in there] == [
        replace(stage, needles=NeedleConfig()) for stage in here
    ]
    assert all(stage.needles.fraction == 0 for stage in there)
    assert all(stage.needles.fraction > 0 for stage in here)
    same = {"needles": mixed.needles, "curriculum": mixed.curriculum, "output": mixed.output}
    assert plain.tokenizer == TokenizerConfig(path="runs/small/lalte/tokenizer")
    assert replace(plain, tokenizer=mixed.tokenizer, **same) == mixed


def phrases(text, count=4):
    """All runs of `count` words, without what a template fills in."""
    found = []
    for part in re.split(r"\{\w+\}s?", text):
        words = re.findall(r"[a-z']+", part.lower())
        found += [tuple(words[i : i + count]) for i in range(len(words) - count + 1)]
    return set(found)


def kinds_of(config):
    return [kind for stage in stages_of(config) for kind in variants(stage.needles, "needles")]


def count_wordings(kind):
    """Combinations of a preamble, a needle, a question and the beginning of its answer."""
    label = "{}_many" if kind.queries * kind.values > 1 else "{}"
    used = [kind.needle, *(getattr(kind, label.format(name)) for name in ("preamble", "question", "prefix"))]
    return math.prod(len(match[1].split("|")) for text in used for match in ALTERNATIVES.finditer(text))


def test_no_document_is_worded_as_the_evaluation_is():
    told = [evaluation.NOISE, evaluation.NEEDLE, evaluation._ONE, evaluation._MANY]
    told += [evaluation._ONE_ANSWER, evaluation._MANY_ANSWERS]
    theirs = set().union(*(phrases(text) for text in told))
    default = NeedleConfig()
    assert theirs & phrases(default.needle), "the check sees the default wording, which is the evaluation's"
    kinds = kinds_of(recipe("lalte"))
    rng = np.random.default_rng(0)
    for kind in kinds:
        assert not theirs & phrases(kind.noise)
        many = kind.queries * kind.values > 1
        used = [name for name in TEMPLATES if name in ("needle", "answer") or name.endswith("_many") == many]
        for one in (choose_wording(rng, kind) for _ in range(100)):
            for name in used:
                text = getattr(one, name)
                assert not theirs & phrases(text), text
                assert name == "answer" or text != getattr(default, name)
        # neither adjective-noun nor UUIDs (which have groups of 8, 4, 4, 4 and 12), and no number of seven figures
        assert kind.key_type in ("name", "nouns", "compound", "code")
        assert kind.value_type in ("number", "hex", "serial", "word")
        assert kind.digits != 7 or kind.value_type == "word"
    # a tokenizer sees the unused templates too
    assert "magic" not in " ".join(text for kind in kinds for text in wordings(kind, 0, 20))
    wording = {kind.needle: count_wordings(kind) for kind in kinds}
    assert len(wording) == 13
    assert sum(wording.values()) > 8_000


def test_every_stage_gives_rows(texts, tmp_path):
    (tmp_path / "texts.txt").write_text("\n<end>\n".join(texts * 3))
    config = recipe("lalte")
    config.data.sources = [SourceConfig(path=str(tmp_path / "texts.txt"), separator="\n<end>\n")]
    config.data.cache_dir = str(tmp_path / "cache")
    kinds = kinds_of(config)
    tokenizer = train_tokenizer([*texts, *(text for kind in kinds for text in wordings(kind, 0, 60))], 2000)
    stages = stages_of(config)
    check_data(config.data, stages)
    rows = TrainingRows(config.data, stages, tokenizer, seed=0, progress=False)
    assert [stage.sequence_length for stage in stages] == [256, 256, 512, 1024, 2048]
    for number, stage in enumerate(stages):
        assert stage.rows * stage.sequence_length * (stage.step_rows // stage.rows) == config.batch.tokens_per_step
        for maker in rows.makers[number]:
            row = maker.row(1)
            assert len(row.tokens) == stage.sequence_length
            assert len(tokenizer.decode(row.tokens[: row.ends[0]])) > 100


def test_commands_of_the_design_use_a_tokenizer_that_they_trained():
    """The first command of each size trains one, and all others read it, each into a folder of its own."""
    text = (ROOT / "results" / "small" / "README.md").read_text()
    blocks = [block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "lalte train" in block]
    small, nano = sorted(blocks, key=lambda block: "nano" in block)
    data = next(line for line in small.splitlines() if line.startswith("DATA="))
    for block, prefix, runs in ((small, "", len(MEMBERS) + 3), (nano, "nano-", 3 * (len(MEMBERS) + 1))):
        # the command prints its arguments, each ended by a zero byte
        script = f"set -eu; lalte() {{ printf '%s\\0' \"$@\" ''; }}\n{data}\n{block}"
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        commands = [command.split("\0") for command in done.stdout.split("\0\0")[:-1]]
        stems = {Path(file).stem.removesuffix("-plain") for _, file, *_ in commands}
        assert (len(commands), stems) == (runs, {prefix + member for member in (*MEMBERS, "lalte-all")})
        given = [dict(change.split("=", 1) for change in changes) for _, _, *changes in commands]
        assert len({change["output"] for change in given}) == runs
        trained = f"{given[0]['output']}/tokenizer"
        for number, (_, file, *changes) in enumerate(commands):
            if number < 2 or "plain" in file:  # to read every one takes seconds
                assert load_config(ROOT / file, changes).tokenizer.path == (trained if number else None)
            else:
                assert given[number]["tokenizer.path"] == trained
