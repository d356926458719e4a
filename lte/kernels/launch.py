"""How the kernels of a decoding step are launched: on the right device, and overlapping on Hopper and later.

With overlap (programmatic dependent launch) a kernel starts while its predecessor still runs: it may read weights
at once, and everything else after `wait_for_inputs`. Dependents are let in only after that wait, so when a kernel
starts, all but its direct predecessor have finished.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# first generation with programmatic dependent launch
HOPPER = 9


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Until the kernels before this one have written everything."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


def can_overlap(device: torch.device) -> bool:
    """Whether kernels on this device may start before their predecessors end."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= HOPPER


def launch_options(overlap: bool, *, warps: int, stages: int = 2) -> dict[str, int | bool]:
    """Launch options of a kernel."""
    return dict(num_warps=warps, num_stages=stages, **({"launch_pdl": True} if overlap else {}))


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device: make it x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for integers on the host: Triton's own function takes microseconds there."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n >= 1, on the host as `ceil_div`."""
    return 1 << (n - 1).bit_length()
