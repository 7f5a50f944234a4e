"""Settings of what is more than one run on this machine: studies, searches, and the launchers of clusters."""

from dataclasses import dataclass
from typing import Any

from gpt2lab.keys import key

OPTUNA, SLURM, RAY, STUDY = "hparams_search=optuna", "launcher=slurm", "launcher=ray", "experiment=distill_study"
SLURM_OR_RAY = "launcher=slurm,ray"


@dataclass(frozen=True)
class StudySettings:
    """The runs of a study of distillation."""

    seeds: int = key("seeds; each is one pair of every comparison", 3, within="[1, 1000]", read_by=STUDY)
    lr_factors: list[float] = key(
        "multiples of optimizer.lr that are tried", factory=lambda: [2.0, 4.0, 8.0], within="(0, 1e6]", read_by=STUDY
    )
    tune: str = key(
        "learning rate of the arms: the best of the untaught student from scratch (baseline), or of each arm",
        "baseline",
        choices=("baseline", "every_arm"),
        read_by=STUDY,
    )
    inits: list[str] = key(
        "initializations of the student",
        factory=lambda: ["scratch", "teacher_layers"],
        choices=("scratch", "teacher_layers"),
        read_by=STUDY,
    )


@dataclass(frozen=True)
class SearchSettings:
    """A search of hyper-parameters."""

    name: str = key("search", "none", choices=("none", "optuna"))
    n_trials: int = key("jobs, failed and pruned ones included", 20, within="[1, 1e6]", read_by=OPTUNA)
    sampler: str = key("sampler", "tpe", choices=("tpe", "random"), read_by=OPTUNA)
    seed: int | None = key(
        "seed of the sampler; null: other values every time", None, within="[0, 4294967295]", read_by=OPTUNA
    )
    n_startup_trials: int = key(
        "jobs at random values before tpe models the results, and finished jobs before median prunes",
        5,
        within="[0, 1e6]",
        read_by=OPTUNA,
    )
    pruner: str = key(
        "pruner: median (worse than half of the jobs at that step) or successive_halving (a quarter passes each rung)",
        "median",
        choices=("none", "median", "successive_halving"),
        read_by=OPTUNA,
    )
    warmup_steps: int = key("first step at which a job may be pruned", 0, within="[0, 1e9]", read_by=OPTUNA)


@dataclass(frozen=True)
class LauncherSettings:
    """Place where runs are executed, and the resources of a cluster job."""

    name: str = key(
        "launcher: this machine (processes), slurm or ray", "processes", choices=("processes", "slurm", "ray")
    )
    executor: str = key(
        "slurm, or local: submitit's own processes on this machine", "slurm", choices=("slurm", "local"), read_by=SLURM
    )
    partition: str | None = key("partition; null, here and below: the cluster's default", None, read_by=SLURM)
    account: str | None = key("account", None, read_by=SLURM)
    qos: str | None = key("quality of service", None, read_by=SLURM)
    time: int = key("minutes of a job; a longer run is requeued and resumes", 1440, within="[1, 1e6]", read_by=SLURM)
    notice: int = key("seconds before the time limit at which the run saves", 120, within="[1, 1e5]", read_by=SLURM)
    requeues: int = key("how often a job may be requeued", 10, within="[0, 1000]", read_by=SLURM)
    memory: float | None = key("GB of each machine", None, within="(0, 1e6]", read_by=SLURM_OR_RAY)
    cpus: int = key("cores of each device", 1, within="[1, 4096]", read_by=SLURM_OR_RAY)
    sbatch: dict[str, Any] = key("further parameters of sbatch, names without dashes", factory=dict, read_by=SLURM)
    setup: list[str] = key("shell commands before the job", factory=list, read_by=SLURM)
    address: str = key(
        "Ray cluster: local (started here), auto (the one that `ray start` started) or HOST:PORT", "local", read_by=RAY
    )
