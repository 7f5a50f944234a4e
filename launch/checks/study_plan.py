"""Study plan: which runs a study of distillation consists of, and what each is told."""

from dataclasses import dataclass
from typing import Any

from gpt2lab.analysis.study_results import CE, KD, LAYERS, SCRATCH, Arm
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from launch.config.cli_overrides import readable_by_hydra
from launch.config.groups import experiment_keys
from launch.config.literal_text import override
from launch.config.schema import STUDY, RunConfig
from launch.config.unused_keys import given_keys, without

# Keys that a study gives to its runs itself, with what the user says instead
INSTEAD = {
    "task": "it trains with task=pretrain and task=distill",
    "init": "study.inits says which starts are compared",
    "baseline": "its runs without a teacher are the baseline",
}
OF_THE_STUDY = ("experiment", "task", "init", "seed", "steps", "teacher", "name", "run_dir", "resume")
LEARNING_RATES = ("optimizer.lr", "optimizer.adamw_lr")


@dataclass(frozen=True)
class PlannedRun:
    """One run of an arm; two that are equal are one run."""

    arm: Arm
    seed: int
    lr_factor: float
    steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        arm = f"{self.arm.init}-{self.arm.learns_by.lower()}"
        return f"{arm}-seed{self.seed}-lr{self.lr_factor:g}x-{self.steps}steps"


def check(config: RunConfig) -> None:
    """What a study leaves no choice about, and what would make its comparison none.

    Raises:
        InputError
    """
    if not config.is_study:
        return
    for key in given_keys(config.invocation.overrides):
        if key in INSTEAD:
            raise InputError(f"experiment={STUDY} sets {key} itself: {INSTEAD[key]}.\nLeave {key} out.")
    if config.resume not in (None, "auto"):
        raise InputError(
            f"A study is continued by its own command: python train.py experiment={STUDY} … "
            f"run_dir={config.resume} resume=auto"
        )
    if config.resume == "auto" and config.run_dir is None and config.name is None:
        raise InputError("resume=auto needs to know where the study lies: give run_dir= or name= too.")
    if config.model.n_layer is None:
        raise InputError(f"experiment={STUDY} starts students from scratch, so it needs their size.\nGive model=nano.")
    if config.loss.hard_weight == 1:
        raise InputError(
            "loss.hard_weight=1 is cross-entropy alone, which a study runs anyway.\n"
            "Give the weight of the labels in distillation, from 0 to below 1."
        )
    if config.loss.name == "uld" and LAYERS in config.study.inits:
        raise InputError(
            "loss=uld is for a teacher with other tokens, and no student of these tokens can be cut out of that.\n"
            "Leave those runs out: study.inits=[scratch]"
        )
    for key in ("lr_factors", "inits"):
        values = vars(config.study)[key]
        if not values or len(set(values)) < len(values):
            raise InputError(f"study.{key}={values}: give at least one value and none twice.")


def arms(config: RunConfig) -> list[Arm]:
    """In the order in which tables show them."""
    return [Arm(init, learns_by) for init in sorted(config.study.inits) for learns_by in (CE, KD)]


def baseline_arm(config: RunConfig) -> Arm:
    """The arm that must not lose for want of a better learning rate."""
    return next(arm for arm in arms(config) if arm.learns_by == CE)


def tuned_arms(config: RunConfig) -> list[Arm]:
    """The arms whose learning rate is searched for; all others take the baseline's."""
    return arms(config) if config.study.tune == "every_arm" else [baseline_arm(config)]


def seeds(config: RunConfig) -> list[int]:
    """The seeds of the pairs."""
    return [config.seed + number for number in range(config.study.seeds)]


def learning_rate(config: RunConfig, factor: float) -> float:
    return float(f"{config.optimizer.lr * factor:.6g}")


def shared_overrides(config: RunConfig) -> list[str]:
    """What all runs are told: the recipe's values, and what was given beside it and is not the study's own.

    Written out, so that every run's command does the same without the study.
    """
    chosen, keys = experiment_keys(STUDY)
    told = [f"{key}={value}" for key, value in {**chosen, **keys}.items() if key != "study"]
    own = [*OF_THE_STUDY, *LEARNING_RATES, *(f"study.{name}" for name in vars(config.study)), "study"]
    given = without(config.invocation.overrides, own)
    return [*without(told, [*own, *given_keys(given)]), *given]


def run_overrides(run: PlannedRun, config: RunConfig, teacher: str, tokenizer: TokenizerChoice) -> list[str]:
    """What one run is told.

    Args:
        teacher: folder of the teacher's model.
        tokenizer: the one that students of this teacher have; those that never see the teacher must have it too.
    """
    factor = run.lr_factor
    own: list[str] = [f"seed={run.seed}", f"steps={run.steps}", f"optimizer.lr={learning_rate(config, factor)}"]
    if config.optimizer.name == "muon" and config.optimizer.adamw_lr:
        own.append(f"optimizer.adamw_lr={config.optimizer.adamw_lr * factor:.6g}")
    if run.arm == Arm(SCRATCH, CE):
        own += ["task=pretrain", f"init={SCRATCH}", *_named(tokenizer)]
    else:
        own += ["task=distill", f"init={run.arm.init}", override("teacher", teacher)]
        own += _without_teaching(config) if run.arm.learns_by == CE else []
    return [*without(shared_overrides(config), given_keys(own)), *readable_by_hydra(own)]


def _without_teaching(config: RunConfig) -> list[str]:
    """Of a teacher only its layers: the teacher is not asked at any training step."""
    hidden = [f"loss.{name}=0" for name in ("hidden_cosine", "hidden_mse") if vars(config.loss)[name]]
    return ["loss.hard_weight=1", "teacher_cache=none", "sequences=data", *hidden]


def _named(tokenizer: TokenizerChoice) -> list[str]:
    if tokenizer.kind == "bpe":
        return ["tokenizer=bpe", f"tokenizer.vocab_size={tokenizer.vocab_size}"]
    return ["tokenizer=hub", override("tokenizer.source", tokenizer.source)]


def steps_in_the_same_time(steps: int, seconds: float, allowed: float) -> int:
    """How many steps fit into the time that the other side's runs take; never fewer than were made.

    Args:
        steps: that took `seconds`.
        allowed: seconds that the other side needs for as many.
    """
    return max(steps, round(steps * allowed / seconds))


def training_seconds(report: dict[str, Any]) -> float:
    """What the steps of a run took, from its report: without validation, which only observes, and without start-up."""
    speed = report.get("tokens_per_second")
    return float(report["tokens_seen"]) / float(speed) if speed else float(report["seconds"])
