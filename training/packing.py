"""Rows that are packed from the documents of a token store, in an order that the seed decides."""

import numpy as np

from training.rows import Row, join_pieces
from training.store import TokenStore


class PackedRows:
    """Random access to the rows of one store at one row length: endless epochs, each in its own order."""

    def __init__(
        self, store: TokenStore, length: int, *, seed: list[int], shuffle: bool, split: bool, pad: int, name: str
    ) -> None:
        self.store, self.length, self.seed = store, length, seed
        self.shuffle, self.split, self.pad = shuffle, split, pad
        self.epoch = -1
        self.starts = np.concatenate([[0], store.ends[:-1]])
        self.lengths = store.ends - self.starts
        if split:
            self.count = store.total // length
        else:
            self.bounds = _fill_rows(self.lengths, length)
            self.count = len(self.bounds)
        if self.count == 0:
            raise ValueError(
                f"{name} holds {store.total} tokens, less than one row of {length}: lower the sequence_length, "
                "set data.split_documents=false, or add text"
            )

    def row(self, index: int) -> Row:
        """Row `index` of the endless sequence."""
        epoch, place = divmod(index, self.count)
        if epoch != self.epoch:
            self._start(epoch)
        place = int(self.rows[place])
        pieces = self._stream(place * self.length + self.offset) if self.split else self._whole(place)
        return join_pieces([(p, p) for p in pieces], self.length, self.pad)

    def _start(self, epoch: int) -> None:
        rng = np.random.default_rng([*self.seed, epoch])
        documents = len(self.lengths)
        self.rows = rng.permutation(self.count) if self.shuffle else np.arange(self.count)
        self.offset = 0
        if self.split:
            self.order = rng.permutation(documents) if self.shuffle else np.arange(documents)
            self.cuts = np.concatenate([[0], np.cumsum(self.lengths[self.order])])
            # rows begin elsewhere in each epoch, so that a document is not always cut at the same places
            slack = self.store.total - self.count * self.length
            self.offset = int(rng.integers(slack + 1)) if self.shuffle else 0
        self.epoch = epoch

    def _stream(self, start: int) -> list[np.ndarray]:
        pieces, left = [], self.length
        which = int(np.searchsorted(self.cuts, start, side="right")) - 1
        while left:
            document, skip = self.order[which], start - self.cuts[which]
            take = int(min(left, self.lengths[document] - skip))
            begin = int(self.starts[document] + skip)
            if take:
                pieces.append(self.store.tokens[begin : begin + take].astype(np.int64))
            left, start, which = left - take, start + take, which + 1
        return pieces

    def _whole(self, place: int) -> list[np.ndarray]:
        return [self.store.tokens[a:b].astype(np.int64) for a, b in self.bounds[place]]


def _fill_rows(lengths: np.ndarray, length: int) -> list[list[tuple[int, int]]]:
    """Token ranges of each row when documents stay whole: in order, a new row where the next one doesn't fit."""
    rows: list[list[tuple[int, int]]] = []
    left, start = 0, 0
    for size in lengths.tolist():
        for low in range(start, start + size, length):
            high = min(low + length, start + size)
            if high - low > left:
                rows.append([])
                left = length
            rows[-1].append((low, high))
            left -= high - low
        start += size
    return rows
