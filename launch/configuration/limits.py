"""Limits: which values keys may have, where their type alone does not say it."""

import math
from typing import Any

from gpt2lab.text_metrics import TEXT_METRICS

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "taid", "mse", "uld")
CHOICES = {
    "accelerator": ("auto", "cpu", "gpu", "mps"),
    "preflight": ("refuse", "warn", "off"),
    "on_bad_line": ("stop", "skip"),
    "on_spike": ("warn", "stop"),
    "optimizer.name": ("adamw", "adam", "muon"),
    "schedule.name": ("wsd", "cosine", "linear", "constant"),
    "loss.name": DIVERGENCES,
    "teacher_cache.name": ("none", "topk", "sampled"),
    "teacher_cache.dtype": ("float16", "float32"),
    "sequences.name": ("data", "gkd", "distillm", "seqkd"),
    "objective.name": ("clm", "prefix_lm", "mlm", "fim", "sampled_softmax"),
    "objective.distribution": ("log_uniform", "unigram"),
    "study.tune": ("baseline", "every_arm"),
    "study.inits": ("scratch", "teacher_layers"),
    "tokenizer.kind": ("auto", "bpe", "pretrained"),
}
# key → (smallest, largest); a bound in brackets is itself not allowed
RANGES: dict[str, tuple[Any, Any]] = {
    "steps": (1, 10**9),
    "context": (2, 10**6),
    "batch_tokens": (1, 10**9),
    "batch_sequences": (1, 10**6),
    "seed": (0, 2**32 - 1),
    "label_smoothing": (0, [1]),
    "z_loss": (0, math.inf),
    "gradient_clip": (0, math.inf),
    "ema": (0, [1]),
    "layer_drop": (0, [1]),
    "validate_every": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "sample_every": (1, math.inf),
    "log_every": (1, math.inf),
    "workers": (0, 64),
    "val_fraction": ([0], [1]),
    "vocab_size": (257, 10**6),
    "model.n_layer": (1, math.inf),
    "model.n_head": (1, math.inf),
    "model.n_embd": (1, math.inf),
    "model.n_positions": (2, math.inf),
    "model.dropout": (0, [1]),
    "optimizer.lr": ([0], math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.beta1": (0, [1]),
    "optimizer.beta2": (0, [1]),
    "optimizer.eps": ([0], math.inf),
    "optimizer.momentum": (0, [1]),
    "optimizer.adamw_lr": (0, math.inf),
    "schedule.warmup_steps": (0, math.inf),
    "schedule.final_fraction": (0, 1),
    "schedule.decay_fraction": (0, 1),
    "loss.temperature": ([0], math.inf),
    "loss.hard_weight": (0, 1),
    "loss.beta": (0, 1),
    "loss.alpha": (0, [1]),
    "loss.mixing_start": (0, 1),
    "loss.mixing_end": (0, 1),
    "loss.mixing_step": (0, 1),
    "loss.mixing_momentum": (0, [1]),
    "loss.hidden_cosine": (0, math.inf),
    "loss.hidden_mse": (0, math.inf),
    "teacher_cache.k": (1, 10**6),
    "teacher_cache.n": (1, 10**4),
    "teacher_cache.draw_seed": (0, 2**63 - 1),
    "sequences.max_new_tokens": (1, 10**6),
    "sequences.gen_temperature": (0, math.inf),
    "sequences.lmbda": (0, 1),
    "sequences.threshold_step": (0, 1),
    "sequences.tolerance": (-math.inf, math.inf),
    "sequences.capacity": (1, 10**7),
    "sequences.draw_seed": (0, 2**63 - 1),
    "tokenizer.vocab_size": (257, 10**6),
    "objective.mask_share": ([0], 1),
    "objective.fim_rate": (0, 1),
    "objective.spm_share": (0, 1),
    "objective.negatives": (1, 10**6),
    "study.seeds": (1, 1000),
    "study.lr_factors": ([0], 10**6),
}
# The same for keys that only some tasks, data and callbacks have
RANGES_WHERE_THERE: dict[str, tuple[Any, Any]] = {
    "task.lora.rank": (0, 10**4),
    "task.lora.alpha": ([0], math.inf),
    "task.lora.dropout": (0, [1]),
    "task.frozen_layers": (0, 10**4),
    "task.text.examples": (0, math.inf),
    "task.text.max_new_tokens": (1, math.inf),
    "callbacks.samples.max_new_tokens": (1, math.inf),
    "callbacks.inspect.tokens": (2, math.inf),
    "callbacks.checkpoint.keep_last": (1, math.inf),
}
CHOICES_WHERE_THERE: dict[str, tuple[str, ...]] = {
    "data.reader": ("tables", "functions", "catalogues"),
    "data.source": ("stdlib", "packages", "text", "hub", "bin"),
    "task.text.metrics": TEXT_METRICS,
    "data.metrics": TEXT_METRICS,
    "logger.mode": ("auto", "online", "offline", "disabled"),
}
COUNTS_OR_AUTO = {"micro_batch": 10**6, "devices": 10**4, "threads": 4096}  # key → largest
# What writes text, and so needs room in the model for it
GENERATED = ("task.text.max_new_tokens", "callbacks.samples.max_new_tokens")
