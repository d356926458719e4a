"""Long streams of text with questions in them: reading them side by side in constant memory, and judging the answers.

The right answer follows every question in the stream, so that all models read the same text; a question counts as
answered if the model's likeliest token is the right one at every token of the answer, which is the case exactly if
greedy generation writes it. So a stream is read in chunks.

Shapes: B streams, T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .answering import error_text
from .reports import case_table, print_cases
from .results import SampleLog, result, say, write_bytes, write_json
from .streaming import cache_bytes, read_chunk


@dataclass(frozen=True)
class Piece:
    """A piece of a stream: text, and for a question the line asked for, its answer, and the answer's place in it."""

    text: str
    line: int | None = None
    answer: str = ""
    start: int = 0


def encode(piece: Piece, tokenizer: Any, first: bool = True) -> tuple[list[int], list[bool]]:
    """Tokens of a piece, and which of them belong to its answer: all that share a character with it.

    Args:
        first: whether the piece begins the stream. Another one is encoded behind a line's end, since some tokenizers
            put a space in front of whatever text they are given.
    """
    code = lambda text: tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before = "" if first else "\n"
    coded = code(before + piece.text)
    if any(begin < len(before) < end for begin, end in coded.offset_mapping):  # a token is of both
        before, coded = "", code(piece.text)
    start, end = len(before) + piece.start, len(before) + piece.start + len(piece.answer)
    tokens = [
        (token, piece.line is not None and stop > start and begin < end)
        for token, (begin, stop) in zip(coded.input_ids, coded.offset_mapping, strict=True)
        if not before or stop > len(before)
    ]
    return [token for token, _ in tokens], [inside for _, inside in tokens]


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer that can't tell where answers are."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} doesn't tell where its tokens stand; use a fast one")


class Stream:
    """Tokens of one stream, and the record of each question as its answer is read.

    Args:
        source: pieces without end.
        indices: numbers of the questions that count, in their order; what follows them is read but not judged.
        fields: what every record says besides.
        start: tokens in front of the first piece.

    Attributes:
        open: questions that are still to be answered.
        records: the answered ones.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: Iterator[Piece],
        indices: Sequence[int],
        fields: dict[str, Any],
        start: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.source, self.indices, self.fields = tokenizer, source, indices, fields
        self.open, self.records, self.begins = len(indices), [], True
        # token, and its question's number if it is part of an answer
        self.held: list[tuple[int, int | None]] = [(token, None) for token in start]
        self.asked: list[tuple[Piece, int]] = []  # questions, and how many tokens their answers have
        self.said: list[tuple[int, int]] = []  # (right token, likeliest token) of the answer that is being read
        self.position = 0

    def take(self, count: int) -> list[tuple[int, int | None]]:
        """The next `count` tokens."""
        while len(self.held) < count:
            piece = next(self.source)
            ids, inside = encode(piece, self.tokenizer, first=self.begins)
            self.begins = False
            number = None
            if piece.line is not None and len(self.asked) < len(self.indices):
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
            "index": self.indices[number],
            **self.fields,
            "line": piece.line,
            "position": self.position,
            "expected": piece.answer,
            "prediction": self.tokenizer.decode([guess for _, guess in self.said]),
            "score": float(all(token == guess for token, guess in self.said)),
            "tokens": [sum(token == guess for token, guess in self.said), len(self.said)],
            "error": None,
        }

    def failed(self, error: Exception) -> list[dict[str, Any]]:
        """Records that say why the stream's questions weren't answered."""
        return [{"index": index, **self.fields, "score": None, "error": error_text(error)} for index in self.indices]


def read_streams(
    model: Any, streams: Sequence[Stream], chunk: int, make_cache: Callable[[int], Any], bar: Any
) -> int:
    """Reads streams side by side to their last questions; bytes of the cache for one of them."""
    device = next(model.parameters()).device
    cache = make_cache(len(streams))
    ahead_B = torch.full((len(streams),), -1)  # what each row held likeliest for the token to come
    left = sum(stream.open for stream in streams)
    while any(stream.open for stream in streams):
        taken = [stream.take(chunk) for stream in streams]
        ids_BT = torch.tensor([[token for token, _ in row_] for row_ in taken], device=device)
        most_BT = read_chunk(model, ids_BT, cache).max(-1)
        if not most_BT.values.isfinite().all():
            raise ValueError("the model's logits are not finite")
        guess_BT = most_BT.indices.cpu()
        likeliest_BT = torch.cat([ahead_B[:, None], guess_BT[:, :-1]], 1)
        ahead_B = guess_BT[:, -1]
        for stream, row_, guesses in zip(streams, taken, likeliest_BT.tolist(), strict=True):
            stream.see(row_, guesses)
        now = sum(stream.open for stream in streams)
        bar.update(left - now)
        left = now
    return cache_bytes(cache) // len(streams)


def run_streams(
    read: Callable[[list[Stream]], int],
    log: SampleLog,
    makers: Sequence[Callable[[], Stream]],
    batch_size: int,
    bar: Any,
    answered: bool,
) -> bool:
    """Reads the streams whose answers aren't all in the log; one that fails in a batch is tried alone.

    Args:
        read: reads streams and gives the cache's bytes for one of them.
        makers: each makes its stream, from the beginning.
        answered: whether any stream could be read before.

    Returns:
        Whether any stream could be read now or before.
    """
    done = lambda stream: all((log.records.get(index) or {}).get("score") is not None for index in stream.indices)
    open_ = [make for make in makers if not done(make())]
    bar.update(sum(len(make().indices) for make in makers if make not in open_))
    waiting = [open_[start : start + batch_size] for start in range(0, len(open_), batch_size)]
    answered = answered or len(open_) < len(makers)
    while waiting:
        batch = waiting.pop(0)
        streams = [make() for make in batch]
        try:
            nbytes = read(streams)
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            bar.update(-sum(len(stream.indices) - stream.open for stream in streams))
            if len(batch) > 1:
                waiting[:0] = [[make] for make in batch]
                continue
            records = streams[0].failed(error)
        else:
            answered = True
            records = [record | {"cache_bytes": nbytes} for stream in streams for record in stream.records]
        for record in records:
            log.append(record)
    return answered


def check_answered(answered: bool, records: Sequence[dict[str, Any]]) -> None:
    """Raises: RuntimeError with the first reason if no stream could be read."""
    if not answered:
        reason = next(record["error"] for record in records if record["score"] is None)
        raise RuntimeError(f"no stream could be read: {reason}")


def write_run(
    folder: Path,
    name: str,
    config: dict[str, Any],
    rows: list[dict[str, Any]],
    cells: list[dict[str, Any]],
    *,
    device: torch.device,
    title: str | None = None,
    warn: bool = False,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes result.json and table.md of a finished run; they may replace those of the same run.

    Args:
        config: how it was run; `definition`, `tokenizer` and `seed` are repeated beside the rows.
        cells: what was asked: `case`, `samples`, `errors`, and `system` where a run has several.
        title: of a table for the terminal; None: none is printed.
        warn: whether to tell the terminal which questions failed, and the warnings.
        warnings: that the result holds.

    Returns:
        The content of result.json.
    """
    repeated = {key: config[key] for key in ("definition", "tokenizer", "seed")}
    content = result(name, rows, config=config, device=device, **repeated, cells=cells, warnings=list(warnings))
    write_json(folder / "result.json", content, overwrite=True)
    named = rows
    if any("system" in cell for cell in cells):
        named = [{**entry, "case": f"{entry['case']} {entry['system']}"} for entry in rows]
    write_bytes(folder / "table.md", case_table(named).encode(), overwrite=True)
    if title:
        print_cases(rows, title)
    for cell in cells if warn else ():
        if cell["errors"]:
            what = f"{cell['case']} {cell.get('system', '')}".strip()
            say(f"warning: {what}: {cell['errors']} of {cell['samples']} questions failed and don't count")
    for warning in warnings if warn else ():
        say(f"warning: {warning}")
    return content
