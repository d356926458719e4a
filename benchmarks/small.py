"""The first results: every evaluation of one model in one process.

    python -m benchmarks.small --config configs/eval/small.yaml --model runs/gdn --name gdn --out runs/eval/gdn

Every evaluation has a folder of its own in OUT, as its command `lalte eval …` would write it. An interrupted run goes
on when the same line is given again. results/small/README.md has the design, benchmarks/small_tables.py makes the
tables of all models.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.conditions import evaluating
from eval.settings import keep, load, names, numbers, resolve

BUDGET, POLICY = "budget-", "policy-"  # what folders of changed models begin with


@dataclass
class SmallConfig:
    """Settings; the comments of configs/eval/small.yaml say what each means."""

    model: str | None = None
    name: str | None = None
    out: str | None = None
    tasks: list[str] = field(default_factory=lambda: ["single_1", "single_2"])
    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    samples: int = 200
    essay_step: int | None = None
    squad: str | None = None
    swde: str | None = None
    swde_lengths: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=lambda: [2048])
    tokens: int = 250_000
    answers: int = 0
    budgets: list[int] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)
    memory_tasks: list[str] = field(default_factory=list)
    memory_lengths: list[int] = field(default_factory=list)
    memory_samples: int = 100
    kept_tasks: list[str] = field(default_factory=list)
    kept_lengths: list[int] = field(default_factory=list)
    kept_samples: int = 50
    seed: int = 42
    batch_size: int = 100
    dtype: str = "bfloat16"
    device: str = "auto"


Job = tuple[str, Callable[[Path], Any]]


# ---- validation perplexity ----


def run_validation(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str | Path],
    lengths: Sequence[int],
    tokens: int,
    out_dir: str | Path,
    *,
    system: str,
) -> dict[str, Any]:
    """Perplexity of rows of a text, each read alone, for every row length; writes OUT/result.json.

    Args:
        texts: text files, read one after the other and cut into rows; a last row that isn't full is left out.
        lengths: tokens of a row.
        tokens: how many to read.
        system: name in the result's rows.

    Raises:
        ValueError: a text that is shorter than a row, or a folder of another run.
    """
    from eval.intervals import bootstrap
    from eval.loading import model_identity, tokenizer_identity
    from eval.results import claim_folder, read_json, result, row, write_json
    from eval.streaming import chunks, text_tokens, texts_identity

    settings = {
        "definition": "perplexity of rows, each read alone, version 1",
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "text": texts_identity(texts),
        "lengths": list(lengths),
        "tokens": tokens,
    }
    claim_folder(out_dir, settings, resume=True)
    file = Path(out_dir) / "result.json"
    if file.exists():
        return read_json(file)  # of the same settings: there is nothing left to do
    rows = []
    with evaluating(model), torch.no_grad():
        for length in lengths:
            losses: list[list[float]] = []
            for ids in chunks(text_tokens(texts, tokenizer), length):
                if len(ids) < length or len(losses) >= tokens // length:
                    break
                ids_BT = torch.tensor([ids], device=model.device)
                losses.append([float(model(input_ids=ids_BT, labels=ids_BT, use_cache=False).lm_loss)])
            if not losses:
                raise ValueError(f"text: it holds less than a row of {length} tokens (or tokens={tokens} does)")
            mean = sum(loss for (loss,) in losses) / len(losses)
            low, high = bootstrap(losses, lambda means: means[:, 0].exp())
            rows.append(row(f"rows T{length}", system, "perplexity", math.exp(mean), low, high, len(losses)))
    more = {key: settings[key] for key in ("definition", "tokenizer")}
    content = result("validation", rows, config=settings, device=model.device, **more)
    write_json(file, content, overwrite=True)
    return content


# ---- one model ----


def is_essay(task: str) -> bool:
    """Whether a task's haystack grows by words; others grow by lines."""
    from eval.needles import find_task

    return find_task(task).haystack == "essay"


def needle_jobs(
    model: Any, tokenizer: Any, config: SmallConfig, prefix: str = "", **conditions: Any
) -> Iterator[Job]:
    """`lalte eval niah` under some conditions: haystacks of lines and of essays have a folder each."""
    from eval.niah import run_niah

    changed = bool(conditions)
    tasks = config.memory_tasks if changed else config.tasks
    lengths = config.memory_lengths if changed else config.lengths
    samples = config.memory_samples if changed else config.samples
    if conditions.get("budget") == 0:  # stands beside the members, so it is measured as they are
        tasks, lengths, samples = config.tasks, config.lengths, config.samples
    for kind, essay in (("lines", False), ("essays", True)):
        chosen = [task for task in tasks if is_essay(task) == essay]
        step = config.essay_step if essay else None

        def job(out: Path, chosen: list[str] = chosen, step: int | None = step) -> Any:
            run = (chosen, lengths, samples, config.seed, config.batch_size, out)
            return run_niah(model, tokenizer, *run, step=step, system=config.name, progress=False, **conditions)

        if chosen:
            yield f"{prefix}niah-{kind}", job


def answers_job(model: Any, tokenizer: Any, config: SmallConfig, budget: int | None = None) -> Job:
    """`lalte eval answers`, by the recipe that is kept in the run's folder."""
    from eval.answers import run_answers
    from eval.answers_cli import kept_recipe
    from training.held_out import HeldOutDocuments

    def job(out: Path) -> Any:
        rows = {"rows": config.answers, "seed": config.seed, "progress": False}
        documents = HeldOutDocuments(kept_recipe(config.model), tokenizer, **rows)
        given = {"budget": budget, "system": config.name, "progress": False}
        return run_answers(model, tokenizer, documents, out, **given)

    return ("" if budget is None else f"{BUDGET}{budget}-") + "answers", job


def jobs(model: Any, tokenizer: Any, config: SmallConfig) -> Iterator[Job]:
    """Folder and function of every evaluation of a model: only one with a scorer has those of its memory."""
    from eval.evaporate import run_evaporate
    from eval.retained import run_retained

    yield from needle_jobs(model, tokenizer, config)
    if config.text:
        read = (config.text, config.rows, config.tokens)
        yield "validation", lambda out: run_validation(model, tokenizer, *read, out, system=config.name)
    if config.answers:
        yield answers_job(model, tokenizer, config)
    common = {"samples": config.samples, "seed": config.seed, "batch_size": config.batch_size}
    common |= {"system": config.name, "progress": False}
    if config.squad:
        yield "squad", lambda out: run_evaporate(model, tokenizer, "squad", out, data=config.squad, **common)
    if config.swde:
        where = {"data": config.swde, "lengths": config.swde_lengths}
        yield "swde", lambda out: run_evaporate(model, tokenizer, "swde", out, **where, **common)
    if not model.config.has_scorer:
        return
    for budget in config.budgets:
        yield from needle_jobs(model, tokenizer, config, f"{BUDGET}{budget}-", budget=budget)
    if config.answers and 0 in config.budgets:
        yield answers_job(model, tokenizer, config, 0)
    for policy in config.policies:
        same = {"retention": policy, "budget": model.config.budget}
        yield from needle_jobs(model, tokenizer, config, f"{POLICY}{policy}-", **same)
    for kind, essay in (("lines", False), ("essays", True)):
        chosen = [task for task in config.kept_tasks if is_essay(task) == essay]
        where = (chosen, config.kept_lengths, config.kept_samples, config.seed)
        step = {"step": config.essay_step if essay else None, "system": config.name, "progress": False}
        if chosen:
            yield f"retained-{kind}", lambda out, w=where, s=step: run_retained(model, tokenizer, *w, out, **s)


def evaluate(config: SmallConfig) -> int:
    """Run every evaluation of one model; the number of those that failed, which the others don't wait for.

    Raises:
        ValueError: a model that can't be loaded.
    """
    model, tokenizer = load(config)
    out, failed = Path(config.out), 0
    for folder, job in jobs(model, tokenizer, config):
        started = time.perf_counter()
        try:
            rows = job(out / folder)["rows"]
        except (ValueError, RuntimeError) as error:
            failed += 1
            print(f"{config.name} {folder} failed: {' '.join(str(error).split())[:500]}", file=sys.stderr, flush=True)
            continue
        found = ", ".join(f"{row['case']} {row['median']:.3f}" for row in rows)
        print(f"{config.name} {folder} ({time.perf_counter() - started:.0f} s): {found}", flush=True)
    keep(config)
    return failed


# ---- command ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--config", metavar="FILE", help="YAML with any of the settings; options given here win")
    for name in ("model", "name", "out", "squad", "swde", "dtype", "device"):
        add(f"--{name}", metavar=name.upper())
    for name in (
        "samples",
        "essay_step",
        "tokens",
        "answers",
        "memory_samples",
        "kept_samples",
        "seed",
        "batch_size",
    ):
        add(f"--{name.replace('_', '-')}", metavar="N", type=int)
    for name in ("tasks", "text", "policies", "memory_tasks", "kept_tasks"):
        add(f"--{name.replace('_', '-')}", metavar="A,B", type=names)
    for name in ("lengths", "swde_lengths", "rows", "budgets", "memory_lengths", "kept_lengths"):
        add(f"--{name.replace('_', '-')}", metavar="N,M", type=numbers)
    return made


def results_parser(description: str | None, *, what: str, folders: str | None = None) -> argparse.ArgumentParser:
    """The command line of what reads runs and writes results: DIR, --out and --overwrite.

    Args:
        what: the folder, or folders, that it reads, in words.
        folders: how many, as argparse has it; None: one.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", metavar="DIR", nargs=folders, help=what)
    made.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    made.add_argument("--overwrite", action="store_true", help="replace earlier files")
    return made


def exit_status(command: Callable[[], int | None]) -> int:
    """That of a command: its own, or 2 for an error of the user's, which is told."""
    try:
        return command() or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 if an evaluation failed, 2 for an error of the user's."""
    args = parser().parse_args(argv)
    return exit_status(lambda: int(evaluate(resolve(SmallConfig, args, needed=("model", "name", "out"))) > 0))


if __name__ == "__main__":
    sys.exit(main())
