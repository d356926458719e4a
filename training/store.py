"""Tokenised text in a file that is mapped into memory, built once per source and tokenizer.

A store is a folder: tokens.bin (ids one after the other), ends.npy (int64, index one past each document's last
token) and meta.json. It is written beside its place and renamed, so a half-written store is never read.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from training.sources import SourceConfig, iter_documents, local_files

VERSION = 2
BATCH_CHARACTERS = 4_000_000
ABANDONED = 24 * 3600  # seconds after which a half-written store that nobody writes to is removed


class TokenStore:
    """Read-only view of one store. Only the path travels when it is sent to a worker process.

    Attributes: folder; ends, int64 [documents]; tokens, memory map [total tokens].
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._open()

    def _open(self) -> None:
        meta = json.loads((self.folder / "meta.json").read_text())
        self.ends = np.load(self.folder / "ends.npy", allow_pickle=False)
        self.tokens = np.memmap(self.folder / "tokens.bin", dtype=meta["dtype"], mode="r")

    def __getstate__(self) -> dict[str, str]:
        return {"folder": str(self.folder)}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.folder = Path(state["folder"])
        self._open()

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def total(self) -> int:
        """Number of tokens in the store."""
        return int(self.ends[-1]) if len(self.ends) else 0


def tokenize(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, add_bos: bool, add_eos: bool
) -> Iterator[list[int]]:
    """Token ids of each text, encoded in batches, with the begin and end tokens asked for."""
    begin = [tokenizer.bos_token_id] if add_bos else []
    end = [tokenizer.eos_token_id] if add_eos else []
    for batch in _batches(texts):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield begin + ids + end


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides the ids a tokenizer gives."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id])
    return hashlib.sha256((text + special).encode()).hexdigest()


def _key(source: SourceConfig, files: list[Path], tokenizer: PreTrainedTokenizerBase, flags: list[bool]) -> str:
    described = {k: v for k, v in asdict(source).items() if k not in ("weight", "streaming")}
    stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    text = json.dumps([VERSION, described, stamps, fingerprint(tokenizer), flags], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def open_store(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    *,
    name: str,
    add_bos: bool,
    add_eos: bool,
    progress: bool = True,
) -> TokenStore:
    """The store of one source, built now if the cache lacks it.

    name: where the source stands in the configuration, for messages.
    Raises: ValueError for a source without text, and whatever reading the source raises.
    """
    files = local_files(source, name)
    folder = Path(cache_dir).expanduser() / _key(source, files, tokenizer, [add_bos, add_eos])
    if not (folder / "meta.json").is_file():
        documents = iter_documents(source, name)
        first = next(documents, None)
        if first is None:
            raise ValueError(f"{name} ({source.path or source.hub}) holds no text: every document is empty")
        texts = _again(first, documents)
        _build(texts, tokenizer, folder, add_bos, add_eos, f"tokenise {source.path or source.hub}", progress)
    return TokenStore(folder)


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _build(
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    add_bos: bool,
    add_eos: bool,
    title: str,
    progress: bool,
) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    for old in folder.parent.glob(f"{folder.name}.*.partial"):
        with suppress(FileNotFoundError):  # its writer may be renaming it
            if time.time() - max(path.stat().st_mtime for path in [old, *old.iterdir()]) > ABANDONED:
                shutil.rmtree(old, ignore_errors=True)
    work = folder.with_name(f"{folder.name}.{uuid4().hex[:12]}.partial")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={str(folder.parent)!r} can't be written ({error.strerror}): name another folder"
        ) from None
    try:
        ends, total = [], 0
        bar = tqdm(desc=title, unit="token", unit_scale=True, disable=not progress, leave=False)
        with open(work / "tokens.bin", "wb") as out, bar:
            ids = tokenize(texts, tokenizer, add_bos, add_eos)
            while group := list(islice(ids, 1024)):
                flat = np.concatenate([np.asarray(one, dtype=dtype) for one in group])
                flat.tofile(out)
                ends.append(total + np.cumsum([len(one) for one in group]))
                total += len(flat)
                bar.update(len(flat))
        np.save(work / "ends.npy", np.concatenate(ends).astype(np.int64), allow_pickle=False)
        meta = {"version": VERSION, "dtype": dtype.name, "tokens": total}
        (work / "meta.json").write_text(json.dumps(meta))
        try:
            os.rename(work, folder)
        except OSError:
            # another process built the same store first: its content is the same
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
