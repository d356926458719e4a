"""Model FLOPs by hand, and the peak they are compared with."""

import logging

import pytest
import torch

from models.config import load_config
from training import flops


@pytest.mark.parametrize(
    ("model", "parameters", "mixers"),
    [
        ("transformer-0.4b", 341_099_520, 24 * 12 * 1024 * 4097 / 2),
        ("gdn-0.4b", 366_956_928, 24 * 18 * 8 * 128**2),
        # 1.4B isn't tied: its embedding of 32000 x 2048 is only looked up
        ("gdn-1.4b", 1_466_343_808 - 32000 * 2048, 24 * 18 * 8 * 256**2),
        # 1023 queries before the window is full, 1024 keys from then on
        ("gdn-swa-0.4b", 354_028_224, 12 * 18 * 8 * 128**2 + 12 * 12 * 1024 * (1023 * 512 + 3073 * 1024) / 4096),
    ],
)
def test_flops_by_hand(model, parameters, mixers):
    config = load_config(f"configs/models/{model}.json")
    assert flops.matrix_parameters(config) == parameters
    assert flops.train_flops_per_token(config, 4096) == pytest.approx(6 * parameters + mixers, rel=1e-12)


def test_the_window_and_what_is_kept():
    """lalte: sinks, window and the target density of the rest, query by query."""
    changes = {"window": 24, "sinks": 3, "budget": 20, "max_position_embeddings": 124}
    config = load_config("configs/models/lalte-tiny.json", changes)
    density = 20 / 100
    keys = [min(q, 24) + min(3, max(0, q - 24)) + density * max(0, q - 27) for q in range(1, 125)]
    attention = 12 * config.num_attention_heads * config.head_dim * config.layer_types.count("attention")
    without = load_config("configs/models/lalte-tiny.json", {**changes, "sinks": 0, "budget": 0})
    windowed = [min(q, 24) for q in range(1, 125)]
    more = flops.train_flops_per_token(config, 124) - flops.train_flops_per_token(without, 124)
    assert more == pytest.approx(attention * (sum(keys) - sum(windowed)) / 124, rel=1e-9)


def test_shared_scorers_and_block_selection():
    own = flops.matrix_parameters(load_config("configs/models/lalte-0.4b.json"))
    assert flops.matrix_parameters(load_config("configs/models/lalte-0.4b.json", {"scorer_sharing": "layers"})) == own
    nsa, full = (load_config(f"configs/models/{name}-0.4b.json") for name in ("nsa", "transformer"))
    per_parameter = [flops.train_flops_per_token(c, 65536) / flops.matrix_parameters(c) for c in (nsa, full)]
    assert per_parameter[0] < 0.5 * per_parameter[1]


def test_peak(monkeypatch, caplog):
    assert flops.peak_flops(torch.device("cpu"), 2.5) == 2.5e12
    with caplog.at_level(logging.WARNING):
        assert flops.peak_flops(torch.device("cpu")) is None
    assert "the peak of 'cpu' in bfloat16 isn't known; log.peak_tflops sets it" in caplog.text
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40", 181e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(torch.device("cuda")) == peak
