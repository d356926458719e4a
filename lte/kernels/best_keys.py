"""The best keys among those that have arrived: what programs of the running budget share (lte/kernels/evictions.py).

A key is an int64, larger for the better token, 0 for none; no two are equal. A pool is what a program selects from in
its registers. A coarse boundary is a token at a whole number of steps from its document's start, a step being the
pool without the held tokens.

Letters in shape suffixes: N rows (batch · heads), K keys of a row, L coarse boundaries, R the budget, padded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(2**63 - 1)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def make_key(logit, number, bits):
    """Keys of logits in order of arrival `number`; 0 unless the logit is positive."""
    image = logit.to(tl.float32).to(tl.int32, bitcast=True)
    key = (image.to(tl.int64) << bits) + ((1 << bits) - 1 - number)
    return tl.where((image > 0) & (image <= INFINITY_BITS), key, 0)


@triton.jit
def key_number(key, bits):
    """Order of arrival of a key's token."""
    last = (1 << bits) - 1
    return last - (key & last).to(tl.int32)


@triton.jit
def cut_at(x, budget):
    """A number that `budget` of the keys x reach (1 if there are fewer keys), and the number of keys."""
    count = tl.sum((x > 0).to(tl.int32), 0)
    low = tl.min(tl.where(x > 0, x, LARGEST), 0)
    high = tl.max(x, 0) + 1
    cut = tl.where(count < budget, 1, low)
    searching = count > budget
    while searching:
        cut = low + (high - low) // 2
        reach = tl.sum((x >= cut).to(tl.int32), 0)
        low = tl.where(reach > budget, cut, low)
        high = tl.where(reach < budget, cut, high)
        searching = (reach != budget) & (high - low > 1)
    return cut, count


@triton.jit
def compact(x, flag, ptr, SIZE: tl.constexpr):
    """Flagged entries of x to ptr[:SIZE], zeros behind them."""
    one = flag.to(tl.int32)
    tl.store(ptr + tl.cumsum(one, 0) - one, x, mask=flag)
    lane = tl.arange(0, SIZE)
    tl.store(ptr + lane, tl.zeros([SIZE], tl.int64), mask=lane >= tl.sum(one, 0))


@triton.jit
def load_pool(held_ptr, held, keys_ptr, count, PAD_BUDGET: tl.constexpr, POOL: tl.constexpr):
    """`held` keys, and up to POOL - PAD_BUDGET others behind them."""
    lane = tl.arange(0, POOL)
    x = tl.load(held_ptr + lane, mask=lane < held, other=0)
    at = lane - PAD_BUDGET
    return x + tl.load(keys_ptr + at, mask=(at >= 0) & (at < count), other=0)


@triton.jit
def list_at(lists_ptr, n, boundary, slots, PAD_BUDGET: tl.constexpr, POOL: tl.constexpr):
    """Where the list of a coarse boundary is. Those of a document have slots in a row, none shares one."""
    return lists_ptr + (n * slots + boundary // (POOL - PAD_BUDGET)) * PAD_BUDGET


@triton.jit
def boundary_of(
    slot, start_ptr, stop_ptr, tokens, window, PACKED: tl.constexpr, STEP: tl.constexpr, POOL: tl.constexpr
):
    """The coarse boundary of a slot, -1 if it has none, and the first token of its document."""
    boundary = slot * STEP
    start = 0
    if PACKED:
        token = slot * STEP + tl.arange(0, POOL)
        mask = (token < tokens) & (token < slot * STEP + STEP)
        first = tl.load(start_ptr + token, mask=mask, other=0)
        stop = tl.load(stop_ptr + token, mask=mask, other=0) - window
        hit = mask & (token > first) & (token < stop) & ((token - first) % STEP == 0)
        boundary = tl.max(tl.where(hit, token, -1), 0)
        start = tl.max(tl.where(hit, first, 0), 0)
    elif (slot == 0) | (boundary >= tokens - window):
        boundary = -1
    return boundary, start


@triton.jit(do_not_specialize=["held", "tokens", "budget", "window"])
def _local_kernel(
    keys_ptr, lists_ptr, start_ptr, stop_ptr, held, tokens, budget, window,
    PACKED: tl.constexpr, PAD_BUDGET: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """The best of the tokens between a coarse boundary and the one before."""
    n = tl.program_id(1).to(tl.int64)
    step: tl.constexpr = POOL - PAD_BUDGET
    boundary, _ = boundary_of(tl.program_id(0), start_ptr, stop_ptr, tokens, window, PACKED, step, POOL)
    if boundary >= 0:
        keys_ptr += n * (held + tokens) + held + boundary - step
        x = load_pool(keys_ptr, 0, keys_ptr, step, PAD_BUDGET, POOL)
        cut, _ = cut_at(x, budget)
        compact(x, x >= cut, list_at(lists_ptr, n, boundary, tl.num_programs(0), PAD_BUDGET, POOL), PAD_BUDGET)


@triton.jit(do_not_specialize=["held", "tokens", "budget", "window"])
def _coarse_kernel(
    keys_ptr, local_ptr, lists_ptr, start_ptr, stop_ptr, held, tokens, budget, window,
    PACKED: tl.constexpr, PAD_BUDGET: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """The tokens held at a coarse boundary: the best of those held at the start and of all lists up to it."""
    n = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    step: tl.constexpr = POOL - PAD_BUDGET
    boundary, start = boundary_of(tl.program_id(0), start_ptr, stop_ptr, tokens, window, PACKED, step, POOL)
    if boundary >= 0:
        list_ptr = list_at(lists_ptr, n, boundary, slots, PAD_BUDGET, POOL)
        first_ptr = list_at(local_ptr, n, start + step, slots, PAD_BUDGET, POOL)
        count = (boundary - start) // step * PAD_BUDGET
        x = load_pool(keys_ptr + n * (held + tokens), held, first_ptr, count, PAD_BUDGET, POOL)
        cut, _ = cut_at(x, budget)
        compact(x, x >= cut, list_ptr, PAD_BUDGET)
        for at in range(step, count, step):
            tl.debug_barrier()  # the list is read by other threads than wrote it
            x = load_pool(list_ptr, PAD_BUDGET, first_ptr + at, count - at, PAD_BUDGET, POOL)
            tl.debug_barrier()  # and overwritten
            cut, _ = cut_at(x, budget)
            compact(x, x >= cut, list_ptr, PAD_BUDGET)


def held_at_boundaries(
    keys_NK: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    *,
    held: int,
    budget: int,
    window: int,
    pad: int,
    pool: int,
    warps: int,
) -> Tensor:
    """The tokens held at every coarse boundary: [N, L, pad] keys, zeros behind them; arguments as in `evict`."""
    rows, tokens = keys_NK.shape[0], keys_NK.shape[1] - held
    slots = tokens // (pool - pad) + 1
    local_NLR, lists_NLR = torch.empty(2, rows, slots, pad, dtype=torch.int64, device=keys_NK.device)
    sizes = (*(bounds or (None, None)), held, tokens, budget, window)
    constants = dict(PACKED=bounds is not None, PAD_BUDGET=pad, POOL=pool, num_warps=warps, num_stages=1)
    _local_kernel[(slots, rows)](keys_NK, local_NLR, *sizes, **constants)
    _coarse_kernel[(slots, rows)](keys_NK, local_NLR, lists_NLR, *sizes, **constants)
    return lists_NLR
