"""Memory terms: bytes of everything that a run allocates on one device, as formulas of `RunSizes`.

Symbols: N = B·T positions of a micro-batch, D hidden width, L layers, V vocabulary, P parameters; w and c bytes of a
weight and of an element in a matrix product; S devices that shard the model.

memory_plan.py lists which terms are allocated at the same time. The formulas count what PyTorch saves for the backward
pass of `transformers`' GPT-2 with SDPA attention, and what this project's losses, metrics and optimizers allocate.
"""

from dataclasses import dataclass

import torch

from gpt2lab.distillation.teacher_cache import LOGITS_AT_A_TIME as TEACHER_CACHE_LOGITS
from gpt2lab.evaluation.distillation_metrics import LOGITS_OF_A_CHUNK as COMPILED_METRIC_LOGITS
from gpt2lab.evaluation.distillation_metrics import LOGITS_OF_AN_UNCOMPILED_CHUNK as METRIC_LOGITS
from gpt2lab.losses.label_statistics import ROWS, TOKENS_OF_A_TILE
from gpt2lab.losses.lm_head_loss import ROWS_OF_A_TEACHER, rows_of_a_chunk
from gpt2lab.losses.logit_chunks import LOGITS_OF_A_BLOCK
from gpt2lab.losses.target_losses import LOGITS_OF_A_CHUNK as VALIDATION_LOGITS
from gpt2lab.model import short_attention
from gpt2lab.optim.stochastic_rounding import CHUNK_NUMEL, WORK_BYTES
from gpt2lab.settings import ModelShape, PrecisionSettings
from gpt2lab.storage.model_folder import parameter_count
from gpt2lab.system.device import multiplies_bf16

LOGITS_OF_A_TILE = ROWS * TOKENS_OF_A_TILE  # of a validation on a CPU
FP32 = PrecisionSettings("fp32", "32-true", "float32", "float32", "float32")
# fp32 tensors of the size of a block of logits that a loss and its gradient need at once, without torch.compile
CROSS_ENTROPY_TENSORS = 4.25
DIVERGENCE_TENSORS = {"forward_kl": 7.25, "reverse_kl": 8.25, "mse": 8.25}
OTHER_DIVERGENCE_TENSORS = 10.25
COMPILED_TENSORS = 1.0
UNCOMPILED_LOSS = "uld"  # its sort
# in bf16, per element of the matrices that a rank orthogonalizes together: a third, of one shape
NEWTON_SCHULZ_BYTES = 10
METRIC_TENSORS, CACHED_METRIC_TENSORS = 14, 7  # fp32 tensors of METRIC_LOGITS, with a teacher and with a teacher cache


@dataclass(frozen=True)
class RunSizes:
    """Sizes and settings that determine the memory of a run."""

    shape: ModelShape
    rows: int  # B of a micro-batch
    length: int  # T
    eval_rows: int  # sequences of a validation batch
    precision: PrecisionSettings = FP32
    optimizer: str = "adamw"
    step_rows: int = 0  # sequences of an optimizer step on this device; 0: those of one micro-batch
    checkpointing: bool = False  # activation checkpointing
    compiled_head: bool = False  # whether the LM-head loss is compiled
    ema: bool = False
    target_share: float = 1.0  # share of positions with a target; the others skip the LM head (pairs)
    eval_target_share: float = 1.0
    masked: bool = False  # whether attention has a mask (packing, prefix_lm, mlm)
    varied: bool = False  # whether micro-batches differ in length (pairs without packing, on-policy text)
    lora_rank: int = 0  # 0: no LoRA
    frozen_layers: int = 0
    negatives: int = 0  # negative samples of sampled softmax; 0: full softmax
    divergence: str = ""  # distillation loss; empty: none
    teacher: ModelShape | None = None  # teacher with a forward pass at every step
    cached_teacher: ModelShape | None = None  # teacher that only writes a cache, before the student is built
    sampled_cache: bool = False  # whether the cache has samples; else the top k tokens
    on_gpu: bool = False
    sharded: bool = False  # whether the ranks shard the weights (FSDP2)
    ranks: int = 1
    sharded_teacher: bool = False  # whether the ranks also shard the teacher
    prompts: int = 0  # texts generated at once, by samples, metrics on generated text or on-policy distillation
    generated_length: int = 0  # longest prompt and its completion, in tokens
    samples: bool = False  # whether samples are logged
    wandb: bool = False  # whether W&B is a logger
    verified: bool = False  # whether the export is loaded and compared at the end

    @property
    def positions(self) -> int:
        """Positions N of a micro-batch."""
        return self.rows * self.length

    @property
    def targets(self) -> int:
        """Positions of a micro-batch with a target, which are the rows of the LM head."""
        return int(self.positions * self.target_share)

    @property
    def weight_bytes(self) -> int:
        """Bytes w of a weight."""
        return self.precision.weight_bytes

    @property
    def compute_bytes(self) -> int:
        """Bytes c of an element in a matrix product."""
        return self.precision.compute_bytes

    @property
    def shards(self) -> int:
        """Number S of devices that shard weights, gradients and optimizer state."""
        return self.ranks if self.sharded else 1

    @property
    def head_is_trained(self) -> bool:
        """Whether the LM head has a gradient."""
        return not self.lora_rank and not self.frozen_layers


def memory_terms(sizes: RunSizes) -> dict[str, int]:
    """Return the bytes of each term by its name."""
    return {**_kept(sizes), **_training(sizes), **_validation(sizes), **_outside_training(sizes)}


def parameters(shape: ModelShape) -> int:
    """Number of parameters P; the tied LM head counts once."""
    return parameter_count(vars(shape))


def trained_parameters(sizes: RunSizes) -> int:
    """Number of parameters with a gradient."""
    shape = sizes.shape
    if sizes.lora_rank:
        return 16 * sizes.lora_rank * shape.n_embd * shape.n_layer
    frozen = _embeddings(shape) if sizes.frozen_layers else 0
    return parameters(shape) - frozen - sizes.frozen_layers * (_matrices(shape) + 13 * shape.n_embd)


def lora_parameters(sizes: RunSizes) -> int:
    """Number of parameters of the adapters."""
    return trained_parameters(sizes) if sizes.lora_rank else 0


def _muon_parameters(sizes: RunSizes) -> int:
    """Number of parameters that Muon updates, which have one moment instead of two."""
    layers = sizes.shape.n_layer - sizes.frozen_layers
    return layers * _matrices(sizes.shape) if sizes.optimizer == "muon" and not sizes.lora_rank else 0


def _embeddings(shape: ModelShape) -> int:
    return (shape.vocab_size + shape.n_positions) * shape.n_embd


def _matrices(shape: ModelShape) -> int:
    """Number of weights in the matrices of one block."""
    return 12 * shape.n_embd**2


def _kept(sizes: RunSizes) -> dict[str, int]:
    """Terms that are kept from step to step."""
    w, trained, total = sizes.weight_bytes, trained_parameters(sizes), parameters(sizes.shape) + lora_parameters(sizes)
    gathered = _embeddings(sizes.shape) + 2 * _matrices(sizes.shape) if sizes.sharded else 0  # by FSDP2, and two blocks
    state = (2 * trained - _muon_parameters(sizes)) * w // sizes.shards
    averaged = total * 4 // sizes.shards if sizes.ema else 0
    return {
        "weights": total * w // sizes.shards + gathered * w,
        "gradients": trained * w // sizes.shards,  # DDP's buckets are views of them
        "optimizer state": state,
        "averaged weights": averaged,
        # which is written while training continues
        "checkpoint copy": 0 if sizes.on_gpu or sizes.sharded else total * w + state + averaged,
        "teacher weights": _teacher_parameters(sizes) * sizes.precision.teacher_bytes,
        "logits buffer": 0 if sizes.on_gpu or sizes.negatives else _logits_buffer(sizes),
    }


def _teacher_parameters(sizes: RunSizes) -> int:
    teacher = sizes.teacher
    if teacher is None or not sizes.sharded_teacher:
        return parameters(teacher) if teacher else 0
    blocks = parameters(teacher) - _embeddings(teacher)
    return _embeddings(teacher) + blocks // sizes.ranks + 2 * _matrices(teacher)


def _logits_buffer(sizes: RunSizes) -> int:
    """Logits of a chunk, and of 256 rows of a teacher, which a CPU reuses (lm_head_loss.py: _workspaces)."""
    rows, row_bytes = sizes.targets, sizes.shape.vocab_size * sizes.compute_bytes
    return (rows_of_a_chunk(rows, row_bytes) + (min(rows, ROWS_OF_A_TEACHER) if sizes.teacher else 0)) * row_bytes


def _training(sizes: RunSizes) -> dict[str, int]:
    """Terms of the forward pass, the backward pass and the optimizer step."""
    shape, w, c = sizes.shape, sizes.weight_bytes, sizes.compute_bytes
    hidden, teacher = sizes.positions * shape.n_embd * w, sizes.teacher  # N·D·w
    block, casts = _block_activations(sizes), _casts(sizes)
    layers = shape.n_layer - sizes.frozen_layers
    recomputed = block + 2 * sizes.positions * shape.n_embd * c if sizes.checkpointing else 0
    embedding_gradient = shape.vocab_size * shape.n_embd * w if sizes.head_is_trained else 0
    head_gradient = 4 * shape.vocab_size * shape.n_embd if sizes.head_is_trained else 0
    return {
        "activations": (layers + 1) * hidden if sizes.checkpointing else layers * block + hidden + casts,
        "weight casts": casts if sizes.checkpointing else 0,
        "hidden states": hidden,
        "block temporaries": _forward_pass(sizes, shape, sizes.positions, w) - hidden,
        "teacher activations": _forward_pass(sizes, teacher, sizes.positions, c) if teacher else 0,
        "teacher hidden states": sizes.positions * teacher.n_embd * c if teacher else 0,
        # computed in the forward pass
        "LM head gradients": head_gradient + sizes.targets * shape.n_embd * w,
        "LM head temporaries": _head_temporaries(sizes),
        "block gradients": max(embedding_gradient, 5 * hidden, recomputed),
        "accumulated gradients": trained_parameters(sizes) * w // sizes.shards if sizes.step_rows > sizes.rows else 0,
        "optimizer temporaries": _optimizer_temporaries(sizes),
        # On a CPU a block's gradients lie in the memory that its recomputation freed; DDP allocates them in advance
        "recomputed blocks": (layers - 1) * block if sizes.checkpointing and sizes.ranks == 1 else 0,
    }


def _block_activations(sizes: RunSizes) -> int:
    """Activations that one block saves for its backward pass.

    Per position: the residual stream before both layer norms; in the compute dtype the outputs of both norms, queries,
    keys and values, the attention output, and the 4 D hidden units of the MLP before and after the activation.
    """
    shape, item = sizes.shape, sizes.compute_bytes
    per_position = (2 * sizes.weight_bytes + 14 * item) * shape.n_embd + 16 + 4 * shape.n_head + _attention_bytes(sizes)
    if shape.dropout:
        per_position += 2 * shape.n_embd
    if sizes.lora_rank:
        per_position += 4 * sizes.lora_rank * item + (2 * shape.n_embd if item < sizes.weight_bytes else 0)
    return per_position * sizes.positions


def _attention_bytes(sizes: RunSizes) -> int:
    """Bytes per position that attention saves besides its inputs and output: the mask, and on CPUs probabilities."""
    shape, mask = sizes.shape, sizes.length * sizes.compute_bytes if sizes.masked else 0
    probabilities = shape.n_head * sizes.length  # elements
    if sizes.on_gpu:
        return mask
    if shape.dropout:  # no fused kernel
        return mask + 12 * probabilities + 8 * shape.n_embd
    if not short_attention.HAS_BF16 or sizes.compute_bytes != 2 or sizes.length > short_attention.MOST_POSITIONS:
        return mask
    if not sizes.masked:  # a block of queries has probabilities of the keys up to its end
        probabilities = shape.n_head * min(sizes.length, (sizes.length + short_attention.BLOCK) // 2)
    return mask + 2 * probabilities


def _casts(sizes: RunSizes) -> int:
    """Low-precision copies of the blocks' weights that autocast caches for a forward and backward pass."""
    casts = sizes.compute_bytes < sizes.weight_bytes
    return _matrices(sizes.shape) * sizes.shape.n_layer * sizes.compute_bytes if casts else 0


def _forward_pass(sizes: RunSizes, shape: ModelShape, positions: int, residual_bytes: int) -> int:
    """Temporaries of a forward pass without gradient; the MLP of a block needs the most."""
    masks = positions * sizes.length * sizes.compute_bytes if sizes.masked else 0
    return positions * shape.n_embd * (4 * residual_bytes + 9 * sizes.compute_bytes) + masks


def _head_temporaries(sizes: RunSizes) -> int:
    """Logits of a chunk, a low-precision copy of the head, and fp32 tensors of a block of logits (lm_head_loss.py)."""
    rows, width, vocab, item = sizes.targets, sizes.shape.n_embd, sizes.shape.vocab_size, sizes.compute_bytes
    if sizes.negatives:
        return rows * (sizes.negatives * (item + 12) + 2 * width * sizes.weight_bytes)
    chunk = rows_of_a_chunk(rows, vocab * item)
    logits = (2 if sizes.teacher else 1) * chunk * vocab * item if sizes.on_gpu else _logits_buffer(sizes)
    block_rows = chunk if sizes.on_gpu else min(max(LOGITS_OF_A_BLOCK // vocab, 1), chunk)
    head = width * vocab * item if item < 4 else 0
    product = width * vocab * (item + 4) if item < 4 and sizes.head_is_trained else 0
    return int(logits + head + max(block_rows * vocab * 4 * _loss_tensors(sizes), product) + 2 * chunk * width * item)


def _loss_tensors(sizes: RunSizes) -> float:
    if sizes.compiled_head and sizes.divergence != UNCOMPILED_LOSS:
        return COMPILED_TENSORS
    if not sizes.divergence:
        return CROSS_ENTROPY_TENSORS
    return DIVERGENCE_TENSORS.get(sizes.divergence, OTHER_DIVERGENCE_TENSORS)


def _optimizer_temporaries(sizes: RunSizes) -> int:
    """Updates of Muon's matrices and Newton–Schulz; fp32 chunks of bf16_true; the average of low-precision weights."""
    matrices, averaged = _muon_parameters(sizes), parameters(sizes.shape) * 4 if sizes.ema else 0
    own, held = matrices // sizes.ranks, matrices // sizes.shards  # orthogonalized here; stored here
    results = 2 * held // 3 if sizes.ranks == 1 else 2 * (held + own) if sizes.sharded else held  # in bf16, with copies
    muon = held * sizes.weight_bytes + own // 3 * _newton_schulz_bytes(sizes) + 2 * results
    rounded = (trained_parameters(sizes) - matrices) // sizes.shards if sizes.precision.is_bf16_true else 0
    return max(min(rounded, CHUNK_NUMEL) * WORK_BYTES, muon, averaged // sizes.shards if sizes.weight_bytes < 4 else 0)


def _newton_schulz_bytes(sizes: RunSizes) -> int:
    """Bytes of an iteration per element: in fp32 where bf16 is emulated. A planned GPU that is not here has bf16."""
    is_here = not sizes.on_gpu or torch.cuda.is_available()
    in_fp32 = is_here and not multiplies_bf16("cuda" if sizes.on_gpu else "cpu")
    return NEWTON_SCHULZ_BYTES * (2 if in_fp32 else 1)


def _validation(sizes: RunSizes) -> dict[str, int]:
    """Terms of a validation batch: the larger of a forward pass, and of the LM head or the metrics."""
    shape, w, c, positions = sizes.shape, sizes.weight_bytes, sizes.compute_bytes, sizes.eval_rows * sizes.length
    blocks = _forward_pass(sizes, shape, positions, w) + _casts(sizes)
    if sizes.teacher:
        blocks = max(blocks, _forward_pass(sizes, sizes.teacher, positions, c))
    logits = int(positions * sizes.eval_target_share) * shape.vocab_size
    if sizes.divergence not in ("", UNCOMPILED_LOSS) and sizes.compiled_head:
        work = min(COMPILED_METRIC_LOGITS, logits) * c * 3  # logits of student and teacher, and one copy
    elif sizes.divergence:
        work = min(METRIC_LOGITS, logits) * 4 * (METRIC_TENSORS if sizes.teacher else CACHED_METRIC_TENSORS)
    elif sizes.on_gpu:  # two chunks exist at a time
        tensors = COMPILED_TENSORS if sizes.compiled_head else CROSS_ENTROPY_TENSORS
        work = min(2 * VALIDATION_LOGITS, logits) * c + int(min(VALIDATION_LOGITS, logits) * 4 * tensors)
    else:  # and two tiles
        work = min(2 * LOGITS_OF_A_TILE, logits) * (c if c == 4 else c + 4)
    trained = parameters(shape) * w // sizes.shards if sizes.ema else 0  # a copy while the average is validated
    head = positions * shape.n_embd * w + shape.vocab_size * shape.n_embd * c + work
    return {"trained weights": trained, "validation batch": max(blocks, head)}


def _outside_training(sizes: RunSizes) -> dict[str, int]:
    """Terms of generation, of the export and of writing a teacher cache."""
    shape, w, c, texts = sizes.shape, sizes.weight_bytes, sizes.compute_bytes, sizes.prompts * sizes.generated_length
    is_packed = c == 4 and not sizes.on_gpu  # packed_products.py
    copies_of_weights = int(sizes.sharded or c < w) + int(is_packed)  # gathered or cast by autocast; packed
    copied = parameters(shape) * c * copies_of_weights if texts else 0
    key_values = 2 * shape.n_layer * shape.n_embd * (w if sizes.on_gpu else 4) * texts  # in fp32 on a CPU (decoder.py)
    logits = 3 * sizes.prompts * shape.vocab_size * 4  # raw, processed, and sorted or their softmax
    copies = max(2 if sizes.verified else 1, 2 if sizes.lora_rank else 1)  # in fp32
    cache, teacher = 0, sizes.cached_teacher
    if teacher:
        positions = sizes.eval_rows * sizes.length
        rows = min(positions, TEACHER_CACHE_LOGITS // teacher.vocab_size)
        tensors = c + 4 + 2 * 8 if sizes.sampled_cache else c + 3 * 4  # bytes: logits, probabilities, sums in fp64
        work = rows * teacher.vocab_size * tensors
        head = positions * teacher.n_embd * c + work
        cache = parameters(teacher) * c + max(_forward_pass(sizes, teacher, positions, c), head)
    return {
        "generation": copied + key_values + logits + _forward_pass(sizes, shape, texts, w),
        "export": 0 if sizes.on_gpu else parameters(shape) * 4 * copies,
        "teacher cache": cache,
    }
