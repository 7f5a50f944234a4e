"""Study results: what the runs of a study of distillation say — each arm's losses, and the arms against each other."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gpt2lab.evaluation.document_losses import DocumentLosses, loss_difference, mean_losses
from gpt2lab.evaluation.paired_statistics import PairedDifference, Summary, paired_difference, summary, verdict

if TYPE_CHECKING:
    from gpt2lab.evaluation.jackknife import DocumentDifference

CE, KD = "CE", "KD"  # the labels' cross-entropy, knowledge distillation
SCRATCH, LAYERS = "scratch", "teacher_layers"
TOKENS, TIME = "equal tokens", "equal time"


@dataclass(frozen=True)
class Arm:
    """One way to train the student: where it starts from, and what it learns by."""

    init: str  # SCRATCH or LAYERS
    learns_by: str  # CE or KD

    @property
    def name(self) -> str:
        return f"{self.init} + {self.learns_by}"


@dataclass(frozen=True)
class ArmResult:
    """Runs of one arm.

    Attributes:
        budget: what the arms it is compared with have in common: TOKENS or TIME.
        losses: validation loss in nats per token by seed; None where the run failed.
        seconds: training time of a run, the median; None where none finished.
        documents: the last validation by document, by seed.
        document_error: standard error of the mean loss over seeds, between documents: how far the choice of validation
            text matters. The summary's sd is the error between seeds; the two are never added.
    """

    arm: Arm
    budget: str
    steps: int
    losses: dict[int, float | None]
    summary: Summary
    seconds: float | None
    documents: dict[int, DocumentLosses] = field(default_factory=dict, repr=False)

    @property
    def document_error(self) -> float | None:
        seeds = [seed for seed, loss in self.losses.items() if loss is not None]
        mean = mean_losses([self.documents.get(seed) for seed in seeds])
        return mean.standard_error if mean else None


@dataclass(frozen=True)
class Contrast:
    """One arm against another, seed by seed; negative where the first has the lower loss.

    Attributes:
        by_document: the same difference of the seeds' means, paired by document; None where the two did not validate on
            the same targets.
    """

    budget: str
    title: str
    difference: PairedDifference
    verdict: str
    by_document: "DocumentDifference | None" = None


@dataclass(frozen=True)
class LearningRates:
    """The search that an arm's learning rate, or that of all arms, comes from.

    Attributes:
        arm: whose runs decided.
        losses: by learning rate; None where the run failed.
        chosen: the one with the lowest loss.
        factor: that one, as a multiple of the rate that was given.
    """

    arm: str
    losses: dict[float, float | None]
    chosen: float
    factor: float

    @property
    def at_the_edge(self) -> str:
        """What to try further when no tried rate encloses the best; empty where the best has neighbours."""
        rates = sorted(self.losses)
        if len(rates) == 1 or rates[0] < self.chosen < rates[-1]:
            return ""
        return "lower" if self.chosen == rates[0] else "higher"


@dataclass(frozen=True)
class StudyResults:
    """Everything a study found."""

    seeds: list[int]
    teacher: str
    teacher_loss: float | None
    learning_rates: list[LearningRates]
    arms: list[ArmResult]
    contrasts: list[Contrast]
    failed_runs: list[str]

    def facts(self) -> dict[str, Any]:
        """For JSON; each arm with its document error instead of all documents."""
        found = asdict(self)
        for content, arm in zip(found["arms"], self.arms, strict=True):
            del content["documents"]
            content["document_error"] = arm.document_error
        return found


def arm_result(
    arm: Arm,
    budget: str,
    steps: int,
    losses: dict[int, float | None],
    seconds: float | None,
    documents: dict[int, DocumentLosses] | None = None,
) -> ArmResult:
    """With mean and standard deviation over the seeds whose runs finished."""
    there = [loss for loss in losses.values() if loss is not None]
    return ArmResult(arm, budget, steps, losses, summary(there), seconds, documents or {})


def contrasts(arms: list[ArmResult]) -> list[Contrast]:
    """With a teacher against without, and the teacher's layers against random weights, as far as both sides were run.

    More time changes nothing of KD's runs, so they stand on both sides of the table.
    """
    there = {(result.arm, TOKENS if result.arm.learns_by == KD else result.budget): result for result in arms}
    found = []
    for budget, title, first, second, names in _questions():
        ours = there.get((first, TOKENS if first.learns_by == KD else budget))
        theirs = there.get((second, budget))
        if ours is not None and theirs is not None:
            difference = paired_difference(ours.losses, theirs.losses)
            words, seeds = verdict(difference, *names), list(difference.differences)
            ours_by_document, theirs_by_document = (
                mean_losses([arm.documents.get(seed) for seed in seeds]) for arm in (ours, theirs)
            )
            by_document = loss_difference(ours_by_document, theirs_by_document)
            found.append(Contrast(budget, title, difference, words, by_document))
    return found


def _questions() -> Iterator[tuple[str, str, Arm, Arm, tuple[str, str]]]:
    """(budget, title, first, second, what tells the two apart)."""
    for budget in (TOKENS, TIME):
        for init, words in ((SCRATCH, "from scratch"), (LAYERS, "from the teacher's layers")):
            yield budget, f"KD − CE {words}", Arm(init, KD), Arm(init, CE), (KD, CE)
        for learns_by in (CE, KD) if budget == TOKENS else (CE,):
            title = f"{LAYERS} − {SCRATCH} with {learns_by}"
            yield budget, title, Arm(LAYERS, learns_by), Arm(SCRATCH, learns_by), (LAYERS, SCRATCH)
