"""From left-padded (or otherwise padded) batches to the layouts of the mixers, and back.

Shapes: B batch, T columns, C channels, M real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lte.layout import Layout


def check_mask(mask: Tensor, batch: int, length: int, past: int) -> Tensor | None:
    """The mask of the new columns [B, T]; None where nothing is padding.

    Args:
        mask: [B, T], or [B, past + T] with the columns that a cache has seen.

    Raises:
        ValueError: another shape.
    """
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must be [{batch}, {length}] for the new tokens"
            + (f" or [{batch}, {past + length}] with the cached ones" if past else "")
        )
    mask = mask[:, -length:]
    return None if bool((mask != 0).all()) else mask != 0


def document_bounds(given: Mapping[str, object], mask: Tensor | None) -> Tensor | None:
    """cu_seqlens [N + 1] of packed documents in the names of transformers' DataCollatorWithFlattening.

    Args:
        given: `cu_seq_lens_q` [N + 1], or `position_ids` [1, T] that start at 0 with each document; the first may
            have begun before the row. With a mask, or rows that hold one document each, there is nothing to bound:
            None.

    Raises:
        ValueError: several rows with several documents each.
    """
    bounds = given.get("cu_seq_lens_q")
    if bounds is not None:
        return bounds.flatten().to(torch.int32)
    positions = given.get("position_ids")
    if positions is None or mask is not None:
        return None
    # a row may begin within a document
    starts = positions[:, 1:] == 0
    if len(positions) > 1:
        if bool(starts.any()):
            raise ValueError(
                f"position_ids {tuple(positions.shape)} start anew within rows: pack the documents into one row, or "
                "give one document a row"
            )
        return None
    first = 1 + starts[0].nonzero().flatten().to(torch.int32)
    if not len(first):
        return None
    return torch.cat([first.new_zeros(1), first, first.new_tensor([positions.shape[1]])])


def unpad(x_BTC: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Real tokens packed into one row [1, M, C], their cu_seqlens (a document a row), and the way back.

    The way back puts zeros where padding is. Raises: ValueError if all of it is padding.
    """
    batch, length = mask_BT.shape
    index_M = mask_BT.flatten().nonzero().squeeze(1)
    if not len(index_M):
        raise ValueError("attention_mask is zero everywhere: give at least one token that isn't padding")
    cu_seqlens = F.pad(mask_BT.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))

    def restore(y_1MC: Tensor) -> Tensor:
        flat = y_1MC.new_zeros(batch * length, y_1MC.shape[-1])
        return flat.index_copy(0, index_M, y_1MC[0]).view(batch, length, -1)

    return x_BTC.flatten(0, 1)[index_M][None], cu_seqlens, restore


def prepend(
    token_C: Tensor, x_BTC: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """The same token in front of every document: the longer rows, their cu_seqlens, and the way back.

    Args:
        cu_seqlens: [N + 1] boundaries of packed documents, then B is 1; None: every row is a document.
    """
    token_C = token_C.to(x_BTC.dtype)
    if cu_seqlens is None:
        return torch.cat([token_C.expand(len(x_BTC), 1, -1), x_BTC], 1), None, lambda y_BTC: y_BTC[:, 1:]
    tokens, documents = x_BTC.shape[1], len(cu_seqlens) - 1
    index_N1 = torch.arange(documents + 1, device=x_BTC.device)
    document_T = Layout(cu_seqlens=cu_seqlens).documents(1, tokens, x_BTC.device)[0]
    place_T = torch.arange(tokens, device=x_BTC.device) + document_T + 1
    longer_N1 = cu_seqlens.to(x_BTC.device) + index_N1.to(cu_seqlens.dtype)
    source = torch.full((tokens + documents,), tokens, device=x_BTC.device)  # the token, behind the row
    source[place_T] = torch.arange(tokens, device=x_BTC.device)
    longer = torch.cat([x_BTC[0], token_C[None]])[source][None]
    return longer, longer_N1, lambda y_BTC: y_BTC[:, place_T]


def compose(outer: Callable[[Tensor], Tensor], inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """First the inner, then the outer."""
    return lambda x: outer(inner(x))


@dataclass(frozen=True)
class LeftAligned:
    """A reordering of columns that puts each row's real tokens first, in their order.

    Attributes:
        order: [B, T] column that comes to each place.
        lengths: [B] real tokens.
    """

    order: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor) -> LeftAligned:
        """The reordering for a mask [B, T] of real tokens."""
        order = (~mask_BT).to(torch.int8).argsort(dim=1, stable=True)
        return cls(order, mask_BT.sum(1))

    def apply(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.gather(1, self.order[..., None].expand_as(x_BTC))

    def restore(self, x_BTC: Tensor) -> Tensor:
        return torch.empty_like(x_BTC).scatter_(1, self.order[..., None].expand_as(x_BTC), x_BTC)
