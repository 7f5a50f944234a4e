"""Settings: frozen, typed values that travel from the configuration into the code. Imports nothing heavy."""

import re
from dataclasses import dataclass, field
from typing import Literal

from gpt2lab.errors import InputError
from gpt2lab.keys import AUTO_OR_BOOL, key
from gpt2lab.registry import Registry

# Packages of the user add functions to these (docs/extending.md)
DIVERGENCES = Registry(
    "divergence", "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "taid", "mse", "uld"
)
OPTIMIZERS = Registry("optimizer", "adamw", "adam", "muon")
SCHEDULES = Registry("schedule", "wsd", "cosine", "linear", "constant")
TEXT_METRICS = Registry(
    *("text metric", "rouge1", "rouge2", "rougeL", "bleu", "chrf"),
    *("exact", "accuracy", "f1", "compiles", "placeholders"),
)
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # bytes
DTYPES = tuple(ITEM_SIZES)
PAIR_SIDES = ("prompt", "response")  # of a template of pairs
SKEW = "loss=skew_kl,skew_reverse_kl"
SAMPLED = "sampling=top_k,nucleus"
DECODED = "sampling=greedy,top_k,nucleus,beam"
MOST_SCORED = 10_000_000  # tokens of the score after training
MOST_PROFILED = 100  # steps; the events of a step take megabytes of memory
MIN_TEMPERATURE = 1e-3  # decoding is greedy below it; logits would overflow


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a GPT-2. `vocab_size` is 0 until the tokenizer is known."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int = 1024
    vocab_size: int = 0
    dropout: float = 0.0


@dataclass(frozen=True)
class PrecisionSettings:
    """Dtypes of a run, by their names in torch."""

    name: str = key("name of the combination of dtypes; auto is resolved for the device")
    lightning: str | None = key(
        "name of the combination in Lightning", None, choices=("32-true", "bf16-mixed", "16-mixed", "bf16-true")
    )
    weights: str | None = key("dtype of weights, gradients and optimizer state", None, choices=DTYPES)
    compute: str | None = key("dtype of matrix products", None, choices=DTYPES)
    teacher: str | None = key("dtype of the weights of a teacher", None, choices=DTYPES)

    @property
    def has_loss_scaling(self) -> bool:
        """Whether gradients are scaled, as fp16 needs."""
        return self.lightning == "16-mixed"

    @property
    def is_bf16_true(self) -> bool:
        """Whether the weights themselves are bf16, updated with stochastic rounding."""
        return self.lightning == "bf16-true"

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return ITEM_SIZES[self.weights or "float32"]

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in a matrix product."""
        return ITEM_SIZES[self.compute or "float32"]

    @property
    def teacher_bytes(self) -> int:
        """Bytes of a teacher's weight."""
        return ITEM_SIZES[self.teacher or "float32"]


@dataclass(frozen=True)
class OptimizerSettings:
    """Under muon the hidden matrices use Muon and everything else AdamW at `adamw_lr`."""

    name: str = key("name of the optimizer", choices=OPTIMIZERS)
    lr: float = key("peak learning rate; auto: by the size of the model", within="(0, inf)", by_size=True)
    weight_decay: float = key(
        "weight decay, auto by size; Muon and AdamW: decoupled, on matrices only; Adam: L2",
        within="[0, inf)",
        by_size=True,
    )
    beta1: float = key("decay of the first moment in Adam and AdamW", 0.9, within="[0, 1)")
    beta2: float = key("decay of the second moment in Adam and AdamW", 0.95, within="[0, 1)")
    eps: float = key("constant added to the denominator in Adam and AdamW", 1e-8, within="(0, inf)")
    momentum: float = key("momentum of Muon", 0.95, within="[0, 1)", read_by="optimizer=muon")
    adamw_lr: float = key(
        "peak learning rate of AdamW, for embeddings, norms and biases; 0: the same as lr",
        0.0,
        within="[0, inf)",
        read_by="optimizer=muon",
    )


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the steps, as a multiple of the optimizer's."""

    name: str = key("name of the schedule", choices=SCHEDULES)
    warmup_steps: int | None = key(
        "steps of linear warmup; null: 20, or half of a run of up to 20 steps", within="[0, inf)"
    )
    final_fraction: float = key(
        "learning rate at the last step, as a fraction of the peak",
        within="[0, 1]",
        read_by="schedule=wsd,cosine,linear",
    )
    decay_fraction: float = key(
        "share of the steps in which the learning rate decays", 0.4, within="[0, 1]", read_by="schedule=wsd"
    )


@dataclass(frozen=True)
class StrategySettings:
    """Distribution of the model and of a batch over the ranks of a run.

    `find_unused_parameters` and `shard_teacher` are auto, true or false, as text: OmegaConf merges no unions here.
    """

    name: str = key("auto: ddp, or fsdp if the model is too large for one device", choices=("auto", "ddp", "fsdp"))
    bucket_cap_mb: int = key(
        "MiB of gradients that are all-reduced at once", 25, within="[1, 1e5]", read_by="strategy=auto,ddp"
    )
    gradient_as_bucket_view: bool = key(
        "store gradients in the buckets: no second copy", True, read_by="strategy=auto,ddp"
    )
    find_unused_parameters: str = key(
        "search for weights without a gradient; auto: with layer_drop or trainer.deterministic",
        "auto",
        choices=AUTO_OR_BOOL,
        read_by="strategy=auto,ddp",
    )
    offload: bool = key(
        "keep weights, gradients and optimizer state in host memory, on GPUs", False, read_by="strategy=auto,fsdp"
    )
    shard_teacher: str = key(
        "shard the teacher too; auto: if it does not fit next to the student's shard",
        "auto",
        choices=AUTO_OR_BOOL,
        read_by="task=distill",
    )


@dataclass(frozen=True)
class LossSettings:
    """Distillation loss: hard_weight · CE + (1 − hard_weight) · divergence (times T² where `scale_t2`)."""

    name: str = key("divergence between teacher and student", choices=DIVERGENCES)
    temperature: float = key("softmax temperature T of teacher and student", 1.0, within="(0, inf)")
    scale_t2: bool = key("multiply the divergence by T², which preserves the gradient scale", True)
    hard_weight: float = key("weight of the cross-entropy; the divergence has the rest", 0.1, within="[0, 1]")
    beta: float = key(
        "share of the teacher in the mixture; 0: forward KL, 1: reverse KL", 0.5, within="[0, 1]", read_by="loss=jsd"
    )
    alpha: float = key(
        "share in the mixture of the teacher (skew_kl) or of the student (skew_reverse_kl)",
        0.1,
        within="[0, 1)",
        read_by=SKEW,
    )
    mixing_start: float = key(
        "share of the teacher in the target at the first step", 0.4, within="[0, 1]", read_by="loss=taid"
    )
    mixing_end: float = key(
        "share of the teacher in the target at the last step", 1.0, within="[0, 1]", read_by="loss=taid"
    )
    mixing_step: float = key(
        "maximum adaptive increase of the share per step, beyond linear growth",
        5e-4,
        within="[0, 1]",
        read_by="loss=taid",
    )
    mixing_momentum: float = key(
        "momentum of the mean improvement of the loss, which controls that increase",
        0.99,
        within="[0, 1)",
        read_by="loss=taid",
    )
    hidden_cosine: float = key("weight of the cosine distance between the last hidden states", 0.0, within="[0, inf)")
    hidden_mse: float = key("weight of the mean squared error between the last hidden states", 0.0, within="[0, inf)")

    @property
    def compares_hidden_states(self) -> bool:
        """Whether the loss has terms on the last hidden states beside the divergence."""
        return bool(self.hidden_cosine or self.hidden_mse)

    @property
    def is_reverse_kl(self) -> bool:
        """Whether the divergence is Σ q log(q / p): infinite where a token has p = 0."""
        limits = {"jsd": self.beta == 1, "skew_reverse_kl": self.alpha == 0}
        return limits.get(self.name, self.name == "reverse_kl")


@dataclass(frozen=True)
class CrossEntropySettings:
    """`label_smoothing` of each label is shared out evenly over the vocabulary; `z_loss` · logsumexp² is added."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class TeacherCacheSettings:
    """Teacher distributions stored once for all students."""

    name: str = key("stored form of the distributions", "none", choices=("none", "topk", "sampled"))
    k: int = key(
        "number of most probable tokens stored per position", 32, within="[1, 1e6]", read_by="teacher_cache=topk"
    )
    tail: bool = key(
        "store the total probability of all other tokens; false: scale the top k to sum to 1",
        True,
        read_by="teacher_cache=topk",
    )
    dtype: str = key(
        "dtype of the stored log-probabilities",
        "float16",
        choices=("float16", "float32"),
        read_by="teacher_cache=topk",
    )
    n: int = key("samples per position", 12, within="[1, 1e4]", read_by="teacher_cache=sampled")
    draw_seed: int = key(
        "random seed of the samples", 0, within="[0, 9223372036854775807]", read_by="teacher_cache=sampled"
    )


@dataclass(frozen=True)
class SequenceSettings:
    """The text a distillation trains on: the data's own, the student's (on-policy), or the teacher's."""

    name: str = key("origin of the training text", "data", choices=("data", "gkd", "distillm", "seqkd"))
    max_new_tokens: int = key(
        "maximum number of generated tokens per prompt; running text is truncated to make room",
        64,
        within="[1, 1e6]",
        read_by="sequences=gkd,distillm,seqkd",
    )
    gen_temperature: float = key(
        "sampling temperature of the generation; 0: greedy; the loss uses loss.temperature",
        1.0,
        within="[0, inf)",
        read_by="sequences=gkd,distillm,seqkd",
    )
    lmbda: float = key(
        "share of on-policy steps, on text that the student has just generated",
        0.5,
        within="[0, 1]",
        read_by="sequences=gkd",
    )
    threshold_step: float = key(
        "increase of the share of student generations, each time", 0.1, within="[0, 1]", read_by="sequences=distillm"
    )
    tolerance: float = key(
        "rise of val/loss in nats that triggers an increase; -0.1: increase unless it fell by 0.1",
        0.1,
        within="(-inf, inf)",
        read_by="sequences=distillm",
    )
    capacity: int = key(
        "sequences in the replay buffer (first in, first out)",
        1000,
        within="[1, 1e7]",
        read_by="sequences=distillm",
    )
    draw_seed: int = key(
        "random seed of the teacher's generations, whatever the seed of the run",
        0,
        within="[0, 9223372036854775807]",
        read_by="sequences=seqkd",
    )

    @property
    def on_policy(self) -> bool:
        """Whether the student generates text while it is trained."""
        return self.name in ("gkd", "distillm")


@dataclass(frozen=True)
class SamplingSettings:
    """Choice of each generated token: greedy below temperature 0.001, beam search with several beams, else sampling.

    The defaults are plain sampling: no filter and no penalty.
    """

    name: str = key(
        "auto: samples by greedy, top_k and nucleus, scores of generated text by greedy",
        choices=("auto", "greedy", "top_k", "nucleus", "beam"),
    )
    temperature: float = key("softmax temperature; 0: greedy", 1.0, within="[0, 100]", read_by=SAMPLED)
    top_k: int = key("sample from the k most probable tokens; 0: from all", 0, within="[0, inf)", read_by=SAMPLED)
    top_p: float = key(
        "sample from the most probable tokens with this total probability", 1.0, within="(0, 1]", read_by=SAMPLED
    )
    min_p: float = key(
        "least probability of a token, relative to the most probable one", 0.0, within="[0, 1]", read_by=SAMPLED
    )
    typical_p: float = key(
        "sample from the most typical tokens with this total probability", 1.0, within="(0, 1]", read_by=SAMPLED
    )
    beams: int = key("beams of the search", 1, within="[1, 100]", read_by="sampling=beam")
    length_penalty: float = key(
        "power of the length that divides a beam's log-probability; above 0 favours long texts",
        1.0,
        within="[-100, 100]",
        read_by="sampling=beam",
    )
    repetition_penalty: float = key(
        "above 1: tokens of the text are less likely", 1.0, within="[0.01, 100]", read_by=DECODED
    )
    no_repeat_ngram: int = key("n-grams of this size do not repeat; 0: no limit", 0, within="[0, inf)", read_by=DECODED)

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is deterministic."""
        return self.temperature < MIN_TEMPERATURE or self.beams > 1

    @property
    def uses_history(self) -> bool:
        """Whether the logits processors depend on the tokens before."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram > 0

    @property
    def label(self) -> str:
        """Name, and each value that differs from the preset: "nucleus top_p=0.9"."""
        preset = vars(SAMPLING_PRESETS.get(self.name, SamplingSettings(self.name)))
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != preset[name]]
        return " ".join([self.name, *changed])

    def or_else(self, default: "SamplingSettings") -> "SamplingSettings":
        """Return these settings; those of the use under `auto`."""
        return default if self.name == "auto" else self


AUTO = SamplingSettings("auto")
GREEDY = SamplingSettings("greedy", temperature=0.0)
TOP_K = SamplingSettings("top_k", temperature=0.8, top_k=50)
NUCLEUS = SamplingSettings("nucleus", temperature=0.9, top_p=0.95)
BEAM = SamplingSettings("beam", temperature=0.0, beams=4)
SAMPLING_PRESETS = {preset.name: preset for preset in (AUTO, GREEDY, TOP_K, NUCLEUS, BEAM)}  # those of conf/sampling/


@dataclass(frozen=True)
class ObjectiveKind:
    """Properties of an objective for data, loss and generation.

    Attributes:
        fills_masks: predicts hidden tokens from all others; such a model fills masks and does not continue text.
        bidirectional_prompt: the tokens of a prompt see each other, and are no targets.
        infills: fills one gap of any length with text.
        samples_softmax: is trained on a few tokens of the vocabulary.
    """

    fills_masks: bool = False
    bidirectional_prompt: bool = False
    infills: bool = False
    samples_softmax: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether every token sees the earlier ones only, so that text is continued from left to right."""
        return not (self.fills_masks or self.bidirectional_prompt)

    @property
    def rewrites_text(self) -> bool:
        """Whether tokens are hidden or moved, with special tokens: the targets are not a text's next tokens."""
        return self.fills_masks or self.infills

    @property
    def scores_all_text(self) -> bool:
        """Whether each token is predicted from those before it; if not, every epoch samples other batches."""
        return self.is_causal and not self.infills


OBJECTIVES = {
    "clm": ObjectiveKind(),
    "prefix_lm": ObjectiveKind(bidirectional_prompt=True),
    "mlm": ObjectiveKind(fills_masks=True),
    "fim": ObjectiveKind(infills=True),
    "sampled_softmax": ObjectiveKind(samples_softmax=True),
}


@dataclass(frozen=True)
class ObjectiveSettings:
    """The prediction that is trained (gpt2lab/data/objectives.py)."""

    name: str = key("name of the objective", "clm", choices=tuple(OBJECTIVES))
    mask_share: float = key(
        "share of the tokens that are predicted: 80 % masked, 10 % replaced at random, 10 % unchanged",
        0.15,
        within="(0, 1]",
        read_by="objective=mlm",
    )
    fim_rate: float = key(
        "share of the documents whose middle is moved to the end", 0.5, within="[0, 1]", read_by="objective=fim"
    )
    spm_share: float = key(
        "share of the rearranged documents that have the suffix before the prefix (SPM)",
        0.5,
        within="[0, 1]",
        read_by="objective=fim",
    )
    negatives: int = key(
        "number of sampled negatives, shared by all targets of a step",
        1024,
        within="[1, 1e6]",
        read_by="objective=sampled_softmax",
    )
    distribution: str = key(
        "sampling distribution of the negatives; unigram: training counts to the power of 3/4",
        "log_uniform",
        choices=("log_uniform", "unigram"),
        read_by="objective=sampled_softmax",
    )

    @property
    def kind(self) -> ObjectiveKind:
        """Its properties."""
        return OBJECTIVES[self.name]


PLAIN_CROSS_ENTROPY = CrossEntropySettings()


@dataclass(frozen=True)
class HubSettings:
    """Model card and upload of a finished run to the Hugging Face Hub."""

    push: str | None = key("USER/NAME: model repository to which hf/ is uploaded after training; null: none", None)
    private: bool = key("create the repository as private", False, read_by="upload")
    revision: str = key("branch of the upload; it is created if it does not exist", "main", read_by="upload")
    license: str | None = key(
        "license of the model, for its card: mit, apache-2.0, …; null: that of the initial weights, if known", None
    )


@dataclass(frozen=True)
class TokenizerKeys:
    """Keys of the group tokenizer."""

    kind: str = key(
        "auto; bpe: trained on the training split; pretrained: loaded from tokenizer.source",
        choices=("auto", "bpe", "pretrained"),
    )
    source: str = key("folder or Hub id of a pretrained tokenizer", "", read_by="tokenizer=hub", free_text=True)


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer of a run: bpe, trained with `vocab_size` tokens, or pretrained, loaded from `source`."""

    kind: str
    vocab_size: int = 0
    source: str = ""


@dataclass(frozen=True)
class DataFacts:
    """Facts of prepared data, known before a model is built."""

    name: str
    hash: str  # content hash of the prepared data
    tokenizer_folder: str
    vocab_size: int
    train_tokens: int
    val_tokens: int  # target tokens of a validation
    val_bytes: int  # UTF-8 bytes of the text these targets spell, for bits per byte
    val_overlap: float | None = None  # share of the validation text's 13-grams that occur in the training text


@dataclass(frozen=True)
class TrainingSettings:
    """Settings that every task's module needs to train a model.

    Attributes:
        shape: sizes for random weights and for a student initialized from a teacher; else only its dropout counts.
        init: "scratch", "teacher_layers" (task distill), or a Hugging Face folder or Hub id.
        steps: optimizer steps of the whole run, for the schedule.
        gradient_clip: largest global L2 norm of the gradient; 0 does not clip.
        compiled: nothing, the transformer blocks one by one, or the whole pass from token ids to hidden states.
        compile_head: compile the work on each chunk of the LM-head loss, and on a CPU the GELU of the blocks.
        ema: decay of the averaged weights used for validation and export; 0 is off.
        layer_drop: probability with which a training pass leaves out a block; 0 is off.
        val_tokens, val_bytes: targets of a validation and the UTF-8 bytes they spell, for bits per byte.
        log_every: optimizer steps between two logged training losses.
        cross_entropy: label smoothing and z-loss of the training loss; validation has neither.
        objective: what the batches ask for; goes into the export, and decides how text is written.
        sampling: decoding of the samples and of the text that is scored.
        teacher_dtype: dtype of a teacher's weights, by its name in torch.
        pair_template: templates of pairs, `prompt` and `response`, for the export; empty for running text.
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
    sampling: SamplingSettings = AUTO
    teacher_dtype: str = "float32"
    pair_template: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = key("rank of the LoRA adapters; 0: no adapters, all weights are trained", 0, within="[0, 1e4]")
    alpha: float = key("LoRA alpha: the adapters are scaled by alpha / rank", 32.0, within="(0, inf)", read_by="lora")
    dropout: float = key("dropout probability before the LoRA adapters", 0.0, within="[0, 1)", read_by="lora")


@dataclass(frozen=True)
class TextMetricSettings:
    """Metrics on text generated from validation prompts; the first metric is the watched one."""

    metrics: list[str] = key(
        "metrics of generated text, the first is watched; empty: those of the data preset", choices=TEXT_METRICS
    )
    examples: int = key("validation pairs that are scored on generated text; 0: none", within="[0, inf)")
    max_new_tokens: int = key("maximum number of generated tokens per validation pair", within="[1, inf)")


def profiled_steps(given: str) -> range:
    """Return the numbers of the steps of "START:COUNT": the COUNT steps that follow step START.

    Raises:
        InputError: it is not written like this, or COUNT is not 1 to 100.
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", given, re.ASCII)
    if match is None or not 1 <= int(match[2]) <= MOST_PROFILED:
        raise InputError(
            f"profile={given} is not START:COUNT, with a COUNT of 1 to {MOST_PROFILED}.\n"
            "Give profile=20:3 to profile the three steps after step 20."
        )
    start, count = int(match[1]), int(match[2])
    return range(start + 1, start + count + 1)
