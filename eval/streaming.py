"""Endless text through a model in constant memory: the text's tokens, caches, and reading in chunks.

A model of this project has a cache of its own; any other causal model of transformers is read with a full cache, or
with the constant one of StreamingLLM (arXiv 2309.17453).

Shapes: B rows, T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

CACHES = ("auto", "full", "stream")
SINKS, WINDOW = 4, 1020  # of a streaming cache, unless others are given
PIECE_CHARACTERS = 1 << 16
RECORD_SEPARATOR = "\x1e"


# ---- text ----


def _open(path: Path) -> Any:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8-sig")  # a byte order mark is no text


def text_pieces(paths: Sequence[str | Path]) -> Iterator[str]:
    """The files (plain, .gz, .xz) as one text, in pieces that end at a line's end where they can.

    Raises:
        ValueError: a file that is missing or no text in UTF-8.
    """
    for path in map(Path, paths):
        rest = ""
        try:
            with _open(path) as file:
                while part := file.read(PIECE_CHARACTERS):
                    rest += part.replace(RECORD_SEPARATOR, "")
                    end = rest.rfind("\n") + 1
                    if end:
                        yield rest[:end]
                        rest = rest[end:]
        except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
            raise ValueError(f"text: {path} can't be read ({error}); give UTF-8 text, plain, .gz or .xz") from error
        if rest:
            yield rest if rest.endswith("\n") else f"{rest}\n"


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text by itself: a begin token, or nothing."""
    whole = tokenizer("a", verbose=False).input_ids
    text = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    places = range(len(whole) - len(text) + 1)
    return whole[: next((n for n in places if text and whole[n : n + len(text)] == text), 0)]


def text_tokens(paths: Sequence[str | Path], tokenizer: Any) -> Iterator[list[int]]:
    """The text's tokens in lists of any size; first what the tokenizer puts at a text's beginning, if anything."""
    start = start_tokens(tokenizer)
    if start:
        yield start
    for piece in text_pieces(paths):
        yield tokenizer(piece, add_special_tokens=False, verbose=False).input_ids


def chunks(tokens: Iterator[list[int]], size: int, *, skip: int = 0) -> Iterator[list[int]]:
    """Lists of `size` tokens after the first `skip`; the last may be shorter."""
    held: list[int] = []
    for some in tokens:
        if skip >= len(some):
            skip -= len(some)
            continue
        held += some[skip:]
        skip = 0
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held


def texts_identity(paths: Sequence[str | Path]) -> list[str]:
    """Name, bytes and a digest of the first megabyte of each file.

    Raises:
        ValueError: a file that is missing, or doesn't begin with text.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"text: {path} is not a file; give text files, plain, .gz or .xz")
        next(text_pieces([path]), None)  # a file that can't be read shows before any run begins
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(1 << 20)).hexdigest()[:16]
        found.append(f"{path.name} {path.stat().st_size} {digest}")
    return found


# ---- caches ----


def new_cache(
    model: Any,
    kind: str,
    batch: int,
    sinks: int | None = None,
    window: int | None = None,
    budget: int | None = None,
    retention: str | None = None,
) -> Any:
    """An empty cache of `batch` rows.

    Args:
        kind: `auto`: the model's own, under the rule that the model has now, or a full one where it has none;
            `full`; `stream`: sinks and window, and with a budget the tokens that the policy `retention` keeps
            (models.streaming).
        sinks, window, budget, retention: of `stream` only; sinks and window are `SINKS` and `WINDOW` if None.

    Raises:
        ValueError: an unknown kind, one that the model can't be read with, or what the kind has no use for.
    """
    if kind not in CACHES:
        raise ValueError(f"cache: {kind!r} is unknown; use one of {', '.join(CACHES)}")
    own = hasattr(model, "new_cache")
    if own and kind != "auto":
        raise ValueError(f"cache: {type(model).__name__} has a cache of its own; use auto instead of {kind}")
    if kind == "stream":
        from models.streaming import stream

        return stream(model, *slots(sinks, window), budget or 0, retention)
    for name, value in (("sinks", sinks), ("window", window)):
        if value is not None:
            holds = "has sinks and a window of its own" if own else "keeps every token"
            raise ValueError(f"{name}: {value} is of cache stream only, this one {holds}; leave {name} out")
    if own:
        return model.new_cache(batch)
    if retention is not None or budget is not None:
        name = "budget" if retention is None else "retention"
        raise ValueError(f"{name}: {type(model).__name__} retains tokens with cache stream only; leave {name} out")
    check_pieces(model)
    return DynamicCache(config=model.config)


_READABLE: WeakSet[Any] = WeakSet()  # models that have been checked


@torch.no_grad()
def check_pieces(model: Any) -> None:
    """Looks whether a foreign model remembers what it has read, by reading some tokens at once and in two pieces.

    Raises:
        ValueError: it doesn't, as its memory isn't in `past_key_values`, or that isn't keys and values alone; or its
            logits aren't finite.
    """
    if model in _READABLE:
        return
    kind = type(model).__name__
    config = model.config.get_text_config()
    ids_BT = torch.arange(16, device=next(model.parameters()).device)[None] * 7 % config.vocab_size
    cache = DynamicCache(config=model.config)
    try:
        whole = model(input_ids=ids_BT, use_cache=False).logits[:, -1].float()
        read_chunk(model, ids_BT[:, :8], cache)
        pieces = read_chunk(model, ids_BT[:, 8:], cache)[:, -1].float()
        cache_bytes(cache)
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: {kind} can't be read in pieces with past_key_values ({reason}); use another model"
        ) from error
    if not (whole.isfinite().all() and pieces.isfinite().all()):
        raise ValueError(
            f"model: the logits of {kind} are not finite; its weights are damaged, or its dtype too small"
        )
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not (pieces - whole).norm() <= tolerance * whole.norm():
        raise ValueError(
            f"model: {kind} forgets what it has read before, as its memory isn't in past_key_values; use another one"
        )
    _READABLE.add(model)


def slots(sinks: int | None, window: int | None) -> tuple[int, int]:
    """Sinks and window of a streaming cache: `SINKS` and `WINDOW` where they aren't given."""
    return SINKS if sinks is None else sinks, WINDOW if window is None else window


def cache_text(
    kind: str,
    sinks: int | None = None,
    window: int | None = None,
    budget: int | None = None,
    retention: str | None = None,
) -> str:
    """The same in a word, for settings of a run: `full`, `stream 4+1020`, `stream 4+512+508 h2o`."""
    if kind != "stream":
        return kind
    sinks, window = slots(sinks, window)
    return f"stream {sinks}+{budget}+{window} {retention}" if budget else f"stream {sinks}+{window}"


@torch.no_grad()
def read_chunk(model: Any, ids_BT: Tensor, cache: Any) -> Tensor:
    """Logits [B, T, V] of new tokens, which the cache takes up."""
    return model(input_ids=ids_BT, past_key_values=cache, use_cache=True).logits


def _tensors(cache: Any) -> dict[str, Tensor]:
    """Memory of a cache by name."""
    if hasattr(cache, "tensors") and callable(cache.tensors):
        return cache.tensors()
    if hasattr(cache, "slots"):
        return {str(number): x for number, x in enumerate(cache.tensors)}
    layers = enumerate((layer.keys, layer.values) for layer in cache.layers)
    return {
        f"{name}.{number}": x
        for number, pair in layers
        for name, x in zip(("keys", "values"), pair, strict=True)
        if x is not None
    }


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds."""
    return sum(x.nbytes for x in _tensors(cache).values())


def save_cache(cache: Any, path: Path) -> None:
    """Writes a cache of `new_cache` as safetensors."""
    if hasattr(cache, "save"):
        cache.save(path)
    else:
        save_file({name: x.contiguous() for name, x in _tensors(cache).items()}, path)


def load_cache(model: Any, cache: Any, path: Path, position: int) -> None:
    """Fills an empty cache of the same kind, one row, with what `save_cache` wrote at `position`."""
    device = next(model.parameters()).device
    if hasattr(cache, "load"):
        cache.load(path)
        return
    found = load_file(path, device=str(device))
    if hasattr(cache, "slots"):
        read_chunk(model, torch.zeros(1, 1, dtype=torch.int64, device=device), cache)  # takes the memory
        for number, x in enumerate(cache.tensors):
            x.copy_(found[str(number)])
        cache.columns = position
        return
    for number in range(len(found) // 2):
        cache.update(found[f"keys.{number}"], found[f"values.{number}"], number)
        if hasattr(cache.layers[number], "cumulative_length"):  # a sliding window has read more than it holds
            cache.layers[number].cumulative_length = position
