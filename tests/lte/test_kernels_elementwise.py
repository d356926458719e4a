"""Element-wise kernels against their definitions in float64; on a CPU through Triton's interpreter."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

pytest.importorskip("triton")

from lte.kernels.elementwise import straight_through_gradient  # noqa: E402
from lte.straight_through import straight_through  # noqa: E402

interpreted = pytest.mark.skipif(ON_GPU, reason="the same kernels run compiled, under the marker gpu")


def through_agrees(shape, dtype, tolerance, device="cpu"):
    torch.manual_seed(0)
    grad, v = torch.randn(2, *shape, device=device).to(dtype)
    logits = torch.randn(shape[:-1], device=device)
    actual = straight_through_gradient(grad, v, logits)
    assert actual.dtype == torch.float32
    r = logits.double().sigmoid()
    expected = (grad.double() * v.double()).sum(-1) * r * (1 - r)
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@interpreted
@pytest.mark.parametrize("shape", [(2, 37, 3, 60), (1, 1, 1, 32), (1, 300, 2, 80)])
def test_straight_through_gradient(shape):
    through_agrees(shape, torch.float32, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1031, 3, 60), (1, 1, 1, 32), (4, 777, 8, 64), (1, 300, 2, 256)])
def test_straight_through_gradient_compiled(shape, dtype):
    through_agrees(shape, dtype, 1e-5, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_on_gpu_is_that_on_cpu(dtype):
    torch.manual_seed(0)
    v, logits, grad = torch.randn(2, 50, 3, 64).to(dtype), torch.randn(2, 50, 3), torch.randn(2, 50, 3, 64).to(dtype)
    found = []
    for device in ("cpu", "cuda"):
        x, y = v.to(device).requires_grad_(), logits.to(device).requires_grad_()
        found.append([g.cpu() for g in torch.autograd.grad(straight_through(x, y), (x, y), grad.to(device))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
