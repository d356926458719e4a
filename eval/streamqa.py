"""Streaming question answering (arXiv 2309.17453, section 4.3): multiple-choice questions one after the other in an
endless stream, each with its answer, which is judged by exact match.

How a stream is read and judged is in streams.py. Systems: `dense` keeps the whole stream, `window` the last tokens,
`streaming` sinks and a window, `own` is the cache of a model of this project; `one-shot` reads each question in a
fresh cache, after the question before it as an example.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .answering import accuracy_row
from .choices import ANSWERS, Question, conversation
from .conditions import evaluating, retained
from .loading import model_identity, tokenizer_identity
from .results import SampleLog, claim_folder, row
from .streaming import cache_text, new_cache, slots, start_tokens
from .streams import Piece, Stream, check_answered, check_tokenizer, read_streams, run_streams, write_run

DEFINITION = "multiple-choice questions in a stream, right answers in the stream, exact match, version 2"
SYSTEMS = ("own", "dense", "window", "streaming", "one-shot")
ONE_SHOT_CHUNK = 64  # its streams are short


def pieces(questions: Sequence[Question], numbers: Sequence[int], write: Any) -> Iterator[Piece]:
    """A stream without end of the questions with these numbers; after the last one it begins again."""
    for place in count():
        number = numbers[place % len(numbers)]
        ask, answer, rest = write(questions[number], place == 0)
        yield Piece(f"{ask}{answer}{rest}", number, answer, len(ask))


def one_shot(questions: Sequence[Question], number: int, write: Any) -> Iterator[Piece]:
    """The question before, as an example that isn't judged, then the question, again and again."""
    example, *more = pieces_of(questions, number, write)
    yield Piece(example.text)
    while True:
        yield from more


def pieces_of(questions: Sequence[Question], number: int, write: Any) -> list[Piece]:
    """The example and the question itself."""
    source = pieces(questions, [(number - 1) % len(questions), number], write)
    return [next(source), next(source)]


def _stream(
    tokenizer: Any, questions: Sequence[Question], numbers: Sequence[int], write: Any, system: str, chat: bool
) -> Stream:
    make = pieces(questions, numbers, write) if system != "one-shot" else one_shot(questions, numbers[0], write)
    # a chat template writes the begin token itself
    start = () if chat else start_tokens(tokenizer)
    return Stream(tokenizer, make, numbers, {"system": system}, start)


def _cache_of(model: Any, system: str, rule: tuple[int, int, int | None, str | None]) -> tuple[Any, str]:
    """What makes a system's caches, and its name for settings.

    Raises:
        ValueError: the model can't be read so.
    """
    sinks, window, budget = rule[:3]
    kinds = {
        "window": ("stream", 0, sinks + window + (budget or 0)),
        "streaming": ("stream", *rule),
        "dense": ("full",),
    }
    kind, *how = kinds.get(system, ("auto",))
    own = hasattr(model, "new_cache")
    if system == "own" and not own:
        raise ValueError(f"systems: {type(model).__name__} has no cache of its own; use dense, window and streaming")
    if own and kind != "auto":
        raise ValueError(
            f"systems: {system} needs another cache, and {type(model).__name__} has its own; use own or one-shot"
        )
    make = lambda batch: new_cache(model, kind, batch, *how)
    make(1)
    return make, cache_text(kind, *how)


def _check(
    systems: Sequence[str], answers: str, chat: bool | None, tokenizer: Any, samples: int | None, **positive: int
) -> None:
    for name, value in (*positive.items(), *([("samples", samples)] if samples is not None else [])):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a positive whole number")
    if not systems or set(systems) - set(SYSTEMS) or len(set(systems)) < len(systems):
        raise ValueError(f"systems: {list(systems)}; name one or more of {', '.join(SYSTEMS)}, each once")
    if answers not in ANSWERS:
        raise ValueError(f"answers: {answers!r} is unknown; use one of {', '.join(ANSWERS)}")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat: the tokenizer has no chat template; leave it out, or use plain text (--no-chat)")
    check_tokenizer(tokenizer)


def run_streamqa(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    out_dir: str | Path,
    *,
    source: str = "questions",
    task: str = "arc_easy",
    systems: Sequence[str] | None = None,
    samples: int | None = None,
    answers: str = "letter",
    chat: bool | None = None,
    streams: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    chunk: int = 256,
    sinks: int | None = None,
    window: int | None = None,
    budget: int | None = None,
    retention: str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Exact match of every system on the same questions; an interrupted run continues with the unfinished streams.

    Args:
        source, task: names of the data, for the result.
        systems: of `SYSTEMS`; None: all that the model can be read with.
        samples: questions, drawn with `seed`; None: all, in their order.
        answers: `letter` or `text` of the right choice.
        chat: turns of the tokenizer's chat template; None: if it has one.
        streams: the questions are dealt out to so many streams.
        batch_size: streams read side by side.
        chunk: tokens of each read at once.
        sinks, window, budget, retention: of `streaming`; `window` has as many slots. For a model of this project
            `budget` and `retention` are its retained tokens per KV head and what chooses them; None: its own.

    Returns:
        The content of result.json: accuracy with its 95 % Wilson interval, and bytes of the cache, for each system.

    Raises:
        ValueError: an argument that can't be used, or a folder of another run.
        RuntimeError: no stream could be read.
    """
    own = hasattr(model, "new_cache")
    systems = list(systems or (("own", "one-shot") if own else SYSTEMS[1:]))
    of_streams = {"sinks": sinks, "window": window} | ({} if own else {"budget": budget, "retention": retention})
    for name, value in of_streams.items():
        if value is not None and not {"window", "streaming"} & set(systems):
            raise ValueError(f"{name}: {value} is of the systems window and streaming; leave {name} out")
    sinks, window = slots(sinks, window)
    _check(
        systems, answers, chat, tokenizer, samples, streams=streams, batch_size=batch_size, chunk=chunk, window=window
    )
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    if samples is not None and samples < len(questions):
        questions = random.Random(seed).sample(list(questions), samples)
    caches = {name: _cache_of(model, name, (sinks, window, budget, retention)) for name in systems}
    settings = {
        "definition": DEFINITION,
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "data": source,
        "task": task,
        "questions": len(questions),
        "answers": answers,
        "chat": chat,
        "streams": streams,
        "seed": seed,
        "systems": {name: text for name, (_, text) in caches.items()},
        "budget": budget,
        "retention": retention,
    }
    write = conversation(tokenizer, answers, chat)
    # a template that doesn't work says so here
    written = "".join([*write(questions[0], True), *write(questions[0], False)])
    settings["wording"] = hashlib.sha256(written.encode()).hexdigest()[:16]
    out, rows, cells, answered = Path(out_dir), [], [], False
    with (
        retained(model, *((budget, retention) if own else (None, None))),
        evaluating(model),
        tqdm(total=len(questions) * len(systems), disable=not progress) as bar,
    ):
        claim_folder(out, settings, resume=resume)
        for system in systems:
            bar.set_description(system)
            dealt = [range(first, len(questions), streams) for first in range(min(streams, len(questions)))]
            if system == "one-shot":
                dealt = [[number] for number in range(len(questions))]
            makers = [partial(_stream, tokenizer, questions, numbers, write, system, chat) for numbers in dealt]
            size = min(chunk, ONE_SHOT_CHUNK) if system == "one-shot" else chunk
            read = lambda batch, size=size, make=caches[system][0]: read_streams(model, batch, size, make, bar)
            with SampleLog(out / "samples" / f"{system}.jsonl") as log:
                answered = run_streams(read, log, makers, batch_size, bar, answered)
                records = [log.records[number] for number in range(len(questions))]
            rows += _rows(records, task, system)
            failed = sum(record["score"] is None for record in records)
            cells.append({"case": f"streamqa {task}", "system": system, "samples": len(records), "errors": failed})
        check_answered(answered, records)
    return write_run(
        out,
        "streamqa",
        {**settings, "batch_size": batch_size, "chunk": chunk},
        rows,
        cells,
        device=next(model.parameters()).device,
        warn=progress,
    )


def _rows(records: list[dict[str, Any]], task: str, system: str) -> list[dict[str, Any]]:
    found = accuracy_row(records, f"streamqa {task}", system)
    if found is None:
        return []
    largest = max(record["cache_bytes"] for record in records if record["score"] is not None)
    return [found, row(f"cache {task}", system, "bytes", largest, largest, largest, 1)]
