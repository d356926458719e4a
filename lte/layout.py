"""Where the real tokens of a batch lie.

Shapes: B batch, T tokens of a row, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Layout:
    """Documents and padding of a [B, T] batch.

    Without either field every row holds T tokens of one document. At most one field is set.

    All layers of a forward pass are given the same layout, and what depends on nothing else is computed by the first
    one that asks (`once`). So neither the fields' tensors nor what the methods return may be changed in place.

    Attributes:
        cu_seqlens: [N + 1] integers, cumulative lengths of N packed documents; then B is 1, as in
            flash-linear-attention. Documents may be empty.
        lengths: [B] integers, the real tokens of each row, which lie at its left; what follows is padding.
            Cached chunks use this form, so that a row's new tokens follow its cached ones directly.
    """

    cu_seqlens: Tensor | None = None
    lengths: Tensor | None = None

    def __post_init__(self):
        assert self.cu_seqlens is None or self.lengths is None, "packed rows have no padding"
        # no field: a layout made by `replace` starts without it
        object.__setattr__(self, "_known", {})

    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """What `compute` gave when this layout was first asked for `key`.

        Args:
            key: a name and everything besides the layout that the result depends on.
        """
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens is not None

    def documents(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Index of each token's document in its row [B, T] (int64); -1 for padding."""
        return self.once(("documents", batch, length, device), lambda: self._documents(batch, length, device))

    def _documents(self, batch: int, length: int, device: torch.device) -> Tensor:
        index_T = torch.arange(length, device=device)
        if self.cu_seqlens is not None:
            ends_N = self.cu_seqlens[1:].to(device=device, dtype=torch.int64)
            return torch.searchsorted(ends_N, index_T, right=True)[None].expand(batch, length)
        if self.lengths is not None:
            return (index_T[None] >= self.lengths.to(device)[:, None]).to(torch.int64).neg()
        return torch.zeros(batch, length, dtype=torch.int64, device=device)

    def positions(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Position of each token in its document [B, T] (int64), from 0; -1 for padding."""
        return self.once(("positions", batch, length, device), lambda: self._positions(batch, length, device))

    def _positions(self, batch: int, length: int, device: torch.device) -> Tensor:
        index_BT = torch.arange(length, device=device)[None].expand(batch, length)
        if self.cu_seqlens is not None:
            starts_N = self.cu_seqlens[:-1].to(device=device, dtype=torch.int64)
            return index_BT - starts_N[self.documents(batch, length, device)]
        if self.lengths is not None:
            return index_BT.masked_fill(index_BT >= self.lengths.to(device)[:, None], -1)
        return index_BT

    def document_ends(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Row index one past the last token of each token's document [B, T] (int64); 0 for padding."""
        return self.once(("ends", batch, length, device), lambda: self._document_ends(batch, length, device))

    def _document_ends(self, batch: int, length: int, device: torch.device) -> Tensor:
        if self.cu_seqlens is not None:
            ends_N = self.cu_seqlens[1:].to(device=device, dtype=torch.int64)
            return ends_N[self.documents(batch, length, device)]
        if self.lengths is not None:
            ends_B1 = self.lengths.to(device=device, dtype=torch.int64)[:, None]
            real_BT = torch.arange(length, device=device)[None] < ends_B1
            return ends_B1.expand(batch, length) * real_BT
        return torch.full((batch, length), length, dtype=torch.int64, device=device)


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Reject boundaries that don't describe a packed batch.

    On CUDA the numbers are checked by the device, which is not waited for: wrong ones are a failed assertion there.

    Raises:
        ValueError: not a 1-D integer tensor from 0 to `length` that never falls, or a batch other than 1.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}: give an integer tensor [N + 1] of boundaries")
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be a 1-D integer tensor of at least two entries, got shape "
            f"{tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}"
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs documents into one row, but the batch has {batch} rows; reshape it to [1, B * T]"
        )
    if cu_seqlens.is_cuda:
        right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(right, f"cu_seqlens must rise from 0 to the row's length {length}")
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the row's length {length}, got {bounds[0]} … {bounds[-1]}")
