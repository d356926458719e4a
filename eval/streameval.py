"""StreamEval (arXiv 2309.17453, section 4.4): an endless record of lines, and every few lines a question about an
earlier one.

Each stream asks at one distance; how it is read and judged is in streams.py.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .answering import accuracy_row
from .conditions import evaluating, retained
from .haystacks import key_words
from .loading import model_identity, positions, system_name, tokenizer_identity
from .results import SampleLog, claim_folder, row, wilson
from .streaming import cache_text, new_cache, start_tokens
from .streams import Piece, Stream, check_answered, check_tokenizer, read_streams, run_streams, write_run

DEFINITION = "StreamEval over lines as in LongEval, one distance a stream, right answers in the stream, version 3"
NAMES = ("numbers", "words")
HEAD = "Each line of this record gives the REGISTER_CONTENT of a name. Some lines are asked for later.\n\n"
LINE = "line {name}: REGISTER_CONTENT is <{value}>\n"
ASK = "Question: what is the REGISTER_CONTENT of line {name}? Answer: line {name}: REGISTER_CONTENT is <"
ANSWER = "{value}>"
LARGEST = 50_000  # of the values, as in LongEval


def pieces(seed: int, distance: int, every: int, names: str) -> Iterator[Piece]:
    """A stream without end; after every `every` lines the line `distance` before the last one is asked for."""
    rng = random.Random(f"{seed} {distance}")
    recent: deque[tuple[str, int]] = deque(maxlen=distance + 1)
    taken: deque[str] = deque(maxlen=distance + every + 1)
    yield Piece(HEAD)
    number = 0
    while True:
        number += 1
        name = str(number)
        while names == "words" and ((name := rng.choice(key_words())) in taken):
            pass
        taken.append(name)
        recent.append((name, rng.randint(1, LARGEST)))
        yield Piece(LINE.format(name=name, value=recent[-1][1]))
        if number % every == 0 and number > distance:
            asked, value = recent[0]
            ask, answer = ASK.format(name=asked), ANSWER.format(value=value)
            yield Piece(f"{ask}{answer}\n", number - distance, answer, len(ask))


def _stream(tokenizer: Any, seed: int, distance: int, lines: int, every: int, names: str) -> Stream:
    indices = [question_index(seed, number) for number in range(questions(lines, distance, every))]
    fields = {"stream": seed, "distance": distance}
    return Stream(tokenizer, pieces(seed, distance, every, names), indices, fields, start_tokens(tokenizer))


def question_index(seed: int, number: int) -> int:
    """A number for each question of all streams."""
    return seed * 1_000_000 + number


def questions(lines: int, distance: int, every: int) -> int:
    """Questions in a stream of `lines` lines."""
    return lines // every - distance // every


def _check(tokenizer: Any, distances: Sequence[int], lines: int, every: int, names: str, **positive: int) -> None:
    for name, value in [
        *(("distances", d) for d in distances),
        ("lines", lines),
        ("every", every),
        *positive.items(),
    ]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} is not a positive whole number")
    if not distances or len(set(distances)) < len(distances):
        raise ValueError(f"distances: {list(distances)}; name at least one, and each once")
    for distance in distances:
        if questions(lines, distance, every) < 1:
            raise ValueError(f"lines: {lines} ask nothing at distance {distance}; give {distance + every} or more")
    if names not in NAMES:
        raise ValueError(f"names: {names!r} is unknown; use one of {', '.join(NAMES)}")
    check_tokenizer(tokenizer)


def run_streameval(
    model: Any,
    tokenizer: Any,
    distances: Sequence[int],
    out_dir: str | Path,
    *,
    lines: int = 1000,
    every: int = 10,
    streams: int = 8,
    names: str = "numbers",
    seed: int = 0,
    batch_size: int = 8,
    chunk: int = 256,
    cache: str = "auto",
    sinks: int | None = None,
    window: int | None = None,
    budget: int | None = None,
    retention: str | None = None,
    resume: bool = True,
    progress: bool = True,
    system: str | None = None,
) -> dict[str, Any]:
    """Accuracy against distance, and the run's folder; an interrupted run continues with the unfinished streams.

    Args:
        distances: lines between the asked line and the last one before the question; the paper has 20.
        lines: of each stream.
        every: lines between two questions.
        streams: for each distance, with seeds seed, seed + 1, …
        names: of the lines: `numbers` (1, 2, …) or `words` (adjective-noun, as in LongEval).
        batch_size: streams read side by side.
        chunk: tokens of each read at once.
        cache: see `streaming.new_cache`; `sinks` and `window` are those of `stream`.
        budget, retention: retained tokens per KV head, and what chooses them; None: the model's own, none with
            `stream`.

    Returns:
        The content of result.json: accuracy with its 95 % Wilson interval for each distance.

    Raises:
        ValueError: an argument that can't be used, or a folder of another run.
        RuntimeError: no stream could be read.
    """
    distances = list(distances)
    _check(tokenizer, distances, lines, every, names, streams=streams, batch_size=batch_size, chunk=chunk)
    rule = (sinks, window, budget, retention)
    settings = {
        "definition": DEFINITION,
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "distances": distances,
        "lines": lines,
        "every": every,
        "streams": streams,
        "names": names,
        "seed": seed,
        "cache": cache_text(cache, *rule),
        "budget": budget,
        "retention": retention,
    }
    make_cache = lambda batch: new_cache(model, cache, batch, *rule)
    make_cache(1)
    out, rows, cells, answered, longest = Path(out_dir), [], [], False, 0
    system = system or system_name(model)
    own_rule = (None, None) if cache == "stream" else (budget, retention)  # a streaming cache retains by itself
    total = streams * sum(questions(lines, distance, every) for distance in distances)
    with (
        retained(model, *own_rule),
        evaluating(model),
        tqdm(total=total, disable=not progress) as bar,
    ):
        claim_folder(out, settings, resume=resume)
        for distance in distances:
            bar.set_description(f"distance {distance}")
            seeds, count = range(seed, seed + streams), questions(lines, distance, every)
            makers = [partial(_stream, tokenizer, s, distance, lines, every, names) for s in seeds]
            read = lambda batch: read_streams(model, batch, chunk, make_cache, bar)
            with SampleLog(out / "samples" / f"distance-{distance}.jsonl") as log:
                answered = run_streams(read, log, makers, batch_size, bar, answered)
                records = [log.records[question_index(s, n)] for s in seeds for n in range(count)]
            rows += _rows(records, distance, system)
            failed = sum(record["score"] is None for record in records)
            cells.append({"case": f"streameval D{distance}", "samples": len(records), "errors": failed})
            check_answered(answered, records)
            longest = max([longest, *(record["position"] for record in records if record["score"] is not None)])
    limit = None if cache == "stream" else positions(model)
    beyond = [f"streams have up to {longest} tokens, the model has {limit} positions"]
    return write_run(
        out,
        "streameval",
        {**settings, "batch_size": batch_size, "chunk": chunk},
        rows,
        cells,
        device=next(model.parameters()).device,
        title="StreamEval: accuracy at a distance in lines [95 % interval]" if progress else None,
        warn=progress,
        warnings=beyond if limit is not None and longest > limit else (),
    )


def _rows(records: list[dict[str, Any]], distance: int, system: str) -> list[dict[str, Any]]:
    found = accuracy_row(records, f"streameval D{distance}", system)
    if found is None:
        return []
    read = [record for record in records if record["score"] is not None]
    right, tokens = (sum(record["tokens"][place] for record in read) for place in (0, 1))
    known = row(f"streameval D{distance} tokens", system, "accuracy", right / tokens, *wilson(right, tokens), tokens)
    largest = max(record["cache_bytes"] for record in read)
    return [found, known, row(f"cache D{distance}", system, "bytes", largest, largest, largest, 1)]
