"""Rank environment: detects whether this process is a rank started by this project's launcher, torchrun or srun.

RANK, WORLD_SIZE and LOCAL_RANK alone are not sufficient: Kubeflow and Vertex set them in every container, and a shell
may still export them.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping

OUTCOME_FILE, HEARTBEATS = "GPT2LAB_OUTCOME", "GPT2LAB_HEARTBEATS"  # this project's launcher sets them for each rank
TORCHRUN_VARIABLES: tuple[str, ...] = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
TORCHRUN_VARIABLES += ("MASTER_ADDR", "MASTER_PORT")
SRUN_VARIABLES = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST")
# PyTorch, Lightning and transformers read these, some of them at import
RANK_VARIABLES: tuple[str, ...] = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
RANK_VARIABLES += ("JSM_NAMESPACE_RANK", "TORCHELASTIC_RUN_ID")


def is_spawned_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this project's launcher started this process as a rank of a single-machine run."""
    return bool(environment.get(OUTCOME_FILE)) and _is_below(environment, "RANK", "WORLD_SIZE")


def is_torchrun_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process as a rank."""
    is_complete = all(environment.get(name) for name in TORCHRUN_VARIABLES) and environment["MASTER_PORT"].isdecimal()
    places = ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return is_complete and all(_is_below(environment, *place) for place in places)


def is_srun_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started this process as one of several tasks, without torchrun."""
    is_complete = all(environment.get(name) for name in SRUN_VARIABLES) and environment["SLURM_JOB_ID"].isdecimal()
    has_place = _is_below(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    is_alone = environment.get("SLURM_STEP_NUM_TASKS") == "1"
    return is_complete and has_place and not is_alone and not is_torchrun_rank(environment)


def _is_below(environment: Mapping[str, str], number: str, total: str) -> bool:
    """Whether both variables are whole numbers, and the first is less than the second."""
    values = environment.get(number, ""), environment.get(total, "")
    return all(value.isdecimal() for value in values) and int(values[0]) < int(values[1])


def is_cluster_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or srun started this process as a rank."""
    return not is_spawned_rank(environment) and (is_torchrun_rank(environment) or is_srun_rank(environment))


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank of a run, started by any of the three launchers."""
    return is_spawned_rank(environment) or is_cluster_rank(environment)


def is_main_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints for the run: rank 0, or the only process."""
    if not is_rank(environment):
        return True
    return environment["SLURM_PROCID" if is_cluster_rank(environment) and is_srun_rank(environment) else "RANK"] == "0"


def ignore_foreign_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove the variables that make libraries treat this process as a rank; print one line that lists them."""
    if is_rank(environment):
        return
    ignored = [f"{name}={environment.pop(name)}" for name in RANK_VARIABLES if name in environment]
    if environment.get("SLURM_PROCID", "0") != "0":  # SLURM sets it in a single-task step too
        ignored.append(f"SLURM_PROCID={environment.pop('SLURM_PROCID')}")
    if ignored:
        print(
            f"Ignoring {', '.join(ignored)} from the environment: neither torchrun nor srun started this process.",
            file=sys.stderr,
        )
