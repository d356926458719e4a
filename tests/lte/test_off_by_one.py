"""Softmax with 1 in its denominator, in every form of attention, against its definition (arXiv 2309.17453, eq. 2)."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

pytest.importorskip("triton")

from lte.attention import in_cache_attention, interval_attention, retained_attention, softmax_weights  # noqa: E402
from lte.kernels.attention import interval_attention as triton_attention  # noqa: E402
from lte.kernels.decode_attention import decode_attention  # noqa: E402
from lte.visibility import visible  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
BATCH, TOKENS, HEADS, GROUP, DIM = 2, 61, 2, 3, 20
RULE = {"window": 9, "sinks": 2, "budget": 5}


def definition(score, mask):
    """exp(s) over 1 + the sum of exp(s), of visible pairs."""
    weight = score.exp() * mask
    return weight / (1 + weight.sum(-1, keepdim=True))


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS * GROUP, DIM), (HEADS, DIM), (HEADS, DIM)]
    q, k, v = (torch.randn(BATCH, TOKENS, *s, generator=generator, dtype=torch.float64) for s in shapes)
    logits = torch.randn(BATCH, TOKENS, HEADS, generator=generator)
    # scores of either sign and size: of some queries the 1 is most of the denominator, of others nothing
    return *(x.to(dtype) for x in (q * 3, k, v)), logits


def expected(q, k, v, mask_BHTT):
    q, k, v = (x.movedim(2, 1) for x in (q, k.repeat_interleave(GROUP, 2), v.repeat_interleave(GROUP, 2)))
    score = q @ k.mT * DIM**-0.5
    return (definition(score, mask_BHTT.repeat_interleave(GROUP, 1)) @ v).movedim(1, 2)


def rule_mask(logits):
    return visible(logits, batch=BATCH, length=TOKENS, heads=HEADS, **RULE)


def relative(actual, wanted):
    actual, wanted = actual.detach().double().cpu(), wanted.detach().double().cpu()
    return float((actual - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("backend", ["reference", "flex", "triton"])
def test_backends_and_gradients(backend):
    if backend == "flex" and not ON_GPU:
        with torch.no_grad():  # FlexAttention has no backward pass on a CPU
            agree(backend, gradients=False)
    else:
        agree(backend)


def agree(backend, gradients=True):
    q, k, v, logits = inputs(torch.float32)
    mine = [x.to(DEVICE).requires_grad_(gradients) for x in (q, k, v)]
    out = retained_attention(*mine, logits.to(DEVICE), **RULE, off_by_one=True, backend=backend)
    exact = [x.double().requires_grad_(gradients) for x in (q, k, v)]
    want = expected(*exact, rule_mask(logits))
    assert relative(out, want) <= 1e-5
    assert relative(retained_attention(*mine, logits.to(DEVICE), **RULE, backend=backend), want) > 0.1
    if gradients:
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = torch.autograd.grad(want, exact, grad)
        for a, b in zip(torch.autograd.grad(out, mine, grad.float().to(DEVICE)), wanted, strict=True):
            assert relative(a, b) <= 1e-5


@pytest.mark.parametrize("queries", [1, 7])
def test_a_query_that_sees_no_key_reads_the_zero(queries):
    k, v = torch.randn(2, 1, 9, 2, 16, device=DEVICE)
    q = torch.randn(1, queries, 4, 16, device=DEVICE)
    end = torch.zeros(1, 9, 2, dtype=torch.int32, device=DEVICE)
    for backend in ("reference", "triton"):
        assert not interval_attention(q, k, v, end, window=3, off_by_one=True, backend=backend).any()
    assert not triton_attention(q, k, v, end, window=3, off_by_one=True).any()


@pytest.mark.parametrize("processors", [1, 40], ids=["whole", "split"])
def test_one_query_over_slots(processors, monkeypatch):
    monkeypatch.setattr("lte.kernels.decode_attention._processors", lambda device: processors)
    torch.manual_seed(0)
    q = 3 * torch.randn(2, 6, 20)
    k, v = torch.randn(2, 2, 2, 190, 20)
    positions = torch.randint(-1, 5, (2, 2, 190))
    positions[1] = -1
    mask = (positions >= 0)[:, :, None].repeat_interleave(3, 1)
    k_all, v_all = (x.double().repeat_interleave(3, 1) for x in (k, v))
    want = definition(q.double()[:, :, None] @ k_all.mT * 20**-0.5, mask) @ v_all
    tensors = (x.to(DEVICE) for x in (q, k, v, positions))
    got = decode_attention(*tensors, off_by_one=True)
    assert relative(got[0], want[0, :, 0]) <= 1e-5
    assert not got[1].any()


def test_positions_in_the_cache():
    """Without rotation in-cache attention is plain attention."""
    q, k, v, logits = inputs()
    mask = rule_mask(logits)
    end = torch.where(mask.any(2), mask.int().flip(2).argmax(2).neg() + TOKENS, 0).transpose(1, 2).int()
    positions = torch.arange(TOKENS)[None, :, None].expand(BATCH, -1, HEADS)
    out = in_cache_attention(
        q, k, v, end, positions=positions, frequencies=torch.zeros(DIM // 2, dtype=torch.float64), off_by_one=True
    )
    assert relative(out, expected(q, k, v, mask)) <= 1e-10


def test_weights():
    score = torch.tensor([[1.0, -torch.inf, -2.0], [-torch.inf] * 3, [800.0, 0.0, -800.0]], dtype=torch.float64)
    weights = softmax_weights(score, off_by_one=True)
    total = 1 + torch.tensor(1.0).double().exp() + torch.tensor(-2.0).double().exp()
    torch.testing.assert_close(weights[0], score[0].exp() / total)
    assert not weights[1].any()
    torch.testing.assert_close(weights[2], torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
