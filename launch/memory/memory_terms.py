"""Memory parts: the bytes of each thing that a training step keeps or works on, counted from sizes alone.

Shapes: N = B·T positions of a micro-batch, D hidden width, L layers, V vocabulary, P parameters.

The counts follow what PyTorch keeps for the backward pass of `transformers`' GPT-2 under sdpa, and how
gpt2lab/losses/lm_head_loss.py and gpt2lab/optim/optimizers.py work.
"""

from dataclasses import dataclass

from gpt2lab.losses.lm_head_loss import LOGITS_OF_A_BLOCK, ROWS_OF_A_TEACHER, rows_of_a_chunk
from gpt2lab.optim.stochastic_rounding import NUMBERS_AT_ONCE, WORK_OF_A_NUMBER
from gpt2lab.settings import ModelShape, PrecisionSettings
from gpt2lab.storage.model_folder import parameters_of

FP32 = PrecisionSettings("fp32", "32-true", "float32", "float32", "float32")
# Blocks of logits in fp32 that are alive at once while a loss and its gradient are formed, eagerly
BLOCKS_OF_CROSS_ENTROPY = 4.25
BLOCKS_OF_DIVERGENCE = {"forward_kl": 7.25, "reverse_kl": 8.25, "mse": 8.25, "jsd": 10.25}
OTHER_DIVERGENCES = 10.25
COMPILED_BLOCKS = 1.0
NEWTON_SCHULZ_BYTES = 16  # of each entry of the matrices of one shape that Muon works on together
LOGITS_OF_A_COMPARISON = 2**23  # as gpt2lab/evaluation/distillation_metrics.py, in so many tensors of fp32
TENSORS_OF_A_COMPARISON, TENSORS_OF_A_STORED_COMPARISON = 14, 7
LOGITS_OF_A_READING = 2**24  # as gpt2lab/distillation/teacher_cache.py
TARGETS_OF_PAIRS = 0.25  # share of the positions of pairs that have a target; the rest is prompt and padding


@dataclass(frozen=True)
class RunSizes:
    """What the memory of a run depends on.

    Attributes:
        rows, length: of one micro-batch (B, T).
        eval_rows: sequences of one validation batch.
        precision: dtypes of weights and matrix products.
        optimizer: adamw, adam or muon.
        step_rows: sequences of a whole optimizer step on this device; 0: no more than those of one micro-batch.
        pairs: whether most positions have no target, and those are left out of the LM head.
        masked: whether attention takes a mask (packing, prefix_lm, mlm).
        lora_rank, frozen_layers: 0: all weights are trained.
        negatives: of sampled softmax; 0: the whole vocabulary.
        divergence: of distillation; empty: none.
        teacher: one that is asked at every step.
        reading_teacher: one that reads all of the data once, before the student is there.
        on_gpu, sharded, ranks: the device, and whether its ranks share weights (FSDP2).
        sharded_teacher: whether they share the teacher's, too.
    """

    shape: ModelShape
    rows: int
    length: int
    eval_rows: int
    precision: PrecisionSettings = FP32
    optimizer: str = "adamw"
    step_rows: int = 0
    checkpointing: bool = False
    compiled_head: bool = False
    ema: bool = False
    pairs: bool = False
    masked: bool = False
    lora_rank: int = 0
    frozen_layers: int = 0
    negatives: int = 0
    divergence: str = ""
    teacher: ModelShape | None = None
    reading_teacher: ModelShape | None = None
    on_gpu: bool = False
    sharded: bool = False
    ranks: int = 1
    sharded_teacher: bool = False

    @property
    def positions(self) -> int:
        """N."""
        return self.rows * self.length

    @property
    def targets(self) -> int:
        """Rows of the LM head in training."""
        return int(self.positions * TARGETS_OF_PAIRS) if self.pairs else self.positions

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        return self.precision.weight_bytes

    @property
    def compute_bytes(self) -> int:
        """Of one number in a matrix product."""
        return self.precision.compute_bytes

    @property
    def shards(self) -> int:
        """Among how many devices weights, gradients and optimizer state are shared out."""
        return self.ranks if self.sharded else 1


def parameters(shape: ModelShape) -> int:
    """P, tied head counted once."""
    return parameters_of(vars(shape))


def trained_parameters(sizes: RunSizes) -> int:
    """Those that have a gradient."""
    shape = sizes.shape
    if sizes.lora_rank:
        return 16 * sizes.lora_rank * shape.n_embd * shape.n_layer
    block = 12 * shape.n_embd**2 + 13 * shape.n_embd
    embeddings = (shape.vocab_size + shape.n_positions) * shape.n_embd if sizes.frozen_layers else 0
    return parameters(shape) - embeddings - sizes.frozen_layers * block


def lora_parameters(sizes: RunSizes) -> int:
    return trained_parameters(sizes) if sizes.lora_rank else 0


def muon_parameters(sizes: RunSizes) -> int:
    """Entries of the matrices that Muon steps, which have one moment instead of two."""
    layers = sizes.shape.n_layer - sizes.frozen_layers
    return 12 * sizes.shape.n_embd**2 * layers if sizes.optimizer == "muon" and not sizes.lora_rank else 0


def gathered(sizes: RunSizes) -> int:
    """Under FSDP2: embeddings and two blocks are whole while they are worked with."""
    if not sizes.sharded:
        return 0
    shape = sizes.shape
    embeddings = (shape.vocab_size + shape.n_positions) * shape.n_embd
    return (embeddings + 2 * 12 * shape.n_embd**2) * sizes.weight_bytes


def teacher_weights(sizes: RunSizes) -> int:
    """Of a teacher that is split, the embeddings are whole on every rank, and two blocks while they are worked with."""
    teacher, item = sizes.teacher, sizes.compute_bytes
    if teacher is None:
        return 0
    if not sizes.sharded_teacher:
        return parameters(teacher) * item
    embeddings = (teacher.vocab_size + teacher.n_positions) * teacher.n_embd
    blocks = parameters(teacher) - embeddings
    return (embeddings + blocks // sizes.ranks + 2 * 12 * teacher.n_embd**2) * item


def of_a_layer(sizes: RunSizes) -> int:
    """What a block keeps for its backward pass, of one micro-batch.

    Of each position: the residual stream before both layer norms, and in the compute type the two norms' outputs,
    queries, keys and values, what attention gives, and the MLP's 4 D before and after its activation.
    """
    shape, item = sizes.shape, sizes.compute_bytes
    of_a_position = (2 * sizes.weight_bytes + 14 * item) * shape.n_embd + 16 + 4 * shape.n_head
    if sizes.masked:
        of_a_position += sizes.length * item
    if shape.dropout:
        whole_attention = 12 * shape.n_head * sizes.length + 8 * shape.n_embd  # a CPU has no fused one with dropout
        of_a_position += 2 * shape.n_embd + (0 if sizes.on_gpu else whole_attention)
    if sizes.lora_rank:
        of_a_position += 4 * sizes.lora_rank * item + (2 * shape.n_embd if item < sizes.weight_bytes else 0)
    return of_a_position * sizes.positions


def cast_weights(sizes: RunSizes) -> int:
    """Copies of the blocks' weights that autocast keeps for a forward pass and its backward pass."""
    casts = sizes.compute_bytes < sizes.weight_bytes
    return 12 * sizes.shape.n_embd**2 * sizes.shape.n_layer * sizes.compute_bytes if casts else 0


def activations(sizes: RunSizes) -> int:
    """Kept from forward to backward pass."""
    layers = sizes.shape.n_layer - sizes.frozen_layers
    last = sizes.positions * sizes.shape.n_embd * sizes.weight_bytes
    if sizes.checkpointing:
        return (layers + 1) * last
    return layers * of_a_layer(sizes) + last + cast_weights(sizes)


def without_gradient(sizes: RunSizes, shape: ModelShape, positions: int, residual_bytes: int) -> int:
    """Alive at once in a block that nothing is kept of: at most in its MLP."""
    masks = positions * sizes.length * sizes.compute_bytes if sizes.masked else 0
    return positions * shape.n_embd * (4 * residual_bytes + 9 * sizes.compute_bytes) + masks


def head_is_trained(sizes: RunSizes) -> bool:
    return not sizes.lora_rank and not sizes.frozen_layers


def head_kept(sizes: RunSizes) -> int:
    """From the LM-head loss to its backward pass: the gradients of the hidden states and of the head weight."""
    shape = sizes.shape
    of_weight = 4 * shape.vocab_size * shape.n_embd if head_is_trained(sizes) else 0
    return of_weight + sizes.targets * shape.n_embd * sizes.weight_bytes


def head_work(sizes: RunSizes, targets: int | None = None, needs_gradient: bool = True) -> int:
    """Alive at once while the loss is formed, chunk by chunk."""
    rows = sizes.targets if targets is None else targets
    width, entries, item = sizes.shape.n_embd, sizes.shape.vocab_size, sizes.compute_bytes
    if sizes.negatives and needs_gradient:
        return rows * (sizes.negatives * (item + 12) + 2 * width * sizes.weight_bytes)
    chunk = rows_of_a_chunk(rows, entries * item)
    logits = workspace(sizes, rows) if not sizes.on_gpu else _logits_of_a_chunk(sizes, chunk)
    block_rows = chunk if sizes.on_gpu else min(max(LOGITS_OF_A_BLOCK // entries, 1), chunk)
    block = block_rows * entries * 4 * _blocks_alive(sizes)
    head, product = (width * entries * item, width * entries * (item + 4)) if item < 4 else (0, 0)
    if not needs_gradient or not head_is_trained(sizes):
        product = 0
    return int(logits + head + max(block, product) + 2 * chunk * width * item)


def _blocks_alive(sizes: RunSizes) -> float:
    if sizes.compiled_head:
        return COMPILED_BLOCKS
    return (
        BLOCKS_OF_DIVERGENCE.get(sizes.divergence, OTHER_DIVERGENCES) if sizes.divergence else BLOCKS_OF_CROSS_ENTROPY
    )


def _logits_of_a_chunk(sizes: RunSizes, chunk: int) -> int:
    both = 2 if sizes.teacher else 1
    return both * chunk * sizes.shape.vocab_size * sizes.compute_bytes


def workspace(sizes: RunSizes, rows: int) -> int:
    """Logits of a chunk on a CPU, whose memory is kept from step to step."""
    entries, item = sizes.shape.vocab_size, sizes.compute_bytes
    of_teacher = min(rows, ROWS_OF_A_TEACHER) * entries * item if sizes.teacher else 0
    return rows_of_a_chunk(rows, entries * item) * entries * item + of_teacher


def muon_work(sizes: RunSizes) -> int:
    """Updates of all its matrices, and the Newton–Schulz iteration on those of one shape, a third of them."""
    matrices = muon_parameters(sizes)
    return matrices * sizes.weight_bytes + matrices // 3 * NEWTON_SCHULZ_BYTES


def optimizer_work(sizes: RunSizes) -> int:
    """Alive at once in the optimizer's step; in bf16 weights pass through fp32, some at a time, before Muon's come."""
    if not sizes.precision.is_bf16_true:
        return muon_work(sizes)
    numbers = (trained_parameters(sizes) - muon_parameters(sizes)) // sizes.shards
    return max(min(numbers, NUMBERS_AT_ONCE) * WORK_OF_A_NUMBER, muon_work(sizes))


def validation_work(sizes: RunSizes, positions: int) -> int:
    shape = sizes.shape
    blocks = without_gradient(sizes, shape, positions, sizes.weight_bytes) + cast_weights(sizes)
    if sizes.teacher:
        blocks = max(blocks, without_gradient(sizes, sizes.teacher, positions, sizes.compute_bytes))
    hidden = positions * (shape.n_embd * sizes.weight_bytes)
    targets = int(positions * TARGETS_OF_PAIRS) if sizes.pairs else positions
    if sizes.divergence:
        tensors = TENSORS_OF_A_COMPARISON if sizes.teacher else TENSORS_OF_A_STORED_COMPARISON
        work = min(LOGITS_OF_A_COMPARISON, targets * shape.vocab_size) * 4 * tensors
    else:
        work = head_work(sizes, targets, needs_gradient=False)
    return max(blocks + (0 if sizes.on_gpu else workspace(sizes, sizes.targets)), hidden + work)


def reading_work(sizes: RunSizes, teacher: ModelShape) -> int:
    """A teacher alone, with the logits of a few rows, before there is a student."""
    positions, item = sizes.eval_rows * sizes.length, sizes.compute_bytes
    rows = min(positions, LOGITS_OF_A_READING // teacher.vocab_size)
    work = rows * teacher.vocab_size * (3 * 4 + 8 + item)  # logits, two softmaxes, their sum in fp64
    return parameters(teacher) * item + max(
        without_gradient(sizes, teacher, positions, item), positions * teacher.n_embd * item + work
    )
