"""Two processes on a CPU (gloo): copied (DDP) and sharded (FSDP2) models train as on one and go on anywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import HybridConfig, HybridForCausalLM
from tests.training.conftest import TINY_MODEL, make_texts
from training import sharded
from training.config import load_config
from training.data import StepBatches, TrainingRows, plan_stages
from training.rows import IGNORED
from training.tokenizer import train_tokenizer
from training.trainer import train

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5

# λ moves every second step; rows are packed; streams, needles and two lengths of rows are mixed; only answers count
RUN = """
model: {{config: {folder}/model.json, overrides: {{scorer_dropout: 0.0}}}}
tokenizer: {{path: {folder}/tokenizer}}
data:
  sources:
    - {{path: {folder}/texts.txt, separator: "\\n<end>\\n", weight: 2}}
    - {{path: {folder}/texts.txt, separator: "\\n<end>\\n", streaming: true}}
  sequence_length: 96
  shuffle_buffer: 9
  lanes: 2
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
  loss_on: answer
curriculum:
  - {{until_step: 5, sequence_length: 48, needles: {{digits: 1}}}}
optimizer: {{lr: 3.0e-3, warmup_steps: 4}}
batch: {{sequences: 4, tokens_per_step: 384}}
checkpoint: {{every: 10, keep: 2}}
log: {{every: 1, tensorboard: false, progress: false}}
steps: 20
device: cpu
output: {folder}/one
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on one rank, then four on two ranks: from the start, and from the first run's middle."""
    folder = tmp_path_factory.mktemp("distributed")
    texts = make_texts(60)
    (folder / "texts.txt").write_text("\n<end>\n".join(texts))
    (folder / "model.json").write_text(json.dumps(TINY_MODEL))
    train_tokenizer(texts, 300).save_pretrained(folder / "tokenizer")
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(load_config(folder / "run.yaml"))
    sharded_run = ["fsdp=true", "gradient_checkpointing=true"]
    middle = f"resume={folder}/one/checkpoint-10"
    jobs = [
        [f"output={folder}/copied"],
        [f"output={folder}/sharded", *sharded_run],
        [f"output={folder}/copied-from-sharded", f"resume={folder}/sharded/checkpoint-10"],
        [f"output={folder}/sharded-from-one", *sharded_run, middle],
    ]
    launch(2, "rank_jobs.py", [[str(folder / "run.yaml"), changes] for changes in jobs])
    yield folder
    torch.set_num_threads(threads)


def launch(ranks: int, script: str, given: list) -> str:
    """Run a script of this folder on so many ranks; what they printed.

    given: what the script reads, as JSON.
    Raises: AssertionError with the end of what the ranks wrote, if one fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(Path(__file__).with_name(script)), json.dumps(given)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def history(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same(run: Path, expected: Path, first: int = 0) -> None:
    """Same log from step `first` on, and the same weights, λ and averages at the end."""
    entries, wanted = history(run), history(expected)[first:]
    assert len(entries) == len(wanted)
    for ours, theirs in zip(entries, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"tokens_per_s", "mfu"}:
            assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE, abs=1e-9), (ours["step"], key)
    ours, theirs = load_file(run / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def test_the_run_is_a_hard_one(folder):
    """λ and the kept set move, and the ranks' halves of a step predict unequal numbers of tokens."""
    entries = history(folder / "one")
    assert len({entry["lambda_mean"] for entry in entries}) > 5
    assert entries[-1]["kept_per_head"] < 0.95 * entries[0]["kept_per_head"]
    config = load_config(folder / "run.yaml")
    stages = plan_stages(config.data, config.needles, config.curriculum, steps=20, sequences=2, parts=2)
    tokenizer = train_tokenizer(make_texts(60), 300)
    rows = TrainingRows(config.data, stages, tokenizer, seed=config.seed, progress=False)
    batches = list(StepBatches(stages, accumulation=2))
    counts = [sum(int((rows[key].labels != IGNORED).sum()) for key in batch) for batch in batches]
    assert max(abs(a - b) / (a + b) for a, b in zip(counts[::2], counts[1::2], strict=True)) > 0.2


@pytest.mark.parametrize("run", ["copied", "sharded"])
def test_two_ranks_train_as_one(folder, run):
    """Loss, gradient norm, λ, kept tokens and weights; sharded ones recompute their blocks, too."""
    assert_same(folder / run, folder / "one")


def test_one_rank_goes_on_from_two_ranks_shards(folder):
    checkpoint = folder / "sharded" / "checkpoint-10"
    assert sharded.is_sharded(checkpoint)
    assert len(list((checkpoint / sharded.FOLDER).glob("*.safetensors"))) == 2
    train(load_config(folder / "run.yaml", [f"output={folder}/one-from-sharded", f"resume={checkpoint}"]))
    assert_same(folder / "one-from-sharded", folder / "one", first=10)


@pytest.mark.parametrize("run", ["copied-from-sharded", "sharded-from-one"])
def test_two_ranks_go_on_from_another_kind(folder, run):
    assert_same(folder / run, folder / "one", first=10)


def test_names_of_a_compiled_model_are_its_own(folder):
    """Shards, what goes on from them, and the final model: without the prefix of torch.compile."""
    short = ["fsdp=true", "compile=true", "steps=4", "checkpoint.every=2", "curriculum=[]"]
    on = [f"output={folder}/on", f"resume={folder}/compiled/checkpoint-2"]
    file = str(folder / "run.yaml")
    launch(1, "rank_jobs.py", [[file, [f"output={folder}/compiled", *short]], [file, [*on, *short]]])
    names = load_file(folder / "one" / "model.safetensors").keys()
    assert sharded.shapes(folder / "compiled" / "checkpoint-2").keys() == names
    ours, theirs = (load_file(folder / run / "model.safetensors") for run in ("on", "compiled"))
    assert ours.keys() == theirs.keys() == names
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("kind", ["copied", "sharded"])
def test_a_signal_to_one_rank_stops_all_behind_a_checkpoint(folder, kind):
    stopped = folder / f"{kind}-stopped"
    changes = [f"output={stopped}", "checkpoint.every=100", f"fsdp={str(kind == 'sharded').lower()}"]
    said = launch(2, "rank_stops.py", [str(folder / "run.yaml"), *changes])
    assert "rank 0: 143\n" in said
    assert "rank 1: 143\n" in said
    assert said.count("lalte: stopped by SIGTERM after step 7: ") == 1
    assert [file.name for file in stopped.glob("checkpoint-*")] == ["checkpoint-7"], "one step after the signal"
    assert not (stopped / "model.safetensors").exists()
    train(load_config(folder / "run.yaml", [f"output={stopped}", "checkpoint.every=100"]))
    assert_same(stopped, folder / "one")


def test_folders_that_ranks_do_not_share_are_refused(folder):
    """Each would seal its part as a whole checkpoint."""
    with pytest.raises(AssertionError, match=r"is another folder for some ranks: \[1\] don't see what rank 0 has"):
        launch(2, "rank_jobs.py", [[str(folder / "run.yaml"), [f"output={folder}/of-rank-RANK"]]])
    assert not list(folder.glob("of-rank-*/checkpoint-*"))


def test_shards_hold_every_tensor_once(folder):
    """Half of each weight on each rank, λ and the averages with them, and all of the optimizer's moments."""
    whole = load_file(folder / "one" / "checkpoint-10" / "model.safetensors")
    shapes = sharded.shapes(folder / "sharded" / "checkpoint-10")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert any("penalty_control" in name for name in shapes)
    files = [load_file(f) for f in (folder / "sharded" / "checkpoint-10" / sharded.FOLDER).iterdir()]
    parameters = sum(tensor.numel() for name, tensor in whole.items() if "penalty_control" not in name)
    sizes = [sum(t.numel() for name, t in file.items() if "penalty_control" not in name) for file in files]
    assert sum(sizes) == pytest.approx(3 * parameters, rel=0.01)  # weights and two moments
    assert max(sizes) < 0.6 * sum(sizes)


def test_steps_of_another_size_are_refused(folder):
    # a checkpoint without its run's configuration
    alone = shutil.copytree(folder / "one" / "checkpoint-10", folder / "alone" / "checkpoint-10")
    changes = [f"output={folder}/refused", f"resume={alone}", "batch.tokens_per_step=null"]
    with pytest.raises(ValueError, match=r"make \[12, 6\] rows a step .* made with \[8, 4\]: set .*per_step=384$"):
        train(load_config(folder / "run.yaml", [*changes, "batch.sequences=6"]))
    with pytest.raises(ValueError, match=r"read its streams in 2 lanes, now there are 4"):
        train(load_config(folder / "run.yaml", [f"output={folder}/lanes", changes[1], "data.lanes=4"]))


def test_recomputed_blocks_give_the_same_gradients():
    """Dropout included: the random numbers of the forward pass are drawn again."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = HybridForCausalLM(HybridConfig(**{**TINY_MODEL, "max_position_embeddings": 96})).train()
        model.penalty_control.penalty_weight.fill_(0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.randint(300, (1, 96), generator=torch.Generator().manual_seed(1))
        bounds = torch.tensor([0, 37, 96], dtype=torch.int32)
        torch.manual_seed(2)
        model(ids, labels=ids, cu_seqlens=bounds, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert any("scorer" in name and g.abs().max() > 0 for name, g in gradients[0].items())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9, msg=name)
