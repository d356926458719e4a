"""Runs needle tasks on a causal language model: generation, scoring, resuming, and the files of a run.

A run's folder holds settings.json (what the results depend on), samples/<task>-L<length>.jsonl (each sample as
soon as it is answered), result.json, table.md and heatmap-<task>.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .answering import Runner, accuracy_row, answer
from .conditions import evaluating, retained
from .loading import model_identity, positions, system_name, tokenizer_identity
from .needles import DEFINITION, NEW_TOKENS, find_task, make_samples, score
from .results import SampleLog, claim_folder, result, say, write_bytes, write_json
from .tables import heat_map, markdown_table, print_table

FIELDS = ("index", "task", "length", "tokens", "depth_percent")  # of a sample, in its record


def _check_numbers(lengths: Sequence[int], **positive: int | None) -> None:
    if not lengths:
        raise ValueError("lengths: none given; give at least one, e.g. 1024")
    for name, value in [*(("lengths", length) for length in lengths), *positive.items()]:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: {value!r} is not a positive whole number")
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths: {list(lengths)} names a length twice; name each once")


def _settings(model: Any, tokenizer: Any, step: int | None, new_tokens: int, **more: Any) -> dict[str, Any]:
    changed = [f"haystack step {step}"] if step is not None else []
    changed += [f"{new_tokens} new tokens"] if new_tokens != NEW_TOKENS else []
    return {
        "definition": DEFINITION + (f"; changed: {', '.join(changed)}" if changed else ""),
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "new_tokens": new_tokens,
        "step": step,
        **more,
    }


def _cell_summary(records: Sequence[dict[str, Any]], length: int, new_tokens: int) -> dict[str, Any]:
    task = records[0]["task"]
    return {
        "case": f"{task} L{length}",
        "samples": len(records),
        "errors": sum(record["score"] is None for record in records),
        "error": next((record["error"] for record in records if record["score"] is None), None),
        "longest": max(record["tokens"] for record in records) + new_tokens,
        "mean_prompt_tokens": round(sum(record["tokens"] for record in records) / len(records), 1),
        "used_share": round(sum(r["tokens"] + new_tokens for r in records) / len(records) / length, 3),
    }


def _warnings(cells: Sequence[dict[str, Any]], limit: int | None) -> list[str]:
    found = []
    for cell in cells:
        if cell["errors"]:
            found.append(
                f"{cell['case']}: {cell['errors']} of {cell['samples']} samples failed and don't count; run again to "
                f"try them again (the first: {cell['error']})"
            )
        if limit is not None and cell["longest"] > limit:
            found.append(
                f"{cell['case']}: with the answers, prompts have up to {cell['longest']} tokens, the model has "
                f"{limit} positions"
            )
        if cell["used_share"] < 0.5:
            found.append(
                f"{cell['case']}: prompts have {cell['mean_prompt_tokens']:g} tokens only, as the haystack grows "
                "in steps too large for this length; a longer length, or a smaller step, tests more"
            )
    return found


def run_niah(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    batch_size: int,
    out_dir: str | Path,
    *,
    new_tokens: int = NEW_TOKENS,
    budget: int | None = None,
    retention: str | None = None,
    step: int | None = None,
    resume: bool = True,
    progress: bool = True,
    save_prompts: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """Measures needle retrieval and writes the run's folder; continues an interrupted run of the same settings.

    Args:
        model: any causal model of transformers, on its device.
        tokenizer: its tokenizer.
        tasks: names as in `needles.TASKS`, with or without `niah_`.
        lengths: tokens of prompt and new tokens together.
        samples: for each task and length; RULER takes 500.
        seed: of the prompts.
        batch_size: samples generated at once; has no influence on the prompts.
        out_dir: the run's folder.
        new_tokens: generated tokens at most; 128 in the definition.
        budget: retained tokens per KV head during the run (0: none); None: the model's own.
        retention: what chooses the retained tokens (`HybridForCausalLM.set_retention`); None: the model's own.
        step: growth of the haystack, as in `make_samples`; None: the definition's.
        resume: whether a folder that holds a run of the same settings may be continued.
        progress: a bar on standard error, and the table at the end.
        save_prompts: whether samples carry their prompt.
        system: name in the result's rows; None: the model's model_type.

    Returns:
        The content of result.json: accuracy with its 95 % Wilson interval for each task and length.

    Raises:
        ValueError: an argument that can't be used (named), a folder of another run, a missing text source.
        RuntimeError: the first samples failed all.
    """
    names = [find_task(task).name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks: {list(tasks)}; name at least one task, and each once")
    lengths = list(lengths)
    _check_numbers(lengths, samples=samples, batch_size=batch_size, new_tokens=new_tokens, step=step)
    out = Path(out_dir)
    settings = _settings(
        model,
        tokenizer,
        step,
        new_tokens,
        tasks=names,
        lengths=lengths,
        samples=samples,
        seed=seed,
        budget=budget,
        retention=retention,
    )
    make = lambda task, length: make_samples(task, tokenizer, length, samples, seed, new_tokens, step=step)
    # texts that are missing and lengths that are too short show here, before any long work
    ready = {(task, min(lengths)): make(task, min(lengths)) for task in names}
    rows, cells, records = [], [], {name: [] for name in names}
    system = system or system_name(model)
    with (
        retained(model, budget, retention),
        evaluating(model),
        tqdm(total=len(names) * len(lengths) * samples, disable=not progress, unit="sample") as bar,
    ):
        claim_folder(out, settings, resume=resume)
        runner = Runner(partial(answer, model, tokenizer, new_tokens=new_tokens), score, FIELDS, save_prompts)
        for task in names:
            for length in lengths:
                bar.set_description(f"{task} L{length}")
                made = ready.pop((task, length), None) or make(task, length)
                with SampleLog(out / "samples" / f"{task}-L{length}.jsonl") as log:
                    answered = runner.run_case(log, made, batch_size, bar)
                records[task] += answered
                cells.append(_cell_summary(answered, length, new_tokens))
                found = accuracy_row(answered, cells[-1]["case"], system)
                rows += [found] if found else []
    device = next(model.parameters()).device
    content = result(
        "niah",
        rows,
        config={**settings, "batch_size": batch_size},
        device=device,
        **{key: settings[key] for key in ("definition", "tokenizer", "lengths", "samples", "seed")},
        cells=cells,
        warnings=_warnings(cells, positions(model)),
    )
    return _write_run(out, content, records, lengths, progress)


def _write_run(
    out: Path, content: dict[str, Any], records: dict[str, list], lengths: list[int], show: bool
) -> dict[str, Any]:
    """Result, table and heat maps; they may replace those of the same run, as settings.json has been compared."""
    write_json(out / "result.json", content, overwrite=True)
    write_bytes(out / "table.md", markdown_table(content["rows"]).encode(), overwrite=True)
    for task, found in records.items():
        heat_map(out / f"heatmap-{task}.png", found, sorted(lengths), task, overwrite=True)
    if show:
        print_table(content["rows"], "S-NIAH: accuracy [95 % interval]")
        for warning in content["warnings"]:
            say(f"warning: {warning}")
    return content
