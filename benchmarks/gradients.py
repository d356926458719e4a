"""Which straight-through gradient finds what has to be kept? The shipped model learns its scorer anew.

    python -m benchmarks.gradients --out results/gradients
    python -m benchmarks.gradients --gradients presence_beyond_window --seeds 0 --out runs/gradients

Everything but the scorer is frozen, which starts from keeping all tokens; the penalty's weight grows until few are
kept. With everything kept the model has all tokens of the answers right, without retention only those that need no
memory, so what is lost is the scorer's. Rows are needle documents of the quick start's recipe in its essays;
measured on rows of their own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.quickstart import CHECKPOINT, RECIPE
from eval.results import result, row, say, write_bytes, write_json
from eval.settings import names, numbers
from lte.scorer import RetentionScorer
from lte.straight_through import STRAIGHT_THROUGH
from models.modeling import HybridForCausalLM

# a window much shorter than the rows, and slots for one needle's tokens or few needles' values
MODEL = {"window": 96, "budget": 24, "max_position_embeddings": 640, "keep_all_steps": 0}
SCORER = {"scorer_init_scale": 0.0, "scorer_dropout": 0.0, "penalty_interval": 4}
BETAS = (0.9, 0.95)
HELD_OUT = 1_000_000  # number of the first row that is measured on
DATA = (
    "curriculum=[]",
    "data.sequence_length=640",
    "needles.fraction=1.0",
    "needles.length=null",
    "needles.keys=[1,4]",
    "needles.questions=[1,4]",
    "needles.variants=[]",
    "needles.haystacks=[text]",
    "model.overrides={}",
    "tokenizer.train_vocab_size=null",
    f"tokenizer.path={CHECKPOINT}",
)


class Rows:
    """Needle documents as batches of equal rows.

    Args:
        cache: folder for the tokenised essays.
    """

    def __init__(self, cache: str) -> None:
        from training.config import load_config
        from training.data import TrainingRows
        from training.setup import make_tokenizer, plan_steps

        config = load_config(RECIPE, [*DATA, f"data.cache_dir={cache}"])
        tokenizer = make_tokenizer(config, Path(cache), save=False)
        stages, _ = plan_steps(config, 1)
        self.rows = TrainingRows(config.data, stages, tokenizer, seed=config.seed, progress=False)

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """input_ids and labels [count, 640]."""
        rows = [self.rows[0, index] for index in range(first, first + count)]
        stacked = {"input_ids": [row.tokens for row in rows], "labels": [row.labels for row in rows]}
        return {name: torch.stack([torch.from_numpy(x) for x in parts]) for name, parts in stacked.items()}


def make_model(gradient: str, seed: int, penalty_min: float = 1e-3) -> HybridForCausalLM:
    """The shipped model with a new scorer, which alone can be trained."""
    torch.manual_seed(seed)
    changes = MODEL | SCORER | {"straight_through": gradient, "penalty_min": penalty_min}
    model = HybridForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, **changes).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, RetentionScorer):
            module.reset_parameters()
            module.requires_grad_(True)
    model.penalty_control.reset_parameters()
    return model


@torch.no_grad()
def accuracy(model: HybridForCausalLM, batch: dict[str, torch.Tensor], budget: int) -> float:
    """Share of the answers' tokens that the model would have written, given those before, under a budget."""
    model.eval()
    with model.with_retention(budget=budget):
        guess = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].argmax(-1)
    wanted = batch["labels"][:, 1:]
    return (guess == wanted)[wanted >= 0].float().mean().item()


def learn(
    gradient: str,
    seed: int,
    rows: Rows,
    *,
    steps: int,
    every: int,
    sequences: int,
    held_out: int,
    lr: float,
    penalty_min: float,
) -> list[dict[str, Any]]:
    """Train a scorer; what it keeps and what it is worth, every `every` steps."""
    model = make_model(gradient, seed, penalty_min)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, betas=BETAS)
    test, found = rows.batch(HELD_OUT, held_out), []
    without = accuracy(model, test, 0)  # all else is frozen, so it stays
    length = test["input_ids"].shape[1]
    for step in range(1, steps + 1):
        model.train()
        output = model(**rows.batch(((seed * steps) + step - 1) * sequences, sequences), use_cache=False)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update_retention_penalty()
        if step % every == 0:
            report = model.retention_report()
            entry = {
                "gradient": gradient,
                "seed": seed,
                "step": step,
                "kept_per_head": report["kept_per_head"],
                "lambda": report["lambda_mean"],
                "all_retained": accuracy(model, test, length),
                "budget": accuracy(model, test, MODEL["budget"]),
                "nothing_retained": without,
            }
            found.append(entry)
            say(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()))
    return found


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, as Markdown."""
    length = MODEL["max_position_embeddings"] - MODEL["window"]
    lines = [
        f"| gradient | step | kept of {length} tokens a head | answer tokens right "
        f"| with a budget of {MODEL['budget']} | with none |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for gradient, step in dict.fromkeys((e["gradient"], e["step"]) for e in entries):
        own = [e for e in entries if (e["gradient"], e["step"]) == (gradient, step)]
        of = lambda key, own=own: mean(e[key] for e in own)
        values = [
            f"{of('kept_per_head'):.1f}",
            *(f"{of(k):.3f}" for k in ("all_retained", "budget", "nothing_retained")),
        ]
        lines.append(f"| {gradient} | {step} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def figures(entries: Sequence[dict[str, Any]], out: Path) -> None:
    """Answers right and tokens kept over steps, a curve a gradient: mean, least and most over seeds."""
    from eval.figures import Curve, curves

    for key, label, metric in (
        ("all_retained", "answer tokens right", "accuracy"),
        ("kept_per_head", "kept tokens", "kept"),
    ):
        lines = []
        for gradient in dict.fromkeys(e["gradient"] for e in entries):
            steps = sorted({e["step"] for e in entries if e["gradient"] == gradient})
            of = [[e[key] for e in entries if (e["gradient"], e["step"]) == (gradient, step)] for step in steps]
            lines.append(Curve(gradient, steps, [mean(x) for x in of], [min(x) for x in of], [max(x) for x in of]))
        text = {"title": f"a new scorer for a frozen model: {label}", "x_label": "steps", "y_label": label}
        curves(out / key, lines, **text, metric=metric, overwrite=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 for an error of the user's."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--gradients", metavar="A,B", type=names, default=list(STRAIGHT_THROUGH), help="settings of straight_through")
    add("--seeds", metavar="N,M", type=numbers, default=[0, 1])
    for name, value in (("steps", 100), ("every", 20), ("sequences", 3), ("held-out", 12)):
        add(f"--{name}", metavar="N", type=int, default=value)
    add("--lr", metavar="X", type=float, default=5e-3)
    add("--penalty-min", metavar="X", type=float, default=1e-3, help="λ at its start")
    add("--cache", metavar="DIR", default="~/.cache/lalte", help="folder of the tokenised essays")
    add("--out", metavar="DIR", default="results/gradients")
    args = made.parse_args(argv)
    rates = {"lr": args.lr, "penalty_min": args.penalty_min}
    numbers_given = {"steps": args.steps, "every": args.every, "sequences": args.sequences, "held_out": args.held_out}
    try:
        for name, value in numbers_given.items():
            if value < 1:
                raise ValueError(f"{name}={value} is below 1: give 1 or more")
        if args.every > args.steps:
            raise ValueError(f"every={args.every} is more than steps={args.steps}: nothing would be measured")
        for gradient in args.gradients:
            if gradient not in STRAIGHT_THROUGH:
                raise ValueError(f"gradients={gradient} is unknown: use {', '.join(STRAIGHT_THROUGH)}")
        rows = Rows(str(Path(args.cache).expanduser()))
        entries = [e for g in args.gradients for s in args.seeds for e in learn(g, s, rows, **numbers_given, **rates)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    last = [e for e in entries if e["step"] == max(e["step"] for e in entries)]
    found = []
    for gradient in args.gradients:
        own = [e["all_retained"] for e in last if e["gradient"] == gradient]
        found.append(row(f"step {last[0]['step']}", gradient, "accuracy", mean(own), min(own), max(own), len(own)))
    settings = {**MODEL, **SCORER, "seeds": args.seeds, **numbers_given, **rates}
    out = Path(args.out)
    write_json(
        out / "gradients.json",
        result("gradients", found, config=settings, device="cpu", entries=entries),
        overwrite=True,
    )
    write_bytes(out / "table.md", table(entries).encode(), overwrite=True)
    figures(entries, out)
    print(table(entries), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
