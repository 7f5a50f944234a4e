"""Memory plan: bytes that one device needs for a training run, computed from sizes alone, without allocation.

Shapes: N = B·T positions of a micro-batch, D hidden width, L layers, V vocabulary, P parameters.

memory_terms counts each part; a phase of a run holds several of them at once:

    forward      weights, optimizer state, the last step's gradients, all activations, temporaries of the LM head
    backward     weights, optimizer state, the activations and the gradients that replace them
    optimizer    weights, optimizer state, gradients, temporaries of Muon or of stochastic rounding
    validation   weights, optimizer state, gradients, one block's activations of a larger batch, the LM head
    saving       weights, optimizer state, gradients, and the exported model twice (CPU)

A GPU's peak is the largest phase. A CPU process also holds the interpreter and its libraries (`process`), and freed
memory between allocations of different size (`fragmentation`), whose factors were fitted (docs/planning.md).
"""

from dataclasses import dataclass, replace

from launch.memory import memory_terms as count
from launch.memory.memory_terms import RunSizes, parameters

# Memory of a CPU process beyond its live tensors: bytes, and factors of the named part, fitted to 15 runs
LIBRARY_BYTES = 50_000_000  # libraries, threads and kernels that the first step loads
COMPILER_BYTES = 40_000_000  # torch.compile, in a process that compiles the LM-head loss
WEIGHTS_FACTOR = 0.3  # freed during initialization
TEMPORARY_FACTOR = 0.35  # tensors that a step allocates and frees
RECOMPUTED_FACTOR = 2.0  # activations of a recomputed block
MUON_FACTOR = 0.9  # temporaries of Muon
LORA_FACTOR = 0.8  # activations, with LoRA
VALIDATION_FACTOR = 1.4  # validation reuses freed training memory, with loss
TEACHER_CACHE_FACTOR = 1.2  # writing a teacher cache
PERSISTENT = ("weights", "gradients", "optimizer state", "averaged weights", "teacher weights")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one GPU, or of one CPU process, by part and by phase.

    Attributes:
        parts: bytes of each part; not all are allocated at once.
        phases: bytes of all tensors that are allocated at once in each phase.
        process: bytes of a CPU process before a model is built; 0 on a GPU.
        fragmentation: bytes that a CPU process holds beyond its tensors, mostly freed memory; 0 on a GPU.
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
    parts = _parts(sizes)
    phases = _phases(sizes, parts)
    if sizes.on_gpu:
        return MemoryPlan(parts, phases, 0, 0)
    return MemoryPlan(parts, phases, process, _cpu_bytes(sizes, parts, phases) - max(phases.values()))


def _cpu_bytes(sizes: RunSizes, parts: dict[str, int], phases: dict[str, int]) -> int:
    """Peak bytes of a CPU process without its start-up: it returns no memory to the system, so phases add up."""
    persistent = sum(parts[name] for name in PERSISTENT)
    training = max(phases[name] for name in ("forward", "backward", "optimizer"))
    temporary = training - persistent
    recomputed = count.block_activations(sizes) if sizes.checkpointing else 0
    fragmentation = WEIGHTS_FACTOR * parts["weights"] + TEMPORARY_FACTOR * temporary
    fragmentation += RECOMPUTED_FACTOR * recomputed + MUON_FACTOR * count.muon_work(sizes)
    fragmentation += LORA_FACTOR * parts["activations"] if sizes.lora_rank else 0
    validation = max(VALIDATION_FACTOR * (phases["validation"] - persistent) - temporary, 0)
    exported = parameters(sizes.shape) * 4 * (2 if sizes.lora_rank else 1)  # with LoRA: merged, and as written
    compiler = COMPILER_BYTES if sizes.compiled_head else 0
    caching = TEACHER_CACHE_FACTOR * phases.get("teacher cache", 0)
    return int(LIBRARY_BYTES + compiler + max(training + fragmentation + validation, caching) + exported)


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


def _parts(sizes: RunSizes) -> dict[str, int]:
    shape, item = sizes.shape, sizes.weight_bytes
    total, trained = parameters(shape) + count.lora_parameters(sizes), count.trained_parameters(sizes)
    matrices = count.muon_parameters(sizes)
    moments = 2 * (trained - matrices) + matrices
    teacher = sizes.teacher
    return {
        "weights": total * item // sizes.shards + count.fsdp_gathered(sizes),
        "gradients": trained * item // sizes.shards,
        "optimizer state": moments * item // sizes.shards,
        "averaged weights": total * 4 // sizes.shards if sizes.ema else 0,
        "activations": count.activations(sizes),
        "LM head": count.head_gradients(sizes) + count.head_work(sizes),
        "teacher weights": count.teacher_weights(sizes),
        "teacher activations": count.inference_work(sizes, teacher, sizes.positions, sizes.compute_bytes)
        if teacher
        else 0,
    }


def _phases(sizes: RunSizes, parts: dict[str, int]) -> dict[str, int]:
    shape, item = sizes.shape, sizes.weight_bytes
    logits_buffer = 0 if sizes.on_gpu or sizes.negatives else count.logits_buffer(sizes, sizes.targets)
    static = sum(parts[name] for name in ("weights", "optimizer state", "averaged weights", "teacher weights"))
    gradients, activations, head = parts["gradients"], parts["activations"], count.head_gradients(sizes)
    embedding = shape.vocab_size * shape.n_embd * item if count.head_is_trained(sizes) else 0
    hidden = sizes.positions * shape.n_embd * item
    teacher_hidden = sizes.positions * sizes.teacher.n_embd * sizes.compute_bytes if sizes.teacher else 0
    recomputed, casts_in_forward = 0, 0
    if sizes.checkpointing:
        recomputed = count.block_activations(sizes) + 2 * sizes.positions * shape.n_embd * sizes.compute_bytes
        casts_in_forward = count.cast_weights(sizes)
    block_work = max(embedding, recomputed, 5 * hidden)
    forward = activations + casts_in_forward + teacher_hidden
    forward += max(head + count.head_work(sizes), count.inference_work(sizes, shape, sizes.positions, item) - hidden)
    accumulated = gradients if sizes.step_rows > sizes.rows else 0
    backward_start = activations + head + logits_buffer + hidden + block_work + accumulated
    backward_end = gradients + logits_buffer + block_work
    # Validation of the averaged weights keeps a copy of the trained ones; averaging bf16 weights needs them in fp32
    trained_copy = parts["averaged weights"] * item // 4
    averaging = parts["averaged weights"] if item < 4 else 0
    phases = {
        "forward": static + gradients + max(forward, parts["teacher activations"] + logits_buffer),
        "backward": static + max(backward_start, backward_end),
        "optimizer": static + gradients + logits_buffer + max(count.optimizer_work(sizes), averaging),
        "validation": static + trained_copy + gradients + count.validation_work(sizes, sizes.eval_rows * sizes.length),
    }
    if sizes.cached_teacher:
        phases["teacher cache"] = count.teacher_cache_work(sizes, sizes.cached_teacher)
    if not sizes.on_gpu:
        exported = parameters(shape) * 4
        phases["saving"] = static + gradients + logits_buffer + 2 * exported
    return phases
