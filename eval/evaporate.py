"""EVAPORATE-style retrieval: a text ends with the name of something in it, and the model writes its value.

Greedy generation up to the end of the line, 48 tokens at most, as in lm-evaluation-harness 0.4.13. A run's folder
holds settings.json, samples/*.jsonl, result.json, table.md and, with lengths, a heat map.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .answering import Runner, accuracy_row, answer
from .conditions import evaluating, retained
from .evaporate_data import Document, check_task, read_documents
from .evaporate_prompts import contains, definition, make_samples, window_room
from .loading import model_identity, system_name, tokenizer_identity
from .reports import case_table, print_cases
from .results import SampleLog, claim_folder, result, say, write_bytes, write_json
from .tables import heat_map

NEW_TOKENS = 48
FIELDS = ("index", "task", "length", "key", "tokens", "depth_percent")  # of a sample, in its record


def _choose(documents: list[Document], samples: int | None, seed: int) -> list[tuple[int, Document]]:
    """Numbered documents; at most `samples` of each packed length, drawn at random."""
    if samples is None:
        return list(enumerate(documents))
    if samples < 1:
        raise ValueError(f"samples: {samples} is not a positive whole number")
    places: dict[int | None, list[int]] = {}
    for number, document in enumerate(documents):
        places.setdefault(document.length, []).append(number)
    chosen = []
    for own in places.values():
        chosen += random.Random(seed).sample(own, min(samples, len(own)))
    return [(number, documents[number]) for number in sorted(chosen)]


def _cells(
    documents: list[tuple[int, Document]], lengths: Sequence[int]
) -> tuple[list[tuple[int | None, list[tuple[int, Document]]]], bool]:
    """([(length, its documents)], whether they are cut to it)."""
    packed = sorted({document.length for _, document in documents if document.length is not None})
    if not packed:
        return [(length, documents) for length in lengths or [None]], bool(lengths)
    if any(document.length is None for _, document in documents):
        raise ValueError(f"data: some documents were packed to {packed} and others weren't; evaluate them apart")
    if missing := sorted(set(lengths) - set(packed)):
        raise ValueError(
            f"lengths: the data were packed to {packed}, not to {missing}; leave lengths out or build them"
        )
    of = lambda length: [(number, document) for number, document in documents if document.length == length]
    return [(length, of(length)) for length in lengths or packed], False


def _summary(case: str, records: list[dict[str, Any]], dropped: int) -> dict[str, Any]:
    return {
        "case": case,
        "samples": len(records),
        "dropped": dropped,
        "errors": sum(record["score"] is None for record in records),
        "mean_prompt_tokens": round(sum(record["tokens"] for record in records) / len(records), 1),
        "value_in_prompt": sum(record["depth_percent"] is not None for record in records),
    }


def _warnings(cells: list[dict[str, Any]]) -> list[str]:
    found = []
    for cell in cells:
        if cell["errors"]:
            found.append(f"{cell['case']}: {cell['errors']} of {cell['samples']} samples failed and don't count")
        if cell["value_in_prompt"] < cell["samples"]:
            missing = cell["samples"] - cell["value_in_prompt"]
            found.append(
                f"{cell['case']}: the prompts of {missing} of {cell['samples']} samples don't hold the value"
            )
        length = re.search(r" L(\d+)$", cell["case"])
        if length and cell["mean_prompt_tokens"] < 0.5 * int(length[1]):
            found.append(
                f"{cell['case']}: prompts have {cell['mean_prompt_tokens']:g} tokens only, as the documents are short"
            )
    return found


def run_evaporate(
    model: Any,
    tokenizer: Any,
    task: str,
    out_dir: str | Path,
    *,
    data: str | Path | None = None,
    lengths: Sequence[int] = (),
    twice: bool = False,
    scoring: str = "v1",
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    budget: int | None = None,
    retention: str | None = None,
    resume: bool = True,
    progress: bool = True,
    save_prompts: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """Measures retrieval from documents and writes the run's folder; continues an interrupted run.

    Args:
        task: fda, swde or squad.
        data: JSONL file or hub name; None: the task's data set on the hub.
        lengths: windows of so many tokens, answer included; none: the texts as they are. Data that were packed to
            lengths aren't cut; then these choose among theirs.
        twice: the model reads the text two times.
        scoring: v0 or v1 of the harness's tasks.
        samples: so many documents, drawn with `seed`; None: all.
        budget, retention: retained tokens per KV head during the run, and what chooses them; None: the model's own.

    Returns:
        The content of result.json: accuracy with its 95 % Wilson interval for each length.

    Raises:
        ValueError: an argument or a document that can't be used, or a folder of another run.
        RuntimeError: the first samples failed all.
    """
    check_task(task)
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is not a positive whole number")
    lengths = list(lengths)
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths: {lengths} names a length twice; name each once")
    for length in lengths:
        window_room(length)
    documents, source = read_documents(task, data)
    chosen = _choose(documents, samples, seed)
    groups, windows = _cells(chosen, lengths)
    digest = hashlib.sha256("\0".join(str(astuple(document)) for _, document in chosen).encode()).hexdigest()
    settings = {
        "definition": definition(task, scoring, twice=twice, windows=windows),
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "task": task,
        "data": source,
        "data_digest": digest[:16],
        "lengths": lengths,
        "samples": samples,
        "seed": seed,
        "budget": budget,
        "retention": retention,
    }
    name = f"{task}-twice" if twice else task
    made = []
    for length, own in groups:
        ready = make_samples(task, own, tokenizer, length, scoring=scoring, twice=twice, windows=windows)
        if not ready:
            raise ValueError(
                f"data: all {len(own)} documents of {source} have answers of one character; none is left"
            )
        made.append((f"{name} L{length}" if length else name, len(own) - len(ready), ready))
    out, rows, cells, records = Path(out_dir), [], [], []
    system = system or system_name(model)
    answer_line = partial(answer, model, tokenizer, new_tokens=NEW_TOKENS, one_line=True)
    total = sum(len(ready) for _, _, ready in made)
    with retained(model, budget, retention), evaluating(model), tqdm(total=total, disable=not progress) as bar:
        claim_folder(out, settings, resume=resume)
        runner = Runner(answer_line, lambda text, values: contains(text, values[0]), FIELDS, save_prompts)
        for case, dropped, ready in made:
            bar.set_description(case)
            with SampleLog(out / "samples" / f"{case.replace(' ', '-')}.jsonl") as log:
                answered = runner.run_case(log, ready, batch_size, bar)
            records += answered
            cells.append(_summary(case, answered, dropped))
            found = accuracy_row(answered, case, system)
            rows += [found] if found else []
    keys = ("definition", "tokenizer", "lengths", "samples", "seed")
    content = result(
        "evaporate",
        rows,
        config={**settings, "batch_size": batch_size},
        device=next(model.parameters()).device,
        **{key: settings[key] for key in keys},
        cells=cells,
        warnings=_warnings(cells),
    )
    write_json(out / "result.json", content, overwrite=True)
    write_bytes(out / "table.md", case_table(rows).encode(), overwrite=True)
    placed = [record for record in records if record["depth_percent"] is not None and record["length"]]
    if placed:
        columns = sorted({record["length"] for record in placed})
        heat_map(out / f"heatmap-{name}.png", placed, columns, name, overwrite=True)
    if progress:
        print_cases(rows, "EVAPORATE: accuracy [95 % interval]")
        for warning in content["warnings"]:
            say(f"warning: {warning}")
    return content
