"""The quick start: train for a minute, measure retrieval of the shipped model, write at constant memory.

    python -m benchmarks.quickstart                                    # what `make quickstart` runs
    python -m benchmarks.quickstart --record runs/gdn --system gdn     # record a baseline's row of the table

The shipped model, checkpoints/lalte-tiny, was trained by `lalte train configs/train/quickstart.yaml` on a GPU. Its
table rows are measured here and now; the baselines' are records of results/quickstart, made by the second command
from models trained alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "lalte-tiny"
RECIPE = ROOT / "configs" / "train" / "quickstart.yaml"
RECORDS = ROOT / "results" / "quickstart"
RUNS = Path("runs") / "quickstart"

# haystack steps: by definition essays grow by 500 words, which would leave 1,024 tokens almost empty
TASKS = (("niah_single_1", None), ("niah_multikey_1", 50))
SAMPLES, SEED = 20, 0
CACHE_LENGTHS = (1024, 8192, 32768)

# one minute of training on two cores: the first, easiest stage of the recipe, with fewer rows
SHOW = (
    "model.overrides={}",
    "curriculum=[]",
    "data.sequence_length=256",
    "data.workers=1",
    "data.cache_dir=runs/quickstart/cache",
    "needles.keys=[1,2]",
    "needles.questions=[1,2]",
    "needles.digits=3",
    "needles.length=null",
    "needles.variants=[]",
    "batch.sequences=4",
    "optimizer.warmup_steps=20",
    "steps=200",
    "log.every=10",
    "log.tensorboard=false",
    "precision=fp32",
    "device=cpu",
    "output=runs/quickstart/train",
)


def lengths_of(config: Any) -> tuple[int, int, int]:
    """1, 2 and 4 times the tokens that a head of the cache can hold."""
    memory = config.sinks + config.budget + config.window
    return memory, 2 * memory, 4 * memory


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def train_for_show() -> tuple[float, float]:
    """Loss at the start and at the end of a minute of training."""
    from training.config import load_config
    from training.trainer import train

    shutil.rmtree(RUNS / "train", ignore_errors=True)
    folder = train(load_config(RECIPE, SHOW))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log[0]["lm_loss"], log[-1]["lm_loss"]


def beyond_window(tokenizer: Any, task: str, length: int, step: int | None, window: int) -> list[bool]:
    """Whether the value asked for lies further back than the window from the first answer token, by sample."""
    from eval.needles import make_samples

    def distance(sample: Any) -> int:
        return len(tokenizer(sample.text[sample.text.index(sample.outputs[0]) :]).input_ids)

    return [distance(s) > window for s in make_samples(task, tokenizer, length, SAMPLES, SEED, step=step)]


def measure(model: Any, tokenizer: Any, system: str, budget: int | None, out: Path, rule: Any) -> list[dict]:
    """Accuracy rows of one system: all samples, and those whose needle the window of `rule` can't reach."""
    from eval.niah import run_niah
    from eval.results import SampleLog, row, wilson

    rows, lengths = [], lengths_of(rule)
    for task, step in TASKS:
        folder = out / task
        content = run_niah(
            model, tokenizer, [task], lengths, SAMPLES, SEED, SAMPLES, folder, budget=budget, step=step, system=system
        )
        rows += content["rows"]
        for length in lengths:
            answers = SampleLog(folder / "samples" / f"{task}-L{length}.jsonl").records.values()
            far = beyond_window(tokenizer, task, length, step, rule.window)
            scores = [one["score"] for one in answers if one["error"] is None and far[one["index"]]]
            if scores:
                low, high = wilson(sum(scores), len(scores))
                case = f"{task} beyond the window L{length}"
                rows.append(row(case, system, "accuracy", sum(scores) / len(scores), low, high, len(scores)))
    return rows


def record(folder: str, system: str) -> None:
    """Write results/quickstart/SYSTEM.json from a trained model's folder."""
    import lalte
    from eval.results import result, write_json
    from models.config import load_config

    model, tokenizer = lalte.load(folder, "cpu", "float32")
    rows = measure(model, tokenizer, system, None, RUNS / f"record-{system}", load_config(CHECKPOINT))
    content = result("quickstart", rows, config={"tasks": TASKS, "samples": SAMPLES, "seed": SEED}, device="cpu")
    write_json(RECORDS / f"{system}.json", content, overwrite=True)


def generate(model: Any, tokenizer: Any) -> None:
    """A long prompt, answered as a stream."""
    from eval.needles import make_samples
    from models.terminal import run

    sample = make_samples("niah_single_1", tokenizer, lengths_of(model.config)[-1], 1, 7)[0]
    print(f"(… {sample.tokens} tokens that hide {sample.outputs[0]} …) {sample.answer_prefix}", flush=True)
    run(model, tokenizer, sample.text, max_new_tokens=32)


def cache_and_speed(model: Any, tokenizer: Any) -> tuple[list[int], float, float]:
    """Cache bytes after each of CACHE_LENGTHS tokens, and tokens/s of reading and of writing."""
    import torch

    from models.generation import decode_one_token, prefill

    text = (ROOT / "docs" / "algorithm.md").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids
    ids = ids.repeat(1, -(-CACHE_LENGTHS[-1] // ids.shape[1]))[:, : CACHE_LENGTHS[-1]]
    cache, sizes, read, seconds = model.new_cache(), [], 0, 0.0
    for length in CACHE_LENGTHS:
        started = time.perf_counter()
        logits = prefill(model, ids[:, read:length], cache)
        seconds += time.perf_counter() - started
        read = length
        sizes.append(cache.nbytes)
    token, started = logits.argmax(-1, keepdim=True), time.perf_counter()
    for _ in range(100):
        token = decode_one_token(model, token, cache).argmax(-1, keepdim=True)
    assert torch.isfinite(token).all()
    return sizes, read / seconds, 100 / (time.perf_counter() - started)


def show_table(rows: list[dict], records: dict[str, dict], lengths: tuple[int, ...]) -> str:
    """The accuracy table as Markdown: a line a system and kind of sample."""
    cells = {(r["system"], r["case"]): r for r in rows}
    for content in records.values():
        cells |= {(r["system"], r["case"]): r for r in content["rows"]}
    systems = ["lalte", "lalte, budget 0", *records]
    lines = ["| S-NIAH task | system | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |", "|---" * 5 + "|"]
    for task, _ in TASKS:
        for kind in ("", " beyond the window"):
            for system in systems:
                found = [cells.get((system, f"{task}{kind} L{n}")) for n in lengths]
                values = [f"{c['median']:.2f} (n {c['n']})" if c else "-" for c in found]
                name = system + (" (recorded)" if system in records else "")
                lines.append(f"| {task.removeprefix('niah_')}{kind} | {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def quickstart() -> None:
    import lalte
    from eval.results import write_bytes

    started = time.perf_counter()
    heading("1. Training for a minute, for show (the recipe's first stage; everything is in runs/quickstart/train)")
    first, last = train_for_show()

    model, tokenizer = lalte.load(CHECKPOINT, "cpu", "float32")
    lengths = lengths_of(model.config)
    heading(f"2. S-NIAH of the shipped model at 1, 2 and 4 times its memory of {lengths[0]:,} tokens a head")
    rows = []
    for system, budget in (("lalte", None), ("lalte, budget 0", 0)):
        out = RUNS / "niah" / ("lalte" if budget is None else "lalte-budget-0")
        shutil.rmtree(out, ignore_errors=True)
        rows += measure(model, tokenizer, system, budget, out, model.config)

    heading("3. Writing after a long prompt")
    generate(model, tokenizer)
    sizes, reading, writing = cache_and_speed(model, tokenizer)

    records = {p.stem: json.loads(p.read_text()) for p in sorted(RECORDS.glob("*.json"))}
    log = [json.loads(line) for line in (CHECKPOINT / "log.jsonl").read_text().splitlines()]
    summary = "\n".join(
        [
            "| | loss at the start | at the end |",
            "|---|---|---|",
            f"| trained here, for show, 200 small steps | {first:.2f} | {last:.2f} |",
            f"| the shipped model (recorded), {log[-1]['step']:,} steps, {log[-1]['tokens'] / 1e6:.0f} M tokens | "
            f"{log[0]['lm_loss']:.2f} | {log[-1]['lm_loss']:.3f} |",
            "",
            show_table(rows, records, lengths),
            "",
            "| cache bytes after " + " | ".join(f"{n:,} tokens" for n in CACHE_LENGTHS) + " |",
            "|---" * (len(CACHE_LENGTHS)) + "|",
            "| " + " | ".join(f"{n:,}" for n in sizes) + " |",
            "",
            f"{reading:,.0f} tokens/s read, {writing:,.0f} tokens/s written, "
            f"{(time.perf_counter() - started) / 60:.1f} minutes in all",
        ]
    )
    heading("Summary: the shipped model, with its retained tokens and with them switched off; baselines alike")
    print(summary)
    write_bytes(RUNS / "summary.md", (summary + "\n").encode(), overwrite=True)
    print(f"\nThis table is in {RUNS / 'summary.md'}. Try: .venv/bin/lalte generate --help")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="DIR", help="record the table row of this trained model instead")
    parser.add_argument("--system", metavar="NAME", help="its name in the table")
    args = parser.parse_args()
    if bool(args.record) != bool(args.system):
        parser.error("--record and --system go together")
    if args.record:
        record(args.record, args.system)
    else:
        quickstart()
    return 0


if __name__ == "__main__":
    sys.exit(main())
