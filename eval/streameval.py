"""StreamEval (arXiv 2309.17453, section 4.4): an endless record of lines, and every few lines a question about an
earlier one.

Each stream asks at one distance. The right answer follows every question in the stream, so that all models read the
same text; a question counts as answered if the model's likeliest token is the right one at every token of the answer,
which is the case exactly if greedy generation writes it. So a stream is read in chunks, in constant memory.

Shapes: B streams, T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .answering import accuracy_row, error_text
from .conditions import evaluating, retained
from .haystacks import key_words
from .loading import model_identity, system_name, tokenizer_identity
from .reports import case_table, print_cases
from .results import SampleLog, claim_folder, result, row, say, write_bytes, write_json
from .streaming import cache_bytes, new_cache, read_chunk

DEFINITION = "StreamEval over lines as in LongEval, one distance a stream, right answers in the stream, version 1"
NAMES = ("numbers", "words")
HEAD = "Each line of this record gives the REGISTER_CONTENT of a name. Some lines are asked for later.\n\n"
LINE = "line {name}: REGISTER_CONTENT is <{value}>\n"
ASK = "Question: what is the REGISTER_CONTENT of line {name}? Answer: line {name}: REGISTER_CONTENT is <"
ANSWER = "{value}>"
LARGEST = 50_000  # of the values, as in LongEval


@dataclass(frozen=True)
class Piece:
    """A piece of a stream: text, and for a question the line asked for, its answer, and the answer's place in it."""

    text: str
    line: int | None = None
    answer: str = ""
    start: int = 0


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


def encode(piece: Piece, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens of a piece, and which of them belong to its answer: all that share a character with it."""
    coded = tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    end = piece.start + len(piece.answer)
    inside = [piece.line is not None and stop > piece.start and first < end for first, stop in coded.offset_mapping]
    return coded.input_ids, inside


class _Stream:
    """Tokens of one stream, and the record of each question as its answer is read.

    Attributes:
        open: questions that are still to be answered.
        records: the answered ones.
    """

    def __init__(self, tokenizer: Any, seed: int, distance: int, lines: int, every: int, names: str) -> None:
        self.tokenizer, self.seed, self.distance = tokenizer, seed, distance
        self.source = pieces(seed, distance, every, names)
        self.total = questions(lines, distance, every)
        self.open, self.records = self.total, []
        self.held: list[tuple[int, int | None]] = []  # token, and its question's number if it is part of an answer
        self.asked: list[tuple[Piece, int]] = []  # questions, and how many tokens their answers have
        self.said: list[tuple[int, int]] = []  # (right token, likeliest token) of the answer that is being read
        self.position = 0

    def take(self, count: int) -> list[tuple[int, int | None]]:
        """The next `count` tokens."""
        while len(self.held) < count:
            piece = next(self.source)
            ids, inside = encode(piece, self.tokenizer)
            number = None
            if piece.line is not None and len(self.asked) < self.total:
                number = len(self.asked)
                self.asked.append((piece, sum(inside)))
            self.held += [(token, number if own else None) for token, own in zip(ids, inside, strict=True)]
        taken, self.held = self.held[:count], self.held[count:]
        return taken

    def see(self, taken: Sequence[tuple[int, int | None]], likeliest: Sequence[int]) -> None:
        """Compares tokens with what the model held likeliest in their places."""
        for (token, number), guess in zip(taken, likeliest, strict=True):
            self.position += 1
            if number is None:
                continue
            self.said.append((token, guess))
            piece, length = self.asked[number]
            if len(self.said) == length:
                self.records.append(self._record(number, piece))
                self.said = []
                self.open -= 1

    def _record(self, number: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": question_index(self.seed, number),
            "stream": self.seed,
            "distance": self.distance,
            "line": piece.line,
            "position": self.position,
            "expected": piece.answer,
            "prediction": self.tokenizer.decode([guess for _, guess in self.said]),
            "score": float(all(token == guess for token, guess in self.said)),
            "error": None,
        }

    def failed(self, error: Exception) -> list[dict[str, Any]]:
        """Records that say why the stream's questions weren't answered."""
        fields = {"stream": self.seed, "distance": self.distance, "score": None, "error": error_text(error)}
        return [{"index": question_index(self.seed, number), **fields} for number in range(self.total)]


def question_index(seed: int, number: int) -> int:
    """A number for each question of all streams."""
    return seed * 1_000_000 + number


def questions(lines: int, distance: int, every: int) -> int:
    """Questions in a stream of `lines` lines."""
    return lines // every - distance // every


def _read(model: Any, streams: list[_Stream], chunk: int, make_cache: Any, bar: Any) -> int:
    """Reads streams side by side to their last questions; bytes of the cache for one of them."""
    device = next(model.parameters()).device
    cache = make_cache(len(streams))
    ahead_B = torch.full((len(streams),), -1)  # what each row held likeliest for the token to come
    left = sum(stream.open for stream in streams)
    while any(stream.open for stream in streams):
        taken = [stream.take(chunk) for stream in streams]
        ids_BT = torch.tensor([[token for token, _ in row_] for row_ in taken], device=device)
        guess_BT = read_chunk(model, ids_BT, cache).argmax(-1).cpu()
        likeliest_BT = torch.cat([ahead_B[:, None], guess_BT[:, :-1]], 1)
        ahead_B = guess_BT[:, -1]
        for stream, row_, guesses in zip(streams, taken, likeliest_BT.tolist(), strict=True):
            stream.see(row_, guesses)
        now = sum(stream.open for stream in streams)
        bar.update(left - now)
        left = now
    return cache_bytes(cache) // len(streams)


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
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} doesn't tell where its tokens stand; use a fast one")


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
    sinks: int = 4,
    window: int = 1020,
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
        cache, sinks, window: see `streaming.new_cache`.
        budget: retained tokens per KV head during the run; None: the model's own.

    Returns:
        The content of result.json: accuracy with its 95 % Wilson interval for each distance.

    Raises:
        ValueError: an argument that can't be used, or a folder of another run.
        RuntimeError: no stream could be read.
    """
    distances = list(distances)
    _check(tokenizer, distances, lines, every, names, streams=streams, batch_size=batch_size, chunk=chunk)
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
        "cache": cache if cache != "stream" else f"stream {sinks}+{window}",
        "budget": budget,
        "retention": retention,
    }
    make_cache = lambda batch: new_cache(model, cache, batch, sinks, window)
    make_cache(1)
    out, rows, cells, answered = Path(out_dir), [], [], False
    system = system or system_name(model)
    total = streams * sum(questions(lines, distance, every) for distance in distances)
    with retained(model, budget, retention), evaluating(model), tqdm(total=total, disable=not progress) as bar:
        claim_folder(out, settings, resume=resume)
        for distance in distances:
            bar.set_description(f"distance {distance}")
            seeds, count = range(seed, seed + streams), questions(lines, distance, every)
            make = lambda number, distance=distance: _Stream(tokenizer, number, distance, lines, every, names)
            read = lambda batch: _read(model, batch, chunk, make_cache, bar)
            with SampleLog(out / "samples" / f"distance-{distance}.jsonl") as log:
                answered = _run_distance(read, log, make, seeds, count, batch_size, bar, answered)
                records = [log.records[question_index(s, n)] for s in seeds for n in range(count)]
            rows += _rows(records, distance, system)
            failed = sum(record["score"] is None for record in records)
            cells.append({"case": f"streameval D{distance}", "samples": len(records), "errors": failed})
    content = result(
        "streameval",
        rows,
        config={**settings, "batch_size": batch_size, "chunk": chunk},
        device=next(model.parameters()).device,
        definition=DEFINITION,
        tokenizer=settings["tokenizer"],
        seed=seed,
        cells=cells,
    )
    write_json(out / "result.json", content, overwrite=True)
    write_bytes(out / "table.md", case_table(rows).encode(), overwrite=True)
    if progress:
        print_cases(rows, "StreamEval: accuracy at a distance in lines [95 % interval]")
        for cell in cells:
            if cell["errors"]:
                say(
                    f"warning: {cell['case']}: {cell['errors']} of {cell['samples']} questions failed and don't count"
                )
    return content


def _rows(records: list[dict[str, Any]], distance: int, system: str) -> list[dict[str, Any]]:
    found = accuracy_row(records, f"streameval D{distance}", system)
    if found is None:
        return []
    largest = max(record["cache_bytes"] for record in records if record["score"] is not None)
    return [found, row(f"cache D{distance}", system, "bytes", largest, largest, largest, 1)]


def _run_distance(
    read: Callable[[list[_Stream]], int],
    log: SampleLog,
    make: Callable[[int], _Stream],
    seeds: Sequence[int],
    count: int,
    batch_size: int,
    bar: Any,
    answered: bool,
) -> bool:
    """Reads the streams that the log doesn't hold, each with `count` questions; whether any stream could be read."""
    done = lambda s: all((log.records.get(question_index(s, n)) or {}).get("score") is not None for n in range(count))
    open_ = [number for number in seeds if not done(number)]
    bar.update(count * (len(seeds) - len(open_)))
    waiting = [open_[start : start + batch_size] for start in range(0, len(open_), batch_size)]
    answered = answered or len(open_) < len(seeds)
    while waiting:
        batch = waiting.pop(0)
        streams = [make(number) for number in batch]
        try:
            nbytes = read(streams)
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            bar.update(-sum(stream.total - stream.open for stream in streams))
            if len(batch) > 1:
                waiting[:0] = [[number] for number in batch]
                continue
            if not answered and not waiting:
                raise RuntimeError(f"no stream could be read: {error_text(error)}") from error
            records = streams[0].failed(error)
        else:
            answered = True
            records = [record | {"cache_bytes": nbytes} for stream in streams for record in stream.records]
        for record in records:
            log.append(record)
    return answered
