"""Answers in documents like those of the training, token by token: does a model do what it was trained to do?

Shapes: T tokens of a document, V pieces of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eval.conditions import evaluating, retained
from eval.loading import model_identity, system_name, tokenizer_identity
from eval.reports import case_table
from eval.results import claim_folder, read_json, result, row, wilson, write_bytes, write_json
from models.losses import IGNORE

DEFINITION = "answers to needle documents of a recipe, given the tokens before each, version 1"
FIRST, TOKENS = "first token", "tokens"


class Documents(Protocol):
    """What is read: `training.held_out.HeldOutDocuments`, for one.

    kinds: a name or description for each kind; settings: what the documents depend on, JSON values only.
    """

    kinds: list[str]
    settings: dict[str, Any]

    def of_kind(self, kind: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and labels, int64 [T] each: the token itself in answers, elsewhere -100."""


@dataclass
class Counts:
    """Answers, how many of them begin right, and their tokens likewise."""

    answers: int = 0
    begun: int = 0
    tokens: int = 0
    right: int = 0

    def add(self, other: Counts) -> None:
        """Adds another's numbers to these."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def rows(self, suffix: str, system: str) -> list[dict[str, Any]]:
        """Both shares, with Wilson's intervals."""
        pairs = ((FIRST, self.begun, self.answers), (TOKENS, self.right, self.tokens))
        return [
            row(f"{name}{suffix}", system, "accuracy", right / count, *wilson(right, count), count)
            for name, right, count in pairs
        ]


def count_right(guess_T: Tensor, labels_T: Tensor, silent: set[int]) -> Counts:
    """What is right of a document's answers.

    Args:
        guess_T: the most likely token at each place, given those before it.
        labels_T: the token at places of answers, elsewhere -100.
        silent: tokens that no answer begins with, and that don't count: spaces, the end of the document.
    """
    counts, inside = Counts(), False
    for guess, label in zip(guess_T.tolist(), labels_T.tolist(), strict=True):
        if label == IGNORE:
            inside = False
        elif label not in silent:
            right = guess == label
            counts.add(Counts(not inside, right and not inside, 1, right))
            inside = True
    return counts


def silent_tokens(tokenizer: Any) -> set[int]:
    """The special tokens, and those of nothing but space."""
    blank = {number for number in range(len(tokenizer)) if not tokenizer.decode([number]).strip()}
    return blank | set(tokenizer.all_special_ids)


def length_class(length: int) -> int:
    """The least of 128, 256, 512, … that a document's length doesn't exceed."""
    return max(128, 1 << (length - 1).bit_length())


def kinds_table(kinds: Sequence[dict[str, Any]]) -> str:
    """Shares by kind of document as a Markdown table."""
    lines = ["| kind | needle | answers | first token right | tokens right |", "|---|---|---|---|---|"]
    for entry in kinds:
        needle = entry["needle"].replace("|", "\\|")
        shares = (entry["begun"] / max(entry["answers"], 1), entry["right"] / max(entry["tokens"], 1))
        lines.append(f"| {entry['kind']} | {needle} | {entry['answers']} | {shares[0]:.3f} | {shares[1]:.3f} |")
    return "\n".join(lines) + "\n"


def run_answers(
    model: Any,
    tokenizer: Any,
    documents: Documents,
    out_dir: str | Path,
    *,
    budget: int | None = None,
    resume: bool = True,
    progress: bool = True,
    system: str | None = None,
) -> dict[str, Any]:
    """Has a model read documents with answers, and counts which of their tokens it would have written.

    Every token of an answer is guessed with the right ones before it. The first one must be looked up; what follows
    may be copied from where the first was found.

    Args:
        documents: in tokens of this tokenizer.
        budget: retained tokens per KV head; None: the model's own.

    Returns:
        The content of result.json: `first token` and `tokens` over all documents, and over those of up to 128, 256, …
        tokens (but more than half as many); `kinds` has the counts of each kind.

    Raises:
        ValueError: a budget or folder that can't be used.
    """
    settings = {
        "definition": DEFINITION,
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        **documents.settings,
        "budget": budget,
    }
    with retained(model, budget), evaluating(model), torch.no_grad():
        claim_folder(out_dir, settings, resume=resume)
        if (Path(out_dir) / "result.json").exists():
            return read_json(Path(out_dir) / "result.json")  # of the same settings: there is nothing left to do
        silent, by_length, kinds = silent_tokens(tokenizer), {}, []
        for kind, needle in enumerate(tqdm(documents.kinds, desc="kinds", disable=not progress)):
            own = Counts()
            for tokens_T, labels_T in documents.of_kind(kind):
                logits_TV = model(input_ids=tokens_T[None].to(model.device), use_cache=False).logits[0]
                found = count_right(logits_TV[:-1].argmax(-1).cpu(), labels_T[1:], silent)
                by_length.setdefault(length_class(len(tokens_T)), Counts()).add(found)
                own.add(found)
            kinds.append({"kind": kind, "needle": needle, **asdict(own)})
    total, system = Counts(), system or system_name(model)
    for counts in by_length.values():
        total.add(counts)
    rows = total.rows("", system)
    for length in sorted(by_length):
        rows += by_length[length].rows(f" L{length}", system)
    content = result(
        "answers",
        rows,
        config=settings,
        device=model.device,
        **{key: settings[key] for key in ("definition", "tokenizer")},
        kinds=kinds,
    )
    write_json(Path(out_dir) / "result.json", content, overwrite=True)
    tables = f"{case_table(rows)}\n{kinds_table(kinds)}"
    write_bytes(Path(out_dir) / "table.md", tables.encode(), overwrite=True)
    return content
