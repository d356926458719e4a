"""The running budget's kernels against the rule in PyTorch, in integers; on a CPU through Triton's interpreter.

Shapes: B batch, T tokens, H KV heads, D head dimension, S slots.
"""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

pytest.importorskip("triton")

from lte.cache import RetainedCache  # noqa: E402
from lte.kernels.cache_chunk import cache_chunk  # noqa: E402
from lte.kernels.evictions import MAX_BUDGET, Tiles, retained_ends  # noqa: E402
from lte.layout import Layout  # noqa: E402
from lte.visibility import lifetimes, visible, visible_pairs  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
SMALL = Tiles(block=8, pool=32, warps=4)  # so that a few tokens are many blocks, and several coarse steps


def noise(*shape):
    return torch.randn(shape)


def halves(*shape):
    """Many equal logits."""
    return (torch.randn(shape) * 2).round() / 2


def rising(*shape):
    """Everybody gets in, and the oldest goes."""
    return torch.arange(1, shape[1] + 1, dtype=torch.float32)[None, :, None].expand(shape) / 7


def equal(*shape):
    """Nobody gets in once the budget is full."""
    return torch.ones(shape)


def negative(*shape):
    return -torch.rand(shape)


def extreme(*shape):
    """Infinite, denormal, zero and undefined logits among others."""
    x = torch.randn(shape)
    for i, value in enumerate((torch.inf, -torch.inf, 1e-44, 0.0, -0.0, torch.nan)):
        x[:, i::9] = value
    return x


def packed(*bounds):
    return Layout(cu_seqlens=torch.tensor(bounds))


def padded(*lengths):
    return Layout(lengths=torch.tensor(lengths))


# batch, tokens, heads, logits, window, sinks, budget, layout
CASES = {
    "noise": (1, 53, 2, noise, 7, 4, 3, None),
    "ties": (2, 41, 1, halves, 5, 0, 7, None),
    "budget 1, window 1": (1, 41, 1, halves, 1, 0, 1, None),
    "everybody gets in": (1, 67, 1, rising, 3, 2, 11, None),
    "everybody gets in, budget 1": (1, 20, 1, rising, 1, 0, 1, None),
    "all equal": (1, 60, 1, equal, 3, 1, 9, None),
    "nothing positive": (1, 40, 2, negative, 3, 1, 4, None),
    "extreme": (1, 60, 1, extreme, 3, 1, 8, None),
    "fewer than the budget": (1, 61, 1, halves, 40, 0, 20, None),
    "budget as large as the pool allows": (1, 61, 1, halves, 2, 0, 16, None),
    "budget larger than the pool": (1, 90, 1, noise, 2, 0, 37, None),
    "no limit": (2, 45, 3, halves, 7, 3, None, None),
    "no window": (1, 30, 2, halves, None, 3, 5, None),
    "one token": (2, 1, 3, equal, 7, 0, 1, None),
    "padded": (3, 46, 1, halves, 5, 2, 4, padded(46, 0, 23)),
    "padded, no limit": (2, 20, 1, halves, 5, 2, None, padded(3, 20)),
    "packed": (1, 101, 1, halves, 3, 1, 4, packed(0, 1, 1, 12, 14, 80, 80, 101)),
    "packed, coarse": (1, 95, 1, halves, 2, 0, 13, packed(0, 40, 41, 41, 95)),
    "packed, budget 1": (1, 30, 1, noise, 1, 0, 1, packed(0, 1, 2, 5, 9, 10, 30)),
    "packed, no limit": (1, 31, 2, halves, 3, 1, None, packed(0, 0, 9, 31)),
}
LARGE = {
    "4096": (2, 4096, 8, noise, 768, 4, 512, None),
    "4099, ties": (1, 4099, 3, halves, 768, 4, 512, None),
    "65536": (1, 65536, 8, noise, 768, 4, 512, None),
    "30011, everybody gets in": (1, 30011, 2, rising, 768, 0, 512, None),
    "20000, all equal": (1, 20000, 2, equal, 768, 0, 100, None),
    "9000, extreme": (1, 9000, 2, extreme, 100, 0, 300, None),
    "12000, budget 3": (1, 12000, 2, noise, 20, 4, 3, None),
    "12000, the largest budget": (1, 12000, 1, noise, 20, 4, MAX_BUDGET, None),
    "16384, padded": (3, 16384, 2, halves, 768, 4, 512, padded(16384, 0, 9001)),
    "30000, packed": (1, 30000, 2, noise, 768, 4, 512, packed(0, 1, 1, 3000, 3007, 16500, 16500, 29000, 30000)),
    "10000, packed, budget 3": (1, 10000, 2, halves, 5, 4, 3, packed(0, *range(9, 5000, 37), 10000)),
}


def make(case, device=DEVICE):
    batch, tokens, heads, draw, window, sinks, budget, layout = case
    torch.manual_seed(0)
    logits = draw(batch, tokens, heads)
    rule = {"window": window, "sinks": sinks, "budget": budget}
    on_device = layout
    if layout is not None:
        fields = {name: getattr(layout, name) for name in ("cu_seqlens", "lengths")}
        on_device = Layout(**{name: None if x is None else x.to(device) for name, x in fields.items()})
    return logits, rule, layout, on_device or Layout()


def ends(case, tiles):
    logits, rule, layout, on_device = make(case)
    window = logits.shape[1] if rule["window"] is None else min(rule["window"], logits.shape[1])
    got = retained_ends(logits.to(DEVICE), **{**rule, "window": window}, layout=on_device, tiles=tiles)
    batch, length, heads = logits.shape
    want = lifetimes(logits, batch=batch, length=length, heads=heads, layout=layout, **rule)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return got.cpu(), want


@pytest.mark.parametrize("name", CASES)
def test_ends(name):
    got, want = ends(CASES[name], SMALL)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["noise", "packed"])
def test_ends_are_the_rule(name):
    got, _ = ends(CASES[name], SMALL)
    logits, rule, layout, _ = make(CASES[name])
    batch, length, heads = logits.shape
    mask = visible(logits, batch=batch, length=length, heads=heads, layout=layout, **rule)
    assert torch.equal(visible_pairs(got, length), mask)


def test_ends_with_the_default_tiles():
    got, want = ends((1, 700, 1, noise, 30, 4, 60, None), None)
    assert torch.equal(got, want)


def test_ends_of_strided_half_precision_logits():
    torch.manual_seed(0)
    logits = halves(1, 2, 19).to(DEVICE, torch.float16).transpose(1, 2)
    got = retained_ends(logits, window=5, sinks=1, budget=4, layout=Layout(), tiles=SMALL)
    want = lifetimes(logits.cpu(), batch=1, length=19, heads=2, window=5, sinks=1, budget=4)
    assert torch.equal(got.cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_ends_of_long_rows(name):
    got, want = ends(LARGE[name], None)
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["65536", "16384, padded", "30000, packed"])
def test_the_device_is_not_waited_for(name):
    logits, rule, _, layout = make(LARGE[name])
    logits = logits.to(DEVICE)
    batch, length, heads = logits.shape
    torch.cuda.set_sync_debug_mode("error")
    try:
        end = lifetimes(logits, batch=batch, length=length, heads=heads, layout=layout, device=DEVICE, **rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(end.cpu(), ends(LARGE[name], None)[1])


def ordered(cache):
    """What a cache holds, its retained tokens by position: their slots are the cache's own affair."""
    first, ring = cache.sinks, cache.sinks + cache.budget
    order_BHR = cache.positions[:, :, first:ring].argsort(dim=-1, stable=True) + first
    slot_S = torch.arange(cache.slots, device=order_BHR.device)
    batch, heads = order_BHR.shape[:2]
    order_BHS = torch.cat(
        [slot_S[:first].expand(batch, heads, -1), order_BHR, slot_S[ring:].expand(batch, heads, -1)], 2
    )
    live_BHS1 = (cache.positions.gather(2, order_BHS) >= 0)[..., None]
    row_BHSD = order_BHS[..., None].expand(-1, -1, -1, cache.k.shape[3])
    flat = [x.gather(2, order_BHS).cpu() for x in (cache.positions, cache.logits)]
    return [*flat, *((x.gather(2, row_BHSD) * live_BHS1).cpu() for x in (cache.k, cache.v)), cache.seen.cpu()]


def same_chunks(rule, draw, chunks, *, batch, heads, dim, lookahead, tiles, seed=0):
    """Chunks of (tokens, lengths or None) into two caches, by the kernels and by PyTorch; slots shuffled between."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    want = RetainedCache(batch, heads, dim, lookahead=lookahead, **rule)
    got = RetainedCache(batch, heads, dim, lookahead=lookahead, device=DEVICE, **rule)
    first, ring = want.sinks, want.sinks + want.budget
    for tokens, lengths in chunks:
        k, v = (torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(2))
        scores = None if draw is None else draw(batch, tokens, heads)
        lengths = None if lengths is None else torch.tensor(lengths)
        span = want._chunk(k, v, scores, lengths)
        on_device = [None if x is None else x.to(DEVICE) for x in (k, v, scores, lengths)]
        parts = cache_chunk(got, *on_device, tiles=tiles)
        for name, x in zip(("k", "v", "end", "positions"), parts, strict=True):
            assert torch.equal(x.transpose(1, 2).cpu(), getattr(span, name)), name
        for name, x, y in zip(("positions", "logits", "k", "v", "seen"), ordered(got), ordered(want), strict=True):
            assert torch.equal(x, y), name
        shuffled = first + torch.randperm(want.budget, generator=generator)
        for x, y in zip(want.tensors[:4], got.tensors[:4], strict=True):
            x[:, :, first:ring] = x[:, :, shuffled]
            y.copy_(x)


CHUNKS = {
    "ties": ({"window": 8, "sinks": 4, "budget": 3}, halves, [(2, None), (27, [27, 3]), (9, None), (1, [0, 1])]),
    "budget 1": ({"window": 3, "sinks": 0, "budget": 1}, noise, [(9, [0, 4]), (21, None)]),
    "everybody gets in": ({"window": 3, "sinks": 1, "budget": 7}, rising, [(21, None), (37, [37, 20])]),
    "fewer than the budget": ({"window": 5, "sinks": 2, "budget": 30}, halves, [(20, None), (60, [20, 60])]),
    "nothing positive": ({"window": 5, "sinks": 2, "budget": 4}, negative, [(20, None), (11, [2, 11])]),
    "no scores": ({"window": 5, "sinks": 2, "budget": 4}, None, [(7, None), (11, [2, 11])]),
    "no budget": ({"window": 5, "sinks": 6, "budget": 0}, halves, [(4, [4, 1]), (11, None)]),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks(name):
    rule, draw, chunks = CHUNKS[name]
    same_chunks(rule, draw, chunks, batch=2, heads=1, dim=5, lookahead=2, tiles=SMALL)


def test_chunks_without_lookahead():
    rule = {"window": 4, "sinks": 1, "budget": 5}
    same_chunks(rule, halves, [(30, None), (7, [7])], batch=1, heads=2, dim=8, lookahead=0, tiles=SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("draw", [noise, halves, rising])
def test_long_chunks(draw):
    chunks = [(2048, None), (2048, [2048, 77]), (5000, None), (13, [1, 13]), (9000, [9000, 8999])]
    rule = {"window": 768, "sinks": 4, "budget": 512}
    same_chunks(rule, draw, chunks, batch=2, heads=3, dim=64, lookahead=6, tiles=None)


@pytest.mark.gpu
def test_appending_a_chunk_does_not_wait_for_the_device():
    torch.manual_seed(0)
    caches = [RetainedCache(2, 2, 16, window=20, sinks=4, budget=30, lookahead=6, device=d) for d in ("cpu", "cuda")]
    for tokens, lengths in ((300, None), (257, torch.tensor([257, 9]))):
        k, v, scores = torch.randn(2, tokens, 2, 16), torch.randn(2, tokens, 2, 16), halves(2, tokens, 2)
        want = caches[0].append(k, v, scores, lengths)
        on_device = [None if x is None else x.cuda() for x in (k, v, scores, lengths)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = caches[1].append(*on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got.end[:, caches[0].slots :].cpu(), want.end[:, caches[0].slots :])
        for x, y in zip(*map(ordered, caches), strict=True):
            assert torch.equal(x.cpu(), y)
