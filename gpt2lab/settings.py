"""Plain typed settings that travel from the configuration into the code. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Any, Literal


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
    warmup_steps: int | None  # None: 20, or half of a run of up to 20 steps
    final_fraction: float  # learning rate at the last step, as a fraction of the peak
    decay_fraction: float = 0.4  # wsd only: share of the steps spent decaying


@dataclass(unsafe_hash=True)
class LossSettings:
    """Distillation loss: hard_weight · CE + (1 − hard_weight) · divergence (times T² where `scale_t2`).

    Attributes:
        name: one of those in gpt2lab/losses/divergences.py.
        beta: of jsd.
        alpha: of skew_kl and skew_reverse_kl.
        mixing_start, mixing_end, mixing_step, mixing_momentum: of taid (gpt2lab/losses/taid.py).
        hidden_cosine, hidden_mse: weights of the distances between the last hidden states (hidden_state_losses.py).
    """

    name: str
    temperature: float = 1.0
    scale_t2: bool = True
    hard_weight: float = 0.1
    beta: float = 0.5
    alpha: float = 0.1
    mixing_start: float = 0.4
    mixing_end: float = 1.0
    mixing_step: float = 5e-4
    mixing_momentum: float = 0.99
    hidden_cosine: float = 0.0
    hidden_mse: float = 0.0

    @property
    def is_reverse_kl(self) -> bool:
        """Whether the divergence is Σ q log(q / p): infinite where a token has p = 0."""
        limits = {"jsd": self.beta == 1, "skew_reverse_kl": self.alpha == 0}
        return limits.get(self.name, self.name == "reverse_kl")


@dataclass(unsafe_hash=True)
class CrossEntropySettings:
    """`label_smoothing` of each label is shared out evenly over the vocabulary; `z_loss` · logsumexp² is added."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass
class TeacherCacheSettings:
    """What is kept of a teacher's distributions.

    Attributes:
        name: none, topk or sampled.
        k: entries of a top-k record.
        tail: whether what all other entries have together counts; without it the k are scaled to sum to 1.
        dtype: of a top-k record's log-probabilities, float16 or float32.
        n: draws of a sampled record.
        draw_seed: decides them, whatever the run's seed is.
    """

    name: str = "none"
    k: int = 32
    tail: bool = True
    dtype: str = "float16"
    n: int = 12
    draw_seed: int = 0


@dataclass
class StudySettings:
    """What a study of distillation compares.

    Attributes:
        seeds: how many; each is one pair of every comparison.
        lr_factors: multiples of the learning rate that are tried.
        tune: baseline (the best for the student from random weights without a teacher is that of all) or every_arm.
        inits: starts of the student: scratch, teacher_layers.
    """

    seeds: int = 3
    lr_factors: list[float] = field(default_factory=lambda: [2.0, 4.0, 8.0])
    tune: str = "baseline"
    inits: list[str] = field(default_factory=lambda: ["scratch", "teacher_layers"])


@dataclass
class SearchSettings:
    """How a search of hyper-parameters chooses what its jobs try, and which it ends early.

    Attributes:
        name: none or optuna.
        n_trials: jobs, failed and pruned ones included.
        sampler: tpe or random.
        seed: of the sampler; None draws other values every time.
        n_startup_trials: jobs at random values before tpe goes by results; so many finish before median prunes.
        pruner: none, median (the best value so far is worse than half of the finished jobs' at that step), or
            successive_halving (asynchronous: each rung lets the best quarter pass).
        warmup_steps: no job is pruned before this step.
    """

    name: str = "none"
    n_trials: int = 20
    sampler: str = "tpe"
    seed: int | None = None
    n_startup_trials: int = 5
    pruner: str = "median"
    warmup_steps: int = 0


@dataclass
class LauncherSettings:
    """Where runs are done, and what a cluster is asked for.

    Attributes:
        name: processes (this machine), slurm or ray.
        executor: slurm, or local (submitit's processes on this machine, to try things out).
        partition: of SLURM; None here and below: the cluster's default.
        account: who pays.
        qos: quality of service.
        time: minutes that a job may take before it is queued again.
        notice: seconds before the end of that time at which it is told to save.
        requeues: how often a job whose time was up is queued again; it goes on from its checkpoint.
        memory: GB on each machine.
        cpus: cores for each device.
        sbatch: further parameters of sbatch, by their names without dashes.
        setup: shell commands before the job.
        address: of a Ray cluster; local starts one on this machine, auto finds the one that `ray start` started.
    """

    name: str = "processes"
    executor: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: int = 1440
    notice: int = 120
    requeues: int = 10
    memory: float | None = None
    cpus: int = 1
    sbatch: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    address: str = "local"


@dataclass
class SequenceSettings:
    """Whose text a distillation trains on.

    Attributes:
        name: data; gkd and distillm: also the student's own; seqkd: the teacher's.
        max_new_tokens: the most that is written after a prompt, end-of-text included.
        gen_temperature: of the writing; the loss has one of its own.
        lmbda: of gkd, share of the steps on text that the student has just written.
        threshold_step, tolerance, capacity: of distillm (gpt2lab/distillation/on_policy.py).
        draw_seed: of seqkd, decides what the teacher writes, whatever the run's seed is.
    """

    name: str = "data"
    max_new_tokens: int = 64
    gen_temperature: float = 1.0
    lmbda: float = 0.5
    threshold_step: float = 0.1
    tolerance: float = 0.1
    capacity: int = 1000
    draw_seed: int = 0

    @property
    def by_student(self) -> bool:
        """Whether the student writes while it is trained."""
        return self.name in ("gkd", "distillm")


@dataclass
class ObjectiveSettings:
    """What is predicted from what (gpt2lab/data/objectives.py).

    Attributes:
        name: clm, prefix_lm, mlm, fim or sampled_softmax.
        mask_share: of mlm, share of the tokens that are predicted.
        fim_rate: of fim, share of the documents whose middle is moved to the end.
        spm_share: of fim, share of those that have the suffix before the prefix.
        negatives: of sampled_softmax, entries beside the target.
        distribution: of sampled_softmax, log_uniform or unigram: what they are drawn from.
    """

    name: str = "clm"
    mask_share: float = 0.15
    fim_rate: float = 0.5
    spm_share: float = 0.5
    negatives: int = 1024
    distribution: str = "log_uniform"


PLAIN_CROSS_ENTROPY = CrossEntropySettings()


@dataclass
class TokenizerChoice:
    """`kind` is bpe (trained on the training split, `vocab_size` entries) or pretrained (`source`: folder or id)."""

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


@dataclass
class TrainingSettings:
    """What every task's module needs to train a model.

    Attributes:
        shape: sizes for random weights and for those cut out of a teacher; with other weights only its dropout counts.
        init: "scratch", "teacher_layers" (task distill), or a Hugging Face folder or Hub id.
        steps: optimizer steps of the whole run, for the schedule.
        gradient_clip: largest global L2 norm of the gradient; 0 does not clip.
        compiled: nothing, the transformer blocks one by one, or the whole pass from token ids to hidden states.
        compile_head: compile the work on each chunk of the LM-head loss.
        ema: decay of the averaged weights used for validation and export; 0 is off.
        layer_drop: probability with which a training pass leaves out a block; 0 is off.
        val_tokens, val_bytes: targets of the validation split and the UTF-8 bytes they spell, for bits per byte.
        log_every: optimizer steps between two logged training losses.
        cross_entropy: label smoothing and z-loss of the training loss; validation has neither.
        objective: what the batches ask for; goes into the export, and decides how text is written.
        fp8: whether the blocks multiply in fp8 (gpt2lab/model/fp8.py).
    """

    shape: ModelShape
    tokenizer_folder: str
    init: str
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    steps: int
    seed: int
    val_tokens: int
    val_bytes: int
    gradient_clip: float = 1.0
    compiled: Literal["nothing", "blocks", "pass"] = "nothing"
    compile_head: bool = False
    activation_checkpointing: bool = False
    ema: float = 0.0
    layer_drop: float = 0.0
    log_every: int = 10
    cross_entropy: CrossEntropySettings = field(default_factory=CrossEntropySettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    fp8: bool = False


@dataclass
class LoraSettings:
    """Low-rank adapters instead of full fine-tuning; rank 0 trains all weights."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0


@dataclass
class TextMetricSettings:
    """Metrics on text generated from the first `examples` validation prompts; the first metric is the watched one."""

    metrics: list[str]
    examples: int
    max_new_tokens: int
