"""The recipes of the first results: one recipe for all members, and a wording that the evaluation never uses."""

import itertools
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from eval import needles as evaluation
from models.config import load_config as load_model_config
from models.info import describe
from training.config import ModelSection, load_config
from training.data import TrainingRows, check_data, plan_stages
from training.rows import IGNORED
from training.setup import model_config, split_batch
from training.sources import SourceConfig
from training.tokenizer import TokenizerConfig, train_tokenizer
from training.wording import ALTERNATIVES, TEMPLATES, NeedleConfig, variants, wordings

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "train"
MEMBERS = ("transformer", "gdn", "gdn-swa", "gdn-swa-wide", "gdn-full", "lansa", "lalte")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


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
    assert model_config(ours).straight_through == "presence_beyond_window"
    assert model_config(papers).straight_through == "all"
    changes = {"straight_through": "presence_beyond_window"}
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


@pytest.fixture(scope="module")
def stages():
    """Each stage of the recipe with its kinds of needle documents."""
    return [(stage, variants(stage.needles, "needles")) for stage in stages_of(recipe("lalte"))]


@pytest.fixture(scope="module")
def kinds(stages):
    return [kind for _, made in stages for kind in made]


def used_templates(kind):
    """The templates that documents of a kind are made of, by name."""
    many = kind.queries * kind.values > 1
    names = [name for name in TEMPLATES if name in ("needle", "answer") or name.endswith("_many") == many]
    return {name: getattr(kind, name) for name in names}


def every_wording(template):
    places = [part.split("|") if i % 2 else [part] for i, part in enumerate(re.split(ALTERNATIVES, template))]
    return map("".join, itertools.product(*places))


def count_wordings(kind):
    """Combinations of a preamble, a needle, a question and the beginning of its answer."""
    used = [text for name, text in used_templates(kind).items() if name != "answer"]
    return math.prod(len(match[1].split("|")) for text in used for match in ALTERNATIVES.finditer(text))


def is_generic(kind):
    """Whether a kind has so many wordings that hardly two documents share one."""
    return count_wordings(kind) > 100e6


def test_no_document_is_worded_as_the_evaluation_is(kinds):
    told = [evaluation.NOISE, evaluation.NEEDLE, evaluation._ONE, evaluation._MANY]
    told += [evaluation._ONE_ANSWER, evaluation._MANY_ANSWERS]
    theirs = set().union(*(phrases(text) for text in told))
    default = NeedleConfig()
    assert theirs & phrases(default.needle), "the check sees the default wording, which is the evaluation's"
    texts = {(name, text) for kind in kinds for name, text in used_templates(kind).items()}
    for name, template in texts:
        for text in every_wording(template):
            assert not theirs & phrases(text), text
            assert name == "answer" or text != getattr(default, name)
            assert not re.search(r"^ |  | $| [.,:;?!]|[.,:;?!][.,;?!]", text), text
    for kind in kinds:
        assert not theirs & phrases(kind.noise)
        assert kind.key_type in ("name", "nouns", "compound", "code")  # neither adjective-noun nor UUIDs
        assert not re.search("magic|special", " ".join(getattr(kind, name) for name in TEMPLATES))
    # a tokenizer sees the unused templates too
    assert "magic" not in " ".join(text for kind in kinds for text in wordings(kind, 0, 20))


def test_five_of_the_kinds_have_very_many_wordings(stages, kinds):
    generic = {kind.needle for kind in kinds if is_generic(kind)}
    others = {kind.needle: count_wordings(kind) for kind in kinds if kind.needle not in generic}
    assert (len(generic), len(others)) == (5, 13)
    assert all(is_generic(kind) for kind in kinds if kind.needle in generic)
    assert sum(others.values()) > 8_000
    for _, made in stages:
        assert 0.35 < sum(map(is_generic, made)) / len(made) < 0.45


def test_every_stage_has_single_keys_and_the_later_ones_whole_rows(stages):
    assert [stage.needles.fraction for stage, _ in stages] == [1.0, 0.9, 0.9, 0.9, 0.9]
    assert [stage.needles.keys[1] for stage, _ in stages] == [2, 4, 8, 16, 24]
    for number, (_, made) in enumerate(stages):
        assert all(kind.keys[0] == kind.queries and kind.questions[0] == 1 for kind in made)
        if number < 2:
            assert all(kind.length for kind in made)
            continue
        few = [kind for kind in made if kind.keys == [1, 4]]
        whole = [kind for kind in made if kind.length is None]
        assert 0.25 < len(few) / len(made) < 0.4
        assert 0.4 < len(whole) / len(made) < 0.6
        assert sum(map(is_generic, whole)) / len(whole) > 0.25
        figures = {kind.digits for kind in made if is_generic(kind) and kind.value_type == "number"}
        assert figures == set(range(4, 11))


def test_every_stage_gives_rows(texts, kinds, tmp_path):
    (tmp_path / "texts.txt").write_text("\n<end>\n".join(texts * 3))
    config = recipe("lalte")
    config.data.sources = [SourceConfig(path=str(tmp_path / "texts.txt"), separator="\n<end>\n")]
    config.data.cache_dir = str(tmp_path / "cache")
    tokenizer = train_tokenizer([*texts, *(text for kind in kinds for text in wordings(kind, 0, 60))], 2000)
    stages = stages_of(config)
    check_data(config.data, stages)
    rows = TrainingRows(config.data, stages, tokenizer, seed=0, progress=False)
    assert [stage.sequence_length for stage in stages] == [256, 256, 512, 1024, 2048]
    for number, stage in enumerate(stages):
        assert stage.rows * stage.sequence_length * (stage.step_rows // stage.rows) == config.batch.tokens_per_step
        seen = ""
        for maker in rows.makers[number]:
            row = maker.row(1)
            assert len(row.tokens) == stage.sequence_length
            assert len(tokenizer.decode(row.tokens[: row.ends[0]])) > 100
            if maker.config.length is None:
                assert row.ends[0] > 0.95 * stage.sequence_length
            seen += tokenizer.decode(row.tokens[row.labels != IGNORED]) + "\n"
        if number:
            assert re.search(r"(?<!\d)\d{7}(?!\d)", seen)
            assert UUID.search(seen)


def test_commands_of_the_design_use_a_tokenizer_that_they_trained(tmp_path):
    """The first command of each size trains one, and all others read it, each into a folder of its own."""
    text = (ROOT / "results" / "small" / "README.md").read_text()
    blocks = [block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "lalte train" in block]
    nano = next(block for block in blocks if "nano" in block)
    small = "".join(block for block in blocks if block != nano)
    data = next(line for line in small.splitlines() if line.startswith("DATA="))
    for block, prefix, runs in ((small, "", len(MEMBERS) + 5), (nano, "nano-", 3 * (len(MEMBERS) + 1))):
        # the command prints its arguments, each ended by a zero byte; nothing is made or copied
        script = f"set -eu; lalte() {{ printf '%s\\0' \"$@\" ''; }}; mkdir() {{ :; }}; cp() {{ :; }}\n{data}\n{block}"
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        commands = [command.split("\0") for command in done.stdout.split("\0\0")[:-1]]
        stems = {Path(file).stem.removesuffix("-plain") for _, file, *_ in commands}
        assert (len(commands), stems) == (runs, {prefix + member for member in (*MEMBERS, "lalte-all")})
        given = [dict(change.split("=", 1) for change in changes) for _, _, *changes in commands]
        assert len({change["output"] for change in given}) == runs
        trained = f"{given[0]['output']}/tokenizer"
        for number, (_, file, *changes) in enumerate(commands):
            changed = dict(c.removeprefix("model.overrides.").split("=") for c in changes if "overrides" in c)
            if number < 2 or changed or "plain" in file:  # to read every one takes seconds
                config = load_config(ROOT / file, changes)
                assert config.tokenizer.path == (trained if number else None)
                model = model_config(config)
                assert {name: str(getattr(model, name)) for name in changed} == changed
            else:
                assert given[number]["tokenizer.path"] == trained
