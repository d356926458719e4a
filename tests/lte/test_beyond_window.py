"""Straight-through gradients from queries beyond the window only, against their definitions.

Shapes: B batch, T tokens, H KV heads, N query heads, D head dimension.
"""

import os
from itertools import pairwise

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from lte.attention import retained_attention  # noqa: E402
from lte.layout import Layout  # noqa: E402
from lte.straight_through import LATE, LEAST_REST, STRAIGHT_THROUGH  # noqa: E402
from lte.visibility import visible  # noqa: E402

interpreted = pytest.mark.skipif(ON_GPU, reason="the same kernels run compiled, under the marker gpu")
BOUNDS = [0, 5, 6, 41, 41, 77]


def definition(q, k, v, logits, *, window, sinks, budget=None, cu_seqlens=None, off_by_one=False, of_weight=False):
    """Dense attention in which a factor of value 1, with r's gradient, stands for retained pairs alone.

    It is one of v, or with of_weight one of the softmax's numerator (and so in its denominator too).
    """
    batch, length, heads = logits.shape
    layout = Layout(cu_seqlens=cu_seqlens)
    sizes = dict(batch=batch, length=length, heads=heads, device=logits.device)
    rule = dict(**sizes, window=window, sinks=sinks, layout=layout)
    seen = visible(logits.detach(), budget=budget, **rule)
    retained = seen & ~visible(None, budget=0, **rule)
    group = q.shape[2] // heads
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    seen, retained = (x.repeat_interleave(group, 1) for x in (seen, retained))
    r = logits.transpose(1, 2).repeat_interleave(group, 1).sigmoid()[..., None]
    one = 1 + r - r.detach()
    score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    if of_weight:
        score = score + torch.where(retained, one.mT.log(), 0)
    if off_by_one:
        score = torch.nn.functional.pad(score, (0, 1))
    weight = score.softmax(-1)[..., :length]
    out = weight @ v if of_weight else (weight * ~retained) @ v + (weight * retained) @ (v * one)
    return out.transpose(1, 2)


def presence(q, k, v, logits, grad, *, window, sinks, budget=None, cu_seqlens=None, off_by_one=False):
    """Gradient of logits: what the outputs of later queries change by each key, which is left out or let in.

    Where a key has nearly all of a query's softmax, so that the rest is below LEAST_REST, the change counts less.
    """
    batch, length, heads = logits.shape
    layout = Layout(cu_seqlens=cu_seqlens)
    rule = dict(batch=batch, length=length, heads=heads, device=logits.device, window=window, sinks=sinks)
    seen = visible(logits, budget=budget, layout=layout, **rule)
    document = layout.documents(batch, length, logits.device)
    group = q.shape[2] // heads
    q, grad = (x.transpose(1, 2).unflatten(1, (heads, group)) for x in (q, grad))
    score = q @ k.transpose(1, 2)[:, :, None].mT * q.shape[-1] ** -0.5
    later = torch.arange(length, device=logits.device)
    found = torch.zeros_like(logits)

    def attend(mask):
        numerator = score.exp() * mask[:, :, None]
        total = numerator.sum(-1, keepdim=True) + off_by_one
        return numerator / total @ v.transpose(1, 2)[:, :, None], (numerator / total)

    for j in range(length):
        with_j, without_j = seen.clone(), seen.clone()
        with_j[..., j], without_j[..., j] = True, False
        (there, weight), (away, _) = attend(with_j), attend(without_j)
        rest = 1 - weight[..., j]
        factor = torch.where(seen[:, :, None, :, j], (rest / LEAST_REST).clamp(max=1), 1)
        change = ((there - away) * grad).sum(-1) * factor
        asks = (later >= j + window) & (document == document[:, j, None])
        asks = asks & (layout.positions(batch, length, logits.device)[:, j, None] >= sinks)
        found[:, j] = (change.nan_to_num() * asks[:, None, None]).sum((2, 3))
    r = logits.sigmoid()
    return found * r * (1 - r)


def inputs(batch, length, heads, group, dim, seed=0, device="cpu"):
    torch.manual_seed(seed)
    shapes = [(batch, length, heads * group, dim), *[(batch, length, heads, dim)] * 2, (batch, length, heads)]
    return [torch.randn(shape).to(device) for shape in shapes], torch.randn(shapes[0]).to(device)


def compare(tensors, grad, backend, limit, *, dtype=torch.float32, gradient_from="beyond_window", **rule):
    """Output and all gradients of a backend in `dtype`, against the definition in float64 on the rounded inputs."""
    *qkv, logits = tensors
    rounded = [*(x.to(dtype) for x in qkv), logits]
    exact = [x.double().requires_grad_() for x in rounded]
    want = definition(*exact, **rule, of_weight=gradient_from == "weight_beyond_window")
    wanted = [want, *torch.autograd.grad(want, exact, grad.to(dtype).double())]
    if gradient_from == "presence_beyond_window":
        wanted[-1] = presence(*(x.detach() for x in exact), grad.to(dtype).double(), **rule)
    leaves = [x.detach().requires_grad_() for x in rounded]
    out = retained_attention(*leaves, **rule, backend=backend, gradient_from=gradient_from)
    got = [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]
    for name, a, b in zip(("out", "dq", "dk", "dv", "dlogits"), got, wanted, strict=True):
        assert torch.isfinite(a).all(), name
        assert b.norm() > 0, name
        off = ((a.double() - b).norm() / b.norm()).item()
        assert off <= limit, (name, off)
    return got[-1]


RULES = {
    "rows": dict(window=9, sinks=2),
    "a budget": dict(window=9, sinks=2, budget=3),
    "packed": dict(window=7, sinks=1, cu_seqlens=torch.tensor(BOUNDS)),
    "zero sink": dict(window=9, sinks=0, off_by_one=True),
    "a wide window": dict(window=60, sinks=3),
    "a narrow window": dict(window=1, sinks=0),
}


@pytest.mark.parametrize("gradient_from", LATE)
@pytest.mark.parametrize("name", RULES)
def test_reference(name, gradient_from):
    rule = RULES[name]
    tensors, grad = inputs(1 if "cu_seqlens" in rule else 2, 77, 2, 3, 12)
    grads = compare(tensors, grad, "reference", 1e-5, gradient_from=gradient_from, **rule)
    sinks = range(rule["sinks"])
    if name == "packed":
        sinks = [a for a, b in pairwise(BOUNDS) if b > a]
    assert not grads[:, list(sinks)].any()
    evicted = grads[tensors[-1] <= 0].any()
    assert evicted == (gradient_from == "presence_beyond_window"), (
        "evicted keys are read by no query beyond their window"
    )


@interpreted
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("group", "dim", "gradient_from"), [(1, 32, "beyond_window"), *((3, 20, name) for name in LATE)]
)
def test_kernels(name, group, dim, gradient_from):
    pytest.importorskip("triton")
    rule = RULES[name]
    tensors, grad = inputs(1 if "cu_seqlens" in rule else 2, 77, 1, group, dim, seed=1)
    compare(tensors, grad, "triton", 1e-5, gradient_from=gradient_from, **rule)


@interpreted
def test_kernels_with_few_columns(monkeypatch):
    """So few that several workers take each tile of them, a window of several tiles, and fresh memory full of NaN."""
    pytest.importorskip("triton")
    (*qkv, logits), grad = inputs(1, 293, 1, 2, 16, seed=2)
    logits = torch.where(torch.rand_like(logits) < 0.04, logits.abs(), -logits.abs())
    empty = torch.empty

    def filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 2**31 - 1)

    monkeypatch.setattr(torch, "empty", filled)
    for gradient_from in LATE:
        compare([*qkv, logits], grad, "triton", 1e-5, gradient_from=gradient_from, window=70, sinks=1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("gradient_from", LATE)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_compiled_kernels(name, dtype, limit, gradient_from):
    rule = dict(RULES[name])
    length = 77
    if "cu_seqlens" in rule:
        rule["cu_seqlens"] = rule["cu_seqlens"].cuda()
    tensors, grad = inputs(1 if "cu_seqlens" in rule else 2, length, 2, 3, 64, device="cuda")
    compare(tensors, grad, "triton", limit, dtype=dtype, gradient_from=gradient_from, **rule)


def test_values_and_other_gradients_are_those_of_all_queries():
    tensors, grad = inputs(2, 50, 2, 2, 8)
    results = []
    for gradient_from in STRAIGHT_THROUGH:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = retained_attention(*leaves, window=9, sinks=2, gradient_from=gradient_from)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    *same, of_all = results[0]
    for *again, of_later in results[1:]:
        for a, b in zip(same, again, strict=True):
            assert torch.equal(a, b)
        assert (of_all != of_later).any()


def test_gradients_of_weights_cancel_within_a_query():
    """What one key's weight loses the others win; here a query reads its own key and retained ones."""
    (*qkv, logits), grad = inputs(2, 50, 2, 2, 8)
    logits = logits.abs().requires_grad_()
    q, k, v = qkv
    out = retained_attention(q, k, v, logits, window=1, gradient_from="weight_beyond_window")
    only = torch.zeros_like(out)
    only[:, 40] = grad[:, 40]
    (late,) = torch.autograd.grad(out, logits, only)
    r = logits.sigmoid()
    of_weights = (late / (r * (1 - r))).detach()
    weight = torch.softmax(torch.einsum("bnd,bjnd->bnj", q[:, 40], k.repeat_interleave(2, 2)[:, :41]) * 8**-0.5, -1)
    read = torch.einsum("bnd,bjnd->bnj", grad[:, 40], v.repeat_interleave(2, 2)[:, :41])
    own = (weight * (read - (weight * read).sum(-1, keepdim=True)))[..., 40].view(2, 2, 2).sum(-1)
    torch.testing.assert_close(of_weights.sum(1) + own, torch.zeros_like(own), atol=1e-5, rtol=0)


def test_errors():
    tensors, _ = inputs(1, 9, 1, 1, 8)
    with pytest.raises(ValueError, match="gradient_from='some'"):
        retained_attention(*tensors, window=3, gradient_from="some")
    with pytest.raises(ValueError, match="flex"):
        retained_attention(*tensors, window=3, gradient_from="beyond_window", backend="flex")
