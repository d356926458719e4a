"""A model of transformers as lm-evaluation-harness (package lm-eval, 0.4.13) takes it, and its answers on disk."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from .answering import HOPELESS, error_text
from .conditions import without_habits
from .results import SampleLog

UNLIMITED = 1 << 40  # tokens
_FAILED = {"generate_until": "", "loglikelihood": (-math.inf, False), "loglikelihood_rolling": -math.inf}


class HopelessError(RuntimeError):
    """Nothing could be answered: something is wrong with all of it."""


def request_key(kind: str, arguments: Sequence[Any]) -> str:
    """A name for a request: what it asks for and with which arguments."""
    return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of every model that comes as an object; here it always does."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Answers:
    """Answers to the harness's requests, in a file that grows with each of them.

    The harness's models call `add_partial` whenever a request is answered.

    Attributes:
        found: answers by request.
        failed: errors of this session by request; the next one tries these again.
    """

    def __init__(self, log: SampleLog) -> None:
        self.log = log
        self.found = {record["key"]: record["answer"] for record in log.records.values() if record["error"] is None}
        self.failed: dict[str, str] = {}

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Keeps an answer."""
        key = request_key(kind, arguments)
        self.found[key] = answer
        self._append(key, kind, answer, None)

    def fail(self, kind: str, arguments: Sequence[Any], error: Exception) -> None:
        """Keeps an error.

        Raises:
            HopelessError: the first requests failed all.
        """
        key = request_key(kind, arguments)
        self.failed[key] = error_text(error)
        self._append(key, kind, None, self.failed[key])
        if not self.found and len(self.failed) >= HOPELESS:
            raise HopelessError(f"the first {len(self.failed)} requests all failed: {self.failed[key]}") from error

    def _append(self, key: str, kind: str, answer: Any, error: str | None) -> None:
        record = {"index": len(self.log.records), "key": key, "kind": kind, "answer": answer, "error": error}
        self.log.append(record)


class HarnessModel(HFLM):
    """A model and its tokenizer as the harness takes them.

    Args:
        model: any causal model of transformers, on its device.
        tokenizer: its tokenizer; it isn't changed.
        answers: where answers are kept and looked up.
        bos: whether texts begin with the tokenizer's special tokens; None: as the tokenizer has it.
        max_length: tokens that are read at most, and of each window of a rolling perplexity; None: windows of the
            length that the model was trained with, and for models with a cache of their own no limit elsewhere.

    Raises:
        ValueError: a tokenizer without an end-of-text token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        answers: Answers,
        *,
        batch_size: int = 8,
        bos: bool | None = None,
        max_length: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: it has no end-of-text token, which the harness needs; set eos_token")
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so that any token of the model serves
        with _quiet():
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                add_bos_token=bos,
            )
        self.answers = answers
        self.set_cache_hook(answers)
        self._endless = hasattr(model, "new_cache") and max_length is None

    @property
    def max_length(self) -> int:
        """Tokens that are read at most."""
        return UNLIMITED if self._endless else super().max_length

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        # a row that has ended must not go on while its neighbours are still writing
        settings.setdefault("eos_token_id", self.eot_token_id)
        with without_habits(self.model):
            return super()._model_generate(context, max_length, stop, **settings)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy generation writes it) of each continuation."""
        run = super().loglikelihood
        return [tuple(answer) for answer in self._answer("loglikelihood", requests, lambda r: run(r, disable_tqdm))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, read in windows."""
        run, endless = super().loglikelihood_rolling, self._endless
        self._endless = False
        try:
            return self._answer("loglikelihood_rolling", requests, lambda r: run(r, disable_tqdm))
        finally:
            self._endless = endless

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text."""
        run = super().generate_until
        return self._answer("generate_until", requests, lambda r: run(r, disable_tqdm))

    def _answer(self, kind: str, requests: list[Any], run: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Answers from the file, and from the model for the rest; a failed one counts as wrong."""
        if kind == "generate_until" and any(request.args[1].get("do_sample") for request in requests):
            return run(requests)  # draws differ from each other, so that none stands for another
        open_ = {request_key(kind, request.args): request for request in requests}
        self._work(kind, [request for key, request in open_.items() if key not in self.answers.found], run)
        keys = [request_key(kind, request.args) for request in requests]
        return [self.answers.found.get(key, _FAILED[kind]) for key in keys]

    def _work(self, kind: str, requests: list[Any], run: Callable[[list[Any]], list[Any]]) -> None:
        """Runs requests; after a failure those still open in halves, down to the ones that can't be answered."""
        if not requests:
            return
        try:
            for request, answer in zip(requests, run(requests), strict=True):
                if request_key(kind, request.args) not in self.answers.found:
                    self.answers.add_partial(kind, request.args, answer)
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            left = [request for request in requests if request_key(kind, request.args) not in self.answers.found]
            if len(left) == 1 and len(requests) == 1:
                self.answers.fail(kind, left[0].args, error)
                return
            middle = max(1, len(left) // 2)
            self._work(kind, left[:middle], run)
            self._work(kind, left[middle:], run)
