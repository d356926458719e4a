"""The KV cache of one attention layer: a fixed number of slots a head, or one that grows for full attention.

Both give attention the same thing, a `Span`: keys, values and the `end` of each (lte/visibility.py), so that a
chunk of any length, a single token included, obeys the same rule as the parallel form.

Shapes: B batch, T new tokens, H KV heads, D head dimension, S slots, R = budget, W = window, C arrivals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lte.attention import KERNEL_DTYPES
from lte.visibility import NEVER, check_rule, select


@dataclass(frozen=True)
class Span:
    """What the queries of a chunk may read: k, v [B, K, H, D], end and positions [B, K, H]; the chunk lies last.

    `positions` are text positions, -1 for slots and padding that hold nothing.
    """

    k: Tensor
    v: Tensor
    end: Tensor
    positions: Tensor


class RetainedCache:
    """Sinks, retained tokens and the window of every head in S = sinks + budget + window slots.

    Slots are [sinks | retained | ring]; position p >= sinks lies in ring slot p mod window until it leaves the
    window, and is then dropped, put into a free retained slot or into that of the lowest-ranked token. All memory
    is allocated at once and updated in place at fixed addresses; a step of one token never waits for the device.

    Args:
        batch: rows B.
        heads: KV heads H.
        head_dim: D.
        window, sinks, budget: the rule (lte/visibility.py); all finite.
        dtype, device: of keys and values; logits are float32, positions int64.

    Attributes:
        k, v: [B, H, S, D].
        positions: [B, H, S], -1 for empty slots.
        logits: [B, H, S], -inf where no score has arrived.
        seen: [B] real tokens of each row so far.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        window: int,
        sinks: int = 0,
        budget: int = 0,
        lookahead: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        check_rule(window, sinks, budget)
        if budget and window <= lookahead:
            raise ValueError(
                f"window={window} must be larger than the scorer's lookahead {lookahead}: "
                "a token's score has to arrive before it leaves the window"
            )
        self.window, self.sinks, self.budget, self.lookahead = window, sinks, budget, lookahead
        self.slots = sinks + budget + window
        self.k = torch.zeros(batch, heads, self.slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.positions = torch.full((batch, heads, self.slots), -1, dtype=torch.int64, device=device)
        self.logits = torch.full((batch, heads, self.slots), -torch.inf, dtype=torch.float32, device=device)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.positions, self.logits, self.seen

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Growth with every token of a row: none."""
        return 0

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.k.zero_()
        self.v.zero_()
        self.positions.fill_(-1)
        self.logits.fill_(-torch.inf)
        self.seen.zero_()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes the former row index[b] (beam search)."""
        for x in self.tensors:
            x.copy_(x.index_select(0, index.to(x.device)))

    def append(self, k: Tensor, v: Tensor, logits: Tensor | None = None, lengths: Tensor | None = None) -> Span:
        """Take in new tokens and return what their queries may read.

        Args:
            k, v: [B, T, H, D] of the new tokens.
            logits: [B, T, H] as `RetentionScorer.stream` gives them: entry t is the score of the token `lookahead`
                before new token t. None: nothing will be retained.
            lengths: [B] real tokens of each row, at its left; None: all T.

        Returns:
            A span of S + T keys, or, for one token without `lengths`, of the S slots themselves. Gradients reach the
            new tokens through it; the slots remember numbers, not how they were made.
        """
        logits = None if logits is None else logits.detach()
        learns = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        if k.shape[1] == 1 and lengths is None:
            if self.k.dtype in KERNEL_DTYPES and self.k.is_cuda and not learns:
                from lte.kernels.cache_step import cache_step

                cache_step(self, k[:, 0], v[:, 0], scores_BH=None if logits is None else logits[:, 0])
                self.seen += 1
            else:
                self.step(k.transpose(1, 2), v.transpose(1, 2), logits)
            end_BSH = torch.where(self.positions >= 0, NEVER, 0).transpose(1, 2)
            # the next token is written into the slots that this one's gradients would come back through
            k, v = (self.k.clone(), self.v.clone()) if learns else (self.k, self.v)
            span = Span(k.transpose(1, 2), v.transpose(1, 2), end_BSH.int(), self.positions.transpose(1, 2))
            if learns:
                self.k, self.v = self.k.detach(), self.v.detach()
            return span
        if self.k.is_cuda and not learns:
            from lte.kernels.evictions import MAX_BUDGET

            if self.budget <= MAX_BUDGET:
                from lte.kernels.cache_chunk import cache_chunk

                parts = cache_chunk(self, k.transpose(1, 2), v.transpose(1, 2), logits, lengths)
                return Span(*(x.transpose(1, 2) for x in parts))
        return self._chunk(k.transpose(1, 2), v.transpose(1, 2), logits, lengths)

    def step(
        self, k_BH1D: Tensor, v_BH1D: Tensor, logits_B1H: Tensor | None = None, real_B: Tensor | None = None
    ) -> None:
        """One token for every row, or for the rows that are true in real_B: evict, insert, score.

        Never waits for the device, with `real_B` either.
        """
        first_retained, first_ring = self.sinks, self.sinks + self.budget
        heads, dim = k_BH1D.shape[1], k_BH1D.shape[3]

        def per_head(x_B: Tensor) -> Tensor:
            return x_B[:, None, None].expand(-1, heads, 1)

        def write(x: Tensor, index: Tensor, new: Tensor, where: Tensor | None) -> None:
            x.scatter_(2, index, new if where is None else torch.where(where, new, x.gather(2, index)))

        real = None if real_B is None else per_head(real_B)
        real_row = None if real is None else real[..., None]
        ring = first_ring + self.seen % self.window
        retains = logits_B1H is not None and self.budget > 0
        if retains:
            # the token that leaves lies where the new one goes
            leaving = per_head(ring)
            logit = self.logits.gather(2, leaving)
            held = self.logits[:, :, first_retained:first_ring]
            held_position = self.positions[:, :, first_retained:first_ring]
            lowest = held.amin(-1, keepdim=True)
            # among equal logits the larger position ranks lower
            target = torch.where(held == lowest, held_position, -2).argmax(-1, keepdim=True)
            enters = (logit > 0) & (logit > lowest)
            if real is not None:
                enters = enters & real
            target = first_retained + target
            row = target[..., None].expand(-1, -1, -1, dim)
            row_leaving = leaving[..., None].expand(-1, -1, -1, dim)
            for x in (self.k, self.v):
                write(x, row, x.gather(2, row_leaving), enters[..., None])
            for x in (self.positions, self.logits):
                write(x, target, x.gather(2, leaving), enters)
        slot = per_head(torch.where(self.seen < self.sinks, self.seen, ring))
        row = slot[..., None].expand(-1, -1, -1, dim)
        write(self.k, row, k_BH1D.to(self.k.dtype), real_row)
        write(self.v, row, v_BH1D.to(self.v.dtype), real_row)
        write(self.positions, slot, per_head(self.seen), real)
        write(self.logits, slot, torch.full_like(slot, -torch.inf, dtype=torch.float32), real)
        if retains:
            # last: without lookahead the score is that of the token just inserted
            scored_B = self.seen - self.lookahead
            slot = per_head(first_ring + scored_B.clamp(min=0) % self.window)
            known = per_head(scored_B >= self.sinks)
            write(self.logits, slot, logits_B1H.transpose(1, 2).float(), known if real is None else known & real)
        self.seen += 1 if real_B is None else real_B

    def _chunk(self, k_BHTD: Tensor, v_BHTD: Tensor, logits_BTH: Tensor | None, lengths_B: Tensor | None) -> Span:
        heads, length = k_BHTD.shape[1:3]
        device = k_BHTD.device
        first_retained, first_ring = self.sinks, self.sinks + self.budget
        seen_B1 = self.seen[:, None]
        new_B1 = seen_B1 * 0 + length if lengths_B is None else lengths_B.to(device)[:, None]
        index_T = torch.arange(length, device=device)
        position_BT = torch.where(index_T < new_B1, seen_B1 + index_T, -1)
        k = torch.cat([self.k, k_BHTD.to(self.k.dtype)], 2)
        v = torch.cat([self.v, v_BHTD.to(self.v.dtype)], 2)
        position = torch.cat([self.positions, position_BT[:, None].expand(-1, heads, -1)], 2)
        logit = self._scored(logits_BTH if self.budget else None, new_B1, length)
        # query at which each key leaves the window, and from which it is gone unless retained
        leaves = (position + self.window - seen_B1[..., None]).clamp(max=length)
        gone = leaves.clone()
        gone[:, :, first_retained:first_ring] = length
        survivors = alive = None
        if logits_BTH is not None and self.budget:
            # arrival c of the retained slots is the token that leaves the window at query c
            arriving = seen_B1 + index_T - self.window
            valid = ((arriving >= self.sinks) & (index_T < new_B1))[:, None].expand(-1, heads, -1)
            source = self._place(arriving, seen_B1)[:, None].expand(-1, heads, -1)
            entering = torch.where(valid, logit.gather(2, source), -torch.inf)
            entering = entering.masked_fill(entering <= 0, -torch.inf)
            held = self.logits[:, :, first_retained:first_ring]
            held_position = self.positions[:, :, first_retained:first_ring]
            rivals = torch.cat([held, entering], 2)
            rival_positions = torch.cat([held_position, arriving[:, None].expand(-1, heads, -1)], 2)
            survivors, out_at = select(rivals, rival_positions, self.budget, length)
            alive = rivals.gather(2, survivors) > -torch.inf  # select() fills up with entries that hold nothing
            gone_held, gone_entering = out_at.split([self.budget, length], 2)
            gone_entering = torch.where(entering > -torch.inf, gone_entering, leaves.gather(2, source))
            gone[:, :, first_retained:first_ring] = gone_held
            gone.scatter_(2, torch.where(valid, source, 0), torch.where(valid, gone_entering, gone[:, :, :1]))
        end = torch.where((gone >= length) | ((position >= 0) & (position < self.sinks)), NEVER, self.slots + gone)
        end = torch.where(position >= 0, end, 0).to(torch.int32)
        self._commit(k, v, position, logit, survivors, alive, new_B1)
        return Span(k.transpose(1, 2), v.transpose(1, 2), end.transpose(1, 2), position.transpose(1, 2))

    def _scored(self, logits_BTH: Tensor | None, new_B1: Tensor, length: int) -> Tensor:
        """Logits [B, H, S + T] of slots and new tokens, after the scores that arrive with this chunk."""
        batch, heads = self.logits.shape[:2]
        logit = torch.cat([self.logits, self.logits.new_full((batch, heads, length), -torch.inf)], 2)
        if logits_BTH is None:
            return logit
        index_T = torch.arange(length, device=logit.device)
        scored_BT = self.seen[:, None] + index_T - self.lookahead
        known = (scored_BT >= self.sinks) & (index_T < new_B1)
        # what is not known is written into an extra place that is cut off again
        place = torch.where(known, self._place(scored_BT, self.seen[:, None]), self.slots + length)
        logit = torch.cat([logit, logit.new_zeros(batch, heads, 1)], 2)
        logit.scatter_(2, place[:, None].expand(-1, heads, -1), logits_BTH.transpose(1, 2).float())
        return logit[:, :, :-1]

    def _place(self, position_BT: Tensor, seen_B1: Tensor) -> Tensor:
        """Place among slots and new tokens of positions beyond the sinks that are in the window or new."""
        ring = self.sinks + self.budget + position_BT.clamp(min=0) % self.window
        return torch.where(position_BT >= seen_B1, self.slots + position_BT - seen_B1, ring)

    @torch.no_grad()
    def _commit(
        self,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        logit: Tensor,
        survivors: Tensor | None,
        alive: Tensor | None,
        new_B1: Tensor,
    ) -> None:
        """Write the slots as they are after the chunk: every slot takes one of the S + T places."""
        heads, device = k.shape[1], k.device
        first_ring = self.sinks + self.budget
        seen_B1, after_B1 = self.seen[:, None], self.seen[:, None] + new_B1
        slot_S = torch.arange(self.slots, device=device)
        sink = slot_S[: self.sinks]
        source_sink = torch.where((sink >= seen_B1) & (sink < after_B1), self.slots + sink - seen_B1, sink)
        # the newest position of each ring slot's residue that is there after the chunk
        residue = slot_S[first_ring:] - first_ring
        newest = after_B1 - 1 - (after_B1 - 1 - residue) % self.window
        source_ring = torch.where(
            (newest >= seen_B1) & (newest >= self.sinks), self.slots + newest - seen_B1, slot_S[first_ring:]
        )
        retained = slot_S[self.sinks : first_ring].expand(len(k), heads, -1)
        if survivors is not None:
            arriving = seen_B1[..., None] + (survivors - self.budget) - self.window
            ring_or_new = self._place(arriving, seen_B1[..., None])
            retained = torch.where(survivors < self.budget, self.sinks + survivors, ring_or_new)
        source = torch.cat(
            [source_sink[:, None].expand(-1, heads, -1), retained, source_ring[:, None].expand(-1, heads, -1)], 2
        )
        row = source[..., None].expand(-1, -1, -1, k.shape[3])
        self.k.copy_(k.gather(2, row))
        self.v.copy_(v.gather(2, row))
        self.positions.copy_(position.gather(2, source))
        self.logits.copy_(logit.gather(2, source))
        if alive is not None:
            self.positions[:, :, self.sinks : first_ring].masked_fill_(~alive, -1)
            self.logits[:, :, self.sinks : first_ring].masked_fill_(~alive, -torch.inf)
        self.seen += new_B1[:, 0]


class GrowingCache:
    """Keys and values of all tokens, for full attention: memory doubles whenever the tokens outgrow it.

    Attributes:
        k, v: [B, H, capacity, D]; position p of a row lies in slot p.
        seen: [B] real tokens of each row so far.
        longest: int64 on the CPU, at least the largest of them.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        capacity: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.k = torch.zeros(batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        # no row has more tokens; on the host, so that slicing never asks the device
        self.longest = torch.zeros((), dtype=torch.int64, device="cpu")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.seen

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Growth with every token of a row; memory is taken in doubling steps."""
        return (self.k[0, :, 0].nbytes + self.v[0, :, 0].nbytes) if len(self.k) else 0

    def reset(self) -> None:
        self.seen.zero_()
        self.longest.zero_()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes the former row index[b] (beam search)."""
        for x in self.tensors:
            x.copy_(x.index_select(0, index.to(x.device)))

    def append(self, k: Tensor, v: Tensor, logits: Tensor | None = None, lengths: Tensor | None = None) -> Span:
        """As `RetainedCache.append`; nothing is ever dropped, so `logits` has no effect."""
        batch, length, heads, dim = k.shape
        device = k.device
        old = int(self.longest)
        self.longest += length
        longest = old + length
        if longest >= self.k.shape[2]:
            # the last slot takes what is padding
            extra = max(self.k.shape[2], longest + 1 - self.k.shape[2])
            with torch.inference_mode(False):  # else later calls outside of that mode couldn't write
                self.k = torch.cat([self.k, self.k.new_zeros(batch, heads, extra, dim)], 2)
                self.v = torch.cat([self.v, self.v.new_zeros(batch, heads, extra, dim)], 2)
        index_T = torch.arange(length, device=device)
        real_BT = index_T < (length if lengths is None else lengths.to(device)[:, None])
        real_BT = real_BT.expand(batch, length)
        position_BT = torch.where(real_BT, self.seen[:, None] + index_T, -1)
        slot = torch.where(real_BT, position_BT, self.k.shape[2] - 1)[:, None, :, None].expand(-1, heads, -1, dim)
        k_new, v_new = k.to(self.k.dtype), v.to(self.v.dtype)
        if length == 1 and lengths is None:
            self.k.scatter_(2, slot, k_new.transpose(1, 2))
            self.v.scatter_(2, slot, v_new.transpose(1, 2))
            span_k, span_v = (
                self.k[:, :, :longest].transpose(1, 2),
                self.v[:, :, :longest].transpose(1, 2),
            )
            if self.k.requires_grad or self.v.requires_grad:
                # as in `RetainedCache.append`
                span_k, span_v = span_k.clone(), span_v.clone()
                self.k, self.v = self.k.detach(), self.v.detach()
            place = torch.arange(longest, device=device)
            positions_BK = torch.where(place <= self.seen[:, None], place, -1)
        else:
            span_k = torch.cat([self.k[:, :, :old].transpose(1, 2), k_new], 1)
            span_v = torch.cat([self.v[:, :, :old].transpose(1, 2), v_new], 1)
            place = torch.arange(old, device=device)
            positions_BK = torch.cat([torch.where(place < self.seen[:, None], place, -1), position_BT], 1)
            self.k.scatter_(2, slot, k_new.detach().transpose(1, 2))
            self.v.scatter_(2, slot, v_new.detach().transpose(1, 2))
        self.seen += length if lengths is None else lengths.to(device)
        end = torch.where(positions_BK >= 0, NEVER, 0).to(torch.int32)
        return Span(
            span_k,
            span_v,
            end[..., None].expand(-1, -1, heads),
            positions_BK[..., None].expand(-1, -1, heads),
        )
