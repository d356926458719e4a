"""From left-padded (or otherwise padded) batches to the layouts of the mixers, and back.

Shapes: B batch, T columns, C channels, M real tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def unpad(x_BTC: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Real tokens packed into one row [1, M, C], their cu_seqlens (a document a row), and the way back.

    The way back puts zeros where padding is.
    """
    batch, length = mask_BT.shape
    index_M = mask_BT.flatten().nonzero().squeeze(1)
    cu_seqlens = F.pad(mask_BT.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))

    def restore(y_1MC: Tensor) -> Tensor:
        flat = y_1MC.new_zeros(batch * length, y_1MC.shape[-1])
        return flat.index_copy(0, index_M, y_1MC[0]).view(batch, length, -1)

    return x_BTC.flatten(0, 1)[index_M][None], cu_seqlens, restore


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
