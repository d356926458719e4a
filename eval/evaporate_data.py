"""Documents for EVAPORATE-style retrieval (arXiv 2304.09433 and 2402.18668): reading and building.

A document is a JSON object with `text`, `key` and `value` (SQuAD: without key). Builders make such JSONL from raw
SQuAD JSON, and from pages and key/value pairs (SWDE, FDA).
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from models.files import read_text_file

from .results import write_bytes

TASKS = ("fda", "swde", "squad")
HUB = {"fda": "hazyresearch/based-fda", "swde": "hazyresearch/based-swde-v2", "squad": "hazyresearch/based-squad"}
SPLIT = "validation"
ANSWER_ROOM = 50  # tokens of a length that are left for the answer
FORMS = ("question", "sentence")
SENTENCE_WORDS = 4  # fewer words before the answer would not say what is asked


@dataclass(frozen=True)
class Document:
    """A text with something to be found in it.

    Args:
        text: what the model reads; it ends where the answer is to begin.
        value: the answer.
        key: name of the value; empty for SQuAD.
        length: tokens that the text was packed to (with the answer's room), if it was.
        context, question: the passage and the question alone, where the source has them.
    """

    text: str
    value: str
    key: str = ""
    length: int | None = None
    context: str = ""
    question: str = ""


def _open_text(path: Path) -> str:
    try:
        return read_text_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: can't be read ({error}); give a UTF-8 file, plain or .gz") from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_open_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error}); write one object a line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object; write one object a line")
        yield number, record


def _field(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        there = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(f"{where} lacks the field {name!r}; its fields are {there}")
    if not isinstance(record[name], str) or not record[name].strip():
        raise ValueError(f"{where}: {name} is {record[name]!r}; it must be text that isn't empty")
    return record[name]


def _document(task: str, record: dict[str, Any], where: str) -> Document:
    length = record.get("length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"{where}: length is {length!r}; it must be a whole number of tokens, or left out")
    extra = {name: record[name] for name in ("context", "question") if isinstance(record.get(name), str)}
    return Document(
        text=_field(record, "text", where),
        value=_field(record, "value", where),
        key="" if task == "squad" else _field(record, "key", where),
        length=length,
        **extra,
    )


def check_task(task: str) -> None:
    """Raises ValueError for a task that isn't one of `TASKS`."""
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is unknown; use one of {', '.join(TASKS)}")


def read_documents(task: str, source: str | Path | None = None) -> tuple[list[Document], str]:
    """(documents, name of their source).

    Args:
        task: one of `TASKS`.
        source: a JSONL file (also .gz), or a data set's name on the hub, of which the split `validation` is read;
            None: the task's own on the hub.

    Raises:
        ValueError: no such file or data set, or a record without the fields.
    """
    check_task(task)
    name = str(source or HUB[task])
    if Path(name).is_file():
        found = [_document(task, record, f"{name}: line {number}") for number, record in _json_lines(Path(name))]
    elif Path(name).exists() or name.endswith((".jsonl", ".json", ".gz")):
        raise ValueError(f"data: {name} is not a file; give a JSONL file, or the name of a data set on the hub")
    else:
        found = [_document(task, record, f"{name}: record {n}") for n, record in enumerate(_hub_records(name))]
    if not found:
        raise ValueError(f"data: {name} holds no document")
    return found, name


def _hub_records(name: str) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(name, split=SPLIT)
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"data: {name} is neither a file nor a data set that can be loaded from the hub ({reason}); "
            "`lalte eval build` makes a local file"
        ) from error


def write_documents(path: str | Path, documents: Iterable[Document], *, overwrite: bool = False) -> int:
    """Writes JSONL (compressed if the name ends in .gz); returns the number of documents.

    Raises:
        ValueError: there is none, or the file exists and `overwrite` is off.
    """
    lines = []
    for document in documents:
        record = {name: value for name, value in vars(document).items() if value not in ("", None)}
        lines.append(json.dumps(record, ensure_ascii=False))
    if not lines:
        raise ValueError(f"out: nothing to write to {path}: no document came out of the given files")
    data = ("\n".join(lines) + "\n").encode()
    if str(path).endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    write_bytes(path, data, overwrite=overwrite)
    return len(lines)


def _check_samples(samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise ValueError(f"samples: {samples} is not a positive whole number")


# ---- SQuAD ----


def _articles(path: Path) -> list[list[dict[str, Any]]]:
    """Paragraphs of each article."""
    try:
        articles = [article["paragraphs"] for article in json.loads(_open_text(path))["data"]]
        assert all(isinstance(p["context"], str) and isinstance(p["qas"], list) for a in articles for p in a)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"squad: {path} is no SQuAD file; it needs data > paragraphs > context, qas > question, answers"
        ) from error
    return articles


def _sentence_start(context: str, place: int) -> int:
    """Where the sentence around `place` begins."""
    ends = [m.end() for m in re.finditer(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n+", context[:place])]
    return ends[-1] if ends else 0


def _asks(context: str, qa: dict[str, Any], form: str) -> tuple[str, str, str] | None:
    """(line that asks, answer, question) of a SQuAD question; None if it can't be asked this way."""
    answers = qa.get("answers") or []
    if qa.get("is_impossible") or not answers:
        return None
    answer, place = str(answers[0]["text"]).strip(), answers[0].get("answer_start")
    question = str(qa["question"]).strip()
    if form == "question":
        return f"Question: {question}\nAnswer:", answer, question
    if not isinstance(place, int) or context[place : place + len(answer)] != answer:
        place = context.find(answer)
    line = context[_sentence_start(context, place) : place].strip()
    # the line must not give the answer away, and must say enough to ask for it
    if place < 0 or len(line.split()) < SENTENCE_WORDS or answer.lower() in line.lower():
        return None
    return line, answer, question


def _packed(
    own: int, paragraphs: list[str], ending: str, room: int, count: Callable[[str], int], rng: random.Random
) -> str | None:
    """The asked paragraph among others of its article, up to `room` tokens with the ending; None if it can't fit."""
    join = lambda places: "\n".join(paragraphs[n] for n in sorted(places)) + "\n" + ending
    chosen, used = [own], count(join([own]))
    others = [n for n in range(len(paragraphs)) if n != own]
    rng.shuffle(others)
    for other in others:
        more = count(paragraphs[other] + "\n")
        if used + more <= room:
            chosen.append(other)
            used += more
    # pieces may have a few tokens less than what they are joined to
    while chosen and count(join(chosen)) > room:
        chosen.pop()
    return join(chosen) if chosen else None


def build_squad(
    path: str | Path,
    *,
    form: str = "question",
    lengths: list[int] | None = None,
    tokenizer: Any = None,
    samples: int | None = None,
    seed: int = 0,
) -> list[Document]:
    """Documents from a SQuAD file (JSON of version 1.1 or 2.0, also .gz): a passage, then a line that asks.

    Args:
        form: `question` ends with the question itself, `sentence` with the answer's sentence up to the answer, as a
            text to be completed.
        lengths: None: the question's own paragraph. Otherwise each question once for each length: paragraphs of its
            article, in their order, as many as fit into length - 50 tokens; those that can't fit are left out.
        tokenizer: measures the lengths.
        samples: so many questions, drawn at random; None: all.
        seed: of the drawing and of the choice of paragraphs.

    Raises:
        ValueError: no SQuAD file, an unknown form, or lengths without a tokenizer.
    """
    if form not in FORMS:
        raise ValueError(f"form: {form!r} is unknown; use one of {', '.join(FORMS)}")
    if lengths and tokenizer is None:
        raise ValueError("tokenizer: missing; lengths are measured with one, so give --tokenizer DIR")
    if small := [length for length in lengths or [] if length <= ANSWER_ROOM]:
        raise ValueError(f"lengths: {small[0]} leaves no text: {ANSWER_ROOM} tokens are kept for the answer")
    _check_samples(samples)
    asked = []
    for paragraphs in _articles(Path(path)):
        contexts = [paragraph["context"].strip() for paragraph in paragraphs]
        for own, paragraph in enumerate(paragraphs):
            for qa in paragraph["qas"]:
                if found := _asks(paragraph["context"].strip(), qa, form):
                    asked.append((own, contexts, *found))
    rng = random.Random(seed)
    if samples is not None and samples < len(asked):
        asked = [asked[n] for n in sorted(rng.sample(range(len(asked)), samples))]
    count = lru_cache(maxsize=4096)(lambda text: len(tokenizer(text, verbose=False).input_ids))
    made = []
    for length in lengths or [None]:
        for own, contexts, line, answer, question in asked:
            text = f"{contexts[own]}\n{line}"
            if length is not None:
                text = _packed(own, contexts, line, length - ANSWER_ROOM, count, rng)
            if text is not None:
                passage = text.removesuffix(f"\n{line}")  # all of it, which is what `twice` reads twice
                made.append(Document(text, answer, length=length, context=passage, question=question))
    if not made:
        smallest = f" in {max(lengths)} tokens" if lengths else ""
        raise ValueError(f"squad: no question of {path} can be asked{smallest}; try the other form or longer lengths")
    return made


# ---- pages and pairs: SWDE and FDA ----


def _pages(path: Path) -> dict[str, str]:
    """Text of each page: of JSONL with doc_id and text, or of a folder of .txt files."""
    if path.is_dir():
        found = {file.stem: _open_text(file) for file in sorted(path.glob("*.txt"))}
        if not found:
            raise ValueError(f"pages: the folder {path} holds no .txt file")
        return found
    if not path.is_file():
        raise ValueError(f"pages: {path} is neither a file nor a folder; give JSONL or a folder of .txt files")
    found = {}
    for number, record in _json_lines(path):
        where = f"{path}: line {number}"
        found[_field(record, "doc_id", where)] = _field(record, "text", where)
    return found


def _pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """(page, key, value): of JSONL with doc_id, key and value, or of JSON {page: {key: value}}; null is no value."""
    if not path.is_file():
        raise ValueError(f"pairs: {path} is not a file; give JSONL, or JSON of the form {{page: {{key: value}}}}")
    table = None
    if path.name.removesuffix(".gz").endswith(".json"):
        try:
            table = json.loads(_open_text(path))
        except ValueError as error:
            raise ValueError(f"pairs: {path} is not JSON ({error})") from error
        if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
            raise ValueError(f"pairs: {path} is not of the form {{page: {{key: value}}}}")
        for page, entries in table.items():
            yield from ((page, key, str(value)) for key, value in entries.items() if value is not None)
        return
    for number, record in _json_lines(path):
        where = f"{path}: line {number}"
        yield tuple(_field(record, name, where) for name in ("doc_id", "key", "value"))


def _chunks(text: str, tokenizer: Any, size: int | None) -> list[str]:
    if size is None:
        return [text]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [tokenizer.decode(ids[start : start + size]) for start in range(0, len(ids), size)]


def build_pairs(
    pages: str | Path,
    pairs: str | Path,
    *,
    chunk: int | None = None,
    tokenizer: Any = None,
    samples: int | None = None,
    seed: int = 0,
) -> list[Document]:
    """Documents from pages and the key/value pairs found on them (SWDE, FDA): the page, then `key:`.

    Values lose surrounding white space and a leading colon, which belongs to the page's layout. Pairs whose value
    isn't on the page are left out.

    Args:
        pages: JSONL with doc_id and text, or a folder of .txt files, whose names are the ids.
        pairs: JSONL with doc_id, key and value, or JSON {page: {key: value}}.
        chunk: breaks pages into pieces of so many tokens; each piece gets the pairs that it shows. None: whole pages.
        tokenizer: measures the chunks.
        samples: so many documents, drawn at random; None: all.
        seed: of the drawing.

    Raises:
        ValueError: missing files or fields, pairs of pages that don't exist, or a chunk without a tokenizer.
    """
    if chunk is not None and tokenizer is None:
        raise ValueError("tokenizer: missing; chunks are measured with one, so give --tokenizer DIR")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: {chunk} is not a positive number of tokens")
    _check_samples(samples)
    texts = _pages(Path(pages))
    wanted: dict[str, dict[str, str]] = {}
    for name, key, value in _pairs(Path(pairs)):
        page = name if name in texts else Path(name).stem  # a page may be named after its file
        if page not in texts:
            raise ValueError(f"pairs: {pairs} names the page {name!r}, which isn't in {pages}; give its pages too")
        value = value.strip().removeprefix(":").strip()
        if value and key.strip():
            wanted.setdefault(page, {})[key.strip()] = value
    made = [
        Document(f"{piece.rstrip()}\n{key}:", value, key)
        for page, entries in wanted.items()
        for piece in _chunks(texts[page], tokenizer, chunk)
        for key, value in entries.items()
        if value.lower() in piece.lower()
    ]
    if samples is not None and samples < len(made):
        made = [made[n] for n in sorted(random.Random(seed).sample(range(len(made)), samples))]
    if not made:
        raise ValueError(f"pairs: no value of {pairs} stands on its page in {pages}; are they of one site?")
    return made
