"""Prompts of EVAPORATE-style retrieval, and their score.

Prompt and score are those of lm-evaluation-harness 0.4.13 (tasks fda, swde, squad_completion); the windows of long
documents and the form that reads the text twice are those of prefix-linear-attention (arXiv 2407.05483).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .evaporate_data import ANSWER_ROOM, Document, check_task

SCORINGS = ("v0", "v1")
SUMMARY = "Summary of information above..."  # begins the question in SWDE's texts on the hub


def window_room(length: int) -> int:
    """Tokens of text in a window of this length; ValueError if there are none."""
    if length <= ANSWER_ROOM:
        raise ValueError(f"lengths: {length} leaves no text: {ANSWER_ROOM} tokens are kept for the answer")
    return length - ANSWER_ROOM


def _window(text: str, needles: Sequence[str], tokenizer: Any, room: int) -> tuple[str, bool]:
    """(`room` tokens of the text around the earliest needle, whether they reach the text's end)."""
    ids = tokenizer(text, verbose=False).input_ids
    found = (re.search(re.escape(needle), text, re.IGNORECASE) for needle in needles)
    places = [match.start() for match in found if match]
    # the definition takes a needle that isn't there as standing before the last character
    before = text[: min(places) if places else -1]
    start = max(0, len(tokenizer(before, verbose=False).input_ids) - room // 2)
    return tokenizer.decode(ids[start : start + room], skip_special_tokens=True), start + room >= len(ids)


def cut(task: str, document: Document, tokenizer: Any, length: int) -> Document | None:
    """The document with a text of `length` - 50 tokens around the earliest match of key or value.

    SQuAD has no key, and its last line asks: where the window would lose that line it is kept, and counts.

    Returns:
        None for a document whose key or value has one character, which the definition drops.
    """
    room = window_room(length)
    needles = [document.value] if task == "squad" else [document.key, document.value]
    if any(len(needle) <= 1 for needle in needles):
        return None
    text = document.text.split(SUMMARY)[0] if task == "swde" else document.text
    text = text.strip()
    short, whole_end = _window(text, needles, tokenizer, room)
    passage, _, line = text.rpartition("\n")
    if task == "squad" and not whole_end and passage:
        room -= len(tokenizer(f"\n{line}", verbose=False).input_ids)
        if room < 1:
            raise ValueError(f"lengths: {length} is too short for the question {line[:60]!r}; give a longer one")
        short = f"{_window(passage, needles, tokenizer, room)[0]}\n{line}"
    return replace(document, text=short)


def _body(task: str, document: Document, twice: bool) -> str:
    """The text without its question, ending in a full stop."""
    text = document.text
    if task == "swde":
        text = text.split(SUMMARY)[0]
    question = f"{document.key}:".lower()
    while text.lower().endswith(question):
        text = text[: -len(question)]
    if task == "fda":
        text = text.strip("\n").strip(".")
    else:
        text = text.strip("\n").strip(".").strip() if twice else text.strip().strip(".")
    return text if text.endswith(".") else f"{text}."


def prompt(task: str, document: Document, *, scoring: str, form: str, twice: bool) -> str:
    """What the model reads.

    Args:
        scoring: v0 leaves the text as it is, v1 strips it.
        form: `harness`, the text itself, or `window`, in which FDA and SWDE end with `. Key:`.
        twice: the text two times, after what is asked.
    """
    text = document.text.strip()
    if task == "squad":
        if not twice:
            return text if scoring == "v1" or form == "window" else document.text
        passage, _, line = text.rpartition("\n")
        context = (document.context or passage).split("Question:")[0]
        return f"{document.question or line} {context}\n{text}"
    if form == "harness" and not twice:
        return text if scoring == "v1" else document.text
    key = document.key[0].upper() + document.key[1:]
    body = _body(task, document, twice)
    return f"Information about {key}. {body}\n{body} {key}:" if twice else f"{body} {key}:"


def definition(task: str, scoring: str, *, twice: bool, windows: bool) -> str:
    """The definition's name, as it stands in result files."""
    name = f"EVAPORATE {task}: prompt and score of lm-evaluation-harness, version {scoring.removeprefix('v')}"
    if windows:
        name += f"; windows of length - {ANSWER_ROOM} tokens (prefix-linear-attention)"
    return name + ("; text read twice" if twice else "")


def contains(prediction: str, value: str) -> float:
    """1.0 if the value stands in the prediction, whatever the case of letters."""
    return float(re.search(re.escape(value), prediction, re.IGNORECASE) is not None)


@dataclass(frozen=True)
class EvaporateSample:
    """One prompt: its number, text, expected value, tokens, and where the value stands in it (0 to 100, or None)."""

    index: int
    task: str
    length: int | None
    key: str
    text: str
    outputs: tuple[str]
    tokens: int
    depth_percent: float | None


def make_samples(
    task: str,
    documents: Sequence[tuple[int, Document]],
    tokenizer: Any,
    length: int | None,
    *,
    scoring: str = "v1",
    twice: bool = False,
    windows: bool = True,
) -> list[EvaporateSample]:
    """Prompts of numbered documents.

    Args:
        length: tokens of prompt and answer; None: the texts as they are.
        scoring: `v0` or `v1`, which strips text and value.
        windows: whether the texts are cut to the length; they aren't if they were packed to it.
    """
    check_task(task)
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: {scoring!r} is unknown; use one of {', '.join(SCORINGS)}")
    cutting = length is not None and windows
    made = []
    for index, document in documents:
        if scoring == "v1":
            document = replace(document, value=document.value.strip())
        document = cut(task, document, tokenizer, length) if cutting else document
        if document is None:
            continue
        text = prompt(task, document, scoring=scoring, form="window" if cutting else "harness", twice=twice)
        match = re.search(re.escape(document.value), text, re.IGNORECASE)
        depth = round(100 * match.start() / len(text), 2) if match else None
        tokens = len(tokenizer(text, verbose=False).input_ids)
        made.append(EvaporateSample(index, task, length, document.key, text, (document.value,), tokens, depth))
    return made
