"""Model FLOPs of training, and the share of a device's peak that a run reaches (MFU, arXiv 2204.02311, appendix B).

Counted is what the model needs, not what a kernel does: recomputed blocks, padding of tiles and masked halves count
nothing.
"""

import logging

import torch

from models import HybridConfig
from models.costs import costs

log = logging.getLogger(__name__)

# dense bfloat16 with float32 sums, in TFLOP/s, from the makers' data sheets; the first name that is part of the
# device's counts
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "H800": 989.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def train_flops_per_token(config: HybridConfig, length: int) -> int:
    """FLOPs of forward and backward for one token of a row of `length`, seen as one document.

    Three times those of the forward pass (models/costs.py), as every product of it has two in the backward pass.
    """
    return 3 * costs(config, length).training_operations


def peak_flops(device: torch.device, override: float | None = None) -> float | None:
    """Peak FLOP/s of a device in bfloat16; None, with a line in the log, where it isn't known.

    override: TFLOP/s from the configuration.
    """
    if override is not None:
        return override * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for part, tflops in PEAK_TFLOPS.items():
        if part in name:
            return tflops * 1e12
    log.warning("no MFU is reported: the peak of %r in bfloat16 isn't known; log.peak_tflops sets it", name)
    return None
