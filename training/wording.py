"""The wording of needle documents: settings, templates, and the random keys and values that fill them.

The default wording is that of the S-NIAH evaluation (RULER, arXiv 2404.06654): training on it shows the mechanism,
not generalisation to other wordings. Change the templates for that.
"""

import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from omegaconf import OmegaConf

HAYSTACKS = ("noise", "text", "needles")
KEY_TYPES = ("words", "nouns", "compound", "name", "code", "number", "uuid")
VALUE_TYPES = ("number", "uuid", "hex", "serial", "word")
TEMPLATES = ("needle", "preamble", "question", "prefix", "preamble_many", "question_many", "prefix_many", "answer")
ALTERNATIVES = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# syllables of made-up names: first, then one or two inner ones
HEADS = ("Al", "Ber", "Cor", "Dan", "El", "Fal", "Gor", "Hel", "Is", "Jor", "Kel", "Lor", "Mar", "Nor", "Os", "Per")
TAILS = ("a", "den", "dra", "fin", "go", "ia", "ko", "lin", "mas", "mir", "na", "rick", "ron", "ta", "ton", "vik")


@dataclass
class NeedleConfig:
    """Needle documents in the training mix.

    fraction: share of the rows that are needle rows, from 0 to 1.
    haystacks: drawn evenly for each document: noise (the sentences below), text (the text sources), needles (more
        needles, as many as fit).
    key_type: words (adjective-noun), nouns (two, with a space), compound (two, with a hyphen), name (two made-up
        ones), code (two letters, four figures), number or uuid.
    keys, questions: least and most per document; a question asks about `queries` keys with `values` values each.
    value_type: number, uuid, hex (hexadecimal figures), serial (such figures in hyphenated groups of four) or word.
    digits: figures of a number, hex or serial value.
    length: least and most tokens of a document; null: a document fills its row.
    loss_on: all tokens, or only the answers.
    variants: kinds of documents in turn, each a set of changes to these settings, for example
        [{value_type: number}, {value_type: uuid, keys: [1, 4]}]; empty: one kind.
    needle, preamble, question, prefix, answer: templates with {key}, {value}, {type} (number) and {types} (numbers);
        the `_many` forms serve questions with several answers. In all of them [one|another] is one of the two (or
        more), drawn for each document; an empty one leaves the place out. YAML wants quotes around brackets.
    """

    fraction: float = 0.0
    haystacks: list[str] = field(default_factory=lambda: ["noise"])
    keys: list[int] = field(default_factory=lambda: [1, 1])
    questions: list[int] = field(default_factory=lambda: [1, 1])
    queries: int = 1
    values: int = 1
    key_type: str = "words"
    value_type: str = "number"
    digits: int = 7
    length: list[int] | None = None
    loss_on: str = "all"
    variants: list[dict[str, Any]] = field(default_factory=list)
    noise: str = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    needle: str = "One of the special magic {types} for {key} is: {value}."
    preamble: str = (
        "A special magic {type} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {type} afterwards."
    )
    question: str = "What is the special magic {type} for {key} mentioned in the provided text?"
    prefix: str = "The special magic {type} for {key} mentioned in the provided text is"
    preamble_many: str = (
        "Some special magic {types} are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {types} afterwards."
    )
    question_many: str = "What are all the special magic {types} for {key} mentioned in the provided text?"
    prefix_many: str = "The special magic {types} for {key} mentioned in the provided text are"
    answer: str = "{value}."


def check_needles(config: NeedleConfig, name: str = "needles") -> None:
    """Raises: ValueError naming the field, its value and what would do."""
    if not 0 <= config.fraction <= 1:
        raise ValueError(f"{name}.fraction={config.fraction} is outside 0 … 1: give a share of the rows")
    if not config.haystacks:
        raise ValueError(f"{name}.haystacks is empty: name at least one of {', '.join(HAYSTACKS)}")
    choices = [("key_type", KEY_TYPES), ("value_type", VALUE_TYPES), ("loss_on", ("all", "answer"))]
    for label, known in choices:
        if getattr(config, label) not in known:
            raise ValueError(f"{name}.{label}={getattr(config, label)!r} is unknown: use one of {', '.join(known)}")
    for one in config.haystacks:
        if one not in HAYSTACKS:
            raise ValueError(f"{name}.haystacks holds {one!r}, which is unknown: use {', '.join(HAYSTACKS)}")
    for label in ("keys", "questions", "length"):
        span = getattr(config, label)
        if span is not None and (len(span) != 2 or not 1 <= span[0] <= span[1]):
            raise ValueError(f"{name}.{label}={list(span)} is no range: give [least, most] with 1 ≤ least ≤ most")
    for label in ("queries", "values", "digits"):
        if getattr(config, label) < 1:
            raise ValueError(f"{name}.{label}={getattr(config, label)} is below 1: use 1 or more")
    if config.keys[0] < config.queries:
        raise ValueError(
            f"{name}.keys={list(config.keys)} allows fewer keys than one question asks about "
            f"(queries={config.queries}): raise keys or lower queries"
        )
    _check_templates(config, name)
    if config.variants:
        variants(config, name)


def _check_templates(config: NeedleConfig, name: str) -> None:
    asked = ("{key}",)
    wanted = {"needle": ("{key}", "{value}"), "question": asked, "question_many": asked, "answer": ("{value}",)}
    for label in TEMPLATES:
        text = getattr(config, label)
        offers = [one for match in ALTERNATIVES.finditer(text) for one in match[1].split("|")]
        try:
            for one in (text, *offers):
                one.format(key="k", value="v", type="t", types="ts")
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{name}.{label}={text!r} is no template ({error}): only {{key}}, {{value}}, {{type}} and {{types}} "
                "can be filled in"
            ) from None
        if _is_ambiguous(text):
            raise ValueError(
                f"{name}.{label}={text!r} has brackets within [one|another], or one that is never closed or opened: "
                "write alternatives side by side"
            )
        for part in wanted.get(label, ()):
            if not _always_holds(text, part):
                raise ValueError(f"{name}.{label}={text!r} lacks {part}: without it nothing can be asked")


def _is_ambiguous(template: str) -> bool:
    """Whether a bracket is left over beside a bar, without [one|another] and pairs of brackets such as [sic]."""
    rest, before = ALTERNATIVES.sub("", template), None
    while rest != before:
        rest, before = re.sub(r"\[[^\[\]|]*\]", "", rest), rest
    return "|" in rest and ("[" in rest or "]" in rest)


def _always_holds(template: str, part: str) -> bool:
    """Whether every choice of alternatives leaves the part in it."""
    offers = [match[1].split("|") for match in ALTERNATIVES.finditer(template)]
    return part in ALTERNATIVES.sub("", template) or any(all(part in one for one in offer) for offer in offers)


def choose_wording(rng: np.random.Generator, config: NeedleConfig) -> NeedleConfig:
    """The settings with one of the alternatives [one|another] in each place of the templates."""
    texts = {label: getattr(config, label) for label in TEMPLATES}
    varied = {label: text for label, text in texts.items() if ALTERNATIVES.search(text)}
    return replace(
        config, **{label: ALTERNATIVES.sub(lambda m: _one(rng, m[1].split("|")), t) for label, t in varied.items()}
    )


def merge_needles(base: NeedleConfig, changes: dict[str, Any], name: str) -> NeedleConfig:
    """The settings with some of them changed. Raises: ValueError naming what is unknown or wrong."""
    for key in changes:
        if key not in vars(base):
            raise ValueError(f"{name}.{key} is unknown: the needle settings are {', '.join(vars(base))}")
    merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), dict(changes)))
    check_needles(merged, name)
    return merged


def variants(config: NeedleConfig, name: str) -> list[NeedleConfig]:
    """The settings of each kind of document. Raises: ValueError, also for what is one setting of the whole mix."""
    for i, changes in enumerate(config.variants):
        for key in ("fraction", "variants"):
            if key in changes:
                raise ValueError(f"{name}.variants[{i}].{key}={changes[key]!r}: set it in {name}, for all variants")
    alone = replace(config, variants=[])
    return [merge_needles(alone, changes, f"{name}.variants[{i}]") for i, changes in enumerate(config.variants)] or [
        alone
    ]


@cache
def words() -> tuple[list[str], list[str]]:
    """Adjectives and nouns of the package wonderwords, sorted."""
    from wonderwords import RandomWord

    lists = RandomWord()
    adjectives = lists.filter(include_categories=["adjective"])
    nouns = lists.filter(include_categories=["noun"])
    return sorted(set(adjectives)), sorted(set(nouns))


def kind_of(config: NeedleConfig) -> str:
    """What a value is called in the singular."""
    return "number" if config.value_type in ("hex", "serial") else config.value_type


def draw_key(rng: np.random.Generator, config: NeedleConfig) -> str:
    """A random key of the configured type."""
    if config.key_type == "words":
        adjectives, nouns = words()
        return f"{_one(rng, adjectives)}-{_one(rng, nouns)}"
    if config.key_type == "nouns":
        return f"{_one(rng, words()[1])} {_one(rng, words()[1])}"
    if config.key_type == "compound":
        return f"{_one(rng, words()[1])}-{_one(rng, words()[1])}"
    if config.key_type == "name":
        return f"{_name(rng)} {_name(rng)}"
    if config.key_type == "code":
        return f"{_one(rng, LETTERS)}{_one(rng, LETTERS)}-{_number(rng, 4)}"
    return _number(rng, config.digits) if config.key_type == "number" else _uuid(rng)


def draw_value(rng: np.random.Generator, config: NeedleConfig) -> str:
    """A random value of the configured type."""
    if config.value_type == "number":
        return _number(rng, config.digits)
    if config.value_type in ("hex", "serial"):
        figures = "".join("0123456789abcdef"[i] for i in rng.integers(16, size=config.digits))
        size = 4 if config.value_type == "serial" else config.digits
        return "-".join(figures[i : i + size] for i in range(0, config.digits, size))
    if config.value_type == "word":
        return _one(rng, words()[1])
    return _uuid(rng)


def wordings(config: NeedleConfig, seed: int, count: int) -> Iterator[str]:
    """The templates filled in with random keys, as text for training a tokenizer."""
    rng = np.random.default_rng([seed, 3])
    kind = kind_of(config)
    for _ in range(count):
        one = choose_wording(rng, config)
        parts = {"key": draw_key(rng, config), "value": draw_value(rng, config), "type": kind, "types": kind + "s"}
        yield "\n".join([config.noise, *(getattr(one, label).format(**parts) for label in TEMPLATES[:-1])])


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[rng.integers(len(choices))]


def _name(rng: np.random.Generator) -> str:
    return _one(rng, HEADS) + "".join(_one(rng, TAILS) for _ in range(rng.integers(1, 3)))


def _number(rng: np.random.Generator, digits: int) -> str:
    if digits <= 18:
        return str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    return str(rng.integers(1, 10)) + "".join(map(str, rng.integers(10, size=digits - 1).tolist()))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def listed(keys: list[str]) -> str:
    """Keys as they are named in a question."""
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
