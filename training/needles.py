"""Needle documents for training: facts hidden in a haystack, and questions about them at the end.

Every document is a function of (seed, stage, index), so that resuming and sharding change nothing. Documents are put
together from token ids; pieces meet only where a tokenizer splits anyway (after a line feed, before a space), so
their ids are those of the whole text.
"""

from dataclasses import replace
from functools import cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from training.rows import IGNORED, Row, join_pieces
from training.store import TokenStore
from training.wording import NeedleConfig, check_needles, choose_wording, draw_key, draw_value, kind_of, listed

Fact = tuple[str, list[str]]


class NeedleMaker:
    """Makes needle rows for one stage of the training.

    stores, weights: tokenised text for the haystack `text`, and the shares to draw it with; the list of stores may
        be filled after construction.
    Raises: ValueError if a document of `row_length` tokens (or config.length) can't hold the least that is asked.
    """

    def __init__(
        self,
        config: NeedleConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        row_length: int,
        seed: int,
        stage: int = 0,
        stores: list[TokenStore] | None = None,
        weights: list[float] | None = None,
        add_bos: bool = False,
        name: str = "needles",
    ) -> None:
        check_needles(config, name)
        if "text" in config.haystacks and not weights:
            raise ValueError(
                f"{name}.haystacks holds 'text' but no text source is kept in the cache: add one with streaming "
                "off, or use noise"
            )
        self.config, self.tokenizer, self.row_length = config, tokenizer, row_length
        self.seed, self.stage = seed, stage
        self.stores = stores if stores is not None else []
        self.shares = np.asarray(weights or [], float)
        self.bos = [tokenizer.bos_token_id] if add_bos else []
        self.eos = tokenizer.eos_token_id
        self.many = config.queries * config.values > 1
        kind = kind_of(config)
        self.names = {"type": kind, "types": kind + "s"}
        self.noise = self._noise_lines()
        self.heads: dict[str, list[int]] = {}
        self.sentence_end, self.word_start = _token_shapes(tokenizer) if "text" in config.haystacks else (None, None)
        self.least = self._check_room(name)

    def row(self, index: int) -> Row:
        """Row `index` of this stage: `row_length` tokens of one or more needle documents."""
        rng = np.random.default_rng([self.seed, self.stage, index])
        pieces, space = [], self.row_length
        while space >= (self.least if pieces else 1):
            length = space
            if self.config.length is not None:
                length = min(space, int(rng.integers(self.config.length[0], self.config.length[1] + 1)))
            if space - length < self.least:
                length = space
            # a draw of unusually long words may not fit a tight row: draw again
            tries = (self._document(rng, length) for _ in range(16))
            piece = next((one for one in tries if one is not None), None)
            if piece is None:
                break
            pieces.append(piece)
            space -= len(piece[0])
            if self.config.length is None:
                break
        return join_pieces(pieces, self.row_length, self.eos)

    def _document(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(tokens, labels) of a document of at most `length` tokens; None if not even the least fits."""
        c = choose_wording(rng, self.config)
        haystack = c.haystacks[rng.integers(len(c.haystacks))]
        facts, groups = self._draw(rng, c)
        inline = haystack == "text"
        head = self._head(c)
        needles = self._encode_facts(c, facts, inline)
        exchanges = self._encode_exchanges(c, groups, inline)
        room = length - len(self.bos) - len(head) - 1
        room -= sum(map(_size, needles.values())) + sum(map(_size, exchanges))
        while room < 0:
            # the last fact that nobody asks about goes first, then the last question
            asked_keys = {key for group in groups for key, _ in group}
            spare = next((key for key in reversed(needles) if key not in asked_keys), None)
            if spare is not None:
                room += _size(needles.pop(spare))
            elif len(groups) > 1:
                groups.pop()
                room += _size(exchanges.pop())
            else:
                return None
        lines = [line for of_fact in needles.values() for line in of_fact]
        body = self._body(rng, c, haystack, lines, room, set(needles))
        asked = [part for exchange in exchanges for part in exchange]
        tokens = np.concatenate([self.bos, head, body, *asked, [self.eos]]).astype(np.int64)
        labels = tokens.copy()
        if c.loss_on == "answer":
            labels[:] = IGNORED
            ends = len(tokens) - 1 - sum(map(len, asked)) + np.cumsum([len(part) for part in asked])
            for low, high in zip(ends[::2], ends[1::2], strict=True):
                labels[low:high] = tokens[low:high]
            labels[-1] = self.eos
        return tokens, labels

    def _draw(self, rng: np.random.Generator, c: NeedleConfig) -> tuple[list[Fact], list[list[Fact]]]:
        """Facts (key, values), and the groups of facts that are asked about."""
        count = int(rng.integers(c.keys[0], c.keys[1] + 1))
        keys: dict[str, None] = {}
        for _ in range(100 * count):
            keys[draw_key(rng, c)] = None
            if len(keys) == count:
                break
        facts = [(key, [draw_value(rng, c) for _ in range(c.values)]) for key in keys]
        questions = min(int(rng.integers(c.questions[0], c.questions[1] + 1)), len(facts) // c.queries)
        order = rng.permutation(len(facts))
        groups = [[facts[i] for i in order[q * c.queries : (q + 1) * c.queries]] for q in range(questions)]
        return facts, groups

    def _fill(self, c: NeedleConfig, label: str, **parts: str) -> str:
        template = getattr(c, label + "_many" if self.many and label != "needle" else label)
        return template.format(**parts, **self.names)

    def _head(self, c: NeedleConfig) -> list[int]:
        """Ids of the preamble; there are few, so each is encoded once."""
        text = self._fill(c, "preamble") + "\n"
        if text not in self.heads:
            self.heads[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.heads[text]

    def _encode(self, texts: list[str], anchor: str) -> list[list[int]]:
        """Ids of texts as they stand in running text: each begins with `anchor`, whose own ids are cut off."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            ids = [e.ids for e in backend.encode_batch_fast([*texts, anchor], add_special_tokens=False)]
        else:
            ids = self.tokenizer([*texts, anchor], add_special_tokens=False)["input_ids"]
        *ids, cut = ids
        if any(one[: len(cut)] != cut for one in ids):
            raise ValueError(
                f"needles: the tokenizer joins {anchor!r} with what follows, so documents can't be put together from "
                "pieces: use another tokenizer"
            )
        return [one[len(cut) :] for one in ids]

    def _encode_needles(self, c: NeedleConfig, facts: list[tuple[str, str]], inline: bool) -> list[list[int]]:
        texts = [c.needle.format(key=key, value=value, **self.names) for key, value in facts]
        if inline:
            return self._encode(["a " + text for text in texts], "a")
        return self._encode(["\n" + text + "\n" for text in texts], "\n")

    def _encode_facts(self, c: NeedleConfig, facts: list[Fact], inline: bool) -> dict[str, list[list[int]]]:
        """Ids of the needles of each key, one for each of its values."""
        ids = iter(self._encode_needles(c, [(key, value) for key, values in facts for value in values], inline))
        return {key: [next(ids) for _ in values] for key, values in facts}

    def _encode_exchanges(self, c: NeedleConfig, groups: list[list[Fact]], inline: bool) -> list[list[list[int]]]:
        """Ids of each question and of its answer."""
        questions, answers = [], []
        for q, group in enumerate(groups):
            key = listed([k for k, _ in group])
            # after running text the first question needs the line feed that a haystack of lines ends with already
            start = "a\n" if inline or q else "\n"
            questions.append(f"{start}{self._fill(c, 'question', key=key)} {self._fill(c, 'prefix', key=key)}")
            answers.append("a " + c.answer.format(value=", ".join(v for _, vs in group for v in vs), **self.names))
        first = self._encode(questions[:1], "a" if inline else "\n")
        ids = self._encode([*questions[1:], *answers], "a")
        return [list(pair) for pair in zip(first + ids[: len(groups) - 1], ids[len(groups) - 1 :], strict=True)]

    def _noise_lines(self) -> list[list[int]]:
        """Ids of a line with the first 1, 2, … sentences of the noise."""
        sentences = [s for s in self.config.noise.replace(". ", ".\0").split("\0") if s]
        lines = ["\n" + " ".join(sentences[: n + 1]) + "\n" for n in range(len(sentences))]
        return self._encode(lines, "\n") if lines else []

    def _body(
        self,
        rng: np.random.Generator,
        c: NeedleConfig,
        haystack: str,
        needles: list[list[int]],
        room: int,
        used: set[str],
    ) -> np.ndarray:
        """The haystack with the needles in it: at most `room` tokens besides the needles."""
        if haystack == "text":
            return self._text_body(rng, needles, room)
        if haystack == "needles":
            lines, room = self._more_needles(rng, c, room, used)
        else:
            lines, room = self._noise(room)
        fitting = [line for line in self.noise if len(line) <= room]
        if fitting:
            lines.append(fitting[-1])
        places = np.sort(rng.integers(0, len(lines) + 1, size=len(needles)))
        order = rng.permutation(len(needles))
        for shift, (place, which) in enumerate(zip(places, order, strict=True)):
            lines.insert(int(place) + shift, needles[which])
        return np.asarray([one for line in lines for one in line], dtype=np.int64)

    def _noise(self, room: int) -> tuple[list[list[int]], int]:
        if not self.noise:
            return [], room
        full, room = divmod(room, len(self.noise[-1]))
        return [self.noise[-1]] * full, room

    def _more_needles(
        self, rng: np.random.Generator, c: NeedleConfig, room: int, used: set[str]
    ) -> tuple[list[list[int]], int]:
        lines: list[list[int]] = []
        taken = 0  # draws in a row of keys that the document has already
        while taken < 100:
            size = len(lines[0]) if lines else len(self.noise[-1]) if self.noise else 16
            facts = [(draw_key(rng, c), draw_value(rng, c)) for _ in range(room // size + 1)]
            for (key, _), line in zip(facts, self._encode_needles(c, facts, inline=False), strict=True):
                if key in used:
                    taken += 1
                    continue
                if len(line) > room:
                    return lines, room
                taken = 0
                used.add(key)
                lines.append(line)
                room -= len(line)
        # short numbers are soon all in use: the rest is noise
        noise, room = self._noise(room)
        return lines + noise, room

    def _text_body(self, rng: np.random.Generator, needles: list[list[int]], room: int) -> np.ndarray:
        text = self._text(rng, room)
        after = np.append(self.word_start[text[1:]], True) if len(text) else np.zeros(0, bool)
        places = np.flatnonzero(self.sentence_end[text] & after) + 1
        if not len(places):
            places = np.flatnonzero(self.word_start[text])
        if not len(places):
            places = np.asarray([len(text)])
        chosen = np.sort(places[rng.integers(0, len(places), size=len(needles))])
        order = rng.permutation(len(needles))
        parts, last = [], 0
        for place, which in zip(chosen, order, strict=True):
            parts += [text[last:place], np.asarray(needles[which], np.int64)]
            last = place
        return np.concatenate([*parts, text[last:]])

    def _text(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` tokens of text from a random place, beginning at a sentence where one begins nearby."""
        store = self.stores[rng.choice(len(self.stores), p=self.shares / self.shares.sum())]
        special = [self.eos, *self.bos]
        start, slack = int(rng.integers(store.total)), min(128, store.total)
        text = _cyclic(store.tokens, start, slack + count + (slack + count) // 8)
        text = text[~np.isin(text, special)]
        begin = np.flatnonzero(self.sentence_end[text[:slack]])
        text = text[(begin[0] + 1) if len(begin) else 0 :]
        while len(text) < count:
            more = store.tokens[: count - len(text) + 16].astype(np.int64)
            text = np.concatenate([text, more[~np.isin(more, special)]])
        return text[:count]

    def _check_room(self, name: str) -> int:
        """The tokens that any document with the least keys and questions takes, from 64 draws; checks they fit."""
        full = self.config
        least = replace(full, keys=[full.keys[0]] * 2, questions=[full.questions[0]] * 2)
        rng, need = np.random.default_rng(0), 0
        for _ in range(64):
            c = choose_wording(rng, least)
            facts, groups = self._draw(rng, c)
            needles = self._encode_facts(c, facts, inline=False)
            sizes = [*map(_size, needles.values()), *map(_size, self._encode_exchanges(c, groups, inline=True))]
            need = max(need, len(self.bos) + len(self._head(c)) + sum(sizes) + 1)
        length = min(self.row_length, full.length[0]) if full.length is not None else self.row_length
        if need > length:
            field_name = f"{name}.length" if length < self.row_length else "sequence_length"
            raise ValueError(
                f"{field_name}={length} tokens can't hold a needle document, which takes {need} with "
                f"{least.keys[0]} keys and {least.questions[0]} questions: raise it, or lower keys, questions or "
                "digits, or shorten the templates"
            )
        return need


def _size(parts: list[list[int]]) -> int:
    return sum(map(len, parts))


def _cyclic(tokens: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` tokens (at most one round) from `start` on, going on at the beginning."""
    count = min(count, len(tokens))
    piece = tokens[start : start + count].astype(np.int64)
    return np.concatenate([piece, tokens[: count - len(piece)].astype(np.int64)])


@cache
def _token_shapes(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Two bool arrays over the vocabulary: ends a sentence; begins with white space."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ends = np.asarray([p is not None and p.endswith((".", "!", "?")) for p in pieces])
    starts = np.asarray([p is not None and p.startswith(("Ġ", "▁", "Ċ", " ", "\n", "<0x0A>")) for p in pieces])
    return ends, starts
