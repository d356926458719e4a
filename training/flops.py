"""Model FLOPs of training, and the share of a device's peak that a run reaches (MFU, arXiv 2204.02311, appendix B).

Counted is what the model needs, not what a kernel does: recomputed blocks, padding of tiles and masked halves count
nothing. L layers, H heads, D head dimension, K keys that a query reads, T tokens of a row.
"""

import logging

import torch

from models import HybridConfig
from models.info import describe

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


def matrix_parameters(config: HybridConfig) -> int:
    """Parameters that a token is multiplied with; a scorer that heads share is used once for each."""
    parts = describe(config).parameters
    shared = {"none": 1, "heads": config.num_key_value_heads}
    shared["layers"] = config.num_key_value_heads * config.layer_types.count("attention")
    total = sum(parts.values()) + (shared[config.scorer_sharing] - 1) * parts["scorer"]
    # an embedding is looked up; a tied one is the output layer, too
    return total - (parts["embeddings"] if parts["head"] else 0)


def train_flops_per_token(config: HybridConfig, length: int) -> float:
    """FLOPs of forward and backward for one token of a row of `length`, seen as one document.

    6 · N for the N parameters that a token meets in a product (all but an untied embedding), and of the mixers,
    forward and backward (3 times the forward's):

    - attention: 12 · H · D · K; with a window, K is window + sinks + the target density of the eligible keys
    - native sparse attention: 12 · H · D · K, with K block means, selected keys and the window
    - Gated DeltaNet: 18 · H · D_k · D_v, three products with the state a token: what is read for the key, what is
      written, what is read for the query
    """
    query = torch.arange(1, length + 1, dtype=torch.float64)  # keys up to each query
    kinds = config.layer_types
    total = 6.0 * matrix_parameters(config)
    if count := kinds.count("attention"):
        keys = query
        if config.window is not None:
            beyond = (query - config.window).clamp(min=0)
            sinks = beyond.clamp(max=config.sinks)
            density = config.target_density if config.budget else 0.0
            keys = query - beyond + sinks + density * (beyond - sinks)
        total += count * 12 * config.num_attention_heads * config.head_dim * float(keys.mean())
    if count := kinds.count("nsa"):
        block = config.nsa_block_size
        selected = query.clamp(max=config.nsa_selected_blocks * block)
        keys = query / block + selected + query.clamp(max=config.nsa_window)
        total += count * 12 * config.nsa_num_heads * config.nsa_head_dim * float(keys.mean())
    if count := kinds.count("gated_deltanet"):
        state = config.gdn_head_dim * config.gdn_head_dim * config.gdn_expand_v
        total += count * 18 * config.gdn_num_heads * state
    return total


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
