"""Devices: peak FLOP/s per dtype, memory in use, and reading a GPU scalar without an immediate synchronisation."""

import json
import platform
import re
import resource
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import write_json
from gpt2lab.storage.damaged_files import read_file

# Dense matrix products with bf16 or fp16 inputs, FLOP/s, from data sheets (without sparsity).
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A100": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


SLOW_PRODUCT = 0.5  # seconds: without bf16 instructions, eight products of width 2048 take a quarter of an hour


def flops_per_token(parameters: int, layers: int, width: int, length: int) -> float:
    """Forward and backward FLOP of one token: 6 N + 12 · L · D · T (PaLM, appendix B).

    Args:
        parameters: N without position embeddings; token embeddings count, because they are the LM head.
    """
    return 6 * parameters + 12 * layers * width * length


def peak_flops(device: torch.device, dtype: torch.dtype, cache_dir: str | Path) -> float:
    """Peak matrix-product FLOP/s of a device: 16-bit data sheet value of a known GPU, else measured once and cached."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        for known in sorted(GPU_PEAKS, key=len, reverse=True):
            if re.search(rf"\b{re.escape(known)}\b", name):
                return GPU_PEAKS[known]
    key = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}"
    file = Path(cache_dir) / "device_peaks.json"
    known_peaks = _measured_peaks(file)
    if key not in known_peaks:
        known_peaks[key] = _measure(device, dtype)
        with suppress(OSError):  # a read-only cache: the next run measures again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known_peaks)
    return known_peaks[key]


def _measured_peaks(file: Path) -> dict[str, float]:
    """Read the peaks measured earlier; a damaged file has none."""
    try:
        stored = json.loads(read_file(file))
    except (OSError, ValueError, RecursionError):
        return {}
    values = stored.items() if isinstance(stored, dict) else ()
    return {key: float(value) for key, value in values if type(value) in (int, float) and value > 0}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the CUDA allocator's on a GPU, otherwise the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := _process_status("VmHWM"):  # getrusage would count what the process was before exec
        return peak
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> int:
    """Reset the peak that `peak_memory_bytes` returns to the memory in use, and return it.

    Source: proc_pid_clear_refs(5).

    Raises:
        OSError: the peak of a process cannot be reset, as on other systems than Linux and in some containers.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with Path("/proc/self/clear_refs").open("w", encoding="utf-8") as file:
            file.write("5")
    return peak_memory_bytes(device)


def resident_memory_bytes() -> int:
    """Resident set of this process now; its peak where the system does not report the current value."""
    return _process_status("VmRSS") or peak_memory_bytes(torch.device("cpu"))


def _process_status(name: str) -> int:
    """Return a size in bytes that Linux reports about this process; 0 on other systems."""
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def named_dtype(name: str | None) -> torch.dtype:
    """Return the dtype of this name in torch; None: float32."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}.get(
        name or "", torch.float32
    )


def resolve_device(accelerator: str) -> torch.device:
    """Return this machine's device for auto, cpu, gpu or mps.

    Raises:
        InputError: this machine has no such device.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("accelerator=gpu, but PyTorch finds no GPU here; omit it or give accelerator=cpu.")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise InputError("accelerator=mps, but PyTorch finds no Apple GPU here; omit it or give accelerator=cpu.")
    if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("mps" if accelerator == "mps" else "cpu")


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest float dtype of a device, for long sums: an Apple GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def multiplies_bf16(device: str) -> bool:
    """Return whether a kind of device, cpu or cuda, multiplies bf16 in hardware; others are taken to."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "cpu" or cpu_has_bf16()


@cache
def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with `hidden`: autocast's where it is active, else that of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device. A GPU reads it from pinned memory, so that the CPU does not wait for it."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a GPU, so that a timing includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seed_random_state(device: torch.device, seed: int) -> None:
    """Seed PyTorch's global random states of the CPU and of `device`.

    `torch.manual_seed` has the same effect, but records a stack trace for every unused device type, which takes one to
    two milliseconds per call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class AsyncScalar:
    """A scalar whose copy from GPU to CPU is queued; only `read` waits for it."""

    def __init__(self, number: Tensor) -> None:
        number, self._copied = number.detach(), None
        is_queued = number.device.type == "cuda"
        self._number = number.to("cpu", non_blocking=is_queued)  # into pinned memory then
        if is_queued:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> float:
        """Wait for the work queued before the copy, not for later work, and return the number."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._number.item()


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOP/s: the best product of two square matrices; a CPU that emulates `dtype` gets small ones only."""
    generator = torch.Generator().manual_seed(0)  # leaves the global random state unchanged
    best = 0.0
    for size in (8192,) if device.type == "cuda" else (256, 512, 1024, 2048):
        left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        for _ in range(8):
            synchronize(device)
            start = time.perf_counter()
            left @ right
            synchronize(device)
            seconds = time.perf_counter() - start
            best = max(best, 2 * size**3 / seconds)
            if device.type == "cpu" and seconds > SLOW_PRODUCT:
                return best
    return best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()
