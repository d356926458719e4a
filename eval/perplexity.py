"""Perplexity over position: how well a model predicts an endless text after a thousand and after a million tokens.

Memory stays that of the cache and of one chunk. A run's folder holds settings.json, result.json, table.md and, until
it is finished, state/, from which an interrupted run continues.

Shapes: T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .conditions import evaluating, retained
from .intervals import Moments
from .loading import model_identity, positions, system_name, tokenizer_identity
from .reports import case_table, print_cases
from .results import claim_folder, read_json, result, row, say, write_bytes, write_json
from .streaming import (
    cache_bytes,
    cache_text,
    chunks,
    load_cache,
    new_cache,
    read_chunk,
    save_cache,
    text_tokens,
    texts_identity,
)

DEFINITION = "perplexity of one endless text over position, version 1"
BLOCK = 32  # tokens; errors of neighbouring tokens aren't independent, means of blocks nearly are
FIRST_BUCKET = 64
_NORMAL = 1.959964


def bucket_ends(tokens: int) -> list[int]:
    """Ends of the buckets of positions up to `tokens`: 64, 96, 128, 192, 256, 384, … and `tokens` itself."""
    ends, size = [], FIRST_BUCKET
    while size < tokens:
        ends += [end for end in (size, size * 3 // 2) if end < tokens]
        size *= 2
    return [*ends, tokens]


_EMPTY = {"read": 0, "s": 0.0, "bytes": 0}


class Curve:
    """Loss, time and cache bytes over position, in buckets."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = ends
        sums = lambda: {"tokens": [0, 0.0, 0.0], "blocks": [0, 0.0, 0.0]}
        self.buckets: list[dict[str, Any]] = [_EMPTY | sums() for _ in ends]

    def add(self, first: int, losses_T: Tensor, seconds: float, nbytes: int) -> None:
        """Losses in nats (NaN: none) of the tokens from position `first` on, where a block starts."""
        start = 0
        for bucket, end in zip(self.buckets, self.ends, strict=True):
            stop = min(end - first, len(losses_T))
            if stop <= start:
                continue
            part = losses_T[start:stop]
            blocks = [block.nanmean() for block in part.split(BLOCK) if not block.isnan().all()]
            if blocks:
                _count(bucket, "tokens", part[~part.isnan()])
                _count(bucket, "blocks", torch.stack(blocks))
            bucket["s"] += seconds * len(part) / len(losses_T)
            bucket["read"] += len(part)
            bucket["bytes"] = nbytes
            start = stop

    def points(self) -> list[dict[str, Any]]:
        """Of each bucket that holds something: its ends, perplexity with 95 % interval, ms a token, cache bytes."""
        found = []
        for low, high, bucket in zip([0, *self.ends], self.ends, self.buckets, strict=False):
            tokens, blocks = Moments(*bucket["tokens"]), Moments(*bucket["blocks"])
            if not tokens.count:
                continue
            loss = tokens.mean
            # a few blocks may lie close together by chance: never narrower than for independent tokens
            errors = [error for error in (tokens.error, blocks.error) if math.isfinite(error)]
            spread = _NORMAL * max(errors) if errors else None  # one token tells nothing
            found.append(
                {
                    "from": low,
                    "to": min(high, low + bucket["read"]),
                    "tokens": tokens.count,
                    "perplexity": _exp(loss),
                    "low": None if spread is None else _exp(loss - spread),
                    "high": None if spread is None else _exp(loss + spread),
                    "ms": 1000 * bucket["s"] / bucket["read"],
                    "bytes": bucket["bytes"],
                }
            )
        return found


def _count(bucket: dict[str, Any], name: str, values: Tensor) -> None:
    moments = Moments(*bucket[name])
    moments.add(values)
    bucket[name] = [moments.count, moments.total, moments.squares]


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # larger is no float any more


def _rows(points: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    rows = []
    for point in points:
        place = f"T{point['to']}"
        count = point["tokens"]
        rows.append(
            row(f"text {place}", system, "perplexity", point["perplexity"], point["low"], point["high"], count)
        )
        rows.append(row(f"reading {place}", system, "ms", point["ms"], point["ms"], point["ms"], count))
        rows.append(row(f"cache {place}", system, "bytes", point["bytes"], point["bytes"], point["bytes"], 1))
    return rows


class _Reading:
    """A model in the middle of a text; it can be laid aside and taken up again.

    Attributes:
        position: tokens read.
        carry: [V] logits of the token to come, in float32; None at the beginning.
    """

    def __init__(self, model: Any, cache: Any, curve: Curve) -> None:
        self.model, self.cache, self.curve = model, cache, curve
        self.position = 0
        self.carry: Tensor | None = None
        self.device = next(model.parameters()).device

    def read(self, tokens: list[int]) -> float:
        """Reads a chunk; its mean loss in nats.

        Raises:
            RuntimeError: a loss that is not a number.
        """
        began = time.perf_counter()
        ids_1T = torch.tensor([tokens], device=self.device)
        logits_TV = read_chunk(self.model, ids_1T, self.cache)[0]
        losses_T = torch.full((len(tokens),), math.nan)
        losses_T[1:] = F.cross_entropy(logits_TV[:-1].float(), ids_1T[0, 1:], reduction="none").cpu()
        if self.carry is not None:
            losses_T[0] = F.cross_entropy(self.carry[None], ids_1T[0, :1]).cpu()
        self.carry = logits_TV[-1].float()
        known = losses_T if self.position else losses_T[1:]
        if not known.isfinite().all():
            place = self.position + int((~losses_T.isfinite()).nonzero()[-1])
            raise RuntimeError(f"the loss at position {place} is not a finite number; try --dtype float32")
        self.curve.add(self.position, losses_T, time.perf_counter() - began, cache_bytes(self.cache))
        self.position += len(tokens)
        return float(known.mean()) if len(known) else math.nan

    def save(self, folder: Path) -> None:
        """Writes everything into folder/at-POSITION, whole or not at all, and removes earlier ones."""
        final, part = folder / f"at-{self.position}", folder / ".part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            save_cache(self.cache, part / "cache.safetensors")
            save_file({"carry": self.carry.contiguous()}, part / "carry.safetensors")
            state = {"position": self.position, "buckets": self.curve.buckets}
            (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
            part.rename(final)
        except OSError as error:
            raise ValueError(f"{final}: can't be written ({error}); make room on the disk and start again") from error
        for other in folder.glob("at-*"):
            if other != final:
                shutil.rmtree(other)

    def load(self, folder: Path) -> None:
        """Takes up what `save` left, if anything."""
        found = max(folder.glob("at-*"), key=lambda path: int(path.name.removeprefix("at-")), default=None)
        if found is None:
            return
        state = read_json(found / "state.json")
        self.position, self.curve.buckets = state["position"], state["buckets"]
        load_cache(self.model, self.cache, found / "cache.safetensors", self.position)
        self.carry = load_file(found / "carry.safetensors", device=str(self.device))["carry"]


def _limit(model: Any, kind: str, limit: int | None) -> int | None:
    """Tokens that a model may read: a full cache of a foreign model ends at the positions it was trained with."""
    if limit is not None or hasattr(model, "new_cache") or kind == "stream":
        return limit
    return positions(model)


def run_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str | Path],
    out_dir: str | Path,
    *,
    tokens: int = 1_000_000,
    chunk: int = 512,
    cache: str = "auto",
    sinks: int | None = None,
    window: int | None = None,
    limit: int | None = None,
    budget: int | None = None,
    retention: str | None = None,
    save_every: int = 100_000,
    resume: bool = True,
    progress: bool = True,
    system: str | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity over position of files read as one text; memory stays that of the cache and of one chunk.

    Args:
        texts: text files (plain, .gz, .xz), read one after the other.
        tokens: how many to read; fewer if the text or `limit` ends before.
        chunk: tokens read at once, a multiple of 32.
        cache: see `new_cache`; `sinks` and `window` are those of `stream`.
        limit: tokens at most; None: no limit, but for a foreign model's full cache its max_position_embeddings.
        budget, retention: retained tokens per KV head, and what chooses them; None: the model's own, none with
            `stream`.
        save_every: tokens after which the state is saved, so that an interrupted run continues there.
        on_chunk: called with the position after every chunk.

    Returns:
        The content of result.json: perplexity, ms a token and cache bytes for each bucket of positions.

    Raises:
        ValueError: an argument or file that can't be used, or a folder of another run.
    """
    for name, value in (("tokens", tokens), ("chunk", chunk), ("save_every", save_every), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not a positive whole number")
    if chunk % BLOCK:
        raise ValueError(f"chunk: {chunk} is not a multiple of {BLOCK}; take {-(-chunk // BLOCK) * BLOCK}")
    if not texts:
        raise ValueError("text: no file given; give at least one")
    for name, value in (("tokens", tokens), ("limit", limit)):
        if value == 1:
            raise ValueError(f"{name}: 1 leaves none to predict; use 2 or more")
    identity = texts_identity(texts)
    limit = _limit(model, cache, limit)
    wanted = tokens if limit is None else min(tokens, limit)
    rule = (sinks, window, budget, retention)
    settings = {
        "definition": DEFINITION,
        "model": model_identity(model),
        "tokenizer": tokenizer_identity(tokenizer),
        "text": identity,
        "tokens": tokens,
        "chunk": chunk,
        "cache": cache_text(cache, *rule),
        "limit": limit,
        "budget": budget,
        "retention": retention,
    }
    system = system or system_name(model)
    own_rule = (None, None) if cache == "stream" else (budget, retention)  # a streaming cache retains by itself
    out, states = Path(out_dir), Path(out_dir) / "state"
    with (
        retained(model, *own_rule),
        evaluating(model),
        tqdm(total=wanted, disable=not progress, unit="token") as bar,
    ):
        reading = _Reading(model, new_cache(model, cache, 1, *rule), Curve(bucket_ends(tokens)))
        claim_folder(out, settings, resume=resume)
        if (out / "result.json").exists():  # of the same settings: there is nothing left to do
            content = read_json(out / "result.json")
            if progress:
                _show(content)
            return content
        reading.load(states)
        bar.update(reading.position)
        saved = reading.position
        for some in chunks(text_tokens(texts, tokenizer), chunk, skip=reading.position):
            some = some[: wanted - reading.position]
            if not some:
                break
            loss = reading.read(some)
            bar.update(len(some))
            bar.set_postfix_str(f"perplexity {_exp(loss):.2f}")
            # after a short chunk nothing follows, and blocks would no longer begin where chunks do
            if reading.position - saved >= save_every and len(some) == chunk:
                reading.save(states)
                saved = reading.position
            if on_chunk is not None:
                on_chunk(reading.position)
    if reading.position < 2:
        raise ValueError(f"text: {', '.join(map(str, texts))} holds fewer than two tokens; give a longer text")
    ended = "tokens" if reading.position == tokens else "limit" if reading.position == limit else "end of the text"
    points = reading.curve.points()
    content = result(
        "perplexity",
        _rows(points, system),
        config=settings,
        device=reading.device,
        definition=DEFINITION,
        tokenizer=settings["tokenizer"],
        tokens_read=reading.position,
        ended_by=ended,
        curve=points,
    )
    write_json(out / "result.json", content, overwrite=True)
    write_bytes(out / "table.md", case_table(content["rows"]).encode(), overwrite=True)
    shutil.rmtree(states, ignore_errors=True)
    if progress:
        _show(content)
    return content


def _show(content: dict[str, Any]) -> None:
    shown = [entry for entry in content["rows"] if entry["metric"] == "perplexity"]
    print_cases(shown, "perplexity up to a position [95 % interval]")
    if content["ended_by"] != "tokens":
        read, wanted = content["tokens_read"], content["config"]["tokens"]
        say(f"warning: stopped after {read} of {wanted} tokens: {content['ended_by']}")
