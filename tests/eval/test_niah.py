"""The needle runner: generation, scores, resuming, failures, its command, and loading."""

import argparse
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import loading, needles, niah_cli
from eval.answering import answer, encode_prompts
from eval.evaporate_cli import EvaporateConfig
from eval.niah import run_niah
from eval.perplexity_cli import PerplexityConfig
from eval.settings import resolve

LENGTHS = [700, 900]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the noise line."""
    cutter = Tokenizer(token_models.BPE())
    cutter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cutter.train_from_iterator([needles.NOISE, needles._ONE, needles.NEEDLE, needles._ONE_ANSWER], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=cutter, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


class Reader(torch.nn.Module):
    """Finds the needle by reading the prompt; `wrong` prompts get another answer, `failing` ones an error."""

    def __init__(self, tokenizer, wrong=(), failing=(), out_of_memory_above=10**9):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(model_type="reader")
        self.tokenizer, self.wrong, self.failing = tokenizer, wrong, failing
        self.out_of_memory_above = out_of_memory_above
        self.rule, self.seen, self.batches = ("lte", 5), [], []

    @contextmanager
    def with_retention(self, retention, budget):
        own = self.rule
        self.rule = (retention or own[0], own[1] if budget is None else budget)
        yield
        self.rule = own

    def generate(self, input_ids, attention_mask, generation_config):
        assert not generation_config.do_sample
        assert not self.training
        assert (attention_mask[:, -1] == 1).all()
        self.batches.append(len(input_ids))
        if len(input_ids) > self.out_of_memory_above:
            raise torch.cuda.OutOfMemoryError("out of memory")
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask.bool()])
            self.seen.append(self.rule)
            key = re.search(r"for (\S+) mentioned in the provided text (?:is|are)$", text)[1]
            value = re.search(rf"for {re.escape(key)} is: (\S+)\.", text)[1]
            if value in self.failing:
                raise RuntimeError(f"cannot read {value}")
            said = "1" if value in self.wrong else f" {value}. And more"
            rows.append([*self.tokenizer(said).input_ids, self.tokenizer.eos_token_id])
        width = max(map(len, rows))
        junk = self.tokenizer(" 5 and 7").input_ids[:1]  # whatever a model writes after its end
        tail = [row + junk * (width + 1 - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(tail)], 1)


def values(tokenizer, length, samples=6, seed=3):
    return [sample.outputs[0] for sample in needles.make_samples("single_1", tokenizer, length, samples, seed)]


def only_in(tokenizer, length):
    """Values that no prompt of the other length asks for."""
    (other,) = set(LENGTHS) - {length}
    found = [value for value in values(tokenizer, length) if value not in values(tokenizer, other)]
    assert len(found) >= 2
    return found


def run(model, tokenizer, out, **changes):
    arguments = {"tasks": ["single_1"], "lengths": LENGTHS, "samples": 6, "seed": 3, "batch_size": 4} | changes
    return run_niah(model, tokenizer, out_dir=out, progress=False, **arguments)


def test_right_and_wrong_answers_are_counted(tokenizer, tmp_path):
    wrong = only_in(tokenizer, 700)[:2] + only_in(tokenizer, 900)[:1]
    model = Reader(tokenizer, wrong=wrong).train()
    content = run(model, tokenizer, tmp_path / "out", tasks=["single_1", "niah_multikey_2"])
    assert model.training
    cases = {row["case"]: row for row in content["rows"]}
    assert list(cases) == [f"niah_{task} L{n}" for task in ("single_1", "multikey_2") for n in LENGTHS]
    assert cases["niah_single_1 L700"]["median"] == pytest.approx(4 / 6)
    assert cases["niah_single_1 L900"]["median"] == pytest.approx(5 / 6)
    assert cases["niah_multikey_2 L900"] == {
        "case": "niah_multikey_2 L900",
        "system": "reader",
        "metric": "accuracy",
        "median": 1.0,
        "low": pytest.approx(0.6097, abs=1e-3),
        "high": 1.0,
        "n": 6,
    }
    assert content == json.loads((tmp_path / "out/result.json").read_text())
    assert content["definition"] == needles.DEFINITION
    assert content["seed"] == 3
    lines = (tmp_path / "out/samples/niah_single_1-L700.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == list(range(6))
    assert [r["score"] for r in records] == [float(r["expected"][0] not in wrong) for r in records]
    right = next(record for record in records if record["score"])
    assert right["prediction"] == f" {right['expected'][0]}. And more"
    assert next(record for record in records if not record["score"])["prediction"] == "1"
    assert "prompt" not in records[0]
    assert (tmp_path / "out/heatmap-niah_multikey_2.png").read_bytes().startswith(b"\x89PNG")
    assert "| niah_single_1 | 0.667" in (tmp_path / "out/table.md").read_text()


def test_an_interrupted_run_continues(tokenizer, tmp_path):
    whole = run(Reader(tokenizer), tokenizer, tmp_path / "whole", save_prompts=True)
    model = Reader(tokenizer)
    model.generate, generate = lambda **_: (_ for _ in ()).throw(KeyboardInterrupt), model.generate
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, tmp_path / "cut", save_prompts=True)
    # as if killed while the fourth sample was written
    lines = (tmp_path / "whole/samples/niah_single_1-L700.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut/samples").mkdir()
    (tmp_path / "cut/samples/niah_single_1-L700.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    model.generate = generate
    again = run(model, tokenizer, tmp_path / "cut", save_prompts=True)
    assert again["rows"] == whole["rows"]
    assert model.batches == [3, 4, 2]  # three were there already
    for length in LENGTHS:
        name = f"samples/niah_single_1-L{length}.jsonl"
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    model.batches.clear()
    assert run(model, tokenizer, tmp_path / "cut", save_prompts=True)["rows"] == whole["rows"]
    assert model.batches == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed is 3 there and 4 here"),
        ({"samples": 7}, "samples"),
        ({"budget": 1}, "budget is None there and 1 here"),
        ({"new_tokens": 64}, "new_tokens"),
        ({"lengths": [700]}, "lengths"),
        ({"resume": False}, "holds a run already"),
    ],
)
def test_a_folder_of_another_run_is_refused(tokenizer, tmp_path, change, named):
    run(Reader(tokenizer), tokenizer, tmp_path)
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ValueError, match=named):
        run(Reader(tokenizer), tokenizer, tmp_path, **change)
    assert (tmp_path / "result.json").read_bytes() == before


def test_another_state_of_the_same_model_is_refused(tokenizer, tmp_path):
    model = Reader(tokenizer)
    run(model, tokenizer, tmp_path, samples=1)
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(ValueError, match="model is 'Reader"):
        run(model, tokenizer, tmp_path, samples=1)


def test_a_failing_sample_is_recorded_and_tried_again(tokenizer, tmp_path, capsys):
    bad = only_in(tokenizer, 700)[0]
    content = run(Reader(tokenizer, failing=[bad]), tokenizer, tmp_path)
    assert [row["n"] for row in content["rows"]] == [5, 6]
    assert [row["median"] for row in content["rows"]] == [1.0, 1.0]
    assert [cell["errors"] for cell in content["cells"]] == [1, 0]
    assert content["warnings"][0].endswith(f"(the first: RuntimeError: cannot read {bad})")
    assert "1 of 6 samples failed" in content["warnings"][0]
    path = tmp_path / "samples/niah_single_1-L700.jsonl"
    record = next(r for r in map(json.loads, path.read_text().splitlines()) if r["expected"] == [bad])
    assert record["error"] == f"RuntimeError: cannot read {bad}"
    assert record["score"] is None
    content = run(Reader(tokenizer), tokenizer, tmp_path)
    assert [row["n"] for row in content["rows"]] == [6, 6]
    assert content["warnings"] == []


def test_a_batch_too_large_for_the_memory_goes_one_by_one(tokenizer, tmp_path):
    model = Reader(tokenizer, out_of_memory_above=1)
    content = run(model, tokenizer, tmp_path, lengths=[700])
    assert content["rows"][0]["n"] == 6
    assert model.batches == [4, 1, 1, 1, 1, 2, 1, 1]


def test_a_run_without_hope_ends(tokenizer, tmp_path):
    model = Reader(tokenizer, failing=values(tokenizer, 700, samples=20))
    with pytest.raises(RuntimeError, match="the first 8 samples all failed: RuntimeError: cannot read"):
        run(model, tokenizer, tmp_path, samples=20)


def test_failed_samples_of_an_accepted_run_are_no_reason_to_end_the_next(tokenizer, tmp_path):
    own = values(tokenizer, 700, samples=20)
    bad = own[5:17]
    run(Reader(tokenizer, failing=bad), tokenizer, tmp_path, samples=20, lengths=[700])
    content = run(Reader(tokenizer, failing=bad[:10]), tokenizer, tmp_path, samples=20, lengths=[700])
    assert content["cells"][0]["errors"] == 10
    assert content["rows"][0]["n"] == 10


def test_budget_and_policy_are_set_and_restored(tokenizer, tmp_path):
    model = Reader(tokenizer)
    run(model, tokenizer, tmp_path, budget=0, lengths=[700])
    assert set(model.seen) == {("lte", 0)}
    assert model.rule == ("lte", 5)
    content = run(model, tokenizer, tmp_path / "h2o", retention="h2o", lengths=[700])
    assert set(model.seen) == {("lte", 0), ("h2o", 5)}
    assert (model.rule, content["config"]["retention"]) == (("lte", 5), "h2o")
    with pytest.raises(ValueError, match="retention is 'h2o' there and None here"):
        run(model, tokenizer, tmp_path / "h2o", lengths=[700])
    with pytest.raises(ValueError, match="budget: -1"):
        run(model, tokenizer, tmp_path / "other", budget=-1)


def test_budget_of_a_model_without_retention(tokenizer, llama, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM retains no tokens"):
        run(llama, tokenizer, tmp_path / "out", budget=3)
    with pytest.raises(ValueError, match="retention: LlamaForCausalLM retains no tokens; leave retention out"):
        run(llama, tokenizer, tmp_path / "out", retention="h2o")
    assert not (tmp_path / "out").exists()


def test_a_short_prompt_in_a_long_length_is_told(tokenizer, tmp_path):
    content = run(Reader(tokenizer), tokenizer, tmp_path, lengths=[900], step=100)
    assert "the haystack grows in steps too large" in content["warnings"][0]
    assert content["definition"].endswith("changed: haystack step 100")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tasks": ["single_9"]}, "single_9"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["single_1", "niah_single_1"]}, "each once"),
        ({"lengths": []}, "lengths"),
        ({"lengths": [700, 700]}, "lengths"),
        ({"lengths": [700, 100]}, "length: 100"),
        ({"samples": 0}, "samples"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments_are_named_before_any_work(tokenizer, tmp_path, change, named):
    model = Reader(tokenizer)
    with pytest.raises(ValueError, match=named):
        run(model, tokenizer, tmp_path / "out", **change)
    assert model.batches == []
    assert not (tmp_path / "out").exists()


def test_prompts_are_padded_at_the_left_and_never_end_a_text(tokenizer):
    ids, mask = encode_prompts(tokenizer, ["The grass", "The grass is green."])
    assert mask[1].all()
    assert not mask[0, 0]
    assert (ids[0][mask[0] == 0] == tokenizer.pad_token_id).all()
    plain = SimpleNamespace(eos_token_id=9, pad_token_id=None)
    ending = lambda text, verbose: SimpleNamespace(input_ids=[1, 2, 9])
    ids, _ = encode_prompts(type("T", (), {"__call__": staticmethod(ending), **vars(plain)})(), ["a"])
    assert ids.tolist() == [[1, 2]]


def test_answers_are_greedy_and_don_t_depend_on_the_batch(tokenizer, llama):
    texts = ["The grass is green. The sky", "Here we go. There and back again. The sun is", "There"]
    together = answer(llama, tokenizer, texts, 9)
    assert together == [answer(llama, tokenizer, [text], 9)[0] for text in texts]
    ids = tokenizer(texts[1], return_tensors="pt").input_ids
    for _ in range(9):  # one token after another, without a cache
        ids = torch.cat([ids, llama(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    new = ids[0, len(tokenizer(texts[1]).input_ids) :].tolist()
    assert tokenizer.eos_token_id not in new
    assert together[1] == tokenizer.decode(new, skip_special_tokens=True)


def test_a_model_s_own_generation_settings_don_t_count(tokenizer, llama, monkeypatch):
    texts = ["Here we go. There and back again. The sun is"]
    plain = answer(llama, tokenizer, texts, 5)
    first = tokenizer(plain[0]).input_ids
    habits = GenerationConfig(suppress_tokens=first, do_sample=True, temperature=9.0, eos_token_id=5)
    monkeypatch.setattr(llama, "generation_config", habits)
    assert answer(llama, tokenizer, texts, 5) == plain
    assert llama.generation_config is habits


def test_a_real_model_runs(tokenizer, llama, tmp_path):
    content = run(llama, tokenizer, tmp_path, samples=2, lengths=[700], new_tokens=5)
    assert content["rows"][0]["median"] == 0.0
    assert content["rows"][0]["system"] == "llama"
    assert content["definition"].endswith("changed: 5 new tokens")


@pytest.fixture
def folder(tokenizer, llama, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load_model(folder, llama):
    model, tokenizer = loading.load_model(folder, "bfloat16", "cpu")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == 400
    same, _ = loading.load_model(folder, "float32", "cpu")
    assert torch.equal(same.lm_head.weight, llama.lm_head.weight)
    assert loading.model_identity(same) == loading.model_identity(loading.load_model(folder, "float32", "cpu")[0])
    assert loading.model_identity(same) != loading.model_identity(model)


def test_gguf_files_that_can_not_be_loaded(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for name, words in (
        ("nowhere.gguf", "is no file; give a GGUF file"),
        ("broken.gguf", "needs the packages gguf|can't be loaded"),
    ):
        with pytest.raises(ValueError, match=rf"{name} .*({words})"):
            loading.load_model(tmp_path / name, "auto", "cpu")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda f: f.rename(f.with_name("gone")), "is no folder"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer in .* can't be read"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer in .* can't be read"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-99]),
            r"model\.safetensors is truncated",
        ),
        (
            lambda f: _edit(f / "config.json", num_hidden_layers=2),
            "don't fit its config.json: 9 tensors of the model are missing",
        ),
        (
            lambda f: _edit(f / "config.json", vocab_size=300),
            "tokenizer .* has 400 entries, the model's vocab_size is 300",
        ),
        (lambda f: _edit(f / "config.json", vocab_size=500), "don't fit its config.json: .* another shape"),
        (lambda f: _edit(f / "config.json", model_type="unheard"), r"config\.json can't be used \(.*unheard"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json can't be read"),
    ],
)
def test_a_harmed_folder_gets_one_clear_error(folder, harm, named):
    harm(folder)
    with pytest.raises(ValueError, match=named):
        loading.load_model(folder, "auto", "cpu")


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_without_finite_logits_is_refused(folder):
    """Its answers would count as wrong ones."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 0] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the logits of .* in torch\.float32 are not finite; its weights"):
        loading.load_model(folder, device="cpu")


def test_bad_dtype_device_and_too_large_a_tokenizer(folder, tokenizer):
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        loading.load_model(folder, "int8", "cpu")
    with pytest.raises(ValueError, match="device='quantum' can't be used"):
        loading.load_model(folder, "auto", "quantum")
    larger = PreTrainedTokenizerFast.from_pretrained(folder)
    larger.add_tokens(["<more>"])
    larger.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"the tokenizer in .* has 401 entries, the model's vocab_size is 400"):
        loading.load_model(folder, "auto", "cpu")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    niah_cli.add_arguments(parser)
    return parser.parse_args(words)


def test_command_line_over_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("samples: 7\nseed: 9\ntasks: [multikey_1]\nbudget: 4\n")
    words = ["--model", "m", "--out", "o", "--config", str(file), "--samples", "3", "--lengths", "5, 6"]
    config = resolve(niah_cli.NiahConfig, parse(*words, "--budget", "0", "--no-resume"))
    assert (config.samples, config.seed, config.tasks, config.budget) == (3, 9, ["multikey_1"], 0)
    assert (config.lengths, config.batch_size, config.resume) == ([5, 6], 8, False)


def test_a_home_in_a_file_is_the_one_of_the_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("model: ~/m\nout: ~/runs/niah\n")
    assert resolve(niah_cli.NiahConfig, parse("--config", str(file))).out == str(tmp_path / "runs/niah")
    file.write_text("model: ~/m\nout: o\ntext: [~/a.txt, b/~.txt]\n")
    given = argparse.Namespace(config=str(file))
    assert resolve(PerplexityConfig, given).text == [str(tmp_path / "a.txt"), "b/~.txt"]
    file.write_text("model: ~/m\nout: o\ntask: swde\ndata: ~/d.jsonl\n")
    assert resolve(EvaporateConfig, given).data == str(tmp_path / "d.jsonl")


def test_prompts_beyond_a_model_s_positions_are_told(tokenizer, llama, tmp_path):
    content = run(llama, tokenizer, tmp_path, samples=1, lengths=[700, 2600])
    limit = llama.config.max_position_embeddings
    told = [warning for warning in content["warnings"] if f"the model has {limit} positions" in warning]
    assert [warning.split(":")[0] for warning in told] == [
        cell["case"] for cell in content["cells"] if cell["longest"] > limit
    ]
    assert len(told) == 1


def test_the_shipped_config_is_the_default():
    shipped = resolve(niah_cli.NiahConfig, parse("--model", "m", "--out", "o", "--config", "configs/eval/niah.yaml"))
    assert shipped == niah_cli.NiahConfig(model="m", out="o")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sampels: 3", "unknown setting 'sampels'; did you mean samples"),
        ("colour: red", "known are model, out"),
        ("samples: many", "samples"),
        ("lengths: {least: 512}", "config: lengths: .* has keys and values there; give a value or a list"),
        ("[1, 2]", "name: value"),
        ("a: [", "not YAML"),
        (None, "is not a file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, named):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=named):
        resolve(niah_cli.NiahConfig, parse("--model", "m", "--out", "o", "--config", str(file)))


def test_missing_model_and_bad_lengths(capsys):
    with pytest.raises(ValueError, match="model: missing; give --model"):
        resolve(niah_cli.NiahConfig, parse("--out", "o"))
    with pytest.raises(SystemExit):
        parse("--lengths", "1k")
    assert "not a list of whole numbers" in capsys.readouterr().err


def test_command_from_end_to_end(folder, tmp_path, capsys):
    words = ["--model", str(folder), "--out", str(tmp_path / "run"), "--tasks", "single_1,multikey_3"]
    words += ["--lengths", "900", "--samples", "2", "--new-tokens", "4", "--device", "cpu"]
    assert niah_cli.run_from_arguments(parse(*words)) == 0
    shown = capsys.readouterr()
    assert "niah_multikey_3" in shown.out
    assert "0.000 [0.00, 0.66]" in shown.out
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "heatmap-niah_multikey_3.png",
        "heatmap-niah_single_1.png",
        "result.json",
        "samples",
        "settings.json",
        "table.md",
    }


def test_help_teaches_without_loading_torch():
    code = (
        "import argparse, sys; from eval import niah_cli as c; p = argparse.ArgumentParser(prog='lalte eval niah');"
        "c.add_arguments(p); print(p.format_help()); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("examples:", "lalte eval niah --model", "multikey_1", "--budget", "interrupted"):
        assert word in done.stdout
