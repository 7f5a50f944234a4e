"""Run sizes: reads the sizes that determine memory and speed from a resolved configuration."""

import math
from pathlib import Path
from typing import Any

from gpt2lab.generation.completion import BATCH
from gpt2lab.settings import ModelShape
from gpt2lab.storage.model_folder import has_tokenizer, read_shape
from launch.config.run_spec import Inputs, Machine
from launch.config.schema import RunConfig
from launch.memory.memory_terms import RunSizes

GPT2_VOCAB_SIZE = 50_257
FASTEST_TOKENS = {"cpu": 8_192}  # tokens of a micro-batch; larger ones exceed the caches and are not faster
FASTEST_GPU_TOKENS = 16_384
PAIR_TARGET_SHARE = 0.25  # assumed before the pairs are prepared; the other positions are prompt and padding
SAMPLE_PROMPTS = 3  # of the samples callback, unless prompts are given


def fastest_micro_batch(config: RunConfig, machine: Machine) -> int:
    """Return the number of sequences above which a larger micro-batch is not faster."""
    return max(1, FASTEST_TOKENS.get(machine.accelerator, FASTEST_GPU_TOKENS) // config.context)


def expected_vocabulary(config: RunConfig, inputs: Inputs) -> int:
    """Return the vocabulary size before data preparation; an upper bound for a tokenizer that is still to be trained.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """
    if inputs.init_names_weights:
        return read_shape(Path(inputs.init))["vocab_size"]
    follows_teacher = config.task_name == "distill" and config.loss.name != "uld"
    if follows_teacher and not has_tokenizer(Path(inputs.teacher)) and config.groups["tokenizer"] == "auto":
        return read_shape(Path(inputs.teacher))["vocab_size"]
    choice = inputs.tokenizer
    if choice.kind == "bpe":
        return choice.vocab_size
    if not Path(choice.source).expanduser().is_dir() and choice.source.rpartition("/")[2].startswith("gpt2"):
        return GPT2_VOCAB_SIZE
    from gpt2lab.data.tokenizer import load_tokenizer

    return len(load_tokenizer(choice.source))


def run_sizes(
    config: RunConfig,
    inputs: Inputs,
    machine: Machine,
    vocab_size: int,
    compiled_head: bool = False,
    target_share: float = PAIR_TARGET_SHARE,
) -> RunSizes:
    """Return the sizes of a run; an undecided micro-batch counts as the largest possible.

    Args:
        target_share: share of positions with a target in pairs.
    """
    distils = config.task_name == "distill"
    teacher = ModelShape(**read_shape(Path(inputs.teacher))) if inputs.teacher else None
    is_cached = config.teacher_cache.name != "none"
    largest = machine.largest_micro_batch or fastest_micro_batch(config, machine)
    step_rows = math.ceil(config.global_batch_rows / machine.world_size)
    given = machine.micro_batch or (largest if config.micro_batch == "auto" else int(config.micro_batch))
    rows = min(given, step_rows)
    share = min(target_share, 1.0) if config.takes_pairs else 1.0
    generated = config.sequences.max_new_tokens / config.context if config.sequences.on_policy else 0.0
    return RunSizes(
        shape=inputs.model.shape(vocab_size),
        rows=rows,
        length=config.context,
        eval_rows=largest,
        precision=machine.precision,
        optimizer=config.optimizer.name,
        step_rows=step_rows,
        checkpointing=config.activation_checkpointing,
        compiled_head=compiled_head,
        ema=config.ema > 0,
        target_share=max(share, min(generated, 1.0)),
        eval_target_share=share,
        varied=(config.takes_pairs and not config.packing) or config.sequences.on_policy,
        masked=config.packing or not config.objective.kind.is_causal,
        lora_rank=config.lora_rank,
        frozen_layers=int(config.task.get("frozen_layers", 0)),
        negatives=config.objective.negatives if config.objective.kind.samples_softmax else 0,
        divergence=config.loss.name if distils else "",
        teacher=None if is_cached else teacher,
        cached_teacher=teacher if is_cached else None,
        sampled_cache=config.teacher_cache.name == "sampled",
        on_gpu=machine.accelerator == "gpu",
        sharded=machine.strategy == "fsdp",
        ranks=machine.world_size,
        sharded_teacher=machine.shard_teacher,
        **_observers(config, rows),
    )


def _observers(config: RunConfig, rows: int) -> dict[str, Any]:
    """Return the sizes of generated text, and of what callbacks and loggers add."""
    samples, text = config.callbacks.get("samples"), config.task.get("text") or {}
    generated = [(0, 0)]  # texts at once, their tokens
    if samples:
        prompts = len(samples["prompts"]) or SAMPLE_PROMPTS
        generated.append((prompts, config.context + int(samples["max_new_tokens"])))
    if text.get("examples"):
        generated.append((min(BATCH, int(text["examples"])), config.context + int(text["max_new_tokens"])))
    if config.sequences.on_policy:
        generated.append((rows, config.context))
    prompts, length = max(generated)
    return {
        "prompts": prompts,
        "generated_length": length,
        "samples": bool(samples),
        "wandb": "WeightsAndBiases" in str(config.logger),
        "verified": bool((config.callbacks.get("checkpoint") or {}).get("verify_export")),
    }


def rank_memory_limit(machine: Machine, free: int | None, process: int) -> int | None:
    """Return the bytes available to one rank, including its process on a CPU; None if free memory is unknown.

    Args:
        free: free bytes of one GPU, or of the host, which the CPU ranks share.
        process: bytes of this process, and of every other CPU rank.
    """
    if free is None or machine.accelerator == "gpu":
        return free
    return (free + process) // machine.world_size
