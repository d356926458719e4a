"""The rule: which key a query may read (`visible`), and the same rule as one integer a key (`lifetimes`).

For one KV head, query position i reads key position j <= i iff j is a sink (j < s), lies in the window
(i - j < w), or is retained: it has left the window, its logit is positive, and it is among the `budget` best of
the tokens of which that holds, ordered by logit, ties to the smaller position.

Once a token has left the window it can only lose its place, since better tokens keep arriving and none leaves.
So every key is read over one unbroken stretch of queries, and the rule is one integer: key j is visible to
query i iff j <= i < end[j]. The kernels, the prefill and the cache all work on these ends.

Shapes: B batch, T tokens, H KV heads, S cached slots, R retained slots, C arrivals of a chunk, Q queries, K keys.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lte.layout import Layout

NEVER = torch.iinfo(torch.int32).max


def check_rule(window: int | None, sinks: int, budget: int | None) -> None:
    """Raises ValueError for numbers that aren't a rule; None stands for no limit."""
    for name, value in (("window", window), ("sinks", sinks), ("budget", budget)):
        if isinstance(value, bool | float):
            raise ValueError(f"{name}={value!r}: must be a whole number")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must count at least the query's own key; use 1 or more, or None")
    if sinks < 0:
        raise ValueError(f"sinks={sinks}: must be 0 or more")
    if budget is not None and budget < 0:
        raise ValueError(f"budget={budget}: must be 0 or more, or None for no limit")


def visible(
    logits: Tensor | None,
    *,
    batch: int,
    length: int,
    heads: int,
    window: int | None,
    sinks: int = 0,
    budget: int | None = None,
    layout: Layout | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The rule as a boolean mask, straight from its definition: slow, the oracle of every test.

    Args:
        logits: retention logits [B, T, H] (float32), or None if nothing is ever retained.
        window: keys in the sliding window, the query's own included; None means no limit.
        sinks: first positions of each document that always stay visible.
        budget: most tokens retained at a time; None means no limit.
        layout: documents and padding; padding neither reads nor is read.

    Returns:
        [B, H, T, T] bool; [b, h, i, j] says whether query i reads key j.
    """
    check_rule(window, sinks, budget)
    layout = layout or Layout()
    window = length if window is None else window
    position_BT = layout.positions(batch, length, torch.device(device)).cpu()
    document_BT = layout.documents(batch, length, torch.device(device)).cpu()
    mask_BHTT = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        position = position_BT[b].tolist()
        document = document_BT[b].tolist()
        for h in range(heads):
            logit = logits[b, :, h].float().tolist() if logits is not None else None
            for i in range(length):
                if position[i] < 0:
                    continue
                mine = [j for j in range(i + 1) if position[j] >= 0 and document[j] == document[i]]
                candidates = []
                for j in mine:
                    if position[j] < sinks or position[i] - position[j] < window:
                        mask_BHTT[b, h, i, j] = True
                    elif logit is not None and logit[j] > 0:
                        candidates.append(j)
                candidates.sort(key=lambda j: (-logit[j], j))
                for j in candidates[:budget]:
                    mask_BHTT[b, h, i, j] = True
    return mask_BHTT.to(device)


def visible_pairs(end: Tensor, queries: int) -> Tensor:
    """The mask [B, H, Q, K] that `end` [B, K, H] stands for, for the last `queries` of K indices."""
    keys = end.shape[1]
    i_Q1 = torch.arange(keys - queries, keys, device=end.device)[:, None]
    j_K = torch.arange(keys, device=end.device)
    return (j_K <= i_Q1) & (i_Q1 < end.transpose(1, 2)[:, :, None, :])


def lifetimes(
    logits: Tensor | None,
    *,
    batch: int,
    length: int,
    heads: int,
    window: int | None,
    sinks: int = 0,
    budget: int | None = None,
    layout: Layout | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """First query index that no longer reads each key: [B, T, H] int32, `visible` in another form.

    Padding gets 0, and no key is visible past the end of its document. The cost is linear in T with a budget
    (a running selection, `evictions`) and a few element-wise operations without. Logits on a CUDA device go to
    kernels (lte/kernels/evictions.py), which don't wait for the device, unless the budget is larger than they hold.
    """
    check_rule(window, sinks, budget)
    layout = layout or Layout()
    device = torch.device(device)
    window = length if window is None else min(window, length)
    if logits is not None and budget != 0 and logits.is_cuda:
        from lte.kernels.evictions import MAX_BUDGET, retained_ends

        if budget is None or budget <= MAX_BUDGET:
            return retained_ends(logits, window=window, sinks=sinks, budget=budget, layout=layout)
    plain_BTH, stop_BT1 = layout.once(
        ("lifetimes", batch, length, heads, window, sinks, device),
        lambda: _plain_lifetimes(batch, length, heads, window, sinks, layout, device),
    )
    if logits is None or budget == 0:
        return plain_BTH
    # sinks and padding are the same with and without retention
    if budget is None or budget >= length:
        return torch.where(logits > 0, stop_BT1, plain_BTH)
    eligible_BTH = (logits.detach() > 0) & (layout.positions(batch, length, device) >= sinks)[..., None]
    if layout.is_packed:
        retained_BTH = _packed_evictions(logits, eligible_BTH, window, budget, layout)
    else:
        retained_BTH = evictions(logits.detach().masked_fill(~eligible_BTH, -torch.inf).float(), window, budget)
    retained_BTH = retained_BTH.maximum(plain_BTH).minimum(stop_BT1)
    return torch.where(eligible_BTH, retained_BTH, plain_BTH).to(torch.int32)


def _plain_lifetimes(
    batch: int, length: int, heads: int, window: int, sinks: int, layout: Layout, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`lifetimes` where nothing is retained, and the ends of documents [B, T, 1]; both int32."""
    end_T = torch.arange(length, device=device) + window
    end_BT = torch.where(layout.positions(batch, length, device) < sinks, NEVER, end_T)
    stop_BT = layout.document_ends(batch, length, device)
    end_BT, stop_BT = end_BT.minimum(stop_BT).to(torch.int32), stop_BT.to(torch.int32)
    return end_BT[..., None].expand(batch, length, heads), stop_BT[..., None]


def _packed_evictions(logits: Tensor, eligible_BTH: Tensor, window: int, budget: int, layout: Layout) -> Tensor:
    """Evictions document by document: a budget is each document's own."""
    end_BTH = torch.full(logits.shape, NEVER, dtype=torch.int64, device=logits.device)
    masked_BTH = logits.detach().float().masked_fill(~eligible_BTH, -torch.inf)
    bounds = layout.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        if stop - start > budget + window:  # a shorter document can't overflow its budget
            end_BTH[:, start:stop] = start + evictions(masked_BTH[:, start:stop], window, budget)
    return end_BTH


def evictions(logits_BTH: Tensor, window: int, budget: int, block: int = 256) -> Tensor:
    """Query index from which each token is no longer among the `budget` best that have left the window.

    Args:
        logits_BTH: float32 logits, -inf for what may never be retained.
        window: token j competes from query j + window on.
        block: arrivals taken in one step; the cost is T * (budget + block), the memory block * (budget + block).

    Returns:
        [B, T, H] int64. NEVER for tokens that keep their place to the end.
    """
    batch, length, heads = logits_BTH.shape
    device = logits_BTH.device
    logits_BHT = logits_BTH.transpose(1, 2)
    end_BHT = torch.full((batch, heads, length), NEVER, dtype=torch.int64, device=device)
    held_logit = torch.full((batch, heads, budget), -torch.inf, device=device)
    held_index = torch.full((batch, heads, budget), -1, dtype=torch.int64, device=device)
    for first in range(0, length, block):
        arriving_logit = logits_BHT[..., first : first + block]
        count = arriving_logit.shape[-1]
        arriving_index = torch.arange(first, first + count, device=device).expand(batch, heads, count)
        logit = torch.cat([held_logit, arriving_logit], -1)
        index = torch.cat([held_index, arriving_index], -1)
        survivors, out_at = select(logit, index, budget, count)
        # an arrival at place c of this block enters at query first + c + window; so does the eviction it causes
        lost = out_at < count
        when = torch.where(lost, first + out_at + window, NEVER)
        real = index >= 0
        end_BHT.scatter_reduce_(-1, index.clamp(min=0), torch.where(real, when, NEVER), "amin")
        held_logit = logit.gather(-1, survivors)
        held_index = index.gather(-1, survivors)
    return end_BHT.transpose(1, 2)


def select(logit: Tensor, index: Tensor, budget: int, arrivals: int) -> tuple[Tensor, Tensor]:
    """Running top-`budget` selection while the last `arrivals` entries come in one after the other.

    Args:
        logit: [..., R + C] float32, R held tokens (in any order), then C = `arrivals` in order; -inf: no token.
        index: [..., R + C] positions, which break ties (smaller is better).

    Returns:
        survivors: [..., R] places of the best R = budget entries after all arrivals (places of -inf entries fill
            up where there are fewer), and out_at: [..., R + C] the number c of the arrival at which an entry drops
            out of the best `budget` (or never gets in: its own number), `arrivals` if it never does.
    """
    held = logit.shape[-1] - arrivals
    assert held == budget, "the held tokens are the best `budget` so far"
    # order[0] is the best: by logit from high to low, ties by position from low to high
    by_index = index.argsort(dim=-1, stable=True)
    order = by_index.gather(-1, logit.gather(-1, by_index).argsort(dim=-1, descending=True, stable=True))
    survivors = order[..., :budget]
    # arrival time of the entries in rank order; held tokens are there from the start
    place = torch.arange(logit.shape[-1], device=logit.device) - held
    arrival_by_rank = place.clamp(min=-1).expand(order.shape).gather(-1, order)
    live_by_rank = logit.gather(-1, order) > -torch.inf
    # An entry of rank r is out once `budget` entries of better rank have arrived: the budget-th smallest arrival
    # time among the ranks before r. The first `budget` ranks can't have that many; for the others keep the
    # `budget` smallest times seen so far, whose maximum is the answer.
    lost_by_rank = _kth_smallest_of_prefix(arrival_by_rank, budget, arrivals)
    out_by_rank = torch.maximum(lost_by_rank, arrival_by_rank.clamp(min=0))
    out_by_rank = torch.where(lost_by_rank >= arrivals, arrivals, out_by_rank)
    out_by_rank = torch.where(live_by_rank, out_by_rank, arrivals)
    out_at = torch.empty_like(out_by_rank).scatter_(-1, order, out_by_rank)
    return survivors, out_at


def _kth_smallest_of_prefix(times: Tensor, k: int, arrivals: int) -> Tensor:
    """For each place r of the last axis the k-th smallest of times[..., :r] (`arrivals` if r < k).

    times are integers in [-1, arrivals): the k-th smallest is the first c at which #(times <= c) reaches k, and
    those counts are a cumulative sum of one-hot times over ranks.
    """
    ranks = times.shape[-1]
    if k == 0:
        return torch.full_like(times, -1)
    if ranks <= k:
        return torch.full_like(times, arrivals)
    head, tail = times[..., :k], times[..., k:]
    steps = torch.arange(-1, arrivals, device=times.device)
    # counts over ranks of times <= c, exclusive of the rank itself; only ranks k.. can lose
    base = (head[..., None] <= steps).sum(-2)[..., None, :]
    more = (tail[..., None] <= steps).to(torch.int32).cumsum(-2)
    reached = base + torch.cat([torch.zeros_like(more[..., :1, :]), more[..., :-1, :]], -2) >= k
    first = torch.where(reached.any(-1), reached.to(torch.int8).argmax(-1) - 1, arrivals)
    return torch.cat([torch.full_like(head, arrivals), first], -1)
