"""Devices: what is measured of them, and with how much work."""

import inspect
import json
from pathlib import Path

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


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"7", b"\xff", b"[" * 100_000, b'{"KEY": "x"}'])
def test_a_damaged_file_of_peaks_is_measured_again(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_measure", lambda *_: 7.0)
    file, cpu = tmp_path / "device_peaks.json", (torch.device("cpu"), torch.float32)
    device.peak_flops(*cpu, tmp_path)
    (key,) = json.loads(file.read_text())
    file.write_bytes(content.replace(b"KEY", key.encode()))
    assert device.peak_flops(*cpu, tmp_path) == 7.0
    assert json.loads(file.read_text()) == {key: 7.0}


def test_a_cpu_multiplies_bf16_if_its_flags_say_so(tmp_path: Path) -> None:
    for flags, has in (("fpu avx512_bf16 sse", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx2", False)):
        file = tmp_path / flags.replace(" ", "-")
        file.write_text(f"flags : {flags}\n")
        assert device.cpu_has_bf16(file) is has
    assert device.cpu_has_bf16(tmp_path / "missing") is False
