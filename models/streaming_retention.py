"""Streaming caches that also retain tokens from before the window, chosen by an eviction policy without training.

The rule is that of lte/visibility.py with a policy's ranks (lte/policies.py), a choice of each KV head; positions are
places in the cache, as in models/streaming_cache.py: sinks, then the retained tokens in the order of the text, then
the window.

Shapes: B batch, T tokens, N query heads, H KV heads, G = N / H, D head dimension, S slots, K keys, R rotary channels,
P places, Q queries of a block, E shifts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lte.cache import RetainedCache
from lte.policies import POLICIES, Arrivals, Policy, advance, note_weights
from lte.visibility import visible_pairs
from models.padding import LeftAligned
from models.streaming_architectures import Alibi, Rotary, rotate
from models.streaming_cache import StreamingCache, StreamingStep

BLOCK = 8  # queries whose keys are rotated once; each is scored at as many places


def policy_of(retention: str | None, budget: int) -> Policy | None:
    """The policy that fills a budget; None for a budget of 0.

    Raises:
        ValueError: an unknown policy, one that a pretrained decoder can't feed, or only one of budget and policy.
    """
    served = ", ".join(name for name in POLICIES if name != "delta_error")
    if retention == "delta_error":
        raise ValueError(
            "retention='delta_error' ranks by the writes of Gated DeltaNet layers, and the model has none; "
            f"use one of {served}"
        )
    if retention is not None and retention not in POLICIES:
        raise ValueError(f"retention={retention!r} is unknown; use one of {served}")
    if budget and retention is None:
        raise ValueError(f"budget={budget} needs a policy that fills it; give retention, one of {served}")
    if retention is not None and not budget:
        raise ValueError(f"retention={retention!r} has no slots to fill; give budget=1 or more, or leave it out")
    return POLICIES[retention]() if retention is not None else None


class RetainingCache(StreamingCache):
    """Sinks, retained tokens and window of all layers; made by `stream` with a budget.

    Each layer's slots are those of a `RetainedCache`: memory taken at the first token, updated in place.

    Attributes:
        budget: retained tokens of every KV head.
        policy: what chooses them.
        stores: the layers' slots; `keys` and `values` are theirs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sinks: int,
        window: int,
        encoding: Rotary | Alibi,
        layers: int,
        budget: int,
        policy: Policy,
    ):
        super().__init__(model, sinks, window, encoding, layers)
        self.budget, self.policy = budget, policy
        self.stores: list[RetainedCache | None] = [None] * layers

    @property
    def slots(self) -> int:
        return self.sinks + self.budget + self.window

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All memory that was taken, without the table of places."""
        own = (self.seen,) if self.seen is not None else ()
        return own + tuple(x for store in self.stores if store is not None for x in store.tensors)

    def take(self, index: int, k_BHTD: Tensor) -> None:
        """Memory of a layer, for keys of this shape."""
        batch, heads, _, dim = k_BHTD.shape
        store = RetainedCache(
            batch,
            heads,
            dim,
            window=self.window,
            sinks=self.sinks,
            budget=self.budget,
            dtype=k_BHTD.dtype,
            device=k_BHTD.device,
        )
        self.stores[index], self.keys[index], self.values[index] = store, store.k, store.v

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        super().reset()
        for store in self.stores:
            if store is not None:
                store.reset()

    def step(self, real_BT: Tensor | None, length: int, earlier: Sequence) -> RetainingStep:
        """The next `length` columns, on their way through the layers."""
        return RetainingStep(self, real_BT, length, earlier)

    def __repr__(self) -> str:
        return (
            f"RetainingCache(sinks={self.sinks}, window={self.window}, budget={self.budget}, {self.policy}, "
            f"{self.columns} columns, {self.nbytes} bytes)"
        )


class RetainingStep(StreamingStep):
    """One piece of input on its way through the layers."""

    def __init__(self, cache: RetainingCache, real_BT: Tensor | None, length: int, earlier: Sequence):
        new_B = length if real_BT is None else real_BT.sum(1)
        super().__init__(cache, None, new_B, length, earlier)
        self.real_BT = real_BT
        self.aligned = None if real_BT is None or length == 1 else LeftAligned.of(real_BT)
        # until then nothing is evicted, and places are text positions
        self.overflows = cache.columns + length > cache.slots
        self.keys = min(cache.columns, cache.slots) + length

    def attend(self, layer: int, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float) -> Tensor:
        """Take in a layer's new tokens and read: [B, T, N, D]."""
        self.cache.layer(layer, k_BTHD.transpose(1, 2))
        store = self.cache.stores[layer]
        new = (q_BTND, k_BTHD.detach(), v_BTHD.detach())
        if self.length == 1:
            return self._token(store, *new, None if self.real_BT is None else self.real_BT[:, 0], scale)
        if self.aligned is not None:
            new = tuple(self.aligned.apply(x.flatten(2)).unflatten(2, x.shape[2:]) for x in new)
        if self.cache.policy.observes:
            out = self._tokens(store, *new, scale)
        else:
            out = self._chunk(store, *new, scale)
        return out if self.aligned is None else self.aligned.restore(out.flatten(2)).view_as(out)

    def _tokens(self, store: RetainedCache, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One after the other: what a query reads depends on the weights of the query before."""
        outputs = []
        for t in range(self.length):
            token = slice(t, t + 1)
            real_B = None if self.aligned is None else self.aligned.lengths > t
            outputs.append(self._token(store, q[:, token], k[:, token], v[:, token], real_B, scale))
        return torch.cat(outputs, 1)

    def _token(
        self, store: RetainedCache, q_B1ND: Tensor, k: Tensor, v: Tensor, real_B: Tensor | None, scale: float
    ) -> Tensor:
        """A token is written, then its query reads all slots: [B, 1, N, D]."""
        policy = self.cache.policy
        with torch.no_grad():
            advance(store, policy, k, v, real_B)
        query_place_B1 = (store.seen[:, None] - 1).clamp(0, store.slots - 1)
        place_BHS = _slot_places(store, query_place_B1)
        q_BHGD = q_B1ND[:, 0].unflatten(1, (store.k.shape[1], -1))
        if isinstance(self.cache.encoding, Rotary):
            k = rotate(store.k, *self._angles(place_BHS, q_B1ND.dtype))
            cos, sin = self._angles(query_place_B1[:, :, None], q_B1ND.dtype)
            score_BHGS = _widened(rotate(q_BHGD, cos, sin) @ k.mT) * scale
        else:
            score_BHGS = _widened(q_BHGD @ store.k.mT) * scale + self._biases(place_BHS[:, :, None])[..., 0, :]
        weight_BHGS = _weights(score_BHGS, (store.positions >= 0)[:, :, None])
        if policy.observes:
            note_weights(store, policy, weight_BHGS, real_B)
        return (weight_BHGS.to(store.v.dtype) @ store.v).flatten(1, 2)[:, None]

    def _chunk(self, store: RetainedCache, q_BTND: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """All tokens at once, for ranks that are known as the tokens arrive: [B, T, N, D]."""
        position_BT = store.seen[:, None] + torch.arange(self.length, device=q_BTND.device)
        place_BT = position_BT.clamp(max=store.slots - 1)
        with torch.no_grad():
            ranks_BTH = self.cache.policy.ranks(Arrivals(k, position_BT))
            span = store.append(k, v, ranks_BTH, None if self.aligned is None else self.aligned.lengths)
            visible_BHTK = visible_pairs(span.end, self.length)
            # in the order of the text; what is empty comes first and is cut off
            order_BHK = span.positions.transpose(1, 2).argsort(-1)[..., -self.keys :]
            visible_BHTK = visible_BHTK.gather(3, order_BHK[:, :, None].expand(-1, -1, self.length, -1))
            index_BHKD = order_BHK[..., None].expand(-1, -1, -1, k.shape[3])
            k, v = (x.transpose(1, 2).gather(2, index_BHKD) for x in (span.k, span.v))
        q = q_BTND.transpose(1, 2).unflatten(1, (k.shape[1], -1))
        rotary = isinstance(self.cache.encoding, Rotary)
        block = BLOCK if rotary and self.overflows else self.length
        outputs = []
        for part in torch.arange(self.length, device="cpu").split(block):
            queries = slice(int(part[0]), int(part[-1]) + 1)
            visible = visible_BHTK[:, :, queries]
            if rotary:
                shifts = len(part) if self.overflows else 1
                score = self._rotary_scores(q[:, :, :, queries], k, visible, place_BT[:, queries], shifts) * scale
            else:
                place_BHQK = (visible.cumsum(-1) - 1).clamp(min=0)
                score = _widened(q[:, :, :, queries] @ k[:, :, None].mT) * scale + self._biases(place_BHQK)
            weight_BHGQK = _weights(score, visible[:, :, None])
            outputs.append(weight_BHGQK.to(v.dtype) @ v[:, :, None])
        return torch.cat(outputs, 3).flatten(1, 2).transpose(1, 2)

    def _rotary_scores(self, q: Tensor, k: Tensor, visible_BHQK: Tensor, place_BQ: Tensor, shifts: int) -> Tensor:
        """Scores [B, H, G, Q, K], each key at its place among those that the query reads.

        A key's place among all keys that any of the queries reads exceeds that place by a shift: the number of keys
        before it that were evicted between the first query and this one, at most one a query. Keys are rotated
        once, queries for every shift, and each pair takes the product of its own.

        Args:
            q: [B, H, G, Q, D]; k: [B, H, K, D], in the order of the text.
            place_BQ: places of the queries.
            shifts: their number E, more than the largest one.
        """
        place_BHK = (visible_BHQK.any(2).cumsum(-1) - 1).clamp(min=0)
        k = rotate(k, *self._angles(place_BHK, k.dtype))
        shift_E = torch.arange(shifts, device=q.device)
        cos, sin = self._angles((place_BQ[..., None] + shift_E)[:, None, None], q.dtype)
        q_BHGQED = rotate(q[..., None, :].expand(*q.shape[:4], shifts, -1), cos, sin)
        score = q_BHGQED.flatten(2, 4) @ k.mT
        score = score.unflatten(2, q_BHGQED.shape[2:5])
        if shifts == 1:
            return _widened(score[..., 0, :])
        shift_BHQK = (place_BHK[:, :, None] - (visible_BHQK.cumsum(-1) - 1)).clamp(0, shifts - 1)
        index = shift_BHQK[:, :, None, :, None].expand(-1, -1, q.shape[2], -1, -1, -1)
        return _widened(score.gather(4, index)[..., 0, :])

    def _angles(self, place: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., R] of places."""
        cos, sin = (F.embedding(place, table) for table in self.cache.table)  # a faster lookup than an index
        return cos.to(dtype), sin.to(dtype)

    def _biases(self, place_BHQK: Tensor) -> Tensor:
        """Biases [B, H, G, Q, K] of keys at these places, float32."""
        heads = place_BHQK.shape[1]
        table_HGP = self.cache.table.unflatten(0, (heads, -1))
        head_H = torch.arange(heads, device=place_BHQK.device)[:, None, None]
        return table_HGP.transpose(1, 2)[head_H, place_BHQK].movedim(-1, 2)


def _slot_places(store: RetainedCache, query_place_B1: Tensor) -> Tensor:
    """Place of the token in each slot [B, H, S], for the newest token's query; anything for an empty slot."""
    position_BHS = store.positions
    first, ring = store.sinks, store.sinks + store.budget
    held_BHR = position_BHS[:, :, first:ring]
    rank_BHR = held_BHR.argsort(-1).argsort(-1) - (held_BHR < 0).sum(-1, keepdim=True)
    behind_BHW = (store.seen - 1)[:, None, None] - position_BHS[:, :, ring:]
    places = [position_BHS[:, :, :first], first + rank_BHR, query_place_B1[..., None] - behind_BHW]
    return torch.cat(places, -1).clamp(0, store.slots - 1)


def _widened(score: Tensor) -> Tensor:
    """At least float32, in which scores are scaled and biased and softmax is taken."""
    return score.to(torch.promote_types(score.dtype, torch.float32))


def _weights(score: Tensor, visible: Tensor) -> Tensor:
    """Softmax over what is visible; 0 where nothing is (padding before a row's first token)."""
    return score.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
