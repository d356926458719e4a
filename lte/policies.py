"""Eviction policies other than the learned one, in the same slots: they only rank tokens differently.

A policy's ranks take the place of the scorer's logits in the rule (lte/visibility.py) and in the cache
(lte/cache.py): of the tokens that have left the window the `budget` highest ranked stay readable, ties to the smaller
position. Ranks are positive, so that no token is refused while there is room.

Static policies know a rank when its token arrives. Observing ones change ranks with every query, and so are defined
by token-by-token decoding: before query t reads, the token that leaves its window competes by what the queries up
to t - 1 read. Chunks and whole documents take their queries in that order, a slow loop, and give the same.

Shapes: B rows, T tokens, H KV heads, G query heads of a group, N = H · G, D head dimension, S slots,
E heads of the delta rule, L tokens of the longest document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lte.attention import softmax_weights
from lte.cache import RetainedCache
from lte.layout import Layout

_LOWEST_RANK = torch.finfo(torch.float32).tiny
_FIRST_NORMAL = 0x00800000  # the bits of _LOWEST_RANK; the largest finite float32 is 0x7F7FFFFF
_RANKS = 0x7F800000 - _FIRST_NORMAL
_LOW_32_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class Arrivals:
    """New tokens of an attention layer.

    Attributes:
        k_BTHD: their keys before rotation.
        positions_BT: positions in their documents; arbitrary for padding.
        writes_BTE: β · ‖v - read‖ of each head of the preceding Gated DeltaNet layer, None without one.
    """

    k_BTHD: Tensor
    positions_BT: Tensor
    writes_BTE: Tensor | None = None


class Policy:
    """Ranks tokens. A static policy has `ranks`, an observing one `observe`."""

    observes = False

    def ranks(self, new: Arrivals) -> Tensor:
        """Ranks [B, T, H] of new tokens: positive float32. An observing policy starts with the lowest."""
        return torch.full(new.k_BTHD.shape[:3], _LOWEST_RANK, dtype=torch.float32, device=new.k_BTHD.device)

    def observe(self, ranks_BHS: Tensor, weights_BHGS: Tensor) -> Tensor:
        """Ranks after a query has read the slots with these attention weights (0 for empty slots)."""
        return ranks_BHS


@dataclass(frozen=True)
class Recency(Policy):
    """The latest tokens stay: a window of window + budget keys (StreamingLLM with sinks, arXiv 2309.17453).

    Exact for 2.1 thousand million tokens.
    """

    def ranks(self, new: Arrivals) -> Tensor:
        """[B, T, H], growing with the position."""
        return _ordered(new.positions_BT)[..., None].expand(new.k_BTHD.shape[:3])


@dataclass(frozen=True)
class Random(Policy):
    """A uniform sample of the text, the control of a comparison: each position and head has a fixed hash for a rank.

    Args:
        seed: another sample.
    """

    seed: int = 0

    def ranks(self, new: Arrivals) -> Tensor:
        """[B, T, H] from position, head and seed alone."""
        head_H = torch.arange(new.k_BTHD.shape[2], device=new.k_BTHD.device)
        salt_H = _scramble(head_H + (0x9E3779B9 * (self.seed + 1) & _LOW_32_BITS))
        return _ordered(_scramble(new.positions_BT[..., None] ^ salt_H) % _RANKS)


@dataclass(frozen=True)
class KeyNorm(Policy):
    """Keys of a small Euclidean norm stay, which attract attention (arXiv 2406.11430); each head has its own."""

    def ranks(self, new: Arrivals) -> Tensor:
        """[B, T, H]: 1 / ‖k‖."""
        norm_BTH = _norm(new.k_BTHD)
        return norm_BTH.clamp(min=1e-30).reciprocal().clamp(min=_LOWEST_RANK)


@dataclass(frozen=True)
class DeltaError(Policy):
    """Tokens stay that the preceding Gated DeltaNet layer had to write most strongly (arXiv 2607.02303).

    The strength is β · ‖v - read‖: how far the layer's state was from the token's value, times how much of that was
    written. Its heads and the KV heads have no common order, so all KV heads get the norm over its heads.
    """

    def ranks(self, new: Arrivals) -> Tensor:
        """[B, T, H]: the norm of writes_BTE over E.

        Raises:
            ValueError: no Gated DeltaNet layer reports its writes.
        """
        if new.writes_BTE is None:
            raise ValueError(
                "retention='delta_error' ranks by the writes of the preceding Gated DeltaNet layer, and none reports "
                "them; choose it with model.set_retention('delta_error')"
            )
        norm_BT1 = _norm(new.writes_BTE)[..., None]
        return norm_BT1.clamp(min=_LOWEST_RANK).expand(new.k_BTHD.shape[:3])


@dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters: a rank is the attention a token has had since it arrived (arXiv 2306.14048).

    Probabilities are summed over queries and over the query heads that share a KV head.
    """

    observes = True

    def observe(self, ranks_BHS: Tensor, weights_BHGS: Tensor) -> Tensor:
        """[B, H, S]: the sum so far."""
        return ranks_BHS + weights_BHGS.sum(2)


@dataclass(frozen=True)
class TOVA(Policy):
    """A rank is the attention of the last query (arXiv 2401.06104), averaged over all heads of the layer as there.

    Here sinks and window are always kept, and the choice concerns the other tokens.
    """

    observes = True

    def observe(self, ranks_BHS: Tensor, weights_BHGS: Tensor) -> Tensor:
        """[B, H, S] from the newest weights alone.

        The mean is taken slot by slot: all heads rank alike from the first token on, so a slot holds the same token
        in every head.
        """
        return weights_BHGS.mean((1, 2))[:, None].expand_as(ranks_BHS)


POLICIES: dict[str, type[Policy]] = {
    "recency": Recency,
    "random": Random,
    "h2o": H2O,
    "tova": TOVA,
    "key_norm": KeyNorm,
    "delta_error": DeltaError,
}


def policy_name(policy: Policy) -> str:
    """The name under which a policy is chosen."""
    return next(name for name, kind in POLICIES.items() if type(policy) is kind)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension in float32; summed in float64 where x is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=dtype).float()


def _ordered(number: Tensor) -> Tensor:
    """Positive float32 in the order of the integers 0 … 2,130,706,431: the bits of floats are ordered as they are."""
    return (number.clamp(0, _RANKS - 1) + _FIRST_NORMAL).to(torch.int32).view(torch.float32)


def _scramble(number: Tensor) -> Tensor:
    """Integers to integers below 2^32 without a visible pattern; each product fits int64."""
    for _ in range(2):
        number = number & _LOW_32_BITS
        number = (number ^ (number >> 16)) * 0x045D9F3B
    number = number & _LOW_32_BITS
    return number ^ (number >> 16)


def observed_attention(
    cache: RetainedCache,
    policy: Policy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    frequencies: Tensor | None = None,
    scale: float | None = None,
    off_by_one: bool = False,
) -> Tensor:
    """Take T new tokens into a cache, one after the other, under an observing policy.

    Every query reads the slots with explicit weights, in float32: kernels that attend don't return the weights,
    which the policy needs. One token without `lengths` is a decoding step, free of host synchronisation.

    Args:
        q: [B, T, N, D]; k, v: [B, T, H, D], as they lie in the cache.
        lengths: [B] real tokens of each row, at its left; None: all T.
        frequencies, scale, off_by_one: as in lte.attention.in_cache_attention; no frequencies: positions are in q
            and k already.

    Returns:
        [B, T, N, D]; arbitrary where padding.
    """
    outputs = []
    k, v = k.detach(), v.detach()  # a cache remembers numbers, not how they were made
    for t in range(q.shape[1]):
        token = slice(t, t + 1)
        real_B = None if lengths is None else lengths > t
        advance(cache, policy, k[:, token], v[:, token], real_B)
        outputs.append(_read(cache, policy, q[:, token], real_B, frequencies, scale, off_by_one))
    return torch.cat(outputs, 1)


def advance(
    cache: RetainedCache, policy: Policy, k_B1HD: Tensor, v_B1HD: Tensor, real_B: Tensor | None = None
) -> None:
    """One token of every row, or of those that are true in real_B: evict by the ranks so far, and insert."""
    ranks_B1H = policy.ranks(Arrivals(k_B1HD, cache.seen[:, None]))
    if real_B is None:
        cache.append(k_B1HD, v_B1HD, ranks_B1H)
    else:
        cache.step(k_B1HD.transpose(1, 2), v_B1HD.transpose(1, 2), ranks_B1H, real_B)


def note_weights(cache: RetainedCache, policy: Policy, weights_BHGS: Tensor, real_B: Tensor | None = None) -> None:
    """Let an observing policy change the ranks of the cached tokens after their newest query has read the slots.

    Args:
        weights_BHGS: attention weights of the query, 0 for empty slots.
        real_B: rows that had a query; None: all.
    """
    changing_BHS = cache.positions >= cache.sinks
    if real_B is not None:
        changing_BHS = changing_BHS & real_B[:, None, None]
    ranks_BHS = policy.observe(cache.logits, weights_BHGS.detach().float()).clamp(min=_LOWEST_RANK)
    cache.logits.copy_(torch.where(changing_BHS, ranks_BHS, cache.logits))


def _read(
    cache: RetainedCache,
    policy: Policy,
    q_B1ND: Tensor,
    real_B: Tensor | None,
    frequencies: Tensor | None,
    scale: float | None,
    off_by_one: bool,
) -> Tensor:
    """Attention of the newest tokens over the slots [B, 1, N, D]; the ranks change with it."""
    batch, _, query_heads, dim = q_B1ND.shape
    dtype = torch.promote_types(q_B1ND.dtype, torch.float32)
    held_BHS = cache.positions >= 0
    # later tokens are written into the slots that gradients of the query would come back through
    learns = torch.is_grad_enabled() and q_B1ND.requires_grad
    k_BHSD, v_BHSD = (x.to(dtype, copy=learns) for x in (cache.k, cache.v))
    if frequencies is not None:
        k_BHSD = _turned(k_BHSD, cache.positions, held_BHS, frequencies)
    q_BHGD = q_B1ND.to(dtype).view(batch, held_BHS.shape[1], -1, dim)
    score_BHGS = q_BHGD @ k_BHSD.mT * (dim**-0.5 if scale is None else scale)
    score_BHGS = score_BHGS.masked_fill(~held_BHS[:, :, None], -torch.inf)
    weights_BHGS = softmax_weights(score_BHGS, off_by_one)  # a row without tokens reads nothing
    note_weights(cache, policy, weights_BHGS, real_B)
    return (weights_BHGS @ v_BHSD).reshape(batch, 1, query_heads, dim).to(q_B1ND.dtype)


def _turned(k_BHSD: Tensor, positions_BHS: Tensor, held_BHS: Tensor, frequencies: Tensor) -> Tensor:
    """Keys turned back by the number of held tokens between them and the query, which is the last one."""
    empty_BH1 = (~held_BHS).sum(-1, keepdim=True)
    place_BHS = positions_BHS.argsort(-1).argsort(-1) - empty_BH1
    distance_BHS = held_BHS.sum(-1, keepdim=True) - 1 - place_BHS
    angle = distance_BHS[..., None].to(frequencies.dtype) * frequencies
    k1, k2 = k_BHSD.chunk(2, -1)
    return torch.cat([k1 * angle.cos() + k2 * angle.sin(), k2 * angle.cos() - k1 * angle.sin()], -1)


@torch.no_grad()
def observed_lifetimes(
    policy: Policy,
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    sinks: int,
    budget: int,
    layout: Layout | None = None,
    frequencies: Tensor | None = None,
    scale: float | None = None,
    off_by_one: bool = False,
) -> Tensor:
    """`lte.visibility.lifetimes` under an observing policy: decode every document in a cache, and see what is held.

    Args:
        q: [B, T, N, D]; k: [B, T, H, D], rotated where positions are rotary.
        window, sinks, budget: the rule, all finite.
        frequencies, scale, off_by_one: as in `observed_attention`.

    Returns:
        [B, T, H] int32; no gradient flows through the choice.
    """
    layout = layout or Layout()
    batch, length, heads, dim = k.shape
    document_BT, position_BT = (f(batch, length, k.device).clamp(min=0) for f in (layout.documents, layout.positions))
    row_BT, start_BT1, lengths = torch.arange(batch, device=k.device)[:, None], 0, layout.lengths
    if layout.is_packed:
        lengths = layout.cu_seqlens.diff().to(k.device)
        start_R = layout.cu_seqlens[:-1].to(device=k.device, dtype=torch.int64)
        index_RL = start_R[:, None] + torch.arange(int(lengths.max()), device=k.device)
        q, k = (x[0][index_RL.clamp(max=length - 1)] for x in (q, k))
        row_BT, start_BT1 = document_BT, start_R[document_BT][..., None]
    rows, longest = k.shape[:2]
    cache = RetainedCache(rows, heads, dim, window=window, sinks=sinks, budget=budget, dtype=k.dtype, device=k.device)
    end_RHL = torch.zeros(rows, heads, longest, dtype=torch.int64, device=k.device)
    for t in range(longest):
        token = slice(t, t + 1)
        real_R = None if lengths is None else lengths > t
        advance(cache, policy, k[:, token], k[:, token], real_R)
        _read(cache, policy, q[:, token], real_R, frequencies, scale, off_by_one)
        reads = cache.positions >= 0
        if real_R is not None:
            reads = reads & real_R[:, None, None]
        end_RHL.scatter_reduce_(2, cache.positions.clamp(min=0), torch.where(reads, t + 1, 0), "amax")
    end_BTH = end_RHL.transpose(1, 2)[row_BT, position_BT] + start_BT1
    return end_BTH.minimum(layout.document_ends(batch, length, k.device)[..., None]).to(torch.int32)
