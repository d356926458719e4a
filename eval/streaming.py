"""Endless text through a model in constant memory: the text's tokens, caches, and reading in chunks.

A model of this project has a cache of its own; any other causal model of transformers is read with a full cache, or
with the constant one of StreamingLLM (arXiv 2309.17453).

Shapes: B rows, T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CACHES = ("auto", "full", "stream")
PIECE_CHARACTERS = 1 << 16
RECORD_SEPARATOR = "\x1e"


# ---- text ----


def _open(path: Path) -> Any:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8")


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
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise ValueError(f"text: {path} can't be read ({error}); give UTF-8 text, plain, .gz or .xz") from error
        if rest:
            yield rest if rest.endswith("\n") else f"{rest}\n"


def text_tokens(paths: Sequence[str | Path], tokenizer: Any) -> Iterator[list[int]]:
    """The text's tokens in lists of any size; first what the tokenizer puts at a text's beginning, if anything."""
    start = [token for token in tokenizer("", verbose=False).input_ids if token != tokenizer.eos_token_id]
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
    """Name, bytes and a digest of the first megabyte of each file; ValueError for one that is missing."""
    found = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"text: {path} is not a file; give text files, plain, .gz or .xz")
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(1 << 20)).hexdigest()[:16]
        found.append(f"{path.name} {path.stat().st_size} {digest}")
    return found


# ---- caches ----


def new_cache(model: Any, kind: str, batch: int, sinks: int, window: int) -> Any:
    """An empty cache of `batch` rows.

    Args:
        kind: `auto`: the model's own, or a full one where it has none; `full`; `stream`: sinks and window.

    Raises:
        ValueError: an unknown kind, or one that the model can't be read with.
    """
    if kind not in CACHES:
        raise ValueError(f"cache: {kind!r} is unknown; use one of {', '.join(CACHES)}")
    own = hasattr(model, "new_cache")
    if own and kind != "auto":
        raise ValueError(f"cache: {type(model).__name__} has a cache of its own; use auto instead of {kind}")
    if own:
        return model.new_cache(batch)
    if kind == "stream":
        from models.streaming import stream

        return stream(model, sinks, window)
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.no_grad()
def read_chunk(model: Any, ids_BT: Tensor, cache: Any) -> Tensor:
    """Logits [B, T, V] of new tokens, which the cache takes up."""
    return model(input_ids=ids_BT, past_key_values=cache, use_cache=True).logits


def _tensors(cache: Any) -> dict[str, Tensor]:
    """Memory of a cache by name."""
    if hasattr(cache, "tensors") and callable(cache.tensors):
        return cache.tensors()
    if hasattr(cache, "slots"):
        layers = zip(cache.keys, cache.values, strict=True)
        found = {"seen": cache.seen} if cache.seen is not None else {}
    else:
        layers, found = ((layer.keys, layer.values) for layer in cache.layers), {}
    for number, pair in enumerate(layers):
        found |= {f"{name}.{number}": x for name, x in zip(("keys", "values"), pair, strict=True) if x is not None}
    return found


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds."""
    return sum(x.nbytes for x in _tensors(cache).values())


def save_cache(cache: Any, path: Path) -> None:
    """Writes a cache of `new_cache` as safetensors."""
    if hasattr(cache, "save"):
        cache.save(path)
    else:
        save_file({name: x.contiguous() for name, x in _tensors(cache).items()}, path)


def load_cache(cache: Any, path: Path, position: int, device: torch.device) -> None:
    """Fills an empty cache of the same kind, one row, with what `save_cache` wrote at `position`."""
    if hasattr(cache, "load"):
        cache.load(path)
        return
    found = load_file(path, device=str(device))
    layers = sum(name.startswith("keys.") for name in found)
    if hasattr(cache, "slots"):
        cache.start(1, device)
        cache.seen.copy_(found["seen"])
        cache.columns = position
        cache.keys = [found[f"keys.{n}"] for n in range(layers)]
        cache.values = [found[f"values.{n}"] for n in range(layers)]
        return
    for number in range(layers):
        cache.update(found[f"keys.{number}"], found[f"values.{number}"], number)
