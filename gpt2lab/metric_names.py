"""The names under which metrics are logged, written to metrics.csv, shown on W&B and reported."""

import math
from collections.abc import Mapping

from gpt2lab.settings import TEXT_METRICS

VALIDATION_PREFIX = "val/"
BENCHMARK_PREFIX = "benchmarks/"  # benchmarks/TASK/METRIC of lm-evaluation-harness
STANDARD_ERROR = "_stderr"  # ending of the standard error of a benchmark's metric, as the harness names it
PREFIXES = (VALIDATION_PREFIX, BENCHMARK_PREFIX, STANDARD_ERROR)  # constants here that are no metric
MEASURED_BY_VALIDATION = (VALIDATION_PREFIX, "distill/")  # prefixes of these metrics

TRAIN_LOSS = "train/loss"  # cross-entropy, nats per target token, also in distillation
TRAIN_OBJECTIVE = "train/objective"  # the loss that distillation minimizes
VAL_LOSS = "val/loss"  # cross-entropy, nats per target token
VAL_PERPLEXITY = "val/perplexity"
VAL_BITS_PER_BYTE = "val/bits_per_byte"
LEARNING_RATE = "lr"
GRAD_NORM = "grad_norm"
TOKENS = "tokens"
SECONDS = "seconds"  # since the run was started, without interruptions
TOKENS_PER_SECOND = "tokens_per_second"
MFU = "mfu"
MEMORY_GB = "memory_gb"
DISTILL_KL = "distill/kl"
DISTILL_REVERSE_KL = "distill/reverse_kl"
DISTILL_TVD = "distill/tvd"
DISTILL_TOP1_AGREEMENT = "distill/top1_agreement"
DISTILL_TOP5_AGREEMENT = "distill/top5_agreement"
DISTILL_ECE = "distill/ece"
DISTILL_TEACHER_ECE = "distill/teacher_ece"
DISTILL_ENTROPY_STUDENT = "distill/entropy_student"
DISTILL_ENTROPY_TEACHER = "distill/entropy_teacher"
DISTILL_TEACHER_LOSS = "distill/teacher_loss"
DISTILL_ACCEPTANCE = "distill/acceptance"
DISTILL_GAP_CLOSED = "distill/gap_closed"
DISTILL_ULD = "distill/uld"
DISTILL_MATCHED = "distill/matched"

# Distillation metric → (name, meaning), in the order of reports and tables
DISTILLATION = {
    DISTILL_TEACHER_LOSS: ("teacher loss", "the teacher's cross-entropy, nats per token"),
    DISTILL_GAP_CLOSED: ("gap closed", "0: no better than trained without a teacher; 1: as good as the teacher"),
    DISTILL_KL: ("KL(teacher ‖ student)", "nats; large where the student gives the teacher's tokens low probability"),
    DISTILL_REVERSE_KL: ("KL(student ‖ teacher)", "nats; large where the teacher gives the student's low probability"),
    DISTILL_TVD: ("total variation", "share of the probability mass on other tokens than the teacher's"),
    DISTILL_ACCEPTANCE: ("acceptance", "share of drafts accepted in speculative decoding: 1 − total variation"),
    DISTILL_TOP1_AGREEMENT: ("top-1 agreement", "how often both have the same top-1 token"),
    DISTILL_TOP5_AGREEMENT: ("top-5 agreement", "share of the teacher's top-5 tokens in the student's top-5"),
    DISTILL_ENTROPY_STUDENT: ("entropy, student", "nats; below the teacher's: over-confident, above: under-confident"),
    DISTILL_ENTROPY_TEACHER: ("entropy, teacher", "nats"),
    DISTILL_ECE: ("calibration error, student", "gap between confidence and accuracy, in 15 bins"),
    DISTILL_TEACHER_ECE: ("calibration error, teacher", "the same for the teacher"),
}
# Metrics of a teacher with another tokenizer, instead of those that compare tokens
BETWEEN_TOKENIZERS = {
    DISTILL_ULD: (
        "universal logit distance",
        "between both sorted distributions, 0 to 2; 0 without matched targets",
    ),
    DISTILL_MATCHED: ("matched targets", "share of the targets whose first byte also begins a teacher token"),
}
# Of distillation: whether lower values are better; entropies and the teacher's own metrics are not judged
DISTILL_LOWER = (DISTILL_KL, DISTILL_REVERSE_KL, DISTILL_TVD, DISTILL_ECE, DISTILL_ULD)
DISTILL_HIGHER: tuple[str, ...] = (DISTILL_TOP1_AGREEMENT, DISTILL_TOP5_AGREEMENT)
DISTILL_HIGHER += (DISTILL_ACCEPTANCE, DISTILL_GAP_CLOSED, DISTILL_MATCHED)
# All other validation metrics are scores of generated text, for which higher is better
LOWER_IS_BETTER = (TRAIN_LOSS, TRAIN_OBJECTIVE, VAL_LOSS, VAL_PERPLEXITY, VAL_BITS_PER_BYTE)


def lower_is_better(watched: str) -> bool:
    """Whether lower values of the watched metric are better."""
    return watched in LOWER_IS_BETTER


def summaries() -> dict[str, str]:
    """Return the metrics whose best value a logger shows beside the last one: name → min or max."""
    lower = dict.fromkeys((*LOWER_IS_BETTER, *DISTILL_LOWER), "min")
    return lower | dict.fromkeys((*DISTILL_HIGHER, *(f"{VALIDATION_PREFIX}{name}" for name in TEXT_METRICS)), "max")


def is_better(watched: str, value: float, known: float | None) -> bool:
    """Whether a value of the watched metric is finite and better than the best known one, if there is one."""
    if not math.isfinite(value):
        return False
    return known is None or (value < known if lower_is_better(watched) else value > known)


def logged() -> list[str]:
    """Return the names of all metrics that a run can log, except for those of benchmarks, which the harness names."""
    constants = [value for name, value in globals().items() if name.isupper() and isinstance(value, str)]
    return [
        *(name for name in constants if name not in PREFIXES),
        *(f"{VALIDATION_PREFIX}{one}" for one in TEXT_METRICS),
    ]


def benchmark_scores(metrics: Mapping[str, float]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Return (task, metric) → (value, standard error) of the benchmarks among the metrics."""
    names = [name for name in metrics if name.startswith(BENCHMARK_PREFIX) and not name.endswith(STANDARD_ERROR)]
    parts = {name: name.removeprefix(BENCHMARK_PREFIX).rpartition("/") for name in names}
    return {
        (task, metric): (metrics[name], metrics.get(name + STANDARD_ERROR)) for name, (task, _, metric) in parts.items()
    }
