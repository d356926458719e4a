"""What the scorer keeps: the share of needle tokens that are still retained when the question has been read.

The model reads a needle prompt with its answer prefix once, in its parallel form with the budget enforced. At the
last position every token that has left the window and is no sink is either retained or lost. These are counted apart:

    value   tokens of the values that needles give
    needle  the other tokens of needle sentences
    other   the haystack, and what stands around it

A token that two of them share belongs to the first. A run's folder holds settings.json, result.json and table.md.

Shapes: T tokens, H KV heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .conditions import evaluating, retained
from .inspection import Inspection, inspect_text
from .loading import model_identity, system_name, tokenizer_identity
from .needles import NEEDLE, find_task, make_samples
from .results import claim_folder, read_json, result, wilson, write_bytes, write_json

DEFINITION = "retained tokens at the end of RULER niah prompts (their answer prefix read), version 1"
KINDS = ("value", "needle", "other")
# the sentence of a needle with its value as a group; values hold no white space
_SENTENCE = re.compile(
    re.escape(NEEDLE)
    .replace(r"\{kind\}", r"\w+")
    .replace(r"\{key\}", r".{1,80}?")
    .replace(r"\{value\}", r"(?P<value>\S+?)")
)


def token_kinds(texts: Sequence[str]) -> Tensor:
    """Of each token whether it belongs to a value (0), to the rest of a needle sentence (1) or to neither (2): [T].

    Args:
        texts: the characters of each token; joined they are the prompt.
    """
    starts, place = [], 0
    for text in texts:
        starts.append(place)
        place += len(text)
    spans = [(*m.span("value"), *m.span()) for m in _SENTENCE.finditer("".join(texts))]
    kinds = torch.full((len(texts),), KINDS.index("other"))
    for index, (start, text) in enumerate(zip(starts, texts, strict=True)):
        end = start + len(text)
        for low, high, first, last in spans:
            if start < high and end > low:
                kinds[index] = KINDS.index("value")
            elif start < last and end > first:
                kinds[index] = KINDS.index("needle")
    return kinds


def count_kept(found: Inspection, kinds_T: Tensor) -> dict[int, Tensor]:
    """By attention layer: [2, kinds, H] int64, retained and all tokens of each kind that only retention can keep."""
    length = len(kinds_T)
    index_T = torch.arange(length)
    eligible_T = (index_T >= found.sinks) & (index_T < length - (found.window or length))
    counts = {}
    for layer in found.layers:
        kept_TH = (layer.end_TH >= length) & eligible_T[:, None]
        all_TH = eligible_T[:, None].expand_as(kept_TH)
        of = lambda flags_TH: torch.stack([flags_TH[kinds_T == kind].sum(0) for kind in range(len(KINDS))])
        counts[layer.layer] = torch.stack([of(kept_TH), of(all_TH)])
    return counts


def _shares(case: str, counts: dict[int, Tensor]) -> list[dict[str, Any]]:
    """An entry for each layer and head, and one for the layer (head null), of one case."""
    entries = []
    for layer, count in counts.items():
        heads = [(None, count.sum(-1)), *((head, count[..., head]) for head in range(count.shape[-1]))]
        for head, (kept, tokens) in heads:
            entry: dict[str, Any] = {"case": case, "layer": layer, "head": head}
            for kind, k, n in zip(KINDS, kept.tolist(), tokens.tolist(), strict=True):
                low, high = wilson(k, n) if n else (None, None)
                share = k / n if n else None
                entry[kind] = {"kept": k, "tokens": n, "share": share, "low": low, "high": high}
            entries.append(entry)
    return entries


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Shares by layer as a Markdown table."""
    lines = ["| case | layer | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 2) + "|"]
    for entry in entries:
        if entry["head"] is None:
            cells = [
                "-" if entry[kind]["share"] is None else f"{entry[kind]['share']:.3f} of {entry[kind]['tokens']}"
                for kind in KINDS
            ]
            lines.append(f"| {entry['case']} | {entry['layer']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_retained(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    out_dir: str | Path,
    *,
    budget: int | None = None,
    step: int | None = None,
    resume: bool = True,
    progress: bool = True,
    system: str | None = None,
) -> dict[str, Any]:
    """Counts what each head retains of needle prompts, and writes the run's folder.

    Args:
        model: a `HybridForCausalLM` with a scorer.
        tasks, lengths, samples, seed, step: as in `niah.run_niah`; the prompts are the same.
        budget: retained tokens per KV head; None: the model's own.

    Returns:
        The content of result.json. `shares` has an entry for each case, layer and head (null: all heads of the
        layer): for `value`, `needle` and `other` the tokens `kept` of all `tokens` that have left the window and are
        no sinks, their `share` and its 95 % Wilson interval (tokens of one prompt aren't independent, so it is a
        little too narrow).

    Raises:
        ValueError: a model whose slots aren't filled by a scorer, or what `make_samples` refuses.
    """
    if getattr(model, "retention", None) != "lte":
        raise ValueError(f"model: {type(model).__name__} has no retention scorer at work; give a laLTE model")
    names = [find_task(task).name for task in tasks]
    for what, given in (("tasks", names), ("lengths", lengths)):
        if len(set(given)) < len(given):
            raise ValueError(f"{what}: {list(given)} names one twice; name each once")
    settings = {
        "definition": DEFINITION,
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "tasks": names,
        "lengths": list(lengths),
        "samples": samples,
        "seed": seed,
        "budget": budget,
        "step": step,
    }
    make = lambda task, length: make_samples(task, tokenizer, length, samples, seed, step=step)
    # what can't be used shows here: a folder that was claimed for it would refuse the run as it was meant
    with retained(model, budget):
        ready = {(task, min(lengths)): make(task, min(lengths)) for task in names} if lengths else {}
    if not ready:
        raise ValueError(f"tasks: {names}, lengths: {list(lengths)}; name at least one of each")
    claim_folder(out_dir, settings, resume=resume)
    if (Path(out_dir) / "result.json").exists():
        return read_json(Path(out_dir) / "result.json")  # of the same settings: there is nothing left to do
    shares = []
    with evaluating(model), tqdm(total=len(names) * len(lengths) * samples, disable=not progress) as bar:
        for task in names:
            for length in lengths:
                counts: dict[int, Tensor] = {}
                for sample in ready.pop((task, length), None) or make(task, length):
                    found = inspect_text(model, tokenizer, sample.text, budget=budget, maps=False, progress=False)
                    new = count_kept(found, token_kinds(found.tokens.texts))
                    counts = {layer: count + counts.get(layer, 0) for layer, count in new.items()}
                    bar.update()
                shares += _shares(f"{task} L{length}", counts)
    content = result(
        "retained",
        [],
        config=settings,
        device=next(model.parameters()).device,
        **{key: settings[key] for key in ("definition", "tokenizer", "lengths", "samples", "seed")},
        system=system or system_name(model),
        shares=shares,
    )
    write_json(Path(out_dir) / "result.json", content, overwrite=True)
    write_bytes(Path(out_dir) / "table.md", table(shares).encode(), overwrite=True)
    return content
