"""The names under which metrics are logged, written to metrics.csv, shown on W&B and reported."""

TRAIN_LOSS = "train/loss"  # cross-entropy, nats per target token, in distillation too
TRAIN_OBJECTIVE = "train/objective"  # what distillation minimises
VAL_LOSS = "val/loss"  # as train/loss
VAL_PERPLEXITY = "val/perplexity"
VAL_BITS_PER_BYTE = "val/bits_per_byte"
LEARNING_RATE = "lr"
GRAD_NORM = "grad_norm"
TOKENS = "tokens"
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

# What each figure of a distillation is called and says, in the order in which reports and tables show them
DISTILLATION = {
    DISTILL_TEACHER_LOSS: ("teacher loss", "the teacher's cross-entropy, nats per token"),
    DISTILL_GAP_CLOSED: ("gap closed", "0: no better than trained without a teacher; 1: as good as the teacher"),
    DISTILL_KL: ("KL(teacher ‖ student)", "nats; large where the student misses what the teacher expects"),
    DISTILL_REVERSE_KL: ("KL(student ‖ teacher)", "nats; large where the student expects what the teacher rules out"),
    DISTILL_TVD: ("total variation", "share of the probability that lies on other tokens than the teacher's"),
    DISTILL_ACCEPTANCE: ("acceptance", "share of its drafts that speculative decoding keeps: 1 − total variation"),
    DISTILL_TOP1_AGREEMENT: ("top-1 agreement", "how often both hold the same token likeliest"),
    DISTILL_TOP5_AGREEMENT: (
        "top-5 agreement",
        "share of the teacher's five likeliest that are among the student's five",
    ),
    DISTILL_ENTROPY_STUDENT: ("entropy, student", "nats; below the teacher's: too sure, above: too vague"),
    DISTILL_ENTROPY_TEACHER: ("entropy, teacher", "nats"),
    DISTILL_ECE: ("calibration error, student", "gap between its confidence and how often it is right, in 15 bins"),
    DISTILL_TEACHER_ECE: ("calibration error, teacher", "the same of the teacher"),
}
# The figures that a teacher with another tokenizer has instead of those that compare entries
BETWEEN_TOKENIZERS = {
    DISTILL_ULD: (
        "universal logit distance",
        "between both sorted distributions, 0 to 2; 0 where nothing is matched",
    ),
    DISTILL_MATCHED: ("matched targets", "share of the targets at whose first byte the teacher begins a token too"),
}
# Every other score of a validation is of generated text, and the higher the better
LOWER_IS_BETTER = (TRAIN_LOSS, TRAIN_OBJECTIVE, VAL_LOSS, VAL_PERPLEXITY, VAL_BITS_PER_BYTE)


def lower_is_better(watched: str) -> bool:
    """Whether a run is the better for a lower value of the metric that it is judged by."""
    return watched in LOWER_IS_BETTER
