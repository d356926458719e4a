"""Training on one device and on several, as `lalte train` does it, and a sharded checkpoint that goes on on one."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import OURS, Bench, Disagreement, add_common_arguments
from eval.results import say

DESCRIPTION = """\
Trains laLTE from random weights on made-up text through the real Trainer: on one device, then on several with a copy
on each (DDP) and with shards (FSDP2), with the same rows a device. `lalte` is one device, and a ratio in the table is
the scaling. Then the sharded checkpoint goes on on one device, which must give the losses of the run that went on on
all. At the start everything is kept, so these are not the speeds of a trained model's sparse attention.
"""
EPILOG = """\
examples:
  lalte bench scaling
  lalte bench scaling --config 1.4b --batch 2 --processes 8
  lalte bench scaling --quick --device cpu --out scaling.json
"""
WORDS = 40_000  # of the text; more are read again
RUN = "run.yaml"
LOSS_TOLERANCE = 2e-2


def write_run(folder: Path, size: str, length: int, batch: int, steps: int, checkpoint: int, every: int) -> None:
    """Text of random words, and the configuration of a run on it."""
    root, rng = Path(__file__).parent.parent, random.Random(0)
    letters = "etaoinshrdlucmfw"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(2000)]
    text = "\n\n".join(" ".join(rng.choices(words, k=rng.randint(50, 900))) for _ in range(WORDS // 400))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    run = {
        # without dropout, which is drawn anew where a step is cut in another way
        "model": {
            "config": str(root / "configs" / "models" / f"lalte-{size}.json"),
            "overrides": {"scorer_dropout": 0.0},
        },
        "tokenizer": {"train_vocab_size": 300, "train_characters": 20_000},
        "data": {
            "sources": [{"path": str(folder / "text.txt"), "separator": "\n\n"}],
            "sequence_length": length,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"sequences": batch},
        "optimizer": {"lr": 3e-4, "warmup_steps": 5},
        "checkpoint": {"every": checkpoint, "keep": 2},
        "log": {"every": every, "tensorboard": False, "progress": False},
        "steps": steps,
    }
    (folder / RUN).write_text(yaml.safe_dump(run), encoding="utf-8")


def train(folder: Path, name: str, processes: int, changes: list[str]) -> list[dict[str, Any]]:
    """Run `lalte train` on so many processes; the entries of its log.

    Raises: RuntimeError with the end of what it said, if it fails.
    """
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += ["lalte", "train", str(folder / RUN), f"output={folder / name}", *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}: …{done.stderr[-1500:]}")
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def time_run(bench: Bench, case: str, system: str, job: dict[str, Any], folder: Path) -> None:
    """Train, and note the speed of all entries but the first, in which kernels are compiled and tuned."""
    entries = train(folder, job["name"], job["processes"], job["changes"])
    speeds = sorted(entry["tokens_per_s"] for entry in entries[1:])
    bench.add(case, system, "tokens_per_s", statistics.median(speeds), speeds[0], speeds[-1], len(speeds))
    losses = {str(entry["step"]): entry["loss"] for entry in entries}
    shares = [entry["mfu"] for entry in entries[1:] if "mfu" in entry]
    bench.note(
        case, system, processes=job["processes"], losses=losses, mfu=statistics.median(shares) if shares else None
    )
    say(f"{bench.name}: {system}: {statistics.median(speeds):,.0f} tokens/s")
    if job["name"] != "shards":
        shutil.rmtree(folder / job["name"])


def resume(bench: Bench, case: str, processes: int, step: int, folder: Path, changes: list[str]) -> None:
    """Go on from the shards on one device, with as many micro-batches as there were devices.

    Raises: Disagreement if the losses aren't those of the run that wasn't interrupted; ValueError without that run.
    """
    checkpoint = folder / "shards" / f"checkpoint-{step}"
    if not checkpoint.is_dir():
        raise ValueError(f"there is no sharded run to go on from: leave out --systems, or name fsdp x{processes}")
    whole = [json.loads(line) for line in (folder / "shards" / "log.jsonl").read_text().splitlines()]
    wanted = {entry["step"]: entry["loss"] for entry in whole if entry["step"] > step}
    entries = train(folder, "resumed", 1, [*changes, f"resume={checkpoint}", f"batch.accumulation={processes}"])
    found = {entry["step"]: entry["loss"] for entry in entries}
    bench.note(case, OURS, resumed=found, uninterrupted=wanted)
    if found.keys() != wanted.keys():
        raise Disagreement(f"the resumed run logged the steps {list(found)}, the other {list(wanted)}")
    for at, loss in found.items():
        if not abs(loss - wanted[at]) <= LOSS_TOLERANCE * wanted[at]:
            raise Disagreement(f"the loss at step {at} is {loss:.4f}, without interruption {wanted[at]:.4f}")
    last = max(found)
    bench.add(case, OURS, "loss", found[last], found[last], found[last], 1)
    bench.add(case, f"fsdp x{processes}", "loss", wanted[last], wanted[last], wanted[last], 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lalte bench scaling`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add = parser.add_argument
    add("--config", metavar="SIZE", default="0.4b", help="0.4b (default), 1.4b or tiny")
    add("--batch", metavar="B", type=int, default=8, help="rows a device; default: 8")
    add("--length", metavar="T", type=int, default=4096, help="tokens a row; default: 4096")
    add("--processes", metavar="N", type=int, default=2, help="devices, one process each; default: 2")
    add("--steps", metavar="N", type=int, default=20, help="until the checkpoint that goes on; default: 20")
    add("--work", metavar="DIR", help="where the runs are kept meanwhile (about 25 bytes a parameter)")
    add_common_arguments(parser)


def run_from_arguments(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit status."""
    size, batch, length, steps, every = args.config, args.batch, args.length, args.steps, 5
    if args.quick:
        size, batch, length, steps, every = "tiny", 2, 96, 3, 1
    if args.processes < 2 or steps < 2 * every or steps % every:
        raise ValueError(
            f"--processes {args.processes} --steps {steps}: use 2 processes or more, and 10, 15, 20, … steps"
        )
    name = "scaling" if size == "0.4b" else f"scaling-{size}"
    bench = Bench(name, args, {"size": size, "batch": batch, "length": length, "processes": args.processes})
    cuda = bench.device.type == "cuda"
    if cuda and torch.cuda.device_count() < args.processes:
        raise ValueError(f"--processes {args.processes}: only {torch.cuda.device_count()} CUDA devices are visible")
    changes = [f"device={bench.device.type}", f"precision={'bf16' if cuda else 'fp32'}"]
    case, many = f"scaling {size} B{batch} T{length}", f"x{args.processes}"
    jobs = {
        OURS: {"name": "one", "processes": 1, "changes": changes},
        f"ddp {many}": {"name": "copies", "processes": args.processes, "changes": changes},
        f"fsdp {many}": {"name": "shards", "processes": args.processes, "changes": [*changes, "fsdp=true"]},
    }
    with tempfile.TemporaryDirectory(prefix="lalte-scaling-", dir=args.work) as work:
        folder = Path(work)
        write_run(folder, size, length, batch, steps + every, steps, every)
        bench.add_case(
            case, {system: partial(time_run, bench, case, system, job, folder) for system, job in jobs.items()}
        )
        again = f"resume {size} {many} to x1"
        bench.add_case(again, {OURS: partial(resume, bench, again, args.processes, steps, folder, changes)})
        return bench.run()
