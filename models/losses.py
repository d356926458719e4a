"""The language-model loss: which token each column predicts, and the mean over a whole optimizer step.

Shapes: B batch, T tokens, V vocabulary, N documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops import IGNORE


def check_labels(labels: Tensor, tokens_BT: Tensor) -> None:
    """Raises: ValueError for labels that aren't an id for each token."""
    if labels.shape != tokens_BT.shape or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels {tuple(labels.shape)} in {labels.dtype} must be the ids themselves, "
            f"{tuple(tokens_BT.shape)} in int64; the shift is made here"
        )


def shift_labels(labels_BT: Tensor, mask_BT: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Target of each column: the next token of the same document, or IGNORE."""
    if mask_BT is not None:
        labels_BT = labels_BT.masked_fill(mask_BT[:, -labels_BT.shape[1] :] == 0, IGNORE)
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)
    if cu_seqlens is not None:
        # of an empty document at the front -1, the row's last place, which has no target anyway
        last = (cu_seqlens[1:].to(torch.int64) - 1) % labels_BT.shape[1]
        targets_BT = targets_BT.index_fill(1, last, IGNORE)
    elif mask_BT is not None:
        # padding to the left of a document doesn't predict its first token
        targets_BT = targets_BT.masked_fill(mask_BT[:, -labels_BT.shape[1] :] == 0, IGNORE)
    return targets_BT


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, chunk: int = 1024) -> Tensor:
    """Sum of the cross-entropies in nats (float32), a few tokens at a time: no float32 copy of all logits exists."""
    pieces = zip(logits_BTV.flatten(0, 1).split(chunk), targets_BT.flatten().split(chunk), strict=True)
    return torch.stack(
        [F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum") for logits, targets in pieces]
    ).sum()


def per_item(total: Tensor, targets_BT: Tensor, items: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """A summed loss per item (0 where there are none), and the share of the items that lies in this call."""
    count = (targets_BT != IGNORE).sum()
    if items is None:
        return total / count.clamp(min=1), torch.ones_like(total)
    items = items.to(total.device).clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
    return total / items, count / items
