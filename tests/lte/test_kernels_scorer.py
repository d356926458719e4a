"""The scorer's kernels against its PyTorch form in float64; on a CPU through Triton's interpreter.

Shapes: B batch, T tokens, H KV heads, C channels.
"""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

pytest.importorskip("triton")

from lte.kernels import scorer as host  # noqa: E402
from lte.kernels.scorer import convolve, score  # noqa: E402
from lte.layout import Layout  # noqa: E402
from lte.scorer import RetentionScorer  # noqa: E402

interpreted = pytest.mark.skipif(ON_GPU, reason="the same kernels run compiled, under the marker gpu")
PACKED = torch.tensor([0, 1, 3, 3, 10, 141])
# heads, head_dim, options of the scorer, batch, tokens, boundaries
SMALL = {
    "default": (3, 16, {}, 2, 37, None),
    "packed, one stack": (2, 12, {"share_heads": True}, 1, 141, PACKED),
    "packed": (2, 12, {}, 1, 141, PACKED),
    "other kernels": (2, 8, {"kernel_sizes": (5, 3), "dilations": (1, 3)}, 2, 50, None),
    "one layer, one token": (2, 4, {"kernel_sizes": (1,), "dilations": (1,)}, 3, 1, None),
    "odd head_dim": (1, 60, {}, 1, 45, None),
}
LARGE = {
    "default": (8, 64, {}, 2, 1031, None),
    "packed, one stack": (8, 64, {"share_heads": True}, 1, 1500, torch.tensor([0, 1, 3, 700, 707, 1500])),
    "head_dim 128": (3, 128, {}, 1, 777, None),
    "head_dim 256": (2, 256, {}, 1, 300, None),
    "head_dim 60": (2, 60, {}, 3, 261, None),
    "other kernels": (2, 32, {"kernel_sizes": (5, 3), "dilations": (1, 3)}, 2, 500, None),
}


def build(heads, dim, options, dtype=torch.float32, device="cpu"):
    """A scorer of which every part matters; its numbers are exact in `dtype`."""
    torch.manual_seed(0)
    scorer = RetentionScorer(heads, dim, **options).eval()
    with torch.no_grad():
        for p in scorer.parameters():
            scale = 0.3 if p.ndim < 4 else 1.5 * (p.shape[1] * p.shape[2]) ** -0.5
            p.copy_(torch.randn_like(p).mul_(scale).to(dtype))
    return scorer.to(device)  # drawn on the CPU: the same numbers on every device


def kernels(scorer, x, layout, dropout=0.0):
    document = layout.documents(*x.shape[:2], x.device) if layout is not None else None
    return score(
        x,
        list(scorer.weights),
        list(scorer.biases),
        scorer.out_weight,
        scorer.out_bias,
        dilations=scorer.dilations,
        dropout=dropout,
        document_BT=document,
    )


def results(call, scorer, x, grad):
    """Logits and the gradients of x and of every parameter, by name."""
    x = x.detach().clone().requires_grad_()
    out = call(x)
    grads = torch.autograd.grad((out * grad.to(out.dtype)).sum(), [x, *scorer.parameters()])
    names = ["logits", "x", *(name for name, _ in scorer.named_parameters())]
    return dict(zip(names, [out.detach(), *grads], strict=True))


def compare(size, dtype, tolerance, device="cpu"):
    heads, dim, options, batch, tokens, bounds = size
    scorer = build(heads, dim, options, dtype, device)
    x = torch.randn(batch, tokens, heads, 2 * dim, device=device).to(dtype)
    grad = torch.randn(batch, tokens, heads, device=device)
    layout = None if bounds is None else Layout(cu_seqlens=bounds.to(device))
    actual = results(lambda x: kernels(scorer, x, layout), scorer, x, grad)
    assert actual["logits"].dtype == torch.float32
    assert actual["x"].dtype == dtype
    exact = build(heads, dim, options, dtype).double()
    expected = results(
        lambda x: exact(x, None if bounds is None else Layout(bounds)), exact, x.cpu().double(), grad.cpu()
    )
    for name, want in expected.items():
        got = actual[name].cpu().double()
        assert torch.isfinite(got).all(), name
        assert (got - want).norm() <= tolerance * want.norm(), (name, float((got - want).norm() / want.norm()))


@interpreted
@pytest.mark.parametrize("name", SMALL)
def test_forward_and_gradients(name):
    compare(SMALL[name], torch.float32, 1e-5)


@interpreted
@pytest.mark.parametrize("name", ["default", "packed, one stack"])
def test_programs_that_take_several_tiles(name, monkeypatch):
    monkeypatch.setattr(host, "PROGRAMS", 3)
    monkeypatch.setattr(host, "BACKWARD_TILES", ((16, 1), (16, 1)))
    host._backward_plan.cache_clear()
    try:
        compare(SMALL[name], torch.float32, 1e-5)
    finally:
        host._backward_plan.cache_clear()


@interpreted
def test_forward_and_gradients_in_16_bits():
    compare(SMALL["default"], torch.float16, 5e-3)  # the interpreter has no bfloat16 products


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_compiled(name, dtype, tolerance):
    compare(LARGE[name], dtype, tolerance, "cuda")


@pytest.mark.gpu
def test_the_module_uses_the_kernels_and_streams_what_they_give():
    scorer = build(3, 32, {}, device="cuda").bfloat16()
    x = torch.randn(2, 700, 3, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = scorer(x)
        state = scorer.allocate_state(2, dtype=x.dtype, device=x.device)
        seen = torch.zeros(2, dtype=torch.int64, device="cuda")
        pieces = []
        for piece in x.split([300, 7, 393], 1):
            pieces.append(scorer.stream(piece, state, seen))
            seen = seen + piece.shape[1]
    streamed = torch.cat(pieces, 1)[:, scorer.lookahead :]
    assert (streamed - expected[:, : -scorer.lookahead]).abs().max() <= 1e-5 * expected.abs().max()


def keeps(shape, seed, salt, rate):
    """The kernels' hash in Python: which elements of [B, H, T, C] stay."""
    number = torch.arange(torch.Size(shape).numel() // 2, dtype=torch.int64)  # two neighbours share a hash
    x = (number ^ (seed + salt * 40503)) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    return (torch.stack([x & 0xFFFF, x >> 16], 1) >= round(rate * 2**16)).view(shape)


@interpreted
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_dropout_is_the_same_forward_and_backward(rate, monkeypatch):
    heads, dim, batch, tokens = 2, 8, 2, 41
    scorer = build(heads, dim, {})
    x, grad = torch.randn(batch, tokens, heads, 2 * dim), torch.randn(batch, tokens, heads)
    torch.manual_seed(3)
    seed = int(torch.randint(2**31 - 1, (1,), dtype=torch.int32))
    torch.manual_seed(3)
    actual = results(lambda x: kernels(scorer, x, None, rate), scorer, x, grad)
    exact = build(heads, dim, {}).double()
    salts = iter(range(3))

    def drop(self, x_HBTC):
        mask = keeps(x_HBTC.transpose(0, 1).shape, seed, next(salts), rate).transpose(0, 1)
        return x_HBTC * mask / (1 - rate)

    monkeypatch.setattr(RetentionScorer, "_drop", drop)
    expected = results(exact, exact, x.double(), grad)
    for name, want in expected.items():
        assert (actual[name].double() - want).norm() <= 1e-5 * want.norm(), name


def test_dropout_drops_the_share_it_should_and_differs_by_seed_and_layer():
    shape = (1, 2, 1000, 64)
    for rate in (0.1, 0.5):
        kept = [keeps(shape, seed, salt, rate).double() for seed, salt in ((1, 0), (2, 0), (1, 1))]
        for mask in kept:
            assert abs(mask.mean() - (1 - rate)) < 0.005
            assert (mask.mean(2) - (1 - rate)).abs().max() < 0.06  # of every channel
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert abs((kept[a] * kept[b]).mean() - (1 - rate) ** 2) < 0.005
        # the two channels of a hash, and the next one
        for a, b in ((0, 1), (1, 2)):
            assert abs((kept[0][..., a:62:2] * kept[0][..., b : 62 + b : 2]).mean() - (1 - rate) ** 2) < 0.005


@interpreted
def test_the_seed_of_torch_decides():
    scorer = build(2, 8, {})
    x = torch.randn(1, 20, 2, 16)

    def run(seed):
        torch.manual_seed(seed)
        return kernels(scorer, x, None, 0.3)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@interpreted
@pytest.mark.parametrize("share", [False, True])
def test_convolve(share):
    scorer = build(3, 16, {"share_heads": share})
    joined_HBSC = torch.randn(3, 2, 4 + 19, 32)
    expected = scorer._convolve(0, joined_HBSC, 19, None)
    y_BHTO = convolve(joined_HBSC.transpose(0, 1), scorer.weights[0], scorer.biases[0], 2, 19, is_first=True)
    torch.testing.assert_close(y_BHTO.transpose(0, 1), expected, atol=1e-5, rtol=1e-5)
