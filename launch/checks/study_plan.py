"""Study plan: the runs of a distillation study and their overrides."""

from dataclasses import dataclass
from typing import Any

from gpt2lab.analysis.study_results import CE, KD, LAYERS, SCRATCH, Arm
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from launch.config.cli_overrides import quote_free_text
from launch.config.groups import experiment_keys
from launch.config.literal_text import override
from launch.config.schema import STUDY, RunConfig
from launch.config.unused_keys import given_keys, without

# Keys that a study sets for its runs, with the reason for the error message
RESERVED = {
    "task": "it trains with task=pretrain and task=distill",
    "init": "study.inits lists the initializations to compare",
    "epochs": "arms are compared at equal steps, so give steps",
    "baseline": "its runs without a teacher are the baseline",
}
STUDY_KEYS = ("experiment", "task", "init", "seed", "steps", "teacher", "name", "run_dir", "resume")
LEARNING_RATES = ("optimizer.lr", "optimizer.adamw_lr")


@dataclass(frozen=True)
class PlannedRun:
    """One run of an arm; equal instances are the same run."""

    arm: Arm
    seed: int
    lr_factor: float
    steps: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        arm = f"{self.arm.init}-{self.arm.learns_by.lower()}"
        return f"{arm}-seed{self.seed}-lr{self.lr_factor:g}x-{self.steps}steps"


def check(config: RunConfig) -> None:
    """Check a study: no key that it sets for its runs, and a valid comparison.

    Raises:
        InputError: the first invalid key.
    """
    if not config.is_study:
        return
    for key in given_keys(config.invocation.overrides):
        if key in RESERVED:
            raise InputError(f"experiment={STUDY} sets {key} itself: {RESERVED[key]}.\nLeave {key} out.")
    if config.resume not in (None, "auto"):
        raise InputError(
            f"resume=RUN_DIR resumes a single run. Resume a study with: python train.py experiment={STUDY} … "
            f"run_dir={config.resume} resume=auto"
        )
    if config.resume == "auto" and config.run_dir is None and config.name is None:
        raise InputError("resume=auto needs the folder of the study: give run_dir= or name= too.")
    if config.model.n_layer is None:
        raise InputError(f"experiment={STUDY} starts students from scratch, so it needs their size.\nGive model=nano.")
    if config.loss.hard_weight == 1:
        raise InputError(
            "loss.hard_weight=1 is cross-entropy alone, which a study runs in any case.\n"
            "Give the weight of the labels in distillation: at least 0 and below 1."
        )
    if config.loss.name == "uld" and LAYERS in config.study.inits:
        raise InputError(
            "loss=uld is for a teacher with another tokenizer, from which the student cannot be initialized.\n"
            "Skip these runs: study.inits=[scratch]"
        )
    for key in ("lr_factors", "inits"):
        values = vars(config.study)[key]
        if not values or len(set(values)) < len(values):
            raise InputError(f"study.{key}={values}: give at least one value, and none twice.")


def arms(config: RunConfig) -> list[Arm]:
    """Arms of the study, in the order of its tables."""
    return [Arm(init, learns_by) for init in sorted(config.study.inits) for learns_by in (CE, KD)]


def baseline_arm(config: RunConfig) -> Arm:
    """The first arm without a teacher; its learning rate is always tuned."""
    return next(arm for arm in arms(config) if arm.learns_by == CE)


def tuned_arms(config: RunConfig) -> list[Arm]:
    """Arms with their own learning rate search; all others use the baseline's learning rate."""
    return arms(config) if config.study.tune == "every_arm" else [baseline_arm(config)]


def seeds(config: RunConfig) -> list[int]:
    """Seeds of the study; each arm runs with every seed."""
    return [config.seed + number for number in range(config.study.seeds)]


def learning_rate(config: RunConfig, factor: float) -> float:
    return float(f"{config.optimizer.lr * factor:.6g}")


def shared_overrides(config: RunConfig) -> list[str]:
    """Overrides of all runs: the values of the study's recipe, and the given ones that are not keys of the study.

    All values are explicit, so that the command of each run works without the study.
    """
    chosen, keys = experiment_keys(STUDY)
    recipe = [f"{key}={value}" for key, value in {**chosen, **keys}.items() if key != "study"]
    own = [*STUDY_KEYS, *LEARNING_RATES, *(f"study.{name}" for name in vars(config.study)), "study"]
    given = without(config.invocation.overrides, own)
    return [*without(recipe, [*own, *given_keys(given)]), *given]


def run_overrides(run: PlannedRun, config: RunConfig, teacher: str, tokenizer: TokenizerChoice) -> list[str]:
    """Overrides of one run.

    Args:
        teacher: folder of the teacher's model.
        tokenizer: tokenizer of this teacher's students; runs without a teacher must use it too.
    """
    factor = run.lr_factor
    own: list[str] = [f"seed={run.seed}", f"steps={run.steps}", f"optimizer.lr={learning_rate(config, factor)}"]
    if config.optimizer.name == "muon" and config.optimizer.adamw_lr:
        own.append(f"optimizer.adamw_lr={config.optimizer.adamw_lr * factor:.6g}")
    if run.arm == Arm(SCRATCH, CE):
        own += ["task=pretrain", f"init={SCRATCH}", *_tokenizer_overrides(tokenizer)]
    else:
        own += ["task=distill", f"init={run.arm.init}", override("teacher", teacher)]
        own += _cross_entropy_overrides(config) if run.arm.learns_by == CE else []
    return [*without(shared_overrides(config), given_keys(own)), *quote_free_text(own)]


def _cross_entropy_overrides(config: RunConfig) -> list[str]:
    """Overrides with which a student initialized from the teacher trains on cross-entropy alone."""
    hidden = [f"loss.{name}=0" for name in ("hidden_cosine", "hidden_mse") if vars(config.loss)[name]]
    return ["loss.hard_weight=1", "teacher_cache=none", "sequences=data", *hidden]


def _tokenizer_overrides(tokenizer: TokenizerChoice) -> list[str]:
    if tokenizer.kind == "bpe":
        return ["tokenizer=bpe", f"vocab_size={tokenizer.vocab_size}"]
    return ["tokenizer=hub", override("tokenizer.source", tokenizer.source)]


def steps_in_the_same_time(steps: float, seconds: float, allowed: float) -> int:
    """Number of steps that take `allowed` seconds, at least `steps`.

    Args:
        steps: steps that took `seconds`.
        allowed: time limit in seconds.
    """
    return max(round(steps), round(steps * allowed / seconds))


def training_seconds(report: dict[str, Any]) -> float:
    """Seconds of the training steps of a run from its report, without validation and start-up."""
    speed = report.get("tokens_per_second")
    return float(report["tokens_seen"]) / float(speed) if speed else float(report["seconds"])
