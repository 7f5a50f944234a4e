"""Memory terms: bytes of weights, activations, gradients and temporaries of a training step, computed from sizes.

Shapes: N = B·T positions of a micro-batch, D hidden width, L layers, V vocabulary, P parameters.

The counts follow the tensors that PyTorch saves for the backward pass of `transformers`' GPT-2 with SDPA attention,
gpt2lab/losses/lm_head_loss.py and gpt2lab/optim/optimizers.py. A function named `…_work` counts temporaries.
"""

from dataclasses import dataclass

from gpt2lab.losses.lm_head_loss import LOGITS_OF_A_BLOCK, ROWS_OF_A_TEACHER, rows_of_a_chunk
from gpt2lab.optim.stochastic_rounding import CHUNK_NUMEL, WORK_BYTES
from gpt2lab.settings import ModelShape, PrecisionSettings
from gpt2lab.storage.model_folder import parameter_count

FP32 = PrecisionSettings("fp32", "32-true", "float32", "float32", "float32")
# fp32 tensors of the size of a block of logits that a loss and its gradient need at once, without torch.compile
CROSS_ENTROPY_TENSORS = 4.25
DIVERGENCE_TENSORS = {"forward_kl": 7.25, "reverse_kl": 8.25, "mse": 8.25, "jsd": 10.25}
OTHER_DIVERGENCE_TENSORS = 10.25
COMPILED_TENSORS = 1.0
NEWTON_SCHULZ_BYTES = 16  # per element of the matrices that Muon updates together (all of one shape)
METRIC_LOGITS = 2**23  # logits in a chunk of gpt2lab/evaluation/distillation_metrics.py
METRIC_TENSORS, CACHED_METRIC_TENSORS = 14, 7  # fp32 tensors of that size, with a teacher and with a teacher cache
TEACHER_CACHE_LOGITS = 2**24  # logits in a chunk of gpt2lab/distillation/teacher_cache.py
PAIR_TARGET_SHARE = 0.25  # share of positions with a target in pairs; the rest is prompt and padding


@dataclass(frozen=True)
class RunSizes:
    """Sizes and settings that determine the memory of a run.

    Attributes:
        rows, length: shape (B, T) of a micro-batch.
        eval_rows: sequences of a validation batch.
        precision: dtypes of weights and matrix products.
        optimizer: adamw, adam or muon.
        step_rows: sequences of an optimizer step on this device; 0: those of one micro-batch.
        checkpointing: activation checkpointing.
        compiled_head: whether the LM-head loss is compiled.
        pairs: whether the data are pairs; positions without a target skip the LM head.
        masked: whether attention has a mask (packing, prefix_lm, mlm).
        lora_rank, frozen_layers: 0: all weights are trained.
        negatives: negative samples of sampled softmax; 0: full softmax.
        divergence: distillation loss; empty: none.
        teacher: teacher with a forward pass at every step.
        cached_teacher: teacher that only writes a cache, before the student is built.
        on_gpu: GPU instead of CPU.
        sharded: whether the ranks shard the weights (FSDP2).
        ranks: world size.
        sharded_teacher: whether the ranks also shard the teacher.
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
    cached_teacher: ModelShape | None = None
    on_gpu: bool = False
    sharded: bool = False
    ranks: int = 1
    sharded_teacher: bool = False

    @property
    def positions(self) -> int:
        """Positions N of a micro-batch."""
        return self.rows * self.length

    @property
    def targets(self) -> int:
        """Positions with a target, which are the rows of the LM head."""
        return int(self.positions * PAIR_TARGET_SHARE) if self.pairs else self.positions

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return self.precision.weight_bytes

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element in a matrix product."""
        return self.precision.compute_bytes

    @property
    def shards(self) -> int:
        """Number of devices that shard weights, gradients and optimizer state."""
        return self.ranks if self.sharded else 1


def parameters(shape: ModelShape) -> int:
    """Number of parameters P; the tied LM head counts once."""
    return parameter_count(vars(shape))


def trained_parameters(sizes: RunSizes) -> int:
    """Number of parameters with a gradient."""
    shape = sizes.shape
    if sizes.lora_rank:
        return 16 * sizes.lora_rank * shape.n_embd * shape.n_layer
    block = 12 * shape.n_embd**2 + 13 * shape.n_embd
    embeddings = (shape.vocab_size + shape.n_positions) * shape.n_embd if sizes.frozen_layers else 0
    return parameters(shape) - embeddings - sizes.frozen_layers * block


def lora_parameters(sizes: RunSizes) -> int:
    return trained_parameters(sizes) if sizes.lora_rank else 0


def muon_parameters(sizes: RunSizes) -> int:
    """Number of parameters that Muon updates, which have one moment instead of two."""
    layers = sizes.shape.n_layer - sizes.frozen_layers
    return 12 * sizes.shape.n_embd**2 * layers if sizes.optimizer == "muon" and not sizes.lora_rank else 0


def fsdp_gathered(sizes: RunSizes) -> int:
    """Weights that FSDP2 gathers at once: the embeddings and two blocks."""
    if not sizes.sharded:
        return 0
    shape = sizes.shape
    embeddings = (shape.vocab_size + shape.n_positions) * shape.n_embd
    return (embeddings + 2 * 12 * shape.n_embd**2) * sizes.weight_bytes


def teacher_weights(sizes: RunSizes) -> int:
    """Weights of the teacher; a sharded one has whole embeddings on every rank, and two gathered blocks."""
    teacher, item = sizes.teacher, sizes.compute_bytes
    if teacher is None:
        return 0
    if not sizes.sharded_teacher:
        return parameters(teacher) * item
    embeddings = (teacher.vocab_size + teacher.n_positions) * teacher.n_embd
    blocks = parameters(teacher) - embeddings
    return (embeddings + blocks // sizes.ranks + 2 * 12 * teacher.n_embd**2) * item


def block_activations(sizes: RunSizes) -> int:
    """Activations that one block saves for its backward pass.

    Per position: the residual stream before both layer norms; in the compute dtype the outputs of both norms, queries,
    keys and values, the attention output, and the 4 D hidden units of the MLP before and after the activation.
    """
    shape, item = sizes.shape, sizes.compute_bytes
    per_position = (2 * sizes.weight_bytes + 14 * item) * shape.n_embd + 16 + 4 * shape.n_head
    if sizes.masked:
        per_position += sizes.length * item
    if shape.dropout:
        unfused_attention = 12 * shape.n_head * sizes.length + 8 * shape.n_embd  # no fused kernel with dropout on CPUs
        per_position += 2 * shape.n_embd + (0 if sizes.on_gpu else unfused_attention)
    if sizes.lora_rank:
        per_position += 4 * sizes.lora_rank * item + (2 * shape.n_embd if item < sizes.weight_bytes else 0)
    return per_position * sizes.positions


def cast_weights(sizes: RunSizes) -> int:
    """Low-precision copies of the blocks' weights that autocast caches for a forward and backward pass."""
    casts = sizes.compute_bytes < sizes.weight_bytes
    return 12 * sizes.shape.n_embd**2 * sizes.shape.n_layer * sizes.compute_bytes if casts else 0


def activations(sizes: RunSizes) -> int:
    """Activations saved from the forward to the backward pass."""
    layers = sizes.shape.n_layer - sizes.frozen_layers
    last = sizes.positions * sizes.shape.n_embd * sizes.weight_bytes
    if sizes.checkpointing:
        return (layers + 1) * last
    return layers * block_activations(sizes) + last + cast_weights(sizes)


def inference_work(sizes: RunSizes, shape: ModelShape, positions: int, residual_bytes: int) -> int:
    """Temporaries of a forward pass without gradient; the MLP of a block needs the most."""
    masks = positions * sizes.length * sizes.compute_bytes if sizes.masked else 0
    return positions * shape.n_embd * (4 * residual_bytes + 9 * sizes.compute_bytes) + masks


def head_is_trained(sizes: RunSizes) -> bool:
    return not sizes.lora_rank and not sizes.frozen_layers


def head_gradients(sizes: RunSizes) -> int:
    """Gradients of hidden states and head weight, which the LM-head loss computes in its forward pass."""
    shape = sizes.shape
    weight_gradient = 4 * shape.vocab_size * shape.n_embd if head_is_trained(sizes) else 0
    return weight_gradient + sizes.targets * shape.n_embd * sizes.weight_bytes


def head_work(sizes: RunSizes, targets: int | None = None, needs_gradient: bool = True) -> int:
    """Temporaries of the LM-head loss, which is computed in chunks of rows.

    Args:
        targets: rows of the LM head; None: those of a training micro-batch.
    """
    rows = sizes.targets if targets is None else targets
    width, vocab, item = sizes.shape.n_embd, sizes.shape.vocab_size, sizes.compute_bytes
    if sizes.negatives and needs_gradient:
        return rows * (sizes.negatives * (item + 12) + 2 * width * sizes.weight_bytes)
    chunk = rows_of_a_chunk(rows, vocab * item)
    logits = (2 if sizes.teacher else 1) * chunk * vocab * item if sizes.on_gpu else logits_buffer(sizes, rows)
    block_rows = chunk if sizes.on_gpu else min(max(LOGITS_OF_A_BLOCK // vocab, 1), chunk)
    block = block_rows * vocab * 4 * _loss_tensors(sizes)
    head, product = (width * vocab * item, width * vocab * (item + 4)) if item < 4 else (0, 0)
    if not needs_gradient or not head_is_trained(sizes):
        product = 0
    return int(logits + head + max(block, product) + 2 * chunk * width * item)


def _loss_tensors(sizes: RunSizes) -> float:
    if sizes.compiled_head:
        return COMPILED_TENSORS
    if not sizes.divergence:
        return CROSS_ENTROPY_TENSORS
    return DIVERGENCE_TENSORS.get(sizes.divergence, OTHER_DIVERGENCE_TENSORS)


def logits_buffer(sizes: RunSizes, rows: int) -> int:
    """Buffer for a chunk of logits on a CPU, which is reused in every step."""
    row_bytes = sizes.shape.vocab_size * sizes.compute_bytes
    teacher = min(rows, ROWS_OF_A_TEACHER) * row_bytes if sizes.teacher else 0
    return rows_of_a_chunk(rows, row_bytes) * row_bytes + teacher


def muon_work(sizes: RunSizes) -> int:
    """Temporaries of Muon: updates of all matrices, and Newton–Schulz on those of one shape, a third of them."""
    matrices = muon_parameters(sizes)
    return matrices * sizes.weight_bytes + matrices // 3 * NEWTON_SCHULZ_BYTES


def optimizer_work(sizes: RunSizes) -> int:
    """Temporaries of an optimizer step: of Muon, or stochastic rounding, which casts chunks of weights to fp32."""
    if not sizes.precision.is_bf16_true:
        return muon_work(sizes)
    rounded = (trained_parameters(sizes) - muon_parameters(sizes)) // sizes.shards
    return max(min(rounded, CHUNK_NUMEL) * WORK_BYTES, muon_work(sizes))


def validation_work(sizes: RunSizes, positions: int) -> int:
    shape = sizes.shape
    blocks = inference_work(sizes, shape, positions, sizes.weight_bytes) + cast_weights(sizes)
    if sizes.teacher:
        blocks = max(blocks, inference_work(sizes, sizes.teacher, positions, sizes.compute_bytes))
    hidden = positions * (shape.n_embd * sizes.weight_bytes)
    targets = int(positions * PAIR_TARGET_SHARE) if sizes.pairs else positions
    if sizes.divergence:
        tensors = METRIC_TENSORS if sizes.teacher else CACHED_METRIC_TENSORS
        work = min(METRIC_LOGITS, targets * shape.vocab_size) * 4 * tensors
    else:
        work = head_work(sizes, targets, needs_gradient=False)
    return max(blocks + (0 if sizes.on_gpu else logits_buffer(sizes, sizes.targets)), hidden + work)


def teacher_cache_work(sizes: RunSizes, teacher: ModelShape) -> int:
    """Weights and temporaries of a teacher that writes its cache, before the student is built."""
    positions, item = sizes.eval_rows * sizes.length, sizes.compute_bytes
    rows = min(positions, TEACHER_CACHE_LOGITS // teacher.vocab_size)
    work = rows * teacher.vocab_size * (3 * 4 + 8 + item)  # logits, two softmaxes, their sum in fp64
    return parameters(teacher) * item + max(
        inference_work(sizes, teacher, positions, item), positions * teacher.n_embd * item + work
    )
