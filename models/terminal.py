"""Generation in a terminal: text as it arises, sessions that outlive the process, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.cache import HybridCache
from models.generation import GREEDY, Sampling, TextStream, decode, prefill
from models.loading import fingerprint
from models.modeling import HybridForCausalLM

INTERRUPTED = 130


@dataclass(frozen=True)
class Printed:
    """What came of a stream of tokens.

    Attributes:
        last: the last token, which the cache lacks; empty if there was none.
        count: tokens generated.
        failure: why the output ended early, if it did.
    """

    last: list[int]
    count: int
    failure: OSError | None


def run(
    model: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    session: Path | None = None,
    max_new_tokens: int | None = 256,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    ignore_end: bool = False,
) -> int:
    """Continue a text on the standard output; a line about speed and memory goes to the standard error.

    Args:
        prompt: may be empty where there is a session.
        session: continued if the file exists, and written at the end, also after Ctrl-C or a closed pipe. If the
            prompt couldn't be read to its end, it stays as it was.
        max_new_tokens: None goes on for ever; 0 only reads the prompt.
        ignore_end: go on after an end-of-text token.

    Returns:
        Exit status: 0, or 130 after Ctrl-C.

    Raises:
        ValueError: the session belongs to another model, there is nothing to continue, or no generator has that seed.
        OSError: the session or the output can't be written.
    """
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed} is outside 0 to {(1 << 63) - 1}")
    cache = model.new_cache()
    identity = {} if session is None else {"dtype": str(model.dtype), "model": fingerprint(model)}
    resumed = session is not None and session.exists()
    ids = open_session(session, cache, identity) if resumed else []
    if prompt:
        ids += tokenizer(prompt, add_special_tokens=not resumed, verbose=False).input_ids
    if not ids:
        raise ValueError("the session ended with a prompt, so there is nothing to continue; give a prompt")
    started = time.perf_counter()
    logits = prefill(model, torch.tensor([ids], device=model.device), cache)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    read_at = time.perf_counter()
    ends = set() if ignore_end else end_tokens(model, tokenizer)
    generator = torch.Generator(model.device).manual_seed(seed)
    with deferred_interrupt() as interrupted:
        tokens = decode(model, logits, cache, max_new_tokens, sampling, generator)
        printed = print_tokens(tokens, tokenizer, ends, interrupted)
        seconds = time.perf_counter() - read_at
        if session is not None:
            save_session(session, cache, identity, printed.last)
    if printed.failure is not None:
        raise printed.failure
    decoded = max(0, printed.count - 1)  # the first token comes from the prompt's logits
    print(
        f"prompt: {len(ids)} tokens, {len(ids) / (read_at - started):,.0f} tokens/s; new: {printed.count} tokens, "
        f"{decoded / seconds:,.1f} tokens/s; cache: {cache.nbytes:,} bytes"
        + (f"; session: {session}" if session is not None else ""),
        file=sys.stderr,
    )
    return INTERRUPTED if interrupted() else 0


def save_session(path: Path, cache: HybridCache, identity: dict[str, str], last: list[int]) -> None:
    """Write a session, whole or not at all: the cache, the model's dtype and fingerprint, the token not read yet."""
    cache.save(path, {**identity, "last": " ".join(map(str, last))})


def open_session(path: Path, cache: HybridCache, identity: dict[str, str]) -> list[int]:
    """Fill the cache from a session; the token that was generated but not read yet, if there is one.

    Raises:
        ValueError: no session, or one of another model.
    """
    metadata = cache.load(path, expect=identity)
    try:
        return [int(token) for token in metadata["last"].split()]
    except (KeyError, ValueError):
        raise ValueError(f"{path} is a saved cache but no session of a text; start another") from None


def end_tokens(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text."""
    ends = {tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        ids = config.eos_token_id
        ends |= set(ids) if isinstance(ids, list) else {ids}
    return ends - {None}


def print_tokens(
    tokens: Iterator[Tensor], tokenizer: PreTrainedTokenizerBase, ends: set[int], stop: Callable[[], bool]
) -> Printed:
    """Print tokens [1, 1] as they arise, until one of `ends`, or until `stop` says so between two of them."""
    text, last, count, failure = TextStream(tokenizer), [], 0, None
    for token in tokens:
        last, count = [int(token)], count + 1
        if last[0] in ends:
            break
        failure = _write(text.push(last[0]))
        if failure is not None or stop():
            break
    if failure is None and count:
        failure = _write(text.finish() + "\n")
    return Printed(last, count, failure)


def _write(text: str) -> OSError | None:
    """Show text at once; the error if that fails."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only sets a flag, for a token read by half would spoil the cache; a second one interrupts at once."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
