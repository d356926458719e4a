"""Runs needle tasks on a causal language model: generation, scoring, resuming, and the files of a run.

A run's folder holds settings.json (what the results depend on), samples/<task>-L<length>.jsonl (each sample as
soon as it is answered), result.json, table.md and heatmap-<task>.png.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .loading import model_identity, tokenizer_identity
from .needles import DEFINITION, NEW_TOKENS, NeedleSample, find_task, make_samples, score
from .results import SampleLog, claim_folder, result, row, say, wilson, write_bytes, write_json
from .tables import heat_map, markdown_table, print_table

HOPELESS = 8  # so many failures before the first answer end a run: something is wrong with all of it


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [B, T], padded at the left.

    Special tokens are those that the tokenizer adds by itself, but for an end-of-text token at the end, after
    which no answer could follow.
    """
    eos = tokenizer.eos_token_id
    rows = [tokenizer(text, verbose=False).input_ids for text in texts]
    rows = [ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in rows]
    width = max(len(ids) for ids in rows)
    pad = _pad_id(tokenizer)
    ids_BT = torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    return ids_BT, mask_BT


def _pad_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0  # padding is masked, so that any token serves


@contextmanager
def _without_habits(model: Any) -> Iterator[None]:
    """Sets the model's own generation settings aside: generate() would take what isn't given from there."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def answer(model: Any, tokenizer: Any, texts: Sequence[str], new_tokens: int) -> list[str]:
    """Greedy continuations of the texts, up to `new_tokens` tokens or the tokenizer's end-of-text token."""
    from transformers import GenerationConfig

    ids_BT, mask_BT = encode_prompts(tokenizer, texts)
    device = next(model.parameters()).device
    eos = tokenizer.eos_token_id
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=_pad_id(tokenizer), eos_token_id=eos
    )
    with _without_habits(model):
        out_BT = model.generate(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=greedy
        )
    answers = []
    for ids in out_BT[:, ids_BT.shape[1] :].tolist():
        end = ids.index(eos) if eos is not None and eos in ids else len(ids)
        answers.append(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return answers


@contextmanager
def retention_budget(model: Any, budget: int | None) -> Iterator[None]:
    """Runs a model with another number of retained tokens per head; None: with its own.

    The model's `set_retention_budget(budget)` returns the budget it replaces, or None, with which it takes its own.

    Raises:
        ValueError: the model retains no tokens, or the budget is negative.
    """
    if budget is None:
        yield
        return
    if budget < 0:
        raise ValueError(f"budget: {budget} is negative; give the retained tokens per head, 0 for none")
    if not hasattr(model, "set_retention_budget"):
        raise ValueError(f"budget: {type(model).__name__} retains no tokens; leave the budget out")
    previous = model.set_retention_budget(budget)
    try:
        yield
    finally:
        model.set_retention_budget(previous)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


class _Runner:
    """Answers samples in batches; a sample that fails is recorded and the rest goes on."""

    def __init__(self, model: Any, tokenizer: Any, new_tokens: int, save_prompts: bool) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.new_tokens, self.save_prompts = new_tokens, save_prompts
        self.answered = 0
        self.failed = 0

    def _try(self, batch: Sequence[NeedleSample]) -> list[str] | Exception:
        try:
            return answer(self.model, self.tokenizer, [sample.text for sample in batch], self.new_tokens)
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            return error

    def _record(self, sample: NeedleSample, prediction: str | Exception) -> dict[str, Any]:
        failed = isinstance(prediction, Exception)
        record = {
            "index": sample.index,
            "task": sample.task,
            "length": sample.length,
            "tokens": sample.tokens,
            "depth_percent": sample.depth_percent,
            "expected": list(sample.outputs),
            "prediction": None if failed else prediction,
            "score": None if failed else score(prediction, sample.outputs),
            "error": _error_text(prediction) if failed else None,
        }
        return record | ({"prompt": sample.text} if self.save_prompts else {})

    def run(self, batch: Sequence[NeedleSample]) -> list[dict[str, Any]]:
        """Records of a batch; after a failure its samples are tried one by one."""
        predictions = self._try(batch)
        if isinstance(predictions, Exception):
            one_by_one = [self._try([sample]) for sample in batch] if len(batch) > 1 else [predictions]
            predictions = [p if isinstance(p, Exception) else p[0] for p in one_by_one]
        errors = [p for p in predictions if isinstance(p, Exception)]
        self.failed += len(errors)
        self.answered += len(batch) - len(errors)
        if not self.answered and self.failed >= HOPELESS:
            raise RuntimeError(f"the first {self.failed} samples all failed: {_error_text(errors[-1])}") from errors[
                -1
            ]
        return [self._record(sample, p) for sample, p in zip(batch, predictions, strict=True)]


def _finished(log: SampleLog, made: Sequence[NeedleSample]) -> set[int]:
    """Numbers of the samples that need no more work; failed ones are tried again."""
    for sample in made:
        record = log.records.get(sample.index)
        if record is not None and record.get("expected") != list(sample.outputs):
            raise ValueError(
                f"{log.path}: sample {sample.index} expects {record.get('expected')!r} there and "
                f"{list(sample.outputs)!r} here; choose another folder"
            )
    return {index for index, record in log.records.items() if record["score"] is not None}


def _run_cell(
    runner: _Runner, log: SampleLog, made: Sequence[NeedleSample], batch_size: int, bar: Any
) -> list[dict[str, Any]]:
    """Records of one task at one length, in the order of the samples."""
    done = _finished(log, made)
    open_ = [sample for sample in made if sample.index not in done]
    bar.update(len(made) - len(open_))
    for start in range(0, len(open_), batch_size):
        for record in runner.run(open_[start : start + batch_size]):
            log.append(record)
            bar.update()
        scores = [r["score"] for r in log.records.values() if r["score"] is not None]
        bar.set_postfix_str(f"accuracy {sum(scores) / len(scores):.3f}" if scores else "no answer yet")
    return [log.records[sample.index] for sample in made]


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
        "mean_prompt_tokens": round(sum(record["tokens"] for record in records) / len(records), 1),
        "used_share": round(sum(r["tokens"] + new_tokens for r in records) / len(records) / length, 3),
    }


def _row(records: Sequence[dict[str, Any]], case: str, system: str) -> dict[str, Any] | None:
    scores = [record["score"] for record in records if record["score"] is not None]
    if not scores:
        return None
    low, high = wilson(sum(scores), len(scores))
    return row(case, system, "accuracy", sum(scores) / len(scores), low, high, len(scores))


def _warnings(cells: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for cell in cells:
        if cell["errors"]:
            found.append(
                f"{cell['case']}: {cell['errors']} of {cell['samples']} samples failed and don't count; run again to "
                "try them again"
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
    )
    make = lambda task, length: make_samples(task, tokenizer, length, samples, seed, new_tokens, step=step)
    # texts that are missing and lengths that are too short show here, before any long work
    ready = {(task, min(lengths)): make(task, min(lengths)) for task in names}
    rows, cells, records = [], [], {name: [] for name in names}
    system = system or getattr(model.config, "model_type", None) or type(model).__name__
    with (
        retention_budget(model, budget),
        _evaluating(model),
        tqdm(total=len(names) * len(lengths) * samples, disable=not progress, unit="sample") as bar,
    ):
        claim_folder(out, settings, resume=resume)
        runner = _Runner(model, tokenizer, new_tokens, save_prompts)
        for task in names:
            for length in lengths:
                bar.set_description(f"{task} L{length}")
                made = ready.pop((task, length), None) or make(task, length)
                with SampleLog(out / "samples" / f"{task}-L{length}.jsonl") as log:
                    answered = _run_cell(runner, log, made, batch_size, bar)
                records[task] += answered
                cells.append(_cell_summary(answered, length, new_tokens))
                found = _row(answered, cells[-1]["case"], system)
                rows += [found] if found else []
    device = next(model.parameters()).device
    content = result(
        "niah",
        rows,
        config={**settings, "batch_size": batch_size},
        device=device,
        **{key: settings[key] for key in ("definition", "tokenizer", "lengths", "samples", "seed")},
        cells=cells,
        warnings=_warnings(cells),
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
