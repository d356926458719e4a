"""Eviction policies against a decoder in plain Python: whole documents, chunks, steps, ties, memory."""

from dataclasses import dataclass

import pytest
import torch

from lte.attention import interval_attention
from lte.cache import RetainedCache
from lte.layout import Layout
from lte.policies import POLICIES, Arrivals, Policy, Random, Recency, observed_attention, observed_lifetimes
from lte.visibility import lifetimes, visible_pairs

BATCH, TOTAL, QUERY_HEADS, HEADS, DIM = 3, 75, 4, 2, 6


@dataclass(frozen=True)
class Coarse(Policy):
    """Two ranks only: most comparisons are ties."""

    def ranks(self, new):
        return (1.0 + new.positions_BT % 2)[..., None].expand(new.k_BTHD.shape[:3])


@dataclass(frozen=True)
class CoarseObserving(Policy):
    """The number of queries since a token arrived, modulo 3."""

    observes = True

    def observe(self, ranks_BHS, weights_BHGS):
        return (ranks_BHS.round() + 1) % 3


ALL = {**POLICIES, "coarse": Coarse, "coarse_observing": CoarseObserving}
BUDGETS = [{"window": 5, "sinks": 2, "budget": budget} for budget in (0, 1, 3)]
RULES = [*BUDGETS, {"window": 1, "sinks": 0, "budget": 4}, {"window": 9, "sinks": 4, "budget": 100}]


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(BATCH, TOTAL, n, DIM, generator=generator) for n in (QUERY_HEADS, HEADS, HEADS))
    writes = torch.rand(BATCH, TOTAL, 3, generator=generator)
    # the same token many times: equal keys, norms and writes
    again = torch.arange(TOTAL) % 7 == 3
    k[:, again], writes[:, again] = k[:, 3:4], writes[:, 3:4]
    return 2 * q, k, v, writes


def first_rank(name, k_THD, writes_TE, j, h):
    """What is known of a token when it arrives, from the definition of the policy."""
    return {
        "recency": lambda: j,
        "random": lambda: float(Random().ranks(Arrivals(k_THD[None, j : j + 1], torch.tensor([[j]])))[0, 0, h]),
        "key_norm": lambda: -float(k_THD[j, h].square().sum()),
        "delta_error": lambda: float(writes_TE[j].square().sum()),
        "coarse": lambda: j % 2,
    }.get(name, lambda: 0.0)()


def next_rank(name, rank, h, j, weights):
    """A token's rank after a query; weights[head] holds {position: weight [G]}."""
    if name == "h2o":
        return rank + float(weights[h][j].sum())
    if name == "tova":
        return float(torch.stack([weights[other][j] for other in range(HEADS)]).mean())
    return (rank + 1) % 3 if name == "coarse_observing" else rank


def decode_plainly(name, q_TND, k_THD, v_THD, writes_TE, *, window, sinks, budget):
    """One row, one token after the other: outputs [T, N, D] and the keys read, [H, T, T]."""
    total = len(q_TND)
    read = torch.zeros(HEADS, total, total, dtype=torch.bool)
    out = torch.zeros_like(q_TND)
    held = [[] for _ in range(HEADS)]
    rank = [{} for _ in range(HEADS)]
    for i in range(total):
        weights = []
        for h in range(HEADS):
            rank[h][i] = first_rank(name, k_THD, writes_TE, i, h)
            if i - window >= sinks:
                held[h].append(i - window)
                if len(held[h]) > budget:
                    held[h].remove(min(held[h], key=lambda j, h=h: (rank[h][j], -j)))
            near = range(max(0, i - window + 1), i + 1)
            keys = sorted({*range(min(sinks, i + 1)), *held[h], *near})
            read[h, i, keys] = True
            group = q_TND[i].view(HEADS, -1, DIM)[h]
            weight = (group @ k_THD[keys, h].T * DIM**-0.5).softmax(-1)
            out[i].view(HEADS, -1, DIM)[h] = weight @ v_THD[keys, h]
            weights.append({j: weight[:, place] for place, j in enumerate(keys)})
        for h in range(HEADS):
            for j in weights[h]:
                rank[h][j] = next_rank(name, rank[h][j], h, j, weights)
    return out, read


def expected(name, inputs, rule):
    rows = [decode_plainly(name, *(x[b] for x in inputs), **rule) for b in range(BATCH)]
    return torch.stack([out for out, _ in rows]), torch.stack([read for _, read in rows])


def whole(name, inputs, rule, layout=None):
    """`end` of whole documents [B, T, H]."""
    q, k, _, writes = inputs
    policy = ALL[name]()
    if policy.observes:
        return observed_lifetimes(policy, q, k, layout=layout, **rule)
    batch, length = k.shape[:2]
    positions = (layout or Layout()).positions(batch, length, k.device)
    ranks = policy.ranks(Arrivals(k, positions, writes))
    assert ranks.dtype == torch.float32
    assert (ranks > 0).all()
    return lifetimes(ranks, batch=batch, length=length, heads=HEADS, layout=layout, **rule)


def take(cache, policy, q, k, v, writes, lengths):
    """New tokens into a cache, and what their queries give."""
    if policy.observes:
        return observed_attention(cache, policy, q, k, v, lengths)
    positions = cache.seen[:, None] + torch.arange(k.shape[1])
    span = cache.append(k, v, policy.ranks(Arrivals(k, positions, writes)), lengths)
    return interval_attention(q, span.k, span.v, span.end, window=cache.window)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: "-".join(map(str, r.values())))
@pytest.mark.parametrize("name", ALL)
def test_whole_documents(name, rule):
    inputs = make_inputs()
    _, read = expected(name, inputs, rule)
    assert torch.equal(visible_pairs(whole(name, inputs, rule), TOTAL), read)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", RULES, ids=lambda r: "-".join(map(str, r.values())))
@pytest.mark.parametrize("name", ALL)
def test_chunks_and_steps_in_constant_memory(name, rule, seed):
    """Any split, rows of different lengths, single steps among them."""
    inputs = make_inputs(seed)
    wanted, _ = expected(name, inputs, rule)
    generator = torch.Generator().manual_seed(seed)
    cache = RetainedCache(BATCH, HEADS, DIM, **rule)
    addresses, size = [x.data_ptr() for x in cache.tensors], cache.nbytes
    seen, policy = torch.zeros(BATCH, dtype=torch.int64), ALL[name]()
    row = torch.arange(BATCH)[:, None]
    while int(seen.max()) < TOTAL:
        count, lengths = torch.ones(BATCH, dtype=torch.int64), None
        if torch.rand((), generator=generator) < 0.5:
            length = int(torch.randint(1, 20, (), generator=generator))
            lengths = count = torch.randint(0, length + 1, (BATCH,), generator=generator).minimum(TOTAL - seen)
        width = 1 if lengths is None else length
        index = (seen[:, None] + torch.arange(width)).clamp(max=TOTAL - 1)
        out = take(cache, policy, *(x[row, index] for x in inputs), lengths)
        for b in range(BATCH):
            n = int(count[b])
            torch.testing.assert_close(out[b, :n], wanted[b, seen[b] : seen[b] + n], atol=5e-6, rtol=1e-4)
        seen = seen + count
    assert [x.data_ptr() for x in cache.tensors] == addresses
    assert cache.nbytes == size


@pytest.mark.parametrize("name", ALL)
def test_documents_are_alone(name):
    """Packed and padded ones give what each gives by itself, an empty one included."""
    q, k, v, writes = make_inputs()
    rule, lengths = {"window": 4, "sinks": 1, "budget": 3}, [1, 20, 0, 34, 20]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    one = tuple(x[:1] for x in (q, k, v, writes))
    end = whole(name, one, rule, Layout(cu_seqlens=bounds.int()))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if stop > start:
            alone = whole(name, [x[:, start:stop] for x in one], rule)
            assert torch.equal(end[:, start:stop] - start, alone)
    padded = whole(name, (q, k, v, writes), rule, Layout(lengths=torch.tensor([TOTAL, 31, 0])))
    assert torch.equal(padded[0], whole(name, one, rule)[0])
    assert torch.equal(padded[1, :31], whole(name, [x[1:2, :31] for x in (q, k, v, writes)], rule)[0])
    assert not padded[1, 31:].any()
    assert not padded[2].any()


def test_recency_is_a_larger_window():
    inputs = make_inputs()
    read = visible_pairs(whole("recency", inputs, {"window": 5, "sinks": 2, "budget": 7}), TOTAL)
    end = lifetimes(None, batch=BATCH, length=TOTAL, heads=HEADS, window=12, sinks=2, budget=0)
    assert torch.equal(read, visible_pairs(end, TOTAL))


def test_recency_orders_two_thousand_million_positions():
    positions = torch.tensor([[0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**30 + 3, 2**30 + 4, 2_130_706_431]])
    ranks = Recency().ranks(Arrivals(torch.zeros(1, positions.shape[1], 1, 2), positions))[0, :, 0]
    assert (ranks.diff() > 0).all()
    assert ranks.isfinite().all()


def test_random_is_a_uniform_sample_of_the_text():
    """Every eighth of 4000 positions is held equally often, by 200 heads with 32 slots each."""
    heads, length, budget = 200, 4000, 32
    k, positions = torch.zeros(1, length, heads, 1), torch.arange(length)[None]
    ranks = Random().ranks(Arrivals(k, positions))
    held = ranks[0].topk(budget, dim=0).indices
    share = torch.stack([((held // 500) == part).float().mean() for part in range(8)])
    deviation = (1 / 8 * 7 / 8 / (heads * budget)) ** 0.5
    assert ((share - 1 / 8).abs() < 4 * deviation).all()
    for head in range(1, heads):
        assert len(set(held[:, 0].tolist()) & set(held[:, head].tolist())) < 8  # 0.26 expected of independent samples
    assert not torch.equal(ranks, Random(seed=1).ranks(Arrivals(k, positions)))
    assert torch.equal(ranks[:, 7:], Random().ranks(Arrivals(k[:, 7:], positions[:, 7:])))


def test_delta_error_needs_the_writes():
    with pytest.raises(
        ValueError, match=r"retention='delta_error' ranks by the writes of the preceding Gated DeltaNet"
    ):
        POLICIES["delta_error"]().ranks(Arrivals(torch.zeros(1, 2, 1, 4), torch.arange(2)[None]))


@pytest.mark.parametrize("name", POLICIES)
def test_extreme_inputs_give_positive_finite_ranks(name):
    """Nothing is refused while there is room, whatever the numbers: zero keys, huge keys, weights of zero."""
    policy = POLICIES[name]()
    k = torch.stack([torch.zeros(2, 4), torch.full((2, 4), 1e19), torch.full((2, 4), 1e-30)])[None]
    ranks = policy.ranks(Arrivals(k, torch.arange(3)[None], torch.zeros(1, 3, 5)))
    assert (ranks > 0).all()
    assert ranks.isfinite().all()
    cache = RetainedCache(1, 2, 4, window=1, budget=2)
    take(cache, policy, torch.full((1, 3, 4, 4), 1e4), k.clamp(max=1e4), k, torch.zeros(1, 3, 5), None)
    assert (cache.positions.sort().values == torch.arange(3)).all()


@pytest.mark.parametrize("name", POLICIES)
def test_ranks_of_64_bits_are_those_of_32(name):
    """A model in float64 is the usual check of numerics: every policy takes its keys."""
    _, k, _, writes = make_inputs()
    policy, positions = POLICIES[name](), torch.arange(TOTAL).expand(BATCH, -1)
    expected = policy.ranks(Arrivals(k, positions, writes))
    actual = policy.ranks(Arrivals(k.double(), positions, writes.double()))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
