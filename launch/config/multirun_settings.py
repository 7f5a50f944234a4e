"""Settings of what is more than one run on this machine: studies, searches, and the launchers of clusters."""

from dataclasses import dataclass
from typing import Any

from gpt2lab.keys import key

OPTUNA, SLURM, RAY, STUDY = "hparams_search=optuna", "launcher=slurm", "launcher=ray", "experiment=distill_study"
SLURM_OR_RAY = "launcher=slurm,ray"


@dataclass(frozen=True)
class StudySettings:
    """The runs of a study of distillation."""

    seeds: int = key(
        "number of seeds (seed, seed + 1, …): the pairs of every comparison", 3, within="[1, 1000]", read_by=STUDY
    )
    lr_factors: list[float] = key(
        "multiples of optimizer.lr that are tried with the first seed",
        factory=lambda: [0.5, 1.0, 2.0],
        within="(0, 1e6]",
        read_by=STUDY,
    )
    tune: str = key(
        "baseline: all arms use the best learning rate of scratch + cross-entropy; every_arm: each its own",
        "baseline",
        choices=("baseline", "every_arm"),
        read_by=STUDY,
    )
    inits: list[str] = key(
        "initializations of the student that are compared",
        factory=lambda: ["scratch", "teacher_layers"],
        choices=("scratch", "teacher_layers"),
        read_by=STUDY,
    )


@dataclass(frozen=True)
class SearchSettings:
    """A search of hyper-parameters."""

    name: str = key("name of the search", "none", choices=("none", "optuna"))
    n_trials: int = key("number of jobs, failed and pruned ones included", 20, within="[1, 1e6]", read_by=OPTUNA)
    sampler: str = key("Optuna sampler", "tpe", choices=("tpe", "random"), read_by=OPTUNA)
    seed: int | None = key(
        "random seed of the sampler; null: different values every time", None, within="[0, 4294967295]", read_by=OPTUNA
    )
    n_startup_trials: int = key(
        "jobs with random values before tpe uses results and before median prunes",
        5,
        within="[0, 1e6]",
        read_by=OPTUNA,
    )
    pruner: str = key(
        "median: prune a job worse than half of the others; successive_halving: keep a quarter per rung",
        "median",
        choices=("none", "median", "successive_halving"),
        read_by=OPTUNA,
    )
    warmup_steps: int = key("optimizer step before which no job is pruned", 0, within="[0, 1e9]", read_by=OPTUNA)


@dataclass(frozen=True)
class LauncherSettings:
    """Place where runs are executed, and the resources of a cluster job."""

    name: str = key(
        "processes: this machine; slurm, ray: a cluster", "processes", choices=("processes", "slurm", "ray")
    )
    executor: str = key(
        "slurm; local: processes of submitit on this machine, for tests",
        "slurm",
        choices=("slurm", "local"),
        read_by=SLURM,
    )
    partition: str | None = key("SLURM partition; null: the default of the cluster", None, read_by=SLURM)
    account: str | None = key("SLURM account; null: the default of the cluster", None, read_by=SLURM)
    qos: str | None = key("SLURM quality of service; null: the default of the cluster", None, read_by=SLURM)
    time: int = key(
        "time limit of a job in minutes; a longer run saves, is requeued and resumed",
        1440,
        within="[1, 1e6]",
        read_by=SLURM,
    )
    notice: int = key(
        "seconds before the time limit at which the run receives the signal to save",
        120,
        within="[1, 1e5]",
        read_by=SLURM,
    )
    requeues: int = key("maximum number of times a job is requeued", 10, within="[0, 1000]", read_by=SLURM)
    memory: float | None = key(
        "GB per machine (slurm) or per job (ray); null: the default of the cluster",
        None,
        within="(0, 1e6]",
        read_by=SLURM_OR_RAY,
    )
    cpus: int = key("CPU cores per device", 1, within="[1, 4096]", read_by=SLURM_OR_RAY)
    sbatch: dict[str, Any] = key(
        "further sbatch parameters, names without dashes: {constraint: a100, exclusive: true}",
        factory=dict,
        read_by=SLURM,
    )
    setup: list[str] = key("shell commands that run before the job: ['module load cuda']", factory=list, read_by=SLURM)
    address: str = key(
        "Ray cluster: local (started here), auto (started by `ray start`) or HOST:PORT", "local", read_by=RAY
    )
