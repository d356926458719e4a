"""Kernels of a decoding step against plain PyTorch; on a CPU through Triton's interpreter.

Letters in shape suffixes: B batch, N query heads, H KV heads, S slots, D head_dim, K inputs, M outputs.
"""

import os

import pytest
import torch
import torch.nn.functional as F

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

pytest.importorskip("triton")

from lte.attention import interval_attention  # noqa: E402
from lte.cache import RetainedCache  # noqa: E402
from lte.kernels.cache_step import cache_step  # noqa: E402
from lte.kernels.decode_attention import decode_attention  # noqa: E402
from lte.kernels.decode_delta import delta_step  # noqa: E402
from lte.kernels.decode_linear import linear_add, norm_linear, norm_rows, norm_swiglu  # noqa: E402
from lte.kernels.decode_start import start_step  # noqa: E402
from lte.kernels.launch import can_overlap  # noqa: E402
from lte.scorer import RetentionScorer  # noqa: E402
from models.delta_rule import step_causal_conv1d, step_gated_delta_rule  # noqa: E402
from models.gated_deltanet import decay_and_strength, l2_normalize  # noqa: E402
from models.rotary import rotary_angles, rotary_frequencies, rotate  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
OVERLAP = can_overlap(torch.device(DEVICE))
# one seed a test; on a GPU the same cases run compiled, and in bfloat16 as well
DTYPES = [pytest.param(torch.float32, id="float32")]
DTYPES += [pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.gpu)]
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def limit(dtype):
    return 1e-5 if dtype == torch.float32 else 8e-3


def rel_rms(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-20))


def assert_close(got, want, dtype=torch.float32, factor=1):
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert want.double().norm() > 1e-3, "nothing is compared with nothing"
    assert rel_rms(got, want) <= factor * limit(dtype), rel_rms(got, want)


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def normed(x, weight, eps, groups=1):
    parts = x.float().unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps) * weight.float()
    return parts.flatten(-2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(7)


# ---- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("size", "outputs"), [(64, 48), (37, 29), (96, 5)])
def test_norm_then_linear(batch, size, outputs, dtype):
    x, scale, weight = randn(batch, size, dtype=dtype), randn(size, dtype=dtype), randn(outputs, size, dtype=dtype)
    got = norm_linear(x, scale, 1e-6, weight, overlap=OVERLAP)
    assert got.dtype == dtype
    assert_close(got, normed(x, scale, 1e-6) @ weight.float().t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("size", "inner"), [(64, 48), (37, 29)])
def test_norm_then_swiglu(batch, size, inner, dtype):
    x, scale = randn(batch, size, dtype=dtype), randn(size, dtype=dtype)
    weight = randn(2 * inner, size, dtype=dtype, scale=size**-0.5)
    gate, up = (normed(x, scale, 1e-6) @ weight.float().t()).chunk(2, -1)
    assert_close(norm_swiglu(x, scale, 1e-6, weight, overlap=OVERLAP), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("size", "outputs"), [(64, 48), (45, 33)])
def test_linear_and_sum(batch, size, outputs, dtype):
    x, weight, residual = (randn(*s, dtype=dtype) for s in ((batch, size), (outputs, size), (batch, outputs)))
    assert_close(
        linear_add(x, weight, residual, overlap=OVERLAP), residual.float() + x.float() @ weight.float().t(), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("groups", "width"), [(4, 16), (3, 20), (2, 13)])
def test_gated_norm_then_linear_and_sum(batch, groups, width, dtype):
    size = groups * width
    x, scale, weight = randn(batch, size, dtype=dtype), randn(width, dtype=dtype), randn(30, size, dtype=dtype)
    # a slice of a wider tensor, as the projections leave it
    gate, residual = randn(batch, size + 9, dtype=dtype)[:, 9:], randn(batch, 30, dtype=dtype)
    inner = normed(x, scale, 1e-5, groups) * F.silu(gate.float())
    want = residual.float() + inner @ weight.float().t()
    got = linear_add(x, weight, residual, norm=scale, gate_BK=gate, groups=groups, eps=1e-5, overlap=OVERLAP)
    assert_close(got, want, dtype)
    assert_close(norm_rows(x, scale, 1e-5, gate_BK=gate, groups=groups), inner, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("taps", [2, 4])
def test_convolution_of_the_first_outputs(batch, taps, dtype):
    size, outputs, channels = 24, 41, 27
    scale, weight = randn(size, dtype=dtype), randn(outputs, size, dtype=dtype, scale=size**-0.5)
    filters = randn(channels, taps, dtype=dtype)
    state = randn(batch, channels, taps - 1, dtype=dtype)
    want_state, address = state.float().clone(), state.data_ptr()
    for _ in range(taps + 2):
        x = randn(batch, size, dtype=dtype)
        plain = (normed(x, scale, 1e-6).to(dtype).float() @ weight.float().t()).to(dtype).float()
        want = plain.clone()
        want[:, :channels] = step_causal_conv1d(plain[:, :channels], filters.float(), want_state)
        got = norm_linear(x, scale, 1e-6, weight, convolution=(filters, state), overlap=OVERLAP)
        assert_close(got, want, dtype)
        assert_close(state, want_state, dtype)
    assert state.data_ptr() == address


# ---- the gated delta rule


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "key", "value"), [(1, 2, 16, 16), (3, 2, 10, 20), (2, 1, 32, 24)])
def test_delta_rule_over_steps(batch, heads, key, value, dtype):
    keys, values = heads * key, heads * value
    rate, bias = randn(heads), randn(heads)
    state = torch.zeros(batch, heads, key, value, device=DEVICE)
    want_state, address = state.clone(), state.data_ptr()
    for step in range(9):
        mixed = randn(batch, 2 * keys + values + 2 * heads + 5, dtype=dtype)
        # strong decays and none at all
        mixed[:, -7:-5] *= 1 if step else 20
        q, k, v, _, a, b = mixed.split([keys, keys, values, 5, heads, heads], 1)
        got = delta_step(q, k, v, a, b, rate, bias, state, overlap=OVERLAP)
        g, beta = decay_and_strength(a.float(), b.float(), rate, bias)
        want = step_gated_delta_rule(
            *(l2_normalize(x.float().view(batch, 1, heads, key)) for x in (q, k)),
            v.float().view(batch, 1, heads, value),
            g[:, None],
            beta[:, None],
            want_state,
        )
        assert_close(got, want.flatten(1), dtype)
        assert_close(state, want_state)
    assert state.data_ptr() == address


# ---- the cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "dim", "window", "sinks", "budget", "lookahead", "steps"),
    [
        (3, 1, 16, 9, 4, 3, 6, 64),
        (3, 1, 60, 7, 0, 1, 6, 30),
        (1, 2, 32, 8, 4, 0, 6, 20),
        (1, 2, 12, 5, 2, 5, 4, 40),
        (1, 1, 8, 1, 0, 3, 0, 30),
    ],
)
def test_eviction_with_ties(batch, heads, dim, window, sinks, budget, lookahead, steps, dtype):
    ours, theirs = (
        RetainedCache(
            batch,
            heads,
            dim,
            window=window,
            sinks=sinks,
            budget=budget,
            lookahead=lookahead,
            dtype=dtype,
            device=DEVICE,
        )
        for _ in range(2)
    )
    # rows of different age
    for cache in (ours, theirs):
        cache.seen.copy_(torch.tensor([0, 2, 11])[:batch])
    addresses = [x.data_ptr() for x in ours.tensors]
    for _ in range(steps):
        k, v = randn(batch, 1, heads, dim, dtype=dtype), randn(batch, 1, heads, dim, dtype=dtype)
        # few values: ties, and about half of them not positive
        scores = torch.randint(-3, 4, (batch, 1, heads), device=DEVICE) / 2
        theirs.step(k.transpose(1, 2), v.transpose(1, 2), scores)
        cache_step(ours, k[:, 0], v[:, 0], scores_BH=scores[:, 0], overlap=OVERLAP)
        ours.seen += 1
        for got, want in zip(ours.tensors, theirs.tensors, strict=True):
            assert torch.equal(got, want)
    if budget:
        assert (ours.logits[:, :, sinks : sinks + budget] > 0).any()
    assert [x.data_ptr() for x in ours.tensors] == addresses


def make_scorer(heads, dim, dtype, **sizes):
    scorer = RetentionScorer(heads, dim, **sizes).to(DEVICE).eval()
    with torch.no_grad():
        scorer.out_bias.fill_(-0.05)
        scorer.out_weight.mul_(3)
        for bias in scorer.biases:
            bias.normal_(std=0.1)
    return scorer.to(dtype)


SCORERS = [
    # rows, KV heads, head_dim, window, sinks, budget, steps, scorer
    (1, 2, 16, 9, 4, 3, 62, {}),
    (3, 1, 60, 7, 0, 1, 20, {}),
    (1, 2, 32, 7, 4, 4, 20, {"share_heads": True}),
    (1, 1, 12, 6, 1, 2, 30, {"kernel_sizes": (5, 1), "dilations": (1, 3)}),
    (1, 1, 8, 2, 0, 3, 20, {"kernel_sizes": (3,), "dilations": (1,)}),
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SCORERS)
def test_scoring_and_rotation_from_empty(case, dtype):
    batch, heads, dim, window, sinks, budget, steps, sizes = case
    exact = dtype == torch.float32
    scorer = make_scorer(heads, dim, dtype, **sizes)
    caches = [
        RetainedCache(
            batch, heads, dim, window=window, sinks=sinks, budget=budget, lookahead=scorer.lookahead, dtype=dtype,
            device=DEVICE,
        )
        for _ in range(2)
    ]  # fmt: skip
    states = [scorer.allocate_state(batch, dtype=dtype, device=DEVICE) for _ in range(2)]
    addresses = [x.data_ptr() for x in (*caches[0].tensors, *states[0].inputs)]
    counter = torch.full((batch * heads,), 5, dtype=torch.int32, device=DEVICE)
    logits = [], []
    for _ in range(steps):
        ours, theirs = caches
        kv = randn(batch, 2 * heads * dim + 3, dtype=dtype)
        k, v = (x.unflatten(1, (heads, dim)) for x in (kv[:, : heads * dim], kv[:, heads * dim : -3]))
        angles = rotary_angles(ours.seen[:, None], dim, 100.0)
        flat = tuple(x.flatten(1).contiguous() for x in angles)
        scores = scorer.stream(torch.cat([k, v], -1)[:, None], states[1], theirs.seen)
        if not exact:  # which token is kept hangs on the last digit: compare where both agree
            ours.logits.copy_(theirs.logits)
            ours.positions.copy_(theirs.positions)
        theirs.step(rotate(k[:, None], angles).transpose(1, 2), v[:, None].transpose(1, 2), scores)
        cache_step(ours, k, v, scorer=scorer, state=states[0], rotary=flat, counter=counter, overlap=OVERLAP)
        ours.seen += 1
        assert not counter.any()
        counter += 5
        known = torch.isfinite(theirs.logits)
        assert torch.equal(torch.isfinite(ours.logits), known)
        logits[0].append(ours.logits[known])
        logits[1].append(theirs.logits[known])
        if exact:
            assert torch.equal(ours.positions, theirs.positions)
            assert_close(ours.k, theirs.k)
            assert torch.equal(ours.v, theirs.v)
        for got, want in zip(states[0].inputs, states[1].inputs, strict=True):
            if want.numel() and want.any():
                assert_close(got, want, dtype, factor=1 if exact else 4)
    # all steps together, as single logits may be close to 0; in bfloat16 the reference rounds after every tap
    assert_close(*map(torch.cat, logits), dtype, factor=1 if exact else 4)
    assert (caches[0].logits[:, :, sinks : sinks + budget] > 0).any()
    assert [x.data_ptr() for x in (*caches[0].tensors, *states[0].inputs)] == addresses


# ---- attention


def attention_case(batch, heads, group, dim, slots, dtype, monkeypatch, processors):
    monkeypatch.setattr("lte.kernels.decode_attention._processors", lambda device: processors)
    q = randn(batch, heads * group, dim, dtype=dtype)
    k, v = randn(batch, heads, slots, dim, dtype=dtype), randn(batch, heads, slots, dim, dtype=dtype)
    positions = torch.randint(0, 1000, (batch, heads, slots), device=DEVICE)
    positions[torch.rand(batch, heads, slots, device=DEVICE) < 0.3] = -1
    return q, k, v, positions


def attend(q, k, v, positions):
    slots = k.shape[2]
    end = torch.where(positions >= 0, slots, 0).to(torch.int32)
    out = interval_attention(
        q[:, None].float(), k.transpose(1, 2).float(), v.transpose(1, 2).float(), end.transpose(1, 2), window=None,
        backend="reference",
    )  # fmt: skip
    return out[:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("processors", [1, 40], ids=["whole", "split"])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "dim", "slots"),
    [(1, 2, 4, 32, 200), (3, 1, 1, 16, 63), (2, 2, 3, 60, 130), (1, 1, 17, 20, 65), (1, 2, 2, 256, 70)],
)
def test_attention_over_slots(batch, heads, group, dim, slots, processors, dtype, monkeypatch):
    q, k, v, positions = attention_case(batch, heads, group, dim, slots, dtype, monkeypatch, processors)
    assert_close(decode_attention(q, k, v, positions, overlap=OVERLAP), attend(q, k, v, positions), dtype)


@pytest.mark.parametrize("processors", [1, 40], ids=["whole", "split"])
def test_attention_sees_nothing_or_one_slot(processors, monkeypatch):
    q, k, v, positions = attention_case(2, 2, 2, 16, 150, torch.float32, monkeypatch, processors)
    positions.fill_(-1)
    positions[1, :, 140] = 7
    out = decode_attention(q, k, v, positions)
    assert not out[0].any()
    assert_close(out[1], v[1, :, 140].repeat_interleave(2, 0))


def test_attention_rotates_counts_and_reuses_a_counter(monkeypatch):
    q, k, v, positions = attention_case(2, 2, 3, 20, 190, torch.float32, monkeypatch, 40)
    angles = rotary_angles(torch.tensor([[3], [4711]], device=DEVICE), 20, 10000.0)
    flat = tuple(x.flatten(1).contiguous() for x in angles)
    seen = torch.tensor([3, 4711], device=DEVICE)
    want = attend(rotate(q[:, None], angles)[:, 0], k, v, positions)
    for steps in (1, 2):
        counter = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        got = decode_attention(q, k, v, positions, rotary=flat, counter=counter, seen_B=seen, overlap=OVERLAP)
        assert_close(got, want)
        assert seen.tolist() == [3 + steps, 4711 + steps]


def test_attention_takes_strided_keys_and_marks_above_a_bound(monkeypatch):
    q, _, _, _ = attention_case(2, 2, 2, 24, 100, torch.float32, monkeypatch, 40)
    k, v = randn(2, 100, 2, 24), randn(2, 100, 2, 24)
    end = torch.randint(50, 150, (2, 100, 2), dtype=torch.int32, device=DEVICE)
    got = decode_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), end.transpose(1, 2), above=99, scale=0.3, overlap=OVERLAP
    )
    want = interval_attention(q[:, None], k, v, end, window=None, scale=0.3, backend="reference")[:, 0]
    assert_close(got, want)


def test_attention_is_deterministic(monkeypatch):
    q, k, v, positions = attention_case(1, 2, 4, 32, 400, torch.float32, monkeypatch, 40)
    first, second = (decode_attention(q, k, v, positions) for _ in range(2))
    assert torch.equal(first, second)


# ---- the start


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_and_angles(dtype):
    table = randn(31, 1100, dtype=dtype)
    token = torch.tensor([[4], [30], [0]], device=DEVICE)
    seen = torch.tensor([0, 1_000_003, 77], device=DEVICE)
    frequencies = rotary_frequencies(20, 10000.0, seen.device)
    x, (cos, sin) = start_step(token, table, seen, frequencies, overlap=OVERLAP)
    assert torch.equal(x, table[token[:, 0]])
    want = rotary_angles(seen[:, None], 20, 10000.0)
    for got, exact in zip((cos, sin), want, strict=True):
        torch.testing.assert_close(got, exact.flatten(1), rtol=0, atol=1e-6)
    strided = token.expand(3, 2).contiguous()[:, :1]
    x, none = start_step(strided, table)
    assert none is None
    assert torch.equal(x, table[token[:, 0]])
