"""Norm, SwiGLU, rotary embedding and the loss: plain forms and kernels against float64 definitions.

On a CPU the kernels run through Triton's interpreter, on a GPU under the marker `gpu`.
"""

import os

import pytest
import torch
import torch.nn.functional as F

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from models import ops  # noqa: E402
from models.rotary import rotary_angles  # noqa: E402
from tests.tiny_models import make_ids, make_model  # noqa: E402

EPS = 1e-6
interpreted = pytest.mark.skipif(ON_GPU, reason="the same kernels run compiled, under the marker gpu")


def norm_definition(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def add_norm_definition(x, residual, weight):
    return norm_definition(x + residual, weight), x + residual


def rotate_definition(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def loss_definition(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.mT).flatten(0, -2), targets.flatten(), reduction="sum")


def angles(batch, length, dim, device="cpu"):
    return rotary_angles(torch.randint(0, 10**6, (batch, length), device=device), dim, 1e4)


def cases(device="cpu", batch=2, length=37):
    """Name, operation, definition and inputs, at odd sizes."""
    x, residual = torch.randn(2, batch, length, 60, device=device)
    weight = torch.randn(60, device=device)
    gate, up = torch.randn(2, batch, length, 44, device=device)
    cos_sin = angles(batch, length, 20, device)
    heads = torch.randn(batch, length, 3, 20, device=device)
    hidden, output = torch.randn(batch, length, 24, device=device), torch.randn(61, 24, device=device) * 0.3
    targets = torch.randint(61, (batch, length), device=device)
    targets[:, ::5] = ops.IGNORE
    double = [a.double() for a in cos_sin]
    return {
        "norm": (lambda x, w: ops.rms_norm(x, w, EPS), norm_definition, (x, weight)),
        "norm of a sum": (
            lambda x, r, w: ops.add_rms_norm(x, r, w, EPS),
            add_norm_definition,
            (x, residual, weight),
        ),
        "norm of a sum, the sum unused": (
            lambda x, r, w: ops.add_rms_norm(x, r, w, EPS)[0],
            lambda x, r, w: norm_definition(x + r, w),
            (x, residual, weight),
        ),
        "a sum, its norm unused": (
            lambda x, r, w: ops.add_rms_norm(x, r, w, EPS)[1],
            lambda x, r, w: x + r + 0 * w.sum(),
            (x, residual, weight),
        ),
        "swiglu": (ops.swiglu, lambda g, u: F.silu(g) * u, (gate, up)),
        "rotary": (lambda x: ops.rotate(x, cos_sin), lambda x: rotate_definition(x, *double), (heads,)),
        "loss": (
            lambda h, w: ops.linear_cross_entropy(h, w, targets, chunk=16),
            lambda h, w: loss_definition(h, w, targets),
            (hidden, output),
        ),
    }


NAMES = sorted(cases())


def run(operation, inputs):
    """Outputs, then gradients of a fixed random functional of them."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = operation(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(7)
    goal = sum((out.double() * torch.randn(out.shape).double().to(out.device)).sum() for out in outputs)
    grads = torch.autograd.grad(goal, inputs, allow_unused=True)
    pairs = zip(grads, inputs, strict=True)
    return [x.detach() for x in outputs], [torch.zeros_like(x) if g is None else g for g, x in pairs]


def compare(case, dtype, tolerance):
    operation, definition, inputs = case
    inputs = [x.to(dtype) for x in inputs]
    outputs, grads = run(operation, inputs)
    for x, grad in zip(inputs, grads, strict=True):
        assert grad.dtype == x.dtype
    expected = run(definition, [x.double() for x in inputs])
    for actual, want in zip([*outputs, *grads], [*expected[0], *expected[1]], strict=True):
        assert (actual.double() - want).norm() <= tolerance * want.norm()


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """CPU tensors go to the kernels too, through the interpreter."""
    pytest.importorskip("fla")
    monkeypatch.setattr(ops, "_is_fused", lambda *tensors: all(x.dtype in ops.FUSED_DTYPES for x in tensors))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_plain_forms(name, dtype, tolerance):
    torch.manual_seed(0)
    if dtype == torch.float64 and name == "rotary":
        tolerance = 1e-6  # cos and sin are float32
    compare(cases()[name], dtype, tolerance)


@interpreted
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_kernels(name, dtype, tolerance, kernels_everywhere):
    torch.manual_seed(0)
    compare(cases(length=13)[name], dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_kernels_compiled(name, dtype, tolerance):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    compare(cases("cuda", batch=3, length=1031)[name], dtype, tolerance)


@interpreted
def test_a_wide_residual_stays_wide(kernels_everywhere):
    """Under autocast the residual stream and its gradient are float32, whatever a mixer returns."""
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 12).bfloat16(), torch.randn(5, 12), torch.randn(12)
    (normed, total), grads = run(lambda *a: ops.add_rms_norm(*a, EPS), (x, residual, weight))
    assert (normed.dtype, total.dtype) == (torch.float32, torch.float32)
    expected = run(add_norm_definition, (x.double(), residual.double(), weight.double()))
    for actual, want, tolerance in zip(grads, expected[1], (5e-3, 1e-6, 1e-6), strict=True):
        assert (actual.double() - want).norm() <= tolerance * want.norm()


def linear_maps(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    maps = [torch.nn.Linear(24, size, bias=False) for size in (10, 5, 31)]
    return [m.to(device, dtype) for m in maps], torch.randn(2, 7, 24).to(device, dtype)


def linears_agree(device, dtype, tolerance):
    maps, x = linear_maps(device, dtype)
    weights = [m.weight for m in maps]
    for used in ((0, 1, 2), (1,), (0, 2)):

        def through(call, used=used):
            return lambda x, *w: tuple(call(x)[i] for i in used)

        together = run_with(through(lambda x: ops.linears(x, *maps)), x, weights)
        apart = run_with(through(lambda x: tuple(m(x) for m in maps)), x, weights)
        for a, e in zip(together, apart, strict=True):
            assert a.dtype == dtype
            assert (a.double() - e.double()).norm() <= tolerance * e.double().norm()


def run_with(operation, x, weights):
    """Outputs, and gradients of x and of the modules' own weights."""
    x = x.detach().clone().requires_grad_()
    outputs = operation(x)
    torch.manual_seed(7)
    goal = sum((out * torch.randn(out.shape).to(out)).sum() for out in outputs)
    grads = torch.autograd.grad(goal, [x, *weights], allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


def test_linears_sum_their_gradients(kernels_everywhere):
    linears_agree("cpu", torch.float32, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_linears_sum_their_gradients_on_gpu(dtype, tolerance):
    torch.backends.cuda.matmul.allow_tf32 = False
    linears_agree("cuda", dtype, tolerance)


def test_linears_leave_other_modules_alone(kernels_everywhere):
    """Frozen weights get no gradient; a hook and a module of another kind are called."""
    maps, x = linear_maps()
    maps[0].weight.requires_grad_(False)
    x.requires_grad_()
    sum(y.sum() for y in ops.linears(x, *maps)).backward()
    assert maps[0].weight.grad is None
    assert maps[1].weight.grad is not None
    torch.testing.assert_close(x.grad, sum(m.weight.sum(0) for m in maps).expand_as(x))
    called = []
    maps[2].register_forward_hook(lambda *a: called.append(1))
    ops.linears(x, *maps)
    assert called == [1]
    maps[2] = torch.nn.Linear(24, 3)
    torch.testing.assert_close(ops.linears(x, *maps)[2], maps[2](x))


def test_linears_follow_autocast(kernels_everywhere):
    maps, x = linear_maps()
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ops.linears(x, *maps)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    sum(y.float().sum() for y in outputs).backward()
    assert x.grad.dtype == maps[0].weight.grad.dtype == torch.float32


def test_norms_return_the_dtype_of_autocast():
    x, weight = torch.randn(5, 12), torch.ones(12)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.rms_norm(x, weight, EPS).dtype == torch.bfloat16
        normed, total = ops.add_rms_norm(x.bfloat16(), x, weight, EPS)
        assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert ops.rms_norm(x.bfloat16(), weight, EPS).dtype == torch.bfloat16


def test_loss_in_any_chunks():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 11, 24, dtype=torch.float64), torch.randn(61, 24, dtype=torch.float64)
    targets = torch.randint(61, (3, 11))
    targets[1] = ops.IGNORE
    expected = run(lambda h, w: loss_definition(h, w, targets), (hidden, weight))
    for chunk in (1, 7, 33, None):
        actual = run(lambda h, w: ops.linear_cross_entropy(h, w, targets, chunk=chunk), (hidden, weight))  # noqa: B023
        for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_loss_of_nothing_is_zero():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"targets \(8,\) must be \(4,\), one for each token"):
        ops.linear_cross_entropy(hidden, weight, torch.zeros(8, dtype=torch.int64))
    loss = ops.linear_cross_entropy(hidden, weight, torch.full((4,), ops.IGNORE))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_loss_never_holds_all_logits():
    """The largest tensor that a call makes has a chunk's size."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(640, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    targets = torch.randint(512, (640,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    with Watch():
        ops.linear_cross_entropy(hidden, weight, targets, chunk=64).backward()
    assert largest == 64 * 512


def test_loss_twice_backward_gives_twice_the_gradient():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    loss = 3 * ops.linear_cross_entropy(hidden, weight, torch.randint(17, (9,)))
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["transformer", "lalte"])
def test_training_on_cuda_has_the_loss_of_evaluation_and_no_logits(family):
    ids = make_ids(2, 150)
    ids[0, :31] = 3
    model = make_model(family, budget=150 if family == "lalte" else 0).cuda()
    ids = ids.cuda()
    with torch.no_grad():
        expected = model(ids, labels=ids)
    output = model.train()(ids, labels=ids, num_items_in_batch=77)
    assert output.logits is None
    assert expected.logits is not None
    want = expected.loss * 2 * 149 / 77
    torch.testing.assert_close(output.lm_loss, want, rtol=1e-3, atol=0)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.gpu
def test_a_training_step_waits_for_nothing():
    """No host synchronisation from the embedding to the last gradient."""
    model = make_model("lalte").cuda().bfloat16().train()
    ids = make_ids(2, 150).cuda()
    for _ in range(2):  # compiled and tuned
        model(ids, labels=ids, num_items_in_batch=298).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, labels=ids, num_items_in_batch=298).loss.backward()
        model.update_retention_penalty()
    finally:
        torch.cuda.set_sync_debug_mode("default")
