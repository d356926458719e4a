"""Needle-in-a-haystack prompts with RULER's definition (arXiv 2404.06654).

The eight tasks, their sentences and the order of the random draws are those of RULER's `niah` family as
lm-evaluation-harness 0.4.13 runs it, so that the same draws give the same prompt, byte for byte:

    random.seed(s); its generator for one length   ==   make_samples(task, tokenizer, length, n, seed=s)

Two deliberate differences: essays start again from the beginning when a context is longer than all of them
(as RULER does), and a length that can't hold every sample is an error, where the harness leaves samples out.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .haystacks import essay_sentences, key_words

DEFINITION = "RULER niah (draws and sizes of lm-evaluation-harness 0.4.13), version 1"
NEW_TOKENS = 128
SHUFFLE_SEED = 42  # the definition shuffles the needles of a prompt with this seed, whatever the run's seed
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))

_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
_MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
    "What are all the special magic {kind}s for {query} mentioned in the provided text?"
)
_ONE_ANSWER = "The special magic {kind} for {query} mentioned in the provided text is"
_MANY_ANSWERS = "The special magic {kind}s for {query} mentioned in the provided text are"


@dataclass(frozen=True)
class NeedleTask:
    """One task of the family.

    Args:
        name: its name in RULER, e.g. `niah_single_1`.
        haystack: `noise` (one line repeated), `essay`, or `needle` (lines that look like needles).
        key_type: `word` (adjective-noun) or `uuid`.
        value_type: `number` (7 digits) or `uuid`.
        num_keys: needles with different keys; raised to `num_queries` if smaller.
        num_values: values for each key.
        num_queries: keys asked for.
    """

    name: str
    haystack: str
    key_type: str = "word"
    value_type: str = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def keys(self) -> int:
        """Keys hidden in a prompt."""
        return max(self.num_keys, self.num_queries)

    @property
    def needles(self) -> int:
        """Needle sentences hidden in a prompt."""
        return self.keys * self.num_values

    @property
    def single(self) -> bool:
        """Whether one value is the whole answer."""
        return self.num_queries * self.num_values == 1


TASKS: dict[str, NeedleTask] = {
    task.name: task
    for task in (
        NeedleTask("niah_single_1", "noise"),
        NeedleTask("niah_single_2", "essay"),
        NeedleTask("niah_single_3", "essay", value_type="uuid"),
        NeedleTask("niah_multikey_1", "essay", num_keys=4),
        NeedleTask("niah_multikey_2", "needle"),
        NeedleTask("niah_multikey_3", "needle", key_type="uuid", value_type="uuid"),
        NeedleTask("niah_multivalue", "essay", num_values=4),
        NeedleTask("niah_multiquery", "essay", num_queries=4),
    )
}


@dataclass(frozen=True)
class NeedleSample:
    """One prompt and what it should be answered with.

    Args:
        task: name of the task.
        length: the length asked for, in tokens: `tokens` + new tokens fit in it.
        index: number of the sample, from 0; the same for any number of samples.
        prompt: text without the answer prefix.
        answer_prefix: start of the answer; the model reads `prompt`, one space, and this.
        outputs: the values asked for.
        depth_percent: where the asked needle lies, 0 (start) to 100; the mean if several are asked.
        tokens: tokens of `prompt`, with the special tokens that the tokenizer adds.
    """

    task: str
    length: int
    index: int
    prompt: str
    answer_prefix: str
    outputs: tuple[str, ...]
    depth_percent: float
    tokens: int

    @property
    def text(self) -> str:
        """What the model reads."""
        return f"{self.prompt} {self.answer_prefix}"


def find_task(name: str | NeedleTask) -> NeedleTask:
    """The task of this name, with or without the prefix `niah_`.

    Raises:
        ValueError: no such task.
    """
    if isinstance(name, NeedleTask):
        return name
    task = TASKS.get(name) or TASKS.get(f"niah_{name}")
    if task is None:
        known = ", ".join(sorted(t.removeprefix("niah_") for t in TASKS))
        raise ValueError(f"tasks: unknown task {name!r}; choose from {known}")
    return task


@dataclass(frozen=True)
class _Draw:
    """Everything random about one prompt; the text follows from it."""

    keys: list[str]
    needles: list[tuple[int, str]]  # key's number and value, in the order of the text
    places: list[int]  # of each needle: depth in percent (essay), or line number
    lines: list[tuple[str, str]]  # key and value of each line of a `needle` haystack
    asked: list[int]  # numbers of the keys asked for
    outputs: list[str]


def _random_text(kind: str, rng: random.Random) -> str:
    if kind == "word":
        return rng.choice(key_words())
    if kind == "number":
        return str(rng.randint(10**6, 10**7 - 1))
    assert kind == "uuid", kind
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _draw(task: NeedleTask, size: int, rng: random.Random) -> _Draw:
    """Draws one prompt with `size` words or lines of haystack. The order of the draws is the definition's."""
    keys: list[str] = []
    values: list[list[str]] = []
    for _ in range(task.keys):
        keys.append(_random_text(task.key_type, rng))
        values.append([_random_text(task.value_type, rng) for _ in range(task.num_values)])
    needles = [(k, value) for k in range(task.keys) for value in values[k]]
    random.Random(SHUFFLE_SEED).shuffle(needles)
    lines: list[tuple[str, str]] = []
    if task.haystack == "essay":
        places = sorted(rng.sample(DEPTHS, len(needles)))
    else:
        if task.haystack == "needle":
            for _ in range(size):
                key = _random_text(task.key_type, rng)
                lines.append((key, _random_text(task.value_type, rng)))
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
    asked = rng.sample(range(task.keys), task.num_queries)
    return _Draw(keys, needles, places, lines, asked, [value for k in asked for value in values[k]])


def _essay_context(needles: list[str], depths: list[int], size: int) -> str:
    """The first `size` words of the essays, with a needle after the sentence at each depth."""
    sentences = essay_sentences(size)
    ends = [int(len(sentences) * (depth / 100)) for depth in depths]
    parts: list[str] = []
    start = 0
    for end, needle in zip(ends, needles, strict=True):
        parts += [" ".join(sentences[start:end]), needle]
        start = end
    return " ".join([*parts, " ".join(sentences[start:])])


def _render(task: NeedleTask, draw: _Draw, size: int) -> tuple[str, str]:
    """(prompt, answer prefix) of a draw."""
    sentence = lambda key, value: NEEDLE.format(kind=task.value_type, key=key, value=value)
    needles = [sentence(draw.keys[k], value) for k, value in draw.needles]
    if task.haystack == "essay":
        context = _essay_context(needles, draw.places, size)
    else:
        lines = [sentence(*line) for line in draw.lines] if task.haystack == "needle" else [NOISE] * size
        for place, needle in zip(draw.places, needles, strict=True):
            lines.insert(place, needle)  # places fall, so earlier ones stay right
        context = "\n".join(lines)
    names = [draw.keys[k] for k in draw.asked]
    query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    template, answer = (_ONE, _ONE_ANSWER) if task.single else (_MANY, _MANY_ANSWERS)
    prompt = template.format(kind=task.value_type, context=context, query=query)
    return prompt, answer.format(kind=task.value_type, query=query)


def _depth(task: NeedleTask, draw: _Draw, size: int) -> float:
    asked = [place for (k, _), place in zip(draw.needles, draw.places, strict=True) if k in draw.asked]
    mean = sum(asked) / len(asked)
    return float(mean if task.haystack == "essay" else 100 * mean / size)


def default_step(task: NeedleTask, length: int) -> int:
    """How the haystack grows: words of an essay, otherwise lines."""
    if task.haystack == "essay":
        return 500
    return 5 if length < 4096 else 25


def _surely_fitting(task: NeedleTask, count: Callable[[str], int], room: int, step: int) -> int:
    """A size, up to which no prompt can exceed `room` tokens: counting these again would only take time.

    Prompts of one size differ by their needles alone, so one that stays a margin below `room` vouches for
    every smaller size.
    """
    rng = random.Random(0)
    limit = room - max(256, room // 32)

    def fits(steps: int) -> bool:
        draw = _draw(task, steps * step, rng)
        return count(_render(task, draw, steps * step)[0] + " ".join(draw.outputs)) <= limit

    if step < task.needles or not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        if high * step > room:
            raise ValueError(
                f"tokenizer: {high * step} words or lines take fewer than {room} tokens, so that no length can "
                "be reached; use a tokenizer that covers English text"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def _haystack_size(
    task: NeedleTask, rng: random.Random, count: Callable[[str], int], length: int, new_tokens: int, step: int
) -> int:
    """Grows the haystack until prompt, answer and new tokens exceed `length`, then takes one step back."""
    size = max(step, task.needles)
    sure = _surely_fitting(task, count, length - new_tokens, step)
    total = 0
    while total + new_tokens < length:
        draw = _draw(task, size, rng)
        if size >= sure:
            total = count(_render(task, draw, size)[0] + " ".join(draw.outputs))
        if total + new_tokens > length:
            size -= step
            break
        size += step
    return max(size, task.needles)


def _try_samples(
    task: NeedleTask,
    count: Callable[[str], int],
    length: int,
    samples: int,
    seed: int,
    new_tokens: int,
    step: int,
) -> tuple[list[NeedleSample], int]:
    """(samples, smallest length that holds the first sample that didn't fit, or 0 if all did)."""
    rng = random.Random(seed)
    size = _haystack_size(task, rng, count, length, new_tokens, step)
    made: list[NeedleSample] = []
    for index in range(samples):
        used, needed = size, 0
        while used >= task.needles:
            draw = _draw(task, used, rng)
            prompt, prefix = _render(task, draw, used)
            tokens = count(prompt)
            needed = tokens + new_tokens
            if needed <= length:
                break
            used -= step
        if needed > length:
            return made, needed
        depth = _depth(task, draw, used)
        made.append(NeedleSample(task.name, length, index, prompt, prefix, tuple(draw.outputs), depth, tokens))
    return made, 0


def make_samples(
    task: str | NeedleTask,
    tokenizer: Any,
    length: int,
    samples: int,
    seed: int,
    new_tokens: int = NEW_TOKENS,
    *,
    step: int | None = None,
) -> list[NeedleSample]:
    """The first `samples` prompts of a task at one length; they only depend on the arguments.

    Args:
        task: a task or its name.
        tokenizer: a transformers tokenizer; it measures the prompts.
        length: tokens that prompt and new tokens may take together (the answer prefix isn't counted).
        samples: how many. The first n of any larger number are the same.
        seed: of the draws.
        new_tokens: tokens kept free for the answer, 128 in the definition.
        step: words (essay) or lines by which the haystack grows; None: the definition's 500 words, 25 lines,
            5 lines below 4096 tokens. A smaller step fills short lengths better, and is no longer comparable.

    Raises:
        ValueError: a number out of range, an unknown task, a missing text source, or a length that is too
            short for the template (the error names the smallest that works).
    """
    task = find_task(task)
    for name, value in (("length", length), ("samples", samples), ("new_tokens", new_tokens), ("step", step)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: {value!r} is not a positive whole number")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: {seed!r} is not a whole number")
    count = lambda text: len(tokenizer(text, verbose=False).input_ids)
    if count(NOISE) < 5:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} takes {count(NOISE)} tokens for {len(NOISE)} characters of "
            "English, so lengths can't be measured; use the tokenizer that the model was trained with"
        )
    run = lambda size: _try_samples(task, count, size, samples, seed, new_tokens, step or default_step(task, size))
    made, needed = run(length)
    if not needed:
        return made
    while needed:
        smallest = needed
        _, needed = run(smallest)
    raise ValueError(
        f"length: {length} tokens are too few for {task.name} with {new_tokens} new tokens and this tokenizer; "
        f"the smallest length that works is {smallest}"
    )


def score(prediction: str, outputs: tuple[str, ...] | list[str]) -> float:
    """Share of the expected values that the prediction contains, 0 to 1, whatever the case of letters."""
    if not outputs:
        raise ValueError("outputs: no expected value; a sample needs at least one")
    text = "".join("\n" if char < " " else char for char in prediction.strip()).strip().lower()
    return sum(value.lower() in text for value in outputs) / len(outputs)
