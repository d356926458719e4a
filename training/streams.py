"""Text that is tokenised while it is read, in lanes, with a small cursor for each that continues it exactly.

Lane l of n holds the documents l, l + n, l + 2n, … Their number belongs to the run and not to the ranks that share
them, so that the rows are the same on any number of ranks.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from training.rows import Row, join_pieces
from training.sources import SourceConfig, iter_documents
from training.store import tokenize

ENCODED_AT_ONCE = 16


class LaneReader:
    """Deals the documents of one source to the lanes of one rank, reading each of them once an epoch.

    Args:
        lanes: those of this rank, out of `total`.
        name: where the source stands in the configuration, for messages.
    """

    def __init__(self, source: SourceConfig, name: str, lanes: Iterable[int], total: int) -> None:
        self.source, self.name, self.total = source, name, total
        self.at = dict.fromkeys(lanes, (0, 0))  # epoch, and number of the lane's next document in it
        self.passes: dict[int, _Pass] = {}

    def seek(self, lane: int, epoch: int, number: int) -> None:
        """Let a lane go on with document `number` of its own in an epoch."""
        self.at[lane] = (epoch, number)
        self.passes.clear()

    def take(self, lane: int, most: int) -> list[str]:
        """The next documents of a lane, fewer than `most` where its epoch ends."""
        epoch, number = self.at[lane]
        if epoch not in self.passes:
            first = {one: begin if at == epoch else 0 for one, (at, begin) in self.at.items() if at <= epoch}
            self.passes[epoch] = _Pass(iter_documents(self.source, self.name), first, self.total)
        texts = self.passes[epoch].take(lane, most)
        self.at[lane] = (epoch, number + len(texts))
        return texts

    def next_epoch(self, lane: int) -> None:
        """Let a lane begin again; a reading that no lane is in any more is dropped."""
        self.at[lane] = (self.at[lane][0] + 1, 0)
        oldest = min(epoch for epoch, _ in self.at.values())
        self.passes = {epoch: reading for epoch, reading in self.passes.items() if epoch >= oldest}


class _Pass:
    """One reading of a source: what was read and its lane has not yet taken waits in a queue."""

    def __init__(self, documents: Iterator[str], first: dict[int, int], total: int) -> None:
        self.documents, self.first, self.total = enumerate(documents), first, total
        self.queues: dict[int, deque[str]] = {lane: deque() for lane in first}

    def take(self, lane: int, most: int) -> list[str]:
        queue = self.queues[lane]
        while len(queue) < most:
            index, text = next(self.documents, (None, ""))
            if index is None:
                break
            number, owner = divmod(index, self.total)
            if owner in self.queues and number >= self.first[owner]:
                self.queues[owner].append(text)
        return [queue.popleft() for _ in range(min(most, len(queue)))]


class TokenStream:
    """Packed rows of one lane of a source, endless.

    Documents are shuffled within blocks of `buffer`. The cursor names the epoch, the block's first document, the
    place in the block and the token in that document; seeking reads up to the block again without tokenising.
    """

    def __init__(
        self,
        reader: LaneReader,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: list[int],
        lane: int = 0,
        buffer: int = 1000,
        add_bos: bool = False,
        add_eos: bool = True,
        split: bool = True,
    ) -> None:
        self.reader, self.tokenizer, self.seed = reader, tokenizer, seed
        self.lane, self.buffer = lane, buffer
        self.add_bos, self.add_eos, self.split = add_bos, add_eos, split
        self.seek({"epoch": 0, "block": 0, "place": 0, "token": 0})

    def cursor(self) -> dict[str, int]:
        """Where the next row begins, as plain integers."""
        return {"epoch": self.epoch, "block": self.block, "place": self.place, "token": self.token}

    def seek(self, cursor: dict[str, Any]) -> None:
        """Continue from a cursor."""
        self.epoch, self.block = cursor["epoch"], cursor["block"]
        self.place, self.token = cursor["place"], cursor["token"]
        self.reader.seek(self.lane, self.epoch, self.block)
        self.texts: list[str] | None = None
        self.encoded: dict[int, np.ndarray] = {}

    def row(self, length: int) -> Row:
        """The next `length` tokens.

        Raises: ValueError if this lane of the source holds no document.
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
            texts = self.reader.take(self.lane, self.buffer)
            if texts:
                break
            if attempt or (self.epoch == 0 and self.block == 0):
                source, name, lanes = self.reader.source, self.reader.name, self.reader.total
                raise ValueError(
                    f"{name} ({source.path or source.hub}) holds no text for lane {self.lane} of {lanes}: add "
                    "documents, or lower data.lanes"
                )
            self.epoch, self.block = self.epoch + 1, 0
            self.reader.next_epoch(self.lane)
        order = np.random.default_rng([*self.seed, self.epoch, self.block]).permutation(len(texts))
        self.texts = [texts[i] for i in order]
        self.encoded = {}

    def _encode(self) -> np.ndarray:
        if self.place not in self.encoded:
            texts = self.texts[self.place : self.place + ENCODED_AT_ONCE]
            ids = tokenize(texts, self.tokenizer, self.add_bos, self.add_eos)
            self.encoded = {self.place + i: np.asarray(one, np.int64) for i, one in enumerate(ids)}
        return self.encoded[self.place]
