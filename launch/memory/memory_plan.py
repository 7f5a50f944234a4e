"""Memory plan: bytes that one device needs for a run, computed from sizes alone, without allocation.

memory_terms.py is the table of terms; PHASES lists which of them are allocated at the same time. A GPU's peak is its
largest phase. A CPU process also holds the interpreter and its libraries, and freed memory that fits no later tensor.
"""

from dataclasses import dataclass, replace

from launch.memory.memory_terms import RunSizes, memory_terms

STATIC = ("weights", "optimizer state", "averaged weights", "teacher weights")
KEPT = (*STATIC, "gradients")
FORWARD = ("gradients", "activations", "weight casts", "teacher hidden states")
BACKWARD = ("activations", "LM head gradients", "logits buffer", "hidden states")
# Phase → moments; a moment's terms are allocated at once, beside STATIC ones
PHASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "forward": (
        (*FORWARD, "LM head gradients", "LM head temporaries"),
        (*FORWARD, "block temporaries"),
        ("gradients", "teacher activations", "logits buffer"),
    ),
    "backward": (
        (*BACKWARD, "block gradients", "accumulated gradients"),
        ("gradients", "logits buffer", "block gradients"),
    ),
    "optimizer": (("gradients", "logits buffer", "optimizer temporaries"),),
    "validation": (("gradients", "logits buffer", "trained weights", "validation batch"),),
    "generation": (("gradients", "logits buffer", "trained weights", "generation"),),
    "saving": (("gradients", "logits buffer", "export"),),
}
TRAINING = ("forward", "backward", "optimizer")
SHOWN = (
    *KEPT,
    "activations",
    "LM head gradients",
    "LM head temporaries",
    "teacher activations",
    "generation",
    "checkpoint copy",
    "export",
)

# A CPU process beyond its tensors; docs/measurements/planning.md has the measurements
LIBRARY_BYTES = 30_000_000  # pages of PyTorch's and MKL's libraries that the first step reads
COMPILER_BYTES = 110_000_000  # torch.compile, in a process that compiles the LM-head loss
WANDB_BYTES = 26_000_000  # import wandb and wandb.init
WANDB_TABLE_BYTES = 35_000_000  # pandas and pyarrow, which wandb.Table imports for the samples
# Bytes that malloc holds for one byte of temporaries, when it keeps freed memory (gpt2lab/system/malloc_tuning.py)
HEAP_FACTOR = 1.5
MIXED_HEAP_FACTOR = 2.25  # LoRA, and micro-batches of different lengths under autocast: tensors of many sizes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one GPU, or of one CPU process, by part and by phase.

    Attributes:
        parts: bytes of each part; not all are allocated at once.
        phases: bytes of all tensors that are allocated at once in each phase.
        process: bytes of a CPU process before a model is built; 0 on a GPU.
        fragmentation: bytes that a CPU process holds beyond its tensors: freed memory and libraries; 0 on a GPU.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    process: int
    fragmentation: int

    @property
    def peak(self) -> int:
        """Peak bytes of the device."""
        return self.process + self.fragmentation + max(self.phases.values())

    @property
    def largest_phase(self) -> str:
        """Name of the phase with the most bytes."""
        return max(self.phases, key=self.phases.__getitem__)


def memory_plan(sizes: RunSizes, process: int = 0) -> MemoryPlan:
    """Compute the memory plan of a run.

    Args:
        process: bytes of a CPU process before a model is built.
    """
    size = memory_terms(sizes)
    static = sum(size[name] for name in STATIC)
    phases = {
        phase: static + max(sum(size[name] for name in moment) for moment in moments)
        for phase, moments in PHASES.items()
    }
    phases["teacher cache"] = size["teacher cache"]  # before the student is built
    parts = {name: size[name] for name in SHOWN}
    between = 0 if sizes.on_gpu else _cpu_bytes(sizes, size, phases) - max(phases.values())
    return MemoryPlan(parts, phases, 0 if sizes.on_gpu else process, between)


def _cpu_bytes(sizes: RunSizes, size: dict[str, int], phases: dict[str, int]) -> int:
    """Return the peak bytes of a CPU process beyond its start.

    All phases share one heap, which never shrinks and is larger than the temporaries in it. Beside it, another thread
    writes a checkpoint and its export while training continues.
    """
    kept = sum(size[name] for name in KEPT)
    training = max(phases[name] for name in TRAINING) - kept
    evaluation = max(phases["validation"], phases["generation"]) - kept
    mixed = sizes.lora_rank or (sizes.varied and sizes.compute_bytes < sizes.weight_bytes)
    factor = MIXED_HEAP_FACTOR if mixed else HEAP_FACTOR
    during_training = kept + factor * training + size["recomputed blocks"]
    heap = max(during_training, kept + HEAP_FACTOR * evaluation, HEAP_FACTOR * size["teacher cache"])
    libraries = LIBRARY_BYTES + (COMPILER_BYTES if sizes.compiled_head else 0)
    if sizes.wandb:
        libraries += WANDB_BYTES + (WANDB_TABLE_BYTES if sizes.samples else 0)
    return int(libraries + heap + size["export"] + size["checkpoint copy"])


def largest_that_fits(sizes: RunSizes, process: int, limit: int, cap: int) -> int:
    """Return the largest micro-batch that fits in training and validation, in sequences; 1 if none does.

    Args:
        process: bytes of a CPU process before a model is built.
        limit: bytes of the device, including the process.
        cap: upper bound of the result.
    """
    fitting = 0
    step = 1 << max(cap, 1).bit_length()
    while step:
        rows = fitting + step
        if rows <= cap and memory_plan(replace(sizes, rows=rows, eval_rows=rows), process).peak <= limit:
            fitting = rows
        step //= 2
    return max(fitting, 1)
