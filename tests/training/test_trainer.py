"""Whole runs on a tiny model: what a run leaves, exact continuation after SIGKILL, and runs that fail."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from training import checkpoints, saving, setup
from training.checkpoints import CheckpointError
from training.config import load_config, save_config
from training.stopping import SIGNALS
from training.trainer import HybridTrainer, NonFiniteLoss, cosine, train

ROOT = Path(__file__).parents[2]

RUN = """
model: {{config: {folder}/model.json}}
tokenizer: {{path: {folder}/tokenizer}}
data:
  sources:
    - {{path: {folder}/texts.txt, separator: "\\n<end>\\n", weight: 2}}
    - {{path: {folder}/texts.txt, separator: "\\n<end>\\n", streaming: true}}
  sequence_length: 96
  shuffle_buffer: 9
  cache_dir: {folder}/cache
needles:
  fraction: 0.3
  digits: 2
  key_type: number
  preamble: "Facts:"
  needle: "{{key}} has {{value}}."
  question: "{{key}}?"
  prefix: "It is"
  noise: "So it goes."
curriculum:
  - {{until_step: 5, sequence_length: 64, needles: {{digits: 1}}}}
optimizer: {{lr: 3.0e-3, warmup_steps: 4}}
batch: {{sequences: 2, accumulation: 2}}
checkpoint: {{every: 4, keep: 2}}
log: {{every: 1, tensorboard: false, progress: false}}
steps: 12
device: cpu
output: {folder}/run
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path, text_file, model_file, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    return tmp_path


def configured(folder, *changes):
    return load_config(folder / "run.yaml", changes)


def history(run: Path) -> list[dict]:
    """Log entries without what depends on the clock."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("tokens_per_s", "mfu")} for entry in entries]


def assert_same_run(one: Path, other: Path) -> None:
    assert history(one) == history(other)
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_last_interval_of_a_log_may_be_a_shorter_one(folder):
    every_step = history(train(configured(folder, f"output={folder}/fine", "steps=5")))
    entries = history(train(configured(folder, f"output={folder}/coarse", "steps=5", "log.every=3")))
    assert [entry["step"] for entry in entries] == [3, 5]
    for entry, part in zip(entries, (every_step[:3], every_step[3:]), strict=True):
        assert entry["loss"] == pytest.approx(sum(step["loss"] for step in part) / len(part), rel=1e-5)


def test_a_run_leaves_a_loadable_model_and_its_history(folder, monkeypatch):
    loads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (loads.append(k.get("weights_only")), load(*a, **k))[1])
    config = configured(folder, "log.tensorboard=true", "checkpoint.every=5", "log.peak_tflops=0.001")
    run = train(config)
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = {"loss", "grad_norm", "tokens_per_s", "mfu", "kept_per_head", "kept_per_head/layer_0", "lambda/layer_0"}
    assert {f"train/{name}" for name in shown} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/mfu")] == list(range(1, 13))
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(entry["mfu"] > 0 for entry in logged)
    # longer rows cost more
    assert logged[-1]["mfu"] / logged[-1]["tokens_per_s"] > logged[0]["mfu"] / logged[0]["tokens_per_s"]
    assert not [p for p in run.rglob("*") if p.suffix in (".bin", ".pkl") or p.name.startswith(".")]
    assert load_config(run / "config.yaml") == config
    entries = history(run)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert {"loss", "lm_loss", "retention_penalty", "grad_norm", "learning_rate", "kept_per_head"} <= set(entries[0])
    assert [entry["sequence_length"] for entry in entries] == [64] * 5 + [96] * 7
    # 2 rows of 96 tokens make 3 of 64: the tokens of a step stay the same
    assert [entry["tokens"] for entry in entries] == [2 * 192 * (i + 1) for i in range(12)]
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.1
    assert entries[-1]["retention_penalty"] > 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.config.use_cache is True
    assert model.config.max_position_embeddings == 96
    assert model.config.eos_token_id == tokenizer.eos_token_id
    tokens = tokenizer("The river sings.", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] == tokens["input_ids"].shape[1] + 3
    saved = (run / "model.safetensors").read_bytes()
    assert train(config) == run
    assert (run / "model.safetensors").read_bytes() == saved
    shutil.rmtree(run / "checkpoint-12")
    train(config)
    assert history(run) == entries
    assert (run / "model.safetensors").read_bytes() == saved
    # stopped between the last checkpoint and the final model
    (run / "model.safetensors").unlink()
    train(config)
    assert (run / "model.safetensors").read_bytes() == saved
    assert loads
    assert all(value is True for value in loads)


def test_sigkill_and_resume_give_the_same_run(folder):
    killed = configured(folder, f"output={folder}/killed", "log.every=3", "checkpoint.every=4")
    save_config(killed, folder / "killed.yaml")
    code = (
        "import sys, time, torch\n"
        "torch.set_num_threads(1)\n"
        "from training.callbacks import LogCallback\n"
        "from training.config import load_config\n"
        "from training.trainer import train\n"
        # slow steps leave time for the kill to hit the middle of the run
        "step_end = LogCallback.on_step_end\n"
        "def slow(self, args, state, control, **more):\n"
        "    print(state.global_step, flush=True)\n"
        "    time.sleep(0.5 if state.global_step > 5 else 0)\n"
        "LogCallback.on_step_end = slow\n"
        "train(load_config(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(folder / "killed.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "7":
            break
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert [p.name for p in checkpoints.checkpoints(folder / "killed")] == ["checkpoint-4"]
    # what a kill during a save, and during a write to the log, leaves behind
    shutil.copytree(folder / "killed" / "checkpoint-4", folder / "killed" / ".saving" / "checkpoint-8")
    with open(folder / "killed" / "log.jsonl", "a") as log:
        log.write('{"step": 6, "loss": 1.5}\n{"step": 7, "lo')
    train(killed)
    reference = configured(folder, "log.every=3", "checkpoint.every=100")
    train(reference)
    assert [entry["step"] for entry in history(folder / "run")] == [3, 6, 9, 12]
    assert_same_run(folder / "killed", folder / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_run_that_is_told_to_stop_leaves_a_checkpoint(folder, name):
    """The signal goes to all its processes, as a scheduler sends it; one of them prepares batches."""
    stopped = configured(folder, f"output={folder}/stopped", "checkpoint.every=100", "data.workers=1", "log.every=3")
    save_config(stopped, folder / "stopped.yaml")
    code = (
        "import sys, time, torch\n"
        "import lalte\n"
        "torch.set_num_threads(1)\n"
        "from training.callbacks import LogCallback\n"
        "def slow(self, args, state, control, **more):\n"
        "    print(state.global_step, flush=True)\n"
        "    time.sleep(0.5 if state.global_step > 5 else 0)\n"
        "LogCallback.on_step_end = slow\n"
        "sys.exit(lalte.main(['train', sys.argv[1]]))\n"
    )
    command = [sys.executable, "-c", code, str(folder / "stopped.yaml")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    for line in process.stdout:
        if line.strip() == "7":
            break
    os.killpg(process.pid, signal.Signals[name])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name], errors
    (checkpoint,) = checkpoints.checkpoints(folder / "stopped")
    step = checkpoints.step_of(checkpoint)
    assert 7 <= step < 12
    assert f"lalte: stopped by {name} after step {step}: {checkpoint} is whole; the same command goes on" in errors
    assert not (folder / "stopped" / "model.safetensors").exists()
    train(replace(stopped, output=f"{folder}/stopped"))
    reference = configured(folder, "log.every=3", "checkpoint.every=100")
    train(reference)
    assert_same_run(folder / "stopped", folder / "run")


def test_signals_mean_what_they_meant_after_a_run(folder):
    handlers = [signal.signal(number, signal.SIG_IGN) for number in SIGNALS]
    try:
        train(configured(folder, "steps=1"))
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * len(SIGNALS)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)


def test_a_run_outside_of_the_main_thread(folder):
    """Handlers can't be set there, and the run goes without."""
    thread = threading.Thread(target=train, args=[configured(folder, "steps=1")])
    thread.start()
    thread.join()
    assert (folder / "run" / "model.safetensors").is_file()


def test_a_kill_while_the_model_is_put_into_the_folder(folder, monkeypatch):
    config = configured(folder, "steps=2")
    replace_file = saving.os.replace

    def killed(source, target):
        if Path(target).name == "tokenizer.json" and Path(target).parent == folder / "run":
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert len(AutoTokenizer.from_pretrained(train(config))) == 300


def test_a_full_disk_keeps_the_checkpoint_before(folder, monkeypatch):
    save = HybridTrainer._save_checkpoint

    def save_on_a_full_disk(self, model, trial):
        if self.state.global_step < 8:
            return save(self, model, trial)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            return save(self, model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    config = configured(folder)
    with monkeypatch.context() as patch:
        patch.setattr(HybridTrainer, "_save_checkpoint", save_on_a_full_disk)
        with pytest.raises(
            CheckpointError, match=r"checkpoint-8 could not be saved.*checkpoint-4 is whole and stays"
        ):
            train(config)
    run = folder / "run"
    assert [p.name for p in checkpoints.checkpoints(run)] == ["checkpoint-4"]
    assert checkpoints.defect(run / "checkpoint-4") is None
    assert not (run / checkpoints.SAVING).exists()
    train(config)
    assert len(history(run)) == 12


def build_spoilt(step, before=lambda: None):
    """Builds a model whose loss turns NaN in the second micro-batch after `step` steps; `before` is called first."""

    def build(config, tokenizer):
        model = setup.build_model(config, tokenizer)
        calls = []

        def spoil(module, inputs):
            calls.append(1)
            if len(calls) == 2 * step + 2:
                before()
                module.weight.data[:] = float("nan")

        model.lm_head.register_forward_pre_hook(spoil)
        return model

    return build


def test_a_loss_that_is_not_finite_stops_the_run(folder):
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 7: .*checkpoint-4 is kept; lower optimizer\.lr"):
        train(configured(folder), build_spoilt(6))
    run = folder / "run"
    assert [p.name for p in checkpoints.checkpoints(run)] == ["checkpoint-4"]
    assert all(torch.isfinite(x).all() for x in load_file(run / "checkpoint-4" / "model.safetensors").values())


def test_weights_that_are_not_finite_are_not_saved(folder):
    """A gradient is infinite in the step of a save: the loss of that step is finite, the next one's isn't."""

    def build(config, tokenizer):
        model = setup.build_model(config, tokenizer)
        calls = []

        def spoil(gradient):
            calls.append(1)
            return gradient * float("inf") if len(calls) == 2 * 8 else gradient

        model.lm_head.weight.register_hook(spoil)
        return model

    with pytest.raises(
        NonFiniteLoss, match=r"the weights are not finite after step 8: .*checkpoint-4 is kept; lower"
    ):
        train(configured(folder, "checkpoint.keep=1"), build)
    assert [p.name for p in checkpoints.checkpoints(folder / "run")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("damaged", "kept"), [([6], "checkpoint-3 is kept"), ([3, 6], "there is no whole checkpoint")]
)
def test_a_loss_that_is_not_finite_names_no_damaged_checkpoint(folder, damaged, kept):
    def damage():
        for step in damaged:
            (folder / "run" / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")

    with pytest.raises(NonFiniteLoss, match=rf"not finite at step 7: .*{kept}; lower optimizer\.lr"):
        train(configured(folder, "checkpoint.every=3"), build_spoilt(6, damage))


def test_folder_of_another_run(folder):
    config = configured(folder, "steps=4")
    run = train(config)
    with pytest.raises(ValueError, match=r"another configuration: optimizer\.lr \(there 0\.003, now 0\.001\)"):
        train(configured(folder, "steps=4", "optimizer.lr=1e-3"))
    with pytest.raises(ValueError, match=r"holds a run already and resume='never'"):
        train(replace(config, resume="never"))
    with pytest.raises(ValueError, match=r"resume='.*' can't be continued: it is no folder"):
        train(configured(folder, "steps=4", f"output={folder}/new", f"resume={folder}/none"))
    weights = run / "checkpoint-4" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with (
        pytest.warns(UserWarning, match=r"checkpoint-4 is passed over: model\.safetensors has \d+ bytes instead of"),
        pytest.raises(ValueError, match=r"no checkpoint in it is whole"),
    ):
        train(config)
    weights.write_bytes(whole)
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"holds a model but no config\.yaml"):
        train(config)
    # a checkpoint of another model, named by hand, with no configuration to compare
    change = ["steps=4", f"output={folder}/new", f"resume={run}/checkpoint-4", "model.overrides.hidden_size=48"]
    with pytest.raises(ValueError, match=r"can't be continued: its weight .* has shape .*, the model's"):
        train(configured(folder, *change))


def test_a_run_does_not_go_on_with_other_text(folder):
    """Its rows would be dealt anew: some of the text would be read again, and some never."""
    run = train(configured(folder, "steps=8"))
    shutil.rmtree(run / "checkpoint-8")
    text = (folder / "texts.txt").read_text()
    (folder / "texts.txt").write_text(text + "\n<end>\nOne more.")
    with pytest.raises(
        ValueError, match=r"text has changed since .*checkpoint-4, .*were \{'data\.sources\[0\]': \[60, "
    ):
        train(configured(folder, "steps=8"))
    (folder / "texts.txt").write_text(text)  # at another time, but the same
    train(configured(folder, "steps=8"))
    # a checkpoint of a version that didn't keep the size of the text
    shutil.rmtree(run / "checkpoint-8")
    progress = json.loads((run / "checkpoint-4" / "progress-0.json").read_text())
    del progress["text"]
    (run / "checkpoint-4" / "progress-0.json").write_text(json.dumps(progress))
    checkpoints.seal(run / "checkpoint-4")
    train(configured(folder, "steps=8"))


def test_a_run_does_not_go_on_with_another_stream(folder):
    streamed = ["steps=8", "data.sources.0.streaming=true"]
    run = train(configured(folder, *streamed))
    shutil.rmtree(run / "checkpoint-8")
    text = (folder / "texts.txt").read_text()
    (folder / "texts.txt").write_text(text + "\n<end>\nOne more.")
    size = len((text + "\n<end>\nOne more.").encode())
    with pytest.raises(
        ValueError,
        match=rf"text has changed since .*checkpoint-4, .*now there are \{{'data\.sources\[0\]': \[1, {size}\]",
    ):
        train(configured(folder, *streamed))
    (folder / "texts.txt").write_text(text)
    # a checkpoint of a version that kept the sizes of what it had in the cache alone
    progress = json.loads((run / "checkpoint-4" / "progress-0.json").read_text())
    progress["text"] = {}
    (run / "checkpoint-4" / "progress-0.json").write_text(json.dumps(progress))
    checkpoints.seal(run / "checkpoint-4")
    train(configured(folder, *streamed))


def test_a_checkpoint_goes_on_in_another_folder_only_as_configured(folder):
    """Otherwise the optimizer's old learning rate would go on beside the data of another seed."""
    run = train(configured(folder, "steps=6"))
    there = ["steps=6", f"output={folder}/new", f"resume={run}/checkpoint-4"]
    for change, differs in (
        ("optimizer.lr=1e-3", r"optimizer\.lr \(there 0\.003, now 0\.001\)"),
        ("optimizer.weight_decay=0.2", r"optimizer\.weight_decay \(there 0\.1, now 0\.2\)"),
        ("seed=1", r"seed \(there 0, now 1\)"),
        ("model.overrides.keep_all_steps=9", r"model\.overrides\.keep_all_steps \(there None, now 9\)"),
    ):
        with pytest.raises(ValueError, match=r"^resume='.*' belongs to a run with another configuration: " + differs):
            train(configured(folder, *there, change))
    assert not (folder / "new").exists()
    train(configured(folder, *there, "checkpoint.every=1", "log.tensorboard=true"))
    (run / "log.jsonl").write_text("".join((run / "log.jsonl").read_text().splitlines(keepends=True)[4:]))
    assert_same_run(folder / "new", run)


def test_the_same_command_goes_on_after_a_checkpoint_of_another_run(folder, monkeypatch):
    run = train(configured(folder, "steps=6"))
    line = configured(folder, "steps=6", f"output={folder}/new", f"resume={run}/checkpoint-4", "checkpoint.every=1")
    assert setup.resume_point(line, folder / "new") == run / "checkpoint-4"
    new = train(line)
    assert setup.resume_point(line, new) == new / "checkpoint-6"
    monkeypatch.setattr(HybridTrainer, "train", None)
    assert train(line) == new, "it is finished"
    # in its own folder a run goes back as often as it is told to
    back = configured(folder, "steps=6", f"resume={run}/checkpoint-4")
    assert setup.resume_point(back, run) == run / "checkpoint-4"


def test_steps_of_other_rows_are_refused_with_what_would_do(folder):
    run = train(configured(folder, "steps=6"))
    shutil.copytree(run, folder / "before")
    shutil.rmtree(run / "checkpoint-6")
    saved = (run / "config.yaml").read_text()
    refused = (
        r"^batch\.tokens_per_step=None, batch\.sequences=2 and batch\.accumulation=1 on 1 ranks make \[3, 2\] rows a "
        r"step \(by stage\), but .*checkpoint-4 was made with \[6, 4\]: set batch\.tokens_per_step=384$"
    )
    with pytest.raises(ValueError, match=refused):
        train(configured(folder, "steps=6", "batch.accumulation=1"))
    assert (run / "config.yaml").read_text() == saved
    train(configured(folder, "steps=6", "batch.accumulation=1", "batch.tokens_per_step=384"))
    assert_same_run(run, folder / "before")


def test_rows_that_no_number_of_tokens_makes(folder):
    config = configured(folder, "steps=6")
    assert setup.same_steps(config, 1, [6, 4]) == "set batch.tokens_per_step=384"
    # steps of 448 and 480 tokens; 6 and 4 rows for 4 ranks
    for world, rows in ((1, [7, 5]), (4, [6, 4])):
        assert setup.same_steps(config, world, rows).startswith("go on with that run's batch settings")


def test_newest_whole_checkpoint_is_taken(tmp_path):
    make_checkpoints(tmp_path, 5, 20, 100)
    assert checkpoints.newest(tmp_path).name == "checkpoint-100"
    (tmp_path / "checkpoint-100" / "a").unlink()
    with pytest.warns(UserWarning, match="a is missing"):
        assert checkpoints.newest(tmp_path).name == "checkpoint-20"
    (tmp_path / "checkpoint-20" / checkpoints.SEAL).unlink()
    with pytest.warns(UserWarning, match="a is missing|not written by this program, or not to its end"):
        assert checkpoints.newest(tmp_path).name == "checkpoint-5"


def make_checkpoints(output: Path, *steps: int) -> None:
    for step in steps:
        folder = output / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "a").write_text("x" * step)
        checkpoints.seal(folder)


@pytest.mark.parametrize(
    ("whole", "damaged", "keep", "step", "left"),
    [
        ([4, 8, 12], [], 2, 12, [8, 12]),
        ([4, 8], [], 3, 8, [4, 8]),
        # gone on from an older one: what is newer doesn't count
        ([500, 600, 1000, 1500], [], 2, 600, [500, 600, 1000, 1500]),
        ([500, 600, 700, 1000, 1500], [], 2, 700, [600, 700, 1000, 1500]),
        ([8, 9], [12], 1, 9, [9]),
        # damaged ones take no place of a whole one
        ([3, 9, 11], [8, 10], 2, 11, [9, 11]),
    ],
)
def test_rotation_keeps_the_newest_whole_ones(tmp_path, whole, damaged, keep, step, left):
    make_checkpoints(tmp_path, *whole, *damaged)
    for bad in damaged:
        (tmp_path / f"checkpoint-{bad}" / "a").write_text("")
    checkpoints.rotate(tmp_path, keep, step)
    assert [checkpoints.step_of(p) for p in checkpoints.checkpoints(tmp_path)] == left


def test_what_was_just_saved_outlives_a_damaged_newer_one(folder, monkeypatch):
    run = train(configured(folder, "steps=6"))
    (run / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    write = checkpoints.write_progress

    def full_at_the_end(path, *more):
        if path.name == "checkpoint-6":
            raise OSError("no space left")
        write(path, *more)

    monkeypatch.setattr(checkpoints, "write_progress", full_at_the_end)
    with (
        pytest.warns(UserWarning, match="checkpoint-6 is passed over"),
        pytest.raises(CheckpointError, match="checkpoint-5 is whole and stays"),
    ):
        train(configured(folder, "steps=6", "checkpoint={every: 1, keep: 1}"))
    assert [p.name for p in checkpoints.checkpoints(run)] == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.config=none.json"], r"model\.config='none\.json': none\.json is no file"),
        (["model.overrides.windw=9"], r"overrides: unknown field windw=9; did you mean window"),
        (["model.overrides.window=6"], r"window=6 must be larger than the scorer's lookahead 6"),
        (["model.overrides.vocab_size=200"], r"has 300 entries but the model's vocab_size is 200"),
        (["data.sources.0.path=none.txt"], r"data\.sources\[0\]\.path='none\.txt' names no file"),
        (["tokenizer.path=none"], r"tokenizer\.path='none' is no folder"),
        (["tokenizer.train_vocab_size=300"], r"path, train_vocab_size is set: set exactly one"),
        (["needles.digits=0"], r"needles\.digits=0 is below 1"),
        (["data.workers=2"], r"data\.workers=2 with a streamed source"),
        (["curriculum=[{until_step: 4, sequence_length: 12}]"], r"sequence_length=12 tokens can't hold a needle"),
        (["needles.fraction=1.5", "curriculum=[]"], r"^needles\.fraction=1\.5 is outside"),
        (["log.report_to=[foo]"], r"log\.report_to=\['foo'\]: foo is unknown: use wandb or trackio"),
        (["output=/dev/null/x"], r"output='/dev/null/x' can't be made \(Not a directory\): name another folder"),
        (["data.cache_dir=/dev/null"], r"data\.cache_dir='/dev/null' can't be written \(Not a directory\)"),
        (["fsdp=true"], r"fsdp=True shards over the processes that torchrun starts"),
        (["model.weights=none"], r"model\.weights='none' holds no model"),
    ],
)
def test_bad_input_is_found_before_training(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        train(configured(folder, *changes))
    assert not list((folder / "run").glob("checkpoint-*"))


def test_a_run_that_failed_before_its_first_step_leaves_the_folder_free(folder):
    (folder / "run").mkdir()
    save_config(configured(folder, "optimizer.lr=1"), folder / "run" / "config.yaml")
    train(configured(folder, "steps=1"))


def test_half_a_tokenizer_is_not_taken_for_a_whole_one(folder, monkeypatch):
    config = configured(folder, "tokenizer={path: null, train_vocab_size: 280}")

    def cut_off(self, path, **more):
        Path(path).mkdir(parents=True)
        (Path(path) / "tokenizer_config.json").write_text("{}")
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", cut_off)
        with pytest.raises(OSError, match="killed"):
            setup.make_tokenizer(config, folder / "run", save=True)
    assert not (folder / "run" / "tokenizer").exists()
    assert len(setup.make_tokenizer(config, folder / "run", save=True)) == 280
    assert [path.name for path in (folder / "run").iterdir()] == ["tokenizer"]


def test_a_tokenizer_of_other_settings_is_not_taken(folder):
    """A run that is refused before its first step leaves its tokenizer behind."""
    trained = "tokenizer={path: null, train_vocab_size: 400}"
    with pytest.raises(ValueError, match=r"the tokenizer has 400 entries .* choose a smaller tokenizer"):
        train(configured(folder, trained))
    run = train(configured(folder, trained, "tokenizer.train_vocab_size=280", "steps=1"))
    assert len(AutoTokenizer.from_pretrained(run)) == 280
    kept = (run / "tokenizer" / "tokenizer_config.json").stat().st_mtime_ns
    setup.make_tokenizer(configured(folder, trained, "tokenizer.train_vocab_size=280", "steps=2"), run, save=True)
    assert (run / "tokenizer" / "tokenizer_config.json").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"holds a run with another configuration: .*train_vocab_size"):
        setup.tokenise(configured(folder, trained, "steps=1"))


def test_text_can_be_tokenised_before_a_run(folder, monkeypatch, capsys):
    import lalte

    assert lalte.main(["train", str(folder / "run.yaml"), "--tokenise"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("data.sources[0]: "), "the other one is streamed"
    assert shown.count("tokens in the cache") == 1
    assert not (folder / "run").exists()
    monkeypatch.setattr("training.store._build", None)
    train(configured(folder, "steps=1"))


def test_ranks_start_where_the_first_one_does(folder, monkeypatch):
    """Another machine may see the run's folder as it was a while ago."""
    run = train(configured(folder, "steps=8"))
    newest = str(run / "checkpoint-8")
    args = TrainingArguments(output_dir=str(run), use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.3)
    monkeypatch.setattr(setup, "gather_object", lambda seen: [True, *seen])

    (run / ".start-x").touch()
    from_rank_zero = lambda said: said.__setitem__(0, (".start-x", newest, True))
    monkeypatch.setattr(setup, "broadcast_object_list", from_rank_zero)
    assert setup.agree(args, run, run / "checkpoint-4", False) == (run / "checkpoint-8", True)
    for missing in (run / ".start-x", run / "checkpoint-8" / "model.safetensors"):
        (run / ".start-x").touch()
        missing.unlink()
        with pytest.raises(ValueError, match=r"another folder for some ranks: \[1\] don't see .* a folder that all"):
            setup.agree(args, run, None, False)


def test_trained_tokenizer_and_start_from_weights(folder):
    config = configured(
        folder,
        "tokenizer={path: null, train_vocab_size: 280}",
        "steps=2",
        f"output={folder}/first",
        "checkpoint.every=2",
    )
    first = train(config)
    assert len(AutoTokenizer.from_pretrained(first)) == 280
    second = train(
        configured(
            folder,
            f"tokenizer.path={first}",
            f"model.weights={first}",
            "steps=1",
            "optimizer.warmup_steps=0",
            "optimizer.lr=1e-12",
        )
    )
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-9)


def test_control_starts_anew_with_weights_of_another_run(folder, tokenizer):
    """λ, densities and the steps that count towards keep_all_steps are the old run's, and stay with it."""
    old = setup.build_model(configured(folder), tokenizer)
    old.penalty_control.steps.fill_(70)
    old.penalty_control.density.fill_(0.3)
    old.penalty_control.penalty_weight.fill_(0.5)
    old.save_pretrained(folder / "old")
    changes = [f"model.weights={folder}/old", "model.overrides.keep_all_steps=3"]
    new = setup.build_model(configured(folder, *changes), tokenizer).train()
    assert all(torch.equal(x, dict(old.named_parameters())[name]) for name, x in new.named_parameters())
    control = new.penalty_control
    assert (int(control.steps), control.penalty_weight.max(), control.density.max()) == (0, 0.0, -1.0)
    ids = torch.arange(40)[None]
    for step in range(4):
        assert (new(ids, labels=ids).aux_loss is None) == (step < 3), "nothing is scored while all is kept"
        new.update_retention_penalty()


def test_weights_of_a_model_without_scorer(folder, tokenizer):
    plain = "model.overrides={retention: none, budget: 0}"
    old = setup.build_model(configured(folder, plain), tokenizer)
    old.save_pretrained(folder / "old")
    new = setup.build_model(configured(folder, plain, f"model.weights={folder}/old"), tokenizer)
    assert new.penalty_control is None
    assert torch.equal(new.lm_head.weight, old.lm_head.weight)


def test_weights_may_lack_a_scorer_and_nothing_else(folder, tokenizer):
    """A scorer can be added to a trained model, or left out; a layer that would be random is an error."""
    plain, start = "model.overrides={retention: none, budget: 0}", f"model.weights={folder}/old"
    old = setup.build_model(configured(folder, plain), tokenizer)
    old.save_pretrained(folder / "old")
    new = setup.build_model(configured(folder, start), tokenizer)
    assert new.penalty_control is not None
    assert torch.equal(new.lm_head.weight, old.lm_head.weight)
    new.save_pretrained(folder / "scored")
    assert setup.build_model(configured(folder, plain, f"model.weights={folder}/scored"), tokenizer) is not None
    more = [*new.config.layer_types, "gated_deltanet"]
    deeper = f"model.overrides={{num_hidden_layers: {len(more)}, layer_types: [{', '.join(more)}]}}"
    for changes, words in (
        (deeper, "tensors of the model are missing"),
        ("model.overrides.hidden_size=64", "tensors have another shape"),
    ):
        with pytest.raises(ValueError, match=rf"model\.weights='.*old': .* don't fit the configuration: \d+ {words}"):
            setup.build_model(configured(folder, changes, start), tokenizer)


def test_workers_prepare_the_same_batches(folder):
    text = (folder / "run.yaml").read_text().replace(", streaming: true", "")
    (folder / "run.yaml").write_text(text)
    train(configured(folder, "steps=6"))
    train(configured(folder, "steps=6", "data.workers=2", f"output={folder}/workers"))
    assert_same_run(folder / "run", folder / "workers")


def test_accumulated_gradients_equal_one_batch(folder):
    """The loss is divided by the predicted tokens of the whole step, so micro-batches are weighted rightly."""
    same = ["steps=1", "needles.loss_on=answer", "data.sources.1.streaming=false", "model.overrides.scorer_dropout=0"]
    same += ["curriculum=[]"]
    train(configured(folder, *same, "batch={sequences: 4, accumulation: 1}"))
    train(configured(folder, *same, "batch={sequences: 1, accumulation: 4}", f"output={folder}/parts"))
    one, parts = history(folder / "run")[0], history(folder / "parts")[0]
    for key in ("loss", "lm_loss", "grad_norm"):
        assert parts[key] == pytest.approx(one[key], rel=1e-5)


def test_schedule():
    factors = [cosine(step, 20, 4, 0.1) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[-1] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)
