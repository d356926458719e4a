"""Rows of packed documents, and the batch a model takes: one [1, N] sequence with document boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

IGNORED = -100


@dataclass
class Row:
    """One row of exactly T tokens.

    tokens: int64 [T]; labels: int64 [T], the token itself or -100; ends: int64 [M], index one past each document;
    cursors: where the streamed sources stand after this row, None if it isn't a streamed one.
    """

    tokens: np.ndarray
    labels: np.ndarray
    ends: np.ndarray
    cursors: dict[str, dict[str, int]] | None = None


def join_pieces(pieces: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad: int) -> Row:
    """A row out of (tokens, labels) documents, filled up to `length` with a document of `pad` that has no labels."""
    pieces = list(pieces)
    space = length - sum(len(tokens) for tokens, _ in pieces)
    assert space >= 0, "the documents of a row are chosen to fit"
    if space:
        pieces.append((np.full(space, pad, np.int64), np.full(space, IGNORED, np.int64)))
    tokens = np.concatenate([t for t, _ in pieces]).astype(np.int64)
    labels = np.concatenate([y for _, y in pieces]).astype(np.int64)
    return Row(tokens, labels, np.cumsum([len(t) for t, _ in pieces], dtype=np.int64))


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """Join rows to one packed sequence; every row boundary is a document boundary too.

    Returns: input_ids [1, N] int64, labels [1, N] int64, cu_seqlens [M + 1] int32, and for streamed rows cursors.
    """
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)])
    ends = np.concatenate([row.ends + start for row, start in zip(rows, starts, strict=False)])
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.concatenate([row.tokens for row in rows]))[None],
        "labels": torch.from_numpy(np.concatenate([row.labels for row in rows]))[None],
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
    }
    streamed = [row.cursors for row in rows if row.cursors is not None]
    if streamed:
        batch["cursors"] = streamed[-1]
    return batch
