"""The cache of streamed decoders, and the attention that reads it (arXiv 2309.17453).

Shapes: B batch, T tokens, N query heads, H KV heads, D head dimension, S = sinks + window slots, K keys (S, or
cached and new ones), R rotary channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from models.streaming_architectures import Alibi, Rotary, rotate

PIECE = 256  # tokens of a long input that go through the model at once


class StreamingCache(Cache):
    """Keys and values of sinks and window, for all layers; made by `stream`.

    Memory is taken at the first token and stays where it is. Slots: [sinks | ring of the window].

    Attributes:
        sinks, window: the rule, in tokens.
        columns: columns of the batch seen so far, padding included (what transformers calls the sequence length).
        seen: [B] real tokens of each row so far (int64); None before the first.
        keys, values: [B, H, S, D] a layer; keys unrotated.
    """

    def __init__(self, model: PreTrainedModel, sinks: int, window: int, encoding: Rotary | Alibi, layers: int):
        super().__init__(layers=[])
        self.config = model.config
        self.sinks, self.window, self.encoding = sinks, window, encoding
        self.columns = 0
        self.seen: Tensor | None = None
        self.table: tuple[Tensor, Tensor] | Tensor | None = None
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All memory that was taken, without the table of places."""
        return tuple(x for x in (self.seen, *self.keys, *self.values) if x is not None)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def start(self, batch: int, device: torch.device) -> None:
        """Make ready for `batch` rows; later calls only check them.

        Raises:
            ValueError: another number of rows than before.
        """
        if self.seen is None:
            with torch.inference_mode(False):  # else later calls outside of that mode couldn't write
                self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
                self.table = self.encoding.table(self.slots + PIECE, device)
        elif len(self.seen) != batch:
            raise ValueError(
                f"the cache holds {len(self.seen)} rows and the input has {batch}; use a new cache, or the same rows"
            )

    def layer(self, index: int, k_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of a layer, taken at its first token.

        Raises:
            ValueError: keys of another dtype than before.
        """
        if self.keys[index] is None:
            with torch.inference_mode(False):
                self.take(index, k_BHTD)
        elif self.keys[index].dtype != k_BHTD.dtype:
            raise ValueError(
                f"the cache holds {self.keys[index].dtype} and the model now gives {k_BHTD.dtype}; keep one dtype "
                "(autocast too), or start a new cache"
            )
        return self.keys[index], self.values[index]

    def take(self, index: int, k_BHTD: Tensor) -> None:
        """Memory of a layer, for keys of this shape."""
        batch, heads, _, dim = k_BHTD.shape
        self.keys[index] = k_BHTD.new_zeros(batch, heads, self.slots, dim)
        self.values[index] = k_BHTD.new_zeros(batch, heads, self.slots, dim)

    def step(self, real_BT: Tensor | None, length: int, earlier: Sequence) -> StreamingStep:
        """The next `length` columns, on their way through the layers.

        Args:
            real_BT: which of them are tokens; None: all.
            earlier: outputs of the pieces before, which belong to the same call of the model.
        """
        plan = plan_token(self, real_BT) if length == 1 else plan_piece(self, real_BT, length)
        return StreamingStep(self, plan, length if real_BT is None else real_BT.sum(1), length, earlier)

    def slot_positions(self, seen_B: Tensor) -> Tensor:
        """Text position of the token in each slot once `seen_B` tokens were read [B, S]; -1 for an empty slot."""
        slot_S = torch.arange(self.slots, device=seen_B.device)
        last_B1 = seen_B[:, None] - 1
        newest = last_B1 - (last_B1 - slot_S) % self.window
        position = torch.where(slot_S < self.sinks, slot_S, newest)
        return torch.where((position >= slot_S) & (position <= last_B1), position, -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far: `generate` takes what follows them in its input as new."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.seen is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.seen is None else len(self.seen)

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return (
            f"StreamingCache(sinks={self.sinks}, window={self.window}, {self.columns} columns, {self.nbytes} bytes)"
        )

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        for x in self.tensors:
            x.zero_()
        self.columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes the former row beam_idx[b]."""
        for x in self.tensors:
            x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what was dropped can't be brought back."""
        raise ValueError("a StreamingCache can't be cropped: dropped tokens are gone; use a copy made earlier")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises ValueError: the number of rows is fixed."""
        raise ValueError("the rows of a StreamingCache are fixed at its first token; start a new cache")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Raises ValueError: the number of rows is fixed."""
        raise ValueError("the rows of a StreamingCache are fixed at its first token; start a new cache")

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raises ValueError: the cache was made for a model with another config."""
        if config is not self.config and config != self.config:
            self.update()

    def update(self, *args, **kwargs):
        """Raises ValueError: a model that knows streaming caches doesn't call it."""
        raise ValueError("past_key_values: this cache was made for another model; use stream(model) of this one")


@dataclass(frozen=True)
class Plan:
    """Where a piece's queries and keys are; the same in every layer.

    Attributes:
        write: for one token [B, 1] its slot, else [B, S] the key (cached or new) that each slot takes.
        held: cached keys among the K; None for one token, which is written before it reads.
        mask: [B, T, K] what each query reads.
        key_place: [B, K]; with query_place [B, T] they place the window's keys rightly to each other.
        sink: [B, K] keys that are sinks; and sink_place [B, T] the queries' places towards them. None where
            query_place serves both.
    """

    write: Tensor
    held: int | None
    mask: Tensor
    key_place: Tensor
    query_place: Tensor
    sink: Tensor | None = None
    sink_place: Tensor | None = None


def plan_token(cache: StreamingCache, real_BT: Tensor | None) -> Plan:
    """One token a row: it is written first, then its query reads the slots.

    Padding is written too: into the slot that the row's next token takes, where nothing is left to be read.
    """
    seen_B = cache.seen
    real_B = torch.ones_like(seen_B, dtype=torch.bool) if real_BT is None else real_BT[:, 0]
    slot_S = torch.arange(cache.slots, device=seen_B.device)
    ring_B = cache.sinks + (seen_B - cache.sinks) % cache.window
    position_BS = cache.slot_positions(seen_B + real_B)
    shift_B1 = (seen_B - (cache.slots - 1)).clamp(min=0)[:, None]
    place_BS = torch.where(slot_S < cache.sinks, position_BS, position_BS - shift_B1).clamp(min=0)
    # padding reads slot 0: whatever comes out is finite, and nobody reads it
    mask_BS = (position_BS >= 0) | ((slot_S == 0) & ~real_B[:, None])
    return Plan(
        write=torch.where(seen_B < cache.sinks, seen_B, ring_B)[:, None],
        held=None,
        mask=mask_BS[:, None],
        key_place=place_BS,
        query_place=seen_B[:, None] - shift_B1,
    )


def plan_piece(cache: StreamingCache, real_BT: Tensor | None, length: int) -> Plan:
    """`length` new tokens beside the cached ones: each query reads what it would have read alone.

    A query's place stops growing when the cache is full, so its distance to a window key is that of the text, and
    to a sink that of the places; the two differ from then on.
    """
    seen_B1 = cache.seen[:, None]
    device = seen_B1.device
    index_T = torch.arange(length, device=device)
    if real_BT is None:
        real_BT = torch.ones(len(seen_B1), length, dtype=torch.bool, device=device)
    position_BT = torch.where(real_BT, seen_B1 + real_BT.cumsum(1) - 1, -1)
    held = min(cache.columns, cache.slots)  # as long as it isn't full, position p lies in slot p
    key_BK = torch.cat([cache.slot_positions(cache.seen)[:, :held], position_BT], 1)
    query_BT1, key_B1K = position_BT[..., None], key_BK[:, None]
    mask = (key_B1K >= 0) & (key_B1K <= query_BT1)
    mask = mask & ((key_B1K < cache.sinks) | (query_BT1 - key_B1K < cache.window))
    own = torch.arange(held + length, device=device) == held + index_T[:, None]
    mask = mask | (own & ~real_BT[..., None])  # padding reads itself, so that it stays finite
    after_B = cache.seen + real_BT.sum(1)
    kept_BS = cache.slot_positions(after_B)
    column_BT = (~real_BT).to(torch.int8).argsort(dim=1, stable=True)  # of the row's first, second … new token
    new_BS = held + column_BT.gather(1, (kept_BS - seen_B1).clamp(0, length - 1))
    slot_S = torch.arange(cache.slots, device=device).clamp(max=held + length - 1)
    sink_BK = key_BK < cache.sinks
    shift_B1 = (seen_B1 - (cache.slots - 1)).clamp(min=0)
    moves = cache.columns + length > cache.slots
    return Plan(
        write=torch.where(kept_BS >= seen_B1, new_BS, slot_S),
        held=held,
        mask=mask,
        key_place=torch.where(sink_BK, key_BK, key_BK - shift_B1).clamp(min=0),
        query_place=(position_BT - shift_B1).clamp(min=0),
        sink=sink_BK if moves else None,
        sink_place=position_BT.clamp(0, cache.slots - 1) if moves else None,
    )


class StreamingStep(Cache):
    """One piece of input on its way through the layers, passed down where the model expects its cache.

    To the model it is an empty cache, so that masks and positions the model makes for itself stay small.
    """

    def __init__(self, cache: StreamingCache, plan: Plan | None, new_B: Tensor | int, length: int, earlier: Sequence):
        super().__init__(layers=[])
        self.cache, self.plan, self.new_B, self.length, self.earlier = cache, plan, new_B, length, earlier
        self.looked_up: dict[str, tuple[Tensor, Tensor] | Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def update(self, *args, **kwargs):
        """Raises ValueError: an attention module isn't the one that `stream` prepared."""
        raise ValueError(
            "the model's attention was exchanged after stream(model); call it on a model that stays as is"
        )

    def attend(self, layer: int, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float) -> Tensor:
        """Take in a layer's new tokens and read: [B, T, N, D]."""
        k, v = self._append(layer, k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2))
        batch, length, heads, dim = q_BTND.shape
        q = q_BTND.transpose(1, 2)
        if isinstance(self.cache.encoding, Rotary):
            q, k = self._rotated(q, k)
        # the query heads of a group share their keys: as further queries, so that no key is repeated
        q = q.reshape(batch, k.shape[1], -1, q.shape[-1])
        group = heads // k.shape[1]
        if isinstance(self.cache.encoding, Rotary):
            mask = self.plan.mask[:, None].expand(-1, group, -1, -1).reshape(batch, 1, group * length, -1)
            if k.shape[-1] > dim:
                v = F.pad(v, (0, k.shape[-1] - dim))  # fast kernels want equal widths
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., :dim]
        else:
            score = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
            weight = (score + self._biases().view(score.shape)).softmax(-1)
            out = weight.to(v.dtype) @ v
        return out.reshape(batch, heads, length, dim).transpose(1, 2)

    def _append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write into the slots, and return the keys and values [B, H, K, D] to read."""
        plan, slots = self.plan, self.cache.layer(layer, k_BHTD)
        index = plan.write[:, None, :, None].expand(-1, k_BHTD.shape[1], -1, k_BHTD.shape[3])
        read = []
        with torch.no_grad():  # a cache remembers numbers, not how they were made
            for x, new in zip(slots, (k_BHTD, v_BHTD), strict=True):
                if plan.held is None:
                    x.scatter_(2, index, new)
                    read.append(x)
                else:
                    read.append(torch.cat([x[:, :, : plan.held], new], 2))
                    x.copy_(read[-1].gather(2, index))
        return read[0], read[1]

    def _rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k at their places; with two query places, their heads become twice as wide, a half for each."""
        plan = self.plan
        k = rotate(k, *self._angles("key", plan.key_place, k.dtype))
        text = rotate(q, *self._angles("query", plan.query_place, q.dtype))
        if plan.sink is None:
            return text, k
        place = rotate(q, *self._angles("sink", plan.sink_place, q.dtype))
        sink = plan.sink[:, None, :, None]
        return torch.cat([text, place], -1), torch.cat([k.masked_fill(sink, 0), k.masked_fill(~sink, 0)], -1)

    def _angles(self, name: str, place: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, K or T, R], looked up once for all layers."""
        if name not in self.looked_up:
            self.looked_up[name] = tuple(x[place][:, None].to(dtype) for x in self.cache.table)
        return self.looked_up[name]

    def _biases(self) -> Tensor:
        """[B, N, T, K] float32, -inf where a query doesn't read a key."""
        if "bias" not in self.looked_up:
            plan = self.plan
            place = plan.key_place[:, None]
            if plan.sink is not None:
                # seen from the query the window's keys have moved, not the sinks
                moved = (plan.query_place - plan.sink_place)[..., None]
                place = torch.where(plan.sink[:, None], place, place - moved).clamp(min=0)
            bias = self.cache.table[:, place].transpose(0, 1).expand(-1, -1, plan.mask.shape[1], -1)
            self.looked_up["bias"] = bias.masked_fill(~plan.mask[:, None], -torch.inf)
        return self.looked_up["bias"]
