"""Schedules for interval attention: which key tiles and which single keys ("columns") a block of queries reads.

Letters in shape suffixes: B batch, H KV heads, N = B·H, S keys, Q query blocks, P spans of query blocks,
K key tiles. Keys below `offset` are cache slots in any order; `first` is the index of query 0. A key tile k
holds the keys [k·KEYS − pad, (k+1)·KEYS − pad), pad = −offset mod KEYS, so that no tile mixes slots and tokens.

A block reads the columns before its "near" keys, those of its first query's window and after. Whole tiles of either
need no mask; columns left over and the near keys at both rims are put side by side ("ranks") into masked tiles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.kernels.launch import ceil_div, next_power_of_2

BIG = tl.constexpr(2**31 - 1)


class Tile(NamedTuple):
    """One kernel: query rows, keys, warps, pipeline stages, limit of registers a thread (None: the compiler's)."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Launch options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return dict(num_warps=self.warps, num_stages=self.stages, **limit)


@dataclass(frozen=True)
class Geometry:
    """Sizes of one call: `keys` = cache slots and earlier tokens + `tokens`; `offset` slots lie in any order."""

    batch: int
    tokens: int
    keys: int
    heads: int
    group: int
    dim: int
    offset: int
    window: int
    scale: float
    single: bool
    off_by_one: bool = False

    @property
    def first(self) -> int:
        """Index of query 0."""
        return self.keys - self.tokens

    @property
    def has_columns(self) -> bool:
        """False if near tiles cover every key."""
        return self.offset > 0 or self.window < self.keys - self.offset

    def constants(self) -> dict[str, int | str]:
        """Compile-time arguments that all attention kernels share."""
        pad_dim = max(16, next_power_of_2(self.dim))
        precision = "ieee" if self.single else "tf32"  # only read for float32 operands
        return dict(HEADS=self.heads, GROUP=self.group, DIM=self.dim, PAD_DIM=pad_dim, PRECISION=precision)


@dataclass(frozen=True)
class Columns:
    """All columns of every head.

    columns_NS: int32: ascending indices of the keys that are columns.
    prefix_NK1: int32: columns before each key tile, then all.
    width: keys of a tile.
    """

    columns_NS: Tensor
    prefix_NK1: Tensor
    width: int


@dataclass(frozen=True)
class Schedule:
    """What each query block of the forward (and dq) kernel reads.

    plan_NQ5: int32: first near tile with a live key (at most the diagonal's), first near tile that needs no mask,
        number of leading columns read without a mask, number of lasting columns, number of passing ones.
    columns_NPS: int32: per span of query blocks, the indices of the keys that can be seen there and lie before the
        near keys: from the front those that last to the end of the span, ascending; from the back those that pass
        within it, ascending too.
    span: query blocks in a span.
    rows, keys: of the tiles that it was made for.
    columns: all columns; None where near tiles cover every key, or if not asked for.
    """

    plan_NQ5: Tensor
    columns_NPS: Tensor
    span: int
    rows: int
    keys: int
    columns: Columns | None

    def fits(self, tile: Tile) -> bool:
        """Whether a kernel with these tiles can follow it."""
        return (self.rows, self.keys) == (tile.rows, tile.keys)


@triton.jit
def tile_shift(offset, KEYS: tl.constexpr):
    """(pad, number of slot tiles) of the key tiling."""
    pad = (KEYS - offset % KEYS) % KEYS
    return pad, (offset + pad) // KEYS


@triton.jit
def is_column(j, e, offset, first, window):
    """True where key j with end e outlives its window (or is a slot) and some query can still see it."""
    return ((e > j + window) | (j < offset)) & (e > first)


@triton.jit
def block_tokens(block, tokens, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """First and last token of a block of ROWS (token, head of the group) rows."""
    return block * ROWS // GROUP, tl.minimum((block * ROWS + ROWS - 1) // GROUP, tokens - 1)


@triton.jit
def near_tiles(t_first, t_last, offset, first, window, slot_tiles, KEYS: tl.constexpr):
    """Tile numbers: first near tile, first tile with a key after t_first, one past the tile of t_last."""
    u_first = t_first + first - offset
    near = slot_tiles + tl.maximum(u_first - window + 1, 0) // KEYS
    return near, slot_tiles + (u_first + 1) // KEYS, slot_tiles + (t_last + first - offset) // KEYS + 1


@triton.jit
def near_key(t_first, offset, first, window):
    """First near key of a block: older ones are seen only as columns."""
    return offset + tl.maximum(t_first + first - offset - window + 1, 0)


@triton.jit
def rank_columns(column):
    """Rank of each flagged key of a [tiles, keys] block in reading order, and flags per tile."""
    flag = column.to(tl.int32)
    per_tile = tl.sum(flag, 1)
    rank = (tl.cumsum(per_tile, 0) - per_tile)[:, None] + tl.cumsum(flag, 1) - flag
    return rank, per_tile


@triton.jit
def ranked_keys(rank, columns_ptr, lasting, passing, capacity, rim, low, upper):
    """Key of each rank: columns, the lasting ones first, `low` near keys from `rim` on, and those from `upper` on."""
    columns = lasting + passing
    at = tl.where(rank < lasting, rank, capacity - 1 - (rank - lasting))
    column = tl.load(columns_ptr + at, mask=rank < columns, other=0)
    near = rank - columns
    return tl.where(rank < columns, column, tl.where(near < low, rim + near, upper + near - low))


@triton.jit
def read_plan(plan_ptr, t_first, t_last, offset, first, window, KEYS: tl.constexpr):
    """What a block reads: the near tiles [full, diagonal), full_columns columns, and the masked ranks after them.

    Returns (full, diagonal, full_columns, lasting, passing, rim, low, upper, ranks), see `ranked_keys`. Keys before
    `upper` come before every query of the block.
    """
    lo = tl.load(plan_ptr)
    full = tl.load(plan_ptr + 1)
    full_columns = tl.load(plan_ptr + 2)
    lasting = tl.load(plan_ptr + 3)
    passing = tl.load(plan_ptr + 4)
    pad, slot_tiles = tile_shift(offset, KEYS)
    _, diagonal, _ = near_tiles(t_first, t_last, offset, first, window, slot_tiles, KEYS)
    rim = tl.maximum(lo * KEYS - pad, near_key(t_first, offset, first, window))
    low = tl.maximum(full * KEYS - pad - rim, 0)
    upper = tl.maximum(diagonal * KEYS - pad, rim)
    ranks = lasting + passing + low + first + t_last + 1 - upper
    return full, diagonal, full_columns, lasting, passing, rim, low, upper, ranks


@triton.jit(do_not_specialize=["tokens", "keys", "offset", "first", "window", "blocks", "tiles"])
def _schedule_kernel(
    end_ptr, all_ptr, prefix_ptr, plan_ptr, columns_ptr, tokens, keys, offset, first, window, blocks, tiles, capacity,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr, SCAN: tl.constexpr,
    LIST: tl.constexpr, HAS_COLUMNS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    # two counts in one integer: where the upper one begins, and the largest lower one
    HALF: tl.constexpr = 15
    LOWER: tl.constexpr = 2**15 - 1
    tl.static_assert(LIST <= LOWER)
    span = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    pad, slot_tiles = tile_shift(offset, KEYS)
    block = span * SPAN + tl.arange(0, SPAN)
    t_first, t_last = block_tokens(block, tokens, GROUP, ROWS)
    near, diagonal, stop = near_tiles(t_first, t_last, offset, first, window, slot_tiles, KEYS)
    last_block = tl.minimum(span * SPAN + SPAN, blocks) - 1
    span_first, span_last = block_tokens(span * SPAN, tokens, GROUP, ROWS)
    first_near, _, _ = near_tiles(span_first, span_last, offset, first, window, slot_tiles, KEYS)
    last_first, last_last = block_tokens(last_block, tokens, GROUP, ROWS)
    last_near, _, last_stop = near_tiles(last_first, last_last, offset, first, window, slot_tiles, KEYS)
    end_ptr += head * keys

    lasting = tl.zeros([SPAN], tl.int32)
    passing = tl.zeros([SPAN], tl.int32)
    if HAS_COLUMNS:
        all_ptr += head * keys
        prefix_ptr += head * (tiles + 1)
        columns_ptr += (head * tl.num_programs(0) + span) * capacity
        near_from = near_key(t_first, offset, first, window)
        last_near_from = near_key(last_first, offset, first, window)
        if LISTED:
            shared = tl.load(prefix_ptr + first_near)  # columns before the near keys of every block of the span
            listed = tl.load(prefix_ptr + last_near + 1)
        else:  # found among all keys
            shared = near_key(span_first, offset, first, window)
            listed = last_near_from
        front = 0
        back = capacity - 1
        for at0 in range(0, listed, LIST):
            at = at0 + tl.arange(0, LIST)
            j = at
            if LISTED:
                j = tl.load(all_ptr + at, mask=at < listed, other=0)
            e = tl.minimum(tl.load(end_ptr + j, mask=(at < listed) & (j < last_near_from), other=0), keys)
            if not LISTED:
                e = tl.where(is_column(j, e, offset, first, window), e, 0)
            lasts = (e > first + last_last).to(tl.int32)
            passes = (e > first + span_first).to(tl.int32) - lasts
            both = lasts + (passes << HALF)
            rank = tl.cumsum(both, 0) - both
            tl.store(columns_ptr + front + (rank & LOWER), j, mask=lasts > 0)
            tl.store(columns_ptr + back - (rank >> HALF), j, mask=passes > 0)
            count = tl.sum(both, 0)
            front += count & LOWER
            back -= count >> HALF
            if at0 + LIST <= shared:
                lasting += count & LOWER
                passing += count >> HALF
            else:
                before = j[None, :] < near_from[:, None]
                counts = tl.sum(tl.where(before, both[None, :], 0), 1)
                lasting += counts & LOWER
                passing += counts >> HALF

    live_from = diagonal
    # a tile in which the near keys begin isn't read whole: it may hold columns that are listed
    full_from = near + (near * KEYS - pad < near_key(t_first, offset, first, window)).to(tl.int32)
    for tile0 in range(first_near, last_stop, SCAN):
        tile = tile0 + tl.arange(0, SCAN)
        j = tile[:, None] * KEYS - pad + tl.arange(0, KEYS)[None, :]
        inside = (j >= 0) & (j < keys)
        e = tl.minimum(tl.load(end_ptr + j, mask=inside, other=0), keys)
        max_end = tl.max(e, 1)
        min_end = tl.min(tl.where(inside, e, BIG), 1)
        is_near = (tile[None, :] >= near[:, None]) & (tile[None, :] < stop[:, None])
        live_tile = is_near & (max_end[None, :] > (first + t_first)[:, None])
        live_from = tl.minimum(live_from, tl.min(tl.where(live_tile, tile[None, :], BIG), 1))
        cut = is_near & (min_end[None, :] <= (first + t_last)[:, None]) & (tile[None, :] < diagonal[:, None])
        full_from = tl.maximum(full_from, tl.max(tl.where(cut, tile[None, :] + 1, 0), 1))

    full_from = tl.minimum(tl.maximum(full_from, live_from), diagonal)
    plan_ptr += (head * blocks + block) * 5
    store = block < blocks
    tl.store(plan_ptr, live_from, mask=store)
    tl.store(plan_ptr + 1, full_from, mask=store)
    tl.store(plan_ptr + 2, lasting // KEYS * KEYS, mask=store)
    tl.store(plan_ptr + 3, lasting, mask=store)
    tl.store(plan_ptr + 4, passing, mask=store)


@triton.jit
def _count_columns(end_ptr, stop, keys, offset, first, window, STEP: tl.constexpr):
    """Columns among the keys below stop; summed up once, so that no step waits for the one before."""
    count = tl.zeros([STEP], tl.int32)
    for at in range(0, stop, STEP):
        j = at + tl.arange(0, STEP)
        e = tl.minimum(tl.load(end_ptr + j, mask=j < stop, other=0), keys)
        count += is_column(j, e, offset, first, window).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _columns_of(end_ptr, tile, pad, keys, offset, first, window, KEYS: tl.constexpr):
    """Indices of the keys of these tiles, and which are columns."""
    j = tile[:, None] * KEYS - pad + tl.arange(0, KEYS)[None, :]
    inside = (j >= 0) & (j < keys)
    e = tl.minimum(tl.load(end_ptr + j, mask=inside, other=0), keys)
    return j, inside & is_column(j, e, offset, first, window)


@triton.jit(do_not_specialize=["keys", "offset", "first", "window", "tiles"])
def _columns_kernel(
    end_ptr, columns_ptr, prefix_ptr, keys, offset, first, window, tiles,
    KEYS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """A program lists SCAN tiles; where its list begins it finds by counting all that come before."""
    head = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * SCAN
    pad, _slot_tiles = tile_shift(offset, KEYS)
    end_ptr += head * keys
    prefix_ptr += head * (tiles + 1)
    total = _count_columns(end_ptr, own * KEYS - pad, keys, offset, first, window, 4 * SCAN * KEYS)
    tile = own + tl.arange(0, SCAN)
    j, column = _columns_of(end_ptr, tile, pad, keys, offset, first, window, KEYS)
    rank, per_tile = rank_columns(column)
    tl.store(columns_ptr + head * keys + total + rank, j, mask=column)
    tl.store(prefix_ptr + tile, total + tl.cumsum(per_tile, 0) - per_tile, mask=tile < tiles)
    if own + SCAN >= tiles:
        tl.store(prefix_ptr + tiles, total + tl.sum(per_tile, 0))


def build_schedule(
    end_NS: Tensor, sizes: Geometry, tile: Tile, *, span_tokens: int, scan: int, listed: bool = True
) -> Schedule:
    """Schedule of all query blocks; no host synchronisation.

    Two launches, the first for the list of all columns; one if not `listed`, where every span looks at all earlier
    keys instead of the columns among them.
    A span covers at least `span_tokens` tokens, and there are at most head_dim of them: the lists take no more
    memory than k and v do in bfloat16. A program of the first launch lists `scan` keys.
    """
    columns = list_columns(end_NS, sizes, tile.keys, scan=scan) if sizes.has_columns and listed else None
    blocks = ceil_div(sizes.tokens * sizes.group, tile.rows)
    wanted = max(ceil_div(span_tokens * sizes.group, tile.rows), ceil_div(blocks, sizes.dim))
    span = next_power_of_2(wanted)
    spans = ceil_div(blocks, span)
    heads, capacity = end_NS.shape[0], sizes.keys if sizes.has_columns else 1
    plan_NQ5 = torch.empty(heads, blocks, 5, dtype=torch.int32, device=end_NS.device)
    columns_NPS = torch.empty(heads, spans, capacity, dtype=torch.int32, device=end_NS.device)
    # without columns, or a list of them, neither is read
    lists = (end_NS, end_NS) if columns is None else (columns.columns_NS, columns.prefix_NK1)
    _schedule_kernel[(spans, heads)](
        end_NS, *lists, plan_NQ5, columns_NPS,
        sizes.tokens, sizes.keys, sizes.offset, sizes.first, sizes.window, blocks, _key_tiles(sizes, tile.keys),
        capacity, GROUP=sizes.group, ROWS=tile.rows, KEYS=tile.keys, SPAN=span, SCAN=max(1, scan // 4 // tile.keys),
        LIST=max(16, scan // 4), HAS_COLUMNS=sizes.has_columns, LISTED=listed, num_warps=8,
    )  # fmt: skip
    return Schedule(plan_NQ5, columns_NPS, span, tile.rows, tile.keys, columns)


def _key_tiles(sizes: Geometry, width: int) -> int:
    """Tiles of `width` keys."""
    return ceil_div(sizes.keys + -sizes.offset % width, width)


def list_columns(end_NS: Tensor, sizes: Geometry, width: int, *, scan: int) -> Columns:
    """All columns of every head; key tiles are `width` keys wide."""
    heads, tiles = end_NS.shape[0], _key_tiles(sizes, width)
    columns_NS = torch.empty(heads, sizes.keys, dtype=torch.int32, device=end_NS.device)
    prefix_NK1 = torch.empty(heads, tiles + 1, dtype=torch.int32, device=end_NS.device)
    at_once = max(1, scan // width)
    _columns_kernel[(ceil_div(tiles, at_once), heads)](
        end_NS, columns_NS, prefix_NK1,
        sizes.keys, sizes.offset, sizes.first, sizes.window, tiles,
        KEYS=width, SCAN=at_once, num_warps=8,
    )  # fmt: skip
    return Columns(columns_NS, prefix_NK1, width)
