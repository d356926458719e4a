"""Generation in plain functions: prefill, decode_one_token, sample, and a stream of tokens at constant memory.

`generate()` of transformers works as well; these are for reading, streaming and measuring.

Shapes: B rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.cache import HybridCache
from models.modeling import HybridForCausalLM
from models.padding import check_ends


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the so many likeliest tokens; None: all.
        top_p: only the likeliest tokens that together have this probability; None: all.

    Raises:
        ValueError: naming the field and its value.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (the likeliest token) or more, such as 0.8")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; leave it out to draw from all tokens")
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.temperature == 0:
                raise ValueError(
                    f"{name}={value} has no use where temperature=0 takes the likeliest token: give a temperature, "
                    f"such as 1.0, or leave {name} out"
                )


GREEDY = Sampling()


def sample(logits_BV: Tensor, sampling: Sampling = GREEDY, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row [B, 1], without waiting for the device."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None:
        lowest_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -torch.inf)
    if sampling.top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        share_BV = sorted_BV.softmax(-1)
        # a token goes if those before it have enough already; the first one always stays
        goes_BV = share_BV.cumsum(-1) - share_BV >= sampling.top_p
        goes_BV[:, 0] = False
        logits_BV = logits_BV.masked_fill(torch.zeros_like(goes_BV).scatter(1, order_BV, goes_BV), -torch.inf)
    # the largest p / e with exponential e is a draw from p; torch.multinomial would read p on the host
    noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
    return (logits_BV.softmax(-1) / noise_BV).argmax(-1, keepdim=True)


@torch.no_grad()
def prefill(
    model: HybridForCausalLM, input_ids: Tensor, cache: HybridCache, attention_mask: Tensor | None = None
) -> Tensor:
    """Read a prompt [B, T] into the cache, in chunks (`config.prefill_chunk`).

    Args:
        cache: of B rows, empty or of a text that the prompt continues.
        attention_mask: [B, T], 0 for padding at the left.

    Returns:
        Logits [B, V] of the token after the prompt.

    Raises:
        ValueError: a prompt that ends in padding.
    """
    check_ends(attention_mask, input_ids.shape[1])
    output = model(
        input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return output.logits[:, -1]


@torch.no_grad()
def decode_one_token(model: HybridForCausalLM, token_B1: Tensor, cache: HybridCache) -> Tensor:
    """Read one token of every row into the cache; logits [B, V] of the next one. The host never waits."""
    return model(input_ids=token_B1, past_key_values=cache, use_cache=True).logits[:, -1]


Step = Callable[[HybridForCausalLM, Tensor, HybridCache], Tensor]


def decode(
    model: HybridForCausalLM,
    logits_BV: Tensor,
    cache: HybridCache,
    max_new_tokens: int | None,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    step: Step | None = None,
) -> Iterator[Tensor]:
    """Tokens [B, 1] one after the other, from the logits that follow what the cache holds.

    A token that has been yielded is not in the cache yet: it is read when the next one is asked for. Whoever stops
    in between (at an end-of-text token, say) continues exactly by reading that token first.

    Args:
        max_new_tokens: None goes on for ever.
        step: reads one token; anything that computes what `decode_one_token` does. None: that, but on CUDA steps
            are graphs where the model allows (models/decoding.py); a warning names the reason where it doesn't.
    """
    if step is None and logits_BV.is_cuda:
        from models import decoding

        if decoding.serves(model, cache):
            yield from decoding.decode_graphed(model, logits_BV, cache, max_new_tokens, sampling, generator)
            return
    step = decode_one_token if step is None else step
    done = 0
    while max_new_tokens is None or done < max_new_tokens:
        token_B1 = sample(logits_BV, sampling, generator)
        done += 1
        yield token_B1
        if done != max_new_tokens:
            logits_BV = step(model, token_B1, cache)


def stream_tokens(
    model: HybridForCausalLM,
    input_ids: Tensor,
    cache: HybridCache | None = None,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue a prompt [B, T] (rows of equal length): tokens [B, 1] as they arise.

    Memory stays that of the cache and of one chunk of the prompt, however many tokens are read and written.
    """
    cache = cache if cache is not None else model.new_cache(len(input_ids))
    yield from decode(model, prefill(model, input_ids, cache), cache, max_new_tokens, sampling, generator)


class TextStream:
    """Tokens in, text out, as soon as it is certain.

    A character may need several tokens, and a tokenizer may write a token in another way at the start of a text, so
    new tokens are decoded together with those of the last piece of text. Only these few are remembered.
    """

    # a character has at most 4 bytes: what isn't text after so many tokens never will be
    PATIENCE = 8
    UNFINISHED = "\N{REPLACEMENT CHARACTER}"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.shown: list[int] = []  # tokens of the last piece of text
        self.waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        self.waiting.append(token)
        text = self._text(self.waiting)
        late = len(self.waiting) >= self.PATIENCE
        if not text:
            # special tokens have no text, however many come
            self.waiting = [] if late else self.waiting
            return ""
        if text.endswith(self.UNFINISHED):
            # the last three tokens may still begin a character
            return self._show(len(self.waiting) - 3) if late else ""
        return self._show(len(self.waiting))

    def finish(self) -> str:
        """What is left, unfinished characters included."""
        return self._show(len(self.waiting))

    def _text(self, tokens: list[int]) -> str:
        """What the tokens add to the text shown."""

        def decode(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        return decode(self.shown + tokens)[len(decode(self.shown)) :]

    def _show(self, count: int) -> str:
        text = self._text(self.waiting[:count])
        self.shown, self.waiting = self.waiting[:count], self.waiting[count:]
        return text
