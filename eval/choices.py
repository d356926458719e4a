"""Multiple-choice questions, from files or the hub, and as text to be read and answered in a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.files import read_text_file

from .streaming import texts_identity

HUB = {"arc_easy": ("allenai/ai2_arc", "ARC-Easy"), "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge")}
SPLIT = "test"
LETTERS = "ABCDEFGHIJ"
ANSWERS = ("letter", "text")
HEAD = "Questions, each with its right answer.\n\n"
ORDER = {
    "letter": "Answer with the letter of the right choice.",
    "text": "Answer with the right choice, word for word.",
}


@dataclass(frozen=True)
class Question:
    """A question with its choices; `gold` is the number of the right one, from 0."""

    text: str
    choices: tuple[str, ...]
    gold: int

    def asked(self) -> str:
        """The question and its lettered choices, a line each."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.text, *lines])

    def answer(self, kind: str) -> str:
        """The right answer: its letter or its text."""
        return LETTERS[self.gold] if kind == "letter" else self.choices[self.gold]


def _question(record: Any, where: str) -> Question:
    try:
        choices, gold = record["choices"], record.get("gold")
        if isinstance(choices, dict):  # the hub's form
            gold, choices = choices["label"].index(record["answerKey"]), choices["text"]
        found = Question(str(record["question"]), tuple(map(str, choices)), int(gold))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where} is no question ({type(error).__name__}: {error}); it needs question, choices and gold (number "
            "of the right one, from 0), or question, choices with text and label, and answerKey"
        ) from error
    if not 0 <= found.gold < len(found.choices) <= len(LETTERS) or not all(map(str.strip, (found.text, *choices))):
        raise ValueError(
            f"{where}: gold {found.gold} of {len(found.choices)} choices; give 2 to 10, none of them empty"
        )
    return found


def _records(path: Path) -> Iterable[tuple[str, Any]]:
    """JSON lines, or one JSON list; plain or .gz."""
    try:
        text = read_text_file(path)
        if text.lstrip().startswith("["):
            return [(f"{path}: entry {number}", record) for number, record in enumerate(json.loads(text))]
        # only the line feed ends a line: str.splitlines would also cut inside JSON strings
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [(f"{path}: line {number}", json.loads(line)) for number, line in lines]
    except ValueError as error:
        raise ValueError(f"data: {path} can't be read ({error}); give JSON or JSON lines, plain or .gz") from error


def read_questions(task: str, source: str | Path | None = None) -> tuple[list[Question], str]:
    """(questions in their order, name of their source; for a file its name, bytes and a digest).

    Args:
        task: `arc_easy` or `arc_challenge`, whose data set on the hub is the default.
        source: a file of JSON lines or one JSON list (also .gz), or a data set's name on the hub with the same
            configurations, of which the split `test` is read.

    Raises:
        ValueError: no such task, file or data set, or a record without the fields.
    """
    if task not in HUB:
        raise ValueError(f"task: {task!r} is unknown; use one of {', '.join(HUB)}")
    name = str(source or HUB[task][0])
    if Path(name).is_file():
        found = [_question(record, where) for where, record in _records(Path(name))]
        name = texts_identity([name])[0]
    elif Path(name).exists() or name.endswith((".jsonl", ".json", ".gz")):
        raise ValueError(f"data: {name} is not a file; give a file, or the name of a data set on the hub")
    else:
        import datasets

        try:
            records = datasets.load_dataset(name, HUB[task][1], split=SPLIT)
        except Exception as error:  # the library raises many kinds
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"data: {name} can't be loaded from the hub ({reason}); give a local file") from error
        found = [_question(record, f"{name}: record {number}") for number, record in enumerate(records)]
    if not found:
        raise ValueError(f"data: {name} holds no question")
    return found, name


def conversation(tokenizer: Any, kind: str, chat: bool) -> Callable[[Question, bool], tuple[str, str, str]]:
    """How a question is written into a stream: (what comes before the answer, the answer, what follows it).

    Args:
        kind: of answers, `letter` or `text`.
        chat: as turns of the tokenizer's chat template, else as plain text.

    Returns:
        A function of the question and of whether it is the stream's first one.

    Raises:
        ValueError: a template that can't be written turn by turn.
    """
    if not chat:
        return lambda question, first: (
            f"{HEAD if first else ''}Question: {question.asked()}\nAnswer: ",
            question.answer(kind),
            "\n\n",
        )

    def turns(*texts: str) -> str:
        roles = ("user", "assistant") * len(texts)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=len(texts) % 2 == 1)

    def write(question: Question, first: bool) -> tuple[str, str, str]:
        before: Sequence[str] = () if first else ("?", "!")
        ask, answer = f"{question.asked()}\n{ORDER[kind]}", question.answer(kind)
        past = "" if first else turns(*before)
        asked, whole = turns(*before, ask), turns(*before, ask, answer)
        if not asked.startswith(past) or not whole.startswith(asked + answer):
            raise ValueError(
                "chat: the tokenizer's template changes earlier turns or answers; use plain text instead"
            )
        return asked[len(past) :], answer, whole[len(asked) + len(answer) :]

    return write
