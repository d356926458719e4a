"""A chunk of tokens into a `RetainedCache`: who reads what, who is evicted, and the slots afterwards.

One kernel before the evictions (lte/kernels/evictions.py) and one behind them; nothing waits for the device. Where a
token lies is the index of a slot, or the number of slots plus its number in the chunk.

Letters in shape suffixes: B batch, T new tokens, H KV heads, D head dimension, N = B·H, S slots,
R retained slots, K = R + T keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.best_keys import key_number, make_key
from lte.kernels.evictions import Tiles, evict
from lte.kernels.launch import on_device

if TYPE_CHECKING:
    from lte.cache import RetainedCache

NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def _row_of(seen_ptr, lengths_ptr, b, length):
    """Tokens of a row before the chunk, and in it."""
    new = length.to(tl.int64)
    if lengths_ptr is not None:
        new = tl.load(lengths_ptr + b).to(tl.int64)
    return tl.load(seen_ptr + b), new


@triton.jit
def _store_keys(
    first, positions_ptr, logits_ptr, scores_ptr, keys_ptr, places_ptr, seen, new, length, window, sinks, budget,
    lookahead, bits, scores_t, BLOCK: tl.constexpr, RIVALS: tl.constexpr,
):  # fmt: skip
    """Keys and places of the retained tokens, by position, and of the tokens that leave the window."""
    slots = sinks + budget + window
    lane = first + tl.arange(0, BLOCK)
    if first < budget:
        own = lane < budget
        position = tl.load(positions_ptr + sinks + lane, mask=own, other=0)
        number = tl.zeros([BLOCK], tl.int32)
        for at in range(0, budget, RIVALS):
            other = at + tl.arange(0, RIVALS)
            rival = tl.load(positions_ptr + sinks + other, mask=other < budget, other=2**62)
            lower = rival[None, :] < position[:, None]
            # empty slots have one position: by slot
            equal = (rival[None, :] == position[:, None]) & (other[None, :] < lane[:, None])
            number += tl.sum((lower | equal).to(tl.int32), 1)
        logit = tl.load(logits_ptr + sinks + lane, mask=own, other=0.0)
        tl.store(keys_ptr + number, make_key(logit, number, bits), mask=own)
        tl.store(places_ptr + number, sinks + lane, mask=own)
    if first < length:
        position = seen + lane - window
        inside = (lane < new) & (lane < length) & (position >= sinks)
        place = tl.where(lane < window, sinks + budget + tl.maximum(position, 0) % window, slots + lane - window)
        # the score of a token comes with the one `lookahead` after it: before the chunk, or in it
        score = lane - window + lookahead
        logit = tl.load(logits_ptr + place, mask=inside & (score < 0), other=0.0)
        logit += tl.load(scores_ptr + score.to(tl.int64) * scores_t, mask=inside & (score >= 0), other=0.0)
        key = tl.where(inside, make_key(logit, budget + lane, bits), 0)
        tl.store(keys_ptr + budget + lane, key, mask=lane < length)
        tl.store(places_ptr + budget + lane, place.to(tl.int32), mask=lane < length)


@triton.jit(do_not_specialize=["length", "window", "sinks", "budget", "lookahead", "bits", "scores_b", "scores_h"])
def _start_kernel(
    positions_ptr, logits_ptr, seen_ptr, lengths_ptr, scores_ptr, position_ptr, logit_ptr, end_ptr, keys_ptr,
    places_ptr, length, window, sinks, budget, lookahead, bits, scores_b, scores_t, scores_h,
    HEADS: tl.constexpr, RETAINS: tl.constexpr, BLOCK: tl.constexpr, RIVALS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    b = n // HEADS
    first = tl.program_id(0) * BLOCK
    slots = sinks + budget + window
    seen, new = _row_of(seen_ptr, lengths_ptr, b, length)
    positions_ptr += n * slots
    logits_ptr += n * slots
    place = first + tl.arange(0, BLOCK)
    is_slot = place < slots
    inside = place < slots + length
    fresh = tl.where(place - slots < new, seen + place - slots, -1)
    position = tl.where(is_slot, tl.load(positions_ptr + place, mask=is_slot, other=-1), fresh)
    logit = tl.load(logits_ptr + place, mask=is_slot, other=float("-inf"))
    leaves = position + window - seen
    stays = (position < sinks) | (leaves >= length) | ((place >= sinks) & (place < sinks + budget))
    if RETAINS:
        scores_ptr += b * scores_b + n % HEADS * scores_h
        score = position + lookahead - seen
        scored = inside & (position >= sinks) & (score >= 0) & (score < new)
        logit = tl.where(scored, tl.load(scores_ptr + score * scores_t, mask=scored, other=0.0).to(tl.float32), logit)
        stays |= (logit > 0) & (leaves < new)  # unless it is evicted
        _store_keys(
            first, positions_ptr, logits_ptr, scores_ptr, keys_ptr + n * (budget + length),
            places_ptr + n * (budget + length), seen, new, length, window, sinks, budget, lookahead, bits, scores_t,
            BLOCK, RIVALS,
        )  # fmt: skip
    end = tl.where(position >= 0, tl.where(stays, NEVER, slots + leaves), 0).to(tl.int32)
    at = n * (slots + length) + place
    tl.store(position_ptr + at, position, mask=inside)
    tl.store(logit_ptr + at, logit, mask=inside)
    tl.store(end_ptr + at, end, mask=inside)


@triton.jit(do_not_specialize=["length", "window", "sinks", "budget", "bits", "survivors_n"])
def _commit_kernel(
    k_ptr, v_ptr, positions_ptr, logits_ptr, seen_ptr, lengths_ptr, new_k_ptr, new_v_ptr, position_ptr, logit_ptr,
    survivors_ptr, places_ptr, length, window, sinks, budget, bits, survivors_n,
    HEADS: tl.constexpr, RETAINS: tl.constexpr, DIM: tl.constexpr, PAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every slot takes what lies at one of the places, or stays empty."""
    n = tl.program_id(1).to(tl.int64)
    slots = sinks + budget + window
    first_ring = sinks + budget
    seen, new = _row_of(seen_ptr, lengths_ptr, n // HEADS, length)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    place = slot.to(tl.int64)
    place = tl.where((slot < sinks) & (slot >= seen) & (slot < seen + new), slots + slot - seen, place)
    # the newest token of each ring slot's residue
    age = (seen + new - 1 - (slot - first_ring)) % window
    newest = seen + new - 1 - tl.where(age < 0, age + window, age)
    is_new = (slot >= first_ring) & (newest >= seen) & (newest >= sinks)
    place = tl.where(is_new, slots + newest - seen, place)
    empty = slot < 0
    if RETAINS:
        retained = (slot >= sinks) & (slot < first_ring)
        key = tl.load(survivors_ptr + n * survivors_n + slot - sinks, mask=retained, other=0)
        number = key_number(key, bits)
        kept = tl.load(places_ptr + n * (budget + length) + number, mask=key > 0, other=0)
        place = tl.where(key > 0, kept.to(tl.int64), place)
        empty = retained & (key == 0)
    from_ptr = n * (slots + length) + place
    position = tl.load(position_ptr + from_ptr, mask=inside & ~empty, other=-1)
    logit = tl.load(logit_ptr + from_ptr, mask=inside & ~empty, other=float("-inf"))
    tl.store(positions_ptr + n * slots + slot, position, mask=inside)
    tl.store(logits_ptr + n * slots + slot, logit, mask=inside)
    dim = tl.arange(0, PAD_DIM)
    moves = (inside & ~empty & (place != slot))[:, None] & (dim < DIM)[None, :]
    source = from_ptr[:, None] * DIM + dim[None, :]
    target = (n * slots + slot)[:, None] * DIM + dim[None, :]
    tl.store(k_ptr + target, tl.load(new_k_ptr + source, mask=moves, other=0.0), mask=moves)
    tl.store(v_ptr + target, tl.load(new_v_ptr + source, mask=moves, other=0.0), mask=moves)


def cache_chunk(
    cache: RetainedCache,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    scores_BTH: Tensor | None,
    lengths_B: Tensor | None,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`RetainedCache.append` for a chunk, in place.

    Args:
        k_BHTD, v_BHTD: of the new tokens.
        scores_BTH: logits of the tokens `lookahead` earlier; None: nothing new will be retained.
        lengths_B: real tokens of each row, at its left; None: all T.

    Returns:
        k, v [B, H, S + T, D] as they were before the chunk and in it, end [B, H, S + T] int32 and positions
        [B, H, S + T] int64, -1 where there is nothing.
    """
    batch, heads, length, dim = k_BHTD.shape
    device, rows = cache.k.device, batch * heads
    k = torch.cat([cache.k, k_BHTD.to(cache.k.dtype)], 2)
    v = torch.cat([cache.v, v_BHTD.to(cache.v.dtype)], 2)
    retains = scores_BTH is not None and cache.budget > 0
    lengths_B = None if lengths_B is None else lengths_B.to(device)
    places = (batch, heads, cache.slots + length)
    position = torch.empty(places, dtype=torch.int64, device=device)
    logit = torch.empty(places, dtype=torch.float32, device=device)
    end = torch.empty(places, dtype=torch.int32, device=device)
    keys = cache.budget + length if retains else 0
    keys_NK = torch.empty(rows, keys, dtype=torch.int64, device=device)
    places_NK = torch.empty(rows, keys, dtype=torch.int32, device=device)
    bits = keys.bit_length()
    rule = (length, cache.window, cache.sinks, cache.budget)
    constants = dict(HEADS=heads, RETAINS=retains)
    with on_device(cache.k):
        _start_kernel[(triton.cdiv(cache.slots + length, 128), rows)](
            cache.positions, cache.logits, cache.seen, lengths_B, scores_BTH, position, logit, end, keys_NK,
            places_NK, *rule, cache.lookahead, bits, *(scores_BTH.stride() if retains else (0, 0, 0)),
            BLOCK=128, RIVALS=16, num_warps=4, **constants,
        )  # fmt: skip
        survivors = keys_NK
        if retains:
            work = evict(
                keys_NK, end, held=cache.budget, budget=cache.budget, bits=bits, shift=cache.slots,
                places_NK=places_NK, tiles=tiles,
            )  # fmt: skip
            survivors = work[:, -1]
        _commit_kernel[(triton.cdiv(cache.slots, 64), rows)](
            cache.k, cache.v, cache.positions, cache.logits, cache.seen, lengths_B, k, v, position, logit,
            survivors, places_NK, *rule, bits, survivors.stride(0), DIM=dim, PAD_DIM=triton.next_power_of_2(dim),
            BLOCK=64, num_warps=4, **constants,
        )  # fmt: skip
    cache.seen += length if lengths_B is None else lengths_B
    return k, v, end, position
