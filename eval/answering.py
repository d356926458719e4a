"""Prompts in, answers and scores out: greedy generation in batches, what failed, and what was answered before.

Shapes: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .conditions import without_habits
from .results import SampleLog, row, wilson

HOPELESS = 8  # so many failures before the first answer end a run: something is wrong with all of it


class Sample(Protocol):
    """What is asked: a number within its case, the text that the model reads, and what it should write."""

    index: int
    text: str
    outputs: tuple[str, ...]


# ---- generation ----


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [B, T], padded at the left.

    Special tokens are those that the tokenizer adds by itself, but for an end-of-text token at the end, after
    which no answer could follow.
    """
    eos = tokenizer.eos_token_id
    rows = [tokenizer(text, verbose=False).input_ids for text in texts]
    rows = [ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in rows]
    width = max(len(ids) for ids in rows)
    pad = _pad_id(tokenizer)
    ids_BT = torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    return ids_BT, mask_BT


def _pad_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0  # padding is masked, so that any token serves


class _LineEnd:
    """A stopping criterion: a row is done once its new tokens hold a line's end."""

    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        self.tokenizer, self.prompt_tokens = tokenizer, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = self.tokenizer.batch_decode(input_ids[:, self.prompt_tokens :], skip_special_tokens=True)
        return torch.tensor(["\n" in text for text in new], device=input_ids.device)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, texts: Sequence[str], new_tokens: int, *, one_line: bool = False) -> list[str]:
    """Greedy continuations of the texts, up to `new_tokens` tokens or the tokenizer's end-of-text token.

    Args:
        one_line: only up to the end of the line.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    ids_BT, mask_BT = encode_prompts(tokenizer, texts)
    device = next(model.parameters()).device
    eos = tokenizer.eos_token_id
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=_pad_id(tokenizer), eos_token_id=eos
    )
    more = {}
    if one_line:
        more["stopping_criteria"] = StoppingCriteriaList([_LineEnd(tokenizer, ids_BT.shape[1])])
    with without_habits(model):
        out_BT = model.generate(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=greedy, **more
        )
    answers = []
    for ids in out_BT[:, ids_BT.shape[1] :].tolist():
        end = ids.index(eos) if eos is not None and eos in ids else len(ids)
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        answers.append(text.split("\n")[0] if one_line else text)
    return answers


# ---- batches ----


def error_text(error: Exception) -> str:
    """Kind and message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


class Runner:
    """Answers samples in batches; a sample that fails is recorded and the rest goes on.

    Args:
        answer: the answers to a batch of texts.
        score: of an answer, given what was expected.
        fields: attributes of a sample that its record holds.
        save_prompts: whether records hold the prompt.
    """

    def __init__(
        self,
        answer: Callable[[list[str]], list[str]],
        score: Callable[[str, tuple[str, ...]], float],
        fields: Sequence[str],
        save_prompts: bool = False,
    ) -> None:
        self.answer, self.score = answer, score
        self.fields, self.save_prompts = fields, save_prompts
        self.answered = 0
        self.failed = 0

    def _try(self, batch: Sequence[Sample]) -> list[str] | Exception:
        try:
            return self.answer([sample.text for sample in batch])
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            return error

    def _record(self, sample: Sample, prediction: str | Exception) -> dict[str, Any]:
        failed = isinstance(prediction, Exception)
        record = {name: getattr(sample, name) for name in self.fields} | {
            "expected": list(sample.outputs),
            "prediction": None if failed else prediction,
            "score": None if failed else self.score(prediction, sample.outputs),
            "error": error_text(prediction) if failed else None,
        }
        return record | ({"prompt": sample.text} if self.save_prompts else {})

    def run(self, batch: Sequence[Sample]) -> list[dict[str, Any]]:
        """Records of a batch; after a failure its samples are tried one by one.

        Raises:
            RuntimeError: the first samples failed all.
        """
        predictions = self._try(batch)
        if isinstance(predictions, Exception):
            one_by_one = [self._try([sample]) for sample in batch] if len(batch) > 1 else [predictions]
            predictions = [p if isinstance(p, Exception) else p[0] for p in one_by_one]
        errors = [p for p in predictions if isinstance(p, Exception)]
        self.failed += len(errors)
        self.answered += len(batch) - len(errors)
        if not self.answered and self.failed >= HOPELESS:
            last = errors[-1]
            raise RuntimeError(f"the first {self.failed} samples all failed: {error_text(last)}") from last
        return [self._record(sample, p) for sample, p in zip(batch, predictions, strict=True)]

    def run_case(self, log: SampleLog, samples: Sequence[Sample], batch_size: int, bar: Any) -> list[dict[str, Any]]:
        """Records of a case in the order of its samples; those that the log holds with a score stand.

        Args:
            bar: the progress bar, which counts samples.

        Raises:
            ValueError: the log is of other samples.
            RuntimeError: the first samples failed all.
        """
        done = _finished(log, samples)
        open_ = [sample for sample in samples if sample.index not in done]
        self.answered += len(samples) - len(open_)  # what was answered before shows that not all is wrong
        bar.update(len(samples) - len(open_))
        for start in range(0, len(open_), batch_size):
            for record in self.run(open_[start : start + batch_size]):
                log.append(record)
                bar.update()
            scores = [r["score"] for r in log.records.values() if r["score"] is not None]
            bar.set_postfix_str(f"accuracy {sum(scores) / len(scores):.3f}" if scores else "no answer yet")
        return [log.records[sample.index] for sample in samples]


def _finished(log: SampleLog, samples: Sequence[Sample]) -> set[int]:
    """Numbers of the samples that need no more work; failed ones are tried again."""
    for sample in samples:
        record = log.records.get(sample.index)
        if record is not None and record.get("expected") != list(sample.outputs):
            raise ValueError(
                f"{log.path}: sample {sample.index} expects {record.get('expected')!r} there and "
                f"{list(sample.outputs)!r} here; choose another folder"
            )
    return {index for index, record in log.records.items() if record["score"] is not None}


def accuracy_row(records: Sequence[dict[str, Any]], case: str, system: str) -> dict[str, Any] | None:
    """The mean score with its 95 % Wilson interval; None where every sample failed."""
    scores = [record["score"] for record in records if record["score"] is not None]
    if not scores:
        return None
    low, high = wilson(sum(scores), len(scores))
    return row(case, system, "accuracy", sum(scores) / len(scores), low, high, len(scores))
