"""Defaults by size: context, batch, steps, learning rate, weight decay and warm-up of keys that are `auto`.

They follow the number of weights in the blocks, so a model of other sizes has those of the nearest named one. `schema`
resolves them once the configuration is composed, and `launch.run.job` again once the sizes of init and the device are
known. Imports nothing heavy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt2lab.errors import InputError

AUTO = "auto"
# Key → its type. A warm-up that is null is resolved too, for models above `mini`.
TYPES: dict[str, type] = {"steps": int, "batch_tokens": int, "context": int}
TYPES |= {"optimizer.lr": float, "optimizer.weight_decay": float}
WARMUP = "schedule.warmup_steps"

TRY_OUT = "a try-out: 16 sequences of 256 tokens a step"
SHAKESPEARE = "nanoGPT's train_shakespeare_char"
CHINCHILLA = "20 tokens for each parameter (Chinchilla)"
WARMUP_SHARE, LONGEST_WARMUP = 0.02, 700  # llm.c has 700 of 19,560 steps, modded-nanogpt 250 of 9,536
STEPS_OF_PAIRS = 1000  # 16,000 pairs in batches of 16: about three epochs of a small data set


@dataclass(frozen=True)
class SizeDefaults:
    """Values for one size.

    Attributes:
        weights: of the blocks, 12 · layers · width².
        batch_tokens: of a step on GPUs.
        tokens: of a whole run on GPUs; 0: `steps` counts.
        lr: by optimizer; for weights that start at random.
        lr_from_weights: by optimizer; for weights that were trained before.
        practice: whose practice the row follows.
    """

    name: str
    weights: float
    context: int
    batch_tokens: int
    tokens: float
    lr: Mapping[str, float]
    lr_from_weights: Mapping[str, float]
    practice: str
    steps: int = 300


def _lr(value: float) -> dict[str, float]:
    """Muon's updates have the size of AdamW's, whose rate it takes (Moonlight, arXiv 2502.16982)."""
    return dict.fromkeys(("muon", "adamw", "adam"), value)


def _laptop(muon: float) -> dict[str, float]:
    """Return the rates of a small model; those for random weights are in docs/measurements/recipe.md."""
    return {"muon": muon, "adamw": 1e-3, "adam": 1e-3}


# mini: nanoGPT, config/train_shakespeare_char.py: 6 layers of width 384, block_size 256, 64 sequences, 5,000 steps.
# distil to xl: context and batch of GPT-2 (512 sequences of 1,024 tokens), which nanoGPT (491,520), llm.c and nanochat
#   (524,288) keep; xl as llm.c's scripts/run_gpt2_1558M (1,048,576).
#   Learning rates: GPT-3 (arXiv 2005.14165), table 2.1, for 125M, 350M, 760M and 1.3B; nanoGPT and llm.c have 6e-4 too.
#   Steps: 20 tokens for each parameter (Chinchilla, arXiv 2203.15556), nanochat's target_param_data_ratio.
#   Weight decay 0.1 is that of conf/optimizer, as in GPT-3, nanoGPT and llm.c.
#   From trained weights: 5e-5 of Hugging Face's Trainer, twice that up to small; LoRA 2e-4 (arXiv 2106.09685, GPT-2);
#   weight decay 0.01 (LoRA; microsoft/LMOps' fine-tuning of GPT-2).
SIZES = (
    SizeDefaults("nano", 0.393e6, 256, 4096, 0, _laptop(1e-2), _laptop(3e-3), TRY_OUT),
    SizeDefaults("micro", 3.15e6, 256, 4096, 0, _laptop(1e-2), _laptop(3e-3), TRY_OUT),
    SizeDefaults("mini", 10.6e6, 256, 16384, 0, _laptop(6e-3), _laptop(3e-3), SHAKESPEARE, 5000),
    SizeDefaults("distil", 42.5e6, 1024, 524288, 1.64e9, _lr(6e-4), _lr(1e-4), "GPT-2, llm.c, nanochat"),
    SizeDefaults("small", 84.9e6, 1024, 524288, 2.49e9, _lr(6e-4), _lr(1e-4), "GPT-2, llm.c, nanochat"),
    SizeDefaults("medium", 302e6, 1024, 524288, 7.1e9, _lr(3e-4), _lr(5e-5), "GPT-2, GPT-3, nanochat"),
    SizeDefaults("large", 708e6, 1024, 524288, 15.5e9, _lr(2.5e-4), _lr(5e-5), "GPT-2, GPT-3, nanochat"),
    SizeDefaults("xl", 1475e6, 1024, 1048576, 31.2e9, _lr(2e-4), _lr(5e-5), "GPT-2, GPT-3, llm.c"),
)
NANO = SIZES[0]
LORA_LR, DECAY_FROM_WEIGHTS, DECAY = 2e-4, 0.01, 0.1


@dataclass(frozen=True)
class Facts:
    """Facts of a run that the defaults depend on.

    Attributes:
        layers, width, positions: of the model; 0: unknown.
        on_gpu: whether the run computes on GPUs. A CPU would take hours for a step of a GPU's batch.
        optimizer: its name.
        from_weights: whether the weights were trained before.
        lora: whether adapters are trained.
        pairs: whether the data are pairs, of which `batch_sequences` make a step.
    """

    layers: int
    width: int
    positions: int
    on_gpu: bool
    optimizer: str
    from_weights: bool
    lora: bool
    pairs: bool

    @property
    def size(self) -> SizeDefaults:
        """The row of the nearest size; nano's for an unknown one."""
        weights = 12 * self.layers * self.width**2
        return min(SIZES, key=lambda row: abs(math.log(row.weights / weights))) if weights else NANO

    @property
    def fine_tunes(self) -> bool:
        """Whether trained weights of at least distil's size are trained further."""
        return self.from_weights and self.size.tokens > 0


def default_values(facts: Facts, given: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return key → (value, where it comes from) of every key that `given` lacks.

    Args:
        given: the values of the other keys.
    """
    found = {key: (value, "given") for key, value in given.items()}
    for key, rule in RULES.items():
        if key not in found:
            found[key] = rule(facts, {name: value for name, (value, _) in found.items()})
    return {key: value for key, value in found.items() if key not in given}


def _context(facts: Facts, given: Mapping[str, Any]) -> tuple[int, str]:
    row = facts.size
    if 0 < facts.positions < row.context:
        return facts.positions, "the model's positions"
    return row.context, f"{row.name}: {row.practice}"


def _batch_tokens(facts: Facts, given: Mapping[str, Any]) -> tuple[int, str]:
    """Return whole sequences, at least one."""
    row, context = facts.size, int(given["context"])
    sequences = max((row.batch_tokens if facts.on_gpu else NANO.batch_tokens) // context, 1)
    on_cpu = "" if facts.on_gpu or row.batch_tokens == NANO.batch_tokens else f" on a CPU; on GPUs {row.batch_tokens:,}"
    return sequences * context, f"{row.name}{on_cpu}: {row.practice}"


def _steps(facts: Facts, given: Mapping[str, Any]) -> tuple[int, str]:
    row = facts.size
    if facts.pairs:
        if not row.tokens or not facts.on_gpu:
            elsewhere = f" on a CPU; on GPUs {STEPS_OF_PAIRS:,}" if row.tokens else ""
            return NANO.steps, f"{row.name}{elsewhere}: a try-out"
        return STEPS_OF_PAIRS, f"{row.name}: about three epochs of 5,000 pairs in batches of 16"
    on_gpus = max(round(row.tokens / int(given["batch_tokens"])), 1) if row.tokens else row.steps
    why = CHINCHILLA if row.tokens else row.practice if row.steps != NANO.steps else "a try-out"
    if facts.on_gpu or on_gpus == NANO.steps:
        return on_gpus, f"{row.name}: {why}"
    return NANO.steps, f"{row.name} on a CPU: a try-out; on GPUs {on_gpus:,}, {why}"


def _learning_rate(facts: Facts, given: Mapping[str, Any]) -> tuple[float, str]:
    row = facts.size
    if facts.fine_tunes and facts.lora:
        return LORA_LR, f"{row.name} with LoRA: as published for GPT-2"
    practice = "GPT-3, table 2.1; nanoGPT, llm.c" if row.tokens else "measured for 2 to 6 layers"
    rates, origin = row.lr, f"{row.name}: {practice}"
    if facts.from_weights:
        rates, origin = row.lr_from_weights, f"{row.name} from trained weights"
    return rates.get(facts.optimizer, rates["adamw"]), origin


def _weight_decay(facts: Facts, given: Mapping[str, Any]) -> tuple[float, str]:
    if facts.optimizer == "adam":
        return 0.0, "optimizer=adam: L2, off"
    if facts.fine_tunes:
        return DECAY_FROM_WEIGHTS, f"{facts.size.name} from trained weights"
    return DECAY, "every size: GPT-3, nanoGPT"


def _warmup(facts: Facts, given: Mapping[str, Any]) -> tuple[int | None, str]:
    """Return null, which is 20 steps, for a small model or a short run."""
    steps = min(round(WARMUP_SHARE * int(given["steps"])), LONGEST_WARMUP)
    if not facts.size.tokens or steps <= 20:
        return None, "20 steps, or half of a run of up to 20"
    return steps, f"{WARMUP_SHARE:.0%} of the steps, at most {LONGEST_WARMUP}"


RULES = {
    "context": _context,
    "batch_tokens": _batch_tokens,
    "steps": _steps,
    "optimizer.lr": _learning_rate,
    "optimizer.weight_decay": _weight_decay,
    WARMUP: _warmup,
}


def check_type(key: str, value: Any) -> Any:
    """Return a given value of one of the keys; a whole number for a float is converted.

    Raises:
        InputError: it has the wrong type.
    """
    if value is None:
        raise InputError(f"{key} cannot be null.")
    kind = TYPES[key]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise InputError(f"{key}={value} is not a {'whole ' * (kind is int)}number.")
    return kind(value)
