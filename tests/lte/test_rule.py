"""The rule: brute force against lifetimes, the op's backends, gradients, and the cache against the parallel form."""

import pytest
import torch

from lte.attention import in_cache_attention, interval_attention, retained_attention
from lte.cache import GrowingCache, RetainedCache
from lte.layout import Layout
from lte.straight_through import straight_through
from lte.visibility import evictions, lifetimes, visible, visible_pairs


def relative_rms(x, y):
    return ((x - y).pow(2).mean() / y.pow(2).mean().clamp(min=1e-30)).sqrt().item()


def random_logits(shape, seed=0, ties=True):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator)
    return (logits * 2).round() / 2 if ties else logits  # halves: many equal logits


RULES = [
    {"window": 7, "sinks": 4, "budget": 3},
    {"window": 1, "sinks": 0, "budget": 1},
    {"window": 9, "sinks": 2, "budget": None},
    {"window": 5, "sinks": 4, "budget": 0},
    {"window": None, "sinks": 0, "budget": None},
    {"window": 300, "sinks": 3, "budget": 5},
    {"window": 13, "sinks": 0, "budget": 64},
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 3, 61, 200])
def test_lifetimes_are_the_rule(rule, length):
    logits = random_logits((2, length, 3))
    mask = visible(logits, batch=2, length=length, heads=3, **rule)
    end = lifetimes(logits, batch=2, length=length, heads=3, **rule)
    assert torch.equal(visible_pairs(end, length), mask)


@pytest.mark.parametrize("rule", RULES)
def test_lifetimes_of_packed_documents(rule):
    lengths = [1, 2, 7, 90, 0, 33]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    total = int(bounds[-1])
    logits = random_logits((1, total, 2))
    layout = Layout(cu_seqlens=bounds)
    mask = visible(logits, batch=1, length=total, heads=2, layout=layout, **rule)
    end = lifetimes(logits, batch=1, length=total, heads=2, layout=layout, **rule)
    assert torch.equal(visible_pairs(end, total), mask)
    # and each document alone
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if stop > start:
            alone = visible(logits[:, start:stop], batch=1, length=stop - start, heads=2, **rule)
            assert torch.equal(mask[:, :, start:stop, start:stop], alone)
            assert not mask[:, :, start:stop, :start].any()


def test_lifetimes_of_padded_rows():
    logits = random_logits((3, 40, 2))
    layout = Layout(lengths=torch.tensor([40, 17, 0]))
    rule = {"window": 5, "sinks": 2, "budget": 3}
    mask = visible(logits, batch=3, length=40, heads=2, layout=layout, **rule)
    end = lifetimes(logits, batch=3, length=40, heads=2, layout=layout, **rule)
    pairs = visible_pairs(end, 40)
    for row, real in enumerate([40, 17, 0]):
        assert torch.equal(pairs[row, :, :real], mask[row, :, :real])
        assert not pairs[row, :, real:].any()


@pytest.mark.parametrize("block", [1, 3, 16, 256])
def test_eviction_moments_do_not_depend_on_the_block(block):
    logits = random_logits((2, 150, 2))
    logits = logits.masked_fill(logits <= 0, -torch.inf)
    assert torch.equal(evictions(logits, 6, 4, block=block), evictions(logits, 6, 4, block=37))


def test_an_overflowing_budget_keeps_the_best_and_breaks_ties_by_position():
    logits = torch.tensor([1.0, 2.0, 2.0, 1.0, 3.0, -1.0, 0.5])[None, :, None]
    mask = visible(logits, batch=1, length=7, heads=1, window=1, sinks=0, budget=2)[0, 0]
    readable = [row.nonzero().flatten().tolist() for row in mask]
    assert readable == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [1, 2, 4], [1, 4, 5], [1, 4, 6]]


@pytest.mark.parametrize("backend", ["reference", "flex"])
@pytest.mark.parametrize(("query_heads", "heads", "dim"), [(2, 2, 16), (6, 2, 20)])
def test_backends_agree_with_the_mask(backend, query_heads, heads, dim):
    torch.manual_seed(0)
    length = 77
    q, k, v = (torch.randn(2, length, n, dim) for n in (query_heads, heads, heads))
    logits = random_logits((2, length, heads))
    rule = {"window": 7, "sinks": 4, "budget": 3}
    out = retained_attention(q, k, v, logits, backend=backend, **rule)
    mask = visible(logits, batch=2, length=length, heads=heads, **rule).repeat_interleave(query_heads // heads, 1)
    k, v = (x.repeat_interleave(query_heads // heads, 2).transpose(1, 2) for x in (k, v))
    score = (q.transpose(1, 2) @ k.transpose(-1, -2)) * dim**-0.5
    expected = (score.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    assert relative_rms(out, expected) < 1e-5


def test_gradients_against_float64_and_the_straight_through_rule():
    torch.manual_seed(0)
    length, heads, dim = 45, 2, 8
    rule = {"window": 7, "sinks": 2, "budget": None}
    logits = random_logits((1, length, heads), ties=False)
    data = [torch.randn(1, length, n, dim) for n in (4, heads, heads)]
    weight = torch.randn(1, length, 4, dim)

    def gradients(dtype, explicit):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in data)
        z = logits.to(dtype, copy=True).requires_grad_()
        if explicit:
            # v as if multiplied by r, at the point r = 1: the estimator's definition, written out
            r = z.sigmoid()
            value = v * (r / r.detach())[..., None]
            end = lifetimes(z, batch=1, length=length, heads=heads, **rule)
            mask = visible_pairs(end, length).repeat_interleave(2, 1)
            kk, vv = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, value))
            score = (q.transpose(1, 2) @ kk.transpose(-1, -2)) * dim**-0.5
            out = (score.masked_fill(~mask, -torch.inf).softmax(-1) @ vv).transpose(1, 2)
        else:
            out = retained_attention(q, k, v, z, backend="reference", **rule)
        (out * weight.to(dtype)).sum().backward()
        grads = [q.grad, k.grad, v.grad, z.grad]
        if explicit:
            # d(r / r0) = dr / r0: the estimator's gradient is dr itself
            grads[3] = grads[3] * z.detach().sigmoid()
        return grads

    for got, expected in zip(gradients(torch.float32, False), gradients(torch.float64, True), strict=True):
        assert relative_rms(got.double(), expected) < 1e-5


def test_straight_through_passes_values_unchanged():
    v, z = torch.randn(1, 5, 2, 3, requires_grad=True), torch.randn(1, 5, 2, requires_grad=True)
    out = straight_through(v, z)
    assert torch.equal(out, v)
    g = torch.randn_like(v)
    out.backward(g)
    r = z.sigmoid()
    assert torch.equal(v.grad, g)
    torch.testing.assert_close(z.grad, ((g * v).sum(-1) * r * (1 - r)).detach())


def test_packed_attention_equals_each_document_alone():
    torch.manual_seed(0)
    lengths = [1, 2, 7, 300]
    bounds = torch.tensor([0, 1, 3, 10, 310], dtype=torch.int32)
    q, k, v = (torch.randn(1, 310, n, 8) for n in (4, 2, 2))
    logits = random_logits((1, 310, 2))
    rule = {"window": 9, "sinks": 3, "budget": 4}
    for backend in ("reference", "flex"):
        out = retained_attention(q, k, v, logits, cu_seqlens=bounds, backend=backend, **rule)
        start = 0
        for n in lengths:
            piece = slice(start, start + n)
            alone = retained_attention(q[:, piece], k[:, piece], v[:, piece], logits[:, piece], **rule)
            assert relative_rms(out[:, piece], alone) < 1e-5
            start += n


def delayed(logits, seen, length, lookahead):
    """What the streaming scorer gives for tokens seen .. seen + length: scores `lookahead` late."""
    batch, _, heads = logits.shape
    out = torch.full((batch, length, heads), 7.5)  # meaningless entries must have no effect
    for b in range(batch):
        for t in range(length):
            j = int(seen[b]) + t - lookahead
            if 0 <= j < logits.shape[1]:
                out[b, t] = logits[b, j]
    return out


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "rule",
    [
        {"window": 8, "sinks": 4, "budget": 3},
        {"window": 7, "sinks": 0, "budget": 1},
        {"window": 30, "sinks": 2, "budget": 40},
        {"window": 8, "sinks": 4, "budget": 0},
    ],
)
def test_cached_chunks_equal_the_parallel_form(rule, seed):
    """Any split of 200 tokens, rows of different lengths, single steps among them."""
    generator = torch.Generator().manual_seed(seed)
    total, batch, heads, dim, lookahead = 200, 3, 2, 8, 6
    q, k, v = (torch.randn(batch, total, n, dim, generator=generator) for n in (4, heads, heads))
    logits = random_logits((batch, total, heads), seed=seed)
    expected = retained_attention(q, k, v, logits, **rule)
    cache = RetainedCache(batch, heads, dim, lookahead=lookahead, **rule)
    addresses = [x.data_ptr() for x in cache.tensors]
    seen = torch.zeros(batch, dtype=torch.int64)
    while int(seen.max()) < total:
        size = int(torch.randint(1, 60, (), generator=generator)) if torch.rand((), generator=generator) < 0.5 else 1
        if size == 1 and int(seen.max()) < total:
            lengths, count = None, torch.ones(batch, dtype=torch.int64)
        else:
            lengths = torch.randint(0, size + 1, (batch,), generator=generator)
            lengths = lengths.minimum(total - seen)
            count = lengths
        index = (seen[:, None] + torch.arange(size)).clamp(max=total - 1)
        row = torch.arange(batch)[:, None]
        span = cache.append(k[row, index], v[row, index], delayed(logits, seen, size, lookahead), lengths)
        out = interval_attention(q[row, index], span.k, span.v, span.end, window=rule["window"])
        for b in range(batch):
            n = int(count[b].minimum(total - seen[b]))
            if n:
                torch.testing.assert_close(out[b, :n], expected[b, seen[b] : seen[b] + n], atol=2e-6, rtol=1e-5)
        seen = seen + count
        assert torch.equal(cache.seen, seen)
    assert [x.data_ptr() for x in cache.tensors] == addresses


def test_full_attention_cache_equals_the_parallel_form():
    torch.manual_seed(0)
    total, batch = 150, 2
    q, k, v = (torch.randn(batch, total, n, 8) for n in (4, 2, 2))
    expected = retained_attention(q, k, v, window=None)
    cache = GrowingCache(batch, 2, 8, capacity=4)
    starts = torch.zeros(batch, dtype=torch.int64)
    for size, lengths in [(5, [5, 3]), (1, None), (70, [0, 70]), (1, None), (40, [40, 11])]:
        index = (starts[:, None] + torch.arange(size)).clamp(max=total - 1)
        row = torch.arange(batch)[:, None]
        lengths = None if lengths is None else torch.tensor(lengths)
        span = cache.append(k[row, index], v[row, index], lengths=lengths)
        out = interval_attention(q[row, index], span.k, span.v, span.end, window=None)
        count = torch.full((batch,), size) if lengths is None else lengths
        for b in range(batch):
            n = int(count[b])
            torch.testing.assert_close(out[b, :n], expected[b, starts[b] : starts[b] + n], atol=2e-6, rtol=1e-5)
        starts = starts + count


def test_places_in_the_cache_follow_the_kept_tokens():
    """Rotary by place: the visible keys renumbered 0, 1, 2, …, as if the others had never been."""
    torch.manual_seed(0)
    total, dim = 40, 8
    q, k, v = (torch.randn(1, total, 2, dim) for _ in range(3))
    logits = random_logits((1, total, 2))
    rule = {"window": 5, "sinks": 2, "budget": 3}
    end = lifetimes(logits, batch=1, length=total, heads=2, **rule)
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    positions = torch.arange(total)[None, :, None].expand(1, total, 2)
    out = in_cache_attention(q, k, v, end, positions=positions, frequencies=frequencies, block=7)
    mask = visible_pairs(end, total)

    def rotate(x, place):
        angle = place[:, None] * frequencies
        x1, x2 = x.chunk(2, -1)
        return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], -1)

    for i in (0, 3, 17, 39):
        for h in range(2):
            kept = mask[0, h, i].nonzero().flatten()
            keys = rotate(k[0, kept, h], torch.arange(len(kept)).float())
            query = rotate(q[0, i : i + 1, h], torch.tensor([len(kept) - 1.0]))
            weight = (query @ keys.T * dim**-0.5).softmax(-1)
            torch.testing.assert_close(out[0, i, h], (weight @ v[0, kept, h])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 5.0}, "window=5.0: must be a whole number"),
        ({"window": 3, "budget": True}, "budget=True: must be a whole number"),
        ({"window": 3, "sinks": -1}, "sinks=-1"),
        ({"window": 3, "budget": -2}, "budget=-2"),
        ({"window": 3, "backend": "cuda"}, "backend='cuda'"),
        ({"window": 3, "cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
    ],
)
def test_errors_name_the_field(kwargs, message):
    x = torch.randn(1, 6, 2, 4)
    with pytest.raises(ValueError, match=message):
        retained_attention(x, x, x, **kwargs)
    if kwargs.keys() <= {"window", "sinks", "budget"}:
        with pytest.raises(ValueError, match=message):
            visible(None, batch=1, length=6, heads=2, **kwargs)


def test_a_window_within_the_lookahead_is_an_error():
    with pytest.raises(ValueError, match="window=6 must be larger"):
        RetainedCache(1, 1, 4, window=6, budget=2, lookahead=6)
