"""Devices: what is measured of them, and with how much work."""

import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.system import device


def test_peak_is_measured_with_small_products_if_they_are_slow(monkeypatch: pytest.MonkeyPatch):
    """A CPU without bf16 instructions would take a quarter of an hour for eight products of width 2048."""
    monkeypatch.setattr(device, "SLOW_PRODUCT", 0.0)
    with FlopCounterMode(display=False) as counter:
        assert inspect.unwrap(device._measure)(torch.device("cpu"), torch.float32) > 0
    assert counter.get_total_flops() == 2 * 256**3
