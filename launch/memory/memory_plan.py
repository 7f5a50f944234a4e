"""Memory plan: how many bytes one device needs for a training run, from sizes alone; nothing is allocated.

Shapes: N = B·T positions of a micro-batch, D hidden width, L layers, V vocabulary, P parameters.

The parts are counted from what the code keeps, and each phase of a run holds some of them at once:

    forward      weights, optimizer state, the last step's gradients, all activations, work on the LM head
    backward     weights, optimizer state, the activations and the gradients that take their place
    optimizer    weights, optimizer state, gradients, and Muon's work on them, or that of rounding
    validation   weights, optimizer state, gradients, one block's activations of a larger batch, the LM head
    saving       weights, optimizer state, gradients, and the exported model twice (CPU)

A GPU's peak is the largest phase. A CPU process holds more than its tensors: the interpreter and its libraries
(`process`), and what lies free between allocations of different size; that share was fitted (docs/planning.md).
"""

from dataclasses import dataclass, replace

from launch.memory import memory_terms as count
from launch.memory.memory_terms import RunSizes, parameters

# What a CPU process takes beyond the tensors alive at once, fitted to 15 runs (docs/planning.md)
LATER = 50_000_000  # libraries, threads and kernels that come with the first step
OF_WEIGHTS = 0.3  # left between the weights by making them
OF_PASSING = 0.35  # of what a step allocates and frees
OF_RECOMPUTED = 2.0  # of a block that is recomputed among gradients that stay
OF_MUON = 0.9  # of Muon's work, between its moments
OF_ADAPTERS = 0.8  # of the activations, where LoRA adds its products to those of the frozen weights
OF_VALIDATION = 1.4  # its own, larger tensors find room in what training freed, but not without loss
OF_READING = 1.2
COMPILER = 40_000_000  # bytes of the compiler in a process that compiles the LM head's work
LASTING = ("weights", "gradients", "optimizer state", "averaged weights", "teacher weights")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device, or of one process on a CPU, by part and by phase.

    Attributes:
        parts: not all of them are there at once.
        phases: tensors alive at once.
        process: a CPU's, before there is a model.
        between: what a CPU process holds besides, above all freed memory that fits nothing else.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    process: int
    between: int

    @property
    def peak(self) -> int:
        """At most."""
        return self.process + self.between + max(self.phases.values())

    @property
    def fullest(self) -> str:
        """The phase with the most tensors."""
        return max(self.phases, key=self.phases.__getitem__)


def memory_plan(sizes: RunSizes, process: int = 0) -> MemoryPlan:
    """Bytes by part and phase.

    Args:
        process: bytes that a CPU process holds before there is a model.
    """
    parts = _parts(sizes)
    phases = _phases(sizes, parts)
    if sizes.on_gpu:
        return MemoryPlan(parts, phases, 0, 0)
    return MemoryPlan(parts, phases, process, _of_a_cpu(sizes, parts, phases) - max(phases.values()))


def _of_a_cpu(sizes: RunSizes, parts: dict[str, int], phases: dict[str, int]) -> int:
    """What a process holds at most besides what it held before: it gives nothing back, so one phase adds to another."""
    lasting = sum(parts[name] for name in LASTING)
    training = max(phases[name] for name in ("forward", "backward", "optimizer"))
    passing = training - lasting
    recomputed = count.of_a_layer(sizes) if sizes.checkpointing else 0
    between = OF_WEIGHTS * parts["weights"] + OF_PASSING * passing
    between += OF_RECOMPUTED * recomputed + OF_MUON * count.muon_work(sizes)
    between += OF_ADAPTERS * parts["activations"] if sizes.lora_rank else 0
    validation = max(OF_VALIDATION * (phases["validation"] - lasting) - passing, 0)
    exported = parameters(sizes.shape) * 4 * (2 if sizes.lora_rank else 1)  # merged, and laid out as it is written
    compiler = COMPILER if sizes.compiled_head else 0
    reading = OF_READING * phases.get("teacher reads", 0)
    return int(LATER + compiler + max(training + between + validation, reading) + exported)


def largest_that_fits(sizes: RunSizes, process: int, room: int, cap: int) -> int:
    """The largest number of sequences up to `cap` that fit, trained and validated at once; 1 where none does.

    Args:
        process: as of `memory_plan`.
        room: bytes for all, the process included.
    """
    fitting = 0
    step = 1 << max(cap, 1).bit_length()
    while step:
        wanted = fitting + step
        if wanted <= cap and memory_plan(replace(sizes, rows=wanted, eval_rows=wanted), process).peak <= room:
            fitting = wanted
        step //= 2
    return max(fitting, 1)


def _parts(sizes: RunSizes) -> dict[str, int]:
    shape, item = sizes.shape, sizes.weight_bytes
    total, trained = parameters(shape) + count.lora_parameters(sizes), count.trained_parameters(sizes)
    matrices = count.muon_parameters(sizes)
    moments = 2 * (trained - matrices) + matrices
    teacher = sizes.teacher
    return {
        "weights": total * item // sizes.shards + count.gathered(sizes),
        "gradients": trained * item // sizes.shards,
        "optimizer state": moments * item // sizes.shards,
        "averaged weights": total * 4 // sizes.shards if sizes.ema else 0,
        "activations": count.activations(sizes),
        "LM head": count.head_kept(sizes) + count.head_work(sizes),
        "teacher weights": count.teacher_weights(sizes),
        "teacher activations": count.without_gradient(sizes, teacher, sizes.positions, sizes.compute_bytes)
        if teacher
        else 0,
    }


def _phases(sizes: RunSizes, parts: dict[str, int]) -> dict[str, int]:
    shape, item = sizes.shape, sizes.weight_bytes
    kept_workspace = 0 if sizes.on_gpu or sizes.negatives else count.workspace(sizes, sizes.targets)
    static = sum(parts[name] for name in ("weights", "optimizer state", "averaged weights", "teacher weights"))
    gradients, activations, head = parts["gradients"], parts["activations"], count.head_kept(sizes)
    embedding = shape.vocab_size * shape.n_embd * item if count.head_is_trained(sizes) else 0
    hidden = sizes.positions * shape.n_embd * item
    teacher_says = sizes.positions * sizes.teacher.n_embd * sizes.compute_bytes if sizes.teacher else 0
    recomputed, casts_in_forward = 0, 0
    if sizes.checkpointing:
        recomputed = count.of_a_layer(sizes) + 2 * sizes.positions * shape.n_embd * sizes.compute_bytes
        casts_in_forward = count.cast_weights(sizes)
    block_work = max(embedding, recomputed, 5 * hidden)
    forward = activations + casts_in_forward + teacher_says
    forward += max(head + count.head_work(sizes), count.without_gradient(sizes, shape, sizes.positions, item) - hidden)
    older = gradients if sizes.step_rows > sizes.rows else 0
    backward = activations + head + kept_workspace + hidden + block_work + older
    at_the_end = gradients + kept_workspace + block_work
    validated = sizes.eval_rows * sizes.length
    # While it validates the averaged weights the trained ones wait; averaging those in bf16 takes them in fp32
    waiting = parts["averaged weights"] * item // 4
    averaging = parts["averaged weights"] if item < 4 else 0
    phases = {
        "forward": static + gradients + max(forward, parts["teacher activations"] + kept_workspace),
        "backward": static + max(backward, at_the_end),
        "optimizer": static + gradients + kept_workspace + max(count.optimizer_work(sizes), averaging),
        "validation": static + waiting + gradients + count.validation_work(sizes, validated),
    }
    if sizes.reading_teacher:
        phases["teacher reads"] = count.reading_work(sizes, sizes.reading_teacher)
    if not sizes.on_gpu:
        whole = parameters(shape) * 4
        phases["saving"] = static + gradients + kept_workspace + 2 * whole
    return phases
