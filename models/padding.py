"""From left-padded (or otherwise padded) batches to the layouts of the mixers, and back.

Shapes: B batch, T columns, C channels, M real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

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
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}: give a tensor [{batch}, {length}] of 0 and 1")
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must be [{batch}, {length}] for the new tokens"
            + (f" or [{batch}, {past + length}] with the cached ones" if past else "")
        )
    mask = mask[:, -length:]
    return None if bool((mask != 0).all()) else mask != 0


def check_ends(mask_BT: Tensor | None, length: int) -> None:
    """Raises: ValueError where a row's last `length` columns hold tokens and end in padding: what is predicted after
    the last column wouldn't follow from its text."""
    if mask_BT is None or not length:
        return
    new_BT = mask_BT[:, -length:] != 0
    wrong = (new_BT.any(1) & ~new_BT[:, -1]).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"attention_mask: row {wrong[0]} ends in padding, and the next token would follow that; pad at the left, "
            "as in tokenizer(texts, padding=True, padding_side='left')"
        )


BOUNDS = ("cu_seq_lens_q", "position_ids", "seq_idx")  # of DataCollatorWithFlattening
USUAL = (*BOUNDS, "cu_seq_lens_k", "output_attentions", "return_dict")  # of every step of a loop, so not searched for
NAMES = ("attention_mask", "cu_seqlens", "inputs_embeds", "labels", "past_key_values", *BOUNDS)


def check_names(given: Mapping[str, object]) -> None:
    """Look through the arguments of `forward` that the models don't have.

    transformers and what builds on it pass many to every model, which change nothing here. One that is nearly the
    name of another is misspelt: documents would run into each other, say, and nobody would be told.

    Raises:
        ValueError: a misspelt argument, or one that can't be obeyed.
    """
    if given.get("output_attentions"):
        raise ValueError("output_attentions=True: attention weights are never formed; leave it out")
    for name, value in given.items():
        if value is None or name in USUAL:
            continue
        if near := get_close_matches(name, NAMES, 1, cutoff=0.9):
            raise ValueError(f"{name}: the model has no such argument; is {near[0]} meant?")


def document_bounds(given: Mapping[str, object], mask: Tensor | None) -> Tensor | None:
    """cu_seqlens [N + 1] of packed documents in the names of transformers' DataCollatorWithFlattening.

    Args:
        given: `cu_seq_lens_q` [N + 1]; or `position_ids` [1, T] that start at 0 with each document, of which the
            first may have begun before the row; or `seq_idx` [1, T], the number of a token's document. With a mask,
            or rows that hold one document each, there is nothing to bound: None.

    Raises:
        ValueError: several rows with several documents each.
    """
    bounds = given.get("cu_seq_lens_q")
    if bounds is not None:
        return bounds.flatten().to(torch.int32)
    name = next((name for name in ("position_ids", "seq_idx") if given.get(name) is not None), None)
    if name is None or mask is not None:
        return None
    numbers = given[name]
    if numbers.ndim != 2:
        raise ValueError(f"{name} {tuple(numbers.shape)} must be [B, T], a number for each token")
    starts = numbers[:, 1:] == 0 if name == "position_ids" else numbers[:, 1:] != numbers[:, :-1]
    if len(numbers) > 1:
        if bool(starts.any()):
            raise ValueError(
                f"{name} {tuple(numbers.shape)} start anew within rows: pack the documents into one row, or give one "
                "document a row"
            )
        return None
    first = 1 + starts[0].nonzero().flatten().to(torch.int32)
    if not len(first):
        return None
    return torch.cat([first.new_zeros(1), first, first.new_tensor([numbers.shape[1]])])


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
