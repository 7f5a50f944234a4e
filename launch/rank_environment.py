"""Rank environment: who started this process, as the environment variables show it, and which of them to ignore.

RANK, WORLD_SIZE and LOCAL_RANK alone prove nothing: Kubeflow and Vertex set them for every container, and an export may
be forgotten. A process is a rank only if this project's launcher, torchrun or srun started it as one.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping

OUTCOME_FILE, HEARTBEATS = "GPT2LAB_OUTCOME", "GPT2LAB_HEARTBEATS"  # set by this project's launcher for each rank
OF_TORCHRUN: tuple[str, ...] = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
OF_TORCHRUN += ("MASTER_ADDR", "MASTER_PORT")
# Read by PyTorch, Lightning and transformers, some of them while they are imported
FOREIGN: tuple[str, ...] = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
FOREIGN += ("JSM_NAMESPACE_RANK", "TORCHELASTIC_RUN_ID")


def is_started_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this project's launcher started this process as a rank of a run on this machine."""
    return OUTCOME_FILE in environment


def by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process as a rank."""
    return all(environment.get(name) for name in OF_TORCHRUN)


def by_srun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started this process as one of several tasks, without a torchrun in between."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return tasks.isdecimal() and int(tasks) > 1 and not by_torchrun(environment)


def is_cluster_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or srun started this process as one of several ranks."""
    return not is_started_rank(environment) and (by_torchrun(environment) or by_srun(environment))


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one rank of a run, whoever started it."""
    return is_started_rank(environment) or is_cluster_rank(environment)


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints for the run: it is alone, or rank 0."""
    if not is_rank(environment):
        return True
    return environment["SLURM_PROCID" if is_cluster_rank(environment) and by_srun(environment) else "RANK"] == "0"


def ignore_foreign_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove variables that would make libraries take this process for a rank; print one line that names them."""
    if is_rank(environment):
        return
    ignored = [f"{name}={environment.pop(name)}" for name in FOREIGN if name in environment]
    if environment.get("SLURM_PROCID", "0") != "0":  # a lone process of a step with this number is no second rank
        ignored.append(f"SLURM_PROCID={environment.pop('SLURM_PROCID')}")
    if ignored:
        print(
            f"Ignoring {', '.join(ignored)} from the environment: neither torchrun nor srun started this process.",
            file=sys.stderr,
        )
