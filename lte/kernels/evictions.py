"""When a running budget evicts each token (arXiv 2510.20787): every head at once, without waiting for the device.

Tokens have distinct keys: the bits of a positive float32 are ordered as the number is, and a token's number in order
of arrival stands below them, so that of equal logits the earlier one has the larger key. 0 stands for no token. The
`budget` largest keys of what has arrived are held. What they start at only rises, so tokens are evicted from the
smallest key upwards, and once there are `budget` tokens each one that gets in evicts one. So within a block of
arrivals the k-th of the evicted tokens, by key, goes with the k-th arrival that got in.

Launches: keys; for rows longer than a pool the tokens held at coarse boundaries (lte/kernels/best_keys.py); and
blocks of arrivals, each of which finds its own held tokens from those at the last coarse boundary and the arrivals
since.

Letters in shape suffixes: B batch, T tokens, H KV heads, N = B·H, R held at the start (0 or budget), K = R + T keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.best_keys import compact, cut_at, held_at_boundaries, key_number, list_at, load_pool, make_key
from lte.kernels.launch import ceil_div, next_power_of_2, on_device
from lte.layout import Layout

# most tokens that the pool of a program holds beside those that arrive
MAX_BUDGET = 4096
NEVER = tl.constexpr(2**31 - 1)
LARGEST = tl.constexpr(2**63 - 1)


@dataclass(frozen=True)
class Tiles:
    """Arrivals of a block, keys that a program selects from (held ones included), and warps of a program.

    The pool is at least twice the budget.
    """

    block: int = 256
    pool: int = 4096
    warps: int = 8


@triton.jit
def _store_end(end_ptr, place_ptr, key, time, mask, held, bits, shift, stop, PLACED: tl.constexpr):
    """The tokens of `key` are evicted by arrival `time`."""
    place = key_number(key, bits)
    if PLACED:
        place = tl.load(place_ptr + place, mask=mask, other=0)
    tl.store(end_ptr + place, tl.minimum(time + shift, stop), mask=mask)


@triton.jit
def _admit(
    work_ptr, end_ptr, place_ptr, candidates, limit, held, budget, bits, shift,
    PLACED: tl.constexpr, PAD_BUDGET: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Lists the candidates that get in, behind the tokens held before; their number. Ends the others'."""
    list_ptr = work_ptr + PAD_BUDGET + BLOCK
    entered = 0
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    for at in range(0, candidates, ROWS):
        y = tl.load(list_ptr + at + row, mask=at + row < candidates, other=0)
        rank = tl.zeros([ROWS], tl.int32)
        for j in range(0, PAD_BUDGET, COLUMNS):
            rival = tl.load(work_ptr + j + column, mask=j + column < PAD_BUDGET, other=0)
            rank += tl.sum((rival[None, :] > y[:, None]).to(tl.int32), 1)
        for j in range(0, at + ROWS, COLUMNS):
            rival = tl.load(list_ptr + j + column, mask=j + column < candidates, other=0)
            earlier = (j + column)[None, :] < (at + row)[:, None]
            rank += tl.sum(((rival[None, :] > y[:, None]) & earlier).to(tl.int32), 1)
        enters = (y > 0) & (rank < budget)
        one = enters.to(tl.int32)
        tl.store(work_ptr + PAD_BUDGET + entered + tl.cumsum(one, 0) - one, y, mask=enters)
        entered += tl.sum(one, 0)
        out = (y > 0) & (rank >= budget)
        time = key_number(y, bits) - held
        _store_end(end_ptr, place_ptr, y, time, out, held, bits, shift, limit, PLACED)
    return entered


@triton.jit
def _evict(
    work_ptr, end_ptr, place_ptr, before, entered, limit, held, budget, bits, shift,
    PLACED: tl.constexpr, PAD_BUDGET: tl.constexpr, BLOCK: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Ends of the tokens that the arrivals which got in evict: smallest key first, one an arrival."""
    lane = tl.arange(0, BOTH)
    x = tl.load(work_ptr + lane, mask=lane < PAD_BUDGET + entered, other=0)
    cut, _ = cut_at(x, budget)
    losers_ptr = work_ptr + PAD_BUDGET + BLOCK
    compact(x, (x > 0) & (x < cut), losers_ptr, BLOCK)
    tl.debug_barrier()  # lists are read by other threads than wrote them
    evicted = before + entered - budget
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    for at in range(0, evicted, ROWS):
        mask = at + row < evicted
        y = tl.load(losers_ptr + at + row, mask=mask, other=0)
        number = tl.zeros([ROWS], tl.int32)
        for j in range(0, evicted, COLUMNS):
            rival = tl.load(losers_ptr + j + column, mask=j + column < evicted, other=LARGEST)
            number += tl.sum((rival[None, :] < y[:, None]).to(tl.int32), 1)
        # the first arrivals found a free place
        cause = tl.load(work_ptr + PAD_BUDGET + budget - before + number, mask=mask, other=0)
        time = key_number(cause, bits) - held
        _store_end(end_ptr, place_ptr, y, time, mask, held, bits, shift, limit, PLACED)


@triton.jit
def _evict_segment(
    row_ptr, lists_ptr, work_ptr, end_ptr, place_ptr, n, base, start, stop, limit, held, budget, bits, shift,
    slots, PLACED: tl.constexpr, PAD_BUDGET: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
    BOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The arrivals of one document [start, stop) in the block at `base`."""
    step: tl.constexpr = POOL - PAD_BUDGET
    first = tl.minimum(tl.maximum(base, start), stop)
    stop = tl.minimum(base + BLOCK, stop)
    boundary = start + tl.maximum(first - 1 - start, 0) // step * step
    held_ptr = row_ptr
    at_boundary = held
    if boundary > start:
        held_ptr = list_at(lists_ptr, n, boundary, slots, PAD_BUDGET, POOL)
        at_boundary = PAD_BUDGET
    x = load_pool(held_ptr, at_boundary, row_ptr + held + boundary, first - boundary, PAD_BUDGET, POOL)
    cut, count = cut_at(x, budget)
    compact(x, x >= cut, work_ptr, PAD_BUDGET)
    before = tl.minimum(count, budget)

    token = base + tl.arange(0, BLOCK)
    y = tl.load(row_ptr + held + token, mask=(token >= first) & (token < stop), other=0)
    out = (y > 0) & (y < cut)
    _store_end(end_ptr, place_ptr, y, token, out, held, bits, shift, limit, PLACED)
    candidates = tl.sum((y >= cut).to(tl.int32), 0)
    if before + candidates > budget:
        compact(y, y >= cut, work_ptr + PAD_BUDGET + BLOCK, BLOCK)
        tl.debug_barrier()  # lists are read by other threads than wrote them
        entered = _admit(
            work_ptr, end_ptr, place_ptr, candidates, limit, held, budget, bits, shift,
            PLACED, PAD_BUDGET, BLOCK, ROWS, COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        if before + entered > budget:
            _evict(
                work_ptr, end_ptr, place_ptr, before, entered, limit, held, budget, bits, shift,
                PLACED, PAD_BUDGET, BLOCK, BOTH, ROWS, COLUMNS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["held", "tokens", "budget", "bits", "window", "shift", "slots", "end_b", "end_h"])
def _blocks_kernel(
    keys_ptr, lists_ptr, work_ptr, end_ptr, place_ptr, start_ptr, stop_ptr, lengths_ptr, held, tokens, budget, bits,
    window, shift, slots, end_b, end_h, HEADS: tl.constexpr, PLACED: tl.constexpr, PACKED: tl.constexpr,
    PAD_BUDGET: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, BOTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    base = tl.program_id(0) * BLOCK
    row_ptr = keys_ptr + n * (held + tokens)
    work_ptr += (n * tl.num_programs(0) + tl.program_id(0)) * (PAD_BUDGET + 2 * BLOCK)
    end_ptr += n // HEADS * end_b + n % HEADS * end_h
    place_ptr += n * (held + tokens)
    if PACKED:
        lane = tl.arange(0, BLOCK)
        inside = base + lane < tokens
        start = tl.load(start_ptr + base + lane, mask=inside, other=0)
        stop = tl.load(stop_ptr + base + lane, mask=inside, other=0) - window
        # documents that may overflow their budget within this block
        rest = tl.where(tl.minimum(base + BLOCK, stop) - start > budget, lane, BLOCK)
        rest = tl.where(stop > base, rest, BLOCK)
        at = tl.min(rest, 0)
        while at < BLOCK:
            start_at = tl.load(start_ptr + base + at)
            limit = tl.load(stop_ptr + base + at)
            _evict_segment(
                row_ptr, lists_ptr, work_ptr, end_ptr, place_ptr, n, base, start_at, limit - window, limit, held,
                budget, bits, shift, slots, PLACED, PAD_BUDGET, POOL, BLOCK, BOTH, ROWS, COLUMNS,
            )  # fmt: skip
            tl.debug_barrier()  # the next document's lists go to the same place
            at = tl.min(tl.where(base + lane >= limit, rest, BLOCK), 0)
    else:
        limit = NEVER
        if lengths_ptr is not None:
            limit = tl.load(lengths_ptr + n // HEADS).to(tl.int32)
        elif not PLACED:
            limit = tokens
        _evict_segment(
            row_ptr, lists_ptr, work_ptr, end_ptr, place_ptr, n, base, 0, tokens - window, limit, held, budget, bits,
            shift, slots, PLACED, PAD_BUDGET, POOL, BLOCK, BOTH, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "window", "sinks", "bits", "logits_b", "logits_t", "logits_h"])
def _keys_kernel(
    logits_ptr, keys_ptr, end_ptr, start_ptr, stop_ptr, lengths_ptr, tokens, window, sinks, bits,
    logits_b, logits_t, logits_h,
    HEADS: tl.constexpr, PAD_HEADS: tl.constexpr, LIMITED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys of the tokens of a row [N, T], and their ends [B, H, T] as if nobody were evicted."""
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, PAD_HEADS)
    in_row = token < tokens
    position = token
    stop = tl.zeros([BLOCK], tl.int32) + tokens
    if PACKED:
        position -= tl.load(start_ptr + token, mask=in_row, other=0)
        stop = tl.load(stop_ptr + token, mask=in_row, other=0)
    if lengths_ptr is not None:
        stop = tl.zeros([BLOCK], tl.int32) + tl.load(lengths_ptr + b).to(tl.int32)
        stop = tl.where(token < stop, stop, 0)
    mask = in_row[:, None] & (head < HEADS)[None, :]
    at = logits_ptr + b * logits_b + token.to(tl.int64)[:, None] * logits_t + head[None, :] * logits_h
    key = make_key(tl.load(at, mask=mask, other=0.0), token[:, None], bits)
    key = tl.where(((position >= sinks) & (token < stop))[:, None], key, 0)
    at = (b * HEADS + head)[None, :] * tokens + token[:, None]
    if LIMITED:
        tl.store(keys_ptr + at, key, mask=mask)
    kept = (key > 0) | (position < sinks)[:, None]
    end = tl.where(kept, stop[:, None], tl.minimum(token + window, stop)[:, None])
    tl.store(end_ptr + at, end, mask=mask)


def evict(
    keys_NK: Tensor,
    end_BHS: Tensor,
    *,
    held: int,
    budget: int,
    bits: int,
    shift: int,
    window: int = 0,
    places_NK: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Writes the ends of all tokens that are evicted; entries of tokens that stay are left alone.

    Args:
        keys_NK: of the R = `held` tokens at the start, by position, then of the arrivals; 0 for none.
        end_BHS: int32, the last axis contiguous. A token's end is the number of the arrival that evicts it plus
            `shift`, but at most its limit.
        held: 0, or `budget`.
        bits: of the keys that hold the order.
        window: the last tokens of a document (of the row) that aren't arrivals.
        places_NK: int32 index in `end_BHS` of each key's token; None: its number. With places there is no limit.
        bounds: int32 [T] first token of each token's document, and one past the last: a budget is each document's.
        lengths: [B] limits; otherwise the document's end.

    Returns:
        [N, blocks, ·] int64 work space; with places there is one block more than arrivals need, and its first
        `budget` entries are the keys held at the end, zeros behind them.
    """
    rows, tokens = keys_NK.shape[0], keys_NK.shape[1] - held
    tiles = tiles or Tiles()
    assert bits <= 30, "more tokens than keys can tell apart"
    pad = next_power_of_2(budget)
    pool = max(tiles.pool, 2 * pad)
    arrivals = tokens if bounds is not None else tokens - window
    blocks = ceil_div(arrivals, tiles.block) + (places_NK is not None)
    device = keys_NK.device
    work = torch.empty(rows, blocks, pad + 2 * tiles.block, dtype=torch.int64, device=device)
    lists = work
    constants = dict(PACKED=bounds is not None, PAD_BUDGET=pad, POOL=pool, num_warps=tiles.warps, num_stages=1)
    with on_device(keys_NK):
        if tokens - window > pool - pad:
            lists = held_at_boundaries(
                keys_NK, bounds, held=held, budget=budget, window=window, pad=pad, pool=pool, warps=tiles.warps
            )
        _blocks_kernel[(blocks, rows)](
            keys_NK, lists, work, end_BHS, keys_NK if places_NK is None else places_NK,
            *(bounds or (None, None)), lengths, held, tokens, budget, bits, window, shift, lists.shape[1],
            end_BHS.stride(0), end_BHS.stride(1), HEADS=end_BHS.shape[1], PLACED=places_NK is not None,
            BLOCK=tiles.block, BOTH=next_power_of_2(pad + tiles.block), ROWS=min(16, tiles.block),
            COLUMNS=min(256, tiles.block), **constants,
        )  # fmt: skip
    return work


def retained_ends(
    logits: Tensor,
    *,
    window: int,
    sinks: int,
    budget: int | None,
    layout: Layout,
    tiles: Tiles | None = None,
) -> Tensor:
    """`lte.visibility.lifetimes` on the device: [B, T, H] int32.

    Args:
        logits: [B, T, H] in any floating-point dtype; they are compared in float32.
        window: at most T.
        budget: 1 to `MAX_BUDGET`, or None for no limit.
    """
    batch, length, heads = logits.shape
    device = logits.device
    limited = budget is not None and length - window > budget
    bounds = None
    if layout.is_packed:
        bounds = layout.once(("bounds", length, device), lambda: _document_bounds(layout, length, device))
    lengths = None if layout.lengths is None else layout.lengths.to(device)
    end_BHT = torch.empty(batch, heads, length, dtype=torch.int32, device=device)
    keys_NT = torch.empty(batch * heads, length if limited else 0, dtype=torch.int64, device=device)
    bits = length.bit_length()
    block = 64
    with on_device(logits):
        _keys_kernel[(ceil_div(length, block), batch)](
            logits.detach(), keys_NT, end_BHT, *(bounds or (None, None)), lengths, length, window, sinks, bits,
            *logits.stride(), HEADS=heads, PAD_HEADS=next_power_of_2(heads), LIMITED=limited,
            PACKED=layout.is_packed, BLOCK=block, num_warps=4,
        )  # fmt: skip
    if limited:
        evict(
            keys_NT, end_BHT, held=0, budget=budget, bits=bits, shift=window, window=window, bounds=bounds,
            lengths=lengths, tiles=tiles,
        )  # fmt: skip
    return end_BHT.transpose(1, 2)


def _document_bounds(layout: Layout, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First token of each token's document and one past the last, int32 [T] each."""
    cu_seqlens = layout.cu_seqlens.to(device=device, dtype=torch.int32)
    document_T = layout.documents(1, length, device)[0]
    return cu_seqlens[:-1][document_T], cu_seqlens[1:][document_T]
