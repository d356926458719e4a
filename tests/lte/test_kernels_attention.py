"""Interval attention kernels against the definition in float32; on a CPU through Triton's interpreter.

Letters in shape suffixes: B batch, T query tokens, S keys, Q query heads, H KV heads, D head_dim.
"""

import os
from dataclasses import replace

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

pytest.importorskip("triton")

from lte.kernels import columns  # noqa: E402
from lte.kernels.attention import Tiles, interval_attention  # noqa: E402
from lte.kernels.columns import Tile  # noqa: E402

interpreted = pytest.mark.skipif(ON_GPU, reason="the same kernels run compiled, under the marker gpu")
SMALL = Tiles(Tile(32, 16, 4, 1), Tile(64, 32, 4, 1), Tile(32, 16, 4, 1), span_tokens=24, scan=64)
WIDE = Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), span_tokens=40, scan=128)


def reference(q_BTQD, k_BSHD, v_BSHD, end_BSH, scale=None):
    """The definition: softmax over keys with j <= i < end[j], 0 where there is none."""
    group = q_BTQD.shape[2] // k_BSHD.shape[2]
    tokens, keys = q_BTQD.shape[1], k_BSHD.shape[1]
    k, v = (x.repeat_interleave(group, 2).movedim(2, 1) for x in (k_BSHD, v_BSHD))
    end = end_BSH.repeat_interleave(group, 2).movedim(2, 1)[:, :, None, :]
    i = torch.arange(keys - tokens, keys, device=q_BTQD.device)[:, None]
    j = torch.arange(keys, device=q_BTQD.device)[None, :]
    seen = (j <= i) & (i < end)
    scale = q_BTQD.shape[-1] ** -0.5 if scale is None else scale
    scores = (q_BTQD.movedim(2, 1) @ k.mT * scale).masked_fill(~seen, float("-inf"))
    peak = scores.amax(-1, keepdim=True).clamp_min(-1e30).detach()
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    return ((weights / total.masked_fill(total == 0, 1.0)) @ v).movedim(1, 2)


def make_end(kind, batch, keys, slots, heads, window):
    """[B, S, H] int32 ends of `slots` cache slots and the tokens after them."""
    j = torch.arange(keys)[None, :, None].expand(batch, keys, heads)
    kept = torch.rand(batch, keys, heads) < 0.25
    if kind == "all":
        end = torch.full_like(j, 2**31 - 1)
    elif kind == "none":
        end = torch.zeros_like(j)
    elif kind == "window":
        end = (j + window).clamp(max=keys)
    elif kind == "kept":
        end = torch.where(kept, keys, (j + window).clamp(max=keys))
    elif kind == "evicted":  # kept for a while
        end = j + torch.where(kept, torch.randint(0, keys, j.shape), 0) + window
    elif kind == "packed":  # documents with borders at odd places, sinks and kept keys inside them
        borders = torch.tensor([0, 7, keys // 3, keys // 3 + 1, keys // 2 + 5, keys])
        document = torch.searchsorted(borders, j.contiguous(), right=True) - 1
        stop = borders[document + 1]
        sink = j - borders[document] < 2
        end = torch.where(sink | kept, stop, torch.minimum(stop, j + window))
    elif kind == "random":  # no rule at all, negative and empty ones included
        end = torch.randint(-3, keys + 9, j.shape)
    else:
        raise AssertionError(kind)
    if slots:
        # half of the slots are seen by all, so that a single query sees many keys
        slot_end = torch.randint(0, keys + 1, (batch, slots, heads))
        slot_end = torch.where(torch.rand(slot_end.shape) < 0.5, keys, slot_end)
        end = torch.cat([slot_end, end[:, slots:]], 1)
    return end.int()


def rel_rms(got, want):
    return ((got.float() - want).norm() / want.norm().clamp_min(1e-20)).item()


def poison(monkeypatch):
    """Fresh memory holds NaN (floats) or a huge number (integers) until a kernel writes it."""
    empty = torch.empty

    def filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 2**31 - 1)

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(torch, "empty_like", lambda x: filled(x.shape, dtype=x.dtype, device=x.device))


def compare(
    monkeypatch, kind, tokens, slots, heads, group, dim, window, *, batch, earlier=0, tiles=None,
    dtype=torch.float32, device="cpu", limit=1e-5,
):  # fmt: skip
    keys = slots + earlier + tokens
    end = make_end(kind, batch, keys, slots, heads, window).to(device)
    shapes = [(batch, tokens, heads * group, dim), (batch, keys, heads, dim), (batch, keys, heads, dim)]
    rounded = [torch.randn(s, device=device).to(dtype) for s in shapes]
    grad = torch.randn(shapes[0], device=device).to(dtype)
    exact = [x.float().requires_grad_() for x in rounded]
    want = reference(*exact, end)
    wanted = [want.detach(), *torch.autograd.grad(want, exact, grad.float())]
    poison(monkeypatch)
    inputs = [x.requires_grad_() for x in rounded]
    out = interval_attention(*inputs, end, window=window, offset=slots, tiles=tiles)
    assert out.dtype == dtype
    got = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        assert torch.isfinite(a).all(), name
        if b.abs().max() == 0:
            assert a.abs().max() == 0, name
        else:
            assert rel_rms(a, b) <= limit, (name, rel_rms(a, b))


# kind of ends, query tokens, cache slots, KV heads, group, head_dim, window
SMALL_CASES = [
    ("kept", 63, 0, 1, 2, 32, 9),
    ("kept", 130, 0, 1, 4, 60, 17),
    ("kept", 63, 0, 1, 3, 32, 16),
    ("evicted", 130, 0, 1, 1, 32, 12),
    ("packed", 130, 0, 1, 2, 32, 11),
    ("packed", 130, 0, 1, 1, 32, 500),
    ("random", 63, 0, 2, 1, 32, 10),
    ("random", 63, 0, 1, 1, 32, 200),
    ("all", 130, 0, 1, 1, 32, 1),
    ("all", 63, 0, 1, 2, 32, 100),
    ("none", 63, 0, 2, 1, 32, 8),
    ("kept", 63, 21, 1, 1, 32, 9),
    ("random", 33, 48, 1, 2, 60, 7),
    ("evicted", 63, 5, 1, 2, 32, 100),
    ("none", 1, 30, 2, 4, 32, 8),
]
WIDE_CASES = [
    ("window", 130, 0, 1, 2, 32, 20),
    ("all", 130, 0, 2, 1, 32, 9),
    ("evicted", 130, 40, 1, 4, 32, 13),
]


# the backward pass follows the forward pass's schedule
SHARED = Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), span_tokens=24, scan=64)


@interpreted
@pytest.mark.parametrize("case", [SMALL_CASES[i] for i in (1, 3, 4, 11)])
def test_shared_schedule(case, monkeypatch):
    torch.manual_seed(case[1])
    compare(monkeypatch, *case, batch=1, tiles=SHARED)


@interpreted
@pytest.mark.parametrize("case", SMALL_CASES)
def test_small_tiles(case, monkeypatch):
    torch.manual_seed(case[1] + case[6])
    compare(monkeypatch, *case, batch=1, tiles=SMALL)


@interpreted
@pytest.mark.parametrize("case", WIDE_CASES)
def test_wide_tiles_and_a_batch(case, monkeypatch):
    torch.manual_seed(case[1] + case[6])
    compare(monkeypatch, *case, batch=2, tiles=WIDE)


@interpreted
@pytest.mark.parametrize("case", [SMALL_CASES[i] for i in (1, 3, 4, 11)])
def test_lists_in_many_steps(case, monkeypatch):
    """One tile of keys a program, 16 columns a step; the columns before a tile are counted in steps of 64 keys."""
    torch.manual_seed(case[1] + case[6])
    compare(monkeypatch, *case, batch=1, tiles=replace(SMALL, scan=16))


@interpreted
@pytest.mark.parametrize("unlisted", [0, 8192])
@pytest.mark.parametrize("case", [SMALL_CASES[i] for i in (1, 4, 8, 12, 14)])
def test_without_gradients(case, unlisted, monkeypatch):
    kind, tokens, slots, heads, group, dim, window = case
    torch.manual_seed(tokens + window)
    keys = slots + tokens
    end = make_end(kind, 1, keys, slots, heads, window)
    q, k, v = torch.randn(1, tokens, heads * group, dim), *torch.randn(2, 1, keys, heads, dim)
    want = reference(q, k, v, end)
    poison(monkeypatch)
    tiles = replace(SMALL, unlisted=unlisted, prompt_span=24)
    launched = []
    list_columns = columns.list_columns
    monkeypatch.setattr(columns, "list_columns", lambda *a, **kw: launched.append(1) or list_columns(*a, **kw))
    out = interval_attention(q, k, v, end, window=window, offset=slots, tiles=tiles)
    assert rel_rms(out, want) <= 1e-5
    # no list for a forward pass, unless it is long
    assert len(launched) == (unlisted == 0)


@interpreted
def test_tiles_of_the_table(monkeypatch):
    torch.manual_seed(1)
    compare(monkeypatch, "kept", 130, 0, 1, 2, 80, 19, batch=1)


@interpreted
@pytest.mark.parametrize("slots", [0, 11])
def test_ordered_keys_before_the_first_query(slots, monkeypatch):
    torch.manual_seed(2)
    compare(monkeypatch, "kept", 33, slots, 1, 2, 32, 12, batch=1, earlier=45, tiles=SMALL)


@interpreted
def test_strided_inputs_and_scale():
    torch.manual_seed(3)
    qkv = torch.randn(1, 40, 6, 32, requires_grad=True)
    q, k, v = qkv[:, :, :2], qkv[:, :, 2:3], qkv.transpose(2, 3)[..., 4:5].transpose(2, 3)
    end = make_end("kept", 1, 40, 0, 1, 7)
    want = reference(q, k, v, end, scale=0.3)
    got = interval_attention(q, k, v, end, window=7, scale=0.3, tiles=SMALL)
    assert rel_rms(got, want) <= 1e-5
    (wanted,) = torch.autograd.grad(want.sum(), qkv)
    (grad,) = torch.autograd.grad(got.sum(), qkv)
    assert rel_rms(grad, wanted) <= 1e-5


@interpreted
def test_window_never_changes_the_result():
    torch.manual_seed(4)
    q, k, v = torch.randn(1, 50, 2, 32), torch.randn(1, 50, 1, 32), torch.randn(1, 50, 1, 32)
    end = make_end("random", 1, 50, 0, 1, 1)
    outs = [interval_attention(q, k, v, end, window=w, tiles=SMALL) for w in (1, 13, 50)]
    for out in outs:
        assert rel_rms(out, reference(q, k, v, end)) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window 0"),
        ({"offset": 5}, "offset 5"),
        ({"scale": 0.0}, "scale"),
        ({"end": torch.zeros(1, 8, 2, dtype=torch.int64)}, "int32"),
        ({"end": torch.zeros(1, 7, 2, dtype=torch.int32)}, "end is"),
        ({"k": torch.zeros(1, 8, 3, 32), "v": torch.zeros(1, 8, 3, 32)}, "query heads"),
        ({"v": torch.zeros(1, 8, 2, 16)}, "don't fit"),
        ({"q": torch.zeros(1, 9, 4, 32)}, "queries"),
        ({"q": torch.zeros(1, 4, 4, 32, dtype=torch.float64)}, "float64"),
        ({"q": torch.zeros(4, 4, 32)}, "shape"),
    ],
)
def test_errors_name_field_and_value(change, message):
    keys = torch.zeros(1, 8, 2, 32)
    given = {"q": torch.zeros(1, 4, 4, 32), "k": keys, "v": keys, "window": 3}
    given["end"] = torch.zeros(1, 8, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        interval_attention(**(given | change))


LARGE_CASES = [
    # kind, tokens, slots, KV heads, group, head_dim, window
    ("kept", 1030, 0, 2, 4, 64, 130),
    ("kept", 999, 0, 3, 1, 128, 257),
    ("kept", 515, 0, 2, 3, 80, 100),
    ("evicted", 2049, 0, 2, 4, 64, 96),
    ("packed", 1501, 0, 2, 2, 64, 200),
    ("packed", 1501, 0, 2, 2, 60, 5000),
    ("random", 777, 0, 2, 2, 32, 64),
    ("window", 1030, 0, 2, 4, 64, 768),
    ("all", 1030, 0, 2, 4, 64, 1),
    ("all", 1030, 0, 2, 2, 256, 128),
    ("none", 300, 0, 2, 2, 64, 32),
    ("kept", 700, 333, 2, 4, 64, 129),
    ("evicted", 515, 1284, 2, 4, 64, 768),
    ("random", 1, 900, 2, 4, 128, 64),
]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE_CASES)
def test_on_gpu(case, dtype, monkeypatch):
    torch.manual_seed(case[1] + case[6])
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    compare(monkeypatch, *case, batch=2, earlier=case[1] % 3, dtype=dtype, device="cuda", limit=limit)


def training_case(tokens):
    torch.manual_seed(5)
    q, k, v = (
        torch.randn(1, tokens, h, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in (32, 8, 8)
    )
    end = make_end("kept", 1, tokens, 0, 8, 768).cuda()
    return q, k, v, end


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_gradients_are_deterministic():
    q, k, v, end = training_case(4099)
    grad = torch.randn_like(q)
    first, second = (
        torch.autograd.grad(interval_attention(q, k, v, end, window=768), (q, k, v), grad) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_scratch_is_at_most_twice_k_and_v():
    q, k, v, end = training_case(16384)
    grad = torch.randn_like(q)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = interval_attention(q, k, v, end, window=768)
    torch.autograd.grad(out, (q, k, v), grad)
    results = 2 * sum(x.numel() for x in (out, q, k, v))
    assert torch.cuda.max_memory_allocated() - before - results <= 2 * 2 * (k.numel() + v.numel())
