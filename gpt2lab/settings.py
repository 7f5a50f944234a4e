"""Plain typed settings that travel from the configuration into the code. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass
class ModelShape:
    """Sizes of a GPT-2. `vocab_size` is 0 until the tokenizer is known."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int = 1024
    vocab_size: int = 0
    dropout: float = 0.0


@dataclass
class OptimizerSettings:
    """`name` is adamw, adam or muon; under muon the hidden matrices use it and everything else AdamW at `adamw_lr`."""

    name: str
    lr: float
    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # muon only
    adamw_lr: float = 0.0  # muon only: 0 means the same as lr


@dataclass
class ScheduleSettings:
    """`name` is wsd, cosine, linear or constant; the learning rate is a multiple of the optimizer's."""

    name: str
    warmup_steps: int
    final_fraction: float  # learning rate at the last step, as a fraction of the peak
    decay_fraction: float = 0.4  # wsd only: share of the steps spent decaying


@dataclass
class LossSettings:
    """Distillation loss: hard_weight · CE + (1 − hard_weight) · divergence (times T² where `scale_t2`)."""

    name: str
    temperature: float = 1.0
    scale_t2: bool = True
    hard_weight: float = 0.1


@dataclass
class TokenizerChoice:
    """`kind` is bpe (trained on the training split, `vocab_size` entries) or pretrained (`source`: folder or Hub id)."""

    kind: str
    vocab_size: int = 4096
    source: str = ""


@dataclass
class DataFacts:
    """What prepared data are, known before a model is built."""

    name: str
    hash: str  # content hash of the prepared data
    tokenizer_folder: str
    vocab_size: int
    train_tokens: int
    val_tokens: int  # target tokens of the whole validation split
    val_bytes: int  # UTF-8 bytes of the text these targets spell, for bits per byte
