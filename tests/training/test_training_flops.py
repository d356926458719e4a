"""Model FLOPs by hand, and the peak they are compared with."""

import logging

import pytest
import torch

from models.config import load_config
from training import flops


def test_flops_by_hand():
    """Transformer 0.4B: every linear map, the tied output layer included, and the keys up to each query."""
    config = load_config("configs/models/transformer-0.4b.json")
    norms = (2 * 24 + 1) * 1024
    linear = 341_099_520 - norms
    attention = 24 * 4 * 1024 * 4097 / 2
    assert flops.train_flops_per_token(config, 4096) == pytest.approx(3 * (2 * linear + attention), rel=1e-9)


def test_a_window_costs_what_it_reads():
    """gdn-swa 0.4B: 1,023 queries before the window of 1,024 is full, 3,073 from then on."""
    config = load_config("configs/models/gdn-swa-0.4b.json")
    full = load_config("configs/models/gdn-full-0.4b.json")
    saved = 12 * 4 * 1024 * (4097 / 2 - (1023 * 512 + 3073 * 1024) / 4096)
    more = flops.train_flops_per_token(full, 4096) - flops.train_flops_per_token(config, 4096)
    assert more == pytest.approx(3 * saved, rel=1e-6)


def test_peak(monkeypatch, caplog):
    assert flops.peak_flops(torch.device("cpu"), 2.5) == 2.5e12
    with caplog.at_level(logging.WARNING):
        assert flops.peak_flops(torch.device("cpu")) is None
    assert "the peak of 'cpu' in bfloat16 isn't known; log.peak_tflops sets it" in caplog.text
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40", 181e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(torch.device("cuda")) == peak
