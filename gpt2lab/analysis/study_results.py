"""Results of a distillation study: losses of each arm, and differences between arms."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gpt2lab.evaluation.document_losses import DocumentLosses, loss_difference, mean_losses
from gpt2lab.evaluation.paired_statistics import PairedDifference, Summary, paired_difference, summary, verdict
from gpt2lab.number_format import column_decimals

if TYPE_CHECKING:
    from gpt2lab.evaluation.jackknife import DocumentDifference

CE, KD = "CE", "KD"  # cross-entropy, knowledge distillation
SCRATCH, LAYERS = "scratch", "teacher_layers"
TOKENS, TIME = "equal tokens", "equal time"


@dataclass(frozen=True)
class Arm:
    """One way to train the student: initialization and loss."""

    init: str  # SCRATCH or LAYERS
    learns_by: str  # CE or KD

    @property
    def name(self) -> str:
        return f"{self.init} + {self.learns_by}"


@dataclass(frozen=True)
class ArmResult:
    """Runs of one arm.

    Attributes:
        budget: what compared arms have in common: TOKENS or TIME.
        losses: seed → validation loss, nats per token; None for a failed run.
        seconds: median training time of a run; None if none finished.
        documents: seed → validation of the exported weights by document.
        made_steps: median steps of a run, fewer than `steps` where it stopped early; None if none finished.
        document_error: standard error of the mean loss over seeds, between documents: the uncertainty from the choice
            of validation text. The summary's sd is that between seeds; the two are never added.
    """

    arm: Arm
    budget: str
    steps: int
    losses: dict[int, float | None]
    summary: Summary
    seconds: float | None
    documents: dict[int, DocumentLosses] = field(default_factory=dict, repr=False)
    made_steps: float | None = None

    @property
    def document_error(self) -> float | None:
        seeds = [seed for seed, loss in self.losses.items() if loss is not None]
        mean = mean_losses([self.documents.get(seed) for seed in seeds])
        return mean.standard_error if mean else None


@dataclass(frozen=True)
class Contrast:
    """Difference between two arms, paired by seed; negative if the first has the lower loss.

    Attributes:
        by_document: difference of the means over seeds, paired by document; None if the arms were not validated on the
            same targets.
    """

    budget: str
    title: str
    difference: PairedDifference
    verdict: str
    by_document: "DocumentDifference | None" = None


@dataclass(frozen=True)
class LearningRates:
    """Learning-rate search for one arm or for all arms.

    Attributes:
        arm: arm whose runs were used.
        losses: learning rate → loss; None for a failed run.
        chosen: learning rate with the lowest loss.
        factor: `chosen` divided by the configured rate.
    """

    arm: str
    losses: dict[float, float | None]
    chosen: float
    factor: float

    @property
    def decimals(self) -> int:
        """Decimals of the losses in tables."""
        return column_decimals(loss for loss in self.losses.values() if loss is not None)

    @property
    def at_the_edge(self) -> str:
        """Direction in which to extend the search if the best rate is the first or last; otherwise empty."""
        rates = sorted(self.losses)
        if len(rates) == 1 or rates[0] < self.chosen < rates[-1]:
            return ""
        return "lower" if self.chosen == rates[0] else "higher"


@dataclass(frozen=True)
class StudyResults:
    """All results of a study."""

    seeds: list[int]
    teacher: str
    teacher_loss: float | None
    learning_rates: list[LearningRates]
    arms: list[ArmResult]
    contrasts: list[Contrast]
    failed_runs: list[str]

    @property
    def decimals(self) -> int:
        """Decimals of the arms' losses in tables."""
        return column_decimals(arm.summary.mean for arm in self.arms if arm.summary.mean is not None)

    def facts(self) -> dict[str, Any]:
        """Return the results for JSON, with each arm's document error instead of its documents."""
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
    made_steps: float | None = None,
) -> ArmResult:
    """Build an ArmResult with mean and standard deviation over the finished runs."""
    finished = [loss for loss in losses.values() if loss is not None]
    return ArmResult(arm, budget, steps, losses, summary(finished), seconds, documents or {}, made_steps)


def contrasts(arms: list[ArmResult]) -> list[Contrast]:
    """Compare KD with CE, and the teacher's layers with random weights, as far as both arms were run.

    Only CE runs differ between the budgets; KD runs are used for both.
    """
    by_arm = {(result.arm, TOKENS if result.arm.learns_by == KD else result.budget): result for result in arms}
    found = []
    for budget, title, first, second, names in _questions():
        ours = by_arm.get((first, TOKENS if first.learns_by == KD else budget))
        theirs = by_arm.get((second, budget))
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
    """Yield (budget, title, first, second, short names of the two)."""
    for budget in (TOKENS, TIME):
        for init, words in ((SCRATCH, "from scratch"), (LAYERS, "from the teacher's layers")):
            yield budget, f"KD − CE {words}", Arm(init, KD), Arm(init, CE), (KD, CE)
        for learns_by in (CE, KD) if budget == TOKENS else (CE,):
            title = f"{LAYERS} − {SCRATCH} with {learns_by}"
            yield budget, title, Arm(LAYERS, learns_by), Arm(SCRATCH, learns_by), (LAYERS, SCRATCH)
