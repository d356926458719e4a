"""Text that is tokenised while it is read, with a small cursor that continues it exactly."""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from training.rows import Row, join_pieces
from training.sources import SourceConfig, iter_documents
from training.store import tokenize

ENCODED_AT_ONCE = 16


class TokenStream:
    """Packed rows of one source, endless. Rank r of n reads the documents r, r + n, r + 2n, …

    Documents are shuffled within blocks of `buffer`. The cursor names the epoch, the block's first document, the
    place in the block and the token in that document; seeking reads up to the block again without tokenising.
    """

    def __init__(
        self,
        source: SourceConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        seed: list[int],
        rank: int = 0,
        world: int = 1,
        buffer: int = 1000,
        add_bos: bool = False,
        add_eos: bool = True,
        split: bool = True,
    ) -> None:
        self.source, self.tokenizer, self.name, self.seed = source, tokenizer, name, seed
        self.rank, self.world, self.buffer = rank, world, buffer
        self.add_bos, self.add_eos, self.split = add_bos, add_eos, split
        self.seek({"epoch": 0, "block": 0, "place": 0, "token": 0})

    def cursor(self) -> dict[str, int]:
        """Where the next row begins, as plain integers."""
        return {"epoch": self.epoch, "block": self.block, "place": self.place, "token": self.token}

    def seek(self, cursor: dict[str, Any]) -> None:
        """Continue from a cursor."""
        self.epoch, self.block = cursor["epoch"], cursor["block"]
        self.place, self.token = cursor["place"], cursor["token"]
        self.documents: Iterator[str] | None = None
        self.texts: list[str] | None = None
        self.encoded: dict[int, np.ndarray] = {}

    def row(self, length: int) -> Row:
        """The next `length` tokens.

        Raises: ValueError if this rank's share of the source holds no document.
        """
        pieces, left = [], length
        while left:
            document = self._current()
            take = min(left, len(document) - self.token)
            whole = min(len(document), length)
            if not self.split and self.token == 0 and pieces and whole > left:
                break
            pieces.append(document[self.token : self.token + take])
            left -= take
            self.token += take
            if self.token == len(document):
                self.place, self.token = self.place + 1, 0
        return join_pieces([(p, p) for p in pieces], length, self.tokenizer.eos_token_id)

    def _current(self) -> np.ndarray:
        while True:
            if self.texts is None:
                self._read_block()
            if self.place < len(self.texts):
                return self._encode()
            self.block, self.place, self.token = self.block + len(self.texts), 0, 0
            self.texts = None

    def _read_block(self) -> None:
        for attempt in count():
            if self.documents is None:
                own = islice(iter_documents(self.source, self.name), self.rank, None, self.world)
                self.documents = islice(own, self.block, None)
            texts = list(islice(self.documents, self.buffer))
            if texts:
                break
            if attempt or (self.epoch == 0 and self.block == 0):
                raise ValueError(
                    f"{self.name} ({self.source.path or self.source.hub}) holds no text for rank {self.rank} of "
                    f"{self.world}: add documents"
                )
            self.epoch, self.block, self.documents = self.epoch + 1, 0, None
        order = np.random.default_rng([*self.seed, self.epoch, self.block]).permutation(len(texts))
        self.texts = [texts[i] for i in order]
        self.encoded = {}

    def _encode(self) -> np.ndarray:
        if self.place not in self.encoded:
            texts = self.texts[self.place : self.place + ENCODED_AT_ONCE]
            ids = tokenize(texts, self.tokenizer, self.add_bos, self.add_eos)
            self.encoded = {self.place + i: np.asarray(one, np.int64) for i, one in enumerate(ids)}
        return self.encoded[self.place]
