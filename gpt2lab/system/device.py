"""What the hardware can do: peak matrix-product speed per number format, and the memory a process has used.

Also how to ask a GPU for something without making it wait: a step's work is queued faster than it is done, and stays so
only as long as nobody waits for a result.
"""

import json
import platform
import re
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import write_json

# Dense matrix products with bf16 or fp16 inputs, FLOP/s, from the makers' data sheets (without sparsity).
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


def flops_per_token(parameters: int, layers: int, width: int, length: int) -> float:
    """Forward and backward FLOP of one token: 6 N + 12 · L · D · T (PaLM, appendix B).

    Args:
        parameters: N without position embeddings, which no product multiplies; the token embeddings are the head's.
    """
    return 6 * parameters + 12 * layers * width * length


def peak_flops(device: torch.device, dtype: torch.dtype, cache_dir: str | Path) -> float:
    """Peak matrix-product FLOP/s of one device: a known GPU's 16-bit data sheet value, else measured once and kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        for known in sorted(GPU_PEAKS, key=len, reverse=True):
            if re.search(rf"\b{re.escape(known)}\b", name):
                return GPU_PEAKS[known]
    key = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}"
    file = Path(cache_dir) / "device_peaks.json"
    try:
        known_peaks = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        known_peaks = {}
    if key not in known_peaks:
        known_peaks[key] = _measure(device, dtype)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known_peaks)
    return known_peaks[key]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: the allocator's on a GPU, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the process was before exec
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory_bytes() -> int:
    """What this process holds now; where the system does not say, the most it has held."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else peak_memory_bytes(torch.device("cpu"))


def named_dtype(name: str | None) -> torch.dtype:
    """Return the dtype of this name in torch; None: float32."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}.get(
        name or "", torch.float32
    )


def named_device(accelerator: str) -> torch.device:
    """The device that auto, cpu, gpu or mps means on this machine.

    Raises:
        InputError: this machine has none of the kind.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("accelerator=gpu, but PyTorch finds no GPU here; leave it out or give accelerator=cpu.")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise InputError("accelerator=mps, but PyTorch finds no Apple GPU here; leave it out or give accelerator=cpu.")
    if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("mps" if accelerator == "mps" else "cpu")


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest float of a device, for long sums: an Apple GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a GPU, so that a clock read now counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seed_random_state(device: torch.device, seed: int) -> None:
    """Seed PyTorch's global random states of the CPU and of `device`.

    `torch.manual_seed` gives the same numbers, but notes a stack trace for every kind of device that is not in use: one
    to two milliseconds at each call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class LaterNumber:
    """A number () that a GPU is still at: its way to the CPU is queued, and nothing waits for it before it is read."""

    def __init__(self, number: Tensor) -> None:
        number, self._arrival = number.detach(), None
        is_queued = number.device.type == "cuda"
        self._number = number.to("cpu", non_blocking=is_queued)  # into pinned memory then
        if is_queued:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> float:
        """Waits for what was queued before it, not for what came after."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._number.item()


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """Best of several products of two square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    own_numbers = torch.Generator().manual_seed(0)  # the global random state stays as it is
    left, right = (torch.randn(size, size, generator=own_numbers).to(device, dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()
